"""What no hook tells: copies, other optimizers, two Runs on one model, gradients that are not finite."""

from __future__ import annotations

import copy
import gc
import logging
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from helpers import Net, assert_same, batches, bert, copied, differs, points, train
from steadytune import (
    EMA,
    LAWA,
    LLRD,
    SAM,
    SMART,
    BiDrop,
    BregmanProximal,
    CausalHead,
    ClipNorm,
    DPSDense,
    GroupWeights,
    ImplicitTune,
    MetaSemi,
    MetaWeightNet,
    Mixout,
    RDrop,
    ROSEFirst,
    Run,
    WeightMixup,
)
from steadytune.core.watch import IN_A_ROW
from steadytune.errors import UsageError

TOTAL = 8


def sgd(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr)


def attached(model: nn.Module, *methods: Any, optimizer: Any = None) -> Run:
    return Run(model, methods, total_steps=TOTAL).attach(optimizer or sgd(model))


class Unheard(torch.optim.SGD):
    """An optimizer with a step that calls no hooks, as wrappers and copies have it."""

    def quiet_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.move(p, group["lr"])

    @torch.no_grad()
    def move(self, p: Any, lr: float) -> None:
        p.add_(p.grad, alpha=-lr)


class Uncounted(Unheard):
    """Its writes are not counted by torch either."""

    def move(self, p: Any, lr: float) -> None:
        p.data.add_(p.grad, alpha=-lr)


# ---------------------------------------------------------------- copies


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copied", "pickled"])
@pytest.mark.parametrize("methods", [[EMA(decay=0.5)], [DPSDense(update_ratio=0.25), RDrop(), EMA(decay=0.5)]])
def test_a_copy_of_model_optimizer_and_run_trains_on_as_the_original(how, methods):
    """Naive: torch drops the hooks of copied optimizers, no step counts, and finish() puts the start back."""
    model, data = bert(), batches(TOTAL)
    run = attached(model, *methods, optimizer=torch.optim.AdamW(model.parameters(), 3e-3))
    train(run, data[:3])
    noise = torch.get_rng_state()
    _, _, other = how((model, run.optimizer, run))
    assert other.optimizer is not run.optimizer
    train(run, data[3:])
    torch.set_rng_state(noise)
    train(other, data[3:])
    for each in (run, other):
        each.finish()
    assert (run.index, other.index) == (TOTAL, TOTAL)
    assert_same(copied(other.model), copied(model))
    assert_same(other.state_dict(), run.state_dict())


def test_a_run_is_not_copied_in_the_middle_of_a_step():
    run = attached(Net(), EMA(decay=0.5))
    run.loss(points(1)[0])
    with pytest.raises(RuntimeError, match=r"copied in the middle of a step.*run\.leave\(\)"):
        copy.deepcopy(run)


# ---------------------------------------------------------------- steps that nobody counted


@pytest.mark.parametrize("kind", [Unheard, Uncounted])
@pytest.mark.parametrize("methods", [[], [EMA(decay=0.5)], [Mixout(keep=0.5)]], ids=["none", "ema", "mixout"])
@pytest.mark.parametrize("none", [True, False], ids=["no gradients", "zero gradients"])
def test_steps_without_hooks_are_noticed_at_the_next_loss(kind, methods, none):
    """Naive: all training is one step that never ends, and leave() takes it back."""
    if kind is Uncounted and not none:
        pytest.skip("nothing tells such a step from an accumulation before finish()")
    model = bert(dropout=0.0)
    run = attached(model, *methods, optimizer=kind(model.parameters(), 0.1))
    first, second = batches(2)
    run.loss(first).backward()
    run.optimizer.quiet_step()
    run.optimizer.zero_grad(set_to_none=none)
    with pytest.raises(RuntimeError, match="was changed in the middle of a step, and no step"):
        run.loss(second)
    run.leave()
    assert run.index == 0


@pytest.mark.parametrize("kind", [Unheard, Uncounted])
def test_steps_without_hooks_are_noticed_at_the_end(kind):
    model = Net()
    run = attached(model, EMA(decay=0.5), optimizer=kind(model.parameters(), 0.1))
    run.loss(points(1)[0]).backward()
    run.optimizer.quiet_step()
    run.optimizer.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match=r"no(t one)? step of the attached optimizer"):
        run.finish()
    run.finish()  # said once; the Run can be given up


def test_an_optimizer_of_other_weights_steps_for_nobody():
    """A copied optimizer holds weights of its own: those of the model never move, and finish() must say so."""
    model = Net()
    run = attached(model)
    other = copy.deepcopy(run.optimizer)
    for batch in points(3):
        run.loss(batch).backward()
        other.step()
        other.zero_grad()
    with pytest.raises(RuntimeError, match=r"after 3 losses and not one step"):
        run.finish()


