"""The command line. Commands import what they need inside their functions, so that help appears at once."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table as Grid

app = typer.Typer(
    name="steadytune",
    help="Fine-tune pre-trained language models on small data, steadily.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


class _OneName(typer.core.TyperCommand):
    """A command whose options may have two names; a call may give one of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = {word.partition("=")[0] for word in args}
        for parameter in self.params:
            names = [name for name in parameter.opts if name in given and name.startswith("--")]
            if len(names) > 1:
                raise typer.BadParameter(f"{' and '.join(names)} are two names of one option: give one of them.")
        return super().parse_args(ctx, args)


INPUT, TRAINING, SELECTION, SEEDS, OUTPUT = "Data", "Training", "Selection", "Seeds", "Output"
SHOWN_SUBGROUPS = 10  # of each set, the worst first


def _option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def _configure(context: typer.Context, file: Path | None) -> Path | None:
    """Make the options of a YAML file the command's defaults, before its other options are read."""
    if file is not None:
        with _errors_in_one_line():
            from .config import defaults

            assert context.command.callback is not None
            context.default_map = defaults(file, context.command.callback)
    return file


LabelColumns = Annotated[
    list[str] | None,
    _option(
        INPUT,
        "Label column; for several labels a row give the column of 0 and 1 of each class. [dim]\\[default: found][/]",
    ),
]
LabelSeparator = Annotated[str | None, _option(INPUT, "Sign between several labels in one cell, as | in food|price.")]
Config = Annotated[
    Path | None,
    _option(
        OUTPUT, "YAML file of options, as in batch_size: 8; flags win.", "--config", callback=_configure, is_eager=True
    ),
]


