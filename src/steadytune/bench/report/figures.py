"""The plots of a report: small SVG panels that a page lays out side by side. No torch, no pyplot.

A recipe has one colour (the palette of Okabe and Ito, which colour-blind readers can tell apart) and one marker
everywhere. The same data give the same bytes.
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
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
WIDTH = 3.6  # inches; also about the width of a phone
LABEL = 26  # characters of a name in a plot
_STYLE: dict[Any, Any] = {
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
    """How a recipe is drawn."""

    colour: str
    marker: str


def looks(recipes: Sequence[str]) -> dict[str, Look]:
    """Colour and marker of each recipe, in their order; no two alike up to 56 recipes."""
    pairs = zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False)
    return {recipe: Look(*pair) for recipe, pair in zip(recipes, pairs, strict=False)}


@functools.cache
def key(look: Look) -> str:
    """The marker alone, for a legend."""
    with _panel(0.2, 0.2, "", margins=(0, 0, 0, 0)) as (figure, axes):
        axes.set_axis_off()
        axes.plot([0], [0], look.marker, color=look.colour, markersize=6)
        return _svg(figure, "")


def strips(scores: pd.DataFrame, recipes: Sequence[str], title: str, xlabel: str) -> str:
    """One dot a seed and a tick at the mean, one line a recipe.

    Args:
        scores: columns recipe, score; one row a run, in the order of the seeds.
        recipes: from top to bottom; all of them have a line, also those without a score.
        title: of the panel.
        xlabel: what a score is.
    """
    with _panel(WIDTH, 0.75 + 0.27 * len(recipes), title, _beside(recipes)) as (figure, axes):
        for line, (recipe, look) in enumerate(looks(recipes).items()):
            found = scores.loc[scores["recipe"] == recipe, "score"].to_numpy()
            if len(found):
                spread = np.linspace(-0.22, 0.22, len(found)) if len(found) > 1 else [0.0]
                axes.plot(found, line + np.asarray(spread), look.marker, color=look.colour, markersize=3.6, alpha=0.75)
                axes.plot([found.mean()] * 2, [line - 0.36, line + 0.36], color=look.colour, linewidth=2)
        _lines(axes, recipes)
        axes.set_xlabel(xlabel)
        return _svg(figure, f"{title}: scores of all seeds by recipe")


def forest(gains: pd.DataFrame, title: str, xlabel: str, limits: tuple[float, float]) -> str:
    """Differences with their intervals around a line at zero.

    Args:
        gains: columns group, label, look, gain, low, high; one row a difference, low and high may be NaN.
        title: of the panel.
        xlabel: what a gain is.
        limits: of the horizontal axis, so that panels can be compared.
    """
    labels: list[str] = []
    places: list[int] = []
    ordered: list[pd.DataFrame] = []
    groups: Any = gains.groupby("group", sort=False)
    for group, rows in groups:
        labels += [str(group), *("  " + rows["label"])]
        places += range(len(labels) - len(rows), len(labels))
        ordered.append(rows)
    with _panel(WIDTH, 0.75 + 0.21 * len(labels), title, _beside(labels)) as (figure, axes):
        rows = pd.concat(ordered).assign(place=places)
        recipes: Any = rows.groupby("look", sort=False)
        for look, found in recipes:
            axes.hlines(found["place"], found["low"], found["high"], look.colour, linewidth=1.6)
            axes.plot(found["gain"], found["place"], look.marker, color=look.colour, markersize=5)
        axes.axvline(0, color="#555555", linewidth=0.9)
        axes.set_xlim(*limits)
        _lines(axes, labels)
        axes.set_xlabel(xlabel)
        return _svg(figure, f"{title}: paired differences with 95 % intervals")


def curves(means: pd.DataFrame, recipes: Sequence[str], title: str, ylabel: str) -> str:
    """Mean and standard deviation over the number of training rows, on a logarithmic axis.

    Args:
        means: columns recipe, size, mean, sd.
        recipes: in the order of their looks.
        title: of the panel.
        ylabel: what a score is.
    """
    with _panel(WIDTH, 2.5, title) as (figure, axes):
        for place, (recipe, look) in enumerate(looks(recipes).items()):
            found = means[means["recipe"] == recipe].sort_values("size")
            beside = 1.025 ** (place - (len(recipes) - 1) / 2)  # so that error bars stand side by side
            axes.errorbar(
                found["size"] * beside, found["mean"], yerr=found["sd"].fillna(0), color=look.colour,
                marker=look.marker, markersize=4.5, capsize=2, elinewidth=0.9,
            )  # fmt: skip
        sizes = sorted(means["size"].unique())
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{size:,.0f}" for size in sizes])
        axes.set_xlabel("training rows")
        axes.set_ylabel(ylabel)
        return _svg(figure, f"{title}: learning curves")


def scatter(scores: pd.DataFrame, recipes: Sequence[str], title: str, labels: tuple[str, str]) -> str:
    """In-domain against out-of-domain score: a faint dot a run, a large one at a recipe's mean.

    Args:
        scores: columns recipe, in, out.
        recipes: in the order of their looks.
        title: of the panel.
        labels: of the two axes.
    """
    with _panel(WIDTH, 2.7, title) as (figure, axes):
        for recipe, look in looks(recipes).items():
            found = scores.loc[scores["recipe"] == recipe, ["in", "out"]].to_numpy()
            if len(found):
                axes.plot(*found.T, look.marker, color=look.colour, markersize=3.6, alpha=0.4, markeredgewidth=0)
                axes.plot(*found.mean(axis=0), look.marker, color=look.colour, markersize=8, markeredgecolor="white")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        return _svg(figure, f"{title}: in-domain against out-of-domain scores")


def cost(gains: pd.DataFrame, title: str, labels: tuple[str, str]) -> str:
    """What a recipe gains against what it costs.

    Args:
        gains: columns look, cost, gain, low, high.
        title: of the panel.
        labels: of the two axes.
    """
    with _panel(WIDTH, 2.5, title) as (figure, axes):
        axes.axhline(0, color="#555555", linewidth=0.9)
        axes.axvline(1, color="#555555", linewidth=0.9)
        recipes: Any = gains.groupby("look", sort=False)
        for look, found in recipes:
            axes.vlines(found["cost"], found["low"], found["high"], look.colour, linewidth=1.4)
            axes.plot(found["cost"], found["gain"], look.marker, color=look.colour, markersize=6)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        return _svg(figure, f"{title}: gain against cost")


@contextmanager
def _panel(
    width: float, height: float, title: str, margins: tuple[float, float, float, float] = (0.62, 0.12, 0.48, 0.27)
) -> Iterator[tuple[Figure, Axes]]:
    """An empty plot of that many inches, with these left, right, bottom and top; names are never read as formulas.

    Margins are given, not found by a layout engine, which would draw every panel twice.
    """
    left, right, bottom, top = margins
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the page's font may well have it
        figure = Figure((width, height))
        FigureCanvasSVG(figure)
        box = (left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height)
        axes = figure.add_axes(box)
        if title:
            words = textwrap.shorten(title, 60, placeholder="…")
            figure.text(0.02, 1 - 0.06 / height, words, va="top", fontsize=9, fontweight="bold", parse_math=False)
        yield figure, axes


def _beside(labels: Sequence[str]) -> tuple[float, float, float, float]:
    """Margins that leave room for labels on the left."""
    return 0.15 + 0.068 * max(map(len, map(_short, labels))), 0.12, 0.48, 0.27


def _short(label: str) -> str:
    return label if len(label) <= LABEL else label[: LABEL - 1] + "…"


def _lines(axes: Axes, labels: Sequence[str]) -> None:
    """One horizontal line a label, the first on top; where some are indented the others are headings."""
    headed = any(label.startswith(" ") for label in labels)
    axes.set_yticks([])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    for place, label in enumerate(labels):
        weight = "bold" if headed and not label.startswith(" ") else "normal"
        axes.text(
            -0.03, place, _short(label), transform=axes.get_yaxis_transform(), ha="right", va="center",
            fontweight=weight, parse_math=False,
        )  # fmt: skip


def _svg(figure: Figure, description: str) -> str:
    """The figure as an element to stand inside a page: it scales, and has ids only where they are referred to."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": description}):
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    drawing = re.search(r"<svg [^>]*?viewBox=\"([^\"]+)\"[^>]*>(.*)</svg>", text.getvalue(), re.S)
    assert drawing is not None
    body = re.sub(r"\s*<metadata>.*?</metadata>", "", drawing[2], flags=re.S)
    body = re.sub(r' id="[\w.]+_\d+"', "", body)
    words = f'role="img" aria-label="{escape(description)}"' if description else 'aria-hidden="true"'
    return f'<svg viewBox="{drawing[1]}" style="max-width:{figure.get_figwidth() * 1.25:g}in" {words}>{body}</svg>'
