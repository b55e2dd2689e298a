"""EasyAdapt: the augmented features it stands for, what is evaluated, and where the domains come from."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from architectures import tiny
from fit_helpers import toy
from helpers import arguments, batches, bert, collate, copied, rows
from steadytune import L2SP, EasyAdapt, RecAdam, Run, Trainer
from steadytune.errors import UsageError
from steadytune.files import state
from steadytune.fitting.plan import make_plan
from steadytune.methods.easy_adapt import Domains

DOMAINS = torch.tensor([0, 1, 1, -1])


def run_of(model, *methods, parameters=None):
    return Run(model, methods).attach(torch.optim.SGD(parameters or model.parameters(), 0.5))


def take(run, batch):
    run.loss(batch).backward()
    run.optimizer.step()
    run.optimizer.zero_grad()


def test_it_is_one_layer_on_augmented_features():
    """(h, h, 0), (h, 0, h) and, for a domain that is not known, (h, 0, 0); h ends with a 1 for the bias."""
    model = bert(dropout=0.0, dtype=torch.float64)
    data = batches(4)
    head = [model.classifier.weight, model.classifier.bias]
    layer = torch.cat([head[0].detach(), head[1].detach()[:, None], torch.zeros(3, 34, dtype=torch.float64)], 1)
    run = run_of(model, EasyAdapt(2, drop=0.0), parameters=head)
    for batch in data:
        with torch.no_grad():
            h = model.bert(batch["input_ids"], batch["attention_mask"]).pooler_output
        h = torch.cat([h, torch.ones(4, 1, dtype=h.dtype)], 1)
        own = one_hot(DOMAINS.clamp(min=0), 2) * (DOMAINS >= 0)[:, None]
        features = torch.cat([h, h * own[:, :1], h * own[:, 1:]], 1)
        layer.requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(features @ layer.T, batch["labels"]), layer)
        layer = layer.detach() - 0.5 * gradient
        take(run, {**batch, "domain": DOMAINS})
    shared, first, second = layer.split(17, 1)
    assert torch.allclose(model.classifier.weight, shared[:, :-1], atol=1e-12)
    for number, own in enumerate((first, second)):
        found = run[EasyAdapt].specialised(number)
        assert torch.allclose(found["weight"], (shared + own)[:, :-1], atol=1e-12)
        assert torch.allclose(found["bias"], (shared + own)[:, -1], atol=1e-12)
    assert not torch.allclose(first, second, atol=1e-3)


def test_texts_of_a_row_are_of_its_domain():
    """Multiple choice: a head reads each of a row's texts."""
    model = tiny("Bert", "MultipleChoice", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train()
    ids = torch.randint(3, 30, (2, 3, 5), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.tensor([0, 2])}
    run = run_of(model, EasyAdapt(2, drop=0.0))
    run.loss({**inputs, "domain": torch.tensor([0, 1])}).backward()
    one, other = run[EasyAdapt].beside.weight.grad
    assert torch.allclose(one + other, model.classifier.weight.grad)
    for part, row in ((one, slice(0, 1)), (other, slice(1, 2))):
        loss = model.eval()(**{k: v[row] for k, v in inputs.items()}).loss / 2
        (expected,) = torch.autograd.grad(loss, model.classifier.weight)
        assert torch.allclose(part, expected, atol=1e-6)


def test_evaluation_knows_no_domain_and_a_specialised_head_is_a_plain_one():
    (batch,) = batches(1)
    model, plain = bert(dropout=0.0), bert(dropout=0.0)
    run = run_of(model, EasyAdapt(2, drop=0.0))
    take(run, {**batch, "domain": DOMAINS})
    assert model.state_dict().keys() == plain.state_dict().keys()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        trained = model(**batch, domain=torch.ones(4, dtype=torch.long)).logits  # in training mode
        clean = model.eval()(**batch, domain=DOMAINS).logits
        assert torch.equal(clean, plain(**batch).logits)
        special = copy.deepcopy(plain)
        special.classifier.load_state_dict(run[EasyAdapt].specialised(1))
        assert torch.allclose(special(**batch).logits, trained, atol=1e-6)
        assert not torch.allclose(trained, clean, atol=1e-3)


@pytest.mark.parametrize("domain", [-1, 2])
def test_only_domains_have_a_head_of_their_own(domain):
    """Naive: -1, the number of an unknown domain, is read from the end, and gives the head of the last domain."""
    run = run_of(bert(), EasyAdapt(2))
    with pytest.raises(
        UsageError, match=f"domain must be a number from 0 to 1, got {domain}: .* the head of the model"
    ):
        run[EasyAdapt].specialised(domain)


def test_dropped_rows_train_the_head_for_all_alone(monkeypatch):
    (batch,) = batches(1)
    monkeypatch.setattr(Domains, "draw", lambda self, domain: torch.tensor([0.1, 0.9, 0.9, 0.9]))
    run = run_of(bert(dropout=0.0), EasyAdapt(2, drop=0.5))
    take(run, {**batch, "domain": torch.tensor([0, 1, 1, 1])})
    moved = run[EasyAdapt].state_dict()["beside"]["weight"].abs().amax((1, 2))
    assert (float(moved[0]), float(moved[1]) > 0) == (0.0, True)


def test_the_trainer_keeps_the_column_and_checkpoints_are_plain(tmp_path):
    """Naive: the stock Trainer drops what the model has no argument for."""

    def with_domains(examples):
        return [{**e, "domain": i % 2} for i, e in enumerate(examples)]

    def together(examples):
        return {**collate(examples), **({"domain": torch.tensor([e["domain"] for e in examples])})}

    options = arguments(tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=3)
    trainer = Trainer(
        bert(), options, train_dataset=with_domains(rows(16)), eval_dataset=with_domains(rows(8, seed=1)),
        data_collator=together, methods=[EasyAdapt()],
    )  # fmt: skip
    trainer.train()
    assert all(p.abs().max() > 0 for p in trainer.run[EasyAdapt].state_dict()["beside"].values())
    held = type(trainer.model).from_pretrained(tmp_path / "checkpoint-3")
    assert all(torch.equal(w, copied(trainer.model)[n]) for n, w in copied(held).items())
    trainer.evaluate()  # after the end, with the column


def test_batches_without_domains_or_with_others_are_refused():
    (batch,) = batches(1)
    with pytest.raises(RuntimeError, match=r"EasyAdapt finds no column 'domain' in the batch .*name the column"):
        run_of(bert(), EasyAdapt(2)).loss(batch)
    for odd in (DOMAINS + 1, DOMAINS - 1, DOMAINS.float(), DOMAINS[:, None]):
        with pytest.raises(ValueError, match=r"one whole number a row"):
            run_of(bert(), EasyAdapt(2)).loss({**batch, "domain": odd})
    with pytest.raises(UsageError, match=r"EasyAdapt reads the subgroup of each row: name the column .*--subgroup"):
        make_plan(toy(40), model="m", text="text", label="label", methods=["easy_adapt"])


def test_a_finished_model_asks_for_no_column():
    """A model that has labelled texts is read in training mode too, with dropout, and no batch has domains there."""
    (batch,) = batches(1)
    model = bert()
    run = run_of(model, EasyAdapt(2))
    take(run, {**batch, "domain": DOMAINS})
    run.finish()
    assert model.train()(**batch).logits.shape == (4, 3)


def test_a_second_run_on_one_model_finds_the_column_too():
    (batch,) = batches(1)
    model = bert()
    run_of(model, EasyAdapt(2)).finish()
    take(run_of(model, EasyAdapt(2)), {**batch, "domain": DOMAINS})


@pytest.mark.parametrize("other", [L2SP(), RecAdam(schedule="constant")])
def test_weights_beside_the_head_decay_as_it_does_in_either_order(other):
    """Naive: a method that takes decay over before they join the optimizer leaves them without any."""
    (batch,) = batches(1)
    ends = []
    for methods in ([other, EasyAdapt(2, drop=0.0)], [EasyAdapt(2, drop=0.0), other]):
        model = bert(dropout=0.0)
        optimizer = torch.optim.AdamW(model.parameters(), 0.01, weight_decay=9.0)
        run = Run(model, methods).attach(optimizer)
        for _ in range(3):
            take(run, {**batch, "domain": DOMAINS})
        ends.append(run[EasyAdapt].beside.weight.detach().clone())
    assert ends[0].abs().max() > 0
    assert torch.equal(*ends)


def test_a_second_training_of_a_run_reads_its_own_domains():
    """Naive: the hook that reads the column is gone after `finish`, and the last domains of the first training stay."""
    model, data = bert(dropout=0.0, dtype=torch.float64), batches(2)
    run = run_of(model, EasyAdapt(2, drop=0.0))
    take(run, {**data[0], "domain": torch.tensor([1, 0, 0, 0])})
    run.finish()
    assert run[EasyAdapt].beside.domain is None
    run.restart()
    take(run, {**data[1], "domain": torch.tensor([0, 1, 0, 1])})
    assert run[EasyAdapt].beside.domain.tolist() == [0, 1, 0, 1]


def test_the_best_checkpoint_brings_the_corrections_of_its_step(tmp_path):
    """Naive: the best head is joined with the corrections of the last step."""
    options = arguments(
        tmp_path, max_steps=4, learning_rate=0.1, eval_strategy="steps", eval_steps=1, save_strategy="steps",
        save_steps=1, load_best_model_at_end=True, metric_for_best_model="first", greater_is_better=True,
    )  # fmt: skip
    scores = iter([1.0, 0.0, 0.0, 0.0])
    trainer = Trainer(
        bert(), options, train_dataset=rows(16), eval_dataset=rows(4, seed=1), data_collator=collate,
        compute_metrics=lambda _: {"first": next(scores)},
        methods=[EasyAdapt(2, domain=lambda inputs: inputs["labels"] % 2)],
    )  # fmt: skip
    trainer.train()
    held = state.load(tmp_path / "checkpoint-1" / "steadytune.safetensors")["methods"][0]["beside"]
    assert torch.equal(trainer.run[EasyAdapt].beside.weight, held["weight"])
    assert held["weight"].abs().max() > 0


def test_what_the_best_checkpoint_brings_is_on_the_device_of_the_model(tmp_path, monkeypatch):
    """Naive: tensors stay where they were read, and the next training on a GPU meets a mean or masks on the CPU."""
    run, got = run_of(bert(), EasyAdapt(2, drop=0.0)), []
    monkeypatch.setattr(run.methods[0], "load_state_dict", got.append)
    monkeypatch.setattr(Run, "_device", torch.device("meta"))
    run.load_methods(run.state_dict()["methods"], lambda method: method.adds_weights)
    assert {t.device.type for t in got[0]["beside"].values()} == {"meta"}
    run.load_methods(run.state_dict()["methods"], lambda method: False)
    assert len(got) == 1
