"""Tables of labelled text: finding their columns and checking their cells."""

from __future__ import annotations

import ast
import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from ..errors import UsageError, first_rows, suggest
from .files import read_rows

logger = logging.getLogger("steadytune")


Kind = Literal["auto", "classification", "multilabel", "regression"]

# Above this many different values the table no longer tells classes from something else (scores, ids, free text).
MANY_CLASSES = 20

WHOLE = re.compile(r"-?\d+\.0+")  # a whole number written as a fraction

# Column names by which text and label are known, whatever their case; an earlier line wins.
LABELS = (
    ("label", "labels", "target", "targets", "y", "gold_label"),
    ("class", "category", "sentiment", "stars", "score", "rating", "intent", "topic", "emotion"),
)
PAIRS = (
    ("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("question", "sentence"),
    ("text", "text_pair"), ("text_a", "text_b"), ("text1", "text2"), ("sentence_a", "sentence_b"),
    ("question", "answer"), ("query", "passage"), ("query", "document"),
)  # fmt: skip
TEXTS = (
    ("text",),
    ("sentence", "review", "tweet", "comment", "content", "body", "message", "utterance", "document", "question"),
)


@dataclass(frozen=True, eq=False)
class Table:
    """A table and how to read it.

    Attributes:
        frame: The rows.
        origin: What messages call it, usually the file.
        text: One text column, or two for sentence pairs; None: `resolve` finds them.
        label: The label column; None: `resolve` finds it.
        kind: Classification, multi-label, regression, or decided from the labels.
        rename: Raw label to class name, in class order; empty keeps the labels as they are.
        coarser: Class name to the coarser (or other) name it is scored under, for gold labels and predictions alike;
            only for test sets whose label scheme differs from the training set's.
        group: The column whose equal values keep rows on one side of a split.
    """

    frame: pd.DataFrame
    origin: str
    text: tuple[str, ...] | None = ("text",)
    label: str | None = "label"
    kind: Kind = "auto"
    rename: Mapping[str, str] = field(default_factory=dict)
    coarser: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None

    @property
    def columns(self) -> tuple[tuple[str, ...], str]:
        """Text columns and label column of a resolved table."""
        if self.text is None or self.label is None:
            missing = "label" if self.text else "text"
            raise UsageError(f"{self.origin}: the {missing} column is not known{_choose(missing, self.frame.columns)}")
        return self.text, self.label

    @classmethod
    def of(
        cls,
        data: Any,
        text: tuple[str, ...] | None,
        label: str | None,
        name: str,
        kind: Kind = "auto",
        group: str | None = None,
    ) -> Table:
        """A Table from any source that `read_rows` takes; a Table stays as it is."""
        if isinstance(data, Table):
            return data
        frame, origin = read_rows(data, f"the {name} table")
        named = None if text is None else tuple(map(str, text))
        return cls(frame, origin, named, _string(label), kind, group=_string(group))


def _string(name: Any) -> str | None:
    """A column name as `read_rows` writes it."""
    return None if name is None else str(name)


def resolve(table: Table, other: Sequence[str] = ()) -> Table:
    """The table with its text and label columns named; what was found is logged.

    Names come first (`LABELS`, `PAIRS`, `TEXTS`), then shapes: text is the one column of prose, or the two if the
    table has nothing else; the label is the one column with few values, fractions or lists.

    Args:
        table: With None for what is to be found.
        other: Columns that are neither (the group is left out anyway).

    Raises:
        UsageError: There is no such column, or more than one; the message lists them.
    """
    if table.frame.empty:
        raise UsageError(f"{table.origin}: the table has no rows.")
    if table.text is not None and table.label is not None:
        return table
    taken = {*other, table.group, *(table.text or ()), table.label}
    columns = table.frame.columns
    _refuse_twins([column for column in columns[columns.duplicated()] if column not in taken], table)
    free = [column for column in columns[~columns.duplicated(keep=False)] if column not in taken]
    label = table.label or _only("label", _by_name(free, LABELS), table)
    free = [column for column in free if column != label]
    text = table.text or _find_text(free, table, spare=label is None)
    label = label or _label_by_shape([column for column in free if column not in text], table)
    if label is None:
        raise UsageError(f"{table.origin}: no column looks like a label{_choose('label', free)}")
    logger.info("%s: text from %s, label from %r", table.origin, " and ".join(map(repr, text)), label)
    return dataclasses.replace(table, text=text, label=label)


def _refuse_twins(twice: Sequence[str], table: Table) -> None:
    """Raise where a name that is known for texts or labels stands above two columns; others are left aside."""
    known = {name for names in (*LABELS, *PAIRS, *TEXTS) for name in names}
    for column in twice:
        if column.lower() in known:
            _check_column(table, column, "label")


def _label_by_shape(columns: Sequence[str], table: Table) -> str | None:
    """The one column that looks like a label, if no other one repeats its values as classes do."""
    alike = [column for column in columns if _like_label(table.frame[column])]
    if len(alike) == 1:
        alike += [column for column in columns if column not in alike and _repeats(table.frame[column])]
    return _only("label", alike, table)


def _repeats(column: pd.Series) -> bool:
    """Many different values, each of which occurs about twice or more: too many for a label nobody named."""
    values = column.dropna().astype(str)
    return MANY_CLASSES < values.nunique() <= len(values) / 2


def _by_name(columns: Sequence[str], known: Sequence[Sequence[str]]) -> list[str]:
    """The columns named on the first line of `known` that names any."""
    for names in known:
        if found := [column for column in columns if str(column).lower() in names]:
            return found
    return []


def _only(what: str, found: Sequence[str], table: Table) -> str | None:
    if len(found) > 1:
        raise UsageError(f"{table.origin}: more than one column may be the {what}{_choose(what, found)}")
    return found[0] if found else None


def _choose(what: str, columns: Iterable[Any]) -> str:
    return f": {', '.join(map(str, columns)) or 'none is left'}. {_option(what)}"


def _option(what: str) -> str:
    return f"Choose with --{what} NAME{', once for each column' if what == 'text' else ''}."


def _find_text(columns: Sequence[str], table: Table, spare: int) -> tuple[str, ...]:
    """The text among `columns`, `spare` of which are still to be the label."""
    strings = [column for column in columns if _is_text(table.frame[column])]
    # one side of a pair may well be the group: all the answers to a question
    lower = {str(column).lower(): column for column in (*strings, table.group) if column is not None}
    pairs = [tuple(lower[name] for name in pair) for pair in PAIRS if set(pair) <= set(lower)]
    if len(pairs) > 1:
        found = list(dict.fromkeys(column for pair in pairs for column in pair))
        raise UsageError(f"{table.origin}: more than one pair of columns may be the text{_choose('text', found)}")
    if pairs:
        return pairs[0]
    some = [column for column in columns if table.frame[column].map(lambda value: isinstance(value, str)).any()]
    named = _by_name(some, TEXTS)  # a number among its texts is an error of its own
    prose = [column for column in strings if _is_prose(table.frame[column])]
    # two columns of prose beside others may as well be a text and its translation, or its explanation
    if not named and len(prose) == 2 and len(columns) == 2 + spare:
        return tuple(prose)
    text = _only("text", named or prose or (strings if len(strings) == 1 else []), table)
    if text is None:
        raise UsageError(f"{table.origin}: no column looks like text{_choose('text', columns)}")
    return (text,)


def _is_text(column: pd.Series) -> bool:
    values = column.dropna().head(1000)
    return len(values) > 0 and all(isinstance(value, str) for value in values)


def _is_prose(column: pd.Series) -> bool:
    """Three words or more on average, and hardly a repetition."""
    values = column.dropna().head(1000).astype(str)
    return bool(values.map(lambda text: len(text.split())).mean() >= 3 and values.nunique() > len(values) / 2)


def _like_label(column: pd.Series) -> bool:
    values = column.dropna()
    if len(values) and values.map(_parts).notna().all():
        return True
    numbers = _numbers(values)
    fractions = bool(numbers.notna().all() and (numbers % 1 != 0).any())
    return fractions or 2 <= values.astype(str).nunique() <= min(MANY_CLASSES, len(values) / 2)


def _follow(table: Table, train: Table) -> Table:
    """A test table with the columns of the training table where it names none; not every one has the group."""
    group = train.group if train.group in table.frame.columns else None
    return dataclasses.replace(
        table, text=table.text or train.text, label=table.label or train.label, group=table.group or group
    )


def texts(table: Table) -> pd.DataFrame:
    """The checked texts alone: `text`, and `text_pair` for two columns; the labels are not looked at.

    Raises:
        UsageError: No rows, an unknown column, or a cell that is empty or no string.
    """
    frame, origin, columns = table.frame, table.origin, table.text
    if frame.empty:
        raise UsageError(f"{origin}: the table has no rows.")
    if columns is None:
        raise UsageError(f"{origin}: the text column is not known{_choose('text', frame.columns)}")
    if not 1 <= len(columns) <= 2:
        raise UsageError(f"one or two text columns are read, got {len(columns)}: {', '.join(columns)}.")
    for column in columns:
        _check_column(table, column, "text")
        _check_texts(frame[column], column, origin)
    names = ("text", "text_pair")[: len(columns)]
    return pd.DataFrame({name: frame[column].astype(str).tolist() for name, column in zip(names, columns, strict=True)})


def examples(table: Table) -> pd.DataFrame:
    """The checked rows: `text`, `text_pair` for two columns, `label` as it stands in the file, `group` if there is one.

    Raises:
        UsageError: What `texts` raises, and the same for labels and groups.
    """
    table = resolve(table)
    rows, (text, label) = texts(table), table.columns
    if len({*text, label}) != len(text) + 1:
        raise UsageError(f"text and label must be different columns, got {', '.join([*text, label])}.")
    _check_column(table, label, "label")
    labels = table.frame[label]
    refuse(is_empty(labels), f"label column {label!r}", "empty", table.origin)
    _check_header(labels, text, label, table.origin)
    rows["label"] = labels.astype(object).to_numpy()
    if table.group is not None:
        if table.group == label:
            raise UsageError(f"group and label must be different columns, got {label!r} for both.")
        _check_column(table, table.group, "group")
        groups = table.frame[table.group]
        refuse(is_empty(groups), f"group column {table.group!r}", "empty", table.origin)
        rows["group"] = [label_name(value) for value in groups]
    return rows


def keys(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    """What makes rows the same to a model: their text, or pair of texts."""
    columns = [column for column in ("text", "text_pair") if column in rows]
    return list(rows[columns].itertuples(index=False, name=None))


def _check_header(labels: pd.Series, text: Sequence[str], label: str, origin: str) -> None:
    """Raise where the column names are a row: a label for the label column, and prose for the text column."""
    objects = labels.map(lambda value: isinstance(value, Mapping)).astype(bool)
    refuse(
        objects, f"label column {label!r}", f"an object ({_shown(labels[objects])})", origin, "Give a name or a number."
    )
    names = set(map(str, labels))
    prose = all(len(name.split()) >= 3 for name in text)
    if (label in names and len(names) > 1) or (prose and _number(label) and labels.map(_number).all()):
        raise UsageError(
            f"{origin}: the label column is called {label!r} like one of its labels, so that the first row seems to be "
            "data: add a header line such as text,label, or rename the column."
        )


def _number(value: Any) -> bool:
    try:
        return np.isfinite(float(value))
    except (TypeError, ValueError):
        return False


def _shown(values: pd.Series) -> str:
    """The first value, cut where it is long."""
    text = str(values.iloc[0]) if len(values) else ""
    return text if len(text) <= 60 else text[:57] + "..."


def _check_column(table: Table, column: str, what: str) -> None:
    if column not in table.frame.columns:
        known = suggest(column, table.frame.columns)
        raise UsageError(f"{table.origin}: no column {column!r}.{known} {_option(what)}")
    if (count := int((table.frame.columns == column).sum())) > 1:
        raise UsageError(f"{table.origin}: {count} columns are called {column!r}: rename them.")


def is_empty(values: pd.Series) -> pd.Series:
    return values.isna() | values.map(lambda value: not str(value).strip()).astype(bool)


def _check_texts(texts: pd.Series, column: str, origin: str) -> None:
    strings = texts.map(lambda value: isinstance(value, str)).astype(bool)
    missing = texts.isna()
    if not (strings | missing).all():
        value = texts[~(strings | missing)].iloc[0]
        raise UsageError(
            f"{origin}: text column {column!r} must hold strings, got {value} ({type(value).__name__}). "
            "Choose another column with --text NAME."
        )
    refuse(is_empty(texts), f"text column {column!r}", "empty", origin)


def refuse(bad: pd.Series, what: str, how: str, origin: str, remedy: str = "Fill them in or take them out.") -> None:
    """Raise when any row is bad, with the count and the first rows."""
    if bad.any():
        rows = np.flatnonzero(bad.to_numpy(dtype=bool))
        raise UsageError(
            f"{origin}: {what} is {how} in {len(rows)} of {len(bad)} rows (rows counted from 0: {first_rows(rows)}). "
            f"{remedy}"
        )


def label_name(value: Any) -> str:
    """The name of a label of any type: `1`, `1.0` and `"1"` are one class, whichever file format they came from."""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    if isinstance(value, str) and WHOLE.fullmatch(value):  # as pandas writes a column of whole numbers with a gap
        return value.partition(".")[0]
    return str(value)


def _parts(value: Any) -> list[Any] | None:
    """The members of a list, tuple, set or array, or of a list written as text (`['a', 'b']`, what CSV can hold)."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
    return list(value) if isinstance(value, (list, tuple, set, frozenset, np.ndarray)) else None


def _numbers(labels: pd.Series) -> pd.Series:
    """The labels as floats, NaN where one is no number; truth values and lists are classes, not numbers."""
    none = (bool, np.bool_, list, tuple, set, frozenset, np.ndarray)
    plain = labels.map(lambda value: None if isinstance(value, none) else value)
    return pd.to_numeric(plain, errors="coerce").astype(float)
