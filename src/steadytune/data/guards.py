"""Findings in checked data: an error endangers the result, a warning points to a possible mistake. No torch here.

Unusable data (empty texts, unknown labels, a single class) is refused while it is read. The findings here need all
splits. Each has a count and the first rows.
"""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Literal

import numpy as np
import pandas as pd

from ..errors import UsageError
from .forms import joined_names
from .prepare import Data
from .problem import Problem
from .tables import keys, label_name

# A share is an error only in sets of at least this many rows; in smaller ones it can be chance.
LEAST_ROWS = 20
FEW_ROWS = 8  # a class with fewer training rows is hardly learnt
ORDINAL_CLASSES = 5  # this many consecutive integers may be a scale
SHOWN = 5  # largest number of rows, classes and texts in a message
PLACEHOLDERS = {"n/a", "na", "nan", "none", "null", "nil", "-", "--", "?", "missing", "unlabeled", "unlabelled", "<na>"}
# A replacement character, or UTF-8 read as Latin-1 or Windows-1252.
MOJIBAKE = r"\ufffd|Ã[\x80-\xbf©¨¼¶¤±³§«»]|â€[™œ\x9d\x99\x9c“”¦]"


@dataclass(frozen=True)
class Finding:
    """One error or warning about the data.

    Attributes:
        level: ``"error"`` if the result is in danger, ``"warning"`` for a possible mistake.
        message: One sentence with the set, the count, the first rows and the remedy.
        rows: Numbers of the first rows in the file, counted from 0 without the header.
    """

    level: Literal["error", "warning"]
    message: str
    rows: tuple[int, ...] = ()


def inspect(data: Data, *, standardize: bool = False) -> list[Finding]:
    """All findings, errors first; with ``standardize``, targets may have any scale.

    In sets of 20 rows or more, there are three errors: over half of the test or validation texts are also training
    texts, over half of the training rows have contradicting labels, and there are over half as many classes as rows.
    """
    findings = [
        *_ids(data),
        *_repeated(data),
        *_contradicting(data),
        *_twins(data),
        *_placeholders(data),
        *_joined_labels(data),
        *_one_label_each(data),
        *_constant_classes(data),
        *_small_classes(data),
        *_ordinal(data),
        *(() if standardize else _scale(data)),
        *_few_validation_rows(data),
        *(finding for name in data.tests for finding in (*_shared_texts(data, name), *_shared_groups(data, name))),
        *(finding for name in data.tests for finding in _other_scale(data, name)),
        *(finding for name in ("train", *data.tests) for finding in _garbled(data, name)),
    ]
    return sorted(findings, key=lambda finding: finding.level != "error")


def raise_errors(findings: Sequence[Finding]) -> list[Finding]:
    """Raise `UsageError` for the first error; return the warnings."""
    for finding in findings:
        if finding.level == "error":
            raise UsageError(finding.message)
    return list(findings)


def truncated(lengths: Sequence[int], limit: int, where: str, rows: Sequence[int] | None = None) -> Finding | None:
    """Warning about rows that are longer than the model reads; None if there are none.

    Args:
        lengths: Number of tokens of each row before truncation.
        limit: Largest number of tokens that the model reads.
        where: Name of the set in the message.
        rows: Numbers of the rows in the file; by default their positions.
    """
    over = np.asarray(lengths) > limit
    if not over.any():
        return None
    numbers = np.arange(len(over)) if rows is None else np.asarray(rows)
    after = f"have more than {limit} tokens and are cut"
    return _finding("warning", f"{where}: texts of", over, after, "raise --max-length", numbers)


# ---- the findings -----------------------------------------------------------------------------------------------


def _finding(
    level: Literal["error", "warning"], before: str, bad: np.ndarray, after: str, remedy: str, index: Any
) -> Finding:
    """A finding about the rows where `bad` is true; its message is `before`, their count, `after`."""
    rows = tuple(int(row) for row in np.asarray(index)[bad][:SHOWN])
    count = int(bad.sum())
    share = f"{count} of {len(bad)} rows ({100 * count / len(bad):.3g} %)"
    first = ", ".join(map(str, rows)) + (", ..." if count > len(rows) else "")
    return Finding(level, f"{before} {share}{after and ' ' + after} (rows counted from 0: {first}): {remedy}.", rows)


def _level(bad: np.ndarray) -> Literal["error", "warning"]:
    return "error" if len(bad) >= LEAST_ROWS and bad.sum() > len(bad) / 2 else "warning"


def _few_validation_rows(data: Data) -> Iterator[Finding]:
    rows = data.tests.get("validation")
    if rows is not None and len(rows) < LEAST_ROWS:
        yield Finding(
            "warning",
            f"{_origin(data, 'validation')}: {len(rows)} validation rows are too few to tell good from bad: give a "
            f"validation set of {LEAST_ROWS} rows or more, or train on all rows with --validation-share 0.",
        )


def _shared_texts(data: Data, name: str) -> Iterator[Finding]:
    rows, seen = data.tests[name], set(keys(data.train))
    bad = np.array([key in seen for key in keys(rows)], dtype=bool)
    if bad.any():
        remedy = "a model that has memorised them scores too high on them, take them out of one side"
        after = f"of {name} are also training texts"
        yield _finding(_level(bad), f"{_origin(data, name)}: texts of", bad, after, remedy, rows.index)


