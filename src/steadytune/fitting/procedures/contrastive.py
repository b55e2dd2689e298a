"""Contrastive training of the encoder on the labelled rows, before a head is fitted to it.

z is the normalised vector of a row. Rows that share a label attract each other, others repel:

    supcon   mean over rows i, over p in P(i) of  -log( exp(z_i z_p / temperature) / sum over a != i of the same )
    cosine   mean over pairs of  (z_i z_j - y_ij)^2

P(i) are the other rows of the batch with a label of row i, and rows without any are left out. y is 1 for rows that
share a label and 0 for others; for numbers it is 1 - |y_i - y_j| / (range of the labels).
"""

from __future__ import annotations

import dataclasses
import logging
import math
from abc import abstractmethod
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Sampler
from transformers import DataCollatorWithPadding, PrinterCallback, TrainerCallback

from ...core import Within, check_fields
from ...errors import UsageError
from ...functional import supervised_contrastive
from ...heads.features import output_layer, text_vectors
from ..callbacks import Interrupt, Progress
from ..fit_trainer import FitTrainer, Trained, arguments
from ..training import Job, Setup
from ..unread import leave_out_unread
from .base import Procedure

if TYPE_CHECKING:
    from ...data.problem import Problem
    from ..options import Options
    from ..plan import Plan

logger = logging.getLogger("steadytune")

MANY = 200  # number of rows from which batches hold enough partners for supcon
PAIRS = 40  # pairs of a row in one pass over the pairs: 20 alike and 20 different, as in SetFit's paper
COPIES = 2  # rows of a batch as a multiple of plain fine-tuning's: one pair for each of its rows

Loss = Literal["supcon", "cosine"]


