"""Cells: the trainings of a search, each one record of a bench folder. No torch here.

A cell is a recipe on one fold of one repeat. Its block (repeat, fold, seed) decides rows, head, row order, dropout and
draws, the same for every recipe, so a cell does not depend on which other recipes run. Cells are resumable, and shared
by all searches in one folder.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..bench.forecast import passes
from ..bench.own_tables import HELD_OUT, OwnTables
from ..bench.pool import Engine
from ..bench.records import FOLDER
from ..bench.run import silent
from ..bench.spec import Study, Trial
from ..bench.store import Store
from ..bench.study import complete
from ..data.metrics import Metric
from ..data.prepare import Data
from ..data.splits import folds, units
from ..errors import UsageError
from ..files.atomic import write_json
from ..fitting.options import Options
from ..fitting.spelling import make_methods, make_procedure
from .budget import Budget
from .estimates import Array
from .halves import halves
from .race import Sheet
from .recipe import Recipe
from .row_scores import row_losses, row_scores

SPENT = "spent.json"  # seconds of earlier invocations
PROCEDURE_PASSES = 2.5  # cost of a procedure that did not run yet and cannot tell it, as a multiple of a plain training
FAILURES = 2  # trainings of a recipe that fail or collapse before it is dropped
APART = 1000  # cuts of the rows per seed of a search
SEEDS = 2**32  # number of seeds


@dataclass(frozen=True)
class Task:
    """What is searched: rows, models and the options that all recipes share.

    Attributes:
        table: Files and columns of the rows.
        data: The rows, checked.
        metric: Metric of the search.
        models: Directory or hub name by name.
        base: Options of every recipe.
        given: The options that were given, by name.
        k: Number of folds.
        repeats: Largest number of repeats.
        seed: Seed of halves, folds and trainings.
        num_seeds: Number of runs of the last fit, whose weights are averaged.
        size: Number of rows that a fold draws to train on; None for all that it has.
        unlabelled: Files of texts without labels.
        unlabelled_size: Number of these texts to draw; None for all.
    """

    table: OwnTables
    data: Data
    metric: Metric
    models: Mapping[str, str]
    base: Options
    given: Mapping[str, Any]
    k: int
    repeats: int
    seed: int
    num_seeds: int = 1
    size: int | None = None
    unlabelled: tuple[str, ...] = ()
    unlabelled_size: int | None = None

    def texts_for(self, recipe: Recipe) -> dict[str, Any]:
        """The texts without labels as arguments of `fit`; empty for a recipe that does not read them."""
        if not (self.unlabelled and recipe.reads_texts):
            return {}
        size = {} if self.unlabelled_size is None else {"unlabelled_size": self.unlabelled_size}
        return {"unlabelled": list(self.unlabelled), **size}

    def runs(self, recipe: Recipe) -> int:
        """Number of runs of the last fit with a recipe; one, where they would be equal or could not be averaged."""
        if recipe.frozen or any(method.draws_weights for method in make_methods(recipe.methods)):
            return 1
        return max(recipe.soup, self.num_seeds)

    @property
    def inside(self) -> int:
        """Number of rows that a fold trains on."""
        return round(len(self.data.train) * (self.k - 1) / self.k)

    def cut(self, repeat: int) -> int:
        """Number of the cut of the rows of a repeat. Each of its folds has a seed, as large as seeds may be."""
        return (self.seed * APART + repeat) % (SEEDS // self.k)

    def sheet(self) -> Sheet:
        """Halves and folds of the rows."""
        rows, problem = self.data.train, self.data.problem
        cuts = np.empty((self.repeats, len(rows)), dtype=int)
        for repeat in range(self.repeats):
            for number, (_, outside) in enumerate(folds(rows, problem, self.k, self.cut(repeat))):
                cuts[repeat, outside] = number
        together = units(rows)
        return Sheet(halves(problem.strata(rows["label"]), together, self.seed), cuts, together)

    def effort(self, recipe: Recipe) -> float:
        """Cost of a training as a multiple of a plain one, by its steps, methods, procedure and earlier trainings."""
        procedure, before = make_procedure(recipe.procedure), 0.0
        several = 1.0 if procedure is None else procedure.passes(self.base, self.inside)
        if several is None or recipe.before:
            from ..bench.run import make_plan
            from ..fitting.plan import open_model, passes_of_stages
            from ..fitting.randomness import as_found

            with silent(), as_found():
                plan = make_plan(self.trials([(recipe, 0)])[0])
                if recipe.before:
                    before = passes_of_stages(plan, open_model(plan)) / plan.steps
            if several is None and plan.procedure is not None:
                several = plan.procedure.cost(plan)
        several = PROCEDURE_PASSES if several is None else several
        return recipe.lengthened * passes(recipe.methods) * recipe.soup * several + before

    def trials(self, wanted: Sequence[tuple[Recipe, int]]) -> list[Trial]:
        """Runs of recipes in repeats, in this order, fold by fold."""
        recipes = {
            recipe.name: {
                **recipe.settings(self.base, self.inside),
                **recipe.trainings,
                **self.texts_for(recipe),
                **({"soup": recipe.soup} if recipe.soup > 1 else {}),
            }
            for recipe, _ in wanted
        }
        seeds = [self.cut(repeat) * self.k + f for repeat in sorted({r for _, r in wanted}) for f in range(self.k)]
        names = dict.fromkeys(recipe.model for recipe, _ in wanted)
        table = {key: value for key, value in dataclasses.asdict(self.table).items() if value and key != "name"}
        study = Study.of(
            {
                "name": "search",
                "models": {name: self.models[name] for name in names},
                "tasks": {self.table.name: json.loads(json.dumps(table))},
                "recipes": recipes,
                "options": dict(self.given),
                "train_sizes": [self.size],
                "seeds": seeds,
            }
        )
        made = {(t.spec["model"]["name"], t.spec["recipe"], t.spec["seeds"]["subset"]): t for t in study.runs()}
        return [
            made[recipe.model, recipe.name, self.cut(repeat) * self.k + fold]
            for recipe, repeat in wanted
            for fold in range(self.k)
        ]


@dataclass
class Cells:
    """The trials of a race on a user's table, see `race.Trials`.

    Args:
        task: What is searched.
        store: Folder of the records.
        budget: Budget of the search.
        engine: Engine that does the runs.
        heard: Is called with each cell that begins (False) or has ended (True).
    """

    task: Task
    store: Store
    budget: Budget
    engine: Engine
    heard: Callable[[Trial, bool], None] = lambda run, ended: None
    sheet: Sheet = field(init=False)
    runs: dict[tuple[Recipe, int], list[Trial]] = field(init=False, default_factory=dict)
    _records: dict[str, dict[str, Any]] = field(init=False, default_factory=dict)
    _under_way: set[str] = field(init=False, default_factory=set)
    _scores: dict[tuple[Recipe, int], tuple[Array, Array]] = field(init=False, default_factory=dict)
    _failures: Counter[Recipe] = field(init=False, default_factory=Counter)
    _efforts: dict[Recipe, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.sheet = self.task.sheet()
        self.started, self.before = time.monotonic(), _spent(self.store.folder)
        for file in self.store.folder.glob(f"{FOLDER}/*.json"):  # what has failed is tried again
            if json.loads(file.read_text(encoding="utf-8"))["status"] == "failed":
                self.store.forget(file.stem)

    # ---- trainings

    def do(self, wanted: Sequence[tuple[Recipe, int]]) -> None:
        """Do the repeats that are missing, until the budget is over; a recipe in trouble is left out.

        A training that has failed is done once more, as the reason may have passed.
        """
        new = [pair for pair in wanted if pair not in self.runs]
        if new:
            with silent():
                runs = self.task.trials(new)
            for i, pair in enumerate(new):
                self.runs[pair] = runs[i * self.task.k : (i + 1) * self.task.k]
            self._begin(runs)
        self._complete(wanted)
        if self._forget_failed(wanted):
            self._complete(wanted)

    def _forget_failed(self, wanted: Sequence[tuple[Recipe, int]]) -> bool:
        """Forget the failed trainings of recipes that may go on; return whether there are any."""
        again = [
            (recipe, run)
            for recipe, repeat in wanted
            if self.trouble(recipe) is None
            for run in self.runs[recipe, repeat]
            if (record := self._record(run)) is not None and record["status"] == "failed"
        ]
        for recipe, run in again:
            self._failures[recipe] += 1
            self.store.forget(run.id)
            del self._records[run.id]
        return bool(again)

    def _complete(self, wanted: Sequence[tuple[Recipe, int]]) -> None:
        owner = {run.id: recipe for (recipe, _), runs in self.runs.items() for run in runs}
        complete(
            self.store,
            [run for pair in wanted for run in self.runs[pair]],
            self.engine,
            lambda run: self.heard(run, False),
            self._ended,
            lambda run: self._allowed(run, owner[run.id]),
        )

    def _begin(self, runs: Sequence[Trial]) -> None:
        self.store.begin("# The runs of a search; planned.json lists them.\n", {run.id: run.title for run in runs})

    def _allowed(self, run: Trial, recipe: Recipe) -> bool:
        """Whether the budget allows one more training of a recipe that has not failed."""
        allowed = self.trouble(recipe) is None and self.left >= self.cost(recipe) / self.task.k
        if allowed:
            self._under_way.add(run.id)
        return allowed

    def _ended(self, run: Trial) -> None:
        write_json(self.store.folder / SPENT, {"seconds": self.spent})
        self.heard(run, True)

    # ---- cost

    @property
    def spent(self) -> float:
        """Seconds of this and earlier invocations."""
        return self.before + time.monotonic() - self.started

    @property
    def trainings(self) -> int:
        """Number of trainings that have begun; frozen recipes train nothing."""
        every = [run for runs in self.runs.values() for run in runs if _trains(run)]
        return sum(run.soup for run in every if run.id in self._under_way or self.store.has(run.id))

    @property
    def left(self) -> float:
        """Trainings or seconds that are left, without those of the last fit."""
        spent = self.trainings if self.budget.unit == "runs" else self.spent
        return self.budget.amount - self.last_fit - spent

    @property
    def whole(self) -> float:
        """Trainings or seconds of the whole budget, without those of the last fit."""
        return self.budget.amount - self.last_fit

    @property
    def last_fit(self) -> float:
        """Trainings or seconds that are set aside for a fit on all rows with the most costly recipe so far."""
        least = float(self.task.num_seeds) if self.budget.unit == "runs" else 0.0
        return max([least, *(self._last(recipe) for recipe, _ in self.runs if self.trouble(recipe) is None)])

    def further(self, recipe: Recipe) -> float:
        """Trainings or seconds that a fit on all rows with this recipe needs beside what is set aside."""
        return max(0.0, self._last(recipe) - self.last_fit)

    def _last(self, recipe: Recipe) -> float:
        runs = self.task.runs(recipe)
        if self.budget.unit == "runs":
            return float(runs)
        return 1.2 * self._cell_seconds(recipe) * runs / recipe.soup * self.task.k / (self.task.k - 1)

    def cost(self, recipe: Recipe) -> float:
        if self.budget.unit == "runs":
            return 0.0 if recipe.frozen else float(self.task.k * recipe.soup)
        return self.seconds(recipe) / self.engine.size

    def seconds(self, recipe: Recipe) -> float:
        """Seconds of a repeat: measured, or from the pace of other recipes of the model and the passes of a step."""
        return self.task.k * self._cell_seconds(recipe)

    def _cell_seconds(self, recipe: Recipe) -> float:
        if done := self._done(recipe):
            return float(np.mean([record["cost"]["seconds"] for record in done]))
        if recipe.frozen:
            return 0.0
        trained = {other for other, _ in self.runs if self._done(other) and not other.frozen}
        alike = {other for other in trained if other.model == recipe.model} or trained
        paces = [self._cell_seconds(other) / self._effort(other) for other in alike]
        return float(np.mean(paces)) * self._effort(recipe) if paces else 0.0

    def _effort(self, recipe: Recipe) -> float:
        """Cost of a training as a multiple of a plain one, before it ran."""
        if recipe not in self._efforts:
            try:
                self._efforts[recipe] = self.task.effort(recipe)
            except UsageError:  # its trainings will fail, and the arm be dropped with the reason
                self._efforts[recipe] = PROCEDURE_PASSES
        return self._efforts[recipe]

    def _done(self, recipe: Recipe) -> list[dict[str, Any]]:
        """Records of a recipe with scores."""
        return [record for record in self._of(recipe) if record["status"] == "done"]

    # ---- scores

    def has(self, recipe: Recipe, repeat: int) -> bool:
        runs = self.runs.get((recipe, repeat), [])
        return bool(runs) and all((record := self._record(run)) and record["status"] == "done" for run in runs)

    def values(self, recipe: Recipe, repeats: Sequence[int]) -> Array:
        return np.stack([self._scored(recipe, repeat)[0] for repeat in repeats])

    def losses(self, recipe: Recipe, repeats: Sequence[int]) -> Array:
        return np.stack([self._scored(recipe, repeat)[1] for repeat in repeats])

    def predictions(self, recipe: Recipe, repeat: int) -> np.ndarray:
        """Probabilities (rows, classes) or numbers (rows, 1) of all rows, each by the training that left it out."""
        names = [f"probability_{name}" for name in self.task.data.problem.names] or ["prediction"]
        tables = [pd.read_parquet(self.store.predictions(run.id)) for run in self.runs[recipe, repeat]]
        table = pd.concat([table[table["set"] == HELD_OUT] for table in tables]).set_index("row")
        return table.loc[self.task.data.train.index, names].to_numpy(dtype=float)

    def _scored(self, recipe: Recipe, repeat: int) -> tuple[Array, Array]:
        """Shares in the score and losses of all rows; the shares of a half know nothing of the other."""
        if (recipe, repeat) not in self._scores:
            problem, scores = self.task.data.problem, self.predictions(recipe, repeat)
            gold = problem.array(self.task.data.train["label"])
            values = np.empty(len(gold))
            for side in (self.sheet.half, ~self.sheet.half):
                values[side] = row_scores(problem, self.task.metric, gold[side], scores[side])
            self._scores[recipe, repeat] = values, row_losses(problem, gold, scores)
        return self._scores[recipe, repeat]

    def trouble(self, recipe: Recipe) -> str | None:
        """The error of the last of two failed trainings, or that two trainings collapsed; plain may collapse."""
        records = self._of(recipe)
        failed = [record for record in records if record["status"] == "failed"]
        if failed and len(failed) + self._failures[recipe] >= FAILURES:
            return str(failed[-1]["error"]).strip().splitlines()[-1]
        collapsed = sum(bool(record["training"]["failing"]) for record in records if record["status"] == "done")
        if collapsed >= FAILURES and recipe.arms:
            return f"the training loss did not fall in {collapsed} of {len(records)} trainings"
        return None

    def _of(self, recipe: Recipe) -> list[dict[str, Any]]:
        runs = [run for (other, _), runs in self.runs.items() if other == recipe for run in runs]
        return [record for run in runs if (record := self._record(run)) is not None]

    def _record(self, run: Trial) -> dict[str, Any] | None:
        if run.id not in self._records:
            if not self.store.has(run.id):
                return None
            self._records[run.id] = json.loads(self.store.record(run.id).read_text(encoding="utf-8"))
        return self._records[run.id]


def _trains(run: Trial) -> bool:
    return run.spec["options"].get("steps") != 0


def _spent(folder: Path) -> float:
    try:
        return float(json.loads((folder / SPENT).read_text(encoding="utf-8"))["seconds"])
    except (OSError, ValueError, KeyError):
        return 0.0
