"""Facts about real architectures, counted by hand; tiny random models, so that nothing is downloaded."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from architectures import CONFIGS, tiny
from steadytune.core.anatomy import Part, anatomy, depths, input_embedding

T5_BIAS = "transformer.encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"


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
    "Funnel": (4, 4 * 6 + 2, 1, {"classifier"}),  # nested lists; its base variant for classification has no decoder
    "GPT2": (2, 2 * 4 + 1, 2, {"score"}),
    "Gemma": (2, 2 * 7 + 1, 1, {"score"}),
    "Jamba": (2, (4 + 3) + (4 + 3) + 1, 1, {"score"}),  # a Mamba layer and an attention layer
    "Llama": (2, 2 * 7 + 1, 1, {"score"}),
    "MPNet": (2, 2 * 6 + 2, 3, {"classifier"}),
    "Mixtral": (2, 2 * 4 + 1, 1, {"score"}),
    "MobileBert": (2, 2 * (4 + 2 + 3 + 2) + 3, 3, {"classifier"}),  # three bottlenecks; one more ffn in a nested list
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


@pytest.mark.parametrize("architecture", CONFIGS)
def test_every_linear_layer_norm_and_embedding_is_found(architecture):
    model = tiny(architecture)
    parts = anatomy(model)
    expected = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            expected |= {f"{path}.weight": "linear", f"{path}.bias": "bias"}
        elif isinstance(module, nn.Embedding):
            expected[f"{path}.weight"] = "embedding"
        elif any(word in type(module).__name__ for word in ("LayerNorm", "RMSNorm", "NoNorm")):
            expected |= {f"{path}.weight": "norm", f"{path}.bias": "norm"}
    found = {name: part.kind for name, part in parts.items()}
    wrong = {name: kind for name, kind in expected.items() if found.get(name, kind) != kind}
    rest = {kind for name, kind in found.items() if name not in expected}
    assert not wrong
    assert rest <= {"linear", "bias"} if architecture == "GPT2" else rest <= {"other", "bias"}


@pytest.mark.parametrize(
    ("architecture", "name", "part"),
    [
        ("Albert", "albert.encoder.albert_layer_groups.0.albert_layers.0.ffn.weight", Part("linear", 0, False)),
        ("Albert", "albert.encoder.embedding_hidden_mapping_in.weight", Part("linear", None, False)),
        ("Albert", "albert.pooler.weight", Part("linear", None, False)),
        ("Bart", "model.shared.weight", Part("embedding", None, False)),
        ("Bart", "model.encoder.layers.1.fc1.weight", Part("linear", 1, False)),
        ("Bart", "model.decoder.layers.0.encoder_attn.q_proj.weight", Part("linear", 2, False)),
        ("Bart", "model.decoder.layers.2.final_layer_norm.bias", Part("norm", 4, False)),
        ("Bart", "classification_head.out_proj.weight", Part("linear", None, True)),
        ("Bert", "bert.embeddings.position_embeddings.weight", Part("embedding", None, False)),
        ("Bert", "bert.embeddings.LayerNorm.bias", Part("norm", None, False)),
        ("Bert", "bert.encoder.layer.1.attention.self.query.weight", Part("linear", 1, False)),
        ("Bert", "bert.encoder.layer.1.attention.self.query.bias", Part("bias", 1, False)),
        ("Bert", "bert.encoder.layer.0.output.LayerNorm.weight", Part("norm", 0, False)),
        ("Bert", "bert.pooler.dense.weight", Part("linear", None, False)),
        ("Bert", "classifier.weight", Part("linear", None, True)),
        ("Bert", "classifier.bias", Part("bias", None, True)),
        ("DebertaV2", "deberta.encoder.rel_embeddings.weight", Part("embedding", None, False)),
        ("DebertaV2", "deberta.encoder.conv.conv.weight", Part("other", None, False)),
        ("DebertaV2", "pooler.dense.weight", Part("linear", None, True)),
        ("Electra", "electra.embeddings_project.weight", Part("linear", None, False)),
        ("Funnel", "funnel.encoder.blocks.1.0.ffn.linear_1.weight", Part("linear", 2, False)),
        ("GPT2", "transformer.h.1.attn.c_attn.weight", Part("linear", 1, False, input_dim=0)),  # Conv1D
        ("GPT2", "transformer.h.1.attn.c_attn.bias", Part("bias", 1, False)),
        ("GPT2", "transformer.ln_f.weight", Part("norm", None, False)),
        ("GPT2", "score.weight", Part("linear", None, True)),
        ("Jamba", "model.layers.0.mamba.A_log", Part("other", 0, False)),
        ("Jamba", "model.layers.1.self_attn.q_proj.weight", Part("linear", 1, False)),
        ("MPNet", "mpnet.encoder.relative_attention_bias.weight", Part("embedding", None, False)),
        ("Mixtral", "model.layers.1.mlp.experts.down_proj", Part("other", 1, False)),
        ("MobileBert", "mobilebert.encoder.layer.1.ffn.0.output.dense.weight", Part("linear", 1, False)),
        ("MobileBert", "mobilebert.embeddings.LayerNorm.bias", Part("norm", None, False)),  # class NoNorm
        ("ModernBert", "head.dense.weight", Part("linear", None, False)),
        ("Qwen2", "model.layers.1.self_attn.q_proj.bias", Part("bias", 1, False)),
        ("Qwen2", "model.layers.1.input_layernorm.weight", Part("norm", 1, False)),
        ("T5", T5_BIAS, Part("embedding", 0, False)),
        ("T5", "transformer.decoder.block.2.layer.2.DenseReluDense.wo.weight", Part("linear", 4, False)),
        ("XLM", "transformer.attentions.1.q_lin.weight", Part("linear", 1, False)),
        ("XLM", "transformer.ffns.1.lin1.weight", Part("linear", 1, False)),
        ("XLM", "transformer.layer_norm2.1.weight", Part("norm", 1, False)),
        ("XLNet", "transformer.layer.1.rel_attn.q", Part("other", 1, False)),
        ("XLNet", "transformer.layer.1.rel_attn.r_w_bias", Part("other", 1, False)),
        ("XLNet", "transformer.mask_emb", Part("other", None, False)),
        ("XLNet", "sequence_summary.summary.weight", Part("linear", None, True)),
    ],
)
def test_single_parameters(architecture, name, part):
    assert anatomy(tiny(architecture))[name] == part


# Architecture: parameters outside the blocks that belong below them, and above them.
DEPTHS = {
    "Albert": (["embeddings.LayerNorm.weight", "encoder.embedding_hidden_mapping_in.weight"], ["pooler.weight"]),
    "Bart": (
        ["shared.weight", "encoder.layernorm_embedding.weight", "decoder.embed_positions.weight"],
        ["head.dense.bias"],
    ),
    "Bert": (["embeddings.position_embeddings.weight", "embeddings.LayerNorm.bias"], ["pooler.dense.bias"]),
    "DebertaV2": (["embeddings.word_embeddings.weight", "encoder.rel_embeddings.weight"], ["pooler.dense.weight"]),
    "DistilBert": (["embeddings.LayerNorm.weight"], ["pre_classifier.weight"]),
    "Electra": (["embeddings.LayerNorm.weight", "embeddings_project.weight"], ["classifier.dense.weight"]),
    "GPT2": (["wte.weight", "wpe.weight"], ["ln_f.weight", "score.weight"]),
    "Llama": (["embed_tokens.weight"], ["model.norm.weight", "score.weight"]),
    "ModernBert": (["embeddings.norm.weight"], ["model.final_norm.weight", "head.dense.weight"]),
    "Qwen2": (["embed_tokens.weight"], ["model.norm.weight"]),
    "Roberta": (["embeddings.LayerNorm.weight"], ["classifier.dense.weight"]),
    "T5": (["shared.weight"], ["decoder.final_layer_norm.weight", "classification_head.dense.weight"]),
    "XLNet": (["mask_emb", "word_embedding.weight"], ["sequence_summary.summary.weight"]),
}


@pytest.mark.parametrize("architecture", DEPTHS)
def test_depths(architecture):
    model = tiny(architecture)
    parts, found = anatomy(model), depths(model)
    top = SEQUENCE_CLASSIFICATION[architecture][0]
    assert list(found) == list(parts)
    for ends, depth in zip(DEPTHS[architecture], (-1, top), strict=True):
        for end in ends:
            assert {found[name] for name in found if name.endswith(end)} == {depth}, end
    assert all(found[name] == part.block for name, part in parts.items() if part.block is not None)
    assert all(found[name] == top for name, part in parts.items() if part.head)


def test_what_stands_between_two_stacks_belongs_to_the_one_below():
    found = depths(tiny("T5"))
    assert found["transformer.encoder.final_layer_norm.weight"] == 1


def test_a_body_that_is_named_for_embeddings_is_none():
    model = nn.ModuleDict({"embedder": tiny("Albert", ""), "out": nn.Linear(8, 2)})
    found = depths(model)
    assert (found["embedder.embeddings.LayerNorm.weight"], found["embedder.pooler.weight"], found["out.bias"]) == (
        -1,
        1,
        1,
    )


@pytest.mark.parametrize(
    ("architecture", "task", "new"),
    [
        ("Bert", "TokenClassification", {"classifier"}),
        ("Bert", "MultipleChoice", {"classifier"}),
        ("DebertaV2", "TokenClassification", {"classifier"}),
        ("ModernBert", "TokenClassification", {"classifier"}),
        ("Qwen2", "TokenClassification", {"score"}),
        ("T5", "TokenClassification", {"classifier"}),
        ("XLNet", "TokenClassification", {"classifier"}),
        ("Bart", "QuestionAnswering", {"qa_outputs"}),
        ("Llama", "QuestionAnswering", {"qa_outputs"}),
        ("T5", "QuestionAnswering", {"qa_outputs"}),  # has no base submodule
        ("Albert", "PreTraining", set()),
        ("Bert", "PreTraining", set()),
        ("Bert", "NextSentencePrediction", set()),
        ("Electra", "PreTraining", set()),  # has no output embeddings
        ("Bert", "", set()),  # bare base models
        ("T5", "", set()),
    ],
)
def test_heads_of_other_tasks(architecture, task, new):
    assert heads(anatomy(tiny(architecture, task))) == new


@pytest.mark.parametrize(
    ("architecture", "task", "table", "output"),
    [
        ("Albert", "MaskedLM", "albert.embeddings.word_embeddings", "predictions.decoder"),
        ("Bart", "Seq2SeqLM", "model.shared", "lm_head"),
        ("Bert", "MaskedLM", "bert.embeddings.word_embeddings", "cls.predictions.decoder"),
        ("DebertaV2", "MaskedLM", "deberta.embeddings.word_embeddings", "cls.predictions.decoder"),
        ("DistilBert", "MaskedLM", "distilbert.embeddings.word_embeddings", "vocab_projector"),
        ("Electra", "MaskedLM", "electra.embeddings.word_embeddings", "generator_lm_head"),
        ("GPT2", "CausalLM", "transformer.wte", "lm_head"),
        ("Gemma", "CausalLM", "model.embed_tokens", "lm_head"),
        ("MPNet", "MaskedLM", "mpnet.embeddings.word_embeddings", "lm_head.decoder"),
        ("ModernBert", "MaskedLM", "model.embeddings.tok_embeddings", "decoder"),
        ("Roberta", "MaskedLM", "roberta.embeddings.word_embeddings", "lm_head.decoder"),
        ("T5", "Seq2SeqLM", "shared", "lm_head"),
        ("XLNet", "CausalLM", "transformer.word_embedding", "lm_loss"),
    ],
)
def test_tied_language_model_head_is_the_embedding_and_no_new_head(architecture, task, table, output):
    model = tiny(architecture, task, tie_word_embeddings=True)
    parts = anatomy(model)
    assert model.get_submodule(output).weight is model.get_submodule(table).weight
    assert parts[f"{table}.weight"] == Part("embedding", None, False)
    assert f"{output}.weight" not in parts
    assert heads(parts) == set()
    assert blocks(parts) == list(range(SEQUENCE_CLASSIFICATION[architecture][0]))


def test_untied_language_model_head_is_linear_and_no_new_head():
    parts = anatomy(tiny("Llama", "CausalLM", tie_word_embeddings=False))
    assert parts["lm_head.weight"] == Part("linear", None, False)


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("Albert", "PreTraining"),
        ("Bart", "Seq2SeqLM"),
        ("Bert", "PreTraining"),
        ("DebertaV2", "MaskedLM"),
        ("DistilBert", "MaskedLM"),
        ("Electra", "PreTraining"),
        ("GPT2", "CausalLM"),
        ("Llama", "CausalLM"),
        ("ModernBert", "MaskedLM"),
        ("Roberta", "MaskedLM"),
        ("XLNet", "CausalLM"),
    ],
)
def test_heads_are_what_transformers_finds_missing_in_a_pretrained_checkpoint(tmp_path, architecture, task):
    tiny(architecture, task).save_pretrained(tmp_path)
    load = transformers.AutoModelForSequenceClassification.from_pretrained
    model, info = load(tmp_path, output_loading_info=True)
    assert {name for name, part in anatomy(model).items() if part.head} == set(info["missing_keys"]) != set()


class Wrapper(nn.Module):
    """What DistributedDataParallel does to names."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("architecture", ["Albert", "Bart", "Bert", "GPT2", "ModernBert", "XLM"])
