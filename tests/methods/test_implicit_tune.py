"""ImplicitTune against closed forms on quadratics and against trainings repeated with another strength."""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from helpers import Net, batches, bert, copied, points, train
from steadytune import L2SP, ImplicitTune, Run, only
from steadytune.methods.bases.bilevel import flat

A, C, START = (torch.tensor(v, dtype=torch.float64) for v in ([2.0, -1.0, 0.3], [1.0, 0.2, 0.9], [0.0, 0.4, -0.5]))
H, LR, STRENGTH, STEPS = 0.8, 0.3, 0.5, 25
FIXED = 1e-12  # a learning rate of the strengths at which they stay


class Bowl(nn.Module):
    """h/2 |W - target|^2, from `START` on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(START.clone())

    def forward(self, target, curvature):
        return {"loss": (curvature * (self.weight - target).square()).sum() / 2}


def outer():
    return [{"target": C, "curvature": 1.0}]


def inner(curvature=H):
    return {"target": A, "curvature": curvature}


def outer_points():
    return points(1, seed=8)


def run_of(model, *methods, optimizer=None):
    return Run(model, methods).attach(optimizer or torch.optim.SGD(model.parameters(), LR))


@pytest.fixture
def learned(monkeypatch):
    """The hypergradients of each step, one number for each strength; nothing is learned from them."""
    found = []
    monkeypatch.setattr(ImplicitTune, "learn", lambda self, run, gradients: found.append(torch.stack(gradients)))
    return found


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("inverse", ["neumann", "cg"])
@pytest.mark.parametrize("terms", [1, 4])
def test_hypergradients_equal_their_closed_forms(inverse, terms, learned):
    """Away from the minimum and at it: W* = (h A + a W0) / (h + a), at which CG gives dL2(W*)/db itself."""
    model = Bowl()
    method = ImplicitTune(outer, start=STRENGTH, inverse=inverse, terms=terms)
    run = train(run_of(model, method), [inner()] * STEPS)
    t = LR / (1 + LR * STRENGTH)
    factor = (1 - (1 - t * (H + STRENGTH)) ** terms) if inverse == "neumann" else 1.0
    w = START
    for step in range(STEPS):
        w = (w - LR * H * (w - A) + LR * STRENGTH * START) / (1 + LR * STRENGTH)
        expected = -STRENGTH * factor / (H + STRENGTH) * ((w - C) * (w - START)).sum()
        assert torch.allclose(learned[step][0], expected, rtol=0, atol=1e-8)
    best = (H * A + STRENGTH * START) / (H + STRENGTH)
    assert torch.allclose(run.model.weight, best, rtol=0, atol=1e-4)
    slope = STRENGTH * H * (START - A) / (H + STRENGTH) ** 2  # dW*/db
    exact = ((best - C) * slope).sum()
    assert torch.allclose(learned[-1][0], factor * exact, rtol=0, atol=1e-4)
    assert abs(float(exact)) > 0.1


@pytest.mark.parametrize("options", [{}, {"inverse": "cg"}], ids=["one term", "cg"])
@pytest.mark.parametrize("start", [1.9, 3.0], ids=["from below", "from above"])
def test_the_strength_comes_to_the_best_one(start, options):
    """Where W* = c: a = h (A - c) / (c - W0) = 2.4."""
    target = {"target": torch.full((3,), 2.0, dtype=torch.float64), "curvature": H}
    aim = {"target": torch.full((3,), 0.5, dtype=torch.float64), "curvature": 1.0}
    model = Bowl()
    model.weight.data.zero_()
    run = train(run_of(model, ImplicitTune(lambda: [aim], start=start, lr=0.02, **options)), [target] * 50)
    assert run[ImplicitTune].strengths()["model"] == pytest.approx(2.4, rel=0.03)


def test_strengths_end_at_their_range_and_are_told(caplog):
    run = run_of(Bowl(), ImplicitTune(outer, toward="zero", start=0.2, least=0.1, most=0.4, lr=0.5))
    train(run, [inner()] * 3)
    assert run[ImplicitTune].strengths()["model"] == pytest.approx(0.4)
    run = run_of(Bowl(), ImplicitTune(lambda: [inner()], toward="zero", start=0.2, least=0.1, most=0.4, lr=0.5))
    train(run, [inner()] * 3)
    assert run[ImplicitTune].strengths()["model"] == pytest.approx(0.1)
    with caplog.at_level("INFO", "steadytune"):
        run.finish()
    assert caplog.messages == ["ImplicitTune: strengths model 0.1"]


def test_cg_acts_through_the_scale_of_adam_and_leaves_to_the_pull_what_has_no_curvature(learned):
    """(h P + a)^-1 by entry; P = 0 where there never was a gradient: naive, that entry's part is lost."""
    model = Bowl()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2, eps=0.1)
    method = ImplicitTune(outer, toward="zero", start=STRENGTH, inverse="cg", terms=3)
    curvature = torch.tensor([0.8, 2.0, 0.0], dtype=torch.float64)
    run = train(run_of(model, method, optimizer=optimizer), [inner(curvature)] * 4)
    w, state = run.model.weight.detach(), optimizer.state[model.weight]
    scale = 1 / ((state["exp_avg_sq"] / (1 - 0.999**4)).sqrt() + 0.1)
    parts = (w - C) / (curvature * scale + STRENGTH) * w
    assert torch.allclose(learned[-1][0], -STRENGTH * parts.sum(), rtol=0, atol=1e-6)
    assert abs(float(parts[2])) > 0.1


