"""One run of a study in this process: draw the rows, train, test, record."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import logging
import platform
import re
import subprocess
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..data.labels import is_of_numbers
from ..data.prepare import Data
from ..data.problem import Problem
from ..data.scores import subgroups_of
from ..data.tables import Table
from ..errors import UsageError
from ..fitting import plan as planning
from ..fitting.memory import peak_memory, reset_peak
from ..fitting.options import SEEDS, STOCK
from ..fitting.record import storable
from ..tasks import find, load
from ..version import __version__
from .places import expanded
from .records import SUBGROUPS
from .spec import FORMAT, Trial
from .store import Store

if TYPE_CHECKING:
    from ..fitting.fit_trainer import Trained
    from ..fitting.fitted_model import FittedModel

TEST_ROWS_SEED = 0  # which rows of a test set are used is the same for every run


def perform(given: tuple[str, Trial]) -> str:
    """Do a run and record it, unless it has a record or another process is doing it.

    Args:
        given: Folder of the study, and the run.

    Returns:
        "done" or "failed"; "before" if it had a record; "elsewhere" if another process is doing it.
    """
    folder, run = given
    store = Store(folder)
    with silent(), store.claim(run.id) as mine:
        if not mine:
            return "elsewhere"
        if store.has(run.id):
            return "before"
        record, predictions = attempt(run, store.model(run.id))
        store.write(record, predictions)
    return str(record["status"])


def attempt(run: Trial, model: Path) -> tuple[dict[str, Any], pd.DataFrame | None]:
    """Do a run; an error is recorded too.

    Args:
        run: The run.
        model: Folder for the trained model, if the study keeps models.

    Returns:
        The record, and the predictions; None for a run that failed.
    """
    started = time.perf_counter()
    try:
        return execute(run, model)
    except Exception as error:
        return failed(run, traceback.format_exc(), time.perf_counter() - started, str(error)), None
    finally:
        gc.collect()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Silence the messages of `fit`, which would hide the progress of the study."""
    logger = logging.getLogger("steadytune")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def execute(run: Trial, folder: Path) -> tuple[dict[str, Any], pd.DataFrame]:
    """Train and test; returns the record and the predictions. `folder` is for the model, if the study keeps models."""
    started = time.perf_counter()
    reset_peak()
    from ..merge import souped  # imports torch, which the others here do not

    plan = make_plan(run)
    pretrained = planning.open_model(plan)
    plan = planning.settled(plan, pretrained)
    with tempfile.TemporaryDirectory(prefix="steadytune-") as scratch:
        earlier, passes = 0.0, 0.0  # seconds and passes of the stages
        if plan.stages:
            from ..fitting.stages import after_stages  # as above

            began, passes = time.perf_counter(), planning.passes_of_stages(plan, pretrained)
            pretrained = after_stages(plan.stages, pretrained, Path(scratch))
            earlier = time.perf_counter() - began
        setup = planning.make_setup(plan, pretrained, Path(scratch))
        one = setup.train if plan.procedure is None else functools.partial(plan.procedure, setup)
        each = [setup.in_units(one(job)) for job in planning.runs(plan)]
        model = planning.fitted_model(plan, pretrained, [souped([t.model for t in each])])
        ended = time.perf_counter()
        answered = planning.answers(model, pretrained, plan.data)
        planning.tune_threshold(model, plan, answered)
        predictions, scores = planning.evaluate(model, plan.data, answered)
        tested = time.perf_counter() - ended
        if run.keep_model:
            model.save_pretrained(folder)
    record = {
        **_header(run, "done"),
        "error": None,
        "sets": {
            name: {**_about(name, run, plan.data, predictions), **s, **_by_subgroup(model, name, plan.data, answered)}
            for name, s in scores.items()
        },
        "training": _training(each, plan),
        "cost": {
            "seconds": time.perf_counter() - started,
            "train_seconds": earlier + sum(t.seconds for t in each),
            "test_seconds": tested,
            "passes": passes / max(each[0].steps, 1) + sum(t.passes for t in each),
            "peak_memory": peak_memory(),
        },
    }
    return record, storable(predictions)


def make_plan(run: Trial) -> planning.Plan:
    """The plan of `fit` for this run."""
    spec = run.spec
    table, tests, column = tables(run)
    rows = spec["tests"]["rows"]
    unnamed = {"standardize": False} if is_of_numbers(table.kind) else {}  # as `spec.in_use` leaves it out
    return planning.make_plan(
        table,
        validation_column=column,
        model=run.model,
        methods=run.methods,
        procedure=run.procedure,
        aux=run.aux or None,
        aux_steps=run.aux_steps,
        meta=run.meta,
        unlabelled=[*run.unlabelled] or None,
        unlabelled_size=run.unlabelled_size,
        pretrain=run.pretrain,
        num_seeds=run.soup,
        combine="soup",
        tests=tests if rows is None else {name: _head(test, rows) for name, test in tests.items()},
        metric=spec["metric"],
        train_size=spec["train_size"],
        probe=False,
        save_steps=0,
        progress=False,
        blank=run.own is not None and run.own.blank,
        apart=() if run.own is None else [expanded(file) for file in run.own.apart],
        changed=lambda train, problem: corrupted(train, problem, spec),
        **{**STOCK, **unnamed, **spec["options"]},
        **{f"{name}_seed": spec["seeds"][name] for name in SEEDS},
    )


