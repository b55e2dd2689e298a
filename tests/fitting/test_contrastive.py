"""The contrastive procedure: its losses by hand, whom it pairs, what it leaves, resume, its doors, errors."""

from __future__ import annotations

import math
import tracemalloc
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from transformers import AutoModelForSequenceClassification, TrainerCallback

from bench_helpers import make_root, records, small
from fit_helpers import same, save_sentence_bert, save_tiny_bert, save_tiny_gpt2, toy, weights
from steadytune import SteadyClassifier
from steadytune.bench.study import run_study
from steadytune.errors import UsageError
from steadytune.fitting import training
from steadytune.fitting.folder import read_record
from steadytune.fitting.main import dry_run, fit
from steadytune.fitting.procedures.contrastive import Balanced, Contrast, Pairs, distinct, likeness
from steadytune.fitting.training import Setup
from steadytune.heads.features import text_vectors

QUICK = {"steps": 8, "batch_size": 4, "lr": 1e-2, "progress": False, "validation_share": 0.25}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


def run(output, model, procedure="contrastive:lr=0.01", **options):
    table = options.pop("table", toy(40))
    given = {"text": "text", "label": "label", **QUICK, **options}
    return fit(table, model=model, output=output, procedure=procedure, **given)


def contrast(kind, members=None, temperature=0.5, spread=0.0):
    return Contrast(kind, temperature, "mean", np.eye(2, dtype=bool) if members is None else members, spread)


def one_hot(labels, classes=None):
    return np.eye(classes or max(labels) + 1, dtype=bool)[labels]


# ---------------------------------------------------------------- losses


def test_supcon_of_equal_vectors_is_the_log_of_the_number_of_others():
    loss = contrast("supcon").loss(torch.ones(6, 3), torch.tensor([0, 1, 0, 1, 0, 1]))
    assert loss.item() == pytest.approx(math.log(5))


def test_supcon_of_one_class_is_finite_and_by_hand():
    """Cosines 1, 0, 0 at temperature 0.5: exponentials e^2, 1, 1."""
    vectors = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    loss = contrast("supcon").loss(vectors, torch.tensor([0, 0, 0]))
    near = math.log(math.exp(2) + 1)
    by_hand = ((near - 2 + near) / 2 + (near - 2 + near) / 2 + math.log(2)) / 3
    assert loss.item() == pytest.approx(by_hand)


def test_rows_without_a_partner_are_left_out_of_the_mean():
    """Naive: they count as 0, so that a batch of many classes has a small loss."""
    loss = contrast("supcon").loss(torch.ones(4, 2), torch.tensor([0, 0, 1, 2]))
    assert loss.item() == pytest.approx(math.log(3))
    alone = contrast("supcon").loss(torch.ones(2, 2, requires_grad=True), torch.tensor([0, 1]))
    assert alone.item() == 0


@pytest.mark.parametrize("kind", ["supcon", "cosine"])
def test_the_length_of_a_vector_does_not_matter(kind):
    vectors = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    contrast(kind).loss(vectors, torch.tensor([0, 1, 0, 1, 1, 1])).backward()
    assert vectors.grad.abs().max() > 1e-3
    assert (vectors * vectors.grad).sum(1).abs().max() < 1e-6


def test_supcon_does_not_depend_on_the_order_of_the_rows():
    vectors, labels = torch.randn(6, 4, dtype=torch.float64), torch.tensor([0, 1, 0, 1, 2, 2])
    order = torch.tensor([3, 5, 0, 1, 4, 2])
    one, other = (contrast("supcon").loss(v, y).item() for v, y in ((vectors, labels), (vectors[order], labels[order])))
    assert one == pytest.approx(other, abs=1e-12)


def test_the_cosine_loss_is_zero_exactly_where_cosines_are_as_wanted():
    right = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # one pair alike, one different
    assert contrast("cosine").loss(right, torch.tensor([1, 1, 0, 1])).item() == pytest.approx(0)
    assert contrast("cosine").loss(right, torch.tensor([1, 0, 0, 1])).item() == pytest.approx(1 / 2)
    assert contrast("cosine").loss(right, torch.tensor([1, 0, 1, 1])).item() == pytest.approx(1)


