"""How training starts: what the head reads (`pooling`) and with which weights it begins (`head`).

Both options stand for methods, `Pooling` and `HeadInit`, which `with_start` puts into the recipe.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any, Literal

from ..core import Method, Run
from ..errors import UsageError
from ..heads.features import output_layer
from ..heads.pooling import NATIVE, add_pooling_block, dense_before, native_pooling, untrained_dense
from ..methods.head_init import HeadInit
from ..methods.levi import LEVI
from ..methods.pooling import Pooling
from .peft_models import adapter_kind

if TYPE_CHECKING:
    import pandas as pd

    from .options import Options
    from .pretrained import Pretrained

logger = logging.getLogger("steadytune")

TRIED = 8  # rows on which a pooling block is tried

Pooled = Literal["model", "mean", "cls"]


def chosen_pooling(
    pretrained: Pretrained, options: Options, methods: Sequence[Method], rows: pd.DataFrame, embeds: bool = False
) -> Pooled:
    """What the head reads, with ``"auto"`` decided.

    ``"auto"`` takes the mean over tokens where a row is one text, the folder of a sentence encoder says so, the head
    would read a dense layer that was never trained, and the model can pool so. Everything else stays as the model has
    it: such an encoder never averaged over the tokens of two texts, and on pairs the mean has cost points.

    Args:
        pretrained: The model, opened.
        options: Of the fit.
        methods: Of the recipe.
        rows: Training rows, on the first of which a pooling block is tried.
        embeds: Whether a procedure trains vectors of the texts. They are pooled as the folder of a sentence encoder
            says, or else by the mean; the model's own input of the head is used where it cannot pool so.

    Raises:
        UsageError: The model is so large that it has adapters, and pooling was asked for.
    """
    wanted = options.pooling
    if wanted != "auto":
        return _beside_adapters(wanted, pretrained, options)
    if any(isinstance(method, (Pooling, LEVI)) for method in methods):  # LEVI averages the tokens itself
        return "model"
    if embeds:
        return _beside_adapters(_embedding(pretrained, options, rows), pretrained, options)
    if pretrained.sentence is None or pretrained.sentence.pooling != "mean" or "text_pair" in rows:
        return "model"
    model, new = pretrained.peek(options.seeds["init"])
    untrained = untrained_dense(model, new)
    if untrained is None and not hasattr(model.config, NATIVE):
        return "model"
    if adapter_kind(model, options.lora, options.peft):
        logger.warning(
            "this sentence encoder pools by the mean, the head reads %s: with adapters pooling cannot be changed",
            untrained or "the first token",
        )
        return "model"
    if not _can_pool(model, pretrained, rows.head(TRIED)):
        logger.warning(
            "this sentence encoder pools by the mean, the head reads %s: a %s cannot take the mean instead",
            untrained or "the first token", type(model).__name__,
        )  # fmt: skip
        return "model"
    why = "" if untrained is None else f"; {untrained} was never trained"
    logger.info("pooling: the mean over tokens, as the encoder was trained%s", why)
    return "mean"


def _beside_adapters(pooled: Pooled, pretrained: Pretrained, options: Options) -> Pooled:
    """The same, unless the size of the model adds adapters; those that were asked for are refused by the options.

    Raises:
        UsageError: It does, and pooling would change the blocks.
    """
    if pooled != "model" and options.lora is None and not options.peft:
        model = pretrained.peek(options.seeds["init"])[0]
        if adapter_kind(model, options.lora, options.peft):
            raise UsageError(
                f"pooling {pooled} changes the blocks that adapters hold on to, and a model of "
                f"{model.num_parameters() / 1e9:.1f} billion weights has adapters by default: train all weights with "
                "lora=False (--no-lora), or give pooling='model'."
            )
    return pooled


def _embedding(pretrained: Pretrained, options: Options, rows: pd.DataFrame) -> Pooled:
    """How a vector is made of a text."""
    model = pretrained.peek(options.seeds["init"])[0]
    if pretrained.sentence is not None and pretrained.sentence.pooling == "cls":
        return "cls" if hasattr(model.config, NATIVE) or dense_before(model) is not None else "model"
    return "mean" if _can_pool(model, pretrained, rows.head(TRIED)) else "model"


def _can_pool(model: Any, pretrained: Pretrained, rows: pd.DataFrame) -> bool:
    """Whether `Pooling` can give the head the mean; the block is tried on a copy."""
    tried = copy.deepcopy(model)
    if native_pooling(tried, "mean"):
        return True
    batch: Any = pretrained.tokenizer.pad(pretrained.tokenise(rows), return_tensors="pt")
    try:
        add_pooling_block(tried, [batch])
    except ValueError:
        return False
    return True


def with_start(methods: Sequence[Method], options: Options, pooling: Pooled) -> list[Method]:
    """The recipe with the methods that `pooling` and `head` stand for.

    `Pooling` comes first; the `Run` lets `ReInit` draw before it, so that the pooler stays bypassed. The probe of
    `HeadInit` reads the model as it will be trained, so that it comes after the methods that change the model.
    """
    pooled: list[Method] = [] if pooling == "model" else [Pooling(how=pooling)]
    changing = list(takewhile(lambda method: method.structure, methods))
    head: list[Method] = [] if options.head == "random" else [HeadInit(how=options.head)]
    return [*pooled, *changing, *head, *methods[len(changing) :]]


def warn_of_start(model: Any, pretrained: Pretrained, options: Options) -> None:
    """Say that a head begins as a probe on features that no pre-training has made."""
    if options.head in ("random", "words") or pretrained.pooling != "model":
        return
    if (dense := untrained_dense(model, pretrained.new)) is not None:
        logger.warning(
            "the head begins as a probe on the outputs of %s, which was never trained: on 100 rows that lost 13 to 16 "
            "points against a random head on two of four tasks. Give pooling='mean' or 'cls' too",
            dense,
        )


def drawn(run: Run, pretrained: Pretrained, options: Options) -> list[str]:
    """Names of the weights that begin with what the seed of the head says, in a model with `with_start` applied."""
    model: Any = run.model
    written: set[int] = set()
    if options.head != "random":
        written.update(id(p) for p in output_layer(model).parameters())
    pooled = [method for method in run.methods if isinstance(method, Pooling)]
    for method in pooled:
        written.update(id(model.get_parameter(name)) for name in method.written)
    later = not pooled and pretrained.pooling != "model" and not hasattr(model.config, NATIVE)  # in a procedure
    if later and (dense := dense_before(model)) is not None:
        written.update(id(p) for p in model.get_submodule(dense).parameters())
    return sorted(pretrained.new - {name for name, p in model.named_parameters() if id(p) in written})
