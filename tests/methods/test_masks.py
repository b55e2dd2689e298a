"""Facts of the methods that mask gradients, pull weights or average them: by hand numbers and by counting."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math

import pytest
import torch
from torch import nn

from helpers import Net, assert_same, batches, bert, collate, copied, differs, hash_dropout, llama, points, rows, train
from steadytune import (
    EMA,
    L2SP,
    LAWA,
    LLRD,
    METHODS,
    SIFT,
    SWA,
    Adapters,
    BiDrop,
    ChildTuningD,
    ChildTuningF,
    ClipNorm,
    RecAdam,
    ROSEFirst,
    ROSESecond,
    Run,
    only,
)
from steadytune.core import Method
from steadytune.core.tensors import byte_mask
from steadytune.core.views import Views
from steadytune.functional import anneal, symmetric_kl
from steadytune.methods.bases import static_mask as masks
from steadytune.methods.bases.bilevel import BiLevel
from steadytune.methods.rose import divergence


def run_of(method, model=None, *, optimizer=None, data=None, total=8, lr=1e-3):
    model = bert() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.1) if optimizer is None else optimizer
    methods = method if isinstance(method, list) else [method]
    return Run(model, methods, total_steps=total, data=data or (lambda: batches(2))).attach(optimizer)


# ---------------------------------------------------------------- Child-Tuning-F


@pytest.mark.parametrize("share", [1 / 256, 77 / 256, 0.5, 255 / 256])
def test_every_byte_of_a_draw_is_uniform(share):
    """64 random bits at a time: without bounds torch draws 63, and every eighth entry would come twice as often."""
    n = 1 << 17
    mask = byte_mask((n,), share, torch.Generator().manual_seed(3)).view(-1, 8).double().mean(0)
    spread = 5 * math.sqrt(share * (1 - share) / (n / 8))
    assert (mask - share).abs().max() < spread


def test_a_draw_has_the_shape_asked_for():
    for shape in ((), (3,), (5, 7), (0, 4)):
        assert byte_mask(shape, 0.5, torch.Generator()).shape == shape


def test_child_tuning_f_keeps_the_expectation():
    """The mean masked gradient is the gradient: with the share that is drawn (77 / 256), not with ``keep``."""
    run = run_of(ChildTuningF(keep=0.3))
    method, weight = run[ChildTuningF], next(w for w in run.weights() if w.kind == "embedding")
    rates = []
    for run.index in range(300):
        rates.append(method.draw(run, weight).double().mean() / method.share)
    n = 300 * weight.data.numel()
    assert abs(float(torch.stack(rates).mean()) - 1) < 5 * math.sqrt((1 - 0.3) / 0.3 / n)
    assert method.share == 77 / 256
    assert ChildTuningF(keep=1e-4).share == 1 / 256


# ---------------------------------------------------------------- masks made once


def test_fisher_by_hand():
    """One parameter, three batches: mean of squares, of batches or of examples; clipped before squaring."""

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([1.0, 1.0]).double())

        def forward(self, x):
            return ((x @ self.w).mean(),)

    x = [torch.tensor([[1.0, 0.0], [3.0, 4.0]]).double(), torch.tensor([[0.0, 2.0]]).double()]
    data = [{"x": v} for v in x]
    expected = {
        ("batch", math.inf): [(2**2 + 0) / 2, (2**2 + 2**2) / 2],  # gradients (2, 2), (0, 2)
        ("example", math.inf): [(1 + 9 + 0) / 3, (0 + 16 + 4) / 3],
        ("batch", 1.0): [0.25, (0.5 + 1) / 2],
    }
    for (per, clip), values in expected.items():
        model = Line()
        method = ChildTuningD(per=per, clip=clip, scope="all")
        run = run_of(method, model, data=lambda: data)
        found = run[ChildTuningD].fisher(run, run.weights(), data)["w"]
        assert torch.allclose(found, torch.tensor(values).double(), atol=1e-5)
    grouped = run[ChildTuningD].fisher(run, run.weights(), [data])["w"]  # both as micro-batches of one step: (1, 2)
    assert torch.allclose(grouped, torch.tensor([1.0, 4.0]).double() / 5, atol=1e-5)


def test_sampled_labels_give_another_fisher_and_refuse_what_they_cannot_do():
    run = run_of(ChildTuningD(labels="sampled"))
    other = run_of(ChildTuningD())
    data = batches(3)
    one, two = (r[ChildTuningD].fisher(r, r.weights(), data) for r in (run, other))
    assert differs(one, two)
    regression = run_of(ChildTuningD(labels="sampled"), bert(labels=1))
    with pytest.raises(ValueError, match="labels='sampled' needs one class label per row"):
        regression.loss({**batches(1)[0], "labels": torch.zeros(4)})


@pytest.mark.parametrize("method", [ChildTuningD(keep=0.3), SIFT(keep=0.1)], ids=lambda m: type(m).__name__)
def test_the_data_are_looked_at_once_and_never_after_a_resume(method):
    looks = []

    def data():
        looks.append(1)
        return batches(2)

    run = train(run_of(method, data=data), batches(3))
    assert len(looks) == 1
    saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    again = run_of(method, data=data)
    again.model.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    train(again, batches(1))
    assert len(looks) == 1
    assert_same(again.methods[0].masks, run.methods[0].masks)


@pytest.mark.parametrize("method", [ChildTuningD(), SIFT()], ids=lambda m: type(m).__name__)
def test_no_data_is_an_error_before_training(method):
    with pytest.raises(ValueError, match=r"looks at training batches first: pass Run\(\.\.\., data=lambda: loader\)"):
        Run(bert(), [method])
    with pytest.raises(ValueError, match="empty"):
        run_of(method, data=lambda: iter(())).loss(batches(1)[0])


def test_a_loader_that_shuffles_leaves_the_order_and_dropout_of_training_alone():
    def data():
        torch.rand(3)
        return batches(2)

    ends = []
    for look in (data, lambda: batches(2)):
        torch.manual_seed(1)
        ends.append(copied(train(run_of(SIFT(keep=0.1), data=look), batches(2)).model))
    assert_same(*ends)


def test_child_tuning_d_masks_the_blocks_with_one_threshold_and_decay_still_moves():
    run = run_of(ChildTuningD(keep=0.3), lr=0.1)
    before = copied(run.model)
    train(run, batches(3))
    masks = run[ChildTuningD].masks
    blocks = [w for w in run.weights() if w.block is not None]
    assert set(masks) == {w.name for w in blocks}
    entries = sum(m.numel() for m in masks.values())
    assert sum(int(m.sum()) for m in masks.values()) == math.ceil(0.3 * entries)
    shares = {name: float(m.double().mean()) for name, m in masks.items()}
    assert max(shares.values()) - min(shares.values()) > 0.2  # of all tensors together, not of each
    for w in blocks:
        out = ~masks[w.name]
        expected = before[w.name][out] * (1 - 0.1 * 0.1) ** 3  # Adam's part is exactly zero
        assert torch.allclose(w.data[out], expected, atol=1e-6)


@pytest.mark.parametrize(
    "method", [SIFT(keep=0.05), ChildTuningD(keep=0.3, frozen=True)], ids=["sift", "child_tuning_d"]
)
@pytest.mark.parametrize(
    "optimizer",
    [
        functools.partial(torch.optim.AdamW, weight_decay=0.1),
        functools.partial(torch.optim.SGD, momentum=0.9, weight_decay=0.1),
        functools.partial(torch.optim.Adafactor, weight_decay=0.1),  # moves entries of zero gradient, too
    ],
    ids=["adamw", "momentum", "factored"],
)
@pytest.mark.parametrize("beside", [[], [L2SP(scope="linear", decoupled=False)]], ids=["alone", "decay"])
def test_entries_that_are_masked_for_good_stay_under_any_optimizer(method, optimizer, beside):
    """The moments of masked entries may change, because no step uses them."""
    model = bert()
    before = copied(model)
    run = run_of([copy.deepcopy(method), *beside], model, optimizer=optimizer(model.parameters(), lr=0.05))
    train(run, batches(3))
    masks = run[type(method)].masks
    assert masks
    assert not all(mask.all() for mask in masks.values())
    for name, mask in masks.items():
        after = model.get_parameter(name)
        assert torch.equal(after[~mask], before[name][~mask])
        assert not mask.any() or not torch.equal(after[mask], before[name][mask])


@dataclasses.dataclass
class LastStays(Method):
    """Freezes the last entry of each weight."""

    def pull_back(self, run, weights):
        for w in weights:
            mask = torch.ones_like(w.data, dtype=torch.bool)
            mask.view(-1)[-1] = False
            run.freeze(w, mask, state=False)


@pytest.mark.parametrize(
    "method", [SIFT(keep=0.2), ChildTuningD(keep=0.2, frozen=True)], ids=["sift", "child_tuning_d"]
)
@pytest.mark.parametrize("beside", [[], [LastStays()]], ids=["alone", "another mask"])
def test_indices_of_few_entries_train_as_their_mask_does(method, beside, monkeypatch):
    ends = []
    for few in (-1.0, 1.0):
        monkeypatch.setattr(masks, "FEW", few)
        torch.manual_seed(1)
        run = train(run_of([*beside, copy.deepcopy(method)]), batches(3))
        assert any(i is not None for i in run[type(method)].indices.values()) == (few == 1.0)
        ends.append({**copied(run.model), **run.optimizer.state_dict()["state"]})
    assert_same(*ends)


# ---- nothing is put back where nothing moves

SGD, ADAMW, ADAM = torch.optim.SGD, torch.optim.AdamW, torch.optim.Adam
MOVED = {  # recipe, optimizer, and whether masked entries have to be put back after a step
    "adamw": ([SIFT(keep=0.05)], functools.partial(ADAMW, weight_decay=0.1), False),
    "clipped": ([SIFT(keep=0.05), ClipNorm(0.1)], functools.partial(ADAM, amsgrad=True), False),
    "momentum": ([SIFT(keep=0.05)], functools.partial(SGD, momentum=0.9, nesterov=True), False),
    "decay": ([SIFT(keep=0.05, decay=True)], functools.partial(ADAMW, weight_decay=0.1), True),
    "sign of zero": ([SIFT(keep=0.05)], functools.partial(SGD, maximize=True), True),
    "0 / 0": ([SIFT(keep=0.05)], functools.partial(ADAMW, eps=0.0), True),
    "anchor after the mask": ([SIFT(keep=0.05), L2SP(scope="linear")], functools.partial(SGD), True),
    "unknown": ([SIFT(keep=0.05)], torch.optim.NAdam, True),
    "many entries": ([SIFT(keep=0.2)], functools.partial(ADAMW, weight_decay=0.1), True),
}


@pytest.mark.parametrize(("methods", "optimizer", "back"), MOVED.values(), ids=MOVED)
def test_masked_entries_keep_every_bit_with_and_without_a_copy(methods, optimizer, back, monkeypatch):
    """Negative zeros too. Naive: no copy under decay, or a copy of every weight where none is needed."""
    held = []
    hold = Views._hold
    monkeypatch.setattr(Views, "_hold", lambda self, live, mask: held.append(live) or hold(self, live, mask))
    model = bert()
    with torch.no_grad():
        for p in model.parameters():
            p.view(-1)[::3] = -0.0
    before = copied(model)
    run = run_of(copy.deepcopy(methods), model, optimizer=optimizer(model.parameters(), lr=0.05))
    train(run, batches(3))
    assert bool(held) == back
    for name, mask in run[SIFT].masks.items():
        bits = [values[~mask].view(torch.int32) for values in (model.get_parameter(name).detach(), before[name])]
        assert torch.equal(*bits), name
    assert any(differs({n: p}, {n: before[n]}) for n, p in copied(model).items())


def test_moments_that_are_not_zero_are_not_relied_on():
    """A second training on the optimizer of the first: other entries, whose moments are not zero. Naive: they move."""
    run = train(run_of(SIFT(keep=0.05)), batches(2))
    run.restart()
    before = copied(run.model)
    train(run, batches(2, seed=5))
    for name, mask in run[SIFT].masks.items():
        assert torch.equal(run.model.get_parameter(name).detach()[~mask], before[name][~mask])


def test_entries_without_a_gradient_are_not_chosen():
    """Few tokens of a vocabulary occur in the batches. Naive: 0 is the threshold, all entries tie, all are trained."""
    run = run_of(SIFT(keep=0.75))
    seen = torch.cat([batch["input_ids"].flatten() for batch in batches(2)]).unique()
    run.loss(batches(1)[0])
    name = next(w.name for w in run.weights() if w.kind == "embedding" and "word" in w.name)
    mask = run[SIFT].masks[name]
    assert mask[seen].any()
    absent = torch.ones(len(mask), dtype=torch.bool)
    absent[seen] = False
    assert absent.float().mean() > 0.25, "the batches hold most tokens: the threshold is not 0"
    assert not mask[absent].any()


def test_sift_trains_its_support_and_the_whole_head():
    run = run_of(SIFT(keep=0.05))
    before = copied(run.model)
    train(run, batches(3))
    for name, p in run.model.named_parameters():
        moved = p.detach() != before[name]
        if name.startswith("classifier"):
            assert name not in run[SIFT].masks
            assert moved.all()
        else:
            assert not moved[~run[SIFT].masks[name]].any()


def test_sift_decays_what_it_does_not_mask_and_its_trained_entries_only_when_asked():
    """One step of SGD by hand: w - lr * g without decay, w - lr * (g + 0.5 * w) with it; the head always decays."""
    for decay in (False, True):
        model = bert(dropout=0.0, dtype=torch.float64)
        before = copied(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.5)
        run = run_of(SIFT(keep=0.2, decay=decay), model, optimizer=optimizer)
        run.loss(batches(1)[0]).backward()
        gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        for name, p in model.named_parameters():
            mask = run[SIFT].masks.get(name, torch.ones_like(p, dtype=torch.bool))
            rate = 0.5 if decay or name.startswith("classifier") else 0.0
            step = 0.1 * (gradient[name] + rate * before[name])
            assert torch.allclose(p.detach()[mask], (before[name] - step)[mask], atol=1e-12, rtol=0), (decay, name)
            assert torch.equal(p.detach()[~mask], before[name][~mask])


def test_sift_splits_groups_that_decay_and_keeps_their_options():
    """What is not in its scope stays where it was; a group without decay is left whole; LLRD's rates stay."""
    model = bert()
    named = dict(model.named_parameters())
    biases = [p for n, p in named.items() if n.endswith("bias")]
    others = [p for n, p in named.items() if not n.endswith("bias")]
    optimizer = torch.optim.AdamW(
        [{"params": others, "lr": 2e-3}, {"params": biases, "weight_decay": 0.0}], lr=1e-3, weight_decay=0.1
    )
    run_of(SIFT(scope="linear"), model, optimizer=optimizer)
    first, second, third = optimizer.param_groups
    linear = {id(named[n]) for n in named if n.endswith("weight") and "LayerNorm" not in n and "embeddings" not in n}
    linear -= {id(named["classifier.weight"])}
    assert (first["weight_decay"], second["weight_decay"], first["lr"], second["lr"]) == (0.1, 0.0, 2e-3, 2e-3)
    assert {id(p) for p in second["params"]} == linear
    assert {id(p) for p in first["params"]} == {id(p) for p in others} - linear
    assert third["params"] == biases
    rates = []
    for order in ([LLRD(decay=0.5), SIFT()], [SIFT(), LLRD(decay=0.5)]):
        run = run_of(order, model := bert())
        rates.append({w.name: (w.group["lr"], w.group["weight_decay"]) for w in run.weights()})
        assert sum(len(g["params"]) for g in run.optimizer.param_groups) == len(list(model.parameters()))
    assert rates[0] == rates[1]
    assert len({lr for lr, _ in rates[0].values()}) == 4


