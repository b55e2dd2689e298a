"""The scikit-learn face of `search`: estimators with the conventions of scikit-learn's own searches."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ..config import ALIASES
from ..data.metrics import smaller_is_better
from ..errors import UsageError
from ..fitting.estimators import MODEL, SteadyClassifier, SteadyRegressor
from ..fitting.options import Options
from .main import SearchResult, search
from .record import recorded_recipe
from .words import shown

SEARCH_ONLY = (
    "engine", "resume", "overwrite", "unlabelled", "unlabelled_size", "tests", "num_seeds",
)  # no options of an estimator  # fmt: skip
SETTINGS = ("lr", "batch_size", "steps", "epochs", "max_length", "bf16")  # options that are parameters


class _Searching:
    """What both estimators add to those of `fit`."""

    def __init__(
        self,
        model: str | Path | Sequence[str | Path] | Mapping[str, str | Path] = MODEL,
        *,
        budget: str = "30m",
        arms: Sequence[str] | None = None,
        metric: str | None = None,
        folds: int | None = None,
        workers: int = 0,
        lr: float = 2e-5,
        batch_size: int = 16,
        steps: int | None = None,
        epochs: float | None = None,
        max_length: int | None = None,
        bf16: bool = False,
        random_state: int | np.random.RandomState | None = 0,
        output: str | Path | None = None,
        progress: bool = False,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model: Any = model
        self.budget = budget
        self.arms = arms
        self.metric = metric
        self.folds = folds
        self.workers = workers
        self.lr = lr
        self.batch_size = batch_size
        self.steps = steps
        self.epochs = epochs
        self.max_length = max_length
        self.bf16 = bf16
        self.random_state = random_state
        self.output = output
        self.progress = progress
        self.options = options

    def _train(self, table: pd.DataFrame, **settings: Any) -> Any:
        if settings.pop("subgroup") is not None:
            raise UsageError("subgroups are for SteadyClassifier and SteadyRegressor, a search compares all rows.")
        if "unlabelled" in settings:
            raise UsageError(
                "an estimator that searches takes no texts without labels: call steadytune.search(unlabelled=FILE)."
            )
        del settings["save_steps"]
        self.search_ = search(table, **settings)
        return self.search_.fitted

    @property
    def best_score_(self) -> float:
        """Expected score of the search's choice, by rows and trainings that did not choose."""
        return shown(self._record["metric"], float(self._record["claim"]["level"]["value"]))

    @property
    def best_params_(self) -> dict[str, Any]:
        """Parameters of `best_estimator_` that differ from those of plain fine-tuning."""
        ship = self._record["ship"]
        options = {name: value for name, value in self._ship_settings().items() if value is not None}
        own = {name: options.pop(name) for name in SETTINGS if name in options}
        options |= recorded_recipe(ship).trainings
        methods = {"methods": options.pop("methods")} if ship["methods"] else {}
        if (runs := self._record.get("runs", ship["soup"])) > 1:
            options |= {"num_seeds": runs, "combine": "soup"}
        return {"model": ship["model"], **methods, **own, **({"options": options} if options else {})}

    @property
    def best_index_(self) -> int:
        """Place of the recipe of the model in `cv_results_`."""
        return [arm["name"] for arm in self._scored].index(self._record["ship"]["name"])

    @property
    def cv_results_(self) -> dict[str, Any]:
        """Recipes that were scored: name, score, gain over plain with its error, trainings, seconds, rank.

        These scores have chosen, so the best of them is too good; `best_score_` is not.
        """
        arms = self._scored
        scores = np.array([arm["score"] for arm in arms])
        order = scores if smaller_is_better(self._record["metric"]) else -scores
        return {
            "params": [{"recipe": arm["name"], "model": arm["model"]} for arm in arms],
            "param_recipe": np.ma.array([arm["name"] for arm in arms], dtype=object),
            "mean_test_score": scores,
            "gain": np.array([arm["gain"]["value"] for arm in arms]),
            "gain_error": np.array([arm["gain"]["error"] for arm in arms]),
            "n_trainings": np.array([arm["blocks"] for arm in arms]),
            "mean_fit_time": np.array([arm["seconds"] for arm in arms]),
            "rank_test_score": np.array([1 + int((order < own).sum()) for own in order]),
        }

    @property
    def verdict_(self) -> str:
        """What was found, in a few sentences."""
        return self._result.verdict

    @property
    def _scored(self) -> list[dict[str, Any]]:
        return [arm for arm in self._record["arms"] if arm["gain"] is not None]

    @property
    def _result(self) -> SearchResult:
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self, "search_")
        return self.search_

    @property
    def _record(self) -> dict[str, Any]:
        return self._result.record

    def _ship_settings(self) -> dict[str, Any]:
        """Options of the recipe of the model."""
        given = {name: getattr(self, name) for name in SETTINGS}
        fields = {field.name for field in dataclasses.fields(Options)}
        own = {ALIASES.get(name, name): value for name, value in (self.options or {}).items()}
        given |= {name: value for name, value in own.items() if name in fields}
        base = Options.of({"validation_share": 0.0, **given})
        return recorded_recipe(self._record["ship"]).settings(base, self._record["rows"])


