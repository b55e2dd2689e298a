"""`fit` leaves out the word embeddings that no training text reads, and nobody can tell from the result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from test_fitting import QUICK, StopAt
from transformers import AutoModelForSequenceClassification, BertModel, GPT2Model

from fit_helpers import save_tiny_bert, save_tiny_gpt2, toy, weights
from steadytune import dry_run, fit
from steadytune.bench.spec import in_use
from steadytune.fitting import fit_trainer, training
from steadytune.fitting.options import Options

SIZE = 300
TABLE = "bert.embeddings.word_embeddings.weight"
WORDS = {"good", "bad", "film", "plot"}
TRAIN = pd.DataFrame(
    [{"text": f"{'good' if i % 2 else 'bad'} film" + " plot" * (i % 5), "label": str(i % 2)} for i in range(24)]
)
TEST = pd.DataFrame([{"text": text, "label": str(i % 2)} for i, text in enumerate(toy(20)["text"])])  # other words too
OPTIONS: dict[str, Any] = {**QUICK, "tests": {"test": TEST}, "weight_decay": 0.5, "lr": 1e-2, "probe": False}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A model with many words of which texts have few."""
    folder = tmp_path_factory.mktemp("bert")
    save_tiny_bert(folder)
    torch.manual_seed(1)
    model = BertModel.from_pretrained(folder)
    model.resize_token_embeddings(SIZE, mean_resizing=False)
    model.save_pretrained(folder)
    return str(folder)


def fitted(bert: str, folder: Path, **options: Any) -> Any:
    return fit(TRAIN, model=bert, output=folder, **{**OPTIONS, **options})


def vocabulary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "steadytune.json").read_text())["vocabulary"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"evaluations": 4, "validation": TEST},  # the best of several checkpoints, scored on words that do not train
        {"evaluations": 4, "validation": TEST, "save_steps": 0},  # and of weights that are kept in memory
        {"methods": "dps_mix:update_ratio=0.2", "num_seeds": 2, "accumulation": 2},
        {"procedure": "mixup-blo", "steps": 4},
    ],
    ids=["plain", "checkpoints", "memory", "soup", "procedure"],
)
def test_on_and_off_give_the_same(tmp_path, bert, options):
    one, other = (fitted(bert, tmp_path / str(compact), compact=compact, **options) for compact in (True, False))
    found, whole = weights(one.output), weights(other.output)
    assert found.keys() == whole.keys()
    for name in whole:
        torch.testing.assert_close(found[name], whole[name], rtol=1e-5, atol=1e-7)
    assert torch.equal(found[TABLE][100:], whole[TABLE][100:])
    before = AutoModelForSequenceClassification.from_pretrained(bert).get_parameter(TABLE)
    assert not torch.equal(found[TABLE][100:], before[100:])  # they have decayed
    pd.testing.assert_frame_equal(one.predictions, other.predictions, rtol=1e-4)
    assert vocabulary(one.output)["rows"] == SIZE
    assert len(WORDS) < vocabulary(one.output)["trained_rows"] < 20
    assert vocabulary(other.output) == {"whole": "compact is off"}


