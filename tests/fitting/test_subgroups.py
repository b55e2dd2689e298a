"""Subgroups of rows: how they are read and scored, what selects by the worst, and methods that read them in `fit`."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from fit_helpers import save_tiny_bert, toy
from steadytune import EasyAdapt, FittedModel, GroupWeights, SteadyClassifier, fit
from steadytune.bench.own_tables import OwnTables
from steadytune.data.metrics import METRICS
from steadytune.data.prepare import prepare
from steadytune.data.problem import Classification
from steadytune.data.scores import best_threshold, full_scores, worst_first, worst_value
from steadytune.data.tables import Table, examples
from steadytune.errors import UsageError
from steadytune.fitting.plan import make_plan, make_setup, open_model, runs

QUICK = {"steps": 8, "batch_size": 8, "lr": 5e-3, "save_steps": 0, "progress": False, "probe": False}
COLUMNS = {"text": "text", "label": "label"}
ACCURACY = METRICS["classification"][0]


def table(rows=60, **options):
    """Two sources, of which the second has a quarter of the rows."""
    return toy(rows, **options).assign(source=["web" if i % 4 else "mail" for i in range(rows)])


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


# ---- reading ----------------------------------------------------------------------------------------------------


def test_one_column_names_subgroups_by_its_values_and_several_by_all_of_them():
    frame = table(8)
    assert examples(Table(frame, "t", subgroup=("source",)))["subgroup"].tolist()[:2] == ["mail", "web"]
    crossed = examples(Table(frame, "t", subgroup=("source", "label")))["subgroup"]
    assert crossed.tolist()[:2] == ["source=mail, label=down", "source=web, label=up"]


def test_length_and_overlap_are_made_of_the_texts_where_no_column_is_called_so():
    """Ranges are fixed: naive ones, cut at the table's own quantiles, would mean other lengths in another table."""
    lengths = [1, 8, 9, 16, 17, 128, 129]
    frame = pd.DataFrame({"text": ["word " * n for n in lengths], "label": ["x"] * 7})
    assert examples(Table(frame, "t", text=("text",), label="label", subgroup=("length",)))["subgroup"].tolist() == [
        "0 to 8 words", "0 to 8 words", "9 to 16 words", "9 to 16 words", "17 to 32 words", "65 to 128 words",
        "above 128 words",
    ]  # fmt: skip
    pairs = pd.DataFrame(
        {"a": ["The dog saw a cat."] * 3, "b": ["a dog", "a dog sat", "it ran, the cow"], "label": [1, 0, 1]}
    )
    crossed = Table(pairs, "t", text=("a", "b"), label="label", subgroup=("overlap", "label"))
    assert examples(crossed)["subgroup"].tolist() == [
        "overlap=all, label=1", "overlap=half or more, label=0", "overlap=below half, label=1",
    ]  # fmt: skip
    own = Table(pairs.assign(length=["x", "y", "x"]), "t", text=("a", "b"), label="label", subgroup=("length",))
    assert examples(own)["subgroup"].tolist() == ["x", "y", "x"]
    with pytest.raises(UsageError, match="overlap is of pairs of texts, the rows have one text"):
        examples(Table(frame, "t", text=("text",), label="label", subgroup=("overlap",)))


def test_a_test_table_has_lengths_too(bert, tmp_path):
    result = fit(table(), model=bert, output=tmp_path / "o", tests={"test": toy(12, start=100)}, subgroup="length",
                 **QUICK, **COLUMNS)  # fmt: skip
    assert set(result.metrics["test"]["subgroups"]) == {"0 to 8 words"}
    again = FittedModel.load(result.output).evaluate(toy(12, start=100))
    assert again["subgroups"] == result.metrics["test"]["subgroups"]


def test_a_column_of_subgroups_is_neither_text_nor_label():
    """Naive: a column with few values beside an unknown label is a second candidate for it."""
    frame = table(40).rename(columns={"label": "verdict"}).drop(columns="score")
    data = prepare(Table.of(frame, None, None, "train", subgroup="source"), {}, validation_share=0.25)
    assert data.table.label == "verdict"
    assert {"web", "mail"} == set(data.train["subgroup"]) | set(data.tests["validation"]["subgroup"])
    assert data.describe()["train"]["subgroups"] == data.train["subgroup"].value_counts().to_dict()


