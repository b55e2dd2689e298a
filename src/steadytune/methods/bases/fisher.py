"""Fisher information of weights: mean squared gradients of the log-likelihood, and how sure the estimate is.

With g(x, y) the gradient of the loss of row x with label y, and p(y | x) the model's prediction:

    true       F = mean over rows of g(x, y)^2, y the label in the table: the empirical Fisher information
    sampled    F = mean over rows of g(x, y)^2, y drawn from p(y | x)
    expected   F = mean over rows of  sum over classes y of  p(y | x) * g(x, y)^2: the definition

The empirical one is no estimate of the other two far from an optimum (Kunstner, Balles and Hennig, NeurIPS 2019, arXiv
1905.12558). Per batch, the mean gradient of a batch is squared in place of each row's, which is smaller by up to the
size of the batch. The spread over rows tells how many rows an estimate needs (Soen and Sun, NeurIPS 2021, arXiv
2107.04205).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from math import inf
from typing import Any, Literal

import torch
from torch import Tensor

from ...core import Run
from ...core.step import Inputs, batch_size, logits_of
from ...precision import wide
from .static_mask import Batch, Tensors

Per = Literal["batch", "example"]
Labels = Literal["true", "sampled", "expected"]


@dataclass(frozen=True)
class Information:
    """An estimate of Fisher information.

    Attributes:
        values: Fisher information of each entry, by weight name, in float32 or float64.
        trace: Its sum over all entries.
        error: Standard error of the trace over the units; NaN for one unit.
        units: Number of squared gradients in the mean, over all processes: rows, or batches.
    """

    values: Tensors
    trace: float
    error: float
    units: int

    def __str__(self) -> str:
        share = f" (standard error {self.error / self.trace:.0%})" if self.trace > 0 and self.units > 1 else ""
        return f"trace {self.trace:.3g}{share}, {self.units} squared gradients"


@dataclass(frozen=True)
class Fisher:
    """A way to estimate Fisher information.

    Args:
        per: Unit whose gradient is squared: each ``"example"``, or a ``"batch"``, as it comes.
        labels: See above. ``"expected"`` takes one backward pass for each class, and needs ``per="example"``.
        clip: Largest norm of a tensor's gradient before it is squared; inf disables clipping.
    """

    per: Per = "example"
    labels: Labels = "true"
    clip: float = inf

    def __post_init__(self) -> None:
        if self.labels == "expected" and self.per == "batch":
            raise ValueError("labels='expected' sums over the classes of a row: give per='example'")

    def estimate(self, run: Run, batches: Iterable[Batch], names: Set[str], asker: object) -> Information:
        """Estimate the Fisher information of some weights. Dropout is as the model has it.

        Args:
            run: The run, whose model is at the weights in question.
            batches: Batches of rows; several processes bring their own.
            names: Names of the weights.
            asker: Who asks; messages name its class.

        Raises:
            ValueError: No weight has a gradient, or labels cannot be drawn for this task.
        """
        sums: Tensors = {}
        traces: list[Tensor] = []
        for batch in batches:
            for unit in [batch] if self.per == "batch" else examples(batch):
                seed = run.draw_seed("fisher", len(traces), rank=True)
                trace = torch.zeros(())
                for share, labelled in self.labelled(run, unit, seed, asker):
                    grads = run.gradient(labelled, self.loss(run, asker), dropout_seed=seed)
                    trace = self.add(run, sums, {n: g for n, g in grads.items() if n in names}, share) + trace
                traces.append(trace)
        if not sums:
            raise ValueError(f"{type(asker).__name__} found no gradient of the weights in scope: is `data` empty?")
        values = list(sums.values())
        torch._foreach_div_(values, len(traces))
        each = wide(torch.stack(traces))
        moments = torch.stack([each.mean(), each.square().mean()])
        units = len(traces)
        if self.per == "example":
            run.all_reduce(values)
            run.all_reduce([moments])
            units *= run.world
        mean, square = moments.tolist()
        error = (max(0.0, square - mean**2) / (units - 1)) ** 0.5 if units > 1 else float("nan")
        return Information(sums, mean, error, units)

    def labelled(self, run: Run, unit: Batch, seed: int, asker: object) -> Iterator[tuple[float, Batch]]:
        """What of a unit is passed, each with its share in the square."""
        if self.labels != "expected":
            yield 1.0, unit
            return
        assert isinstance(unit, Mapping)
        with torch.no_grad(), run.forked_rng():
            torch.manual_seed(seed)
            logits = logits_of(run.task(unit, run.model)[1], unit, asker)
        check_classes(logits, unit["labels"], self.labels)
        for number, share in enumerate(logits.float().softmax(-1)[0].tolist()):
            yield share, {**unit, "labels": torch.full_like(unit["labels"], number)}

    def loss(self, run: Run, asker: object) -> Callable[[Inputs], Tensor]:
        """Loss of the task; for single examples without the DDP wrapper, which averages over processes."""
        model = run.model if self.per == "example" else run.wrapper

        def loss(batch: Inputs) -> Tensor:
            if self.labels == "sampled":
                with torch.no_grad():
                    logits = logits_of(run.task(batch, model)[1], batch, asker)
                    check_classes(logits, batch["labels"], self.labels)
                    drawn = torch.multinomial(logits.float().softmax(-1), 1).squeeze(-1)
                batch = {**batch, "labels": drawn}
            return run.task(batch, model)[0]

        return loss

    def add(self, run: Run, sums: Tensors, gradients: Tensors, share: float) -> Tensor:
        """``sums += share * clipped gradient squared``; returns the sum of what was added, a 0-d tensor."""
        wide = {n: g.to(torch.promote_types(g.dtype, torch.float32)) for n, g in gradients.items()}
        if not wide:
            return torch.zeros(())
        if self.clip < inf:
            for g, norm in zip(wide.values(), run.norms(list(wide.values())), strict=True):
                g.mul_((self.clip / (norm + 1e-6)).clamp(max=1.0))
        for name, g in wide.items():
            if name in sums:
                sums[name].addcmul_(g, g, value=share)
            else:
                sums[name] = g.square().mul_(share)
        return torch.stack(run.norms(list(wide.values()))).square().sum() * share


def examples(batch: Batch) -> Iterable[Inputs]:
    """The rows of a batch, each as a batch of one."""
    for part in [batch] if isinstance(batch, Mapping) else batch:
        size = batch_size(part)
        for i in range(size):
            yield {k: v[i : i + 1] if batch_first(v, size) else v for k, v in part.items()}


def batch_first(value: Any, size: int) -> bool:
    """Whether an input has one entry per row."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.size(0) == size


def check_classes(logits: Tensor, labels: Tensor, kind: Labels) -> None:
    """Raise unless logits have the shape (batch, classes), and labels the shape (batch,)."""
    if logits.dim() != 2 or logits.size(-1) == 1 or labels.dim() != 1:
        raise ValueError(
            f"labels={kind!r} needs one class label per row, got logits {tuple(logits.shape)} and labels "
            f"{tuple(labels.shape)}: use labels='true'"
        )
