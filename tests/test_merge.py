"""Soups, interpolation and task arithmetic: recorded results of the authors' code, hand numbers, refusals, the verb."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from typer.testing import CliRunner

from fit_helpers import save_tiny_bert, toy
from helpers import assert_same, copied
from steadytune import FittedModel, fit, merge
from steadytune.cli import app
from steadytune.data.problem import Classification
from steadytune.fitting.merge_folders import merge_folders

ATOL = 1e-10
moved_far = pytest.mark.filterwarnings("ignore:the models did not start from")  # toys, moved by round numbers


# ---------------------------------------------------------------- recorded


def soup_of(golden):
    states = [{"W": w, "b": b} for w, b in zip(golden["W"], golden["b"], strict=True)]

    def score(state):
        return float(((golden["X"] @ state["W"].T + state["b"]).argmax(1) == golden["Y"]).double().mean())

    return states, score


def test_uniform_soup_equals_the_authors(golden):
    golden = golden("soups")
    states, score = soup_of(golden)
    assert_same(merge.uniform(states), {"W": golden["uniform_W"], "b": golden["uniform_b"]}, atol=ATOL)
    assert score(merge.uniform(states)) == pytest.approx(float(golden["uniform_score"]), abs=ATOL)


@pytest.mark.parametrize("rule", ["strict", "ties"])
def test_greedy_soup_equals_the_authors(golden, rule):
    golden = golden("soups")
    states, score = soup_of(golden)
    tried = []

    def watched(state):
        tried.append(score(state))
        return tried[-1]

    soup, chosen = merge.greedy(states, watched, strict=rule == "strict")
    assert chosen == golden[f"greedy_{rule}_ingredients"].tolist()
    assert tried[:8] == pytest.approx(golden["score"].tolist(), abs=ATOL)
    assert tried[8:] == pytest.approx(golden[f"greedy_{rule}_candidate_scores"].tolist(), abs=ATOL)
    assert_same(soup, {"W": golden[f"greedy_{rule}_W"], "b": golden[f"greedy_{rule}_b"]}, atol=ATOL)


def test_wise_ft_equals_the_authors(golden):
    golden = golden("wise_ft")
    names = [key.removeprefix("theta0/") for key in golden.keys("theta0/")]
    start, end = ({n: golden[f"theta{i}/{n}"] for n in names} for i in (0, 1))
    fisher = tuple({n: golden[f"fisher{i}/{n}"] for n in names if f"fisher{i}/{n}" in golden} for i in (0, 1))
    assert 0 < len(fisher[0]) < len(names)
    for i, alpha in enumerate(golden["alphas"].tolist()):
        plain = merge.interpolate(start, end, alpha)
        assert_same(plain, {n: golden[f"plain/{n}"][i] for n in names}, atol=ATOL)
        weighted = merge.interpolate(start, end, alpha, fisher=fisher, floor=golden.meta["fisher_floor"])
        assert_same(weighted, {n: golden[f"fisher_weighted/{n}"][i] for n in names}, atol=ATOL)


# ---------------------------------------------------------------- hand numbers


def state(*values: float, head: float | None = None, count: int = 0) -> dict[str, torch.Tensor]:
    found = {"w": torch.tensor(values), "count": torch.tensor(count)}
    return found if head is None else {**found, "head": torch.tensor([head])}


def matrices(*seeds: int, moved: float = 0.3) -> list[dict[str, torch.Tensor]]:
    """Models that moved from what their seeds drew."""
    states = []
    for i, seed in enumerate(seeds):
        begun = torch.randn(20, 20, generator=torch.Generator().manual_seed(seed))
        states.append({"w": begun + moved * torch.randn(20, 20, generator=torch.Generator().manual_seed(100 + i))})
    return states


@pytest.mark.parametrize(
    "merged",
    [merge.uniform, lambda s: merge.interpolate(*s, 0.5), lambda s: merge.task_vector(*s)],
    ids=["uniform", "interpolate", "task_vector"],
)
def test_models_that_did_not_begin_alike_are_warned_of(merged, recwarn):
    """Naive: the mean of two random heads, or of two pre-trained models, is a model of its own."""
    merged(matrices(0, 0))
    merged([{"w": torch.zeros(20, 20)}, *matrices(1)])  # an adapter that begins with zeros points nowhere
    assert not recwarn
    with pytest.warns(UserWarning, match=r"did not start from the same weights: 'w' has cosine -?0\.\d\d"):
        merged(matrices(0, 1))


def test_greedy_begins_with_the_best_and_leaves_out_what_harms():
    soup, chosen = merge.greedy([state(0.0), state(4.0), state(10.0), state(6.0)], lambda s: -abs(float(s["w"]) - 5))
    assert (chosen, float(soup["w"])) == ([1, 3], 5.0)


def test_greedy_accepts_a_tie_unless_strict():
    same = [state(1.0), state(1.0)]
    assert merge.greedy(same, lambda s: 0.0)[1] == [0, 1]
    assert merge.greedy(same, lambda s: 0.0, strict=True)[1] == [0]


def test_interpolation_takes_a_new_head_and_buffers_from_the_tuned_model():
    found = merge.interpolate(state(1.0, 2.0), state(3.0, 6.0, head=7.0, count=9), 0.25)
    assert_same(found, state(1.5, 3.0, head=7.0, count=9))
    assert_same(merge.interpolate(state(1.0), state(3.0), 0.0)["w"], torch.tensor([1.0]))
    assert_same(merge.interpolate(state(1.0), state(3.0), 1.0)["w"], torch.tensor([3.0]))


def test_a_share_of_interpolation_is_not_rounded_to_single_precision():
    found = merge.interpolate({"w": torch.zeros(1).double()}, {"w": torch.ones(1).double()}, 0.1)
    assert float(found["w"]) == 0.1


def test_paint_takes_the_best_alpha_and_the_smaller_of_two():
    found, alpha = merge.paint(state(0.0), state(10.0), lambda s: -abs(float(s["w"]) - 3))
    assert (alpha, float(found["w"])) == (0.3, 3.0)
    assert merge.paint(state(0.0), state(10.0), lambda s: 0.0)[1] == 0.0


def test_the_fisher_mean_weighs_each_entry_and_leaves_others_even():
    """Naive: an information near zero everywhere divides by zero."""
    states = [
        {"w": torch.tensor([0.0, 2.0, 4.0]), "b": torch.ones(1)},
        {"w": torch.zeros(3), "b": torch.zeros(1)},
    ]
    information = [{"w": torch.tensor([1.0, 3.0, 0.0])}, {"w": torch.tensor([1.0, 1.0, 0.0])}]
    merged = merge.fisher(states, information)
    assert_same(merged, {"w": torch.tensor([0.0, 1.5, 2.0]), "b": torch.tensor([0.5])})
    between = merge.interpolate(states[1], states[0], 0.5, fisher=(information[1], information[0]))
    assert_same({"w": merged["w"]}, {"w": between["w"]})
    with pytest.raises(ValueError, match="2 models need as many sets of Fisher information, got 1"):
        merge.fisher(states, information[:1])


def test_task_arithmetic_adds_and_forgets():
    base = state(1.0, 1.0, count=3)
    vectors = [merge.task_vector(base, tuned) for tuned in (state(2.0, 1.0), state(1.0, 5.0))]
    assert_same(merge.add_vectors(base, vectors, 0.5), state(1.5, 3.0, count=3))
    assert_same(merge.add_vectors(base, vectors[:1], -1.0), state(0.0, 1.0, count=3))
    assert vectors[0].keys() == {"w"}  # no integer buffers


def test_types_stay_and_sums_are_exact():
    halves = [{"w": torch.tensor([1.0, 3e4]).half()}, {"w": torch.tensor([2.0, 6e4]).half()}]
    assert_same(merge.uniform(halves), {"w": torch.tensor([1.5, 4.5e4]).half()})  # their sum is beyond half precision


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: merge.uniform([]), "nothing to merge"),
        (lambda: merge.uniform([state(1.0), state(1.0, 2.0)]), r"'w' has shape \(1,\) in one and \(2,\) in another"),
        (lambda: merge.uniform([state(1.0), state(1.0, head=2.0)]), "not all of them have 'head'"),
        (lambda: merge.uniform([state(1.0), state(1.0, count=1)]), "different values in 'count'"),
        (lambda: merge.interpolate(state(1.0, head=0.0), state(1.0), 0.5), "not all of them have 'head'"),
        (lambda: merge.interpolate(state(1.0), state(1.0), 1.5), r"alpha must lie in \[0, 1\], got 1.5"),
        (lambda: merge.interpolate(state(1.0), state(1.0), 0.5, floor=0.0), "floor must be above 0, got 0"),
        (lambda: merge.task_vector(state(1.0, head=0.0), state(1.0)), "not all of them have 'head'"),
        (lambda: merge.add_vectors(state(1.0), [{"v": torch.ones(1)}]), "not all of them have 'v'"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---------------------------------------------------------------- the verb


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """Folders of a pre-trained model, two models tuned from it with one head, and one with another head."""
    monkeypatch.chdir(tmp_path)
    save_tiny_bert(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained("base", num_labels=3)
    tokenizer = AutoTokenizer.from_pretrained("base")
    for i, name in enumerate(("one", "two")):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * (i + 1))
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    return lambda *words: CliRunner().invoke(app, ["merge", *map(str, words)])


def weights(folder):
    return copied(AutoModelForSequenceClassification.from_pretrained(folder))


def test_the_verb_makes_a_plain_model_directory(desk, tmp_path):
    done = desk("one", "two", "--output", "soup")
    assert done.exit_code == 0, done.output
    model, report = AutoModelForSequenceClassification.from_pretrained("soup", output_loading_info=True)
    assert not any(report.values())
    assert_same(copied(model), merge.uniform([weights("one"), weights("two")]))
    assert AutoTokenizer.from_pretrained("soup")("a b").input_ids
    assert not list(tmp_path.glob(".soup*"))


@moved_far
def test_the_verb_interpolates_the_body_and_leaves_the_head(desk, caplog):
    done = desk("one", "--how", "interpolate", "--base", "base", "--alpha", "0.25", "--output", "out")
    assert done.exit_code == 0, done.output
    assert "base has no classifier.weight and classifier.bias: the merged model takes these from one" in caplog.text
    found, one = weights("out"), weights("one")
    for name, tuned in one.items():
        expected = tuned if name.startswith("classifier") else tuned - 0.75 * 0.1  # the base lies 0.1 below
        assert (found[name] - expected).abs().max() < 1e-6, name


@moved_far
def test_the_verb_adds_task_vectors(desk):
    done = desk("one", "two", "--how", "add", "--base", "base", "--alpha", "0.5", "--output", "out")
    assert done.exit_code == 0, done.output
    found, one = weights("out"), weights("one")
    name = "bert.pooler.dense.weight"  # base + 0.5 * (0.1 + 0.3), one = base + 0.1
    assert (found[name] - one[name] - 0.1).abs().max() < 1e-6
    assert torch.equal(found["classifier.weight"], one["classifier.weight"])


NAMES = ("LABEL_0", "LABEL_1", "LABEL_2")


@pytest.fixture
def judged(desk, tmp_path):
    """Three models that disagree, rows labelled by the mean of two of them, and what tells a state dict's accuracy."""
    model = AutoModelForSequenceClassification.from_pretrained("one")
    tokenizer = AutoTokenizer.from_pretrained("one")
    start = copied(model)
    fitted = FittedModel([model.eval()], tokenizer, Classification(NAMES), max_length=16)

    def moved(seed):
        generator = torch.Generator().manual_seed(seed)
        return {n: p + 0.3 * torch.randn(p.shape, generator=generator) for n, p in start.items()}

    rows = toy(32)[["text"]].rename(columns={"text": "words"})
    states = [moved(seed) for seed in (1, 2, 3)]
    model.load_state_dict(merge.uniform(states[:2]))
    shift = torch.tensor(fitted.predict_proba(rows["words"].tolist())).log().mean(0)
    for state in states:
        state["classifier.bias"] -= shift  # so that the mean of two answers with all labels
    for name, state in zip(("a", "b", "c"), states, strict=True):
        model.load_state_dict(state)
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    model.load_state_dict(merge.uniform(states[:2]))
    rows = rows.assign(answer=fitted.predict(rows["words"].tolist()))
    assert rows["answer"].nunique() > 1
    rows.to_csv("rows.csv", index=False)

    def accuracy(state):
        model.load_state_dict(state)
        return float((fitted.predict(rows["words"].tolist()) == rows["answer"]).mean())

    return states, accuracy


