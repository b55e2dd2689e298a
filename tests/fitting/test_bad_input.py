"""Mistakes of users: each gives one clear error and exit code 2, without a traceback or half-written files."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import pandas as pd
import pytest
import transformers
from filelock import FileLock
from typer.testing import CliRunner

from fit_helpers import save_tiny_bert, toy
from steadytune.cli import app
from steadytune.fitting import training

QUICK = ["--steps", "6", "--batch-size", "4", "--save-steps", "2", "--quiet"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def here(monkeypatch, tmp_path, bert):
    """A scratch directory with a good table and a good model."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.delenv("STEADYTUNE_DATA", raising=False)
    toy(40).to_csv("good.csv", index=False)
    shutil.copytree(bert, "bert")
    return tmp_path


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def tree(folder: Path) -> dict[str, bytes]:
    """Every file and its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(here: Path, words: list, *parts: str, untouched: bool = True) -> str:
    before = tree(here)
    done = run(*words)
    assert done.exit_code == 2, (done.exit_code, done.output, done.exception)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "Traceback" not in done.output
    assert done.stdout == ""
    for part in parts:
        assert part in errors[0]
    if untouched:
        assert tree(here) == before
    return errors[0]


def write(name: str, content: str | bytes) -> str:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return name


def table(name: str, **columns) -> str:
    """A good table with some columns replaced."""
    toy(40).assign(**columns).to_json(name, orient="records", lines=True)
    return name


def labels(*head, rest="up") -> list:
    return [*head, *[rest] * (40 - len(head))]


class Bomb:
    """Side effect that a hostile pickle has when it is loaded."""

    def __reduce__(self):
        return (os.mkdir, ("exploded",))


BOTH = ["--text", "text", "--label", "food", "--label", "price"]

# name: (makes the train file, further words, what the error says)
FILES = {
    "missing": (lambda: "absent.csv", [], ["absent.csv: no such file"]),
    "nearly right": (lambda: "god.csv", [], ["no such file", "mean 'good.csv'"]),
    "a directory": (lambda: os.mkdir("d.csv") or "d.csv", [], ["d.csv"]),
    "no ending": (lambda: write("rows", "text,label\na,b\n"), [], ["rows: files end in", "no ending"]),
    "unknown ending": (lambda: write("rows.xlsx", "x"), [], ["files end in", "'.xlsx'"]),
    "pickle": (lambda: write("rows.pkl", pickle.dumps(Bomb())), [], ["files end in"]),
    "empty": (lambda: write("rows.csv", ""), [], ["no rows"]),
    "header only": (lambda: write("rows.csv", "text,label\n"), [], ["no rows"]),
    "latin-1": (lambda: write("rows.csv", "text,label\nf\xe4n,b\n".encode("latin-1")), [], ["UTF-8"]),
    "semicolons": (lambda: write("rows.csv", "text;label\na b;x\nc d;y\n"), [], ["rows.csv", ";"]),
    "ragged": (lambda: write("rows.csv", "text,label\na,b\nc,d,e,f\n"), [], ["rows.csv"]),
    "broken JSON": (lambda: write("rows.jsonl", '{"text": "a"}\n{"text": \n'), [], ["line 2", "not JSON"]),
    "JSON without names": (lambda: write("rows.json", "[1, 2]"), [], ["named fields"]),
    "broken Parquet": (lambda: write("rows.parquet", b"PAR1 nonsense PAR1"), [], ["not a readable .parquet"]),
    "hub unreachable": (lambda: "hub:no/such", [], ["hub:no/such"]),
    "text column": (lambda: "good.csv", ["--text", "txt"], ["no column 'txt'", "mean 'text'"]),
    "two texts in one": (lambda: "good.csv", ["--text", "text,label"], ["no column", "--text NAME, once for each"]),
    "label column": (lambda: "good.csv", ["--label", "lable"], ["no column 'lable'", "mean 'label'"]),
    "label of no name": (lambda: "good.csv", ["--label", ""], ["no column ''"]),
    "one column twice": (lambda: "good.csv", ["--text", "label", "--label", "label"], ["different columns"]),
    "one text twice": (lambda: "good.csv", ["--text", "text"] * 2, ["different columns, got text, text"]),
    "three texts": (lambda: "good.csv", ["--text", "text"] * 3, ["one or two text columns", "3"]),
    "text is a number": (lambda: table("r.jsonl", text=range(40)), ["--text", "text"], ["must hold strings"]),
    "empty texts": (lambda: table("r.jsonl", text=["", None, " "] + ["a"] * 37), [], ["empty in 3 of 40", "0, 1, 2"]),
    "empty labels": (lambda: table("r.jsonl", label=labels(None, "", rest="x")), [], ["empty in 2 of 40 rows"]),
    "one class": (lambda: table("r.jsonl", label="up"), [], ["one class only ('up')"]),
    "ids as labels": (lambda: table("r.jsonl", label=range(40)), [], ["40 different values"]),
    "NaN targets": (
        lambda: write("r.csv", "text,label\n" + "".join(f"w{i},{v}\n" for i, v in enumerate(["0.5", "nan", "0.7"]))),
        ["--kind", "regression"], ["not a finite number ('nan') in 1 of 3"],
    ),
    "constant target": (lambda: table("r.jsonl", label=0.5), ["--kind", "regression"], ["one value only"]),
    "class too small": (lambda: table("r.jsonl", label=labels("odd", *["down"] * 19)), [], ["odd"]),
    "unknown kind": (lambda: "good.csv", ["--kind", "ranking"], ["kind must be", "ranking"]),
    "unknown test label": (
        lambda: toy(9, start=100).assign(label="sideways").to_csv("t.csv", index=False) or "good.csv",
        ["--test", "t.csv"], ["'sideways'", "9 of 9 rows", "training data"],
    ),
    "test rows in train": (lambda: "good.csv", ["--test", "t=good.csv"], ["36 of 40", "also"]),
    "two tests of one name": (lambda: "good.csv", ["--test", "good.csv", "--test", "good.csv"], ["two test sets"]),
    "reserved test name": (lambda: "good.csv", ["--test", "train=good.csv"], ["cannot be called"]),
    "the name of the folds": (lambda: "good.csv", ["--test", "cross-validation=good.csv"], ["cannot be called"]),
    "share too large": (lambda: "good.csv", ["--validation-share", "0.999"], ["validation share"]),
    "split column": (lambda: "good.csv", ["--validation-column", "label"], ["label"]),
    "group column": (lambda: "good.csv", ["--group", "author"], ["author"]),
    "label columns of other values": (
        lambda: table("r.jsonl", food=labels(2, rest=1), price=0), BOTH, ["'food' is neither 0 nor 1 ('2') in 1 of 40"],
    ),
    "label columns with a gap": (
        lambda: table("r.jsonl", food=labels(None, rest=1), price=0), BOTH, ["'food' is empty in 1 of 40", "Write 0"],
    ),
    "a label column of no row": (
        lambda: table("r.jsonl", food=labels(0, rest=1), price=0), BOTH, ["'price' is 0 in all 40 training rows"],
    ),
    "label columns that are all 1": (lambda: table("r.jsonl", food=1, price=1), BOTH, ["same classes in every row"]),
    "label columns as numbers": (
        lambda: table("r.jsonl", food=labels(0, rest=1), price=1), [*BOTH, "--kind", "regression"],
        ["kind regression takes one label column"],
    ),
    "a label column twice": (
        lambda: table("r.jsonl", food=labels(0, rest=1)), ["--label", "food"] * 2, ["'food' is given twice"],
    ),
    "a separator and two label columns": (
        lambda: table("r.jsonl", food=labels(0, rest=1), price=1), [*BOTH, "--label-separator", "|"],
        ["label separator ('|') is for one label column, got 2"],
    ),
    "a separator that is nowhere": (
        lambda: table("r.jsonl", label=labels("a|b", rest="a")), ["--label-separator", ";"],
        ["separator ';' is in none of 40 rows (such as 'a|b')"],
    ),
    "an empty separator": (lambda: "good.csv", ["--label-separator", ""], ["separator must not be empty"]),
    "a separator for lists": (
        lambda: table("r.jsonl", label=labels(["a", "b"], rest=["a"])), ["--label-separator", "|"],
        ["a list already (['a', 'b'])", "Leave the label separator out"],
    ),
    "lists within lists": (
        lambda: table("r.jsonl", label=labels([["a"], "b"], rest=["a"])), [], ["a list that holds lists", "1 of 40"],
    ),
    "train size": (lambda: "good.csv", ["--train-size", "400"], ["train size must lie between", "400"]),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_tables(here, name):
    make, words, parts = FILES[name]
    source = make()
    refused(here, ["fit", source, "--model", "bert", "--output", "out", *QUICK, *words], *parts)
    assert not Path("out").exists()
    assert not Path("exploded").exists()


OPTIONS = {
    "learning rate": (["--lr", "-1"], ["lr must be above 0", "-1.0"]),
    "warm-up": (["--warmup", "1.5"], ["warmup must be at least 0 and below 1", "1.5"]),
    "batch": (["--batch-size", "0"], ["batch_size must be above 0"]),
    "steps and epochs": (["--epochs", "3"], ["steps (6) or epochs (3.0)"]),
    "length": (["--max-length", "65"], ["at most 64", "65"]),
    "dropout": (["--dropout", "1"], ["dropout must be"]),
    "unknown method": (["--method", "dps"], ["unknown method 'dps'", "dps_dense"]),
    "unknown method option": (["--method", "dps_dense:kep=1"], ["unknown option 'kep'", "mean 'keep'"]),
    "method value": (["--method", "dps_dense:keep=many"], ["keep must be a number", "'many'"]),
    "method range": (["--method", "dps_dense:keep=2"], ["keep", "2"]),
    "two averages": (["--method", "ema", "--method", "ema"], ["average"]),
    "R-Drop without dropout": (["--method", "rdrop", "--dropout", "0"], ["dropout"]),
    "metric": (["--metric", "bleu"], ["unknown metric 'bleu'", "accuracy"]),
    "combine": (["--combine", "stew", "--num-seeds", "2"], ["unknown combine 'stew'"]),
    "no seeds": (["--num-seeds", "0"], ["num_seeds must be 1 or more"]),
    "patience alone": (["--patience", "2"], ["patience (2)", "evaluations"]),
    "selection without rows": (["--evaluations", "2", "--validation-share", "0"], ["needs validation rows"]),
    "best without rows": (
        ["--num-seeds", "2", "--combine", "best", "--validation-share", "0"],
        ["needs validation rows"],
    ),
    "refit and calibrate": (["--refit", "--calibrate"], ["refit", "calibrate"]),
    "class weights": (["--class-weights", "some"], ["class_weights must be one of none, balanced", "some"]),
    "negative checkpoint steps": (["--save-steps", "-1"], ["save_steps must be 0"]),
    "seed": (["--seed", "-1"], ["seed must be between 0"]),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(here, name):
    words, parts = OPTIONS[name]
    refused(here, ["fit", "good.csv", "--model", "bert", "--output", "out", *QUICK, *words], *parts)
    assert not Path("out").exists()


def no_weights():
    Path("bert/model.safetensors").unlink()


def torn_weights():
    whole = Path("bert/model.safetensors").read_bytes()
    Path("bert/model.safetensors").write_bytes(whole[: len(whole) // 2])


def torn_config():
    Path("bert/config.json").write_text('{"model_type": "be')


def no_config():
    Path("bert/config.json").unlink()


def no_tokenizer():
    for file in Path("bert").glob("token*"):
        file.unlink()


def unknown_architecture():
    Path("bert/config.json").write_text('{"model_type": "abacus"}')


def pickled_weights():
    Path("bert/model.safetensors").unlink()
    Path("bert/pytorch_model.bin").write_bytes(pickle.dumps({"bert.pooler.dense.weight": Bomb()}))


DAMAGE = [no_weights, torn_weights, torn_config, no_config, no_tokenizer, unknown_architecture, pickled_weights]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_directories_that_are_no_model(here, damage):
    damage()
    refused(here, ["fit", "good.csv", "--model", "bert", "--output", "out", *QUICK], "bert")
    assert not Path("out").exists()
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", ["./bret", "no-such-org/no-such-model"])
def test_models_that_are_nowhere(here, name):
    refused(here, ["fit", "good.csv", "--model", name, "--output", "out", *QUICK], name)


# ---- folders ----------------------------------------------------------------------------------------------------


FIT = ["fit", "good.csv", "--model", "bert", "--output", "out", "--method", "dps_dense:update_ratio=0.4", *QUICK]


class Stop(transformers.TrainerCallback):
    """Ctrl-C in the middle of step 5."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


