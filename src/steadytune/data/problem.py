"""One class for each kind of task: classification, several labels a row, numbers. No torch here.

A `Problem` knows the two forms of a label: as it is scored (a class name, a tuple of class names, a float), and as the
model gets it (a class number, a row of 0 and 1, a standardised float). It also knows the meaning of a model's outputs,
the metrics, and the head that the model needs. Code outside this file does not ask for the kind.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from ..errors import UsageError, suggest
from .cells import check_lists, label_name, list_of, numbers_of, refuse
from .metrics import METRICS, Metric, members
from .tables import Table

DECIMAL_COMMA = r"\s*[-+]?(\d+|\d{1,3}(\.\d{3})+),\d+\s*%?"
THOUSANDS = r"\s*[-+]?[1-9]\d{0,2}(,\d{3})+(\.\d+)?\s*"
PERCENT = r"\s*[-+]?\d+([.,]\d+)?\s*%"


@dataclass(frozen=True)
class Problem(ABC):
    """What is predicted.

    Attributes:
        names: Class names in class order; empty for numbers.
        threshold: Probability above which a class is predicted (of two classes, the second); None for 0.5.
    """

    names: tuple[str, ...] = ()
    threshold: float | None = None

    kind: ClassVar[str]
    loss: ClassVar[str]  # name of the function in torch.nn.functional that a model of this kind is trained with
    ordered: ClassVar[bool] = False  # whether labels are numbers, which have a mean and a spread
    several: ClassVar[bool] = False  # whether a row may have several labels, or none

    # ---- labels

    @abstractmethod
    def encode(self, rows: pd.DataFrame, table: Table) -> pd.Series:
        """Convert labels of `tables.examples` to the form in which they are scored.

        Raises:
            UsageError: A label does not occur in the training data, or is not a label of this kind.
        """

    @abstractmethod
    def ids(self, labels: Sequence[Any]) -> list[Any]:
        """Labels in the form that a model gets."""

    @abstractmethod
    def strata(self, labels: pd.Series) -> np.ndarray:
        """A stratum number (rows,) that splits are balanced over."""

    def membership(self, labels: Sequence[Any] | pd.Series) -> np.ndarray:
        """Truth values (rows, classes): which classes each row has; no columns for numbers."""
        return members([(label,) for label in labels], self.names)

    def array(self, labels: Sequence[Any] | pd.Series) -> np.ndarray:
        """Labels as they are scored, as an array (rows,)."""
        return np.fromiter(labels, dtype=object, count=len(labels))

    def counts(self, labels: pd.Series) -> dict[str, int]:
        """Rows by class, the most frequent first; empty for numbers."""
        return {str(name): int(n) for name, n in labels.value_counts().items()}

    def differ(self, labels: np.ndarray, every: np.ndarray) -> bool:
        """Whether labels of one text contradict each other, given those of every text."""
        return len(set(labels)) > 1

    # ---- outputs

    @abstractmethod
    def activate(self, outputs: np.ndarray) -> np.ndarray:
        """Convert a model's outputs to probabilities (rows, classes), or numbers (rows, 1)."""

    @abstractmethod
    def decide(self, scores: np.ndarray) -> np.ndarray:
        """Labels (rows,) for activated outputs, or for their mean over models."""

    def read(self, ids: np.ndarray) -> np.ndarray:
        """Labels (rows,) for the form that `ids` gives."""
        return self.decide(ids)

    # ---- scores

    @property
    def metrics(self) -> dict[str, Metric]:
        """Metrics by name; the first one is the default."""
        two = len(self.names) == 2
        return {metric.name: metric for metric in METRICS[self.kind] if two or not metric.two_classes}

    def metric(self, name: str | None) -> Metric:
        """The metric of this name, or the default.

        Raises:
            UsageError: The metric is unknown, or not defined for this number of classes.
        """
        known = {metric.name: metric for metric in METRICS[self.kind]}
        if name is None:
            return next(iter(known.values()))
        if name not in known:
            raise UsageError(f"unknown metric {name!r} for {self.kind}.{suggest(name, known)}")
        if name not in self.metrics:
            raise UsageError(f"{name} is for two classes, here are {len(self.names)}: choose f1_macro.")
        return known[name]

    def score(
        self, gold: np.ndarray, predicted: np.ndarray, scores: np.ndarray | None = None
    ) -> dict[str, float | None]:
        """Every metric of predictions against gold labels; None where it is undefined.

        Args:
            gold: Labels (rows,).
            predicted: Labels (rows,).
            scores: Probabilities (rows, classes); without them the metrics that need them are left out.
        """
        return {
            metric.name: metric.compute(gold, given, self.names) for metric, given in self._read_by(predicted, scores)
        }

    def intervals(
        self,
        gold: np.ndarray,
        predicted: np.ndarray,
        scores: np.ndarray | None = None,
        groups: np.ndarray | None = None,
    ) -> dict[str, tuple[float, float] | None]:
        """The 95 % interval of every metric, None where there is none; arguments as of `score`.

        Args:
            gold: Labels (rows,).
            predicted: Labels (rows,).
            scores: Probabilities (rows, classes).
            groups: Group of each row (rows,), for rows that are not independent.
        """
        return {
            metric.name: metric.bounds(gold, given, self.names, groups)
            for metric, given in self._read_by(predicted, scores)
        }

    def _read_by(self, predicted: np.ndarray, scores: np.ndarray | None) -> Iterator[tuple[Metric, np.ndarray]]:
        """Each metric that can be computed, with its predictions."""
        for metric in self.metrics.values():
            if not metric.needs_probabilities:
                yield metric, predicted
            elif scores is not None:
                yield metric, scores

    @abstractmethod
    def constant(self, labels: pd.Series) -> np.ndarray:
        """Answer without reading a text: the shares (1, classes) or the mean (1, 1) of the training labels."""

    def constants(self) -> Sequence[Any]:
        """Predictions without reading a text; empty for numbers, where a constant has no correlation."""
        return self.names

    def coarser(self, names: Mapping[str, str]) -> Problem:
        """The same problem with coarser classes, each name once."""
        return dataclasses.replace(self, names=tuple(dict.fromkeys(names.get(name, name) for name in self.names)))

    def coarser_scores(self, scores: np.ndarray, names: Mapping[str, str]) -> np.ndarray:
        """Probabilities (rows, classes) of the coarser classes: sums over the classes that each replaces."""
        return scores

    def at(self, threshold: float) -> Problem:
        """The same problem, deciding for a class where its probability is above ``threshold``.

        Raises:
            UsageError: There is no such decision: numbers, or more than two exclusive classes.
        """
        raise UsageError(
            f"threshold is for two classes or for several labels a row, this is {self.kind}"
            f"{f' of {len(self.names)} classes' if self.names else ''}: leave it out."
        )

    # ---- the model

    @property
    @abstractmethod
    def head_options(self) -> dict[str, Any]:
        """Options of a transformers config for this problem."""

    @property
    def classes(self) -> int:
        """Number of exclusive classes; 0 for other kinds, where chance has no loss to compare with."""
        return 0

    @property
    def weighted(self) -> bool:
        """Whether class weights are possible."""
        return bool(self.names)

    @property
    def scaled(self) -> bool:
        """Whether a model in training predicts other numbers than the labels."""
        return False

    def class_weights(self, labels: Sequence[Any]) -> np.ndarray:
        """Weights (classes,) with which rare classes count as much as frequent ones."""
        raise UsageError(f"class_weights are for classes, this is {self.kind}: leave them out.")

    @staticmethod
    def of(kind: str, names: Sequence[str] = ()) -> Problem:
        """The problem that a record names."""
        return KINDS[kind](tuple(names))

    @staticmethod
    def of_config(config: Any) -> Problem:
        """The problem of a text classifier, as its config tells."""
        names = tuple(str(config.id2label[i]) for i in range(config.num_labels))
        matching = (kind for kind in KINDS.values() if kind.problem_type == config.problem_type)
        problem = Regression if config.num_labels == 1 else next(matching, Classification)
        return problem() if problem.ordered else problem(names)

    problem_type: ClassVar[str]  # of a transformers config