def _shared_groups(data: Data, name: str) -> Iterator[Finding]:
    rows = data.tests[name]
    if "group" in rows and "group" in data.train:
        bad = rows["group"].isin(set(data.train["group"])).to_numpy()
        if bad.any():
            remedy = "related rows on both sides make the score too high, keep a group on one side"
            after = f"of {name} are also in the training rows"
            yield _finding("warning", f"{_origin(data, name)}: groups of", bad, after, remedy, rows.index)


def _repeated(data: Data) -> Iterator[Finding]:
    bad = pd.Series(keys(data.train)).duplicated().to_numpy()
    if bad.any():
        after = "occur earlier in the training rows"
        remedy = "they count more than once, take them out if that is not meant"
        yield _finding("warning", f"{_origin(data, 'train')}: texts of", bad, after, remedy, data.train.index)


def _contradicting(data: Data) -> Iterator[Finding]:
    """Rows with the same text and different labels, as `Problem.differ` compares them."""
    rows, places = data.train, defaultdict(list)
    for place, key in enumerate(keys(rows)):
        places[key].append(place)
    labels = rows["label"].to_numpy()
    clashes = {key: at for key, at in places.items() if len(at) > 1 and data.problem.differ(labels[at], labels)}
    if not clashes:
        return
    bad = np.zeros(len(rows), dtype=bool)
    bad[[place for at in clashes.values() for place in at]] = True
    shown = "; ".join(_clash(key, at, rows) for key, at in list(clashes.items())[:2])
    after = f"have a text that occurs with another label too, such as {shown}"
    remedy = "decide for one label or take them out"
    yield _finding(_level(bad), f"{_origin(data, 'train')}:", bad, after, remedy, rows.index)


def _clash(key: tuple[str, ...], at: Sequence[int], rows: pd.DataFrame) -> str:
    text = " / ".join(key)
    text = text if len(text) <= 60 else text[:57] + "..."
    labels = ", ".join(dict.fromkeys(_shown(rows["label"].iloc[place]) for place in at))
    return f"{text!r} ({labels})"


def _shown(label: Any) -> str:
    return "+".join(label) or "no class" if isinstance(label, tuple) else label_name(label)


def _ids(data: Data) -> Iterator[Finding]:
    """A label with about as many values as rows in the whole table; a small draw of it may repeat no value."""
    total = len(data.train) if data.table is None else len(data.table.frame)
    count = len(data.problem.names)
    if total >= LEAST_ROWS and count > total / 2:
        rows = tuple(int(row) for row in data.train.index[:SHOWN])
        yield Finding(
            "error",
            f"{_origin(data, 'train')}: the label has {count} different values in {total} rows, which looks like an "
            f"id (first labels: {', '.join(_shown(label) for label in data.train['label'][:SHOWN])}): choose another "
            "column with --label NAME.",
            rows,
        )


def _twins(data: Data) -> Iterator[Finding]:
    """Classes that look the same: they differ by spaces, case, or the form of a character or number."""
    alike = defaultdict(list)
    for name in data.problem.names:
        alike[_folded(name)].append(name)
    for names in (names for names in alike.values() if len(names) > 1):
        member = data.problem.membership(data.train["label"])
        counts = [int(member[:, data.problem.names.index(name)].sum()) for name in names]
        shown = ", ".join(f"{name!r} ({count} rows)" for name, count in zip(names, counts, strict=True))
        bad = np.asarray(member[:, [data.problem.names.index(name) for name in names]].any(axis=1))
        before = f"{_origin(data, 'train')}: the labels {shown} look the same and differ by spaces, case or form, in"
        yield _finding("warning", before, bad, "", "write them alike if they are one class", data.train.index)


def _folded(name: str) -> str | Decimal:
    """A label without what a reader does not see; a number becomes its exact value."""
    seen = "".join(c for c in unicodedata.normalize("NFKC", name) if unicodedata.category(c) != "Cf")
    seen = " ".join(seen.split()).casefold()
    try:
        number = Decimal(seen)
    except InvalidOperation:
        return seen
    return number if number.is_finite() else seen


def _placeholders(data: Data) -> Iterator[Finding]:
    """Classes that stand for no label: words such as N/A, and -1 beside other whole numbers."""
    names = data.problem.names
    others = [name for name in names if name != "-1"]
    numbers = others not in ([], ["1"]) and all(name.isdigit() for name in others)  # -1 and 1 are two classes
    for name in names:
        if name.strip().casefold() in PLACEHOLDERS or (numbers and name == "-1"):
            bad = data.problem.membership(data.train["label"])[:, names.index(name)]
            before = f"{_origin(data, 'train')}: the class {name!r} often means that there is no label, in"
            yield _finding("warning", before, bad, "", "take these rows out if it does", data.train.index)


