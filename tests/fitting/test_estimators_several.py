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


JOINED = ["food", "food|price", None, " price|price"] * 4
WORDS = pd.DataFrame(np.where(MATRIX, "yes", "no"), columns=["food", "price"])
SEPARATOR = {"options": {"label_separator": "|"}}


def test_the_forms_train_the_same_model(bert):
    given = classifier(bert).fit(X, LISTS).predict_proba(X)
    assert np.array_equal(given, classifier(bert).fit(X, MATRIX).predict_proba(X))
    assert np.array_equal(given, classifier(bert).fit(X, WORDS).predict_proba(X))
    assert np.array_equal(given, classifier(bert, **SEPARATOR).fit(X, JOINED).predict_proba(X))


@pytest.mark.parametrize("wrap", [list, np.array, pd.Series, lambda y: pd.DataFrame({"y": y})],
                         ids=["list", "array", "Series", "frame"])  # fmt: skip
def test_strings_with_a_separator_come_out_as_such(bert, wrap):
    model = classifier(bert, **SEPARATOR).fit(X, wrap(JOINED))
    found = model.predict(X)
    assert list(model.classes_) == ["food", "price"]
    assert found.tolist() == ["|".join(model.classes_[row > 0.5]) for row in model.predict_proba(X)]
    assert model.score(X, wrap(JOINED)) == np.mean([
        a == b for a, b in zip(found, ["food", "food|price", "", "price"] * 4, strict=True)
    ])  # fmt: skip
    assert clone(model).fit(X, JOINED).predict(X).tolist() == found.tolist()


def test_a_frame_of_words_comes_out_as_a_matrix(bert):
    model = classifier(bert).fit(X, WORDS)
    assert list(model.classes_) == ["food", "price"]
    assert model.predict(X).tolist() == classifier(bert).fit(X, MATRIX).predict(X).tolist()
    assert model.score(X, WORDS) == model.score(X, MATRIX) == model.score(X, WORDS[["price", "food"]])


def test_lists_of_numbers_are_labels_too(bert):
    lists = [[10], [10, 9], [], [9]] * 4
    model = classifier(bert).fit(X, lists)
    assert list(model.classes_) == [9, 10]
    assert model.model_.problem.names == ("9", "10")
    assert model.predict(X).tolist() == [model.classes_[row > 0.5].tolist() for row in model.predict_proba(X)]


def test_rows_that_lack_a_class_are_scored(bert):
    """Naive: what is checked in training rows, a row for each class and no one-hot rows, is refused in a fold."""
    rows = slice(0, 1)
    for y in (MATRIX, WORDS):
        model = classifier(bert).fit(X, y)
        assert model.score(X[rows], y[rows]) == float(model.predict(X[rows]).tolist() == [[1, 0]])
    model = classifier(bert).fit(X, LISTS)
    assert model.score(X[rows], LISTS[rows]) == float(model.predict(X[rows]).tolist() == [["food"]])


def test_labels_of_another_form_are_not_scored(bert):
    by_lists, by_matrix = classifier(bert).fit(X, LISTS), classifier(bert).fit(X, MATRIX)
    for model, y, words in (
        (by_lists, ["food"] * 16, "must hold lists"),
        (by_matrix, LISTS, "matrix of 0 and 1 with 2 columns"),
        (by_matrix, np.ones((16, 3)), "matrix of 0 and 1 with 2 columns"),
    ):
        with pytest.raises(UsageError, match=words):
            model.score(X, y)


@pytest.mark.parametrize(("y", "words"), [
    (np.array([[1, 0], [0, 1]] * 8), "one-hot rows"),
    (np.array([[1, 0, 0], [1, 1, 0]] * 8), "no row of class 2"),
    ([["a"], ["a", None]] * 8, "empty entry"),
    ([["a", "b"], "a"] * 8, "lists"),
    (np.array([[1, 2], [3, 4]] * 8), "shape"),
    (pd.DataFrame({"food": [0, 1] * 8, "price": [0, 3] * 8}), r"y: label column 'price' is neither 0 nor 1 \('3'\)"),
    (pd.DataFrame({"food": [0, 1] * 8, "price": [0, None] * 8}), "y: label column 'price' is empty in 8 of 16"),
    ([["a"], ["b", ["c"]]] * 8, "a list that holds lists"),
])  # fmt: skip
def test_other_shapes_are_refused_before_training(bert, y, words):
    with pytest.raises(UsageError, match=words):
        classifier(bert).fit(X, y)


def test_a_separator_is_for_strings(bert):
    one_each = ["food", "price"] * 8
    for y, words in ((LISTS, "give one label per row"), (MATRIX, "shape"), (one_each, "is in none of 16 rows")):
        with pytest.raises(UsageError, match=words):
            classifier(bert, **SEPARATOR).fit(X, y)
    with pytest.raises(UsageError, match="kind regression takes no label separator"):
        SteadyRegressor(bert, steps=2, **SEPARATOR).fit(X, np.arange(16.0))


@pytest.mark.parametrize("name", ["text", "label", "kind", "seed", "output"])
def test_options_that_the_estimator_sets_are_refused(bert, name):
    """Naive: a TypeError about several values of one argument."""
    with pytest.raises(UsageError, match=f"options hold '{name}'"):
        classifier(bert, options={name: 1}).fit(X, LISTS)


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
