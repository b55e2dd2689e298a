"""From a table to a fine-tuned model: `fit`, its options, and the folder it writes.

torch and transformers are imported inside the functions that use them: command-line help and data errors come at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import platform
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from . import __version__
from .data import Data, Kind, Table, Target, UsageError, one_line, prepare, suggest
from .output import RECORD, Output, same_run
from .recipe import MAX_STEPS, Recipe, make_methods, method_record
from .tasks import METRICS, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from .core import Method
    from .trainer import Trainer

logger = logging.getLogger("steadytune")

MAX_LENGTH = 128


# ---- model and tokens -------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet(warnings: bool = False) -> Iterator[None]:
    """Silence transformers' own bars and tables for a while; what matters in them is said in our words."""
    from transformers.utils import logging as hub_logging

    level, bars = hub_logging.get_verbosity(), hub_logging.is_progress_bar_enabled()
    hub_logging.disable_progress_bar()
    if not warnings:
        hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        hub_logging.set_verbosity(level)
        if bars:
            hub_logging.enable_progress_bar()


def load(name: str, target: Target, recipe: Recipe) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, dict[str, Any]]:
    """Model in float32 with a head for the target, its tokenizer, and the dropout settings in force.

    Whatever the checkpoint's precision, the weights that AdamW moves are float32: at 2e-5 bfloat16 rounds most
    updates to nothing.
    """
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, set_seed

    if name.startswith((".", "/", "~")) and not Path(name).is_dir():
        raise UsageError(f"model {name!r}: no such directory.")
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise UsageError(f"model {name!r} is a directory without config.json: give a Hugging Face model directory.")
    head: dict[str, Any] = {"num_labels": 1, "problem_type": "regression"}
    if target.names:
        head = {
            "id2label": dict(enumerate(target.names)),
            "label2id": {label: number for number, label in enumerate(target.names)},
            "problem_type": "single_label_classification",
        }
    try:
        with _quiet():
            config = AutoConfig.from_pretrained(name, **head)
            tokenizer = AutoTokenizer.from_pretrained(name)
            dropout = set_dropout(config, recipe.dropout)
            _set_pad(config, tokenizer, name)
            set_seed(recipe.seeds["init"])
            model, info = AutoModelForSequenceClassification.from_pretrained(
                name, config=config, dtype=torch.float32, ignore_mismatched_sizes=True, output_loading_info=True
            )
    except UsageError:
        raise
    except (OSError, ValueError) as error:
        raise UsageError(f"model {name!r} cannot be loaded as a text classifier: {one_line(error)}") from error
    new = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if new:
        logger.info("new weights, drawn with seed %d: %s", recipe.seeds["init"], ", ".join(new))
    return model, tokenizer, dropout


def set_dropout(config: Any, probability: float | None) -> dict[str, float]:
    """Set every dropout probability of a config and return them; None only reads."""
    names = [
        name
        for name, value in config.to_dict().items()
        if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, (int, float))
        and not isinstance(value, bool)
    ]  # fmt: skip
    if probability is not None:
        if not names:
            raise UsageError(f"dropout {probability}: the config of this {config.model_type} model has no dropout.")
        for name in names:
            setattr(config, name, float(probability))
    return {name: float(getattr(config, name)) for name in names}


