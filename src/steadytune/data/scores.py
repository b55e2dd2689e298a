"""All scores of one set: values, intervals, baseline, scores by class, notes for the reader.

No torch here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from .metrics import Metric, smaller_is_better
from .problem import Problem

TRIED = 200  # largest number of thresholds to try


def full_scores(
    problem: Problem,
    gold: np.ndarray,
    predicted: np.ndarray,
    scores: np.ndarray,
    constant: np.ndarray | None = None,
    selected: bool = False,
    subgroups: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> dict[str, Any]:
    """All recorded scores of one set, ready for JSON.

    Args:
        problem: What is predicted.
        gold: Labels (rows,).
        predicted: Labels (rows,).
        scores: Activated outputs (rows, outputs).
        constant: What a model answers that reads no text, as `Problem.constant` gives it; without it there is no
            baseline.
        selected: Whether these rows selected the model.
        subgroups: Name of the subgroup of each row (rows,).
        groups: Group of each row (rows,), for rows that are not independent; intervals are wider for it.

    Returns:
        ``rows`` and every metric by name, and beside them ``intervals`` and ``baseline`` (both by metric), ``classes``
        (rows by class), ``selected``, ``notes`` (sentences), and for classes ``per_class`` and, one class a row,
        ``confusion`` (rows by gold class and by predicted class). With subgroups also ``subgroups``: by name, the
        ``rows``, every metric, and ``intervals``.
    """
    labels = pd.Series(gold, dtype=object)
    return {
        **_with_intervals(problem, gold, predicted, scores, groups),
        **({} if constant is None else {"baseline": baseline(problem, gold, constant)}),
        "classes": problem.counts(labels),
        "selected": selected,
        "notes": _notes(problem, gold, groups),
        **_by_class(problem, gold, predicted),
        **(
            {}
            if subgroups is None
            else {"subgroups": _by_subgroup(problem, gold, predicted, scores, subgroups, groups)}
        ),
    }


def _with_intervals(
    problem: Problem, gold: np.ndarray, predicted: np.ndarray, scores: np.ndarray, groups: np.ndarray | None
) -> dict[str, float | int | dict[str, list[float] | None] | None]:
    """Number of rows, every metric, and their intervals."""
    intervals = problem.intervals(gold, predicted, scores, groups)
    return {
        "rows": len(gold),
        **problem.score(gold, predicted, scores),
        "intervals": {name: None if bounds is None else list(bounds) for name, bounds in intervals.items()},
    }


def _by_subgroup(
    problem: Problem,
    gold: np.ndarray,
    predicted: np.ndarray,
    scores: np.ndarray,
    subgroups: np.ndarray,
    groups: np.ndarray | None,
) -> dict[str, Any]:
    """Scores of the rows of each subgroup, in the order of their names."""
    parts = {str(name): subgroups == name for name in sorted(set(subgroups))}
    return {
        name: _with_intervals(problem, gold[at], predicted[at], scores[at], None if groups is None else groups[at])
        for name, at in parts.items()
    }


def groups_of(rows: pd.DataFrame) -> np.ndarray | None:
    """Group of each row (rows,); None for rows without groups."""
    return _names(rows, "group")


def subgroups_of(rows: pd.DataFrame) -> np.ndarray | None:
    """Name of the subgroup of each row (rows,); None for rows without subgroups."""
    return _names(rows, "subgroup")


def _names(rows: pd.DataFrame, column: str) -> np.ndarray | None:
    named = column in rows and rows[column].notna().all()
    return rows[column].to_numpy(dtype=object) if named else None


def worst_first(scores: Mapping[str, Any], metric: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Names and scores of the subgroups of a set, the worst first; empty without subgroups.

    Args:
        scores: Scores of a set, as `full_scores` gives them.
        metric: Name of a metric. Subgroups where it is undefined come last.
    """
    sign = -1 if smaller_is_better(metric) else 1
    parts = (scores.get("subgroups") or {}).items()
    return sorted(parts, key=lambda part: np.inf if part[1].get(metric) is None else sign * part[1][metric])


def worst_value(
    metric: Metric, gold: np.ndarray, given: np.ndarray, names: Sequence[str], subgroups: np.ndarray | None
) -> float | None:
    """The metric of the subgroup with the worst score, for selection; of all rows without subgroups.

    Args:
        metric: The metric.
        gold: Labels (rows,).
        given: Labels (rows,), or probabilities (rows, classes) if the metric needs them.
        names: Class names.
        subgroups: Name of the subgroup of each row (rows,).
    """
    if subgroups is None:
        return metric.compute(gold, given, names)
    parts = (subgroups == name for name in set(subgroups))
    values = [value for at in parts if (value := metric.compute(gold[at], given[at], names)) is not None]
    return min(values, key=metric.goodness, default=None)


def baseline(problem: Problem, gold: np.ndarray, constant: np.ndarray) -> dict[str, float | None]:
    """Every metric of the same answer for all rows: the most frequent class, or the mean, of the training rows."""
    scores = np.repeat(constant, len(gold), axis=0)
    most = problem if problem.several else dataclasses.replace(problem, threshold=None)  # it would give another class
    return problem.score(gold, most.decide(scores), scores)


