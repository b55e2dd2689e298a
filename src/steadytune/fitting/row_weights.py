"""Weights of rows in the loss of a fit, for `Options.balance`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..core import Method, Step
from ..data.balance import WEIGHT
from ..methods.bases.rows import labels_of, losses_of


@dataclass
class RowWeights(Method):
    """Multiply the loss of each row by its weight: the task loss plus the mean of ``(weight - 1) * loss``.

    Args:
        losses: The losses that the task loss is a mean of, as of `loss.losses_and_total`; None for those of the model.
            With others the loss of a row could be multiplied by a negative number.
    """

    losses: Callable[[Tensor, Tensor], tuple[Tensor, Any]] | None = None

    input_columns = (WEIGHT,)
    exclusive = "weighting of rows"

    def penalty(self, step: Step) -> Tensor:
        if self.losses is None:
            losses = losses_of(step, self)
            total: Any = losses.numel()
        else:
            losses, total = self.losses(step.logits(step.outputs, self), labels_of(step.inputs, self))
        weights = step.inputs[WEIGHT].to(losses.dtype).view(-1, *[1] * (losses.dim() - 1))
        return ((weights - 1) * losses).sum() / total
