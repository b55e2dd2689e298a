"""`steadytune methods`, `tasks` and `doctor`: what there is, and whether it works here."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as Grid

from .common import app, errors_in_one_line


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Method or procedure to show with all its options.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Write docs/methods.md to stdout.")] = False,
) -> None:
    """List methods and procedures by the option that takes them, or show one with its options, cost and source."""
    with errors_in_one_line():
        from ..errors import UsageError, suggest
        from ..methods import METHODS, catalogue

        if markdown:
            return typer.echo(catalogue.markdown(catalogue.own()), nl=False)
        if name is not None and name in METHODS:
            METHODS[name]  # an error for one of another package that cannot be loaded
        pages = {"--method": catalogue.pages(), **_trainings()}
        names = [known for listed in pages.values() for known in listed]
        if name is not None and name not in names:
            raise UsageError(f"unknown method {name!r}.{suggest(name, names)}")
    console = Console(highlight=False, markup=False)
    if name is not None:
        for flag, listed in pages.items():  # `dsee` is both a method and a procedure
            if name in listed:
                _show_method(console, flag, listed[name])
        return
    grid = Grid.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold")
    for flag, listed in pages.items():
        grid.add_row(flag, "")
        for page in listed.values():
            grid.add_row(f"  {page.name}", page.summary.replace("``", ""))
    console.print(grid)
    console.print("\nsteadytune methods NAME shows the options, cost and source of one.")


def _trainings() -> dict[str, dict[str, Any]]:
    """Pages about what `fit` takes by name beside methods, by option."""
    from ..fitting.procedures import PROCEDURES
    from ..fitting.stages.meta import LEARNERS
    from ..fitting.stages.pretraining import PRETRAININGS
    from ..methods.catalogue import page

    by_flag: dict[str, dict[str, Any]] = {"--procedure": PROCEDURES, "--pretrain": PRETRAININGS, "--meta": LEARNERS}
    return {flag: {name: page(name, cls) for name, cls in listed.items()} for flag, listed in by_flag.items()}


def _show_method(console: Console, flag: str, page: Any) -> None:
    """All there is to say about one method, which is given to the option ``flag``."""
    for paragraph in (page.summary, *page.notes):
        console.print(paragraph.replace("``", "") + "\n")
    grid = Grid(title=f"{flag} {page.name}:option=value,...", show_lines=True)
    for title in ("option", "type", "range", "default", "meaning"):
        grid.add_column(title, overflow="fold")
    for option in page.options:
        meaning = option.meaning.replace("``", "")
        grid.add_row(option.name, option.type, option.range, option.default, meaning)
    console.print(grid)
    facts = {
        "Acts at": ", ".join(page.moments),
        "Cost": page.cost and f"{page.cost.passes:.1f} plain passes a step; bytes per weight: {page.cost.memory}",
        "Not with": "; ".join(page.conflicts),
        "Departures from the authors": page.departures,
        "Paper": page.source,
    }
    for title, text in facts.items():
        if text:
            console.print(f"\n{title}: {text}")
    if page.paper is not None:
        console.print("\n" + page.paper.bibtex(), soft_wrap=True)


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(help="Show the files of one task, as they lie in a data root.")] = None,
) -> None:
    """List the benchmark tasks with their labels, metric and test sets, or the files and columns of one."""
    from ..tasks import TASKS

    if name is not None:
        return _show_files(name)
    grid = Grid(show_lines=True)
    for title in ("task", "text", "labels", "metric", "test sets", "out of domain"):
        grid.add_column(title, overflow="fold")
    for task in TASKS.values():
        labels = "\n".join(task.labels) or "a number"
        grid.add_row(
            task.name, "\n".join(task.text), labels, task.metric, "\n".join(task.tests), "\n".join(task.beyond)
        )
    Console().print(grid)


def _show_files(name: str) -> None:
    """The files of a task, with the columns that are read."""
    with errors_in_one_line():
        from ..tasks import find, layout

        task = find(name)
    grid = Grid(show_lines=True)
    for title in ("file", "text", "label column", "labels", "used as"):
        grid.add_column(title, overflow="fold")
    uses = ["training", *["test"] * len(task.tests), *["out of domain"] * len(task.beyond)]
    for file, use in zip(layout(task), uses, strict=True):
        labels = "\n".join(f"{number} = {label}" for number, label in enumerate(file.labels)) or "a number"
        grid.add_row(file.path, "\n".join(file.text), file.label, labels, use)
    Console().print(grid)


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check versions, devices and everything that steadytune relies on; exit code 1 when something fails."""
    with errors_in_one_line():
        from ..doctor import examine

        report = examine()
    typer.echo(report.json() if as_json else str(report))
    raise typer.Exit(1 if report.failed else 0)
