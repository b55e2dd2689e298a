"""Methods by name, looked up where they are first asked for: those of this package, and those that others install."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, one_line

if TYPE_CHECKING:
    from ..core import Method

GROUP = "steadytune.methods"


class Registry(Mapping[str, "type[Method]"]):
    """Classes of methods by name; imports the file of a method when it is looked up.

    Iteration gives the methods of this package in the order of its table, then those of other packages by name. One
    that cannot be loaded is left out with a warning; to ask for it by name is a `steadytune.errors.UsageError`.

    Args:
        own: Names and places of this package's methods, as in ``{"dps_dense": "dps:DPSDense"}``: file and class.
    """

    def __init__(self, own: Mapping[str, str]) -> None:
        self.own = own

    @functools.cached_property
    def classes(self) -> dict[str, str]:
        """The name of each method of this package by the name of its class."""
        return {place.partition(":")[2]: name for name, place in self.own.items()}

    @functools.cached_property
    def installed(self) -> dict[str, list[EntryPoint]]:
        """What other packages offer, by name. A name of this package's own is left out with a warning."""
        by_name: dict[str, list[EntryPoint]] = {}
        for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, package(point))):
            if point.name in self.own:
                warnings.warn(
                    f"the package {package(point)!r} offers a method {point.name!r}, which steadytune has already: "
                    "steadytune's own is used. Rename the entry point",
                    stacklevel=2,
                )
            elif point not in by_name.setdefault(point.name, []):
                by_name[point.name].append(point)
        return by_name

    def __getitem__(self, name: str) -> type[Method]:
        if name in self.own:
            file, _, kind = self.own[name].partition(":")
            return getattr(import_module(f"{__package__}.{file}"), kind)
        return load(self.installed[name])

    def __contains__(self, name: object) -> bool:
        return name in self.own or name in self.installed

    def __iter__(self) -> Iterator[str]:
        yield from self.own
        for name, points in self.installed.items():
            try:
                load(points)
            except UsageError as error:
                warnings.warn(f"{error} It is left out", stacklevel=2)
            else:
                yield name

    def __len__(self) -> int:
        return sum(1 for _ in self)


def load(points: list[EntryPoint]) -> type[Method]:
    """The class that an entry point names.

    Raises:
        UsageError: Two packages offer it, it cannot be imported, or it is no dataclass that extends `Method`.
    """
    from ..core import Method

    point = points[0]
    if len(points) > 1:
        raise UsageError(
            f"the method {point.name!r} is offered by the packages {', '.join(map(package, points))}: keep "
            "only one of them installed."
        )
    where = f"the method {point.name!r} of the package {package(point)!r} (entry point {point.value!r})"
    try:
        kind: Any = point.load()
    except Exception as error:  # whatever another package's import raises
        raise UsageError(
            f"{where} cannot be loaded: {type(error).__name__}: {one_line(error)}. Update or uninstall the package."
        ) from error
    if not (inspect.isclass(kind) and issubclass(kind, Method) and dataclasses.is_dataclass(kind)):
        raise UsageError(
            f"{where} must be a dataclass that extends steadytune.Method, it is {kind!r}. Update or uninstall the "
            "package."
        )
    return kind


def package(point: EntryPoint) -> str:
    """Name of the package that an entry point comes from."""
    return point.dist.name if point.dist is not None else point.value.partition(".")[0]
