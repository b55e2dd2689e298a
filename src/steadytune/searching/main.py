"""From a table to the best model that a budget finds: `search`.

torch and transformers are imported inside the functions that use them, so that help and data errors appear at once.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..bench.forecast import measure
from ..bench.own_tables import OwnTables
from ..bench.places import fingerprint_files
from ..bench.run import silent
from ..bench.spec import chosen_options
from ..bench.store import Store
from ..bench.study import opened
from ..data.guards import inspect, raise_errors
from ..data.prepare import prepare
from ..data.splits import units, usual_folds
from ..data.tables import Kind, Table
from ..errors import UsageError
from ..files.atomic import write_json, write_whole, writing
from ..fitting.card import model_card
from ..fitting.folder import RECORD, SEARCH, Output
from ..fitting.main import fit
from ..fitting.options import Options, python_value
from .budget import Budget
from .by_size import learning_curve, smaller
from .cells import Cells, Task
from .hard_rows import HARD_ROWS, hard_rows
from .own_rows import keep_apart, keep_rows, own_table
from .progress import Progress
from .race import Race, Rules, Stage
from .recipe import Recipe, probes, refuse_own, stages
from .record import recorded_recipe, search_record
from .report import PAGE, write_page

if TYPE_CHECKING:
    from ..bench.pool import Engine
    from ..fitting.fitted_model import FittedModel
    from ..fitting.record import FitResult

logger = logging.getLogger("steadytune")

LEAST_GROUPS = 4  # two in each half; with one its error would seem to be 0
MORE = 200  # rows of which the learning curve says what they would bring
FOUND = "found.json"  # in the folder of the cells: the result of the race
IN_UNITS = ("rmse", "mae")  # metrics in the unit of the labels


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Result of `search`.

    Attributes:
        output: A plain Hugging Face model directory, as of `fit`; ``steadytune.json`` has the search under ``search``.
        fitted: The `FitResult` of the last fit, on all rows.
        record: What was found: ``ship`` (recipe), ``claim`` (verdict, gain, level, smallest gain that these rows
            could show), ``arms``, ``standings``, ``untried``, ``dropped``.
    """

    output: Path
    fitted: FitResult
    record: dict[str, Any]

    @property
    def verdict(self) -> str:
        """What was found, in a few sentences."""
        return str(self.record["verdict"])

    @property
    def model(self) -> FittedModel:
        """The fitted model."""
        return self.fitted.model

    @property
    def best_recipe(self) -> str:
        """Name of the recipe of the model."""
        return str(self.record["ship"]["name"])

    def predict(self, rows: Any) -> np.ndarray:
        """Class names or numbers for texts, pairs of texts, or a table; see `FittedModel.predict`."""
        return self.model.predict(rows)

    def predict_proba(self, rows: Any) -> np.ndarray:
        """Probabilities (rows, classes); see `FittedModel.predict_proba`."""
        return self.model.predict_proba(rows)


@dataclass(frozen=True)
class SearchPlan:
    """What `search` would do.

    Attributes:
        rows: Number of rows.
        folds: Number of folds.
        stages: Names of the arms of each stage, on top of plain fine-tuning.
        seconds: Seconds of a plain training, from three measured steps.
        budget: The budget.
        num_seeds: Number of runs of the last fit.
    """

    rows: int
    folds: int
    stages: Mapping[str, Sequence[str]]
    seconds: float
    budget: Budget
    num_seeds: int = 1

    @property
    def trainings(self) -> int:
        """Number of plain trainings that the budget allows."""
        amount = self.budget.amount
        return int(amount if self.budget.unit == "runs" else amount / max(self.seconds, 1e-9))

    def __str__(self) -> str:
        lines = [f"{self.rows} rows, {self.folds} folds; a repeat of a recipe is {self.folds} trainings"]
        lines += [f"stage {name}: {', '.join(arms)}" for name, arms in self.stages.items()]
        lines.append(f"a plain training takes about {self.seconds:.1f} s, so the budget is {self.trainings} of them")
        if self.trainings < (least := 6 * self.folds + self.num_seeds):
            lines.append(
                f"below {least} trainings no gain can be shown: none are left that judge without having chosen"
            )
        return "\n".join(lines)


