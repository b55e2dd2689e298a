"""Several runs in one model, moments chosen on validation rows, restarts, calibration, and the estimators."""

from __future__ import annotations

import itertools
import json
import math
import signal

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.special import log_softmax
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV, cross_val_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
)

from architectures import CONFIGS, tiny
from fit_helpers import same, save_tiny_bert, save_tiny_gpt2, toy, weights, word_tokenizer
from steadytune import FittedModel, SteadyClassifier, SteadyRegressor, dry_run, fit
from steadytune.data.problem import Classification, MultiLabel
from steadytune.errors import UsageError
from steadytune.fitting import callbacks, training
from steadytune.fitting import fitted_model as fitted
from steadytune.fitting.estimate import per_step
from steadytune.fitting.folder import last_checkpoint
from steadytune.fitting.loss import chance, loss_of
from steadytune.fitting.options import Options
from steadytune.fitting.peft_models import adapted
from steadytune.fitting.scale import check_scale, rescale, temperature
from steadytune.merge import souped, uniform

QUICK = {"steps": 40, "batch_size": 8, "lr": 5e-3, "save_steps": 0, "progress": False, "text": "text", "label": "label"}
TESTS = {"test": toy(30, start=200)}


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


# ---- several runs -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone(tmp_path_factory, bert):
    """The three runs that num_seeds=3 makes, each on its own."""
    folder = tmp_path_factory.mktemp("alone")
    return [
        fit(toy(60), model=bert, output=folder / str(i), tests=TESTS, **QUICK, data_seed=0, dropout_seed=i,
            method_seed=i)
        for i in range(3)
    ]  # fmt: skip


@pytest.fixture(scope="module")
def together(tmp_path_factory, bert):
    folder = tmp_path_factory.mktemp("together")
    return {
        how: fit(toy(60), model=bert, output=folder / how, tests=TESTS, num_seeds=3, combine=how, **QUICK)
        for how in ("best", "soup", "ensemble")
    }


def test_runs_share_head_and_rows_and_differ_in_everything_else(together):
    seeds = [run["seeds"] for run in together["soup"].runs]
    assert [s["init"] for s in seeds] == [0, 0, 0]
    assert [tuple(s.values()) for s in seeds] == [
        (0, 0, i, i, i) for i in range(3)
    ]  # init, subset, data, dropout, method
    members = [weights(p) for p in sorted((together["ensemble"].output / "members").iterdir())]
    assert len(members) == 3
    assert not any(same(a, b) for a, b in itertools.combinations(members, 2))


def test_the_first_of_several_runs_is_the_single_run(together, alone):
    members = together["ensemble"].output / "members"
    assert same(weights(members / "0"), weights(alone[0].output))


def test_soup_is_the_mean_of_the_weights(together):
    members = [weights(p) for p in sorted((together["ensemble"].output / "members").iterdir())]
    soup = weights(together["soup"].output)
    for name, values in soup.items():
        assert torch.equal(values, torch.stack([m[name].double() for m in members]).mean(0).float()), name


def test_ensemble_is_the_mean_of_the_probabilities_and_loads_again(together):
    result = together["ensemble"]
    texts = TESTS["test"]["text"].tolist()
    each = []
    for folder in sorted((result.output / "members").iterdir()):
        model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            each.append(model(**word_tokenizer()(texts, padding=True, return_tensors="pt")).logits.softmax(-1).numpy())
    rows = result.predictions.query("set == 'test'")
    np.testing.assert_allclose(rows[["probability_down", "probability_up"]], np.mean(each, axis=0), atol=1e-6)
    again = FittedModel.load(result.output)
    assert len(again.models) == 3
    np.testing.assert_allclose(again.predict_proba(texts), np.mean(each, axis=0), atol=1e-6)


def test_the_folder_of_an_ensemble_does_not_load_as_one_model(together):
    """Naive: it loads as the first member, silently, with other scores than those in the card."""
    result = together["ensemble"]
    with pytest.raises((OSError, ValueError), match=r"config\.json|model type"):
        AutoModelForSequenceClassification.from_pretrained(result.output)
    assert not (result.output / "model.safetensors").exists()
    with pytest.raises(UsageError, match="an ensemble of 3 models is no single model"):
        result.save_pretrained(result.output.parent / "copy")
    card = (result.output / "README.md").read_text()
    assert "library_name: steadytune\n" in card
    assert "the models are in `members`" in card
    member = result.output / "members" / "1"
    assert FittedModel.load(result.output).models[1].num_labels == 2
    assert AutoTokenizer.from_pretrained(member)("good film")["input_ids"] == word_tokenizer()("good film")["input_ids"]


@pytest.mark.parametrize("threshold", [None, "tune"])
def test_no_run_is_scored_twice(tmp_path, bert, monkeypatch, threshold):
    """Naive: two runs and the chosen one again, or each member again; the validation rows again for a threshold."""
    passes = []
    logits = fitted.logits
    monkeypatch.setattr(fitted, "logits", lambda *args, **more: passes.append(1) or logits(*args, **more))
    monkeypatch.setattr("steadytune.fitting.rehearsal.rehearse", lambda *args: {})
    for how, count in (("best", 4), ("ensemble", 4), ("soup", 6)):  # two runs, two sets; a soup is another model
        passes.clear()
        own = {**QUICK, "steps": 4, "threshold": threshold}
        fit(toy(40), model=bert, output=tmp_path / how, tests=TESTS, num_seeds=2, combine=how, **own)
        assert len(passes) == count, how


def multilabel(*where):
    return toy(*where).assign(label=lambda t: [["up"] * (y == "up") + ["film"] * ("film" in x) for x, y in
                                               zip(t["text"], t["label"], strict=True)])  # fmt: skip


