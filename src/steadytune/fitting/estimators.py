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
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted

from ..config import ALIASES
from ..data.cells import LISTS, check_lists, is_empty, label_name, refuse
from ..data.files import named_columns, sequence_rows, whole_characters
from ..data.forms import OneHot, form_of
from ..data.tables import Kind
from ..errors import UsageError, one_line
from .main import fit

MODEL = "sentence-transformers/all-MiniLM-L6-v2"

# Arguments of `fit` that are no entries of ``options``, and what gives them.
SET_HERE = {
    "text": "is told by X",
    "label": "is told by y",
    "tests": "are scored by predict and score",
    "kind": "is told by the class of the estimator and by y",
    "subgroup": "is told by subgroups of fit(X, y, subgroups=...)",
    "unlabelled": "are told by unlabelled of fit(X, y, unlabelled=...)",
    "output": "is a parameter of its own",
    "overwrite": "is always on",
    "save_steps": "is always 0",
    "seed": "is given as random_state",
}


class _Steady(BaseEstimator):
    """Base of both estimators."""

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
        """Parameters by name; with ``deep``, also the entries of ``options`` as ``options__NAME``, for grids."""
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

    def _fit(
        self,
        X: Any,
        labels: Sequence[Any],
        sample_weight: Any,
        subgroups: Any,
        unlabelled: Any = None,
        *,
        kind: Kind | None = None,
    ) -> None:
        if sample_weight is not None:
            raise UsageError(
                "sample_weight is not supported: leave it out, repeat rows, or weigh the classes with "
                "options={'class_weights': 'balanced'}."
            )
        taken = [name for name in self.options or () if name in SET_HERE]
        if taken:
            raise UsageError(f"options hold {taken[0]!r}, which {SET_HERE[taken[0]]}: leave it out.")
        table = _frame(X)
        if len(table) != len(labels):
            raise UsageError(f"X has {len(table)} rows, y has {len(labels)}: give one label per row.")
        text = tuple(table.columns)
        label, part = (_free(name, text) for name in ("label", "subgroup"))
        columns = {label: pd.Series(list(labels), dtype=object)}
        if subgroups is not None:
            if len(subgroups) != len(table):
                raise UsageError(f"X has {len(table)} rows, subgroups has {len(subgroups)}: give one subgroup per row.")
            columns[part] = pd.Series(list(subgroups), dtype=object)
        more = {} if unlabelled is None else {"unlabelled": _like(unlabelled, table)}
        own = self.get_params(deep=False)
        settings = {k: v for k, v in own.items() if k not in ("random_state", "output", "options")}
        with tempfile.TemporaryDirectory() as scratch:
            self.result_ = self._train(
                table.assign(**columns),
                text=text,
                label=label,
                subgroup=None if subgroups is None else part,
                kind=kind or self._kind,
                output=Path(scratch, "model") if self.output is None else self.output,
                overwrite=self.output is not None,
                save_steps=0,
                seed=_seed(self.random_state),
                **more,
                **{**settings, **{ALIASES.get(name, name): value for name, value in (self.options or {}).items()}},
            )
        self.model_ = self.result_.model
        self.n_features_in_ = len(text)
        self.__dict__.pop("feature_names_in_", None)  # of an earlier fit
        if isinstance(X, pd.DataFrame):
            self.feature_names_in_ = np.array(text, dtype=object)

    def _train(self, table: pd.DataFrame, **settings: Any) -> Any:
        """The `FitResult` of a table, with these arguments of `fit`."""
        return fit(table, **settings)

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


def _free(name: str, taken: Sequence[str]) -> str:
    """A column name that is not taken."""
    while name in taken:
        name += "_"
    return name


def _seed(random_state: Any) -> Any:
    """The seed of a random state: a number stays, scikit-learn's other forms draw one."""
    if random_state is None or isinstance(random_state, np.random.RandomState):
        return int(check_random_state(random_state).randint(2**31))
    return random_state


