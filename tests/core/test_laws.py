"""Laws that every method obeys: one table, a method is a row. A new method is one more row of `SINGLE`.

Runs have `TOTAL` steps, so that each law passes through both stages of DPS and over their boundaries.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import io
import itertools
import math
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from helpers import (
    Net,
    OnlyFloat32,
    arguments,
    assert_same,
    batches,
    bert,
    collate,
    copied,
    differs,
    hash_dropout,
    hash_noise,
    interrupt,
    is_extra_pass,
    llama,
    points,
    rows,
    tensors,
    train,
)
from recorded import make_state
from steadytune import (
    AWP,
    EMA,
    FGM,
    L2SP,
    LAWA,
    LEVI,
    LLRD,
    LNSR,
    METHODS,
    PGD,
    R3F,
    R4F,
    SAM,
    SIFT,
    SMART,
    SWA,
    VIBERT,
    Adapters,
    BiDrop,
    BitFit,
    BregmanProximal,
    CausalHead,
    ChildTuningD,
    ChildTuningF,
    ClipNorm,
    DPSDense,
    DPSMix,
    EasyAdapt,
    Extrapolation,
    FreeLB,
    GroupWeights,
    HeadInit,
    HypergradientLR,
    ImplicitTune,
    LayerDrop,
    MaskTraining,
    MetaSemi,
    MetaWeightNet,
    Mixout,
    NEFTune,
    Pooling,
    RDrop,
    RecAdam,
    ReInit,
    ROSEEnsemble,
    ROSEFirst,
    ROSESecond,
    Run,
    SupCon,
    TMix,
    TopLayers,
    Trainer,
    WeightMixup,
    load_adapters,
    load_levi,
    only,
    precision,
)
from steadytune.core import Method, Weight, overrides
from steadytune.core.method import acts_on_weights
from steadytune.errors import UsageError
from steadytune.files import state

TOTAL = 8
SOON = {"every": 2, "start": 0.2, "least": 1}  # updates after steps 2, 4, 6 and 8
DPS = {"update_ratio": 0.25}  # stages of two steps: I 0-1, II 2-3, I 4-5, II 6-7


def in_first_block(w: Weight) -> bool:
    return w.block == 0


def by_first_token(inputs: Any) -> Tensor:
    """A row's domain."""
    return inputs["input_ids"][:, 0] % 3 - 1


def outer_batches() -> list[dict[str, Tensor]]:
    return batches(3, seed=5)


def outer_tokens() -> list[dict[str, Tensor]]:
    return batches(3, seed=5, tokens=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """A recipe, and what the laws must know of it that its methods do not declare.

    Attributes:
        recipe: The same objects in every test: no run may leave a trace in them.
        plain: Whether it has a setting at which it is plain fine-tuning.
        draws: Whether it has randomness of its own.
        moments: Whether it looks at Adam's moments.
        passes: Whether it makes further passes that its cost does not count, as before the first step.
        trainer: Whether its laws are tried in the Trainer too. One row is enough for each way in which the Trainer
            meets a method: data, moments, penalties, further looks, weights added or shown, groups, files.
        tokens: Whether it can train a language model: some need a head of their own, a loss for each row, or biases.
        partners: Whether rows of a micro-batch meet each other, so that accumulation is another training.
        refused: Rows before it in a list with which it is refused, and a part of the message.
    """

    recipe: list[Method]
    plain: bool = True
    draws: bool = True
    moments: bool = False
    passes: bool = False
    trainer: bool = False
    tokens: bool = True
    partners: bool = False
    refused: Mapping[str, str] = dataclasses.field(default_factory=dict)


NO_BODY = dict.fromkeys(("bitfit", "adapters", "levi"), "finds no pre-trained trainable")  # linear weights of the body
NO_LEVI = {"levi": "finds no (pre-trained )?trainable weight"}  # of the body, all of which LEVI freezes
NO_MATRICES = "MaskTraining finds no pre-trained trainable matrix"
FREEZING = {"mask_training": "which a later method froze"}
BEFORE_SAM = {"meta_semi": "replaces the gradient, and with it what MetaSemi adds"}
TAKEN = "take 1 of it together, these take more"
NOTHING_LEFT = "of which (CausalHead|MetaWeightNet) leaves nothing"
DRAWN = "ReInit draws 'bert.*frozen"
SINGLE: dict[str, Row] = {
    "pooling": Row([Pooling()], plain=False, draws=False, tokens=False, refused={"levi": "leave Pooling out"}),
    "head_init": Row([Pooling(how="cls"), HeadInit()], plain=False, draws=False, trainer=True, tokens=False),
    "dps_dense": Row([DPSDense(**DPS)], draws=False),
    "dps_dense_frozen": Row([DPSDense(frozen=True, **DPS)], draws=False, trainer=True),
    "dps_dense_global": Row([DPSDense(threshold="global", **DPS)], draws=False),
    "dps_mix": Row([DPSMix(**DPS)], trainer=True, refused=NO_BODY),
    "dps_mix_authors": Row([DPSMix(rescale_gradient=False, frequency_penalty="on", frozen=True, **DPS)]),
    "child_tuning_f": Row([ChildTuningF(keep=0.5)]),
    "child_tuning_d": Row([ChildTuningD(keep=0.3)], passes=True, trainer=True, refused=NO_LEVI),
    "child_tuning_d_example": Row([ChildTuningD(keep=0.3, per="example", clip=1.0, scope="linear", frozen=True)]),
    "rose_first": Row([ROSEFirst(keep=0.5)], plain=False, refused=NO_LEVI),
    "rose_first_element": Row([ROSEFirst(keep=0.5, granularity="element", update="authors")], plain=False),
    "rose_second": Row([ROSESecond(keep=0.5)], draws=False, moments=True, trainer=True, refused=NO_LEVI),
    "rose_second_authors": Row([ROSESecond(keep=0.5, score="authors", update="authors")], draws=False, moments=True),
    "rose_second_element": Row([ROSESecond(keep=0.5, granularity="element")], draws=False, moments=True),
    "rose_ensemble": Row([ROSEEnsemble(keep=0.5, gamma=0.3)], plain=False, moments=True, refused=NO_LEVI),
    "bi_drop": Row([BiDrop(keep=0.5)], plain=False, refused=NO_LEVI),
    "sift": Row(
        [SIFT(keep=0.05, batches=2, scope="linear")],
        passes=True,
        refused=dict.fromkeys(("bitfit", "levi"), "SIFT finds no weight in scope 'linear' but the head's"),
    ),
    "sift_many": Row([SIFT(keep=0.2, batches=2, scope="linear")]),
    "mixout": Row([Mixout(keep=0.7)], trainer=True, refused=NO_BODY),
    "rdrop": Row([RDrop(alpha=1.0)], plain=False, draws=False, trainer=True),
    "smart": Row([SMART(epsilon=0.05, step_size=0.05, noise=0.01)]),
    "smart_proximal": Row(
        [SMART(epsilon=0.05, step_size=0.03, steps=2, proximal=BregmanProximal(decay=0.5))], trainer=True
    ),
    "smart_published": Row([SMART(epsilon=1e-6, projection=False, dropout="fresh")]),
    "r3f": Row([R3F(scale=0.1)]),
    "r4f": Row([R4F(scale=0.1, noise="normal", detach_embedding=True)], plain=False, tokens=False),
    "lnsr": Row([LNSR(scale=0.2)]),
    "fgm": Row([FGM()]),
    "pgd": Row([PGD(steps=2)]),
    "freelb": Row([FreeLB(steps=3)]),
    "sam": Row([SAM(rho=0.1)], draws=False, trainer=True, refused=BEFORE_SAM),
    "awp": Row([AWP(gamma=0.1)], draws=False, refused=BEFORE_SAM),
    "neftune": Row([NEFTune()], trainer=True),
    "tmix": Row([TMix()], partners=True, tokens=False),
    "supcon": Row(
        [SupCon(weight=0.5)],
        draws=False,
        partners=True,
        trainer=True,
        tokens=False,
        refused=dict.fromkeys(("causal_head", "meta_weight_net"), TAKEN),
    ),
    "layer_drop": Row([LayerDrop(p=0.5)], draws=False, trainer=True),
    "vibert": Row([VIBERT(beta=0.1)], plain=False, draws=False, trainer=True, tokens=False),
    "easy_adapt": Row([EasyAdapt(2, domain=by_first_token, drop=0.0)], plain=False, draws=False, tokens=False),
    "group_weights": Row(
        [GroupWeights(column=by_first_token, **SOON)],
        draws=False,
        trainer=True,
        tokens=False,
        refused=dict.fromkeys(("causal_head", "meta_weight_net"), NOTHING_LEFT),
    ),
    "group_weights_floor": Row([GroupWeights("floor", by_first_token, share=0.99, **SOON)], draws=False, tokens=False),
    "causal_head": Row(
        [CausalHead(mu=0.5)],
        plain=False,
        partners=True,
        trainer=True,
        tokens=False,
        refused={"group_weights": NOTHING_LEFT, **dict.fromkeys(("supcon", "causal_head", "meta_weight_net"), TAKEN)},
    ),
    "weight_mixup": Row([WeightMixup(outer=outer_batches, lr=0.05)], trainer=True, refused=NO_BODY),
    "weight_mixup_difference": Row([WeightMixup(outer=outer_batches, lr=0.05, order="difference", convex=False)]),
    "meta_weight_net": Row(
        [MetaWeightNet(outer=outer_batches, lr=0.05)],
        plain=False,
        trainer=True,
        tokens=False,
        refused={"group_weights": NOTHING_LEFT, **dict.fromkeys(("supcon", "causal_head", "meta_weight_net"), TAKEN)},
    ),
    "meta_semi": Row([MetaSemi(unlabelled=outer_batches)], trainer=True, tokens=False),
    "implicit_tune": Row([ImplicitTune(outer=outer_batches, start=0.5)], refused=NO_LEVI),
    "implicit_tune_neumann": Row([ImplicitTune(outer=outer_batches, toward="zero", per="block", start=0.5, terms=3)]),
    "l2sp": Row([L2SP(alpha=0.5)], draws=False, refused=NO_LEVI),
    "l2sp_coupled": Row([L2SP(alpha=0.5, decoupled=False, replace_decay=False)], draws=False),
    "recadam": Row([RecAdam(gamma=3.0, t0=0.4, k=10.0)], draws=False, trainer=True, refused=NO_LEVI),
    "recadam_linear": Row(
        [RecAdam(gamma=3.0, t0=6.0, unit="steps", schedule="linear", replace_decay=False)], draws=False
    ),
    "extrapolation": Row([Extrapolation(ahead=0.7)], draws=False),
    "hypergradient_lr": Row([HypergradientLR(beta=0.3)], draws=False),
    "hypergradient_lr_additive": Row([HypergradientLR(beta=1e-5, rule="additive")], draws=False),
    "clip_norm": Row([ClipNorm(max_norm=0.3)], draws=False),
    "ema": Row([EMA(decay=0.8)], draws=False, trainer=True),
    "swa": Row([SWA(start=0.25, every=2)], draws=False),
    "lawa": Row([LAWA(last=2, every=1)], draws=False, trainer=True),
    "re_init": Row([ReInit()], refused=dict.fromkeys(("bitfit", "adapters", "levi", "mask_training"), DRAWN)),
    "top_layers": Row([TopLayers(blocks=1)], plain=False, draws=False, refused=FREEZING),
    "bitfit": Row(
        [BitFit()],
        plain=False,
        draws=False,
        tokens=False,
        refused={"re_init": DRAWN, **FREEZING},
    ),
    "adapters": Row(
        [Adapters(size=4)],
        plain=False,
        trainer=True,
        refused={"re_init": DRAWN, "adapters": "has adapters already", **FREEZING},
    ),
    "levi": Row(
        [LEVI(dropout=0.0)],
        plain=False,
        trainer=True,
        tokens=False,
        refused={"re_init": DRAWN, "pooling": "leave Pooling out", "levi": "has LEVI already", **FREEZING},
    ),
    "mask_training": Row(
        [MaskTraining(keep=0.7, lr=0.05, every=1)],
        plain=False,
        trainer=True,
        refused={"re_init": DRAWN, **dict.fromkeys(("bitfit", "adapters", "levi"), NO_MATRICES)},
    ),
    "llrd": Row([LLRD(decay=0.5)], draws=False, trainer=True),
}
COMBINED: dict[str, Row] = {
    "recipe_of_five": Row(
        [DPSMix(**DPS), RDrop(), EMA(decay=0.8), L2SP(alpha=0.5), ClipNorm(max_norm=0.3)], plain=False, trainer=True
    ),
    "recipe_of_children": Row(
        [ChildTuningF(keep=0.5), RDrop(), RecAdam(gamma=3.0), SWA(start=0.0), ClipNorm(max_norm=0.3)],
        plain=False,
        trainer=True,
    ),
    "recipe_of_penalties": Row(
        [RDrop(), SMART(proximal=BregmanProximal()), R3F(), LNSR(), EMA(decay=0.8)], plain=False, trainer=True
    ),
    "recipe_of_masks": Row(
        [
            only(Mixout(keep=0.7), in_first_block),
            DPSDense(frozen=True, **DPS),
            L2SP(alpha=0.5, decoupled=False),
            EMA(decay=0.8, scope="linear"),
        ],
        passes=True,
        trainer=True,
    ),
    "recipe_of_structure": Row(
        [ReInit(), TopLayers(blocks=2), LLRD(decay=0.5), Mixout(keep=0.7), EMA(decay=0.8)], plain=False, trainer=True
    ),
}
ROWS = {**SINGLE, **COMBINED}
# What reads a checkpoint of methods whose result is no plain model.
READERS: dict[str, Callable[[Any], Any]] = {
    "adapters": lambda folder: load_adapters(folder, bert()),
    "levi": load_levi,
}
RECIPES = {name: row.recipe for name, row in ROWS.items()}
every_recipe = pytest.mark.parametrize("name", RECIPES)


def recipes(chosen: Callable[[Method], bool], *more: str) -> list[str]:
    """Recipes with such a method, and some by name: a law is tried where the code that it is about depends on them."""
    return [name for name, recipe in RECIPES.items() if name in more or any(map(chosen, recipe))]


# Something else than the raw weights is live at times: shown to the forward, evaluated, or tried by an outer step.
SHOWING = recipes(lambda m: overrides(m, "before_forward") or overrides(m, "evaluated") or hasattr(m, "outer"))
# A batch passes the model more than once, in copies, penalties or further gradients.
PASSING = recipes(lambda m: m.cost.passes > 1 or overrides(m, "penalty"), *(n for n, row in ROWS.items() if row.passes))
ALONE = [name for name, row in ROWS.items() if not row.partners]
PASSING_ALONE = [name for name in PASSING if name in ALONE]
IN_TRAINER = [name for name, row in ROWS.items() if row.trainer]


def null(recipe: list[Method]) -> list[Method] | None:
    """The recipe at the settings at which its methods declare to be plain fine-tuning."""
    if any(m.null is None for m in recipe):
        return None
    nulls = [dataclasses.replace(m, **(m.null or {})) for m in recipe]
    return [only(n, m.where) if m.where else n for n, m in zip(nulls, recipe, strict=True)]


NULLABLE = [name for name in RECIPES if null(RECIPES[name]) is not None]


def adamw(parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, **{"lr": 3e-3, "weight_decay": 0.01, **options})


class Loop:
    """A plain training loop with a recipe."""

    def __init__(
        self, recipe: list[Method], model: Any = None, *, optimizer: Any = adamw, total: int = TOTAL, seed: int = 0
    ) -> None:
        self.model = bert() if model is None else model
        data = functools.partial(batches, 2, seed=9)
        self.run = Run(self.model, recipe, total_steps=total, seed=seed, data=data)
        self.optimizer = optimizer(self.model.parameters())
        self.run.attach(self.optimizer)
        torch.manual_seed(1)  # of dropout

    def train(self, data: list[dict[str, Tensor]], micro: int = 1) -> Loop:
        for start in range(0, len(data), micro):
            for batch in data[start : start + micro]:
                (self.run.loss(batch) / micro).backward()
            self.step()
        return self

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def all(self) -> dict[str, Any]:
        """Everything that training moves."""
        optimizer = self.optimizer.state_dict()["state"]
        return {"weights": copied(self.model), "optimizer": optimizer, "run": self.run.state_dict()}

    def saved(self) -> dict[str, Any]:
        """What a user saves."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
        }

    def load(self, saved: dict[str, Any]) -> Loop:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        torch.set_rng_state(saved["rng"])
        return self


def written(tree: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(tree, buffer)
    return buffer.getvalue()


def read(file: bytes) -> Any:
    return torch.load(io.BytesIO(file), weights_only=True)


class Save(transformers.TrainerCallback):
    """Checkpoints (and evaluations) after the steps named."""

    def __init__(self, *steps: int, evaluate: bool = False) -> None:
        self.steps, self.evaluate = steps, evaluate

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = state.global_step in self.steps
        control.should_evaluate = control.should_save and self.evaluate


class Stop(transformers.TrainerCallback):
    """End the training after a step, as early stopping does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step == self.step


class Uninterrupted:
    """One run of a recipe to its end: everything before each step, and what a user would save there."""

    def __init__(self, name: str) -> None:
        self.all: list[dict[str, Any]] = []
        self.saved: list[bytes] = []
        loop = Loop(RECIPES[name])
        for batch in [*batches(TOTAL), None]:
            self.all.append(copy.deepcopy(loop.all()))
            self.saved.append(written(loop.saved()))
            if batch is not None:
                loop.train([batch])


uninterrupted = functools.cache(Uninterrupted)


def trainer_of(recipe: list[Method], folder: Any, *, model: Any = None, data: Any = None, **changes: Any) -> Trainer:
    options = {k: changes.pop(k) for k in ("callbacks", "eval_dataset", "compute_metrics") if k in changes}
    return Trainer(
        bert() if model is None else model,
        arguments(folder, **changes),
        train_dataset=rows(32) if data is None else data,
        data_collator=collate,
        methods=recipe,
        **options,
    )


# ---------------------------------------------------------------- the table


def test_every_method_has_a_row():
    assert {type(m) for row in SINGLE.values() for m in row.recipe} == set(METHODS.values())


def test_what_declares_a_null_setting_names_its_own_fields():
    for cls in METHODS.values():
        assert set(cls.null or {}) <= {f.name for f in dataclasses.fields(cls)}
    assert [name for name, row in ROWS.items() if row.plain] == NULLABLE


@every_recipe
def test_a_method_that_no_run_has_is_its_fields_and_nothing_else(name):
    """Naive: what follows from the fields is stored beside them, and a copy with another field has the old one."""
    for method in RECIPES[name]:
        assert set(vars(method)) - {"where"} == {f.name for f in dataclasses.fields(method)}


# ---------------------------------------------------------------- null settings


@functools.cache
def plain(steps: int) -> dict[str, Any]:
    """Fine-tuning without steadytune."""
    model = bert()
    optimizer = adamw(model.parameters())
    torch.manual_seed(1)
    for batch in batches(steps):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"weights": copied(model), "optimizer": optimizer.state_dict()["state"]}


