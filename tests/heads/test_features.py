"""Features of real architectures: the head on them is the model, whatever lies between the two."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import architectures
from architectures import CONFIGS, OTHERS
from helpers import VOCABULARY, assert_same, batches, bert, copied
from steadytune import L2SP, METHODS, Run
from steadytune.errors import UsageError
from steadytune.heads.features import features, output_layer, pooled_features
from steadytune.heads.start import probe_of_batches, set_head
from steadytune.methods.head_init import HeadInit

# Bart and T5 read the last end token of a row, which random rows do not have.
ARCHITECTURES = sorted({*CONFIGS, *OTHERS} - {"Bart", "T5"})


def tiny(architecture: str, labels: int = 3, **changes: object) -> transformers.PreTrainedModel:
    """A tiny model for the vocabulary of `helpers.batches`, whose weights are large enough to tell rows apart."""
    return architectures.tiny(architecture, vocab_size=VOCABULARY, num_labels=labels, initializer_range=0.3, **changes)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_on_the_features_is_the_model(architecture):
    model = tiny(architecture).train()
    given = batches(2)
    phi = features(model, given)
    layer = output_layer(model)
    assert phi.shape == (8, layer.in_features)
    bias = 0.0 if layer.bias is None else layer.bias.double()
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(**{k: v for k, v in b.items() if k != "labels"}).logits for b in given])
    assert torch.allclose(phi @ layer.weight.double().T + bias, logits.double(), atol=1e-5)


@pytest.mark.parametrize("architecture", ["Bert", "DistilBert", "Roberta", "ModernBert", "GPT2", "Qwen2"])
def test_a_head_that_begins_as_the_probe_says_what_the_probe_says(architecture):
    model = tiny(architecture)
    given = batches(6)
    probe = probe_of_batches(model, given, how="logistic")
    phi = features(model, given).numpy()
    set_head(model, probe)
    model.eval()
    with torch.no_grad():
        logits = torch.cat([model(**{k: v for k, v in b.items() if k != "labels"}).logits for b in given])
    assert np.abs(logits.numpy() - probe.outputs(phi)).max() < 1e-4
    assert (logits.numpy().argmax(1) == probe.outputs(phi).argmax(1)).all()


def test_modes_and_random_state_stay_as_they_were():
    model = bert(dropout=0.5).train()
    model.bert.encoder.eval()
    modes = [m.training for m in model.modules()]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = features(model, batches(2)), features(model, batches(2))
    assert torch.equal(first, second)  # no dropout
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("architecture", sorted({*ARCHITECTURES} - {"ConvBert", "Funnel"}))  # these see padding
def test_pooled_features_are_the_states_of_tokens_that_are_no_padding(architecture):
    """Of each row alone, without padding, they are the mean and the first of the states."""
    model = tiny(architecture).eval()
    (batch,) = batches(1)
    mask = batch["attention_mask"].bool()
    assert not mask.all()
    mean, first = (pooled_features(model, [batch], how) for how in ("mean", "cls"))
    for i in range(len(mask)):
        with torch.no_grad():
            states = model.base_model(input_ids=batch["input_ids"][i][mask[i]][None]).last_hidden_state[0].double()
        assert torch.allclose(mean[i], states.mean(0), atol=1e-5)
        assert torch.allclose(first[i], states[0], atol=1e-5)


def test_the_first_token_is_found_behind_padding_on_the_left():
    model = tiny("Qwen2").eval()
    ids = torch.tensor([[0, 0, 5, 7], [9, 8, 7, 6]])
    batch = {"input_ids": ids, "attention_mask": torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])}
    with torch.no_grad():
        alone = model.base_model(input_ids=ids[:1, 2:]).last_hidden_state[0, 0].double()
    assert torch.allclose(pooled_features(model, [batch], "cls")[0], alone, atol=1e-5)


@pytest.mark.parametrize(("architecture", "body"), [("Bart", "model"), ("T5", "transformer")])
def test_of_an_encoder_decoder_the_states_of_the_encoder_are_pooled(architecture, body):
    model = architectures.tiny(architecture)
    batch = {"input_ids": torch.tensor([[5, 7, 9, 2], [6, 2, 0, 0]])}
    batch["attention_mask"] = (batch["input_ids"] > 0).long()
    with torch.no_grad():
        states = getattr(model, body).encoder(**batch).last_hidden_state.double()
    found = pooled_features(model, [batch], "mean")
    assert torch.allclose(found[1], states[1, :2].mean(0), atol=1e-6)


def test_a_model_that_pools_tokens_inside_has_no_state_per_token():
    with pytest.raises(ValueError, match="has not one state per token"):
        pooled_features(tiny("Funnel"), batches(1), "mean")
    with pytest.raises(ValueError, match="at least one batch"):
        pooled_features(bert(), [], "mean")


class Squashed(nn.Module):
    """Its logits are not linear in anything that a hook could see."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = bert()
        self.config = self.inner.config

    def forward(self, **inputs):
        outputs = self.inner(**inputs)
        outputs.logits = outputs.logits.tanh()
        return outputs