@pytest.mark.parametrize("kind", ["classification", "regression", "multilabel"])
def test_a_distilled_ensemble_is_one_model_scored_as_itself(tmp_path, bert, kind):
    make = {"classification": toy, "multilabel": multilabel, "regression": toy}[kind]
    label = "score" if kind == "regression" else "label"
    own = {**QUICK, "label": label, "num_seeds": 2, "combine": "ensemble", "validation_share": 0.0, "lr": 1e-2,
           "steps": 150}  # fmt: skip
    both = fit(make(48), model=bert, output=tmp_path / "e", **own)
    result = fit(
        make(48), model=bert, output=tmp_path / "d", distil=True, probe=False, tests={"t": make(20, False, 300)}, **own
    )
    assert len(result.model.models) == 1
    model = AutoModelForSequenceClassification.from_pretrained(result.output)
    assert model.config.num_labels == (1 if kind == "regression" else 2)
    again = FittedModel.load(result.output)
    frame = make(20, False, 300)
    np.testing.assert_allclose(again.scores(frame), result.model.scores(frame), atol=1e-6)
    assert again.evaluate(frame) == result.metrics["t"]
    texts = make(48)
    taught = np.abs(result.model.scores(texts) - both.model.scores(texts)).mean()
    assert taught < 0.5 * np.abs(both.model.scores(texts) - both.model.scores(texts).mean(0)).mean()
    assert {"run-0", "run-1", "distilled"} == set(result.history["run"])
    assert "trained on the answers of that ensemble" in (result.output / "README.md").read_text()
    with pytest.raises(UsageError, match="distil makes one model of an ensemble"):
        fit(make(48), model=bert, output=tmp_path / "x", distil=True, **{**own, "combine": "soup"})


def test_a_method_that_needs_one_class_a_row_is_refused_before_an_ensemble_is_distilled(tmp_path, bert):
    own = {**QUICK, "methods": ["supcon"], "num_seeds": 2, "combine": "ensemble", "distil": True}
    with pytest.raises(UsageError, match="SupCon needs one class a row, and distil trains on the probabilities"):
        fit(toy(40), model=bert, output=tmp_path / "o", **own)
    assert not (tmp_path / "o").exists()
    plain = {**own, "methods": ["supcon:weight=0"], "steps": 2}
    assert len(fit(toy(40), model=bert, output=tmp_path / "p", **plain).runs) == 1


def test_soft_labels_are_learned_as_probabilities():
    rows = pd.DataFrame({"label": ["a", "b"], "soft": [[0.7, 0.3], [0.2, 0.8]]})
    loss = loss_of(Options(), rows, Classification(("a", "b")))
    logits = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    expected = -(0.7 * log_softmax([1, 0])[0] + 0.3 * log_softmax([1, 0])[1] + np.log(0.5)) / 2
    output = type("Output", (), {"logits": logits})
    assert float(loss(output, torch.tensor(rows["soft"].tolist()))) == pytest.approx(expected)
    assert float(loss(output, torch.tensor([0, 1]))) == pytest.approx(-(log_softmax([1, 0])[0] + np.log(0.5)) / 2)


def test_best_is_the_run_with_the_best_validation_score_not_test_score(together):
    result = together["best"]
    record = json.loads((result.output / "steadytune.json").read_text())
    scores = [run["scores"]["validation"]["accuracy"] for run in result.runs]
    assert record["chosen"] == int(np.argmax(scores))
    members = together["ensemble"].output / "members"
    assert same(weights(result.output), weights(members / str(record["chosen"])))


def test_mean_and_spread_over_runs(together):
    for result in together.values():
        each = [run["scores"]["test"]["accuracy"] for run in result.runs]
        found = result.metrics["test"]["runs"]["accuracy"]
        assert found == {"mean": pytest.approx(np.mean(each)), "sd": pytest.approx(np.std(each, ddof=1)), "n": 3}
        assert f"{np.mean(each):.4f} ±" in (result.output / "README.md").read_text()


class StopAt(TrainerCallback):
    """Ctrl-C in the middle of the n-th step that begins."""

    left = 0

    def __init__(self, name):
        pass

    def on_step_begin(self, args, state, control, **kwargs):
        StopAt.left -= 1
        if StopAt.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    "options", [{"num_seeds": 2, "combine": "soup"}, {"refit": True, "folds": 2, "evaluations": 4}]
)
def test_interrupted_between_and_in_runs_resumes_bitwise(tmp_path, bert, monkeypatch, options):
    monkeypatch.setattr(training, "Progress", StopAt)
    own = {**QUICK, "steps": 12, "save_steps": 5, "progress": True, **options}
    StopAt.left = 0
    straight = fit(toy(40), model=bert, output=tmp_path / "straight", **own)
    StopAt.left, resume = 8, False
    for _ in range(9):
        try:
            cut = fit(toy(40), model=bert, output=tmp_path / "cut", resume=resume, **own)
            break
        except KeyboardInterrupt:
            StopAt.left, resume = 8, True
    assert resume
    assert same(weights(straight.output), weights(cut.output))
    assert [run["curve"] for run in straight.runs] == [run["curve"] for run in cut.runs]
    pd.testing.assert_frame_equal(straight.history, cut.history)
    pd.testing.assert_frame_equal(straight.predictions, cut.predictions)


def test_uniform_refuses_other_architectures_and_other_buffers():
    with pytest.raises(ValueError, match="one architecture"):
        uniform([{"a": torch.ones(2)}, {"a": torch.ones(3)}])
    with pytest.raises(ValueError, match="one architecture"):
        uniform([{"a": torch.ones(2)}, {"b": torch.ones(2)}])
    with pytest.raises(ValueError, match="different values in 'n'"):
        uniform([{"n": torch.tensor(1)}, {"n": torch.tensor(2)}])
    found = uniform(
        [{"a": torch.tensor([1.0, 2.0]), "n": torch.tensor(1)}, {"a": torch.tensor([3.0, 2.0]), "n": torch.tensor(1)}]
    )
    assert found["a"].tolist() == [2.0, 2.0]


