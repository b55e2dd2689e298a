"""How often `steadytune search` claims a gain that is not there, and how often it finds one that is.

    python benchmarks/search_calibration.py [--searches 500] [--output docs/results]

Simulates whole searches with the code that decides in the package (`steadytune.searching.race`); only the trainings are
replaced by draws. Prints a Markdown table and writes it with its numbers (search.md, search.json).

A recipe's prediction of row i in repeat r is right if z_i + u_i + t_block + e_ri > -m, with z_i shared by all recipes
(some rows are harder), u_i of the recipe alone (it is better on some rows than on others), t_block of the training, and
e_ri of the prediction; m sets the recipe's accuracy in the population. Two recipes of equal accuracy disagree on 10 %
of the rows. In the worlds of seeds u = 0, so that arms differ as other seeds of plain do. In the worlds of rows e = 0:
each arm is better than plain on some rows and worse on others, always on the same, which no further training cures.
In a world of groups, half of the variance of z and of u is shared by the rows of a group, as of one author.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from scipy import optimize, stats
from tqdm import tqdm

from steadytune.searching.halves import halves
from steadytune.searching.race import Outcome, Race, Sheet, Stage

Array = np.ndarray
ACCURACY, DISAGREEMENT, TRAINING_SD, FOLDS, REPEATS = 0.8, 0.1, 0.015, 5, 4
STAGES = {"heads": 3, "schedule": 4, "methods": 4}  # number of arms of each stage
BUDGET = 130  # trainings


def other_variance() -> float:
    """Variance of u + t + e for which two recipes of equal accuracy disagree on the given share of rows."""
    threshold = -stats.norm.ppf(ACCURACY)

    def lacking(correlation: float) -> float:
        both = stats.multivariate_normal.cdf([threshold] * 2, cov=[[1, correlation], [correlation, 1]])
        return 2 * (1 - ACCURACY - both) - DISAGREEMENT

    return 1 / optimize.brentq(lacking, 0.5, 0.999) - 1


OTHER = other_variance()
SCALE = math.sqrt(1 + OTHER)
SHIFT = TRAINING_SD / math.sqrt(2) / stats.norm.pdf(stats.norm.ppf(ACCURACY)) * SCALE  # SD of t, from that of a pair


@dataclass(frozen=True)
class World:
    """A kind of table and arms.

    Attributes:
        rows: Number of rows.
        lasting: Share of the variance beside z that belongs to recipe and row (u), in [0, 1]; the rest is e.
        planted: True gain of one arm of the first stage.
        spread: Standard deviation of the true gains of the arms.
        group: Number of rows of each group; rows of one group share half, fold, and half of the variance of z and u.
    """

    rows: int
    lasting: float
    planted: float = 0.0
    spread: float = 0.0
    group: int = 1


@dataclass
class Simulated:
    """Trainings of a simulated table; a recipe is a tuple of arms, whose true gains add up."""

    world: World
    rng: np.random.Generator
    left: float = BUDGET
    drawn: dict[tuple[tuple[str, ...], int], Array] = field(default_factory=dict)

    def __post_init__(self) -> None:
        units = self.world.rows // self.world.group
        self.units = np.repeat(np.arange(units), self.world.group)
        self.z = self.of_rows()
        self.folds = np.stack([self.rng.permutation(units) % FOLDS for _ in range(REPEATS)])[:, self.units]
        names = [f"{stage} {i}" for stage, count in STAGES.items() for i in range(count)]
        self.gains = dict(zip(names, self.rng.normal(0, self.world.spread, len(names)), strict=True))
        if self.world.planted:
            self.gains[names[1]] = self.world.planted
        self.lasting: dict[tuple[str, ...], Array] = {}
        self.whole = self.left

    def of_rows(self) -> Array:
        """A standard normal number for each row."""
        if self.world.group == 1:
            return self.rng.normal(size=self.world.rows)
        shared = self.rng.normal(size=self.units.max() + 1)[self.units]
        return math.sqrt(0.5) * (shared + self.rng.normal(size=self.world.rows))

    def gain(self, recipe: tuple[str, ...]) -> float:
        """True gain over plain."""
        return sum(self.gains[arm] for arm in recipe)

    def do(self, wanted: Sequence[tuple[tuple[str, ...], int]]) -> None:
        for recipe, repeat in wanted:
            if not self.has(recipe, repeat) and self.left >= FOLDS:
                self.left -= FOLDS
                self.drawn[recipe, repeat] = self.train(recipe, repeat)

    def train(self, recipe: tuple[str, ...], repeat: int) -> Array:
        """Which rows are right in a repeat."""
        n, own = self.world.rows, OTHER - SHIFT**2
        if recipe not in self.lasting:
            self.lasting[recipe] = math.sqrt(self.world.lasting * own) * self.of_rows()
        shift = self.rng.normal(0, SHIFT, FOLDS)[self.folds[repeat]]
        noise = self.rng.normal(0, math.sqrt((1 - self.world.lasting) * own), n)
        margin = SCALE * stats.norm.ppf(min(0.999, ACCURACY + self.gain(recipe)))
        return (self.z + self.lasting[recipe] + shift + noise > -margin).astype(float)

    def further(self, recipe: tuple[str, ...]) -> float:
        """The last fit is no part of the budget here."""
        return 0.0

    def has(self, recipe: tuple[str, ...], repeat: int) -> bool:
        return (recipe, repeat) in self.drawn

    def values(self, recipe: tuple[str, ...], repeats: Sequence[int]) -> Array:
        return np.stack([self.drawn[recipe, repeat] for repeat in repeats])

    def losses(self, recipe: tuple[str, ...], repeats: Sequence[int]) -> Array:
        return 1 - self.values(recipe, repeats)

    def trouble(self, recipe: tuple[str, ...]) -> None:
        return None

    def cost(self, recipe: tuple[str, ...]) -> float:
        return FOLDS

    def seconds(self, recipe: tuple[str, ...]) -> float:
        return 1.0


def stages() -> list[Stage]:
    """Stages whose arms are put on top of the recipe chosen so far."""
    return [
        Stage(name, lambda chosen, name=name, count=count: [(*chosen, f"{name} {i}") for i in range(count)])
        for name, count in STAGES.items()
    ]


def search(world: World, seed: int) -> tuple[Outcome, Simulated]:
    """One simulated search."""
    rng = np.random.default_rng([seed, world.rows])
    trials = Simulated(world, rng)
    sheet = Sheet(halves(np.zeros_like(trials.units), trials.units, seed), trials.folds, trials.units)
    return Race((), stages(), trials, sheet).run(), trials


WORLDS = {
    "arms are other seeds of plain": World(300, 0.0),
    "equal arms that differ on rows": World(300, 1.0),
    "the same, 1,000 rows": World(1000, 1.0),
    "one arm +8": World(300, 1.0, planted=0.08),
    "one arm +3, 1,000 rows": World(1000, 1.0, planted=0.03),
    "gains with SD 1": World(300, 1.0, spread=0.01),
    "gains with SD 2": World(300, 1.0, spread=0.02),
    "gains with SD 2, 1,000 rows": World(1000, 1.0, spread=0.02),
    "equal arms, 40 groups of 10 rows": World(400, 1.0, group=10),
}


def measure(name: str, searches: int) -> dict[str, float | str]:
    """Rates and means of many searches in one world; gains in points."""
    world, rows = WORLDS[name], []
    for seed in tqdm(range(searches), desc=name, leave=False):
        outcome, trials = search(world, seed)
        procedure = np.mean([trials.gain(recipe) for recipe in outcome.chosen.values()])
        low, high = outcome.gain.interval
        best = max((s for s in outcome.standings), key=lambda s: s.belief.mean)
        rows.append(
            {
                "shown": outcome.verdict == "shown",
                "likely or shown": outcome.verdict != "not shown",
                "planted arm shipped": "heads 1" in outcome.ship,
                "claimed": outcome.gain.value,
                "of the procedure": procedure,
                "of what is shipped": trials.gain(outcome.ship),
                "of the best arm, by its own rows": best.gain.value,
                "covered": low <= procedure <= high or not outcome.gain.error,
                "detectable": outcome.detectable or math.nan,
                "trainings": BUDGET - trials.left,
            }
        )
    points = ("claimed", "of the procedure", "of what is shipped", "of the best arm, by its own rows", "detectable")
    means = {key: float(np.nanmean([row[key] for row in rows])) * (100 if key in points else 1) for key in rows[0]}
    error = 100 * float(np.std([row["claimed"] for row in rows]) / math.sqrt(searches))
    return {"world": name, **means, "error of claimed": error}


def table(results: Sequence[dict[str, float | str]], searches: int) -> str:
    """The results as Markdown."""
    titles = ["world", "shown", "likely or shown", "gain claimed", "true gain of the procedure",
              "true gain of what is shipped", "best gain of an arm in its stage, on the rows that chose",
              "interval holds the truth", "smallest gain shown"]  # fmt: skip
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for r in results:
        cells = [f"{r[key]:.1%}" for key in ("shown", "likely or shown")]
        cells.append(f"{r['claimed']:+.2f} ± {1.96 * float(r['error of claimed']):.2f}")
        keys = ("of the procedure", "of what is shipped", "of the best arm, by its own rows")
        cells += [f"{r[key]:+.2f}" for key in keys]
        cells += [f"{r['covered']:.1%}", f"{r['detectable']:.1f}"]
        lines.append("| " + " | ".join([str(r["world"]), *cells]) + " |")
    planted = next(r for r in results if WORLDS[str(r["world"])].planted)
    return "\n".join(
        [
            "# How honest is a search?",
            "",
            f"{searches} simulated searches in each world, by `python benchmarks/search_calibration.py`: 300 rows "
            f"unless it says otherwise, {sum(STAGES.values())} arms in {len(STAGES)} stages, {FOLDS} folds, at most "
            f"{BUDGET} trainings ({planted['trainings']:.0f} used on average with one arm of +8), plain accuracy "
            f"{ACCURACY:.0%}, recipes disagree on {DISAGREEMENT:.0%} of the rows, and a training has an SD of "
            f"{100 * TRAINING_SD:.1f} points. Gains are in points.",
            "",
            *lines,
            "",
            "The best gain on the rows that chose is what a search without correction would claim. The "
            f"arm of +8 was shipped in {planted['planted arm shipped']:.1%} of the searches. The gain claimed is that "
            "of the procedure, which chooses by half of the rows; it is smaller than that of what is shipped.",
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=500)
    parser.add_argument("--worlds", nargs="*", default=list(WORLDS))
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    results = [measure(name, given.searches) for name in given.worlds]
    if given.output is None:
        for result in results:
            print(json.dumps(result, indent=1))
        return
    text = table(results, given.searches)
    print(text)
    (given.output / "search.md").write_text(text, encoding="utf-8")
    (given.output / "search.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
