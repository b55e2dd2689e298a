"""Predict a table of any size: it is read, predicted and written a few thousand rows at a time."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data.chunks import FILES, Writer, read_chunks
from ..data.files import CHUNK_ROWS, HUB
from ..data.forms import PREDICTION
from ..data.tables import Table, is_empty, texts
from ..errors import UsageError, first_rows, suggest
from ..files.atomic import write_whole, writing
from ..pages.words import counted
from .fitted_model import FittedModel
from .progress import progress_bar

logger = logging.getLogger("steadytune")

ON_EMPTY = ("skip", "error")


@dataclass
class Predicted:
    """Counts of `predict_file`.

    Attributes:
        rows: Number of rows of the table; all were written.
        empty: Numbers of the rows without a text, which have no prediction.
        cut: Numbers of the rows with more tokens than the model reads.
    """

    rows: int = 0
    empty: list[int] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)


def check_output(
    output: Path, inputs: Sequence[str | Path], overwrite: bool, endings: Sequence[str] = tuple(FILES)
) -> None:
    """Raise for an output that cannot be written, or that would replace an input.

    Args:
        output: File to write.
        inputs: Tables and folders of models that are read.
        overwrite: Whether an existing file may be replaced.
        endings: Endings that the file may have.

    Raises:
        UsageError: The ending is unknown, the folder is missing or must not be written to, the file exists, or it is
            one of the inputs.
    """
    if output.suffix.lower() not in endings:
        raise UsageError(f"output {output}: files end in {', '.join(endings)}.{suggest(output.suffix, endings)}")
    for name in inputs:
        if not str(name).startswith(HUB) and _is_part_of(output, Path(name)):
            raise UsageError(f"output {output} is also read ({name}): choose another --output FILE.")
    if output.is_dir():
        raise UsageError(f"output {output} is a folder: give a file.")
    if output.exists() and not overwrite:
        raise UsageError(f"output {output} exists: replace it with --overwrite, or choose another --output FILE.")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"output {output}: no such directory {output.parent}. Make it first.")
    if not os.access(output.absolute().parent, os.W_OK | os.X_OK):
        raise UsageError(
            f"output {output}: the directory {output.parent} cannot be written: choose another --output FILE."
        )


def _is_part_of(output: Path, source: Path) -> bool:
    """Whether an output is an input file, or a file of the model in an input folder, also through links."""
    if not output.exists() or not source.exists():
        return False
    if source.is_dir():
        own = ("config.json", "steadytune.json", "metrics.json", "predictions.parquet", "history.parquet")
        return any((source / name).exists() and os.path.samefile(output, source / name) for name in own)
    return os.path.samefile(output, source)


def predict_file(
    model: FittedModel,
    source: str | Path,
    output: Path,
    *,
    text: Sequence[str] = (),
    keep: Sequence[str] | None = None,
    on_empty: str = "skip",
    overwrite: bool = False,
    progress: bool = False,
    chunk: int = CHUNK_ROWS,
) -> Predicted:
    """Write a table with its predictions, row by row in the same order, atomically.

    Several labels a row are written as the training rows had them: as lists (JSON in files of text), joined by the
    separator, or in one column of 0 and 1 for each class. Where the table has such columns of its own, those of the
    predictions are called ``prediction_<column>``.

    Args:
        model: Model that predicts.
        source: File, or data set of the hub (`hub:owner/name`).
        output: File to write: .csv, .tsv, .jsonl or .parquet.
        text: Text columns, if their names differ from training.
        keep: Columns of the table to write with the predictions; by default all.
        on_empty: ``"skip"`` leaves the prediction of a row without a text empty, ``"error"`` raises.
        overwrite: Whether to replace the output.
        progress: Whether to show a bar.
        chunk: Number of rows in memory at a time.

    Raises:
        UsageError: The table cannot be read, lacks a column, or has a cell that is not text; or the output cannot be
            written.
    """
    check_output(output, [source], overwrite)
    if on_empty not in ON_EMPTY:
        raise UsageError(f"on_empty must be one of {', '.join(ON_EMPTY)}, got {on_empty!r}.")
    columns = tuple(text) or model.text
    if len(columns) != len(model.text):
        known = " and ".join(map(repr, model.text))
        raise UsageError(
            f"the model reads {counted(len(model.text), 'text column')} a row ({known}), got {len(columns)} "
            f"({', '.join(columns)}): give --text NAME for each."
        )
    done = Predicted()

    def write(part: Path) -> None:
        with (
            contextlib.closing(read_chunks(source, chunk)) as chunks,
            Writer(part, output.suffix.lower()) as writer,
            progress_bar(desc="predicting", unit="row") if progress else contextlib.nullcontext() as bar,
        ):
            for frame in chunks:
                if frame.empty:
                    continue
                if not done.rows:
                    _tell(frame, columns, keep, str(source))
                kept = frame if keep is None else frame[list(dict.fromkeys(keep))]
                if not done.rows and output.suffix.lower() in (".jsonl", ".parquet"):
                    _check_twins(kept, output, str(source))
                predicted = _predict(model, Table(frame, str(source), columns, None), on_empty, done)
                as_text = output.suffix.lower() in (".csv", ".tsv")
                answers = model.form.write(predicted.pop(PREDICTION), kept.columns, as_text=as_text)
                if not done.rows and model.form.classes and {*model.form.columns} & {*kept.columns}:
                    names = ", ".join(map(str, answers))
                    logger.info("%s: the table has label columns of its own, predictions are in %s", source, names)
                predicted = pd.concat([answers, predicted], axis=1)
                _check_names(kept, predicted, str(source))
                writer.write(pd.concat([kept, predicted], axis=1))
                done.rows += len(frame)
                if bar is not None:
                    bar.update(len(frame))
            if not done.rows:
                raise UsageError(f"{source}: the table has no rows.")
            if len(done.empty) == done.rows:
                named = " and ".join(map(repr, columns))
                raise UsageError(
                    f"{source}: text column {named} is empty in all rows: choose another with --text NAME."
                )

    with writing(output, resumes=False):
        write_whole(output, write)
    if done.cut:
        logger.warning(
            "%s: texts of %d of %d rows have more than %d tokens and are cut (rows counted from 0: %s)",
            source, len(done.cut), done.rows, model.max_length, first_rows(done.cut),
        )  # fmt: skip
    if done.empty:
        logger.warning(
            "%s: %d of %d rows have no text and no prediction (rows counted from 0: %s)",
            source, len(done.empty), done.rows, first_rows(done.empty),
        )  # fmt: skip
    return done


def _tell(frame: pd.DataFrame, text: Sequence[str], keep: Sequence[str] | None, source: str) -> None:
    """Raise for a column to keep that does not exist; log which columns are read and which are kept."""
    names = [str(name) for name in frame.columns]
    for name in keep or ():
        if name not in names:
            raise UsageError(f"{source}: no column {name!r} to keep.{suggest(name, names)}")
    others = [name for name in names if name not in text]
    if others:
        shown = ", ".join(map(repr, others[:10])) + (", ..." if len(others) > 10 else "")
        kept = "all columns" if keep is None else ", ".join(map(repr, keep)) or "none"
        logger.info(
            "%s: text from %s; not read: %s; kept in the output: %s", source, " and ".join(map(repr, text)), shown, kept
        )


def _predict(model: FittedModel, table: Table, on_empty: str, done: Predicted) -> pd.DataFrame:
    """Predictions of a chunk, with its index; rows without a text and rows that are cut are noted in `done`."""
    frame, columns = table.frame, table.text or ()
    known = [is_empty(frame[column]).to_numpy(dtype=bool) for column in columns if column in frame.columns]
    empty = np.logical_or.reduce(known) if known and on_empty == "skip" else np.zeros(len(frame), dtype=bool)
    done.empty.extend(frame.index[empty].tolist())
    if empty.all():
        names = [PREDICTION, *(f"probability_{name}" for name in model.problem.names)]
        dtypes = dict.fromkeys(names, float) | ({PREDICTION: object} if model.problem.names else {})
        return pd.DataFrame(index=frame.index, columns=names).astype(dtypes)
    rows = frame[~empty]
    predicted, tokens = model.predict_rows(texts(dataclasses.replace(table, frame=rows)))
    done.cut.extend(rows.index[tokens > model.max_length].tolist())
    return predicted.set_axis(rows.index).reindex(frame.index)


def _check_twins(kept: pd.DataFrame, output: Path, source: str) -> None:
    """Raise for two columns of one name, which tables of CSV may have and other files cannot hold."""
    twice = kept.columns[kept.columns.duplicated()]
    if len(twice):
        raise UsageError(
            f"{source}: several columns are called {twice[0]!r}, which {output.suffix} files cannot hold: write .csv, "
            "rename them, or name other columns to keep with --keep."
        )


def _check_names(kept: pd.DataFrame, predicted: pd.DataFrame, source: str) -> None:
    names: list[Any] = [name for name in predicted.columns if name in set(kept.columns)]
    if names:
        raise UsageError(
            f"{source}: the table has a column {names[0]!r} of its own, which the predictions would have too: rename "
            "it, or name the columns to keep with --keep."
        )
