import numpy as np
import pandas as pd
import pytest

from steadytune.data.guards import Finding, inspect, raise_errors, truncated
from steadytune.data.prepare import Data, prepare
from steadytune.data.problem import Classification
from steadytune.data.tables import Table
from steadytune.errors import UsageError


def frame(labels, texts=None, **more):
    texts = [f"row {i}" for i in range(len(labels))] if texts is None else texts
    return pd.DataFrame({"text": texts, "label": pd.Series(labels, dtype=object), **more})


def prepared(train, kind="auto", group=None, **tests):
    tables = {name: Table(rows, f"{name}.csv") for name, rows in tests.items()}
    return prepare(Table(train, "train.csv", kind=kind, group=group), tables, validation_share=0)


def findings(*args, **more):
    return inspect(prepared(*args, **more))


CLEAN = frame(["p", "q"] * 20)
OTHER = CLEAN.assign(text=[f"other {i}" for i in range(40)])


@pytest.mark.parametrize(
    ("labels", "kind"),
    [
        (["p", "q"] * 20, "auto"),
        ([1, 2, 3, 4] * 10, "auto"),
        ([1, 2, 3, 4, 5] * 10, "classification"),
        ([1, 2, 3, 4, 6] * 10, "auto"),
        (["1", "2", "3", "4", "five"] * 10, "auto"),
        ([0.5, 1.0, 1.5, 2.0] * 10, "auto"),
        ([["p"], ["p", "q"], ["q"], []] * 10, "auto"),
    ],
    ids=str,
)
def test_clean_data_has_no_findings(labels, kind):
    assert findings(frame(labels), kind, t=frame(labels[:30], [f"other {i}" for i in range(30)])) == []


# train, test, level, rows, parts of the message
FOUND = {
    "shared texts": (
        CLEAN, OTHER.assign(text=[*OTHER["text"][:37], "row 3", "row 5", "row 3"]), "warning", (37, 38, 39),
        ["t.csv: texts of 3 of 40 rows (7.5 %) of t are also training texts", "counted from 0: 37, 38, 39)"],
    ),
    "half shared": (CLEAN, OTHER.assign(text=[*CLEAN["text"][:20], *OTHER["text"][20:]]), "warning", (0, 1, 2, 3, 4),
                    ["20 of 40 rows (50 %)", "0, 1, 2, 3, 4, ...)"]),
    "most shared": (CLEAN, OTHER.assign(text=[*CLEAN["text"][:21], *OTHER["text"][21:]]), "error", (0, 1, 2, 3, 4),
                    ["t.csv: texts of 21 of 40 rows"]),
    "tiny test set": (CLEAN, CLEAN[:19], "warning", (0, 1, 2, 3, 4), ["19 of 19 rows (100 %)"]),
    "repeated": (frame(["p", "q"] * 20, ["a", "b", *CLEAN["text"][4:], "a", "b"]), None, "warning", (38, 39),
                 ["train.csv: texts of 2 of 40 rows (5 %) occur earlier"]),
    "small classes": (frame(["p"] * 30 + ["q"] * 7 + ["r"]), None, "warning", (30, 31, 32, 33, 34),
                      ["2 of 3 classes have fewer than 8 training rows", "'q' (7), 'r' (1)", "8 of 38 rows"]),
    "small class of lists": (frame([["p"], ["p", "q"], ["p", "q", "r"]] * 3 + [["q"]] * 5), None, "warning", (2, 5, 8),
                             ["1 of 3 classes", "'r' (3)", "3 of 14 rows"]),
    "scale": (frame([1, 2, 3, 4, 5] * 10), None, "warning", (0, 1, 2, 3, 4),
              ["5 classes are the whole numbers 1 to 5", "--kind regression"]),
    "scale from below zero": (frame(["-2", "-1", "0", "1", "2"] * 10), None, "warning", (0, 1, 2, 3, 4), ["-2 to 2"]),
    "far targets": (frame([100.5, 101.0, 99.5] * 10), None, "warning", (0, 1, 2, 3, 4),
                    ["mean 100 and spread 0.624", "30 of 30 rows", "rescale"]),
    "narrow targets": (frame([0.01, 0.02] * 10), None, "warning", (0, 1, 2, 3, 4), ["spread 0.005"]),
    "encoding of training": (frame(["p", "q"] * 20, [*CLEAN["text"][:39], "un cafÃ©"]), None, "warning", (39,),
                             ["train.csv: texts of 1 of 40 rows", "wrong encoding"]),
    "encoding of a test": (CLEAN, frame(["p", "q"], ["don\u00e2\u20ac\u2122t", "caf\ufffd"]), "warning", (0, 1),
                           ["t.csv: texts of 2 of 2 rows", "wrong encoding"]),
}  # fmt: skip


