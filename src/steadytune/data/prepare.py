"""Tables of labelled text: finding their columns, checking them, splitting them. No torch here.

Everything a user can get wrong about data is found here, before a model is loaded, and reported as one `UsageError`
that names the thing, the rule, the value and the remedy. What may be meant is a warning of `guards`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from ..errors import UsageError as UsageError
from ..errors import one_line as one_line
from .labels import find_problem
from .problem import Problem
from .splits import cut, split, subset
from .tables import Table, _follow, _string, examples, keys, resolve, texts
from .unlabelled import BLANK, REST, Unlabelled, gathered, is_named, keys_of, part_blank, sources_of, texts_of

CROSS_VALIDATION = "cross-validation"  # the training rows as scored by the fold that left them out
OTHER_SETS = ("train", "validation", CROSS_VALIDATION)

logger = logging.getLogger("steadytune")

WITHOUT_LABEL = f" Or say --unlabelled {BLANK}, with which fit reads such rows of its training table as texts alone."


@dataclass(frozen=True, eq=False)
class Data:
    """Checked splits.

    Rows are frames with `text`, `text_pair` for pairs, `label`, and `group` and `subgroup` where there are such. The
    index is the number of the row in its file.

    Attributes:
        train: Training rows.
        tests: Other sets by name; "validation" comes first where there is one.
        problem: What is predicted.
        origins: What messages call each set.
        coarser: Of each test set, class name to the name it is scored under.
        table: The training table with the names of its columns.
        unlabelled: Texts without labels, if there are any.
        apart: Further texts that nothing is learnt from, as `keys` gives them.
    """

    train: pd.DataFrame
    tests: Mapping[str, pd.DataFrame]
    problem: Problem
    origins: Mapping[str, str]
    coarser: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    table: Table | None = None
    unlabelled: Unlabelled | None = None
    apart: frozenset[tuple[str, ...]] = frozenset()

    @property
    def tested(self) -> set[tuple[str, ...]]:
        """Texts that no training may learn from beside the training rows: of test and validation sets, and apart."""
        return set(self.apart).union(*(keys(rows) for rows in self.tests.values()))

    @property
    def columns(self) -> pd.DataFrame | None:
        """The columns of subgroups of the training rows, without those that are labels or made of the texts."""
        if self.table is None:
            return None
        frame, labels = self.table.frame, set(self.table.form.columns)
        return frame.loc[self.train.index, [c for c in self.table.subgroup if c in frame and c not in labels]]

    def describe(self) -> dict[str, Any]:
        """Sizes, origins and fingerprints, ready for JSON."""
        out = {}
        for name, rows in {"train": self.train, **self.tests}.items():
            out[name] = {"source": self.origins[name], "rows": len(rows), "sha256": fingerprint(rows)}
            if self.problem.names:
                out[name]["labels"] = self.problem.counts(rows["label"])
            if "subgroup" in rows:
                out[name]["subgroups"] = {str(part): int(n) for part, n in rows["subgroup"].value_counts().items()}
            if name != "train":
                out[name]["also_in_train"] = self.overlap(name)
        return out

    def overlap(self, name: str) -> int:
        """Number of rows of a test set whose text (or pair) is also in the training rows."""
        seen = set(keys(self.train))
        return sum(key in seen for key in keys(self.tests[name]))


def fingerprint(rows: pd.DataFrame) -> str:
    """Hash of texts, labels and row numbers, by which a resume notices another table."""
    digest = hashlib.sha256()
    for row in rows.itertuples(name=None):
        digest.update(json.dumps(row, default=str).encode())
    return digest.hexdigest()


def prepare(
    train: Table,
    tests: Mapping[str, Table],
    validation: Table | None = None,
    *,
    train_size: int | None = None,
    validation_share: float = 0.1,
    validation_column: str | None = None,
    seed: int = 0,
    unlabelled: Any = None,
    unlabelled_size: int | None = None,
    blank: bool = False,
    apart: Sequence[Any] = (),
) -> Data:
    """Check every table and draw the splits.

    Args:
        train: The training table; its columns hold for the other tables where they name none.
        tests: Name -> table.
        validation: A table of its own; then no row is held out.
        train_size: Number of labelled rows to draw; the validation share is taken from them. All by default.
        validation_share: Share of the training rows to hold out where nothing else gives validation rows; 0 for none.
        validation_column: Column of the training table that names the split of each row (see `cut`). Rows marked test
            become the test set `test`.
        seed: Seed of the draws.
        unlabelled: Texts without labels: a file, frame or other source, ``"blank"`` (rows of the training table whose
            label is empty), ``"rest"`` (rows that ``train_size`` leaves over), or a list of these.
        unlabelled_size: Number of these texts to draw; all by default.
        blank: Whether to leave out training rows whose label is empty.
        apart: Files, frames or other sources of further texts that nothing is learnt from.

    Raises:
        UsageError: A table is not right, or a split is not possible.
    """
    given = [*tests, *(["validation"] if validation is not None else [])]
    for name in OTHER_SETS:
        if name in tests:
            raise UsageError(
                f"a test set cannot be called {name!r}, the name of another set: give it another name, such as --test "
                "dev=FILE, or test: {dev: FILE} in a study."
            )
    validation_column = _string(validation_column)
    train = _numbered(resolve(train, () if validation_column is None else (validation_column,)))
    wanted = sources_of(unlabelled)
    if unlabelled_size is not None and not wanted:
        raise UsageError(
            f"unlabelled_size {unlabelled_size} is for texts without labels: give unlabelled, or leave it out."
        )
    whole = train
    if blank or any(is_named(source, BLANK) for source in wanted):
        train = part_blank(whole)
    raw = examples(train, WITHOUT_LABEL).set_axis(train.frame.index)
    parts = {"train": raw} if validation_column is None else cut(raw, train, validation_column)
    for name in parts.keys() & {*given}:
        raise UsageError(
            f"{train.origin}: column {validation_column!r} marks {name} rows, and a {name} set is given too: drop one."
        )
    problem = find_problem(parts["train"], train)
    cuts = {name: _encoded(problem, rows, train) for name, rows in parts.items()}
    origins = {name: f"{train.origin}, {name} in {validation_column!r}" for name in cuts} | {"train": train.origin}
    rows = every = cuts.pop("train")
    if train_size is not None:
        rows = subset(rows, problem, train_size, seed)
    rest = every.drop(index=rows.index)
    if validation is not None:
        validation = _numbered(_follow(validation, train))
        cuts["validation"] = _encoded(problem, examples(validation), validation)
        origins["validation"] = validation.origin
    elif validation_share and "validation" not in cuts:
        try:
            rows, cuts["validation"] = split(rows, problem, validation_share, seed)
        except UsageError as error:
            if train_size is None:
                raise
            raise UsageError(f"of the {train_size} rows drawn by --train-size: {error}") from error
        origins["validation"] = f"{validation_share} of {train.origin}"
    tables = {name: _numbered(_follow(table, train)) for name, table in tests.items()}
    cuts |= {name: _encoded(problem, examples(table), table) for name, table in tables.items()}
    data = Data(
        train=rows,
        tests={name: cuts[name] for name in sorted(cuts, key=lambda name: name != "validation")},
        problem=problem,
        origins={**origins, **{name: table.origin for name, table in tables.items()}},
        coarser={name: table.coarser for name, table in tables.items()},
        table=train,
        apart=frozenset(key for source in apart for key in keys_of(source, train)),
    )
    if not wanted:
        return data
    empty = whole.frame.drop(index=train.frame.index)
    found = [_without_labels(source, train, rest, empty) for source in wanted]
    return dataclasses.replace(data, unlabelled=gathered(found, data.train, data.tested, unlabelled_size, seed))


def _numbered(table: Table) -> Table:
    """The table with the numbers of its rows as the index, by which messages and splits name a row."""
    return dataclasses.replace(table, frame=table.frame.reset_index(drop=True))


def _without_labels(source: Any, train: Table, rest: pd.DataFrame, blank: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """Texts of one source, and its name; arguments as of `prepare`.

    Args:
        source: The source.
        train: The resolved training table, without rows whose label is empty.
        rest: Rows that the draw of training rows leaves over.
        blank: Rows of the training table whose label is empty.

    Raises:
        UsageError: The source is not right.
    """
    if is_named(source, BLANK):
        return texts(dataclasses.replace(train, frame=blank)), f"{train.origin}, rows without a label"
    if not is_named(source, REST):
        return texts_of(source, train)
    if rest.empty:
        raise UsageError(
            f"unlabelled {REST!r} reads the rows that train_size leaves over, and none are: give train_size "
            "(--train-size N), or a file of texts."
        )
    return rest, f"{train.origin}, rows left over"


def _encoded(problem: Problem, rows: pd.DataFrame, table: Table) -> pd.DataFrame:
    """Rows of `examples` with encoded labels."""
    return rows.assign(label=problem.encode(rows, table))
