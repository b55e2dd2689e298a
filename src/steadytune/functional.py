"""The equations, stateless: tensors in, tensors out. Nothing here knows of models, optimizers or steps."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def mix(anchor: Tensor, value: Tensor, mask: Tensor, keep: float, *, out: Tensor | None = None) -> Tensor:
    """``anchor + mask * (value - anchor) / keep``: equal to ``value`` in expectation when ``mask`` is Bernoulli(keep).

    Args:
        anchor: Any shape.
        value: Like ``anchor``.
        mask: 0/1, boolean or floating point, broadcastable to ``anchor``.
        keep: In [0, 1]; 0 gives ``anchor``.
        out: Written in place when given; may be ``value`` itself.
    """
    weight = rescaled(mask, keep, value.dtype).expand_as(value)
    return torch.lerp(anchor, value, weight, out=out)


def product(factors: Sequence[Tensor]) -> Any:
    """Of factors that broadcast to each other; 1 of none."""
    return functools.reduce(operator.mul, factors, 1.0)


def mixture(factors: Sequence[Tensor], value: Tensor, reference: Tensor, *, convex: bool) -> Tensor:
    """``a * value + (1 - a) * reference``; not ``convex``: ``a * value + (1 - a1)(1 - a2)... * reference``.

    Args:
        factors: A1, a2 ..., whose product is a; each broadcasts to the weight.
        value: Any shape.
        reference: Tensor of the same shape.
        convex: Which of the two.
    """
    if convex:
        return torch.lerp(reference, value, product(factors))
    return product(factors) * value + product([1 - f for f in factors]) * reference


def contraction(
    factors: Sequence[Tensor], gradient: Tensor, value: Tensor, reference: Tensor, *, convex: bool
) -> list[Tensor]:
    """Gradient of each factor, of its shape, from the gradient of `mixture`; other arguments as there."""
    found = _by_others(factors, gradient * (value - reference if convex else value))
    if convex:
        return found
    return [f - g for f, g in zip(found, _by_others([1 - f for f in factors], gradient * reference), strict=True)]


def _by_others(factors: Sequence[Tensor], own: Tensor) -> list[Tensor]:
    """For each factor, of its shape: the sum of ``own`` times all other factors."""
    if own.dim() == 2 and [f.shape for f in factors] == [(own.shape[0], 1), (1, own.shape[1])]:
        column, row = factors
        return [own @ row.mT, column.mT @ own]  # five times as fast as sums of products
    others = ([*factors[:i], *factors[i + 1 :]] for i in range(len(factors)))
    return [(own * product(rest)).sum_to_size(f.shape) for f, rest in zip(factors, others, strict=True)]


def rescaled(mask: Tensor, keep: float, dtype: torch.dtype) -> Tensor:
    """``mask / keep`` in ``dtype``, zeros when ``keep`` is 0: the factor of `mix` and of its chain rule."""
    return mask.to(dtype, copy=True).mul_(1 / keep if keep else 0.0)


def warmed_cosine(done: float, warmup: float) -> float:
    """A rate that rises from 0 to 1 over the share ``warmup`` of a training and falls back along half a cosine.

    Args:
        done: Share of the training that is over, in [0, 1].
        warmup: In [0, 1).
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
    """The value of `jeffreys`, but each divergence sends its gradient into its second argument only."""
    return kl(a.detach(), b) + kl(b.detach(), a)


def to_midpoint(a: Tensor, b: Tensor) -> Tensor:
    """``KL(m || p_a) + KL(m || p_b)`` with the constant ``m = (p_a + p_b) / 2``, (..., classes) -> (...)."""
    log_a, log_b = a.log_softmax(-1), b.log_softmax(-1)
    log_m = torch.logaddexp(log_a, log_b).detach() - math.log(2)
    return (log_m.exp() * (2 * log_m - log_a - log_b)).sum(-1)


def mean_square(a: Tensor, b: Tensor) -> Tensor:
    """Mean over classes of the squared difference of logits, (..., classes) -> (...)."""
    return (a - b).square().mean(-1)


def gaussian_kl(mean: Tensor, spread: Tensor, prior_mean: Tensor, prior_spread: Tensor) -> Tensor:
    """``KL(N(mean, spread^2) || N(prior_mean, prior_spread^2))`` of independent features, (..., width) -> (...)."""
    gap = (spread.square() + (mean - prior_mean).square()) / (2 * prior_spread.square())
    return (gap + (prior_spread / spread).log() - 0.5).sum(-1)


def odds_gap(a: Tensor, b: Tensor, floor: float = 1e-6) -> Tensor:
    """``2 * sum of p_a * (log odds of p_a - log odds of p_b)``, (..., classes) -> (...).

    Odds are constants: gradient flows through p_a only. No divergence: it may be negative.
    """
    p, q = a.softmax(-1), b.softmax(-1)
    gap = (1 / (q + floor) - 1 + floor).log() - (1 / (p + floor) - 1 + floor).log()
    return 2 * (p * gap.detach()).sum(-1)


def stage_length(total_steps: int, update_ratio: float) -> int:
    """Steps of one DPS stage: ``int(total_steps * update_ratio)``, at least 1."""
    return max(1, int(total_steps * update_ratio))


def selecting(index: int, stage: int) -> bool:
    """Whether 0-based step ``index`` lies in a stage II (subnetwork) of DPS with stages of ``stage`` steps."""
    return (index // stage) % 2 == 1


def anneal(t: float, t0: float, k: float, schedule: str) -> float:
    """RecAdam's weight of the task at step ``t``: ``"sigmoid"``, 1 / (1 + exp(-k (t - t0))), or ``"linear"``, t / t0.

    Linear stops at 1; k belongs to the sigmoid only.
    """
    if schedule == "linear":
        return min(1.0, t / t0) if t0 else 1.0
    return 1 / (1 + math.exp(min(-k * (t - t0), 700.0)))


def frequency_score(squares: Tensor, frequency: Tensor, stage: int, *, penalty: bool) -> Tensor:
    """DPS Mix's score: mean squared gradient over the draws, optionally damped by ``exp(-frequency / stage)``.

    Args:
        squares: Accumulated squared gradients.
        frequency: How often each entry was drawn, broadcastable to ``squares``; 0 counts as 1.
        stage: Steps of the stage.
        penalty: Whether to multiply by the frequency penalty.
    """
    frequency = frequency.clamp(min=1).to(squares.dtype)
    factor = (-frequency / stage).exp() / frequency if penalty else 1 / frequency
    return squares * factor
