"""Tasks of a study from a user's own tables: files, columns, and cross-validation if there is no test file.

Rows and labels are read and checked by the same functions as in `fit`. No torch here.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import numpy as np

from ..config import Rule, Text
from ..data.guards import inspect, raise_errors
from ..data.prepare import Data, prepare
from ..data.splits import folds, subset, usual_folds
from ..data.tables import Kind, Table
from ..errors import UsageError
from .places import expanded, fingerprint_files, placed, seen_from

FOLD = "fold"  # column that tells which rows of a table a run trains on and which it is tested on
HELD_OUT = "test"  # name of the held-out fold as a test set

logger = logging.getLogger("steadytune")


@dataclass(frozen=True)
class OwnTables:
    """Files of one task, and their columns.

    Attributes:
        name: Name of the task in records and reports.
        train: File with the training rows: CSV, TSV, JSON lines or Parquet.
        test: Test files from the same source as the training rows, by name. Without test files the task is scored by
            cross-validation.
        out_of_domain: Test files from other sources, by name.
        text: The text column, or two for pairs; found by name or content if not given.
        label: The label column, found in the same way; or one column of 0 and 1 for each class.
        label_separator: Text between several labels in one cell.
        group: Column of groups; rows of one group stay in one fold.
        subgroup: Column, or columns, that name the subgroup of each row, or ``length`` or ``overlap``; each is scored,
            and methods read it.
        kind: Kind of task; decided from the labels by default.
        metric: Metric of the task; by default the first of its kind.
        folds: Number of folds of the cross-validation; by default 5, or 10 below 200 rows. The run with seed s holds
            out fold ``s % folds`` of the cut number ``s // folds``, so that every block of ``folds`` seeds predicts
            every row once.
        apart: Further files of texts that no training learns from, as it learns from none of the test files.
        blank: Whether training rows may lack a label. They are left out, but for recipes with ``unlabelled: [blank]``,
            which read their texts; a study with such a recipe sets it.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012

    name: Text
    train: Text
    test: Mapping[str, Text] = field(default_factory=dict)
    out_of_domain: Mapping[str, Text] = field(default_factory=dict)
    text: tuple[Text, ...] | None = None
    label: Annotated[Text | tuple[Text, ...], Rule("the name of a column, or a list of names")] | None = None
    label_separator: Text | None = None
    group: Text | None = None
    subgroup: tuple[Text, ...] | None = None
    kind: Kind = "auto"
    metric: Text | None = None
    folds: Annotated[int, Rule("a whole number from 2 on", ge=2)] | None = None
    apart: tuple[Text, ...] = ()
    blank: bool = False

    @property
    def tests(self) -> dict[str, str]:
        """All test files by name."""
        return {**self.test, **self.out_of_domain}

    @property
    def crossed(self) -> bool:
        """Whether the task is scored by cross-validation."""
        return not self.test

    def at(self, folder: Path) -> OwnTables:
        """The same files, with relative paths taken from a folder."""
        return self.moved(lambda file: placed(file, folder))

    def seen_from(self, folder: Path) -> OwnTables:
        """The same files, with paths relative to a folder."""
        return self.moved(lambda file: seen_from(file, folder))

    def moved(self, move: Callable[[str], str]) -> OwnTables:
        """The same files, each with another path."""
        tests, others = (
            {name: move(file) for name, file in files.items()} for files in (self.test, self.out_of_domain)
        )
        apart = tuple(map(move, self.apart))
        return dataclasses.replace(self, train=move(self.train), test=tests, out_of_domain=others, apart=apart)

    def read(self) -> tuple[Table, dict[str, Table]]:
        """Training table and test tables, with the columns that are given.

        Raises:
            UsageError: A file cannot be read.
        """
        train = Table.of(
            expanded(self.train), self.text, self.label, "train", self.kind, self.group, self.label_separator,
            self.subgroup,
        )  # fmt: skip
        tests = {name: Table.of(expanded(file), self.text, self.label, name) for name, file in self.tests.items()}
        return train, tests

    def examine(self, sizes: Iterable[int] = ()) -> Data:
        """All rows, checked as in `fit`; possible mistakes in them are logged.

        Args:
            sizes: Numbers of training rows that runs will draw.

        Raises:
            UsageError: A table is not right, has too few rows for the folds, or its rows (those of a training fold)
                are no such number. Folds of a later cut may be smaller, if groups differ in size.
        """
        train, tests = self.read()
        data = prepare(train, tests, validation_share=0.0, blank=self.blank)
        for finding in raise_errors(inspect(data, standardize=True)):
            logger.warning("%s", finding.message)
        parts = [data.train]
        if self.crossed:
            cuts = folds(data.train, data.problem, self.folds or usual_folds(data.train), 0)
            parts = [data.train.iloc[kept] for kept, _ in cuts]
        for size, part in itertools.product(sizes, parts):
            try:
                subset(part, data.problem, size, 0)
            except UsageError as error:
                where = "the training rows of a fold" if self.crossed else "its training rows"
                raise UsageError(f"train_sizes do not fit task {self.name}, {where}: {error}") from error
        return data

    def files(self) -> dict[str, str]:
        """Hash of every file by name: ``train``, the names of the tests, and ``apart`` with a number."""
        return {name: fingerprint_files([Path(expanded(file))]) for name, file in self._named()}

    def _named(self) -> Iterable[tuple[str, str]]:
        others = {f"apart {number}": file for number, file in enumerate(self.apart)}
        return {"train": self.train, **self.tests, **others}.items()

    def changed(self, files: Mapping[str, str]) -> str | None:
        """The first file that no longer has its hash; None if all have."""
        now = self.files()
        return next((file for name, file in self._named() if name in files and now[name] != files[name]), None)

    def cut(self, number: int) -> tuple[Table, str]:
        """The training table with a column that marks the rows of one fold as test rows, and the column's name.

        Args:
            number: Number of the run: fold ``number % folds`` of the cut ``number // folds``.
        """
        table, _ = self.read()
        data = prepare(table, {}, validation_share=0.0, blank=self.blank)
        k = self.folds or usual_folds(data.train)
        _, held_out = folds(data.train, data.problem, k, number // k)[number % k]
        marks = np.full(len(table.frame), "train", dtype=object)
        marks[data.train.index[held_out]] = HELD_OUT
        column = FOLD
        while column in table.frame.columns:
            column += "_"
        return dataclasses.replace(table, frame=table.frame.assign(**{column: marks})), column