def test_a_state_from_before_sift_had_an_option_for_decay_resumes_with_decay_or_says_so():
    run = train(run_of(SIFT(keep=0.1, decay=True)), batches(2))
    saved = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict()))
    del saved[1]["steadytune"]["recipe"][0]["decay"]
    with pytest.raises(ValueError, match=r"SIFT\.decay was True when the state was saved and is False here"):
        run_of(SIFT(keep=0.1)).optimizer.load_state_dict(saved[1])
    again = run_of(SIFT(keep=0.1, decay=True))
    again.model.load_state_dict(saved[0])
    again.optimizer.load_state_dict(saved[1])
    for both in (run, again):
        torch.manual_seed(3)
        train(both, batches(2, seed=5))
    assert_same(copied(again.model), copied(run.model))


# ---------------------------------------------------------------- two draws


@pytest.mark.parametrize("name", ["rose_first", "rose_ensemble", "bi_drop"])
def test_two_equal_draws_are_refused(name):
    with pytest.raises(ValueError, match=f"{METHODS[name].__name__} compares two dropout draws"):
        Run(bert(dropout=0.0), [METHODS[name]()])


@pytest.mark.parametrize("name", ["rose_first", "rose_ensemble", "bi_drop"])
def test_a_loop_that_hides_its_batches_is_refused(name):
    run = run_of(METHODS[name]())
    run.enter()
    run.model(**batches(1)[0]).loss.backward()
    with pytest.raises(RuntimeError, match=r"run\.loss\(batch\)"):
        run.optimizer.step()


