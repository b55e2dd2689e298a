"""Pages about methods and procedures, read from their classes, for `steadytune methods` and docs/methods.md.

python -m steadytune.methods.catalogue        # writes what is generated from METHODS, see `GENERATED`
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .. import fields
from ..core import VERBS, Method, overrides
from ..core.facts import Cost, Paper
from . import METHODS

HEADER = """\
# Methods

<!-- This page is written by `steadytune methods --markdown`, from the classes of the methods. -->

Methods run in list order. *Passes* counts the forward and backward passes of a step; a plain step is 1. *Bytes* is the
memory for each float32 weight that the method acts on, beside the 16 bytes of weight, gradient and AdamW.
`python benchmarks/step_cost.py` measures the time outside forward and backward.
[which-method.md](which-method.md) says when to use which.
"""


@dataclass(frozen=True)
class Option:
    """Description of a field of a method.

    Attributes:
        name: Name of the field.
        type: Type of the field, as it is written in code.
        range: The interval that a number must lie in, as in "(0, 1]", or "".
        default: Default as Python code, or "required".
        meaning: Text of the Args section of the class, or of its base class.
    """

    name: str
    type: str
    range: str
    default: str
    meaning: str


@dataclass(frozen=True)
class Page:
    """Description of a method, or of another class that is chosen by name with options.

    Attributes:
        name: Name on the command line.
        cls: Name of the class.
        summary: First sentence of the docstring: what it does.
        notes: The other paragraphs of the docstring, without its sections.
        options: Its options.
        departures: Differences from the authors' code or paper; "" if there are none.
        moments: Verbs that the method defines, in the order of a step; those before the first step if it has no others.
        conflicts: Methods and settings that it cannot be combined with.
        cost: Cost in addition to plain fine-tuning, or None if only the notes say it.
        paper: Paper that introduced the method, or None if the notes name it.
    """

    name: str
    cls: str
    summary: str
    notes: tuple[str, ...]
    options: tuple[Option, ...]
    departures: str
    moments: tuple[str, ...] = ()
    conflicts: tuple[str, ...] = ()
    cost: Cost | None = None
    paper: Paper | None = None

    @property
    def source(self) -> str:
        """Citation and arXiv identifier, or ""."""
        return f"{self.paper.short}, arXiv {self.paper.arxiv}" if self.paper else ""


def pages(registry: Mapping[str, type[Method]] = METHODS) -> dict[str, Page]:
    """A page for every method of a registry, by name."""
    return {
        name: dataclasses.replace(
            page(name, cls),
            moments=tuple(verb for verb in VERBS if overrides(cls, verb)) or _beforehand(cls),
            conflicts=_conflicts(name, cls, registry),
            cost=cls.cost,
            paper=cls.paper,
        )
        for name, cls in registry.items()
    }


def page(name: str, cls: type) -> Page:
    """What the docstring and the fields of a dataclass say."""
    prose, sections = parse(inspect.getdoc(cls) or "")
    summary, *notes = prose or ("",)
    departures = " ".join(sections.get("Departures", "").split())
    return Page(name, cls.__name__, summary, tuple(notes), _options(cls), departures)


def _beforehand(cls: type[Method]) -> tuple[str, ...]:
    """Verbs before the first step, for a method that has no others."""
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


def _options(cls: type) -> tuple[Option, ...]:
    hints = fields.hints(cls)
    described: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if base is not object and base.__doc__:
            described |= arguments(parse(inspect.cleandoc(base.__doc__))[1].get("Args", ""))
    options = []
    for field in dataclasses.fields(cls):
        if field.init:
            hint = hints.get(field.name, field.type)
            default = "required" if field.default is dataclasses.MISSING else repr(field.default)
            kind, interval = fields.spell(hint), fields.interval(hint)
            options.append(Option(field.name, kind, interval, default, described.get(field.name, "")))
    return tuple(options)


def arguments(section: str) -> dict[str, str]:
    """Meaning of each item of an Args section: `keep: Share of ...`."""
    items = (re.match(r"(\w+): (.*)", item, re.S) for item in re.split(r"\n(?=\S)", section))
    return {item[1]: " ".join(item[2].split()) for item in items if item}


def _conflicts(name: str, cls: type[Method], registry: Mapping[str, type[Method]]) -> tuple[str, ...]:
    if cls.exclusive is None:
        return cls.conflicts
    others = [f"`{key}`" for key, other in registry.items() if other.exclusive == cls.exclusive and key != name]
    return (f"another {cls.exclusive}" + (f" ({', '.join(others)})" if others else ""), *cls.conflicts)


# ---- Markdown ---------------------------------------------------------------------------------------------------


def markdown(registry: Mapping[str, type[Method]] = METHODS) -> str:
    """The whole of docs/methods.md."""
    listed = pages(registry)
    rows = [
        (
            f"[`{page.name}`](#{page.name})",
            page.summary,
            ", ".join(f"`{verb}`" for verb in page.moments),
            f"[{page.paper.short}]({page.paper.url})" if page.paper else "",
            f"{page.cost.passes:.1f}" if page.cost else "",
            page.cost.memory if page.cost else "",
            "; ".join(page.conflicts) or "none",
        )
        for page in listed.values()
    ]
    table = _table(("method", "what it does", "acts at", "paper", "passes", "bytes", "not with"), rows)
    return "\n\n".join([HEADER.strip(), table, *map(_section, listed.values())]) + "\n"


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


def overview() -> str:
    """The table of the README: class, what it does, source."""
    rows = [
        (
            f"`{page.cls}`",
            page.summary.replace("``", "`"),
            f"{page.paper.short}, [{page.paper.arxiv}]({page.paper.url})" if page.paper else "",
        )
        for page in pages(own()).values()
    ]
    return _table(("method", "what it does", "source"), rows)


def imports() -> str:
    """The imports of `steadytune.methods` that type checkers read."""
    places = sorted(
        (place.split(":") for place in METHODS.own.values()),
        key=lambda place: (place[0], not place[1].isupper(), place[1]),
    )
    lines = [f"    from .{file} import {kind} as {kind}" for file, kind in places]
    return "\n".join(["if TYPE_CHECKING:", *lines])


def own() -> dict[str, type[Method]]:
    """The methods of this package, without those that others have installed here."""
    return {name: METHODS[name] for name in METHODS.own}


GENERATED = {  # file: the lines between which it is written, and by what
    "README.md": ("<!-- begin: methods -->", "<!-- end: methods -->", lambda: f"\n{overview()}\n"),
    "src/steadytune/methods/__init__.py": ("# begin: classes", "# end: classes", imports),
    "docs/methods.md": ("", "", lambda: markdown(own())),
}


def generated(root: Path) -> dict[Path, str]:
    """Contents of the files that are generated from the methods, wholly or between two lines.

    Args:
        root: Root folder of the checkout.
    """
    texts = {}
    for name, (begin, end, make) in GENERATED.items():
        file = root / name
        text = file.read_text(encoding="utf-8")
        if begin:
            before, rest = text.split(f"{begin}\n", 1)
            made = f"{before}{begin}\n{make()}\n{end}{rest.split(end, 1)[1]}"
        else:
            made = make()
        texts[file] = made
    return texts


if __name__ == "__main__":
    for file, text in generated(Path(__file__).parents[3]).items():
        file.write_text(text, encoding="utf-8")
