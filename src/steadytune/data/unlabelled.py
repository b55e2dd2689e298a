"""Rows without labels: where they come from, and which of them stay out. No torch here.

A text that is also in a test or validation set never enters, because scores are on texts that training has not read.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ..errors import UsageError
from .cells import is_empty
from .forms import OneCell
from .tables import Table, _tuple, keys, texts

logger = logging.getLogger("steadytune")

BLANK = "blank"  # source: the rows of the training table whose label is empty
REST = "rest"  # source: the rows that a draw of training rows leaves over, without their labels


@dataclass(frozen=True, eq=False)
class Unlabelled:
    """Texts without labels, each once.

    Attributes:
        rows: Frame with `text`, and `text_pair` for pairs.
        origins: What messages call the sources.
        left_out: Number of rows that stay out because their text is in a test or validation set (``tests``), in a
            labelled row (``labelled``), or earlier in the rows without labels (``repeated``).
    """

    rows: pd.DataFrame
    origins: tuple[str, ...]
    left_out: dict[str, int]

    def __str__(self) -> str:
        words = {
            "tests": "in a test or validation set",
            "labelled": "in a labelled row",
            "repeated": "in an earlier row without a label",
        }
        out = ", ".join(f"{count} {words[why]}" for why, count in self.left_out.items() if count)
        return f"{len(self.rows)} texts without labels" + (
            f"; left out, because their text is also: {out}" if out else ""
        )


def sources_of(given: Any) -> list[Any]:
    """The argument `unlabelled` as a list: files, frames, `BLANK` and `REST`.

    Raises:
        UsageError: A source is given twice.
    """
    listed = [] if given is None else list(given) if isinstance(given, (list, tuple)) else [given]
    named = [str(source) for source in listed if not isinstance(source, pd.DataFrame)]
    for name in named:
        if named.count(name) > 1:
            raise UsageError(f"unlabelled: {name[:60]!r} is given twice: leave one of them out.")
    return listed


def is_named(source: Any, name: str) -> bool:
    """Whether a source is `BLANK` or `REST`, as ``name`` says, and not a file or frame."""
    return isinstance(source, str) and source == name


def part_blank(table: Table) -> Table:
    """The rows of a resolved table that have a label; they keep their numbers.

    Raises:
        UsageError: An empty cell means something else in labels of this form, or no cell is empty.
    """
    if not isinstance(table.form, OneCell):
        raise UsageError(
            f"{table.origin}: unlabelled {BLANK!r} reads rows whose label is empty, and with several labels a row an "
            "empty cell means that none applies: put the rows without labels into a file of their own."
        )
    (column,) = table.form.columns
    if column not in table.frame.columns:
        return table  # an error of its own, later
    empty = is_empty(table.frame[column]).to_numpy(dtype=bool)
    if not empty.any():
        raise UsageError(
            f"{table.origin}: unlabelled {BLANK!r} reads rows whose label is empty, and column {column!r} has a label "
            f"in all {len(empty)} rows: leave it out."
        )
    if empty.all():
        raise UsageError(f"{table.origin}: label column {column!r} is empty in all {len(empty)} rows.")
    return dataclasses.replace(table, frame=table.frame[~empty])


def texts_of(source: Any, train: Table) -> tuple[pd.DataFrame, str]:
    """Texts of a file or frame without labels, and its name.

    Args:
        source: Any source of `read_rows`.
        train: The resolved training table, whose columns are read.

    Raises:
        UsageError: It cannot be read, has no rows, lacks a text column, has empty texts, or holds labels.
    """
    columns, label = train.columns
    table = Table.of(source, columns, None, "unlabelled")
    for column in columns:
        if column not in table.frame.columns and not table.frame.empty:
            raise UsageError(
                f"{table.origin}: no column {column!r}. Rows without labels have the text columns of the training "
                f"table ({', '.join(map(repr, columns))}): rename the column."
            )
    for column in _tuple(label):
        if column in table.frame.columns and (filled := ~is_empty(table.frame[column])).any():
            raise UsageError(
                f"{table.origin}: unlabelled rows hold labels, in {int(filled.sum())} of {len(filled)} rows of column "
                f"{column!r}: add labelled rows to the training table, or take the column out."
            )
    return texts(dataclasses.replace(table, text=columns)), table.origin


def keys_of(source: Any, train: Table) -> list[tuple[str, ...]]:
    """The texts of a file or frame with or without labels, as `keys` gives them.

    Args:
        source: Any source of `read_rows`.
        train: The resolved training table, whose columns are read.

    Raises:
        UsageError: It cannot be read, or lacks a text column.
    """
    columns, _ = train.columns
    table = Table.of(source, columns, None, "set apart")
    if missing := [column for column in columns if column not in table.frame.columns]:
        raise UsageError(
            f"{table.origin}: no column {missing[0]!r}. Texts apart stand in the text columns of the training table "
            f"({', '.join(map(repr, columns))}): rename the column."
        )
    return keys(texts(dataclasses.replace(table, text=columns)))


def gathered(
    parts: Sequence[tuple[pd.DataFrame, str]],
    labelled: pd.DataFrame,
    tested: Collection[tuple[str, ...]],
    size: int | None,
    seed: int,
) -> Unlabelled:
    """The texts of all sources together, without those that stay out.

    Args:
        parts: Texts of each source, and its name.
        labelled: Training rows.
        tested: Texts of test and validation sets, as `keys` gives them.
        size: Number of texts to draw; None for all.
        seed: Seed of the draw.

    Raises:
        UsageError: No text is left, or fewer than ``size``.
    """
    columns = [column for column in ("text", "text_pair") if column in labelled]
    rows = pd.concat([part[columns] for part, _ in parts], ignore_index=True)
    known = {"tests": tested, "labelled": {*keys(labelled)}}
    origins, left_out = tuple(origin for _, origin in parts), {}
    for why, taken in known.items():
        out = np.array([key in taken for key in keys(rows)], dtype=bool)
        rows, left_out[why] = rows[~out], int(out.sum())
    repeated = pd.Series(keys(rows), dtype=object).duplicated().to_numpy(dtype=bool)
    rows, left_out["repeated"] = rows[~repeated].reset_index(drop=True), int(repeated.sum())
    if rows.empty:
        raise UsageError(
            f"{', '.join(origins)}: no text without a label is left, because all are in labelled rows or test sets: "
            "give other texts."
        )
    if size is not None:
        if not 1 <= size <= len(rows):
            raise UsageError(f"unlabelled_size must lie between 1 and {len(rows)} (all), got {size}.")
        drawn = np.sort(np.random.default_rng(seed).permutation(len(rows))[:size])
        rows = rows.iloc[drawn].reset_index(drop=True)
    found = Unlabelled(rows, origins, left_out)
    logger.info("%s: %s", ", ".join(origins), found)
    return found