def test_bi_drop_scores_by_hand():
    """Agreement |g1 + g2| / |g1 - g2|; a gradient that is zero twice scores nothing, equal ones more than all."""
    run = run_of(BiDrop())
    weight = next(w for w in run.weights() if w.data.shape == (32,))
    g1, g2 = torch.zeros(32), torch.zeros(32)
    g1[:3], g2[:3] = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([3.0, 2.0, -1.0])
    weight.grad = g1
    weight.data.fill_(2.0)
    found = BiDrop(score="stability").rank(weight, g2)
    assert found[0] == 2.0
    assert found[1] > 1e6
    assert found[2:].tolist() == [0.0] * 30
    assert BiDrop(score="scale").rank(weight, g2)[:3].tolist() == [2.0, 2.0, 0.0]
    assert float(BiDrop(score="both").rank(weight, g2)[0]) == 4.0


def test_bi_drop_that_keeps_all_takes_the_mean_of_both_gradients():
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = run_of(BiDrop(keep=1.0), model, optimizer=optimizer)
    batch = batches(1)[0]
    run.loss(batch).backward()
    first = {n: p.grad.clone() for n, p in model.named_parameters()}
    second = run.gradient(run.batch, dropout_seed=run.draw_seed("bi-drop", rank=True))
    before = copied(model)
    optimizer.step()
    assert differs(first, second)
    for n, p in model.named_parameters():
        assert torch.allclose(p.detach(), before[n] - 0.05 * (first[n] + second[n]), atol=1e-7)


