"""One training of `fit`: a job in, a trained model out, resumable at every checkpoint."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import math
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler
from tqdm import tqdm
from transformers import (
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedModel,
    PrinterCallback,
    TrainerCallback,
    TrainingArguments,
)

from ..data.metrics import SMALLER_IS_BETTER, score
from ..data.splits import split
from ..data.tables import Target
from ..errors import UsageError, one_line
from ..files import state
from ..files.atomic import write_json
from ..methods.bases.bilevel import BiLevel
from ..trainer import Trainer
from .encoding import label_ids, tokenise
from .folder import last_checkpoint
from .peft_models import adapted, merged, read_model, write_model
from .recipe import MAX_STEPS, Recipe
from .scale import rescale
from .source import Source, quiet

if TYPE_CHECKING:
    from ..core import Method

logger = logging.getLogger("steadytune")

WINDOW = 50  # batches whose rows are sorted by length together
FAILING, FAILING_AFTER = 0.9, 0.2  # share of log K, share of the steps (Dodge et al. 2020, arXiv 2002.06305)
LEAST = 10  # steps before any run is judged
RESULT, STATE = "result.json", "methods.safetensors"


@dataclass(frozen=True, eq=False)
class Job:
    """One training.

    Attributes:
        name: of its folder among the checkpoints.
        rows: to train on.
        select: to score while training, never trained on; None for no selection.
        seeds: of head, data order, dropout and methods.
        stop_at: end after this step of the schedule; None for its end.
        start: weights to begin with; methods have taken the pre-trained ones for their references.
    """

    name: str
    rows: pd.DataFrame
    select: pd.DataFrame | None
    seeds: dict[str, int]
    stop_at: int | None = None
    start: Mapping[str, Tensor] | None = None


@dataclass(eq=False)
class Trained:
    """A finished job.

    Attributes:
        model: in evaluation mode; plain, unless it has adapters that cannot be merged.
        steps: optimizer steps behind the model.
        seconds: of training, since the last resume.
        curve: (step, score on the select split).
        seeds: those in force after restarts.
        failures: runs that were stopped because their loss did not fall.
        failing: whether the loss of this one did not fall either.
        loss: the last training loss logged, a mean over 2 % of the steps, penalties included.
        passes: forward and backward passes of a step in those of a plain one, counted since the last resume.
        state: of core and methods at the end, as `Run.state_dict` gives it; empty unless the setup keeps it.
    """

    model: PreTrainedModel
    steps: int
    seconds: float
    curve: list[tuple[int, float]]
    seeds: dict[str, int]
    failures: int = 0
    failing: bool = False
    loss: float | None = None
    passes: float = 1.0
    state: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """All but the tensors, for JSON."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("model", "state")]
        return {name: getattr(self, name) for name in names}


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after a checkpoint was written."""


@dataclass(frozen=True, eq=False)
class Setup:
    """What all trainings of one `fit` share.

    Attributes:
        source: the pre-trained model.
        methods: the recipe's methods.
        recipe: its options.
        target: what is predicted; in the scale of the training, which `in_units` takes back.
        steps: of the schedule.
        metric: that selects.
        folder: of the checkpoints.
        save_steps: between checkpoints, 0 for none.
        progress: whether to show a bar.
        keep: whether finished jobs stay on disk, because others follow.
        states: whether the state of the methods is kept too.
    """

    source: Source
    methods: Sequence[Method]
    recipe: Recipe
    target: Target
    steps: int
    metric: str
    folder: Path
    save_steps: int
    progress: bool
    keep: bool = False
    states: bool = False

    def train(self, job: Job, trainer: FitTrainer | None = None) -> Trained:
        """Train, restarting with other seeds while a run fails, from the last checkpoint there is.

        Args:
            job: what to train.
            trainer: of the job, if it was made already.

        Raises:
            Interrupted: after a checkpoint.
        """
        done = self.folder / job.name
        if (done / RESULT).is_file():
            return self._read(done)
        for attempt in range(self.recipe.restarts + 1):
            folder = self.folder / (f"{job.name}-restart-{attempt}" if attempt else job.name)
            if (folder / "failed").is_file():
                trainer = None
                continue
            last = attempt == self.recipe.restarts
            seeds = restarted(job.seeds, attempt)
            trainer = trainer or self.trainer(job, seeds, folder)
            if not last and self.classes:
                trainer.add_callback(StopFailing(self.classes))
            seconds = trainer.train_here(last_checkpoint(folder))
            if trainer.failing(self.classes) and not last:
                logger.warning("%s: the training loss does not fall: stopped, starting with another seed", job.name)
                trainer = None
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                (folder / "failed").touch()
                continue
            found = trainer.trained(seeds, seconds, attempt, trainer.failing(self.classes))
            if self.states and trainer.run is not None:
                found.state = trainer.run.state_dict()
            if self.keep:
                self._write(found, done)
            return found
        raise AssertionError("the last attempt returns")

    def in_units(self, trained: Trained) -> Trained:
        """With the outputs of its model in the units of the labels."""
        if self.target.scaled:
            rescale(trained.model, self.target.spread, self.target.mean, "standardize")
        return trained

    @property
    def classes(self) -> int:
        """Number of exclusive classes; 0 where chance has no loss to compare with."""
        return len(self.target.names) if self.target.kind == "classification" else 0

    def trainer(self, job: Job, seeds: dict[str, int], folder: Path) -> FitTrainer:
        """The Trainer of one attempt.

        Raises:
            ValueError: a method that cannot act on this model, or two that exclude each other.
        """
        model = adapted(self.source.load(seeds["init"], self.target), self.recipe.lora, self.recipe.peft)
        callbacks: list[TrainerCallback] = [Interrupt()]
        if self.progress:
            callbacks.append(Progress(job.name))
        if not self.save_steps:
            callbacks.append(KeepBest(self.metric))
        if job.stop_at is not None:
            callbacks.append(StopAt(job.stop_at))
        select = self.features(job.select) if self.recipe.evaluations and job.select is not None else None
        selecting = select is not None
        methods, rows = self.hold_out(job)
        if selecting and self.recipe.patience is not None:
            callbacks.append(EarlyStoppingCallback(early_stopping_patience=self.recipe.patience))
        trainer = FitTrainer(
            model=model,
            args=arguments(self.recipe, seeds, self.steps, folder, self.save_steps, self.metric if selecting else None),
            train_dataset=self.features(rows),
            eval_dataset=select,
            data_collator=DataCollatorWithPadding(self.source.tokenizer),
            preprocess_logits_for_metrics=only_logits,
            compute_metrics=self.measure if selecting else None,
            compute_loss_func=weighted_loss(self.recipe, job.rows, self.target),
            callbacks=callbacks,
            methods=methods,
            method_seed=seeds["method"],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.create_optimizer()  # attaches the methods: what they refuse is known before anything is written
        if job.start is not None:
            model.load_state_dict(job.start)
        return trainer

    def hold_out(self, job: Job) -> tuple[list[Method], pd.DataFrame]:
        """The methods, those that learn on a share of the rows provided with it, and the rows that are left."""
        methods, rows = [], job.rows
        for method in self.methods:
            if isinstance(method, BiLevel) and method.learns and isinstance(method.outer, float):
                rows, others = split(rows, self.target, method.outer, job.seeds["subset"])
                method = copy.copy(method)
                method.outer = self.batches(others)
            methods.append(method)
        return methods, rows

    def batches(self, rows: pd.DataFrame) -> Callable[[], Iterable[Any]]:
        """A function that gives batches of all rows, in another order each time."""
        features: Any = self.features(rows)
        collator = DataCollatorWithPadding(self.source.tokenizer)
        return lambda: DataLoader(features, self.recipe.batch_size, shuffle=True, collate_fn=collator)

    def features(self, rows: pd.DataFrame) -> list[dict[str, Any]]:
        """Tokens and labels, one dictionary per row."""
        features = tokenise(rows, self.source.tokenizer, self.source.max_length)
        labels = label_ids(rows["label"].tolist(), self.target)
        return [{**feature, "labels": label} for feature, label in zip(features, labels, strict=True)]

    def measure(self, predicted: Any) -> dict[str, float]:
        """The metric that selects, on the select split; where it is undefined, the worst there is."""
        gold, guess = (decide(values, self.target) for values in (predicted.label_ids, predicted.predictions))
        value = score(self.target, gold, guess)[self.metric]
        worst = 1e9 if self.metric in SMALLER_IS_BETTER else -1.0
        return {self.metric: worst if value is None or not math.isfinite(value) else value}

    def _write(self, found: Trained, folder: Path) -> None:
        """The result comes last: without it the job is not finished."""
        with quiet():
            write_model(found.model, folder / "model")
        if self.states:
            state.save(found.state, folder / STATE)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint, ignore_errors=True)
        write_json(folder / RESULT, found.record())

    def _read(self, folder: Path) -> Trained:
        record = json.loads((folder / RESULT).read_text(encoding="utf-8"))
        record["curve"] = [tuple(point) for point in record["curve"]]
        held = state.load(folder / STATE) if self.states else {}
        model: Any = read_model(folder / "model", lambda: self.source.load(record["seeds"]["init"]))
        return Trained(model.to(device()).eval(), **record, state=held)


def device() -> torch.device:
    """Where models are trained and asked: the accelerator, if there is one."""
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def restarted(seeds: dict[str, int], attempt: int) -> dict[str, int]:
    """Other seeds for head, order, dropout and methods; the same ones for attempt 0."""
    if not attempt:
        return seeds
    return {name: int(np.random.SeedSequence([value, attempt]).generate_state(1)[0]) for name, value in seeds.items()}


def decide(values: Any, target: Target) -> np.ndarray:
    """Class names, tuples of class names, or numbers, from the label ids or the outputs of a model.

    Args:
        values: (rows,) class numbers, or (rows, outputs).
        target: what is predicted.
    """
    values = np.asarray(values)
    if not target.names:
        return values.reshape(len(values)).astype(float) * target.spread + target.mean
    if target.kind == "multilabel":  # label 1 or logit above 0, that is a probability above a half
        found = [tuple(name for name, on in zip(target.names, row, strict=True) if on > 0) for row in values]
        return np.fromiter(found, dtype=object, count=len(found))
    numbers = values.argmax(axis=1) if values.ndim == 2 else values
    return np.array(target.names, dtype=object)[numbers.astype(int)]


def only_logits(logits: Any, labels: Any) -> Any:
    """Encoder-decoders return more than logits."""
    return logits[0] if isinstance(logits, (tuple, list)) else logits


def class_weights(rows: pd.DataFrame, target: Target) -> Tensor:
    """Inverse frequencies whose mean over rows is 1; for several labels how many rows lack a label per row with it."""
    if target.kind == "multilabel":
        has = np.array(label_ids(rows["label"].tolist(), target))
        return torch.tensor((1 - has).sum(0) / np.maximum(has.sum(0), 1), dtype=torch.float32)
    counts = np.bincount(label_ids(rows["label"].tolist(), target), minlength=len(target.names))
    return torch.tensor(len(rows) / (len(counts) * np.maximum(counts, 1)), dtype=torch.float32)


def weighted_loss(recipe: Recipe, rows: pd.DataFrame, target: Target) -> Callable[..., Tensor] | None:
    """The loss with class weights; None for the model's own."""
    if recipe.class_weights == "none":
        return None
    weights = class_weights(rows, target)
    several = target.kind == "multilabel"

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        here = weights.to(outputs.logits.device, outputs.logits.dtype)
        if several:
            return nn.functional.binary_cross_entropy_with_logits(outputs.logits, labels, pos_weight=here)
        return nn.functional.cross_entropy(outputs.logits, labels, weight=here)

    return loss


