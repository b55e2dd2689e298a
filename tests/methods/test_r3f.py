"""R3F and R4F: the authors' trajectories, the noise, the head."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from torch import nn

from helpers import batches, bert, copied, llama
from steadytune import R3F, R4F, Run, Step
from steadytune.functional import jeffreys

ATOL = 1e-10


def run_of(model, *methods, lr=0.1):
    return Run(model, methods, total_steps=8).attach(torch.optim.SGD(model.parameters(), lr))


class Toy(nn.Module):
    """The network of the recordings: (mean over positions of tanh(e W1^T)) W2^T."""

    def __init__(self, golden, case):
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(golden[f"{case}/embedding_table"].clone(), freeze=False)
        self.W1 = nn.Parameter(golden[f"{case}/W1"].clone())
        self.W2 = nn.Parameter(golden[f"{case}/W2"].clone())

    def forward(self, input_ids, labels):
        logits = torch.tanh(self.embedding(input_ids) @ self.W1.T).mean(1) @ self.W2.T
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("detach", [True, False], ids=["detached", "not detached"])
@pytest.mark.parametrize("case", [0, 1])
def test_r3f_equals_fairseq(golden, case, detach, monkeypatch):
    golden = golden("r3f")
    meta, case = golden.meta["cases"][case], f"case{case}"
    model = Toy(golden, case)
    monkeypatch.setattr(Step, "draw", lambda step, method, width, kind: golden[f"{case}/noise"] / meta["eps"])
    run = run_of(model, R3F(meta["r3f_lambda"], meta["eps"], meta["noise_type"], detach_embedding=detach))
    loss = meta["batch"] * run.loss({"input_ids": golden[f"{case}/ids"], "labels": golden[f"{case}/labels"]})
    loss.backward()  # theirs are sums over the batch
    assert torch.allclose(loss.detach(), golden[f"{case}/loss_ref64"], atol=ATOL, rtol=0)
    for name in ("W1", "W2"):
        assert torch.allclose(getattr(model, name).grad, golden[f"{case}/grad_{name}_ref64"], atol=ATOL, rtol=0)
    key = "grad_embedding_table_ref64" if detach else "grad_embedding_table_not_detached"
    assert torch.allclose(model.embedding.weight.grad, golden[f"{case}/{key}"], atol=ATOL, rtol=0)


def drawn(method, inputs, monkeypatch):
    """What was added to the embeddings."""
    seen = []
    forward = Step.forward
    monkeypatch.setattr(Step, "forward", lambda step, **options: seen.append(options) or forward(step, **options))
    run = run_of(bert(dropout=0.0), method)
    run.loss(inputs)
    monkeypatch.undo()
    (noise,) = seen[0]["add"].values()
    return noise


def test_noise_has_its_distribution_and_none_at_padding(monkeypatch):
    inputs = batches(1, 64)[0]
    real = inputs["attention_mask"].bool()
    for kind, deviation in (("uniform", 0.1 / 3**0.5), ("normal", 0.1)):
        noise = drawn(R3F(scale=0.1, noise=kind), inputs, monkeypatch)
        assert noise.dtype is torch.float32
        assert not noise[~real].any()
        assert abs(float(noise[real].mean())) < 3 * deviation / noise[real].numel() ** 0.5
        assert float(noise[real].std()) == pytest.approx(deviation, rel=0.03)
        assert (noise.abs().max() <= 0.1) == (kind == "uniform")


@pytest.mark.parametrize("labels", [1, 3])
def test_the_penalty_by_hand(labels, monkeypatch):
    inputs = dict(batches(1)[0])
    if labels == 1:
        inputs["labels"] = inputs["labels"].double()
    noise = torch.randn(*inputs["input_ids"].shape, 16, dtype=torch.float64)
    monkeypatch.setattr(R3F, "draw", lambda self, step: noise)
    model = bert(labels=labels, dropout=0.0, dtype=torch.float64)
    loss = run_of(model, R3F(weight=2.0)).loss(inputs)
    clean = model(**inputs)
    handle = model.bert.embeddings.word_embeddings.register_forward_hook(lambda m, a, output: output + noise)
    noisy = model(**inputs).logits
    handle.remove()
    moved = (clean.logits - noisy).square() if labels == 1 else jeffreys(clean.logits, noisy)
    assert torch.allclose(loss, clean.loss + 2 * moved.mean(), atol=1e-12)


@pytest.mark.parametrize(
    ("weights", "autocast", "scale", "warns"),
    [
        (torch.float32, None, 1e-5, False),
        (torch.float32, None, 1e-9, True),
        (torch.float32, torch.bfloat16, 1e-5, True),
        (torch.float32, torch.bfloat16, 1e-1, False),
        (torch.bfloat16, None, 1e-5, True),
        (torch.bfloat16, None, 1e-1, False),
    ],
)
def test_noise_that_rounds_to_nothing_is_warned_of_once(weights, autocast, scale, warns):
    run = run_of(bert(dtype=weights), R3F(scale=scale))
    with warnings.catch_warnings(record=True) as caught, torch.autocast("cpu", autocast, enabled=autocast is not None):
        warnings.simplefilter("always")
        for inputs in batches(2):
            run.loss(inputs).backward()
    found = [str(w.message) for w in caught if "below the resolution" in str(w.message)]
    assert len(found) == warns
    assert not found or str(autocast or weights) in found[0]


def test_noise_in_a_half_precision_model_is_added_in_float32():
    """The sum is rounded once; rounded noise on rounded embeddings would round twice."""
    model = bert(dtype=torch.bfloat16)
    seen = []
    model.bert.embeddings.word_embeddings.register_forward_hook(lambda m, a, output: seen.append(output))
    run = run_of(model, R3F(scale=0.1))
    run.loss(batches(1)[0])
    handle = model.bert.embeddings.LayerNorm.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    run.loss(batches(1)[0])
    handle.remove()
    assert {t.dtype for t in seen} == {torch.bfloat16}


# ---------------------------------------------------------------- R4F


def norm_of(weight):
    return float(torch.linalg.svdvals(weight.detach().double())[0])


def roberta():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.RobertaConfig(vocab_size=64, max_position_embeddings=32, num_labels=3, **sizes)
    return transformers.RobertaForSequenceClassification(config).train()


def test_a_head_of_zeros_trains():
    """Naive: it is divided by its norm, 0, and every loss is NaN."""
    model, batch = bert(), batches(1)[0]
    nn.init.zeros_(model.classifier.weight)
    run = run_of(model, R4F(scale=0.1))
    run.loss(batch).backward()
    run.optimizer.step()
    assert torch.linalg.matrix_norm(model.classifier.weight.detach(), 2).item() == pytest.approx(1)


@pytest.mark.parametrize(("make", "name"), [(bert, "classifier.weight"), (roberta, "classifier.out_proj.weight")])
def test_the_last_layer_has_spectral_norm_one_after_every_step(make, name):
    model = make()
    before = copied(model)
    assert norm_of(before[name]) != pytest.approx(1, abs=0.05)
    run = run_of(model, R4F(scale=0.1))
    assert torch.allclose(model.get_parameter(name), before[name] / norm_of(before[name]), atol=1e-6)
    others = [n for n in before if n != name]
    assert all(torch.equal(model.get_parameter(n), before[n]) for n in others)
    for inputs in batches(3):
        held = model.get_parameter(name).detach().clone()
        run.loss(inputs).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        assert norm_of(model.get_parameter(name)) == pytest.approx(1, abs=1e-6)
        assert not torch.equal(model.get_parameter(name), held)


def test_r4f_needs_a_head():
    with pytest.raises(ValueError, match="no trainable one: use R3F"):
        run_of(llama(), R4F())
    frozen = bert()
    frozen.classifier.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable one: use R3F"):
        run_of(frozen, R4F())
