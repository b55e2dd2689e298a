"""Facts of the methods: printed as they are, and true of the methods themselves."""

import dataclasses
import inspect
import itertools
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification
from typer.testing import CliRunner

from steadytune import Method, Run
from steadytune.cli import app
from steadytune.core.facts import Cost, Paper
from steadytune.errors import UsageError
from steadytune.fitting.spelling import method_record
from steadytune.methods import METHODS, catalogue
from steadytune.methods.registry import GROUP, Registry
from steadytune.spelling import as_methods

ROOT = Path(__file__).parents[2]
STAGE = 3  # steps of a DPS stage below
BATCH = {"input_ids": torch.arange(24).view(4, 6), "labels": torch.tensor([0, 1, 2, 0])}


SETTINGS = {
    "easy_adapt": {"domains": 2, "domain": lambda inputs: inputs["input_ids"][:, 0] % 2},
    "group_weights": {"column": lambda inputs: inputs["labels"] % 2, "least": 1, "every": 2},
    "implicit_tune": {"outer": lambda: [BATCH]},
    "meta_weight_net": {"outer": lambda: [BATCH], "hidden": 4},
    "meta_semi": {"unlabelled": lambda: [BATCH]},
    "weight_mixup": {"outer": lambda: [BATCH], "rank": "tensor"},  # at this size shares by row and column are a tenth
    "dps_dense": {"update_ratio": STAGE / 12},
    "dps_mix": {"update_ratio": STAGE / 12},
    "recadam": {"gamma": 100.0},  # its default wants a smaller learning rate
    "swa": {"start": 0.0},
    "top_layers": {"blocks": 1},
}


def method(name):
    return METHODS[name](**SETTINGS.get(name, {}))


