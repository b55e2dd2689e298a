import dataclasses
import itertools
import json
import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

from fit_helpers import WORDS, same, save_tiny_bert, save_tiny_gpt2, toy, weights, word_tokenizer
from steadytune.data.problem import Classification
from steadytune.errors import UsageError
from steadytune.files.atomic import write_json, write_whole
from steadytune.fitting import plan as planning
from steadytune.fitting import training
from steadytune.fitting.encoding import token_counts, tokenise
from steadytune.fitting.fit_trainer import WINDOW, ByLength, FitTrainer, arguments
from steadytune.fitting.fitted_model import FittedModel
from steadytune.fitting.folder import last_checkpoint
from steadytune.fitting.main import fit
from steadytune.fitting.options import Options
from steadytune.fitting.outputs import logits
from steadytune.fitting.pretrained import Pretrained, set_dropout, token_limit
from steadytune.fitting.spelling import method_record
from steadytune.methods import METHODS
from steadytune.spelling import convert, parse_method

QUICK = {"steps": 12, "batch_size": 4, "lr": 1e-3, "save_steps": 5, "progress": False}


@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


# ---- recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "options", "steps"),
    [
        (100, {}, 400),  # 20 epochs would be 140
        (500, {}, 640),  # 32 steps an epoch
        (67_349, {}, 2000),
        (100, {"steps": 7}, 7),
        (100, {"epochs": 3}, 21),
        (100, {"epochs": 0.5}, 4),
        (100, {"epochs": 3, "accumulation": 4}, 6),  # 7 forwards are 2 steps
        (500, {"batch_size": 8}, 1260),
    ],
)
def test_number_of_steps(rows, options, steps):
    assert Options(**options).total_steps(rows) == steps


def test_seeds_default_to_the_one_seed():
    assert Options(seed=7, data_seed=0).seeds == {"init": 7, "subset": 0, "data": 0, "dropout": 7, "method": 7}
    assert Options(data_seed=3, subset_seed=5).seeds == {"init": 0, "subset": 5, "data": 3, "dropout": 0, "method": 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 0}, "lr must be above 0, got 0"),
        ({"lr": float("nan")}, "lr must be above 0, got nan"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"warmup": 1}, "warmup must be .* got 1"),
        ({"seed": -1}, "seed must be between 0 and"),
        ({"steps": 3, "epochs": 2}, "steps .3. or epochs .2., not both"),
        ({"batchsize": 3}, "unknown option 'batchsize'. Did you mean 'batch_size'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Options.of(options)


def test_recipe_in_transformers_words(tmp_path):
    recipe = Options(seed=3, method_seed=9, accumulation=2, bf16=True)
    args = arguments(recipe, recipe.seeds, 400, tmp_path, 200)
    assert (args.get_warmup_steps(400), args.max_steps, args.optim) == (40, 400, "adamw_torch_fused")
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps, args.bf16) == (16, 2, True)
    assert args.seed == 3
    assert args.n_gpu <= 1


