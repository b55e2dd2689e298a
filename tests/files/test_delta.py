"""Sparse deltas: they restore the model bit for bit, are small, refuse another base, and are written atomically."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import assert_same, batches, bert
from steadytune import SIFT, ChildTuningD, DPSDense, Run, apply_delta, save_delta
from steadytune.files import state
from steadytune.files.delta import FILE


def tuned_by(method, steps=5):
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1)
    run = Run(model, [method], total_steps=8, data=lambda: batches(2)).attach(optimizer)
    for batch in batches(steps):
        run.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.finish()
    return model.state_dict()


@pytest.mark.parametrize(
    "method",
    [
        SIFT(keep=0.01),
        ChildTuningD(keep=0.1, frozen=True, scope="all"),
        DPSDense(keep=0.3, update_ratio=0.25, frozen=True),
    ],
    ids=lambda m: type(m).__name__,
)
def test_a_masked_run_comes_back_bit_for_bit(method, tmp_path):
    base, tuned = bert().state_dict(), tuned_by(method)
    save_delta(tmp_path, base, tuned)
    found = apply_delta(tmp_path, base)
    assert list(found) == list(tuned)
    assert_same(found, tuned)
    assert_same(base, bert().state_dict())
    model = bert()
    model.load_state_dict(found)


def test_only_what_is_trained_is_stored(tmp_path):
    """8 bytes an entry trained; without `frozen`, decay moves every entry and nothing is saved."""
    base = bert().state_dict()
    everything = sum(t.numel() for t in base.values())
    sizes = {}
    for frozen in (True, False):
        file = save_delta(
            tmp_path / f"{frozen}.safetensors", base, tuned_by(SIFT(keep=0.01, frozen=frozen, decay=True))
        )
        with open(file, "rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        sizes[frozen] = os.path.getsize(file) - header
    assert sizes[True] < 0.05 * 8 * everything
    assert sizes[False] > 0.9 * 8 * everything


FLOATS = st.lists(st.floats(width=32), max_size=12)


@settings(max_examples=60, deadline=None)
@given(FLOATS, FLOATS, st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool]))
def test_any_bits_come_back(tmp_path_factory, old, new, dtype):
    """Minus zero, infinities and NaN too; other lengths are stored whole."""
    base, tuned = ({"w": torch.tensor(values).nan_to_num().to(dtype) if not dtype.is_floating_point
                    else torch.tensor(values).to(dtype)} for values in (old, new))  # fmt: skip
    path = tmp_path_factory.mktemp("delta")
    save_delta(path, base, tuned)
    found = apply_delta(path, base)["w"]
    assert (found.dtype, found.shape) == (dtype, tuned["w"].shape)
    assert torch.equal(found.view(torch.uint8), tuned["w"].view(torch.uint8))


def test_a_sign_of_zero_is_a_change(tmp_path):
    save_delta(tmp_path, {"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([-0.0, 1.0])})
    assert apply_delta(tmp_path, {"w": torch.tensor([0.0, 1.0])})["w"].signbit().tolist() == [True, False]


def test_a_new_head_is_stored_whole_and_a_dropped_one_left_out(tmp_path):
    base = {"body": torch.ones(3), "old_head": torch.ones(2)}
    tuned = {"head": torch.full((4,), 2.0), "body": torch.tensor([1.0, 5.0, 1.0])}
    save_delta(tmp_path, base, tuned)
    assert_same(apply_delta(tmp_path, base), tuned)
    assert list(apply_delta(tmp_path, base)) == ["head", "body"]


@pytest.mark.parametrize("change", ["value", "name", "dtype", "shape"])
def test_another_base_is_refused_by_its_hash(tmp_path, change):
    base = {"w": torch.ones(4)}
    save_delta(tmp_path, base, {"w": torch.zeros(4)})
    other = {
        "value": {"w": torch.tensor([1.0, 1.0, 1.0, 1.0000001])},
        "name": {"v": torch.ones(4)},
        "dtype": {"w": torch.ones(4).view(torch.int32)},
        "shape": {"w": torch.ones(2, 2)},
    }[change]
    with pytest.raises(ValueError, match=r"belongs to a base with hash \w{16}, the one given has \w{16}"):
        apply_delta(tmp_path, other)


def test_the_order_of_the_base_does_not_matter(tmp_path):
    base = {"a": torch.ones(1), "b": torch.ones(1)}
    save_delta(tmp_path, base, base)
    assert_same(apply_delta(tmp_path, dict(reversed(base.items()))), base)


def test_damaged_and_foreign_files_are_refused(tmp_path):
    base = {"w": torch.ones(4)}
    file = save_delta(tmp_path, base, {"w": torch.zeros(4)})
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ValueError, match="not a readable"):
        apply_delta(tmp_path, base)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    base = {"w": torch.ones(4)}
    save_delta(tmp_path, base, {"w": torch.zeros(4)})

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="No space"):
        save_delta(tmp_path, base, {"w": torch.full((4,), 3.0)})
    assert [p.name for p in tmp_path.iterdir()] == [FILE]
    assert_same(apply_delta(tmp_path, base), {"w": torch.zeros(4)})


def test_a_delta_of_a_newer_format_is_refused(tmp_path):
    """Naive: it is applied as if its format were known."""
    base = bert().state_dict()
    save_delta(tmp_path, base, base)
    state.save({**state.load(tmp_path / FILE), "format": 2}, tmp_path / FILE)
    with pytest.raises(ValueError, match="has format 2, this version reads deltas of format 1"):
        apply_delta(tmp_path, base)
