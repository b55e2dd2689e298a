"""Read YAML files of options and of studies, and check their values with pydantic.

`--config run.yaml` sets defaults of any command; flags override them. The keys are the command's Python parameter
names. Paths are relative to the working directory, as in flags. pydantic is imported when a value is checked.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from .errors import UsageError, one_line, suggest

if typing.TYPE_CHECKING:
    from pydantic_core import CoreSchema, ErrorDetails

# Options with another name in transformers' TrainingArguments; both names are accepted.
ALIASES = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "warmup_ratio": "warmup",
    "label_smoothing_factor": "label_smoothing",
}

# YAML 1.1 reads 2e-5 as text (a number needs a point, as in 2.0e-5); YAML 1.2 reads it as a number, as users expect.
EXPONENT = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")


# ---- what values must be ----------------------------------------------------------------------------------------


class Rule:
    """Rule for a value, in the annotation of its type: ``Annotated[int, Rule("a whole number")]``.

    Args:
        text: End of the error "NAME must be ...", for every value that breaks the rule.
        **limits: Limits of pydantic's core schema of the type, such as ``ge=0``.
    """

    def __init__(self, text: str, **limits: Any) -> None:
        self.text, self.limits = text, limits

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> CoreSchema:
        from pydantic_core import core_schema

        schema: Any = {**handler(source), **self.limits}
        return core_schema.custom_error_schema(schema, custom_error_type="rule", custom_error_message=self.text)


Whole = Annotated[int, Rule("a whole number from 1 on", ge=1)]
Seed = Annotated[int, Rule("a whole number from 0 on", ge=0)]
Share = Annotated[float, Rule("a share from 0 to 1", ge=0, le=1)]
Truth = Annotated[bool, Rule("true or false")]
Threshold = Annotated[float | Literal["tune"], Rule("a number above 0 and below 1, or tune")]
Text = Annotated[str, Rule("text", min_length=1)]

# Type, with its rule, that stands for a bare annotation of a parameter or field.
BARE: dict[Any, Any] = {
    bool: Truth,
    int: Annotated[int, Rule("a whole number")],
    float: Annotated[float, Rule("a number")],
    str: Annotated[str, Rule("text")],
    float | Literal["tune"]: Threshold,
    Path: Annotated[str, Rule("text")],
}
SHAPES = {
    "string_type": "text",
    "int_type": "a whole number",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "names with values, as in `lr: 1.0e-4`",
    "mapping_type": "names with values, as in `lr: 1.0e-4`",
    "dataclass_type": "names with values, as in `lr: 1.0e-4`",
    "too_short": "one or more",
}


def checked(hint: Any, given: Any, where: Callable[[tuple[Any, ...]], str]) -> Any:
    """Check a plain value, and convert it to a type.

    The value is checked as if it were in a JSON file: a list is valid for a tuple, a whole number for a float, a
    mapping for a dataclass. Nothing else is converted.

    Args:
        hint: Any type that pydantic knows; a `Rule` in it gives the words of its error.
        given: The plain value.
        where: Function from a path in `given` (keys, and positions in lists) to the beginning of the error.

    Raises:
        UsageError: A value is wrong, or a key is unknown. The message names the first of them, and the nearest known
            key.
    """
    from pydantic import ValidationError

    _check_keys(given, (), where)
    try:
        return _adapter(hint).validate_json(json.dumps(given, default=str), strict=True)
    except ValidationError as error:
        wrong = sorted(error.errors(), key=lambda one: one["type"] != "unexpected_keyword_argument")[0]
        raise UsageError(_sentence(hint, wrong, where)) from None


def _check_keys(given: Any, path: tuple[Any, ...], where: Callable[[tuple[Any, ...]], str]) -> None:
    """Raise for a key that is not text: YAML reads 1 as a number, and no as false."""
    inner = given.items() if isinstance(given, Mapping) else enumerate(given) if isinstance(given, list) else ()
    for key, value in inner:
        if isinstance(given, Mapping) and not isinstance(key, str):
            raise UsageError(f"{where(path)} has the key {key!r}, and keys must be text: put it in quotes.")
        _check_keys(value, (*path, key), where)


@functools.cache
def _adapter(hint: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(hint)


def _sentence(hint: Any, error: ErrorDetails, where: Callable[[tuple[Any, ...]], str]) -> str:
    kind, place, given = error["type"], error["loc"], error["input"]
    if kind == "unexpected_keyword_argument":
        known = [field.name for field in dataclasses.fields(_at(hint, place[:-1]))]
        return f"{where(place[:-1])}: unknown key {place[-1]!r}.{suggest(str(place[-1]), known)}"
    if kind == "missing":
        return f"{where(place)} is missing."
    if kind == "literal_error":
        choices = [str(choice) for choice in typing.get_args(_at(hint, place))]
        return f"{where(place)} must be one of {', '.join(choices)}, got {given!r}.{suggest(str(given), choices)}"
    rule = SHAPES.get(kind, error["msg"])
    quotes = ": put it in quotes" if rule == "text" and isinstance(given, (bool, int, float)) else ""
    return f"{where(place)} must be {rule}, got {given!r}{quotes}."


def _at(hint: Any, place: Iterable[Any]) -> Any:
    """Type of the value at a path of keys and positions."""
    for step in place:
        hint = _required(hint)
        if dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint)[step]
        else:  # tuple[T, ...] or Mapping[str, T]
            hint = typing.get_args(hint)[0 if isinstance(step, int) else 1]
    return _required(hint)


def _required(hint: Any) -> Any:
    """The type without None: T for ``T | None``, ``T | U`` for ``T | U | None``."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return typing.Union[tuple(option for option in typing.get_args(hint) if option is not type(None))]  # noqa: UP007
    return hint


