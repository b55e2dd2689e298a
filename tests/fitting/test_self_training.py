"""Self-training: certainty by hand, which texts are kept, what a round learns, resume, what is refused."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import types

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import TrainerCallback

from bench_helpers import make_root, records, small
from fit_helpers import same, save_tiny_bert, toy, weights
from steadytune.bench.study import run_study
from steadytune.data.balance import WEIGHT
from steadytune.data.problem import Classification
from steadytune.errors import UsageError
from steadytune.fitting import training
from steadytune.fitting.loss import SOFT
from steadytune.fitting.main import dry_run, fit
from steadytune.fitting.procedures.self_training import (
    SelfTraining,
    certainty,
    disagreement,
    learned_rows,
    most_certain,
    share_of,
)
from steadytune.fitting.training import Setup

QUICK = {"steps": 6, "batch_size": 4, "lr": 1e-2, "save_steps": 2, "progress": False, "validation_share": 0.25,
         "probe": False}  # fmt: skip
PROBLEM = Classification(("down", "up"))
LOOSE = "self-training:most_shift=inf"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


def texts(rows: int = 30) -> pd.DataFrame:
    return toy(rows, start=200)[["text"]]


def run(output, model, **options):
    given = {"unlabelled": texts(), **QUICK, **options}
    columns = {"text": "text", "label": given.pop("label", "label")}
    return fit(given.pop("table", toy(40)), model=model, output=output, **columns, **given)


@pytest.fixture
def jobs(monkeypatch):
    """All trainings: setup, job and result."""
    done, train = [], Setup.train

    def spy(self, job, trainer=None):
        found = train(self, job, trainer)
        done.append((self, job, found))
        return found

    monkeypatch.setattr(Setup, "train", spy)
    return done


# ---- certainty --------------------------------------------------------------------------------------------------


def test_disagreement_by_hand():
    """Two certain passes that contradict each other disagree by log 2; equal passes by 0."""
    opposite = np.array([[[1.0, 0.0]], [[0.0, 1.0]]])
    assert disagreement(opposite) == pytest.approx([np.log(2)])
    assert certainty(opposite) == pytest.approx([0.0])
    equal = np.array([[[0.7, 0.3]]] * 3)
    assert disagreement(equal) == pytest.approx([0.0], abs=1e-12)
    assert certainty(equal) == pytest.approx([0.7])
    half = np.array([[[0.9, 0.1]], [[0.5, 0.5]]])
    entropies = [-(0.9 * np.log(0.9) + 0.1 * np.log(0.1)), np.log(2)]
    assert disagreement(half) == pytest.approx([-(0.7 * np.log(0.7) + 0.3 * np.log(0.3)) - np.mean(entropies)])


def test_disagreement_and_certainty_stay_in_their_ranges():
    draws = np.random.default_rng(0).dirichlet([0.2] * 5, size=(7, 400))
    assert ((disagreement(draws) >= 0) & (disagreement(draws) <= np.log(5))).all()
    assert ((certainty(draws) >= 0) & (certainty(draws) <= 1)).all()


def test_the_most_certain_texts_of_each_class_are_kept_in_the_shares_that_are_wanted():
    predicted = np.array([0] * 50 + [1] * 50)
    sure = np.random.default_rng(0).random(100)
    kept = most_certain(predicted, sure, np.array([0.75, 0.25]), 0.4)
    assert np.bincount(predicted[kept]).tolist() == [30, 10]
    assert sure[kept[predicted[kept] == 1]].min() >= np.sort(sure[50:])[-10]
    few = most_certain(np.array([0] * 95 + [1] * 5), sure, np.array([0.5, 0.5]), 0.4)
    assert len(few) == 20 + 5  # the others get no more for a class that was hardly predicted


def test_rounds_keep_more_and_more():
    assert [share_of(number) for number in range(5)] == [0.0, 0.2, 0.5, 0.8, 0.8]


# ---- what a round learns ----------------------------------------------------------------------------------------


def kept_of(rows: pd.DataFrame) -> pd.DataFrame:
    """Labelled rows as if they had been labelled with certainty."""
    certain = PROBLEM.membership(rows["label"]).astype(float).tolist()
    return rows.assign(**{SOFT: certain})


@pytest.mark.parametrize("more", [1, 3])
def test_copies_of_labelled_rows_give_the_loss_of_plain_fine_tuning(more):
    """The same sum over rows, up to a factor: every labelled row weighs the same."""
    labelled = toy(7)
    rows = learned_rows(labelled, pd.concat([kept_of(labelled)] * more), PROBLEM, 1.0, seed=0)
    counts = rows["text"].value_counts()
    assert set(counts) == {2 * more}
    by_text = dict(zip(labelled["text"], PROBLEM.membership(labelled["label"]).astype(float).tolist(), strict=True))
    assert all(row[SOFT] == by_text[row["text"]] for _, row in rows.iterrows())


@pytest.mark.parametrize(("kept", "weight"), [(3, 1.0), (25, 1.0), (25, 0.5), (3, 0.25)])
def test_kept_texts_weigh_no_more_than_the_labelled_rows(kept, weight):
    labelled, more = toy(10), kept_of(toy(kept, start=300))
    rows = learned_rows(labelled, more, PROBLEM, weight, seed=0)
    own = rows["text"].isin(labelled["text"]).sum()
    assert kept / own == pytest.approx(weight * min(1, kept / 10), abs=0.01)
    counts = rows["text"][rows["text"].isin(labelled["text"])].value_counts()
    assert counts.max() - counts.min() <= 1


def test_rows_keep_their_weights_and_kept_texts_count_once():
    labelled = toy(4).assign(**{WEIGHT: [0.5, 1.0, 1.5, 2.0]}, group="a")
    rows = learned_rows(labelled, kept_of(toy(4, start=300)), PROBLEM, 1.0, seed=0)
    assert rows[WEIGHT].tolist() == [0.5, 1.0, 1.5, 2.0, 1.0, 1.0, 1.0, 1.0]
    assert "group" not in rows


# ---- the trainings ----------------------------------------------------------------------------------------------


def test_each_round_learns_anew_from_the_labels_of_the_last(bert, tmp_path, jobs):
    result = run(tmp_path / "o", bert, procedure=f"{LOOSE},rounds=2,draws=4")
    assert [job.name for _, job, _ in jobs] == ["training-round-0", "training-round-1", "training-round-2"]
    (plain, first, _), (student, one, _), (_, two, last) = jobs
    assert plain.unlabelled is not None
    assert SOFT not in first.rows
    pool = set(texts()["text"])
    kept = [job.rows[job.rows["text"].isin(pool)] for job in (one, two)]
    assert len(kept[0]) <= len(kept[1])
    assert 1 <= len(kept[0]) <= 6
    soft = np.array(kept[1][SOFT].tolist())
    assert np.allclose(soft.sum(axis=1), 1)
    assert ((soft > 0) & (soft < 1)).all()  # probabilities, not classes
    assert kept[1]["label"].tolist() == PROBLEM.read(soft.argmax(1)).tolist()
    begun = [
        setup.trainer(job, job.seeds, setup.folder / "x").model.state_dict()
        for setup, job in ((plain, first), (student, one))
    ]
    assert same(*begun)  # the pre-trained weights and the same head
    assert same(dict(last.model.state_dict()), weights(result.output))
    spent = (6 + 6 + 6 + 2 * 4 * 30 / 3 / 4) / 6
    assert result.runs[0]["passes"] == pytest.approx(spent)


def test_without_weight_it_is_plain_fine_tuning_bit_for_bit(bert, tmp_path):
    plain = run(tmp_path / "plain", bert, unlabelled=None)
    none = run(tmp_path / "none", bert, procedure="self-training:weight=0")
    assert same(weights(plain.output), weights(none.output))


def test_round_0_of_self_training_is_plain_fine_tuning(bert, tmp_path, jobs):
    plain = run(tmp_path / "plain", bert, unlabelled=None)
    run(tmp_path / "o", bert, procedure=f"{LOOSE},rounds=1,draws=2")
    assert same(jobs[1][2].model.state_dict(), weights(plain.output))


def test_a_head_that_begins_as_a_probe_has_read_the_labelled_rows_alone(bert, tmp_path, jobs):
    run(tmp_path / "o", bert, procedure=f"{LOOSE},rounds=1,draws=2", head="logistic")
    (plain, first, _), (student, one, _) = jobs
    heads = [
        setup.trainer(job, job.seeds, setup.folder / "x").model.classifier.weight
        for setup, job in ((plain, first), (student, one))
    ]
    assert torch.equal(*heads)


def test_several_teachers_have_different_seeds(bert, tmp_path, jobs):
    run(tmp_path / "o", bert, procedure=f"{LOOSE},rounds=1,teachers=3,draws=0", dropout=0.0)
    names = [job.name for _, job, _ in jobs]
    teachers = [f"training-round-0{more}" for more in ("", "-teacher-1", "-teacher-2")]
    assert names == [*teachers, "training-round-1"]
    seeds = [job.seeds["data"] for _, job, _ in jobs]
    assert len({*seeds[:3]}) == 3
    assert seeds[3] == seeds[0]


def test_passes_with_dropout_differ_and_draw_no_random_number_of_the_training(bert, tmp_path, jobs):
    run(tmp_path / "o", bert, procedure=f"{LOOSE},rounds=1,draws=3")
    setup, _, trained = jobs[0]
    before = torch.get_rng_state()
    one, two, three = SelfTraining(draws=3).ask(setup, trained, [0, 0, 0])
    assert torch.equal(before, torch.get_rng_state())
    assert not np.array_equal(one, two)
    assert not trained.model.training
    again = SelfTraining(draws=3).ask(setup, trained, [0, 0, 0])
    assert np.array_equal(again, [one, two, three])


def test_labels_that_collapse_end_the_rounds_and_say_so(bert, tmp_path, caplog):
    """One step at a tiny rate gives all texts one class."""
    with caplog.at_level(logging.WARNING, logger="steadytune"):
        result = run(tmp_path / "o", bert, procedure="self-training:most_shift=1.1,draws=2", steps=1, lr=1e-9)
    assert "self-training ended after 0 of 2 rounds, because" in caplog.text
    assert any("of the texts were labelled" in warning for warning in result.warnings)
    plain = run(tmp_path / "plain", bert, unlabelled=None, steps=1, lr=1e-9)
    assert same(weights(plain.output), weights(result.output))


def test_folds_choose_the_round_on_rows_that_models_have_not_seen(bert, tmp_path, jobs, monkeypatch):
    asked = []
    ask = SelfTraining.ask

    def spy(self, setup, trained, seed):
        asked.append(trained)
        return ask(self, setup, trained, seed)

    monkeypatch.setattr(SelfTraining, "ask", spy)
    result = run(tmp_path / "o", bert, procedure=f"{LOOSE},rounds=1,folds=2,draws=2", validation_share=0.0)
    names = [job.name for _, job, _ in jobs]
    assert names[:4] == [f"training-fold-{f}-round-{r}" for f in (0, 1) for r in (0, 1)]
    assert names[4] == "training-round-0"
    labelled = toy(40)["text"]
    parts = [{*labelled} & {*job.rows["text"]} for _, job, _ in jobs[:4]]
    assert parts[0] == parts[1]
    assert parts[2] == parts[3]
    assert parts[0] | parts[2] == {*labelled}
    assert len(parts[0]) < len({*labelled})
    assert result.runs[0]["passes"] > 4


def test_the_best_round_is_the_one_with_the_best_score_and_of_equals_the_earliest(monkeypatch):
    from steadytune.fitting.procedures import self_training

    rows = toy(8)
    setup = Setup(*[None] * 9)
    setup = dataclasses.replace(
        setup, problem=PROBLEM, metric="accuracy", options=type("O", (), {"bf16": False}),
        pretrained=type("P", (), {"tokenise": staticmethod(lambda rows: rows), "tokenizer": None}),
    )  # fmt: skip
    job = training.Job("training", rows, None, {"subset": 0})

    def models(self, setup, job, last, made=None):
        for right in (0, 1, 1):
            yield type("T", (), {"model": right, "passes": 1.0, "steps": 2, "seconds": 3.0})

    def answers(model, tokenizer, rows, bf16):
        return 9.0 * (PROBLEM.membership(rows["label"]) == bool(model))

    monkeypatch.setattr(SelfTraining, "models", models)
    monkeypatch.setattr(self_training, "logits", answers)
    assert SelfTraining(folds=2).chosen(setup, job) == (1, 4.0, 6.0)


def test_seconds_of_reading_the_texts_count(bert, tmp_path, monkeypatch):
    """Naive: a study said 2.9 times the seconds of plain fine-tuning where whole runs took 11 times as long."""
    from steadytune.fitting.procedures import self_training

    clock = itertools.count(step=1000.0)
    monkeypatch.setattr(self_training, "time", types.SimpleNamespace(perf_counter=lambda: next(clock)))
    result = run(tmp_path / "o", bert, procedure=f"{LOOSE},rounds=2,draws=2", validation_share=0.0)
    assert 2000 < result.seconds < 2900


class Cut(TrainerCallback):
    """Interrupts the training of this name at a step."""

    def __init__(self, name, where):
        self.name, self.where = name, where

    def on_step_begin(self, args, state, control, **kwargs):
        if (self.name, state.global_step) == self.where:
            raise KeyboardInterrupt


@pytest.mark.parametrize("where", [("training-round-0", 3), ("training-round-1", 5)])
def test_interrupted_and_resumed_equals_uninterrupted(bert, tmp_path, monkeypatch, where):
    """The texts are labelled again by the model that was read from disk."""
    options = {"procedure": f"{LOOSE},rounds=1,draws=3", "head": "logistic"}
    run(tmp_path / "whole", bert, **options)
    monkeypatch.setattr(training, "Progress", lambda name: Cut(name, where))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", bert, **{**options, "progress": True})
    monkeypatch.undo()
    run(tmp_path / "cut", bert, resume=True, **options)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_kept_texts_that_do_harm_weigh_less_and_labelled_rows_weigh_one(bert, tmp_path, jobs):
    run(tmp_path / "o", bert, procedure=f"{LOOSE},rounds=1,draws=2,influence=true", steps=60)
    (_, first, _), (setup, job, _) = jobs
    own = job.rows["text"].isin(first.rows["text"])
    assert (job.rows[WEIGHT][own] == 1).all()
    assert job.rows[WEIGHT][~own].between(0, 1).all()
    features = setup.features(job.rows)
    assert [feature[WEIGHT] for feature in features] == job.rows[WEIGHT].tolist()


# ---- what is refused, and what is said --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"unlabelled": None}, "self-training learns from texts without labels: name them with unlabelled"),
        ({"dropout": 0.0}, "differ by their dropout, and the model has none"),
        ({"procedure": "self-training:draws=1"}, "certainty needs two opinions"),
        ({"procedure": "self-training:draws=0"}, "certainty needs two opinions"),
        ({"procedure": "self-training:influence=true", "methods": ["group_weights"], "subgroup": "label"}, "weighting"),
        ({"procedure": "self-training:folds=1"}, "folds must be 0"),
        ({"procedure": "self-training:folds=50", "validation_share": 0.0}, "folds must lie between 2 and"),
        ({"methods": ["causal_head"]}, "CausalHead needs one class a row, and self-training trains on the prob"),
        ({"methods": ["meta_semi"]}, "MetaSemi needs one class a row, and self-training trains on the probabilities"),
        ({"procedure": None, "methods": ["meta_semi"], "label": "score"}, "MetaSemi needs one class .* is regression"),
        ({"table": toy(40)[["text", "score"]].rename(columns={"score": "label"})}, "this is regression: leave it out"),
        ({"table": toy(40).assign(label=[["a"], ["a", "b"]] * 20)}, "this is multilabel: leave it out"),
    ],
)
def test_what_cannot_be_is_refused_before_training(bert, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(Setup, "train", lambda *args: pytest.fail("trained"))
    with pytest.raises(UsageError, match=words):
        run(tmp_path / "o", bert, **{"procedure": "self-training", **options})
    assert not (tmp_path / "o").exists()


def test_the_cost_is_said_before_training(bert, tmp_path, caplog):
    given = {**QUICK, "unlabelled": texts(), "procedure": "self-training:rounds=2"}
    estimate = dry_run(toy(40), text="text", label="label", model=bert, output=tmp_path / "o", **given)
    words = "2 rounds, with 10 passes over 30 texts before each: at most 11.3 times the passes"  # (18 + 600/12) / 6
    assert words in str(estimate)
    with pytest.raises(UsageError, match="the model has none"):
        dry_run(toy(40), text="text", label="label", model=bert, output=tmp_path / "o", dropout=0.0, **given)
    with caplog.at_level(logging.INFO, logger="steadytune"):
        run(tmp_path / "o", bert, procedure=f"{LOOSE},rounds=1,draws=2")
    assert "self-training: 1 round, with 2 passes over 30 texts" in caplog.text


def test_a_study_labels_the_rows_that_its_draw_leaves_over(tmp_path):
    root = make_root(tmp_path / "data")
    recipe = {"procedure": f"{LOOSE},rounds=1,draws=2", "unlabelled": ["rest"]}
    study = small(root, recipes={"plain": {}, "self": recipe}, seeds=1, train_sizes=[16])
    run_study(study, tmp_path / "out", data_root=root, workers=0, progress=False)
    done = {record["spec"]["recipe"]: record for record in records(tmp_path / "out").values()}
    assert {record["status"] for record in done.values()} == {"done"}
    assert done["self"]["cost"]["passes"] > 2
