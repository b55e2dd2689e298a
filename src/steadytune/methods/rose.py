"""ROSE: update only robust weights, those that a perturbation changes least.

With a risk s of every weight (of a tensor its norm) and M = [s among the smallest keep]:

    First      s = |dR/dW|,  R = KL divergence between two dropout draws of the batch
    Second     s = |m' / m - 1|,  the relative change of the momentum, m' = beta m + (1 - beta) g
    Ensemble   M = (1 - gamma) M_Second + gamma M_First

    g <- M g + (1 - M) m          W <- W + M * update          M = 0: weight and momentum stay
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from ..core import Method, Run, Scope, Weight, Within, select
from ..core.checks import check_dropout
from ..core.facts import Cost, Paper
from ..core.shards import local
from ..core.step import Inputs, batch_size, distances, logits_of, split
from ..functional import symmetric_kl
from .bases.groups import take_decay
from .bases.static_mask import Tensors, top_masks

PAPER = Paper(
    authors=("Lan Jiang", "Hao Zhou", "Yankai Lin", "Peng Li", "Jie Zhou", "Rui Jiang"),
    title="ROSE: Robust Selective Fine-tuning for Pre-trained Language Models",
    booktitle="Proceedings of the 2022 Conference on Empirical Methods in Natural Language Processing",
    venue="EMNLP",
    year=2022,
    arxiv="2210.09658",
)
TINY = 1e-30  # in denominators, so that 0 / 0 is no risk


class ROSE(Method):
    """Base of the three methods: it turns risks into masks, and applies a mask to a step."""

    keep: float
    granularity: str
    scope: Scope
    update: str

    soft: ClassVar[bool] = False  # whether masks have values between 0 and 1
    exclusive: ClassVar = "mask"

    def mask(self, run: Run, weights: Sequence[Weight]) -> Tensors:
        """M by weight name: of one element, or of the weight's shape; weights without one train as usual."""
        raise NotImplementedError

    def ignores_unread(self, table: Weight) -> bool:
        taken_over = self.update == "authors" and bool(table.group["weight_decay"])
        return not self.acts_on(table) and not taken_over

    def setup(self, run: Run) -> None:
        run.require(self, self.scope)
        self.decay: dict[str, float] = {}  # weight decay, taken over from the optimizer
        self.masks: Tensors = {}  # masks of the current step
        self.before: Tensors = {}  # weights before the current step

    def attach(self, run: Run) -> None:
        if self.update == "authors":
            self.decay = take_decay(run)

    def before_step(self, run: Run, weights: Sequence[Weight]) -> None:
        self.masks, self.before = {}, {}
        if self.keep == 1:
            return
        # biases are left out: softmax ignores those of keys, whose gradient is round-off and would rank by chance
        weights = [w for w in select(weights, self.scope) if not w.name.endswith("bias")]
        kept = self.mask(run, weights)
        for w in weights:
            if w.name not in kept:
                continue
            assert w.grad is not None
            mask = self.masks[w.name] = kept[w.name].to(w.data.dtype)
            if self.soft or self.update == "authors":
                self.before[w.name] = w.data.clone()
                w.grad.copy_(torch.lerp(momentum(run, w), w.grad, mask))
            else:
                w.grad.mul_(mask)
            if self.update == "frozen":
                run.freeze(w, mask > 0)

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        for w in weights:
            if w.name in self.before:
                w.data.copy_(torch.lerp(self.before[w.name], w.data, self.masks[w.name]))
        for w in weights if self.where is None else run.weights():  # decay was taken over for all weights
            if self.decay.get(w.name) and w.grad is not None:
                w.data.mul_(1 - w.group["lr"] * self.decay[w.name] * self.masks.get(w.name, 1.0))
        self.masks, self.before = {}, {}

    def smallest(self, run: Run, risks: Tensors) -> Tensors:
        """Masks of the entries, or of the tensors (risks of one element), with the smallest risks."""
        if self.granularity == "element":
            return top_masks(run, {name: -risk for name, risk in risks.items()}, self.keep, "tensor")
        if not risks:
            return {}
        together = torch.stack(list(risks.values()))
        chosen = together <= torch.quantile(together, self.keep)
        return dict(zip(risks, chosen.unbind(), strict=True))

    def sizes(self, run: Run, tensors: Tensors) -> Tensors:
        """Absolute values, or norms of tensors."""
        if self.granularity == "element":
            return {name: t.abs() for name, t in tensors.items()}
        norms = run.norms([t.to(torch.promote_types(t.dtype, torch.float32)) for t in tensors.values()])
        return dict(zip(tensors, norms, strict=True))

    def first(self, run: Run, weights: Sequence[Weight]) -> Tensors:
        """M from the gradient of the divergence between two dropout draws."""
        grads = run.gradient(
            run.batch, lambda batch: divergence(run, batch, self), dropout_seed=run.draw_seed("rose", rank=True)
        )
        return self.smallest(run, self.sizes(run, {w.name: grads[w.name] for w in weights if w.name in grads}))

    def second(self, run: Run, weights: Sequence[Weight], score: str) -> Tensors:
        """M from the relative change of the momentum; no masks before the first step."""
        weights = [w for w in weights if w.grad is not None and has_momentum(run, w)]
        before = {w.name: momentum(run, w) for w in weights}
        sizes = self.sizes(run, before)
        if score == "authors":
            steps = self.sizes(run, {w.name: w.grad for w in weights if w.grad is not None})
            return self.smallest(run, {n: (0.1 * steps[n] / sizes[n].clamp(min=TINY) - 1).abs() for n in sizes})
        changes = self.sizes(run, {w.name: w.grad - before[w.name] for w in weights if w.grad is not None})
        share = {w.name: 1 - w.group["betas"][0] for w in weights}
        return self.smallest(run, {n: share[n] * changes[n] / sizes[n].clamp(min=TINY) for n in sizes})