# ---- files ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Document:
    """A YAML file that holds a mapping.

    Attributes:
        file: Name of the file.
        values: Contents of the file.
        lines: Line of each key by the path of keys, counted from 1.
    """

    file: str
    values: dict[Any, Any]
    lines: Mapping[tuple[str, ...], int]

    def where(self, path: Iterable[Any] = ()) -> str:
        """Name of the file and line of the innermost known key on a path."""
        keys = tuple(map(str, path))
        lines = (self.lines[keys[:end]] for end in range(len(keys), 0, -1) if keys[:end] in self.lines)
        line = next(lines, None)
        return self.file if line is None else f"{self.file}, line {line}"

    @contextlib.contextmanager
    def at(self, *path: str) -> Iterator[None]:
        """Let errors inside the block begin with the file and line of a key."""
        try:
            yield
        except UsageError as error:
            raise UsageError(f"{self.where(path)}: {error}") from error


def read(path: Path) -> Document:
    """Read a YAML file.

    Raises:
        UsageError: There is no such file, it is not YAML or not a mapping, or a key occurs twice. The message names the
            line.
    """
    import yaml

    if not path.is_file():
        raise UsageError(f"{path}: no such file.")
    try:
        text = path.read_text(encoding="utf-8")
        values, node = yaml.load(text, _loader()), yaml.compose(text, _loader())
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise UsageError(f"{path}{line}: not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML: {one_line(error)}.") from error
    try:
        json.dumps(values, default=str, skipkeys=True)
    except (ValueError, RecursionError):
        raise UsageError(f"{path}: a value must not contain itself (an alias * inside its own anchor &).") from None
    if not isinstance(values, dict):
        got = "nothing" if values is None else f"a {type(values).__name__}"
        raise UsageError(f"{path}: must hold a mapping of option names to values, as `batch_size: 8`, got {got}.")
    return Document(str(path), values, dict(_lines(path, node)))


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader, which also reads 2e-5 as a number."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver("tag:yaml.org,2002:float", EXPONENT, list("-+.0123456789"))
    return Loader


def _lines(path: Path, node: Any, above: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], int]]:
    """Lines of all keys of a mapping and of the mappings in it."""
    seen: dict[str, int] = {}
    for key, inner in node.value:
        name, line = str(key.value), key.start_mark.line + 1
        if name in seen:
            raise UsageError(f"{path}, line {line}: {name!r} is also given in line {seen[name]}: remove one of them.")
        seen[name] = line
        yield (*above, name), line
        if inner.id == "mapping":
            yield from _lines(path, inner, (*above, name))


# ---- options of commands ----------------------------------------------------------------------------------------


def defaults(path: Path, command: Callable[..., Any]) -> dict[str, Any]:
    """Options for a command from a file, by parameter name, ready to be the command's defaults.

    Args:
        path: YAML file with a mapping; null means that the option is not given.
        command: Function of the command; its annotations are the types of the options.

    Raises:
        UsageError: As `read`, or a key is unknown, or a value has the wrong type.
    """
    hints = options(command)
    document = read(path)
    given = {}
    for key, *deeper in document.lines:  # keys as they are spelled, because YAML reads yes as true
        if deeper:
            continue
        where, name = document.where([key]), ALIASES.get(key, key)
        if name not in hints:
            raise UsageError(f"{where}: unknown option {key!r}.{suggest(key, hints)}")
        if name != key and (name,) in document.lines:
            raise UsageError(f"{where}: {key} and {name} are two names of one option: give one of them.")
        if document.values[key] is not None:
            given[name] = value(f"{where}: {key}", name, hints[name], document.values[key])
    return given


def options(command: Callable[..., Any]) -> dict[str, Any]:
    """Type of each parameter of a command that a file may set, without None."""
    hints = typing.get_type_hints(inspect.unwrap(command))
    return {name: _required(hint) for name, hint in hints.items() if name not in ("return", "config")}


def value(what: str, name: str, hint: Any, given: Any) -> Any:
    """Convert a YAML value to the type of an option.

    Raises:
        UsageError: The value does not have the type; the message begins with ``what``.
    """
    if typing.get_origin(hint) is list:
        return [text for item in (given if isinstance(given, list) else [given]) for text in _texts(what, name, item)]
    if name == "threshold" and isinstance(given, float):  # a number or tune, which the command takes as text
        return str(given)
    return _plain(what, hint, given)


def _plain(what: str, hint: Any, given: Any) -> Any:
    return checked(BARE.get(hint, hint), given, lambda place: what)


def _texts(what: str, name: str, item: Any) -> list[str]:
    """One item of a repeatable option as it is written on the command line; several for a mapping of files."""
    if not isinstance(item, Mapping):
        return [_plain(what, str, item)]
    if name == "method":
        return [_method(what, item)]
    if name == "test":
        return [f"{_plain(what, str, key)}={_plain(what, str, file)}" for key, file in item.items()]
    raise UsageError(f"{what} must be text or a list of texts, got a mapping.")


def _method(what: str, item: Mapping[Any, Any]) -> str:
    """`{name: rdrop, alpha: 0.5}` as `rdrop:alpha=0.5`."""
    if "name" not in item:
        raise UsageError(f"{what}: a method is written {{name: rdrop, alpha: 0.5}}, got no name.")
    given = {key: entry for key, entry in item.items() if key != "name"}
    return _plain(what, str, item["name"]) + ":" + ",".join(f"{key}={_spelt(entry)}" for key, entry in given.items())


def _spelt(entry: Any) -> str:
    return str(entry).lower() if entry is None or isinstance(entry, bool) else str(entry)
