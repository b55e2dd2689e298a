"""mixup-blo: what each training sees, what goes from one to the next, resume, its setup in fit and studies."""

from __future__ import annotations

import gc
import json
import weakref

import pytest
import torch
from transformers import TrainerCallback

from bench_helpers import make_root, records, small
from fit_helpers import same, save_tiny_bert, toy, weights
from steadytune.bench.study import run_study
from steadytune.errors import UsageError
from steadytune.fitting import training
from steadytune.fitting.main import dry_run, fit
from steadytune.fitting.procedures.mixup import mean_shares
from steadytune.fitting.training import Setup
from steadytune.methods import WeightMixup

QUICK = {"steps": 6, "batch_size": 4, "lr": 1e-2, "save_steps": 2, "progress": False, "validation_share": 0.25}
TWO = "mixup-blo:folds=2,search_epochs=1,outer_share=0.25,lr=0.1,order=difference"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def whole(bert, tmp_path_factory):
    """A procedure of two searches, and all that its trainings were given and gave."""
    done = []
    train = Setup.train

    def spy(self, job, trainer=None):
        found = train(self, job, trainer)
        done.append((self, job, found))
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Setup, "train", spy)
        result = fit(toy(40), model=bert, output=tmp_path_factory.mktemp("out") / "o", procedure=TWO, **QUICK)
    return result, done


def test_searches_start_anew_on_splits_of_their_own_and_the_last_training_has_all_rows(whole):
    result, done = whole
    assert [job.name for _, job, _ in done] == ["training-search-0", "training-search-1", "training"]
    assert [setup.steps for setup, _, _ in done] == [6, 6, 6]  # 23 rows are one epoch of 6 batches; then as asked for
    splits = [set(setup.hold_out(job)[1].index) for setup, job, _ in done]
    assert [len(rows) for rows in splits] == [22, 22, 30]
    assert splits[0] != splits[1]
    assert all(job.select is None for _, job, _ in done[:2])
    assert done[2][1].select is not None
    assert not set(result.predictions["row"]) & splits[2]  # rows that select are in no training
    first, second = (setup.trainer(job, job.seeds, setup.folder / "x").model.state_dict() for setup, job, _ in done[:2])
    assert same(first, second)  # the pre-trained model and the same head


def test_no_model_of_a_search_is_held_beside_the_next(bert, tmp_path, monkeypatch):
    """Naive: five searches hold five models with their states."""
    train, models, alive = Setup.train, [], []

    def spy(self, job, trainer=None):
        gc.collect()
        alive.append(sum(model() is not None for model in models))
        found = train(self, job, trainer)
        models.append(weakref.ref(found.model))
        return found

    monkeypatch.setattr(Setup, "train", spy)
    fit(toy(40), model=bert, output=tmp_path / "o", procedure=TWO, **QUICK)
    assert alive == [0, 0, 0]


def test_the_last_training_starts_at_the_means_and_keeps_the_shares(whole):
    result, done = whole
    (_, _, one), (_, _, two), (last, job, trained) = done
    name = "bert.encoder.layer.0.output.dense.weight"
    raw = [found.state["raw"][name] for found in (one, two)]
    assert torch.allclose(job.start[name], (raw[0] + raw[1]) / 2)
    assert not torch.equal(raw[0], one.model.get_parameter(name))  # the model shows the mixture
    assert torch.allclose(
        job.start["classifier.weight"], (one.model.classifier.weight + two.model.classifier.weight) / 2
    )
    (mixup,) = last.methods
    found = [held.state["methods"][0]["variables"][name] for held in (one, two)]
    assert all(torch.allclose(mixup.alpha[name][i], (found[0][i] + found[1][i]) / 2) for i in (0, 1))
    assert float(mixup.alpha[name][0].min()) < 1
    trainer = last.trainer(job, job.seeds, last.folder / "x")
    live = trainer.model.state_dict()
    assert same({n: t.cpu() for n, t in live.items()}, dict(job.start))
    base = one.model.from_pretrained(last.pretrained.name).get_parameter(name)
    assert torch.equal(trainer.run.reference(name), base)  # the pre-trained weight, not the start
    assert result.runs[0]["passes"] == pytest.approx((6 * 4 + 6 * 4 + 6 * 1) / 6)
    assert result.seconds > trained.seconds - 1e-9


class Cut(TrainerCallback):
    """Interrupts the training of this name at a step."""

    def __init__(self, name, where):
        self.name, self.where = name, where

    def on_step_begin(self, args, state, control, **kwargs):
        if (self.name, state.global_step) == self.where:
            raise KeyboardInterrupt