@every_recipe
def test_null_is_bitwise_plain_and_the_method_is_not(name):
    if name in NULLABLE:
        loop = Loop(null(RECIPES[name])).train(batches(TOTAL))
        assert_same({k: loop.all()[k] for k in ("weights", "optimizer")}, plain(TOTAL))
        assert loop.run.index == TOTAL
    assert differs(uninterrupted(name).all[TOTAL]["weights"], plain(TOTAL)["weights"])


@functools.cache
def stock(folder: str, norm: float) -> dict[str, Any]:
    """The stock Trainer; its clipping acts."""
    options = arguments(folder, num_train_epochs=2, max_grad_norm=norm)
    trainer = transformers.Trainer(bert(), options, train_dataset=rows(48), data_collator=collate)
    trainer.train()
    return {"weights": copied(trainer.model), "optimizer": trainer.optimizer.state_dict()["state"]}


@pytest.mark.parametrize("name", [name for name in IN_TRAINER if name in NULLABLE])
def test_null_is_bitwise_plain_in_the_trainer(name, tmp_path):
    norm = 0.0 if any(isinstance(m, ClipNorm) for m in RECIPES[name]) else 0.3  # a ClipNorm replaces max_grad_norm
    trainer = trainer_of(null(RECIPES[name]), tmp_path, data=rows(48), num_train_epochs=2, max_grad_norm=norm)
    trainer.train()
    found = {"weights": copied(trainer.model), "optimizer": trainer.optimizer.state_dict()["state"]}
    assert_same(found, stock(str(tmp_path.parent), norm))
    assert trainer.run.index == 24


def test_clipping_of_the_stock_trainer_acts(tmp_path):
    assert differs(stock(str(tmp_path), 0.0)["weights"], stock(str(tmp_path), 0.3)["weights"])


# ---------------------------------------------------------------- resume


@every_recipe
def test_resumed_is_uninterrupted_bitwise_in_a_plain_loop(name):
    data, whole = batches(TOTAL), uninterrupted(name)
    for start, end in ((0, 3), (3, 6), (5, TOTAL)):  # before the first step (T1), inside stage II, inside stage I
        loop = Loop(RECIPES[name]).load(read(whole.saved[start]))
        assert loop.run.index == start
        loop.train(data[start:end])
        assert_same(loop.all(), whole.all[end])
        assert loop.run.index == end
        assert differs(whole.all[end]["weights"], whole.all[start]["weights"])


def everything(trainer: Trainer) -> dict[str, Any]:
    return {
        "weights": copied(trainer.model),
        "optimizer": trainer.optimizer.state_dict()["state"],
        "run": trainer.run.state_dict(),
        "index": torch.tensor(trainer.run.index),
    }


