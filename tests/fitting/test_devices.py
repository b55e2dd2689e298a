"""What an Apple GPU lacks, or calls otherwise: float64, and CUDA's functions for the random state."""

from __future__ import annotations

import pytest
import torch

import steadytune
from fit_helpers import save_sentence_bert, toy
from helpers import OnlyFloat32
from steadytune import precision
from steadytune.core import randomness
from steadytune.fitting.randomness import as_found


@pytest.mark.parametrize("options", [{}, {"head": "logistic", "pooling": "mean"}, {"num_seeds": 2, "combine": "soup"}])
def test_a_fit_needs_no_float64_on_the_device(options, tmp_path, monkeypatch):
    """Naive: outputs and features were widened on the device, so that every fit on a Mac ended at its first score."""
    model = save_sentence_bert(tmp_path / "model")
    monkeypatch.setattr(precision, "widest", lambda device: torch.float32)
    with OnlyFloat32():
        fitted = steadytune.fit(
            toy(),
            model=model,
            output=tmp_path / "out",
            tests={"new": toy(start=40)},
            steps=2,
            progress=False,
            **options,
        )
    assert 0 <= fitted.metrics["new"]["accuracy"] <= 1


class Elsewhere:
    """A device's module with a random state of its own."""

    def __init__(self) -> None:
        self.state = torch.tensor([1], dtype=torch.uint8)

    def get_rng_state(self, device: object = "mps") -> torch.Tensor:
        return self.state.clone()

    def set_rng_state(self, state: torch.Tensor, device: object = "mps") -> None:
        self.state = state.clone()


def test_a_further_pass_leaves_the_random_state_of_any_device_as_it_was(monkeypatch):
    """Naive: only that of CUDA devices came back, so that a penalty's dropout moved the task's on other ones."""
    there = Elsewhere()
    monkeypatch.setattr(torch, "get_device_module", lambda device: there)
    with randomness.forked(torch.device("mps")):
        there.state += 1
        drawn = torch.rand(3)
    assert there.state == 1
    assert torch.equal(torch.rand(3), drawn)


def test_a_fit_leaves_the_random_state_of_an_apple_gpu_as_it_was(monkeypatch):
    there = Elsewhere()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "mps", there)
    with as_found():
        there.state += 1
    assert there.state == 1
