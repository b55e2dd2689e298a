"""What a study file may say in short, written out. No torch here until the methods are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import Document, Whole, checked


def spread(given: Mapping[str, Any], document: Document) -> dict[str, Any]:
    """The short forms of a study file as the full form, whose shape is that of `Study`.

    A single value stands for a list of it; a number of seeds for the seeds below it; models and own tables are listed
    by name; ``methods: all`` is a recipe for each method.
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
        plain["tables"] = [_own_table(name, about) for name, about in tasks.items() if about is not None]
    plain["tasks"] = _listed(tasks)
    if "methods" in given:
        single = {"plain": {}, **{text: {"methods": [text]} for text in _each_method(given["methods"])}}
        plain["recipes"] = {**single, **(plain.get("recipes") or {})}
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


def _own_table(name: str, about: Any) -> Any:
    if not isinstance(about, Mapping):
        return {"name": name, "train": about}
    full = {"name": name, **about}
    if isinstance(text := full.get("text"), str):
        full["text"] = [text]
    for key in ("test", "out_of_domain"):
        if key in full and not isinstance(full[key], Mapping):
            full[key] = {Path(file).stem if isinstance(file, str) else "": file for file in _listed(full[key])}
    return full


def _recipe(given: Any) -> Any:
    about = {} if given is None else given
    return (
        {**about, "methods": _listed(about["methods"])} if isinstance(about, Mapping) and "methods" in about else about
    )


def _each_method(given: Any) -> list[Any]:
    """The methods that are listed, or all that `fit` takes with their defaults."""
    from ..methods import METHODS

    if given != "all":
        return _listed(given)
    return [name for name, method in METHODS.items() if _is_complete(method)]


def _is_complete(method: Any) -> bool:
    try:
        return not method().input_columns
    except TypeError:  # it has an option without a default
        return False


def spelled(given: Any, path: Sequence[Any]) -> list[str]:
    """A path of keys and positions as a file spells it: what is listed by name is called by it."""
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
