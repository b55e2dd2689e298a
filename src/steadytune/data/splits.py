"""Splits of rows: strata, groups, subsets, validation shares and folds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ..errors import UsageError
from .tables import _check_column, keys, label_name

if TYPE_CHECKING:
    from .problem import Problem
    from .tables import Table


def allot(counts: np.ndarray, size: int, least: int, most: np.ndarray) -> np.ndarray:
    """Distribute `size` places over strata in proportion to `counts`, with `least` to `most` for each."""
    take = np.minimum(least, most)
    wanted = counts * size / counts.sum()
    while take.sum() < size:
        take[np.argmax(np.where(take < most, wanted - take, -np.inf))] += 1
    return take


def draw(groups: np.ndarray, take: np.ndarray, seed: int) -> np.ndarray:
    """Positions of `take[g]` rows drawn at random from every group g, in file order."""
    order = np.random.default_rng(seed).permutation(len(groups))
    chosen = [order[groups[order] == group][:amount] for group, amount in enumerate(take)]
    return np.sort(np.concatenate(chosen))


def subset(rows: pd.DataFrame, problem: Problem, size: int, seed: int) -> pd.DataFrame:
    """A stratified draw of `size` rows with at least one row of each class that occurs."""
    groups = problem.strata(rows["label"])
    counts = np.bincount(groups)
    least = int((counts > 0).sum())
    if not least <= size <= len(rows):
        fewest = "one row a class" if problem.names else "one row of each stratum of the numbers"
        raise UsageError(f"train size must lie between {least} ({fewest}) and {len(rows)} (all), got {size}.")
    return rows.iloc[draw(groups, allot(counts, size, 1, counts), seed)]


def split(rows: pd.DataFrame, problem: Problem, share: float, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Split off a stratified validation share; each class keeps at least one row for training.

    Rows of equal text and rows of one `group` stay together, so share and strata may be met approximately only.

    Raises:
        UsageError: A class has one row only, the share leaves a class without training rows, or every group is too
            large to be held out.
    """
    counts = problem.membership(rows["label"]).sum(axis=0)
    single = [name for name, count in zip(problem.names, counts, strict=True) if count == 1]
    if single:
        raise UsageError(
            f"class {single[0]!r} has 1 row only and cannot be on both sides of a split{_and_more(single)}. Take it "
            "out, give a validation set, or set --validation-share 0."
        )
    size = max(1, round(share * len(rows)))
    texts = _texts(rows)
    if "group" in rows:
        held_out = _hold_groups(rows.assign(group=_joined(rows, texts)), problem, size, seed)
    else:
        first = ~pd.Series(texts).duplicated().to_numpy()
        held_out = _hold_rows(rows[first], problem, max(1, round(share * first.sum())), seed)[texts]
        held_out &= ~np.isin(texts, texts[_of_lost_classes(rows, problem, held_out)])
    return rows[~held_out], rows[held_out]


def _texts(rows: pd.DataFrame) -> np.ndarray:
    """Number of the text (or pair) of each row, in the order of first occurrence."""
    return pd.factorize(pd.Series(keys(rows), dtype=object))[0]


def _joined(rows: pd.DataFrame, texts: np.ndarray) -> np.ndarray:
    """Group number of each row; groups that share a text are joined."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    groups = pd.factorize(rows["group"])[0]
    size = groups.max() + texts.max() + 2
    edges = coo_array((np.ones(len(rows)), (groups, texts + groups.max() + 1)), shape=(size, size))
    return connected_components(edges, directed=False)[1][groups]


def _of_lost_classes(rows: pd.DataFrame, problem: Problem, held_out: np.ndarray) -> np.ndarray:
    """Whether a row's class has no row left for training, which copies of texts with another class can cause."""
    member = problem.membership(rows["label"])
    lost = member.any(axis=0) & ~member[~held_out].any(axis=0)
    return np.asarray(member[:, lost].any(axis=1))


def _and_more(names: Sequence[str]) -> str:
    return f" (so have {len(names) - 1} other classes)" if len(names) > 1 else ""


def _hold_rows(rows: pd.DataFrame, problem: Problem, size: int, seed: int) -> np.ndarray:
    numbers = problem.strata(rows["label"])
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


def _hold_groups(rows: pd.DataFrame, problem: Problem, size: int, seed: int) -> np.ndarray:
    """Hold out groups: in random order, move each to the other side if rows and strata come closer to the share.

    The order is random because from large to small, the large groups would be held out with every seed. A second round
    improves the result of the first.
    """
    groups, counts, order = _groups(rows, problem, seed)
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