# ---- moments ----------------------------------------------------------------------------------------------------


def test_the_best_moment_is_kept_and_no_test_row_chose_it(tmp_path, bert):
    own = {**QUICK, "evaluations": 8, "validation_share": 0.3}
    result = fit(toy(60), model=bert, output=tmp_path / "o", tests=TESTS, **own)
    curve = dict(result.runs[0]["curve"])
    assert list(curve) == [5, 10, 15, 20, 25, 30, 35, 40]
    losses = result.history.query("name == 'eval_loss'").set_index("step")["value"]
    assert result.steps == max(curve, key=lambda step: (curve[step], -losses[step], step))
    assert result.metrics["validation"]["accuracy"] == max(curve.values())
    other = fit(toy(60), model=bert, output=tmp_path / "p", tests={"test": toy(30, start=400)}, **own)
    assert same(weights(result.output), weights(other.output))
    assert "(selected on)" in (result.output / "README.md").read_text()


def test_without_checkpoints_the_best_moment_is_kept_in_memory(tmp_path, bert, monkeypatch):
    own = {"tests": TESTS, "methods": "ema:decay=0.8", **QUICK, "evaluations": 8, "validation_share": 0.3}
    disk = fit(toy(60), model=bert, output=tmp_path / "d", **{**own, "save_steps": 5})
    monkeypatch.setattr(training.FitTrainer, "_save_checkpoint", None)
    memory = fit(toy(60), model=bert, output=tmp_path / "m", **own)
    assert (memory.steps, memory.runs[0]["curve"]) == (disk.steps, disk.runs[0]["curve"])
    assert memory.steps < 40, "the last moment is not the best: the naive version keeps it"
    assert same(weights(memory.output), weights(disk.output))


@pytest.fixture
def scored(monkeypatch):
    """Let evaluations score what a list says, one after the other."""

    def say(scores):
        values = iter(scores)
        monkeypatch.setattr(training.Setup, "measure", lambda self, rows, predicted: {self.metric: next(values)})

    return say


@pytest.mark.parametrize("save_steps", [0, 1])
@pytest.mark.parametrize(
    ("scores", "seen", "best"),
    [
        ([0.5, 0.9, 0.7, 0.7, 0.7], 5, 10),
        ([0.9, 0.5, 0.5, 0.5], 4, 5),  # the first moment is the end of the warm-up: step 5 of 40
        ([0.9, 0.5, 0.95, 0.5, 0.5, 0.5], 6, 15),
    ],
)
def test_patience_counts_evaluations_without_a_new_best(tmp_path, bert, scored, scores, seen, best, save_steps):
    scored(scores)
    own = {**QUICK, "evaluations": 8, "patience": 3, "save_steps": save_steps}
    result = fit(toy(60), model=bert, output=tmp_path / "o", **own)
    assert [step for step, _ in result.runs[0]["curve"]] == list(range(5, 5 * seen + 1, 5))
    assert result.steps == best


def test_moments_in_the_warm_up_cost_no_patience(tmp_path, bert, scored):
    """Naive: three evaluations without a new best, two of them before the rate has risen, end the training."""
    scored([0.6, 0.5, 0.5, 0.5, 0.5, 0.7, 0.5, 0.5])
    own = {**QUICK, "evaluations": 8, "patience": 2, "warmup": 0.5}
    result = fit(toy(60), model=bert, output=tmp_path / "o", **own)
    assert [step for step, _ in result.runs[0]["curve"]][-1] == 40
    assert result.steps == 30


@pytest.mark.parametrize("save_steps", [0, 1])
def test_of_equal_scores_the_lower_loss_wins(tmp_path, bert, scored, save_steps):
    """Naive: the first of equals, the end of the warm-up, is kept; three more without a change end the training."""
    scored([0.0] * 8)
    own = {**QUICK, "evaluations": 8, "patience": 3, "save_steps": save_steps, "metric": "matthews"}
    result = fit(toy(60), model=bert, output=tmp_path / "o", **own)
    losses = result.history.query("name == 'eval_loss'").set_index("step")["value"]
    assert result.steps == losses.idxmin() > 5


@pytest.mark.parametrize(
    ("log", "best"),
    [
        ([(1, 0.0, 0.7), (2, 0.0, 0.6), (3, 0.0, 0.65)], 2),
        ([(1, 0.0, 0.7), (2, 0.0, 0.6), (3, 0.0, 0.6)], 3),
        ([(1, 0.5, 0.9), (2, 0.4, 0.1)], 1),
        ([(1, 0.5, 0.9), (2, 0.5, float("nan"))], 1),
    ],
)
def test_the_best_moment_by_hand(log, best):
    entries = [{"step": step, "eval_accuracy": score, "eval_loss": loss} for step, score, loss in log]
    assert callbacks.best_moment([{"loss": 1.0, "step": 9}, *entries], "accuracy") == best


def test_a_smaller_error_is_better(tmp_path, bert):
    own = {**QUICK, "label": "score", "evaluations": 8, "metric": "rmse", "validation_share": 0.3}
    result = fit(toy(60), model=bert, output=tmp_path / "o", **own)
    curve = dict(result.runs[0]["curve"])
    assert result.steps == min(curve, key=lambda step: (curve[step], step))
    assert curve[result.steps] < curve[5]


