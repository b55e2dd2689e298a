"""Estimate the time, memory and files of a `fit` from three measured steps."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import TrainerCallback

from ..core.facts import FORWARD
from .fit_trainer import ByLength
from .memory import peak_memory
from .training import Job, Setup

if TYPE_CHECKING:
    from .plan import Plan

MEASURED = 3  # number of measured steps, after one for warming up


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a `fit`.

    Attributes:
        trainings: Number of trainings: folds and runs.
        steps: Largest number of optimizer steps of one training.
        seconds_per_step: Seconds of a step with batches of mean length, on this machine.
        minutes: Minutes for all trainings and evaluations.
        memory: Peak memory in bytes, of the accelerator if there is one, otherwise of this process.
        files: Size in bytes of each kind of file that will be written.
        vocabulary: What the compact vocabulary saves, or why there is none, in words.
        procedure: The trainings of a procedure, in words.
        stages: The trainings before it, in words; their time is part of the minutes.
    """

    trainings: int
    steps: int
    seconds_per_step: float
    minutes: float
    memory: int
    files: dict[str, int]
    vocabulary: str
    procedure: str = ""
    stages: str = ""

    def __str__(self) -> str:
        written = ", ".join(f"{name} {size / 1e6:,.1f} MB" for name, size in self.files.items())
        return (
            f"{self.stages}{self.procedure}{self.trainings} training(s) of at most {self.steps} steps, "
            f"{self.seconds_per_step:.2f} s each: about {self.minutes:.1f} minutes with evaluation. "
            f"Peak memory about {self.memory / 1e9:.1f} GB. "
            f"Files: {written}. {_sentence(self.vocabulary)}"
        )


def estimate(make_setup: Callable[[Path], Setup], jobs: Sequence[Job], plan: Plan, passes: float = 1.0) -> Estimate:
    """Measure the first steps of the first job in a temporary folder; nothing else is written.

    Args:
        make_setup: Makes the setup of the trainings, with checkpoints in a folder.
        jobs: Trainings.
        plan: Plan of the fit.
        passes: Passes of a training as a multiple of those of fine-tuning alone.

    Raises:
        UsageError: As in training.
    """
    with tempfile.TemporaryDirectory() as folder:
        setup = make_setup(Path(folder))
        if plan.procedure is not None:
            plan.procedure.first(setup, jobs[0])  # refuses what the procedure cannot train
        quiet = dataclasses.replace(
            setup,
            save_steps=0,
            progress=False,
            options=dataclasses.replace(setup.options, evaluations=0, patience=None),
        )
        trainer = quiet.trainer(jobs[0], jobs[0].seeds, Path(folder))
        clock = Clock()
        trainer.add_callback(clock)
        trainer.train_here(None)
        model: Any = trainer.model
        weights = sum(t.nbytes for t in model.state_dict().values())
    data: Any = trainer.train_dataset
    lengths = np.array([len(row["input_ids"]) for row in data])
    size, steps = plan.options.batch_size, plan.options.accumulation
    padded = per_step(lengths[list(ByLength(lengths, size, trainer.args.data_seed or 0))], size, steps)
    first = int(len(clock.seconds) > 1)  # the first step is the slowest, and counts only where it is the only one
    timed = np.resize(padded, len(clock.seconds))[first:]
    per_token = float(np.sum(clock.seconds[first:]) / np.sum(timed))
    tests = sum(len(f["input_ids"]) for rows in plan.data.tests.values() for f in setup.pretrained.tokenise(rows))
    trainings = plan.num_seeds + (plan.folds if plan.refit else 0) + plan.distil
    evaluated = trainings + (trainings * plan.options.evaluations)
    before = sum(stage.tokens(setup.pretrained) for stage in plan.stages) * per_token
    trained = passes * trainings * plan.steps * padded.mean() * per_token
    seconds = before + trained + evaluated * tests * per_token * FORWARD
    return Estimate(
        trainings=trainings,
        steps=plan.steps,
        seconds_per_step=padded.mean() * per_token,
        minutes=seconds / 60,
        memory=peak_memory(),
        files={
            "model": weights * (plan.num_seeds if plan.combine == "ensemble" and not plan.distil else 1),
            "checkpoints while training": 3 * weights * (2 if plan.save_steps or plan.options.evaluations else 0),
            "predictions and records": 200 * sum(len(rows) for rows in plan.data.tests.values()) + 20_000,
        },
        vocabulary=str(trainer.vocabulary),
        procedure="" if plan.procedure is None else f"{_sentence(plan.procedure.words(plan) or '')} ",
        stages="".join(f"First {stage.title}. " for stage in plan.stages),
    )


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."


class Clock(TrainerCallback):
    """Times the first steps and ends the training."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.seconds.append(time.perf_counter() - self.started)
        control.should_training_stop |= len(self.seconds) > MEASURED


def per_step(lengths: np.ndarray, batch_size: int, accumulation: int) -> np.ndarray:
    """Padded tokens of each optimizer step of an epoch in this order of rows."""
    batches = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    tokens = [len(batch) * int(batch.max()) for batch in batches]
    return np.array([sum(tokens[i : i + accumulation]) for i in range(0, len(tokens), accumulation)])
