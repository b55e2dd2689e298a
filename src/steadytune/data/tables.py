"""Tables of labelled text: finding their columns and checking their cells."""

from __future__ import annotations

import bisect
import dataclasses
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from ..errors import UsageError, suggest
from .cells import is_empty, label_name, list_of, numbers_of, refuse, shown
from .files import column_name, read_rows
from .forms import Form, Label, as_label, form_of, is_indicator

logger = logging.getLogger("steadytune")


Kind = Literal["auto", "classification", "multilabel", "regression"]

# Above this many different values the table no longer tells classes from something else (scores, ids, free text).
MANY_CLASSES = 20

MOST_SUBGROUPS = 50  # more are names or numbers of single rows, which nobody reads scores of

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


WORD = re.compile(r"\w+(?:['’]\w+)*")
MEASURES = ("length", "overlap")  # names of subgroups that are made of the texts, where no column is called so
LENGTHS = (8, 16, 32, 64, 128)  # largest number of words of each range of lengths
UNNAMED = re.compile(r"column \d+")  # what a column is called that the header leaves without a name


@dataclass(frozen=True, eq=False)
class Table:
    """A table and how to read it.

    Attributes:
        frame: The rows.
        origin: What messages call it, usually the file.
        text: One text column, or two for sentence pairs; None: `resolve` finds them.
        label: The label column, or one column per class; None: `resolve` finds it.
        kind: Classification, multi-label, regression, or decided from the labels.
        rename: Raw label to class name, in class order; empty keeps the labels as they are.
        coarser: Class name to the coarser (or other) name it is scored under, for gold labels and predictions alike;
            only for test sets whose label scheme differs from the training set's.
        group: The column whose equal values keep rows on one side of a split.
        subgroup: Columns whose values, together, name the subgroup of each row: the parts of the rows that are scored
            one by one. The label column may be among them.
        label_separator: What stands between the labels of one cell; None: a cell is one label, or a list.
    """

    frame: pd.DataFrame
    origin: str
    text: tuple[str, ...] | None = ("text",)
    label: Label | None = "label"
    kind: Kind = "auto"
    rename: Mapping[str, str] = field(default_factory=dict)
    coarser: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None
    label_separator: str | None = None
    subgroup: tuple[str, ...] = ()

    @property
    def columns(self) -> tuple[tuple[str, ...], Label]:
        """Text columns and label columns of a resolved table."""
        if self.text is None or self.label is None:
            missing = "label" if self.text else "text"
            raise UsageError(f"{self.origin}: the {missing} column is not known{_choose(missing, self.frame.columns)}")
        return self.text, self.label

    @property
    def form(self) -> Form:
        """How the labels of a resolved table are written."""
        return form_of(self.columns[1], self.label_separator)

    @classmethod
    def of(
        cls,
        data: Any,
        text: tuple[str, ...] | None,
        label: str | Sequence[str] | None,
        name: str,
        kind: Kind = "auto",
        group: str | None = None,
        label_separator: str | None = None,
        subgroup: str | Sequence[str] | None = None,
    ) -> Table:
        """A Table from any source that `read_rows` takes; a Table stays as it is.

        Raises:
            UsageError: What `read_rows` raises.
        """
        if isinstance(data, Table):
            return data
        frame, origin = read_rows(data, f"the {name} table")
        named = None if text is None else tuple(map(column_name, text))
        parts = (subgroup,) if isinstance(subgroup, str) else subgroup or ()
        return cls(
            frame, origin, named, as_label(label), kind, group=_string(group), label_separator=label_separator,
            subgroup=tuple(map(column_name, parts)),
        )  # fmt: skip


def _string(name: Any) -> str | None:
    """A column name as `read_rows` writes it."""
    return None if name is None else column_name(name)


