"""Labelled rows that may carry a wrong label, and rows that do harm, in seconds and without fine-tuning.

A frozen encoder reads every row once. Probes on its features judge each row without having seen it:

    loss        of the row's label under a probe that was not fitted on the row
    suspect     whether confident learning takes the label for wrong (`cleanlab.filter.find_label_issues`; Northcutt,
                Jiang and Chuang, JAIR 2021, arXiv 1911.00068)
    influence   how much a step on the row lowers the loss of the rows of other folds (`heads.influence`), in units of
                its spread over rows; a row with a negative influence does harm

``benchmarks/wrong_labels.py`` measures on flipped labels how well each of them finds these rows.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..data import splits
from ..data.chunks import write_csv
from ..data.prepare import Data
from ..data.problem import Problem
from ..data.tables import Kind, Table
from ..errors import UsageError
from ..files.atomic import write_json, write_whole, writing
from ..heads.influence import cross_influence
from ..heads.probe import Probe
from ..pages.words import counted
from .folder import RECORD, read_record
from .plan import make_plan
from .predict_file import check_output
from .pretrained import Pretrained
from .probing import TRAIN, Pooled, probe_of, read_rows
from .randomness import as_found
from .report_page import INSPECTED, write_page

logger = logging.getLogger("steadytune")

FILES = (".csv",)  # endings of a list that is saved
NO_FAULT = "which alone is no fault: look at the lowest"


@dataclass(frozen=True, eq=False)
class Inspected:
    """Labelled rows in the order in which their labels should be checked.

    Attributes:
        frame: A row for each labelled row, the one with the largest loss first. Columns: ``row`` (number in the file,
            counted from 0), ``label``, ``suggestion`` (what the probe answers), ``loss``, ``suspect`` (not for
            numbers), ``influence``, ``text`` and ``text_pair``.
        model: Encoder that read the rows.
    """

    frame: pd.DataFrame
    model: str

    @property
    def summary(self) -> str:
        """What was found, in one sentence."""
        harmful = int((self.frame["influence"] < 0).sum())
        rows = counted(len(self.frame), "row")
        if "suspect" not in self.frame:
            return f"{harmful} of {rows} have a negative influence on the others, {NO_FAULT}."
        suspects = int(self.frame["suspect"].sum())
        return (
            f"{suspects} of {rows} may carry a wrong label, because the frozen encoder expects another one: read them "
            f"before you change any. {harmful} have a negative influence on the others, {NO_FAULT}."
        )

    def save(self, path: str | Path) -> None:
        """Write the list to a .csv file.

        Raises:
            UsageError: Another ending, or the file cannot be written.
        """
        check_output(Path(path), [], overwrite=True, endings=FILES)
        with writing(Path(path), resumes=False):
            write_whole(Path(path), lambda part: write_csv(self.frame, part))

    def add_to(self, folder: str | Path) -> None:
        """Show the list on the page of a fit.

        Args:
            folder: The output of a fit.

        Raises:
            UsageError: The folder holds no finished fit, or cannot be written.
        """
        folder, record = Path(folder), read_record(folder)
        record["files"] = [*(name for name in record["files"] if name != INSPECTED), INSPECTED]
        with writing(folder, resumes=False):
            write_whole(folder / INSPECTED, self.frame.to_parquet)
            write_page(folder, record)
            write_json(folder / RECORD, record)


@as_found()
def inspect_labels(
    train: Any,
    model: str | Path,
    *,
    text: str | Sequence[str] | None = None,
    label: str | Sequence[str] | None = None,
    label_separator: str | None = None,
    group: str | None = None,
    kind: Kind = "auto",
    pooling: Pooled = "auto",
    prompt: str | None = None,
    max_length: int | None = None,
    folds: int = 5,
    seed: int = 0,
) -> Inspected:
    """List the labelled rows that may carry a wrong label, and those that do harm to the others.

    Args:
        train: A table, as of `fit`.
        model: A Hugging Face model directory or hub name, or the output of a fit. Of a fit, the pre-trained model reads
            the rows, because the fine-tuned one has learned their labels; columns, group and kind are those of the fit.
        text: One text column, or two for sentence pairs; found by name or content if not given.
        label: The label column, found likewise; or, for several labels a row, one column of 0 and 1 for each class.
        label_separator: What stands between several labels in one cell.
        group: A column whose equal values keep rows in one fold. So do equal texts.
        kind: classification, multilabel or regression; decided from the labels by default.
        pooling: What is read of the model, as of `probe`.
        prompt: Text before each row's first text, as of `probe`.
        max_length: Tokens per row, as of `fit`.
        folds: Number of folds of the cross-fitting.
        seed: Seed of the folds.

    Raises:
        UsageError: What was asked for cannot be done: an unreadable table or model, one class, too few rows of a class;
            or cleanlab is missing, which classes need.

    Example:
        >>> inspect_labels("train.csv", "sentence-transformers/all-MiniLM-L6-v2").frame.head()  # doctest: +SKIP
    """
    name, known = str(model), dict[str, Any]()
    if Path(model, RECORD).is_file():
        name, known = _of_fit(Path(model))
    given = {"text": text, "label": label, "label_separator": label_separator, "kind": None if kind == "auto" else kind}
    columns = known | {key: value for key, value in given.items() if value is not None}
    read = {"prompt": columns.pop("prompt", None), "max_length": columns.pop("max_length", None)}
    read |= {key: value for key, value in (("prompt", prompt), ("max_length", max_length)) if value is not None}
    parted = columns.pop("group", None)
    if group is None and parted is not None and parted in Table.of(train, None, None, "train").frame.columns:
        group = parted
    plan = make_plan(  # reads and checks the table; its model is never opened
        train, model="", group=group, validation_share=0.0, seed=seed, folds=folds, **columns
    )
    data, problem = plan.data, plan.data.problem
    if problem.names:
        _cleanlab(problem)  # before the rows are read
    parts = splits.folds(data.train, problem, plan.folds, plan.options.seeds["subset"])
    pretrained = Pretrained.open(name, problem, **read)
    phi = read_rows(name, pretrained, pooling, {TRAIN: data.train}).features[TRAIN]

    def fit(inside: np.ndarray) -> Probe:
        return probe_of(phi[inside], data.train.iloc[inside], problem)

    labels = np.array(problem.ids(data.train["label"].tolist()), dtype=float)
    targets = problem.membership(data.train["label"]).astype(float) if problem.names else labels[:, None]
    outputs, influence = cross_influence(phi, targets, fit, parts, problem.loss)
    return Inspected(_listed(data, problem, outputs, targets, influence), name)


def _of_fit(folder: Path) -> tuple[str, dict[str, Any]]:
    """The pre-trained model of a fit, and its columns, kind, prompt and length."""
    record = read_record(folder)
    recipe, columns = record["recipe"], record["columns"]
    text = {key: columns.get(key) for key in ("text", "label", "label_separator", "group")}
    about = {"kind": recipe["kind"], "prompt": recipe.get("prompt"), "max_length": recipe["max_length"]}
    logger.info("%s: the rows are read by %s, from which it was fine-tuned", folder, recipe["model"])
    return recipe["model"], {**text, **about}


def _listed(
    data: Data, problem: Problem, outputs: np.ndarray, targets: np.ndarray, influence: np.ndarray
) -> pd.DataFrame:
    """The rows with what was found of each, the largest loss first."""
    scores, rows = problem.activate(outputs), data.train
    if problem.names:
        right = np.where(targets > 0, scores, 1 - scores if problem.several else 1)
        loss = -np.log(np.maximum(right, np.finfo(float).tiny)).sum(axis=1)
    else:
        loss = np.square(outputs - targets)[:, 0]
    found = {
        "row": rows.index,
        "label": [_shown(label) for label in rows["label"]],
        "suggestion": [_shown(label) for label in problem.decide(scores)],
        "loss": loss,
        **({"suspect": _suspects(problem, rows["label"], scores)} if problem.names else {}),
        "influence": influence / (float(influence.std()) or 1.0),
        **{column: rows[column].to_numpy() for column in ("text", "text_pair") if column in rows},
    }
    frame = pd.DataFrame(found)
    return frame.iloc[np.argsort(-loss, kind="stable")].reset_index(drop=True)


def _shown(label: Any) -> Any:
    """A label as one cell: several labels are joined."""
    return ", ".join(label) if isinstance(label, tuple) else label


def _suspects(problem: Problem, labels: pd.Series, scores: np.ndarray) -> np.ndarray:
    """Whether confident learning takes each row's label for wrong (rows,)."""
    find, member = _cleanlab(problem), problem.membership(labels)
    given: Any = [np.flatnonzero(row).tolist() for row in member] if problem.several else member.argmax(axis=1)
    return np.asarray(find(given, scores, n_jobs=1))


def _cleanlab(problem: Problem) -> Any:
    """The function of cleanlab that finds wrong labels.

    Raises:
        UsageError: cleanlab is not installed.
    """
    try:
        from cleanlab import filter as one
        from cleanlab.multilabel_classification import filter as several
    except ImportError as error:
        raise UsageError("wrong labels are found with cleanlab: pip install 'steadytune[labels]'.") from error
    return (several if problem.several else one).find_label_issues
