"""Writes state-format-1.safetensors: two states of one run, and how it went on. Never to be run again for format 1.

    PYTHONPATH=tests python tests/recorded/make_state.py

A later format gets a file of its own; the old one must go on loading.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from helpers import Net, copied, points
from steadytune import EMA, DPSMix, Run
from steadytune.core import Weight
from steadytune.files import state

FILE = Path(__file__).with_name("state-format-1.safetensors")
SAVED = {"stage one": 2, "stage two": 6}  # stages of four steps: both in the middle
TOTAL = 12


def columns(run: Run, weight: Weight) -> torch.Tensor:
    """Draws that no random number generator of any torch version or processor can change."""
    n = weight.data.size(1)
    return ((torch.arange(n) + run.index) % 3 != 0).double().view(1, n)


def start() -> tuple[Net, Run, torch.optim.Optimizer]:
    """The run, before its first step."""
    model = Net()
    with torch.no_grad():  # initial weights that are exact everywhere
        for i, p in enumerate(model.parameters()):
            p.copy_((((torch.arange(p.numel()) * 7 + 3 * i) % 11 - 5) / 8).view(p.shape))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = Run(model, [DPSMix(keep=0.5, update_ratio=0.34), EMA(decay=0.8)], total_steps=TOTAL, seed=3).attach(optimizer)
    run[DPSMix].columns = columns
    return model, run, optimizer


def go_on(model: Net, run: Run, optimizer: torch.optim.Optimizer, data: list[dict[str, torch.Tensor]]) -> None:
    """Train on the batches that are left."""
    for batch in data[run.index :]:
        run.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def record() -> dict[str, Any]:
    """Train to the end; take the states on the way."""
    data = points(TOTAL)
    model, run, optimizer = start()
    tree: dict[str, Any] = {
        "data": {key: torch.stack([batch[key] for batch in data]) for key in data[0]},
        "base": copied(model),
        "cases": {},
    }
    for name, index in SAVED.items():
        go_on(model, run, optimizer, data[:index])
        tree["cases"][name] = copy.deepcopy({"run": run.state_dict(), "weights": copied(model)})
    go_on(model, run, optimizer, data)
    return {**tree, "end": {"evaluated": copied(model), "raw": {n: run.raw(n).clone() for n in copied(model)}}}


if __name__ == "__main__":
    state.save(record(), FILE)
