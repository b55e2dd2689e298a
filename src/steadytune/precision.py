"""The widest numbers of a device. Apple's GPUs (MPS) have no float64, and raise where a tensor is to become one."""

from __future__ import annotations

import torch
from torch import Tensor


def widest(device: torch.device) -> torch.dtype:
    """The widest floating-point type of a device: float64, or float32 on Apple's GPUs."""
    return torch.float32 if device.type == "mps" else torch.float64


def wide(tensor: Tensor) -> Tensor:
    """A tensor in the widest floating-point type of its device."""
    return tensor.to(widest(tensor.device))


def in_float64(tensor: Tensor) -> Tensor:
    """A tensor in float64 on the CPU, without gradient. It is moved before it is widened, for devices without it."""
    return tensor.detach().cpu().double()
