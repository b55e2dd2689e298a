"""Hypergradient descent: the learning rate grows while successive updates agree, and shrinks when they turn back.

Baydin, Cornish, Martinez Rubio, Schmidt, Wood: Online Learning Rate Adaptation with Hypergradient Descent.
ICLR 2018, arXiv 1703.04782.

With u the direction of the last update, W <- W - lr * u, and g the gradient after it, d loss / d lr = -<g, u>:

    multiplicative    lr <- lr * (1 + beta * <g, u> / (||g|| ||u||))
    additive          lr <- lr + beta * <g, u>
    u                 SGD: gradient, or momentum buffer;  Adam: m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Adam

from .. import shards
from ..core import Method, Run, Weight, gradients, one_of
from ..facts import Paper


@dataclass
class HypergradientLR(Method):
    """Multiply the updates of SGD or Adam(W) by one factor that learns, step by step, from how well they point.

    Args:
        beta in [0, 1): rate at which the factor learns. Additive: the authors' beta, in units of the learning rate per
            squared gradient (1e-4 and far below).
        rule: ``"multiplicative"``: by the cosine between gradient and last update, so that beta has no unit.
            ``"additive"``: by their inner product.

    The factor begins at 1 and multiplies whatever rate a schedule gives, so that with a constant schedule the rate is
    the paper's. Decay inside the optimizer is part of its update. Methods that come before it in the list have edited
    the gradient it looks at; what later methods do to the weights is not multiplied. A copy of the weights is held
    while the optimizer steps, and the last gradient between steps where SGD has no momentum.

    Departures:
        One factor on top of any schedule; it never falls below 0. The multiplicative rule is the default: one beta
        serves all models, where the additive one depends on the scale of the gradient.

    Raises:
        ValueError: in attach, for another optimizer than SGD, Adam and AdamW, or one with nesterov, amsgrad or
            maximize.
    """

    beta: float = 0.02
    rule: Literal["multiplicative", "additive"] = "multiplicative"

    null: ClassVar = {"beta": 0.0}
    conflicts: ClassVar[tuple[str, ...]] = ("optimizers other than SGD, Adam and AdamW",)
    paper: ClassVar = Paper(
        authors=(
            "Atilim Gunes Baydin", "Robert Cornish", "David Martinez Rubio", "Mark Schmidt", "Frank Wood",
        ),
        title="Online Learning Rate Adaptation with Hypergradient Descent",
        booktitle="International Conference on Learning Representations",
        venue="ICLR",
        year=2018,
        arxiv="1703.04782",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError(f"beta must lie in [0, 1), got {self.beta}")
        one_of("rule", self.rule, ("multiplicative", "additive"))

    def setup(self, run: Run) -> None:
        p = run.require(self, "all")[0].data
        self.factor = torch.ones((), dtype=torch.promote_types(p.dtype, torch.float32), device=p.device)
        self.last: dict[str, Tensor] = {}  # gradients of the step before, which plain SGD does not keep
        self.before: list[Tensor] = []  # weights before the step under way

    def attach(self, run: Run) -> None:
        optimizer: Any = run.optimizer
        odd = [o for o in ("nesterov", "amsgrad", "maximize") if any(g.get(o) for g in optimizer.param_groups)]
        if not isinstance(optimizer, SGD | Adam) or odd:
            with_odd = f" with {odd[0]}" if odd else ""
            raise ValueError(
                f"HypergradientLR knows the updates of SGD, Adam and AdamW, got {type(optimizer).__name__}{with_odd}: "
                "use one of them without nesterov, amsgrad and maximize, or leave HypergradientLR out"
            )
        self.rate = max(float(w.group["lr"]) for w in run.weights(self))  # before any schedule

    def before_step(self, run: Run, weights: Sequence[Weight]) -> None:
        if not (self.beta and weights):
            return
        self.factor = self.factor.to(weights[0].data.device)
        updated = [w for w in weights if self.has_direction(run, w)]
        if updated:
            self.learn(run, gradients(updated), self.directions(run, updated))
        self.last = {w.name: w.grad.clone() for w in weights if w.grad is not None and plain_sgd(w)}
        self.before = [w.data.clone() for w in weights]

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        if self.before:
            moved = [w.data for w in weights if w.grad is not None]
            torch._foreach_sub_(moved, self.before)
            torch._foreach_mul_(moved, self.factor)
            torch._foreach_add_(moved, self.before)
        self.before = []

    def learn(self, run: Run, gradient: list[Tensor], direction: list[Tensor]) -> None:
        """One step of the factor along its gradient."""
        product = run.dot(gradient, direction).to(self.factor.dtype)
        if self.rule == "additive":
            self.factor = (self.factor + self.beta / self.rate * product).clamp(min=0)
        else:
            lengths = torch.stack([torch.stack(run.norms(t)).norm() for t in (gradient, direction)])
            cosine = product / lengths.prod().clamp(min=torch.finfo(lengths.dtype).tiny)
            self.factor = self.factor * (1 + self.beta * cosine)

    def has_direction(self, run: Run, weight: Weight) -> bool:
        """Whether the last update of a weight is known: not before its first."""
        return weight.name in self.last if plain_sgd(weight) else bool(kept(run, weight))

    def directions(self, run: Run, weights: Sequence[Weight]) -> list[Tensor]:
        """The direction u of each weight, from what its last update left behind."""
        if "betas" not in weights[0].group:
            return [self.last[w.name] if plain_sgd(w) else kept(run, w)["momentum_buffer"] for w in weights]
        states, betas = [kept(run, w) for w in weights], [w.group["betas"] for w in weights]
        t = [state["step"].double() for state in states]
        divisor = torch._foreach_sqrt([state["exp_avg_sq"] for state in states])
        torch._foreach_div_(divisor, [(1 - b2**n).sqrt() for (_, b2), n in zip(betas, t, strict=True)])
        torch._foreach_add_(divisor, [w.group["eps"] for w in weights])
        torch._foreach_mul_(divisor, [1 - b1**n for (b1, _), n in zip(betas, t, strict=True)])
        return list(torch._foreach_div([state["exp_avg"] for state in states], divisor))

    def state_dict(self) -> dict[str, Any]:
        return {"factor": self.factor, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.factor, self.last = state["factor"], state["last"]


def plain_sgd(weight: Weight) -> bool:
    """Whether a weight's optimizer keeps nothing of its last update."""
    return weight.group.get("momentum") == 0


def kept(run: Run, weight: Weight) -> dict[str, Tensor]:
    """What the optimizer keeps of a weight, on a shard this rank's pieces; nothing before its first update."""
    assert run.optimizer is not None
    state = run.optimizer.state.get(weight.parameter, {})
    return {key: shards.local(value) for key, value in state.items() if isinstance(value, Tensor)}
