"""Mixout: dropout toward the pre-trained weights instead of toward zero.

With B ~ Bernoulli(keep) over input columns and W0 the pre-trained weight:

    W_fwd = W0 + B * (W - W0) / keep          dL/dW = B / keep * dL/dW_fwd          E[W_fwd] = W
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from ..core import Method, Run, Scope, Weight, Within, multiply, select
from ..core.facts import Cost, Paper


@dataclass
class Mixout(Method):
    """Replace random input columns of each weight by their pre-trained values in the forward, drawn once per step.

    Args:
        keep: Share of columns that are not replaced; the paper's 1 - p. The paper uses p = 0.7 to 0.9 with three
            epochs. For longer training p = 0.1 is usual, hence the default of 0.9.
        scope: Which weights are mixed. A new head has no pre-trained value and is left alone.
        rescale_gradient: Whether to use the exact chain rule. False leaves out ``1 / keep``, as in the authors' code.

    Departures:
        There is one draw per optimizer step, so that accumulation and activation checkpointing use one network; the
        authors' code draws in each forward. No module is replaced. Dropout stays as in the model; the paper switches it
        off in the layers with Mixout.
    """

    keep: Annotated[float, Within("[0, 1]")] = 0.9
    scope: Scope = "linear"
    rescale_gradient: bool = True

    null: ClassVar = {"keep": 1.0}
    conflicts: ClassVar[tuple[str, ...]] = ("adapters, which have no pre-trained value",)
    acts_on_unread = "in scope"
    cost: ClassVar = Cost(held={"": 4}, during=4)
    paper: ClassVar = Paper(
        authors=("Cheolhyoung Lee", "Kyunghyun Cho", "Wanmo Kang"),
        title="Mixout: Effective Regularization to Finetune Large-scale Pretrained Language Models",
        booktitle="International Conference on Learning Representations",
        venue="ICLR",
        year=2020,
        arxiv="1909.11299",
    )

    def setup(self, run: Run) -> None:
        self.drawn: dict[str, Tensor] = {}  # draws of the current step
        run.require(self, self.scope, reference=True)

    def before_forward(self, run: Run, weights: Sequence[Weight]) -> None:
        self.drawn = {}
        for w in select(weights, self.scope):
            if not run.is_new(w):
                self.drawn[w.name] = self.columns(run, w)
                run.mix(w, run.reference(w.name), self.drawn[w.name], self.keep)

    def columns(self, run: Run, weight: Weight) -> Tensor:
        """B: 1 for the input columns that keep W."""
        return run.columns(self, weight, self.keep)

    def pull_back(self, run: Run, weights: Sequence[Weight]) -> None:
        keep = self.keep if self.rescale_gradient and self.keep else 1.0
        weights = [w for w in weights if w.name in self.drawn]
        factors = [(self.drawn[w.name] / keep).to(w.data.dtype) for w in weights]
        multiply(weights, factors)
