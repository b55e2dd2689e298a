"""VIBERT: its loss by hand, whose forward the divergence is of, and where the noise is not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
import transformers
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn.functional import cross_entropy, linear, softplus

from fit_helpers import save_tiny_bert, toy
from helpers import arguments, batches, bert, collate, copied, llama, rows
from steadytune import VIBERT, Method, RDrop, Run, Trainer, fit
from steadytune.core.checks import check_unwrapped
from steadytune.methods.vibert import GaussianBottleneck

TOTAL = 8


def run_of(model, *methods, lr=0.1):
    return Run(model, methods, total_steps=TOTAL).attach(torch.optim.SGD(model.parameters(), lr))


def take(run, batch):
    run.loss(batch).backward()
    run.optimizer.step()
    run.optimizer.zero_grad()


def expected(run, batch, noise, beta):
    """The loss at the run's weights, and the divergence alone."""
    model, b = run.model, run[VIBERT].beside
    h = model.bert(**{k: v for k, v in batch.items() if k != "labels"}).pooler_output
    spread = softplus(linear(h, b.weight, b.bias))
    logits = linear(h + spread * noise, model.classifier.weight, model.classifier.bias)
    divergence = kl_divergence(Normal(h, spread), Normal(b.prior_mean, softplus(b.prior_spread))).sum(-1).mean()
    return cross_entropy(logits, batch["labels"]) + beta * divergence, divergence


def test_the_loss_by_hand_rises_with_the_steps(monkeypatch):
    data, noise = batches(4), torch.randn(4, 16, dtype=torch.float64)
    monkeypatch.setattr(GaussianBottleneck, "draw", lambda self, mean: noise)
    run = run_of(bert(dropout=0.0, dtype=torch.float64), VIBERT(beta=0.4))
    for index, batch in enumerate(data):
        whole, divergence = expected(run, batch, noise, 0.4 * index / TOTAL)
        assert divergence > 1
        assert torch.allclose(run.loss(batch), whole, atol=1e-12)
        run.leave()
        take(run, batch)
    assert all(p.detach().abs().max() > 0 for p in run[VIBERT].beside.parameters())  # from zero: all of them train


@dataclass
class Again(Method):
    """Passes the batch once more under another dropout draw, as penalties do."""

    def penalty(self, step):
        return 0 * step.forward()["logits"].sum()


@pytest.mark.parametrize("recipe", [[Again(), VIBERT(beta=1.0)], [VIBERT(beta=1.0), Again()]], ids=["before", "after"])
def test_the_divergence_is_that_of_the_tasks_own_forward(recipe, monkeypatch):
    """Naive: that of the last forward, whose dropout is another."""
    monkeypatch.setattr(GaussianBottleneck, "draw", lambda self, mean: torch.ones_like(mean))
    ends = []
    for methods in ([VIBERT(beta=1.0)], recipe):
        run = run_of(bert(dropout=0.3), *methods)
        torch.manual_seed(1)
        for batch in batches(3):
            take(run, batch)
        ends.append(copied(run.model))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_copies_of_a_batch_have_noise_of_their_own(monkeypatch):
    seen = []
    monkeypatch.setattr(GaussianBottleneck, "draw", lambda self, mean: seen.append(torch.randn_like(mean)) or seen[-1])
    take(run_of(bert(), RDrop(), VIBERT(beta=1.0)), batches(1)[0])
    (noise,) = seen
    assert noise.shape == (8, 16)
    assert not torch.equal(noise[:4], noise[4:])


def test_a_head_that_reads_every_token_counts_the_real_ones():
    dry = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    config = transformers.GPT2Config(num_labels=3, pad_token_id=0, **sizes, **dry)
    torch.manual_seed(0)
    model = transformers.GPT2ForSequenceClassification(config).train()
    run = run_of(model, VIBERT(beta=1.0))
    run.index = TOTAL // 2
    batch = batches(1)[0]
    real = batch["attention_mask"]
    assert not real.all()
    with torch.no_grad():
        h = model.transformer(batch["input_ids"], attention_mask=real).last_hidden_state
        prior = Normal(torch.tensor(0.0), softplus(torch.tensor(0.0)))
        values = kl_divergence(Normal(h, prior.scale), prior).sum(-1)
        torch.manual_seed(2)
        loss = run.loss(batch)
        run.leave()
        torch.manual_seed(2)
        task = model(**batch).loss  # the same noise
    divergence = ((values * real).sum(1) / real.sum(1)).mean()
    assert torch.allclose(loss - task, divergence / 2, rtol=1e-4)


def test_no_noise_in_evaluation_nor_after_the_end():
    batch = batches(1)[0]
    model = bert(dropout=0.0)
    run = run_of(model, VIBERT())
    take(run, batch)
    with torch.no_grad():
        noisy, clean = model(**batch).logits, model.eval()(**batch).logits
        assert not torch.allclose(noisy, clean)
        run.finish()
        assert torch.equal(model.train()(**batch).logits, clean)


