"""Adapters of PEFT and our own: in `fit`, in the folder it writes, and under the methods."""

from __future__ import annotations

import json

import numpy as np
import peft
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertModel

import helpers
from architectures import tiny
from fit_helpers import save_tiny_bert, save_tiny_gpt2, toy
from steadytune import EMA, FGM, L2SP, LNSR, SMART, DPSDense, FittedModel, RDrop, Run, fit
from steadytune.core.anatomy import anatomy
from steadytune.data.problem import Classification
from steadytune.errors import UsageError
from steadytune.fitting.peft_models import adapted
from steadytune.fitting.pretrained import Pretrained
from steadytune.heads.pooling import add_pooling_block

# PEFT reads an attribute that transformers 5.23 renamed
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
QUICK = {"steps": 4, "max_length": 16, "progress": False, "lr": 1e-2}
POOLER = "bert.pooler.dense.weight"
TEXTS = ["good film", "bad play story with cold cast"]
KEPT = {
    "prefix": "adapter_model.safetensors",
    "prompt": "adapter_model.safetensors",
    "adapters": "adapters.safetensors",
}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


def options(kind):
    """Of `fit`, for a kind of adapters: PEFT's, or ours."""
    masks = ["dps_dense:update_ratio=0.5", "rdrop"]
    return {"methods": ["adapters:size=4", *masks]} if kind == "adapters" else {"methods": masks, "peft": kind}


@pytest.mark.parametrize("kind", ["ia3", *KEPT])
def test_a_fit_trains_little_and_its_folder_predicts_the_same(tmp_path, bert, kind):
    result = fit(toy(48), model=bert, output=tmp_path / "o", evaluations=2, save_steps=2, **QUICK, **options(kind))
    expected = result.predict_proba(TEXTS)
    assert np.array_equal(FittedModel.load(result.output).predict_proba(TEXTS), expected)
    library = {"ia3": "transformers", "adapters": "steadytune"}.get(kind, "peft")
    assert f"library_name: {library}\n" in (result.output / "README.md").read_text()
    plain = (result.output / "config.json").exists()
    assert plain == (kind == "ia3")
    if plain:
        base = AutoModelForSequenceClassification.from_pretrained(bert).state_dict()
        tuned = AutoModelForSequenceClassification.from_pretrained(result.output).state_dict()
        moved = {n for n in tuned if not torch.equal(tuned[n], base[n]) and "classifier" not in n}
        assert {n.rpartition(".")[0].rpartition("layer.")[2][2:] for n in moved} == {  # rows of keys and values
            *("attention.self.key", "attention.self.value", "attention.output.dense", "output.dense")
        }
        return
    assert (result.output / KEPT[kind]).stat().st_size < 20_000  # the model has 60 kB
    if kind == "adapters":
        with pytest.raises((OSError, ValueError), match="config"):  # never a model without its adapters by mistake
            AutoModelForSequenceClassification.from_pretrained(result.output)
    else:  # PEFT reads it without us
        base = AutoModelForSequenceClassification.from_pretrained(bert, num_labels=2)
        model = peft.PeftModel.from_pretrained(base, result.output).eval()
        inputs = AutoTokenizer.from_pretrained(result.output)(TEXTS, padding=True, return_tensors="pt")
        with torch.no_grad():
            found = model(**inputs).logits.double().softmax(1).numpy()
        assert np.allclose(found, expected, atol=1e-5)


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """A checkpoint without a pooler, as a masked language model writes it."""
    folder = save_tiny_bert(tmp_path_factory.mktemp("bare"))
    BertModel.from_pretrained(folder, add_pooling_layer=False).save_pretrained(folder)
    return folder


FEW_TRAINED = {
    **{kind: {"peft": kind} for kind in ("lora", "ia3", "prefix", "prompt")},
    **{method: {"methods": method} for method in ("adapters:size=4", "bitfit", "mask_training:train_head=false")},
}


@pytest.mark.parametrize("kind", FEW_TRAINED)
def test_a_pooler_that_the_checkpoint_lacks_is_trained_and_kept_beside_few_weights(tmp_path, bare, kind):
    """Naive: it is frozen as a seed has drawn it, and another seed draws another one when the folder is read."""
    own = {"seed": 5, "num_seeds": 2, "combine": "ensemble", **FEW_TRAINED[kind]}
    result = fit(toy(48), model=bare, output=tmp_path / "o", **QUICK, **own)
    record = json.loads((result.output / "steadytune.json").read_text())
    again = FittedModel.load(result.output)
    for model, run in zip(again.models, record["runs"], strict=True):
        drawn = Pretrained.open(bare, again.problem).load(run["seeds"]["init"]).get_parameter(POOLER)
        (trained,) = (
            p for name, p in model.named_parameters() if "pooler" in name and "original" not in name and p.dim() == 2
        )
        assert not torch.equal(trained, drawn)
    assert np.array_equal(again.predict_proba(TEXTS), result.predict_proba(TEXTS))