@app.command(cls=_OneName)
def fit(
    model: Annotated[str, _option(INPUT, "Hugging Face model directory or hub name.")],
    output: Annotated[Path, _option(OUTPUT, "Directory for model and results: new or empty.")],
    train: Annotated[
        str | None,
        typer.Argument(help="CSV, TSV, JSON-lines or Parquet file with labelled text, or a data set: hub:owner/name."),
    ] = None,
    text: Annotated[
        list[str] | None, _option(INPUT, "Text column; give it twice for pairs. [dim]\\[default: found][/]")
    ] = None,
    label: LabelColumns = None,
    label_separator: LabelSeparator = None,
    group: Annotated[
        str | None, _option(INPUT, "Column of groups; rows of one group stay on one side of each split.")
    ] = None,
    subgroup: Annotated[
        list[str] | None,
        _option(INPUT, "Column of subgroups, such as a source: each is scored, and methods read it. Repeatable."),
    ] = None,
    kind: Annotated[str, _option(INPUT, "auto, classification, multilabel or regression.")] = "auto",
    metric: Annotated[str | None, _option(INPUT, "Metric used for selection and shown first.")] = None,
    test: Annotated[list[str] | None, _option(INPUT, "Test file, or NAME=FILE; repeatable.")] = None,
    validation: Annotated[Path | None, _option(INPUT, "Validation file.")] = None,
    validation_column: Annotated[
        str | None,
        _option(
            INPUT, "Column that names the split of each row (train, validation, test), instead of a validation file."
        ),
    ] = None,
    validation_share: Annotated[
        float, _option(INPUT, "Share of the training rows to hold out if there is no validation file; 0 for none.")
    ] = 0.1,
    train_size: Annotated[int | None, _option(INPUT, "Draw this many training rows, stratified.")] = None,
    task: Annotated[
        str | None, _option(INPUT, "Benchmark task, instead of a file: see [b]steadytune tasks[/].")
    ] = None,
    data_root: Annotated[
        Path | None, _option(INPUT, "Folder of the benchmark tasks.", envvar="STEADYTUNE_DATA")
    ] = None,
    out_of_domain: Annotated[bool, _option(INPUT, "With --task: also the out-of-domain test sets.")] = False,
    method: Annotated[
        list[str] | None,
        _option(
            TRAINING,
            "Method with options: dps_dense:keep=0.7,update_ratio=0.05. Repeatable; methods run in list order. None is "
            "plain fine-tuning. See [b]steadytune methods[/].",
        ),
    ] = None,
    procedure: Annotated[
        str | None, _option(TRAINING, "Several trainings instead of one, with options: mixup-blo:folds=1,order=first.")
    ] = None,
    aux: Annotated[
        list[str] | None,
        _option(TRAINING, "Another labelled table to train on first, with a head of its own (STILTs). Repeatable."),
    ] = None,
    aux_steps: Annotated[
        int | None, _option(TRAINING, "Optimizer steps on each of these tables. [dim]\\[default: as a fit on it][/]")
    ] = None,
    steps: Annotated[
        int | None,
        _option(
            TRAINING,
            "Optimizer steps. [dim]\\[default: 20 epochs, at least 400, at most 2000][/]",
            "--steps",
            "--max-steps",
        ),
    ] = None,
    epochs: Annotated[
        float | None, _option(TRAINING, "Epochs, instead of steps.", "--epochs", "--num-train-epochs")
    ] = None,
    lr: Annotated[
        float,
        _option(TRAINING, "Peak learning rate; 10 % warm-up, then linear decay to 0.", "--lr", "--learning-rate"),
    ] = 2e-5,
    weight_decay: Annotated[float, _option(TRAINING, "Weight decay of AdamW.")] = 0.01,
    warmup: Annotated[float, _option(TRAINING, "Share of the steps that warm up.", "--warmup", "--warmup-ratio")] = 0.1,
    max_grad_norm: Annotated[float, _option(TRAINING, "Largest norm of the gradient; 0 disables clipping.")] = 1.0,
    batch_size: Annotated[
        int, _option(TRAINING, "Rows per forward pass.", "--batch-size", "--per-device-train-batch-size")
    ] = 16,
    accumulation: Annotated[
        int,
        _option(TRAINING, "Forward passes per optimizer step.", "--accumulation", "--gradient-accumulation-steps"),
    ] = 1,
    max_length: Annotated[
        int | None, _option(TRAINING, "Tokens per row. [dim]\\[default: 128, or the model's limit][/]")
    ] = None,
    prompt: Annotated[
        str | None,
        _option(
            TRAINING, "Text before each row's first text, as in 'query: '; name:query takes it from the model's folder."
        ),
    ] = None,
    dropout: Annotated[
        float | None, _option(TRAINING, "One probability for all dropout. [dim]\\[default: the model's own][/]")
    ] = None,
    lora: Annotated[
        bool | None, _option(TRAINING, "Train adapters, merged at the end. [dim]\\[default: above 1e9 weights][/]")
    ] = None,
    head: Annotated[
        str,
        _option(
            TRAINING,
            "Initial output layer: random, or a linear probe on frozen features (logistic; ridge is faster "
            "with many classes).",
        ),
    ] = "random",
    pooling: Annotated[
        str,
        _option(
            TRAINING,
            "Input of the head: model (unchanged), mean (over tokens), cls (first token, without the dense layer), or "
            "auto: mean for single texts and sentence encoders trained so.",
        ),
    ] = "auto",
    peft: Annotated[
        str | None, _option(TRAINING, "Adapters to train: lora or ia3 (merged at the end), prefix or prompt (kept).")
    ] = None,
    standardize: Annotated[
        bool,
        _option(TRAINING, "Learn numbers in units of their standard deviation.", "--standardize/--no-standardize"),
    ] = True,
    compact: Annotated[
        bool,
        _option(
            TRAINING, "Train without the word embeddings that no training text reads, where the result is the same."
        ),
    ] = True,
    class_weights: Annotated[str, _option(TRAINING, "none, or balanced: by inverse frequency.")] = "none",
    label_smoothing: Annotated[
        float, _option(TRAINING, "Share of each label's probability that is spread over all classes.")
    ] = 0.0,
    focal: Annotated[
        float, _option(TRAINING, "Exponent of the focal loss: rows that are already right count less; 2 is usual.")
    ] = 0.0,
    balance: Annotated[
        list[str] | None,
        _option(
            TRAINING,
            "Attribute that must not predict a class: length, negation, overlap, subgroup, or a word. Repeatable.",
        ),
    ] = None,
    bf16: Annotated[bool, _option(TRAINING, "bfloat16 autocast; weights stay float32.")] = False,
    tune_kernels: Annotated[
        bool,
        _option(
            TRAINING,
            "Time a few passes with each kind of attention, and bfloat16 where the processor multiplies in it; train "
            "with the fastest. On the CPU only.",
            "--tune-kernels",
        ),
    ] = False,
    evaluations: Annotated[
        int,
        _option(SELECTION, "Number of evaluations on the validation rows during training; the best weights are kept."),
    ] = 0,
    patience: Annotated[
        int | None, _option(SELECTION, "Number of evaluations without a new best after which training stops.")
    ] = None,
    num_seeds: Annotated[int, _option(SELECTION, "Number of runs with the same head; see --combine.")] = 1,
    combine: Annotated[
        str,
        _option(
            SELECTION,
            "How to combine several runs: soup (the mean of their weights), best (on the validation rows) or ensemble.",
        ),
    ] = "soup",
    distil: Annotated[
        bool, _option(SELECTION, "Train one model on the answers of the ensemble, and keep that.", "--distil")
    ] = False,
    refit: Annotated[
        bool, _option(SELECTION, "Choose the number of steps by cross-validation, then train on all rows.", "--refit")
    ] = False,
    folds: Annotated[int, _option(SELECTION, "Folds of the cross-validation.")] = 5,
    probe: Annotated[
        bool, _option(SELECTION, "Show the score of a linear probe on frozen features beside the model's.")
    ] = True,
    calibrate: Annotated[
        bool, _option(SELECTION, "Fit a temperature on the validation rows, kept in the model.", "--calibrate")
    ] = False,
    threshold: Annotated[
        str | None,
        _option(
            SELECTION,
            "Probability above which a class is given (two classes: the second; several labels: each), or tune: the "
            "best one on the validation rows. [dim]\\[default: 0.5][/]",
        ),
    ] = None,
    worst_subgroup: Annotated[
        bool,
        _option(SELECTION, "Select by the score of the worst subgroup instead of all rows.", "--worst-subgroup"),
    ] = False,
    restarts: Annotated[
        int,
        _option(SELECTION, "Number of restarts of a run whose loss is still above 0.9 log K after 20 % of the steps."),
    ] = 0,
    seed: Annotated[int, _option(SEEDS, "Seed of everything that has no seed of its own.")] = 0,
    init_seed: Annotated[int | None, _option(SEEDS, "Seed of the new head.")] = None,
    subset_seed: Annotated[
        int | None, _option(SEEDS, "Seed of subset and validation split. [dim]\\[default: the data seed][/]")
    ] = None,
    data_seed: Annotated[int | None, _option(SEEDS, "Seed of the row order.")] = None,
    dropout_seed: Annotated[int | None, _option(SEEDS, "Seed of dropout.")] = None,
    method_seed: Annotated[int | None, _option(SEEDS, "Seed of the methods' masks and noise.")] = None,
    save_steps: Annotated[int, _option(OUTPUT, "Steps between checkpoints; 0 for none.")] = 200,
    resume: Annotated[
        bool, _option(OUTPUT, "Continue from the last checkpoint in the output directory.", "--resume")
    ] = False,
    overwrite: Annotated[bool, _option(OUTPUT, "Replace the run in the output directory.", "--overwrite")] = False,
    dry_run: Annotated[
        bool, _option(OUTPUT, "Estimate steps, minutes, memory and files without training.", "--dry-run")
    ] = False,
    push_to_hub: Annotated[str | None, _option(OUTPUT, "Upload the finished folder to this repository.")] = None,
    quiet: Annotated[bool, _option(OUTPUT, "No plan, no progress bar.", "--quiet")] = False,
    config: Config = None,
) -> None:
    """Fine-tune a model on a table of labelled text.

    Writes an ordinary Hugging Face model directory with metrics.json, predictions.parquet and steadytune.json.

    Example: steadytune fit train.csv --text review --label stars --test test.csv --model bert-base-uncased
    --method dps_dense --output out
    """
    given = dict(locals())
    with _errors_in_one_line():
        from . import fitting
        from .errors import UsageError
        from .fitting.options import Options

        tests: dict[str, Any] = _named(test or [])
        source: Any = train
        if task is not None:
            source, task_metric, tests = _from_task(given, tests)
            metric = metric or task_metric
        elif out_of_domain:
            raise UsageError("--out-of-domain needs --task: name your own test files with --test NAME=FILE.")
        elif train is None:
            raise UsageError("give a training file, or a benchmark task with --task NAME --data-root DIR.")
        same = ("model", "output", "label_separator", "group", "kind", "validation", "validation_column", "num_seeds",
                "combine", "distil", "refit", "folds", "probe", "procedure", "aux_steps", "resume", "overwrite",
                "save_steps", "push_to_hub")  # fmt: skip
        options = {
            **{name: given[name] for name in (*same, *(field.name for field in dataclasses.fields(Options)))},
            "text": text or None,
            "label": label or None,
            "subgroup": subgroup or None,
            "methods": method or [],
            "aux": aux or None,
            "tests": tests,
            "metric": metric,
            "progress": not quiet,
        }
        with _speaking(quiet):
            if dry_run:
                return Console().print(
                    str(fitting.dry_run(source, **options)), soft_wrap=True, markup=False, highlight=False
                )
            result = fitting.fit(source, **options)
    _show(result)


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="The --output of a fit.")],
    table: Annotated[str, typer.Argument(help="CSV, TSV, JSON-lines or Parquet file with the same text columns.")],
    output: Annotated[
        Path, _option(OUTPUT, "File to write: .csv, .tsv, .jsonl or .parquet, one row per row of the table.")
    ] = Path("predictions.csv"),
    text: Annotated[list[str] | None, _option(INPUT, "Text column, if its name differs from training.")] = None,
    keep: Annotated[
        str | None,
        _option(OUTPUT, "Columns to write beside the predictions, as in id,text. [dim]\\[default: all][/]"),
    ] = None,
    on_empty: Annotated[
        str, _option(INPUT, "Rows without a text: skip writes them without a prediction, error refuses the table.")
    ] = "skip",
    overwrite: Annotated[bool, _option(OUTPUT, "Replace the file.", "--overwrite")] = False,
    quiet: Annotated[bool, _option(OUTPUT, "No progress bar.", "--quiet")] = False,
    config: Config = None,
) -> None:
    """Predict labels (and probabilities) for a table of text of any size.

    Example: steadytune predict out new.csv --output labelled.csv --keep id
    """
    with _errors_in_one_line(), _speaking(quiet):
        from .fitting.fitted_model import FittedModel
        from .fitting.predict_file import check_output, predict_file

        check_output(output, [table, model], overwrite)
        columns = None if keep is None else [name.strip() for name in keep.split(",") if name.strip()]
        done = predict_file(
            FittedModel.load(model), table, output, text=text or (), keep=columns,
            on_empty=on_empty, overwrite=overwrite, progress=not quiet,
        )  # fmt: skip
    without = f", none for {len(done.empty)} without text" if done.empty else ""
    typer.echo(f"{done.rows - len(done.empty)} predictions{without}: {output}")


