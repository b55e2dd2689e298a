"""The scikit-learn face of `fit`: estimators that clone, grid-search and cross-validate like any other."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.utils import check_random_state
from sklearn.utils.validation import check_is_fitted

from ..config import ALIASES
from ..data.tables import Kind, label_name
from ..errors import UsageError
from .main import fit

MODEL = "sentence-transformers/all-MiniLM-L6-v2"


class _Steady(BaseEstimator):
    """What both estimators share."""

    _kind: Kind = "auto"

    def __init__(
        self,
        model: str | Path = MODEL,
        *,
        methods: Any = (),
        lr: float = 2e-5,
        batch_size: int = 16,
        steps: int | None = None,
        epochs: float | None = None,
        max_length: int | None = None,
        dropout: float | None = None,
        bf16: bool = False,
        validation_share: float = 0.0,
        evaluations: int = 0,
        patience: int | None = None,
        num_seeds: int = 1,
        combine: str = "soup",
        random_state: int | np.random.RandomState | None = 0,
        output: str | Path | None = None,
        progress: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.methods = methods
        self.lr = lr
        self.batch_size = batch_size
        self.steps = steps
        self.epochs = epochs
        self.max_length = max_length
        self.dropout = dropout
        self.bf16 = bf16
        self.validation_share = validation_share
        self.evaluations = evaluations
        self.patience = patience
        self.num_seeds = num_seeds
        self.combine = combine
        self.random_state = random_state
        self.output = output
        self.progress = progress
        self.options = options

    def _fit(self, X: Any, labels: Sequence[Any]) -> None:
        table = _frame(X)
        if len(table) != len(labels):
            raise UsageError(f"X has {len(table)} rows, y has {len(labels)}: give one label per row.")
        text = tuple(table.columns)
        own = self.get_params(deep=False)
        settings = {k: v for k, v in own.items() if k not in ("random_state", "output", "options")}
        with tempfile.TemporaryDirectory() as scratch:
            self.result_ = fit(
                table.assign(label=pd.Series(list(labels), dtype=object)),
                text=text,
                label="label",
                kind=self._kind,
                output=Path(scratch, "model") if self.output is None else self.output,
                overwrite=self.output is not None,
                save_steps=0,
                seed=_seed(self.random_state),
                **{**settings, **{ALIASES.get(name, name): value for name, value in (self.options or {}).items()}},
            )
        self.model_ = self.result_.model
        self.n_features_in_ = len(text)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.string = tags.input_tags.two_d_array = True
        tags.non_deterministic = False
        return tags


def _seed(random_state: Any) -> Any:
    """A number as it is; scikit-learn's other forms draw one."""
    if random_state is None or isinstance(random_state, np.random.RandomState):
        return int(check_random_state(random_state).randint(2**31))
    return random_state


class SteadyClassifier(ClassifierMixin, _Steady):
    """Fine-tunes a pre-trained model to classify texts.

    Args:
        model: Hugging Face model directory or hub name.
        methods: see `steadytune.fit`.
        lr: peak learning rate.
        batch_size: rows per step.
        steps: optimizer steps; by default 20 epochs, at least 400 and at most 2,000.
        epochs: instead of steps.
        max_length: tokens per row; by default 128.
        dropout: by default as the model's config says.
        bf16: bfloat16 autocast.
        validation_share: of the rows given to `fit`, for selection; 0: train on all of them.
        evaluations: how often to score that share; the best weights are kept.
        patience: evaluations without a new best before stopping.
        num_seeds: number of runs that are combined.
        combine: ``"soup"``, ``"ensemble"`` or ``"best"`` (needs a validation share).
        random_state: the seed, a generator that draws it, or None for another seed each time.
        output: folder of the model and its records, replaced at each `fit`; by default nothing stays on disk.
        progress: show bars.
        options: further arguments of `steadytune.fit`, for example ``{"class_weights": "balanced"}``.

    Attributes:
        classes_: the labels, sorted; columns of `predict_proba`.
        model_: the `FittedModel`.
        result_: the `FitResult`.

    ``X`` is a sequence of texts, of pairs of texts, or a data frame with one or two text columns; ``y`` labels of any
    one type.
    """

    _kind = "classification"

    def fit(self, X: Any, y: Any) -> SteadyClassifier:
        """Fine-tune on texts (rows,) or (rows, 1 or 2) and labels (rows,).

        Raises:
            UsageError: what `steadytune.fit` refuses.
        """
        y = np.asarray(y)
        self.classes_ = np.unique(y)
        self._fit(X, [label_name(label) for label in y])
        columns = {name: i for i, name in enumerate(self.model_.problem.names)}
        self._order = [columns[label_name(label)] for label in self.classes_]
        return self

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (rows, classes), columns as `classes_`."""
        check_is_fitted(self, "model_")
        return self.model_.predict_proba(_texts(X))[:, self._order]

    def predict(self, X: Any) -> np.ndarray:
        """Labels (rows,), of the type given to `fit`."""
        check_is_fitted(self, "model_")
        return self.classes_[self.predict_proba(X).argmax(axis=1)]


class SteadyRegressor(RegressorMixin, _Steady):
    """Fine-tunes a pre-trained model to predict a number from texts; arguments as `SteadyClassifier`."""

    _kind = "regression"

    def fit(self, X: Any, y: Any) -> SteadyRegressor:
        """Fine-tune on texts (rows,) or (rows, 1 or 2) and numbers (rows,).

        Raises:
            UsageError: what `steadytune.fit` refuses.
        """
        self._fit(X, [float(value) for value in np.asarray(y)])
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Numbers (rows,)."""
        check_is_fitted(self, "model_")
        return self.model_.predict(_texts(X)).astype(float)


def _frame(X: Any) -> pd.DataFrame:
    """Texts as a frame whose columns are all text."""
    if isinstance(X, pd.DataFrame):
        return X.reset_index(drop=True).rename(columns=str)
    values = _texts(X)
    if not values:
        raise UsageError("X has no rows.")
    names = ["text", "text_pair"][: 1 if isinstance(values[0], str) else len(values[0])]
    rows = [[v] if isinstance(v, str) else list(v) for v in values]
    if len({len(row) for row in rows}) != 1 or len(rows[0]) > 2:
        raise UsageError("X must hold one text or one pair of texts a row.")
    return pd.DataFrame(rows, columns=names)


def _texts(X: Any) -> list[Any]:
    """Texts or pairs of texts, whatever holds them."""
    if isinstance(X, pd.DataFrame):
        X = X.to_numpy()
    rows = [v if isinstance(v, str) else list(v) if np.ndim(v) else v for v in X]
    return [row[0] if isinstance(row, list) and len(row) == 1 else row for row in rows]