# ---------------------------------------------------------------- ROSE


@pytest.mark.parametrize("granularity", ["tensor", "element"])
def test_rose_freezes_weight_and_moments(granularity):
    run = train(run_of(ROSEFirst(keep=0.5, granularity=granularity)), batches(1))
    chosen = {}
    mask = run[ROSEFirst].mask

    def watched(run, weights):
        chosen.update(mask(run, weights))
        return chosen

    run[ROSEFirst].mask = watched
    before = copied(run.model)
    moments = {n: {k: v.clone() for k, v in run.optimizer.state[p].items()} for n, p in run.model.named_parameters()}
    train(run, batches(2)[1:])
    assert not any(n.endswith("bias") for n in chosen)
    for name, m in chosen.items():
        p = run.model.get_parameter(name)
        out = ~m.expand_as(p)
        assert torch.equal(p[out], before[name][out])
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(run.optimizer.state[p][key][out], moments[name][key][out])
    if granularity == "tensor":
        assert sum(int(m) for m in chosen.values()) == math.ceil(0.5 * len(chosen))
    assert any((~m).any() for m in chosen.values())


def test_the_two_scores_of_rose_second_part_on_a_constant_gradient():
    """The relative change of the momentum goes to 0; the authors' form to |0.1 / (1 - 0.9^(t - 1)) - 1|, so to 0.9."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3).double())

        def forward(self, x):
            return ((self.w * x).sum(),)

    for score, limit in (("change", lambda t: 0.1 * 0.9 ** (t - 1) / (1 - 0.9 ** (t - 1))),
                         ("authors", lambda t: abs(0.1 / (1 - 0.9 ** (t - 1)) - 1))):  # fmt: skip
        seen = []

        class Watched(ROSESecond):
            def smallest(self, run, risks, seen=seen):
                seen += [float(r) for r in risks.values()]
                return super().smallest(run, risks)

        run = run_of(Watched(keep=0.5, scope="all", score=score), Constant())
        train(run, [{"x": torch.tensor([1.0, 2.0, 3.0]).double()}] * 6)
        assert seen == pytest.approx([limit(t) for t in range(2, 7)], abs=1e-12)


def test_rose_compares_draws_where_a_token_is_predicted():
    """A causal model's logits are scored against the next token: that one's label counts, not the token's own."""
    run = run_of(ROSEFirst(), hash_dropout(llama()))
    batch = collate(rows(4, tokens=True))
    one, other = (logits[:, :-1] for logits in run.task(batch, copies=2)[1]["logits"].chunk(2))
    labelled = batch["labels"][:, 1:] != -100
    assert not labelled.all()
    expected = (symmetric_kl(one, other) * labelled).sum()
    assert expected > 0
    assert torch.allclose(divergence(run, batch, run.methods[0]), expected)


