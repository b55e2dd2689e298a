"""WeightMixup against explicit bi-level trainings by autograd; what it must not touch, and what it holds."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import pytest
import torch
from torch.utils.data import DataLoader

from helpers import Net, arguments, assert_same, batches, bert, collate, copied, differs, points, rows, train
from steadytune import EMA, ClipNorm, Method, Run, Trainer, WeightMixup
from steadytune.functional import mixture
from steadytune.methods.bases.bilevel import OuterRows, flat

LR, SHARES_LR = 0.3, 0.02
MATRICES = ("first.weight", "last.weight")


def outer():
    return points(2, seed=8)


def run_of(model, *methods, lr=LR, total=12):
    return Run(model, methods, total_steps=total).attach(torch.optim.SGD(model.parameters(), lr))


def shares(shape, rank):
    ones = {1: [(shape[0], 1), (1, shape[1])], None: [shape], "tensor": [()]}[rank]
    return [torch.ones(s, dtype=torch.float64, requires_grad=True) for s in ones]


def by_autograd(data, *, rank, convex, how):
    """The same training with explicit W and shares, by autograd through the mixture: W, shares, mixtures at the end."""
    start = copied(Net())
    w = {n: t.clone().requires_grad_() for n, t in start.items()}
    alphas = {n: shares(start[n].shape, rank) for n in MATRICES}
    every = [f for n in MATRICES for f in alphas[n]]
    optimizer = torch.optim.AdamW(every, SHARES_LR, weight_decay=0.0)

    def view():
        mixed = {n: mixture(alphas[n], w[n], start[n], convex=convex) for n in MATRICES}
        return {**w, **mixed}

    def loss(batch):
        return torch.func.functional_call(Net(), view(), kwargs=batch)["loss"]

    def step(gradients):
        for f, g in zip(every, gradients, strict=True):
            f.grad = g
        optimizer.step()
        with torch.no_grad():
            for f in every:
                f.clamp_(0, 1)

    for t, batch in enumerate(data):
        found = torch.autograd.grad(loss(batch), [*w.values(), *every])
        with torch.no_grad():
            for p, g in zip(w.values(), found[: len(w)], strict=True):
                p.sub_(LR * g)
        total = found[len(w) :]
        if how != "joint":
            on_others = torch.autograd.grad(loss(outer()[t % 2]), [*w.values(), *every])
            v, total = on_others[: len(w)], on_others[len(w) :]
        if how == "difference":
            inner = torch.autograd.grad(loss(batch), list(w.values()), create_graph=True)
            along = sum((g * LR * q).sum() for g, q in zip(inner, v, strict=True))
            total = [a - c for a, c in zip(total, torch.autograd.grad(along, every), strict=True)]
        step(total)
    raw = {n: t.detach() for n, t in w.items()}
    return raw, {n: [f.detach() for f in fs] for n, fs in alphas.items()}, {n: t.detach() for n, t in view().items()}


@pytest.mark.parametrize("how", ["joint", "first", "difference"])
@pytest.mark.parametrize(("rank", "convex"), [(1, True), (1, False), (None, True), ("tensor", True)])
def test_weights_shares_and_mixtures_equal_autograd(how, rank, convex):
    data = points(6)
    method = WeightMixup(
        outer=None if how == "joint" else outer,
        order="first" if how == "joint" else how,
        rank=rank,
        convex=convex,
        lr=SHARES_LR,
        schedule="constant",
        scope="linear",
    )
    run = train(run_of(Net(), method), data)
    raw, alphas, mixtures = by_autograd(data, rank=rank, convex=convex, how=how)
    atol = 1e-5 if how == "difference" else 1e-12
    assert_same({n: run.raw(n) for n in raw}, raw, atol=atol)
    assert_same(run[WeightMixup].alphas, alphas, atol=atol)
    assert_same(copied(run.model), mixtures, atol=atol)  # what is live, evaluated and saved
    assert min(float(f.min()) for f in flat(alphas)) < 0.97
    assert differs(raw, mixtures)


@pytest.mark.parametrize("alpha", [0.4, {"first.weight": 0.2, "last.weight": 0.7}], ids=["number", "given"])
def test_given_shares_stay_and_nothing_of_them_is_clipped(alpha):
    """B3: neither W0 nor the shares have a gradient, change, or add to the norm that is clipped."""
    given = alpha
    if isinstance(alpha, dict):
        given = {n: [torch.full((t.size(0), 1), alpha[n]), torch.ones(1, t.size(1))] for n, t in copied(Net()).items()
                 if n in alpha}  # fmt: skip
    start, batch = copied(Net()), points(1)[0]
    run = run_of(Net(), WeightMixup(alpha=given), ClipNorm(1e6))
    train(run, points(3))
    held = {n: [f.clone() for f in fs] for n, fs in run[WeightMixup].alphas.items()}
    value = {n: alpha if isinstance(alpha, float) else alpha.get(n) for n in MATRICES}
    leaves = {n: run.raw(n).clone().requires_grad_() for n in start}
    mixed = {n: value[n] * leaves[n] + (1 - value[n]) * start[n] for n in MATRICES}
    loss = torch.func.functional_call(Net(), {**leaves, **mixed}, kwargs=batch)["loss"]
    gradients = torch.autograd.grad(loss, list(leaves.values()))
    train(run, [batch])
    norm = torch.linalg.vector_norm(torch.cat([g.flatten() for g in gradients]))
    assert torch.allclose(run[ClipNorm].norm, norm, atol=1e-7)
    assert_same(run[WeightMixup].alphas, held)
    assert_same({n: run.reference(n) for n in MATRICES}, {n: start[n] for n in MATRICES})
    assert run.passes.plain == 1


@pytest.mark.parametrize(("order", "passes"), [("first", 2), ("difference", 4)])
def test_passes_and_bytes(order, passes):
    """W0 and W (or the mixture) between steps; q takes the place of the gradient that the step is done with."""
    seen = []

    class Watched(WeightMixup):
        def contraction(self, run, name, gradient, value):
            seen.append(sum(p.grad.nbytes for p in run.model.parameters() if p.grad is not None))
            return super().contraction(run, name, gradient, value)

    net = Net()
    mixed = sum(p.nbytes for n, p in net.named_parameters() if n in MATRICES)
    run = run_of(net, Watched(outer=outer, order=order))
    train(run, points(2))
    assert run.passes.plain == passes
    own = sum(t.nbytes for t in flat(run[Watched].alphas)) * 3
    assert run.nbytes() == 2 * mixed + own
    of_shares = seen[len(seen) // 2 :] if order == "first" else seen[-2 * len(MATRICES) :]
    assert max(of_shares) == max(p.nbytes for p in net.parameters())  # one gradient at a time, naive: all


def test_the_outer_pass_leaves_the_dropout_of_the_task_alone():
    """And the raw weights: only the shares know of the other rows."""
    data = batches(2)
    ends = []
    for methods in ([WeightMixup(alpha=1.0)], [WeightMixup(outer=functools.partial(batches, 2), order="difference")]):
        torch.manual_seed(1)
        run = train(run_of(bert(), *methods), data[:1])
        ends.append({n: run.raw(n).clone() for n, _ in run.model.named_parameters()} | {"rng": torch.get_rng_state()})
    assert_same(*ends)


def test_the_difference_on_a_transformer_under_dropout_equals_autograd(monkeypatch):
    """Naive: a dropout draw for each of the two passes, whose noise is divided by the small step."""
    learned = []
    monkeypatch.setattr(WeightMixup, "learn", lambda self, run, gradients: learned.append(gradients))
    data = batches(2, 8)
    model, start = bert(dtype=torch.float64), copied(bert(dtype=torch.float64))
    method = WeightMixup(outer=lambda: data[1:], order="difference", rank="tensor")
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    run = Run(model, [method], total_steps=4).attach(optimizer)
    given = torch.tensor(0.6, dtype=torch.float64)
    for factor in flat(run[WeightMixup].alphas):
        factor.copy_(given)
    run.loss(data[0]).backward()
    gradient = {n: p.grad.clone() * (given if n in run[WeightMixup].alphas else 1) for n, p in model.named_parameters()}
    optimizer.step()
    w = {n: run.raw(n).clone().requires_grad_() for n in start}
    alphas = {n: given.clone().requires_grad_() for n in run[WeightMixup].alphas}
    twin = bert(dtype=torch.float64)

    def loss(batch, label):
        view = {n: torch.lerp(start[n], w[n], alphas[n]) if n in alphas else w[n] for n in w}
        run.index = 0
        torch.manual_seed(run.draw_seed(label, rank=True))
        run.index = 1
        return torch.func.functional_call(twin, view, kwargs=batch).loss

    def slope(n):
        state = optimizer.state[model.get_parameter(n)]
        m, v = state["exp_avg"] / (1 - 0.9), state["exp_avg_sq"] / (1 - 0.999)
        d = v.sqrt() + 1e-8
        return torch.where(v > 0, 1e-2 / d * (1 - m * gradient[n] / (v.sqrt() * d)), 0.0)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        others = loss(data[1], "mixup outer")
        direct = torch.autograd.grad(others, list(alphas.values()), retain_graph=True)
        v = dict(zip(w, torch.autograd.grad(others, list(w.values())), strict=True))
        inner = torch.autograd.grad(loss(data[0], "mixup inner"), list(w.values()), create_graph=True)
        along = sum((g * slope(n) * v[n]).sum() for n, g in zip(w, inner, strict=True))
        indirect = torch.stack(torch.autograd.grad(along, list(alphas.values())))
    found = torch.stack(list(learned[0])) - torch.stack(direct)
    assert torch.linalg.vector_norm(found + indirect) < 1e-3 * torch.linalg.vector_norm(indirect)


@dataclass
class Gradients(Method):
    """Gradients before the optimizer's step and after it."""

    def before_step(self, run, weights):
        self.before = {w.name: w.grad.clone() for w in weights}

    def after_step(self, run, weights):
        self.after = {w.name: w.grad.clone() for w in weights if w.grad is not None}


