"""Checks of the documentation: Python blocks run, commands parse, YAML is a valid config, links have a target."""

import re
import shlex
import warnings
from pathlib import Path

import pytest
import typer
from accelerate.state import AcceleratorState, GradientState, PartialState

from fit_helpers import save_tiny_bert, toy
from steadytune import cli, config
from steadytune.bench.spec import Study
from steadytune.fitting import options
from steadytune.fitting.spelling import make_methods

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language):
    """Fenced blocks of a language, by page and line; those after `<!-- not run -->` are left out."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in re.finditer(rf"(<!-- not run -->\n+)?^```{language}\n(.*?)^```", text, re.S | re.M):
            line = text[: match.start(2)].count("\n")
            if not match[1]:
                found.append(pytest.param(match[2], id=f"{page.name}:{line}"))
    return found


def commands():
    """Every `steadytune ...` line of fenced and indented blocks."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        for number, line in enumerate(text.splitlines(), 1):
            if re.match(r"( {4})?steadytune \w", line):
                found.append(pytest.param(line.strip(), id=f"{page.name}:{number}"))
    return found


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("hub") / "bert-base-uncased")


@pytest.fixture
def desk(bert, tmp_path, monkeypatch):
    """A directory with the files that the documentation mentions; fits take 4 steps."""
    (tmp_path / "bert-base-uncased").symlink_to(bert)
    toy(30).to_csv(tmp_path / "train.csv", index=False)
    toy(9).to_csv(tmp_path / "test.csv", index=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(options, "MAX_STEPS", 4)
    yield tmp_path
    for state in (AcceleratorState, GradientState, PartialState):
        state._shared_state.clear()


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks_run(desk, code, request):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # stages of one step, no pinned memory: matters of the tiny size
        exec(compile(code, request.node.callspec.id, "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_blocks_are_studies_or_configs_of_fit(desk, text, request):
    Path("run.yaml").write_text(text)
    if "studies" in request.node.callspec.id:
        assert list(Study.read("run.yaml").draws())
        return
    found = config.defaults(Path("run.yaml"), cli.fit)
    assert make_methods(found["method"])
    assert Path(found["train"]).is_file()


@pytest.mark.parametrize("line", commands())
def test_commands_parse(desk, line):
    Path("run.yaml").write_text("train: train.csv\nmodel: bert-base-uncased\noutput: out\n")
    _, verb, *words = shlex.split(line, comments=True)
    command = typer.main.get_command(cli.app).commands[verb]
    given = command.make_context(verb, words).params
    assert make_methods(given.get("method") or []) is not None
    if verb == "methods" and given["name"]:
        assert make_methods(given["name"])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = page.read_text()
    headings = {
        re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.M)
    }
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif not target.startswith("http"):
            assert (page.parent / target.partition("#")[0]).exists(), target


def test_something_was_found():
    assert len(blocks("python")) >= 8
    assert len(commands()) >= 6
