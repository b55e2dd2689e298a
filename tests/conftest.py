"""Shared fixtures: tiny models, golden trajectories, deterministic threads."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("STEADYTUNE_SHARED", ROOT.parent / "shared"))


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


class Golden:
    """A recorded trajectory: arrays as float64 tensors, and its hyperparameters."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as file:
            self.arrays = dict(file)
        self.meta = json.loads(str(self.arrays["meta"]))

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[key])

    def __contains__(self, key: str) -> bool:
        return key in self.arrays

    def keys(self, prefix: str) -> list[str]:
        return [k for k in self.arrays if k.startswith(prefix)]


@pytest.fixture
def golden():
    def load(name: str) -> Golden:
        path = SHARED / "golden" / f"{name}.npz"
        if not path.exists():
            pytest.skip(f"recorded trajectory {name} is not here (STEADYTUNE_SHARED names their folder)")
        return Golden(path)

    return load