@app.command(cls=_OneName)
def probe(
    train: Annotated[
        str,
        typer.Argument(help="CSV, TSV, JSON-lines or Parquet file with labelled text, or a data set: hub:owner/name."),
    ],
    model: Annotated[list[str], _option(INPUT, "Hugging Face model directory or hub name, or NAME=MODEL; repeatable.")],
    text: Annotated[
        list[str] | None, _option(INPUT, "Text column; give it twice for pairs. [dim]\\[default: found][/]")
    ] = None,
    label: LabelColumns = None,
    label_separator: LabelSeparator = None,
    group: Annotated[str | None, _option(INPUT, "Column of groups; rows of one group stay in one fold.")] = None,
    kind: Annotated[str, _option(INPUT, "auto, classification, multilabel or regression.")] = "auto",
    metric: Annotated[str | None, _option(INPUT, "Metric that ranks.")] = None,
    test: Annotated[list[str] | None, _option(INPUT, "Test file, or NAME=FILE; repeatable.")] = None,
    train_size: Annotated[int | None, _option(INPUT, "Draw this many rows, stratified.")] = None,
    pooling: Annotated[
        str,
        _option(
            TRAINING,
            "Features of a model: mean (over tokens), cls (the first one), model (the input of its head), or auto: "
            "as its sentence-transformers folder says, else model.",
        ),
    ] = "auto",
    prompt: Annotated[
        str | None,
        _option(
            TRAINING,
            "Text before each row's first text, as in 'query: '; name:query takes it from its folder.",
        ),
    ] = None,
    max_length: Annotated[
        int | None, _option(TRAINING, "Tokens per row. [dim]\\[default: 128, or the model's limit][/]")
    ] = None,
    folds: Annotated[int, _option(SELECTION, "Folds of the cross-fitting.")] = 5,
    seed: Annotated[int, _option(SEEDS, "Seed of folds and of the draw.")] = 0,
    output: Annotated[Path | None, _option(OUTPUT, "File for the table: .csv or .json.")] = None,
    overwrite: Annotated[bool, _option(OUTPUT, "Replace the file.", "--overwrite")] = False,
    quiet: Annotated[bool, _option(OUTPUT, "The table and warnings only.", "--quiet")] = False,
    config: Config = None,
) -> None:
    """Rank pre-trained models for a table by linear probes on their frozen features, in seconds to minutes.

    Example: steadytune probe train.csv --model sentence-transformers/all-MiniLM-L6-v2 --model bert-base-uncased
    """
    given = dict(locals())
    with _errors_in_one_line("starts anew: nothing was written"), _speaking(quiet):
        from .fitting import probing
        from .fitting.predict_file import check_output

        if output is not None:
            check_output(output, [train, *model], overwrite, probing.FILES)
        same = ("label_separator", "group", "kind", "metric", "pooling", "prompt", "max_length", "train_size", "folds",
                "seed")  # fmt: skip
        columns = {"text": text or None, "label": label or None}
        options = {**columns, "tests": _named(test or []), **{name: given[name] for name in same}}
        result = probing.probe(train, _models(model), **options)
        if output is not None:
            result.save(output)
    _show_probed(result)