@pytest.mark.parametrize(("train", "test", "level", "rows", "parts"), FOUND.values(), ids=FOUND)
def test_each_finding_has_level_count_and_rows(train, test, level, rows, parts):
    (found,) = findings(train, **({} if test is None else {"t": test}))
    assert (found.level, found.rows) == (level, rows)
    for part in parts:
        assert part in found.message
    assert "\n" not in found.message


@pytest.mark.parametrize("text", ["café", "naïve Ångström", "São Paulo", "Â£ is no sign of it", "“quoted” – “again”"])
def test_real_accents_are_not_garbled(text):
    assert findings(frame(["p", "q"] * 20, [*CLEAN["text"][:39], text])) == []


def test_held_out_copies_are_found_by_their_row_in_the_file():
    """Rows of other groups may still be copies where a column names the split."""
    train = frame(["p", "q"] * 30, [f"row {i % 30}" for i in range(60)])
    train["side"] = ["validation" if i in (3, 40, 41) else "train" for i in range(60)]
    data = prepare(Table(train, "train.csv"), {}, validation_column="side")
    shared = [found for found in inspect(data) if "also training texts" in found.message]
    assert shared[0].rows == (3, 40, 41)
    assert "texts of 3 of 3 rows" in shared[0].message


def test_pairs_are_shared_only_as_pairs():
    pairs = {"text": ["a", "b"] * 10, "text_pair": [str(i) for i in range(20)], "label": ["p", "q"] * 10}
    train = pd.DataFrame(pairs)
    data = Data(train, {"t": train.assign(text=["b", "a"] * 10)}, Classification(("p", "q")), {"train": "x", "t": "t"})
    assert inspect(data) == []


# ---- contradictions ---------------------------------------------------------------------------------------------


def contradicting(labels, texts):
    found = [f for f in findings(frame(labels, texts)) if "another label" in f.message]
    return found[0] if found else None


def test_contradicting_labels_are_shown():
    texts = [f"row {i}" for i in range(36)] + ["row 0", "row 1", "row 7", "row 7"]
    labels = ["p", "q"] * 18 + ["q", "q", "p", "p"]
    found = contradicting(labels, texts)
    assert found.rows == (0, 7, 36, 38, 39)
    assert found.level == "warning"
    assert "train.csv: 5 of 40 rows" in found.message
    assert "such as 'row 0' (p, q); 'row 7' (q, p)" in found.message


@pytest.mark.parametrize(("clashing", "level"), [(10, "warning"), (11, "error")])
def test_contradictions_in_most_rows_are_an_error(clashing, level):
    texts = [f"row {i // 2 if i < 2 * clashing else i}" for i in range(40)]
    assert contradicting(["p", "q"] * 20, texts).level == level


def test_a_few_rows_may_all_contradict():
    assert contradicting(["p", "q"] * 9, [f"row {i // 2}" for i in range(18)]).level == "warning"


def test_numbers_contradict_beyond_their_spread():
    """The spread of these targets is 1.0."""
    targets, texts = [0.25, 2.25] * 20, [f"row {i}" for i in range(40)]
    assert contradicting([*targets, 0.75, 1.5], [*texts, "row 0", "row 1"]) is None
    assert contradicting([*targets, 1.75, 1.5], [*texts, "row 0", "row 1"]).rows == (0, 40)


def test_lists_contradict_whatever_their_order():
    labels = [["p"], ["q"], ["p", "q"], []] * 10
    texts = [f"row {i}" for i in range(40)]
    assert contradicting([*labels, ["q", "p"]], [*texts, "row 2"]) is None
    found = contradicting([*labels, ["q", "p"], ["p"]], [*texts, "row 3", "row 2"])
    assert found.rows == (2, 3, 40, 41)
    assert "'row 2' (p+q, p); 'row 3' (no class, p+q)" in found.message


