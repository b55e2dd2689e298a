"""Studies: what a file asks for, one record a run, what is interrupted goes on, several invocations share the work."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import random
import re
import shutil
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from typer.testing import CliRunner

import bench_helpers
from bench_helpers import Counting, comparable, make_root, predictions, records, small
from fit_helpers import data_root, same, weights
from helpers import KILLS
from steadytune import RDrop, cli, fit
from steadytune.bench import forecast
from steadytune.bench.pool import Outcome
from steadytune.bench.report.write import write_report
from steadytune.bench.run import corrupted, make_plan
from steadytune.bench.spec import Study, preset, presets
from steadytune.bench.store import Store
from steadytune.bench.study import Progress, run_study
from steadytune.data.problem import Classification
from steadytune.errors import UsageError
from steadytune.fitting.options import Options
from steadytune.methods import METHODS
from steadytune.tasks import TASKS, find, load, seen_by


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A small study, done."""
    folder = tmp_path_factory.mktemp("studies") / "small"
    result = run_study(small(root), folder, data_root=root, workers=0, progress=False)
    assert (result.done, result.failed) == (4, 0)
    return folder


# ---- what a study asks for


def test_runs_are_the_product_with_the_same_seeds_for_every_recipe(root):
    study = small(root, tasks=["sst2", "stsb"], train_sizes=[16, None], seeds=3)
    runs = study.runs(root)
    assert len(runs) == len({run.id for run in runs}) == 2 * 2 * 2 * 3
    per_recipe = Counter((r.spec["recipe"], tuple(r.spec["seeds"].values())) for r in runs)
    assert per_recipe == {(recipe, (s,) * 5): 4 for recipe in ("plain", "dps_mix") for s in range(3)}
    assert {r.spec["metric"] for r in runs} == {"accuracy", "spearman"}


def test_factorial_seeds_vary_on_their_own(root):
    study = small(root, recipes={"plain": {}}, seeds=[3, 5], factorial=["init", "data"])
    drawn = [run.spec["seeds"] for run in study.runs(root)]
    assert [(s["init"], s["data"]) for s in drawn] == [(3, 3), (3, 5), (5, 3), (5, 5)]
    assert {(s["subset"], s["dropout"], s["method"]) for s in drawn} == {(3, 3, 3)}


@pytest.mark.parametrize(
    "change",
    [
        {"options": {"steps": 7, "batch_size": 8, "lr": 1e-3}},
        {"recipes": {"plain": {"dropout": 0.0}, "dps_mix": {"methods": ["dps_mix:update_ratio=0.5"]}}},
        {"train_sizes": [31]},
        {"out_of_domain": True},
        {"test_rows": 10},
        {"label_noise": 0.1},
        {"imbalance": 0.5},
        {"metric": "f1"},
    ],
    ids=str,
)
def test_whatever_decides_a_result_is_in_the_name_of_its_record(root, change):
    before, after = ({run.id for run in small(root, **c).runs(root)} for c in ({}, change))
    assert not before & after


def test_another_model_or_other_data_are_other_runs_and_their_place_is_not(root, tmp_path):
    before = {run.id for run in small(root).runs(root)}
    moved = make_root(tmp_path)
    assert {run.id for run in small(moved).runs(moved)} == before
    (moved / "bert" / "config.json").write_text((moved / "bert" / "config.json").read_text() + " ")
    assert not {run.id for run in small(moved).runs(moved)} & before
    other = make_root(tmp_path / "other")
    bench_helpers.put(other, "sst2/validation", sentence=["good film"] * 2, label=[0, 1])
    assert not {run.id for run in small(other).runs(other)} & before


def test_the_study_file_reads_back_as_the_same_study(root, tmp_path):
    study = small(root, test_rows=7, factorial=["init"], label_noise=0.25)
    (tmp_path / "again.yaml").write_text(study.text())
    again = Study.read(tmp_path / "again.yaml")
    assert [r.id for r in again.runs(root)] == [r.id for r in study.runs(root)]


def test_places_of_this_machine_stay_out_of_the_study(root, monkeypatch):
    monkeypatch.setenv("HERE", str(root))
    study = small(root, models={"tiny": "$HERE/bert"}, data_root="$HERE")
    assert [run.id for run in study.runs()] == [run.id for run in small(root).runs(root)]
    assert str(root) not in study.text()
    monkeypatch.delenv("HERE")
    with pytest.raises(UsageError, match=r"the environment variable HERE in .* is not set: HERE=DIR"):
        study.runs()


def test_an_option_that_is_not_in_use_is_no_part_of_a_run(root):
    """An option of None is left out of the id, so that an option of a later version does not change all ids."""
    (run, *_), (same, *_) = (
        small(root, seeds=1, options={"steps": 6, **more}).runs(root) for more in ({}, {"peft": None})
    )
    assert run.id == same.id
    assert None not in run.spec["options"].values()