def trained(name):
    """Runs 12 steps of a small BERT; yields (Run, weights acted on, bytes during the step) after each step."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, num_labels=3
    )
    model = BertForSequenceClassification(config).train()
    run = Run(model, [method(name)], total_steps=12, data=lambda: [BATCH])
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    run.attach(optimizer)
    acts = getattr(run.methods[0], "scope", "all")
    size = sum(w.data.numel() for w in run.weights(run.methods[0], acts))
    for _ in range(12):
        before = run.nbytes()
        run.loss(BATCH).backward()
        during = run.nbytes() - before
        optimizer.step()
        optimizer.zero_grad()
        yield run, size, during


@pytest.mark.parametrize("name", METHODS)
def test_bytes_are_what_a_run_holds(name):
    held, during = [], []
    for run, size, more in trained(name):
        held.append(run.nbytes() / size)
        during.append(more / size)
    cost = METHODS[name].cost
    # after step t the state is that of the stage under way: 3 steps of stage I, whose last one selects
    stages = list(cost.held.values())
    expected = [stages[(t // STAGE) % len(stages)] for t in range(1, 12)]
    got = held[:11]
    if name.startswith("dps"):  # the first step of a stage has nothing of it yet
        keep = [t for t in range(1, 12) if t % STAGE]
        got, expected = [held[t - 1] for t in keep], [expected[t - 1] for t in keep]
    if name == "lawa":  # its window of checkpoints fills first
        got, expected = got[4:], expected[4:]
    assert got == pytest.approx(expected, abs=0.1)
    # in its first step a method may come into what it holds; DPSMix takes its anchors in the first step of stage II
    assert min(during[1:]) == pytest.approx(cost.during, abs=0.1)


@pytest.mark.parametrize("name", METHODS)
def test_passes_are_what_a_run_counts(name):
    """In its second step: before the first, some methods look at the data."""
    run, _, _ = list(itertools.islice(trained(name), 2))[-1]
    assert run.passes.plain == pytest.approx(METHODS[name].cost.passes)


@pytest.mark.parametrize("name", METHODS)
def test_every_option_has_a_meaning_and_its_range_is_true(name):
    defaults = catalogue.pages()[name].options
    assert defaults
    for option in defaults:
        assert option.meaning, option.name
        if option.type == "float":
            assert option.range, option.name
        if not option.range:
            continue
        low, high = (float(end) for end in option.range[1:-1].split(","))
        ends = {low: option.range[0] == "[", high: option.range[-1] == "]"}
        for value, inside in ends.items():
            if inside:
                METHODS[name](**{option.name: int(value) if "int" in option.type else value})
            else:
                with pytest.raises(ValueError, match=option.name):
                    METHODS[name](**{option.name: value})
        with pytest.raises(ValueError, match=option.name):
            METHODS[name](**{option.name: low - 0.5})
        if "int" in option.type:
            with pytest.raises(ValueError, match=f"{option.name} must be a whole number"):
                METHODS[name](**{option.name: low + 2.5})


@pytest.mark.parametrize("name", METHODS)
def test_args_sections_name_only_fields(name):
    cls = METHODS[name]
    _, sections = catalogue.parse(inspect.getdoc(cls))
    assert set(catalogue.arguments(sections["Args"])) <= {option.name for option in catalogue.pages()[name].options}


@pytest.mark.parametrize("name", METHODS)
def test_the_paper_is_written_once_and_read_in_the_docstring(name):
    """Naive: authors and arXiv number stand in the docstring too, and may say something else than `paper`."""
    cls = METHODS[name]
    shown = " ".join(inspect.getdoc(cls).split())
    assert shown.endswith(f"Source: {cls.paper}")
    assert inspect.getsource(inspect.getmodule(cls)).count(cls.paper.arxiv) == 1


def test_bibtex():
    paper = Paper(("Ada B. Lovelace", "Alan Turing"), "On a new X", "Proceedings of Y", "Y Notes", 1950, "5001.00001")
    assert paper.short == "Lovelace and Turing, Y Notes 1950"
    entry = paper.bibtex()
    assert entry.startswith("@inproceedings{lovelace1950ynotes,\n")  # no space, or BibTeX refuses it
    assert "author = {Ada B. Lovelace and Alan Turing}" in entry
    assert entry.count("{") == entry.count("}")
    two_words = Paper(("De Morgan, Augustus",), "Z", "Z", "Z", 1847, "4701.00001")
    assert (two_words.short, two_words.key) == ("De Morgan, Z 1847", "demorgan1847z")


def test_memory_in_words():
    assert Cost().memory == "0"
    assert Cost(held={"one": 1, "two": 2}, during=3).memory == "1 (one), 2 (two), +3 during a step"


def test_docstrings_are_parsed():
    prose, sections = catalogue.parse(
        "First\nline.\n\nSecond.\n\nArgs:\n    a: one\n        two: three.\n    b: four.\n\nThird."
    )
    assert prose == ("First line.", "Second.", "Third.")
    assert catalogue.arguments(sections["Args"]) == {"a": "one two: three.", "b": "four."}
    alone = catalogue.parse("First.\n\nArgs:\n    a: one\n        two.\n")[1]
    assert catalogue.arguments(alone["Args"]) == {"a": "one two."}


def test_moments_come_from_the_class_and_conflicts_from_exclusive():
    class Anchor(Method):
        """Holds."""

        exclusive = "anchor"
        conflicts = ("the moon",)

        def penalty(self, step): ...

    page = catalogue.pages({**METHODS, "mine": dataclasses.dataclass(Anchor)})["mine"]
    assert page.moments == ("penalty",)
    assert page.conflicts == ("another anchor (`l2sp`, `recadam`, `implicit_tune`)", "the moon")
    assert (page.paper, page.source, page.options) == (None, "", ())
    assert "## mine" in catalogue.markdown({"mine": dataclasses.dataclass(Anchor)})


@pytest.mark.parametrize("name", catalogue.GENERATED)
def test_what_is_generated_from_the_methods_is_current(name):
    """Regenerate with: python -m steadytune.methods.catalogue."""
    assert (ROOT / name).read_text() == catalogue.generated(ROOT)[ROOT / name]


def test_the_command_writes_the_page():
    assert CliRunner().invoke(app, ["methods", "--markdown"]).stdout == catalogue.markdown()


@pytest.mark.parametrize("name", METHODS)
def test_the_command_says_it_all(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    page = catalogue.pages()[name]
    listed, shown = (CliRunner().invoke(app, ["methods", *word]).stdout for word in ([], [name]))
    (line,) = (line for line in listed.splitlines() if line.split()[:1] == [name])
    assert line.split(maxsplit=1)[1].strip() == page.summary.replace("``", "")
    for text in (page.source, page.cost.memory, *page.moments, *page.conflicts):
        assert text in shown
    assert page.departures in " ".join(shown.split())
    assert page.paper.bibtex() in shown
    for option in page.options:
        assert option.range in shown
        assert option.type in shown


# ---------------------------------------------------------------- methods of other packages


def install(folder, package, **points):
    """A package as an installer leaves it: code, and what it offers."""
    info = folder / f"{package}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {place}" for name, place in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *lines]) + "\n")
    (folder / f"{package}.py").write_text(
        "from dataclasses import dataclass\n"
        "from typing import Annotated\n"
        "from steadytune.core import Method, Within\n\n\n"
        "@dataclass\n"
        "class Halve(Method):\n"
        '    """Halve the gradient.\n\n    Args:\n        by: Factor on the gradient.\n    """\n\n'
        '    by: Annotated[float, Within("(0, 1]")] = 0.5\n\n'
        "    def before_step(self, run, weights):\n"
        "        for w in weights:\n"
        "            w.grad.mul_(self.by)\n"
    )


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Installs packages for one test, in which METHODS finds them."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = METHODS.__dict__.pop("installed", None)

    def add(package, **points):
        install(tmp_path, package, **points)
        METHODS.__dict__.pop("installed", None)

    yield add
    METHODS.__dict__.pop("installed", None)
    if before is not None:
        METHODS.__dict__["installed"] = before


def test_another_package_adds_a_method_by_name(packages):
    packages("halving", halve="halving:Halve")
    assert list(METHODS)[-1] == "halve"
    (made,) = as_methods("halve:by=0.25", METHODS)
    assert (type(made).__name__, made.by) == ("Halve", 0.25)
    assert method_record(made) == {"name": "halve", "options": {"by": 0.25}}
    with pytest.raises(UsageError, match=r"method 'halve': by must be a number in \(0, 1\], got 2.0"):
        as_methods("halve:by=2", METHODS)
    shown = CliRunner().invoke(app, ["methods"]).stdout
    assert "Halve the gradient." in shown
    assert "(0, 1]" in CliRunner().invoke(app, ["methods", "halve"]).stdout
    assert "halve" not in catalogue.markdown(catalogue.own())  # the committed page is of this package


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("broken:Missing", "cannot be loaded: AttributeError"),
        ("nowhere:Halve", "cannot be loaded: ModuleNotFoundError"),
        ("broken:dataclass", "must be a dataclass that extends steadytune.Method"),
    ],
)
def test_a_broken_method_of_another_package_is_named_and_left_out(packages, place, why):
    packages("broken", halve=place)
    with pytest.warns(UserWarning, match=f"the method 'halve' of the package 'broken' .*{why}"):
        assert "halve" not in list(METHODS)
    with pytest.raises(UsageError, match=f"the method 'halve' of the package 'broken' .*{why}"):
        as_methods("halve", METHODS)


def test_clashing_names_are_told_with_their_packages(packages):
    packages("first", dps_dense="first:Halve", twice="first:Halve")
    packages("second", twice="second:Halve")
    with pytest.warns(UserWarning, match="the package 'first' offers a method 'dps_dense', which steadytune has"):
        assert "twice" in METHODS
    assert METHODS["dps_dense"].__module__ == "steadytune.methods.dps"
    with pytest.raises(UsageError, match="the method 'twice' is offered by the packages first, second: keep only one"):
        as_methods("twice", METHODS)


def test_names_are_known_before_any_class_is_loaded():
    registry = Registry({"mine": "no_such_file:Mine"})
    assert registry.classes == {"Mine": "mine"}
    assert "mine" in registry
    assert "yours" not in registry


@pytest.mark.parametrize("kind", ["l2sp", "recadam"])
def test_an_optimizer_without_weight_decay_decays_nothing(kind):
    """Naive: a KeyError in attach. Rprop's groups have no such key."""
    model = BertForSequenceClassification(
        BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    optimizer = torch.optim.Rprop(model.parameters(), 1e-3)
    run = Run(model, [method(kind)], total_steps=2).attach(optimizer)
    run.loss({**BATCH, "labels": torch.tensor([0, 1, 1, 0])}).backward()
    optimizer.step()
    assert run.index == 1
    assert set(run.methods[0].decay.values()) <= {0.0}
