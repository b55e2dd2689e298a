"""Ranges and choices of the fields of a dataclass. The type declares them, and checks, messages and pages read them.

    keep: Annotated[float, Within("(0, 1]")] = 0.7
    threshold: Literal["tensor", "global"] = "tensor"

No torch here.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import types
import typing
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

from .errors import UsageError


@dataclass(frozen=True)
class Within:
    """Interval of a number.

    Attributes:
        interval: The interval as in mathematics, for example ``"(0, 1]"`` or ``"[1, inf)"``.
    """

    interval: str

    @property
    def ends(self) -> tuple[float, float]:
        """The lower and the upper end."""
        low, high = self.interval[1:-1].split(",")
        return float(low), float(high)

    def __contains__(self, value: float) -> bool:
        low, high = self.ends
        above = low <= value if self.interval[0] == "[" else low < value
        return above and (value <= high if self.interval[-1] == "]" else value < high)

    def __str__(self) -> str:
        """The end of a sentence: "in (0, 1]", "from 1 on", "above 0"."""
        if self.interval[1:-1].endswith("inf"):
            low = self.interval[1:].partition(",")[0]
            said = f"from {low} on" if self.interval[0] == "[" else f"above {low}"
            return f"{said}, inf included" if self.interval[-1] == "]" else said
        return f"in {self.interval}"


def check_fields(instance: Any) -> None:
    """Raise for the first field of a dataclass with a value that its type does not allow.

    Raises:
        UsageError: The message names the field, the allowed values, the value, and the nearest choice.
    """
    declared = hints(type(instance))
    for field in dataclasses.fields(instance):
        if field.init and field.name in declared:
            check(field.name, getattr(instance, field.name), declared[field.name])


def check(name: str, value: Any, hint: Any) -> None:
    """Raise unless ``hint`` allows ``value``; ``name`` is its name in the message.

    Raises:
        UsageError: See `check_fields`.
    """
    if not allows(hint, value):
        raise UsageError(f"{name} must be {rule(hint)}, got {value!r}{nearest(hint, value)}")


def allows(hint: Any, value: Any) -> bool:
    """Whether a value has a type and is in its interval. NumPy's numbers count as Python's."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        base, *rest = arguments
        return allows(base, value) and all(value in within for within in rest if isinstance(within, Within))
    if origin is Literal:
        return any(value == choice and isinstance(value, type(choice)) for choice in arguments)
    if origin in (typing.Union, types.UnionType):
        return any(allows(option, value) for option in arguments)
    if hint is bool:
        return isinstance(value, bool) or type(value).__name__ in ("bool", "bool_")
    if hint in (int, float):
        return isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
    kind = origin or hint
    return isinstance(value, kind) if isinstance(kind, type) else True


def rule(hint: Any) -> str:
    """Words for a type after "must be": "a number in (0, 1]", "one of 'a', 'b'"."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        base, *rest = arguments
        return " ".join([rule(base), *(str(within) for within in rest if isinstance(within, Within))])
    if origin is Literal:
        choices = ", ".join(map(repr, arguments))
        return choices if len(arguments) == 1 else f"one of {choices}"
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(map(rule, arguments))
    words = {
        bool: "True or False",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "None",
        collections.abc.Callable: "a function",
        collections.abc.Mapping: "a mapping",
        collections.abc.Sequence: "a list",
    }
    return words.get(origin or hint, f"a {getattr(hint, '__name__', hint)}")


def nearest(hint: Any, value: Any) -> str:
    """A hint at the nearest choice, or "" if none is near."""
    near = difflib.get_close_matches(str(value), list(map(str, choices(hint))), 1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def choices(hint: Any) -> list[Any]:
    """All literal values in a type."""
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return list(arguments)
    return [choice for argument in arguments for choice in choices(argument)]


def interval(hint: Any) -> str:
    """Interval of a number type, or ""."""
    if isinstance(hint, Within):
        return hint.interval
    return next(filter(None, map(interval, typing.get_args(hint))), "")


def spell(hint: Any) -> str:
    """A type as in code, without its interval: ``float | None``, ``'a' | 'b'``, ``function``."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return spell(arguments[0])
    if origin is Literal:
        return " | ".join(map(repr, arguments))
    if origin in (typing.Union, types.UnionType):
        return " | ".join(map(spell, arguments))
    words = {type(None): "None", collections.abc.Callable: "function"}
    return words.get(origin or hint, getattr(hint, "__name__", str(hint)))


def hints(cls: Any) -> dict[str, Any]:
    """Types of the fields of a class by name; empty if they refer to names that cannot be looked up."""
    try:
        return typing.get_type_hints(cls, include_extras=True)
    except NameError:  # the class was defined inside a function
        return {}