# ---- order of rows ----------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=700), st.integers(1, 9), st.integers(0, 2**32 - 1),
    st.integers(0, 50),
)  # fmt: skip
def test_every_row_once_an_epoch_with_rows_of_like_length(lengths, size, seed, epoch):
    sampler = ByLength(lengths, size, seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    assert sorted(order) == list(range(len(lengths)))
    assert order == list(sampler)  # of (seed, epoch) alone
    whole = len(lengths) // size
    if whole <= WINDOW:  # one window: its batches do not overlap in length
        batches = sorted(sorted(lengths[i] for i in order[k * size : (k + 1) * size]) for k in range(whole))
        assert all(a[-1] <= b[0] for a, b in itertools.pairwise(batches))


def test_sorting_spares_padding_and_leaves_the_order_of_batches_to_chance():
    lengths = np.random.default_rng(0).integers(5, 60, 2000)
    order = np.array(list(ByLength(lengths, 16, 0)))
    width = lengths[order].reshape(-1, 16).max(1)
    assert width.sum() * 16 < 1.1 * lengths.sum()
    shuffled = np.random.default_rng(1).permutation(lengths).reshape(-1, 16).max(1)
    assert shuffled.sum() * 16 > 1.5 * lengths.sum()
    assert abs(np.corrcoef(width, np.arange(len(width)))[0, 1]) < 0.2


def test_neighbouring_data_seeds_share_no_epoch_order():
    """accelerate orders epoch e by data_seed + e: seed 0 in its second epoch would be seed 1 in its first."""

    def order(seed, epoch):
        sampler = ByLength([1] * 64, 4, seed)
        sampler.set_epoch(epoch)
        return tuple(sampler)

    assert len({order(seed, epoch) for seed in range(5) for epoch in range(5)}) == 25


def test_the_trainer_sees_the_rows_in_this_order(tmp_path, bert, monkeypatch):
    """Epoch after epoch, also after a resume in the middle of one."""
    seen = []
    compute = FitTrainer.compute_loss

    def spy(self, model, inputs, *args, **kwargs):
        if model.training:  # the probe of the token count is no step
            seen.append(inputs["input_ids"].shape[0])
        return compute(self, model, inputs, *args, **kwargs)

    drawn = []
    iterate = ByLength.__iter__
    monkeypatch.setattr(FitTrainer, "compute_loss", spy)
    monkeypatch.setattr(ByLength, "__iter__", lambda self: drawn.append(self.epoch) or iterate(self))
    fit(toy(24), model=bert, output=tmp_path / "o", validation_share=0, **{**QUICK, "steps": 15})
    assert seen == [4] * 15
    assert drawn == [0, 1, 2]


# ---- methods by name --------------------------------------------------------------------------------------------


@dataclass
class Fake:
    """Fields of every type that options may have."""

    keep: float = 0.5
    times: int = 1
    frozen: bool = False
    where: str = "all"
    form: Literal["tensor", "global"] = "tensor"
    limit: int | float | None = None
    scope: str | type = "linear"

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must lie in (0, 1], got {self.keep}")


REGISTRY = {"fake": Fake, "other": Fake}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fake", Fake()),
        ("fake:", Fake()),
        ("fake:keep=0.7,times=3", Fake(keep=0.7, times=3)),
        ("fake: keep = 1 , frozen = True", Fake(keep=1.0, frozen=True)),
        ("fake:form=global,where=2", Fake(form="global", where="2")),
        ("fake:limit=none", Fake(limit=None)),
        ("fake:limit=3", Fake(limit=3)),
        ("fake:limit=0.5", Fake(limit=0.5)),
        ("fake:scope=encoder", Fake(scope="encoder")),
    ],
)
def test_method_options(text, expected):
    method = parse_method(text, REGISTRY)
    assert method == expected
    pairs = zip(dataclasses.astuple(method), dataclasses.astuple(expected), strict=True)
    assert all(type(a) is type(b) for a, b in pairs)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("fak", ["unknown method 'fak'", "mean 'fake'", "Known: fake, other"]),
        ("fake:kep=1", ["unknown option 'kep'", "mean 'keep'", "keep, times"]),
        ("fake:keep", ["option=value", "got 'keep'"]),
        ("fake:keep=a", ["keep must be a number, got 'a'"]),
        ("fake:times=1.5", ["times must be a whole number, got '1.5'"]),
        ("fake:frozen=yes", ["frozen must be True or False, got 'yes'"]),
        ("fake:form=row", ["form must be one of 'tensor', 'global', got 'row'"]),
        ("fake:limit=x", ["limit must be a whole number, or a number, or None, got 'x'"]),
        ("fake:keep=1,keep=1", ["keep is given twice"]),
        ("fake:keep=2", ["method 'fake': keep must lie in (0, 1], got 2.0"]),
    ],
)
def test_bad_method_is_one_clear_error(text, parts):
    with pytest.raises(UsageError) as caught:
        parse_method(text, REGISTRY)
    for part in parts:
        assert part in str(caught.value)


def test_convert_refuses_what_the_shell_cannot_say():
    with pytest.raises(ValueError):  # noqa: PT011  (its caller words the message)
        convert("x", list)


@pytest.mark.parametrize("name", METHODS)
def test_every_registered_method_parses_with_its_own_defaults(name):
    plain = parse_method(name, METHODS)
    spelled = ",".join(
        f"{field.name}={value}"
        for field in dataclasses.fields(plain)
        if isinstance(value := getattr(plain, field.name), (str, int, float))
    )
    assert parse_method(f"{name}:{spelled}", METHODS) == plain
    json.dumps(method_record(plain), allow_nan=False)


