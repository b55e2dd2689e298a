"""SMART: the authors' trajectories, the facts of its equations, its teacher, and what a pass costs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import transformers
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from helpers import batches, bert, collate, copied, hash_dropout, hash_noise, llama, rows
from steadytune import (
    FGM,
    LNSR,
    PGD,
    R3F,
    SAM,
    SMART,
    BregmanProximal,
    FreeLB,
    Method,
    RDrop,
    Run,
    Step,
    Trainer,
)
from steadytune.core.anatomy import input_embedding
from steadytune.functional import jeffreys, jeffreys_to_constants, kl, odds_gap, to_midpoint
from steadytune.methods.smart import DIVERGENCES

ATOL = 1e-10


def run_of(model, *methods, lr=0.1):
    return Run(model, methods, total_steps=8).attach(torch.optim.SGD(model.parameters(), lr))


def step_of(run, inputs):
    """Loss, gradients and an optimizer step; returns the loss."""
    loss = run.loss(inputs)
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    return loss.detach()


@dataclass
class Watched(SMART):
    """Keeps its perturbations, before each forward."""

    def setup(self, run):
        super().setup(run)
        self.noises, self.gradients = [], []

    def start(self, step):
        self.noises.append(super().start(step))
        return self.noises[-1]

    def move(self, noise, gradient):
        self.gradients.append(gradient)
        self.noises.append(super().move(noise, gradient))
        return self.noises[-1]


# ---------------------------------------------------------------- the authors' code


class Toy(nn.Module):
    """The network of the recordings: mean over positions of tanh(e W1^T + b1), times W2^T + b2."""

    def __init__(self, golden, case):
        super().__init__()
        embed = golden[f"{case}/embed"]
        self.embedding = nn.Embedding.from_pretrained(embed.flatten(0, 1), freeze=False)
        self.names = ("W1", "b1", "W2", "b2")
        for name in self.names:
            setattr(self, name, nn.Parameter(golden[f"{case}/{name}"].clone()))
        self.ids = torch.arange(len(self.embedding.weight)).view(embed.shape[:2])

    def forward(self, input_ids, labels=None):
        hidden = torch.tanh(self.embedding(input_ids) @ self.W1.T + self.b1).mean(1)
        logits = hidden @ self.W2.T + self.b2
        return {"loss": 0 * logits.sum(), "logits": logits}


def replay(golden, case, method, monkeypatch, start):
    """One penalty with the recorded start; returns it, the method that ran and the model."""
    model = Toy(golden, case)
    run = run_of(model, method)
    monkeypatch.setattr(Step, "draw", lambda step, *_: start)
    loss = run.loss({"input_ids": model.ids, "labels": None})
    loss.backward()
    assert torch.allclose(model(model.ids)["logits"], golden[f"{case}/clean_logits"], atol=ATOL, rtol=0)
    return loss.detach(), run[type(method)], model


def check_gradients(golden, case, model):
    for name in model.names:
        assert torch.allclose(getattr(model, name).grad, golden[f"{case}/grad_{name}_ref"], atol=ATOL, rtol=0), name
    embed = model.embedding.weight.grad.view_as(golden[f"{case}/embed"])
    assert torch.allclose(embed, golden[f"{case}/grad_embed_ref"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", [0, 1])
def test_the_published_variant_equals_mt_dnn(golden, case, monkeypatch):
    golden = golden("smart_mtdnn_sar")
    meta, case = golden.meta["cases"][case], f"case{case}"
    method = Watched(meta["epsilon"], meta["step_size"], meta["num_steps"], projection=False, noise=1.0)
    loss, ran, model = replay(golden, case, method, monkeypatch, golden[f"{case}/noise0"])
    assert torch.allclose(torch.stack(ran.noises), golden[f"{case}/noise_ref"], atol=ATOL, rtol=0)
    if meta["task"] == "regression":  # their loss pairs each example with every other, by accident
        assert torch.allclose(loss, golden[f"{case}/adv_loss_corrected"], atol=ATOL, rtol=0)
        return
    assert torch.allclose(torch.stack(ran.gradients), golden[f"{case}/noise_grad_ref"], atol=ATOL, rtol=0)
    assert torch.allclose(loss, golden[f"{case}/adv_loss_ref"], atol=ATOL, rtol=0)
    check_gradients(golden, case, model)


@pytest.mark.parametrize("case", [0, 1])
def test_the_projected_ascent_equals_the_equations(golden, case, monkeypatch):
    golden = golden("smart_mtdnn_sar")
    meta, case = golden.meta["cases"][case], f"case{case}"
    method = Watched(meta["proj_epsilon"], meta["proj_eta"], meta["num_steps"], noise=1.0)
    loss, ran, _ = replay(golden, case, method, monkeypatch, golden[f"{case}/noise0"])
    assert torch.allclose(torch.stack(ran.noises), golden[f"{case}/proj_noise"], atol=ATOL, rtol=0)
    assert torch.allclose(torch.stack(ran.gradients), golden[f"{case}/proj_noise_grad"], atol=ATOL, rtol=0)
    assert torch.allclose(loss, golden[f"{case}/proj_loss"], atol=ATOL, rtol=0)


NAMES = {"kl": "kl", "sym": "symmetric_kl", "js": "js", "mse": "l2"}  # smart-pytorch's -> ours


@pytest.mark.parametrize("case", [0, 1])
def test_the_published_variant_equals_smart_pytorch(golden, case, monkeypatch):
    """Their symmetric KL is a sum over the batch; their KL is a mean, so that the step of its ascent is that of B."""
    golden = golden("smart_pytorch")
    meta, case = golden.meta["cases"][case], f"case{case}"
    mean = meta["batch"] if meta["inner_loss"] == "kl" else 1
    method = Watched(
        meta["epsilon"],
        meta["step_size"] / mean,
        meta["num_steps"],
        meta["batch"],
        projection=False,
        noise=meta["noise_var"],
        divergence=NAMES[meta["last_loss"]],
        ascent=NAMES[meta["inner_loss"]],
    )
    loss, ran, model = replay(golden, case, method, monkeypatch, golden[f"{case}/standard_normal"])
    assert len(ran.noises) == meta["num_steps"] + 1
    assert torch.allclose(torch.stack(ran.noises), golden[f"{case}/noise_ref"], atol=ATOL, rtol=0)
    assert torch.allclose(torch.stack(ran.gradients) / mean, golden[f"{case}/noise_grad_ref"], atol=ATOL, rtol=0)
    assert torch.allclose(loss, golden[f"{case}/final_loss_ref"], atol=ATOL, rtol=0)
    check_gradients(golden, case, model)


LOSSES = {  # of (input, target), as mt-dnn names them
    "stable_kl_mean": lambda a, b: odds_gap(a, b).mean(),
    "stable_kl_sum": lambda a, b: odds_gap(a, b).sum(),
    "NsKl": lambda a, b: odds_gap(a, b.detach()).mean(),
    "NsSymKl": lambda a, b: (odds_gap(a, b.detach()) + odds_gap(b, a.detach())).mean(),
    "Kl": lambda a, b: kl(b, a).mean(),
    "SymKl": lambda a, b: jeffreys_to_constants(a, b).mean(),
    "Js": lambda a, b: to_midpoint(a, b).mean(),
}


@pytest.mark.parametrize("case", [0, 1])
@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_mt_dnn(golden, name, case):
    golden = golden("smart_mtdnn_losses")
    a, b = (golden[f"case{case}/{side}"].clone().requires_grad_() for side in ("input", "target"))
    loss = LOSSES[name](a, b)
    assert torch.allclose(loss.detach(), golden[f"case{case}/{name}_ref64"], atol=ATOL, rtol=0)
    gradient = torch.autograd.grad(loss, a, retain_graph=True)[0]
    assert torch.allclose(gradient, golden[f"case{case}/{name}_grad_input_ref64"], atol=ATOL, rtol=0)
    if name in ("NsSymKl", "Kl", "SymKl", "Js"):
        gradient = torch.autograd.grad(loss, b)[0]
        assert torch.allclose(gradient, golden[f"case{case}/{name}_grad_target_ref64"], atol=ATOL, rtol=0)


# ---------------------------------------------------------------- which divergence


def test_divergences_by_hand():
    """p = (1/4, 3/4), q = (1/2, 1/2): the midpoint is (3/8, 5/8)."""
    p, q = torch.tensor([0.25, 0.75]).double(), torch.tensor([0.5, 0.5]).double()
    noisy, clean = p.log().requires_grad_(), q.log() + 3  # a shift of all logits changes l2 only
    m = (p + q) / 2
    expected = {
        "kl": (q * (q / p).log()).sum(),
        "symmetric_kl": ((p - q) * (p / q).log()).sum(),
        "js": (m * (m / p).log()).sum() + (m * (m / q).log()).sum(),
        "l2": (p.log() - q.log() - 3).square().mean(),
    }
    gradients = {"kl": p - q, "js": p - m}  # of the perturbed logits; the midpoint is a constant
    for name, value in expected.items():
        found = DIVERGENCES[name](noisy, clean)
        assert torch.allclose(found.detach(), value, atol=1e-14, rtol=0), name
        if name in gradients:
            assert torch.allclose(torch.autograd.grad(found, noisy)[0], gradients[name], atol=1e-14, rtol=0), name


@pytest.mark.parametrize("name", ["symmetric_kl", "kl", "js", "l2"])
@pytest.mark.parametrize("projection", [True, False])
def test_the_penalty_is_the_divergence_chosen_and_the_ascent_raises_it(name, projection):
    """Of the perturbed and the clean logits, in this order, as a mean over examples."""
    seen = {}

    @dataclass
    class Kept(Watched):
        def penalty(self, step):
            seen["value"] = super().penalty(step)
            noisy = step.forward(dropout="same", add={self.embedding: self.noises[-1]})["logits"]
            seen["logits"] = noisy.detach(), step.outputs["logits"].detach()
            return seen["value"]

    gaps = []
    for steps in (0, 4):
        method = Kept(0.05, 0.02, steps, projection=projection, noise=1e-2, divergence=name)
        run_of(bert(dtype=torch.float64), method).loss(batches(1)[0])
        gaps.append(float(seen["value"].detach()))
        expected = DIVERGENCES[name](*seen["logits"]).mean()
        assert torch.allclose(seen["value"].detach(), expected, atol=1e-12, rtol=0)
    assert gaps[1] > 1.01 * gaps[0] > 0


@pytest.mark.parametrize("ascent", ["symmetric_kl", "kl", "js", "l2", "log_odds"])
def test_the_ascent_may_raise_another_divergence(ascent):
    """The direction of the first step is the gradient of what the ascent raises, and of nothing else."""
    model, inputs = bert(dropout=0.0, dtype=torch.float64), batches(1)[0]
    run = run_of(model, Watched(0.1, 0.05, noise=0.02, ascent=ascent))
    run.loss(inputs)
    method = run[Watched]
    noise = method.noises[0].clone().requires_grad_()
    table = model.get_input_embeddings()
    handle = table.register_forward_hook(lambda module, args, output: output + noise)
    noisy = model(**inputs).logits
    handle.remove()
    value = DIVERGENCES[ascent](noisy, model(**inputs).logits.detach()).sum()
    expected = torch.autograd.grad(value, noise)[0] * inputs["attention_mask"].unsqueeze(-1)
    assert torch.allclose(method.gradients[0] * inputs["attention_mask"].unsqueeze(-1), expected, atol=1e-10, rtol=0)


def test_a_state_from_before_divergences_could_be_chosen_resumes():
    run = run_of(bert(), SMART())
    step_of(run, batches(1)[0])
    saved = run.optimizer.state_dict()
    for field in ("divergence", "ascent"):
        del saved["steadytune"]["recipe"][0][field]
    run_of(bert(), SMART()).optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"SMART\.divergence was 'symmetric_kl' .* is 'js' here"):
        run_of(bert(), SMART(divergence="js")).optimizer.load_state_dict(saved)


# ---------------------------------------------------------------- S1: the ball, its square, and zero noise


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_every_token_stays_in_the_ball_and_padding_stays_where_it_is(steps):
    """The published code's perturbation is about 1 for any epsilon."""
    inputs = batches(1)[0]
    padding = ~inputs["attention_mask"].bool()
    assert padding.any()
    for epsilon in (1e-5, 1e-2):
        for projection in (True, False):
            run = run_of(bert(), Watched(epsilon, 1e-3, steps, projection=projection, noise=1e-2))
            run.loss(inputs)
            final = run[Watched].noises[-1].abs().amax(-1)
            if projection:
                assert final.max() <= epsilon
                assert final[~padding].min() > 0
            elif steps:
                assert final[~padding].min() > 0.4


