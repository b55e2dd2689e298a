"""What `fit` asks of a procedure, which is several trainings that give one trained model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from ...errors import UsageError

if TYPE_CHECKING:
    from ..fit_trainer import FitTrainer, Trained
    from ..options import Options
    from ..plan import Plan
    from ..training import Job, Setup


class Procedure(ABC):
    """Several trainings instead of one; a frozen dataclass of their options."""

    embeds: ClassVar[bool] = False  # whether texts become vectors, which need a pooling of their own; see `start`
    reads_unlabelled: ClassVar[bool] = False  # whether it learns from texts without labels

    @property
    def soft_labels(self) -> bool:
        """Whether it trains on probabilities of the classes, not on one class a row."""
        return False

    def options(self, options: Options) -> Options:
        """The options of the fit, with those that the procedure sets."""
        return options

    def refuses(self, options: Options) -> str | None:
        """Why these options cannot go with the procedure, in a sentence; None if they can."""
        return None

    def check(self, plan: Plan) -> None:
        """Check what the plan asks for.

        Raises:
            UsageError: The procedure cannot do it.
        """
        if (why := self.refuses(plan.options)) is not None:
            raise UsageError(why)

    def passes(self, options: Options, rows: int) -> float | None:
        """Forward and backward passes as a multiple of those of plain fine-tuning; None if only records tell.

        Args:
            options: Options of the fit.
            rows: Number of training rows.
        """
        return None

    def cost(self, plan: Plan) -> float | None:
        """As `passes`, for a plan."""
        return self.passes(plan.options, len(plan.data.train))

    def words(self, plan: Plan) -> str | None:
        """The trainings and their cost in a sentence, instead of the number of steps; None for that number."""
        return None

    @abstractmethod
    def first(self, setup: Setup, job: Job) -> Setup:
        """Setup of the training that is tried, and may refuse, before anything is trained."""

    def job_of(self, job: Job, i: int) -> Job:
        """Job of the training with this number."""
        return job

    @abstractmethod
    def __call__(self, setup: Setup, job: Job, made: list[FitTrainer] | None = None) -> Trained:
        """Do the job.

        Args:
            setup: Setup of all trainings.
            job: A training of `fit`.
            made: List with the Trainer of `first`, if it was made already; it is emptied.
        """
