"""Facts about linear probes: hand solutions, scikit-learn's own, and brute force."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn.linear_model import LogisticRegression, Ridge

from steadytune.heads.probe import MISSING, STRENGTHS, Probe, logistic, logistic_each, ridge, ridge_classes
from steadytune.heads.start import Labelled, cross_fitted, even_parts, fit_probe


def rows(n: int = 60, width: int = 8, classes: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    phi = 3 + 0.4 * rng.normal(size=(classes, width))[labels] + rng.normal(size=(n, width))
    return phi, labels


@pytest.mark.parametrize("classes", [2, 3, 5])
@pytest.mark.parametrize("n", [20, 60])  # fewer rows than features: the change of basis is exact
def test_logistic_is_scikit_learns_on_standardised_features(classes, n):
    phi, labels = rows(n, 30, classes)
    probe = logistic(phi, labels, classes, even_parts(labels, 0))
    z = (phi - phi.mean(0)) / (phi - phi.mean(0)).std()
    theirs = LogisticRegression(C=probe.strength, max_iter=5000, tol=1e-10).fit(z, labels)
    assert probe.strength in STRENGTHS
    assert np.abs(log_softmax(probe.outputs(phi), axis=1) - theirs.predict_log_proba(z)).max() < 2e-2
    assert (probe.outputs(phi).argmax(1) == theirs.predict(z)).all()


def test_two_classes_share_one_row_with_opposite_signs():
    phi, labels = rows(classes=2)
    probe = logistic(phi, labels, 2, even_parts(labels, 0))
    assert np.array_equal(probe.weight[0], -probe.weight[1])
    outputs = probe.outputs(phi)
    assert np.abs(outputs.sum(axis=1)).max() < 1e-9  # the mean taken back as well


def test_the_penalty_has_the_lowest_log_loss_on_rows_not_seen():
    phi, labels = rows(40, 30)
    parts = even_parts(labels, 0)
    probe = logistic(phi, labels, 3, parts)
    z = (phi - phi.mean(0)) / (phi - phi.mean(0)).std()
    losses = []
    for strength in STRENGTHS:
        held = np.zeros((40, 3))
        for inside, outside in parts:
            model = LogisticRegression(C=strength, max_iter=5000, tol=1e-8).fit(z[inside], labels[inside])
            held[outside] = model.predict_log_proba(z[outside])
        losses.append(-held[np.arange(40), labels].mean())
    assert probe.strength == STRENGTHS[int(np.argmin(losses))]
    loss = -log_softmax(probe.out_of_fold, axis=1)[np.arange(40), labels].mean()
    assert loss == pytest.approx(min(losses), abs=1e-3)


def test_out_of_fold_outputs_do_not_know_their_own_labels():
    """Labels at random: out of fold nothing can be predicted, on the rows themselves much can."""
    rng = np.random.default_rng(0)
    phi, labels = rng.normal(size=(200, 150)), rng.integers(0, 2, 200)
    probe = logistic(phi, labels, 2, even_parts(labels, 0))
    held = (probe.out_of_fold.argmax(1) == labels).mean()
    assert 0.35 < held < 0.65


def test_cross_fitted_outputs_of_a_fold_do_not_depend_on_its_labels():
    """Those of `out_of_fold` do: its penalty is chosen on all labels."""
    phi, labels = rows(60, 20, classes=2)
    parts = even_parts(labels, 0)

    def outputs(labels: np.ndarray) -> np.ndarray:
        def fit(inside: np.ndarray) -> Probe:
            inner = even_parts(labels[inside], 0)
            return fit_probe(phi[inside], labels[inside], 2, how="logistic", bias=True, parts=inner)

        return cross_fitted(phi, fit, parts)

    poisoned, (_, outside) = labels.copy(), parts[2]
    poisoned[outside] = 1 - poisoned[outside]
    before, after = outputs(labels), outputs(poisoned)
    assert np.array_equal(before[outside], after[outside])
    others = np.setdiff1d(np.arange(60), outside)
    assert (before[others] != after[others]).any()


def test_a_class_without_rows_never_wins():
    phi, labels = rows(classes=3)
    probe = logistic(phi, labels, 5, even_parts(labels, 0))
    outputs = probe.outputs(phi - phi.mean(0) * 0)
    assert set(outputs.argmax(1)) <= {0, 1, 2}
    assert np.array_equal(probe.weight[3:], np.zeros((2, 8)))
    assert probe.bias[4] == probe.bias[3]
    shifted = probe.bias[:3] + probe.weight[:3] @ phi.mean(0)  # biases on centred features
    assert probe.bias[3] == pytest.approx(shifted.min() - MISSING)


def test_one_class_alone():
    phi, _ = rows()
    probe = logistic(phi, np.ones(60, dtype=int), 3, even_parts(np.ones(60, dtype=int), 0))
    assert (probe.outputs(phi).argmax(1) == 1).all()


def test_features_without_spread_do_no_harm():
    """Dividing by each feature's own spread would give weights of 1e28 here."""
    phi, labels = rows(classes=2)
    dead = np.concatenate([phi, np.full((60, 2), 0.3) + 1e-17 * np.arange(60)[:, None]], axis=1)
    probe = logistic(dead, labels, 2, even_parts(labels, 0))
    assert np.abs(probe.weight).max() < 10
    assert np.abs(probe.weight[:, 8:]).max() < 1e-12