# ---- model and tokens -------------------------------------------------------------------------------------------


TWO = Classification(("a", "b"))


def test_half_precision_checkpoints_are_trained_in_float32(tmp_path, bert):
    AutoModelForSequenceClassification.from_pretrained(bert, dtype=torch.bfloat16).save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    model = Pretrained.open(str(tmp_path), TWO).load(0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_init_seed_decides_the_head_only(bert):
    source = Pretrained.open(bert, TWO)
    first, again, other = (source.load(seed).state_dict() for seed in (0, 0, 1))
    assert same(first, again)
    assert [name for name in first if not torch.equal(first[name], other[name])] == ["classifier.weight"]


def test_another_head_is_replaced_and_the_body_kept(tmp_path, bert):
    source = Pretrained.open(bert, TWO)
    two = source.load(0)
    two.save_pretrained(tmp_path)
    source.tokenizer.save_pretrained(tmp_path)
    three = Pretrained.open(str(tmp_path), Classification(("x", "y", "z"))).load(0)
    assert three.config.id2label == {0: "x", 1: "y", 2: "z"}
    assert three.classifier.weight.shape == (3, 16)
    assert torch.equal(three.bert.embeddings.word_embeddings.weight, two.bert.embeddings.word_embeddings.weight)


def test_dropout_reaches_every_module_of_the_model(bert):
    source = Pretrained.open(bert, TWO, dropout=0.0)
    assert set(source.dropout.values()) == {0.0}
    modules = source.load(0).modules()
    assert {module.p for module in modules if isinstance(module, torch.nn.Dropout)} == {0.0}


def test_model_without_dropout_refuses_the_option():
    class Bare:
        model_type = "bare"

        def to_dict(self):
            return {"layer_dropout_schedule": None, "dropout_on": True}

    with pytest.raises(UsageError, match="bare model has no dropout"):
        set_dropout(Bare(), 0.1)


def test_length_is_cut_at_the_limit_and_pairs_share_it(bert):
    source = Pretrained.open(bert, TWO)
    tokenizer, config = source.tokenizer, source.config
    rows = pd.DataFrame({"text": ["good " * 30], "text_pair": ["bad"]})
    feature = tokenise(rows, tokenizer, 8)[0]
    assert len(feature["input_ids"]) == 8
    assert feature["input_ids"].count(WORDS.index("bad") + 4) == 1
    assert feature["token_type_ids"] == [0] * 6 + [1] * 2
    assert token_limit(None, config, tokenizer) == 64
    with pytest.raises(UsageError, match="at most 64, the model's limit, got 65"):
        token_limit(65, config, tokenizer)


def test_a_row_that_just_fits_is_not_counted_as_cut(bert):
    """Naive: the tokens of the cut rows; those of 8 and of 9 tokens look alike."""
    source = Pretrained.open(bert, TWO, max_length=8)
    rows = pd.DataFrame({"text": ["good " * words for words in (6, 7, 2, 60)]}, index=[5, 6, 7, 8])
    features = tokenise(rows, source.tokenizer, source.max_length)
    assert [len(f["input_ids"]) for f in features] == [8, 8, 4, 8]
    assert token_counts(rows, features, source.tokenizer, source.max_length) == [8, 9, 4, 62]


def test_cut_rows_are_named_by_their_number_in_the_file(tmp_path, bert, caplog):
    table = toy(30)
    table.loc[17, "text"] = "good " * 30
    fit(table, model=bert, output=tmp_path / "out", **{**QUICK, "validation_share": 0.0, "max_length": 16})
    assert "1 of 30 rows (3.33 %) have more than 16 tokens and are cut (rows counted from 0: 17)" in caplog.text


# ---- the whole run ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory, bert):
    """One run on a CSV file with two test sets, one of them scored under merged names."""
    folder = tmp_path_factory.mktemp("run")
    toy(48).to_csv(folder / "train.csv", index=False)
    test = toy(20, start=100)
    test.to_json(folder / "test.jsonl", orient="records", lines=True)
    options = {**QUICK, "steps": 60, "lr": 1e-2}
    result = fit(
        folder / "train.csv", model=bert, output=folder / "out", methods=["dps_dense:update_ratio=0.2"],
        tests={"test": folder / "test.jsonl"}, validation_share=0.25, **options,
    )  # fmt: skip
    return folder / "out", result, test


def test_model_learns_and_scores_match_the_predictions(run):
    _, result, _ = run
    for name, scores in result.metrics.items():
        rows = result.predictions[result.predictions["set"] == name]
        assert scores["accuracy"] == (rows["label"] == rows["prediction"]).mean()
        assert scores["rows"] == len(rows)
    assert result.metrics["test"]["accuracy"] == 1.0
    assert list(result.metrics) == ["validation", "test"]
    assert result.metrics["validation"]["rows"] == 12


def test_output_is_a_plain_model_that_gives_the_same_predictions(run):
    output, result, test = run
    model = AutoModelForSequenceClassification.from_pretrained(output).eval()
    tokenizer = AutoTokenizer.from_pretrained(output)
    with torch.no_grad():
        logits = model(**tokenizer(test["text"].tolist(), padding=True, return_tensors="pt")).logits
    rows = result.predictions.query("set == 'test'")
    assert rows["row"].tolist() == list(range(20))
    assert [model.config.id2label[i] for i in logits.argmax(-1).tolist()] == rows["prediction"].tolist()
    np.testing.assert_allclose(logits.softmax(-1).numpy(), rows[["probability_down", "probability_up"]], atol=1e-6)


def test_files_agree_with_the_result_and_nothing_is_left_over(run):
    output, result, _ = run
    model = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    ours = ["README.md", "history.parquet", "metrics.json", "predictions.parquet", "report.html", "steadytune.json"]
    wrong = (result.predictions["label"] != result.predictions["prediction"]).any()
    ours += ["mistakes.parquet"] if wrong else []
    assert {path.name for path in output.iterdir()} == {*model, *ours}
    metrics = json.loads((output / "metrics.json").read_text())
    assert (metrics["sets"], metrics["metric"], metrics["steps"]) == (result.metrics, "accuracy", 60)
    pd.testing.assert_frame_equal(pd.read_parquet(output / "predictions.parquet"), result.predictions)


def test_record_says_what_was_run(run):
    output, _, _ = run
    record = json.loads((output / "steadytune.json").read_text())
    assert record["status"] == "finished"
    method = record["recipe"]["methods"][0]
    assert (method["name"], method["options"]["update_ratio"], method["options"]["keep"]) == ("dps_dense", 0.2, 0.7)
    assert record["recipe"]["seeds"] == dict.fromkeys(("init", "subset", "data", "dropout", "method"), 0)
    assert record["recipe"]["dropout"]["hidden_dropout_prob"] == 0.1
    assert (record["recipe"]["steps"], record["recipe"]["max_length"]) == (60, 64)
    assert [record["data"][name]["rows"] for name in ("train", "validation", "test")] == [36, 12, 20]
    assert record["versions"]["torch"] == torch.__version__


def test_the_method_reached_the_trainer(tmp_path, run, bert):
    """Without the method, everything else equal, other weights come out."""
    output, _, _ = run
    plain = fit(toy(48), model=bert, output=tmp_path / "o", validation_share=0.25, **{**QUICK, "steps": 60, "lr": 1e-2})
    assert not same(weights(output), weights(plain.output))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


RESUMED = {**QUICK, "progress": True, "methods": ["dps_mix:update_ratio=0.2"], "tests": {"t": toy(7, start=100)}}


@pytest.fixture
def stop_at(monkeypatch):
    return lambda step: monkeypatch.setattr(training, "Progress", lambda name: StopAt(step))


@pytest.mark.parametrize("kept", ["whole checkpoint", "newest one torn"])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, bert, stop_at, kept):
    """Dropout is on and the method is in the middle of a stage: step 5 or 10 of 12."""
    stop_at(None)
    straight = fit(toy(30), model=bert, output=tmp_path / "straight", **RESUMED)
    stop_at(11)
    with pytest.raises(KeyboardInterrupt):
        fit(toy(30), model=bert, output=tmp_path / "cut", **RESUMED)
    record = json.loads((tmp_path / "cut" / "steadytune.json").read_text())
    assert record["status"] == "training"
    checkpoints = tmp_path / "cut" / "checkpoints" / "training"
    assert last_checkpoint(checkpoints).name == "checkpoint-10"
    if kept == "newest one torn":
        (checkpoints / "checkpoint-11").mkdir()
        (checkpoints / "checkpoint-11" / "trainer_state.json").write_text('{"global')
    stop_at(None)
    resumed = fit(toy(30), model=bert, output=tmp_path / "cut", resume=True, **RESUMED)
    assert same(weights(straight.output), weights(resumed.output))
    pd.testing.assert_frame_equal(straight.predictions, resumed.predictions)
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_a_crash_after_training_costs_no_training(tmp_path, bert, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("steadytune.fitting.main.evaluate", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            fit(toy(30), model=bert, output=tmp_path / "o", **QUICK)
    assert last_checkpoint(tmp_path / "o" / "checkpoints" / "training").name == "checkpoint-12"
    resumed = fit(toy(30), model=bert, output=tmp_path / "o", resume=True, **QUICK)
    straight = fit(toy(30), model=bert, output=tmp_path / "s", **QUICK)
    assert same(weights(straight.output), weights(resumed.output))


def test_five_seeds_are_five_separate_things(tmp_path, bert):
    def trained(**seeds):
        name = "-".join(f"{key}{value}" for key, value in seeds.items()) or "none"
        result = fit(toy(30), model=bert, output=tmp_path / name, methods="mixout", **{**QUICK, "steps": 3}, **seeds)
        return weights(result.output), result.predictions["row"].tolist()

    base, rows = trained()
    assert same(base, trained(seed=0, init_seed=0)[0])
    for seed in ("init_seed", "dropout_seed", "method_seed"):
        changed, changed_rows = trained(**{seed: 1})
        assert not same(base, changed), seed
        assert changed_rows == rows, seed
    for seeds in ({"data_seed": 1}, {"subset_seed": 1}):
        assert trained(**seeds)[1] != rows, seeds
    ordered, same_rows = trained(data_seed=1, subset_seed=0)
    assert same_rows == rows
    assert not same(base, ordered)


def test_regression_with_pairs_on_a_decoder_without_padding_token(tmp_path):
    model = save_tiny_gpt2(tmp_path / "gpt2")
    result = fit(
        toy(60, pair=True), model=model, output=tmp_path / "out", text=("text", "other"), label="score",
        tests={"t": toy(20, pair=True, start=100)}, **{**QUICK, "steps": 80, "lr": 1e-2},
    )  # fmt: skip
    assert result.metric == "pearson"
    assert result.metrics["t"]["pearson"] > 0.6
    assert list(result.predictions.columns) == ["set", "row", "label", "prediction"]
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert (loaded.config.problem_type, loaded.config.num_labels) == ("regression", 1)
    assert loaded.config.pad_token_id == 3


def test_other_units_of_the_numbers_change_nothing_but_the_units(tmp_path):
    """On raw numbers far from 0, a training of 30 steps cannot even reach their mean."""
    model = save_tiny_bert(tmp_path / "bert", initializer_range=0.2)
    table = toy(60)
    other = table.assign(score=900 * table["score"] - 12000)
    own = {**QUICK, "steps": 30, "lr": 3e-3, "label": "score", "kind": "regression", "validation_share": 0.0}
    found = [
        fit(t, model=model, output=tmp_path / f"{i}", **own).predict(table["text"])
        for i, t in enumerate((table, other))
    ]
    assert np.std(found[0]) > 0.01
    np.testing.assert_allclose(found[1], 900 * found[0] - 12000, rtol=1e-4)
    raw = fit(other, model=model, output=tmp_path / "raw", standardize=False, **own).predict(table["text"])
    assert np.abs(raw).max() < 100
    assert np.abs(found[1] - other["score"]).mean() < 1000


@pytest.mark.parametrize("save", [save_tiny_bert, save_tiny_gpt2], ids=["bias", "no bias"])
def test_a_head_that_is_not_new_goes_on_where_it_was(save, tmp_path):
    """Its outputs are in units; in training they are not."""
    own = {**QUICK, "label": "score", "validation_share": 0.0}
    model = save(tmp_path / "model", initializer_range=0.2)
    first = fit(toy(40), model=model, output=tmp_path / "first", **own)
    again = fit(toy(40), model=tmp_path / "first", output=tmp_path / "again", **{**own, "lr": 1e-12})
    texts = toy(40)["text"]
    np.testing.assert_allclose(again.predict(texts), first.predict(texts), rtol=1e-4)
    apart = toy(40).assign(score=[4.0, 6.0] * 20)  # a mean of 5 and a spread of exactly 1
    unit = fit(apart, model=tmp_path / "first", output=tmp_path / "unit", **{**own, "kind": "regression", "lr": 1e-12})
    np.testing.assert_allclose(unit.predict(texts), first.predict(texts), rtol=1e-4)
    assert np.std(first.predict(texts)) > 0.01


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
@pytest.mark.parametrize("peft", ["lora", "prompt"])  # merged, and kept beside the base model
def test_adapters_give_numbers_in_units(peft, tmp_path, bert, caplog):
    table = toy(40)
    table["score"] = 900 * table["score"] - 12000
    result = fit(table, model=bert, output=tmp_path / "out", peft=peft, label="score", kind="regression", **QUICK)
    assert "rescale" not in caplog.text, "the scale is taken care of"
    for model in (result, FittedModel.load(result.output)):
        assert np.abs(model.predict(table["text"]) - table["score"].mean()).max() < 3 * table["score"].std()


def test_bf16_keeps_float32_weights(tmp_path, bert):
    result = fit(toy(20), model=bert, output=tmp_path / "out", bf16=True, **QUICK)
    assert {tensor.dtype for tensor in weights(result.output).values()} == {torch.float32}
    plain = fit(toy(20), model=bert, output=tmp_path / "plain", **QUICK)
    assert not same(weights(result.output), weights(plain.output))


def test_no_validation_no_tests_still_gives_a_model(tmp_path, bert):
    result = fit(toy(20), model=bert, output=tmp_path / "out", validation_share=0, **QUICK)
    assert result.metrics == {}
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").config.id2label == {0: "down", 1: "up"}


# ---- what is refused, and that nothing is touched ---------------------------------------------------------------


@pytest.fixture
def finished(tmp_path):
    """A folder as a finished run leaves it, with a file of the user's beside."""
    record = {"format": 1, "status": "finished", "files": ["config.json", "../outside"], "recipe": {}, "data": {}}
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "steadytune.json").write_text(json.dumps(record))
    for name in ("config.json", "notes.txt"):
        (tmp_path / "done" / name).write_text("{}")
    (tmp_path / "outside").write_text("precious")
    return tmp_path / "done"


def refused(bert, output, *parts, **options):
    with pytest.raises(UsageError) as caught:
        fit(toy(20), **{"model": bert, "output": output, **QUICK, **options})
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_output_that_is_not_ours_is_refused(tmp_path, bert):
    (tmp_path / "thesis.tex").write_text("")
    for options in ({}, {"overwrite": True}):
        refused(bert, tmp_path, "not empty and holds no run", "--output DIR", **options)
    refused(bert, tmp_path / "thesis.tex", "must be a directory")


def test_output_of_an_earlier_run_needs_a_word(bert, finished):
    refused(bert, finished, "already holds a run (finished)", "--resume", "--overwrite")
    refused(bert, finished, "is finished", "--overwrite", resume=True)
    refused(bert, finished, "not both", resume=True, overwrite=True)


def test_overwrite_replaces_the_run_and_nothing_else(bert, finished):
    fit(toy(20), model=bert, output=finished, overwrite=True, **QUICK)
    assert "model_type" in json.loads((finished / "config.json").read_text())
    assert (finished / "notes.txt").read_text() == "{}"
    assert (finished.parent / "outside").read_text() == "precious"


def test_bad_input_leaves_the_earlier_run_alone(bert, finished):
    refused(bert, finished, "no column", overwrite=True, label="stars")
    refused(bert, finished, "at most 64", overwrite=True, max_length=65)
    assert (finished / "config.json").read_text() == "{}"


def test_resume_needs_a_run(tmp_path, bert, finished):
    refused(bert, tmp_path / "new", "no run in", resume=True)
    record = json.loads((finished / "steadytune.json").read_text())
    (finished / "steadytune.json").write_text(json.dumps({**record, "format": 99}))
    refused(bert, finished, "not a record of this version", resume=True)
    (finished / "steadytune.json").write_text("{")
    refused(bert, finished, "not JSON", overwrite=True)


def test_a_run_without_a_checkpoint_resumes_from_its_start(tmp_path, bert, stop_at):
    stop_at(3)
    with pytest.raises(KeyboardInterrupt):
        fit(toy(30), model=bert, output=tmp_path / "cut", **RESUMED)
    stop_at(None)
    resumed = fit(toy(30), model=bert, output=tmp_path / "cut", resume=True, **RESUMED)
    straight = fit(toy(30), model=bert, output=tmp_path / "straight", **RESUMED)
    assert same(weights(straight.output), weights(resumed.output))


def test_a_run_goes_on_however_its_paths_are_written(tmp_path, bert, stop_at, monkeypatch):
    """Naive: the paths are compared as text, and the same rows and model are another run."""
    monkeypatch.chdir(tmp_path)
    toy(30).to_csv("train.csv", index=False)
    stop_at(3)
    with pytest.raises(KeyboardInterrupt):
        fit("train.csv", model=bert, output="cut", **RESUMED)
    stop_at(None)
    resumed = fit(tmp_path / "train.csv", model=os.path.relpath(bert), output="cut", resume=True, **RESUMED)
    assert resumed.metrics is not None


def test_the_model_that_a_fit_starts_from_is_not_overwritten(tmp_path, bert):
    """Naive: the weights are removed before the first training ends."""
    own = tmp_path / "own"
    fit(toy(30), model=bert, output=own, **QUICK)
    with pytest.raises(UsageError, match="is the model that training starts from"):
        fit(toy(30), model=own, output=own, overwrite=True, **QUICK)
    assert (own / "model.safetensors").is_file()


def test_resume_names_every_difference(tmp_path, bert, stop_at):
    stop_at(6)
    options = {**QUICK, "methods": "dps_dense:update_ratio=0.3", "progress": True}
    with pytest.raises(KeyboardInterrupt):
        fit(toy(30), model=bert, output=tmp_path / "o", **options)
    refused(
        bert, tmp_path / "o", "lr was 0.001, is 0.002", "seeds.data was 0, is 4", "training data.rows was 27, is 18",
        resume=True, **{**options, "lr": 2e-3, "data_seed": 4},
    )  # fmt: skip
    refused(
        bert, tmp_path / "o", "methods was", "0.7", "0.4", resume=True, **{**options, "methods": "dps_dense:keep=0.4"}
    )


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"model": "no-such-org/no-such-model"}, ["no-such-org/no-such-model", "cannot be loaded"]),
        ({"model": "./nowhere"}, ["'./nowhere': no such directory"]),
        ({"methods": ["dps_dens"]}, ["unknown method 'dps_dens'", "mean 'dps_dense'"]),
        ({"methods": ["dps_dense:keep=3"]}, ["dps_dense", "keep"]),
        ({"methods": ["rdrop"], "dropout": 0.0}, ["dropout"]),
        ({"metric": "bleu"}, ["unknown metric 'bleu'", "accuracy"]),
        ({"save_steps": -1}, ["save_steps"]),
        ({"train_size": 1}, ["train size must lie between 2"]),
        ({"momentum": 1}, ["unknown option 'momentum'"]),
    ],
    ids=str,
)
def test_bad_requests_fail_before_anything_is_written(tmp_path, bert, options, parts):
    refused(bert, tmp_path / "out", *parts, **options)
    assert not (tmp_path / "out").exists()


