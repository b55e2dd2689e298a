"""What a fit takes from a sentence-transformers folder: how long texts are, and what stands before them."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import pytest

from fit_helpers import same, save_tiny_bert, toy, weights, word_tokenizer
from steadytune import FittedModel, fit
from steadytune.errors import UsageError

QUICK = {"steps": 2, "batch_size": 4, "progress": False, "save_steps": 0}
PROMPTS = {"query": "film ", "passage": "play ", "document": ""}


@pytest.fixture
def bert(tmp_path):
    return save_tiny_bert(tmp_path / "bert")


def sentence(folder, prompts=PROMPTS, length=64):
    """Make a folder one of sentence-transformers."""
    files = {
        "modules.json": [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}],
        "sentence_bert_config.json": {"max_seq_length": length},
        "config_sentence_transformers.json": {"prompts": prompts},
    }
    for name, content in files.items():
        Path(folder, name).write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize("pair", [False, True])
@pytest.mark.parametrize("prompt", ["film ", "name:query"])
def test_a_prompt_is_as_if_the_first_text_of_every_row_began_with_it(bert, tmp_path, pair, prompt):
    table, test, text = toy(40, pair), toy(12, pair, start=60), ["text", "other"] if pair else "text"
    asked = fit(table, text=text, label="label", model=sentence(bert), prompt=prompt, tests={"test": test},
                output=tmp_path / "asked", **QUICK)  # fmt: skip
    written, before = (frame.assign(text="film " + frame["text"]) for frame in (table, test))
    other = fit(written, text=text, label="label", model=bert, tests={"test": before}, output=tmp_path / "o", **QUICK)
    assert same(weights(asked.output), weights(other.output))
    assert asked.metrics == other.metrics
    rows = test[text]
    for model in (asked, FittedModel.load(asked.output)):
        np.testing.assert_array_equal(model.predict_proba(rows), other.predict_proba(before[text]))
    assert (asked.predict_proba(rows) != other.predict_proba(rows)).any()
    record = json.loads((asked.output / "steadytune.json").read_text())
    assert record["recipe"]["prompt"] == "film "
    card = (asked.output / "README.md").read_text()
    assert 'prompt: "film " before' in card
    assert 'tokenizer(["film A text to put in column text."]' in card


def test_prompts_that_are_not_used_are_said_in_log_and_card(bert, tmp_path, caplog):
    caplog.set_level(logging.INFO, "steadytune")
    result = fit(toy(), text="text", label="label", model=sentence(bert), output=tmp_path / "o", **QUICK)
    said = 'query "film ", passage "play "'
    assert f"trained with a prompt before each text ({said})" in caplog.text
    assert "--prompt name:query" in caplog.text
    assert f"trained with a prompt before each text ({said}); here is none" in (result.output / "README.md").read_text()
    assert "prompt" not in json.loads((result.output / "steadytune.json").read_text())["recipe"]


@pytest.mark.parametrize(("prompts", "prompt"), [({"document": ""}, None), ({}, None), (PROMPTS, "")])
def test_nothing_is_said_where_no_prompt_is_missing(bert, tmp_path, caplog, prompts, prompt):
    caplog.set_level(logging.INFO, "steadytune")
    fit(toy(), text="text", label="label", model=sentence(bert, prompts), prompt=prompt, output=tmp_path / "o", **QUICK)
    assert "with a prompt" not in caplog.text


@pytest.mark.parametrize(
    ("folder", "message"),
    [(sentence, r"no prompt 'answer': its folder has query \"film \", passage"), (str, "its folder has none")],
)
def test_a_prompt_that_the_folder_does_not_have_is_refused(bert, tmp_path, folder, message):
    with pytest.raises(UsageError, match=message):
        fit(toy(), text="text", label="label", model=folder(bert), prompt="name:answer", output=tmp_path / "o", **QUICK)
    assert not (tmp_path / "o").exists()


def test_capitals_that_an_encoder_never_saw_are_said(bert, tmp_path, caplog):
    caplog.set_level(logging.INFO, "steadytune")
    tokenizer = word_tokenizer()
    Path(sentence(bert), "sentence_bert_config.json").write_text(json.dumps({"do_lower_case": True}))
    fit(toy(), text="text", label="label", model=bert, output=tmp_path / "folding", **QUICK)
    assert "lower-case" not in caplog.text
    tokenizer.add_tokens(["A"])
    tokenizer.save_pretrained(bert)
    fit(toy(), text="text", label="label", model=bert, output=tmp_path / "keeping", **QUICK)
    assert "trained on lower-case texts, and its tokenizer keeps capitals" in caplog.text


def test_a_prompt_is_a_text(bert, tmp_path):
    with pytest.raises(UsageError, match="prompt must be text, got 3"):
        fit(toy(), text="text", label="label", model=bert, prompt=3, output=tmp_path / "o", **QUICK)


@pytest.mark.parametrize(
    ("trained", "wanted", "tokens"), [(8, None, 8), (8, 16, 16), (200, None, 64), (None, None, 64)]
)
def test_texts_are_as_long_as_the_encoder_was_trained_for(bert, tmp_path, caplog, trained, wanted, tokens):
    caplog.set_level(logging.INFO, "steadytune")
    result = fit(toy(), text="text", label="label", model=sentence(bert, length=trained), max_length=wanted,
                 output=tmp_path / "o", **QUICK)  # fmt: skip
    assert result.model.max_length == tokens
    assert ("max_length 8, as the sentence encoder was trained" in caplog.text) == (tokens == 8)
