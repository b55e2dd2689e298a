"""SIFT: train the few entries whose gradient is largest at the start, and nothing else.

M = [|g| among the largest keep of its tensor], g = gradient of the first batches at the pre-trained weights
W <- W + M * update
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, ClassVar

from ..core import Run, Scope, Weight, Within, select
from ..core.facts import Cost, Paper
from ..core.step import Inputs
from .bases.static_mask import Batch, StaticMask, Tensors, top_masks


@dataclass
class SIFT(StaticMask):
    """Train a fixed, sparse part of each weight, chosen by the first gradients; a new head is trained whole.

    Args:
        keep: share of entries of each tensor that is trained; the authors' 0.008. Up to 1/16, an index of 8
            bytes for each of them is held beside the mask. So few want a larger learning rate than all.
        batches: batches of an optimizer step whose mean gradient chooses.
        scope: which weights are trained sparsely. All others train as usual: freeze those that shall not.
        frozen: the other entries stay bit for bit, so that `steadytune.delta` stores the run in little space. Costs 4
            bytes per weight during a step. False leaves them to momentum and decay: the same without weight decay.

    Gradients and optimizer state are as large as in plain fine-tuning; what is small is the difference to the
    pre-trained model.

    Departures:
        Several batches choose, not one; the batch that chooses is no training step; an update acts at once, where the
        authors' code applies it in the next backward pass and loses the last; ``ceil(n * keep)`` entries where the
        authors keep ``int(n * keep) + 1``; their scripts train four matrices of each block and the head only.
    """

    keep: Annotated[float, Within("(0, 1]")] = 0.008
    batches: Annotated[int, Within("[1, inf)")] = 8
    scope: Scope = "all"
    frozen: bool = True

    null: ClassVar = {"keep": 1.0}
    cost: ClassVar = Cost(held={"": 1})
    paper: ClassVar = Paper(
        authors=("Weixi Song", "Zuchao Li", "Lefei Zhang", "Hai Zhao", "Bo Du"),
        title="Sparse is Enough in Fine-tuning Pre-trained Large Language Models",
        booktitle="International Conference on Machine Learning",
        venue="ICML",
        year=2024,
        arxiv="2312.11875",
    )

    def setup(self, run: Run) -> None:
        super().setup(run)
        if all(w.head for w in run.weights(self, self.scope)):
            raise ValueError(
                f"SIFT finds no weight in scope {self.scope!r} but the head's, which it trains whole: choose another "
                "scope, or leave SIFT out"
            )

    def choose(self, run: Run, weights: Sequence[Weight], batches: Iterable[Batch]) -> Tensors:
        first: list[Inputs] = []
        for batch in islice(batches, self.batches):
            first += [batch] if isinstance(batch, Mapping) else batch
        if not first:
            raise ValueError("SIFT found no batch to choose by: `data` is empty")
        gradient = run.gradient(first, dropout_seed=run.draw_seed("sift", rank=True))
        scope = {w.name for w in select(weights, self.scope) if not w.head}
        return top_masks(run, {n: g.abs() for n, g in gradient.items() if n in scope}, self.keep, "tensor")
