"""Encoders ranked by probes: the better one is first, no row judges itself, and what is not known is said."""

from __future__ import annotations

import errno
import json
import logging
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from fit_helpers import WORDS, save_tiny_bert
from steadytune import cli, probe
from steadytune.data.problem import Classification, Regression
from steadytune.errors import UsageError
from steadytune.fitting import probing

COLUMNS = {"text": "text", "label": "label"}
NUMBERS = {"text": "text", "label": "score"}  # whose probes take no time
KIND, UNKIND, NEUTRAL = WORDS[0::4], WORDS[1::4], [*WORDS[2::4], *WORDS[3::4]]


def rows(count: int = 60, start: int = 0) -> pd.DataFrame:
    """A kind or an unkind word among neutral ones decides the label, and how often it stands there a number."""
    table = []
    for i in range(start, start + count):
        up, more = i % 3 > 0, i % 2
        word = (KIND if up else UNKIND)[i % 4]
        text = " ".join([NEUTRAL[i % 8], word, *[word] * more, NEUTRAL[i // 8 % 8], NEUTRAL[i // 64 % 8]])
        score = (1 + more) * (1 if up else -1) + i % 5 / 20
        other = f"{(KIND if i // 2 % 2 else UNKIND)[i // 3 % 4]} {NEUTRAL[i % 7]}"
        same = "yes" if up == bool(i // 2 % 2) else "no"
        row = {"text": text, "label": "up" if up else "down", "score": score, "other": other, "same": same}
        table.append(row)
    return pd.DataFrame(table)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A sentence encoder that tells words apart, and one that does not: its embeddings of words are all the same."""
    root = tmp_path_factory.mktemp("models")
    seeing, blind = (sentence(save_tiny_bert(root / name)) for name in ("seeing", "blind"))
    file = Path(blind, "model.safetensors")
    held = load_file(file)
    held["embeddings.word_embeddings.weight"] = torch.ones_like(held["embeddings.word_embeddings.weight"])
    save_file(held, file, metadata={"format": "pt"})
    return {"blind": blind, "seeing": seeing}


@pytest.fixture(scope="module")
def ranked(folders):
    return probe(rows(60), list(folders.values()), tests={"later": rows(40, 300)}, **COLUMNS)


def sentence(folder, pooling="mean_tokens", prompts=None):
    """Make a copy of nothing but the files of sentence-transformers in a model's folder."""
    Path(folder, "1_Pooling").mkdir(exist_ok=True)
    parts = [("", "Transformer"), ("1_Pooling", "Pooling")]
    files = {
        "modules.json": [{"path": path, "type": f"sentence_transformers.models.{part}"} for path, part in parts],
        "1_Pooling/config.json": {f"pooling_mode_{pooling}": True},
        "config_sentence_transformers.json": {"prompts": prompts or {}},
    }
    for name, content in files.items():
        Path(folder, name).write_text(json.dumps(content))
    return folder


# ---- the ranking ------------------------------------------------------------------------------------------------


def test_the_model_whose_features_separate_the_classes_is_first(ranked, folders):
    frame = ranked.frame
    assert frame["name"].tolist() == ["seeing", "blind", probing.CONSTANT]
    assert ranked.best == folders["seeing"]
    assert frame["score"][0] > 0.95
    assert frame["score_later"][0] > 0.95
    assert frame["score"][2] == pytest.approx(2 / 3)  # the share of the larger class
    assert frame["low"][0] <= frame["score"][0] <= frame["high"][0]
    assert "seeing is ahead of the others on these 60 rows" in ranked.verdict
    assert frame["difference_high"][1] < 0
    assert frame["difference"][1] == pytest.approx(frame["score"][1] - frame["score"][0])
    assert frame["width"].tolist()[:2] == [16, 16]
    body = sum(p.numel() for p in load_file(Path(folders["seeing"], "model.safetensors")).values())
    assert frame["parameters"][0] == body
    assert ranked.scores["seeing"]["later"]["rows"] == 40


def test_the_same_call_gives_the_same_numbers_and_leaves_random_states_alone(ranked, folders):
    torch.manual_seed(5)
    before, numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    again = probe(rows(60), list(folders.values())[::-1], tests={"later": rows(40, 300)}, **COLUMNS)
    pd.testing.assert_frame_equal(again.frame.drop(columns="seconds"), ranked.frame.drop(columns="seconds"))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy)


def test_rows_of_a_test_set_change_nothing_but_its_own_scores(ranked, folders):
    later = rows(40, 300)
    poisoned = later.assign(label=later["label"].map({"up": "down", "down": "up"}))
    found = probe(rows(60), list(folders.values()), tests={"later": poisoned}, **COLUMNS)
    own = ["score_later", "low_later", "high_later", "seconds"]
    pd.testing.assert_frame_equal(found.frame.drop(columns=own), ranked.frame.drop(columns=own))
    assert found.frame["score_later"][0] == pytest.approx(1 - ranked.frame["score_later"][0])


def test_on_random_labels_the_score_is_at_chance_and_that_is_said(folders):
    rng = np.random.default_rng(0)
    table = rows(200).assign(label=rng.permutation(np.repeat(["up", "down"], 100)))
    found = probe(table, folders["seeing"], **COLUMNS)
    assert found.frame["low"][0] < 0.5 < found.frame["high"][0]
    assert "not clearly above one answer for all rows (0.5000)" in found.verdict


def test_equal_models_cannot_be_told_apart(folders):
    found = probe(rows(60), {"one": folders["seeing"], "two": folders["seeing"]}, **COLUMNS)
    assert found.verdict.startswith("two cannot be told from one by 60 rows")
    assert (found.frame["difference_low"][1], found.frame["difference_high"][1]) == (0, 0)


def test_copies_of_a_text_and_rows_of_a_group_share_a_fold(folders, monkeypatch):
    seen = []

    def record(phi, fit, parts):
        seen.append(parts)
        return fit(np.arange(len(phi))).outputs(phi)

    monkeypatch.setattr(probing, "cross_fitted", record)
    table = pd.concat([rows(30), rows(30)], ignore_index=True)
    probe(table, folders["seeing"], **COLUMNS)
    probe(rows(60).assign(writer=np.arange(60) // 4), folders["seeing"], group="writer", **COLUMNS)
    for parts, same in zip(seen, (np.arange(60) % 30, np.arange(60) // 4), strict=True):
        assert len(parts) == 5
        for inside, outside in parts:
            assert not {*same[inside]} & {*same[outside]}


def named(table):
    """With a kind and an unkind word, where a row holds them, as its labels."""
    return table.assign(names=[sorted({*text.split()} & {KIND[0], UNKIND[0]}) for text in table["text"]])


@pytest.mark.parametrize(
    ("columns", "metric"),
    [
        ({"label": "names"}, "f1_micro"),
        ({"label": "score"}, "pearson"),
        ({"text": ["other", "text"], "label": "same"}, "accuracy"),  # which no linear model of both together knows
    ],
)
def test_several_labels_numbers_and_pairs(folders, columns, metric):
    columns = {**COLUMNS, **columns}
    found = probe(named(rows()), list(folders.values()), tests={"later": named(rows(40, 300))}, **columns)
    assert found.metric == metric
    assert found.frame["name"][0] == "seeing"
    assert found.frame["score_later"][0] > 0.75
    assert found.frame["low"][0] < found.frame["score"][0] < found.frame["high"][0]
    assert math.isnan(found.frame["score"][2]) == (metric == "pearson")


def test_every_form_of_several_labels_ranks_alike(folders, tmp_path):
    """Naive: the last of two --label options is the label."""
    lists = named(rows()).assign(up=lambda t: (t["label"] == "up").astype(int), more=lambda t: t.index % 2)
    about = [" | ".join(["more"] * more + ["up"] * up) for up, more in zip(lists["up"], lists["more"], strict=True)]
    lists.assign(about=about)[["text", "up", "more", "about"]].to_csv(tmp_path / "t.csv", index=False)
    found = []
    for form in (["--label", "more", "--label", "up"], ["--label", "about", "--label-separator", "|"]):
        done = command(tmp_path / "t.csv", folders, "--text", "text", *form, "--output", str(tmp_path / "out.csv"),
                       "--overwrite")  # fmt: skip
        assert done.exit_code == 0, done.output
        found.append(pd.read_csv(tmp_path / "out.csv")["score"].tolist())
    assert found[0] == found[1]


def test_texts_of_a_pair_are_compared_by_what_their_cosine_is_made_of():
    u, v = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[8.0, 6.0], [1.0, 0.0]])
    np.testing.assert_allclose(probing.compared([u, v]), [[0.2, 0.2, 0.48, 0.48], [1, 0, 0, 0]])
    assert probing.compared([u]) is u


def test_smaller_errors_are_better(folders):
    found = probe(rows(60), list(folders.values()), metric="rmse", **NUMBERS)
    assert found.frame["name"][0] == "seeing"
    assert found.frame["difference"][1] > 0
    assert "seeing is ahead" in found.verdict


# ---- the interval of a difference -------------------------------------------------------------------------------


def test_the_interval_of_a_difference_is_paired():
    """Two models that err on the same rows, but for ten, differ by what the ten rows say."""
    two, rng = Classification(("a", "b")), np.random.default_rng(0)
    gold = rng.permutation(np.repeat(np.array(["a", "b"], dtype=object), 200))
    first = np.where(rng.random(400) < 0.3, "a", gold).astype(object)
    wrong = np.flatnonzero(first == gold)[:10]
    second = first.copy()
    second[wrong] = np.where(gold[wrong] == "a", "b", "a")
    low, high = probing.difference_interval(two.metric("accuracy"), gold, second, first, two.names)
    spread = np.std(np.arange(400) < 10) / 20
    assert low == pytest.approx(-10 / 400 - 1.96 * spread, abs=0.003)
    assert high == pytest.approx(-10 / 400 + 1.96 * spread, abs=0.003)


def test_the_interval_of_a_difference_counts_groups():
    """Naive: ten copies of each row narrow it by the root of ten."""
    two, rng = Classification(("a", "b")), np.random.default_rng(0)
    gold = rng.permutation(np.repeat(np.array(["a", "b"], dtype=object), 30))
    first, second = (np.where(rng.random(60) < 0.3, "a", gold).astype(object) for _ in range(2))
    metric, copies = two.metric("accuracy"), np.repeat(np.arange(60), 10)
    once = probing.difference_interval(metric, gold, first, second, two.names)
    often = probing.difference_interval(metric, gold[copies], first[copies], second[copies], two.names, copies)
    assert often == pytest.approx(once)
    nothing = np.zeros(60)
    assert probing.difference_interval(metric, gold, first, second, two.names, nothing) is None


def test_a_difference_that_is_undefined_has_no_interval():
    gold = np.array([1.0, 2.0, 3.0])
    assert probing.difference_interval(Regression().metric("pearson"), gold, gold, np.zeros(3), ()) is None


# ---- what is read -----------------------------------------------------------------------------------------------


def test_a_folder_says_what_is_read_of_its_tokens(tmp_path, caplog):
    bert = save_tiny_bert(tmp_path / "bert")
    scores = {how: probe(rows(), bert, pooling=how, **NUMBERS).scores["bert"] for how in ("model", "mean", "cls")}
    assert scores["mean"] != scores["model"] != scores["cls"]
    for mode, how in (("mean_tokens", "mean"), ("cls_token", "cls"), ("lasttoken", "model")):
        found = probe(rows(), sentence(bert, mode), **NUMBERS)
        assert found.frame["pooling"][0] == how
        assert found.scores["bert"] == scores[how]
    assert "bert pools its tokens by lasttoken" in caplog.text


def test_a_dense_layer_that_was_never_trained_is_said(tmp_path, caplog):
    probe(rows(), save_tiny_bert(tmp_path / "bert"), **NUMBERS)
    assert "bert: its head reads bert.pooler.dense, which was never trained: try --pooling mean" in caplog.text


def test_a_prompt_by_name_goes_to_the_models_that_have_it(tmp_path, caplog):
    models = [save_tiny_bert(tmp_path / name) for name in ("with", "without")]
    sentence(models[0], prompts={"query": "film film film "})
    plain = probe(rows(), models, pooling="mean", **NUMBERS)
    assert "with: this sentence encoder was trained with a prompt before each text" in caplog.text
    found = probe(rows(), models, pooling="mean", prompt="name:query", **NUMBERS)
    prompts = dict(zip(found.frame["name"], found.frame["prompt"], strict=True))
    assert (prompts["with"], prompts["without"]) == ("film film film ", "")
    assert found.scores["without"] == plain.scores["without"]
    assert found.scores["with"] != plain.scores["with"]
    with pytest.raises(UsageError, match="has no prompt 'passage'"):
        probe(rows(), models, prompt="name:passage", **NUMBERS)


def test_rows_that_are_cut_are_said(folders, caplog):
    caplog.set_level(logging.WARNING, "steadytune")
    found = probe(rows(), folders["seeing"], max_length=4, **NUMBERS)
    assert "seeing: the train rows: texts of 60 of 60 rows" in caplog.text
    assert found.frame["max_length"][0] == 4


# ---- what is refused --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["./nowhere"]}, "model './nowhere': no such directory"),
        ({"models": []}, "at least one model"),
        ({"models": ["a", "a"]}, "model 'a' is given twice"),
        ({"pooling": "max"}, "pooling must be one of auto, model, mean, cls, got 'max'"),
        ({"folds": 1}, "folds must"),
        ({"train": rows(3)}, "folds must lie between 2 and 3"),
        ({"train": rows().assign(label="up")}, "one class|only one|label"),
        ({"train": rows().assign(label=["rare", *["up", "down"] * 29, "up"])}, "class 'rare' has 1 row: too few"),
        ({"max_length": 65}, "max_length must be at most 64"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(folders, changes, message):
    with pytest.raises(UsageError, match=message):
        probe(**{"train": rows(), "models": [folders["seeing"]], **COLUMNS, **changes})


def test_features_that_are_no_numbers_are_refused(tmp_path):
    file = Path(save_tiny_bert(tmp_path / "bert"), "model.safetensors")
    held = load_file(file)
    save_file({name: torch.full_like(value, 3e38) for name, value in held.items()}, file, metadata={"format": "pt"})
    with pytest.raises(UsageError, match="its features are not numbers"):
        probe(rows(), tmp_path / "bert", pooling="mean", **COLUMNS)


# ---- the command ------------------------------------------------------------------------------------------------


def command(table, folders, *more):
    models = [f"--model=left={folders['blind']}", "--model", folders["seeing"]]
    return CliRunner().invoke(cli.app, ["probe", str(table), *models, *more], env={"COLUMNS": "150"})


@pytest.fixture
def table(tmp_path):
    rows(60).to_csv(tmp_path / "train.csv", index=False, columns=["text", "score"])
    rows(40, 300).to_csv(tmp_path / "later.csv", index=False, columns=["text", "score"])
    return tmp_path / "train.csv"


def test_the_command_prints_the_table_and_writes_it(table, folders, tmp_path):
    ranked = probe(rows(), list(folders.values()), **NUMBERS)
    out = tmp_path / "ranking.json"
    done = command(table, folders, "--test", str(tmp_path / "later.csv"), "--output", str(out))
    assert done.exit_code == 0, done.output
    lines = [line.split() for line in done.stdout.splitlines() if line.strip()]
    names = [words[0] for words in lines if words[0] in ("seeing", "left", "constant")][:3]
    assert names == ["seeing", "left", "constant"]
    assert "less the best" in done.stdout
    assert "seeing is ahead of the others on these 60 rows" in done.stdout
    written = json.loads(out.read_text())
    assert [row["name"] for row in written["models"]] == ["seeing", "left", probing.CONSTANT]
    assert written["models"][0]["score"] == ranked.frame["score"][0]
    assert written["models"][2]["width"] is None
    again = command(table, folders, "--output", str(out))
    assert again.exit_code == 2
    assert "replace it with --overwrite" in again.stderr
    done = command(table, folders, "--output", str(out.with_suffix(".csv")))
    assert done.exit_code == 0
    assert pd.read_csv(out.with_suffix(".csv"))["score"].tolist() == pytest.approx(
        ranked.frame["score"].tolist(), nan_ok=True
    )
    assert command(table, folders, "--output", "ranking.txt").exit_code == 2


def test_two_models_of_one_name_are_refused(table, folders):
    done = CliRunner().invoke(cli.app, ["probe", str(table), "--model", "a=b", "--model", "a=c"])
    assert done.exit_code == 2
    assert "two models have one name" in done.stderr


def test_a_ranking_that_cannot_be_written_is_shown_and_an_error(table, folders, tmp_path, monkeypatch):
    def full(path, writer):
        raise OSError(errno.ENOSPC, "written by the system")

    monkeypatch.setattr(probing, "write_whole", full)
    done = command(table, folders, "--output", str(tmp_path / "ranking.csv"))
    assert done.exit_code == 2
    assert "seeing is ahead of the others" in done.stdout
    assert "ranking.csv cannot be written: No space left on device" in done.stderr
    assert "--resume" not in done.stderr


def test_an_interrupted_probe_writes_nothing_and_runs_again(table, folders, tmp_path, monkeypatch):
    out, whole = tmp_path / "ranking.csv", probing.frozen_features

    def interrupted(model, tokenizer, features, how):
        monkeypatch.setattr(probing, "frozen_features", whole)
        raise KeyboardInterrupt

    monkeypatch.setattr(probing, "frozen_features", interrupted)
    assert command(table, folders, "--output", str(out)).exit_code == 130
    assert {path.name for path in tmp_path.iterdir()} == {"train.csv", "later.csv"}
    assert command(table, folders, "--output", str(out)).exit_code == 0
    assert out.is_file()
