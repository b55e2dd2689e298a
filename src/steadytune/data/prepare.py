"""Tables of labelled text: finding their columns, checking them, splitting them. No torch here.

Everything a user can get wrong about data is found here, before a model is loaded, and reported as one `UsageError`
that names the thing, the rule, the value and the remedy. What may be meant is a warning of `guards`.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from ..errors import UsageError as UsageError
from ..errors import one_line as one_line
from ..errors import suggest
from .files import read_source

logger = logging.getLogger("steadytune")

Kind = Literal["auto", "classification", "multilabel", "regression"]

# Above this many different values the table no longer tells classes from something else (scores, ids, free text).
MANY_CLASSES = 20

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


# ---- columns ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Table:
    """A table and how to read it.

    Attributes:
        frame: the rows.
        source: what messages call it, usually the file.
        text: one text column, or two for sentence pairs; None: `resolve` finds them.
        label: the label column; None: `resolve` finds it.
        kind: classification, multi-label, regression, or decided from the labels.
        rename: raw label to class name, in class order; empty keeps the labels as they are.
        merge: class name to the coarser (or other) name it is scored under, for gold labels and predictions alike;
            only for test sets whose label scheme differs from the training set's.
        group: the column whose equal values keep rows on one side of a split.
    """

    frame: pd.DataFrame
    source: str
    text: tuple[str, ...] | None = ("text",)
    label: str | None = "label"
    kind: Kind = "auto"
    rename: Mapping[str, str] = field(default_factory=dict)
    merge: Mapping[str, str] = field(default_factory=dict)
    group: str | None = None

    @property
    def columns(self) -> tuple[tuple[str, ...], str]:
        """Text columns and label column of a resolved table."""
        if self.text is None or self.label is None:
            missing = "label" if self.text else "text"
            raise UsageError(f"{self.source}: the {missing} column is not known{_choose(missing, self.frame.columns)}")
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
        """A Table from any source that `read_source` takes; a Table stays as it is."""
        if isinstance(data, Table):
            return data
        frame, source = read_source(data, f"the {name} table")
        return cls(frame, source, text, label, kind, group=group)


@dataclass(frozen=True)
class Target:
    """What is predicted: one of `names` (classification), some of them (`multi`), or a number (no names: regression).

    A row's label is a class name, a tuple of class names in class order (which may be empty), or a float, for which a
    model in training stands for ``(label - mean) / spread``.
    """

    names: tuple[str, ...] = ()
    multi: bool = False
    mean: float = 0.0
    spread: float = 1.0

    @property
    def scaled(self) -> bool:
        """Whether a model in training stands for other numbers than the labels."""
        return (self.mean, self.spread) != (0.0, 1.0)

    @property
    def kind(self) -> str:
        if self.multi:
            return "multilabel"
        return "classification" if self.names else "regression"

    def merged(self, merge: Mapping[str, str]) -> tuple[str, ...]:
        """The class names after merging, in class order, each once."""
        return tuple(dict.fromkeys(merge.get(name, name) for name in self.names))


def resolve(table: Table, other: Sequence[str] = ()) -> Table:
    """The table with its text and label columns named; what was found is logged.

    Names come first (`LABELS`, `PAIRS`, `TEXTS`), then shapes: text is the one column of prose, or the two if the
    table has nothing else; the label is the one column with few values, fractions or lists.

    Args:
        table: with None for what is to be found.
        other: columns that are neither (the group is left out anyway).

    Raises:
        UsageError: there is no such column, or more than one; the message lists them.
    """
    if table.frame.empty:
        raise UsageError(f"{table.source}: the table has no rows.")
    if table.text is not None and table.label is not None:
        return table
    taken = {*other, table.group, *(table.text or ()), table.label}
    columns = table.frame.columns
    free = [column for column in columns[~columns.duplicated(keep=False)] if column not in taken]
    label = table.label or _only("label", _by_name(free, LABELS), table)
    free = [column for column in free if column != label]
    text = table.text or _find_text(free, table, spare=label is None)
    label = label or _only("label", [c for c in free if c not in text and _like_label(table.frame[c])], table)
    if label is None:
        raise UsageError(f"{table.source}: no column looks like a label{_choose('label', free)}")
    logger.info("%s: text from %s, label from %r", table.source, " and ".join(map(repr, text)), label)
    return dataclasses.replace(table, text=text, label=label)


def _by_name(columns: Sequence[str], known: Sequence[Sequence[str]]) -> list[str]:
    """The columns named on the first line of `known` that names any."""
    for names in known:
        if found := [column for column in columns if str(column).lower() in names]:
            return found
    return []


def _only(what: str, found: Sequence[str], table: Table) -> str | None:
    if len(found) > 1:
        raise UsageError(f"{table.source}: more than one column may be the {what}{_choose(what, found)}")
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
        raise UsageError(f"{table.source}: more than one pair of columns may be the text{_choose('text', found)}")
    if pairs:
        return pairs[0]
    named = _by_name(strings, TEXTS)
    prose = [column for column in strings if _is_prose(table.frame[column])]
    # two columns of prose beside others may as well be a text and its translation, or its explanation
    if not named and len(prose) == 2 and len(columns) == 2 + spare:
        return tuple(prose)
    text = _only("text", named or prose or (strings if len(strings) == 1 else []), table)
    if text is None:
        raise UsageError(f"{table.source}: no column looks like text{_choose('text', columns)}")
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
        UsageError: no rows, an unknown column, or a cell that is empty or no string.
    """
    frame, source, columns = table.frame, table.source, table.text
    if frame.empty:
        raise UsageError(f"{source}: the table has no rows.")
    if columns is None:
        raise UsageError(f"{source}: the text column is not known{_choose('text', frame.columns)}")
    if not 1 <= len(columns) <= 2:
        raise UsageError(f"one or two text columns are read, got {len(columns)}: {', '.join(columns)}.")
    for column in columns:
        _check_column(table, column, "text")
        _check_texts(frame[column], column, source)
    names = ("text", "text_pair")[: len(columns)]
    return pd.DataFrame({name: frame[column].astype(str).tolist() for name, column in zip(names, columns, strict=True)})


