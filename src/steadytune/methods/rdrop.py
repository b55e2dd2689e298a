"""R-Drop: the same input under two dropout draws must give the same prediction.

Liang, Wu, Li, Wang, Meng, Qin, Chen, Zhang, Liu: R-Drop: Regularized Dropout for Neural Networks.
NeurIPS 2021, arXiv 2106.14448.

    L = (task_1 + task_2) / 2 + alpha * mean over examples of (KL(p1 || p2) + KL(p2 || p1)) / 2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .. import shards
from ..checks import check_dropout
from ..core import Method, Run, Step, not_negative
from ..facts import Cost, Paper
from ..functional import symmetric_kl


@dataclass
class RDrop(Method):
    """Pass each batch as two copies through one forward and add their symmetric KL divergence to the mean loss.

    Args:
        alpha in [0, inf): weight of the divergence; the paper's grid for language understanding is 0.1, 0.5, 1.

    Regression (one output) uses the mean squared difference instead. Token-level outputs average over the tokens
    that have a label. ``alpha = 0`` is not plain fine-tuning: the loss is the mean over two dropout draws.

    Departures:
        The divergence is averaged over the batch as the cross entropy is (the authors' code sums it, so that their
        alpha is the batch size times ours), and the two losses are averaged, not added.

    Raises:
        ValueError: in setup, for a model without active dropout: the divergence would be exactly zero.
    """

    alpha: float = 1.0

    copies: ClassVar = 2
    conflicts: ClassVar[tuple[str, ...]] = ("models without active dropout",)
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

    def __post_init__(self) -> None:
        not_negative("alpha", self.alpha)

    def setup(self, run: Run) -> None:
        check_dropout(run.model, type(self).__name__)

    def penalty(self, step: Step) -> Tensor:
        first, second = step.outputs["logits"], step.second()["logits"]
        labels = step.inputs.get("labels")
        if first.size(-1) == 1:
            distance, mask = (first - second).square().squeeze(-1), None
        elif first.dim() == 2 or labels is None or labels.dim() < 2 or labels.is_floating_point():
            distance, mask = symmetric_kl(first, second), None
        else:
            first, second, labels = aligned(step.model, first, second, labels)
            distance, mask = symmetric_kl(first, second), labels != -100
        return self.alpha * step.mean(distance, mask)


def aligned(model: Any, first: Tensor, second: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token logits and the labels they are scored against: causal models predict the next token."""
    if shifts_labels(shards.unwrap(model)):
        return first[:, :-1], second[:, :-1], labels[:, 1:]
    return first, second, labels


def shifts_labels(model: Any) -> bool:
    """Whether a transformers model scores the logits of a token against the label of the next one."""
    if hasattr(model, "peft_config"):
        model = model.base_model.model
    kind, name = getattr(model, "loss_type", None), type(model).__name__
    if kind is None:  # GPT2LMHeadModel and its like; XLNet, XLM and FlauBERT have labels where they are predicted
        return name.endswith("LMHeadModel") and not name.startswith("XLNet") and "With" not in name
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return kind == "ForCausalLM" or (kind.endswith("ForConditionalGeneration") and not decodes)
