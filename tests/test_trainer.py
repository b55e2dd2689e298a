"""The Trainer: same numbers as a plain loop, and every trap of stock training seen to be closed.

Each test names in one comment what a naive adapter does. Models are tiny and random; those whose facts are exact are
in float64 and have three labels (two-label heads tie DPS scores).
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments

from steadytune import EMA, L2SP, ClipNorm, DPSDense, DPSMix, Method, Mixout, RDrop, Run, Trainer, only
from steadytune.trainer import SIDE_FILE

VOCAB, LABELS, LENGTH = 40, 3, 8


# ---------------------------------------------------------------------- models, data, training


def bert(dropout=0.1, labels=LABELS, seed=0, head="SequenceClassification", dtype=torch.float64, **config):
    torch.manual_seed(seed)
    config = transformers.BertConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        num_labels=labels,
        **config,
    )
    return getattr(transformers, f"BertFor{head}")(config).to(dtype)


def llama(tied=False, dropout=0.0, head="ForCausalLM", dtype=torch.float64):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.2,
        attention_dropout=dropout,
        tie_word_embeddings=tied,
        pad_token_id=0,
        num_labels=LABELS,
    )
    return getattr(transformers, f"Llama{head}")(config).to(dtype)


def t5(dropout=0.0, head="ForConditionalGeneration", dtype=torch.float64):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=2,
        dropout_rate=dropout,
        decoder_start_token_id=0,
        num_labels=LABELS,
    )
    return getattr(transformers, f"T5{head}")(config).to(dtype)


def tokens(n, generator, low=3):
    return torch.randint(low, VOCAB, (n,), generator=generator)


def sentences(n=48, length=LENGTH):
    g = torch.Generator().manual_seed(1)
    ones = torch.ones(length, dtype=torch.long)
    return [{"input_ids": tokens(length, g), "attention_mask": ones, "labels": i * 7 % LABELS} for i in range(n)]


def token_rows(n=64, *, equal=False, length=LENGTH):
    """Language-model rows: as many scored tokens in each, or one to all of them."""
    g = torch.Generator().manual_seed(2)
    rows = []
    for i in range(n):
        ids, size = tokens(length, g), length if equal else 2 + i * 5 % (length - 1)
        mask = (torch.arange(length) < size).long()
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)})
    return rows


def class_rows(n=64):
    """Token classification and masked LM rows: three scored tokens in each."""
    scored = torch.arange(LENGTH) % 3 == 0
    return [{**row, "labels": (row["input_ids"] % LABELS).where(scored, -100)} for row in token_rows(n, equal=True)]


DATA = sentences()
BATCH = {k: torch.stack([torch.as_tensor(row[k]) for row in DATA[:6]]) for k in DATA[0]}


class Seeded(TrainerCallback):
    """Dropout of a step depends on its number only, whatever was drawn before."""

    def on_step_begin(self, args, state, control, **kwargs):
        torch.manual_seed(1000 + state.global_step)


class Each(TrainerCallback):
    """Calls ``look(trainer's model, step)`` at a moment of training."""

    def __init__(self, moment, look):
        setattr(self, moment, lambda args, state, control, **kw: look(kw["model"], state.global_step))


def arguments(folder, **options):
    options = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_strategy": "no",
        **options,
    }
    return TrainingArguments(
        str(folder), use_cpu=True, report_to="none", disable_tqdm=True, dataloader_pin_memory=False, **options
    )


def make(folder, methods=(), model=None, *, cls=Trainer, data=DATA, callbacks=(), trainer=None, **options):
    own = {} if cls is transformers.Trainer else {"methods": methods}
    trainer = {"eval_dataset": data[:12], **(trainer or {})}
    if "model_init" not in trainer:
        trainer["model"] = bert() if model is None else model
    return cls(
        args=arguments(folder, **options), train_dataset=data, callbacks=[Seeded(), *callbacks], **own, **trainer
    )


