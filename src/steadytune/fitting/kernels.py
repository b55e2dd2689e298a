"""A trial of kernels on the CPU: which attention, and whether bfloat16, make the steps of this model fastest here.

Which attention is faster depends on the processor, the model and the length of the texts. Bfloat16 is tried only on
processors that multiply in it; on others it is emulated and slower.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .outputs import by_length, device
from .peft_models import adapted
from .pretrained import quiet

if TYPE_CHECKING:
    from .plan import Plan
    from .pretrained import Pretrained

logger = logging.getLogger("steadytune")

ATTENTION = ("sdpa", "eager")
BF16_FLAGS = {"amx_bf16", "avx512_bf16"}  # of processors that multiply in bfloat16
ROUNDS = 3  # number of passes of every batch; the first is not timed
GAIN = 0.03  # share of the time that other kernels must save, because shorter trials differ by about 2 %

Kernel = tuple[str, bool]  # attention, and whether bfloat16 autocast


@dataclass(frozen=True)
class Kernels:
    """Chosen kernels, and what the trial measured.

    Attributes:
        attention: ``attn_implementation`` of transformers.
        bf16: Whether to use bfloat16 autocast.
        seconds: Seconds of the passes that were timed, by the names of the kernels, such as ``"eager, bf16"``.
    """

    attention: str
    bf16: bool
    seconds: dict[str, float]

    def applied(self, plan: Plan, pretrained: Pretrained) -> tuple[Plan, Pretrained]:
        """Plan and model with these kernels."""
        config = copy.deepcopy(pretrained.config)
        config._attn_implementation = self.attention
        options = dataclasses.replace(plan.options, bf16=self.bf16)
        return dataclasses.replace(plan, options=options), dataclasses.replace(pretrained, config=config)


def tuned(plan: Plan, pretrained: Pretrained) -> Kernels:
    """Time a few passes of training with each kernel, and choose.

    The kernels that a fit takes without a trial stay, unless others save 3 % or more. No random number of the caller is
    drawn, and no weight changes. On an accelerator nothing is tried.

    Args:
        plan: Plan of the fit; its ``bf16`` is tried too if it is off, unless methods or a procedure need full
            precision.
        pretrained: The pre-trained model, opened.
    """
    model, _ = pretrained.peek(plan.options.seeds["init"])
    stock = (str(model.config._attn_implementation), plan.options.bf16)
    if device().type != "cpu":
        logger.info("kernels are tuned on the CPU only: %s", name_of(stock))
        return Kernels(*stock, {})
    precise = plan.procedure is not None or any(method.full_precision for method in plan.methods)
    precisions = [stock[1]] if stock[1] or precise or not multiplies_bf16() else [False, True]
    passes = batches(plan, pretrained)
    with torch.random.fork_rng():
        tried = adapted(copy.deepcopy(model), plan.options.lora, plan.options.peft).train()
        kernels = [(attention, bf16) for attention in ATTENTION for bf16 in precisions if attends(tried, attention)]
        seconds = timed(kernels or [stock], lambda kernel: train_pass(tried, kernel, passes))
    chosen = choose(seconds, stock)
    with quiet():
        model.set_attn_implementation(chosen[0])
    named = {name_of(kernel): round(value, 4) for kernel, value in seconds.items()}
    logger.info(
        "kernels: %s (%s)", name_of(chosen), ", ".join(f"{name} {value:.2f} s" for name, value in named.items())
    )
    return Kernels(*chosen, named)


def name_of(kernel: Kernel) -> str:
    """As in records: ``"sdpa"``, ``"eager, bf16"``."""
    return f"{kernel[0]}, bf16" if kernel[1] else kernel[0]


def choose(seconds: Mapping[Kernel, float], stock: Kernel) -> Kernel:
    """The fastest kernels; the stock ones unless others save `GAIN`."""
    best = min(seconds, key=lambda kernel: seconds[kernel])
    return stock if stock in seconds and seconds[best] > (1 - GAIN) * seconds[stock] else best


def timed(kernels: Sequence[Kernel], run: Callable[[Kernel], None]) -> dict[Kernel, float]:
    """Seconds of the fastest of several interleaved runs of each kernel."""
    least: dict[Kernel, float] = {}
    for i in range(ROUNDS):
        for kernel in kernels:
            started = time.perf_counter()
            run(kernel)
            if i:
                least[kernel] = min(time.perf_counter() - started, least.get(kernel, float("inf")))
    return least


def train_pass(model: Any, kernel: Kernel, batches: Sequence[Any]) -> None:
    """Forward and backward of some batches; the weights stay, and the gradients are dropped."""
    attends(model, kernel[0])
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=kernel[1]):
            logits = model(**batch).logits
        logits.float().square().mean().backward()
    model.zero_grad(set_to_none=True)


def attends(model: Any, attention: str) -> bool:
    """Switch the attention of a model; False for a model that has no such implementation."""
    with quiet():
        try:
            model.set_attn_implementation(attention)
        except (ValueError, ImportError):
            return False
    return str(model.config._attn_implementation) == attention


def batches(plan: Plan, pretrained: Pretrained) -> list[Any]:
    """A batch of short training rows and one of long ones."""
    features = pretrained.tokenise(plan.data.train)
    order, size = by_length(features), min(plan.options.batch_size, len(features))
    starts = [int(share * (len(features) - size)) for share in (0.25, 0.75)]
    rows = [[features[i] for i in order[start : start + size]] for start in starts]
    return [pretrained.tokenizer.pad(some, return_tensors="pt") for some in rows]


def multiplies_bf16(path: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the processor has instructions for products in bfloat16 (AMX or AVX512-BF16), as Linux lists them."""
    if not path.is_file():
        return False
    flags = (line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("flags"))
    return bool(BF16_FLAGS & set(next(flags, "").split()))
