"""Rows of a batch one by one: the loss of each, and the subgroup that a column of the batch gives it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...core import Run, Step
from ...core.step import NUMBERS, full, problem_type
from ...errors import UsageError

REPLACED = "others that take the place of the task's loss (`supcon`, `causal_head`, `meta_weight_net`, a teacher's)"
Column = str | Callable[[Mapping[str, Any]], Tensor]  # name of a column of the batch, or a function of the inputs


def row_losses(logits: Tensor, labels: Tensor, problem: str | None = None) -> Tensor:
    """Loss of the task for each row: (rows, outputs) -> (rows,).

    Args:
        logits: Outputs of the model.
        labels: One label for each row, or one for each output.
        problem: `problem_type` of the model, which tells numbers, probabilities of classes that exclude each other, and
            several labels apart where there is a label for each output. One output alone is a number.

    Raises:
        ValueError: There is neither one label per row nor one per output.
    """
    logits = full(logits)
    if logits.dim() == 2:
        alone, each = logits.size(-1) == 1, labels.shape == logits.shape
        numbers = problem == NUMBERS or (alone and problem != "multi_label_classification")
        if (alone and labels.dim() == 1) or (each and numbers):
            return (logits - labels.view_as(logits)).square().mean(-1)
        if labels.dim() == 1 or (each and problem == "single_label_classification"):
            return nn.functional.cross_entropy(logits, labels, reduction="none")
        if each:
            return nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
    raise ValueError(
        f"the loss of each row needs one label per row, or one per output; got logits {tuple(logits.shape)} and "
        f"labels {tuple(labels.shape)}: leave out methods that weigh rows"
    )


def numbers_of(inputs: Mapping[str, Any], column: Column, name: str) -> Tensor:
    """Number of the subgroup of each row (rows,), -1 for an unknown one.

    Args:
        inputs: A batch.
        column: Column of the batch.
        name: Name of the method that asks, for messages.

    Raises:
        RuntimeError: The batch does not have the column.
        ValueError: The column does not hold one whole number from -1 on for each row.
    """
    numbers = column(inputs) if callable(column) else inputs.get(column)
    if numbers is None:
        raise RuntimeError(
            f"{name} finds no column {column!r} in the batch ({', '.join(inputs)}): put the number of each row's "
            "subgroup there (-1 where it is not known), or name the column that holds it"
        )
    if numbers.dim() != 1 or numbers.is_floating_point():
        raise ValueError(f"{name} needs one whole number a row, got {numbers.dtype} of shape {tuple(numbers.shape)}")
    return numbers


def row_counts(run: Run, column: Column, name: str) -> list[int]:
    """Number of training rows of each subgroup, over the batches of `Run.data` of all processes.

    Raises:
        ValueError: The run has no data, or no row has a known subgroup.
    """
    if run.data is None:
        raise ValueError(f"{name} counts the rows of each subgroup first: pass Run(..., data=lambda: loader)")
    numbers: list[int] = []
    with run.forked_rng():
        torch.manual_seed(run.draw_seed("data"))  # so that a shuffling loader does not change the order of training
        for batch in run.data():
            for micro in [batch] if isinstance(batch, Mapping) else batch:
                numbers += numbers_of(micro, column, name).tolist()
    if dist.is_available() and dist.is_initialized():
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, numbers)
        numbers = [number for part in parts for number in part]
    if max(numbers, default=-1) < 0:
        raise ValueError(f"{name} finds no row with a known subgroup: number subgroups from 0 on")
    return torch.bincount(torch.tensor([number for number in numbers if number >= 0])).tolist()


def labels_of(inputs: Mapping[str, Any], method: object) -> Tensor:
    """The labels of a batch, which a method needs one of for each row.

    Raises:
        UsageError: The batch holds none, as in question answering.
    """
    labels = inputs.get("labels")
    if labels is None:
        name = type(method).__name__
        raise UsageError(
            f"{name} needs a label for each row, and this batch holds no 'labels' (it holds {', '.join(inputs)}): put "
            f"them there, or leave {name} out"
        )
    return labels


def losses_of(step: Step, method: Any) -> Tensor:
    """Loss of each row of a micro-batch (rows,), graph alive."""
    labels = labels_of(step.inputs, method)
    return row_losses(step.logits(step.outputs, method), labels, problem_type(step.run.model))
