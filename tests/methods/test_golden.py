"""Trajectories of the authors' code (DPS, Mixout, prior decay): equal to 1e-10 in float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from steadytune import ClipNorm, DPSDense, DPSMix, Mixout, Run, WeightMixup
from steadytune.functional import mix, selecting, stage_length

ATOL = 1e-10


class MLP(nn.Module):
    """The network of the recordings: tanh between linear layers, cross entropy."""

    def __init__(self, golden):
        super().__init__()
        dims = golden.meta["dims"]
        self.layers = nn.ModuleList(nn.Linear(i, o, dtype=torch.float64) for i, o in pairwise(dims))
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(golden[f"init/{name.removeprefix('layers.')}"])

    def forward(self, x, y=None):
        for layer in self.layers[:-1]:
            x = torch.tanh(layer(x))
        x = self.layers[-1](x)
        return x if y is None else (nn.functional.cross_entropy(x, y), x)


def recorded(method, golden):
    """The method with the recorded draws of columns."""

    class Recorded(type(method)):
        def columns(self, run, weight):
            return golden[f"colmask/{weight.name.removeprefix('layers.')}"][run.index].view(1, -1).double()

    method.__class__ = Recorded
    return method


def optimizer_of(golden, model):
    meta = golden.meta
    if meta["optimizer"] == "sgd":
        return torch.optim.SGD(model.parameters(), meta["lr"], weight_decay=meta["weight_decay"])
    return torch.optim.AdamW(
        model.parameters(), meta["lr"], betas=meta["betas"], eps=meta["eps"], weight_decay=meta["weight_decay"]
    )


def replay(golden, method, *, prefix="", grads=True):
    """Train as recorded; compare gradients (before clipping), losses, weights and masks step by step."""
    model = MLP(golden)
    optimizer = optimizer_of(golden, model)
    recipe = [method]
    if golden.meta.get("clip_grad_norm"):
        recipe.append(ClipNorm(golden.meta["clip_grad_norm"]))
    steps = golden["X"].size(0)
    run = Run(model, recipe, total_steps=golden.meta.get("max_steps", steps)).attach(optimizer)
    record = golden["record_steps"].tolist() if "record_steps" in golden else list(range(steps))
    masks = []
    for t in range(steps):
        loss = run.loss({"x": golden["X"][t], "y": golden["Y"][t]})
        assert torch.allclose(loss.detach(), golden["loss"][t], atol=ATOL, rtol=0) or prefix
        loss.backward()
        optimizer.step()
        if ClipNorm in [type(m) for m in run.methods]:
            assert torch.allclose(run[ClipNorm].norm, golden["grad_norm"][t], atol=ATOL, rtol=0)
        if t in record:
            for name, p in model.named_parameters():
                key = name.removeprefix("layers.")
                where = record.index(t)
                assert torch.allclose(p.detach(), golden[f"{prefix}after/{key}"][where], atol=ATOL, rtol=0), (t, key)
                if grads and not prefix and len(recipe) == 1:
                    assert torch.allclose(p.grad, golden[f"grad/{key}"][where], atol=ATOL, rtol=0), (t, key)
        now = {k.removeprefix("layers."): m.clone() for k, m in getattr(run.methods[0], "masks", {}).items()}
        if now and not (masks and masks[-1][0] == stage_number(run)):
            masks.append((stage_number(run), now))
        optimizer.zero_grad()
    run.finish()
    return model, run, optimizer, [m for _, m in masks]


def stage_number(run):
    return run.index // run.methods[0].stage(run)


def check_masks(golden, masks, prefix):
    names = [k.removeprefix(prefix) for k in golden.keys(prefix)]
    assert names
    for name in names:
        expected = golden[prefix + name].bool()
        assert len(masks) >= len(expected)
        for cycle, mask in enumerate(expected):
            assert torch.equal(masks[cycle][name], mask)


@pytest.mark.parametrize("name", ["dps_dense_sgd", "dps_dense_adamw_clip"])
def test_dps_dense_equals_the_authors(golden, name):
    golden = golden(name)
    method = DPSDense(keep=1 - golden.meta["p"], update_ratio=golden.meta["update_ratio"])
    model, _, optimizer, masks = replay(golden, method)
    check_masks(golden, masks, "mask/")
    assert torch.allclose(model(golden["X_eval"]), golden["eval_logits"], atol=ATOL, rtol=0)
    for key in golden.keys("final_exp_avg/"):
        parameter = model.get_parameter("layers." + key.removeprefix("final_exp_avg/"))
        assert torch.allclose(optimizer.state[parameter]["exp_avg"], golden[key], atol=ATOL, rtol=0)


@pytest.mark.parametrize("name", ["dps_mix_sgd", "dps_mix_adamw_long"])
def test_dps_mix_equals_the_authors_with_their_backward(golden, name):
    golden = golden(name)
    method = DPSMix(keep=1 - golden.meta["p"], update_ratio=golden.meta["update_ratio"], rescale_gradient=False)
    model, run, _, masks = replay(golden, recorded(method, golden))
    assert run.methods[0].stage(run) == golden.meta["us"]
    check_masks(golden, masks, "mask/")
    assert torch.allclose(model(golden["X_eval"]), golden["eval_logits"], atol=ATOL, rtol=0)


def test_dps_mix_equals_the_exact_derivative(golden):
    golden = golden("dps_mix_sgd")
    method = DPSMix(keep=1 - golden.meta["p"], update_ratio=golden.meta["update_ratio"])
    *_, masks = replay(golden, recorded(method, golden), prefix="exact_")
    check_masks(golden, masks, "exact_mask/")


def test_dps_squares_equal_the_recorded_sums(golden):
    golden = golden("dps_dense_sgd")

    seen = []

    class Watched(DPSDense):
        def scores(self, run):
            seen.append({k: v.clone() for k, v in self.squares.items()})
            return super().scores(run)

    replay(golden, Watched(keep=1 - golden.meta["p"], update_ratio=golden.meta["update_ratio"]))
    for key in golden.keys("gam/"):
        for cycle, gam in enumerate(golden[key]):
            assert torch.allclose(seen[cycle]["layers." + key.removeprefix("gam/")], gam, atol=ATOL, rtol=0)


def test_dps_schedule_equals_the_authors(golden):
    golden = golden("dps_schedule")
    rows = zip(golden["max_steps"], golden["update_ratio"], golden["us"], golden["stage"], strict=True)
    for total, ratio, us, stages in rows:
        length = stage_length(int(total), float(ratio))
        assert length == us
        mine = [2 if selecting(i, length) else 1 for i in range(int(total))]
        assert mine == stages[: int(total)].tolist()


class Layer(nn.Module):
    """One recorded linear layer, whose loss has the recorded gradient at its output."""

    def __init__(self, reference):
        super().__init__()
        self.linear = nn.Linear(*reference.T.shape, dtype=torch.float64)
        with torch.no_grad():
            self.linear.weight.copy_(reference)

    def forward(self, x, grad_out):
        y = self.linear(x)
        return {"loss": (y * grad_out).sum(), "logits": y}


def one_step(method, reference, weight, bias, inputs):
    """Outputs of the forward, then gradients of weight and inputs as the optimizer gets them."""
    model = Layer(reference)
    run = Run(model, [method])
    with torch.no_grad():
        model.linear.weight.copy_(weight)
        model.linear.bias.copy_(bias)
    run.attach(torch.optim.SGD(model.parameters(), 0.1))
    seen = []
    model.linear.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
    x = inputs["x"].clone().requires_grad_()
    run.loss({"x": x, "grad_out": inputs["grad_out"]}).backward()
    run.optimizer.step()
    return seen[0], model.linear.weight.grad, x.grad


@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "authors"])
def test_mixout_operation_equals_the_authors(golden, case, exact):
    golden = golden("mixout_ops")
    get = {k.split("/")[1]: golden[k] for k in golden.keys(f"case{case}/")}
    meta = golden.meta["cases"][case]
    reference, columns = get.get("W0", torch.zeros_like(get["W"])), get["colmask"].double().view(1, -1)

    class Recorded(Mixout):
        def columns(self, run, weight):
            return columns

    if not meta["training"]:
        y = nn.functional.linear(get["x"], get["W"], get["b"])  # between steps the model holds W itself
        assert torch.allclose(y, get["y"], atol=ATOL, rtol=0)
        return
    method = Recorded(keep=1 - meta["p"], rescale_gradient=exact)
    y, found, grad_x = one_step(method, reference, get["W"], get["b"], get)
    assert torch.allclose(y, get["y"], atol=ATOL, rtol=0)
    assert torch.allclose(grad_x, get["grad_x"], atol=ATOL, rtol=0)
    expected = get.get("grad_W_exact") if exact else get["grad_W_ref"]
    if expected is not None:
        assert torch.allclose(found, expected, atol=ATOL, rtol=0)
    vector = mix(get.get("vec_w0", torch.zeros(5).double()), get["vec_w"], get["vec_mask"], method.keep)
    assert torch.allclose(vector, get["vec_out"], atol=ATOL, rtol=0)


@pytest.mark.parametrize("case", [0, 1])
def test_a_mixed_layer_in_a_run_equals_the_authors(golden, case):
    golden = golden("blo_linear")
    get = {k.split("/")[1]: golden[k] for k in golden.keys(f"case{case}/")}
    shares = {"linear.weight": [get["alpha1"], get["alpha2"]]}
    method = WeightMixup(alpha=shares, convex=False)
    y, found, grad_x = one_step(method, get["W0"], get["W"], get["b"], get)
    assert torch.allclose(y, get["y"], atol=ATOL, rtol=0)
    assert torch.allclose(found, get["grad_W"], atol=ATOL, rtol=0)
    assert torch.allclose(grad_x, get["grad_x"], atol=ATOL, rtol=0)


def test_mixout_training_equals_the_authors(golden):
    golden = golden("mixout_train_sgd")
    last = f"layers.{len(golden.meta['dims']) - 2}.weight"
    method = Mixout(
        keep=1 - golden.meta["p"], rescale_gradient=False, scope=lambda w: w.kind == "linear" and w.name != last
    )
    model, *_ = replay(golden, recorded(method, golden))
    assert torch.allclose(model(golden["X_eval"]), golden["eval_logits"], atol=ATOL, rtol=0)
