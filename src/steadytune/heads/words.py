"""A head that begins as words (a verbaliser): the language model's output weights of one word for each class.

z_c = e(word_c) . phi(x) + b(word_c)     phi: the input of the language model's output layer; e, b: its weights, bias

This is exact where the classifier's head and the language model's head differ in the last layer alone: for decoders
(the next word after the text), and for ModernBERT (the word in the place of the first token). Between the blocks and
the output layer, BERT and its kin have other layers in a classifier than in a masked language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from ..errors import one_line
from ..precision import in_float64
from .features import TOLERANCE, evaluating, head_inputs, output_layer
from .probe import Probe

LANGUAGE_MODELS: tuple[tuple[Any, Any], ...] = (
    (AutoModelForMaskedLM, MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    (AutoModelForCausalLM, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
)
TOKENS = 6  # length of the row on which the two heads are compared


@torch.no_grad()
def word_head(model: Any, words: Sequence[str]) -> Probe:
    """The head whose outputs are the language model's logits of these words.

    Args:
        model: A classifier as it was read from its folder, with ``name_or_path``.
        words: A word for each class, in the order of the outputs; each is one token of the vocabulary, after a space
            where the tokenizer tells words at the start of a text from others.

    Returns:
        Weights and bias (zeros if the language model has none); it has no out-of-fold outputs.

    Raises:
        ValueError: The model is for numbers, the number of words is not that of the classes, two classes have one
            token, a word is not one token, the folder has no language-model head, or that head is not the classifier's
            up to the last layer.
    """
    classes = list(model.config.id2label.values())
    if len(classes) < 2:
        raise ValueError("the head of a model for numbers cannot begin as words: give head='ridge'")
    if len(words) != len(classes):
        raise ValueError(f"there are {len(classes)} classes ({', '.join(classes)}) and {len(words)} words: give one "
                         "word for each class, in this order")  # fmt: skip
    language = _language_model(model.name_or_path)
    tokens = _tokens(AutoTokenizer.from_pretrained(model.name_or_path), words)
    layer = language.get_output_embeddings()
    weight = in_float64(layer.weight[tokens]).numpy()
    bias = np.zeros(len(tokens)) if layer.bias is None else in_float64(layer.bias[tokens]).numpy()
    head = Probe(weight, bias, np.zeros((0, len(tokens))), 0.0)
    _check(model, language, tokens, head)
    return head


def _language_model(name: str) -> Any:
    """The language model in a folder; a masked one where there are both.

    Raises:
        ValueError: There is none.
    """
    try:
        kind = AutoConfig.from_pretrained(name).model_type
        for auto, known in LANGUAGE_MODELS:
            if kind in known:
                language, info = auto.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
                if not info["missing_keys"]:
                    return language.eval()
    except (OSError, ValueError) as error:
        raise ValueError(f"the head cannot begin as words: {name!r} has no language model ({one_line(error)[:200]})") \
            from error  # fmt: skip
    raise ValueError(
        f"the head cannot begin as words: {name!r} has no language-model head. Give the checkpoint of a language "
        "model, or the head 'logistic'"
    )


def _tokens(tokenizer: Any, words: Sequence[str]) -> list[int]:
    """The token of each word.

    Raises:
        ValueError: A word is not one token, or two are the same.
    """
    found: list[int] = []
    for word in words:
        tries = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (f" {word}", word)]
        single = [ids[0] for ids in tries if len(ids) == 1 and ids[0] != tokenizer.unk_token_id]
        if not single:
            pieces = " ".join(tokenizer.convert_ids_to_tokens(tries[0]))
            raise ValueError(f"the word {word!r} is not one token of the vocabulary but {pieces!r}: choose another")
        if single[0] in found:
            raise ValueError(f"two classes have the word {word!r}: choose another for one of them")
        found.append(single[0])
    return found


def _check(model: Any, language: Any, tokens: Sequence[int], head: Probe) -> None:
    """Raise unless the head on the classifier's features gives the language model's logits of some token."""
    layer = output_layer(model)
    ids = torch.arange(TOKENS)[None]  # one row, as a decoder without a padding token takes no more
    if model.config.pad_token_id is not None:
        ids = ids.masked_fill(ids == model.config.pad_token_id, int(tokens[0]))  # padding would end the text
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wanted = in_float64(language(**inputs).logits[..., list(tokens)])
    if layer.in_features == head.weight.shape[1]:
        with evaluating(model):
            read = head_inputs(model, {name: value.to(layer.weight.device) for name, value in inputs.items()})
        given = torch.from_numpy(head.outputs(in_float64(read).numpy()))
        far = (wanted - given[:, None]).abs().amax(dim=(0, 2)).min()  # at the token where they differ least
        if far <= TOLERANCE * (1 + wanted.abs().max()):
            return
    raise ValueError(
        f"the head of a {type(model).__name__} cannot begin as words: between its blocks and its last layer it has "
        f"other layers than a {type(language).__name__}, or it pools over tokens. Give the head 'logistic'"
    )