def test_a_file_builds_on_a_preset_and_arguments_win(root, tmp_path):
    (tmp_path / "mine.yaml").write_text("preset: stick\nseeds: [4]\noptions: {steps: 5, lr: 2e-4}\n")
    study = Study.read(tmp_path / "mine.yaml", models={"tiny": str(root / "bert")})
    assert (study.name, study.seeds, study.tasks, study.train_sizes) == ("mine", (4,), ("sst2", "stsb"), (500,))
    assert study.recipe("mixout").lr == 2e-4, "YAML 1.1 takes 2e-4 for text"
    assert study.recipe("mixout").steps == 5


def test_the_preset_of_every_method_lists_every_method_that_fit_takes(root):
    study = Study.read("stick", models={"tiny": str(root / "bert")})
    left_out = {"easy_adapt", "group_weights"}  # read subgroups, which not every table has
    assert set(study.recipes) == {"plain", *METHODS} - left_out
    assert [p["name"] for p in study.parts("bitfit")] == ["bitfit"]
    assert (study.recipe("bitfit").lr, study.recipe("rdrop").lr) == (1e-3, 1e-4)


def test_methods_make_a_recipe_each_and_recipes_win(root):
    study = small(root, methods=["mixout:keep=0.8", "ema"], recipes={"ema": {"methods": ["ema"], "lr": 5e-4}})
    assert list(study.recipes) == ["plain", "mixout:keep=0.8", "ema"]
    assert study.recipe("ema").lr == 5e-4
    assert study.parts("mixout:keep=0.8")[0]["options"]["keep"] == 0.8


RESULTS = Path(__file__).parents[2] / "docs" / "results"
PUBLISHED = sorted(file for file in RESULTS.glob("*.yaml") if (RESULTS / file.stem / "records").is_dir())


def test_published_studies_are_found():
    assert len(PUBLISHED) >= 8


@pytest.mark.parametrize("file", PUBLISHED, ids=lambda file: file.stem)
def test_studies_that_were_published_still_mean_what_their_records_say(file, monkeypatch):
    """A method that gains an option, or another default, does not change the ids of old records."""
    monkeypatch.delenv("STEADYTUNE_DATA", raising=False)
    if re.search(r"(aux|unlabelled): *\[\$STEADYTUNE_DATA", file.read_text(encoding="utf-8")):
        monkeypatch.setenv("STEADYTUNE_DATA", str(data_root()))  # such a recipe is named by what is in these files
    study = Study.read(file)
    for record in (RESULTS / file.stem / "records").glob("*.json"):
        spec = json.loads(record.read_text(encoding="utf-8"))["spec"]
        assert study.parts(spec["recipe"]) == spec["methods"], spec["recipe"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("taks: [sst2]", "line 1: unknown key 'taks'. Did you mean 'tasks'"),
        ("seeds: 3\nlabel_noise: 2", "line 2: label_noise must be a share from 0 to 1, got 2."),
        ("train_sizes: [300, many]", "line 1: train_sizes must be a whole number from 1 on, got 'many'."),
        ("name: 7", "line 1: name must be text, got 7: put it in quotes."),
        ("options:\n  lr: fast", "line 2: options: lr must be a number, got 'fast'."),
        ("options:\n  steps: 7\n  peft: lorra", "line 3: options: peft must be one of lora, ia3, prefix, prompt, got"),
        ("options: [lr]", "line 1: options must be names with values, as in `lr: 1.0e-4`, got ['lr']."),
        ("recipes:\n  x:\n    lr: 1\n    drop: 0.1", "line 4: recipe 'x': unknown option 'drop'. Did you mean 'drop"),
        ("recipes:\n  x: {}\n  y: {methods: [mixoud]}", "line 3: unknown method 'mixoud'. Did you mean 'mixout'"),
        ("recipes:\n  x: {methods: [3]}", "line 2: recipe 'x': methods must be text, got 3: put it in quotes."),
        ("recipes:\n  1: {}", "line 1: recipes has the key 1, and keys must be text: put it in quotes."),
        ("recipes:\n  x: {}\n  x: {}", "line 3: 'x' is also given in line 2"),
        ("keep_models: 1", "line 1: keep_models must be true or false, got 1."),
        ("test_rows: 0.5", "line 1: test_rows must be a whole number from 1 on, got 0.5."),
        ("imbalance: .nan", "line 1: imbalance must be a share from 0 to 1, got nan."),
        ("models: [a/bert, b/bert]", "line 1: models must have different names, got bert, bert: write NAME: PATH."),
        ("methods: [mixout, 3]", "line 1: methods must be text, got 3: put it in quotes."),
        ("train_sizes: [20, 20]", "line 1: train_sizes must be different, got 20 and 20."),
        ("train_sizes: []", "line 1: train_sizes is empty: leave it out to train on all rows."),
        ("factorial: [init, init]", "line 1: factorial must be different, got init and init."),
        ("tasks: [sst2, sst2]", "line 1: tasks must be different, got sst2 and sst2."),
        ("recipes: [plain]\nmethods: [mixout]", "line 1: recipes must be"),
        ("recipes: plain\nmethods: [mixout]", "line 1: recipes must be"),
        ("preset: stik", "unknown preset 'stik'. Did you mean 'stick'"),
        ("tables: []", "line 1: unknown key 'tables'. Known: name, models, tasks"),
        ("models:\n  tiny: {path: x, seen: [1]}", "line 2: models.tiny.seen must be text, got 1: put it in quotes."),
    ],
)
def test_a_mistake_in_a_study_file_is_named_with_its_line(tmp_path, text, message):
    parts = {"models": "models: {tiny: bert}\n", "tasks": "tasks: [sst2]\n", "recipes": "recipes: {plain: {}}\n"}
    rest = "".join(part for key, part in parts.items() if not re.search(rf"^{key}:", text, re.M))
    (tmp_path / "s.yaml").write_text(f"{text}\n{rest}")
    with pytest.raises(UsageError) as error:
        Study.read(tmp_path / "s.yaml")
    assert message in str(error.value)


