"""Trainings before a fit: they move the body of the pre-trained model, and the fit starts from there.

The fit draws its own head, and takes the moved weights for the pre-trained ones: anchors and distances of methods are
measured from them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UsageError
from ..options import SEEDS, Options, python_value
from ..plan import Stage
from ..spelling import make_meta, make_pretraining
from .intermediate import Intermediate
from .meta import MetaLearner, MetaStage
from .pretraining import Pretraining, TextStage

if TYPE_CHECKING:
    from ...data.prepare import Data
    from ..pretrained import Pretrained

logger = logging.getLogger("steadytune")

# Options of the fit that hold for its stages too; the others are about the fit's own rows and labels.
SHARED = (
    "lr", "weight_decay", "warmup", "max_grad_norm", "batch_size", "accumulation", "max_length", "prompt", "dropout",
    "bf16", "lora", "peft", "pooling", "compact", "standardize", *(f"{name}_seed" for name in SEEDS), "seed",
)  # fmt: skip


def stages_of(
    tables: Any, steps: int | None, meta: str | MetaLearner | None, *, model: str, options: Options, fit: Data,
    save_steps: int, progress: bool,
) -> tuple[Stage, ...]:  # fmt: skip
    """The stages for the arguments ``aux``, ``aux_steps`` and ``meta`` of `fit`.

    Raises:
        UsageError: A table is not right, or there are too few for meta-learning.
    """
    if steps is not None and python_value("aux_steps", steps, int) < 1:
        raise UsageError(f"aux_steps must be 1 or more, got {steps}: leave aux out to train on no other table.")
    given = list(tables) if isinstance(tables, (list, tuple)) else [tables]
    shared: dict[str, Any] = {name: getattr(options, name) for name in SHARED}
    own = Options(**shared, steps=steps, epochs=None if steps else options.epochs, validation_share=0.0)
    stages = tuple(
        Intermediate.of(table, f"aux {i}", model=model, options=own, fit=fit, save_steps=save_steps, progress=progress)
        for i, table in enumerate(given)
    )
    if meta is None:
        return stages
    return (MetaStage.of(make_meta(meta), stages, steps, options=own, save_steps=save_steps, progress=progress),)


def further(how: str | Pretraining, *, options: Options, fit: Data, save_steps: int, progress: bool) -> TextStage:
    """The stage for the argument ``pretrain`` of `fit`.

    Raises:
        UsageError: There is no such training, or too few texts.
    """
    return TextStage.of(make_pretraining(how), options=options, fit=fit, save_steps=save_steps, progress=progress)


def after_stages(stages: Sequence[Stage], pretrained: Pretrained, checkpoints: Path) -> Pretrained:
    """The pre-trained model with the body that the stages leave, each from where the one before ended."""
    counts: Counter[str] = Counter()
    for stage in stages:
        logger.info("first %s", stage.title)
        pretrained = pretrained.moved(stage.body(pretrained, f"{stage.name}-{counts[stage.name]}", checkpoints))
        counts[stage.name] += 1
    return pretrained
