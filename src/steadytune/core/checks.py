"""Checks for combinations that cannot work. Each error names the thing, the rule, the value and the remedy."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UsageError
from .method import entry, in_setup_order

if TYPE_CHECKING:
    from .method import Method, Weight

DROPOUT_FIELDS = ("p", "drop_prob", "dropout", "dropout_p", "dropout_prob", "attention_dropout", "activation_dropout")


def check_dropout(model: nn.Module, name: str) -> None:
    """Raise for a model without active dropout, on behalf of the method ``name``."""
    values = (getattr(module, field, None) for module in model.modules() for field in DROPOUT_FIELDS)
    if not any(isinstance(v, float) and 0 < v < 1 for v in values):
        raise ValueError(
            f"{name} compares two dropout draws, but this model has no active dropout, so they would be equal: set "
            f"dropout in the model's config (or lora_dropout), or leave {name} out"
        )


PREFIXED = ("PREFIX_TUNING", "CARTRIDGE")  # kinds of PEFT's prompts that act on keys and values, not as tokens


def check_lengths(model: Any, name: str) -> None:
    """Raise where PEFT puts vectors of its own before the tokens, on behalf of the method ``name``."""
    for config in getattr(model, "peft_config", {}).values():
        if config.is_prompt_learning and config.peft_type not in PREFIXED:
            raise ValueError(
                f"{name} compares hidden states token by token, and {config.peft_type.value} puts vectors before the "
                "tokens of the batch: use prefix tuning or LoRA, or R3F or SMART"
            )


def check_layout(model: Any, what: str) -> None:
    """Raise for a model whose modules have the batch second (XLNet), on behalf of ``what`` is done by axis."""
    if getattr(getattr(model, "config", None), "model_type", None) == "xlnet":
        raise UsageError(f"{what} needs outputs of shape (batch, length, width), XLNet's have the batch second")


def check_hidden_states(model: Any, name: str) -> None:
    """Raise for a model that cannot be asked for its hidden states, on behalf of the method ``name``."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    parameters = inspect.signature(inner.forward).parameters
    if "output_hidden_states" not in parameters and all(p.kind is not p.VAR_KEYWORD for p in parameters.values()):
        raise UsageError(
            f"{name} compares hidden states, and {type(inner).__name__}.forward() does not take output_hidden_states: "
            "let it take output_hidden_states=True and return 'hidden_states', or use R3F or SMART"
        )


def check_model(model: nn.Module) -> None:
    """Raise for DataParallel."""
    if isinstance(model, nn.DataParallel):
        raise ValueError(
            "torch.nn.DataParallel is not supported: its replicas race on the methods' state. "
            "Use torchrun (DistributedDataParallel), or one device with CUDA_VISIBLE_DEVICES=0"
        )


def check_unwrapped(wrapper: Any, name: str) -> None:
    """Raise for a model inside DistributedDataParallel, on behalf of the method ``name``, which adds weights."""
    if isinstance(wrapper, nn.parallel.DistributedDataParallel):
        raise ValueError(
            f"{name} adds weights to the model, which DistributedDataParallel would not average: make the Run of the "
            "bare model, then wrap the model and call run.loss(batch, model=wrapper)"
        )


def check_order(methods: Sequence[Any]) -> None:
    """Raise for a method that changes the model after another one has read its weights."""
    for earlier, later in pairwise(methods):
        if later.structure and not earlier.structure:
            first, second = type(later).__name__, type(earlier).__name__
            raise ValueError(
                f"{first} changes the model or what of it is trained, after {second} has looked at its weights: put "
                f"{first} before {second} in the list"
            )


def check_last(methods: Sequence[Method], added: Method) -> None:
    """Raise for a method that would have been set up before those that a Run has already."""
    last = in_setup_order([*methods, added])[-1]
    if last is not added:
        name, other = type(added).__name__, type(last).__name__
        raise UsageError(
            f"{name} changes the model or its weights in setup, after {other} has looked at them: give {name} to "
            "Run(model, methods) in its list, not to run.append()"
        )


def loss_left(methods: Sequence[Method]) -> float:
    """Share of the task's loss that is left beside the losses that methods put in its place.

    Raises:
        UsageError: They take more than there is, so that the task's loss would be raised.
    """
    taking = [m for m in methods if m.loss_taken]
    left = 1 - sum(m.loss_taken for m in taking)
    if left < -1e-9:
        shares = ", ".join(f"{type(m).__name__} {m.loss_taken:g}" for m in taking)
        raise UsageError(
            f"methods that put another loss in the place of the task's can take 1 of it together, these take more "
            f"({shares}), so that training would raise it: leave one of them out, or lower their shares"
        )
    return max(0.0, left)


def check_structure(methods: Sequence[Method], wrapped: bool) -> None:
    """Raise for a method that changes a wrapped model, because the wrapper has already read the weights."""
    changing = [type(m).__name__ for m in methods if m.structure]
    if changing and wrapped:
        raise ValueError(
            f"{changing[0]} changes the model, which is wrapped or sharded already: make Run(model, methods), then "
            "wrap the model, and give the wrapper to run.loss(batch, model=wrapper)"
        )


def check_added(added: Iterable[str], model: nn.Module, optimizer: Optimizer) -> None:
    """Raise for an optimizer that was built before methods ``added`` weights, which it would not train.

    What a later method has frozen need not be in it.
    """
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    trained = ((name, model.get_parameter(name)) for name in added)
    lost = sorted(name for name, p in trained if p.requires_grad and id(p) not in held)
    if lost:
        raise ValueError(
            f"the optimizer does not hold {lost[0]!r}, which a method added or drew anew: make Run(model, methods) "
            "first, then the optimizer from model.parameters(), then run.attach(optimizer)"
        )


