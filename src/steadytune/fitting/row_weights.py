"""Weights of rows in the loss of a fit, for `Options.balance`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..core import Method, Step
from ..data.balance import WEIGHT
from ..methods.bases.rows import losses_of


@dataclass
class RowWeights(Method):
    """Multiply the loss of each row by its weight: the task loss plus the mean of ``(weight - 1) * loss``."""

    input_columns = (WEIGHT,)
    exclusive = "weighting of rows"

    def penalty(self, step: Step) -> Tensor:
        losses = losses_of(step, self)
        return ((step.inputs[WEIGHT].to(losses.dtype) - 1) * losses).mean()
