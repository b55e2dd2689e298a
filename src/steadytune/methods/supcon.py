"""Supervised contrastive auxiliary loss: representations of one class attract, those of other classes repel each other.

With z the normalised input of the last layer, P(i) the other rows of the batch with the label of row i:

    SCL = mean over rows i of  mean over j in P(i) of  -log( exp(z_i z_j / temperature) / sum over k != i of the same )
    L = (1 - weight) * task + weight * SCL
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from ..core import Method, Run, Step, Within
from ..core.facts import Cost, Paper
from ..core.step import full
from ..errors import UsageError
from ..functional import supervised_contrastive
from ..heads.features import output_layer
from .bases.head_input import HeadInput
from .bases.rows import REPLACED, labels_of


@dataclass
class SupCon(Method):
    """Mix the task's loss with a contrastive loss of the labelled batch, on what the last layer reads.

    Args:
        weight: Share of the contrastive loss in the sum; 0.9 as in most of the paper's settings with few rows.
        temperature: Divisor of the cosines; the paper's grid is 0.1, 0.3, 0.5, 0.7.

    A row without another one of its class in the batch adds nothing. Pairs are of one micro-batch: accumulation and
    more processes give each row fewer partners, so use large batches. There is no further pass. Where a batch passes as
    several copies (`RDrop`), the copies of a row are pairs too.

    Departures:
        The representation is the input of the last layer, which is the token state of the paper if the head has one
        layer. The mean is over all rows of the batch; no code of the authors is known.

    Raises:
        ValueError: In setup, for a model without a last linear layer of its labels.
        UsageError: At the first step, for other labels than one class a row, for a head that reads each token
            (decoders), or under ``torch.compile``.
    """

    weight: Annotated[float, Within("[0, 1]")] = 0.9
    temperature: Annotated[float, Within("(0, inf)")] = 0.3

    null: ClassVar = {"weight": 0.0}
    hard_labels = True
    conflicts: ClassVar[tuple[str, ...]] = (
        "labels that are not one class a row",
        "decoders",
        "torch.compile",
        REPLACED,
    )
    acts_on_unread = "never"
    cost: ClassVar = Cost()
    paper: ClassVar = Paper(
        authors=("Beliz Gunel", "Jingfei Du", "Alexis Conneau", "Veselin Stoyanov"),
        title="Supervised Contrastive Learning for Pre-trained Language Model Fine-tuning",
        booktitle="International Conference on Learning Representations",
        venue="ICLR",
        year=2021,
        arxiv="2011.01403",
    )

    @property
    def loss_taken(self) -> float:
        return self.weight

    def setup(self, run: Run) -> None:
        self.read = HeadInput(output_layer(run.model))

    def before_batch(self, step: Step) -> None:
        if self.weight:
            self.read.listen()

    def penalty(self, step: Step) -> Tensor | None:
        if not self.weight:
            return None
        features, labels = self.read.pop(), labels_of(step.inputs, self)
        if features is None or features.dim() != 2 or labels.dim() != 1 or labels.is_floating_point():
            held = "nothing (is it compiled?)" if features is None else f"features {tuple(features.shape)}"
            raise UsageError(
                "SupCon needs one class a row and one vector a row that the last layer reads; got labels "
                f"{tuple(labels.shape)} of {labels.dtype} and {held}: leave SupCon out"
            )
        labels = labels.repeat(len(features) // len(labels))  # copies of the batch
        partners = labels.unsqueeze(0) == labels.unsqueeze(1)
        contrast = supervised_contrastive(full(features), partners, self.temperature).mean()
        return self.weight * (contrast - step.as_penalty(step.loss))
