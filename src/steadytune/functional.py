"""Equations as pure functions of tensors, independent of models, optimizers and training steps."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def mix(anchor: Tensor, value: Tensor, mask: Tensor, keep: float, *, out: Tensor | None = None) -> Tensor:
    """``anchor + mask * (value - anchor) / keep``; its expectation is ``value`` for a Bernoulli(keep) mask.

    Args:
        anchor: Tensor of any shape.
        value: Tensor of the same shape.
        mask: 0/1, boolean or floating point, broadcastable to ``anchor``.
        keep: Probability in [0, 1]; 0 gives ``anchor``.
        out: Tensor to write the result into; it may be ``value``.
    """
    weight = rescaled(mask, keep, value.dtype).expand_as(value)
    return torch.lerp(anchor, value, weight, out=out)


def product(factors: Sequence[Tensor]) -> Any:
    """Product of factors that broadcast to each other; 1 without factors."""
    return functools.reduce(operator.mul, factors, 1.0)


def mixture(factors: Sequence[Tensor], value: Tensor, reference: Tensor, *, convex: bool) -> Tensor:
    """``a * value + (1 - a) * reference`` if convex, else ``a * value + (1 - a1)(1 - a2)... * reference``.

    Args:
        factors: The factors a1, a2, ... of a; each broadcasts to the weight.
        value: Tensor of any shape.
        reference: Tensor of the same shape.
        convex: Whether both shares add up to 1.
    """
    if convex:
        return torch.lerp(reference, value, product(factors))
    return product(factors) * value + product([1 - f for f in factors]) * reference


def contraction(
    factors: Sequence[Tensor], gradient: Tensor, value: Tensor, reference: Tensor, *, convex: bool
) -> list[Tensor]:
    """Gradient of each factor, in its shape, from the gradient of `mixture` with the same arguments."""
    slopes = _by_others(factors, gradient * (value - reference if convex else value))
    if convex:
        return slopes
    return [f - g for f, g in zip(slopes, _by_others([1 - f for f in factors], gradient * reference), strict=True)]


def _by_others(factors: Sequence[Tensor], own: Tensor) -> list[Tensor]:
    """For each factor, in its shape: the sum of ``own`` times all other factors."""
    if own.dim() == 2 and [f.shape for f in factors] == [(own.shape[0], 1), (1, own.shape[1])]:
        column, row = factors
        return [own @ row.mT, column.mT @ own]  # five times faster than sums of products
    others = ([*factors[:i], *factors[i + 1 :]] for i in range(len(factors)))
    return [(own * product(rest)).sum_to_size(f.shape) for f, rest in zip(factors, others, strict=True)]


def rescaled(mask: Tensor, keep: float, dtype: torch.dtype) -> Tensor:
    """``mask / keep`` in ``dtype``, zeros if ``keep`` is 0; the factor in `mix` and in its chain rule."""
    return mask.to(dtype, copy=True).mul_(1 / keep if keep else 0.0)


def warmed_cosine(done: float, warmup: float) -> float:
    """Rate that rises linearly from 0 to 1 during the warm-up, then falls to 0 along half a cosine.

    Args:
        done: Share of the training that is done, in [0, 1].
        warmup: Share of the training with a rising rate, in [0, 1).
    """
    return done / warmup if done < warmup else (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2


def symmetric_kl(a: Tensor, b: Tensor) -> Tensor:
    """``(KL(p_a || p_b) + KL(p_b || p_a)) / 2`` of two sets of logits (..., classes) -> (...)."""
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    return ((log_a.exp() - log_b.exp()) * (log_a - log_b)).sum(-1) / 2


def kl(target: Tensor, logits: Tensor) -> Tensor:
    """``KL(softmax(target) || softmax(logits))`` of logits (..., classes) -> (...)."""
    log_p = target.log_softmax(-1)
    return (log_p.exp() * (log_p - logits.log_softmax(-1))).sum(-1)


def jeffreys(a: Tensor, b: Tensor) -> Tensor:
    """``KL(p_a || p_b) + KL(p_b || p_a)`` of two sets of logits (..., classes) -> (...)."""
    return 2 * symmetric_kl(a, b)


def jeffreys_to_constants(a: Tensor, b: Tensor) -> Tensor:
    """`jeffreys`, but the gradient of each divergence flows into its second argument only."""
    return kl(a.detach(), b) + kl(b.detach(), a)


def to_midpoint(a: Tensor, b: Tensor) -> Tensor:
    """``KL(m || p_a) + KL(m || p_b)`` with the constant ``m = (p_a + p_b) / 2``, (..., classes) -> (...)."""
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    log_m = torch.logaddexp(log_a, log_b).detach() - math.log(2)
    return (log_m.exp() * (2 * log_m - log_a - log_b)).sum(-1)


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean over classes of the squared difference of logits, (..., classes) -> (...)."""
    return (a - b).square().mean(-1)


