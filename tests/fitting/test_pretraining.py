"""Further pre-training on texts: what is masked, what moves, what checkpoints allow, resume, errors before training."""

from __future__ import annotations

import logging
import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, BertForMaskedLM, BertForPreTraining, TrainerCallback

from bench_helpers import make_root, records, small
from fit_helpers import (
    WORDS,
    masking_tokenizer,
    same,
    save_masked_bert,
    save_sentence_bert,
    save_tiny_bert,
    save_tiny_gpt2,
    toy,
    weights,
)
from steadytune.bench.study import run_study
from steadytune.data.problem import Classification
from steadytune.errors import UsageError
from steadytune.fitting import training
from steadytune.fitting.folder import read_record
from steadytune.fitting.main import fit
from steadytune.fitting.options import Options
from steadytune.fitting.pretrained import Pretrained
from steadytune.fitting.stages import pretraining
from steadytune.fitting.stages.pretraining import TAPT, SimCSE, TextStage, info_nce, mask_words, masked_loss
from steadytune.heads.features import pooled_features

QUICK = {"steps": 3, "batch_size": 4, "lr": 1e-2, "progress": False, "validation_share": 0.25, "probe": False}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_masked_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def headless(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("headless"))


def texts(rows: int = 24) -> pd.DataFrame:
    return toy(rows, start=200)[["text"]]


def run(output, model, **options):
    return fit(toy(40), text="text", label="label", model=model, output=output, **{**QUICK, **options})


# ---- masked words -----------------------------------------------------------------------------------------------


def test_special_tokens_are_never_chosen_and_only_chosen_ones_change():
    tokenizer = masking_tokenizer()
    ids = torch.tensor([[2, *range(4, 20), 3, 0, 0]] * 200)
    masked, labels = mask_words(ids, tokenizer, 0.3, [0, 1])
    chosen = labels != -100
    assert not chosen[:, [0, 17, 18, 19]].any()
    assert torch.equal(labels[chosen], ids[chosen])
    assert torch.equal(masked[~chosen], ids[~chosen])
    share = chosen[:, 1:17].float().mean()
    assert abs(share - 0.3) < 0.04
    became = (masked[chosen] == tokenizer.mask_token_id).float().mean()
    assert abs(became - 0.8) < 0.05
    assert abs((masked[chosen] == ids[chosen]).float().mean() - 0.1) < 0.05
    again, _ = mask_words(ids, tokenizer, 0.3, [0, 1])
    other, _ = mask_words(ids, tokenizer, 0.3, [0, 2])
    assert torch.equal(masked, again)
    assert not torch.equal(masked, other)


def test_the_loss_is_the_mean_over_chosen_words_alone():
    logits = torch.randn(2, 3, 5, requires_grad=True)
    labels = torch.tensor([[-100, 2, -100], [4, -100, -100]])
    loss = masked_loss(logits, labels)
    chances = logits.softmax(-1)
    assert torch.allclose(loss, -(chances[0, 1, 2].log() + chances[1, 0, 4].log()) / 2)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert not gradient[labels == -100].any()