def _set_pad(config: Any, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Give decoders a padding token: without one they classify single rows only."""
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise UsageError(f"model {name!r}: its tokenizer has neither a padding nor an end token: set pad_token.")
        tokenizer.pad_token = tokenizer.eos_token
        logger.info("no padding token: padding with the end token %r", tokenizer.eos_token)
    if getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def token_limit(wanted: int | None, config: Any, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens per row: what was asked for, else 128, never more than the model has positions for."""
    limit = min(tokenizer.model_max_length, getattr(config, "max_position_embeddings", None) or math.inf)
    if wanted is not None and wanted > limit:
        raise UsageError(f"max_length must be at most {int(limit)}, the model's limit, got {wanted}.")
    return int(min(wanted or MAX_LENGTH, limit))


def tokenise(rows: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[dict[str, Any]]:
    """One feature dictionary per row, unpadded."""
    pairs = rows["text_pair"].tolist() if "text_pair" in rows else None
    encoded = tokenizer(rows["text"].tolist(), pairs, truncation=True, max_length=max_length)
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def _labelled(features: list[dict[str, Any]], rows: pd.DataFrame, target: Target) -> list[dict[str, Any]]:
    ids = {name: number for number, name in enumerate(target.names)}
    return [
        {**feature, "labels": ids[label] if ids else float(label)}
        for feature, label in zip(features, rows["label"], strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Plan:
    """What `fit` was asked for, checked and resolved."""

    model: str
    methods: list[Method]
    recipe: Recipe
    data: Data
    steps: int
    metric: str
    save_steps: int
    progress: bool


# ---- training ---------------------------------------------------------------------------------------------------


def arguments(recipe: Recipe, steps: int, output: Output, save_steps: int) -> TrainingArguments:
    """The recipe in transformers' words."""
    import torch
    from transformers import TrainingArguments

    # accelerate shuffles epoch e with data_seed + e: neighbouring seeds would see the same orders one epoch apart
    data_seed = int(np.random.SeedSequence(recipe.seeds["data"]).generate_state(1)[0])
    accelerated = torch.accelerator.is_available()
    args = TrainingArguments(
        output_dir=str(output.checkpoints),
        max_steps=steps,
        learning_rate=recipe.lr,
        weight_decay=recipe.weight_decay,
        warmup_steps=recipe.warmup,  # below 1: a share of the steps
        max_grad_norm=recipe.max_grad_norm,
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=4 * recipe.batch_size,
        gradient_accumulation_steps=recipe.accumulation,
        bf16=recipe.bf16,
        use_cpu=not accelerated,
        dataloader_pin_memory=accelerated and torch.cuda.is_available(),
        seed=recipe.seeds["dropout"],
        data_seed=data_seed,
        save_strategy="steps" if save_steps else "no",
        save_steps=save_steps or MAX_STEPS,
        save_total_limit=1,
        logging_steps=max(1, steps // 50),
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,  # the bar is ours
    )
    if args.n_gpu > 1:  # transformers would split batches over all devices (DataParallel)
        args._n_gpu = 1
        logger.info("training on %s alone", args.device)
    return args


def _progress() -> Any:
    """One bar over optimizer steps with the running loss, one over the batches of each test set."""
    from tqdm import tqdm
    from transformers import TrainerCallback

    class Progress(TrainerCallback):
        bar: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="training", unit="step")

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.bar.update(state.global_step - self.bar.n)

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if "loss" in (logs or {}):
                self.bar.set_postfix(loss=f"{float(logs['loss']):.3f}")

        def on_prediction_step(
            self, args: Any, state: Any, control: Any, eval_dataloader: Any = None, **kwargs: Any
        ) -> None:
            if self.bar is None:
                self.bar = tqdm(total=len(eval_dataloader), desc="evaluating", unit="batch")
            self.bar.update()

        def close(self, *args: Any, **kwargs: Any) -> None:
            self.bar.close()
            self.bar = None

        on_train_end = on_predict = close

    return Progress()


def make_trainer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    features: list[dict[str, Any]],
    args: TrainingArguments,
    plan: Plan,
) -> Trainer:
    """Our Trainer with dynamic padding and our bar."""
    from transformers import DataCollatorWithPadding, PrinterCallback

    from .trainer import Trainer

    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=features,
        data_collator=DataCollatorWithPadding(tokenizer),
        preprocess_logits_for_metrics=_only_logits,
        callbacks=[_progress()] if plan.progress else None,
        methods=plan.methods,
        method_seed=plan.recipe.seeds["method"],
    )
    trainer.remove_callback(PrinterCallback)
    assert trainer.run is not None
    logger.info("%s", trainer.run.describe())
    return trainer


def _only_logits(logits: Any, labels: Any) -> Any:
    """Encoder-decoders return more than logits."""
    return logits[0] if isinstance(logits, (tuple, list)) else logits


def predict(trainer: Trainer, features: list[dict[str, Any]]) -> np.ndarray:
    """Logits (rows, outputs); rows of like length go together, which spares padding."""
    order = np.argsort([-len(feature["input_ids"]) for feature in features], kind="stable")
    ordered: Any = [features[i] for i in order]  # to torch a list is a dataset, to its type hints it is not
    logits = np.asarray(trainer.predict(ordered).predictions, dtype=np.float64)
    if not np.isfinite(logits).all():
        raise UsageError("the model's outputs are not numbers: training diverged. Lower lr or raise warmup.")
    return logits[np.argsort(order)]


def judge(name: str, rows: pd.DataFrame, logits: np.ndarray, data: Data) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Predictions and scores of one test set."""
    target, merge = data.target, data.merges.get(name, {})
    table = pd.DataFrame({"set": name, "row": rows.index, "label": rows["label"].to_numpy()})
    if target.names:
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        merged = np.array([merge.get(label, label) for label in target.names], dtype=object)
        table["prediction"] = merged[logits.argmax(axis=1)]
        for label, column in zip(target.names, (powers / powers.sum(axis=1, keepdims=True)).T, strict=True):
            table[f"probability_{label}"] = column
    else:
        table["prediction"] = logits[:, 0]
    gold, predicted = table["label"].to_numpy(), table["prediction"].to_numpy()
    return table, {"rows": len(table), **score(target, gold, predicted, target.merged(merge))}


def evaluate(
    trainer: Trainer, tokenizer: PreTrainedTokenizerBase, data: Data, max_length: int
) -> tuple[pd.DataFrame, dict[str, dict[str, Any]]]:
    """Predictions of all test sets, one under the other, and the scores of each."""
    tables, scores = [], {}
    for name, rows in data.tests.items():
        logger.info("evaluating on %s (%d rows)", name, len(rows))
        table, scores[name] = judge(name, rows, predict(trainer, tokenise(rows, tokenizer, max_length)), data)
        tables.append(table)
    return (pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()), scores


# ---- fit --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FitResult:
    """What `fit` leaves behind.

    Attributes:
        output: a plain Hugging Face model directory, with `metrics.json`, `predictions.parquet`, `steadytune.json`.
        metrics: test set -> metric -> value.
        metric: the one to look at first.
        predictions: a row for every test row: set, row, label, prediction, probabilities.
        steps: optimizer steps taken.
        seconds: of training alone (since the last resume).
    """

    output: Path
    metrics: dict[str, dict[str, Any]]
    metric: str
    predictions: pd.DataFrame
    steps: int
    seconds: float


def fit(
    train: str | Path | pd.DataFrame | Table,
    *,
    model: str | Path,
    output: str | Path,
    text: str | Sequence[str] = "text",
    label: str = "label",
    methods: str | Method | Sequence[str | Method] = (),
    tests: Mapping[str, str | Path | pd.DataFrame | Table] | None = None,
    validation: str | Path | pd.DataFrame | Table | None = None,
    kind: Kind = "auto",
    metric: str | None = None,
    resume: bool = False,
    overwrite: bool = False,
    save_steps: int = 200,
    progress: bool = True,
    **options: Any,
) -> FitResult:
    """Fine-tune a pre-trained model on a table of labelled text and evaluate it.

    The final weights are reported: nothing is selected, so no test set can leak into training.

    Args:
        train: a CSV, TSV, JSON-lines or Parquet file, a data frame, or a `Table`, which brings its own columns (see
            `tasks.load`).
        model: a Hugging Face model directory or hub name.
        output: a new or empty directory.
        text: one text column, or two for sentence pairs.
        label: the label column.
        methods: methods, or their names with options (`"dps_dense:keep=0.7"`), in order of action.
        tests: name -> table; columns as in `train`.
        validation: a table; without one `validation_share` of the training rows is held out.
        kind: classification or regression; decided from the labels by default.
        metric: the metric to report first; accuracy or Pearson's correlation by default.
        resume: go on from the last checkpoint in `output`.
        overwrite: replace the run in `output`.
        save_steps: steps between checkpoints; 0 writes none.
        progress: show a bar.
        **options: fields of `Recipe`: lr, batch_size, steps, epochs, max_length, dropout, bf16, train_size,
            validation_share, seed ...

    Raises:
        UsageError: what was asked for cannot be done; raised before training starts.

    Example:
        >>> fit("train.csv", text="review", label="stars", model="bert-base-uncased",
        ...     methods=["dps_dense:keep=0.7"], tests={"test": "test.csv"}, output="out")  # doctest: +SKIP
    """
    recipe = Recipe.of(options)
    if save_steps < 0:
        raise UsageError(f"save_steps must be 0 (no checkpoints) or more, got {save_steps}.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("fit runs in one process: start it without torchrun, or use steadytune.Trainer.")
    folder = Output(output)
    previous = folder.check(resume, overwrite)
    columns = (text,) if isinstance(text, str) else tuple(text)
    data = prepare(
        Table.of(train, columns, label, "train", kind),
        {name: Table.of(table, columns, label, name) for name, table in (tests or {}).items()},
        None if validation is None else Table.of(validation, columns, label, "validation"),
        train_size=recipe.train_size,
        validation_share=recipe.validation_share,
        seed=recipe.seeds["data"],
    )
    plan = Plan(
        str(model), make_methods(methods), recipe, data, recipe.total_steps(len(data.train)),
        _headline(metric, data.target), save_steps, progress,
    )  # fmt: skip
    return _run(plan, folder, previous)


def _headline(metric: str | None, target: Target) -> str:
    known = METRICS[target.kind]
    if metric is not None and metric not in known:
        raise UsageError(f"unknown metric {metric!r} for {target.kind}.{suggest(metric, known)}")
    return metric or next(iter(known))


def _run(plan: Plan, folder: Output, previous: dict[str, Any] | None) -> FitResult:
    """Load, train, evaluate, write; everything about the data has been checked."""
    recipe, data = plan.recipe, plan.data
    model, tokenizer, dropout = load(plan.model, data.target, recipe)
    max_length = token_limit(recipe.max_length, model.config, tokenizer)
    record = _record(plan, max_length, dropout)
    checkpoint = None
    if previous is not None:
        same_run(previous, record, folder.path)
        checkpoint = folder.last_checkpoint()
    features = tokenise(data.train, tokenizer, max_length)
    args = arguments(recipe, plan.steps, folder, plan.save_steps)
    try:
        trainer = make_trainer(model, tokenizer, _labelled(features, data.train, data.target), args, plan)
    except ValueError as error:  # a method that cannot act on this model, or two that exclude each other
        folder.forget_empty()
        raise UsageError(str(error)) from error
    _announce(plan, max_length, features)
    if checkpoint is None:
        folder.clear()
        folder.write_json(RECORD, record)
    else:
        logger.info("resuming from %s", checkpoint)
    started = time.perf_counter()
    with _quiet(warnings=True):  # every checkpoint has a bar
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - started
    predictions, scores = evaluate(trainer, tokenizer, data, max_length)
    result = FitResult(folder.path, scores, plan.metric, predictions, plan.steps, seconds)
    _write(folder, result, model, tokenizer, {**record, "device": str(args.device)})
    return result


def _record(plan: Plan, max_length: int, dropout: dict[str, float]) -> dict[str, Any]:
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
            "kind": plan.data.target.kind,
            "labels": list(plan.data.target.names),
            "optimizer": "AdamW (bias-corrected, fused), linear warm-up and decay",
            **own,
            "steps": plan.steps,
            "max_length": max_length,
            "dropout": dropout,
            "seeds": plan.recipe.seeds,
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


def _write(
    folder: Output,
    result: FitResult,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    record: dict[str, Any],
) -> None:
    """The model, the results, and last of all the record that calls the run finished."""
    with _quiet():
        files = folder.save_model(model, tokenizer)
    folder.write("predictions.parquet", result.predictions.to_parquet)
    folder.write_json(
        "metrics.json",
        {"metric": result.metric, "steps": result.steps, "seconds": result.seconds, "sets": result.metrics},
    )
    files += ["predictions.parquet", "metrics.json"]
    folder.write_json(RECORD, {**record, "status": "finished", "files": files})
    shutil.rmtree(folder.checkpoints, ignore_errors=True)


def _announce(plan: Plan, max_length: int, features: list[dict[str, Any]]) -> None:
    """Say what is about to happen, and what in the data may surprise."""
    data, rows_per_step = plan.data, plan.recipe.batch_size * plan.recipe.accumulation
    sizes = ", ".join(f"{name} {len(rows)}" for name, rows in data.tests.items()) or "no test set"
    logger.info("%s, %d training rows (%s)", data.target.kind, len(data.train), sizes)
    epochs = plan.steps * rows_per_step / len(data.train)
    logger.info("%d steps of %d rows (%.1f epochs)", plan.steps, rows_per_step, epochs)
    full = sum(len(feature["input_ids"]) >= max_length for feature in features)
    if full:
        logger.warning("%d training rows reach max_length %d and may be cut", full, max_length)
    for name in data.tests:
        if seen := data.overlap(name):
            logger.warning("%d rows of %s have a text that is also in the training rows", seen, name)
    if data.target.kind == "regression":
        mean, spread = float(data.train["label"].mean()), float(data.train["label"].std(ddof=0))
        if abs(mean) > 20 or not 0.05 < spread < 20:
            logger.warning("targets have mean %.3g, spread %.3g: models learn best near 0 and 1, rescale", mean, spread)
