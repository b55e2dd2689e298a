import dataclasses
import json
from decimal import Decimal

import numpy as np
import pandas as pd
import pytest

from fit_helpers import toy
from steadytune.data.labels import find_problem
from steadytune.data.prepare import Data, fingerprint, prepare
from steadytune.data.problem import Classification, MultiLabel, Problem, Regression
from steadytune.data.splits import allot, draw, folds, split, subset
from steadytune.data.tables import Table, examples, label_name, resolve, texts
from steadytune.errors import UsageError


def posed(labels, kind="auto", **more):
    frame = pd.DataFrame({"text": [f"row {i}" for i in range(len(labels))], "label": labels, **more})
    return Table(frame, "t.csv", kind=kind)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ("a", "b")),
        ([10, 9, 10], ("9", "10")),
        (["10", "9"], ("9", "10")),
        ([True, False], ("False", "True")),
        ([1.0, 0.0], ("0", "1")),
        ([0.5, 2.0], ()),
        (["0.5", "2"], ()),
        (list(range(20)), tuple(map(str, range(20)))),
    ],
    ids=str,
)
def test_kind_and_class_order_follow_the_labels(labels, names):
    table = posed(labels)
    assert find_problem(examples(table), table).names == names


def test_explicit_kind_wins():
    whole = posed(list(range(40)), kind="regression")
    assert find_problem(examples(whole), whole) == Regression()
    fractions = posed([0.5, 1.5, 0.5], kind="classification")
    assert find_problem(examples(fractions), fractions).names == ("0.5", "1.5")


def test_labels_meet_across_file_types():
    train = posed(["0", "1"])
    problem = find_problem(examples(train), train)
    for labels in (
        [0, 1],
        [0.0, 1.0],
        np.array([0, 1], dtype=np.int8),
        pd.Categorical([0, 1]),
        [Decimal("0.00"), Decimal("1")],
    ):
        test = posed(labels)
        assert encode(examples(test), test, problem)["label"].tolist() == ["0", "1"]
    assert label_name(np.float32(3)) == "3"
    assert label_name(2.5) == "2.5"
    assert label_name(Decimal("2.50")) == "2.50"


def test_merge_renames_gold_labels_only_where_told():
    problem = Classification(("entailment", "not_entailment"))
    test = Table(
        posed([0, 1, 2]).frame, "t", rename={"0": "entailment", "1": "neutral", "2": "contradiction"},
        coarser={"neutral": "not_entailment", "contradiction": "not_entailment"},
    )  # fmt: skip
    assert encode(examples(test), test, problem)["label"].tolist() == ["entailment", "not_entailment", "not_entailment"]


# ---- bad input: what the user reads -----------------------------------------------------------------------------

GOOD = pd.DataFrame({"text": ["a b", "c d", "e f"], "other": ["x", "y", "z"], "label": ["p", "q", "p"]})


def bad(**columns):
    return GOOD.assign(**columns)


BAD_TABLES = {
    "no rows": (GOOD[:0], {}, ["has no rows"]),
    "column": (GOOD, {"text": ("txt",)}, ["no column 'txt'", "mean 'text'", "text, other, label", "--text"]),
    "label column": (GOOD, {"label": "lable"}, ["no column 'lable'", "mean 'label'", "--label"]),
    "same column": (GOOD, {"text": ("label",)}, ["must be different", "label, label"]),
    "three texts": (GOOD, {"text": ("a", "b", "c")}, ["one or two text columns", "got 3"]),
    "null text": (bad(text=["a", None, None]), {}, ["'text' is empty in 2 of 3 rows", "1, 2"]),
    "blank text": (bad(text=["a", " \t", "b"]), {}, ["'text' is empty in 1 of 3 rows", ": 1)"]),
    "second text": (bad(other=["", "y", "z"]), {"text": ("text", "other")}, ["'other' is empty in 1 of 3"]),
    "numbers as text": (bad(text=[1, 2, 3]), {}, ["must hold strings", "got 1 (int64)"]),
    "null label": (bad(label=["p", None, "q"]), {}, ["label column 'label' is empty in 1 of 3"]),
    "NaN target": (bad(label=[0.5, float("nan"), 1.5]), {}, ["is empty in 1 of 3", ": 1)"]),
    "infinite target": (bad(label=[0.5, float("inf"), 1.5]), {}, ["not a finite number ('inf') in 1 of 3"]),
    "word as target": (bad(label=["0.5", "1", "x"]), {"kind": "regression"}, ["number ('x') in 1 of 3", ": 2)"]),
    "constant target": (bad(label=[1.5] * 3), {}, ["one value only (1.5)"]),
    "one class": (bad(label=["p"] * 3), {}, ["one class only ('p')"]),
    "unknown kind": (GOOD, {"kind": "ranking"}, ["kind must be", "'ranking'"]),
    "unlisted label": (bad(label=[0, 1, 7]), {"rename": {"0": "no", "1": "yes"}}, ["unknown label '7'", "Known: 0, 1"]),
}  # fmt: skip


