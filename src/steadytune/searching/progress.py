"""Progress of a search: stage, trainings, time, and the best recipe so far. No torch here."""

from __future__ import annotations

import logging
import sys

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn

from ..bench.spec import Trial
from .cells import Cells
from .race import Race
from .words import scale

logger = logging.getLogger("steadytune")


class Progress:
    """A bar on a terminal, else one line for each training.

    Args:
        race: The race.
        cells: Its trainings.
        shown: Whether to show anything.
    """

    def __init__(self, race: Race, cells: Cells, shown: bool) -> None:
        self.race, self.cells, self.shown = race, cells, shown
        self.terminal = sys.stderr.isatty()
        self.bar = rich.progress.Progress(
            BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}"),
            console=Console(stderr=True), disable=not shown or not self.terminal,
        )  # fmt: skip
        self.row = self.bar.add_task("starting", total=cells.budget.amount)

    def __enter__(self) -> Progress:
        self.cells.heard = self._heard
        self.bar.start()
        return self

    def __exit__(self, *about: object) -> None:
        self.bar.stop()

    def _heard(self, run: Trial, ended: bool) -> None:
        by_runs = self.cells.budget.unit == "runs"
        line = self.line()
        self.bar.update(
            self.row, completed=self.cells.trainings if by_runs else self.cells.spent,
            description=f"{line}; now {run.spec['recipe']}",
        )  # fmt: skip
        if ended and self.shown and not self.terminal:
            logger.info("%s has ended; %s", run.spec["recipe"], line)

    def line(self) -> str:
        """Stage, trainings, what is left, and the best arm of the stage."""
        cells = self.cells
        left = f"{max(0.0, cells.left):.0f} left" if cells.budget.unit == "runs" else f"{cells.left / 60:.1f} min left"
        alive = [s for s in self.race.standings if s.stage == self.race.stage and s.fate != "stopped"]
        text = f"stage {self.race.stage}, {cells.trainings} trainings, {left}"
        if alive:
            times, unit = scale(cells.task.metric.name)
            best = max(alive, key=lambda s: s.belief.mean)
            gain = f"{times * best.belief.mean:+.1f}{unit}"
            text += f"; best of {len({s.arm for s in alive})} so far: {best.arm}, {gain}"
        return text
