"""From a table to a fine-tuned model: `fit`, its runs and how they are combined, and the folder it writes.

torch and transformers are imported inside the functions that use them, so that help and data errors appear at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.balance import SHOWN
from ..data.prepare import CROSS_VALIDATION
from ..data.scores import warnings
from ..errors import UsageError
from ..files.atomic import write_json
from .folder import RECORD, Output, same_run
from .plan import (
    Plan,
    answers,
    evaluate,
    fitted_model,
    fold_jobs,
    make_plan,
    make_setup,
    open_model,
    passes_of_stages,
    runs,
    selection_score,
    settled,
    tune_threshold,
)
from .randomness import as_found
from .record import FitResult, _record, _write, history_table, upload

if TYPE_CHECKING:
    import pandas as pd

    from .estimate import Estimate
    from .fit_trainer import FitTrainer, Trained
    from .fitted_model import FittedModel
    from .frozen_probe import FrozenProbe
    from .kernels import Kernels
    from .pretrained import Pretrained
    from .training import Job, Setup

logger = logging.getLogger("steadytune")


def _with_arguments_of_plan(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a function the signature of `make_plan`, the only place that lists the arguments."""
    own, planned = (inspect.signature(f).parameters for f in (function, make_plan))
    shown = {**planned, **{name: p for name, p in own.items() if p.kind is not p.VAR_KEYWORD}}
    ordered = sorted(shown.values(), key=lambda p: (p.kind, p.default is not p.empty))
    function.__signature__ = inspect.signature(function).replace(parameters=ordered)  # type: ignore[attr-defined]
    return function


