"""The equations: properties over random inputs, and numbers worked out by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steadytune.core import shards
from steadytune.core.tensors import CHUNK, boolean, exchange, kept, kth_largest, put_back, zero_others
from steadytune.functional import frequency_score, mix, rescaled, selecting, stage_length, symmetric_kl

quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
integers = st.lists(st.integers(-1000, 1000), min_size=1, max_size=40)
distinct = st.lists(st.integers(-1000, 1000), min_size=1, max_size=40, unique=True)
percent = st.integers(0, 100)
numbers = st.floats(-4, 4, allow_subnormal=False)


def doubles(values, *shape):
    return torch.tensor(values, dtype=torch.float64).reshape(shape or (-1,))


# ---------------------------------------------------------------- how many, and which


@quick
@given(st.integers(0, 5000), percent)
def test_kept_is_the_ceiling_in_exact_arithmetic(n, share):
    assert kept(n, share / 100) == math.ceil(Fraction(n * share, 100))


def test_kept_counts_what_floating_point_loses():
    assert int(100 * 0.29) == 28
    assert kept(100, 0.29) == 29
    assert kept(100, 0.07) == 7  # 100 * 0.07 is 7.000000000000001: a bare ceiling gives 8
    assert (kept(10, 0.0), kept(10, 1.0), kept(10, 0.01), kept(0, 0.7)) == (0, 10, 1, 0)


def top(scores, keep):
    """What a mask of the largest scores keeps, as methods make it."""
    return scores >= shards.kth([scores], keep, None)


@quick
@given(distinct, percent)
def test_the_threshold_keeps_the_largest_and_exactly_so_many(values, share):
    mask = top(doubles(values), share / 100)
    count = math.ceil(Fraction(len(values) * share, 100))
    assert {v for v, m in zip(values, mask.tolist(), strict=True) if m} == set(sorted(values, reverse=True)[:count])


@quick
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), percent)
def test_the_threshold_keeps_all_that_tie_with_the_threshold(values, share):
    mask = top(doubles(values), share / 100).tolist()
    count = math.ceil(Fraction(len(values) * share, 100))
    least = sorted(values, reverse=True)[count - 1] if count else math.inf
    assert mask == [v >= least for v in values]


def test_the_threshold_keeps_more_than_asked_on_a_tie():
    assert top(doubles([3, 1, 3, 0]), 0.25).tolist() == [True, False, True, False]
    assert top(doubles([0, 0, 0, 0]), 0.5).tolist() == [True] * 4
    assert top(doubles([2, 1]), 0.0).tolist() == [False, False]


@quick
@given(distinct, percent, st.floats(1e-3, 1e3))
def test_the_threshold_does_not_depend_on_a_positive_scale(values, share, scale):
    scores = doubles(values)
    assert torch.equal(top(scores, share / 100), top(scores * scale, share / 100))


@quick
@given(integers, st.data())
def test_kth_largest_is_the_sorted_entry_in_any_shape(values, data):
    k = data.draw(st.integers(1, len(values)))
    expected = sorted(values, reverse=True)[k - 1]
    assert kth_largest(doubles(values), k) == expected
    assert kth_largest(doubles(values, 1, len(values), 1), k) == expected
    assert kth_largest(doubles(values), 0) == math.inf


# ---------------------------------------------------------------- mixtures


@quick
@given(st.lists(st.tuples(numbers, numbers), min_size=1, max_size=10))
def test_mix_with_everything_kept_is_the_identity_bit_for_bit(pairs):
    anchor, value = doubles(pairs, -1, 2).T
    assert torch.equal(mix(anchor, value, torch.ones(len(pairs)), 1.0), value)
    assert torch.equal(mix(anchor, value, torch.zeros(len(pairs)), 0.5), anchor)
    assert torch.equal(mix(anchor, value, torch.ones(len(pairs)), 0.0), anchor)


@quick
@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=3), st.floats(0.05, 1))
def test_mix_has_the_value_as_its_expectation(pairs, keep):
    anchor, value = doubles(pairs, -1, 2).T
    mean = torch.zeros(3, dtype=torch.float64)
    for mask in itertools.product([0.0, 1.0], repeat=3):
        chance = math.prod(keep if m else 1 - keep for m in mask)
        mean += chance * mix(anchor, value, torch.tensor(mask), keep)
    assert torch.allclose(mean, value, rtol=0, atol=1e-12)


def test_mix_by_hand_with_columns_in_place_and_its_derivative():
    anchor = doubles([1.0, 2.0, 3.0, 4.0], 2, 2)
    value = doubles([3.0, 2.0, 1.0, 8.0], 2, 2).requires_grad_()
    columns = torch.tensor([[True, False]])
    shown = mix(anchor, value, columns, 0.5)
    assert shown.tolist() == [[5.0, 2.0], [-1.0, 4.0]]  # 1 + 2 * (3 - 1), anchor, 3 + 2 * (1 - 3), anchor
    shown.sum().backward()
    assert torch.equal(value.grad, rescaled(columns, 0.5, torch.float64).expand(2, 2))
    assert value.grad.tolist() == [[2.0, 0.0], [2.0, 0.0]]
    live = value.detach().clone()
    assert mix(anchor, live, columns, 0.5, out=live) is live
    assert torch.equal(live, shown)


def test_rescaled_does_not_write_on_the_mask():
    mask = torch.ones(3)
    assert rescaled(mask, 0.25, torch.float32).tolist() == [4.0] * 3
    assert mask.tolist() == [1.0] * 3
    assert rescaled(mask, 0.0, torch.float64).tolist() == [0.0] * 3


@pytest.mark.parametrize("shape", [(), (0,), (3, 5), (CHUNK,), (2, CHUNK // 2 + 1), (3 * CHUNK + 7,)])
def test_exchange_swaps_contents_and_keeps_both_memories(shape):
    a, b = torch.randn(shape), torch.randn(shape)
    was_a, was_b, places = a.clone(), b.clone(), (a.data_ptr(), b.data_ptr())
    exchange(a, b)
    assert torch.equal(a, was_b)
    assert torch.equal(b, was_a)
    assert (a.data_ptr(), b.data_ptr()) == places


# ---------------------------------------------------------------- entries that a step leaves alone


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).tolist()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize("form", ["mask", "column", "indices", "all", "none"])
def test_put_back_takes_each_entry_whole(dtype, form):
    """NaN, infinity and the sign of zero of one side never reach the other: no arithmetic would do."""
    odd = [math.nan, -math.inf, -0.0, 0.0] if dtype.is_floating_point else [-128, 127, -1, 0]
    live, before = torch.tensor([*odd, 1, 2, 3, 4]), torch.tensor([5, 6, 7, 8, *odd])
    live, before = (t.to(dtype).reshape(4, 2) for t in (live, before))
    mask = torch.tensor([[1, 0], [0, 1], [0, 1], [1, 0]]).bool()
    mask = {"column": mask[:, :1], "all": torch.tensor(True), "none": torch.tensor(False)}.get(form, mask)
    expected = torch.where(mask, live, before)
    given = mask.flatten().nonzero().flatten() if form == "indices" else mask
    found = live.clone()
    put_back(found, before.clone(), given)
    assert bits(found) == bits(expected)
    if form != "indices":  # which are of contiguous tensors
        turned = live.T.clone(memory_format=torch.contiguous_format).T
        put_back(turned, before.clone(), mask)
        assert bits(turned) == bits(expected)


def test_indices_are_another_form_of_a_mask():
    mask = torch.tensor([[True, False, True], [False, False, True]])
    indices = mask.flatten().nonzero().flatten()
    assert torch.equal(boolean(indices, (2, 3)), mask)
    assert boolean(mask, (2, 3)) is mask
    tensor = torch.tensor([[1.0, math.nan, -3.0], [4.0, math.inf, 0.5]])
    zero_others(tensor, indices)
    assert torch.equal(tensor, torch.tensor([[1.0, 0.0, -3.0], [0.0, 0.0, 0.5]]))


# ---------------------------------------------------------------- divergence


@quick
@given(st.lists(st.tuples(numbers, numbers), min_size=2, max_size=6), numbers)
def test_symmetric_kl_is_symmetric_not_negative_and_blind_to_shifts(pairs, shift):
    a, b = doubles(pairs, -1, 2).T
    distance = symmetric_kl(a, b)
    assert distance >= 0
    assert torch.allclose(distance, symmetric_kl(b, a), rtol=0, atol=1e-14)
    assert symmetric_kl(a, a) == 0
    assert torch.allclose(distance, symmetric_kl(a + shift, b), rtol=0, atol=1e-12)


def test_symmetric_kl_by_hand():
    # p = (1/2, 1/2), q = (3/4, 1/4): KL(p||q) = ln(2/sqrt(3)), KL(q||p) = 3/4 ln 3/2 + 1/4 ln 1/2
    a, b = doubles([0.0, 0.0, 5.0, 5.0], 2, 2), doubles([math.log(3), 0.0, math.log(3), 0.0], 2, 2)
    expected = (math.log(2 / math.sqrt(3)) + 0.75 * math.log(1.5) + 0.25 * math.log(0.5)) / 2
    assert torch.allclose(symmetric_kl(a, b), doubles([expected, expected]), rtol=0, atol=1e-15)
    assert expected == pytest.approx(math.log(3) / 8)  # = sum (p - q) log(p / q) / 2


# ---------------------------------------------------------------- the schedule and the scores of DPS


def test_stage_length_by_hand():
    assert stage_length(400, 0.05) == 20
    assert stage_length(399, 0.05) == 19  # int(19.95)
    assert stage_length(10, 0.05) == 1  # never 0
    assert stage_length(7, 1.0) == 7


def test_selecting_by_hand():
    assert [selecting(i, 3) for i in range(10)] == [False] * 3 + [True] * 3 + [False] * 3 + [True]
    assert [selecting(i, 1) for i in range(4)] == [False, True, False, True]


def test_frequency_score_by_hand():
    squares = doubles([4.0, 4.0, 4.0, 0.0], 2, 2)
    frequency = torch.tensor([[2, 0]], dtype=torch.int32)  # never drawn counts as once
    assert frequency_score(squares, frequency, 4, penalty=False).tolist() == [[2.0, 4.0], [2.0, 0.0]]
    damped = frequency_score(squares, frequency, 4, penalty=True)
    assert torch.allclose(damped, doubles([2 * math.exp(-0.5), 4 * math.exp(-0.25), 2 * math.exp(-0.5), 0.0], 2, 2))
    assert frequency.tolist() == [[2, 0]]
