import json

import numpy as np
import pandas as pd
import pytest

from fit_helpers import toy
from steadytune.data import (
    Data,
    Table,
    Target,
    UsageError,
    allot,
    draw,
    encode,
    examples,
    find_target,
    fingerprint,
    label_name,
    prepare,
    split,
    subset,
)


def problem(labels, kind="auto", **more):
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
    table = problem(labels)
    assert find_target(examples(table), table).names == names


def test_explicit_kind_wins():
    whole = problem(list(range(40)), kind="regression")
    assert find_target(examples(whole), whole) == Target()
    fractions = problem([0.5, 1.5, 0.5], kind="classification")
    assert find_target(examples(fractions), fractions).names == ("0.5", "1.5")


def test_labels_meet_across_file_types():
    train = problem(["0", "1"])
    target = find_target(examples(train), train)
    for labels in ([0, 1], [0.0, 1.0], np.array([0, 1], dtype=np.int8), pd.Categorical([0, 1])):
        test = problem(labels)
        assert encode(examples(test), test, target)["label"].tolist() == ["0", "1"]
    assert label_name(np.float32(3)) == "3"
    assert label_name(2.5) == "2.5"


def test_merge_renames_gold_labels_only_where_told():
    target = Target(("entailment", "not_entailment"))
    test = Table(
        problem([0, 1, 2]).frame, "t", rename={"0": "entailment", "1": "neutral", "2": "contradiction"},
        merge={"neutral": "not_entailment", "contradiction": "not_entailment"},
    )  # fmt: skip
    assert encode(examples(test), test, target)["label"].tolist() == ["entailment", "not_entailment", "not_entailment"]


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
    "infinite target": (bad(label=[0.5, float("inf"), 1.5]), {}, ["not a finite number in 1 of 3"]),
    "word as target": (bad(label=["0.5", "1", "x"]), {"kind": "regression"}, ["not a finite number in 1", ": 2)"]),
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
    scores = problem(list(range(21)))
    with pytest.raises(UsageError, match="21 different values in 21 rows: say --kind"):
        find_target(examples(scores), scores)
    free_text = problem([f"remark {i}" for i in range(30)])
    with pytest.raises(UsageError, match="--label NAME"):
        find_target(examples(free_text), free_text)
    many_but_repeated = problem([f"topic {i % 25}" for i in range(75)])
    assert len(find_target(examples(many_but_repeated), many_but_repeated).names) == 25


def test_first_bad_rows_are_listed_and_the_rest_counted():
    table = problem(["a"] * 4 + [None] * 9)
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
    with pytest.raises(UsageError, match="NAME=FILE"):
        prepare(Table(toy(), "train"), {"validation": Table(toy(), "t")})


# ---- splits -----------------------------------------------------------------------------------------------------


def counts(rows):
    return rows["label"].value_counts().to_dict()


def encoded(labels):
    table = problem(labels)
    raw = examples(table)
    target = find_target(raw, table)
    return encode(raw, table, target), target


def test_subset_keeps_proportions_and_rare_classes():
    rows, target = encoded(["a"] * 60 + ["b"] * 39 + ["c"])
    drawn = subset(rows, target, 10, seed=0)
    assert counts(drawn) == {"a": 6, "b": 3, "c": 1}  # 6, 3.9 and 0.1 in proportion
    assert drawn.index.is_monotonic_increasing
    assert counts(subset(rows, target, 100, seed=0)) == counts(rows)


@pytest.mark.parametrize("size", [2, 101])
def test_impossible_subset_is_refused(size):
    rows, target = encoded(["a"] * 60 + ["b"] * 39 + ["c"])
    with pytest.raises(UsageError, match=f"between 3 .* and 100 .* got {size}"):
        subset(rows, target, size, seed=0)


def test_split_partitions_the_rows_and_keeps_every_class_in_training():
    rows, target = encoded(["a"] * 20 + ["b"] * 9 + ["c"] * 2)
    train, held_out = split(rows, target, 0.2, seed=3)
    assert sorted([*train.index, *held_out.index]) == list(range(31))
    assert counts(held_out) == {"a": 4, "b": 2}
    assert counts(train)["c"] == 2


def test_split_that_would_empty_a_class_is_refused():
    rows, target = encoded(["a", "b", "a", "b"])
    with pytest.raises(UsageError, match="--validation-share"):
        split(rows, target, 0.9, seed=0)


def test_seed_decides_the_draw():
    rows, target = encoded(["a", "b"] * 50)
    first, again, other = (tuple(subset(rows, target, 20, seed).index) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert tuple(split(rows, target, 0.2, 0)[1].index) != tuple(split(rows, target, 0.2, 1)[1].index)


def test_numbers_are_drawn_over_their_whole_range():
    rows, target = encoded(list(np.linspace(0, 1, 100)))
    values = subset(rows, target, 10, seed=0)["label"].to_numpy()
    assert [int(value * 10 - 1e-9) for value in values] == list(range(10))
    assert len({tuple(subset(rows, target, 10, seed).index) for seed in range(20)}) == 20


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
    assert Data(train, {"t": test}, Target(("p", "q")), {}).overlap("t") == 1


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
