"""L2-SP: decay toward the pre-trained weights instead of toward zero.

Li, Grandvalet, Davoine: Explicit Inductive Bias for Transfer Learning with Convolutional Networks.
ICML 2018, arXiv 1802.01483.

    penalty  alpha / 2 * ||W - W0||^2        coupled: g <- g + alpha * (W - W0)
                                             decoupled: W <- W - lr * alpha * (W - W0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core import Method, Run, Scope, Weight, not_negative, select


@dataclass
class L2SP(Method):
    """Pull weights toward their pre-trained values; a new head keeps ordinary decay.

    Args:
        alpha: strength, at least 0; 0.01 to 0.1 decoupled (times the learning rate), as a weight decay.
        scope: which weights, see `steadytune.core.SCOPES`; those without a pre-trained value are left out.
        decoupled: before the optimizer's update and apart from its moments, as AdamW decays. False adds the gradient
            of the penalty, as the paper does.
        replace_decay: the optimizer's own decay toward zero is switched off for weights that are pulled, and
            applied by this method to all others (as decoupled or coupled as the pull).

    Difference from the paper: decoupled by default, as the reference optimizer is AdamW.
    """

    alpha: float = 0.01
    scope: Scope = "all"
    decoupled: bool = True
    replace_decay: bool = True

    null: ClassVar = {"alpha": 0.0, "replace_decay": False}
    exclusive: ClassVar = "anchor"

    def __post_init__(self) -> None:
        not_negative("alpha", self.alpha)

    def setup(self, run: Run) -> None:
        self.pulled = {w.name for w in run.require(self, self.scope, reference=True)}
        self.decay: dict[str, float] = {}  # what the optimizer would have decayed

    def attach(self, run: Run) -> None:
        if self.replace_decay:
            weights = run.weights()
            self.decay = {w.name: w.group["weight_decay"] for w in weights if w.name not in self.pulled}
            for w in weights:
                w.group["weight_decay"] = 0.0

    def before_step(self, run: Run, weights: Sequence[Weight]) -> None:
        if self.alpha:
            anchored = [w for w in select(weights, self.scope) if w.name in self.pulled]
            self.pull(anchored, [run.reference(w.name) for w in anchored], [self.alpha] * len(anchored))
        others = [w for w in weights if self.decay.get(w.name)]
        self.pull(others, None, [self.decay[w.name] for w in others])

    def pull(self, weights: Sequence[Weight], anchors: Sequence[torch.Tensor] | None, rates: Sequence[float]) -> None:
        """Toward the anchors, or toward zero."""
        for i, (w, rate) in enumerate(zip(weights, rates, strict=True)):
            if not self.decoupled:
                w.grad.add_(w.data if anchors is None else w.data - anchors[i], alpha=rate)
            elif anchors is None:
                w.data.mul_(1 - w.group["lr"] * rate)
            else:
                w.data.lerp_(anchors[i], w.group["lr"] * rate)
