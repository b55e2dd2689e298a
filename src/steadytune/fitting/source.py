"""Model, tokens and labels: what a table and a model directory become before training."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as hub_logging

from ..core.anatomy import anatomy
from ..data.tables import Target
from ..errors import UsageError, one_line
from ..methods.adapters import FILE as ADAPTERS
from ..methods.adapters import adapter_size, load_adapters, save_adapters

logger = logging.getLogger("steadytune")

MAX_LENGTH = 128
PROBLEMS = {"classification": "single_label_classification", "multilabel": "multi_label_classification"}
LORA_ABOVE = 1_000_000_000  # parameters from which on adapters are trained unless told otherwise
PEFT_CONFIG = "adapter_config.json"  # what makes a folder one of PEFT's


@contextlib.contextmanager
def quiet(warnings: bool = False) -> Iterator[None]:
    """Silence transformers' own bars and tables for a while; what matters in them is said in our words."""
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


@dataclass(frozen=True, eq=False)
class Source:
    """A pre-trained model, opened: every `load` is the same model with a head drawn anew.

    Attributes:
        name: directory or hub name.
        config: with a head for the target and the dropout wanted.
        tokenizer: with a padding token.
        max_length: tokens per row.
        dropout: the settings in force.
    """

    name: str
    config: Any
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    dropout: dict[str, float]

    @classmethod
    def open(cls, name: str, target: Target, *, dropout: float | None = None, max_length: int | None = None) -> Source:
        """Read config and tokenizer.

        Raises:
            UsageError: no such model, no model, or one that cannot do what was asked for.
        """
        if name.startswith((".", "/", "~")) and not Path(name).is_dir():
            raise UsageError(f"model {name!r}: no such directory.")
        if Path(name).is_dir() and not Path(name, "config.json").is_file():
            raise UsageError(f"model {name!r} is a directory without config.json: give a Hugging Face model directory.")
        with quiet(), _loading(name):
            config = AutoConfig.from_pretrained(name, **head_options(target))
            tokenizer = AutoTokenizer.from_pretrained(name)
        in_force = set_dropout(config, dropout)
        _set_pad(config, tokenizer, name)
        return cls(name, config, tokenizer, token_limit(max_length, config, tokenizer), in_force)

    @functools.cached_property
    def bias(self) -> bool:
        """Whether the output layer has one."""
        with torch.device("meta"):  # no weights
            layer = output_layer(AutoModelForSequenceClassification.from_config(copy.deepcopy(self.config)), "bias")
        return layer.bias is not None

    def load(self, seed: int, target: Target | None = None) -> PreTrainedModel:
        """The model in float32, new weights drawn with ``seed``; a head that is not new goes to the target's scale.

        Whatever the checkpoint's precision, the weights that AdamW moves are float32: at 2e-5 bfloat16 rounds most
        updates to nothing.
        """
        with quiet(), _loading(self.name):
            set_seed(seed)
            model, info = AutoModelForSequenceClassification.from_pretrained(
                self.name,
                config=copy.deepcopy(self.config),
                dtype=torch.float32,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
        new = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        if new:
            logger.info("new weights, drawn with seed %d: %s", seed, ", ".join(new))
        if target is not None and target.scaled:
            layer = output_layer(model, "standardize")
            if not any(model.get_parameter(name) is layer.weight for name in new):
                rescale(model, 1 / target.spread, -target.mean / target.spread, "standardize")
        return model


def head_options(target: Target) -> dict[str, Any]:
    """What the config needs to know of the target."""
    if not target.names:
        return {"num_labels": 1, "problem_type": "regression"}
    return {
        "id2label": dict(enumerate(target.names)),
        "label2id": {label: number for number, label in enumerate(target.names)},
        "problem_type": PROBLEMS[target.kind],
    }


@contextlib.contextmanager
def _loading(name: str) -> Iterator[None]:
    """Whatever the library says when a directory or hub model cannot be read, in one sentence.

    Raises:
        UsageError: instead.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # damaged files raise what their parsers raise
        raise UsageError(
            f"model {name!r} cannot be loaded as a text classifier: {one_line(error)[:500]} "
            "Check the name, the files and the connection."
        ) from error


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


def tokenise(rows: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> list[dict[str, Any]]:
    """One feature dictionary per row, unpadded, cut to ``max_length`` tokens (None: whole)."""
    pairs = rows["text_pair"].tolist() if "text_pair" in rows else None
    cut: dict[str, Any] = {"truncation": True, "max_length": max_length} if max_length is not None else {}
    encoded = tokenizer(rows["text"].tolist(), pairs, verbose=False, **cut)
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def token_counts(rows: pd.DataFrame, features: Sequence[dict[str, Any]], source: Source) -> list[int]:
    """Tokens of every row before anything is cut; only rows as long as the limit are tokenised again."""
    counts = np.array([len(feature["input_ids"]) for feature in features])
    full = np.flatnonzero(counts == source.max_length)
    if len(full):
        counts[full] = [len(f["input_ids"]) for f in tokenise(rows.iloc[full], source.tokenizer, None)]
    return counts.tolist()


def unknown_share(features: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of tokens that the tokenizer does not know, special ones not counted."""
    ids = np.concatenate([f["input_ids"] for f in features])
    ids = ids[~np.isin(ids, [i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id])]
    return float((ids == tokenizer.unk_token_id).mean()) if tokenizer.unk_token_id is not None and len(ids) else 0.0


def label_ids(labels: Sequence[Any], target: Target) -> list[Any]:
    """Labels as the model takes them: class numbers, rows of 0.0 and 1.0 (several labels), or standardised numbers."""
    if not target.names:
        return [(float(label) - target.mean) / target.spread for label in labels]
    ids = {name: number for number, name in enumerate(target.names)}
    if target.kind == "multilabel":
        return [[float(name in label) for name in target.names] for label in labels]
    return [ids[label] for label in labels]


# ---- adapters ---------------------------------------------------------------------------------------------------


def adapted(model: PreTrainedModel, lora: bool | None, kind: str | None = None) -> nn.Module:
    """The model with adapters and a trainable head, if wanted or too large to train whole; needs the extra ``peft``.

    Args:
        model: changed in place.
        lora: the same as the kind ``"lora"``; None: for models of more than a billion weights.
        kind: ``"lora"``, of rank 16, alpha 32 and dropout 0.05 on all linear layers (Hu et al., ICLR 2022, arXiv
            2106.09685; on all layers as Dettmers et al., NeurIPS 2023, arXiv 2305.14314); ``"ia3"``, factors of keys,
            values and feed-forward (Liu et al., NeurIPS 2022, arXiv 2205.05638); ``"prefix"``, 20 keys and values of
            each layer (Li and Liang, ACL 2021, arXiv 2101.00190); ``"prompt"``, 20 vectors before the text (Lester et
            al., EMNLP 2021, arXiv 2104.08691). None: no adapters, unless `lora` says so.

    Raises:
        UsageError: peft is not installed, or has no such adapters for this model.
    """
    size = sum(p.numel() for p in model.parameters())
    if kind is None and (lora is False or (lora is None and size < LORA_ABOVE)):
        return model
    kind = kind or "lora"
    try:
        import peft
    except ImportError as error:
        raise UsageError(
            f"a model of {size / 1e9:.1f} billion weights is trained with PEFT's {kind}: pip install "
            "'steadytune[peft]', or train all weights with lora=False (--no-lora)."
        ) from error
    settings: dict[str, dict[str, Any]] = {
        "lora": {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "target_modules": "all-linear"},
        "ia3": {},
        "prefix": {"num_virtual_tokens": 20},
        "prompt": {"num_virtual_tokens": 20},
    }
    configs = {
        "lora": peft.LoraConfig,
        "ia3": peft.IA3Config,
        "prefix": peft.PrefixTuningConfig,
        "prompt": peft.PromptTuningConfig,
    }
    heads = sorted({name.split(".")[0] for name, part in anatomy(model).items() if part.head})
    try:  # PEFT knows two names of heads and would freeze, and never save, the others
        config = configs[kind](task_type=peft.TaskType.SEQ_CLS, modules_to_save=heads, **settings[kind])
        found: Any = peft.get_peft_model(model, config)
    except (ValueError, KeyError, AttributeError) as error:
        raise _unfit(model, kind, error) from error
    trained = sum(p.numel() for p in found.parameters() if p.requires_grad)
    logger.info("PEFT's %s: %d weights are trained instead of %d", kind, trained, size)
    return found


def _unfit(model: nn.Module, kind: str, error: Exception) -> UsageError:
    config: Any = model.config
    return UsageError(
        f"peft={kind!r} does not work with a {config.model_type} model: {one_line(error)[:300]} Use lora, or leave it "
        "out."
    )


def check_adapted(model: Any, kind: str, features: Sequence[dict[str, Any]], tokenizer: Any) -> None:
    """Try a model with adapters on its longest row, and its shortest alone and padded.

    Args:
        model: as it will be trained.
        kind: of its adapters.
        features: tokenised rows.
        tokenizer: theirs.

    Raises:
        UsageError: the model fails (a prompt that exceeds its positions, no past keys for a prefix), or its outputs
            change with padding: decoders find their last token by the token numbers, which a prompt hides from them.
    """
    rows = sorted(({k: v for k, v in f.items() if k != "labels"} for f in features), key=lambda f: len(f["input_ids"]))
    shortest, longest = (len(rows[i]["input_ids"]) for i in (0, -1))
    training = model.training
    model.eval()

    def outputs(row: dict[str, Any], length: int) -> torch.Tensor:
        batch = tokenizer.pad([row], padding="max_length", max_length=length, return_tensors="pt")
        with torch.inference_mode():
            return model(**batch.to(model.device)).logits

    try:
        outputs(rows[-1], longest)
        alone, beside = outputs(rows[0], shortest), outputs(rows[0], min(shortest + 3, longest))
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise _unfit(model, kind, error) from error
    finally:
        model.train(training)
    if not torch.allclose(alone, beside, rtol=1e-3, atol=1e-4):
        raise _unfit(model, kind, ValueError("its outputs change with the padding beside a row."))


def merged(model: nn.Module) -> PreTrainedModel:
    """A plain model: adapters taken into the weights, where they can be (LoRA, IA3)."""
    unload: Any = getattr(model, "merge_and_unload", None)
    return unload() if unload else model  # type: ignore[return-value]


def write_model(model: Any, folder: str | Path) -> None:
    """A plain model directory; of a model whose adapters cannot be merged, what was trained alone."""
    if adapter_size(model) is None:
        model.save_pretrained(folder)  # PEFT's writes its adapters
    else:
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_adapters(folder, model)


def read_model(folder: str | Path, base: Callable[[], PreTrainedModel]) -> nn.Module:
    """What `write_model` wrote, in float32; ``base`` loads the pre-trained model, for adapters."""
    with quiet():
        if Path(folder, ADAPTERS).is_file():
            return load_adapters(folder, base())
        if Path(folder, PEFT_CONFIG).is_file():
            from peft import PeftModel

            return PeftModel.from_pretrained(base(), folder)
        return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


# ---- calibration and scale ----------------------------------------------------------------------------------------


def standardised(target: Target, labels: Sequence[float], *, centred: bool) -> Target:
    """The target with mean and spread of these labels; without a mean the root of their mean square is the spread."""
    values = np.asarray(labels, dtype=float)
    mean = float(values.mean()) if centred else 0.0
    spread = float(np.sqrt(np.square(values - mean).mean()))
    return dataclasses.replace(target, mean=mean, spread=spread or 1.0)


def output_layer(model: Any, what: str) -> nn.Linear:
    """The last linear layer with one output per label.

    Raises:
        UsageError: there is none.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == model.config.num_labels]
    if not layers:
        raise UsageError(f"{what}: a {model.config.model_type} model has no linear output layer: switch it off.")
    return layers[-1]


def rescale(model: Any, spread: float, mean: float, what: str) -> None:
    """Outputs become ``spread * outputs + mean`` for good, in the output layer: any user of the model sees it.

    Raises:
        UsageError: the model's outputs do not come from one linear layer.
    """
    layer = output_layer(model, what)
    with torch.no_grad():
        layer.weight.mul_(spread)
        if layer.bias is not None:
            layer.bias.mul_(spread).add_(mean)


def temperature(logits: np.ndarray, labels: Sequence[int]) -> float:
    """The temperature in [0.05, 20] under which the labels are most probable (Guo et al., ICML 2017, arXiv 1706.04599).

    Args:
        logits: (rows, classes).
        labels: class numbers.
    """
    from scipy.optimize import minimize_scalar
    from scipy.special import log_softmax

    rows = np.arange(len(labels))
    found = minimize_scalar(
        lambda power: -log_softmax(logits / np.exp(power), axis=1)[rows, labels].mean(),
        bounds=(math.log(0.05), math.log(20)),
        method="bounded",
    )
    return float(np.exp(found.x))


def check_scale(model: Any, feature: dict[str, Any], what: str) -> None:
    """Try on one row that `rescale` does what it says to this model, and put its weights back.

    Args:
        model: as it will be trained; with adapters it is not tried.
        feature: a tokenised row.
        what: is asked for.

    Raises:
        UsageError: the logits are computed otherwise.
    """
    if hasattr(model, "peft_config"):
        return
    inputs = {k: torch.tensor([v], device=next(model.parameters()).device) for k, v in feature.items() if k != "labels"}

    def outputs() -> torch.Tensor:
        with torch.inference_mode():
            return model(**inputs).logits

    training = model.training
    model.eval()
    before = outputs()
    rescale(model, 0.5, 0.0, what)
    after = outputs()
    rescale(model, 2.0, 0.0, what)  # powers of two: exact
    model.train(training)
    if not torch.allclose(2 * after, before, rtol=1e-4, atol=1e-6):
        raise UsageError(f"{what}: the logits of this model are not those of its last linear layer: switch it off.")
