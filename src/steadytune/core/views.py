"""The three views of each weight, of which one is live (in the model) and the others are stored.

R, raw: the optimizer moves it. F, forward: the forward uses it. E, evaluated: live between steps.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..functional import mix
from . import shards
from .method import Weight
from .tensors import boolean, checksum, exchange, put_back


class Views:
    """Stores raw weights while others are in the model, averages while they are not in use, and frozen entries.

    Attributes:
        averages: Tensors of the averaging method by weight name. They contain R between steps and E during a step.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.averages: dict[str, Tensor] = {}
        self._raw: dict[str, Tensor] = {}  # R of weights whose live values are others; empty between steps
        self._frozen: dict[str, Tensor] = {}  # masks by weight name, False where the weight stays
        self._frozen_state: dict[str, Tensor] = {}  # the same for the optimizer state of the weight
        self._held: list[tuple[Tensor, Tensor, Tensor]] = []  # (live tensor, mask of what may change, copy)
        self._pulls: list[tuple[Tensor, Tensor | None, Tensor | float]] = []  # (live tensor, anchor, share of the way)

    def live(self, name: str) -> Tensor:
        """The live values of a weight."""
        return shards.local(self.model.get_parameter(name).detach())

    def raw(self, name: str, *, stepping: bool) -> Tensor:
        """R of a weight, during a step or between steps."""
        held = (self._raw if stepping else self.averages).get(name)
        return self.live(name) if held is None else held

    def show(self, weight: Weight, value: Tensor, *, own: bool) -> None:
        """Make ``value`` live and store R. With ``own``, the tensor itself replaces the weight's memory if possible."""
        name, live = weight.name, weight.data
        if own and name not in self._raw and self._movable(name) and alike(value, live):
            self._raw[name] = self._place(name, value)
        else:
            self._keep(weight)
            weight.data.copy_(value)

    def mix(self, weight: Weight, anchor: Tensor, mask: Tensor, keep: float) -> None:
        """Make a mixture of ``anchor`` and the live values live, and store R."""
        given = self._keep(weight)
        mix(anchor, given, mask, keep, out=weight.data)

    def _keep(self, weight: Weight) -> Tensor:
        """Store R once, and return the values that were live. The caller then writes the live tensor."""
        name = weight.name
        if name in self._raw:
            return weight.data
        if self._movable(name):
            self._raw[name] = self._place(name, torch.empty_like(weight.data))
        else:
            self._raw[name] = weight.data.clone()
        return self._raw[name]

    def restore(self) -> None:
        """Make R live."""
        for name, raw in self._raw.items():
            if self._movable(name):
                self._place(name, raw)
            else:
                self.live(name).copy_(raw)
        self._raw = {}
        torch.clear_autocast_cache()

    def exchange(self) -> None:
        """Swap live weights and averages: E -> R at the start of a step, R -> E at its end."""
        for name, other in self.averages.items():
            if self._movable(name):
                self.averages[name] = self._place(name, other)
            else:
                exchange(self.live(name), other)
        torch.clear_autocast_cache()

    @contextlib.contextmanager
    def moved(self, moves: Iterable[tuple[Weight, Tensor]]) -> Iterator[None]:
        """Add a tensor to each live weight, in place; at the end the weights are as before, bit for bit."""
        held: list[tuple[Tensor, Tensor]] = []
        try:
            for weight, move in moves:
                live = weight.data
                held.append((live, live.clone()))
                live.add_(move)
            torch.clear_autocast_cache()
            yield
        finally:
            for live, before in reversed(held):  # two weights may share memory, so the earliest copy comes last
                live.copy_(before)
            torch.clear_autocast_cache()

    def evaluate(self, averaged: Mapping[str, Tensor | float]) -> None:
        """Make E live: the given tensors, or running averages updated with the given rates."""
        for name in averaged:
            if name not in self.averages:
                copy = self.live(name).clone()
                self.averages[name] = self._place(name, copy) if self._movable(name) else copy
        self.averages = {name: self.averages[name] for name in averaged}
        for name, value in averaged.items():
            if isinstance(value, Tensor):
                self.averages[name].copy_(value)
            else:
                self.averages[name].lerp_(self.live(name), value)
        self.exchange()

    def _movable(self, name: str) -> bool:
        """Whether another tensor may replace a weight's memory during a step, which saves copies.

        This is possible only on a CPU, where no recorded graph contains addresses, and for weights that share their
        memory with no other tensor. Between steps each weight is in its own memory again, so code outside a step sees
        no difference.
        """
        p = self.model.get_parameter(name)
        return p.device.type == "cpu" and not p.is_shared() and name in self._alone

    @cached_property
    def _alone(self) -> set[str]:
        """Names of unsharded weights that share their memory with no other tensor of the model."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        owners = Counter(shards.local(t.detach()).untyped_storage().data_ptr() for t in tensors)
        names = set()
        for name, p in self.model.named_parameters():
            live = p.detach()
            storage = shards.local(live).untyped_storage()
            if shards.local(live) is live and owners[storage.data_ptr()] == 1 and storage.nbytes() == live.nbytes:
                names.add(name)
        return names

    def _place(self, name: str, tensor: Tensor) -> Tensor:
        """Replace a weight's memory by that of a tensor; return the former tensor."""
        p = self.model.get_parameter(name)
        live = p.detach()
        p.data = tensor
        torch.autograd.graph.increment_version(p)  # so that a backward pass through the old values fails
        return live

    def freeze(self, weight: Weight, mask: Tensor, *, state: bool = True) -> None:
        """Freeze the entries where ``mask`` is False in this step; masks of several calls intersect."""
        for frozen in (self._frozen, self._frozen_state) if state else (self._frozen,):
            other = frozen.get(weight.name)
            if other is not None:
                mask = boolean(mask, weight.data.shape) & boolean(other, weight.data.shape)
            frozen[weight.name] = mask

    def hold(self, weights: Sequence[Weight], optimizer: Optimizer) -> None:
        """Copy weights with frozen entries, and their optimizer state.

        It copies whole tensors, because gathering the entries alone takes ten times as long.

        Raises:
            ValueError: The optimizer state is packed or factored.
        """
        for w in weights:
            if w.name in self._frozen:
                self._hold(w.data, self._frozen[w.name])
            if w.name in self._frozen_state:
                self._hold_state(w, self._frozen_state[w.name], optimizer)
        self._frozen, self._frozen_state = {}, {}

    def _hold_state(self, weight: Weight, mask: Tensor, optimizer: Optimizer) -> None:
        for key, value in optimizer.state.get(self.model.get_parameter(weight.name), {}).items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                continue
            value = shards.local(value)
            if value.shape != weight.data.shape:
                raise ValueError(
                    f"frozen=True needs optimizer state of the weight's shape; {type(optimizer).__name__} "
                    f"keeps {key!r} of shape {tuple(value.shape)} for {weight.name!r} {tuple(weight.data.shape)}: use "
                    "AdamW or SGD, or frozen=False"
                )
            self._hold(value, mask)

    def _hold(self, live: Tensor, mask: Tensor) -> None:
        """Copy a tensor, unless it is on a CPU and all its entries may change; on a device that check would wait."""
        if mask.dim() or not mask.is_cpu or not mask:
            self._held.append((live, mask, live.clone()))

    def pull_later(self, weight: Weight, share: Tensor | float, anchor: Tensor | None) -> None:
        """Note a pull for `pull`."""
        self._pulls.append((weight.data, anchor, share))

    def pull(self) -> None:
        """Move weights toward their anchors, or toward zero, in the order in which that was asked for."""
        for live, anchor, share in self._pulls:
            if anchor is None:
                live.mul_(1 - share)
            else:
                live.lerp_(anchor, share)
        self._pulls = []

    def put_back(self) -> None:
        """Restore frozen entries; the earliest copy counts."""
        for live, mask, before in reversed(self._held):
            put_back(live, before, mask)
        self._held = []

    def abandon(self) -> None:
        """Make E live in the middle of a step that will not be taken."""
        self.restore()
        self.exchange()
        self._frozen, self._frozen_state, self._held, self._pulls = {}, {}, [], []

    def tensors(self) -> list[Tensor]:
        """All stored tensors."""
        return [*self.averages.values(), *self._raw.values(), *(before for _, _, before in self._held)]