def examples(table: Table) -> pd.DataFrame:
    """The checked rows: `text`, `text_pair` for two columns, `label` as it stands in the file, `group` if there is one.

    Raises:
        UsageError: what `texts` raises, and the same for labels and groups.
    """
    table = resolve(table)
    rows, (text, label) = texts(table), table.columns
    if len({*text, label}) != len(text) + 1:
        raise UsageError(f"text and label must be different columns, got {', '.join([*text, label])}.")
    _check_column(table, label, "label")
    labels = table.frame[label]
    _refuse(_empty(labels), f"label column {label!r}", "empty", table.source)
    rows["label"] = labels.astype(object).to_numpy()
    if table.group is not None:
        if table.group == label:
            raise UsageError(f"group and label must be different columns, got {label!r} for both.")
        _check_column(table, table.group, "group")
        groups = table.frame[table.group]
        _refuse(_empty(groups), f"group column {table.group!r}", "empty", table.source)
        rows["group"] = [label_name(value) for value in groups]
    return rows


def _check_column(table: Table, column: str, what: str) -> None:
    if column not in table.frame.columns:
        known = suggest(column, table.frame.columns)
        raise UsageError(f"{table.source}: no column {column!r}.{known} {_option(what)}")
    if (count := int((table.frame.columns == column).sum())) > 1:
        raise UsageError(f"{table.source}: {count} columns are called {column!r}: rename them.")


def _empty(values: pd.Series) -> pd.Series:
    return values.isna() | (values.astype(str).str.strip() == "")


