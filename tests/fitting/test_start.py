"""How training starts: pooling and head from options, and the frozen probe beside the scores."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import AutoModelForSequenceClassification, AutoTokenizer, ModernBertConfig, ModernBertModel

from fit_helpers import same, save_sentence_bert, save_tiny_bert, toy, weights, word_tokenizer
from steadytune import FittedModel, SteadyClassifier, fit
from steadytune.errors import UsageError
from steadytune.fitting import main as fitting_main
from steadytune.fitting import peft_models
from steadytune.fitting.merge_folders import merge_folders

FEW = {"steps": 6, "batch_size": 4, "lr": 1e-3, "text": "text", "label": "label", "progress": False, "save_steps": 0}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A sentence encoder: its folder says mean pooling, and its pooler was never trained."""
    return save_sentence_bert(tmp_path_factory.mktemp("sentences"))


def start(output: Path, model: str, **options):
    return fit(toy(), model=model, output=output, **{**FEW, "tests": {"test": toy(20, start=100)}, **options})


def recipe(folder: Path) -> dict:
    return json.loads((folder / "steadytune.json").read_text())["recipe"]


# ---- pooling and head


def test_a_sentence_encoder_is_read_by_the_mean_and_stays_a_plain_folder(tmp_path, sentences):
    found = start(tmp_path / "out", sentences)
    assert recipe(tmp_path / "out")["pooling"] == "mean"
    model, info = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not {*info["missing_keys"], *info["unexpected_keys"]}
    assert model.config.num_hidden_layers == 3
    assert "the mean over tokens" in (tmp_path / "out" / "README.md").read_text()
    texts = ["good film", "bad play cast"]
    batch = AutoTokenizer.from_pretrained(tmp_path / "out")(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        plain = model.eval()(**batch).logits.softmax(-1).numpy()
    np.testing.assert_allclose(found.predict_proba(texts), plain, atol=1e-6)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT reads it
def test_a_sentence_encoder_that_is_large_has_adapters_and_pools_as_it_does(tmp_path, sentences, monkeypatch, caplog):
    """Naive: the mean is chosen, and refused beside the adapters that the model's size adds."""
    monkeypatch.setattr(peft_models, "LORA_ABOVE", 1000)
    start(tmp_path / "out", sentences, steps=1)
    assert "pooling" not in recipe(tmp_path / "out")
    assert "with adapters pooling cannot be changed" in caplog.text
    with pytest.raises(UsageError, match=r"pooling mean.*has adapters by default.*lora=False"):
        start(tmp_path / "no", sentences, pooling="mean")
    start(tmp_path / "whole", sentences, lora=False, steps=1)
    assert recipe(tmp_path / "whole")["pooling"] == "mean"


@pytest.mark.parametrize("changes", [{"mean": False}, {"trained": True}])
def test_pooling_stays_where_the_folder_or_the_pooler_gives_no_reason(tmp_path, changes):
    start(tmp_path / "out", save_sentence_bert(tmp_path / "bert", **changes))
    assert "pooling" not in recipe(tmp_path / "out")
    assert "head" not in recipe(tmp_path / "out")


def test_pairs_are_not_averaged_by_default(tmp_path, sentences):
    """A sentence encoder never averaged over two texts; STS-B lost ten points of correlation by it."""
    rows = {"tests": {"test": toy(20, pair=True, start=100)}, "text": ["text", "other"]}
    fit(toy(pair=True), model=sentences, output=tmp_path / "out", **{**FEW, **rows})
    assert "pooling" not in recipe(tmp_path / "out")


@pytest.mark.parametrize(("pooling", "said"), [("model", True), ("cls", False), ("mean", False)])
def test_a_probe_on_a_pooler_that_was_never_trained_is_warned_of(tmp_path, sentences, caplog, pooling, said):
    start(tmp_path / "out", sentences, head="logistic", pooling=pooling, steps=1)
    assert ("the outputs of bert.pooler.dense, which was never trained" in caplog.text) is said


def test_the_options_are_the_methods(tmp_path, bert):
    start(tmp_path / "options", bert, pooling="mean", head="logistic")
    start(tmp_path / "methods", bert, pooling="model", methods=["pooling", "head_init"])
    assert same(weights(tmp_path / "options"), weights(tmp_path / "methods"))
    start(tmp_path / "plain", bert)
    assert weights(tmp_path / "options").keys() != weights(tmp_path / "plain").keys()


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_the_pooler_that_pooling_bypasses_is_not_drawn_anew(tmp_path, bert, pooling):
    """Naive: `re_init` comes after `pooling`, and the head reads a random projection."""
    start(tmp_path / "out", bert, pooling=pooling, methods=["re_init"], lr=1e-9, steps=1)
    weight = weights(tmp_path / "out")["bert.pooler.dense.weight"]
    assert torch.allclose(weight, 0.3 * torch.eye(len(weight)), atol=1e-6)


@pytest.mark.parametrize("method", ["mask_training", "top_layers:blocks=1", "bitfit"])
def test_the_probe_of_the_head_reads_the_model_that_methods_have_changed(tmp_path, bert, method):
    """Naive: the head comes first, and every method that changes the model is refused beside it."""
    start(tmp_path / "option", bert, head="logistic", methods=[method, "rdrop"])
    start(tmp_path / "methods", bert, methods=[method, "head_init", "rdrop"])
    assert same(weights(tmp_path / "option"), weights(tmp_path / "methods"))


@pytest.mark.parametrize("method", ["mask_training", "top_layers:blocks=1", "bitfit", "levi"])
def test_methods_may_freeze_what_pooling_has_added(tmp_path, sentences, method):
    """Naive: a weight that the mean over tokens has drawn must be in the optimizer, also if it is frozen."""
    assert start(tmp_path / "out", sentences, methods=[method], steps=1).steps == 1


def test_zero_steps_leave_the_encoder_alone_and_keep_the_probe(tmp_path, bert):
    found = start(tmp_path / "out", bert, head="logistic", steps=0)
    after = weights(tmp_path / "out")
    assert all(torch.equal(after[f"bert.{name}"], value) for name, value in weights(Path(bert)).items())
    probe = start(tmp_path / "trained", bert).metrics["test"]["probe"]
    assert {name: found.metrics["test"][name] for name in probe} == pytest.approx(probe, abs=1e-5)


def test_heads_of_two_seeds_that_begin_as_the_same_probe_may_be_merged(tmp_path, bert):
    for seed in (0, 1):
        start(tmp_path / f"probe-{seed}", bert, head="logistic", init_seed=seed)
        start(tmp_path / f"random-{seed}", bert, init_seed=seed)
    merge_folders([tmp_path / "probe-0", tmp_path / "probe-1"], output=tmp_path / "soup", how="uniform")
    one, other, soup = (weights(tmp_path / name) for name in ("probe-0", "probe-1", "soup"))
    assert all(torch.allclose(soup[name], (one[name] + other[name]) / 2, atol=1e-7) for name in soup)
    for first in ("random-0", "probe-0"):
        with pytest.raises(UsageError, match="different seeds"):
            merge_folders([tmp_path / first, tmp_path / "random-1"], output=tmp_path / "no", how="uniform")


def test_a_dense_layer_that_pooling_leaves_as_drawn_is_recorded(tmp_path):
    """Naive: two runs that began with different dense layers are averaged."""
    config = ModernBertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, pad_token_id=0,
        cls_token_id=2, sep_token_id=3,
    )  # fmt: skip
    ModernBertModel(config).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    start(tmp_path / "out", str(tmp_path / "model"), pooling="mean", head="logistic", steps=1)
    record = json.loads((tmp_path / "out" / "steadytune.json").read_text())
    assert record["drawn"] == ["head.dense.weight", "head.norm.weight"]


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"pooling": "average"}, ["pooling must be one of auto, model, mean, cls", "'average'"]),
        ({"head": "logistics"}, ["head must be one of", "logistic"]),
        ({"pooling": "mean", "peft": "lora"}, ["pooling mean", "adapters", "pooling='model'"]),
        ({"steps": 0}, ["steps 0", "the head 'logistic'"]),
        ({"steps": 0, "head": "ridge", "methods": ["ema"]}, ["steps 0", "methods"]),
        ({"steps": 0, "head": "ridge", "class_weights": "balanced"}, ["class_weights", "steps 0"]),
        ({"pooling": "mean", "methods": ["pooling"]}, ["pooling='mean'", "leave one out"]),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_written(tmp_path, bert, options, parts):
    with pytest.raises(UsageError) as refused:
        start(tmp_path / "out", bert, **options)
    assert all(part in str(refused.value) for part in parts), refused.value
    assert not (tmp_path / "out").exists()


