"""Auxiliary tables: what the fit starts from, what stays out, resume, errors before training."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from transformers import AutoModelForSequenceClassification, BertModel, TrainerCallback

from bench_helpers import make_root, records, small
from fit_helpers import same, save_sentence_bert, save_tiny_bert, toy, weights
from steadytune.bench.study import run_study
from steadytune.errors import UsageError
from steadytune.fitting import stages, training
from steadytune.fitting.folder import read_record
from steadytune.fitting.main import dry_run, fit
from steadytune.fitting.plan import make_plan
from steadytune.fitting.training import Setup

QUICK = {"steps": 4, "aux_steps": 6, "batch_size": 4, "lr": 1e-2, "progress": False, "validation_share": 0.25}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


def other(rows: int = 24) -> pd.DataFrame:
    """Another task on other texts, with columns of other names and three classes."""
    table = toy(rows, start=200)
    return pd.DataFrame({"sentence": table["text"], "mood": [["low", "mid", "high"][i % 3] for i in range(rows)]})


def run(output, model, **options):
    table = options.pop("table", toy(40))
    return fit(table, text="text", label="label", model=model, output=output, **{**QUICK, **options})


def test_the_fit_starts_from_the_body_that_the_other_table_leaves(bert, tmp_path, monkeypatch):
    """Its own head, and anchors at the moved weights. Naive: anchors at the published weights."""
    seen = []
    train = Setup.train

    def spy(self, job, trainer=None):
        if job.name == "training":
            model, run = trainer.model, trainer.run
            name = "bert.encoder.layer.0.output.dense.weight"
            seen.append((model.state_dict()[name].clone(), run.reference(name).clone(), model.classifier.out_features))
        found = train(self, job, trainer)
        if job.name == "aux-0":
            seen.append({name: t.clone() for name, t in found.model.state_dict().items()})
        return found

    monkeypatch.setattr(Setup, "train", spy)
    run(tmp_path / "o", bert, aux=other(), methods=["l2sp"])
    stage, (live, anchor, outputs) = seen
    name = "bert.encoder.layer.0.output.dense.weight"
    published = AutoModelForSequenceClassification.from_pretrained(bert).state_dict()
    assert stage["classifier.weight"].shape[0] == 3
    assert not torch.equal(stage[name], published[name])
    assert torch.equal(live, stage[name])
    assert torch.equal(anchor, stage[name])
    assert outputs == 2
    assert torch.equal(published["bert.embeddings.LayerNorm.weight"], torch.ones(16))


def test_the_other_table_trains_with_the_checkpoints_and_bars_of_the_fit():
    """Naive: it has those that a fit has by default."""
    plan = make_plan(toy(40), text="text", label="label", model="m", aux=other(), progress=False, save_steps=7)
    assert (plan.stages[0].plan.progress, plan.stages[0].plan.save_steps) == (False, 7)


def test_without_steps_the_body_is_that_of_the_other_table(bert, tmp_path):
    frozen = run(tmp_path / "o", bert, aux=[other()], steps=0, head="logistic")
    alone = fit(
        other(),
        model=bert,
        output=tmp_path / "alone",
        **{**QUICK, "steps": 6, "aux_steps": None, "validation_share": 0.0},
    )
    first, second = weights(frozen.output), weights(alone.output)
    body = [name for name in first if not name.startswith("classifier")]
    assert all(torch.equal(first[name], second[name]) for name in body)


def test_options_about_the_rows_of_the_fit_do_not_reach_the_other_table(bert, tmp_path):
    """Naive: subgroups, weights of rows and classes, which the other table does not have."""
    table = toy(40).assign(source=[["web", "shop"][i % 2] for i in range(40)])
    result = run(
        tmp_path / "o", bert, table=table, aux=toy(20, start=300)[["text", "score"]], subgroup="source",
        balance=["subgroup"], class_weights="balanced", evaluations=2, worst_subgroup=True, train_size=30,
    )  # fmt: skip
    (stage,) = read_record(result.output)["recipe"]["stages"]
    assert (stage["kind"], stage["data"]["rows"]) == ("regression", 20)


def test_two_tables_follow_each_other(bert, tmp_path):
    numbers = toy(20, start=300)[["text", "score"]]
    both = run(tmp_path / "both", bert, aux=[other(), numbers])
    swapped = run(tmp_path / "swapped", bert, aux=[numbers, other()])
    assert [stage["kind"] for stage in read_record(both.output)["recipe"]["stages"]] == ["classification", "regression"]
    assert not same(weights(both.output), weights(swapped.output))


def test_the_cost_of_the_training_before_is_told(bert, tmp_path):
    """Naive: passes are those of the fit alone."""
    result = run(tmp_path / "out", bert, aux=other(), aux_steps=30)
    record = json.loads((result.output / "steadytune.json").read_text())
    assert 20 < record["passes_before"] < 40, "thirty batches of rows of about the same length"
    assert "trainings before" in (result.output / "report.html").read_text(encoding="utf-8")


def test_rows_of_the_fit_stay_out_of_the_other_table(bert, tmp_path, caplog):
    """Naive: the model has seen the test rows with labels."""
    tests = {"test": toy(8, start=100)}
    mixed = pd.concat([toy(12, start=200), toy(8, start=100), toy(5)])
    with caplog.at_level("INFO", logger="steadytune"):
        leaky = run(tmp_path / "leaky", bert, tests=tests, aux=mixed)
    clean = run(tmp_path / "clean", bert, tests=tests, aux=toy(12, start=200))
    (stage,) = read_record(leaky.output)["recipe"]["stages"]
    assert (stage["left_out"], stage["data"]["rows"]) == (13, 12)
    assert "13 rows left out" in caplog.text
    assert same(weights(leaky.output), weights(clean.output))


class Cut(TrainerCallback):
    """Interrupts the training of this name at a step."""

    def __init__(self, name, where):
        self.name, self.where = name, where

    def on_step_begin(self, args, state, control, **kwargs):
        if (self.name, state.global_step) == self.where:
            raise KeyboardInterrupt


@pytest.mark.parametrize("where", [("aux-0", 3), ("aux-1", 0), ("training", 3)])
def test_interrupted_and_resumed_equals_uninterrupted(bert, tmp_path, monkeypatch, where):
    options = {"save_steps": 2, "aux": [other(), toy(20, start=300)], "methods": ["l2sp"], "head": "logistic"}
    run(tmp_path / "whole", bert, **options)
    monkeypatch.setattr(training, "Progress", lambda name: Cut(name, where))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", bert, **{**options, "progress": True})
    monkeypatch.undo()
    with pytest.raises(UsageError, match="started otherwise"):
        run(tmp_path / "cut", bert, resume=True, **{**options, "aux": other()})
    run(tmp_path / "cut", bert, resume=True, **options)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.parametrize("compact", [True, False])
def test_a_resumed_stage_goes_on_with_the_vocabulary_it_began_with(tmp_path, monkeypatch, compact):
    """Its own is compact or whole, whatever that of the fit is. Naive: the fit's (whole, because of EMA) is asked."""
    folder = save_tiny_bert(tmp_path / "bert")
    model = BertModel.from_pretrained(folder)
    model.resize_token_embeddings(300, mean_resizing=False)
    model.save_pretrained(folder)
    options = {"save_steps": 2, "aux": other(), "methods": ["ema"], "probe": False}
    run(tmp_path / "whole", folder, compact=compact, **options)
    monkeypatch.setattr(training, "Progress", lambda name: Cut(name, ("aux-0", 3)))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", folder, compact=compact, **{**options, "progress": True})
    monkeypatch.undo()
    run(tmp_path / "cut", folder, resume=True, compact=not compact, **options)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_each_table_may_be_pooled_as_it_needs(tmp_path):
    """Single texts through the mean, pairs through the model's own pooler: the body fits both."""
    sentences = save_sentence_bert(tmp_path / "sentences")
    pairs = toy(40, pair=True)
    result = fit(
        pairs, text=["text", "other"], label="label", model=sentences, output=tmp_path / "o", aux=other(), **QUICK
    )
    assert result.model.models[0].config.num_hidden_layers == 2
    assert AutoModelForSequenceClassification.from_pretrained(result.output).config.num_hidden_layers == 2


