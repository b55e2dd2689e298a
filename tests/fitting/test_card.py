"""The model card: what it says, what the hub reads of it, and that its Python runs."""

import re

import pytest
from huggingface_hub import ModelCard

from fit_helpers import save_tiny_bert, toy
from steadytune.fitting.card import model_card
from steadytune.fitting.main import fit


def scores(**changes):
    """Of one set, as `full_scores` records them."""
    return {
        "rows": 40,
        "f1": 0.8,
        "accuracy": 0.75,
        "intervals": {"f1": [0.7, 0.9], "accuracy": None},
        "baseline": {"f1": 0.6, "accuracy": 0.5},
        "classes": {"no": 20, "yes": 20},
        "selected": False,
        "notes": [],
        "per_class": {"no": {"precision": None, "recall": 0.0, "f1": 0.0, "support": 20}},
        "confusion": [[0, 20], [0, 20]],
        **changes,
    }


def card(metrics, **changes):
    recipe = {
        "model": "org/small", "methods": [{"name": "ema", "options": {"decay": 0.9}}], "kind": "classification",
        "labels": ["no", "yes"], "runs": 1, "combine": "best", "optimizer": "AdamW", "lr": 0.1, "batch_size": 8,
        "accumulation": 2, "steps": 5, "weight_decay": 0.0, "dropout": {}, "max_length": 32,
    }  # fmt: skip
    record = {
        "recipe": recipe | changes.pop("recipe", {}),
        "data": {
            "train": {"source": "/home/me/reviews.csv", "rows": 90, "labels": {"no": 60, "yes": 30}},
            "test": {"source": "/home/me/later.csv", "rows": 40, "labels": {"no": 20, "yes": 20}, "also_in_train": 3},
        },
        "columns": {"text": ["review"], "label": "stars"},
        "runs": [],
        "versions": {"steadytune": "1.0"},
        **changes,
    }
    return model_card(record, metrics, "f1")


def test_a_score_stands_beside_its_interval_its_baseline_its_class_and_its_file():
    text = card({"test": scores()})
    said = "test (later.csv, 40 rows): f1 (yes) 0.8000 (95 % interval 0.7000 to 0.9000) against 0.6000 of a constant"
    assert said in text
    assert "| test | 40 | f1 (yes) | 0.8000 | 0.7000 to 0.9000 | 0.6000 |" in text
    assert "| test | 40 | accuracy | 0.7500 | - | 0.5000 |" in text
    assert "| train | 90 | reviews.csv | no 60, yes 30 |" in text


def test_what_is_recorded_beside_the_metrics_is_no_metric():
    """Naive: a column for each key of a set, and a float format that dictionaries do not have."""
    shown = re.findall(r"^\| test \| 40 \| (\S+(?: \(yes\))?) \|", card({"test": scores()}), re.M)
    assert shown[:2] == ["f1 (yes)", "accuracy"]
    assert not {"intervals", "baseline", "classes", "selected", "notes", "per_class", "confusion"} & set(shown)


def test_scores_alone_make_a_card():
    """Scores as in folders from before intervals were recorded."""
    assert "- test (later.csv, 40 rows): f1 (yes) 0.8000\n" in card({"test": {"rows": 40, "f1": 0.8}})


def test_the_hub_reads_results_of_rows_that_selected_nothing():
    metrics = {"validation": scores(selected=True, f1=0.95), "test": scores()}
    head = ModelCard(card(metrics)).data
    assert head.base_model == "org/small"
    found = {(one.dataset_name, one.metric_type, one.metric_name): one.metric_value for one in head.eval_results}
    assert found == {("test", "f1", "f1 (yes)"): 0.8, ("test", "accuracy", "accuracy"): 0.75}


def test_an_undefined_score_is_no_result_of_the_hub():
    text = card({"test": scores(f1=None)})
    assert [one.metric_type for one in ModelCard(text).data.eval_results] == ["accuracy"]
    assert "| test | 40 | f1 (yes) | - |" in text


def test_folders_of_the_user_are_not_told(tmp_path):
    text = card({"test": scores()}, recipe={"model": str(tmp_path)})
    assert "/home/me" not in text
    assert str(tmp_path.parent) not in text
    assert ModelCard(text).data.base_model is None


def test_warnings_come_first_and_no_scores_are_said():
    text = card({}, warnings=["test: the model answers 'no' for all 40 rows"])
    assert text.index("**Warning:** test: the model answers 'no'") < text.index("## Usage")
    assert "not known: no rows were held out" in text


def test_names_of_classes_break_no_table():
    labels = {"a|b": 60, "<script>": 30}
    text = card({"test": scores()}, data={"train": {"source": "x.csv", "rows": 90, "labels": labels}})
    assert r"| a\|b 60, &lt;script> 30 |" in text


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize(
    ("label", "options"),
    [("label", {}), ("label", {"num_seeds": 2, "combine": "ensemble"}), ("score", {}), ("several", {}), ("pair", {})],
)
def test_the_python_of_the_card_predicts_what_the_model_does(bert, tmp_path, monkeypatch, capsys, label, options):
    table = toy(40, pair=label == "pair")
    table["several"] = [["kind", "long"][: 1 + i % 2] for i in range(len(table))]
    text, label = (["text", "other"], "label") if label == "pair" else (["text"], label)
    table = table[[*text, label]]
    result = fit(
        table, model=bert, text=text, label=label, output=tmp_path / "out", steps=3, batch_size=4, progress=False,
        **options,
    )  # fmt: skip
    code = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text(), re.S).group(1)
    monkeypatch.chdir(tmp_path / "out")
    capsys.readouterr()
    exec(code, {})
    printed = capsys.readouterr().out.strip()
    row = [f"A text to put in column {column}." for column in text]
    (expected,) = result.predict([tuple(row) if len(row) > 1 else row[0]])
    if label == "score":
        assert float(printed.strip("[]")) == pytest.approx(expected, abs=1e-5)
    else:
        assert printed == str([list(expected) if label == "several" else expected])
