r"""Influence of labelled rows on the loss of other rows, in closed form from frozen features.

A step of gradient descent on row u lowers the mean loss L of other rows by the product of the two gradients. For a
linear head on features z it needs no backward pass:

    <g_u, g_L> = mean over other rows v of (r_u . r_v) (z_u . z_v)        r = derivative of a row's loss in its outputs

A row with a negative product does harm: a row with a wrong label, or one that contradicts the others. This is one step
of TracIn (Pruthi et al., NeurIPS 2020, arXiv 2002.08484) on the last layer. Ren, Yeh and Schwing (NeurIPS 2020, arXiv
2007.01293) weigh unlabelled rows by the same product.

Departure: theirs has the inverse Hessian of the loss between the two gradients, here it is the identity. On SST-2 with
20 % of the labels flipped, the product finds the flipped rows better without it (``benchmarks/wrong_labels.py``). The
other rows are those of a fold that the probe was not fitted on, instead of a validation set. Their weights take one
step in every epoch of a training; here they take one step in all, from 1. Their code could not be read.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .probe import Parts, Probe


def slopes(loss: str, outputs: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Derivatives (rows, outputs) of the loss of each row in its outputs.

    Args:
        loss: Name of the function in torch.nn.functional: ``cross_entropy``, ``binary_cross_entropy_with_logits`` (its
            sum over outputs) or ``mse_loss`` (half of the square).
        outputs: (rows, outputs).
        labels: Indicators of classes, or numbers (rows, outputs).
    """
    from scipy.special import expit, softmax

    activate = {
        "cross_entropy": lambda z: softmax(z, axis=1),
        "binary_cross_entropy_with_logits": expit,
        "mse_loss": lambda z: z,
    }
    return activate[loss](outputs) - labels


def influence(z: np.ndarray, slope: np.ndarray, other: np.ndarray, other_slope: np.ndarray) -> np.ndarray:
    """Products of the gradients of rows with the gradient of the mean loss of other rows: (rows,).

    Args:
        z: Features (rows, width).
        slope: Derivatives of the losses in the outputs (rows, outputs).
        other: Features (other rows, width).
        other_slope: Derivatives (other rows, outputs).
    """
    gradient = other_slope.T @ other / len(other)
    return np.einsum("rk,kd,rd->r", slope, gradient, z)


def cross_influence(
    phi: np.ndarray, labels: np.ndarray, fit: Callable[[np.ndarray], Probe], parts: Parts, loss: str
) -> tuple[np.ndarray, np.ndarray]:
    """Outputs of probes for rows that they did not see, and the influence of each row on these rows.

    Args:
        phi: Features (rows, width).
        labels: Indicators of classes, or numbers (rows, outputs).
        fit: Makes a probe of the rows at these positions.
        parts: Folds, as pairs of positions to fit on and positions to judge; each row is judged once.
        loss: See `slopes`.

    Returns:
        Outputs (rows, outputs), and the mean influence of each row over the probes that were fitted on it (rows,).
    """
    outputs, helped, times = np.zeros(labels.shape), np.zeros(len(phi)), np.zeros(len(phi))
    for inside, outside in parts:
        probe = fit(inside)
        given = probe.outputs(phi)
        outputs[outside] = given[outside]
        slope, z = slopes(loss, given, labels), _standardised(phi, phi[inside])
        helped[inside] += influence(z[inside], slope[inside], z[outside], slope[outside])
        times[inside] += 1
    return outputs, helped / np.maximum(times, 1)


def weights_of_texts(
    phi: np.ndarray,
    labels: np.ndarray,
    texts: np.ndarray,
    soft: np.ndarray,
    fit: Callable[[np.ndarray], Probe],
    parts: Parts,
    loss: str,
) -> np.ndarray:
    """Weights in [0, 1] of texts whose labels are guesses: (texts,).

    A text that helps the labelled rows of the folds, or does nothing to them, weighs 1. One that does harm weighs less,
    and nothing from a harm of one standard deviation of the influence on.

    Args:
        phi: Features of labelled rows (rows, width).
        labels: Indicators of their classes (rows, outputs).
        texts: Features of the texts (texts, width).
        soft: Probabilities of their classes (texts, outputs).
        fit: Makes a probe of the labelled rows at these positions.
        parts: Folds of the labelled rows, as of `cross_influence`.
        loss: See `slopes`.
    """
    helped = np.zeros(len(texts))
    for inside, outside in parts:
        probe = fit(inside)
        own = slopes(loss, probe.outputs(texts), soft)
        other = slopes(loss, probe.outputs(phi[outside]), labels[outside])
        z, judged = (_standardised(part, phi[inside]) for part in (texts, phi[outside]))
        helped += influence(z, own, judged, other)
    return np.clip(1 + helped / (float(helped.std()) or 1.0), 0.0, 1.0)


def _standardised(phi: np.ndarray, fitted: np.ndarray) -> np.ndarray:
    """Features centred and scaled by those that a probe was fitted on, and ones for the bias: (rows, width + 1)."""
    mean = fitted.mean(axis=0)
    centred = (phi - mean) / (float((fitted - mean).std()) or 1.0)
    return np.concatenate([centred, np.ones((len(phi), 1))], axis=1)
