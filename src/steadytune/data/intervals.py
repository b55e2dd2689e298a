"""95 % intervals of scores over rows from the same distribution. No torch here.

A score in [0, 1] (or mapped to it) is treated as a share of an effective number of rows, and gets Wilson's interval:

    n* = min(v (1 - v) / variance, most)          interval = wilson(v, n*)

The variance is the mean square of the score's influence values over rows, divided by their number (the infinitesimal
jackknife; for ROC AUC it is DeLong's variance, Biometrics 1988). ``most`` is the effective number of rows of a mean
over classes, see `harmonic`. Without it a perfect score on two positive rows would have variance 0 and an interval of
width 0, as with any bootstrap; with it, the score is as uncertain as two rows are. If each row has many decisions (ROC
AUC of many classes), the interval is wider than necessary.

Means of losses are positive and skewed: their interval is Student's t on the log scale.

Rows of one group, such as the texts of one author, tell less than as many rows that have nothing in common. Where
groups are known, `of_groups` widens an interval by the jackknife that leaves out whole groups.

Nothing is random, and the cost is linear in rows times classes (rows log rows for ROC AUC). ``benchmarks/intervals.py``
measures the coverage of these intervals and of SciPy's bootstrap.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.stats import norm, rankdata, t

LEVEL = 0.95
MOST = 100  # number of sets of groups that are left out in turn
Z = float(norm.isf((1 - LEVEL) / 2))
Interval = tuple[float, float] | None


def wilson(share: float, rows: float) -> Interval:
    """Wilson's score interval (JASA 1927) of a share of ``rows``, which need not be a whole number; None for no rows.

    SciPy's, ``binomtest(k, n).proportion_ci(method="wilson")``, takes whole numbers only and agrees where both apply.
    """
    if rows <= 0:
        return None
    centre = (share + Z**2 / (2 * rows)) / (1 + Z**2 / rows)
    half = Z / (1 + Z**2 / rows) * np.sqrt(share * (1 - share) / rows + Z**2 / (4 * rows**2))
    return max(float(centre - half), 0.0), min(float(centre + half), 1.0)


def bounded(
    value: float | None, influence: np.ndarray, most: float, limits: tuple[float, float] = (0.0, 1.0)
) -> Interval:
    """Interval of a score that lies between two limits.

    Args:
        value: The score; an undefined score (None) has no interval.
        influence: Influence of each row on the score, times the number of rows; shape (rows,), mean 0.
        most: Largest effective number of rows.
        limits: Smallest and largest possible score.
    """
    if value is None:
        return None
    low, width = limits[0], limits[1] - limits[0]
    share = min(max((value - low) / width, 0.0), 1.0)
    variance = float(np.mean(np.square(influence / width))) / max(len(influence) - 1, 1)
    rows = min(share * (1 - share) / variance, most) if variance > 0 else most
    bounds = wilson(share, rows)
    return None if bounds is None else (low + width * bounds[0], low + width * bounds[1])


def of_groups(
    score: Callable[[np.ndarray], float | None],
    bounds: tuple[float, float],
    groups: np.ndarray,
    limits: tuple[float | None, float | None],
) -> Interval:
    """The interval of rows that came in groups; never narrower than that of single rows.

    The distances between the score and its bounds grow by the half-width of a t interval over the one given. Its
    variance is the jackknife's, (J - 1) / J sum_j (S_j - mean)^2 with S_j the score without group j of J (Efron and
    Stein, Annals of Statistics 1981). A score of which no group's absence changes anything is taken to have as little
    evidence as J rows: at a limit, such as a perfect one, the distances grow by rows / J, elsewhere by its root. Scores
    with one limit are widened on the log scale. Above 100 groups, sets of them are left out.

    Args:
        score: Function of truth values (rows,) that gives the score of the rows that are kept, None if undefined.
        bounds: Interval for rows that have nothing in common.
        groups: Group of each row, shape (rows,).
        limits: Smallest and largest possible score; None for no limit.
    """
    names, numbers = np.unique(groups, return_inverse=True)
    if len(names) == len(groups):
        return bounds
    parts = min(len(names), MOST)
    without = [score(numbers % parts != part) for part in range(parts)] if parts > 1 else []
    known = [value for value in without if value is not None]
    whole = score(np.ones(len(groups), dtype=bool))
    if whole is None or len(known) < 2:
        return None
    places = np.array([_place(value, limits) for value in (whole, *bounds)])
    apart = np.array([_place(value, limits) for value in known])
    half = t.isf((1 - LEVEL) / 2, len(known) - 1) * np.sqrt((len(known) - 1) * np.var(apart))
    given = abs(places[2] - places[1]) / 2
    share = len(groups) / len(names)  # rows of a group
    unchanged = share if whole in limits else np.sqrt(share)
    wider = max(1.0, half / given) if half and given else unchanged
    low, high = (_value(place, limits) for place in places[0] + wider * (places[1:] - places[0]))
    return low, high


def _place(value: float, limits: tuple[float | None, float | None]) -> float:
    """A score on the scale on which its interval is widened."""
    low, high = limits
    if low is not None and high is None:
        return float(np.log(max(value - low, 1e-300)))
    return -float(np.log(max(high - value, 1e-300))) if low is None and high is not None else value


def _value(place: float, limits: tuple[float | None, float | None]) -> float:
    """The score at a place of that scale, within its limits."""
    low, high = limits
    if low is not None and high is None:
        return float(low + np.exp(place))
    if low is None and high is not None:
        return float(high - np.exp(-place))
    return float(np.clip(place, low, high))


def harmonic(counts: np.ndarray) -> float:
    """Effective number of rows of a mean over classes: classes^2 / sum(1 / rows of the class); 0 if a class has none.

    A score without rows of a class has no interval, because its value on that class is unknown.
    """
    return float(len(counts) ** 2 / np.sum(1 / counts)) if counts.all() else 0.0


def ratio_influence(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Influence values (rows,) of the mean over classes of ``sum(numerator) / sum(denominator)``, both (rows, classes).

    A class whose denominator is 0 contributes no influence.
    """
    total = denominator.mean(axis=0)
    ratio = np.divide(numerator.mean(axis=0), total, out=np.zeros(len(total)), where=total > 0)
    return ((numerator - ratio * denominator) / np.where(total > 0, total, np.inf)).mean(axis=1)


