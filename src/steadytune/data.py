"""Tables of labelled text: reading them, checking them, splitting them. No torch here.

Everything a user can get wrong about data is found here, before a model is loaded, and reported as one `UsageError`
that names the thing, the rule, the value and the remedy.
"""

from __future__ import annotations

import csv
import difflib
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd

Kind = Literal["auto", "classification", "regression"]

# Above this many different values the table no longer tells classes from something else (scores, ids, free text).
MANY_CLASSES = 20


class UsageError(ValueError):
    """What the user asked for cannot be done; the message says what, why, and what to do instead."""


def suggest(name: str, known: Iterable[str]) -> str:
    """The tail of every 'unknown name' message: the nearest known name, then all of them."""
    names = [str(known_name) for known_name in known]
    near = difflib.get_close_matches(name, names, n=1)
    return (f" Did you mean {near[0]!r}?" if near else "") + f" Known: {', '.join(names) or 'none'}."


def one_line(error: BaseException) -> str:
    """A library's message, fit to stand inside ours."""
    return " ".join(str(error).split())


# ---- reading ----------------------------------------------------------------------------------------------------


def read_table(path: str | Path) -> pd.DataFrame:
    """Read a `.csv`, `.tsv`, `.jsonl` (`.ndjson`, `.json`) or `.parquet` file.

    Cells of CSV and TSV files stay text: a label `01` or a text `NA` is what the file says; only an empty cell is
    missing. Rows are numbered from 0 in file order, header not counted.
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


def _read_csv(path: Path, **options: Any) -> pd.DataFrame:
    with warnings.catch_warnings():
        # rows longer than the header: pandas would shift the columns (first one to the index) or drop the last
        warnings.simplefilter("error", pd.errors.ParserWarning)
        return pd.read_csv(
            path, dtype=str, keep_default_na=False, na_values=[""], encoding="utf-8-sig", index_col=False, **options
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


# ---- columns ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Table:
    """A table and how to read it.

    Attributes:
        frame: the rows.
        source: what messages call it, usually the file.
        text: one text column, or two for sentence pairs.
        label: the label column.
        kind: classification, regression, or decided from the labels.
        rename: raw label to class name, in class order; empty keeps the labels as they are.
        merge: class name to the coarser (or other) name it is scored under, for gold labels and predictions alike;
            only for test sets whose label scheme differs from the training set's.
    """

    frame: pd.DataFrame
    source: str
    text: tuple[str, ...] = ("text",)
    label: str = "label"
    kind: Kind = "auto"
    rename: Mapping[str, str] = field(default_factory=dict)
    merge: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, data: str | Path | pd.DataFrame | Table, text: tuple[str, ...], label: str, name: str, kind: Kind = "auto"
    ) -> Table:
        """A Table from a file or a data frame; a Table stays as it is."""
        if isinstance(data, Table):
            return data
        if isinstance(data, pd.DataFrame):
            return cls(data.reset_index(drop=True), f"the {name} table", text, label, kind)
        return cls(read_table(data), str(data), text, label, kind)


@dataclass(frozen=True)
class Target:
    """What is predicted: one of `names` (classification) or a number (no names: regression)."""

    names: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        return "classification" if self.names else "regression"

    def merged(self, merge: Mapping[str, str]) -> tuple[str, ...]:
        """The class names after merging, in class order, each once."""
        return tuple(dict.fromkeys(merge.get(name, name) for name in self.names))


def examples(table: Table) -> pd.DataFrame:
    """The checked rows: `text`, `text_pair` for two columns, and `label` as it stands in the file."""
    frame, source = table.frame, table.source
    if not 1 <= len(table.text) <= 2:
        raise UsageError(f"one or two text columns are read, got {len(table.text)}: {', '.join(table.text)}.")
    if len({*table.text, table.label}) != len(table.text) + 1:
        columns = ", ".join([*table.text, table.label])
        raise UsageError(f"text and label must be different columns, got {columns}.")
    if frame.empty:
        raise UsageError(f"{source}: the table has no rows.")
    for column in (*table.text, table.label):
        if column not in frame.columns:
            flag = "--label" if column == table.label else "--text"
            raise UsageError(
                f"{source}: no column {column!r}.{suggest(column, frame.columns)} Choose with {flag} NAME."
            )
    for column in table.text:
        _check_texts(frame[column], column, source)
    labels = frame[table.label]
    _refuse(labels.isna() | (labels.astype(str).str.strip() == ""), f"label column {table.label!r}", "empty", source)
    names = ("text", "text_pair")[: len(table.text)]
    out = {name: frame[column].astype(str).tolist() for name, column in zip(names, table.text, strict=True)}
    return pd.DataFrame({**out, "label": labels.astype(object).to_numpy()})


def _check_texts(texts: pd.Series, column: str, source: str) -> None:
    strings = texts.map(lambda value: isinstance(value, str)).astype(bool)
    missing = texts.isna()
    if not (strings | missing).all():
        value = texts[~(strings | missing)].iloc[0]
        raise UsageError(
            f"{source}: text column {column!r} must hold strings, got {value} ({type(value).__name__}). "
            "Choose another column with --text NAME."
        )
    _refuse(missing | (texts.astype(str).str.strip() == ""), f"text column {column!r}", "empty", source)


def _refuse(bad: pd.Series, what: str, how: str, source: str) -> None:
    """Raise when any row is bad, with the count and the first rows."""
    if bad.any():
        rows = np.flatnonzero(bad.to_numpy(dtype=bool))
        first = ", ".join(map(str, rows[:5])) + (", ..." if len(rows) > 5 else "")
        raise UsageError(
            f"{source}: {what} is {how} in {len(rows)} of {len(bad)} rows (rows counted from 0: {first}). "
            "Fill them in or take them out."
        )


# ---- labels -----------------------------------------------------------------------------------------------------


def label_name(value: Any) -> str:
    """The name of a label of any type: `1`, `1.0` and `"1"` are one class, whichever file format they came from."""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    return str(value)


def _numbers(labels: pd.Series) -> pd.Series:
    """The labels as floats, NaN where one is no number; truth values are classes, not numbers."""
    plain = labels.map(lambda value: None if isinstance(value, (bool, np.bool_)) else value)
    return pd.to_numeric(plain, errors="coerce").astype(float)


def find_target(rows: pd.DataFrame, table: Table) -> Target:
    """Decide classification or regression and the class order from the training rows.

    Numbers with a fraction mean regression, everything else classes. Where that is doubtful (more than 20 different
    whole numbers, or hardly a label that occurs twice) the user has to say.
    """
    labels, where = rows["label"], f"{table.source}: label column {table.label!r}"
    if table.kind not in ("auto", "classification", "regression"):
        raise UsageError(f"kind must be auto, classification or regression, got {table.kind!r}.")
    numbers = _numbers(labels)
    numeric = bool(numbers.notna().all())
    fractions = numeric and bool((numbers % 1 != 0).any())
    if table.kind == "regression" or (table.kind == "auto" and fractions):
        _encode_numbers(rows, table)
        if numbers.nunique() < 2:
            raise UsageError(f"{where} holds one value only ({labels.iloc[0]}): there is nothing to learn.")
        return Target()
    names = dict.fromkeys(labels.map(label_name))
    if table.kind == "auto" and len(names) > MANY_CLASSES and (numeric or len(names) > len(rows) / 2):
        raise UsageError(
            f"{where} has {len(names)} different values in {len(rows)} rows: "
            "say --kind classification, say --kind regression, or choose another column with --label NAME."
        )
    if len(names) < 2:
        raise UsageError(f"{where} holds one class only ({next(iter(names))!r}): at least two are needed.")
    if table.rename:
        unknown = [name for name in names if name not in table.rename]
        if unknown:
            raise UsageError(f"{where}: unknown label {unknown[0]!r}.{suggest(unknown[0], table.rename)}")
        return Target(tuple(dict.fromkeys(table.rename.values())))
    return Target(tuple(sorted(names, key=float) if numeric else sorted(names)))


def encode(rows: pd.DataFrame, table: Table, target: Target) -> pd.DataFrame:
    """Labels as they are scored: class names for classification, floats for regression."""
    if target.kind == "regression":
        return rows.assign(label=_encode_numbers(rows, table))
    raw = rows["label"].map(label_name).astype(object)
    names = raw.map(lambda name: table.rename.get(name, name)).map(lambda name: table.merge.get(name, name))
    known = target.merged(table.merge)
    unknown = ~names.isin(known)
    if unknown.any():
        first = str(names[unknown].iloc[0])
        raise UsageError(
            f"{table.source}: label {first!r} (in {int(unknown.sum())} of {len(rows)} rows) does not occur in the "
            f"training data.{suggest(first, known)}"
        )
    return rows.assign(label=names.astype(object))


def _encode_numbers(rows: pd.DataFrame, table: Table) -> pd.Series:
    numbers = _numbers(rows["label"])
    _refuse(~np.isfinite(numbers), f"label column {table.label!r}", "not a finite number", table.source)
    return numbers


# ---- splits -----------------------------------------------------------------------------------------------------


def allot(counts: np.ndarray, size: int, least: int, most: np.ndarray) -> np.ndarray:
    """Share `size` places among strata in proportion to `counts`, between `least` and `most` each."""
    take = np.minimum(least, most)
    wanted = counts * size / counts.sum()
    while take.sum() < size:
        take[np.argmax(np.where(take < most, wanted - take, -np.inf))] += 1
    return take


def strata(labels: pd.Series, target: Target) -> np.ndarray:
    """A stratum number for every row: its class, or for regression the tenth of the range of ranks it falls in."""
    if target.names:
        return pd.Categorical(labels, categories=target.names).codes.astype(int)
    ranks = labels.rank(method="first").to_numpy() - 1
    return (ranks * 10 // len(ranks)).astype(int)


def draw(groups: np.ndarray, take: np.ndarray, seed: int) -> np.ndarray:
    """Positions of `take[g]` rows drawn at random from every group g, in file order."""
    order = np.random.default_rng(seed).permutation(len(groups))
    chosen = [order[groups[order] == group][:amount] for group, amount in enumerate(take)]
    return np.sort(np.concatenate(chosen))


def subset(rows: pd.DataFrame, target: Target, size: int, seed: int) -> pd.DataFrame:
    """A stratified draw of `size` rows; every class that occurs keeps at least one row."""
    groups = strata(rows["label"], target)
    counts = np.bincount(groups)
    least = int((counts > 0).sum())
    if not least <= size <= len(rows):
        raise UsageError(f"train size must lie between {least} (one row a class) and {len(rows)} (all), got {size}.")
    return rows.iloc[draw(groups, allot(counts, size, 1, counts), seed)]


def split(rows: pd.DataFrame, target: Target, share: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Carve a stratified validation share out of the rows; every class keeps at least one row for training."""
    groups = strata(rows["label"], target)
    counts = np.bincount(groups)
    size = max(1, round(share * len(rows)))
    most = np.maximum(counts - 1, 0)
    if size > most.sum():
        raise UsageError(
            f"a validation share of {share} takes {size} of {len(rows)} rows and leaves a class without training rows. "
            "Lower --validation-share, or set it to 0."
        )
    held_out = np.zeros(len(rows), dtype=bool)
    held_out[draw(groups, allot(counts, size, 0, most), seed)] = True
    return rows[~held_out], rows[held_out]


