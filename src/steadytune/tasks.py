"""Benchmark tasks: their files, columns, and the relations between their labels. No torch here.

A data root has one folder for each set, with one Parquet file for each split, such as `sst2/train.parquet`. The label
column of a file has numbers; number n stands for the n-th name listed here, counted from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .data.files import read_table
from .data.problem import Classification, Problem, Regression
from .data.tables import Table
from .errors import UsageError, suggest

NLI3 = ("entailment", "neutral", "contradiction")
NLI2 = ("entailment", "not_entailment")
MONOTONE = ("entailment", "neutral")  # sets without contradiction: neutral means 'not entailed'
SENTIMENT = ("negative", "positive")
PARAPHRASE = ("not_equivalent", "equivalent")
DUPLICATE = ("not_duplicate", "duplicate")

ONE, TWO = ("sentence",), ("sentence1", "sentence2")
PREMISE, QUESTIONS = ("premise", "hypothesis"), ("question1", "question2")

# (text columns, label names in the order of their numbers) of a set, or of set/split if a split differs
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cola": (ONE, ("unacceptable", "acceptable")),
    "sst2": (ONE, SENTIMENT),
    "imdb": (ONE, SENTIMENT[::-1]),  # the file's numbers are reversed, unlike its description
    "imdb_counterfactual": (ONE, SENTIMENT),
    "yelp": (ONE, SENTIMENT),
    "amazon": (ONE, SENTIMENT),
    "mrpc": (TWO, PARAPHRASE),
    "qqp": (QUESTIONS, DUPLICATE),
    "stsb": (TWO, ()),
    "rte": (TWO, NLI2),
    "wnli": (TWO, ("not_entailment", "entailment")),
    "qnli": (("question", "sentence"), NLI2),
    "mnli": (PREMISE, NLI3),
    "snli": (PREMISE, NLI3),
    "sick": (PREMISE, NLI3),
    "scitail": (PREMISE, NLI2),
    "breaking_nli": (PREMISE, NLI3),
    "monli": (PREMISE, MONOTONE),
    "med": (PREMISE, MONOTONE),
    "advglue/sst2": (ONE, SENTIMENT),
    "advglue/qqp": (QUESTIONS, DUPLICATE),
    "advglue/rte": (TWO, NLI2),
    "advglue/qnli": (("question", "sentence"), NLI2),
    "advglue/mnli_matched": (PREMISE, NLI3),
    "advglue/mnli_mismatched": (PREMISE, NLI3),
}

# (labels trained on, labels scored on) -> coarser names, for predictions and gold labels. A model of three classes is
# scored on two by taking the argmax over three first, as HANS does.
_TO_TWO = {"neutral": "not_entailment", "contradiction": "not_entailment"}
MERGES: dict[tuple[frozenset[str], frozenset[str]], dict[str, str]] = {
    (frozenset(NLI3), frozenset(NLI2)): _TO_TWO,
    (frozenset(NLI2), frozenset(NLI3)): _TO_TWO,
    (frozenset(NLI2), frozenset(MONOTONE)): _TO_TWO,
    (frozenset(NLI3), frozenset(MONOTONE)): {"contradiction": "neutral"},
    (frozenset(PARAPHRASE), frozenset(DUPLICATE)): dict(zip(DUPLICATE, PARAPHRASE, strict=True)),
    (frozenset(DUPLICATE), frozenset(PARAPHRASE)): dict(zip(PARAPHRASE, DUPLICATE, strict=True)),
}


@dataclass(frozen=True)
class Task:
    """A training set and its test sets.

    Attributes:
        name: Name of the task and of the folder of its training set.
        metric: Metric that the literature reports.
        tests: In-domain test files; for GLUE the public dev set, as in the papers.
        beyond: Out-of-domain test files.
        train: Name of the training split.
    """

    name: str
    metric: str
    tests: tuple[str, ...]
    beyond: tuple[str, ...] = ()
    train: str = "train"

    @property
    def text(self) -> tuple[str, ...]:
        return COLUMNS[self.name][0]

    @property
    def labels(self) -> tuple[str, ...]:
        return COLUMNS[self.name][1]

    @property
    def problem(self) -> Problem:
        """The problem of the task's kind."""
        return Classification(self.labels) if self.labels else Regression()


_REVIEWS = ("imdb/test", "yelp/test", "amazon/test", "imdb_counterfactual/test_original")
_NLI = (
    "sick/test", "rte/validation", "scitail/test", "breaking_nli/test", "monli/test_negated", "monli/test_positive",
    "med/test", "advglue/mnli_matched", "advglue/mnli_mismatched",
)  # fmt: skip
_MNLI = ("mnli/validation_matched", "mnli/validation_mismatched")

