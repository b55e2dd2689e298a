"""Base of methods that train extra weights beside the head; checkpoints of the model do not contain them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Generic, Literal, TypeVar

import torch
from torch import nn

from ...core import Method, Run, Scope, Weight
from ...core.checks import check_unwrapped
from .groups import PER_PARAMETER


class Beside(nn.Module):
    """Module whose weights train with a model, but are not in its state dict; a method stores them."""

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None: ...

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None: ...


B = TypeVar("B", bound=Beside)


class BesideHead(Method, Generic[B]):
    """Base of methods with a `Beside` module at the last linear layer of a classifier, active in training mode only.

    The model that is evaluated, saved and loaded is therefore a plain one. The extra weights are part of the state of
    the run. They join the optimizer in `attach`, unless the optimizer was built after the run, with the options of the
    head's own group (learning rate, decay).

    Attributes:
        place: Name of the module in the model.
    """

    place: ClassVar[str]
    handle: Any = None  # of the hook on the head, while there is one
    adds_weights: ClassVar = True
    acts_on_unread: ClassVar[Literal["never", "in scope", "always"]] = "never"

    def build(self, head: Any) -> B:
        """Build the module for the head's last layer, with equal weights on all processes."""
        raise NotImplementedError

    @property
    def scope(self) -> Scope:
        """The weights beside the model."""
        return lambda w: w.name.startswith(f"{self.place}.")

    def hook(self, head: nn.Module) -> Any:
        """Register the module's hook on the head and return its handle; by default there is none."""
        return None

    def setup(self, run: Run) -> None:
        check_unwrapped(run.wrapper, type(self).__name__)
        heads = [w for w in run.weights(self) if w.head and w.kind == "linear"]
        if not heads:
            raise ValueError(
                f"{type(self).__name__} acts on the last layer of a classification head, but this model has no "
                f"trainable one: use a model for classification, or leave {type(self).__name__} out"
            )
        self.head = run.model.get_submodule(heads[-1].name.rpartition(".")[0])
        self.beside: B = self.build(self.head).to(heads[-1].data)
        run.model.add_module(self.place, self.beside)

    def attach(self, run: Run) -> None:
        optimizer: Any = run.optimizer
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        missing = [(f"{self.place}.{n}", p) for n, p in self.beside.named_parameters() if id(p) not in groups]
        if missing:
            like = groups.get(id(self.head.weight), {})
            named = "param_names" in optimizer.param_groups[0]
            options = {key: value for key, value in like.items() if key not in PER_PARAMETER}
            optimizer.add_param_group({**options, "params": missing if named else [p for _, p in missing]})

    def before_forward(self, run: Run, weights: Sequence[Weight]) -> None:
        if run.sharded:
            raise RuntimeError(
                f"{type(self).__name__} keeps weights beside the model, but these are sharded (FSDP2): use "
                "DistributedDataParallel"
            )
        if self.handle is None:
            self.handle = self.hook(self.head)

    def release(self, run: Run) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def state_dict(self) -> dict[str, Any]:
        return {"beside": {name: p.detach() for name, p in self.beside.named_parameters()}}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, p in self.beside.named_parameters():
            p.copy_(state["beside"][name])