@dataclass(frozen=True)
class _Classes(Problem):
    """Base of the kinds with class names."""

    def constant(self, labels: pd.Series) -> np.ndarray:
        return self.membership(labels).mean(axis=0, keepdims=True)

    @property
    def head_options(self) -> dict[str, Any]:
        return {
            "id2label": dict(enumerate(self.names)),
            "label2id": {label: number for number, label in enumerate(self.names)},
            "problem_type": self.problem_type,
        }

    def encode(self, rows: pd.DataFrame, table: Table) -> pd.Series:
        known = self.coarser(table.coarser).names
        renamed = [[table.rename.get(name, name) for name in row] for row in self._raw(rows, table)]
        named = [[table.coarser.get(name, name) for name in row] for row in renamed]
        strangers = [name for row in named for name in row if name not in known]
        if strangers:
            count = sum(not set(row) <= set(known) for row in named)
            raise UsageError(
                f"{table.origin}: label {strangers[0]!r} (in {count} of {len(rows)} rows) does not occur in the "
                f"training data.{suggest(strangers[0], known)}"
            )
        return pd.Series([self._label(row, known) for row in named], index=rows.index, dtype=object)

    @abstractmethod
    def _raw(self, rows: pd.DataFrame, table: Table) -> list[list[str]]:
        """Class names of each row as they stand in the table."""

    @abstractmethod
    def _label(self, row: list[str], known: Sequence[str]) -> Any:
        """The label of a row's class names."""