def alike(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same strides, and the first one fills its memory alone."""
    return (
        (tensor.shape, tensor.stride(), tensor.dtype) == (other.shape, other.stride(), other.dtype)
        and tensor.device == other.device
        and tensor.untyped_storage().nbytes() == tensor.nbytes
        and not tensor.requires_grad
    )


class References:
    """Pre-trained weights, copied in setup only: on resume, later copies would be of half-trained weights."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.open = False  # whether new references may be copied
        self.tensors: dict[str, Tensor] = {}
        self.checksums: dict[str, str] = {}

    def __getitem__(self, name: str) -> Tensor:
        live = self.model.get_parameter(name).detach()
        if name not in self.tensors:
            if not self.open:
                raise RuntimeError(f"the reference of {name!r} must be asked for in setup(), before training starts")
            self.tensors[name] = shards.local(live).clone()
            self.checksums[name] = checksum(shards.whole(live))  # the same before and after sharding
        held, here = self.tensors[name], shards.local(live)
        if held.device != here.device or held.shape != here.shape:  # moved or sharded since
            held = self.tensors[name] = shards.piece(held, live)
        return held

    def check(self, saved: Mapping[str, str]) -> None:
        """Raise unless the references have the saved checksums."""
        for name, value in saved.items():
            if self.checksums.get(name) != value:
                path = getattr(getattr(self.model, "config", None), "_name_or_path", "") or "unnamed"
                raise ValueError(
                    f"the reference of {name!r} differs from the one the run started with: the model given ({path}) "
                    "is not the pre-trained one. Give the base model, not a checkpoint of the run; trained weights "
                    "come from the checkpoint"
                )
