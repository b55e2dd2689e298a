"""The Trainer: same numbers as a plain loop, and every trap of stock training seen to be closed.

Each test names in one comment what a naive adapter does. Models are tiny and random; those whose facts are exact are
in float64 and have three labels (two-label heads tie DPS scores).
"""

from __future__ import annotations

import gc
import logging
import os
import pickle
import shutil
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import TrainerCallback, TrainingArguments

from steadytune import (
    EMA,
    L2SP,
    LLRD,
    SIFT,
    ClipNorm,
    DPSDense,
    DPSMix,
    HeadInit,
    HypergradientLR,
    Method,
    Mixout,
    RDrop,
    RecAdam,
    ROSESecond,
    Run,
    Trainer,
    only,
)
from steadytune.errors import UsageError
from steadytune.files import state
from steadytune.trainer import SIDE_FILE, halves

VOCAB, LABELS, LENGTH = 40, 3, 8


@pytest.fixture(scope="module", autouse=True)
def _quick_collection():
    """Each training of accelerate collects garbage; without this it looks through all of torch every time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


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
        "data_seed": 7,
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
    trainer = make(tmp_path, [DPSDense(update_ratio=0.25), EMA(0.5)], trainer={"model_init": lambda: bert()})
    first = trainer.model
    trainer.train()
    assert trainer.run.model is trainer.model is not first
    assert trainer.run.index == 8
    given = make(tmp_path, [DPSDense(update_ratio=0.25), EMA(0.5)], bert())
    given.train()
    assert same(trainer.model, given.model)


@pytest.mark.parametrize("method", [HeadInit(), SIFT(keep=0.05, batches=2)], ids=["in setup", "at the first step"])
def test_model_init_and_methods_that_read_the_rows(tmp_path, method):
    # naive: the stock constructor makes the first model before it has the rows
    trainer = make(tmp_path, [method], trainer={"model_init": lambda: bert()})
    trainer.train()
    given = make(tmp_path, [method], bert())
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
    before = weights(trainer.model)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.1
    trainer.model(**BATCH)["loss"].backward()
    trainer.optimizer.step()  # naive: hooks that stay refuse a step that did not go through run.loss
    assert not same(trainer.model, before)
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
    def drawn(**seeds):
        trainer = make(tmp_path, [Mixout(0.5), Watch()], bert(dropout=0.0), max_steps=1, data_seed=None, **seeds)
        trainer.train()
        return trainer.run.seed, trainer.run[Watch].before[0]

    own = {"trainer": {"method_seed": 3}}
    (a, one), (b, two), (c, other) = drawn(seed=3), drawn(**own, seed=3), drawn(**own, seed=4)
    assert (a, b, c) == (3, 3, 3)
    assert same(one, two)
    assert not same(one, other)  # another order of data, hence other gradients
    zeros = [{n for n, g in seen.items() if "attention" in n and (g == 0).any()} for seen in (one, other)]
    assert zeros[0] == zeros[1] != set()
    name = min(zeros[0])
    assert torch.equal(one[name] == 0, other[name] == 0)  # but the same columns of Mixout


# ---------------------------------------------------------------------- the same numbers as a plain loop


@pytest.mark.parametrize("accumulation", [1, 3])
def test_trainer_equals_a_plain_loop_bitwise(tmp_path, accumulation):
    # naive: clipping by the Trainer happens before the chain rule, averages after the checkpoint, draws per forward
    methods = [DPSMix(update_ratio=0.25), Mixout(0.8), RDrop(0.5), L2SP(0.05), EMA(0.8), ClipNorm(0.3)]
    fed = []

    def collate(rows):
        fed.append(transformers.default_data_collator(rows))
        return dict(fed[-1])

    options = {"gradient_accumulation_steps": accumulation, "weight_decay": 0.1, "warmup_steps": 2}
    trainer = make(tmp_path, methods, bert(dtype=torch.float32), trainer={"data_collator": collate}, **options)
    trainer.train()

    model = bert(dtype=torch.float32)
    decayed = set(trainer.get_decay_parameter_names(model))
    groups = [
        {"params": [p for n, p in model.named_parameters() if (n in decayed) == has], "weight_decay": 0.1 * has}
        for has in (True, False)
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, fused=True)
    run = Run(model, methods, total_steps=8, seed=42).attach(optimizer)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 2, 8)
    model.train()
    for step in range(8):
        torch.manual_seed(1000 + step)
        for batch in fed[step * accumulation : (step + 1) * accumulation]:
            (run.loss(batch) / accumulation).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    run.finish()
    assert same(trainer.model, model)
    assert all(torch.equal(trainer.run.raw(n), run.raw(n)) for n, _ in model.named_parameters())
    assert not torch.equal(run.raw("classifier.weight"), model.classifier.weight)  # so R and E are different things


def test_no_methods_is_the_stock_trainer_bitwise(tmp_path):
    stock = make(tmp_path, cls=transformers.Trainer)
    ours = make(tmp_path)
    for trainer in (stock, ours):
        trainer.train()
    assert same(stock.model, ours.model)


# ---------------------------------------------------------------------- clipping


def clip_run(tmp_path, methods, *, seen=None, trainer=None, **options):
    seen = [] if seen is None else seen
    look = Each("on_step_end", lambda model, step: seen.append(held[0].args.max_grad_norm))
    options = {"max_grad_norm": 0.05, "logging_strategy": "steps", "logging_steps": 1, **options}
    held = [make(tmp_path, methods, callbacks=[look], trainer=trainer, **options)]
    held[0].train()
    return held[0]


def logged_norms(trainer):
    return [row["grad_norm"] for row in trainer.state.log_history if "grad_norm" in row]


def test_masks_act_before_the_clip(tmp_path):
    # naive: the stock Trainer clips before the optimizer's hooks, so that masked gradients are shorter than allowed
    seen = []
    trainer = clip_run(tmp_path, [DPSDense(keep=0.3, update_ratio=0.25), Watch()], seen=seen)
    assert seen == [0.0] * 8
    assert trainer.args.max_grad_norm == 0.05
    assert "ClipNorm(max_norm=0.05)" in trainer.run.describe().splitlines()[-2]  # the last method; then the passes
    watch = trainer.run[Watch]
    assert [norm(g) for g in watch.after] == pytest.approx([0.05] * 8, rel=1e-4)
    selecting = [2, 3, 6, 7]
    assert all((watch.after[i]["classifier.weight"] == 0).any() for i in selecting)
    assert logged_norms(trainer) == pytest.approx([norm(g) for g in watch.before], rel=1e-9)


def test_clip_trainer_keeps_the_stock_order(tmp_path):
    seen = []
    methods = [DPSDense(keep=0.3, update_ratio=0.25), Watch()]
    trainer = clip_run(tmp_path, methods, seen=seen, trainer={"clip": "trainer"})
    assert seen == [0.05] * 8
    lengths = [norm(g) for g in trainer.run[Watch].after]
    assert [lengths[i] for i in (0, 1, 4, 5)] == pytest.approx([0.05] * 4, rel=1e-4)
    assert all(lengths[i] < 0.045 for i in (2, 3, 6, 7))  # clipped, then masked


def test_a_clip_in_the_list_wins(tmp_path):
    seen = []
    trainer = clip_run(tmp_path, [DPSDense(update_ratio=0.25), ClipNorm(0.02), Watch()], seen=seen)
    assert seen == [0.0] * 8
    assert [m.max_norm for m in trainer.run.methods if isinstance(m, ClipNorm)] == [0.02]
    assert [norm(g) for g in trainer.run[Watch].after] == pytest.approx([0.02] * 8, rel=1e-4)
    assert trainer.args.max_grad_norm == 0.05


def test_the_norm_of_a_given_clip_is_logged(tmp_path):
    # naive: the stock norm, that of the forward view before the chain rule and the masks
    trainer = clip_run(tmp_path, [DPSMix(keep=0.3, update_ratio=0.25), Watch(), ClipNorm(0.02)])
    assert logged_norms(trainer) == pytest.approx([norm(g) for g in trainer.run[Watch].before], rel=1e-9)


def test_recipes_that_edit_no_gradient_leave_clipping_to_the_trainer(tmp_path):
    seen = []
    trainer = clip_run(tmp_path, [RDrop(), EMA(0.5)], seen=seen)
    assert seen == [0.05] * 8
    assert not any(isinstance(m, ClipNorm) for m in trainer.run.methods)


def test_clip_is_given_back_after_an_exception(tmp_path):
    # naive: max_grad_norm stays 0, and the next train() clips nothing
    def fail(model, step):
        if step == 3:
            raise OSError("disk full")

    trainer = make(tmp_path, [DPSDense(update_ratio=0.25)], callbacks=[Each("on_step_end", fail)], max_grad_norm=0.5)
    with pytest.raises(OSError, match="disk full"):
        trainer.train()
    assert trainer.args.max_grad_norm == 0.5


@pytest.mark.parametrize(("first", "second"), [(0.05, 0.02), (0.05, 0.0), (0.0, 0.02)])
def test_each_training_has_its_own_clip(tmp_path, first, second):
    # naive: the ClipNorm of the first training goes on
    trainer = clip_run(tmp_path, [DPSDense(update_ratio=0.25), Watch()], max_grad_norm=first)
    trainer.args.max_grad_norm = second
    trainer.train()
    assert trainer.args.max_grad_norm == second
    watch = trainer.run[Watch]
    for clip, steps in ((first, range(8)), (second, range(8, 16))):
        before, after = ([norm(g[i]) for i in steps] for g in (watch.before, watch.after))
        assert min(before) > 0.05
        assert after == pytest.approx([clip or b for b in before], rel=1e-4)


def test_arguments_saved_with_a_checkpoint_hold_the_clip(tmp_path):
    # naive: training_args.bin is written while ClipNorm does the work and says 0
    make(tmp_path, [DPSDense(update_ratio=0.25)], save_strategy="steps", save_steps=4, max_grad_norm=0.5).train()
    saved = torch.load(tmp_path / "checkpoint-4" / "training_args.bin", weights_only=False)
    assert saved.max_grad_norm == 0.5


# ---------------------------------------------------------------------- the loss as the trainer computes it

CLASS_WEIGHTS = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)


def weighted(outputs, labels, num_items_in_batch=None):
    """Class weights; ignores the count."""
    return F.cross_entropy(outputs["logits"], labels, CLASS_WEIGHTS)


def summed(outputs, labels, num_items_in_batch=None):
    """Class weights; divides by the count of the whole step."""
    if num_items_in_batch is None:
        return F.cross_entropy(outputs["logits"], labels, CLASS_WEIGHTS)
    return F.cross_entropy(outputs["logits"], labels, CLASS_WEIGHTS, reduction="sum") / num_items_in_batch


RULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "label smoothing": {"label_smoothing_factor": 0.3},
    "class weights": {"trainer": {"compute_loss_func": weighted}},
    "counted": {"trainer": {"compute_loss_func": summed}},
    "language model": {"model": lambda: llama(dropout=0.3), "data": token_rows()},
    "label smoothing of a language model": {
        "model": lambda: llama(dropout=0.3),
        "data": token_rows(),
        "label_smoothing_factor": 0.3,
    },
}


def ruled(tmp_path, rule, methods, **options):
    rule = dict(RULES[rule])
    return make(tmp_path, methods, rule.pop("model", bert)(), **{**rule, **options})


@dataclass
class TaskLoss(Method):
    """Records the task loss of the step, and of outputs made anew under the same dropout."""

    def setup(self, run):
        self.seen = []

    def penalty(self, step):
        again = step.forward(dropout="same")
        losses = (step.loss, step.task_loss(again), step.task_loss(step.outputs), step.task_loss(step.forward()))
        assert all(loss.requires_grad for loss in losses)
        self.seen.append([float(loss.detach()) for loss in losses])


@pytest.mark.parametrize("rule", RULES)
def test_task_loss_is_the_loss_of_the_trainer(tmp_path, rule):
    # naive: outputs.loss is None under label smoothing, unweighted with class weights, not divided by the step's count
    trainer = ruled(tmp_path, rule, [TaskLoss(), Watch()], gradient_accumulation_steps=2, max_steps=2)
    trainer.train()
    for loss, again, given, fresh in trainer.run[TaskLoss].seen:
        assert again == pytest.approx(loss, rel=1e-6)
        assert given == pytest.approx(loss, rel=1e-6)
        assert 0 < abs(fresh - loss) < 0.8 * max(fresh, loss)  # another dropout draw of the same thing
    assert len(trainer.run[TaskLoss].seen) == 4
    assert trainer.run[Watch].labelled == [[True, True]] * 2  # naive: stock training pops the labels


@dataclass
class BothCopies(Method):
    copies: ClassVar[int] = 2

    def setup(self, run):
        self.seen = []

    def penalty(self, step):
        labels = step.inputs["labels"]
        losses = [weighted(out, labels).item() for out in (step.outputs, step.second())]
        rule = [step.task_loss(out).item() for out in (step.outputs, step.second())]
        self.seen.append((step.loss.item(), losses, rule))


def test_class_weights_reach_both_copies(tmp_path):
    # naive: R-Drop's second cross entropy is computed by hand, without the weights
    trainer = ruled(tmp_path, "class weights", [BothCopies()], max_steps=2)
    trainer.train()
    for loss, losses, rule in trainer.run[BothCopies].seen:
        assert rule == pytest.approx(losses, rel=1e-12)
        assert losses[0] != losses[1]
        assert loss == pytest.approx(sum(losses) / 2, rel=1e-12)


@dataclass
class Divergence(RDrop):
    """R-Drop that records its penalty and the logits it saw."""

    def setup(self, run):
        super().setup(run)
        self.seen = []

    def penalty(self, step):
        value = super().penalty(step)
        self.seen.append((value.item(), step.outputs["logits"].detach(), step.second()["logits"].detach()))
        return value


@pytest.mark.parametrize(
    ("model", "shift"),
    [
        (lambda: llama(dropout=0.3), 1),
        (lambda: named("GPT2LMHeadModel", **GPT2), 1),
        (lambda: t5(dropout=0.3), 0),
        (lambda: bert(0.3, head="TokenClassification"), 0),
    ],
)
def test_r_drop_compares_the_logits_that_are_scored(tmp_path, model, shift):
    # naive: labels of causal language models are taken to stand where they are predicted
    rows = [{**row, "labels": torch.full((LENGTH,), -100)} for row in token_rows(8, equal=True)]
    for row in rows:
        row["labels"][3] = 1  # one scored token: the label at 3
    trainer = make(tmp_path, [Divergence()], model(), data=rows, max_steps=1)
    trainer.train()
    value, first, second = trainer.run[Divergence].seen[0]
    p, q = (logits[:, 3 - shift].log_softmax(-1) for logits in (first, second))
    expected = ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2
    assert value == pytest.approx(float(expected), rel=1e-5)
    assert value > 0


def test_the_mean_over_copies_is_not_the_loss_of_one(tmp_path):
    # naive: outputs of one copy that still hold the loss of both
    trainer = ruled(tmp_path, "plain", [BothCopies()], max_steps=1)
    with pytest.raises(ValueError, match="did not return a loss"):
        trainer.train()


@dataclass
class Push(Method):
    """A penalty whose gradient is ``force`` in every weight."""

    force: float = 0.25

    def penalty(self, step):
        return self.force * sum(p.sum() for p in step.model.parameters())


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("accumulation", [1, 4])
def test_penalties_are_averaged_over_micro_batches(tmp_path, rule, accumulation):
    # naive: a loss that is divided over the whole step already takes the penalty once per micro-batch
    def gradient(methods):
        trainer = ruled(
            tmp_path, rule, [*methods, Watch()], max_steps=1, gradient_accumulation_steps=accumulation, max_grad_norm=0
        )
        trainer.train()
        return trainer.run[Watch].before[0]

    with_penalty, without = gradient([Push()]), gradient([])
    for name, g in with_penalty.items():
        assert torch.allclose(g - without[name], torch.full_like(g, 0.25), atol=1e-5), name


# ---------------------------------------------------------------------- accumulation

# model, rows; a token loss that is a plain mean can only agree where every micro-batch has as many tokens
TASKS = {
    "bert": (lambda: bert(0.0), DATA),
    "token classification": (lambda: bert(0.0, head="TokenClassification"), class_rows()),
    "masked lm": (lambda: bert(0.0, head="MaskedLM"), class_rows()),
    "llama": (llama, token_rows()),
    "tied llama": (lambda: llama(tied=True), token_rows()),
    "llama classification": (lambda: llama(head="ForSequenceClassification"), DATA),
    "t5": (t5, token_rows(equal=True)),
}


def first_norms(tmp_path, task, batch, accumulation, methods=(), cls=Trainer, **options):
    """Logged gradient norms of four steps of 16 rows."""
    model, rows = TASKS[task]
    trainer = make(
        tmp_path,
        methods,
        model(),
        cls=cls,
        data=rows,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        max_steps=4,
        logging_strategy="steps",
        logging_steps=1,
        max_grad_norm=1e6,
        optim="sgd",
        **options,
    )
    trainer.train()
    return logged_norms(trainer), trainer


@pytest.mark.parametrize("task", TASKS)
def test_accumulation_changes_nothing(tmp_path, task):
    # naive: stock multiplies by the steps where the model takes the count and ignores it (next test);
    # loss_is_scaled_for_ga=False for all divides the others twice
    rel = 1e-5 if "llama" in task else 1e-10  # transformers computes token losses in float32
    whole, _ = first_norms(tmp_path, task, 16, 1)
    parts, _ = first_norms(tmp_path, task, 4, 4)
    assert parts == pytest.approx(whole, rel=rel)
    recipe = [Mixout(0.7), DPSDense(keep=0.5, update_ratio=0.5)]
    whole, one = first_norms(tmp_path, task, 16, 1, recipe)
    parts, four = first_norms(tmp_path, task, 4, 4, recipe)
    assert parts == pytest.approx(whole, rel=rel)
    for (name, a), b in zip(weights(one.model).items(), weights(four.model).values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5 if "llama" in task else 1e-10), name


def test_stock_accumulation_is_what_the_probe_mends(tmp_path):
    whole, _ = first_norms(tmp_path, "bert", 16, 1, cls=transformers.Trainer)
    parts, _ = first_norms(tmp_path, "bert", 4, 4, cls=transformers.Trainer)
    ours, _ = first_norms(tmp_path, "bert", 4, 4)
    assert ours[0] / whole[0] == pytest.approx(1, rel=1e-10)
    if parts[0] == pytest.approx(whole[0], rel=1e-6):
        pytest.skip("this transformers has accelerate divide by the steps")
    assert parts[0] / whole[0] == pytest.approx(4, rel=1e-6)


def test_copies_change_no_count(tmp_path):
    # naive: the sum over two copies is divided by the count of one
    @dataclass
    class Twice(Method):
        copies: ClassVar[int] = 2

        def penalty(self, step):
            return None

    for task in ("bert", "llama"):
        once, _ = first_norms(tmp_path, task, 4, 4)
        twice, _ = first_norms(tmp_path, task, 4, 4, [Twice()])
        assert twice == pytest.approx(once, rel=1e-5)


@pytest.mark.parametrize(
    ("rule", "counts"),
    [
        ("plain", False),
        ("label smoothing", "num_items_in_batch" in signature(transformers.trainer.LabelSmoother.__call__).parameters),
        ("class weights", False),
        ("counted", True),
        ("language model", True),
    ],
)
def test_the_probe_tells_who_uses_the_count(tmp_path, rule, counts):
    trainer = ruled(tmp_path, rule, [RDrop()], max_steps=1)
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, trainer.args.device)
    assert len(batches) == 2
    assert (items is not None) == counts
    if counts:
        shift = trainer.model.__class__.__name__.endswith("CausalLM") and hasattr(trainer, "_loss_shifts_labels")
        assert items == sum(int((b["labels"][..., 1:] if shift else b["labels"]).ne(-100).sum()) for b in batches)


def test_the_probe_leaves_no_trace(tmp_path):
    # naive: a forward in training mode moves the random state; train() at the end wakes modules that were asleep
    def noisy(outputs, labels, num_items_in_batch=None):
        return F.cross_entropy(outputs["logits"] + torch.randn_like(outputs["logits"]), labels)

    trainer = make(tmp_path, [RDrop()], trainer={"compute_loss_func": noisy})
    trainer.model.train()
    trainer.model.bert.embeddings.eval()
    modes = [m.training for m in trainer.model.modules()]
    batches = iter(list(trainer.get_train_dataloader()))
    state = torch.get_rng_state()
    before = weights(trainer.model)
    trainer.get_batch_samples(batches, 2, trainer.args.device)
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in trainer.model.modules()] == modes
    assert same(trainer.model, before)
    assert all(p.grad is None for p in trainer.model.parameters())


UNTOLD = [{**row, "labels": torch.full((LENGTH,), -100)} for row in token_rows(8)]  # rows without a labelled token


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.mark.parametrize("untold", [1, 4, 8], ids=["a batch", "a step", "two steps"])
@pytest.mark.parametrize("save_at", [None, 1])
def test_a_batch_that_cannot_tell_decides_nothing(tmp_path, untold, save_at):
    # naive: 0 / 0 is not a half, so that the language model is taken for one that ignores the count
    def trained(cls, **options):
        rows = [*UNTOLD[:untold], *token_rows(24)]
        options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "max_steps": 4}
        return make(tmp_path, [], llama(), cls=cls, data=rows, optim="sgd", **options)

    whole = trained(InOrder)
    whole.train()
    assert whole._counts is True
    before = trained(InOrder)
    before._counts = True  # as if somebody had said so
    before.train()
    assert same(whole.model, before.model)
    if save_at is None:
        return
    first = trained(InOrder, **saving(save_steps=save_at))
    first.train()
    assert state.load(tmp_path / "checkpoint-1" / SIDE_FILE)["counts"] is (None if untold >= 4 else True)
    again = trained(InOrder)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert same(again.model, whole.model)


def test_what_was_decided_is_not_asked_again_after_a_resume(tmp_path, monkeypatch):
    first = make(tmp_path, [], **saving(save_steps=3))
    first.train()
    assert first._counts is False
    monkeypatch.setattr(Trainer, "_uses_count", lambda *_: pytest.fail("asked again"))
    again = make(tmp_path, [])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again._counts is False
    assert same(again.model, first.model)


@pytest.mark.parametrize(
    ("once", "twice", "told"),
    [
        (4.0, 2.0, True),
        (4.0, 4.0, False),
        (4.0, 3.6, None),  # partly divided
        (0.0, 0.0, None),
        (float("nan"), float("nan"), None),
        (float("inf"), float("inf"), None),
        (1.0, float("nan"), None),
    ],
)
def test_whether_a_loss_is_divided_by_a_count(once, twice, told):
    assert halves(once, twice) is told


# ---------------------------------------------------------------------- a compute_loss of one's own


class Weighted(Trainer):
    """The class weights of the transformers documentation."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs["logits"], labels, weight=CLASS_WEIGHTS)
        return (loss, outputs) if return_outputs else loss