def test_a_batch_without_a_chosen_word_has_no_gradient():
    """Naive: the mean over no word is not a number."""
    tokenizer = masking_tokenizer()
    masked, labels = mask_words(torch.tensor([[2, 5, 6, 3]]), tokenizer, 0.0, [0])
    assert masked.tolist() == [[2, 5, 6, 3]]
    logits = torch.randn(1, 4, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(masked_loss(logits, labels), logits)
    assert not gradient.any()


def test_the_body_moves_and_the_pooler_is_that_of_the_checkpoint(bert, tmp_path):
    """Naive: the folder of a masked language model, which loads with a random pooler."""
    result = run(tmp_path / "o", bert, pretrain="tapt:steps=4,lr=0.01", steps=0, head="logistic", unlabelled=texts())
    after, before = weights(result.output), load_file(f"{bert}/model.safetensors")
    pooler = [name for name in after if ".pooler." in name]
    assert len(pooler) == 2
    assert all(torch.equal(after[name], before[name]) for name in pooler)
    moved = "bert.encoder.layer.1.output.dense.weight"
    assert not torch.equal(after[moved], before[moved])
    body = {name for name in before if name.startswith("bert.")}
    assert {name for name in after if not name.startswith("classifier")} == body
    _, info = AutoModelForSequenceClassification.from_pretrained(result.output, output_loading_info=True)
    assert not info["missing_keys"]


def test_anchors_are_set_after_it(bert, tmp_path, monkeypatch):
    seen = []
    setup = pretraining.TextStage.body

    def spy(self, pretrained, name, checkpoints):
        body = setup(self, pretrained, name, checkpoints)
        seen.append(body)
        return body

    monkeypatch.setattr(pretraining.TextStage, "body", spy)
    anchored = run(tmp_path / "o", bert, pretrain="tapt:steps=4,lr=0.01", methods=["l2sp:alpha=1e6"], lr=1e-9)
    (body,) = seen
    after = weights(anchored.output)
    assert all(torch.allclose(after[name], body[name], atol=1e-6) for name in body if "pooler" not in name)


@pytest.mark.parametrize("save_steps", [2, 0])
def test_the_step_with_the_lowest_loss_on_held_out_texts_is_kept(bert, tmp_path, monkeypatch, save_steps):
    """The loss rises from the first evaluation on. Naive: the last weights of all steps."""
    loop, states, seen = pretraining.MaskedTrainer.evaluation_loop, [], []
    trained = pretraining.MaskedTrainer.trained

    def rising(self, *args, **kwargs):
        output = loop(self, *args, **kwargs)
        states.append({name: t.clone() for name, t in self.model.state_dict().items()})
        output.metrics.update({name: 1.0 + len(states) for name in ("eval_loss", "eval_log_loss")})
        return output

    monkeypatch.setattr(pretraining.MaskedTrainer, "evaluation_loop", rising)
    monkeypatch.setattr(
        pretraining.MaskedTrainer, "trained", lambda self, *a, **k: seen.append(trained(self, *a, **k)) or seen[-1]
    )
    run(tmp_path / "o", bert, pretrain="tapt:steps=20,lr=0.01", save_steps=save_steps)
    (found,) = seen
    assert [step for step, _ in found.curve] == [2, 4, 6, 8]  # three evaluations without a new lowest end it
    assert found.steps == 2
    assert same(found.model.state_dict(), states[0])
    assert not same(states[0], states[1])


def test_held_out_texts_are_not_trained_on():
    inside, outside = TAPT(held_out=0.25).cut(texts(20), seed=1)
    assert (len(inside), len(outside)) == (15, 5)
    assert not {*inside["text"]} & {*outside["text"]}
    assert [len(part) for part in TAPT(held_out=0.9).cut(texts(2), seed=0)] == [1, 1]


# ---- contrast ---------------------------------------------------------------------------------------------------


def test_the_contrastive_loss_by_hand():
    one = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert float(info_nce(one, one, 0.5)) == pytest.approx(math.log(1 + math.exp(-2)))
    equal = torch.tensor([[1.0, 0.0]] * 4)
    assert float(info_nce(equal, equal, 0.05)) == pytest.approx(math.log(4))
    two = torch.tensor([[0.6, 0.8], [0.8, 0.6]])
    order = torch.tensor([1, 0])
    assert float(info_nce(one, two, 0.1)) == pytest.approx(float(info_nce(one[order], two[order], 0.1)))


def test_a_strong_anchor_keeps_the_embeddings(headless, tmp_path):
    """The mean over tokens of each text, normalised, moves less the stronger the anchor."""
    pretrained = Pretrained.open(headless, Classification(("down", "up")))
    tokens = pretrained.tokenizer.pad(pretrained.tokenise(texts(30)), return_tensors="pt")

    def embeddings(body=None):
        model, _ = pretrained.moved(body).read(0)
        return torch.nn.functional.normalize(pooled_features(model, [tokens], "mean"), dim=-1)

    moved = []
    for anchor in (0.0, 100.0):
        stage = TextStage(SimCSE(steps=20, lr=1e-2, anchor=anchor), texts(30), Options(), 0, False, 30)
        body = stage.body(pretrained, f"a{anchor}", tmp_path)
        moved.append(float((embeddings(body) - embeddings()).square().sum(-1).mean()))
    assert moved[1] < 0.5 * moved[0]


def test_a_checkpoint_without_the_layer_for_masked_words_is_trained_by_contrast(headless, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="steadytune"):
        result = run(tmp_path / "o", headless, pretrain="tapt:steps=4", unlabelled=texts())
    assert "the tokenizer has no mask token: its body is trained by simcse instead" in caplog.text
    (stage,) = read_record(result.output)["recipe"]["stages"]
    assert (stage["name"], stage["steps"], stage["unlabelled"]) == ("simcse", 4, 24)
    assert "trained first on 54 texts without their labels (simcse(" in (result.output / "README.md").read_text()


def test_a_masked_model_without_its_layer_says_so(tmp_path, caplog):
    """The body of BERT with a mask token: naive, a random output layer distorts it."""
    folder = save_masked_bert(tmp_path / "bert")
    BertForPreTraining.from_pretrained(folder).bert.save_pretrained(folder)
    with caplog.at_level(logging.WARNING, logger="steadytune"):
        run(tmp_path / "o", folder, pretrain="tapt:steps=2")
    assert "does not hold the layer that predicts masked words" in caplog.text


def test_a_masked_model_without_a_pooler_is_one_too(tmp_path):
    folder = save_masked_bert(tmp_path / "bert", BertForMaskedLM)
    result = run(tmp_path / "o", folder, pretrain="tapt:steps=2")
    assert read_record(result.output)["recipe"]["stages"][0]["name"] == "tapt"


@pytest.mark.parametrize("save", [save_sentence_bert, save_tiny_gpt2])
def test_other_bodies_are_trained_by_contrast(tmp_path, save):
    folder = save(tmp_path / "model")
    result = run(tmp_path / "o", folder, pretrain="simcse:steps=3,lr=0.01", steps=0, head="logistic")
    plain = run(tmp_path / "plain", folder, steps=0, head="logistic")
    one, other = weights(result.output), weights(plain.output)
    moved = [name for name in one if not torch.equal(one[name], other[name])]
    assert any("0." in name for name in moved)


# ---- the stage --------------------------------------------------------------------------------------------------


def test_texts_are_read_once_and_those_of_test_sets_never(bert, tmp_path):
    result = run(
        tmp_path / "o", bert, pretrain="tapt:steps=2", tests={"test": toy(8, start=200)},
        unlabelled=pd.concat([texts(24), texts(24), toy(40)[["text"]]]),
    )  # fmt: skip
    recipe = read_record(result.output)["recipe"]
    assert recipe["unlabelled"]["left_out"] == {"tests": 8 * 2 + 10, "labelled": 30, "repeated": 16}
    assert recipe["stages"][0]["data"]["rows"] == 30 + 16


class Cut(TrainerCallback):
    """Interrupts the training of this name at a step."""

    def __init__(self, name, where):
        self.name, self.where = name, where

    def on_step_begin(self, args, state, control, **kwargs):
        if (self.name, state.global_step) == self.where:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("how", "where"), [("tapt", ("pretrain-0", 3)), ("simcse", ("pretrain-0", 7)),
                                            ("tapt", ("training", 2))])  # fmt: skip
