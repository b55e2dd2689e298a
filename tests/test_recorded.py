"""Folders that an earlier version wrote are read, reported and continued (see recorded/make_before_move.py)."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from bench_helpers import TIMINGS
from steadytune import fit
from steadytune.bench.records import read_records
from steadytune.bench.report.write import write_report
from steadytune.bench.spec import Study
from steadytune.bench.study import run_study
from steadytune.errors import UsageError
from steadytune.fitting.fit_trainer import FitTrainer
from steadytune.fitting.fitted_model import FittedModel

RECORDED = Path(__file__).parent / "recorded" / "before-move"
OPTIONS = {
    "text": "text", "label": "label", "model": "bert", "tests": {"test": "test.csv"}, "validation_share": 0.25,
    "methods": ["dps_mix:update_ratio=0.3", "ema:decay=0.9"], "steps": 10, "batch_size": 4, "lr": 1e-2,
    "save_steps": 3, "progress": False,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A copy of the recorded files, and the working directory that they were made in."""
    copy = shutil.copytree(RECORDED, tmp_path / "before-move")
    monkeypatch.chdir(copy)
    monkeypatch.setenv("BEFORE_MOVE", ".")
    return copy


def test_a_study_is_read_and_reported(folder):
    records, problems = read_records("study")
    assert problems == []
    assert sorted((r["spec"]["recipe"], r["status"]) for r in records) == [
        ("dps_mix", "done"), ("none", "failed"), ("none", "failed"), ("plain", "done"), ("plain", "done"),
    ]  # fmt: skip
    page = write_report("study").read_text()
    assert "dps_mix" in page
    assert "1 run to do (sst2 16 dps_mix tiny seed 1)" in page


def test_a_study_goes_on_with_the_run_that_has_no_record(folder):
    """The ids are those of before, and the new record says what the old version recorded of the same run."""
    before = {file.name: file.read_bytes() for file in Path("study/records").iterdir()}
    study = Study.read("study.yaml")
    assert {f"{run.id}.json" for run in study.runs("data")} == {*before, *os.listdir("left-to-do")} - {
        name for name in os.listdir("left-to-do") if name.endswith(".parquet")
    }
    run_study(study, "study", data_root="data", workers=0, progress=False)
    after = {file.name: file.read_bytes() for file in Path("study/records").iterdir()}
    (new,) = after.keys() - before.keys()
    assert before.items() <= after.items(), "no run was done again"
    found, expected = (json.loads(Path(place, new).read_text()) for place in ("study/records", "left-to-do"))
    assert found["training"].pop("loss") == pytest.approx(expected["training"].pop("loss"), rel=1e-4)
    same = found.keys() & expected.keys() - TIMINGS - {"sets"}
    assert {key: found[key] for key in same} == {key: expected[key] for key in same}
    for name, scores in expected["sets"].items():
        assert scores.items() <= found["sets"][name].items()
    name = new.replace(".json", ".parquet")
    rows, old = (pd.read_parquet(Path(place, name)) for place in ("study/predictions", "left-to-do"))
    pd.testing.assert_frame_equal(rows[old.columns], old, rtol=1e-3, atol=1e-4)


def test_the_study_file_that_a_folder_keeps_is_read(folder):
    kept = Study.read("study/study.yaml")
    assert [run.id for run in kept.runs("data")] == [run.id for run in Study.read("study.yaml").runs("data")]


def test_an_interrupted_fit_goes_on_from_its_checkpoint(folder, monkeypatch):
    """It takes the four steps that are left, to the weights that the version of then reached without interruption.

    Processors round otherwise, and Adam scales up gradients that are nothing but rounding (those of a key's bias): by
    2e-4 on another kind. A step less, or another setting of a method, differs by 8e-3 or more.
    """
    plain, taken = FitTrainer.training_step, []
    monkeypatch.setattr(FitTrainer, "training_step", lambda *given: taken.append(1) or plain(*given))
    result = fit("train.csv", output="interrupted", resume=True, **OPTIONS)
    found, expected = (load_file(Path(place, "model.safetensors")) for place in ("interrupted", "finished"))
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)
    assert (len(taken), result.steps) == (4, 10)


def test_an_interrupted_fit_that_is_asked_for_something_else_is_refused(folder):
    with pytest.raises(UsageError, match="lr"):
        fit("train.csv", output="interrupted", resume=True, **{**OPTIONS, "lr": 2e-2})


def test_a_finished_fit_predicts_as_it_did(folder):
    model = FittedModel.load("finished")
    recorded = pd.read_parquet("finished/predictions.parquet").query("set == 'test'")
    probabilities = recorded[[f"probability_{name}" for name in model.problem.names]].to_numpy()
    texts = pd.read_csv("test.csv")["text"].tolist()
    assert model.predict(texts).tolist() == recorded["prediction"].tolist()
    assert model.predict_proba(texts) == pytest.approx(probabilities, abs=1e-4)
