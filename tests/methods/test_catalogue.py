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
from steadytune.methods import METHODS, catalogue

ROOT = Path(__file__).parents[2]
STAGE = 3  # steps of a DPS stage below
BATCH = {"input_ids": torch.arange(24).view(4, 6), "labels": torch.tensor([0, 1, 2, 0])}


SETTINGS = {
    "easy_adapt": {"domain": lambda inputs: inputs["input_ids"][:, 0] % 2},
    "implicit_tune": {"outer": lambda: [BATCH]},
    "meta_weight_net": {"outer": lambda: [BATCH], "hidden": 4},
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
            if value == float("inf") and not inside:
                continue  # an open end at infinity is no check, only a notation
            if inside:
                METHODS[name](**{option.name: int(value) if option.type == "int" else value})
            else:
                with pytest.raises(ValueError, match=option.name):
                    METHODS[name](**{option.name: value})
        with pytest.raises(ValueError, match=option.name):
            METHODS[name](**{option.name: low - 0.5})
        if option.type == "int":
            with pytest.raises(ValueError, match=f"{option.name} must be a whole number"):
                METHODS[name](**{option.name: low + 2.5})


@pytest.mark.parametrize("name", METHODS)
def test_args_sections_name_only_fields(name):
    cls = METHODS[name]
    _, sections = catalogue.parse(inspect.getdoc(cls))
    assert set(catalogue.arguments(sections["Args"])) <= {option.name for option in catalogue.pages()[name].options}


@pytest.mark.parametrize("name", METHODS)
def test_paper_agrees_with_the_module(name):
    """The equations' docstring names the same arXiv paper and its authors."""
    paper = METHODS[name].paper
    doc = inspect.getmodule(METHODS[name]).__doc__
    assert paper.arxiv in doc
    assert str(paper.year) in doc
    found = [doc.find(family) for family in paper.families]
    assert min(found) >= 0


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
        "First\nline.\n\nSecond.\n\nArgs:\n    a in [0, 1): one\n        two.\n    b: three.\n\nThird."
    )
    assert prose == ("First line.", "Second.", "Third.")
    assert catalogue.arguments(sections["Args"]) == {"a": ("[0, 1)", "one two."), "b": ("", "three.")}
    alone = catalogue.parse("First.\n\nArgs:\n    a in [0, 1): one\n        two.\n")[1]
    assert catalogue.arguments(alone["Args"]) == {"a": ("[0, 1)", "one two.")}


def test_moments_come_from_the_class_and_conflicts_from_exclusive():
    class Anchor(Method):
        """Holds."""

        exclusive = "anchor"
        conflicts = ("the moon",)

        def penalty(self, step): ...

    page = catalogue.pages({**METHODS, "mine": dataclasses.dataclass(Anchor)})["mine"]
    assert page.moments == ("penalty",)
    assert page.conflicts == ("a second anchor of the same weight (`l2sp`, `recadam`, `implicit_tune`)", "the moon")
    assert (page.paper, page.source, page.options) == (None, "", ())
    assert "## mine" in catalogue.markdown({"mine": dataclasses.dataclass(Anchor)})


def test_the_committed_page_is_what_is_generated():
    """Regenerate with: steadytune methods --markdown > docs/methods.md."""
    assert (ROOT / "docs" / "methods.md").read_text() == catalogue.markdown()


def test_the_command_writes_the_page():
    assert CliRunner().invoke(app, ["methods", "--markdown"]).stdout == catalogue.markdown()


@pytest.mark.parametrize("name", METHODS)
def test_the_command_says_it_all(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    page = catalogue.pages()[name]
    listed, shown = (CliRunner().invoke(app, ["methods", *word]).stdout for word in ([], [name]))
    for text in (page.source, page.cost.memory, *page.moments, *page.conflicts):
        assert text in listed
        assert text in shown
    assert page.departures in " ".join(shown.split())
    assert page.paper.bibtex() in shown
    for option in page.options:
        assert option.range in shown
        assert option.type in shown
