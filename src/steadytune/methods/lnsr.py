"""LNSR: penalise the growth of noise from one block to the blocks above it.

With h_r the output of block r and b the block that is disturbed:

    L = task + weight * mean over examples and tokens of  sum over r > b of  ||h_r(h_b + z) - h_r(h_b)||^2 / width
    z = scale * ||h_b|| / sqrt(width) * N(0, I)           in-manifold: z = scale * (h_b of another example - h_b)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..core import Method, Run, Step, Within
from ..core.anatomy import blocks
from ..core.checks import check_hidden_states, check_layout, check_lengths
from ..core.facts import Cost, Paper
from ..core.step import full
from ..errors import UsageError


@dataclass
class LNSR(Method):
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

    hidden_states: ClassVar = True
    null: ClassVar = {"weight": 0.0}
    conflicts: ClassVar[tuple[str, ...]] = ("encoder-decoders", "PEFT's prompt tuning")
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

    def setup(self, run: Run) -> None:
        name, all_blocks = type(run.model).__name__, blocks(run.model)
        check_layout(run.model, "LNSR")
        check_lengths(run.model, "LNSR")
        check_hidden_states(run.model, "LNSR")
        if getattr(getattr(run.model, "config", None), "is_encoder_decoder", False):
            raise ValueError(f"LNSR needs one stack of blocks, {name} has an encoder and a decoder: use R3F or SMART")
        self.disturbed = len(all_blocks) // 4 if self.block is None else self.block
        if not 0 <= self.disturbed < len(all_blocks) - 1:
            raise ValueError(
                f"block must leave a block above it: {name} has {len(all_blocks)} blocks, counted from 0, "
                f"got {self.disturbed}"
            )
        if len(all_blocks[self.disturbed]) > 1:
            raise ValueError(
                f"LNSR needs blocks that are modules, those of {name} are cut into lists: use R3F or SMART"
            )

    def penalty(self, step: Step) -> Tensor | None:
        if not self.weight:
            return None
        at = self.disturbed + 1  # the first of the hidden states is the embedding's output
        clean = self.hidden(step, step.outputs)[at:]
        (module,) = blocks(step.run.model)[self.disturbed]
        noise = step.unpadded(self.draw(step, clean[0].detach()))
        outputs = step.forward(dropout="same", add={module: noise}, output_hidden_states=True)
        pairs = zip(self.hidden(step, outputs)[at + 1 :], clean[1:], strict=True)
        moved = torch.stack([full(a - b).square().mean(-1) for a, b in pairs]).sum(0)
        return self.weight * step.mean(step.per_example(moved))

    def hidden(self, step: Step, outputs: Any) -> list[Tensor]:
        """Hidden states (batch, length, width) of all blocks, without what the model pads to (Longformer's windows)."""
        states = outputs.get("hidden_states") if isinstance(outputs, Mapping) else None
        batch, length = step.shape
        if states and all(h.dim() == 3 and h.size(0) == batch and h.size(1) >= length for h in states):
            return [h[:, :length] for h in states]
        held = "none of that name" if states is None else f"shapes {', '.join(str(tuple(h.shape)) for h in states)}"
        raise UsageError(
            f"LNSR compares 'hidden_states' of shape (batch, length, width) token by token, here ({batch}, {length}, "
            f"width), and {type(step.run.model).__name__} gives {held}: use R3F or SMART"
        )

    def draw(self, step: Step, hidden: Tensor) -> Tensor:
        """z, like the output of the block (batch, length, width)."""
        if not self.in_manifold:
            length = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
            return self.scale * length * step.draw(self, hidden.size(-1)) / hidden.size(-1) ** 0.5
        toward = self.scale * (hidden.roll(1, 0) - hidden)
        return toward if step.real is None else toward * step.real.roll(1, 0).unsqueeze(-1)
