"""The equations, stateless: tensors in, tensors out. Nothing here knows of models, optimizers or steps."""

from __future__ import annotations

import functools
import hashlib
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 18  # elements moved at once by `exchange`: one megabyte of float32, small enough for a core's cache
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by size in bytes


def kept(n: int, keep: float) -> int:
    """Number of entries of ``n`` that a share ``keep`` in [0, 1] leaves: the ceiling of ``n * keep``.

    Rounding noise is removed first: 100 * 0.29 is 28.999999999999996 in floating point and counts as 29.
    """
    return math.ceil(round(n * keep, 6))


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """The ``k``-th largest entry (1-based) of a tensor of any shape, as a 0-d tensor; +inf for ``k = 0``."""
    flat = scores.flatten()
    if k == 0:
        return flat.new_full((), math.inf)
    if flat.is_cuda:  # kthvalue runs in a single block there
        return flat.sort().values[flat.numel() - k]
    return flat.kthvalue(flat.numel() - k + 1).values


def keep_top(scores: Tensor, keep: float) -> Tensor:
    """Boolean mask of the ``ceil(n * keep)`` largest scores; entries tied with the threshold are all kept."""
    return scores >= kth_largest(scores, kept(scores.numel(), keep))


def mix(anchor: Tensor, value: Tensor, mask: Tensor, keep: float, *, out: Tensor | None = None) -> Tensor:
    """``anchor + mask * (value - anchor) / keep``: equal to ``value`` in expectation when ``mask`` is Bernoulli(keep).

    Args:
        anchor: any shape.
        value: like ``anchor``.
        mask: 0/1, boolean or floating point, broadcastable to ``anchor``.
        keep: in [0, 1]; 0 gives ``anchor``.
        out: written in place when given; may be ``value`` itself.
    """
    weight = rescaled(mask, keep, value.dtype).expand_as(value)
    return torch.lerp(anchor, value, weight, out=out)


def product(factors: Sequence[Tensor]) -> Any:
    """Of factors that broadcast to each other; 1 of none."""
    return functools.reduce(operator.mul, factors, 1.0)


def mixture(factors: Sequence[Tensor], value: Tensor, reference: Tensor, *, convex: bool) -> Tensor:
    """``a * value + (1 - a) * reference``; not ``convex``: ``a * value + (1 - a1)(1 - a2)... * reference``.

    Args:
        factors: a1, a2 ..., whose product is a; each broadcasts to the weight.
        value: any shape.
        reference: of the same shape.
        convex: which of the two.
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


def byte_mask(shape: Sequence[int], share: float, generator: torch.Generator) -> Tensor:
    """Boolean entries, each True with probability ``share``, a multiple of 1/256 below 1, from one random byte each."""
    n = math.prod(shape)
    words = torch.empty(-(-n // 8), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)  # all 64 bits: without bounds the sign bit would stay 0
    return (words.view(torch.uint8)[:n] < round(share * 256)).view(tuple(shape))


def hashed(*parts: Any) -> int:
    """A seed of 63 bits that depends on the parts, plain values, and on nothing else."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def checksum(tensor: Tensor) -> str:
    """64 bits that tell one tensor's bytes from another's."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=8).hexdigest()


def warmed_cosine(done: float, warmup: float) -> float:
    """A rate that rises from 0 to 1 over the share ``warmup`` of a training and falls back along half a cosine.

    Args:
        done: share of the training that is over, in [0, 1].
        warmup: in [0, 1).
    """
    return done / warmup if done < warmup else (1 + math.cos(math.pi * (done - warmup) / (1 - warmup))) / 2


def exchange(a: Tensor, b: Tensor) -> None:
    """Swap the contents of two contiguous tensors of one shape, with a buffer of `CHUNK` elements."""
    a, b = a.view(-1), b.view(-1)
    buffer = torch.empty_like(a[:CHUNK])
    for start in range(0, a.numel(), CHUNK):
        x, y = a[start : start + CHUNK], b[start : start + CHUNK]
        held = buffer[: x.numel()].copy_(y)
        y.copy_(x)
        x.copy_(held)


def put_back(live: Tensor, before: Tensor, mask: Tensor) -> None:
    """``live`` becomes ``before`` where ``mask`` is False, bit for bit, in place; ``before`` may be overwritten.

    Args:
        live: any shape and dtype; contiguous for a mask of indices.
        before: like ``live``.
        mask: boolean, broadcastable to ``live``, or flat indices (int64) of the entries that stay.
    """
    if mask.dtype != torch.bool:
        before.view(-1).index_copy_(0, mask, live.view(-1).index_select(0, mask))
        live.copy_(before)
    elif live.is_cpu and mask.dim():  # torch.where is up to three times slower, as nothing foresees a random mask
        bits, others = (t.view(WORDS[t.element_size()]) for t in (live, before))
        bits.bitwise_xor_(others).mul_(mask).bitwise_xor_(others)
    else:
        torch.where(mask, live, before, out=live)


def zero_others(tensor: Tensor, entries: Tensor) -> None:
    """Zero all but the entries of a contiguous tensor that have these flat indices (int64), in place."""
    flat = tensor.view(-1)
    kept = flat.index_select(0, entries)
    flat.zero_().index_copy_(0, entries, kept)


def boolean(mask: Tensor, shape: Sequence[int]) -> Tensor:
    """A mask as boolean entries, one given as flat indices (int64) too."""
    if mask.dtype == torch.bool:
        return mask
    flat = torch.zeros(math.prod(shape), dtype=torch.bool, device=mask.device)
    return flat.index_fill_(0, mask, True).view(tuple(shape))


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
        squares: accumulated squared gradients.
        frequency: how often each entry was drawn, broadcastable to ``squares``; 0 counts as 1.
        stage: steps of the stage.
        penalty: whether to multiply by the frequency penalty.
    """
    frequency = frequency.clamp(min=1).to(squares.dtype)
    factor = (-frequency / stage).exp() / frequency if penalty else 1 / frequency
    return squares * factor
