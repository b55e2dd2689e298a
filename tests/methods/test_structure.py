"""Methods that change the model, or the choice of trained weights, before the first step."""

from __future__ import annotations

import copy
import re

import pytest
import torch
import transformers
from torch import nn

from architectures import CONFIGS, tiny
from helpers import arguments, assert_same, batches, bert, collate, copied, differs, llama, rows
from steadytune import (
    EMA,
    L2SP,
    LLRD,
    Adapters,
    BitFit,
    Mixout,
    RDrop,
    ReInit,
    Run,
    TopLayers,
    Trainer,
    load_adapters,
    only,
    save_adapters,
)
from steadytune.core.anatomy import anatomy, blocks, depths

TOKENS = {"input_ids": torch.tensor([[5, 6, 7, 2], [8, 9, 3, 2]])}


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), **{"lr": 1e-3, **options})


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def loaded(architecture, folder):
    """As from a checkpoint: every tensor flagged as loaded, and moved away from its initial value."""
    model = tiny(architecture)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.5)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder)


# ---------------------------------------------------------------------- ReInit


def test_the_naive_way_to_draw_loaded_layers_anew_is_a_no_op(tmp_path):
    """T12: if this fails, transformers draws loaded weights again, and `ReInit` need not clear a flag."""
    model = loaded("Bert", tmp_path)
    before = copied(model)
    model.bert.encoder.layer[1].apply(model._init_weights)
    assert_same(copied(model), before)


@pytest.mark.parametrize("architecture", [a for a in CONFIGS if a != "Albert"])
def test_top_block_and_pooler_are_drawn_as_the_models_own_initialiser_draws(architecture, tmp_path):
    model, fresh = loaded(architecture, tmp_path), tiny(architecture)
    before, expected = copied(model), copied(fresh)
    run = Run(model, [ReInit()])
    parts = anatomy(model)
    top = len(blocks(model)) - 1
    drawn = {n for n, part in parts.items() if part.block == top or (".pooler." in n and not part.head)}
    assert set(run.methods[0].names) == drawn
    for name, p in copied(model).items():
        if name not in drawn:
            assert torch.equal(p, before[name]), name
        elif expected[name].unique().numel() == 1:  # norms and biases
            assert torch.equal(p, expected[name]), name
        elif p.numel() >= 64:  # GPT-2 draws half as wide where a branch ends
            assert 0.6 < float(p.std() / expected[name].std()) < 1.6, name
    assert all(p._is_hf_initialized for p in model.parameters() if p.data_ptr())


def test_the_draw_depends_on_the_methods_seed_and_on_nothing_else():
    found = []
    for seed, noise, others in ((0, 1, []), (0, 2, [RDrop()]), (3, 1, [])):
        model = bert()
        torch.manual_seed(noise)
        state = torch.get_rng_state()
        Run(model, [ReInit(), *others], seed=seed)
        assert torch.equal(torch.get_rng_state(), state)
        found.append(copied(model))
    assert_same(found[0], found[1])
    assert differs(found[0], found[2])


def test_anchors_leave_drawn_weights_out():
    """Naive: they are pulled to the values that were drawn, as if those had been learnt."""
    model = bert()
    run = Run(model, [ReInit(), L2SP(0.5), Mixout(0.5)])
    assert run[L2SP].pulled
    assert not any(".layer.1." in n or "pooler" in n for n in run[L2SP].pulled)
    assert {w.name for w in run.weights() if run.is_new(w)} == {
        n for n in copied(model) if ".layer.1." in n or "pooler" in n or "classifier" in n
    }


def test_a_resume_on_the_runs_own_checkpoint_is_refused():
    """Naive: the trained blocks are drawn anew, and the training goes on from there."""
    model = bert()
    run = Run(model, [ReInit()], total_steps=4)
    optimizer = adamw(model)
    run.attach(optimizer)
    run.loss(batches(1)[0]).backward()
    optimizer.step()
    saved = run.state_dict()
    again = Run(copy.deepcopy(model), [ReInit()], total_steps=4)
    with pytest.raises(ValueError, match="another model than the one the run started with, such as its own checkpoint"):
        again.load_state_dict(saved)
    Run(bert(), [ReInit()], total_steps=4).load_state_dict(saved)