@pytest.mark.parametrize(("frame", "options", "parts"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_bad_table_is_one_clear_error(frame, options, parts):
    with pytest.raises(UsageError) as caught:
        prepare(Table(frame, "my.csv", **options), {}, validation_share=0)
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_doubtful_labels_make_the_user_choose():
    scores = posed(list(range(21)))
    with pytest.raises(UsageError, match="21 different values in 21 rows: say --kind"):
        find_problem(examples(scores), scores)
    free_text = posed([f"remark {i}" for i in range(30)])
    with pytest.raises(UsageError, match="--label NAME"):
        find_problem(examples(free_text), free_text)
    many_but_repeated = posed([f"topic {i % 25}" for i in range(75)])
    assert len(find_problem(examples(many_but_repeated), many_but_repeated).names) == 25


def test_first_bad_rows_are_listed_and_the_rest_counted():
    table = posed(["a"] * 4 + [None] * 9)
    with pytest.raises(UsageError, match=r"empty in 9 of 13 rows \(rows counted from 0: 4, 5, 6, 7, 8, \.\.\.\)"):
        examples(table)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("absent.csv", None, ["no such file", "'presents.csv'"]),
        ("t.xlsx", b"x", [".csv", ".parquet", "got '.xlsx'"]),
        ("t", b"x", ["got 'no ending'"]),
        ("empty.csv", b"", ["has no rows"]),
        ("t.parquet", b"not parquet", ["not a readable .parquet file"]),
        ("t.csv", b"text,label\n\xff\xfe,1\n", ["must be UTF-8"]),
        ("ragged.csv", b"text,label\na,1\nb,2,3\n", ["not a readable .csv file"]),
        ("short.csv", b"text,label\na\nb\n", ["'label' is empty in 2 of 2 rows"]),
        ("longer.csv", b"text,label\na,p,x\nb,q,y\n", ["not a readable .csv file", "header"]),
        ("t.jsonl", b'{"text": "a"}\n{"text": \n', ["line 2", "not JSON"]),
        ("list.jsonl", b"[1, 2]\n", ["JSON object"]),
    ],
)
def test_bad_file_is_one_clear_error(tmp_path, name, content, parts):
    (tmp_path / "presents.csv").write_text("text,label\n")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UsageError) as caught:
        prepare(Table.of(tmp_path / name, ("text",), "label", "train"), {})
    assert "\n" not in str(caught.value)
    for part in [name, *parts]:
        assert part in str(caught.value)


def test_test_labels_must_occur_in_training():
    with pytest.raises(UsageError, match=r"t.csv: label 'Q' \(in 2 of 3 rows\) does not occur .* Known: p, q"):
        prepare(Table(GOOD, "train"), {"t": Table(bad(label=["Q", "p", "Q"]), "t.csv")}, validation_share=0)


def test_a_test_set_cannot_pose_as_validation():
    with pytest.raises(UsageError, match="such as --test dev=FILE"):
        prepare(Table(toy(), "train"), {"validation": Table(toy(), "t")})


# ---- splits -----------------------------------------------------------------------------------------------------


def counts(rows):
    return rows["label"].value_counts().to_dict()


def encode(rows: pd.DataFrame, table: Table, problem: Problem) -> pd.DataFrame:
    return rows.assign(label=problem.encode(rows, table))


def encoded(labels):
    table = posed(labels)
    raw = examples(table)
    problem = find_problem(raw, table)
    return encode(raw, table, problem), problem


def test_subset_keeps_proportions_and_rare_classes():
    rows, problem = encoded(["a"] * 60 + ["b"] * 39 + ["c"])
    drawn = subset(rows, problem, 10, seed=0)
    assert counts(drawn) == {"a": 6, "b": 3, "c": 1}  # 6, 3.9 and 0.1 in proportion
    assert drawn.index.is_monotonic_increasing
    assert counts(subset(rows, problem, 100, seed=0)) == counts(rows)


@pytest.mark.parametrize("size", [2, 101])
def test_impossible_subset_is_refused(size):
    rows, problem = encoded(["a"] * 60 + ["b"] * 39 + ["c"])
    with pytest.raises(UsageError, match=f"between 3 .* and 100 .* got {size}"):
        subset(rows, problem, size, seed=0)


