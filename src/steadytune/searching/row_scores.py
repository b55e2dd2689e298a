"""The share of each row in a score, so that every metric is a mean over rows. No torch here."""

from __future__ import annotations

import numpy as np

from ..data.metrics import Metric, log_loss
from ..data.problem import Problem
from .estimates import Array


def row_scores(problem: Problem, metric: Metric, gold: np.ndarray, scores: np.ndarray) -> Array:
    """Values of rows whose mean is the goodness of the predictions (larger is better).

    They are jackknife pseudo-values, n S - (n - 1) S without row i, moved so that their mean is S. Of a metric that is
    a mean over rows, such as accuracy, they are the terms of that mean.

    Args:
        problem: What is predicted.
        metric: Metric of the search.
        gold: Gold labels, shape (rows,).
        scores: Probabilities (rows, classes), or numbers (rows, 1).
    """
    predicted = scores if metric.needs_probabilities else problem.decide(scores)
    if metric.name == "accuracy":
        return np.array([a == b for a, b in zip(gold, predicted, strict=True)], dtype=float)

    def goodness(kept: np.ndarray | slice) -> float:
        value = metric.compute(gold[kept], predicted[kept], problem.names)
        return metric.goodness(metric.worst if value is None else value)

    n, whole, everything = len(gold), goodness(slice(None)), np.arange(len(gold))
    without = np.array([goodness(np.delete(everything, i)) for i in range(n)])
    return whole + (n - 1) * (without.mean() - without)


def row_losses(problem: Problem, gold: np.ndarray, scores: np.ndarray) -> Array:
    """Log-loss of each row, or the squared error of numbers; shape (rows,)."""
    if problem.names:
        return np.array([log_loss(gold[i : i + 1], scores[i : i + 1], problem.names) for i in range(len(gold))])
    return (gold.astype(float) - scores[:, 0]) ** 2
