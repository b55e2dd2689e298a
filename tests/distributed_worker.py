"""What test_distributed.py runs: on two gloo processes, and (the same functions) on one for comparison.

``python distributed_worker.py core FOLDER RANK`` or ``torchrun ... distributed_worker.py trainer FOLDER``: every
scenario of a group leaves FOLDER/<scenario>-<rank>.pt, what it returned or its traceback.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import sys
import traceback
import warnings
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    TrainingArguments,
)
from transformers import Trainer as StockTrainer

import steadytune as st
from helpers import LENGTH, VOCABULARY, arguments, collate, hash_dropout, hash_noise, llama, rows

STEPS = 8  # stages of two: squares, masks, squares, masks
ROWS = 8  # of one optimizer step, over all ranks and micro-batches
WATCHED = (0, 2, 5)  # after these steps the state of a run is looked at: squares, masks, masks of the second cycle
STAGES = {"keep": 0.5, "update_ratio": 0.25}


# ---------------------------------------------------------------------- models and data


def bert(*, labels: int = 3, dropout: float = 0.0) -> nn.Module:
    """Widths that two ranks cannot halve; one row of token types, so that a rank's piece of it is empty."""
    torch.manual_seed(11)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=15,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=21,
        max_position_embeddings=LENGTH,
        type_vocab_size=1,
        num_labels=labels,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.3,
    )
    return BertForSequenceClassification(config).double().train()


def gpt2() -> nn.Module:
    """Conv1D: the input axis of a weight is the one that is cut. The output layer is the embedding."""
    torch.manual_seed(12)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_positions=LENGTH,
        n_embd=15,
        n_layer=2,
        n_head=3,
        n_inner=21,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).double().train()


def language(model: nn.Module) -> bool:
    return "LM" in type(model).__name__


def batch(seed: int, model: nn.Module) -> dict[str, torch.Tensor]:
    """One optimizer step's rows, labelled as the model needs."""
    if language(model):  # with equal numbers of tokens: a plain loop means over micro-batches
        found = collate(rows(ROWS, equal=True, seed=seed))
        return {**found, "labels": found["input_ids"]}
    found = collate(rows(ROWS, seed=seed))
    return {**found, "labels": found["labels"].double()} if model.config.num_labels == 1 else found


def parts(whole: dict, rank: int, world: int, micro: int) -> list[dict]:
    """This rank's micro-batches; all ranks together have each row once."""
    size = len(whole["labels"]) // (world * micro)
    starts = [(i * world + rank) * size for i in range(micro)]
    return [{k: v[s : s + size] for k, v in whole.items()} for s in starts]


# ---------------------------------------------------------------------- training loops


def place() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def ddp(model: nn.Module, **options) -> nn.Module:
    return DistributedDataParallel(model, **options) if dist.is_initialized() else model


def shard(model: nn.Module) -> nn.Module:
    """Every block and the rest, over all ranks."""
    if dist.is_initialized():
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        blocks = model.transformer.h if language(model) else model.bert.encoder.layer
        for block in blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    return model


@contextlib.contextmanager
def accumulating(wrapper: nn.Module, last: bool):
    """No communication before the last micro-batch, as each wrapper has it."""
    if isinstance(wrapper, DistributedDataParallel) and not last:
        with wrapper.no_sync():
            yield
        return
    if hasattr(wrapper, "set_requires_gradient_sync"):
        wrapper.set_requires_gradient_sync(last)
    yield


def whole(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: whole(p) for n, p in model.named_parameters()}


def optimizer_of(model: nn.Module, kind: str = "adamw") -> torch.optim.Optimizer:
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.01)
    return torch.optim.AdamW(model.parameters(), 3e-3, eps=1e-4, weight_decay=0.1)


def take_step(run: st.Run, whole_batch: dict, *, micro: int = 2, before=None, sync: bool = False) -> None:
    """One optimizer step of a plain loop; ``before(i)`` is called before micro-batch i and before the step.

    ``sync`` communicates after every micro-batch.
    """
    wrapper = run.wrapper
    for i, part in enumerate(parts(whole_batch, *place(), micro)):
        if before:
            before(i)
        with accumulating(wrapper, sync or i == micro - 1):
            (run.loss(part) / micro).backward()
    if before:
        before(micro)
    run.optimizer.step()
    run.optimizer.zero_grad()