def test_resumed_with_pooling_and_head_equals_uninterrupted(tmp_path, sentences, monkeypatch):
    options = {"head": "logistic", "save_steps": 2, "methods": ["ema"]}
    start(tmp_path / "whole", sentences, **options)
    real = fitting_main.Output.save_model

    def crash(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(fitting_main.Output, "save_model", crash)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path / "cut", sentences, **options)
    monkeypatch.setattr(fitting_main.Output, "save_model", real)
    start(tmp_path / "cut", sentences, resume=True, **options)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))


def test_soups_and_interpolations_of_heads_that_began_as_a_probe(tmp_path, bert):
    """Three head seeds have one start: their mean is no worse than its members. alpha 0 is the probe itself."""
    data = {"tests": {"test": toy(40, start=300)}, "validation_share": 0}
    frozen = start(tmp_path / "frozen", bert, head="logistic", steps=0, **data)
    runs = [
        start(tmp_path / f"run-{seed}", bert, head="logistic", steps=40, init_seed=seed, data_seed=seed, **data)
        for seed in range(3)
    ]
    merge_folders([run.output for run in runs], output=tmp_path / "soup", how="uniform")
    merge_folders([runs[0].output], output=tmp_path / "probe", how="interpolate", base=frozen.output, alpha=0.0)
    rows = toy(40, start=300)
    soup, probe = (FittedModel.load(tmp_path / name).evaluate(rows) for name in ("soup", "probe"))
    assert soup["accuracy"] >= 0.9 * min(run.metrics["test"]["accuracy"] for run in runs)
    assert probe["log_loss"] == pytest.approx(frozen.metrics["test"]["log_loss"], abs=1e-6)
    assert probe["log_loss"] == pytest.approx(runs[0].metrics["test"]["probe"]["log_loss"], abs=1e-5)


