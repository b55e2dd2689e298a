"""What a method is: the moments of a step it may act at, and the weights it sees there."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

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


@dataclass(slots=True)
class Weight:
    """What a method sees of a parameter: plain local tensors, also on a shard. Write in place only.

    Attributes:
        name: The parameter's name in the unwrapped model.
        parameter: The parameter itself. Methods use ``data``: its live values, detached (on a shard: this rank's
            piece).
        grad: Gradient of the same shape, or None before the backward pass.
        group: The optimizer's parameter group (current ``lr``, ``weight_decay``); empty before `Run.attach`.
        kind: What the parameter is, see `steadytune.anatomy`.
        block: Index of its transformer block, or None.
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
        """The live values: what is live may move between the moments of a step, so ask anew at each."""
        return shards.local(self.parameter.detach())


Scope = Literal["linear", "encoder", "all"] | Callable[[Weight], bool]
SCOPES: dict[str, Callable[[Weight], bool]] = {
    "linear": lambda w: w.kind == "linear",  # pooler and head too, a tied lm_head not: it is an embedding
    "encoder": lambda w: w.block is not None and not w.head,
    "all": lambda w: True,
}


class Method:
    """A robust fine-tuning method: a dataclass of hyperparameters whose verbs are the moments of a step.

    Every verb is optional. Fields are hyperparameters only; what changes during training is kept in attributes
    made in `setup` and returned by `state_dict`. The type of a field declares what it may hold
    (``keep: Annotated[float, Within("(0, 1]")]``, `steadytune.core.fields`), which `__post_init__` checks. Verbs that
    take ``weights`` get a list of `Weight`, restricted by `only` when the method was.
    """

    copies: ClassVar[int] = 1  # copies of the batch in the one forward (R-Drop: 2)
    hidden_states: ClassVar[bool] = False  # whether the task's outputs must hold those of all blocks
    null: ClassVar[dict[str, Any] | None] = None  # the setting at which it is plain fine-tuning, bit for bit
    implied: ClassVar[dict[str, Any]] = {}  # fields added later: the value that records and states without them mean
    exclusive: ClassVar[str | None] = None  # at most one method of this name acts on a weight ("anchor", "average")
    structure: ClassVar[bool] = False  # changes the model or what of it is trained: before all that look at weights
    draws_weights: ClassVar[bool] = False  # its weights depend on the methods' seed from the start: no soup over seeds
    conflicts: ClassVar[tuple[str, ...]] = ()  # what else it cannot be combined with, in words
    paper: ClassVar[Paper | None] = None  # where it comes from; None for one of your own
    cost: ClassVar[Cost] = Cost()  # what it costs beside plain fine-tuning
    where: Callable[[Weight], bool] | None = None  # set by `only`

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.paper is not None and cls.__doc__:  # the source is written once, as `paper`, and read in `help` too
            source = textwrap.indent(textwrap.fill(str(cls.paper), 112, break_on_hyphens=False), " " * 4)
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n\nSource:\n{source}"

    def __post_init__(self) -> None:
        """Check every field against its type. A subclass that has a check of its own calls this first."""
        check_fields(self)

    @property
    def needs_steps(self) -> bool:
        """Whether the schedule depends on `Run.total_steps`."""
        return False

    @property
    def full_precision(self) -> bool:
        """Whether it subtracts gradients, which in half precision would leave their rounding."""
        return False

    @property
    def input_columns(self) -> tuple[str, ...]:
        """Columns of a batch that the method reads and the model never sees."""
        return ()

    def setup(self, run: Run) -> None:
        """Before the optimizer exists: structure, re-initialisation, freezing, references."""

    def attach(self, run: Run) -> None:
        """Optimizer exists and is empty: parameter groups, taking over decay."""

    def before_forward(self, run: Run, weights: Sequence[Weight]) -> None:
        """Build the forward view through `Run.show` and `Run.mix`, in list order.

        Must be a pure function of (state, ``run.index``): it may run again for the same index.
        """

    def before_batch(self, step: Step) -> Mapping[nn.Module, Tensor] | None:
        """Before the task's own forward of a micro-batch, in list order. The step has no outputs and no loss yet.

        Returns:
            What to add to the outputs of modules in that forward, and in no other: one row for each row of each copy.
        """
        return None

    def penalty(self, step: Step) -> Tensor | None:
        """A scalar added to the loss of one micro-batch."""

    def after_backward(self, run: Run, weights: Sequence[Weight]) -> None:
        """Replace the step's gradient by another through `Run.look_again`, after the last backward pass, in list order.

        Live is the forward view, and ``.grad`` is its gradient (synced, unscaled).
        """

    def pull_back(self, run: Run, weights: Sequence[Weight]) -> None:
        """Turn ``.grad`` of what it showed into ``.grad`` of what it was given, in reverse list order."""

    def before_step(self, run: Run, weights: Sequence[Weight]) -> None:
        """Edit ``.grad`` (of the raw weights; synced, unscaled), in list order. Live is R."""

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        """After the optimizer moved R, which is live, in list order. Stage transitions belong here."""

    def evaluated(self, run: Run, weights: Sequence[Weight]) -> Mapping[str, Tensor | float] | None:
        """What to evaluate instead of R, by weight name: a tensor, which is copied, or the rate of a
        running average that the core keeps, ``average += rate * (R - average)``, starting at R.
        """
        return None

    def finish(self, run: Run) -> None:
        """Once, at the end, in reverse list order."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""


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
    """``g <- g * factor`` in place; nothing when the step gave these weights no gradient.

    Masks are factors too: `torch.where` takes three times as long on a CPU, which cannot foresee a random mask.
    """
    found = gradients(weights)
    if found:
        torch._foreach_mul_(found, factors)


def select(weights: Iterable[Weight], scope: Scope) -> list[Weight]:
    """The weights that a scope admits: ``"linear"``, ``"encoder"``, ``"all"`` or a predicate over `Weight`."""
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
    """What JSON and ``torch.load(weights_only=True)`` take: names for functions, Python's numbers for NumPy's."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Mapping):  # of weight names to tensors
        sums = [(name, *map(checksum, tensors)) for name, tensors in value.items()]
        return f"of {len(value)} weights, checksum {hashed(*sums):016x}"
    if callable(value):
        return getattr(value, "__qualname__", type(value).__qualname__)
    return value.item() if hasattr(value, "item") else value