class SteadyClassifier(ClassifierMixin, _Steady):
    """Fine-tunes a pre-trained model to classify texts.

    Args:
        model: Hugging Face model directory or hub name.
        methods: See `steadytune.fit`.
        lr: Peak learning rate.
        batch_size: Number of rows per step.
        steps: Number of optimizer steps; by default those of 20 epochs, but between 400 and 2,000.
        epochs: Number of epochs, instead of steps.
        max_length: Largest number of tokens per row; by default 128.
        dropout: Dropout probability; by default that of the model's config.
        bf16: Whether to use bfloat16 autocast.
        validation_share: Share of the rows given to `fit` that is held out for selection; 0 trains on all of them.
        evaluations: Number of evaluations on that share; the best weights are kept.
        patience: Number of evaluations without a new best after which training stops.
        num_seeds: Number of runs that are combined.
        combine: ``"soup"``, ``"ensemble"`` or ``"best"`` (needs a validation share).
        random_state: The seed, a generator that draws it, or None for a new seed at each `fit`.
        output: Folder of the model and its records, replaced at each `fit`; by default nothing stays on disk.
        progress: Whether to show bars.
        options: Further arguments of `steadytune.fit`, for example ``{"class_weights": "balanced"}``.

    Attributes:
        classes_: The labels, sorted; columns of `predict_proba`.
        model_: The `FittedModel`.
        result_: The `FitResult`.

    ``X`` is a sequence of texts, of pairs of texts, or a data frame with one or two text columns; ``y`` labels of any
    one type. Several labels a row are lists of labels (rows,), a matrix of 0 and 1 (rows, classes), a data frame with
    one column for each class, or strings with a separator, ``options={"label_separator": "|"}``.
    """

    _kind = "classification"

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, subgroups: Any = None, unlabelled: Any = None
    ) -> SteadyClassifier:
        """Fine-tune on texts (rows,) or (rows, 1 or 2) and labels (rows,), or several labels a row.

        Args:
            X: Texts.
            y: Labels.
            sample_weight: Not supported; giving it raises a clear error.
            subgroups: Name of the subgroup of each row (rows,), for methods that read it and for scores of each.
            unlabelled: Texts without labels, in the form of ``X``, for ``pretrain`` or a ``procedure`` of ``options``.

        Raises:
            UsageError: What `steadytune.fit` refuses, and weights of rows.
        """
        matrix = None
        if self._separator is not None:
            self._fit(X, _column(y).tolist(), sample_weight, subgroups, unlabelled, kind="multilabel")
            self.classes_ = np.array(self.model_.problem.names, dtype=object)
        elif (matrix := _matrix(y)) is not None:
            _check_matrix(matrix)
            self.classes_ = matrix.columns.to_numpy()
            rows = [[_name(label) for label in self.classes_[row]] for row in matrix.to_numpy()]
            self._fit(X, rows, sample_weight, subgroups, unlabelled, kind="multilabel")
        elif (lists := _lists(y)) is not None:
            known = _sorted({label for row in lists for label in row})
            self.classes_ = np.fromiter(known, dtype=object, count=len(known))
            lists = [[_name(label) for label in row] for row in lists]
            self._fit(X, lists, sample_weight, subgroups, unlabelled, kind="multilabel")
        else:
            labels = _labels(y)
            try:
                self.classes_ = np.unique(labels)
            except TypeError:
                kinds = ", ".join(sorted({type(label).__name__ for label in labels}))
                raise UsageError(f"y holds labels of several types ({kinds}): give them one type.") from None
            try:
                check_classification_targets(labels)
            except (ValueError, TypeError) as error:
                raise UsageError(
                    f"y holds no classes that scikit-learn can score ({one_line(error)[:120]}): use SteadyRegressor "
                    "for numbers, or give y.astype(str)."
                ) from None
            names: dict[str, Any] = {}
            for label in self.classes_:
                if (other := names.setdefault(_name(label), label)) is not label:
                    raise UsageError(
                        f"y holds {str(other)!r} and {str(label)!r}, which are one class: write them alike."
                    )
            self._fit(X, [_name(label) for label in labels], sample_weight, subgroups, unlabelled)
        self._is_matrix = matrix is not None
        self._columns()
        return self

    @property
    def _separator(self) -> str | None:
        return (self.options or {}).get("label_separator")

    def _columns(self) -> None:
        """Positions of ``classes_`` among the model's outputs."""
        columns = {name: i for i, name in enumerate(self.model_.problem.names)}
        self._order = [columns[_name(label)] for label in self.classes_]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Probabilities (rows, classes), columns as `classes_`."""
        rows = self._rows(X)
        return self.model_.predict_proba(rows)[:, self._order]

    def predict(self, X: Any) -> np.ndarray:
        """Labels as they were given to `fit`: (rows,), or several a row.

        These are lists (rows,), strings with the separator (rows,), or for a matrix or frame a matrix (rows, classes).
        """
        check_is_fitted(self, "model_")
        member = self._member(X)
        if not self.model_.problem.several:
            return self.classes_[member.argmax(axis=1)]
        if self._is_matrix:
            return member.astype(int)
        rows = (self.classes_[row].tolist() for row in member)
        if self._separator is not None:
            rows = (self._separator.join(row) for row in rows)
        return np.fromiter(rows, dtype=object, count=len(member))

    def _member(self, X: Any) -> np.ndarray:
        """Truth values (rows, classes) of predictions, as the model's threshold decides them, columns as `classes_`."""
        return self.model_.problem.membership(self.model_.predict(self._rows(X)))[:, self._order]

    def score(self, X: Any, y: Any, sample_weight: Any = None) -> float:
        """Accuracy; for several labels a row, the share of rows with all labels correct."""
        check_is_fitted(self, "model_")
        if not self.model_.problem.several:
            return super().score(X, y, sample_weight)
        right = [a == b for a, b in zip(self._sets(y), self._sets(self.predict(X)), strict=True)]
        return float(np.average(right, weights=sample_weight))

    def _sets(self, y: Any) -> list[set[str]]:
        """The names of each row's labels, given in the form of training.

        Raises:
            UsageError: Labels of another form.
        """
        if self._is_matrix:
            matrix = _matrix(y)
            if matrix is None or matrix.shape[1] != len(self.classes_):
                raise UsageError(f"y must be a matrix of 0 and 1 with {len(self.classes_)} columns, as in training.")
            if {*matrix.columns} != {*self.classes_}:  # columns without names of their own
                matrix = matrix.set_axis(self.classes_, axis=1)
            return [{*map(_name, matrix.columns[row])} for row in matrix.to_numpy()]
        cells = list(y) if self._separator is None else _column(y)
        rows = form_of("y", self._separator).read(pd.DataFrame({"y": pd.Series(list(cells), dtype=object)}), "y")
        if not all(isinstance(row, LISTS) for row in rows):
            raise UsageError("y must hold lists of labels, as in training.")
        return [{*map(_name, row)} for row in rows]


