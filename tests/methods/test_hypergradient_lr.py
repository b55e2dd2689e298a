"""Hypergradient learning rate: trajectories by the paper's rule, written with a rate per step, and its direction."""

from __future__ import annotations

import functools

import pytest
import torch

from helpers import Net, assert_same, batches, bert, copied, points
from steadytune import L2SP, HypergradientLR, Run

LR, STEPS = 0.05, 12
OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=LR),
    "momentum": functools.partial(torch.optim.SGD, lr=LR, momentum=0.9),
    "adam": functools.partial(torch.optim.Adam, lr=LR),
    "adamw": functools.partial(torch.optim.AdamW, lr=LR, weight_decay=0.1, eps=1e-4),
    "fused": functools.partial(torch.optim.AdamW, lr=LR, weight_decay=0.1, fused=True),
}
BETAS = {"multiplicative": 0.3, "additive": 0.005}


def decayed(step: int) -> float:
    return 1 - step / (2 * STEPS)


def reference(make, rule, data):
    """Sets the optimizer's rate before each step; the last direction is read off the weights."""
    net = Net()
    optimizer = make(net.parameters())
    factor, direction, factors = 1.0, None, []
    for index, batch in enumerate(data):
        optimizer.zero_grad()
        net(**batch)["loss"].backward()
        gradient = torch.cat([p.grad.flatten() for p in net.parameters()])
        if direction is not None:
            product = float(gradient @ direction)
            if rule == "additive":
                factor += BETAS[rule] * product / LR
            else:
                factor *= 1 + BETAS[rule] * product / float(gradient.norm() * direction.norm())
        (group,) = optimizer.param_groups
        group["lr"] = rate = LR * decayed(index) * factor
        before = torch.cat([p.detach().flatten() for p in net.parameters()])
        optimizer.step()
        after = torch.cat([p.detach().flatten() for p in net.parameters()])
        direction = (before - after) / rate
        factors.append(factor)
    return copied(net), factors


@pytest.mark.parametrize("rule", BETAS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_rule_of_the_paper_on_top_of_a_schedule(name, rule):
    data = points(STEPS)
    expected, factors = reference(OPTIMIZERS[name], rule, data)
    net = Net()
    optimizer = OPTIMIZERS[name](net.parameters())
    run = Run(net, [HypergradientLR(BETAS[rule], rule)], total_steps=STEPS).attach(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, decayed)
    for factor, batch in zip(factors, data, strict=True):
        run.loss(batch).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        assert float(run[HypergradientLR].factor) == pytest.approx(factor, abs=1e-10)
    assert_same(copied(net), expected, atol=1e-10)
    assert max(abs(factor - 1) for factor in factors) > 0.02  # it acts


@pytest.mark.parametrize(("lr", "grows"), [(1e-3, True), (30.0, False)])
def test_a_rate_too_small_grows_and_one_too_large_shrinks(lr, grows):
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr)
    run = Run(net, [HypergradientLR(0.1)]).attach(optimizer)
    (batch,) = points(1)
    for _ in range(20):
        run.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert (run[HypergradientLR].factor > 1.5) if grows else (run[HypergradientLR].factor < 0.9)


@pytest.mark.parametrize("after", [False, True])
def test_the_pull_of_l2sp_is_multiplied_in_any_order_of_the_list(after):
    """As the docstring says: the pull is part of the update, as the optimizer's own decay is."""
    net = bert(dropout=0.0, dtype=torch.float64)
    methods = [HypergradientLR(beta=1e-9), L2SP(alpha=50.0, scope="linear")]
    run = Run(net, methods if after else methods[::-1]).attach(torch.optim.SGD(net.parameters(), 0.01))
    run[HypergradientLR].factor.fill_(3.0)
    weight = net.bert.encoder.layer[0].output.dense.weight
    start = weight.detach().clone()
    weight.data += 0.1
    run.loss(batches(1)[0]).backward()
    gradient = weight.grad.clone()
    run.optimizer.step()
    pull = (weight.detach() - start - 0.1) + 3.0 * 0.01 * gradient
    assert torch.allclose(pull, torch.full_like(pull, -3.0 * 0.01 * 50.0 * 0.1), atol=1e-9)


def test_a_rate_of_zero_has_nothing_to_multiply():
    net = Net()
    with pytest.raises(ValueError, match="learning rate, which is 0: give the optimizer its peak rate"):
        Run(net, [HypergradientLR()]).attach(torch.optim.SGD(net.parameters(), 0.0))
