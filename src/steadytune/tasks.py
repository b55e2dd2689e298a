"""Benchmark tasks as data: where the files lie, which columns they have, how their labels relate. No torch here.

A data root holds one folder per set and one Parquet file per split (`sst2/train.parquet`). Labels in the files are the
numbers of the names listed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .data.files import read_table
from .data.tables import Table
from .errors import UsageError, suggest

NLI3 = ("entailment", "neutral", "contradiction")
NLI2 = ("entailment", "not_entailment")
MONOTONE = ("entailment", "neutral")  # sets where contradiction never occurs: neutral means 'not entailed'
SENTIMENT = ("negative", "positive")
PARAPHRASE = ("not_equivalent", "equivalent")
DUPLICATE = ("not_duplicate", "duplicate")

ONE, TWO = ("sentence",), ("sentence1", "sentence2")
PREMISE, QUESTIONS = ("premise", "hypothesis"), ("question1", "question2")

# set, or set/split where a split differs: (text columns, label names in the order of their numbers)
COLUMNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "cola": (ONE, ("unacceptable", "acceptable")),
    "sst2": (ONE, SENTIMENT),
    "imdb": (ONE, SENTIMENT[::-1]),  # numbered the other way round in the file, whatever its description says
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

# (trained on, scored on): names merged in predictions and gold labels alike. Three classes are scored on two by taking
# the arg-max over three first, as HANS does.
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
    """One training set and what it is tested on.

    Attributes:
        metric: the figure the literature reports.
        tests: in-domain test files; for GLUE the public dev set, as in the papers.
        beyond: out-of-domain test files.
        train: the training split.
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


# What well-known models had seen before, by a part of their name: set -> how. From their model cards.
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
    """What a model knew before of a task's training and test sets, as `set: how`: its scores there are no fair test.

    Args:
        names: under which the model is known, its path among them.
        task: that it is trained on.
        beyond: whether the out-of-domain sets are used.
        also: sets it has seen beside those known of models of these names.
    """
    told = dict.fromkeys(also, "said to be seen")
    known = [about for part, about in SEEN.items() if any(part in name.lower() for name in names)]
    seen = {set_: how for about in (*known, told) for set_, how in about.items()}
    used = dict.fromkeys(f.partition("/")[0] for f in (task.name, *task.tests, *(task.beyond if beyond else ())))
    return tuple(f"{name}: {seen[name]}" for name in used if name in seen)


def find(name: str) -> Task:
    """The task of that name, or an error with the nearest one."""
    if name not in TASKS:
        raise UsageError(f"unknown task {name!r}.{suggest(name, TASKS)}")
    return TASKS[name]


def merge_rule(trained: Sequence[str], scored: Sequence[str]) -> Mapping[str, str]:
    """How labels are merged when a model trained on one label scheme is scored on another."""
    if set(trained) == set(scored):
        return {}
    return MERGES[frozenset(trained), frozenset(scored)]


def read_set(root: Path, file: str, trained: Sequence[str] | None = None) -> Table:
    """Read `set/split` or `set/split:label_column` from the data root, to be scored by a model trained on `trained`."""
    file, _, column = file.partition(":")
    name = file.partition("/")[0]
    text, labels = COLUMNS.get(file) or COLUMNS[name]
    labels = () if column else labels
    path = root / f"{file}.parquet"
    return Table(
        read_table(path),
        str(path),
        text,
        column or "label",
        kind="classification" if labels else "regression",
        rename={str(number): label for number, label in enumerate(labels)},
        merge=merge_rule(trained, labels) if trained is not None else {},
    )


def load(name: str, root: str | Path, beyond: bool = False) -> tuple[Table, dict[str, Table]]:
    """Training table and test tables of a task.

    Args:
        name: a key of `TASKS`.
        root: the data root.
        beyond: also read the out-of-domain test sets.
    """
    task, root = find(name), Path(root)
    if not (root / task.name).is_dir():
        raise UsageError(f"data root {str(root)!r} has no folder {task.name!r}: give its parent with --data-root DIR.")
    files = task.tests + (task.beyond if beyond else ())
    tests = {file.partition(":")[0]: read_set(root, file, task.labels) for file in files}
    return read_set(root, f"{task.name}/{task.train}"), tests


# ---- metrics ----------------------------------------------------------------------------------------------------
