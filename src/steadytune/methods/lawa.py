"""LAWA: evaluate the mean of the latest checkpoints of the training.

every `every` steps   c_j = W
average = mean of the last `last` of the c_j
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..core import Method, Run, Scope, Weight, Within, select
from ..core.facts import Cost, Paper

EPOCHS = 20  # epochs of a training, of which the paper keeps one checkpoint each


@dataclass
class LAWA(Method):
    """Evaluate and save the mean of the last few checkpoints, which are kept in memory; train the weights themselves.

    Args:
        last: Number of checkpoints in the mean; 1 evaluates the newest alone.
        every: Number of steps between two checkpoints. None is a twentieth of the training, which is one epoch in a
            `fit` of 20 epochs. The paper takes one a epoch.
        scope: Which weights are averaged.

    At the end, `SWA` with a suitable ``start`` gives nearly the same mean and keeps one copy of the weights instead of
    ``last + 1``. This window moves, however: each evaluation on the way is of recent weights only, so that early
    stopping and the choice of the best moment work with it. Before the first checkpoint the weights themselves are
    evaluated. Buffers (BatchNorm statistics) are not averaged.

    Departures:
        The authors average checkpoint files after the training. There is no further state in their method: the training
        itself does not see the mean, here as there.
    """

    last: Annotated[int, Within("[1, inf)")] = 5
    every: Annotated[int, Within("[1, inf)")] | None = None
    scope: Scope = "all"

    null: ClassVar = {"last": 1, "every": 1}
    exclusive: ClassVar = "average"
    acts_on_unread = "in scope"
    cost: ClassVar = Cost(held={"": 24})
    paper: ClassVar = Paper(
        authors=("Jean Kaddour",),
        title="Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging",
        booktitle="Workshop Has it Trained Yet? at NeurIPS",
        venue="HITY at NeurIPS",
        year=2022,
        arxiv="2209.14981",
    )

    @property
    def needs_steps(self) -> bool:
        return self.every is None

    def setup(self, run: Run) -> None:
        run.require(self, self.scope)
        self.checkpoints: list[dict[str, Tensor]] = []

    def evaluated(self, run: Run, weights: Sequence[Weight]) -> dict[str, Tensor] | dict[str, float] | None:
        weights = select(weights, self.scope)
        if (run.index + 1) % self.interval(run):
            return {w.name: 0.0 for w in weights} if self.checkpoints else None  # the mean stays as it is
        newest = {w.name: w.data.clone() for w in weights}
        self.checkpoints = [*self.checkpoints, newest][-self.last :]
        # a weight that was unfrozen since has fewer checkpoints
        return {name: torch.stack([c[name] for c in self.checkpoints if name in c]).mean(0) for name in newest}

    def interval(self, run: Run) -> int:
        """Steps between two checkpoints."""
        return max(1, run.steps(self) // EPOCHS) if self.every is None else self.every

    def state_dict(self) -> dict[str, Any]:
        return {"checkpoints": self.checkpoints}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.checkpoints = state["checkpoints"]
