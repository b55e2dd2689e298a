"""Do the runs of a study in worker processes; an interrupted study continues where it stopped."""

from __future__ import annotations

import logging
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn

from ..data.metrics import smaller_is_better
from ..errors import UsageError, one_line
from .pool import Engine, Here, Outcome, Pool, cores, slots, visible_gpus
from .records import FOLDER, read_record, read_records
from .spec import Study, Trial
from .store import Store, checked

logger = logging.getLogger("steadytune")

WORK = "steadytune.bench.run:perform"
PATIENCE = 2.0  # seconds between checks of runs that another invocation is doing


@dataclass(frozen=True)
class Result:
    """Result of an invocation.

    Attributes:
        folder: Folder of the study.
        done: Number of runs with scores, including those of earlier invocations.
        failed: Number of runs without scores.
    """

    folder: Path
    done: int
    failed: int


def run_study(
    study: Study,
    output: str | Path,
    *,
    data_root: str | Path | None = None,
    workers: int = 1,
    filters: Sequence[str] = (),
    timeout: float | None = None,
    retry_failed: bool = False,
    engine: Engine | None = None,
    progress: bool = True,
) -> Result:
    """Do every run of a study that the folder has no record of.

    Several invocations on one folder share the work.

    Args:
        study: The study.
        output: Folder of the records: a new one, or that of this study.
        data_root: Folder of the benchmark tasks, instead of the study's own.
        workers: Number of worker processes, which share cores and GPUs. 0 does all runs in this process.
        filters: Conditions such as ``task=sst2``; only runs that match all of them are done.
        timeout: Largest time for a run, in seconds. A run that takes longer is recorded as failed.
        retry_failed: Whether to do failed runs again.
        engine: Engine that does the runs, instead of processes on this machine, such as `cluster.Ray`.
        progress: Whether to show progress: a bar on a terminal, else one line for each run.

    Raises:
        UsageError: A model, a data file, a filter, the time limit or the folder is not right.
    """
    store = Store(checked(output))
    planned = study.runs(data_root)
    runs = chosen(planned, filters)
    if workers < 0:
        raise UsageError(f"workers must be 0 (runs in this process) or more, got {workers}.")
    if timeout is not None and not timeout > 0:
        raise UsageError(f"timeout must be more than 0 seconds, got {timeout:g}: leave it out for no limit.")
    if timeout is not None and engine is None and not workers:
        raise UsageError(
            f"timeout {timeout:g} needs a worker process, and workers is 0: nothing can end a run in this process. "
            "Give workers 1 or more, or leave timeout out."
        )
    _check_tables(store, planned)
    store.begin(study.text(store.folder), {run.id: run.title for run in planned})
    if retry_failed:
        for run in runs:
            if store.has(run.id) and _status(store, run) == "failed":
                store.forget(run.id)
    _tell_lacking_models(store, runs)
    with opened(engine, workers, timeout) as used, Progress(store, runs, progress) as shown:
        complete(store, runs, used, shown.begin, shown.update)
    return Result(store.folder, shown.counts["done"], shown.counts["failed"])


def complete(
    store: Store,
    runs: Sequence[Trial],
    engine: Engine,
    begun: Callable[[Trial], None],
    ended: Callable[[Trial], None],
    allowed: Callable[[Trial], bool] = lambda run: True,
) -> None:
    """Do the runs that have no record; those that another invocation is doing are waited for.

    Args:
        store: Folder of the records, begun.
        runs: The runs, in the order in which they begin.
        engine: Engine whose tasks are pairs of the folder and a run, and whose results are those of `WORK`.
        begun: Is called with each run that begins.
        ended: Is called with each run that ends.
        allowed: Is asked before a run begins; a run that is not allowed is left out.
    """
    while missing := [run for run in runs if not store.has(run.id)]:
        elsewhere = tried = 0
        tasks = ((str(store.folder), run) for run in missing if allowed(run))
        for outcome in engine.map(tasks, lambda task: begun(task[1])):
            tried += 1
            elsewhere += _settle(store, outcome)
            ended(outcome.task[1])
        if not tried:
            return
        if elsewhere == tried:
            time.sleep(PATIENCE)


def _check_tables(store: Store, runs: Sequence[Trial]) -> None:
    """Raise if the folder has records of another table under the name of an own table.

    The report would compare scores of different tables.
    """
    now = {run.spec["task"]["name"]: run for run in runs if run.own is not None}
    records = read_records(store.folder)[0] if now and (store.folder / FOLDER).is_dir() else []
    for record in records:
        then = record["spec"]["task"]
        run = now.get(then["name"])
        if run is None or run.spec["task"] == then:
            continue
        assert run.own is not None
        here = run.spec["task"]
        file = run.own.changed(then.get("files", {}))
        key = next((key for key in here if key not in ("files", "fingerprint") and here[key] != then.get(key)), "files")
        what = f"{file} has changed" if file else f"its {key} was {then.get(key)!r} and is {here[key]!r} now"
        raise UsageError(
            f"task {then['name']}: {what} since runs in {store.folder} were recorded, so scores cannot be "
            "compared: choose another --output DIR, or undo the change."
        )