def arguments(
    recipe: Recipe, seeds: dict[str, int], steps: int, folder: Path, save_steps: int, metric: str | None = None
) -> TrainingArguments:
    """The recipe in transformers' words; with a metric and checkpoints, the best of several checkpoints is kept."""
    accelerated = torch.accelerator.is_available()
    every = save_steps
    selection: dict[str, Any] = {}
    if metric is not None:
        between = max(1, steps // recipe.evaluations)
        every = between if save_steps else 0
        selection = {
            "eval_strategy": "steps",
            "eval_steps": between,
            "load_best_model_at_end": bool(save_steps),  # else `KeepBest`
            "metric_for_best_model": metric,
            "greater_is_better": metric not in SMALLER_IS_BETTER,
            "restore_callback_states_from_checkpoint": True,  # the patience already spent
        }
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        warmup_steps=recipe.warmup,  # below 1: a share of the steps
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=4 * recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        bf16=recipe.bf16,
        use_cpu=not accelerated,
        dataloader_pin_memory=accelerated and torch.cuda.is_available(),
        seed=seeds["dropout"],
        data_seed=seeds["data"],
        save_strategy="steps" if every else "no",
        save_steps=every or MAX_STEPS,
        save_total_limit=1,  # and the best one
        logging_steps=max(1, steps // 50),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,  # the bar is ours
        **selection,
    )
    if args.n_gpu > 1:  # transformers would split batches over all devices (DataParallel)
        args._n_gpu = 1
        logger.info("training on %s alone", args.device)
    return args


class ByLength(Sampler):
    """Rows in random order, those of like length in one batch, which spares padding.

    Batches of `WINDOW` together are drawn at random and sorted by length, then the batches are shuffled. A function of
    (seed, epoch) alone: nothing to save, and neighbouring seeds share no order.

    Args:
        lengths: of the rows, in tokens.
        batch_size: rows per batch; an incomplete batch comes last.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the Trainer before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order = rng.permutation(len(self.lengths))
        whole = len(order) - len(order) % self.batch_size
        rest, order = order[whole:], order[:whole]
        size = WINDOW * self.batch_size
        windows = [order[i : i + size] for i in range(0, whole, size)]
        batches = [
            batch
            for window in windows
            for batch in window[np.argsort(self.lengths[window], kind="stable")].reshape(-1, self.batch_size)
        ]
        shuffled = [batches[i] for i in rng.permutation(len(batches))]
        return iter(np.concatenate([*shuffled, rest]).astype(int).tolist())


class FitTrainer(Trainer):
    """Our Trainer with rows of like length together, and what a job wants to know of it."""

    ended = False  # whether the checkpoint resumed from was the last one of its training

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(row["input_ids"]) for row in rows]
        return ByLength(lengths, self.args.train_batch_size, self.args.data_seed or 0)

    def train_here(self, checkpoint: Path | None) -> float:
        """Train from a checkpoint, or from the start; returns the seconds since then.

        Raises:
            Interrupted: a signal came; the last step is in a checkpoint.
            UsageError: the checkpoint cannot be read.
        """
        if checkpoint is not None:
            logger.info("resuming from %s", checkpoint)
        self.ended = checkpoint is not None and was_stopped(checkpoint)
        started = time.perf_counter()
        begun = Begun()
        self.add_callback(begun)
        try:
            with quiet(warnings=True), Interrupt.listening(self):  # every checkpoint has a bar
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except Exception as error:  # damaged files raise what their parsers raise
            if begun.yes or checkpoint is None:
                raise
            raise UsageError(
                f"{checkpoint}: the checkpoint cannot be resumed: {one_line(error)[:500]} Start anew with --overwrite."
            ) from error
        return time.perf_counter() - started

    def _over(self) -> bool:
        return super()._over() or self.ended

    def failing(self, classes: int) -> bool:
        """Whether the loss never fell below 0.9 log K after 20 % of the steps."""
        return bool(classes) and _failing(self.state, classes, judged_at(self.args.max_steps))

    def trained(self, seeds: dict[str, int], seconds: float, failures: int, failing: bool) -> Trained:
        """The model as it is now, and how it came about."""
        assert self.model is not None
        key = f"eval_{self.args.metric_for_best_model}"
        curve = [(int(entry["step"]), entry[key]) for entry in self.state.log_history if key in entry]
        steps = self.state.global_step
        if self.state.best_model_checkpoint is not None:
            steps = int(self.state.best_model_checkpoint.rpartition("-")[2])
        for kept in (c for c in self.callback_handler.callbacks if isinstance(c, KeepBest) and c.weights):
            self.model.load_state_dict(kept.weights)
            steps = kept.step
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        loss = losses[-1] if losses and math.isfinite(losses[-1]) else None
        passes = self.run.counted.plain / self.run.batches if self.run is not None and self.run.batches else 1.0
        return Trained(merged(self.model).eval(), steps, seconds, curve, seeds, failures, failing, loss, passes)


def was_stopped(checkpoint: Path) -> bool:
    """Whether a callback (early stopping, the step chosen, a loss that did not fall) had ended the training there."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return bool(state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"])


