"""Records of a bench folder: one JSON file for each run. No torch here.

A file that is not a usable record (cut short, another program's JSON, the format of a later version) is skipped and
reported with the reason, so that one bad file does not stop the report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from ..config import Rule, checked
from ..errors import UsageError, one_line

FORMAT = 1
SUBGROUPS = "subgroups"  # entry of a set with the scores of each of its subgroups, where rows have subgroups
FOLDER, STUDY, PLANNED = "records", "study.yaml", "planned.json"

Finite = Annotated[float, Rule("a finite number or null", allow_inf_nan=False)]


@dataclass
class _Named:
    """A model or a task."""

    name: str
    fingerprint: str


@dataclass
class _Method:
    name: str
    options: dict[str, Any]


@dataclass
class _Spec:
    model: _Named
    task: _Named
    recipe: str
    methods: list[_Method]
    options: dict[str, Any]
    train_size: int | None
    corruption: dict[str, Any]
    tests: dict[str, Any]
    seeds: dict[str, Any]


@dataclass
class _Set:
    domain: Literal["in", "out", "select"]
    rows: int
    baseline: Finite | None
    subgroups: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class _Cost:
    seconds: Finite | None


@dataclass
class _Record:
    """The entries of a record that reports rely on; it may hold others."""

    id: str
    spec: _Spec
    status: Literal["done", "failed"]
    error: str | None
    metric: str
    sets: dict[str, _Set]
    training: dict[str, Any] | None
    cost: _Cost
    context: dict[str, Any]
    seen: list[Any]
    finished: str


class Problem(NamedTuple):
    """A file that was skipped, and the reason."""

    file: str
    reason: str


def read_records(folder: str | Path) -> tuple[list[dict[str, Any]], list[Problem]]:
    """Read every usable record of a bench folder, in the order of the file names, and name the files skipped.

    Raises:
        UsageError: There is no such folder, or it has no `records/`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder}: no such folder. Give that of a bench or of a fit.")
    if not (folder / FOLDER).is_dir():
        raise UsageError(f"{folder}: no {FOLDER}/ in it, so it is not the folder of a bench.")
    records, problems = [], []
    for file in sorted((folder / FOLDER).iterdir()):
        if file.name.startswith("."):  # a file that is still being written
            continue
        try:
            records.append(read_record(file))
        except (OSError, ValueError) as error:  # json and Unicode errors are ValueErrors
            problems.append(Problem(file.name, one_line(error)))
    return records, problems


def planned(folder: str | Path) -> dict[str, str]:
    """Map the id of every planned run, done or not, to its title; empty without a readable `planned.json`."""
    try:
        ids = json.loads((Path(folder) / PLANNED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(id): str(title) for id, title in ids.items()} if isinstance(ids, dict) else {}


def read_record(file: Path) -> dict[str, Any]:
    """Read one record.

    Raises:
        OSError: The file cannot be read.
        ValueError: It is no record of this format.
    """
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
    checked(_Record, record, lambda path: ".".join(map(str, path)))
    if record["id"] != file.stem:
        raise ValueError(f"holds the record {record['id']!r}: it was renamed or copied")
    for part in ("cost", "training"):
        _check_numbers(part, record[part] or {}, ("curve", "failing"))
    for name, scores in record["sets"].items():
        _check_numbers(f"sets.{name}", scores, ("domain", SUBGROUPS))
        for part, own in scores.get(SUBGROUPS, {}).items():
            _check_numbers(f"sets.{name}.{SUBGROUPS}.{part}", own, ())
    return record


def _check_numbers(where: str, values: Mapping[str, Any], others: tuple[str, ...]) -> None:
    """Raise unless all values but ``others`` are finite numbers or null."""
    numbers = {key: value for key, value in values.items() if key not in others}
    checked(dict[str, Finite | None], numbers, lambda path: ".".join([where, *map(str, path)]))