def test_rose_second_needs_adams_moment():
    model = bert()
    with pytest.raises(ValueError, match="ROSESecond compares gradients with Adam's first moment, which SGD"):
        run_of(ROSESecond(), model, optimizer=torch.optim.SGD(model.parameters(), 0.1))


# ---------------------------------------------------------------- RecAdam, SWA


def test_annealing_by_hand():
    assert anneal(5, 5, 3.0, "sigmoid") == 0.5
    assert anneal(6, 5, 2.0, "sigmoid") == pytest.approx(1 / (1 + math.exp(-2)))
    assert anneal(1, 1e6, 1.0, "sigmoid") < 1e-300  # no overflow
    assert [anneal(t, 4, 0, "linear") for t in (1, 4, 9)] == [0.25, 1.0, 1.0]
    assert anneal(1, 0, 0, "linear") == 1.0


def test_recadam_in_shares_of_the_training_is_recadam_in_steps():
    shares, steps = RecAdam(gamma=3.0, t0=0.5, k=16.0), RecAdam(gamma=3.0, t0=4.0, k=2.0, unit="steps")
    ends = []
    for method in (shares, steps):
        torch.manual_seed(1)
        ends.append(copied(train(run_of(method, total=8), batches(5)).model))
    assert_same(*ends)


def test_recadam_refuses_a_pull_that_overshoots():
    with pytest.raises(ValueError, match=r"lr \* gamma below 1, got 0.001 \* 5000 = 5: .* gamma below 1000"):
        run_of(RecAdam(), lr=1e-3)
    run_of(RecAdam(), lr=1e-4)