class Doubled(Trainer):
    """Adds to what the Trainer computes."""

    def compute_loss(self, *args, **kwargs):
        found = super().compute_loss(*args, **kwargs)
        return (2 * found[0], *found[1:]) if isinstance(found, tuple) else 2 * found


@pytest.mark.parametrize("methods", [[], [EMA(0.5)], [Mixout(0.5), RDrop(0.5), EMA(0.5)]], ids=["none", "ema", "more"])
def test_a_compute_loss_of_ones_own_is_the_loss_that_methods_act_on(tmp_path, methods):
    # naive: it goes round Run.loss, and training fails at the first step
    def trained(cls=Trainer, own=None, **options):
        trainer = make(tmp_path, methods, cls=cls, gradient_accumulation_steps=2, trainer=options)
        if own is not None:
            trainer.compute_loss = own
        trainer.train()
        assert trainer.run.index == 8
        return trainer

    expected = trained(compute_loss_func=weighted)
    by_class = trained(Weighted)
    patched = trained(own=Weighted.compute_loss.__get__(make(tmp_path)))
    assert same(by_class.model, expected.model)
    assert same(patched.model, expected.model)
    assert not same(trained().model, expected.model)
    assert by_class.evaluate()["eval_loss"] == expected.evaluate()["eval_loss"]