def _notes(problem: Problem, gold: np.ndarray, groups: np.ndarray | None) -> list[str]:
    """Notes on how to read the scores."""
    return [*_notes_on_classes(problem, gold), *([] if groups is None else _notes_on_groups(groups))]


def _notes_on_groups(groups: np.ndarray) -> list[str]:
    count = len(set(groups))
    if count == len(groups):
        return []
    return [f"The {len(groups):,} rows come from {count:,} groups; the intervals are as wide as the groups differ."]


def _notes_on_classes(problem: Problem, gold: np.ndarray) -> list[str]:
    counts = problem.membership(list(gold)).sum(axis=0)
    missing = [name for name, count in zip(problem.names, counts, strict=True) if not count]
    if not missing or "f1_macro" not in problem.metrics:
        return []
    best = 1 - len(missing) / len(problem.names)
    more = f" and {len(missing) - 1} other classes" if len(missing) > 1 else ""
    return [f"No row has the class {missing[0]!r}{more}: perfect predictions have f1_macro {best:.4f} here."]


def _by_class(problem: Problem, gold: np.ndarray, predicted: np.ndarray) -> dict[str, Any]:
    if not problem.names:
        return {}
    has, said = problem.membership(list(gold)), problem.membership(list(predicted))
    by_class: dict[str, Any] = {"per_class": per_class(problem.names, has, said)}
    if not problem.several:
        by_class["confusion"] = (has.T.astype(int) @ said.astype(int)).tolist()
    return by_class


def per_class(names: Sequence[str], has: np.ndarray, said: np.ndarray) -> dict[str, dict[str, float | int | None]]:
    """Precision, recall, F1 and support of each class, from truth values (rows, classes).

    Precision is None where the class is never predicted, recall where no row has it, F1 where both hold.
    """
    hits, support, given = (has & said).sum(axis=0), has.sum(axis=0), said.sum(axis=0)

    def share(part: int, whole: int) -> float | None:
        return float(part / whole) if whole else None

    return {
        name: {
            "precision": share(hits[i], given[i]),
            "recall": share(hits[i], support[i]),
            "f1": share(2 * hits[i], support[i] + given[i]),
            "support": int(support[i]),
        }
        for i, name in enumerate(names)
    }


def warnings(
    problem: Problem, name: str, metric: str, scores: Mapping[str, Any], predictions: pd.DataFrame
) -> list[str]:
    """Faults of a model according to its scores on one set, in sentences; empty if there are none.

    Args:
        problem: The problem.
        name: Name of the set.
        metric: Metric to check.
        scores: As `full_scores` gives them.
        predictions: Columns ``label`` and ``prediction``.
    """
    sentences = []
    answers = predictions["prediction"]
    if answers.nunique() == 1 < predictions["label"].nunique():
        answer = answers.iloc[0]
        shown = (" and ".join(map(repr, answer)) or "no label") if isinstance(answer, tuple) else repr(answer)
        sentences.append(f"{name}: the model answers {shown} for all {len(answers)} rows")
    probed, first = (scores.get("probe") or {}).get(metric), metric
    trivials = scores.get("baseline") or {}
    if trivials.get(metric) is None:  # for one answer the correlation is undefined, so an error is compared
        metric = next((name for name, trivial in trivials.items() if trivial is not None), metric)
    value, trivial = scores[metric], trivials.get(metric)
    chosen = problem.metric(metric)
    if (
        value is not None
        and trivial not in (None, chosen.perfect)
        and chosen.goodness(value) <= chosen.goodness(trivial)
    ):
        sentences.append(
            f"{name}: {metric} {value:.4f} is not better than the {trivial:.4f} of one answer for all rows"
        )
    value, chosen = scores[first], problem.metric(first)
    if value is not None and probed not in (None, chosen.perfect) and chosen.goodness(value) <= chosen.goodness(probed):
        sentences.append(
            f"{name}: {first} {value:.4f} is not better than the {probed:.4f} of a linear probe, which leaves the "
            "encoder as it is: try more steps, another learning rate, or a head that begins as the probe"
        )
    return sentences


def best_threshold(
    problem: Problem, gold: np.ndarray, scores: np.ndarray, metric: Metric, subgroups: np.ndarray | None = None
) -> float:
    """Threshold with the best score, among midpoints of neighbouring probabilities; of equals, the one nearest to 0.5.

    Args:
        problem: Problem with two classes or several labels a row.
        gold: Labels (rows,).
        scores: Probabilities (rows, classes).
        metric: Metric of labels.
        subgroups: Name of the subgroup of each row (rows,), to take the score of the worst one.
    """
    chances = np.unique(scores if problem.several else scores[:, 1])
    between = (chances[1:] + chances[:-1]) / 2
    if len(between) > TRIED:
        between = np.quantile(between, np.linspace(0, 1, TRIED))

    def goodness(threshold: float) -> tuple[float, float]:
        decided = problem.at(threshold).decide(scores)
        return metric.goodness(worst_value(metric, gold, decided, problem.names, subgroups)), -abs(threshold - 0.5)

    return max([0.5, *map(float, between)], key=goodness)
