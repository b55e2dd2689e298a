"""`steadytune predict`, `probe` and `inspect`: what a model says of the rows of a table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table as Grid

from .common import (
    INPUT,
    OUTPUT,
    SEEDS,
    SELECTION,
    TRAINING,
    Config,
    GroupColumn,
    LabelColumns,
    LabelSeparator,
    MaxLength,
    OneName,
    TextColumns,
    TrainTable,
    app,
    errors_in_one_line,
    models_by_name,
    named_files,
    named_model,
    option,
    speaking,
)


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="The --output of a fit.")],
    table: Annotated[str, typer.Argument(help="CSV, TSV, JSON-lines or Parquet file with the same text columns.")],
    output: Annotated[
        Path, option(OUTPUT, "File to write: .csv, .tsv, .jsonl or .parquet, one row per row of the table.")
    ] = Path("predictions.csv"),
    text: Annotated[list[str] | None, option(INPUT, "Text column, if its name differs from training.")] = None,
    keep: Annotated[
        str | None,
        option(OUTPUT, "Columns to write beside the predictions, as in id,text. [dim]\\[default: all][/]"),
    ] = None,
    on_empty: Annotated[
        str, option(INPUT, "Rows without a text: skip writes them without a prediction, error refuses the table.")
    ] = "skip",
    overwrite: Annotated[bool, option(OUTPUT, "Replace the file.", "--overwrite")] = False,
    quiet: Annotated[bool, option(OUTPUT, "No progress bar.", "--quiet")] = False,
    config: Config = None,
) -> None:
    """Predict labels (and probabilities) for a table of text of any size.

    Example: steadytune predict out new.csv --output labelled.csv --keep id
    """
    with errors_in_one_line(), speaking(quiet):
        from ..fitting.fitted_model import FittedModel
        from ..fitting.predict_file import check_output, predict_file

        check_output(output, [table, model], overwrite)
        columns = None if keep is None else [name.strip() for name in keep.split(",") if name.strip()]
        done = predict_file(
            FittedModel.load(model), table, output, text=text or (), keep=columns,
            on_empty=on_empty, overwrite=overwrite, progress=not quiet,
        )  # fmt: skip
    without = f", none for {len(done.empty)} without text" if done.empty else ""
    typer.echo(f"{done.rows - len(done.empty)} predictions{without}: {output}")


@app.command(cls=OneName)
def probe(
    train: TrainTable,
    model: Annotated[list[str], option(INPUT, "Hugging Face model directory or hub name, or NAME=MODEL; repeatable.")],
    text: TextColumns = None,
    label: LabelColumns = None,
    label_separator: LabelSeparator = None,
    group: GroupColumn = None,
    kind: Annotated[str, option(INPUT, "auto, classification, multilabel or regression.")] = "auto",
    metric: Annotated[str | None, option(INPUT, "Metric that ranks.")] = None,
    test: Annotated[list[str] | None, option(INPUT, "Test file, or NAME=FILE; repeatable.")] = None,
    train_size: Annotated[int | None, option(INPUT, "Draw this many rows, stratified.")] = None,
    pooling: Annotated[
        str,
        option(
            TRAINING,
            "Features of a model: mean (over tokens), cls (the first one), model (the input of its head), or auto: "
            "as its sentence-transformers folder says, else model.",
        ),
    ] = "auto",
    prompt: Annotated[
        str | None,
        option(
            TRAINING,
            "Text before each row's first text, as in 'query: '; name:query takes it from its folder.",
        ),
    ] = None,
    max_length: MaxLength = None,
    folds: Annotated[int, option(SELECTION, "Folds of the cross-fitting.")] = 5,
    seed: Annotated[int, option(SEEDS, "Seed of folds and of the draw.")] = 0,
    output: Annotated[Path | None, option(OUTPUT, "File for the table: .csv or .json.")] = None,
    overwrite: Annotated[bool, option(OUTPUT, "Replace the file.", "--overwrite")] = False,
    quiet: Annotated[bool, option(OUTPUT, "The table and warnings only.", "--quiet")] = False,
    config: Config = None,
) -> None:
    """Rank pre-trained models for a table by linear probes on their frozen features, in seconds to minutes.

    Example: steadytune probe train.csv --model sentence-transformers/all-MiniLM-L6-v2 --model bert-base-uncased
    """
    given = dict(locals())
    with errors_in_one_line(), speaking(quiet):
        from ..fitting import probing
        from ..fitting.predict_file import check_output

        if output is not None:
            read: list[str | Path] = [
                train,
                *(named_model(item)[1] for item in model),
                *named_files(test or []).values(),
            ]
            check_output(output, read, overwrite, probing.FILES)
        same = ("label_separator", "group", "kind", "metric", "pooling", "prompt", "max_length", "train_size", "folds",
                "seed")  # fmt: skip
        columns = {"text": text or None, "label": label or None}
        options = {**columns, "tests": named_files(test or []), **{name: given[name] for name in same}}
        result = probing.probe(train, _models(model), **options)
        _show_probed(result)  # first: what took minutes is seen, also where the file cannot be written
        if output is not None:
            result.save(output)


@app.command(cls=OneName)
def inspect(
    train: TrainTable,
    model: Annotated[str, option(INPUT, "Hugging Face model directory or hub name, or the --output of a fit.")],
    text: TextColumns = None,
    label: LabelColumns = None,
    label_separator: LabelSeparator = None,
    group: GroupColumn = None,
    kind: Annotated[str, option(INPUT, "auto, classification, multilabel or regression.")] = "auto",
    pooling: Annotated[
        str, option(TRAINING, "Features of the model: mean, cls, model or auto, as of [b]steadytune probe[/].")
    ] = "auto",
    prompt: Annotated[str | None, option(TRAINING, "Text before each row's first text, as in 'query: '.")] = None,
    max_length: MaxLength = None,
    folds: Annotated[int, option(SELECTION, "Folds of the cross-fitting.")] = 5,
    seed: Annotated[int, option(SEEDS, "Seed of the folds.")] = 0,
    output: Annotated[Path, option(OUTPUT, "CSV file for the list.")] = Path("inspected.csv"),
    overwrite: Annotated[bool, option(OUTPUT, "Replace the file.", "--overwrite")] = False,
    quiet: Annotated[bool, option(OUTPUT, "The result and warnings only.", "--quiet")] = False,
    config: Config = None,
) -> None:
    """List the labelled rows that may carry a wrong label, and those that do harm, without fine-tuning.

    A frozen encoder reads the rows, and probes on its features judge each row without having seen it. With the output
    of a fit as model, its page shows the list too.

    Example: steadytune inspect train.csv --model out --output check.csv
    """
    given = dict(locals())
    with errors_in_one_line(), speaking(quiet):
        from ..fitting.folder import RECORD
        from ..fitting.inspection import FILES, inspect_labels
        from ..fitting.predict_file import check_output

        check_output(output, [train, model], overwrite, FILES)
        same = ("label_separator", "group", "kind", "pooling", "prompt", "max_length", "folds", "seed")
        options: dict[str, Any] = {"text": text or None, "label": label or None, **{name: given[name] for name in same}}
        found = inspect_labels(train, model, **options)
        found.save(output)
        typer.echo(f"{found.summary} List: {output}")  # first: the page of a fit may lie where nobody may write
        if Path(model, RECORD).is_file():
            found.add_to(model)


def _models(given: list[str]) -> list[str] | dict[str, str]:
    """Models as given, or by name if one of them has a name."""
    return given if all(named_model(item)[1] == item for item in given) else models_by_name(given)


def _show_probed(result: Any) -> None:
    """Models, the best first, with a line for each set and one for the difference to the best."""
    from ..pages.words import NONE, interval, number

    def line(name: str, value: float, low: float, high: float, signed: bool = False) -> list[str]:
        return [name, number(value, 4, signed), interval(low, high, 3, signed).replace(NONE, "")]

    grid = Grid(box=box.SIMPLE)
    for title in ("model", "set", result.metric, "95 % interval", "s", "width", "weights"):
        grid.add_column(title, no_wrap=title not in ("model", "set"), overflow="fold")
    for row in result.frame.to_dict("records"):
        lines = [line("train *", row["score"], row["low"], row["high"])]
        if row["model"] not in ("", result.best):  # the last row is no model
            apart = row["difference"], row["difference_low"], row["difference_high"]
            lines.append(line("less the best", *apart, True))
        lines += [line(test, *(row[f"{name}_{test}"] for name in ("score", "low", "high"))) for test in result.tests]
        about, sizes = row["name"], []
        if row["model"]:
            about += f" ({row['pooling']})"
            sizes = [number(row["seconds"], 1), str(row["width"]), f"{row['parameters'] / 1e6:.1f} M"]
        grid.add_row(about, *lines[0], *sizes)
        for cells in lines[1:]:
            grid.add_row("", *cells)
        grid.add_section()
    console = Console()
    console.print(grid)
    console.print("* Cross-fitted: each row is judged by a probe that did not see it.")
    if result.verdict:
        console.print(result.verdict, soft_wrap=True, markup=False, highlight=False)