@app.command(cls=_OneName)
def inspect(
    train: Annotated[
        str,
        typer.Argument(help="CSV, TSV, JSON-lines or Parquet file with labelled text, or a data set: hub:owner/name."),
    ],
    model: Annotated[str, _option(INPUT, "Hugging Face model directory or hub name, or the --output of a fit.")],
    text: Annotated[
        list[str] | None, _option(INPUT, "Text column; give it twice for pairs. [dim]\\[default: found][/]")
    ] = None,
    label: LabelColumns = None,
    label_separator: LabelSeparator = None,
    group: Annotated[str | None, _option(INPUT, "Column of groups; rows of one group stay in one fold.")] = None,
    kind: Annotated[str, _option(INPUT, "auto, classification, multilabel or regression.")] = "auto",
    pooling: Annotated[
        str, _option(TRAINING, "Features of the model: mean, cls, model or auto, as of [b]steadytune probe[/].")
    ] = "auto",
    prompt: Annotated[str | None, _option(TRAINING, "Text before each row's first text, as in 'query: '.")] = None,
    max_length: Annotated[
        int | None, _option(TRAINING, "Tokens per row. [dim]\\[default: 128, or the model's limit][/]")
    ] = None,
    folds: Annotated[int, _option(SELECTION, "Folds of the cross-fitting.")] = 5,
    seed: Annotated[int, _option(SEEDS, "Seed of the folds.")] = 0,
    output: Annotated[Path, _option(OUTPUT, "CSV file for the list.")] = Path("inspected.csv"),
    overwrite: Annotated[bool, _option(OUTPUT, "Replace the file.", "--overwrite")] = False,
    quiet: Annotated[bool, _option(OUTPUT, "The result and warnings only.", "--quiet")] = False,
    config: Config = None,
) -> None:
    """List the labelled rows that probably carry a wrong label, and those that do harm, without fine-tuning.

    A frozen encoder reads the rows, and probes on its features judge each row without having seen it. With the output
    of a fit as model, its page shows the list too.

    Example: steadytune inspect train.csv --model out --output check.csv
    """
    given = dict(locals())
    with _errors_in_one_line("starts anew: nothing was written"), _speaking(quiet):
        from .fitting.folder import RECORD
        from .fitting.inspection import FILES, inspect_labels
        from .fitting.predict_file import check_output

        check_output(output, [train, model], overwrite, FILES)
        same = ("label_separator", "group", "kind", "pooling", "prompt", "max_length", "folds", "seed")
        options: dict[str, Any] = {"text": text or None, "label": label or None, **{name: given[name] for name in same}}
        found = inspect_labels(train, model, **options)
        found.save(output)
        if Path(model, RECORD).is_file():
            found.add_to(model)
    typer.echo(f"{found.summary} List: {output}")


def _models(given: list[str]) -> list[str] | dict[str, str]:
    """Models as given, or by name if one of them has a name."""
    from .errors import UsageError

    pairs = [_pair(item) for item in given]
    if all(path == item for (_, path), item in zip(pairs, given, strict=True)):
        return given
    named = dict(pairs)
    if len(named) < len(pairs):
        raise UsageError("two models have one name: name them with --model NAME=MODEL.")
    return named


