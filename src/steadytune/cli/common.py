"""What all commands share: the app, forms of options, errors in one line, and messages on stderr."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="steadytune",
    help="Fine-tune pre-trained language models on small data, steadily.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)


class OneName(typer.core.TyperCommand):
    """A command whose options may have two names; a call may give one of them."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = {word.partition("=")[0] for word in args}
        for parameter in self.params:
            names = [name for name in parameter.opts if name in given and name.startswith("--")]
            if len(names) > 1:
                raise typer.BadParameter(f"{' and '.join(names)} are two names of one option: give one of them.")
            if names and parameter.name in INSTEAD:
                ctx.meta[REPLACED] = {*ctx.meta.get(REPLACED, ()), INSTEAD[parameter.name]}
        return super().parse_args(ctx, args)


INSTEAD = {"steps": "epochs", "epochs": "steps"}  # an option that a flag replaces, where the file gives it
REPLACED = "steadytune.replaced"


ANEW = "starts anew: nothing was written"
INPUT, TRAINING, SELECTION, SEEDS, OUTPUT = "Data", "Training", "Selection", "Seeds", "Output"


def option(panel: str, text: str, *names: str, **more: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **more)


def _configure(context: typer.Context, file: Path | None) -> Path | None:
    """Make the options of a YAML file the command's defaults, before its other options are read."""
    if file is not None:
        with errors_in_one_line():
            from ..config import defaults

            assert context.command.callback is not None
            found, replaced = defaults(file, context.command.callback), context.meta.get(REPLACED, ())
            context.default_map = {name: value for name, value in found.items() if name not in replaced}
    return file


LABELLED = typer.Argument(
    help="CSV, TSV, JSON-lines or Parquet file with labelled text, or a data set: hub:owner/name."
)
TrainTable = Annotated[str, LABELLED]
TextColumns = Annotated[
    list[str] | None, option(INPUT, "Text column; give it twice for pairs. [dim]\\[default: found][/]")
]
GroupColumn = Annotated[
    str | None, option(INPUT, "Column of groups: rows of one stay in one fold, and intervals count groups.")
]
Subgroups = Annotated[
    list[str] | None,
    option(
        INPUT,
        "Column of subgroups, such as a source; or length, or overlap (of a pair). Each is scored. Repeatable.",
    ),
]
LabelColumns = Annotated[
    list[str] | None,
    option(
        INPUT,
        "Label column; for several labels a row give the column of 0 and 1 of each class. [dim]\\[default: found][/]",
    ),
]
LabelSeparator = Annotated[str | None, option(INPUT, "Sign between several labels in one cell, as | in food|price.")]
Folds = Annotated[
    int | None, option(SELECTION, "Folds of the cross-validation. [dim]\\[default: 5, or 10 below 200 rows][/]")
]
Epochs = Annotated[float | None, option(TRAINING, "Epochs, instead of steps.", "--epochs", "--num-train-epochs")]
BatchSize = Annotated[int, option(TRAINING, "Rows per forward pass.", "--batch-size", "--per-device-train-batch-size")]
MaxLength = Annotated[int | None, option(TRAINING, "Tokens per row. [dim]\\[default: 128, or the model's limit][/]")]
EngineName = Annotated[str, option(TRAINING, "local, or ray: runs are tasks of a Ray cluster, docs/studies.md.")]
Workers = Annotated[
    int | None,
    option(
        TRAINING,
        "Number of worker processes of the local engine; 0 trains in this one. "
        "[dim]\\[default: 1 for bench, else 0][/]",
    ),
]
Address = Annotated[
    str | None,
    option(TRAINING, "With ray: HOST:PORT, auto (the cluster of this machine), local. [dim]\\[default: auto][/]"),
]
Cpus = Annotated[int | None, option(TRAINING, "With ray: processor cores of a run. [dim]\\[default: 1][/]")]
Gpus = Annotated[
    float | None, option(TRAINING, "With ray: GPUs of a run; 0.25 lets four runs share one. [dim]\\[default: 0][/]")
]


def make_engine(
    name: str, workers: int | None, address: str | None, cpus: int | None, gpus: float | None,
    timeout: float | None = None,
) -> Any:  # fmt: skip
    """An engine for `bench` and `search`; None for the local one.

    Raises:
        UsageError: The engine is unknown, or an option belongs to the other engine.
    """
    from ..errors import UsageError, suggest

    given: dict[str, Any] = {
        key: v for key, v in {"address": address, "cpus": cpus, "gpus": gpus}.items() if v is not None
    }
    if name == "ray":
        from ..bench.cluster import Ray

        if workers is not None:
            raise UsageError("--workers is for the local engine; with ray, --cpus and --gpus say what a run needs.")
        return Ray(**given, timeout=timeout)
    if name != "local":
        raise UsageError(f"engine must be local or ray, got {name!r}.{suggest(name, ['local', 'ray'])}")
    if given:
        raise UsageError(f"--{next(iter(given))} is for --engine ray.")
    return None


Config = Annotated[
    Path | None,
    option(
        OUTPUT, "YAML file of options, as in batch_size: 8; flags win.", "--config", callback=_configure, is_eager=True
    ),
]


class _BesideBars(logging.StreamHandler):
    """Lines on stderr, above whatever progress bar is shown there."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=self.stream)


@contextlib.contextmanager
def speaking(quiet: bool, *, shows_result: bool = False) -> Iterator[None]:
    """Send our log and all warnings to stderr, as plain lines.

    Args:
        quiet: Whether to leave out all but warnings.
        shows_result: Whether the command ends with the result's own warnings, which are then left out here.
    """
    logger, handler = logging.getLogger("steadytune"), _BesideBars()
    if shows_result:
        handler.addFilter(lambda record: not hasattr(record, "of_result"))
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
def errors_in_one_line(go_on: str = ANEW) -> Iterator[None]:
    """A user's mistake is a sentence and exit code 2, Ctrl-C is 130; a traceback is for our own bugs.

    Args:
        go_on: What the same command does after Ctrl-C.
    """
    from ..errors import UsageError

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
        from ..version import __version__

        typer.echo(f"steadytune {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None: ...


def named_files(tests: list[str]) -> dict[str, Path]:
    """Test files by name: `NAME=FILE`, or `FILE` under its own stem; data sets of the hub likewise."""
    from ..data.files import HUB
    from ..errors import UsageError

    named: dict[str, Path] = {}
    for item in tests:
        name, equals, file = item.partition("=")
        if item.startswith(HUB):  # an equals sign is one of its options, as in ?split=test
            name, file = Path(item.removeprefix(HUB).partition("?")[0]).name, item
        elif not (equals and name) or Path(item).exists():
            name, file = Path(item).stem, item
        if name in named:
            raise UsageError(f"two test sets are called {name!r}: name them with --test NAME=FILE.")
        named[name] = Path(file)
    return named


def named_model(item: str) -> tuple[str, str]:
    """`NAME=MODEL`, or a model under its own name."""
    name, equals, path = item.partition("=")
    return (name, path) if equals and not Path(item).exists() else (Path(item).name, item)


def models_by_name(given: list[str]) -> dict[str, str]:
    """Models by their names.

    Raises:
        UsageError: Two have one name.
    """
    from ..errors import UsageError

    pairs = [named_model(item) for item in given]
    named = dict(pairs)
    if len(named) < len(pairs):
        names = ", ".join(name for name, _ in pairs)
        raise UsageError(f"two models have one name ({names}): name them with --model NAME=MODEL.")
    return named