@pytest.mark.parametrize(
    ("wrap", "prefix"),
    [
        (Wrapper, "module."),
        (torch.compile, "_orig_mod."),
        (lambda model: torch.compile(Wrapper(model)), "_orig_mod.module."),
    ],
    ids=["ddp", "compile", "both"],
)
def test_wrappers_change_names_only(architecture, wrap, prefix):
    model = tiny(architecture)
    plain, wrapped = anatomy(model), wrap(model)
    assert anatomy(wrapped) == {prefix + name: part for name, part in plain.items()}
    assert list(anatomy(wrapped)) == [name for name, _ in wrapped.named_parameters()]
    assert input_embedding(wrapped) is input_embedding(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
def test_lora():
    peft = get_peft_model(tiny("Bert"), LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query"]))
    parts = anatomy(peft)
    query = "base_model.model.bert.encoder.layer.1.attention.self.query."
    assert list(parts) == [name for name, _ in peft.named_parameters()]
    for leaf in ("base_layer.weight", "lora_A.default.weight", "lora_B.default.weight"):
        assert parts[query + leaf] == Part("linear", 1, False)
    assert parts[query + "base_layer.bias"] == Part("bias", 1, False)
    assert parts["base_model.model.bert.pooler.dense.weight"] == Part("linear", None, False)
    copies = {"original_module.weight", "original_module.bias", "modules_to_save.default.weight"}
    copies |= {"modules_to_save.default.bias"}
    new = {name for name, part in parts.items() if part.head}
    assert new == {f"base_model.model.classifier.{copy}" for copy in copies}
    assert blocks(parts) == [0, 1]
    assert input_embedding(peft) is peft.base_model.model.bert.embeddings.word_embeddings


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
def test_lora_on_conv1d_and_on_the_embedding():
    config = LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["c_attn", "wte"], fan_in_fan_out=True)
    peft = get_peft_model(tiny("GPT2"), config)
    parts = anatomy(peft)
    attention = "base_model.model.transformer.h.0.attn.c_attn."
    assert parts[attention + "base_layer.weight"] == Part("linear", 0, False, input_dim=0)
    assert parts[attention + "lora_A.default.weight"] == Part("linear", 0, False)
    assert parts["base_model.model.transformer.wte.base_layer.weight"] == Part("embedding", None, False)
    assert input_embedding(peft) is peft.base_model.model.transformer.wte  # with its adapter, not the layer inside


class Classifier(nn.Module):
    """Somebody's own model around a base model."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = tiny("Bert", "")
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 99), nn.Linear(99, 8)) for _ in range(3))
        self.out = nn.Linear(8, 2)


def test_own_module_around_a_transformers_model():
    model = Classifier()
    parts = anatomy(model)
    assert heads(parts) == {"experts", "out"}
    assert blocks(parts) == [0, 1]
    assert parts["experts.0.0.weight"] == Part("linear", None, True)
    assert parts["encoder.pooler.dense.weight"] == Part("linear", None, False)
    assert input_embedding(model) is model.encoder.embeddings.word_embeddings


class OwnPreTrainedModel(transformers.BertPreTrainedModel):
    """The same, as a transformers model whose base is not where `base_model_prefix` says."""

    def __init__(self) -> None:
        bert = tiny("Bert", "")
        super().__init__(bert.config)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(8, 999), nn.Linear(999, 8)) for _ in range(3))
        self.backbone = bert
        self.out = nn.Linear(8, 2)


def test_own_pretrained_model_around_a_base():
    parts = anatomy(OwnPreTrainedModel())
    assert heads(parts) == {"experts", "out"}
    assert blocks(parts) == [0, 1]
    assert parts["experts.1.0.weight"] == Part("linear", None, True)
    assert parts["backbone.encoder.layer.1.output.dense.weight"] == Part("linear", 1, False)


class Plain(nn.Module):
    """A model without transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(8, 2) for _ in range(3))  # single matrices: no blocks
        self.small = nn.ModuleList(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)) for _ in range(2))  # no blocks
        self.out = nn.Linear(8, 9, bias=False)
        self.tokens = nn.Embedding(9, 8)
        self.positions = nn.Embedding(5, 8)
        self.out.weight = self.tokens.weight  # tied, and the linear name comes first
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16), 2)
        self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True)
        self.down = nn.ModuleList(nn.LSTM(8, 8) for _ in range(2))
        self.up = nn.ModuleList(nn.LSTM(8, 8) for _ in range(2))  # side by side and as long, yet later
        self.batch_norm = nn.BatchNorm1d(8)
        self.convolution = nn.Conv1d(8, 8, 1)
        self.scale = nn.Parameter(torch.ones(()))