@pytest.mark.parametrize("name", presets())
def test_presets_are_studies(root, name):
    study = Study.of({"models": {"tiny": str(root / "bert")}, **preset(name)})
    assert set(study.tasks) <= set(TASKS)
    for recipe in study.recipes:
        assert study.recipe(recipe).validation_share == 0.0, "nothing selects, so no row is held out"


def test_rows_are_held_out_for_what_selects(root):
    study = small(
        root, recipes={"plain": {}, "best": {"evaluations": 2}, "mine": {"evaluations": 2, "validation_share": 0.3}}
    )
    assert [study.recipe(name).validation_share for name in study.recipes] == [0.0, 0.1, 0.3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": ["sst2"]}, "unknown key 'task'. Did you mean 'tasks'"),
        ({"models": []}, "models is missing"),
        ({"models": {"tiny": {"pfad": "x"}}}, "models.tiny: unknown key 'pfad'"),
        ({"tasks": ["sst3"]}, "unknown task 'sst3'. Did you mean 'sst2'"),
        ({"recipes": {"x": {"learning_rat": 1}}}, "recipe 'x': unknown option 'learning_rat'"),
        ({"options": {"stepz": 1}}, "options: unknown option 'stepz'. Did you mean 'steps'"),
        (
            {"options": {"lr": 1, "learning_rate": 2}},
            "options: learning_rate and lr are two names of one option: give one of them.",
        ),
        ({"recipes": {"x": {"lr": "fast"}}}, "recipe 'x': lr must be a number, got 'fast'"),
        ({"recipes": {"x": {"lr": -1}}}, "lr must be above 0, got -1"),
        ({"recipes": {"x": {"methods": ["dps"]}}}, "unknown method 'dps'. Did you mean 'dps_"),
        ({"recipes": {"x": {"seed": 3}}}, "recipe 'x': unknown option 'seed'"),
        ({"seeds": 0}, "seeds must be a whole number from 1 on, got 0"),
        ({"seeds": [1, 1]}, "seeds must be different numbers"),
        ({"factorial": ["order"]}, "factorial: unknown seed 'order'"),
        ({"train_sizes": [0]}, "train_sizes must be a whole number from 1 on, got 0"),
        ({"label_noise": 2}, "label_noise must be a share from 0 to 1, got 2"),
        ({"tasks": ["stsb"], "label_noise": 0.1}, "need classes, task stsb has none"),
        ({"tasks": ["stsb"], "metric": "accuracy"}, "task stsb is a regression, its metrics are pearson"),
        ({"out_of_domain": "yes"}, "out_of_domain must be true or false, got 'yes'"),
    ],
    ids=str,
)
def test_what_a_study_cannot_be_is_said_in_one_sentence(root, change, message):
    with pytest.raises(UsageError) as error:
        small(root, **change)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("break_", "message"),
    [
        (lambda root: (root / "bert" / "config.json").unlink(), "has no config.json or no weights"),
        (
            lambda root: (root / "sst2" / "validation.parquet").unlink(),
            "no such file: give the folder of the benchmark",
        ),
    ],
    ids=["model", "data"],
)
def test_a_missing_model_or_file_is_named_before_anything_runs(tmp_path, break_, message):
    root = make_root(tmp_path)
    break_(root)
    with pytest.raises(UsageError, match=message):
        run_study(small(root), tmp_path / "out", data_root=root, workers=0)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_something_else_is_refused(root, tmp_path):
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UsageError, match="is not empty and holds no study"):
        run_study(small(root), tmp_path, data_root=root, workers=0)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("workers", "timeout", "message"),
    [
        (1, -5, "timeout must be more than 0 seconds, got -5"),
        (0, 0.1, "timeout 0.1 needs a worker process, and workers is 0"),
    ],
)
def test_a_time_limit_that_cannot_be_kept_is_refused(root, tmp_path, workers, timeout, message):
    with pytest.raises(UsageError, match=message):
        run_study(small(root), tmp_path / "out", data_root=root, workers=workers, timeout=timeout, progress=False)
    assert not (tmp_path / "out").exists()