@pytest.mark.parametrize("name", IN_TRAINER)
def test_resumed_is_uninterrupted_bitwise_in_the_trainer(name, tmp_path):
    """From inside a stage II in a fresh Trainer, from inside a stage I in the Trainer that was interrupted."""
    options = {"gradient_accumulation_steps": 2, "num_train_epochs": 2}  # 8 steps of two micro-batches
    whole = trainer_of(RECIPES[name], tmp_path, callbacks=[Save(3, 5)], **options)
    calls: list[int] = []  # penalties make forwards of their own
    whole.model.classifier.register_forward_hook(lambda *_: calls.append(whole.model.training and not is_extra_pass()))
    whole.train()
    each = sum(calls) // (2 * TOTAL)
    assert whole.run.index == TOTAL
    for step in (3, 5):
        trainer = trainer_of(RECIPES[name], tmp_path, **options)
        if step == 5:
            stop = interrupt(trainer.model, after=3 * each + 1)  # second micro-batch of the second step
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
            assert trainer.run.index == 1
            stop()
        checkpoint = str(tmp_path / f"checkpoint-{step}")
        trainer.train(resume_from_checkpoint=checkpoint)
        assert_same(everything(trainer), everything(whole))
        held = READERS.get(name, AutoModelForSequenceClassification.from_pretrained)(checkpoint)
        assert differs(copied(held), copied(whole.model))


@pytest.mark.parametrize("name", ["dps_dense", "dps_mix", "mixout", "ema"])
def test_types_survive_a_resume_of_half_precision_weights(name):
    """T3: torch casts per-parameter state to the weight's type: masks and float32 sums would come back as bf16."""
    data = batches(3)
    for steps in (1, 3):  # sums of stage I, masks of stage II
        loop = Loop(RECIPES[name], bert(dtype=torch.bfloat16)).train(data[:steps])
        resumed = Loop(RECIPES[name], bert(dtype=torch.bfloat16)).load(read(written(loop.saved())))
        assert_same(resumed.all(), loop.all())
    if name.startswith("dps"):
        assert {t.dtype for t in loop.run[DPSDense].masks.values()} == {torch.bool}


@every_recipe
def test_state_comes_back_on_the_device_of_the_model(name, monkeypatch):
    """Naive: only what is held under a weight's name; beside a model on a GPU, moments of MaskTraining stay behind."""
    loop = Loop(RECIPES[name]).train(batches(2))
    saved, got = read(written(loop.run.state_dict())), []
    for method in loop.run.methods:
        monkeypatch.setattr(method, "load_state_dict", got.append)
    monkeypatch.setattr(Run, "_device", torch.device("meta"))
    loop.run.load_state_dict(saved)
    named = {w.name for w in loop.run.weights()}

    def elsewhere(value: Any) -> list[Tensor]:
        if isinstance(value, dict):
            return [t for key, held in value.items() if key not in named for t in elsewhere(held)]
        if isinstance(value, (list, tuple)):
            return [t for held in value for t in elsewhere(held)]
        return [value] if isinstance(value, Tensor) else []

    assert {t.device.type for t in elsewhere(got)} <= {"meta"}


@every_recipe
def test_no_method_needs_float64_on_the_device(name, monkeypatch):
    """Naive: Fisher information and the features of probes were widened on the device."""
    monkeypatch.setattr(precision, "widest", lambda device: torch.float32)
    with OnlyFloat32():
        Loop(RECIPES[name]).train(batches(4)).run.finish()


@every_recipe
def test_nothing_is_put_into_the_optimizer_before_its_first_step(name):
    """T1: Adam initialises itself where its state is empty, and fails with KeyError where it is not."""
    loop = Loop(RECIPES[name])
    loss = loop.run.loss(batches(1)[0])
    assert not loop.optimizer.state
    loss.backward()
    loop.step()
    assert all(set(s) == {"step", "exp_avg", "exp_avg_sq"} for s in loop.optimizer.state.values())


@pytest.mark.parametrize("name", ["dps_mix", "mixout", "l2sp"])
def test_references_are_the_weights_before_training_also_after_a_resume(name):
    """T14: a reference taken when first used would be half-trained."""
    base = copied(bert())
    loop = Loop(RECIPES[name]).load(read(uninterrupted(name).saved[4])).train(batches(1))
    weights = [w for w in loop.run.weights(scope="linear") if not loop.run.is_new(w)]
    assert weights
    for w in weights:
        assert torch.equal(loop.run.reference(w.name), base[w.name])
        assert not torch.equal(w.data, base[w.name])
    late = Loop([ClipNorm()])
    with pytest.raises(RuntimeError, match=r"setup\(\)"):
        late.run.reference("bert.pooler.dense.weight")


# ---------------------------------------------------------------- accumulation


def descent(name: str) -> Any:
    """Plain descent, or Adam made like it by eps: AdamW would hide a gradient that is too large by a factor."""
    if ROWS[name].moments:
        return functools.partial(torch.optim.AdamW, lr=0.2, eps=1.0, weight_decay=0.01)
    return functools.partial(torch.optim.SGD, lr=0.2, weight_decay=0.01)


