"""SIFT: train the few entries whose gradient is largest at the start, and nothing else.

M = [|g| among the largest keep of its tensor], g = gradient of the first batches at the pre-trained weights
W <- W + M * update                                    of the optimizer, without weight decay
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Annotated, ClassVar

from ..core import Run, Scope, Weight, Within, select
from ..core.facts import Cost, Paper
from ..core.step import Inputs
from .bases.groups import undecayed
from .bases.static_mask import Batch, StaticMask, Tensors, top_masks


@dataclass
class SIFT(StaticMask):
    """Train a fixed, sparse part of each weight, chosen by the first gradients; a new head is trained whole.

    Args:
        keep: Share of the entries of each tensor that is trained; 0.008 in the authors' scripts. So few entries want a
            larger learning rate than full fine-tuning. Up to a share of 1/16, the method holds an index of 8 bytes for
            each trained entry beside the mask.
        batches: Number of batches whose mean gradient chooses the entries, each as large as an optimizer step's.
        scope: Weights that are trained sparsely. All others train as usual: freeze those that are not to be trained.
        frozen: Whether the other entries stay bit for bit, so that `steadytune.files.delta` stores the run in little
            space. Where something moves entries without a gradient (weight decay, a method that edits gradients, an
            optimizer other than Adam, AdamW and SGD), this costs 4 bytes per weight during a step. With False,
            momentum may move them, and so may weight decay if ``decay`` is on.
        decay: Whether the optimizer's weight decay acts on the weights of ``scope``. The authors' code decays a vector
            of increments, which is 0 before each step, so that their sparse weights never decay. False sets the decay
            of these weights to 0 in the optimizer, whose groups are split for it. List SIFT before methods that take
            over the decay of the optimizer (`L2SP`, `RecAdam`).

    The gradient and the optimizer's state are as large as in full fine-tuning. What is small is the difference between
    the trained and the pre-trained model. Checkpoints written before ``decay`` existed hold runs whose trained entries
    decay: they resume with ``decay=True``, and with the default there is an error that says so.

    Departures:
        Several batches choose the entries, where the authors take one. The batch that chooses is no training step. An
        update acts at once; the authors' code applies it in the next backward pass and loses the last one. ``ceil(n *
        keep)`` entries are trained, ``int(n * keep) + 1`` there. Below a ``keep`` of 1, entries whose gradient is 0 are
        never chosen, so that fewer are trained where batches hold few tokens of a large vocabulary. The authors'
        scripts train four matrices of each block and the head, and freeze the rest.
    """

    keep: Annotated[float, Within("(0, 1]")] = 0.008
    batches: Annotated[int, Within("[1, inf)")] = 8
    scope: Scope = "all"
    frozen: bool = True
    decay: bool = False

    null: ClassVar = {"keep": 1.0, "decay": True}
    implied: ClassVar = {"decay": True}
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

    def attach(self, run: Run) -> None:
        assert run.optimizer is not None
        if not self.decay:
            still = {id(w.parameter): 0.0 for w in run.weights(self, self.scope) if not w.head}
            groups = run.optimizer.param_groups
            groups[:] = [part for group in groups for part in undecayed(group, still)]

    def choose(self, run: Run, weights: Sequence[Weight], batches: Iterable[Batch]) -> Tensors:
        first: list[Inputs] = []
        for batch in islice(batches, self.batches):
            first += [batch] if isinstance(batch, Mapping) else batch
        if not first:
            raise ValueError("SIFT found no batch to choose by: `data` is empty")
        gradient = run.gradient(first, dropout_seed=run.draw_seed("sift", rank=True))
        scope = {w.name for w in select(weights, self.scope) if not w.head}
        scores = {n: g.abs() for n, g in gradient.items() if n in scope}
        masks = top_masks(run, scores, self.keep, "tensor")
        if self.keep == 1.0:
            return masks
        return {n: mask & (scores[n] > 0) for n, mask in masks.items()}  # where 0 is the threshold, all would tie