def _tell_lacking_models(store: Store, runs: Sequence[Trial]) -> None:
    """Warn of models that are asked for and will not be written, because their runs are done."""
    kept = [run for run in runs if run.keep_model and store.has(run.id) and not store.model(run.id).is_dir()]
    lacking = [run for run in kept if _status(store, run) == "done"]
    if lacking:
        logger.warning(
            "keep_models is true, but runs that were done without it have no model; this is so of %d, such as %s (%s). "
            "Remove their records from %s to train them again, or choose another output folder.",
            len(lacking), lacking[0].id, lacking[0].title, store.folder / FOLDER,
        )  # fmt: skip


@contextmanager
def opened(engine: Engine | None, workers: int, timeout: float | None = None) -> Iterator[Engine]:
    """The engine that is given, or worker processes on this machine until the end; with 0 workers, this process."""
    if engine is not None or not workers:
        yield engine or Here(WORK)
        return
    with closing(Pool(WORK, slots(workers, cores(), visible_gpus()), timeout)) as pool:
        yield pool


def chosen(runs: Sequence[Trial], filters: Sequence[str]) -> list[Trial]:
    """The runs that match every filter.

    Raises:
        UsageError: No run matches, or a filter is malformed.
    """
    matching_runs = [run for run in runs if run.matches(filters)]
    if not matching_runs:
        raise UsageError(f"no run matches the filter {' '.join(filters)}.")
    return matching_runs


def _settle(store: Store, outcome: Outcome) -> bool:
    """Record the failure of a worker; return whether another invocation is doing the run."""
    _, run = outcome.task
    if outcome.error is not None:
        from .run import failed

        with store.claim(run.id) as mine:
            if mine and not store.has(run.id):
                store.write(failed(run, outcome.error, 0.0))
    return outcome.value == "elsewhere"


def _status(store: Store, run: Trial) -> str:
    return str(_read(store, run)["status"])


def _read(store: Store, run: Trial) -> dict[str, Any]:
    file = store.record(run.id)
    try:
        return read_record(file)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{file} is no record ({one_line(error)}): remove it, so that the run is done again."
        ) from error


class Progress:
    """Runs done, failed and remaining, and the best recipe so far: a bar on a terminal, else one line for each run.

    The bar or the first line appears before the first run begins.
    """

    def __init__(self, store: Store, runs: Sequence[Trial], shown: bool) -> None:
        self.store, self.total, self.shown = store, len(runs), shown
        self.counts: Counter[str] = Counter()
        self.scores: dict[tuple[str, str], list[float]] = {}
        self.seen: set[str] = set()
        for run in runs:
            self._count(run)
        self.before = len(self.seen)
        columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
        self.bar = rich.progress.Progress(*columns, console=Console(stderr=True), disable=not shown or not _terminal())
        self.row = self.bar.add_task("starting", total=self.total, completed=self.before)

    def __enter__(self) -> Progress:
        self.bar.start()
        self._say("%d runs, %d of them done before", self.total, self.before)
        return self

    def __exit__(self, *about: object) -> None:
        self.bar.stop()

    def begin(self, run: Trial) -> None:
        """Name a run that begins, in lines only until the first run has ended: later lines name the runs that end."""
        self.bar.update(self.row, description=f"{run.title} ...")
        if len(self.seen) == self.before:
            self._say("%s has begun", run.title)

    def update(self, run: Trial) -> None:
        """Count a run if it has a record by now."""
        if self._count(run):
            self.bar.update(self.row, completed=len(self.seen), description=self.line(run))
            self._say("%d/%d %s: %s", len(self.seen), self.total, run.title, self.line(run))

    def _say(self, text: str, *values: object) -> None:
        if self.shown and not _terminal():
            logger.info(text, *values)

    def _count(self, run: Trial) -> bool:
        """Count a run if it has a record that was not counted yet; return whether it has."""
        if run.id in self.seen or not self.store.has(run.id):
            return False
        record = _read(self.store, run)
        self.seen.add(run.id)
        self.counts[record["status"]] += 1
        value = headline(record)
        if value is not None:
            self.scores.setdefault((run.spec["task"]["name"], run.spec["recipe"]), []).append(value)
        return True

    def line(self, run: Trial) -> str:
        """Counts, and the best recipe on the task of this run."""
        task = run.spec["task"]["name"]
        remaining = self.total - len(self.seen)
        sign = -1 if smaller_is_better(run.spec["metric"]) else 1
        best = max(self._means(task, sign), default=None)
        ahead = "" if best is None else f", best on {task}: {best[1]} {sign * best[0]:.3f}"
        return f"{self.counts['failed']} failed, {remaining} to do{ahead}"

    def _means(self, task: str, sign: int) -> Iterator[tuple[float, str]]:
        for (name, recipe), values in self.scores.items():
            if name == task:
                yield sign * sum(values) / len(values), recipe


def headline(record: dict[str, Any]) -> float | None:
    """Score of the task's metric on its first in-domain test set."""
    inside = [about for about in record["sets"].values() if about["domain"] == "in"]
    return inside[0].get(record["metric"]) if inside else None


def _terminal() -> bool:
    return sys.stderr.isatty()