def search(
    train: Any,
    *,
    model: str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    output: str | Path,
    text: str | Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    label_separator: str | None = None,
    group: str | None = None,
    subgroup: str | Sequence[str] | None = None,
    kind: Kind = "auto",
    metric: str | None = None,
    tests: Mapping[str, Any] | None = None,
    unlabelled: str | Path | Sequence[str | Path] | None = None,
    unlabelled_size: int | None = None,
    budget: str = "30m",
    arms: Sequence[str] | None = None,
    folds: int | None = None,
    num_seeds: int = 1,
    seed: int = 0,
    workers: int = 0,
    engine: Engine | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> SearchResult:
    """Search the recipe for a table, fine-tune with it on all rows, and say how sure the gain is.

    Recipes are compared by cross-validation: every row is predicted by trainings that did not see it. They run in
    stages (head and pooling, schedule, one method). The better third of the arms of a stage, at least two, gets a
    second repeat. The rows are halved for scoring, and what one half has chosen is judged on the other. The model
    that is shipped is the best one by belief; what is claimed is a second decision, see ``record["claim"]``.

    Args:
        train: As of `fit`.
        model: Hugging Face model directory or hub name; several are compared, the first is that of plain fine-tuning.
        output: A new or empty directory.
        text: As of `fit`.
        label: As of `fit`.
        label_separator: As of `fit`.
        group: Column of groups; rows of one group stay in one fold, and in one half.
        subgroup: As of `fit`: methods read it, and the test rows of each are scored. Recipes are compared on all rows.
        kind: As of `fit`.
        metric: Metric by which recipes are compared; by default the first of the kind.
        tests: Test tables by name. They are scored once, after the choice.
        unlabelled: Files of texts without labels. With them the portfolio holds ``"pretrain=tapt"`` and
            ``"self-training"`` too; of a text that is in a fold's held-out rows, that fold learns nothing.
        unlabelled_size: Number of these texts to draw; all by default.
        budget: Time, or number of trainings: ``"30m"``, ``"2h"``, ``"100runs"``. The last fit is part of it.
        arms: What is tried: methods (``"dps_mix:update_ratio=0.1"``), procedures, options (``"head=logistic"``) and
            factors of options (``"lr*3"``), and trainings before the fit (``"pretrain=tapt"``, ``"aux=other.csv"``);
            by default a portfolio, `steadytune.searching.recipe.PORTFOLIO`.
        folds: Number of folds; by default 5, or 10 below 200 rows.
        num_seeds: Number of runs of the last fit. The model is the mean of their weights, as with
            ``combine="soup"`` of `fit`; what is claimed is of single runs. A frozen probe has one run, and so has a
            recipe that draws other weights in every run.
        seed: Seed of halves, folds and trainings.
        workers: Number of worker processes; 0 trains in this process.
        engine: Engine that does the trainings, instead of processes on this machine, such as `bench.cluster.Ray`.
        resume: Whether to go on with an interrupted search in `output`.
        overwrite: Whether to replace the search in `output`.
        progress: Whether to show progress.
        **options: Options of every recipe, as of `fit`: lr, batch_size, steps, epochs, max_length ...

    Raises:
        UsageError: The arguments or the data are not right, or plain fine-tuning fails.
        KeyboardInterrupt: On Ctrl-C or SIGTERM; recorded trainings are kept.

    Example:
        >>> search("train.csv", label="stars", model="bert-base-uncased", budget="30m", output="out")  # doctest: +SKIP
    """
    asked = {"budget": budget, "arms": None if arms is None else list(arms), "seed": seed, "options": dict(options)}
    limit, place = Budget.of(budget), Path(output)
    check_workers(workers)
    again = _check(place, resume, overwrite)
    cells_at = place / SEARCH
    with tempfile.TemporaryDirectory() as scratch:
        table = own_table(train, Path(scratch), text=text, label=label, metric=metric, label_separator=label_separator,
                          group=group, subgroup=subgroup, kind=kind, folds=folds)  # fmt: skip
        task = with_texts(make_task(table, _models(model), seed, options, num_seeds), unlabelled, unlabelled_size)
        _check_budget(limit, task)
        tried = _stages(arms, task)
        tested = _check_tests(table, tests)
        asked |= {"models": dict(task.models), "rows": table.files()["train"], **_read_as(task)}
        if again:
            _same_table(cells_at, asked)
        if table.subgroup:
            asked["subgroup"] = list(table.subgroup)
        if task.num_seeds > 1:
            asked["num_seeds"] = task.num_seeds
        if task.unlabelled:
            texts = fingerprint_files(map(Path, task.unlabelled))
            asked["unlabelled"] = {"files": texts, "size": task.unlabelled_size}
        if overwrite:
            shutil.rmtree(cells_at, ignore_errors=True)
        task = keep_rows(task, train, cells_at)
        if task.unlabelled or any(dict(arm.before).get("aux") for arm in _arms(tried, task)):
            task = keep_apart(task, tested, cells_at)
            asked |= {"apart": task.table.files().get("apart 0")} if task.table.apart else {}
        found = _found(cells_at, asked)
        if found is None:
            with opened(engine, workers) as used:
                cells = Cells(task, Store(cells_at), limit, used)
                race = Race(Recipe(next(iter(task.models))), tried, cells, cells.sheet, probes(task.models),
                            rules_of(task))  # fmt: skip
                with Progress(race, cells, progress):
                    outcome = race.run()
                curve = _curve(cells)
            found = {**search_record(race, outcome, cells, asked), "curve": curve}
            if curve is not None:
                found["trainings"] += len(smaller(task)) * task.k
            hard = hard_rows(cells, [race.plain, *race.frozen, *race.tried])
            if _of_one_fit(found) != _of_one_fit(_begun(cells_at)):
                _forget_begun_fit(place)
            with writing(cells_at):
                write_whole(cells_at / HARD_ROWS, hard.to_parquet)
                write_json(cells_at / FOUND, found)
        elif _record(place).get("search") == found and (place / PAGE).is_file() and not overwrite:
            raise UsageError(f"--resume: the search in {place} is finished. Give a larger budget, or --overwrite.")
        ship = recorded_recipe(found["ship"])
        logger.info("the search is over: now %s is fitted on all %d rows", ship, len(task.data.train))
        started, runs = again and _record(place).get("status") == "training", task.runs(ship)
        fitted = fit(
            train, model=ship.model, text=text, label=label, label_separator=label_separator, group=group,
            subgroup=subgroup, kind=kind, metric=metric, tests=tests, validation_share=0.0, seed=seed, output=place,
            resume=started, overwrite=overwrite or (again and not started), progress=progress, **ship.trainings,
            **task.texts_for(ship), **({"num_seeds": runs, "combine": "soup"} if runs > 1 else {}),
            **{**task.given, **ship.settings(task.base, len(task.data.train))},
        )  # fmt: skip
    _tell(fitted, found)
    return SearchResult(place, fitted, found)


def plan_search(
    train: Any,
    *,
    model: Any,
    budget: str = "30m",
    arms: Sequence[str] | None = None,
    num_seeds: int = 1,
    seed: int = 0,
    text: str | Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    folds: int | None = None,
    label_separator: str | None = None,
    group: str | None = None,
    subgroup: str | Sequence[str] | None = None,
    kind: Kind = "auto",
    metric: str | None = None,
    unlabelled: str | Path | Sequence[str | Path] | None = None,
    unlabelled_size: int | None = None,
    **options: Any,
) -> SearchPlan:
    """What `search` with these arguments would do; three steps are measured, and nothing is written.

    Raises:
        UsageError: As `search`.
    """
    limit = Budget.of(budget)
    with tempfile.TemporaryDirectory() as scratch:
        table = own_table(train, Path(scratch), text=text, label=label, metric=metric, label_separator=label_separator,
                          group=group, subgroup=subgroup, kind=kind, folds=folds)  # fmt: skip
        task = with_texts(make_task(table, _models(model), seed, options, num_seeds), unlabelled, unlabelled_size)
        _check_budget(limit, task)
        plain = Recipe(next(iter(task.models)))
        tried = {stage.name: [str(arm) for arm in stage.arms(plain)] for stage in _stages(arms, task)}
        with silent():
            (trial, *_) = task.trials([(plain, 0)])
            pace = measure(trial)
    return SearchPlan(len(task.data.train), task.k, tried, pace.seconds(task.base, 1.0), limit, num_seeds)


# ---- what is searched -------------------------------------------------------------------------------------------


def make_task(
    table: OwnTables, models: Mapping[str, str], seed: int, options: Mapping[str, Any], num_seeds: int = 1
) -> Task:
    """What is searched, checked.

    Raises:
        UsageError: The rows or the options are not right.
    """
    for name in options:
        refuse_own(name)
    if table.folds is not None and python_value("folds", table.folds, int) < 2:
        raise UsageError(f"folds must be 2 or more, got {table.folds}: leave it out for 5, or 10 below 200 rows.")
    if python_value("num_seeds", num_seeds, int) < 1:
        raise UsageError(f"num_seeds must be 1 or more, got {num_seeds}.")
    given = chosen_options("search", options)
    base = Options.of({"validation_share": 0.0, **{name: v for name, v in given.items() if v is not None}})
    data = table.examine()
    k = table.folds or usual_folds(data.train)
    rules = Rules()
    return Task(
        dataclasses.replace(table, folds=k), data, data.problem.metric(table.metric), models, base, given, k,
        rules.rungs + rules.fresh, Options.of({"seed": python_value("seed", seed, int)}).seed, num_seeds,
    )  # fmt: skip


def check_workers(workers: int) -> None:
    """Refuse a number of workers that would do nothing.

    Raises:
        UsageError: It is below 0.
    """
    if python_value("workers", workers, int) < 0:
        raise UsageError(f"workers must be 0 (trainings in this process) or more, got {workers}.")


def with_texts(task: Task, unlabelled: str | Path | Sequence[str | Path] | None, size: int | None) -> Task:
    """The task with texts without labels.

    Raises:
        UsageError: They are in no file, or a size is given without them.
    """
    given: list[Any] = (
        list(unlabelled or ()) if isinstance(unlabelled, (list, tuple)) or unlabelled is None else [unlabelled]
    )
    for source in given:
        if not (isinstance(source, (str, Path)) and Path(source).is_file()):
            what = repr(source) if isinstance(source, (str, Path)) else f"a {type(source).__name__}"
            raise UsageError(f"unlabelled of a search must be files, which its trainings read; got {what}.")
    if size is not None and not given:
        raise UsageError(f"unlabelled_size {size} draws from texts without labels: name them with unlabelled.")
    files = tuple(str(Path(source).absolute()) for source in given)
    return dataclasses.replace(task, unlabelled=files, unlabelled_size=size)


def _curve(cells: Cells) -> dict[str, Any] | None:
    """The learning curve, if the budget is enough for it and no training on fewer rows fails."""
    plain = Recipe(next(iter(cells.task.models)))
    if len(smaller(cells.task)) * cells.cost(plain) > cells.left:
        return None
    try:
        return learning_curve(cells.task, cells.store, cells.engine, MORE, 1).record()
    except UsageError as error:
        logger.warning("no learning curve: %s", error)
        return None


def rules_of(task: Task) -> Rules:
    """The rules of a race, with the spread of gains in the unit of the metric."""
    if task.metric.name not in IN_UNITS:
        return Rules()
    return Rules(least=0.02 * float(np.std(task.data.train["label"].astype(float))))


def _check_budget(budget: Budget, task: Task) -> None:
    """Refuse a number of trainings with which plain fine-tuning has no scores.

    Raises:
        UsageError: It is below a cross-validation and the last fit.
    """
    if budget.unit == "runs" and budget.amount < (least := task.k + task.num_seeds):
        last = "the last fit" if task.num_seeds == 1 else f"{task.num_seeds} for the last fit"
        raise UsageError(
            f"budget must be {least} or more trainings, got {budget.amount:.0f}: one for each of the {task.k} folds of "
            f"plain fine-tuning, and {last}."
        )


def _check_tests(table: OwnTables, tests: Mapping[str, Any] | None) -> list[pd.DataFrame]:
    """Read the test tables as the last fit will, so that a search does not end with a mistake in them.

    Returns:
        Their rows.

    Raises:
        UsageError: One is not right.
    """
    if tests is not None and not isinstance(tests, Mapping):
        raise UsageError(
            f"tests must be a dictionary of name and table, got {type(tests).__name__}: as in tests={{'test': table}}."
        )
    with silent():
        train, _ = table.read()
        given = {str(n): Table.of(rows, table.text, table.label, str(n)) for n, rows in (tests or {}).items()}
        data = prepare(train, given, validation_share=0.0)
        raise_errors(inspect(data, standardize=True))
    return [*data.tests.values()]


def _stages(arms: Sequence[str] | None, task: Task) -> list[Stage]:
    """The stages of a search, whose arms have been tried on plain fine-tuning.

    Raises:
        UsageError: An arm is none, or leaves no step; or the rows have too few groups to be halved.
    """
    if (groups := len({*units(task.data.train)})) < LEAST_GROUPS:
        raise UsageError(
            f"a search judges recipes on two halves of the groups, and needs {LEAST_GROUPS} groups or more to know how "
            f"sure it is: there are {groups}. Leave group out, or use fit."
        )
    made = stages(arms, task.base, [*task.models], _pooling(task), bool(task.unlabelled))
    for arm in _arms(made, task):
        arm.settings(task.base, task.inside)
    return made


def _arms(tried: Sequence[Stage], task: Task) -> list[Recipe]:
    """The arms of all stages on top of plain fine-tuning."""
    plain = Recipe(next(iter(task.models)))
    return [arm for stage in tried for arm in stage.arms(plain)]


def _pooling(task: Task) -> dict[str, str]:
    """What the head of each model reads in plain fine-tuning."""
    from ..bench.run import make_plan
    from ..fitting.plan import open_model
    from ..fitting.randomness import as_found

    with silent(), as_found():
        return {name: open_model(make_plan(task.trials([(Recipe(name), 0)])[0])).pooling for name in task.models}


def _models(given: Any) -> dict[str, str]:
    """Models by name: the last part of their path, or the names given."""
    if not isinstance(given, (str, Path)) and not given:
        raise UsageError(f"model must name a Hugging Face model directory or hub name, got {given!r}.")
    if isinstance(given, Mapping):
        return {str(name): str(path) for name, path in given.items()}
    paths = [str(path) for path in ([given] if isinstance(given, (str, Path)) else given)]
    named = {(Path(path).resolve() if Path(path).exists() else Path(path)).name: path for path in paths}
    if len(named) < len(paths):
        raise UsageError(
            "two models have one name: give them names, as in model={'a': PATH, 'b': PATH}, on the command line "
            "--model a=PATH --model b=PATH."
        )
    return named


# ---- the folder -------------------------------------------------------------------------------------------------


def _check(place: Path, resume: bool, overwrite: bool) -> bool:
    """Check the output folder; return whether a search in it goes on.

    Raises:
        UsageError: It holds something else, or a search that is not to be touched.
    """
    begun = (place / SEARCH).is_dir()
    if resume and overwrite:
        raise UsageError("give --resume (go on) or --overwrite (start anew), not both.")
    if resume and not begun:
        raise UsageError(f"--resume: no search in {place}. Leave --resume out to start one.")
    if begun and not resume and not overwrite:
        raise UsageError(
            f"output {place} already holds a search: go on with --resume, start anew with --overwrite, or choose "
            "another --output DIR."
        )
    if not begun:
        Output(place).check(False, overwrite)
    elif not (place / RECORD).is_file() and (others := Output(place).others()):
        raise UsageError(f"output {place} holds a search and {others[0].name}, which is not of it: move that away.")
    return resume


def _record(place: Path) -> dict[str, Any]:
    """The record of the last fit; empty before it."""
    try:
        return dict(json.loads((place / RECORD).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _read_as(task: Task) -> dict[str, Any]:
    """How the rows are read and scored."""
    table, (text, label) = task.table, (task.data.table or task.table.read()[0]).columns
    return {
        "text": text, "label": label, "label_separator": table.label_separator, "group": table.group,
        "kind": task.data.problem.kind, "metric": task.metric.name, "folds": task.k,
    }  # fmt: skip


def _same_table(folder: Path, asked: Mapping[str, Any]) -> None:
    """Refuse to go on with a search that has found something for other labels, by another metric or in other folds.

    Raises:
        UsageError: What was found is not about what is asked.
    """
    then, now = _begun(folder).get("asked", {}), json.loads(json.dumps(asked, default=str))
    named = ("text", "label", "label_separator", "group", "kind", "metric", "folds")
    other = [
        f"{name} was {then[name]!r}, is {now[name]!r}" for name in named if name in then and then[name] != now[name]
    ]
    if other:
        raise UsageError(
            f"--resume: the search in {folder.parent} was started otherwise: {'; '.join(other)}. "
            "Give the same options, or start anew with --overwrite."
        )


def _begun(folder: Path) -> dict[str, Any]:
    """The result of the last race that has ended; empty before it."""
    try:
        return dict(json.loads((folder / FOUND).read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _of_one_fit(found: Mapping[str, Any]) -> Any:
    """What decides the last fit; two races of which it is equal may share one."""
    ship = {name: value for name, value in found.get("ship", {}).items() if name != "belief"}
    asked = {name: value for name, value in found.get("asked", {}).items() if name not in ("budget", "arms")}
    return json.loads(json.dumps([ship, asked], default=str))


def _forget_begun_fit(place: Path) -> None:
    """Remove a last fit that was interrupted, which would not go on with another recipe."""
    if _record(place).get("status") == "training":
        Output(place).clear()
        (place / RECORD).unlink()


def _found(folder: Path, asked: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a race that has ended before, if the same was asked."""
    found = _begun(folder)
    return found if found.get("asked") == json.loads(json.dumps(asked, default=str)) else None


def _tell(fitted: FitResult, found: Mapping[str, Any]) -> None:
    """Add the search to the record and the card of the last fit, and write its page."""
    folder = fitted.output
    record = {**json.loads((folder / RECORD).read_text(encoding="utf-8")), "search": found}
    card = model_card(record, fitted.metrics, fitted.metric)
    with writing(folder):
        write_whole(folder / "README.md", lambda part: part.write_text(card, encoding="utf-8"))
        write_json(folder / RECORD, {**record, "files": [*record["files"], PAGE]})
    write_page(folder)
