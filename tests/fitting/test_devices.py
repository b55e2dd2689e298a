"""What an Apple GPU lacks, or calls otherwise: float64, and CUDA's functions for the random state."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import steadytune
from fit_helpers import save_sentence_bert, toy
from helpers import OnlyFloat32
from steadytune import precision
from steadytune.core import randomness
from steadytune.core.tensors import byte_mask
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


class Int32Random:
    """A tensor to fill with random integers, of which 32 bits are drawn whatever its type is, as on an Apple GPU."""

    def __init__(self, size: int, dtype: torch.dtype, device: object) -> None:
        self.size, self.dtype = size, dtype

    def random_(self, low: int, high: int | None, generator: object) -> torch.Tensor:
        ends = max(low, -(2**31)), min(high or 2**31, 2**31)
        self.drawn = torch.randint(*ends, (self.size,)).to(self.dtype)
        return self.drawn

    def view(self, dtype: torch.dtype) -> torch.Tensor:
        return self.drawn.view(dtype)


def test_random_masks_have_their_share_where_integers_have_32_random_bits(monkeypatch):
    """Naive: the sign of each int64 fills half of its bytes, so that a mask of 30 % has 40 % of ones."""
    monkeypatch.setattr(torch, "empty", Int32Random)
    torch.manual_seed(0)
    mask = byte_mask((100, 800), 77 / 256, SimpleNamespace(device=torch.device("mps")))
    assert mask.shape == (100, 800)
    assert abs(mask.double().mean() - 77 / 256) < 4 * (0.21 / 80_000) ** 0.5


def test_a_fit_leaves_the_random_state_of_an_apple_gpu_as_it_was(monkeypatch):
    there = Elsewhere()
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch, "mps", there)
    with as_found():
        there.state += 1
    assert there.state == 1
