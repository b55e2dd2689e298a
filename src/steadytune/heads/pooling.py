"""Mean pooling by one more stock block, and dense layers that pass their input on.

A stock BERT classifier reads the state of its first token, through a dense layer that many checkpoints never trained.
One more block of the model's own kind can put the mean over tokens there instead, with stock weights and stock code:

    query = key = 0                     every attention score is 0: weights are uniform over the tokens not masked
    value = I                           the heads together give mean(h)
    attention.output.dense = c I        the first token becomes LN(c mean(h) + h_cls), which for large c is LN(mean(h))
    output.dense = 0                    the feed-forward part adds nothing at the start, and learns

Zero queries and keys have zero gradients (that of one is a product with the other) and zero decay: they stay zero, and
pooling stays a mean, without freezing anything. LN(mean) is the centred mean at norm sqrt(width), nearly the normalised
sentence vector that sentence encoders are trained for. c is chosen by the spread of the mean: h_cls is left as a share
of `REST` of it. Block and equality are checked by running the model, never by its name.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..core.anatomy import POOLING, anatomy, blocks
from .features import evaluating, output_layer

Pool = Literal["mean", "cls"]

REST = 5e-4  # largest weight of the first token's own state in relation to the mean
TOLERANCE = 1e-2  # largest difference between the block's output and LN(mean), as a share of its largest entry
SQUEEZE = 0.3  # weight of a dense layer before tanh: nearly linear for states of spread 1

NATIVE = "classifier_pooling"  # config entry of models that pool by themselves
FIRST = {"eurobert": "bos"}  # what models call the first token in it, if not "cls"

# Parts of a block by path: BERT, RoBERTa, XLM-R, ELECTRA, ERNIE, DeBERTa; DistilBERT.
SCORES = ("query", "key", "q_lin", "k_lin", "query_proj", "key_proj", "pos_query_proj", "pos_key_proj")
VALUE = ("value", "v_lin", "value_proj")
MIXED = ("attention.output.dense", "attention.out_lin")
ADDED = ("output.dense", "ffn.lin2")
NORMS = ("attention.output.LayerNorm", "sa_layer_norm", "output.LayerNorm", "output_layer_norm")

# Entries of configs with the dropout of the head alone: DistilBERT; ELECTRA. DeBERTa reads the last one undeclared.
HEAD_DROPOUT = ("seq_classif_dropout", "classifier_dropout", "cls_dropout")


def untrained_dense(model: nn.Module, missing: frozenset[str] = frozenset()) -> str | None:
    """Name of the dense layer before the head if it was never trained, or None.

    It was never trained if its bias is exactly 0 everywhere, or if the checkpoint lacks it.

    Args:
        model: A classifier after loading.
        missing: Names of weights that were not in the checkpoint.
    """
    name = dense_before(model)
    if name is None:
        return None
    layer: Any = model.get_submodule(name)
    zero = layer.bias is not None and not bool(layer.bias.any())
    return name if zero or f"{name}.weight" in missing else None


def dense_before(model: nn.Module) -> str | None:
    """Name of the square linear layer between the blocks and the last one: a pooler, or the first half of a head."""
    last = output_layer(model)
    parts = anatomy(model)
    names = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not last and module.in_features == module.out_features
        and module.in_features == last.in_features and not isinstance(parts[f"{name}.weight"].block, int)
        and f"{name}.weight" not in pooling_block_names(model)
    ]  # fmt: skip
    return names[-1] if names else None


def pooling_block_names(model: nn.Module) -> set[str]:
    """Names of the weights of a pooling block; empty without one."""
    stack = _stack(model)
    if stack is None or getattr(model.config, POOLING, None) is None:
        return set()
    added = {id(p) for p in stack[-1].parameters()}
    return {name for name, p in model.named_parameters() if id(p) in added}


def native_pooling(model: Any, how: Pool) -> bool:
    """Tell a model that pools by itself (ModernBERT, EuroBERT) what its head reads; return whether it is one."""
    if not hasattr(model.config, NATIVE):
        return False
    mode = FIRST.get(model.config.model_type, how) if how == "cls" else how
    for holder in (model.config, model):  # EuroBERT copies the entry
        if hasattr(holder, NATIVE):
            setattr(holder, NATIVE, mode)
    return True


# ---- the block ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def add_pooling_block(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Append a block to the model and its config whose output at the first token is LN(mean over tokens).

    Args:
        model: A classifier; it is changed in place.
        batches: A few rows of the training data, for choosing c and checking the result.

    Returns:
        Names of the new weights.

    Raises:
        ValueError: The model has no blocks of a known make, or the new block does not pool: blocks that share weights,
            that add positions outside of queries and keys, or that normalise first. The model is as it was then.
    """
    name, stack = type(model).__name__, _stack(model)
    refusal = ValueError(
        f"mean pooling is not known for a {name}: it needs blocks of BERT's make at the end of the encoder. Use "
        "pooling='model'"
    )
    if stack is None or len(stack) != model.config.num_hidden_layers:
        raise refusal
    before = [_states(model, batch) for batch in batches]
    known = [state for state in before if state is not None]
    if len(known) < len(before):
        raise refusal
    factor = max(_factor(*state) for state in known)
    stateless = [m for m in stack[-1].modules() if not [*m.parameters(), *m.buffers()]]  # dropout, activations
    block = copy.deepcopy(stack[-1], {id(m): m for m in stateless})
    if not _fill(block, factor):
        raise refusal
    stack.append(block)
    model.config.num_hidden_layers += 1
    setattr(model.config, POOLING, "mean")
    if not all(_pools(model, batch, *state) for batch, state in zip(batches, known, strict=True)):
        del stack[-1]
        model.config.num_hidden_layers -= 1
        delattr(model.config, POOLING)
        raise refusal
    return sorted(pooling_block_names(model))


