"""Tiny random models of many architectures, so that nothing is downloaded."""

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

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
    "Funnel": {"vocab_size": 30, "block_sizes": [2, 2], "num_decoder_layers": 1, "d_model": 8, "n_head": 2}
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
OTHERS: dict[str, dict] = {  # for the tests of heads alone: their bodies are like those above
    "BigBird": {**SIZES, "attention_type": "original_full"},
    "Camembert": {**SIZES, **TOKENS},
    "ConvBert": {**SIZES, "embedding_size": 8},
    "Ernie": SIZES,
    "EuroBert": DECODER,
    "Mistral": DECODER,
    "OPT": {"vocab_size": 30, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 16}
    | {"max_position_embeddings": 20, "word_embed_proj_dim": 8, **TOKENS},
    "XLMRoberta": {**SIZES, **TOKENS},
}


def tiny(architecture: str, task: str = "SequenceClassification", **changes: object) -> PreTrainedModel:
    sizes = {**CONFIGS, **OTHERS}[architecture]
    config: PreTrainedConfig = getattr(transformers, architecture + "Config")(**sizes | changes)
    torch.manual_seed(0)
    model: PreTrainedModel = getattr(transformers, f"AutoModelFor{task}" if task else "AutoModel").from_config(config)
    return model.eval()