def plain(tree):
    """A copy of a state, tensors as they are on this rank."""
    if isinstance(tree, torch.Tensor):
        return tree.clone()
    if isinstance(tree, dict):
        return {k: plain(v) for k, v in tree.items()}
    if isinstance(tree, list):
        return [plain(v) for v in tree]
    return tree


def train(run: st.Run, *, micro: int = 2, steps: int = STEPS, before=None, sync: bool = False) -> dict:
    """Train; returns final weights (E), the raw ones of this rank (R), and states on the way."""
    model, states = run.model, []
    for t in range(run.index, steps):
        take_step(run, batch(t, model), micro=micro, before=before and (lambda i, t=t: before(t, i)), sync=sync)
        if t in WATCHED:
            states.append(plain(run.state_dict()))
    raw = {n: run.raw(n).clone() for n, _ in model.named_parameters()}
    return {"weights": weights_of(model), "raw": raw, "states": states}


# ---------------------------------------------------------------------- DDP


def by_length(inputs: dict) -> torch.Tensor:
    """A row's domain."""
    return inputs["attention_mask"].sum(1) % 2


DDP_RECIPES = {
    "mix_ema": lambda: [st.DPSMix(**STAGES), st.EMA(0.8)],
    "dense": lambda: [st.DPSDense(**STAGES), st.ClipNorm(0.5)],
    "mixout_l2sp": lambda: [st.Mixout(keep=0.6), st.L2SP(0.3)],
    "rdrop": lambda: [st.RDrop(2.0)],
    "child_f": lambda: [st.ChildTuningF(0.5), st.SWA(0.25, every=2)],
    "child_d": lambda: [st.ChildTuningD(0.3, scope="linear"), st.RecAdam(gamma=30.0)],
    "child_d_example": lambda: [st.ChildTuningD(0.3, scope="linear", per="example", clip=1.0)],
    "rose_first": lambda: [st.ROSEFirst(0.5)],
    "rose_second": lambda: [st.ROSESecond(0.5)],
    "rose_ensemble": lambda: [st.ROSEEnsemble(0.5)],
    "bi_drop": lambda: [st.BiDrop(0.5, scope="linear")],
    "sift": lambda: [st.SIFT(0.1, batches=2, scope="linear")],
    "smart": lambda: [st.SMART(0.05, 0.05, noise=0.01, proximal=st.BregmanProximal(decay=0.5))],
    "r3f": lambda: [st.R3F(scale=0.1)],
    "r4f": lambda: [st.R4F(scale=0.1, detach_embedding=True)],
    "lnsr": lambda: [st.LNSR(scale=0.2)],
    "adversarial": lambda: [st.FGM(0.5), st.PGD(0.5, steps=2), st.FreeLB(0.5)],
    "sam": lambda: [st.SAM(0.3), st.R3F(scale=0.1), st.ClipNorm(0.5)],
    "awp": lambda: [st.AWP(0.1), st.LAWA(last=2, every=2)],
    "neftune": lambda: [st.NEFTune(), st.RDrop()],
    "layer_drop": lambda: [st.LayerDrop(0.5)],
    "mixup": lambda: [st.WeightMixup(outer=outer_parts, lr=0.05)],
    "mixup_difference": lambda: [st.WeightMixup(outer=outer_parts, lr=0.05, order="difference")],
    "meta_weight_net": lambda: [st.MetaWeightNet(outer=outer_parts, lr=0.05)],
    "meta_semi": lambda: [st.MetaSemi(unlabelled=outer_parts, decay=0.5, reach=0.1)],
    "group_weights": lambda: [st.GroupWeights(column=by_length, rho=0.3, every=2, start=0.0, least=1)],
    "group_weights_floor": lambda: [
        st.GroupWeights("floor", by_length, share=0.99, every=2, start=0.0, least=1, smoothing=1.0)
    ],
    "implicit_tune": lambda: [st.ImplicitTune(outer=outer_parts, per="block", start=0.5, terms=2)],
    "penalties": lambda: [st.RDrop(), st.R3F(scale=0.1), st.LNSR(scale=0.2)],
    "beside": lambda: [st.VIBERT(beta=0.1), st.EasyAdapt(2, domain=by_length, drop=0.0), st.Extrapolation(0.5)],
    "partners": lambda: [st.TMix(), st.SupCon(weight=0.5)],
    "causal": lambda: [st.CausalHead(mu=0.5)],
    "structure": lambda: [st.ReInit(), st.TopLayers(1), st.LLRD(0.5), st.EMA(0.8)],
    "mask_training": lambda: [st.MaskTraining(0.6, every=2)],
    "adapters": lambda: [st.Adapters(size=4)],
    "levi": lambda: [st.LEVI(dropout=0.0)],
    "bitfit": lambda: [st.BitFit()],
}
PARTNERS = ("partners", "causal")  # whose rows meet each other, so that two processes are another training than one
TWO_DRAWS = ("rdrop", "neftune", "rose_first", "rose_ensemble", "bi_drop", "penalties")