def supervised_contrastive(features: Tensor, partners: Tensor, temperature: float) -> Tensor:
    """Mean cross entropy between a row's likeness to all others and each of its partners, (rows,).

    Likeness is the softmax over the other rows of ``cosine / temperature``. A row without a partner has 0.

    Args:
        features: Shape (rows, width).
        partners: Truth values (rows, rows); a row is never its own partner, whatever the diagonal says.
        temperature: Above 0.
    """
    unit = torch.nn.functional.normalize(features, dim=-1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    cosines = (unit @ unit.mT / temperature).to(unit.dtype).masked_fill(itself, torch.finfo(unit.dtype).min)
    partners = partners & ~itself
    losses = -cosines.log_softmax(-1).masked_fill(~partners, 0.0).sum(-1)
    return losses / partners.sum(-1).clamp(min=1)


def gaussian_kl(mean: Tensor, spread: Tensor, prior_mean: Tensor, prior_spread: Tensor) -> Tensor:
    """``KL(N(mean, spread^2) || N(prior_mean, prior_spread^2))`` of independent features, (..., width) -> (...)."""
    gap = (spread.square() + (mean - prior_mean).square()) / (2 * prior_spread.square())
    return (gap + (prior_spread / spread).log() - 0.5).sum(-1)


def odds_gap(a: Tensor, b: Tensor, floor: float = 1e-6) -> Tensor:
    """``2 * sum of p_a * (log odds of p_a - log odds of p_b)``, (..., classes) -> (...).

    Log odds are constants, so the gradient flows through p_a only. It is not a divergence and may be negative.
    """
    p, q = a.softmax(-1), b.softmax(-1)
    gap = (1 / (q + floor) - 1 + floor).log() - (1 / (p + floor) - 1 + floor).log()
    return 2 * (p * gap.detach()).sum(-1)


def stage_length(total_steps: int, update_ratio: float) -> int:
    """Steps of one DPS stage: ``int(total_steps * update_ratio)``, at least 1."""
    return max(1, int(total_steps * update_ratio))


def selecting(index: int, stage: int) -> bool:
    """Whether step ``index``, counted from 0, is in a stage II (subnetwork) of DPS with stages of ``stage`` steps."""
    return (index // stage) % 2 == 1


def anneal(t: float, t0: float, k: float, schedule: str) -> float:
    """RecAdam's weight of the task at step ``t``: ``"sigmoid"``, 1 / (1 + exp(-k (t - t0))), or ``"linear"``, t / t0.

    The linear schedule stays at 1 from t0 on, and does not use k.
    """
    if schedule == "linear":
        return min(1.0, t / t0) if t0 else 1.0
    return 1 / (1 + math.exp(min(-k * (t - t0), 700.0)))


def frequency_score(squares: Tensor, frequency: Tensor, stage: int, *, penalty: bool) -> Tensor:
    """Score of DPS Mix: mean squared gradient over the draws, optionally times ``exp(-frequency / stage)``.

    Args:
        squares: Sum of squared gradients.
        frequency: Number of draws of each entry, broadcastable to ``squares``; 0 counts as 1.
        stage: Number of steps of the stage.
        penalty: Whether to multiply by the frequency penalty.
    """
    frequency = frequency.clamp(min=1).to(squares.dtype)
    factor = (-frequency / stage).exp() / frequency if penalty else 1 / frequency
    return squares * factor
