"""FGM, PGD and FreeLB: the perturbation by hand, its ball, and that nothing else is touched."""

from __future__ import annotations

import pytest
import torch

from architectures import tiny
from helpers import batches, bert, copied, hash_noise, hashed_noise_of
from steadytune import FGM, PGD, FreeLB, Run, Step


def run_of(model, *methods):
    return Run(model, methods, total_steps=8).attach(torch.optim.SGD(model.parameters(), 0.1))


def steady(**options):
    return bert(dropout=0.0, dtype=torch.float64, **options)


def at(model, inputs, noise):
    """Loss with something added to the embeddings."""
    handle = model.bert.embeddings.word_embeddings.register_forward_hook(lambda m, a, output: output + noise)
    loss = model(**inputs).loss
    handle.remove()
    return loss


def unit(model, inputs, noise):
    noise = noise.clone().requires_grad_()
    (g,) = torch.autograd.grad(at(model, inputs, noise), noise)
    g = g * inputs["attention_mask"].unsqueeze(-1)
    return g / g.flatten(1).norm(dim=1).view(-1, 1, 1)


def blank(inputs):
    return torch.zeros(*inputs["input_ids"].shape, 16, dtype=torch.float64)


def in_units(model, *values):
    """In standard deviations of the embedding table's entries."""
    table = model.bert.embeddings.word_embeddings.weight
    return [value / float(table.detach().std()) for value in values]


def test_fgm_by_hand():
    inputs, model = batches(1)[0], steady()
    (epsilon,) = in_units(model, 0.7)
    loss = run_of(model, FGM(epsilon=epsilon, weight=2.0)).loss(inputs)
    noise = 0.7 * unit(model, inputs, blank(inputs))
    expected = model(**inputs).loss + 2 * at(model, inputs, noise)
    assert torch.allclose(loss, expected, atol=1e-12)
    for found, value in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (loss, expected)), strict=True):
        assert torch.allclose(found, value, atol=1e-12)


@pytest.mark.parametrize("epsilon", [0.5, 10.0], ids=["at the rim", "inside"])
def test_pgd_by_hand(epsilon):
    inputs, model = batches(1)[0], steady()
    radius, step_size = in_units(model, epsilon, 0.4)
    loss = run_of(model, PGD(epsilon=radius, step_size=step_size, steps=3)).loss(inputs)
    noise = blank(inputs)
    for _ in range(3):
        noise = noise + 0.4 * unit(model, inputs, noise)
        lengths = noise.flatten(1).norm(dim=1).view(-1, 1, 1)
        noise = torch.where(lengths > epsilon, noise * epsilon / lengths, noise)
    assert (noise.flatten(1).norm(dim=1) <= epsilon + 1e-12).all()
    assert (noise.flatten(1).norm(dim=1).min() > 0.49) or epsilon > 1
    assert torch.allclose(loss, model(**inputs).loss + at(model, inputs, noise), atol=1e-12)


@pytest.mark.parametrize("method", [FGM(), PGD()])
def test_the_attack_raises_the_loss_and_leaves_weights_and_gradients(method, monkeypatch):
    inputs, model = batches(1)[0], steady()
    before = copied(model)
    seen = []
    gradient = Step.gradient
    grads = lambda: [p.grad for p in model.parameters()]  # noqa: E731
    monkeypatch.setattr(
        Step, "gradient", lambda step, *args, **kw: (gradient(step, *args, **kw), seen.append(grads()))[0]
    )
    loss = run_of(model, method).loss(inputs)
    plain = model(**inputs).loss
    assert loss - plain > plain  # the second loss is larger than the first
    assert seen
    assert all(g is None for found in seen for g in found)
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_the_unit_is_that_of_the_pretrained_table_after_a_resume():
    """And an embedding table of another scale is perturbed in proportion."""
    method, inputs, model = FGM(), batches(1)[0], steady()
    run = run_of(model, method)
    run.loss(inputs).backward()
    run.optimizer.step()
    saved = run.state_dict()
    model.bert.embeddings.word_embeddings.weight.data.mul_(3)
    again = run_of(model, method)
    assert again[FGM].unit == pytest.approx(3 * float(run[FGM].unit), rel=0.1)
    again.load_state_dict(saved)
    assert again[FGM].unit == run[FGM].unit


def test_pgd_of_one_step_as_long_as_its_radius_is_fgm():
    inputs = batches(1)[0]
    one, other = (run_of(steady(), m).loss(inputs) for m in (FGM(0.3), PGD(0.3, step_size=0.3, steps=1)))
    assert torch.allclose(one, other, atol=1e-14)


@pytest.mark.parametrize("epsilon", [0.5, 10.0], ids=["at the rim", "inside"])
def test_freelb_by_hand(epsilon):
    """Naive: the loss at the last perturbation alone, as PGD has it; a start that does not know the length of rows."""
    inputs, model = batches(1)[0], steady()
    radius, step_size = in_units(model, epsilon, 0.4)
    with hash_noise():
        loss = run_of(model, FreeLB(epsilon=radius, step_size=step_size, steps=3, weight=2.0)).loss(inputs)
    real = inputs["attention_mask"].bool()
    draws = [hashed_noise_of(str(ids[mask].tolist()), 16, torch.float64)[: real.size(1)]
             for ids, mask in zip(inputs["input_ids"], real, strict=True)]  # fmt: skip
    entries = (real.sum(1) * 16.0).double().view(-1, 1, 1)
    noise, losses = epsilon / entries.sqrt() * torch.stack(draws) * real.unsqueeze(-1), []
    for _ in range(3):
        losses.append(at(model, inputs, noise))
        noise = noise + 0.4 * unit(model, inputs, noise)
        lengths = noise.flatten(1).norm(dim=1).view(-1, 1, 1)
        noise = torch.where(lengths > epsilon, noise * epsilon / lengths, noise)
    expected = model(**inputs).loss + 2 * torch.stack(losses).mean()
    assert torch.allclose(loss, expected, atol=1e-12)
    for found, value in zip(*(torch.autograd.grad(x, list(model.parameters())) for x in (loss, expected)), strict=True):
        assert torch.allclose(found, value, atol=1e-12)


def test_freelb_starts_inside_the_ball_and_padding_stays_clean():
    inputs = batches(1)[0]
    run, starts = run_of(steady(), FreeLB(epsilon=0.7)), []
    start = run[FreeLB].start
    run[FreeLB].start = lambda step: starts.append(start(step)) or starts[-1]
    run.loss(inputs)
    norms = starts[0].flatten(1).norm(dim=1)
    assert (norms < 0.7).all()
    assert (norms > 0.5 * 0.7 / 3**0.5).all()
    assert not starts[0][~inputs["attention_mask"].bool()].any()


def test_the_unit_is_that_of_embeddings_as_the_model_reads_them():
    """Naive: Gemma multiplies the table's rows by the root of the width, and the perturbation is so much smaller."""
    model = tiny("Gemma", "SequenceClassification")
    run = Run(model, [FGM()]).attach(torch.optim.SGD(model.parameters(), 0.1))
    embedding = model.get_input_embeddings()
    read = embedding(torch.arange(2, embedding.num_embeddings)).detach().std()
    assert run[FGM].unit == pytest.approx(float(read), rel=0.05)