@pytest.mark.parametrize(
    ("name", "equal"), [*((name, True) for name in ALONE), *((name, False) for name in PASSING_ALONE)]
)
def test_16_at_once_equals_4_times_4_in_a_plain_loop(name, equal):
    ends = []
    for size in (16, 4):
        model = hash_dropout(bert(dtype=torch.float64))
        data = batches(4 * 16 // size, size, equal=equal)
        with hash_noise():
            loop = Loop(RECIPES[name], model, optimizer=descent(name)).train(data, micro=16 // size)
        assert loop.run.index == 4  # through a stage I and a stage II
        ends.append(loop.all())
    assert_same(*ends, atol=1e-10)
    assert differs(ends[0]["weights"], copied(bert(dtype=torch.float64)))


def on_tokens(recipe: list[Method]) -> list[Method]:
    """The recipe with outer rows for a language model."""
    return [dataclasses.replace(m, outer=outer_tokens) if hasattr(m, "outer") else m for m in recipe]


@pytest.mark.parametrize(
    ("name", "tokens"),
    [*((name, False) for name in PASSING_ALONE), *((name, True) for name in PASSING_ALONE if ROWS[name].tokens)],
)
def test_16_at_once_equals_4_times_4_in_the_trainer(name, tokens, tmp_path):
    """T5 and its mend: the classifier's loss ignores the count of tokens, the language model's uses it."""
    ends = []
    for size in (16, 4):
        model = hash_dropout((llama if tokens else bert)(dtype=torch.float64))
        trainer = trainer_of(
            on_tokens(RECIPES[name]) if tokens else RECIPES[name],
            tmp_path,
            model=model,
            data=rows(64, tokens=tokens),
            num_train_epochs=2,
            callbacks=[Stop(4)],
            per_device_train_batch_size=size,
            gradient_accumulation_steps=16 // size,
            optim="adamw_torch" if ROWS[name].moments else "sgd",
            adam_epsilon=1.0,
            learning_rate=0.2,
        )
        with hash_noise():
            trainer.train()
        assert trainer.run.index == 4
        ends.append({"weights": copied(trainer.model), "run": trainer.run.state_dict()})
    assert_same(*ends, atol=1e-10)


# ---------------------------------------------------------------- evaluation and plain checkpoints


@pytest.mark.parametrize("name", sorted({*SHOWING, *IN_TRAINER}))
def test_a_checkpoint_of_any_step_is_plain_and_gives_the_evaluated_logits(name, tmp_path):
    seen: list[np.ndarray] = []

    def keep(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {}

    examples = rows(8, seed=1)
    saved = (1, 2, 3, 5)  # in stage I, at its end, in stage II, in the next stage I
    trainer = trainer_of(
        RECIPES[name],
        tmp_path,
        max_steps=TOTAL,
        per_device_eval_batch_size=8,
        eval_dataset=examples,
        compute_metrics=keep,
        callbacks=[Save(*saved, evaluate=True), Stop(5)],
    )
    trainer.train()
    assert len(seen) == len(saved)
    for step, logits in zip(saved, seen, strict=True):
        folder = tmp_path / f"checkpoint-{step}"
        if name in READERS:  # no plain model has these outputs: none can be read
            with pytest.raises((OSError, ValueError), match="config"):
                AutoModelForSequenceClassification.from_pretrained(folder)
            model = READERS[name](folder)
        else:
            model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
            assert not any(report.values()), report
        with torch.no_grad():
            assert np.array_equal(model.eval()(**collate(examples)).logits.numpy(), logits)
    assert all(not np.array_equal(one, other) for one, other in itertools.pairwise(seen))


# ---------------------------------------------------------------- randomness


@every_recipe
def test_same_seed_same_bits_and_another_method_seed_another_run_where_methods_draw(name):
    again, other = (Loop(RECIPES[name], seed=seed).train(batches(3)).all() for seed in (0, 4))
    assert_same(again, uninterrupted(name).all[3])
    assert differs(again["weights"], other["weights"]) == ROWS[name].draws


def test_draws_do_not_depend_on_other_methods_or_on_the_global_generator():
    """T2: with one shared generator, each method in the recipe changes the draws of all others."""

    def columns(recipe: list[Method], noise: int) -> dict[str, Tensor]:
        loop, found = Loop(recipe), {}
        method = loop.run[Mixout]
        draw = method.columns

        def spy(run: Run, weight: Weight) -> Tensor:
            found[f"{run.index} {weight.name}"] = draw(run, weight)
            return found[f"{run.index} {weight.name}"]

        method.columns = spy
        torch.manual_seed(noise)
        loop.train(batches(3))
        return found

    alone = columns([Mixout(keep=0.7)], 1)
    assert_same(alone, columns([Mixout(keep=0.7)], 2))
    assert_same(alone, columns([DPSMix(**DPS), RDrop(), Mixout(keep=0.7), EMA()], 1))
    name = "bert.pooler.dense.weight"
    draws = [tuple(alone[f"{i} {name}"].flatten().tolist()) for i in range(3)]
    assert len(set(draws)) == 3  # another draw at each step
    assert len({tuple(d.flatten().tolist()) for k, d in alone.items() if k.startswith("0 ") and d.numel() == 16}) > 2


def test_two_methods_of_one_class_draw_apart():
    loop = Loop([only(Mixout(keep=0.5), in_first_block), only(Mixout(keep=0.5), in_first_block)])
    first, second = loop.run.methods
    weight = next(w for w in loop.run.weights(scope="linear") if w.block == 0)
    assert not torch.equal(first.columns(loop.run, weight), second.columns(loop.run, weight))


# ---------------------------------------------------------------- composition


ONE_EACH = ["dps_dense_frozen", *{type(RECIPES[name][0]): name for name in reversed(SINGLE)}.values()]


STRUCTURE = [name for name in ONE_EACH if RECIPES[name][0].structure]


def partners(first: str) -> list[str]:
    """Each pair once, every method about as often first as second; in both orders where only one is allowed."""
    i = ONE_EACH.index(first)

    def meets(j: int, second: str) -> bool:
        one_order = (first in STRUCTURE) != (second in STRUCTURE)
        return i == j or one_order or (i < j) == ((i + j) % 2 == 0)

    return [second for j, second in enumerate(ONE_EACH) if meets(j, second)]


def test_every_pair_is_somewhere():
    pairs = {frozenset((first, second)) for first in ONE_EACH for second in partners(first)}
    assert pairs == {frozenset(pair) for pair in itertools.product(ONE_EACH, repeat=2)}


@pytest.mark.parametrize("first", ONE_EACH)
def test_every_method_composes_with_every_other(first):
    data, before = batches(3), copied(bert())
    for second in partners(first):
        recipe = RECIPES[first] + RECIPES[second]
        if second in STRUCTURE and first not in STRUCTURE:
            names = [type(m).__name__ for m in reversed(recipe)]
            with pytest.raises(ValueError, match=f"put {names[0]} before {names[1]} in the list"):
                Loop(recipe)
            continue
        if first in ROWS[second].refused:
            with pytest.raises(ValueError, match=ROWS[second].refused[first]):
                Loop(recipe)
            continue
        owned = [m.exclusive for m in recipe if m.exclusive]
        if len(owned) != len(set(owned)):
            names = " and ".join(type(m).__name__ for m in recipe)
            with pytest.raises(ValueError, match=f"{names} are both an? {owned[0]} of '"):
                Loop(recipe)
            continue
        loop = Loop(recipe).train(data)
        assert loop.run.index == 3
        assert all(p.isfinite().all() for p in loop.model.parameters())
        assert differs(copied(loop.model), before)


def test_two_averages_may_share_a_model_but_not_a_weight():
    def rest(w: Weight) -> bool:
        return not in_first_block(w)

    loop = Loop([only(EMA(0.5), in_first_block), only(EMA(0.9), rest)]).train(batches(3))
    whole = Loop([EMA(0.5)]).train(batches(3))
    for w in loop.run.weights():
        assert torch.equal(loop.run.raw(w.name), whole.run.raw(w.name))
        assert torch.equal(w.data, whole.model.get_parameter(w.name)) == in_first_block(w)


KEEP, STAGE, RATE, PULL, DECAY = 0.6, 2, 0.3, 0.1, 0.7
ORDER = {
    "mixout": Mixout(keep=KEEP),
    "dps": DPSMix(keep=KEEP, update_ratio=0.25, frequency_penalty="on"),
    "ema": EMA(decay=DECAY),
    "l2sp": L2SP(alpha=PULL),
}
MATRICES = ("first.weight", "last.weight")


@functools.cache
def recorded_draws() -> dict[tuple[str, int, str], Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = {n: (1, p.size(1)) for n, p in Net().named_parameters() if p.dim() == 2}
    return {
        (method, index, name): torch.bernoulli(torch.full(shape, KEEP, dtype=torch.float64), generator=generator)
        for index in range(8)
        for method in ("mixout", "dps")
        for name, shape in shapes.items()
    }


def reference_run(mixes: list[str], data: list[dict[str, Tensor]]) -> list[dict[str, dict[str, Tensor]]]:
    """The recipe on explicit raw weights, by autograd through the mixes in list order: R and E after each step."""
    net, draws = Net(), recorded_draws()
    start = copied(net)
    raw, average = copied(net), None
    squares = {n: torch.zeros_like(start[n]) for n in MATRICES}
    times = {n: torch.zeros(1, start[n].size(1)).double() for n in MATRICES}
    masks, anchors, steps = {}, {}, []
    for index, batch in enumerate(data):
        selecting = index // STAGE % 2 == 1
        leaves = {n: r.clone().requires_grad_() for n, r in raw.items()}
        view, shown, chosen = dict(leaves), {}, {}
        for mix in mixes:
            for n in MATRICES:
                anchor, b = start[n], draws[mix, index, n]
                if mix == "dps" and selecting:
                    anchor, b = anchors[n], masks[n]
                view[n] = anchor + b * (view[n] - anchor) / KEEP
                if mix == "dps":
                    shown[n], chosen[n] = view[n], b
                    view[n].retain_grad()
        torch.func.functional_call(net, view, kwargs=batch)["loss"].backward()
        for n in raw:
            raw[n] = raw[n] - RATE * PULL * (raw[n] - start[n]) - RATE * leaves[n].grad
        if not selecting:
            for n in MATRICES:
                squares[n] += (chosen[n] * shown[n].grad) ** 2
                times[n] += chosen[n]
        if index % (2 * STAGE) == STAGE - 1:
            for n in MATRICES:
                seen = times[n].clamp(min=1)
                score = squares[n] / seen * torch.exp(-seen / STAGE)
                least = score.flatten().sort(descending=True).values[math.ceil(score.numel() * KEEP) - 1]
                masks[n], anchors[n] = (score >= least).double(), raw[n].clone()
                squares[n], times[n] = torch.zeros_like(squares[n]), torch.zeros_like(times[n])
        if average is None:
            average = {n: r.clone() for n, r in raw.items()}
        else:
            average = {n: DECAY * average[n] + (1 - DECAY) * raw[n] for n in raw}
        steps.append({"raw": raw.copy(), "evaluated": average.copy()})
    return steps


@pytest.mark.parametrize("order", list(itertools.permutations(ORDER)), ids="-".join)
def test_all_orders_of_two_mixes_an_average_and_an_anchor_are_exact(order):
    """The raw weights, the chain rule in reverse order and the average belong to the core: no order goes wrong."""
    data = points(7)  # stages of two steps: I, II, I, and into the next II
    expected = reference_run([m for m in order if m in ("mixout", "dps")], data)
    loop = Loop([ORDER[m] for m in order], Net(), optimizer=lambda p: torch.optim.SGD(p, lr=RATE), total=8)
    draws = recorded_draws()
    loop.run[Mixout].columns = lambda run, w: draws["mixout", run.index, w.name]
    loop.run[DPSMix].columns = lambda run, w: draws["dps", run.index, w.name]
    for batch, step in zip(data, expected, strict=True):
        loop.train([batch])
        assert_same(copied(loop.model), step["evaluated"], atol=1e-12)
        assert_same({n: loop.run.raw(n) for n in step["raw"]}, step["raw"], atol=1e-12)


def test_the_order_of_two_mixes_matters():
    """Later mixes act on what earlier ones show; else the test of all orders could not tell list order."""
    one, other = (reference_run(list(mixes), points(7))[-1] for mixes in (("mixout", "dps"), ("dps", "mixout")))
    assert (one["raw"]["first.weight"] - other["raw"]["first.weight"]).abs().max() > 1e-3


# ---------------------------------------------------------------- state


@pytest.mark.parametrize("case", make_state.SAVED)
def test_a_state_of_format_1_loads_and_goes_on_as_recorded(case):
    held = state.load(make_state.FILE)
    assert held["cases"][case]["run"]["format"] == 1
    data = [{k: v[i] for k, v in held["data"].items()} for i in range(make_state.TOTAL)]
    model, run, optimizer = make_state.start()
    assert_same(copied(model), held["base"])
    model.load_state_dict(held["cases"][case]["weights"])
    run.load_state_dict(held["cases"][case]["run"])
    assert run.index == make_state.SAVED[case]
    make_state.go_on(model, run, optimizer, data)
    assert_same(copied(model), held["end"]["evaluated"], atol=1e-12)
    assert_same({n: run.raw(n) for n in copied(model)}, held["end"]["raw"], atol=1e-12)
    assert differs(held["end"]["evaluated"], held["cases"][case]["weights"])
    assert differs(held["end"]["evaluated"], held["end"]["raw"])


@every_recipe
def test_every_state_has_a_format_and_survives_safetensors(name, tmp_path):
    for index in (0, 1, 3):
        tree = uninterrupted(name).all[index]["run"]
        assert (tree["format"], tree["index"], tree["total_steps"]) == (1, index, TOTAL)
        state.save(tree, tmp_path / "state.safetensors")
        held = state.load(tmp_path / "state.safetensors")
        loop = Loop(RECIPES[name])
        loop.run.load_state_dict(held)
        assert_same({"": torch.tensor(0), **loop.run.state_dict()}, {"": torch.tensor(0), **tree})
        assert loop.run.index == index


def test_a_loaded_state_shares_no_memory_with_what_was_loaded():
    loop = Loop(RECIPES["recipe_of_five"]).train(batches(2))
    held = loop.run.state_dict()
    before = copy.deepcopy(held)
    other = Loop(RECIPES["recipe_of_five"])
    other.model.load_state_dict(loop.model.state_dict())
    other.run.load_state_dict(held)
    other.train(batches(4)[2:])
    assert_same(held, before)


BASE = [DPSMix(**DPS), EMA(decay=0.8)]
DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "recipe": (
        {"recipe": [*BASE, ClipNorm()]},
        "['DPSMix', 'EMA'], this run has ['DPSMix', 'EMA', 'ClipNorm']",
    ),
    "order": ({"recipe": BASE[::-1]}, "methods ['DPSMix', 'EMA'], this run has ['EMA', 'DPSMix']"),
    "field": (
        {"recipe": [DPSMix(keep=0.5, **DPS), BASE[1]]},
        "DPSMix.keep was 0.7 when the state was saved and is",
    ),
    "only": ({"recipe": [BASE[0], only(EMA(decay=0.8), in_first_block)]}, "EMA.where was None"),
    "total_steps": ({"total": 16}, "total_steps was 8 when the state was saved and is 16 now"),
    "seed": ({"seed": 1}, "seed was 0 when the state was saved, it is 1 here"),
    "base model": ({"model": 1}, "the reference of 'bert.encoder.layer.0"),
}


@functools.cache
def base_run() -> dict[str, Any]:
    return read(written(Loop(BASE).train(batches(3)).saved()))


@pytest.mark.parametrize("what", DIFFERENT)
def test_a_state_of_another_run_is_refused_by_name(what):
    changes, message = DIFFERENT[what]
    saved = base_run()
    options = {"recipe": BASE, "model": 0, **changes}
    other = Loop(options.pop("recipe"), bert(seed=options.pop("model")), **options)
    with pytest.raises(ValueError, match=re.escape(message)):
        other.run.load_state_dict(saved["optimizer"]["steadytune"])
    with pytest.raises(ValueError, match=re.escape(message)):
        other.load(saved)


def test_another_head_is_no_other_base_model():
    """A new head has other initial values in each process that builds it: they are saved, not compared."""
    model = bert()
    nn.init.normal_(model.classifier.weight)
    loop = Loop(BASE, model).load(base_run())
    name = "classifier.weight"
    assert torch.equal(loop.run.reference(name), copied(bert())[name])


def test_a_newer_format_is_refused():
    loop = Loop(BASE)
    with pytest.raises(ValueError, match="format 2, this version of steadytune reads up to 1"):
        loop.run.load_state_dict({**loop.run.state_dict(), "format": 2})


def test_an_optimizer_loaded_without_our_state_stops_at_the_next_step():
    held = dict(base_run()["optimizer"])
    own = held.pop("steadytune")
    loop = Loop(BASE)
    loop.optimizer.load_state_dict(held)
    with pytest.raises(RuntimeError, match=r"run\.load_state_dict\(\), or call run\.restart\(\)"):
        loop.run.loss(batches(1)[0])
    loop.run.load_state_dict(own)
    assert loop.run.index == 3
    loop.train(batches(1))
    again = Loop(BASE)
    again.optimizer.load_state_dict(held)
    again.run.restart()
    assert again.run.index == 0
    again.train(batches(1))
    assert again.run.index == 1


def test_state_is_not_given_out_in_the_middle_of_a_step():
    loop = Loop(BASE)
    loop.run.loss(batches(1)[0])
    with pytest.raises(RuntimeError, match="in the middle of a step"):
        loop.optimizer.state_dict()


def test_attaching_to_an_optimizer_that_has_trained_is_refused():
    """Loading the optimizer first and attaching then would start the methods anew, in silence."""
    model = bert()
    optimizer = adamw(model.parameters())
    optimizer.load_state_dict(base_run()["optimizer"])
    with pytest.raises(RuntimeError, match=r"Call run\.attach\(optimizer\) first, then optimizer\.load_state_dict"):
        Run(model, BASE, total_steps=TOTAL).attach(optimizer)


def test_what_a_method_has_refused_is_not_attached():
    """Naive: the second try says that the Run is attached already, although no step of it would be right."""

    @dataclasses.dataclass
    class Refusing(Method):
        def attach(self, run):
            raise ValueError("not this optimizer")

    model = bert()
    run = Run(model, [Refusing()], total_steps=TOTAL)
    for _ in range(2):
        with pytest.raises(ValueError, match="not this optimizer"):
            run.attach(adamw(model.parameters()))
    assert run.optimizer is None


def test_an_optimizer_that_makes_its_state_at_once_has_not_trained():
    """Adagrad; after a step it is refused like any other."""
    loop = Loop([DPSDense(**DPS), EMA()], optimizer=torch.optim.Adagrad)
    before = copied(loop.model)
    loop.train(batches(3))
    assert differs(before, copied(loop.model))
    with pytest.raises(RuntimeError, match="after the optimizer's first step"):
        Run(loop.model, BASE, total_steps=TOTAL).attach(loop.optimizer)


@every_recipe
def test_restart_is_another_run_bitwise(name):
    """A second training with one Run equals a fresh Run on the same weights."""
    data = batches(4)
    loop = Loop(RECIPES[name]).train(data[:3])
    loop.run.loss(data[3])  # in the middle of a step
    loop.run.restart()
    assert loop.run.index == 0
    loop.optimizer.zero_grad()
    saved = read(written(loop.saved()))
    loop.train(data)
    fresh = Loop(RECIPES[name])
    saved["optimizer"]["steadytune"] = fresh.run.state_dict()
    assert_same(fresh.load(saved).train(data).all(), loop.all())


# ---------------------------------------------------------------- frozen


OPTIMIZERS = {
    "fused": functools.partial(adamw, fused=True, weight_decay=0.1),
    "foreach": functools.partial(adamw, foreach=True, weight_decay=0.1),
    "single": functools.partial(adamw, foreach=False, weight_decay=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
}


def per_weight(loop: Loop, name: str) -> dict[str, Tensor]:
    """R and the optimizer state of a weight."""
    held = loop.optimizer.state[loop.model.get_parameter(name)]
    found = {"weight": loop.run.raw(name), **{k: v for k, v in held.items() if v.dim()}}
    return {k: v.clone() for k, v in found.items()}


FROZEN = [(DPSDense, optimizer, beside) for optimizer in OPTIMIZERS for beside in ("alone", "l2sp", "l2sp_coupled")]
FROZEN += [(DPSDense, "fused", "ema"), (DPSMix, "fused", "alone"), (DPSMix, "momentum", "l2sp")]


@pytest.mark.parametrize(("method", "optimizer", "beside"), FROZEN)
def test_frozen_means_that_the_step_did_not_happen(method, optimizer, beside):
    """T4: a gradient of zero does not stop momentum and decay. Before and after the other method in the list."""
    data = batches(4)
    others = [] if beside == "alone" else RECIPES[beside]
    recipes = [(True, [method(keep=0.6, frozen=True, **DPS), *others])]
    if others:
        recipes += [(True, [*others, method(keep=0.6, frozen=True, **DPS)])]
    else:
        recipes += [(False, [method(keep=0.6, **DPS)])]
    for frozen, recipe in recipes:
        loop = Loop(recipe, optimizer=OPTIMIZERS[optimizer]).train(data[:2])
        masks = loop.run[DPSDense].masks
        assert len(masks) == 14  # six matrices of each block, pooler and classifier
        names = [n for n in masks if not masks[n].all()]  # columns that DPSMix never drew tie at zero
        assert len(names) > 10
        out = {n: ~masks[n].clone() for n in names}
        before = {n: per_weight(loop, n) for n in names}
        for batch in data[2:]:  # the whole of stage II
            loop.train([batch])
            for n in names:
                after = per_weight(loop, n)
                assert set(after) == set(before[n])
                for key, value in after.items():
                    same = torch.equal(value[out[n]], before[n][key][out[n]])
                    assert same == frozen, (n, key)
                    assert not torch.equal(value[~out[n]], before[n][key][~out[n]])


def test_frozen_refuses_factored_optimizer_state():
    loop = Loop([DPSDense(frozen=True, **DPS), EMA()], optimizer=torch.optim.Adafactor).train(batches(2))
    evaluated = copied(loop.model)
    with pytest.raises(ValueError, match=r"Adafactor keeps 'row_var' of shape .* use AdamW or SGD, or frozen=False"):
        loop.train(batches(1))
    loop.run.leave()
    assert_same(copied(loop.model), evaluated)
    Loop([DPSDense(**DPS)], optimizer=torch.optim.Adafactor).train(batches(3))


# ---------------------------------------------------------------- steps that do not come, or come wrongly


@pytest.mark.parametrize("name", SHOWING)
def test_a_step_may_be_entered_twice(name):
    """T22: the same index is entered again after an overflow or `leave`, also at the boundaries of stages."""
    loop = Loop(RECIPES[name])
    for batch in batches(5):
        evaluated = copied(loop.model)
        loop.run.enter()
        forward = copied(loop.model)
        loop.run.leave()
        assert_same(copied(loop.model), evaluated)
        loop.run.enter()
        assert_same(copied(loop.model), forward)
        loop.train([batch])
    assert_same(loop.all(), uninterrupted(name).all[5])


def hooks(model: nn.Module) -> list[str]:
    """Modules of the package whose hooks are on the forward of a model; transformers has hooks of its own."""
    held = [h for part in model.modules() for h in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())]
    places = [getattr(hook, "func", hook).__module__ for hook in held]
    return [place for place in places if place.startswith("steadytune.")]


@every_recipe
def test_a_training_that_was_cut_off_leaves_no_hook_and_goes_on_as_if_it_had_not_been(name):
    """Naive: only `finish` took the hooks off, and what a user trained next had noise or skipped blocks."""
    data, whole = batches(4), uninterrupted(name)
    loop = Loop(RECIPES[name]).load(read(whole.saved[0]))
    before = hooks(loop.model)
    loop.train(data[:3])
    loop.run.release()
    assert hooks(loop.model) == before
    assert_same(loop.train(data[3:]).all(), whole.all[4])


@pytest.mark.parametrize("name", ["vibert", "layer_drop", "easy_adapt"])
def test_hooks_of_an_older_run_do_not_act_on_a_new_one(name):
    older = Loop(RECIPES[name]).train(batches(2))
    assert f"steadytune.methods.{name}" in hooks(older.model)
    Run(older.model, [])
    assert not hooks(older.model)


@pytest.mark.parametrize("name", ["vibert", "layer_drop"])
def test_a_trainer_that_was_interrupted_leaves_a_plain_model(name, tmp_path):
    trainer = trainer_of(RECIPES[name], tmp_path, max_steps=3)
    before = hooks(trainer.model)
    stop = interrupt(trainer.model, after=2)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    stop()
    assert hooks(trainer.model) == before


class Refusing(Method):
    """A method that no model suits."""

    def setup(self, run: Run) -> None:
        raise ValueError("no model suits")


@every_recipe
def test_a_run_that_is_refused_leaves_nothing_frozen_and_nothing_added(name):
    """Naive: what a method froze before another was refused stayed frozen, also for the run that came next."""
    model = bert()
    before = {n: p.requires_grad for n, p in model.named_parameters()}, [n for n, _ in model.named_children()]
    with pytest.raises(ValueError, match="no model suits"):
        Run(model, [*RECIPES[name], Refusing()], total_steps=TOTAL, data=functools.partial(batches, 2, seed=9))
    held = {n: p.requires_grad for n, p in model.named_parameters() if n in before[0]}
    assert (held, [n for n, _ in model.named_children()]) == before


@pytest.mark.parametrize("where", ["forward", "backward", "before step"])
@pytest.mark.parametrize("name", recipes(acts_on_weights, "rdrop", "smart_proximal"))
def test_interrupted_in_the_middle_of_a_step_leave_restores_the_evaluated_weights(name, where):
    data, whole = batches(4), uninterrupted(name)
    loop = Loop(RECIPES[name]).load(read(whole.saved[3]))
    if where == "forward":
        stop = interrupt(loop.model, after=1)
        with pytest.raises(KeyboardInterrupt):
            loop.run.loss(data[3])
        stop()
    else:
        loss = loop.run.loss(data[3])
        if where == "backward":
            handle = loop.model.bert.pooler.register_full_backward_hook(_raise)
            with pytest.raises(KeyboardInterrupt):  # some penalties have a backward of their own inside the loss
                loop.run.loss(data[3]).backward()
            handle.remove()
        else:
            loss.backward()
    loop.run.leave()
    assert_same(loop.all(), whole.all[3])
    assert loop.run.index == 3
    assert not loop.run.batch
    loop.optimizer.zero_grad()
    torch.set_rng_state(read(whole.saved[3])["rng"])
    assert_same(loop.train(data[3:]).all(), whole.all[4])


def _raise(*args: Any) -> None:
    raise KeyboardInterrupt


def test_an_interruption_shows_the_forward_view_until_leave():
    """Without `leave` the test above would compare nothing."""
    for name in ("mixout", "dps_mix", "ema"):
        loop = Loop(RECIPES[name]).load(read(uninterrupted(name).saved[3]))
        evaluated = copied(loop.model)
        loop.run.loss(batches(1)[0])
        assert differs(copied(loop.model), evaluated)


@pytest.mark.parametrize("name", ["mixout", "dps_mix", "ema"])
def test_weights_changed_between_forward_and_backward_are_an_error(name):
    """T24: autograd sees writes through `detach()`; through `.data` the gradient would be silently wrong."""
    loop = Loop(RECIPES[name]).load(read(uninterrupted(name).saved[2]))
    loss = loop.run.loss(batches(1)[0])
    loop.run.leave()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def places(model: nn.Module) -> dict[str, int]:
    return {n: p.data_ptr() for n, p in model.named_parameters()}


@pytest.mark.parametrize("name", SHOWING)
def test_between_steps_every_weight_is_where_it_always_was(name):
    """During a step another tensor may lie in its place; what a user took outside a step goes on showing the model."""
    loop = Loop(RECIPES[name])
    before, held = places(loop.model), loop.model.state_dict()
    for batch in batches(TOTAL):
        loop.train([batch])
        assert places(loop.model) == before
    assert_same(held, loop.model.state_dict())
    loop.run.loss(batches(1)[0])
    loop.run.leave()
    assert places(loop.model) == before


def test_a_value_given_away_takes_the_weights_place_unless_it_shares_its_memory():
    """And a second one is written into the first, so that the raw weight is not lost."""
    model = Net()
    run = Run(model, [], total_steps=4)
    weight = run.weights()[0]
    raw, place = weight.data.clone(), weight.data.data_ptr()
    alone, shared = raw + 1, torch.stack([raw + 2, raw])[0]
    with run.showing([(weight, alone)]):
        assert weight.parameter.data_ptr() == alone.data_ptr()
    with run.showing([(weight, shared)]):
        assert weight.parameter.data_ptr() != shared.data_ptr()
        assert torch.equal(weight.parameter, shared)
    with run.showing([(weight, alone), (weight, shared)]):
        assert torch.equal(weight.parameter, raw + 2)
    assert torch.equal(weight.parameter, raw)
    assert weight.parameter.data_ptr() == place


def in_shared_memory(model: nn.Module) -> nn.Module:
    return model.share_memory()


def in_one_buffer(model: nn.Module) -> nn.Module:
    """Weights as pieces of one tensor, as some optimizers and wrappers keep them."""
    buffer = torch.cat([p.detach().flatten() for p in model.parameters()])
    for p, piece in zip(model.parameters(), buffer.split([p.numel() for p in model.parameters()]), strict=True):
        p.data = piece.view_as(p)
    return model


@pytest.mark.parametrize("arrange", [in_shared_memory, in_one_buffer])
@pytest.mark.parametrize("name", SHOWING)
def test_weights_in_memory_that_others_see_never_leave_it(name, arrange):
    loop = Loop(RECIPES[name], arrange(bert()))
    before = places(loop.model)
    for batch in batches(TOTAL):
        loss = loop.run.loss(batch)
        assert places(loop.model) == before
        loss.backward()
        loop.step()
        assert places(loop.model) == before
    assert_same(loop.all(), uninterrupted(name).all[TOTAL])


@pytest.mark.parametrize("name", ["mixout", "ema"])
def test_two_parameters_of_one_memory_show_the_same_throughout_a_step(name):
    model = bert()
    layers = model.bert.encoder.layer
    one, other = layers[0].output.dense.weight, layers[1].output.dense.weight
    other.data = one.data
    loop = Loop(RECIPES[name], model).train(batches(2))
    loop.run.loss(batches(1)[0])
    assert torch.equal(one, other)


def test_a_closure_is_refused():
    """T8: the pre-hook fires before the closure computes the gradients that methods would edit."""
    loop = Loop(BASE)
    evaluated = copied(loop.model)

    def closure() -> Tensor:
        loss = loop.run.loss(batches(1)[0])
        loss.backward()
        return loss

    for call in (lambda: loop.optimizer.step(closure), lambda: loop.optimizer.step(closure=closure)):
        with pytest.raises(RuntimeError, match=r"step\(closure\)"):
            call()
    assert_same(copied(loop.model), evaluated)
    assert loop.run.index == 0


def test_a_step_without_a_forward_through_steadytune_is_an_error():
    loop = Loop(BASE)
    loop.model(**batches(1)[0]).loss.backward()
    before = copied(loop.model)
    with pytest.raises(RuntimeError, match=r"run\.loss\(batch\), or run\.enter\(\)"):
        loop.optimizer.step()
    assert_same(copied(loop.model), before)
    assert loop.run.index == 0


def test_a_loop_that_calls_the_model_itself_enters_first():
    data, loop = batches(3), Loop(BASE)
    for batch in data:
        loop.run.enter()
        loop.model(**batch).loss.backward()
        loop.step()
    assert_same(loop.all(), Loop(BASE).train(data).all())


@pytest.mark.parametrize(
    "method", [RDrop(), SMART(), SAM(), NEFTune(), L2SP(alpha=0.5)], ids=lambda m: type(m).__name__
)
def test_a_loss_that_a_method_never_saw_is_an_error_where_it_would_have_changed_it(method):
    """Naive: the penalty is left out of every step, and training goes on."""
    loop = Loop([method])
    loop.run.enter()
    loop.model(**batches(1)[0]).loss.backward()
    if isinstance(method, L2SP):
        loop.step()
        return
    with pytest.raises(
        RuntimeError, match=rf"{type(method).__name__} changed nothing in this step.*run\.loss\(batch\)"
    ):
        loop.step()


def test_not_attached_or_no_number_of_steps_is_an_error():
    model = bert()
    run = Run(model, BASE)
    with pytest.raises(RuntimeError, match=r"run\.attach\(optimizer\)"):
        run.loss(batches(1)[0])
    run.attach(adamw(model.parameters()))
    before = copied(model)
    with pytest.raises(ValueError, match="DPSMix needs the number of optimizer steps"):
        run.loss(batches(1)[0])
    assert_same(copied(model), before)
    run.total_steps = 12
    run.loss(batches(1)[0])
    run.leave()
    run.finish()
    with pytest.raises(RuntimeError, match=r"run\.attach\(optimizer\)"):
        run.loss(batches(1)[0])


@pytest.mark.parametrize("name", ["recipe_of_five", "recipe_of_masks"])
def test_the_fake_step_of_distributed_state_dicts_is_ignored(name):
    """T17: torch initialises the state of a fresh optimizer by a step with lr 0, which fires our hooks."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    data, whole = batches(5), uninterrupted(name)
    loop = Loop(RECIPES[name]).load(read(whole.saved[3]))
    saved = {
        "model": copy.deepcopy(loop.model.state_dict()),
        "optimizer": copy.deepcopy(get_optimizer_state_dict(loop.model, loop.optimizer)),
        "run": copy.deepcopy(loop.run.state_dict()),
        "rng": torch.get_rng_state(),
    }
    assert "steadytune" not in saved["optimizer"]  # T7
    resumed = Loop(RECIPES[name])
    before, held = copied(resumed.model), resumed.run.state_dict()
    get_optimizer_state_dict(resumed.model, resumed.optimizer)
    assert len(resumed.optimizer.state) == len(list(resumed.model.parameters()))  # the fake step took place
    assert_same(copied(resumed.model), before)
    assert (resumed.run.index, tensors(resumed.run.state_dict()).keys()) == (0, tensors(held).keys())
    resumed.model.load_state_dict(saved["model"])
    set_optimizer_state_dict(resumed.model, resumed.optimizer, saved["optimizer"])
    with pytest.raises(RuntimeError, match=r"run\.load_state_dict\(\)"):
        resumed.run.loss(data[0])
    resumed.run.load_state_dict(saved["run"])
    torch.set_rng_state(saved["rng"])
    resumed.train(data[3:])
    assert_same(resumed.all(), whole.all[5])


def test_a_learning_rate_of_zero_in_one_group_is_no_fake_step():
    model = bert()
    groups = [{"params": model.bert.parameters(), "lr": 0.0}, {"params": model.classifier.parameters(), "lr": 1e-3}]
    Run(model, [EMA()]).attach(torch.optim.AdamW(groups))
    optimizer = torch.optim.AdamW(groups)
    Run(model, [EMA()]).attach(optimizer)
    model(**batches(1)[0]).loss.backward()
    with pytest.raises(RuntimeError, match="without a forward through steadytune"):
        optimizer.step()


def test_a_warm_up_from_zero_counts():
    """The first step of a warm-up has lr 0 everywhere: entered, so it is a step."""
    loop = Loop([DPSDense(**DPS)])
    for group in loop.optimizer.param_groups:
        group["lr"] = 0.0
    loop.train(batches(1))
    assert loop.run.index == 1
    assert loop.run[DPSDense].squares


def test_a_step_without_gradients_for_a_method_is_a_step():
    """A batch may use a part of the model only (several tasks, skipped layers)."""

    class Skipping(Net):
        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            if self.skip:
                x = torch.cat([torch.tanh(x[:, :5])], 1)
                return {"loss": nn.functional.cross_entropy(self.last(x), labels)}
            return super().forward(x, labels)

    def first(w: Weight) -> bool:
        return w.name.startswith("first")

    data = points(TOTAL)
    everywhere = DPSDense(threshold="global", **DPS)
    for method in (everywhere, DPSDense(frozen=True, **DPS), DPSMix(**DPS), Mixout(keep=0.5), L2SP(), ClipNorm()):
        for skipped in ({1, 3, 4, 7}, {0, 1}):  # a step of each stage, a whole stage I
            model = Skipping()
            loop = Loop([only(method, first), EMA()], model)
            for i, batch in enumerate(data):
                model.skip = i in skipped
                before = loop.run.raw("first.weight").clone()
                loop.train([batch])
                assert torch.equal(loop.run.raw("first.weight"), before) == model.skip
            assert loop.run.index == TOTAL


@pytest.mark.parametrize("decoupled", [True, False])
def test_restricted_l2sp_leaves_the_decay_of_other_weights_as_it_was(decoupled):
    """It takes the optimizer's decay over: also for the weights that `only` keeps it away from."""
    method = only(L2SP(alpha=0.5, decoupled=decoupled), in_first_block)
    loop = Loop([method], optimizer=lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.2))
    weights = loop.run.weights()
    for p in loop.model.parameters():
        p.grad = torch.zeros_like(p)
    loop.run.enter()
    before = copied(loop.model)
    loop.optimizer.step()
    assert any(in_first_block(w) for w in weights)
    for w in weights:
        expected = before[w.name] if in_first_block(w) else before[w.name] * (1 - 0.1 * 0.2)
        assert torch.allclose(w.data, expected, rtol=0, atol=1e-7), w.name


# ---------------------------------------------------------------- pulls and decay where a mask holds weights still

HOLDING = {
    "frozen": ROSESecond(keep=0.5, score="authors"),
    "authors": ROSESecond(keep=0.5, score="authors", update="authors"),
    "element": ROSESecond(keep=0.5, granularity="element"),
    "first": ROSEFirst(keep=0.5),
}
PULLS = {
    "l2sp": L2SP(alpha=5.0),
    "l2sp_coupled": L2SP(alpha=5.0, decoupled=False),
    "recadam": RecAdam(gamma=3.0, t0=0.9, k=2.0),
    "implicit_tune": ImplicitTune(outer=outer_batches, start=5.0),
}


@pytest.mark.parametrize("first", [False, True], ids=["after", "before"])
@pytest.mark.parametrize("pull", PULLS)
@pytest.mark.parametrize("mask", HOLDING)
def test_an_anchor_pulls_nothing_that_a_mask_holds_still_in_any_order(mask, pull, first):
    """Naive: the copy of frozen weights is of pulled ones; or a pull after the step comes after the mask has acted."""
    methods = [PULLS[pull], HOLDING[mask]] if first else [HOLDING[mask], PULLS[pull]]
    loop = Loop(methods, optimizer=functools.partial(adamw, weight_decay=0.5))
    rose = next(m for m in loop.run.methods if isinstance(m, ROSESecond | ROSEFirst))
    chosen, masked = {}, rose.mask

    def watched(run: Run, weights: Any) -> dict[str, Tensor]:
        chosen.clear()
        chosen.update(masked(run, weights))
        return chosen

    rose.mask = watched
    loop.train(batches(2))
    before = copied(loop.model)
    loop.train(batches(1, seed=3))
    held = {n: ~m.bool().expand_as(before[n]) for n, m in chosen.items()}
    after = copied(loop.model)
    assert any(bool(m.any()) for m in held.values())
    for n, m in held.items():
        assert torch.equal(after[n][m], before[n][m]), n
        assert (after[n] != before[n])[~m].float().mean() > 0.9 or bool(m.all())
    assert differs({n: before[n] for n in before if n not in held}, {n: after[n] for n in before if n not in held})


@pytest.mark.parametrize("pull", ["l2sp", "recadam", "implicit_tune"])
def test_a_partial_mask_takes_the_same_part_of_a_pull_in_any_order(pull):
    """Naive: what acts after the step is masked or not, as the list has it."""
    ends = []
    for order in (1, -1):
        methods = [PULLS[pull], ROSEEnsemble(keep=0.5, gamma=0.3, score="authors")][::order]
        loop = Loop(methods, hash_dropout(bert()), optimizer=functools.partial(adamw, weight_decay=0.5))
        loop.train(batches(3))
        ends.append(copied(loop.model))
    assert_same(*ends, atol=1e-6)


DECAYING = {
    "l2sp": L2SP(alpha=0.5),
    "l2sp_coupled": L2SP(alpha=0.5, decoupled=False),
    "recadam": RecAdam(gamma=3.0),
    "rose": ROSESecond(keep=0.5, update="authors", scope="linear"),
    "implicit_tune": ImplicitTune(outer=outer_batches, start=0.5),
}


@pytest.mark.parametrize("name", DECAYING)
def test_a_weight_that_is_unfrozen_on_the_way_decays(name):
    """Naive: the method takes over the decay of a group, and applies it to those of its weights that trained then."""
    model = bert()
    table = model.get_input_embeddings().weight.requires_grad_(False)
    loop = Loop([DECAYING[name]], model, optimizer=functools.partial(adamw, lr=0.1, weight_decay=0.5))
    loop.train(batches(1))
    table.requires_grad_(True)
    before = table.detach().clone()
    loop.run.loss(batches(1)[0]).backward()
    table.grad.zero_()
    loop.optimizer.step()
    if name == "l2sp_coupled":  # Adam steps by the sign of a gradient that is decay alone
        assert torch.equal((before - table).sign(), before.sign())
    else:
        kept = 1 / (1 + 0.1 * 0.5) if name == "implicit_tune" else 1 - 0.1 * 0.5  # a proximal step, or a plain one
        assert torch.allclose(table, before * kept, rtol=0, atol=1e-6)


def test_fields_from_numpy_are_saved_as_plain_numbers(tmp_path):
    """Grids and searches give NumPy numbers, which `weights_only=True` and JSON refuse."""
    for kind in (np.float64, np.float32):
        loop = Loop([DPSDense(keep=kind(0.5), update_ratio=kind(0.25))]).train(batches(3))
        resumed = Loop([DPSDense(keep=0.5, update_ratio=0.25)]).load(read(written(loop.saved())))
        assert resumed.run.index == 3
        state.save(loop.run.state_dict(), tmp_path / "state.safetensors")


def test_predicates_of_any_kind_can_be_saved(tmp_path):
    scope = functools.partial(lambda block, w: w.block == block and w.kind == "linear", 1)
    loop = Loop([DPSDense(scope=scope, **DPS)]).train(batches(3))
    assert Loop([DPSDense(scope=scope, **DPS)]).load(read(written(loop.saved()))).run.index == 3
    state.save(loop.run.state_dict(), tmp_path / "state.safetensors")


def test_ties_are_all_kept():
    """T15: the gradients of a two-label head are opposite, so that the squares of its rows tie in pairs."""

    def difference(model: Any, inputs: Any, copies: int) -> tuple[Tensor, Any]:
        outputs = model(**inputs)
        return (outputs.logits[:, 0] - outputs.logits[:, 1] - 1).square().mean(), outputs  # exactly opposite

    loop = Loop([DPSDense(**DPS)], bert(labels=2))
    for batch in batches(2, labels=2):
        loop.run.loss(batch, compute=difference).backward()
        loop.step()
    mask = loop.run[DPSDense].masks["classifier.weight"]
    assert torch.equal(mask[0], mask[1])
    assert mask.sum() == 24  # 23 asked for: ceil(32 * 0.7)
    other = loop.run[DPSDense].masks["bert.pooler.dense.weight"]
    assert other.sum() == 180  # no ties: ceil(256 * 0.7)


# ---------------------------------------------------------------- mixed precision


@pytest.mark.parametrize("leave", [True, False], ids=["leave", "no leave"])
@pytest.mark.parametrize("unscale", [True, False], ids=["unscale", "no unscale"])
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "foreach"])
def test_overflowed_steps_did_not_happen(fused, unscale, leave):
    """T9. A fused optimizer fires the hooks on them, another does not and keeps the forward view live."""
    recipe = [DPSMix(**DPS), EMA(decay=0.8), ClipNorm(max_norm=0.3)]

    def fresh() -> Loop:
        return Loop(recipe, bert(dropout=0.0), optimizer=functools.partial(adamw, fused=fused, foreach=not fused))

    expected = fresh().train(batches(7))
    loop = fresh()
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=100)
    overflows = {0, 2, 5}  # at the first step, at a boundary of stages (T22), in a stage
    for index, batch in enumerate(batches(7)):
        for bad in [True, False] if index in overflows else [False]:
            evaluated = copied(loop.model)
            loss = loop.run.loss(batch)
            scaler.scale(loss * math.inf if bad else loss).backward()
            if unscale:
                scaler.unscale_(loop.optimizer)
            scaler.step(loop.optimizer)
            scaler.update()
            if leave:
                loop.run.leave()
            loop.optimizer.zero_grad()
            if bad and (leave or fused):
                assert_same(copied(loop.model), evaluated)
        assert loop.run.index == index + 1
    assert scaler.get_scale() == 32.0  # halved by each overflow
    assert_same(loop.all(), expected.all())


