"""Model, tokens and labels: what a table and a model directory become before training."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)
from transformers.utils import logging as hub_logging

from ..data.tables import Target
from ..errors import UsageError, one_line
from .scale import output_layer, rescale

logger = logging.getLogger("steadytune")

MAX_LENGTH = 128
PROBLEMS = {"classification": "single_label_classification", "multilabel": "multi_label_classification"}


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
class Pretrained:
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
    def open(
        cls, name: str, target: Target, *, dropout: float | None = None, max_length: int | None = None
    ) -> Pretrained:
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


# ---- adapters ---------------------------------------------------------------------------------------------------


# ---- calibration and scale ----------------------------------------------------------------------------------------