def check_exclusive(claims: Iterable[tuple[Method, Sequence[Weight], bool]]) -> None:
    """Raise if two methods of the same exclusive kind act on a weight.

    Args:
        claims: Method, weights that it acts on, and whether `only` can restrict it.
    """
    owners: dict[tuple[str, str], Method] = {}
    for method, weights, restrictable in claims:
        if method.exclusive is None:
            continue
        article = "an" if method.exclusive[0] in "aeiou" else "a"
        for w in weights:
            other = owners.setdefault((method.exclusive, w.name), method)
            if other is not method:
                apart = ", or keep them apart with only()" if restrictable else ""
                raise ValueError(
                    f"{type(other).__name__} and {type(method).__name__} are both {article} {method.exclusive} of "
                    f"{w.name!r}, a weight can have one: remove one{apart}"
                )


def check_shapes(before: Mapping[str, Sequence[int]], model: nn.Module) -> None:
    """Raise for a model that was resized after the run was made (``before``: shapes by weight name)."""
    for name, p in model.named_parameters():
        if name in before and tuple(p.shape) != tuple(before[name]):
            raise UsageError(
                f"{name!r} had shape {tuple(before[name])} when Run(model, methods) was made and has {tuple(p.shape)} "
                "now: resize the model first (resize_token_embeddings), then make the Run, then the optimizer"
            )


def check_targets(inputs: Mapping[str, Any]) -> None:
    """Raise for NaN in numeric labels. Labels on a device are not checked, because that would wait for the device."""
    labels = inputs.get("labels")
    if isinstance(labels, Tensor) and labels.is_floating_point() and labels.is_cpu and bool(labels.isnan().any()):
        row = int(labels.isnan().nonzero()[0, 0]) if labels.dim() else 0
        raise UsageError(
            f"the label of row {row} of this batch is NaN (labels of shape {tuple(labels.shape)}): give each row a "
            "number, or leave the row out"
        )


def check_wrapper(wrapper: Any) -> None:
    """Raise for a wrapper that does not see changes of weights, or cannot accumulate."""
    check_model(wrapper)
    if getattr(wrapper, "static_graph", False) and not getattr(wrapper, "require_backward_grad_sync", True):
        raise RuntimeError(
            "DistributedDataParallel(static_graph=True) cannot accumulate gradients inside no_sync() (torch fails in "
            "the backward pass): use static_graph=False, or one micro-batch per step"
        )
    inductor = sys.modules.get("torch._inductor.config")
    if hasattr(wrapper, "_orig_mod") and getattr(inductor, "freezing", False):
        raise RuntimeError(
            "torch._inductor.config.freezing bakes weights into the compiled graph, so that changes by methods are "
            "not seen: set it to False"
        )


def check_optimizer(optimizer: Any) -> None:
    """Raise for an optimizer that methods cannot work with."""
    kind = type(optimizer)
    if kind.__module__.split(".")[0] == "deepspeed":
        raise ValueError("DeepSpeed ZeRO flattens weights before the methods can see them: use DDP or FSDP2")
    if not isinstance(optimizer, Optimizer):
        raise ValueError(f"attach() needs a torch.optim.Optimizer, got {kind.__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise ValueError("LBFGS evaluates the loss several times in one step: use a first-order optimizer")


class Scheduled:
    """What a learning-rate scheduler has read of an optimizer: which weights each group holds, and at which rate.

    Args:
        optimizer: The optimizer before `Method.attach`. Without a scheduler everything may change.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._before: list[tuple[dict[str, Any], dict[str, Any]]] = []
        if any("initial_lr" in group for group in optimizer.param_groups):
            self._before = [(group, dict(group)) for group in optimizer.param_groups]

    def check(self, method: str) -> None:
        """Put the groups back and raise if ``method`` has changed what the scheduler goes by."""
        groups = self._optimizer.param_groups
        if not self._before or _read(groups) == _read(held for _, held in self._before):
            return
        for group, held in self._before:
            group.clear()
            group.update(held)
        groups[:] = [group for group, _ in self._before]
        raise RuntimeError(
            f"a learning-rate scheduler was built before attach(), and {method} then changed which weights the "
            "optimizer's groups hold or at which rates, of which the scheduler knows nothing: call "
            "run.attach(optimizer) first, then build the scheduler. A Trainer gets optimizers=(optimizer, None), and "
            "builds the scheduler in create_scheduler"
        )


def _read(groups: Iterable[Mapping[str, Any]]) -> list[tuple[float, list[int]]]:
    """Rate and weights of each group."""
    return [(float(group.get("lr", 0.0)), [id(p) for p in group["params"]]) for group in groups]


def check_methods(methods: Sequence[Method], saved: Sequence[Mapping[str, Any]]) -> None:
    """Raise, naming the difference, unless a state was saved by these methods (see `steadytune.core.method.entry`)."""
    here = [entry(m) for m in methods]
    names, theirs = [r["name"] for r in here], [r["name"] for r in saved]
    if names != theirs:
        raise ValueError(f"the state was saved by the methods {theirs}, this run has {names}: resume with the same")
    for method, mine, other in zip(methods, here, saved, strict=True):
        other = {**method.implied, **other}
        for field in sorted({*mine, *other}):
            if mine.get(field) != other.get(field):
                raise ValueError(
                    f"{mine['name']}.{field} was {other.get(field)!r} when the state was saved and is "
                    f"{mine.get(field)!r} here: resume with the same methods"
                )


def has_stepped(optimizer: Optimizer) -> bool:
    """Whether the optimizer has taken a step. State alone is no sign: Adagrad makes its state before the first step."""
    return any(float(state.get("step", 1)) != 0 for state in optimizer.state.values() if state)
