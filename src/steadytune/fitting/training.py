"""One training of `fit`, from a job to a trained model; it can resume from every checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import (
    DataCollatorWithPadding,
    PrinterCallback,
    TrainerCallback,
)

from ..data.balance import WEIGHT
from ..data.problem import Problem, Regression
from ..data.scores import baseline, subgroups_of, worst_value
from ..data.splits import split
from ..files import state
from ..files.atomic import write_json
from ..methods.bases.bilevel import BiLevel
from ..methods.meta_semi import MetaSemi
from .callbacks import Interrupt, KeepBest, KeepOutputs, Patience, Progress, StopAt, StopFailing
from .fit_trainer import FitTrainer, Trained, arguments, only_logits
from .folder import last_checkpoint
from .loss import SOFT, chance, loss_of, losses_and_total
from .options import Options
from .outputs import by_length, device, logits
from .peft_models import adapted, read_model, write_model
from .pretrained import Pretrained, quiet
from .row_weights import RowWeights
from .scale import rescale
from .unread import leave_out_unread

if TYPE_CHECKING:
    from ..core import Method

logger = logging.getLogger("steadytune")

RESULT, STATE, OUTPUTS = "result.json", "methods.safetensors", "outputs"
TRIED = 256  # number of rows that show whether a model gives every row the same answer
CHUNK = 64  # number of them that it reads at a time, until two answers differ
SAME = ("init", "subset")  # seeds that runs of one fit share
CONSTANT = 1e-3  # predicted numbers with less than this share of the labels' spread count as equal


@dataclass(frozen=True, eq=False)
class Job:
    """One training.

    Attributes:
        name: Name of its folder among the checkpoints.
        rows: Rows to train on.
        select: Rows to score during training, which are not trained on; None for no selection.
        seeds: Seeds of head, data order, dropout and methods.
        stop_at: Step of the schedule after which training ends; None for the end of the schedule.
        start: Initial weights; the references of methods stay the pre-trained weights.
        averaged: Whether its weights are averaged with those of other jobs, so that a restart keeps the head's seed.
    """

    name: str
    rows: pd.DataFrame
    select: pd.DataFrame | None
    seeds: dict[str, int]
    stop_at: int | None = None
    start: Mapping[str, Tensor] | None = None
    averaged: bool = False


@dataclass(frozen=True, eq=False)
class Setup:
    """Setup that all trainings of one `fit` share.

    Attributes:
        pretrained: The pre-trained model.
        methods: The recipe's methods.
        options: Options of the fit.
        problem: The problem, in the scale of the training; `in_units` undoes the scale.
        steps: Number of steps of the schedule.
        metric: Metric used for selection.
        folder: Folder of the checkpoints.
        save_steps: Number of steps between checkpoints; 0 for none.
        progress: Whether to show a bar.
        keep: Whether to keep finished jobs on disk, because others follow.
        states: Whether to keep the state of the methods too.
        moments: Whether to keep the outputs of every evaluation, for `outputs_at`.
        subgroups: Names of the subgroups of the training rows; their positions are what methods read.
        unlabelled: Texts without labels, for procedures and methods; None without any.
    """

    pretrained: Pretrained
    methods: Sequence[Method]
    options: Options
    problem: Problem
    steps: int
    metric: str
    folder: Path
    save_steps: int
    progress: bool
    keep: bool = False
    states: bool = False
    moments: bool = False
    subgroups: Sequence[str] = ()
    unlabelled: pd.DataFrame | None = None

    def train(self, job: Job, trainer: FitTrainer | None = None) -> Trained:
        """Train from the last checkpoint, and restart with other seeds if a run fails.

        Args:
            job: The job.
            trainer: Trainer of the job, if it was made already.

        Raises:
            Interrupted: After a checkpoint.
        """
        done = self.folder / job.name
        if (done / RESULT).is_file():
            return self._read(done)
        for attempt in range(self.options.restarts + 1):
            folder = self.folder / (f"{job.name}-restart-{attempt}" if attempt else job.name)
            if (folder / "failed").is_file():
                trainer = None
                continue
            last = attempt == self.options.restarts
            seeds = restarted(job.seeds, attempt, SAME if job.averaged else ())
            trainer = trainer or self.trainer(job, seeds, folder)
            if not last and self.classes:
                trainer.add_callback(StopFailing(chance(self.options, self.problem)))
            seconds = trainer.train_here(last_checkpoint(folder))
            result = trainer.trained(seeds, seconds, attempt, trainer.failing(chance(self.options, self.problem)))
            result.hopeless = self.hopeless(result, job)
            if (result.failing or result.hopeless) and not last:
                why = "the training loss does not fall" if result.failing else f"the model {result.hopeless}"
                logger.warning("%s: %s: begun anew with other seeds", job.name, why)
                trainer = None
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                (folder / "failed").touch()
                continue
            if self.states and trainer.run is not None:
                result.state = trainer.run.state_dict()
            if self.keep:
                self._write(result, done)
            return result
        raise AssertionError("the last attempt returns")

    def hopeless(self, trained: Trained, job: Job) -> str | None:
        """Why a model is useless, or None.

        A model is useless if it gives the same answer to rows with different labels, or if its score on the select
        split is below that of the most frequent class of the training rows. Selection rows with a rare class may
        rightly get one answer, so training rows are tried too. The score of the worst subgroup says nothing here,
        because a subgroup may hold one class alone.
        """
        parts = [job.rows] if job.select is None else [job.select, job.rows]
        rows = pd.concat(
            [part.iloc[np.linspace(0, len(part) - 1, min(len(part), TRIED)).astype(int)] for part in parts]
        )

        def answer(some: pd.DataFrame) -> np.ndarray:
            features = self.pretrained.tokenise(some)
            return logits(trained.model, self.pretrained.tokenizer, features, self.options.bf16)

        if one_answer(self.problem, rows, answer):
            return "gives every row the same answer"
        curve = dict(trained.curve)
        if job.select is None or not self.classes or trained.steps not in curve or self.options.worst_subgroup:
            return None
        gold, metric = self.problem.array(job.select["label"]), self.problem.metric(self.metric)
        constant = baseline(self.problem, gold, self.problem.constant(job.rows["label"]))[self.metric]
        below = constant is not None and metric.goodness(curve[trained.steps]) < metric.goodness(constant)
        return "scores below the most frequent class on the validation rows" if below else None

    def in_units(self, trained: Trained) -> Trained:
        """The trained model with outputs in the units of the labels."""
        if isinstance(self.problem, Regression) and self.problem.scaled:
            rescale(trained.model, self.problem.spread, self.problem.mean, "standardize")
        return trained

    @property
    def classes(self) -> int:
        """Number of exclusive classes; 0 where chance has no loss to compare with."""
        return self.problem.classes

    def trainer(self, job: Job, seeds: dict[str, int], folder: Path) -> FitTrainer:
        """The Trainer of one attempt.

        Raises:
            ValueError: A method cannot act on this model, or two methods exclude each other.
        """
        model = adapted(self.pretrained.load(seeds["init"], self.problem), self.options.lora, self.options.peft)
        callbacks: list[TrainerCallback] = [Interrupt()]
        if self.progress:
            callbacks.append(Progress(job.name))
        if not self.save_steps:
            callbacks.append(KeepBest(self.metric))
        if job.stop_at is not None:
            callbacks.append(StopAt(job.stop_at))
        select, measure = self.selection(job, callbacks)
        selecting = select is not None
        methods, rows = self.hold_out(job)
        if (loss := loss_of(self.options, job.rows, self.problem)) is not None:
            own = losses_and_total(self.options, job.rows, self.problem)
            methods = [dataclasses.replace(m, losses=own) if isinstance(m, RowWeights) else m for m in methods]
        features = self.features(rows)
        read = features if rows is job.rows else self.pretrained.tokenise(job.rows)
        if self.unlabelled is not None and any(method.reads_unlabelled for method in methods):
            read = [*read, *self.pretrained.tokenise(self.unlabelled)]
        vocabulary = leave_out_unread(model, methods, self.options, read, self.pretrained.tokenizer)
        if selecting and self.options.patience is not None:
            callbacks.append(Patience(self.metric, self.options.patience))
        trainer = FitTrainer(
            model=model,
            args=arguments(
                self.options, seeds, self.steps, folder, self.save_steps, self.metric if selecting else None
            ),
            train_dataset=features,
            eval_dataset=select,
            data_collator=DataCollatorWithPadding(self.pretrained.tokenizer),
            preprocess_logits_for_metrics=only_logits,
            compute_metrics=measure,
            compute_loss_func=loss,
            callbacks=callbacks,
            methods=methods,
            method_seed=seeds["method"],
        )
        trainer.vocabulary = vocabulary
        trainer.remove_callback(PrinterCallback)
        trainer.create_optimizer()  # attaches the methods, so that they refuse before anything is written
        if job.start is not None:
            model.load_state_dict(job.start)
        return trainer

    def selection(
        self, job: Job, callbacks: list[TrainerCallback]
    ) -> tuple[list[dict[str, Any]] | None, Callable[[Any], dict[str, float]] | None]:
        """Features of the selection rows, and the function that scores them; None twice without selection.

        Args:
            job: The job.
            callbacks: Callbacks of its Trainer, to which one is added if outputs are kept.
        """
        if job.select is None or not self.options.evaluations:
            return None, None
        features = self.features(job.select)
        order = by_length(features)  # rows of like length share batches, which saves padding
        rows = job.select.iloc[order]
        keeper = KeepOutputs(self.folder / job.name / OUTPUTS) if self.moments else None
        if keeper is not None:
            callbacks.append(keeper)

        def measure(predicted: Any) -> dict[str, float]:
            if keeper is not None:
                keeper.last = predicted.predictions[np.argsort(order)]
            return self.measure(rows, predicted)

        return [features[i] for i in order], measure

    def outputs_at(self, job: Job, step: int) -> np.ndarray:
        """Outputs (rows, outputs) of a finished job for its selection rows, from the evaluation at a step."""
        return np.load(self.folder / job.name / OUTPUTS / f"{step}.npy", allow_pickle=False)

    def hold_out(self, job: Job) -> tuple[list[Method], pd.DataFrame]:
        """Methods, with the rows that they learn on beside the training rows, and the remaining training rows."""
        methods, rows = [], job.rows
        for method in self.methods:
            if isinstance(method, BiLevel) and method.learns and isinstance(method.outer, float):
                rows, others = split(rows, self.problem, method.outer, job.seeds["subset"])
                method = copy.copy(method)
                method.outer = self.batches(self.features(others))
            elif isinstance(method, MetaSemi) and self.unlabelled is not None:
                method = copy.copy(method)
                method.unlabelled = self.batches(self.pretrained.tokenise(self.unlabelled))
            methods.append(method)
        return methods, rows

    def batches(self, features: Any) -> Callable[[], Iterable[Any]]:
        """A function that returns batches of all rows, in another order at each call."""
        collator = DataCollatorWithPadding(self.pretrained.tokenizer)
        return lambda: DataLoader(features, self.options.batch_size, shuffle=True, collate_fn=collator)

    def features(self, rows: pd.DataFrame) -> list[dict[str, Any]]:
        """Tokens, labels, and what methods read: the weight of a row, or under other names the number of its subgroup.

        One dictionary per row. Rows without a weight count once, and a subgroup without training rows is -1.
        """
        features = self.pretrained.tokenise(rows)
        labels = rows[SOFT].tolist() if SOFT in rows else self.problem.ids(rows["label"].tolist())
        features = [{**feature, "labels": label} for feature, label in zip(features, labels, strict=True)]
        columns = {column for method in self.methods for column in method.input_columns}
        if not columns:
            return features
        known = {name: number for number, name in enumerate(self.subgroups)}
        numbers = [known.get(name, -1) for name in rows["subgroup"]] if "subgroup" in rows else [-1] * len(rows)
        weights = rows[WEIGHT].tolist() if WEIGHT in rows else [1.0] * len(rows)
        values = {column: weights if column == WEIGHT else numbers for column in columns}
        return [{**feature, **{column: own[i] for column, own in values.items()}} for i, feature in enumerate(features)]

    def measure(self, rows: pd.DataFrame, predicted: Any) -> dict[str, float]:
        """The selection metric on rows of the select split; its worst value if it is undefined."""
        metric = self.problem.metric(self.metric)
        gold = self.problem.read(predicted.label_ids)
        scores = self.problem.activate(predicted.predictions)
        given = scores if metric.needs_probabilities else self.problem.decide(scores)
        parts = subgroups_of(rows) if self.options.worst_subgroup else None
        value = worst_value(metric, gold, given, self.problem.names, parts)
        return {self.metric: metric.worst if value is None or not math.isfinite(value) else value}

    def _write(self, trained: Trained, folder: Path) -> None:
        """Write a finished job, with the result last, because it marks the job as finished."""
        with quiet():
            write_model(trained.model, folder / "model")
        if self.states:
            state.save(trained.state, folder / STATE)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        write_json(folder / RESULT, {**trained.record(), "history": trained.history})

    def _read(self, folder: Path) -> Trained:
        record = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        record["curve"] = [tuple(point) for point in record["curve"]]
        record["history"] = [tuple(point) for point in record.get("history", [])]
        held = state.load(folder / STATE) if self.states else {}
        model: Any = read_model(folder / "model", lambda: self.pretrained.load(record["seeds"]["init"]))
        return Trained(model.to(device()).eval(), **record, state=held)


def one_answer(problem: Problem, rows: pd.DataFrame, answer: Callable[[pd.DataFrame], np.ndarray]) -> bool:
    """Whether a model gives one answer to rows of different labels; it reads no more rows than show a difference.

    Numbers count as one answer if their spread is below a share `CONSTANT` of the labels' spread. The sum of their
    squared deviations only grows with more rows, so some of the rows can show that it is too large.

    Args:
        problem: The problem.
        rows: Rows with labels.
        answer: Outputs (rows, outputs) of the model for some of the rows.
    """
    labels = rows["label"]
    if not problem.ordered and len(set(labels)) == 1:
        return False
    limit = CONSTANT**2 * len(rows) * np.var(problem.ids(labels.tolist())) if problem.ordered else 0.0
    parts = math.ceil(len(rows) / CHUNK)
    given: list[np.ndarray] = []
    for i in range(parts):
        given.append(answer(rows.iloc[i::parts]))  # spread evenly over the rows
        answers = np.concatenate(given)
        if problem.ordered:
            differ = bool(len(answers) * np.var(answers) >= limit)
        else:
            differ = len(set(problem.decide(problem.activate(answers)))) > 1
        if differ:
            return False
    return True


def restarted(seeds: dict[str, int], attempt: int, kept: Collection[str] = ()) -> dict[str, int]:
    """Other seeds for head, order, dropout and methods, but for those that are kept; the same ones for attempt 0."""
    if not attempt:
        return seeds
    others = {name: np.random.SeedSequence([value, attempt]).generate_state(1)[0] for name, value in seeds.items()}
    return {name: value if name in kept else int(others[name]) for name, value in seeds.items()}
