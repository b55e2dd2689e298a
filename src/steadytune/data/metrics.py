"""Metrics with their names, functions, intervals and directions. No torch here.

Scores are computed by scikit-learn and SciPy. Where a score is undefined (one side constant, one row, no row of a
class), the metric is None, without a warning. Three computations are our own: F1 of sets, because labels are tuples and
not indicator matrices; log-loss and Brier score, because their intervals need the loss of each row; and the calibration
error. Tests compare them with scikit-learn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import intervals
from .intervals import Interval

Score = Callable[[np.ndarray, np.ndarray, Sequence[str]], float | None]
Bounds = Callable[[np.ndarray, np.ndarray, Sequence[str]], Interval]

BINS = 10  # number of equally wide bins of the calibration error
TINY = np.finfo(float).eps  # probabilities are clipped at it in the log-loss, as scikit-learn does


@dataclass(frozen=True, eq=False)
class Metric:
    """A score of predictions against gold labels.

    Attributes:
        name: Name in options, records and tables.
        compute: Function of gold labels (rows,), predictions (rows,) and class names; None where it is undefined.
        interval: Function of the same that gives the 95 % interval, None where there is none.
        larger_is_better: Whether a larger value is better.
        two_classes: Whether it is defined for two classes only.
        needs_probabilities: Whether the predictions are probabilities (rows, classes) instead of labels.
        limits: Smallest and largest value; None for no limit.
    """

    name: str
    compute: Score
    interval: Bounds = lambda gold, predicted, names: None
    larger_is_better: bool = True
    two_classes: bool = False
    needs_probabilities: bool = False
    limits: tuple[float | None, float | None] = (0.0, 1.0)

    @property
    def perfect(self) -> float:
        """The value of a model that makes no mistake."""
        best = self.limits[1] if self.larger_is_better else self.limits[0]
        return 0.0 if best is None else best

    @property
    def worst(self) -> float:
        """A value worse than any, used for a model whose score is undefined."""
        return -1.0 if self.larger_is_better else 1e9

    def bounds(
        self, gold: np.ndarray, predicted: np.ndarray, names: Sequence[str], groups: np.ndarray | None = None
    ) -> Interval:
        """The 95 % interval, wider where rows of one group (rows,) are alike."""
        found = self.interval(gold, predicted, names)
        if found is None or groups is None:
            return found
        return intervals.of_groups(
            lambda kept: self.compute(gold[kept], predicted[kept], names), found, groups, self.limits
        )

    def goodness(self, value: float | None) -> float:
        """The value with the sign with which larger is better; minus infinity if it is undefined."""
        if value is None:
            return -np.inf
        return value if self.larger_is_better else -value


def smaller_is_better(name: str) -> bool:
    """Whether a metric of this name is an error; for records, which have only names."""
    return name in {metric.name for metrics in METRICS.values() for metric in metrics if not metric.larger_is_better}


def members(rows: Sequence[Sequence[str]] | np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Truth values (rows, classes): which classes each row has."""
    return np.array([[name in row for name in names] for row in rows], dtype=bool).reshape(len(rows), len(names))


