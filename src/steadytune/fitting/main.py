"""From a table to a fine-tuned model: `fit`, its runs and how they are combined, and the folder it writes.

torch and transformers are imported inside the functions that use them: command-line help and data errors come at once.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from .. import __version__
from ..data.guards import inspect, raise_errors, truncated
from ..data.metrics import METRICS, SMALLER_IS_BETTER
from ..data.prepare import Data, prepare
from ..data.splits import folds
from ..data.tables import Kind, Table, Target
from ..errors import UsageError, suggest
from ..files.atomic import write_json, write_whole, writing
from .card import model_card
from .folder import MEMBERS, RECORD, Output, same_run
from .recipe import Recipe
from .spelling import make_methods, make_procedure, method_record, procedure_record

if TYPE_CHECKING:
    from ..core import Method
    from .estimate import Estimate
    from .fit_trainer import Trained
    from .fitted_model import FittedModel
    from .procedures import MixupBLO as Procedure
    from .source import Source
    from .training import Job, Setup

logger = logging.getLogger("steadytune")

Combine = Literal["best", "soup", "ensemble"]
COMBINE = ("best", "soup", "ensemble")
REFIT_EVALUATIONS = 10  # moments of a fold at which training may end


@dataclass(frozen=True, eq=False)
class Plan:
    """What `fit` was asked for, checked and resolved."""

    model: str
    methods: list[Method]
    recipe: Recipe
    data: Data
    steps: int
    metric: str
    seeds: int
    combine: Combine
    refit: bool
    folds: int
    save_steps: int
    progress: bool
    procedure: Procedure | None = None

    @property
    def select(self) -> pd.DataFrame | None:
        """The rows on which runs and moments are chosen: never trained on, and no test set."""
        return self.data.tests.get("validation")


@dataclass(frozen=True, eq=False)
class FitResult:
    """What `fit` leaves behind.

    Attributes:
        output: a plain Hugging Face model directory, with README.md (model card), `metrics.json`,
            `predictions.parquet`, `steadytune.json`; adapters that cannot be merged are there alone.
        model: the fitted model; `predict`, `evaluate` and `save_pretrained` are its own.
        metrics: set -> metric -> value, of the model; with several runs also each metric's mean and spread over them.
        metric: the one to look at first.
        predictions: a row for every row of the sets: set, row, label, prediction, probabilities.
        runs: one record per training: seeds, steps, seconds, failures, scores.
        steps: optimizer steps behind the model.
        seconds: of training alone, all runs (since the last resume).
    """

    output: Path
    model: FittedModel
    metrics: dict[str, dict[str, Any]]
    metric: str
    predictions: pd.DataFrame
    runs: list[dict[str, Any]]
    steps: int
    seconds: float

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


def fit(
    train: Any,
    *,
    model: str | Path,
    output: str | Path,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    group: str | None = None,
    methods: str | Method | Sequence[str | Method] = (),
    procedure: str | Procedure | None = None,
    tests: Mapping[str, Any] | None = None,
    validation: Any = None,
    validation_column: str | None = None,
    kind: Kind = "auto",
    metric: str | None = None,
    seeds: int = 1,
    combine: Combine = "best",
    refit: bool = False,
    folds: int = 5,
    resume: bool = False,
    overwrite: bool = False,
    save_steps: int = 200,
    progress: bool = True,
    push_to_hub: str | None = None,
    **options: Any,
) -> FitResult:
    """Fine-tune a pre-trained model on a table of labelled text and evaluate it.

    By default the last weights of one run are kept: nothing is selected. ``evaluations``, ``seeds`` and ``calibrate``
    select on the validation rows, never on a test set; scores on rows that selected are marked in the model card.

    Args:
        train: a CSV, TSV, JSON-lines or Parquet file, a data frame, a `datasets.Dataset`, a data set of the hub
            (``"hub:owner/name"``), or a `Table`, which brings its own columns (see `tasks.load`).
        model: a Hugging Face model directory or hub name.
        output: a new or empty directory.
        text: one text column, or two for sentence pairs; found by name or content if not given.
        label: the label column; found likewise.
        group: a column whose equal values keep rows on one side of every split.
        methods: methods, or their names with options (``"dps_dense:keep=0.7"``), in order of action.
        procedure: several trainings in place of one: ``"mixup-blo:folds=5"``, see `steadytune.procedures`.
        tests: name -> table; columns as in `train`.
        validation: a table; without one ``validation_share`` of the training rows is held out.
        validation_column: instead, a column of `train` that names each row's split.
        kind: classification, multilabel or regression; decided from the labels by default.
        metric: the metric that selects and is reported first; by default the first of the kind.
        seeds: runs with the same head and other orders, dropout and draws of methods.
        combine: of several runs the ``"best"`` on the validation rows, a ``"soup"`` (the mean of their weights;
            Wortsman et al., ICML 2022, arXiv 2203.05482) or an ``"ensemble"`` (the mean of their probabilities).
        refit: choose the number of steps by cross-validation, then train on all rows.
        folds: of the cross-validation.
        resume: go on from the last checkpoint in `output`.
        overwrite: replace the run in `output`.
        save_steps: steps between checkpoints; with evaluations there is one at each of them instead. 0 writes none, and
            the best weights are kept in memory.
        progress: show bars.
        push_to_hub: a repository to upload the finished folder to.
        **options: fields of `Recipe`: lr, batch_size, steps, epochs, max_length, dropout, bf16, lora, peft,
            class_weights, evaluations, patience, calibrate, restarts, train_size, validation_share, seed ...

    Raises:
        UsageError: what was asked for cannot be done; raised before training starts.
        KeyboardInterrupt: after a checkpoint, on Ctrl-C or SIGTERM.

    Example:
        >>> fit("train.csv", text="review", label="stars", model="bert-base-uncased",
        ...     methods=["dps_dense:keep=0.7"], tests={"test": "test.csv"}, output="out")  # doctest: +SKIP
    """
    folder = Output(output)
    previous = folder.check(resume, overwrite)
    plan = make_plan(
        train, model=model, text=text, label=label, group=group, methods=methods, procedure=procedure, tests=tests,
        validation=validation, validation_column=validation_column, kind=kind, metric=metric, seeds=seeds,
        combine=combine, refit=refit, folds=folds, save_steps=save_steps, progress=progress, **options,
    )  # fmt: skip
    result = _run(plan, folder, previous)
    if push_to_hub is not None:
        upload(folder.path, push_to_hub)
    return result


def dry_run(train: Any, *, output: str | Path, **options: Any) -> Estimate:
    """What `fit` with the same arguments would take: steps, minutes (from three measured steps), memory, files.

    Raises:
        UsageError: as `fit`.
    """
    from .estimate import estimate

    folder = Output(output)
    folder.check(options.pop("resume", False), options.pop("overwrite", False))
    options.pop("push_to_hub", None)
    plan = make_plan(train, **options)
    if plan.procedure is not None:
        raise UsageError("a dry run measures one training, a procedure is several: leave --dry-run or it out.")
    source = open_model(plan)
    return estimate(lambda checkpoints: setup(plan, source, checkpoints), runs(plan), plan)


def make_plan(
    train: Any,
    *,
    model: str | Path,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    group: str | None = None,
    methods: str | Method | Sequence[str | Method] = (),
    procedure: str | Procedure | None = None,
    tests: Mapping[str, Any] | None = None,
    validation: Any = None,
    validation_column: str | None = None,
    kind: Kind = "auto",
    metric: str | None = None,
    seeds: int = 1,
    combine: Combine = "best",
    refit: bool = False,
    folds: int = 5,
    save_steps: int = 200,
    progress: bool = True,
    **options: Any,
) -> Plan:
    """Check options and data; arguments as of `fit`.

    Raises:
        UsageError: what was asked for cannot be done.
    """
    recipe = Recipe.of(options)
    if refit and not recipe.evaluations:
        recipe = dataclasses.replace(recipe, evaluations=REFIT_EVALUATIONS)
    _check(seeds, combine, refit, folds, save_steps, recipe)
    chosen = make_methods(methods)
    _check_columns(chosen)
    drawing = [type(m).__name__ for m in chosen if m.draws_weights]
    if combine == "soup" and seeds > 1 and drawing:
        raise UsageError(
            f"a soup is the mean of models that began alike, and {drawing[0]} draws other weights in every run: "
            "choose combine best or ensemble."
        )
    columns = (text,) if isinstance(text, str) else None if text is None else tuple(text)
    table = Table.of(train, columns, label, "train", kind, group)
    data = prepare(
        table,
        {name: Table.of(t, columns, label, name) for name, t in (tests or {}).items()},
        None if validation is None else Table.of(validation, columns, label, "validation"),
        train_size=recipe.train_size,
        validation_share=0.0 if refit else recipe.validation_share,
        validation_column=validation_column,
        seed=recipe.seeds["subset"],
    )
    for finding in raise_errors(inspect(data, standardize=recipe.standardize)):
        logger.warning("%s", finding.message)
    plan = Plan(
        str(model), chosen, recipe, data, recipe.total_steps(len(data.train)),
        headline(metric, data.target), seeds, combine, refit, folds, save_steps, progress, make_procedure(procedure),
    )  # fmt: skip
    _check_selection(plan)
    return plan


def _check(seeds: int, combine: str, refit: bool, folds: int, save_steps: int, recipe: Recipe) -> None:
    if save_steps < 0:
        raise UsageError(f"save_steps must be 0 (no checkpoints) or more, got {save_steps}.")
    if seeds < 1:
        raise UsageError(f"seeds must be 1 or more, got {seeds}.")
    if combine not in COMBINE:
        raise UsageError(f"unknown combine {combine!r}.{suggest(combine, COMBINE)}")
    if refit and folds < 2:
        raise UsageError(f"folds must be 2 or more, got {folds}.")
    if refit and (recipe.calibrate or recipe.patience is not None):
        what = "calibrate" if recipe.calibrate else "patience"
        raise UsageError(f"refit trains on all rows, {what} needs validation rows: leave one of them out.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("fit runs in one process: start it without torchrun, or use steadytune.Trainer.")


def _check_columns(methods: Sequence[Method]) -> None:
    """Batches of `fit` hold tokens and labels."""
    for method in methods:
        if method.input_columns:
            raise UsageError(
                f"{type(method).__name__} reads the column {method.input_columns[0]!r} of each batch, fit passes on "
                "text and labels only: use steadytune.Trainer, or leave it out."
            )


def _check_selection(plan: Plan) -> None:
    """What selects needs rows to select on."""
    if plan.refit and plan.procedure is not None:
        raise UsageError("refit cuts the rows for one kind of training, a procedure is several: leave one of them out.")
    if plan.refit and plan.select is not None:
        raise UsageError("refit chooses the number of steps by cross-validation: leave the validation rows out.")
    if plan.select is None:
        asked = {
            "evaluations": bool(plan.recipe.evaluations) and not plan.refit,
            "calibrate": plan.recipe.calibrate,
            "combine='best'": plan.seeds > 1 and plan.combine == "best",
        }
        for name in (name for name, wanted in asked.items() if wanted):
            raise UsageError(f"{name} needs validation rows: give a validation table or share, or leave it out.")
    if plan.recipe.calibrate and plan.data.target.kind != "classification":
        raise UsageError(f"calibrate is for classification, this is {plan.data.target.kind}: leave it out.")
    if plan.recipe.class_weights != "none" and not plan.data.target.names:
        raise UsageError("class_weights are for classification, this is regression: leave them out.")


def headline(metric: str | None, target: Target) -> str:
    """The metric asked for, or the first of the kind.

    Raises:
        UsageError: unknown, or not for so many classes.
    """
    known = METRICS[target.kind]
    if metric is not None and metric not in known:
        raise UsageError(f"unknown metric {metric!r} for {target.kind}.{suggest(metric, known)}")
    if metric == "f1" and len(target.names) != 2:
        raise UsageError(f"f1 is for two classes, here are {len(target.names)}: choose f1_macro.")
    return metric or next(iter(known))


# ---- running ----------------------------------------------------------------------------------------------------


def open_model(plan: Plan) -> Source:
    """Config and tokenizer of the model, before its weights."""
    from .source import Source

    return Source.open(plan.model, plan.data.target, dropout=plan.recipe.dropout, max_length=plan.recipe.max_length)


def setup(plan: Plan, source: Source, checkpoints: Path) -> Setup:
    """What all trainings share."""
    from .scale import standardised
    from .training import Setup

    target = plan.data.target
    if target.kind == "regression" and plan.recipe.standardize:
        target = standardised(target, plan.data.train["label"].tolist(), centred=source.bias)
    return Setup(
        source, plan.methods, plan.recipe, target, plan.steps, plan.metric, checkpoints, plan.save_steps,
        plan.progress, keep=plan.seeds > 1 or plan.refit,
    )  # fmt: skip


def runs(plan: Plan, stop_at: int | None = None) -> list[Job]:
    """The trainings whose models are combined: same head, other orders, dropout and draws."""
    from .training import Job

    def seeds(i: int) -> dict[str, int]:
        same = ("init", "subset")
        return {name: value if name in same else value + i for name, value in plan.recipe.seeds.items()}

    names = [f"run-{i}" if plan.seeds > 1 else "training" for i in range(plan.seeds)]
    return [Job(name, plan.data.train, plan.select, seeds(i), stop_at) for i, name in enumerate(names)]


def _run(plan: Plan, folder: Output, previous: dict[str, Any] | None) -> FitResult:
    """Load, train, evaluate, write; everything about the data has been checked."""
    from .peft_models import check_adapted
    from .scale import check_scale

    source = open_model(plan)
    record = _record(plan, source)
    if previous is not None:
        same_run(previous, record, folder.path)
    place = setup(plan, source, folder.checkpoints)
    jobs = fold_jobs(plan) if plan.refit else runs(plan)
    with folder.held():
        try:
            first = place if plan.procedure is None else plan.procedure.first(place, jobs[0])
            trainer = first.trainer(jobs[0], jobs[0].seeds, folder.checkpoints / jobs[0].name)
        except ValueError as error:  # a method that cannot act on this model, or two that exclude each other
            raise UsageError(str(error)) from error
        features: Any = trainer.train_dataset
        _check_tokens(features, source)
        if plan.recipe.calibrate:
            check_scale(trainer.model, features[0], "calibrate")
        if place.target.scaled:
            check_scale(trainer.model, features[0], "standardize")
        if plan.recipe.peft is not None:
            check_adapted(trainer.model, plan.recipe.peft, features, source.tokenizer)
        assert trainer.run is not None
        logger.info("%s", trainer.run.describe())
        _announce(plan, source, features)
        folder.sweep()
        if previous is None:
            folder.clear()
            write_json(folder.path / RECORD, record)
        if plan.procedure is None:
            trained = [place.train(job, None if i else trainer) for i, job in enumerate(jobs)]
        else:
            trained = [plan.procedure(place, job) for job in jobs]
        if plan.refit:
            stop_at = _best_step(trained, plan)
            trained = [place.train(job) for job in runs(plan, stop_at)]
        return _finish(plan, source, folder, record, [place.in_units(t) for t in trained])


def _check_tokens(features: Any, source: Source) -> None:
    """A directory without tokenizer files gives a tokenizer without words."""
    from .encoding import unknown_share

    share = unknown_share(features, source.tokenizer)
    message = (
        f"{share:.0%} of the tokens are unknown to the tokenizer of {source.name!r}: its files are missing, or it was "
        "made for another language or alphabet. Give a model whose tokenizer knows the texts."
    )
    if share > 0.95:
        raise UsageError(message)
    if share > 0.2:
        logger.warning("%s", message)


def fold_jobs(plan: Plan) -> list[Job]:
    """One training per fold, scored on the rows it left out."""
    from .training import Job

    rows = plan.data.train
    parts = folds(rows, plan.data.target, plan.folds, plan.recipe.seeds["subset"])
    return [
        Job(f"fold-{i}", rows.iloc[inside], rows.iloc[outside], plan.recipe.seeds)
        for i, (inside, outside) in enumerate(parts)
    ]


def _best_step(tried: Sequence[Trained], plan: Plan) -> int:
    """The step with the best mean score over folds; the earliest of equals."""
    sign = -1 if plan.metric in SMALLER_IS_BETTER else 1
    means = {step: np.mean([dict(t.curve)[step] for t in tried]) for step, _ in tried[0].curve}
    best = max(means, key=lambda step: (sign * means[step], -step))
    logger.info("best of %d steps on %d folds: %d (%s %.4f)", plan.steps, plan.folds, best, plan.metric, means[best])
    return best


def _finish(plan: Plan, source: Source, folder: Output, record: dict[str, Any], trained: list[Trained]) -> FitResult:
    """Combine, calibrate, evaluate, write."""
    for t in trained:
        if t.failing:
            logger.warning("the training loss never fell below 0.9 log K: try --restarts 2, another lr or more steps")
    temperatures = [_calibrate(t, plan, source) for t in trained] if plan.recipe.calibrate else []
    single = [fitted_model(plan, source, [t.model]) for t in trained] if len(trained) > 1 else []
    scores = [evaluate(model, plan.data)[1] for model in single]
    models, chosen = _combine(plan, trained, scores)
    model = fitted_model(plan, source, models)
    predictions, metrics = evaluate(model, plan.data, plan.progress)
    details = [
        {**t.record(), **({"scores": s} if scores else {}), **({"temperature": k} if temperatures else {})}
        for t, s, k in zip(trained, scores or [{}], temperatures or [0.0] * len(trained), strict=True)
    ]
    for name in metrics if scores else ():
        metrics[name]["runs"] = spread([s[name] for s in scores])
    steps = trained[chosen or 0].steps
    result = FitResult(
        folder.path, model, metrics, plan.metric, predictions, details, steps, sum(t.seconds for t in trained)
    )
    columns = {"text": list(model.text), "label": model.label}
    record = {**record, "columns": columns, "runs": details, "chosen": chosen, "device": str(model.models[0].device)}
    _write(folder, result, record)
    return result


def fitted_model(plan: Plan, source: Source, models: Sequence[Any]) -> FittedModel:
    """Trained models as one that reads tables like the training table."""
    from .fitted_model import FittedModel

    table = plan.data.table
    assert table is not None
    return FittedModel(
        models,
        source.tokenizer,
        plan.data.target,
        text=table.text or (),
        label=table.label or "",  # found, if they were not given
        max_length=source.max_length,
        bf16=plan.recipe.bf16,
    )


def _calibrate(trained: Trained, plan: Plan, source: Source) -> float:
    """Fit a temperature on the validation rows and take it into the model."""
    from . import source as modelling
    from .fitted_model import logits

    assert plan.select is not None
    features = modelling.tokenise(plan.select, source.tokenizer, source.max_length)
    outputs = logits(trained.model, source.tokenizer, features, plan.recipe.bf16)
    labels = modelling.label_ids(plan.select["label"].tolist(), plan.data.target)
    found = modelling.temperature(outputs, labels)
    modelling.rescale(trained.model, 1 / found, 0.0, "calibrate")
    logger.info("calibrated on %d validation rows: temperature %.3f", len(labels), found)
    return found


def evaluate(model: FittedModel, data: Data, progress: bool = False) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Predictions of all sets, one under the other, and the scores of each."""
    tables, scores = [], {}
    for name, rows in data.tests.items():
        found, scores[name] = model.judge(rows, data.merges.get(name), progress=progress)
        about = pd.DataFrame({"set": name, "row": rows.index, "label": rows["label"].to_numpy()})
        tables.append(pd.concat([about, found], axis=1))
    return (pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()), scores