def test_refit_trains_on_all_rows_to_the_best_mean_step(tmp_path, bert, monkeypatch):
    stopped = []
    init = training.StopAt.__init__
    monkeypatch.setattr(training.StopAt, "__init__", lambda self, step: stopped.append(step) or init(self, step))
    seen = []
    train = training.Setup.train
    monkeypatch.setattr(training.Setup, "train", lambda s, job, *a: seen.append(train(s, job, *a)) or seen[-1])
    result = fit(toy(60), model=bert, output=tmp_path / "o", tests=TESTS, refit=True, folds=3, evaluations=4, **QUICK)
    folds, final = seen[:3], seen[3]
    steps = (10, 20, 30, 40)
    means = {step: np.mean([dict(f.curve)[step] for f in folds]) for step in steps}
    assert len(stopped) == 1
    assert means[stopped[0]] == max(means.values())
    losses = result.history.query("name == 'eval_loss'").groupby("step")["value"].mean()
    assert stopped[0] == max(steps, key=lambda step: (means[step], -losses[step], step))
    assert final.steps == result.steps == stopped[0]
    assert result.seconds == pytest.approx(sum(t.seconds for t in seen))  # naive: the folds cost nothing
    record = json.loads((result.output / "steadytune.json").read_text())
    assert record["data"]["train"]["rows"] == 60
    assert list(result.metrics) == ["cross-validation", "test"]


@pytest.mark.parametrize("label", ["label", "score"])
def test_the_score_of_refit_is_that_of_the_rows_that_each_fold_left_out(tmp_path, bert, label):
    """Naive: it is thrown away, and the folder has no result at all; with a cut text it was an IndexError."""
    table = toy(60)
    table.loc[50, "text"] += " plot" * 80
    own = {**QUICK, "label": label, "steps": 20}
    result = fit(table, model=bert, output=tmp_path / "o", refit=True, folds=3, evaluations=2, **own)
    rows = result.predictions.query("set == 'cross-validation'")
    assert rows["row"].tolist() == list(range(60))
    assert rows["label"].tolist() == table[label].tolist()
    scores = result.metrics["cross-validation"]
    assert scores["rows"] == 60
    curves = result.history[result.history["run"].str.startswith("fold")]
    at = curves[(curves["step"] == result.steps) & (curves["name"] == f"eval_{result.metric}")]["value"]
    assert len(at) == 3
    if label == "label":
        assert scores["accuracy"] == (rows["label"] == rows["prediction"]).mean() == pytest.approx(at.mean())
    else:
        assert rows["prediction"].between(table["score"].min() - 2, table["score"].max() + 2).all()
        assert scores["rmse"] == pytest.approx(np.sqrt(np.mean((rows["prediction"] - rows["label"]) ** 2)))
    assert "cross-validation (selected on)" in (result.output / "README.md").read_text()


def test_refit_without_steps_is_refused_for_what_was_asked(tmp_path, bert):
    """It was refused for evaluations, for which nobody had asked."""
    with pytest.raises(UsageError, match="steps 0 trains nothing: leave methods, procedure and refit out"):
        fit(toy(40), model=bert, output=tmp_path / "o", refit=True, head="logistic", **{**QUICK, "steps": 0})


@pytest.mark.parametrize("combine", ["soup", "ensemble"])
def test_several_runs_of_refit_are_spread_on_test_sets_alone(tmp_path, bert, combine):
    """The rows of the cross-validation were scored by the folds, and by none of the runs."""
    own = {**QUICK, "steps": 4, "tests": {"test": toy(10, start=200)}, "refit": True, "folds": 2, "evaluations": 1}
    result = fit(toy(40), model=bert, output=tmp_path / "o", num_seeds=2, combine=combine, **own)
    assert list(result.metrics) == ["cross-validation", "test"]
    assert [scores.get("runs", {}).get("accuracy", {}).get("n") for scores in result.metrics.values()] == [None, 2]


# ---- failing runs -----------------------------------------------------------------------------------------------


def test_a_run_whose_loss_does_not_fall_is_stopped_counted_and_begun_anew(tmp_path, bert):
    own = {**QUICK, "steps": 60, "validation_share": 0}
    result = fit(toy(60), model=bert, output=tmp_path / "o", restarts=2, **{**own, "lr": 1e-7})
    run = result.runs[0]
    assert (run["failures"], run["failing"], run["steps"]) == (2, True, 60)  # the last one runs to its end
    assert run["seeds"] not in (
        {"init": 0, "data": 0, "dropout": 0, "method": 0},
        training.restarted(dict.fromkeys(run["seeds"], 0), 1),
    )
    assert "begun anew: 2" in (result.output / "README.md").read_text()
    learns = fit(toy(60), model=bert, output=tmp_path / "p", restarts=2, **{**own, "lr": 2e-2})
    assert (learns.runs[0]["failures"], learns.runs[0]["failing"]) == (0, False)


def test_runs_of_a_soup_begin_anew_with_the_same_head(tmp_path, bert):
    """Naive: another head, and the mean of models that did not begin alike is worse than each of them."""
    own = {**QUICK, "steps": 20, "lr": 1e-7, "validation_share": 0, "num_seeds": 2, "restarts": 1, "seed": 2**32 - 1}
    result = fit(toy(60), model=bert, output=tmp_path / "o", combine="soup", **own)
    assert [run["failures"] for run in result.runs] == [1, 1]
    assert {run["seeds"]["init"] for run in result.runs} == {2**32 - 1}
    assert len({run["seeds"]["data"] for run in result.runs} | {0, 2**32 - 1}) == 4  # others than before the restart


