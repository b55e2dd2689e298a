"""Texts for numbers, scores and methods, equal in the terminal, in the model card and on the pages."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

NONE = "–"


def number(value: float | None, digits: int, signed: bool = False) -> str:
    """A number with a number of digits; a dash for None."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:{'+' if signed else ''}z.{digits}f}"
    return text.replace("-", "−")


def interval(low: float, high: float, digits: int, signed: bool = False) -> str:
    """An interval such as "[0.4, 2.1]"."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return NONE
    return f"[{number(low, digits, signed)}, {number(high, digits, signed)}]"


def chance(p: float) -> str:
    """A p-value."""
    return "< 0.001" if p < 0.001 else number(p, 3)


def counted(count: int, noun: str) -> str:
    """A count such as "1 run" or "2 runs"."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")


def listed(names: Iterable[str]) -> str:
    """A list such as "a, b and c"."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def score_words(scores: Mapping[str, Any], name: str) -> str:
    """One score of a set, as in "0.8125 (0.8050 ± 0.0071)".

    Args:
        scores: The scores of one set, as in ``metrics.json``.
        name: The metric.

    Returns:
        The score, followed by mean and standard deviation over runs where there are several; "-" where the set does not
        have the metric or it is undefined.
    """
    if scores.get(name) is None:
        return "-"
    runs = scores.get("runs", {}).get(name)
    return f"{scores[name]:.4f}" + (f" ({runs['mean']:.4f} ± {runs['sd']:.4f})" if runs else "")


def spread_words(scores: Mapping[str, Any], name: str) -> str:
    """One number of a set as in "0.8125", or a mean over runs as in "0.8050 ± 0.0071"; "-" where there is none."""
    value = scores.get(name)
    if value is None:
        return "-"
    return f"{value['mean']:.4f} ± {value['sd']:.4f}" if isinstance(value, Mapping) else f"{value:.4f}"


def bounds_words(scores: Mapping[str, Any], name: str) -> str:
    """The 95 % interval of a score as in "0.7420 to 0.8651"; "-" where it has none."""
    bounds = score_interval(scores, name)
    return "-" if bounds is None else f"{bounds[0]:.4f} to {bounds[1]:.4f}"


def call_words(method: Mapping[str, Any]) -> str:
    """A recorded method or procedure as in "ema(decay=0.9, scope=all)"."""
    return f"{method['name']}({', '.join(f'{name}={value}' for name, value in method['options'].items())})"


def score_names(sets: Iterable[Mapping[str, Any]], first: str) -> list[str]:
    """Names of the metrics that any set has, beginning with ``first``; counts and tables are left out."""
    names = (name for scores in sets for name, value in scores.items() if _is_score(name, value))
    return list(dict.fromkeys([first, *names]))


def _is_score(name: str, value: Any) -> bool:
    return name not in ("rows", "selected") and (value is None or isinstance(value, int | float))


def metric_words(metric: str, labels: Sequence[str]) -> str:
    """A metric with the class it is about, as in "f1 (spam)": F1 of two classes is that of the second."""
    return f"{metric} ({labels[1]})" if metric == "f1" and len(labels) == 2 else metric


def score_interval(scores: Mapping[str, Any], name: str) -> tuple[float, float] | None:
    """The 95 % interval of a score of a set, None where it has none."""
    bounds = (scores.get("intervals") or {}).get(name)
    return None if bounds is None else (bounds[0], bounds[1])
