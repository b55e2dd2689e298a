"""Atomic writing of files."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import UsageError

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


@contextlib.contextmanager
def writing(path: Path, resumes: bool = True) -> Iterator[None]:
    """Turn the error of a full disk, a missing permission or a file in the way into one sentence.

    Args:
        path: What is written.
        resumes: Whether the command has a ``--resume`` that goes on with what was saved.

    Raises:
        UsageError: Instead of what the libraries raise.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        raise _unwritten(path, os.strerror(error.errno), resumes) from error
    except (RuntimeError, SafetensorError) as error:  # torch and safetensors hide the system's error in a text
        reason = next((os.strerror(n) for n in WRITE_ERRORS if os.strerror(n) in str(error)), None)
        if reason is None and "PytorchStreamWriter failed writing" not in str(error):
            raise
        raise _unwritten(path, reason or "the disk may be full", resumes) from error


def _unwritten(path: Path, why: str, resumes: bool) -> UsageError:
    saved = "; what was saved before is whole, and --resume goes on from there" if resumes else ""
    return UsageError(f"output {path} cannot be written: {why}. Make room or choose another --output{saved}.")


def write_whole(path: Path, writer: Callable[[Path], Any]) -> None:
    """Let ``writer`` make a file or a folder under a name beside ``path``, then rename it to ``path``.

    Args:
        path: Final path: a file, which is replaced, or a folder, which must be new or empty.
        writer: Function that gets the path to write to; if it fails, its output is removed.
    """
    part = part_of(path)
    try:
        writer(part)
        if part.is_file():
            part.chmod(0o666 & ~_umask())  # safetensors makes files that nobody else may read
        os.replace(part, path)
    except BaseException:
        remove(part)
        raise


def write_into(folder: Path, writer: Callable[[Path], Any], last: str) -> list[str]:
    """Let ``writer`` fill a new folder inside ``folder``, then move its files up into ``folder``, one by one.

    Args:
        folder: Final folder of the files; its other contents stay.
        writer: Function that gets the new folder.
        last: Name of the file that is moved last; its presence shows that the others are complete.

    Returns:
        The names of the files, in the order in which they were moved.
    """
    part = part_of(folder / last)
    part.mkdir()
    try:
        writer(part)
        names = sorted(os.listdir(part), key=lambda name: name == last)
        for name in names:
            os.replace(part / name, folder / name)
        return names
    finally:
        remove(part)


def part_of(path: Path) -> Path:
    """The name under which this process writes ``path``; two processes never write under the same name."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def sweep(folder: Path) -> None:
    """Remove half-written files of a killed process from a folder."""
    for part in folder.glob(".*.part"):
        remove(part)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
