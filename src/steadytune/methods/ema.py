"""Exponential moving average of the weights along a run (Polyak, Juditsky 1992; Tarvainen, Valpola, NeurIPS 2017,
arXiv 1703.01780).

    average <- decay * average + (1 - decay) * W        after every step; the first is W itself
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..core import Method, Run, Scope, Weight, select
from ..facts import Cost, Paper


@dataclass
class EMA(Method):
    """Evaluate, save and select the average of the weights; train the weights themselves.

    Args:
        decay in [0, 1): share of the old average that stays. 0.99 looks back about 100 steps, which suits runs
            of a few hundred; 0 is plain fine-tuning.
        scope: which weights are averaged.

    Buffers (BatchNorm statistics) are not averaged. The Trainer's checkpoints hold the average as the model and the
    raw weights in the side file.

    Departures:
        The paper averages a teacher that a student learns from; here the average is only evaluated and saved.
    """

    decay: float = 0.99
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

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {self.decay}")

    def setup(self, run: Run) -> None:
        run.require(self, self.scope)

    def evaluated(self, run: Run, weights: Sequence[Weight]) -> dict[str, float]:
        return {w.name: 1 - self.decay for w in select(weights, self.scope)}
