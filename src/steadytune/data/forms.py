"""The forms in which the labels of a table are written, which are read alike and written again. No torch here."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..errors import UsageError
from .cells import is_empty, label_name, list_of, refuse, shown

Label = str | tuple[str, ...]  # one label column, or one column per class

PREDICTION = "prediction"
ABSENT, PRESENT = ("0", "false", "no"), ("1", "true", "yes")  # how a column tells whether a row has its class


@dataclass(frozen=True)
class Form(ABC):
    """How labels are written.

    Attributes:
        columns: Label columns of a table.
    """

    columns: tuple[str, ...]

    @property
    def words(self) -> str:
        """What messages call the columns."""
        return f"label column{'s' * (len(self.columns) > 1)} {', '.join(map(repr, self.columns))}"

    def record(self) -> dict[str, Any]:
        """Arguments of `form_of`, ready for JSON."""
        return {"label": self.columns[0] if len(self.columns) == 1 else list(self.columns)}

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in class order, where the form names them."""
        return ()

    @property
    def several(self) -> bool:
        """Whether every row is read as the list of its labels."""
        return True

    @abstractmethod
    def read(self, frame: pd.DataFrame, origin: str, blank: str = "") -> pd.Series:
        """A label, or the list of its labels, for every row (rows,).

        Args:
            frame: Rows with the label columns.
            origin: What messages call the rows.
            blank: What else may be done about rows without a label, in a sentence that follows a space.

        Raises:
            UsageError: Cells that are empty or not of this form.
        """

    @abstractmethod
    def write(self, predictions: pd.Series, taken: Collection[str] = (), *, as_text: bool = False) -> pd.DataFrame:
        """Predictions in columns of this form.

        Args:
            predictions: Labels (rows,), tuples where a row may have several; missing where there is no prediction.
            taken: Names of other columns of the table.
            as_text: Whether cells can only hold text.
        """


@dataclass(frozen=True)
class OneCell(Form):
    """One cell a row, with one label or the list of the row's labels."""

    @property
    def several(self) -> bool:
        return False

    def read(self, frame: pd.DataFrame, origin: str, blank: str = "") -> pd.Series:
        labels = frame[self.columns[0]]
        empty = is_empty(labels)
        hint = separator_hint(labels[~empty].map(label_name)) if empty.any() else ""
        refuse(empty, self.words, "empty", origin, f"Fill them in or take them out.{blank}{hint}")
        return labels.astype(object)

    def write(self, predictions: pd.Series, taken: Collection[str] = (), *, as_text: bool = False) -> pd.DataFrame:
        def cell(label: Any) -> Any:
            if not isinstance(label, tuple):
                return label
            return json.dumps(label, ensure_ascii=False) if as_text else list(label)

        return _column([cell(label) for label in predictions], predictions)


@dataclass(frozen=True)
class Joined(Form):
    """One cell a row, with the row's labels between separators; a row without labels has an empty cell.

    Attributes:
        separator: What stands between two labels of a cell.
    """

    separator: str

    def record(self) -> dict[str, Any]:
        return {**super().record(), "label_separator": self.separator}

    def read(self, frame: pd.DataFrame, origin: str, blank: str = "") -> pd.Series:
        cells = frame[self.columns[0]].astype(object)
        lists = cells.map(list_of).notna()
        remedy = "Leave the label separator out."
        refuse(lists, self.words, f"a list already ({shown(cells[lists])})", origin, remedy)
        return cells.where(~is_empty(cells), "").map(self.split)

    def split(self, cell: Any) -> list[str]:
        """The labels of a cell, each once."""
        parts = (part.strip() for part in label_name(cell).split(self.separator))
        return list(dict.fromkeys(part for part in parts if part))

    def write(self, predictions: pd.Series, taken: Collection[str] = (), *, as_text: bool = False) -> pd.DataFrame:
        cells = [self.separator.join(label) if isinstance(label, tuple) else None for label in predictions]
        return _column(cells, predictions)


