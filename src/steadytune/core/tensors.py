"""Operations of the core on tensors in place, and thresholds, hashes and masks for core and methods."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

CHUNK = 1 << 18  # number of elements that `exchange` moves at once: 1 MB of float32, which fits a core's cache
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integer type by size in bytes


def kept(n: int, keep: float) -> int:
    """Number of entries that a share ``keep`` in [0, 1] of ``n`` leaves: the ceiling of ``n * keep``.

    Rounding noise is removed first: 100 * 0.29 is 28.999999999999996 in floating point and counts as 29.
    """
    return math.ceil(round(n * keep, 6))


def kth_largest(scores: Tensor, k: int) -> Tensor:
    """The ``k``-th largest entry (1-based) of a tensor of any shape, as a 0-d tensor; +inf for ``k = 0``."""
    flat = scores.flatten()
    if k == 0:
        return flat.new_full((), math.inf)
    if not flat.is_cpu:  # on CUDA, kthvalue runs in a single block; Apple's GPUs may lack it
        return flat.sort().values[flat.numel() - k]
    return flat.kthvalue(flat.numel() - k + 1).values


def byte_mask(shape: Sequence[int], share: float, generator: torch.Generator) -> Tensor:
    """Boolean entries, each True with probability ``share``, a multiple of 1/256 below 1, from one random byte each."""
    n, device = math.prod(shape), generator.device
    if device.type == "mps":  # Apple's GPUs draw 32 bits of an int64, and its sign fills the rest
        drawn = torch.empty(n, dtype=torch.uint8, device=device).random_(0, 256, generator=generator)
    else:
        words = torch.empty(-(-n // 8), dtype=torch.int64, device=device)
        words.random_(-(2**63), None, generator=generator)  # all 64 bits: without bounds the sign bit would stay 0
        drawn = words.view(torch.uint8)[:n]
    return (drawn < round(share * 256)).view(tuple(shape))


def hashed(*parts: Any) -> int:
    """A seed of 63 bits that depends only on the parts, which are plain values."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def checksum(tensor: Tensor) -> str:
    """Checksum of a tensor's bytes, 64 bits."""
    data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(data.tobytes(), digest_size=8).hexdigest()


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
    """Set ``live`` to ``before`` where ``mask`` is False, bit for bit, in place; ``before`` may be overwritten.

    Args:
        live: Tensor of any shape and dtype; contiguous for a mask of indices.
        before: Tensor like ``live``.
        mask: Boolean, broadcastable to ``live``; or flat indices (int64) of the entries of ``live`` that stay.
    """
    if mask.dtype != torch.bool:
        before.view(-1).index_copy_(0, mask, live.view(-1).index_select(0, mask))
        live.copy_(before)
    elif live.is_cpu and mask.dim():  # torch.where is up to three times slower with a random mask
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
    """A mask as boolean entries; the given mask may be flat indices (int64)."""
    if mask.dtype == torch.bool:
        return mask
    flat = torch.zeros(math.prod(shape), dtype=torch.bool, device=mask.device)
    return flat.index_fill_(0, mask, True).view(tuple(shape))


def tensors_of(value: Any) -> Iterator[Tensor]:
    """All tensors of a tree of mappings and lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for v in value.values():
            yield from tensors_of(v)
    elif isinstance(value, list | tuple):
        for v in value:
            yield from tensors_of(v)


def on_devices(value: Any, live: Mapping[str, Tensor], device: torch.device | None = None) -> Any:
    """A copy of a method's state, with tensors under a weight's name on that weight's device, others on `device`."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True) if device is not None else value.clone()
    if isinstance(value, Mapping):
        return {k: on_devices(v, live, live[k].device if k in live else device) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [on_devices(v, live, device) for v in value]
    return value
