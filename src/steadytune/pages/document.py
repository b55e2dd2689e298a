"""A page: sections of text, tables and figures, printed as HTML or Markdown. No torch here.

The template escapes every text. Only the drawings, which this package makes itself, stand on the page as they are.
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
    """One cell of a table: what counts, and small print below it."""

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
    """A paragraph that must not be overlooked."""

    kind: ClassVar[str] = "warning"


@dataclass(frozen=True)
class Code(Text):
    """Lines as they are."""

    kind: ClassVar[str] = "code"


@dataclass(frozen=True)
class Grid:
    """A table: rows in groups, each under a title that may be empty; ``words`` are the columns that hold no numbers."""

    kind: ClassVar[str] = "grid"
    caption: str
    head: Sequence[str]
    groups: Sequence[tuple[str, Sequence[Sequence[str | Cell]]]]
    note: str = ""
    words: Sequence[int] = (0,)

    @property
    def stacked(self) -> bool:
        """Whether a narrow screen shows each row as a list of cells: several columns of words do not fit beside."""
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
    """A heading and what stands under it."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        return re.sub(r"\W+", "-", self.title.lower())


def html(title: str, sections: Sequence[Section], lead: str = "") -> str:
    """One page without scripts, that loads nothing.

    Args:
        title: Heading of the page.
        sections: What stands on it.
        lead: What the page shows, in words, above all else.
    """
    template = _environment(autoescape=True).get_template("page.html.j2")
    return template.render(title=title, sections=sections, lead=lead)


def markdown(title: str, sections: Sequence[Section], lead: str = "") -> str:
    """The same without its figures, as GitHub reads it; arguments as of `html`."""
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
    """A drawing whose ids no other one on the page has; text, where ``<`` is escaped, stays as it is."""
    ids = re.compile(r'(\bid="|href="#|url\(#)')
    return Markup(re.sub(r"<[^>]+>", lambda tag: ids.sub(rf"\1d{number}_", tag[0]), svg))


def _plain(text: str) -> str:
    """Text that Markdown takes for text, on one line, also inside a table."""
    return re.sub(r"([\\`*\[\]<>|&])", r"\\\1", " ".join(text.split()))


def _fence(text: str) -> str:
    """Backticks enough to enclose a text."""
    return "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
