"""Metrics, their intervals and baselines, what is said beside scores, and thresholds."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from steadytune.data import intervals
from steadytune.data.metrics import METRICS
from steadytune.data.problem import KINDS, Classification, MultiLabel, Regression
from steadytune.data.scores import baseline, best_threshold, full_scores, warnings
from steadytune.errors import UsageError

ROOT = Path(__file__).parents[2]
TWO, THREE, SETS = Classification(("no", "yes")), Classification(("a", "b", "c")), MultiLabel(("a", "b", "c"))


def rows(problem, n=80, seed=0):
    """Gold labels, predictions and activated outputs of a model that is often right."""
    rng = np.random.default_rng(seed)
    if problem.ordered:
        gold = rng.normal(size=n)
        scores = (gold + rng.normal(size=n))[:, None]
    elif problem.several:
        has = rng.random((n, len(problem.names))) < 0.4
        gold, scores = problem.read(has), problem.activate(rng.normal(size=has.shape) + 2.0 * has - 1)
    else:
        ids = rng.integers(0, len(problem.names), n)
        outputs = rng.normal(size=(n, len(problem.names))) + 1.5 * np.eye(len(problem.names))[ids]
        gold, scores = problem.read(ids), problem.activate(outputs)
    return gold, problem.decide(scores), scores


def test_two_classes_score_as_scikit_learn_says():
    gold, predicted, scores = rows(TWO)
    yes, found = gold == "yes", TWO.score(gold, predicted, scores)
    assert found["balanced_accuracy"] == pytest.approx(sk.balanced_accuracy_score(gold, predicted))
    assert found["roc_auc"] == pytest.approx(sk.roc_auc_score(yes, scores[:, 1]))
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(yes, scores[:, 1]))
    assert found["log_loss"] == pytest.approx(sk.log_loss(gold, scores, labels=["no", "yes"]))
    assert found["brier"] == pytest.approx(sk.brier_score_loss(yes, scores[:, 1]))


def test_three_classes_score_as_scikit_learn_says():
    gold, predicted, scores = rows(THREE)
    found = THREE.score(gold, predicted, scores)
    assert found["roc_auc"] == pytest.approx(sk.roc_auc_score(gold, scores, multi_class="ovr", average="macro"))
    assert found["log_loss"] == pytest.approx(sk.log_loss(gold, scores, labels=["a", "b", "c"]))
    assert found["brier"] == pytest.approx(sk.brier_score_loss(gold, scores, labels=["a", "b", "c"]))
    assert "f1" not in found


def test_sets_and_numbers_score_as_scikit_learn_says():
    gold, predicted, scores = rows(SETS)
    has, said = SETS.membership(list(gold)), SETS.membership(list(predicted))
    found = SETS.score(gold, predicted, scores)
    assert found["accuracy"] == pytest.approx(sk.accuracy_score(has, said))
    assert found["f1_micro"] == pytest.approx(sk.f1_score(has, said, average="micro"))
    assert found["average_precision"] == pytest.approx(sk.average_precision_score(has, scores, average="macro"))
    assert found["brier"] == pytest.approx(np.mean((scores - has) ** 2))
    gold, predicted, _ = rows(Regression())
    found = Regression().score(gold, predicted)
    assert found["mae"] == pytest.approx(sk.mean_absolute_error(gold, predicted))
    assert found["r2"] == pytest.approx(sk.r2_score(gold, predicted))


def test_calibration_error_by_hand():
    """Two rows said with 0.9 of which one is right, two with 0.6 that both are: (2 |0.5-0.9| + 2 |1-0.6|) / 4."""
    gold = np.array(["yes", "no", "yes", "yes"], dtype=object)
    yes = np.array([0.9, 0.9, 0.6, 0.6])
    found = TWO.score(gold, TWO.decide(np.stack([1 - yes, yes], 1)), np.stack([1 - yes, yes], 1))
    assert found["calibration_error"] == pytest.approx(0.4)


def test_what_is_not_defined_is_none_and_does_not_warn(recwarn):
    gold, scores = np.array(["no", "no"], dtype=object), np.array([[0.7, 0.3], [0.6, 0.4]])
    found = TWO.score(gold, TWO.decide(scores), scores)
    assert (found["roc_auc"], found["average_precision"]) == (None, None)
    assert found["balanced_accuracy"] == 1.0
    bounds = TWO.intervals(gold, TWO.decide(scores), scores)
    assert [bounds[name] for name in ("f1", "f1_macro", "matthews", "balanced_accuracy", "roc_auc")] == [None] * 5
    assert Regression().score(np.array([1.0, 1.0]), np.array([1.0, 2.0]))["r2"] is None
    assert not recwarn.list


# ---- intervals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("right", "n"), [(0, 1), (3, 7), (50, 50), (180, 200)])
def test_a_share_has_the_interval_of_scipy(right, n):
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert intervals.wilson(right / n, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_perfect_scores_on_two_positive_rows_are_unsure():
    """Validation F1 was 1.0000 on 50 rows with 2 positives, 0.26 on the test set. Naive: bootstraps have width 0."""
    gold = np.array(["yes"] * 2 + ["no"] * 48, dtype=object)
    scores = np.where((gold == "yes")[:, None], [0.1, 0.9], [0.9, 0.1])
    assert TWO.score(gold, gold, scores)["f1"] == 1.0
    bounds = TWO.intervals(gold, gold, scores)
    share = stats.binomtest(2, 2).proportion_ci(method="wilson").low  # of the two, by hand 0.342
    assert bounds["f1"] == (pytest.approx(2 * share / (1 + share)), 1.0)
    assert all(bounds[name][0] < 0.75 for name in ("f1_macro", "balanced_accuracy", "roc_auc", "average_precision"))


def test_auc_variance_is_that_of_delong():
    """By hand: positives 0.9 and 0.4, negatives 0.5, 0.3 and 0.1; placements 1, 2/3 and 1/2, 1, 1."""
    positive, scores = np.array([True, True, False, False, False]), np.array([0.9, 0.4, 0.5, 0.3, 0.1])
    influence = intervals.auc_influence(positive, scores)
    auc = 5 / 6
    assert influence[positive] == pytest.approx((np.array([1, 2 / 3]) - auc) / 0.4)
    assert influence[~positive] == pytest.approx((np.array([1 / 2, 1, 1]) - auc) / 0.6)


@pytest.mark.parametrize("name", ["f1_macro", "matthews", "balanced_accuracy", "roc_auc", "f1_micro"])
def test_influence_values_are_what_a_row_less_changes(name):
    """The variance that an interval uses is near that of the jackknife, which scores the set without each row."""
    problem = SETS if name == "f1_micro" else THREE
    gold, predicted, scores = rows(problem, 300)
    metric = problem.metric(name)
    given = scores if metric.needs_probabilities else predicted
    everywhere = np.arange(len(gold))
    without = [metric.compute(gold[keep], given[keep], problem.names) for keep in (everywhere != i for i in everywhere)]
    jackknife = math.sqrt((len(gold) - 1) * np.var(without))
    low, high = metric.interval(gold, given, problem.names)
    assert 0.95 < (high - low) / (2 * 1.96 * jackknife) < (1.3 if name in ("roc_auc", "f1_micro") else 1.05)


@pytest.mark.parametrize("problem", [TWO, THREE, SETS, Regression()], ids=lambda p: f"{p.kind}-{len(p.names)}")
@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 40), seed=st.integers(0, 10_000))
def test_an_interval_holds_its_score_and_stays_within_the_limits(problem, n, seed):
    gold, predicted, scores = rows(problem, n, seed)
    values, bounds = problem.score(gold, predicted, scores), problem.intervals(gold, predicted, scores)
    assert values.keys() == bounds.keys() == problem.metrics.keys()
    for name, found in bounds.items():
        if found is not None:
            low, high = (-math.inf if b is None else b for b in problem.metric(name).limits)
            assert found[0] - 1e-9 <= values[name] <= found[1] + 1e-9, name
            assert low - 1e-9 <= found[0], name
            assert problem.metric(name).limits[1] is None or found[1] <= high + 1e-9, name


# ---- rows in groups


@pytest.mark.parametrize("problem", [TWO, THREE, SETS, Regression()], ids=lambda p: f"{p.kind}-{len(p.names)}")
def test_ten_copies_of_each_row_have_the_interval_of_the_rows(problem):
    """Naive: intervals of 600 independent rows, a third as wide. Some of those of rows are wider than they must be."""
    gold, predicted, scores = rows(problem, 60)
    copies = np.repeat(np.arange(60), 10)
    once = problem.intervals(gold, predicted, scores)
    naive = problem.intervals(gold[copies], predicted[copies], scores[copies])
    found = problem.intervals(gold[copies], predicted[copies], scores[copies], copies)
    for name in (name for name, bounds in once.items() if bounds is not None):
        of_rows, of_copies, of_groups = (np.ptp(bounds[name]) for bounds in (once, naive, found))
        assert of_copies < 0.4 * of_rows, name
        assert 0.6 < of_groups / of_rows < 1.15, name


def test_groups_of_one_row_change_nothing_and_one_group_tells_nothing():
    gold, predicted, scores = rows(TWO)
    assert TWO.intervals(gold, predicted, scores, np.arange(80)) == TWO.intervals(gold, predicted, scores)
    assert set(TWO.intervals(gold, predicted, scores, np.zeros(80)).values()) == {None}


def test_a_perfect_score_of_ten_groups_is_as_unsure_as_ten_rows():
    """Naive: no group's absence changes it, so that the interval stays that of 400 rows, from 0.99."""
    gold = np.array(["yes", "no"] * 200, dtype=object)
    low, high = TWO.intervals(gold, gold, groups=np.arange(400) % 10)["accuracy"]
    assert high == pytest.approx(1.0)
    assert low <= stats.binomtest(10, 10).proportion_ci(method="wilson").low


