r"""Linear probes: the best head on frozen features, and an unbiased estimate of its score.

Features are centred and divided by one number, the spread over all entries. Each feature's own spread would enlarge
features that hardly vary; three of MiniLM's have a spread near zero.

    Z = (Phi - m) / s

    classes         min_{W,b}  C * sum_i -log softmax(W z_i + b)[y_i]  +  |W|^2 / 2
    several labels  the same with one sigmoid per class
    numbers         min_{w,b}  sum_i (w z_i + b - y_i)^2  +  lambda |w|^2

C is chosen by the cross-validated log-loss, lambda by the exact leave-one-out error: with centred Z = U S V',

    h_ii = 1/n + sum_j U_ij^2 S_j^2 / (S_j^2 + lambda)        e_i = (y_i - yhat_i) / (1 - h_ii)

and, where rows g must be left out together, e_g = (I - H_gg)^-1 (y_g - yhat_g).

The head reads Phi itself: W/s takes the place of W, and b - W m / s that of b. Ananya Kumar et al. (ICLR 2022, arXiv
2202.10054) begin fine-tuning with such a head. Departures from their code: C is chosen by log-loss instead of accuracy,
since a head's size matters to the training that follows; a class without rows gets a bias below all others instead of
zeros, which could win; features are centred, which changes nothing but the conditioning.
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

STRENGTHS = np.logspace(-4, 4, 9)  # C of the logistic probes
WORSE = 2  # after this many C in a row without a better log-loss, larger ones, which take longest, are skipped
PENALTIES = np.logspace(-4, 3, 15)  # lambda of ridge, in units of the mean eigenvalue of Z'Z
MISSING = 2.0  # distance of the bias of a class without rows below the lowest other bias

Parts = Sequence[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear head on frozen features.

    Attributes:
        weight: (outputs, width), float64.
        bias: (outputs,), zeros for a head without bias.
        out_of_fold: (rows, outputs) of heads that were not fitted on the row. The strength of the penalty was chosen on
            these, so their score is slightly too good.
        strength: Chosen strength of the penalty: C, the mean C over several labels, or lambda.
    """

    weight: np.ndarray
    bias: np.ndarray
    out_of_fold: np.ndarray
    strength: float

    def outputs(self, features: np.ndarray) -> np.ndarray:
        """Logits, or numbers: (rows, outputs) of features (rows, width)."""
        return features @ self.weight.T + self.bias

    def scaled(self, factor: float) -> Probe:
        """The same head with all outputs times a factor."""
        return Probe(self.weight * factor, self.bias * factor, self.out_of_fold * factor, self.strength)


def logistic(features: np.ndarray, labels: np.ndarray, classes: int, parts: Parts, *, bias: bool = True) -> Probe:
    """Multinomial logistic regression.

    Args:
        features: (rows, width).
        labels: (rows,) class numbers; classes may be missing.
        classes: Number of outputs of the head, two or more.
        parts: Folds, as pairs of positions to fit on and positions to judge on; each row is judged once.
        bias: Whether the head has one. Without it, features are not centred.
    """
    z, m, s, basis = _standardised(features, centred=bias)
    paths = [_path(z[inside], labels[inside], classes, STRENGTHS, bias) for inside, _ in parts]
    tried: list[tuple[float, np.ndarray]] = []  # log-loss and outputs of each C, the smallest first
    for heads in zip(*paths, strict=True):
        held_out = np.zeros((len(labels), classes))
        for (_, outside), (w, b) in zip(parts, heads, strict=True):
            held_out[outside] = z[outside] @ w.T + b
        tried.append((-_log_softmax(held_out)[np.arange(len(labels)), labels].mean(), held_out))
        best = min(range(len(tried)), key=lambda i: tried[i][0])
        if len(tried) - best > WORSE:
            break
    *_, (w, b) = _path(z, labels, classes, STRENGTHS[: best + 1], bias)
    return _undone(w @ basis, b, m, s, tried[best][1], float(STRENGTHS[best]))


def logistic_each(features: np.ndarray, labels: np.ndarray, parts: Parts, *, bias: bool = True) -> Probe:
    """One logistic regression for each class, each with its own penalty.

    A class that all rows or none have gets no weights, and a bias of its (smoothed) rate.

    Args:
        features: (rows, width).
        labels: (rows, classes) of 0 and 1.
        parts: Folds, as of `logistic`.
        bias: Whether the head has one.
    """
    n, width = features.shape
    probes = []
    for column in labels.T.astype(int):
        if 0 < column.sum() < n:
            two = logistic(features, column, 2, parts, bias=bias)
            difference = two.out_of_fold[:, 1] - two.out_of_fold[:, 0]
            w, b = two.weight[1] - two.weight[0], two.bias[1] - two.bias[0]
            probes.append((w, b, difference, two.strength))
        else:
            rate = np.clip(column.mean(), 1 / (n + 2), 1 - 1 / (n + 2))
            b = np.log(rate / (1 - rate)) if bias else 0.0
            probes.append((np.zeros(width), b, np.full(n, b), STRENGTHS[0]))
    weight, biases, outside, strengths = zip(*probes, strict=True)
    return Probe(np.stack(weight), np.array(biases), np.stack(outside, axis=1), float(np.mean(strengths)))