def test_an_average_that_another_optimizer_moves_between_steps_is_noticed():
    """Naive: the average that is live is overwritten with the raw weights, and the other's step is lost."""
    model, data = Net(), points(3)
    run = train(attached(model, EMA(decay=0.5)), data[:1])
    model(**data[1])["loss"].backward()
    Unheard(model.parameters(), 0.1).quiet_step()
    with pytest.raises(RuntimeError, match=r"between two steps.*average"):
        run.loss(data[2])


def test_weights_may_be_loaded_with_the_state_in_any_order():
    data = points(4)
    whole = train(attached(Net(), EMA(decay=0.5)), data[:2])
    state, weights = copy.deepcopy(whole.state_dict()), copy.deepcopy(whole.model.state_dict())
    train(whole, data[2:])
    for first in ("model", "run"):
        other = train(attached(Net(), EMA(decay=0.5)), data[:1])
        if first == "model":
            other.model.load_state_dict(weights)
        other.load_state_dict(state)
        if first == "run":
            other.model.load_state_dict(weights)
        assert_same(copied(train(other, data[2:]).model), copied(whole.model))


def test_dropped_gradients_end_the_step():
    """A loop that skips a bad batch drops its gradients: the next loss is of the same step, and of one batch."""
    data, run = points(3), attached(Net(), Mixout(keep=0.5))
    run.loss(data[0]).backward()
    run.optimizer.zero_grad()
    run.loss(data[1]).backward()
    assert len(run.batch) == 1
    run.optimizer.step()
    assert_same(copied(run.model), copied(train(attached(Net(), Mixout(keep=0.5)), data[1:2]).model))


def outer() -> Any:
    return batches(2, seed=5)


@pytest.mark.parametrize(
    "method",
    [
        SAM(),
        BiDrop(),
        ROSEFirst(),
        ImplicitTune(outer=outer),
        WeightMixup(outer=outer, order="difference"),
        MetaWeightNet(outer=outer),
        GroupWeights(column=lambda inputs: inputs["input_ids"][:, 0] % 2, least=1, start=0.0),
        CausalHead(permutations=1),
    ],
    ids=lambda method: type(method).__name__,
)
def test_a_loss_that_is_thrown_away_is_not_of_the_step(method):
    """Naive: methods that pass the step's batch once more take a batch whose loss was not finite, and spread it."""
    bad, *data = batches(3, seed=7)

    def compute(model: Any, inputs: Any, copies: int) -> Any:
        outputs = model(**inputs)
        return outputs.loss * (math.nan if inputs["input_ids"][0, 0] == bad["input_ids"][0, 0] else 1.0), outputs

    ends = []
    for given in ([data[0], bad, data[1]], data):
        model = bert()
        run = Run(model, [method], total_steps=TOTAL, data=lambda: data).attach(torch.optim.AdamW(model.parameters()))
        for batch in given:
            torch.manual_seed(int(batch["input_ids"].sum()))
            loss = run.loss(batch, compute=compute)
            if loss.isfinite():
                loss.backward()
                run.optimizer.step()
                run.optimizer.zero_grad()
        ends.append(copied(model))
        assert run.index == run.batches == 2
    assert all(t.isfinite().all() for t in ends[0].values())
    if not isinstance(method, CausalHead):  # whose draws follow the number of the micro-batch
        assert_same(*ends)


@pytest.mark.parametrize(
    "method",
    [LAWA(last=2, every=2), EMA(decay=0.5), SMART(proximal=BregmanProximal()), MetaSemi(unlabelled=outer)],
    ids=lambda method: type(method).__name__,
)
def test_weights_that_are_unfrozen_on_the_way_join(method):
    model, data = bert(), batches(6)
    table = model.get_input_embeddings().weight.requires_grad_(False)
    run = Run(model, [method], total_steps=TOTAL).attach(torch.optim.AdamW(model.parameters()))
    train(run, data[:3])
    before = table.detach().clone()
    table.requires_grad_(True)
    train(run, data[3:])
    assert differs(before, table.detach())
    held = {"LAWA": "checkpoints", "SMART": "teacher", "MetaSemi": "mean"}.get(type(method).__name__)
    if held is not None:
        joined = getattr(run[type(method)], held)
        assert "bert.embeddings.word_embeddings.weight" in (joined[-1] if isinstance(joined, list) else joined)