class Pooled(nn.Module):
    """A mean over all positions: padding has a gradient."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 8)
        self.last = nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask, labels):
        logits = self.last(torch.tanh(self.embedding(input_ids)).mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("method", [Watched(0.1, 0.1, 2, noise=0.1), FGM(), PGD(), R3F(scale=0.1)])
def test_padding_is_untouched_where_it_has_a_gradient(method, monkeypatch):
    seen = []
    forward = Step.forward
    monkeypatch.setattr(Step, "forward", lambda step, **options: seen.append(options) or forward(step, **options))
    inputs = batches(1)[0]
    run_of(Pooled(), method).loss(inputs)
    (noise,) = seen[0]["add"].values()
    real = inputs["attention_mask"].bool()
    assert not noise[~real].any()
    assert noise[real].abs().amax(-1).min() > 0


def test_the_penalty_is_the_square_of_a_small_radius_and_never_negative():
    def penalty(epsilon):
        model = bert(dropout=0.0, dtype=torch.float64)
        start = {"noise": epsilon, "steps": 0}  # the same directions, scaled
        seen = run_of(model, SMART(epsilon=10 * epsilon, **start)).loss(batches(1)[0]).detach()
        return seen - bert(dropout=0.0, dtype=torch.float64)(**batches(1)[0]).loss.detach()

    small, tenfold = penalty(1e-4), penalty(1e-3)
    assert small > 0
    assert tenfold / small == pytest.approx(100, rel=0.05)


def test_ascent_does_not_lower_the_divergence():
    """S3: for a small enough step."""
    ends = []
    for steps in (0, 1, 2, 4):
        run = run_of(bert(dtype=torch.float64), SMART(0.05, 1e-3, steps, noise=1e-3))
        ends.append(float(run.loss(batches(1)[0]).detach()))
    assert ends == sorted(ends)
    assert ends[0] < ends[1]


TINY = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": 32,
    "vocab_size": 64,
    "pad_token_id": 0,
    "num_labels": 3,
    "initializer_range": 0.2,
}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
MODELS = {
    "bert": (transformers.BertConfig, transformers.BertForSequenceClassification, TINY),
    "roberta": (transformers.RobertaConfig, transformers.RobertaForSequenceClassification, TINY),
    "deberta": (
        transformers.DebertaV2Config,
        transformers.DebertaV2ForSequenceClassification,
        {**TINY, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    ),
    "gpt2": (transformers.GPT2Config, transformers.GPT2ForSequenceClassification, {**TINY, **GPT2}),
    "llama": (
        transformers.LlamaConfig,
        transformers.LlamaForSequenceClassification,
        {**TINY, "attention_dropout": 0.1, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "longformer": (  # pads its inputs to a multiple of the window
        transformers.LongformerConfig,
        transformers.LongformerForSequenceClassification,
        {**TINY, "attention_window": 8, "sep_token_id": 2},
    ),
    "t5": (
        transformers.T5Config,
        transformers.T5ForConditionalGeneration,
        {"vocab_size": 64, "pad_token_id": 0, "eos_token_id": 2, **T5},
    ),
}


def family(name):
    config, kind, options = MODELS[name]
    torch.manual_seed(0)
    return kind(config(**options)).train()


def padded(side, *, tokens):
    inputs = batches(1, tokens=False)[0]
    if side == "left":
        for key in ("input_ids", "attention_mask"):
            lengths = inputs["attention_mask"].sum(1)
            inputs[key] = torch.stack([row.roll(-int(n)) for row, n in zip(inputs[key], lengths, strict=True)])
    if tokens:
        inputs["labels"] = inputs["input_ids"].masked_fill(~inputs["attention_mask"].bool(), -100)
    return inputs


@dataclass
class Zero(Method):
    """One more forward with the task's dropout and nothing added to the embedding."""

    def penalty(self, step):
        embedding = input_embedding(step.run.model)
        noise = step.zeros(embedding.weight.shape[1])
        self.same = step.forward(dropout="same", add={embedding: noise})["logits"].equal(step.outputs["logits"])
        real = step.unpadded(torch.ones_like(noise))
        self.moved = not step.forward(dropout="same", add={embedding: real})["logits"].equal(step.outputs["logits"])
        assert step.real.sum() < step.real.numel()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_zero_noise_reproduces_the_logits_bit_for_bit(name, side):
    run = run_of(family(name), Zero())
    run.loss(padded(side, tokens=name == "t5"))
    assert run[Zero].same
    assert run[Zero].moved


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_inputs_embeds_would_pool_another_position(name):
    """Decoders look for padding in `input_ids`; this is why the noise is added by a hook on the embedding."""
    model, inputs = family(name).eval(), padded("right", tokens=False)
    embedded = model.get_input_embeddings()(inputs["input_ids"])
    with torch.no_grad():
        naive = model(inputs_embeds=embedded, attention_mask=inputs["attention_mask"]).logits
        assert (naive - model(**inputs).logits).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_smart_trains_every_family(name):
    model = family(name)
    before = copied(model)
    run = run_of(model, SMART(proximal=BregmanProximal()), lr=1e-3)
    for _ in range(2):
        assert step_of(run, padded("right", tokens=name == "t5")).isfinite()
    assert any(not torch.equal(before[n], p) for n, p in model.named_parameters())