@pytest.mark.parametrize("name", ["mixout", "dps_mix", "ema", "sam"])
def test_one_autocast_context_round_all_steps_sees_new_weights(name):
    """T20: autocast keeps casted weights for the length of its context and does not look at changes."""
    data = batches(3)
    one = Loop(RECIPES[name])
    with torch.autocast("cpu", torch.bfloat16):
        for batch in data:
            loss = one.run.loss(batch)
            with torch.autocast("cpu", enabled=False):  # an inner context leaves the cache as it is
                loss.backward()
                one.step()
    many = Loop(RECIPES[name])
    for batch in data:
        with torch.autocast("cpu", torch.bfloat16):
            loss = many.run.loss(batch)
        loss.backward()
        many.step()
    assert_same(one.all(), many.all())


@pytest.mark.filterwarnings("ignore:R.F. noise of scale 1e-05 is below the resolution of torch.bfloat16")
@every_recipe
def test_a_step_under_the_trainers_autocast(name, tmp_path):
    """Naive: features in bfloat16 meet a method's own weights in float32, outside of the autocast context."""

    def trained():
        trainer = trainer_of(RECIPES[name], tmp_path, bf16=True, max_steps=TOTAL, callbacks=[Stop(1)])
        trainer.train()
        return trainer.model

    if any(method.full_precision for method in RECIPES[name]):
        with pytest.raises(ValueError, match="half precision leaves little but the rounding"):
            trained()
    else:
        assert all(torch.isfinite(p).all() for p in trained().parameters())