@dataclass
class ROSEFirst(ROSE):
    """In each step, freeze the weights to which the divergence between two dropout draws is most sensitive.

    The loss is the mean over two dropout draws of each batch; a second pass computes the risks.

    Args:
        keep: Share of tensors (or entries) that are updated; the authors' upper quantile, 0.5 to 0.8.
        granularity: ``"tensor"`` masks whole tensors by the norm of their risks, as in the authors' code; ``"element"``
            masks the entries of each tensor with the largest risks, as in the paper's text.
        scope: Weights to mask; biases are never masked.
        update: ``"frozen"`` keeps weight and optimizer state of masked entries bit for bit. ``"authors"`` updates the
            second moment by the squared first one, and decays after the update, as in their optimizer.

    Departures:
        The extra gradient is correct under accumulation; in the authors' code it is not. The second moment is frozen
        too. The lower end of the authors' window, which is 0 in all their scripts, and their warm-up without masks are
        left out.

    Raises:
        ValueError: In setup, if the model has no active dropout, because all risks would be zero.
    """

    keep: Annotated[float, Within("(0, 1]")] = 0.7
    granularity: Literal["tensor", "element"] = "tensor"
    scope: Scope = "encoder"
    update: Literal["frozen", "authors"] = "frozen"

    copies: ClassVar = 2
    conflicts: ClassVar[tuple[str, ...]] = (
        "models without active dropout",
        "optimizers with packed or factored state",
    )
    cost: ClassVar = Cost(passes=4.0)
    paper: ClassVar = PAPER

    def setup(self, run: Run) -> None:
        super().setup(run)
        check_dropout(run.model, type(self).__name__)

    def mask(self, run: Run, weights: Sequence[Weight]) -> Tensors:
        return self.first(run, weights)


@dataclass
class ROSESecond(ROSE):
    """In each step, freeze the weights whose momentum the new gradient would change most.

    Args:
        keep: As in `ROSEFirst`; the authors' 0.3 to 0.6.
        granularity: As in `ROSEFirst`.
        scope: Which weights are masked.
        update: As in `ROSEFirst`.
        score: ``"change"`` is the relative change of the momentum. ``"authors"`` is abs(0.1 norm(g) / norm(m) - 1), as
            in their code; it ignores directions, and with noisy gradients it keeps the weights that change most.

    Departures:
        Those of `ROSEFirst`, and the score.

    Raises:
        ValueError: In attach, for an optimizer without Adam's first moment.
    """

    keep: Annotated[float, Within("(0, 1]")] = 0.6
    granularity: Literal["tensor", "element"] = "tensor"
    scope: Scope = "encoder"
    update: Literal["frozen", "authors"] = "frozen"
    score: Literal["change", "authors"] = "change"

    null: ClassVar = {"keep": 1.0, "update": "frozen"}
    conflicts: ClassVar[tuple[str, ...]] = ("optimizers without Adam's moments",)
    paper: ClassVar = PAPER

    def attach(self, run: Run) -> None:
        check_betas(run, type(self).__name__)
        super().attach(run)

    def mask(self, run: Run, weights: Sequence[Weight]) -> Tensors:
        return self.second(run, weights, self.score)


