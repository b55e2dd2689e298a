"""steadytune doctor: without faults it reports none; otherwise it names each fault and its consequence."""

import inspect
import json
import logging
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
import transformers
from packaging.requirements import Requirement
from typer.testing import CliRunner

import steadytune
from steadytune import doctor
from steadytune import trainer as trainer_module
from steadytune.cli import app

ROOT = Path(__file__).parent.parent


@pytest.fixture
def unworried(monkeypatch):
    """The other parts, without their time."""
    for part in ("versions", "machine", "hooks", "training"):
        monkeypatch.setattr(doctor, part, lambda part=part: [doctor.Check(part, True)])


def test_it_works_here_in_less_than_a_screen(capfd):
    level = transformers.logging.get_verbosity()
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[-1] == "steadytune works here."
    assert len(lines) < 60
    assert "FAILED" not in done.stdout
    for name in (*doctor.CALLED, *doctor.READ, "register_step_pre_hook", "accumulation", "resume", "_init_weights"):
        assert f"ok      {name}" in done.stdout
    assert "2 steps, 50% of the linear weights moved in the second" in done.stdout
    assert capfd.readouterr().err == ""
    assert transformers.logging.get_verbosity() == level
    assert logging.getLogger("steadytune").level == logging.NOTSET


def test_every_override_of_the_stock_trainer_is_checked():
    ours = {name for name, value in vars(steadytune.Trainer).items() if inspect.isfunction(value)}
    stock = {name for name in ours if hasattr(transformers.Trainer, name)} - {"__init__", "train"}
    assert set(doctor.CALLED) == stock


def test_what_is_read_is_what_the_trainer_reads():
    source = inspect.getsource(trainer_module)
    for name in doctor.READ:
        assert f".{name}" in source, name


def test_a_method_that_is_no_longer_called_and_an_attribute_that_is_gone(monkeypatch):
    monkeypatch.setitem(doctor.CALLED, "predict", "the sky would fall")
    monkeypatch.setitem(doctor.READ, "accelerator.absent", "nobody would notice")
    failed = [str(check) for check in doctor.training() if not check.ok]
    assert failed == [
        "  FAILED  predict -> the sky would fall",
        "  FAILED  accelerator.absent: gone -> nobody would notice",
    ]


def test_a_renamed_flag_of_loaded_weights_is_found(monkeypatch, tmp_path):
    doctor._bert().save_pretrained(tmp_path)
    monkeypatch.setattr("steadytune.methods.re_init.LOADED", "_another_flag")
    check = doctor._drawn_anew(tmp_path)
    assert not check.ok
    assert "ReInit changed nothing" in str(check)


def test_wrong_accumulation_is_found(monkeypatch, tmp_path):
    def stock(self, *args, **kwargs):
        return transformers.Trainer.get_batch_samples(self, *args, **kwargs)

    assert doctor._accumulated(tmp_path / "right").ok
    monkeypatch.setattr(steadytune.Trainer, "get_batch_samples", stock)  # the stock Trainer counts rows twice
    check = doctor._accumulated(tmp_path / "wrong")
    assert not check.ok
    assert "scaled wrongly" in str(check)


def test_methods_that_do_not_act_are_found(monkeypatch):
    monkeypatch.setattr(steadytune.DPSDense, "pull_back", lambda *a: None)  # nothing is frozen
    failed = [check.name for check in doctor.training() if not check.ok]
    assert failed == ["DPSDense(keep=0.5)"]


def test_a_crash_is_a_finding(monkeypatch, unworried):
    def broken():
        raise TypeError("takes 3\npositional arguments")

    monkeypatch.setattr(doctor, "training", broken)
    done = CliRunner().invoke(app, ["doctor"])
    assert done.exit_code == 1
    assert "TypeError: takes 3 positional arguments -> none of these checks could run" in done.stdout
    assert done.stdout.splitlines()[-1].startswith("1 of 4 checks failed (transformers.Trainer")


def test_minimum_versions_are_those_of_pyproject():
    """Of the installed metadata, hence a reinstall where they differ."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    declared = {r.name: r.specifier for r in map(Requirement, [*extras, *project["dependencies"]])}
    for name in ("torch", "transformers", "accelerate", "peft"):
        assert doctor._needed(name) == declared[name]
        assert str(declared[name]).startswith(">=")


def test_old_and_absent_packages(monkeypatch):
    real = metadata.version

    def version(name):
        if name in ("peft", "accelerate"):
            raise metadata.PackageNotFoundError(name)
        return "2.5.1" if name == "torch" else real(name)

    monkeypatch.setattr(doctor.metadata, "version", version)
    found = {check.name: check for check in doctor.versions()}
    assert not found["torch"].ok
    assert str(found["torch"]) == "  FAILED  torch: 2.5.1 (needs >=2.6) -> pip install -U torch"
    assert found["peft"].ok
    assert "steadytune[peft]" in found["peft"].found
    assert not found["accelerate"].ok
    assert found["python"].ok


def test_a_source_tree_without_metadata(monkeypatch):
    def absent(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(doctor.metadata, "version", absent)
    assert not doctor._installed()
    assert doctor._python().ok
    assert str(doctor._needed("torch")) == ""


def test_json_says_the_same(unworried):
    done = CliRunner().invoke(app, ["doctor", "--json"])
    found = json.loads(done.stdout)
    assert (done.exit_code, found["ok"], found["verdict"]) == (0, True, "steadytune works here.")
    assert found["sections"]["Machine"] == [{"name": "machine", "ok": True, "found": "", "consequence": ""}]


def test_help_waits_for_nothing():
    code = (
        "import sys; from typer.testing import CliRunner; from steadytune.cli import app; import steadytune.doctor\n"
        "assert CliRunner().invoke(app, ['doctor', '--help']).exit_code == 0\n"
        "print([name for name in ('torch', 'transformers', 'pandas') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
