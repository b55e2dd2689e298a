"""The caller's random state and torch settings, which a training must not change."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator

import numpy as np


@contextlib.contextmanager
def as_found() -> Iterator[None]:
    """Restore the random states of Python, NumPy and torch, and torch's settings, also after an error in the block."""
    import torch

    python, numpy, own = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    on_mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    cudnn = torch.backends.cudnn
    settings = (
        torch.get_default_dtype(), torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(), cudnn.benchmark, cudnn.deterministic,
    )  # fmt: skip
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(own)
        if on_gpus:
            torch.cuda.set_rng_state_all(on_gpus)
        if on_mps is not None:
            torch.mps.set_rng_state(on_mps)
        dtype, threads, deterministic, precision, cudnn.benchmark, cudnn.deterministic = settings
        torch.set_default_dtype(dtype)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        torch.set_float32_matmul_precision(precision)
