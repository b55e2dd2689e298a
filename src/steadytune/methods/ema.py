"""Averages of the weights over a run, which are evaluated and saved instead of the weights.

EMA is an exponential moving average (the idea is Polyak's and Juditsky's, 1992), SWA a plain mean of late weights.

    EMA    average <- decay * average + (1 - decay) * W        after every step; the first is W itself
    SWA    average <- mean of the W after every `every`-th step, from the share `start` of the training on
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..core import Method, Run, Scope, Weight, Within, select
from ..core.facts import Cost, Paper

SPAN = 0.1  # share of the training that the default average covers


@dataclass
class EMA(Method):
    """Evaluate, save and select the average of the weights; train the weights themselves.

    Args:
        decay: Weight of the old average. 1 - 1/n averages over about n steps, 0 is plain fine-tuning, and None averages
            over a tenth of the training.
        scope: Which weights are averaged.

    Buffers (BatchNorm statistics) are not averaged. The Trainer's checkpoints hold the average as the model and the
    raw weights in the side file.

    Departures:
        In the paper the average is a teacher from which a student learns; here it is only evaluated and saved. With the
        paper's decay of 0.999, the initial weights would still have a share of three quarters after 300 steps.
    """

    decay: Annotated[float, Within("[0, 1)")] | None = None
    scope: Scope = "all"

    null: ClassVar = {"decay": 0.0}
    exclusive: ClassVar = "average"
    cost: ClassVar = Cost(held={"": 4})
    paper: ClassVar = Paper(
        authors=("Antti Tarvainen", "Harri Valpola"),
        title="Mean teachers are better role models: Weight-averaged consistency targets improve semi-supervised deep "
        "learning results",
        booktitle="Advances in Neural Information Processing Systems",
        venue="NeurIPS",
        year=2017,
        arxiv="1703.01780",
    )

    @property
    def needs_steps(self) -> bool:
        return self.decay is None

    def ignores_unread(self, table: Weight) -> bool:
        return not self.acts_on(table) or not table.group["weight_decay"]

    def setup(self, run: Run) -> None:
        run.require(self, self.scope)

    def rate(self, run: Run) -> float:
        """Share of the newest weights in the average."""
        return min(1.0, 1 / (SPAN * run.steps(self))) if self.decay is None else 1 - self.decay

    def evaluated(self, run: Run, weights: Sequence[Weight]) -> dict[str, float]:
        return {w.name: self.rate(run) for w in select(weights, self.scope)}


@dataclass
class SWA(Method):
    """Evaluate and save the mean of the weights of late steps; before the first of them, the weights themselves.

    Args:
        start: Share of the training before averaging starts; 0.75 as in the paper.
        every: Number of steps between two additions; in the paper, one epoch.
        scope: Which weights are averaged.

    The average helps most if the weights still move, that is, with a learning rate that stays high to the end. Buffers
    (BatchNorm statistics) are not averaged.

    Departures:
        It has no learning-rate schedule of its own; the authors' is cyclical or constant. BatchNorm statistics are not
        recomputed, because transformers have none.
    """

    start: Annotated[float, Within("[0, 1]")] = 0.75
    every: Annotated[int, Within("[1, inf)")] = 1
    scope: Scope = "all"

    null: ClassVar = {"start": 1.0}
    needs_steps = True
    exclusive: ClassVar = "average"
    cost: ClassVar = Cost(held={"": 4})
    paper: ClassVar = Paper(
        authors=(
            "Pavel Izmailov",
            "Dmitrii Podoprikhin",
            "Timur Garipov",
            "Dmitry Vetrov",
            "Andrew Gordon Wilson",
        ),
        title="Averaging Weights Leads to Wider Optima and Better Generalization",
        booktitle="Conference on Uncertainty in Artificial Intelligence",
        venue="UAI",
        year=2018,
        arxiv="1803.05407",
    )

    def ignores_unread(self, table: Weight) -> bool:
        return not self.acts_on(table) or not table.group["weight_decay"]

    def setup(self, run: Run) -> None:
        run.require(self, self.scope)

    def evaluated(self, run: Run, weights: Sequence[Weight]) -> dict[str, float] | None:
        since = run.index - int(run.steps(self) * self.start)
        if since < 0:
            return None
        added, rest = divmod(since, self.every)
        return {w.name: 0.0 if rest else 1 / (added + 1) for w in select(weights, self.scope)}
