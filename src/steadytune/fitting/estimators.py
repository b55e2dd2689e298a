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
from ..data.files import named_columns, sequence_rows, whole_characters
from ..data.tables import Kind, is_empty, label_name, refuse
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

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters by name; deep: each entry of ``options`` too, as ``options__NAME``, which grids may name."""
        params = super().get_params(deep)
        if deep:
            params |= {f"options__{name}": value for name, value in (self.options or {}).items()}
        return params

    def set_params(self, **params: Any) -> _Steady:
        """Set parameters; ``options__NAME`` sets one entry of ``options`` and keeps the others."""
        nested = {name: params.pop(name) for name in list(params) if name.startswith("options__")}
        super().set_params(**params)
        if nested:  # a copy: clones share the mapping
            self.options = {**(self.options or {}), **{k.removeprefix("options__"): v for k, v in nested.items()}}
        return self

    def _fit(self, X: Any, labels: Sequence[Any], sample_weight: Any = None, *, kind: Kind | None = None) -> None:
        if sample_weight is not None:
            raise UsageError(
                "sample_weight is not supported: leave it out, repeat rows, or weigh the classes with "
                "options={'class_weights': 'balanced'}."
            )
        table = _frame(X)
        if len(table) != len(labels):
            raise UsageError(f"X has {len(table)} rows, y has {len(labels)}: give one label per row.")
        text = tuple(table.columns)
        label = next(name for name in ("label", "y", *(f"label {i}" for i in range(9))) if name not in text)
        own = self.get_params(deep=False)
        settings = {k: v for k, v in own.items() if k not in ("random_state", "output", "options")}
        with tempfile.TemporaryDirectory() as scratch:
            self.result_ = fit(
                table.assign(**{label: pd.Series(list(labels), dtype=object)}),
                text=text,
                label=label,
                kind=kind or self._kind,
                output=Path(scratch, "model") if self.output is None else self.output,
                overwrite=self.output is not None,
                save_steps=0,
                seed=_seed(self.random_state),
                **{**settings, **{ALIASES.get(name, name): value for name, value in (self.options or {}).items()}},
            )
        self.model_ = self.result_.model
        self.n_features_in_ = len(text)
        if isinstance(X, pd.DataFrame):
            self.feature_names_in_ = np.array(text, dtype=object)

    def _rows(self, X: Any) -> Any:
        """Rows to predict: a frame by the names of its columns, if the training rows had names."""
        check_is_fitted(self, "model_")
        if isinstance(X, pd.DataFrame) and not hasattr(self, "feature_names_in_"):
            return X.to_numpy()
        return X

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
        methods: See `steadytune.fit`.
        lr: Peak learning rate.
        batch_size: Rows per step.
        steps: Optimizer steps; by default 20 epochs, at least 400 and at most 2,000.
        epochs: Instead of steps.
        max_length: Tokens per row; by default 128.
        dropout: By default as the model's config says.
        bf16: bfloat16 autocast.
        validation_share: Share of the rows given to `fit` that is held out for selection; 0 trains on all of them.
        evaluations: How often to score that share; the best weights are kept.
        patience: Evaluations without a new best before stopping.
        num_seeds: Number of runs that are combined.
        combine: ``"soup"``, ``"ensemble"`` or ``"best"`` (needs a validation share).
        random_state: The seed, a generator that draws it, or None for another seed each time.
        output: Folder of the model and its records, replaced at each `fit`; by default nothing stays on disk.
        progress: Show bars.
        options: Further arguments of `steadytune.fit`, for example ``{"class_weights": "balanced"}``.

    Attributes:
        classes_: The labels, sorted; columns of `predict_proba`.
        model_: The `FittedModel`.
        result_: The `FitResult`.

    ``X`` is a sequence of texts, of pairs of texts, or a data frame with one or two text columns; ``y`` labels of any
    one type.
    """

    _kind = "classification"

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> SteadyClassifier:
        """Fine-tune on texts (rows,) or (rows, 1 or 2) and labels (rows,).

        Several labels a row are lists (rows,), or an indicator matrix (rows, classes) of 0 and 1.

        Args:
            X: Texts.
            y: Labels.
            sample_weight: Not supported; here so that giving it is one clear error.

        Raises:
            UsageError: What `steadytune.fit` refuses, and weights of rows.
        """
        self._indicator = False
        if (several := _label_lists(y)) is not None:
            lists, self.classes_, self._indicator = several
            self._fit(X, [[_name(label) for label in row] for row in lists], sample_weight, kind="multilabel")
            self._columns()
            return self
        labels = _labels(y)
        try:
            self.classes_ = np.unique(labels)
        except TypeError:
            kinds = ", ".join(sorted({type(label).__name__ for label in labels}))
            raise UsageError(f"y holds labels of several types ({kinds}): give them one type.") from None
        self._fit(X, [_name(label) for label in labels], sample_weight)
        self._columns()
        return self

    def _columns(self) -> None:
        """Where each of ``classes_`` stands among the model's outputs."""
        columns = {name: i for i, name in enumerate(self.model_.problem.names)}
        self._order = [columns[_name(label)] for label in self.classes_]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (rows, classes), columns as `classes_`."""
        rows = self._rows(X)
        return self.model_.predict_proba(rows)[:, self._order]

    def predict(self, X: Any) -> np.ndarray:
        """Labels in the form given to `fit`: (rows,), lists (rows,), or an indicator matrix (rows, classes)."""
        check_is_fitted(self, "model_")
        if not self.model_.problem.several:
            return self.classes_[self.predict_proba(X).argmax(axis=1)]
        decided = self.model_.predict(self._rows(X))
        member = self.model_.problem.membership(decided)[:, self._order]
        if self._indicator:
            return member.astype(int)
        return np.fromiter((self.classes_[row].tolist() for row in member), dtype=object, count=len(member))

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy; of several labels a row, the share of rows whose labels are all right."""
        several = _label_lists(y)
        if several is None:
            return super().score(X, y, sample_weight)
        lists, _, indicator = several
        if indicator and self._indicator:
            return super().score(X, np.asarray(y), sample_weight)
        right = [
            {*map(_name, gold)} == {*map(_name, found)} for gold, found in zip(lists, self.predict(X), strict=True)
        ]
        return float(np.average(right, weights=sample_weight))