def test_filters_choose_by_pattern(root):
    runs = small(root, seeds=12).runs(root)

    def count(*filters):
        return sum(run.matches(filters) for run in runs)

    assert count("recipe=plain") == count("recipe=p*") == 12
    assert count("recipe=plain|dps*", "seed=1") == 2, "seed 1, not 10 or 11"
    assert count("size=32") == 24
    assert count("size=all") == 0
    with pytest.raises(UsageError, match="filter 'steps=3' must be one of model, task, recipe, size, seed"):
        count("steps=3")


def test_what_the_model_has_seen_is_told(root):
    assert seen_by(["sentence-transformers/all-MiniLM-L6-v2"], find("qnli"), False) == (
        "qnli: trained on SQuAD, of which it is made",
    )
    assert seen_by(["minilm"], find("sst2"), True, ["imdb"]) == ("imdb: said to be seen",)
    beyond = seen_by(["x/all_minilm_l6_v2/model"], find("rte"), True)
    assert [text.partition(":")[0] for text in beyond] == ["sick", "snli", "mnli"]
    assert seen_by(["bert-base-uncased"], find("mnli"), True) == ()


# ---- runs and records


def test_a_record_says_what_was_run_and_what_came_out(root, finished):
    runs = {run.id: run for run in small(root).runs(root)}
    found = records(finished)
    assert found.keys() == runs.keys()
    for id, record in found.items():
        assert (record["id"], record["format"], record["status"], record["error"]) == (id, 1, "done", None)
        assert record["spec"] == json.loads(json.dumps(runs[id].spec))
        assert record["training"]["steps"] == 6
        assert record["training"]["rows"] == 32
        assert record["cost"]["train_seconds"] < record["cost"]["seconds"] < 60
        assert record["context"]["device"] == "cpu"
        (about,) = record["sets"].values()
        frame = pd.read_parquet(finished / "predictions" / f"{id}.parquet")
        assert about["accuracy"] == np.mean(frame["label"] == frame["prediction"])
        assert (about["rows"], about["domain"]) == (30, "in")
        assert about["baseline"] == frame["label"].value_counts(normalize=True).max()


def test_passes_are_counted_with_all_that_comes_before_the_first_step(root, tmp_path):
    methods = {"plain": [], "smart": ["smart:steps=2"], "child": ["child_tuning_d"]}
    study = small(root, recipes={name: {"methods": given} for name, given in methods.items()}, seeds=1)
    run_study(study, tmp_path, data_root=root, workers=0, progress=False)
    found = {record["spec"]["recipe"]: record["cost"]["passes"] for record in records(tmp_path).values()}
    ascent = (1 + 2 / 2) / 3
    assert found == {"plain": 1, "smart": pytest.approx(2 + 2 * ascent), "child": pytest.approx(1 + 4 / 6)}


def test_paired_runs_share_rows_and_head_and_their_subset_differs_from_seed_to_seed(root):
    runs = small(root).runs(root)
    rows = {(r.spec["recipe"], r.spec["seeds"]["subset"]): set(make_plan(r).data.train.index) for r in runs}
    assert rows["plain", 0] == rows["dps_mix", 0]
    assert rows["plain", 0] != rows["plain", 1]


def test_out_of_domain_sets_are_marked_and_cut_to_the_same_rows(root, tmp_path):
    study = small(root, recipes={"plain": {}}, out_of_domain=True, test_rows=10)
    run_study(study, tmp_path, data_root=root, workers=0, progress=False)
    one, two = records(tmp_path).values()
    assert {name: about["domain"] for name, about in one["sets"].items()} == {
        "sst2/validation": "in",
        **dict.fromkeys((*TASKS["sst2"].beyond,), "out"),
    }
    assert {about["rows"] for about in one["sets"].values()} == {10}
    drawn = [pd.read_parquet(tmp_path / "predictions" / f"{r['id']}.parquet")[["set", "row"]] for r in (one, two)]
    pd.testing.assert_frame_equal(*drawn)


def test_a_regression_has_no_baseline_and_selection_is_marked(root, tmp_path):
    study = small(root, tasks=["stsb"], recipes={"best": {"evaluations": 2}}, seeds=1)
    run_study(study, tmp_path, data_root=root, workers=0, progress=False)
    (record,) = records(tmp_path).values()
    assert {name: about["domain"] for name, about in record["sets"].items()} == {
        "validation": "select",
        "stsb/validation": "in",
    }
    assert record["sets"]["stsb/validation"]["baseline"] is None
    assert [step for step, _ in record["training"]["curve"]] == [3, 6]


