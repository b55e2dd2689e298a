"""`steadytune curve`: scores of plain fine-tuning and of the frozen probe by number of rows, and what more would bring.

torch is imported inside the functions that use it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..bench.own_tables import OwnTables
from ..bench.pool import Engine
from ..bench.store import Store, checked
from ..bench.study import opened
from ..data.tables import Kind
from ..errors import UsageError
from ..files.atomic import write_json, writing
from ..fitting.options import python_value
from .budget import Budget
from .cells import Cells
from .estimates import Estimate, two_way
from .learning_curve import More, more_rows
from .main import column_names, label_names, make_task, source_file
from .recipe import Recipe, frozen
from .words import scale

CURVE = "curve.json"
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
                name: {str(size): {"value": abs(e.value), "error": e.error} for size, e in by_size.items()}
                for name, by_size in self.scores.items()
            },
            "more": {name: dataclasses.asdict(more) for name, more in self.more.items()},
            "verdict": self.verdict,
        }


def curve(
    train: Any,
    *,
    model: str | Path,
    output: str | Path,
    text: str | Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    label_separator: str | None = None,
    group: str | None = None,
    kind: Kind = "auto",
    metric: str | None = None,
    more: int = 200,
    repeats: int = 1,
    folds: int | None = None,
    seed: int = 0,
    workers: int = 0,
    engine: Engine | None = None,
    **options: Any,
) -> LearningCurve:
    """What more labels would bring, from cross-validations on a quarter, a half, and most of the rows.

    Args:
        train: As of `fit`.
        model: Hugging Face model directory or hub name.
        output: Folder of the records. The same command goes on with the trainings that have none.
        text: As of `fit`.
        label: As of `fit`.
        label_separator: As of `fit`.
        group: Column of groups; rows of one group stay in one fold.
        kind: As of `fit`.
        metric: Metric of the scores; by default the first of the kind.
        more: Number of rows that would be added.
        repeats: Number of cross-validations of each size, from 1 to 4.
        folds: Number of folds; by default 5, or 10 below 200 rows.
        seed: Seed of folds and trainings.
        workers: Number of worker processes; 0 trains in this process.
        engine: Engine that does the trainings, instead of processes on this machine.
        **options: Options of fine-tuning, as of `fit`.

    Raises:
        UsageError: The arguments or the data are not right, or a training fails.
    """
    more, repeats = python_value("more", more, int), python_value("repeats", repeats, int)
    if more < 1:
        raise UsageError(f"more must be 1 or more, got {more}.")
    place = checked(output)
    with source_file(train, place) as file:
        table = OwnTables("table", file, text=column_names(text), label=label_names(label), metric=metric,
                          label_separator=label_separator, group=group, kind=kind, folds=folds)  # fmt: skip
        task = make_task(table, {Path(model).name: str(model)}, seed, options)
        if not 1 <= repeats <= task.repeats:
            raise UsageError(f"repeats must lie between 1 and {task.repeats}, got {repeats}.")
        recipes = [Recipe(Path(model).name), frozen(Path(model).name)]
        n = len(task.data.train)
        sizes: dict[int, Cells] = {}
        smaller = [size for share in SHARES if (size := round(share * n)) < task.inside]
        with opened(engine, workers) as used:
            for size, drawn in [*((size, size) for size in smaller), (task.inside, None)]:
                sized = dataclasses.replace(task, size=drawn)
                cells = Cells(sized, Store(place), Budget(math.inf, "runs"), used)
                cells.do([(recipe, repeat) for recipe in recipes for repeat in range(repeats)])
                for recipe in recipes:
                    if why := cells.trouble(recipe):
                        raise UsageError(f"{recipe} failed on {size} rows: {why}")
                sizes[size] = cells
    made = range(repeats)
    blocks = cells.sheet.blocks(made)
    values = {str(r): {size: cells.values(r, made) for size, cells in sizes.items()} for r in recipes}
    found = LearningCurve(
        place, task.metric.name, n,
        {name: {size: two_way(v, blocks) for size, v in by_size.items()} for name, by_size in values.items()},
        {name: more_rows(by_size, blocks, n, more, seed) for name, by_size in values.items()},
    )  # fmt: skip
    with writing(place):
        write_json(place / CURVE, found.record())
    return found