@pytest.fixture
def interrupted(here, monkeypatch):
    """A folder with a checkpoint of step 4."""
    with monkeypatch.context() as patch:
        patch.setattr(training, "Interrupt", type("Both", (training.Interrupt, Stop), {}))
        done = run(*FIT)
    assert done.exit_code == 130
    assert "--resume" in done.stderr
    return here / "out" / "checkpoints" / "training" / "checkpoint-4"


def test_an_output_that_is_a_file_or_holds_other_things(here):
    write("out", "thesis")
    refused(here, FIT, "must be a directory")
    Path("out").unlink()
    Path("out").mkdir()
    write("out/thesis.tex", "x")
    refused(here, FIT, "not empty and holds no run")
    refused(here, [*FIT, "--overwrite"], "not empty and holds no run")
    refused(here, [*FIT, "--resume"], "no run in out")


def test_an_output_in_use(here, interrupted):
    with FileLock(here / "out" / "checkpoints" / ".lock"):
        refused(here, [*FIT, "--resume"], "in use by another run")
        refused(here, [*FIT, "--overwrite"], "in use by another run")


def test_another_recipe_another_table_another_model(here, interrupted):
    for words, part in (
        (["--lr", "0.5"], "lr was 2e-05, is 0.5"),
        (["--method", "ema"], "methods was"),
        (["--train-size", "30"], "training data.rows was 36, is 27"),
    ):
        refused(here, [*FIT, "--resume", *words], "started otherwise", part)


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_hostile_pickle_in_a_checkpoint_is_not_loaded(here, interrupted, name):
    (interrupted / name).write_bytes(pickle.dumps(Bomb(), 2))
    refused(here, [*FIT, "--resume"], "checkpoint")
    assert not Path("exploded").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "steadytune.safetensors", "optimizer.pt"])