@pytest.mark.parametrize(
    "make", [partial(bert, labels=1), partial(bert, labels=3), llama], ids=["one", "three", "tokens"]
)
def test_with_no_radius_nothing_is_added(make):
    """R_s is exactly zero, also with dropout, since the noisy pass has the clean one's draw."""
    tokens = make is llama
    inputs = batches(1, tokens=tokens)[0]
    if not tokens and make().config.num_labels == 1:
        inputs["labels"] = inputs["labels"].float()
    losses = []
    for methods in ([], [SMART(epsilon=0.0)], [SMART(epsilon=0.1, step_size=0.1)]):
        run = run_of(make(), *methods)
        torch.manual_seed(3)
        losses.append(float(run.loss(inputs).detach()))
    assert losses[0] == losses[1] < losses[2]


def test_token_losses_compare_labelled_tokens_only():
    """A label of -100 at all but one position: the penalty is that of the logits scored against it."""
    inputs = batches(1, tokens=True)[0]
    inputs["labels"][:] = -100
    inputs["labels"][:, 2] = inputs["input_ids"][:, 2]
    seen = {}

    @dataclass
    class Kept(Watched):
        def penalty(self, step):
            seen["value"] = super().penalty(step)
            noisy = step.forward(dropout="same", add={self.embedding: self.noises[-1]})["logits"]
            seen["logits"] = noisy, step.outputs["logits"]
            return seen["value"]

    run_of(llama(dtype=torch.float64), Kept(0.1, 0.1)).loss(inputs)
    noisy, clean = (logits[:, 1] for logits in seen["logits"])  # position 1 predicts the token at 2
    assert torch.allclose(seen["value"], jeffreys(noisy, clean).mean(), atol=1e-12)