@pytest.mark.parametrize("method", [LAWA(last=2, every=2), EMA(decay=0.5)], ids=lambda method: type(method).__name__)
def test_weights_that_were_unfrozen_on_the_way_are_in_a_state_that_is_loaded_before(method):
    """Naive: averages are looked up among the weights that train now, and a resume is a KeyError."""

    def begun():
        model = bert(dropout=0.0)
        model.get_input_embeddings().weight.requires_grad_(False)
        return model, Run(model, [copy.deepcopy(method)], total_steps=TOTAL)

    data, (model, run) = batches(6), begun()
    train(run.attach(torch.optim.AdamW(model.parameters())), data[:2])
    model.get_input_embeddings().weight.requires_grad_(True)
    train(run, data[2:4])
    saved = copy.deepcopy(run.optimizer.state_dict())
    run.leave()
    again, second = begun()
    again.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(again.parameters())
    second.attach(optimizer)
    optimizer.load_state_dict(saved)
    again.get_input_embeddings().weight.requires_grad_(True)
    for one in (run, second):
        train(one, data[4:])
    run.finish(), second.finish()
    assert_same(model.state_dict(), again.state_dict())


def test_an_embedding_that_renormalises_itself_is_no_foreign_step():
    class Normed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.table, self.last = nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.last(self.table(x)).square().mean()}

    run = attached(Normed())
    for _ in range(2):
        for _ in range(2):
            run.loss({"x": torch.arange(9)}).backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert run.index == 2


# ---------------------------------------------------------------- one model, one Run


@pytest.mark.parametrize("method", [Mixout(keep=0.1), EMA(decay=0.5)])
@pytest.mark.parametrize("dropped", [False, True], ids=["held", "collected"])
def test_a_run_made_inside_a_step_of_another_begins_with_the_trained_weights(method, dropped, caplog):
    """Naive: a cell is interrupted and run again; the new Run anchors on what Mixout showed to the forward."""
    model, data = bert(dropout=0.0), batches(4)
    run = train(attached(model, method), data[:3])
    trained = copied(model)
    loss = run.loss(data[3])
    assert differs(copied(model), trained)
    if dropped:
        del run, loss
        gc.collect()
        assert_same(copied(model), trained)
    with caplog.at_level(logging.WARNING):
        again = Run(model, [Mixout(keep=0.1)], total_steps=TOTAL)
    assert any("in the middle of a step" in r.getMessage() for r in caplog.records) != dropped
    assert_same(
        {w.name: again.reference(w.name) for w in again.weights(scope="linear") if not w.head},
        {n: trained[n] for n in trained if n in again._references.tensors},
    )
    train(again.attach(sgd(model)), data[:1])


@pytest.mark.parametrize("method", [Mixout(keep=0.1), EMA(decay=0.5)])
def test_a_model_is_not_saved_in_the_middle_of_a_step(method):
    model, data = bert(), batches(2)
    run = train(attached(model, method), data[:1])
    model.state_dict()
    run.loss(data[1])
    with pytest.raises(RuntimeError, match=r"state_dict\(\) in the middle of a step.*run\.leave\(\)"):
        model.state_dict()
    twin = copy.deepcopy(model)
    twin.state_dict()  # nobody's step
    run.leave()
    model.state_dict()
    assert not model._state_dict_pre_hooks


def test_a_later_run_takes_the_weights_over():
    """Naive: each puts back what the other moved."""
    model, data = Net(), points(4)
    first = train(attached(model, EMA(decay=0.5)), data[:1])
    second = train(attached(model, EMA(decay=0.5)), data[1:2])
    with pytest.raises(RuntimeError, match="a later Run was attached"):
        first.loss(data[2])
    train(second, data[2:3])
    second.finish()
    train(first.restart(), data[3:])
    assert first.index == 1
    first.finish()


def test_runs_on_different_weights_of_one_model_go_on_side_by_side():
    model, data = Net(), points(4)
    runs = [Run(model, [], total_steps=TOTAL).attach(sgd(part)) for part in (model.first, model.last)]
    for batch in data:
        for run in runs:
            run.loss(batch).backward()
            run.optimizer.step()
            model.zero_grad()
    assert [run.index for run in runs] == [4, 4]


def test_a_model_resized_after_the_run_was_made_is_refused():
    model = bert()
    run = Run(model, [Mixout(keep=0.5, scope="all")])
    model.resize_token_embeddings(70)
    with pytest.raises(UsageError, match=r"word_embeddings.weight' had shape \(64, 16\).*has \(70, 16\)"):
        run.attach(sgd(model))


# ---------------------------------------------------------------- learning rates