@dataclass
class ROSEEnsemble(ROSE):
    """Mix the masks of `ROSEFirst` and `ROSESecond`: weights that only one of them freezes take a part of the step.

    Args:
        keep: As in `ROSEFirst`; the authors' 0.3 to 0.9.
        gamma: Weight of the first mask; the authors' 0.5.
        granularity: As in `ROSEFirst`.
        scope: Which weights are masked.
        update: As in `ROSEFirst`.
        score: As in `ROSESecond`.

    Departures:
        Those of `ROSEFirst` and `ROSESecond`.

    Raises:
        ValueError: In setup without active dropout; in attach without Adam's first moment.
    """

    keep: Annotated[float, Within("(0, 1]")] = 0.7
    gamma: Annotated[float, Within("[0, 1]")] = 0.5
    granularity: Literal["tensor", "element"] = "tensor"
    scope: Scope = "encoder"
    update: Literal["frozen", "authors"] = "frozen"
    score: Literal["change", "authors"] = "change"

    soft: ClassVar = True
    copies: ClassVar = 2
    conflicts: ClassVar[tuple[str, ...]] = ("models without active dropout", "optimizers without Adam's moments")
    cost: ClassVar = Cost(passes=4.0)
    paper: ClassVar = PAPER

    def setup(self, run: Run) -> None:
        super().setup(run)
        check_dropout(run.model, type(self).__name__)

    def attach(self, run: Run) -> None:
        check_betas(run, type(self).__name__)
        super().attach(run)

    def mask(self, run: Run, weights: Sequence[Weight]) -> Tensors:
        first, second = self.first(run, weights), self.second(run, weights, self.score)
        masks = {}
        for w in weights:
            if w.name in first:
                one = first[w.name].to(w.data.dtype)
                two = second[w.name].to(w.data.dtype) if w.name in second else torch.ones_like(one)
                masks[w.name] = (1 - self.gamma) * two + self.gamma * one
        return masks


def divergence(run: Run, batch: Inputs, method: Method) -> Tensor:
    """Symmetric KL divergence between two dropout draws of a batch, summed over rows, or over labelled tokens.

    It is a sum because only the order of its gradients matters, and a mean would depend on the micro-batches.
    """
    parts = split(run.task(batch, copies=2)[1], 2, batch_size(batch))
    one, other = (logits_of(part, batch, method) for part in parts)
    values, mask = distances(run.wrapper, batch, one, other, symmetric_kl)
    return values.sum() if mask is None else (values * mask).sum()


def has_momentum(run: Run, weight: Weight) -> bool:
    """Whether the optimizer has taken a step for a weight."""
    assert run.optimizer is not None
    return bool(run.optimizer.state.get(weight.parameter))


def momentum(run: Run, weight: Weight) -> Tensor:
    """Adam's first moment of a weight (on a shard: of this rank's piece); zeros before its first step, and for SGD.

    Raises:
        ValueError: The optimizer stores it in another form.
    """
    assert run.optimizer is not None
    held = run.optimizer.state.get(weight.parameter, {})
    if "betas" in weight.group and held and "exp_avg" not in held:
        raise ValueError(
            f"{type(run.optimizer).__name__} keeps {sorted(held)} for {weight.name!r} and no plain first moment, which "
            "ROSE compares gradients with: use torch.optim.AdamW"
        )
    return local(held["exp_avg"]) if "exp_avg" in held else torch.zeros_like(weight.data)


def check_betas(run: Run, name: str) -> None:
    """Raise unless the optimizer keeps Adam's first moment."""
    if any("betas" not in w.group for w in run.weights()):
        raise ValueError(
            f"{name} compares gradients with Adam's first moment, which {type(run.optimizer).__name__} does not keep: "
            "use AdamW, or ROSEFirst"
        )
