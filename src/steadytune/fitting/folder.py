"""The output folder of a run: check it, lock it, and write its files atomically."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from ..errors import UsageError
from ..files.atomic import sweep, write_into, writing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RECORD = "steadytune.json"
SEARCH = "search"  # folder of the trainings of a search, which a fit leaves alone
MEMBERS = "members"  # folder of the models of an ensemble


class Output:
    """The output folder of a run: a model directory with the run's records, and `checkpoints/` during training.

    Files are written atomically: under another name, then renamed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    def check(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """Return the record of the run to resume, or None for a fresh start; raise if other files are in the folder."""
        if resume and overwrite:
            raise UsageError("give --resume (go on) or --overwrite (start anew), not both.")
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"output {self.path} must be a directory, and is a file.")
        record = self._record()
        if resume:
            return self._resumable(record)
        if self._in_use():
            if record is None:
                raise UsageError(f"output {self.path} is not empty and holds no run: choose another --output DIR.")
            if not overwrite:
                raise UsageError(
                    f"output {self.path} already holds a run ({record['status']}): "
                    "go on with --resume, start anew with --overwrite, or choose another --output DIR."
                )
        return None

    def others(self) -> list[Path]:
        """Files that are not of a run, where no run has written its record."""
        kept = (self.checkpoints, self.path / SEARCH)
        files = self.path.iterdir() if self.path.is_dir() else ()
        return sorted(p for p in files if p not in kept and not p.name.startswith(f".{RECORD}"))

    def _in_use(self) -> bool:
        """Whether the folder has other files than those of a run that was killed before it wrote its record."""
        return bool(self.others()) or any(self.checkpoints.glob("*/*"))

    def _record(self) -> dict[str, Any] | None:
        file = self.path / RECORD
        if not file.is_file():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{file}: not JSON ({error}). Choose another --output DIR.") from error
        if not isinstance(record, dict) or record.get("format") != 1:
            raise UsageError(f"{file}: not a record of this version of steadytune. Choose another --output DIR.")
        return record

    def _resumable(self, record: dict[str, Any] | None) -> dict[str, Any]:
        if record is None:
            raise UsageError(f"--resume: no run in {self.path} (no {RECORD}). Leave --resume out to start one.")
        if record["status"] == "finished":
            raise UsageError(f"--resume: the run in {self.path} is finished. Train anew with --overwrite.")
        return record

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Lock the folder against other runs; the system releases the lock if this run crashes.

        Raises:
            UsageError: Another run holds the lock, or the folder cannot be written.
        """
        fresh = not self.path.exists()
        with writing(self.path):
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.checkpoints / ".lock")
            try:
                lock.acquire(blocking=False)
            except Timeout as error:
                raise UsageError(
                    f"output {self.path} is in use by another run: choose another --output DIR."
                ) from error
            try:
                yield
            finally:
                lock.release()
                if fresh:
                    self._forget_empty()

    def clear(self) -> None:
        """Remove the files that an earlier run recorded as its own, and no others."""
        record = self._record()
        for name in record["files"] if record else ():
            (self.path / Path(name).name).unlink(missing_ok=True)
        for folder in (self.path / MEMBERS, *self.checkpoints.glob("*/")):
            shutil.rmtree(folder, ignore_errors=True)

    def sweep(self) -> None:
        """Remove half-written files of a killed run."""
        sweep(self.path)

    def _forget_empty(self) -> None:
        """Remove empty folders that this run made."""
        with contextlib.suppress(OSError):
            for folder in self.checkpoints.glob("*/"):
                folder.rmdir()
            if {p.name for p in self.checkpoints.iterdir()} <= {".lock"}:
                (self.checkpoints / ".lock").unlink(missing_ok=True)
                self.checkpoints.rmdir()
                self.path.rmdir()

    def save_model(self, write: Callable[[str], Any], tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Let ``write`` fill a folder with the model, `config.json` last, so that an incomplete model does not load."""

        def fill(folder: Path) -> None:
            write(str(folder))
            tokenizer.save_pretrained(folder)

        return write_into(self.path, fill, last="config.json")


def read_record(folder: str | Path) -> dict[str, Any]:
    """The record of a finished run.

    Raises:
        UsageError: The folder has no finished run.
    """
    file = Path(folder, RECORD)
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["format"] != 1 or record["status"] != "finished":
            raise UsageError(f"{folder}: the run is {record['status']}, not finished: run fit with --resume first.")
        return record
    except (OSError, ValueError, TypeError, KeyError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(
            f"{folder}: no model that steadytune fit has written (no readable {RECORD}): give the --output of a fit."
        ) from error


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end (the trainer's state comes last)."""
    whole = [path for path in folder.glob("checkpoint-*") if _is_whole(path)]
    return max(whole, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def same_run(then: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume a run under another recipe, on other training rows, or on others that select, and say why."""
    now = json.loads(json.dumps(now))
    differences = list(_differences(_decisive(then["recipe"]), _decisive(now["recipe"])))
    differences += _differences(_rows(then["data"]["train"]), _rows(now["data"]["train"]), "training data")
    if now["recipe"]["evaluations"]:  # scores of the steps before are compared with those after
        before, after = (record["data"].get("validation", {}) for record in (then, now))
        differences += _differences(_rows(before), _rows(after), "validation data")
    if differences:
        raise UsageError(
            f"--resume: the run in {folder} was started otherwise: {'; '.join(differences)}. "
            "Give the same options, or start anew with --overwrite."
        )


def _decisive(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Without what has no effect: how several runs are combined, where there is one, and how a path is written."""
    model = recipe["model"]
    local = {"model": str(Path(model).resolve())} if Path(model).is_dir() else {}
    return {key: value for key, value in recipe.items() if key != "combine" or recipe["runs"] > 1} | local


def _rows(data: Mapping[str, Any]) -> dict[str, Any]:
    """Facts about the rows of a set, without the path of their file."""
    return {name: value for name, value in data.items() if name != "source"}


def _differences(then: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            yield from _differences(then.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif then != now:
        yield f"{where} was {then!r}, is {now!r}"