@pytest.mark.parametrize("where", [("training-search-1", 3), ("training", 5)], ids=["in a search", "in the last"])
def test_interrupted_and_resumed_equals_uninterrupted(whole, bert, tmp_path, monkeypatch, where):
    """In the middle of a search: weights, shares, both optimizers, both loaders."""
    options = {**QUICK, "progress": True, "procedure": TWO}
    monkeypatch.setattr(training, "Progress", lambda name: Cut(name, where))
    with pytest.raises(KeyboardInterrupt):
        fit(toy(40), model=bert, output=tmp_path / "o", **options)
    monkeypatch.setattr(training, "Progress", lambda name: Cut(name, None))
    resumed = fit(toy(40), model=bert, output=tmp_path / "o", resume=True, **options)
    assert same(weights(whole[0].output), weights(resumed.output))


def test_the_record_and_the_card_name_the_procedure(whole):
    result, _ = whole
    record = json.loads((result.output / "steadytune.json").read_text())
    assert record["recipe"]["procedure"]["name"] == "mixup-blo"
    assert record["recipe"]["procedure"]["options"]["folds"] == 2
    assert "- procedure: mixup-blo(folds=2" in (result.output / "README.md").read_text()


def test_shares_of_several_searches_are_averaged_factor_by_factor():
    one, two = ({"w": [torch.full((2, 1), a), torch.full((1, 3), b)]} for a, b in ((0.2, 1.0), (0.6, 0.0)))
    (column, row) = mean_shares([one, two])["w"]
    assert torch.allclose(column, torch.full((2, 1), 0.4))
    assert torch.allclose(row, torch.full((1, 3), 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"procedure": "mixup"}, "unknown procedure 'mixup'. Did you mean 'mixup-blo'"),
        ({"procedure": "mixup-blo:folds=0"}, "procedure 'mixup-blo': folds must be a whole number from 1 on, got 0"),
        ({"procedure": "mixup-blo:outer_share=1.0"}, r"outer_share must be a number in \(0, 1\), got 1.0"),
        ({"procedure": "mixup-blo:order=third"}, "order must be one of 'first', 'difference'"),
        ({"procedure": "mixup-blo", "refit": True}, "refit cuts the rows"),
        ({"procedure": "mixup-blo:order=difference", "bf16": True}, r"WeightMixup subtracts gradients"),
    ],
)
def test_what_cannot_be_is_refused(options, message, bert, tmp_path):
    with pytest.raises(UsageError, match=message):
        fit(toy(40), model=bert, output=tmp_path / "o", **{**QUICK, "validation_share": 0.0, **options})
    with pytest.raises(UsageError, match="only records tell how long this procedure's take"):
        dry_run(toy(40), model=bert, output=tmp_path / "o", procedure="mixup-blo", **QUICK)


def test_fit_holds_out_the_outer_rows_of_a_method(bert, tmp_path):
    held = []

    class Watched(WeightMixup):
        def draw(self, run):
            batch = super().draw(run)
            held.append(len(batch["labels"]))
            return batch

    fit(toy(40), model=bert, output=tmp_path / "o", methods=[Watched(outer=0.25)], **{**QUICK, "validation_share": 0.0})
    assert held == [4, 4, 2, 4, 4, 2]  # ten rows, in batches of four


def test_a_study_runs_procedures_beside_recipes_whose_runs_keep_their_names(tmp_path):
    root = make_root(tmp_path / "data")
    recipes = {"plain": {}, "blo": {"procedure": "mixup-blo:search_epochs=0.5"}}
    study = small(root, recipes=recipes, seeds=1)
    run_study(study, tmp_path / "out", data_root=root, workers=0, progress=False)
    found = {record["spec"]["recipe"]: record for record in records(tmp_path / "out").values()}
    assert {record["status"] for record in found.values()} == {"done"}
    assert [m["name"] for m in found["blo"]["spec"]["methods"]] == ["mixup-blo"]
    assert "procedure" not in found["plain"]["spec"]
    assert found["plain"]["cost"]["passes"] == 1
    assert found["blo"]["cost"]["passes"] == pytest.approx((2 * 2 + 6) / 6)  # 26 of 32 rows, half of 4 steps
    with pytest.raises(UsageError, match="unknown procedure 'blo'"):
        small(root, recipes={"x": {"procedure": "blo"}})