def test_intervals_of_groups_hold_the_true_score():
    """40 groups of 10 rows, whose shares of right rows spread around 0.8. Naive: 0.73 of the intervals hold it."""
    rng, groups, held, naive = np.random.default_rng(0), np.repeat(np.arange(40), 10), [], []
    gold = np.array(["yes"] * 400, dtype=object)
    for _ in range(200):
        predicted = np.where(rng.random(400) < rng.beta(1.6, 0.4, 40)[groups], "yes", "no").astype(object)
        for hits, known in ((held, groups), (naive, None)):
            low, high = TWO.metric("accuracy").bounds(gold, predicted, TWO.names, known)
            hits.append(low <= 0.8 <= high)
    assert np.mean(held) >= 0.92
    assert np.mean(naive) < 0.75


def test_more_than_a_hundred_groups_are_left_out_in_a_hundred_sets(monkeypatch):
    gold, predicted, _ = rows(TWO, 1200)
    groups = np.arange(1200) // 2
    found = TWO.metric("accuracy").bounds(gold, predicted, TWO.names, groups)
    monkeypatch.setattr(intervals, "MOST", 600)
    assert found == pytest.approx(TWO.metric("accuracy").bounds(gold, predicted, TWO.names, groups), abs=0.01)


@pytest.fixture(scope="module")
def simulation():
    spec = importlib.util.spec_from_file_location("steadytune_intervals", ROOT / "benchmarks" / "intervals.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    module.TRUTH = 50_000
    yield module
    del sys.modules[spec.name]


def test_intervals_cover_and_are_no_wider_than_they_must(simulation):
    found = {r["metric"]: r for r in simulation.coverage("two classes, 20 % positive", 200, 120)}
    unlucky = 3 * math.sqrt(0.95 * 0.05 / 120)
    for name, r in found.items():
        assert r["rate"] >= 0.95 - unlucky, name
    assert found["accuracy"]["width"] < 0.12
    assert found["f1"]["width"] < 0.30


def test_the_published_coverage_holds(simulation):
    published = json.loads((ROOT / "docs" / "results" / "intervals.json").read_text())
    used = {(r["metric"], r["law"], r["n"]): r["rate"] for r in published if "not used" not in r["metric"]}
    assert {(law, n) for _, law, n in used} == {(law, n) for law in simulation.LAWS for n in simulation.ROWS}
    assert {name for name, *_ in used} == {m.name for ms in METRICS.values() for m in ms} - {"calibration_error"}
    always = {"accuracy", "f1", "f1_micro", "roc_auc", "average_precision"}
    shares = {*always, "f1_macro", "matthews", "balanced_accuracy"}
    assert min(rate for (name, *_), rate in used.items() if name in always) >= simulation.LEAST
    assert min(rate for (name, _, n), rate in used.items() if name in shares and n >= 200) >= 0.89
    assert min(rate for (*_, n), rate in used.items() if n == 1000) >= 0.92
    text = (ROOT / "docs" / "results" / "intervals.md").read_text()
    assert text.splitlines()[3:] == simulation.page(published, 400).splitlines()[3:]  # up to the versions


# ---- what stands beside a score ---------------------------------------------------------------------------------


def test_a_threshold_does_not_change_the_most_frequent_class():
    """Naive: with 40 % of the rows above a threshold of 0.3, the baseline answers "yes", which 0.4 of them are."""
    labels = pd.Series(["yes"] * 4 + ["no"] * 6)
    found = baseline(TWO.at(0.3), labels.to_numpy(dtype=object), TWO.constant(labels))
    assert found["accuracy"] == pytest.approx(0.6)


def test_the_baseline_answers_with_the_training_rows():
    constant = TWO.constant(pd.Series(["no", "no", "no", "yes"]))
    assert constant.tolist() == [[0.75, 0.25]]
    found = baseline(TWO, np.array(["yes", "no"], dtype=object), constant)
    assert (found["accuracy"], found["f1"], found["matthews"], found["roc_auc"]) == (0.5, 0.0, 0.0, 0.5)
    assert found["log_loss"] == pytest.approx(-(math.log(0.25) + math.log(0.75)) / 2)
    found = baseline(Regression(), np.array([1.0, 3.0]), Regression().constant(pd.Series([2.0, 4.0])))
    assert (found["rmse"], found["mae"], found["pearson"]) == (pytest.approx(math.sqrt(2)), 1.0, None)
    assert found["r2"] == pytest.approx(-1.0)


def test_classes_one_by_one_and_confusion_by_hand():
    gold = np.array(["a", "a", "a", "b"], dtype=object)
    predicted = np.array(["a", "a", "b", "b"], dtype=object)
    scores = np.eye(3)[[0, 0, 1, 1]]
    found = full_scores(THREE, gold, predicted, scores)
    assert found["confusion"] == [[2, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert found["per_class"]["a"] == {"precision": 1.0, "recall": pytest.approx(2 / 3), "f1": 0.8, "support": 3}
    assert found["per_class"]["c"] == {"precision": None, "recall": None, "f1": None, "support": 0}
    assert found["classes"] == {"a": 3, "b": 1}
    assert "baseline" not in found
    json.dumps(found, allow_nan=False)


def test_a_missing_class_is_said_with_the_best_there_can_be():
    gold = np.array(["no"] * 5, dtype=object)
    found = full_scores(TWO, gold, gold, np.tile([0.9, 0.1], (5, 1)))
    assert found["f1_macro"] == 0.5
    assert found["notes"] == ["No row has the class 'yes': perfect predictions have f1_macro 0.5000 here."]
    both = np.array(["no", "yes"], dtype=object)
    assert full_scores(TWO, both, both, np.eye(2))["notes"] == []


def test_a_constant_model_and_one_below_its_baseline_are_warned_of():
    constant = TWO.constant(pd.Series(["no"] * 3 + ["yes"]))

    def said(gold, predicted):
        gold, predicted = np.array(gold, dtype=object), np.array(predicted, dtype=object)
        scores = full_scores(TWO, gold, predicted, 1.0 * TWO.membership(list(predicted)), constant)
        return warnings(TWO, "test", "accuracy", scores, pd.DataFrame({"label": gold, "prediction": predicted}))

    same, below = said(["no", "no", "yes"], ["no"] * 3)
    assert same == "test: the model answers 'no' for all 3 rows"
    assert below == "test: accuracy 0.6667 is not better than the 0.6667 of one answer for all rows"
    assert said(["no", "no", "yes"], ["no", "no", "yes"]) == []
    assert said(["no", "no"], ["no", "no"]) == []  # nothing else would be right


@pytest.mark.parametrize(("answer", "words"), [((), "no label"), (("a", "c"), "'a' and 'c'")])
def test_one_answer_of_several_labels_is_said_in_words(answer, words):
    gold, same = SETS.array([("a",), (), ("a", "c")]), SETS.array([answer] * 3)
    scores = full_scores(SETS, gold, same, 1.0 * SETS.membership(list(same)))
    said, *_ = warnings(SETS, "test", "f1_micro", scores, pd.DataFrame({"label": gold, "prediction": same}))
    assert said == f"test: the model answers {words} for all 3 rows"


def test_numbers_worse_than_their_mean_are_warned_of_by_their_error():
    """Naive: Pearson's correlation of the mean is undefined, so that nothing is compared."""
    problem, gold = Regression(), np.array([1.0, 2.0, 3.0])
    scores = full_scores(problem, gold, gold + 9, (gold + 9)[:, None], np.array([[2.0]]))
    said = warnings(problem, "test", "pearson", scores, pd.DataFrame({"label": gold, "prediction": gold + 9}))
    assert said == ["test: rmse 9.0000 is not better than the 0.8165 of one answer for all rows"]


def test_probabilities_of_classes_taken_together_add_up():
    names = {"b": "rest", "c": "rest"}
    scores = THREE.coarser_scores(np.array([[0.4, 0.35, 0.25]]), names)
    assert THREE.coarser(names).names == ("a", "rest")
    assert scores.tolist() == [[0.4, pytest.approx(0.6)]]


# ---- thresholds -------------------------------------------------------------------------------------------------


def test_a_threshold_decides():
    scores = np.array([[0.8, 0.2], [0.65, 0.35], [0.3, 0.7]])
    assert TWO.decide(scores).tolist() == ["no", "no", "yes"]
    assert TWO.at(0.3).decide(scores).tolist() == ["no", "yes", "yes"]
    assert SETS.at(0.3).decide(np.array([[0.2, 0.35, 0.7]])).tolist() == [("b", "c")]
    for problem in (THREE, Regression()):
        with pytest.raises(UsageError, match="threshold is for two classes or for several labels"):
            problem.at(0.3)


def test_the_best_threshold_is_found_half_way_and_ties_go_to_a_half():
    yes = np.array([0.1, 0.2, 0.3, 0.4])
    scores = np.stack([1 - yes, yes], 1)
    gold = np.array(["no", "no", "yes", "yes"], dtype=object)
    assert best_threshold(TWO, gold, scores, TWO.metric("f1")) == pytest.approx(0.25)
    assert best_threshold(TWO, gold, np.stack([yes, 1 - yes], 1)[::-1] * 0 + 0.5, TWO.metric("accuracy")) == 0.5
    sure = np.where((gold == "yes")[:, None], [0.1, 0.9], [0.9, 0.1])
    assert best_threshold(TWO, gold, sure, TWO.metric("f1")) == 0.5
    sets = SETS.read(np.eye(3, dtype=bool))
    assert best_threshold(SETS, sets, 0.2 * np.eye(3) + 0.1, SETS.metric("f1_micro")) == pytest.approx(0.2)


def test_every_kind_has_metrics_with_names_of_their_own():
    for kind in KINDS.values():
        names = [metric.name for metric in METRICS[kind.kind]]
        assert len(set(names)) == len(names)


def test_matthews_below_guessing_has_an_interval():
    """Naive: three classes, nearly all rows wrong: the value is taken as the lower limit, and has no interval."""
    gold = np.array(["a"] * 10 + ["b"] * 10 + ["c"] * 10)
    predicted = np.array(["b"] * 10 + ["a"] * 9 + ["b"] + ["a"] * 10)
    three = Classification(("a", "b", "c"))
    value = three.metric("matthews").compute(gold, predicted, three.names)
    low, high = three.metric("matthews").bounds(gold, predicted, three.names)
    assert -1 <= low < value < high < 0
    assert value < -1 / 2


def test_brier_of_two_classes_is_at_most_one():
    gold, scores = np.array(["a", "b", "a", "b"]), np.array([[0.9, 0.1], [0.99, 0.01], [0.05, 0.95], [0.3, 0.7]])
    _, high = Classification(("a", "b")).metric("brier").bounds(gold, scores, ("a", "b"))
    assert high == 1.0


def test_groups_that_are_all_alike_count_as_one_row_each():
    """Naive: half of each of 100 groups is right, and the interval is that of three rows."""
    gold = np.array(["a"] * 1000)
    predicted = np.array(["a", "b"] * 500)
    low, high = (
        Classification(("a", "b")).metric("accuracy").bounds(gold, predicted, ("a", "b"), np.repeat(np.arange(100), 10))
    )
    assert low == pytest.approx(0.4, abs=0.01)
    assert high == pytest.approx(0.6, abs=0.01)
