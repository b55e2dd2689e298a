"""What comes in as n rows goes on as n rows in their order, whatever holds it, or is one error that names the cause."""

from __future__ import annotations

import gzip
import logging

import numpy as np
import pandas as pd
import pytest

from steadytune.data.files import read_rows, read_table, sequence_rows, whole_characters
from steadytune.data.guards import inspect
from steadytune.data.labels import find_problem
from steadytune.data.prepare import prepare
from steadytune.data.tables import Table, examples, label_name, resolve, texts
from steadytune.errors import UsageError

TEXTS = [f"a good film number {i}" for i in range(24)]
LABELS = ["pos", "neg"] * 12
HALF = "\ud83d"


def rows(labels=LABELS, **more):
    return pd.DataFrame({"text": TEXTS[: len(labels)], "label": pd.Series(list(labels), dtype=object), **more})


def problem(frame, **options):
    table = resolve(Table.of(frame, options.pop("text", None), options.pop("label", None), "train", **options))
    return find_problem(examples(table), table)


def csv_of(lines):
    return "\n".join(lines) + "\n"


# ---- files --------------------------------------------------------------------------------------------------------

PLAIN = [f"{text},{label}" for text, label in zip(TEXTS, LABELS, strict=True)]
STRAY = [*PLAIN[:3], '"an open mark, pos', *PLAIN[4:9], 'closed" here,pos', *PLAIN[10:]]
BAD_FILES = {
    "semicolons, a comma in the header": (
        "t.csv", csv_of(["text;score, 0-5", *(f"{t};{i % 5},5" for i, t in enumerate(TEXTS))]), "seems to have ';'"),
    "semicolons, commas in texts": (
        "t.csv", csv_of(["id;text;stars, 1-3", *(f"{i};{t}, yes;{i % 3}" for i, t in enumerate(TEXTS))]), "';'"),
    "tabs in a .csv": ("t.csv", csv_of(["text\tstars, 1-3", *(f"{t}\t1" for t in TEXTS)]), "Rename it to .tsv"),
    "a mark opened and closed rows later": ("t.csv", csv_of(["text,label", *STRAY]), "closing quotation mark"),
    "a mark that swallows rows": (
        "t.csv", csv_of(["text,label", *PLAIN[:3], '"open ' + PLAIN[3], *PLAIN[4:8], PLAIN[9] + '"', PLAIN[10]]), "qu"),
    "a mark never closed": ("t.csv", csv_of(["text,label", *PLAIN, '"open,pos']), "never closed"),
    "text behind a mark": ("t.csv", csv_of(["text,label", '"a "fine" film",pos']), "line 2: text goes on behind"),
    "gzip": ("t.csv", gzip.compress(csv_of(["text,label", *PLAIN]).encode()), "compressed with gzip"),
    "a spreadsheet": ("t.csv", b"PK\x03\x04 and so on", "spreadsheet"),
    "an old spreadsheet": ("t.csv", b"\xd0\xcf\x11\xe0 and so on", "spreadsheet"),
    "UTF-16": ("t.csv", csv_of(["text,label", *PLAIN]).encode("utf-16"), "UTF-16"),
    "zero bytes": ("t.jsonl", b'{"text": "a\0b"}', "zero bytes"),
    "Parquet of another name": ("t.csv", b"PAR1 and so on", ".parquet"),
    "columns of pandas": ("t.json", rows().to_json(), "orient='records', lines=True"),
    "a comma in a cell without marks": (
        "t.csv", csv_of(["text,label", *PLAIN[:3], "one, two,pos"]),
        "line 5 has 3 cells, the header 'text,label' has 2. Put cells that hold ','"),
    "a line above the header": ("t.csv", csv_of(["# exported", "text,label", *PLAIN]), "begin with the header"),
    "marks of another kind": ("t.csv", csv_of(["text,label", *(f"'{p}'" for p in PLAIN), "'a, b',pos"]), "double quot"),
    "a field twice": ("t.jsonl", '{"text": "a", "label": "p", "label": "q"}\n', "2 fields of one JSON object"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content", "part"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_file_that_is_something_else_names_the_cause(tmp_path, name, content, part):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError) as caught:
        read_table(file)
    assert part in str(caught.value)


def test_a_folder_is_told_from_a_file(tmp_path):
    (tmp_path / "t.csv").mkdir()
    with pytest.raises(UsageError, match="this is a folder"):
        read_table(tmp_path / "t.csv")


GOOD_FILES = {
    "Excel's own line": ("t.csv", csv_of(["sep=;", "text;label", *(p.replace(",", ";") for p in PLAIN)])),
    "the header again": ("t.csv", csv_of(["text,label", *PLAIN[:12], "text,label", *PLAIN[12:]])),
    "spaces in the header": ("t.csv", csv_of([" text, label ", *PLAIN])),
    "spaces before marks": (
        "t.csv", csv_of(['"text", "label"', *(f'"{t}", "{x}"' for t, x in zip(TEXTS, LABELS, strict=True))])),
    "a comma in a quoted name": ("t.csv", csv_of(['text,"label"', *PLAIN])),
    "line ends in quoted cells": (
        "t.tsv", csv_of(["text\tlabel", *(f'"{t}\nsecond line"\t{x}' for t, x in zip(TEXTS, LABELS, strict=True))])),
    "marks of a benchmark": ("t.tsv", csv_of(["text\tlabel", *(f'{t} "\t{LABELS[i]}' for i, t in enumerate(TEXTS))])),
    "an open mark in a .tsv": (
        "t.tsv", csv_of(["text\tlabel", *(f'"{t}\t{x}' for t, x in zip(TEXTS, LABELS, strict=True))])),
    "reviews of several lines": ("t.csv", rows().assign(text=[f"{t}, no\nand, so" for t in TEXTS]).to_csv(index=False)),
}  # fmt: skip


@pytest.mark.parametrize(("name", "content"), GOOD_FILES.values(), ids=GOOD_FILES)
def test_every_row_of_a_good_file_is_read(tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    table, _ = read_rows(tmp_path / name)
    assert table.columns.tolist() == ["text", "label"]
    assert table["label"].tolist() == LABELS


def test_marks_behind_backslashes_are_read(tmp_path):
    (tmp_path / "t.csv").write_text('text,label\n"he said \\"fine\\" to all",pos\n', encoding="utf-8")
    assert read_table(tmp_path / "t.csv")["text"].tolist() == ['he said "fine" to all']


def test_two_columns_of_one_name_in_a_file_are_refused_where_they_are_read(tmp_path):
    (tmp_path / "t.csv").write_text(csv_of(["text,label,label", *(f"{p},{i % 3}" for i, p in enumerate(PLAIN))]))
    for label in (None, "label"):
        with pytest.raises(UsageError, match="2 columns are called 'label'"):
            problem(tmp_path / "t.csv", label=label)


HEADLESS = {
    "label last": csv_of(PLAIN),
    "label first": csv_of(f"{x},{t}" for t, x in zip(TEXTS, LABELS, strict=True)),
    "numbers": csv_of(f"{t},{i / 7:.2f}" for i, t in enumerate(TEXTS)),
}


@pytest.mark.parametrize("content", HEADLESS.values(), ids=HEADLESS)
def test_a_file_without_header_is_refused(tmp_path, content):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UsageError, match="add a header line"):
        problem(tmp_path / "t.csv")


# ---- sequences and frames -----------------------------------------------------------------------------------------

NO_ROWS = {
    "a single text": ("excellent", "into a list"),
    "None": (None, "must be a list of texts"),
    "a number": (3, "must be a list of texts"),
    "nothing": ([], "no rows"),
    "a set": ({"one text", "another"}, "has no order: give a list"),
    "an array of one text": (np.array("a text"), "put a single text into a list"),
    "three cells": ([("a", "b", "c")], r"rows of \[3\] cells"),
    "some pairs": ([("a", "b"), "c"], r"rows of \[1, 2\] cells"),
}


@pytest.mark.parametrize(("given", "part"), NO_ROWS.values(), ids=NO_ROWS)
def test_what_is_no_sequence_of_texts_is_refused(given, part):
    with pytest.raises(UsageError, match=part):
        sequence_rows(given, "X")


SEQUENCES = {
    "list": TEXTS,
    "tuple": tuple(TEXTS),
    "array": np.array(TEXTS),
    "column": np.array(TEXTS).reshape(-1, 1),
    "objects": np.array(TEXTS, dtype=object),
    "Series": pd.Series(TEXTS, index=range(5, 29)),
    "generator": (text for text in TEXTS),
}


@pytest.mark.parametrize("given", SEQUENCES.values(), ids=SEQUENCES)
def test_n_rows_stay_n_rows_in_their_order(given):
    assert sequence_rows(given, "X")["text"].tolist() == TEXTS


@pytest.mark.parametrize("value", [None, float("nan"), pd.NA, 3, b"bytes", {"a": 1}])
def test_no_texts_among_texts_are_one_error(value):
    frame = sequence_rows(["a text", value], "X")
    with pytest.raises(UsageError, match=r"is empty in 1 of 2 rows|must hold strings"):
        texts(Table(frame, "X", ("text",), None))


def test_columns_called_by_no_strings_are_called_by_strings():
    frame, _ = read_rows(pd.DataFrame(list(zip(TEXTS, LABELS, strict=True))))
    assert frame.columns.tolist() == ["0", "1"]
    assert problem(pd.DataFrame(list(zip(TEXTS, LABELS, strict=True))), text=(0,), label=1).names == ("neg", "pos")
    assert read_rows(pd.DataFrame({"text": TEXTS, None: LABELS}))[0].columns.tolist() == ["text", "nan"]
    with pytest.raises(UsageError, match="2 levels"):
        read_rows(pd.concat({"a": rows()}, axis=1))


def test_white_space_around_column_names_is_no_part_of_them():
    frame = pd.DataFrame({" text": TEXTS, "label ": LABELS})
    for text, label in ((None, None), (("text",), "label"), ((" text",), "label ")):
        assert problem(frame, text=text, label=label).names == ("neg", "pos")
    both = pd.DataFrame({"text": TEXTS, "label": LABELS, "label ": LABELS[::-1]})
    assert read_rows(both)[0].columns.tolist() == ["text", "label", "label "]  # two columns, told apart by a space


def test_a_table_whose_texts_are_its_index_says_so(tmp_path):
    """Naive: the index is dropped, and the table "has no rows"."""
    with pytest.raises(UsageError, match=r"there are no columns, only the index \(text\): give frame.reset_index"):
        read_rows(pd.DataFrame({"text": TEXTS}).set_index("text"))


def test_a_column_without_a_name_is_not_taken_for_the_label(tmp_path):
    """A title above the header: its line names one column, and the real header would be a row."""
    (tmp_path / "t.csv").write_text(csv_of(["Our survey,", "text,label", *PLAIN]))
    with pytest.raises(UsageError, match=r"gives column 2 no name.* lines above the header"):
        problem(tmp_path / "t.csv")


@pytest.mark.parametrize("blank", ["\u200b", "\ufeff", " \u00a0\u2060"])
def test_what_cannot_be_seen_is_empty(blank):
    with pytest.raises(UsageError, match="label column 'label' is empty in 1 of 24 rows"):
        problem(rows([blank, *LABELS[1:]]))
    with pytest.raises(UsageError, match="text column 'text' is empty in 1 of 24 rows"):
        problem(rows().assign(text=[blank, *TEXTS[1:]]))


def test_a_dictionary_of_columns_is_a_table_and_one_of_splits_is_not():
    assert read_rows({"text": TEXTS, "label": LABELS})[0].astype(object).equals(rows().astype(object))
    with pytest.raises(UsageError, match=r"different lengths \(text has 24, label has 3\)"):
        read_rows({"text": TEXTS, "label": ["a", "b", "c"]})
    with pytest.raises(UsageError, match="dictionary of splits"):
        read_rows({"train": rows(), "test": rows()})


def test_halves_of_characters_are_read_as_the_replacement_character(tmp_path, caplog):
    (tmp_path / "t.jsonl").write_text('{"text": "a \\ud83d b", "label": "p"}\n{"text": "c", "label": "q"}\n')
    with caplog.at_level(logging.WARNING, "steadytune"):
        from_file, _ = read_rows(tmp_path / "t.jsonl")
        from_frame, _ = read_rows(pd.DataFrame({"text": pd.Series([f"a {HALF} b", "c"], dtype=object)}))
    assert from_file["text"].tolist() == from_frame["text"].tolist() == ["a \ufffd b", "c"]
    assert caplog.text.count("halves of characters in 1 rows") == 2
    assert sequence_rows([f"a {HALF}"], "X")["text"].tolist() == ["a \ufffd"]
    assert whole_characters("\ud83d\ude00") == "\U0001f600"  # two halves that belong together


# ---- labels -------------------------------------------------------------------------------------------------------


def warned(labels):
    data = prepare(Table(rows(labels), "t", ("text",), "label"), {}, validation_share=0)
    return [finding.message for finding in inspect(data)]


TWINS = {
    "space at the end": ("pos", "pos "),
    "space in front": ("pos", " pos"),
    "no-break space": ("very good", "very\u00a0good"),
    "case": ("Positive", "positive"),
    "form of a character": ("caf\u00e9", "cafe\u0301"),
    "zero width": ("pos", "pos\u200b"),
    "full width": ("pos", "\uff50\uff4f\uff53"),
    "number": ("01", "1"),
}


@pytest.mark.parametrize("twins", TWINS.values(), ids=TWINS)
def test_labels_that_look_the_same_are_said(twins):
    messages = warned([twins[0]] * 8 + [twins[1]] * 8 + ["other"] * 8)
    (said,) = [message for message in messages if "look the same" in message]
    assert repr(twins[0]) in said
    assert repr(twins[1]) in said
    assert not [message for message in warned(["up"] * 12 + ["down"] * 12) if "look the same" in message]


def test_whole_numbers_written_as_fractions_are_one_class():
    assert [label_name(value) for value in ("1", "1.0", 1, 1.0, "1.5", "01", "v1.0")] == [
        *["1"] * 4, "1.5", "01", "v1.0",
    ]  # fmt: skip


def test_numbers_are_alike_by_their_exact_value():
    """Naive: floats of large numbers, or six digits of them, are equal."""
    for names in (("9007199254740993", "9007199254740992"), ("1234567", "1234568"), (str(10**30), str(10**30 + 1))):
        assert not [message for message in warned([*names] * 12) if "look the same" in message]
        assert problem(rows([*names] * 12)).names == problem(rows([*names[::-1]] * 12)).names == tuple(sorted(names))
    assert [message for message in warned(["1", "01", "1e0"] * 8) if "'1e0'" in message and "'01'" in message]


@pytest.mark.parametrize("name", ["N/A", "nan", "none", "-", "?", "NULL"])
def test_classes_that_stand_for_no_label_are_said(name):
    assert any(repr(name) in message and "no label" in message for message in warned([name, "a", "b"] * 8))


def test_minus_one_beside_class_numbers_is_said():
    assert any("'-1'" in message for message in warned([-1, 0, 1] * 8))
    for labels in ([-1, 1, -2], [-1, 1, -1]):
        assert not any("no label" in message for message in warned(labels * 8))


NUMBERS = {
    "thousands": ([f"{i + 1},000" for i in range(24)], r"a comma before three digits \('1,000'\).* write 1000 for"),
    "bytes": ([b"pos", b"neg"] * 12, r"is bytes \(b'pos'\) in 24 of 24 rows.*Decode them"),
    "decimal commas": ([f"{i % 5},5" for i in range(24)], r"decimal comma \('0,5'\)"),
    "half steps": (["3", "3,5", "4", "5"] * 6, r"decimal comma \('3,5'\) in 6 of 24 rows"),
    "points too": (["1.000,50", "950,00"] * 12, r"decimal comma \('1.000,50'\) in 24 of 24 rows"),
    "few thousands": (["950", "800", "1,200"] * 8, r"a comma before three digits \('1,200'\) in 8 of 24 rows"),
    "digits joined": (["1", "2", "1,2"] * 8, r"decimal comma \('1,2'\).* several labels, say --label-separator ','"),
    "per cent": ([f"{i % 5}%" for i in range(24)], r"per cent sign \('0%'\)"),
    "a few N/A": ([*(f"{i / 2}" for i in range(22)), "N/A", "?"], r"'N/A', '\?' in 2 of 24 rows"),
    "objects": ([{"name": x} for x in LABELS], r"an object \(\{'name': 'pos'\}\)"),
}


@pytest.mark.parametrize(("labels", "part"), NUMBERS.values(), ids=NUMBERS)
def test_numbers_in_other_clothes_never_become_classes(labels, part):
    with pytest.raises(UsageError, match=part):
        problem(rows(labels))


def test_regression_on_decimal_commas_shows_a_value_and_the_remedy():
    with pytest.raises(UsageError, match=r"\('0,5', .*with a point instead of a comma"):
        problem(rows([f"{i % 5},5" for i in range(24)]), kind="regression")


def test_commas_between_thousands_are_not_to_be_written_as_points():
    """Naive: "write a point instead of the comma" makes 1.5 of 1,500."""
    with pytest.raises(UsageError, match="without commas between thousands, as in 1000"):
        problem(rows([f"1,{i:03}" for i in range(24)]), kind="regression")


def test_targets_of_another_scale_are_said():
    """Stars from 1 to 5 in training, per cent in the test file: RMSE and R2 would be of two units."""

    def said(labels):
        data = prepare(
            Table(rows([i % 5 + 1.5 for i in range(24)]), "t", ("text",), "label", "regression"),
            {"later": Table(rows(labels).assign(text=[f"{t} later" for t in TEXTS]), "later.csv", ("text",), "label")},
            validation_share=0,
        )
        return [finding.message for finding in inspect(data, standardize=True) if "far outside" in finding.message]

    (message,) = said([20.0 * (i % 5) + 10 for i in range(24)])
    assert "later.csv: targets of 24 of 24 rows" in message
    assert "1.5 to 5.5" in message
    assert said([i % 7 for i in range(24)]) == []


def test_stars_with_a_few_words_stay_classes():
    assert problem(rows([*("1", "2", "3") * 7, "none", "none", "none"])).names == ("1", "2", "3", "none")


def test_a_label_that_is_found_must_be_the_only_one_that_may_be_meant():
    frame = pd.DataFrame(
        {
            "utterance": [f"say it {i} times or more" for i in range(240)],
            "lang": ["en", "de"] * 120,
            "category_name": [f"topic {i % 40}" for i in range(240)],
        }
    )
    with pytest.raises(UsageError, match="may be the label: lang, category_name"):
        problem(frame)
    assert problem(frame, label="lang").names == ("de", "en")


def test_a_number_among_the_texts_is_named():
    with pytest.raises(UsageError, match="must hold strings, got 12345"):
        problem(pd.DataFrame({"text": pd.Series([12345, *TEXTS[1:]], dtype=object), "label": LABELS}))


def test_a_class_of_one_row_in_a_draw_says_that_it_was_drawn():
    frame = rows(["a"] * 11 + ["b"] * 10 + ["c"] * 3)
    with pytest.raises(UsageError, match=r"of the 6 rows drawn by --train-size: class 'c' has 1 row"):
        prepare(Table(frame, "t", ("text",), "label"), {}, train_size=6, validation_share=0.2)


def test_whole_numbers_are_read_as_classes_and_said_so(caplog):
    """Naive: somebody who means ratings learns of it from the metrics."""
    said = "3 whole numbers are read as classes; --kind regression reads numbers"
    with caplog.at_level("INFO", "steadytune"):
        assert problem(rows([0, 1] * 12)).names == ("0", "1")
        assert problem(rows([1, 2, 5] * 8), kind="classification").names == ("1", "2", "5")
        assert "whole numbers" not in caplog.text
        assert problem(rows([1, 2, 5] * 8)).names == ("1", "2", "5")
    assert caplog.messages[-1].endswith(said)
