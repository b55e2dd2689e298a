"""The page of a fit: what it says of which folder, and which mistakes it shows."""

import html
import json
import re

import pandas as pd
import pytest

from steadytune.data.metrics import calibration_error
from steadytune.errors import UsageError
from steadytune.fitting.report_page import Fitted, mistakes, verdict, write_page

CLASSES = pd.DataFrame(
    {"set": "test", "row": range(4), "label": ["a", "b", "b", "b"], "prediction": ["a", "b", "b", "a"],
     "probability_a": [0.9, 0.2, 0.2, 0.7], "probability_b": [0.1, 0.8, 0.8, 0.3]}
)  # fmt: skip
NUMBERS = pd.DataFrame({"set": "test", "row": range(3), "label": [0.0, 1.0, 2.0], "prediction": [0.1, 1.0, 1.5]})
SEVERAL = pd.DataFrame(
    {"set": "test", "row": [0, 1], "label": [["a"], []], "prediction": [["a", "b"], []],
     "probability_a": [0.9, 0.1], "probability_b": [0.8, 0.2]}
)  # fmt: skip


def fitted(folder, predictions, metric="accuracy", labels=("a", "b"), *, sets=None, history=None, **changes):
    """A folder as `fit` leaves it, without the model."""
    folder.mkdir(exist_ok=True)
    recipe = {
        "model": "org/small", "methods": [], "labels": list(labels), "runs": 1, "combine": "best", "evaluations": 0,
        "calibrate": False, "max_length": 8, "lr": 0.1, "batch_size": 4, "accumulation": 1,
    }  # fmt: skip
    record = {
        "format": 1,
        "status": "finished",
        "recipe": recipe | changes.pop("recipe", {}),
        "data": {"train": {"source": "/home/me/train.csv", "rows": 9}},
        "runs": [{"passes": 1.0}],
        "versions": {"steadytune": "1.0"},
        **changes,
    }
    scores = {"test": {"rows": len(predictions), metric: 0.75}} if sets is None else sets
    (folder / "metrics.json").write_text(json.dumps({"metric": metric, "steps": 5, "seconds": 1.5, "sets": scores}))
    (folder / "steadytune.json").write_text(json.dumps(record))
    if scores:
        predictions.to_parquet(folder / "predictions.parquet")
    if history is not None:
        pd.DataFrame(history, columns=["run", "step", "name", "value"]).to_parquet(folder / "history.parquet")
    return folder


def page(folder):
    """The words of the page."""
    text = re.sub(r"<style>.*?</style>|<svg.*?</svg>", " ", write_page(folder).read_text(), flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_mistakes_are_the_wrong_rows_the_surest_first():
    """Row 5 is right and surest of all; of the wrong ones 9 (0.9) comes before 7 (0.6)."""
    predictions = pd.DataFrame(
        {"set": "test", "row": [5, 7, 9], "label": ["a", "a", "b"], "prediction": ["a", "b", "a"],
         "probability_a": [0.99, 0.4, 0.9], "probability_b": [0.01, 0.6, 0.1]}
    )  # fmt: skip
    found = mistakes(predictions, {"test": pd.DataFrame({"text": ["one", "two", "three"]}, index=[5, 7, 9])})
    assert found[["row", "text", "size"]].to_numpy().tolist() == [[9, "three", 0.9], [7, "two", 0.6]]


def test_the_probability_of_a_mistake_is_that_of_what_was_wrong():
    """Naive: the largest probability of the row, which a threshold, or a right one of several labels, makes another."""
    texts = {"test": pd.DataFrame({"text": ["one", "two"]})}
    about = {"set": "test", "row": [0, 1], "probability_a": [0.6, 0.9], "probability_b": [0.4, 0.1]}
    found = mistakes(pd.DataFrame(about | {"label": ["a", "b"], "prediction": ["b", "a"]}), texts)  # b above 0.3
    assert found[["row", "size"]].values.tolist() == [[1, 0.9], [0, 0.4]]
    sets = {"label": [("a",), ()], "prediction": [("a", "b"), ("a",)], "probability_b": [0.7, 0.02]}
    found = mistakes(pd.DataFrame(about | sets | {"probability_a": [0.99, 0.8]}), texts)
    assert found[["row", "size"]].values.tolist() == [[1, 0.8], [0, 0.7]]


def test_the_calibration_of_the_page_is_that_of_the_metric_with_a_threshold_too(tmp_path):
    """Naive: the probability of the likelier class is held against whether the other one, which was given, is right."""
    rows = pd.DataFrame(
        {"set": "test", "row": range(3), "label": ["a", "a", "b"], "prediction": ["b", "a", "b"],
         "probability_a": [0.6, 0.9, 0.2], "probability_b": [0.4, 0.1, 0.8]}
    )  # fmt: skip
    error = calibration_error(rows["label"].to_numpy(), rows[["probability_a", "probability_b"]].to_numpy(), ["a", "b"])
    assert f"The calibration error is {error:.3f}" in page(fitted(tmp_path / "out", rows))


def test_mistakes_of_numbers_are_the_farthest():
    texts = pd.DataFrame({"text": ["one", "two", "three"]})
    found = mistakes(NUMBERS, {"test": texts})
    assert found[["row", "text"]].to_numpy().tolist() == [[2, "three"], [0, "one"]]


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        ({"intervals": {"accuracy": [0.6, 0.9]}, "baseline": {"accuracy": 0.5}}, ", clearly better than the 0.5000"),
        ({"intervals": {"accuracy": [0.4, 0.9]}, "baseline": {"accuracy": 0.5}}, "0.5000 of always giving the same"),
        ({"baseline": {"accuracy": 0.75}}, ", no better than the 0.7500"),
        ({"selected": True}, "Those rows also chose the model"),
    ],
)
def test_the_verdict_weighs_the_score_against_its_interval_and_a_constant(tmp_path, scores, said):
    sets = {"test": {"rows": 4, "accuracy": 0.75, **scores}}
    text = verdict(Fitted(fitted(tmp_path / "out", CLASSES, sets=sets)))
    assert said in text
    assert ("not surely" in text) == ("[0.4000, 0.9000]" in text)