def _joined_labels(data: Data) -> Iterator[Finding]:
    """Classes such as 'food|price' beside a class 'food': several labels that were read as one."""
    looks_joined = joined_names(data.problem.names) if data.problem.classes else None
    if looks_joined is not None:
        separator, joined = looks_joined
        bad = data.train["label"].isin(joined).to_numpy(dtype=bool)
        before = f"{_origin(data, 'train')}: classes such as {joined[0]!r} look like several labels in one, in"
        remedy = f"if they are, read them with --label-separator {separator!r}"
        yield _finding("warning", before, bad, "", remedy, data.train.index)


def _one_label_each(data: Data) -> Iterator[Finding]:
    """Exactly one label in every row although a row may have several: the classes may exclude each other."""
    bad = data.problem.membership(data.train["label"]).sum(axis=1) == 1
    if data.problem.several and bad.all():
        before = f"{_origin(data, 'train')}: a row may have several labels, and there is exactly one in"
        remedy = "if classes exclude each other, give one column with the name of each row's class"
        yield _finding("warning", before, bad, "", remedy, data.train.index)


def _constant_classes(data: Data) -> Iterator[Finding]:
    """Classes that every row has although a row may have several: the model cannot learn from them."""
    member = data.problem.membership(data.train["label"])
    for name in (data.problem.names[i] for i in np.flatnonzero(member.all(axis=0)) if data.problem.several):
        before, after = f"{_origin(data, 'train')}: the class {name!r} is in", "and is learnt as a constant"
        yield _finding("warning", before, np.ones(len(member), dtype=bool), after, "leave it out", data.train.index)


def _small_classes(data: Data) -> Iterator[Finding]:
    member = data.problem.membership(data.train["label"])
    counts = member.sum(axis=0)
    small = np.flatnonzero(counts < FEW_ROWS)
    if len(small):
        shown = ", ".join(f"{data.problem.names[i]!r} ({counts[i]})" for i in small[:SHOWN])
        more = ", ..." if len(small) > SHOWN else ""
        before = (
            f"{_origin(data, 'train')}: {len(small)} of {len(counts)} classes have fewer than {FEW_ROWS} training rows,"
        )
        remedy = "they are hardly learnt, add rows or merge classes"
        bad = np.asarray(member[:, small].any(axis=1))
        yield _finding("warning", before, bad, f"together: {shown}{more}", remedy, data.train.index)


def _ordinal(data: Data) -> Iterator[Finding]:
    """Consecutive whole numbers as classes, which may be a scale, unless the user chose the kind."""
    names = data.problem.names
    chosen = data.table is not None and data.table.kind != "auto"
    if data.problem.classes and not chosen and _consecutive(data.problem):
        before = (
            f"{_origin(data, 'train')}: the {len(names)} classes are the whole numbers {names[0]} to {names[-1]}, in"
        )
        remedy = "if they are a scale say --kind regression, if not --kind classification"
        yield _finding("warning", before, np.ones(len(data.train), dtype=bool), "", remedy, data.train.index)


def _consecutive(problem: Problem) -> bool:
    if len(problem.names) < ORDINAL_CLASSES:
        return False
    try:
        numbers = sorted(int(name) for name in problem.names)
    except ValueError:
        return False
    return numbers == list(range(numbers[0], numbers[0] + len(numbers)))


def _scale(data: Data) -> Iterator[Finding]:
    if not data.problem.ordered:
        return
    labels = data.train["label"].to_numpy(dtype=float)
    mean, spread = float(labels.mean()), float(labels.std())
    if abs(mean) > 20 or not 0.05 < spread < 20:
        after = f"have mean {mean:.3g} and spread {spread:.3g}"
        remedy = "models learn best near 0 and 1, leave out --no-standardize or rescale them"
        every = np.ones(len(labels), dtype=bool)
        yield _finding("warning", f"{_origin(data, 'train')}: the targets of", every, after, remedy, data.train.index)


def _other_scale(data: Data, name: str) -> Iterator[Finding]:
    """Numbers most of which lie further from those of training than these are apart: stars beside per cent."""
    if not data.problem.ordered:
        return
    known, labels = (rows["label"].to_numpy(dtype=float) for rows in (data.train, data.tests[name]))
    low, high = known.min(), known.max()
    bad = (labels < 2 * low - high) | (labels > 2 * high - low)
    if bad.mean() > 0.5:
        after = f"lie far outside {low:g} to {high:g}, between which all training targets lie"
        remedy = "give both in the same units"
        yield _finding("warning", f"{_origin(data, name)}: targets of", bad, after, remedy, data.tests[name].index)


def _garbled(data: Data, name: str) -> Iterator[Finding]:
    rows = data.train if name == "train" else data.tests[name]
    columns = [rows[column].str.contains(MOJIBAKE) for column in ("text", "text_pair") if column in rows]
    bad = np.logical_or.reduce([column.to_numpy(dtype=bool) for column in columns])
    if bad.any():
        after = "hold signs of a wrong encoding such as 'Ã©'"
        remedy = "save the file as UTF-8 from its source"
        yield _finding("warning", f"{_origin(data, name)}: texts of", bad, after, remedy, rows.index)


def _origin(data: Data, name: str) -> str:
    return data.origins.get(name, name)
