"""Attributes of rows that predict a label by themselves: length, negation, overlap, columns of subgroups, single words.

A model may learn such an attribute in place of the task, and is then wrong where the two part. An attribute is named
where the rows that have it carry a class far more often than the others do:

    P(class | attribute) - P(class | no attribute) > GAP

and Fisher's exact test says so after Bonferroni's correction. Attributes that the user declares spurious are made
independent of the classes by weights of rows (entropy balancing; Hainmueller, Political Analysis 2012):

    min_w sum w log w      mean w = 1,  mean w a = mean a,  mean w y = mean y,  cov_w(a, y) = 0,  cov_w(a, a') = 0

for each class y and each pair of attributes a, a' of which rows have both, either one, and neither. Without such rows,
as with two values of one column, no weights make them independent.

Balance-subsampled stable prediction (Kuang et al., arXiv 2006.04381) draws a sub-sample by a fractional factorial
design instead. Departure: weights keep every row of a small table, and only the declared attributes are balanced. This
was written from the paper; its authors' code was not read. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from ..errors import UsageError
from .problem import Problem
from .tables import label_name, overlap_of, words

Kind = Literal["measure", "column", "word"]

LEAST = 20  # rows with an attribute; fewer say little
GAP = 0.3  # difference of the shares of a class that is worth a line
WORD_SHARE = 0.9  # share of a class among the rows with a word: words of a class are common, words that decide are not
CHANCE = 0.01  # largest p-value of all attributes together
SHOWN = 5  # attributes in the log
WEIGHT = "weight"  # column of training rows: their weights in the loss
MOST = 10.0  # largest weight of a row
RIDGES = np.logspace(-6, 2, 9)  # slack of the constraints; the first that keeps weights below MOST is taken
NEGATION = r"\b(?:not|no|never|nor|none|nobody|nothing|nowhere|without|cannot)\b|n't\b|n’t\b"


@dataclass(frozen=True)
class Predictor:
    """An attribute that predicts a class.

    Attributes:
        attribute: The attribute in words, as "'refund'" or "length above 12 words".
        label: The class.
        share: Share of the class among the rows with the attribute.
        rows: Number of rows with the attribute.
        otherwise: Share of the class among the other rows.
    """

    attribute: str
    label: str
    share: float
    rows: int
    otherwise: float

    def __str__(self) -> str:
        return (
            f"{self.attribute} predicts label {self.label!r} in {self.share:.0%} of {self.rows} rows "
            f"({self.otherwise:.0%} of the others)"
        )


def predictors(rows: pd.DataFrame, problem: Problem, columns: pd.DataFrame | None = None) -> list[Predictor]:
    """Attributes of training rows that predict a class, the clearest first; none for numbers.

    Args:
        rows: Rows with ``text``, ``label``, and ``text_pair`` where there is one.
        problem: The problem.
        columns: Further columns of the rows, whose values are attributes; none of them a label.
    """
    from scipy.stats import fisher_exact

    member = problem.membership(rows["label"])
    tried = 0
    found: list[tuple[float, Predictor]] = []
    for part in _attributes(rows, columns):
        if not LEAST <= part.has.sum() <= len(rows) - LEAST:
            continue
        tried += 1
        inside, outside = member[part.has].mean(axis=0), member[~part.has].mean(axis=0)
        for i, label in enumerate(problem.names):
            if inside[i] - outside[i] <= GAP or (part.kind == "word" and inside[i] < WORD_SHARE):
                continue
            counts = [[member[side, i].sum(), (~member[side, i]).sum()] for side in (part.has, ~part.has)]
            p = float(fisher_exact(counts, alternative="greater").pvalue)
            named = Predictor(part.words, label, float(inside[i]), int(part.has.sum()), float(outside[i]))
            found.append((p, named))
    clear = [(p, predictor) for p, predictor in found if p * tried * len(problem.names) < CHANCE]
    return [predictor for _, predictor in sorted(clear, key=lambda pair: pair[0])]


def balanced(
    rows: pd.DataFrame, problem: Problem, names: Sequence[str], columns: pd.DataFrame | None = None
) -> np.ndarray:
    """Weights of rows (rows,), with mean 1, under which attributes do not predict the classes.

    Args:
        rows: As of `predictors`.
        problem: A problem with classes.
        names: Attributes: ``length``, ``negation``, ``overlap``, ``subgroup`` (all columns), one of the columns, or a
            word, where nothing else has this name.
        columns: As of `predictors`.

    Raises:
        UsageError: Numbers instead of classes, or a name that no row, or every row, has.
    """
    if not problem.names:
        raise UsageError(f"balance is for classes, this is {problem.kind}: leave it out.")
    named: dict[str, dict[Kind, list[np.ndarray]]] = {name: {} for name in names}
    for part in _attributes(rows, columns):
        if 0 < part.has.sum() < len(rows):
            for name in part.named(names):
                named[name].setdefault(part.kind, []).append(part.has)
    for name, own in named.items():
        if not own:
            raise UsageError(
                f"balance: no attribute {name!r} that some rows have and others lack: name length, negation, overlap "
                f"(of pairs), subgroup (its columns but for a label), or a word that {LEAST} rows hold."
            )
    kinds: tuple[Kind, ...] = ("measure", "column", "word")
    chosen = [has for own in named.values() for has in own[next(kind for kind in kinds if kind in own)]]
    return entropy_weights(np.stack(chosen, axis=1), problem.membership(rows["label"]))


def entropy_weights(attributes: np.ndarray, member: np.ndarray, most: float = MOST) -> np.ndarray:
    """Weights nearest to 1 in entropy that make attributes independent of classes and of each other, and keep shares.

    Where no such weights exist, or only with some above ``most``, the constraints hold in part.

    Args:
        attributes: Truth values (rows, attributes).
        member: Truth values (rows, classes).
        most: Largest weight.

    Returns:
        (rows,), with mean 1.
    """
    from scipy.optimize import minimize
    from scipy.special import logsumexp, softmax

    a, y = (np.asarray(part, dtype=float) - np.mean(part, axis=0) for part in (attributes, member))
    pairs = [(i, j) for i in range(a.shape[1]) for j in range(i) if _crossed(attributes[:, i], attributes[:, j])]
    crossed = [a[:, i] * a[:, j] for i, j in pairs]
    moments = np.column_stack([a, y, (a[:, :, None] * y[:, None, :]).reshape(len(a), -1), *crossed])
    spread = moments.std(axis=0)
    moments = moments[:, spread > 0] / spread[spread > 0]  # all of them are to have the mean 0

    def dual(point: np.ndarray, ridge: float) -> tuple[float, np.ndarray]:
        logits = moments @ point
        return logsumexp(logits) + ridge / 2 * point @ point, moments.T @ softmax(logits) + ridge * point

    weights, start = np.ones(len(a)), np.zeros(moments.shape[1])
    for ridge in RIDGES:
        solved = minimize(dual, start, args=(ridge,), jac=True, method="L-BFGS-B", options={"maxiter": 2000, "ftol": 0})
        weights = len(a) * softmax(moments @ solved.x)
        if weights.max() <= most:
            break
    return weights


def _crossed(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether there are rows with both attributes, with either one, and with neither."""
    return len({*zip(one.tolist(), other.tolist(), strict=True)}) == 4


