"""L2-SP: decay toward the pre-trained weights instead of toward zero.

penalty  alpha / 2 * ||W - W0||^2        coupled: g <- g + alpha * (W - W0)
decoupled: W <- W - lr * alpha * (W - W0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from ..core import Method, Run, Scope, Weight, Within, select
from ..core.facts import Cost, Paper
from .bases.groups import take_decay


@dataclass
class L2SP(Method):
    """Pull weights toward their pre-trained values; a new head keeps ordinary decay.

    Args:
        alpha: Strength; 0.01 to 0.1 decoupled (times the learning rate), as a weight decay.
        scope: Which weights are pulled; those without a pre-trained value are left out.
        decoupled: Whether the pull is separate from the optimizer's moments, like AdamW's decay. False adds the
            gradient of the penalty, as in the paper.
        replace_decay: Whether to switch off the optimizer's own decay toward zero for pulled weights. This method then
            applies it to all others, decoupled or coupled like the pull.

    Entries that a mask freezes in a step are not pulled in it, nor decayed. A weight that was frozen when the training
    began has no anchor: if it is unfrozen on the way, it keeps ordinary decay.

    Departures:
        Decoupled by default, because the reference optimizer is AdamW; the paper adds the gradient of the penalty.
    """

    alpha: Annotated[float, Within("[0, inf)")] = 0.01
    scope: Scope = "all"
    decoupled: bool = True
    replace_decay: bool = True

    null: ClassVar = {"alpha": 0.0, "replace_decay": False}
    exclusive: ClassVar = "anchor"
    conflicts: ClassVar[tuple[str, ...]] = ("adapters, which have no pre-trained value",)
    cost: ClassVar = Cost(held={"": 4})
    paper: ClassVar = Paper(
        authors=("Xuhong Li", "Yves Grandvalet", "Franck Davoine"),
        title="Explicit Inductive Bias for Transfer Learning with Convolutional Networks",
        booktitle="International Conference on Machine Learning",
        venue="ICML",
        year=2018,
        arxiv="1802.01483",
    )

    def ignores_unread(self, table: Weight) -> bool:
        # a pulled row is at its anchor, and stays there where no decay moves it; a row that is not pulled must keep the
        # optimizer's decay
        return not table.group["weight_decay"] or self.replace_decay == self.acts_on(table)

    def setup(self, run: Run) -> None:
        self.pulled = {w.name for w in run.require(self, self.scope, reference=True)}
        self.decay: dict[str, float] = {}  # weight decay, taken over from the optimizer

    def attach(self, run: Run) -> None:
        if self.replace_decay:
            self.decay = {name: held for name, held in take_decay(run).items() if name not in self.pulled}

    def before_step(self, run: Run, weights: Sequence[Weight]) -> None:
        for w in select(weights, self.scope) if self.alpha else []:
            if w.name in self.pulled:
                self.pull(run, w, self.alpha, run.reference(w.name))
        for w in weights if self.where is None else run.weights():  # decay was taken over for all weights
            if self.decay.get(w.name) and w.grad is not None:
                self.pull(run, w, self.decay[w.name])

    def pull(self, run: Run, weight: Weight, rate: float, anchor: Tensor | None = None) -> None:
        """Pull a weight toward its anchor, or toward zero."""
        if self.decoupled:
            run.pull(weight, weight.group["lr"] * rate, anchor)
        else:
            assert weight.grad is not None
            weight.grad.add_(weight.data if anchor is None else weight.data - anchor, alpha=rate)