def test_recadam_pulls_home_at_first_and_lets_go_in_the_end():
    """With no gradient to speak of, the first step goes half-way back (lr gamma = 0.5), a late one not at all."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    run = run_of(RecAdam(gamma=500.0, t0=0.5, k=1000.0), model, optimizer=optimizer)
    start = copied(model)
    batch = points(1)[0]
    for index, share in ((0, 0.5), (7, 1.0)):
        run.index = index
        with torch.no_grad():
            for n, p in model.named_parameters():
                p.copy_(start[n] + 1)
        run.loss(batch).backward()
        for p in model.parameters():
            p.grad.zero_()
        optimizer.step()
        assert_same(copied(model), {n: s + share for n, s in start.items()}, atol=1e-12)


def test_recadam_with_the_authors_anneal_w_is_a_group_with_a_smaller_rate():
    """anneal_w = 0.5 by hand: the task's update and the pull are halved, weight decay is not."""
    lr, half, gamma, decay = 0.02, 0.5, 3.0, 0.25
    model, references = Net(), copied(Net())
    group = {"params": list(model.parameters()), "lr": half * lr, "weight_decay": decay / half}
    method = RecAdam(gamma=gamma, t0=2.0, k=1.0, unit="steps")
    run = run_of(method, model, optimizer=torch.optim.SGD([group], lr))
    for t, batch in enumerate(points(4), start=1):
        before = copied(model)
        run.loss(batch).backward()
        gradient = {n: p.grad.clone() for n, p in model.named_parameters()}
        run.optimizer.step()
        run.optimizer.zero_grad()
        share = half / (1 + math.exp(-(t - 2.0)))
        for n, p in model.named_parameters():
            expected = before[n] - lr * share * gradient[n]
            expected = expected - lr * (half - share) * gamma * (expected - references[n])
            assert torch.allclose(p.detach(), expected - lr * decay * expected, atol=1e-14, rtol=0)


@pytest.mark.parametrize(("total", "rate"), [(40, 0.25), (4, 1.0)])
def test_ema_looks_back_over_a_tenth_of_the_training(total, rate):
    model = Net()
    run = run_of(EMA(), model, total=total)
    average = None
    for batch in points(3):
        train(run, [batch])
        raw = {n: run.raw(n).clone() for n in copied(model)}
        average = raw if average is None else {n: (1 - rate) * average[n] + rate * raw[n] for n in raw}
        assert_same(copied(model), average, atol=1e-14)