def ridge(
    features: np.ndarray, targets: np.ndarray, *, bias: bool = True, units: Sequence[Hashable] | None = None
) -> Probe:
    """Ridge regression; ``out_of_fold`` are exact predictions without the row, and without all rows of its unit.

    Args:
        features: (rows, width).
        targets: (rows,) or (rows, outputs).
        bias: Whether the head has one.
        units: Unit of each row, two or more different ones: rows of one unit, such as copies of a text, are left out
            together. None takes each row for itself.
    """
    y = targets.reshape(len(targets), -1).astype(float)
    z, m, s, basis = _standardised(features, centred=bias)
    mean = y.mean(axis=0) if bias else np.zeros(y.shape[1])
    u, d, vt = np.linalg.svd(z, full_matrices=False)
    scores = u.T @ (y - mean)
    together = _several(units)
    best: tuple[float, float, np.ndarray] | None = None
    for penalty in PENALTIES * max(float(np.square(d).mean()), np.finfo(float).tiny):
        shrunk = np.square(d) / (np.square(d) + penalty)
        constant = 1 / len(y) if bias else 0.0
        residuals = y - mean - u @ (shrunk[:, None] * scores)
        errors = residuals / np.maximum(1 - np.square(u) @ shrunk - constant, 1e-12)[:, None]
        for rows in together:
            leverage = (u[rows] * shrunk) @ u[rows].T + constant
            errors[rows] = np.linalg.lstsq(np.eye(len(rows)) - leverage, residuals[rows], rcond=None)[0]
        loss = float(np.square(errors).mean())
        if best is None or loss < best[0]:
            best = loss, penalty, y - errors
    assert best is not None
    _, penalty, held_out = best
    w = ((d / (np.square(d) + penalty))[:, None] * scores).T @ vt
    return _undone(w @ basis, mean, m, s, held_out, float(penalty))


def _several(units: Sequence[Hashable] | None) -> list[np.ndarray]:
    """Rows of each unit that has more than one, and not all."""
    members: dict[Hashable, list[int]] = {}
    for row, unit in enumerate(units if units is not None else ()):
        members.setdefault(unit, []).append(row)
    return [np.array(rows) for rows in members.values() if len(rows) > 1 and len(members) > 1]


def ridge_classes(
    features: np.ndarray,
    labels: np.ndarray,
    classes: int,
    *,
    bias: bool = True,
    units: Sequence[Hashable] | None = None,
) -> Probe:
    """Ridge regression on indicators of the classes, scaled so that its leave-one-out log-loss is lowest.

    Two orders of magnitude faster than `logistic` where there are many features and classes. Arguments are those of
    `ridge`, with class numbers (rows,) for targets.
    """
    from scipy.optimize import minimize_scalar

    probe = ridge(features, np.eye(classes)[labels], bias=bias, units=units)
    rows = np.arange(len(labels))
    chosen = minimize_scalar(
        lambda power: -_log_softmax(np.exp(power) * probe.out_of_fold)[rows, labels].mean(),
        bounds=(np.log(0.1), np.log(100)),
        method="bounded",
    )
    return probe.scaled(float(np.exp(chosen.x)))


def _standardised(features: np.ndarray, *, centred: bool) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
    """Standardised features in a basis of at most as many directions as there are rows, mean, spread, that basis.

    Penalised solutions lie in the span of the rows, so the change of basis is exact. It saves time.
    """
    phi = np.asarray(features, dtype=float)
    m = phi.mean(axis=0) if centred else np.zeros(phi.shape[1])
    s = float((phi - m).std()) or 1.0
    z = (phi - m) / s
    if len(z) >= z.shape[1]:
        return z, m, s, np.eye(z.shape[1])
    u, d, vt = np.linalg.svd(z, full_matrices=False)
    return u * d, m, s, vt


def _path(
    z: np.ndarray, labels: np.ndarray, classes: int, strengths: np.ndarray, bias: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Weights (classes, width) and biases for each C, from the smallest on, each starting from the one before."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    present = np.unique(labels)
    if len(present) == 1:
        w, b = np.zeros((classes, z.shape[1])), np.full(classes, -MISSING)
        b[present[0]] = 0.0
        yield from [(w, b * bias)] * len(strengths)
        return
    model = LogisticRegression(max_iter=5000, tol=1e-8, warm_start=True, fit_intercept=bias)
    for strength in strengths:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # the largest C of separable rows
            model.set_params(C=strength).fit(z, labels)
        w, b = _all_classes(model.coef_, model.intercept_, present, classes)
        yield w, b * bias


def _all_classes(
    coefficients: np.ndarray, intercepts: np.ndarray, present: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's solution as one output per class: two classes share its one row with opposite signs."""
    if len(present) == 2:
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    w, b = np.zeros((classes, coefficients.shape[1])), np.full(classes, intercepts.min() - MISSING)
    w[present], b[present] = coefficients, intercepts
    return w, b


def _undone(w: np.ndarray, b: np.ndarray, m: np.ndarray, s: float, out_of_fold: np.ndarray, strength: float) -> Probe:
    """The head for features that are not standardised."""
    weight = w / s
    return Probe(weight, b - weight @ m, out_of_fold, strength)


def _log_softmax(outputs: np.ndarray) -> np.ndarray:
    from scipy.special import log_softmax

    return log_softmax(outputs, axis=1)
