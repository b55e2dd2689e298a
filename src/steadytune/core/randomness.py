"""Randomness of the methods: generators that need no saving, and torch's own random state, kept and put back."""

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
    """Class of a method and its place among those of its class: other methods of the list do not change its draws."""
    same = [m for m in methods if type(m) is type(method)]
    return type(method).__name__, next(i for i, m in enumerate(same) if m is method)


def draw_seed(seed: int, index: int, micro: int, *key: Any) -> int:
    """A seed that depends on the run's seed, the step, the micro-batch and ``key``, and on nothing else."""
    return hashed(seed, index, micro, *key)


def _devices(device: torch.device) -> list[int]:
    return [device.index or 0] if device.type == "cuda" else []


def forked(device: torch.device) -> contextlib.AbstractContextManager:
    """Leave torch's random state as it was before, on the CPU and on ``device``."""
    return torch.random.fork_rng(devices=_devices(device))


class RandomState:
    """Torch's random state at this moment, on the CPU and on ``device``; `restore` sets it again."""

    def __init__(self, device: torch.device) -> None:
        self._devices = _devices(device)
        self._states: list[Tensor] = [torch.get_rng_state(), *(torch.cuda.get_rng_state(d) for d in self._devices)]

    def restore(self) -> None:
        """Set the random state to what it was when this object was made."""
        torch.set_rng_state(self._states[0])
        for device, state in zip(self._devices, self._states[1:], strict=True):
            torch.cuda.set_rng_state(state, device)
