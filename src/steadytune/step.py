"""One micro-batch on its way through the model: what a penalty sees, and copies of a batch in one forward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from . import shards

if TYPE_CHECKING:
    from .core import Run

Inputs = Mapping[str, Any]
Compute = Callable[[Any, Inputs, int], tuple[Tensor, Any]]  # (model, inputs, copies) -> (loss, outputs)


def default_compute(model: Any, inputs: Inputs, copies: int) -> tuple[Tensor, Any]:
    """The loss as a Hugging Face model computes it from its inputs."""
    outputs = model(**inputs)
    loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs[0]
    if loss is None:
        raise ValueError("the model returned no loss: pass its labels in `inputs`, or run.loss(inputs, compute=...)")
    return loss, outputs


class Step:
    """One micro-batch on its way through the model.

    Attributes:
        model: as trained (DDP, FSDP or compiled wrapper included).
        inputs: the batch, one copy.
        outputs: of the task's own forward (with several copies: of the first), graph alive.
        loss: the task loss, mean over copies, graph alive.
        index: optimizer steps taken before this one.
    """

    def __init__(
        self, run: Run, model: nn.Module, inputs: Inputs, outputs: Sequence[Any], loss: Tensor, compute: Compute
    ) -> None:
        self.model, self.inputs, self.loss = model, inputs, loss
        self.outputs = outputs[0]
        self.index = run.index
        self._run, self._copies, self._compute = run, outputs, compute
        self._second: Any = None
        self._forwards = 0

    def task_loss(self, outputs: Any) -> Tensor:
        """The loss as the trainer computes it (class weights, label smoothing ...), of other outputs of this batch."""
        return self._compute(_Given(self.model, outputs), self.inputs, 1)[0]

    def second(self) -> Any:
        """Outputs under another dropout draw: the second copy of the batch, or one extra forward, made once."""
        if len(self._copies) > 1:
            return self._copies[1]
        if self._second is None:
            self._second = self.forward()
        return self._second

    def forward(
        self,
        *,
        dropout: Literal["fresh", "same"] = "fresh",
        add: Mapping[nn.Module, Tensor] | None = None,
        **changes: Any,
    ) -> Any:
        """One more forward of this batch, under a forked random state: the task's own dropout never notices.

        Args:
            dropout: a new draw, or the draw of the task's own forward.
            add: tensors added to the output of modules, at their first call (noise on an embedding).
            **changes: inputs replaced or added.

        Raises:
            RuntimeError: ``dropout="same"`` with several copies of the batch in the task's forward.
        """
        run = self._run
        if dropout == "same" and len(self._copies) > 1:
            raise RuntimeError("dropout='same' needs the task's forward on one copy of the batch; a method asked for 2")
        self._forwards += 1
        with contextlib.ExitStack() as stack:
            stack.enter_context(run.forked_rng())
            if dropout == "same":
                run.restore_rng()
            else:
                torch.manual_seed(run.draw_seed("forward", self._forwards, len(run.batch), rank=True))
            for module, tensor in (add or {}).items():
                stack.enter_context(_added(module, tensor))
            inputs = {**self.inputs, **changes}
            if inputs.get("labels") is None:
                return self.model(**inputs)
            return self._compute(self.model, inputs, 1)[1]  # its loss is divided by the step's count, if the task's is

    def mean(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean of per-example (batch,) or per-token (batch, length) values, right under accumulation.

        With a ``mask`` and a loss that the trainer divides by the token count of the whole optimizer step, the
        penalty is divided by that count too, so that short micro-batches weigh less, as they do in the loss.
        """
        if mask is None:
            return values.mean()
        total = (values * mask).sum()
        if self._run.items is None:
            return total / mask.sum().clamp(min=1)
        return total / self._run.items / self._run.penalty_scale


class _Given(nn.Module):
    """Stands for a model whose outputs are already there."""

    def __init__(self, model: Any, outputs: Any) -> None:
        super().__init__()
        inner: Any = shards.unwrap(model)
        if hasattr(inner, "peft_config"):
            inner = inner.base_model.model
        self._name, self._outputs = inner._get_name(), outputs

    def forward(self, **inputs: Any) -> Any:
        return self._outputs

    def _get_name(self) -> str:
        return self._name


@contextlib.contextmanager
def _added(module: nn.Module, tensor: Tensor) -> Iterator[None]:
    """Add a tensor to the output of a module's first call (an encoder-decoder may call its embedding twice)."""
    calls = 0

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        nonlocal calls
        calls += 1
        return output + tensor if calls == 1 else None

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def repeated(inputs: Inputs, copies: int) -> dict[str, Any]:
    """The batch several times over along its first axis; what is no batch-first tensor is passed on."""
    size = batch_size(inputs)
    return {
        k: torch.cat([v] * copies) if isinstance(v, Tensor) and v.dim() and v.size(0) == size else v
        for k, v in inputs.items()
    }


def batch_size(inputs: Inputs) -> int:
    """Examples of a batch: the first axis of its first tensor that has one."""
    for value in inputs.values():
        if isinstance(value, Tensor) and value.dim():
            return value.size(0)
    raise ValueError(f"inputs must hold a tensor with a batch axis, got keys {sorted(inputs)}")


def split(outputs: Any, copies: int, size: int) -> list[Any]:
    """Outputs of a repeated batch, one object of the same kind per copy; without its loss, the mean over copies."""
    if copies == 1:
        return [outputs]

    def take(value: Any, i: int) -> Any:
        if isinstance(value, Tensor) and value.dim() and value.size(0) == copies * size:
            return value[i * size : (i + 1) * size]
        if isinstance(value, tuple | list):
            return type(value)(take(v, i) for v in value)
        return value

    if isinstance(outputs, Mapping):
        return [type(outputs)(**{k: take(v, i) for k, v in outputs.items() if k != "loss"}) for i in range(copies)]
    return [take(outputs, i) for i in range(copies)]
