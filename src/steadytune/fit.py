"""From a table to a fine-tuned model: `fit`, its options, and the folder it writes.

torch and transformers are imported inside the functions that use them: command-line help and data errors come at once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import os
import platform
import shutil
import tempfile
import time
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from . import __version__
from .data import Data, Kind, Table, Target, UsageError, one_line, prepare, suggest
from .tasks import METRICS, score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

    from .core import Method
    from .trainer import Trainer

logger = logging.getLogger("steadytune")

# The strong baseline for small data: 20 epochs, but never so few steps that training stops half way, and a ceiling
# where a table is large enough to need no repetition (Mosbach et al. 2021; Zhang et al. 2021).
EPOCHS, MIN_STEPS, MAX_STEPS = 20, 400, 2000
MAX_LENGTH = 128
RECORD = "steadytune.json"


# ---- options ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything but model, methods and data that decides the trained weights.

    The optimizer is bias-corrected AdamW (fused) with linear warm-up and linear decay, on float32 weights.

    Attributes:
        lr: peak learning rate.
        weight_decay: decoupled, on weight matrices only.
        warmup: share of the steps, in [0, 1).
        max_grad_norm: clipping of the gradient's norm; 0 switches it off.
        batch_size: rows per forward.
        accumulation: forwards per optimizer step.
        steps: optimizer steps; by default 20 epochs, at least 400 and at most 2,000 steps.
        epochs: instead of steps.
        max_length: tokens per row, longer ones are cut; by default 128 or the model's limit.
        dropout: one probability for every dropout of the model; by default as its config says.
        bf16: bfloat16 autocast; the weights themselves stay float32.
        train_size: draw this many rows, stratified, and forget the others.
        validation_share: carved out of the training rows where no validation table is given.
        seed: of everything below that is not set.
        init_seed: new weights (the head).
        data_seed: subset, validation split and order of rows.
        dropout_seed: dropout.
        method_seed: draws of the methods (masks, noise).
    """

    lr: float = 2e-5
    weight_decay: float = 0.01
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    batch_size: int = 16
    accumulation: int = 1
    steps: int | None = None
    epochs: float | None = None
    max_length: int | None = None
    dropout: float | None = None
    bf16: bool = False
    train_size: int | None = None
    validation_share: float = 0.1
    seed: int = 0
    init_seed: int | None = None
    data_seed: int | None = None
    dropout_seed: int | None = None
    method_seed: int | None = None

    def __post_init__(self) -> None:
        for name, (rule, holds) in _RULES.items():
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise UsageError(f"{name} must be {rule}, got {value}.")
        if self.steps is not None and self.epochs is not None:
            raise UsageError(f"give steps ({self.steps}) or epochs ({self.epochs}), not both.")

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Recipe:
        """A recipe from keyword arguments; an unknown one is an error that names the nearest."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in options:
            if name not in known:
                raise UsageError(f"unknown option {name!r}.{suggest(name, known)}")
        return cls(**options)

    @property
    def seeds(self) -> dict[str, int]:
        """The four seeds in force."""
        own = {name: getattr(self, f"{name}_seed") for name in ("init", "data", "dropout", "method")}
        return {name: self.seed if value is None else value for name, value in own.items()}

    def total_steps(self, rows: int) -> int:
        """Optimizer steps for a training set of this size."""
        per_epoch = math.ceil(math.ceil(rows / self.batch_size) / self.accumulation)
        if self.steps is not None:
            return self.steps
        if self.epochs is not None:
            return max(1, math.ceil(self.epochs * per_epoch))
        return min(max(EPOCHS * per_epoch, MIN_STEPS), MAX_STEPS)


_POSITIVE = ("above 0", lambda value: value > 0)
_NOT_NEGATIVE = ("0 or more", lambda value: value >= 0)
_SHARE = ("at least 0 and below 1", lambda value: 0 <= value < 1)
_SEED = ("between 0 and 2**32 - 1", lambda value: 0 <= value < 2**32)  # numpy's range
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("lr", "batch_size", "accumulation", "steps", "epochs", "max_length", "train_size"), _POSITIVE),
    **dict.fromkeys(("weight_decay", "max_grad_norm"), _NOT_NEGATIVE),
    **dict.fromkeys(("warmup", "dropout", "validation_share"), _SHARE),
    **dict.fromkeys(("seed", "init_seed", "data_seed", "dropout_seed", "method_seed"), _SEED),
}


# ---- methods by name --------------------------------------------------------------------------------------------


def parse_method(text: str, registry: Mapping[str, type[Any]]) -> Any:
    """A method from `name` or `name:option=value,option=value`, checked against the fields of its class."""
    name, _, tail = text.partition(":")
    name = name.strip()
    if name not in registry:
        raise UsageError(f"unknown method {name!r}.{suggest(name, registry)}")
    cls = registry[name]
    hints = typing.get_type_hints(cls)
    known = {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}
    options: dict[str, Any] = {}
    for item in filter(None, map(str.strip, tail.split(","))):
        option, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            raise UsageError(f"method {name!r}: options are written option=value, got {item!r}.")
        if option not in known:
            raise UsageError(f"method {name!r}: unknown option {option!r}.{suggest(option, known)}")
        if option in options:
            raise UsageError(f"method {name!r}: {option} is given twice.")
        try:
            options[option] = convert(value, known[option])
        except ValueError:
            raise UsageError(f"method {name!r}: {option} must be {_spell(known[option])}, got {value!r}.") from None
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"method {name!r}: {error}") from error


def convert(text: str, hint: Any) -> Any:
    """The value that `text` means for a field of this type; ValueError when it means none."""
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return {str(option): option for option in options}[text] if text in map(str, options) else _no_value()
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        for option in sorted(options, key=lambda option: option is str):  # text takes what nothing else wants
            with contextlib.suppress(ValueError):
                return convert(text, option)
        return _no_value()
    if hint is bool:
        return {"true": True, "false": False}[text.lower()] if text.lower() in ("true", "false") else _no_value()
    if hint is type(None):
        return None if text.lower() == "none" else _no_value()
    return hint(text) if hint in (int, float, str) else _no_value()


def _no_value() -> Any:
    raise ValueError


def _spell(hint: Any) -> str:
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return " or ".join(map(repr, options))
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return " or ".join(map(_spell, options))
    return getattr(hint, "__name__", str(hint))


def method_record(method: Any) -> dict[str, Any]:
    """Name and every option of a method, ready for JSON."""
    from .methods import METHODS

    names = {cls: name for name, cls in METHODS.items()}
    options = {field.name: _plain(getattr(method, field.name)) for field in dataclasses.fields(method)}
    if (where := getattr(method, "where", None)) is not None:  # set by `only`
        options["where"] = _plain(where)
    return {"name": names.get(type(method), type(method).__name__), "options": options}


def _plain(value: Any) -> Any:
    """The value itself where JSON has it, a function by its name, anything else (infinity too) as it prints."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return getattr(value, "__qualname__", repr(value))
    return value


