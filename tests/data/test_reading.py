import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from steadytune.data.files import read_rows, read_table
from steadytune.data.labels import find_problem
from steadytune.data.tables import Table, examples
from steadytune.errors import UsageError

# ---- files ------------------------------------------------------------------------------------------------------

LINES = {
    ".csv": 'text,label\n"one, two",a\nNA,01\n',
    ".tsv": "text\tlabel\none, two\ta\nNA\t01\n",
    ".jsonl": '{"text": "one, two", "label": "a"}\n\n{"text": "NA", "label": "01"}\n',
    ".json": '[{"text": "one, two", "label": "a"}, {"text": "NA", "label": "01"}]',
}


@pytest.mark.parametrize("suffix", LINES)
def test_every_text_format_gives_the_same_rows(tmp_path, suffix):
    file = tmp_path / f"table{suffix}"
    file.write_text("\ufeff" + LINES[suffix], encoding="utf-8")
    assert read_table(file).to_dict("list") == {"text": ["one, two", "NA"], "label": ["a", "01"]}


def test_trailing_commas_do_not_shift_columns(tmp_path):
    """pandas takes the first column for an index where rows are longer than the header."""
    (tmp_path / "t.csv").write_text("text,label\na,p,\nb,q,\n")
    assert read_table(tmp_path / "t.csv").to_dict("list") == {"text": ["a", "b"], "label": ["p", "q"]}


def test_parquet_keeps_types(tmp_path):
    table = pd.DataFrame({"text": ["x", "y"], "label": [True, False]}, index=[7, 9])
    table.to_parquet(tmp_path / "t.parquet")
    back = read_table(tmp_path / "t.parquet")
    assert back["label"].tolist() == [True, False]
    assert back.index.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ('text\tlabel\n"a quote left open\t0\nanother" one\t1\n', ['"a quote left open', 'another" one']),
        ('text\tlabel\n"tab\there"\t0\nplain\t1\n', ["tab\there", "plain"]),
        ('text\tlabel\n"open to the end\t0\n', ['"open to the end']),
    ],
    ids=["swallowed line", "quoted tab", "never closed"],
)
def test_tsv_quotes_never_swallow_lines(tmp_path, text, rows):
    (tmp_path / "t.tsv").write_text(text)
    assert read_table(tmp_path / "t.tsv")["text"].tolist() == rows


@pytest.mark.parametrize(
    ("name", "header", "parts"),
    [
        ("t.csv", "text;label", ["seems to have ';'", "Save it with ','", "sep=';'"]),
        ("t.csv", "text\tlabel", ["seems to have '\\t'", "Rename it to .tsv"]),
        ("t.csv", "id|text|label", ["seems to have '|'"]),
        ("t.tsv", "text,label", ["seems to have ','", "Rename it to .csv"]),
        ("t.csv", "id;text;label|score", ["seems to have ';'"]),
    ],
)
def test_wrong_delimiter_is_named(tmp_path, name, header, parts):
    """Also where the texts hold the delimiter that is expected, and pandas would complain about the rows."""
    (tmp_path / name).write_text(f"{header}\none, two, three; 1\n")
    with pytest.raises(UsageError) as caught:
        read_table(tmp_path / name)
    for part in [name, *parts]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_column_without_any_delimiter_is_a_table(tmp_path):
    (tmp_path / "t.csv").write_text("text\ngood; really | good\n")
    assert read_table(tmp_path / "t.csv")["text"].tolist() == ["good; really | good"]


def test_a_pickle_is_not_opened(tmp_path):
    pd.DataFrame({"text": ["a"]}).to_pickle(tmp_path / "t.pkl")
    (tmp_path / "t.pkl").rename(tmp_path / "t.parquet")
    with pytest.raises(UsageError, match=r"not a readable \.parquet file"):
        read_table(tmp_path / "t.parquet")


# ---- any source -------------------------------------------------------------------------------------------------


class ClassLabel:
    """The part of `datasets.ClassLabel` that is used."""

    def __init__(self, names):
        self.names = names

    def int2str(self, number):
        return self.names[range(len(self.names)).index(number)]


class Rows:
    """The part of `datasets.Dataset` that is used."""

    def __init__(self, features=None, **columns):
        self.columns, self.features = columns, features

    def to_pandas(self):
        return pd.DataFrame(self.columns)


def test_a_frame_is_numbered_from_zero_and_left_alone():
    frame = pd.DataFrame({"text": ["a", "b"]}, index=[5, 3])
    rows, name = read_rows(frame, "the train table")
    assert (rows.index.tolist(), name, frame.index.tolist()) == ([0, 1], "the train table", [5, 3])


def test_a_file_is_called_by_its_path(tmp_path):
    (tmp_path / "t.csv").write_text(LINES[".csv"])
    for path in (tmp_path / "t.csv", str(tmp_path / "t.csv")):
        assert read_rows(path)[1] == str(tmp_path / "t.csv")


def check_named(dataset):
    """Classes keep the order of the data set, which is not the alphabet's; the hidden label is missing."""
    frame, name = read_rows(dataset, "the test table")
    assert name == "the test table"
    assert frame["label"].tolist()[:2] == ["spam", "ham"]
    assert frame["label"].isna().tolist() == [False, False, True]
    assert frame["topics"].map(list).tolist() == [["news", "art"], [], ["art"]]
    table = Table(frame[:2], "t")
    assert find_problem(examples(table), table).names == ("spam", "ham")


TEXTS = ["a", "b", "c"]


