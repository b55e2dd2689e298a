"""Extrapolation: take the gradient ahead of the weights, in the direction of their last update.

W_fwd = W + ahead * (W - W_before)        the point that another such update would reach
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
    """Move each weight ahead by a share of its last update for the forward; apply the gradient to the weight itself.

    Args:
        ahead: Distance in units of the last update. With SGD it is the paper's extrapolation step divided by its
            learning rate.
        scope: Weights to move ahead.

    The method is meant for large batches. It needs no extra pass. The first step uses the weights as they are.

    Departures:
        The direction is the last update of any optimizer, including decay and other methods; with plain SGD it is the
        past gradient, as in the paper's cheap form. The paper's forms with an extra gradient are left out.
    """

    ahead: Annotated[float, Within("[0, inf)")] = 0.5
    scope: Scope = "all"

    null: ClassVar = {"ahead": 0.0}
    acts_on_unread = "never"
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
            chosen = select(weights, self.scope)  # weights without a gradient do not move
            self.before = {w.name: self.before.get(w.name, torch.empty_like(w.data)).copy_(w.data) for w in chosen}

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.before = state["before"]