def test_directory_without_a_model_is_named(tmp_path, bert):
    refused(bert, tmp_path / "out", "without config.json", model=str(tmp_path))


def test_several_processes_are_refused(tmp_path, bert, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    refused(bert, tmp_path / "out", "one process")


def test_files_appear_whole_or_not_at_all(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})

    def torn(path):
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(tmp_path / "a.json", torn)
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


# ---- the fitted model -------------------------------------------------------------------------------------------


class Echo(torch.nn.Module):
    """Outputs are functions of the row's length; notes the shapes it was given."""

    device = torch.device("cpu")

    def __init__(self, outputs):
        super().__init__()
        self.outputs, self.shapes = outputs, []

    def forward(self, input_ids, attention_mask, **more):
        self.shapes.append(tuple(input_ids.shape))
        return type("Output", (), {"logits": self.outputs(attention_mask.sum(1))})


def features(*lengths):
    return [{"input_ids": [4] * length, "attention_mask": [1] * length} for length in lengths]


def test_outputs_come_back_in_row_order_from_batches_of_like_length():
    echo = Echo(lambda n: torch.stack([n, -n], 1).float())
    found = logits(echo, word_tokenizer(), features(2, 5, 1, 5, 3), batch_size=2)
    assert found[:, 0].tolist() == [2, 5, 1, 5, 3]
    assert echo.shapes == [(2, 5), (2, 3), (1, 1)]