BAD = {
    "no such column": ("sorce", None, "column 'sorce'"),
    "a text": ("text", None, "subgroup and text must be different"),
    "empty cells": ("source", {3: None}, "subgroup column 'source'.*empty"),
    "a number of each row": ("id", None, "'id' make 60 subgroups of 60 rows, more than 50"),
}


@pytest.mark.parametrize(("column", "cells", "part"), BAD.values(), ids=BAD)
def test_columns_that_name_no_subgroups_are_refused(column, cells, part):
    frame = table().assign(id=range(60))
    for row, value in (cells or {}).items():
        frame.loc[row, column] = value
    with pytest.raises(UsageError, match=part):
        make_plan(frame, model="m", subgroup=column, **COLUMNS)


def test_a_test_table_without_the_column_has_no_subgroups():
    tests = {"with": table(20, start=100), "without": toy(20, start=200)}
    tables = {name: Table(frame, name) for name, frame in tests.items()}
    data = prepare(Table(table(), "train", subgroup=("source",)), tables, validation_share=0)
    assert [name for name, rows in data.tests.items() if "subgroup" in rows] == ["with"]


# ---- scores -----------------------------------------------------------------------------------------------------

GOLD = np.array(list("aaaabbbb"), dtype=object)
GIVEN = np.array(list("aaabbbbb"), dtype=object)
PARTS = np.array(["x", "x", "y", "y", "x", "x", "y", "z"], dtype=object)


def scored(**options):
    chances = np.where((GIVEN == "a")[:, None], [0.9, 0.1], [0.2, 0.8])
    return full_scores(Classification(("a", "b")), GOLD, GIVEN, chances, **options)


def test_each_subgroup_is_scored_as_if_it_were_the_set():
    """Two of the three rows of y are right; one row of one class has scores, and intervals where they are defined."""
    scores = scored(subgroups=PARTS)
    assert {name: part["rows"] for name, part in scores["subgroups"].items()} == {"x": 4, "y": 3, "z": 1}
    assert {name: part["accuracy"] for name, part in scores["subgroups"].items()} == {"x": 1, "y": 2 / 3, "z": 1}
    low, high = scores["subgroups"]["y"]["intervals"]["accuracy"]
    assert low < 0.25 < 0.9 < high
    assert scores["subgroups"]["z"]["roc_auc"] is None
    assert [name for name, _ in worst_first(scores, "accuracy")] == ["y", "x", "z"]
    assert [name for name, _ in worst_first(scores, "roc_auc")][-1] == "z"
    assert worst_first(scores, "log_loss")[0][0] == "y", "an error is worst where it is largest"
    assert "subgroups" not in scored()
    json.dumps(scores)


def test_the_worst_value_is_that_of_the_worst_subgroup():
    names = ("a", "b")
    assert worst_value(ACCURACY, GOLD, GIVEN, names, None) == pytest.approx(7 / 8)
    assert worst_value(ACCURACY, GOLD, GIVEN, names, PARTS) == pytest.approx(2 / 3)


def test_a_threshold_can_be_best_for_the_worst_subgroup():
    """One threshold serves both subgroups first; then the best for the worst one is wrong on a quarter of its rows."""
    problem = Classification(("a", "b"))
    gold = np.array(list("ab" * 6), dtype=object)
    positive = np.array([0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.1, 0.9, 0.45, 0.9, 0.45, 0.48])
    parts = np.array(["x"] * 8 + ["y"] * 4, dtype=object)
    chances = np.stack([1 - positive, positive], axis=1)
    alone, worst = (best_threshold(problem, gold, chances, ACCURACY, p) for p in (None, parts))
    for found in (alone, worst):
        assert 0.45 < found < 0.48
    flipped = np.where(np.arange(12) == 11, 0.2, positive)  # now no threshold serves both
    chances = np.stack([1 - flipped, flipped], axis=1)
    found = best_threshold(problem, gold, chances, ACCURACY, parts)
    right = problem.at(found).decide(chances) == gold
    assert min(right[parts == "x"].mean(), right[parts == "y"].mean()) == pytest.approx(0.75)


