"""Features of rows in evaluation mode: inputs of a classifier's last linear layer, or pooled token states.

For the first, the layer returns its input for the time of the pass. So everything that the model does with the layer's
outputs (a decoder picks those of the last token) happens to the features. One rule serves every architecture. The first
batch is checked: features times the layer's weights must equal the model's logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..precision import in_float64, wide

CHECKED = 4  # number of rows of the first batch that are checked
TOLERANCE = 1e-3  # largest difference of logits in the check, as a share of the largest logit


def last_linear(model: Any) -> nn.Linear | None:
    """The last linear layer with one output per label, or None without one."""
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == model.config.num_labels]
    return layers[-1] if layers else None


def output_layer(model: Any) -> nn.Linear:
    """The last linear layer with one output per label.

    Raises:
        ValueError: The model has none.
    """
    layer = last_linear(model)
    if layer is None:
        raise ValueError(
            f"a {type(model).__name__} has no linear layer with {model.config.num_labels} outputs at its end: use a "
            "model for sequence classification"
        )
    return layer


@torch.no_grad()
def features(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> Tensor:
    """Inputs of the model's last linear layer, one row for each row of the batches.

    The model's mode does not change. Dropout is off, and no random number is drawn.

    Args:
        model: A classifier, on any device.
        batches: Inputs of the model; ``labels`` are left out.

    Returns:
        (rows, width), float64 on the CPU.

    Raises:
        ValueError: The logits of this model are not those of its last linear layer, or there is no batch.
    """
    layer = output_layer(model)
    device = next(model.parameters()).device
    rows: list[Tensor] = []
    with evaluating(model):
        for batch in batches:
            inputs = {name: value.to(device) for name, value in batch.items() if name != "labels"}
            rows.append(in_float64(head_inputs(model, inputs)))
            if len(rows) == 1:
                few = {name: value[:CHECKED] for name, value in inputs.items()}
                _check(model, layer, model(**few).logits, rows[0][:CHECKED])
    if not rows:
        raise ValueError("features need at least one batch of rows")
    return torch.cat(rows)


@torch.no_grad()
def pooled_features(model: Any, batches: Iterable[Mapping[str, Tensor]], how: Literal["mean", "cls"]) -> Tensor:
    """Token states after the last block, pooled to one vector a row.

    For an encoder-decoder they are those of the encoder. The model's mode does not change, dropout is off, and no
    random number is drawn.

    Args:
        model: A classifier, on any device.
        batches: Inputs of the model; ``labels`` are left out.
        how: ``"mean"`` over the tokens that are not padding, or ``"cls"``, the first of them.

    Returns:
        (rows, width), float64 on the CPU.

    Raises:
        ValueError: The model does not have one state for each token, or there is no batch.
    """
    rows: list[Tensor] = []
    with evaluating(model):
        for batch in batches:
            inputs = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
            states, mask = _token_states(model, inputs)
            rows.append(in_float64(_pooled(wide(states), mask, how)))
    if not rows:
        raise ValueError("features need at least one batch of rows")
    return torch.cat(rows)


def head_inputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Inputs of the model's last linear layer for one batch, (rows, width), through which gradients flow.

    Args:
        model: A classifier, in the mode of the pass.
        inputs: Inputs of the model without labels, on its device.

    Raises:
        ValueError: The model has no last linear layer.
    """
    with _handing_on(output_layer(model)):
        features: Tensor = model(**inputs).logits
    return features


def pooled_states(model: Any, inputs: Mapping[str, Tensor], how: Literal["mean", "cls"]) -> Tensor:
    """Token states after the last block for one batch, pooled as by `pooled_features`, with gradients: (rows, width).

    Args:
        model: A classifier, in the mode of the pass.
        inputs: Inputs of the model without labels, on its device.
        how: As of `pooled_features`.

    Raises:
        ValueError: The model does not have one state for each token.
    """
    return _pooled(*_token_states(model, inputs), how)


def text_vectors(model: Any, inputs: Mapping[str, Tensor], pooling: Literal["model", "mean", "cls"]) -> Tensor:
    """Vectors (rows, width) of one batch, with gradients: `head_inputs`, or `pooled_states`."""
    return head_inputs(model, inputs) if pooling == "model" else pooled_states(model, inputs, pooling)


def _token_states(model: Any, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """States after the last block (rows, tokens, width), and the mask of the tokens that are not padding."""
    body = model.base_model
    if model.config.is_encoder_decoder:
        body = body.get_encoder()
    states = body(**inputs).last_hidden_state
    mask = inputs.get("attention_mask", torch.ones(inputs["input_ids"].shape, device=states.device))
    if states.shape[:2] != mask.shape:
        raise ValueError(f"a {type(model).__name__} has not one state per token: its states cannot be pooled")
    return states, mask


def _pooled(states: Tensor, mask: Tensor, how: Literal["mean", "cls"]) -> Tensor:
    if how == "cls":
        return states[torch.arange(len(states), device=states.device), mask.argmax(dim=1)]
    return (states * mask.unsqueeze(-1)).sum(dim=1) / mask.sum(dim=1, keepdim=True)


def _check(model: nn.Module, layer: nn.Linear, logits: Tensor, rows: Tensor) -> None:
    """Raise unless features times the layer's weights are the model's logits."""
    bias = None if layer.bias is None else in_float64(layer.bias)
    logits = in_float64(logits)
    if rows.shape == (len(logits), layer.in_features):
        difference = (nn.functional.linear(rows, in_float64(layer.weight), bias) - logits).abs().max()
        if difference <= TOLERANCE * (1 + logits.abs().max()):
            return
    raise ValueError(
        f"the logits of a {type(model).__name__} are not those of its last linear layer: this model has no features "
        "that a linear probe could read"
    )


@contextlib.contextmanager
def _handing_on(layer: nn.Linear) -> Iterator[None]:
    """Make the layer return its input inside the block."""
    handle = layer.register_forward_hook(lambda module, args, output: args[0])
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set the model to evaluation mode inside the block; restore the mode of each module."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
