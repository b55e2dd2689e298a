"""What a model answers to rows: its outputs in their order, on whatever device it is."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UsageError
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
) -> np.ndarray:
    """Outputs (rows, outputs) in the order of the rows; rows of like length go together, which spares padding.

    Raises:
        UsageError: Outputs that are not finite.
    """
    order = np.argsort([-len(feature["input_ids"]) for feature in features], kind="stable")
    starts = range(0, len(order), batch_size)
    training, found = model.training, []
    model.eval()
    with torch.inference_mode(), _autocast(model, bf16):
        for start in progress_bar(starts, desc="predicting", unit="batch") if progress else starts:
            batch = tokenizer.pad([features[i] for i in order[start : start + batch_size]], return_tensors="pt")
            outputs = model(**batch.to(model.device)).logits
            found.append(outputs.double().cpu().numpy())
    model.train(training)
    values = np.concatenate(found)
    if not np.isfinite(values).all():
        raise UsageError("the model's outputs are not numbers: training diverged. Lower lr or raise warmup.")
    return values[np.argsort(order)]


@contextlib.contextmanager
def _autocast(model: PreTrainedModel, bf16: bool) -> Iterator[None]:
    with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
        yield
