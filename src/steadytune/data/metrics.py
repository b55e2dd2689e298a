"""Metrics of each kind of task."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .tables import Target


def _accuracy(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    return float(np.mean(gold == predicted))


def _f1(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    """F1 of the second class; only for two classes."""
    from sklearn.metrics import f1_score

    return float(f1_score(gold, predicted, labels=[names[1]], average="macro", zero_division=0.0))


def _f1_macro(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    from sklearn.metrics import f1_score

    return float(f1_score(gold, predicted, labels=list(names), average="macro", zero_division=0.0))


def _matthews(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str]) -> float:
    from sklearn.metrics import matthews_corrcoef

    if len({*gold, *predicted}) < 2:  # defined as 0; scikit-learn also warns
        return 0.0
    return float(matthews_corrcoef(gold, predicted))


def _correlation(gold: np.ndarray, predicted: np.ndarray, rank: bool) -> float | None:
    """None where it is undefined: fewer than two rows, or one side constant."""
    from scipy.stats import pearsonr, spearmanr

    if len(gold) < 2 or np.ptp(gold) == 0 or np.ptp(predicted) == 0:
        return None
    return float((spearmanr if rank else pearsonr)(gold, predicted).statistic)


def _f1_sets(gold: np.ndarray, predicted: np.ndarray, names: Sequence[str], micro: bool) -> float:
    """F1 of multi-label rows, over all decisions (micro) or the mean over classes; a class nobody has counts 0."""
    has, said = _members(gold, names), _members(predicted, names)
    counts = np.stack([(has & said).sum(axis=0), has.sum(axis=0) + said.sum(axis=0)])
    hits, total = counts.sum(axis=1, keepdims=True) if micro else counts
    return float(np.mean(2 * hits / np.maximum(total, 1)))


def _members(rows: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """Truth values (rows, classes)."""
    return np.array([[name in row for name in names] for row in rows], dtype=bool)


METRICS: dict[str, dict[str, Callable[[Any, Any, Sequence[str]], float | None]]] = {
    "classification": {"accuracy": _accuracy, "f1": _f1, "f1_macro": _f1_macro, "matthews": _matthews},
    "multilabel": {
        "f1_micro": lambda gold, predicted, names: _f1_sets(gold, predicted, names, micro=True),
        "f1_macro": lambda gold, predicted, names: _f1_sets(gold, predicted, names, micro=False),
        "accuracy": lambda gold, predicted, names: float(
            np.mean((_members(gold, names) == _members(predicted, names)).all(axis=1))
        ),
    },
    "regression": {
        "pearson": lambda gold, predicted, names: _correlation(gold, predicted, rank=False),
        "spearman": lambda gold, predicted, names: _correlation(gold, predicted, rank=True),
        "rmse": lambda gold, predicted, names: float(np.sqrt(np.mean((gold - predicted) ** 2))),
    },
}

SMALLER_IS_BETTER = {"rmse"}


def score(target: Target, gold: np.ndarray, predicted: np.ndarray, names: Sequence[str] = ()) -> dict[str, Any]:
    """Every metric of the kind (`f1` for two classes only); None where it is undefined on these rows.

    Args:
        target: what was trained.
        gold: class names, tuples of them (an object array; multi-label) or numbers, one a row.
        predicted: the same for the predictions.
        names: the class names after merging, where they are not the target's.
    """
    names = names or target.names
    metrics = {name: metric for name, metric in METRICS[target.kind].items() if name != "f1" or len(names) == 2}
    return {name: metric(gold, predicted, names) for name, metric in metrics.items()}