def test_several_labels_are_alike_if_they_share_one_and_numbers_by_their_distance():
    sets = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    assert likeness(sets).tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert likeness(torch.tensor([0.0, 1.0, 4.0]), 4.0)[0].tolist() == [1, 0.75, 0]


# ---------------------------------------------------------------- who is paired


def batches_of(sampler):
    order = list(sampler)
    assert len(order) == len(sampler)
    return [order[i : i + sampler.batch_size] for i in range(0, len(order), sampler.batch_size)]


@pytest.mark.parametrize("classes", [2, 3, 30])
def test_balanced_batches_hold_no_row_twice_and_no_class_once(classes):
    """Naive: rows are drawn class by class with repetition, and a row is its own partner."""
    labels = [i % classes for i in range(90)]
    for batch in batches_of(Balanced(one_hot(labels), 16, seed=0)):
        assert len(set(batch)) == 16
        counts = Counter(labels[row] for row in batch)
        assert min(counts.values()) >= 2
        assert max(counts.values()) - min(counts.values()) <= 2


def test_a_rare_class_is_in_every_batch_with_the_rows_that_it_has():
    labels = [0] * 97 + [1] * 3
    for batch in batches_of(Balanced(one_hot(labels), 16, seed=1)):
        assert sum(labels[row] for row in batch) >= 2
        assert len(set(batch)) == 16


def test_a_batch_is_never_larger_than_the_table():
    members = one_hot([0, 1, 0, 1, 0])
    size = contrast("supcon", members).batch_size(16, 5)
    (batch,) = batches_of(Balanced(members, size, seed=0))
    assert sorted(batch) == [0, 1, 2, 3, 4]


def test_a_batch_of_supcon_holds_two_classes_even_if_the_fit_reads_row_by_row():
    """Two rows of one class have no others to be told from, and their loss is 0 whatever the vectors are."""
    labels = [i % 3 for i in range(30)]
    size = contrast("supcon").batch_size(1, 30)
    for batch in batches_of(Balanced(one_hot(labels), size, seed=0)):
        vectors = torch.randn(len(batch), 3, generator=torch.Generator().manual_seed(0))
        assert contrast("supcon").loss(vectors, torch.tensor([labels[row] for row in batch])) > 0
    assert contrast("cosine").batch_size(1, 30) == 2


def test_pairs_never_hold_a_row_with_itself_and_are_alike_every_other_time():
    """Naive, as SetFit's sampler: pairs are drawn with replacement, and (x, x) is one of them."""
    labels = [0, 0, 1, 1, 1, 2]  # the row of class 2 has no partner
    alike = []
    for epoch in range(20):
        sampler = Pairs(one_hot(labels), 4, seed=0)
        sampler.set_epoch(epoch)
        for batch in batches_of(sampler):
            assert all(a != b for a, b in zip(batch[0::2], batch[1::2], strict=True))
            alike += [(labels[a], labels[a] == labels[b]) for a, b in [batch[:2]]]
            assert labels[batch[2]] != labels[batch[3]]
    assert all(found == (label != 2) for label, found in alike)


def test_pairs_of_sets_and_of_numbers():
    sets = np.array([[1, 1], [0, 1], [1, 0], [0, 0]], dtype=bool)
    for batch in batches_of(Pairs(sets, 4, seed=3)):
        assert (sets[batch[0]] & sets[batch[1]]).any() or not (sets @ sets[batch[0]])[1:].any() or batch[0] == 3
        assert not (sets[batch[2]] & sets[batch[3]]).any()
    for batch in batches_of(Pairs(np.zeros((7, 0), dtype=bool), 4, seed=3)):
        assert all(a != b for a, b in zip(batch[0::2], batch[1::2], strict=True))


@pytest.mark.parametrize("kind", [Balanced, Pairs])
def test_the_draws_follow_the_seed_and_the_epoch(kind):
    """Naive, as SetFit's sampler: the order is seeded by 42 whatever the seed is."""
    members = one_hot([i % 3 for i in range(60)])

    def order(seed, epoch=0):
        sampler = kind(members, 8, seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0) == order(0)
    assert order(0) != order(1)
    assert order(0) != order(0, 1)


