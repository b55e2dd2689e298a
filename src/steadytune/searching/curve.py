"""`steadytune curve`: scores of plain fine-tuning and of the frozen probe by number of rows, and what more would bring.

torch is imported inside the functions that use it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..bench.pool import Engine
from ..bench.store import Store, checked
from ..bench.study import opened
from ..data.tables import Kind
from ..errors import UsageError
from ..files.atomic import write_json, writing
from ..fitting.options import python_value
from .by_size import LearningCurve, check_sizes, learning_curve
from .main import check_workers, make_task
from .own_rows import keep_rows, own_table

CURVE = "curve.json"


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
    check_workers(workers)
    place = checked(output)
    with tempfile.TemporaryDirectory() as scratch:
        table = own_table(train, Path(scratch), text=text, label=label, metric=metric, label_separator=label_separator,
                          group=group, kind=kind, folds=folds)  # fmt: skip
        task = make_task(table, {Path(model).name: str(model)}, seed, options)
        if not 1 <= repeats <= task.repeats:
            raise UsageError(f"repeats must lie between 1 and {task.repeats}, got {repeats}.")
        check_sizes(task)
        task = keep_rows(task, train, place)
        with opened(engine, workers) as used:
            found = learning_curve(task, Store(place), used, more, repeats)
    with writing(place):
        write_json(place / CURVE, found.record())
    return found
