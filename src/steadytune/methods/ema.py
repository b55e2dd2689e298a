"""Averages of the weights along a run, which are evaluated and saved instead of the weights.

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

SPAN = 0.1  # share of the training that an average looks back over


@dataclass
class EMA(Method):
    """Evaluate, save and select the average of the weights; train the weights themselves.

    Args:
        decay: Share of the old average that stays; 1 - 1/n looks back about n steps, and 0 is plain
            fine-tuning. None looks back over a tenth of the training.
        scope: Which weights are averaged.

    Buffers (BatchNorm statistics) are not averaged. The Trainer's checkpoints hold the average as the model and the
    raw weights in the side file.

    Departures:
        The paper averages a teacher that a student learns from; here the average is only evaluated and saved. Its decay
        of 0.999 would hold three quarters of the start after 300 steps.
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

    def setup(self, run: Run) -> None:
        run.require(self, self.scope)

    def rate(self, run: Run) -> float:
        """Share of the average that the newest weights are."""
        return min(1.0, 1 / (SPAN * run.steps(self))) if self.decay is None else 1 - self.decay

    def evaluated(self, run: Run, weights: Sequence[Weight]) -> dict[str, float]:
        return {w.name: self.rate(run) for w in select(weights, self.scope)}


@dataclass
class SWA(Method):
    """Evaluate and save the plain mean of the weights of late steps; until the first of them, the weights themselves.

    Args:
        start: Share of the training before the first weights that count; the authors' 0.75.
        every: Steps from one addition to the next; the authors' one epoch.
        scope: Which weights are averaged.

    The average gains most where the weights still move: with a learning rate that stays high to the end. Buffers
    (BatchNorm statistics) are not averaged.

    Departures:
        No learning-rate schedule of its own (the authors' is cyclical or constant); no recomputed BatchNorm statistics,
        which transformers do not have.
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

    def setup(self, run: Run) -> None:
        run.require(self, self.scope)

    def evaluated(self, run: Run, weights: Sequence[Weight]) -> dict[str, float] | None:
        since = run.index - int(run.steps(self) * self.start)
        if since < 0:
            return None
        added, rest = divmod(since, self.every)
        return {w.name: 0.0 if rest else 1 / (added + 1) for w in select(weights, self.scope)}