@pytest.mark.parametrize("recipe", [[TopLayers(1), ReInit(2)], [ReInit(2), TopLayers(1)]])
def test_drawn_blocks_that_are_frozen_are_refused(recipe):
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**CONFIGS["Bert"] | {"num_hidden_layers": 3})
    )
    with pytest.raises(ValueError, match=r"ReInit draws 'bert.encoder.layer.1.* anew, but it is frozen"):
        Run(model, recipe).attach(adamw(model))


@pytest.mark.parametrize(
    ("method", "model", "message"),
    [
        (ReInit(2), bert, "must leave one that is pre-trained: BertForSequenceClassification has 2 .* got 2"),
        (ReInit(1), lambda: tiny("Albert"), "AlbertForSequenceClassification has 1 .*share weights are one"),
        (ReInit(), lambda: nn.Linear(2, 2), "ReInit needs a transformers model.* got Linear"),
        (TopLayers(3), bert, "blocks must be at most 2, as many as BertForSequenceClassification has, got 3"),
        (BitFit(), llama, "BitFit trains biases, and the body of LlamaForCausalLM has none"),
        (BitFit(), lambda: tiny("T5"), "the body of T5ForSequenceClassification has none"),
        (LLRD(), lambda: nn.Linear(2, 2), "LLRD needs transformer blocks, Linear has none"),
        (Adapters(), lambda: tiny("XLNet"), "not known for XLNetForSequenceClassification"),
        (Adapters(), lambda: nn.Linear(2, 2), "not known for Linear"),
    ],
)
def test_models_that_a_method_cannot_act_on(method, model, message):
    with pytest.raises(ValueError, match=message):
        Run(model(), [method])


@pytest.mark.parametrize("method", [ReInit(), TopLayers(1), BitFit(), Adapters(), LLRD()])
def test_there_is_nothing_to_restrict(method):
    with pytest.raises(
        ValueError, match=f"{type(method).__name__} acts on the forward, on the loss, or before the first"
    ):
        only(method, lambda w: True)


def test_what_wrapped_the_model_earlier_would_not_hear_of_the_change(monkeypatch):
    monkeypatch.setattr(Run, "sharded", True)
    with pytest.raises(ValueError, match="BitFit changes the model, which is wrapped or sharded already"):
        Run(bert(), [BitFit()])
    Run(bert(), [LLRD()])


# ---------------------------------------------------------------------- TopLayers and BitFit


def test_top_layers_train_from_a_block_on():
    model = bert()
    run = Run(model, [TopLayers(1)], total_steps=1)
    above = {n for n in copied(model) if ".layer.1." in n or "pooler" in n or "classifier" in n}
    assert trained(model) == above
    optimizer = adamw(model, weight_decay=0.5)
    run.attach(optimizer)
    before = copied(model)
    run.loss(batches(1)[0]).backward()
    optimizer.step()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == above
    assert len(optimizer.state) == len(above)
    assert {n for n, p in copied(model).items() if not torch.equal(p, before[n])} == above
    assert "weights are trained" in run.describe()
    other = bert()
    Run(other, [TopLayers(0)])
    assert trained(other) == {n for n in above if ".layer." not in n}


def test_bitfit_trains_biases_and_the_head():
    model = bert()
    Run(model, [BitFit()])
    assert trained(model) == {n for n in copied(model) if n.endswith("bias") or n == "classifier.weight"}
    model = bert()
    Run(model, [BitFit(norms=False)])
    assert "bert.pooler.dense.bias" in trained(model)
    assert not any("LayerNorm" in n for n in trained(model))
    model = tiny("XLNet")
    Run(model, [BitFit()])
    assert "transformer.layer.1.rel_attn.r_w_bias" in trained(model)
    assert "transformer.layer.1.rel_attn.q" not in trained(model)