@_with_arguments_of_plan
def fit(
    train: Any,
    *,
    output: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    **wanted: Any,
) -> FitResult:
    """Fine-tune a pre-trained model on a table of labelled text and evaluate it.

    By default the last weights of one run are kept, without selection. ``evaluations``, ``combine="best"`` and
    ``calibrate`` select on the validation rows, never on a test set. The model card marks scores on rows that selected.

    Args:
        train: A CSV, TSV, JSON-lines or Parquet file, a data frame, a `datasets.Dataset`, a data set of the hub
            (``"hub:owner/name"``), or a `Table`, which brings its own columns (see `tasks.load`).
        model: A Hugging Face model directory or hub name.
        output: A new or empty directory.
        text: One text column, or two for sentence pairs; found by name or content if not given.
        label: The label column, found likewise; or, for several labels a row, one column of 0 and 1 for each class.
        label_separator: What stands between several labels in one cell, as in ``"food|price"``. Without it a cell is
            one label, or a list of labels.
        group: Column of groups; rows of one group stay on one side of each split, and intervals of scores are as wide
            as groups differ, in test tables that have the column.
        subgroup: Column, or columns, whose values name the subgroup of each row, such as its source; the label column
            may be among them. ``"length"`` and ``"overlap"`` need no column: they are ranges of the number of words,
            and of the share of a pair's second text that is in the first. Every subgroup is scored on its own, and the
            methods `GroupWeights` and `EasyAdapt` read it.
        methods: Methods, or their names with options (``"dps_dense:keep=0.7"``). They run in list order.
        procedure: Several trainings instead of one: ``"mixup-blo:folds=5"``; ``"contrastive"``, which trains the
            encoder on pairs of the rows before its head; ``"self-training"``, which learns from texts without labels;
            or ``"dsee"``, LoRA on a model that is pruned; see `fitting.procedures`.
        aux: Another labelled table, or several, to train on first (STILTs), see `stages.Intermediate`. The fit starts
            from the weights of the last of them, with a head of its own.
        aux_steps: Number of optimizer steps on each of these tables; by default as many as a fit on it has. With
            ``meta``, the number of episodes; by default 100, or 10 for each table if that is more.
        meta: Learn from five or more of these tables what few steps on any of them start from, instead of training on
            one after the other: ``"reptile"``, ``"fomaml"`` or ``"imaml"``, with options, as in
            ``"imaml:strength=2"``; see `steadytune.fitting.stages.meta`.
        unlabelled: Texts without labels, for ``pretrain``, a procedure or a method: a file, frame or other source with
            the text columns of `train`; ``"blank"``, the rows of `train` whose label is empty; ``"rest"``, the rows
            that ``train_size`` leaves over, without their labels; or a list of these. Texts of test and validation sets
            stay out.
        unlabelled_size: Number of these texts to draw; all by default.
        pretrain: Training on the texts of the rows and on those without labels before the fit: ``"tapt"`` predicts
            masked words, ``"simcse"`` compares two readings of a text; with options, as in ``"tapt:steps=300"``. See
            `steadytune.fitting.stages.pretraining`.
        tests: Test tables by name, with the columns of `train`.
        validation: Validation table; without one, ``validation_share`` of the training rows is held out.
        validation_column: Column of `train` that names the split of each row, instead of a validation table.
        kind: Classification, multilabel or regression; decided from the labels by default.
        metric: Metric used for selection and reported first; by default the first of the kind.
        num_seeds: Number of runs. They start with the same head, and differ in row order, dropout and draws of the
            methods.
        combine: How to combine several runs: ``"soup"`` is the mean of their weights (Wortsman et al., ICML 2022, arXiv
            2203.05482), ``"best"`` the best run on the validation rows, ``"ensemble"`` the mean of their probabilities.
        distil: Whether to train one model on the answers of the ensemble to the training rows, and keep that model.
        probe: Whether to fit a linear probe on frozen features of the training rows, and report its scores too.
        refit: Whether to choose the number of steps by cross-validation, and then train on all rows. The reported score
            is that of the rows left out of each fold.
        folds: Number of folds of the cross-validation.
        resume: Whether to continue from the last checkpoint in `output`.
        overwrite: Whether to replace the run in `output`.
        save_steps: Number of steps between checkpoints. With evaluations, there is a checkpoint at each of them
            instead. 0 writes none and keeps the best weights in memory.
        progress: Whether to show bars.
        push_to_hub: Repository on the hub to which the finished folder is uploaded.
        **wanted: Further fields of `Options`, under their own names or those of transformers (lr or learning_rate):
            lr, batch_size, steps, epochs, max_length, dropout, bf16, tune_kernels, lora, peft, head, pooling,
            compact, class_weights, label_smoothing, focal, balance, evaluations, patience, calibrate,
            worst_subgroup, restarts, train_size, validation_share, seed ...

    Raises:
        UsageError: The arguments or the data are not right; it is raised before training starts.
        KeyboardInterrupt: After a checkpoint, on Ctrl-C or SIGTERM.

    Example:
        >>> fit("train.csv", text="review", label="stars", model="bert-base-uncased",
        ...     methods=["dps_dense:keep=0.7"], tests={"test": "test.csv"}, output="out")  # doctest: +SKIP
    """
    folder = Output(output)
    previous = folder.check(resume, overwrite)
    _check_apart(wanted["model"], folder)
    plan = make_plan(train, **wanted)
    with as_found():
        result = _run(plan, folder, previous)
    if push_to_hub is not None:
        upload(folder.path, push_to_hub)
    return result


@_with_arguments_of_plan
def dry_run(
    train: Any,
    *,
    output: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    push_to_hub: str | None = None,
    **wanted: Any,
) -> Estimate:
    """Estimate the steps, minutes, memory and files of `fit` with the same arguments, from three measured steps.

    Raises:
        UsageError: As `fit`.
    """
    from .estimate import estimate

    folder = Output(output)
    folder.check(resume, overwrite)
    _check_apart(wanted["model"], folder)
    plan = make_plan(train, **wanted)
    if not plan.steps:
        raise UsageError("a dry run measures steps, and steps is 0: leave --dry-run out.")
    passes = 1.0 if plan.procedure is None else plan.procedure.cost(plan)
    if passes is None:
        raise UsageError(
            "a dry run measures one training, and only records tell how long this procedure's take: leave --dry-run or "
            "the procedure out."
        )
    with as_found(), _refusals():
        plan, pretrained, _ = _opened(plan)
        return estimate(lambda checkpoints: make_setup(plan, pretrained, checkpoints), runs(plan), plan, passes)


