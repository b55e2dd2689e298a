"""Read tables from files, data frames, `datasets.Dataset` and the hub. No torch here.

Nothing from disk is unpickled. A source that cannot be read gives one `UsageError` that says what to do instead.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import importlib
import itertools
import json
import logging
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import numpy as np
import pandas as pd

from ..errors import UsageError, first_rows, one_line, suggest

logger = logging.getLogger("steadytune")

CHUNK_ROWS = 10_000  # number of rows of a file that are read at once
SAMPLE = 200  # lines of a file that tell its delimiter and where its quotation marks stand
HUB = "hub:"  # prefix of a source on the hub


def read_rows(source: Any, called: str = "the table") -> tuple[pd.DataFrame, str]:
    """Read the rows of any source, and name it for messages. All rows of the package come through this function.

    Args:
        source: A file (see `read_table`); a data frame; a `datasets.Dataset` (anything with `to_pandas`), whose class
            numbers become their names; a dictionary of columns; or a data set of the hub, `hub:owner/name` with the
            options `hub:owner/name?config=NAME&split=NAME` (split: train).
        called: Name in messages for a source without its own name.

    Returns:
        The rows, numbered from 0, with strings as column names; and the name of the source.

    Raises:
        UsageError: There is no such source, it cannot be read, or its columns have no names of their own.
    """
    if isinstance(source, pd.DataFrame):
        return named_columns(source, called).reset_index(drop=True), called
    if isinstance(source, (str, Path)):
        read = read_hub if str(source).startswith(HUB) else read_table
        return named_columns(read(str(source)), str(source)), str(source)
    return named_columns(_from_dataset(source, called), called), called


def sequence_rows(rows: Any, called: str) -> pd.DataFrame:
    """A sequence of texts, or of pairs of texts, as a frame with `text` (and `text_pair`).

    Raises:
        UsageError: It is not a sequence or is a single text, there are no rows, or a row does not have one or two
            texts.
    """
    if rows is None or isinstance(rows, (str, bytes)) or not isinstance(rows, Iterable):
        raise UsageError(
            f"{called} must be a list of texts, a list of pairs of texts, or a table, got {type(rows).__name__}: put a "
            "single text into a list."
        )
    if isinstance(rows, (set, frozenset)):
        raise UsageError(f"{called} are a {type(rows).__name__}, which has no order: give a list.")
    if isinstance(rows, np.ndarray) and rows.ndim == 0:
        raise UsageError(f"{called} are an array without rows: put a single text into a list.")
    cells = [list(row) if isinstance(row, (list, tuple, np.ndarray)) else [row] for row in rows]
    if not cells:
        raise UsageError(f"{called}: there are no rows.")
    widths = {len(row) for row in cells}
    if widths not in ({1}, {2}):
        raise UsageError(f"{called} must hold one text or one pair of texts a row, got rows of {sorted(widths)} cells.")
    names = ("text", "text_pair")[: widths.pop()]
    columns = {name: pd.Series([row[i] for row in cells], dtype=object) for i, name in enumerate(names)}
    return named_columns(pd.DataFrame(columns), called)


def named_columns(frame: pd.DataFrame, called: str) -> pd.DataFrame:
    """The frame with strings for column names, which options, records and model cards can hold.

    White space around a name is left out, unless two names differ by it alone.

    Raises:
        UsageError: The names have several levels, or the frame has an index and no column.
    """
    if isinstance(frame.columns, pd.MultiIndex):
        raise UsageError(
            f"{called}: the column names have {frame.columns.nlevels} levels: give each column one name, as with "
            "frame.columns = ['_'.join(name) for name in frame.columns]."
        )
    if frame.columns.empty and frame.index.names != [None]:
        levels = ", ".join(map(str, frame.index.names))
        raise UsageError(f"{called}: there are no columns, only the index ({levels}): give frame.reset_index().")
    names = [str(name) for name in frame.columns]
    stripped = [column_name(name) for name in names]
    if len({*stripped}) == len({*names}):  # "text, label" in a header, spaces at the end of a cell
        names = stripped
    return _whole_characters(frame.set_axis(names, axis=1), called)


def column_name(given: Any) -> str:
    """A column's name as `read_rows` writes it: a string without white space around it."""
    return str(given).strip()


