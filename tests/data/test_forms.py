"""Several labels a row: lists, JSON lists, separators and columns of 0 and 1 are read alike and written again."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from steadytune.data.files import read_table
from steadytune.data.forms import Joined, OneCell, OneHot, as_label, form_of, joined_names
from steadytune.data.guards import inspect
from steadytune.data.prepare import Data, prepare
from steadytune.data.problem import MultiLabel
from steadytune.data.tables import Table, resolve
from steadytune.errors import UsageError

LABELS = [("food",), ("food", "price"), (), ("price",)] * 4
TEXTS = [f"a good film number {i}" for i in range(len(LABELS))]


def has(name: str, absent, present) -> list:
    return [present if name in row else absent for row in LABELS]


def columns(absent, present) -> dict[str, list]:
    return {"food": has("food", absent, present), "price": has("price", absent, present)}


ONE = {"label": "about"}
BOTH = {"label": ["food", "price"]}
FORMS = {
    "lists": ({"about": [list(row) for row in LABELS]}, ONE),
    "JSON lists": ({"about": [json.dumps(row) for row in LABELS]}, ONE),
    "written lists": ({"about": [str(list(row)) for row in LABELS]}, ONE),
    "separator": ({"about": ["|".join(row) for row in LABELS]}, {**ONE, "label_separator": "|"}),
    "spaces": ({"about": [" , ".join(row) for row in LABELS]}, {**ONE, "label_separator": ","}),
    "numbers": (columns(0, 1), BOTH),
    "fractions": (columns(0.0, 1.0), BOTH),
    "truth": (columns(False, True), BOTH),
    "words": (columns("no", "Yes "), BOTH),
}


def table(given: dict, options: dict, kind="auto", origin="t.csv") -> Table:
    frame = pd.DataFrame({"text": TEXTS[: len(next(iter(given.values())))], **given})
    return Table(frame, origin, label=as_label(options["label"]), label_separator=options.get("label_separator"),
                 kind=kind)  # fmt: skip


def read(given: dict, options: dict, **more) -> Data:
    return prepare(table(given, options, **more), {}, validation_share=0)


@pytest.mark.parametrize("ending", [".csv", ".tsv", ".jsonl", ".parquet", "frame"])
@pytest.mark.parametrize(("given", "options"), FORMS.values(), ids=FORMS)
def test_every_form_of_every_file_is_read_alike(tmp_path, given, options, ending):
    frame = pd.DataFrame({"text": TEXTS, **given})
    source = tmp_path / f"t{ending}"
    if ending == "frame":
        source = frame
    elif ending == ".parquet":
        frame.to_parquet(source)
    elif ending == ".jsonl":
        frame.to_json(source, orient="records", lines=True)
    else:
        frame.to_csv(source, index=False, sep="\t" if ending == ".tsv" else ",")
    train = Table.of(source, ("text",), options["label"], "train", label_separator=options.get("label_separator"))
    again = Table.of(source, None, None, "test")
    data = prepare(train, {"test": again}, validation_share=0)
    assert data.problem == MultiLabel(("food", "price"))
    assert data.train["label"].tolist() == LABELS
    assert data.tests["test"]["label"].tolist() == LABELS


def test_a_cell_is_cut_at_the_separator_and_a_label_counts_once():
    form = Joined(("about",), "|")
    cells = [" food | price|food", "food||", "|", None, np.nan, "", 1.0, "1|2"]
    assert form.read(pd.DataFrame({"about": pd.Series(cells, dtype=object)}), "t").tolist() == [
        ["food", "price"], ["food"], [], [], [], [], ["1"], ["1", "2"],
    ]  # fmt: skip
    assert Joined(("about",), " ").split("food  price") == ["food", "price"]


def test_columns_are_classes_in_their_order():
    data = read({"price": has("price", 0, 1), "food": has("food", 0, 1)}, {"label": ["price", "food"]})
    assert data.problem.names == ("price", "food")
    assert data.train["label"].tolist()[:4] == [("food",), ("price", "food"), (), ("price",)]


def test_json_escapes_are_read_as_the_characters_they_stand_for():
    labels = [["caf\u00e9"], ["\U0001f600", "caf\u00e9"]] * 2
    written = [json.dumps(row) for row in labels]
    assert "\\ud83d" in written[1]
    assert read({"about": written}, ONE).problem.names == ("caf\u00e9", "\U0001f600")


WRITTEN = [("food",), None, (), ("food", "price")]
PREDICTIONS = pd.Series(WRITTEN, index=[4, 5, 6, 7], dtype=object)
OUT = {
    "lists": (OneCell(("about",)), False, {"prediction": [["food"], None, [], ["food", "price"]]}),
    "JSON": (OneCell(("about",)), True, {"prediction": ['["food"]', None, "[]", '["food", "price"]']}),
    "separator": (Joined(("about",), "; "), True, {"prediction": ["food", None, "", "food; price"]}),
    "columns": (OneHot(("food", "price")), True, {"food": [1, None, 0, 1], "price": [0, None, 0, 1]}),
}


@pytest.mark.parametrize(("form", "as_text", "expected"), OUT.values(), ids=OUT)
def test_predictions_are_written_as_the_labels_came(form, as_text, expected):
    found = form.write(PREDICTIONS, as_text=as_text)
    assert found.to_dict("list") == expected
    assert found.index.tolist() == [4, 5, 6, 7]


def test_columns_that_the_table_has_too_are_called_predictions():
    found = OneHot(("food", "price")).write(PREDICTIONS, ["text", "price"])
    assert list(found) == ["prediction_food", "prediction_price"]


def test_one_label_a_row_is_written_as_it_is():
    form = OneCell(("label",))
    assert form.write(pd.Series([0.5, np.nan]))["prediction"].dtype == float
    assert form.write(pd.Series(["a", "b"], dtype=object))["prediction"].tolist() == ["a", "b"]


@pytest.mark.parametrize("given", [None, "about", ["about"], ("food", "price"), pd.Index(["food", "price"])])
def test_a_form_comes_back_from_its_record(given):
    label = as_label(given)
    if label is None:
        return
    for separator in (None, "|") if isinstance(label, str) else (None,):
        record = json.loads(json.dumps(form_of(label, separator).record()))
        assert form_of(as_label(record["label"]), record.get("label_separator")) == form_of(label, separator)


BAD = {
    "another number": ({**columns(0, 1), "price": [0, 1, 2, 1] * 4}, BOTH, "'price' is neither 0 nor 1 ('2') in 4 of"),
    "another word": ({**columns(0, 1), "price": ["x"] * 16}, BOTH, "'price' is neither 0 nor 1 ('x') in 16 of 16 rows"),
    "a missing cell": ({**columns(0, 1), "price": [0, None, 0, 1] * 4}, BOTH, "'price' is empty in 4 of 16 rows"),
    "a class of no row": ({**columns(0, 1), "price": [0] * 16}, BOTH, "'price' is 0 in all 16 training rows: leave"),
    "all alike": (columns(1, 1), BOTH, "columns 'food', 'price' holds the same classes in every row"),
    "no such column": (columns(0, 1), {"label": ["food", "prise"]}, "no column 'prise'. Did you mean 'price'"),
    "a column twice": (columns(0, 1), {"label": ["food", "food"]}, "label column 'food' is given twice"),
    "text as label": (columns(0, 1), {"label": ["food", "text"]}, "must be different columns, got text, food, text"),
    "separator and columns": (columns(0, 1), {**BOTH, "label_separator": "|"}, "'|') is for one label column, got 2"),
    "empty separator": ({"about": ["a|b", "a"] * 8}, {**ONE, "label_separator": ""}, "must not be empty"),
    "another separator": ({"about": ["a|b", "a"] * 8}, {**ONE, "label_separator": ";"}, "';' is in none of 16 rows"),
    "lists and separator": ({"about": [["a"], ["b"]] * 8}, {**ONE, "label_separator": "|"}, "a list already (['a'])"),
    "no labels at all": ({"about": [""] * 16}, {**ONE, "label_separator": "|"}, "is in none of 16 rows"),
    "a list in a list": ({"about": [[["a"], "b"], ["b"]] * 8}, ONE, "a list that holds lists or objects in 8 of 16"),
    "a blank in a list": ({"about": [["a", " "], ["b"]] * 8}, ONE, "a list with an empty entry in 8 of 16 rows"),
    "null in JSON": ({"about": ['["a", null]', '["b"]'] * 8}, ONE, "a list with an empty entry in 8 of 16 rows"),
}  # fmt: skip


@pytest.mark.parametrize(("given", "options", "part"), BAD.values(), ids=BAD)
def test_labels_that_are_not_of_the_form_are_one_clear_error(given, options, part):
    with pytest.raises(UsageError) as caught:
        read(given, options)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("options", [BOTH, {**ONE, "label_separator": "|"}])
def test_one_label_a_row_is_not_read_from_several(options, kind):
    with pytest.raises(UsageError, match=f"kind {kind} takes .*leave --kind out"):
        read({**columns(0, 1), "about": ["a|b", "a"] * 8}, options, kind=kind)


def test_a_test_table_may_lack_a_class_and_not_a_column():
    train, few = table(columns(0, 1), BOTH), table({"food": [1, 0], "price": [0, 0]}, BOTH)
    data = prepare(train, {"few": few}, validation_share=0)
    assert data.tests["few"]["label"].tolist() == [("food",), ()]
    with pytest.raises(UsageError, match=r"t\.csv: no column 'price'"):
        prepare(train, {"few": table({"food": [1, 0]}, BOTH)}, validation_share=0)


def messages(given, options) -> str:
    return "\n".join(finding.message for finding in inspect(read(given, options)))


def test_what_may_be_meant_otherwise_is_said():
    one_each = {"food": [1, 0] * 8, "price": [0, 1] * 8}
    assert "there is exactly one in 16 of 16 rows" in messages(one_each, BOTH)
    assert "the class 'food' is in 16 of 16 rows" in messages({"food": [1] * 16, "price": [0, 1] * 8}, BOTH)
    for given, options in FORMS.values():
        assert not any(word in messages(given, options) for word in ("exactly one", "constant", "separator"))


def test_columns_of_0_and_1_are_offered_where_no_label_is_named():
    frame = pd.DataFrame({"text": TEXTS, **columns(0, 1)})
    with pytest.raises(UsageError, match=r"may be the label: food, price.*name the column of every class"):
        resolve(Table(frame, "t", ("text",), None))


def test_the_cells_of_a_csv_file_are_text(tmp_path):
    """Fails where a column that is read as numbers gives classes such as 1.0."""
    (tmp_path / "t.csv").write_text("text,about\na b,1|2\nc d,\ne f,2\ng h,1\n")
    assert read_table(tmp_path / "t.csv")["about"].isna().tolist() == [False, True, False, False]
    train = Table.of(tmp_path / "t.csv", ("text",), "about", "train", label_separator="|")
    assert prepare(train, {}, validation_share=0).train["label"].tolist() == [("1", "2"), (), ("2",), ("1",)]


def test_a_separator_is_suspected_wherever_labels_seem_to_be_joined():
    joined = ["food", "food|price", "price"]
    assert joined_names(joined) == ("|", ["food|price"])
    assert joined_names(["yes, it is", "no, it is not"]) is None
    hint = r"If cells such as 'food\|price' hold several labels, say --label-separator '\|'\."
    with pytest.raises(UsageError, match=rf"'about' is empty in 4 of 16 rows.* {hint}"):
        read({"about": [*joined, ""] * 4}, ONE)
    names = ["food", "food|price", *(f"food|{i}" for i in range(38))]
    many = Table(pd.DataFrame({"text": [f"row {i}" for i in range(40)], "about": names}), "t", label="about")
    with pytest.raises(UsageError, match=rf"40 different values in 40 rows.* {hint}"):
        prepare(many, {})