def _show_probed(result: Any) -> None:
    """Models, the best first, with a line for each set and one for the difference to the best."""
    from .pages.words import NONE, interval, number

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


@app.command(cls=_OneName)
def search(
    train: Annotated[
        str,
        typer.Argument(help="CSV, TSV, JSON-lines or Parquet file with labelled text, or a data set: hub:owner/name."),
    ],
    model: Annotated[
        list[str],
        _option(INPUT, "Hugging Face model directory or hub name, or NAME=MODEL; repeatable, the first is plain's."),
    ],
    output: Annotated[Path, _option(OUTPUT, "Directory for model and results: new or empty.")],
    text: Annotated[
        list[str] | None, _option(INPUT, "Text column; give it twice for pairs. [dim]\\[default: found][/]")
    ] = None,
    label: LabelColumns = None,
    label_separator: LabelSeparator = None,
    group: Annotated[str | None, _option(INPUT, "Column of groups; rows of one group stay in one fold.")] = None,
    kind: Annotated[str, _option(INPUT, "auto, classification, multilabel or regression.")] = "auto",
    metric: Annotated[str | None, _option(INPUT, "Metric by which recipes are compared.")] = None,
    test: Annotated[
        list[str] | None, _option(INPUT, "Test file, or NAME=FILE; scored once, after the choice. Repeatable.")
    ] = None,
    budget: Annotated[str, _option(SELECTION, "Time or number of trainings: 30m, 2h, 100runs.")] = "30m",
    arms: Annotated[
        list[str] | None,
        _option(
            SELECTION,
            "What to try: a method (dps_mix:update_ratio=0.1), options (head=logistic,pooling=mean), lr*3, lr/3 or "
            "steps*2. Repeatable. [dim]\\[default: 12 arms in three stages][/]",
            "--arm",
            "--arms",
        ),
    ] = None,
    folds: Annotated[
        int | None, _option(SELECTION, "Folds of the cross-validation. [dim]\\[default: 5, or 10 below 200 rows][/]")
    ] = None,
    workers: Annotated[int, _option(TRAINING, "Number of worker processes; 0 trains in this one.")] = 0,
    steps: Annotated[
        int | None, _option(TRAINING, "Optimizer steps of plain fine-tuning.", "--steps", "--max-steps")
    ] = None,
    epochs: Annotated[
        float | None, _option(TRAINING, "Epochs, instead of steps.", "--epochs", "--num-train-epochs")
    ] = None,
    lr: Annotated[float, _option(TRAINING, "Learning rate of plain fine-tuning.", "--lr", "--learning-rate")] = 2e-5,
    batch_size: Annotated[
        int, _option(TRAINING, "Rows per forward pass.", "--batch-size", "--per-device-train-batch-size")
    ] = 16,
    max_length: Annotated[
        int | None, _option(TRAINING, "Tokens per row. [dim]\\[default: 128, or the model's limit][/]")
    ] = None,
    bf16: Annotated[bool, _option(TRAINING, "bfloat16 autocast; weights stay float32.")] = False,
    seed: Annotated[int, _option(SEEDS, "Seed of halves, folds and trainings.")] = 0,
    resume: Annotated[bool, _option(OUTPUT, "Go on with the search in the output directory.", "--resume")] = False,
    overwrite: Annotated[bool, _option(OUTPUT, "Replace the search in the output directory.", "--overwrite")] = False,
    dry_run: Annotated[
        bool, _option(OUTPUT, "Show arms, folds and the time of a training without a search.", "--dry-run")
    ] = False,
    quiet: Annotated[bool, _option(OUTPUT, "The verdict only.", "--quiet")] = False,
    config: Config = None,
) -> None:
    """Find the best recipe for a table within a budget, fine-tune with it, and say how sure its gain is.

    Example: steadytune search reviews.csv --label stars --model bert-base-uncased --budget 30m --output out
    """
    given = dict(locals())
    with _errors_in_one_line("with --resume goes on with the trainings that have no record"), _speaking(quiet):
        from . import searching

        same = ("label_separator", "group", "kind", "metric", "budget", "folds", "seed", "steps", "epochs", "lr",
                "batch_size", "max_length", "bf16")  # fmt: skip
        asked = {name: given[name] for name in same}
        asked |= {"model": _models(model), "text": text or None, "label": label or None, "arms": arms or None}
        if dry_run:
            return typer.echo(str(searching.plan_search(train, **asked)))
        result = searching.search(
            train, output=output, tests=_named(test or []), workers=workers, resume=resume, overwrite=overwrite,
            progress=not quiet, **asked,
        )  # fmt: skip
    typer.echo(result.verdict)
    for line in searching.dropped_words(result.record):
        typer.echo(line)
    if result.fitted.metrics:
        _show(result.fitted)
    typer.echo(f"Model: {output}")