def test_a_model_that_gives_every_row_the_same_answer_is_said_to_and_begun_anew(tmp_path, bert, caplog):
    """Naive: Matthews 0 on every set, and not a word."""
    own = {**QUICK, "steps": 20, "lr": 1e-9, "weight_decay": 0.0}
    rare = pd.concat([toy(60).query("label == 'up'"), toy(12)])
    model = save_tiny_bert(tmp_path / "m", initializer_range=1e-4)
    result = fit(rare, model=model, output=tmp_path / "o", restarts=1, **own)
    assert result.runs[0]["hopeless"] == "gives every row the same answer"
    assert result.runs[0]["failures"] == 1
    assert "the model gives every row the same answer: try" in caplog.text
    learns = fit(toy(60), model=bert, output=tmp_path / "p", **{**QUICK, "lr": 2e-2})
    assert learns.runs[0]["hopeless"] is None


class State:
    def __init__(self, step, losses):
        self.global_step, self.log_history = step, [{"loss": loss} for loss in losses]


@pytest.mark.parametrize(
    ("state", "classes", "failing"),
    [
        (State(20, [0.7, 0.63]), 2, True),  # 0.9 log 2 is 0.624
        (State(20, [0.7, 0.62]), 2, False),
        (State(20, [0.62, 0.7]), 2, False),  # it fell once
        (State(19, [0.7]), 2, False),  # too early to tell
        (State(20, [1.0]), 3, True),  # 0.9 log 3 is 0.989
        (State(20, [0.98]), 3, False),
    ],
)  # fmt: skip
def test_failing_is_a_loss_that_stays_above_nine_tenths_of_chance(state, classes, failing):
    assert callbacks._failing(state, math.log(classes), 20) == failing


# ---- weights of classes, calibration, adapters, several labels --------------------------------------------------


def test_class_weights_by_hand():
    two = Classification(("a", "b"))
    rows = pd.DataFrame({"label": ["a"] * 6 + ["b"] * 2})
    weights = two.class_weights(rows["label"].tolist())
    assert weights.tolist() == pytest.approx([8 / 12, 8 / 4])
    loss = loss_of(Options(class_weights="balanced"), rows, two)
    logits, labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 1])
    each = [np.log(1 + np.exp(-1)), np.log(2)]
    output = type("Output", (), {"logits": logits})
    assert float(loss(output, labels)) == pytest.approx((each[0] * 2 / 3 + each[1] * 2) / (2 / 3 + 2))
    assert loss_of(Options(), rows, two) is None


SEVERAL = MultiLabel(("a", "b"))
TWO = Classification(("a", "b"))


@pytest.mark.parametrize(
    ("options", "problem", "logits", "labels", "expected"),
    [
        # p = 0.8: target 0.95 of it; p = 0.5
        ({"label_smoothing": 0.1}, TWO, [np.log(4), 0.0], 0, -0.95 * np.log(0.8) - 0.05 * np.log(0.2)),
        ({"label_smoothing": 0.1}, SEVERAL, [np.log(4), 0.0], [1.0, 0.0],
         (-0.95 * np.log(0.8) - 0.05 * np.log(0.2) + np.log(2)) / 2),
        ({"focal": 2.0}, TWO, [np.log(4), 0.0], 0, -0.2**2 * np.log(0.8)),
        ({"focal": 2.0}, TWO, [np.log(4), 0.0], 1, -0.8**2 * np.log(0.2)),
        ({"focal": 2.0}, TWO, [np.log(4), 0.0], [0.5, 0.5], -0.5**2 * (np.log(0.8) + np.log(0.2)) / 2),
        ({"focal": 1.0}, SEVERAL, [np.log(4), 0.0], [0.0, 1.0], (-0.8 * np.log(0.2) + 0.5 * np.log(2)) / 2),
        # a, 6 of 8 rows, has weight 2 / 3: alone in its batch the weight cancels
        ({"focal": 2.0, "class_weights": "balanced"}, TWO, [np.log(4), 0.0], 0, -0.2**2 * np.log(0.8)),
        ({"focal": 2.0, "label_smoothing": 0.1}, TWO, [np.log(4), 0.0], 0,
         0.2**2 * (-0.95 * np.log(0.8) - 0.05 * np.log(0.2))),
    ],
)  # fmt: skip
def test_smoothed_labels_and_focal_loss_by_hand(options, problem, logits, labels, expected):
    """Naive: p is read from the smoothed or the weighted loss; smoothing takes two labels for two exclusive classes."""
    rows = pd.DataFrame({"label": ["a"] * 6 + ["b"] * 2})
    output = type("Output", (), {"logits": torch.tensor([logits])})
    assert float(loss_of(Options(**options), rows, problem)(output, torch.tensor([labels]))) == pytest.approx(expected)


def test_focal_loss_with_class_weights_is_a_weighted_mean():
    rows = pd.DataFrame({"label": ["a"] * 6 + ["b"] * 2})
    output = type("Output", (), {"logits": torch.tensor([[np.log(4), 0.0]] * 2)})
    loss = loss_of(Options(focal=2.0, class_weights="balanced"), rows, TWO)(output, torch.tensor([0, 1]))
    each = [-(0.2**2) * np.log(0.8), -(0.8**2) * np.log(0.2)]
    assert float(loss) == pytest.approx((each[0] * 2 / 3 + each[1] * 2) / (2 / 3 + 2))


def test_a_focal_loss_below_1_has_a_slope_where_the_model_is_sure():
    """Naive: (1 - p) ** 0.5 has an infinite slope at p = 1, and infinity times a loss of zero is NaN."""
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss = loss_of(Options(focal=0.5), pd.DataFrame({"label": []}), TWO)
    loss(type("O", (), {"logits": logits}), torch.tensor([0])).backward()
    assert logits.grad.isfinite().all()


