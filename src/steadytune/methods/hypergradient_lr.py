"""Hypergradient descent: the learning rate grows while successive updates agree, and shrinks when they reverse.

With u the direction of the last update, W <- W - lr * u, and g the gradient after it, d loss / d lr = -<g, u>:

    multiplicative    lr <- lr * (1 + beta * <g, u> / (||g|| ||u||))
    additive          lr <- lr + beta * <g, u>
    lr = factor * rate of the schedule
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core import Method, Run, Weight, Within
from ..core.facts import Cost, Paper
from .bases.groups import peak_rate

LEAST = 0.01  # smallest factor: with 0 there would be no more updates to learn from


@dataclass
class HypergradientLR(Method):
    """Multiply all updates of the optimizer by one factor, which is learned by gradient descent at each step.

    Args:
        beta: Learning rate of the factor. For the additive rule it is the authors' beta, in units of the learning rate
            per squared gradient (1e-4 or far less).
        rule: ``"multiplicative"`` uses the cosine between gradient and last update, so that beta has no unit.
            ``"additive"`` uses their inner product.

    The factor starts at 1, stays above 0.01 and multiplies the rate of the schedule; with a constant schedule this is
    the paper's rate. It acts on the whole update: the optimizer's, including decay, the pull of an anchor, and the
    changes that methods before it in the list make after the optimizer's step.

    Departures:
        The direction is computed from the weights, so any optimizer works. With SGD, momentum or Adam it is the
        paper's; decoupled decay is part of it. One factor acts on top of any schedule. The multiplicative rule is the
        default because one beta fits all models; in the additive rule it depends on the scale of the gradient.

    Raises:
        ValueError: In attach, if the learning rate is 0.
    """

    beta: Annotated[float, Within("[0, 1)")] = 0.02
    rule: Literal["multiplicative", "additive"] = "multiplicative"

    null: ClassVar = {"beta": 0.0}
    cost: ClassVar = Cost(held={"": 4})
    paper: ClassVar = Paper(
        authors=("Atilim Gunes Baydin", "Robert Cornish", "David Martinez Rubio", "Mark Schmidt", "Frank Wood"),
        title="Online Learning Rate Adaptation with Hypergradient Descent",
        booktitle="International Conference on Learning Representations",
        venue="ICLR",
        year=2018,
        arxiv="1703.04782",
    )

    def ignores_unread(self, table: Weight) -> bool:
        return not table.group["weight_decay"]  # which the factor multiplies, and whose moves enter its gradient

    def setup(self, run: Run) -> None:
        p = run.require(self, "all")[0].data
        self.factor = torch.ones((), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        self.last: dict[str, Tensor] = {}  # W before - W after the last update; during a step: W before it
        self.rate = 0.0  # rate of the schedule at the last update

    def attach(self, run: Run) -> None:
        self.peak = max((peak_rate(w.group) for w in run.weights(self)), default=0.0)
        if not self.peak:
            raise ValueError(
                "HypergradientLR multiplies the learning rate, which is 0: give the optimizer its peak rate"
            )

    def before_step(self, run: Run, weights: Sequence[Weight]) -> None:
        if not (self.beta and weights):
            return
        self.factor = self.factor.to(weights[0].data.device)
        known = [w for w in weights if w.name in self.last]
        if known and self.rate:
            self.learn(run, [w.grad for w in known if w.grad is not None], [self.last[w.name] for w in known])
        self.rate = largest_rate(weights)
        self.last = {w.name: self.last.get(w.name, torch.empty_like(w.data)).copy_(w.data) for w in weights}

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        moved = [w for w in weights if w.name in self.last and w.grad is not None]
        if not (self.beta and moved):
            return
        live, before = [w.data for w in moved], [self.last[w.name] for w in moved]
        torch._foreach_sub_(live, before)
        torch._foreach_mul_(live, self.factor)
        torch._foreach_add_(live, before)
        torch._foreach_sub_(before, live)

    def learn(self, run: Run, gradient: list[Tensor], update: list[Tensor]) -> None:
        """One step of the factor along its gradient."""
        product = run.dot(gradient, update).to(self.factor.dtype)
        if self.rule == "additive":
            inner = product / (self.rate * self.factor)  # with the direction instead of the update
            self.factor = (self.factor + self.beta / self.peak * inner).clamp(min=LEAST)
        else:
            lengths = torch.stack([torch.stack(run.norms(t)).norm() for t in (gradient, update)])
            cosine = product / lengths.prod().clamp(min=torch.finfo(lengths.dtype).tiny)
            self.factor = (self.factor * (1 + self.beta * cosine)).clamp(min=LEAST)

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor, "last": self.last, "rate": self.rate}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor, self.last, self.rate = state["factor"], state["last"], state["rate"]


def largest_rate(weights: Sequence[Weight]) -> float:
    """Largest learning rate of all groups; slower groups keep their ratio to it."""
    return max((float(w.group["lr"]) for w in weights), default=0.0)