def outer_parts() -> list[dict]:
    """This rank's share of three outer batches."""
    return [parts(collate(rows(ROWS, seed=300 + i)), *place(), 1)[0] for i in range(3)]


def first_look(model: nn.Module) -> list[list[dict]]:
    """What methods see first: this rank's micro-batches of two steps."""
    return [parts(batch(200 + i, model), *place(), 2) for i in range(2)]


def ddp_recipe(name: str, kind: str = "adamw", *, micro: int = 2) -> dict:
    model = hash_dropout(bert()) if name in TWO_DRAWS else bert()
    recipe = DDP_RECIPES[name]()
    # what changes the model or adds weights comes before the wrapper
    changing = name in ("beside", "causal") or any(method.structure for method in recipe)
    run = st.Run(model if changing else ddp(model), recipe, total_steps=STEPS, data=lambda: first_look(model))
    run.attach(optimizer_of(model, kind))
    run.wrapper = ddp(model) if changing else run.wrapper  # as run.loss(batch, model=wrapper) does
    with hash_noise():
        return train(run, micro=micro)


def unused(name: str) -> dict:
    """A parameter that no forward uses, and ranks whose batches differ in length."""
    model = bert()
    model.spare = nn.Linear(3, 3).double()
    wrapper = ddp(model, find_unused_parameters=True)
    run = st.Run(wrapper, DDP_RECIPES[name](), total_steps=STEPS).attach(optimizer_of(model))
    with hash_noise():
        return train(run, steps=2)


def checkpointed(name: str, kind: str) -> dict:
    """Extra forwards with real dropout, whatever is recomputed; the error where torch cannot do it."""
    model = bert(dropout=0.2)
    if kind != "none":
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": kind == "reentrant"})
    run = st.Run(ddp(model), DDP_RECIPES[name](), total_steps=STEPS).attach(optimizer_of(model))
    torch.manual_seed(100 + place()[0])
    try:
        return train(run, steps=2)
    except RuntimeError as error:
        return {"error": str(error)}


class GlobalDraw(st.Mixout):
    """T2, naive: columns from torch's global generator, which dropout and data have moved differently per rank."""

    def columns(self, run, weight):
        return (torch.rand(1, weight.data.shape[1]) < self.keep).double()


class Noisy(st.Mixout):
    """Draws of the local batch's shape beside columns that all ranks must share: right with `Run.rng`."""

    def penalty(self, step):
        shape = step.inputs["input_ids"].shape
        noise = torch.rand(shape, generator=step.run.rng(self, "noise", per_rank=True))
        self.noise = noise.mean()


class SharedDraw(Noisy):
    """T2, naive: one generator of equal seed on all ranks for both draws."""

    def setup(self, run):
        super().setup(run)
        self.generator = torch.Generator().manual_seed(3)

    def penalty(self, step):
        torch.rand(step.inputs["input_ids"].shape, generator=self.generator)

    def columns(self, run, weight):
        return (torch.rand(1, weight.data.shape[1], generator=self.generator) < self.keep).double()


def draws() -> dict:
    """Final weights under each way to draw, ranks with unequal global state and unequal lengths of their batches."""
    found = {}
    for method in (st.Mixout(0.6), Noisy(0.6), GlobalDraw(0.6), SharedDraw(0.6)):
        model = bert()
        run = st.Run(ddp(model), [method], total_steps=STEPS).attach(optimizer_of(model))
        rank, world = place()
        torch.manual_seed(rank)
        for t in range(3):
            mine = parts(batch(t, model), rank, world, 1)[0]
            width = LENGTH - 2 * rank
            run.loss({k: v[:, :width] if v.dim() == 2 else v for k, v in mine.items()}).backward()
            run.optimizer.step()
            run.optimizer.zero_grad()
        found[type(method).__name__] = weights_of(model)
    return found


