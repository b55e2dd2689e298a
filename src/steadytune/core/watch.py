"""Detect faults that no hook reports: weights moved by other code than the optimizer, gradients that are not finite."""

from __future__ import annotations

import functools
import logging
import math
import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import UsageError
from .method import Weight

logger = logging.getLogger(__name__)
IN_A_ROW = 5  # steps without a finite gradient after which training has stalled
SAMPLED = 4  # number of weights of which entries are copied at each step
ENTRIES = 64  # number of entries of each


class Watch:
    """Detects weights that were written since it was made.

    Torch counts the writes to a tensor, and reading the count is free. Writes through ``parameter.data`` are not
    counted, so copies of a few entries of a few weights detect those.
    """

    def __init__(self, weights: Sequence[Weight]) -> None:
        self._weights = {w.name: w for w in weights}
        self._versions = self._count()
        every = max(1, len(weights) // SAMPLED)
        self._sample = {w.name: _first(w) for w in weights[::-1][::every]}  # heads, which all batches move, stand last

    def _count(self) -> dict[str, int]:
        return {name: w.data._version for name, w in self._weights.items()}

    def written(self, names: Iterable[str] | None = None) -> str | None:
        """Name of a weight that was written (among ``names``, if given); None if there is none."""
        now = self._count()
        looked_at = self._weights if names is None else names
        return next((n for n in looked_at if n in now and now[n] != self._versions[n]), None)

    def differs(self) -> str | None:
        """Name of a weight whose sampled entries differ; None if there is none. It waits for the device."""
        return next(
            (n for n, before in self._sample.items() if not torch.equal(before, _first(self._weights[n]))), None
        )


def _first(weight: Weight) -> Tensor:
    return weight.data.flatten()[:ENTRIES].clone()


def renormalised(model: nn.Module) -> set[str]:
    """Names of embeddings whose own forward changes them (``max_norm``)."""
    return {
        f"{name}.weight".lstrip(".")
        for name, module in model.named_modules()
        if getattr(module, "max_norm", None) is not None
    }


class RateRatios:
    """Ratios between learning rates of parameter groups that methods set; a scheduler must keep them.

    Args:
        optimizer: The optimizer after `Method.attach`.
        method: Name of the method that set the rates.
    """

    def __init__(self, optimizer: Optimizer, method: str) -> None:
        self._optimizer, self._method = optimizer, method
        self._ratios = self._measure()
        self._said = False

    def _measure(self) -> list[float] | None:
        """Rates divided by the largest; None while all are zero, and for tensors, which may be on a device."""
        rates = [group["lr"] for group in self._optimizer.param_groups]
        if any(isinstance(rate, Tensor) for rate in rates) or not max(rates) > 0:
            return None
        return [rate / max(rates) for rate in rates]

    def check(self, *, first: bool) -> None:
        """Compare the ratios. After the first step a difference gives one warning, because it may be intended.

        Raises:
            UsageError: The ratios differ at the first step.
        """
        now, before = self._measure(), self._ratios
        if self._said or now is None or before is None:
            return
        if len(now) == len(before) and all(map(functools.partial(math.isclose, rel_tol=1e-3), now, before)):
            return
        told = (
            "the learning rates of the optimizer's groups no longer stand in the ratios that "
            f"{self._method} gave them: a scheduler such as OneCycleLR or CyclicLR set its own. Give it one rate per "
            'group, as in max_lr=[group["lr"] for group in optimizer.param_groups]'
        )
        if first:
            raise UsageError(told)
        self._said = True
        warnings.warn(told, stacklevel=2)


class FiniteGradients:
    """Skips and counts optimizer steps whose gradient is not finite, and raises after several in a row.

    On a CPU the gradients of such a step are dropped before anything uses them. On a device, checking would wait for
    the device at each step. So the check comes one step later, when the step cannot be undone, and raises.

    Attributes:
        skipped: Number of optimizer steps skipped so far.
    """

    def __init__(self) -> None:
        self.skipped = 0
        self._in_a_row = 0
        self._late: list[tuple[Tensor, torch.cuda.Event, int]] = []

    def skips(self, norm: Tensor, index: int) -> bool:
        """Whether step ``index``, one of whose gradients has this norm, must not be taken.

        Raises:
            UsageError: There were too many such steps in a row; or, on a device, the step before was one.
        """
        if norm.is_cuda:
            self.settle(but=index)
            flag = torch.empty((), dtype=torch.bool, pin_memory=True)
            flag.copy_(torch.isfinite(norm), non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._late.append((flag, event, index))
            return False
        if torch.isfinite(norm):
            return False
        self.skipped += 1
        self._in_a_row += 1
        if self._in_a_row >= IN_A_ROW:
            raise UsageError(
                f"the gradients of {IN_A_ROW} optimizer steps in a row were not finite (norm {float(norm)}), so "
                "nothing is trained any more: lower the learning rate, and look for NaN or huge values in inputs, "
                "labels and weights"
            )
        if self.skipped == 1:
            logger.warning(
                "The gradient of optimizer step %d is not finite (norm %s): the step is skipped and counted. Further "
                "ones are counted without a warning; %d in a row are an error.",
                index + 1,
                float(norm),
                IN_A_ROW,
            )
        return True

    def taken(self) -> None:
        """Note that a step was taken, which ends a row of skipped steps."""
        self._in_a_row = 0

    def settle(self, *, but: int | None = None) -> None:
        """Look at the norms that were left for later: of all steps, or of all but one.

        Args:
            but: Index of the step under way, whose norms may not be known yet without waiting for the device.

        Raises:
            UsageError: A step that was taken had a gradient that was not finite.
        """
        while self._late and self._late[0][2] != but:
            flag, event, index = self._late.pop(0)
            event.synchronize()
            if flag:
                continue
            self._late = []
            self.skipped += 1
            raise UsageError(
                f"the gradient of optimizer step {index + 1} was not finite, and the step has been taken: go on from a "
                "checkpoint saved before it. Lower the learning rate, and look for NaN or huge values in inputs and "
                "labels"
            )