def test_chance_is_the_loss_of_a_model_that_knows_nothing():
    """Naive: a focal loss begins below 0.9 log K, so that no training ever fails."""
    for names in (("a", "b"), ("a", "b", "c")):
        problem, options = Classification(names), Options(focal=2.0)
        output = type("Output", (), {"logits": torch.zeros(1, len(names))})
        loss = loss_of(options, pd.DataFrame({"label": []}), problem)(output, torch.tensor([1]))
        assert float(loss) == pytest.approx(chance(options, problem))
        assert chance(Options(label_smoothing=0.1), problem) == math.log(len(names))


@pytest.mark.parametrize("option", [{"label_smoothing": 0.1}, {"focal": 2.0}])
def test_smoothing_and_focal_loss_reach_the_training_and_are_for_classes(tmp_path, bert, option):
    own = {**QUICK, "steps": 2, "probe": False}
    plain = fit(toy(24), model=bert, output=tmp_path / "plain", **own)
    other = fit(toy(24), model=bert, output=tmp_path / "other", **own, **option)
    assert not same(weights(plain.output), weights(other.output))
    (name,) = option
    assert json.loads((other.output / "steadytune.json").read_text())["recipe"][name] == option[name]
    numbers = toy(24).assign(label=np.arange(24) / 7)
    with pytest.raises(UsageError, match=f"{name} is for classification, this is regression"):
        fit(numbers, model=bert, output=tmp_path / "numbers", **own, **option)


def test_class_weights_reach_the_training(tmp_path, bert):
    table = pd.concat([toy(60).query("label == 'up'"), toy(15).query("label == 'down'")])
    own = {**QUICK, "validation_share": 0}
    share = [
        fit(table, model=bert, output=tmp_path / kind, class_weights=kind, **own).predict_proba(["film"])[0, 0]
        for kind in ("none", "balanced")
    ]
    assert share[1] > share[0] + 0.05  # 'down' is the rare class


def test_temperature_is_the_best_one_and_lies_in_the_weights(tmp_path, bert):
    own = {**QUICK, "validation_share": 0.4}
    plain = fit(toy(60), model=bert, output=tmp_path / "p", **own)
    cooled = fit(toy(60), model=bert, output=tmp_path / "c", calibrate=True, **own)
    found = cooled.runs[0]["temperature"]
    texts = toy(60)["text"].tolist()
    logits = [np.diff(np.log(FittedModel.load(tmp_path / name).predict_proba(texts)), axis=1) for name in ("p", "c")]
    np.testing.assert_allclose(logits[0], logits[1] * found, rtol=1e-3)
    assert (cooled.predict(texts) == plain.predict(texts)).all()
    rows = plain.predictions.query("set == 'validation'")
    scores = np.log(rows[["probability_down", "probability_up"]].to_numpy())
    truth = (rows["label"] == "up").astype(int).to_numpy()

    def cost(t):
        return -log_softmax(scores / t, axis=1)[np.arange(len(truth)), truth].mean()

    assert cost(found) <= min(cost(t) for t in np.geomspace(0.05, 20, 200)) + 1e-6


def test_a_soup_of_calibrated_models_is_calibrated_itself(tmp_path, bert, monkeypatch):
    """Naive: the mean of their weights as it is, whose answers are surer or less sure than those of either."""

    def sure(models):
        rescale(soup := souped(models), 3, 0.0, "calibrate")
        return soup

    monkeypatch.setattr("steadytune.merge.souped", sure)
    own = {**QUICK, "steps": 12, "probe": False, "validation": toy(30, start=100)}
    result = fit(toy(40), model=bert, output=tmp_path / "o", calibrate=True, num_seeds=2, combine="soup", **own)
    rows = result.predictions.query("set == 'validation'")
    outputs = np.log(rows[["probability_down", "probability_up"]].to_numpy())
    assert temperature(outputs, (rows["label"] == "up").astype(int).tolist()) == pytest.approx(1, abs=0.01)
    record = json.loads((result.output / "steadytune.json").read_text())
    assert record["temperature"] > 1


@pytest.mark.parametrize("architecture", CONFIGS)
def test_a_scale_divides_the_logits_of_every_architecture(architecture):
    model = tiny(architecture, num_labels=3).eval()
    feature = {"input_ids": [3, 4, 5, 2], "attention_mask": [1, 1, 1, 1]}
    before = {name: p.clone() for name, p in model.state_dict().items()}
    check_scale(model, feature, "calibrate")
    assert same(before, model.state_dict()), "trying leaves no trace"
    inputs = {name: torch.tensor([values]) for name, values in feature.items()}
    with torch.no_grad():
        logits = model(**inputs).logits
        rescale(model, 1 / 3, 0.0, "calibrate")
        torch.testing.assert_close(model(**inputs).logits, logits / 3)


def test_a_model_whose_logits_are_not_those_of_its_last_linear_layer_is_refused():
    model = tiny("Bert", num_labels=3)
    model.classifier = torch.nn.Sequential(model.classifier, torch.nn.LogSoftmax(-1))
    weights = model.classifier[0].weight.clone()
    with pytest.raises(UsageError, match="calibrate: the logits of this model are not those of its last linear"):
        check_scale(model, {"input_ids": [3, 4, 5]}, "calibrate")
    assert torch.equal(weights, model.classifier[0].weight)


