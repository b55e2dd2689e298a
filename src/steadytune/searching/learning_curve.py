"""What more labels would bring: scores by number of training rows, and a curve through them.

Plain fine-tuning and the frozen probe are cross-validated on a quarter and a half of the rows, and on what a fold
leaves. The same folds score all sizes, so every size is judged on the same rows. Through the scores goes the power law

    score(n) = a - b n^(-c),  c in [0.3, 1]

(Hestness et al., Deep Learning Scaling is Predictable, Empirically, arXiv 1712.00409). Its interval comes from a
bootstrap of units, which are groups of rows or single rows, and of trainings (Owen and Eckles, Bootstrapping Data
Arrays of Arbitrary Order, Annals of Applied Statistics 2012, arXiv 1106.2125). NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from .estimates import Array, Whole

EXPONENTS = np.linspace(0.3, 1.0, 15)
DRAWS = 1000  # of the bootstrap
LEVEL = 0.95


@dataclass(frozen=True)
class More:
    """Gain of more rows.

    Attributes:
        rows: Number of rows that would be added.
        gain: Expected gain of the score.
        interval: 95 % interval of the gain.
    """

    rows: int
    gain: float
    interval: tuple[float, float]

    @property
    def known(self) -> bool:
        """Whether the interval lies above 0; otherwise these rows do not tell what more of them would bring."""
        return self.interval[0] > 0


def power_law(sizes: Array, scores: Array) -> tuple[Array, Array, Array]:
    """Least squares of a - b n^(-c).

    Args:
        sizes: Numbers of rows, shape (sizes,).
        scores: Larger is better, shape (..., sizes).

    Returns:
        a, b and c, each of shape (...).
    """
    fits = []
    for c in EXPONENTS:
        x = np.asarray(sizes, float) ** -c
        slope = ((x - x.mean()) * (scores - scores.mean(-1, keepdims=True))).sum(-1) / ((x - x.mean()) ** 2).sum()
        a = scores.mean(-1) - slope * x.mean()
        fits.append((a, -slope, ((scores - a[..., None] - slope[..., None] * x) ** 2).sum(-1)))
    a, b, error = (np.stack(part) for part in zip(*fits, strict=True))
    best = error.argmin(axis=0)[None]
    return np.take_along_axis(a, best, 0)[0], np.take_along_axis(b, best, 0)[0], EXPONENTS[best[0]]


def more_rows(
    values: Mapping[int, Array],
    blocks: Whole,
    units: Whole,
    now: int,
    more: int,
    seed: int = 0,
    perfect: float = math.inf,
) -> More:
    """What more rows would bring.

    Args:
        values: Share of each row in the score, (repeats, rows), by number of training rows; larger is better.
        blocks: Number of the training of each value, (repeats, rows), the same for all sizes.
        units: Number of the unit of each row, (rows,): rows of one group came into the table together.
        now: Number of rows that there are.
        more: Number of rows that would be added.
        seed: Seed of the bootstrap.
        perfect: Best possible score; the curve ends there.
    """
    sizes = np.array(sorted(values), float)
    stacked = np.stack([values[int(size)] for size in sizes])

    def gain(scores: Array) -> Array:
        a, b, c = power_law(sizes, scores)
        before, after = (np.minimum(a - b * float(rows) ** -c, perfect) for rows in (now, now + more))
        return after - before

    rng = np.random.default_rng(seed)
    unit = np.unique(units, return_inverse=True)[1]
    n, numbers = unit.max() + 1, blocks.max() + 1
    drawn = []
    for _ in range(DRAWS):
        rows = np.bincount(rng.integers(0, n, n), minlength=n)[unit]
        trainings = np.bincount(rng.integers(0, numbers, numbers), minlength=numbers)[blocks]
        weights = rows * trainings
        drawn.append((stacked * weights).sum((1, 2)) / max(1, weights.sum()))
    low, high = np.quantile(gain(np.array(drawn)), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return More(more, float(gain(stacked.mean((1, 2)))), (float(low), float(high)))