def test_ema_of_a_training_of_unknown_length_asks_for_it():
    with pytest.raises(ValueError, match="EMA needs the number of optimizer steps"):
        train(run_of(EMA(), Net(), total=None), points(1))
    assert train(run_of(EMA(decay=0.9), Net(), total=None), points(1)).index == 1


def test_swa_is_the_mean_of_every_second_weight_from_its_start():
    model = Net()
    run = run_of(SWA(start=0.25, every=2), model, total=8)
    raw = []
    for batch in points(8):
        train(run, [batch])
        raw.append({n: run.raw(n).clone() for n in copied(model)})
        taken = raw[2::2]
        expected = {n: torch.stack([r[n] for r in taken]).mean(0) for n in raw[0]} if taken else raw[-1]
        assert_same(copied(model), expected, atol=1e-14)


def test_lawa_is_the_mean_of_the_last_checkpoints_and_stays_between_them():
    """Naive: the mean of all checkpoints since the start, as SWA has it; or a mean that moves at every step."""
    model = Net()
    run = run_of(LAWA(last=2, every=3), model, total=12)
    raw = []
    for batch in points(12):
        train(run, [batch])
        raw.append({n: run.raw(n).clone() for n in copied(model)})
        taken = raw[2::3][-2:]
        expected = {n: torch.stack([r[n] for r in taken]).mean(0) for n in raw[0]} if taken else raw[-1]
        assert_same(copied(model), expected, atol=1e-14)


def test_lawa_resumed_between_two_checkpoints_is_uninterrupted():
    """Naive: the mean is made of the checkpoints since the resume."""
    data, options = points(8), {"last": 2, "every": 3}
    whole, resumed = (run_of(LAWA(**options), Net(), total=8) for _ in range(2))
    train(whole, data[:5])
    resumed.model.load_state_dict(whole.model.state_dict())
    resumed.optimizer.load_state_dict(copy.deepcopy(whole.optimizer.state_dict()))  # with the state of the run
    for run in (whole, resumed):
        train(run, data[5:])
    assert_same(copied(resumed.model), copied(whole.model))


def test_lawa_takes_twenty_checkpoints_of_a_training_by_default():
    run = run_of(LAWA(), Net(), total=100)
    assert run[LAWA].interval(run) == 5
    assert run_of(LAWA(), Net(), total=8)[LAWA].interval(run_of(LAWA(), Net(), total=8)) == 1


# ---------------------------------------------------------------- exclusions


FAMILIES = {
    kind: [name for name, cls in METHODS.items() if cls.exclusive == kind] for kind in ("mask", "anchor", "average")
}
PAIRS = [(kind, *pair) for kind, names in FAMILIES.items() for pair in itertools.combinations(names, 2)]


def test_the_families():
    assert len(FAMILIES["mask"]) == 9
    assert FAMILIES["anchor"] == ["l2sp", "recadam", "implicit_tune"]
    assert FAMILIES["average"] == ["mask_training", "weight_mixup", "ema", "swa", "lawa"]


@pytest.mark.parametrize(("kind", "one", "other"), PAIRS)
def test_every_forbidden_pair_is_refused_by_name_before_training(kind, one, other):
    options = {"outer": lambda: batches(2)}  # the default is for `fit`
    recipe = [METHODS[name](**(options if issubclass(METHODS[name], BiLevel) else {})) for name in (other, one)]
    recipe.sort(key=lambda method: not method.structure)  # those that change the model come first
    names = " and ".join(type(m).__name__ for m in recipe)
    with pytest.raises(ValueError, match=f"{names} are both an? {kind} of 'bert.* a weight can have one: remove one"):
        run_of(recipe, lr=1e-5)


def test_two_of_a_kind_may_share_a_model_but_not_a_weight():
    recipe = [only(RecAdam(gamma=3.0), lambda w: w.block == 0), only(L2SP(), lambda w: w.block == 1)]
    assert train(run_of(recipe), batches(2)).index == 2


def test_a_weight_whose_first_gradient_is_zero_is_named(caplog):
    """Naive: one half of each adapter is never trained, and nothing says so."""
    model = bert()
    loop = Run(model, [Adapters(), SIFT(keep=0.5)], data=lambda: batches(2))
    loop.attach(torch.optim.AdamW(model.parameters()))
    train(loop, batches(1))
    assert "SIFT: nothing of " in caplog.text
    assert "Give a scope without adapters, or leave SIFT out" in caplog.text