# ---------------------------------------------------------------- a learning-rate scheduler that was there before

ATTACHING = recipes(lambda m: overrides(m, "attach"))
REGROUPING = ("sift", "sift_many", "llrd", "recipe_of_structure")  # recipes that split groups, or set their rates


def warm_up(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 3))


def scheduled(name: str, *, first: bool) -> dict[str, Any]:
    """The end of a run whose scheduler was built before or after `Run.attach`."""
    loop = Loop.__new__(Loop)
    loop.model = bert()
    loop.run = Run(loop.model, RECIPES[name], total_steps=TOTAL, data=functools.partial(batches, 2, seed=9))
    loop.optimizer = adamw(loop.model.parameters())
    schedule = warm_up(loop.optimizer) if first else None
    groups = copy.copy(loop.optimizer.param_groups)
    held = [{**group, "params": [*group["params"]]} for group in groups]
    try:
        loop.run.attach(loop.optimizer)
    except RuntimeError:
        assert all(a is b for a, b in zip(loop.optimizer.param_groups, groups, strict=True))
        assert loop.optimizer.param_groups == held  # as if nobody had tried
        raise
    schedule = schedule or warm_up(loop.optimizer)
    torch.manual_seed(1)
    for batch in batches(4):
        loop.train([batch])
        schedule.step()
    return loop.all()