@pytest.mark.parametrize(
    "topics", [[ClassLabel(["art", "news"])], SimpleNamespace(feature=ClassLabel(["art", "news"]))]
)
def test_class_numbers_become_names(topics):
    features = {"text": SimpleNamespace(), "label": ClassLabel(["spam", "ham"]), "topics": topics, "absent": None}
    numbers = [np.array([1, 0]), np.array([], dtype=int), np.array([0])]
    check_named(Rows(features, text=TEXTS, label=[0, 1, -1], topics=numbers))


def test_real_datasets_read_alike():
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(
        text=datasets.Value("string"),
        label=datasets.ClassLabel(names=["spam", "ham"]),
        topics=datasets.Sequence(datasets.ClassLabel(names=["art", "news"])),
    )
    columns = {"text": TEXTS, "label": [0, 1, -1], "topics": [[1, 0], [], [0]]}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    check_named(dataset)
    with pytest.raises(UsageError, match=r"dictionary of splits \(train, test\)"):
        read_rows(datasets.DatasetDict(train=dataset, test=dataset))


def test_anything_with_to_pandas_is_read():
    assert read_rows(Rows(text=["a"]))[0]["text"].tolist() == ["a"]


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ({"train": Rows(), "test": Rows()}, ["the train table is a dictionary of splits (train, test)", "pass one"]),
        ([("a", 1)], ["must be a file", "hub:owner/name", "got list"]),
        (None, ["got NoneType"]),
    ],
)
def test_what_is_no_table_is_one_clear_error(source, parts):
    with pytest.raises(UsageError) as caught:
        read_rows(source, "the train table")
    for part in parts:
        assert part in str(caught.value)


# ---- the hub ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A stand-in for the package `datasets` that records what is asked for; the first call may be told to fail."""
    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        if name == "nobody/nothing":
            raise FileNotFoundError("Dataset 'nobody/nothing' doesn't exist\non the Hub")
        return Rows({"label": ClassLabel(["no", "yes"])}, text=["a"], label=[1])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    return calls


@pytest.mark.parametrize(
    ("source", "asked"),
    [
        ("hub:imdb", ("imdb", None, "train")),
        ("hub:owner/name?split=test", ("owner/name", None, "test")),
        ("hub:owner/name?config=C&split=validation", ("owner/name", "C", "validation")),
        ("hub:owner/name?split=train%5B:10%25%5D", ("owner/name", None, "train[:10%]")),
    ],
)
def test_hub_names_are_taken_apart(hub, source, asked):
    frame, name = read_rows(source)
    assert (hub, name) == ([asked], source)
    assert frame["label"].tolist() == ["yes"]


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("hub:owner/name?splt=test", ["unknown option 'splt'", "'split'"]),
        ("hub:nobody/nothing", ["FileNotFoundError: Dataset 'nobody/nothing'", "Check the name", "download"]),
    ],
)
def test_what_the_hub_lacks_is_one_clear_error(hub, source, parts):
    with pytest.raises(UsageError) as caught:
        read_rows(source)
    for part in [source, *parts]:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)  # what importing a missing package meets
    with pytest.raises(UsageError, match=r"pip install 'steadytune\[hub\]'"):
        read_rows("hub:owner/name")


def test_quoted_cells_of_a_tsv_file_are_read_beside_empty_last_cells(tmp_path):
    """Naive: an empty last cell is taken for a row cut short, and quotation marks for text."""
    rows = pd.DataFrame({"text": ['he said "no"', "a b"], "label": ['["a"]', '["b"]'], "note": [None, "x"]})
    rows.to_csv(tmp_path / "t.tsv", sep="\t", index=False)
    assert read_table(tmp_path / "t.tsv")["label"].tolist() == ['["a"]', '["b"]']
    assert read_table(tmp_path / "t.tsv")["text"].tolist() == ['he said "no"', "a b"]


def test_a_text_longer_than_the_limit_of_a_csv_cell_is_read(tmp_path):
    """Naive: Python's csv stops at 131,072 characters while the delimiter is checked."""
    text = "word " * 30_000
    (tmp_path / "t.csv").write_text(f"text,label;x\n{text},a\nb,c\n")
    assert read_table(tmp_path / "t.csv")["text"].tolist() == [text, "b"]


# ---- long cells -------------------------------------------------------------------------------------------------

LONG = "word " * 40_000  # above the limit of Python's reader of CSV


def write(path, text):
    path.write_text(text)
    return path


def test_quotation_marks_behind_a_space_are_read_beside_long_cells_and_cells_of_many_lines(tmp_path):
    """Naive: the first lines cannot be read alone, and the labels become ' "a"' with space and marks."""
    rows = [(LONG, "a"), ("line\n" * 150 + "end", "b"), ("line\n" * 150 + "end", "a")]
    path = write(tmp_path / "t.csv", "text, label\n" + "".join(f'"{text}", "{label}"\n' for text, label in rows))
    assert list(read_table(path).itertuples(index=False, name=None)) == rows


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f'text,label\n"{LONG}",a,b\n', "line 2 has 3 cells, the header 'text,label' has 2"),
        ("sep=;\ntext;label\na b;x;y\n", "line 3 has 3 cells, the header 'text;label' has 2"),
    ],
    ids=["long cell", "named delimiter"],
)
def test_a_row_with_too_many_cells_is_named_whatever_the_file(tmp_path, text, said):
    with pytest.raises(UsageError, match=said):
        read_table(write(tmp_path / "t.csv", text))