# ---- the probe


def test_the_probe_is_a_logistic_regression_on_what_the_head_reads(tmp_path, bert):
    found = start(tmp_path / "out", bert, validation_share=0)
    model = AutoModelForSequenceClassification.from_pretrained(bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert)

    def pooled(rows):
        batch = tokenizer(rows["text"].tolist(), padding=True, return_tensors="pt")
        with torch.inference_mode():
            return model.bert(**batch).pooler_output.double().numpy()

    train, test = pooled(toy()), pooled(toy(20, start=100))
    m, s = train.mean(0), (train - train.mean(0)).std()
    gold = np.array(toy(20, start=100)["label"] == "up")
    losses = []
    for c in np.logspace(-4, 4, 9):
        logistic = LogisticRegression(C=c, max_iter=5000, tol=1e-8).fit((train - m) / s, toy()["label"])
        chances = logistic.predict_proba((test - m) / s)[:, 1]  # of "up"
        losses.append(-np.log(np.where(gold, chances, 1 - chances)).mean())
    probe = found.metrics["test"]["probe"]
    assert min(abs(probe["log_loss"] - loss) for loss in losses) < 1e-5
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["sets"]["test"]["probe"] == probe
    assert "linear probe on frozen features" in (tmp_path / "out" / "README.md").read_text()
    assert "frozen probe" in (tmp_path / "out" / "report.html").read_text()


def test_the_probe_changes_nothing_and_can_be_left_out(tmp_path, bert):
    start(tmp_path / "with", bert)
    found = start(tmp_path / "without", bert, probe=False)
    assert same(weights(tmp_path / "with"), weights(tmp_path / "without"))
    assert "probe" not in found.metrics["test"]


def test_the_probe_never_reads_labels_it_is_judged_on(tmp_path, bert):
    validation = toy(20, start=200)
    poisoned = validation.assign(label=["down" if label == "up" else "up" for label in validation["label"]])
    one, other = (
        start(tmp_path / name, bert, validation=rows, head="logistic")
        for name, rows in (("one", validation), ("other", poisoned))
    )
    assert one.metrics["test"] == other.metrics["test"]
    assert sum(found.metrics["validation"]["probe"]["accuracy"] for found in (one, other)) == pytest.approx(1)
    assert same(weights(tmp_path / "one"), weights(tmp_path / "other"))


def test_refit_judges_the_probe_by_the_fold_that_left_a_row_out(tmp_path, bert):
    """Texts that say nothing: a probe that had seen the rows would score far above chance."""
    rng = np.random.default_rng(0)
    rows = toy(60).assign(label=rng.permutation(["up", "down"] * 30))
    found = fit(rows, model=bert, output=tmp_path / "out", refit=True, folds=3, evaluations=1, **FEW)
    assert found.metrics["cross-validation"]["probe"]["accuracy"] < 0.67


def test_a_model_that_is_no_better_than_the_probe_is_said(tmp_path, bert):
    found = start(tmp_path / "out", bert, lr=1e-9)
    assert found.metrics["test"]["accuracy"] <= found.metrics["test"]["probe"]["accuracy"]
    (said,) = [text for text in found.warnings if text.startswith("test") and "linear probe" in text]
    assert said in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("label", ["score", "tags"])
def test_numbers_and_several_labels_have_a_probe_too(tmp_path, bert, label):
    def rows(table):
        return table.assign(tags=[["a"] * (i % 2) + ["b"] * (kind == "up") for i, kind in enumerate(table["label"])])

    options = {**FEW, "label": label, "tests": {"test": rows(toy(20, start=100))}}
    found = fit(rows(toy()), model=bert, output=tmp_path / "out", **options)
    probe = found.metrics["test"]["probe"]
    assert probe.keys() <= found.metrics["test"].keys()
    if label == "score":  # in the labels' units, and better than the mean
        assert probe["rmse"] < found.metrics["test"]["baseline"]["rmse"]
    else:
        assert probe["f1_micro"] > 0.5


def test_a_run_killed_while_features_are_read_begins_anew(tmp_path, bert, monkeypatch):
    from steadytune.fitting import frozen_probe

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(frozen_probe, "frozen_features", killed)
        with pytest.raises(KeyboardInterrupt):
            start(tmp_path / "out", bert)
    start(tmp_path / "out", bert)
    start(tmp_path / "whole", bert)
    assert same(weights(tmp_path / "out"), weights(tmp_path / "whole"))


def test_estimators_take_head_and_pooling(bert):
    table = toy()
    options = {key: FEW[key] for key in ("steps", "batch_size", "lr")}
    start = {"head": "logistic", "pooling": "mean"}
    model = SteadyClassifier(model=bert, options=start, **options).fit(table["text"], table["label"])
    assert model.result_.model.models[0].config.num_hidden_layers == 3
    assert 0.5 < model.result_.probe["accuracy"] <= 1