def test_anchors_leave_out_a_pooler_that_the_checkpoint_lacks(bare):
    """Naive: what a seed has drawn counts as pre-trained, and the weights are pulled back to it."""
    model = Pretrained.open(bare, Classification(("down", "up"))).load(0)
    run = Run(model, [L2SP()])
    assert POOLER not in {w.name for w in run.weights() if not run.is_new(w)}


@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt"])
def test_a_model_with_a_pooling_block_is_adapted_as_any_other(kind):
    """Naive: the block is a head, the body holds it, and all of the body is trained."""
    model = tiny("Bert")
    add_pooling_block(model, [{"input_ids": torch.arange(1, 7).view(1, 6)}])
    body = {f"base_model.model.{name}" for name in model.state_dict() if name.startswith("bert.")}
    wrapped = adapted(model, None, kind)
    trained = {name.replace(".base_layer", "") for name, p in wrapped.named_parameters() if p.requires_grad}
    assert trained
    assert not trained & body
    assert not any("bert" in name and "modules_to_save" in name for name in trained)
    assert any("classifier" in name for name in trained)


@pytest.mark.parametrize("kind", ["prefix", "adapters"])
def test_an_ensemble_of_adapters_is_read_again(tmp_path, bert, kind):
    result = fit(toy(48), model=bert, output=tmp_path / "o", num_seeds=2, combine="ensemble", **QUICK, **options(kind))
    again = FittedModel.load(result.output)
    assert len(again.models) == 2
    assert np.array_equal(again.predict_proba(TEXTS), result.predict_proba(TEXTS))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"peft": "prefx"}, "peft must be one of lora, ia3, prefix, prompt, got 'prefx'.*prefix"),
        ({"peft": "ia3", "lora": True}, r"give lora \(True\) or peft \(ia3\), not both"),
        ({"methods": "re_init", "num_seeds": 2, "combine": "soup"}, "began alike, and ReInit draws other weights"),
        ({"methods": ["bitfit"], "peft": "ia3"}, "BitFit chooses what is trained, which PEFT has done"),
        ({"methods": ["lnsr"], "peft": "prompt"}, "LNSR compares hidden states token by token, and PROMPT_TUNING"),
        (
            {"peft": "prompt", "max_length": 64},
            "peft='prompt' does not work with a bert model",
        ),  # 64 positions, 20 more
    ],
)
def test_what_cannot_be_is_refused_before_training(tmp_path, bert, given, message):
    rows = toy(48)
    rows.loc[3, "text"] = "plot " * 70
    with pytest.raises(UsageError, match=message):
        fit(rows, model=bert, output=tmp_path / "o", **QUICK | given)
    assert not (tmp_path / "o").exists()


def test_a_prompt_that_hides_the_padding_from_a_decoder_is_refused(tmp_path):
    """Naive: GPT-2 takes its answer from the padding, and trains on that."""
    model = save_tiny_gpt2(tmp_path / "gpt2")
    with pytest.raises(UsageError, match="its outputs change with the padding beside a row"):
        fit(toy(48), model=model, output=tmp_path / "o", peft="prompt", **QUICK)


@pytest.mark.parametrize("architecture", ["XLNet", "Bart", "DebertaV2"])
@pytest.mark.parametrize("kind", ["lora", "prompt"])
def test_the_whole_head_is_trained_whatever_its_name(architecture, kind):
    """Naive: PEFT knows heads called classifier and score; others would stay as drawn, and would not be saved."""
    model = tiny(architecture)
    heads = {name for name, part in anatomy(model).items() if part.head}
    found = adapted(model, None, kind)
    trained = {n for n, p in found.named_parameters() if p.requires_grad}
    for name in heads:
        top, _, rest = name.partition(".")
        assert any(n.endswith(f"{top}.modules_to_save.default.{rest}") for n in trained), name


@pytest.mark.parametrize("kind", ["ia3", "prefix", "prompt"])
def test_methods_compose_with_every_kind(kind):
    configs = {"ia3": peft.IA3Config, "prefix": peft.PrefixTuningConfig, "prompt": peft.PromptTuningConfig}
    few = {} if kind == "ia3" else {"num_virtual_tokens": 5}
    mask = DPSDense(scope="all", update_ratio=0.25)
    for method in (mask, RDrop(), SMART(), FGM(), EMA(0.5), *([LNSR()] if kind != "prompt" else [])):
        model = peft.get_peft_model(helpers.bert(), configs[kind](task_type="SEQ_CLS", **few)).train()
        before = helpers.copied(model)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        run = Run(model, [method], total_steps=8)
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
        run.attach(optimizer)
        for batch in helpers.batches(3):
            run.loss(batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert {n for n, p in helpers.copied(model).items() if not torch.equal(p, before[n])} == trained
        if method is mask:
            assert set(run[DPSDense].masks) == trained