def other(model: nn.Module) -> list[dict]:
    """Two micro-batches that are not the step's."""
    return parts(batch(100, model), *place(), 2)


@dataclass
class Extra(st.Method):
    """One more gradient in the middle of a step; T19: parking references to ``.grad`` only, when ``naive``."""

    naive: bool = False

    def setup(self, run):
        self.seen: list[dict] = []

    def before_step(self, run, weights):
        if run.index not in (1, 3):
            return
        before = {w.name: w.grad.clone() for w in weights}
        found = self.take_naively(run) if self.naive else run.gradient(other(run.model))
        self.seen.append(
            {
                "before": before,
                "after": {w.name: w.grad.clone() for w in weights},
                "grad": {n: getattr(p.grad, "_local_tensor", p.grad).clone() for n, p in run.model.named_parameters()},
                "extra": {n: g.clone() for n, g in found.items()},
            }
        )

    def take_naively(self, run):
        parameters = dict(run.model.named_parameters())
        parked = {n: p.grad for n, p in parameters.items()}
        for p in parameters.values():
            p.grad = None
        for i, part in enumerate(other(run.model)):
            with accumulating(run.wrapper, i == 1):
                (run.wrapper(**part).loss / 2).backward()
        found = {n: p.grad.clone() for n, p in parameters.items()}
        for n, p in parameters.items():
            p.grad = parked[n]
        return found


DDP_OPTIONS: dict[str, dict] = {
    "plain": {},
    "views": {"gradient_as_bucket_view": True},
    "unused": {"find_unused_parameters": True},
    "static": {"static_graph": True},
}


def gradient(options: str = "plain", *, naive: bool = False, micro: int = 2) -> dict:
    model = bert()
    run = st.Run(ddp(model, **DDP_OPTIONS[options]), [st.DPSMix(**STAGES), Extra(naive)], total_steps=STEPS)
    run.attach(optimizer_of(model))
    return {**train(run, steps=5, micro=micro), "seen": run[Extra].seen}


def static_graph() -> dict:
    """What stops accumulation under ``static_graph=True``, and that the rest works."""
    found: dict = {}
    for name in ("torch", "ours"):
        model = bert()
        wrapper = DistributedDataParallel(model, static_graph=True)
        run = st.Run(wrapper, [st.DPSDense(**STAGES)], total_steps=STEPS).attach(optimizer_of(model))
        mine, at = parts(batch(0, model), *place(), 2)[0], "forward"
        try:
            with wrapper.no_sync():
                loss = wrapper(**mine).loss if name == "torch" else run.loss(mine)
                at = "backward"
                loss.backward()
        except RuntimeError as error:
            found[name] = f"{at}: {error}"
    for name, sync in (("one micro-batch", False), ("synced", True)):
        model = bert()
        run = st.Run(DistributedDataParallel(model, static_graph=True), DDP_RECIPES["dense"](), total_steps=STEPS)
        run.attach(optimizer_of(model))
        found[name] = train(run, micro=1 + sync, sync=sync)
    return {**found, "gradient": gradient("static", micro=1)}


def checkpointing(kind: str) -> dict:
    """R-Drop and DPS Mix with real dropout; the same draws whatever is recomputed."""
    model = bert(dropout=0.2)
    if kind != "none":
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable({"use_reentrant": kind == "reentrant"})
    run = st.Run(ddp(model), [st.RDrop(1.0), st.DPSMix(**STAGES)], total_steps=STEPS).attach(optimizer_of(model))
    torch.manual_seed(100 + place()[0])
    return train(run)


# ---------------------------------------------------------------------- FSDP2


def has_gradient(weight: st.Weight) -> bool:
    """All but the biases of keys, whose gradient is round-off: attention does not change with them."""
    return not weight.name.endswith("c_attn.bias")