class SteadyRegressor(RegressorMixin, _Steady):
    """Fine-tunes a pre-trained model to predict a number from texts; arguments as `SteadyClassifier`."""

    _kind = "regression"

    def fit(
        self, X: Any, y: Any, sample_weight: Any = None, subgroups: Any = None, unlabelled: Any = None
    ) -> SteadyRegressor:
        """Fine-tune on texts (rows,) or (rows, 1 or 2) and numbers (rows,).

        Raises:
            UsageError: What `steadytune.fit` refuses.
        """
        if getattr(y, "ndim", 1) == 2 and y.shape[1] != 1:
            raise UsageError(f"y has shape {y.shape}: give one number per row.")
        self._fit(X, _labels(y).tolist(), sample_weight, subgroups, unlabelled)
        return self

    def predict(self, X: Any) -> np.ndarray:
        """Numbers (rows,)."""
        rows = self._rows(X)
        return self.model_.predict(rows).astype(float)


def _frame(X: Any) -> pd.DataFrame:
    """Texts as a frame with text columns only."""
    if isinstance(X, pd.DataFrame):
        return named_columns(X.reset_index(drop=True), "X")
    return sequence_rows(X, "X")


def _like(X: Any, table: pd.DataFrame) -> pd.DataFrame:
    """Texts as a frame with the columns of another one.

    Raises:
        UsageError: There are more or fewer columns.
    """
    frame = _frame(X)
    if frame.shape[1] != table.shape[1]:
        raise UsageError(
            f"unlabelled has {frame.shape[1]} text columns, X has {table.shape[1]}: give the same columns."
        )
    return frame if {*frame.columns} == {*table.columns} else frame.set_axis(table.columns, axis=1)


