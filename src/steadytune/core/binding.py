"""A model and the methods bound to it: what methods may ask for and show, at any moment of a step."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from . import randomness, shards
from .anatomy import Part, anatomy
from .checks import check_model, check_order, check_structure, loss_left
from .method import M, Method, Scope, Weight, select
from .views import References, Views


class Binding:
    """Base of `Run`, without the course of a step: a model, its methods, and what these ask for."""

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
        self.loss_left = loss_left(methods)  # share of the task's loss that no method replaces
        self.wrapper = model
        self.model = shards.unwrap(model)
        self.methods: list[Method] = [copy.deepcopy(m) for m in methods]
        self.seed, self.data = seed, data
        self.index = 0
        self.optimizer: Optimizer | None = None
        self._total_steps, self._loaded_total = total_steps, None
        self._parts: dict[str, Part] = {}
        self._new: set[str] = set()  # weights that methods drew anew or added
        self._drawn = {name for name, part in anatomy(self.model).items() if part.drawn}  # before any method
        self._views = Views(self.model)
        self._references = References(self.model)
        self._entered = False  # whether a step is under way
        self._micro = 0  # number of the micro-batch whose loss is being computed, 0 outside
        check_structure(self.methods, self.sharded or isinstance(self.wrapper, nn.parallel.DistributedDataParallel))
        if columns := frozenset(name for method in self.methods for name in method.input_columns):
            self.model.register_forward_pre_hook(functools.partial(_without, columns), with_kwargs=True)

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
        """Give `total_steps` to a method whose schedule depends on it.

        Raises:
            ValueError: The number of steps is not known.
        """
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
    def copies(self) -> int:
        """How many copies of a batch pass the model in the task's own forward."""
        return max((m.copies for m in self.methods), default=1)

    def weights(self, method: Method | None = None, scope: Scope = "all") -> list[Weight]:
        """Trainable weights, in the model's order, that ``method`` may act on (see `only`) and ``scope`` admits.

        Args:
            method: A method of this Run, or None for no restriction.
            scope: ``"linear"``, ``"encoder"``, ``"all"`` or a predicate over `Weight`.

        Raises:
            ValueError: The scope is not known.
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
        """The weights that a method will act on, asked for in `Method.setup`; ``reference`` takes their references too.

        Raises:
            ValueError: There is no such weight.
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
        """Freeze, in `Method.setup`, every weight that is not ``chosen(name, part)``. Frozen weights stay frozen.

        Weights that the checkpoint lacked are trained in any case: frozen, they would stay what a seed has drawn.

        Raises:
            ValueError: PEFT has chosen already what is trained of this model.
        """
        if hasattr(self.model, "peft_config"):
            raise ValueError(
                f"{type(method).__name__} chooses what is trained, which PEFT has done for this model already: leave "
                f"{type(method).__name__} out, or give the model without adapters"
            )
        for name, part in anatomy(self.model).items():
            if not part.drawn and not chosen(name, part):
                self.model.get_parameter(name).requires_grad_(False)

    def mark_new(self, names: Iterable[str]) -> None:
        """Tell, in `Method.setup`, which weights were drawn anew or added. Anchors leave them out, as they do heads."""
        self._new.update(names)

    # ------------------------------------------------------------------ references, raw weights, forward view

    def is_new(self, weight: Weight) -> bool:
        """Whether a weight has no pre-trained value: a new head, one that was drawn, or an adapter that PEFT added."""
        prefix = getattr(getattr(self.model, "base_model", None), "prefix", None)
        lora = hasattr(self.model, "peft_config") and bool(prefix) and str(prefix) in weight.name
        return weight.head or weight.name in self._new or weight.name in self._drawn or lora

    def reference(self, name: str) -> Tensor:
        """The weight as it was before training, on the weight's device (on a shard: this rank's piece).

        A method asks for it in `Method.setup` first: a reference taken on resume would be half-trained.

        Raises:
            RuntimeError: No method has asked for it in setup.
        """
        return self._references[name]

    def raw(self, name: str) -> Tensor:
        """R of a weight, also while the model shows another value. It is no copy: clone it for a snapshot."""
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

    def show(self, weight: Weight, value: Tensor, *, own: bool = False) -> None:
        """Make ``value`` the forward view of a weight (in `Method.before_forward`).

        Args:
            weight: The weight.
            value: Tensor of its shape.
            own: Whether the tensor was made for this and is kept nowhere else. It is then not copied.
        """
        self._views.show(weight, value, own=own)

    def mix(self, weight: Weight, anchor: Tensor, mask: Tensor, keep: float) -> None:
        """Show ``anchor + mask * (given - anchor) / keep``, where ``given`` is what earlier methods show."""
        self._views.mix(weight, anchor, mask, keep)

    @contextlib.contextmanager
    def showing(self, values: Iterable[tuple[Weight, Tensor]]) -> Iterator[None]:
        """Make other values of weights live inside, in `Method.after_step`. Afterwards R is live again, bit for bit.

        The tensors are not copied: they must be made for this and kept nowhere else.
        """
        try:
            for weight, value in values:
                self._views.show(weight, value, own=True)
            torch.clear_autocast_cache()
            yield
        finally:
            self._views.restore()

    def freeze(self, weight: Weight, mask: Tensor, *, state: bool = True) -> None:
        """Exclude the entries of a weight where ``mask`` is False from this optimizer step.

        After all `Method.after_step` these entries are put back bit for bit, in the weight and in every tensor of the
        optimizer's state that has its shape. Call it in `Method.pull_back` or `Method.before_step`; masks of several
        calls intersect.

        Args:
            weight: The weight.
            mask: Boolean, of the weight's shape or 0-d for all entries; or, for a contiguous weight, the flat indices
                (int64) of the entries that take part in the step.
            state: Whether the optimizer's state is put back too. A mask that never changes does not need this, which
                saves two thirds of the copies.
        """
        self._views.freeze(weight, mask, state=state)

    def pull(self, weight: Weight, share: Tensor | float, anchor: Tensor | None = None) -> None:
        """Move a raw weight a share of the way to an anchor (to zero without one), in `Method.before_step`.

        It is done right before the optimizer moves the weight, when all methods have seen the weight as it was and have
        said what of it is frozen. So frozen entries are not pulled, whatever the order of the methods.
        """
        self._views.pull_later(weight, share, anchor)

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

    # ------------------------------------------------------------------ statistics

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


def _without(columns: frozenset[str], model: nn.Module, args: Any, inputs: Mapping[str, Any]) -> tuple[Any, Any]:
    """Take the columns that methods read out of the inputs of a model, which has no arguments for them."""
    return args, {name: value for name, value in inputs.items() if name not in columns}
