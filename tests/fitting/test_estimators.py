"""The estimators and predict read rows and labels as `fit` does: frames by name, one label a row, or one error."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from fit_helpers import save_tiny_bert, toy
from steadytune import SteadyClassifier, SteadyRegressor
from steadytune.errors import UsageError

QUICK = {"steps": 1, "max_length": 16, "batch_size": 40}
TOY = toy(24)
X, Y = TOY["text"].tolist(), TOY["label"].tolist()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def pairs(bert):
    """A classifier of frames with two text columns, and its frame."""
    frame = toy(24, pair=True)[["text", "other"]]
    return SteadyClassifier(bert, **QUICK).fit(frame, Y), frame


@pytest.fixture(scope="module")
def single(bert):
    return SteadyClassifier(bert, **QUICK).fit(X, Y)


def test_frames_are_read_by_the_names_of_their_columns(pairs):
    model, frame = pairs
    gold = model.predict_proba(frame)
    assert np.array_equal(model.predict_proba(frame[["other", "text"]]), gold)
    assert np.array_equal(model.predict_proba(frame.assign(id=range(24))), gold)
    assert not np.array_equal(model.predict_proba(frame.set_axis(["other", "text"], axis=1)), gold)
    assert model.feature_names_in_.tolist() == ["text", "other"]
    with pytest.raises(UsageError, match="no column 'text'"):
        model.predict(frame.set_axis(["a", "b"], axis=1))


def test_a_model_of_a_list_reads_a_frame_by_position(single):
    assert np.array_equal(single.predict_proba(pd.DataFrame({"anything": X})), single.predict_proba(X))


def test_names_of_an_earlier_fit_are_forgotten(bert):
    """Naive: a frame with another column is refused by a model that was last fitted on a list."""
    model = SteadyClassifier(bert, **QUICK).fit(pd.DataFrame({"words": X}), Y).fit(X, Y)
    assert not hasattr(model, "feature_names_in_")
    assert len(model.predict(pd.DataFrame({"anything": X}))) == len(X)


@pytest.mark.parametrize("rows", ["excellent", None, 3, [], [("a", "b")]], ids=repr)
def test_what_is_no_list_of_texts_is_refused(single, rows):
    for predict in (single.predict, single.predict_proba, single.model_.predict):
        with pytest.raises(UsageError):
            predict(rows)


@pytest.mark.parametrize("value", [None, float("nan"), 3, " "], ids=repr)
def test_a_row_without_text_is_one_error_of_each_door(bert, single, value):
    for action in (
        lambda: single.predict(["good film", value]),
        lambda: single.model_.predict(["good film", value]),
        lambda: SteadyClassifier(bert, **QUICK).fit([*X[:-1], value], Y),
    ):
        with pytest.raises(UsageError, match=r"is empty in 1 of|must hold strings, got 3"):
            action()


MISSING = {
    "float": np.array([1.0] * 8 + [np.nan] * 8 + [0.0] * 8),
    "Int64": pd.Series([1] * 8 + [None] * 8 + [0] * 8, dtype="Int64"),
    "list": ["a"] * 8 + [None] * 8 + ["b"] * 8,
    "string": pd.Series(["a"] * 8 + [None] * 8 + ["b"] * 8, dtype="string"),
    "category": pd.Series(["a"] * 8 + [None] * 8 + ["b"] * 8, dtype="category"),
    "boolean": pd.Series([True] * 8 + [None] * 8 + [False] * 8, dtype="boolean"),
    "time": pd.Series(pd.to_datetime(["2020-01-01"] * 8 + [None] * 8 + ["2021-01-01"] * 8)),
}


@pytest.mark.parametrize("y", MISSING.values(), ids=MISSING)
def test_missing_labels_are_counted_before_training(bert, y):
    with pytest.raises(UsageError, match="y is empty in 8 of 24 rows"):
        SteadyClassifier(bert, **QUICK).fit(X, y)


SHAPES = {
    "one-hot": (np.array([[1, 0], [0, 1]] * 12), "argmax"),
    "none": (None, "y is missing"),
    "several types": (np.array([1] * 12 + ["a"] * 12, dtype=object), r"several types \(int, str\)"),
    "too few": (Y[:-1], "y has 23"),
}


@pytest.mark.parametrize(("y", "part"), SHAPES.values(), ids=SHAPES)
def test_labels_of_other_shapes_are_refused_before_training(bert, y, part):
    with pytest.raises(UsageError, match=part):
        SteadyClassifier(bert, **QUICK).fit(X, y)


@pytest.mark.parametrize("wrap", [lambda y: np.array(y).reshape(-1, 1), lambda y: pd.DataFrame({"y": y})])
def test_a_column_of_labels_is_labels(bert, single, wrap):
    model = SteadyClassifier(bert, **QUICK).fit(X, wrap(Y))
    assert model.classes_.tolist() == ["down", "up"]
    assert np.array_equal(model.predict_proba(X), single.predict_proba(X))


def test_regression_takes_a_column_and_refuses_the_rest(bert):
    y = np.linspace(0, 5, 24)
    model = SteadyRegressor(bert, **QUICK).fit(X, y.reshape(-1, 1))
    assert model.predict(X[:1]).shape == (1,)
    for bad, part in ((np.zeros((24, 2)), "shape"), (["3,5"] * 24, "comma"), ([None, *y[1:]], "y is empty in 1 of 24")):
        with pytest.raises(UsageError, match=part):
            SteadyRegressor(bert, **QUICK).fit(X, bad)


def test_a_text_column_may_be_called_label(bert):
    model = SteadyClassifier(bert, **QUICK).fit(pd.DataFrame({"label": X}), Y)
    assert model.classes_.tolist() == ["down", "up"]


def test_texts_without_labels_have_the_form_of_x(bert, pairs):
    options = {"pretrain": "simcse:steps=1"}
    fitted = SteadyClassifier(bert, **QUICK, options=options).fit(X, Y, unlabelled=["a new film", X[0], "a new play"])
    assert fitted.result_.output.name == "model"
    _, frame = pairs
    more = frame.assign(text="new").iloc[:3]
    SteadyRegressor(bert, **QUICK, options=options).fit(frame, TOY["score"], unlabelled=more)
    with pytest.raises(UsageError, match="unlabelled has 1 text columns, X has 2"):
        SteadyClassifier(bert, **QUICK, options=options).fit(frame, Y, unlabelled=X)
    with pytest.raises(UsageError, match="'unlabelled', which are told by unlabelled of fit"):
        SteadyClassifier(bert, **QUICK, options={"unlabelled": X}).fit(X, Y)


@pytest.mark.parametrize("threshold", [0.001, 0.999])
def test_a_threshold_decides_the_classes_that_are_predicted(bert, threshold):
    """Naive: the class with the larger probability, so that a grid over thresholds finds them all equal."""
    model = SteadyClassifier(bert, **QUICK, options={"threshold": threshold}).fit(X, [label == Y[0] for label in Y])
    above = model.predict_proba(X)[:, 1] > threshold
    assert model.predict(X).tolist() == above.tolist() == [threshold < 0.5] * len(X)
    assert model.score(X, above) == 1


@pytest.mark.parametrize(
    ("y", "part"),
    [
        (["1", "1.0", "2"] * 8, "'1' and '1.0', which are one class"),
        (np.where(np.arange(24) % 2, 2.0, 1.5), "no classes that scikit-learn can score .* SteadyRegressor"),
        (np.array([True, 0] * 12, dtype=object), "no classes that scikit-learn can score"),
    ],
)
def test_labels_that_cannot_be_scored_are_refused_before_training(bert, y, part):
    """Naive: probabilities of one class stand in two columns, or score() fails after the whole training."""
    with pytest.raises(UsageError, match=part):
        SteadyClassifier(bert, **QUICK).fit(X, y)
