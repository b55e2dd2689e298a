"""`steadytune bench` and `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import (
    INPUT,
    OUTPUT,
    SEEDS,
    SELECTION,
    TRAINING,
    Address,
    Config,
    Cpus,
    EngineName,
    Gpus,
    Workers,
    app,
    errors_in_one_line,
    make_engine,
    models_by_name,
    option,
    speaking,
)


@app.command()
def bench(
    study: Annotated[str, typer.Argument(help="Study file (YAML), or a preset: stick, glue-small, low-resource ...")],
    output: Annotated[
        Path | None, option(OUTPUT, "Folder of the records. [dim]\\[default: runs/NAME-OF-THE-STUDY][/]")
    ] = None,
    model: Annotated[
        list[str] | None,
        option(INPUT, "Model directory or hub name, or NAME=MODEL, instead of the study's; repeatable."),
    ] = None,
    data_root: Annotated[Path | None, option(INPUT, "Folder of the benchmark tasks.", envvar="STEADYTUNE_DATA")] = None,
    seeds: Annotated[
        int | None, option(SEEDS, "Number of seeds, instead of the study's: N does runs with seeds 0 to N-1.")
    ] = None,
    filters: Annotated[
        list[str] | None,
        option(
            SELECTION,
            "Only runs with KEY=PATTERN (or PATTERN|PATTERN), KEY one of model, task, recipe, size, seed; repeatable.",
            "--filter",
        ),
    ] = None,
    workers: Workers = None,
    engine: EngineName = "local",
    address: Address = None,
    cpus: Cpus = None,
    gpus: Gpus = None,
    timeout: Annotated[float | None, option(TRAINING, "Seconds after which a run counts as failed.")] = None,
    retry_failed: Annotated[bool, option(TRAINING, "Do failed runs again.", "--retry-failed")] = False,
    dry_run: Annotated[
        bool,
        option(OUTPUT, "List the runs and estimate their minutes from a few steps.", "--dry-run"),
    ] = False,
    quiet: Annotated[bool, option(OUTPUT, "No progress.", "--quiet")] = False,
    config: Config = None,
) -> None:
    """Run a study: models x tasks x sizes x recipes x seeds, with one record for each run. Recorded runs are skipped.

    Example: steadytune bench stick --model bert-base-uncased --data-root data --workers 2; then: steadytune report
    runs/stick
    """
    with errors_in_one_line("goes on with the runs that have no record"):
        from ..bench.spec import Study
        from ..bench.study import run_study

        models = models_by_name(model) if model else None
        plan = Study.read(study, models=models, seeds=seeds)
        folder = output or Path("runs", plan.name)
        if dry_run:
            return _show_runs(plan, folder, data_root, filters or [])
        with speaking(quiet):
            result = run_study(
                plan, folder, data_root=data_root, workers=1 if workers is None else workers, filters=filters or [],
                timeout=timeout, retry_failed=retry_failed, progress=not quiet,
                engine=make_engine(engine, workers, address, cpus, gpus, timeout),
            )  # fmt: skip
    typer.echo(f"{result.done} runs done, {result.failed} failed: {result.folder}")
    if result.failed:
        raise typer.Exit(1)


def _show_runs(study: Any, folder: Path, data_root: Path | None, filters: list[str]) -> None:
    """Print the runs of a study, and how long they would take."""
    from ..bench.forecast import forecast
    from ..bench.store import Store
    from ..bench.study import chosen

    store, runs = Store(folder), chosen(study.runs(data_root), filters)
    missing = [run for run in runs if not store.has(run.id)]
    for run in runs:
        typer.echo(f"{run.id} {'to do' if run in missing else 'done'}: {run.title}")
    typer.echo(f"{len(runs)} runs, {len(runs) - len(missing)} of them done; records go to {folder}")
    if missing:
        typer.echo(str(forecast(missing, store)))


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(help="The folder of a bench, or the output of a fit.")],
    output: Annotated[
        Path | None, option(OUTPUT, "Directory for the files. [dim]\\[default: the folder itself][/]")
    ] = None,
    metric: Annotated[
        str | None, option(INPUT, "Metric to report of a bench. [dim]\\[default: each task's headline metric][/]")
    ] = None,
    config: Config = None,
) -> None:
    """Report a bench or a fit on self-contained pages, without scripts or network.

    Of a bench: report.html with tables, paired comparisons and figures, the same as report.md, and the numbers as
    runs.csv (a row per run and set) and summary.csv. Of a fit: report.html, which every fit also writes itself.

    Example: steadytune report runs/glue --output site
    """
    with errors_in_one_line(), speaking(quiet=False):
        from ..errors import UsageError
        from ..fitting.folder import RECORD

        if not (folder / RECORD).is_file():
            from ..bench.report.write import write_report

            page = write_report(folder, output, metric)
        elif metric is not None:
            raise UsageError(
                f"--metric is for the folder of a bench, and {folder} is the output of a fit: leave it out."
            )
        else:
            from ..fitting.report_page import write_page

            page = write_page(folder, output=output)
    typer.echo(f"report: {page}")