def test_an_error_is_better_than_a_constant_where_it_is_smaller(tmp_path):
    sets = {"test": {"rows": 3, "rmse": 0.3, "intervals": {"rmse": [0.2, 0.4]}, "baseline": {"rmse": 0.8}}}
    text = verdict(Fitted(fitted(tmp_path / "out", NUMBERS, "rmse", (), sets=sets)))
    assert "clearly better than the 0.8000" in text


def test_classes_are_told_one_by_one(tmp_path):
    """Of b two of three rows are found, and every row predicted as b is b: recall 2/3, precision 1, F1 0.8."""
    assert "b 3 2 1.000 0.667 0.800" in page(fitted(tmp_path / "out", CLASSES))


def test_numbers_have_a_scatter_and_no_classes(tmp_path):
    folder = fitted(tmp_path / "out", NUMBERS, "pearson", ())
    assert "predictions against labels" in page(folder)
    assert "scores of each class" not in page(folder)


def test_several_labels_have_no_confusion_of_one_with_another(tmp_path):
    found = page(fitted(tmp_path / "out", SEVERAL, "f1_micro"))
    assert "F1_micro is 0.7500" in found
    assert "what is taken for what" not in found


def test_no_sets_are_said_and_how_to_get_some(tmp_path):
    found = page(fitted(tmp_path / "out", CLASSES, sets={}))
    assert "How good the model is is not known" in found
    assert "--validation-share" in found


def test_runs_are_told_of_an_ensemble(tmp_path):
    sets = {"test": {"rows": 4, "accuracy": 0.75, "runs": {"accuracy": {"mean": 0.7, "sd": 0.05}}}}
    found = page(fitted(tmp_path / "out", CLASSES, sets=sets, recipe={"runs": 3, "combine": "ensemble"}))
    assert "3 runs: mean ± SD" in found
    assert "0.7000 ± 0.0500" in found


def test_rows_of_folds_that_selected_are_marked(tmp_path):
    """As `--refit` leaves them."""
    predictions = CLASSES.assign(set="cross-validation")
    sets = {"cross-validation": {"rows": 4, "accuracy": 0.75, "selected": True}}
    found = page(fitted(tmp_path / "out", predictions, sets=sets))
    assert "cross-validation, 4 rows (chose the model)" in found
    assert "Give a test set to know more" in found


def test_warnings_of_the_record_are_on_the_page(tmp_path):
    """Naive: predictions that agree in four digits were called one answer, whatever the fit had found."""
    close = NUMBERS.assign(prediction=[1.00001, 1.00002, 1.00003])
    assert "same answer" not in page(fitted(tmp_path / "out", close, "pearson", ()))
    folder = fitted(tmp_path / "out", CLASSES, warnings=["test: the model answers 'a' for all 4 rows"])
    assert "test: the model answers 'a' for all 4 rows." in page(folder)


def test_losses_on_validation_rows_are_no_training_losses(tmp_path):
    """Naive: both were drawn as one line, which jumped back at each evaluation."""
    history = [(0, 1, "loss", 0.9), (0, 2, "loss", 0.8), (0, 2, "eval_loss", 0.1), (0, 2, "eval_accuracy", 0.75)]
    with_both = write_page(fitted(tmp_path / "out", CLASSES, history=history)).read_text()
    without = write_page(fitted(tmp_path / "out", CLASSES, history=history[:2] + history[3:])).read_text()
    assert with_both == without
    assert "Score on the validation rows" in with_both


NASTY = "<script>alert(1)</script> & $x^2$ {{ 7 * 7 }}"


def test_texts_and_names_are_text(tmp_path):
    predictions = CLASSES.replace({"a": NASTY})
    folder = fitted(tmp_path / "out", predictions, labels=[NASTY, "b"])
    rows = pd.DataFrame({"text": [NASTY] * 4})
    mistakes(predictions, {"test": rows}).to_parquet(folder / "mistakes.parquet")
    assert "<script" not in write_page(folder).read_text()
    assert page(folder).count(NASTY) >= 3


def test_the_same_folder_gives_the_same_bytes(tmp_path):
    folder = fitted(tmp_path / "out", CLASSES, history=[(0, 1, "loss", 0.9), (0, 2, "loss", 0.8)])
    first = write_page(folder).read_bytes()
    assert write_page(folder, output=tmp_path / "else" / "out").read_bytes() == first


def test_a_folder_of_the_user_is_not_told(tmp_path):
    found = page(fitted(tmp_path / "out", CLASSES))
    assert "train.csv" in found
    assert "/home/me" not in found


def test_results_that_cannot_be_read_are_named(tmp_path):
    folder = fitted(tmp_path / "out", CLASSES)
    (folder / "metrics.json").write_text("{")
    with pytest.raises(UsageError, match="results of the fit cannot be read"):
        write_page(folder)
