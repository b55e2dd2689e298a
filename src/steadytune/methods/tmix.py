"""TMix: train also on mixtures of the hidden states of two examples, with the mixture of their losses.

With h the output of block b, i and j two examples of the batch, and share = max(s, 1 - s), s ~ Beta(alpha, alpha):

    h_ij = share * h_i + (1 - share) * h_j
    L = task + weight * mean over examples of  share * loss(f(h_ij), y_i) + (1 - share) * loss(f(h_ij), y_j)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from torch import Tensor

from ..core import Step, Within
from ..core.facts import Cost, Paper
from ..core.step import problem_type
from .bases.at_block import AtBlock
from .bases.rows import labels_of, row_losses


@dataclass
class TMix(AtBlock):
    """Mix the hidden states of neighbours in the batch at one block, and train on the mixture of their losses too.

    Args:
        weight: Weight of the loss of the mixtures.
        alpha: Both parameters of the Beta distribution of the shares; large ones mix half and half.
        block: Block whose output is mixed, counted from 0 at the input; by default three quarters of the way up, but
            never the last.

    Positions are mixed where both examples have a token. The second pass has the dropout draw of the first, so that it
    mixes the very states of the first. The loss of a row is cross entropy, squared error or, for several labels, the
    mean binary cross entropy; class weights and label smoothing act on the first pass alone. Partners are rows of one
    micro-batch, so that accumulation and the number of processes change who meets whom.

    Departures:
        The authors replace the task's loss, draw one of three blocks (7, 9 and 12 of 12) at each step, and mix labelled
        rows with rows that a model has labelled; the clean loss stays here. Manifold Mixup (Verma et al., ICML 2019,
        arXiv 1806.05236) draws among all blocks and the input.

    Raises:
        ValueError: In setup, for a model whose blocks cannot be told, an encoder-decoder, XLNet, PEFT's prompt tuning,
            a model that cannot be asked for its hidden states, or no block above. At the first step, for labels of
            tokens.
        UsageError: At the first step, for hidden states that do not have one entry for each token.
    """

    weight: Annotated[float, Within("[0, inf)")] = 1.0
    alpha: Annotated[float, Within("(0, inf)")] = 0.4
    block: Annotated[int, Within("[0, inf)")] | None = None

    null: ClassVar = {"weight": 0.0}
    acts_on_unread = "never"
    conflicts: ClassVar[tuple[str, ...]] = (*AtBlock.conflicts, "labels of tokens")
    cost: ClassVar = Cost(passes=2.0)
    paper: ClassVar = Paper(
        authors=("Jiaao Chen", "Zichao Yang", "Diyi Yang"),
        title="MixText: Linguistically-Informed Interpolation of Hidden Space for Semi-Supervised Text Classification",
        booktitle="Proceedings of the Annual Meeting of the Association for Computational Linguistics",
        venue="ACL",
        year=2020,
        arxiv="2004.12239",
    )

    def default(self, count: int) -> int:
        return min(3 * count // 4, count - 2)

    def penalty(self, step: Step) -> Tensor | None:
        if not self.weight:
            return None
        share = self.share(step)
        way = self.toward_next(step, self.hidden(step, step.outputs)[0])  # graph alive: both examples learn
        logits = step.logits(step.forward(dropout="same", add={self.module(step): (1 - share) * way}), self)
        labels, problem = labels_of(step.inputs, self), problem_type(step.run.model)
        own, other = (row_losses(logits, y, problem) for y in (labels, labels.roll(1, 0)))
        return self.weight * step.mean(share * own + (1 - share) * other)

    def share(self, step: Step) -> float:
        """Share of the first example in the mixtures of a micro-batch, at least a half."""
        seed = step.run.rng(self, "share", per_rank=True).initial_seed()
        drawn = float(np.random.default_rng(seed).beta(self.alpha, self.alpha))
        return max(drawn, 1 - drawn)
