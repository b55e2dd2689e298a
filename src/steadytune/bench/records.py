"""The records of a bench folder, as they lie on disk: one JSON file a run. No torch here.

A record that cannot be used (half a file, another program's JSON, a format of a later version) is named with the
reason and skipped: one bad file never costs the report.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

from ..errors import UsageError, one_line

FORMAT = 1
FOLDER, STUDY, PLANNED = "records", "study.yaml", "planned.json"

# Type of every entry that reports rely on; a nested mapping is checked in turn, a tuple lists what is allowed.
_SHAPE: dict[str, Any] = {
    "id": str,
    "spec": {
        "model": {"name": str, "fingerprint": str},
        "task": {"name": str, "fingerprint": str},
        "recipe": str,
        "methods": list,
        "options": dict,
        "train_size": (int, NoneType),
        "corruption": dict,
        "tests": dict,
        "seeds": dict,
    },
    "status": str,
    "error": (str, NoneType),
    "metric": str,
    "sets": dict,
    "training": (dict, NoneType),
    "cost": {"seconds": (int, float, NoneType)},
    "context": dict,
    "seen": list,
    "finished": str,
}
_SET: dict[str, Any] = {"domain": str, "rows": int, "baseline": (int, float, NoneType)}
STATUSES, DOMAINS = ("done", "failed"), ("in", "out", "select")


class Problem(NamedTuple):
    """A file that is not shown, and why."""

    file: str
    reason: str


def read_records(folder: str | Path) -> tuple[list[dict[str, Any]], list[Problem]]:
    """Every usable record of a bench folder, in the order of the file names, and what had to be skipped.

    Raises:
        UsageError: there is no such folder, or it has no `records/`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder. Give the folder of a bench.")
    if not (folder / FOLDER).is_dir():
        raise UsageError(f"{folder}: no {FOLDER}/ in it, so it is not the folder of a bench.")
    records, problems = [], []
    for file in sorted((folder / FOLDER).iterdir()):
        if file.name.startswith("."):  # what a writer has not finished yet
            continue
        try:
            records.append(_read(file))
        except (OSError, ValueError) as error:  # json and Unicode errors are ValueErrors
            problems.append(Problem(file.name, one_line(error)))
    return records, problems


def planned(folder: str | Path) -> dict[str, str]:
    """Id -> title of every run that was asked for, done or not; empty where nobody wrote it down."""
    try:
        found = json.loads((Path(folder) / PLANNED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(id): str(title) for id, title in found.items()} if isinstance(found, dict) else {}


def _read(file: Path) -> dict[str, Any]:
    if file.suffix != ".json":
        raise ValueError("not a record: records end in .json")
    try:
        record = json.loads(file.read_text(encoding="utf-8"), parse_constant=lambda name: None)  # NaN is undefined
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not readable JSON ({one_line(error)})") from error
    if not isinstance(record, dict) or "format" not in record:
        raise ValueError("not a bench record: no entry 'format'")
    if record["format"] != FORMAT:
        raise ValueError(f"format {record['format']!r}: this version of steadytune reads format {FORMAT}")
    _check(record, _SHAPE, "")
    if record["id"] != file.stem:
        raise ValueError(f"holds the record {record['id']!r}: it was renamed or copied")
    _among("status", record["status"], STATUSES)
    for method in record["spec"]["methods"]:
        _check(method, {"name": str, "options": dict}, "spec.methods")
    for part in ("cost", "training"):
        _check_numbers(part, record[part] or {}, ("curve",))
    for name, scores in record["sets"].items():
        _check(scores, _SET, f"sets.{name}")
        _among(f"sets.{name}.domain", scores["domain"], DOMAINS)
        _check_numbers(f"sets.{name}", scores, ("domain",))
    return record


def _check(value: Any, shape: Any, where: str) -> None:
    """Raise, naming the entry, unless a value has this shape."""
    if isinstance(shape, Mapping):
        _check(value, dict, where)
        for key, inner in shape.items():
            path = f"{where}.{key}" if where else key
            if key not in value:
                raise ValueError(f"no entry {path!r}")
            _check(value[key], inner, path)
    elif not isinstance(value, shape):
        raise ValueError(f"{where} is of the wrong type: {type(value).__name__}")


def _among(where: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{where} must be one of {', '.join(known)}, got {value!r}")


def _check_numbers(where: str, values: Mapping[str, Any], others: tuple[str, ...]) -> None:
    """Raise unless all values are finite or null, but those called ``others``."""
    for key, value in values.items():
        finite = isinstance(value, (int, float)) and math.isfinite(value)
        if key not in others and value is not None and not finite:
            raise ValueError(f"{where}.{key} must be a finite number or null, got {value!r}")