def test_a_compute_loss_that_adds_to_ours(tmp_path):
    def doubled(outputs, labels, num_items_in_batch=None):
        return 2 * F.cross_entropy(outputs["logits"], labels)

    methods = [RDrop(0.5), EMA(0.5)]
    ours = make(tmp_path, methods, cls=Doubled)
    expected = make(tmp_path, methods, trainer={"compute_loss_func": doubled})
    for trainer in (ours, expected):
        trainer.train()
    assert same(ours.model, expected.model)


def test_a_compute_loss_without_outputs_is_refused_where_a_method_needs_them(tmp_path):
    class Bare(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return model(**inputs)["loss"]

    plain, bare = make(tmp_path, [EMA(0.5)]), make(tmp_path, [EMA(0.5)], cls=Bare)
    for trainer in (plain, bare):
        trainer.train()
    assert same(plain.model, bare.model)
    with pytest.raises(UsageError, match=r"RDrop looks at the model's outputs.*return_outputs"):
        make(tmp_path, [RDrop()], cls=Bare).train()


# ---------------------------------------------------------------------- gradients that are not finite


@pytest.mark.parametrize("methods", [[], [EMA(0.5)], [DPSDense(update_ratio=0.25)]], ids=["none", "ema", "dps"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200], ids=str)
def test_a_step_without_a_finite_norm_is_skipped_and_counted(tmp_path, methods, value):
    # naive: an infinite norm clips every gradient to zero, and nobody hears of it
    def spoil(model, inputs, outputs):
        if trainer.state.global_step in (2, 5) and model.training:
            outputs["loss"].register_hook(lambda g: g * value)

    trainer = make(tmp_path, methods, logging_strategy="steps", logging_steps=1)
    trainer.model.register_forward_hook(spoil)
    changed, before = [], [weights(trainer.model)]

    def look(model, step):
        changed.append(not same(model, before[-1]))
        before.append(weights(model))

    trainer.add_callback(Each("on_step_end", look))
    trainer.train()
    assert changed == [step not in (2, 5) for step in range(8)]
    assert trainer.run.finite.skipped == 2
    assert trainer.run.index == 6
    assert [row.get("skipped_steps", 0) for row in trainer.state.log_history if "loss" in row] == [
        *(0, 0, 1, 1, 1, 2, 2, 2)
    ]


# ---------------------------------------------------------------------- several trainings


def test_two_trainers_in_one_process(tmp_path):
    # naive: state on the class, the optimizer class or the method objects mixes the two
    def one(name, **options):
        return make(tmp_path / name, FULL, bert(seed=len(name)), seed=len(name), **options)

    alone = {}
    for name in ("a", "bb"):
        trainer = one(name)
        trainer.train()
        alone[name] = weights(trainer.model)

    inner = one("bb")

    def nested(model, step):
        if step == 3:
            with torch.random.fork_rng(devices=[]):
                inner.train()

    outer = one("a", callbacks=[Each("on_step_end", nested)])
    outer.train()
    assert same(outer.model, alone["a"])
    assert same(inner.model, alone["bb"])


def test_shared_method_objects_stay_hyperparameters(tmp_path):
    # naive: masks and averages of the first training leak into the second
    results = []
    for _ in range(2):
        trainer = make(tmp_path, FULL)
        trainer.train()
        results.append(weights(trainer.model))
    assert same(*results)
    assert all(m == type(m)(**vars(m)) for m in FULL)  # fields and nothing else
    assert trainer.run[DPSMix] is not FULL[0]


def test_a_second_train_goes_on_with_the_weights_and_anew_with_the_state(tmp_path):
    # naive: attaching twice raises, or the index goes on from the old end
    methods = [DPSDense(update_ratio=0.25), EMA(0.8)]
    trainer = make(tmp_path, methods, optim="sgd")
    trainer.train()
    middle = bert()
    middle.load_state_dict(trainer.model.state_dict())
    trainer.train()
    assert trainer.run.index == 8
    anew = make(tmp_path, methods, middle, optim="sgd")
    anew.train()
    assert same(trainer.model, anew.model)
    trainer.args.max_steps = 12
    trainer.train()
    assert (trainer.run.index, trainer.run.total_steps) == (12, 12)


@dataclass
class OutOfMemory(Method):
    """Fails once, in the second micro-batch of a step."""

    at: int = 0
    fuse: ClassVar[list[bool]] = []

    def setup(self, run):
        self.last = -1

    def penalty(self, step):
        second, self.last = self.last == step.index, step.index
        if self.fuse and second and step.index == self.at:
            self.fuse.clear()
            raise RuntimeError("CUDA out of memory.")


def test_batch_size_finder_starts_anew(tmp_path):
    # naive: "already attached"; else the forward view of the lost step is taken for the raw weights
    def one(**options):
        recipe = [OutOfMemory(), *FULL]
        return make(tmp_path, recipe, gradient_accumulation_steps=2, seed=1, **options)

    OutOfMemory.fuse.append(True)
    found = one(per_device_train_batch_size=8, auto_find_batch_size=True)
    found.train()
    assert not OutOfMemory.fuse
    assert found._train_batch_size == 7
    plain = one(per_device_train_batch_size=7)
    plain.train()
    assert found.run.index == 8
    assert same(found.model, plain.model)
    assert all(torch.equal(found.run.raw(n), plain.run.raw(n)) for n, _ in plain.model.named_parameters())
    assert found.args.max_grad_norm == 1.0


def test_batch_size_finder_in_the_middle_of_training(tmp_path):
    # naive: training starts anew from the forward view of the lost step; it must be from the weights evaluated before
    OutOfMemory.fuse.append(True)
    begins, ends = [], []
    trainer = make(
        tmp_path,
        [OutOfMemory(at=5), DPSMix(update_ratio=0.25), EMA(0.8)],
        gradient_accumulation_steps=2,
        auto_find_batch_size=True,
        callbacks=[
            Each("on_train_begin", lambda model, step: begins.append((trainer.run.index, weights(model)))),
            Each("on_step_end", lambda model, step: ends.append((step, weights(model)))),
        ],
    )
    trainer.train()
    assert [index for index, _ in begins] == [0, 0]
    assert [step for step, _ in ends] == [1, 2, 3, 4, 5, *range(1, 9)]
    assert same(begins[1][1], ends[4][1])
    assert trainer.run.index == 8


# ---------------------------------------------------------------------- checkpoints and evaluation


def saving(**options):
    return {"save_strategy": "steps", "save_steps": 3, **options}


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """Checkpoints at 3 and 6 of 8 steps (stages of two), evaluated logits at each step, and the final weights."""
    torch.set_num_threads(1)  # as every test: sums on two threads round differently
    folder = tmp_path_factory.mktemp("interrupted")
    seen = {}
    look = Each("on_step_end", lambda model, step: seen.update({step: logits(model)}))
    trainer = make(folder, FULL, callbacks=[look], gradient_accumulation_steps=2, **saving())
    trainer.train()
    raw = {n: trainer.run.raw(n).clone() for n, _ in trainer.model.named_parameters()}
    return SimpleNamespace(folder=folder, logits=seen, final=weights(trainer.model), raw=raw)


@pytest.fixture
def checkpoints(interrupted, tmp_path):
    """A copy of the checkpoints that a test may spoil."""
    shutil.copytree(interrupted.folder, tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def resumed(folder, methods=FULL, model=None, *, step=3, **options):
    options = {"gradient_accumulation_steps": 2, **saving(), **options}
    trainer = make(folder, methods, model, **options)
    trainer.train(resume_from_checkpoint=str(Path(folder, f"checkpoint-{step}")))
    return trainer


@pytest.mark.parametrize("step", [3, 6])  # in the middle of a stage, and at a boundary
def test_resume_is_bitwise(checkpoints, interrupted, step):
    # naive: averages, masks and anchors start anew; E is trained with the moments of R
    trainer = resumed(checkpoints, step=step)
    assert same(trainer.model, interrupted.final)
    assert all(torch.equal(trainer.run.raw(n), r) for n, r in interrupted.raw.items())
    assert (trainer.run.index, trainer.state.global_step) == (8, 8)


def test_resume_with_model_init_is_bitwise(checkpoints, interrupted):
    # naive: references are taken after the checkpoint was loaded
    trainer = resumed(checkpoints, trainer={"model_init": lambda: bert()}, seed=42)
    assert same(trainer.model, interrupted.final)


def test_checkpoints_are_plain_models_and_one_side_file(interrupted):
    # naive: the raw weights are saved (other logits than those that were evaluated); state in two places
    for step in (3, 6, 8):
        folder = interrupted.folder / f"checkpoint-{step}"
        assert [f.name for f in folder.iterdir() if "steadytune" in f.name] == [SIDE_FILE]
        assert not (folder / SIDE_FILE).stat().st_mode & 0o111
        plain = transformers.BertForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
        assert torch.equal(logits(plain), interrupted.logits[step])
        optimizer = torch.load(folder / "optimizer.pt", weights_only=True)
        assert optimizer.keys() == {"state", "param_groups"}
        assert all(s.keys() == {"step", "exp_avg", "exp_avg_sq"} for s in optimizer["state"].values())


@pytest.mark.parametrize("name", ["model", "checkpoint-mine"])
def test_a_model_saved_by_the_user_is_plain(tmp_path, name):
    trainer = make(tmp_path, [EMA(0.5)], max_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / name))
    assert not [f for f in os.listdir(tmp_path / name) if "steadytune" in f]


def test_side_file_is_needed(checkpoints):
    # naive: resumes in silence, with the averages as raw weights
    (checkpoints / "checkpoint-3" / SIDE_FILE).unlink()
    with pytest.raises(ValueError, match=f"holds no {SIDE_FILE}"):
        resumed(checkpoints)


def test_a_checkpoint_of_other_methods_is_refused_before_its_optimizer_is_read(checkpoints):
    # naive: torch says that the numbers of parameter groups differ, which LLRD has made so
    with pytest.raises(ValueError, match=r"the state was saved by the methods .*, this run has \['LLRD'\]"):
        resumed(checkpoints, [LLRD(0.5)])


def test_files_of_two_checkpoints_do_not_mix(checkpoints):
    shutil.copy(checkpoints / "checkpoint-6" / SIDE_FILE, checkpoints / "checkpoint-3" / SIDE_FILE)
    with pytest.raises(ValueError, match=r"belongs to step 6.*two checkpoints were mixed"):
        resumed(checkpoints)


@pytest.mark.parametrize("kind", ["pickle", "torch", "text", "empty", "other safetensors"])
def test_a_hostile_side_file_is_refused(checkpoints, tmp_path, kind):
    # naive: torch.load or pickle.load runs what the file says
    path, mark = checkpoints / "checkpoint-3" / SIDE_FILE, tmp_path / "was-here"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(mark),)

    if kind == "torch":
        torch.save(Hostile(), path)
    elif kind == "other safetensors":
        shutil.copy(checkpoints / "checkpoint-3" / "model.safetensors", path)
    else:
        path.write_bytes({"pickle": pickle.dumps(Hostile()), "text": b"{}", "empty": b""}[kind])
    with pytest.raises(ValueError, match="not a readable steadytune state"):
        resumed(checkpoints)
    assert not mark.exists()


