"""What a fit does once: reading weights, tokenising texts, making batches of the selection rows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding

from fit_helpers import same, save_sentence_bert, save_tiny_bert, toy, weights
from steadytune import fit
from steadytune.data.problem import Classification, Regression
from steadytune.fitting import encoding, fitted_model, pretrained, training

QUICK = {"steps": 6, "batch_size": 4, "lr": 1e-2, "save_steps": 0, "progress": False, "text": "text", "label": "label"}
TESTS = {"test": toy(30, start=200)}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    return save_sentence_bert(tmp_path_factory.mktemp("sentences"))


@pytest.fixture
def loads(monkeypatch):
    """Names of the models whose weights were read."""
    read = []
    own = AutoModelForSequenceClassification.from_pretrained.__func__

    def counted(cls, name, *args, **kwargs):
        read.append(name)
        return own(cls, name, *args, **kwargs)

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", classmethod(counted))
    return read


def test_the_model_that_shows_what_a_head_can_read_is_the_one_that_is_trained(tmp_path, sentences, loads):
    """Naive: it is read, looked at, thrown away and read again."""
    fit(toy(), model=sentences, output=tmp_path / "o", **QUICK)
    assert len(loads) == 1
    fit(toy(), model=sentences, output=tmp_path / "p", num_seeds=2, combine="best", **QUICK)
    assert len(loads) == 1 + 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
def test_looking_at_the_model_first_changes_no_later_draw(tmp_path, sentences):
    """Adapters are drawn after the model is read. Naive: from another random state than without the look."""
    looked = fit(toy(), model=sentences, output=tmp_path / "a", lora=True, pooling="auto", **QUICK)
    straight = fit(toy(), model=sentences, output=tmp_path / "b", lora=True, pooling="model", **QUICK)
    assert same(weights(looked.output), weights(straight.output))


@pytest.mark.parametrize("procedure", [None, "mixup-blo:folds=2"])
def test_a_procedure_reads_the_model_once_for_each_of_its_trainings(tmp_path, bert, loads, procedure):
    """Naive: once more, for the checks before the first of them."""
    fit(toy(), model=bert, output=tmp_path / "o", procedure=procedure, **QUICK)
    assert len(loads) == (1 if procedure is None else 3)


def test_every_text_is_tokenised_once(tmp_path, bert, monkeypatch):
    """Naive: for the rehearsal, the training, the probe, the look for equal answers, and the scores of two runs."""
    texts = Counter()
    own = encoding.tokenise

    def counted(rows, *args):
        texts.update(rows["text"])
        return own(rows, *args)

    for module in (pretrained, fitted_model):
        monkeypatch.setattr(module, "tokenise", counted)
    options = {**QUICK, "evaluations": 2, "calibrate": True, "threshold": "tune", "num_seeds": 2, "combine": "best"}
    fit(toy(), model=bert, output=tmp_path / "o", tests=TESTS, **options)
    assert len(texts) == 40 + 30
    assert set(texts.values()) == {1}


def test_selection_rows_are_collated_once_and_evaluations_draw_nothing(tmp_path, bert, monkeypatch):
    """Naive: anew at each evaluation, by a loader that draws a seed and so changes the dropout of the next step."""
    rows = []
    own = DataCollatorWithPadding.__call__
    monkeypatch.setattr(DataCollatorWithPadding, "__call__", lambda self, few: rows.append(len(few)) or own(self, few))
    options = {**QUICK, "steps": 12, "validation_share": 0.25, "class_weights": "balanced"}
    plain = fit(toy(80), model=bert, output=tmp_path / "plain", **options)
    without = len(rows)
    rows.clear()
    scored = fit(toy(80), model=bert, output=tmp_path / "scored", evaluations=6, **options)
    assert len(scored.runs[0]["curve"]) == 6
    assert len(rows) == without + 2  # 20 rows in batches of 16
    losses = [result.history.query("name == 'loss'")["value"].tolist() for result in (plain, scored)]
    assert losses[0] == losses[1]


def test_selection_rows_sorted_by_length_keep_their_outputs(tmp_path, bert):
    """Cross-validation reads the outputs of an evaluation by row. Naive: in the order of their lengths."""
    frame = toy(40)
    frame.loc[::3, "text"] += " story score joy bore warm cold"
    options = {
        **QUICK,
        "lr": 1e-5,
        "head": "logistic",
        "pooling": "mean",
        "refit": True,
        "folds": 2,
        "evaluations": 2,
        "probe": False,
    }
    result = fit(frame, model=bert, output=tmp_path / "o", **options)
    predicted = result.predictions.query("set == 'cross-validation'").set_index("row").sort_index()
    assert predicted["label"].tolist() == frame["label"].tolist()
    assert result.metrics["cross-validation"]["accuracy"] == (predicted["prediction"] == predicted["label"]).mean()
    assert result.metrics["cross-validation"]["accuracy"] > 0.9


def test_no_more_rows_are_read_than_show_two_answers(tmp_path, bert, monkeypatch):
    """Naive: 256 selection rows and 256 training rows after every run."""
    rows = []
    own = training.logits
    monkeypatch.setattr(training, "logits", lambda m, t, features, *more: rows.append(len(features)) or
                        own(m, t, features, *more))  # fmt: skip
    result = fit(toy(300), model=bert, output=tmp_path / "o", **{**QUICK, "lr": 1e-5}, head="logistic", pooling="mean")
    assert result.runs[0]["hopeless"] is None
    assert sum(rows) <= training.CHUNK


@pytest.mark.parametrize("seed", range(5))
def test_one_answer_is_found_as_by_reading_all_rows(seed):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"label": rng.normal(size=200)})
    spread = float(rng.choice([0.5, 0.9, 1.1, 2.0])) * training.CONSTANT * frame["label"].std(ddof=0)
    outputs = rng.normal(size=200) * np.where(rng.permutation(200) < 3, 30, 0.1)
    outputs *= spread / outputs.std()
    found = training.one_answer(Regression(), frame, lambda some: outputs[some.index][:, None])
    assert found == (outputs.std() < training.CONSTANT * frame["label"].std(ddof=0))
    classes = pd.DataFrame({"label": ["a", "b"] * 100})
    odd = np.tile([1.0, 0.0], (200, 1))
    assert training.one_answer(Classification(("a", "b")), classes, lambda some: odd[some.index])
    odd[rng.integers(200)] = [0.0, 1.0]
    assert not training.one_answer(Classification(("a", "b")), classes, lambda some: odd[some.index])