def _check_texts(texts: pd.Series, column: str, source: str) -> None:
    strings = texts.map(lambda value: isinstance(value, str)).astype(bool)
    missing = texts.isna()
    if not (strings | missing).all():
        value = texts[~(strings | missing)].iloc[0]
        raise UsageError(
            f"{source}: text column {column!r} must hold strings, got {value} ({type(value).__name__}). "
            "Choose another column with --text NAME."
        )
    _refuse(_empty(texts), f"text column {column!r}", "empty", source)


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


def find_target(rows: pd.DataFrame, table: Table) -> Target:
    """Decide what is predicted, and the class order, from the training rows.

    Lists mean multi-label, numbers with a fraction mean regression, everything else classes. Where that is doubtful
    (more than 20 different whole numbers, or hardly a label that occurs twice) the user has to say. Classes are in
    the order of `rename`, of an ordered categorical column, of their numbers, or of the alphabet.

    Args:
        rows: of `examples`.
        table: the resolved table they come from.

    Raises:
        UsageError: the labels do not fit the kind, are doubtful, or leave nothing to learn.
    """
    labels, where = rows["label"], f"{table.source}: label column {table.label!r}"
    if table.kind not in get_args(Kind):
        raise UsageError(f"kind must be one of {', '.join(get_args(Kind))}, got {table.kind!r}.")
    if table.kind == "multilabel" or (table.kind == "auto" and _hold_lists(labels)):
        return _find_sets(rows, table, where)
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
    return Target(_class_order(names, table, where))


def _hold_lists(labels: pd.Series) -> bool:
    """Whether any label is a list (then all must be), or all are lists written as text."""
    lists = labels.map(_parts).notna()
    strings = labels.map(lambda value: isinstance(value, str)).astype(bool)
    return bool(lists.all() or (lists & ~strings).any())


def _find_sets(rows: pd.DataFrame, table: Table, where: str) -> Target:
    parts = _label_sets(rows, table)
    names = dict.fromkeys(name for row in parts for name in row)
    sizes = {len(row) for row in parts}
    if set(names) == {"0", "1"} and len(sizes) == 1 and sizes != {1}:
        raise UsageError(f"{where} holds lists of 0 and 1: give each row the list of its classes' names instead.")
    if len({frozenset(row) for row in parts}) == 1:
        raise UsageError(f"{where} holds the same classes in every row: there is nothing to learn.")
    return Target(_class_order(names, table, where), multi=True)


def _label_sets(rows: pd.DataFrame, table: Table) -> list[list[str]]:
    """The names in every row's list, as they stand in the file."""
    parts, what = rows["label"].map(_parts), f"label column {table.label!r}"
    _refuse(parts.isna(), what, "not a list", table.source)
    _refuse(parts.map(lambda row: any(value is None or value != value for value in row)).astype(bool), what,
            "a list with an empty entry", table.source)  # fmt: skip
    return [[label_name(value) for value in row] for row in parts]


def _class_order(names: Mapping[str, Any], table: Table, where: str) -> tuple[str, ...]:
    if len(names) < 2:
        raise UsageError(f"{where} holds one class only ({next(iter(names))!r}): at least two are needed.")
    if table.rename:
        unknown = [name for name in names if name not in table.rename]
        if unknown:
            raise UsageError(f"{where}: unknown label {unknown[0]!r}.{suggest(unknown[0], table.rename)}")
        return tuple(dict.fromkeys(table.rename.values()))
    dtype = table.frame[table.label].dtype
    if isinstance(dtype, pd.CategoricalDtype) and dtype.ordered:
        return tuple(name for name in map(label_name, dtype.categories) if name in names)
    numeric = _numbers(pd.Series(list(names), dtype=object)).notna().all()
    return tuple(sorted(names, key=float) if numeric else sorted(names))


