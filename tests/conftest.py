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


MISSING = "recorded trajectory"  # begins the reason of each test skipped because its recording is elsewhere


def pytest_terminal_summary(terminalreporter):
    """Print the number of recorded trajectories that were not checked, because skipped tests are easily overlooked."""
    reasons = [str(report.longrepr[2]) for report in terminalreporter.stats.get("skipped", []) if report.longrepr]
    missing = [reason for reason in reasons if MISSING in reason]
    if missing:
        names = {reason.partition(f"{MISSING} ")[2].split()[0] for reason in missing}
        terminalreporter.write_line(
            f"{len(names)} recorded trajectories were not checked ({len(missing)} tests skipped): they are not in "
            f"{SHARED / 'golden'}. STEADYTUNE_SHARED names the folder that holds golden/."
        )


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
            pytest.skip(f"{MISSING} {name} is not here (STEADYTUNE_SHARED names their folder)")
        return Golden(path)

    return load