def test_interrupted_and_resumed_equals_uninterrupted(bert, tmp_path, monkeypatch, how, where):
    """Masks, dropout and order of the texts go on where they were."""
    options = {"save_steps": 2, "pretrain": f"{how}:steps=12,lr=0.01,batch_size=4", "unlabelled": texts()}
    run(tmp_path / "whole", bert, **options)
    for module in (pretraining, training):
        monkeypatch.setattr(module, "Progress", lambda name: Cut(name, where))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", bert, **{**options, "progress": True})
    monkeypatch.undo()
    with pytest.raises(UsageError, match="started otherwise"):
        run(tmp_path / "cut", bert, resume=True, **{**options, "unlabelled": texts(20)})
    run(tmp_path / "cut", bert, resume=True, **options)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pretrain": "mlm"}, "unknown pretrain 'mlm'"),
        ({"pretrain": "tapt:masked=0"}, r"masked must be a number in \(0, 1\), got 0"),
        ({"pretrain": True}, "pretrain must be one of tapt, simcse, got True"),
        ({"unlabelled": texts()}, "nothing here reads the texts without labels"),
        ({"pretrain": "simcse", "dropout": 0.0}, "differ by their dropout, and the model has none"),
        ({"pretrain": "tapt", "refit": True, "validation_share": 0.0}, "pretrain reads the texts of all rows"),
        ({"pretrain": "tapt", "peft": "prompt"}, "and pretrain changes that model"),
    ],
)
def test_bad_input_is_refused_before_training(bert, tmp_path, monkeypatch, options, words):
    monkeypatch.setattr(pretraining.TextStage, "body", lambda *args: pytest.fail("trained"))
    with pytest.raises(UsageError, match=words):
        run(tmp_path / "o", bert, **options)
    assert not (tmp_path / "o").exists()


def test_steps_follow_the_texts():
    assert TAPT(batch_size=32).total_steps(320) == 1000
    assert TAPT(batch_size=32).total_steps(5000) == 2000
    assert SimCSE().total_steps(5000) == math.ceil(5000 / 64)
    assert SimCSE(steps=7).total_steps(5000) == 7


def test_a_study_pretrains_on_the_rows_that_its_draw_leaves_over(tmp_path):
    root = make_root(tmp_path / "data")
    recipes = {"plain": {}, "tapt": {"pretrain": "simcse:steps=2", "unlabelled": ["rest"], "unlabelled_size": 5}}
    study = small(root, recipes=recipes, seeds=1, train_sizes=[16])
    run_study(study, tmp_path / "out", data_root=root, workers=0, progress=False)
    done = {record["spec"]["recipe"]: record for record in records(tmp_path / "out").values()}
    assert {record["status"] for record in done.values()} == {"done"}
    texts, how = done["tapt"]["spec"]["methods"]
    assert (texts["name"], texts["options"]) == ("unlabelled", {"rows": ["rest"], "size": 5})
    assert (how["name"], how["options"]["steps"]) == ("simcse", 2)


def test_masks_of_held_out_texts_stay_the_same():
    row = {"input_ids": [2, *range(4, 4 + len(WORDS)), 3]}
    tokenizer = masking_tokenizer()
    one, again = (pretraining._masked_row(row, tokenizer, 0.5, [3, 4]) for _ in range(2))
    assert one == again
    assert np.array(one["labels"]).max() > 0
