"""What methods that mask gradients share: thresholds, and masks made once, before the first update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core import Method, Run, Scope, Weight, multiply
from ...core.step import Inputs
from ...core.tensors import zero_others

Tensors = dict[str, Tensor]
FEW = 1 / 16  # share of kept entries up to which their indices are faster than a mask; at most 0.5 bytes a weight
Batch = Inputs | Sequence[Inputs]  # of an optimizer step: as one, or as its micro-batches


class StaticMask(Method):
    """Base of methods that choose entries by gradients at the pre-trained weights and keep that choice to the end.

    Masks are made before the first update and belong to the state: a resume takes them over and never looks at the
    data again. Subclasses have the fields ``scope`` and ``frozen`` and say in `choose` what is kept.
    """

    scope: Scope
    frozen: bool

    exclusive: ClassVar = "mask"

    def choose(self, run: Run, weights: Sequence[Weight], batches: Iterable[Batch]) -> Tensors:
        """Boolean masks by weight name; weights without one train as usual."""
        raise NotImplementedError

    def setup(self, run: Run) -> None:
        if run.data is None:
            name = type(self).__name__
            raise ValueError(f"{name} looks at training batches first: pass Run(..., data=lambda: loader)")
        run.require(self, self.scope)
        self.masks: Tensors = {}
        self.indices: dict[str, Tensor | None] = {}  # flat, of the entries that a mask keeps, if they are few

    def before_forward(self, run: Run, weights: Sequence[Weight]) -> None:
        if self.masks or run.index:
            return
        assert run.data is not None
        with run.forked_rng():
            torch.manual_seed(run.draw_seed("data"))  # a loader that shuffles leaves the order of training alone
            self.masks = self.choose(run, weights, run.data())

    def pull_back(self, run: Run, weights: Sequence[Weight]) -> None:
        for w in self.masked(weights) if self.frozen else []:
            few = self.few(w)
            mask = self.masks[w.name] if few is None else few
            run.freeze(w, mask, state=False)  # no step will ever use the moments of what is masked

    def before_step(self, run: Run, weights: Sequence[Weight]) -> None:
        others = []
        for w in self.masked(weights):
            few = self.few(w)
            if few is None:
                others.append(w)
            elif w.grad is not None:
                zero_others(w.grad, few)
        multiply(others, [self.masks[w.name] for w in others])

    def few(self, weight: Weight) -> Tensor | None:
        """Flat indices of the entries that the mask of a weight keeps; None if they are many."""
        if weight.name not in self.indices:
            mask, found = self.masks[weight.name], None
            dense = weight.data.is_contiguous() and (weight.grad is None or weight.grad.is_contiguous())
            if dense and mask.sum() <= FEW * mask.numel():
                found = mask.flatten().nonzero().squeeze(-1)
            self.indices[weight.name] = found
        return self.indices[weight.name]

    def masked(self, weights: Sequence[Weight]) -> list[Weight]:
        """The weights that have a mask."""
        return [w for w in weights if w.name in self.masks]

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.masks, self.indices = state["masks"], {}


def top_masks(run: Run, scores: Tensors, keep: float, threshold: str) -> Tensors:
    """Boolean masks of the largest scores; entries tied with the threshold are all kept.

    Args:
        run: Knows how weights are cut into pieces.
        scores: By weight name.
        keep: Share of entries, of each ``"tensor"`` or of all together (``"global"``).
        threshold: ``"tensor"`` or ``"global"``.
    """
    if threshold == "global" and scores:
        least = run.kth(list(scores.values()), keep)
        return {name: score >= least for name, score in scores.items()}
    return {name: score >= run.kth(score, keep) for name, score in scores.items()}