def _groups(rows: pd.DataFrame, problem: Problem, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Group number of each row; counts by (group, stratum), with the group's total last; the groups in random order."""
    groups, names = pd.factorize(rows["group"])
    numbers = problem.strata(rows["label"])
    counts = np.zeros((len(names), numbers.max() + 2), dtype=int)
    np.add.at(counts, (groups, numbers), 1)
    counts[:, -1] = counts.sum(axis=1)
    return groups, counts, np.random.default_rng(seed).permutation(len(names))


FEW_ROWS = 200  # below this number of rows, 10 folds leave more of them for training than 5


def usual_folds(rows: pd.DataFrame) -> int:
    """Number of folds of a cross-validation: 5, or 10 below 200 rows; no more than there are distinct texts or groups.

    Args:
        rows: Checked rows, with ``group`` where there are groups.
    """
    return max(2, min(10 if len(rows) < FEW_ROWS else 5, len(np.unique(units(rows)))))


def units(rows: pd.DataFrame) -> np.ndarray:
    """Number (rows,) of the set of rows that each row must stay together with: its text's, or its group's."""
    texts = _texts(rows)
    return _joined(rows, texts) if "group" in rows else texts


def folds(rows: pd.DataFrame, problem: Problem, k: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Cut the rows into `k` folds: for each, the positions to train on and those held out, in file order.

    Each row is held out once. Folds have similar sizes and strata; rows of equal text or of one `group` share a fold.

    Raises:
        UsageError: There are fewer rows (or groups) than folds, or a class would be missing from a training part.
    """
    texts = _texts(rows)
    together = units(rows)
    most, what = len(np.unique(together)), "groups" if "group" in rows else "rows"
    if "group" in rows:
        rows = rows.assign(group=together)
    if not 2 <= k <= most:
        raise UsageError(f"folds must lie between 2 and {most}, the number of {what}, got {k}.")
    first = ~pd.Series(texts).duplicated().to_numpy()
    fold = _fold_groups(rows, problem, k, seed) if "group" in rows else _fold_rows(rows[first], problem, k, seed)[texts]
    member = problem.membership(rows["label"])
    for number in range(k):
        lost = (member.sum(axis=0) > 0) & ~member[fold != number].any(axis=0)
        if lost.any():
            name, count = problem.names[lost.argmax()], int(member[:, lost.argmax()].sum())
            why = ", all in one group" if "group" in rows and count > 1 else ""
            raise UsageError(
                f"class {name!r} has {count} row{'s' * (count > 1)}{why}: too few for {k} folds, one would train "
                "without it. Take it out, or set fewer folds."
            )
    return [(np.flatnonzero(fold != number), np.flatnonzero(fold == number)) for number in range(k)]


def _fold_rows(rows: pd.DataFrame, problem: Problem, k: int, seed: int) -> np.ndarray:
    """Shuffle, sort by stratum and deal out in turn: sizes and strata differ by at most one row."""
    order = np.random.default_rng(seed).permutation(len(rows))
    order = order[np.argsort(problem.strata(rows["label"])[order], kind="stable")]
    fold = np.empty(len(rows), dtype=int)
    fold[order] = np.arange(len(rows)) % k
    return fold


def _fold_groups(rows: pd.DataFrame, problem: Problem, k: int, seed: int) -> np.ndarray:
    """Put each group, from large to small, into the fold that most lacks such rows."""
    groups, counts, order = _groups(rows, problem, seed)
    held = np.zeros((k, counts.shape[1]), dtype=int)
    home = np.empty(len(counts), dtype=int)
    for group in order[np.argsort(-counts[order, -1], kind="stable")]:
        home[group] = (held @ counts[group]).argmin()
        held[home[group]] += counts[group]
    return home[groups]


# Words of a validation column for each set.
MARKS = {
    "train": "train", "training": "train", "false": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation", "true": "validation",
    "test": "test",
}  # fmt: skip


def cut(rows: pd.DataFrame, table: Table, column: str) -> dict[str, pd.DataFrame]:
    """Split the rows by a column of their table into `train`, and `validation` and `test` if there are such rows.

    The column may have the words of `MARKS`, in any case, or truth values, where true means validation.

    Raises:
        UsageError: There is no such column, another value in it, or no training row.
    """
    _check_column(table, column, "validation-column")
    values = table.frame[column].map(label_name)
    marks = values.str.strip().str.lower().map(MARKS).to_numpy(dtype=object)
    strange = pd.isna(marks)
    if strange.any():
        raise UsageError(
            f"{table.origin}: validation column {column!r} must say train, validation or test (or be true or false), "
            f"got {values[strange].iloc[0]!r} in {int(strange.sum())} of {len(rows)} rows."
        )
    parts = {mark: rows[marks == mark] for mark in ("train", "validation", "test") if (marks == mark).any()}
    if "train" not in parts:
        raise UsageError(f"{table.origin}: validation column {column!r} leaves no row for training.")
    return parts