# ---- all of it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Data:
    """Checked splits: frames with `text` (`text_pair`) and `label`; the index is the row in the file."""

    train: pd.DataFrame
    tests: Mapping[str, pd.DataFrame]  # "validation" first, where there is one
    target: Target
    sources: Mapping[str, str]
    merges: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """Sizes, sources and fingerprints, ready for JSON."""
        out = {}
        for name, rows in {"train": self.train, **self.tests}.items():
            out[name] = {"source": self.sources[name], "rows": len(rows), "sha256": fingerprint(rows)}
            if self.target.names:
                out[name]["labels"] = {str(label): int(n) for label, n in rows["label"].value_counts().items()}
            if name != "train":
                out[name]["also_in_train"] = self.overlap(name)
        return out

    def overlap(self, name: str) -> int:
        """How many rows of a test set carry a text (or pair) that is also in the training rows."""
        columns = [column for column in ("text", "text_pair") if column in self.train]
        seen = set(self.train[columns].itertuples(index=False, name=None))
        return sum(row in seen for row in self.tests[name][columns].itertuples(index=False, name=None))


def fingerprint(rows: pd.DataFrame) -> str:
    """A hash of texts, labels and row numbers, so that a resume notices another table."""
    digest = hashlib.sha256()
    for row in rows.itertuples(name=None):
        digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()