SHARDED_RECIPES = {
    "dense_tensor": (bert, lambda: [st.DPSDense(**STAGES)]),
    "dense_global": (bert, lambda: [st.DPSDense(**STAGES, threshold="global", frozen=True), st.ClipNorm(0.5)]),
    "one_output": (lambda: bert(labels=1), lambda: [st.DPSMix(**STAGES, frozen=True), st.EMA(0.8)]),
    "mixout_l2sp_ema": (bert, lambda: [st.Mixout(keep=0.6), st.L2SP(0.3), st.EMA(0.8), st.ClipNorm(0.5)]),
    "child_f": (bert, lambda: [st.ChildTuningF(0.5), st.SWA(0.25, every=2)]),
    "child_d": (bert, lambda: [st.ChildTuningD(0.3, scope="linear", frozen=True), st.RecAdam(gamma=30.0)]),
    "rose_first": (lambda: hash_dropout(bert()), lambda: [st.ROSEFirst(0.5), st.EMA(0.8)]),
    "rose_second": (bert, lambda: [st.ROSESecond(0.5), st.EMA(0.8)]),
    "bi_drop": (lambda: hash_dropout(bert()), lambda: [st.BiDrop(0.5, scope="linear"), st.EMA(0.8)]),
    "sift": (bert, lambda: [st.SIFT(0.05, batches=2, scope="linear")]),
    "conv1d": (gpt2, lambda: [st.Mixout(keep=0.6), st.DPSMix(**STAGES), st.EMA(0.8)]),
    "rates": (bert, lambda: [st.Extrapolation(0.5), st.HypergradientLR(0.3), st.EMA(0.8)]),
    "sam": (bert, lambda: [st.SAM(0.3), st.Mixout(keep=0.6), st.EMA(0.8), st.ClipNorm(0.5)]),
    "awp": (bert, lambda: [st.AWP(0.1), st.LAWA(last=2, every=2)]),
    "random_penalties": (bert, lambda: [st.R3F(scale=0.1), st.R4F(scale=0.1), st.EMA(0.8)]),
    "everywhere": (gpt2, lambda: [st.DPSMix(**STAGES, scope=has_gradient, threshold="global"), st.L2SP(0.3)]),
}


LOOKS = [
    ("mixout_l2sp_ema", "between steps"),
    ("mixout_l2sp_ema", "between micro-batches"),
    ("mixout_l2sp_ema", "before step"),
    ("dense_tensor", "before step"),
]


def looking(run: st.Run, when: str, seen: list):
    """An evaluation in the middle of training: between steps, between micro-batches, before the optimizer's step."""

    def before(t: int, i: int) -> None:
        if (t, i) != {"between steps": (3, 0), "between micro-batches": (3, 1), "before step": (3, 2)}.get(when):
            return
        run.model.eval()
        with torch.no_grad():
            run.model(**parts(batch(50, run.model), *place(), 1)[0])
        run.model.train()
        seen.append([type(p).__name__ for p in run.model.parameters()])

    return before


def sharded(name: str, *, run_first: bool = True, look: str = "never", kind: str = "adamw") -> dict:
    make, recipe = SHARDED_RECIPES[name]
    model = make()
    if run_first:
        run = st.Run(model, recipe(), total_steps=STEPS, data=lambda: first_look(model))
        shard(model)
    else:
        run = st.Run(shard(model), recipe(), total_steps=STEPS)
    run.attach(optimizer_of(model, kind))
    seen: list = []
    with hash_noise():
        return {**train(run, before=looking(run, look, seen)), "seen": seen}


def whole_only() -> dict:
    """What methods that need whole weights say to shards, in `attach` or at the first step."""
    found = {}
    for method in (st.MaskTraining(0.6), st.CausalHead(), st.VIBERT(), st.LEVI(), st.FreeLB()):
        model = bert()
        run = st.Run(model, [method], total_steps=STEPS)
        try:
            run.attach(optimizer_of(shard(model)))
            run.loss(parts(batch(0, model), *place(), 1)[0])
        except (RuntimeError, ValueError) as error:
            found[type(method).__name__] = str(error)
    return found


def sharded_partners() -> dict:
    """Methods whose rows meet each other, or that draw for each row, on shards: the ranks must agree."""
    model = bert()
    recipe = [st.TMix(), st.SupCon(weight=0.5), st.LayerDrop(0.3), st.GroupWeights(column=by_length, least=1, every=2)]
    run = st.Run(model, recipe, total_steps=STEPS, data=lambda: first_look(model))
    run.attach(optimizer_of(shard(model)))
    with warnings.catch_warnings():  # torch warns of hidden states that are views; nothing writes to them
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        return train(run, steps=4)