@app.command(cls=_OneName)
def curve(
    train: Annotated[
        str,
        typer.Argument(help="CSV, TSV, JSON-lines or Parquet file with labelled text, or a data set: hub:owner/name."),
    ],
    model: Annotated[str, _option(INPUT, "Hugging Face model directory or hub name.")],
    output: Annotated[Path, _option(OUTPUT, "Folder of the records; the same command goes on in it.")],
    text: Annotated[
        list[str] | None, _option(INPUT, "Text column; give it twice for pairs. [dim]\\[default: found][/]")
    ] = None,
    label: LabelColumns = None,
    label_separator: LabelSeparator = None,
    group: Annotated[str | None, _option(INPUT, "Column of groups; rows of one group stay in one fold.")] = None,
    kind: Annotated[str, _option(INPUT, "auto, classification, multilabel or regression.")] = "auto",
    metric: Annotated[str | None, _option(INPUT, "Metric of the scores.")] = None,
    more: Annotated[int, _option(INPUT, "Number of rows that would be added.")] = 200,
    repeats: Annotated[int, _option(SELECTION, "Number of cross-validations of each size, from 1 to 4.")] = 1,
    folds: Annotated[
        int | None, _option(SELECTION, "Folds of the cross-validation. [dim]\\[default: 5, or 10 below 200 rows][/]")
    ] = None,
    workers: Annotated[int, _option(TRAINING, "Number of worker processes; 0 trains in this one.")] = 0,
    steps: Annotated[int | None, _option(TRAINING, "Optimizer steps.", "--steps", "--max-steps")] = None,
    epochs: Annotated[
        float | None, _option(TRAINING, "Epochs, instead of steps.", "--epochs", "--num-train-epochs")
    ] = None,
    lr: Annotated[float, _option(TRAINING, "Learning rate.", "--lr", "--learning-rate")] = 2e-5,
    batch_size: Annotated[
        int, _option(TRAINING, "Rows per forward pass.", "--batch-size", "--per-device-train-batch-size")
    ] = 16,
    max_length: Annotated[
        int | None, _option(TRAINING, "Tokens per row. [dim]\\[default: 128, or the model's limit][/]")
    ] = None,
    seed: Annotated[int, _option(SEEDS, "Seed of folds and trainings.")] = 0,
    quiet: Annotated[bool, _option(OUTPUT, "The table only.", "--quiet")] = False,
    config: Config = None,
) -> None:
    """Tell what more labelled rows would bring: scores by number of rows, and a curve through them.

    Example: steadytune curve reviews.csv --label stars --model bert-base-uncased --more 200 --output curve
    """
    given = dict(locals())
    with _errors_in_one_line("goes on with the trainings that have no record"), _speaking(quiet):
        from . import searching

        names = {*given} - {"train", "text", "label", "quiet", "config"}
        result = searching.curve(train, text=text or None, label=label or None, **{name: given[name] for name in names})
    _show_curve(result)


def _show_curve(result: Any) -> None:
    """Scores by number of rows, and what more rows would bring."""
    from .pages.words import interval, number

    grid = Grid(box=box.SIMPLE)
    for title in ("training rows", *result.scores):
        grid.add_column(title)
    for size in next(iter(result.scores.values())):
        cells = []
        for estimate in (by_size[size] for by_size in result.scores.values()):
            low, high = sorted(map(abs, estimate.interval))
            cells.append(f"{number(abs(estimate.value), 4)} {interval(low, high, 3)}")
        grid.add_row(str(size), *cells)
    console = Console()
    console.print(grid)
    console.print(result.verdict, soft_wrap=True, markup=False, highlight=False)


@app.command()
def bench(
    study: Annotated[str, typer.Argument(help="Study file (YAML), or a preset: stick, glue-small, low-resource ...")],
    output: Annotated[
        Path | None, _option(OUTPUT, "Folder of the records. [dim]\\[default: runs/NAME-OF-THE-STUDY][/]")
    ] = None,
    model: Annotated[
        list[str] | None,
        _option(INPUT, "Model directory or hub name, or NAME=MODEL, instead of the study's; repeatable."),
    ] = None,
    data_root: Annotated[
        Path | None, _option(INPUT, "Folder of the benchmark tasks.", envvar="STEADYTUNE_DATA")
    ] = None,
    seeds: Annotated[
        int | None, _option(SEEDS, "Number of seeds, instead of the study's: N does runs with seeds 0 to N-1.")
    ] = None,
    filters: Annotated[
        list[str] | None,
        _option(
            SELECTION,
            "Only runs with KEY=PATTERN (or PATTERN|PATTERN), KEY one of model, task, recipe, size, seed; repeatable.",
            "--filter",
        ),
    ] = None,
    workers: Annotated[int, _option(TRAINING, "Number of worker processes; they share cores and GPUs.")] = 1,
    timeout: Annotated[float | None, _option(TRAINING, "Seconds after which a run counts as failed.")] = None,
    retry_failed: Annotated[bool, _option(TRAINING, "Do failed runs again.", "--retry-failed")] = False,
    dry_run: Annotated[
        bool,
        _option(OUTPUT, "List the runs and estimate their minutes from a few steps.", "--dry-run"),
    ] = False,
    quiet: Annotated[bool, _option(OUTPUT, "No progress.", "--quiet")] = False,
    config: Config = None,
) -> None:
    """Run a study: models x tasks x sizes x recipes x seeds, with one record for each run. Recorded runs are skipped.

    Example: steadytune bench stick --model bert-base-uncased --data-root data --workers 2; then: steadytune report
    runs/stick
    """
    with _errors_in_one_line("goes on with the runs that have no record"):
        from .bench.spec import Study
        from .bench.study import run_study

        models = None if not model else dict(_pair(item) for item in model)
        plan = Study.read(study, models=models, seeds=seeds)
        folder = output or Path("runs", plan.name)
        if dry_run:
            return _show_runs(plan, folder, data_root, filters or [])
        with _speaking(quiet):
            result = run_study(
                plan, folder, data_root=data_root, workers=workers, filters=filters or [], timeout=timeout,
                retry_failed=retry_failed, progress=not quiet,
            )  # fmt: skip
    typer.echo(f"{result.done} runs done, {result.failed} failed: {result.folder}")
    if result.failed:
        raise typer.Exit(1)