def test_an_option_for_numbers_is_no_part_of_runs_that_have_none(root):
    for standardize in (True, False):
        study = small(root, tasks=["sst2", "stsb"], options={"standardize": standardize})
        found = {run.spec["task"]["name"]: run.spec["options"] for run in study.runs(root)}
        assert "standardize" not in found["sst2"]
        assert found["stsb"].get("standardize", False) is standardize
        trained = {run.spec["task"]["name"]: make_plan(run).options.standardize for run in study.runs(root)}
        assert trained["stsb"] is standardize  # naive: what is not part of a run has the default of a fit


def rows(labels):
    return pd.DataFrame({"text": [str(i) for i in range(len(labels))], "label": labels})


def corruption(label_noise=0.0, imbalance=None, subset=0):
    return {"corruption": {"label_noise": label_noise, "imbalance": imbalance}, "seeds": {"subset": subset}}


def test_label_noise_replaces_exactly_its_share_by_other_classes():
    problem = Classification(("a", "b", "c"))
    before = rows(["a", "b", "c", "c"] * 50)
    after = corrupted(before, problem, corruption(0.3))
    assert (before["label"] != after["label"]).sum() == 60
    assert set(after["label"]) == {"a", "b", "c"}
    assert before["label"].tolist() == ["a", "b", "c", "c"] * 50, "the rows that were given stay as they are"
    again, other = (corrupted(before, problem, corruption(0.3, subset=s)) for s in (0, 1))
    assert after["label"].equals(again["label"])
    assert not after["label"].equals(other["label"])


def test_imbalance_thins_all_classes_but_the_largest():
    after = corrupted(
        rows(["a"] * 40 + ["b"] * 60 + ["c"] * 10), Classification(("a", "b", "c")), corruption(imbalance=0.1)
    )
    assert after["label"].value_counts().to_dict() == {"b": 60, "a": 4, "c": 1}
    assert after.index.is_monotonic_increasing


def test_epochs_are_epochs_of_the_rows_that_imbalance_leaves(root):
    """32 toy rows hold 21 of the larger class and 11 of the smaller, of which a tenth, one row, stays: 22 rows."""
    epochs = {"steps": None, "epochs": 4, "batch_size": 2}
    plans = [
        make_plan(run)
        for imbalance in (None, 0.1)
        for run in small(root, seeds=1, recipes={"plain": {}}, options=epochs, imbalance=imbalance).runs(root)
    ]
    assert [(len(plan.data.train), plan.steps) for plan in plans] == [(32, 4 * 16), (22, 4 * 11)]


def test_runs_of_thinned_classes_that_were_trained_for_other_steps_are_other_runs(root):
    """Earlier versions counted steps on the rows before thinning. Runs with given steps keep their ids."""
    given, counted = (
        small(root, seeds=1, recipes={"plain": {}}, imbalance=0.1, options=options).runs(root)[0].spec
        for options in ({"steps": 6}, {"epochs": 2})
    )
    assert given["corruption"] == {"label_noise": 0.0, "imbalance": 0.1}
    assert counted["corruption"] == {**given["corruption"], "steps": "of the rows that are left"}


def test_a_run_that_fails_is_a_record_with_its_traceback_and_the_others_go_on(root, tmp_path):
    study = small(root, recipes={"plain": {}, "none": {"dropout": 0.0, "methods": ["rdrop"]}}, seeds=1)
    result = run_study(study, tmp_path, data_root=root, workers=0, progress=False)
    assert (result.done, result.failed) == (1, 1)
    failed = next(r for r in records(tmp_path).values() if r["status"] == "failed")
    assert (failed["sets"], failed["training"], failed["spec"]["recipe"]) == ({}, None, "none")
    assert failed["error"].startswith("Traceback")
    assert "no active dropout" in failed["error"]


def test_what_has_a_record_is_not_run_again_unless_failed_ones_are_asked_for(root, tmp_path):
    study = small(root, recipes={"plain": {}, "none": {"dropout": 0.0, "methods": ["rdrop"]}}, seeds=1)
    logs = [tmp_path / f"{i}.log" for i in range(3)]
    for log, retry in zip(logs, (False, False, True), strict=True):
        log.touch()
        options = {"engine": Counting(log), "retry_failed": retry, "progress": False}
        run_study(study, tmp_path / "out", data_root=root, **options)
    done, again, retried = (log.read_text().split() for log in logs)
    failed = [r["id"] for r in records(tmp_path / "out").values() if r["status"] == "failed"]
    assert len(done) == 2
    assert again == []
    assert retried == failed


