"""MetaWeightNet against explicit second derivatives, and against flipped labels."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from helpers import Net, assert_same, copied, llama, points, tensors
from steadytune import MetaWeightNet, RDrop, Run
from steadytune.methods.bases.bilevel import flat
from steadytune.methods.bases.rows import row_losses
from steadytune.methods.meta_weight_net import row_weights

LR, NET_LR = 0.3, 0.05


def outer():
    return points(2, seed=8)


def run_of(model, *methods, lr=LR):
    return Run(model, methods).attach(torch.optim.SGD(model.parameters(), lr))


def test_weights_and_network_equal_autograd():
    """The step by V, then V by the exact derivative of that step at the new weights."""
    data = points(5)
    run = run_of(Net(), MetaWeightNet(outer=outer, hidden=7, lr=NET_LR))
    net = [t.clone().requires_grad_() for t in flat(run[MetaWeightNet].variables)]
    optimizer = torch.optim.AdamW(net, NET_LR, weight_decay=0.0)
    w = {n: t.requires_grad_() for n, t in copied(Net()).items()}
    for t, batch in enumerate(data):
        run.loss(batch).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()

        def rows(given, batch=batch, w=w):
            return row_losses(torch.func.functional_call(Net(), w, kwargs=given)["logits"], given["labels"])

        seen = rows(batch).detach()
        found = torch.autograd.grad((row_weights(net, seen).detach() * rows(batch)).mean(), list(w.values()))
        with torch.no_grad():
            for p, g in zip(w.values(), found, strict=True):
                p.sub_(LR * g)
        v = torch.autograd.grad(rows(outer()[t % 2]).mean(), list(w.values()))
        weighted = (row_weights(net, seen) * rows(batch)).mean()
        inner = torch.autograd.grad(weighted, list(w.values()), create_graph=True)
        along = sum((g * LR * q).sum() for g, q in zip(inner, v, strict=True))
        for p, g in zip(net, torch.autograd.grad(-along, net), strict=True):
            p.grad = g
        optimizer.step()
        assert_same(copied(run.model), {n: p.detach() for n, p in w.items()}, atol=1e-5)
    assert_same(flat(run[MetaWeightNet].variables), [p.detach() for p in net], atol=1e-4)
    assert run.passes.plain == pytest.approx(8 / 3)
    assert max(float(t.abs().max()) for t in tensors(run[MetaWeightNet].state_dict()["first"]).values()) > 0


def test_flipped_rows_come_to_count_less():
    """Two classes a line apart, 40 % of the training labels flipped, 16 clean rows, a model that knows a little."""
    torch.manual_seed(0)
    x = torch.randn(216, 6, dtype=torch.float64)
    clean = (x[:, 0] > 0).long()
    flipped = torch.rand(216) < 0.4
    labels = torch.where(flipped, 1 - clean, clean)
    trusted = {"x": x[200:], "labels": clean[200:]}
    net = Net()
    for _ in range(20):
        nn.functional.cross_entropy(net(**trusted)["logits"], trusted["labels"]).backward()
        with torch.no_grad():
            for p in net.parameters():
                p.sub_(p.grad)
                p.grad = None
    run = run_of(net, MetaWeightNet(outer=lambda: [trusted], hidden=20, lr=0.03), lr=0.2)
    for _ in range(6):
        for i in range(0, 200, 25):
            run.loss({"x": x[i : i + 25], "labels": labels[i : i + 25]}).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
    with torch.no_grad():
        losses = row_losses(run.model(x[:200], labels[:200])["logits"], labels[:200])
        found = row_weights(flat(run[MetaWeightNet].variables), losses)
    assert float(found[flipped[:200]].mean()) < 0.8 * float(found[~flipped[:200]].mean())


def test_the_loss_is_the_weighted_one_and_other_penalties_stay():
    batch = points(1)[0]
    run = run_of(Net(), MetaWeightNet(outer=outer))
    loss = run.loss(batch)
    losses = row_losses(Net()(**batch)["logits"], batch["labels"])
    expected = (row_weights(flat(run[MetaWeightNet].variables), losses.detach()) * losses).mean()
    assert torch.allclose(loss, expected, atol=1e-7)
    both = run_of(Net(), RDropOfNothing(), MetaWeightNet(outer=outer)).loss(batch)
    assert torch.allclose(both, expected + 3, atol=1e-7)


def test_the_loss_is_the_weighted_one_where_the_trainer_has_divided_it():
    batch = points(1)[0]
    run = run_of(Net(), MetaWeightNet(outer=outer))
    whole = run.loss(batch).detach()

    def half(model, inputs, copies):  # as a trainer with two micro-batches a step divides
        outputs = model(**inputs)
        return outputs["loss"] / 2, outputs

    run = run_of(Net(), MetaWeightNet(outer=outer))
    assert torch.allclose(run.loss(batch, compute=half, penalty_scale=0.5), whole / 2, atol=1e-7)


class RDropOfNothing(RDrop):
    """Adds 3."""

    def setup(self, run):
        pass

    def penalty(self, step):
        return step.loss.detach() * 0 + 3


def test_losses_of_rows_have_the_mean_that_the_task_has():
    logits = torch.randn(5, 3)
    one, several = torch.randint(3, (5,)), torch.randint(2, (5, 3)).float()
    assert torch.allclose(row_losses(logits, one).mean(), nn.functional.cross_entropy(logits, one))
    bce = nn.functional.binary_cross_entropy_with_logits(logits, several)
    assert torch.allclose(row_losses(logits, several).mean(), bce)
    assert torch.allclose(row_losses(logits[:, :1], several[:, 0]), (logits[:, 0] - several[:, 0]).square())


def test_losses_of_rows_follow_the_problem_type_where_there_is_a_label_for_each_output():
    logits, numbers = torch.randn(5, 3), 5 * torch.randn(5, 3)
    assert torch.allclose(row_losses(logits, numbers, "regression").mean(), nn.functional.mse_loss(logits, numbers))
    one = row_losses(logits[:, :1], numbers[:, :1])
    assert torch.equal(one, row_losses(logits[:, :1], numbers[:, 0]))
    assert torch.allclose(one.mean(), nn.functional.mse_loss(logits[:, :1], numbers[:, :1]))
    several = row_losses(logits[:, :1], numbers[:, :1].sigmoid(), "multi_label_classification")
    assert torch.allclose(
        several.mean(), nn.functional.binary_cross_entropy_with_logits(logits[:, :1], numbers[:, :1].sigmoid())
    )


def test_labels_of_tokens_are_refused():
    ids = torch.randint(3, 60, (2, 6))
    run = run_of(llama(), MetaWeightNet(outer=outer))
    with pytest.raises(ValueError, match=r"loss of each row .* got logits \(2, 6, 64\) and labels \(2, 6\)"):
        run.loss({"input_ids": ids, "labels": ids})
