"""Base of bi-level methods, whose variables learn on other rows than the weights: those rows, and an optimizer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core import Method, Run, Weight
from ...core.step import Inputs
from ...core.tensors import hashed
from ...hypergradient import AdamW, slope

Outer = Callable[[], Iterable[Inputs]]  # called for each pass over the rows
Variables = dict[str, list[Tensor]]


class BiLevel(Method):
    """Base of methods with their own variables, which learn on ``outer`` rows after each step of the weights.

    Subclasses pass their variables to `begin` in `attach`, and their gradients to `learn`.
    """

    outer: float | Outer | None
    lr: float
    decay: float
    precondition: bool

    eps: float = 1e-8  # eps of the variables' AdamW

    @property
    def interval(self) -> tuple[float, float] | None:
        """Range that variables are clamped to; None for no range."""
        return None

    @property
    def learns(self) -> bool:
        """Whether there is anything to learn."""
        return True

    def setup(self, run: Run) -> None:
        self.variables: Variables = {}
        self.moments: tuple[int, list[Tensor], list[Tensor]] = (0, [], [])
        self.rows: OuterRows | None = None
        if not self.learns or self.outer is None:
            return
        if isinstance(self.outer, (int, float)):
            raise ValueError(
                f"{type(self).__name__}(outer={self.outer}) holds out a share of the training rows, which only "
                "steadytune.fit can: hold them out yourself and pass outer=lambda: loader, a function that gives "
                "batches of rows that the weights are not trained on"
            )
        self.rows = OuterRows(self.outer, run.seed)

    def begin(self, run: Run, variables: Variables) -> None:
        """Start to learn the variables, which change in place.

        Raises:
            ValueError: The weights are sharded.
        """
        if run.sharded:
            raise ValueError(
                f"{type(self).__name__} needs whole weights, but these are sharded (FSDP2): use DistributedDataParallel"
            )
        self.variables = variables
        self.moments = AdamW(self.lr).start(flat(variables))

    def draw(self, run: Run) -> Inputs:
        """The next batch of the outer rows, on the model's device."""
        assert self.rows is not None
        device = next(run.model.parameters()).device
        with run.forked_rng():
            batch = self.rows.next()
        return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def follow(self, run: Run, grads: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Directions q of `hypergradient` for the last step of the optimizer, by weight name.

        They are written into ``grads``, so that no further copy of the weights is in memory. The weights' ``.grad``
        stays as it was, because further methods compute the slope of the same step.

        Args:
            run: The run, inside `Method.after_step`.
            grads: Gradient of the outer loss, which is used up.
        """
        directions = {}
        for w in run.weights():
            if w.grad is not None and w.name in grads:
                directions[w.name] = grads[w.name].mul_(self.slope(run, w))
        return directions

    def slope(self, run: Run, weight: Weight) -> Tensor | float:
        """Slope of the step of a weight: that of the optimizer, or the learning rate for plain descent."""
        assert run.optimizer is not None
        assert weight.grad is not None
        if not self.precondition:
            return weight.group["lr"]
        return slope(weight.group, run.optimizer.state.get(weight.parameter, {}), weight.grad)

    def rate(self, run: Run) -> float:
        """Learning rate of the variables at this step."""
        return self.lr

    def learn(self, run: Run, gradients: Sequence[Tensor]) -> None:
        """One step of AdamW on the variables."""
        weights = flat(self.variables)
        update = AdamW(self.rate(run), eps=self.eps, weight_decay=self.decay)
        moved, self.moments = update(weights, gradients, self.moments)
        if self.interval is not None:
            torch._foreach_clamp_min_(moved, self.interval[0])
            torch._foreach_clamp_max_(moved, self.interval[1])
        torch._foreach_copy_(weights, moved)

    def state_dict(self) -> dict[str, Any]:
        if not self.variables:
            return {}
        count, first, second = self.moments
        rows = [] if self.rows is None else self.rows.at
        return {"variables": self.variables, "count": count, "first": first, "second": second, "rows": rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.variables:
            return
        weights = flat(self.variables)
        torch._foreach_copy_(weights, flat(state["variables"]))
        first, second = ([t.to(w.device) for t, w in zip(state[k], weights, strict=True)] for k in ("first", "second"))
        self.moments = (state["count"], first, second)
        if self.rows is not None:
            self.rows.seek(*state["rows"])


def flat(variables: Variables) -> list[Tensor]:
    """All tensors, in order."""
    return [t for tensors in variables.values() for t in tensors]


class OuterRows:
    """Endless batches of a source; each pass has its own order and seed.

    Args:
        source: Function that returns the batches of a pass; it may shuffle with torch's global generator.
        seed: Seed of the orders.
    """

    def __init__(self, source: Outer, seed: int) -> None:
        self.source, self.seed = source, seed
        self.seek(0, 0)

    @property
    def at(self) -> list[int]:
        """Numbers of the next pass and of the next batch in it."""
        return [self._epoch, self._place]

    def seek(self, epoch: int, place: int) -> None:
        """Continue from a batch of a pass."""
        self._epoch, self._place = epoch, place
        self._reader = self._read()

    def next(self) -> Inputs:
        """The next batch. It reseeds torch's global generator.

        Raises:
            ValueError: The source returns no batch.
        """
        return next(self._reader)

    def _read(self) -> Iterator[Inputs]:
        while True:
            torch.manual_seed(hashed(self.seed, "outer", self._epoch))
            batches, place = iter(self.source()), 0
            for place in itertools.count():
                torch.manual_seed(hashed(self.seed, "outer", self._epoch, place))
                batch = next(batches, None)
                if batch is None:
                    break
                if place >= self._place:  # earlier ones were used before a resume
                    self._place = place + 1
                    yield batch
            if not place:
                raise ValueError(
                    "outer gives no batch: it must be a function that gives batches each time it is called"
                )
            self._epoch, self._place = self._epoch + 1, 0