def _methods(methods: str | Method | Sequence[str | Method]) -> list[Method]:
    from .methods import METHODS

    listed = methods if isinstance(methods, Sequence) and not isinstance(methods, str) else [methods]
    return [parse_method(method, METHODS) if isinstance(method, str) else method for method in listed]


# ---- the output folder ------------------------------------------------------------------------------------------


class Output:
    """The folder of one run: a model directory with the run's records beside it, `checkpoints/` while it trains.

    Every file appears whole or not at all: written under another name, then renamed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"

    def check(self, resume: bool, overwrite: bool) -> dict[str, Any] | None:
        """The record of the run to resume, None for a fresh start; an error where something is in the way."""
        if resume and overwrite:
            raise UsageError("give --resume (go on) or --overwrite (start anew), not both.")
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"output {self.path} must be a directory, and is a file.")
        record = self._record()
        if resume:
            return self._resumable(record)
        if self.path.is_dir() and any(self.path.iterdir()):
            if record is None:
                raise UsageError(f"output {self.path} is not empty and holds no run: choose another --output DIR.")
            if not overwrite:
                raise UsageError(
                    f"output {self.path} already holds a run ({record['status']}): "
                    "go on with --resume, start anew with --overwrite, or choose another --output DIR."
                )
        return None

    def _record(self) -> dict[str, Any] | None:
        file = self.path / RECORD
        if not file.is_file():
            return None
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UsageError(f"{file}: not JSON ({error}). Choose another --output DIR.") from error
        if not isinstance(record, dict) or record.get("format") != 1:
            raise UsageError(f"{file}: not a record of this version of steadytune. Choose another --output DIR.")
        return record

    def _resumable(self, record: dict[str, Any] | None) -> dict[str, Any]:
        if record is None:
            raise UsageError(f"--resume: no run in {self.path} (no {RECORD}). Leave --resume out to start one.")
        if record["status"] == "finished":
            raise UsageError(f"--resume: the run in {self.path} is finished. Train anew with --overwrite.")
        if self.last_checkpoint() is None:
            raise UsageError(f"--resume: the run in {self.path} has no checkpoint yet. Start it anew with --overwrite.")
        return record

    def last_checkpoint(self) -> Path | None:
        """The newest checkpoint that was written to its end (the trainer's state comes last)."""
        found = [path for path in self.checkpoints.glob("checkpoint-*") if _is_whole(path)]
        return max(found, key=lambda path: int(path.name.rpartition("-")[2]), default=None)

    def clear(self) -> None:
        """Remove what an earlier run recorded as its own; nothing else is touched."""
        record = self._record()
        for name in record["files"] if record else ():
            (self.path / Path(name).name).unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.path.mkdir(parents=True, exist_ok=True)

    def forget_empty(self) -> None:
        """Take back folders that were made for nothing."""
        for folder in (self.checkpoints, self.path):
            with contextlib.suppress(OSError):
                folder.rmdir()

    def write(self, name: str, writer: Callable[[Path], Any]) -> None:
        """Let `writer` fill a file beside the final place, then rename it."""
        part = self.path / f".{name}.part"
        writer(part)
        os.replace(part, self.path / name)

    def write_json(self, name: str, value: Any) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        self.write(name, lambda path: path.write_text(text, encoding="utf-8"))

    def save_model(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
        """Write model and tokenizer; `config.json` comes last, so that the folder loads only when it is complete."""
        with tempfile.TemporaryDirectory(prefix=".model-", dir=self.path) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            names = sorted(os.listdir(folder), key=lambda name: name == "config.json")
            for name in names:
                os.replace(Path(folder, name), self.path / name)
        return names


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def _same_run(then: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume a run under another recipe or on other training rows, and say what differs."""
    now = json.loads(json.dumps(now))
    differences = list(_differences(then["recipe"], now["recipe"]))
    differences += _differences(then["data"]["train"], now["data"]["train"], "training data")
    if differences:
        raise UsageError(
            f"--resume: the run in {folder} was started otherwise: {'; '.join(differences)}. "
            "Give the same options, or start anew with --overwrite."
        )


def _differences(then: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            yield from _differences(then.get(key), now.get(key), f"{where}.{key}" if where else key)
    elif then != now:
        yield f"{where} was {then!r}, is {now!r}"


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
        str(model), _methods(methods), recipe, data, recipe.total_steps(len(data.train)),
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
        _same_run(previous, record, folder.path)
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
