"""LLRD, layer-wise learning-rate decay: lower layers have smaller learning rates.

With L blocks, l = 0 at the input:

    head, pooler     lr
    block l          lr * decay^(L - l)
    embeddings       lr * decay^(L + 1)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..core import Method, Run, Within
from ..core.anatomy import blocks, depths
from ..core.facts import Paper
from .bases.groups import split


@dataclass
class LLRD(Method):
    """Give each block the learning rate of the block above times a factor; the head keeps the optimizer's own.

    Args:
        decay: Factor from each block to the next one below.

    The optimizer's groups are split, and a scheduler built after `Run.attach` scales the rate of each. A scheduler with
    rates of its own (OneCycleLR, CyclicLR) needs a list of them: ``[group["lr"] for group in optimizer.param_groups]``.
    The blocks of a decoder count as above those of its encoder. Blocks that share weights (ALBERT) count as one. Pooler
    and last norm train like the head; token and position tables count as below the first block.

    Departures:
        The paper divides the rate by 2.6 from layer to layer of a recurrent network; 0.95 is the value of Zhang et al.
        (ICLR 2021, 2006.05987) for BERT. Their code does not decay the head's weights; here the optimizer's weight
        decay stays.

    Raises:
        ValueError: In setup, if the model has no blocks.
    """

    decay: Annotated[float, Within("(0, 1]")] = 0.95

    null: ClassVar = {"decay": 1.0}
    acts_on_unread = "never"
    paper: ClassVar = Paper(
        authors=("Jeremy Howard", "Sebastian Ruder"),
        title="Universal Language Model Fine-tuning for Text Classification",
        booktitle="Proceedings of the Annual Meeting of the Association for Computational Linguistics",
        venue="ACL",
        year=2018,
        arxiv="1801.06146",
    )

    def setup(self, run: Run) -> None:
        if not blocks(run.model):
            raise ValueError(f"LLRD needs transformer blocks, {type(run.model).__name__} has none: leave it out")

    def attach(self, run: Run) -> None:
        assert run.optimizer is not None
        top = len(blocks(run.model))
        factors = {
            id(run.model.get_parameter(name)): self.decay ** (top - depth) for name, depth in depths(run.model).items()
        }
        groups = run.optimizer.param_groups
        groups[:] = [part for group in groups for part in split(group, "lr", factors)]
