"""Metrics: what each is called, how it is computed, and which direction is better. No torch here.

The scores are scikit-learn's and SciPy's where they are defined; where they are not (one side constant, one row) a
metric is None rather than a warning and a made-up number. F1 of sets is our own few lines: scikit-learn would need
indicator matrices, which labels written as tuples are not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Score = Callable[[np.ndarray, np.ndarray, Sequence[str]], float | None]


@dataclass(frozen=True, eq=False)
class Metric:
    """A score of predictions against gold labels.

    Attributes:
        name: Name in options, records and tables.
        compute: Function of gold labels (rows,), predictions (rows,) and class names; None where it is undefined.
        larger_is_better: Whether a larger value is better.
        two_classes: Whether it is defined for two classes only.
        needs_probabilities: Whether the predictions are probabilities (rows, classes) instead of labels.
        limits: Smallest and largest value; None for no limit.
    """

    name: str
    compute: Score
    larger_is_better: bool = True
    two_classes: bool = False
    needs_probabilities: bool = False
    limits: tuple[float | None, float | None] = (0.0, 1.0)

    @property
    def worst(self) -> float:
        """A value that no model is below, for a model whose score is undefined."""
        return -1.0 if self.larger_is_better else 1e9

    def goodness(self, value: float | None) -> float:
        """The value, turned so that larger is better; minus infinity where it is undefined."""
        if value is None:
            return -np.inf
        return value if self.larger_is_better else -value


def smaller_is_better(name: str) -> bool:
    """Whether a metric of this name is an error; for records, which hold names only."""
    return name in {metric.name for metrics in METRICS.values() for metric in metrics if not metric.larger_is_better}


def accuracy(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """Share of rows that are right."""
    return float(np.mean(gold == predicted))


def f1(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """F1 of the second class; only for two classes."""
    from sklearn.metrics import f1_score

    return float(f1_score(gold, predicted, labels=[names[1]], average="macro", zero_division=0.0))


def f1_macro(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """Mean F1 of the classes; a class that nobody has and nobody predicts counts 0."""
    from sklearn.metrics import f1_score

    return float(f1_score(gold, predicted, labels=list(names), average="macro", zero_division=0.0))


def matthews(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """Matthews' correlation; 0 where one side is constant."""
    from sklearn.metrics import matthews_corrcoef

    if len({*gold, *predicted}) < 2:  # defined as 0; scikit-learn also warns
        return 0.0
    return float(matthews_corrcoef(gold, predicted))


def pearson(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float | None:
    """Pearson's correlation; None for fewer than two rows, or one side constant."""
    from scipy.stats import pearsonr

    return _correlation(gold, predicted, pearsonr)


def spearman(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float | None:
    """Spearman's rank correlation; None for fewer than two rows, or one side constant."""
    from scipy.stats import spearmanr

    return _correlation(gold, predicted, spearmanr)


def _correlation(gold: np.ndarray, predicted: np.ndarray, statistic: Callable) -> float | None:
    if len(gold) < 2 or np.ptp(gold) == 0 or np.ptp(predicted) == 0:
        return None
    return float(statistic(gold, predicted).statistic)


def rmse(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """Root of the mean squared error."""
    return float(np.sqrt(np.mean((gold - predicted) ** 2)))


def f1_sets_micro(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """F1 of multi-label rows over all decisions."""
    return _f1_sets(gold, predicted, names, micro=True)


def f1_sets_macro(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """F1 of multi-label rows, the mean over classes; a class nobody has counts 0."""
    return _f1_sets(gold, predicted, names, micro=False)


def accuracy_sets(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """Share of multi-label rows all of whose labels are right."""
    return float(np.mean((members(gold, names) == members(predicted, names)).all(axis=1)))


def _f1_sets(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str], micro: bool) -> float:
    has, said = members(gold, names), members(predicted, names)
    counts = np.stack([(has & said).sum(axis=0), has.sum(axis=0) + said.sum(axis=0)])
    hits, total = counts.sum(axis=1, keepdims=True) if micro else counts
    return float(np.mean(2 * hits / np.maximum(total, 1)))


def members(rows: Sequence[Sequence[str]] | np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Truth values (rows, classes): which classes each row has."""
    return np.array([[name in row for name in names] for row in rows], dtype=bool).reshape(len(rows), len(names))


# The first metric of each kind of problem is the one to look at, unless the user asks for another.
METRICS: dict[str, tuple[Metric, ...]] = {
    "classification": (
        Metric("accuracy", accuracy),
        Metric("f1", f1, two_classes=True),
        Metric("f1_macro", f1_macro),
        Metric("matthews", matthews, limits=(-1.0, 1.0)),
    ),
    "multilabel": (
        Metric("f1_micro", f1_sets_micro),
        Metric("f1_macro", f1_sets_macro),
        Metric("accuracy", accuracy_sets),
    ),
    "regression": (
        Metric("pearson", pearson, limits=(-1.0, 1.0)),
        Metric("spearman", spearman, limits=(-1.0, 1.0)),
        Metric("rmse", rmse, larger_is_better=False, limits=(0.0, None)),
    ),
}
