"""Bi-Drop: update the weights on which the gradients of two dropout draws of one batch agree.

With g1, g2 the gradients under two dropout draws and mu their mean:

    stability  |mu| / sqrt((g1 - mu)^2 + (g2 - mu)^2) = |g1 + g2| / (sqrt(2) |g1 - g2|)
    scale      |mu| / |W|
    g <- mu * M       M = [score among the largest keep of its tensor]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from ..core import Method, Run, Scope, Weight, Within, gradients, multiply, select
from ..core.checks import check_dropout
from ..core.facts import Cost, Paper
from .bases.static_mask import top_masks

TINY = 1e-30  # in denominators, so that an entry with two zero gradients scores 0


@dataclass
class BiDrop(Method):
    """Take each gradient twice, under two dropout draws; use their mean where they agree.

    Args:
        keep: Share of entries of each tensor that is updated.
        score: Score that ranks the entries: ``"stability"`` over draws, ``"scale"`` relative to the weight, or their
            product ``"both"``.
        scope: Weights to mask. All others get the mean gradient.

    Penalties of other methods are in the first gradient only, so they count half. Masked entries are not frozen:
    momentum and decay still move them. ``keep = 1`` is the mean over two draws, not plain fine-tuning.

    Departures:
        Written from the abstract and from descriptions in other papers, because no code of the authors was found. Three
        things are our choice: the combination of the two factors, the unit over which entries are ranked, and the
        number of draws, two.

    Raises:
        ValueError: In setup, for a model without active dropout: both gradients would be equal.
    """

    keep: Annotated[float, Within("(0, 1]")] = 0.5
    score: Literal["stability", "scale", "both"] = "both"
    scope: Scope = "encoder"

    exclusive: ClassVar = "mask"
    conflicts: ClassVar[tuple[str, ...]] = ("models without active dropout",)
    acts_on_unread = "in scope"
    cost: ClassVar = Cost(passes=2.0)
    paper: ClassVar = Paper(
        authors=(
            "Shoujie Tong", "Heming Xia", "Damai Dai", "Runxin Xu", "Tianyu Liu", "Binghuai Lin", "Yunbo Cao",
            "Zhifang Sui",
        ),
        title="Bi-Drop: Enhancing Fine-tuning Generalization via Synchronous sub-net Estimation and Optimization",
        booktitle="Findings of the Association for Computational Linguistics: EMNLP 2023",
        venue="EMNLP Findings",
        year=2023,
        arxiv="2305.14760",
    )  # fmt: skip

    def setup(self, run: Run) -> None:
        run.require(self, self.scope)
        check_dropout(run.model, type(self).__name__)

    def before_step(self, run: Run, weights: Sequence[Weight]) -> None:
        again = run.gradient(run.batch, dropout_seed=run.draw_seed("bi-drop", rank=True))
        weights = [w for w in weights if w.name in again]
        chosen = select(weights, self.scope) if self.keep < 1 else []
        scores = {w.name: self.rank(w, again[w.name]) for w in chosen}
        torch._foreach_lerp_(gradients(weights), [again[w.name] for w in weights], 0.5)
        masks = top_masks(run, scores, self.keep, "tensor")
        multiply(chosen, [masks[w.name] for w in chosen])

    def rank(self, weight: Weight, second: Tensor) -> Tensor:
        """Score of each entry, up to constant factors."""
        assert weight.grad is not None
        total = (weight.grad + second).abs()
        stability = total / (weight.grad - second).abs().clamp(min=TINY)
        if self.score == "stability":
            return stability
        scale = total / weight.data.abs().clamp(min=TINY)
        return scale if self.score == "scale" else stability * scale
