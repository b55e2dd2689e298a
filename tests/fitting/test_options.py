"""Options of a fit under both of their names, and numbers that are not Python's."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from fit_helpers import save_tiny_bert, toy
from steadytune import DPSDense, SteadyClassifier, fit
from steadytune.config import ALIASES, defaults
from steadytune.errors import UsageError
from steadytune.fitting import make_plan
from steadytune.fitting.options import Options

VALUES = {
    "learning_rate": 1e-3,
    "num_train_epochs": 3,
    "max_steps": 7,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "warmup_ratio": 0.2,
    "label_smoothing_factor": 0.1,
}


@pytest.mark.parametrize("alias", ALIASES)
def test_an_option_is_taken_under_the_name_that_transformers_has_for_it(alias):
    assert getattr(Options.of({alias: VALUES[alias]}), ALIASES[alias]) == VALUES[alias]
    with pytest.raises(UsageError, match=f"{alias} and {ALIASES[alias]} are two names|{ALIASES[alias]} and {alias}"):
        Options.of({alias: VALUES[alias], ALIASES[alias]: VALUES[alias]})


def test_a_file_and_the_shell_take_both_names(tmp_path):
    from typer.testing import CliRunner

    from steadytune import cli

    (tmp_path / "run.yaml").write_text("learning_rate: 0.01\nmax_steps: 3\n")
    assert defaults(tmp_path / "run.yaml", cli.fit) == {"lr": 0.01, "steps": 3}
    (tmp_path / "run.yaml").write_text("lr: 0.01\nlearning_rate: 0.02\n")
    with pytest.raises(UsageError, match="line 2: learning_rate and lr are two names of one option"):
        defaults(tmp_path / "run.yaml", cli.fit)
    words = ["fit", "none.csv", "--model", "m", "--output", str(tmp_path / "o")]
    said = CliRunner().invoke(cli.app, [*words, "--lr", "0.1", "--learning-rate=0.2"])
    assert said.exit_code == 2
    assert "two names of one option" in " ".join(said.stderr.replace("│", " ").split())
    said = CliRunner().invoke(cli.app, [*words, "--learning-rate", "-1", "--max-steps", "2"])
    assert "none.csv: no such file" in said.stderr or "lr must be above 0" in said.stderr


@pytest.mark.parametrize(
    "given",
    [
        {"seed": np.int64(3), "steps": np.int32(7), "batch_size": np.array(8)},
        {"lr": np.float32(0.5), "bf16": np.bool_(True), "warmup": torch.tensor(0.25)},
        {"seed": 1.0, "steps": 4.0},
    ],
)
def test_numbers_of_other_libraries_become_pythons(given):
    options = Options.of(given)
    for name, value in given.items():
        assert getattr(options, name) == value
        assert type(getattr(options, name)) in (int, float, bool), name


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"steps": 1.5}, "steps must be a whole number, got 1.5"),
        ({"seed": None}, "seed must be a whole number, got None"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"lr": "fast"}, "lr must be a number, got 'fast'"),
        ({"bf16": 1}, "bf16 must be True or False, got 1"),
        ({"lr": np.array([1.0, 2.0])}, "lr must be a number"),
    ],
)
def test_what_is_no_such_number_is_refused(given, message):
    with pytest.raises(UsageError, match=message):
        Options.of(given)


def test_the_signature_of_fit_shows_the_arguments_of_its_plan():
    shown = inspect.signature(fit).parameters
    assert set(inspect.signature(make_plan).parameters) - {"options"} < set(shown)
    assert shown["model"].kind is inspect.Parameter.KEYWORD_ONLY
    assert shown["combine"].default == "soup"


@pytest.mark.parametrize("state", [None, np.random.RandomState(5), np.int64(4)], ids=["none", "generator", "numpy"])
def test_random_state_takes_the_forms_of_scikit_learn(tmp_path, state):
    table = toy(20)
    model = SteadyClassifier(
        save_tiny_bert(tmp_path), steps=2, random_state=state, options={"per_device_train_batch_size": 4}
    )
    model.fit(table["text"], table["label"])
    seed = model.result_.runs[0]["seeds"]["init"]
    assert seed == 4 if isinstance(state, np.int64) else 0 <= seed < 2**31


@pytest.mark.parametrize(
    ("given", "part"),
    [
        ({"lr": float("inf")}, "lr must be a finite number, got inf"),
        ({"methods": [DPSDense]}, "methods must hold names .*, got the class DPSDense"),
        ({"methods": {"dps_dense": {}}}, r"methods must hold names .*, got \{'dps_dense'"),
        ({"methods": ["ema", 3]}, "methods must hold names .*, got 3"),
        ({"model": torch.nn.Linear(1, 1)}, "model must be a directory .*, got a Linear: save it with save_pretrained"),
        ({"tests": toy(8)}, r"tests must be a dictionary .*, got DataFrame: as in tests=\{'test': table\}"),
        ({"tests": [toy(8)]}, "tests must be a dictionary .*, got list"),
        ({"tests": "test.csv"}, "tests must be a dictionary .*, got str"),
    ],
)
def test_what_is_no_method_model_or_dictionary_of_tests_is_one_error(given, part):
    """Naive: AttributeError, "File name too long", or a run that cannot write its record at the end."""
    with pytest.raises(UsageError, match=part):
        make_plan(toy(40), **{"model": "bert", "steps": 2, **given})


def test_no_methods_and_tests_called_by_numbers_are_taken():
    plan = make_plan(toy(40), model="bert", steps=2, methods=None, tests={1: toy(8, start=100)})
    assert plan.methods == []
    assert set(plan.data.tests) == {"1", "validation"}


def test_a_length_that_leaves_no_word_is_refused(tmp_path):
    """Naive: the model trains on the marks of beginning and end, with a warning that texts are cut."""
    bert = save_tiny_bert(tmp_path / "bert")
    with pytest.raises(UsageError, match=r"max_length must be above 2, .* got 2: no word would be read"):
        fit(toy(40), model=bert, output=tmp_path / "out", steps=1, max_length=2, progress=False)
    assert not (tmp_path / "out").exists()