def test_plain_torch_module():
    model = Plain()
    parts = anatomy(model)
    assert heads(parts) == set()
    assert blocks(parts) == list(range(8))
    assert parts["heads.0.weight"] == parts["small.0.0.weight"] == Part("linear", None, False)
    assert parts["out.weight"] == Part("embedding", None, False)
    assert "tokens.weight" not in parts
    assert parts["encoder.layers.1.self_attn.in_proj_weight"] == Part("linear", 1, False)
    assert parts["encoder.layers.1.self_attn.in_proj_bias"] == Part("bias", 1, False)
    assert parts["encoder.layers.1.self_attn.out_proj.weight"] == Part("linear", 1, False)
    assert parts["decoder.layers.0.multihead_attn.out_proj.weight"] == Part("linear", 2, False)
    assert parts["attention.bias_k"] == Part("other", None, False)  # (1, 1, width)
    assert parts["up.1.weight_ih_l0"] == parts["up.1.bias_ih_l0"] == Part("other", 7, False)
    assert parts["batch_norm.bias"] == Part("norm", None, False)
    assert parts["convolution.weight"] == parts["scale"] == Part("other", None, False)
    assert parts["convolution.bias"] == Part("bias", None, False)
    assert input_embedding(model) is model.tokens


@pytest.mark.parametrize(
    "model",
    [nn.Linear(2, 2), nn.Sequential(), nn.ModuleList([nn.Linear(2, 2)]), nn.ModuleList()],
    ids=["linear", "empty", "list", "empty list"],
)
def test_models_without_blocks(model):
    assert blocks(anatomy(model)) == []
    assert len(anatomy(model)) == len(list(model.parameters()))