def test_a_checkpoint_is_no_base_model(checkpoints):
    # naive: anchors and masks refer to half-trained weights, another trajectory without a word
    folder = checkpoints / "checkpoint-3"
    model = transformers.BertForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
    with pytest.raises(ValueError, match="Give the base model, not a checkpoint"):
        resumed(checkpoints, model=model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_steps": 10}, "total_steps was 8 .* is 10 now"),
        ({"methods": FULL[:3]}, r"saved by the methods \['DPSMix', 'Mixout', 'L2SP', 'EMA', 'ClipNorm'\]"),
        ({"methods": []}, r"saved by the methods \['DPSMix', .*this run has \[\]"),
        ({"methods": [DPSMix(update_ratio=0.25), Mixout(0.7), *FULL[2:]]}, "Mixout.keep was 0.8 .* is 0.7 here"),
        ({"max_grad_norm": 0.5}, "ClipNorm.max_norm was 1.0 .* is 0.5 here"),
        ({"trainer": {"method_seed": 9}}, "seed was 42 .* is 9 here"),
    ],
)
def test_a_resume_with_other_settings_is_refused(checkpoints, change, message):
    # naive: schedules change retroactively (pitfall: accelerate loads once before total_steps is known)
    with pytest.raises(ValueError, match=message):
        resumed(checkpoints, **change)