def judged_at(steps: int) -> int:
    """The step at which a run is judged failing or not."""
    return max(LEAST, int(FAILING_AFTER * steps))


def _failing(state: Any, classes: int, after: int) -> bool:
    """From the log, which travels in checkpoints: whether no logged loss so far was below the threshold."""
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return state.global_step >= after and bool(losses) and min(losses) > FAILING * math.log(classes)


class StopFailing(TrainerCallback):
    """End a training whose loss has not fallen below 0.9 log K after 20 % of its steps."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = judged_at(args.max_steps)
        if state.global_step == after and _failing(state, self.classes, after):
            control.should_training_stop = True


class Begun(TrainerCallback):
    """Whether a first step has begun, that is, everything was read."""

    yes = False

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.yes = True


class StopAt(TrainerCallback):
    """End a training at a step of a longer schedule."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


class KeepBest(TrainerCallback):
    """The best of the evaluated weights in memory, for trainings that write no checkpoints."""

    def __init__(self, metric: str) -> None:
        self.metric, self.sign = f"eval_{metric}", -1 if metric in SMALLER_IS_BETTER else 1
        self.best, self.step = -math.inf, 0
        self.weights: dict[str, Tensor] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        value = self.sign * given["metrics"][self.metric]
        if value > self.best:
            self.best, self.step = value, state.global_step
            self.weights = {n: t.detach().to("cpu", copy=True) for n, t in given["model"].state_dict().items()}


