"""Cells of tables: which are empty, what a label is called, lists and numbers. No torch here."""

from __future__ import annotations

import ast
import io
import itertools
import json
import re
import tokenize
from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd

from ..errors import UsageError, first_rows

WHOLE = re.compile(r"-?\d+\.0+")  # a whole number written as a fraction
INVISIBLE = re.compile(r"[\s\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]*")  # white space and signs of no width
LISTS = (list, tuple, set, frozenset, np.ndarray)


def is_empty(values: pd.Series) -> pd.Series:
    """Which cells are missing, or hold nothing that can be seen: white space and characters of no width."""
    return values.isna() | values.map(lambda value: INVISIBLE.fullmatch(str(value)) is not None).astype(bool)


def refuse(bad: pd.Series, what: str, how: str, origin: str, remedy: str = "Fill them in or take them out.") -> None:
    """Raise when any row is bad, with the count and the first rows, by their numbers in an index of whole numbers."""
    if bad.any():
        numbers = bad.index if pd.api.types.is_integer_dtype(bad.index) else pd.RangeIndex(len(bad))
        rows = numbers[bad.to_numpy(dtype=bool)]
        raise UsageError(
            f"{origin}: {what} is {how} in {len(rows)} of {len(bad)} rows (rows counted from 0: {first_rows(rows)}). "
            f"{remedy}"
        )


def label_name(value: Any) -> str:
    """The name of a label of any type: `1`, `1.0` and `"1"` are one class, whichever file format they came from."""
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        return str(int(value))
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():  # numbers of databases
        return str(int(value))
    if isinstance(value, str) and WHOLE.fullmatch(value):  # as pandas writes a column of whole numbers with a gap
        return value.partition(".")[0]
    return str(value)


def list_of(value: Any) -> list[Any] | None:
    """The members of a list, tuple, set or array, or of a list as text: in JSON, or as Python or NumPy prints one."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)  # first: Python reads the two halves of an escaped character as two characters
        except (ValueError, RecursionError):
            try:
                value = ast.literal_eval(_with_commas(value.strip()))
            except (ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
                return None
    return list(value) if isinstance(value, LISTS) else None


def _with_commas(text: str) -> str:
    """A list with commas between neighbours, which NumPy leaves out: Python reads `['a' 'b']` as one string."""
    values = (tokenize.STRING, tokenize.NUMBER)
    tokens = [token for token in tokenize.generate_tokens(io.StringIO(text).readline) if token.string.strip()]
    apart = ("," if one.type in values and other.type in values else "" for one, other in itertools.pairwise(tokens))
    return " ".join(token.string + comma for token, comma in zip(tokens, [*apart, ""], strict=True))


def check_lists(lists: pd.Series, what: str, origin: str) -> None:
    """Raise for lists of labels with an entry that is missing, white space, or no label.

    Args:
        lists: List of each row.
        what: What messages call the lists.
        origin: What messages call the rows.

    Raises:
        UsageError: With the count and the first rows.
    """

    def nested(value: Any) -> bool:
        return isinstance(value, (*LISTS, Mapping))

    def blank(value: Any) -> bool:
        return not nested(value) and (bool(pd.isna(value)) or not str(value).strip())

    refuse(lists.map(lambda row: any(map(blank, row))).astype(bool), what, "a list with an empty entry", origin)
    how, remedy = "a list that holds lists or objects", "Write lists of names."
    refuse(lists.map(lambda row: any(map(nested, row))).astype(bool), what, how, origin, remedy)


def numbers_of(labels: pd.Series) -> pd.Series:
    """The labels as floats, NaN where one is no number; truth values and lists are classes, not numbers."""
    none = (bool, np.bool_, *LISTS)
    plain = labels.map(lambda value: None if isinstance(value, none) else value)
    return pd.to_numeric(plain, errors="coerce").astype(float)


def shown(values: pd.Series) -> str:
    """The first value, cut where it is long."""
    text = str(values.iloc[0]) if len(values) else ""
    return text if len(text) <= 60 else text[:57] + "..."