def _name(label: Any) -> str:
    """Name of a label as a class."""
    return str(whole_characters(label_name(label)))


def _sorted(labels: set[Any]) -> list[Any]:
    """Sorted labels; labels of several types are sorted by name."""
    try:
        return sorted(labels)
    except TypeError:
        return sorted(labels, key=str)


def _matrix(y: Any) -> pd.DataFrame | None:
    """Truth values (rows, classes) of a matrix or frame of 0 and 1, columns called by class; None for other labels.

    Raises:
        UsageError: A data frame with other values.
    """
    if isinstance(y, pd.DataFrame):
        if y.shape[1] == 1:
            return None
        named = named_columns(y, "y")
        return pd.DataFrame(OneHot(tuple(named.columns)).member(named, "y"), columns=y.columns)
    values = y.toarray() if hasattr(y, "toarray") else _array(y)  # a sparse matrix is one too
    if values.ndim != 2 or values.shape[1] == 1 or not np.isin(values, [0, 1]).all():
        return None
    return pd.DataFrame(values.astype(bool))


def _check_matrix(matrix: pd.DataFrame) -> None:
    """Refuse one-hot rows, which may be meant as one label a row, and classes without a row."""
    if (matrix.sum(axis=1) == 1).all():
        raise UsageError(
            "y has one-hot rows: give one label per row, as of y.argmax(axis=1); for several labels a row, give lists "
            "of labels."
        )
    if not matrix.any(axis=0).all():
        missing = matrix.columns[~matrix.any(axis=0)][0]
        raise UsageError(f"y has no row of class {missing}: leave its column out.")


def _lists(y: Any) -> list[list[Any]] | None:
    """Lists of labels (rows,); None for one label a row.

    Raises:
        UsageError: Lists with entries that are no labels.
    """
    if not isinstance(y, (list, tuple, pd.Series, np.ndarray)) or not all(isinstance(row, LISTS) for row in y):
        return None
    rows = [list(row) for row in y]
    widths = {len(row) for row in rows}
    numbers = all(isinstance(value, (int, float, np.number)) for row in rows for value in row)
    if widths in (set(), {1}) or (numbers and len(widths) == 1):
        return None  # a column (rows, 1), or numbers of another shape than a matrix of 0 and 1
    check_lists(pd.Series(rows), "y", "the training rows")
    return rows


def _labels(y: Any) -> np.ndarray:
    """Labels (rows,); a column is one too.

    Raises:
        UsageError: No labels, empty ones, or several a row.
    """
    values = _column(y)
    refuse(is_empty(pd.Series(values, dtype=object)), "y", "empty", "the training rows")
    return values


def _column(y: Any) -> np.ndarray:
    """Cells (rows,) of a sequence or column, which may be empty.

    Raises:
        UsageError: No labels, or several a row.
    """
    if y is None:
        raise UsageError("y is missing: give one label per row.")
    if isinstance(y, pd.DataFrame):
        y = y.iloc[:, 0] if y.shape[1] == 1 else y.to_numpy()
    values = y.to_numpy() if isinstance(y, pd.Series) else _array(y)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values.ravel()
    listed = values.ndim == 1 and any(isinstance(value, LISTS) for value in values)
    if values.ndim != 1 or listed:
        shape = "lists of some rows" if listed else f"shape {values.shape}"
        raise UsageError(
            f"y has {shape}: give one label per row, for one-hot rows y.argmax(axis=1). Several labels a row are lists "
            "of labels, or a matrix of 0 and 1 with a column for each class."
        )
    return values


def _array(y: Any) -> np.ndarray:
    """Any sequence as an array; lists of unequal lengths as objects."""
    try:
        return np.asarray(y)
    except ValueError:
        return np.fromiter(y, dtype=object)
