"""LEVI: two networks, what trains, the mean of the layers, their losses, its folder."""

import copy
import json

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from architectures import tiny
from fit_helpers import same, save_sentence_bert, save_tiny_bert, toy, weights
from helpers import assert_same, batches, bert, copied
from steadytune import LEVI, FittedModel, HeadInit, Pooling, Run, fit, inference_cost, load_levi, save_levi
from steadytune.errors import UsageError
from steadytune.fitting import main as fitting_main

# PEFT reads an attribute that transformers 5.23 renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
QUICK = {"steps": 4, "max_length": 16, "progress": False, "lr": 1e-2}
TEXTS = ["good film", "bad play story with cold cast"]


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-3, **options})


def trained(model, steps=3, **options):
    run = Run(model, [LEVI(**options)], total_steps=steps)
    optimizer = adamw(model, lr=3e-3)
    run.attach(optimizer)
    for batch in batches(steps):
        run.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.finish()
    return model.eval()


def test_the_small_network_and_the_last_layer_train_and_nothing_else():
    model = bert()
    before = copied(model)
    trained(model)
    moved = {name for name, weight in before.items() if not torch.equal(weight, copied(model)[name])}
    assert moved == {"classifier.weight", "classifier.bias"}
    assert all(p.requires_grad for n, p in model.named_parameters() if n.startswith("levi."))


def test_logits_are_the_mean_of_the_layers_and_the_loss_counts_each():
    """By hand, without hooks: the means of the states, the small network, the readers, the head's last layer."""
    model, batch = bert(), batches(1)[0]
    run = Run(model, [LEVI(layers=2, dropout=0.0)], total_steps=3).attach(adamw(model))
    model.eval()
    views, real = model.levi, batch["attention_mask"].bool()
    plain = {name: value for name, value in batch.items() if name != "labels"}
    states = model.bert(**plain, output_hidden_states=True).hidden_states[1:]
    count = len(states)
    assert views.shape.layers == (-(-count // 2) - 1, count - 1)
    with torch.no_grad():
        means = [(states[i] * real[..., None]).sum(1) / real.sum(1, keepdim=True) for i in views.shape.layers]
        small = views(batch["input_ids"], real)
        read = [r(torch.cat([m, small], -1)) for r, m in zip(views.readers, means, strict=True)]
        each = [model.classifier.forward(one) for one in read]  # without hooks
        logits = model.classifier.forward(torch.stack(read).mean(0))
        losses = [torch.nn.functional.cross_entropy(one, batch["labels"]) for one in each]
        assert torch.allclose(model(**plain).logits, torch.stack(each).mean(0), atol=1e-6)
        assert torch.allclose(model(**plain).logits, logits, atol=1e-6)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"]) + torch.stack(losses).mean()
    assert torch.allclose(run.loss(batch), expected, atol=1e-6)


def test_padding_changes_nothing():
    model, row = trained(bert()), {k: v[:1] for k, v in batches(1)[0].items() if k != "labels"}
    length = int(row["attention_mask"].sum())
    with torch.no_grad():
        alone = model(**{name: value[:, :length] for name, value in row.items()}).logits
        padded = {name: torch.nn.functional.pad(value[:, :length], (0, 3)) for name, value in row.items()}
        assert torch.allclose(model(**padded).logits, alone, atol=1e-6)


def test_a_folder_comes_back_bit_for_bit_and_is_no_other_model(tmp_path):
    """Naive: config.json stands beside the weights, and AutoModel reads the pre-trained model with a head in vain."""
    model = trained(bert())
    save_levi(tmp_path, model)
    again = load_levi(tmp_path)
    assert_same(copied(again), copied(model))
    batch = batches(1)[0]
    with torch.no_grad():
        logits = model(**batch).logits
        assert torch.equal(again(**batch).logits, logits)
        assert torch.equal(copy.deepcopy(again)(**batch).logits, logits)
    for reader in (AutoModelForSequenceClassification, AutoConfig):
        with pytest.raises((OSError, ValueError), match="config"):
            reader.from_pretrained(tmp_path)
    file = tmp_path / "levi.json"
    about = json.loads(file.read_text())
    assert "two networks" in about["about"]
    file.write_text(json.dumps({**about, "format": 2}))
    with pytest.raises(ValueError, match="has format 2, this version reads format 1"):
        load_levi(tmp_path)
    with pytest.raises(ValueError, match=r"holds no levi.json"):
        load_levi(tmp_path.parent)
    with pytest.raises(ValueError, match="no model with LEVI"):
        save_levi(tmp_path / "b", bert())


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ValueError, match="does not read the block that Pooling adds"):
        Run(bert(), [Pooling(), LEVI()], total_steps=2, data=lambda: batches(1))
    model = trained(bert())
    with pytest.raises(ValueError, match="has LEVI already"):
        Run(model, [LEVI()], total_steps=2)
    with pytest.raises(ValueError, match="one stack of blocks"):
        Run(tiny("Bart"), [LEVI()], total_steps=2)
    with pytest.raises(ValueError, match="XLNet"):
        Run(tiny("XLNet"), [LEVI()], total_steps=2)


@pytest.mark.parametrize("architecture", ["Roberta", "DistilBert", "DebertaV2", "GPT2", "ModernBert", "Albert"])
def test_architectures(architecture, tmp_path):
    """The layer that reads the mean is the last of the head, whatever stands before it."""
    model = tiny(architecture)
    run = Run(model, [LEVI()], total_steps=2).attach(adamw(model))
    ids = torch.randint(5, 20, (3, 6), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 1, 0])}
    run.loss(batch).backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if n.startswith("levi.readers"))
    save_levi(tmp_path, model)
    with torch.no_grad():
        assert torch.equal(load_levi(tmp_path)(**batch).logits, model.eval()(**batch).logits)