class SteadySearchClassifier(_Searching, SteadyClassifier):
    """Searches the recipe for texts and labels, and fine-tunes a model with it.

    Args:
        model: Hugging Face model directory or hub name, or several.
        budget: Time or number of trainings, as ``"30m"`` or ``"100runs"``.
        arms: What is tried, see `steadytune.search`.
        metric: Metric by which recipes are compared.
        folds: Number of folds; by default 5, or 10 below 200 rows.
        workers: Number of worker processes; 0 trains in this process.
        lr: Learning rate of plain fine-tuning.
        batch_size: Number of rows per step.
        steps: Number of optimizer steps of plain fine-tuning.
        epochs: Number of epochs, instead of steps.
        max_length: Largest number of tokens per row.
        bf16: Whether to use bfloat16 autocast.
        random_state: As of `SteadyClassifier`.
        output: Folder of the model and of the search, replaced at each `fit`; by default nothing stays on disk.
        progress: Whether to show progress.
        options: Further arguments of `steadytune.search`.

    Attributes:
        best_estimator_: A fitted `SteadyClassifier` with `best_params_`.
        best_params_: Its parameters.
        best_score_: Expected score, by rows and trainings that did not choose.
        cv_results_: All recipes that were scored.
        verdict_: What was found, in a few sentences.
        search_: The `SearchResult`.
        classes_: The labels, sorted.

    The estimator itself predicts, as the searches of scikit-learn do with ``refit=True``.
    """

    @property
    def best_estimator_(self) -> SteadyClassifier:
        """The model as an estimator of its own."""
        return _estimator(SteadyClassifier, self)


class SteadySearchRegressor(_Searching, SteadyRegressor):
    """Searches the recipe for texts and numbers; arguments as `SteadySearchClassifier`."""

    @property
    def best_estimator_(self) -> SteadyRegressor:
        """The model as an estimator of its own."""
        return _estimator(SteadyRegressor, self)


def _estimator(cls: Any, searched: Any) -> Any:
    """A fitted estimator of `fit` with the best recipe, and the options of the search that are not about searching."""
    best = searched.best_params_
    chosen = {*best, *best.get("options", {})}
    options = {
        name: value
        for name, value in (searched.options or {}).items()
        if name not in SEARCH_ONLY and ALIASES.get(name, name) not in chosen
    } | best.pop("options", {})
    settings = {name: getattr(searched, name) for name in SETTINGS}
    if "steps" in chosen:
        settings["epochs"] = None
    estimator = cls(**{**settings, **best}, random_state=searched.random_state, options=options or None)
    fitted = {name: value for name, value in vars(searched).items() if name.endswith("_") or name.startswith("_")}
    vars(estimator).update({name: value for name, value in fitted.items() if name != "search_"})
    return estimator
