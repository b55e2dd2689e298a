"""Errors of gains by rows and trainings, shrinkage, verdicts, and shares of rows in a score."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from steadytune.data.problem import Problem
from steadytune.searching.estimates import Estimate, halved, shrunk, two_way, verdict
from steadytune.searching.halves import halves
from steadytune.searching.row_scores import row_losses, row_scores

ROWS = np.arange(4)


def test_the_error_is_that_of_rows_where_trainings_agree():
    """Four rows, e = 1/2, -1/2, -1/2, 1/2: 4 / 3 of the sum of squares, 1."""
    one_repeat = two_way(np.array([[1.0, 0, 0, 1]]), np.array([[0, 0, 1, 1]]), ROWS)
    assert (one_repeat.value, one_repeat.blocks) == (0.5, 2)
    assert one_repeat.error == pytest.approx((4 / 3) ** 0.5 / 4)
    twice = two_way(np.array([[1.0, 0, 0, 1]] * 2), np.array([[0, 0, 1, 1], [2, 2, 3, 3]]), ROWS)
    assert twice.error == pytest.approx(one_repeat.error), "the same answers again are no more evidence"


def test_the_error_grows_with_the_luck_of_trainings():
    """Two trainings of two rows each: e = 1, 1, -1, -1; by blocks 8 * 2 / 1, by rows 4 * 4 / 3, of single values 4."""
    found = two_way(np.array([[2.0, 2, 0, 0]]), np.array([[0, 0, 1, 1]]), ROWS)
    assert found.error == pytest.approx((16 + 16 / 3 - 4) ** 0.5 / 4)


def test_rows_of_one_group_are_one_observation():
    """Two groups of two rows: sums of e are 1 and -1 in each repeat, so that the error is that of two observations."""
    blocks, groups = np.array([[0, 0, 1, 1], [2, 2, 3, 3]]), np.array([7, 7, 3, 3])
    found = two_way(np.array([[1.0, 1, 0, 0]] * 2), blocks, groups)
    assert found.error == pytest.approx((2 * (2**2 + 2**2) + 4 / 3 * 4 - 4) ** 0.5 / 8)
    assert found.blocks == 2, "degrees of freedom are those of two groups, not of four trainings"


@pytest.mark.parametrize("size", [1, 10])
def test_the_error_is_right_whatever_the_size_of_groups(size):
    """Naive: errors by rows are a third of the spread of means where groups have 10 rows each."""
    rng = np.random.default_rng(0)
    units = np.repeat(np.arange(40), size)
    means, squares = [], []
    for _ in range(400):
        folds = np.stack([rng.permutation(40) % 5 for _ in range(4)])[:, units] + 5 * np.arange(4)[:, None]
        found = two_way(rng.normal(size=40)[units] + 0.3 * rng.normal(size=(4, len(units))), folds, units)
        means.append(found.value)
        squares.append(found.error**2)
    assert np.sqrt(np.mean(squares)) == pytest.approx(np.std(means), rel=0.1)


@pytest.mark.parametrize(("row", "training", "single"), [(1.0, 0.0, 0.3), (0.2, 0.5, 1.0), (0.0, 0.0, 1.0)])
def test_the_error_is_the_spread_of_means_over_tables(row, training, single):
    rng = np.random.default_rng(0)
    means, squares = [], []
    for _ in range(400):
        folds = np.stack([rng.permutation(60) % 5 for _ in range(4)]) + 5 * np.arange(4)[:, None]
        luck = training * rng.normal(size=20)[folds]
        found = two_way(row * rng.normal(size=60) + luck + single * rng.normal(size=(4, 60)), folds, np.arange(60))
        means.append(found.value)
        squares.append(found.error**2)
    assert np.sqrt(np.mean(squares)) == pytest.approx(np.std(means), rel=0.1)


def test_two_halves_count_the_same_whatever_their_sizes():
    half = np.array([True, False, False, False])
    found = halved(np.array([[1.0, 0, 0, 0]]), np.array([[0, 0, 1, 1]]), ROWS, half)
    assert (found.value, found.error) == (0.5, 0.0)
    assert two_way(np.array([[1.0, 0, 0, 0]]), np.array([[0, 0, 1, 1]]), ROWS).value == 0.25


def test_intervals_and_probabilities_know_that_ten_trainings_are_few():
    found = Estimate(0.02, 0.01, 10)
    assert found.interval == pytest.approx((0.02 - 2.2622 * 0.01, 0.02 + 2.2622 * 0.01), abs=1e-5)
    assert found.positive == pytest.approx(0.9617, abs=1e-4)
    assert found.detectable == pytest.approx((2.2622 + 0.8416) * 0.01, abs=1e-5)
    assert Estimate(0.0, 0.0, 10).positive == 0.0


def test_shrinkage_by_hand():
    """Variance of true gains: mean of 0.02^2 - 0.01^2 and 0.04^2 - 0.01^2 = 9e-4, so that nine tenths stay."""
    low, high = shrunk([Estimate(0.02, 0.01, 10), Estimate(0.04, 0.01, 10)], least=0.001)
    assert (low.mean, high.mean) == pytest.approx((0.018, 0.036))
    assert low.sd == pytest.approx(0.01 * 0.9**0.5)
    assert high.above(low) == pytest.approx(0.910, abs=1e-3)


def test_arms_that_are_all_better_are_not_shrunk_to_nothing():
    """Naive: the variance about the arms' own mean is 0, and so is every belief."""
    beliefs = shrunk([Estimate(0.08, 0.02, 5)] * 4, least=0.001)
    assert min(belief.mean for belief in beliefs) > 0.07


