"""Draw plots as small SVG panels, which a page lays out side by side. No torch, no pyplot.

Equal data give equal panels, byte for byte.
"""

from __future__ import annotations

import functools
import io
import itertools
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any, NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH = 3.6  # inches; also about the width of a phone
LABEL = 26  # largest number of characters of a name in a plot
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: the page's own font, small files, words that can be searched
    "font.size": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "axes.edgecolor": "#777777",
    "axes.labelcolor": "#222222",
    "lines.linewidth": 1.4,
}


class Look(NamedTuple):
    """Colour and marker of a recipe."""

    colour: str
    marker: str


def looks(recipes: Sequence[str]) -> dict[str, Look]:
    """Colour and marker of each recipe, in their order; no two alike up to 56 recipes."""
    pairs = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    return {recipe: Look(*pair) for recipe, pair in zip(recipes, pairs, strict=False)}


@functools.cache
def marker(look: Look) -> str:
    """The marker alone, for a legend."""
    with panel(0.2, 0.2, "", margins=(0, 0, 0, 0)) as (figure, axes):
        axes.set_axis_off()
        axes.plot([0], [0], look.marker, color=look.colour, markersize=6)
        return svg(figure, "")


@contextmanager
def panel(
    width: float, height: float, title: str, margins: tuple[float, float, float, float] = (0.62, 0.12, 0.48, 0.27)
) -> Iterator[tuple[Figure, Axes]]:
    """An empty plot with a size and margins (left, right, bottom, top) in inches; names are not read as formulas.

    The margins are given because a layout engine would draw every panel twice.
    """
    left, right, bottom, top = margins
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the page's font may well have it
        figure = Figure((width, height))
        FigureCanvasSVG(figure)
        box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
        axes = figure.add_axes(box)
        if title:
            words = textwrap.shorten(title, 60, placeholder="…")
            figure.text(0.02, 1 - 0.06 / height, words, va="top", fontsize=9, fontweight="bold", parse_math=False)
        yield figure, axes


def beside(labels: Sequence[str]) -> tuple[float, float, float, float]:
    """Margins that leave room for labels on the left."""
    return 0.15 + 0.068 * max(map(len, map(shortened, labels))), 0.12, 0.48, 0.27


def shortened(label: str) -> str:
    return label if len(label) <= LABEL else label[: LABEL - 1] + "…"


def lines(axes: Axes, labels: Sequence[str]) -> None:
    """One horizontal line for each label, the first on top; if some are indented, the others are headings."""
    headed = any(label.startswith(" ") for label in labels)
    axes.set_yticks([])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    for place, label in enumerate(labels):
        weight = "bold" if headed and not label.startswith(" ") else "normal"
        axes.text(
            -0.03, place, shortened(label), transform=axes.get_yaxis_transform(), ha="right", va="center",
            fontweight=weight, parse_math=False,
        )  # fmt: skip


def svg(figure: Figure, description: str) -> str:
    """The figure as an element for a page: it scales, and has only ids that are referred to."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": description}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawing = re.search(r"<svg [^>]*?viewBox=\"([^\"]+)\"[^>]*>(.*)</svg>", text.getvalue(), re.S)
    assert drawing is not None
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", drawing[2], flags=re.S)
    body = re.sub(r' id="[\w.]+_\d+"', "", body)
    words = f'role="img" aria-label="{escape(description)}"' if description else 'aria-hidden="true"'
    return f'<svg viewBox="{drawing[1]}" style="max-width:{figure.get_figwidth() * 1.25:g}in" {words}>{body}</svg>'