def refusals() -> dict:
    """What the penalties that need a gradient at the embeddings, or whole weights, say to shards."""
    found = {}
    for method in (st.SMART(), st.SMART(weight=0.0, proximal=st.BregmanProximal()), st.FGM()):
        model = bert()
        run = st.Run(model, [method], total_steps=STEPS).attach(optimizer_of(shard(model)))
        try:
            run.loss(parts(batch(0, model), *place(), 1)[0])
        except RuntimeError as error:
            found[repr(method)] = str(error)
    return found


def frozen_entries() -> dict:
    """Weights and optimizer state of unselected entries on this rank, before and after a step of stage II."""
    model = bert()
    run = st.Run(model, [st.DPSDense(**STAGES, frozen=True)], total_steps=STEPS)
    run.attach(optimizer_of(shard(model)))

    def pieces(masks: dict) -> dict:
        found = {}
        for n, p in model.named_parameters():
            if n in masks:
                for key, value in {"weight": p.detach(), **run.optimizer.state[p]}.items():
                    if value.dim():
                        found[n, key] = getattr(value, "_local_tensor", value)[~masks[n]].clone()
        return found

    for t in range(3):
        take_step(run, batch(t, model))
    masks = plain(run[st.DPSDense].masks)
    before = pieces(masks)
    take_step(run, batch(3, model))
    return {"before": before, "after": pieces(masks), "masks": masks}


def sharded_gradient() -> dict:
    model = bert()
    run = st.Run(model, [st.DPSMix(**STAGES), Extra()], total_steps=STEPS)
    run.attach(optimizer_of(shard(model)))
    return {**train(run, steps=5), "seen": run[Extra].seen}


def statistics() -> dict:
    """Thresholds and norms over pieces, uneven and empty ones among them."""
    model = bert()
    run = st.Run(model, [st.DPSDense(**STAGES)], total_steps=STEPS)
    run.attach(optimizer_of(shard(model)))
    pieces = {w.name: w.data for w in run.weights()}
    return {
        "empty": [n for n, t in pieces.items() if t.numel() == 0],
        "kth": {(n, keep): run.kth(t, keep) for n, t in pieces.items() for keep in (0.1, 0.5, 1.0)},
        "global": [run.kth(list(pieces.values()), keep) for keep in (0.1, 0.5, 1.0)],
        "norms": dict(zip(pieces, run.norms(list(pieces.values())), strict=True)),
    }


def state_after_evaluation() -> dict:
    """The state of a run, before and after an evaluation leaves the root's parameters gathered."""
    model = bert()
    run = st.Run(model, SHARDED_RECIPES["one_output"][1](), total_steps=STEPS)
    run.attach(optimizer_of(shard(model)))
    for t in range(3):
        take_step(run, batch(t, model))
    before, raw = plain(run.state_dict()), {n: run.raw(n).clone() for n, _ in model.named_parameters()}
    seen: list = []
    looking(run, "between steps", seen)(3, 0)
    after = plain(run.state_dict())
    looking(run, "between steps", seen)(3, 0)
    raw_after = {n: run.raw(n).clone() for n, _ in model.named_parameters()}
    looking(run, "between steps", seen)(3, 0)
    run.load_state_dict(before)
    return {"before": before, "after": after, "raw": raw, "raw_after": raw_after, "seen": seen}


def sharded_resume(way: str) -> dict:
    """All steps in one go, and with a stop after three, in the middle of stage II, through ``way``."""
    from torch.distributed.checkpoint.state_dict import (
        get_model_state_dict,
        get_optimizer_state_dict,
        set_model_state_dict,
        set_optimizer_state_dict,
    )

    recipe = lambda: [st.DPSMix(**STAGES), st.L2SP(0.3), st.EMA(0.8)]  # noqa: E731

    def build(shift: float) -> st.Run:
        model = bert()
        with torch.no_grad():
            model.classifier.weight.add_(shift)  # a new head is drawn anew in every process: its first values are saved
        run = st.Run(model, recipe(), total_steps=STEPS)
        return run.attach(optimizer_of(shard(model)))

    first = build(0.0)
    early = get_optimizer_state_dict(first.model, first.optimizer)  # before the first step: torch fakes one
    found: dict = {"fake": {"index": first.index, "raw": len(first.state_dict()["raw"]), "key": "steadytune" in early}}
    for t in range(3):
        take_step(first, batch(t, first.model))
    folder = Path(os.environ["STEADYTUNE_OUT"])
    path = folder / f"resume-{way}-{place()[0]}.tmp"
    torch.save(first.state_dict(), path)
    weights = copy.deepcopy(get_model_state_dict(first.model))
    if way == "optimizer":
        moments = copy.deepcopy(first.optimizer.state_dict())
    else:
        moments = copy.deepcopy(get_optimizer_state_dict(first.model, first.optimizer))
    found["keys"] = sorted(moments)
    found["uninterrupted"] = train(first)

    second = build(0.1)
    set_model_state_dict(second.model, weights)
    if way == "optimizer":
        second.optimizer.load_state_dict(moments)
    else:
        steps = []
        second.optimizer.register_step_post_hook(lambda *_: steps.append(second.index))
        set_optimizer_state_dict(second.model, second.optimizer, moments)
        found["fake_steps"], found["index_after"] = list(steps), second.index
        try:
            second.loss(parts(batch(3, second.model), *place(), 1)[0])
            found["error"] = "no error"
        except RuntimeError as error:
            found["error"] = str(error)
        second.load_state_dict(torch.load(path, weights_only=True))
    found["index"] = second.index
    found["resumed"] = train(second)
    return found