@pytest.mark.parametrize(
    "methods", [[], [EMA(0.9)], [Mixout(0.5), L2SP(0.1), ClipNorm(1.0)]], ids=["none", "ema", "more"]
)
def test_methods_without_a_schedule_train_longer_from_a_checkpoint(tmp_path, methods):
    # naive: any other number of steps is refused
    make(tmp_path, methods, max_steps=4, **saving(save_steps=4)).train()
    longer = make(tmp_path, methods)
    longer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert longer.run.index == 8


def test_seconds_count_all_legs(tmp_path, monkeypatch):
    # naive: the seconds since the resume
    now = [0.0]
    monkeypatch.setattr("steadytune.trainer.time", SimpleNamespace(perf_counter=lambda: now[0]))

    def tick(model, step):
        now[0] += 1.0

    first = make(tmp_path, [], callbacks=[Each("on_step_begin", tick)], **saving(save_steps=4))
    first.train()
    assert first.seconds == 8.0
    now[0] = 1000.0
    again = make(tmp_path, [], callbacks=[Each("on_step_begin", tick)])
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    now[0] = 2000.0
    assert again.seconds == 8.0


def test_methods_may_be_named(tmp_path):
    named = make(tmp_path, ["dps_dense:update_ratio=0.25", EMA(0.5)])
    assert named.methods == [DPSDense(update_ratio=0.25), EMA(0.5)]
    assert make(tmp_path, "mixout:keep=0.5").methods == [Mixout(0.5)]
    with pytest.raises(UsageError, match=r"unknown method 'dps_dens'\. Did you mean 'dps_dense'"):
        make(tmp_path, ["dps_dens"])


