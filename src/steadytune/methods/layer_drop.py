"""LayerDrop: in training, each example skips each block with a fixed probability.

h <- h with probability p, else block(h)        for each example and block; all blocks act in evaluation
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core import Method, Run, Weight, Within
from ..core.anatomy import blocks
from ..core.checks import check_layout
from ..core.facts import Paper

PLACE = "layer_drop"  # name in the model of the module that holds the hooks


class Skip(nn.Module):
    """Forward hook of the blocks; it has no weights. It is part of the model so that a copy of the model skips too."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.handles: list[RemovableHandle] = []

    def listen(self, layers: Sequence[nn.Module]) -> None:
        """Act on these blocks, once."""
        if not self.handles:
            self.handles = [
                layer.register_forward_hook(self.skip, with_kwargs=True, prepend=True)  # before who keeps its output
                for layer in layers
            ]

    def remove(self) -> None:
        """Act on no block."""
        for handle in self.handles:
            handle.remove()
        self.handles = []

    def skip(self, block: nn.Module, args: tuple[Any, ...], inputs: dict[str, Any], output: Any) -> Any:
        """The output of a block, with its input in place of it for some examples."""
        if not block.training:
            return None
        given = args[0] if args else inputs["hidden_states"]
        hidden, *rest = output if isinstance(output, tuple | list) else (output,)
        kept = self.draw(given).view(-1, *[1] * (given.dim() - 1)) >= self.p
        passed = torch.where(kept, hidden, given)
        return type(output)((passed, *rest)) if isinstance(output, tuple | list) else passed

    def draw(self, hidden: Tensor) -> Tensor:
        """A uniform number for each example, drawn from torch's random state like dropout."""
        return torch.rand(len(hidden), device=hidden.device)


@dataclass
class LayerDrop(Method):
    """Let each example skip each block with a fixed probability in training, as dropout of whole blocks.

    Args:
        p: Probability of skipping a block; the authors' 0.2 in pre-training.

    The draws are those of torch, like dropout's: penalties and further passes treat them as they treat dropout. All
    passes of the model in training mode are affected, and no evaluation. Every block is computed, so that no time is
    saved and processes need no ``find_unused_parameters``.

    Departures:
        The authors draw once for a whole batch and do not compute a dropped block, from pre-training on, so that a
        model can be cut to fewer blocks afterwards. Each example has a draw of its own here, as in Stochastic Depth
        (Huang et al., ECCV 2016, arXiv 1603.09382), whose rescaling in evaluation is left out as in LayerDrop.

    Raises:
        ValueError: In setup, for a model without blocks or with blocks that are cut into lists (XLM), or XLNet.
    """

    p: Annotated[float, Within("[0, 1)")] = 0.1

    null: ClassVar = {"p": 0.0}
    exclusive: ClassVar = "depth"
    acts_on_unread = "never"
    paper: ClassVar = Paper(
        authors=("Angela Fan", "Edouard Grave", "Armand Joulin"),
        title="Reducing Transformer Depth on Demand with Structured Dropout",
        booktitle="International Conference on Learning Representations",
        venue="ICLR",
        year=2020,
        arxiv="1909.11556",
    )

    def setup(self, run: Run) -> None:
        check_layout(run.model, "LayerDrop")
        all_blocks = blocks(run.model)
        if not all_blocks or any(len(block) > 1 for block in all_blocks):
            raise ValueError(
                f"LayerDrop needs blocks that are modules, those of {type(run.model).__name__} cannot be told or are "
                "cut into lists: leave LayerDrop out"
            )
        self.layers = [block for (block,) in all_blocks]
        self.hook = Skip(self.p)
        run.model.add_module(PLACE, self.hook)

    def before_forward(self, run: Run, weights: Sequence[Weight]) -> None:
        if self.p:
            self.hook.listen(self.layers)

    def release(self, run: Run) -> None:
        self.hook.remove()