def test_what_the_user_froze_stays_frozen():
    model = bert()
    model.bert.encoder.layer[1].requires_grad_(False)
    Run(model, [TopLayers(1)])
    assert trained(model) == {n for n in copied(model) if "pooler" in n or "classifier" in n}


# ---------------------------------------------------------------------- LLRD


KEYS = ("names", "lr", "weight_decay_corrected")  # the authors' code does not decay the head: not corrected


@pytest.mark.parametrize("case", [0, 1])
def test_llrd_gives_the_recorded_rates(golden, case):
    held = golden("llrd")
    options = held.meta["cases"][case]
    config = transformers.BertConfig(**CONFIGS["Bert"] | {"num_hidden_layers": options["num_layers"]})
    model = transformers.BertForSequenceClassification(config)
    named = dict(model.named_parameters())
    flat = {n for n in named if n.endswith("bias") or "LayerNorm" in n}
    groups = [
        {"params": [p for n, p in named.items() if n not in flat], "weight_decay": options["weight_decay"]},
        {"params": [named[n] for n in flat], "weight_decay": 0.0},
    ]
    run = Run(model, [LLRD(options["decay"])]).attach(torch.optim.AdamW(groups, lr=options["lr"]))
    found = {w.name: (w.group["lr"], w.group["weight_decay"]) for w in run.weights()}
    for name, rate, decay in zip(*(held.arrays[f"case{case}/{key}"] for key in KEYS), strict=True):
        place = re.match(r"bert.embeddings|bert.encoder.layer.\d+\.|bert.pooler|classifier", name)[0]
        same = [
            n for n in found if n.startswith(place) and (n in flat) == (name.endswith("bias") or "LayerNorm" in name)
        ]
        assert same
        for n in same:
            assert found[n] == pytest.approx((rate, decay), rel=1e-12, abs=0), n


@pytest.mark.parametrize("architecture", CONFIGS)
def test_llrd_falls_from_the_head_to_the_embeddings(architecture):
    model = tiny(architecture)
    run = Run(model, [LLRD(0.5)]).attach(torch.optim.SGD(model.named_parameters(), lr=1.0))
    depth, top = depths(model), len(blocks(model))
    rates = {w.name: w.group["lr"] for w in run.weights()}
    assert set(rates) == set(depth)
    assert all(rates[name] == 0.5 ** (top - depth[name]) for name in rates)
    assert {rates[name] for name, part in anatomy(model).items() if part.head} == {1.0}
    for group in run.optimizer.param_groups:
        assert [model.get_parameter(n) for n in group["param_names"]] == group["params"] != []


def test_llrd_keeps_its_shares_under_a_scheduler_and_the_trainer_logs_the_rate_of_the_head(tmp_path):
    seen = []

    class Keep(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(logs.get("learning_rate"))

    trainer = Trainer(
        bert(),
        arguments(tmp_path, max_steps=4, warmup_steps=2, logging_strategy="steps", logging_steps=1),
        train_dataset=rows(16),
        data_collator=collate,
        methods=[LLRD(0.5), EMA(0.5)],
        callbacks=[Keep()],
    )
    trainer.train()
    assert seen[:4] == pytest.approx([0.0, 1.5e-3, 3e-3, 1.5e-3])
    assert sorted(g["initial_lr"] / 3e-3 for g in trainer.optimizer.param_groups) == pytest.approx(
        sorted([1, 0.5, 0.25, 0.125] * 2)
    )


@pytest.mark.parametrize("kind", ["cosine", "plateau", "one cycle"])
def test_llrd_goes_on_with_every_scheduler(kind):
    model = bert()
    optimizer = adamw(model, lr=0.1)
    run = Run(model, [LLRD(0.5)]).attach(optimizer)
    rates = [group["lr"] for group in optimizer.param_groups]
    assert rates == [0.1, 0.05, 0.025, 0.0125]
    scheduler = {
        "cosine": lambda: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4),
        "plateau": lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
        "one cycle": lambda: torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=4, cycle_momentum=False),
    }[kind]()
    for _ in range(3):
        run.enter()
        optimizer.step()
        scheduler.step(*([1.0] if kind == "plateau" else []))
    now = [group["lr"] for group in optimizer.param_groups]
    assert now[0] not in (0.0, 0.1)
    assert now == pytest.approx([now[0] * 0.5**i for i in range(4)])