def test_split_partitions_the_rows_and_keeps_every_class_in_training():
    rows, problem = encoded(["a"] * 20 + ["b"] * 9 + ["c"] * 2)
    train, held_out = split(rows, problem, 0.2, seed=3)
    assert sorted([*train.index, *held_out.index]) == list(range(31))
    assert counts(held_out) == {"a": 4, "b": 2}
    assert counts(train)["c"] == 2


def test_split_that_would_empty_a_class_is_refused():
    rows, problem = encoded(["a", "b", "a", "b"])
    with pytest.raises(UsageError, match="--validation-share"):
        split(rows, problem, 0.9, seed=0)


def test_seed_decides_the_draw():
    rows, problem = encoded(["a", "b"] * 50)
    first, again, other = (tuple(subset(rows, problem, 20, seed).index) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert tuple(split(rows, problem, 0.2, 0)[1].index) != tuple(split(rows, problem, 0.2, 1)[1].index)


def test_numbers_are_drawn_over_their_whole_range():
    rows, problem = encoded(list(np.linspace(0, 1, 100)))
    values = subset(rows, problem, 10, seed=0)["label"].to_numpy()
    assert [int(value * 10 - 1e-9) for value in values] == list(range(10))
    assert len({tuple(subset(rows, problem, 10, seed).index) for seed in range(20)}) == 20


def test_allot_by_hand():
    assert allot(np.array([6, 3, 1]), 5, 0, np.array([6, 3, 1])).tolist() == [3, 2, 0]
    assert allot(np.array([6, 3, 1]), 5, 1, np.array([6, 3, 1])).tolist() == [3, 1, 1]
    assert allot(np.array([6, 3, 0]), 9, 1, np.array([6, 3, 0])).tolist() == [6, 3, 0]


def test_draw_takes_what_was_allotted():
    groups = np.array([0, 1, 0, 1, 0])
    assert groups[draw(groups, np.array([2, 1]), seed=5)].tolist().count(0) == 2


# ---- prepare ----------------------------------------------------------------------------------------------------


def test_validation_comes_out_of_the_train_size_rows():
    data = prepare(Table(toy(40), "train"), {"t": Table(toy(9), "t")}, train_size=20, validation_share=0.2)
    assert (len(data.train), len(data.tests["validation"]), len(data.tests["t"])) == (16, 4, 9)
    assert not set(data.train.index) & set(data.tests["validation"].index)
    assert list(data.tests) == ["validation", "t"]


def test_given_validation_leaves_the_training_rows_whole():
    data = prepare(Table(toy(12), "train"), {}, Table(toy(6), "v"))
    assert (len(data.train), len(data.tests["validation"])) == (12, 6)


def test_description_is_json_and_counts_shared_texts():
    data = prepare(Table(toy(12), "train"), {"t": Table(toy(4), "t.csv")}, validation_share=0)
    described = json.loads(json.dumps(data.describe()))
    assert described["t"]["also_in_train"] == 4
    assert described["train"]["labels"] == {"up": 8, "down": 4}
    assert described["t"]["source"] == "t.csv"


def test_pairs_overlap_only_as_pairs():
    train = pd.DataFrame({"text": ["a", "b"], "text_pair": ["x", "y"], "label": ["p", "q"]})
    test = pd.DataFrame({"text": ["a", "a"], "text_pair": ["y", "x"], "label": ["p", "q"]})
    assert Data(train, {"t": test}, Classification(("p", "q")), {}).overlap("t") == 1


def test_fingerprint_sees_text_label_and_row():
    rows = pd.DataFrame({"text": ["a", "b"], "label": ["p", "q"]})
    others = [rows.assign(text=["a", "c"]), rows.assign(label=["q", "p"]), rows.set_axis([0, 2])]
    assert fingerprint(rows) == fingerprint(rows.copy())
    assert len({fingerprint(rows), *map(fingerprint, others)}) == 4


@pytest.mark.parametrize("kind", ["category", "string[pyarrow]", "object"])
def test_column_types_of_pandas_make_no_difference(kind):
    frame = toy(6)
    table = Table(frame.assign(text=frame["text"].astype(kind), label=frame["label"].astype(kind)), "t")
    pd.testing.assert_frame_equal(examples(table), examples(Table(frame, "t")))


def test_two_text_columns_become_a_pair():
    rows = examples(Table(toy(5, pair=True), "t", text=("other", "text")))
    assert list(rows.columns) == ["text", "text_pair", "label"]
    assert rows["text"].tolist() == toy(5, pair=True)["other"].tolist()


# ---- finding the columns ----------------------------------------------------------------------------------------

PROSE = [f"the film number {i} was a joy to watch" for i in range(12)]
OTHER_PROSE = [f"nobody saw play number {i} in town" for i in range(12)]
YES_NO = ["yes", "no", "no"] * 4
FOUND = {
    "by name": ({"text": PROSE, "label": YES_NO}, ("text",), "label"),
    "any case": ({"Review": PROSE, "Stars": ["1", "2", "5"] * 4}, ("Review",), "Stars"),
    "a pair": ({"hypothesis": PROSE, "premise": OTHER_PROSE, "label": YES_NO}, ("premise", "hypothesis"), "label"),
    "text and its pair": ({"text_pair": PROSE, "text": OTHER_PROSE, "y": YES_NO}, ("text", "text_pair"), "y"),
    "text is stronger": ({"text": PROSE, "content": OTHER_PROSE, "label": YES_NO}, ("text",), "label"),
    "label is stronger": ({"text": PROSE, "score": range(12), "label": YES_NO}, ("text",), "label"),
    "by shape": ({"id": range(12), "words": PROSE, "verdict": YES_NO}, ("words",), "verdict"),
    "fractions": ({"id": range(12), "words": PROSE, "warmth": [i + 0.5 for i in range(12)]}, ("words",), "warmth"),
    "lists": ({"words": PROSE, "about": [["a"], ["b", "c"], []] * 4}, ("words",), "about"),
    "two of prose": ({"said": PROSE, "meant": OTHER_PROSE, "fits": YES_NO}, ("said", "meant"), "fits"),
    "short text": ({"word": list("abcdefghijkl"), "label": [0, 1, 1] * 4}, ("word",), "label"),
    "numbers named text": ({"text": range(12), "words": PROSE, "label": YES_NO}, ("words",), "label"),
}  # fmt: skip


@pytest.mark.parametrize(("columns", "text", "label"), FOUND.values(), ids=FOUND)
def test_columns_are_found_and_reported(columns, text, label, caplog):
    caplog.set_level("INFO", logger="steadytune")
    found = resolve(Table(pd.DataFrame(columns), "my.csv", None, None))
    assert found.columns == (text, label)
    assert caplog.messages == [f"my.csv: text from {' and '.join(map(repr, text))}, label from {label!r}"]


DOUBTFUL = {
    "two labels": ({"text": PROSE, "label": YES_NO, "target": YES_NO}, ["may be the label: label, target", "--label"]),
    "two texts": ({"review": PROSE, "comment": OTHER_PROSE, "label": YES_NO}, ["the text: review, comment", "--text"]),
    "two pairs": (
        {"premise": PROSE, "hypothesis": PROSE, "question1": PROSE, "question2": PROSE, "label": YES_NO},
        ["more than one pair of columns", "premise, hypothesis, question1, question2"],
    ),
    "a translation": (
        {"words": PROSE, "Worte": OTHER_PROSE, "id": range(12), "label": YES_NO}, ["the text: words, Worte"],
    ),
    "two shapes": ({"words": PROSE, "this": YES_NO, "that": YES_NO}, ["may be the label: this, that"]),
    "no label": ({"words": PROSE, "id": range(12)}, ["no column looks like a label: words, id"]),
    "no text": ({"a": range(12), "label": YES_NO}, ["no column looks like text: a"]),
    "nothing left": ({"label": YES_NO}, ["no column looks like text: none is left"]),
}  # fmt: skip


@pytest.mark.parametrize(("columns", "parts"), DOUBTFUL.values(), ids=DOUBTFUL)
def test_doubtful_columns_are_listed(columns, parts):
    with pytest.raises(UsageError) as caught:
        resolve(Table(pd.DataFrame(columns), "my.csv", None, None))
    for part in ["my.csv", *parts]:
        assert part in str(caught.value)


def test_given_columns_are_not_taken_again():
    frame = pd.DataFrame({"text": PROSE, "review": OTHER_PROSE, "label": YES_NO, "score": YES_NO})
    assert resolve(Table(frame, "t", ("review",), None)).columns == (("review",), "label")
    assert resolve(Table(frame, "t", None, "score")).columns == (("text",), "score")
    whole = Table(frame, "t")
    assert resolve(whole) is whole
    without = Table(frame.drop(columns="score"), "t", None, None, group="label")
    with pytest.raises(UsageError, match="no column looks like a label"):
        resolve(without)


def test_one_side_of_a_pair_may_be_the_group():
    frame = pd.DataFrame({"question": PROSE, "sentence": OTHER_PROSE, "label": YES_NO})
    assert resolve(Table(frame, "t", None, None, group="question")).columns == (("question", "sentence"), "label")
    assert resolve(Table(frame, "t", None, None, group="sentence")).columns == (("question", "sentence"), "label")


def test_columns_of_one_name_are_refused_only_where_they_are_read():
    frame = pd.DataFrame({"text": PROSE, "label": YES_NO, "note": PROSE, "more": PROSE})
    assert resolve(Table(frame.set_axis(["text", "label", "a", "a"], axis=1), "t", None, None)).text == ("text",)
    twice = Table(frame.set_axis(["text", "label", "text", "a"], axis=1), "t.csv")
    with pytest.raises(UsageError, match=r"t\.csv: 2 columns are called 'text': rename them"):
        examples(twice)


def test_test_tables_follow_the_training_columns():
    """Without the training table, other text and label columns would be found in the test rows."""
    train = pd.DataFrame({"review": PROSE, "stars": YES_NO, "shop": list("aabb") * 3})
    test = train.assign(text=OTHER_PROSE, label=["maybe"] * 12)
    tables = {"t": Table(test, "t", None, None), "u": Table(train.drop(columns="shop"), "u", None, None)}
    data = prepare(Table(train, "train", None, None, group="shop"), tables, Table(test, "v", None, None))
    for name in ("t", "validation"):
        assert data.tests[name]["text"].tolist() == PROSE
        assert data.tests[name]["group"].tolist() == list("aabb") * 3
    assert "group" not in data.tests["u"]
    assert data.table.columns == (("review",), "stars")


def test_texts_need_no_label():
    frame = pd.DataFrame({"a": ["x", "y"], "b": ["u", "v"]})
    assert texts(Table(frame, "t", ("b", "a"), None)).to_dict("list") == {"text": ["u", "v"], "text_pair": ["x", "y"]}
    with pytest.raises(UsageError, match="'c' is empty in 1 of 2"):
        texts(Table(frame.assign(c=["x", " "]), "t", ("c",), None))


# ---- multi-label ------------------------------------------------------------------------------------------------

SETS = {
    "lists": [["b", "a"], [], ["a", "a"]],
    "tuples": [("b", "a"), (), ("a",)],
    "sets": [{"b", "a"}, set(), frozenset("a")],
    "arrays": [np.array(["b", "a"]), np.array([], dtype=str), np.array(["a"])],
    "written lists": ["['b', 'a']", "[]", '["a"]'],
    "written arrays": [str(np.array(["b", "a"])), "[]", "['a'\n 'a']"],  # Python would read the first as ['ba']
}


@pytest.mark.parametrize("labels", SETS.values(), ids=SETS)
def test_lists_of_any_type_become_tuples_in_class_order(labels):
    rows, problem = encoded(labels)
    assert problem == MultiLabel(("a", "b"))
    assert problem.kind == "multilabel"
    assert rows["label"].tolist() == [("a", "b"), (), ("a",)]


def test_lists_survive_the_files(tmp_path):
    frame = pd.DataFrame({"text": PROSE[:3], "label": [[10, 9], [], [9]]})
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_json(tmp_path / "t.jsonl", orient="records", lines=True)
    frame.to_csv(tmp_path / "t.csv", index=False)
    for suffix in ("parquet", "jsonl", "csv"):
        data = prepare(Table.of(tmp_path / f"t.{suffix}", None, None, "train"), {}, validation_share=0)
        assert data.problem.names == ("9", "10")
        assert data.train["label"].tolist() == [("9", "10"), (), ("9",)]


def test_multilabel_labels_are_renamed_and_merged_one_by_one():
    problem = MultiLabel(("no", "maybe", "yes"))
    table = Table(posed([[0, 2], [1]]).frame, "t", rename={"0": "no", "1": "maybe", "2": "yes"}, coarser={"yes": "no"})
    assert encode(examples(table), table, problem)["label"].tolist() == [("no",), ("maybe",)]


BAD_SETS = {
    "mixed": ([["a"], "b", ["c"]], "auto", ["is not a list ('b') in 1 of 3 rows", ": 1)"]),
    "not lists": (["a", "b", "a"], "multilabel", ["is not a list ('a') in 3 of 3"]),
    "null inside": ([["a"], ["b", None], [float("nan")]], "auto", ["empty entry in 2 of 3 rows", ": 1, 2)"]),
    "one-hot": ([[0, 1, 1], [1, 0, 0]], "auto", ["lists of 0 and 1", "names"]),
    "all the same": ([["a", "b"], ["b", "a"]], "auto", ["same classes in every row"]),
    "one class": ([["a"], []], "auto", ["one class only ('a')"]),
    "as numbers": ([["a"], ["b"]], "regression", ["in 2 of 2"]),
}


@pytest.mark.parametrize(("labels", "kind", "parts"), BAD_SETS.values(), ids=BAD_SETS)
def test_bad_lists_are_one_clear_error(labels, kind, parts):
    table = posed(pd.Series(labels, dtype=object), kind)
    with pytest.raises(UsageError) as caught:
        find_problem(examples(table), table)
    for part in parts:
        assert part in str(caught.value)


def test_unknown_label_in_a_list_counts_its_rows():
    train, test = posed([["a"], ["b"]]), posed([["a", "c"], ["d", "c"], ["b"]])
    problem = find_problem(examples(train), train)
    with pytest.raises(UsageError, match=r"label 'c' \(in 2 of 3 rows\) does not occur .* Known: a, b"):
        encode(examples(test), test, problem)


def test_a_bracket_is_no_list():
    assert encoded(["[good]", "[bad", "[good]"])[1] == Classification(("[bad", "[good]"))


def test_rows_of_many_classes_are_drawn_by_their_rarest():
    rows, problem = encoded([["a", "b"], ["a"], [], ["a"], ["b", "a"], ["c", "a", "b"]])
    assert problem.strata(rows["label"]).tolist() == [1, 0, 3, 0, 1, 2]
    assert problem.membership(rows["label"]).sum(axis=0).tolist() == [5, 3, 1]


def test_multilabel_rows_are_split_described_and_fingerprinted():
    data = prepare(posed([["a"], ["b", "a"], [], ["a"]] * 10), {}, validation_share=0.2)
    assert json.loads(json.dumps(data.describe()))["validation"]["labels"] == {"a": 6, "b": 2}
    assert counts(data.tests["validation"]) == {("a",): 4, ("a", "b"): 2, (): 2}


def test_ordered_categories_decide_the_class_order():
    column = pd.Categorical(["low", "high", "low"], ["low", "middle", "high"], ordered=True)
    assert encoded(column)[1].names == ("low", "high")
    assert encoded(column.as_unordered())[1].names == ("high", "low")


# ---- groups and folds -------------------------------------------------------------------------------------------


def grouped(labels, groups):
    rows, problem = encoded(labels)
    return rows.assign(group=groups), problem


def test_group_values_meet_across_types():
    table = posed(["a", "b"], author=[1.0, 2.0])
    assert examples(dataclasses.replace(table, group="author"))["group"].tolist() == ["1", "2"]


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("shop", ["x", "y", "z"], "no column 'shp'.* --group NAME"),
        ("shp", ["x", None, "z"], "group column 'shp' is empty in 1 of 3"),
    ],
)
def test_bad_groups_are_refused(column, values, message):
    with pytest.raises(UsageError, match=message):
        examples(Table(GOOD.assign(**{column: values}), "t", group="shp"))


