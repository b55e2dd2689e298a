"""Gains of recipes with errors, shrinkage, and verdicts. NumPy and SciPy only.

Every recipe predicts each row once per repeat of a cross-validation, so a score is a mean over repeats r and rows i of
values v[r, i], and a gain is the mean of differences d[r, i] between two recipes. Two things make it uncertain: which
rows are in the table, and the randomness of each training, which all rows of its fold share. Rows of one group, or of
equal text, came into the table together and stay in one fold: they are one unit u of J, and a row without others is a
unit of its own. With e = d - mean, s_ru the sum of e over the rows of a unit, N = R n values, and a block for each of b
trainings, the squared error is that of clusters by units and by blocks:

    V = (J / (J - 1) sum_u (sum_r s_ru)^2 + b / (b - 1) sum_blocks (sum_ri in block e_ri)^2 - sum_ru s_ru^2) / N^2

(Cameron, Gelbach, Miller, Robust Inference with Multiway Clustering, JBES 2011), and at least that of units alone. The
intervals use the t distribution with min(b, J) - 1 degrees of freedom.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Whole = NDArray[np.int64]
Verdict = Literal["shown", "likely", "not shown"]

LEVEL = 0.95  # of intervals
POWER = 0.8  # chance with which the smallest gain is shown
LIKELY = 0.75  # probability of a positive gain from which it is called likely


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error.

    Attributes:
        value: Mean.
        error: Standard error of the mean.
        blocks: Number of trainings behind it, or of units of rows if those are fewer; 0 for a value that is known.
    """

    value: float
    error: float
    blocks: int

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval."""
        half = self._quantile(0.5 + LEVEL / 2) * self.error
        return self.value - half, self.value + half

    @property
    def positive(self) -> float:
        """Probability of a true value above 0, for a flat prior."""
        if not self.error:
            return float(np.heaviside(self.value, 0.0))
        return float(stats.t.cdf(self.value / self.error, max(1, self.blocks - 1)))

    @property
    def detectable(self) -> float:
        """Smallest true value whose interval lies above 0 in 80 of 100 tables."""
        return (self._quantile(0.5 + LEVEL / 2) + float(stats.norm.ppf(POWER))) * self.error

    def _quantile(self, share: float) -> float:
        return float(stats.t.ppf(share, max(1, self.blocks - 1)))


def two_way(values: Array, blocks: Whole, units: Whole) -> Estimate:
    """Mean of values with an error that counts units of rows and trainings.

    Args:
        values: Shape (repeats, rows).
        blocks: Number of the training that each value comes from, shape (repeats, rows).
        units: Number of the unit of each row, shape (rows,).
    """
    return _clustered(values.mean(), values - values.mean(), blocks, units, [np.ones(values.shape[1], dtype=bool)])


def halved(values: Array, blocks: Whole, units: Whole, half: NDArray[np.bool_]) -> Estimate:
    """Mean of the means of two halves of the rows, with an error that counts units of rows and trainings.

    Args:
        values: Shape (repeats, rows).
        blocks: As in `two_way`.
        units: As in `two_way`.
        half: Which rows are in the first half, shape (rows,).
    """
    sides = (half, ~half)
    means = [values[:, side].mean() for side in sides]
    centred = np.empty_like(values)
    for side, mean in zip(sides, means, strict=True):
        centred[:, side] = (values[:, side] - mean) * len(half) / (2 * side.sum())
    return _clustered(float(np.mean(means)), centred, blocks, units, sides)


def _clustered(
    mean: float, centred: Array, blocks: Whole, units: Whole, sides: Sequence[NDArray[np.bool_]]
) -> Estimate:
    """An estimate from values of which the mean of each side of the rows was taken off; a unit is on one side."""
    of_blocks = _sums(centred.ravel(), blocks.ravel())
    by_blocks, by_units, both, count = _of_clusters(of_blocks), 0.0, 0.0, 0
    for side in sides:
        of_units = np.stack([_sums(repeat, units[side]) for repeat in centred[:, side]])
        by_units += _of_clusters(of_units.sum(axis=0))
        both += float((of_units**2).sum())
        count += of_units.shape[1]
    squared = max(by_units, by_units + by_blocks - both)
    return Estimate(float(mean), math.sqrt(squared) / centred.size, min(len(of_blocks), count - len(sides) + 1))


def _sums(values: Array, numbers: Whole) -> Array:
    """Sum of the values of each number."""
    return np.bincount(np.unique(numbers, return_inverse=True)[1], weights=values).astype(float)


def _of_clusters(sums: Array) -> float:
    """Sum of squares of the sums of independent clusters, as if their true mean were known."""
    return float((sums**2).sum()) * len(sums) / max(1, len(sums) - 1)


@dataclass(frozen=True)
class Posterior:
    """Normal belief about the true gain of an arm."""

    mean: float
    sd: float

    @property
    def positive(self) -> float:
        """Probability of a true gain above 0."""
        return float(stats.norm.cdf(self.mean / self.sd))

    def above(self, other: Posterior) -> float:
        """Probability that this gain is larger than another, if the two beliefs are independent."""
        return float(stats.norm.cdf((self.mean - other.mean) / math.hypot(self.sd, other.sd)))


def shrunk(gains: list[Estimate], least: float, prior: float = 0.0) -> list[Posterior]:
    """Beliefs about true gains, for true gains that are normally distributed over arms around `prior`.

    The variance of true gains is what the estimates spread around `prior` beyond their errors.

    Args:
        gains: Estimated gains of the arms of one stage.
        least: Smallest standard deviation of true gains. It keeps a few arms that agree by chance from being taken as
            exactly equal.
        prior: Mean of true gains; 0 as long as nothing is known about the arms.
    """
    spread = np.mean([(gain.value - prior) ** 2 - gain.error**2 for gain in gains]) if gains else 0.0
    variance = max(least**2, float(spread))
    beliefs = []
    for gain in gains:
        weight = variance / (variance + gain.error**2)
        beliefs.append(Posterior(prior + weight * (gain.value - prior), math.sqrt(weight) * gain.error or 1e-12))
    return beliefs


def verdict(gain: Estimate, fresh: bool) -> Verdict:
    """What may be said about a gain.

    Args:
        gain: Gain on rows that did not choose.
        fresh: Whether the trainings behind it did not choose either. Without fresh trainings nothing is called shown:
            the luck of a training is the same on all rows.
    """
    if fresh and gain.interval[0] > 0:
        return "shown"
    return "likely" if gain.positive >= LIKELY else "not shown"
