"""The wheel as a user gets it: built, installed into an environment of its own, and tried outside the checkout."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from fit_helpers import save_tiny_bert, toy

ROOT = Path(__file__).parent.parent


def run(*command: str | Path, cwd: Path, **more: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "MYPYPATH")}
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env={**kept, **quiet, **more}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    run(sys.executable, "-m", "twine", "check", "--strict", *folder.iterdir(), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def desk(wheel, tmp_path_factory):
    """A desk with tables and a model, and the binaries of an environment that holds the wheel.

    The environment sees the packages of the running one through a path file. Path files there are not read in turn, so
    that the checkout, which is installed by one, is not seen.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "env", with_pip=False)
    (site,) = (folder / "env" / "lib").glob("python*/site-packages")
    (site / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    run(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--target",
        site,
        wheel,
        cwd=folder,
    )
    save_tiny_bert(folder / "bert-base-uncased")
    toy(40).to_csv(folder / "reviews.csv", index=False)
    return folder, folder / "env" / "bin" / "python"


def test_the_wheel_holds_what_is_read_at_run_time(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for part in ("steadytune/py.typed", "steadytune/bench/presets/stick.yaml", ".html.j2", ".md.j2"):
        assert any(name.endswith(part) for name in names), part
    assert not [name for name in names if name.startswith("tests")]


def test_the_wheel_works_outside_the_checkout(desk):
    folder, python = desk
    home = run(python, "-c", "import steadytune; print(steadytune.__file__)", cwd=folder).strip()
    assert Path(home).is_relative_to(folder)
    command = [python, "-m", "steadytune.cli"]
    assert "steadytune" in run(*command, "--version", cwd=folder)
    fit = [
        "fit",
        "reviews.csv",
        "--model",
        "./bert-base-uncased",
        "--label",
        "label",
        "--text",
        "text",
        "--output",
        "out",
    ]
    assert "minutes" in run(*command, *fit, "--steps", "2", "--dry-run", cwd=folder)
    assert not (folder / "out").exists()


def test_the_block_of_the_readme_runs_as_it_stands(desk):
    folder, python = desk
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = next(b for b in re.findall(r"^```python\n(.*?)^```", text, re.S | re.M) if "steadytune.fit(" in b)
    (folder / "block.py").write_text(block.replace('output="out-python"', 'output="out-python", steps=2'))
    assert "accuracy" in run(python, "block.py", cwd=folder)