def test_strengths_move_also_where_the_learning_rate_is_small():
    """Naive: hypergradients are as small as the learning rate, far below the 1e-8 that Adam adds to their root."""
    model = Net()
    run = run_of(model, ImplicitTune(outer_points, lr=0.1), optimizer=torch.optim.AdamW(model.parameters(), 2e-5))
    train(run, points(4))
    assert abs(math.log(run[ImplicitTune].strengths()["model"] / 0.1)) > 0.2


# ---------------------------------------------------------------- trainings repeated with another strength


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.3),
    "momentum": lambda p: torch.optim.SGD(p, 0.2, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.02),  # whose own derivative the last step does not need
}


@pytest.mark.parametrize("toward", ["pretrained", "zero"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_term_is_the_derivative_of_the_last_step(name, toward, learned):
    data = points(4)

    def end(by=0.0, which=0):
        model = Net()
        method = ImplicitTune(outer_points, toward=toward, per="tensor", start=STRENGTH, scope="linear")
        run = train(run_of(model, method, optimizer=OPTIMIZERS[name](model.parameters())), data[:3])
        flat(run[ImplicitTune].variables)[which].add_(by)
        train(run, data[3:])
        with torch.no_grad():
            return float(model(**outer_points()[0])["loss"])

    end()
    found = learned[3]
    assert found.shape == (2,)  # two matrices
    for i in range(2):
        expected = (end(1e-4, i) - end(-1e-4, i)) / 2e-4
        assert float(found[i]) == pytest.approx(expected, rel=1e-4)


class Pair(nn.Module):
    """A quadratic in three vectors that all curve into each other."""

    def __init__(self, start):
        super().__init__()
        self.a, self.b, self.c = (nn.Parameter(part.clone()) for part in start.split(2))

    def forward(self, matrix, target):
        gap = torch.cat([self.a, self.b, self.c]) - target
        return {"loss": gap @ matrix @ gap / 2}


@pytest.mark.parametrize(("momentum", "terms"), [(0.0, 3), (0.8, 2)])
def test_terms_are_the_derivative_of_as_many_steps(momentum, terms, learned):
    """Of two strengths, and of a weight beyond `only`, which the optimizer's decay pulls; from the minimum on.

    Naive, with momentum: the curvature acts at once with all that later updates will carry of it.
    """
    torch.manual_seed(2)
    root, target = torch.randn(6, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    matrix = root @ root.T / 6
    data, aim = {"matrix": matrix, "target": target}, {"matrix": torch.eye(6).double(), "target": -target}
    pulls = torch.tensor([0.4] * 4 + [0.2] * 2, dtype=torch.float64)
    best = torch.linalg.solve(matrix + (1 - momentum) * pulls.diag(), matrix @ target)

    def end(by=0.0, which=0):
        model = Pair(best)
        optimizer = torch.optim.SGD(model.parameters(), LR, momentum=momentum, weight_decay=0.2)
        method = ImplicitTune(lambda: [aim], toward="zero", per="tensor", start=0.4, terms=terms)
        run = run_of(model, only(method, lambda w: w.name != "c"), optimizer=optimizer)
        for p, u in zip(model.parameters(), (-pulls * best).split(2), strict=True):
            optimizer.state[p]["momentum_buffer"] = u.clone()  # the update that the pull undoes
        flat(run[ImplicitTune].variables)[which].add_(by)
        train(run, [data] * terms)
        with torch.no_grad():
            return float(model(**aim)["loss"]), torch.cat([p.detach() for p in model.parameters()])

    assert torch.allclose(end()[1], best, rtol=0, atol=1e-12)
    found = learned[terms - 1]
    for i in range(2):
        assert float(found[i]) == pytest.approx((end(1e-4, i)[0] - end(-1e-4, i)[0]) / 2e-4, rel=1e-4)


def test_the_curvature_on_a_transformer_under_dropout_equals_autograd(learned):
    """Naive: a dropout draw for each of the two passes, whose noise is divided by the small step."""
    data = batches(2, 8)
    model, twin = bert(dtype=torch.float64), bert(dtype=torch.float64)
    method = ImplicitTune(lambda: data[1:], per="block", start=STRENGTH, terms=2)
    torch.manual_seed(1)
    run = train(run_of(model, method), data[:1])
    assert run.passes.plain == 4
    strengths = run[ImplicitTune].strengths()
    assert list(strengths) == ["rest", "block 0", "block 1"]
    start, anatomy = copied(twin), {w.name: w for w in run.weights()}
    twin.load_state_dict(model.state_dict())
    weights = dict(twin.named_parameters())

    def gradients(batch, label, **options):
        run.index = 0
        torch.manual_seed(run.draw_seed(label, rank=True))
        run.index = 1
        return torch.autograd.grad(twin(**batch).loss, list(weights.values()), **options)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        v = gradients(data[1], "tune outer")
        pulls = [0.0 if run.is_new(anatomy[n]) else STRENGTH for n in weights]
        near = [LR / (1 + LR * a) * x for a, x in zip(pulls, v, strict=True)]
        inner = gradients(data[0], "tune inner", create_graph=True)
        along = sum((g * p).sum() for g, p in zip(inner, near, strict=True))
        product = torch.autograd.grad(along, list(weights.values()))
    parts = {key: torch.zeros(2, dtype=torch.float64) for key in strengths}  # without and with the curvature
    for n, a, x, p, h in zip(weights, pulls, v, near, product, strict=True):
        if a:
            t, gap = LR / (1 + LR * a), weights[n].detach() - start[n]
            parts[run[ImplicitTune].key(anatomy[n])] -= (
                a * t * torch.stack([((2 * x - a * p) * gap).sum(), -(h * gap).sum()])
            )
    first, indirect = torch.stack(list(parts.values())).T
    assert torch.linalg.vector_norm(learned[0] - first - indirect) < 1e-3 * torch.linalg.vector_norm(indirect)


# ---------------------------------------------------------------- the pull


def test_the_pull_is_a_proximal_step_and_all_others_keep_their_decay():
    """W <- (W' + lr a W0) / (1 + lr a): no strength overshoots. The head has no pre-trained value: it decays."""
    model, plain, (batch,) = bert(dtype=torch.float64), bert(dtype=torch.float64), batches(1)
    start, strength = copied(model), 30.0

    def adamw(parameters, decay):
        return torch.optim.AdamW(parameters, 0.05, weight_decay=decay)

    torch.manual_seed(1)
    method = ImplicitTune(lambda: [batch], start=strength, lr=FIXED)
    run = train(run_of(model, method, optimizer=adamw(model.parameters(), 0.1)), [batch])
    optimizer = adamw(plain.parameters(), 0.0)
    torch.manual_seed(1)
    plain(**batch).loss.backward()
    optimizer.step()
    moved = copied(plain)
    pulled = {n: (w + 0.05 * strength * start[n]) / (1 + 0.05 * strength) for n, w in moved.items()}
    decayed = {n: w / (1 + 0.05 * 0.1) for n, w in moved.items()}
    for n, w in copied(model).items():
        assert torch.allclose(w, (decayed if n.startswith("classifier") else pulled)[n], rtol=0, atol=1e-12), n
    assert run[ImplicitTune].strengths() == {"model": pytest.approx(strength)}


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 2000.0}, r"start must be 0 or lie in \[least, most\] = \[0.0001, 1000.0\], got 2000.0"),
        ({"most": 1e-5}, r"most must exceed least=0.0001, got 1e-05"),
        ({"toward": "mean"}, "toward must be one of 'pretrained', 'zero'"),
        ({"outer": 1.0}, r"outer must be a number in \(0, 1\)"),
    ],
)
def test_fields_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImplicitTune(**options)


