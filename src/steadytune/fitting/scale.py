"""Units of numbers, and the temperature of probabilities."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import UsageError
from ..heads.features import last_linear


def output_layer(model: Any, what: str) -> nn.Linear:
    """The last linear layer with one output per label, for an option that needs it.

    Raises:
        UsageError: The model has none; the message names the option.
    """
    layer = last_linear(model)
    if layer is None:
        raise UsageError(f"{what}: a {model.config.model_type} model has no linear output layer: switch it off.")
    return layer


def rescale(model: Any, spread: float, mean: float, what: str) -> None:
    """Change the output layer so that outputs become ``spread * outputs + mean``.

    Raises:
        UsageError: The model's outputs do not come from one linear layer.
    """
    layer = output_layer(model, what)
    with torch.no_grad():
        layer.weight.mul_(spread)
        if layer.bias is not None:
            layer.bias.mul_(spread).add_(mean)


def temperature(logits: np.ndarray, labels: Sequence[int]) -> float:
    """The temperature in [0.05, 20] under which the labels are most probable (Guo et al., ICML 2017, arXiv 1706.04599).

    Args:
        logits: (rows, classes).
        labels: Class numbers.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    rows = np.arange(len(labels))
    minimum = minimize_scalar(
        lambda power: -log_softmax(logits / np.exp(power), axis=1)[rows, labels].mean(),
        bounds=(math.log(0.05), math.log(20)),
        method="bounded",
    )
    return float(np.exp(minimum.x))


def check_scale(model: Any, feature: dict[str, Any], what: str) -> None:
    """Check on one row that `rescale` works with this model, then restore its weights.

    Args:
        model: The model to train; a model with adapters is not checked.
        feature: A tokenised row.
        what: The option that needs it, named in errors.

    Raises:
        UsageError: The logits are computed in another way.
    """
    if hasattr(model, "peft_config"):
        return
    inputs = {k: torch.tensor([v], device=next(model.parameters()).device) for k, v in feature.items() if k != "labels"}

    def outputs() -> torch.Tensor:
        with torch.inference_mode():
            return model(**inputs).logits

    training = model.training
    model.eval()
    before = outputs()
    rescale(model, 0.5, 0.0, what)
    after = outputs()
    rescale(model, 2.0, 0.0, what)  # powers of two: exact
    model.train(training)
    if not torch.allclose(2 * after, before, rtol=1e-4, atol=1e-6):
        raise UsageError(f"{what}: the logits of this model are not those of its last linear layer: switch it off.")
