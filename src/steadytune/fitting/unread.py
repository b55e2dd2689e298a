"""What a training of `fit` leaves out: the rows of the word embeddings that none of its texts reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from torch import nn
from transformers import PreTrainedTokenizerBase

from ..core import Method
from ..vocabulary import compact_vocabulary, noticing, obstacle
from .options import Options

LEAST = 0.05  # share of the trained weights below which leaving rows out is not worth it
ADAM = 12  # bytes of a float32 weight's gradient and moments


@dataclass(frozen=True)
class Vocabulary:
    """The word embeddings of a training.

    Attributes:
        rows: Number of rows of the table.
        trained_rows: Number of rows that are trained.
        left_out: Number of weights in the others.
        weights: Number of weights that a training of the whole table trains.
        whole: Why no row is left out; None if rows are.
    """

    rows: int = 0
    trained_rows: int = 0
    left_out: int = 0
    weights: int = 0
    whole: str | None = None

    def record(self) -> dict[str, Any]:
        """What steadytune.json says."""
        if self.whole is not None:
            return {"whole": self.whole}
        return {"rows": self.rows, "trained_rows": self.trained_rows, "left_out_weights": self.left_out}

    def __str__(self) -> str:
        if self.whole is not None:
            return f"all word embeddings are trained: {self.whole}"
        return (
            f"{self.trained_rows:,} of {self.rows:,} word embeddings are trained, as no training text reads the "
            f"others: {self.left_out / self.weights:.0%} of the weights need no gradient and no optimizer state "
            f"({ADAM * self.left_out / 1e6:,.0f} MB)"
        )


def leave_out_unread(
    model: nn.Module,
    methods: Sequence[Method],
    options: Options,
    features: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
) -> Vocabulary:
    """Give a model a compact vocabulary for its training, if that saves much and changes no result.

    Args:
        model: The model before its Run is made; changed in place.
        methods: All methods of the training.
        options: Options of the fit.
        features: All texts that the training reads, in tokens.
        tokenizer: Their tokenizer.
    """
    whole = _why_whole(model, methods, options)
    if whole is not None:
        return Vocabulary(whole=whole)
    tokens = {*chain.from_iterable(feature["input_ids"] for feature in features), *tokenizer.all_special_ids}
    tokens |= _types(model, features, tokenizer)
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    vocabulary = compact_vocabulary(model, tokens)
    if vocabulary.left_out < LEAST * weights:
        vocabulary.restore()
        return Vocabulary(whole=f"the training texts leave out less than {LEAST:.0%} of the weights")
    return Vocabulary(vocabulary.size, len(vocabulary.rows), vocabulary.left_out, weights)


def _types(model: nn.Module, features: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Numbers of token types that a model without a table for them (GPT-2) looks up among the words."""
    if hasattr(model.config, "type_vocab_size"):
        return set()
    found = {*chain.from_iterable(feature.get("token_type_ids", ()) for feature in features)}
    return found | {tokenizer.pad_token_type_id} if found else found


def _why_whole(model: nn.Module, methods: Sequence[Method], options: Options) -> str | None:
    """Why a training has to have the whole vocabulary; None if it need not."""
    if not options.compact:
        return "compact is off"
    if hasattr(model, "peft_config"):
        return "adapters are trained instead of them"
    if (why := obstacle(model)) is not None:
        return why
    method = noticing(model, methods, options.weight_decay)
    return None if method is None else f"{type(method).__name__} acts on all of them, or depends on them"
