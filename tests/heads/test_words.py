"""Heads that begin as words: equal to the language model's logits where they can be, refused elsewhere."""

from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaConfig,
    ModernBertConfig,
)

from fit_helpers import WORDS, save_masked_bert, toy, word_tokenizer
from steadytune import HeadInit, MaskTraining, Run, fit
from steadytune.errors import UsageError
from steadytune.heads.words import word_head

SIZES = {
    "vocab_size": len(WORDS) + 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 32, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3,
}  # fmt: skip
TEXTS = ["good film", "awful plot story", "play"]


def modern(folder: Path, **changes) -> str:
    torch.manual_seed(0)
    config = ModernBertConfig(**SIZES, cls_token_id=2, sep_token_id=3, **changes)
    model = AutoModelForMaskedLM.from_config(config)
    torch.nn.init.normal_(model.decoder.bias)
    return saved(model, folder)


def llama(folder: Path) -> str:
    torch.manual_seed(0)
    return saved(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, tie_word_embeddings=False)), folder)


def saved(model, folder: Path) -> str:
    model.save_pretrained(folder)
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def classifier(name: str, classes: int = 2):
    return AutoModelForSequenceClassification.from_pretrained(name, num_labels=classes, dtype=torch.float32).eval()


def begun(name: str, words: str):
    model = classifier(name)
    Run(model, [HeadInit(how="words", words=words)])
    return model


@torch.no_grad()
def test_modern_bert_starts_with_the_words_in_the_place_of_the_first_token(tmp_path):
    name = modern(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(name)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    language = AutoModelForMaskedLM.from_pretrained(name).eval()
    wanted = language(**inputs).logits[:, 0, tokenizer.convert_tokens_to_ids(["awful", "great"])]
    assert torch.allclose(begun(name, "awful/great")(**inputs).logits, wanted, atol=1e-6)


@torch.no_grad()
def test_a_decoder_starts_with_the_words_that_may_follow(tmp_path):
    name = llama(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(name)
    inputs = tokenizer(TEXTS, padding=True, return_tensors="pt", return_token_type_ids=False)
    language = AutoModelForCausalLM.from_pretrained(name).eval()
    last = inputs["attention_mask"].sum(1) - 1
    wanted = language(**inputs).logits[torch.arange(3), last][:, tokenizer.convert_tokens_to_ids(["bad", "good"])]
    assert torch.allclose(begun(name, "bad/good")(**inputs).logits, wanted, atol=1e-6)


def test_a_decoder_without_a_padding_token_begins_too(tmp_path):
    """Naive: two rows are compared, which such a model refuses, or its number of the padding token."""
    name = llama(tmp_path)
    model = classifier(name)
    model.config.pad_token_id = None
    Run(model, [HeadInit(how="words", words="bad/good")])
    assert torch.equal(model.score.weight, begun(name, "bad/good").score.weight)


def test_no_random_number_is_drawn(tmp_path):
    name = llama(tmp_path)
    model = classifier(name)
    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    Run(model, [HeadInit(how="words", words="bad/good")])
    assert torch.equal(torch.rand(2), wanted)


def test_mask_training_can_begin_with_words_alone(tmp_path):
    model = classifier(llama(tmp_path))
    run = Run(model, [MaskTraining(train_head=False), HeadInit(how="words", words="bad/good")], total_steps=4)
    assert not model.score.weight.requires_grad
    assert run[HeadInit].strength == 0


def test_fit_begins_with_the_names_of_the_classes(tmp_path):
    table = toy().replace({"label": {"up": "good", "down": "bad"}})
    name = llama(tmp_path / "model")
    result = fit(model=name, train=table, output=tmp_path / "out", head="words", steps=0)
    assert result.steps == 0
    assert "the language model's output weights of the class names" in (tmp_path / "out" / "README.md").read_text()
    written = classifier(str(tmp_path / "out"))
    assert torch.equal(written.score.weight, begun(name, "bad/good").score.weight)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("good", r"2 classes .* and 1 words"),
        ("good/good", "two classes have the word 'good'"),
        ("good/splendid", "'splendid' is not one token"),
        ("good/warm film", "'warm film' is not one token of the vocabulary but 'warm film'"),
    ],
)
def test_words_that_cannot_be_are_named(tmp_path, words, said):
    with pytest.raises(ValueError, match=said):
        begun(llama(tmp_path), words)


def test_models_whose_head_differs_before_the_last_layer_are_refused(tmp_path):
    with pytest.raises(ValueError, match="BertForSequenceClassification cannot begin as words"):
        begun(save_masked_bert(tmp_path / "bert"), "good/bad")
    with pytest.raises(ValueError, match="or it pools over tokens"):
        begun(modern(tmp_path / "mean", classifier_pooling="mean"), "good/bad")


def test_a_checkpoint_without_a_language_model_is_refused(tmp_path):
    saved(AutoModelForSequenceClassification.from_config(LlamaConfig(**SIZES)).model, tmp_path)
    model = classifier(str(tmp_path))
    with pytest.raises(ValueError, match="has no language-model head"):
        word_head(model, ["good", "bad"])


def test_numbers_have_no_words(tmp_path):
    with pytest.raises(ValueError, match="model for numbers"):
        word_head(classifier(llama(tmp_path), classes=1), ["good"])


def test_words_that_nothing_reads_are_refused():
    with pytest.raises(ValueError, match="reads no words"):
        HeadInit(words="good/bad")


def test_fit_says_it_before_training(tmp_path):
    with pytest.raises(UsageError, match="'down' is not one token"):
        fit(model=llama(tmp_path / "model"), train=toy(), output=tmp_path / "out", head="words", steps=2)
