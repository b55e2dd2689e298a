"""Training on another labelled table, whose head is dropped, before a fit."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ...core.anatomy import anatomy
from ...data.labels import kind_of_others
from ...data.tables import Table, keys
from ...errors import UsageError
from ..options import Options
from ..plan import Plan, make_plan, make_setup, open_model, runs

if TYPE_CHECKING:
    import pandas as pd

    from ...data.prepare import Data
    from ..pretrained import Pretrained

logger = logging.getLogger("steadytune")


@dataclass(frozen=True, eq=False)
class Intermediate:
    """Training on another labelled table first (STILTs).

    Phang, Févry, Bowman: Sentence Encoders on STILTs: Supplementary Training on Intermediate Labeled-data Tasks. arXiv
    1811.01088.

    The other table has a head of its own, which is dropped afterwards. It is trained plainly, with those options of the
    fit that are not about its own rows and labels. Rows whose text is also in a row of the fit are left out, so that no
    score of the fit is on a text that the model has seen.

    Attributes:
        plan: Plan of the training.
        left_out: Number of rows that are left out.
    """

    plan: Plan
    left_out: int

    name: ClassVar[str] = "aux"
    reads_unlabelled: ClassVar[bool] = False

    @classmethod
    def of(
        cls, table: Any, name: str, *, model: str, options: Options, fit: Data, save_steps: int, progress: bool
    ) -> Intermediate:
        """Check the table.

        Args:
            table: Any source that `fit` takes. Its columns have the names of the fit's table, or they are found.
            name: Name of the stage.
            model: Model of the fit.
            options: Options of the training.
            fit: Data of the fit.
            save_steps: Number of steps between checkpoints.
            progress: Whether to show bars.

        Raises:
            UsageError: The table is not right, or nothing of it is left.
        """
        plan = make_plan(
            _with_columns(table, name, fit), model=model, probe=False, save_steps=save_steps, progress=progress,
            **dataclasses.asdict(options),
        )  # fmt: skip
        origin = plan.data.origins["train"]
        known = fit.tested.union(keys(fit.train))
        kept = [key not in known for key in keys(plan.data.train)]
        left_out = len(kept) - sum(kept)
        if left_out:
            logger.info("%s: %d rows left out, because their texts are in the rows of the fit", origin, left_out)
        if not any(kept):
            raise UsageError(f"{origin}: all of its texts are in the rows of the fit too: give another table.")
        data = dataclasses.replace(plan.data, train=plan.data.train[kept])
        if len(labels := {*map(str, data.train["label"])}) < 2:
            raise UsageError(
                f"{origin}: {left_out} of its rows are left out, because their texts are in the rows of the fit, and "
                f"the others have one label ({labels.pop()}), which teaches nothing: give another table."
            )
        return cls(dataclasses.replace(plan, data=data, steps=plan.options.total_steps(len(data.train))), left_out)

    def settled(self, pretrained: Pretrained) -> Intermediate:
        """The same stage: any checkpoint can be trained so."""
        return self

    def with_compact(self, compact: bool) -> Intermediate:
        """The stage with or without a compact vocabulary."""
        options = dataclasses.replace(self.plan.options, compact=compact)
        return dataclasses.replace(self, plan=dataclasses.replace(self.plan, options=options))

    def tokens(self, pretrained: Pretrained) -> float:
        """As of `plan.Stage`."""
        options, rows = self.plan.options, self.plan.data.train
        at_once = min(options.batch_size, len(rows)) * options.accumulation
        return self.plan.steps * at_once * pretrained.mean_length(rows)

    @property
    def title(self) -> str:
        """What the stage does, for messages."""
        return f"{self.plan.steps} steps on {self.plan.data.origins['train']}"

    def record(self) -> dict[str, Any]:
        """What decides the moved weights, as JSON."""
        problem = self.plan.data.problem
        return {
            "name": "intermediate",
            "data": self.plan.data.describe()["train"],
            "left_out": self.left_out,
            "kind": problem.kind,
            "labels": list(problem.names),
            "steps": self.plan.steps,
        }

    def body(self, pretrained: Pretrained, name: str, checkpoints: Path) -> Mapping[str, Tensor]:
        """Weights of the body after the training; a finished one is read from disk.

        Args:
            pretrained: The model of the fit, after earlier stages.
            name: Name of the stage.
            checkpoints: Folder of the checkpoints of the fit.

        Raises:
            Interrupted: After a checkpoint.
        """
        own = open_model(self.plan).moved(pretrained.body)
        setup = dataclasses.replace(make_setup(self.plan, own, checkpoints), keep=True)
        trained = setup.train(dataclasses.replace(runs(self.plan)[0], name=name))
        return body_of(trained.model)


def body_of(model: Any) -> Mapping[str, Tensor]:
    """Weights of a model that every head shares, on the CPU."""
    parts = anatomy(model)
    return {name: p.detach().cpu() for name, p in model.named_parameters() if not parts[name].head}


def _with_columns(table: Any, name: str, fit: Data) -> Table:
    """The table, with the names of the fit's columns where it has them."""
    read = Table.of(table, None, None, name)
    known = fit.table
    if known is None or isinstance(table, Table):
        return read
    text = known.text if known.text and set(known.text) <= set(read.frame.columns) else None
    labels = [known.label] if isinstance(known.label, str) else list(known.label or ())
    if not labels or not set(labels) <= set(read.frame.columns):
        return dataclasses.replace(read, text=text)
    cells = read.frame[labels[0]]
    separator = known.label_separator if known.label_separator and _holds(cells, known.label_separator) else None
    return dataclasses.replace(
        read, text=text, label=known.label, label_separator=separator, kind=kind_of_others(cells, known.kind)
    )


def _holds(cells: pd.Series, separator: str) -> bool:
    """Whether a separator of labels is in some cell; a table of another task may have one label a row."""
    return bool(cells.dropna().astype(str).str.contains(separator, regex=False).any())
