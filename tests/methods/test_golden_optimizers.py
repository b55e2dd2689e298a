"""Trajectories of the authors' code (Child-Tuning, ROSE, SIFT, RecAdam, prior decay): equal to 1e-10 in float64.

Their optimizers place eps unlike torch's AdamW and decay last: `AdamWB` is theirs without a mask or a pull.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from steadytune import (
    L2SP,
    SIFT,
    ChildTuningD,
    ChildTuningF,
    RecAdam,
    ROSEEnsemble,
    ROSEFirst,
    ROSESecond,
    Run,
)
from steadytune.functional import anneal

ATOL = 1e-10


class AdamWB(torch.optim.Optimizer):
    """w <- w - s m / (sqrt(v) + eps), s = lr sqrt(1 - b2^k) / (1 - b1^k); then w <- w - lr weight_decay w."""

    def __init__(self, params, lr, betas, eps, weight_decay):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state.update(step=0, exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                state["step"] += 1
                m, v, k = state["exp_avg"], state["exp_avg_sq"], state["step"]
                m.mul_(b1).add_(p.grad, alpha=1 - b1)
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                size = group["lr"] * math.sqrt(1 - b2**k) / (1 - b1**k)
                p.addcdiv_(m, v.sqrt().add_(group["eps"]), value=-size)
                p.mul_(1 - group["lr"] * group["weight_decay"])


class Given(nn.Module):
    """Parameters whose gradient is what the recording holds: loss = sum of <parameter, grad[t]>."""

    def __init__(self, golden, start="init", grads="grad") -> None:
        super().__init__()
        self.golden, self.grads, self.calls = golden, grads, 0
        for key in golden.keys(f"{start}/"):
            *path, leaf = key.removeprefix(f"{start}/").split(".")
            module = self
            for name in path:
                if name not in module._modules:
                    module.add_module(name, nn.Module())
                module = module._modules[name]
            module.register_parameter(leaf, nn.Parameter(golden[key].clone()))

    def forward(self, t: Tensor):
        named = [(n, p) for n, p in self.named_parameters() if f"{self.grads}/{n}" in self.golden and p.requires_grad]
        return (sum((p * self.golden[f"{self.grads}/{n}"][int(t)]).sum() for n, p in named),)


def at(t: int) -> dict[str, Tensor]:
    return {"t": torch.tensor(t)}


def groups(golden, model, undecayed=("bias",)):
    """Two parameter groups: with decay, and without for names that contain one of ``undecayed``."""
    named = list(model.named_parameters())
    bare = [any(part in n for part in undecayed) for n, _ in named]
    return [
        {"params": [p for (_, p), no in zip(named, bare, strict=True) if not no]},
        {"params": [p for (_, p), no in zip(named, bare, strict=True) if no], "weight_decay": 0.0},
    ]


def adamw_b(golden, model, undecayed=("bias",)):
    meta = golden.meta
    return AdamWB(groups(golden, model, undecayed), meta["lr"], meta["betas"], meta["eps"], meta["weight_decay"])


def assert_at(golden, model, t, after="after"):
    for name, p in model.named_parameters():
        assert torch.allclose(p.detach(), golden[f"{after}/{name}"][t], atol=ATOL, rtol=0), (t, name)


def assert_moments(golden, model, optimizer):
    for key in ("exp_avg", "exp_avg_sq"):
        for name, p in model.named_parameters():
            found = optimizer.state[p][key]
            assert torch.allclose(found, golden[f"final_{key}/{name}"], atol=ATOL, rtol=0), (key, name)


def replay(golden, method, optimizer_of=adamw_b, data=None, undecayed=("bias",)):
    model = Given(golden)
    optimizer = optimizer_of(golden, model, undecayed)
    run = Run(model, [method], total_steps=golden.meta["steps"], data=data).attach(optimizer)
    for t in range(golden.meta["steps"]):
        run.loss(at(t)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_at(golden, model, t)
    assert_moments(golden, model, optimizer)
    return run


# ---------------------------------------------------------------- Child-Tuning


def test_child_tuning_f_equals_the_authors(golden):
    golden = golden("child_tuning_f")

    class Recorded(ChildTuningF):
        share = golden.meta["reserve_p"]

        def draw(self, run, weight):
            return golden[f"mask/{weight.name}"][run.index].bool()

    replay(golden, Recorded(keep=golden.meta["reserve_p"]))


def in_layer(w):
    return "layer" in w.name


class FisherNet(Given):
    """The toy network of the Fisher part for batches of rows, the recorded gradients for the steps."""

    def forward(self, t=None, x=None, labels=None):
        if t is not None:
            return super().forward(t)
        a = torch.tanh(nn.functional.linear(x, self.embed.weight, self.embed.bias))
        for layer in self.encoder.layer.children():
            a = torch.tanh(nn.functional.linear(a, layer.weight, layer.bias))
        logits = nn.functional.linear(a, self.classifier.weight, self.classifier.bias)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def test_child_tuning_d_equals_the_authors(golden):
    """Their percentile interpolates between ranks (n - 1) (1 - p), so it keeps one entry less here than ceil(n p)."""
    golden = golden("child_tuning_d")
    looks = []

    def data():
        looks.append(1)
        for rows in golden["fisher_batch_rows"]:
            rows = rows[rows >= 0]
            yield {"x": golden["fisher_X"][rows], "labels": golden["fisher_Y"][rows]}

    names = [key.removeprefix("mask/") for key in golden.keys("mask/")]
    entries = sum(golden[f"mask/{n}"].numel() for n in names)
    kept = entries - math.ceil((entries - 1) * (1 - golden.meta["reserve_p"]))
    method = ChildTuningD(keep=kept / entries, scope=in_layer, clip=golden.meta["fisher_clip"])
    model = FisherNet(golden)
    optimizer = adamw_b(golden, model)
    run = Run(model, [method], total_steps=golden.meta["steps"], data=data).attach(optimizer)
    fisher = run[ChildTuningD].fisher(run, run.weights(), data())
    assert set(fisher) == set(names)
    for name in names:
        assert torch.allclose(fisher[name], golden[f"fisher/{name}"], atol=ATOL, rtol=0)
    looks.clear()
    for t in range(golden.meta["steps"]):
        run.loss(at(t)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_at(golden, model, t)
    assert_moments(golden, model, optimizer)
    assert len(looks) == 1
    for name in names:
        assert torch.equal(run[ChildTuningD].masks[name], golden[f"mask/{name}"].bool())


# ---------------------------------------------------------------- ROSE


def masked(w):
    return "layer" in w.name and "weight" in w.name


def recorded_mask(golden, run, weights, key="tensor_mask"):
    names = golden.arrays["masked_names"].tolist()
    return {w.name: golden[key][run.index][names.index(w.name)] for w in weights}


def test_the_masked_update_of_rose_equals_the_authors(golden):
    golden = golden("rose_adamw_given")

    class Recorded(ROSEEnsemble):
        def mask(self, run, weights):
            return recorded_mask(golden, run, weights)

        def setup(self, run):
            super(ROSEEnsemble, self).setup(run)  # no dropout in given gradients

    method = Recorded(scope=masked, update="authors")
    method.copies = 1
    assert not torch.equal(golden["tensor_mask"], golden["tensor_mask"].round())  # soft ones among them
    replay(golden, method, undecayed=("bias", "LayerNorm"))


def test_rose_second_equals_the_authors(golden):
    golden = golden("rose_second")
    seen = []

    class Watched(ROSESecond):
        def mask(self, run, weights):
            found = super().mask(run, weights)
            seen.append({w.name: found.get(w.name, torch.ones(())) for w in weights})
            return found

    method = Watched(keep=golden.meta["upper"] / 100, scope=masked, update="authors", score="authors")
    replay(golden, method, undecayed=("bias", "LayerNorm"))
    for masks, expected in zip(seen, golden["tensor_mask"], strict=True):
        assert [float(masks[n]) for n in golden.arrays["masked_names"]] == expected.tolist()


class RoseNet(Given):
    """tanh layers with recorded dropout; a batch of two copies takes the masks of both passes."""

    def __init__(self, golden):
        super().__init__(golden)
        self.dropout = nn.Dropout(golden.meta["dropout"])  # what is looked for in setup

    def forward(self, x, labels, t):
        a = torch.tanh(x @ self.embed.weight.T)
        for i, layer in enumerate(self.layer.children()):
            a = torch.tanh(nn.functional.linear(a, layer.dense.weight, layer.dense.bias))
            drawn = self.golden["dropout_mask"][int(t)][:, i]
            a = a * drawn.flatten(0, 1)[: len(a)] / (1 - self.golden.meta["dropout"])
        logits = nn.functional.linear(a, self.classifier.weight, self.classifier.bias)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


@pytest.mark.parametrize("name", ["rose_first", "rose_ensemble"])
def test_rose_first_and_ensemble_equal_the_authors(golden, name):
    golden = golden(name)
    meta = golden.meta
    options = {"keep": meta["upper"] / 100, "scope": masked, "update": "authors"}
    method = ROSEFirst(**options)
    if name == "rose_ensemble":
        method = ROSEEnsemble(**options, gamma=meta["gamma"], score="authors")
    kind = type(method)
    seen = []

    class Watched(kind):
        def mask(self, run, weights):
            seen.append(super().mask(run, weights))
            return seen[-1]

    method.__class__ = Watched
    model = RoseNet(golden)
    optimizer = adamw_b(golden, model)
    run = Run(model, [method], total_steps=meta["steps"]).attach(optimizer)
    for t in range(meta["steps"]):
        loss = run.loss({"x": golden["X"][t], "labels": golden["Y"][t], "t": torch.tensor(t)})
        assert torch.allclose(loss.detach(), golden["ce"][t], atol=ATOL, rtol=0)
        loss.backward()
        for n, p in model.named_parameters():
            assert torch.allclose(p.grad, golden[f"ce_grad/{n}"][t], atol=ATOL, rtol=0)
        optimizer.step()
        optimizer.zero_grad()
        expected = dict(zip(golden.arrays["masked_names"].tolist(), golden["final_mask"][t].tolist(), strict=True))
        assert {n: float(m) for n, m in seen[-1].items()} == expected
        assert_at(golden, model, t)


# ---------------------------------------------------------------- SIFT


@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_sift_equals_the_authors_without_their_accidents(golden, weight_decay):
    """`corrected`: updates act at once, no parameter lags. Their int(n * rate) + 1 is ceil(n * keep) at 0.101.

    Their weight decay acts on a vector that is 0 before each step: sparse weights are the same with any of it.
    """
    golden = golden("sift_sgd")
    model = Given(golden)
    model.frozen_c.requires_grad_(False)
    names = [
        n for n, p in model.named_parameters() if p.requires_grad and (weight_decay == 0 or n.startswith("sparse"))
    ]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, golden.meta["lr"], weight_decay=weight_decay)
    method = SIFT(keep=0.101, batches=1, scope=lambda w: w.name.startswith("sparse"))
    run = Run(model, [method], data=lambda: [at(t) for t in range(10)]).attach(optimizer)
    for t in range(1, golden.meta["steps"]):
        run.loss(at(t)).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name in names:
            found = model.get_parameter(name).detach()
            assert torch.allclose(found, golden[f"dense_after_corrected/{name}"][t - 1], atol=ATOL, rtol=0), (t, name)
    for name in ("sparse_a", "sparse_b"):
        support = run[SIFT].masks[name].flatten().nonzero().flatten()
        assert torch.equal(support, golden[f"support_ref/{name}"].sort().values)


# ---------------------------------------------------------------- anchors


@pytest.mark.parametrize("name", ["recadam_sigmoid", "recadam_linear"])
def test_recadam_equals_the_authors(golden, name):
    golden = golden(name)
    meta = golden.meta
    method = RecAdam(
        gamma=meta["pretrain_cof"],
        t0=meta["anneal_t0"],
        k=meta["anneal_k"],
        unit="steps",
        schedule=meta["anneal_fun"],
        scope=lambda w: w.name.startswith("body"),
    )
    for t, share in enumerate(golden["anneal_lambda"].tolist()):
        assert anneal(t + 1, meta["anneal_t0"], meta["anneal_k"], meta["anneal_fun"]) == pytest.approx(share, abs=1e-14)
    model = Given(golden, start="pretrain")  # setup takes its references: the anchors
    optimizer = adamw_b(golden, model)
    run = Run(model, [method], total_steps=meta["steps"]).attach(optimizer)
    with torch.no_grad():
        for n, p in model.named_parameters():
            p.copy_(golden[f"init/{n}"])
    for t in range(meta["steps"]):
        run.loss(at(t)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_at(golden, model, t)
    assert_moments(golden, model, optimizer)


def test_prior_decay_is_decoupled_l2sp(golden):
    """`corrected`: the head decays toward zero; their code meant to leave it out and pulls it to its random start."""
    golden = golden("prior_wd_adamw")
    meta = golden.meta
    model = Given(golden)
    named = dict(model.named_parameters())
    bare = {"params": [p for n, p in named.items() if "bias" in n and not n.startswith("head")], "weight_decay": 0.0}
    rest = {"params": [p for n, p in named.items() if "bias" not in n or n.startswith("head")]}
    optimizer = torch.optim.AdamW(
        [rest, bare], meta["lr"], betas=meta["betas"], eps=meta["eps"], weight_decay=meta["weight_decay"]
    )
    body = L2SP(alpha=meta["weight_decay"], scope=lambda w: w.name.startswith("body") and "bias" not in w.name)
    run = Run(model, [body]).attach(optimizer)
    for t in range(meta["steps"]):
        run.loss(at(t)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_at(golden, model, t, "after_corrected")