def test_what_was_asked_for_and_is_not_done_is_known_to_the_report(root, tmp_path):
    study = small(root, seeds=1)
    run_study(study, tmp_path, data_root=root, workers=0, progress=False, filters=["recipe=plain"])
    page = write_report(tmp_path).read_text()
    assert "The study is not finished: 1 run to do (sst2 32 dps_mix tiny seed 0)." in page
    run_study(study, tmp_path, data_root=root, workers=0, progress=False)
    assert "to do" not in write_report(tmp_path).read_text()


def test_runs_of_a_study_before_it_was_edited_are_not_to_do(root, tmp_path):
    before, after = small(root, seeds=3), small(root, seeds=1, options={"steps": 2, "batch_size": 8, "lr": 1e-3})
    run_study(before, tmp_path, data_root=root, workers=0, progress=False, filters=["recipe=plain", "seed=0"])
    run_study(after, tmp_path, data_root=root, workers=0, progress=False)
    assert "to do" not in write_report(tmp_path).read_text()


def test_what_a_worker_could_not_record_is_recorded(root, tmp_path):
    class Dying:
        def map(self, tasks, begun):
            yield from (Outcome(task, error="the worker process died (signal 9)") for task in tasks)

    result = run_study(small(root), tmp_path, data_root=root, engine=Dying(), progress=False)
    assert (result.done, result.failed) == (0, 4)
    assert {r["error"] for r in records(tmp_path).values()} == {"the worker process died (signal 9)"}


def test_workers_give_the_same_records_as_this_process(root, finished, tmp_path):
    """A worker has half the cores here: one thread, as the tests."""
    run_study(small(root), tmp_path / "out", data_root=root, workers=2, progress=False)
    assert comparable(tmp_path / "out") == comparable(finished)
    assert predictions(tmp_path / "out") == predictions(finished)


# ---- interruption


def test_killed_at_random_moments_all_records_equal_an_uninterrupted_study(root, tmp_path):
    """No run is lost, done twice or half-written: the log of each process names the runs that it finished."""
    processes = multiprocessing.get_context("forkserver")  # imports once: moments of runs are hit, not of imports
    processes.set_forkserver_preload(
        ["steadytune.fitting.training", "steadytune.bench.run", "steadytune.fitting.fitted_model"]
    )

    def conduct(output, seconds):
        process = processes.Process(target=bench_helpers.conduct, args=(str(root), str(tmp_path / output)))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode == 0

    assert conduct("warm", None)
    started = time.monotonic()
    assert conduct("straight", None)
    whole = time.monotonic() - started
    draw, kills, studies = random.Random(0), 0, 1
    while kills < KILLS:
        if conduct(f"cut{studies}", draw.uniform(0, 0.5 * whole)):
            studies += 1
        else:
            kills += 1
    assert conduct(f"cut{studies}", None)
    for cut in (f"cut{n}" for n in range(1, studies + 1)):
        assert comparable(tmp_path / cut) == comparable(tmp_path / "straight")
        assert predictions(tmp_path / cut) == predictions(tmp_path / "straight")
        ended = [id for log in tmp_path.glob(f"{cut}.*.log") for id in log.read_text().split()]
        assert len(ended) == len(set(ended)), "a run was done twice"