def tables(run: Trial) -> tuple[Table, dict[str, Table], str | None]:
    """Training table, test tables, and the column that marks the held-out fold (None without folds).

    Raises:
        UsageError: A file is missing or has changed since the study began.
    """
    task, number = run.spec["task"], run.spec["seeds"]["subset"]
    if run.own is None:
        return *load(task["name"], run.data_root, beyond=run.spec["tests"]["out_of_domain"]), None
    if file := run.own.changed(task["files"]):
        raise UsageError(f"{file} was changed after the study had begun: start the study again.")
    table, tests = run.own.read()
    cut, column = run.own.cut(number) if run.own.crossed else (table, None)
    return dataclasses.replace(cut, kind=task["kind"]), tests, column


def _head(table: Table, rows: int) -> Table:
    """A draw of rows of a test set, the same in every run."""
    frame = table.frame
    kept = frame.sample(min(rows, len(frame)), random_state=TEST_ROWS_SEED).sort_index()
    return dataclasses.replace(table, frame=kept)


def corrupted(rows: pd.DataFrame, problem: Problem, spec: Mapping[str, Any]) -> pd.DataFrame:
    """Replace labels and thin out classes of the training rows, drawn with the seed of the subset.

    Args:
        rows: Training rows; their column `label` holds class names.
        problem: The classification problem, which knows the classes.
        spec: ``corruption`` with ``label_noise`` (share of the rows that get another class, uniform over the others)
            and ``imbalance`` (share that stays of every class but the first of the largest), ``seeds.subset``.
    """
    noise, imbalance = spec["corruption"]["label_noise"], spec["corruption"]["imbalance"]
    rng = np.random.default_rng([spec["seeds"]["subset"], 1])
    labels = rows["label"].to_numpy(copy=True)
    if noise:
        names = np.array(problem.names, dtype=object)
        hit = rng.choice(len(rows), round(noise * len(rows)), replace=False)
        shift = rng.integers(1, len(names), len(hit))
        numbers = {name: i for i, name in enumerate(problem.names)}
        labels[hit] = names[(np.array([numbers[label] for label in labels[hit]], dtype=int) + shift) % len(names)]
        rows = rows.assign(label=labels)
    if imbalance is not None:
        counts = rows["label"].value_counts().reindex(problem.names)
        keep = [
            rng.permutation(np.flatnonzero(labels == name))[: max(1, round(imbalance * count))]
            for name, count in counts.items()
            if name != counts.idxmax()
        ]
        rows = rows.iloc[np.sort(np.concatenate([np.flatnonzero(labels == counts.idxmax()), *keep]))]
    return rows


def failed(run: Trial, error: str, seconds: float, message: str | None = None) -> dict[str, Any]:
    """Record of a run that ended without a model."""
    text = error if message is None or message in error else f"{error}\n{message}"
    return {**_header(run, "failed"), "error": text, "sets": {}, "training": None, "cost": {"seconds": seconds}}


def _header(run: Trial, status: str) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "id": run.id,
        "spec": run.spec,
        "status": status,
        "metric": run.spec["metric"],
        "seen": list(run.seen),
        "context": context(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _about(name: str, run: Trial, data: Data, predictions: pd.DataFrame) -> dict[str, Any]:
    """Domain of a set, its number of rows, and the score of a constant prediction on it."""
    if run.own is None:
        outside = name not in {file.partition(":")[0] for file in find(run.spec["task"]["name"]).tests}
    else:
        outside = name in run.own.out_of_domain
    domain = "select" if name == "validation" else "out" if outside else "in"
    return {"domain": domain, "baseline": _baseline(data.tests[name], data, name, run.spec["metric"])}


def _by_subgroup(
    model: FittedModel, name: str, data: Data, answered: Mapping[str, np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Scores of each subgroup of a set, by its name; nothing for rows without subgroups."""
    rows = data.tests[name]
    if (parts := subgroups_of(rows)) is None:
        return {}
    coarser = data.coarser.get(name)
    return {
        SUBGROUPS: {
            str(part): model.judge(rows[parts == part], answered[name][parts == part], coarser)[1]
            for part in sorted(set(parts))
        }
    }


def _baseline(rows: pd.DataFrame, data: Data, name: str, metric: str) -> float | None:
    """Best score of predicting one class for all rows; None for a metric that a constant has no score in."""
    problem = data.problem.coarser(data.coarser.get(name) or {})
    gold = problem.array(rows["label"])
    if problem.metric(metric).needs_probabilities:
        return None
    compute = problem.metric(metric).compute
    values = [compute(gold, np.full(len(gold), n, dtype=object), problem.names) for n in problem.constants()]
    return max((value for value in values if value is not None), default=None)


def _training(each: Sequence[Trained], plan: planning.Plan) -> dict[str, Any]:
    """What is recorded of the trainings of a run: steps, loss and curve of the first."""
    return {
        "rows": len(plan.data.train),
        "steps": each[0].steps,
        "loss": each[0].loss,
        "failing": any(t.failing for t in each),
        "restarts": sum(t.failures for t in each),
        "curve": [list(point) for point in each[0].curve],
    }


# ---- context and cost -------------------------------------------------------------------------------------------


@functools.cache
def context() -> dict[str, Any]:
    """Versions, hardware and threads, which may change the last digits of a result."""
    import torch
    import transformers

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = "cpu" if accelerator is None else accelerator.type
    return {
        "steadytune": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "device": device,
        "hardware": torch.cuda.get_device_name() if device == "cuda" else _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    match = None
    if Path("/proc/cpuinfo").is_file():
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    return match[1] if match else platform.processor() or platform.machine()


def _commit() -> str | None:
    """The commit of a source checkout; None for an installed package."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
