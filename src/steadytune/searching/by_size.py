"""Cross-validated scores of plain fine-tuning and of the frozen probe by number of training rows. No torch here."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..bench.pool import Engine
from ..bench.store import Store
from ..errors import UsageError
from .budget import Budget
from .cells import Cells, Task
from .estimates import Estimate, two_way
from .learning_curve import More, more_rows
from .recipe import Recipe, frozen
from .words import scale, shown

SHARES = (0.25, 0.5)  # of the rows, beside all that a fold leaves


@dataclass(frozen=True)
class LearningCurve:
    """Scores by number of training rows.

    Attributes:
        output: Folder of the records.
        metric: Metric of the scores.
        rows: Number of rows.
        scores: Score by recipe and number of training rows.
        more: What more rows would bring, by recipe.
    """

    output: Path
    metric: str
    rows: int
    scores: Mapping[str, Mapping[int, Estimate]]
    more: Mapping[str, More]

    @property
    def verdict(self) -> str:
        """What more rows would bring, in a sentence for each recipe."""
        return " ".join(self._words(name, more) for name, more in self.more.items())

    def _words(self, name: str, more: More) -> str:
        times, unit = scale(self.metric)
        if not more.known:
            return f"What {more.rows:,} more rows would bring to {name} cannot be told from these {self.rows:,} rows."
        low, high = (f"{times * bound:.1f}" for bound in more.interval)
        return f"{more.rows:,} more rows would bring {name} {times * more.gain:+.1f}{unit} ({low} to {high})."

    def record(self) -> dict[str, Any]:
        """The curve as JSON."""
        return {
            "metric": self.metric,
            "rows": self.rows,
            "scores": {
                name: {
                    str(size): {"value": shown(self.metric, e.value), "error": e.error} for size, e in by_size.items()
                }
                for name, by_size in self.scores.items()
            },
            "more": {name: dataclasses.asdict(more) for name, more in self.more.items()},
            "verdict": self.verdict,
        }


def smaller(task: Task) -> list[int]:
    """Numbers of rows that every fold can draw, at least one a class, below those that a fold leaves."""
    rows, folds = task.data.train, task.sheet().folds
    strata = len(np.unique(task.data.problem.strata(rows["label"])))
    most = len(rows) - max(np.bincount(cut).max() for cut in folds)
    sizes = [round(share * len(rows)) for share in SHARES]
    return [size for size in sizes if strata <= size <= most and size < task.inside]


def check_sizes(task: Task) -> None:
    """Refuse rows of which no curve can be drawn.

    Raises:
        UsageError: No fold has fewer rows to draw.
    """
    if not smaller(task):
        tried = " and ".join(str(round(share * len(task.data.train))) for share in SHARES)
        raise UsageError(
            f"a curve needs a second number of rows beside about {task.inside:,}, and not every fold can draw {tried} "
            "of them with a row of each class: give more rows or smaller groups, or merge rare classes."
        )


def learning_curve(task: Task, store: Store, engine: Engine, more: int, repeats: int) -> LearningCurve:
    """Do the trainings that have no record, and put a curve through their scores.

    Args:
        task: Rows, and the model, the first one of the task.
        store: Folder of the records; those of a search on the same rows are used.
        engine: Engine that does the trainings.
        more: Number of rows that would be added.
        repeats: Number of cross-validations of each size.

    Raises:
        UsageError: A training fails, or no fold has fewer rows to draw.
    """
    check_sizes(task)
    name = next(iter(task.models))
    recipes = [Recipe(name), frozen(name)]
    n = len(task.data.train)
    sizes: dict[int, Cells] = {}
    for size, drawn in [*((size, size) for size in smaller(task)), (task.inside, None)]:
        cells = Cells(dataclasses.replace(task, size=drawn), store, Budget(math.inf, "runs"), engine)
        cells.do([(recipe, repeat) for recipe in recipes for repeat in range(repeats)])
        for recipe in recipes:
            if why := cells.trouble(recipe):
                raise UsageError(f"{recipe} failed on {size} rows: {why}")
        sizes[size] = cells
    made = range(repeats)
    blocks, units = cells.sheet.blocks(made), cells.sheet.units
    values = {str(r): {size: cells.values(r, made) for size, cells in sizes.items()} for r in recipes}
    perfect = task.metric.goodness(task.metric.perfect)
    return LearningCurve(
        store.folder, task.metric.name, n,
        {name: {size: two_way(v, blocks, units) for size, v in by_size.items()} for name, by_size in values.items()},
        {name: more_rows(by_size, blocks, units, n, more, task.seed, perfect) for name, by_size in values.items()},
    )  # fmt: skip
