"""Child-Tuning: update only a child network, drawn at each step (F) or selected once by Fisher information (D).

F    g <- g * B / keep        B ~ Bernoulli(keep), every entry, every step; E[B / keep] = 1
D    g <- g * M               M = [F among the largest keep], F = mean of squared gradients at the start
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import inf
from typing import Annotated, ClassVar

from torch import Tensor

from ..core import Method, Run, Scope, Weight, Within, multiply, select
from ..core.facts import Cost, Paper
from ..core.tensors import byte_mask
from .bases.fisher import Fisher, Labels, Per
from .bases.static_mask import Batch, StaticMask, Tensors, top_masks

logger = logging.getLogger("steadytune")

PAPER = Paper(
    authors=(
        "Runxin Xu", "Fuli Luo", "Zhiyuan Zhang", "Chuanqi Tan", "Baobao Chang", "Songfang Huang", "Fei Huang",
    ),
    title="Raise a Child in Large Language Model: Towards Effective and Generalizable Fine-tuning",
    booktitle="Proceedings of the 2021 Conference on Empirical Methods in Natural Language Processing",
    venue="EMNLP",
    year=2021,
    arxiv="2109.05687",
)  # fmt: skip


@dataclass
class ChildTuningF(Method):
    """At each step, pass a random share of the gradient's entries to the optimizer, scaled to keep the mean.

    Args:
        keep: Share of entries that get their gradient; the authors' p_F, 0.2 to 0.4. It is rounded to a multiple of
            1/256, at least 1/256, because each entry costs one random byte.
        scope: Which weights are masked.

    Masked entries are not frozen: momentum and decay still move them. Adam's steps become smaller, because the second
    moment grows by 1 / keep and the first does not.

    Departures:
        One draw per optimizer step, the same on all ranks.
    """

    keep: Annotated[float, Within("(0, 1]")] = 0.3
    scope: Scope = "all"

    null: ClassVar = {"keep": 1.0}
    exclusive: ClassVar = "mask"
    acts_on_unread = "in scope"
    paper: ClassVar = PAPER

    @property
    def share(self) -> float:
        """``keep``, rounded to the multiple of 1/256 that is drawn."""
        return max(1, round(self.keep * 256)) / 256

    def setup(self, run: Run) -> None:
        run.require(self, self.scope)

    def before_step(self, run: Run, weights: Sequence[Weight]) -> None:
        if self.share < 1:
            weights = select(weights, self.scope)
            multiply(weights, [self.draw(run, w) for w in weights])
            multiply(weights, 1 / self.share)

    def draw(self, run: Run, weight: Weight) -> Tensor:
        """B: True for the entries of a weight (on a shard: of this rank's piece) that get their gradient."""
        full = run.model.get_parameter(weight.name)
        return run.local(weight.name, byte_mask(full.shape, self.share, run.rng(self, weight.name)))


@dataclass
class ChildTuningD(StaticMask):
    """Before training, rank weights by their Fisher information on the training rows; then update only the largest.

    Args:
        keep: Share of entries that stays trainable; the authors' p_D, 0.1 to 0.3.
        scope: Which weights are ranked and masked, all together. Others train as usual.
        per: Unit whose gradient is squared: the ``"batch"`` of an optimizer step, as in the authors' code, or each
            ``"example"``, as in the paper (one backward pass for each row).
        labels: ``"true"`` labels, as in paper and code (the empirical Fisher information), labels ``"sampled"`` from
            the model's prediction, or the ``"expected"`` square over all classes, the definition, which takes one
            backward pass a class and needs ``per="example"``. The last two need one class label per row.
        clip: Largest norm of a tensor's gradient before it is squared. inf disables clipping; the authors' code has 1.
        batches: Number of batches for the ranking; 0 is one pass over all rows, as in the authors' code.
        frozen: Whether masked entries stay bit for bit. By default only their gradient is zero, as in the authors'
            code; decay, and momentum from other methods, still move them.

    The ranking costs one epoch without updates. Dropout is as in training. The log says the sum of the information and
    its standard error over the squared gradients: where it is large, rank by more rows.

    Departures:
        No clipping by default. All processes rank by the mean over all of them. ``ceil(n * keep)`` entries are kept;
        the authors' interpolated percentile may keep one fewer. A resumed run keeps its masks; the authors' code ranks
        again with half-trained weights.
    """

    keep: Annotated[float, Within("(0, 1]")] = 0.3
    scope: Scope = "encoder"
    per: Per = "batch"
    labels: Labels = "true"
    clip: Annotated[float, Within("(0, inf]")] = inf
    batches: Annotated[int, Within("[0, inf)")] = 0
    frozen: bool = False

    null: ClassVar = {"keep": 1.0}
    cost: ClassVar = Cost(held={"": 1})
    paper: ClassVar = PAPER

    def setup(self, run: Run) -> None:
        super().setup(run)
        Fisher(self.per, self.labels, self.clip)  # checks that they fit each other
        if self.per == "example" and run.sharded:
            raise ValueError("per='example' needs whole weights on every rank; FSDP2 cuts them: use per='batch'")

    def choose(self, run: Run, weights: Sequence[Weight], batches: Iterable[Batch]) -> Tensors:
        return top_masks(run, self.fisher(run, weights, batches), self.keep, "global")

    def fisher(self, run: Run, weights: Sequence[Weight], batches: Iterable[Batch]) -> Tensors:
        """Fisher information by weight name, in float32 or float64."""
        scope = {w.name for w in select(weights, self.scope)}
        way = Fisher(self.per, self.labels, self.clip)
        information = way.estimate(run, islice(batches, self.batches or None), scope, self)
        logger.info("ChildTuningD, Fisher information: %s", information)
        return information.values
