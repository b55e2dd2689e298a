"""The core: a Run binds a list of methods to any model, optimizer and training loop.

The one rule: between optimizer steps the live weights are the evaluated ones. Three views of each weight:
R raw (what the optimizer moves), F forward (what the forward sees), E evaluated (live between steps). One step:

    enter      first run.loss of a step: live E -> R; before_forward in list order builds F through run.show / run.mix
    backward   one or several micro-batches; penalties are added to the loss
    pre-hook   after_backward in list order (another gradient at F); pull_back in reverse order (chain rule F -> R);
               live <- R; before_step in list order (mask, then clip)
    optimizer  moves R
    post-hook  after_step on R; frozen entries put back; `evaluated`: live and average exchanged; index += 1
    leave      F live but no step coming (overflow, Ctrl-C): live <- E, nothing counted
"""

from __future__ import annotations

import contextlib
import copy
import logging
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..errors import UsageError
from . import randomness, shards
from .anatomy import Part, anatomy
from .checks import (
    check_added,
    check_exclusive,
    check_methods,
    check_model,
    check_optimizer,
    check_order,
    check_shapes,
    check_structure,
    check_targets,
    check_wrapper,
    has_stepped,
)
from .method import WEIGHT_VERBS, M, Method, Scope, Weight, acts_on_weights, entry, overrides, select
from .step import Compute, Inputs, LossRule, MicroBatch, Passes, Step, added, default_compute, eager, one_row, repeated
from .views import References, Views
from .watch import FiniteGradients, RateRatios, Watch, renormalised

logger = logging.getLogger(__name__)
FORMAT = 1  # of Run.state_dict(); older formats must go on loading
KEY = "steadytune"  # the extra key in an optimizer's state dict
_ATTACHED: weakref.WeakSet[Run] = weakref.WeakSet()  # all Runs from `attach` to `finish`


