"""Guards of a step under way: weights that somebody else writes, a second Run, a loss or hooks that nobody saw."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ..precision import wide
from . import shards
from .method import Method, overrides
from .watch import Watch, renormalised

if TYPE_CHECKING:
    from .run import Run

logger = logging.getLogger(__name__)
ATTACHED: weakref.WeakSet[Run] = weakref.WeakSet()  # all Runs from `attach` to `finish`


def leave_others(run: Run, parameters: Iterable[nn.Parameter], *, supersede: bool = False) -> None:
    """End the steps of other Runs on these weights; with ``supersede`` they can take no further step."""
    mine = {id(p) for p in parameters}
    for other in list(ATTACHED):
        assert other.optimizer is not None
        held = (id(p) for group in other.optimizer.param_groups for p in group["params"])
        if other is run or mine.isdisjoint(held):
            continue
        if other.stepping:
            logger.warning(
                "Another Run is in the middle of a step on this model: the step is abandoned (run.leave()), and "
                "the model holds its evaluated weights again. Gradients stay as they are."
            )
            other.leave()
        other.release()
        other.superseded = other.superseded or supersede


def refuse_saving(model: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Hook on ``model.state_dict()`` in a step: raise where it would give what the forward sees."""
    if any(run.model is model and run.showing_others for run in list(ATTACHED)):
        raise RuntimeError(
            "model.state_dict() in the middle of a step: the model holds what the methods show to the forward, not "
            "the weights to evaluate. Take the step, or call run.leave() first"
        )


def check_untouched(watch: Watch, model: nn.Module, used_up: Callable[[], bool]) -> None:
    """Raise if weights moved in the middle of a step, which only ``optimizer.step()`` may do, whose hooks end it.

    Args:
        watch: Of the weights since the forward view was built.
        model: The model without wrappers.
        used_up: Whether the step's gradients are gone, so that another optimizer may have taken the step.
    """
    moved = watch.written()
    if moved in renormalised(model):
        moved = None
    if moved is None and used_up():
        moved = watch.differs()
    if moved is not None:
        raise RuntimeError(
            f"{moved!r} was changed in the middle of a step, and no step of the attached optimizer was counted: "
            "another optimizer (a copy, a wrapper that calls no hooks) took the step, or weights were loaded. "
            "Attach the optimizer that steps; before weights are loaded call run.leave()"
        )


def check_averages(watch: Watch, names: Iterable[str]) -> None:
    """Raise if weights of these names, which hold averages between steps, were written: the change would be lost."""
    moved = watch.written(names)
    if moved is not None:
        raise RuntimeError(
            f"{moved!r} was changed between two steps, while the model holds its average: the change would be "
            "lost. Load the state of the Run with the weights (run.load_state_dict), or call run.restart()"
        )


def check_unseen(methods: Sequence[Method]) -> None:
    """Raise for methods that act through ``run.loss``, in a step without it: it would be taken without them."""
    lost = [
        type(m).__name__
        for m in methods
        if overrides(m, "penalty") or overrides(m, "before_batch") or overrides(m, "after_backward") or m.copies > 1
    ]
    if lost:
        raise RuntimeError(
            f"{', '.join(lost)} changed nothing in this step, as its loss was not computed by run.loss(batch): use "
            "that, not run.enter() and a call of the model"
        )


def unscale(optimizer: Any) -> None:
    """A fused optimizer under GradScaler unscales inside its kernel: too late for statistics and masks."""
    scale = getattr(optimizer, "grad_scale", None)
    if scale is None:
        return
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    torch._foreach_mul_([shards.local(g) for g in gradients], wide(scale).reciprocal().float())
    optimizer.grad_scale = None


def drop_gradients(optimizer: Optimizer) -> None:
    """Take the gradients away, which every optimizer passes over: no moment decays."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = None


def guard_hooks() -> None:
    """Let compiled code look at hooks, by which methods act on the forward.

    By default torch takes a graph of an earlier model of the same class, or of this one before it had hooks, and the
    method does nothing. Graphs that were compiled so are forgotten, once in a process.
    """
    config: Any = sys.modules.get("torch._dynamo.config")  # not imported: nothing was compiled yet
    if getattr(config, "skip_nnmodule_hook_guards", False):
        config.skip_nnmodule_hook_guards = False
        torch._dynamo.reset()