def test_what_it_costs_in_use_is_counted():
    """By hand: a block has 12 size^2 weights in matrices, a token passes each once; two operations a weight."""
    model, length = bert(), 8
    before = inference_cost(model, length)
    run = Run(model, [LEVI(depth=2)], total_steps=2)
    after, views = inference_cost(model, length), run[LEVI].views
    assert after.weights - before.weights == sum(p.numel() for p in views.parameters())
    size, read = views.shape.size, sum(p.numel() for r in views.readers for p in r.parameters() if p.dim() == 2)
    blocks = 2 * 2 * length * 12 * size**2
    assert blocks + 2 * read <= after.flops - before.flops <= 1.2 * (blocks + 2 * read)  # what is left is attention
    assert before.zeros == 0
    with torch.no_grad():
        model.bert.encoder.layer[0].output.dense.weight[:, ::2] = 0
    pruned = inference_cost(model, length)
    half = model.bert.encoder.layer[0].output.dense.weight.numel() // 2
    assert (pruned.zeros, pruned.flops - pruned.sparse_flops) == (half, 2 * length * half)


def test_a_probe_of_the_head_reads_what_the_layers_make():
    model = bert()
    run = Run(model, [LEVI(), HeadInit()], total_steps=2, data=lambda: batches(3))
    assert run[HeadInit].strength > 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.mark.parametrize("options", [{}, {"peft": "lora"}, {"num_seeds": 2, "combine": "ensemble"}])
def test_a_fit_is_read_again_and_predicts_the_same(tmp_path, folder, options):
    result = fit(
        toy(48), model=folder, output=tmp_path / "o", methods=["levi"], evaluations=2, save_steps=2, **QUICK, **options
    )
    again = FittedModel.load(tmp_path / "o")
    assert np.array_equal(again.predict_proba(TEXTS), result.predict_proba(TEXTS))
    assert "library_name: steadytune" in (tmp_path / "o" / "README.md").read_text()
    assert "two networks" in (tmp_path / "o" / "README.md").read_text()
    with pytest.raises((OSError, ValueError), match="config"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "o")


def test_numbers_keep_their_units(tmp_path, folder):
    rows = toy(48).assign(label=[100.0 + i % 7 for i in range(48)])
    result = fit(rows, model=folder, output=tmp_path / "o", methods=["levi"], kind="regression", **QUICK)
    assert 90 < np.mean(result.predict(TEXTS)) < 120
    assert np.array_equal(FittedModel.load(tmp_path / "o").predict(TEXTS), result.predict(TEXTS))


def test_a_sentence_encoder_is_not_given_a_block_that_nothing_reads(tmp_path):
    sentences = save_sentence_bert(tmp_path / "bert")
    fit(toy(48), model=sentences, output=tmp_path / "o", methods=["levi"], **QUICK)
    assert "pooling" not in json.loads((tmp_path / "o" / "steadytune.json").read_text())["recipe"]
    with pytest.raises(UsageError, match="leave Pooling out"):
        fit(toy(48), model=sentences, output=tmp_path / "p", methods=["levi"], pooling="mean", **QUICK)


@pytest.mark.parametrize("options", [{}, {"peft": "lora"}])
def test_resumed_is_uninterrupted(tmp_path, folder, options, monkeypatch):
    """Naive: PEFT's checkpoints hold the adapters, and the small network starts anew."""
    given = {"model": folder, "methods": ["levi", "ema"], "save_steps": 3, **QUICK, **options}
    whole = fit(toy(48), output=tmp_path / "a", **given)
    real = fitting_main.Output.save_model

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting_main.Output, "save_model", crash)
    with pytest.raises(KeyboardInterrupt):
        fit(toy(48), output=tmp_path / "b", **given)
    monkeypatch.setattr(fitting_main.Output, "save_model", real)
    again = fit(toy(48), output=tmp_path / "b", resume=True, **given)
    assert same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert np.array_equal(again.predict_proba(TEXTS), whole.predict_proba(TEXTS))