def correlation_influence(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Influence values (rows,) of the correlation of vectors (rows, entries); of Matthews' for indicators."""
    a, b = first - first.mean(axis=0), second - second.mean(axis=0)
    ab, aa, bb = ((x * y).sum(axis=1) for x, y in ((a, b), (a, a), (b, b)))
    if aa.mean() == 0 or bb.mean() == 0:
        return np.zeros(len(a))
    scale = np.sqrt(aa.mean() * bb.mean())
    return ab / scale - ab.mean() / scale * (aa / aa.mean() + bb / bb.mean()) / 2


def auc_influence(positive: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Influence values (rows,) of ROC AUC, from truth values and scores (rows,): DeLong's placements."""
    ranks, among = rankdata(scores), np.empty(len(scores))
    for side in (positive, ~positive):
        among[side] = rankdata(scores[side])
    others = np.where(positive, np.sum(~positive), np.sum(positive))
    beaten = (ranks - among) / others
    placement = np.where(positive, beaten, 1 - beaten)
    own = np.where(positive, positive.mean(), 1 - positive.mean())
    return (placement - placement[positive].mean()) / own


def positive_mean(losses: np.ndarray) -> Interval:
    """Interval of the mean of losses (rows,) of 0 or more: t on the log scale; None for a mean of 0 or one row."""
    rows, mean = len(losses), float(np.mean(losses))
    if rows < 2 or mean <= 0:
        return None
    return _log_scale(mean, losses / mean)


def unexplained(errors: np.ndarray, gold: np.ndarray) -> Interval:
    """Interval of the mean squared error (rows,) in units of the variance of the numbers, the 1 - R2 of a model."""
    squares, spread = np.square(errors), np.square(gold - np.mean(gold))
    if len(gold) < 3 or squares.mean() == 0 or spread.mean() == 0:
        return None
    return _log_scale(squares.mean() / spread.mean(), squares / squares.mean() - spread / spread.mean())


def _log_scale(value: float, influence: np.ndarray) -> Interval:
    """Interval of t standard errors on the log scale."""
    rows = len(influence)
    factor = np.exp(t.isf((1 - LEVEL) / 2, rows - 1) * np.std(influence, ddof=1) / np.sqrt(rows))
    return float(value / factor), float(value * factor)


def fisher(correlation: float | None, variance: float, rows: int) -> Interval:
    """Interval of a correlation by Fisher's z, whose variance is ``variance / (rows - 3)``; t with rows - 2 degrees.

    For normal numbers the variance is 1 for Pearson's correlation and 1 + half the squared correlation for Spearman's
    (Bonett and Wright, Psychometrika 2000); `z_variance` estimates it without that assumption. None for fewer than four
    rows.
    """
    if correlation is None or rows < 4:
        return None
    z = np.arctanh(np.clip(correlation, -1 + 1e-12, 1 - 1e-12))
    half = t.isf((1 - LEVEL) / 2, rows - 2) * np.sqrt(variance / (rows - 3))
    return float(np.tanh(z - half)), float(np.tanh(z + half))


def z_variance(first: np.ndarray, second: np.ndarray) -> float:
    """Variance of Fisher's z of Pearson's correlation of numbers (rows,), times the rows, by its influence values."""
    influence = correlation_influence(first[:, None], second[:, None])
    return float(np.mean(np.square(influence))) / max(1 - np.corrcoef(first, second)[0, 1] ** 2, 1e-12) ** 2
