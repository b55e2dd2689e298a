"""How often each test of `steadytune.bench.stats` errs and how often each interval covers, law by law.

    python benchmarks/calibration.py [--repetitions 2000] [--output docs/results]

Prints a Markdown table and writes it with its records (calibration.md, calibration.json). A and B are drawn from one
law, so that every rejection is an error. The functions measured are those that the package uses; beside them stand
those that were tried and not chosen.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy
from scipy import stats
from tqdm import tqdm

import steadytune
from steadytune.bench import stats as own

Array = np.ndarray
ALPHA = 0.05
MOST = 0.064  # false positives: 0.05 and three standard errors of 2,000 repetitions
LEAST = 0.93  # coverage
TASKS = 5
SEEDS = (5, 10, 20)
MORE_SEEDS = (5, 10, 20, 30, 50)


@dataclass(frozen=True)
class Law:
    """A law of scores: draws of a given shape, their mean, and the SD of what the two scores of a seed share."""

    draw: Callable[[np.random.Generator, tuple[int, ...]], Array]
    mean: float = 0.0
    shared: float = 0.0


def collapsing(rng: np.random.Generator, shape: tuple[int, ...]) -> Array:
    """Accuracies of which one in ten is that of a failed run."""
    return np.where(rng.random(shape) < 0.1, rng.normal(0.53, 0.005, shape), rng.normal(0.68, 0.02, shape))


LAWS = {
    "normal": Law(lambda rng, shape: rng.normal(size=shape)),
    "normal, pairs correlated 0.5": Law(lambda rng, shape: rng.normal(size=shape), shared=1.0),
    "mildly skewed (gamma, skewness 0.5)": Law(lambda rng, shape: rng.gamma(16, size=shape), 16),
    "skewed (lognormal, skewness 1.75)": Law(lambda rng, shape: rng.lognormal(0, 0.5, shape), np.exp(0.125)),
    "heavy tails (t, 3 degrees)": Law(lambda rng, shape: rng.standard_t(3, shape)),
    "accuracy on 277 rows": Law(lambda rng, shape: rng.binomial(277, 0.68, shape) / 277, 0.68),
    "one run in ten fails": Law(collapsing, 0.1 * 0.53 + 0.9 * 0.68),
}


def pairs(law: Law, rng: np.random.Generator, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Scores of two equally good recipes with the same seeds."""
    seed_effect = law.shared * rng.normal(size=shape)
    return law.draw(rng, shape) + seed_effect, law.draw(rng, shape) + seed_effect


def outside(interval: Array, truth: float = 0.0) -> Array:
    """Whether an interval rejects a value; one that is not defined (NaN) rejects nothing."""
    return (interval[..., 0] > truth) | (interval[..., 1] < truth)


def covers(interval: Array, truth: float = 0.0) -> Array:
    """Whether an interval holds a value; one that is not defined (NaN) holds nothing."""
    return (interval[..., 0] <= truth) & (truth <= interval[..., 1])


def pitman_morgan(a: Array, b: Array) -> Array:
    """p of equal variances of paired samples: the correlation of sums and differences, exact under a normal law."""
    return stats.pearsonr(a + b, a - b, axis=-1).pvalue


def plain_bca(values: Array) -> Array:
    found = [
        stats.bootstrap((piece,), np.mean, axis=-1, rng=np.random.default_rng(start)).confidence_interval
        for start, piece in chunks(values)
    ]
    return np.concatenate([np.stack([each.low, each.high], -1) for each in found])


def t_interval(values: Array) -> Array:
    found = stats.t.interval(own.LEVEL, values.shape[-1] - 1, values.mean(-1), stats.sem(values, axis=-1))
    return np.stack(found, -1)


def row(measure: str, name: str, law: str, n: int, hits: Array) -> dict:
    return {"measure": measure, "name": name, "law": law, "n": n, "rate": float(hits.mean()), "of": hits.size}


def chunks(values: Array, size: int = 10) -> Iterator[tuple[int, Array]]:
    """Repetitions in pieces, each with a seed of its own: within one call they share bootstrap draws."""
    for start in range(0, len(values), size):
        yield start, values[start : start + size]


def mean_intervals(values: Array) -> Array:
    return np.concatenate([own.mean_interval(piece, seed=start) for start, piece in chunks(values)])


# ---------------------------------------------------------------- errors of the tests