def test_the_card_names_the_tables(bert, tmp_path):
    result = run(tmp_path / "o", bert, aux=other())
    assert "trained first on 24 rows" in (result.output / "README.md").read_text()


NUMBERS = [i * 7 % 25 for i in range(60)]


@pytest.mark.parametrize(
    ("own", "labels", "options", "kind"),
    [
        (NUMBERS, NUMBERS, {"kind": "regression"}, "regression"),  # would be asked whether they are classes
        (NUMBERS, NUMBERS, {"kind": "classification"}, "classification"),
        (NUMBERS, ["low", "high"] * 30, {"kind": "regression"}, "classification"),
        (["a|b", "a"] * 30, ["a|b", "b"] * 30, {"label_separator": "|"}, "multilabel"),
        (["a|b", "a"] * 30, ["low", "high"] * 30, {"label_separator": "|"}, "classification"),
    ],
)
def test_labels_in_the_column_of_the_fit_are_read_as_its_own_if_they_can_be(own, labels, options, kind):
    first, other = toy(60).assign(label=own), toy(60, start=200).assign(label=labels)
    plan = make_plan(first, model="m", text="text", label="label", aux=other, validation_share=0.0, **options)
    assert plan.stages[0].record()["kind"] == kind


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"aux": toy(40)}, "all of its texts are in the rows of the fit"),
        ({"aux": pd.concat([toy(40), toy(5, start=200).assign(label="odd")])}, "40 of its rows .* one label .odd"),
        ({"aux": pd.DataFrame({"text": ["a film", "a play"]})}, "label"),
        ({"aux": "missing.csv"}, "missing.csv"),
        ({"aux_steps": 3, "aux": None}, "aux_steps 3 is for auxiliary tables"),
        ({"aux_steps": 3, "aux": []}, "aux_steps 3 is for auxiliary tables"),
        ({"aux": other(), "aux_steps": 0}, "aux_steps must be 1 or more, got 0"),
        ({"aux": other(), "aux_steps": 2.5}, "aux_steps must be a whole number"),
        ({"aux": other(), "peft": "prompt"}, "the output of prompt holds adapters"),
        ({"aux": other(), "head": "words"}, "aux moves the body that they read: leave one of them out"),
        ({"aux": other(), "methods": ["head_init:how=words"]}, "aux moves the body that they read: leave one of"),
        ({"aux": other(), "methods": ["adapters"]}, "the output of adapters holds adapters"),
    ],
)
def test_bad_input_is_refused_before_training(bert, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(stages.Intermediate, "body", lambda *args: pytest.fail("trained"))
    with pytest.raises(UsageError, match=words):
        run(tmp_path / "o", bert, **options)
    assert not (tmp_path / "o").exists()


def test_a_dry_run_counts_the_trainings_before(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(stages.Intermediate, "body", lambda *args: pytest.fail("trained"))
    monkeypatch.setattr(stages.TextStage, "body", lambda *args: pytest.fail("trained"))
    few = {**QUICK, "aux_steps": None, "model": bert, "output": tmp_path / "o"}
    plain = dry_run(toy(40), **few)
    aux = dry_run(toy(40), **{**few, "aux": other(), "aux_steps": 100_000})
    assert aux.minutes > 50 * plain.minutes
    assert str(aux).startswith("First 100000 steps on ")
    texts = dry_run(toy(40), **few, pretrain="simcse:steps=100000")
    assert texts.minutes > 50 * plain.minutes
    assert str(texts).startswith("First at most 100000 steps of simcse on 30 texts")


def test_a_refused_method_is_said_before_the_other_table_is_trained(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(stages.Intermediate, "body", lambda *args: pytest.fail("trained"))
    with pytest.raises(UsageError):
        run(tmp_path / "o", bert, aux=other(), methods=["ema", "swa"])


def test_a_study_trains_on_the_other_table_first_and_its_id_follows_the_contents(bert, tmp_path, monkeypatch):
    root = make_root(tmp_path / "data")
    monkeypatch.setenv("OTHER", str(tmp_path))
    other().to_csv(tmp_path / "other.csv", index=False)
    recipes = {"plain": {}, "stilts": {"aux": ["$OTHER/other.csv"], "aux_steps": 3}}
    study = small(root, recipes=recipes, seeds=1)
    run_study(study, tmp_path / "out", data_root=root, workers=0, progress=False)
    done = {record["spec"]["recipe"]: record for record in records(tmp_path / "out").values()}
    assert {record["status"] for record in done.values()} == {"done"}
    (about,) = done["stilts"]["spec"]["methods"]
    assert (about["name"], about["options"]["steps"]) == ("aux", 3)
    assert done["plain"]["spec"]["methods"] == []
    before = [trial.id for trial in study.runs(root)]
    other(21).to_csv(tmp_path / "other.csv", index=False)
    after = [trial.id for trial in study.runs(root)]
    assert (before[0] == after[0], before[1] == after[1]) == (True, False)
