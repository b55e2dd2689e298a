"""From rows to token ids and label ids, and from outputs back to labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError


def tokenise(
    rows: pd.DataFrame, tokenizer: PreTrainedTokenizerBase, max_length: int | None, prompt: str = ""
) -> list[dict[str, Any]]:
    """One feature dictionary for each row, unpadded and cut to ``max_length`` tokens (None does not cut).

    The prompt stands before the first text of each row.
    """
    texts = [f"{prompt}{text}" for text in rows["text"]]
    pairs = rows["text_pair"].tolist() if "text_pair" in rows else None
    cut: dict[str, Any] = {"truncation": True, "max_length": max_length} if max_length is not None else {}
    encoded = tokenizer(texts, pairs, verbose=False, **cut)
    return [dict(zip(encoded, values, strict=True)) for values in zip(*encoded.values(), strict=True)]


def token_counts(
    rows: pd.DataFrame,
    features: Sequence[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    limit: int,
    prompt: str = "",
) -> list[int]:
    """Number of tokens of each row before it is cut at ``limit``; only rows of that length are tokenised again."""
    counts = np.array([len(feature["input_ids"]) for feature in features])
    full = np.flatnonzero(counts == limit)
    if len(full):
        counts[full] = [len(f["input_ids"]) for f in tokenise(rows.iloc[full], tokenizer, None, prompt)]
    return counts.tolist()


def check_vocabulary(features: Sequence[dict[str, Any]], model: Any, what: str, index: Any) -> None:
    """Raise unless each token has a row in the model's embedding table.

    Raises:
        UsageError: A token has no row; the message names the first text with it.
    """
    rows = model.get_input_embeddings().num_embeddings
    largest = [max(feature["input_ids"], default=0) for feature in features]
    if max(largest, default=0) >= rows:
        first = next(i for i, token in enumerate(largest) if token >= rows)
        raise UsageError(
            f"{what} row {index[first]} holds token {largest[first]}, and the model has embeddings for {rows} tokens: "
            "give the tokenizer that belongs to the model, or resize its embeddings with resize_token_embeddings."
        )


def unknown_share(features: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> float:
    """Share of unknown tokens, without special tokens."""
    ids = np.concatenate([f["input_ids"] for f in features])
    ids = ids[~np.isin(ids, [i for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id])]
    return float((ids == tokenizer.unk_token_id).mean()) if tokenizer.unk_token_id is not None and len(ids) else 0.0