def test_temperature_of_a_known_distribution():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20000, 3))
    powers = np.exp(logits / 2.5)
    labels = [rng.choice(3, p=p / p.sum()) for p in powers]
    assert temperature(logits, labels) == pytest.approx(2.5, rel=0.05)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_are_merged_into_a_plain_model(tmp_path, bert):
    pytest.importorskip("peft")
    own = {**QUICK, "validation_share": 0}
    result = fit(toy(60), model=bert, output=tmp_path / "o", lora=True, **own)
    before = BertForSequenceClassification.from_pretrained(bert, num_labels=2).state_dict()
    after = BertForSequenceClassification.from_pretrained(result.output).state_dict()
    assert after.keys() == before.keys()
    moved = {n for n in after if after[n].shape == before[n].shape and not torch.equal(after[n], before[n])}
    assert "bert.encoder.layer.0.attention.self.query.weight" in moved
    assert not any("embeddings" in n or "LayerNorm" in n for n in moved)
    change = (
        after["bert.encoder.layer.0.intermediate.dense.weight"]
        - before["bert.encoder.layer.0.intermediate.dense.weight"]
    )
    assert torch.linalg.matrix_rank(change) <= 16
    assert (
        adapted(
            BertForSequenceClassification(
                BertConfig(hidden_size=16, num_attention_heads=2, intermediate_size=8, vocab_size=9)
            ),
            None,
        ).__class__
        is BertForSequenceClassification
    )


def test_several_labels_a_row(tmp_path, bert):
    def several(*where):
        table = toy(*where)
        kind = [("film" in text, label == "up") for text, label in zip(table["text"], table["label"], strict=True)]
        return table.assign(label=[["film"] * film + ["kind"] * up for film, up in kind])

    tests = {"t": several(20, False, 300)}
    result = fit(several(60), model=bert, output=tmp_path / "o", tests=tests, **{**QUICK, "steps": 150, "lr": 1e-2})
    assert result.metric == "f1_micro"
    assert result.metrics["t"]["f1_micro"] > 0.7
    assert set(result.predict(["good film", "bad play"])) <= {(), ("film",), ("kind",), ("film", "kind")}
    loaded = AutoModelForSequenceClassification.from_pretrained(result.output)
    assert loaded.config.problem_type == "multi_label_classification"
    assert isinstance(pd.read_parquet(result.output / "predictions.parquet")["prediction"].iloc[0], np.ndarray)


# ---- signals, dry run -------------------------------------------------------------------------------------------


