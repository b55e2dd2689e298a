"""Facts about the pooling block: it averages, stays a mean while it trains, and the folder is a plain one."""

from __future__ import annotations

import pytest
import torch
from test_features import VOCABULARY, tiny
from torch import nn
from transformers import AutoModelForSequenceClassification

import architectures
from helpers import batches, bert
from steadytune import L2SP, LLRD, HeadInit, ReInit, Run
from steadytune.core.anatomy import anatomy, blocks
from steadytune.heads.features import features, output_layer
from steadytune.heads.pooling import TOLERANCE, add_pooling_block, bypass, dense_before, untrained_dense
from steadytune.methods.pooling import Pooling

POOLED = ["Bert", "Camembert", "DebertaV2", "DistilBert", "Electra", "Ernie", "Roberta", "XLMRoberta"]
REFUSED = ["Albert", "ConvBert", "Funnel", "MPNet", "MobileBert", "XLM", "XLNet", "GPT2", "Llama"]


def inputs(batch):
    return {k: v for k, v in batch.items() if k != "labels"}


def states(model, batch):
    with torch.no_grad():
        return model.eval()(**inputs(batch), output_hidden_states=True).hidden_states[-1]


@pytest.mark.parametrize("architecture", POOLED)
def test_the_first_token_holds_the_normalised_mean_of_those_not_masked(architecture, tmp_path):
    model = tiny(architecture)
    first, second = batches(2)
    assert (first["attention_mask"] == 0).any()
    before = {name: p.clone() for name, p in model.named_parameters()}
    hidden, others = states(model, first), states(model, second)
    add_pooling_block(model, [first])
    for batch, h in ((first, hidden), (second, others)):  # rows that did not choose c as well
        mask = batch["attention_mask"].unsqueeze(-1)
        mean = (h * mask).sum(1) / mask.sum(1)
        wanted = nn.functional.layer_norm(mean, mean.shape[-1:])
        assert (states(model, batch)[:, 0] - wanted).abs().max() < TOLERANCE
    assert all(torch.equal(model.get_parameter(name), p) for name, p in before.items())
    model.save_pretrained(tmp_path)
    again, info = AutoModelForSequenceClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(again.eval()(**inputs(first)).logits, model(**inputs(first)).logits)


@pytest.mark.parametrize("architecture", REFUSED)
def test_where_the_block_would_not_pool_it_is_refused_and_nothing_changed(architecture):
    model = tiny(architecture)
    config, names = model.config.to_dict(), [n for n, _ in model.named_parameters()]
    with pytest.raises(ValueError, match="mean pooling is not known"):
        add_pooling_block(model, batches(1))
    assert model.config.to_dict() == config
    assert [n for n, _ in model.named_parameters()] == names


@pytest.mark.parametrize("architecture", ["GPT2", "Llama"])
def test_the_first_token_is_refused_where_there_is_no_dense_layer_to_leave_out(architecture):
    """Naive: nothing happens, and the head goes on reading the last token."""
    with pytest.raises(ValueError, match="has none: use pooling='model'"):
        Run(tiny(architecture), [Pooling("cls")], data=lambda: batches(1))


def test_a_head_for_multiple_choice_is_refused_by_name():
    """Naive: the mask has a row for each example, the states have one for each text, and torch refuses the product."""
    model = architectures.tiny("Bert", "MultipleChoice", vocab_size=VOCABULARY)
    (batch,) = batches(1)
    texts = {name: value.reshape(2, 2, -1) for name, value in inputs(batch).items()}
    with pytest.raises(ValueError, match=r"BertForMultipleChoice has no linear layer .* for sequence classification"):
        Run(model, [Pooling()], data=lambda: [{**texts, "labels": torch.tensor([0, 1])}])
    assert len(model.bert.encoder.layer) == model.config.num_hidden_layers == 2


def test_the_first_token_is_refused_where_it_holds_the_mean_already():
    model = tiny("Bert")
    Run(model, [Pooling()], data=lambda: batches(1))
    Run(model, [Pooling()], data=lambda: batches(1))
    with pytest.raises(ValueError, match="has the mean already"):
        Run(model, [Pooling("cls")], data=lambda: batches(1))


@pytest.mark.parametrize("architecture", ["Bert", "DistilBert", "DebertaV2"])
def test_queries_and_keys_stay_zero_while_all_else_trains(architecture):
    model = tiny(architecture).train()
    data = batches(10)
    run = Run(model, [Pooling()], data=lambda: data)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    run.attach(optimizer)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for batch in data:
        run.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    zero = ("query", "key", "q_lin", "k_lin", "query_proj", "key_proj")
    block = [w.name for w in run.weights() if run.is_new(w) and "layer.2." in w.name]
    assert block
    for name in block:
        p = model.get_parameter(name)
        if name.split(".")[-2] in zero:
            assert not p.any(), name
        else:
            assert not torch.equal(p, before[name]), name


def test_the_block_is_no_block_and_has_no_pre_trained_value():
    model = bert()
    number = len(blocks(model))
    run = Run(model, [Pooling(), L2SP()], data=lambda: batches(2))
    parts = anatomy(model)
    added = [name for name in parts if ".layer.2." in name]
    assert len(added) == 16
    assert all(parts[name].head and parts[name].block is None for name in added)
    assert len(blocks(model)) == number
    anchored = {w.name for w in run.weights() if not run.is_new(w)}
    assert not anchored & {*added, "bert.pooler.dense.weight"}


