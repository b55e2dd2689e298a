"""Several labels a row, nested options and weights of rows in the scikit-learn estimators."""

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone

from fit_helpers import save_tiny_bert
from steadytune import SteadyClassifier, SteadyRegressor
from steadytune.errors import UsageError

X = [f"a good film number {i}" if i % 2 else f"a bad play number {i}" for i in range(16)]
LISTS = [["food"], ["food", "price"], [], ["price"]] * 4
MATRIX = np.array([[1, 0], [1, 1], [0, 0], [0, 1]] * 4)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(save_tiny_bert(tmp_path_factory.mktemp("bert")))


def classifier(bert, **options):
    return SteadyClassifier(bert, steps=2, batch_size=4, max_length=8, **options)


@pytest.mark.parametrize("y", [MATRIX, MATRIX.tolist(), pd.DataFrame(MATRIX, columns=["food", "price"])],
                         ids=["array", "lists", "frame"])  # fmt: skip
def test_an_indicator_matrix_comes_out_as_one(bert, y):
    model = classifier(bert).fit(X, y)
    found = model.predict(X)
    assert found.shape == (16, 2)
    assert found.tolist() == (model.predict_proba(X) > 0.5).astype(int).tolist()
    assert list(model.classes_) == (["food", "price"] if isinstance(y, pd.DataFrame) else [0, 1])
    assert model.score(X, y) == (found == MATRIX).all(axis=1).mean()


def test_lists_of_labels_come_out_as_lists(bert):
    model = classifier(bert).fit(X, LISTS)
    found, probabilities = model.predict(X), model.predict_proba(X)
    assert list(model.classes_) == ["food", "price"]
    assert found.tolist() == [model.classes_[row > 0.5].tolist() for row in probabilities]
    assert model.score(X, LISTS) == np.mean([a == b for a, b in zip(found, LISTS, strict=True)])


def test_the_forms_train_the_same_model(bert):
    given = classifier(bert).fit(X, LISTS).predict_proba(X)
    assert np.array_equal(given, classifier(bert).fit(X, MATRIX).predict_proba(X))


@pytest.mark.parametrize(("y", "words"), [
    (np.array([[1, 0], [0, 1]] * 8), "one-hot rows"),
    (np.array([[1, 0, 0], [1, 1, 0]] * 8), "no row of class 2"),
    ([["a"], ["a", None]] * 8, "empty entry"),
    ([["a", "b"], "a"] * 8, "lists"),
    (np.array([[1, 2], [3, 4]] * 8), "shape"),
])  # fmt: skip
def test_other_shapes_are_refused_before_training(bert, y, words):
    with pytest.raises(UsageError, match=words):
        classifier(bert).fit(X, y)


def test_weights_of_rows_are_refused(bert):
    for model, y in ((classifier(bert), ["a", "b"] * 8), (SteadyRegressor(bert, steps=2), np.arange(16.0))):
        with pytest.raises(UsageError, match="sample_weight is not supported"):
            model.fit(X, y, sample_weight=np.ones(16))


def test_grids_may_name_an_option(bert):
    model = classifier(bert, options={"warmup": 0.2})
    assert model.get_params()["options__warmup"] == 0.2
    copy = clone(model).set_params(options__warmup=0.5, options__class_weights="balanced", lr=1e-4)
    assert copy.options == {"warmup": 0.5, "class_weights": "balanced"}
    assert (model.options, model.lr, copy.lr) == ({"warmup": 0.2}, 2e-5, 1e-4)
    assert clone(copy).options == copy.options