def test_a_damaged_checkpoint_is_named(here, interrupted, name):
    whole = (interrupted / name).read_bytes()
    (interrupted / name).write_bytes(whole[: len(whole) // 2])
    refused(here, [*FIT, "--resume"], "checkpoint-4", "--overwrite")


def test_a_state_of_another_recipe_is_named(here, interrupted):
    (interrupted / "steadytune.safetensors").unlink()
    refused(here, [*FIT, "--resume"], "holds no steadytune.safetensors")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS], ids=os.strerror)
@pytest.mark.parametrize("when", ["checkpoint", "model", "records"])
def test_a_full_disk_or_a_missing_permission(here, monkeypatch, code, when):
    """Files that were saved before are complete, and --resume continues when there is room."""

    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code), "out")

    target = {
        "checkpoint": (training.FitTrainer, "_save_rng_state"),
        "model": (transformers.PreTrainedModel, "save_pretrained"),
        "records": (pd.DataFrame, "to_parquet"),
    }[when]
    save = transformers.PreTrainedModel.save_pretrained

    def at_the_end(model, folder, **options):
        return fail() if str(folder).endswith(".part") else save(model, folder, **options)

    with monkeypatch.context() as patch:
        patch.setattr(*target, fail if when != "model" else at_the_end)
        refused(here, FIT, "out", os.strerror(code), "--resume", untouched=False)
    assert json.loads(Path("out/steadytune.json").read_text())["status"] == "training"
    assert not Path("out/config.json").exists() or when == "records"
    done = run(*FIT, "--resume")
    assert done.exit_code == 0, done.output
    straight = run(*[*FIT[:5], "straight", *FIT[6:]])
    assert straight.exit_code == 0, straight.output
    assert Path("out/model.safetensors").read_bytes() == Path("straight/model.safetensors").read_bytes()