@dataclass(frozen=True)
class OneHot(Form):
    """One column per class, which tells whether a row has the class: 0 or 1, false or true, no or yes."""

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(map(label_name, self.columns))

    def read(self, frame: pd.DataFrame, origin: str, blank: str = "") -> pd.Series:
        member = self.member(frame, origin)
        lists = [[name for name, has in zip(self.classes, row, strict=True) if has] for row in member]
        return pd.Series(lists, index=frame.index, dtype=object)

    def member(self, frame: pd.DataFrame, origin: str) -> np.ndarray:
        """Truth values (rows, classes): which classes each row has; arguments as of `read`."""
        for column in self.columns:
            what, values = f"label column {column!r}", frame[column]
            refuse(is_empty(values), what, "empty", origin, "Write 0 where a row does not have the class.")
            other = ~_words(values).isin([*ABSENT, *PRESENT])
            remedy = "One of several label columns holds 0 or 1, false or true, no or yes: name one column for others."
            refuse(other, what, f"neither 0 nor 1 ({shown(values[other])!r})", origin, remedy)
        return np.stack([_words(frame[column]).isin(PRESENT) for column in self.columns], axis=1)

    def write(self, predictions: pd.Series, taken: Collection[str] = (), *, as_text: bool = False) -> pd.DataFrame:
        """One column of 0 and 1 for each class, called as in training, or ``prediction_...`` where that is taken."""
        prefix = f"{PREDICTION}_" if {*self.columns} & {*taken} else ""
        none = [None] * len(self.columns)
        rows = [
            [int(name in label) for name in self.classes] if isinstance(label, tuple) else none for label in predictions
        ]
        names = [prefix + column for column in self.columns]
        return pd.DataFrame(rows, index=predictions.index, columns=names, dtype="Int64")


def _column(cells: list[Any], predictions: pd.Series) -> pd.DataFrame:
    """Cells in the place of the predictions that they write."""
    return pd.DataFrame({PREDICTION: pd.Series(cells, index=predictions.index, dtype=predictions.dtype)})


def is_indicator(values: pd.Series) -> bool:
    """Whether a column tells of every row whether it has a class."""
    return bool(_words(values).isin([*ABSENT, *PRESENT]).all())


def _words(values: pd.Series) -> pd.Series:
    """Cells as lower-case words; 1.0 is 1."""
    return values.astype(object).map(lambda value: label_name(value).strip().lower())


def joined_names(names: Iterable[str]) -> tuple[str, list[str]] | None:
    """The separator that some names seem to hold, and these names; None where there is none.

    A name such as 'food|price' beside a name 'food' may be several labels that were read as one.
    """
    names = list(dict.fromkeys(names))
    for separator in "|;,":
        parts = {name: [part.strip() for part in name.split(separator)] for name in names}
        alone = {name for name, split in parts.items() if len(split) == 1}
        joined = [name for name, split in parts.items() if len(split) > 1 and alone.intersection(split)]
        if joined:
            return separator, joined
    return None


def separator_hint(names: Iterable[str]) -> str:
    """A sentence about the option that reads such names as several labels; empty where they are no such names."""
    if (looks_joined := joined_names(names)) is None:
        return ""
    separator, joined = looks_joined
    return f" If cells such as {joined[0]!r} hold several labels, say --label-separator {separator!r}."


def as_label(given: Any) -> Label | None:
    """The label columns that an option or a record names, one or a list of them, as strings."""
    one = given is None or isinstance(given, str) or not isinstance(given, Iterable)
    names = tuple(str(name).strip() for name in ([given] if one else given) if name is not None)
    return names if len(names) > 1 else names[0] if names else None


def form_of(label: Label, separator: str | None = None) -> Form:
    """The form of labels in these columns.

    Args:
        label: The label column, or one column per class.
        separator: What stands between the labels of one cell; None: a cell is one label, or a list.

    Raises:
        UsageError: A separator that is empty or beside several columns, or a class with two columns.
    """
    if isinstance(label, str):
        if separator == "":
            raise UsageError("the label separator must not be empty: give the sign between two labels, as in 'a|b'.")
        return OneCell((label,)) if separator is None else Joined((label,), separator)
    if separator is not None:
        raise UsageError(
            f"a label separator ({separator!r}) is for one label column, got {len(label)}: leave one of them out."
        )
    form = OneHot(label)
    twice = [name for name in form.classes if form.classes.count(name) > 1]
    if twice:
        raise UsageError(f"label column {twice[0]!r} is given twice: name the column of each class once.")
    return form