def test_a_refused_resume_leaves_a_trainer_that_trains(checkpoints, interrupted):
    trainer = make(checkpoints, FULL, gradient_accumulation_steps=2, max_steps=10)
    with pytest.raises(ValueError, match="total_steps"):
        trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-3"))
    assert trainer.args.max_grad_norm == 1.0
    trainer.args.max_steps = 8
    trainer.train(resume_from_checkpoint=str(checkpoints / "checkpoint-3"))
    assert same(trainer.model, interrupted.final)


def test_save_only_model_goes_on_with_the_methods_state(tmp_path):
    # defined so: moments and schedule of the optimizer start anew, as in the stock Trainer; the recipe goes on
    options = {"gradient_accumulation_steps": 2, **saving(save_only_model=True)}
    states = {}
    look = Each("on_step_end", lambda model, step: states.update({step: snapshot(trainer.run)}))
    trainer = make(tmp_path, FULL, callbacks=[look], **options)
    trainer.train()
    folder = tmp_path / "checkpoint-3"
    assert not (folder / "optimizer.pt").exists()
    assert (folder / SIDE_FILE).exists()
    begins = []
    look = Each("on_train_begin", lambda model, step: begins.append(snapshot(again.run)))
    again = make(tmp_path, FULL, callbacks=[look], **options)
    again.train(resume_from_checkpoint=str(folder))
    assert same(begins[0], states[3])
    assert (again.run.index, again.state.global_step) == (8, 8)


def snapshot(run):
    """Live and raw weights, masks and sums."""
    parts = {f"live.{n}": p.detach().clone() for n, p in run.model.named_parameters()}
    parts |= {f"raw.{n}": run.raw(n).clone() for n, _ in run.model.named_parameters()}
    for what in ("masks", "squares", "frequency", "anchors"):
        parts |= {f"{what}.{n}": t.clone() for n, t in getattr(run[DPSMix], what).items()}
    return {**parts, "index": torch.tensor(run.index)}


def test_evaluation_during_training_sees_the_average(tmp_path):
    # naive: evaluation of the raw weights, or of the mixture of the last forward
    steps, seen = [], []
    options = {"eval_strategy": "steps", "eval_steps": 2}
    plain = make(
        tmp_path,
        [DPSMix(update_ratio=0.25)],
        callbacks=[Each("on_step_end", lambda model, step: steps.append(weights(model)))],
    )
    plain.train()  # the same raw weights: an average never touches them

    def metrics(prediction):
        seen.append(torch.as_tensor(prediction.predictions))
        return {}

    trainer = {"compute_metrics": metrics}
    averaged = make(tmp_path, [EMA(0.8), DPSMix(update_ratio=0.25)], trainer=trainer, **options)
    averaged.train()
    independent, expected = None, []
    model = bert()
    for step, raw in enumerate(steps, 1):
        old = raw if independent is None else independent
        independent = {n: 0.8 * old[n] + 0.2 * raw[n] for n in raw}
        if step % 2 == 0:
            model.load_state_dict(independent)
            expected.append(logits(model, transformers.default_data_collator(DATA[:12])))
    assert len(seen) == len(expected) == 4
    for got, want in zip(seen, expected, strict=True):
        assert torch.allclose(got.double(), want, atol=1e-6)
    assert not torch.allclose(
        expected[-1], logits(plain.model, transformers.default_data_collator(DATA[:12])), atol=1e-2
    )
    assert all(torch.equal(averaged.run.raw(n), steps[-1][n]) for n in steps[-1])


def test_the_best_model_is_the_one_that_was_evaluated(tmp_path):
    # naive: finish() of an average overwrites the checkpoint that was just loaded
    options = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    trainer = make(tmp_path, FULL, **options)
    trainer.train()
    assert trainer.state.best_global_step < 8  # the worst loss, so that the best is not the last
    best = load_file(Path(trainer.state.best_model_checkpoint, "model.safetensors"))
    assert same(dict(trainer.model.state_dict()), best)
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    trainer.train()  # a further training starts from there
    assert trainer.run.index == 8


def test_evaluation_before_and_at_the_start_of_training(tmp_path):
    # naive: no Run, or one that was never entered, when the first evaluation comes
    trainer = make(tmp_path, FULL, eval_on_start=True, eval_strategy="steps", eval_steps=8)
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    assert losses[0] == first
    assert losses[1] == trainer.evaluate()["eval_loss"] != first


# ---------------------------------------------------------------------- interruption


class Interrupt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("again", ["same trainer", "new trainer"])
def test_ctrl_c_between_micro_batches(tmp_path, interrupted, again):
    # naive: the forward view stays live, is saved as the model, and max_grad_norm stays 0
    ends = {}
    stop = Interrupt(5)
    look = Each("on_step_end", lambda model, step: ends.update({step: weights(model)}))
    trainer = make(tmp_path, FULL, callbacks=[look, stop], gradient_accumulation_steps=2, **saving())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert same(trainer.model, ends[5])
    assert torch.equal(logits(trainer.model), interrupted.logits[5])
    assert trainer.args.max_grad_norm == 1.0
    stop.step = None
    if again == "new trainer":
        trainer = make(tmp_path, FULL, gradient_accumulation_steps=2, **saving())
    trainer.train(resume_from_checkpoint=True)
    assert same(trainer.model, interrupted.final)


def test_ctrl_c_in_a_forward(tmp_path):
    @dataclass
    class Stop(Method):
        def penalty(self, step):
            if step.index == 3:
                raise KeyboardInterrupt

    ends = {}
    look = Each("on_step_end", lambda model, step: ends.update({step: weights(model)}))
    trainer = make(tmp_path, [*FULL, Stop()], callbacks=[look])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert same(trainer.model, ends[3])


class Skip(TrainerCallback):
    """The optimizer's step number ``at`` does not happen, as when GradScaler finds an overflow."""

    def __init__(self, at):
        self.at = at

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        if state.global_step == self.at:
            optimizer.step = lambda: None

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        vars(optimizer).pop("step", None)


def test_callbacks_see_the_evaluated_weights_after_a_skipped_step(tmp_path):
    # naive: a step that fires no hook leaves the forward view live until the next one
    seen = []
    trainer = make(
        tmp_path,
        FULL,
        callbacks=[Skip(4), Each("on_optimizer_step", lambda model, step: seen.append(weights(model)))],
        **saving(),
    )
    trainer.train()
    assert same(seen[4], seen[3])
    assert not same(seen[5], seen[4])
    assert (trainer.run.index, trainer.state.global_step) == (7, 8)
    # naive: a guard index == global_step refuses to resume after any overflow
    again = make(tmp_path, FULL, **saving())
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert again.run.index == 7
    assert same(again.model, trainer.model)


# ---------------------------------------------------------------------- architectures


def named(name, **config):
    """A tiny random model ``transformers.<name>`` in float32, with dropout."""
    family = name.split("For")[0].removesuffix("LMHeadModel")
    common = {"vocab_size": VOCAB, "num_labels": LABELS, "pad_token_id": 0, "initializer_range": 0.2}
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, f"{family}Config")(**{**common, **config}))


SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
DROPS = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 32}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
BART = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32, "init_std": 0.2}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
LLAMA = {**SMALL, "num_key_value_heads": 1, "max_position_embeddings": 32, "attention_dropout": 0.1}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2}
CLASSIFIERS = {
    "BertForSequenceClassification": {**SMALL, **DROPS},
    "RobertaForSequenceClassification": {**SMALL, **DROPS},
    "DebertaV2ForSequenceClassification": {
        **SMALL,
        **DROPS,
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
    },
    "ElectraForSequenceClassification": {**SMALL, **DROPS, "embedding_size": 8},
    "AlbertForSequenceClassification": {**SMALL, **DROPS, "embedding_size": 8},
    "DistilBertForSequenceClassification": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32},
    "ModernBertForSequenceClassification": {**SMALL, "max_position_embeddings": 32, "classifier_dropout": 0.1},
    "XLNetForSequenceClassification": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 32},
    "BartForSequenceClassification": {**BART, **SPECIAL},
    "T5ForSequenceClassification": {**T5, "eos_token_id": 2},
    "GPT2ForSequenceClassification": GPT2,
    "LlamaForSequenceClassification": LLAMA,
    "Qwen2ForSequenceClassification": LLAMA,
}
LANGUAGE_MODELS = {
    "GPT2LMHeadModel": GPT2,
    "LlamaForCausalLM": LLAMA,
    "LlamaForCausalLM, tied": {**LLAMA, "tie_word_embeddings": True},
    "T5ForConditionalGeneration": T5,
}


def rows_for(name):
    if name in LANGUAGE_MODELS:
        return token_rows(32)
    rows = sentences(32)
    for row in rows:
        row["input_ids"][-1] = 2  # encoder-decoders pool at the end-of-sequence token
    return rows


@pytest.mark.parametrize("recipe", ["dps_mix, ema", "mixout, rdrop"])
@pytest.mark.parametrize("name", [*CLASSIFIERS, *LANGUAGE_MODELS])
def test_every_architecture(tmp_path, name, recipe):
    # naive: parametrised weights have other names in the checkpoint; ties are cut; raw weights are saved
    methods = {"dps_mix, ema": [DPSMix(update_ratio=0.5), EMA(0.5)], "mixout, rdrop": [Mixout(0.7), RDrop(0.5)]}[recipe]
    model = named(name.removesuffix(", tied"), **{**CLASSIFIERS, **LANGUAGE_MODELS}[name])
    data = rows_for(name)
    before = weights(model)
    tied = [n for n, p in model.named_parameters(remove_duplicate=False) if n not in before]
    trainer = make(tmp_path, methods, model, data=data, max_steps=4)
    trainer.train()
    assert trainer.run.index == 4
    after = weights(trainer.model)
    assert all(torch.isfinite(p).all() for p in after.values())
    linear = [w.name for w in trainer.run.weights(scope="linear")]
    moved = [n for n in linear if not torch.equal(after[n], before[n])]
    assert len(moved) > 0.6 * len(linear)
    trainer.save_model(str(tmp_path / "model"))
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert set(saved) <= set(before) | set(tied) | {n for n, _ in model.named_buffers()}
    plain = type(model).from_pretrained(tmp_path / "model")
    batch = transformers.default_data_collator(data[:6])
    if "ConditionalGeneration" in name:
        batch["decoder_input_ids"] = batch["input_ids"]
    assert torch.equal(logits(plain, batch), logits(trainer.model, batch))
    assert [n for n, _ in trainer.model.named_parameters()] == list(before)
    if model.config.tie_word_embeddings and name in LANGUAGE_MODELS:
        assert tied
        assert trainer.model.get_output_embeddings().weight is trainer.model.get_input_embeddings().weight


@dataclass
class Shown(Method):
    """Records what the forward sees of one weight, once it has moved away from its reference."""

    name: str = ""

    def setup(self, run):
        self.seen = []

    def penalty(self, step):
        if step.index == 3:
            self.seen.append(step.model.get_parameter(self.name).detach().clone())


@pytest.mark.parametrize(
    ("name", "weight", "axis"),
    [
        ("GPT2ForSequenceClassification", "transformer.h.0.attn.c_attn.weight", 0),  # Conv1D: (in, out)
        ("BertForSequenceClassification", "bert.encoder.layer.0.intermediate.dense.weight", 1),
    ],
)
def test_whole_input_features_are_mixed(tmp_path, name, weight, axis):
    # naive: Conv1D's second axis taken for the input, so that outputs are dropped
    model = named(name, **CLASSIFIERS[name])
    reference = weights(model)[weight]
    trainer = make(tmp_path, [Mixout(0.5), Shown(weight)], model, max_steps=4)
    trainer.train()
    away = trainer.run[Shown].seen[0] != reference
    features = away if axis == 0 else away.T
    drawn = features.float().mean(1)
    assert all(
        share == 0 or share > 0.9 for share in drawn.tolist()
    )  # a feature is shown as it is, or as its reference
    assert 0 < (drawn == 0).sum() < len(drawn)


def test_autocast_trains_full_precision_weights(tmp_path):
    # naive: casted copies of weights are cached in one autocast context, and the mixture is not seen
    model = bert(dtype=torch.float32)
    methods = [DPSMix(update_ratio=0.25), Watch()]
    options = {"gradient_accumulation_steps": 2, "logging_strategy": "steps", "logging_steps": 1}
    halved = make(tmp_path, methods, model, bf16=True, **options)
    halved.train()
    full = make(tmp_path, methods, bert(dtype=torch.float32), **options)
    full.train()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert {g.dtype for g in halved.run[Watch].before[0].values()} == {torch.float32}
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (halved, full)]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=2e-2)
    assert losses[0][0] != losses[1][0]  # autocast was on
    name = "bert.encoder.layer.0.attention.self.query.weight"
    dropped = [(t.run[Watch].before[0][name] == 0).all(0) for t in (halved, full)]
    assert torch.equal(*dropped)  # the same columns were drawn, and not seen
    assert 0 < dropped[0].sum() < 16


# ---------------------------------------------------------------------- frozen parameters and adapters


def test_frozen_parameters_are_left_alone(tmp_path):
    # naive: references, masks and averages of weights that no optimizer holds; KeyError at attach
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = make(tmp_path, [DPSMix(update_ratio=0.25, scope="all"), L2SP(0.1), EMA(0.5)], model, weight_decay=0.1)
    trainer.train()
    assert frozen
    assert all(torch.equal(model.get_parameter(n), p) for n, p in frozen.items())
    assert not set(frozen) & {w.name for w in trainer.run.weights()}
    assert not any(n in trainer.run[DPSMix].frequency or n in trainer.run[DPSMix].masks for n in frozen)


