"""Plots of a bench report. No torch here.

Each recipe has the same colour and marker in all plots. The palette, by Okabe and Ito, is readable for the
colour-blind.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from ...pages.drawing import WIDTH, beside, lines, looks, panel, svg


def strips(scores: pd.DataFrame, recipes: Sequence[str], title: str, xlabel: str) -> str:
    """One line for each recipe, with a dot for each seed and a tick at the mean.

    Args:
        scores: Columns recipe, score; one row for each run, in the order of the seeds.
        recipes: All recipes from top to bottom, including those without a score.
        title: Title of the panel.
        xlabel: What a score is.
    """
    with panel(WIDTH, 0.75 + 0.27 * len(recipes), title, beside(recipes)) as (figure, axes):
        for line, (recipe, look) in enumerate(looks(recipes).items()):
            values = scores.loc[scores["recipe"] == recipe, "score"].to_numpy()
            if len(values):
                spread = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else [0.0]
                axes.plot(values, line + np.asarray(spread), look.marker, color=look.colour, markersize=3.6, alpha=0.75)
                axes.plot([values.mean()] * 2, [line - 0.36, line + 0.36], color=look.colour, linewidth=2)
        lines(axes, recipes)
        axes.set_xlabel(xlabel)
        return svg(figure, f"{title}: scores of all seeds by recipe")


def forest(gains: pd.DataFrame, title: str, xlabel: str, limits: tuple[float, float]) -> str:
    """Differences with their intervals around a line at zero.

    Args:
        gains: Columns group, label, look, gain, low, high; one row for each difference; low and high may be NaN.
        title: Title of the panel.
        xlabel: What a gain is.
        limits: Limits of the horizontal axis, equal for panels that are compared. An interval that goes beyond them
            ends in an arrow; a gain beyond them is written as a number.
    """
    labels: list[str] = []
    places: list[int] = []
    ordered: list[pd.DataFrame] = []
    groups: Any = gains.groupby("group", sort=False)
    for group, rows in groups:
        labels += [str(group), *("  " + rows["label"])]
        places += range(len(labels) - len(rows), len(labels))
        ordered.append(rows)
    with panel(WIDTH, 0.75 + 0.21 * len(labels), title, beside(labels)) as (figure, axes):
        rows = pd.concat(ordered).assign(place=places)
        recipes: Any = rows.groupby("look", sort=False)
        for look, shown in recipes:
            ends = shown[["low", "high"]].clip(*limits)
            axes.hlines(shown["place"], ends["low"], ends["high"], look.colour, linewidth=1.6)
            inside = shown[shown["gain"].between(*limits)]
            axes.plot(inside["gain"], inside["place"], look.marker, color=look.colour, markersize=5)
            _arrows(axes, shown, limits, look.colour)
        axes.axvline(0, color="#555555", linewidth=0.9)
        axes.set_xlim(*limits)
        lines(axes, labels)
        axes.set_xlabel(xlabel)
        return svg(figure, f"{title}: paired differences with 95 % intervals")


def _arrows(axes: Axes, gains: pd.DataFrame, limits: tuple[float, float], colour: str) -> None:
    """Draw arrows where an interval or a gain lies beyond the limits of the panel."""
    for limit, arrow, side in ((limits[0], "<", "low"), (limits[1], ">", "high")):
        sign = 1 if side == "high" else -1
        beyond = gains[sign * gains[side].fillna(gains["gain"]) > sign * limit]
        axes.plot([limit] * len(beyond), beyond["place"], arrow, color=colour, markersize=5, clip_on=False)
        for _, row in beyond[sign * beyond["gain"] > sign * limit].iterrows():
            axes.annotate(
                f"{row['gain']:+.1f}".replace("-", "−"), (limit, row["place"]), (-sign * 6, 0),
                textcoords="offset points", ha="right" if sign > 0 else "left", va="center", fontsize=7.5, color=colour,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6},
            )  # fmt: skip


def curves(means: pd.DataFrame, recipes: Sequence[str], title: str, ylabel: str) -> str:
    """Mean and standard deviation over the number of training rows, on a logarithmic axis.

    Args:
        means: Columns recipe, size, mean, sd.
        recipes: In the order of their looks.
        title: Title of the panel.
        ylabel: What a score is.
    """
    with panel(WIDTH, 2.5, title) as (figure, axes):
        for place, (recipe, look) in enumerate(looks(recipes).items()):
            line = means[means["recipe"] == recipe].sort_values("size")
            offset = 1.025 ** (place - (len(recipes) - 1) / 2)  # shifted, so that error bars do not overlap
            axes.errorbar(
                line["size"] * offset, line["mean"], yerr=line["sd"].fillna(0), color=look.colour,
                marker=look.marker, markersize=4.5, capsize=2, elinewidth=0.9,
            )  # fmt: skip
        sizes = sorted(means["size"].unique())
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sizes))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticklabels([f"{size:,.0f}" for size in sizes])
        axes.set_xlabel("training rows")
        axes.set_ylabel(ylabel)
        return svg(figure, f"{title}: learning curves")


def scatter(scores: pd.DataFrame, recipes: Sequence[str], title: str, labels: tuple[str, str]) -> str:
    """In-domain against out-of-domain scores: a faint dot for each run, a large one at the mean of a recipe.

    Args:
        scores: Columns recipe, in, out.
        recipes: In the order of their looks.
        title: Title of the panel.
        labels: Labels of the two axes.
    """
    with panel(WIDTH, 2.7, title) as (figure, axes):
        for recipe, look in looks(recipes).items():
            points = scores.loc[scores["recipe"] == recipe, ["in", "out"]].to_numpy()
            if len(points):
                axes.plot(*points.T, look.marker, color=look.colour, markersize=3.6, alpha=0.4, markeredgewidth=0)
                axes.plot(*points.mean(axis=0), look.marker, color=look.colour, markersize=8, markeredgecolor="white")
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        return svg(figure, f"{title}: in-domain against out-of-domain scores")


def cost(gains: pd.DataFrame, title: str, labels: tuple[str, str]) -> str:
    """Gains of recipes against their costs.

    Args:
        gains: Columns look, cost, gain, low, high.
        title: Title of the panel.
        labels: Labels of the two axes.
    """
    with panel(WIDTH, 2.5, title) as (figure, axes):
        axes.axhline(0, color="#555555", linewidth=0.9)
        axes.axvline(1, color="#555555", linewidth=0.9)
        recipes: Any = gains.groupby("look", sort=False)
        for look, rows in recipes:
            axes.vlines(rows["cost"], rows["low"], rows["high"], look.colour, linewidth=1.4)
            axes.plot(rows["cost"], rows["gain"], look.marker, color=look.colour, markersize=6)
        axes.set_xlabel(labels[0])
        axes.set_ylabel(labels[1])
        return svg(figure, f"{title}: gain against cost")
