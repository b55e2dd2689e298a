"""What a model answers to rows: its outputs in their order, on whatever device it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..core.randomness import forked
from ..errors import UsageError
from ..heads.features import features as head_inputs
from ..heads.features import pooled_features
from ..precision import in_float64
from .progress import progress_bar


def device() -> torch.device:
    """Where models are trained and asked: the accelerator, if there is one."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def logits(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    features: list[dict[str, Any]],
    bf16: bool = False,
    progress: bool = False,
    batch_size: int = 64,
    dropout_seed: int | None = None,
) -> np.ndarray:
    """Outputs (rows, outputs) in the order of the rows; rows of like length go together, which spares padding.

    With ``dropout_seed`` dropout is on, and that number decides it. No random number of the caller is drawn.

    Raises:
        UsageError: Outputs that are not finite.
    """
    order = by_length(features)
    batches = _batches(features, order, tokenizer, batch_size)
    total = -(-len(order) // batch_size)
    training, parts = model.training, []
    model.train(dropout_seed is not None)
    with torch.inference_mode(), _autocast(model, bf16), _seeded(dropout_seed):
        for batch in progress_bar(batches, desc="predicting", unit="batch", total=total) if progress else batches:
            outputs = model(**batch.to(model.device)).logits
            parts.append(in_float64(outputs).numpy())
    model.train(training)
    values = np.concatenate(parts)
    if not np.isfinite(values).all():
        raise UsageError("the model's outputs are not numbers: training diverged. Lower lr or raise warmup.")
    return values[np.argsort(order)]


def frozen_features(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    features: list[dict[str, Any]],
    pooling: Literal["model", "mean", "cls"] = "model",
    batch_size: int = 64,
) -> np.ndarray:
    """What enters the model's last linear layer, or its token states pooled: (rows, width), in the order of the rows.

    Raises:
        ValueError: The model has no such features, see `heads.features`.
    """
    order = by_length(features)
    batches = _batches(features, order, tokenizer, batch_size)
    states = head_inputs(model, batches) if pooling == "model" else pooled_features(model, batches, pooling)
    return states.numpy()[np.argsort(order)]


def by_length(features: list[dict[str, Any]]) -> np.ndarray:
    """Numbers of the rows from the longest to the shortest."""
    return np.argsort([-len(feature["input_ids"]) for feature in features], kind="stable")


def _batches(
    features: list[dict[str, Any]], order: np.ndarray, tokenizer: PreTrainedTokenizerBase, batch_size: int
) -> Iterator[Any]:
    """Padded rows in an order."""
    for start in range(0, len(order), batch_size):
        yield tokenizer.pad([features[i] for i in order[start : start + batch_size]], return_tensors="pt")


@contextlib.contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Seed torch inside the block, and restore its state; None changes nothing."""
    if seed is None:
        yield
        return
    with forked(device()):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _autocast(model: PreTrainedModel, bf16: bool) -> Iterator[None]:
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        yield
