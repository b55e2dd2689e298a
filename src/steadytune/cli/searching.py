"""`steadytune search` and `curve`: which recipe for a table, and what more rows would bring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table as Grid

from .common import (
    ANEW,
    INPUT,
    OUTPUT,
    SEEDS,
    SELECTION,
    TRAINING,
    Address,
    BatchSize,
    Config,
    Cpus,
    EngineName,
    Epochs,
    Folds,
    Gpus,
    GroupColumn,
    LabelColumns,
    LabelSeparator,
    MaxLength,
    OneName,
    Subgroups,
    TextColumns,
    TrainTable,
    Workers,
    app,
    errors_in_one_line,
    make_engine,
    named_files,
    option,
    speaking,
)
from .fitting import _show
from .reading import _models


@app.command(cls=OneName)
def search(
    train: TrainTable,
    model: Annotated[
        list[str],
        option(INPUT, "Hugging Face model directory or hub name, or NAME=MODEL; repeatable, the first is plain's."),
    ],
    output: Annotated[Path, option(OUTPUT, "Directory for model and results: new or empty.")],
    text: TextColumns = None,
    label: LabelColumns = None,
    label_separator: LabelSeparator = None,
    group: GroupColumn = None,
    subgroup: Subgroups = None,
    kind: Annotated[str, option(INPUT, "auto, classification, multilabel or regression.")] = "auto",
    metric: Annotated[str | None, option(INPUT, "Metric by which recipes are compared.")] = None,
    test: Annotated[
        list[str] | None, option(INPUT, "Test file, or NAME=FILE; scored once, after the choice. Repeatable.")
    ] = None,
    unlabelled: Annotated[
        list[str] | None,
        option(INPUT, "File of texts without labels, from which more arms learn. Repeatable."),
    ] = None,
    unlabelled_size: Annotated[int | None, option(INPUT, "Draw this many texts without labels.")] = None,
    budget: Annotated[str, option(SELECTION, "Time or number of trainings: 30m, 2h, 100runs.")] = "30m",
    arms: Annotated[
        list[str] | None,
        option(
            SELECTION,
            "What to try: a method (dps_mix:update_ratio=0.1), options (head=logistic,pooling=mean), lr*3, lr/3, "
            "steps*2, pretrain=tapt or aux=FILE. Repeatable. [dim]\\[default: 14 arms in three stages][/]",
            "--arm",
            "--arms",
        ),
    ] = None,
    folds: Folds = None,
    num_seeds: Annotated[int, option(SELECTION, "Runs of the last fit; the model is the mean of their weights.")] = 1,
    workers: Workers = None,
    engine: EngineName = "local",
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    steps: Annotated[
        int | None, option(TRAINING, "Optimizer steps of plain fine-tuning.", "--steps", "--max-steps")
    ] = None,
    epochs: Epochs = None,
    lr: Annotated[float, option(TRAINING, "Learning rate of plain fine-tuning.", "--lr", "--learning-rate")] = 2e-5,
    batch_size: BatchSize = 16,
    max_length: MaxLength = None,
    bf16: Annotated[bool, option(TRAINING, "bfloat16 autocast; weights stay float32.")] = False,
    seed: Annotated[int, option(SEEDS, "Seed of halves, folds and trainings.")] = 0,
    resume: Annotated[bool, option(OUTPUT, "Go on with the search in the output directory.", "--resume")] = False,
    overwrite: Annotated[bool, option(OUTPUT, "Replace the search in the output directory.", "--overwrite")] = False,
    dry_run: Annotated[
        bool, option(OUTPUT, "Show arms, folds and the time of a training without a search.", "--dry-run")
    ] = False,
    quiet: Annotated[bool, option(OUTPUT, "The verdict only.", "--quiet")] = False,
    config: Config = None,
) -> None:
    """Find the best recipe for a table within a budget, fine-tune with it, and say how sure its gain is.

    Example: steadytune search reviews.csv --label stars --model bert-base-uncased --budget 30m --output out
    """
    given = dict(locals())
    go_on = ANEW if dry_run else "with --resume goes on with the trainings that have no record"
    with errors_in_one_line(go_on), speaking(quiet):
        from .. import searching

        same = ("label_separator", "group", "kind", "metric", "budget", "folds", "num_seeds", "seed", "steps", "epochs",
                "lr", "batch_size", "max_length", "bf16", "unlabelled_size")  # fmt: skip
        asked = {name: given[name] for name in same}
        asked |= {"model": _models(model), "text": text or None, "label": label or None, "arms": arms or None}
        asked |= {"unlabelled": unlabelled or None, "subgroup": subgroup or None}
        if dry_run:
            return typer.echo(str(searching.plan_search(train, **asked)))
        result = searching.search(
            train, output=output, tests=named_files(test or []), workers=workers or 0, resume=resume,
            overwrite=overwrite, progress=not quiet, engine=make_engine(engine, workers, address, cpus, gpus), **asked,
        )  # fmt: skip
    typer.echo(result.verdict)
    for line in searching.dropped_words(result.record):
        typer.echo(line)
    if result.record.get("curve"):
        typer.echo(result.record["curve"]["verdict"])
    if result.fitted.metrics:
        _show(result.fitted)
    typer.echo(f"Model: {output}")


@app.command(cls=OneName)
def curve(
    train: TrainTable,
    model: Annotated[str, option(INPUT, "Hugging Face model directory or hub name.")],
    output: Annotated[Path, option(OUTPUT, "Folder of the records; the same command goes on in it.")],
    text: TextColumns = None,
    label: LabelColumns = None,
    label_separator: LabelSeparator = None,
    group: GroupColumn = None,
    kind: Annotated[str, option(INPUT, "auto, classification, multilabel or regression.")] = "auto",
    metric: Annotated[str | None, option(INPUT, "Metric of the scores.")] = None,
    more: Annotated[int, option(INPUT, "Number of rows that would be added.")] = 200,
    repeats: Annotated[int, option(SELECTION, "Number of cross-validations of each size, from 1 to 4.")] = 1,
    folds: Folds = None,
    workers: Workers = None,
    engine: EngineName = "local",
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    steps: Annotated[int | None, option(TRAINING, "Optimizer steps.", "--steps", "--max-steps")] = None,
    epochs: Epochs = None,
    lr: Annotated[float, option(TRAINING, "Learning rate.", "--lr", "--learning-rate")] = 2e-5,
    batch_size: BatchSize = 16,
    max_length: MaxLength = None,
    seed: Annotated[int, option(SEEDS, "Seed of folds and trainings.")] = 0,
    quiet: Annotated[bool, option(OUTPUT, "The table only.", "--quiet")] = False,
    config: Config = None,
) -> None:
    """Tell what more labelled rows would bring: scores by number of rows, and a curve through them.

    Example: steadytune curve reviews.csv --label stars --model bert-base-uncased --more 200 --output curve
    """
    given = dict(locals())
    with errors_in_one_line("goes on with the trainings that have no record"), speaking(quiet):
        from .. import searching

        places = ("workers", "engine", "address", "cpus", "gpus")
        asked = {
            name: v for name, v in given.items() if name not in ("train", "text", "label", "quiet", "config", *places)
        }
        result = searching.curve(
            train, text=text or None, label=label or None, workers=workers or 0,
            engine=make_engine(engine, workers, address, cpus, gpus), **asked,
        )  # fmt: skip
    _show_curve(result)


def _show_curve(result: Any) -> None:
    """Scores by number of rows, and what more rows would bring."""
    from ..pages.words import interval, number
    from ..searching.words import bounds, shown

    grid = Grid(box=box.SIMPLE)
    for title in ("training rows", *result.scores):
        grid.add_column(title)
    for size in next(iter(result.scores.values())):
        cells = []
        for estimate in (by_size[size] for by_size in result.scores.values()):
            low, high = bounds(result.metric, *estimate.interval)
            cells.append(f"{number(shown(result.metric, estimate.value), 4)} {interval(low, high, 3)}")
        grid.add_row(str(size), *cells)
    console = Console()
    console.print(grid)
    console.print(result.verdict, soft_wrap=True, markup=False, highlight=False)
