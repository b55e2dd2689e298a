"""Everything about every method, from its class: the one source of `steadytune methods` and of docs/methods.md."""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..core import SCOPES, Method, Scope, overrides
from ..core.facts import Cost, Paper
from . import METHODS

VERBS = ("before_forward", "penalty", "pull_back", "before_step", "after_step", "evaluated")
HEADER = """\
# Methods

<!-- written by: steadytune methods --markdown > docs/methods.md -->

The order in the list is the order of action. *Passes* are the forward and backward passes of a step, in those of a
plain step; *bytes* are held per float32 weight that the method acts on, beside the 16 of weight, gradient and AdamW.
Time outside forward and backward is measured by `python benchmarks/step_cost.py`. When to use which:
[which-method.md](which-method.md).
"""


@dataclass(frozen=True)
class Option:
    """A field of a method, for people.

    Attributes:
        type: as one would write it.
        range: an interval as in "(0, 1]", or "".
        default: its repr, or "required".
        meaning: from the Args section of the class, or of the class that it extends.
    """

    name: str
    type: str
    range: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Page:
    """What there is to say about a method.

    Attributes:
        name: on the command line.
        cls: name of the class.
        summary: one sentence.
        notes: the other paragraphs of the docstring, without sections.
        departures: how it differs from the authors' code or paper; "" for not at all.
        moments: the verbs it defines, in the order of a step; where it has none of these, those before the first.
        conflicts: what it cannot be combined with.
        cost: of running it.
        paper: None for a method that comes from no paper.
    """

    name: str
    cls: str
    summary: str
    notes: tuple[str, ...]
    options: tuple[Option, ...]
    departures: str
    moments: tuple[str, ...]
    conflicts: tuple[str, ...]
    cost: Cost
    paper: Paper | None

    @property
    def source(self) -> str:
        """Citation and arXiv identifier, or ""."""
        return f"{self.paper.short}, arXiv {self.paper.arxiv}" if self.paper else ""


def pages(registry: Mapping[str, type[Method]] = METHODS) -> dict[str, Page]:
    """A page for every method of a registry, by name."""
    return {name: _page(name, cls, registry) for name, cls in registry.items()}


def _page(name: str, cls: type[Method], registry: Mapping[str, type[Method]]) -> Page:
    prose, sections = parse(inspect.getdoc(cls) or "")
    summary, *notes = prose or ("",)
    return Page(
        name=name,
        cls=cls.__name__,
        summary=summary,
        notes=tuple(notes),
        options=_options(cls),
        departures=" ".join(sections.get("Departures", "").split()),
        moments=tuple(verb for verb in VERBS if overrides(cls, verb)) or _beforehand(cls),
        conflicts=_conflicts(name, cls, registry),
        cost=cls.cost,
        paper=cls.paper,
    )


def _beforehand(cls: type[Method]) -> tuple[str, ...]:
    """The verbs before the first step, of a method that has no others."""
    return tuple(verb for verb in ("setup", "attach") if overrides(cls, verb))


def parse(doc: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Paragraphs of a docstring, each on one line, and the text of its sections by title."""
    sections: dict[str, list[str]] = {}
    prose: list[str] = []
    target = prose
    for line in doc.splitlines():
        if header := re.fullmatch(r"([A-Z]\w+):", line):
            target = sections.setdefault(header[1], [])
            continue
        if line[:1].strip():
            target = prose
        target.append(line)
    paragraphs = (" ".join(part.split()) for part in re.split(r"\n\s*\n", "\n".join(prose)))
    return tuple(filter(None, paragraphs)), {k: textwrap.dedent("\n".join(v)).strip() for k, v in sections.items()}


def _options(cls: type[Method]) -> tuple[Option, ...]:
    hints = typing.get_type_hints(cls)
    described: dict[str, tuple[str, str]] = {}
    for base in reversed(cls.__mro__):
        if base is not object and base.__doc__:
            described |= arguments(parse(inspect.cleandoc(base.__doc__))[1].get("Args", ""))
    found = []
    for field in dataclasses.fields(cls):  # type: ignore[arg-type]  # every registered method is one
        if field.init:
            default = "required" if field.default is dataclasses.MISSING else repr(field.default)
            interval, meaning = described.get(field.name, ("", ""))
            found.append(Option(field.name, spell(hints[field.name]), interval, default, meaning))
    return tuple(found)


def arguments(section: str) -> dict[str, tuple[str, str]]:
    """Range ("" for none) and meaning of each item of an Args section: `keep in (0, 1]: share of ...`."""
    found = {}
    for item in re.split(r"\n(?=\S)", section):
        if match := re.match(r"(\w+)(?: in ([\[(][^\])]*[\])]))?: (.*)", item, re.S):
            found[match[1]] = (match[2] or "", " ".join(match[3].split()))
    return found


def spell(hint: Any) -> str:
    """A type as one would say it: choices for a Literal and a scope, the name otherwise."""
    if hint == Scope:
        return " | ".join([*map(repr, SCOPES), "function"])
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(repr, typing.get_args(hint)))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " | ".join("None" if option is type(None) else spell(option) for option in typing.get_args(hint))
    return getattr(hint, "__name__", str(hint))


def _conflicts(name: str, cls: type[Method], registry: Mapping[str, type[Method]]) -> tuple[str, ...]:
    if cls.exclusive is None:
        return cls.conflicts
    others = [f"`{key}`" for key, other in registry.items() if other.exclusive == cls.exclusive and key != name]
    same = f"a second {cls.exclusive} of the same weight" + (f" ({', '.join(others)})" if others else "")
    return (same, *cls.conflicts)


# ---- Markdown ---------------------------------------------------------------------------------------------------


def markdown(registry: Mapping[str, type[Method]] = METHODS) -> str:
    """The whole of docs/methods.md."""
    found = pages(registry)
    rows = [
        (
            f"[`{page.name}`](#{page.name})",
            page.summary,
            ", ".join(f"`{verb}`" for verb in page.moments),
            f"[{page.paper.short}]({page.paper.url})" if page.paper else "",
            f"{page.cost.passes:.1f}",
            page.cost.memory,
            "; ".join(page.conflicts) or "none",
        )
        for page in found.values()
    ]
    table = _table(("method", "what it does", "acts at", "paper", "passes", "bytes", "not with"), rows)
    return "\n\n".join([HEADER.strip(), table, *map(_section, found.values())]) + "\n"


def _section(page: Page) -> str:
    options = _table(
        ("option", "type", "range", "default", "meaning"),
        [(f"`{o.name}`", f"`{o.type}`", o.range, f"`{o.default}`", o.meaning) for o in page.options],
    )
    parts = [f"## {page.name}", f"`steadytune.{page.cls}`. {page.summary}", *page.notes, options]
    if page.departures:
        parts.append(f"**Departures from the authors.** {page.departures}")
    if page.paper:
        parts += [f"[{page.source}]({page.paper.url}):", f"```bibtex\n{page.paper.bibtex()}\n```"]
    return "\n\n".join(parts)


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(titles), line(["---"] * len(titles)), *map(line, rows)])
