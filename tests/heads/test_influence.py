"""Influence by gradients of the last layer: autograd's products, and copies of rows with right and wrong labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn import functional

from steadytune.heads.influence import cross_influence, influence, slopes, weights_of_texts
from steadytune.heads.start import even_parts, fit_probe

LOSSES = {
    "cross_entropy": lambda z, y: functional.cross_entropy(z, y),
    "binary_cross_entropy_with_logits": lambda z, y: functional.binary_cross_entropy_with_logits(z, y) * z.shape[1],
    "mse_loss": lambda z, y: functional.mse_loss(z, y) * z.shape[1] / 2,
}


def drawn(loss: str, rows: int = 7, width: int = 5, outputs: int = 3, seed: int = 0):
    rng = np.random.default_rng(seed)
    phi, weight = rng.normal(size=(rows, width)), rng.normal(size=(outputs, width))
    labels = np.eye(outputs)[rng.integers(0, outputs, rows)]
    if loss == "binary_cross_entropy_with_logits":
        labels = rng.integers(0, 2, (rows, outputs)).astype(float)
    if loss == "mse_loss":
        labels = rng.normal(size=(rows, outputs))
    return phi, weight, labels


def gradient(loss: str, phi: np.ndarray, weight: np.ndarray, labels: np.ndarray) -> torch.Tensor:
    w = torch.tensor(weight, requires_grad=True)
    LOSSES[loss](torch.tensor(phi) @ w.T, torch.tensor(labels)).backward()
    return w.grad


@pytest.mark.parametrize("loss", LOSSES)
def test_it_is_autograds_product_of_the_two_gradients(loss):
    phi, weight, labels = drawn(loss)
    other, _, other_labels = drawn(loss, rows=4, seed=1)
    found = influence(phi, slopes(loss, phi @ weight.T, labels), other, slopes(loss, other @ weight.T, other_labels))
    mean = gradient(loss, other, weight, other_labels)
    wanted = [float((gradient(loss, phi[i : i + 1], weight, labels[i : i + 1]) * mean).sum()) for i in range(7)]
    assert np.abs(found - wanted).max() < 1e-10


def test_a_step_on_a_row_lowers_the_loss_of_others_by_its_influence():
    """First order: the weights move by a small step along the row's gradient."""
    loss, step = "cross_entropy", 1e-5
    phi, weight, labels = drawn(loss)
    other, _, other_labels = drawn(loss, rows=4, seed=1)
    found = influence(phi, slopes(loss, phi @ weight.T, labels), other, slopes(loss, other @ weight.T, other_labels))

    def mean_loss(w: np.ndarray) -> float:
        return float(LOSSES[loss](torch.tensor(other @ w.T), torch.tensor(other_labels)))

    for i in range(7):
        moved = weight - step * gradient(loss, phi[i : i + 1], weight, labels[i : i + 1]).numpy()
        assert (mean_loss(weight) - mean_loss(moved)) / step == pytest.approx(found[i], abs=1e-3)


def test_a_copy_of_a_judged_row_helps_most_and_a_flipped_copy_does_harm():
    """Candidates of one length, so that only their direction and their label count."""
    rng = np.random.default_rng(0)
    phi = rng.normal(size=(20, 6))
    phi /= np.linalg.norm(phi, axis=1, keepdims=True)
    outputs, labels = np.zeros((20, 2)), np.eye(2)[rng.integers(0, 2, 20)]
    judged = phi[:1]
    given = slopes("cross_entropy", outputs, labels)
    found = influence(phi, given, judged, given[:1])
    assert found.argmax() == 0
    flipped = influence(phi[:1], slopes("cross_entropy", outputs[:1], 1 - labels[:1]), judged, given[:1])
    assert float(flipped[0]) == pytest.approx(-found[0])


@pytest.mark.parametrize("noise", [0.2, 0.3])
def test_flipped_rows_do_harm(noise):
    """Two overlapping clouds."""
    rng = np.random.default_rng(0)
    rows = 300
    truth = np.arange(rows) % 2
    phi = rng.normal(size=(rows, 200)) + np.where(truth[:, None] > 0, 0.15, -0.15)
    flipped = np.zeros(rows, dtype=bool)
    flipped[rng.choice(rows, int(noise * rows), replace=False)] = True
    labels = np.where(flipped, 1 - truth, truth)

    def fit(inside):
        parts = even_parts(labels[inside], 0)
        return fit_probe(phi[inside], labels[inside], 2, how="ridge", bias=True, parts=parts)

    outputs, found = cross_influence(phi, np.eye(2)[labels], fit, even_parts(labels, 0), "cross_entropy")
    margin = (outputs[:, 1] - outputs[:, 0]) * np.where(labels > 0, 1, -1)
    assert roc_auc_score(flipped, -found) > 0.8
    assert roc_auc_score(flipped, -margin) > 0.8
    assert found[~flipped].mean() > 0 > found[flipped].mean()


def test_every_row_is_judged_by_a_probe_that_did_not_see_it():
    rng = np.random.default_rng(0)
    phi, labels = rng.normal(size=(30, 4)), rng.integers(0, 2, 30)
    parts = even_parts(labels, 0)
    seen = []

    def fit(inside):
        seen.append(set(inside))
        return fit_probe(phi[inside], labels[inside], 2, how="ridge", bias=True, parts=even_parts(labels[inside], 0))

    outputs, _ = cross_influence(phi, np.eye(2)[labels], fit, parts, "cross_entropy")
    for (inside, outside), known in zip(parts, list(seen), strict=True):
        assert known == set(inside)
        assert np.allclose(outputs[outside], fit(inside).outputs(phi[outside]))


def test_texts_that_contradict_labelled_rows_weigh_less():
    """Copies of labelled rows as texts: with their own label they weigh 1, with the other one less."""
    rng = np.random.default_rng(3)
    numbers = np.arange(60) % 2
    phi = rng.normal(size=(60, 8)) + 2 * numbers[:, None] * np.eye(8)[0]
    gold = np.eye(2)[numbers]
    parts = even_parts(numbers, 0)

    def fit(inside):
        inner = even_parts(numbers[inside], 0)
        return fit_probe(phi[inside], numbers[inside], 2, how="logistic", bias=True, parts=inner)

    def weights(soft):
        return weights_of_texts(phi, gold, phi, soft, fit, parts, "cross_entropy")

    wrong = rng.random(60) < 0.3
    mixed = weights(np.where(wrong[:, None], 1 - gold, gold))
    assert ((mixed >= 0) & (mixed <= 1)).all()
    assert roc_auc_score(wrong, -mixed) > 0.8
    assert mixed[~wrong].mean() > 0.9
    assert mixed[wrong].mean() < 0.5