def weights(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def same(a, b):
    a, b = (x if isinstance(x, dict) else weights(x) for x in (a, b))
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def logits(model, batch=BATCH):
    """Of a model as evaluation sees it; modes as before."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    with torch.no_grad():
        out = model(**{k: v for k, v in batch.items() if k != "labels"})["logits"]
    for module, mode in modes:
        module.training = mode
    return out


@dataclass
class Watch(Method):
    """Records gradients and weights at its place in the list."""

    def setup(self, run):
        self.before, self.after, self.labelled = [], [], []

    def before_step(self, run, weights):
        self.before.append({w.name: w.grad.clone() for w in weights})
        self.labelled.append([("labels" in batch) for batch in run.batch])

    def after_step(self, run, weights):
        self.after.append({w.name: w.grad.clone() for w in weights if w.grad is not None})


def norm(gradients):
    return float(torch.stack([g.double().square().sum() for g in gradients.values()]).sum().sqrt())


FULL = [DPSMix(update_ratio=0.25), Mixout(0.8), L2SP(0.05), EMA(0.8)]


# ---------------------------------------------------------------------- which model, which optimizer


def test_model_init_binds_the_model_that_trains(tmp_path):
    # naive: a Run made in __init__ is bound to a model that train() throws away
    trainer = make(tmp_path, [DPSDense(update_ratio=0.25), EMA(0.5)], trainer={"model_init": bert})
    first = trainer.model
    trainer.train()
    assert trainer.run.model is trainer.model is not first
    assert trainer.run.index == 8
    assert trainer.run[DPSDense].masks or trainer.run[DPSDense].squares
    given = make(tmp_path, [DPSDense(update_ratio=0.25), EMA(0.5)], bert())
    given.train()
    assert same(trainer.model, given.model)


def test_a_ready_optimizer_is_hooked(tmp_path):
    # naive: attaching where the optimizer is created never happens with optimizers=(opt, None): 0 hooks fire
    def recipe():
        return [Watch(), DPSMix(update_ratio=0.25), EMA(0.5)]

    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    trainer = make(tmp_path, recipe(), model, trainer={"optimizers": (optimizer, None)})
    trainer.train()
    assert len(trainer.run[Watch].before) == 8

    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 8)
    both = make(tmp_path, recipe(), model, trainer={"optimizers": (optimizer, schedule)})
    both.train()
    assert both.run.total_steps == 8  # a ready scheduler is not created either
    assert same(both.model, trainer.model)  # the stock schedule is linear without warm-up


def test_after_training_the_optimizer_is_free(tmp_path):
    trainer = make(tmp_path, [DPSDense(update_ratio=0.25)])
    trainer.train()
    trainer.model(**BATCH)["loss"].backward()
    trainer.optimizer.step()  # naive: hooks that stay refuse a step that did not go through run.loss
    assert trainer.run.index == 8


def test_hyperparameter_search_uses_the_clip_and_seed_of_each_trial(tmp_path, monkeypatch):
    # naive: call_model_init comes before the trial is written into args, so that trial k gets the values of k - 1
    trials = [{"max_grad_norm": 0.5, "seed": 1}, {"max_grad_norm": 0.125, "seed": 2}, {"max_grad_norm": 0.25}]

    class Backend:
        """Stands for optuna, which is not a dependency: runs the trials as transformers' own backends do."""

        def ensure_available(self):
            pass

        def run(self, trainer, n_trials, direction, **kwargs):
            for number, params in enumerate(trials):
                trainer.train(trial=SimpleNamespace(number=number, params=params))
                trainer.objective = trainer.compute_objective(trainer.evaluate())
            return trainer.objective

    from transformers.trainer_utils import HPSearchBackend

    monkeypatch.setitem(transformers.trainer.ALL_HYPERPARAMETER_SEARCH_BACKENDS, HPSearchBackend.OPTUNA, Backend)
    monkeypatch.setattr(transformers.integrations, "hp_params", lambda trial: trial.params)
    seen = []

    def look(model, step):
        run = trainer.run
        clipped = [norm(g) for g in run[Watch].after]
        seen.append((run.seed, run.model is model, run[ClipNorm].max_norm, min(clipped), max(clipped)))

    trainer = make(
        tmp_path,
        [DPSMix(update_ratio=0.25), Watch()],
        callbacks=[Each("on_train_end", look)],
        trainer={"model_init": lambda trial: bert()},
        max_grad_norm=1.0,
        seed=5,
    )
    trainer.hyperparameter_search(lambda trial: trial.params, backend="optuna", n_trials=3)
    assert [s[:3] for s in seen] == [(1, True, 0.5), (2, True, 0.125), (2, True, 0.25)]
    for trial, (*_, least, most) in zip(trials, seen, strict=True):
        assert least <= most <= trial["max_grad_norm"] * (1 + 1e-6)
        assert most == pytest.approx(trial["max_grad_norm"], rel=1e-4)  # gradients are large enough to be clipped
    assert trainer.args.max_grad_norm == 0.25


def test_method_seed_is_apart_from_the_seed_of_data(tmp_path):
    runs = [make(tmp_path, [Mixout(0.5)], method_seed=s) if False else s for s in (None,)]  # placeholder
    assert runs == [None]