@dataclass(frozen=True)
class Classification(_Classes):
    """One class a row."""

    kind: ClassVar[str] = "classification"
    loss: ClassVar[str] = "cross_entropy"
    problem_type: ClassVar[str] = "single_label_classification"

    def _raw(self, rows: pd.DataFrame, table: Table) -> list[list[str]]:
        return [[label_name(value)] for value in rows["label"]]

    def _label(self, row: list[str], known: Sequence[str]) -> str:
        return row[0]

    def ids(self, labels: Sequence[Any]) -> list[int]:
        numbers = {name: number for number, name in enumerate(self.names)}
        return [numbers[label] for label in labels]

    def strata(self, labels: pd.Series) -> np.ndarray:
        return pd.Categorical(labels, categories=self.names).codes.astype(int)

    def activate(self, outputs: np.ndarray) -> np.ndarray:
        from scipy.special import softmax

        return softmax(outputs, axis=1)

    def decide(self, scores: np.ndarray) -> np.ndarray:
        scores = np.asarray(scores)
        if self.threshold is not None:
            return self.read(scores[:, 1] > self.threshold)
        return self.read(scores.argmax(axis=1))

    def at(self, threshold: float) -> Problem:
        return dataclasses.replace(self, threshold=threshold) if len(self.names) == 2 else super().at(threshold)

    def coarser_scores(self, scores: np.ndarray, names: Mapping[str, str]) -> np.ndarray:
        into = self.coarser(names).names
        return np.stack([scores[:, [names.get(name, name) == one for name in self.names]].sum(1) for one in into], 1)

    def read(self, ids: np.ndarray) -> np.ndarray:
        return np.array(self.names, dtype=object)[np.asarray(ids).astype(int)]

    @property
    def classes(self) -> int:
        return len(self.names)

    def class_weights(self, labels: Sequence[Any]) -> np.ndarray:
        """Inverse frequencies whose mean over rows is 1."""
        counts = np.bincount(self.ids(labels), minlength=len(self.names))
        return len(labels) / (len(counts) * np.maximum(counts, 1))


@dataclass(frozen=True)
class MultiLabel(_Classes):
    """Any number of classes a row: a label is a tuple of class names in class order, which may be empty."""

    kind: ClassVar[str] = "multilabel"
    loss: ClassVar[str] = "binary_cross_entropy_with_logits"
    problem_type: ClassVar[str] = "multi_label_classification"
    several: ClassVar[bool] = True

    def _raw(self, rows: pd.DataFrame, table: Table) -> list[list[str]]:
        return label_sets(rows, table)

    def _label(self, row: list[str], known: Sequence[str]) -> tuple[str, ...]:
        place = {name: number for number, name in enumerate(known)}
        return tuple(sorted({*row}, key=place.__getitem__))

    def membership(self, labels: Sequence[Any] | pd.Series) -> np.ndarray:
        return members(list(labels), self.names)

    def counts(self, labels: pd.Series) -> dict[str, int]:
        return super().counts(labels.explode())

    def ids(self, labels: Sequence[Any]) -> list[list[float]]:
        return [[float(name in label) for name in self.names] for label in labels]

    def strata(self, labels: pd.Series) -> np.ndarray:
        """The class of a row with the fewest rows; rows without any have a stratum of their own."""
        member = self.membership(labels)
        rarest = np.where(member, member.sum(axis=0), len(labels) + 1).argmin(axis=1)
        return np.where(member.any(axis=1), rarest, len(self.names))

    def activate(self, outputs: np.ndarray) -> np.ndarray:
        from scipy.special import expit

        return expit(outputs)

    def decide(self, scores: np.ndarray) -> np.ndarray:
        """Classes whose probability is above the threshold."""
        above = np.asarray(scores) > (0.5 if self.threshold is None else self.threshold)
        rows = [tuple(name for name, given in zip(self.names, row, strict=True) if given) for row in above]
        return np.fromiter(rows, dtype=object, count=len(rows))

    def at(self, threshold: float) -> Problem:
        return dataclasses.replace(self, threshold=threshold)

    def constants(self) -> Sequence[Any]:
        return ()

    def class_weights(self, labels: Sequence[Any]) -> np.ndarray:
        """Weights of the positive decisions: rows without a class, divided by rows with it."""
        has = np.array(self.ids(labels))
        return (1 - has).sum(0) / np.maximum(has.sum(0), 1)


