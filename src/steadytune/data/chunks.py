"""Tables larger than memory: read and written a few thousand rows at a time. No torch here."""

from __future__ import annotations

import csv
import itertools
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UsageError, one_line
from .files import (
    CHUNK_ROWS,
    HUB,
    checked_rows,
    csv_chunks,
    csv_dialect,
    json_frame,
    json_row,
    named_columns,
    read_rows,
    readable,
    tsv_dialect,
)  # fmt: skip

FILES = (".csv", ".tsv", ".jsonl", ".parquet")  # endings of files that are written


def read_chunks(source: str | Path, rows: int = CHUNK_ROWS) -> Generator[pd.DataFrame, None, None]:
    """Read a file in frames of a number of rows, as `read_rows` would; the index counts the rows of the file.

    A JSON array or a data set of the hub is read at once.

    Raises:
        UsageError: As `read_rows`, when the faulty row is reached.
    """
    path, begin = Path(source), 0
    if str(source).startswith(HUB) or _is_array(path):
        whole = read_rows(str(source))[0]
        yield from (whole.iloc[start : start + rows] for start in range(0, len(whole), rows))
        return
    with readable(path):
        for frame in _CHUNKS[path.suffix.lower()](path, rows):
            frame = named_columns(frame, str(path))
            yield frame.set_axis(pd.RangeIndex(begin, begin + len(frame)))
            begin += len(frame)


def _is_array(path: Path) -> bool:
    """Whether a file of JSON is one array."""
    if path.suffix.lower() not in (".json", ".jsonl", ".ndjson") or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _csv(path: Path, rows: int) -> Iterator[pd.DataFrame]:
    dialect = csv_dialect(path)
    for frame in csv_chunks(path, rows=rows, **dialect):
        yield checked_rows(frame, path, dialect["sep"])


def _tsv(path: Path, rows: int) -> Iterator[pd.DataFrame]:
    for frame in csv_chunks(path, rows=rows, **tsv_dialect(path)):
        yield checked_rows(frame, path, "\t")


def _json(path: Path, rows: int) -> Iterator[pd.DataFrame]:
    # all lines are read for their fields first: rows may lack some, and frames of other columns are not one table
    names = list(dict.fromkeys(name for row in _objects(path) if isinstance(row, dict) for name in row))
    objects = _objects(path)
    while part := list(itertools.islice(objects, rows)):
        yield json_frame(path, part, names)


def _objects(path: Path) -> Iterator[Any]:
    """What stands in each line of a file of JSON lines."""
    with path.open(encoding="utf-8-sig") as file:
        yield from (json_row(path, number, line) for number, line in enumerate(file, 1) if line.strip())


def _parquet(path: Path, rows: int) -> Iterator[pd.DataFrame]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=rows):
            # by default whole numbers become floats where one is missing, and large ones other numbers
            yield pa.Table.from_batches([batch]).to_pandas(integer_object_nulls=True)


_CHUNKS = {".csv": _csv, ".tsv": _tsv, ".jsonl": _json, ".ndjson": _json, ".json": _json, ".parquet": _parquet}


class Writer:
    """Context manager of a file to which frames with the same columns are appended."""

    def __init__(self, path: Path, ending: str) -> None:
        """Open a new file at `path`, in the format of an ending (see `FILES`)."""
        self.path, self.ending, self.rows = path, ending, 0
        self._parquet: pq.ParquetWriter | None = None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *error: Any) -> None:
        if self._parquet is not None:
            self._parquet.close()

    def write(self, frame: pd.DataFrame) -> None:
        """Append rows.

        Raises:
            UsageError: The format is Parquet, and a column has other types than in earlier rows.
        """
        first = self.rows == 0
        if self.ending == ".parquet":
            self._write_parquet(frame)
        elif self.ending == ".jsonl":
            # by default dates become milliseconds since 1970, and numbers are cut after ten digits
            exact: dict[str, Any] = {"date_format": "iso", "date_unit": "us", "double_precision": 15}
            mode: Literal["w", "a"] = "w" if first else "a"
            try:
                frame.to_json(self.path, orient="records", lines=True, force_ascii=False, mode=mode, **exact)
            except (UnicodeDecodeError, OverflowError) as error:
                raise _unwritable("JSON lines", error) from error
        else:
            sep = "\t" if self.ending == ".tsv" else ","
            write_csv(_with_lists(frame), self.path, sep=sep, header=first, mode="w" if first else "a")
        self.rows += len(frame)

    def _write_parquet(self, frame: pd.DataFrame) -> None:
        try:
            if self._parquet is None:
                table = pa.Table.from_pandas(frame, preserve_index=False)
                fields = [field.with_type(_known(field.type)) for field in table.schema]
                self._parquet = pq.ParquetWriter(self.path, pa.schema(fields))
            schema = self._parquet.schema
            # a schema given to from_pandas would cut fractions off where earlier rows have whole numbers
            self._parquet.write_table(pa.Table.from_pandas(frame, preserve_index=False).cast(schema))
        except (pa.ArrowException, OverflowError, ValueError, KeyError) as error:
            raise _unwritable("Parquet", error) from error


def _unwritable(form: str, error: Exception) -> UsageError:
    return UsageError(
        f"a column has cells that {form} cannot hold, or of several types ({one_line(error)[:200]}): write another "
        "format, or leave the column out with --keep."
    )


def write_csv(frame: pd.DataFrame, path: Path, **settings: Any) -> None:
    """Write a frame without its index, so that each row is read as one.

    The csv module quotes line feeds only: a carriage return in a cell would begin a new row.
    """
    cells = (cell for place in range(frame.shape[1]) for cell in frame.iloc[:, place] if isinstance(cell, str))
    quoting = csv.QUOTE_NONNUMERIC if any("\r" in cell for cell in cells) else csv.QUOTE_MINIMAL
    frame.to_csv(path, index=False, quoting=quoting, **settings)  # type: ignore[call-overload]


def _with_lists(frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with lists for the arrays that Parquet gives: NumPy prints these without commas, cut and rounded."""
    frame = frame.copy(deep=False)
    for place in range(frame.shape[1]):
        cells = frame.iloc[:, place].tolist()
        if any(isinstance(cell, np.ndarray) for cell in cells):
            lists = [cell.tolist() if isinstance(cell, np.ndarray) else cell for cell in cells]
            frame.isetitem(place, np.fromiter(lists, dtype=object, count=len(lists)))
    return frame


def _known(kind: pa.DataType) -> pa.DataType:
    """The type of a column that may have no value so far, or empty lists only: these are strings, or lists of them."""
    if pa.types.is_list(kind):
        return pa.list_(_known(kind.value_type))
    return pa.string() if pa.types.is_null(kind) else kind
