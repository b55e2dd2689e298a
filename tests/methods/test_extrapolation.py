"""Extrapolation: the paper's update with the past gradient, and weights that do not move."""

from __future__ import annotations

import torch
from torch import nn

from helpers import Net, assert_same, copied, points
from steadytune import Extrapolation, Run

LR, STEP = 0.3, 0.12  # the learning rate, and the paper's extrapolation step


def test_with_sgd_it_is_the_papers_update_with_the_past_gradient():
    data, net = points(6), Net()
    weights = {n: w.requires_grad_() for n, w in copied(net).items()}
    past = {n: torch.zeros_like(w) for n, w in weights.items()}
    optimizer = torch.optim.SGD(net.parameters(), LR)
    run = Run(net, [Extrapolation(ahead=STEP / LR)]).attach(optimizer)
    for batch in data:
        half = {n: (w.detach() - STEP * past[n]).requires_grad_() for n, w in weights.items()}
        loss = torch.func.functional_call(net, half, kwargs=batch)["loss"]
        past = dict(zip(half, torch.autograd.grad(loss, list(half.values())), strict=True))
        weights = {n: w.detach() - LR * past[n] for n, w in weights.items()}
        run.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_same(copied(net), weights, atol=1e-12)


def test_a_weight_that_did_not_move_in_the_last_step_is_shown_as_it_is():
    """Naive: it goes on along its last move of long ago."""

    class Skipping(Net):
        def forward(self, x, labels):
            if self.skip:
                return {"loss": nn.functional.cross_entropy(self.last(x[:, :5]), labels)}
            return super().forward(x, labels)

    net = Skipping()
    optimizer = torch.optim.SGD(net.parameters(), LR)
    run = Run(net, [Extrapolation(ahead=1.0)]).attach(optimizer)
    for skip, batch in zip((False, True), points(2), strict=True):
        net.skip = skip
        run.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copied(net)
    run.enter()
    shown = copied(net)
    assert torch.equal(shown["first.weight"], before["first.weight"])
    assert not torch.equal(shown["last.weight"], before["last.weight"])
