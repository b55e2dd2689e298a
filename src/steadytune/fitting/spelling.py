"""Methods and procedures from their names, and as records."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from math import inf
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, one_line
from ..spelling import as_methods, parse_method

if TYPE_CHECKING:
    from ..core import Method
    from .procedures.base import Procedure
    from .stages.meta import MetaLearner
    from .stages.pretraining import Pretraining


def method_record(method: Method) -> dict[str, Any]:
    """Name and options of a method, ready for JSON. Infinity becomes text, because JSON has no such number.

    Options that were added later (`Method.implied`) are left out if their value is what older records imply, so that
    the ids of old studies stay valid.
    """
    from ..core.method import entry
    from ..methods import METHODS

    options = entry(method)
    kind = options.pop("name")
    names = {cls: name for name, cls in METHODS.items()}
    options = {key: v for key, v in options.items() if key not in method.implied or v != method.implied[key]}
    return {"name": names.get(type(method), kind), "options": _finite(options)}


def _finite(options: dict[str, Any]) -> dict[str, Any]:
    """Options with infinity as text."""
    return {name: repr(value) if value in (inf, -inf) else value for name, value in options.items()}


def make_methods(methods: str | Method | Sequence[str | Method] | None) -> list[Method]:
    """Methods from instances and names with options; none of None.

    Raises:
        UsageError: What `as_methods` raises, or something that is neither a name nor a method.
    """
    from ..core import Method
    from ..methods import METHODS

    made = [] if methods is None else as_methods(methods, METHODS)
    for method in made:
        if not isinstance(method, Method):
            given = f"the class {method.__name__}" if isinstance(method, type) else repr(method)
            raise UsageError(
                f"methods must hold names with options, such as 'dps_dense:keep=0.7', or methods, such as "
                f"DPSDense(keep=0.7), got {one_line(given, 60)}."
            )
    return made


def make_procedure(procedure: str | Procedure | None) -> Procedure | None:
    """A procedure from `name:option=value`, or the one given."""
    from .procedures import PROCEDURES

    return parse_method(procedure, PROCEDURES, "procedure") if isinstance(procedure, str) else procedure


def procedure_record(procedure: Procedure) -> dict[str, Any]:
    """Name and every option, ready for JSON; infinity becomes text."""
    from .procedures import PROCEDURES

    names = {cls: name for name, cls in PROCEDURES.items()}
    fields: Any = procedure
    return {"name": names[type(procedure)], "options": _finite(dataclasses.asdict(fields))}


def make_pretraining(pretrain: str | Pretraining) -> Pretraining:
    """Training on texts alone from `name:option=value`, or the one given.

    Raises:
        UsageError: There is no such training.
    """
    from .stages.pretraining import PRETRAININGS, Pretraining

    chosen = parse_method(pretrain, PRETRAININGS, "pretrain") if isinstance(pretrain, str) else pretrain
    if not isinstance(chosen, Pretraining):
        raise UsageError(f"pretrain must be one of {', '.join(PRETRAININGS)}, got {one_line(repr(chosen), 60)}.")
    return chosen


def make_meta(meta: str | MetaLearner) -> MetaLearner:
    """Meta-learning from `name:option=value`, or the one given.

    Raises:
        UsageError: There is no such algorithm.
    """
    from .stages.meta import LEARNERS, MetaLearner

    chosen = parse_method(meta, LEARNERS, "meta") if isinstance(meta, str) else meta
    if not isinstance(chosen, MetaLearner):
        raise UsageError(f"meta must be one of {', '.join(LEARNERS)}, got {one_line(repr(chosen), 60)}.")
    return chosen


def meta_record(meta: str | MetaLearner) -> dict[str, Any]:
    """Name and every option, ready for JSON."""
    from .stages.meta import LEARNERS

    chosen: Any = make_meta(meta)
    names = {cls: name for name, cls in LEARNERS.items()}
    return {"name": names[type(chosen)], "options": dataclasses.asdict(chosen)}


def pretraining_record(pretrain: str | Pretraining) -> dict[str, Any]:
    """Name and every option, ready for JSON."""
    chosen: Any = make_pretraining(pretrain)
    return {"name": chosen.name, "options": dataclasses.asdict(chosen)}
