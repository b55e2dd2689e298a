"""The result of `fit` as a model that predicts labels for tables of text, from memory or from its folder."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..data.files import sequence_rows
from ..data.forms import Label, as_label, form_of
from ..data.guards import truncated
from ..data.problem import Problem
from ..data.scores import full_scores, groups_of, subgroups_of
from ..data.tables import Table, examples, missing_subgroup, texts
from ..errors import UsageError, one_line
from .encoding import check_vocabulary, token_counts, tokenise
from .folder import MEMBERS, read_record
from .outputs import device, logits
from .peft_models import read_model, write_model
from .pretrained import Pretrained, agree, quiet
from .randomness import as_found

logger = logging.getLogger("steadytune")

Rows = str | Path | pd.DataFrame | Table | Sequence[str] | Sequence[Sequence[str]]


class FittedModel:
    """A model, or several models whose predictions are averaged.

    Attributes:
        models: transformers models, plain unless they have adapters that cannot be merged.
        tokenizer: Tokenizer of the models.
        problem: The problem; ``problem.names`` are the columns of probabilities.
        text: The text columns of tables: one, or two for pairs.
        label: The label column, or one column per class.
        form: How labels are written in tables, and predictions by `predict_table`.
        max_length: Largest number of tokens per row.
        prompt: Text before the first text of each row.
        bf16: Whether to use bfloat16 autocast, as in training.
        constant: Answer without reading a text, from `Problem.constant` on the training rows; it is the baseline of
            scores.
        subgroup: Columns of tables that name the subgroup of each row, for `evaluate`.
        group: Column of tables whose equal values mark rows that are alike, for the intervals of `evaluate`.
    """

    def __init__(
        self,
        models: Sequence[PreTrainedModel],
        tokenizer: PreTrainedTokenizerBase,
        problem: Problem,
        *,
        text: Sequence[str] = ("text",),
        label: Label = "label",
        label_separator: str | None = None,
        max_length: int = 128,
        prompt: str = "",
        bf16: bool = False,
        constant: np.ndarray | None = None,
        subgroup: Sequence[str] = (),
        group: str | None = None,
    ) -> None:
        self.models, self.tokenizer, self.problem = list(models), tokenizer, problem
        self.text, self.label, self.max_length, self.bf16 = tuple(text), label, max_length, bf16
        self.label_separator, self.form = label_separator, form_of(label, label_separator)
        self.prompt, self.constant, self.subgroup, self.group = prompt, constant, tuple(subgroup), group

    @classmethod
    @as_found()
    def load(cls, folder: str | Path) -> FittedModel:
        """Read what `fit` wrote.

        Raises:
            UsageError: The folder has no finished run.
        """
        record = read_record(folder)
        recipe, columns = record["recipe"], record["columns"]
        problem = Problem.of(recipe["kind"], recipe["labels"])
        if record.get("threshold") is not None:
            problem = problem.at(record["threshold"])
        members = sorted(Path(folder, MEMBERS).glob("*")) or [Path(folder)]
        loaded: list[Any] = []
        try:
            with quiet():
                tokenizer = AutoTokenizer.from_pretrained(folder)
            for member in members:
                loaded.append(_member(member, record, problem))
        except Exception as error:  # damaged files raise what their parsers raise
            raise UsageError(f"{folder}: the model cannot be loaded: {one_line(error)[:500]}") from error
        for model in loaded:  # of an ensemble or not: padding and special tokens as in training
            agree(model.config, tokenizer, model, str(folder))
        return cls(
            [model.to(device()).eval() for model in loaded],
            tokenizer,
            problem,
            text=columns["text"],
            label=as_label(columns["label"]) or "",
            label_separator=columns.get("label_separator"),
            max_length=recipe["max_length"],
            prompt=recipe.get("prompt", ""),
            bf16=recipe["bf16"],
            constant=constant_of(record),
            subgroup=columns.get("subgroup", ()),
            group=columns.get("group"),
        )

    # ---- predictions

    def scores(self, rows: Rows, *, progress: bool = False) -> np.ndarray:
        """Probabilities (rows, classes), or numbers (rows, 1) for regression; several models averaged.

        Args:
            rows: Texts, pairs of texts, or a table with the text columns of the training table.
            progress: Show a bar.

        Raises:
            UsageError: A table without those columns, empty texts, or outputs that are no numbers.
        """
        frame = self._texts(rows)
        self._look_at(frame)
        return self._scores(frame, progress)

    def _scores(self, frame: pd.DataFrame, progress: bool) -> np.ndarray:
        return self.scores_of_tokens(tokenise(frame, self.tokenizer, self.max_length, self.prompt), progress)

    def scores_of_tokens(self, features: list[dict[str, Any]], progress: bool = False) -> np.ndarray:
        """Scores (rows, outputs) of tokenised rows, as `scores` gives them; each model passes them once."""
        each = [self.problem.activate(logits(m, self.tokenizer, features, self.bf16, progress)) for m in self.models]
        return np.mean(each, axis=0)

    def _look_at(self, frame: pd.DataFrame) -> None:
        """Refuse tokens that the model does not have; say how many texts are longer than it reads."""
        cut = truncated(self._tokens(frame), self.max_length, "the given rows")
        if cut is not None:
            logger.warning("%s", cut.message)

    def _tokens(self, frame: pd.DataFrame) -> list[int]:
        """Tokens of every row before it is cut, all of which the model must have."""
        features = tokenise(frame, self.tokenizer, self.max_length, self.prompt)
        check_vocabulary(features, self.models[0], "given", frame.index)
        return token_counts(frame, features, self.tokenizer, self.max_length, self.prompt)

    def scores_of(self, predictions: pd.DataFrame) -> np.ndarray:
        """The scores behind a table of predictions that this model gave."""
        names = [f"probability_{name}" for name in self.problem.names] or ["prediction"]
        return predictions[names].to_numpy(dtype=float)

    def predict_proba(self, rows: Rows) -> np.ndarray:
        """Probabilities (rows, classes), columns in the order of ``problem.names``.

        Raises:
            UsageError: A regression model has none.
        """
        if not self.problem.names:
            raise UsageError("predict_proba: a regression model predicts numbers: use predict.")
        return self.scores(rows)

    def predict(self, rows: Rows) -> np.ndarray:
        """Class names, tuples of class names (several labels), or numbers: one per row."""
        return self.problem.decide(self.scores(rows))

    def predict_table(
        self, rows: Rows, coarser: Mapping[str, str] | None = None, *, progress: bool = False
    ) -> pd.DataFrame:
        """Predictions in the form of the training labels and, for classes, ``probability_<class>``; one row per row.

        They stand in a column ``prediction``, of several labels a row as lists or joined by the separator, or in one
        column of 0 and 1 for each class.

        Args:
            rows: As for `scores`.
            coarser: Class name to the coarser name it is reported under.
            progress: Show a bar.
        """
        frame = self._texts(rows)
        self._look_at(frame)
        predicted = self._report(self._scores(frame, progress), coarser or {})
        return pd.concat([self.form.write(predicted["prediction"]), predicted.drop(columns="prediction")], axis=1)

    def predict_rows(self, rows: pd.DataFrame) -> tuple[pd.DataFrame, np.ndarray]:
        """Predictions of checked rows, and the tokens (rows,) of each before it is cut.

        Args:
            rows: As `data.tables.texts` gives them.
        """
        return self._report(self._scores(rows, progress=False), {}), np.array(self._tokens(rows))

    def _report(self, scores: np.ndarray, coarser: Mapping[str, str]) -> pd.DataFrame:
        predictions = self.problem.decide(scores)
        if coarser:
            predictions = np.array([coarser.get(name, name) for name in predictions], dtype=object)
        columns = {f"probability_{name}": column for name, column in zip(self.problem.names, scores.T, strict=False)}
        return pd.DataFrame({"prediction": predictions, **columns})

    def evaluate(self, rows: str | Path | pd.DataFrame | Table) -> dict[str, Any]:
        """Every metric of the kind on a table with labels.

        Beside the metrics stand ``rows``, ``intervals``, ``baseline``, ``per_class`` ..., see `full_scores`.

        Raises:
            UsageError: Unreadable tables, unknown labels.
        """
        table = Table.of(rows, self.text, self.label, "given", label_separator=self.label_separator)
        if missing_subgroup(table.frame, self.subgroup) is None:
            table = dataclasses.replace(table, subgroup=table.subgroup or self.subgroup)
        if self.group in table.frame.columns:
            table = dataclasses.replace(table, group=table.group or self.group)
        rows = examples(table)
        checked = rows.assign(label=self.problem.encode(rows, table))
        self._look_at(checked)
        predictions, _ = self.judge(checked, self._scores(checked, progress=False), table.coarser)
        known = {name: checked[name].to_numpy() for name in ("label", "group", "subgroup") if name in checked}
        return self.account(predictions.assign(**known), table.coarser)

    def judge(
        self, rows: pd.DataFrame, scores: np.ndarray, coarser: Mapping[str, str] | None = None
    ) -> tuple[pd.DataFrame, dict[str, Any]]:
        """Predictions and metrics of checked rows.

        Args:
            rows: Rows with labels.
            scores: Scores (rows, outputs) of this model for the rows, as `scores` gives them.
            coarser: Class name to the coarser name it is reported under.
        """
        coarser = coarser or {}
        predicted = self._report(scores, coarser)
        gold = self.problem.array(rows["label"])
        chances = self.problem.coarser_scores(self.scores_of(predicted), coarser)
        metrics = self.problem.coarser(coarser).score(gold, predicted["prediction"].to_numpy(), chances)
        return predicted, {"rows": len(rows), **metrics}

    def account(
        self, predictions: pd.DataFrame, coarser: Mapping[str, str] | None = None, *, selected: bool = False
    ) -> dict[str, Any]:
        """Everything that is recorded of one set, as `full_scores` gives it.

        Args:
            predictions: Of this model, as `judge` gives them, with a column ``label``, and ``group`` and ``subgroup``
                where there are such.
            coarser: Class name to the coarser name it is scored under.
            selected: Whether these rows selected the model.
        """
        coarser = coarser or {}
        constant = None if self.constant is None else self.problem.coarser_scores(self.constant, coarser)
        return full_scores(
            self.problem.coarser(coarser),
            self.problem.array(predictions["label"]),
            predictions["prediction"].to_numpy(),
            self.problem.coarser_scores(self.scores_of(predictions), coarser),
            constant,
            selected,
            subgroups_of(predictions),
            groups_of(predictions),
        )

    def _texts(self, rows: Rows) -> pd.DataFrame:
        """Frame with `text` (and `text_pair`): tables by the names of their columns, sequences by position."""
        if isinstance(rows, Table):
            table = dataclasses.replace(rows, text=rows.text or self.text)
        elif isinstance(rows, (str, Path, pd.DataFrame, Mapping)) or hasattr(rows, "to_pandas"):
            table = Table.of(rows, self.text, self.label, "given")
        else:
            frame = sequence_rows(rows, "the given rows")
            if frame.shape[1] != len(self.text):
                raise UsageError(f"the model reads {len(self.text)} text(s) a row, got {frame.shape[1]}.")
            table = Table(frame, "the given rows", tuple(frame.columns), None)
        return texts(table)

    # ---- files

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model and its tokenizer: plain, or the adapters that cannot be merged.

        Raises:
            UsageError: It is an ensemble, which is no single model.
        """
        if len(self.models) > 1:
            raise UsageError(
                f"an ensemble of {len(self.models)} models is no single model: use the folder that fit has written, or "
                "fit with distil=True (--distil) for one model."
            )
        with quiet():
            write_model(self.models[0], folder)
            self.tokenizer.save_pretrained(folder)


def constant_of(record: Mapping[str, Any]) -> np.ndarray | None:
    """What a model answers that reads no text, from the record of a fit; None where it is not written there."""
    return np.array(record["constant"]) if "constant" in record else None


def _member(folder: Path, record: Mapping[str, Any], problem: Problem) -> Any:
    """The model of a folder. New weights of its base that it lacks (a pooler) are drawn as in its training."""
    number = int(folder.name) if folder.parent.name == MEMBERS else record.get("chosen") or 0
    trainings = record.get("runs", [])
    seed = trainings[number]["seeds"]["init"] if number < len(trainings) else 0
    return read_model(folder, lambda: Pretrained.open(record["recipe"]["model"], problem).load(seed))