def test_rates_and_new_blocks_count_from_the_last_pre_trained_block():
    plain, pooled = bert(), bert()
    runs = [
        Run(plain, [LLRD(decay=0.5)]).attach(torch.optim.AdamW(plain.parameters(), lr=1.0)),
        Run(pooled, [Pooling(), LLRD(decay=0.5)], data=lambda: batches(2)),
    ]
    runs[1].attach(torch.optim.AdamW(pooled.parameters(), lr=1.0))
    rates = [{w.name: w.group["lr"] for w in run.weights()} for run in runs]
    assert all(rates[1][name] == rate for name, rate in rates[0].items())
    assert rates[1]["bert.encoder.layer.2.output.dense.weight"] == rates[0]["classifier.weight"]
    drawn = bert()
    run = Run(drawn, [Pooling(), ReInit(blocks=1)], data=lambda: batches(2))
    assert not drawn.bert.encoder.layer[2].attention.self.query.weight.any()
    assert any(run.is_new(w) and ".layer.1." in w.name for w in run.weights())


@pytest.mark.parametrize("recipe", [[Pooling(), ReInit()], [ReInit(), Pooling()]])
def test_re_init_leaves_the_bypass_of_the_pooler_alone(recipe):
    """Naive: the pooler is drawn anew after it was bypassed, and the head reads a random projection of the mean."""
    model = bert()
    run = Run(model, recipe, data=lambda: batches(2))
    assert torch.equal(model.bert.pooler.dense.weight, 0.3 * torch.eye(16))
    assert {"bert.pooler.dense.weight", "bert.pooler.dense.bias"} <= set(run[Pooling].written)


@pytest.mark.parametrize(("architecture", "error"), [("Bert", 0.05), ("DistilBert", 1e-4), ("Electra", 1e-4)])
def test_a_bypassed_dense_layer_hands_on_what_it_is_given(architecture, error):
    model = tiny(architecture).eval()
    (batch,) = batches(1)
    seen = []
    layer = model.get_submodule(dense_before(model))
    add_pooling_block(model, [batch])
    layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    bypass(model, [batch])
    seen.clear()
    with torch.no_grad():
        logits = model(**inputs(batch)).logits
    head = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    wanted = nn.functional.linear(0.3 * seen[0] if architecture == "Bert" else seen[0], head.weight, head.bias)
    if architecture != "Bert":  # the bias of the head took back the move
        wanted = nn.functional.linear(seen[0] + layer.bias, head.weight, head.bias)
    assert (logits - wanted).abs().max() < error * (1 + wanted.abs().max())


@pytest.mark.parametrize("architecture", ["DistilBert", "Electra", "DebertaV2"])
def test_dropout_leaves_the_shift_of_a_rectifier_alone_also_in_a_folder(architecture, tmp_path):
    """Naive: dropout drops and rescales the shift too, and the first training loss is thousands of times larger."""
    model = tiny(architecture)
    (batch,) = batches(1)
    bypass(model, [batch])
    model.save_pretrained(tmp_path)
    seen = []
    for one in (model, AutoModelForSequenceClassification.from_pretrained(tmp_path)):
        one.get_submodule(dense_before(one)).register_forward_hook(lambda module, args, output: seen.append(output))
        output_layer(one).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            one.train()(**inputs(batch))
        assert torch.allclose(seen[-2].flatten(), seen[-1].flatten(), atol=1e-4)
        assert any(module.p for module in one.modules() if isinstance(module, nn.Dropout))


def test_a_pooler_that_was_never_trained_is_told_from_one_that_was():
    model = bert()
    assert untrained_dense(model) == "bert.pooler.dense"  # biases of a random model are zero
    nn.init.normal_(model.bert.pooler.dense.bias)
    assert untrained_dense(model) is None
    assert untrained_dense(model, frozenset({"bert.pooler.dense.weight"})) == "bert.pooler.dense"
    assert untrained_dense(tiny("GPT2")) is None


@pytest.mark.parametrize(
    ("architecture", "how", "begins", "told"),
    [
        ("ModernBert", "mean", "cls", "mean"),
        ("ModernBert", "cls", "mean", "cls"),
        ("EuroBert", "mean", "late", "mean"),
        ("EuroBert", "cls", "late", "bos"),
    ],
)
def test_models_that_pool_by_themselves_are_told_to(architecture, how, begins, told, tmp_path):
    """Naive: the first token is none of them, and a dense layer that was never trained goes on as it was drawn."""
    model = tiny(architecture, classifier_pooling=begins)
    (batch,) = batches(1)
    run = Run(model, [Pooling(how), HeadInit()], data=lambda: [batch])
    assert model.config.classifier_pooling == told
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(again(**inputs(batch)).logits, model(**inputs(batch)).logits)
    hidden, mask = states(model, batch), batch["attention_mask"].unsqueeze(-1)
    pooled = hidden[:, 0] if how == "cls" else (hidden * mask).sum(1) / mask.sum(1)
    if architecture == "EuroBert":
        phi = features(model, [batch]) - model.dense.bias.double()
        assert torch.allclose(phi, pooled.double(), atol=1e-4)
        assert run[Pooling].written == ["dense.weight", "dense.bias"]


def test_a_dense_layer_that_was_trained_is_kept_by_models_that_pool_by_themselves():
    model = tiny("EuroBert")
    nn.init.normal_(model.dense.bias)
    before = model.dense.weight.clone()
    Run(model, [Pooling()], data=lambda: batches(1))
    assert torch.equal(model.dense.weight, before)


def test_pooling_then_head_gives_the_probe_on_the_mean(tmp_path):
    data = batches(6)
    model = bert()
    Run(model, [Pooling(), HeadInit()], data=lambda: data)
    model.save_pretrained(tmp_path)
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    right = 0
    for batch in data:
        with torch.no_grad():
            right += int((again(**inputs(batch)).logits.argmax(1) == batch["labels"]).sum())
    assert right > 8  # of 24; a random head of three classes