# ---- running ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Turn the ValueError of a method that refuses a model or another method into a UsageError.

    Raises:
        UsageError: Instead of a ValueError.
    """
    try:
        yield
    except UsageError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error


def _check_apart(model: Any, folder: Output) -> None:
    """Refuse to replace the model that the fit starts from."""
    local = isinstance(model, (str, Path)) and Path(model).is_dir() and folder.path.is_dir()
    if local and Path(model).samefile(folder.path):
        raise UsageError(f"output {folder.path} is the model that training starts from: choose another --output DIR.")


def _run(plan: Plan, folder: Output, previous: dict[str, Any] | None) -> FitResult:
    """Load, train, evaluate and write; the data has been checked."""
    from .stages import after_stages

    plan, pretrained, kernels = _opened(plan, previous)
    record = {**_record(plan, pretrained), **({} if kernels is None else {"kernels": dataclasses.asdict(kernels)})}
    if previous is not None:
        same_run(previous, record, folder.path)
        plan = _as_begun(plan, previous)
    setup = make_setup(plan, pretrained, folder.checkpoints)
    jobs = fold_jobs(plan) if plan.refit else runs(plan)
    with folder.held():
        made = [_checked_trainer(plan, pretrained, setup, jobs[0], record)]  # empty where no model is to be in memory
        probe = None if plan.stages else _probe(plan, pretrained, made)
        folder.sweep()
        if previous is None:
            folder.clear()
            write_json(folder.path / RECORD, record)
        earlier = 0.0  # seconds of trainings that the result is not made of
        if plan.stages:
            made.clear()
            began = time.perf_counter()
            record["passes_before"] = round(passes_of_stages(plan, pretrained), 2)
            pretrained = after_stages(plan.stages, pretrained, folder.checkpoints)
            earlier = time.perf_counter() - began
            setup = make_setup(plan, pretrained, folder.checkpoints)
            made.append(_first_trainer(plan, setup, jobs[0]))
            probe = _probe(plan, pretrained, made)
        if plan.procedure is None:
            trained = [setup.train(job, made.pop() if made else None) for job in jobs]
        else:
            trained = [plan.procedure(setup, job, made) for job in jobs]
        history = {job.name: t.history for job, t in zip(jobs, trained, strict=True)}
        validated = None
        if plan.refit:
            earlier += sum(t.seconds for t in trained)
            stop_at = _best_step(trained, plan)
            validated = _cross_validated(plan, pretrained, setup, jobs, stop_at)
            jobs = runs(plan, stop_at)
            trained = [setup.train(job) for job in jobs]
            history |= {job.name: t.history for job, t in zip(jobs, trained, strict=True)}
        finished = [setup.in_units(t) for t in trained]
        if plan.distil:
            job = _distilling(plan, pretrained, finished)
            record["members"] = [t.record() for t in finished]
            finished = [setup.in_units(setup.train(job))]
            earlier += sum(t.seconds for t in trained)
            history[job.name] = finished[0].history
        return _finish(plan, pretrained, folder, record, finished, validated, history_table(history), probe, earlier)


def _checked_trainer(plan: Plan, pretrained: Pretrained, setup: Setup, job: Job, record: dict[str, Any]) -> FitTrainer:
    """The first Trainer, after all that can be refused before training; the record is told what was found."""
    from .rehearsal import rehearse
    from .scale import check_scale
    from .start import drawn, warn_of_start

    with _refusals():
        trainer = _first_trainer(plan, setup, job)
    features: Any = trainer.train_dataset
    _check_tokens(features, pretrained)
    if plan.options.calibrate:
        check_scale(trainer.model, features[0], "calibrate")
    if setup.problem.scaled:
        check_scale(trainer.model, features[0], "standardize")
    assert trainer.run is not None
    logger.info("%s", trainer.run.describe())
    _announce(plan)
    if plan.procedure is None or not plan.procedure.embeds:  # that trains what the head reads
        warn_of_start(trainer.model, pretrained, plan.options)
    logger.info("%s", trainer.vocabulary)
    record["vocabulary"] = trainer.vocabulary.record()
    record["compact"] = plan.options.compact  # of the stages too
    record["drawn"] = drawn(trainer.run, pretrained, plan.options)
    record["cut"] = rehearse(plan, pretrained, trainer.model, record)
    return trainer


def _probe(plan: Plan, pretrained: Pretrained, made: Sequence[FitTrainer]) -> FrozenProbe | None:
    """The linear probe on the model that training begins with, if it is wanted."""
    from .frozen_probe import frozen_probe

    return frozen_probe(plan, pretrained, made[0].model) if plan.probe and plan.steps else None


def _first_trainer(plan: Plan, setup: Setup, job: Job) -> FitTrainer:
    """Trainer of the first training, which a procedure may replace."""
    if plan.procedure is not None:
        setup, job = plan.procedure.first(setup, job), plan.procedure.job_of(job, 0)
    return setup.trainer(job, job.seeds, setup.folder / job.name)


def _as_begun(plan: Plan, previous: Mapping[str, Any]) -> Plan:
    """The plan of a run that is resumed, with compact vocabularies if it began with them."""
    compact = previous.get("compact", "trained_rows" in previous.get("vocabulary", {}))
    stages = tuple(stage.with_compact(compact) for stage in plan.stages)
    return dataclasses.replace(plan, options=dataclasses.replace(plan.options, compact=compact), stages=stages)


def _opened(plan: Plan, previous: Mapping[str, Any] | None = None) -> tuple[Plan, Pretrained, Kernels | None]:
    """The plan and the opened model, with kernels that are tuned if the options ask for it.

    Args:
        plan: Plan of the fit.
        previous: Record of the run that is resumed, which goes on with the kernels it began with.
    """
    pretrained = open_model(plan)
    plan = settled(plan, pretrained)
    if not plan.options.tune_kernels:
        return plan, pretrained, None
    from .kernels import Kernels, tuned

    held = (previous or {}).get("kernels")
    kernels = tuned(plan, pretrained) if held is None else Kernels(**held)
    return *kernels.applied(plan, pretrained), kernels


def _check_tokens(features: Any, pretrained: Pretrained) -> None:
    """Warn or raise if many tokens are unknown: a directory without tokenizer files gives a tokenizer without words."""
    from .encoding import unknown_share

    share = unknown_share(features, pretrained.tokenizer)
    message = (
        f"{share:.0%} of the tokens are unknown to the tokenizer of {pretrained.name!r}: its files are missing, or it "
        "was made for another language or alphabet. Give a model whose tokenizer knows the texts."
    )
    if share > 0.95:
        raise UsageError(message)
    if share > 0.2:
        logger.warning("%s", message)


def _best_step(tried: Sequence[Trained], plan: Plan) -> int:
    """Step with the best mean score over folds; of equals, the lower mean loss wins, then the later step."""
    metric = plan.data.problem.metric(plan.metric)
    steps = [step for step, _ in tried[0].curve]
    means = {step: float(np.mean([dict(t.curve)[step] for t in tried])) for step in steps}
    losses = {
        s: np.mean([v for t in tried for step, name, v in t.history if (step, name) == (s, "eval_loss")]) for s in steps
    }
    best = max(steps, key=lambda step: (metric.goodness(means[step]), -losses[step], step))
    logger.info("best of %d steps on %d folds: %d (%s %.4f)", plan.steps, plan.folds, best, plan.metric, means[best])
    return best


def _distilling(plan: Plan, pretrained: Pretrained, members: Sequence[Trained]) -> Job:
    """The training of one model on the answers of an ensemble to the training rows (Hinton et al., arXiv 1503.02531).

    Departure: no temperature, and no share of the gold labels, which the members have learned.
    """
    ensemble = fitted_model(plan, pretrained, [t.model for t in members])
    rows = plan.data.train
    scores = ensemble.scores_of_tokens(pretrained.tokenise(rows), plan.progress)
    taught = {"label": scores[:, 0]} if plan.data.problem.ordered else {"soft": scores.tolist()}
    return dataclasses.replace(runs(plan)[0], name="distilled", rows=rows.assign(**taught))


def _cross_validated(
    plan: Plan, pretrained: Pretrained, setup: Setup, jobs: Sequence[Job], step: int
) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Predictions and scores of all training rows, each by the fold that left it out, at a step."""
    import pandas as pd

    parts = [job.select for job in jobs if job.select is not None]
    outputs = np.concatenate([setup.outputs_at(job, step) for job in jobs])
    scores = setup.problem.activate(outputs)
    if setup.problem.scaled:
        scores = setup.problem.decide(scores)[:, None]
    rows = pd.concat(parts)
    order = np.argsort(plan.data.train.index.get_indexer(rows.index), kind="stable")  # as in the table
    model = fitted_model(plan, pretrained, [])
    data = dataclasses.replace(plan.data, tests={CROSS_VALIDATION: rows.iloc[order]})
    return evaluate(model, data, {CROSS_VALIDATION: scores[order]})


