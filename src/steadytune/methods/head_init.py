"""HeadInit: begin with the best head on frozen features instead of a random one.

phi(x)  what enters the last linear layer, model in evaluation mode
W, b <- argmin  C * sum_i -log softmax(W phi(x_i) + b)[y_i] + |W|^2 / 2          before the first step
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from ..core import Method, Run, Within
from ..core.facts import Paper
from ..heads.start import How, probe_of_batches, set_head


@dataclass
class HeadInit(Method):
    """Let the head begin as a linear probe on frozen features (the first half of LP-FT).

    Args:
        how: Probe for classes. Numbers take ridge, several labels logistic regressions.
        scale: Factor on the probe's weights. A large head slows the change of features (arXiv 2405.16747).

    The probe is fitted in setup, on one pass over the training data, which `Run` must be given as ``data``; the Trainer
    gives it. The penalty is chosen by cross-validation. Two runs on the same data begin with the same head, whatever
    their seeds, so that a soup of them is legal. The head counts as new: anchors leave it out.

    Departures:
        The authors train the probe for its accuracy, and choose the penalty by it; we choose it by log-loss, since
        the size of the head matters to the training that follows. `steadytune.heads.probe` says what else differs.

    Raises:
        ValueError: In setup, for a model whose logits are not those of a last linear layer, no data, batches without
            labels, or weights that are sharded already.
    """

    how: How = "logistic"
    scale: Annotated[float, Within("[0, inf)")] = 1.0

    conflicts: ClassVar[tuple[str, ...]] = ("weights that are sharded before the run is made",)
    paper: ClassVar = Paper(
        authors=("Ananya Kumar", "Aditi Raghunathan", "Robbie Jones", "Tengyu Ma", "Percy Liang"),
        title="Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution",
        booktitle="International Conference on Learning Representations",
        venue="ICLR",
        year=2022,
        arxiv="2202.10054",
    )

    def setup(self, run: Run) -> None:
        if run.sharded:
            raise ValueError(
                "HeadInit writes the whole head, but the weights are sharded: make the Run before sharding"
            )
        if run.data is None:
            raise ValueError("HeadInit fits its probe on the training data: pass Run(..., data=lambda: loader)")
        with run.forked_rng():
            torch.manual_seed(run.draw_seed("data"))  # a loader that shuffles leaves the order of training alone
            probe = probe_of_batches(run.model, run.data(), how=self.how)
        set_head(run.model, probe, self.scale)
        self.strength = probe.strength

    def state_dict(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.strength = state["strength"]
