import pytest
import torch

from steadytune.fitting.memory import peak_memory, reset_peak


@pytest.mark.skipif(torch.cuda.is_available(), reason="then the accelerator's memory is measured")
def test_the_peak_holds_what_was_freed_and_counts_from_the_reset_on():
    reset_peak()
    before, size = peak_memory(), 200 << 20
    torch.ones(size, dtype=torch.uint8)
    assert before + size // 2 < peak_memory() < before + 4 * size
