"""HeadInit: start with the best head on frozen features instead of a random one.

phi(x)  input of the last linear layer, model in evaluation mode
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
    """Initialise the head as a linear probe on frozen features (the first half of LP-FT).

    Args:
        how: Probe for classes. Numbers use ridge regression, several labels per row one logistic regression for each
            label.
        scale: Factor on the probe's weights. A large head slows the change of features (arXiv 2405.16747).

    The probe is fitted in setup, on one pass over the training data. A `Run` needs them as ``data``; the Trainer passes
    its own. The penalty is chosen by cross-validation. Runs on the same data start with the same head, whatever their
    seeds, so their soup is valid. The head counts as new: anchors leave it out.

    Departures:
        The authors choose the penalty by accuracy; we choose it by log-loss, because the size of the head matters in
        the training that follows. For further differences see `steadytune.heads.probe`.

    Raises:
        ValueError: In setup, if the logits are not those of a last linear layer, if there is no data, if batches have
            no labels, or if the weights are sharded.
    """

    how: How = "logistic"
    scale: Annotated[float, Within("[0, inf)")] = 1.0

    conflicts: ClassVar[tuple[str, ...]] = ("weights that are sharded before the run is made",)
    acts_on_unread = "never"
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
            torch.manual_seed(run.draw_seed("data"))  # so that a shuffling loader does not change the order of training
            probe = probe_of_batches(run.model, run.data(), how=self.how)
        set_head(run.model, probe, self.scale)
        self.strength = probe.strength

    def state_dict(self) -> dict[str, Any]:
        return {"strength": self.strength}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.strength = state["strength"]
