"""A page: sections of text, tables and figures, printed as HTML or Markdown. No torch here.

The template escapes every text. Only drawings, which this package makes itself, are inserted unescaped.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup


class Cell(NamedTuple):
    """One cell of a table: its text, and small print below it."""

    text: str
    notes: tuple[str, ...] = ()
    strong: bool = False


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    kind: ClassVar[str] = "text"
    text: str


@dataclass(frozen=True)
class Warning(Text):
    """A highlighted paragraph."""

    kind: ClassVar[str] = "warning"


@dataclass(frozen=True)
class Code(Text):
    """Preformatted lines."""

    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Grid:
    """A table: rows in groups, each with a title that may be empty; ``words`` are the columns without numbers."""

    kind: ClassVar[str] = "grid"
    caption: str
    head: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[str | Cell]]]]
    note: str = ""
    words: Sequence[int] = (0,)

    @property
    def stacked(self) -> bool:
        """Whether a narrow screen shows each row as a list of cells, because several columns of words do not fit."""
        return len(self.head) > 2 and len(self.words) > 1


@dataclass(frozen=True)
class Figures:
    """Panels side by side that share a legend of markers and names."""

    kind: ClassVar[str] = "figures"
    caption: str
    panels: Sequence[str]
    legend: Sequence[tuple[str, str]] = ()


Block = Text | Grid | Figures


@dataclass(frozen=True)
class Section:
    """A heading and the blocks below it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower())


def html(title: str, sections: Sequence[Section], lead: str = "") -> str:
    """One self-contained page without scripts.

    Args:
        title: Heading of the page.
        sections: Sections of the page.
        lead: Summary at the top of the page.
    """
    template = _environment(autoescape=True).get_template("page.html.j2")
    return template.render(title=title, sections=sections, lead=lead)


def markdown(title: str, sections: Sequence[Section], lead: str = "") -> str:
    """The page as GitHub's Markdown, without figures; the arguments are those of `html`."""
    template = _environment(autoescape=False).get_template("page.md.j2")
    return template.render(title=title, sections=sections, lead=lead)


def _environment(autoescape: bool) -> Environment:
    environment = Environment(
        loader=PackageLoader("steadytune.pages", "."),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    numbers = itertools.count(1)
    environment.filters.update(drawing=lambda svg: _drawing(svg, next(numbers)), plain=_plain, fence=_fence)
    return environment


def _drawing(svg: str, number: int) -> Markup:
    """A drawing with ids that are unique on the page. Its text does not change, because ``<`` is escaped there."""
    ids = re.compile(r'(\bid="|href="#|url\(#)')
    return Markup(re.sub(r"<[^>]+>", lambda tag: ids.sub(rf"\1d{number}_", tag[0]), svg))


def _plain(text: str) -> str:
    """Text on one line with Markdown's characters escaped, also for tables."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(text.split()))


def _fence(text: str) -> str:
    """A fence with enough backticks to enclose a text."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