def sd_tests(a: Array, b: Array, seed: int = 0) -> dict[str, Array]:
    """p of equal SD; the first is the one in use beside Brown-Forsythe."""
    squares = [(x - x.mean(-1, keepdims=True)) ** 2 for x in (a, b)]
    return {
        "SD: sign flip of distances from the median": own.sd_test(a, b, seed=seed),
        "SD: Brown-Forsythe": stats.levene(a, b, center="median", axis=-1).pvalue,
        "SD: sign flip of squared deviations (not used)": own.sign_flip(squares[0] - squares[1], seed=seed),
        "SD: Pitman-Morgan (not used)": pitman_morgan(a, b),
    }


def false_positives(law: str, n: int, repetitions: int, seed: int = 0) -> list[dict]:
    """Share of repetitions in which a test of two equal recipes says p <= 0.05; coverage of intervals that hold 0."""
    rng = np.random.default_rng([seed, list(LAWS).index(law), n])
    a, b = pairs(LAWS[law], rng, (TASKS, repetitions, n))
    p = own.sign_flip(a - b, seed=seed)
    tasks = [scale * d for scale, d in zip((1, 2, 4), a - b, strict=False)]  # three that differ in noise
    mean = mean_intervals(a[0] - b[0])
    over_tasks = own.stratified_interval(tasks)
    hits = {
        "sign flip": p[0] <= ALPHA,
        "sign flip, stratified over 3 tasks": own.stratified_sign_flip(tasks, seed=seed) <= ALPHA,
        "Holm over 5 tasks, family-wise": (own.holm(p.T) <= ALPHA).any(-1),
        "t interval as a test": outside(mean),
        "t interval as a test, stratified over 3 tasks": outside(over_tasks),
        **{name: found <= ALPHA for name, found in sd_tests(a[0], b[0], seed).items()},
    }
    held = {
        "mean difference": covers(mean),
        "mean difference, stratified over 3 tasks": covers(over_tasks),
        "log SD ratio": covers(own.log_sd_interval(a[0], b[0])),
    }
    return [row("false positives", name, law, n, found) for name, found in hits.items()] + [
        row("coverage", name, law, n, found) for name, found in held.items()
    ]


def sd_power(law: str, n: int, repetitions: int, seed: int = 0) -> list[dict]:
    """Share of repetitions in which A, half as spread as B, is found to be."""
    rng = np.random.default_rng([seed, 50 + list(LAWS).index(law), n])
    a, b = pairs(LAWS[law], rng, (repetitions, n))
    return [row("power", name, law, n, found <= ALPHA) for name, found in sd_tests(a / 2, b, seed).items()]


# ---------------------------------------------------------------- coverage of the intervals


