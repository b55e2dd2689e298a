"""Expand the short forms of a study file to the full form. No torch at import."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import Document, Text, Whole, checked
from ..errors import UsageError


def spread(given: Mapping[str, Any], document: Document) -> dict[str, Any]:
    """The full form of a study file, which has the fields of `Study`.

    A single value becomes a list of one. A number of seeds becomes the list of the seeds below it. A mapping of models
    or tasks becomes a list of entries with names. ``methods: all`` becomes one recipe for each method.

    Args:
        given: Contents of the file.
        document: The file, named in errors.

    Raises:
        UsageError: A short form has no full form.
    """
    plain = {key: v for key, v in given.items() if key != "methods"}
    for key in ("train_sizes", "factorial"):
        if key in plain:
            plain[key] = _listed(plain[key])
    if isinstance(seeds := plain.get("seeds"), int):
        where = f"{document.where(['seeds'])}: seeds"
        plain["seeds"] = list(range(checked(Whole, seeds, lambda path: where)))
    plain["models"] = _named_models(plain["models"])
    if isinstance(tasks := plain["tasks"], Mapping):
        plain["tables"] = [_own_table(name, about, document) for name, about in tasks.items() if about is not None]
    plain["tasks"] = _listed(tasks)
    if "methods" in given:
        single = {"plain": {}, **{text: {"methods": [text]} for text in _each_method(given["methods"], document)}}
        own = plain.get("recipes") or {}
        plain["recipes"] = {**single, **own} if isinstance(own, Mapping) else own
    if isinstance(recipes := plain["recipes"], Mapping):
        plain["recipes"] = {name: _recipe(about) for name, about in recipes.items()}
    return plain


def _listed(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple, Mapping)) else [given]


def _named_models(given: Any) -> list[Any]:
    if not isinstance(given, Mapping):
        return [{"name": Path(path).name, "path": path} if isinstance(path, str) else path for path in _listed(given)]
    full = [
        {"name": name, **(about if isinstance(about, Mapping) else {"path": about})} for name, about in given.items()
    ]
    return [{**model, "seen": _listed(model.get("seen", []))} for model in full]


def _own_table(name: str, about: Any, document: Document) -> Any:
    """A path alone is the training file; a test file without a name is named after its file."""
    if not isinstance(about, Mapping):
        return {"name": name, "train": about}
    full = {"name": name, **about}
    for key in ("text", "subgroup", "apart"):
        if isinstance(full.get(key), str):
            full[key] = [full[key]]
    seen: set[str] = set()
    for key in ("test", "out_of_domain"):
        files = full.get(key, {})
        listed = files.items() if isinstance(files, Mapping) else ((Path(str(f)).stem, f) for f in _listed(files))
        full[key] = {}
        for called, file in listed:
            if called in seen:
                raise UsageError(
                    f"{document.where(['tasks', name, key])}: two test files of task {name} are called {called!r}: "
                    f"give them names, as in `{key}: {{spring: a.csv, autumn: b.csv}}`."
                )
            seen.add(called)
            full[key][called] = file
    return full


def _recipe(given: Any) -> Any:
    about = {} if given is None else given
    if not isinstance(about, Mapping):
        return about
    return {**about, **{key: _listed(about[key]) for key in ("methods", "aux", "unlabelled") if key in about}}


def _each_method(given: Any, document: Document) -> list[str]:
    """The listed methods, or all that `fit` can use with their defaults."""
    from ..methods import METHODS

    if given != "all":
        where = f"{document.where(['methods'])}: methods"
        return list(checked(tuple[Text, ...], _listed(given), lambda path: where))
    return [name for name, method in METHODS.items() if _is_complete(method)]


def _is_complete(method: Any) -> bool:
    try:
        return not method().input_columns
    except TypeError:  # it has an option without a default
        return False


def spelled(given: Any, path: Sequence[Any]) -> list[str]:
    """A path in the full form as it is written in the file: entries of a list by their names."""
    names: list[str] = []
    for step in path:
        try:
            given = given[step]
        except (KeyError, IndexError, TypeError):  # the key that is missing
            given = None
        if isinstance(step, str):
            names.append("tasks" if step == "tables" and not names else step)
        elif isinstance(given, Mapping) and "name" in given:
            names.append(str(given["name"]))
    return names