def resolve(table: Table, other: Sequence[str] = ()) -> Table:
    """The table with the names of its text and label columns; those that were found are logged.

    Columns with known names (`LABELS`, `PAIRS`, `TEXTS`) are taken first. Without one the contents decide. The text is
    the only column of prose, or the two columns of prose of a table without further columns. The label is the only
    column that holds few different values, fractions or lists.

    Args:
        table: Table whose `text` or `label` may be None.
        other: Columns that are neither text nor label; the group is known to be neither, and a column of subgroups is
            the label only where it is named as the label.

    Raises:
        UsageError: No column fits, or more than one; the message lists them.
    """
    if table.frame.empty:
        raise UsageError(f"{table.origin}: the table has no rows.")
    if table.text is not None and table.label is not None:
        return table
    taken = {*other, table.group, *table.subgroup, *(table.text or ()), *_tuple(table.label)}
    columns = table.frame.columns
    _refuse_twins([column for column in columns[columns.duplicated()] if column not in taken], table)
    free = [column for column in columns[~columns.duplicated(keep=False)] if column not in taken]
    label = _only("label", _by_name(free, LABELS), table) if table.label is None else table.label
    free = [column for column in free if column not in _tuple(label)]
    text = table.text or _find_text(free, table, spare=label is None)
    if label is None:
        label = _label_by_shape([column for column in free if column not in text], table)
    if label is None:
        raise UsageError(f"{table.origin}: no column looks like a label{_choose('label', free)}")
    nameless = [name for name in (*text, *_tuple(label)) if UNNAMED.fullmatch(name)]
    if nameless and None in (table.text, table.label):
        raise UsageError(
            f"{table.origin}: the first line gives {nameless[0]} no name, so that it may not be the header: take out "
            f"lines above the header, or name the columns with --text and --label."
        )
    columns_found = " and ".join(map(repr, text)), ", ".join(map(repr, _tuple(label)))
    logger.info("%s: text from %s, label from %s", table.origin, *columns_found)
    return dataclasses.replace(table, text=text, label=label)


def _tuple(label: Label | None) -> tuple[str, ...]:
    return label if isinstance(label, tuple) else () if label is None else (label,)


def _refuse_twins(twice: Sequence[str], table: Table) -> None:
    """Raise where two columns share a name that is known for texts or labels; other repeated names are ignored."""
    known = {name for names in (*LABELS, *PAIRS, *TEXTS) for name in names}
    for column in twice:
        if column.lower() in known:
            _check_column(table, column, "label")


def _label_by_shape(columns: Sequence[str], table: Table) -> str | None:
    """The only column that looks like a label, unless another column could be one with many classes."""
    alike = [column for column in columns if _like_label(table.frame[column])]
    if len(alike) == 1:
        alike += [column for column in columns if column not in alike and _repeats(table.frame[column])]
    return _only("label", alike, table)


def _repeats(column: pd.Series) -> bool:
    """Whether a column could hold many classes: more values than are taken for classes unasked, and they repeat."""
    values = column.dropna().astype(str)
    return MANY_CLASSES < values.nunique() <= len(values) / 2


def _by_name(columns: Sequence[str], known: Sequence[Sequence[str]]) -> list[str]:
    """The columns with the best known names; earlier lines of `known` are better."""
    for names in known:
        if named := [column for column in columns if str(column).lower() in names]:
            return named
    return []


def _only(what: str, candidates: Sequence[str], table: Table) -> str | None:
    if len(candidates) > 1:
        one_hot = what == "label" and all(is_indicator(table.frame[column]) for column in candidates)
        more = " For several labels a row, name the column of every class." if one_hot else ""
        raise UsageError(f"{table.origin}: more than one column may be the {what}{_choose(what, candidates)}{more}")
    return candidates[0] if candidates else None


def _choose(what: str, columns: Iterable[Any]) -> str:
    return f": {', '.join(map(str, columns)) or 'none is left'}. {_option(what)}"


def _option(what: str) -> str:
    return f"Choose with --{what} NAME{', once for each column' if what == 'text' else ''}."


