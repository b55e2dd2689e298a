"""Mask training: weights that never move, shares that are exact, and scores that learn by hand numbers."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import assert_same, batches, bert, copied, train
from steadytune import HeadInit, MaskTraining, Run, TopLayers, apply_delta, inference_cost, save_delta
from steadytune.errors import UsageError
from steadytune.methods.mask_training import allotted

QUICK = {"settled": 0.25, "every": 1, "lr": 0.05}


def run_of(*methods, total=8, model=None, **optimizer):
    model = bert() if model is None else model
    run = Run(model, methods, total_steps=total, data=lambda: batches(4))
    return run.attach(torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.1))


def test_with_all_weights_kept_and_no_head_the_outputs_never_change():
    """Naive: decay or Adam moves a weight that has no gradient. The scores move all the same."""
    model, inputs = bert(dropout=0.0), batches(1)[0]
    before, outputs = copied(model), model(**inputs).logits
    run = run_of(MaskTraining(keep=1.0, strength=0.0, train_head=False, **QUICK), model=model)
    scores = {name: score.clone() for name, score in run[MaskTraining].scores.items()}
    train(run, batches(8))
    assert_same(copied(model), before)
    assert torch.equal(model(**inputs).logits, outputs)
    assert all(not torch.equal(run[MaskTraining].scores[name], score) for name, score in scores.items())
    assert run[MaskTraining].sparsity() == 0


@pytest.mark.parametrize("threshold", ["local", "tensor", "global"])
def test_the_kept_share_is_exact_and_kept_weights_are_those_of_the_base(threshold):
    base = copied(bert())
    run = train(run_of(MaskTraining(keep=0.6, threshold=threshold, **{**QUICK, "lr": 0.5})), batches(8))
    masks = run[MaskTraining].masks
    assert len(masks) == 12  # six matrices in each of two blocks
    size = sum(mask.numel() for mask in masks.values())
    kept = sum(int(mask.sum()) for mask in masks.values())
    if threshold == "tensor":
        assert all(int(mask.sum()) == math.ceil(mask.numel() * 0.6) for mask in masks.values())
    else:
        assert size * 0.6 <= kept <= size * 0.6 + len(masks)
        assert len({float(mask.float().mean()) for mask in masks.values()}) > 2  # the matrices compete
    assert run[MaskTraining].sparsity() == 1 - kept / size
    after = copied(run.model)
    for name, mask in masks.items():
        assert torch.equal(after[name], base[name] * mask)
        assert torch.equal(run.raw(name), base[name])
    moved = {name for name in base if not torch.equal(after[name], base[name])} - masks.keys()
    assert moved == {"classifier.weight", "classifier.bias"}


def test_the_share_falls_along_a_cubic_curve_and_then_stays():
    run, shares = run_of(MaskTraining(keep=0.5, threshold="global", **QUICK)), []
    for batch in batches(8):
        train(run, [batch])
        shares.append(1 - run[MaskTraining].sparsity())
    expected = [0.5 + 0.5 * (1 - min(1, t / 6)) ** 3 for t in range(1, 9)]
    assert shares == pytest.approx(expected, abs=1e-3)
    assert shares[5] == shares[7]


def test_a_score_learns_from_the_weight_times_its_gradient_and_from_the_mean_sigmoid():
    """Naive: the gradient of the masked weight alone; or that of W * M at a mask of ones."""
    model = bert(dropout=0.0, dtype=torch.float64)
    base = copied(model)
    run = run_of(MaskTraining(keep=0.5, strength=30.0, train_head=False, **QUICK), model=model)
    method, (first, second) = run[MaskTraining], batches(2)
    train(run, [first])
    scores = {n: s.clone().requires_grad_() for n, s in method.scores.items()}
    masks = {n: m.double().requires_grad_() for n, m in method.masks.items()}
    assert 0 < method.sparsity() < 0.5
    held = [moment.clone() for moment in method.moments[1]]
    train(run, [second])
    view = {n: base[n] * masks[n] for n in masks}
    torch.func.functional_call(model, view, kwargs=second).loss.backward()
    pressure = 1 - (1 - 2 / 6) ** 3
    (30.0 * pressure * torch.stack([s.sigmoid().mean() for s in scores.values()]).mean()).backward()
    for name, before, moment in zip(masks, held, method.moments[1], strict=True):
        slope = (moment - 0.9 * before) / 0.1  # what AdamW's first moment took in
        assert torch.allclose(slope, (masks[name].grad + scores[name].grad).float(), rtol=1e-4, atol=1e-6)


def test_shares_go_by_weights_with_the_rest_to_others_where_one_is_full():
    assert allotted(torch.tensor([1.0, 3.0]), 0.5).tolist() == pytest.approx([0.25, 0.75])
    assert allotted(torch.tensor([1.0, 3.0, 1.0]), 0.8).tolist() == pytest.approx([0.7, 1.0, 0.7])
    assert allotted(torch.tensor([1.0, 8.0, 4.0]), 0.8).tolist() == pytest.approx([0.4, 1.0, 1.0])
    assert allotted(torch.tensor([0.3, 0.4]), 1.0).tolist() == [1.0, 1.0]


def test_a_delta_holds_the_removed_weights_and_the_head(tmp_path):
    base = bert().state_dict()
    run = train(run_of(MaskTraining(keep=0.9, **QUICK)), batches(8))
    path = save_delta(tmp_path, base, run.model.state_dict())
    assert_same(apply_delta(path, base), run.model.state_dict())
    removed = sum(int((~mask).sum()) for mask in run[MaskTraining].masks.values())
    assert removed > 0
    assert path.stat().st_size < 8 * removed + 30_000  # an index and a value each; names and headers


def test_it_starts_from_a_probe_and_that_head_stays_if_asked():
    model = bert()
    run = run_of(MaskTraining(train_head=False, **QUICK), HeadInit(), model=model)
    head = model.classifier.weight.detach().clone()
    train(run, batches(8))
    assert torch.equal(model.classifier.weight, head)
    assert head.norm() > 0


def test_matrices_that_a_later_method_freezes_are_told():
    with pytest.raises(ValueError, match="which a later method froze"):
        run_of(MaskTraining(), TopLayers(blocks=1))


def test_with_a_teacher_the_loss_is_half_the_task_and_half_the_way_to_its_answers(tmp_path):
    """By hand, at T = 2; a student that answers as the teacher has the half of the task alone."""
    bert(seed=1).save_pretrained(tmp_path / "other")
    bert().save_pretrained(tmp_path / "self")
    teacher, batch = bert(seed=1).eval(), batches(1)[0]

    def loss(folder):
        return run_of(MaskTraining(teacher=str(folder)), model=bert(dropout=0.0)).loss(batch)

    outputs = bert(dropout=0.0)(**batch)
    with torch.no_grad():
        answers = teacher(**batch).logits
    own, known = ((z / 2).log_softmax(-1) for z in (outputs.logits, answers))
    far = (known.exp() * (known - own)).sum(-1).mean()
    assert torch.allclose(loss(tmp_path / "other"), 0.5 * outputs.loss + 0.5 * 4 * far, atol=1e-6)
    assert torch.allclose(loss(tmp_path / "self"), 0.5 * outputs.loss, atol=1e-6)


def test_a_teacher_of_other_classes_or_none_is_refused(tmp_path):
    bert(labels=2).save_pretrained(tmp_path / "two")
    with pytest.raises(ValueError, match="has the classes LABEL_0, LABEL_1 and"):
        run_of(MaskTraining(teacher=str(tmp_path / "two")))
    with pytest.raises(ValueError, match="cannot read its teacher"):
        run_of(MaskTraining(teacher=str(tmp_path / "nowhere")))
    model = bert(labels=1)
    model.save_pretrained(tmp_path / "one")
    run = run_of(MaskTraining(teacher=str(tmp_path / "one")), model=model)
    with pytest.raises(UsageError, match="a teacher of one class a row"):
        run.loss({**batches(1)[0], "labels": torch.rand(4)})


def test_the_zeros_of_a_model_are_those_that_are_counted(caplog):
    caplog.set_level("INFO", "steadytune")
    run = train(run_of(MaskTraining(keep=0.7, **QUICK)), batches(8))
    run.finish()
    masks = run[MaskTraining].masks
    assert inference_cost(run.model, 8).zeros == sum(int((~mask).sum()) for mask in masks.values())
    assert f"{100 * run[MaskTraining].sparsity():.1f} % of the weights" in caplog.text