def test_the_gradient_of_the_step_stays_for_the_methods_that_come_after():
    """Naive: the directions are written into it, and a second bi-level method takes the slope at the directions."""
    model = Net()
    run = Run(model, [WeightMixup(outer=outer, order="difference"), Gradients()], total_steps=2)
    run.attach(torch.optim.AdamW(model.parameters(), 1e-2))
    train(run, points(1))
    assert_same(run[Gradients].before, run[Gradients].after)


# ---------------------------------------------------------------- outer rows


def numbers():
    return DataLoader([{"x": i} for i in range(5)], batch_size=2, shuffle=True)


def drawn(reader, n):
    with torch.random.fork_rng():
        return [reader.next()["x"].tolist() for _ in range(n)]


def test_each_pass_over_the_outer_rows_has_an_order_of_its_own_and_can_be_resumed():
    reader = OuterRows(numbers, seed=3)
    found = drawn(reader, 9)
    orders = [[*found[i], *found[i + 1], *found[i + 2]] for i in (0, 3, 6)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in orders)
    assert len(set(map(tuple, orders))) == 3
    for taken in range(9):
        reader = OuterRows(numbers, seed=3)
        drawn(reader, taken)
        resumed = OuterRows(numbers, seed=3)
        resumed.seek(*reader.at)
        assert drawn(resumed, 9 - taken) == found[taken:]
    assert drawn(OuterRows(numbers, seed=4), 9) != found