@pytest.mark.parametrize("name", ATTACHING)
def test_a_scheduler_comes_after_attach_only_where_a_method_changes_what_it_has_read(name):
    """Naive: whatever is prepared in `attach` counts as a change of groups; or the peak is read in the warm-up."""
    if name in REGROUPING:
        with pytest.raises(RuntimeError, match=r"scheduler was built before attach\(\), and (\w+) then changed which"):
            scheduled(name, first=True)
    else:
        assert_same(scheduled(name, first=True), scheduled(name, first=False))


@pytest.mark.parametrize("method", [RecAdam(gamma=400.0), HypergradientLR(beta=1e-5, rule="additive")])
def test_the_peak_of_a_schedule_is_seen_in_its_warm_up(method):
    """Naive: the rate is 0 when a scheduler with a warm-up has been built, and is taken for the peak."""
    model = bert()
    optimizer = adamw(model.parameters())
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=TOTAL)
    run = Run(model, [method], total_steps=TOTAL)
    if isinstance(method, RecAdam):
        with pytest.raises(ValueError, match=r"needs lr \* gamma below 1, got 0.003 \* 400 = 1.2"):
            run.attach(optimizer)
    else:
        assert run.attach(optimizer)[HypergradientLR].peak == 3e-3


@pytest.mark.parametrize("method", [VIBERT(), CausalHead()], ids=["vibert", "causal_head"])
def test_a_scheduler_that_knows_nothing_of_weights_beside_the_model_is_refused(method):
    model = bert()
    optimizer = adamw(model.parameters())  # before the Run: their weights come as a further group
    warm_up(optimizer)
    with pytest.raises(RuntimeError, match=rf"and {type(method).__name__} then changed which weights"):
        Run(model, [method], total_steps=TOTAL).attach(optimizer)
    assert len(optimizer.param_groups) == 1


