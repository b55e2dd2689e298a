"""Randomness of the methods: generators that need no saving, and torch's random state, saved and restored."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .tensors import hashed


def generator(device: torch.device, seed: int) -> torch.Generator:
    """A fresh generator on a device."""
    return torch.Generator(device=device).manual_seed(seed)


def occurrence(methods: Sequence[Any], method: Any) -> tuple[str, int]:
    """Class of a method and its place among those of its class, so that other methods do not change its draws."""
    same = [m for m in methods if type(m) is type(method)]
    return type(method).__name__, next(i for i, m in enumerate(same) if m is method)


def draw_seed(seed: int, index: int, micro: int, *key: Any) -> int:
    """A seed that depends only on the run's seed, the step, the micro-batch and ``key``."""
    return hashed(seed, index, micro, *key)


@contextlib.contextmanager
def forked(device: torch.device) -> Iterator[None]:
    """Restore torch's random state at the end of the block, on the CPU and on ``device``."""
    state = RandomState(device)
    try:
        yield
    finally:
        state.restore()


class RandomState:
    """Copy of torch's random state on the CPU and on ``device``, which may be of any kind (CUDA, MPS, XPU)."""

    def __init__(self, device: torch.device) -> None:
        self._own = torch.get_rng_state()
        self._there: tuple[Any, torch.device, Tensor] | None = None
        if device.type not in ("cpu", "meta"):
            module: Any = torch.get_device_module(device)
            self._there = module, device, module.get_rng_state(device)

    def restore(self) -> None:
        """Set torch's random state to this copy."""
        torch.set_rng_state(self._own)
        if self._there is not None:
            module, device, state = self._there
            module.set_rng_state(state, device)
