"""The result of a fit, its record, and its files."""

from __future__ import annotations

import dataclasses
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ..data.balance import WEIGHT, effective
from ..data.prepare import fingerprint
from ..errors import UsageError
from ..files.atomic import write_json, write_whole, writing
from ..version import __version__
from .card import model_card
from .folder import MEMBERS, RECORD, Output
from .options import STOCK
from .report_page import HISTORY, INSPECTED, METRICS, MISTAKES, PAGE, PREDICTIONS, mistakes, write_page
from .spelling import method_record, procedure_record

if TYPE_CHECKING:
    from ..data.unlabelled import Unlabelled
    from .fitted_model import FittedModel
    from .plan import Plan
    from .pretrained import Pretrained


PRIVATE = [MISTAKES, INSPECTED, PAGE]  # files with texts of the user's data, which `upload` leaves out


@dataclass(frozen=True, eq=False)
class FitResult:
    """Result of `fit`.

    Attributes:
        output: A plain Hugging Face model directory, with README.md (model card), `metrics.json`,
            `predictions.parquet`, `history.parquet`, `steadytune.json`, and `report.html`, a page to read, which shows
            the texts of `mistakes.parquet`. Adapters that cannot be merged are there alone, and of an ensemble each
            model is in a folder of ``members``.
        model: The fitted model; `predict`, `evaluate` and `save_pretrained` are its own.
        metrics: Set -> metric -> value, of the model; beside the metrics of a set stand ``intervals`` (95 %, low and
            high), ``baseline`` and ``probe`` by metric, ``classes``, ``per_class``, ``confusion``, ``subgroups``,
            ``selected`` and ``notes``, see `steadytune.data.scores.full_scores`, and with several runs ``runs``, each
            metric's mean and spread.
        metric: Metric to show first.
        predictions: Predictions for all rows of the sets: set, row, label, prediction, probabilities.
        runs: One record for each training: seeds, steps, seconds, failures, scores.
        steps: Number of optimizer steps of the model.
        seconds: Seconds of training, over all runs, those of folds and of a distilled ensemble too, and all legs of
            resumed ones.
        history: Log of the trainings with run, step, name and value: loss, lr, grad_norm, scores on the select split
            (``eval_...``), passes.
        warnings: Faults of the model according to its scores, in sentences.
        probe: Every metric of a linear probe on frozen features, on the training rows by cross-validation; None without
            a probe.
    """

    output: Path
    model: FittedModel
    metrics: dict[str, dict[str, Any]]
    metric: str
    predictions: pd.DataFrame
    runs: list[dict[str, Any]]
    steps: int
    seconds: float
    history: pd.DataFrame
    warnings: list[str] = field(default_factory=list)
    probe: dict[str, float | None] | None = None

    def predict(self, rows: Any) -> np.ndarray:
        """Class names or numbers for texts, pairs of texts, or a table; see `FittedModel.predict`."""
        return self.model.predict(rows)

    def predict_proba(self, rows: Any) -> np.ndarray:
        """Probabilities (rows, classes); see `FittedModel.predict_proba`."""
        return self.model.predict_proba(rows)

    def evaluate(self, rows: Any) -> dict[str, Any]:
        """Scores on a table with labels; see `FittedModel.evaluate`."""
        return self.model.evaluate(rows)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model and tokenizer once more."""
        self.model.save_pretrained(folder)


def _record(plan: Plan, pretrained: Pretrained) -> dict[str, Any]:
    """Everything to repeat the fit, as JSON. Its entry `recipe` and the training rows decide the weights."""
    import torch
    import transformers

    own = {key: value for key, value in dataclasses.asdict(plan.options).items() if not key.endswith("seed")}
    del own["prompt"]  # below, as it stands before the texts
    del own["compact"]  # the result is the same: see the entry `vocabulary`
    own["pooling"] = pretrained.pooling
    own = {key: value for key, value in own.items() if key not in STOCK or STOCK[key] != value}
    prompts = {} if pretrained.sentence is None else dict(pretrained.sentence.prompts)
    return {
        "format": 1,
        "status": "training",
        "recipe": {
            "model": plan.model,
            "methods": [method_record(method) for method in plan.methods],
            **({} if plan.procedure is None else {"procedure": procedure_record(plan.procedure)}),
            **({"stages": [stage.record() for stage in plan.stages]} if plan.stages else {}),
            **({} if plan.data.unlabelled is None else {"unlabelled": _without_labels(plan.data.unlabelled)}),
            "kind": plan.data.problem.kind,
            "labels": list(plan.data.problem.names),
            "optimizer": "AdamW (bias-corrected, fused), linear warm-up and decay",
            **own,
            "steps": plan.steps,
            "max_length": pretrained.max_length,
            **({"prompt": pretrained.prompt} if pretrained.prompt else {}),
            "dropout": pretrained.dropout,
            "seeds": plan.options.seeds,
            "runs": plan.num_seeds,
            "combine": plan.combine,
            **({"distil": True} if plan.distil else {}),
            "refit": plan.folds if plan.refit else False,
            "metric": plan.metric,
        },
        **({"prompts": prompts} if prompts else {}),
        "data": plan.data.describe(),
        **({"predictors": [*map(dataclasses.asdict, plan.predictors)]} if plan.predictors else {}),
        **({"balanced": _weighed(plan.data.train[WEIGHT].to_numpy())} if WEIGHT in plan.data.train else {}),
        "versions": {
            "steadytune": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "files": [],
    }


def _without_labels(texts: Unlabelled) -> dict[str, Any]:
    """Where the texts without labels come from, and by what a resume knows them."""
    return {
        "sources": list(texts.origins),
        "rows": len(texts.rows),
        "sha256": fingerprint(texts.rows),
        "left_out": texts.left_out,
    }


def _weighed(weights: np.ndarray) -> dict[str, float]:
    """Number of rows, how many rows of equal weight they are worth, and the smallest and the largest weight."""
    return {
        "rows": len(weights),
        "effective": effective(weights),
        "least": float(weights.min()),
        "most": float(weights.max()),
    }


def _write(folder: Output, result: FitResult, record: dict[str, Any], sets: Mapping[str, pd.DataFrame]) -> None:
    """Write the model, the results, and last the record, which marks the run as finished."""
    from .peft_models import write_model
    from .pretrained import quiet

    models = result.model.models
    with writing(folder.path):
        with quiet():
            if len(models) == 1:
                files = folder.save_model(lambda part: write_model(models[0], part), result.model.tokenizer)
            else:  # no model at the top: it would load as one that was not scored
                for i, member in enumerate(models):
                    write_model(member, folder.path / MEMBERS / str(i))
                    result.model.tokenizer.save_pretrained(folder.path / MEMBERS / str(i))
                files = folder.save_model(lambda part: None, result.model.tokenizer)
        write_whole(folder.path / PREDICTIONS, storable(result.predictions).to_parquet)
        write_whole(folder.path / HISTORY, result.history.to_parquet)
        metrics = {
            "metric": result.metric,
            "steps": result.steps,
            "seconds": result.seconds,
            "warnings": result.warnings,
            **({} if result.probe is None else {"probe": {"rows": record["data"]["train"]["rows"], **result.probe}}),
            "sets": result.metrics,
        }
        write_json(folder.path / METRICS, metrics)
        card = model_card(record, result.metrics, result.metric)
        write_whole(folder.path / "README.md", lambda part: part.write_text(card, encoding="utf-8"))
        worst = mistakes(result.predictions, sets)
        if len(worst):
            write_whole(folder.path / MISTAKES, worst.to_parquet)
        write_page(folder.path, record)
        files += [PREDICTIONS, HISTORY, *([MISTAKES] if len(worst) else []), METRICS, "README.md", PAGE]
        write_json(folder.path / RECORD, {**record, "status": "finished", "files": files})
        shutil.rmtree(folder.checkpoints, ignore_errors=True)


def storable(predictions: pd.DataFrame) -> pd.DataFrame:
    """Convert tuples of labels to lists, because Parquet has no tuples."""
    several = [str(c) for c in predictions if predictions[c].map(lambda v: isinstance(v, tuple)).any()]
    return predictions.assign(**{c: predictions[c].map(list) for c in several})


def history_table(history: Mapping[str, Sequence[tuple[int, str, float]]]) -> pd.DataFrame:
    """Log of the trainings, one row for each run, step and name."""
    rows = [(run, *point) for run, points in history.items() for point in points]
    return pd.DataFrame(rows, columns=["run", "step", "name", "value"]).astype({"step": int, "value": float})


def upload(folder: Path, repository: str) -> None:
    """Upload a finished folder to the hub, without the files that show texts of the data.

    Raises:
        UsageError: The upload failed; the folder does not change.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository, ignore_patterns=PRIVATE)
    except Exception as error:  # network, names, rights: the hub's words say which
        raise UsageError(f"the model is in {folder}, but not uploaded to {repository!r}: {error}") from error