def prepare(
    train: Table,
    tests: Mapping[str, Table],
    validation: Table | None = None,
    *,
    train_size: int | None = None,
    validation_share: float = 0.1,
    seed: int = 0,
) -> Data:
    """Check every table and draw the splits.

    `train_size` rows are all the labelled data there is: a validation share is carved out of them.
    """
    raw = examples(train)
    target = find_target(raw, train)
    rows = encode(raw, train, target)
    if train_size is not None:
        rows = subset(rows, target, train_size, seed)
    if "validation" in tests or "train" in tests:
        raise UsageError("a test set cannot be called 'train' or 'validation': name it with --test NAME=FILE.")
    carved: dict[str, pd.DataFrame] = {}
    sources = {"train": train.source}
    if validation is not None:
        carved["validation"] = encode(examples(validation), validation, target)
        sources["validation"] = validation.source
    elif validation_share:
        rows, carved["validation"] = split(rows, target, validation_share, seed)
        sources["validation"] = f"{validation_share} of {train.source}"
    read = {name: encode(examples(table), table, target) for name, table in tests.items()}
    return Data(
        train=rows,
        tests={**carved, **read},
        target=target,
        sources={**sources, **{name: table.source for name, table in tests.items()}},
        merges={name: table.merge for name, table in tests.items()},
    )