def _finish(
    plan: Plan,
    pretrained: Pretrained,
    folder: Output,
    record: dict[str, Any],
    trained: list[Trained],
    validated: tuple[pd.DataFrame, dict[str, dict[str, Any]]] | None,
    history: pd.DataFrame,
    probe: FrozenProbe | None,
    earlier: float,
) -> FitResult:
    """Combine, calibrate, evaluate and write."""
    import pandas as pd

    from .memory import peak_memory

    troubles = list(
        dict.fromkeys(trouble for t in trained for trouble in _troubles(t, plan.options.restarts))
    )  # runs may share them
    temperatures = [_calibrate(t.model, plan, pretrained) for t in trained] if plan.options.calibrate else []
    single = [fitted_model(plan, pretrained, [t.model]) for t in trained] if len(trained) > 1 else []
    each = [answers(model, pretrained, plan.data) for model in single]
    for model, answered in zip(single, each, strict=True):
        tune_threshold(model, plan, answered)
    scores = [evaluate(model, plan.data, answered)[1] for model, answered in zip(single, each, strict=True)]
    models, chosen = _combine(plan, trained, single, each)
    if plan.options.calibrate and chosen is None and len(models) == 1:  # a soup of calibrated models is not calibrated
        record["temperature"] = _calibrate(models[0], plan, pretrained)
    model = fitted_model(plan, pretrained, models)
    if each and chosen is not None:
        answered = each[chosen]
    elif len(models) > 1:
        answered = {name: np.mean([member[name] for member in each], axis=0) for name in plan.data.tests}
    else:
        answered = answers(model, pretrained, plan.data, plan.progress)
    tune_threshold(model, plan, answered)
    predictions, metrics = evaluate(model, plan.data, answered)
    details = [
        {**t.record(), **({"scores": s} if scores else {}), **({"temperature": k} if temperatures else {})}
        for t, s, k in zip(trained, scores or [{}], temperatures or [0.0] * len(trained), strict=True)
    ]
    if validated is not None:
        predictions, metrics = pd.concat([validated[0], predictions], ignore_index=True), validated[1] | metrics
    for name in metrics:
        given = predictions[predictions["set"] == name]
        selected = name == CROSS_VALIDATION or (name == "validation" and plan.selects)
        metrics[name] = model.account(given, plan.data.coarser.get(name), selected=selected)
        if probe is not None:
            metrics[name]["probe"] = probe.metrics(name, plan.data.problem, given["label"], plan.data.coarser.get(name))
        troubles += warnings(plan.data.problem, name, plan.metric, metrics[name], given)
    for name in scores[0] if scores else ():  # not the rows of a cross-validation, which the folds have scored
        metrics[name]["runs"] = spread([s[name] for s in scores])
    for trouble in troubles:
        logger.warning("%s", trouble, extra={"of_result": True})
    steps = trained[chosen or 0].steps
    result = FitResult(
        folder.path, model, metrics, plan.metric, predictions, details, steps,
        earlier + sum(t.seconds for t in trained), history, troubles, None if probe is None else probe.crossed,
    )  # fmt: skip
    columns = {"text": list(model.text), **model.form.record()}
    if model.subgroup:
        columns["subgroup"] = list(model.subgroup)
    if model.group is not None:
        columns["group"] = model.group
    assert model.constant is not None
    record = {
        **record,
        "columns": columns,
        "runs": details,
        "chosen": chosen,
        "constant": model.constant.tolist(),
        "threshold": model.problem.threshold,
        "warnings": troubles,
        "device": str(model.models[0].device),
        "peak_memory": peak_memory(),
    }
    _write(folder, result, record, plan.data.tests)
    return result


