"""Which problem the labels of a table pose: one class a row, several, or numbers; and the order of the classes."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import pandas as pd

from ..errors import UsageError, first_rows, suggest
from .cells import label_name, list_of, numbers_of
from .forms import separator_hint
from .problem import DECIMAL_COMMA, PERCENT, THOUSANDS, Classification, MultiLabel, Problem, Regression, label_sets
from .tables import MANY_CLASSES, Kind

if TYPE_CHECKING:
    from .tables import Table

logger = logging.getLogger("steadytune")


def find_problem(rows: pd.DataFrame, table: Table) -> Problem:
    """Decide what is predicted, and the class order, from the training rows.

    Lists, a separator or several label columns mean several labels a row, numbers with a fraction mean regression,
    everything else classes. Where that is doubtful (more than 20 different whole numbers, or hardly a label that occurs
    twice) the user has to say. Classes are in the order of `rename`, of their columns, of an ordered categorical
    column, of their numbers, or of the alphabet.

    Args:
        rows: Rows as `examples` returns them.
        table: The resolved table they come from.

    Raises:
        UsageError: The labels do not fit the kind, are doubtful, or leave nothing to learn.
    """
    labels, where = rows["label"], f"{table.origin}: {table.form.words}"
    if table.kind not in get_args(Kind):
        raise UsageError(f"kind must be one of {', '.join(get_args(Kind))}, got {table.kind!r}.")
    if table.form.several and table.kind not in ("auto", "multilabel"):
        how = "one label column" if table.label_separator is None else "no label separator"
        raise UsageError(f"{where}: kind {table.kind} takes {how}: leave --kind out for several labels a row.")
    if table.form.several or table.kind == "multilabel" or (table.kind == "auto" and _hold_lists(labels)):
        return _find_sets(rows, table, where)
    if table.kind == "auto":
        _check_numbers_as_text(labels, where)
    numbers = numbers_of(labels)
    numeric = bool(numbers.notna().all())
    fractions = numeric and bool((numbers % 1 != 0).any())
    if table.kind == "regression" or (table.kind == "auto" and fractions):
        Regression().encode(rows, table)
        if numbers.nunique() < 2:
            raise UsageError(f"{where} holds one value only ({labels.iloc[0]}): there is nothing to learn.")
        return Regression()
    names = dict.fromkeys(labels.map(label_name))
    if table.kind == "auto" and len(names) > MANY_CLASSES and (numeric or len(names) > len(rows) / 2):
        raise UsageError(
            f"{where} has {len(names)} different values in {len(rows)} rows: "
            "say --kind classification, say --kind regression, or choose another column with --label NAME."
            f"{separator_hint(names)}"
        )
    if table.kind == "auto" and numeric and len(names) > 2:
        logger.info("%s: %d whole numbers are read as classes; --kind regression reads numbers", where, len(names))
    return Classification(_class_order(names, table, where))


def is_of_numbers(kind: Kind) -> bool:
    """Whether a kind that is known stands for numbers to predict."""
    return kind == "regression"


def kind_of_others(labels: pd.Series, kind: Kind) -> Kind:
    """The kind that a fit was told, for another table if its labels can be of it; several labels a row are seen."""
    fits = kind == "classification" or (kind == "regression" and bool(numbers_of(labels).notna().all()))
    return kind if fits else "auto"


def _check_numbers_as_text(labels: pd.Series, where: str) -> None:
    """Raise for labels the bulk of which are numbers that some cells spell otherwise, or for which some say nothing.

    Numbers with decimal commas or per cent signs would become classes, also where most of them are whole and need no
    comma, and so would all ratings of a column in which a few cells say N/A.
    """
    written, numbers = labels.astype(str), numbers_of(labels)
    for pattern, what, remedy in (
        (THOUSANDS, "a comma before three digits", "write 1000 for a thousand, and 1.000 for a decimal comma"),
        (DECIMAL_COMMA, "a decimal comma", "write them with a point, as in 0.5"),
        (PERCENT, "a per cent sign", "write them without it"),
    ):
        odd = written.str.fullmatch(pattern)
        if odd.any() and (odd | numbers.notna()).mean() > 0.5:
            raise UsageError(
                f"{where} holds numbers with {what} ({written[odd].iloc[0]!r}) in {int(odd.sum())} of {len(labels)} "
                f"rows: {remedy}, or say --kind classification.{separator_hint(written)}"
            )
    bulk, others = numbers[numbers.notna()], written[numbers.isna()]
    graded = bulk.nunique() > MANY_CLASSES or bool((bulk % 1 != 0).any())
    if 0 < len(others) < len(labels) / 2 and graded:
        names = list(dict.fromkeys(others))
        shown = ", ".join(repr(name) for name in names[:5]) + (", ..." if len(names) > 5 else "")
        raise UsageError(
            f"{where} holds numbers, but {shown} in {len(others)} of {len(labels)} rows (rows counted from 0: "
            f"{first_rows(others.index)}): take these rows out, or say --kind classification."
        )


def _hold_lists(labels: pd.Series) -> bool:
    """Whether any label is a list (then all must be), or all are lists written as text."""
    lists = labels.map(list_of).notna()
    strings = labels.map(lambda value: isinstance(value, str)).astype(bool)
    return bool(lists.all() or (lists & ~strings).any())


def _find_sets(rows: pd.DataFrame, table: Table, where: str) -> Problem:
    parts = label_sets(rows, table)
    names = dict.fromkeys(name for row in parts for name in row)
    sizes = {len(row) for row in parts}
    if set(names) == {"0", "1"} and len(sizes) == 1 and sizes != {1}:
        raise UsageError(f"{where} holds lists of 0 and 1: give each row the list of its classes' names instead.")
    if table.label_separator is not None and sizes <= {0, 1}:
        raise UsageError(
            f"{where}: the label separator {table.label_separator!r} is in none of {len(rows)} rows (such as "
            f"{next(iter(names), '')!r}): choose the sign that stands between two labels, or leave it out."
        )
    for name in table.form.classes:
        if name not in names:
            raise UsageError(
                f"{table.origin}: label column {name!r} is 0 in all {len(rows)} training rows: leave it out, or add "
                "rows that have the class."
            )
    if len({frozenset(row) for row in parts}) == 1:
        raise UsageError(f"{where} holds the same classes in every row: there is nothing to learn.")
    return MultiLabel(_class_order(names, table, where))


def _class_order(names: Mapping[str, Any], table: Table, where: str) -> tuple[str, ...]:
    if len(names) < 2:
        raise UsageError(f"{where} holds one class only ({next(iter(names))!r}): at least two are needed.")
    if table.rename:
        unknown = [name for name in names if name not in table.rename]
        if unknown:
            raise UsageError(f"{where}: unknown label {unknown[0]!r}.{suggest(unknown[0], table.rename)}")
        return tuple(dict.fromkeys(table.rename.values()))
    if table.form.classes:
        return table.form.classes
    dtype = table.frame[table.form.columns[0]].dtype
    if isinstance(dtype, pd.CategoricalDtype) and dtype.ordered and not table.form.several:
        return tuple(name for name in map(label_name, dtype.categories) if name in names)
    numeric = numbers_of(pd.Series(list(names), dtype=object)).notna().all()
    # by text too: floats of large numbers are equal, and the order of rows must not decide
    return tuple(sorted(names, key=lambda name: (float(name), name)) if numeric else sorted(names))
