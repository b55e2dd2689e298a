"""A search in sentences. No torch here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..data.metrics import METRICS, smaller_is_better
from ..pages.words import counted, listed, number


def scale(metric: str) -> tuple[float, str]:
    """Factor and unit of gains: points for metrics between -1 and 1, the metric's own unit for others."""
    return (1.0, "") if None in limits(metric) else (100.0, " points")


def shown(metric: str, value: float) -> float:
    """A goodness, of which larger is better, as a value of the metric: only that of an error has its sign turned."""
    return -value if smaller_is_better(metric) else value


def bounds(metric: str, low: float, high: float) -> tuple[float, float]:
    """Bounds of a goodness as those of the metric: the smaller one first, and within the metric's limits."""
    least, most = limits(metric)
    first, last = sorted((shown(metric, low), shown(metric, high)))
    if least is not None:
        first, last = max(first, least), max(last, least)
    if most is not None:
        first, last = min(first, most), min(last, most)
    return first, last


def limits(metric: str) -> tuple[float | None, float | None]:
    """Smallest and largest value of a metric; None for no limit."""
    return next(m.limits for metrics in METRICS.values() for m in metrics if m.name == metric)


def gain_words(gain: Mapping[str, Any], metric: str) -> str:
    """A gain as in "+2.3 points (0.4 to 4.2)"."""
    times, unit = scale(metric)
    low, high = (number(times * bound, 1) for bound in gain["interval"])
    return f"{number(times * gain['value'], 1, signed=True)}{unit} ({low} to {high})"


def verdict_words(record: Mapping[str, Any], believed: bool = True) -> str:
    """What was found, in a few sentences.

    Args:
        record: The entry `search` of `steadytune.json`.
        believed: Whether to say what is believed of the gain by the rows that chose it.
    """
    metric, ship, claim = record["metric"], record["ship"], record["claim"]
    name, gain, rows = ship["name"], gain_words(claim["gain"], metric), counted(record["rows"], "row")
    agreed = {*record["chosen"].values()} == {name}
    judged = "judged on rows and by trainings that did not choose it" if claim["fresh"] else (
        "judged on rows that did not choose it, but by the trainings that did"
    )  # fmt: skip
    who = f"`{name}`" if agreed else "What the search chooses by half of the rows"
    if claim["verdict"] == "shown":
        parts = [f"{who} is shown to beat plain fine-tuning on these {rows}: {gain}, {judged}."]
    elif claim["verdict"] == "likely":
        parts = [f"{who} is likely to beat plain fine-tuning on these {rows}, but this is not shown: {gain}, {judged}."]
    else:
        parts = [f"No recipe is shown to beat plain fine-tuning on these {rows}."]
    return " ".join([*parts, *_limits(record), _shipping(record, believed), _level(record)])


def _limits(record: Mapping[str, Any]) -> list[str]:
    claim, metric = record["claim"], record["metric"]
    if claim["detectable"] is None:
        return ["No other recipe was tried."]
    times, unit = scale(metric)
    text = f"Gains below {number(times * claim['detectable'], 1)}{unit} are rarely shown by so many rows and trainings."
    if not claim["fresh"] and {*record["chosen"].values()} != {"plain"}:
        text += " The budget left no trainings that judge without having chosen, so nothing could be shown."
    return [text]


def _shipping(record: Mapping[str, Any], believed: bool) -> str:
    ship, (times, unit) = record["ship"], scale(record["metric"])
    several = ""
    if (runs := record.get("runs", 1)) > ship.get("soup", 1):
        several = f" It is the mean of the weights of {runs} runs, and all figures here are of single runs."
    if ship["name"] == "plain":
        return f"The model is that of plain fine-tuning.{several}"
    if not believed:
        return f"The model is that of `{ship['name']}`.{several}"
    belief = f"{number(times * ship['belief']['mean'], 1, signed=True)}{unit} over plain"
    return f"The model is that of `{ship['name']}`, whose gain is believed to be {belief}.{several}"


def _level(record: Mapping[str, Any]) -> str:
    level, metric = record["claim"]["level"], record["metric"]
    low, high = bounds(metric, *level["interval"])
    return (
        f"Expected {metric} on further rows like these: {number(shown(metric, level['value']), 3)} "
        f"({number(low, 3)} to {number(high, 3)}), of models trained on {record['trained_on']:,} rows."
    )


def dropped_words(record: Mapping[str, Any]) -> list[str]:
    """Arms that were not compared, and why."""
    lines = [f"{arm} was dropped: {why}" for arm, why in record["dropped"].items()]
    if record["untried"]:
        lines.append(f"not tried, because the budget was too small: {listed(record['untried'])}")
    return lines