def test_the_state_dict_is_that_of_the_plain_model():
    model, plain = bert(), bert()
    run = run_of(model, VIBERT())
    assert model.state_dict().keys() == plain.state_dict().keys()
    take(run, batches(1)[0])
    model.load_state_dict(plain.state_dict())  # as a soup or the best checkpoint is loaded
    assert torch.equal(model.eval()(**batches(1)[0]).logits, plain.eval()(**batches(1)[0]).logits)


def test_an_optimizer_built_after_the_run_is_as_good_as_one_built_before():
    ends = []
    for first in (True, False):
        model = bert(dropout=0.0)
        early = torch.optim.SGD(model.parameters(), 0.1)
        run = Run(model, [VIBERT(beta=1.0)], total_steps=TOTAL)
        run.attach(early if first else torch.optim.SGD(model.parameters(), 0.1))
        torch.manual_seed(0)
        for batch in batches(2):
            take(run, batch)
        ends.append(run[VIBERT].state_dict()["beside"])
        assert sum(len(group["params"]) for group in run.optimizer.param_groups) == len(list(model.parameters()))
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert ends[0]["prior_mean"].abs().max() > 0


@pytest.mark.parametrize("named", [False, True])
def test_the_weights_beside_the_head_train_with_its_rate_and_decay(named):
    """Naive: they get the optimizer's defaults, here AdamW's 1e-3 and 0.01, whatever the groups of the model say."""
    model = bert()
    parts = [list(model.bert.named_parameters()), list(model.classifier.named_parameters())]
    given = [part if named else [p for _, p in part] for part in parts]
    rates = zip(given, (2e-5, 3e-4), (0.1, 0.2), strict=True)
    groups = [{"params": p, "lr": lr, "weight_decay": decay} for p, lr, decay in rates]
    run = Run(model, [VIBERT()], total_steps=4).attach(torch.optim.AdamW(groups))
    beside = [w for w in run.weights() if w.name.startswith("bottleneck.")]
    assert len(beside) == 4
    assert all((w.group["lr"], w.group["weight_decay"]) == (3e-4, 0.2) for w in beside)


def test_the_best_weights_come_back_at_the_end(tmp_path):
    options = arguments(
        tmp_path, max_steps=4, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="eval_loss",
    )  # fmt: skip
    trainer = Trainer(
        bert(), options, train_dataset=rows(16), eval_dataset=rows(8, seed=1), data_collator=collate,
        methods=[VIBERT(beta=1.0)],
    )  # fmt: skip
    trainer.train()
    scores = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(scores), abs=1e-6)


def test_what_fit_saves_predicts_the_same_without_steadytune(tmp_path):
    """A soup of two runs, calibrated: all that is done to a head after training."""
    table = toy(40)
    result = fit(
        table, model=save_tiny_bert(tmp_path / "base"), output=tmp_path / "out", text="text", label="label",
        methods=["vibert:beta=0.1"], steps=6, lr=3e-3, batch_size=8, num_seeds=2, combine="soup", calibrate=True,
        validation_share=0.2, save_steps=0, progress=False,
    )  # fmt: skip
    texts = table["text"].tolist()
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(report.values())
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model.eval()(**tokens).logits.softmax(-1).numpy()
    assert found == pytest.approx(result.predict_proba(texts), abs=1e-6)
    assert found.std(0).max() > 1e-5


HEADS = {  # layers above the body, which are called otherwise in each
    "roberta": (transformers.RobertaForSequenceClassification, transformers.RobertaConfig, "classifier.out_proj"),
    "electra": (transformers.ElectraForSequenceClassification, transformers.ElectraConfig, "classifier.out_proj"),
    "tokens": (transformers.BertForTokenClassification, transformers.BertConfig, "classifier"),
}


@pytest.mark.parametrize("name", HEADS)
def test_it_finds_the_last_layer_of_other_heads(name):
    model_class, config_class, head = HEADS[name]
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 1}
    model = model_class(config_class(vocab_size=64, num_labels=3, **sizes)).train()
    run = run_of(model, VIBERT(beta=1.0))
    assert run[VIBERT].head is model.get_submodule(head)
    (batch,) = batches(1)
    take(run, {**batch, "labels": batch["input_ids"] % 3} if name == "tokens" else batch)
    assert run[VIBERT].beside.bias.abs().max() > 0


def test_what_has_no_place_for_it_is_refused():
    with pytest.raises(ValueError, match="VIBERT acts on the last layer of a classification head"):
        run_of(llama(), VIBERT())
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    with pytest.raises(ValueError, match=r"VIBERT adds weights to the model.*run\.loss\(batch, model=wrapper\)"):
        check_unwrapped(wrapper, "VIBERT")
