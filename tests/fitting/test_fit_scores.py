"""What `fit` records beside each score, what it warns of, and thresholds from the command line to the folder."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from fit_helpers import WORDS, save_tiny_bert, toy
from steadytune.cli import app
from steadytune.data.scores import best_threshold
from steadytune.errors import UsageError
from steadytune.fitting import fit
from steadytune.fitting.fitted_model import FittedModel

QUICK = {"steps": 20, "batch_size": 8, "lr": 5e-3, "save_steps": 0, "progress": False}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


def test_scores_come_with_intervals_baseline_and_classes(tmp_path, bert):
    """Naive: a number, and nothing to hold it against."""
    tests = {"t": toy(30, start=200)}
    result = fit(toy(90), model=bert, output=tmp_path / "o", tests=tests, evaluations=2, probe=False, **QUICK)
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    found = metrics["sets"]["t"]
    assert metrics["sets"] == result.metrics
    assert (found["rows"], found["classes"], found["selected"]) == (30, {"up": 20, "down": 10}, False)
    assert metrics["sets"]["validation"]["selected"] is True
    assert found["baseline"]["accuracy"] == pytest.approx(2 / 3)  # always "up", as most training rows
    assert found["intervals"]["accuracy"][0] <= found["accuracy"] <= found["intervals"]["accuracy"][1]
    assert np.array(found["confusion"]).sum() == 30
    assert found["per_class"]["down"]["support"] == 10
    again = FittedModel.load(tmp_path / "o").evaluate(toy(30, start=200))
    assert again == {**found, **{name: pytest.approx(found[name]) for name in ("log_loss", "brier")}}
    assert "(95 % interval " in (tmp_path / "o" / "README.md").read_text()


@pytest.mark.parametrize("numbers", [False, True])
def test_the_probe_beside_the_scores_keeps_groups_together(tmp_path, bert, numbers):
    """Naive: with one label for all rows of a writer, a probe that knows the writer looks perfect."""
    rng = np.random.default_rng(0)
    texts = [f"{a} {b} {a}" for a in WORDS[:12] for b in WORDS[:8]]
    writer = np.repeat(np.arange(12), 8)
    label = rng.normal(size=12)[writer] if numbers else np.where(rng.permutation(12)[writer] < 6, "x", "y")
    rows = pd.DataFrame({"text": texts, "label": label, "writer": writer})
    result = fit(rows, model=bert, output=tmp_path / "o", group="writer", refit=True, folds=4, **{**QUICK, "steps": 2})
    assert result.probe["pearson" if numbers else "accuracy"] < 0.8


def test_intervals_count_groups_where_they_are_known(tmp_path, bert):
    """Ten copies of each row, as one group: naive, the interval is that of 300 rows that have nothing in common."""
    rows, new = (toy(30, start=start).assign(writer=range(30)) for start in (0, 200))
    often = pd.concat([new] * 10, ignore_index=True)
    alone = fit(rows, model=bert, output=tmp_path / "a", tests={"new": often.drop(columns="writer")}, **QUICK)
    result = fit(rows, model=bert, output=tmp_path / "o", tests={"new": often}, group="writer", **QUICK)
    wide, narrow = (np.ptp(fitted.metrics["new"]["intervals"]["log_loss"]) for fitted in (result, alone))
    assert wide / narrow == pytest.approx(10**0.5, rel=0.15)
    assert result.metrics["new"]["notes"][-1].startswith("The 300 rows come from 30 groups")
    assert FittedModel.load(tmp_path / "o").evaluate(often)["intervals"] == result.metrics["new"]["intervals"]


def test_a_model_no_better_than_one_answer_is_the_last_thing_said(tmp_path, bert, monkeypatch):
    """Early stopping once shipped a model that answers "1" to all 300 rows, Matthews 0, without a word."""
    monkeypatch.chdir(tmp_path)
    toy(60).to_csv("train.csv", index=False)
    words = ["fit", "train.csv", "--model", bert, "--output", "o", "--steps", "2", "--lr", "1e-9", "--batch-size", "8"]
    done = CliRunner().invoke(app, [*words, "--save-steps", "0", "--quiet"], env={"COLUMNS": "100"})
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "o" / "metrics.json").read_text())
    assert any("the model answers" in text for text in metrics["warnings"])
    last = done.stdout.strip().split("\n")[-1]
    assert last.startswith("warning: validation: ")
    assert done.output.count("the model answers") == 1  # not in the log too
    assert "**Warning:** validation: the model answers" in (tmp_path / "o" / "README.md").read_text()
    assert max(map(len, done.stdout.split("\n")[:8])) <= 100
    assert "balanced_accuracy" in done.stdout


def test_a_threshold_is_tuned_on_validation_rows_kept_and_used(tmp_path, bert):
    rare = pd.concat([toy(90).query("label == 'up'"), toy(30).query("label == 'down'")], ignore_index=True)
    result = fit(rare, model=bert, output=tmp_path / "o", metric="f1_macro", threshold="tune",
                 validation=toy(40, start=300), **QUICK)  # fmt: skip
    record = json.loads((tmp_path / "o" / "steadytune.json").read_text())
    problem, rows = result.model.problem, result.predictions
    scores = result.model.scores_of(rows)
    best = best_threshold(problem, problem.array(rows["label"]), scores, problem.metric("f1_macro"))
    assert record["threshold"] == problem.threshold == pytest.approx(best)
    assert record["recipe"]["threshold"] == "tune"
    assert result.metrics["validation"]["selected"] is True
    loaded, table = FittedModel.load(tmp_path / "o"), toy(40, start=500)
    yes = loaded.predict_proba(table)[:, 1] > record["threshold"]
    assert loaded.predict(table).tolist() == np.where(yes, "up", "down").tolist()


def test_a_given_threshold_decides_everywhere(tmp_path, bert):
    result = fit(toy(40), model=bert, output=tmp_path / "o", threshold=0.999, **QUICK)
    assert set(result.predict(toy(10))) == {"down"}
    assert set(FittedModel.load(tmp_path / "o").predict(toy(10))) == {"down"}


REFUSED = {
    "no rows": ({"threshold": "tune", "validation_share": 0.0}, "threshold='tune' needs validation rows"),
    "numbers": ({"threshold": 0.3, "label": "score"}, "threshold is for two classes or for several labels a row"),
    "of nothing": ({"threshold": "best"}, "threshold must be a number above 0 and below 1, or tune, got 'best'"),
    "of one": ({"threshold": 1.0}, "threshold must be a number above 0 and below 1"),
    "no decision": ({"threshold": "tune", "metric": "roc_auc"}, "roc_auc is the same at every threshold"),
}


@pytest.mark.parametrize(("options", "said"), REFUSED.values(), ids=REFUSED)
def test_thresholds_that_cannot_be_are_refused(tmp_path, bert, options, said):
    with pytest.raises(UsageError) as caught:
        fit(toy(40), model=bert, output=tmp_path / "o", **{"label": "label", **QUICK, **options})
    assert said in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_a_metric_of_probabilities_selects(tmp_path, bert):
    """Naive: the metric is given labels where it needs probabilities."""
    result = fit(toy(60), model=bert, output=tmp_path / "o", metric="log_loss", evaluations=4, **QUICK)
    curve = dict(result.runs[0]["curve"])
    assert result.metrics["validation"]["log_loss"] == pytest.approx(min(curve.values()), rel=1e-5)


def test_no_figure_is_cut_at_80_columns(tmp_path, bert, monkeypatch):
    """Naive: a column of sets one letter wide beside the others."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    toy(60).to_csv("train.csv", index=False)
    words = [
        "fit",
        "train.csv",
        "--model",
        bert,
        "--output",
        "o",
        "--steps",
        "2",
        "--batch-size",
        "8",
        "--num-seeds",
        "2",
    ]
    done = CliRunner().invoke(app, [*words, "--save-steps", "0", "--quiet"], env={"COLUMNS": "80"})
    assert done.exit_code == 0, done.output
    scores = json.loads((tmp_path / "o" / "metrics.json").read_text())["sets"]["validation"]
    shown = [
        scores["accuracy"],
        scores["baseline"]["accuracy"],
        scores["probe"]["accuracy"],
        *scores["intervals"]["accuracy"],
    ]
    (line,) = [line for line in done.output.splitlines() if line.split()[:1] == ["accuracy"]]
    assert all(f"{value:.4f}" in line.split() for value in [*shown, scores["runs"]["accuracy"]["sd"]]), line
    assert "validation, 6 rows" in done.output
