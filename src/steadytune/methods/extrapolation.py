"""Extrapolation: take the gradient a little further along the way the weights are going.

W_fwd = W + ahead * (W - W_before)        where the last update would lead if it were repeated
W <- optimizer(W, gradient at W_fwd)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..core import Method, Run, Scope, Weight, Within, select
from ..core.facts import Cost, Paper


@dataclass
class Extrapolation(Method):
    """Show each weight moved on by a share of its last update; the gradient found there moves the weight itself.

    Args:
        ahead: How far, in units of the last update. With SGD it is the paper's extrapolation step divided
            by its learning rate.
        scope: Which weights are moved on.

    Made for large batches. The gradient comes with no extra pass; the first step shows the weights as they are.

    Departures:
        The direction is the last update, whichever optimizer made it, decay and other methods included; with plain SGD
        it is the past gradient of the paper's cheap form. The forms with a gradient of their own are left out.
    """

    ahead: Annotated[float, Within("[0, inf)")] = 0.5
    scope: Scope = "all"

    null: ClassVar = {"ahead": 0.0}
    cost: ClassVar = Cost(held={"": 4}, during=4)
    paper: ClassVar = Paper(
        authors=("Tao Lin", "Lingjing Kong", "Sebastian U. Stich", "Martin Jaggi"),
        title="Extrapolation for Large-batch Training in Deep Learning",
        booktitle="International Conference on Machine Learning",
        venue="ICML",
        year=2020,
        arxiv="2006.05720",
    )

    def setup(self, run: Run) -> None:
        run.require(self, self.scope)
        self.before: dict[str, Tensor] = {}  # weights before the last update

    def before_forward(self, run: Run, weights: Sequence[Weight]) -> None:
        for w in select(weights, self.scope):
            if w.name in self.before:
                move = run.raw(w.name) - self.before[w.name]
                run.show(w, move.mul_(self.ahead).add_(w.data), own=True)

    def before_step(self, run: Run, weights: Sequence[Weight]) -> None:
        if self.ahead:
            chosen = select(weights, self.scope)  # without those that get no gradient: they do not move
            self.before = {w.name: self.before.get(w.name, torch.empty_like(w.data)).copy_(w.data) for w in chosen}

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = state["before"]