def encode(rows: pd.DataFrame, table: Table, target: Target) -> pd.DataFrame:
    """Labels as they are scored: class names, tuples of them in class order (multi-label), or floats (regression).

    Raises:
        UsageError: a label does not occur in the training data, or is no finite number or no list where one is due.
    """
    if target.kind == "regression":
        return rows.assign(label=_encode_numbers(rows, table))
    known = target.merged(table.merge)
    raw = _label_sets(rows, table) if target.multi else [[label_name(value)] for value in rows["label"]]
    renamed = [[table.rename.get(name, name) for name in row] for row in raw]
    named = [[table.merge.get(name, name) for name in row] for row in renamed]
    strangers = [name for row in named for name in row if name not in known]
    if strangers:
        count = sum(not set(row) <= set(known) for row in named)
        raise UsageError(
            f"{table.source}: label {strangers[0]!r} (in {count} of {len(rows)} rows) does not occur in the "
            f"training data.{suggest(strangers[0], known)}"
        )
    place = {name: number for number, name in enumerate(known)}
    labels: list[Any] = [tuple(sorted({*row}, key=place.__getitem__)) if target.multi else row[0] for row in named]
    return rows.assign(label=pd.Series(labels, index=rows.index, dtype=object))


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


def membership(labels: pd.Series, target: Target) -> np.ndarray:
    """Truth values (rows, classes): which classes a row has; no columns for regression."""
    rows = labels if target.multi else [(label,) for label in labels]
    return np.array([[name in row for name in target.names] for row in rows], dtype=bool)


def strata(labels: pd.Series, target: Target) -> np.ndarray:
    """A stratum number for every row.

    Its class; of several classes (multi-label) the one with the fewest rows, and a stratum of their own for rows
    without any; for regression the tenth of the range of ranks it falls in.
    """
    if target.multi:
        member = membership(labels, target)
        rarest = np.where(member, member.sum(axis=0), len(labels) + 1).argmin(axis=1)
        return np.where(member.any(axis=1), rarest, len(target.names))
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
    """Carve a stratified validation share out of the rows; every class keeps at least one row for training.

    Rows of one `group` stay together; the share and the strata are then met as well as the groups allow.

    Raises:
        UsageError: a class has one row only, the share leaves a class without training rows, or every group is too
            large to be held out.
    """
    counts = membership(rows["label"], target).sum(axis=0)
    single = [name for name, count in zip(target.names, counts, strict=True) if count == 1]
    if single:
        raise UsageError(
            f"class {single[0]!r} has 1 row only and cannot be on both sides of a split{_and_more(single)}. Take it "
            "out, give a validation set, or set --validation-share 0."
        )
    size = max(1, round(share * len(rows)))
    held_out = _hold_groups(rows, target, size, seed) if "group" in rows else _hold_rows(rows, target, size, seed)
    return rows[~held_out], rows[held_out]


def _and_more(names: Sequence[str]) -> str:
    return f" (so have {len(names) - 1} other classes)" if len(names) > 1 else ""


def _hold_rows(rows: pd.DataFrame, target: Target, size: int, seed: int) -> np.ndarray:
    numbers = strata(rows["label"], target)
    counts = np.bincount(numbers)
    most = np.maximum(counts - 1, 0)
    if size > most.sum():
        raise UsageError(
            f"a validation share of {size} of {len(rows)} rows leaves a class without training rows. "
            "Lower --validation-share, or set it to 0."
        )
    held_out = np.zeros(len(rows), dtype=bool)
    held_out[draw(numbers, allot(counts, size, 0, most), seed)] = True
    return held_out


def _hold_groups(rows: pd.DataFrame, target: Target, size: int, seed: int) -> np.ndarray:
    """Groups in random order change sides where that brings rows and strata nearer to what is wanted, in two rounds.

    Not from large to small: that would hold out the large ones whatever the seed. The second round mends what the
    first one found too late.
    """
    groups, counts, order = _groups(rows, target, seed)
    total = counts.sum(axis=0)
    wanted, held = total * size / len(rows), np.zeros_like(total)
    chosen: set[int] = set()
    for group in [*order, *order]:
        after = held + (-counts[group] if group in chosen else counts[group])
        nearer = ((after - wanted) ** 2).sum() < ((held - wanted) ** 2).sum()
        if nearer and not ((after == total) & (total > 0)).any():
            held = after
            chosen ^= {group}
    if not chosen:
        raise UsageError(
            f"none of the {len(counts)} groups can be held out to make {size} of {len(rows)} validation rows. "
            "Raise --validation-share, give a validation set, or set it to 0."
        )
    return np.isin(groups, list(chosen))


