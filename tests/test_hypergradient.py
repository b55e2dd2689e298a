"""Hypergradients: closed forms, exact autograd, recorded trajectories; and what a difference must leave as it was."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from helpers import batches, bert, differs
from steadytune import hypergradient
from steadytune.functional import contraction, mixture
from steadytune.hypergradient import (
    SGD,
    AdamW,
    check_slope,
    conjugate_gradient,
    difference,
    moved,
    neumann,
    slope,
    unroll,
)

ATOL = 1e-10
ETA, CURVATURE, STEP = 0.3, 0.8, 0.5
A, C, W = (torch.tensor([v], dtype=torch.float64) for v in ([0.4, -1.0], [2.0, 0.5], [1.5, 0.7]))


def inner(weights, alphas):
    """L1 = h/2 (W - a)^2."""
    return CURVATURE / 2 * (weights[0] - alphas[0]).square().sum()


def outer(weights, alphas):
    """L2 = 1/2 (W - c)^2."""
    return (weights[0] - C).square().sum() / 2


def close(found, expected, *, rtol=0.0, atol=ATOL):
    return all(torch.allclose(a, b, rtol=rtol, atol=atol) for a, b in zip(found, expected, strict=True))


def cross(q, at):
    """grad_a L1 = -h (W - a), its derivative along q by difference."""
    weight = at.clone()

    def gradient(by):
        with moved([weight], q, by):
            return [-CURVATURE * (weight - A)]

    found = difference(gradient, q)
    assert torch.equal(weight, at)  # bit for bit
    return found


def hessian(p):
    weight = A.clone()

    def gradient(by):
        with moved([weight], p, by):
            return [CURVATURE * (weight - A)]

    return difference(gradient, p)


# ---------------------------------------------------------------- closed forms


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_k_steps_equal_their_closed_form(steps):
    total, (end,) = unroll(inner, outer, [W], [A], SGD(ETA), steps=steps)
    expected = (1 - (1 - ETA * CURVATURE) ** steps) * (end - C)
    assert close(total, [expected])
    assert close([end], [A + (1 - ETA * CURVATURE) ** steps * (W - A)])


def test_the_difference_equals_the_exact_single_step_and_the_toy_of_the_paper():
    (total,), (end,) = unroll(inner, outer, [W], [A], SGD(ETA))
    (found,) = cross([ETA * (end - C)], W)
    assert close([-found], [total], atol=1e-6 * float(total.abs().min()))
    assert close([total], [ETA * CURVATURE * (end - C)])


@pytest.mark.parametrize("terms", [1, 2, 5])
def test_neumann_equals_its_closed_form(terms):
    v = [A - C]  # W* = a
    found = cross(neumann(hessian, v, step=STEP, terms=terms), A)
    assert close([-found[0]], [(1 - (1 - STEP * CURVATURE) ** terms) * (A - C)], atol=1e-9)


def test_conjugate_gradient_equals_its_closed_form_and_more_iterations_change_nothing():
    for iterations in (1, 2, 9):  # it has converged after the first: naive, the second divides 0 by 0
        found = cross(conjugate_gradient(hessian, [A - C], iterations=iterations), A)
        assert close([-found[0]], [A - C], atol=1e-9)
    assert close(conjugate_gradient(hessian, [torch.zeros_like(A)], iterations=2), [torch.zeros_like(A)])


def spd(size=6):
    torch.manual_seed(3)
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T + 0.5 * torch.eye(size, dtype=torch.float64)


def test_neumann_and_conjugate_gradient_solve_with_several_tensors():
    matrix, right = spd(), torch.randn(6, dtype=torch.float64)

    def product(p):
        return list((matrix @ torch.cat([t.flatten() for t in p])).split([2, 4]))

    v = list(right.split([2, 4]))
    exact = torch.linalg.solve(matrix, right)
    assert close([torch.cat(conjugate_gradient(product, v, iterations=6))], [exact], atol=1e-8)
    step = 1 / float(torch.linalg.eigvalsh(matrix).max())
    assert close([torch.cat(neumann(product, v, step=step, terms=800))], [exact], atol=1e-6)
    damped = torch.linalg.solve(matrix + 2 * torch.eye(6), right)
    assert close([torch.cat(conjugate_gradient(product, v, iterations=6, damping=2.0))], [damped], atol=1e-8)


def test_conjugate_gradient_stops_before_negative_curvature():
    """There a quadratic has no minimum: naive, it goes on along it, uphill."""
    curvature = torch.tensor([1.0, -2.0], dtype=torch.float64)
    v = torch.tensor([1.0, 0.5], dtype=torch.float64)
    first = conjugate_gradient(lambda p: [curvature * p[0]], [v], iterations=1)
    assert float(first[0].abs().sum()) > 0
    for iterations in (2, 5):
        assert close(conjugate_gradient(lambda p: [curvature * p[0]], [v], iterations=iterations), first)


# ---------------------------------------------------------------- optimizers that can be differentiated


OPTIMIZERS = {
    "sgd": (SGD(0.1, momentum=0.9, weight_decay=0.05), torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.05}),
    "adamw": (AdamW(0.1, weight_decay=0.05), torch.optim.AdamW, {"weight_decay": 0.05}),
    "adam": (AdamW(0.1, betas=(0.8, 0.9), eps=1e-3), torch.optim.Adam, {"betas": (0.8, 0.9), "eps": 1e-3}),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_updates_are_those_of_torch(name):
    update, kind, options = OPTIMIZERS[name]
    parameter = nn.Parameter(W.clone())
    optimizer = kind([parameter], 0.1, **options)
    for _ in range(3):
        optimizer.zero_grad()
        inner([parameter], [A]).backward()
        optimizer.step()
    _, (end,) = unroll(inner, outer, [W], [A], update, steps=3)
    assert close([end], [parameter.detach()], atol=1e-12)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_exact_steps_equal_a_difference_of_whole_trainings(name):
    update = OPTIMIZERS[name][0]
    (total,), _ = unroll(inner, outer, [W], [A], update, steps=3)
    for i in range(2):
        ends = []
        for by in (1e-5, -1e-5):
            a = A.clone()
            a[0, i] += by
            ends.append(outer(unroll(inner, outer, [W], [a], update, steps=3)[1], [a]))
        assert float(total[0, i]) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-5)


def test_weights_without_a_gradient_give_no_nan_through_adam():
    """Rows of an embedding that the batch lacks: naive, the root of their second moment has an infinite derivative."""

    def half(weights, alphas):
        return inner([weights[0][:, :1]], [alphas[0][:, :1]])

    (total,), _ = unroll(half, outer, [W], [A], AdamW(0.1), steps=2)
    assert total.isfinite().all()
    assert total[0, 1] == 0 != total[0, 0]


@pytest.mark.parametrize("block", [2, 2**16])
@pytest.mark.parametrize("kind", ["sgd", "nesterov", "adam", "adamw"])
def test_the_slope_is_the_derivative_of_the_step_just_taken(kind, block, monkeypatch):
    monkeypatch.setattr("steadytune.hypergradient.BLOCK", block)
    options = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
        "nesterov": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        "adam": lambda p: torch.optim.Adam(p, 0.1, eps=1e-3),
        "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.1),
    }

    def end(last):
        parameter = nn.Parameter(torch.tensor([0.3, -0.2, 0.1], dtype=torch.float64))
        optimizer = options[kind]([parameter])
        for gradient in ([0.5, 0.1, 0.0], [-0.2, 0.4, 0.0], last):
            parameter.grad = torch.tensor(gradient, dtype=torch.float64)
            optimizer.step()
        return parameter.detach(), optimizer, parameter

    last = [0.3, -0.6, 0.0]
    _, optimizer, parameter = end(last)
    found = slope(optimizer.param_groups[0], optimizer.state[parameter], parameter.grad) * torch.ones(3)
    for i in range(2):
        ahead, behind = ([x + by * (j == i) for j, x in enumerate(last)] for by in (1e-6, -1e-6))
        expected = -(end(ahead)[0][i] - end(behind)[0][i]) / 2e-6
        assert float(found[i]) == pytest.approx(float(expected), rel=1e-5)
    assert float(found[2]) == (0.0 if kind.startswith("adam") else pytest.approx(float(found[0])))


@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.Adafactor, lr=0.1),
        functools.partial(torch.optim.AdamW, amsgrad=True),
        functools.partial(torch.optim.Adam, weight_decay=0.1),
        functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.5),
    ],
    ids=["factored", "amsgrad", "coupled decay", "dampening"],
)
def test_optimizers_of_unknown_slope_are_refused(optimizer):
    with pytest.raises(ValueError, match=r"derivative of \w+'s update is not known.*precondition=False"):
        check_slope(optimizer([nn.Parameter(W.clone())]))


# ---------------------------------------------------------------- differences


def test_half_precision_is_refused_and_an_error_inside_still_restores():
    with pytest.raises(ValueError, match=r"float32 weights, got torch.bfloat16"), moved([W.bfloat16()], [W], 1.0):
        pass
    weight = torch.randn(50)
    before = weight.clone()
    with pytest.raises(KeyboardInterrupt), moved([weight], [torch.randn(50)], 0.1):
        raise KeyboardInterrupt
    assert torch.equal(weight, before)


def test_a_direction_of_zeros_has_derivative_zero():
    assert close(difference(lambda by: [A + by * 0], [torch.zeros_like(A)]), [torch.zeros_like(A)])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-4), (torch.float32, 1e-3)])
def test_differences_equal_exact_second_derivatives_on_a_transformer(dtype, tolerance):
    """Under dropout, the same draw in both passes: with another draw each, the noise is divided by the small step."""
    model, (batch,) = bert(dtype=dtype), batches(1, 8)
    weights = list(model.parameters())
    v = [torch.randn_like(w) for w in weights]
    product = []
    for exact in (True, False):

        def gradients(exact=exact):
            torch.manual_seed(4)
            return torch.autograd.grad(model(**batch).loss, weights, create_graph=exact)

        if exact:
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                product.append(torch.autograd.grad(hypergradient.dot(gradients(), v), weights))
        else:

            def gradient(by):
                with torch.no_grad(), moved(weights, v, by), torch.enable_grad():
                    return gradients()

            product.append(difference(gradient, v))
    error = hypergradient.length(torch._foreach_sub(list(product[1]), list(product[0])))
    assert float(error / hypergradient.length(product[0])) < tolerance


# ---------------------------------------------------------------- recorded trajectories


@pytest.mark.parametrize("case", [0, 1])
def test_the_mixed_layer_equals_the_authors(golden, case):
    golden = golden("blo_linear")
    x, w, b, w0, a1, a2, y, out = (
        golden[f"case{case}/{k}"] for k in ("x", "W", "b", "W0", "alpha1", "alpha2", "y", "grad_out")
    )
    assert close([x @ mixture([a1, a2], w, w0, convex=False).T + b], [y])
    convex = x @ mixture([a1, a2], w, w0, convex=True).T + b
    assert close([convex], [golden[f"case{case}/y_convex_not_reference"]])
    gradient = out.T @ x
    assert close([gradient * a1 * a2], [golden[f"case{case}/grad_W"]])
    found = contraction([a1, a2], gradient, w, w0, convex=False)
    assert close(found, [golden[f"case{case}/grad_alpha{i}"] for i in (1, 2)])


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("shapes", [[(4, 1), (1, 5)], [(4, 5)], [()]], ids=str)
def test_the_contraction_is_autograd_through_the_mixture(shapes, convex):
    torch.manual_seed(0)
    w, w0, g = (torch.randn(4, 5, dtype=torch.float64) for _ in range(3))
    factors = [torch.rand(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    expected = torch.autograd.grad((g * mixture(factors, w, w0, convex=convex)).sum(), factors)
    assert close(contraction([f.detach() for f in factors], g, w, w0, convex=convex), expected)


def test_shares_of_one_half_and_of_the_ends():
    """B1: rank 1 at 0.5 halves both weights once more in the authors' form; 1 is W, 0 is W0, bit for bit."""
    w, w0 = torch.randn(4, 5), torch.randn(4, 5)
    for value, expected in ((0.0, w0), (1.0, w)):
        factors = [torch.full((4, 1), value), torch.full((1, 5), value)]
        assert all(torch.equal(mixture(factors, w, w0, convex=c), expected) for c in (True, False))
    factors = [torch.full((4, 1), 0.5), torch.full((1, 5), 0.5)]
    assert close([mixture(factors, w, w0, convex=False)], [(w + w0) / 4], atol=1e-6)
    assert close([mixture(factors, w, w0, convex=True)], [w / 4 + 3 * w0 / 4], atol=1e-6)