def test_two_invocations_on_one_folder_share_the_work(root, tmp_path):
    processes = multiprocessing.get_context("spawn")
    both = [processes.Process(target=bench_helpers.conduct, args=(str(root), str(tmp_path / "both"))) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    shares = [log.read_text().split() for log in tmp_path.glob("both.*.log")]
    assert sorted(id for share in shares for id in share) == sorted(records(tmp_path / "both"))
    bench_helpers.conduct(str(root), str(tmp_path / "one"))
    assert comparable(tmp_path / "both") == comparable(tmp_path / "one")


def test_a_run_that_another_invocation_holds_is_waited_for(root, tmp_path, monkeypatch):
    """A worker that dies leaves no record, so the run is done in this process."""
    study = small(root, seeds=1, recipes={"plain": {}})
    (run,) = study.runs(root)
    other = Store(tmp_path)
    other.begin("", {})
    held = other.claim(run.id)
    assert held.__enter__()
    monkeypatch.setattr("steadytune.bench.study.time.sleep", lambda seconds: held.__exit__(None, None, None))
    assert run_study(study, tmp_path, data_root=root, workers=0, progress=False).done == 1


# ---- the verb


def bench(root, *arguments):
    command = ["bench", *map(str, arguments)]
    return CliRunner().invoke(cli.app, command, env={"STEADYTUNE_DATA": str(root), "COLUMNS": "200"})


def test_the_verb_runs_a_file_says_what_is_to_do_and_counts(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text(yaml.safe_dump({**yaml.safe_load(small(root).text()), "name": "mine"}))
    planned = bench(root, "mine.yaml", "--dry-run", "--filter", "recipe=plain")
    assert planned.exit_code == 0, planned.output
    assert planned.output.count("to do: sst2 32 plain tiny seed") == 2
    assert not Path("runs").exists()
    done = bench(root, "mine.yaml", "--workers", 0, "--filter", "recipe=plain")
    assert (done.exit_code, done.stdout) == (0, "2 runs done, 0 failed: runs/mine\n"), done.output
    lines = done.stderr.splitlines()
    assert lines[:2] == ["2 runs, 0 of them done before", "sst2 32 plain tiny seed 0 has begun"]
    assert "2/2 sst2 32 plain tiny seed 1: 0 failed, 0 to do, best on sst2: plain" in done.stderr
    assert bench(root, "mine.yaml", "--dry-run").output.count(" done: ") == 2


def test_a_bar_on_a_terminal_is_there_before_the_first_run_ends(root, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("steadytune.bench.study._terminal", lambda: True)
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes the captured stream for a terminal
    monkeypatch.setenv("COLUMNS", "200")
    runs = small(root, seeds=1).runs(root)
    with Progress(Store(tmp_path), runs, shown=True) as shown:
        shown.begin(runs[0])
        shown.bar.refresh()
        said = capsys.readouterr().err
    assert "0/2" in said
    assert "sst2 32 plain tiny seed 0 ..." in said


def test_a_dry_run_says_minutes_from_measured_steps_and_writes_nothing(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipes = {"plain": {}, "both": {"methods": ["rdrop"]}, "blo": {"procedure": "mixup-blo"},
               "pairs": {"procedure": "contrastive"}}  # fmt: skip
    study = small(root, recipes=recipes)
    Path("mine.yaml").write_text(study.text())
    found = bench(root, "mine.yaml", "--dry-run", "--seeds", 2)
    assert found.exit_code == 0, found.output
    assert re.search(r"^sst2 tiny 32: (about|less than) \d+\.\d minutes$", found.stdout, re.M)
    assert found.stdout.rstrip().endswith("no record tells how long they take: 2 of blo")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.yaml"]


def test_a_forecast_goes_by_steps_rows_and_passes():
    """12 s for 100 steps of 8 rows and 1.5 passes are 0.01 s a row: 25 steps of 16 rows and 2 passes take 8 s."""
    record = {
        "spec": {"options": {"steps": 100, "batch_size": 8}},
        "training": {"rows": 40, "steps": 100},
        "cost": {"seconds": 15.0, "train_seconds": 12.0, "passes": 1.5},
    }
    pace = forecast.recorded(record)
    assert pace.seconds(Options(steps=25, batch_size=16), 2.0) == pytest.approx(8 + 3)
    assert pace.seconds(Options(epochs=2, batch_size=16), 1.0) == pytest.approx(2 * 3 * 16 * 0.01 + 3)
    assert forecast.passes(["rdrop", "ema"]) == type(RDrop()).cost.passes


def test_a_forecast_believes_the_records_of_the_recipe(root, finished):
    runs = small(root, seeds=5).runs(root)
    missing = [run for run in runs if not Store(finished).has(run.id)]
    took = {}
    for record in records(finished).values():
        took.setdefault(record["spec"]["recipe"], []).append(record["cost"]["seconds"])
    (seconds,) = forecast.forecast(missing, Store(finished)).seconds.values()
    assert seconds == pytest.approx(3 * sum(np.mean(values) for values in took.values()))


def test_the_verb_says_which_runs_failed_with_its_exit_code(root, tmp_path):
    arguments = ["--model", f"tiny={root / 'bert'}", "--output", tmp_path / "out", "--seeds", 1, "--workers", 0]
    found = bench(root, "stick", *arguments, "--filter", "task=sst2", "--filter", "recipe=plain")
    assert found.exit_code == 1, found.output
    assert "0 runs done, 1 failed" in found.output
    (record,) = records(tmp_path / "out").values()
    assert "500" in record["error"], "the toy set has fewer rows"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.yaml"], "nothing.yaml: no such study file; presets are glue-small, imbalance"),
        (["stick"], "stick: models is missing: name at least one."),
        (["stick", "--model", "nowhere/at/all/"], "model 'nowhere/at/all/'"),
        (["stick", "--model", "./no"], "model './no': no such directory."),
        (["stick", "--model", "x/bert", "--model", "y/bert"], "two models have one name (bert, bert): name them with"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_and_exit_code_2(root, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = bench(root, *arguments)
    assert (found.exit_code, found.stdout) == (2, "")
    assert found.stderr.startswith("error: ")
    assert message in found.stderr
    assert "Traceback" not in found.output
    assert list(tmp_path.iterdir()) == []


def test_arms_of_the_start_run_in_a_study_and_stock_options_leave_no_trace(root, tmp_path):
    arms = {
        "plain": {},
        "stock": {"pooling": "model", "head": "random"},
        "lp-ft": {"head": "logistic"},
        "mean": {"pooling": "mean"},
        "probe": {"head": "logistic", "steps": 0},
    }
    study = small(root, recipes=arms, seeds=1)
    options = {run.spec["recipe"]: run.spec["options"] for run in study.runs(root)}
    assert options["plain"] == options["stock"]
    assert not {"head", "pooling"} & options["plain"].keys()
    run_study(study, tmp_path / "out", data_root=root, workers=0, progress=False)
    found = {record["spec"]["recipe"]: record for record in records(tmp_path / "out").values()}
    assert {record["status"] for record in found.values()} == {"done"}, [r["error"] for r in found.values()]
    assert [found[name]["training"]["steps"] for name in ("plain", "probe")] == [6, 0]
    losses = {name: record["sets"]["sst2/validation"]["log_loss"] for name, record in found.items()}
    assert losses.pop("stock") == losses["plain"]
    assert len(set(losses.values())) == 4


def test_only_a_sentence_encoder_has_its_pooling_chosen(root, tmp_path):
    encoder = shutil.copytree(root / "bert", tmp_path / "encoder")
    modules = [{"path": "", "type": "x.Transformer"}, {"path": "1_Pooling", "type": "x.Pooling"}]
    (encoder / "modules.json").write_text(json.dumps(modules))
    (encoder / "1_Pooling").mkdir()
    (encoder / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    study = small(root, models={"tiny": str(root / "bert"), "encoder": str(encoder)}, seeds=1)
    chosen = {run.spec["model"]["name"]: run.spec["options"].get("pooling") for run in study.runs(root)}
    assert chosen == {"tiny": None, "encoder": "auto"}


def test_a_forecast_measures_no_run_without_steps(root, tmp_path):
    study = small(root, recipes={"probe": {"head": "logistic", "steps": 0}, "plain": {}}, seeds=1)
    found = forecast.forecast(study.runs(root), Store(tmp_path))
    assert found.unknown == []
    alone = forecast.forecast([run for run in study.runs(root) if run.spec["recipe"] == "probe"], Store(tmp_path))
    assert len(alone.unknown) == 1


def test_a_soup_is_the_mean_of_its_trainings(tmp_path, root):
    """As `fit` makes it: the same head, other orders of rows and dropout; and the passes of all trainings."""
    study = small(root, recipes={"plain": {}, "soup": {"soup": 3}}, seeds=1, keep_models=True)
    run_study(study, tmp_path / "study", data_root=root, workers=0, progress=False)
    found = {record["spec"]["recipe"]: record for record in records(tmp_path / "study").values()}
    assert found["soup"]["spec"]["methods"] == [{"name": "soup", "options": {"runs": 3}}]
    assert found["soup"]["cost"]["passes"] == pytest.approx(3 * found["plain"]["cost"]["passes"])
    (run,) = (run for run in study.runs(root) if run.soup == 3)
    options = dataclasses.asdict(make_plan(run).options)
    table, tests = load("sst2", root)
    fit(
        table, tests=tests, model=str(root / "bert"), output=tmp_path / "fit", num_seeds=3, combine="soup", probe=False,
        save_steps=0, progress=False, **{name: value for name, value in options.items() if value is not None},
    )  # fmt: skip
    assert same(weights(Store(tmp_path / "study").model(run.id)), weights(tmp_path / "fit"))


def test_models_that_a_finished_study_lacks_are_named(tmp_path, root, caplog):
    """Naive: ``keep_models: true`` on a finished study does nothing and says nothing."""
    options = {"data_root": root, "workers": 0, "progress": False}
    run_study(small(root, recipes={"plain": {}}, seeds=1), tmp_path, **options)
    assert not caplog.messages
    study = small(root, recipes={"plain": {}}, seeds=2, keep_models=True)
    run_study(study, tmp_path, **options)
    (told,) = set(caplog.messages)
    (model,) = (tmp_path / "models").iterdir()
    (lacking,) = {run.id for run in study.runs(root)} - {model.name}
    assert f"this is so of 1, such as {lacking}" in told
    caplog.clear()
    (tmp_path / "records" / f"{lacking}.json").unlink()
    run_study(study, tmp_path, **options)
    run_study(study, tmp_path, **options)
    assert not caplog.messages


def test_the_forecast_counts_each_training_of_a_soup(tmp_path, root):
    """Naive: a soup takes as long as one of its trainings."""
    run_study(small(root, recipes={"plain": {}}, seeds=1), tmp_path, data_root=root, workers=0, progress=False)
    (cost,) = (record["cost"] for record in records(tmp_path).values())
    study = small(root, recipes={"plain": {}, "soup": {"soup": 3}}, seeds=1)
    (soup,) = (run for run in study.runs(root) if run.soup == 3)
    found = forecast.forecast([soup], Store(tmp_path))
    assert sum(found.seconds.values()) == pytest.approx(cost["seconds"] + 2 * cost["train_seconds"])