def mean_coverage(law: str, n: int, repetitions: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng([seed, 100 + list(LAWS).index(law), n])
    x, truth = LAWS[law].draw(rng, (repetitions, n)), LAWS[law].mean
    found = {"mean of one recipe": mean_intervals(x)}
    if n >= own.BOOTSTRAP_FROM:
        found["mean of one recipe, t (not used from 30 on)"] = t_interval(x)
    if law == "normal":
        found["mean of one recipe, BCa at 95 % (not used)"] = plain_bca(x[: repetitions // 2])
    return [row("coverage", name, law, n, covers(each, truth)) for name, each in found.items()]


SHARES = {  # chances of a win, a tie and a loss
    "wins 50 %": (0.5, 0.0, 0.5),
    "wins 80 %": (0.8, 0.0, 0.2),
    "wins 95 %": (0.95, 0.0, 0.05),
    "wins 50 %, ties 30 %": (0.5, 0.3, 0.2),
}


def share_coverage(law: str, n: int, repetitions: int, seed: int = 0) -> list[dict]:
    rng = np.random.default_rng([seed, 200 + list(SHARES).index(law), n])
    chances = np.array(SHARES[law])
    found = rng.choice([1.0, 0.5, 0.0], (repetitions, n), p=chances).mean(-1)
    truth = chances @ [1.0, 0.5, 0.0]
    return [row("coverage", "P(A > B)", law, n, covers(own.proportion_interval(found, n), truth))]


# ---------------------------------------------------------------- the report


def records(repetitions: int) -> Iterator[dict]:
    for law in LAWS:
        for n in SEEDS:
            yield from false_positives(law, n, repetitions)
            yield from sd_power(law, n, repetitions)
        for n in MORE_SEEDS if not LAWS[law].shared else ():
            yield from mean_coverage(law, n, repetitions if n < own.BOOTSTRAP_FROM else repetitions // 2)
    for law in SHARES:
        for n in MORE_SEEDS:
            yield from share_coverage(law, n, repetitions)


def table(found: Iterable[dict], good: Callable[[float], bool]) -> str:
    """One line per name and law, one column per number of seeds; what is not good in bold."""
    lines: dict[tuple[str, str], dict[int, str]] = {}
    for r in found:
        text = f"{r['rate']:.3f}"
        lines.setdefault((r["name"], r["law"]), {})[r["n"]] = text if good(r["rate"]) else f"**{text}**"
    seeds = sorted({n for cells in lines.values() for n in cells})
    head = f"| | law | {' | '.join(f'n = {n}' for n in seeds)} |\n|---|---|{'---|' * len(seeds)}"
    order = list(dict.fromkeys(name for name, _ in lines))
    body = [
        f"| {name} | {law} | {' | '.join(cells.get(n, '') for n in seeds)} |"
        for (name, law), cells in sorted(lines.items(), key=lambda line: order.index(line[0][0]))
    ]
    return "\n".join([head, *body])


def power_table() -> str:
    head = "| true gain / SD of differences | " + " | ".join(f"n = {n}" for n in MORE_SEEDS) + " |\n|---|"
    lines = [head + "---|" * len(MORE_SEEDS)]
    for gain in (0.25, 0.5, 0.75, 1, 1.5, 2):
        lines.append(f"| {gain} | {' | '.join(f'{chance:.2f}' for chance in own.power(gain, 1, MORE_SEEDS))} |")
    least = (f"{own.detectable_gain(n, 1):.2f}" for n in MORE_SEEDS)
    return "\n".join([*lines, f"| **detectable gain / SD** | {' | '.join(least)} |"])


PAGE = """# Calibration of the statistics

Written by `benchmarks/calibration.py` (steadytune {version}, NumPy {numpy}, SciPy {scipy}). {repetitions:,} repetitions
per cell; half of that for bootstrap intervals. n is the number of seeds. Bold: a test
that errs in more than {most} of studies (three standard errors above 0.05), an interval that covers less than {least}.

## Errors of the tests

Two recipes with the same law of scores; share of studies with p <= 0.05, which should be at most 0.05.

{errors}

The tests in use err rarely enough under every law. Five seeds never show anything to a sign flip (smallest p: 0.0625).
The tests of SD that were not used find more (below), but take a failed run for a difference in spread.

## Coverage of the intervals

Share of studies whose 95 % interval holds the true value.

{coverage}

- Means: t below 30 seeds, from 30 on BCa at the higher level that undoes its two small-sample errors; at a level of
  95 % it covers too little. Differences of pairs are symmetric where the recipes' laws are alike, so that their
  intervals hold more widely than those of single recipes.
- **Where it fails**: the mean of a skewed law or with rare failed runs, below 30 seeds. Five seeds without a failure do
  not know that one in ten fails, and no interval computed from them can. Read the failed-run rate and the median beside
  it. From 30 on, BCa is a little better than t for skewed scores and failed runs, and worse with heavy tails.
- log SD ratio: holds for normal, mildly skewed and discrete scores, not with skewed or heavy tails or failed runs,
  where the test above is what to believe.
- P(A > B) is Clopper-Pearson and covers more than it must.

## Power of the tests of SD

Share of studies that find that A has half the SD of B. The last two are out of the question, see above.

{sd_power}

## Power of the paired t test

Chance to find a true gain at 0.05 two-sided, and the smallest gain found with a chance of 0.8.

{power}
"""


def page(found: list[dict], repetitions: int) -> str:
    def measured(measure: str) -> list[dict]:
        return [r for r in found if r["measure"] == measure]

    return PAGE.format(
        version=steadytune.__version__,
        numpy=np.__version__,
        scipy=scipy.__version__,
        repetitions=repetitions,
        most=MOST,
        least=LEAST,
        errors=table(measured("false positives"), lambda rate: rate <= MOST),
        coverage=table(measured("coverage"), lambda rate: rate >= LEAST),
        sd_power=table(measured("power"), lambda rate: True),
        power=power_table(),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    parser.add_argument("--output", type=Path, default=Path("docs/results"))
    options = parser.parse_args()
    found = list(tqdm(records(options.repetitions)))
    text = page(found, options.repetitions)
    print(text)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "calibration.md").write_text(text)
    lines = ",\n".join(json.dumps(r) for r in found)
    (options.output / "calibration.json").write_text(f"[\n{lines}\n]\n")


if __name__ == "__main__":
    main()
