"""--config: a YAML file gives defaults to a command, flags win, mistakes are one line."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

from fit_helpers import save_tiny_bert, toy
from steadytune import cli
from steadytune.config import defaults, options
from steadytune.errors import UsageError


@pytest.fixture
def folder(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("STEADYTUNE_DATA", raising=False)
    return tmp_path


def given(text, command=cli.fit):
    Path("run.yaml").write_text(text)
    return defaults(Path("run.yaml"), command)


def test_options_are_the_parameters_of_the_command():
    found = options(cli.fit)
    assert set(found) == set(inspect.signature(cli.fit).parameters) - {"config"}
    assert (found["epochs"], found["test"], found["output"], found["bf16"]) == (float, list[str], Path, bool)


def test_values_of_every_type(folder):
    text = """
        model: bert
        train: rows.csv
        batch_size: 8
        lr: 2e-5      # text to YAML 1.1
        dropout: 0
        bf16: true
        steps: null
        text: [premise, hypothesis]
        label: "01"
    """
    assert given(text) == {
        "model": "bert",
        "train": "rows.csv",
        "batch_size": 8,
        "lr": 2e-5,
        "dropout": 0.0,
        "bf16": True,
        "text": ["premise", "hypothesis"],
        "label": ["01"],
    }
    assert given("text: review") == {"text": ["review"]}


@pytest.mark.parametrize(("text", "value"), [("0.3", "0.3"), ("tune", "tune"), ("3e-1", "0.3"), ("'0.3'", "0.3")])
def test_a_threshold_is_a_number_as_in_python_or_a_word(folder, text, value):
    assert given(f"threshold: {text}") == {"threshold": value}


def test_methods_and_tests_as_text_or_mapping(folder):
    text = """
        method: [dps_dense, "mixout:keep=0.8", {name: rdrop, alpha: 0.5}, {name: l2sp, decoupled: false}, {name: ema}]
        test: {dev: a.csv, far: b.csv}
    """
    found = given(text)
    assert found["test"] == ["dev=a.csv", "far=b.csv"]
    from steadytune.fitting.spelling import make_methods

    names = [(type(m).__name__, m) for m in make_methods(found["method"])]
    assert [name for name, _ in names] == ["DPSDense", "Mixout", "RDrop", "L2SP", "EMA"]
    assert (names[1][1].keep, names[2][1].alpha, names[3][1].decoupled) == (0.8, 0.5, False)
    assert given("method: {name: rdrop, alpha: 1}")["method"] == ["rdrop:alpha=1"]
    assert given("test: [a.csv, {far: b.csv}]")["test"] == ["a.csv", "far=b.csv"]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("a: 1\nbacth_size: 8", ["line 1: unknown option 'a'"]),
        ("model: m\nbacth_size: 8", ["run.yaml, line 2: unknown option 'bacth_size'", "mean 'batch_size'"]),
        ("batch-size: 8", ["unknown option 'batch-size'", "mean 'batch_size'"]),
        ("yes: 1", ["unknown option 'yes'"]),
        ("config: other.yaml", ["unknown option 'config'"]),
        ("seed: 1\nlr: 1\nseed: 2", ["line 3: 'seed' is also given in line 1"]),
        ("batch_size: 8.5", ["line 1: batch_size must be a whole number, got 8.5"]),
        ("batch_size: '8'", ["whole number, got '8'"]),
        ("batch_size: true", ["whole number, got True"]),
        ("\nlr: fast", ["line 2: lr must be a number, got 'fast'"]),
        ("lr: [1]", ["lr must be a number, got [1]"]),
        ("lr: no", ["lr must be a number, got False"]),
        ("bf16: 1", ["bf16 must be true or false, got 1"]),
        ("label: 01", ["label must be text, got 1", "quotes"]),
        ("model: no", ["model must be text, got False"]),
        ("text: [a, 1]", ["text must be text, got 1"]),
        ("text: {a: b}", ["got a mapping"]),
        ("test: {1: b}", ["test must be text, got 1"]),
        ("method: [{alpha: 1}]", ["got no name"]),
        ("- a", ["must hold a mapping", "got a list"]),
        ("", ["must hold a mapping", "got nothing"]),
        ("fit", ["got a str"]),
        ("a: [1\nb: 2", ["run.yaml, line 2: not valid YAML"]),
        ("model: !!python/object:os.system x", ["line 1: not valid YAML", "could not determine a constructor"]),
        ("? [a]\n: 1", ["line 1: not valid YAML"]),
        ("a: \x00", ["not valid YAML"]),
        ("text: &a [*a]", ["run.yaml: a value must not contain itself"]),
        ("model: &a {b: *a}", ["run.yaml: a value must not contain itself"]),
        ("lr: '2e-5'", ["lr must be a number, got '2e-5'"]),
        ("kind: 3", ["line 1: kind must be text, got 3: put it in quotes."]),
        ("batch_size: 2026-01-01", ["batch_size must be a whole number, got '2026-01-01'"]),
        ("output: [a]", ["output must be text, got ['a']."]),
        ("model: {a: 1, a: 2}", ["line 1: 'a' is also given in line 1"]),
    ],
    ids=repr,
)
def test_mistakes_name_the_line_the_rule_and_the_value(folder, text, parts):
    with pytest.raises(UsageError) as error:
        given(text)
    for part in parts:
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_cannot_be_read(folder):
    with pytest.raises(UsageError, match=r"absent\.yaml: no such file"):
        defaults(Path("absent.yaml"), cli.fit)
    Path("run.yaml").write_bytes(b"model: \xff")
    with pytest.raises(UsageError, match=r"run\.yaml: not valid YAML"):
        defaults(Path("run.yaml"), cli.fit)


def test_any_command_can_take_it(folder):
    app = typer.Typer()

    @app.command()
    def work(file: Path, size: Annotated[int, typer.Option()], deep: bool = False, config: cli.Config = None) -> None:
        typer.echo(f"{file} {size + 1} {deep}")

    Path("w.yaml").write_text("file: rows.csv\nsize: 3\ndeep: true")
    run = CliRunner().invoke
    assert run(app, ["--config", "w.yaml"]).stdout == "rows.csv 4 True\n"
    assert run(app, ["--size", "8", "--config", "w.yaml", "--no-deep"]).stdout == "rows.csv 9 False\n"
    assert run(app, ["other.csv", "--config", "w.yaml"]).stdout == "other.csv 4 True\n"
    assert "'--size'" in run(app, ["other.csv"]).stderr


def test_fit_takes_required_options_from_the_file_and_flags_win(folder):
    bert = save_tiny_bert(folder / "bert")
    toy(30).to_csv("train.csv", index=False)
    toy(9).to_csv("far.csv", index=False)
    Path("run.yaml").write_text(
        f"train: train.csv\nmodel: {bert}\noutput: out\nsteps: 50\nbatch_size: 4\nquiet: true\nseed: 7\n"
        "method: [l2sp, {name: rdrop, alpha: 0.5}]\ntest: {far: far.csv}\n"
    )
    done = CliRunner().invoke(cli.app, ["fit", "--config", "run.yaml", "--steps", "2", "--output", "here"])
    assert done.exit_code == 0, done.output
    assert not Path("out").exists()
    recipe = json.loads(Path("here/steadytune.json").read_text())["recipe"]
    assert (recipe["steps"], recipe["batch_size"], recipe["seeds"]["init"]) == (2, 4, 7)
    assert [m["name"] for m in recipe["methods"]] == ["l2sp", "rdrop"]
    assert recipe["methods"][1]["options"]["alpha"] == 0.5
    assert "far" in json.loads(Path("here/metrics.json").read_text())["sets"]
    Path("predict.yaml").write_text("model: here\ntable: far.csv\noutput: labelled.jsonl\nquiet: true\n")
    done = CliRunner().invoke(cli.app, ["predict", "--config", "predict.yaml"])
    assert (done.exit_code, done.stdout) == (0, "9 predictions: labelled.jsonl\n"), done.output
    assert len(Path("labelled.jsonl").read_text().splitlines()) == 9


@pytest.mark.parametrize(("flags", "given"), [(["--epochs", "1"], (None, 1.0)), (["--max-steps=3"], (3, None))])
def test_a_flag_replaces_what_the_file_gives_instead_of_it(folder, monkeypatch, flags, given):
    """Naive: the flag and the file's other option meet, and the call is refused for giving both."""
    seen = {}
    monkeypatch.setattr("steadytune.fitting.fit", lambda *args, **options: seen.update(options) or sys.exit(7))
    other = "steps: 9" if "--epochs" in flags else "num_train_epochs: 9"
    Path("run.yaml").write_text(f"train: a.csv\nmodel: m\noutput: out\n{other}\n")
    assert CliRunner().invoke(cli.app, ["fit", *flags, "--config", "run.yaml"]).exit_code == 7
    assert (seen["steps"], seen["epochs"]) == given


def test_a_mistake_in_the_file_is_one_line_and_exit_code_2(folder):
    Path("run.yaml").write_text("bacth_size: 8")
    done = CliRunner().invoke(cli.app, ["fit", "--config", "run.yaml"])
    assert done.exit_code == 2
    assert done.stderr.startswith("error: run.yaml, line 1: unknown option 'bacth_size'")
    assert len(done.stderr.strip().splitlines()) == 1


def test_reading_a_file_loads_no_torch(folder):
    Path("run.yaml").write_text("batch_size: 8")
    code = (
        "import sys; from pathlib import Path; from steadytune import cli, config\n"
        "config.defaults(Path('run.yaml'), cli.fit)\n"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