def test_diverged_outputs_are_an_error():
    with pytest.raises(UsageError, match="diverged"):
        logits(Echo(lambda n: n[:, None] * float("nan")), word_tokenizer(), features(1, 2))


def test_three_classes_are_scored_on_two_by_the_arg_max_of_three(monkeypatch):
    """Summing the two others would say 'not_entailment' in the first row."""
    rows = pd.DataFrame({"text": ["a", "b"], "label": ["entailment", "not_entailment"]}, index=[4, 9])
    merge = {"neutral": "not_entailment", "contradiction": "not_entailment"}
    outputs = np.log([[0.4, 0.3, 0.3], [0.1, 0.2, 0.7]])
    model = FittedModel([None], word_tokenizer(), Classification(("entailment", "neutral", "contradiction")))
    table, scores = model.judge(rows, model.problem.activate(outputs), merge)
    assert table["prediction"].tolist() == ["entailment", "not_entailment"]
    assert table["probability_contradiction"].tolist() == pytest.approx([0.3, 0.7])
    assert scores["accuracy"] == 1.0


# ---- the hub ----------------------------------------------------------------------------------------------------


def test_uploads_only_when_asked_and_a_failure_costs_nothing(tmp_path, bert, monkeypatch):
    calls = []

    class Api:
        def create_repo(self, name, exist_ok):
            calls.append((name, exist_ok))

        def upload_folder(self, folder_path, repo_id, ignore_patterns):
            calls.append((repo_id, sorted(p.name for p in folder_path.iterdir())))
            if repo_id == "me/down":
                raise OSError("no connection")

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    fit(toy(30), model=bert, output=tmp_path / "a", **QUICK)
    assert not calls
    fit(toy(30), model=bert, output=tmp_path / "b", push_to_hub="me/model", **QUICK)
    assert calls[0] == ("me/model", True)
    assert {"model.safetensors", "README.md", "steadytune.json"} <= set(calls[1][1])
    with pytest.raises(UsageError, match=r"is in .*c, but not uploaded to 'me/down': no connection"):
        fit(toy(30), model=bert, output=tmp_path / "c", push_to_hub="me/down", **QUICK)
    assert same(weights(tmp_path / "b"), weights(tmp_path / "c"))


