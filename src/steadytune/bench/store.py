"""A folder of records, one file for each run. Several invocations may work on it at the same time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from filelock import FileLock, Timeout

from ..errors import UsageError
from ..files.atomic import write_json, write_whole, writing
from .records import PLANNED, STUDY, planned


class Store:
    """Records, predictions and locks of a study.

    A record is written last and atomically: a run without a record was not done. A lock marks a run that a process is
    doing; the system releases it when that process ends, even if it was killed.

    Args:
        folder: Folder of the study; it is made at the first write.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def record(self, id: str) -> Path:
        return self.folder / "records" / f"{id}.json"

    def predictions(self, id: str) -> Path:
        return self.folder / "predictions" / f"{id}.parquet"

    def model(self, id: str) -> Path:
        return self.folder / "models" / id

    def has(self, id: str) -> bool:
        """Whether the run has a record, done or failed."""
        return self.record(id).is_file()

    def begin(self, study: str, runs: Mapping[str, str]) -> None:
        """Make the folder, and write into it the study file and the list of all runs that it has planned so far.

        Invocations with one study add up. Those of a study that was edited since are no longer planned.

        Args:
            study: Text of the study file.
            runs: Title of each run by its id.

        Raises:
            UsageError: The folder cannot be written.
        """
        with writing(self.folder):
            for name in ("records", "predictions", "locks"):
                (self.folder / name).mkdir(parents=True, exist_ok=True)
            file = self.folder / STUDY
            same = file.is_file() and file.read_text(encoding="utf-8", errors="replace") == study
            before = planned(self.folder) if same else {}
            write_whole(file, lambda part: part.write_text(study, encoding="utf-8"))
            write_json(self.folder / PLANNED, {**before, **runs})

    @contextlib.contextmanager
    def claim(self, id: str) -> Iterator[bool]:
        """Lock a run while it is done; False if another process holds it."""
        lock = FileLock(self.folder / "locks" / f"{id}.lock")
        try:
            lock.acquire(blocking=False)
        except Timeout:
            yield False
            return
        try:
            yield True
        finally:
            lock.release()

    def write(self, record: dict[str, Any], predictions: pd.DataFrame | None = None) -> None:
        """Write the results of a run, the record last.

        Raises:
            UsageError: The folder cannot be written.
        """
        with writing(self.folder):
            if predictions is not None:
                write_whole(self.predictions(record["id"]), predictions.to_parquet)
            write_json(self.record(record["id"]), record)

    def forget(self, id: str) -> None:
        """Remove a record, so that the run is done again."""
        self.record(id).unlink(missing_ok=True)


def checked(folder: str | Path) -> Path:
    """Return the folder if it is new, empty, or that of a study.

    Raises:
        UsageError: It holds something else.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output {folder} is a file: choose another --output DIR.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "records").is_dir():
        raise UsageError(f"output {folder} is not empty and holds no study: choose another --output DIR.")
    return folder
