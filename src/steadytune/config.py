"""Options from a YAML file: `--config run.yaml` gives defaults to any command, and flags win over them.

The keys are the command's Python parameter names. Paths are relative to the working directory, as they are in flags.
"""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .errors import UsageError, one_line, suggest

# Options that transformers' TrainingArguments have under another name; both names are taken.
ALIASES = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "max_steps": "steps",
    "per_device_train_batch_size": "batch_size",
    "gradient_accumulation_steps": "accumulation",
    "warmup_ratio": "warmup",
}


def defaults(path: Path, command: Callable[..., Any]) -> dict[str, Any]:
    """The options that a file gives to a command, by parameter name, ready to be the command's defaults.

    Args:
        path: a YAML file that holds a mapping; null means "not given".
        command: the function behind the command; its annotations say what each option takes.

    Raises:
        UsageError: no such file, not YAML, not a mapping, an unknown or repeated key, a value of the wrong type; with
            the line where there is one.
    """
    hints = options(command)
    values, lines = read(path)
    found = {}
    for key, line in lines.items():
        where = f"{path}, line {line}"
        name = ALIASES.get(key, key)
        if name not in hints:
            raise UsageError(f"{where}: unknown option {key!r}.{suggest(key, hints)}")
        if name != key and name in lines:
            raise UsageError(f"{where}: {key} and {name} are two names of one option: give one of them.")
        if values[key] is not None:
            found[name] = value(f"{where}: {key}", name, hints[name], values[key])
    return found


def options(command: Callable[..., Any]) -> dict[str, Any]:
    """Type of each parameter of a command that a file may set; of `T | None` it is T."""
    hints = typing.get_type_hints(inspect.unwrap(command))
    return {name: _required(hint) for name, hint in hints.items() if name not in ("return", "config")}


def _required(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(option for option in typing.get_args(hint) if option is not type(None))
    return hint


def read(path: Path) -> tuple[dict[Any, Any], dict[str, int]]:
    """The mapping that a YAML file holds, and the line of each key, counted from 1.

    Raises:
        UsageError: as in `defaults`.
    """
    import yaml

    if not path.is_file():
        raise UsageError(f"{path}: no such file.")
    try:
        text = path.read_text(encoding="utf-8")
        values, node = yaml.safe_load(text), yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = "" if error.problem_mark is None else f", line {error.problem_mark.line + 1}"
        raise UsageError(f"{path}{line}: not valid YAML: {error.problem}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid YAML: {one_line(error)}.") from error
    if not isinstance(values, dict):
        got = "nothing" if values is None else f"a {type(values).__name__}"
        raise UsageError(f"{path}: must hold a mapping of option names to values, as `batch_size: 8`, got {got}.")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        line = key.start_mark.line + 1
        if key.value in lines:
            raise UsageError(f"{path}, line {line}: {key.value!r} was given in line {lines[key.value]} already.")
        lines[str(key.value)] = line
    return values, lines


def value(what: str, name: str, hint: Any, given: Any) -> Any:
    """What a YAML value means for an option of this type.

    Raises:
        UsageError: it means nothing; ``what`` starts the sentence.
    """
    if typing.get_origin(hint) is list:
        return [text for item in (given if isinstance(given, list) else [given]) for text in _texts(what, name, item)]
    if hint is bool and not isinstance(given, bool):
        raise UsageError(f"{what} must be true or false, got {given!r}.")
    if hint is int and (not isinstance(given, int) or isinstance(given, bool)):
        raise UsageError(f"{what} must be a whole number, got {given!r}.")
    if hint is float:
        return _number(what, given)
    return _text(what, given) if hint in (str, Path) else given


def _number(what: str, given: Any) -> float:
    try:
        if isinstance(given, (int, float, str)) and not isinstance(given, bool):
            return float(given)  # YAML takes 2e-5 for text: it wants 2.0e-5
    except ValueError:
        pass
    raise UsageError(f"{what} must be a number, got {given!r}.")


def _text(what: str, given: Any) -> str:
    """Text is text: 01 is 1 and no is False in YAML, which would be another column or file."""
    if not isinstance(given, str):
        raise UsageError(f"{what} must be text, got {given!r}: put it in quotes.")
    return given


def _texts(what: str, name: str, item: Any) -> list[str]:
    """One item of a repeatable option as it is written on the command line; a mapping of files makes several."""
    if not isinstance(item, Mapping):
        return [_text(what, item)]
    if name == "method":
        return [_method(what, item)]
    if name == "test":
        return [f"{_text(what, key)}={_text(what, file)}" for key, file in item.items()]
    raise UsageError(f"{what} must be text or a list of texts, got a mapping.")


def _method(what: str, item: Mapping[Any, Any]) -> str:
    """`{name: rdrop, alpha: 0.5}` as `rdrop:alpha=0.5`."""
    if "name" not in item:
        raise UsageError(f"{what}: a method is written {{name: rdrop, alpha: 0.5}}, got no name.")
    given = {key: entry for key, entry in item.items() if key != "name"}
    return _text(what, item["name"]) + ":" + ",".join(f"{key}={_spelt(entry)}" for key, entry in given.items())


def _spelt(entry: Any) -> str:
    return str(entry).lower() if entry is None or isinstance(entry, bool) else str(entry)
