"""Texts without labels: what enters, what stays out, and one error for each thing that is wrong."""

from __future__ import annotations

import pandas as pd
import pytest

from steadytune.data.prepare import Data, prepare
from steadytune.data.tables import Table
from steadytune.errors import UsageError


def table(rows: int = 40, **more) -> pd.DataFrame:
    return pd.DataFrame({"text": [f"text {i}" for i in range(rows)], "label": ["a", "b"] * (rows // 2), **more})


def pool(*numbers: int, **more) -> pd.DataFrame:
    return pd.DataFrame({"text": [f"text {i}" for i in numbers], **more})


def data(train=None, tests=None, **options) -> Data:
    frame = table() if train is None else train
    named = {name: Table.of(test, None, None, name) for name, test in (tests or {}).items()}
    return prepare(Table.of(frame, None, None, "train"), named, **{"validation_share": 0.25, **options})


def test_texts_of_test_and_validation_sets_and_of_labelled_rows_never_enter():
    tests = {"test": table(4).assign(text=["text 100", "text 101", "text 102", "text 103"])}
    given = pool(*range(40), 100, 101, 200, 201, 200)
    found = data(tests=tests, unlabelled=given)
    assert found.unlabelled.rows["text"].tolist() == ["text 200", "text 201"]
    assert found.unlabelled.left_out == {"tests": 12, "labelled": 30, "repeated": 1}
    assert "12 in a test or validation set" in str(found.unlabelled)


def test_a_pair_is_one_text():
    frame = table(text_pair=[f"other {i}" for i in range(40)])
    given = pool(0, 1, text_pair=["other 0", "new"])
    assert data(frame, unlabelled=given, validation_share=0.0).unlabelled.rows.values.tolist() == [["text 1", "new"]]


def test_blank_rows_have_no_label_and_the_others_keep_their_numbers(tmp_path):
    frame = table()
    frame.loc[[1, 7], "label"] = None
    frame.loc[12, "label"] = " "
    frame.to_csv(tmp_path / "t.csv", index=False)
    found = data(str(tmp_path / "t.csv"), unlabelled="blank")
    assert found.unlabelled.rows["text"].tolist() == ["text 1", "text 7", "text 12"]
    numbers = sorted([*found.train.index, *found.tests["validation"].index])
    assert numbers == [i for i in range(40) if i not in (1, 7, 12)]
    assert found.train["text"].tolist() == [f"text {i}" for i in found.train.index]
    with pytest.raises(UsageError, match=r"empty in 3 of 40 rows.*--unlabelled blank"):
        data(str(tmp_path / "t.csv"))
    with pytest.raises(UsageError, match=r"empty in 3 of 40 rows .*take them out\.$"):  # no source of such texts
        data(tests={"test": frame})


@pytest.mark.parametrize("column", ["label", "group", "subgroup"])
def test_an_error_beside_blank_rows_names_the_row_of_the_whole_table(column):
    frame = table(group=range(40), subgroup=["a", "b"] * 20).assign(label=[0.5, 1.5] * 20).astype(object)
    frame.loc[[1, 7], "label"] = None
    frame.loc[12, column] = "much" if column == "label" else None
    given = Table.of(frame, None, "label", "train", "regression", "group", subgroup="subgroup")
    with pytest.raises(UsageError, match=rf"{column}' is .* in 1 of 38 rows \(rows counted from 0: 12\)"):
        prepare(given, {}, unlabelled="blank")


def test_blank_rows_of_a_table_with_a_repeated_index_are_all_read():
    frame = pd.concat([table(20), pool(*range(20, 40)).assign(label=[None] * 10 + ["a", "b"] * 5)])
    found = prepare(Table(frame, "rows"), {}, unlabelled="blank", validation_share=0.0)
    assert found.unlabelled.rows["text"].tolist() == [f"text {i}" for i in range(20, 30)]
    assert found.train.index.tolist() == [*range(20), *range(30, 40)]


def test_blank_rows_beside_a_column_of_splits():
    frame = table(split=["train"] * 30 + ["test"] * 10)
    frame.loc[[3, 35], "label"] = None
    found = data(frame, unlabelled="blank", validation_column="split", validation_share=0.0)
    assert found.unlabelled.rows["text"].tolist() == ["text 3", "text 35"]
    assert (len(found.train), len(found.tests["test"])) == (29, 9)


def test_the_rest_is_what_a_draw_leaves_over_without_its_labels():
    found = data(train_size=20, validation_share=0.0, unlabelled="rest")
    assert {*found.unlabelled.rows["text"]} == {*table()["text"]} - {*found.train["text"]}
    assert list(found.unlabelled.rows) == ["text"]
    assert len(found.unlabelled.rows) == 20


def test_a_draw_of_texts_follows_the_seed():
    draws = [data(unlabelled=pool(*range(100, 140)), unlabelled_size=5, seed=seed).unlabelled for seed in (0, 0, 1)]
    first, again, other = (draw.rows["text"].tolist() for draw in draws)
    assert len(first) == 5
    assert first == again != other


def test_several_sources_follow_each_other():
    frame = table()
    frame.loc[0, "label"] = None
    found = data(frame, unlabelled=[pool(50), "blank"])
    assert found.unlabelled.rows["text"].tolist() == ["text 50", "text 0"]


def no_texts() -> pd.DataFrame:
    return pd.DataFrame({"text": pd.Series([], dtype=object)})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unlabelled": pool(50, 51, label=["a", None])}, "unlabelled rows hold labels, in 1 of 2 rows of column 'lab"),
        ({"unlabelled": pd.DataFrame({"body": ["x"]})}, "no column 'text'. Rows without labels have the text columns"),
        ({"unlabelled": no_texts()}, "the table has no rows"),
        ({"unlabelled": pool(50).assign(text=[" "])}, "text column 'text' is empty in 1 of 1 rows"),
        ({"unlabelled": "missing.csv"}, "missing.csv"),
        ({"unlabelled": pool(*range(40))}, "no text without a label is left"),
        ({"unlabelled": "blank"}, "'label' has a label in all 40 rows"),
        ({"unlabelled": "rest"}, "none are: give train_size"),
        ({"unlabelled": ["blank", "blank"]}, "'blank' is given twice"),
        ({"unlabelled": pool(50), "unlabelled_size": 2}, r"unlabelled_size must lie between 1 and 1 \(all\), got 2"),
        ({"unlabelled_size": 2}, "unlabelled_size 2 is for texts without labels"),
    ],
)
def test_what_is_wrong_is_one_error(options, words):
    with pytest.raises(UsageError, match=words):
        data(**options)


def test_an_empty_cell_of_several_labels_is_an_answer():
    frame = table().assign(label=["a|b", "a", "", "b"] * 10)
    with pytest.raises(UsageError, match="an empty cell means that none applies"):
        prepare(Table.of(frame, None, None, "train", label_separator="|"), {}, unlabelled="blank")