class Run:
    """Binds methods to a model.

    Between steps the model holds the weights to evaluate and to save. During a step, from the first `loss` to the end
    of ``optimizer.step()``, it holds what the methods show to the forward: ``model.state_dict()`` is then an error, and
    `leave` ends a step that will not be taken. One model has one Run at a time: a new Run on it leaves the step of the
    older one first, and once the new one is attached, the older one can only be finished or restarted.

    A Run between steps can be copied and pickled together with its model and its optimizer, in one call:
    ``copy.deepcopy((model, optimizer, run))``.

    Args:
        model: any module; a DDP or ``torch.compile`` wrapper may be passed and is then used for the forward.
        methods: in order of action. Deep-copied: ``run[DPSDense]`` is the copy that ran.
        total_steps: planned optimizer steps; methods with a schedule need it before the first step.
        seed: of the methods' own randomness (masks, noise), apart from initialisation, data order and dropout.
        data: called for an iterable of training batches by methods that look at the data first.

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
        check_model(model)
        for method in methods:
            if not isinstance(method, Method):
                raise TypeError(f"methods must hold steadytune methods, got {method!r}: pass instances, as DPSDense()")
        check_order(methods)
        self.wrapper = model
        self.model = shards.unwrap(model)
        self.methods: list[Method] = [copy.deepcopy(m) for m in methods]
        self.seed, self.data = seed, data
        self.index = 0
        self.optimizer: Optimizer | None = None
        self.passes = Passes()  # of the last step, per micro-batch
        self.counted = Passes()  # since this process began the run or went on with it, passes before the first step too
        self.batches = 0  # micro-batches of the steps taken in that time
        self._counted = Passes()  # as the step under way began
        self._total_steps, self._loaded_total = total_steps, None
        self._rule = LossRule()  # of the last micro-batch: how further gradients of this step compute their loss
        self._parts: dict[str, Part] = {}
        self._new: set[str] = set()  # weights that methods drew anew or added
        self._views = Views(self.model)
        self._references = References(self.model)
        self._entered = self._ignored = self._stateless = False
        self._micro_batches: list[MicroBatch] = []  # of the step under way
        self._micro = 0  # number of the micro-batch whose loss is being computed, 0 outside
        self._handles: list[Any] = []
        self._guard: RemovableHandle | None = None  # on ``model.state_dict()``, during a step
        self._abandon: weakref.finalize | None = None  # what `leave` does, done too if the Run is collected in a step
        self._watch: Watch | None = None  # of the weights since the last moment at which they may have been written
        self._superseded = False  # whether a later Run took these weights over
        self._stepped = False  # whether a step was counted since `attach`, `restart` or a state was loaded
        self._ratios: RateRatios | None = None  # of learning rates, where a method sets them
        self.finite = FiniteGradients()
        self.grad_norm: Tensor | None = None  # norm of this step's gradient, if the loop computed it: not done twice
        self._save_in_optimizer = True
        self._blank: dict[str, Any] = {}
        self._shapes: dict[str, torch.Size] = {}  # of the weights after `Method.setup`
        check_structure(self.methods, self.sharded or isinstance(self.wrapper, nn.parallel.DistributedDataParallel))
        self._leave_others(self.model.parameters())
        for method in self.methods:
            self._set_up(method)

    def append(self, method: M) -> M:
        """Add a method to the end of the list, before `attach` or `restart`; returns the copy that will run."""
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

    # ------------------------------------------------------------------ looking

    def __getitem__(self, kind: type[M]) -> M:
        """The method of this class that runs (the first, if several)."""
        for method in self.methods:
            if isinstance(method, kind):
                return method
        raise KeyError(f"no {kind.__name__} among the methods: {[type(m).__name__ for m in self.methods]}")

    @property
    def total_steps(self) -> int | None:
        """Planned optimizer steps, or None while unknown."""
        return self._total_steps

    @total_steps.setter
    def total_steps(self, value: int | None) -> None:
        loaded = self._loaded_total
        scheduled = [type(m).__name__ for m in self.methods if m.needs_steps]
        if scheduled and None not in (value, loaded) and value != loaded:
            raise ValueError(
                f"total_steps was {loaded} when the state was saved and is {value} now: the schedule of {scheduled[0]} "
                f"would change for steps already taken. Resume with {loaded} steps, or start anew"
            )
        self._total_steps = value

    def steps(self, method: Method) -> int:
        """`total_steps`, for a method whose schedule depends on it; raises when it is unknown."""
        if self._total_steps is None:
            name = type(method).__name__
            raise ValueError(f"{name} needs the number of optimizer steps: pass Run(..., total_steps=n)")
        return self._total_steps

    @property
    def rank(self) -> int:
        """Rank of this process, 0 when not distributed."""
        return shards.rank()

    @property
    def world(self) -> int:
        """Number of processes, 1 when not distributed."""
        return shards.world()

    @property
    def batch(self) -> list[Inputs]:
        """The micro-batches of the step under way."""
        return [micro.inputs for micro in self._micro_batches]

    @property
    def copies(self) -> int:
        """How many copies of a batch pass the model in the task's own forward."""
        return max((m.copies for m in self.methods), default=1)

    def weights(self, method: Method | None = None, scope: Scope = "all") -> list[Weight]:
        """Trainable weights, in the model's order, that ``method`` may act on (see `only`) and ``scope`` admits.

        Args:
            method: a method of this Run, or None for no restriction.
            scope: ``"linear"``, ``"encoder"``, ``"all"`` or a predicate over `Weight`.

        Raises:
            ValueError: unknown scope.
        """
        shards.reshard(self.model)  # the optimizer does not know the full parameters that an evaluation leaves
        groups = {id(p): g for g in self.optimizer.param_groups for p in g["params"]} if self.optimizer else None
        if not self._parts:
            self._parts = anatomy(self.model)
        weights = []
        for name, p in self.model.named_parameters():
            if not p.requires_grad or (groups is not None and id(p) not in groups):
                continue
            part = self._parts[name]
            grad = None if p.grad is None else shards.local(p.grad)
            group = {} if groups is None else groups[id(p)]
            weights.append(
                Weight(
                    name,
                    p,
                    grad,
                    group,
                    part.kind,
                    part.block,
                    part.head,
                    part.input_dim,
                )
            )
        return self._restrict(method, weights, scope)

    @staticmethod
    def _restrict(method: Method | None, weights: list[Weight], scope: Scope = "all") -> list[Weight]:
        if method is not None and method.where is not None:
            weights = [w for w in weights if method.where(w)]
        return select(weights, scope)

    def require(self, method: Method, scope: Scope, *, reference: bool = False) -> list[Weight]:
        """The weights a method will act on, in `Method.setup`; takes their references when asked.

        Raises:
            ValueError: nothing to act on.
        """
        weights = self.weights(method, scope)
        if reference:
            weights = [w for w in weights if not self.is_new(w)]
        if not weights:
            what = "pre-trained trainable weight" if reference else "trainable weight"
            raise ValueError(
                f"{type(method).__name__} finds no {what} in scope {scope!r}: its weights are frozen, quantised "
                "or adapters. Choose another scope, or unfreeze the base model"
            )
        for w in weights if reference else []:
            self.reference(w.name)
        return weights

    # ------------------------------------------------------------------ structure

    def train_only(self, method: Method, chosen: Callable[[str, Part], bool]) -> None:
        """Freeze, in `Method.setup`, every weight that is not ``chosen(name, part)``; what is frozen stays so.

        Raises:
            ValueError: a PEFT model, whose adapters are the choice.
        """
        if hasattr(self.model, "peft_config"):
            raise ValueError(
                f"{type(method).__name__} chooses what is trained, which PEFT has done for this model already: leave "
                f"{type(method).__name__} out, or give the model without adapters"
            )
        for name, part in anatomy(self.model).items():
            if not chosen(name, part):
                self.model.get_parameter(name).requires_grad_(False)

    def mark_new(self, names: Iterable[str]) -> None:
        """Tell, in `Method.setup`, which weights were drawn anew or added: anchors leave them out, as they do heads."""
        self._new.update(names)

    # ------------------------------------------------------------------ references and raw weights

    def is_new(self, weight: Weight) -> bool:
        """Whether a weight has no pre-trained value: a new head, one a method drew, or an adapter that PEFT added."""
        prefix = getattr(getattr(self.model, "base_model", None), "prefix", None)
        lora = hasattr(self.model, "peft_config") and bool(prefix) and str(prefix) in weight.name
        return weight.head or weight.name in self._new or lora

    def reference(self, name: str) -> Tensor:
        """The weight as it was before training, on the weight's device (on a shard: this rank's piece).

        Taken in `Method.setup`, never later: a reference taken on resume would be half-trained.

        Raises:
            RuntimeError: asked for the first time after setup.
        """
        return self._references[name]

    def raw(self, name: str) -> Tensor:
        """R of a weight, during a step whatever is shown; for anchors and snapshots (clone it)."""
        if not self._entered:
            shards.reshard(self.model)
        return self._views.raw(name, stepping=self._entered)

    def local(self, name: str, full: Tensor) -> Tensor:
        """This rank's piece of a tensor of a weight's full shape (or broadcasting to it)."""
        return shards.piece(full, self.model.get_parameter(name).detach())

    def columns(self, method: Method, weight: Weight, keep: float) -> Tensor:
        """Bernoulli(keep) draw over the input features of a weight, one for all its outputs and all ranks.

        Shape (1, in) or, for Conv1D, (in, 1); one entry each for weights with a single axis.
        """
        full = self.model.get_parameter(weight.name)
        shape = [n if full.dim() == 1 or i == weight.input_dim else 1 for i, n in enumerate(full.shape)]
        draw = torch.empty(shape, device=weight.data.device)
        return self.local(weight.name, draw.bernoulli_(keep, generator=self.rng(method, weight.name)))

    # ------------------------------------------------------------------ the step

    def attach(self, optimizer: Any, *, save_in_optimizer: bool = True) -> Run:
        """Hook onto an optimizer: before its first step, before any learning-rate scheduler is built.

        Args:
            optimizer: a torch optimizer, or accelerate's wrapper around one.
            save_in_optimizer: put `state_dict` under one extra key of the optimizer's state dict.

        Raises:
            ValueError: an optimizer that cannot work with methods on weights, or that was built from another model.
            UsageError: a model resized since the Run was made.
            RuntimeError: already attached, an optimizer with state (of its own, it would be a resume without ours), or
                a scheduler exists and a method changes parameter groups.
        """
        optimizer = bare(optimizer)
        if self.optimizer is not None:
            raise RuntimeError("this Run is already attached: use run.restart() to train once more")
        check_optimizer(optimizer, [type(m).__name__ for m in self.methods if overrides(m, "attach")])
        if save_in_optimizer and has_stepped(optimizer):
            raise RuntimeError(
                "attach() after the optimizer's first step, or after its state was loaded: the methods would start "
                "anew in the middle of a run. Call run.attach(optimizer) first, then optimizer.load_state_dict(...)"
            )
        check_shapes(self._shapes, self.model)
        check_added(self._new, self.model, optimizer)
        self.optimizer, self._save_in_optimizer = optimizer, save_in_optimizer
        if not self.weights():
            self.optimizer = None
            raise ValueError(
                "the optimizer holds no trainable parameter of this model: build it from model.parameters() "
                "of the model given to Run, after all changes of its structure"
            )
        setter = None
        for method in self.methods:
            before = self._rates_by_weight()
            method.attach(self)
            if before.items() - self._rates_by_weight().items():
                setter = type(method).__name__
        if setter is not None:
            self._ratios = RateRatios(optimizer, setter)
        check_exclusive(
            (m, self.weights(m, getattr(m, "scope", "all")), acts_on_weights(m)) for m in self.methods if m.exclusive
        )
        self._hook()
        self._blank = copy.deepcopy(self.state_dict())
        return self

    def _rates_by_weight(self) -> dict[str, Any]:
        return {w.name: w.group.get("lr") for w in self.weights()}

    def _hook(self) -> None:
        assert self.optimizer is not None
        optimizer = self.optimizer
        self._leave_others([w.parameter for w in self.weights()], supersede=True)
        self._superseded = self._stepped = False
        _ATTACHED.add(self)
        self._handles = [
            optimizer.register_step_pre_hook(self._before),
            optimizer.register_step_post_hook(self._after),
        ]
        if self._save_in_optimizer:
            self._handles += [
                optimizer.register_state_dict_post_hook(self._add_state),
                optimizer.register_load_state_dict_pre_hook(self._take_state),
            ]

    def _leave_others(self, parameters: Iterable[nn.Parameter], *, supersede: bool = False) -> None:
        """End the steps of other Runs on these weights; with ``supersede`` they can take no further step."""
        mine = {id(p) for p in parameters}
        for other in list(_ATTACHED):
            assert other.optimizer is not None
            held = (id(p) for group in other.optimizer.param_groups for p in group["params"])
            if other is self or mine.isdisjoint(held):
                continue
            if other._entered:
                logger.warning(
                    "Another Run is in the middle of a step on this model: the step is abandoned (run.leave()), and "
                    "the model holds its evaluated weights again. Gradients stay as they are."
                )
                other.leave()
            other._superseded = other._superseded or supersede

    def loss(
        self,
        inputs: Inputs,
        *,
        compute: Compute | None = None,
        model: nn.Module | None = None,
        items: Tensor | int | None = None,
        penalty_scale: float = 1.0,
    ) -> Tensor:
        """Loss of one micro-batch with all penalties; the first call of a step builds the forward view.

        Args:
            inputs: keyword arguments of the model, batch axis first.
            compute: ``(model, inputs, copies) -> (loss, outputs)``; by default the loss that the model returns.
            model: the (wrapped) model to call, when it is another than the one given to Run.
            items: token count of the whole step, when ``compute`` divides by it (times ``copies``).
            penalty_scale: factor of the penalties, for a loss already divided by ``items`` over the whole step.

        Raises:
            RuntimeError: not attached, a wrapper that cannot work, or weights that moved while no step was counted.
            UsageError: labels that are NaN.
        """
        self.wrapper = self.wrapper if model is None else model
        rule = self._rule = LossRule(compute or default_compute, items, penalty_scale)
        self.enter()
        check_wrapper(self.wrapper)
        check_targets(inputs)
        number, state = len(self._micro_batches) + 1, randomness.RandomState(self._device)
        micro = MicroBatch(inputs, rule, number, state, autocast(self._device))
        self._micro_batches.append(micro)
        loss = self._look(micro)
        if loss.requires_grad:
            _notice(loss, micro)
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

        Every micro-batch passes the model once more with its penalties, under the draws of its first look. The loop's
        factors on the losses keep their ratios, and together they weigh 1: the factor of a ``GradScaler`` guards this
        backward pass too, and is taken out. Afterwards the weights are as before, bit for bit.

        Args:
            moves: weights, and what is added to the live values of each.
        """
        sent = [micro for micro in self._micro_batches if micro.sent is not None]
        left = iter(sent)
        try:
            with self._views.moved(moves):
                found = self.gradient([micro.inputs for micro in sent], lambda _: self._repeat(next(left)))
        finally:
            self._watch = Watch(self.weights())  # weights were written, and are what they were
        factor = torch.stack([micro.sent for micro in sent if micro.sent is not None]).mean()
        for w in self.weights():
            if w.grad is not None:
                w.grad.copy_(found[w.name] / factor) if w.name in found else w.grad.zero_()

    def _repeat(self, micro: MicroBatch) -> Tensor:
        """What the loop sent back for a micro-batch, computed once more at the live weights."""
        assert micro.sent is not None
        micro.random_state.restore()
        with micro.autocast:
            return self._look(micro) * micro.sent

    def task(self, inputs: Inputs, model: nn.Module | None = None, *, copies: int = 1) -> tuple[Tensor, Any]:
        """The task's loss and outputs of one batch as the trainer computes them, without penalties; counted as a pass.

        Args:
            inputs: one batch.
            model: the wrapper by default; ``run.model`` for a gradient that is not averaged over ranks.
            copies: how often the batch passes in the one forward, each under a dropout draw of its own; the outputs
                are those of all copies, one after the other.

        Raises:
            UsageError: several copies of one row, for a model that takes one row at a time.
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
            RuntimeError: never attached, attached to weights that a later Run has taken over, the optimizer was loaded
                without the state of this run, or weights moved while no step was counted.
            ValueError: a schedule without ``total_steps``.
            UsageError: a scheduler erased the learning rates that a method set.
        """
        self._check_abandoned()
        if self._entered:
            return
        if self.optimizer is None or not self._handles:
            raise RuntimeError("this Run is not attached to an optimizer: call run.attach(optimizer) before training")
        if self._superseded:
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
        shards.reshard(self.model)
        self._check_averages()
        self._views.exchange()
        self._guard = self.model.register_state_dict_pre_hook(_refuse_saving)
        self._abandon = weakref.finalize(self, _abandon, self._views, self._guard)
        self._abandon.atexit = False
        self._entered = True
        self._counted = copy.copy(self.counted)
        weights = self.weights()
        for method in self.methods:
            method.before_forward(self, self._restrict(method, weights))
        torch.clear_autocast_cache()
        self._watch = Watch(weights)

    def check_untouched(self) -> None:
        """Raise if weights moved in the middle of a step, which only ``optimizer.step()`` may do, whose hooks end it.

        Raises:
            RuntimeError: as said, naming a weight.
        """
        if not self._entered or self._watch is None:
            return
        moved = self._watch.written()
        if moved in renormalised(self.model):
            moved = None
        if moved is None and self._used_up():
            moved = self._watch.differs()
        if moved is not None:
            raise RuntimeError(
                f"{moved!r} was changed in the middle of a step, and no step of the attached optimizer was counted: "
                "another optimizer (a copy, a wrapper that calls no hooks) took the step, or weights were loaded. "
                "Attach the optimizer that steps; before weights are loaded call run.leave()"
            )

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

    def _check_averages(self) -> None:
        """Between steps: averages are live, and what is written to them would be lost."""
        moved = None if self._watch is None else self._watch.written(self._views.averages)
        if moved is not None:
            raise RuntimeError(
                f"{moved!r} was changed between two steps, while the model holds its average: the change would be "
                "lost. Load the state of the Run with the weights (run.load_state_dict), or call run.restart()"
            )

    def show(self, weight: Weight, value: Tensor, *, own: bool = False) -> None:
        """Make ``value`` the forward view of a weight (in `Method.before_forward`).

        ``own``: it was made for this and is kept nowhere else, so that it need not be copied.
        """
        self._views.show(weight, value, own=own)

    def mix(self, weight: Weight, anchor: Tensor, mask: Tensor, keep: float) -> None:
        """Show ``anchor + mask * (given - anchor) / keep``, where ``given`` is what earlier methods show."""
        self._views.mix(weight, anchor, mask, keep)

    @contextlib.contextmanager
    def showing(self, values: Iterable[tuple[Weight, Tensor]]) -> Iterator[None]:
        """Other values of weights are live inside, in `Method.after_step`; afterwards R is again, bit for bit.

        They are given away: made for this and kept nowhere else, so that they need not be copied.
        """
        try:
            for weight, value in values:
                self._views.show(weight, value, own=True)
            torch.clear_autocast_cache()
            yield
        finally:
            self._views.restore()

    def freeze(self, weight: Weight, mask: Tensor, *, state: bool = True) -> None:
        """For entries where ``mask`` is False, this optimizer step does not happen.

        Args:
            weight: which one.
            mask: boolean, of its shape or one for all entries (0-d); or, for a contiguous weight, the flat indices
                (int64) of the entries that the step is for.
            state: see below.

        Weights and every optimizer-state tensor of the weight's shape are put back bit for bit after all
        `Method.after_step`. Call it in `Method.pull_back` or `Method.before_step`; masks of several calls intersect.
        ``state=False`` puts back the weights only: enough, and a third of the copies, for a mask that never changes.
        """
        self._views.freeze(weight, mask, state=state)

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
        self._check_loss()
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf):
            self.leave()
            self._ignored = True  # a fused optimizer skips the update inside its kernel
            return
        self._unscale(optimizer)
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
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = None  # which every optimizer passes over: no moment decays
        self._ignored = True
        return True

    def _check_loss(self) -> None:
        """A loop that computed its loss without `loss` would train without penalties, and nobody would notice."""
        lost = [
            type(m).__name__
            for m in self.methods
            if overrides(m, "penalty") or overrides(m, "after_backward") or m.copies > 1
        ]
        if lost and not self._micro_batches:
            raise RuntimeError(
                f"{', '.join(lost)} changed nothing in this step, as its loss was not computed by run.loss(batch): use "
                "that, not run.enter() and a call of the model"
            )

    def _after(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """The optimizer's step post-hook."""
        if self._ignored:
            self._ignored = False
            return
        weights = self.weights()
        for method in self.methods:
            method.after_step(self, self._restrict(method, weights))
        self._views.put_back()
        found: dict[str, Tensor | float] = {}
        for method in self.methods:
            found.update(method.evaluated(self, self._restrict(method, weights)) or {})
        self._views.evaluate(found)
        self._close()
        self._watch = Watch(weights) if self._views.averages else None
        self.index += 1
        self._stepped = True
        self.finite.taken()
        self.batches += len(self._micro_batches)
        self.passes = self.counted.since(self._counted, batches=max(1, len(self._micro_batches)))
        self._micro_batches = []

    def _unscale(self, optimizer: Any) -> None:
        """A fused optimizer under GradScaler unscales inside its kernel: too late for statistics and masks."""
        scale = getattr(optimizer, "grad_scale", None)
        if scale is None:
            return
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_([shards.local(g) for g in gradients], scale.double().reciprocal().float())
        optimizer.grad_scale = None

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
        if not self._handles or self._superseded:
            self._unhook()
            self._hook()
        self.finite = FiniteGradients()
        now = {"total_steps": self._total_steps, "seed": self.seed, "recipe": [entry(m) for m in self.methods]}
        self.load_state_dict({**copy.deepcopy(self._blank), **now})
        self._loaded_total = None
        return self

    def finish(self) -> None:
        """The end of training: verbs in reverse order, then the optimizer is free of us. Weights stay evaluated.

        Raises:
            RuntimeError: losses were sent back, and the attached optimizer took not one step.
            UsageError: the last gradient was not finite, off the CPU.
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
        self._unhook()
        _ATTACHED.discard(self)

    def _unhook(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # ------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        """For `copy` and `pickle`: optimizers lose their hooks in a copy, so that the copy has to hook on anew.

        Raises:
            RuntimeError: in the middle of a step, when the model holds what the forward sees.
        """
        if self._entered:
            raise RuntimeError(
                "a Run cannot be copied in the middle of a step: take the step, or call run.leave() first"
            )
        gone = {"_handles": bool(self._handles), "_watch": None, "_rule": LossRule()}  # a rule may hold a closure
        return {**self.__dict__, **gone}

    def __setstate__(self, state: dict[str, Any]) -> None:
        hooked = state["_handles"]
        self.__dict__.update({**state, "_handles": []})
        if hooked:
            self._hook()

    # ------------------------------------------------------------------ randomness

    def draw_seed(self, *key: Any, rank: bool = False) -> int:
        """A seed that depends on the run's seed, the step, the micro-batch and ``key``, and on nothing else."""
        return randomness.draw_seed(self.seed, self.index, self._micro, *key, self.rank if rank else None)

    def rng(self, method: Method, label: str, *, per_rank: bool = False) -> torch.Generator:
        """A fresh generator for a method's draw: the same on every rank (unless ``per_rank``) and after a resume.

        Seeded by a hash of (seed, class and occurrence of the method, label, index, micro-batch), so that the other
        methods do not change the draws, and nothing has to be saved.
        """
        key = (*randomness.occurrence(self.methods, method), label)
        return randomness.generator(self._device, self.draw_seed(*key, rank=per_rank))

    def forked_rng(self) -> contextlib.AbstractContextManager:
        """Leave torch's random state as it was before."""
        return randomness.forked(self._device)

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    # ------------------------------------------------------------------ more gradients, statistics

    def gradient(
        self,
        inputs: Inputs | Sequence[Inputs],
        loss: Callable[[Inputs], Tensor] | None = None,
        *,
        dropout_seed: int | None = None,
        take: Callable[[str, Tensor], None] | None = None,
    ) -> dict[str, Tensor]:
        """One more gradient at the live weights, by weight name, through the wrapper, so that ranks are averaged.

        ``.grad`` of the step and the dropout of the task are as before afterwards.

        Args:
            inputs: one batch, or several micro-batches over which the loss is averaged (`Run.batch`).
            loss: of one batch; by default the task's own, without penalties.
            dropout_seed: for a chosen dropout draw.
            take: is given a weight's name and gradient, in place of the dictionary, which stays empty: as soon as it is
                known and for the last time, so that never all are held. It may come in parts that add up.

        Raises:
            RuntimeError: no batch, as `Run.batch` in a loop that calls the model itself.
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
                    stack.callback(hand_over(n, p, take).remove)
            if dropout_seed is not None:
                torch.manual_seed(dropout_seed)
            for i, batch in enumerate(batches):
                last = i == len(batches) - 1
                with shards.sync(self.wrapper) if last else shards.no_sync(self.wrapper):
                    (loss(batch) / share).backward()
            found = {n: shards.local(p.grad) for n, p in parameters.items() if p.grad is not None}
            if take is None:
                return {n: g.clone() for n, g in found.items()} if views else found
            for n, g in found.items():
                take(n, g)
            return {}

    @property
    def sharded(self) -> bool:
        """Whether weights live in pieces on several ranks."""
        return self._group() is not None

    def _group(self) -> dist.ProcessGroup | None:
        return shards.shard_group(list(self.model.parameters()))

    def kth(self, scores: Tensor | Sequence[Tensor], keep: float) -> Tensor:
        """Threshold that the ``ceil(n * keep)`` largest scores reach, over all pieces of one tensor or of several."""
        return shards.kth([scores] if isinstance(scores, Tensor) else list(scores), keep, self._group())

    def norms(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """L2 norm of each tensor, over all its pieces."""
        return shards.norms(tensors, self._group())

    def dot(self, first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
        """Inner product of two lists of tensors, each taken as one vector, over all their pieces, as a 0-d tensor."""
        return shards.dot(first, second, self._group())

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Average tensors over ranks, in place; nothing on one process."""
        shards.average(tensors)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs beside model and optimizer; tensors and plain values, not copied.

        Keys: ``format``, ``index``, ``total_steps``, ``seed``, ``skipped`` (steps whose gradient was not finite),
        ``recipe`` (methods' names and fields), ``methods`` (their states), ``raw`` (weights whose live values are
        averages), ``heads`` (references of new weights) and ``checksums`` (of the other references).

        Raises:
            RuntimeError: in the middle of a step.
            UsageError: the last gradient was not finite, off the CPU.
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
            ValueError: unknown format, other methods, seed, number of steps or base model, naming the difference.
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
        live = {w.name: w.data for w in self.weights()}
        self._views.averages = {n: t.to(live[n].device, copy=True) for n, t in state["raw"].items()}
        for method, saved in zip(self.methods, state["methods"], strict=True):
            method.load_state_dict(_on_devices(saved, live))
        self.index = state["index"]
        self.finite.skipped = state.get("skipped", 0)  # not in states written before steps were skipped
        self._stateless = self._stepped = False
        self._watch = None  # weights may be loaded before or after this

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
        """Bytes that methods and core hold now, beside the model and the optimizer's own state."""
        held = [*self._references.tensors.values(), *self._views.tensors()]
        held += [t for m in self.methods for t in _tensors(m.state_dict())]
        model = {shards.local(p.detach()).data_ptr() for p in self.model.parameters()}
        return sum(t.nbytes for t in {id(t): t for t in held}.values() if t.data_ptr() not in model)

    def describe(self) -> str:
        """The methods as a table: each with its fields, moments of the step and weights."""
        rows = []
        for i, method in enumerate(self.methods):
            fields = ", ".join(f"{k}={v!r}" for k, v in entry(method).items() if k != "name")
            verbs = [v for v in (*WEIGHT_VERBS, "penalty") if overrides(method, v)]
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


