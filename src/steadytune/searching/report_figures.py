"""The plots of the page of a search. No torch here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..pages.drawing import COLOURS, WIDTH, beside, lines, looks, panel, svg
from .learning_curve import power_law
from .words import limits

PATH_COLOURS = {"A": COLOURS[1], "B": COLOURS[2]}


def elimination(standings: Sequence[Mapping[str, Any]], stage: str, times: float, unit: str) -> str:
    """Gains of the arms of a stage over the recipe before it, one line for each half; filled markers went on.

    Args:
        standings: The last standing of each arm and path of the stage.
        stage: Name of the stage.
        times: Factor of gains.
        unit: Unit of gains.
    """
    arms = list(dict.fromkeys(s["arm"] for s in standings))
    with panel(WIDTH + 1.2, 0.9 + 0.34 * len(arms), f"stage {stage}", beside(arms)) as (figure, axes):
        axes.axvline(0, color="#777777", linewidth=0.9)
        for standing in standings:
            place = arms.index(standing["arm"]) + (-0.14 if standing["path"] == "A" else 0.14)
            colour = PATH_COLOURS[standing["path"]]
            low, high = (times * bound for bound in standing["gain"]["interval"])
            axes.plot([low, high], [place, place], color=colour, linewidth=1)
            filled = colour if standing["fate"] != "stopped" else "white"
            marker = "*" if standing["fate"] == "chosen" else "o"
            axes.plot(
                [times * standing["gain"]["value"]], [place], marker, color=colour, markerfacecolor=filled,
                markersize=9 if marker == "*" else 5,
            )  # fmt: skip
        lines(axes, arms)
        axes.set_xlabel(f"gain{unit and ','}{unit}")
        return svg(figure, f"gains of the arms of stage {stage}")


def cost(arms: Sequence[Mapping[str, Any]], ship: str, times: float, unit: str) -> str:
    """Gain over plain against the seconds of a training; the star is the recipe of the model.

    Args:
        arms: Arms with a gain.
        ship: Name of the recipe of the model.
        times: Factor of gains.
        unit: Unit of gains.
    """
    with panel(WIDTH + 1.2, 2.7, "cost against gain") as (figure, axes):
        axes.axhline(0, color="#777777", linewidth=0.9)
        for arm in arms:
            x, y = arm["seconds"], times * arm["gain"]["value"]
            low, high = (times * bound for bound in arm["gain"]["interval"])
            axes.plot([x, x], [low, high], color="#bbbbbb", linewidth=0.9, zorder=1)
            chosen = arm["name"] == ship
            marker, size, colour = ("*", 10, COLOURS[2]) if chosen else ("o", 4, COLOURS[1])
            axes.plot([x], [y], marker, color=colour, markersize=size)
            axes.annotate(arm["name"], (x, y), (4, 3), textcoords="offset points", fontsize=6.5, parse_math=False)
        axes.set_xlabel("seconds of a training")
        axes.set_ylabel(f"gain over plain{unit and ','}{unit}")
        return svg(figure, "gain over plain against the seconds of a training")


def curve(found: Mapping[str, Any]) -> str:
    """Scores by number of training rows with their standard errors, and the power law through them.

    The law goes on to more rows, dashed, where these rows tell what more of them would bring. It keeps within the
    limits of the metric.

    Args:
        found: Record of a learning curve.
    """
    least, most = limits(found["metric"])
    ends = (-np.inf if least is None else least, np.inf if most is None else most)
    with panel(WIDTH + 1.2, 2.7, "learning curve") as (figure, axes):
        for name, look in looks([*found["scores"]]).items():
            by_size = found["scores"][name]
            sizes = np.array([float(size) for size in by_size])
            values, errors = (np.array([score[key] for score in by_size.values()]) for key in ("value", "error"))
            axes.errorbar(sizes, values, errors, fmt=look.marker, color=look.colour, markersize=4, elinewidth=0.9)
            a, b, c = power_law(sizes, values)
            more = found["more"][name]
            now = np.linspace(sizes.min(), found["rows"])
            axes.plot(now, np.clip(a - b * now**-c, *ends), color=look.colour, label=name)
            if more["interval"][0] > 0:
                then = np.linspace(found["rows"], found["rows"] + more["rows"])
                axes.plot(then, np.clip(a - b * then**-c, *ends), "--", color=look.colour)
        axes.set_xlabel("training rows")
        axes.set_ylabel(found["metric"])
        axes.legend(frameon=False)
        return svg(figure, "scores by number of training rows")