def effective(weights: np.ndarray) -> float:
    """Effective number of rows: how many rows of equal weight would be as certain."""
    return float(weights.sum() ** 2 / np.square(weights).sum())


@dataclass(frozen=True, eq=False)
class Attribute:
    """A yes-or-no attribute of rows.

    Attributes:
        kind: Whether it is a measure of the texts, a value of a column, or a single word of the texts.
        name: Name by which `balanced` takes it; the values of a column share one.
        words: The attribute in words.
        has: Truth values (rows,).
    """

    kind: Kind
    name: str
    words: str
    has: np.ndarray

    def named(self, names: Sequence[str]) -> list[str]:
        """Those of the names that mean this attribute."""
        own = {self.name.lower(), "subgroup"} if self.kind == "column" else {self.name.lower()}
        return [name for name in names if name.lower() in own]


def _cut(values: np.ndarray) -> float:
    """The value above which numbers count as large: the median, or the next lower value if most are the largest."""
    middle = float(np.median(values))
    lower = values[values < middle]
    return float(lower.max()) if len(lower) and values.max() <= middle else middle


def _attributes(rows: pd.DataFrame, columns: pd.DataFrame | None) -> Iterator[Attribute]:
    """Every attribute of the rows; words in fewer than LEAST rows are left out."""
    texts = [column for column in ("text", "text_pair") if column in rows]
    said = [[words(text) for text in rows[column]] for column in texts]
    for column, own in zip(texts, said, strict=True):
        which = "" if len(texts) == 1 else f" of {column}"
        lengths = np.array([len(row) for row in own])
        middle = _cut(lengths)
        yield Attribute("measure", "length", f"length{which} above {middle:g} words", lengths > middle)
        denied = rows[column].str.contains(NEGATION, case=False).to_numpy(dtype=bool)
        yield Attribute("measure", "negation", f"negation{which}", denied)
    if len(texts) == 2:
        overlap = np.array([overlap_of(a, b) for a, b in zip(*said, strict=True)])
        middle = _cut(overlap)
        words_of_it = f"overlap of the texts above {middle:.0%} of the second"
        yield Attribute("measure", "overlap", words_of_it, overlap > middle)
    for name, cells in () if columns is None else columns.items():
        values = np.array([label_name(value) for value in cells])
        for value in sorted(set(values.tolist())):
            yield Attribute("column", str(name), f"{name} {value!r}", values == value)
    having: dict[str, list[int]] = {}
    for i, parts in enumerate(zip(*said, strict=True)):
        for word in {word for part in parts for word in part}:
            having.setdefault(word, []).append(i)
    for word, places in having.items():
        if len(places) >= LEAST:
            has = np.zeros(len(rows), dtype=bool)
            has[places] = True
            yield Attribute("word", word, repr(word), has)