def _pair(item: str) -> tuple[str, str]:
    """`NAME=MODEL`, or a model under its own name."""
    name, equals, path = item.partition("=")
    return (name, path) if equals and not Path(item).exists() else (Path(item).name, item)


def _show_runs(study: Any, folder: Path, data_root: Path | None, filters: list[str]) -> None:
    """Print the runs of a study, and how long they would take."""
    from .bench.forecast import forecast
    from .bench.store import Store
    from .bench.study import chosen

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
        Path | None, _option(OUTPUT, "Directory for the files. [dim]\\[default: the folder itself][/]")
    ] = None,
    metric: Annotated[
        str | None, _option(INPUT, "Metric to report of a bench. [dim]\\[default: each task's headline metric][/]")
    ] = None,
    config: Config = None,
) -> None:
    """Report a bench or a fit on self-contained pages, without scripts or network.

    Of a bench: report.html with tables, paired comparisons and figures, the same as report.md, and the numbers as
    runs.csv (a row per run and set) and summary.csv. Of a fit: report.html, which every fit also writes itself.

    Example: steadytune report runs/glue --output site
    """
    with _errors_in_one_line(), _speaking(quiet=False):
        from .errors import UsageError
        from .fitting.folder import RECORD

        if not (folder / RECORD).is_file():
            from .bench.report.write import write_report

            page = write_report(folder, output, metric)
        elif metric is not None:
            raise UsageError(
                f"--metric is for the folder of a bench, and {folder} is the output of a fit: leave it out."
            )
        else:
            from .fitting.report_page import write_page

            page = write_page(folder, output=output)
    typer.echo(f"report: {page}")


def _named(tests: list[str]) -> dict[str, Path]:
    """Test files by name: `NAME=FILE`, or `FILE` under its own stem."""
    from .errors import UsageError

    named: dict[str, Path] = {}
    for item in tests:
        name, equals, file = item.partition("=")
        if not equals or Path(item).exists():
            name, file = Path(item).stem, item
        if name in named:
            raise UsageError(f"two test sets are called {name!r}: name them with --test NAME=FILE.")
        named[name] = Path(file)
    return named


def _from_task(given: dict[str, Any], tests: dict[str, Any]) -> tuple[Any, str, dict[str, Any]]:
    """Training table, metric and test tables of `--task`; flags that contradict the task are errors."""
    from . import tasks
    from .errors import UsageError

    other = {"train": "a training file", "text": "--text", "test": "--test", "validation": "--validation"}
    for name, flag in other.items():
        if given[name]:
            raise UsageError(f"--task brings its own data: leave {flag} out.")
    if given["data_root"] is None:
        raise UsageError("--task needs the folder that holds the tasks: --data-root DIR, or STEADYTUNE_DATA.")
    benchmark = tasks.find(given["task"])
    source, tests = tasks.load(benchmark.name, given["data_root"], beyond=given["out_of_domain"])
    return source, benchmark.metric, tests


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="Method to show with its options, cost and source.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Write docs/methods.md to stdout.")] = False,
) -> None:
    """List the fine-tuning methods by name, or show one with its options, cost and source."""
    with _errors_in_one_line():
        from .errors import UsageError, suggest
        from .methods import METHODS, catalogue

        if markdown:
            return typer.echo(catalogue.markdown(catalogue.own()), nl=False)
        if name is not None and name not in METHODS:
            raise UsageError(f"unknown method {name!r}.{suggest(name, METHODS)}")
        if name is not None:
            METHODS[name]  # an error for one of another package that cannot be loaded
        pages = catalogue.pages()
    console = Console(highlight=False, markup=False)
    if name is not None:
        return _show_method(console, pages[name])
    grid = Grid.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, style="bold")
    for page in pages.values():
        grid.add_row(page.name, page.summary.replace("``", ""))
    console.print(grid)
    console.print("\nsteadytune methods NAME shows the options, cost and source of one.")