def test_long_texts_are_shown_short():
    found = contradicting(["p", "q"] * 20, ["x" * 200] * 2 + [f"row {i}" for i in range(38)])
    assert "x" * 57 + "..." in found.message
    assert "x" * 58 not in found.message


# ---- groups, ids, errors ----------------------------------------------------------------------------------------


def test_groups_on_both_sides_are_found():
    train = CLEAN.assign(by=[f"author {i}" for i in range(40)])
    found = findings(train, group="by", t=OTHER.assign(by=[f"author {i}" for i in range(38, 78)]), u=OTHER)
    assert [(f.level, f.rows) for f in found] == [("warning", (0, 1))]
    assert "t.csv: groups of 2 of 40 rows (5 %) of t are also in the training rows" in found[0].message


@pytest.mark.parametrize(("classes", "rows", "error"), [(21, 40, True), (20, 40, False), (11, 19, False)])
def test_more_classes_than_half_the_rows_look_like_ids(classes, rows, error):
    data = prepared(frame([f"c{i % classes:02}" for i in range(rows)]), "classification")
    errors = [found for found in inspect(data) if found.level == "error"]
    assert bool(errors) == error
    if error:
        assert "21 different values in 40 rows, which looks like an id" in errors[0].message
        assert "c00, c01, c02, c03, c04" in errors[0].message


def test_a_small_draw_of_many_classes_is_no_table_of_ids():
    table = Table(frame([f"c{i % 25}" for i in range(200)]), "t", kind="classification")
    data = prepare(table, {}, train_size=30, validation_share=0)
    assert len(data.train) == 30
    assert {found.level for found in inspect(data)} == {"warning"}


def test_errors_come_first_and_are_raised():
    train = frame(["p", "q"] * 20, ["a", "a", *CLEAN["text"][2:]])
    found = findings(train, t=train)
    assert [f.level for f in found] == ["error", "warning", "warning"]
    with pytest.raises(UsageError) as caught:
        raise_errors(found[::-1])
    assert str(caught.value) == found[0].message
    assert raise_errors(found[1:]) == found[1:]


# ---- length -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [[], [1, 2, 8], np.array([8, 8])])
def test_what_fits_is_not_reported(lengths):
    assert truncated(lengths, 8, "the training rows") is None


def test_cut_rows_are_counted():
    message = (
        "the training rows: texts of 2 of 8 rows (25 %) have more than 8 tokens and are cut (rows counted from 0: {}): "
        "raise --max-length."
    )
    lengths = [9, 1, 8, 1, 1, 30, 1, 1]
    assert truncated(lengths, 8, "the training rows") == Finding("warning", message.format("0, 5"), (0, 5))
    numbered = truncated(lengths, 8, "the training rows", rows=range(100, 108))
    assert numbered == Finding("warning", message.format("100, 105"), (100, 105))


def test_a_handful_of_validation_rows_is_said():
    frame = pd.DataFrame({"text": [f"text number {i}" for i in range(200)], "label": ["a", "b"] * 100})
    said = [f.message for f in inspect(prepare(Table(frame, "t"), {}, train_size=16))]
    assert any("2 validation rows are too few" in message for message in said)
    assert not any("validation rows" in f.message for f in inspect(prepare(Table(frame, "t"), {})))


@pytest.mark.parametrize("separator", ["|", ",", ";", ", "])
def test_labels_joined_by_a_separator_are_said(separator):
    labels = ["food", f"food{separator}price", "price"] * 20
    said = [f for f in inspect(prepare(Table(frame(labels, [f"row {i}" for i in range(60)]), "t"), {}))
            if "several labels" in f.message]  # fmt: skip
    assert len(said) == 1
    assert f"'food{separator}price'" in said[0].message
    assert f"--label-separator {separator.strip()!r}" in said[0].message


def test_a_comma_in_a_class_of_its_own_is_no_separator():
    labels = ["yes, it is", "no, it is not"] * 30
    found = inspect(prepare(Table(frame(labels, [f"row {i}" for i in range(60)]), "t"), {}))
    assert not any("several labels" in f.message for f in found)