@dataclass(frozen=True)
class Regression(Problem):
    """Numbers. A model in training predicts ``(label - mean) / spread``.

    Attributes:
        names: Always empty.
        mean: Mean, subtracted from the labels in training.
        spread: Standard deviation, by which labels are divided in training.
    """

    mean: float = 0.0
    spread: float = 1.0

    kind: ClassVar[str] = "regression"
    loss: ClassVar[str] = "mse_loss"
    problem_type: ClassVar[str] = "regression"
    ordered: ClassVar[bool] = True

    def encode(self, rows: pd.DataFrame, table: Table) -> pd.Series:
        numbers = numbers_of(rows["label"])
        bad = ~np.isfinite(numbers)
        values = rows["label"][bad].astype(str)
        remedy = "Fill them in or take them out; if they are classes say --kind classification."
        if values.str.fullmatch(THOUSANDS).any():
            remedy = "Write numbers without commas between thousands, as in 1000."
        elif values.str.fullmatch(DECIMAL_COMMA).any():
            remedy = "Write numbers with a point instead of a comma, as in 0.5."
        elif values.str.fullmatch(PERCENT).any():
            remedy = "Write numbers without the per cent sign."
        shown = ", ".join(repr(value) for value in dict.fromkeys(values.head(100)) if len(value) <= 40)[:80]
        how = f"not a finite number ({shown})" if shown else "not a finite number"
        refuse(bad, table.form.words, how, table.origin, remedy)
        return numbers

    def array(self, labels: Sequence[Any] | pd.Series) -> np.ndarray:
        return np.fromiter(labels, dtype=float, count=len(labels))

    def counts(self, labels: pd.Series) -> dict[str, int]:
        return {}

    def constant(self, labels: pd.Series) -> np.ndarray:
        return np.array([[(labels.mean() - self.mean) / self.spread]])

    def ids(self, labels: Sequence[Any]) -> list[float]:
        return [(float(label) - self.mean) / self.spread for label in labels]

    def strata(self, labels: pd.Series) -> np.ndarray:
        """The tenth of the range of ranks that a row falls in."""
        ranks = labels.rank(method="first").to_numpy() - 1
        return (ranks * 10 // len(ranks)).astype(int)

    def differ(self, labels: np.ndarray, every: np.ndarray) -> bool:
        """Numbers contradict when they differ by more than the spread of all of them."""
        return bool(np.ptp(labels.astype(float)) > np.std(every.astype(float)))

    def activate(self, outputs: np.ndarray) -> np.ndarray:
        return outputs

    def decide(self, scores: np.ndarray) -> np.ndarray:
        values = np.asarray(scores)
        return values.reshape(len(values)).astype(float) * self.spread + self.mean

    def constants(self) -> Sequence[Any]:
        return ()

    def coarser(self, names: Mapping[str, str]) -> Problem:
        return self

    @property
    def head_options(self) -> dict[str, Any]:
        return {"num_labels": 1, "problem_type": self.problem_type}

    @property
    def scaled(self) -> bool:
        return (self.mean, self.spread) != (0.0, 1.0)

    def standardised(self, labels: Sequence[float], *, centred: bool) -> Regression:
        """The problem with mean and spread of these labels; without a mean, the root of their mean square."""
        values = np.asarray(labels, dtype=float)
        mean = float(values.mean()) if centred else 0.0
        spread = float(np.sqrt(np.square(values - mean).mean()))
        return dataclasses.replace(self, mean=mean, spread=spread or 1.0)


KINDS: dict[str, type[Problem]] = {kind.kind: kind for kind in (Classification, MultiLabel, Regression)}


def label_sets(rows: pd.DataFrame, table: Table) -> list[list[str]]:
    """The names in every row's list of labels, as they stand in the file.

    Raises:
        UsageError: A label that is not a list, or a list with an empty entry.
    """
    lists, what = rows["label"].map(list_of), table.form.words
    wrong = lists.isna()
    given = repr(rows["label"][wrong].iloc[0])[:60] if wrong.any() else ""
    remedy = "Write lists, as in ['a', 'b'], or say what stands between labels with --label-separator."
    refuse(wrong, what, f"not a list ({given})", table.origin, remedy)
    check_lists(lists, what, table.origin)
    return [[label_name(value) for value in row] for row in lists]