# ---------------------------------------------------------------- S3: gradients, precision


def test_the_ascent_leaves_every_gradient_alone():
    model = bert()
    run = run_of(model, SMART(steps=3))
    run.loss(batches(1)[0]).backward()
    held = copied_gradients(model)
    run.loss(batches(1, seed=1)[0])  # a second micro-batch, not sent back
    for name, p in model.named_parameters():
        assert torch.equal(p.grad, held[name])


def copied_gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters()}


def ascent(dtype):
    """The perturbation's gradient under autocast, for a regression whose new head is still small."""
    model = bert(labels=1, dropout=0.0)
    with torch.no_grad():
        model.classifier.weight.mul_(1e-3)
    run = run_of(model, Watched(0.1, 0.1, noise=0.02))
    inputs = batches(1)[0]
    with torch.autocast("cpu", dtype, enabled=dtype is not torch.float32):
        run.loss({**inputs, "labels": inputs["labels"].float()}).backward()
    return run[Watched].gradients[0][inputs["attention_mask"].bool()]


def test_the_ascent_does_not_underflow_in_half_precision(monkeypatch):
    """Naive: on its way back through float16, the gradient of so small a divergence becomes zero."""
    full, half = ascent(torch.float32), ascent(torch.float16)
    assert (full != 0).all()
    assert (half != 0).all()
    assert nn.functional.cosine_similarity(full.flatten(), half.flatten(), dim=0) > 0.9
    monkeypatch.setattr(torch, "ldexp", lambda ones, exponent: ones)
    assert (ascent(torch.float16) != 0).float().mean() < 0.9


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_smart_trains_under_autocast_and_grad_scaler(dtype):
    model = bert()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    run = Run(model, [SMART(0.05, 0.05, proximal=BregmanProximal())], total_steps=8).attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for index, inputs in enumerate(batches(3)):
        with torch.autocast("cpu", dtype):
            loss = run.loss(inputs)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert run.index == index + 1
        assert loss.isfinite()
    assert scaler.get_scale() == 2.0**10
    assert all(p.isfinite().all() for p in model.parameters())