def _troubles(trained: Trained, restarts: int) -> Iterator[str]:
    """Faults of a training, in sentences; another seed was tried already where restarts were allowed."""
    remedy = "try another learning rate or more steps" if restarts else "try --restarts 2, another lr or more steps"
    if trained.failing:
        yield f"the training loss never fell below 90 % of that of guessing: {remedy}"
    if trained.hopeless:
        yield f"the model {trained.hopeless}: {remedy}"
    yield from trained.notes


def _calibrate(model: Any, plan: Plan, pretrained: Pretrained) -> float:
    """Fit a temperature on the validation rows, and put it into the model."""
    from .outputs import logits
    from .scale import rescale, temperature

    assert plan.select is not None
    features = pretrained.tokenise(plan.select)
    outputs = logits(model, pretrained.tokenizer, features, plan.options.bf16)
    labels = plan.data.problem.ids(plan.select["label"].tolist())
    degree = temperature(outputs, labels)
    rescale(model, 1 / degree, 0.0, "calibrate")
    logger.info("calibrated on %d validation rows: temperature %.3f", len(labels), degree)
    return degree


def _combine(
    plan: Plan, trained: list[Trained], single: Sequence[FittedModel], each: Sequence[Mapping[str, np.ndarray]]
) -> tuple[list[Any], int | None]:
    """The models whose predictions are averaged, and the number of the run chosen, if one was."""
    from ..merge import souped

    models = [t.model for t in trained]
    if len(models) == 1:
        return models, 0
    if plan.combine == "ensemble":
        return models, None
    if plan.combine == "soup":
        return [souped(models)], None
    goodness = plan.data.problem.metric(plan.metric).goodness
    scores = (selection_score(plan, model, answered) for model, answered in zip(single, each, strict=True))
    chosen = int(np.argmax([*map(goodness, scores)]))
    logger.info("run %d is the best of %d on the validation rows", chosen, len(models))
    return [models[chosen]], chosen