@pytest.mark.parametrize("kind", [Balanced, Pairs])
def test_no_table_of_all_pairs_is_made(kind):
    """Naive: 20,000 rows have 200 million pairs."""
    members = one_hot([i % 3 for i in range(20_000)])
    sampler = iter(kind(members, 32, seed=0))
    tracemalloc.start()
    for _ in range(32):
        next(sampler)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20e6


def test_equal_texts_with_one_label_are_one_row():
    rows = pd.DataFrame({"text": ["a", "a", "a", "b"], "label": ["x", "x", "y", "x"]}, index=[5, 6, 7, 8])
    assert list(distinct(rows).index) == [5, 7, 8]


# ---------------------------------------------------------------- the trainings


@pytest.fixture(scope="module")
def whole(bert, tmp_path_factory):
    done = []
    train = Setup.train

    def spy(self, job, trainer=None):
        found = train(self, job, trainer)
        done.append((self, job, {name: t.clone() for name, t in found.model.state_dict().items()}, found))
        return found

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Setup, "train", spy)
        result = run(tmp_path_factory.mktemp("out") / "o", bert, save_steps=2)
    return result, done


def test_the_encoder_is_that_of_the_contrastive_steps_and_the_head_a_probe_on_it(whole):
    result, ((stage, job, contrasted, _), (last, _, final, _)) = whole
    assert (job.name, stage.steps, stage.options.batch_size, stage.contrast.kind) == (
        "training-contrastive", 4, 8, "cosine",
    )  # fmt: skip
    assert job.select is None
    assert not set(job.rows.index) & set(result.predictions["row"])
    body = [name for name in contrasted if name.startswith("bert.encoder") or name.startswith("bert.embeddings")]
    assert all(torch.equal(contrasted[name], final[name]) for name in body)
    published = AutoModelForSequenceClassification.from_pretrained(last.pretrained.name).state_dict()
    name = "bert.encoder.layer.1.output.dense.weight"
    assert not torch.equal(published[name], final[name])
    assert last.steps == 0
    assert (result.steps, result.runs[0]["passes"]) == (4, 2)


@pytest.mark.parametrize("loss", ["supcon", "cosine"])
def test_rows_of_one_label_come_closer(bert, tmp_path, monkeypatch, loss):
    """By more than rows of different labels do: the loss does what it is for."""
    seen = []
    train = Setup.train
    monkeypatch.setattr(Setup, "train", lambda self, job, trainer=None: seen.append(self) or train(self, job, trainer))
    run(tmp_path / "o", bert, f"contrastive:lr=0.01,steps=60,loss={loss}")
    stage, last = seen
    rows = toy(40, start=100)
    batch = stage.pretrained.tokenizer.pad(stage.pretrained.tokenise(rows), return_tensors="pt")
    alike = torch.tensor(rows["label"].to_numpy()[:, None] == rows["label"].to_numpy()[None])

    def gap(model):
        with torch.no_grad():
            vectors = torch.nn.functional.normalize(text_vectors(model.eval(), batch, "mean"))
        cosines = vectors @ vectors.T
        return float(cosines[alike & ~torch.eye(len(rows), dtype=torch.bool)].mean() - cosines[~alike].mean())

    assert gap(last.pretrained.load(0)) > gap(stage.pretrained.load(0)) + 0.2


