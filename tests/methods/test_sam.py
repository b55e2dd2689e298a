"""SAM: hand numbers, the weights of micro-batches, and what a second look at a batch must leave as it was."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from helpers import Net, arguments, assert_same, batches, bert, collate, copied, points, rows, train
from steadytune import AWP, EMA, PGD, SAM, ClipNorm, Mixout, Run, Trainer, only
from steadytune.errors import UsageError


class Bowl(nn.Module):
    """L = half the sum of x * w^2, whose gradient is x * w, at w = (3, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, 1.0], dtype=torch.float64))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": (x * self.w.square()).sum() / 2}


def bowl(*x: float) -> dict[str, Tensor]:
    return {"x": torch.tensor([x], dtype=torch.float64)}


def descend(model: nn.Module, *methods: Any, lr: float = 0.1, optimizer: Any = torch.optim.SGD) -> Run:
    return Run(model, [*methods], total_steps=8).attach(optimizer(model.parameters(), lr=lr))


def moved(run: Run) -> list[float]:
    run.optimizer.step()
    return run.model.w.tolist()


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        # g = (3, 4) of norm 5, e = (0.3, 0.4), gradient (3.3, 5.6) at (3.3, 1.4)
        ([SAM(rho=0.5)], [2.67, 0.44]),
        ([], [2.7, 0.6]),
        # that gradient has norm 6.5, and is clipped to 1.3
        ([SAM(rho=0.5), ClipNorm(1.3)], [2.934, 0.888]),
    ],
)
def test_a_step_by_hand(methods, expected):
    run = descend(Bowl(), *methods)
    run.loss(bowl(1, 4)).backward()
    assert moved(run) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("factors", [(0.5, 0.5), (0.25, 0.75), (128.0, 128.0)])
def test_micro_batches_weigh_as_in_the_loop(factors):
    """Naive: the mean of the micro-batches; the last one alone; a loss scaler's factor of 256 left in."""
    run, scale = descend(Bowl(), SAM(rho=0.5)), sum(factors)
    for factor, x in zip(factors, ((1.0, 0.0), (0.0, 4.0)), strict=True):
        (run.loss(bowl(*(v / (factor / scale) for v in x))) * factor).backward()
    run.model.w.grad.div_(scale)  # as `GradScaler.unscale_` does
    assert moved(run) == pytest.approx([2.67, 0.44], abs=1e-12)


def test_a_loss_that_was_not_sent_back_does_not_count():
    run = descend(Bowl(), SAM(rho=0.5))
    run.loss(bowl(7, 7))
    run.loss(bowl(1, 4)).backward()
    assert moved(run) == pytest.approx([2.67, 0.44], abs=1e-12)


def test_only_the_chosen_weights_move_uphill_and_all_get_the_gradient_found_there():
    data, expected = points(1)[0], Net()
    expected(**data)["loss"].backward()
    first = expected.first.weight
    with torch.no_grad():
        move = 0.3 * first.grad / first.grad.norm()
        expected.zero_grad()
        first.add_(move)
    expected(**data)["loss"].backward()
    with torch.no_grad():
        first.sub_(move)
        for p in expected.parameters():
            p.sub_(0.1 * p.grad)
    run = descend(Net(), only(SAM(rho=0.3), lambda w: w.name == "first.weight"))
    train(run, [data])
    assert_same(copied(run.model), copied(expected), atol=1e-14)


@pytest.mark.parametrize("order", [1, -1])
def test_the_move_starts_from_what_the_forward_sees(order):
    """Mixout shows other weights: the gradients are of those, and the chain rule comes after the second look."""
    start, data = Net(seed=1), points(1)[0]
    model = Net(seed=1)
    run = descend(model, *[Mixout(keep=0.5), SAM(rho=0.3)][::order])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
    raw, drawn = copied(model), torch.tensor([1.0, 0, 1, 0, 1, 0], dtype=torch.float64)
    run[Mixout].columns = lambda run, w: drawn[: w.data.size(1)].view(1, -1)
    mask = {n: drawn[: p.size(1)].view(1, -1) / 0.5 for n, p in raw.items() if p.dim() == 2}
    shown = {n: start.get_parameter(n).detach() + mask[n] * (p - start.get_parameter(n)) if n in mask else p
             for n, p in raw.items()}  # fmt: skip

    def gradient(at: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {n: p.detach().clone().requires_grad_() for n, p in at.items()}
        loss = torch.func.functional_call(start, leaves, kwargs=data)["loss"]
        return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    slope = gradient(shown)
    norm = torch.stack([g.square().sum() for g in slope.values()]).sum().sqrt()
    there = gradient({n: p + 0.3 * slope[n] / norm for n, p in shown.items()})
    expected = {n: p - 0.1 * there[n] * mask.get(n, 1.0) for n, p in raw.items()}
    train(run, [data])
    assert_same(copied(model), {n: p.detach() for n, p in expected.items()}, atol=1e-14)


def test_weights_in_one_memory_are_put_back():
    """Naive: copies are put back in the order in which they were made, and the second one holds the first move."""

    class Twice(Bowl):
        def __init__(self) -> None:
            super().__init__()
            self.v = nn.Parameter(self.w.detach())

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"loss": (x * self.w * self.v).sum() / 2}

    run = descend(Twice(), SAM(rho=0.5), lr=0.0)
    run.loss(bowl(1, 4)).backward()
    assert moved(run) == [3.0, 1.0]


