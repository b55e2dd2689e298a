"""The trial of kernels: what is tried, what is chosen, and that nothing changes unless it is asked for."""

from __future__ import annotations

import json

import pytest
from transformers import TrainerCallback

from fit_helpers import same, save_tiny_bert, toy, weights
from steadytune import FittedModel, fit
from steadytune.bench.spec import option
from steadytune.errors import UsageError
from steadytune.fitting import kernels, training

QUICK = {"steps": 6, "batch_size": 4, "lr": 1e-2, "save_steps": 2, "progress": False, "text": "text", "label": "label"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture
def clocked(monkeypatch):
    """Let each kernel take the seconds that a table says."""

    def say(table):
        monkeypatch.setattr(kernels, "multiplies_bf16", lambda: True)
        monkeypatch.setattr(kernels, "timed", lambda tried, run: {kernel: table[kernel] for kernel in tried})

    return say


def record(result):
    return json.loads((result.output / "steadytune.json").read_text())


SLOW = {("sdpa", False): 2.0, ("eager", False): 1.5, ("sdpa", True): 1.4, ("eager", True): 1.0}


def test_the_fastest_kernels_train_and_are_recorded(tmp_path, bert, clocked):
    clocked(SLOW)
    seen = []

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            seen.append((model.config._attn_implementation, args.bf16))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "Progress", lambda name: Look())
        tuned = fit(toy(), model=bert, output=tmp_path / "o", tune_kernels=True, **{**QUICK, "progress": True})
    assert set(seen) == {("eager", True)}
    about = record(tuned)
    assert about["kernels"] == {
        "attention": "eager", "bf16": True,
        "seconds": {"sdpa": 2.0, "sdpa, bf16": 1.4, "eager": 1.5, "eager, bf16": 1.0},
    }  # fmt: skip
    assert about["recipe"]["bf16"] is True
    assert FittedModel.load(tuned.output).bf16
    plain = fit(toy(), model=bert, output=tmp_path / "p", **QUICK)
    assert "kernels" not in record(plain)
    assert record(plain)["recipe"]["bf16"] is False
    assert "tune_kernels" not in record(plain)["recipe"]


def test_a_trial_that_keeps_the_stock_kernels_changes_no_bit(tmp_path, bert):
    """Real passes, with dropout and adapters. Naive: they draw numbers that dropout or the head would have drawn."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(kernels, "GAIN", 1.0)  # nothing saves all of the time
        tuned = fit(toy(), model=bert, output=tmp_path / "o", tune_kernels=True, **QUICK)
    plain = fit(toy(), model=bert, output=tmp_path / "p", **QUICK)
    assert same(weights(tuned.output), weights(plain.output))
    assert set(record(tuned)["kernels"]["seconds"]) >= {"sdpa", "eager"}


def test_a_resumed_run_goes_on_with_its_kernels(tmp_path, bert, clocked, monkeypatch):
    """Naive: measured anew, and on another machine the run goes on with others."""

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    own = {**QUICK, "progress": True, "tune_kernels": True}
    clocked(SLOW)
    monkeypatch.setattr(training, "Progress", lambda name: TrainerCallback())
    straight = fit(toy(), model=bert, output=tmp_path / "straight", **own)
    monkeypatch.setattr(training, "Progress", lambda name: Stop())
    with pytest.raises(KeyboardInterrupt):
        fit(toy(), model=bert, output=tmp_path / "cut", **own)
    clocked({kernel: -seconds for kernel, seconds in SLOW.items()})
    monkeypatch.setattr(training, "Progress", lambda name: TrainerCallback())
    resumed = fit(toy(), model=bert, output=tmp_path / "cut", resume=True, **own)
    assert same(weights(straight.output), weights(resumed.output))
    with pytest.raises(UsageError, match="finished"):
        fit(toy(), model=bert, output=tmp_path / "cut", resume=True, **QUICK)


@pytest.mark.parametrize(
    ("seconds", "stock", "best"),
    [
        ({("sdpa", False): 1.0, ("eager", False): 0.98}, ("sdpa", False), ("sdpa", False)),  # within the noise
        ({("sdpa", False): 1.0, ("eager", False): 0.96}, ("sdpa", False), ("eager", False)),
        ({("eager", True): 1.0}, ("flash", True), ("eager", True)),
    ],
)
def test_the_choice_by_hand(seconds, stock, best):
    assert kernels.choose(seconds, stock) == best


def test_bfloat16_is_tried_where_the_processor_multiplies_in_it_and_nothing_needs_full_precision(
    tmp_path, bert, monkeypatch
):
    tried = []

    def spy(given, run):
        tried.append({bf16 for _, bf16 in given})
        return dict.fromkeys(given, 1.0)

    monkeypatch.setattr(kernels, "timed", spy)
    for able, methods in ((True, []), (False, []), (True, ["rose_first"])):
        monkeypatch.setattr(kernels, "multiplies_bf16", lambda able=able: able)
        fit(toy(), model=bert, output=tmp_path / str(len(tried)), tune_kernels=True, methods=methods, **QUICK)
    assert tried == [{False, True}, {False}, {False, True}]
    with pytest.raises(UsageError, match="unknown option 'tune_kernels'"):
        option("study", "tune_kernels", True)


def test_the_flags_of_a_processor(tmp_path):
    file = tmp_path / "cpuinfo"
    for flags, able in (("fpu avx512_bf16 sse", True), ("fpu amx_bf16", True), ("avx512f avx512bw", False)):
        file.write_text(f"processor\t: 0\nflags\t\t: {flags}\n\nprocessor\t: 1\nflags\t\t: {flags}\n")
        assert kernels.multiplies_bf16(file) == able
    assert not kernels.multiplies_bf16(tmp_path / "none")


def test_the_clock_takes_the_fastest_run_after_the_first(monkeypatch):
    ticks = iter([0, 0, 0, 2, 0, 5, 0, 4, 0, 1])  # of the first round, only the start is asked for
    monkeypatch.setattr(kernels.time, "perf_counter", lambda: next(ticks))
    found = kernels.timed([("a", False), ("b", False)], lambda kernel: None)
    assert found == {("a", False): 2, ("b", False): 1}