def test_the_result_is_a_plain_folder(whole):
    result, _ = whole
    model, info = AutoModelForSequenceClassification.from_pretrained(result.output, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.config.num_hidden_layers == 3  # with the block that pools
    assert read_record(result.output)["recipe"]["pooling"] == "mean"
    assert "- procedure: contrastive(loss=auto" in (result.output / "README.md").read_text()


def test_the_probe_beside_the_scores_reads_the_encoder_before_the_contrastive_steps(whole, bert, tmp_path):
    """Naive: a cross-validated score of the head on rows that have trained its features, which is too good."""
    result, _ = whole
    plain = run(tmp_path / "o", bert, None, head="logistic", pooling="mean")
    assert result.probe == plain.probe
    assert result.metrics["validation"]["probe"] == plain.metrics["validation"]["probe"]


def test_fine_tuning_starts_from_the_contrastive_encoder_and_anchors_there(bert, tmp_path, monkeypatch):
    seen = {}
    train = Setup.train

    def spy(self, job, trainer=None):
        name = "bert.encoder.layer.0.output.dense.weight"
        if job.name == "training":
            trainer = self.trainer(job, job.seeds, self.folder / job.name)
            seen["anchor"] = trainer.run.reference(name).clone()
        found = train(self, job, trainer)
        seen[job.name] = found.model.state_dict()[name].clone()
        return found

    monkeypatch.setattr(Setup, "train", spy)
    result = run(tmp_path / "o", bert, "contrastive:lr=0.01,then=finetune,loss=supcon", methods=["l2sp"])
    assert torch.equal(seen["anchor"], seen["training-contrastive"])
    assert not torch.equal(seen["training"], seen["training-contrastive"])
    assert (result.steps, result.runs[0]["passes"]) == (8, 2)


def test_steps_are_one_pass_over_the_pairs_and_at_most_half_of_plain(bert, tmp_path):
    """n = 500: 125,000 pairs would be 7,800 steps."""
    from steadytune.fitting.options import Options
    from steadytune.fitting.procedures.contrastive import Contrastive

    few, many = Options(), Options(accumulation=2)
    assert Contrastive().stage_steps(few, 500, plain=640) == 320
    assert Contrastive().stage_steps(few, 16, plain=400) == 40  # 40 pairs a row, 16 at a time
    assert Contrastive().stage_steps(many, 16, plain=400) == 20
    assert Contrastive(steps=7).stage_steps(few, 500, plain=640) == 7
    assert Contrastive().passes(few, 500) == 1
    assert Contrastive(then="finetune").passes(few, 500) == 2
    assert Contrastive().kind(None, 199) == "cosine"


class Cut(TrainerCallback):
    """Interrupts the training of this name at a step."""

    def __init__(self, name, where):
        self.name, self.where = name, where

    def on_step_begin(self, args, state, control, **kwargs):
        if (self.name, state.global_step) == self.where:
            raise KeyboardInterrupt


@pytest.mark.parametrize("loss", ["supcon", "cosine"])
@pytest.mark.parametrize("where", [("training-contrastive", 3), ("training", 0), ("training", 5)])
def test_interrupted_and_resumed_equals_uninterrupted(bert, tmp_path, monkeypatch, where, loss):
    options = {"save_steps": 2, "procedure": f"contrastive:lr=0.01,steps=6,then=finetune,loss={loss}"}
    run(tmp_path / "whole", bert, **options)
    monkeypatch.setattr(training, "Progress", lambda name: Cut(name, where))
    monkeypatch.setattr("steadytune.fitting.procedures.contrastive.Progress", lambda name: Cut(name, where))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", bert, **{**options, "progress": True})
    monkeypatch.undo()
    run(tmp_path / "cut", bert, resume=True, **options)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_each_run_has_pairs_of_its_own(bert, tmp_path):
    """Naive: one contrastive encoder, so that several seeds differ in nothing."""
    several = run(tmp_path / "o", bert, num_seeds=2, combine="ensemble")
    assert not same(weights(several.output / "members" / "0"), weights(several.output / "members" / "1"))


def several_labels(rows):
    table = toy(rows)
    return table.assign(label=[["up|warm", "warm", "cold|down"][i % 3] for i in range(rows)])


@pytest.mark.parametrize(
    ("options", "read"),
    [
        ({"table": several_labels(40), "label_separator": "|"}, "mean"),
        ({"table": several_labels(40), "label_separator": "|", "procedure": "contrastive:loss=supcon"}, "mean"),
        ({"label": "score"}, "mean"),
        ({"label": "score", "accumulation": 2, "procedure": "contrastive:then=finetune"}, "mean"),
        ({"table": toy(40, pair=True), "text": ["text", "other"]}, "mean"),
        ({"pooling": "cls"}, "cls"),
        ({"bf16": True, "calibrate": True}, "mean"),
    ],
)
def test_other_labels_texts_and_poolings(bert, tmp_path, options, read):
    result = run(tmp_path / "o", bert, **options)
    assert read_record(result.output)["recipe"].get("pooling", "model") == read
    assert result.metrics["validation"]["rows"] == 10


def test_a_sentence_encoder_is_read_as_it_was_trained_and_a_decoder_as_its_head_reads_it(tmp_path):
    first = save_sentence_bert(tmp_path / "first", mean=False)
    assert read_record(run(tmp_path / "o", first).output)["recipe"]["pooling"] == "cls"
    decoder = save_tiny_gpt2(tmp_path / "gpt2")
    result = run(tmp_path / "d", decoder)
    assert "pooling" not in read_record(result.output)["recipe"]


def test_with_the_models_own_pooling_the_pooler_goes_along(bert, tmp_path, monkeypatch, caplog):
    """Naive: the body alone is carried over, and the head reads a dense layer that was never trained."""
    seen = {}
    train = Setup.train

    def spy(self, job, trainer=None):
        found = train(self, job, trainer)
        seen[job.name] = found.model.state_dict()["bert.pooler.dense.weight"].clone()
        return found

    monkeypatch.setattr(Setup, "train", spy)
    run(tmp_path / "o", bert, pooling="model")
    assert "never trained" not in caplog.text
    assert torch.equal(seen["training-contrastive"], seen["training"])
    published = AutoModelForSequenceClassification.from_pretrained(bert).state_dict()
    assert not torch.equal(published["bert.pooler.dense.weight"], seen["training"])
    assert "pooling" not in read_record(tmp_path / "o")["recipe"]


# ---------------------------------------------------------------- doors and errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"procedure": "contrastive:loss=triplet"}, "loss must be one of 'auto', 'supcon', 'cosine'"),
        ({"procedure": "contrastive:loss=supcon", "label": "score"}, "supcon needs classes"),
        ({"methods": ["rdrop"]}, "methods acts in fine-tuning"),
        ({"evaluations": 2}, "evaluations acts in fine-tuning"),
        ({"class_weights": "balanced"}, "class_weights acts in fine-tuning"),
        ({"peft": "lora", "procedure": "contrastive:then=finetune"}, "leave lora and peft out"),
        ({"num_seeds": 2, "combine": "ensemble", "distil": True}, "distil trains its model without"),
        ({"refit": True, "validation_share": 0.0}, "refit cuts the rows"),
        ({"steps": 0, "head": "logistic"}, "steps 0 trains nothing"),
    ],
)
def test_bad_input_is_refused_before_training(bert, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(Setup, "train", lambda *args: pytest.fail("trained"))
    with pytest.raises(UsageError, match=words):
        run(tmp_path / "o", bert, **options)


def test_a_refused_method_is_said_before_the_contrastive_steps(bert, tmp_path, monkeypatch):
    monkeypatch.setattr(Setup, "train", lambda *args: pytest.fail("trained"))
    with pytest.raises(UsageError):
        run(tmp_path / "o", bert, "contrastive:then=finetune", methods=["ema", "swa"])


def test_a_dry_run_says_what_it_costs(bert, tmp_path):
    words = str(dry_run(toy(40), text="text", label="label", model=bert, output=tmp_path / "o",
                        procedure="contrastive:then=finetune", **QUICK))  # fmt: skip
    assert "Contrastive (cosine): 4 steps on pairs of rows, then 8 steps of fine-tuning follow" in words
    assert "2.00 times the passes of plain fine-tuning" in words


def test_an_estimator_takes_it_as_an_option(bert, tmp_path):
    table = toy(40)
    options = {"procedure": "contrastive:lr=0.01,steps=60"}
    model = SteadyClassifier(bert, steps=8, batch_size=4, output=str(tmp_path / "o"), options=options)
    model = clone(model).fit(table["text"], table["label"])
    assert read_record(tmp_path / "o")["recipe"]["procedure"]["name"] == "contrastive"
    assert model.score(table["text"], table["label"]) > 0.8


def test_a_study_has_it_as_a_recipe(tmp_path):
    root = make_root(tmp_path / "data")
    recipes = {"plain": {}, "contrastive": {"procedure": "contrastive:lr=0.001"}}
    study = small(root, recipes=recipes, seeds=1)
    run_study(study, tmp_path / "out", data_root=root, workers=0, progress=False)
    found = {record["spec"]["recipe"]: record for record in records(tmp_path / "out").values()}
    assert {record["status"] for record in found.values()} == {"done"}
    assert found["contrastive"]["training"]["steps"] == found["plain"]["training"]["steps"] // 2
    assert found["contrastive"]["cost"]["passes"] == 2
    assert found["contrastive"]["spec"]["options"]["pooling"] == "auto"  # as in a fit: the mean
    assert "pooling" not in found["plain"]["spec"]["options"]
