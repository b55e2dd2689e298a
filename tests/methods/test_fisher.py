"""Fisher information: three kinds of labels by hand, and the error that an estimate says it has."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from torch import Tensor, nn

from helpers import batches, bert
from steadytune import ChildTuningD, Run
from steadytune.methods.bases.fisher import Fisher


class Softmax(nn.Module):
    """Logistic regression: the gradient of a row is (p - onehot(y)) x."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([[0.3, -0.2], [0.0, 0.5], [-0.4, 0.1]], dtype=torch.float64))

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = x @ self.w.mT
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def data(rows: int = 6) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 2, dtype=torch.float64, generator=generator)
    return {"x": x, "labels": torch.arange(rows) % 3}


def estimate(way: Fisher, batch: dict[str, Tensor], seed: int = 0):
    return way.estimate(Run(Softmax(), [], seed=seed), [batch], {"w"}, way)


def predictions(batch: dict[str, Tensor]) -> Tensor:
    return (batch["x"] @ Softmax().w.mT).softmax(-1).detach()


def test_the_empirical_one_squares_the_gradient_at_the_labels_of_the_table():
    batch = data()
    residual = predictions(batch) - nn.functional.one_hot(batch["labels"], 3)
    each = (residual.unsqueeze(-1) * batch["x"].unsqueeze(1)).square()
    found = estimate(Fisher("example", "true"), batch)
    assert torch.allclose(found.values["w"], each.mean(0), atol=1e-14)
    traces = each.sum((1, 2))
    assert found.trace == pytest.approx(traces.mean().item())
    assert found.error == pytest.approx(traces.std().item() / math.sqrt(6))
    assert found.units == 6


def test_the_expected_one_is_p_times_1_minus_p():
    """Naive: the square of the expected gradient, which is zero."""
    batch = data()
    p = predictions(batch)
    each = (p * (1 - p)).unsqueeze(-1) * batch["x"].unsqueeze(1).square()
    found = estimate(Fisher("example", "expected"), batch)
    assert torch.allclose(found.values["w"], each.mean(0), atol=1e-14)
    assert found.units == 6
    assert found.error == pytest.approx(each.sum((1, 2)).std().item() / math.sqrt(6))


def test_the_sampled_one_comes_near_the_expected_one_within_its_own_error():
    """Naive: labels of the table are left where they are; or one draw for all rows."""
    batch = {name: value.repeat(60, *[1] * (value.dim() - 1)) for name, value in data().items()}
    sampled, expected = (estimate(Fisher("example", kind), batch) for kind in ("sampled", "expected"))
    assert abs(sampled.trace - expected.trace) < 3 * sampled.error
    assert 0 < sampled.error < 0.1 * sampled.trace
    assert not torch.equal(sampled.values["w"], expected.values["w"])


def test_a_batch_is_squared_as_a_whole_and_one_unit_has_no_error():
    batch = data()
    residual = predictions(batch) - nn.functional.one_hot(batch["labels"], 3)
    mean = (residual.unsqueeze(-1) * batch["x"].unsqueeze(1)).mean(0)
    found = estimate(Fisher("batch", "true"), batch)
    assert torch.allclose(found.values["w"], mean.square(), atol=1e-14)
    assert found.units == 1
    assert math.isnan(found.error)


def test_a_square_over_classes_needs_rows():
    with pytest.raises(ValueError, match="labels='expected' sums over the classes of a row"):
        Run(bert(), [ChildTuningD(labels="expected")], data=lambda: batches(2))


def test_the_ranking_of_child_tuning_says_how_sure_it_is(caplog):
    model = bert()
    run = Run(model, [ChildTuningD(per="example", labels="expected")], total_steps=2, data=lambda: batches(2))
    run.attach(torch.optim.AdamW(model.parameters()))
    with caplog.at_level(logging.INFO, "steadytune"):
        run.loss(batches(1)[0])
    assert "ChildTuningD, Fisher information: trace" in caplog.text
    assert "standard error" in caplog.text
    assert "8 squared gradients" in caplog.text
    assert 0.29 < torch.cat([m.flatten() for m in run[ChildTuningD].masks.values()]).float().mean() < 0.31
