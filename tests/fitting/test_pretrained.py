"""What comes from a checkpoint and what does not, and what model, tokenizer and rows have to agree on."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BartConfig,
    BartModel,
    BertConfig,
    BertForMaskedLM,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertModel,
    RobertaConfig,
    RobertaModel,
)

from fit_helpers import WORDS, save_tiny_bert, save_tiny_gpt2, toy, word_tokenizer
from steadytune import FittedModel, fit
from steadytune.core.anatomy import anatomy
from steadytune.data.problem import Classification
from steadytune.errors import UsageError
from steadytune.fitting.pretrained import Pretrained, matching

QUICK = {"steps": 2, "batch_size": 4, "progress": False, "save_steps": 0, "validation_share": 0.0}
TWO = Classification(("down", "up"))
SIZE = {"vocab_size": len(WORDS) + 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 32}  # fmt: skip


@pytest.fixture
def bert(tmp_path):
    return save_tiny_bert(tmp_path / "bert")


def renamed(folder, rename):
    file = Path(folder, "model.safetensors")
    save_file({rename(name): t.clone() for name, t in load_file(file).items()}, file, metadata={"format": "pt"})


def configured(folder, **settings):
    file = Path(folder, "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


# ---- what is new ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: f"module.{name}",
        lambda name: f"base_model.model.{name}",
        lambda name: name.replace("encoder.layer.1", "encoder.layer.one"),
        lambda name: name.replace("pooler", "old.pooler"),
    ],
    ids=["module", "base_model", "one block", "pooler of another name"],
)
def test_weights_under_other_names_are_an_error_that_names_them(bert, tmp_path, rename):
    """Naive: the body is drawn at random, and one line of the log says so."""
    renamed(bert, rename)
    with pytest.raises(UsageError, match=r"weights would be drawn at random.*bert\.\w+.*weights of other names"):
        fit(toy(20), model=bert, output=tmp_path / "o", **QUICK)
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("settings", [{"intermediate_size": 48}, {"vocab_size": 99}, {"max_position_embeddings": 99}])
def test_a_config_of_another_size_is_an_error(bert, settings):
    configured(bert, **settings)
    with pytest.raises(UsageError, match=r"in other sizes than config\.json says"):
        Pretrained.open(bert, TWO).load(0)


@pytest.mark.parametrize(
    "settings", [{"return_dict": False}, {"output_hidden_states": True, "output_attentions": True}]
)
def test_a_folder_that_asks_for_other_outputs_is_trained_and_written(bert, tmp_path, settings):
    """Naive: a tuple has no logits; the folder cannot be written at the end, as sdpa gives no attentions."""
    configured(bert, **settings)
    fitted = fit(toy(40), model=str(bert), output=tmp_path / "out", steps=1, progress=False, probe=False)
    assert len(fitted.predict(["a text"])) == 1


@pytest.mark.parametrize("names", [{"1": "a", "2": "b"}, {"7": "a"}])
def test_class_numbers_with_gaps_are_no_error(bert, tmp_path, names):
    configured(bert, id2label=names, label2id={name: int(i) for i, name in names.items()})
    fit(toy(40), model=str(bert), output=tmp_path / "out", steps=1, progress=False, probe=False)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_before_training(bert, tmp_path, value):
    """Naive: "training diverged. Lower lr", before the first step."""
    file = Path(bert, "model.safetensors")
    held = load_file(file)
    name = next(key for key in held if key.endswith("layer.0.output.dense.bias"))
    save_file({**held, name: held[name] + value}, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match=rf"1 of its weights hold values that are not finite \(.*{name}\)"):
        fit(toy(40), model=str(bert), output=tmp_path / "out", steps=1, progress=False)


def test_layers_that_the_config_leaves_out_are_said(bert, tmp_path, caplog):
    """A config of another model: half of the layers would be dropped without a word."""
    configured(bert, num_hidden_layers=1)
    with caplog.at_level("INFO", "steadytune"):
        fit(toy(40), model=str(bert), output=tmp_path / "out", steps=1, progress=False, probe=False)
    assert "16 weights of the checkpoint have no place in the model and are not used" in caplog.text


def test_a_pooler_that_no_checkpoint_of_the_kind_holds_may_be_new(tmp_path):
    BertForMaskedLM(BertConfig(**SIZE)).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    model = Pretrained.open(str(tmp_path), TWO).load(0)
    held = load_file(tmp_path / "model.safetensors")
    name = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(model.state_dict()[name], held[name])
    assert not any("pooler" in key for key in held)


def modern_bert(folder, kind=ModernBertModel):
    config = ModernBertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, pad_token_id=0,
        cls_token_id=2, sep_token_id=3,
    )  # fmt: skip
    kind(config).save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return Pretrained.open(str(folder), TWO)


@pytest.mark.parametrize(("kind", "new"), [(ModernBertModel, True), (ModernBertForMaskedLM, False)])
def test_a_dense_layer_after_the_body_may_be_new_and_counts_as_new_then(tmp_path, kind, new):
    """Naive: a sentence encoder is refused, as it lacks what checkpoints of the language model hold."""
    pretrained = modern_bert(tmp_path, kind)
    model = pretrained.load(0)
    assert ("head.dense.weight" in pretrained.new) is new
    assert anatomy(model)["head.dense.weight"].head is new
    assert not anatomy(model)["model.layers.0.mlp.Wi.weight"].head


def test_a_dense_layer_that_the_checkpoint_holds_under_another_name_is_an_error(tmp_path):
    pretrained = modern_bert(tmp_path, ModernBertForMaskedLM)
    renamed(tmp_path, lambda name: name.replace("head.dense", "old.head.dense"))
    with pytest.raises(UsageError, match=r"weights would be drawn at random.*head\.dense\.weight"):
        pretrained.load(0)


# ---- heads ------------------------------------------------------------------------------------------------------


def classifier(folder, names):
    """A checkpoint with a head for these classes."""
    model = Pretrained.open(str(folder), Classification(tuple(names))).load(3)
    torch.nn.init.normal_(model.classifier.bias)
    target = Path(folder).parent / "classifier"
    model.save_pretrained(target)
    word_tokenizer().save_pretrained(target)
    return str(target), model.classifier


@pytest.mark.parametrize("names", [("up", "down", "flat"), ("Flat", "DOWN ", "up")])
def test_the_rows_of_a_head_follow_the_names_of_its_classes(bert, names, caplog):
    """Naive: the head is kept row by row, and says 'up' for what it knows as 'down'."""
    caplog.set_level(logging.INFO, "steadytune")
    folder, head = classifier(bert, ["down", "flat", "up"])
    found = Pretrained.open(folder, Classification(names)).load(0).classifier
    order = [["down", "flat", "up"].index(name.strip().lower()) for name in names]
    assert torch.equal(found.weight, head.weight[order])
    assert torch.equal(found.bias, head.bias[order])
    assert "the head of the checkpoint is kept" in caplog.text
    assert "rows put in their order" in caplog.text


@pytest.mark.parametrize("names", [("late", "urgent"), ("down", "flat")])
def test_the_head_of_other_classes_is_drawn_anew_and_said_to_be(bert, names, caplog):
    folder, head = classifier(bert, ["down", "up"])
    pretrained = Pretrained.open(folder, Classification(names))
    one, again, other = (pretrained.load(seed) for seed in (0, 0, 1))
    assert not torch.equal(one.classifier.weight, head.weight)
    assert torch.equal(one.classifier.weight, again.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    assert not one.classifier.bias.any()
    assert caplog.text.count("is for other classes (down, up)") == 1


def test_classes_match_by_name():
    assert matching(["b", "a"], ["a", "b"]) == [1, 0]
    assert matching(["A", "a"], ["A", "a"]) == [0, 1]  # differ in case alone, and are the same
    assert matching(["A", "a"], ["a", "A"]) is None
    assert matching(["LABEL_0", "LABEL_1"], ["no", "yes"]) is None


# ---- model and tokenizer ----------------------------------------------------------------------------------------


def changed_by_a_neighbour(model):
    short = "good film"
    return np.abs(model.predict_proba([short])[0] - model.predict_proba([short, short + " plot" * 30])[0]).max()


@pytest.mark.parametrize("padding", [0, 1, 7, 999])
def test_a_decoder_takes_its_answer_from_the_row_and_not_from_its_padding(tmp_path, padding):
    """Naive: the config pads with one number, the tokenizer with another, and the model pools padding."""
    folder = save_tiny_gpt2(tmp_path / "gpt2", initializer_range=0.5)
    configured(folder, pad_token_id=padding)
    result = fit(toy(24), model=folder, output=tmp_path / "o", **QUICK)
    assert changed_by_a_neighbour(result) < 1e-6
    assert changed_by_a_neighbour(FittedModel.load(result.output)) < 1e-6
    assert AutoConfig.from_pretrained(result.output).pad_token_id == result.model.tokenizer.pad_token_id


@pytest.mark.parametrize("given", [{}, {"max_length": 8}])
def test_positions_that_begin_after_the_padding_number_hold_fewer_tokens(tmp_path, given):
    """Naive: 20 positions, hence 20 tokens; the model has room for 19, and fails in the middle of training."""
    RobertaModel(RobertaConfig(**SIZE, max_position_embeddings=20, pad_token_id=0)).save_pretrained(tmp_path / "m")
    word_tokenizer().save_pretrained(tmp_path / "m")
    late = {"late": toy(8, start=100).assign(text=lambda rows: rows["text"] + " plot" * 40)}
    result = fit(toy(24), model=tmp_path / "m", output=tmp_path / "o", tests=late, **QUICK, **given)
    assert result.model.max_length == given.get("max_length", 19)
    with pytest.raises(UsageError, match="max_length must be at most 19"):
        fit(toy(24), model=tmp_path / "m", output=tmp_path / "p", **QUICK, max_length=20)


def test_a_model_that_counts_positions_from_another_padding_number_is_refused(tmp_path):
    RobertaModel(RobertaConfig(**SIZE, max_position_embeddings=20, pad_token_id=5)).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(UsageError, match="config pads with token 5, its tokenizer with 0"):
        Pretrained.open(str(tmp_path), TWO)


def test_tokens_that_the_model_has_no_row_for_are_named_before_training(tmp_path):
    """Naive: IndexError, in whichever batch the row happens to be."""
    small = {**SIZE, "vocab_size": len(WORDS)}
    AutoModelForSequenceClassification.from_config(BertConfig(**small)).base_model.save_pretrained(tmp_path / "m")
    word_tokenizer().save_pretrained(tmp_path / "m")
    rows = pd.DataFrame({"text": ["good film", "bad film"] * 12, "label": ["up", "down"] * 12})
    tests = {"t": pd.DataFrame({"text": ["good film", "good cold"], "label": ["up", "up"]})}
    with pytest.raises(UsageError, match="t row 1 holds token 19, and the model has embeddings for 16 tokens"):
        fit(rows, model=tmp_path / "m", output=tmp_path / "o", tests=tests, **QUICK)
    result = fit(rows, model=tmp_path / "m", output=tmp_path / "o", **QUICK)
    with pytest.raises(UsageError, match="given row 1 holds token 19"):
        result.predict(["good film", "good cold"])


def test_the_string_of_a_special_token_is_text_to_models_that_count_end_tokens(tmp_path):
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
             "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}  # fmt: skip
    special = {"eos_token_id": 3, "pad_token_id": 0, "bos_token_id": 2, "decoder_start_token_id": 3}
    config = BartConfig(vocab_size=len(WORDS) + 4, max_position_embeddings=64, **sizes, **special)
    BartModel(config).save_pretrained(tmp_path / "m")
    tokenizer = word_tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "m")
    rows = toy(24)
    rows.loc[3, "text"] += " [SEP] plot"
    result = fit(rows, model=tmp_path / "m", output=tmp_path / "o", **QUICK)
    for model in (result.model, FittedModel.load(result.output)):
        assert model.predict_proba(["good [SEP] film", "bad film"]).shape == (2, 2)


# ---- the end, before the beginning -------------------------------------------------------------------------------


def test_what_fails_at_the_end_fails_before_training(bert, tmp_path, monkeypatch):
    def broken(*args):
        raise KeyError("probability_up")

    monkeypatch.setattr("steadytune.fitting.rehearsal.model_card", broken)
    with pytest.raises(UsageError, match=r"before any training.*probability_up"):
        fit(toy(20), model=bert, output=tmp_path / "o", **QUICK)
    assert not (tmp_path / "o").exists()


def test_texts_that_are_cut_are_said_for_every_set_and_in_predict(bert, tmp_path, caplog):
    long = toy(9, start=100).assign(text=lambda rows: rows["text"] + " plot" * 70)
    result = fit(toy(20), model=bert, output=tmp_path / "o", tests={"late": long}, **QUICK)
    assert "the late rows: texts of 9 of 9 rows (100 %) have more than 64 tokens and are cut" in caplog.text
    caplog.clear()
    result.predict(["plot " * 70, "good"])
    assert "the given rows: texts of 1 of 2 rows (50 %) have more than 64 tokens" in caplog.text


def test_the_random_state_and_the_settings_of_the_caller_are_left_as_they_were(bert, tmp_path):
    """Naive: after every fit, unseeded draws are the same."""
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    expected = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    result = fit(toy(20), model=bert, output=tmp_path / "o", **QUICK)
    FittedModel.load(result.output)
    with pytest.raises(UsageError):
        fit(toy(20), model=bert, output=tmp_path / "p", methods="rdrop", dropout=0.0, **QUICK)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == expected
