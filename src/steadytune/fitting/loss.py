"""The loss of a `fit`: class weights, label smoothing, focal loss, and probabilities in the place of labels.

With l the loss of a row (cross entropy), w the weight of its class, and p the probability that the model gives to the
row's label:

    smoothed labels    y <- (1 - label_smoothing) * y + label_smoothing / classes
    loss               sum of (1 - p)^focal * w * l  /  sum of w

Label smoothing: Szegedy et al., CVPR 2016, arXiv 1512.00567. Focal loss: Lin et al., ICCV 2017, arXiv 1708.02002. With
several labels a row, each label counts as a row with the two classes yes and no.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from ..data.problem import Problem
from .options import Options

SOFT = "soft"  # column of training rows: probabilities (classes) to learn in place of the label


def loss_of(options: Options, rows: pd.DataFrame, problem: Problem) -> Callable[..., Tensor] | None:
    """Loss as the Trainer takes it, ``(outputs, labels, num_items_in_batch) -> loss``; None for the model's own.

    Args:
        options: Their class weights, label smoothing and focal loss.
        rows: Training rows, from which the class weights are computed.
        problem: The kind of task.
    """
    if not (options.class_weights != "none" or options.label_smoothing or options.focal or SOFT in rows):
        return None
    losses_of = losses_and_total(options, rows, problem)

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        losses, total = losses_of(outputs.logits, labels)
        return losses.sum() / total

    return loss


def losses_and_total(
    options: Options, rows: pd.DataFrame, problem: Problem
) -> Callable[[Tensor, Tensor], tuple[Tensor, Any]]:
    """A function of outputs and labels that gives the losses, and what their sum is divided by.

    There is a loss for each row (rows,), or with several labels for each of them (rows, classes).

    Args:
        options: As of `loss_of`.
        rows: As of `loss_of`.
        problem: As of `loss_of`.
    """
    function = getattr(nn.functional, problem.loss)
    share, several = options.label_smoothing, problem.several
    smoothing = {"label_smoothing": share} if share and not several else {}
    balanced = options.class_weights != "none"
    each = torch.tensor(problem.class_weights(rows["label"].tolist()), dtype=torch.float32) if balanced else None

    def losses_of(logits: Tensor, labels: Tensor) -> tuple[Tensor, Any]:
        here = None if each is None else each.to(logits.device, logits.dtype)
        weights = {} if here is None else {"pos_weight" if several else "weight": here}
        targets = labels * (1 - share) + share / 2 if share and several else labels
        losses = function(logits, targets, reduction="none", **weights, **smoothing)
        exclusive = here is not None and not several and labels.dim() == 1
        total = here[labels].sum() if here is not None and exclusive else losses.numel()
        return losses * doubt(logits, labels, several) ** options.focal if options.focal else losses, total

    return losses_of


def doubt(logits: Tensor, labels: Tensor, several: bool) -> Tensor:
    """1 - p, with p the probability that the model gives to a label, of the shape of the losses.

    Args:
        logits: Shape (rows, classes).
        labels: Class numbers (rows,) or probabilities of classes (rows, classes); for several labels a row 0 or 1 for
            each (rows, classes).
        several: Whether a row has several labels.
    """
    if several:
        right = (logits * (2 * labels - 1)).sigmoid()
    elif labels.dim() == 1:
        right = logits.softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    else:
        right = (logits.softmax(-1) * labels).sum(-1)
    return (1 - right).clamp(min=torch.finfo(right.dtype).eps)  # a power below 1 has no slope at 0


def chance(options: Options, problem: Problem) -> float:
    """The loss of a model that gives all classes the same probability; 0 where no such loss is to be compared with."""
    classes = problem.classes
    return math.log(classes) * (1 - 1 / classes) ** options.focal if classes else 0.0