peft_talk = pytest.mark.filterwarnings(  # PEFT 0.21 reads an attribute that transformers 5.23 renamed
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def lora(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query", "value"], lora_dropout=0.1, **options)
    model = bert(dtype=torch.float32)
    torch.manual_seed(1)
    return peft.get_peft_model(model, config)


@peft_talk
@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["pooler", "classifier"]}])
def test_dps_on_adapters(tmp_path, options):
    # naive: the scope's weights are frozen, so that nothing is ever masked, without a word
    peft = pytest.importorskip("peft")
    model = lora(**options)
    base = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    trained = {n for n, p in model.named_parameters() if p.requires_grad and p.dim() == 2}
    methods = [DPSDense(keep=0.5, update_ratio=0.25), RDrop(0.5), EMA(0.5), Watch()]
    trainer = make(tmp_path, methods, model, **saving(gradient_accumulation_steps=2, save_steps=4))
    trainer.train()
    assert {n for n in trained if "lora_" in n}
    assert any("pooler" in n for n in trained) == bool(options)
    for step in (2, 3, 6, 7):
        gradients = trainer.run[Watch].before[step]
        masked = {n for n, g in gradients.items() if 0.4 < (g == 0).double().mean() < 0.6}
        assert trained <= masked
    assert all(torch.equal(model.get_parameter(n), p) for n, p in base.items())
    again = peft.PeftModel.from_pretrained(bert(dtype=torch.float32), tmp_path / "checkpoint-8")
    assert torch.equal(logits(again), logits(trainer.model))
    half = make(tmp_path, methods, lora(**options), **saving(gradient_accumulation_steps=2, save_steps=4))
    half.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert same(half.model, trainer.model)


@peft_talk
@pytest.mark.parametrize("method", [Mixout(), L2SP(), DPSMix(update_ratio=0.25)])
def test_anchors_need_weights_that_have_a_past(tmp_path, method):
    # naive: anchors the zero-initialised adapters to themselves, or silently nothing
    with pytest.raises(ValueError, match=f"{type(method).__name__} finds no pre-trained trainable weight.*adapters"):
        make(tmp_path, [method], lora())


@peft_talk
def test_anchors_act_on_pretrained_modules_that_peft_trains(tmp_path):
    trainer = make(tmp_path, [Mixout(0.5), Watch()], lora(modules_to_save=["pooler", "classifier"]), max_steps=2)
    trainer.train()
    dropped = {n for n, g in trainer.run[Watch].before[0].items() if (g == 0).all(0).any() and "lora_" not in n}
    assert [n for n in dropped if "pooler" in n]
    assert not [n for n in dropped if "classifier" in n]


# ---------------------------------------------------------------------- errors before training


@pytest.mark.parametrize(
    ("methods", "model", "error", "message"),
    [
        ([RDrop()], lambda: bert(0.0), ValueError, "no active dropout"),
        ([DPSDense], bert, TypeError, "pass instances, as DPSDense"),
        ([None], bert, TypeError, "must hold steadytune methods, got None"),
        ([EMA(0.5), EMA(0.9)], bert, ValueError, "EMA and EMA are both an average of"),
        ([L2SP(), Mixout(), L2SP()], bert, ValueError, "L2SP and L2SP are both an anchor of"),
    ],
)
def test_recipes_that_cannot_work(tmp_path, methods, model, error, message):
    seen = []
    with pytest.raises(error, match=message):
        make(tmp_path, methods, model(), callbacks=[Each("on_step_begin", lambda *_: seen.append(1))]).train()
    assert not seen  # before the first step


@pytest.mark.parametrize(
    "make_method",
    [
        lambda: DPSDense(keep=0.0),
        lambda: DPSDense(keep=1.3),
        lambda: DPSMix(update_ratio=0.0),
        lambda: DPSMix(frequency_penalty="maybe"),
        lambda: DPSDense(threshold="row"),
        lambda: Mixout(-0.1),
        lambda: Mixout(float("nan")),
        lambda: RDrop(-1.0),
        lambda: L2SP(float("nan")),
        lambda: ClipNorm(0.0),
        lambda: EMA(1.0),
    ],
)
def test_hyperparameters_out_of_range(make_method):
    with pytest.raises(ValueError, match=r"must (lie in|be)"):
        make_method()


def test_two_averages_are_kept_apart_by_only(tmp_path):
    halves = [only(EMA(d), lambda w, h=h: w.head == h) for d, h in ((0.5, True), (0.9, False))]
    trainer = make(tmp_path, halves, max_steps=2)
    trainer.train()
    assert trainer.run.index == 2


def test_several_devices_in_one_process(tmp_path):
    # naive: DataParallel's replicas race on the methods' state
    options = arguments(tmp_path)
    options._n_gpu = 2
    for methods in ([DPSDense()], [RDrop()], []):  # whatever the recipe, its step would not survive the wrapper
        with pytest.raises(ValueError, match=r"2 devices.*torchrun"):
            Trainer(bert(), options, train_dataset=DATA, methods=methods)
    with pytest.raises(ValueError, match=r"DataParallel.*torchrun"):
        Run(torch.nn.DataParallel(bert()), [DPSDense()])


def test_runs_that_were_not_made_ready():
    model = bert()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(RuntimeError, match=r"not attached.*run\.attach"):
        Run(model, [Mixout()]).loss(BATCH)
    with pytest.raises(ValueError, match=r"DPSDense needs the number of optimizer steps.*total_steps=n"):
        Run(model, [DPSDense()]).attach(optimizer).loss(BATCH)
    with pytest.raises(ValueError, match="holds no trainable parameter of this model"):
        Run(bert(), [Mixout()]).attach(torch.optim.SGD(bert(seed=1).parameters(), 0.1))
    with pytest.raises(ValueError, match="LBFGS"):
        Run(model, [Mixout()]).attach(torch.optim.LBFGS(model.parameters()))


def test_a_scheduler_comes_after_attach_where_groups_change(tmp_path):
    # naive: a scheduler has read the groups that the method changes; or all that is done in attach is taken for that
    def trainer_of(method, *, ready):
        model = bert()
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 8)
        if not ready:
            optimizer, schedule = torch.optim.AdamW(model.parameters(), 1e-2, weight_decay=0.1), None
        return make(tmp_path, [method], model, trainer={"optimizers": (optimizer, schedule)})

    for method in (LLRD(), SIFT(keep=0.05, batches=2)):
        name = type(method).__name__
        with pytest.raises(RuntimeError, match=rf"before attach\(\), and {name} then changed.*\(optimizer, None\)"):
            trainer_of(method, ready=True).train()
    for method in (L2SP(), RecAdam(gamma=3.0), ROSESecond(update="authors"), HypergradientLR()):
        ready, stock = trainer_of(method, ready=True), trainer_of(method, ready=False)
        ready.train()
        stock.train()
        assert same(ready.model, stock.model)  # the stock schedule is linear without warm-up


def test_an_optimizer_of_another_model_is_found_out(tmp_path):
    # naive: hooks that fire on weights which never move
    other = torch.optim.SGD(bert(seed=1).parameters(), 0.1)
    with pytest.raises(ValueError, match="holds no trainable parameter of this model"):
        make(tmp_path, [Mixout()], trainer={"optimizers": (other, None)}).train()


def test_a_loss_that_goes_round_the_methods_is_found_out(tmp_path):
    # naive: a step of the user's, without penalties and forward views, trains something else in silence
    class Own(Trainer):
        def training_step(self, model, inputs, num_items_in_batch=None):
            loss = model(**self._prepare_inputs(inputs))["loss"]
            loss.backward()
            return loss.detach()

    with pytest.raises(RuntimeError, match=r"without a forward through steadytune.*self\.run\.enter\(\)"):
        make(tmp_path, [Mixout()], cls=Own).train()


@pytest.mark.parametrize(
    ("methods", "dtype", "warns"),
    [([EMA(0.5)], torch.bfloat16, True), ([EMA(0.5)], torch.float32, False), ([], torch.bfloat16, False)],
)
def test_half_precision_weights_are_warned_of(tmp_path, caplog, methods, dtype, warns):
    # naive: AdamW at 2e-5 on bfloat16 weights rounds to nothing, and nobody says so
    with caplog.at_level(logging.WARNING, logger="steadytune"):
        make(tmp_path, methods, bert(dtype=dtype))
    assert any("half precision" in r.getMessage() for r in caplog.records) == warns