# ---- fit --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result(bert, tmp_path_factory):
    methods = [GroupWeights(every=1, start=0.0), EasyAdapt(drop=0.0)]
    return fit(
        table(), model=bert, output=tmp_path_factory.mktemp("fit") / "out", tests={"test": table(24, start=100)},
        subgroup="source", methods=methods, **COLUMNS, **QUICK,
    )  # fmt: skip


def test_every_report_shows_each_subgroup(result):
    parts = result.metrics["test"]["subgroups"]
    assert {name: part["rows"] for name, part in parts.items()} == {"mail": 6, "web": 18}
    rows = result.predictions[(result.predictions["set"] == "test") & (result.predictions["subgroup"] == "web")]
    assert parts["web"]["accuracy"] == pytest.approx((rows["label"] == rows["prediction"]).mean())
    for file in ("README.md", "report.html"):
        text = (result.output / file).read_text(encoding="utf-8")
        assert "mail" in text
        assert f"{parts['web']['intervals']['accuracy'][0]:.4f}" in text
    record = json.loads((result.output / "steadytune.json").read_text())
    assert record["data"]["train"]["subgroups"].keys() == {"mail", "web"}
    assert record["columns"]["subgroup"] == ["source"]


def test_a_folder_scores_subgroups_of_tables_that_have_the_column(result):
    held = FittedModel.load(result.output)
    assert held.evaluate(table(24, start=100))["subgroups"] == result.metrics["test"]["subgroups"]
    assert "subgroups" not in held.evaluate(toy(24, start=100))


def test_methods_get_the_numbers_of_the_subgroups(bert, tmp_path):
    """Naive: numbers in the order of the rows of a fold, so that folds disagree on them."""
    plan = make_plan(
        table(), model=bert, subgroup="source", methods=["group_weights:least=5", "easy_adapt"], **COLUMNS, **QUICK
    )
    setup = make_setup(plan, open_model(plan), tmp_path)
    features = setup.features(plan.data.train.iloc[::-1])
    wanted = [int(name == "web") for name in plan.data.train["subgroup"]][::-1]
    assert [f["subgroup"] for f in features] == [f["domain"] for f in features] == wanted
    stranger = plan.data.train.head(1).assign(subgroup="fax")
    assert setup.features(stranger)[0]["subgroup"] == -1
    (job,) = runs(plan)
    run = setup.trainer(job, job.seeds, tmp_path).run
    assert run[EasyAdapt].count == 2
    assert run[GroupWeights].rows.tolist() == pytest.approx([0.25, 0.75], abs=0.05)


def test_without_methods_that_read_them_batches_hold_no_subgroups(bert, tmp_path):
    plan = make_plan(table(), model=bert, subgroup="source", **COLUMNS, **QUICK)
    setup = make_setup(plan, open_model(plan), tmp_path)
    assert "subgroup" not in setup.features(plan.data.train)[0]


def test_a_subgroup_of_one_row_is_merged_and_one_alone_is_refused_before_training(bert, tmp_path):
    frame = table().assign(source=["web"] * 59 + ["fax"])
    with pytest.raises(UsageError, match="GroupWeights needs two subgroups of 10 rows or more, here are subgroups of"):
        fit(frame, model=bert, output=tmp_path / "a", subgroup="source", methods="group_weights", **COLUMNS, **QUICK,
            validation_share=0)  # fmt: skip
    frame["source"] = ["web"] * 30 + ["mail"] * 29 + ["fax"]
    fit(frame, model=bert, output=tmp_path / "b", subgroup="source", methods="group_weights", **COLUMNS, **QUICK,
        validation_share=0)  # fmt: skip