def _show_method(console: Console, page: Any) -> None:
    """All there is to say about one method."""
    for paragraph in (page.summary, *page.notes):
        console.print(paragraph.replace("``", "") + "\n")
    grid = Grid(title=f"--method {page.name}:option=value,...", show_lines=True)
    for title in ("option", "type", "range", "default", "meaning"):
        grid.add_column(title, overflow="fold")
    for option in page.options:
        meaning = option.meaning.replace("``", "")
        grid.add_row(option.name, option.type, option.range, option.default, meaning)
    console.print(grid)
    facts = {
        "Acts at": ", ".join(page.moments),
        "Cost": f"{page.cost.passes:.1f} plain passes a step; bytes per weight: {page.cost.memory}",
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
def merge(
    models: Annotated[list[Path], typer.Argument(help="Hugging Face model directories of one architecture.")],
    output: Annotated[Path, _option(OUTPUT, "Directory for the merged model: new or empty.")],
    how: Annotated[
        str,
        typer.Option(
            help="uniform: their mean (a soup); greedy: the mean of those that do not lower the score; fisher: the "
            "mean in which each weight counts by its Fisher information; interpolate: (1 - alpha) base + alpha model "
            "(WiSE-FT); paint: the same with the best alpha; add: base + alpha times the sum of (model - base) (task "
            "arithmetic)."
        ),
    ] = "uniform",
    base: Annotated[Path | None, typer.Option(help="Directory of the pre-trained model, for the last three.")] = None,
    alpha: Annotated[float, typer.Option(help="Share of the model, or factor of the sum.")] = 0.5,
    validation: Annotated[
        list[str] | None,
        _option(INPUT, "File of labelled text to score the result on; greedy, fisher and paint use it. Repeatable."),
    ] = None,
    text: Annotated[
        list[str] | None, _option(INPUT, "Its text column; give it twice for pairs. [dim]\\[default: found][/]")
    ] = None,
    label: LabelColumns = None,
    label_separator: LabelSeparator = None,
    metric: Annotated[str | None, _option(INPUT, "Metric that chooses.")] = None,
    fisher_labels: Annotated[
        str,
        typer.Option(help="Labels of the Fisher information: expected (of all classes), sampled (predicted) or true."),
    ] = "expected",
) -> None:
    """Merge models of one beginning into one Hugging Face model directory.

    Example: steadytune merge run-1 run-2 run-3 --output soup
    """
    with _errors_in_one_line():
        from .fitting.merge_folders import merge_folders

        said = merge_folders(
            models, output, how=how, base=base, alpha=alpha, validation=validation or (), text=text, label=label,
            label_separator=label_separator, metric=metric, fisher_labels=fisher_labels,
        )  # fmt: skip
    if said:
        typer.echo(said)
    typer.echo(f"Model: {output}")


@app.command()
def tasks(
    name: Annotated[str | None, typer.Argument(help="Show the files of one task, as they lie in a data root.")] = None,
) -> None:
    """List the benchmark tasks with their labels, metric and test sets, or the files and columns of one."""
    from .tasks import TASKS

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
    with _errors_in_one_line():
        from .tasks import find, layout

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
    with _errors_in_one_line():
        from .doctor import examine

        report = examine()
    typer.echo(report.json() if as_json else str(report))
    raise typer.Exit(1 if report.failed else 0)


def _show(result: Any) -> None:
    """The scores, one line a set and metric, the metric that counts first; what is wrong comes last."""
    from rich.markup import escape

    from .data.scores import worst_first
    from .pages.words import bounds_words, counted, score_names, spread_words

    console = Console()
    known = result.model.problem.metrics
    names = [
        name
        for name in score_names(result.metrics.values(), result.metric)
        if name == result.metric or (name in known and not known[name].needs_probabilities)
    ]
    extra = {"baseline": "baseline", "probe": "probe", "runs": "runs: mean ± SD"}
    shown = [part for part in extra if any(part in scores for scores in result.metrics.values())]
    grid = Grid(box=box.SIMPLE, collapse_padding=True, pad_edge=False, show_edge=False)  # 80 columns hold it
    for title in ("metric", "score", "95 % interval", *(extra[part] for part in shown)):
        grid.add_column(title, no_wrap=True, overflow="fold")
    for key, scores in result.metrics.items():
        grid.add_row(f"[b]{escape(key)}{' *' * scores['selected']}[/], {counted(scores['rows'], 'row')}")
        for name in names:
            beside = [spread_words(scores.get(part) or {}, name) for part in shown]
            figures = [spread_words(scores, name), bounds_words(scores, name), *beside]
            grid.add_row(f" {name}", *figures, end_section=name == names[-1] and not scores.get("subgroups"))
        parts = worst_first(scores, result.metric)[:SHOWN_SUBGROUPS]
        for part, own in parts:
            about = f" {result.metric} of {escape(part)}, {counted(own['rows'], 'row')}"
            figures = [spread_words(own, result.metric), bounds_words(own, result.metric)]
            grid.add_row(about, *figures, *[""] * len(shown), end_section=part == parts[-1][0])
    if result.metrics:
        console.print(grid)
        if any(scores["selected"] for scores in result.metrics.values()):
            console.print("* These rows chose the model: expect lower scores on new rows.")
        console.print("More scores, classes one by one and the confusion matrices: metrics.json.", highlight=False)
    console.print(f"{result.steps} steps, {result.seconds:.0f} s. Model: {result.output}", soft_wrap=True, markup=False)
    notes = [note for scores in result.metrics.values() for note in scores["notes"]]
    for line in dict.fromkeys([*notes, *(f"warning: {text}" for text in result.warnings)]):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


class _BesideBars(logging.StreamHandler):
    """Lines on stderr, above whatever progress bar is shown there."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=self.stream)


@contextlib.contextmanager
def _speaking(quiet: bool) -> Iterator[None]:
    """Send our log and all warnings to stderr, as plain lines."""
    logger, handler = logging.getLogger("steadytune"), _BesideBars()
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    logger.propagate = False
    logger.addHandler(handler)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *where: logger.warning("%s", message)
        try:
            yield
        finally:
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


@contextlib.contextmanager
def _errors_in_one_line(go_on: str = "with --resume goes on from the last checkpoint") -> Iterator[None]:
    """A user's mistake is a sentence and exit code 2, Ctrl-C is 130; a traceback is for our own bugs."""
    from .errors import UsageError

    try:
        yield
    except UsageError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as error:
        typer.echo(f"\ninterrupted: the same command {go_on}.", err=True)
        raise typer.Exit(130) from error


def _version(wanted: bool) -> None:
    if wanted:
        from .version import __version__

        typer.echo(f"steadytune {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def main() -> None:
    """Entry point of the `steadytune` command."""
    app()


if __name__ == "__main__":
    main()