def _combine(
    plan: Plan, trained: list[Trained], scores: list[dict[str, dict[str, Any]]]
) -> tuple[list[Any], int | None]:
    """The models whose predictions are averaged, and the number of the run chosen, if one was."""
    from ..merge import uniform

    models = [t.model for t in trained]
    if len(models) == 1:
        return models, 0
    if plan.combine == "ensemble":
        return models, None
    if plan.combine == "soup":
        models[0].load_state_dict(uniform([m.state_dict() for m in models]))
        return models[:1], None
    sign = -1 if plan.metric in SMALLER_IS_BETTER else 1
    found = [s["validation"][plan.metric] for s in scores]
    chosen = int(np.argmax([-np.inf if value is None else sign * value for value in found]))
    logger.info("run %d is the best of %d on the validation rows", chosen, len(models))
    return [models[chosen]], chosen


def spread(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (n - 1) of each metric over runs; metrics undefined in a run are left out."""
    names = [name for name in scores[0] if name != "rows" and all(s[name] is not None for s in scores)]
    values = {name: np.array([s[name] for s in scores]) for name in names}
    return {name: {"mean": float(v.mean()), "sd": float(v.std(ddof=1)), "n": len(v)} for name, v in values.items()}


# ---- records ----------------------------------------------------------------------------------------------------


def _record(plan: Plan, source: Source) -> dict[str, Any]:
    """All that is needed to run it again, as JSON; `recipe` decides the weights, together with the training rows."""
    import torch
    import transformers

    own = {key: value for key, value in dataclasses.asdict(plan.recipe).items() if not key.endswith("seed")}
    return {
        "format": 1,
        "status": "training",
        "recipe": {
            "model": plan.model,
            "methods": [method_record(method) for method in plan.methods],
            **({} if plan.procedure is None else {"procedure": procedure_record(plan.procedure)}),
            "kind": plan.data.target.kind,
            "labels": list(plan.data.target.names),
            "optimizer": "AdamW (bias-corrected, fused), linear warm-up and decay",
            **own,
            "steps": plan.steps,
            "max_length": source.max_length,
            "dropout": source.dropout,
            "seeds": plan.recipe.seeds,
            "runs": plan.seeds,
            "combine": plan.combine,
            "refit": plan.folds if plan.refit else False,
            "metric": plan.metric,
        },
        "data": plan.data.describe(),
        "versions": {
            "steadytune": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "files": [],
    }


def _write(folder: Output, result: FitResult, record: dict[str, Any]) -> None:
    """The model, the results, and last of all the record that calls the run finished."""
    from .peft_models import write_model
    from .source import quiet

    models = result.model.models
    with writing(folder.path):
        with quiet():
            files = folder.save_model(lambda part: write_model(models[0], part), result.model.tokenizer)
            for i, member in enumerate(models if len(models) > 1 else ()):
                write_model(member, folder.path / MEMBERS / str(i))
        write_whole(folder.path / "predictions.parquet", storable(result.predictions).to_parquet)
        metrics = {"metric": result.metric, "steps": result.steps, "seconds": result.seconds, "sets": result.metrics}
        write_json(folder.path / "metrics.json", metrics)
        card = model_card(record, result.metrics, result.metric)
        write_whole(folder.path / "README.md", lambda part: part.write_text(card, encoding="utf-8"))
        files += ["predictions.parquet", "metrics.json", "README.md"]
        write_json(folder.path / RECORD, {**record, "status": "finished", "files": files})
        shutil.rmtree(folder.checkpoints, ignore_errors=True)


def storable(predictions: pd.DataFrame) -> pd.DataFrame:
    """Tuples of labels as lists: Parquet has no tuples."""
    several = [str(c) for c in predictions if predictions[c].map(lambda v: isinstance(v, tuple)).any()]
    return predictions.assign(**{c: predictions[c].map(list) for c in several})


def upload(folder: Path, repository: str) -> None:
    """Upload a finished folder to the hub.

    Raises:
        UsageError: it cannot; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        api.create_repo(repository, exist_ok=True)
        api.upload_folder(folder_path=folder, repo_id=repository)
    except Exception as error:  # network, names, rights: the hub's words say which
        raise UsageError(f"the model is in {folder}, but not uploaded to {repository!r}: {error}") from error


def _announce(plan: Plan, source: Source, features: Any) -> None:
    """Say what is about to happen, and what in the data may surprise."""
    from .encoding import token_counts

    data, rows_per_step = plan.data, plan.recipe.batch_size * plan.recipe.accumulation
    sizes = ", ".join(f"{name} {len(rows)}" for name, rows in data.tests.items()) or "no test set"
    logger.info("%s, %d training rows (%s)", data.target.kind, len(data.train), sizes)
    epochs = plan.steps * rows_per_step / len(data.train)
    times = f", {plan.seeds} runs" if plan.seeds > 1 else ""
    times += f" after {plan.folds} folds" if plan.refit else ""
    logger.info("%d steps of %d rows (%.1f epochs)%s", plan.steps, rows_per_step, epochs, times)
    counts = token_counts(data.train, features, source)
    cut = truncated(counts, source.max_length, "the training rows", list(data.train.index))
    if cut:
        logger.warning("%s", cut.message)