# ---------------------------------------------------------------------- Trainer


class Norms(TrainerCallback):
    """Norm of the gradient at each optimizer step, as it reaches the optimizer of the first step."""

    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        squares = [p.grad.double().square().sum() for p in model.parameters() if p.grad is not None]
        self.norms.append(math.sqrt(float(sum(squares))))


def steps_of_sixteen(folder: Path, **changes) -> TrainingArguments:
    """16 examples an optimizer step: 2 ranks x 4 rows x 2 micro-batches, or 16 rows on one."""
    two = place()[1] == 2
    split = {"per_device_train_batch_size": 4 if two else 16, "gradient_accumulation_steps": 2 if two else 1}
    return arguments(folder, **{"max_steps": STEPS, **split, **changes})


def counted(outputs, labels, num_items_in_batch=None):
    """A user's loss of a classifier, divided by the number of examples of the whole step."""
    return nn.functional.cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


TRAINER_RECIPES = {
    "full": (bert, lambda: [st.DPSMix(**STAGES), st.L2SP(0.3), st.EMA(0.8)]),
    "rdrop": (lambda: hash_dropout(bert()), lambda: [st.RDrop(2.0), st.DPSDense(**STAGES)]),
    "counted": (lambda: hash_dropout(bert()), lambda: [st.RDrop(2.0), st.L2SP(0.3)]),
    "child_d": (bert, lambda: [st.ChildTuningD(0.3, scope="linear"), st.SWA(0.25)]),
    "tokens_sift": (lambda: llama(dtype=torch.float64), lambda: [st.SIFT(0.1, batches=2, scope="linear")]),
    "tokens": (lambda: hash_dropout(llama(dtype=torch.float64)), lambda: [st.Mixout(keep=0.6), st.EMA(0.8)]),
    "tokens_smart": (
        lambda: hash_dropout(llama(dtype=torch.float64)),
        lambda: [st.SMART(0.05, 0.05, noise=0.01), st.FGM(0.5)],
    ),
    "tokens_rdrop": (lambda: hash_dropout(llama(dtype=torch.float64)), lambda: [st.RDrop(2.0), st.DPSMix(**STAGES)]),
}


def trainer_recipe(name: str, folder: Path, **changes) -> dict:
    make, recipe = TRAINER_RECIPES[name]
    trainer = st.Trainer(
        model=make(),
        args=steps_of_sixteen(folder, **changes),
        train_dataset=rows(96, tokens="tokens" in name),
        data_collator=collate,
        methods=recipe(),
        compute_loss_func=counted if name == "counted" else None,
    )
    watch = Norms()
    trainer.add_callback(watch)
    with hash_noise():
        trainer.train()
    return {"weights": weights_of(trainer.model), "norms": watch.norms, "world": trainer.args.world_size}


def trainer_resume(folder: Path) -> dict:
    """Uninterrupted, and from the checkpoint at step 3, in the middle of stage II."""

    def make() -> st.Trainer:
        recipe = [st.DPSMix(**STAGES), st.L2SP(0.3), st.EMA(0.8)]
        args = steps_of_sixteen(folder, save_strategy="steps", save_steps=3)
        return st.Trainer(model=bert(), args=args, train_dataset=rows(96), data_collator=collate, methods=recipe)

    one = make()
    one.train()
    two = make()
    two.train(resume_from_checkpoint=str(folder / "checkpoint-3"))
    files = sorted(p.name for p in (folder / "checkpoint-3").iterdir())
    raw = [{n: t.run.raw(n).clone() for n, _ in t.model.named_parameters()} for t in (one, two)]
    return {
        "uninterrupted": weights_of(one.model),
        "resumed": weights_of(two.model),
        "raw": raw,
        "index": two.run.index,
        "files": files,
    }


