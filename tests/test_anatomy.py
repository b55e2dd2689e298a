"""Facts about real architectures, counted by hand; tiny random models, so that nothing is downloaded."""

from collections import Counter

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from steadytune.anatomy import Part, anatomy, input_embedding

SIZES = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 20,
}
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
DECODER = {**SIZES, **TOKENS, "num_key_value_heads": 1}
BART = {"vocab_size": 30, "d_model": 8, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 16} | {
    "decoder_ffn_dim": 16,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 20,
    **TOKENS,
}
CONFIGS: dict[str, dict] = {
    "Albert": {**SIZES, "embedding_size": 4},
    "Bart": BART,
    "Bert": SIZES,
    "DebertaV2": {**SIZES, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 4}
    | {"norm_rel_ebd": "layer_norm", "share_att_key": True, "conv_kernel_size": 3},
    "DistilBert": {"vocab_size": 30, "dim": 8, "hidden_dim": 16, "n_layers": 2, "n_heads": 2}
    | {"max_position_embeddings": 20},
    "Electra": {**SIZES, "embedding_size": 4},
    "Funnel": {"vocab_size": 30, "block_sizes": [2, 1], "num_decoder_layers": 1, "d_model": 8, "n_head": 2}
    | {"d_head": 4, "d_inner": 16},
    "GPT2": {"vocab_size": 30, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 20, **TOKENS},
    "Gemma": {**DECODER, "head_dim": 4},
    "Jamba": {**DECODER, "attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "use_mamba_kernels": False},
    "Llama": DECODER,
    "MPNet": SIZES,
    "Mixtral": {**DECODER, "num_local_experts": 2},
    "MobileBert": {**SIZES, "embedding_size": 4, "intra_bottleneck_size": 8, "num_feedforward_networks": 2},
    "ModernBert": {**SIZES, **TOKENS, "cls_token_id": 1, "sep_token_id": 2},
    "Qwen2": DECODER,
    "Roberta": SIZES,
    "T5": {"vocab_size": 30, "d_model": 8, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_decoder_layers": 3}
    | {"num_heads": 2, **TOKENS, "decoder_start_token_id": 0},
    "XLM": {"vocab_size": 30, "emb_dim": 8, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 20},
    "XLNet": {"vocab_size": 30, "d_model": 8, "n_layer": 2, "n_head": 2, "d_inner": 16},
}


def tiny(architecture: str, task: str = "SequenceClassification", **changes: object) -> PreTrainedModel:
    config: PreTrainedConfig = getattr(transformers, architecture + "Config")(**CONFIGS[architecture] | changes)
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel").from_config(config)
    return model.eval()


def heads(parts: dict[str, Part]) -> set[str]:
    return {name.split(".")[0] for name, part in parts.items() if part.head}


def blocks(parts: dict[str, Part]) -> list[int]:
    return sorted({part.block for part in parts.values() if part.block is not None})


def count(parts: dict[str, Part], kind: str) -> int:
    return sum(part.kind == kind for part in parts.values())


# Architecture: blocks, linear matrices, embedding tables, top-level modules that are heads.
SEQUENCE_CLASSIFICATION = {
    "Albert": (1, 6 + 3, 3, {"classifier"}),  # one shared block; embedding projection, pooler, classifier
    "Bart": (2 + 3, 2 * 6 + 3 * 10 + 2, 1 + 2, {"classification_head"}),
    "Bert": (2, 2 * 6 + 2, 3, {"classifier"}),
    "DebertaV2": (2, 2 * 6 + 2, 3, {"pooler", "classifier"}),  # tables: words, positions, relative positions
    "DistilBert": (2, 2 * 6 + 2, 2, {"pre_classifier", "classifier"}),
    "Electra": (2, 2 * 6 + 3, 3, {"classifier"}),
    "Funnel": (3, 3 * 6 + 2, 1, {"classifier"}),  # nested lists; its base variant for classification has no decoder
    "GPT2": (2, 2 * 4 + 1, 2, {"score"}),
    "Gemma": (2, 2 * 7 + 1, 1, {"score"}),
    "Jamba": (2, (4 + 3) + (4 + 3) + 1, 1, {"score"}),  # a Mamba layer and an attention layer
    "Llama": (2, 2 * 7 + 1, 1, {"score"}),
    "MPNet": (2, 2 * 6 + 2, 3, {"classifier"}),
    "Mixtral": (2, 2 * 4 + 1, 1, {"score"}),
    "MobileBert": (2, 2 * (4 + 2 + 2 + 3) + 2, 3, {"classifier"}),  # bottlenecks; an extra ffn in a nested list; see below
    "ModernBert": (2, 2 * 4 + 2, 1, {"classifier"}),
    "Qwen2": (2, 2 * 7 + 1, 1, {"score"}),
    "Roberta": (2, 2 * 6 + 2, 3, {"classifier"}),
    "T5": (2 + 3, 2 * 6 + 3 * 10 + 2, 1 + 2, {"classification_head"}),  # tables: words, relative positions of both
    "XLM": (2, 2 * 6 + 1, 2, {"sequence_summary"}),
    "XLNet": (2, 2 * 2 + 2, 1, {"sequence_summary", "logits_proj"}),
}


@pytest.mark.parametrize("architecture", CONFIGS)
def test_sequence_classification(architecture):
    model = tiny(architecture)
    parts = anatomy(model)
    n_blocks, n_linear, n_tables, new = SEQUENCE_CLASSIFICATION[architecture]
    assert list(parts) == [name for name, _ in model.named_parameters()]
    assert blocks(parts) == list(range(n_blocks))
    assert count(parts, "linear") == n_linear
    assert count(parts, "embedding") == n_tables
    assert heads(parts) == new
    assert not any(part.head and part.block is not None for part in parts.values())