def test_subclasses_count():
    class Mine(nn.Linear):
        pass

    class Scale(nn.LayerNorm):
        pass

    class Words(nn.Embedding):
        pass

    parts = anatomy(nn.Sequential(Mine(2, 2, bias=False), Scale(2, bias=False), Words(2, 2)))
    assert [part.kind for part in parts.values()] == ["linear", "norm", "embedding"]


@pytest.mark.parametrize("architecture", CONFIGS)
def test_input_embedding_is_called_with_the_tokens(architecture):
    model = tiny(architecture)
    tokens = torch.tensor([[5, 6, 7, 2], [8, 9, 3, 2]])
    calls = []
    handle = input_embedding(model).register_forward_hook(lambda module, args, output: calls.append((args[0], output)))
    model(input_ids=tokens)
    handle.remove()
    assert len(calls) == 1  # not the decoder's too
    seen, output = calls[0]
    assert torch.equal(seen, tokens.T if architecture == "XLNet" else tokens)  # XLNet's order is (length, batch)
    assert output.shape[:-1] == seen.shape


@pytest.mark.parametrize(("architecture", "task"), [("T5", "TokenClassification"), ("T5", "Seq2SeqLM"), ("Bart", "")])
def test_input_embedding_is_the_encoders(architecture, task):
    model = tiny(architecture, task)
    assert input_embedding(model) is model.base_model.encoder.embed_tokens is not model.get_input_embeddings()