def _find_text(columns: Sequence[str], table: Table, spare: int) -> tuple[str, ...]:
    """The text among `columns`, of which `spare` (0 or 1) will be the label."""
    strings = [column for column in columns if _is_text(table.frame[column])]
    # the group may be one side of a pair: a question and all its answers
    lower = {str(column).lower(): column for column in (*strings, table.group) if column is not None}
    pairs = [tuple(lower[name] for name in pair) for pair in PAIRS if set(pair) <= set(lower)]
    if len(pairs) > 1:
        distinct = list(dict.fromkeys(column for pair in pairs for column in pair))
        raise UsageError(f"{table.origin}: more than one pair of columns may be the text{_choose('text', distinct)}")
    if pairs:
        return pairs[0]
    some = [column for column in columns if table.frame[column].map(lambda value: isinstance(value, str)).any()]
    named = _by_name(some, TEXTS)  # also with a number among its texts, which is a clearer error later
    prose = [column for column in strings if _is_prose(table.frame[column])]
    # where there are further columns, the second one may be a translation or an explanation
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
    """Whether cells have three words or more on average, and most of them are different."""
    values = column.dropna().head(1000).astype(str)
    return bool(values.map(lambda text: len(text.split())).mean() >= 3 and values.nunique() > len(values) / 2)


def _like_label(column: pd.Series) -> bool:
    values = column.dropna()
    if len(values) and values.map(list_of).notna().all():
        return True
    numbers = numbers_of(values)
    fractions = bool(numbers.notna().all() and (numbers % 1 != 0).any())
    return fractions or 2 <= values.astype(str).nunique() <= min(MANY_CLASSES, len(values) / 2)


def _follow(table: Table, train: Table) -> Table:
    """A test table that takes from the training table which columns to read, unless it says so itself."""
    group = train.group if train.group in table.frame.columns else None
    missing = missing_subgroup(table.frame, train.subgroup)
    subgroup = train.subgroup if missing is None else ()
    if missing is not None:
        logger.info("%s: no column %r, so that its subgroups are not scored", table.origin, missing)
    return dataclasses.replace(
        table,
        text=table.text or train.text,
        label=table.label or train.label,
        group=table.group or group,
        subgroup=table.subgroup or subgroup,
        label_separator=table.label_separator or train.label_separator,
    )


def missing_subgroup(frame: pd.DataFrame, subgroup: Sequence[str]) -> str | None:
    """The first of the columns of subgroups that a table lacks, and whose values are not made of its texts."""
    return next((column for column in subgroup if column not in {*frame.columns, *MEASURES}), None)