def _stack(model: nn.Module) -> nn.ModuleList | None:
    """The list of the last block, if each of its entries is one block."""
    all_blocks = blocks(model)
    if not all_blocks or len(all_blocks[-1]) != 1:
        return None
    return next((m for m in model.modules() if isinstance(m, nn.ModuleList) and all_blocks[-1][0] in list(m)), None)


def _states(model: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
    """States after the last block (rows, tokens, width), and the mask of the tokens that count."""
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    with evaluating(model):
        states = getattr(model(**inputs, output_hidden_states=True), "hidden_states", None)
    if not states or states[-1].dim() != 3:
        return None
    mask = inputs.get("attention_mask", torch.ones(states[-1].shape[:2], device=model.device))
    return states[-1], mask.unsqueeze(-1).to(states[-1].dtype)


def _mean(states: Tensor, mask: Tensor) -> Tensor:
    return (states * mask).sum(1) / mask.sum(1)


def _factor(states: Tensor, mask: Tensor) -> float:
    """c, a power of two with which the first token's own state has at most a share `REST` of the mean, both centred."""
    spread = _mean(states, mask).std(-1, correction=0).clamp_min(1e-6)
    ratio = (states[:, 0].std(-1, correction=0) / spread).max()
    return float(torch.exp2((ratio / REST).log2().ceil()))


def _fill(block: nn.Module, factor: float) -> bool:
    """Write the weights of a pooling block; return whether all were found."""
    for p in block.parameters():
        p.requires_grad_(True)
    written = set()
    for path, module in block.named_modules():
        last = path.rpartition(".")[2]
        weight: Any = getattr(module, "weight", None)
        if weight is None:
            continue
        if last in SCORES:
            weight.zero_()
        elif last in VALUE:
            weight.copy_(torch.eye(*weight.shape))
            written.add("value")
        elif path in MIXED:
            weight.copy_(factor * torch.eye(*weight.shape))
            written.add("mixed")
        elif path in ADDED:
            weight.zero_()
            written.add("added")
        elif path in NORMS:
            weight.fill_(1.0)
            written.add(path)
        else:
            continue  # the first half of the feed-forward part: a copy of the block below
        if getattr(module, "bias", None) is not None:
            module.bias.zero_()
    return len(written) == 5


def _pools(model: Any, batch: Mapping[str, Tensor], states: Tensor, mask: Tensor) -> bool:
    """Whether the state of the first token is now LN(mean) of the earlier states."""
    after = _states(model, batch)
    if after is None:
        return False
    mean = _mean(states, mask)
    wanted = nn.functional.layer_norm(mean.float(), mean.shape[-1:])
    return bool((after[0][:, 0] - wanted).abs().max() <= TOLERANCE * wanted.abs().max())


# ---- dense layers -------------------------------------------------------------------------------------------------


@torch.no_grad()
def bypass(model: Any, batches: Sequence[Mapping[str, Tensor]]) -> list[str]:
    """Make the dense layer before the head pass its input on, as exactly as its activation allows.

    Before tanh its weight becomes ``0.3 I``. Before a rectifier (ReLU, GELU) it becomes the identity, shifted to where
    the rectifier is linear, and dropout between the two is set to 0, in the model and its config: it would drop and
    rescale the shift, which is far larger than what the layer hands on. It then trains like any other layer.

    Args:
        model: A classifier; it is changed in place.
        batches: A few rows, for detecting the activation and choosing the shift.

    Returns:
        Names of the weights that were written; empty without such a layer.

    Raises:
        ValueError: The activation is neither bounded nor a rectifier.
    """
    name = dense_before(model)
    if name is None:
        return []
    layer: Any = model.get_submodule(name)
    largest = max(_largest_input(model, layer, batch) for batch in batches)
    head = output_layer(model)
    kept = layer.weight.clone(), None if layer.bias is None else layer.bias.clone()
    layer.weight.zero_()
    high = 2.0 ** math.ceil(math.log2(largest + 6.0))
    at = _activated(model, layer, batches[0], high)
    if abs(at - high) < 1e-3 * high and layer.bias is not None:  # a rectifier is linear there
        layer.weight.copy_(torch.eye(*layer.weight.shape))
        layer.bias.fill_(high)
        if head.bias is not None:
            head.bias.sub_(high * head.weight.sum(1))
        _silence(model, layer, batches[0])
    elif 0.9 < at < 1.1:
        layer.weight.copy_(SQUEEZE * torch.eye(*layer.weight.shape))
        if layer.bias is not None:
            layer.bias.zero_()
    else:
        layer.weight.copy_(kept[0])
        if layer.bias is not None:
            layer.bias.copy_(kept[1])
        raise ValueError(f"{name} of a {type(model).__name__} has an activation that cannot be bypassed")
    return [f"{name}.{leaf}" for leaf, _ in layer.named_parameters()]


def _largest_input(model: Any, layer: nn.Module, batch: Mapping[str, Tensor]) -> float:
    """Largest absolute value of a layer's input."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().max()))
    try:
        _run(model, batch)
    finally:
        handle.remove()
    return float(seen[0])


def _activated(model: Any, layer: Any, batch: Mapping[str, Tensor], value: float) -> float:
    """Input of the head if the layer's output is one value everywhere."""
    seen: list[Tensor] = []
    fill = layer.register_forward_hook(lambda module, args, output: torch.full_like(output, value))
    read = output_layer(model).register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    try:
        _run(model, batch)
    finally:
        fill.remove()
        read.remove()
    return float(seen[0].flatten()[0])


def _silence(model: Any, layer: nn.Module, batch: Mapping[str, Tensor]) -> None:
    """Set dropout between a layer and the head to 0, in the config too, from which a saved model is built again."""
    head = output_layer(model)
    order: list[nn.Module] = []
    watched = [m for m in model.modules() if m is layer or m is head or isinstance(m, nn.Dropout)]
    handles = [m.register_forward_pre_hook(lambda module, args: order.append(module)) for m in watched]
    try:
        _run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    between: list[Any] = order[order.index(layer) + 1 : order.index(head)]
    for dropout in between:
        dropout.p = 0.0
    if between:
        for name in [name for name in HEAD_DROPOUT if hasattr(model.config, name)] or HEAD_DROPOUT[-1:]:
            setattr(model.config, name, 0.0)


def _run(model: Any, batch: Mapping[str, Tensor]) -> None:
    inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    with evaluating(model):
        model(**inputs)