class Recorded:
    """The two-layer network of the recording, its first layer mixed."""

    def __init__(self, golden):
        self.golden, self.eta = golden, golden.meta["eta"]
        self.names = ["0.weight", "0.bias", "1.weight", "1.bias"]
        self.w0 = golden["pretrained/0.weight"]

    def loss(self, level, t):
        x, y = self.golden[f"X{level}"][t], self.golden[f"Y{level}"][t]

        def loss(weights, alphas):
            hidden = torch.tanh(x @ mixture(alphas, weights[0], self.w0, convex=False).T + weights[1])
            return nn.functional.cross_entropy(hidden @ weights[2].T + weights[3], y)

        return loss

    def by_contraction(self, loss, weights, alphas):
        """dL/da and dL/dW from the gradient of the mixture: no autograd through alpha."""
        view = [mixture(alphas, weights[0], self.w0, convex=False), *weights[1:]]
        leaves = [v.detach().requires_grad_() for v in view]
        one = [torch.ones(6, 1, dtype=torch.float64), torch.ones(1, 5, dtype=torch.float64)]
        gradients = torch.autograd.grad(loss(leaves, one), leaves)  # shares of 1: the mixture itself
        direct = contraction(alphas, gradients[0], weights[0], self.w0, convex=False)
        return direct, [gradients[0] * alphas[0] * alphas[1], *gradients[1:]]


