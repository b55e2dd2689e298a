"""What is predicted: the kind of task, the classes and their order, and labels as they are scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pandas as pd

from ..errors import UsageError, suggest
from .tables import MANY_CLASSES, Kind, Target, _numbers, _parts, _refuse, label_name

if TYPE_CHECKING:
    from .tables import Table


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