def _one_hot(labels: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Truth values (rows, classes) of one class name a row."""
    return np.asarray(labels, dtype=object)[:, None] == np.asarray(names, dtype=object)


# ---- one class a row --------------------------------------------------------------------------------------------


def accuracy(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """Share of correct rows."""
    return float(np.mean(gold == predicted))


def _accuracy_interval(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Interval:
    return intervals.wilson(accuracy(gold, predicted, names), len(gold))


def f1(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """F1 of the second class; only for two classes."""
    from sklearn.metrics import f1_score

    return float(f1_score(gold, predicted, labels=[names[1]], average="macro", zero_division=0.0))


def _f1_interval(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Interval:
    """F1 = 2 J / (1 + J) rises with J, the share of hits among the rows that have the class or were given it."""
    has, said = gold == names[1], predicted == names[1]
    either = int(np.sum(has | said))
    bounds = intervals.wilson(np.sum(has & said) / max(either, 1), either)
    return None if bounds is None else (2 * bounds[0] / (1 + bounds[0]), 2 * bounds[1] / (1 + bounds[1]))


def f1_macro(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """Mean F1 of the classes; a class without rows and predictions counts as 0."""
    from sklearn.metrics import f1_score

    return float(f1_score(gold, predicted, labels=list(names), average="macro", zero_division=0.0))


def _f1_macro_interval(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Interval:
    return _f1_bounds(f1_macro(gold, predicted, names), _one_hot(gold, names), _one_hot(predicted, names))


def _f1_bounds(value: float, has: np.ndarray, said: np.ndarray) -> Interval:
    influence = intervals.ratio_influence(2.0 * (has & said), 1.0 * has + said)
    return intervals.bounded(value, influence, intervals.harmonic(has.sum(axis=0)))


def matthews(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """Matthews' correlation; 0 where one side is constant."""
    from sklearn.metrics import matthews_corrcoef

    if len({*gold, *predicted}) < 2:  # defined as 0; scikit-learn also warns
        return 0.0
    return float(matthews_corrcoef(gold, predicted))


def _matthews_interval(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Interval:
    has, said = _one_hot(gold, names), _one_hot(predicted, names)
    influence = intervals.correlation_influence(1.0 * has, 1.0 * said)
    value, most = matthews(gold, predicted, names), intervals.harmonic(has.sum(axis=0))
    guessing = -1 / (len(names) - 1)  # value if all rows are wrong, for equal class sizes; then share = accuracy
    return intervals.bounded(value, influence, most, (guessing if value >= guessing else -1.0, 1.0))


def balanced_accuracy(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """Mean recall of the classes that occur."""
    from sklearn.metrics import recall_score

    present = [name for name in names if (gold == name).any()]
    return float(recall_score(gold, predicted, labels=present, average="macro", zero_division=0.0))


def _balanced_interval(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Interval:
    has, said = _one_hot(gold, names), _one_hot(predicted, names)
    present = has.any(axis=0)
    influence = intervals.ratio_influence(1.0 * (has & said)[:, present], 1.0 * has[:, present])
    return intervals.bounded(balanced_accuracy(gold, predicted, names), influence, intervals.harmonic(has.sum(axis=0)))


# ---- several classes a row --------------------------------------------------------------------------------------


def f1_sets_micro(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """F1 of multi-label rows over all decisions."""
    return _f1_sets(members(gold, names), members(predicted, names), micro=True)


def f1_sets_macro(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """Mean F1 over classes of multi-label rows; a class without rows and predictions counts as 0."""
    return _f1_sets(members(gold, names), members(predicted, names), micro=False)


def _f1_sets(has: np.ndarray, said: np.ndarray, micro: bool) -> float:
    counts = np.stack([(has & said).sum(axis=0), has.sum(axis=0) + said.sum(axis=0)])
    hits, total = counts.sum(axis=1, keepdims=True) if micro else counts
    return float(np.mean(2 * hits / np.maximum(total, 1)))


def _f1_micro_interval(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Interval:
    has, said = members(gold, names), members(predicted, names)
    hits, total = (has & said).sum(axis=1, keepdims=True), (1 * has + said).sum(axis=1, keepdims=True)
    influence = intervals.ratio_influence(2.0 * hits, 1.0 * total)
    return intervals.bounded(_f1_sets(has, said, micro=True), influence, int((has | said).sum()))


def _f1_macro_sets_interval(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Interval:
    has, said = members(gold, names), members(predicted, names)
    return _f1_bounds(_f1_sets(has, said, micro=False), has, said)


def accuracy_sets(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """Subset accuracy: share of multi-label rows with all labels correct."""
    return float(np.mean((members(gold, names) == members(predicted, names)).all(axis=1)))


def _accuracy_sets_interval(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Interval:
    return intervals.wilson(accuracy_sets(gold, predicted, names), len(gold))


# ---- of probabilities, one class a row or several ---------------------------------------------------------------


def _decisions(gold: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Truth values and probabilities (rows, decisions): one decision for two exclusive classes, else one per class."""
    several = len(gold) > 0 and isinstance(gold[0], tuple)
    has = members(gold, names) if several else _one_hot(gold, names)
    one = len(names) == 2 and not several
    return (has[:, 1:], scores[:, 1:]) if one else (has, scores)


def _decided(gold: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """As `_decisions`, without decisions that are the same for all rows."""
    has, scores = _decisions(gold, scores, names)
    both = has.any(axis=0) & ~has.all(axis=0)
    return has[:, both], scores[:, both]


def roc_auc(gold: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> float | None:
    """Area under the ROC curve: of the second of two classes, else the mean over classes, each against the rest."""
    from sklearn.metrics import roc_auc_score

    has, scores = _decided(gold, scores, names)
    return float(roc_auc_score(has, scores, average="macro")) if has.shape[1] else None


def _roc_auc_interval(gold: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> Interval:
    (every, _), (has, chances) = _decisions(gold, scores, names), _decided(gold, scores, names)
    if has.shape[1] < every.shape[1]:
        return None
    influence = [intervals.auc_influence(side, column) for side, column in zip(has.T, chances.T, strict=True)]
    counts = np.concatenate([has.sum(axis=0), (~has).sum(axis=0)]) if has.shape[1] == 1 else has.sum(axis=0)
    return intervals.bounded(roc_auc(gold, scores, names), np.mean(influence, axis=0), intervals.harmonic(counts))


def average_precision(gold: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> float | None:
    """Average precision: of the second of two classes, else the mean over classes, each against the rest."""
    from sklearn.metrics import average_precision_score

    has, scores = _decided(gold, scores, names)
    return float(average_precision_score(has, scores, average="macro")) if has.shape[1] else None


def _average_precision_interval(gold: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> Interval:
    """A share of the positive rows (Boyd, Eng and Page, ECML PKDD 2013, who compare it with bootstraps)."""
    value = average_precision(gold, scores, names)
    has, _ = _decisions(gold, scores, names)
    return None if value is None else intervals.wilson(value, intervals.harmonic(has.sum(axis=0)))


def log_loss(gold: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> float:
    """Mean negative logarithm of the probability of the correct answer; for several labels, the mean over classes."""
    return float(np.mean(_log_losses(gold, scores, names)))


def _log_losses(gold: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> np.ndarray:
    if len(gold) and isinstance(gold[0], tuple):
        return -np.log(np.clip(np.where(members(gold, names), scores, 1 - scores), TINY, 1)).mean(axis=1)
    return -np.log(np.clip(scores[_one_hot(gold, names)], TINY, 1))


def brier(gold: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> float:
    """Mean squared distance of the probabilities from 0 and 1: summed over more than two exclusive classes.

    Of two classes the second counts, so that the score lies in [0, 1] (Brier, 1950, counts both); of several labels it
    is the mean over them.
    """
    return float(np.mean(_brier_losses(gold, scores, names)))


def _brier_losses(gold: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> np.ndarray:
    has, scores = _decisions(gold, scores, names)
    squares = np.square(scores - has)
    return squares.mean(axis=1) if len(gold) and isinstance(gold[0], tuple) else squares.sum(axis=1)


def _brier_interval(gold: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> Interval:
    bounds = intervals.positive_mean(_brier_losses(gold, scores, names))
    exclusive = len(names) > 2 and not (len(gold) and isinstance(gold[0], tuple))
    return None if bounds is None else (bounds[0], min(bounds[1], 2.0 if exclusive else 1.0))


def _interval_of_mean(losses: Callable[[np.ndarray, np.ndarray, Sequence[str]], np.ndarray]) -> Bounds:
    """Make the interval function of a mean loss."""
    return lambda gold, predicted, names: intervals.positive_mean(losses(gold, predicted, names))


def calibration_error(gold: np.ndarray, scores: np.ndarray, names: Sequence[str]) -> float:
    """Expected calibration error (Guo et al., ICML 2017, arXiv 1706.04599): |share right - probability|, over ten bins.

    Of the class that is most probable; of several labels, of every decision. It has no interval: noise alone makes it
    positive, by more than its own spread on small sets, so that an interval around it would not hold the true value.
    """
    if len(gold) and isinstance(gold[0], tuple):
        right, chance = members(gold, names).ravel(), scores.ravel()
    else:
        best = scores.argmax(axis=1)
        right, chance = gold == np.asarray(names, dtype=object)[best], scores.max(axis=1)
    bins = np.minimum((chance * BINS).astype(int), BINS - 1)
    gaps = np.bincount(bins, weights=np.asarray(right, dtype=float) - chance, minlength=BINS)
    return float(np.abs(gaps).sum() / len(chance))


# ---- numbers ----------------------------------------------------------------------------------------------------


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


def _pearson_interval(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Interval:
    value = pearson(gold, predicted, names)
    return None if value is None else intervals.fisher(value, intervals.z_variance(gold, predicted), len(gold))


def _spearman_interval(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Interval:
    value = spearman(gold, predicted, names)
    return None if value is None else intervals.fisher(value, 1 + value**2 / 2, len(gold))


def rmse(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """Root of the mean squared error."""
    return float(np.sqrt(np.mean((gold - predicted) ** 2)))


def _rmse_interval(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Interval:
    bounds = intervals.positive_mean(np.square(gold - predicted))
    return None if bounds is None else (float(np.sqrt(bounds[0])), float(np.sqrt(bounds[1])))


def mae(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """Mean absolute error."""
    return float(np.mean(np.abs(gold - predicted)))


def r2(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float | None:
    """Share of the variance that the predictions explain, which may be negative; None where there is no variance."""
    from sklearn.metrics import r2_score

    return None if len(gold) < 2 or np.ptp(gold) == 0 else float(r2_score(gold, predicted))


def _r2_interval(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> Interval:
    bounds = intervals.unexplained(gold - predicted, gold)
    return None if bounds is None else (1 - bounds[1], 1 - bounds[0])


# ---- by kind ----------------------------------------------------------------------------------------------------

_OF_PROBABILITIES = (
    Metric("roc_auc", roc_auc, _roc_auc_interval, needs_probabilities=True),
    Metric("average_precision", average_precision, _average_precision_interval, needs_probabilities=True),
    Metric("log_loss", log_loss, _interval_of_mean(_log_losses), larger_is_better=False, needs_probabilities=True,
           limits=(0.0, None)),
    Metric("brier", brier, _brier_interval, larger_is_better=False,
           needs_probabilities=True, limits=(0.0, 2.0)),
    Metric("calibration_error", calibration_error, larger_is_better=False, needs_probabilities=True),
)  # fmt: skip

# The first metric of each kind of problem is the default.
METRICS: dict[str, tuple[Metric, ...]] = {
    "classification": (
        Metric("accuracy", accuracy, _accuracy_interval),
        Metric("f1", f1, _f1_interval, two_classes=True),
        Metric("f1_macro", f1_macro, _f1_macro_interval),
        Metric("matthews", matthews, _matthews_interval, limits=(-1.0, 1.0)),
        Metric("balanced_accuracy", balanced_accuracy, _balanced_interval),
        *_OF_PROBABILITIES,
    ),
    "multilabel": (
        Metric("f1_micro", f1_sets_micro, _f1_micro_interval),
        Metric("f1_macro", f1_sets_macro, _f1_macro_sets_interval),
        Metric("accuracy", accuracy_sets, _accuracy_sets_interval),
        *_OF_PROBABILITIES,
    ),
    "regression": (
        Metric("pearson", pearson, _pearson_interval, limits=(-1.0, 1.0)),
        Metric("spearman", spearman, _spearman_interval, limits=(-1.0, 1.0)),
        Metric("rmse", rmse, _rmse_interval, larger_is_better=False, limits=(0.0, None)),
        Metric("mae", mae, _interval_of_mean(lambda gold, predicted, names: np.abs(gold - predicted)),
               larger_is_better=False, limits=(0.0, None)),
        Metric("r2", r2, _r2_interval, limits=(None, 1.0)),
    ),
}  # fmt: skip
