"""The plots of the page of a fit. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..pages.drawing import COLOURS, WIDTH, panel, svg

CELL = 0.5  # inches of one cell of a confusion matrix
LETTER = 0.072  # inches of a letter
MATRIX = 2.4  # inches that a confusion matrix takes at least, so that its title has room
LABEL = 14  # characters of a class name beside a confusion matrix


def curves(history: pd.DataFrame, title: str, ylabel: str) -> str:
    """One line a run over the optimizer steps.

    Args:
        history: Columns run, step, value.
        title: Of the panel.
        ylabel: What the values are.
    """
    with panel(WIDTH, 2.4, title) as (figure, axes):
        for number, (_, points) in enumerate(history.groupby("run", sort=True)):
            marker = "o" if len(points) < 40 else ""
            axes.plot(
                points["step"], points["value"], marker=marker, markersize=3, color=COLOURS[number % len(COLOURS)]
            )
        axes.set_xlabel("optimizer steps")
        axes.set_ylabel(ylabel, parse_math=False)
        return svg(figure, f"{title} over the steps of training")


def confusion(counts: np.ndarray, names: Sequence[str], title: str) -> str:
    """Numbers of rows by label and prediction; a cell is the darker, the larger its share of the rows of its label.

    Args:
        counts: Shape (classes, classes): rows of the label (first axis) that were predicted as (second axis).
        names: Of the classes.
        title: Of the panel.
    """
    labels = [name if len(name) <= LABEL else name[: LABEL - 1] + "…" for name in names]
    longest, side = LETTER * max(map(len, labels)), CELL * len(labels)
    turned = longest > CELL
    left, below = 0.4 + longest, 0.4 + (longest if turned else 0.15)
    width = max(left + side + 0.15, MATRIX)
    with panel(width, 0.35 + side + below, title, (left, width - left - side, below, 0.35)) as (figure, axes):
        shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        axes.grid(visible=False)
        for (row, column), share in np.ndenumerate(shares):
            shade = tuple(1 - share * (1 - part) for part in (0.0, 0.35, 0.6))  # from white to blue
            axes.fill([column, column + 1, column + 1, column], [row, row, row + 1, row + 1], facecolor=shade)
            ink = "white" if share > 0.6 else "#222222"
            axes.text(column + 0.5, row + 0.5, f"{counts[row, column]:,}", ha="center", va="center", color=ink)
        axes.set(xlim=(0, len(labels)), ylim=(len(labels), 0), xlabel="prediction", ylabel="label")
        places = np.arange(len(labels)) + 0.5
        axes.set_xticks(places, labels, rotation=90 if turned else 0, parse_math=False)
        axes.set_yticks(places, labels, parse_math=False)
        axes.tick_params(length=0)
        return svg(figure, f"{title}: confusion matrix")


def calibration(bins: pd.DataFrame, title: str) -> str:
    """Share of right predictions against the probability the model gives them; on the dashed line it is calibrated.

    Args:
        bins: Columns probability, right, rows; one row a bin.
        title: Of the panel.
    """
    with panel(WIDTH, 2.7, title) as (figure, axes):
        axes.plot([0, 1], [0, 1], "--", color="#777777", linewidth=0.9)
        axes.plot(bins["probability"], bins["right"], color=COLOURS[1], linewidth=1)
        sizes = 3 + 7 * np.sqrt(bins["rows"] / bins["rows"].max())
        for probability, right, size in zip(bins["probability"], bins["right"], sizes, strict=True):
            axes.plot([probability], [right], "o", color=COLOURS[1], markersize=size)
        axes.set(xlim=(0, 1.03), ylim=(-0.03, 1.05))
        axes.set_xlabel("mean probability of the prediction")
        axes.set_ylabel("share of right predictions")
        return svg(figure, f"{title}: calibration curve")


def numbers(rows: pd.DataFrame, title: str) -> str:
    """Predicted against true numbers; on the dashed line a prediction is right.

    Args:
        rows: Columns label, prediction.
        title: Of the panel.
    """
    with panel(WIDTH, 2.9, title) as (figure, axes):
        ends = [rows[["label", "prediction"]].to_numpy().min(), rows[["label", "prediction"]].to_numpy().max()]
        axes.plot(ends, ends, "--", color="#777777", linewidth=0.9)
        axes.plot(rows["label"], rows["prediction"], "o", color=COLOURS[1], markersize=3, alpha=0.5, markeredgewidth=0)
        axes.set_xlabel("label")
        axes.set_ylabel("prediction")
        return svg(figure, f"{title}: predictions against labels")