def first_norms(folder: Path) -> dict:
    """Norm of the first gradient of a BERT classifier and of a language model: the stock Trainer and ours."""
    found = {}
    for name, make in (("bert", bert), ("llama", lambda: llama(dtype=torch.float64))):
        for kind in (StockTrainer, st.Trainer):
            trainer = kind(
                model=make(),
                args=steps_of_sixteen(folder, max_steps=1, max_grad_norm=0.0),
                train_dataset=rows(96, tokens=name == "llama"),
                data_collator=collate,
            )
            watch = Norms()
            trainer.add_callback(watch)
            trainer.train()
            found[name, "stock" if kind is StockTrainer else "ours"] = watch.norms[0]
    return found


# ---------------------------------------------------------------------- running


GROUPS = {
    "core": {
        **{f"ddp_{name}": (lambda name=name: ddp_recipe(name)) for name in DDP_RECIPES},
        "ddp_sgd": lambda: ddp_recipe("mix_ema", "sgd"),
        **{f"unused_{name}": (lambda name=name: unused(name)) for name in ("smart", "r3f", "lnsr", "adversarial")},
        **{
            f"checkpointed_{name}_{kind}": (lambda name=name, kind=kind: checkpointed(name, kind))
            for name in ("smart", "r3f", "lnsr", "adversarial")
            for kind in ("none", "reentrant", "other")
        },
        "draws": draws,
        **{f"gradient_{name}": (lambda name=name: gradient(name)) for name in DDP_OPTIONS if name != "static"},
        "gradient_naive": lambda: gradient("views", naive=True),
        "static_graph": static_graph,
        **{f"checkpointing_{k}": (lambda k=k: checkpointing(k)) for k in ("none", "reentrant", "other")},
        **{f"sharded_{name}": (lambda name=name: sharded(name)) for name in SHARDED_RECIPES},
        **{
            f"sharded_first_{name}": (lambda name=name: sharded(name, run_first=False))
            for name in ("mixout_l2sp_ema", "conv1d")
        },
        **{
            f"sharded_look_{i}": (lambda name=name, when=when: sharded(name, look=when))
            for i, (name, when) in enumerate(LOOKS)
        },
        "refusals": refusals,
        "whole_only": whole_only,
        "sharded_partners": sharded_partners,
        "frozen_entries": frozen_entries,
        "sharded_gradient": sharded_gradient,
        "statistics": statistics,
        "state_after_evaluation": state_after_evaluation,
        "sharded_resume_optimizer": lambda: sharded_resume("optimizer"),
        "sharded_resume_torch": lambda: sharded_resume("torch"),
    },
    "trainer": {
        **{
            f"trainer_{name}": (lambda name=name: trainer_recipe(name, out() / f"trainer_{name}"))
            for name in TRAINER_RECIPES
        },
        "trainer_sgd": lambda: trainer_recipe(
            "full", out() / "trainer_sgd", optim="sgd", learning_rate=0.05, max_grad_norm=0.0
        ),
        "trainer_resume": lambda: trainer_resume(out() / "trainer_resume"),
        "first_norms": lambda: first_norms(out() / "first_norms"),
    },
}


def out() -> Path:
    return Path(os.environ["STEADYTUNE_OUT"])


def main(group: str, folder: str, rank: str | None = None) -> None:
    torch.set_num_threads(1)
    os.environ["STEADYTUNE_OUT"] = folder
    where = {} if rank is None else {"init_method": f"file://{folder}/{group}.store", "rank": int(rank)}
    world = {} if rank is None else {"world_size": 2}
    dist.init_process_group("gloo", timeout=timedelta(seconds=600), **where, **world)
    warnings.simplefilter("error")
    for name, scenario in GROUPS[group].items():
        path = Path(folder, f"{name}-{dist.get_rank()}.pt")
        try:
            result = {"value": scenario()}
        except BaseException:
            torch.save({"error": traceback.format_exc()}, path)
            raise  # the other rank waits for us: end both
        torch.save(result, path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
