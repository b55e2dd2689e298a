"""GroupWeights: the worst distribution in a ball, the floor of shares, merging, and weights in a step."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import batches, bert
from steadytune import EasyAdapt, GroupWeights, HeadInit, Run
from steadytune.methods.group_weights import dro_weights, floor_weights, merged

P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
D = torch.tensor([0.2, 0.9, 0.4, 0.7], dtype=torch.float64)
GROUPS = torch.tensor([0, 0, 1, 1])


def divergence(p, weights):
    return float((p * (weights - 1).square()).sum() / 2)


# ---------------------------------------------------------------- the distribution


def test_two_groups_in_closed_form():
    """q1 = p1 + sqrt(2 rho p1 p2): 0.6581 for two halves at rho 0.05."""
    p, d = torch.tensor([0.5, 0.5]), torch.tensor([1.3, 0.4])
    assert float((dro_weights(p, d, 0.05) * p)[0]) == pytest.approx(0.6581, abs=5e-5)
    p = torch.tensor([0.9, 0.1], dtype=torch.float64)
    q = dro_weights(p, d.flip(0).double(), 0.02) * p
    assert float(q[1]) == pytest.approx(0.1 + math.sqrt(2 * 0.02 * 0.9 * 0.1), abs=1e-9)


def test_the_ball_is_used_to_its_edge_and_the_worst_group_gains_most():
    for rho in (0.001, 0.05, 0.3):
        weights = dro_weights(P, D, rho)
        assert divergence(P, weights) == pytest.approx(rho, rel=1e-6)
        assert float((P * weights).sum()) == pytest.approx(1, abs=1e-12)
        assert weights.argmax() == D.argmax()
        assert all(weights[i] >= weights[j] for i in range(4) for j in range(4) if D[i] > D[j])


def test_no_distribution_in_the_ball_has_a_larger_loss():
    """It is the maximum of sum q d: no other distribution as near to p is worse."""
    worst = float((P * dro_weights(P, D, 0.05) * D).sum())
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        step = torch.randn(4, generator=generator, dtype=torch.float64)
        step -= (P * step).sum()  # keeps the sum of q
        other = 1 + step * math.sqrt(0.05 / divergence(P, 1 + step))
        assert float((P * other * D).sum()) <= worst + 1e-9 or bool((other < 0).any())


def test_equal_losses_and_radius_0_change_nothing():
    assert torch.equal(dro_weights(P, torch.full_like(P, 3.7), 0.05), torch.ones_like(P))
    assert torch.equal(dro_weights(P, D, 0.0), torch.ones_like(P))


def test_only_differences_of_losses_count_and_not_their_scale():
    """Naive: an update relative to the losses themselves turns with a constant added to them."""
    weights = dro_weights(P, D, 0.05, 0.2)
    assert torch.allclose(dro_weights(P, D + 100, 0.05, 0.2), weights, atol=1e-9)
    assert torch.allclose(dro_weights(P, D * 0.001, 0.05, 0.2), weights, atol=1e-9)


def test_a_ball_beyond_the_simplex_puts_all_on_the_worst_group():
    weights = dro_weights(P, D, 1e6)
    assert torch.allclose(P * weights, torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64), atol=1e-9)


def test_the_floor_keeps_every_group():
    weights = dro_weights(P, D, 1e6, floor=0.2)
    others = weights[[0, 2, 3]]
    assert others.tolist() == pytest.approx([0.2] * 3)
    assert float((P * weights).sum()) == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("rho", [0.5, 0.7])
def test_beside_the_floor_the_ball_is_used_to_its_edge(rho):
    """Naive: weights are lifted to the floor and then normalised, which takes them below it, and into the ball."""
    weights = dro_weights(P, D, rho, floor=0.2)
    assert float(weights.min()) == pytest.approx(0.2, abs=1e-12)
    assert divergence(P, weights) == pytest.approx(rho, rel=1e-6)
    assert float((P * weights).sum()) == pytest.approx(1, abs=1e-12)


# ---------------------------------------------------------------- the floor of shares


def test_groups_above_their_floor_have_weight_1():
    p, losses = torch.tensor([0.6, 0.4]), torch.tensor([1.0, 0.6])
    assert torch.equal(floor_weights(p, losses, 0.5, 4.0), torch.ones(2))


def test_weights_below_the_floor_rise_as_the_loss_falls_up_to_the_most():
    """Half of a mean loss of 1: a group at 0.25 counts twice, one at 0.125 four times."""
    p = torch.tensor([0.8, 0.2])
    found = []
    for low in (0.6, 0.5, 0.25, 0.125, 0.01, 0.0):
        losses = torch.tensor([(1 - 0.2 * low) / 0.8, low])
        weights = floor_weights(p, losses, 0.5, 4.0)
        assert float(weights[0]) == 1
        found.append(float(weights[1]))
    assert found == pytest.approx([1, 1, 2, 4, 4, 4])


# ---------------------------------------------------------------- small groups


def test_small_groups_share_a_slot():
    assert merged([30, 4, 20, 7], 10) == [0, 2, 1, 2]
    assert merged([30, 4, 20, 0], 10) == [0, 1, 1, 1], "too few together: with the smallest large one"
    assert merged([6, 12, 5], 10) == [1, 0, 1]


@pytest.mark.parametrize("counts", [[30], [30, 1], [4, 5], [0, 50]])
def test_what_leaves_one_slot_is_refused(counts):
    with pytest.raises(ValueError, match=r"needs two subgroups of 10 rows or more, here are subgroups of \d"):
        merged(counts, 10)


# ---------------------------------------------------------------- in a step


def column(data):
    return [{**batch, "subgroup": GROUPS} for batch in data]


def run_of(*methods, total=20, model=None, size=16):
    model = bert(dropout=0.0) if model is None else model
    data = column(batches(size))
    run = Run(model, methods, total_steps=total, data=lambda: data)
    return run.attach(torch.optim.SGD(model.parameters(), 0.1))


def take(run, batch):
    loss = run.loss(batch)
    loss.backward()
    run.optimizer.step()
    run.optimizer.zero_grad()
    return float(loss.detach())


def test_a_weighted_step_is_that_of_the_weighted_mean_of_the_losses():
    (batch,) = column(batches(1))
    run = run_of(GroupWeights())
    run[GroupWeights].weights = torch.tensor([1.5, 0.5])
    plain = {name: value for name, value in batch.items() if name != "subgroup"}
    model = bert(dropout=0.0)
    logits = model(**plain).logits
    each = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
    wanted = (torch.tensor([1.5, 1.5, 0.5, 0.5]) * each).mean()
    wanted.backward()
    loss = run.loss(batch)
    loss.backward()
    assert torch.allclose(loss, wanted, atol=1e-6)
    for (name, p), q in zip(run.model.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, atol=1e-7), name


@pytest.mark.parametrize("labels", [1, 3])
def test_numbers_a_row_keep_the_loss_of_the_task(labels):
    model = bert(labels=labels, dropout=0.0)
    model.config.problem_type = "regression"
    (batch,) = column(batches(1))
    batch["labels"] = 5 * torch.randn(4, labels)
    run = run_of(GroupWeights(), model=model)
    loss = run.loss(batch)
    assert torch.allclose(run[GroupWeights].seen[1][0].mean(), loss, atol=1e-5)


def test_the_group_whose_loss_stays_high_comes_to_count_more():
    """Naive: a running mean that begins at 0 is too low at first, and lower for a rare group."""
    run = run_of(GroupWeights(every=2, start=0.0, smoothing=0.01))
    held = run[GroupWeights]
    losses: list[list[float]] = [[], []]
    for batch in column(batches(4)):
        with torch.no_grad():
            logits = run.model(**{name: value for name, value in batch.items() if name != "subgroup"}).logits
        each = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        for group in (0, 1):
            losses[group].append(float(each[group == GROUPS].mean()))
        take(run, batch)
    found = (held.mean[0] / held.mean[1]).tolist()
    assert found == pytest.approx([sum(several) / 4 for several in losses], rel=0.02)  # a slow mean is the plain one
    assert held.weights.argmax() == (0 if found[0] > found[1] else 1)
    assert float((held.weights * held.rows).sum()) == pytest.approx(1, abs=1e-6)
    assert float(held.weights.max()) > 1.2


def test_nothing_changes_before_the_start_and_between_updates():
    run = run_of(GroupWeights(every=3, start=0.5), total=10)
    changed = []
    for batch in column(batches(10)):
        before = run[GroupWeights].weights.clone()
        take(run, batch)
        changed.append(not torch.equal(before, run[GroupWeights].weights))
    assert changed == [False] * 5 + [True, False, False, True, False]


def test_rows_of_unknown_subgroups_count_once_and_enter_no_mean():
    (batch,) = column(batches(1))
    run = run_of(GroupWeights())
    run[GroupWeights].weights = torch.tensor([3.0, 5.0])
    unknown = {**batch, "subgroup": torch.full((4,), -1)}
    with torch.no_grad():
        alone = float(bert(dropout=0.0)(**{k: v for k, v in batch.items() if k != "subgroup"}).loss)
    assert take(run, unknown) == pytest.approx(alone, abs=1e-6)
    assert float(run[GroupWeights].mean.abs().sum()) == 0


def test_micro_batches_count_like_one_batch():
    whole, parts = run_of(GroupWeights(every=1, start=0.0)), run_of(GroupWeights(every=1, start=0.0))
    for batch in column(batches(2)):
        take(whole, batch)
        for half in (slice(0, None, 2), slice(1, None, 2)):
            (parts.loss({name: value[half] for name, value in batch.items()}) / 2).backward()
        parts.optimizer.step()
        parts.optimizer.zero_grad()
    assert torch.allclose(whole[GroupWeights].mean, parts[GroupWeights].mean, atol=1e-5)
    assert torch.allclose(whole[GroupWeights].weights, parts[GroupWeights].weights, atol=1e-4)


def test_a_reference_is_what_can_be_reached():
    """The group with the higher loss is at its own reference: the other one counts more."""
    run = run_of(GroupWeights(reference=(2.0, 0.0), every=1, start=0.0))
    run[GroupWeights].mean = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    assert run[GroupWeights].updated().argmax() == 1
    run[GroupWeights].reached.zero_()
    assert run[GroupWeights].updated().argmax() == 0


def test_two_methods_read_one_column_and_the_model_gets_it_from_neither():
    """Naive: the first method takes the column away from the second, and a head from features gives it to the model."""
    (batch,) = column(batches(1))
    run = run_of(HeadInit(), EasyAdapt(domain="subgroup"), GroupWeights())
    assert run[EasyAdapt].count == 2
    take(run, batch)
    assert run[GroupWeights].mean[1].tolist() == pytest.approx([0.1, 0.1])


def test_it_is_refused_before_training_where_it_cannot_act():
    with pytest.raises(ValueError, match=r"GroupWeights counts the rows .*pass Run\(..., data="):
        Run(bert(), [GroupWeights()])
    with pytest.raises(ValueError, match="reference has 3 losses, there are 2 subgroups"):
        run_of(GroupWeights(reference=(1.0, 2.0, 3.0)))
    with pytest.raises(RuntimeError, match="GroupWeights finds no column 'source' in the batch"):
        run_of(GroupWeights(column="source"))
    with pytest.raises(ValueError, match="no row with a known subgroup"):
        Run(bert(), [GroupWeights(column=lambda inputs: -torch.ones(4, dtype=torch.long))], data=lambda: batches(2))