def test_the_worst_subgroup_selects(bert, tmp_path):
    """The curve is that of the worst subgroup of the validation rows."""
    validation = table(24, start=300)
    plan = make_plan(
        table(), model=bert, subgroup="source", validation=validation, evaluations=2, worst_subgroup=True, **COLUMNS,
        **QUICK,
    )  # fmt: skip
    setup = make_setup(plan, open_model(plan), tmp_path)
    (job,) = runs(plan)
    wrong = np.array(
        ["up" if name == "mail" else row for name, row in zip(job.select["subgroup"], job.select["label"], strict=True)]
    )

    class Predicted:
        predictions = np.eye(2)[[plan.data.problem.names.index(label) for label in wrong]] * 9
        label_ids = np.array(plan.data.problem.ids(job.select["label"].tolist()))

    mail = job.select[job.select["subgroup"] == "mail"]
    assert setup.measure(job.select, Predicted) == {"accuracy": pytest.approx((mail["label"] == "up").mean())}
    trained = setup.train(job)
    assert len(trained.curve) == 2


def test_what_cannot_select_by_the_worst_subgroup_is_refused():
    with pytest.raises(UsageError, match=r"worst_subgroup selects by the subgroup .*--subgroup"):
        make_plan(table(), model="m", evaluations=2, worst_subgroup=True, **COLUMNS)
    with pytest.raises(UsageError, match="worst_subgroup selects nothing here"):
        make_plan(table(), model="m", subgroup="source", worst_subgroup=True, **COLUMNS)
    for method in ("group_weights", "easy_adapt"):
        with pytest.raises(UsageError, match="reads the subgroup of each row: name the column"):
            make_plan(table(), model="m", methods=method, **COLUMNS)


# ---- other doors ------------------------------------------------------------------------------------------------


def test_estimators_take_subgroups_as_rows(bert):
    frame = table()
    settings = {"steps": 2, "validation_share": 0.2, "options": {"probe": False}}
    found = SteadyClassifier(bert, methods="easy_adapt", **settings).fit(
        frame["text"], frame["label"], subgroups=frame["source"]
    )
    assert found.result_.metrics["validation"]["subgroups"].keys() == {"mail", "web"}
    with pytest.raises(UsageError, match="X has 60 rows, subgroups has 3"):
        SteadyClassifier(bert).fit(frame["text"], frame["label"], subgroups=["a"] * 3)
    with pytest.raises(UsageError, match=r"options hold 'subgroup', which is told by subgroups of fit\(X"):
        SteadyClassifier(bert, options={"subgroup": "source"}).fit(frame["text"], frame["label"])


def test_own_tables_of_a_study_have_subgroups(tmp_path):
    table().to_csv(tmp_path / "t.csv", index=False)
    own = OwnTables("mine", str(tmp_path / "t.csv"), text=("text",), label="label", subgroup=("source",))
    train, _ = own.read()
    assert set(examples(train)["subgroup"]) == {"web", "mail"}
    assert pd.Series(examples(own.cut(0)[0])["subgroup"]).equals(examples(train)["subgroup"])
    assert dataclasses.replace(own, subgroup=None).read()[0].subgroup == ()


def test_a_table_of_ones_own_takes_the_parts_that_a_fit_names():
    """Naive: a Table stays as it is, and subgroup, label and kind are ignored without a word."""
    own = Table(table(), "the file")
    plan = make_plan(own, model="m", subgroup=["source", "length"], group="source", validation_share=0.0)
    assert set(plan.data.train) >= {"subgroup", "group"}
    assert all(name.startswith("source=") for name in plan.data.train["subgroup"])
    for name, value in {"label": "source", "text": "label", "kind": "regression", "label_separator": "|"}.items():
        with pytest.raises(UsageError, match=f"the file: this Table says itself what its {name} is"):
            make_plan(own, model="m", **{name: value})


def test_easy_adapt_beside_meta_semi_takes_texts_without_labels_for_rows_of_no_domain(bert, tmp_path):
    """Naive: the first step fails, because texts without labels have no domain."""
    texts = toy(20, start=100)[["text"]]
    result = fit(
        table(), model=bert, output=tmp_path / "out", subgroup="source", unlabelled=texts,
        methods=["easy_adapt", "meta_semi"], **COLUMNS, **QUICK | {"steps": 2},
    )  # fmt: skip
    assert np.isfinite(result.predict_proba(["good film"])).all()
