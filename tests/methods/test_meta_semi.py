"""MetaSemi against gradients by hand, in `Run` and in `fit`."""

from __future__ import annotations

import math

import pytest
import torch

from fit_helpers import save_tiny_bert, toy, weights
from helpers import Net, assert_same, bert, copied, points
from steadytune import SAM, MetaSemi, Run, fit
from steadytune.errors import UsageError

LR = 0.3


def texts():
    return [{"x": batch["x"]} for batch in points(3, seed=8)]


def run_of(*methods, model=None):
    model = model or Net()
    return Run(model, methods).attach(torch.optim.SGD(model.parameters(), LR))


def train_step(run, batch):
    run.loss(batch).backward()
    run.optimizer.step()
    run.optimizer.zero_grad()


def trained(run, steps=1):
    for batch in points(steps):
        train_step(run, batch)
    return run


def gradient(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def losses(model, answers, x):
    labels = torch.zeros(len(x), dtype=torch.long)
    return -(answers * model(x, labels)["logits"].log_softmax(-1)).sum(-1)


def test_texts_count_that_pull_as_the_rows_do():
    """Two steps by hand: the sign of the inner product chooses, and the answers are those of averaged weights."""
    model, mean = Net(), Net()
    run = run_of(MetaSemi(unlabelled=texts, decay=0.6, reach=1e-7))
    with torch.no_grad():  # the mean begins elsewhere, as with answers of its own nothing would be learned
        for name, p in mean.named_parameters():
            p.add_(0.3 * torch.ones_like(p).cumsum(-1))
            run[MetaSemi].mean[name].copy_(p)
    counted = []
    for step, batch in enumerate(points(2)):
        x = texts()[step]["x"]
        rows = gradient(model, model(**batch)["loss"])
        with torch.no_grad():
            answers = mean(x, torch.zeros(len(x), dtype=torch.long))["logits"].softmax(-1)
        each = [gradient(model, losses(model, answers, x)[i]) for i in range(len(x))]
        counts = torch.stack([sum((a * b).sum() for a, b in zip(rows, one, strict=True)) > 0 for one in each])
        added = gradient(model, (counts * losses(model, answers, x)).mean())
        with torch.no_grad():
            for p, t, g, u in zip(model.parameters(), mean.parameters(), rows, added, strict=True):
                p.sub_(LR * (g + u))
                t.lerp_(p, (0.5, 0.4)[step])
        counted.append(counts.double())
        train_step(run, batch)
        assert_same(copied(run.model), copied(model), atol=1e-10)
    assert 0 < torch.cat(counted).mean() < 1
    assert run[MetaSemi].kept() == float(torch.cat(counted).mean())
    assert run.passes.plain == pytest.approx(3)
    assert_same(run[MetaSemi].mean, copied(mean), atol=1e-10)


def test_a_step_in_which_no_text_counts_is_plain(monkeypatch):
    monkeypatch.setattr(MetaSemi, "losses", lambda self, run, texts, answers: torch.zeros(len(answers)).double())
    run = trained(run_of(MetaSemi(unlabelled=texts)), steps=3)
    assert run[MetaSemi].kept() == 0
    assert_same(copied(run.model), copied(trained(run_of(), steps=3).model))


def test_methods_that_replace_the_gradient_come_first():
    with pytest.raises(ValueError, match="put SAM before MetaSemi"):
        run_of(MetaSemi(unlabelled=texts), SAM())
    assert trained(run_of(SAM(), MetaSemi(unlabelled=texts)))[MetaSemi].kept() >= 0


def test_without_texts_or_classes_it_is_refused():
    with pytest.raises(ValueError, match="pass unlabelled=lambda: loader"):
        run_of(MetaSemi())
    model = bert(labels=1)
    run = Run(model, [MetaSemi(unlabelled=texts)]).attach(torch.optim.SGD(model.parameters(), LR))
    run.loss({"input_ids": torch.ones(2, 3, dtype=torch.long), "labels": torch.rand(2)}).backward()
    with pytest.raises(UsageError, match="one class a row"):
        run.optimizer.step()


def test_fit_gives_it_the_texts_without_labels(tmp_path):
    bert_ = save_tiny_bert(tmp_path / "model")
    base = {"model": bert_, "train": toy(40), "steps": 12, "validation_share": 0.0}
    fit(**base, output=tmp_path / "plain")
    fit(**base, output=tmp_path / "semi", unlabelled=toy(30, start=100)[["text"]], methods=["meta_semi"])
    plain, semi = weights(tmp_path / "plain"), weights(tmp_path / "semi")
    assert any(not torch.equal(semi[name], plain[name]) for name in plain)
    with pytest.raises(UsageError, match="meta_semi learns from texts without labels"):
        fit(**base, output=tmp_path / "none", methods=["meta_semi"])


def test_before_the_first_step_no_share_is_known():
    assert math.isnan(run_of(MetaSemi(unlabelled=texts))[MetaSemi].kept())
