"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from ..errors import UsageError

WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk or a missing permission, in one sentence.

    Raises:
        UsageError: instead of what the libraries raise.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in WRITE_ERRORS:
            raise
        raise _unwritten(path, os.strerror(error.errno)) from error
    except (RuntimeError, SafetensorError) as error:  # torch and safetensors hide the system's error in a text
        found = next((os.strerror(n) for n in WRITE_ERRORS if os.strerror(n) in str(error)), None)
        if found is None and "PytorchStreamWriter failed writing" not in str(error):
            raise
        raise _unwritten(path, found or "the disk may be full") from error


def _unwritten(path: Path, why: str) -> UsageError:
    return UsageError(
        f"output {path} cannot be written: {why}. Make room or choose another --output DIR; what was saved before is "
        "whole, and --resume goes on from there."
    )


def write_whole(path: Path, writer: Callable[[Path], Any]) -> None:
    """Let `writer` fill a file beside the final place, then rename it."""
    part = path.with_name(f".{path.name}.part")
    try:
        writer(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """JSON, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
