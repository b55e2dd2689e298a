"""Base of methods that mask gradients: thresholds, and masks made once before the first update."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core import Method, Run, Scope, Weight, multiply
from ...core.step import Inputs
from ...core.tensors import zero_others

Tensors = dict[str, Tensor]
FEW = 1 / 16  # up to this share of kept entries, indices are faster than a mask; at most 0.5 bytes per weight
Batch = Inputs | Sequence[Inputs]  # rows of an optimizer step, as one batch or as micro-batches


class StaticMask(Method):
    """Base of methods that select entries once, by gradients at the pre-trained weights.

    Masks are made before the first update and are part of the state, so a resumed run does not need the data again.
    Subclasses have the fields ``scope`` and ``frozen``, and select entries in `choose`.
    """

    scope: Scope
    frozen: bool

    exclusive: ClassVar = "mask"
    acts_on_unread = "in scope"

    def choose(self, run: Run, weights: Sequence[Weight], batches: Iterable[Batch]) -> Tensors:
        """Boolean masks by weight name; weights without one train as usual."""
        raise NotImplementedError

    def setup(self, run: Run) -> None:
        if run.data is None:
            name = type(self).__name__
            raise ValueError(f"{name} looks at training batches first: pass Run(..., data=lambda: loader)")
        run.require(self, self.scope)
        self.masks: Tensors = {}
        self.indices: dict[str, Tensor | None] = {}  # flat indices of the entries that a mask keeps, if they are few

    def before_forward(self, run: Run, weights: Sequence[Weight]) -> None:
        if self.masks or run.index:
            return
        assert run.data is not None
        with run.forked_rng():
            torch.manual_seed(run.draw_seed("data"))  # so that a shuffling loader does not change the order of training
            self.masks = self.choose(run, weights, run.data())

    def pull_back(self, run: Run, weights: Sequence[Weight]) -> None:
        for w in self.masked(weights) if self.frozen else []:
            few = self.few(w)
            mask = self.masks[w.name] if few is None else few
            run.freeze(w, mask, state=False)  # no step uses the moments of masked entries

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
            mask, positions = self.masks[weight.name], None
            dense = weight.data.is_contiguous() and (weight.grad is None or weight.grad.is_contiguous())
            if dense and mask.sum() <= FEW * mask.numel():
                positions = mask.flatten().nonzero().squeeze(-1)
            self.indices[weight.name] = positions
        return self.indices[weight.name]

    def masked(self, weights: Sequence[Weight]) -> list[Weight]:
        """Weights with a mask."""
        return [w for w in weights if w.name in self.masks]

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.masks, self.indices = state["masks"], {}


def top_masks(run: Run, scores: Tensors, keep: float, threshold: str) -> Tensors:
    """Boolean masks of the largest scores; all entries tied with the threshold are kept.

    Args:
        run: The run, which computes thresholds over shards.
        scores: Scores by weight name.
        keep: Share of entries to keep.
        threshold: ``"tensor"`` for a share of each tensor, ``"global"`` for a share of all entries.
    """
    if threshold == "global" and scores:
        least = run.kth(list(scores.values()), keep)
        return {name: score >= least for name, score in scores.items()}
    return {name: score >= run.kth(score, keep) for name, score in scores.items()}