# ---------------------------------------------------------------- S2: the teacher


def with_proximal(decay, *, weight=1.0):
    return run_of(bert(dtype=torch.float64), SMART(weight=0.0, proximal=BregmanProximal(weight, decay)))


@pytest.mark.parametrize("decay", [0.0, 0.25, 1.0])
def test_the_teacher_is_the_average_of_the_weights(decay):
    run = with_proximal(decay)
    expected = copied(run.model)
    for inputs in batches(4):
        step_of(run, inputs)
        now = copied(run.model)
        expected = {n: decay * expected[n] + (1 - decay) * now[n] for n in now}
        for name, held in run[SMART].teacher.items():
            assert torch.allclose(held, expected[name], atol=1e-14, rtol=0)
            assert not held.requires_grad
    assert run[SMART].teacher.keys() == now.keys()
    start = copied(bert(dtype=torch.float64))
    assert all(torch.equal(held, now[n] if decay == 0 else start[n]) for n, held in run[SMART].teacher.items()) == (
        decay != 0.25
    )


def test_after_a_hard_sync_the_proximal_term_is_zero():
    """Decay 0: the teacher is the weights of the step; so it is in the first step whatever the decay."""
    for decay, zero in ((0.0, [True] * 3), (0.9, [True, False, False])):
        run, found = with_proximal(decay, weight=100.0), []
        for inputs in batches(3):
            torch.manual_seed(5)
            with torch.no_grad():
                plain = float(run.model(**inputs).loss)
            torch.manual_seed(5)
            found.append(float(step_of(run, inputs)) == plain)
        assert found == zero


