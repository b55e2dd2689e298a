"""Weights that live in pieces on several ranks (FSDP2), and the wrappers around a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

try:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor, Shard
except ImportError:  # a build of torch without distributed
    FSDPModule = DTensor = Shard = ()  # type: ignore[assignment,misc]


def unwrap(model: Any) -> nn.Module:
    """The model inside DistributedDataParallel and ``torch.compile`` wrappers."""
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        else:
            return model


def local(tensor: Tensor) -> Tensor:
    """This rank's piece, sharing memory; a plain tensor is its own piece."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from all ranks if it lies in pieces."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece(full: Tensor, like: Tensor) -> Tensor:
    """This rank's piece of a full-sized tensor, cut as ``like`` is; axes of size 1 that broadcast are left whole.

    Nothing is communicated: ranks may ask for different tensors (a row vector's only row lies on one rank alone).
    """
    full = full.to(like.device)
    if not isinstance(like, DTensor):
        return full
    for i, placement in enumerate(like.placements):
        if isinstance(placement, Shard) and full.size(placement.dim) == like.size(placement.dim):
            pieces = full.chunk(like.device_mesh.size(i), placement.dim)
            rank = like.device_mesh.get_local_rank(i)
            full = (pieces[rank] if rank < len(pieces) else full.narrow(placement.dim, 0, 0)).clone()
    return full


def shard_group(parameters: Sequence[Tensor]) -> dist.ProcessGroup | None:
    """The group of ranks that hold the pieces of sharded parameters; None when nothing is sharded.

    Raises:
        ValueError: parameters sharded over more than one axis of a device mesh.
    """
    for p in parameters:
        if isinstance(p, DTensor):
            axes = [i for i, placement in enumerate(p.placements) if isinstance(placement, Shard)]
            if len(axes) > 1:
                raise ValueError(
                    "parameters must be sharded over one axis of the device mesh, "
                    f"got placements {p.placements}: use fully_shard with a 1-D mesh, or replicate x shard"
                )
            if axes:
                return p.device_mesh.get_group(axes[0])
    return None


def reshard(model: nn.Module) -> None:
    """Give up full parameters that an evaluation forward left gathered: writes to the pieces would not be seen."""
    if FSDPModule == ():
        return
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather(piece: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All ranks' pieces, flattened and concatenated in rank order; pieces may differ in size and be empty."""
    flat = piece.flatten()
    sizes = [torch.zeros(1, dtype=torch.long, device=flat.device) for _ in range(dist.get_world_size(group))]
    dist.all_gather(sizes, torch.tensor([flat.numel()], device=flat.device), group=group)
    widths = [int(size) for size in sizes]
    padded = torch.cat([flat, flat.new_zeros(max(widths) - flat.numel())])
    pieces = [torch.empty_like(padded) for _ in widths]
    dist.all_gather(pieces, padded, group=group)
    return torch.cat([p[:width] for p, width in zip(pieces, widths, strict=True)])


@contextlib.contextmanager
def no_sync(wrapper: nn.Module) -> Iterator[None]:
    """Backward passes inside add to local gradients only (DDP and FSDP2); nothing changes on one process."""
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        # with a static graph torch fails inside no_sync; synced sums of micro-batches are as right, only slower
        with contextlib.nullcontext() if wrapper.static_graph else wrapper.no_sync():
            yield
    elif FSDPModule != () and isinstance(wrapper, FSDPModule):
        wrapper.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            wrapper.set_requires_gradient_sync(True)
    else:
        yield


@contextlib.contextmanager
def sync(wrapper: nn.Module) -> Iterator[None]:
    """Backward passes inside average over ranks, also where the caller is inside its own `no_sync`."""
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        before, wrapper.require_backward_grad_sync = wrapper.require_backward_grad_sync, True
        try:
            yield
        finally:
            wrapper.require_backward_grad_sync = before
    else:
        if FSDPModule != () and isinstance(wrapper, FSDPModule):
            wrapper.set_requires_gradient_sync(True)  # it stays: a micro-batch reduced too early is as right
        yield


@contextlib.contextmanager
def set_aside(parameters: Sequence[nn.Parameter], views: bool) -> Iterator[None]:
    """No ``.grad`` inside, and the same as before afterwards; ``views``: of memory that must stay theirs."""
    parked = [p.grad.clone() if views and p.grad is not None else p.grad for p in parameters]
    for p in parameters:
        p.grad = None
    try:
        yield
    finally:
        for p, before in zip(parameters, parked, strict=True):
            if views and p.grad is not None and before is not None:
                p.grad.copy_(before)
            else:
                p.grad = before
