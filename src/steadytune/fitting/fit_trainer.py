"""The Trainer of `fit`, with batches of similar length, and the result of a job."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Sampler
from transformers import PreTrainedModel, TrainingArguments

from ..data.metrics import smaller_is_better
from ..errors import UsageError, one_line
from ..trainer import Trainer
from ..vocabulary import vocabulary_of
from .callbacks import BEST, Begun, Interrupt, KeepBest, _failing, best_moment, judged_at
from .options import MAX_STEPS, Options
from .peft_models import merged
from .pretrained import quiet
from .unread import Vocabulary

logger = logging.getLogger("steadytune")


# Entries of a Trainer's log that are kept, and their names in this package.
HISTORY = {"loss": "loss", "learning_rate": "lr", "grad_norm": "grad_norm", "forwards": "forwards",
           "backwards": "backwards"}  # fmt: skip
WINDOW = 50  # number of batches whose rows are sorted by length together


@dataclass(eq=False)
class Trained:
    """A finished job.

    Attributes:
        model: The model in evaluation mode; a plain one, unless it has adapters that cannot be merged.
        steps: Number of optimizer steps of the model.
        seconds: Seconds of training, over all legs of a resumed one.
        curve: Pairs (step, score on the select split).
        seeds: Seeds of the last start.
        failures: Number of earlier starts that were stopped because their loss did not fall.
        failing: Whether the loss of the last start did not fall either.
        loss: The last training loss logged, a mean over 2 % of the steps, penalties included.
        skipped: Number of optimizer steps that were skipped because their gradient was not finite.
        passes: Passes of a step as a multiple of a plain step's, counted since the last resume.
        hopeless: Why the model is useless (it gives every row the same answer, or is worse than a constant one); None
            if it is not.
        history: Triples (step, name, value) of loss, lr, grad_norm, forwards, backwards, and scores on the select
            split.
        notes: What else the user should know of the training, in sentences.
        state: State of core and methods at the end, as `Run.state_dict` gives it; empty unless the setup keeps it.
    """

    model: PreTrainedModel
    steps: int
    seconds: float
    curve: list[tuple[int, float]]
    seeds: dict[str, int]
    failures: int = 0
    failing: bool = False
    loss: float | None = None
    skipped: int = 0
    passes: float = 1.0
    hopeless: str | None = None
    history: list[tuple[int, str, float]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)

    def record(self) -> dict[str, Any]:
        """Everything but tensors and history, ready for JSON."""
        names = [f.name for f in dataclasses.fields(self) if f.name not in ("model", "state", "history")]
        return {name: getattr(self, name) for name in names}


def only_logits(logits: Any, labels: Any) -> Any:
    """Logits alone; encoder-decoders return more."""
    return logits[0] if isinstance(logits, (tuple, list)) else logits


def arguments(
    options: Options, seeds: dict[str, int], steps: int, folder: Path, save_steps: int, metric: str | None = None
) -> TrainingArguments:
    """The recipe in transformers' words; with a metric and checkpoints, the best of several checkpoints is kept."""
    accelerated = torch.accelerator.is_available()
    every = save_steps
    selection: dict[str, Any] = {}
    if metric is not None:
        between = max(1, steps // options.evaluations)
        every = between if save_steps else 0
        selection = {
            "eval_strategy": "steps",
            "eval_steps": between,
            "load_best_model_at_end": bool(save_steps),  # else `KeepBest`
            "metric_for_best_model": metric,
            "greater_is_better": not smaller_is_better(metric),
        }
    args = TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=options.lr,
        weight_decay=options.weight_decay,
        warmup_steps=options.warmup,  # below 1: a share of the steps
        max_grad_norm=options.max_grad_norm,
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=4 * options.batch_size,
        gradient_accumulation_steps=options.accumulation,
        bf16=options.bf16,
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
    """Sampler of rows in random order that puts rows of similar length into one batch, which saves padding.

    The rows of `WINDOW` batches are drawn at random and sorted by length; then the batches are shuffled. The order
    depends only on (seed, epoch), so there is no state to save, and neighbouring seeds have different orders.

    Args:
        lengths: Lengths of the rows, in tokens.
        batch_size: Rows per batch; an incomplete batch comes last.
        seed: Seed of the order.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = np.asarray(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the Trainer calls it before each one."""
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
    """Our Trainer with batches of similar length, and with the results of a job."""

    ended = False  # whether the checkpoint resumed from was the last one of its training
    vocabulary: Vocabulary  # what is left out of the training
    _collated: list[Any] | None = None  # batches of the selection rows, which every evaluation passes again

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches of the selection rows, made once. Unlike the stock loader they draw no random number."""
        if eval_dataset is not None and eval_dataset is not self.eval_dataset:
            return super().get_eval_dataloader(eval_dataset)
        if self._collated is None:
            loader: Any = super().get_eval_dataloader()
            rows: Any = self.eval_dataset
            self._collated = [loader.collate_fn([rows[i] for i in batch]) for batch in loader.batch_sampler]
        # the stock function, for loaders of accelerate, would cut every batch to the length of the last training batch
        self.gather_function = self.accelerator.gather
        return self._collated

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        rows: Any = self.train_dataset if train_dataset is None else train_dataset
        lengths = [len(row["input_ids"]) for row in rows]
        return ByLength(lengths, self.args.train_batch_size, self.args.data_seed or 0)

    def train_here(self, checkpoint: Path | None) -> float:
        """Train from a checkpoint or from the start; return the seconds of training, also those before the checkpoint.

        With 0 steps nothing is trained: the model is left with the head that it begins with.

        Raises:
            Interrupted: A signal came; the last step is in a checkpoint.
            UsageError: The checkpoint cannot be read.
        """
        if not self.args.max_steps:  # to transformers that means no limit
            return 0.0
        if checkpoint is not None:
            logger.info("resuming from %s", checkpoint)
            check_best(checkpoint, in_memory=bool(self._keepers))
        self.ended = checkpoint is not None and was_stopped(checkpoint)
        begun = Begun()
        self.add_callback(begun)
        try:
            for kept in self._keepers:
                kept.load(checkpoint)
            with quiet(warnings=True), Interrupt.listening(self):  # every checkpoint has a bar
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        except Exception as error:  # damaged files raise what their parsers raise
            if begun.yes or checkpoint is None:
                raise
            raise UsageError(
                f"{checkpoint}: the checkpoint cannot be resumed: {one_line(error)[:500]} Start anew with --overwrite."
            ) from error
        return self.seconds

    @property
    def _keepers(self) -> list[KeepBest]:
        """The callback that keeps the best weights in memory, if there is one."""
        return [c for c in self.callback_handler.callbacks if isinstance(c, KeepBest)]

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model, and in checkpoints the best weights that are kept in memory."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and output_dir is not None:
            for kept in self._keepers:
                kept.save(Path(output_dir))

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Choose the best evaluation by `best_moment`; the stock Trainer keeps the first of equals."""
        metric = str(self.args.metric_for_best_model)
        best = best_moment(self.state.log_history, metric) == self.state.global_step
        if best:
            self.state.best_metric, self.state.best_global_step = metrics[f"eval_{metric}"], self.state.global_step
        return best

    def history(self) -> list[tuple[int, str, float]]:
        """Triples (step, name, value) from the log: training, and scores on the select split."""
        names = {**HISTORY, "eval_loss": "eval_loss", f"eval_{(m := self.args.metric_for_best_model)}": f"eval_{m}"}
        return [
            (int(entry["step"]), name, float(entry[key]))
            for entry in self.state.log_history
            for key, name in names.items()
            if key in entry
        ]

    def _over(self) -> bool:
        return super()._over() or self.ended

    def failing(self, chance: float) -> bool:
        """Whether the loss was never below 0.9 of that of chance in the first 20 % of the steps or later."""
        return bool(chance) and _failing(self.state, chance, judged_at(self.args.max_steps))

    def trained(self, seeds: dict[str, int], seconds: float, failures: int, failing: bool) -> Trained:
        """Result of the job: the present model with its whole vocabulary, and the facts of its training."""
        assert self.model is not None
        key = f"eval_{self.args.metric_for_best_model}"
        curve = [(int(entry["step"]), entry[key]) for entry in self.state.log_history if key in entry]
        steps = self.state.global_step
        if self.state.best_model_checkpoint is not None:
            steps = int(self.state.best_model_checkpoint.rpartition("-")[2])
        for kept in (kept for kept in self._keepers if kept.weights):
            self.model.load_state_dict(kept.weights)
            steps = kept.step
        if (vocabulary := vocabulary_of(self.model)) is not None:
            vocabulary.restore()
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        loss = losses[-1] if losses and math.isfinite(losses[-1]) else None
        passes = self.run.counted.plain / self.run.batches if self.run is not None and self.run.batches else 1.0
        skipped = self.run.finite.skipped if self.run is not None else 0
        return Trained(
            merged(self.model).eval(), steps, seconds, curve, seeds, failures, failing, loss, skipped, passes,
            history=self.history(),
        )  # fmt: skip


def was_stopped(checkpoint: Path) -> bool:
    """Whether a callback ended the training at a checkpoint, such as early stopping or a loss that did not fall."""
    return bool(_state(checkpoint)["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"])


def check_best(checkpoint: Path, in_memory: bool) -> None:
    """Check that the best weights so far are where a resumed training looks for them.

    Args:
        checkpoint: The checkpoint to resume from.
        in_memory: Whether the resumed training keeps them in memory (`KeepBest`), and not in checkpoints.

    Raises:
        UsageError: They are not, because the training began with or without checkpoints, and now it is the other way.
    """
    step = _state(checkpoint).get("best_global_step")
    if step and in_memory != (checkpoint / BEST).is_file():
        before, now = ("above 0", 0) if in_memory else (0, "above 0")
        raise UsageError(
            f"{checkpoint}: the best weights so far, of step {step}, were kept with save_steps {before}, and with "
            f"save_steps {now} they would be lost: resume with save_steps {before}, as the run began."
        )


def _state(checkpoint: Path) -> dict[str, Any]:
    """The Trainer's state in a checkpoint."""
    return json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