def test_a_source_without_batches_is_an_error():
    with pytest.raises(ValueError, match="outer gives no batch"):
        OuterRows(list, seed=0).next()
    spent = iter(points(2))
    with pytest.raises(ValueError, match="each time it is called"):
        drawn(OuterRows(lambda: ({"x": b["x"]} for b in spent), seed=0), 3)


# ---------------------------------------------------------------- refusals


def test_what_cannot_be_is_refused_before_training(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"outer=0.2\) holds out a share .* only steadytune.fit can"):
        run_of(Net(), WeightMixup())
    with pytest.raises(ValueError, match=r"float32 weights, got torch.bfloat16"):
        run_of(bert(dtype=torch.bfloat16), WeightMixup(outer=outer, order="difference"))
    run_of(bert(dtype=torch.bfloat16), WeightMixup(outer=outer))
    model = Net()
    factored = torch.optim.Adafactor(model.parameters())
    with pytest.raises(ValueError, match=r"derivative of Adafactor's update .* precondition=False"):
        Run(model, [WeightMixup(outer=outer, order="difference")], total_steps=3).attach(factored)
    with monkeypatch.context() as patched:
        patched.setattr(Run, "sharded", property(lambda run: True))
        with pytest.raises(ValueError, match="WeightMixup needs whole weights"):
            run_of(Net(), WeightMixup(outer=outer))
    with pytest.raises(ValueError, match=r"alpha has no share for 'last\.weight'"):
        run_of(Net(), WeightMixup(alpha={"first.weight": [torch.ones(())]}))
    with pytest.raises(ValueError, match="EMA and WeightMixup are both an average of"):
        run_of(Net(), EMA(), WeightMixup(alpha=0.5))
    with pytest.raises(ValueError, match="WeightMixup needs the number of optimizer steps"):
        run_of(Net(), WeightMixup(outer=outer), total=None).loss(points(1)[0])
    run_of(Net(), WeightMixup(alpha=0.5), total=None).loss(points(1)[0])
    mixup = WeightMixup(outer=functools.partial(batches, 2), order="difference")
    with pytest.raises(ValueError, match=r"WeightMixup subtracts gradients.*order='first'"):
        Trainer(bert(), arguments(tmp_path, bf16=True), train_dataset=rows(8), data_collator=collate, methods=[mixup])


def test_another_set_of_given_shares_is_another_recipe():
    def with_shares(value):
        given = {n: [torch.full((), value)] for n in MATRICES}
        return run_of(Net(), WeightMixup(alpha=given))

    saved = train(with_shares(0.5), points(1)).state_dict()
    with_shares(0.5).load_state_dict(saved)
    with pytest.raises(ValueError, match=r"WeightMixup.alpha was 'of 2 weights, checksum"):
        with_shares(0.25).load_state_dict(saved)


def test_weights_with_one_axis_have_one_factor():
    run = train(run_of(Net(), WeightMixup(outer=outer, scope="all")), points(2))
    assert {n: [f.shape for f in fs] for n, fs in run[WeightMixup].alphas.items()} == {
        "first.weight": [(5, 1), (1, 6)],
        "first.bias": [(5,)],
        "last.weight": [(3, 1), (1, 5)],
        "last.bias": [(3,)],
    }