# ---- predict ----------------------------------------------------------------------------------------------------


@pytest.fixture
def model(here):
    done = run("fit", "good.csv", "--model", "bert", "--output", "m", *QUICK)
    assert done.exit_code == 0, done.output
    return here / "m"


def test_predict(here, model):
    write("new.csv", "text\ngood film\nbad play\n")
    words = ["predict", "m", "new.csv", "--output", "p.csv"]
    refused(here, ["predict", "bert", "new.csv"], "no model that steadytune fit has written")
    refused(here, ["predict", "nowhere", "new.csv"], "nowhere")
    refused(here, ["predict", "m", "absent.csv"], "absent.csv: no such file")
    refused(here, ["predict", "m", "new.csv", "--output", "p.xlsx"], "files end in", ".csv")
    refused(here, ["predict", "m", "new.csv", "--output", "no/p.csv"], "no such directory")
    refused(here, [*words, "--text", "txt"], "'txt'")
    refused(here, ["predict", "m", write("e.jsonl", '{"text": " "}\n')], "empty")
    assert run(*words).exit_code == 0
    found = pd.read_csv("p.csv")
    assert list(found.columns) == ["text", "prediction", "probability_down", "probability_up"]
    refused(here, [*words, "--overwrite", "--keep", "txt"], "no column 'txt' to keep", "text")
    refused(here, [*words, "--overwrite", "--on-empty", "drop"], "on_empty", "skip, error", "'drop'")
    refused(here, ["predict", "m", "new.csv", "--output", "./new.csv", "--overwrite"], "is also read")
    refused(here, ["predict", "m", "new.csv", "--output", "m/config.json", "--overwrite"], "files end in")
    half, own = write("half.csv", "text,n\ngood,1\n ,2\n"), write("own.csv", "text,prediction\ngood,1\n")
    refused(here, ["predict", "m", half, "--output", "q.csv", "--on-empty", "error"], "1 of 2")
    refused(here, ["predict", "m", own, "--output", "q.csv"], "'prediction' of its own")
    assert len(found) == 2
    refused(here, words, "exists", "--overwrite")
    assert run(*words, "--overwrite").exit_code == 0
    record = json.loads((model / "steadytune.json").read_text())
    (model / "steadytune.json").write_text(json.dumps({**record, "status": "training"}))
    refused(here, [*words, "--overwrite"], "not finished")