def test_the_proximal_term_is_the_divergence_from_the_teacher_by_hand():
    inputs = batches(2)
    run = with_proximal(1.0, weight=3.0)
    step_of(run, inputs[0])
    torch.manual_seed(5)
    loss = run.loss(inputs[1])
    found = []
    for model in (run.model, bert(dtype=torch.float64)):
        torch.manual_seed(5)
        found.append(model(**inputs[1]))
    expected = found[0].loss + 3 * jeffreys(found[0].logits, found[1].logits).mean()
    assert torch.allclose(loss, expected, atol=1e-12)


def test_only_the_student_moves():
    run = with_proximal(0.5)
    step_of(run, batches(1)[0])
    held = {n: t.clone() for n, t in run[SMART].teacher.items()}
    run.loss(batches(2)[1]).backward()
    assert all(t.grad is None and torch.equal(t, held[n]) for n, t in run[SMART].teacher.items())
    assert all(p.grad is not None for p in run.model.parameters())


# ---------------------------------------------------------------- costs

COSTS = {  # forwards, backwards of a step; a backward to the embeddings only is half of one
    "rdrop": ([RDrop()], (2, 2)),
    "r3f": ([R3F()], (2, 2)),
    "lnsr": ([LNSR()], (2, 2)),
    "smart": ([SMART()], (3, 2.5)),
    "smart without ascent": ([SMART(steps=0)], (2, 2)),
    "smart with a teacher": ([SMART(proximal=BregmanProximal())], (4, 2.5)),
    "teacher alone": ([SMART(weight=0.0, proximal=BregmanProximal())], (2, 1)),
    "fgm": ([FGM()], (3, 2.5)),
    "pgd": ([PGD(steps=3)], (5, 3.5)),
    "freelb": ([FreeLB(steps=3)], (4, 5)),
    "rdrop and freelb": ([RDrop(), FreeLB(steps=2)], (4, 4.5)),
    "sam": ([SAM()], (2, 2)),
    "sam and r3f": ([SAM(), R3F()], (4, 4)),  # the penalty has a second look too
    "rdrop and r3f": ([RDrop(), R3F()], (3, 3)),  # the clean logits are shared
    "rdrop, r3f and smart": ([RDrop(), R3F(), SMART(dropout="fresh")], (5, 4.5)),
    "r3f, smart and lnsr": ([R3F(), SMART(), LNSR()], (5, 4.5)),
    "rdrop and smart": ([RDrop(), SMART()], (6, 5)),  # the draw of the doubled batch takes the doubled batch
}


def deep():
    config = transformers.BertConfig(
        **{**TINY, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}, attn_implementation="eager"
    )
    torch.manual_seed(0)
    return transformers.BertForSequenceClassification(config).train()


