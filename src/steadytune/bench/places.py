"""Places of a study's models and files on this machine, and hashes of their contents. No torch here."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from ..errors import UsageError

WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def expanded(path: str | Path) -> str:
    """A path in which every ``$NAME`` is replaced by its value in the environment.

    Raises:
        UsageError: A variable is not set.
    """
    filled = os.path.expandvars(path)
    if unset := re.search(r"\$\{?(\w+)", filled):
        raise UsageError(
            f"the environment variable {unset[1]} in {str(path)!r} is not set: {unset[1]}=DIR steadytune ..."
        )
    return str(filled)


def placed(file: str, folder: Path) -> str:
    """A path in which a relative one is taken from a folder; one that begins with ``$NAME`` stays."""
    return file if file.startswith("$") else os.path.abspath(folder / file)


def seen_from(file: str, folder: Path) -> str:
    """A path relative to a folder; one that begins with ``$NAME`` stays."""
    return file if file.startswith("$") else os.path.relpath(file, folder)


def fingerprint_files(files: Iterable[Path], remedy: str = "check its path in the study") -> str:
    """Hash of the contents, 16 hexadecimal digits.

    Args:
        files: The files, in the order in which they are hashed.
        remedy: End of the error for a missing file, which says what to do.

    Raises:
        UsageError: A file is not there.
    """
    total = hashlib.sha256()
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file}: no such file: {remedy}.")
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()[:16]


def fingerprint_model(path: str) -> str:
    """Hash of a model's config and weights, or the commit of a hub model; 16 hexadecimal digits.

    Raises:
        UsageError: Neither a model directory nor a model of the hub.
    """
    folder = Path(path)
    if folder.is_dir():
        weights = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
        if not weights or not (folder / "config.json").is_file():
            raise UsageError(f"model {path!r} has no config.json or no weights: give a Hugging Face model directory.")
        return fingerprint_files([folder / "config.json", *weights])
    if path.startswith((".", "/", "~")):
        raise UsageError(f"model {path!r}: no such directory.")
    return _hub_commit(path)[:16]


def _hub_commit(name: str) -> str:
    from transformers import AutoConfig

    try:
        return str(AutoConfig.from_pretrained(name)._commit_hash or name)
    except (OSError, ValueError) as error:
        raise UsageError(f"model {name!r}: no such directory, and the hub does not give it: {error}") from error