def test_input_embedding_honours_the_users_own_method():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = nn.Embedding(9, 2), nn.Embedding(5, 2)

        def get_input_embeddings(self) -> nn.Module:
            return self.small

    model = Own()
    assert input_embedding(model) is model.small


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(2, 2), "Linear has no nn.Embedding: define get_input_embeddings"),
        (nn.Sequential(nn.Embedding(9, 2), nn.Embedding(9, 2)), "Sequential has 2 embeddings of 9 rows"),
    ],
    ids=["none", "tie"],
)
def test_input_embedding_refuses_to_guess(model, message):
    with pytest.raises(ValueError, match=message):
        input_embedding(model)


def test_input_embedding_refuses_two_models():
    towers = nn.ModuleList([tiny("Bert", ""), tiny("Bert", "")])
    with pytest.raises(ValueError, match=r"ModuleList contains 2 transformers models \(BertModel, BertModel\)"):
        input_embedding(towers)


def test_blocks_of_several_models_are_counted_on():
    parts = anatomy(nn.ModuleList([tiny("XLM", ""), tiny("Bert", "")]))
    assert blocks(parts) == [0, 1, 2, 3]
    assert parts["1.encoder.layer.0.intermediate.dense.weight"].block == 2


def test_layers_that_share_weights_are_the_first_block():
    first, second = (nn.TransformerEncoderLayer(8, 2, 16) for _ in range(2))
    assert blocks(anatomy(nn.ModuleList([first] * 12))) == [0]
    assert blocks(anatomy(nn.ModuleList([first, second, first]))) == [0, 1]