ROWS = ["--validation", "rows.csv", "--text", "words", "--label", "answer"]


@moved_far
def test_the_verb_makes_a_greedy_soup(desk, judged):
    states, accuracy = judged
    soup, chosen = merge.greedy(states, accuracy)
    assert 1 < len(chosen) < 3 or accuracy(soup) > max(map(accuracy, states))
    done = desk("a", "b", "c", "--how", "greedy", *ROWS, "--output", "soup")
    assert done.exit_code == 0, done.output
    named = ", ".join("abc"[i] for i in chosen)
    assert f"{len(chosen)} of 3 models: {named} (accuracy {accuracy(soup):.4f} on the validation rows)" in done.stdout
    assert_same(weights("soup"), soup)


@moved_far
def test_the_verb_weighs_by_fisher_information(desk, judged):
    """Of the head's bias it is p * (1 - p), the mean over the rows, without dropout."""
    states, _ = judged
    done = desk("a", "b", "--how", "fisher", *ROWS, "--output", "soup")
    assert done.exit_code == 0, done.output
    assert "a: trace" in done.stdout
    assert "32 squared gradients; b: trace" in done.stdout
    texts = toy(32)["text"].tolist()
    models = [AutoModelForSequenceClassification.from_pretrained(name).eval() for name in "ab"]
    fitted = [
        FittedModel([m], AutoTokenizer.from_pretrained("a"), Classification(NAMES), max_length=16) for m in models
    ]
    chances = [torch.tensor(each.predict_proba(texts)) for each in fitted]
    information = [(p * (1 - p)).mean(0) for p in chances]
    biases = torch.stack([state["classifier.bias"].double() for state in states[:2]])
    expected = (torch.stack(information) * biases).sum(0) / torch.stack(information).sum(0)
    assert torch.allclose(weights("soup")["classifier.bias"].double(), expected, atol=1e-5)
    assert (expected - biases.mean(0)).abs().max() > 1e-3