class Interrupt(TrainerCallback):
    """Ctrl-C and SIGTERM end the training after a checkpoint; a second one ends it at once."""

    received: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self.received is not None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.received is not None  # not in the checkpoint: the training is not over

    @classmethod
    def listening(cls, trainer: FitTrainer) -> _Listening:
        return _Listening(next(c for c in trainer.callback_handler.callbacks if isinstance(c, cls)))


@dataclass
class _Listening:
    """While open, signals wait for the end of the step. Only a main thread gets signals; elsewhere nothing changes."""

    interrupt: Interrupt
    before: dict[int, Any] = field(default_factory=dict)

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: Any) -> None:
        if self.interrupt.received is not None:
            self._restore()
            raise KeyboardInterrupt
        self.interrupt.received = number
        logger.warning("stopping after this step and its checkpoint (once more: at once)")

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self._restore()
        if kind is None and self.interrupt.received is not None:
            raise Interrupted


class Progress(TrainerCallback):
    """One bar over optimizer steps with the running loss."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        scores = ("loss", f"eval_{args.metric_for_best_model}")
        shown = {key.removeprefix("eval_"): f"{float(logs[key]):.3f}" for key in scores if key in logs}
        shown |= {f"{key}/step": f"{logs[key]:g}" for key in ("forwards", "backwards") if key in logs}
        if shown and self.bar is not None:
            self.bar.set_postfix(shown)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
        self.bar = None
