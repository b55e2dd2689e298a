"""Methods and procedures from their names, and as records."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..spelling import as_methods, parse_method

if TYPE_CHECKING:
    from ..core import Method
    from .procedures import MixupBLO as Procedure


def method_record(method: Any) -> dict[str, Any]:
    """Name and every option of a method, ready for JSON."""
    from ..methods import METHODS

    names = {cls: name for name, cls in METHODS.items()}
    options = {field.name: _plain(getattr(method, field.name)) for field in dataclasses.fields(method)}
    if (where := getattr(method, "where", None)) is not None:  # set by `only`
        options["where"] = _plain(where)
    return {"name": names.get(type(method), type(method).__name__), "options": options}


def _plain(value: Any) -> Any:
    """The value itself where JSON has it, a function by its name, anything else (infinity too) as it prints."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return getattr(value, "__qualname__", repr(value))
    return value


def make_methods(methods: str | Method | Sequence[str | Method]) -> list[Method]:
    """Methods from instances and names with options."""
    from ..methods import METHODS

    return as_methods(methods, METHODS)


def make_procedure(procedure: str | Procedure | None) -> Procedure | None:
    """A procedure from `name:option=value`, or the one given."""
    from .procedures import PROCEDURES

    return parse_method(procedure, PROCEDURES, "procedure") if isinstance(procedure, str) else procedure


def procedure_record(procedure: Procedure) -> dict[str, Any]:
    """Name and every option, ready for JSON."""
    from .procedures import PROCEDURES

    names = {cls: name for name, cls in PROCEDURES.items()}
    return {"name": names[type(procedure)], "options": dataclasses.asdict(procedure)}
