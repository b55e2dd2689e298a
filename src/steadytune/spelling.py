"""Methods and procedures as text, such as `dps_dense:keep=0.7`: one parser for Python, command line and studies."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .errors import UsageError, suggest
from .fields import hints, nearest, rule


def as_methods(given: Any, registry: Mapping[str, type[Any]]) -> list[Any]:
    """A list of methods from one or several, each an instance or its name with options.

    Raises:
        UsageError: A name or option is unknown, or a value is not of the option's type or range.
    """
    listed = given if isinstance(given, Sequence) and not isinstance(given, str) else [given]
    return [parse_method(method, registry) if isinstance(method, str) else method for method in listed]


def parse_method(text: str, registry: Mapping[str, type[Any]], what: str = "method") -> Any:
    """A method from `name` or `name:option=value,option=value`, checked against the fields of its class."""
    name, _, tail = text.partition(":")
    name = name.strip()
    if name not in registry:
        raise UsageError(f"unknown {what} {name!r}.{suggest(name, registry)}")
    cls = registry[name]
    known = {field.name: hints(cls)[field.name] for field in dataclasses.fields(cls) if field.init}
    options: dict[str, Any] = {}
    for item in filter(None, map(str.strip, tail.split(","))):
        option, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise UsageError(f"{what} {name!r}: options are written option=value, got {item!r}.")
        if option not in known:
            raise UsageError(f"{what} {name!r}: unknown option {option!r}.{suggest(option, known)}")
        if option in options:
            raise UsageError(f"{what} {name!r}: {option} is given twice.")
        try:
            options[option] = convert(value, known[option])
        except ValueError:
            must = f"{option} must be {rule(known[option])}, got {value!r}{nearest(known[option], value)}"
            raise UsageError(f"{what} {name!r}: {must}.") from None
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{what} {name!r}: {error}") from error


def convert(text: str, hint: Any) -> Any:
    """Convert text to a value of this type; raise ValueError if it has none.

    An option of several numbers is written with slashes: `proximal=1/0.99`.
    """
    options = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Annotated:
        return convert(text, options[0])
    if typing.get_origin(hint) is Literal:
        return {str(option): option for option in options}[text] if text in map(str, options) else _no_value()
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for option in sorted(
            options, key=lambda option: option is str
        ):  # str comes last because every text would match it
            with contextlib.suppress(ValueError):
                return convert(text, option)
        return _no_value()
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return hint(*map(float, text.split("/")))
    if hint is bool:
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _no_value()
    if hint is type(None):
        return None if text.lower() == "none" else _no_value()
    return hint(text) if hint in (int, float, str) else _no_value()


def _no_value() -> Any:
    raise ValueError
