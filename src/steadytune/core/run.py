"""The core: a Run binds a list of methods to any model, optimizer and training loop.

The one rule: between optimizer steps the live weights are the evaluated ones. Three views of each weight:
R raw (what the optimizer moves), F forward (what the forward sees), E evaluated (live between steps). One step:

    enter      first run.loss of a step: live E -> R; before_forward in list order builds F through run.show / run.mix
    backward   one or several micro-batches; penalties are added to the loss
    pre-hook   after_backward in list order (another gradient at F); pull_back in reverse order (chain rule F -> R);
               live <- R; before_step in list order (mask, then clip); pulls of R, frozen entries held before
    optimizer  moves R
    post-hook  after_step on R, of anchors first; frozen entries put back; `evaluated`: live and average exchanged;
               index += 1
    leave      F live but no step coming (overflow, Ctrl-C): live <- E, nothing counted
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import UsageError
from . import randomness, shards
from .binding import Binding
from .checks import (
    Scheduled,
    check_added,
    check_exclusive,
    check_last,
    check_methods,
    check_optimizer,
    check_shapes,
    check_targets,
    check_wrapper,
    has_stepped,
)
from .guards import (
    ATTACHED,
    check_averages,
    check_unseen,
    check_untouched,
    drop_gradients,
    guard_hooks,
    leave_others,
    refuse_saving,
    unscale,
)
from .method import VERBS, WEIGHT_VERBS, M, Method, Weight, acts_on_weights, entry, in_setup_order, overrides
from .step import (
    Compute,
    Inputs,
    LossRule,
    MicroBatch,
    Passes,
    Step,
    added,
    autocast,
    default_compute,
    eager,
    one_row,
    repeated,
)
from .tensors import on_devices, tensors_of
from .views import Views
from .watch import FiniteGradients, RateRatios, Watch

FORMAT = 1  # of Run.state_dict(); older formats must go on loading
KEY = "steadytune"  # the extra key in an optimizer's state dict
SCALE = 2.0**10  # of further gradients on their way through half precision: exact in all types but float16
T = TypeVar("T")


class Run(Binding):
    """Binds methods to a model.

    Between steps the model holds the weights to evaluate and to save. During a step, from the first `loss` to the end
    of ``optimizer.step()``, it holds what the methods show to the forward: ``model.state_dict()`` is then an error, and
    `leave` ends a step that will not be taken. One model has one Run at a time: a new Run on it leaves the step of the
    older one first, and once the new one is attached, the older one can only be finished or restarted.

    A Run between steps can be copied and pickled together with its model and its optimizer, in one call:
    ``copy.deepcopy((model, optimizer, run))``.

    Args:
        model: Any module; a DDP or ``torch.compile`` wrapper may be passed and is then used for the forward.
        methods: They act in this order; those that write weights are set up first, wherever they are in the list. The
            Run makes deep copies: ``run[DPSDense]`` is the copy that runs.
        total_steps: Planned optimizer steps; methods with a schedule need it before the first step.
        seed: Seed of the methods' own draws (masks, noise). Initialisation, data order and dropout do not depend on it.
        data: Function that gives an iterable of training batches, for methods that look at data before the first step.

    Raises:
        ValueError: DataParallel; a method that cannot act on this model, or one that changes the model after another
            has looked at it.

    Example:
        >>> run = Run(model, [DPSDense(keep=0.7)], total_steps=400).attach(optimizer)   # doctest: +SKIP
        >>> for batch in loader:                                                        # doctest: +SKIP
        ...     run.loss(batch).backward(); optimizer.step(); optimizer.zero_grad()
        >>> run.finish()                                                                # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        methods: Sequence[Method],
        *,
        total_steps: int | None = None,
        seed: int = 0,
        data: Callable[[], Iterable] | None = None,
    ) -> None:
        super().__init__(model, methods, total_steps=total_steps, seed=seed, data=data)
        self.passes = Passes()  # of the last step, per micro-batch
        self.counted = Passes()  # since this process began the run or went on with it, passes before the first step too
        self.batches = 0  # micro-batches of the steps taken in that time
        self._counted = Passes()  # as the step under way began
        self._rule = LossRule()  # of the last micro-batch: how further gradients of this step compute their loss
        self._autocast: torch.autocast | None = None  # the same for the precision, as far as the loop sets it
        self._ignored = self._stateless = False
        self._micro_batches: list[MicroBatch] = []  # of the step under way
        self._handles: list[Any] = []
        self._guard: RemovableHandle | None = None  # on ``model.state_dict()``, during a step
        self._abandon: weakref.finalize | None = None  # what `leave` does, done too if the Run is collected in a step
        self._watch: Watch | None = None  # of the weights since the last moment at which they may have been written
        self.superseded = False  # whether a later Run took these weights over
        self._stepped = False  # whether a step was counted since `attach`, `restart` or a state was loaded
        self._ratios: RateRatios | None = None  # of learning rates, where a method sets them
        self.finite = FiniteGradients()
        self.grad_norm: Tensor | None = None  # norm of this step's gradient, if the loop computed it: not done twice
        self._save_in_optimizer = True
        self._blank: dict[str, Any] = {}
        self._shapes: dict[str, torch.Size] = {}  # of the weights after `Method.setup`
        self._ready: list[Method] = []  # methods whose `Method.setup` is done
        leave_others(self, self.model.parameters())
        with self._undone_if_refused():
            for method in in_setup_order(self.methods):
                self._set_up(method)

    @contextlib.contextmanager
    def _undone_if_refused(self) -> Iterator[None]:
        """After an error, take back what methods froze, added beside the model and hooked on.

        Blocks that they put into the model stay, and so do weights that they drew.
        """
        trained = {p: p.requires_grad for p in self.model.parameters()}
        parts = {name for name, _ in self.model.named_children()}
        try:
            yield
        except BaseException:
            for parameter, before in trained.items():
                parameter.requires_grad_(before)
            self.release()
            for name in [name for name, _ in self.model.named_children() if name not in parts]:
                delattr(self.model, name)
            raise

    def append(self, method: M) -> M:
        """Add a method to the end of the list, before `attach` or `restart`; returns the copy that will run.

        Raises:
            UsageError: The method writes weights in its setup, which earlier ones have looked at.
        """
        check_last(self.methods, method)
        added = copy.deepcopy(method)
        self.methods.append(added)
        self._set_up(added)
        if self.optimizer is not None:
            added.attach(self)
            self._blank["methods"].append(copy.deepcopy(added.state_dict()))
        return added

    def _set_up(self, method: Method) -> None:
        self._references.open = True
        method.setup(self)
        self._references.open = False
        self._parts = {}  # setup may have changed the structure
        self._shapes = {n: p.shape for n, p in self.model.named_parameters()}
        self._ready.append(method)

    @property
    def batch(self) -> list[Inputs]:
        """The micro-batches of the step under way; from its backward pass on, those whose loss was sent back."""
        return [micro.inputs for micro in self._micro_batches]

    def kept(self, each: Mapping[int, T]) -> list[T]:
        """What a method kept for each micro-batch of `batch`, out of what it kept by `Step.number`."""
        return [each[micro.number] for micro in self._micro_batches if micro.number in each]

    # ------------------------------------------------------------------ the step

    def attach(self, optimizer: Any, *, save_in_optimizer: bool = True) -> Run:
        """Hook onto an optimizer: before its first step, and best before any learning-rate scheduler is built.

        Args:
            optimizer: A torch optimizer, or accelerate's wrapper around one.
            save_in_optimizer: Put `state_dict` under one extra key of the optimizer's state dict.

        Raises:
            ValueError: An optimizer that cannot work with methods on weights, or that was built from another model.
            UsageError: A model resized since the Run was made.
            RuntimeError: The Run is attached already, the optimizer has state but the methods have none, or a scheduler
                exists and a method changes parameter groups.
        """
        optimizer = bare(optimizer)
        if self.optimizer is not None:
            raise RuntimeError("this Run is already attached: use run.restart() to train once more")
        check_optimizer(optimizer)
        if save_in_optimizer and has_stepped(optimizer):
            raise RuntimeError(
                "attach() after the optimizer's first step, or after its state was loaded: the methods would start "
                "anew in the middle of a run. Call run.attach(optimizer) first, then optimizer.load_state_dict(...)"
            )
        check_shapes(self._shapes, self.model)
        check_added(self._new, self.model, optimizer)
        self.optimizer, self._save_in_optimizer = optimizer, save_in_optimizer
        try:
            self._join(optimizer)
        except BaseException:
            self.optimizer = None  # what was refused is not attached
            raise
        self._hook()
        self._blank = copy.deepcopy(self.state_dict())
        return self

    def _join(self, optimizer: Optimizer) -> None:
        """Give the methods the optimizer, unless it holds nothing of this model or two methods exclude each other."""
        if not self.weights():
            raise ValueError(
                "the optimizer holds no trainable parameter of this model: build it from model.parameters() "
                "of the model given to Run, after all changes of its structure"
            )
        self._attach_methods(optimizer)
        check_exclusive(
            (m, self.weights(m, getattr(m, "scope", "all")), acts_on_weights(m)) for m in self.methods if m.exclusive
        )

    def _attach_methods(self, optimizer: Optimizer) -> None:
        """Call `Method.attach`, first of those that put weights into the optimizer."""
        scheduled, setter = Scheduled(optimizer), None
        for method in sorted(self.methods, key=lambda method: not method.adds_weights):
            before, name = self._rates_by_weight(), type(method).__name__
            method.attach(self)
            scheduled.check(name)
            if before.items() - self._rates_by_weight().items():
                setter = name
        if setter is not None:
            self._ratios = RateRatios(optimizer, setter)

    def _rates_by_weight(self) -> dict[str, Any]:
        return {w.name: w.group.get("lr") for w in self.weights()}

    def _hook(self) -> None:
        assert self.optimizer is not None
        optimizer = self.optimizer
        leave_others(self, [w.parameter for w in self.weights()], supersede=True)
        self.superseded = self._stepped = False
        ATTACHED.add(self)
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        if self._save_in_optimizer:
            self._handles += [
                optimizer.register_state_dict_post_hook(self._add_state),
                optimizer.register_load_state_dict_pre_hook(self._take_state),
            ]

    def loss(
        self,
        inputs: Inputs,
        *,
        compute: Compute | None = None,
        model: nn.Module | None = None,
        items: Tensor | int | None = None,
        penalty_scale: float = 1.0,
    ) -> Tensor:
        """Compute the loss of one micro-batch with all penalties. The first call of a step builds the forward view.

        A loss that is not sent back, as one that is not finite, does not count: the step is that of the others.

        Args:
            inputs: Keyword arguments of the model, batch axis first.
            compute: ``(model, inputs, copies) -> (loss, outputs)``; by default the loss that the model returns.
            model: The (wrapped) model to call, when it is another than the one given to Run.
            items: Token count of the whole step, when ``compute`` divides by it (times ``copies``).
            penalty_scale: Factor of the penalties, for a loss already divided by ``items`` over the whole step.

        Raises:
            RuntimeError: The Run is not attached, the wrapper cannot work, or weights moved while no step was counted.
            UsageError: Labels are NaN.
        """
        self.wrapper = self.wrapper if model is None else model
        rule = self._rule = LossRule(compute or default_compute, items, penalty_scale)
        self.enter()
        self._autocast = autocast(self._device)  # a loop may have called `enter` by itself, in another context
        check_wrapper(self.wrapper)
        check_targets(inputs)
        number, state = len(self._micro_batches) + 1, randomness.RandomState(self._device)
        micro = MicroBatch(inputs, rule, number, state, autocast(self._device))
        self._micro_batches.append(micro)
        loss = self._look(micro)
        micro.listen(loss)
        return loss

    def _look(self, micro: MicroBatch) -> Tensor:
        """The loss of a micro-batch with all penalties at the live weights; the same draws at every look."""
        step = Step(self, micro)
        penalties = [m for m in self.methods if overrides(m, "penalty")]
        self._rule, self._micro = micro.rule, micro.number
        model = self.wrapper
        try:
            with contextlib.ExitStack() as stack:
                for method in self.methods:
                    for module, tensor in (method.before_batch(step) or {}).items():
                        stack.enter_context(added(module, tensor))
                        model = eager(self.wrapper)
                loss, outputs = self.task(step.inputs, model, copies=step.copies)
            if penalties and outputs is None:
                raise UsageError(
                    f"{type(penalties[0]).__name__} looks at the model's outputs, and the loss came without them: "
                    "return (loss, outputs), in a Trainer's compute_loss whenever return_outputs is true"
                )
            if penalties:
                step.arrive(loss, outputs)
            for method in penalties:
                penalty = method.penalty(step)
                if penalty is not None:
                    loss = loss + penalty * micro.rule.penalty_scale
        finally:
            self._micro = 0
        return loss

    def look_again(self, moves: Iterable[tuple[Weight, Tensor]]) -> None:
        """Replace the step's gradient by that of the same loss at moved weights, in `Method.after_backward`.

        Every micro-batch passes the model once more with its penalties, under the draws of its first pass. The losses
        weigh as in the loop, scaled so that their weights sum to 1 (to the number of micro-batches, where each loss is
        divided by the token count of the step): this takes out the factor of a ``GradScaler``. Afterwards the weights
        are as before, bit for bit.

        Args:
            moves: Weights, each with the tensor that is added to its live values.
        """
        sent = [micro for micro in self._micro_batches if micro.sent is not None]
        left = iter(sent)
        with self.moved(moves):
            grads = self.gradient([micro.inputs for micro in sent], lambda _: self._repeat(next(left)), scale=1.0)
        factor = torch.stack([micro.sent for micro in sent if micro.sent is not None]).mean()
        for w in self.weights():
            if w.grad is not None:
                w.grad.copy_(grads[w.name] / factor) if w.name in grads else w.grad.zero_()

    @contextlib.contextmanager
    def moved(self, moves: Iterable[tuple[Weight, Tensor]]) -> Iterator[None]:
        """Move live weights inside, in `Method.after_backward`. Afterwards they are as before, bit for bit.

        Args:
            moves: Weights, each with the tensor that is added to its live values.
        """
        try:
            with self._views.moved(moves):
                yield
        finally:
            self._watch = Watch(self.weights())  # weights were written, and are what they were

    def _repeat(self, micro: MicroBatch) -> Tensor:
        """What the loop sent back for a micro-batch, computed once more at the live weights."""
        assert micro.sent is not None
        micro.random_state.restore()
        with micro.autocast:
            return self._look(micro) * micro.sent

    def task(self, inputs: Inputs, model: nn.Module | None = None, *, copies: int = 1) -> tuple[Tensor, Any]:
        """Compute the task's loss and outputs as the trainer does, without penalties, and count the pass.

        Args:
            inputs: One batch.
            model: The wrapper by default; ``run.model`` for a gradient that is not averaged over ranks.
            copies: How many copies of the batch pass in the one forward, each under a dropout draw of its own. The
                outputs hold one copy after the other.

        Raises:
            UsageError: Several copies of one row, for a model that takes one row at a time.
        """
        self.counted.add(copies, copies if torch.is_grad_enabled() else 0)
        model = self.wrapper if model is None else model
        if copies == 1:
            return self._rule.compute(model, inputs, copies)
        with one_row(self.model, inputs):
            return self._rule.compute(model, repeated(inputs, copies), copies)

    def enter(self) -> None:
        """Begin a step: live E -> R, then the forward view. A loop that calls the model itself calls this first.

        Does nothing in the middle of a step.

        Raises:
            RuntimeError: The Run was never attached, a later Run has taken its weights over, the optimizer was loaded
                without the state of this Run, or weights moved while no step was counted.
            ValueError: A method's schedule needs ``total_steps``.
            UsageError: A scheduler erased the learning rates that a method set.
        """
        self._check_abandoned()
        if self._entered:
            return
        if self.optimizer is None or not self._handles:
            raise RuntimeError("this Run is not attached to an optimizer: call run.attach(optimizer) before training")
        if self.superseded:
            raise RuntimeError(
                "a later Run was attached to weights of this one, and the two would overwrite each other's values: "
                "call finish() on a Run before another is attached, or restart() to take the weights back"
            )
        if self._stateless:
            raise RuntimeError(
                "the optimizer's state was loaded without steadytune's: the methods would start anew in the middle of "
                "a run. Load what run.state_dict() gave with run.load_state_dict(), or call run.restart()"
            )
        for method in self.methods:
            if method.needs_steps:
                self.steps(method)
        if self._ratios is not None:
            self._ratios.check(first=self.index == 0)
        guard_hooks()
        shards.reshard(self.model)
        if self._watch is not None:
            check_averages(self._watch, self._views.averages)
        self._views.exchange()
        self._guard = self.model.register_state_dict_pre_hook(refuse_saving)
        self._abandon = weakref.finalize(self, _abandon, self._views, self._guard)
        self._abandon.atexit = False
        self._entered = True
        self._autocast = autocast(self._device)
        self._counted = copy.copy(self.counted)
        weights = self.weights()
        for method in self.methods:
            method.before_forward(self, self._restrict(method, weights))
        torch.clear_autocast_cache()
        self._watch = Watch(weights)

    @property
    def stepping(self) -> bool:
        """Whether a step is under way."""
        return self._entered

    @property
    def showing_others(self) -> bool:
        """Whether the model holds other values than those to evaluate."""
        return self._entered and bool(self._views.tensors())

    def check_untouched(self) -> None:
        """Check that nothing but the attached optimizer has moved a weight since the step began.

        Raises:
            RuntimeError: A weight moved; the message names it.
        """
        if self._entered and self._watch is not None:
            check_untouched(self._watch, self.model, self._used_up)

    @property
    def _backward(self) -> bool:
        """Whether a loss of this step was sent back."""
        return any(micro.sent is not None for micro in self._micro_batches)

    def _used_up(self) -> bool:
        """Whether a loss of this step was sent back, and its gradients are gone.

        Unknown with sharded weights: inside no_sync() FSDP2 keeps gradients where nobody can look.
        """
        return self._backward and not self.sharded and all(w.grad is None for w in self.weights())

    def _check_abandoned(self) -> None:
        """In the middle of a step: leave it if its gradients were dropped, as after an overflow."""
        self.check_untouched()
        if self._entered and self._used_up():
            self.leave()

    def _before(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """The optimizer's step pre-hook."""
        if any(a is not None for a in args[1:]) or kwargs.get("closure") is not None:
            raise RuntimeError("optimizer.step(closure) evaluates the loss after the methods acted: call step() alone")
        if not self._entered:
            if all(group.get("lr") == 0 for group in optimizer.param_groups):
                self._ignored = True  # torch's fake step that initialises a state dict
                return
            raise RuntimeError(
                "optimizer.step() without a forward through steadytune: use run.loss(batch), or run.enter() before "
                "calling the model (self.run.enter() in a subclass of Trainer)"
            )
        if not self._micro_batches:
            check_unseen(self.methods)
        self._forget_unsent()
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf):
            self.leave()
            self._ignored = True  # a fused optimizer skips the update inside its kernel
            return
        unscale(optimizer)
        if self._not_finite(self.weights(), optimizer):
            return
        looking = [m for m in self.methods if overrides(m, "after_backward")]
        for method in looking:
            method.after_backward(self, self._restrict(method, [w for w in self.weights() if w.grad is not None]))
        if looking and self._not_finite(self.weights(), optimizer):
            return
        weights = self.weights()
        ready = [w for w in weights if w.grad is not None]
        for method in reversed(self.methods):
            method.pull_back(self, self._restrict(method, ready))
        self._views.restore()
        self._views.hold(weights, optimizer)
        for method in self.methods:
            method.before_step(self, self._restrict(method, ready))
        self._views.hold(weights, optimizer)
        self._views.pull()

    def _forget_unsent(self) -> None:
        """Leave out micro-batches whose loss the loop threw away (not finite, or of an evaluation): no gradient is
        theirs. If no loss was seen to be sent back, the loop made its gradients in another way, and all stay.
        """
        sent = [micro for micro in self._micro_batches if micro.sent is not None]
        if sent:
            self._micro_batches, self._rule = sent, sent[-1].rule

    def _not_finite(self, weights: Sequence[Weight], optimizer: Optimizer) -> bool:
        """Skip a step whose gradient is not finite: nobody sees the gradient, nothing is counted as a step."""
        norm, self.grad_norm = self.grad_norm, None
        gradients = [w.grad for w in weights if w.grad is not None]
        if not gradients:
            return False
        if norm is None:
            norm = shards.total_norm(gradients, self._group())
        if not self.finite.skips(norm, self.index):
            return False
        self.leave()
        drop_gradients(optimizer)
        self._ignored = True
        return True

    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """The optimizer's step post-hook."""
        if self._ignored:
            self._ignored = False
            return
        weights = self.weights()
        for method in sorted(self.methods, key=lambda method: method.exclusive != "anchor"):
            method.after_step(self, self._restrict(method, weights))
        self._views.put_back()
        live: dict[str, Tensor | float] = {}
        for method in self.methods:
            live.update(method.evaluated(self, self._restrict(method, weights)) or {})
        self._views.evaluate(live)
        self._close()
        self._watch = Watch(weights) if self._views.averages else None
        self.index += 1
        self._stepped = True
        self.finite.taken()
        self.batches += len(self._micro_batches)
        self.passes = self.counted.since(self._counted, batches=max(1, len(self._micro_batches)))
        self._micro_batches = []

    def leave(self) -> None:
        """Abandon a step that will not be taken (overflow, interruption): live <- E, nothing counted.

        Plain fp16 loops call it after ``scaler.update()``. Does nothing between steps.
        """
        if not self._entered:
            return
        shards.reshard(self.model)
        if self._abandon is not None:
            self._abandon()
        self._close()
        self._micro_batches = []

    def _close(self) -> None:
        """The end of a step: the model holds evaluated weights, which may be saved."""
        if self._abandon is not None and self._guard is not None:
            self._abandon.detach()
            self._guard.remove()
        self._entered, self._abandon, self._guard, self._watch = False, None, None, None

    def restart(self) -> Run:
        """Back to the state right after `attach`, for another training; weights stay as they are."""
        if self.optimizer is None:
            raise RuntimeError("restart() needs a Run that was attached to an optimizer before")
        self.leave()
        self._loaded_total = None
        if not self._handles or self.superseded:
            self._unhook()
            self._hook()
        self.finite = FiniteGradients()
        now = {"total_steps": self._total_steps, "seed": self.seed, "recipe": [entry(m) for m in self.methods]}
        self.load_state_dict({**copy.deepcopy(self._blank), **now})
        self._loaded_total = None
        return self

    def finish(self) -> None:
        """End the training: call `Method.finish` in reverse order and take the hooks off the optimizer.

        Raises:
            RuntimeError: Losses were sent back, but the attached optimizer never took a step.
            UsageError: The last gradient was not finite, on a device where this is known one step late.
        """
        trained = self._stepped or not self._entered or not self._backward
        try:
            self.check_untouched()
            if not trained:
                raise RuntimeError(
                    f"run.finish() after {len(self.batch)} losses and not one step of the attached optimizer: attach "
                    "the optimizer that steps, or call run.leave() first if no step was to be taken"
                )
        finally:
            self.leave()
        self.finite.settle()
        for method in reversed(self.methods):
            method.finish(self)
        self.release()
        self._unhook()
        ATTACHED.discard(self)

    def release(self) -> None:
        """Take the methods' hooks off the model, so that it trains as a plain one; the next step puts them back.

        For a training that is cut off; `finish` does it too.
        """
        for method in self._ready:
            method.release(self)

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        """For `copy` and `pickle`: optimizers lose their hooks in a copy, so that the copy has to hook on anew.

        Raises:
            RuntimeError: A step is under way.
        """
        if self._entered:
            raise RuntimeError(
                "a Run cannot be copied in the middle of a step: take the step, or call run.leave() first"
            )
        gone: dict[str, Any] = {"_handles": bool(self._handles), "_watch": None, "_autocast": None}
        gone["_rule"] = LossRule()  # which may hold a closure
        return {**self.__dict__, **gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        hooked = state["_handles"]
        self.__dict__.update({**state, "_handles": []})
        if hooked:
            self._hook()

    # ------------------------------------------------------------------ more gradients

    def gradient(
        self,
        inputs: Inputs | Sequence[Inputs],
        loss: Callable[[Inputs], Tensor] | None = None,
        *,
        dropout_seed: int | None = None,
        take: Callable[[str, Tensor], None] | None = None,
        scale: float = SCALE,
    ) -> dict[str, Tensor]:
        """Compute one more gradient at the live weights, averaged over ranks. ``.grad`` and dropout stay as they were.

        In a step, the loss is computed under the autocast of the step's forward (that of `loss`, or of `enter`), unless
        a method subtracts gradients, which needs more digits than half precision has.

        Args:
            inputs: One batch, or several micro-batches over which the loss is averaged (`Run.batch`).
            loss: Loss of one batch; by default the task's own, without penalties.
            dropout_seed: Seed of the dropout draw; by default torch's random state as it is.
            take: Callback (name, gradient), called as each gradient is ready, so that they are never all in memory.
                Parts of one gradient add up. The dictionary that is returned is then empty.
            scale: What the gradient is multiplied by on its way back, and divided by at the end, so that small entries
                do not become 0 in float16; a power of two, which rounds nothing. It is the same in every step and on
                every rank, whatever a ``GradScaler`` does: float16 holds unscaled entries from 6e-11 to 64. Pass 1 for
                a loss that is scaled already.

        Returns:
            Gradients by weight name.

        Raises:
            RuntimeError: There is no batch, as in a loop that calls the model itself.
        """
        batches = [inputs] if isinstance(inputs, Mapping) else list(inputs)
        if not batches:
            raise RuntimeError(
                "a gradient of no batch: methods that pass a step's batch once more need run.loss(batch), which knows "
                "it, instead of run.enter()"
            )
        loss = loss or (lambda batch: self.task(batch)[0])
        share = len(batches) if self._rule.items is None else 1
        shards.reshard(self.model)
        parameters = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        views = getattr(self.wrapper, "gradient_as_bucket_view", False)  # then .grad is memory that DDP writes again
        averaged = self.sharded or isinstance(self.wrapper, nn.parallel.DistributedDataParallel)
        with shards.set_aside(list(parameters.values()), views), self.forked_rng(), contextlib.ExitStack() as stack:
            if take is not None and not averaged:
                for n, p in parameters.items():
                    stack.callback(hand_over(n, p, take, scale).remove)
            if dropout_seed is not None:
                torch.manual_seed(dropout_seed)
            for i, batch in enumerate(batches):
                last = i == len(batches) - 1
                with shards.sync(self.wrapper) if last else shards.no_sync(self.wrapper):
                    with self._precision():
                        value = loss(batch) / share
                    value.backward(torch.full_like(value, scale))
            grads = {n: shards.local(p.grad) for n, p in parameters.items() if p.grad is not None}
            if grads:
                torch._foreach_div_(list(grads.values()), scale)
            if take is None:
                return {n: g.clone() for n, g in grads.items()} if views else grads
            for n, g in grads.items():
                take(n, g)
            return {}

    def _precision(self) -> contextlib.AbstractContextManager:
        """The autocast context of a further loss: that of the step, or that around the call, see `gradient`."""
        torch.clear_autocast_cache()  # of casts made without gradients, or before weights were moved
        if not self._entered or self._autocast is None or any(m.full_precision for m in self.methods):
            return contextlib.nullcontext()
        return self._autocast

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs beside model and optimizer: tensors, which are not copied, and plain values.

        Keys: ``format``, ``index``, ``total_steps``, ``seed``, ``skipped`` (steps whose gradient was not finite),
        ``recipe`` (methods' names and fields), ``methods`` (their states), ``raw`` (weights whose live values are
        averages), ``heads`` (references of new weights) and ``checksums`` (of the other references).

        Raises:
            RuntimeError: A step is under way.
            UsageError: The last gradient was not finite, on a device where this is known one step late.
        """
        self.finite.settle()
        if self._entered:
            raise RuntimeError("state_dict() in the middle of a step: take the step, or call run.leave() first")
        new = {w.name for w in self.weights() if self.is_new(w)}
        return {
            "format": FORMAT,
            "index": self.index,
            "total_steps": self._total_steps,
            "seed": self.seed,
            "skipped": self.finite.skipped,
            "recipe": [entry(m) for m in self.methods],
            "methods": [m.state_dict() for m in self.methods],
            "raw": dict(self._views.averages),
            "heads": {n: t for n, t in self._references.tensors.items() if n in new},
            "checksums": {n: c for n, c in self._references.checksums.items() if n not in new},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; the model's weights are loaded by whoever loads the model.

        Raises:
            ValueError: The format is not known, or methods, seed, number of steps or base model differ; the message
                names the difference.
        """
        if not 1 <= state["format"] <= FORMAT:
            raise ValueError(
                f"this state has format {state['format']}, this version of steadytune reads up to {FORMAT}: update it"
            )
        check_methods(self.methods, state["recipe"])
        if state["seed"] != self.seed:
            raise ValueError(f"the methods' seed was {state['seed']} when the state was saved, it is {self.seed} here")
        self._loaded_total = state["total_steps"]
        self.total_steps = self._total_steps or self._loaded_total
        self._references.check(state["checksums"])
        for name, held in state["heads"].items():
            self._references.tensors[name] = held.clone()
        # also weights that are frozen now: they may be trained again on the way, as in the training that was saved
        live = self._live()
        self._views.averages = {n: t.to(live[n].device, copy=True) for n, t in state["raw"].items()}
        self.load_methods(state["methods"])
        self.index = state["index"]
        self.finite.skipped = state.get("skipped", 0)  # not in states written before steps were skipped
        self._stateless = self._stepped = False
        self._watch = None  # weights may be loaded before or after this

    def load_methods(self, states: Sequence[dict[str, Any]], wanted: Callable[[Method], bool] = lambda _: True) -> None:
        """Restore the states of the wanted methods, each tensor on the device of the weight that it belongs to."""
        live = self._live()
        for method, saved in zip(self.methods, states, strict=True):
            if wanted(method):
                method.load_state_dict(on_devices(saved, live, self._device))

    def _live(self) -> dict[str, Tensor]:
        return {name: shards.local(p.detach()) for name, p in self.model.named_parameters()}

    def _add_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        state[KEY] = self.state_dict()
        return state

    def _take_state(self, optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        state = dict(state)
        own = state.pop(KEY, None)
        if own is None:
            self._stateless = True  # an error at the next step, unless load_state_dict comes before
        else:
            self.load_state_dict(own)
        return state

    def nbytes(self) -> int:
        """Bytes that the methods and the Run hold now, without the model and the optimizer's own state."""
        held = [*self._references.tensors.values(), *self._views.tensors()]
        held += [t for m in self.methods for t in tensors_of(m.state_dict())]
        model = {shards.local(p.detach()).data_ptr() for p in self.model.parameters()}
        return sum(t.nbytes for t in {id(t): t for t in held}.values() if t.data_ptr() not in model)

    def describe(self) -> str:
        """The methods as a table: each with its fields, moments of the step and weights."""
        rows = []
        for i, method in enumerate(self.methods):
            fields = ", ".join(f"{k}={v!r}" for k, v in entry(method).items() if k != "name")
            verbs = [v for v in VERBS if overrides(method, v)]
            line = f"{i + 1}. {type(method).__name__}({fields}): {', '.join(verbs) or 'before the first step'}"
            if any(v in WEIGHT_VERBS for v in verbs):
                weights = self.weights(method, getattr(method, "scope", "all"))
                line += f"; {len(weights)} tensors, {sum(w.data.numel() for w in weights):,} weights"
            rows.append(line)
        size = sum(p.numel() for p in self.model.parameters())
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        if trained < size:
            rows.append(f"{trained:,} of {size:,} weights are trained")
        if self.copies > 1:
            rows.append(f"each batch passes the model as {self.copies} copies in one forward")
        if self.methods and self.passes.forwards:
            rows.append(f"each batch of the last step: {self.passes}")
        return "\n".join(rows) or "plain fine-tuning: no methods"


def hand_over(name: str, parameter: nn.Parameter, take: Callable[[str, Tensor], None], scale: float) -> RemovableHandle:
    """Give a parameter's gradients away as they come, divided by ``scale``, until the handle is removed."""

    def hook(_: Tensor) -> None:
        assert parameter.grad is not None
        take(name, parameter.grad.div_(scale))
        parameter.grad = None

    return parameter.register_post_accumulate_grad_hook(hook)


def _abandon(views: Views, guard: RemovableHandle) -> None:
    """Live <- E, and the model may be saved again."""
    views.abandon()
    guard.remove()


def bare(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
