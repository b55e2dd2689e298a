"""One object per kind of task, and nothing else that asks for the kind."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import steadytune
from steadytune.data.problem import KINDS, Classification, MultiLabel, Problem, Regression

SRC = Path(steadytune.__file__).parent
KIND = r"[\"'](classification|multilabel|regression)[\"']"
ASKS = re.compile(
    rf"(problem|target|task|table|data)\.kind\s*(==|!=|in\b|not in\b)|{KIND}\s*(==|in\b)|(==|!=)\s*{KIND}"
)


def test_nothing_outside_asks_which_kind_it_has():
    """`labels` reads what the user chose in a table; all else calls the problem's methods."""
    found = [
        f"{path.relative_to(SRC)}:{number}"
        for path in sorted(SRC.rglob("*.py"))
        if path.relative_to(SRC).parts not in {("data", "problem.py"), ("data", "labels.py")}
        for number, line in enumerate(path.read_text().split("\n"), 1)
        if ASKS.search(line) and 'kind != "auto"' not in line
    ]
    assert found == []


PROBLEMS = {
    "classification": (Classification(("a", "b", "c")), ["b", "a", "c"]),
    "multilabel": (MultiLabel(("a", "b", "c")), [("a", "c"), (), ("b",)]),
    "regression": (Regression(mean=2.0, spread=0.5), [1.0, 2.5, 4.0]),
}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_labels_come_back_from_what_a_model_is_given(kind):
    problem, labels = PROBLEMS[kind]
    assert problem.read(np.array(problem.ids(labels))).tolist() == labels
    assert Problem.of(kind, problem.names).names == problem.names


@pytest.mark.parametrize("kind", PROBLEMS)
def test_outputs_of_a_sure_model_are_the_labels(kind):
    problem, labels = PROBLEMS[kind]
    ids = np.array(problem.ids(labels), dtype=float)
    outputs = {
        "classification": 9.0 * np.eye(3)[ids.astype(int)] if kind == "classification" else None,
        "multilabel": 9.0 * (2 * ids - 1),
        "regression": ids[:, None] if kind == "regression" else None,
    }[kind]
    scores = problem.activate(outputs)
    assert problem.decide(scores).tolist() == labels
    gold = problem.array(labels)
    perfect = problem.score(gold, problem.decide(scores))
    for name, value in perfect.items():
        metric = problem.metric(name)
        assert value == pytest.approx(metric.limits[1] if metric.larger_is_better else 0.0)


def test_probabilities_of_exclusive_classes_sum_to_one_and_others_do_not():
    outputs = np.array([[800.0, 790.0, -800.0], [0.0, 0.0, 0.0]])  # naive exponentials overflow
    exclusive = Classification(("a", "b", "c")).activate(outputs)
    assert exclusive.sum(axis=1) == pytest.approx(1)
    assert exclusive[0, 1] == pytest.approx(np.exp(-10), rel=1e-3)
    assert MultiLabel(("a", "b", "c")).activate(outputs)[1] == pytest.approx(0.5)


class Config:
    def __init__(self, names, problem_type):
        self.num_labels, self.id2label, self.problem_type = len(names), dict(enumerate(names)), problem_type


@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_config_tells_the_problem(kind):
    problem, _ = PROBLEMS[kind]
    options = problem.head_options
    config = Config(problem.names or ("LABEL_0",), options["problem_type"])
    assert Problem.of_config(config) == Problem.of(kind, problem.names)
    assert Problem.of_config(Config(("x", "y"), None)) == Classification(("x", "y"))


def test_every_kind_names_a_loss_of_torch_and_a_first_metric():
    import torch

    for kind in KINDS.values():
        assert callable(getattr(torch.nn.functional, kind.loss))
    assert [kind(("a", "b")).metric(None).name for kind in KINDS.values()] == ["accuracy", "f1_micro", "pearson"]


def test_classes_taken_together():
    three = Classification(("entailment", "neutral", "contradiction"))
    two = three.coarser({"neutral": "not_entailment", "contradiction": "not_entailment"})
    assert two.names == ("entailment", "not_entailment")
    assert "f1" in two.metrics
    assert "f1" not in three.metrics


def test_an_undefined_score_is_worse_than_any():
    error, share = Regression().metric("rmse"), Classification(("a", "b")).metric("accuracy")
    assert error.goodness(0.1) > error.goodness(0.2) > error.goodness(None)
    assert share.goodness(0.2) > share.goodness(0.1) > share.goodness(None)
    assert pd.isna(error.goodness(None)) is False
