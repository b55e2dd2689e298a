"""SMART: predictions must not change under a small adversarial perturbation of the embeddings, nor leap between steps.

With x the embeddings, D(p, q) = KL(p || q) + KL(q || p) (regression: squared difference) and d ~ N(0, noise^2):

    R_s      weight * mean over examples of  max over ||d||_inf <= epsilon of  D(f(x + d), f(x))
    ascent   g = dD/dd;   d <- clip(d + step_size * g / max|g|, -epsilon, epsilon)        max over a token
    D_Breg   proximal.weight * mean over examples of D(f(x), f~(x)),   f~ with the weights W~
    teacher  W~ <- decay * W~ + (1 - decay) * W        after every step; W~ starts as W

Other divergences D(p, q) of the predictions p of perturbed embeddings and q of clean ones:

    kl       KL(q || p)
    js       KL(m || p) + KL(m || q),   m = (p + q) / 2, a constant
    l2       mean over classes of the squared difference of the logits
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core import Method, Run, Step, Weight, Within, check_fields
from ..core.facts import Cost, Paper
from ..core.step import perturbed, width
from ..functional import jeffreys, jeffreys_to_constants, kl, mean_square, odds_gap, to_midpoint

Divergence = Callable[[Tensor, Tensor], Tensor]  # of perturbed and clean logits (..., classes) -> (...)
DIVERGENCES: dict[str, Divergence] = {
    "symmetric_kl": jeffreys,
    "kl": lambda noisy, clean: kl(clean, noisy),
    "js": to_midpoint,
    "l2": mean_square,
    "log_odds": odds_gap,
}


@dataclass(frozen=True)
class BregmanProximal:
    """The Bregman proximal point of SMART: stay near the predictions of an average of the earlier weights.

    Args:
        weight: Weight of the divergence from the teacher; the paper's mu.
        decay: Share of the old teacher that stays in a step; the paper's beta. With 0 the teacher is the weights of the
            step before, with 1 the weights before training.
    """

    weight: Annotated[float, Within("[0, inf)")] = 1.0
    decay: Annotated[float, Within("[0, 1]")] = 0.99

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass
class SMART(Method):
    """Add the divergence under the worst small perturbation of the embeddings, found by gradient ascent.

    Args:
        epsilon: Radius of the ball, in the largest entry of a token's perturbation. Entries of BERT's token embeddings
            are about 0.05.
        step_size: Length of a step of the ascent, in the largest entry of a token's step.
        steps: Number of steps of the ascent; 0 leaves the random start.
        weight: Weight of the divergence; the paper's lambda_s, from 1, 3, 5.
        projection: Whether the perturbation is projected onto the ball. False is the published code: the perturbation
            is divided by its own largest entry (plus epsilon, 1e-6 there), so that it ends near 1 however small epsilon
            is.
        proximal: The Bregman proximal term, as ``BregmanProximal(weight, decay)``; it costs one forward without
            gradient and a copy of the weights.
        noise: Standard deviation of the random start.
        dropout: Dropout of the perturbed forwards: the draw of the task's own forward, or a fresh one.
        divergence: What is penalised, see above; for the proximal term too. Regression always takes the squared
            difference.
        ascent: What the ascent raises. None is ``divergence``; with ``projection=False`` and the symmetric KL it is
            ``"log_odds"``, the difference of log-odds that mt-dnn ascends.

    Padding is never perturbed. The ascent runs without gradients of weights and leaves every ``.grad`` alone. Token
    losses compare the tokens that have a label.

    Departures:
        The perturbation is projected, as the paper says; the authors' code never does. epsilon is 1e-3, not the paper's
        1e-5, where the divergence, which grows with its square, is below 1e-8 and trains nothing. The token embedding
        is perturbed, inside the model; the authors' code feeds the output of the whole embedding block through that
        block again. Perturbed forwards take the dropout draw of the clean one, so that only the perturbation is
        measured. The gradient is that of the divergence; the published code holds the target of each KL of the
        symmetric one constant (as ``projection=False`` does). The proximal term is in no published code.

        Every divergence is a mean over examples, and the ascent raises their sum. mt-dnn (Kl, SymKl, Js) has the same
        means. smart-pytorch sums its symmetric KL and JS over the batch, so that its weight times the batch size is
        ours; its ascent by ``"kl"`` raises the mean, so that its step size, without projection, is ours times the batch
        size. Not offered are mt-dnn's Hl (Hellinger), which has no gradient there, and its NsKl and NsSymKl as
        penalties: they are differences of log-odds that may be negative.

    Raises:
        ValueError: In setup, for a model without a token embedding.
        RuntimeError: At the first step, for weights in pieces (FSDP2).
    """

    epsilon: Annotated[float, Within("[0, inf)")] = 1e-3
    step_size: Annotated[float, Within("[0, inf)")] = 1e-3
    steps: Annotated[int, Within("[0, inf)")] = 1
    weight: Annotated[float, Within("[0, inf)")] = 1.0
    projection: bool = True
    proximal: BregmanProximal | None = None
    noise: Annotated[float, Within("[0, inf)")] = 1e-5
    dropout: Literal["same", "fresh"] = "same"
    divergence: Literal["symmetric_kl", "kl", "js", "l2"] = "symmetric_kl"
    ascent: Literal["symmetric_kl", "kl", "js", "l2", "log_odds"] | None = None

    null: ClassVar = {"weight": 0.0, "proximal": None}
    implied: ClassVar = {"divergence": "symmetric_kl", "ascent": None}
    conflicts: ClassVar[tuple[str, ...]] = ("sharded weights (FSDP2)",)
    acts_on_unread = "never"
    cost: ClassVar = Cost(passes=8 / 3)
    paper: ClassVar = Paper(
        authors=("Haoming Jiang", "Pengcheng He", "Weizhu Chen", "Xiaodong Liu", "Jianfeng Gao", "Tuo Zhao"),
        title="SMART: Robust and Efficient Fine-Tuning for Pre-trained Natural Language Models through Principled "
        "Regularized Optimization",
        booktitle="Proceedings of the Annual Meeting of the Association for Computational Linguistics",
        venue="ACL",
        year=2020,
        arxiv="1911.03437",
    )

    def setup(self, run: Run) -> None:
        self.embedding = perturbed(run.model)
        self.teacher: dict[str, Tensor] = {}

    def penalty(self, step: Step) -> Tensor | None:
        clean, terms = step.logits(step.outputs, self), []
        if self.weight:
            noise = self.ascend(step, clean.detach())
            noisy = step.forward(dropout=self.dropout, add={self.embedding: noise})
            divergence = self.measure(self.divergence)
            terms.append(self.weight * step.disagreement(step.logits(noisy, self), clean, divergence))
        if self.proximal is not None:
            divergence = DIVERGENCES[self.divergence]
            terms.append(self.proximal.weight * step.disagreement(clean, self.teach(step), divergence))
        return torch.stack(terms).sum() if terms else None

    def measure(self, name: str) -> Divergence:
        """The divergence of this name; the symmetric KL of the published code has constant targets."""
        return jeffreys_to_constants if name == "symmetric_kl" and not self.projection else DIVERGENCES[name]

    # ------------------------------------------------------------------ the perturbation

    def ascend(self, step: Step, clean: Tensor) -> Tensor:
        """The perturbation (batch, length, width) after all steps of ascent."""
        published = self.divergence == "symmetric_kl" and not self.projection
        divergence = self.measure(self.ascent or ("log_odds" if published else self.divergence))
        noise = self.start(step)
        for _ in range(self.steps):
            gradient = step.gradient(
                self.embedding, noise, lambda out: self.total(step, out, clean, divergence), dropout=self.dropout
            )
            noise = step.unpadded(self.move(noise, gradient))
        return noise

    def start(self, step: Step) -> Tensor:
        """The perturbation before the first step of ascent."""
        noise = self.noise * step.draw(self, width(self.embedding))
        return noise.clamp(-self.epsilon, self.epsilon) if self.projection else noise

    def total(self, step: Step, outputs: Any, clean: Tensor, divergence: Divergence) -> Tensor:
        """What the ascent raises: a sum over examples, each of which only its own perturbation moves."""
        values, mask = step.distances(step.logits(outputs, self), clean, divergence)
        return values.sum() if mask is None else (values * mask).sum()

    def move(self, noise: Tensor, gradient: Tensor) -> Tensor:
        """One step of ascent."""
        if not self.projection:
            moved = noise + self.step_size * gradient
            return moved / (largest(moved) + self.epsilon).clamp(min=torch.finfo(moved.dtype).tiny)
        direction = gradient / largest(gradient).clamp(min=torch.finfo(gradient.dtype).tiny)
        return (noise + self.step_size * direction).clamp(-self.epsilon, self.epsilon)

    # ------------------------------------------------------------------ the proximal point

    def teach(self, step: Step) -> Tensor:
        """Logits of the teacher on this batch."""
        run = step.run
        if run.sharded:
            raise RuntimeError(
                "SMART's proximal term needs whole weights, but these are sharded (FSDP2): use "
                "DistributedDataParallel, or proximal=None"
            )
        for w in run.weights(self):
            if w.name not in self.teacher:  # at first all, later those that were unfrozen
                self.teacher[w.name] = run.raw(w.name).clone()
        with torch.no_grad():
            return step.logits(step.forward(dropout=self.dropout, weights=self.teacher), self)

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        if self.proximal is not None and self.teacher:
            taught = [w for w in weights if w.name in self.teacher]
            held = [self.teacher[w.name] for w in taught]
            torch._foreach_lerp_(held, [w.data for w in taught], 1 - self.proximal.decay)

    def state_dict(self) -> dict[str, Any]:
        return {"teacher": self.teacher}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.teacher = state["teacher"]


def largest(values: Tensor) -> Tensor:
    """Largest absolute entry of each token."""
    return values.abs().amax(-1, keepdim=True)
