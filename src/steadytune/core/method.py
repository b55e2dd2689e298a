"""The base class of methods, with the moments of a step at which they act, and the weights that they get."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from ..fields import check, check_fields
from . import shards
from .anatomy import Kind
from .facts import Cost, Paper
from .tensors import checksum, hashed

if TYPE_CHECKING:
    from .run import Run
    from .step import Step

M = TypeVar("M", bound="Method")
AtSetup = Literal["draws", "writes", "scales", "reads"]


@dataclass(slots=True)
class Weight:
    """A parameter as methods see it: plain local tensors, also on a shard. Write to them in place only.

    Attributes:
        name: Name of the parameter in the unwrapped model.
        parameter: The parameter. Methods use ``data``, its live values, detached; on a shard, the piece of this
            process.
        grad: Gradient of the same shape; None before the backward pass.
        group: The optimizer's parameter group (current ``lr``, ``weight_decay``); empty before `Run.attach`.
        kind: Kind of weight, see `steadytune.core.anatomy`.
        block: Index of its transformer block; None outside the blocks.
        head: Whether it belongs to a new task head.
        input_dim: The axis of a linear weight that runs over input features (0 for transformers' Conv1D).
    """

    name: str
    parameter: nn.Parameter
    grad: Tensor | None
    group: dict[str, Any]
    kind: Kind
    block: int | None
    head: bool
    input_dim: int = 1

    @property
    def data(self) -> Tensor:
        """The live values. The tensor may change between the moments of a step, so do not keep it."""
        return shards.local(self.parameter.detach())


Scope = Literal["linear", "encoder", "all"] | Callable[[Weight], bool]
SCOPES: dict[str, Callable[[Weight], bool]] = {
    "linear": lambda w: w.kind == "linear",  # pooler and head too, a tied lm_head not: it is an embedding
    "encoder": lambda w: w.block is not None and not w.head,
    "all": lambda w: True,
}


class Method:
    """A fine-tuning method: a dataclass of hyperparameters. Its verbs are called at the moments of a step.

    Every verb is optional. Fields are hyperparameters only; what changes during training is kept in attributes
    made in `setup` and returned by `state_dict`. The type of a field declares what it may hold
    (``keep: Annotated[float, Within("(0, 1]")]``, `steadytune.fields`), which `__post_init__` checks. Verbs that
    take ``weights`` get a list of `Weight`, restricted by `only` when the method was.
    """

    copies: ClassVar[int] = 1  # copies of the batch in the one forward (R-Drop: 2)
    hidden_states: ClassVar[bool] = False  # whether the task's outputs must hold those of all blocks
    null: ClassVar[dict[str, Any] | None] = None  # the setting at which it is plain fine-tuning, bit for bit
    implied: ClassVar[dict[str, Any]] = {}  # values of later fields that older records and states imply
    exclusive: ClassVar[str | None] = None  # at most one method of this name acts on a weight ("anchor", "average")
    structure: ClassVar[bool] = False  # changes the model or the choice of trained weights, so it must come first
    at_setup: ClassVar[AtSetup] = "reads"  # what `setup` does with the model's weights, see `in_setup_order`
    adds_weights: ClassVar[bool] = False  # `attach` puts weights into the optimizer: it comes before that of others
    draws_weights: ClassVar[bool] = False  # its initial weights depend on the methods' seed: no soup over seeds
    beside_adapters: ClassVar[bool] = False  # its state holds weights that PEFT's checkpoints lack
    scales_only: ClassVar[bool] = False  # `before_step` multiplies gradients by numbers, so that zeros stay zeros
    reads_unlabelled: ClassVar[bool] = False  # learns from texts without labels, which `fit` puts into `unlabelled`
    hard_labels: ClassVar[bool] = False  # needs one class a row: `fit` refuses what trains on probabilities
    conflicts: ClassVar[tuple[str, ...]] = ()  # further things that it cannot be combined with, in words
    paper: ClassVar[Paper | None] = None  # paper that describes it; None for a method of your own
    acts_on_unread: ClassVar[Literal["never", "in scope", "always"]] = "always"  # see `Method.ignores_unread`
    cost: ClassVar[Cost] = Cost()  # cost in addition to plain fine-tuning
    where: Callable[[Weight], bool] | None = None  # set by `only`

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.paper is not None and cls.__doc__:  # the source is written once, as `paper`, and read in `help` too
            source = textwrap.indent(textwrap.fill(str(cls.paper), 112, break_on_hyphens=False), " " * 4)
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n\nSource:\n{source}"

    def __post_init__(self) -> None:
        """Check each field against its type. A subclass with its own checks calls this first."""
        check_fields(self)

    @property
    def needs_steps(self) -> bool:
        """Whether the schedule depends on `Run.total_steps`."""
        return False

    @property
    def full_precision(self) -> bool:
        """Whether it subtracts gradients, whose difference in half precision would be rounding noise."""
        return False

    @property
    def loss_taken(self) -> float:
        """Share of the task's loss that its penalty takes away, to put another loss in its place."""
        return 0.0

    @property
    def input_columns(self) -> tuple[str, ...]:
        """Columns of a batch that the method reads and the model does not get."""
        return ()

    def acts_on(self, weight: Weight) -> bool:
        """Whether a weight is in the method's ``scope``, if it has one, and in that of `only`."""
        return (self.where is None or self.where(weight)) and bool(select([weight], getattr(self, "scope", "all")))

    def ignores_unread(self, table: Weight) -> bool:
        """Whether the method leaves rows of an embedding table alone that no batch reads, and does not depend on them.

        Such rows have a zero gradient in each step, and only the optimizer's own decay moves them. `fit` trains without
        them where this holds for all methods, see `steadytune.vocabulary`. A method says by ``acts_on_unread`` when it
        does not hold: ``"never"``, if the table is ``"in scope"``, or ``"always"``, which is the safe default.

        Args:
            table: The weight of the token embeddings. Its ``group`` holds nothing but ``weight_decay``.
        """
        return self.acts_on_unread == "never" or (self.acts_on_unread == "in scope" and not self.acts_on(table))

    def setup(self, run: Run) -> None:
        """Prepare before the optimizer exists: structure, re-initialisation, freezing, references.

        In the order of `in_setup_order`, so that a reference is not of a head that another method then replaces.
        """

    def attach(self, run: Run) -> None:
        """Prepare after the optimizer exists and before its first step: parameter groups, taking over decay."""

    def before_forward(self, run: Run, weights: Sequence[Weight]) -> None:
        """Build the forward view through `Run.show` and `Run.mix`, in list order.

        It must be a pure function of (state, ``run.index``), because it may run again for the same index.
        """

    def before_batch(self, step: Step) -> Mapping[nn.Module, Tensor] | None:
        """Before the task's own forward of a micro-batch, in list order. The step has no outputs and no loss yet.

        Returns:
            What to add to the outputs of modules in that forward, and in no other: one row for each row of each copy.
        """
        return None

    def penalty(self, step: Step) -> Tensor | None:
        """A scalar to add to the loss of one micro-batch; None for nothing."""

    def after_backward(self, run: Run, weights: Sequence[Weight]) -> None:
        """Replace the step's gradient by another through `Run.look_again`, after the last backward pass, in list order.

        Live is the forward view, and ``.grad`` is its gradient (synced, unscaled). The gradient that replaces it is of
        what `Run.loss` returned alone, times a number for each micro-batch: further terms of a loop's loss go through
        ``run.loss(batch, compute=...)``.
        """

    def pull_back(self, run: Run, weights: Sequence[Weight]) -> None:
        """Convert the gradient of the weights it showed to that of the weights it was given, in reverse list order."""

    def before_step(self, run: Run, weights: Sequence[Weight]) -> None:
        """Edit ``.grad`` of the raw weights (synced, unscaled), in list order. The raw weights R are live."""

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        """Act after the step of the optimizer, in list order. R is live. Change stages here.

        Anchors come before all others, so that masks hold still what these would pull, whatever the order of the list.
        """

    def evaluated(self, run: Run, weights: Sequence[Weight]) -> Mapping[str, Tensor | float] | None:
        """Values to evaluate instead of R, by weight name.

        A value is a tensor, which is copied, or the rate of a running average that the core keeps: ``average += rate *
        (R - average)``, starting at R.
        """
        return None

    def finish(self, run: Run) -> None:
        """Act once at the end of the training, in reverse list order."""

    def release(self, run: Run) -> None:
        """Take hooks off the model, so that it trains as a plain one; `before_forward` puts them back.

        After `finish`, after a training that was cut off, after a Run that was refused, and before another Run acts on
        the model. It may be called more than once.
        """

    def state_dict(self) -> dict[str, Any]:
        """State of the method: tensors and plain values only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`."""


def in_setup_order(methods: Iterable[Method]) -> list[Method]:
    """Methods in the order of their `Method.setup`: those that write weights before those that keep what they find.

    Methods that change the model come before the others. Among each, those that draw weights come first, then those
    that write values, those that scale the present values, and those that read them; the rest is list order.
    """
    return sorted(methods, key=lambda method: (not method.structure, get_args(AtSetup).index(method.at_setup)))


def overrides(method: Method | type[Method], verb: str) -> bool:
    """Whether a method, or a class of methods, defines a verb."""
    kind = method if isinstance(method, type) else type(method)
    return getattr(kind, verb) is not getattr(Method, verb)


VERBS = (  # in the order of a step
    *("before_forward", "before_batch", "penalty", "after_backward"),
    *("pull_back", "before_step", "after_step", "evaluated"),
)
WEIGHT_VERBS = tuple(verb for verb in VERBS if verb not in ("before_batch", "penalty"))


def acts_on_weights(method: Method | type[Method]) -> bool:
    """Whether a method has a verb that is given weights."""
    return any(overrides(method, verb) for verb in WEIGHT_VERBS)


def only(method: M, where: Callable[[Weight], bool]) -> M:
    """A copy of ``method`` that acts on the weights for which ``where(weight)`` holds, and on no other.

    Raises:
        ValueError: The method acts on no weights in a step.
    """
    if not acts_on_weights(method):
        raise ValueError(
            f"only() restricts methods that act on weights in a step; {type(method).__name__} acts on the forward, on "
            "the loss, or before the first step: use it without only()"
        )
    restricted = copy.deepcopy(method)
    earlier = restricted.where
    restricted.where = where if earlier is None else lambda w: bool(earlier(w) and where(w))
    return restricted


def gradients(weights: Iterable[Weight]) -> list[Tensor]:
    """The gradients of weights that have one."""
    return [w.grad for w in weights if w.grad is not None]


def multiply(weights: Iterable[Weight], factors: list[Tensor] | float) -> None:
    """``g <- g * factor`` in place, for weights with a gradient.

    Masks are applied as factors because `torch.where` takes three times as long on a CPU: its branches on a random mask
    cannot be predicted.
    """
    grads = gradients(weights)
    if grads:
        torch._foreach_mul_(grads, factors)


def select(weights: Iterable[Weight], scope: Scope) -> list[Weight]:
    """The weights in a scope: ``"linear"``, ``"encoder"``, ``"all"``, or a function `Weight` -> bool."""
    check("scope", scope, Scope)
    admits = SCOPES[scope] if isinstance(scope, str) else scope
    return [w for w in weights if admits(w)]


def entry(method: Method) -> dict[str, Any]:
    """Name of the class and fields of a method as plain values; functions by their qualified name."""
    values = {f.name: getattr(method, f.name) for f in dataclasses.fields(method)}  # type: ignore[arg-type]
    if method.where is not None:
        values["where"] = method.where
    return {
        "name": type(method).__name__,
        **{k: _plain(v) for k, v in values.items()},
    }


def _plain(value: Any) -> Any:
    """A value fit for JSON and ``torch.load(weights_only=True)``: names of functions, Python's numbers for NumPy's."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):  # of weight names to tensors
        sums = [(name, *map(checksum, tensors)) for name, tensors in value.items()]
        return f"of {len(value)} weights, checksum {hashed(*sums):016x}"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return value.item() if hasattr(value, "item") else value