class Signal(TrainerCallback):
    """The system asks for the end in the middle of a step."""

    def __init__(self, step, number):
        self.step, self.number = step, number

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            signal.raise_signal(self.number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_signals_leave_a_checkpoint_of_the_last_step(tmp_path, bert, monkeypatch, number):
    own = {**QUICK, "steps": 12, "progress": True, "methods": "dps_mix:update_ratio=0.2"}
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(training, "Progress", lambda name: Signal(6, number))
        with pytest.raises(callbacks.Interrupted):
            fit(toy(40), model=bert, output=tmp_path / "cut", **own)
    assert last_checkpoint(tmp_path / "cut" / "checkpoints" / "training").name == "checkpoint-7"
    assert handlers == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    cut = fit(toy(40), model=bert, output=tmp_path / "cut", resume=True, **own)
    straight = fit(toy(40), model=bert, output=tmp_path / "straight", **own)
    assert same(weights(cut.output), weights(straight.output))


def cut_at(step, folder, bert, monkeypatch, **own):
    with monkeypatch.context() as patch:
        patch.setattr(training, "Progress", lambda name: Signal(step, signal.SIGINT))
        with pytest.raises(callbacks.Interrupted):
            fit(toy(60), model=bert, output=folder, **{**own, "progress": True})


def test_the_best_moment_in_memory_outlives_an_interruption(tmp_path, bert, monkeypatch, scored):
    """Naive: the best weights of before are lost, and the last ones of the schedule are kept in their place."""
    own = {**QUICK, "evaluations": 8, "methods": "ema:decay=0.8"}
    scores = [0.5, 0.9, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7]
    scored(scores)
    straight = fit(toy(60), model=bert, output=tmp_path / "straight", **own)
    scored(scores)
    cut_at(21, tmp_path / "cut", bert, monkeypatch, **own)
    cut = fit(toy(60), model=bert, output=tmp_path / "cut", resume=True, **own)
    assert cut.steps == straight.steps == 10
    assert same(weights(cut.output), weights(straight.output))


def test_the_checkpoint_of_a_signal_stays_beside_the_best_one(tmp_path, bert, monkeypatch, scored):
    """Naive: the end of the cut training leaves the best checkpoint alone, and a resume repeats the steps after it."""
    own = {**QUICK, "evaluations": 8, "save_steps": 5}
    scored([0.5, 0.9, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7])
    cut_at(21, tmp_path / "cut", bert, monkeypatch, **own)
    assert last_checkpoint(tmp_path / "cut" / "checkpoints" / "training").name == "checkpoint-22"
    assert fit(toy(60), model=bert, output=tmp_path / "cut", resume=True, **own).steps == 10


def test_a_folder_that_was_moved_after_the_last_step_resumes_with_its_best_moment(tmp_path, bert, monkeypatch, scored):
    own = {**QUICK, "evaluations": 8, "save_steps": 5}
    scored([0.5, 0.9, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7])
    cut_at(39, tmp_path / "cut", bert, monkeypatch, **own)
    (tmp_path / "cut").rename(tmp_path / "moved")
    assert fit(toy(60), model=bert, output=tmp_path / "moved", resume=True, **own).steps == 10


def test_other_validation_rows_are_no_resume_of_a_run_that_they_select(tmp_path, bert, monkeypatch):
    """Naive: the best moment is the best of scores on two tables."""
    own = {**QUICK, "evaluations": 8, "save_steps": 5}
    cut_at(21, tmp_path / "cut", bert, monkeypatch, validation=toy(30, start=100), **own)
    with pytest.raises(UsageError, match="started otherwise: validation data"):
        fit(toy(60), model=bert, output=tmp_path / "cut", resume=True, validation=toy(30, start=200), **own)
    cut_at(21, tmp_path / "last", bert, monkeypatch, validation=toy(30, start=100), **QUICK)
    fit(toy(60), model=bert, output=tmp_path / "last", resume=True, validation=toy(30, start=200), **QUICK)


@pytest.mark.parametrize(("begun", "now", "said"), [(0, 5, "resume with save_steps 0"), (5, 0, "save_steps above 0")])
def test_a_resume_finds_the_best_moment_where_the_run_began_to_keep_it(
    tmp_path, bert, monkeypatch, scored, begun, now, said
):
    own = {**QUICK, "evaluations": 8}
    scored([0.5, 0.9, 0.7, 0.7, 0.7, 0.7, 0.7, 0.7])
    cut_at(21, tmp_path / "cut", bert, monkeypatch, **{**own, "save_steps": begun})
    with pytest.raises(UsageError, match=said):
        fit(toy(60), model=bert, output=tmp_path / "cut", resume=True, **{**own, "save_steps": now})


def test_a_dry_run_measures_and_writes_nothing(tmp_path, bert):
    found = dry_run(toy(60), model=bert, output=tmp_path / "o", tests=TESTS, num_seeds=2, combine="ensemble", **QUICK)
    assert not (tmp_path / "o").exists()
    assert (found.trainings, found.steps) == (2, 40)
    size = sum(t.nbytes for t in AutoModelForSequenceClassification.from_pretrained(bert).state_dict().values())
    assert found.files["model"] == 2 * size
    assert found.seconds_per_step > 0
    assert found.minutes >= 2 * 40 * found.seconds_per_step / 60
    assert found.memory > size
    one = dry_run(toy(60), model=bert, output=tmp_path / "o", **{**QUICK, "steps": 1})
    assert one.seconds_per_step > 0  # naive: the only step is taken for a warm-up, and the minutes are NaN
    with pytest.raises(UsageError, match="unknown option 'lrr'"):
        dry_run(toy(60), model=bert, output=tmp_path / "o", lrr=1)


def test_padded_tokens_of_a_step_by_hand():
    assert per_step(np.array([3, 5, 2, 2, 7]), 2, 1).tolist() == [10, 4, 7]
    assert per_step(np.array([3, 5, 2, 2, 7]), 2, 2).tolist() == [14, 7]


# ---- estimators -------------------------------------------------------------------------------------------------


FAST = {"steps": 100, "batch_size": 8, "lr": 1e-2}


def test_classifier_is_a_scikit_learn_classifier(bert):
    table = toy(60)
    texts, labels = table["text"].to_numpy(), np.where(table["label"] == "up", 7, -2)
    model = SteadyClassifier(bert, **FAST)
    assert clone(model).get_params() == model.get_params()
    assert cross_val_score(model, texts, labels, cv=2).mean() > 0.8
    model.fit(texts, labels)
    assert model.classes_.tolist() == [-2, 7]
    assert model.predict(texts[:5]).dtype == labels.dtype
    found = model.predict_proba(texts)
    assert found.shape == (60, 2)
    assert ((found.argmax(1) == 1) == (model.predict(texts) == 7)).all()
    assert model.score(texts, labels) > 0.8
    search = GridSearchCV(SteadyClassifier(bert, **FAST), {"methods": [(), ("ema:decay=0.5",)]}, cv=2).fit(
        texts, labels
    )
    assert set(search.cv_results_["param_methods"].tolist()) == {(), ("ema:decay=0.5",)}


def test_columns_of_probabilities_follow_the_labels_where_text_order_differs(bert):
    """As text '10' comes before '9'; as numbers after it."""
    table = toy(60)
    labels = np.where(table["label"] == "up", 10, 9)
    model = SteadyClassifier(bert, **FAST).fit(table["text"].tolist(), labels)
    assert model.classes_.tolist() == [9, 10]
    assert (model.predict(table["text"].tolist()) == labels).mean() > 0.8


def test_pairs_frames_and_numbers(bert, tmp_path):
    table = toy(60, pair=True)
    pairs = table[["text", "other"]]
    gpt2 = save_tiny_gpt2(tmp_path / "gpt2")
    model = SteadyRegressor(gpt2, **FAST).fit(pairs, table["score"])
    assert model.predict(pairs).shape == (60,)
    np.testing.assert_allclose(model.predict(pairs), model.predict(pairs.to_numpy().tolist()))
    with pytest.raises(UsageError, match="2 text"):
        model.predict(["one text"])


@pytest.mark.parametrize("call", [lambda m: m.predict(["a"]), lambda m: m.predict_proba(["a"])])
def test_an_estimator_that_was_not_fitted_says_so(bert, call):
    with pytest.raises(Exception, match="not fitted"):
        call(SteadyClassifier(bert))


def test_estimators_refuse_rows_that_do_not_match(bert):
    with pytest.raises(UsageError, match="X has 2 rows, y has 3"):
        SteadyClassifier(bert).fit(["a", "b"], [0, 1, 0])
    with pytest.raises(UsageError, match="no rows"):
        SteadyClassifier(bert).fit([], [])


def test_an_evaluation_at_the_end_of_an_epoch_scores_every_row(bert, tmp_path, monkeypatch):
    """Naive: accelerate's gathering for metrics, which cuts the batches to the 4 rows of the last training batch."""
    seen = []
    measure = training.Setup.measure

    def counting(self, rows, predicted):
        seen.append((len(rows), len(predicted.label_ids), len(predicted.predictions)))
        return measure(self, rows, predicted)

    monkeypatch.setattr(training.Setup, "measure", counting)
    options = {**QUICK, "steps": 16, "evaluations": 4}  # epochs of 8 steps
    fit(toy(60), model=bert, output=tmp_path / "out", validation=toy(24, start=300), **options)
    assert seen == [(24, 24, 24)] * 4
