"""Statistics of scores over seeds: summaries, paired comparisons, tests of steadiness, detectable gains.

The unit is the seed: ``a[i]`` and ``b[i]`` are scores of two recipes with the same seed i, and differ in nothing else.
With d = a - b and e in {-1, 1}^n, the paired test is the sign-flip test

    p = share of e with |sum_i e_i d_i| >= |sum_i d_i|                  (smallest possible: 2^(1 - n))

which is valid for every distribution of the scores if two equally good recipes are exchangeable. The same test of d_i =
|a_i - median a| - |b_i - median b| tests whether one recipe is steadier than the other.

All intervals are at 95 %. An undefined value (the SD of one score, the interval of equal scores) is None, never NaN or
infinite. Everything random takes a ``seed``. ``benchmarks/calibration.py`` measures how often each test errs and each
interval covers, for several distributions and 5 to 50 seeds; ``docs/results/calibration.md`` has the results.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Array = NDArray[np.float64]
Interval = tuple[float, float] | None

LEVEL = 0.95  # of all intervals
EXACT = 16  # up to this many pairs, all sign flips are enumerated
DRAWS = 9999  # random sign flips above that, and bootstrap samples
BOOTSTRAP_FROM = 30  # from this many seeds on, the interval of a mean is a bootstrap interval
BLOCK = 1 << 22  # largest number of values in memory at once


# ---------------------------------------------------------------- one recipe


@dataclass(frozen=True)
class Summary:
    """Scores of one recipe on one task over ``n`` seeds, in the unit of the scores.

    ``sd`` divides by n - 1 and is None for one seed; ``iqm`` is the interquartile mean (25 % trimmed); ``failed`` is
    the share of failed runs, None if failing was not defined; ``interval`` is that of the mean.
    """

    n: int
    mean: float
    sd: float | None
    median: float
    iqm: float
    minimum: float
    maximum: float
    failed: float | None
    interval: Interval


def summary(
    scores: ArrayLike, *, threshold: float | None = None, failed: ArrayLike | None = None, seed: int = 0
) -> Summary:
    """Describe the scores of one recipe, one per seed.

    Args:
        scores: Shape (n,), n >= 1.
        threshold: Runs that score no more than this have failed, for example majority baseline + 0.01.
        failed: One flag per run, instead of a threshold.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: No scores, a score that is not finite, both ``threshold`` and ``failed``, or too few flags.
    """
    x = _scores("scores", scores)
    if threshold is not None and failed is not None:
        raise ValueError("summary takes a threshold or flags of failed runs, got both: leave one out")
    flags = x <= threshold if threshold is not None else None
    if failed is not None:
        flags = np.asarray(failed, bool)
        if flags.shape != x.shape:
            raise ValueError(f"failed must hold one flag per score, got shape {flags.shape} for {x.shape}")
    return Summary(
        n=len(x),
        mean=float(x.mean()),
        sd=float(x.std(ddof=1)) if len(x) > 1 else None,
        median=float(np.median(x)),
        iqm=float(stats.trim_mean(x, 0.25)),
        minimum=float(x.min()),
        maximum=float(x.max()),
        failed=None if flags is None else float(flags.mean()),
        interval=_interval(mean_interval(x, seed=seed)),
    )


def mean_interval(values: ArrayLike, *, seed: int = 0) -> Array:
    """95 % interval of the mean over the last axis: t below 30 values, expanded BCa bootstrap from 30 on.

    BCa corrects for skewness but covers too little in small samples (0.83 for 5 values). There are two causes: the
    bootstrap's variance, which is (n - 1) / n of the sample's, and normal instead of t quantiles. A higher nominal
    level corrects both (Hesterberg, What Teachers Should Know About the Bootstrap, The American Statistician 2015,
    arXiv 1411.5279). If failures are rare, a few seeds may contain none, and the interval is too narrow.

    Args:
        values: Shape (..., n).
        seed: Seed of the bootstrap, which draws the same indices for all leading axes.

    Returns:
        Shape (..., 2), NaN where all values are equal or n is 1.
    """
    x = _finite("values", values)
    n = x.shape[-1]
    if n < BOOTSTRAP_FROM:
        return _t_interval(x)
    bounds = np.full((*x.shape[:-1], 2), np.nan)
    spread = _spreads(x)
    if spread.any():
        wider = stats.t.isf((1 - LEVEL) / 2, n - 1) * math.sqrt(n / (n - 1))
        low, high = stats.bootstrap(
            (x[spread],),
            np.mean,
            n_resamples=DRAWS,
            axis=-1,
            confidence_level=1 - 2 * stats.norm.sf(wider),
            method="BCa",
            random_state=np.random.default_rng(seed),
        ).confidence_interval
        bounds[spread] = np.stack([low, high], -1)
    return bounds


# ---------------------------------------------------------------- two recipes


@dataclass(frozen=True)
class Comparison:
    """Recipe A against recipe B on one task, paired by seed; a gain is positive where A is better.

    ``sd`` is that of the differences, ``better`` is P(A > B) with ties as one half, ``p`` is two-sided, and
    ``detectable`` is the true gain that this many seeds find in 80 % of studies (None if all differences are equal).
    """

    n: int
    difference: float
    sd: float
    interval: Interval
    p: float
    better: float
    better_interval: Interval
    detectable: float | None


def compare(a: ArrayLike, b: ArrayLike, *, seed: int = 0) -> Comparison:
    """Compare two recipes by their scores with the same seeds.

    Args:
        a: Scores of A, shape (n,), n >= 2.
        b: Scores of B, the same seeds in the same order.
        seed: Seed of the bootstrap and of random sign flips.

    Raises:
        ValueError: Unequal lengths, fewer than two seeds, or a score that is not finite.
    """
    a, b = _paired(a, b)
    d = a - b
    n, sd = len(d), float(d.std(ddof=1)) if _spreads(d) else 0.0
    wins = _wins(d)
    return Comparison(
        n=n,
        difference=float(d.mean()),
        sd=sd,
        interval=_interval(mean_interval(d, seed=seed)),
        p=float(sign_flip(d, seed=seed)),
        better=wins,
        better_interval=_interval(proportion_interval(wins, n)),
        detectable=detectable_gain(n, sd) if sd else None,
    )


@dataclass(frozen=True)
class Stratified:
    """Recipe A against recipe B over several tasks of equal weight; fields as in `Comparison`."""

    tasks: dict[str, Comparison]
    difference: float
    interval: Interval
    p: float
    better: float
    better_interval: Interval


def stratified(a: Mapping[str, ArrayLike], b: Mapping[str, ArrayLike], *, seed: int = 0) -> Stratified:
    """Compare two recipes by the mean over tasks of their paired differences, each task weighted equally.

    Each pair of each task is flipped on its own. The interval is a t interval with Satterthwaite's degrees of freedom,
    from the sum of the tasks' variances. Test and interval assume that differences on different tasks are independent.
    If all tasks have the same seeds, a seed that is good for A on one task must tell nothing about the next task. This
    holds for data order and dropout, and less for heads with the same initial values. Without this assumption, give
    `compare` the mean over tasks for each seed; it flips whole seeds.

    Args:
        a: Scores of A by task, shape (n,); n may differ between tasks.
        b: The same tasks, seeds and order.
        seed: Seed of the bootstrap and of random sign flips.

    Raises:
        ValueError: The tasks of ``b`` differ, there is no task, or an error of `compare`.
    """
    if not a or a.keys() != b.keys():
        raise ValueError(f"stratified needs the same tasks, at least one, in both recipes, got {list(a)} and {list(b)}")
    tasks = {name: compare(a[name], b[name], seed=seed) for name in a}
    differences = [np.subtract(a[name], b[name]) for name in a]
    better = float(np.mean([task.better for task in tasks.values()]))
    seeds = len(tasks) ** 2 / sum(
        1 / task.n for task in tasks.values()
    )  # effective number: of the variance of the mean share
    return Stratified(
        tasks=tasks,
        difference=float(np.mean([task.difference for task in tasks.values()])),
        interval=_interval(stratified_interval(differences)),
        p=float(stratified_sign_flip(differences, seed=seed)),
        better=better,
        better_interval=_interval(proportion_interval(better, seeds)),
    )


def stratified_interval(differences: Sequence[ArrayLike]) -> Array:
    """95 % interval of the mean over tasks of mean differences: t with Satterthwaite's degrees of freedom.

    Args:
        differences: One array for each task, shape (..., n) with its own n >= 2.

    Returns:
        Shape (..., 2), NaN where all differences of every task are equal.
    """
    strata = [_finite("differences", d, least=2) for d in differences]
    n = np.array([d.shape[-1] for d in strata])
    variances = np.stack([np.where(_spreads(d), d.var(-1, ddof=1), 0.0) for d in strata], -1) / n
    total = variances.sum(-1)
    total = np.where(total > 0, total, np.nan)
    freedom = total**2 / (variances**2 / (n - 1)).sum(-1)
    centre = np.mean([d.mean(-1) for d in strata], axis=0)
    return np.stack(stats.t.interval(LEVEL, freedom, centre, np.sqrt(total) / len(n)), -1)


def stratified_sign_flip(differences: Sequence[ArrayLike], *, seed: int = 0) -> Array:
    """Two-sided p of the mean over tasks of mean differences, each pair of each task flipped on its own.

    Args:
        differences: One array for each task, shape (..., n) with its own n.
        seed: Seed of random sign flips.
    """
    strata = [_finite("differences", d) for d in differences]
    return sign_flip(
        np.concatenate([d / d.shape[-1] for d in strata], -1), seed=seed
    )  # sum of means, one weight a task


def sign_flip(differences: ArrayLike, *, seed: int = 0) -> Array:
    """Two-sided p of the paired sign-flip test of the sum, over the last axis.

    Up to 16 differences all flips are used, above that 9,999 random ones and the observed one, so that p is valid and
    never 0 (Phipson and Smyth, Permutation P-values Should Never Be Zero, 2010, arXiv 1603.05766).

    Args:
        differences: Shape (..., n).
        seed: Seed of the random flips, the same for all leading axes.

    Returns:
        Shape (...), in [2^(1 - n), 1].
    """
    x = _finite("differences", differences)
    n = x.shape[-1]
    # the tolerance counts flips that tie with the observed sum but for rounding
    least = (np.abs(x.sum(-1)) - 1e-12 * np.abs(x).sum(-1))[..., None]
    as_large, flips = np.zeros(x.shape[:-1]), 0
    for signs in _signs(n, seed, BLOCK // max(n, x.size // n)):
        as_large += (np.abs(x @ signs.T) >= least).sum(-1)
        flips += len(signs)
    return as_large / flips if n <= EXACT else (as_large + 1) / (flips + 1)


def proportion_interval(share: ArrayLike, n: ArrayLike) -> Array:
    """95 % Clopper-Pearson interval of a share of ``n`` trials, extended to half wins; shape (..., 2)."""
    share, n = np.asarray(share, float), np.asarray(n, float)
    if not ((share >= 0) & (share <= 1) & (n > 0)).all():
        raise ValueError(f"share must lie in [0, 1] and n be positive, got {share} of {n}")
    tail, wins = (1 - LEVEL) / 2, share * n
    low = np.where(share > 0, stats.beta.ppf(tail, wins, n - wins + 1), 0.0)
    high = np.where(share < 1, stats.beta.isf(tail, wins + 1, n - wins), 1.0)
    return np.stack([low, high], -1)


def holm(pvalues: ArrayLike) -> Array:
    """Holm's adjusted p over the last axis; rejecting all up to 0.05 errs in at most 5 % of studies.

    Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scandinavian Journal of Statistics 1979.

    Args:
        pvalues: Shape (..., m), each in [0, 1].

    Raises:
        ValueError: A p-value outside [0, 1].
    """
    p = np.asarray(pvalues, float)
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p-values must lie in [0, 1], got {p}")
    m = p.shape[-1]
    order = np.argsort(p, axis=-1)
    steps = np.take_along_axis(p, order, -1) * np.arange(m, 0, -1)
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(steps, -1).clip(max=1), -1)
    return adjusted


# ---------------------------------------------------------------- is it really steadier?


@dataclass(frozen=True)
class Steadiness:
    """SD over seeds of recipe A against recipe B; A is steadier where ``log_ratio`` = log(SD_A / SD_B) is negative.

    ``p`` is that of the paired test, ``brown_forsythe`` that of the unpaired one (Levene's test about the medians). All
    but ``p`` are None if all scores of a recipe are equal; the interval is also None if all but one are.
    """

    n: int
    log_ratio: float | None
    interval: Interval
    p: float
    brown_forsythe: float | None


def steadiness(a: ArrayLike, b: ArrayLike, *, seed: int = 0) -> Steadiness:
    """Test whether one recipe varies less from seed to seed than another.

    Args:
        a: Scores of A, shape (n,), n >= 3.
        b: Scores of B, the same seeds in the same order.
        seed: Seed of random sign flips.

    Raises:
        ValueError: Unequal lengths, fewer than three seeds, or a score that is not finite.
    """
    a, b = _paired(a, b, least=3)
    defined = _spreads(a) and _spreads(b)
    return Steadiness(
        n=len(a),
        log_ratio=math.log(a.std(ddof=1) / b.std(ddof=1)) if defined else None,
        interval=_interval(log_sd_interval(a, b)),
        p=float(sd_test(a, b, seed=seed)),
        brown_forsythe=_brown_forsythe(a, b) if defined else None,
    )


def sd_test(a: ArrayLike, b: ArrayLike, *, seed: int = 0) -> Array:
    """Two-sided p of equal spread of paired samples: sign-flip test of the differences of distances from the median.

    The distances are those of Brown and Forsythe (Journal of the American Statistical Association 1974), in a test that
    uses the pairs. With fewer than 6 seeds p cannot be below 0.05. Squared deviations from the mean, and the test of
    Pitman and Morgan, have slightly more power with normal scores, but err in 13 to 44 % of studies of 10 or 20 seeds
    if one run in ten fails.

    Args:
        a: Shape (..., n).
        b: The same shape.
        seed: Seed of random sign flips.
    """
    a, b = _paired(a, b, stacked=True)
    return sign_flip(_distances(a) - _distances(b), seed=seed)


def log_sd_interval(a: ArrayLike, b: ArrayLike) -> Array:
    """95 % interval of log(SD_A / SD_B) for paired samples, over the last axis: t over jackknife pseudo-values.

    The jackknife estimates the uncertainty of the SD from the sample (Miller, Jackknifing Variances, Annals of
    Mathematical Statistics 1968); F and Pitman-Morgan intervals assume a normal distribution. With heavy tails or
    failing runs the interval still covers too little; use `sd_test` there.

    Args:
        a: Shape (..., n), n >= 3.
        b: The same shape.

    Returns:
        Shape (..., 2), NaN where all values of a sample, or all but one, are equal.
    """
    a, b = _paired(a, b, least=3, stacked=True)
    return _t_interval(_pseudo_log_sd(a) - _pseudo_log_sd(b))


def _pseudo_log_sd(x: Array) -> Array:
    """``n f(x) - (n - 1) f(x without i)`` for f the logarithm of the SD."""
    n = x.shape[-1]
    squares = (x - x.mean(-1, keepdims=True)) ** 2
    total = squares.sum(-1, keepdims=True)
    without = total - squares * n / (n - 1)
    defined = _spreads(x)[..., None] & (without > 1e-12 * total)
    without, total = np.where(defined, without, np.nan), np.where(defined, total, np.nan)
    return (n * np.log(total / (n - 1)) - (n - 1) * np.log(without / (n - 2))) / 2


# ---------------------------------------------------------------- what could have been seen


def power(gain: ArrayLike, sd: ArrayLike, n: ArrayLike, *, alpha: float = 0.05) -> Array:
    """Probability that the two-sided paired t test finds a true gain, from the noncentral t distribution.

    Args:
        gain: True mean difference, in the unit of ``sd``.
        sd: Standard deviation of the paired differences, > 0.
        n: Number of seeds, >= 2.
        alpha: Level of the test.
    """
    n = np.asarray(n)
    shift = np.abs(gain) / np.asarray(sd) * np.sqrt(n)
    critical = stats.t.isf(alpha / 2, n - 1)
    # the second term equals cdf(-critical, shift), for which SciPy returns NaN at large shifts
    return stats.nct.sf(critical, n - 1, shift) + stats.nct.sf(critical, n - 1, -shift)


def detectable_gain(n: int, sd: float, *, chance: float = 0.8, alpha: float = 0.05) -> float:
    """Smallest true gain that ``n`` seeds find with the given probability, in the unit of ``sd``; the root of `power`.

    Args:
        n: Number of seeds, >= 2.
        sd: Standard deviation of the paired differences, > 0.
        chance: Power asked for, in (alpha, 1).
        alpha: Level of the two-sided test.

    Raises:
        ValueError: An argument outside its range.
    """
    if n < 2 or not 0 < sd < math.inf or not 0 < alpha < chance < 1:
        raise ValueError(
            f"detectable_gain needs n >= 2, sd > 0 and 0 < alpha < chance < 1, got n={n}, sd={sd}, alpha={alpha}, "
            f"chance={chance}"
        )
    return sd * _detectable(n, chance, alpha)


@functools.cache
def _detectable(n: int, chance: float, alpha: float) -> float:
    """Detectable gain in units of the SD, cached: a report asks thousands of times for the same few n."""

    def lacking(gain: float) -> float:
        return float(power(gain, 1.0, n, alpha=alpha)) - chance

    enough = 1.0
    while lacking(enough) < 0:
        enough *= 2
    return float(optimize.brentq(lacking, 0.0, enough))


def spread_sources(scores: ArrayLike) -> tuple[tuple[float, ...], float]:
    """Spread due to each of several crossed seeds: random effects of a factorial study with one run per cell.

    The estimates are moments of the analysis of variance. With M_i the mean square of factor i, M that of the rest and
    N / L_i runs per level, var_i = max(0, (M_i - M) / (N / L_i)). Interactions count as rest.

    Args:
        scores: One axis per factor, at least two of them, each of length >= 2.

    Returns:
        Standard deviation due to each factor, and that of the rest.

    Raises:
        ValueError: Fewer than two factors or levels, or a score that is not finite.
    """
    x = np.asarray(scores, float)
    if x.ndim < 2 or min(x.shape) < 2 or not np.isfinite(x).all():
        raise ValueError(f"scores must be finite, on two or more axes of length 2 or more, got shape {x.shape}")
    x = x - x.mean()
    levels = [x.mean(tuple(j for j in range(x.ndim) if j != i)) for i in range(x.ndim)]
    squares = [x.size / len(means) * float(means @ means) for means in levels]
    freedom = x.size - 1 - sum(n - 1 for n in x.shape)
    rest = max(0.0, float((x**2).sum()) - sum(squares)) / freedom
    variances = [(s / (n - 1) - rest) * n / x.size for s, n in zip(squares, x.shape, strict=True)]
    return tuple(math.sqrt(max(0.0, v)) for v in variances), math.sqrt(rest)


# ---------------------------------------------------------------- equal compute


@dataclass(frozen=True)
class Trained:
    """Scores of a recipe, one per seed, and the cost of one training in forward-backward passes."""

    scores: Sequence[float]
    passes: float


@dataclass(frozen=True)
class Matched:
    """A recipe compared with plain fine-tuning of at least its compute; None if no plain run was long enough."""

    recipe: str
    baseline: str | None
    passes: float
    baseline_passes: float | None
    comparison: Comparison | None


def compute_matched(
    recipes: Mapping[str, Trained], baselines: Mapping[str, Trained], *, seed: int = 0
) -> list[Matched]:
    """Pair each recipe with the cheapest plain baseline that costs no less, and compare them.

    Args:
        recipes: Scores and cost by name.
        baselines: Plain fine-tuning of several lengths, with the same seeds.
        seed: As in `compare`.

    Raises:
        ValueError: An error of `compare`.
    """
    rows = []
    for name, recipe in recipes.items():
        enough = [other for other in baselines if baselines[other].passes >= recipe.passes]
        best = min(enough, key=lambda other: baselines[other].passes, default=None)
        plain = None if best is None else baselines[best]
        rows.append(
            Matched(
                recipe=name,
                baseline=best,
                passes=recipe.passes,
                baseline_passes=None if plain is None else plain.passes,
                comparison=None if plain is None else compare(recipe.scores, plain.scores, seed=seed),
            )
        )
    return rows


# ---------------------------------------------------------------- shared


def _finite(name: str, values: ArrayLike, *, least: int = 1) -> Array:
    x = np.asarray(values, float)
    if not x.ndim or x.shape[-1] < least or not np.isfinite(x).all():
        raise ValueError(
            f"{name} must hold finite numbers, at least {least}, got shape {x.shape} with "
            f"{int((~np.isfinite(x)).sum())} not finite: score failed runs by what they predict, or leave "
            "their seeds out everywhere"
        )
    return x


def _scores(name: str, values: ArrayLike) -> Array:
    x = _finite(name, values)
    if x.ndim != 1:
        raise ValueError(f"{name} must hold one number per run, got shape {x.shape}")
    return x


def _paired(a: ArrayLike, b: ArrayLike, *, least: int = 2, stacked: bool = False) -> tuple[Array, Array]:
    """Two finite arrays of one shape, (seeds,), with at least ``least`` seeds; with ``stacked`` (..., seeds)."""
    a, b = _finite("a", a), _finite("b", b)
    if a.shape != b.shape or (a.ndim > 1 and not stacked) or a.shape[-1] < least:
        raise ValueError(
            f"a and b must come from the same seeds, shape (seeds,) with at least {least} of each, got {a.shape} and "
            f"{b.shape}: pair the runs by seed first"
        )
    return a, b


def _spreads(x: Array) -> Any:
    """Whether values along the last axis differ by more than rounding."""
    return np.ptp(x, axis=-1) > 1e-12 * np.abs(x).max(-1)


def _distances(x: Array) -> Array:
    return np.abs(x - np.median(x, -1, keepdims=True))


def _t_interval(x: Array) -> Array:
    """NaN where nothing spreads."""
    n = x.shape[-1]
    error = np.where(_spreads(x), x.std(-1, ddof=min(1, n - 1)) / math.sqrt(n), np.nan)
    return np.stack(stats.t.interval(LEVEL, n - 1, x.mean(-1), error), -1)


def _brown_forsythe(a: Array, b: Array) -> float | None:
    if not any(_spreads(_distances(x)) for x in (a, b)):
        return None  # all distances are equal: F would be 0 / 0 or infinite
    return float(stats.levene(a, b, center="median").pvalue)


def _wins(d: Array) -> float:
    return float(((d > 0) + 0.5 * (d == 0)).mean())


def _interval(bounds: Array) -> Interval:
    low, high = bounds.tolist()
    return None if math.isnan(low) else (low, high)


def _signs(n: int, seed: int, block: int) -> Iterator[Array]:
    """Yield all or random sign flips of n numbers, ``block`` at a time."""
    if n > EXACT:
        rng = np.random.default_rng(seed)
        for count in _blocks(DRAWS, block):
            yield rng.choice([-1.0, 1.0], (count, n))
        return
    start = 0
    for count in _blocks(2 ** (n - 1), block):  # the last sign is fixed: the other half gives equal sums
        yield np.where(np.arange(start, start + count)[:, None] >> np.arange(n) & 1, -1.0, 1.0)
        start += count


def _blocks(total: int, block: int) -> Iterator[int]:
    block = max(1, block)
    for start in range(0, total, block):
        yield min(block, total - start)
