"""A tiny random BERT with a word-level tokenizer, and toy tables, for the tests of fit and cli."""

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    GPT2Config,
    GPT2Model,
    PreTrainedTokenizerFast,
)

WORDS = [
    "good", "bad", "fine", "poor", "film", "play", "cast", "plot",
    "great", "awful", "story", "score", "joy", "bore", "warm", "cold",
]  # fmt: skip


def word_tokenizer(pad: bool = True) -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocab = {word: number for number, word in enumerate([*special, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    names = {"model_input_names": inputs, "unk_token": "[UNK]", "eos_token": "[SEP]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names, **({"pad_token": "[PAD]"} if pad else {}))


def save_tiny_bert(folder: Path, **changes: Any) -> str:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, **changes,
    )  # fmt: skip
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def masking_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with a mask."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "[MASK]", "cls_token": "[CLS]", "sep_token": "[SEP]"})
    return tokenizer


def save_masked_bert(folder: Path, kind: Any = BertForPreTraining) -> str:
    """A checkpoint as BERT was published: body, pooler and the layers of its pre-training."""
    tokenizer = masking_tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_sentence_bert(folder: Path, *, mean: bool = True, trained: bool = False) -> str:
    """A sentence encoder: its folder says how it pools; its pooler was never trained, unless ``trained``."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS) + 4, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    model = BertForSequenceClassification(config).bert
    if trained:
        torch.nn.init.normal_(model.pooler.dense.bias)
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    modules = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
               for i, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling")])]  # fmt: skip
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    flags = {"pooling_mode_mean_tokens": mean, "pooling_mode_cls_token": not mean}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(flags))
    return str(folder)


def save_tiny_gpt2(folder: Path, **changes: Any) -> str:
    """A decoder whose tokenizer has no padding token."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(WORDS) + 4, n_embd=16, n_layer=1, n_head=2, n_positions=64, eos_token_id=3,
                        bos_token_id=2, **changes)  # fmt: skip
    GPT2Model(config).save_pretrained(folder)
    word_tokenizer(pad=False).save_pretrained(folder)
    return str(folder)


def toy(rows: int = 40, pair: bool = False, start: int = 0) -> pd.DataFrame:
    """Label 'up' where the first word is kind, 'down' where it is not; a score to match; two of three rows are 'up'.

    Rows are numbered from ``start``, and rows of different numbers have different texts.
    """
    kind, unkind = WORDS[0::4], WORDS[1::4]
    frame = []
    for i in range(start, start + rows):
        up = i % 3 > 0
        words = [(kind if up else unkind)[i % 4], WORDS[i // 16 % 16], WORDS[i % 16], *["plot"] * (i % 2)]
        frame.append({"text": " ".join(words), "label": "up" if up else "down", "score": 1.5 * up + (i % 5) / 10})
    table = pd.DataFrame(frame)
    return table.assign(other=[f"{WORDS[i % 16]} plot" for i in range(rows)]) if pair else table


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Contents of a folder that `fit` wrote."""
    return load_file(folder / "model.safetensors")


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def data_root() -> Path:
    """The benchmark data, or a skip."""
    root = Path(os.environ.get("STEADYTUNE_DATA", Path(__file__).parents[1].parent / "shared" / "data"))
    if not (root / "sst2" / "train.parquet").is_file():
        pytest.skip("benchmark data not found: set STEADYTUNE_DATA to its folder")
    return root
