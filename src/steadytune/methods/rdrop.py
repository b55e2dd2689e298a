"""R-Drop: penalise the difference between predictions for the same input under two dropout draws.

L = (task_1 + task_2) / 2 + alpha * mean over examples of (KL(p1 || p2) + KL(p2 || p1)) / 2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from torch import Tensor

from ..core import Method, Run, Step, Within
from ..core.checks import check_dropout
from ..core.facts import Cost, Paper


@dataclass
class RDrop(Method):
    """Pass two copies of each batch through one forward; add their symmetric KL divergence to the mean loss.

    Args:
        alpha: Weight of the divergence; the paper's grid for language understanding is 0.1, 0.5, 1.

    Regression uses the mean squared difference instead. Token-level outputs average over the tokens that have a label,
    question answering over the start and the end of the answer, and several labels a row over the labels, each with its
    two outcomes. ``alpha = 0`` is not plain fine-tuning: the loss is the mean over two dropout draws.

    Departures:
        The divergence is averaged over the batch as the cross entropy is (the authors' code sums it, so that their
        alpha is the batch size times ours), and the two losses are averaged, not added.

    Raises:
        ValueError: In setup, for a model without active dropout: the divergence would be exactly zero.
    """

    alpha: Annotated[float, Within("[0, inf)")] = 1.0

    copies: ClassVar = 2
    conflicts: ClassVar[tuple[str, ...]] = ("models without active dropout",)
    acts_on_unread = "never"
    cost: ClassVar = Cost(passes=2.0)
    paper: ClassVar = Paper(
        authors=(
            "Xiaobo Liang", "Lijun Wu", "Juntao Li", "Yue Wang", "Qi Meng", "Tao Qin", "Wei Chen", "Min Zhang",
            "Tie-Yan Liu",
        ),
        title="R-Drop: Regularized Dropout for Neural Networks",
        booktitle="Advances in Neural Information Processing Systems",
        venue="NeurIPS",
        year=2021,
        arxiv="2106.14448",
    )  # fmt: skip

    def setup(self, run: Run) -> None:
        check_dropout(run.model, type(self).__name__)

    def penalty(self, step: Step) -> Tensor:
        first, second = (step.logits(outputs, self) for outputs in (step.outputs, step.second()))
        return self.alpha * step.disagreement(first, second)
