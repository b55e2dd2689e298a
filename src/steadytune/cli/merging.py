"""`steadytune merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import INPUT, OUTPUT, LabelColumns, LabelSeparator, app, errors_in_one_line, option


@app.command()
def merge(
    models: Annotated[list[Path], typer.Argument(help="Hugging Face model directories of one architecture.")],
    output: Annotated[Path, option(OUTPUT, "Directory for the merged model: new or empty.")],
    how: Annotated[
        str,
        typer.Option(
            help="uniform: their mean (a soup); greedy: the mean of those that do not lower the score; fisher: the "
            "mean in which each weight counts by its Fisher information; interpolate: (1 - alpha) base + alpha model "
            "(WiSE-FT); paint: the same with the best alpha; add: base + alpha times the sum of (model - base) (task "
            "arithmetic)."
        ),
    ] = "uniform",
    base: Annotated[
        Path | None, typer.Option(help="Directory of the pre-trained model, for interpolate, paint and add.")
    ] = None,
    alpha: Annotated[float, typer.Option(help="Share of the model, or factor of the sum.")] = 0.5,
    validation: Annotated[
        list[str] | None,
        option(INPUT, "File of labelled text to score the result on; greedy, fisher and paint use it. Repeatable."),
    ] = None,
    text: Annotated[
        list[str] | None, option(INPUT, "Its text column; give it twice for pairs. [dim]\\[default: found][/]")
    ] = None,
    label: LabelColumns = None,
    label_separator: LabelSeparator = None,
    metric: Annotated[str | None, option(INPUT, "Metric of the score; greedy and paint choose by it.")] = None,
    fisher_labels: Annotated[
        str | None,
        typer.Option(
            help="Labels of the Fisher information: expected (of all classes), sampled (predicted) or true. "
            "[dim]\\[default: expected for one class a row, else true][/]"
        ),
    ] = None,
) -> None:
    """Merge models that were fine-tuned from the same weights into one Hugging Face model directory.

    Example: steadytune merge run-1 run-2 run-3 --output soup
    """
    with errors_in_one_line():
        from ..fitting.merge_folders import merge_folders

        said = merge_folders(
            models, output, how=how, base=base, alpha=alpha, validation=validation or (), text=text, label=label,
            label_separator=label_separator, metric=metric, fisher_labels=fisher_labels,
        )  # fmt: skip
    if said:
        typer.echo(said)
    typer.echo(f"Model: {output}")