def test_the_bilevel_run_equals_the_recording(golden):
    """Exact, direct and difference parts of the hypergradient, and the weights and shares they lead to."""
    golden = golden("blo_hypergrad")
    net = Recorded(golden)
    weights = [golden[f"init/{n}"] for n in net.names]
    alphas = [golden[f"alpha_init/0.alpha{i}"] for i in (1, 2)]
    for t in range(golden.meta["iterations"]):

        def recorded(key, t=t):
            return [golden[f"{key}/0.alpha{i}"][t] for i in (1, 2)]

        l1, l2 = net.loss(1, t), net.loss(2, t)
        total, after = unroll(l1, l2, weights, alphas, SGD(net.eta))
        assert close(total, recorded("hyper_total_exact"))
        assert close(after, [golden[f"W_after/{n}"][t] for n in net.names])
        direct, v = net.by_contraction(l2, after, alphas)
        assert close(direct, recorded("hyper_direct"))
        assert close(v, [golden[f"v/{n}"][t] for n in net.names])

        def gradient(by, q=v, l1=l1, weights=weights, alphas=alphas):
            with moved(weights, q, by):
                return net.by_contraction(l1, weights, alphas)[0]

        found = torch._foreach_mul(difference(gradient, v, radius=golden.meta["fd_R"]), -net.eta)
        assert close(found, recorded("hyper_indirect_fd"))
        assert close(found, recorded("hyper_indirect_exact"), rtol=1e-3, atol=1e-6)
        weights = after
        alphas = [(a - golden.meta["beta"] * g).clamp(0, 1) for a, g in zip(alphas, total, strict=True)]
        assert close(alphas, recorded("alpha_after"))
    assert differs({"": torch.cat([a.flatten() for a in alphas])}, {"": torch.ones(11, dtype=torch.float64)})