def test_a_scheduler_is_no_obstacle_where_there_is_nothing_to_split():
    """SIFT takes the decay of its weights away; an optimizer without decay keeps its groups."""
    model = bert()
    optimizer = adamw(model.parameters(), weight_decay=0.0)
    warm_up(optimizer)
    run = Run(model, RECIPES["sift"], total_steps=TOTAL, data=functools.partial(batches, 2, seed=9))
    assert run.attach(optimizer).optimizer is optimizer


# ---------------------------------------------------------------- a second look at the batch


@pytest.mark.filterwarnings("ignore:R.F. noise of scale 1e-05 is below the resolution of torch.bfloat16")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", recipes(lambda m: overrides(m, "penalty") or overrides(m, "before_batch"), "mixout"))
def test_a_second_look_from_the_same_place_is_the_first_bitwise(name, autocast):
    """Naive: other dropout, other noise of the penalties, one micro-batch's draws for all, float32 after autocast."""
    ends = []
    for recipe in (RECIPES[name], [*RECIPES[name], SAM(rho=1e-30)]):  # a move that rounds to nothing
        loop = Loop(recipe)
        for i in (0, 2, 4):
            for batch in batches(6)[i : i + 2]:
                with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                    loss = loop.run.loss(batch)
                (loss / 2).backward()
            loop.step()
        ends.append({k: loop.all()[k] for k in ("weights", "optimizer")})
    assert_same(*ends)


# ---------------------------------------------------------------- the order of setup


@pytest.mark.parametrize(
    "recipe",
    [
        [HeadInit(), DPSMix(**DPS)],
        [R4F(weight=0.0), DPSMix(**DPS)],
        [HeadInit(), R4F(weight=0.0)],
        [ReInit(), Pooling()],
        [ReInit(), Pooling(), HeadInit(), R4F(weight=0.0), DPSMix(**DPS)],
    ],
    ids=lambda recipe: "-".join(type(method).__name__ for method in recipe),
)
def test_methods_that_write_weights_in_setup_come_before_those_that_keep_them_in_any_order(recipe):
    """Naive: an anchor is the random head that a later method replaces, a bypassed pooler is drawn anew."""
    data, ends = batches(TOTAL), []
    for order in itertools.permutations(recipe):
        if any(later.structure and not earlier.structure for earlier, later in itertools.pairwise(order)):
            continue  # refused
        model = bert(dropout=0.0)
        run = Run(model, list(order), total_steps=TOTAL, data=lambda: data)
        run.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        assert [type(method) for method in run.methods] == [type(method) for method in order]
        ends.append([copied(model), copied(train(run, data).model)])
    for other in ends[1:]:
        assert_same(ends[0], other)


def test_a_method_that_writes_weights_is_not_appended_after_one_that_keeps_them():
    """Naive: the anchor of the head is the random one."""
    run = Run(bert(), [DPSMix(**DPS)], total_steps=TOTAL, data=lambda: batches(2))
    message = r"HeadInit changes .* weights in setup, after DPSMix has looked.*give HeadInit to Run\(model, methods\)"
    with pytest.raises(UsageError, match=message):
        run.append(HeadInit())
    assert [type(method) for method in run.methods] == [DPSMix]
    run.append(ClipNorm(1.0))


# ---------------------------------------------------------------- compile, further gradients, activation checkpointing


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's own compiler
def test_compiled_equals_eager_with_one_graph():
    data = points(7)
    recipe = [Mixout(keep=0.7), DPSMix(**DPS), EMA(decay=0.8), L2SP(alpha=0.5), ClipNorm(max_norm=0.3)]
    eager = Loop(recipe, Net()).train(data)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = Net()
    optimizer = adamw(model.parameters())
    compiled = torch.compile(model, backend="aot_eager")
    run = Run(compiled, recipe, total_steps=TOTAL).attach(optimizer)
    for batch in data:
        run.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    counters = torch._dynamo.utils.counters
    torch._dynamo.reset()
    assert counters["stats"]["unique_graphs"] == 1  # compiled once, never again
    assert not counters["graph_break"]
    assert_same(copied(model), copied(eager.model), atol=1e-14)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of torch's own compiler
@pytest.mark.parametrize(
    "method", [LayerDrop(p=0.5), EasyAdapt(2, domain=by_first_token, drop=0.0), VIBERT(beta=0.1)], ids=type
)
def test_compiled_code_looks_at_the_hooks_of_a_method_that_begins_or_ends(method):
    """Naive: torch takes the graph of an earlier model of the class, which had no hooks."""
    data = batches(2, equal=True)

    def trained(wrap):
        ends, model = [], bert(dropout=0.0)
        wrap(bert(dropout=0.0))(**data[0])  # by torch alone, so that its graphs are made as torch makes them
        for recipe in ([method], []):
            run = Run(wrap(model), recipe, total_steps=TOTAL).attach(torch.optim.SGD(model.parameters(), lr=0.1))
            torch.manual_seed(1)
            train(run, data).finish()
            ends.append(copied(model))
        return ends

    torch._dynamo.reset()
    torch._dynamo.config.skip_nnmodule_hook_guards = True  # torch's default
    compiled = trained(functools.partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    assert_same(compiled, trained(lambda model: model), atol=1e-6)


@every_recipe
def test_one_more_gradient_leaves_no_trace_and_is_right(name):
    others = batches(4, seed=9)

    class Looking(Method):
        """Asks for gradients of other batches inside the optimizer's step, where methods do."""

        def before_step(self, run: Run, weights: list[Weight]) -> None:
            held = {w.name: w.grad.clone() for w in weights}
            trained = {n: p for n, p in run.model.named_parameters() if p.requires_grad}
            places = {n: p.grad.data_ptr() for n, p in trained.items()}
            noise = torch.get_rng_state()
            two, parts = [others[run.index], others[run.index - 1]], {}
            found = run.gradient(two, dropout_seed=7)
            taken = run.gradient(two, dropout_seed=7, take=lambda n, g: parts.update({n: parts.get(n, 0) + g}))
            assert taken == {}
            assert_same(parts, found, atol=1e-6)
            assert torch.equal(torch.get_rng_state(), noise)
            assert {n: p.grad.data_ptr() for n, p in trained.items()} == places
            assert_same({w.name: w.grad for w in weights}, held)
            torch.manual_seed(7)  # what it should be: autograd on a copy
            twin = copy.deepcopy(run.model)
            for p in twin.parameters():
                p.grad = None
            loss = sum(twin(**others[i]).loss for i in (run.index, run.index - 1)) / 2
            gradients = torch.autograd.grad(loss, [twin.get_parameter(n) for n in trained], allow_unused=True)
            torch.set_rng_state(noise)
            assert_same(found, {n: g for n, g in zip(trained, gradients, strict=True) if g is not None}, atol=1e-6)
            assert differs(found, {n: held[n] for n in found})

    loop = Loop([*RECIPES[name], dataclasses.dataclass(Looking)()]).train(batches(4))
    found = loop.all()
    found["run"]["methods"].pop()
    assert_same(found, uninterrupted(name).all[4])


HALVES = {torch.bfloat16: 1.0, torch.float16: 1e-5}  # with a loss so small that its gradient underflows in float16


def faint(size: float) -> Any:
    """A ``compute`` of the model's loss, made small."""

    def compute(model: Any, inputs: Any, copies: int) -> tuple[Tensor, Any]:
        outputs = model(**inputs)
        return outputs.loss * size, outputs

    return compute


@dataclasses.dataclass
class Asking(Method):
    """Asks for the gradient of one batch where methods do: before the first forward, and in the optimizer's step."""

    exact: bool = False

    @property
    def full_precision(self) -> bool:
        return self.exact

    def setup(self, run: Run) -> None:
        self.found: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []

    def ask(self, run: Run, weights: Any) -> None:
        whole, parts = run.gradient(batches(1, seed=9)[0]), {}
        run.gradient(batches(1, seed=9)[0], take=lambda n, g: parts.update({n: g}))
        assert_same(parts, whole)
        self.found.append(whole)
        self.weights.append(copied(run.model))

    before_forward = before_step = after_step = ask


@pytest.mark.parametrize("enters", [False, True])
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", HALVES)
def test_one_more_gradient_has_the_precision_of_the_step(dtype, exact, enters):
    """Naive: it is computed in float32 after the autocast context of the loop, and without the scale of its loss."""
    size, model = HALVES[dtype], bert(dropout=0.0)
    run = Run(model, [Asking(exact)], total_steps=2).attach(torch.optim.SGD(model.parameters(), 0.1))
    for batch in batches(2):
        if enters:
            run.enter()  # the loop's own call, outside of the context
        with torch.autocast("cpu", dtype):
            loss = run.loss(batch, compute=faint(size))
        loss.backward()
        run.optimizer.step()
    asking, twin = run[Asking], bert(dropout=0.0)
    for place, (found, weights) in enumerate(zip(asking.found, asking.weights, strict=True)):
        if enters and place % 3 == 0:
            continue  # nothing has said yet how the loop computes
        twin.load_state_dict(weights, strict=False)
        here = not exact or (place % 3 == 0)  # the first look is inside of the context
        with torch.autocast("cpu", dtype, enabled=here):
            loss = faint(size)(twin, batches(1, seed=9)[0], 1)[0]
        scale = 2.0**10 if dtype is torch.float16 else 1.0
        twin.zero_grad()
        (loss * scale).backward()
        assert_same(found, {n: p.grad / scale for n, p in twin.named_parameters()})
        assert (found["bert.encoder.layer.0.output.dense.weight"] != 0).float().mean() > 0.9


def test_what_is_scaled_by_the_loop_is_not_scaled_twice():
    """Naive: a second look, whose loss has the factor of the scaler already, overflows in float16."""
    looks = []
    for scale in (1.0, 2.0**14):
        model = bert(dropout=0.0)
        run = Run(model, [SAM(rho=0.05)], total_steps=1).attach(torch.optim.SGD(model.parameters(), 0.1))
        with torch.autocast("cpu", torch.float16):
            loss = run.loss(batches(1)[0])
        (loss * scale).backward()
        for p in model.parameters():
            p.grad /= scale
        run.optimizer.step()
        looks.append(copied(model))
    assert_same(*looks, atol=1e-3)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(
    ("name", "reentrant"), [*((name, False) for name in RECIPES), *((name, True) for name in PASSING if name != "tmix")]
)
def test_activation_checkpointing_changes_nothing(name, reentrant):
    """One draw per optimizer step: what is computed again in the backward pass sees the same weights.

    Re-entrant checkpoints under TMix add up gradients in another order: see its own tests.
    """
    if reentrant and any(m.exclusive == "choice of what is trained" for m in RECIPES[name]):
        pytest.skip("torch's re-entrant checkpointing gives no gradients above frozen embeddings")
    model = bert()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 6 renames it; older 5 have this name only
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    calls, forwards = [], []
    model.bert.encoder.layer[0].attention.register_forward_hook(lambda *_: calls.append(1))
    model.bert.pooler.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    assert_same(Loop(RECIPES[name], model).train(batches(4)).all(), uninterrupted(name).all[4])
    again = 8 if name == "freelb" else 0  # in each of four steps two forwards go back twice: to the noise, and whole
    assert len(calls) == len(forwards) + sum(forwards) + again  # each backward runs a block again: checkpointing