def test_logits_that_no_linear_layer_makes_are_refused():
    with pytest.raises(ValueError, match="not those of its last linear layer"):
        features(Squashed(), batches(1))


def test_several_labels_and_numbers():
    model = bert(labels=2)
    given = [{**b, "labels": torch.stack([b["labels"] > 0, b["labels"] > 1], 1).float()} for b in batches(4)]
    probe = probe_of_batches(model, given, how="logistic")
    assert probe.weight.shape == (2, 16)
    number = bert(labels=1)
    given = [{**b, "labels": b["labels"].float() / 2} for b in batches(4)]
    probe = probe_of_batches(number, given, how="logistic")
    phi, y = features(number, given).numpy(), torch.cat([b["labels"] for b in given]).numpy()
    held_out, ours = np.square(probe.out_of_fold[:, 0] - y).mean(), np.square(probe.outputs(phi)[:, 0] - y).mean()
    assert ours < held_out


@pytest.mark.parametrize("labels", [None, torch.zeros(4, 2, 2), torch.zeros(4, 7)])
def test_labels_of_another_shape_are_refused(labels):
    (batch,) = batches(1)
    batch = {k: v for k, v in {**batch, "labels": labels}.items() if v is not None}
    with pytest.raises(ValueError, match="labels"):
        probe_of_batches(bert(), [batch], how="logistic")


def test_labels_of_tokens_and_several_numbers_are_refused():
    first, second = batches(2)
    ragged = [{**b, "labels": b["input_ids"][:, :width]} for b, width in ((first, 5), (second, 4))]
    with pytest.raises(UsageError, match=r"a head of 3 outputs .* labels of shape \(4, 5\)"):
        probe_of_batches(bert(), ragged, how="logistic")
    model = bert()
    model.config.problem_type = "regression"
    with pytest.raises(UsageError, match=r"a head of 3 numbers a row .* leave HeadInit out"):
        probe_of_batches(model, [{**first, "labels": torch.randn(4, 3)}], how="logistic")


# ---- the method ---------------------------------------------------------------------------------------------------


def test_two_heads_become_one_whatever_seed_or_order_of_the_rows():
    """So that a soup of runs is the mean of models that began alike."""
    given = batches(6)
    models = [bert(seed=0), bert(seed=0)]
    nn.init.normal_(models[1].classifier.weight)
    Run(models[0], [HeadInit()], data=lambda: given, seed=0)
    Run(models[1], [HeadInit()], data=lambda: given[::-1], seed=7)
    for name, p in models[0].named_parameters():
        assert torch.allclose(p, models[1].get_parameter(name), atol=1e-6), name
    Run(again := bert(seed=0), [HeadInit()], data=lambda: given, seed=7)
    assert_same(copied(again), copied(models[0]))


def test_scale_zero_begins_with_outputs_of_zero():
    model = bert()
    Run(model, [HeadInit(scale=0.0)], data=lambda: batches(4))
    assert not model.classifier.weight.any()


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_probabilities_count_as_the_classes_that_they_name(kind):
    """As the answers of an ensemble, from which one model learns."""
    soft, hard = bert(), bert()
    given = batches(6)
    classes = soft.config.num_labels
    named = [nn.functional.one_hot(batch["labels"], classes).float() for batch in given]
    for model in (soft, hard):
        model.config.problem_type = kind
    unsure = [{**batch, "labels": 0.8 * labels + 0.05} for batch, labels in zip(given, named, strict=True)]
    sure = given if kind.startswith("single") else [{**b, "labels": n} for b, n in zip(given, named, strict=True)]
    Run(soft, [HeadInit()], data=lambda: unsure)
    Run(hard, [HeadInit()], data=lambda: sure)
    assert_same(copied(soft), copied(hard))
    assert soft.classifier.weight.any()


def test_an_anchor_leaves_the_new_head_out():
    model = bert()
    run = Run(model, [HeadInit(), L2SP()], data=lambda: batches(4))
    heads = [w for w in run.weights() if w.head]
    assert heads
    assert all(run.is_new(w) for w in heads)


def test_without_data_it_says_what_to_pass():
    with pytest.raises(ValueError, match=r"data=lambda: loader"):
        Run(bert(), [HeadInit()])


def test_the_method_is_known_by_name():
    assert METHODS["head_init"] is HeadInit
