"""DPS, Dynamic Parameter Selection: train the whole network, then a subnetwork with large gradients, in cycles.

Training is cut into cycles of two stages of ``us = max(1, int(total_steps * update_ratio))`` steps each:

    stage I    the full network learns; squares += g * g
    boundary   mask = [squares among the largest ceil(n * keep)]
    stage II   g <- g * mask

Mix also changes the forward. With A = pre-trained weight and B = a random draw of input columns in stage I,
A = the weight at the boundary and B = the mask in stage II:

    W_fwd = A + B * (W - A) / keep          dL/dW = B / keep * dL/dW_fwd
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core import Method, Run, Scope, Weight, Within, multiply, select
from ..core.facts import Cost, Paper
from ..functional import frequency_score, selecting, stage_length
from .bases.static_mask import Tensors, top_masks


@dataclass
class DPSDense(Method):
    """Train everything and add up squared gradients, then train only the entries with the largest sums.

    Args:
        keep: Share of entries that stays trainable in stage II; the authors' 1 - p with p = 0.3.
        update_ratio: Length of a stage as a share of all optimizer steps; 0.05 as in the paper.
        scope: Which weights are masked; ``"linear"`` includes pooler and head.
        threshold: Largest ``keep`` of each ``"tensor"`` (the authors), or of all weights in scope (``"global"``).
        frozen: Whether unselected entries and their optimizer state stay bit for bit in stage II. By default only their
            gradient is zero, as in the authors' code; momentum and decay still move them. Freezing costs up to 12 more
            bytes per weight during a step of AdamW.

    Departures:
        Optimizer steps are counted, not forward calls, so accumulation changes nothing. Sums are of synchronised,
        unscaled gradients. All entries tied with the threshold are kept, as in the authors' code. Their scripts also
        switch dropout off; we do not.
    """

    keep: Annotated[float, Within("(0, 1]")] = 0.7
    update_ratio: Annotated[float, Within("(0, 1]")] = 0.05
    scope: Scope = "linear"
    threshold: Literal["tensor", "global"] = "tensor"
    frozen: bool = False

    null: ClassVar = {"keep": 1.0}
    needs_steps = True
    exclusive: ClassVar = "mask"
    conflicts: ClassVar[tuple[str, ...]] = ("optimizers with packed or factored state, if frozen",)
    acts_on_unread = "in scope"
    cost: ClassVar = Cost(held={"stage I": 4, "stage II": 1})
    paper: ClassVar = Paper(
        authors=("Haojie Zhang", "Ge Li", "Jia Li", "Zhongjin Zhang", "Yuqi Zhu", "Zhi Jin"),
        title="Fine-Tuning Pre-Trained Language Models Effectively by Optimizing Subnetworks Adaptively",
        booktitle="Advances in Neural Information Processing Systems",
        venue="NeurIPS",
        year=2022,
        arxiv="2211.01642",
    )

    def setup(self, run: Run) -> None:
        self.squares: Tensors = {}
        self.masks: Tensors = {}
        run.require(self, self.scope)

    def stage(self, run: Run) -> int:
        """Number of steps of one stage."""
        return stage_length(run.steps(self), self.update_ratio)

    def before_forward(self, run: Run, weights: Sequence[Weight]) -> None:
        if run.index == 0 and self.stage(run) == 1:
            warnings.warn(
                f"{type(self).__name__}: stages of one step (total_steps={run.total_steps}, update_ratio="
                f"{self.update_ratio}) select on single gradients: train longer or raise update_ratio",
                stacklevel=2,
            )

    def pull_back(self, run: Run, weights: Sequence[Weight]) -> None:
        if self.frozen and selecting(run.index, self.stage(run)):
            for w in self.masked(weights):
                run.freeze(w, self.masks[w.name])

    def before_step(self, run: Run, weights: Sequence[Weight]) -> None:
        if selecting(run.index, self.stage(run)):
            weights = self.masked(weights)
            multiply(weights, [self.masks[w.name] for w in weights])
        else:
            add_squares(self.squares, select(weights, self.scope))

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        now, then = (selecting(i, self.stage(run)) for i in (run.index, run.index + 1))
        if then and not now:
            self.masks = top_masks(run, self.scores(run), self.keep, self.threshold)
            self.squares = {}
        elif now and not then:
            self.masks = {}

    def scores(self, run: Run) -> Tensors:
        """Scores that the selection ranks, by weight name."""
        return self.squares

    def masked(self, weights: Sequence[Weight]) -> list[Weight]:
        """Weights with a mask, that is, with a gradient in stage I."""
        return [w for w in weights if w.name in self.masks]

    def state_dict(self) -> dict[str, Any]:
        return {"squares": self.squares, "masks": self.masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.squares, self.masks = state["squares"], state["masks"]


@dataclass
class DPSMix(DPSDense):
    """DPS with Mixout's forward: some weights are replaced by an anchor, the others move away from it to keep the mean.

    The anchor of a new head is its initial value, as in the authors' code: with `HeadInit`, the probe, and with `R4F`,
    the normalised head, wherever they are in the list. The other options are those of `DPSDense`.

    Args:
        keep: Share of columns drawn in stage I and of entries selected in stage II; the authors' 1 - p.
        frequency_penalty: Whether to multiply scores by ``exp(-times drawn / us)``: ``"on"``, ``"off"``, or ``"auto"``
            for ``us >= 50`` only, as in the authors' code.
        rescale_gradient: Whether to use the exact chain rule ``dL/dW = B / keep * dL/dW_fwd``. False leaves out ``1 /
            keep``, as in the authors' code. The difference matters with SGD or clipping, and hardly with Adam.

    Departures:
        Those of `DPSDense`. In addition, there is one draw per optimizer step, also under accumulation, and evaluation
        and checkpoints use W, never the mixture.
    """

    frequency_penalty: Literal["auto", "on", "off"] = "auto"
    rescale_gradient: bool = True

    conflicts: ClassVar[tuple[str, ...]] = (*DPSDense.conflicts, "adapters, which have no pre-trained value")
    cost: ClassVar = Cost(held={"stage I": 8, "stage II": 9}, during=4)

    def setup(self, run: Run) -> None:
        super().setup(run)
        self.frequency: Tensors = {}  # number of draws of each column in this stage I
        self.anchors: Tensors = {}  # W at the boundary
        self.drawn: Tensors = {}  # draws of the current step
        run.require(self, self.scope, reference=True)
        for w in run.weights(self, self.scope):
            run.reference(w.name)

    def before_forward(self, run: Run, weights: Sequence[Weight]) -> None:
        super().before_forward(run, weights)
        stage = self.stage(run)
        if selecting(run.index, stage):
            weights = self.masked(weights)
            if run.index % stage == 0:
                self.anchors = {w.name: run.raw(w.name).clone() for w in weights}
            for w in weights:
                run.mix(w, self.anchors[w.name], self.masks[w.name], self.keep)
        else:
            for w in select(weights, self.scope):
                self.drawn[w.name] = self.columns(run, w)
                run.mix(w, run.reference(w.name), self.drawn[w.name], self.keep)

    def columns(self, run: Run, weight: Weight) -> Tensor:
        """B of stage I: 1 for the input columns that are shown as W."""
        return run.columns(self, weight, self.keep)

    def pull_back(self, run: Run, weights: Sequence[Weight]) -> None:
        super().pull_back(run, weights)
        keep = self.keep if self.rescale_gradient else 1.0
        if selecting(run.index, self.stage(run)):
            weights = self.masked(weights)
            multiply(weights, [self.masks[w.name] for w in weights])
            multiply(weights, 1 / keep)
        else:
            weights = select(weights, self.scope)
            drawn = [self.drawn[w.name] for w in weights]
            multiply(weights, drawn)
            add_squares(self.squares, weights)
            multiply(weights, 1 / keep)
            for w, columns in zip(weights, drawn, strict=True):
                seen = columns.to(torch.int32)
                self.frequency[w.name] = self.frequency[w.name] + seen if w.name in self.frequency else seen

    def before_step(self, run: Run, weights: Sequence[Weight]) -> None:
        """Do nothing: `pull_back` has applied the mask."""

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        super().after_step(run, weights)
        self.drawn = {}
        if selecting(run.index + 1, self.stage(run)):
            self.frequency = {}
        else:
            self.anchors = {}

    def scores(self, run: Run) -> Tensors:
        stage = self.stage(run)
        penalty = stage >= 50 if self.frequency_penalty == "auto" else self.frequency_penalty == "on"
        return {
            name: frequency_score(squares, self.frequency[name], stage, penalty=penalty)
            for name, squares in self.squares.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "frequency": self.frequency, "anchors": self.anchors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.frequency, self.anchors = state["frequency"], state["anchors"]


def add_squares(squares: Tensors, weights: Sequence[Weight]) -> None:
    """``squares += g * g`` in place, in float32 or float64."""
    wide = {w.name: g.to(torch.promote_types(g.dtype, torch.float32)) for w in weights if (g := w.grad) is not None}
    old = [name for name in wide if name in squares]
    squares.update({name: g.square() for name, g in wide.items() if name not in squares})
    if old:
        again = [wide[name] for name in old]
        torch._foreach_addcmul_([squares[name] for name in old], again, again)
