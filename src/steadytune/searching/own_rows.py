"""The rows of a search: the file of the user's, or a copy of what is read of rows that are in none."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from ..bench.own_tables import OwnTables
from ..data.cells import label_name
from ..data.files import HUB, column_name, read_rows
from ..data.forms import as_label
from ..data.prepare import prepare
from ..data.tables import Table
from ..files.atomic import write_whole, writing

if TYPE_CHECKING:
    from .cells import Task

ROWS = "rows.parquet"  # in the folder of the cells: rows without a file
APART = "apart.parquet"  # there too: texts of the test rows


def _column_names(given: Any) -> tuple[str, ...] | None:
    """Columns as a study has them: one name or several, which are numbers where the columns have no names."""
    if given is None:
        return None
    return tuple(map(column_name, given if isinstance(given, (list, tuple)) else [given]))


def own_table(train: Any, scratch: Path, **given: Any) -> OwnTables:
    """The table of a search: the file given, or a copy of what is read of rows that are in none.

    Args:
        train: As of `fit`.
        scratch: Folder of the copy, until the search has been checked; see `keep_rows`.
        **given: The columns as of `fit`, kind, metric and folds.

    Raises:
        UsageError: Rows that are in no file are not right.
    """
    given |= {"text": _column_names(given["text"]), "label": as_label(given["label"])}
    given["group"] = None if given.get("group") is None else column_name(given["group"])
    given["subgroup"] = _column_names(given.get("subgroup"))
    if _in_file(train):
        return OwnTables("table", str(Path(train).absolute()), **given)
    frame, _ = read_rows(train, "the train table")
    columns = {name: given[name] for name in ("text", "label", "kind", "group", "label_separator", "subgroup")}
    table = Table.of(frame, columns.pop("text"), columns.pop("label"), "train", **columns)
    found = prepare(table, {}, validation_share=0.0).table
    assert found is not None
    text, label = given["text"], given["label"] = found.columns
    used = {*text, *([label] if isinstance(label, str) else label), table.group, *table.subgroup}
    kept = frame.loc[:, [column in used for column in frame.columns]].apply(_of_one_type)
    kept.to_parquet(scratch / ROWS, index=False)
    return OwnTables("table", str(scratch / ROWS), **given)


def _of_one_type(column: pd.Series) -> pd.Series:
    """The column, as text if it has cells of several types, which no file of columns holds."""
    import pyarrow as pa

    try:
        pa.Array.from_pandas(column)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return column.map(label_name, na_action="ignore")
    return column


def _in_file(train: Any) -> bool:
    return isinstance(train, (str, Path)) and not str(train).startswith(HUB)


def keep_rows(task: Task, train: Any, folder: Path) -> Task:
    """The task with rows that are in no file of the user's beside its records, where all trainings read them."""
    if _in_file(train):
        return task
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / ROWS, lambda part: shutil.copyfile(task.table.train, part))
    return dataclasses.replace(task, table=dataclasses.replace(task.table, train=str((folder / ROWS).absolute())))


def keep_apart(task: Task, tested: Sequence[pd.DataFrame], folder: Path) -> Task:
    """The task whose trainings learn from no text of the test rows, which are written beside its records.

    Args:
        task: The task.
        tested: Checked rows of the test tables.
        folder: Folder of the records.
    """
    if not tested:
        return task
    table = task.data.table
    assert table is not None
    names = dict(zip(("text", "text_pair"), table.columns[0], strict=False))
    rows = pd.concat([rows[list(names)] for rows in tested]).drop_duplicates().rename(columns=names)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / APART, lambda part: rows.to_parquet(part, index=False))
    apart = (str((folder / APART).absolute()),)
    return dataclasses.replace(task, table=dataclasses.replace(task.table, apart=apart))