def test_llrd_after_a_scheduler_is_refused():
    model = bert()
    optimizer = adamw(model)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    with pytest.raises(RuntimeError, match="scheduler was built before attach"):
        Run(model, [LLRD()]).attach(optimizer)


# ---------------------------------------------------------------------- Adapters

UNKNOWN = ("XLNet", "Funnel", "Mixtral")


@pytest.mark.parametrize("architecture", [a for a in CONFIGS if a not in UNKNOWN])
def test_adapters_change_nothing_until_they_are_trained_and_every_one_acts(architecture):
    model, plain = tiny(architecture, num_labels=3), tiny(architecture, num_labels=3)
    Run(model, [Adapters(size=2)])
    with torch.no_grad():
        assert torch.equal(model(**TOKENS).logits, plain(**TOKENS).logits)
    assert copied(plain).keys() < copied(model).keys()
    added = copied(model).keys() - copied(plain).keys()
    assert trained(model) == added | {n for n, part in anatomy(plain).items() if part.head or part.kind == "norm"}
    assert len(added) >= 8 * len(blocks(plain))  # two bottlenecks of two matrices and biases in each block
    model(**TOKENS).logits[:, 0].sum().backward()
    ups = [n for n in added if n.endswith("up.bias")]
    assert all(model.get_parameter(n).grad.abs().max() > 0 for n in ups)


def run_of_adapters(steps=3):
    model = bert()
    run = Run(model, [Adapters(size=4), EMA(0.5)], total_steps=steps)
    optimizer = adamw(model, lr=3e-3)
    run.attach(optimizer)
    for batch in batches(steps):
        run.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.finish()
    return model.eval()


def test_adapters_come_back_bit_for_bit(tmp_path):
    model = run_of_adapters()
    file = save_adapters(tmp_path, model)
    again = load_adapters(tmp_path, bert()).eval()
    assert_same(copied(again), copied(model))
    batch = batches(1)[0]
    with torch.no_grad():
        logits = model(**batch).logits
        assert torch.equal(again(**batch).logits, logits)
        assert torch.equal(copy.deepcopy(again)(**batch).logits, logits)
        assert not torch.equal(bert().eval()(**batch).logits, logits)
    sizes = {n: t.nbytes for n, t in copied(model).items()}
    new = sum(size for n, size in sizes.items() if n in trained(model))
    assert new < file.stat().st_size < new + 8000  # names and shapes


def test_adapters_for_another_base_or_head_are_refused(tmp_path):
    save_adapters(tmp_path / "a", run_of_adapters())
    with pytest.raises(ValueError, match="belongs to a base with hash"):
        load_adapters(tmp_path / "a", bert(seed=1))
    with pytest.raises(
        ValueError, match=r"'classifier.weight' of shape \(3, 16\), the model has \(2, 16\).*num_labels"
    ):
        load_adapters(tmp_path / "a", bert(labels=2))
    with pytest.raises(ValueError, match="has no adapters: save it as any model"):
        save_adapters(tmp_path / "b", bert())


def test_an_optimizer_that_was_built_too_early_is_refused():
    """Naive: the adapters are never trained, and nobody notices."""
    model = bert()
    optimizer = adamw(model)
    with pytest.raises(ValueError, match=r"does not hold 'bert.*adapter.*make Run\(model, methods\) first"):
        Run(model, [Adapters()]).attach(optimizer)
