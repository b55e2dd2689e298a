"""Several labels a row from table to predictions: each form goes in, trains the same model, and comes out again."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from fit_helpers import same, save_tiny_bert, toy, weights
from steadytune import FittedModel, dry_run, fit
from steadytune.cli import app
from steadytune.data.files import read_rows
from steadytune.data.forms import as_label
from steadytune.data.prepare import prepare
from steadytune.data.problem import MultiLabel
from steadytune.data.tables import Table
from steadytune.errors import UsageError
from steadytune.fitting.predict_file import predict_file

LABELS = [("food",), ("food", "price"), (), ("price",)]
QUICK = {"steps": 2, "batch_size": 4, "max_length": 8, "validation_share": 0.0, "save_steps": 0, "progress": False,
         "probe": False}  # fmt: skip
ONE, BOTH = {"label": "about"}, {"label": ["food", "price"]}
FORMS = {
    "lists": (lambda row: {"about": json.dumps(row)}, ONE),
    "separator": (lambda row: {"about": "|".join(row)}, {**ONE, "label_separator": "|"}),
    "columns": (lambda row: {"food": int("food" in row), "price": int("price" in row)}, BOTH),
}


def table(form: str, rows: int = 16, start: int = 0) -> pd.DataFrame:
    write = FORMS[form][0]
    about = pd.DataFrame([write(LABELS[i % 4]) for i in range(rows)])
    return pd.concat([toy(rows, start=start)[["text"]], about], axis=1)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def fitted(bert, tmp_path_factory):
    """The folder and result of a fit for each form."""
    made = {}
    for form, (_, options) in FORMS.items():
        folder = tmp_path_factory.mktemp("fits") / form
        tests = {"later": table(form, 8, 100)}
        made[form] = folder, fit(table(form), text="text", tests=tests, model=bert, output=folder, **options, **QUICK)
    return made


def test_every_form_trains_the_same_model_and_is_scored_alike(fitted):
    (first, result), *others = fitted.values()
    assert result.model.problem == MultiLabel(("food", "price"))
    for folder, other in others:
        assert same(weights(first), weights(folder))
        assert other.metrics == result.metrics
        assert other.evaluate(table(folder.name, 8, 100)) == result.metrics["later"]


@pytest.mark.parametrize("form", FORMS)
def test_the_folder_keeps_the_form(fitted, form):
    folder, result = fitted[form]
    options = FORMS[form][1]
    assert json.loads((folder / "steadytune.json").read_text())["columns"] == {"text": ["text"], **options}
    again = FittedModel.load(folder)
    assert again.form == result.model.form
    assert again.evaluate(table(form, 8, 100)) == result.metrics["later"]
    assert f"Label: {', '.join(np.atleast_1d(options['label']))} (food, price)" in (folder / "README.md").read_text()


def test_a_folder_of_before_has_no_separator_and_reads_lists(fitted, tmp_path):
    folder, result = fitted["lists"]
    assert "label_separator" not in json.loads((folder / "steadytune.json").read_text())["columns"]
    assert FittedModel.load(folder).evaluate(table("lists", 8, 100)) == result.metrics["later"]


class Known(FittedModel):
    """Answers to the text "row 6" with the labels of row 6 of `table`."""

    def _scores(self, frame, progress):
        labels = [LABELS[int(text.split()[1]) % 4] for text in frame["text"]]
        return 0.1 + 0.8 * self.problem.membership(labels)

    def _tokens(self, frame):
        return [1] * len(frame)


def known(form: str) -> Known:
    options = FORMS[form][1]
    separator = options.get("label_separator")
    return Known([None], None, MultiLabel(("food", "price")), label=as_label(options["label"]),
                 label_separator=separator)  # fmt: skip


def texts(rows: int) -> pd.DataFrame:
    return pd.DataFrame({"text": [f"row {i}" for i in range(rows)]})


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_what_predict_writes_is_read_as_the_training_table_was(tmp_path, form, ending):
    """Row 5 has no text, and so no prediction in any form."""
    options = FORMS[form][1]
    model = known(form)
    rows = texts(8).assign(id=range(8))
    rows.loc[5, "text"] = None
    rows.to_csv(tmp_path / "new.csv", index=False)
    predict_file(model, tmp_path / "new.csv", tmp_path / f"p{ending}", chunk=4)
    label = options["label"] if form == "columns" else "prediction"
    found = Table.of(tmp_path / f"p{ending}", ("text",), label, "t", label_separator=options.get("label_separator"))
    names = ["food", "price"] if form == "columns" else ["prediction"]
    assert list(found.frame) == ["text", "id", *names, "probability_food", "probability_price"]
    assert found.frame.iloc[5][[*names, "probability_food"]].isna().all()
    kept = found.frame.drop(5).reset_index(drop=True)
    rows = prepare(Table(kept, "t", ("text",), found.label, label_separator=found.label_separator), {},
                   validation_share=0).train  # fmt: skip
    assert rows["label"].tolist() == [LABELS[i % 4] for i in (0, 1, 2, 3, 4, 6, 7)]


@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_the_first_rows_may_all_be_without_labels(tmp_path, ending):
    """Naive: Parquet fixes the type of a column by its first rows, and a list without entries has none."""
    pd.DataFrame({"text": ["row 2", "row 6", "row 1"]}).to_csv(tmp_path / "new.csv", index=False)
    predict_file(known("lists"), tmp_path / "new.csv", tmp_path / f"p{ending}", chunk=2)
    found = read_rows(tmp_path / f"p{ending}")[0]["prediction"]
    assert [list(row) for row in found] == [[], [], ["food", "price"]]


def test_columns_of_0_and_1_are_written_as_whole_numbers(tmp_path):
    model = known("columns")
    (tmp_path / "new.csv").write_text('text\nrow 0\nrow 1\n""\n')
    predict_file(model, tmp_path / "new.csv", tmp_path / "p.csv")
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert lines[0] == "text,food,price,probability_food,probability_price"
    assert [line.split(",")[1:3] for line in lines[1:]] == [["1", "0"], ["1", "1"], ["", ""]]


def test_a_table_with_labels_of_its_own_keeps_them(tmp_path, caplog):
    model = known("columns")
    table("columns", 8).assign(text=texts(8)).to_csv(tmp_path / "new.csv", index=False)
    with caplog.at_level("INFO", "steadytune"):
        predict_file(model, tmp_path / "new.csv", tmp_path / "p.csv", chunk=3)
    found = pd.read_csv(tmp_path / "p.csv")
    assert found["food"].tolist() == found["prediction_food"].tolist() == table("columns", 8)["food"].tolist()
    assert [message for message in caplog.messages if "prediction_food" in message] == [
        f"{tmp_path / 'new.csv'}: the table has label columns of its own, predictions are in prediction_food, "
        "prediction_price"
    ]
    predict_file(model, tmp_path / "new.csv", tmp_path / "q.csv", keep=["text"])
    assert list(pd.read_csv(tmp_path / "q.csv"))[:3] == ["text", "food", "price"]


IN_MEMORY = {
    "lists": {"prediction": [["food"], ["food", "price"], [], ["price"]]},
    "separator": {"prediction": ["food", "food|price", "", "price"]},
    "columns": {"food": [1, 1, 0, 0], "price": [0, 1, 0, 1]},
}


@pytest.mark.parametrize("form", FORMS)
def test_tables_in_memory_come_out_in_the_form_too(form, monkeypatch):
    monkeypatch.setattr(Known, "_look_at", lambda self, frame: None)
    found = known(form).predict_table(texts(4))
    assert found.drop(columns=["probability_food", "probability_price"]).to_dict("list") == IN_MEMORY[form]


@pytest.mark.parametrize("form", FORMS)
def test_the_command_line_goes_from_table_to_table(form, bert, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table(form).to_csv("train.csv", index=False)
    table(form, 8, 100).to_csv("later.csv", index=False)
    options = FORMS[form][1]
    words = [word for name in np.atleast_1d(options["label"]) for word in ("--label", name)]
    if "label_separator" in options:
        words += ["--label-separator", options["label_separator"]]
    done = CliRunner().invoke(app, [
        "fit", "train.csv", "--text", "text", *words, "--test", "later.csv", "--model", bert, "--output", "out",
        "--steps", "2", "--batch-size", "4", "--validation-share", "0", "--quiet",
    ])  # fmt: skip
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["predict", "out", "later.csv", "--keep", "text", "--output", "p.csv", "--quiet"])
    assert done.exit_code == 0, done.output
    assert Path("p.csv").read_text().startswith("text,food,price," if form == "columns" else "text,prediction,")


def test_a_dry_run_takes_the_same_labels(bert, tmp_path):
    for form, (_, options) in FORMS.items():
        taken = dry_run(table(form), text="text", model=bert, output=tmp_path / form, **options, **QUICK)
        assert taken.steps == 2


def test_a_merge_scores_tables_of_the_form(fitted, tmp_path, monkeypatch):
    from steadytune.fitting.merge_folders import merge_folders

    for form, (folder, result) in fitted.items():
        table(form, 8, 100).to_csv(tmp_path / f"{form}.csv", index=False)
        merge_folders([folder, folder], tmp_path / form, validation=[tmp_path / f"{form}.csv"])
        merged = json.loads((tmp_path / form / "metrics.json").read_text())["sets"]["validation"]
        assert merged["f1_micro"] == pytest.approx(result.metrics["later"]["f1_micro"])
        assert FittedModel.load(tmp_path / form).form == result.model.form


def test_a_threshold_that_no_class_reaches_leaves_rows_without_labels(fitted, tmp_path):
    """An empty list of labels is a prediction, not a row without one."""
    folder, _ = fitted["separator"]
    model = FittedModel.load(folder)
    model.problem = model.problem.at(0.999)
    toy(4)[["text"]].to_csv(tmp_path / "new.csv", index=False)
    done = predict_file(model, tmp_path / "new.csv", tmp_path / "p.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [row["prediction"] for row in rows] == [""] * 4
    assert (done.rows, done.empty) == (4, [])


def test_a_separator_is_text(bert, tmp_path):
    with pytest.raises(UsageError, match="label_separator must be text, got 1"):
        fit(table("separator"), model=bert, output=tmp_path / "out", label="about", label_separator=1, **QUICK)


def test_other_values_in_a_test_table_are_named(fitted):
    _, result = fitted["columns"]
    with pytest.raises(UsageError, match=r"label column 'price' is neither 0 nor 1 \('3'\) in 4 of 4 rows"):
        result.evaluate(table("columns", 4).assign(price=3))
