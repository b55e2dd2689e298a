"""LNSR: what it measures, by hand, and where the noise goes."""

from __future__ import annotations

import pytest
import torch
import transformers

from helpers import batches, bert, llama
from steadytune import LNSR, Run


def run_of(model, *methods):
    return Run(model, methods, total_steps=8).attach(torch.optim.SGD(model.parameters(), 0.1))


def deep(layers=4, dropout=0.1):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}
    config = transformers.BertConfig(
        vocab_size=64,
        num_hidden_layers=layers,
        num_labels=3,
        hidden_dropout_prob=dropout,
        initializer_range=0.2,
        **sizes,
    )
    return transformers.BertForSequenceClassification(config).double().train()


@pytest.mark.parametrize("block", [0, 2, None])
def test_the_penalty_by_hand_under_dropout(block, monkeypatch):
    inputs = batches(1)[0]
    real = inputs["attention_mask"].double()
    noise = torch.randn(*inputs["input_ids"].shape, 16, dtype=torch.float64)
    monkeypatch.setattr(LNSR, "draw", lambda self, step, hidden: noise)
    model, at = deep(), 1 if block is None else block
    torch.manual_seed(3)
    loss = run_of(model, LNSR(weight=2.0, block=block)).loss(inputs)
    runs = []
    for added in (torch.zeros_like(noise), noise * real.unsqueeze(-1)):
        layer = model.bert.encoder.layer[at]
        handle = layer.register_forward_hook(
            lambda m, a, output, added=added: (
                (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added
            )
        )
        torch.manual_seed(3)
        runs.append(model(**inputs, output_hidden_states=True))
        handle.remove()
    clean, noisy = runs
    movement = sum(
        (b - a).square().mean(-1) for a, b in list(zip(clean.hidden_states, noisy.hidden_states, strict=True))[at + 2 :]
    )
    expected = ((movement * real).sum(1) / real.sum(1)).mean()
    assert expected > 0
    assert torch.allclose(loss, clean.loss + 2 * expected, atol=1e-12)


@pytest.mark.parametrize("make", [bert, llama])
def test_without_noise_nothing_is_added_also_under_dropout(make):
    """Naive: another dropout draw in the second pass would be R-Drop as well."""
    inputs = batches(1, tokens=make is llama)[0]
    losses = []
    for methods in ([], [LNSR(scale=0.0)], [LNSR(scale=0.1)]):
        run = run_of(make(), *methods)
        torch.manual_seed(3)
        losses.append(float(run.loss(inputs).detach()))
    assert losses[0] == losses[1] < losses[2]


def drawn(method, inputs, hidden, monkeypatch):
    """The noise of a batch whose disturbed block gives ``hidden``."""
    seen = {}
    draw = LNSR.draw

    def spy(self, step, given):
        seen["noise"] = step.unpadded(draw(self, step, hidden))
        return seen["noise"]

    monkeypatch.setattr(LNSR, "draw", spy)
    run_of(bert(dtype=torch.float64), method).loss(inputs)
    monkeypatch.undo()
    return seen["noise"]


def test_noise_is_a_share_of_each_tokens_length(monkeypatch):
    inputs = batches(1, 32)[0]
    real = inputs["attention_mask"].bool()
    hidden = torch.randn(*real.shape, 16, dtype=torch.float64) * torch.rand(*real.shape, 1, dtype=torch.float64) * 10
    noise = drawn(LNSR(scale=0.05), inputs, hidden, monkeypatch)
    ratios = noise[real].norm(dim=-1) / hidden[real].norm(dim=-1)
    assert float(ratios.square().mean().sqrt()) == pytest.approx(0.05, rel=0.05)
    assert not noise[~real].any()


def test_noise_in_the_manifold_points_to_another_example(monkeypatch):
    inputs = batches(1)[0]
    real = inputs["attention_mask"].bool()
    hidden = torch.randn(*real.shape, 16, dtype=torch.float64)
    noise = drawn(LNSR(scale=0.3, in_manifold=True), inputs, hidden, monkeypatch)
    both = real & real.roll(1, 0)
    assert both.any()
    assert not both.all()
    for i, row in enumerate(both):
        expected = 0.3 * (hidden[i - 1] - hidden[i])
        assert torch.equal(noise[i][row], expected[row])
        assert not noise[i][~row].any()


def test_what_has_no_block_above_is_refused():
    with pytest.raises(ValueError, match="has 2 blocks, counted from 0, got 1"):
        run_of(bert(), LNSR(block=1))
    with pytest.raises(ValueError, match="got -1"):
        run_of(bert(), LNSR(block=-1))
    t5 = transformers.T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    with pytest.raises(ValueError, match="an encoder and a decoder"):
        run_of(transformers.T5ForConditionalGeneration(t5), LNSR())
    xlm = transformers.XLMConfig(vocab_size=64, emb_dim=16, n_layers=3, n_heads=2)
    with pytest.raises(ValueError, match="cut into lists"):
        run_of(transformers.XLMForSequenceClassification(xlm), LNSR())