def flops(*methods):
    run = run_of(deep(), *methods)
    inputs = {"input_ids": torch.ones(4, 16, dtype=torch.long), "labels": torch.tensor([0, 1, 2, 0])}
    with FlopCounterMode(display=False) as counter:
        step_of(run, inputs)
    return counter.get_total_flops(), run


@pytest.mark.parametrize("name", COSTS)
def test_passes_are_counted_and_are_the_work_that_is_done(name):
    recipe, (forwards, backwards) = COSTS[name]
    plain, _ = flops()
    work, run = flops(*recipe)
    assert (run.passes.forwards, run.passes.backwards) == (forwards, backwards)
    assert run.passes.plain == (forwards + 2 * backwards) / 3
    assert work / plain == pytest.approx(run.passes.plain, abs=0.05)
    assert f"{forwards} forwards, {backwards:g} backwards ({run.passes.plain:.1f} plain steps)" in run.describe()


SHARING = {
    "two draws": [RDrop(), R3F(scale=0.1), SMART(0.05, 0.05, noise=0.01, dropout="fresh")],
    "one draw": [R3F(scale=0.1, dropout="same"), SMART(0.05, 0.05, noise=0.01), LNSR(scale=0.2)],
}


@pytest.mark.parametrize("name", SHARING)
def test_penalties_that_share_the_clean_forward_add_up_to_what_each_adds_alone(name):
    (batch,) = batches(1)

    def passed(*methods):
        """The loss of one step, and its passes."""
        run = run_of(hash_dropout(bert(dtype=torch.float64)), *methods)
        with hash_noise():
            loss = run.loss(batch).detach()
        return loss, run.counted

    (together, shared), alone = passed(*SHARING[name]), [passed(method) for method in SHARING[name]]
    task, _ = passed()
    assert torch.allclose(together - task, sum(loss - task for loss, _ in alone), atol=1e-12)
    assert all(abs(loss - task) > 1e-4 for loss, _ in alone)
    assert shared.forwards == sum(passes.forwards for _, passes in alone) - 2  # three clean forwards are one
    assert shared.backwards == sum(passes.backwards for _, passes in alone) - 2


def test_passes_are_those_of_a_micro_batch_and_logged(tmp_path):
    from helpers import arguments

    options = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=2, logging_strategy="steps", logging_steps=1)
    trainer = Trainer(bert(), options, train_dataset=rows(16), data_collator=collate, methods=[SMART()])
    trainer.train()
    assert (trainer.run.passes.forwards, trainer.run.passes.backwards) == (3, 2.5)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [(entry["forwards"], entry["backwards"]) for entry in logs] == [(3, 2.5)] * 2


def test_one_second_forward_serves_all_that_ask_for_it():
    @dataclass
    class Second(Method):
        def penalty(self, step):
            return step.second()["logits"].square().mean()

    @dataclass
    class Third(Second):
        pass

    run = run_of(bert(), Second(), Third())
    step_of(run, batches(1)[0])
    assert run.passes.forwards == 2


# ---------------------------------------------------------------- what cannot work


def test_unusable_settings_are_errors():
    with pytest.raises(ValueError, match="decay must be a number in"):
        BregmanProximal(decay=1.5)
    with pytest.raises(ValueError, match="weight must be a number from 0 on"):
        BregmanProximal(weight=-1)
    with pytest.raises(ValueError, match="dropout must be one of"):
        SMART(dropout="none")
    with pytest.raises(ValueError, match=r"no nn\.Embedding"):
        run_of(nn.Linear(2, 2), SMART())
    xlnet = transformers.XLNetForSequenceClassification(
        transformers.XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=32)
    )
    with pytest.raises(ValueError, match="batch second"):
        run_of(xlnet, SMART())
    inputs = dict(batches(1)[0])
    model = bert()
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    run = run_of(model, R3F())

    def compute(model, inputs, copies):
        outputs = model(**{**inputs, "input_ids": None, "inputs_embeds": embeds})
        return outputs.loss, outputs

    with pytest.raises(RuntimeError, match="does not call: pass input_ids"):
        run.loss(inputs, compute=compute)


def test_a_perturbation_of_nothing_is_none_without_projection():
    """Naive: the zeros at padding are divided by their largest entry, and every loss is NaN."""
    run = run_of(bert(), SMART(projection=False, epsilon=0.0))
    assert run.loss(batches(1)[0]).isfinite()