def test_arms_that_spread_no_more_than_their_errors_are_shrunk_to_the_prior():
    (belief,) = shrunk([Estimate(0.01, 0.02, 5)], least=0.005)
    assert belief.mean == pytest.approx(0.01 * 0.005**2 / (0.005**2 + 0.02**2))


@pytest.mark.parametrize(
    ("value", "fresh", "expected"),
    [(0.03, True, "shown"), (0.03, False, "likely"), (0.01, True, "likely"), (0.0, True, "not shown")],
)
def test_verdicts(value, fresh, expected):
    assert verdict(Estimate(value, 0.01, 10), fresh) == expected


def test_halves_keep_groups_together_and_balance_strata():
    rng = np.random.default_rng(1)
    groups, strata = rng.integers(0, 40, 200), rng.integers(0, 3, 200)
    half = halves(strata, groups, 0)
    assert all(len(set(half[groups == group])) == 1 for group in range(40))
    counts = [np.bincount(strata[side], minlength=3) for side in (half, ~half)]
    assert np.abs(counts[0] - counts[1]).max() <= 4
    assert (half != halves(strata, groups, 1)).any()


LABELS = np.array(["a", "b", "a", "b", "b", "a", "b", "b"], dtype=object)


def test_rows_share_a_score_so_that_their_mean_is_the_score():
    problem = Problem.of("classification", ["a", "b"])
    scores = np.random.default_rng(0).dirichlet([1, 1], 8)
    right = (problem.decide(scores) == LABELS).astype(float)
    assert (row_scores(problem, problem.metric("accuracy"), LABELS, scores) == right).all()
    for name, metric in problem.metrics.items():
        expected = metric.goodness(problem.score(LABELS, problem.decide(scores), scores)[name])
        assert row_scores(problem, metric, LABELS, scores).mean() == pytest.approx(expected), name
    balanced = problem.metric("balanced_accuracy")
    shares = row_scores(problem, balanced, LABELS, scores)
    assert shares[LABELS == "a"].std() > shares[LABELS == "b"].std(), "a row of the smaller class counts more"


def test_numbers_have_shares_and_losses_too():
    problem = Problem.of("regression")
    gold = problem.array(pd.Series(np.arange(6.0)))
    scores = np.array([0.0, 1, 2, 3, 4, 9])[:, None]
    shares = row_scores(problem, problem.metric("pearson"), gold, scores)
    assert shares.mean() == pytest.approx(np.corrcoef(gold.astype(float), scores[:, 0])[0, 1])
    assert row_losses(problem, gold, scores).tolist() == [0, 0, 0, 0, 0, 16]


def test_the_loss_of_rows_is_the_log_loss():
    problem = Problem.of("classification", ["a", "b"])
    scores = np.array([[0.5, 0.5], [0.25, 0.75]])
    assert row_losses(problem, LABELS[:2], scores) == pytest.approx([np.log(2), -np.log(0.75)])


def test_halves_of_few_groups_are_not_surer_than_they_are():
    """Two groups in each half, no true gain. Naive: means are taken off by half, and corrected as if by whole."""
    rng, shown = np.random.default_rng(0), 0
    units, half = np.repeat(np.arange(4), 25), np.arange(100) < 50
    for _ in range(400):
        gains = rng.normal(0, 0.05, 4)[units][None] + rng.normal(0, 0.01, (1, 100))
        shown += halved(gains, (np.arange(100) % 5)[None], units, half).interval[0] > 0
    assert shown / 400 <= 0.04


def test_halves_by_hand():
    """Units of two rows with the means 1, 3 | 5, 9: half variances 2 and 8, and of the mean (2 / 2 + 8 / 2) / 4."""
    values = np.array([[1.0, 1, 3, 3, 5, 5, 9, 9]])
    found = halved(values, np.arange(8)[None], np.repeat(np.arange(4), 2), np.arange(8) < 4)
    assert (found.value, found.error) == (4.5, pytest.approx(1.25**0.5))
    assert found.blocks == 3
