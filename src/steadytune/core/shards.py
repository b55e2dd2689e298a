"""Several processes: sharded weights (FSDP2), statistics over all shards, and wrappers of a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .tensors import kept, kth_largest

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
    """The piece of a tensor on this process, sharing its memory; a plain tensor is its own piece."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The full tensor, gathered from all processes if it is sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def piece(full: Tensor, like: Tensor) -> Tensor:
    """This process's piece of a full tensor, cut like ``like``; broadcast axes of size 1 stay whole.

    It does not communicate, so processes may cut different tensors (the only row of a row vector is on one process).
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
        ValueError: Parameters are sharded over more than one axis of a device mesh.
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
    """Free full parameters that an evaluation forward left gathered, because they would hide writes to the pieces."""
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


def rank() -> int:
    """Rank of this process, 0 when not distributed."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """Number of processes, 1 when not distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def kth(pieces: Sequence[Tensor], keep: float, group: dist.ProcessGroup | None) -> Tensor:
    """Threshold that the ``ceil(n * keep)`` largest scores reach, over all tensors and all ranks, as a 0-d tensor."""
    flat = torch.cat([p.flatten() for p in pieces]) if len(pieces) > 1 else pieces[0].flatten()
    if group is not None:
        flat = gather(flat, group)
    return kth_largest(flat, kept(flat.numel(), keep))


def norms(tensors: Sequence[Tensor], group: dist.ProcessGroup | None) -> list[Tensor]:
    """L2 norm of each tensor over all its pieces, as 0-d tensors."""
    local_norms = list(torch._foreach_norm(list(tensors))) if tensors else []
    if group is None or not local_norms:
        return local_norms
    squares = torch.stack(local_norms).square()
    dist.all_reduce(squares, group=group)
    return list(squares.sqrt().unbind())


def total_norm(gradients: Sequence[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """A norm of all gradients over all processes, as a 0-d tensor; it is finite if and only if their L2 norm is.

    In half precision it uses the largest entries, because the L2 norm of good gradients may overflow.
    """
    dense = [g.coalesce().values() if g.is_sparse else g for g in gradients]
    if any(g.dtype == torch.float16 for g in dense):
        local_norms = [torch.linalg.vector_norm(g, torch.inf) for g in dense if g.numel()]
        order = torch.inf
    else:
        local_norms, order = norms(dense, None), 2.0
    if not local_norms:
        return torch.zeros(())
    total = torch.linalg.vector_norm(torch.stack([n.to(local_norms[0].device) for n in local_norms]), order)
    if group is not None:
        dist.all_reduce(total, group=group)  # a sum: a maximum may lose NaN
    return total


def dot(first: Sequence[Tensor], second: Sequence[Tensor], group: dist.ProcessGroup | None) -> Tensor:
    """Inner product of two lists of tensors, each taken as one vector, over all their pieces, as a 0-d tensor."""
    products = [torch.dot(a.flatten(), b.flatten()) for a, b in zip(first, second, strict=True)]
    total = torch.stack(products).sum()
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def average(tensors: Sequence[Tensor]) -> None:
    """Average tensors over ranks, in place; nothing changes on one process."""
    if world() > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)
            tensor.div_(world())


@contextlib.contextmanager
def no_sync(wrapper: nn.Module) -> Iterator[None]:
    """Backward passes inside add to local gradients only (DDP and FSDP2); nothing changes on one process."""
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        # with a static graph torch fails inside no_sync; synced sums of micro-batches are also correct, only slower
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
            wrapper.set_requires_gradient_sync(True)  # it stays on: reducing a micro-batch early is also correct
        yield


@contextlib.contextmanager
def set_aside(parameters: Sequence[nn.Parameter], views: bool) -> Iterator[None]:
    """Remove all ``.grad`` inside the block and restore them; with ``views``, into the same memory."""
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
