"""Causal head: the loss by hand, what the low-level features may not reach, and the plain model that is left."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy, linear

from architectures import tiny
from helpers import assert_same, batches, bert, copied, differs, llama, train
from steadytune import CausalHead, Run
from steadytune.errors import UsageError


def run_of(model, *methods):
    return Run(model, methods, total_steps=8).attach(torch.optim.SGD(model.parameters(), 0.1))


def steady(**options):
    return bert(dropout=0.0, dtype=torch.float64, **options)


def low_features(model, inputs):
    states = model.bert(**{k: v for k, v in inputs.items() if k != "labels"}, output_hidden_states=True)
    mask = inputs["attention_mask"].unsqueeze(-1)
    return (states.hidden_states[1] * mask).sum(1) / mask.sum(1), states.pooler_output


def test_before_the_first_step_the_loss_is_that_of_the_task():
    """Naive: two cross entropies are added up, or the pre-trained features have another dropout draw."""
    model, inputs = bert(), batches(1)[0]
    torch.manual_seed(1)
    plain = model(**inputs).loss
    torch.manual_seed(1)
    loss = run_of(model, CausalHead(mu=5.0)).loss(inputs)
    assert loss.item() == pytest.approx(plain.item(), abs=1e-6)


def test_the_loss_and_its_gradient_by_hand():
    inputs, model = batches(1)[0], steady()
    run = run_of(model, CausalHead(mu=0.3, permutations=2))
    method = run[CausalHead]
    torch.manual_seed(3)
    method.beside.low.data.normal_()
    method.beside.align.data.normal_()
    method.mean, method.steps = torch.randn(16, dtype=torch.float64), 5
    orders = [torch.tensor([1, 2, 3, 0]), torch.tensor([2, 0, 1, 3])]
    method.order = lambda step, k, rows: orders[k]
    with torch.no_grad():
        for p in model.bert.parameters():  # away from the pre-trained model
            p.add_(0.01 * torch.randn_like(p))
    loss = run.loss(inputs)
    low, high = low_features(model, inputs)
    _, before = low_features(steady(), inputs)
    logits, labels = model.classifier(high), inputs["labels"]
    shift = linear(low.detach() - method.mean, method.beside.low)
    others = torch.stack([(logits + shift[order]).softmax(-1) for order in orders]).mean(0)
    expected = (cross_entropy(logits + shift, labels) - others[range(4), labels].log().mean()) / 2
    expected = expected + 0.3 * (linear(high, method.beside.align) - before.detach()).square().mean()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    weights = [p for p in model.parameters() if p.requires_grad]
    for found, value in zip(*(torch.autograd.grad(x, weights) for x in (loss, expected)), strict=True):
        assert torch.allclose(found, value, rtol=0, atol=1e-12)


def test_what_is_evaluated_is_the_mean_over_the_training_rows_and_does_not_depend_on_the_second_head():
    """Naive: the mean of the low-level features is learnt as a part of the second head, and is lost with it."""
    model, inputs = steady(), batches(1)[0]
    run = train(run_of(model, CausalHead()), batches(6))
    method = run[CausalHead]
    assert method.beside.low.abs().max() > 0
    model.eval()
    logits = model(**inputs).logits
    bank = torch.cat([low_features(model, batch)[0] for batch in batches(6)])
    with torch.no_grad():
        mean = (logits.unsqueeze(1) + linear(bank - bank.mean(0), method.beside.low)).mean(1)
        assert torch.allclose(mean, logits, rtol=0, atol=1e-12)
        method.beside.low.normal_()
        assert torch.equal(model(**inputs).logits, logits)


def test_the_mean_is_that_of_the_steps_so_far():
    run, means = run_of(steady(), CausalHead(mu=0.0)), []
    method = run[CausalHead]
    for batch in batches(3):
        run.loss(batch).backward()
        means.append(method.seen[1])
        run.optimizer.step()
        run.optimizer.zero_grad()
        assert torch.allclose(method.mean, torch.stack(means).mean(0), atol=1e-12)


def test_without_mu_there_is_no_further_forward_and_no_copy_of_the_weights():
    run = run_of(bert(), CausalHead(mu=0.0))
    train(run, batches(1))
    assert (run.passes.forwards, run.passes.backwards) == (1, 1)
    assert run.nbytes() < 200
    other = train(run_of(bert(), CausalHead()), batches(1))
    assert (other.passes.forwards, other.passes.backwards) == (2, 1)


def test_weights_in_half_precision_train():
    run = Run(bert(dtype=torch.bfloat16), [CausalHead()])
    run.attach(torch.optim.SGD(run.model.parameters(), 0.1))
    before = copied(run.model)
    train(run, batches(2))
    assert all(p.isfinite().all() for p in run.model.parameters())
    assert differs(before, copied(run.model))


def test_a_step_that_is_left_leaves_no_trace_in_the_mean():
    data, ends = batches(2), []
    for interrupted in (False, True):
        run = run_of(steady(), CausalHead())
        if interrupted:
            run.loss(data[1])
            run.leave()
        ends.append(copied(train(run, data).model))
    assert_same(*ends)


def test_it_needs_one_class_and_one_vector_a_row():
    numbers = {**batches(1)[0], "labels": torch.rand(4)}
    with pytest.raises(UsageError, match="CausalHead needs one class a row"):
        run_of(bert(labels=1), CausalHead()).loss(numbers)
    texts = {k: v.view(2, 2, -1) if v.dim() > 1 else v[:2] for k, v in batches(1)[0].items()}
    with pytest.raises(UsageError, match=r"CausalHead needs one class a row .* features \(4, 8\)"):
        run_of(tiny("Bert", "MultipleChoice", vocab_size=64), CausalHead()).loss(texts)
    with pytest.raises(ValueError, match="CausalHead acts on the last layer of a classification head"):
        run_of(llama(), CausalHead())