TASKS = {
    task.name: task
    for task in (
        Task("cola", "matthews", ("cola/validation",), ("cola/validation_out_of_domain",)),
        Task("sst2", "accuracy", ("sst2/validation",),
             (*_REVIEWS, "imdb_counterfactual/test_revised", "advglue/sst2")),
        Task("mrpc", "f1", ("mrpc/validation",), ("qqp/validation", "advglue/qqp")),
        Task("qqp", "f1", ("qqp/validation",), ("mrpc/validation", "advglue/qqp")),
        Task("stsb", "spearman", ("stsb/validation",), ("sick/test:relatedness_score",)),
        Task("rte", "accuracy", ("rte/validation",),
             ("scitail/test", "sick/test", "snli/test", "mnli/validation_matched", "advglue/rte")),
        Task("wnli", "accuracy", ("wnli/validation",), ("rte/validation",)),
        Task("qnli", "accuracy", ("qnli/validation",), ("advglue/qnli",)),
        Task("mnli", "accuracy", _MNLI, ("snli/test", *_NLI)),
        Task("snli", "accuracy", ("snli/test",), (*_MNLI, *_NLI)),
        Task("sick", "accuracy", ("sick/test",), ("snli/test", *_MNLI, *_NLI[1:])),
        Task("imdb_counterfactual", "accuracy", ("imdb_counterfactual/test_original",),
             ("imdb_counterfactual/test_revised", "imdb/test", "yelp/test", "amazon/test", "sst2/validation"),
             train="train_original"),
    )
}  # fmt: skip


# Benchmark sets in the training data of well-known models, by a part of the model's name: set -> how. The source is
# their model cards.
_ALL_MODELS = {
    "snli": "trained on it",
    "mnli": "trained on it",
    "qqp": "trained on Quora duplicates",
    "qnli": "trained on SQuAD, of which it is made",
    "stsb": "trained on Flickr 30k captions, of which a part is made",
    "sick": "trained on Flickr 30k captions, of which it is made",
}
SEEN = {
    "all-minilm": _ALL_MODELS,
    "all_minilm": _ALL_MODELS,
    "all-mpnet": _ALL_MODELS,
    "all-distilroberta": _ALL_MODELS,
    "paraphrase-": {name: _ALL_MODELS[name] for name in ("snli", "mnli", "qqp", "stsb", "sick")},
    "-mnli": {"mnli": "trained on it"},
    "-nli": {"snli": "trained on it", "mnli": "trained on it"},
}


def seen_by(names: Sequence[str], task: Task, beyond: bool, also: Sequence[str] = ()) -> tuple[str, ...]:
    """Sets of a task that a model was trained on before, as `set: how`. Its scores on them are not a fair test.

    Args:
        names: Names of the model, including its path.
        task: Task that the model is trained on.
        beyond: Whether the out-of-domain sets are used.
        also: Further sets that the model was trained on.
    """
    told = dict.fromkeys(also, "said to be seen")
    known = [about for part, about in SEEN.items() if any(part in name.lower() for name in names)]
    seen = {set_: how for about in (*known, told) for set_, how in about.items()}
    used = dict.fromkeys(f.partition("/")[0] for f in (task.name, *task.tests, *(task.beyond if beyond else ())))
    return tuple(f"{name}: {seen[name]}" for name in used if name in seen)


def find(name: str) -> Task:
    """Return a task by name.

    Raises:
        UsageError: There is no task of that name; the message has the nearest one.
    """
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}.{suggest(name, TASKS)}")
    return TASKS[name]


def merge_rule(trained: Sequence[str], scored: Sequence[str]) -> Mapping[str, str]:
    """Coarser label of each label, for a model that is scored on another label scheme than it was trained on."""
    if set(trained) == set(scored):
        return {}
    return MERGES[frozenset(trained), frozenset(scored)]


@dataclass(frozen=True)
class SetFile:
    """A file of a data root.

    Attributes:
        path: Path of the file in the data root.
        text: The text column, or two for pairs.
        label: The label column.
        labels: Names of labels 0, 1, ...; empty if the labels are numbers to predict.
    """

    path: str
    text: tuple[str, ...]
    label: str
    labels: tuple[str, ...]


def set_file(name: str) -> SetFile:
    """Columns and labels of `set/split`, or of `set/split:label_column` if another column has numbers to predict."""
    file, _, column = name.partition(":")
    text, labels = COLUMNS.get(file) or COLUMNS[file.partition("/")[0]]
    return SetFile(f"{file}.parquet", text, column or "label", () if column else labels)


def layout(task: Task, beyond: bool = True) -> list[SetFile]:
    """The files of a task in a data root: the training set, then the test sets."""
    return [set_file(name) for name in (f"{task.name}/{task.train}", *task.tests, *(task.beyond if beyond else ()))]


def read_set(root: Path, name: str, trained: Sequence[str] | None = None) -> Table:
    """Read `set/split` or `set/split:label_column` from a data root.

    Args:
        root: The data root.
        name: Name of the file.
        trained: Labels of the model that is scored on it, if it is a test set.

    Raises:
        UsageError: There is no such file, or it cannot be read.
    """
    file = set_file(name)
    path = root / file.path
    return Table(
        read_table(path),
        str(path),
        file.text,
        file.label,
        kind="classification" if file.labels else "regression",
        rename={str(number): label for number, label in enumerate(file.labels)},
        coarser=merge_rule(trained, file.labels) if trained is not None else {},
    )


def load(name: str, root: str | Path, beyond: bool = False) -> tuple[Table, dict[str, Table]]:
    """Training table and test tables of a task.

    Args:
        name: A key of `TASKS`.
        root: The data root.
        beyond: Whether to read the out-of-domain test sets too.

    Raises:
        UsageError: There is no such task, or a file is missing or cannot be read.
    """
    task, root = find(name), Path(root)
    if not (root / task.name).is_dir():
        raise UsageError(f"data root {str(root)!r} has no folder {task.name!r}: give its parent with --data-root DIR.")
    files = task.tests + (task.beyond if beyond else ())
    tests = {file.partition(":")[0]: read_set(root, file, task.labels) for file in files}
    return read_set(root, f"{task.name}/{task.train}"), tests
