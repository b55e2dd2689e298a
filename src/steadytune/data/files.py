"""Where tables come from: files, data frames, `datasets.Dataset`, the hub. No torch here.

Nothing from disk is ever unpickled; what cannot be read is one `UsageError` that says what to do instead.
"""

from __future__ import annotations

import csv
import difflib
import importlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pandas as pd

from ..errors import UsageError, one_line, suggest

HUB = "hub:"  # what a source on the hub starts with


def read_source(source: Any, called: str = "the table") -> tuple[pd.DataFrame, str]:
    """The rows of any source, and what messages call it.

    Args:
        source: a file (see `read_table`); a data frame; a `datasets.Dataset` (anything with `to_pandas`), whose class
            numbers become their names; or a data set of the hub, `hub:owner/name` with the options
            `hub:owner/name?config=NAME&split=NAME` (split: train).
        called: the name in messages of a source that has none of its own.

    Returns:
        The rows, numbered from 0, and the name.

    Raises:
        UsageError: there is no such source, or it cannot be read.
    """
    if isinstance(source, pd.DataFrame):
        return source.reset_index(drop=True), called
    if isinstance(source, (str, Path)):
        read = read_hub if str(source).startswith(HUB) else read_table
        return read(str(source)), str(source)
    return _from_dataset(source, called), called


# ---- files ------------------------------------------------------------------------------------------------------


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a `.csv`, `.tsv`, `.jsonl` (`.ndjson`, `.json`) or `.parquet` file.

    Cells of CSV and TSV files stay text: a label `01` or a text `NA` is what the file says; only an empty cell is
    missing. Rows are numbered from 0 in file order, header not counted.

    Raises:
        UsageError: the ending is unknown, there is no such file, or it is not what its ending says.
    """
    path = Path(path)
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UsageError(f"{path}: files end in {', '.join(READERS)}, got {path.suffix or 'no ending'!r}.")
    if not path.is_file():
        siblings = [p.name for p in path.parent.glob(f"*{path.suffix}")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        raise UsageError(f"{path}: no such file." + (f" Did you mean {near[0]!r}?" if near else ""))
    try:
        return reader(path).reset_index(drop=True)
    except UsageError:
        raise
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: text must be UTF-8 ({error}). Convert it first, for example with iconv.") from error
    except (ValueError, OSError, pd.errors.ParserWarning) as error:  # parser errors are ValueErrors
        raise UsageError(f"{path}: not a readable {path.suffix} file: {one_line(error)}") from error


def _read_csv(path: Path, sep: str = ",", **options: Any) -> pd.DataFrame:
    _check_delimiter(path, sep)
    with warnings.catch_warnings():
        # rows longer than the header: pandas would shift the columns (first one to the index) or drop the last
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return pd.read_csv(
            path, sep=sep, dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8-sig", index_col=False,
            **options,
        )  # fmt: skip


def _check_delimiter(path: Path, sep: str) -> None:
    """Raise for a header in one piece that another delimiter would cut: the rows are no help, texts hold commas."""
    with path.open(encoding="utf-8-sig") as file:
        header = file.readline().rstrip("\n")
    found = [other for other in ("\t", ";", "|", ",") if other in header]
    if sep in header or not found:
        return
    other = max(found, key=header.count)
    endings = {"\t": ".tsv", ",": ".csv"}
    remedy = f"Rename it to {endings[other]}" if other in endings else f"Save it with {sep!r} between the columns"
    raise UsageError(
        f"{path}: the header {header!r} is one column, {path.suffix} files have {sep!r} between columns and this one "
        f"seems to have {other!r}. {remedy}, or pass the data frame of pandas.read_csv(..., sep={other!r})."
    )


def _read_tsv(path: Path) -> pd.DataFrame:
    """Benchmark TSVs (GLUE) quote nothing, spreadsheets quote where they must: quotes that swallow lines are text."""
    lines = sum(1 for line in path.read_text(encoding="utf-8-sig").split("\n") if line.strip("\r"))
    try:
        table = _read_csv(path, sep="\t")
        if len(table) + 1 >= lines:
            return table
    except pd.errors.ParserError:
        pass
    return _read_csv(path, sep="\t", quoting=csv.QUOTE_NONE)


def _read_json(path: Path) -> pd.DataFrame:
    text = path.read_text(encoding="utf-8-sig")
    if text.lstrip().startswith("["):
        rows = json.loads(text)
    else:
        rows = [_json_row(path, number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{path}: every row must be a JSON object with named fields.")
    return pd.DataFrame(rows)


def _json_row(path: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
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
        UsageError: an option is unknown, the package `datasets` is not installed, or the hub has no such data set,
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
        found = datasets.load_dataset(name, options.get("config"), split=options.get("split", "train"))
    except Exception as error:  # the hub, its client and every file format raise errors of their own
        raise UsageError(
            f"{source}: cannot be loaded ({type(error).__name__}: {one_line(error)}). Check the name, "
            "?config=NAME&split=NAME and the connection, or download the data set and give one of its files."
        ) from error
    return _from_dataset(found, source)


def _from_dataset(dataset: Any, called: str) -> pd.DataFrame:
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


def _named(values: pd.Series, feature: Any) -> pd.Series:
    """Class numbers, or lists of them, as names; a label the hub hides (-1) is missing."""
    if hasattr(feature, "int2str"):
        names = values.map(lambda number: _class_name(feature, number))
        return pd.Series(pd.Categorical(names, feature.names, ordered=True), index=values.index)  # keeps the order
    inner = feature[0] if isinstance(feature, list) and feature else getattr(feature, "feature", None)
    if hasattr(inner, "int2str"):
        return values.map(lambda numbers: None if numbers is None else [_class_name(inner, n) for n in numbers])
    return values


def _class_name(feature: Any, number: Any) -> str | None:
    return None if pd.isna(number) or number < 0 else str(feature.int2str(int(number)))


TABLE_WRITERS: dict[str, Callable[[pd.DataFrame, Path], Any]] = {
    ".csv": lambda table, path: table.to_csv(path, index=False),
    ".tsv": lambda table, path: table.to_csv(path, index=False, sep="\t"),
    ".jsonl": lambda table, path: table.to_json(path, orient="records", lines=True, force_ascii=False),
    ".parquet": lambda table, path: table.to_parquet(path),
}