def test_group_by_label_is_refused():
    with pytest.raises(UsageError, match="'label' for both"):
        examples(Table(GOOD, "t", group="label"))


@pytest.mark.parametrize("share", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("kind", ["classes", "numbers", "lists"])
def test_groups_stay_whole_and_the_share_is_met(kind, share):
    """100 groups of 1 to 4 rows."""
    groups = np.repeat(np.arange(100), np.arange(100) % 4 + 1).astype(str)
    cycle = {"classes": ["a", "a", "b"], "numbers": [0.5, 1.0, 2.25, 7.0], "lists": [["a"], ["a", "b"], []]}[kind]
    rows, problem = grouped(pd.Series((cycle * 100)[:250], dtype=object), groups)
    seen = set()
    for seed in range(3):
        train, held_out = split(rows, problem, share, seed)
        assert not set(train["group"]) & set(held_out["group"])
        assert sorted([*train.index, *held_out.index]) == list(range(250))
        assert abs(len(held_out) - share * 250) <= 4
        seen.add(tuple(held_out.index))
    assert len(seen) == 3


def test_groups_are_held_out_in_proportion_to_their_classes():
    """120 rows of a and 60 of b, in groups of 1 to 3; blind draws of groups hold out 9 to 26 rows of b."""
    sizes = [1, 2, 3] * 30
    labels = [label for i, size in enumerate(sizes) for label in ["aab"[i // 3 % 3]] * size]
    rows, problem = grouped(labels, [str(i) for i, size in enumerate(sizes) for _ in range(size)])
    for seed in range(20):
        held = counts(split(rows, problem, 0.3, seed)[1])
        assert abs(held["a"] - 36) <= 2
        assert abs(held["b"] - 18) <= 2


def test_a_class_of_one_group_stays_in_training():
    rows, problem = grouped(["a"] * 40 + ["b"] * 4, [str(i // 2) for i in range(40)] + ["last"] * 4)
    for seed in range(5):
        assert counts(split(rows, problem, 0.5, seed)[0])["b"] == 4


def test_groups_too_large_to_hold_out_are_refused():
    rows, problem = grouped(["a", "b"] * 20, ["x"] * 20 + ["y"] * 20)
    with pytest.raises(UsageError, match="none of the 2 groups can be held out to make 4 of 40"):
        split(rows, problem, 0.1, seed=0)


def test_classes_of_one_row_cannot_be_split():
    rows, problem = encoded(["a"] * 9 + ["b", "c"])
    with pytest.raises(UsageError, match=r"class 'b' has 1 row only .*1 other class.* --validation-share 0"):
        split(rows, problem, 0.2, seed=0)


@pytest.mark.parametrize("groups", [None, [str(i // 3) for i in range(60)]])
@pytest.mark.parametrize("labels", [["a", "a", "b"] * 20, list(np.linspace(0, 1, 60)), [["a"], ["b", "a"], []] * 20])
def test_folds_hold_every_row_out_once(labels, groups):
    rows, problem = encoded(labels)
    rows = rows if groups is None else rows.assign(group=groups)
    cuts = folds(rows, problem, 5, seed=1)
    assert sorted(np.concatenate([held_out for _, held_out in cuts])) == list(range(60))
    for train, held_out in cuts:
        assert sorted([*train, *held_out]) == list(range(60))
        assert len(held_out) == 12
        if groups is not None:
            assert not set(rows["group"].iloc[train]) & set(rows["group"].iloc[held_out])
    again, other = folds(rows, problem, 5, seed=1), folds(rows, problem, 5, seed=2)
    assert all((a[1] == b[1]).all() for a, b in zip(cuts, again, strict=True))
    assert any((a[1] != b[1]).any() for a, b in zip(cuts, other, strict=True))


def test_folds_keep_the_proportions():
    rows, problem = encoded(["a"] * 31 + ["b"] * 17 + ["c"] * 4)
    for _, held_out in folds(rows, problem, 4, seed=0):
        amounts = counts(rows.iloc[held_out])
        assert (amounts["a"] in (7, 8), amounts["b"] in (4, 5), amounts["c"]) == (True, True, 1)


def test_folds_of_groups_keep_the_proportions():
    """Groups of one class each: large ones must not gather in one fold."""
    sizes = [6, 5, 4, 3, 2, 1, 1, 1, 1] * 2
    labels = [label for i, size in enumerate(sizes) for label in ["ab"[i >= 9]] * size]
    rows, problem = grouped(labels, [str(i) for i, size in enumerate(sizes) for _ in range(size)])
    for _, held_out in folds(rows, problem, 3, seed=0):
        assert counts(rows.iloc[held_out]) == {"a": 8, "b": 8}


BAD_FOLDS = {
    "too many": (["a", "b"] * 3, None, 7, "between 2 and 6, the number of rows, got 7"),
    "too few": (["a", "b"] * 3, None, 1, "between 2 and 6.* got 1"),
    "few groups": (["a", "b"] * 3, list("xxyyzz"), 4, "between 2 and 3, the number of groups, got 4"),
    "one row": (["a"] * 9 + ["b"], None, 2, "class 'b' has 1 row: too few for 2 folds"),
    "one group": (["a"] * 9 + ["b"] * 3, list("uvwxxyyzzBBB"), 2, "class 'b' has 3 rows, all in one group: too few"),
}


@pytest.mark.parametrize(("labels", "groups", "k", "message"), BAD_FOLDS.values(), ids=BAD_FOLDS)
def test_impossible_folds_are_refused(labels, groups, k, message):
    rows, problem = encoded(labels)
    with pytest.raises(UsageError, match=message):
        folds(rows if groups is None else rows.assign(group=groups), problem, k, seed=0)


# ---- validation by column ---------------------------------------------------------------------------------------


def marked(marks, column="part"):
    return Table(toy(len(marks)).assign(**{column: marks}), "my.csv", None, None)


@pytest.mark.parametrize(
    ("marks", "validation", "test"),
    [
        (["train", "train", "validation", "test"] * 4, 4, 4),
        (["Train", "TRAINING", " dev ", "Test"] * 4, 4, 4),
        (["train", "train", "val", "valid"] * 4, 8, None),
        ([False, False, True, False] * 4, 4, None),
        (["False", "false", "true", "FALSE"] * 4, 4, None),
        (["train", "train", "train", "test"] * 4, 1, 4),
    ],
    ids=["words", "other words", "two words", "truth values", "written truth values", "no validation rows"],
)
def test_a_column_marks_the_split(marks, validation, test):
    data = prepare(marked(marks), {}, validation_column="part")
    assert {name: len(rows) for name, rows in data.tests.items()} == (
        {"validation": validation} | ({} if test is None else {"test": test})
    )
    assert len(data.train) + sum(map(len, data.tests.values())) == len(marks)
    for name, rows in {"train": data.train, **data.tests}.items():
        told = {str(marks[i]).strip().lower() for i in rows.index}
        allowed = {"train", "training", "false"}
        if name == "test" or (name == "validation" and validation != 1):
            allowed = {"test"} if name == "test" else {"validation", "dev", "val", "valid", "true"}
        assert told <= allowed


def test_a_class_only_test_rows_have_is_unknown():
    table = marked(["train"] * 8 + ["test"])
    table.frame.loc[8, "label"] = "sideways"
    with pytest.raises(UsageError, match=r"label 'sideways'.* does not occur in the training data"):
        prepare(table, {}, validation_column="part")


BAD_MARKS = {
    "unknown word": (["train", "holdout"] * 4, {}, "must say train, validation or test.*got 'holdout' in 4 of 8"),
    "empty": (["train", None] * 4, {}, "got 'nan' in 4 of 8|got 'None' in 4 of 8"),
    "no training": (["dev", "test"] * 4, {}, "no row for training"),
    "given too": (["train", "dev"] * 4, {"validation": Table(toy(4), "v")}, "marks validation rows, and a validation"),
    "test given too": (["train", "test"] * 4, {"tests": {"test": Table(toy(4), "t")}}, "marks test rows, and a test"),
}


@pytest.mark.parametrize(("marks", "more", "message"), BAD_MARKS.values(), ids=BAD_MARKS)
def test_bad_marks_are_refused(marks, more, message):
    with pytest.raises(UsageError, match=message):
        prepare(marked(marks), **{"tests": {}, **more}, validation_column="part")


def test_missing_mark_column_is_named():
    with pytest.raises(UsageError, match=r"no column 'prt'.*Did you mean 'part'.*--validation-column"):
        prepare(marked(["train"] * 4), {}, validation_column="prt")


def test_the_column_of_a_split_may_be_called_by_a_number_as_others_may():
    """Naive: the names of a frame are strings by then, and the search for the nearest one fails on a number."""
    frame = pd.DataFrame({0: PROSE[:6], 1: list("ababab"), 2: ["train"] * 4 + ["dev"] * 2})
    data = prepare(Table.of(frame, (0,), 1, "train"), {}, validation_column=2)
    assert {name: len(rows) for name, rows in data.tests.items()} == {"validation": 2}


def test_train_size_draws_from_the_training_rows_only():
    data = prepare(marked(["train", "train", "dev"] * 6), {}, validation_column="part", train_size=7)
    assert (len(data.train), len(data.tests["validation"])) == (7, 6)
    assert all(row % 3 < 2 for row in data.train.index)


def copies_and_labels(n=60):
    """Every third text occurs twice, the copy far from its first row."""
    texts = [f"text number {i}" for i in range(n)] + [f"text number {i}" for i in range(0, n, 3)]
    return pd.DataFrame({"text": texts, "label": ["ab"[len(text) % 2] for text in texts]})


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_equal_texts_stay_on_one_side_of_the_validation_split(groups, seed):
    frame = copies_and_labels()
    table = Table(frame.assign(g=[i % 20 for i in range(len(frame))]), "t", group="g" if groups else None)
    data = prepare(table, {}, validation_share=0.25, seed=seed)
    held = data.tests["validation"]
    assert not set(held["text"]) & set(data.train["text"])
    assert len(held) + len(data.train) == len(frame)
    if groups:
        assert not set(held["group"]) & set(data.train["group"])
    else:
        assert 15 <= len(held) <= 25  # of 80 rows


@pytest.mark.parametrize("seed", range(5))
def test_equal_texts_share_a_fold(seed):
    frame = copies_and_labels()
    data = prepare(Table(frame, "t"), {}, validation_share=0)
    for inside, outside in folds(data.train, data.problem, 4, seed):
        assert not set(data.train["text"].iloc[inside]) & set(data.train["text"].iloc[outside])


def test_a_class_of_copies_with_other_labels_stays_in_training():
    # class "c" has only second copies of texts of other classes
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(20)] + ["text 0", "text 1"],
                          "label": ["a", "b"] * 10 + ["c", "c"]})  # fmt: skip
    for seed in range(20):
        data = prepare(Table(frame, "t"), {}, validation_share=0.5, seed=seed)
        assert "c" in set(data.train["label"])


def test_a_class_of_one_row_has_no_validation_share():
    table = Table(pd.DataFrame({"text": [f"text {i}" for i in range(11)], "label": ["a"] * 10 + ["b"]}), "t.csv")
    with pytest.raises(UsageError, match=r"^class 'b' has 1 row only .* set --validation-share 0\."):
        prepare(table, {}, validation_share=0.2)
    with pytest.raises(UsageError, match=r"^of the 6 rows drawn by --train-size: class 'b' has 1 row only"):
        prepare(table, {}, validation_share=0.2, train_size=6)
