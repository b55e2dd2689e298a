"""Statistics of seeds: numbers worked out by hand, SciPy's own tests, properties, and how often the tests err."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from steadytune.bench.stats import (
    LEVEL,
    Trained,
    compare,
    compute_matched,
    detectable_gain,
    holm,
    log_sd_interval,
    mean_interval,
    power,
    proportion_interval,
    sd_test,
    sign_flip,
    spread_sources,
    steadiness,
    stratified,
    stratified_interval,
    summary,
)

ROOT = Path(__file__).parents[2]
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)
rows_right = st.lists(st.tuples(st.integers(0, 277), st.integers(0, 277)), min_size=2, max_size=10)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def accuracies(pairs):
    return np.array(pairs).T / 277


# ---------------------------------------------------------------- one recipe


def test_summary_by_hand():
    s = summary([1, 2, 3, 4, 10], threshold=2)
    assert (s.n, s.mean, s.median, s.iqm, s.minimum, s.maximum, s.failed) == (5, 4, 3, 3, 1, 10, 0.4)
    assert s.sd == pytest.approx(math.sqrt(12.5))
    half = 2.7764451 * math.sqrt(12.5 / 5)  # t with 4 degrees of freedom
    assert s.interval == pytest.approx((4 - half, 4 + half))


def test_summary_takes_flags_and_says_nothing_where_nobody_asked():
    assert summary([0.5, 0.9, 0.8, 0.9], failed=[True, False, False, False]).failed == 0.25
    assert summary([0.5, 0.9]).failed is None


def test_undefined_is_none():
    one, same = summary([0.7]), summary([0.1 + 0.2, 0.3, 0.3])  # the first differs by rounding
    assert (one.sd, one.interval, one.mean) == (None, None, 0.7)
    assert same.interval is None
    c = compare([0.8, 0.7, 0.9], [0.7, 0.6, 0.8])  # differences that are equal but for rounding
    assert (c.sd, c.interval, c.detectable, c.p) == (0, None, None, 0.25)
    s = steadiness([0.5, 0.5, 0.5], [0.1, 0.2, 0.4])
    assert (s.log_ratio, s.interval, s.brown_forsythe) == (None, None, None)
    assert steadiness([0, 0, 1, 1], [0, 0, 2, 2]).brown_forsythe is None  # F is infinite
    assert stratified({"x": [1, 1]}, {"x": [0, 0]}).interval is None


def test_interval_of_30_is_a_bootstrap_that_sees_skewness_and_is_no_narrower_than_t():
    x = np.exp(normal(30))
    low, high = mean_interval(x)
    t_low, t_high = stats.t.interval(LEVEL, 29, x.mean(), stats.sem(x))
    assert high - x.mean() > 1.15 * (x.mean() - low)
    assert low > t_low
    assert high > t_high
    symmetric = np.concatenate([z := normal(25), -z])
    low, high = mean_interval(symmetric)
    naive = stats.bootstrap((symmetric,), np.mean, random_state=np.random.default_rng(0)).confidence_interval
    assert (high - low) / (naive.high - naive.low) == pytest.approx(stats.t.isf(0.025, 49) / 1.96 * 1.01, abs=0.015)
    # 29 values: exactly t
    assert mean_interval(x[:29]) == pytest.approx(stats.t.interval(LEVEL, 28, x[:29].mean(), stats.sem(x[:29])))


def test_interval_of_many_rows_is_that_of_each():
    rows = np.stack([normal(6), np.ones(6), normal(6, seed=1)])
    found = mean_interval(rows)
    assert np.isnan(found[1]).all()
    assert found[[0, 2]] == pytest.approx(np.stack([mean_interval(rows[0]), mean_interval(rows[2])]))


# ---------------------------------------------------------------- sign flips


def test_sign_flip_by_hand():
    assert sign_flip([1, 2, 3, 4, 5]) == 0.0625  # five seeds never show anything at 0.05
    assert sign_flip([1, 2, 3, 4, 5, 6]) == 0.03125
    assert sign_flip([3, 1, -1]) == 0.75  # |sums| of the four flips: 3, 3, 5, 1
    assert sign_flip([0, 0, 0]) == 1
    assert sign_flip([[3, 1, -1], [1, 1, 1]]).tolist() == [0.75, 0.25]


@quick
@given(st.lists(st.integers(-277, 277), min_size=1, max_size=10))
def test_ties_count_whatever_rounding_makes_of_them(differences):
    assert sign_flip(np.array(differences) / 277) == sign_flip(differences)


def test_sign_flip_is_that_of_scipy():
    for seed in range(5):
        a, b = normal(2, 8, seed=seed)
        a += 0.5
        theirs = stats.permutation_test(
            (a, b), lambda x, y, axis: (x - y).mean(axis), permutation_type="samples", n_resamples=np.inf
        )
        assert sign_flip(a - b) == pytest.approx(theirs.pvalue, abs=1e-12)


def exact(differences):
    """P(|sum of randomly signed integers| >= observed), by convolution."""
    law, zero = np.ones(1), 0
    for d in np.abs(differences):
        step = np.zeros(2 * d + 1)
        step[0] += 0.5
        step[-1] += 0.5
        law, zero = np.convolve(law, step), zero + d
    return law[np.abs(np.arange(len(law)) - zero) >= abs(np.sum(differences))].sum()


def test_random_flips_above_sixteen_agree_with_all_flips_and_are_never_zero():
    rng = np.random.default_rng(0)
    for n in (16, 17, 25):
        differences = rng.integers(-9, 14, n)
        p = exact(differences)
        error = 0 if n == 16 else 4 * math.sqrt(p * (1 - p) / 9999) + 1e-4
        assert 0.001 < p < 0.9
        assert sign_flip(differences) == pytest.approx(p, rel=1e-12, abs=error)
    assert sign_flip(np.ones(40)) == 1e-4


def test_random_flips_depend_on_the_seed_alone():
    differences = normal(20) + 0.3
    assert sign_flip(differences, seed=3) == sign_flip(differences, seed=3)
    assert len({float(sign_flip(differences, seed=s)) for s in range(5)}) > 1


@quick
@given(rows_right, st.randoms(use_true_random=False))
def test_laws_of_a_comparison(pairs, random):
    a, b = accuracies(pairs)
    found, swapped = compare(a, b), compare(b, a)
    assert 2.0 ** (1 - found.n) <= found.p <= 1
    assert found.p == swapped.p
    assert found.difference == -swapped.difference
    assert found.better + swapped.better == pytest.approx(1)
    for one, other in ((found.interval, swapped.interval), (found.better_interval, swapped.better_interval)):
        centre = 0 if one is found.interval else 1
        assert (one is None) == (other is None)
        assert one is None or one == pytest.approx((centre - other[1], centre - other[0]))
    shuffled = random.sample(pairs, len(pairs))
    again = compare(*accuracies(shuffled))
    assert (again.p, again.better) == (found.p, found.better)
    assert again.difference == pytest.approx(found.difference)


def test_comparison_by_hand():
    c = compare([1, 2, 3, 4], [0, 2, 3, 5])
    assert (c.n, c.difference, c.better, c.p) == (4, 0, 0.5, 1)
    c = compare([3, 5, 7], [1, 1, 1])
    assert (c.difference, c.sd, c.better, c.p) == (4, 2, 1, 0.25)
    half = 4.3026527 * 2 / math.sqrt(3)
    assert c.interval == pytest.approx((4 - half, 4 + half))
    assert c.better_interval == pytest.approx((0.025 ** (1 / 3), 1))
    assert c.detectable == pytest.approx(2 * detectable_gain(3, 1))


def test_shares_have_the_exact_binomial_interval():
    for n in (5, 10, 20):
        for wins in range(n + 1):
            theirs = stats.binomtest(wins, n).proportion_ci(LEVEL)
            assert proportion_interval(wins / n, n) == pytest.approx((theirs.low, theirs.high))
    low, high = proportion_interval([4.5 / 10] * 3, [10, 10, 10]).T
    assert (proportion_interval(0.4, 10)[0] < low).all()
    assert (high < proportion_interval(0.5, 10)[1]).all()


# ---------------------------------------------------------------- several tasks


def test_tasks_weigh_equally_whatever_their_number_of_seeds():
    a, b = {"rte": [1, 1], "cola": [0, 0, 0, 0]}, {"rte": [0, 0], "cola": [0, 0, 0, 0]}
    s = stratified(a, b)
    assert (s.difference, s.better) == (0.5, 0.75)
    assert s.p == 0.5  # both seeds of rte must keep one sign
    assert s.tasks["cola"] == compare([0] * 4, [0] * 4)


def test_interval_over_tasks_by_hand():
    zero = {"x": [0, 0, 0], "y": [0, 0, 0]}
    low, high = stratified({"x": [0, 2, 4], "y": [1, 3, 5]}, zero).interval
    half = 2.7764451 * math.sqrt(8 / 3) / 2  # two variances of 4 over 3 seeds: 4 degrees of freedom
    assert (low, high) == pytest.approx((2.5 - half, 2.5 + half))


def test_one_task_is_a_comparison():
    a, b = normal(2, 12)
    s, c = stratified({"x": a}, {"x": b}), compare(a, b)
    assert (s.difference, s.p, s.better) == (c.difference, c.p, c.better)
    assert s.interval == pytest.approx(c.interval)
    assert s.better_interval == pytest.approx(c.better_interval)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([[0.5, 0.9], [0.01, 0.02]]) == pytest.approx(np.array([[1, 1], [0.02, 0.02]]))


@quick
@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_laws_of_holm(p, random):
    found = dict(zip(p, holm(p), strict=True))
    assert all(q <= adjusted <= min(1, len(p) * q) or adjusted == q for q, adjusted in found.items())
    assert [found[q] for q in sorted(found)] == sorted(found.values())
    shuffled = random.sample(p, len(p))
    assert holm(shuffled) == pytest.approx([found[q] for q in shuffled])


# ---------------------------------------------------------------- is it really steadier?


def test_interval_of_the_log_ratio_is_that_of_leaving_out_each_seed():
    a, b = normal(2, 9) * [[2], [1]]

    def ratio(keep):
        return math.log(np.std(a[keep], ddof=1) / np.std(b[keep], ddof=1))

    every = np.arange(9)
    pseudo = np.array([9 * ratio(every) - 8 * ratio(every != i) for i in every])
    assert log_sd_interval(a, b) == pytest.approx(stats.t.interval(LEVEL, 8, pseudo.mean(), stats.sem(pseudo)))
    assert np.isnan(log_sd_interval([0.1, 0.1, 0.1, 0.7], [1, 2, 4, 3])).all()  # without the last: no spread


def test_spread_by_hand():
    # medians 2 and 6
    assert sd_test([1, 2, 3, 4, 0], [0, 6, 8, 10, 1]) == sign_flip([1 - 6, 0, 1 - 2, 2 - 4, 2 - 5])
    assert sd_test([1, 2, 3], [5, 6, 7]) == 1


def test_a_smaller_spread_is_found_and_turns_with_its_sides():
    a, b = normal(2, 12) * [[1], [6]] + [[70], [72]]
    s, turned = steadiness(a, b), steadiness(b, a)
    assert s.log_ratio == pytest.approx(math.log(np.std(a) / np.std(b)))
    assert s.interval[1] < 0
    assert s.p < 0.01
    assert s.brown_forsythe == pytest.approx(stats.levene(a, b).pvalue)
    assert turned.log_ratio == pytest.approx(-s.log_ratio)
    assert turned.interval == pytest.approx((-s.interval[1], -s.interval[0]))
    assert (turned.p, turned.brown_forsythe) == (s.p, pytest.approx(s.brown_forsythe))


def test_spread_knows_neither_level_nor_unit():
    a, b = normal(2, 10) * [[1], [2]]
    assert sd_test(a, b) == sd_test(10 * a + 3, 10 * b - 5)
    assert log_sd_interval(a, b) == pytest.approx(log_sd_interval(10 * a + 3, 10 * b - 5))


# ---------------------------------------------------------------- what could have been seen


@pytest.mark.parametrize(
    ("gain", "sd", "expected"),
    [
        (1, 2, {5: 0.15, 10: 0.30, 20: 0.57, 50: 0.93}),
        (2, 2, {5: 0.42, 10: 0.82, 20: 0.99, 50: 1.0}),
        (1, 1, {5: 0.40, 10: 0.80, 20: 0.99}),
    ],
)
def test_power_against_simulated_figures(gain, sd, expected):
    assert power(gain, sd, list(expected)) == pytest.approx(list(expected.values()), abs=0.025)


def test_detectable_gain_is_the_inverse_of_power():
    for n in (2, 3, 5, 10, 50, 1000):
        gain = detectable_gain(n, 2.0)
        assert power(gain, 2.0, n) == pytest.approx(0.8, abs=1e-6)
    assert detectable_gain(33, 1) > 0.5 > detectable_gain(34, 1)  # textbooks: 34 pairs for half an SD
    assert detectable_gain(10, 1, chance=0.9) > detectable_gain(10, 1)
    assert power(0, 1, 10) == pytest.approx(0.05)


# ---------------------------------------------------------------- equal compute


def test_each_recipe_meets_the_cheapest_plain_run_that_costs_no_less():
    plain = {"3x": Trained([5, 6, 7], 300), "1x": Trained([1, 2, 3], 100), "2x": Trained([3, 4, 5], 200)}
    recipes = {"rdrop": Trained([4, 5, 6], 200), "smart": Trained([4, 4, 4], 201), "huge": Trained([9, 9, 9], 301)}
    rows = {row.recipe: row for row in compute_matched(recipes, plain)}
    assert [(r.baseline, r.baseline_passes) for r in rows.values()] == [("2x", 200), ("3x", 300), (None, None)]
    assert rows["rdrop"].comparison == compare([4, 5, 6], [3, 4, 5])
    assert rows["smart"].comparison.difference == -2
    assert rows["huge"].comparison is None


# ---------------------------------------------------------------- bad input, imports


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: summary([]), "scores must hold finite numbers"),
        (lambda: summary([0.5, math.nan]), "1 not finite"),
        (lambda: summary([[0.5, 0.6]]), "one number per run"),
        (lambda: summary([0.5], threshold=0.5, failed=[True]), "leave one out"),
        (lambda: summary([0.5, 0.6], failed=[True]), "one flag per score"),
        (lambda: compare([1, 2], [1, 2, 3]), r"same seeds.*got \(2,\) and \(3,\)"),
        (lambda: compare([1], [2]), "at least 2"),
        (lambda: compare([1, math.inf], [1, 2]), "a must hold finite numbers"),
        (lambda: compare([1, 2], [1, math.nan]), "b must hold finite numbers"),
        (lambda: stratified({"x": [1, 2]}, {"y": [1, 2]}), "same tasks"),
        (lambda: stratified({}, {}), "at least one"),
        (lambda: steadiness([1, 2], [1, 3]), "at least 3"),
        (lambda: sign_flip([1, math.nan]), "differences must hold finite"),
        (lambda: stratified_interval([[1, 2], [3]]), r"at least 2, got shape \(1,\)"),
        (lambda: summary([]), "scores must hold finite"),
        (lambda: mean_interval(math.nan), "values must hold finite"),
        (lambda: holm([0.5, math.nan]), "p-values"),
        (lambda: proportion_interval(1.5, 3), "share must lie"),
        (lambda: detectable_gain(1, 1.0), "n >= 2"),
        (lambda: detectable_gain(5, 0.0), "sd > 0"),
    ],
)
def test_bad_input_is_one_clear_error(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_statistics_never_import_torch():
    code = "import sys, steadytune.bench.stats; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ---------------------------------------------------------------- calibration


@pytest.fixture(scope="module")
def calibration():
    spec = importlib.util.spec_from_file_location("steadytune_calibration", ROOT / "benchmarks" / "calibration.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def unlucky(rate, repetitions):
    """Three standard errors of a share."""
    return 3 * math.sqrt(rate * (1 - rate) / repetitions)


def test_tests_in_use_seldom_err_where_others_do(calibration):
    found = {
        (law, r["name"]): r["rate"]
        for law in ("normal", "heavy tails (t, 3 degrees)", "one run in ten fails")
        for r in calibration.false_positives(law, 10, 300)
        if r["measure"] == "false positives"
    }
    used = {name: rate for name, rate in found.items() if "not used" not in name[1]}
    assert len(used) == 3 * 7
    assert max(used.values()) <= 0.05 + unlucky(0.05, 300)
    assert found["one run in ten fails", "SD: Pitman-Morgan (not used)"] > 0.3
    assert found["one run in ten fails", "SD: sign flip of squared deviations (not used)"] > 0.12
    # and a test that never errs is no test
    assert min(found["normal", name] for name in ("sign flip", "SD: Brown-Forsythe", "t interval as a test")) > 0.01


def test_intervals_of_the_mean_cover_where_a_plain_bootstrap_does_not(calibration):
    five, thirty = (
        {r["name"]: r["rate"] for r in calibration.mean_coverage("normal", n, count)}
        for n, count in ((5, 400), (30, 120))
    )
    assert five["mean of one recipe"] >= 0.95 - unlucky(0.95, 400)
    assert five["mean of one recipe, BCa at 95 % (not used)"] < 0.88
    assert thirty["mean of one recipe"] >= 0.95 - unlucky(0.95, 120)


def test_the_published_calibration_holds(calibration):
    published = json.loads((ROOT / "docs" / "results" / "calibration.json").read_text())
    used = [r for r in published if "not used" not in r["name"]]
    errors = {(r["name"], r["law"], r["n"]): r["rate"] for r in used if r["measure"] == "false positives"}
    assert {law for _, law, _ in errors} == set(calibration.LAWS)
    assert {n for *_, n in errors} == {5, 10, 20}
    assert max(errors.values()) <= calibration.MOST
    tame = ("normal", "normal, pairs correlated 0.5", "mildly skewed (gamma, skewness 0.5)", "accuracy on 277 rows")
    covered = {(r["name"], r["law"], r["n"]): r["rate"] for r in used if r["measure"] == "coverage"}
    assert min(rate for (_, law, _), rate in covered.items() if law in tame) >= calibration.LEAST
    assert {n for name, law, n in covered if (name, law) == ("mean of one recipe", "normal")} == {5, 10, 20, 30, 50}
    assert all(r["of"] >= 1000 for r in used)
    text = (ROOT / "docs" / "results" / "calibration.md").read_text()
    assert text.splitlines()[3:] == calibration.page(published, 2000).splitlines()[3:]  # up to the versions


# ---------------------------------------------------------------- where spread comes from


def test_additive_effects_leave_no_rest():
    one, two = np.array([0.0, 2.0, 4.0]), np.array([1.0, 2.0])
    (first, second), rest = spread_sources(one[:, None] + two)
    assert (first, second) == (pytest.approx(2.0), pytest.approx(np.std(two, ddof=1)))
    assert rest == pytest.approx(0.0, abs=1e-7)


def test_sources_of_spread_by_hand():
    """Rows 3 1 / 1 3: no main effect, mean square of the rest 4 with one degree of freedom."""
    assert spread_sources([[3.0, 1.0], [1.0, 3.0]]) == ((0.0, 0.0), 2.0)


def test_spread_of_known_variances_is_found_on_average():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(2000):
        x = rng.normal(0, 3, (6, 1, 1)) + rng.normal(0, 1, (1, 5, 1)) + rng.normal(0, 2, (6, 5, 4))
        sds, rest = spread_sources(x)
        found.append([*np.square(sds), rest**2])
    np.testing.assert_allclose(np.mean(found, 0), [9, 1, 0, 4], atol=0.5)


@pytest.mark.parametrize("bad", [[1.0, 2.0], [[1.0, 2.0]], [[1.0, np.nan], [1.0, 2.0]]])
def test_spread_needs_crossed_finite_scores(bad):
    with pytest.raises(ValueError, match="two or more axes of length 2 or more"):
        spread_sources(bad)