def _groups(rows: pd.DataFrame, target: Target, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group number of every row; rows of each (group, stratum), all of the group last; the groups in random order."""
    groups, names = pd.factorize(rows["group"])
    numbers = strata(rows["label"], target)
    counts = np.zeros((len(names), numbers.max() + 2), dtype=int)
    np.add.at(counts, (groups, numbers), 1)
    counts[:, -1] = counts.sum(axis=1)
    return groups, counts, np.random.default_rng(seed).permutation(len(names))


def folds(rows: pd.DataFrame, target: Target, k: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """`k` cuts of the rows: positions to train on and positions held out, both in file order.

    Every row is held out once; folds have like sizes and strata, and rows of one `group` share a fold.

    Raises:
        UsageError: there are fewer rows (or groups) than folds, or a class would be missing from a training part.
    """
    units, what = (rows["group"].nunique(), "groups") if "group" in rows else (len(rows), "rows")
    if not 2 <= k <= units:
        raise UsageError(f"folds must lie between 2 and {units}, the number of {what}, got {k}.")
    fold = _fold_groups(rows, target, k, seed) if "group" in rows else _fold_rows(rows, target, k, seed)
    member = membership(rows["label"], target)
    for number in range(k):
        lost = (member.sum(axis=0) > 0) & ~member[fold != number].any(axis=0)
        if lost.any():
            name, count = target.names[lost.argmax()], int(member[:, lost.argmax()].sum())
            why = ", all in one group" if "group" in rows and count > 1 else ""
            raise UsageError(
                f"class {name!r} has {count} row{'s' * (count > 1)}{why}: too few for {k} folds, one would train "
                "without it. Take it out, or set fewer folds."
            )
    return [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in range(k)]


def _fold_rows(rows: pd.DataFrame, target: Target, k: int, seed: int) -> np.ndarray:
    """Shuffled, sorted by stratum, dealt out like cards: sizes and strata differ by one row at most."""
    order = np.random.default_rng(seed).permutation(len(rows))
    order = order[np.argsort(strata(rows["label"], target)[order], kind="stable")]
    fold = np.empty(len(rows), dtype=int)
    fold[order] = np.arange(len(rows)) % k
    return fold


def _fold_groups(rows: pd.DataFrame, target: Target, k: int, seed: int) -> np.ndarray:
    """Groups from large to small, each into the fold that most lacks such rows."""
    groups, counts, order = _groups(rows, target, seed)
    held = np.zeros((k, counts.shape[1]), dtype=int)
    home = np.empty(len(counts), dtype=int)
    for group in order[np.argsort(-counts[order, -1], kind="stable")]:
        home[group] = (held @ counts[group]).argmin()
        held[home[group]] += counts[group]
    return home[groups]


# Words that mark the side of a row in a validation column.
MARKS = {
    "train": "train", "training": "train", "false": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "true": "validation",
    "test": "test",
}  # fmt: skip


def cut(rows: pd.DataFrame, table: Table, column: str) -> dict[str, pd.DataFrame]:
    """The rows by what `column` of their table says: `train`, and `validation` and `test` where there are such rows.

    Known are the words of `MARKS` in any case, and truth values: true means validation.

    Raises:
        UsageError: there is no such column, another value in it, or no training row.
    """
    _check_column(table, column, "validation-column")
    values = table.frame[column].map(label_name)
    marks = values.str.strip().str.lower().map(MARKS).to_numpy(dtype=object)
    strange = pd.isna(marks)
    if strange.any():
        raise UsageError(
            f"{table.source}: validation column {column!r} must say train, validation or test (or be true or false), "
            f"got {values[strange].iloc[0]!r} in {int(strange.sum())} of {len(rows)} rows."
        )
    parts = {mark: rows[marks == mark] for mark in ("train", "validation", "test") if (marks == mark).any()}
    if "train" not in parts:
        raise UsageError(f"{table.source}: validation column {column!r} leaves no row for training.")
    return parts


# ---- all of it --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Data:
    """Checked splits: frames with `text` (`text_pair`), `label` (and `group`); the index is the row in the file.

    `table` is the training table with its columns resolved.
    """

    train: pd.DataFrame
    tests: Mapping[str, pd.DataFrame]  # "validation" first, where there is one
    target: Target
    sources: Mapping[str, str]
    merges: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    table: Table | None = None

    def describe(self) -> dict[str, Any]:
        """Sizes, sources and fingerprints, ready for JSON."""
        out = {}
        for name, rows in {"train": self.train, **self.tests}.items():
            out[name] = {"source": self.sources[name], "rows": len(rows), "sha256": fingerprint(rows)}
            if self.target.names:
                labels = rows["label"].explode() if self.target.multi else rows["label"]
                out[name]["labels"] = {str(label): int(n) for label, n in labels.value_counts().items()}
            if name != "train":
                out[name]["also_in_train"] = self.overlap(name)
        return out

    def overlap(self, name: str) -> int:
        """How many rows of a test set carry a text (or pair) that is also in the training rows."""
        seen = set(keys(self.train))
        return sum(key in seen for key in keys(self.tests[name]))


def keys(rows: pd.DataFrame) -> list[tuple[str, ...]]:
    """What makes rows the same to a model: their text, or pair of texts."""
    columns = [column for column in ("text", "text_pair") if column in rows]
    return list(rows[columns].itertuples(index=False, name=None))


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
    validation_column: str | None = None,
    seed: int = 0,
) -> Data:
    """Check every table and draw the splits.

    Args:
        train: the training table; its columns hold for the other tables where they name none.
        tests: name -> table.
        validation: a table of its own; then no row is held out.
        train_size: rows drawn from those for training; they are all the labelled data there is, a validation share
            is carved out of them.
        validation_share: of the training rows, held out where nothing else gives validation rows; 0: none.
        validation_column: the column of the training table that says where a row belongs (see `cut`); rows marked
            test become the test set `test`.
        seed: of the draws.

    Raises:
        UsageError: anything wrong with the tables or the splits.
    """
    given = [*tests, *(["validation"] if validation is not None else [])]
    if "validation" in tests or "train" in tests:
        raise UsageError("a test set cannot be called 'train' or 'validation': name it with --test NAME=FILE.")
    train = resolve(train, () if validation_column is None else (validation_column,))
    raw = examples(train)
    parts = {"train": raw} if validation_column is None else cut(raw, train, validation_column)
    for name in parts.keys() & {*given}:
        raise UsageError(
            f"{train.source}: column {validation_column!r} marks {name} rows, and a {name} set is given too: drop one."
        )
    target = find_target(parts["train"], train)
    cuts = {name: encode(rows, train, target) for name, rows in parts.items()}
    sources = {name: f"{train.source}, {name} in {validation_column!r}" for name in cuts} | {"train": train.source}
    rows = cuts.pop("train")
    if train_size is not None:
        rows = subset(rows, target, train_size, seed)
    if validation is not None:
        validation = _follow(validation, train)
        cuts["validation"] = encode(examples(validation), validation, target)
        sources["validation"] = validation.source
    elif validation_share and "validation" not in cuts:
        rows, cuts["validation"] = split(rows, target, validation_share, seed)
        sources["validation"] = f"{validation_share} of {train.source}"
    tables = {name: _follow(table, train) for name, table in tests.items()}
    cuts |= {name: encode(examples(table), table, target) for name, table in tables.items()}
    return Data(
        train=rows,
        tests={name: cuts[name] for name in sorted(cuts, key=lambda name: name != "validation")},
        target=target,
        sources={**sources, **{name: table.source for name, table in tables.items()}},
        merges={name: table.merge for name, table in tables.items()},
        table=train,
    )