def _whole_characters(frame: pd.DataFrame, called: str) -> pd.DataFrame:
    """Replace halves of characters (lone surrogates, as in clipped tweets) by U+FFFD, with a warning."""
    places = [n for n, dtype in enumerate(frame.dtypes) if pd.api.types.is_object_dtype(dtype)]
    for place in places:
        given = frame.iloc[:, place].tolist()
        whole = [whole_characters(value) for value in given]
        changed = [n for n, (old, new) in enumerate(zip(given, whole, strict=True)) if old is not new and old != new]
        if changed:
            logger.warning(
                "%s: column %r holds halves of characters in %d rows, read as U+FFFD (rows counted from 0: %s)",
                called, frame.columns[place], len(changed), first_rows(changed),
            )  # fmt: skip
            frame = frame.copy()
            frame.isetitem(place, np.fromiter(whole, dtype=object, count=len(whole)))
    return frame


def whole_characters(value: Any) -> Any:
    """Replace halves of characters (lone surrogates) of a string by U+FFFD; return anything else unchanged."""
    if not isinstance(value, str) or value.isascii():
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


# ---- files ------------------------------------------------------------------------------------------------------


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a `.csv`, `.tsv`, `.jsonl` (`.ndjson`, `.json`) or `.parquet` file.

    Cells of CSV and TSV files stay text, so that a label `01` or a text `NA` is kept; only an empty cell is missing.
    Rows are numbered from 0 in file order; the header is not counted.

    Raises:
        UsageError: The ending is unknown, there is no such file, or its contents do not fit its ending.
    """
    path = Path(path)
    with readable(path):
        return READERS[path.suffix.lower()](path).reset_index(drop=True)
    return pd.DataFrame()  # a file without a line


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """Check that a file is one of a table, and turn what readers raise into one sentence; empty files are left.

    Raises:
        UsageError: As of `read_table`.
    """
    if path.suffix.lower() not in READERS:
        raise UsageError(
            f"{path}: files end in {', '.join(READERS)}, got {path.suffix or 'no ending'!r}. A single text goes into a "
            "list."
        )
    if path.is_dir():
        raise UsageError(f"{path}: this is a folder: give a file in it.")
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob(f"*{path.suffix}")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        raise UsageError(f"{path}: no such file." + (f" Did you mean {near[0]!r}?" if near else ""))
    _check_format(path)
    try:
        yield
    except UsageError:
        raise
    except pd.errors.EmptyDataError:
        return
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: text must be UTF-8 ({error}). Convert it first, for example with iconv.") from error
    except (pd.errors.ParserError, pd.errors.ParserWarning) as error:
        raise UsageError(f"{path}: not a readable {path.suffix} file: {_ragged(path) or one_line(error)}") from error
    except (ValueError, OSError) as error:
        raise UsageError(f"{path}: not a readable {path.suffix} file: {one_line(error)}") from error


# First bytes of files in other formats than their ending, and what to do.
FORMATS = {
    b"\x1f\x8b": "compressed with gzip: unpack it first (gunzip)",
    b"PK\x03\x04": "a zip archive or a spreadsheet (.xlsx): unpack it, or save the sheet as .csv",
    b"BZh": "compressed with bzip2: unpack it first (bunzip2)",
    b"\xfd7zXZ": "compressed with xz: unpack it first (unxz)",
    b"\x28\xb5\x2f\xfd": "compressed with zstd: unpack it first (unzstd)",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet (.xls): save the sheet as .csv",
    b"\xff\xfe": "text in UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "text in UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"PAR1": "a Parquet file: let its name end in .parquet",
    b"%PDF": "a PDF document: save the table as .csv",
}


def _check_format(path: Path) -> None:
    """Raise for a file that should be text and has another format."""
    if path.suffix.lower() == ".parquet":
        return
    with path.open("rb") as file:
        begin = file.read(4096)
    for sign, what in FORMATS.items():
        if begin.startswith(sign):
            raise UsageError(f"{path}: this file is {what}.")
    if b"\0" in begin:
        raise UsageError(f"{path}: this file has zero bytes and is not text in UTF-8: save it as UTF-8.")


def _read_csv(path: Path) -> pd.DataFrame:
    """Read a CSV file with commas, or with the delimiter that a first line `sep=` names."""
    dialect = csv_dialect(path)
    return checked_rows(_pandas(path, **dialect), path, dialect["sep"])


def csv_dialect(path: Path) -> dict[str, Any]:
    """Options of pandas for a CSV file: delimiter, lines before the header, escape of quotation marks.

    Raises:
        UsageError: The file has another delimiter, or a misplaced quotation mark.
    """
    sep, skipped = _delimiter(path)
    _check_delimiter(path, sep, skipped)
    spaced = _spaced_quotes(path, sep, skipped)
    options = {"skipinitialspace": True} if spaced else {"escapechar": "\\"} if _backslashes(path, sep) else {}
    return {"sep": sep, "skiprows": skipped, **options}


def _delimiter(path: Path) -> tuple[str, int]:
    """What stands between the cells of a CSV or TSV file, and how many lines stand above the header."""
    if path.suffix.lower() == ".tsv":
        return "\t", 0
    with path.open(encoding="utf-8-sig", newline="") as file:
        named = re.fullmatch(r"sep=(.)\r?\n?", file.readline())  # Excel writes such a line
    return (named[1], 1) if named else (",", 0)


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    """Let Python's reader of CSV read cells of any length; its own limit is 131,072 characters."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _spaced_quotes(path: Path, sep: str, skipped: int) -> bool:
    """Whether quoted cells stand behind a delimiter and a space: read as they are, their marks would be text."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = list(itertools.islice(file, skipped, skipped + SAMPLE))
    if not any(f'{sep} "' in line for line in lines):
        return False
    counts = set()
    try:
        with _long_cells():
            for row in csv.reader(lines, delimiter=sep, skipinitialspace=True, strict=True):
                counts |= {len(row)} if row else set()
    except csv.Error as error:
        if "unexpected end" not in str(error) or len(lines) < SAMPLE:  # a cell may go on behind the last of many lines
            return False
    return len(counts) == 1


def checked_rows(frame: pd.DataFrame, path: Path, sep: str) -> pd.DataFrame:
    """Drop repeated headers from the rows of a file.

    Raises:
        UsageError: An unclosed quotation mark has swallowed rows.
    """
    rows = _swallowed(frame, sep)
    if len(rows):
        raise UsageError(
            f"{path}: quotation marks hold lines that look like rows of their own in {len(rows)} rows (rows counted "
            f"from 0: {first_rows(rows)}): a mark was opened and not closed. Double each quotation mark inside a text, "
            "or take it out."
        )
    return _without_headers(frame, path)


def _pandas(path: Path, sep: str, **options: Any) -> pd.DataFrame:
    """Read cells as text, with only empty cells missing; the first line names the columns, possibly one twice."""
    return next(csv_chunks(path, sep, **options))


def csv_chunks(path: Path, sep: str, rows: int | None = None, **options: Any) -> Generator[pd.DataFrame, None, None]:
    """Read a CSV or TSV file in frames of a number of rows, or in one; the index counts the rows of the file."""
    given: dict[str, Any] = {
        "sep": sep, "dtype": str, "keep_default_na": False, "na_values": [""], "encoding": "utf-8-sig", **options,
    }  # fmt: skip
    header = pd.read_csv(path, header=None, nrows=1, **given).iloc[0]
    names = [f"column {n + 1}" if pd.isna(name) or not name.strip() else name for n, name in enumerate(header)]
    given |= {"header": 0, "names": list(range(len(names))), "index_col": False}
    with warnings.catch_warnings():
        # for rows longer than the header, pandas would shift the columns (the first to the index) or drop the last
        warnings.simplefilter("error", pd.errors.ParserWarning)
        if rows is None:
            yield pd.read_csv(path, **given).set_axis(names, axis=1)
            return
        with pd.read_csv(path, chunksize=rows, **given) as reader:
            for frame in reader:
                yield frame.set_axis(names, axis=1)


def _check_delimiter(path: Path, sep: str, skipped: int) -> None:
    """Raise if another delimiter in the header cuts header and rows into equally many cells.

    The rows alone do not tell, because texts contain commas. The header alone does not, because a column may be called
    ``stars, 1-3``. A delimiter that cuts the header and every row into the same number of cells is the real one.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = [line for line in itertools.islice(file, skipped, skipped + SAMPLE) if line.strip("\r\n")]
    if not lines:
        return
    header = lines[0].rstrip("\r\n")
    others = [other for other in ("\t", ";", "|", ",") if other in header and other != sep]
    if sep in header:
        others = [other for other in others if len(lines) > 1 and _cut_alike(lines, other)]
    if not others:
        return
    other = max(others, key=header.count)
    endings = {"\t": ".tsv", ",": ".csv"}
    remedy = f"Rename it to {endings[other]}" if other in endings else f"Save it with {sep!r} between the columns"
    raise UsageError(
        f"{path}: {path.suffix} files have {sep!r} between columns, and the header {header!r} seems to have {other!r}. "
        f"{remedy}, or pass the data frame of pandas.read_csv(..., sep={other!r})."
    )