@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_scaler_changes_nothing(fused):
    ends = []
    for scale in (1.0, 1024.0):
        optimizer = functools.partial(torch.optim.AdamW, fused=fused, foreach=not fused)
        run = descend(bert(), SAM(rho=0.1), lr=1e-3, optimizer=optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        torch.manual_seed(1)
        for batch in batches(3):
            scaler.scale(run.loss(batch)).backward()
            scaler.step(run.optimizer)
            scaler.update()
            run.optimizer.zero_grad()
        assert run.index == 3
        ends.append(copied(run.model))
    assert_same(*ends)


class Failing:
    """A loss that fails or is infinite from its second computation on, as often as told."""

    def __init__(self, times: int, error: type[BaseException] | None = None) -> None:
        self.calls, self.times, self.error = 0, times, error

    def __call__(self, model: Any, inputs: Any, copies: int) -> tuple[Tensor, Any]:
        self.calls += 1
        outputs = model(**inputs)
        bad = 1 < self.calls <= 1 + self.times
        if bad and self.error:
            raise self.error
        return outputs["loss"] * (float("inf") if bad else 1.0), outputs


def test_a_second_gradient_that_is_not_finite_skips_the_step():
    run = descend(bert(), SAM(rho=0.1), EMA(decay=0.5))
    before = copied(run.model)
    run.loss(batches(1)[0], compute=Failing(times=1)).backward()
    run.optimizer.step()
    assert (run.index, run.finite.skipped) == (0, 1)
    assert_same(copied(run.model), before)
    train(run, batches(1))
    assert run.index == 1


def test_second_gradients_that_are_never_finite_end_the_training():
    """Naive: the first look at each step, which is finite, begins the count anew."""
    run = descend(bert(), SAM(rho=0.1))
    for i, batch in enumerate(batches(5)):
        run.loss(batch, compute=Failing(times=1)).backward()
        with pytest.raises(UsageError, match="5 optimizer steps in a row") if i == 4 else contextlib.nullcontext():
            run.optimizer.step()
    assert run.finite.skipped == 5


def test_an_interrupted_second_look_leaves_the_weights_where_they_were():
    run = descend(bert(), SAM(rho=0.1))
    before, batch = copied(run.model), batches(1)[0]
    run.loss(batch, compute=Failing(times=1, error=KeyboardInterrupt)).backward()
    with pytest.raises(KeyboardInterrupt):
        run.optimizer.step()
    assert_same(copied(run.model), before)
    run.loss(batch)  # naive: "was changed in the middle of a step"
    run.leave()


def test_the_trainer_must_not_clip_what_is_replaced_afterwards(tmp_path):
    """With clip="list" the norm goes to the end of the list, where it acts on the second gradient."""

    def trainer(norm: float, clip: Any) -> Trainer:
        return Trainer(
            bert(), arguments(tmp_path, max_steps=1, max_grad_norm=norm), train_dataset=rows(4), data_collator=collate,
            methods=[SAM()], clip=clip,
        )  # fmt: skip

    with pytest.raises(ValueError, match=r"SAM replaces the gradient .* clip='list', or set max_grad_norm=0 .*0\.5"):
        trainer(0.5, "trainer").train()
    trainer(0.0, "trainer").train()
    listed = trainer(0.5, "list")
    listed.train()
    assert listed.run[ClipNorm].max_norm == 0.5


# ---------------------------------------------------------------- AWP


def test_awp_moves_each_tensor_by_a_share_of_its_own_norm():
    """Naive: SAM's one norm over all weights; biases moved too; the gradient of weights that were not moved lost."""
    data, expected = points(1)[0], Net()
    expected(**data)["loss"].backward()
    matrices = [expected.first.weight, expected.last.weight]
    with torch.no_grad():
        moves = [0.2 * p.norm() * p.grad / p.grad.norm() for p in matrices]
        expected.zero_grad()
        for p, move in zip(matrices, moves, strict=True):
            p.add_(move)
    expected(**data)["loss"].backward()
    with torch.no_grad():
        for p, move in zip(matrices, moves, strict=True):
            p.sub_(move)
        for p in expected.parameters():
            p.sub_(0.1 * p.grad)
    run = train(descend(Net(), AWP(gamma=0.2)), [data])
    assert_same(copied(run.model), copied(expected), atol=1e-14)


def test_awp_leaves_a_tensor_of_zeros_where_it_is():
    """Naive: 0 / 0 for a weight and a gradient of norm zero."""
    model = Net()
    nn.init.zeros_(model.last.weight)  # so that the first layer has a gradient of exactly zero, too
    run = train(descend(model, AWP(gamma=0.2)), points(1))
    assert all(p.isfinite().all() for p in copied(run.model).values())


def test_awp_climbs_the_loss_of_perturbed_inputs_too():
    """With PGD in the list, in both orders, it is the double perturbation of the paper: neither alone gives it."""
    ends = []
    for recipe in ([AWP(0.1), PGD()], [PGD(), AWP(0.1)], [AWP(0.1)], [PGD()]):
        torch.manual_seed(1)
        ends.append(copied(train(descend(bert(), *recipe), batches(1)).model))
    assert_same(ends[0], ends[1])
    name = "bert.pooler.dense.weight"
    assert not torch.equal(ends[0][name], ends[2][name])
    assert not torch.equal(ends[0][name], ends[3][name])
