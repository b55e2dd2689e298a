"""TMix, supervised contrast and LayerDrop: hand numbers, and what must stay as it was."""

from __future__ import annotations

import math

import pytest
import torch

from architectures import tiny
from helpers import assert_same, batches, bert, copied, hash_dropout, llama, train
from steadytune import CausalHead, GroupWeights, LayerDrop, MetaWeightNet, Run, SupCon, TMix
from steadytune.errors import UsageError
from steadytune.functional import supervised_contrastive


def contrast_of(features, labels, temperature):
    return supervised_contrastive(features, labels.unsqueeze(0) == labels.unsqueeze(1), temperature).mean()


def run_of(model, *methods):
    return Run(model, methods, total_steps=8).attach(torch.optim.SGD(model.parameters(), 0.1))


def steady(**options):
    return bert(dropout=0.0, dtype=torch.float64, **options)


# ---------------------------------------------------------------- TMix


def mixed_at_block(model, inputs, share):
    """Loss of the mixtures, made inside the forward, so that autograd goes through both examples."""
    real = inputs["attention_mask"].bool()
    both = (real & real.roll(1, 0)).unsqueeze(-1)

    def mix(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        mixed = torch.where(both, share * hidden + (1 - share) * hidden.roll(1, 0), hidden)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    handle = model.bert.encoder.layer[0].register_forward_hook(mix)
    logits = model(**inputs).logits
    handle.remove()
    own, other = (torch.nn.functional.cross_entropy(logits, y) for y in (inputs["labels"], inputs["labels"].roll(1, 0)))
    return share * own + (1 - share) * other


def test_tmix_and_its_gradient_are_those_of_a_mixture_inside_the_forward():
    """Naive: the mixture is a constant, and only one of two examples learns from it, with a weight of 1."""
    inputs, model = batches(1)[0], steady()
    run = run_of(model, TMix(weight=2.0, block=0))
    run[TMix].share = lambda step: 0.7
    loss = run.loss(inputs)
    expected = model(**inputs).loss + 2 * mixed_at_block(model, inputs, 0.7)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
    weights = list(model.parameters())
    for found, value in zip(*(torch.autograd.grad(x, weights) for x in (loss, expected)), strict=True):
        assert torch.allclose(found, value, rtol=0, atol=1e-12)


def test_texts_of_a_row_mix_with_those_of_the_next_row():
    """Naive: in multiple choice each choice is mixed with the one before it, of the same row."""
    model = tiny("Bert", "MultipleChoice", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    ids = torch.randint(3, 30, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 2])}
    run = run_of(model, TMix(block=0))
    run[TMix].share = lambda step: 0.7
    loss = run.loss(inputs).item()

    def mix(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        rows = hidden.unflatten(0, (2, 3))
        mixed = (0.7 * rows + 0.3 * rows.roll(1, 0)).flatten(0, 1)
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    expected = model(**inputs).loss.item()
    handle = model.bert.encoder.layer[0].register_forward_hook(mix)
    logits = model(**inputs).logits
    handle.remove()
    own, other = (torch.nn.functional.cross_entropy(logits, y).item() for y in (inputs["labels"], torch.tensor([2, 0])))
    assert loss == pytest.approx(expected + 0.7 * own + 0.3 * other, abs=1e-6)


def test_tmix_mixes_the_states_of_the_dropout_draw_of_the_first_pass():
    """Naive: another draw, whose states are not those that the way between two examples was taken from."""
    inputs = batches(1)[0]
    model = hash_dropout(bert(dtype=torch.float64))
    run = run_of(model, TMix(block=0))
    run[TMix].share = lambda step: 1 - 1e-12  # the example itself: its loss once more
    loss, plain = run.loss(inputs), model(**inputs).loss
    assert loss.item() == pytest.approx(2 * plain.item(), abs=1e-9)


def test_tmix_goes_through_reentrant_checkpoints():
    """Naive: the way between two examples, made outside of a checkpointed block, gets no gradient there."""
    found = []
    for reentrant in (False, True):
        model = bert(dtype=torch.float64)
        if reentrant:
            enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            enable({"use_reentrant": True})
        run = run_of(model, TMix(block=0))
        torch.manual_seed(1)
        run.loss(batches(1)[0]).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_same(*found, atol=1e-14)  # sums in another order


def test_shares_are_drawn_anew_and_follow_the_beta_distribution():
    run = run_of(bert(), TMix(alpha=0.4))
    shares = []
    share = run[TMix].share
    run[TMix].share = lambda step: shares.append(share(step)) or shares[-1]
    train(run, batches(40))
    assert len(set(shares)) == 40
    assert min(shares) >= 0.5
    # max(s, 1 - s) of Beta(0.4, 0.4) has mean 0.85, half and half would have 0.5, a uniform one 0.75
    assert 0.8 < sum(shares) / 40 < 0.9


def test_tmix_takes_three_quarters_but_never_the_last_block_and_refuses_labels_of_tokens():
    assert [TMix().default(n) for n in (2, 3, 6, 12)] == [0, 1, 4, 9]
    with pytest.raises(ValueError, match="one label per row"):
        run_of(llama(), TMix()).loss(batches(1, tokens=True)[0])


# ---------------------------------------------------------------- supervised contrast


def test_supervised_contrast_by_hand():
    """Naive: a row is its own partner or in its own denominator; rows without a partner are divided by zero."""
    features = torch.tensor([[2.0, 0.0], [0.5, 0.0], [0.0, 3.0], [-1.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 2])
    near, right, away = (math.exp(c / 0.5) for c in (1.0, 0.0, -1.0))
    pair = -math.log(near / (near + right + away))  # rows 0 and 1 see each other, and one at right angles, one away
    assert float(contrast_of(features, labels, 0.5)) == pytest.approx(2 * pair / 4)
    labels = torch.tensor([0, 0, 0, 2])
    third = -math.log(right / (2 * right + right))
    first = (pair - math.log(right / (near + right + away))) / 2
    assert float(contrast_of(features, labels, 0.5)) == pytest.approx((2 * first + third) / 4)


def test_a_single_row_has_no_contrast_and_finite_gradients():
    features = torch.randn(1, 4, requires_grad=True)
    loss = contrast_of(features, torch.tensor([1]), 0.3)
    loss.backward()
    assert loss.item() == 0
    assert features.grad.isfinite().all()


def test_the_loss_is_a_mixture_on_what_the_last_layer_reads():
    inputs, model = batches(1)[0], steady()
    loss = run_of(model, SupCon(weight=0.7, temperature=0.3)).loss(inputs)
    features = model.bert(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
    contrast = contrast_of(features, inputs["labels"], 0.3)
    assert contrast.item() > 0
    expected = 0.3 * model(**inputs).loss + 0.7 * contrast
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


def test_losses_in_the_place_of_the_tasks_take_no_more_than_there_is():
    """Naive: each is added with its weight, which leaves the task's loss a share below zero, and training raises it."""
    outer = {"outer": lambda: batches(1)}
    for second in (CausalHead(), MetaWeightNet(**outer), SupCon(weight=0.2)):
        for recipe in ([SupCon(), second], [second, SupCon()]):
            with pytest.raises(UsageError, match=r"these take more \(.*SupCon 0.9.*leave one of them out, or lower"):
                run_of(bert(), *recipe)
    assert run_of(bert(), SupCon(weight=0.9), SupCon(weight=0.1)).loss_left == 0
    assert run_of(bert(), SupCon(weight=0.0), CausalHead()).loss_left == 0


def test_weighted_rows_count_as_much_as_what_contrast_leaves_of_the_task():
    """Naive: a row of weight 0.2 enters a contrast of 0.9 with 0.1 - 0.8 times its loss, which training raises."""
    inputs, model = batches(1)[0], steady()
    data = [{**inputs, "subgroup": torch.tensor([0, 0, 1, 1])}]
    contrast = run_of(steady(), SupCon(weight=0.9)).loss(inputs)
    run = Run(model, [SupCon(weight=0.9), GroupWeights(least=1)], total_steps=8, data=lambda: data)
    run.attach(torch.optim.SGD(model.parameters(), 0.1))
    run[GroupWeights].weights = torch.tensor([1.8, 0.2], dtype=torch.float64)
    rows = torch.nn.functional.cross_entropy(model(**inputs).logits, inputs["labels"], reduction="none")
    added = (torch.tensor([0.8, 0.8, -0.8, -0.8]) * rows).mean()
    assert run.loss(data[0]).item() == pytest.approx((contrast + 0.1 * added).item(), abs=1e-8)


def test_contrast_needs_one_class_and_one_vector_a_row():
    numbers = {**batches(1)[0], "labels": torch.rand(4)}
    with pytest.raises(UsageError, match="SupCon needs one class a row"):
        run_of(bert(labels=1), SupCon()).loss(numbers)
    with pytest.raises(ValueError, match="no linear layer"):
        run_of(llama(), SupCon())


def test_an_interrupted_forward_leaves_no_hook_that_keeps_its_features():
    model = bert()
    run = run_of(model, SupCon())

    def fail(*args):
        raise KeyboardInterrupt

    handle = model.classifier.register_forward_pre_hook(fail, prepend=True)
    with pytest.raises(KeyboardInterrupt):
        run.loss(batches(1)[0])
    handle.remove()
    run.leave()
    train(run, batches(1))
    assert not model.classifier._forward_pre_hooks
    assert run[SupCon].read.kept is None


# ---------------------------------------------------------------- LayerDrop


def test_a_skipped_block_hands_on_its_input_for_that_example_alone():
    """Naive: the whole batch skips, or the mean of input and output is handed on."""
    inputs, model = batches(1, equal=True)[0], steady()
    run = run_of(model, LayerDrop(p=0.5))
    draws = [torch.tensor([0.1, 0.9, 0.4, 0.5]), torch.tensor([0.9, 0.9, 0.2, 0.1])]
    run[LayerDrop].hook.draw = lambda hidden: draws.pop(0)
    loss = run.loss(inputs)
    run[LayerDrop].hook.remove()
    states = model.bert.embeddings(inputs["input_ids"])
    for block, acts in zip(model.bert.encoder.layer, ([0, 1, 0, 1], [1, 1, 0, 0]), strict=True):
        after = block(states, None)
        after = after[0] if isinstance(after, tuple) else after
        states = torch.where(torch.tensor(acts).bool().view(-1, 1, 1), after, states)
    logits = model.classifier(model.bert.pooler(states))
    expected = torch.nn.functional.cross_entropy(logits, inputs["labels"])
    assert loss.item() == pytest.approx(expected.item(), abs=1e-12)


def test_hidden_states_are_those_that_a_skip_hands_on_whatever_the_model_was_asked_before():
    """Naive: transformers keeps the output of a block before the skip, once it has been asked for hidden states."""
    inputs, model = batches(1)[0], steady()
    model(**inputs, output_hidden_states=True)
    run = run_of(model, LayerDrop(p=0.9))
    run[LayerDrop].hook.draw = lambda hidden: torch.zeros(len(hidden))
    run.enter()
    embedded, *others = model(**inputs, output_hidden_states=True).hidden_states
    run.leave()
    assert all(torch.equal(states, embedded) for states in others)


def test_evaluation_uses_every_block_and_a_finished_run_skips_none():
    inputs, model = batches(1)[0], bert(dropout=0.0)
    plain = model.eval()(**inputs).logits
    model.train()
    run = run_of(model, LayerDrop(p=0.9))
    run.loss(inputs)
    assert torch.equal(model.eval()(**inputs).logits, plain)
    assert not torch.equal(model.train()(**inputs).logits, plain)
    run.leave()
    run.finish()
    assert torch.equal(model(**inputs).logits, plain)


def test_a_later_run_on_the_model_skips_with_its_own_probability_alone():
    """Naive: the hooks of a run that was never finished go on skipping blocks."""
    model = bert(dropout=0.0)
    run_of(model, LayerDrop(p=0.9)).loss(batches(1)[0])
    run = run_of(model, LayerDrop(p=0.0))
    plain = bert(dropout=0.0)
    train(run, batches(2))
    train(run_of(plain), batches(2))
    assert_same(copied(model), copied(plain))