def spread(scores: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Mean and standard deviation (n - 1) of each metric over runs; metrics undefined in a run are left out."""
    names = [name for name in scores[0] if name != "rows" and all(s[name] is not None for s in scores)]
    values = {name: np.array([s[name] for s in scores]) for name in names}
    return {name: {"mean": float(v.mean()), "sd": float(v.std(ddof=1)), "n": len(v)} for name, v in values.items()}


# ---- records ----------------------------------------------------------------------------------------------------


def _announce(plan: Plan) -> None:
    """Log the plan, and what predicts a label by itself."""
    named = plan.predictors
    for predictor in named[:SHOWN]:
        logger.info("%s", predictor)
    if named:
        logger.info("where that is no part of the task, test on rows without it, or balance it (--balance)")
    data, rows_per_step = plan.data, plan.options.batch_size * plan.options.accumulation
    sizes = ", ".join(f"{name} {len(rows)}" for name, rows in data.tests.items()) or "no test set"
    logger.info("%s, %d training rows (%s)", data.problem.kind, len(data.train), sizes)
    epochs = plan.steps * rows_per_step / len(data.train)
    words = f"{plan.steps} steps of {rows_per_step} rows ({epochs:.1f} epochs)"
    if plan.procedure is not None:
        words = plan.procedure.words(plan) or words
    times = f", {plan.num_seeds} runs" if plan.num_seeds > 1 else ""
    times += f" after {plan.folds} folds" if plan.refit else ""
    logger.info("%s%s", words, times)