def _cut_alike(lines: Sequence[str], other: str) -> bool:
    """Whether a delimiter cuts all lines into the same number of cells, two or more."""
    try:
        with _long_cells():
            counts = {len(row) for row in csv.reader(lines, delimiter=other)}
    except csv.Error:
        return False
    return len(counts) == 1 and counts != {1}


def _backslashes(path: Path, sep: str) -> bool:
    """Whether quotation marks inside quoted cells follow a backslash; otherwise they are doubled.

    Raises:
        UsageError: Text follows a closing quotation mark, or a mark is not closed.
    """
    wrong = _misquoted(path, sep)
    if wrong is None:
        return False
    if _misquoted(path, sep, escaped=True) is None:
        return True
    line, problem = wrong
    raise UsageError(
        f"{path}, line {line}: {problem}. Double each quotation mark inside a quoted text, or take it out."
    )


def _misquoted(path: Path, sep: str, *, escaped: bool = False) -> tuple[int, str] | None:
    """Line and kind of the first misplaced quotation mark; ``escaped`` marks follow a backslash."""
    with _long_cells(), path.open(encoding="utf-8-sig", newline="") as file:
        lines = (line.replace('\\"', "'") for line in file) if escaped else file
        reader = csv.reader(lines, delimiter=sep, strict=True)
        try:
            for _ in reader:
                pass
        except csv.Error as error:
            open_mark = "unexpected end" in str(error)
            what = "a quotation mark is opened and never closed" if open_mark else None
            return reader.line_num, what or "text goes on behind a closing quotation mark"
    return None


