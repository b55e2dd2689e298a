"""Callbacks of a training: progress, interruption, early stopping, best weights."""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..data.metrics import smaller_is_better
from ..files import state as stored
from ..files.atomic import write_whole
from .progress import progress_bar

logger = logging.getLogger("steadytune")


FAILING, FAILING_AFTER = (
    0.9,
    0.2,
)  # share of the loss of chance, log K, share of the steps (Dodge et al. 2020, arXiv 2002.06305)
BEST = "best.safetensors"  # file of a checkpoint with the weights that `KeepBest` held
LEAST = 10  # smallest number of steps after which a run can be judged as failing
SILENT = 30.0  # seconds between two lines of the log, without a bar


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM, after a checkpoint was written."""


def judged_at(steps: int) -> int:
    """Step at which a run is judged as failing or not."""
    return max(LEAST, int(FAILING_AFTER * steps))


def _failing(state: Any, chance: float, after: int) -> bool:
    """Whether no logged loss was below the threshold so far; the log is part of checkpoints."""
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return state.global_step >= after and bool(losses) and min(losses) > FAILING * chance


class StopFailing(TrainerCallback):
    """End a training whose loss has not fallen below 0.9 of that of chance, log K, after 20 % of its steps."""

    def __init__(self, chance: float) -> None:
        self.chance = chance

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        after = judged_at(args.max_steps)
        if state.global_step == after and _failing(state, self.chance, after):
            control.should_training_stop = True


class Begun(TrainerCallback):
    """Notes whether a first step has begun, which means that the checkpoint was read."""

    yes = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Find the best checkpoint beside the others: the state names it as the folder was called when it was made."""
        best = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.best_global_step}")
        if args.load_best_model_at_end and best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.yes = True


class StopAt(TrainerCallback):
    """End a training at a step of a longer schedule."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= state.global_step >= self.step


def best_moment(log: Sequence[Mapping[str, Any]], metric: str) -> int:
    """Step of the best evaluation in a Trainer's log; of equal scores, the lower loss wins, then the later step.

    A score such as Matthews' correlation stays at 0 until the model separates two classes, while its loss falls from
    the first step on. The first of equals would be the least trained model.

    Args:
        log: `TrainerState.log_history`, which is part of checkpoints.
        metric: Metric used for selection, with at least one evaluation.
    """
    sign = -1 if smaller_is_better(metric) else 1

    def quality(entry: Mapping[str, Any]) -> tuple[float, float, int]:
        loss = entry.get("eval_loss", math.inf)
        return sign * entry[f"eval_{metric}"], -loss if math.isfinite(loss) else -math.inf, entry["step"]

    return int(max((entry for entry in log if f"eval_{metric}" in entry), key=quality)["step"])


class Patience(TrainerCallback):
    """End a training after a number of evaluations without a new best; those in the warm-up do not count."""

    def __init__(self, metric: str, patience: int) -> None:
        self.metric, self.patience = metric, patience

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        since = max(best_moment(state.log_history, self.metric), args.get_warmup_steps(args.max_steps))
        moments = [entry["step"] for entry in state.log_history if f"eval_{self.metric}" in entry]
        control.should_training_stop |= sum(step > since for step in moments) >= self.patience


class KeepBest(TrainerCallback):
    """Keep the best evaluated weights in memory, for trainings without checkpoints."""

    def __init__(self, metric: str) -> None:
        self.metric, self.step = metric, 0
        self.weights: dict[str, Tensor] = {}

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        if best_moment(state.log_history, self.metric) == state.global_step:
            self.step = state.global_step
            self.weights = {n: t.detach().to("cpu", copy=True) for n, t in given["model"].state_dict().items()}

    def save(self, checkpoint: Path) -> None:
        """Write the weights into a checkpoint, because a signal writes one of a training that has no others."""
        if self.weights:
            stored.save({"step": self.step, "weights": self.weights}, checkpoint / BEST)

    def load(self, checkpoint: Path | None) -> None:
        """Take the weights back from a checkpoint that has some."""
        if checkpoint is not None and (checkpoint / BEST).is_file():
            held = stored.load(checkpoint / BEST)
            self.step, self.weights = held["step"], held["weights"]


class KeepOutputs(TrainerCallback):
    """Write the outputs of each evaluation to its own file, so that cross-validation has predictions at any step."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.last: np.ndarray | None = None

    def on_evaluate(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        values = np.asarray(self.last)

        def write(part: Path) -> None:
            with part.open("wb") as file:
                np.save(file, values, allow_pickle=False)

        write_whole(self.folder / f"{state.global_step}.npy", write)


class Interrupt(TrainerCallback):
    """End the training after a checkpoint on Ctrl-C or SIGTERM; a second signal ends it at once."""

    received: int | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self.received is not None

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.received is not None:
            control.should_training_stop = True  # only after the checkpoint, because the training is not over
            args.save_total_limit = None  # else its end would delete this checkpoint if another one is the best

    @classmethod
    def listening(cls, trainer: Trainer) -> _Listening:
        return next(c for c in trainer.callback_handler.callbacks if isinstance(c, cls)).heard()

    def heard(self) -> _Listening:
        """A block in which the first signal is only noted, and after which it raises `Interrupted`."""
        return _Listening(self)


@dataclass
class _Listening:
    """Delay signals until the end of the step. Only the main thread gets signals; in others nothing changes."""

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
        logger.warning("stopping after this step and its checkpoint (a second signal stops at once)")

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def __exit__(self, kind: Any, *rest: Any) -> None:
        self._restore()
        if kind is None and self.interrupt.received is not None:
            raise Interrupted


class Progress(TrainerCallback):
    """A bar over optimizer steps with the current loss; without a terminal, a line in the log every 30 seconds."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.said = 0.0
        self.bar: Any = None
        self.shown: dict[str, str] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar = progress_bar(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step")
        self.said = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        logs = logs or {}
        scores = ("loss", f"eval_{args.metric_for_best_model}")
        shown = {key.removeprefix("eval_"): f"{float(logs[key]):.3f}" for key in scores if key in logs}
        shown |= {f"{key}/step": f"{logs[key]:g}" for key in ("forwards", "backwards") if key in logs}
        if shown and self.bar is not None:
            self.bar.set_postfix(shown)
            if self.bar.disable and time.monotonic() - self.said > SILENT:
                self.said = time.monotonic()
                figures = ", ".join(f"{key} {value}" for key, value in shown.items())
                logger.info("%s: step %d of %d, %s", self.name, state.global_step, state.max_steps, figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.close()
        self.bar = None