def test_several_labels_are_one_regression_each():
    phi, labels = rows(classes=3)
    several = np.stack([labels == 0, labels != 2, np.ones(60), np.zeros(60)], axis=1).astype(float)
    parts = even_parts(several, 0)
    probe = logistic_each(phi, several, parts)
    first = logistic(phi, (labels == 0).astype(int), 2, parts)
    assert np.allclose(probe.weight[0], first.weight[1] - first.weight[0])
    assert np.array_equal(probe.weight[2:], np.zeros((2, 8)))
    assert probe.bias[2] == pytest.approx(np.log(61))  # rate clipped to 61/62
    assert probe.bias[3] == pytest.approx(-np.log(61))
    assert probe.out_of_fold.shape == (60, 4)


@pytest.mark.parametrize("n", [20, 6])
@pytest.mark.parametrize("bias", [True, False])
def test_leave_one_out_of_ridge_equals_n_refits(n, bias):
    rng = np.random.default_rng(1)
    phi = 2 + rng.normal(size=(n, 9))
    y = phi @ rng.normal(size=9) + rng.normal(size=n)
    probe = ridge(phi, y, bias=bias)
    m = phi.mean(0) if bias else 0.0
    s = (phi - m).std()
    for i in range(n):
        others = np.arange(n) != i
        model = Ridge(alpha=probe.strength, fit_intercept=bias, solver="svd").fit(phi[others] / s, y[others])
        assert probe.out_of_fold[i, 0] == pytest.approx(model.predict(phi[[i]] / s)[0], abs=1e-9)
    whole = Ridge(alpha=probe.strength, fit_intercept=bias, solver="svd").fit(phi / s, y)
    assert np.allclose(probe.outputs(phi)[:, 0], whole.predict(phi / s), atol=1e-9)


@pytest.mark.parametrize("bias", [True, False])
def test_ridge_leaves_out_the_rows_of_a_unit_together(bias):
    rng = np.random.default_rng(1)
    phi = 2 + rng.normal(size=(20, 9))
    y = phi @ rng.normal(size=9) + rng.normal(size=20)
    units = np.array([0, 1, 0, 2, 2, 2, *range(3, 17)])
    probe = ridge(phi, y, bias=bias, units=units.tolist())
    s = (phi - (phi.mean(0) if bias else 0.0)).std()
    for unit in np.unique(units):
        inside, outside = units != unit, units == unit
        model = Ridge(alpha=probe.strength, fit_intercept=bias, solver="svd").fit(phi[inside] / s, y[inside])
        assert np.allclose(probe.out_of_fold[outside, 0], model.predict(phi[outside] / s), atol=1e-9)


@pytest.mark.parametrize("how", ["logistic", "ridge"])
def test_copies_of_a_row_do_not_judge_each_other(how):
    """Naive: pure noise with every row twice has a correlation, or an accuracy, of 1."""
    rng = np.random.default_rng(0)
    phi, noise = rng.normal(size=(40, 60)), rng.normal(size=40)
    twice, keys = np.concatenate([phi, phi]), [bytes([i % 40]) for i in range(80)]
    numbers = np.concatenate([noise, noise])
    found = Labelled(twice, numbers, keys).probe(1, how=how, bias=True)
    assert np.corrcoef(found.out_of_fold[:, 0], numbers)[0, 1] < 0.5
    classes = (numbers > 0).astype(int)
    found = Labelled(twice, classes, keys).probe(2, how=how, bias=True)
    assert (found.out_of_fold.argmax(1) == classes).mean() < 0.8


def test_copies_with_other_labels_give_the_same_probe_in_any_order():
    """Naive: rows of equal tokens keep the loader's order, and the chosen penalty depends on it."""
    rng = np.random.default_rng(0)
    texts = np.repeat(np.arange(20), 3)
    phi = rng.normal(size=(20, 8))[texts]
    labels = (phi[:, 0] + 1.5 * rng.normal(size=60) > 0).astype(int)
    found = []
    for seed in range(4):
        order = np.random.default_rng(seed).permutation(60)
        some = Labelled(phi[order], labels[order], [bytes([i]) for i in texts[order]])
        found.append(some.probe(2, how="logistic", bias=True))
    assert {one.strength for one in found} == {found[0].strength}
    assert all(np.allclose(one.weight, found[0].weight, atol=1e-12) for one in found)


def test_ridge_on_classes_is_scaled_to_the_lowest_log_loss():
    phi, labels = rows(90, 8, 3)
    probe = ridge_classes(phi, labels, 3)

    def loss(factor: float) -> float:
        return -log_softmax(factor * probe.out_of_fold, axis=1)[np.arange(90), labels].mean()

    assert loss(1.0) < min(loss(0.9), loss(1.1))
    assert (probe.outputs(phi).argmax(1) == labels).mean() > 0.5


def test_a_head_without_bias_gets_none():
    phi, labels = rows(classes=3)
    probe = logistic(phi, labels, 3, even_parts(labels, 0), bias=False)
    assert np.array_equal(probe.bias, np.zeros(3))
    theirs = LogisticRegression(C=probe.strength, max_iter=5000, tol=1e-10, fit_intercept=False).fit(
        phi / phi.std(), labels
    )
    assert np.abs(log_softmax(probe.outputs(phi), axis=1) - theirs.predict_log_proba(phi / phi.std())).max() < 2e-3


@pytest.mark.parametrize("n", [3, 17, 60])
def test_folds_hold_each_row_once_and_classes_evenly(n):
    labels = np.arange(n) % 3
    parts = even_parts(labels, 0)
    assert sorted(np.concatenate([outside for _, outside in parts])) == list(range(n))
    sizes = [np.bincount(labels[outside], minlength=3) for _, outside in parts]
    assert (np.ptp(sizes, axis=0) <= 1).all()
