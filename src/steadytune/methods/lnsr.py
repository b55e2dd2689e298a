"""LNSR: penalise the growth of noise from one block to the blocks above it.

With h_r the output of block r and b the block that is disturbed:

    L = task + weight * mean over examples and tokens of  sum over r > b of  ||h_r(h_b + z) - h_r(h_b)||^2 / width
    z = scale * ||h_b|| / sqrt(width) * N(0, I)           in-manifold: z = scale * (h_b of another example - h_b)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..core import Step, Within
from ..core.facts import Cost, Paper
from ..core.step import full
from .bases.at_block import AtBlock


@dataclass
class LNSR(AtBlock):
    """Add noise to the output of one block and penalise how far the outputs of the blocks above move.

    Args:
        weight: Weight of the squared movement, the same for all blocks above.
        scale: Length of a token's noise as a share of the length of its vector; in-manifold, as a share of the distance
            to another example's.
        block: Block that gets the noise, counted from 0 at the input; by default a quarter of the way up.
        in_manifold: Whether the noise points toward the same position of the next example in the batch, if both have a
            token there.

    Both passes have the same dropout draw. Padding gets no noise and does not count. The last block's output is taken
    as the model gives it (decoders: after the last normalisation).

    Departures:
        One weight for all blocks; the paper has one for each. The squared movement is a mean over features. The second
        pass starts at the input, not at the block.

    Raises:
        ValueError: In setup, for a model whose blocks cannot be told, an encoder-decoder, XLNet, PEFT's prompt tuning,
            a model that cannot be asked for its hidden states, or no block above.
        UsageError: At the first step, for hidden states that do not have one entry for each token.
    """

    weight: Annotated[float, Within("[0, inf)")] = 1.0
    scale: Annotated[float, Within("[0, inf)")] = 0.05
    block: Annotated[int, Within("[0, inf)")] | None = None
    in_manifold: bool = False

    null: ClassVar = {"weight": 0.0}
    acts_on_unread = "never"
    cost: ClassVar = Cost(passes=2.0)
    paper: ClassVar = Paper(
        authors=("Hang Hua", "Xingjian Li", "Dejing Dou", "Chengzhong Xu", "Jiebo Luo"),
        title="Noise Stability Regularization for Improving BERT Fine-tuning",
        booktitle="Proceedings of the Conference of the North American Chapter of the Association for Computational "
        "Linguistics: Human Language Technologies",
        venue="NAACL",
        year=2021,
        arxiv="2107.04835",
    )

    def default(self, count: int) -> int:
        return count // 4

    def penalty(self, step: Step) -> Tensor | None:
        if not self.weight:
            return None
        clean = self.hidden(step, step.outputs)
        noise = step.unpadded(self.draw(step, clean[0].detach()))
        outputs = step.forward(dropout="same", add={self.module(step): noise}, output_hidden_states=True)
        pairs = zip(self.hidden(step, outputs)[1:], clean[1:], strict=True)
        moved = torch.stack([full(a - b).square().mean(-1) for a, b in pairs]).sum(0)
        return self.weight * step.mean(step.per_example(moved))

    def draw(self, step: Step, hidden: Tensor) -> Tensor:
        """z, like the output of the block (batch, length, width)."""
        if not self.in_manifold:
            length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
            return self.scale * length * step.draw(self, hidden.size(-1)) / hidden.size(-1) ** 0.5
        return self.scale * self.toward_next(step, hidden)
