"""Rehearsal of the end of a fit on a few rows before step 1, so that its errors do not come after hours of training."""

from __future__ import annotations

import copy
import dataclasses
import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from transformers import PreTrainedTokenizerBase

from ..data.guards import truncated
from ..errors import UsageError, one_line
from .card import model_card
from .encoding import check_vocabulary, token_counts
from .peft_models import LORA_ABOVE, merged, unfit
from .plan import answers, evaluate, fitted_model
from .record import storable

if TYPE_CHECKING:
    from .plan import Plan
    from .pretrained import Pretrained

logger = logging.getLogger("steadytune")

NEIGHBOUR = 3  # number of padding tokens after a row, which must not change its outputs


def rehearse(plan: Plan, pretrained: Pretrained, model: Any, record: Mapping[str, Any]) -> dict[str, int]:
    """Predict and score the longest row of each set, and write the card and the predictions.

    The model does not change, and no random number of the caller is drawn.

    Args:
        plan: Plan of the fit.
        pretrained: The pre-trained model, opened.
        model: The model to train, with its adapters.
        record: The record that is written before training.

    Returns:
        Number of rows of each set that are longer than the model reads.

    Raises:
        UsageError: A step fails that would also fail after training.
    """
    chosen: dict[str, pd.DataFrame] = {}
    ends, cut = [], {}
    for name, rows in {"train": plan.data.train, **plan.data.tests}.items():
        features = pretrained.tokenise(rows)
        check_vocabulary(features, model, name, rows.index)
        counts = token_counts(rows, features, pretrained.tokenizer, pretrained.max_length, pretrained.prompt)
        cut[name] = sum(count > pretrained.max_length for count in counts)
        finding = truncated(counts, pretrained.max_length, f"the {name} rows", list(rows.index))
        if finding:
            logger.warning("%s", finding.message)
        lengths = [len(feature["input_ids"]) for feature in features]
        few = sorted({int(np.argmax(lengths)), int(np.argmin(lengths))})
        chosen[name] = rows.iloc[few]
        ends += [features[i] for i in few]
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of scores on two rows
        check_padding(model, ends, pretrained.tokenizer, plan.options.peft)
        try:
            _end(plan, pretrained, model, record, chosen)
        except UsageError:
            raise
        except Exception as error:  # whatever it is, after the training it would come too late
            raise UsageError(
                f"a rehearsal of the end, before any training, fails on the longest rows: {one_line(error)[:500]}"
            ) from error
    return cut


def check_padding(
    model: Any, features: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, peft: str | None
) -> None:
    """Try a model on its longest row, and on its shortest alone and padded.

    Args:
        model: The model to train; its mode does not change.
        features: Tokenised rows.
        tokenizer: Tokenizer of the rows.
        peft: Kind of its adapters.

    Raises:
        UsageError: The model fails (a prompt that exceeds its positions, no past keys for a prefix), or has adapters
            and its outputs change with padding: decoders find their last token by the token numbers, which a prompt
            hides from them. Without adapters that is a warning.
    """
    rows = sorted(features, key=lambda feature: len(feature["input_ids"]))
    shortest, longest = (len(rows[i]["input_ids"]) for i in (0, -1))
    training = model.training
    model.eval()

    def outputs(row: dict[str, Any], length: int) -> torch.Tensor:
        batch = tokenizer.pad([row], padding="max_length", max_length=length, return_tensors="pt")
        with torch.inference_mode():
            return model(**batch.to(model.device)).logits

    try:
        outputs(rows[-1], longest)
        alone, beside = outputs(rows[0], shortest), outputs(rows[0], min(shortest + NEIGHBOUR, longest))
    except (ValueError, TypeError, IndexError, RuntimeError) as error:
        raise unfit(model, peft, one_line(error)[:300]) from error
    finally:
        model.train(training)
    if not torch.allclose(alone, beside, rtol=1e-3, atol=1e-4):
        if peft is not None:
            raise unfit(model, peft, "its outputs change with the padding beside a row.")
        logger.warning("the outputs of this model change with the padding beside a row: they depend on the batch")


def _end(plan: Plan, pretrained: Pretrained, model: Any, record: Mapping[str, Any], chosen: Mapping[str, Any]) -> None:
    """The end of a fit after training, on a few rows and in memory."""
    if hasattr(model, "merge_and_unload") and sum(p.numel() for p in model.parameters()) < LORA_ABOVE:
        merged(copy.deepcopy(model))
    fitted = fitted_model(plan, pretrained, [model])
    data = dataclasses.replace(plan.data, tests=chosen)
    predictions, metrics = evaluate(fitted, data, answers(fitted, pretrained, data))
    pa.Table.from_pandas(storable(predictions))
    columns = {"text": list(fitted.text), **fitted.form.record()}
    card = model_card({**record, "columns": columns, "runs": [], "chosen": None}, metrics, plan.metric)
    (card + pretrained.config.to_json_string()).encode("utf-8")