def _lacks_cells(path: Path, sep: str) -> bool:
    """Whether a row has fewer cells than the header. Empty cells count here, unlike in the frame of pandas."""
    with _long_cells(), path.open(encoding="utf-8-sig", newline="") as file:
        counts = (len(row) for row in csv.reader(file, delimiter=sep) if row)
        header = next(counts, 0)
        return any(count < header for count in counts)


def _ragged(path: Path) -> str | None:
    """The first row of a CSV or TSV file with more cells than the header, in words."""
    sep, skipped = _delimiter(path)
    with _long_cells(), path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(itertools.islice(file, skipped, None), delimiter=sep)
        header = next(reader, [])
        for row in reader:
            if len(row) > len(header):
                return (
                    f"line {reader.line_num + skipped} has {len(row)} cells, the header {sep.join(header)[:60]!r} has "
                    f"{len(header)}. Put cells that hold {sep!r} in double quotation marks, and let the file begin "
                    "with the header."
                )
    return None


def _swallowed(frame: pd.DataFrame, sep: str) -> np.ndarray:
    """Rows with a cell of several lines, one of which looks like a whole row.

    A line looks like a row if it has as many cells, and one of the known values in a column of few values.
    """
    several = np.zeros(len(frame), dtype=bool)
    for place in range(frame.shape[1]):
        several |= frame.iloc[:, place].str.contains("\n", regex=False, na=False).to_numpy(dtype=bool)
    if not several.any() or frame.shape[1] < 2:
        return np.array([], dtype=int)
    columns = [frame.iloc[:, place].dropna() for place in range(frame.shape[1])]
    few = {place: set(cells) for place, cells in enumerate(columns) if 1 < cells.nunique() <= max(20, len(frame) // 10)}
    swallowed_rows = []
    for row in np.flatnonzero(several):
        for cell in frame.iloc[row].dropna():
            for line in cell.split("\n")[:-1] if "\n" in cell else ():
                cells = line.rstrip("\r").split(sep)
                if len(cells) == frame.shape[1] and any(cells[place] in values for place, values in few.items()):
                    swallowed_rows.append(row)
    return np.unique(swallowed_rows).astype(int)


def _without_headers(frame: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Drop rows that repeat the header, as in files that were concatenated."""
    again = (frame == list(frame.columns)).all(axis=1).to_numpy(dtype=bool)
    if again.any():
        rows = np.flatnonzero(again)
        logger.warning(
            "%s: %d rows repeat the header and are left out (rows counted from 0: %s)",
            path,
            len(rows),
            first_rows(rows),
        )
    return frame[~again]


def _read_tsv(path: Path) -> pd.DataFrame:
    """Read a TSV file: benchmarks (GLUE) do not quote, spreadsheets quote cells that need it."""
    return _without_headers(_pandas(path, **tsv_dialect(path)), path)


def tsv_dialect(path: Path) -> dict[str, Any]:
    """Options of pandas for a TSV file.

    Quotation marks quote cells if every quoted cell opens and closes correctly, every row has all its cells, and no
    cell looks like a row. Otherwise they are part of the text.
    """
    _check_delimiter(path, "\t", 0)
    plain: dict[str, Any] = {"sep": "\t", "quoting": csv.QUOTE_NONE}
    if _misquoted(path, "\t") is not None or _lacks_cells(path, "\t"):
        return plain
    try:
        with contextlib.closing(csv_chunks(path, "\t", CHUNK_ROWS)) as chunks:
            quoted = all(not len(_swallowed(chunk, "\t")) for chunk in chunks)
    except (pd.errors.ParserError, pd.errors.ParserWarning):
        return plain
    return {"sep": "\t"} if quoted else plain


def _read_json(path: Path) -> pd.DataFrame:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = json.loads(text, object_pairs_hook=_pairs)
    elif text.lstrip().startswith("{") and "\n" not in text.strip() and _columns(text):
        raise UsageError(
            f"{path}: this is one JSON object of columns, as pandas writes it: write one object a line instead, with "
            "frame.to_json(path, orient='records', lines=True)."
        )
    else:
        rows = [json_row(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    return json_frame(path, rows)


def json_frame(path: Path, rows: Sequence[Any], names: Iterable[str] | None = None) -> pd.DataFrame:
    """A frame of JSON objects, one for each row.

    Args:
        path: The file.
        rows: What stands in each row.
        names: Columns of the frame; by default the fields of these rows, in the order in which they occur.

    Raises:
        UsageError: A row is not an object.
    """
    if not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}: every row must be a JSON object with named fields.")
    names = dict.fromkeys(name for row in rows for name in row) if names is None else names
    return pd.DataFrame({name: pd.Series([row.get(name) for row in rows], dtype=object) for name in names})


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; raise if it names a field twice."""
    for name, count in Counter(name for name, _ in pairs).items():
        if count > 1:
            raise UsageError(f"{count} fields of one JSON object are called {name!r}: rename them.")
    return dict(pairs)


def _columns(text: str) -> bool:
    """Whether a JSON object has columns instead of being a row."""
    try:
        values = json.loads(text).values()
    except ValueError:
        return False
    return len(values) > 1 and all(isinstance(value, (dict, list)) for value in values)


def json_row(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line, object_pairs_hook=_pairs)
    except UsageError as error:
        raise UsageError(f"{path}, line {number}: {error}") from error
    except json.JSONDecodeError as error:
        raise UsageError(f"{path}, line {number}: not JSON ({error}). One object a line is expected.") from error


READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".parquet": pd.read_parquet,
}


# ---- datasets and the hub ---------------------------------------------------------------------------------------


def read_hub(source: str) -> pd.DataFrame:
    """The rows of `hub:owner/name?config=NAME&split=NAME`.

    Raises:
        UsageError: An option is unknown, the package `datasets` is not installed, or the hub has no such data set,
            config or split, or cannot be reached.
    """
    name, _, query = source.removeprefix(HUB).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for option in options:
        if option not in ("config", "split"):
            raise UsageError(f"{source}: unknown option {option!r}.{suggest(option, ('config', 'split'))}")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise UsageError(f"{source}: the hub is read with datasets: pip install 'steadytune[hub]'.") from error
    try:
        dataset = datasets.load_dataset(name, options.get("config"), split=options.get("split", "train"))
    except Exception as error:  # the hub, its client and each file format raise their own errors
        raise UsageError(
            f"{source}: cannot be loaded ({type(error).__name__}: {one_line(error)}). Check the name, "
            "?config=NAME&split=NAME and the connection, or download the data set and give one of its files."
        ) from error
    return _from_dataset(dataset, source)


def _from_dataset(dataset: Any, called: str) -> pd.DataFrame:
    if isinstance(dataset, Mapping) and dataset and all(_is_column(values) for values in dataset.values()):
        lengths = {str(name): len(values) for name, values in dataset.items()}
        if len({*lengths.values()}) > 1:
            said = ", ".join(f"{name} has {length}" for name, length in lengths.items())
            raise UsageError(f"{called}: the columns have different lengths ({said}).")
        return pd.DataFrame({name: pd.Series(list(values), dtype=object) for name, values in dataset.items()})
    if isinstance(dataset, Mapping):
        raise UsageError(f"{called} is a dictionary of splits ({', '.join(map(str, dataset))}): pass one of them.")
    if not hasattr(dataset, "to_pandas"):
        raise UsageError(
            f"{called} must be a file, a data frame, a datasets.Dataset or {HUB}owner/name, "
            f"got {type(dataset).__name__}."
        )
    frame = dataset.to_pandas().reset_index(drop=True)
    for column, feature in dict(getattr(dataset, "features", None) or {}).items():
        if column in frame.columns:
            frame[column] = _named(frame[column], feature)
    return frame


def _is_column(values: Any) -> bool:
    """Whether a value of a dictionary is a column of cells."""
    return isinstance(values, (list, tuple, np.ndarray, pd.Series))


def _named(values: pd.Series, feature: Any) -> pd.Series:
    """Replace class numbers, or lists of them, by names; a label that the hub hides (-1) is missing."""
    if hasattr(feature, "int2str"):
        names = values.map(lambda number: _class_name(feature, number))
        return pd.Series(pd.Categorical(names, feature.names, ordered=True), index=values.index)  # keeps the order
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    if hasattr(inner, "int2str"):
        return values.map(lambda numbers: None if numbers is None else [_class_name(inner, n) for n in numbers])
    return values


def _class_name(feature: Any, number: Any) -> str | None:
    return None if pd.isna(number) or number < 0 else str(feature.int2str(int(number)))
