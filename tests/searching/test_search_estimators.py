"""The estimators of a search follow the conventions of scikit-learn's own searches."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.base import clone

import steadytune
from fit_helpers import save_tiny_bert, toy
from steadytune.errors import UsageError


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    folder = tmp_path_factory.mktemp("estimators")
    frame = toy(40)
    estimator = steadytune.SteadySearchClassifier(
        save_tiny_bert(folder / "bert"), budget="7runs", arms=["lr*3"], folds=2, steps=4, lr=1e-3, batch_size=8
    )
    return estimator.fit(frame["text"], frame["label"]), frame


def test_it_predicts_with_the_best_recipe(searched):
    estimator, frame = searched
    assert estimator.classes_.tolist() == ["down", "up"]
    best = estimator.best_estimator_
    assert type(best) is steadytune.SteadyClassifier
    assert (best.predict_proba(frame["text"]) == estimator.predict_proba(frame["text"])).all()
    assert 0 <= estimator.score(frame["text"], frame["label"]) <= 1


def test_it_has_what_a_search_of_scikit_learn_has(searched):
    estimator, _ = searched
    results = estimator.cv_results_
    names = [params["recipe"] for params in results["params"]]
    assert names == ["plain", "probe", "lr*3"]
    assert {len(values) for values in results.values()} == {3}
    assert names[estimator.best_index_] == estimator.search_.best_recipe
    assert results["rank_test_score"][np.argmax(results["mean_test_score"])] == 1
    assert 0 <= estimator.best_score_ <= 1
    assert estimator.verdict_ == estimator.search_.verdict


def test_the_best_parameters_make_the_same_model_again(searched):
    """Naive: the options of an arm are lost, and a clone trains plain."""
    estimator, frame = searched
    again = clone(estimator.best_estimator_).fit(frame["text"], frame["label"])
    assert (again.predict_proba(frame["text"]) == estimator.predict_proba(frame["text"])).all()


def test_it_clones_and_sets_parameters():
    estimator = steadytune.SteadySearchRegressor("bert", budget="5m", options={"prompt": "a: "})
    copied = clone(estimator).set_params(budget="10runs", options__prompt="b: ")
    assert (copied.budget, copied.options, estimator.options) == ("10runs", {"prompt": "b: "}, {"prompt": "a: "})


def test_options_of_the_search_are_those_of_the_best_estimator_too(searched):
    """Naive: a clone of the best estimator trains without the prompt, and a separator of labels is no option."""
    from steadytune.searching.estimators import _estimator

    estimator, _ = searched
    given = {"prompt": "a: ", "label_separator": "|", "overwrite": True}
    again = clone(estimator).set_params(options=given)
    again.search_ = estimator.search_
    assert _estimator(steadytune.SteadyClassifier, again).options == {"prompt": "a: ", "label_separator": "|"}


def test_before_a_fit_there_is_no_result():
    from sklearn.exceptions import NotFittedError

    with pytest.raises(NotFittedError):
        _ = steadytune.SteadySearchClassifier("bert").best_score_


def test_options_that_a_search_has_itself_are_refused():
    frame = toy(12)
    with pytest.raises(UsageError, match="options hold 'seed', which is given as random_state"):
        steadytune.SteadySearchClassifier("bert", options={"seed": 1}).fit(frame["text"], frame["label"])


def test_the_best_parameters_have_soups_and_trainings_before_the_fit(searched, monkeypatch):
    estimator, _ = searched
    ship = {**estimator.search_.record["ship"], "options": {}, "before": [["pretrain", "simcse"], ["aux", "/a.csv"]]}
    monkeypatch.setitem(estimator.search_.record, "ship", {**ship, "methods": ["rdrop"], "soup": 3})
    monkeypatch.setitem(estimator.search_.record, "runs", 3)
    best = estimator.best_params_
    assert best["methods"] == ["rdrop"]
    assert best["options"] == {"pretrain": "simcse", "aux": ["/a.csv"], "num_seeds": 3, "combine": "soup"}


def test_what_the_best_recipe_sets_takes_the_place_of_what_was_given(searched, monkeypatch):
    """Naive: the best estimator has both steps and epochs, or lr beside learning_rate, and cannot be fitted."""
    from steadytune.searching.estimators import _estimator

    estimator, _ = searched
    ship = {**estimator.search_.record["ship"], "options": {"steps": 7, "epochs": None, "lr": 3e-3}, "lengthened": 1}
    monkeypatch.setitem(estimator.search_.record, "ship", ship)
    again = clone(estimator).set_params(epochs=1, steps=None, options={"learning_rate": 1e-3, "prompt": "a: "})
    again.search_ = estimator.search_
    best = _estimator(steadytune.SteadyClassifier, again)
    assert (best.steps, best.epochs, best.lr, best.options) == (7, None, 3e-3, {"prompt": "a: "})