@dataclass(frozen=True)
class Contrastive(Procedure):
    """Train the encoder so that rows of one label are near each other, then fit a head to it, or fine-tune from there.

    Tunstall, Reimers, Jo, Bates, Korat, Wasserblat, Pereg: Efficient Few-Shot Learning Without Prompts. 2022, arXiv
    2209.11055 (SetFit). The loss ``"supcon"``: Khosla et al.: Supervised Contrastive Learning, NeurIPS 2020, arXiv
    2004.11362; for language models Gunel et al., ICLR 2021, arXiv 2011.01403.

    The vector of a row is the mean over its tokens, the first token if the folder of a sentence encoder says so, or
    what the head reads where the model cannot pool so (or with ``pooling="model"``). A pair of texts is read as one
    sequence. Methods of the recipe act in the fine-tuning alone. The result is a plain model. No score is taken from
    the rows that trained the encoder: the probe beside the scores reads the encoder as it was before.

    Args:
        loss: ``"supcon"`` compares all rows of a batch that holds at least two of each class in it; ``"cosine"`` is a
            squared error on pairs, as many alike as different ones. ``"auto"`` is supcon from 200 rows, and cosine
            for fewer rows and for numbers, which have no classes.
        steps: Number of contrastive steps; by default one pass over 40 pairs a row, and at most half of the steps of
            plain fine-tuning.
        lr: Peak learning rate of the contrastive steps.
        temperature: Divisor of the cosines in supcon; the papers use 0.07 to 0.5.
        then: ``"head"`` keeps the encoder and fits a linear probe as its head; ``"finetune"`` fine-tunes from there,
            with all steps of the fit.

    A batch holds twice as many rows as one of the fit, so half of the steps cost as much as plain fine-tuning.

    Departures:
        SetFit's code pairs rows with themselves, orders pairs by a seed of its own whatever the user's, and lists all
        pairs, whose number grows with the square of the rows. Here a row is never its own partner, rows with equal
        texts and labels count once, all draws follow the seed of the row order, and pairs are drawn batch by batch.
        SetFit embeds each text of a pair alone. Targets for numbers are ours.
    """

    loss: Literal["auto", "supcon", "cosine"] = "auto"
    steps: Annotated[int, Within("[1, inf)")] | None = None
    lr: Annotated[float, Within("(0, inf)")] = 2e-5
    temperature: Annotated[float, Within("(0, inf)")] = 0.07
    then: Literal["head", "finetune"] = "head"

    embeds: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    # ---- the plan

    def refuses(self, options: Options) -> str | None:
        """Adapters, and with ``then="head"`` what acts in fine-tuning."""
        if options.peft or options.lora:
            return "contrastive trains all weights of the encoder: leave lora and peft out."
        unheeded = next(iter([*(["evaluations"] if options.evaluations else []), *options.in_steps]), None)
        return None if unheeded is None or self.then == "finetune" else _unheeded(unheeded)

    def options(self, options: Options) -> Options:
        """A head that begins as a probe, because the encoder was trained for one."""
        return dataclasses.replace(options, head="logistic") if options.head == "random" else options

    def check(self, plan: Plan) -> None:
        """Check labels, and what nothing would heed.

        Raises:
            UsageError: There is nothing to contrast, or something has no effect.
        """
        super().check(plan)
        problem = plan.data.problem
        if self.loss == "supcon" and problem.ordered:
            raise UsageError("contrastive: supcon needs classes, the labels are numbers: give loss=cosine or auto.")
        rows = distinct(plan.data.train)
        if len(rows) < 2 or not (problem.ordered or problem.membership(rows["label"]).sum(0).max() > 1):
            raise UsageError(
                "contrastive: no two rows with different texts share a label, so there are no pairs: leave it out."
            )
        if plan.methods and self.then == "head":
            raise UsageError(_unheeded("methods"))
        if plan.distil:
            raise UsageError("distil trains its model without contrastive steps: leave distil or contrastive out.")

    def kind(self, problem: Problem, rows: int) -> Loss:
        """The loss for a number of rows."""
        if self.loss != "auto":
            return self.loss
        return "supcon" if rows >= MANY and not problem.ordered else "cosine"

    def stage_steps(self, options: Options, rows: int, plain: int) -> int:
        """Number of contrastive steps.

        Args:
            options: Options of the fit.
            rows: Number of training rows.
            plain: Number of steps of plain fine-tuning.
        """
        one_pass = math.ceil(PAIRS * rows / (options.batch_size * options.accumulation))
        return self.steps or max(1, min(one_pass, plain // 2))

    def passes(self, options: Options, rows: int) -> float:
        plain = options.total_steps(rows)
        return COPIES * self.stage_steps(options, rows, plain) / plain + (self.then == "finetune")

    def words(self, plan: Plan) -> str:
        rows, options = len(plan.data.train), plan.options
        steps = self.stage_steps(options, rows, plan.steps)
        after = "a head is fitted" if self.then == "head" else f"{plan.steps} steps of fine-tuning follow"
        return (
            f"contrastive ({self.kind(plan.data.problem, rows)}): {steps} steps on pairs of rows, then {after}: "
            f"{self.passes(options, rows):.2f} times the passes of plain fine-tuning"
        )

    # ---- the trainings

    def first(self, setup: Setup, job: Job) -> Setup:
        """Setup of the last training, in which the methods act."""
        if self.then == "finetune":
            return setup
        options = dataclasses.replace(setup.options, steps=0, epochs=None)
        return dataclasses.replace(setup, options=options, steps=0)

    def __call__(self, setup: Setup, job: Job, made: list[FitTrainer] | None = None) -> Trained:
        if made:
            made.clear()  # it was made of the encoder before the contrastive steps
        stage = self.stage(setup, job)
        contrasted = stage.train(dataclasses.replace(job, name=f"{job.name}-contrastive", select=None, stop_at=None))
        steps, seconds = contrasted.steps, contrasted.seconds
        passes = steps * stage.options.batch_size / setup.options.batch_size
        pretrained = setup.pretrained.moved(below_head(contrasted.model))
        del contrasted  # frees its head before the next model is read
        trained = self.first(dataclasses.replace(setup, pretrained=pretrained), job).train(job)
        if self.then == "finetune":
            steps, passes = trained.steps, passes + trained.passes * trained.steps
        return dataclasses.replace(trained, steps=steps, passes=passes / steps, seconds=trained.seconds + seconds)

    def stage(self, setup: Setup, job: Job) -> ContrastiveSetup:
        """Setup of the contrastive training."""
        rows, problem = distinct(job.rows), setup.problem
        numbers = problem.ids(rows["label"].tolist())
        contrast = Contrast(
            self.kind(problem, len(job.rows)), self.temperature, setup.pretrained.pooling,
            problem.membership(rows["label"]), float(np.ptp(numbers)) if problem.ordered else 0.0,
        )  # fmt: skip
        options = dataclasses.replace(
            setup.options, lr=self.lr, batch_size=contrast.batch_size(setup.options.batch_size, len(rows)), lora=False,
            evaluations=0, patience=None, restarts=0,
        )  # fmt: skip
        shared = {field.name: getattr(setup, field.name) for field in dataclasses.fields(setup)}
        steps = self.stage_steps(setup.options, len(job.rows), setup.steps)
        own: dict[str, Any] = {"methods": (), "options": options, "steps": steps, "keep": True, "states": False}
        return ContrastiveSetup(**{**shared, **own}, contrast=contrast)


def _unheeded(name: str) -> str:
    return (
        f"contrastive fits only a head after its steps, and {name} acts in fine-tuning: leave it out, or give "
        "contrastive:then=finetune."
    )


def distinct(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows without repetitions of a text with the same label, which would be pairs of a row with itself."""
    columns = [name for name in ("text", "text_pair", "label") if name in rows]
    return rows[~rows.duplicated(columns)]


def below_head(model: Any) -> Mapping[str, Tensor]:
    """All weights of a model but those of its last linear layer, on the CPU."""
    layer = output_layer(model)
    head = {id(p) for p in layer.parameters()}
    return {name: p.detach().cpu() for name, p in model.named_parameters() if id(p) not in head}


# ---- the loss -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Contrast:
    """What is contrasted, and how.

    Attributes:
        kind: The loss.
        temperature: Divisor of the cosines in supcon.
        pooling: What the vector of a row is.
        members: Truth values (rows, classes) of the labels; no columns for numbers.
        spread: Range of the labels that are numbers.
    """

    kind: Loss
    temperature: float
    pooling: Literal["model", "mean", "cls"]
    members: np.ndarray
    spread: float

    def batch_size(self, plain: int, rows: int) -> int:
        """Rows of a batch; in supcon they are different ones, and two of one class need two of another beside them."""
        return COPIES * plain if self.kind == "cosine" else min(max(2 * COPIES, COPIES * plain), rows)

    def sampler(self, batch_size: int, seed: int) -> Drawn:
        """The sampler of the rows."""
        return (Pairs if self.kind == "cosine" else Balanced)(self.members, batch_size, seed)

    def loss(self, vectors: Tensor, labels: Tensor) -> Tensor:
        """Loss of a batch that the sampler has drawn.

        Args:
            vectors: Of the rows, (rows, width).
            labels: Class numbers or floats (rows,), or 0 and 1 (rows, classes).
        """
        wanted = likeness(labels, self.spread)
        if self.kind == "supcon":
            partners = wanted > 0
            losses = supervised_contrastive(vectors, partners, self.temperature)
            return losses.sum() / (partners.sum(-1) > partners.diagonal()).sum().clamp(min=1)
        first, second = vectors[0::2], vectors[1::2]
        cosines = torch.nn.functional.cosine_similarity(first, second)
        return (cosines - wanted[0::2, 1::2].diagonal().to(cosines.dtype)).square().mean()


def likeness(labels: Tensor, spread: float = 0.0) -> Tensor:
    """Cosines (rows, rows) that are wanted: 1 for a shared label and 0 without one; numbers lie between.

    Args:
        labels: Class numbers or floats (rows,), or 0 and 1 (rows, classes).
        spread: Range of labels that are numbers.
    """
    if labels.dim() == 2:
        return (labels @ labels.mT > 0).float()
    if labels.is_floating_point():
        return 1 - (labels.unsqueeze(0) - labels.unsqueeze(1)).abs() / (spread or 1.0)
    return (labels.unsqueeze(0) == labels.unsqueeze(1)).float()


# ---- batches ------------------------------------------------------------------------------------------------------


class Drawn(Sampler):
    """Sampler whose rows are drawn batch by batch; they depend only on (seed, epoch), so that there is no state.

    An epoch has as many rows as the table, in whole batches.

    Args:
        members: Truth values (rows, classes) of the labels; no columns for numbers.
        batch_size: Rows of a batch.
        seed: Seed of the draws.
    """

    def __init__(self, members: np.ndarray, batch_size: int, seed: int) -> None:
        self.members, self.batch_size, self.seed, self.epoch = members, batch_size, seed, 0
        self.rows, self.batches = len(members), max(1, len(members) // batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the Trainer calls it before each one."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        for _ in range(self.batches):
            yield from self.batch(rng)

    @abstractmethod
    def batch(self, rng: np.random.Generator) -> list[int]:
        """Row numbers of a batch."""


class Balanced(Drawn):
    """Batches of different rows, two by two of one class after the other, in a random order of the classes.

    When no class has two rows left, the batch is filled at random.
    """

    def batch(self, rng: np.random.Generator) -> list[int]:
        order = rng.permutation(self.rows)
        queues = [iter(order[self.members[order, k]].tolist()) for k in rng.permutation(self.members.shape[1])]
        chosen: dict[int, None] = {}
        while queues and len(chosen) + 2 <= self.batch_size:
            queue = queues.pop(0)
            if len(two := _next_two(queue, chosen)) == 2:
                chosen |= dict.fromkeys(two)
                queues.append(queue)
        rest = (row for row in order.tolist() if row not in chosen)
        return [*chosen, *(next(rest) for _ in range(self.batch_size - len(chosen)))]


def _next_two(queue: Iterator[int], taken: Container[int]) -> list[int]:
    """The next two rows of a queue that are not taken, fewer if it ends."""
    return list(islice((row for row in queue if row not in taken), 2))


class Pairs(Drawn):
    """Pairs of rows, one after the other: a row, and another one that shares a label or, in turn, shares none.

    A row that has no partner of one kind gets one of the other. For numbers the partner is any other row.
    """

    def __init__(self, members: np.ndarray, batch_size: int, seed: int) -> None:
        super().__init__(members, batch_size, seed)
        self.counts = members.astype(np.float32)

    def batch(self, rng: np.random.Generator) -> list[int]:
        anchors = np.resize(rng.permutation(self.rows), self.batch_size // 2)
        return [row for i, one in enumerate(anchors.tolist()) for row in (one, self._partner(one, i % 2 == 0, rng))]

    def _partner(self, row: int, alike: bool, rng: np.random.Generator) -> int:
        shared = self.counts @ self.counts[row] > 0  # no table of all pairs, whose size is the square of the rows
        others = np.arange(self.rows) != row
        candidates = np.flatnonzero((shared == alike) & others)
        return int(rng.choice(candidates if len(candidates) else np.flatnonzero(others)))


# ---- the training ---------------------------------------------------------------------------------------------------


class ContrastiveTrainer(FitTrainer):
    """The Trainer of `fit` with a contrastive loss, on batches that have something to contrast."""

    contrast: Contrast

    def _get_train_sampler(self, train_dataset: Any = None) -> Drawn:
        return self.contrast.sampler(self.args.train_batch_size, self.args.data_seed or 0)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Loss of the vectors of a batch."""
        labels = inputs.pop("labels")
        with self.accelerator.autocast():  # a part of the model does not know of it by itself
            vectors = text_vectors(model, inputs, self.contrast.pooling)
        loss = self.contrast.loss(vectors.float(), labels)
        return (loss, {"vectors": vectors}) if return_outputs else loss


@dataclass(frozen=True, eq=False, kw_only=True)
class ContrastiveSetup(Setup):
    """Setup of the contrastive training, which nothing selects and nothing restarts.

    Attributes:
        contrast: What is contrasted.
    """

    contrast: Contrast

    @property
    def classes(self) -> int:
        return 0

    def hopeless(self, trained: Trained, job: Job) -> str | None:
        return None  # its head was not trained

    def trainer(self, job: Job, seeds: dict[str, int], folder: Path) -> FitTrainer:
        model = self.pretrained.load(seeds["init"], self.problem)
        features = self.features(distinct(job.rows))
        vocabulary = leave_out_unread(model, (), self.options, features, self.pretrained.tokenizer)
        callbacks: list[TrainerCallback] = [Interrupt(), *([Progress(job.name)] if self.progress else [])]
        trainer = ContrastiveTrainer(
            model=model,
            args=arguments(self.options, seeds, self.steps, folder, self.save_steps),
            train_dataset=features,
            data_collator=DataCollatorWithPadding(self.pretrained.tokenizer),
            callbacks=callbacks,
            method_seed=seeds["method"],
        )
        trainer.contrast, trainer.vocabulary = self.contrast, vocabulary
        trainer.remove_callback(PrinterCallback)
        trainer.create_optimizer()
        return trainer
