"""Base of methods that mask gradients: thresholds, and masks made once before the first update."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ...core import Method, Run, Scope, Weight, multiply, overrides, shards
from ...core.step import Inputs
from ...core.tensors import zero_others

logger = logging.getLogger("steadytune")

Tensors = dict[str, Tensor]
# Optimizers that do not move an entry whose gradient and moments are 0, if they do not decay it: w - lr * 0 is w.
RESTING = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
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
        self.resting: dict[str, bool] = {}  # whether the optimizer leaves the other entries of a weight alone

    def before_forward(self, run: Run, weights: Sequence[Weight]) -> None:
        if self.masks or run.index:
            return
        with run.forked_rng():
            torch.manual_seed(run.draw_seed("data"))  # so that a shuffling loader does not change the order of training
            self.masks = self.choose(run, weights, run.data() if run.data is not None else ())
        still = [] if run.sharded else [name for name, mask in self.masks.items() if not mask.any()]
        if still:
            logger.warning(
                "%s: nothing of %s is ever trained (%d of %d weights), because its first gradients are 0, such as "
                "those of one half of an adapter. Give a scope without adapters, or leave %s out.",
                type(self).__name__, still[0], len(still), len(self.masks), type(self).__name__,
            )  # fmt: skip

    def pull_back(self, run: Run, weights: Sequence[Weight]) -> None:
        for w in self.masked(weights) if self.frozen else []:
            few = self.few(w)
            if few is None:
                run.freeze(w, self.masks[w.name], state=False)  # no step uses the moments of masked entries
            elif not self.rests(run, w, few):
                run.freeze(w, few, state=False)

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

    def rests(self, run: Run, weight: Weight, few: Tensor) -> bool:
        """Whether the optimizer leaves the masked entries of a weight as they are, so that nothing has to be put back.

        Their gradient is +0 in every step, and so are their moments. This needs an optimizer of `RESTING` that neither
        decays the weight nor turns the sign of zeros nor divides by 0, and no other method that may edit gradients or
        weights.

        Args:
            run: The run.
            weight: A masked weight.
            few: Flat indices of the entries that its mask keeps.
        """
        group, name = weight.group, weight.name
        alone = all(
            m is self or m.scales_only or not (overrides(m, "before_step") or overrides(m, "after_step"))
            for m in run.methods
        )
        plain = type(run.optimizer) in RESTING and not group["weight_decay"] and not group["maximize"]
        if not (alone and plain and group.get("eps", 1.0) > 0):
            self.resting[name] = False
        elif name not in self.resting:  # after a resume too, the moments themselves are looked at
            assert run.optimizer is not None
            moments = [shards.local(t) for t in run.optimizer.state[weight.parameter].values() if t.dim()]
            self.resting[name] = not any(_outside(moment, few).any() for moment in moments)
        return self.resting[name]

    def masked(self, weights: Sequence[Weight]) -> list[Weight]:
        """Weights with a mask."""
        return [w for w in weights if w.name in self.masks]

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.masks, self.indices, self.resting = state["masks"], {}, {}


def _outside(tensor: Tensor, few: Tensor) -> Tensor:
    """A copy of a tensor with zeros at the entries of these flat indices."""
    return tensor.flatten().index_fill(0, few, 0.0)


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