def test_a_finished_checkpoint_takes_no_further_step(tmp_path, bert):
    """Stock code resumed from the last checkpoint in the middle of an epoch takes one more; an average would move."""
    own = {**QUICK, "methods": "ema:decay=0.9", "save_steps": 4, "lr": 1e-2}
    straight = fit(toy(30), model=bert, output=tmp_path / "s", **own)
    plan = planning.make_plan(toy(30), model=bert, **own)
    setup = planning.make_setup(plan, planning.open_model(plan), tmp_path / "checkpoints")
    (job,) = planning.runs(plan)
    steps = []
    for _ in range(2):
        trained = setup.train(job)
        steps.append(trained.steps)
        assert same(weights(straight.output), trained.model.state_dict())
    assert steps == [12, 12]


class KillAfterSave(TrainerCallback):
    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 4:
            raise KeyboardInterrupt


def test_a_training_that_stopped_early_stays_stopped_after_a_resume(tmp_path, bert, monkeypatch):
    """Killed between its last checkpoint and its result: the stock code would go on to another evaluation."""
    own = {**QUICK, "evaluations": 6, "patience": 1, "progress": True}
    scores = iter([0.9, 0.5, 0.4, 0.3])
    monkeypatch.setattr(training.Setup, "measure", lambda self, rows, predicted: {self.metric: next(scores)})
    plan = planning.make_plan(toy(30), model=bert, **own)
    setup = planning.make_setup(plan, planning.open_model(plan), tmp_path / "checkpoints")
    (job,) = planning.runs(plan)
    with monkeypatch.context() as patch:
        patch.setattr(training, "Progress", lambda name: KillAfterSave())
        with pytest.raises(KeyboardInterrupt):
            setup.train(job)
    assert last_checkpoint(tmp_path / "checkpoints" / job.name).name == "checkpoint-4"
    found = setup.train(job)
    assert [step for step, _ in found.curve] == [2, 4]
    assert found.steps == 2
