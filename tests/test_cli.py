import dataclasses
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from fit_helpers import data_root, save_tiny_bert, toy
from steadytune import __version__
from steadytune import cli as cli_module
from steadytune.cli import app
from steadytune.cli.common import named_files
from steadytune.fitting.options import Options
from steadytune.fitting.procedures import PROCEDURES
from steadytune.fitting.stages.meta import LEARNERS
from steadytune.fitting.stages.pretraining import PRETRAININGS
from steadytune.methods import METHODS
from steadytune.tasks import TASKS

QUICK = ["--steps", "4", "--batch-size", "4", "--quiet"]


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def root():
    return data_root()  # before `shell` hides the environment variable


@pytest.fixture
def shell(monkeypatch, tmp_path):
    """Runs the command in a scratch directory with train.csv and test.csv; wide, so that tables do not wrap."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("STEADYTUNE_DATA", raising=False)
    toy(30).to_csv("train.csv", index=False)
    toy(9, start=100).to_csv("test.csv", index=False)
    return lambda *words: CliRunner().invoke(app, [str(word) for word in words])


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from typer.testing import CliRunner; from steadytune.cli import app\n"
        "for words in ([], ['fit'], ['methods'], ['tasks']):\n"
        "    assert CliRunner().invoke(app, [*words, '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'transformers', 'pandas', 'sklearn') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_flags_and_recipe_agree_on_every_default():
    flags = inspect.signature(cli_module.fit).parameters
    for field in dataclasses.fields(Options):
        assert flags[field.name].default == field.default, field.name


def test_fit_writes_a_model_and_prints_the_scores(shell, tmp_path, bert):
    done = shell(
        "fit", "train.csv", "--model", bert, "--output", "out", "--test", "test.csv", "--test", "again=test.csv",
        "--method", "dps_dense:keep=0.6,update_ratio=0.5", "--method", "l2sp", "--seed", 5, *QUICK,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert list(metrics["sets"]) == ["validation", "test", "again"]
    assert metrics["sets"]["test"] == metrics["sets"]["again"]
    assert f"{metrics['sets']['test']['accuracy']:.4f}" in done.stdout
    assert "Model: out" in done.stdout
    recipe = json.loads((tmp_path / "out" / "steadytune.json").read_text())["recipe"]
    assert [method["name"] for method in recipe["methods"]] == ["dps_dense", "l2sp"]
    assert recipe["methods"][0]["options"]["keep"] == 0.6
    assert set(recipe["seeds"].values()) == {5}


def test_plan_goes_to_stderr_and_quiet_is_quiet(shell, bert):
    words = ["fit", "train.csv", "--model", bert, "--steps", "2", "--validation-share", "0"]
    spoken = shell(*words, "--output", "a")
    assert "30 training rows" in spoken.stderr
    assert "2 steps of 16 rows" in spoken.stderr
    assert "training: " not in spoken.stderr  # no terminal, no bar
    assert "training rows" not in spoken.stdout
    learns = ["--steps", "60", "--lr", "0.01"]  # there is nothing to warn of
    assert shell(*words, *learns, "--output", "b", "--quiet").stderr == ""


def test_texts_without_labels_come_from_files_and_from_rows_without_a_label(shell, tmp_path, bert):
    table = toy(30)
    table.loc[[2, 5], "label"] = None
    table.to_csv("gaps.csv", index=False)
    toy(4, start=300)[["text"]].to_csv("more.csv", index=False)
    words = ["fit", "gaps.csv", "--text", "text", "--label", "label", "--model", bert, *QUICK]
    assert "--unlabelled blank" in " ".join(shell(*words, "--output", "out").stderr.split())
    more = ["--unlabelled", "blank", "--unlabelled", "more.csv", "--pretrain", "simcse:steps=1"]
    done = shell(*words, "--output", "out", *more)
    assert done.exit_code == 0, done.output
    recipe = json.loads((tmp_path / "out" / "steadytune.json").read_text())["recipe"]
    assert recipe["unlabelled"]["rows"] == 6
    assert recipe["unlabelled"]["sources"] == ["gaps.csv, rows without a label", "more.csv"]


def test_pairs_regression_and_validation_file(shell, tmp_path, bert):
    toy(30, pair=True).to_parquet("pairs.parquet")
    toy(6, pair=True).to_parquet("v.parquet")
    done = shell(
        "fit", "pairs.parquet", "--text", "text", "--text", "other", "--label", "score", "--validation", "v.parquet",
        "--model", bert, "--output", "out", *QUICK,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["sets"]["validation"]["rows"] == 6
    assert metrics["metric"] == "pearson"


def test_real_task(root, shell, tmp_path, bert):
    done = shell(
        "fit", "--task", "mrpc", "--data-root", root, "--train-size", 40, "--model", bert, "--output", "out",
        "--max-length", 16, *QUICK,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["metric"] == "f1"
    assert metrics["sets"]["mrpc/validation"]["rows"] == 408
    predictions = pd.read_parquet(tmp_path / "out" / "predictions.parquet")
    assert set(predictions["label"]) == {"equivalent", "not_equivalent"}


def test_test_sets_of_the_hub_keep_their_options():
    """Naive: the part in front of ``split=test`` is the name, and ``test`` the file."""
    given = ["hub:owner/reviews.v2?split=test", "more=hub:owner/reviews.v2?split=dev", "hub:imdb", "in=a.csv", "b.csv"]
    assert {name: str(file) for name, file in named_files(given).items()} == {
        "reviews.v2": given[0], "more": given[1].partition("=")[2], "imdb": "hub:imdb", "in": "a.csv", "b": "b.csv",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([], ["give a training file", "--task"]),
        (["absent.csv"], ["absent.csv: no such file"]),
        (["train.csv", "--label", "lable"], ["no column 'lable'", "mean 'label'"]),
        (["train.csv", "--method", "dsp_dense"], ["unknown method 'dsp_dense'", "dps_dense"]),
        (["train.csv", "--lr", "-1"], ["lr must be above 0, got -1.0"]),
        (["train.csv", "--test", "test.csv", "--test", "test.csv"], ["two test sets are called 'test'"]),
        (["train.csv", "--out-of-domain"], ["--out-of-domain needs --task"]),
        (["train.csv", "--task", "sst2"], ["leave a training file out"]),
        (["--task", "sst2", "--test", "test.csv"], ["leave --test out"]),
        (["--task", "sst2", "--label", "stars"], ["leave --label out"]),
        (["--task", "sst2", "--kind", "regression"], ["leave --kind out"]),
        (["--task", "sst2"], ["--data-root"]),
        (["--task", "sst2", "--data-root", "."], ["no folder 'sst2'"]),
        (["--task", "sst", "--data-root", "."], ["unknown task 'sst'", "mean 'sst2'"]),
        (["train.csv", "--resume"], ["no run in out"]),
    ],
    ids=str,
)
def test_mistakes_are_one_line_and_exit_code_2(shell, bert, words, parts):
    done = shell("fit", *words, "--model", bert, "--output", "out")
    assert done.exit_code == 2
    said = [line for line in done.stderr.splitlines() if "text from" not in line]  # the columns found
    assert len(said) == 1
    assert said[0].startswith("error: ")
    for part in parts:
        assert part in done.stderr
    assert done.stdout == ""


def test_ctrl_c_says_how_to_go_on(shell, bert, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("steadytune.fitting.main._run", interrupted)
    done = shell("fit", "train.csv", "--model", bert, "--output", "out")
    assert done.exit_code == 130
    assert "--resume" in done.stderr


@pytest.mark.parametrize(
    "words",
    [["predict", "out", "test.csv"], ["merge", "a", "b", "--output", "c"], ["fit", "train.csv", "--dry-run"]],
    ids=lambda words: words[0],
)
def test_ctrl_c_promises_no_resume_where_there_is_none(shell, bert, monkeypatch, words):
    """Naive: predict has no --resume, and leaves nothing that it could go on from."""

    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    for place in ("fitted_model.FittedModel.load", "merge_folders.merge_folders", "dry_run"):
        monkeypatch.setattr(f"steadytune.fitting.{place}", interrupted)
    done = shell(*words, *(["--model", bert, "--output", "out"] if words[0] == "fit" else []))
    assert done.exit_code == 130
    assert "the same command starts anew" in done.stderr


def test_a_conflict_of_methods_under_dry_run_is_one_line(shell, bert):
    """Naive: a traceback of 40 lines."""
    words = ["--model", bert, "--output", "out", "--dry-run", "--method", "ema", "--method", "ema"]
    done = shell("fit", "train.csv", *words)
    assert done.exit_code == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == done.stderr.splitlines()[-1:]
    assert "average" in done.stderr


def test_methods_lists_the_registry(shell):
    done = shell("methods")
    assert done.exit_code == 0
    for name in (*METHODS, *PROCEDURES, *PRETRAININGS, *LEARNERS):
        assert f"  {name} " in done.stdout


def described(shell, flag, name, kind):
    done = shell("methods", name)
    assert done.exit_code == 0
    assert f"{flag} {name}:option=value" in done.stdout
    for field in dataclasses.fields(kind):
        assert field.name in done.stdout
        if field.default is not dataclasses.MISSING:
            assert repr(field.default) in done.stdout


@pytest.mark.parametrize("name", METHODS)
def test_methods_shows_every_option_and_default(shell, name):
    described(shell, "--method", name, METHODS[name])


@pytest.mark.parametrize(
    ("flag", "registry"), [("--procedure", PROCEDURES), ("--pretrain", PRETRAININGS), ("--meta", LEARNERS)]
)
def test_methods_shows_what_fit_takes_by_name_beside_methods(shell, flag, registry):
    for name, kind in registry.items():
        described(shell, flag, name, kind)


def test_unknown_method_suggests(shell):
    done = shell("methods", "mixuot")
    assert done.exit_code == 2
    assert "Did you mean 'mixout'?" in done.stderr


def test_tasks_lists_the_table(shell):
    done = shell("tasks")
    assert done.exit_code == 0
    for task in TASKS.values():
        assert task.name in done.stdout
        for file in task.tests + task.beyond:
            assert file in done.stdout


def test_version(shell):
    assert shell("--version").stdout.strip() == f"steadytune {__version__}"


def test_two_label_columns_are_not_silently_the_last(shell, bert):
    done = shell("fit", "train.csv", "--model", bert, "--output", "out", "--label", "score", "--label", "label")
    assert done.exit_code == 2
    assert "label column 'score' is neither 0 nor 1" in done.stderr


def test_a_ranking_never_replaces_a_file_that_it_is_made_from(shell, bert):
    """Naive: only the training file and models without a name are looked at."""
    before = Path("test.csv").read_text()
    for words in (["--model", bert, "--test", "test.csv", "--output", "test.csv"],
                  ["--model", f"own={bert}", "--output", f"{bert}/config.json"]):  # fmt: skip
        done = shell("probe", "train.csv", *words, "--overwrite")
        assert done.exit_code == 2
        assert "is also read" in done.stderr
    assert Path("test.csv").read_text() == before