def test_a_scheduler_that_erases_the_ratios_of_learning_rates_is_refused():
    """Naive: OneCycleLR sets one rate in all groups, and LLRD is plain fine-tuning."""
    model = bert()
    run = attached(model, LLRD(decay=0.5))
    torch.optim.lr_scheduler.OneCycleLR(run.optimizer, max_lr=0.1, total_steps=9)
    with pytest.raises(UsageError, match=r"ratios that LLRD gave.*max_lr=\["):
        run.loss(batches(1)[0])


@pytest.mark.parametrize("kind", ["one cycle", "cyclic", "warm-up", "cosine"])
def test_schedulers_that_keep_the_ratios_are_left_alone(kind, recwarn):
    model = bert()
    run = attached(model, LLRD(decay=0.5))
    rates = [group["lr"] for group in run.optimizer.param_groups]
    scheduler = {
        "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=rates, total_steps=TOTAL + 1),
        "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, [r / 2 for r in rates], rates, 2),
        "warm-up": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda step: min(step, 3) / 3),
        "cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, TOTAL),
    }[kind](run.optimizer)
    for batch in batches(TOTAL):
        train(run, [batch])
        scheduler.step()
    assert not [w for w in recwarn if "LLRD" in str(w.message)]


def test_ratios_that_are_lost_later_are_warned_of_once():
    """A lower limit of the rates may be intended, so it gives a warning and training continues."""
    model, data = bert(), batches(4)
    run = train(attached(model, LLRD(decay=0.5)), data[:1])
    for group in run.optimizer.param_groups:
        group["lr"] = 1e-3
    with pytest.warns(UserWarning, match="ratios that LLRD gave") as said:
        train(run, data[1:])
    assert len(said) == 1


# ---------------------------------------------------------------- gradients that are not finite


def spoil(model: nn.Module, value: float) -> None:
    list(model.parameters())[-1].grad.fill_(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30], ids=str)
@pytest.mark.parametrize("methods", [[], [ClipNorm()], [DPSDense(update_ratio=0.25), EMA(decay=0.5)]])
def test_a_step_with_a_gradient_that_is_not_finite_did_not_happen(value, methods, caplog):
    """Naive: NaN everywhere, or with clipping a step of zeros in silence. (1e30: finite, its square is not.)"""
    data = batches(TOTAL)
    skipping, plain = bert(dropout=0.0), bert(dropout=0.0)
    run = attached(skipping, *methods, optimizer=torch.optim.AdamW(skipping.parameters(), 3e-3))
    with caplog.at_level(logging.WARNING):
        for i, batch in enumerate(data[:6]):
            run.loss(batch).backward()
            if i in (1, 4):
                spoil(skipping, value)
            run.optimizer.step()
            run.optimizer.zero_grad()
    expected = attached(plain, *methods, optimizer=torch.optim.AdamW(plain.parameters(), 3e-3))
    train(expected, [data[i] for i in (0, 2, 3, 5)])
    assert_same(copied(skipping), copied(plain))
    assert (run.index, run.finite.skipped) == (4, 2)
    assert run.state_dict()["skipped"] == 2
    (said,) = [r.getMessage() for r in caplog.records if "not finite" in r.getMessage()]
    assert "step 2 is not finite" in said
    assert "skipped and counted" in said


def test_steps_that_are_never_finite_are_an_error():
    model = bert(dropout=0.0)
    run = attached(model)
    for i in range(IN_A_ROW):
        run.loss(batches(1)[0]).backward()
        spoil(model, math.nan)
        if i == IN_A_ROW - 1:
            with pytest.raises(UsageError, match=f"gradients of {IN_A_ROW} optimizer steps in a row were not finite"):
                run.optimizer.step()
        else:
            run.optimizer.step()
        run.optimizer.zero_grad()


def test_large_gradients_in_half_precision_are_finite():
    """Naive: the norm of float16 gradients overflows at 65,504."""
    model = nn.Linear(300, 300, dtype=torch.float16)
    run = attached(model, optimizer=sgd(model, 1e-4))
    run.enter()
    for p in model.parameters():
        p.grad = torch.full_like(p, 1e4)
    run.optimizer.step()
    assert run.index == 1


def test_sparse_gradients_have_a_norm():
    model = nn.Embedding(9, 4, sparse=True)
    run = attached(model)
    for value, index in ((1.0, 1), (math.nan, 1)):
        run.enter()
        (model(torch.tensor([1, 1, 2])) * value).sum().backward()
        run.optimizer.step()
        run.optimizer.zero_grad()
        assert run.index == index


def test_nan_targets_are_refused():
    data = points(1)[0]
    labels = torch.zeros(8, dtype=torch.float64)
    labels[3] = math.nan
    with pytest.raises(UsageError, match="label of row 3 of this batch is NaN"):
        attached(Net()).loss({**data, "labels": labels})