class SteadyRegressor(RegressorMixin, _Steady):
    """Fine-tunes a pre-trained model to predict a number from texts; arguments as `SteadyClassifier`."""

    _kind = "regression"

    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> SteadyRegressor:
        """Fine-tune on texts (rows,) or (rows, 1 or 2) and numbers (rows,).

        Raises:
            UsageError: What `steadytune.fit` refuses.
        """
        self._fit(X, _labels(y).tolist(), sample_weight)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Numbers (rows,)."""
        rows = self._rows(X)
        return self.model_.predict(rows).astype(float)


def _frame(X: Any) -> pd.DataFrame:
    """Texts as a frame whose columns are all text."""
    if isinstance(X, pd.DataFrame):
        return named_columns(X.reset_index(drop=True), "X")
    return sequence_rows(X, "X")


def _name(label: Any) -> str:
    """The name under which a label is learnt."""
    return str(whole_characters(label_name(label)))


def _label_lists(y: Any) -> tuple[list[list[Any]], np.ndarray, bool] | None:
    """Lists of labels (rows,), the classes, and whether `y` is an indicator matrix; None for one label a row.

    Raises:
        UsageError: One-hot rows, which may be meant as one label a row, a class without a row, or empty entries.
    """
    if y is None:
        return None
    names = y.columns.to_numpy() if isinstance(y, pd.DataFrame) else None
    if hasattr(y, "toarray"):  # a sparse matrix
        y = y.toarray()
    values = y.to_numpy() if isinstance(y, (pd.DataFrame, pd.Series)) else _array(y)
    listed = isinstance(y, (list, tuple, pd.Series)) or values.dtype == object
    if values.ndim == 2 and values.shape[1] > 1 and np.isin(values, [0, 1]).all():
        member = values.astype(bool)
        if (member.sum(axis=1) == 1).all():
            raise UsageError(
                "y has one-hot rows: give one label per row, as of y.argmax(axis=1); for several labels a row, give "
                "lists of labels."
            )
        classes = np.arange(member.shape[1]) if names is None else names
        if not member.any(axis=0).all():
            missing = classes[member.any(axis=0).argmin()]
            raise UsageError(f"y has no row of class {missing}: leave its column out.")
        return [classes[row].tolist() for row in member], classes, True
    rows = list(y) if listed and names is None else []
    if not rows or not all(isinstance(row, (list, tuple, set, frozenset, np.ndarray)) for row in rows):
        return None
    if all(len(row) == 1 for row in rows) or all(isinstance(v, (int, float, np.number)) for row in rows for v in row):
        return None  # a column (rows, 1), or numbers of another shape than an indicator matrix
    lists = [list(row) for row in rows]
    refuse(pd.Series([any(v is None or v != v or v == "" for v in row) for row in lists]), "y", "a list with an empty "
           "entry", "the training rows")  # fmt: skip
    known = sorted({label for row in lists for label in row}, key=str)
    return lists, np.fromiter(known, dtype=object, count=len(known)), False


def _labels(y: Any) -> np.ndarray:
    """Labels (rows,); a column is one too.

    Raises:
        UsageError: No labels, empty ones, or several a row.
    """
    if y is None:
        raise UsageError("y is missing: give one label per row.")
    if isinstance(y, pd.DataFrame):
        y = y.iloc[:, 0] if y.shape[1] == 1 else y.to_numpy()
    values = y if isinstance(y, pd.Series) else _array(y)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values.ravel()
    listed = values.ndim == 1 and any(isinstance(value, (list, tuple, set, np.ndarray)) for value in values)
    if values.ndim != 1 or listed:
        shape = "lists" if listed else f"shape {values.shape}"
        raise UsageError(
            f"y has {shape}: give one label per row, for one-hot rows y.argmax(axis=1). Several labels a row are "
            "learnt by steadytune.fit on a table."
        )
    column = pd.Series(values, dtype=None if isinstance(values, pd.Series) else object).reset_index(drop=True)
    refuse(is_empty(column), "y", "empty", "the training rows")
    return column.to_numpy() if isinstance(y, pd.Series) else np.asarray(values)


def _array(y: Any) -> np.ndarray:
    """Any sequence as an array; lists of unequal lengths as objects."""
    try:
        return np.asarray(y)
    except ValueError:
        return np.fromiter(y, dtype=object)
