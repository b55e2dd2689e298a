"""The recipe of DSEE: LoRA with a few free entries, and a model that is pruned on the way, as one procedure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from ...core import Within, check_fields
from ...errors import UsageError
from ...methods.dsee import DSEE, Support
from .base import Procedure

if TYPE_CHECKING:
    from ..fit_trainer import FitTrainer, Trained
    from ..options import Options
    from ..plan import Plan
    from ..training import Job, Setup


@dataclass(frozen=True)
class DSEERecipe(Procedure):
    """Train LoRA on query and value with a few free entries beside it, prune the model on the way, and merge.

    Chen, Chen, Chen, Awadallah, Wang, Cheng: DSEE: Dually Sparsity-embedded Efficient Tuning of Pre-trained Language
    Models. ACL 2023, arXiv 2111.00160.

    The result is a plain model with exact zeros, which `steadytune.inference_cost` counts. It is one training: PEFT's
    LoRA of rank 16 with the method `methods.dsee.DSEE`, which says what the entries and the zeros are worth.

    Args:
        entries: Number of free entries in each query and value matrix.
        support: Which entries are free, see `DSEE`.
        share: Share of the weights of each matrix of the blocks that is set to zero.
        start: Share of the training before the pruning.

    Departures:
        Those of `DSEE`.
    """

    entries: Annotated[int, Within("[0, inf)")] = 16
    support: Support = "decomposition"
    share: Annotated[float, Within("[0, 1)")] = 0.2
    start: Annotated[float, Within("[0, 1]")] = 1 / 3

    def __post_init__(self) -> None:
        check_fields(self)

    def options(self, options: Options) -> Options:
        return dataclasses.replace(options, peft="lora", lora=None) if options.peft is None else options

    def refuses(self, options: Options) -> str | None:
        if options.peft == "lora":
            return None
        return f"dsee trains PEFT's lora, and peft is {options.peft!r}: leave one of them out."

    def check(self, plan: Plan) -> None:
        super().check(plan)
        if plan.distil:
            raise UsageError("distil trains its model without pruning: leave distil or dsee out.")

    def passes(self, options: Options, rows: int) -> float:
        return 1.0

    def first(self, setup: Setup, job: Job) -> Setup:
        method = DSEE(self.entries, self.support, self.share, self.start)
        return dataclasses.replace(setup, methods=[method, *setup.methods])

    def __call__(self, setup: Setup, job: Job, made: list[FitTrainer] | None = None) -> Trained:
        return self.first(setup, job).train(job, made.pop() if made else None)