@moved_far
@pytest.mark.parametrize("kind", ["regression", "multi_label_classification"])
def test_the_fisher_information_of_numbers_and_of_several_labels_is_that_of_their_true_labels(desk, kind):
    """Of the head's bias it is the mean squared slope of the loss: 2 (f - y), or (p - y) / K for each of K labels."""
    several = kind != "regression"
    rows = toy(16)[["text"]].assign(x=[i % 2 for i in range(16)], y=[i // 4 % 2 for i in range(16)])
    rows.to_csv("rows.csv", index=False)
    outputs, models = 2 if several else 1, []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        model = AutoModelForSequenceClassification.from_pretrained(
            "base", num_labels=outputs, problem_type=kind, id2label={0: "x", 1: "y"} if several else {0: "x"}
        )
        torch.nn.init.normal_(model.classifier.bias)
        model.save_pretrained(name)
        AutoTokenizer.from_pretrained("base").save_pretrained(name)
        models.append(model.eval())
    columns = ["--label", "x", *(["--label", "y"] if several else [])]
    done = desk("a", "b", "--how", "fisher", "--validation", "rows.csv", "--text", "text", *columns, "--output", "soup")
    assert done.exit_code == 0, done.output
    assert "16 squared gradients; b: trace" in done.stdout
    given = torch.tensor(rows[["x", "y"][:outputs]].to_numpy()).double()
    inputs = AutoTokenizer.from_pretrained("base")(rows["text"].tolist(), padding=True, return_tensors="pt")
    with torch.no_grad():
        answers = [model(**inputs).logits.double() for model in models]
    slopes = [(f.sigmoid() - given) / outputs if several else 2 * (f - given) for f in answers]
    information = torch.stack([slope.square().mean(0) for slope in slopes])
    biases = torch.stack([model.classifier.bias.detach().double() for model in models])
    expected = (information * biases).sum(0) / information.sum(0)
    assert torch.allclose(weights("soup")["classifier.bias"].double(), expected, atol=1e-5)
    assert (expected - biases.mean(0)).abs().max() > 1e-3
    words = ["--validation", "rows.csv", "--text", "text", *columns, "--fisher-labels", "expected", "--output", "other"]
    refused = desk("a", "b", "--how", "fisher", *words)
    assert "is for one class a row" in refused.output
    assert refused.exit_code != 0


@moved_far
def test_the_verb_paints_with_the_best_share(desk, judged):
    states, accuracy = judged
    start = {n: t for n, t in weights("one").items() if not n.startswith("classifier")}
    start = {n: t - 0.1 for n, t in start.items()}  # the base lies 0.1 below
    painted, alpha = merge.paint(start, states[0], accuracy)
    done = desk("a", "--how", "paint", "--base", "base", *ROWS, "--output", "out")
    assert done.exit_code == 0, done.output
    assert f"alpha {alpha:g} (accuracy {accuracy(painted):.4f} on the validation rows)" in done.stdout
    assert_same(weights("out"), painted, atol=1e-6)


def test_the_score_is_the_mean_over_tables_and_smaller_errors_are_better(desk):
    model = AutoModelForSequenceClassification.from_pretrained("base", num_labels=1)
    for name in "abc":
        torch.nn.init.constant_(model.classifier.weight, 0.0)
        torch.nn.init.constant_(model.classifier.bias, {"a": 0.0, "b": 2.0, "c": 8.0}[name])  # a model of one answer
        model.save_pretrained(name)
        AutoTokenizer.from_pretrained("base").save_pretrained(name)
    for file, value in (("low.csv", 0.0), ("high.csv", 3.0)):  # two tables: the mean error is least between them
        toy(8)[["text"]].assign(label=value).to_csv(file, index=False)
    words = ["--validation", "low.csv", "--validation", "high.csv", "--metric", "rmse"]
    done = desk("a", "b", "c", "--how", "greedy", *words, "--output", "soup")
    assert done.exit_code == 0, done.output
    found = weights("soup")["classifier.bias"].item()
    assert (found, "rmse 1.5000" in done.stdout) == (1.0, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["one", "two", "--how", "greedy", "--output", "x"], "labelled rows: give them with --validation FILE"),
        (["one", "--how", "greedy", *ROWS, "--output", "x"], "a greedy soup needs at least two models, got 1"),
        (["one", "two", "--how", "greedy", "--base", "base", *ROWS, "--output", "x"], "a greedy soup has no base"),
        (["one", "--how", "paint", *ROWS, "--output", "x"], "--how paint needs the pre-trained model: --base DIR"),
        (["one", "two", "--how", "paint", "--base", "base", *ROWS, "--output", "x"], "one model, got 2"),
        (["one", "two", "--how", "greedy", *ROWS, "--metric", "rmse", "--output", "x"], "unknown metric 'rmse'"),
        (["one", "two", "--how", "fisher", "--output", "x"], "weighs by the Fisher information of labelled rows: give"),
        (["one", "--how", "fisher", *ROWS, "--output", "x"], "a fisher soup needs at least two models, got 1"),
        (
            ["one", "two", "--how", "fisher", "--fisher-labels", "real", *ROWS, "--output", "x"],
            "fisher_labels must be one",
        ),
        (["one", "two", "--how", "greedy", "--validation", "no.csv", "--output", "x"], "no.csv: no such file"),
        (["one", "two", "--how", "greedy", *ROWS, "--output", "x"], "label 'down' (in 8 of 8 rows)"),
        (["one", "two", "--how", "greedy", *ROWS[:-1], "absent", "--output", "x"], "'absent'"),
    ],
    ids=str,
)
def test_mistakes_with_rows_are_one_line_too(desk, words, message):
    toy(8)[["text", "label"]].set_axis(["words", "answer"], axis=1).to_csv("rows.csv", index=False)
    done = desk(*words)
    assert (done.exit_code, len(done.stderr.splitlines())) == (2, 1), done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["one", "--output", "x"], "needs at least two models, got 1"),
        (["one", "two", "--how", "unifrom", "--output", "x"], "Did you mean 'uniform'?"),
        (["one", "two", "--how", "interpolate", "--base", "base", "--output", "x"], "one model, got 2"),
        (["one", "--how", "add", "--output", "x"], "needs the pre-trained model: --base DIR"),
        (["one", "two", "--base", "base", "--output", "x"], "has no base"),
        (["one", "absent", "--output", "x"], "absent is no Hugging Face model directory"),
        (["one", "two", "--output", "base"], "output base exists and is not empty"),
        (["one", "two", "--output", "no/where"], "no such directory no"),
        (
            ["one", "--how", "interpolate", "--base", "base", "--alpha", "2", "--output", "x"],
            "alpha must lie in [0, 1], got 2",
        ),
    ],
    ids=str,
)
def test_mistakes_are_one_line_exit_code_2_and_write_nothing(desk, tmp_path, words, message):
    before = sorted(tmp_path.rglob("*"))
    done = desk(*words)
    assert done.exit_code == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: ")
    assert message in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_models_of_other_labels_or_heads_are_refused(desk, tmp_path):
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    named = {**config, "id2label": {"0": "a", "1": "b", "2": "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    (tmp_path / "two" / "config.json").write_text(json.dumps(named))
    assert "other labels" in desk("one", "two", "--output", "x").stderr
    (tmp_path / "two" / "config.json").write_text(json.dumps(config))
    for name, seed in (("one", 0), ("two", 1)):
        (tmp_path / name / "steadytune.json").write_text(json.dumps({"recipe": {"seeds": {"init": seed}}}))
    assert "drawn with different seeds (one with seed 0, two with seed 1)" in desk("one", "two", "--output", "x").stderr


def test_a_failed_write_leaves_nothing(desk, tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", fail)
    before = sorted(tmp_path.rglob("*"))
    done = desk("one", "two", "--output", "soup")
    assert (done.exit_code, "cannot be written" in done.stderr) == (2, True)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_merged_of_fits_has_card_and_metrics_and_predicts(tmp_path, caplog):
    """Naive: a bare model, which `steadytune predict` refuses for want of a record."""
    bert = save_tiny_bert(tmp_path / "bert")
    own = {"steps": 20, "batch_size": 8, "lr": 5e-3, "save_steps": 0, "progress": False, "validation_share": 0.0}
    for i in range(2):
        fit(toy(40), model=bert, output=tmp_path / str(i), data_seed=i, subset_seed=0, **own)
    rows = tmp_path / "rows.csv"
    toy(20, start=100).to_csv(rows, index=False)
    output = tmp_path / "soup"
    said = merge_folders([tmp_path / "0", tmp_path / "1"], output, validation=[rows])
    metrics = json.loads((output / "metrics.json").read_text())
    soup = FittedModel.load(output)
    assert metrics["sets"]["validation"] == soup.evaluate(rows)
    assert metrics["metric"] == "accuracy"
    assert f"accuracy {metrics['sets']['validation']['accuracy']:.4f} on the validation rows" in said
    card = (output / "README.md").read_text()
    assert "- merged (uniform) from" in card
    assert "| validation | 20 |" in card
    plain = tmp_path / "plain"
    merge_folders([tmp_path / "0", tmp_path / "1"], plain)
    texts = ["good film", "bad play"]
    assert (FittedModel.load(plain).predict_proba(texts) == soup.predict_proba(texts)).all()
    assert "threshold" not in caplog.text
    record = json.loads((tmp_path / "0" / "steadytune.json").read_text())
    (tmp_path / "0" / "steadytune.json").write_text(json.dumps({**record, "threshold": 0.9}))
    merge_folders([tmp_path / "0", tmp_path / "1"], tmp_path / "told")  # naive: the threshold is gone without a word
    assert f"the threshold of {tmp_path / '0'} (0.9) is left out" in caplog.text