def test_what_cannot_be_is_refused_before_training(monkeypatch):
    with pytest.raises(ValueError, match=r"ImplicitTune\(outer=0.2\) holds out a share"):
        run_of(Bowl(), ImplicitTune())
    with pytest.raises(ValueError, match=r"float32 weights, got torch.bfloat16"):
        run_of(bert(dtype=torch.bfloat16), ImplicitTune(outer, terms=2))
    with pytest.raises(ValueError, match="ImplicitTune finds no pre-trained trainable weight"):
        run_of(bert(), ImplicitTune(outer, scope=lambda w: w.head))
    with pytest.raises(ValueError, match="ImplicitTune and L2SP are both an anchor of"):
        run_of(Bowl(), ImplicitTune(outer), L2SP())
    for options, refused in (({"terms": 2}, True), ({"inverse": "cg"}, True), ({}, False)):
        model = Bowl()
        factored = torch.optim.Adafactor(model.parameters())
        run_of(Bowl(), ImplicitTune(outer, precondition=False, **options))
        with pytest.raises(ValueError, match=r"Adafactor.* precondition=False") if refused else nullcontext():
            run_of(model, ImplicitTune(outer, **options), optimizer=factored)
    monkeypatch.setattr(Run, "sharded", property(lambda run: True))
    with pytest.raises(ValueError, match="ImplicitTune needs whole weights"):
        run_of(Bowl(), ImplicitTune(outer))