def test_what_is_left_out_is_told(tmp_path, bert, caplog):
    caplog.set_level("INFO", "steadytune")
    result = fitted(bert, tmp_path / "o")
    told = vocabulary(result.output)
    rows = len(WORDS) + 4  # special tokens
    assert told == {"rows": SIZE, "trained_rows": rows, "left_out_weights": (SIZE - rows) * 16}
    assert f"{rows} of {SIZE} word embeddings are trained" in caplog.text
    assert f"- {rows} of {SIZE} word embeddings were trained" in (result.output / "README.md").read_text()
    estimate = dry_run(TRAIN, model=bert, output=tmp_path / "p", **OPTIONS)
    share = told["left_out_weights"] / sum(t.numel() for t in weights(result.output).values())
    assert f"{share:.0%} of the weights need no gradient" in str(estimate)
    whole = dry_run(TRAIN, model=bert, output=tmp_path / "p", **OPTIONS, compact=False)
    assert "All word embeddings are trained: compact is off." in str(whole)
    assert estimate.files["model"] == whole.files["model"]


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of PEFT
@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"methods": "child_tuning_f"}, "ChildTuningF acts on all of them, or depends on them"),
        ({"methods": ["rdrop", "ema"]}, "EMA acts on all of them"),
        ({"methods": "bitfit"}, "BitFit acts on all"),
        ({"lora": True}, "adapters are trained instead of them"),
    ],
)
def test_it_switches_itself_off(tmp_path, bert, options, why):
    if "lora" in options:
        pytest.importorskip("peft")
    result = fitted(bert, tmp_path / "o", **options)
    assert why in vocabulary(result.output)["whole"]
    assert "word embeddings" not in (result.output / "README.md").read_text()


def test_token_types_that_are_looked_up_among_the_words_are_read_too(tmp_path):
    """GPT-2 has no table for them, and the token of their number may be no special one."""
    folder = save_tiny_gpt2(tmp_path / "gpt2")
    model = GPT2Model.from_pretrained(folder)
    model.resize_token_embeddings(SIZE, mean_resizing=False)
    model.save_pretrained(folder)
    result = fitted(folder, tmp_path / "o", steps=2)
    assert vocabulary(result.output)["trained_rows"] < SIZE


def test_it_is_off_where_it_saves_little(tmp_path):
    result = fit(toy(40), model=save_tiny_bert(tmp_path / "bert"), output=tmp_path / "o", **QUICK)
    assert "less than 5% of the weights" in vocabulary(result.output)["whole"]


@pytest.mark.parametrize("began", ["compact", "whole", "before it existed"])
def test_a_resumed_run_goes_on_as_it_began(tmp_path, bert, monkeypatch, began):
    """Whatever the option says now; a folder of an earlier version has whole checkpoints."""
    compact = began == "compact"
    straight = fitted(bert, tmp_path / "straight", compact=compact)
    monkeypatch.setattr(training, "Progress", lambda name: StopAt(8))
    with pytest.raises(KeyboardInterrupt):
        fitted(bert, tmp_path / "cut", compact=compact, progress=True)
    monkeypatch.undo()
    file = tmp_path / "cut" / "steadytune.json"
    record = json.loads(file.read_text())
    assert ("trained_rows" in record["vocabulary"]) == compact
    if began == "before it existed":
        del record["vocabulary"]
        file.write_text(json.dumps(record))
    resumed = fitted(bert, tmp_path / "cut", compact=not compact, resume=True)
    assert all(torch.equal(t, weights(straight.output)[name]) for name, t in weights(resumed.output).items())
    pd.testing.assert_frame_equal(straight.predictions, resumed.predictions)
    assert ("trained_rows" in vocabulary(resumed.output)) == compact


def test_a_checkpoint_is_a_whole_model_without_optimizer_state_for_what_is_left_out(tmp_path, bert, monkeypatch):
    kept = {}

    def look(trainer: Any, *args: Any) -> Any:
        folder = Path(trainer.args.output_dir) / "checkpoint-12"
        kept.update(model=AutoModelForSequenceClassification.from_pretrained(folder))
        kept.update(torch.load(folder / "optimizer.pt", weights_only=True))
        return own(trainer, *args)

    own = fit_trainer.FitTrainer.trained
    monkeypatch.setattr(fit_trainer.FitTrainer, "trained", look)
    fitted(bert, tmp_path / "o")
    assert kept["model"].get_input_embeddings().weight.shape == (SIZE, 16)
    assert max(len(state["exp_avg"]) for state in kept["state"].values()) < SIZE


def test_ids_of_studies_stay_what_they_were():
    assert "compact" not in in_use(Options(), numbers=False)
    assert in_use(Options(compact=False), numbers=False)["compact"] is False
