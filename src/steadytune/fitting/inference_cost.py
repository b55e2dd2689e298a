"""What a model costs in use: its weights, the zeros among them, and the operations of a forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..core.anatomy import anatomy
from ..heads.features import evaluating


@dataclass(frozen=True)
class InferenceCost:
    """What a model costs in use.

    Attributes:
        weights: Number of weights.
        linear: Number of weights of linear matrices.
        zeros: Number of zeros among the latter.
        flops: Floating-point operations of matrix products for one row (a multiplication and an addition are two).
        sparse_flops: The same without those on zeros of linear matrices. No stock kernel saves them: it is what a
            runtime for sparse matrices might save at best.
        length: Number of tokens of the row.
    """

    weights: int
    linear: int
    zeros: int
    flops: int
    sparse_flops: int
    length: int

    @property
    def sparsity(self) -> float:
        """Share of zeros in the linear matrices."""
        return self.zeros / self.linear if self.linear else 0.0

    def __str__(self) -> str:
        return (
            f"{self.weights:,} weights, {self.sparsity:.1%} zeros in the linear matrices; {self.flops / 1e6:,.1f} "
            f"million operations for {self.length} tokens, {self.sparse_flops / 1e6:,.1f} without those on zeros"
        )


def inference_cost(model: Any, length: int = 128) -> InferenceCost:
    """Count what a model costs in use; its weights, mode and random state do not change.

    Args:
        model: A transformers model with a token embedding.
        length: Number of tokens of the row that is counted.
    """
    parts = anatomy(model)
    matrices = {name: p for name, p in model.named_parameters() if parts[name].kind == "linear"}
    zeros = {name: int((p == 0).sum()) for name, p in matrices.items()}
    skipped = 0
    handles = []

    def count(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        nonlocal skipped
        rows = output.numel() // output.shape[-1]
        skipped += 2 * rows * int((module.get_parameter("weight") == 0).sum())

    names = {name.rpartition(".")[0] for name in matrices if name.endswith(".weight")}
    for name in names:
        handles.append(model.get_submodule(name).register_forward_hook(count))
    ids = torch.ones((1, length), dtype=torch.long, device=next(model.parameters()).device)
    try:
        with torch.no_grad(), evaluating(model), FlopCounterMode(display=False) as counter:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        for handle in handles:
            handle.remove()
    flops = counter.get_total_flops()
    return InferenceCost(
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in matrices.values()),
        sum(zeros.values()),
        flops,
        flops - skipped,
        length,
    )