def hand_over(name: str, parameter: nn.Parameter, take: Callable[[str, Tensor], None]) -> RemovableHandle:
    """Give a parameter's gradients away as they come, until the handle is removed."""

    def hook(_: Tensor) -> None:
        assert parameter.grad is not None
        take(name, parameter.grad)
        parameter.grad = None

    return parameter.register_post_accumulate_grad_hook(hook)


def _notice(loss: Tensor, micro: MicroBatch) -> None:
    """Let the micro-batch know what is sent back into its loss."""
    here = weakref.ref(micro)  # graphs that somebody keeps must not keep the batch, the Run and its model

    def hook(gradient: Tensor) -> None:
        micro = here()
        if micro is not None:
            micro.sent = gradient if micro.sent is None else micro.sent + gradient

    loss.register_hook(hook)


def autocast(device: torch.device) -> torch.autocast:
    """The autocast context that is on for a device now, or off."""
    kind = device.type
    return torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))


def _abandon(views: Views, guard: RemovableHandle) -> None:
    """Live <- E, and the model may be saved again."""
    views.abandon()
    guard.remove()


def _refuse_saving(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Hook on ``model.state_dict()`` in a step: raise where it would give what the forward sees."""
    for run in list(_ATTACHED):
        if run.model is model and run._entered and run._views.tensors():
            raise RuntimeError(
                "model.state_dict() in the middle of a step: the model holds what the methods show to the forward, not "
                "the weights to evaluate. Take the step, or call run.leave() first"
            )


def bare(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from _tensors(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from _tensors(v)


def _on_devices(value: Any, live: Mapping[str, Tensor], device: torch.device | None = None) -> Any:
    """A copy of a method's state, tensors under a weight's name on that weight's device."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True) if device is not None else value.clone()
    if isinstance(value, Mapping):
        return {k: _on_devices(v, live, live[k].device if k in live else device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_on_devices(v, live, device) for v in value]
    return value
