"""Search the shares of mixtures with the pre-trained weights on splits of the rows, then fine-tune."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from torch import Tensor

from ...core import Within, check_fields
from ...merge import uniform
from ...methods import WeightMixup
from .base import Procedure

if TYPE_CHECKING:
    from ..fit_trainer import FitTrainer, Trained
    from ..training import Job, Setup

Shares = dict[str, list[Tensor]]  # factors by weight name


class Found(NamedTuple):
    """What a search leaves, without its model; or several: means of the first two, sums of the others."""

    weights: dict[str, Tensor]
    shares: Shares
    passes: float
    seconds: float


@dataclass(frozen=True)
class MixupBLO(Procedure):
    """Search the shares of `WeightMixup` on splits of the rows, average the results, and fine-tune with fixed shares.

    Somayajula, Liang, Zhang, Singh, Xie: Generalizable and Stable Finetuning of Pretrained Language Models on
    Low-Resource Texts. NAACL 2024, arXiv 2403.12918.

    Each search starts from the pre-trained model and has its own split: the weights learn on one part of the rows, the
    shares on the other. The last training starts from the means of weights and shares over the searches. It uses all
    rows and as many steps as any other recipe.

    Args:
        folds: Number of searches; 5 in the paper. The mean of several is also a model soup.
        search_epochs: Number of epochs of each search; 3 in the paper.
        outer_share: Share of the rows that the mixing shares learn on.
        order: Order of the shares' gradient, see `WeightMixup`; the authors' is ``"difference"``.
        convex: See `WeightMixup`.
        lr: Learning rate of the shares.

    Departures:
        One search of one epoch by default: the published recipe costs about 20 times a plain training. The splits are
        stratified. Those of `WeightMixup`.
    """

    folds: Annotated[int, Within("[1, inf)")] = 1
    search_epochs: Annotated[float, Within("(0, inf)")] = 1.0
    outer_share: Annotated[float, Within("(0, 1)")] = 0.2
    order: Literal["first", "difference"] = "first"
    convex: bool = True
    lr: Annotated[float, Within("(0, inf)")] = 2e-3

    def __post_init__(self) -> None:
        check_fields(self)
        self.mixup()

    def mixup(self, alpha: Mapping[str, Sequence[Tensor]] | None = None) -> WeightMixup:
        """The method of a search; with shares, that of the last training."""
        return WeightMixup(self.outer_share, alpha, order=self.order, convex=self.convex, lr=self.lr)

    def __call__(self, setup: Setup, job: Job, made: list[FitTrainer] | None = None) -> Trained:
        """Do the job; the searches do not use its selection rows."""
        searched = self.search(setup, job, made)
        last = dataclasses.replace(setup, methods=[*setup.methods, self.mixup(searched.shares)])
        trained = last.train(dataclasses.replace(job, start=searched.weights))
        passes = trained.passes + searched.passes / trained.steps
        return dataclasses.replace(trained, passes=passes, seconds=trained.seconds + searched.seconds)

    def search(self, setup: Setup, job: Job, made: list[FitTrainer] | None = None) -> Found:
        """Result of all searches together."""
        weights, alphas, passes, seconds = zip(*self.searches(setup, job, made), strict=True)
        return Found(uniform(weights), mean_shares(alphas), sum(passes), sum(seconds))

    def first(self, setup: Setup, job: Job) -> Setup:
        """Setup of the searches."""
        inside = len(job.rows) - round(self.outer_share * len(job.rows))
        steps = dataclasses.replace(setup.options, steps=None, epochs=self.search_epochs).total_steps(inside)
        return dataclasses.replace(setup, methods=[*setup.methods, self.mixup()], steps=steps, keep=True, states=True)

    def job_of(self, job: Job, i: int) -> Job:
        """Job of a search, without selection and with its own split."""
        seeds = {name: seed if name == "init" else seed + i for name, seed in job.seeds.items()}
        return dataclasses.replace(job, name=f"{job.name}-search-{i}", select=None, seeds=seeds, stop_at=None)

    def searches(self, setup: Setup, job: Job, made: list[FitTrainer] | None = None) -> Iterator[Found]:
        """Yield the results of the searches in turn; finished ones are read from disk."""
        search = self.first(setup, job)
        for i in range(self.folds):  # no name for the trained search, so that its model is freed before the next
            yield found_by(search.train(self.job_of(job, i), made.pop() if made else None))


def found_by(search: Trained) -> Found:
    """Result of a finished search."""
    return Found(raw_weights(search), shares(search.state), search.passes * search.steps, search.seconds)


def raw_weights(trained: Trained) -> dict[str, Tensor]:
    """Raw weights, which the optimizer moves, instead of the mixtures in the model; on the CPU."""
    return {name: t.cpu() for name, t in {**trained.model.state_dict(), **trained.state["raw"]}.items()}


def shares(state: Mapping[str, Any]) -> Shares:
    """The shares that a run with `WeightMixup` ended with, on the CPU."""
    pairs = zip(state["recipe"], state["methods"], strict=True)
    held = next(held for about, held in pairs if about["name"] == WeightMixup.__name__)
    return {name: [t.cpu() for t in factors] for name, factors in held["variables"].items()}


def mean_shares(several: Sequence[Shares]) -> Shares:
    """The mean of each factor over several searches."""
    means = uniform([{f"{n} {i}": t for n, ts in one.items() for i, t in enumerate(ts)} for one in several])
    return {name: [means[f"{name} {i}"] for i in range(len(ts))] for name, ts in several[0].items()}