def texts(table: Table) -> pd.DataFrame:
    """The checked texts alone: `text`, and `text_pair` for two columns. Labels are not read.

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


def examples(table: Table, blank: str = "") -> pd.DataFrame:
    """The checked rows: `text`, `text_pair` for two columns, `label`, `group` and `subgroup` if there is one.

    A label is what stands in the file, or the list of the row's labels where a separator or several columns tell them.

    Args:
        table: The table.
        blank: As of `Form.read`.

    Raises:
        UsageError: What `texts` raises, and the same for labels and groups.
    """
    table = resolve(table)
    rows, form, text = texts(table), table.form, table.columns[0]
    if len({*text, *form.columns}) < len(text) + len(form.columns):
        raise UsageError(f"text and label must be different columns, got {', '.join([*text, *form.columns])}.")
    for column in form.columns:
        _check_column(table, column, "label")
    rows["label"] = form.read(table.frame, table.origin, blank).to_numpy()
    if len(form.columns) == 1:
        _check_header(table.frame[form.columns[0]], text, form.columns[0], table.origin)
    if table.group is not None:
        if table.group in form.columns:
            raise UsageError(f"group and label must be different columns, got {table.group!r} for both.")
        _check_column(table, table.group, "group")
        groups = table.frame[table.group]
        refuse(is_empty(groups), f"group column {table.group!r}", "empty", table.origin)
        rows["group"] = [label_name(value) for value in groups]
    if table.subgroup:
        rows["subgroup"] = _subgroups(table, text)
    return rows


def _subgroups(table: Table, text: Sequence[str]) -> list[str]:
    """Name of the subgroup of each row: the value of one column, or as in "source=web, label=1".

    Raises:
        UsageError: An unknown column, a text column, empty cells, or too many subgroups.
    """
    columns = table.subgroup
    values = []
    for column in columns:
        if column in text:
            raise UsageError(f"subgroup and text must be different columns, got {column!r} for both.")
        if column in MEASURES and column not in table.frame.columns:
            values.append(_measured(table, column, text))
            continue
        _check_column(table, column, "subgroup")
        refuse(is_empty(table.frame[column]), f"subgroup column {column!r}", "empty", table.origin)
        values.append([label_name(value) for value in table.frame[column]])
    if len(columns) > 1:
        values = [[f"{column}={value}" for value in own] for column, own in zip(columns, values, strict=True)]
    names = [", ".join(parts) for parts in zip(*values, strict=True)]
    if (count := len(set(names))) > MOST_SUBGROUPS:
        raise UsageError(
            f"{table.origin}: {' and '.join(map(repr, columns))} make {count} subgroups of {len(names)} rows, more "
            f"than {MOST_SUBGROUPS}: name a column with few values, or cut its numbers into ranges."
        )
    return names


def _measured(table: Table, measure: str, text: Sequence[str]) -> list[str]:
    """Subgroup of each row by the length of its texts, or by the overlap of a pair. Ranges are the same in all tables.

    Raises:
        UsageError: The overlap of one text.
    """
    said = [[words(str(cell)) for cell in table.frame[column]] for column in text]
    if measure == "length":
        return [_range(sum(map(len, parts))) for parts in zip(*said, strict=True)]
    if len(said) < 2:
        raise UsageError(f"subgroup overlap is of pairs of texts, the rows have one text ({text[0]!r}): leave it out.")
    shares = [overlap_of(first, second) for first, second in zip(*said, strict=True)]
    return ["all" if share == 1 else "half or more" if share >= 0.5 else "below half" for share in shares]


def _range(count: int) -> str:
    """The range of a number of words, as in "9 to 16 words"."""
    place = bisect.bisect_left(LENGTHS, count)
    if place == len(LENGTHS):
        return f"above {LENGTHS[-1]} words"
    return f"{LENGTHS[place - 1] + 1 if place else 0} to {LENGTHS[place]} words"


def words(text: str) -> list[str]:
    """The words of a text in lower case."""
    return WORD.findall(text.lower())


def overlap_of(first: Sequence[str], second: Sequence[str]) -> float:
    """Share of the different words of the second text that are in the first one too."""
    return len({*first} & {*second}) / max(len({*second}), 1)


def keys(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    """The text, or pair of texts, of every row: rows with the same key are the same to a model."""
    columns = [column for column in ("text", "text_pair") if column in rows]
    return list(rows[columns].itertuples(index=False, name=None))


def _check_header(labels: pd.Series, text: Sequence[str], label: str, origin: str) -> None:
    """Raise where the header seems to be the first row: the label column is called like a label."""
    objects = labels.map(lambda value: isinstance(value, Mapping)).astype(bool)
    refuse(
        objects, f"label column {label!r}", f"an object ({shown(labels[objects])})", origin, "Give a name or a number."
    )
    encoded = labels.map(lambda value: isinstance(value, (bytes, bytearray))).astype(bool)
    refuse(encoded, f"label column {label!r}", f"bytes ({shown(labels[encoded])})", origin, "Decode them to strings.")
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


def _check_column(table: Table, column: str, what: str) -> None:
    if column not in table.frame.columns:
        known = suggest(column, table.frame.columns)
        raise UsageError(f"{table.origin}: no column {column!r}.{known} {_option(what)}")
    if (count := int((table.frame.columns == column).sum())) > 1:
        raise UsageError(f"{table.origin}: {count} columns are called {column!r}: rename them.")


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
