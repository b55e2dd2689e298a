"""Randomness of the methods: generators that need no saving, and torch's random state, saved and restored."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
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


def _devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


def forked(device: torch.device) -> contextlib.AbstractContextManager:
    """Restore torch's random state at the end of the block, on the CPU and on ``device``."""
    return torch.random.fork_rng(devices=_devices(device))


class RandomState:
    """Copy of torch's random state on the CPU and on ``device``."""

    def __init__(self, device: torch.device) -> None:
        self._devices = _devices(device)
        self._states: list[Tensor] = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self._devices)]

    def restore(self) -> None:
        """Set torch's random state to this copy."""
        torch.set_rng_state(self._states[0])
        for device, state in zip(self._devices, self._states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
