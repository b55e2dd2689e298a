"""`steadytune search` from a table to a model: the folder, the fall-back, resuming, errors."""

from __future__ import annotations

import dataclasses
import html
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

import steadytune
from fit_helpers import same, save_tiny_bert, toy, weights
from steadytune import cli
from steadytune.bench.own_tables import OwnTables
from steadytune.bench.places import fingerprint_files
from steadytune.errors import UsageError
from steadytune.searching import main as module
from steadytune.searching.progress import Progress
from steadytune.searching.recipe import Recipe, frozen
from steadytune.searching.report import _claim, write_page
from steadytune.searching.words import bounds, shown, verdict_words

SETTINGS = {"model": "bert", "steps": 4, "lr": 1e-3, "batch_size": 8, "folds": 2, "progress": False}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    save_tiny_bert(folder / "bert")
    toy(40).drop(columns="score").to_csv(folder / "rows.csv", index=False)
    toy(12, start=300).drop(columns="score").to_csv(folder / "new.csv", index=False)
    return folder


@pytest.fixture(scope="module")
def searched(home):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        return steadytune.search(
            "rows.csv", output="out", budget="13runs", arms=["head=logistic"], tests={"new": "new.csv"}, **SETTINGS
        )


@pytest.fixture(autouse=True)
def _here(home, monkeypatch):
    monkeypatch.chdir(home)


def test_the_output_is_a_model_with_the_search_in_its_record(searched):
    record = json.loads(Path("out/steadytune.json").read_text())
    assert record["status"] == "finished"
    assert record["search"] == json.loads(json.dumps(searched.record))
    assert record["data"]["train"]["rows"] == 40, "the last fit trains on all rows"
    found = record["search"]
    assert {arm["name"] for arm in found["arms"]} == {"plain", "probe", "head=logistic"}
    assert found["trainings"] <= 12
    assert len(list(Path("out/search/records").glob("*.json"))) >= 8
    assert searched.verdict.startswith(("No recipe is shown", "`", "What the search"))
    assert len(searched.predict(["good film", "bad plot"])) == 2


def test_columns_may_be_numbers(home):
    frame = pd.read_csv("rows.csv")
    given = {k: v for k, v in SETTINGS.items() if k != "progress"} | {"text": 0, "label": 1, "budget": "13runs"}
    rows = pd.DataFrame({0: frame["text"], 1: frame["label"], 2: range(len(frame))})
    assert steadytune.searching.plan_search(rows, group=2, **given).rows == len(frame)


def test_the_card_quotes_the_honest_estimate_only(searched):
    card = Path("out/README.md").read_text()
    assert searched.record["quoted"] in card
    assert "believed" not in card


def test_the_page_begins_with_the_verdict_and_shows_arms_and_hard_rows(searched):
    page = Path("out/search.html").read_text()
    assert html.escape(searched.verdict, quote=False)[:60] in page.replace("&#39;", "'")
    for arm in ("plain", "probe", "head=logistic"):
        assert arm in page
    assert page.count("<svg") >= 2
    hard = pd.read_parquet("out/search/hard_rows.parquet")
    texts = pd.read_csv("rows.csv")["text"]
    assert (texts[hard["row"]].to_numpy() == hard["text"].to_numpy()).all()
    assert hard["wrong"].is_monotonic_decreasing
    again = write_page("out").read_text()
    assert again == page


def test_the_learning_curve_takes_what_the_budget_leaves(searched):
    """The cells of all rows are those of the race; only those of fewer rows are trained for it."""
    curve = searched.record["curve"]
    assert {name: [*sizes] for name, sizes in curve["scores"].items()} == {"plain": ["10", "20"], "probe": ["10", "20"]}
    page = Path("out/search.html").read_text()
    assert curve["verdict"] in page
    assert 'aria-label="scores by number of training rows"' in page
    records = [json.loads(file.read_text()) for file in Path("out/search/records").glob("*.json")]
    trained = [r["training"]["rows"] for r in records if r["spec"]["options"].get("steps")]
    assert trained.count(10) == 2
    assert len(trained) == searched.record["trainings"] <= 12, "the last fit is the thirteenth"


def test_a_budget_that_is_used_up_leaves_no_learning_curve(monkeypatch):
    cells = SimpleNamespace(task=SimpleNamespace(models={"bert": "bert"}), left=1, cost=lambda recipe: 2)
    monkeypatch.setattr(module, "smaller", lambda task: [10])
    monkeypatch.setattr(module, "learning_curve", lambda *given: pytest.fail("was trained"))
    assert module._curve(cells) is None


def test_texts_without_labels_and_another_table_are_searched(home):
    """Texts of a fold's held-out rows stay out of its trainings; the last fit reads what the recipe reads."""
    rows = pd.read_csv("rows.csv")
    new = pd.read_csv("new.csv")
    texts = pd.concat([rows[["text"]], new[["text"]], toy(20, start=500)[["text"]]])
    texts.to_csv("texts.csv", index=False)
    toy(24, start=700).assign(label=lambda t: t["score"] > 1)[["text", "label"]].to_csv("aux.csv", index=False)
    found = steadytune.search(
        "rows.csv", output="texts", budget="7runs", arms=["pretrain=simcse:steps=2", "aux=aux.csv"],
        unlabelled="texts.csv", tests={"new": "new.csv"}, **SETTINGS,
    )  # fmt: skip
    assert {"pretrain=simcse:steps=2", "aux=aux.csv"} <= {arm["name"] for arm in found.record["arms"]}
    records = [json.loads(file.read_text()) for file in Path("texts/search/records").glob("*.json")]
    assert {record["status"] for record in records} == {"done"}
    apart = Path("texts/search/apart.parquet")
    assert pd.read_parquet(apart)["text"].tolist() == new["text"].tolist(), "texts of test rows are learnt from nowhere"
    assert {record["spec"]["task"]["files"]["apart 0"] for record in records} == {fingerprint_files([apart])}
    procedures = {record["spec"]["recipe"]: json.dumps(record["spec"]) for record in records}
    assert "unlabelled" in procedures["pretrain=simcse:steps=2"]
    assert "unlabelled" not in procedures["plain"]
    assert "unlabelled" not in procedures["aux=aux.csv"]
    fitted = json.loads(Path("texts/steadytune.json").read_text())
    assert found.record["asked"]["unlabelled"]["size"] is None
    assert ("stages" in fitted["recipe"]) == bool(found.record["ship"]["before"])


def test_methods_of_a_search_read_subgroups(home):
    pd.read_csv("rows.csv").assign(shop=lambda t: ["a" if i % 3 else "b" for i in range(len(t))]).to_csv("shops.csv")
    found = steadytune.search(
        "shops.csv", output="shops", budget="7runs", arms=["group_weights:start=0,least=1"], text="text", label="label",
        subgroup="shop", tests={"new": pd.read_csv("shops.csv").head(9)}, **SETTINGS,
    )  # fmt: skip
    assert "group_weights:start=0,least=1" in {arm["name"] for arm in found.record["arms"]}
    assert found.record["dropped"] == {}
    assert set(found.fitted.metrics["new"]["subgroups"]) == {"a", "b"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"unlabelled": "nowhere.csv"}, "must be files, which its trainings read; got 'nowhere.csv'"),
        ({"unlabelled": pd.DataFrame({"text": ["good"]})}, "got a DataFrame"),
        ({"unlabelled_size": 3}, "unlabelled_size 3 draws from texts without labels"),
        ({"pretrain": "tapt"}, r"as in --arm pretrain=tapt"),
    ],
)
def test_texts_of_a_search_are_files(given, message):
    with pytest.raises(UsageError, match=message):
        steadytune.search("rows.csv", output="never", **given, **SETTINGS)


def test_test_rows_are_scored_after_the_choice_and_by_nothing_else(searched):
    assert set(searched.fitted.metrics) == {"new"}
    for file in Path("out/search/records").glob("*.json"):
        assert set(json.loads(file.read_text())["sets"]) == {"test"}, "the held-out fold"
    assert "new.csv" not in json.dumps(searched.record)


def test_a_strange_file_in_the_folder_is_refused_before_anything_is_trained(tmp_path):
    """Naive: the search goes on for its whole budget, and only its last fit says that the folder holds other files."""
    (tmp_path / "out" / "search").mkdir(parents=True)
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds a search and notes\.txt, which is not of it: move that away"):
        steadytune.search("rows.csv", output=tmp_path / "out", resume=True, **SETTINGS)


def test_the_same_command_may_not_run_over_a_search(searched):
    with pytest.raises(UsageError, match="already holds a search: go on with --resume"):
        steadytune.search("rows.csv", output="out", budget="13runs", arms=["head=logistic"], **SETTINGS)
    with pytest.raises(UsageError, match="the search in out is finished"):
        steadytune.search("rows.csv", output="out", budget="13runs", arms=["head=logistic"], resume=True, **SETTINGS)


def test_what_falls_back_to_plain_is_plain_bit_for_bit(searched):
    asked = {"budget": "13runs", "arms": ["head=logistic"], "tests": {"new": "new.csv"}, **SETTINGS}
    plain = {**searched.record["ship"], "name": "plain", "arms": [], "options": {}, "belief": None}
    Path("plain/search").mkdir(parents=True)
    Path("plain/search/found.json").write_text(json.dumps({**searched.record, "ship": plain}))
    steadytune.search("rows.csv", output="plain", resume=True, **asked)
    options = {name: value for name, value in SETTINGS.items() if name != "folds"}
    steadytune.fit("rows.csv", output="fit", validation_share=0, **options)
    assert same(weights(Path("plain")), weights(Path("fit")))


def test_the_last_fit_may_be_the_mean_of_several_runs():
    given = {"output": "several", "budget": "5runs", "arms": ["head=logistic"], **SETTINGS}
    found = steadytune.search("rows.csv", num_seeds=3, **given).record
    assert found["untried"] == ["head=logistic"], "three runs are set aside"
    plain = {**found["ship"], "name": "plain", "arms": [], "options": {}, "belief": None}
    record = {**found, "ship": plain, "runs": 3}
    Path("several/search/found.json").write_text(json.dumps(record))
    steadytune.search("rows.csv", num_seeds=3, resume=True, **given)
    options = {name: value for name, value in SETTINGS.items() if name != "folds"}
    steadytune.fit("rows.csv", output="soup", num_seeds=3, combine="soup", validation_share=0, **options)
    assert same(weights(Path("several")), weights(Path("soup")))
    assert "the mean of the weights of 3 runs, and all figures here are of single runs." in verdict_words(record)
    again = steadytune.search("rows.csv", resume=True, **given).record
    assert again["asked"] != found["asked"], "Naive: a search with one run goes on as one with three"


def test_what_cannot_be_averaged_has_one_run(home):
    table = OwnTables("table", str(Path("rows.csv").absolute()), text=("text",), label="label", folds=2)
    task = module.make_task(table, {"bert": "bert"}, 0, {}, 3)
    plain = Recipe("bert")
    assert task.runs(plain) == 3
    assert task.runs(frozen("bert")) == 1
    assert task.runs(dataclasses.replace(plain, methods=("re_init:blocks=1",))) == 1
    assert task.runs(dataclasses.replace(plain, soup=5)) == 5


def test_a_search_that_was_stopped_goes_on_to_the_same_model(searched, monkeypatch):
    def stop(self, run, ended):
        if ended and len(list(Path("again/search/records").glob("*.json"))) == 5:
            raise KeyboardInterrupt

    asked = {"output": "again", "budget": "13runs", "arms": ["head=logistic"], "tests": {"new": "new.csv"}, **SETTINGS}
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "_heard", stop)
        with pytest.raises(KeyboardInterrupt):
            steadytune.search("rows.csv", **asked)
    again = steadytune.search("rows.csv", resume=True, **asked)
    assert same(weights(Path("again")), weights(Path("out")))
    changing = ("seconds", "arms")
    assert {k: v for k, v in again.record.items() if k not in changing} == {
        k: v for k, v in searched.record.items() if k not in changing
    }


def test_a_search_that_found_more_and_was_killed_before_its_last_fit_goes_on():
    """Naive: the record of the search before it says that the search is finished."""
    asked = {"output": "more", "arms": ["head=logistic"], **SETTINGS}
    steadytune.search("rows.csv", budget="5runs", **asked)
    with mock.patch.object(module, "fit", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        steadytune.search("rows.csv", budget="9runs", resume=True, **asked)
    found = steadytune.search("rows.csv", budget="9runs", resume=True, **asked)
    assert json.loads(Path("more/steadytune.json").read_text())["search"] == found.record
    with pytest.raises(UsageError, match="is finished"):
        steadytune.search("rows.csv", budget="9runs", resume=True, **asked)


def test_a_frame_is_searched_too(home, monkeypatch):
    """The race itself is that of files; here a race that was run before is enough."""
    monkeypatch.setattr(module.Race, "run", lambda self: pytest.skip("reached the race"))
    with pytest.raises(pytest.skip.Exception):
        steadytune.search(toy(30).drop(columns="score"), output="framed", **SETTINGS)
    assert Path("framed/search/rows.parquet").is_file()


def test_a_dry_run_lists_arms_and_writes_nothing(home):
    words = ["search", "rows.csv", "--model", "bert", "--output", "dry", "--steps", "4", "--folds", "2", "--dry-run"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert "stage method: llrd, rdrop" in done.stdout
    assert "40 rows, 2 folds" in done.stdout
    assert not Path("dry").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": "soon"}, "30m, 2h or 100runs, got 'soon'"),
        ({"arms": ["rdorp"]}, "Did you mean 'rdrop'"),
        ({"tests": {"new": "gone.csv"}}, "gone.csv: no such file"),
        ({"tests": {"new": pd.DataFrame({"text": ["good"], "label": ["sideways"]})}}, "sideways"),
        ({"tests": ["new.csv"]}, "tests must be a dictionary"),
        ({"arms": ["steps/1000"]}, "`steps/1000` leaves none of the 4 steps on 20 rows: take a factor of 0.25 or more"),
        ({"evaluations": 3}, "evaluations is no option of a search"),
        ({"aux": "other.csv"}, "aux is no option of a search: other tables are arms"),
        ({"tune_kernels": True}, "tune_kernels is no option of a search"),
        ({"init_seed": 3}, "init_seed is no option of a search"),
        ({"learning": 3}, "unknown option 'learning'"),
        ({"folds": 90}, "folds must lie between 2 and 40"),
        ({"folds": 0}, "folds must be 2 or more, got 0: leave it out"),
        ({"workers": -1}, "workers must be 0 (trainings in this process) or more, got -1"),
        ({"label": "stars"}, "no column 'stars'"),
        ({"metric": "f2"}, "unknown metric 'f2'"),
        ({"model": ["bert", "bert"]}, "--model a=PATH --model b=PATH"),
        ({"model": "gone"}, "gone"),
        ({"resume": True}, "--resume: no search in"),
        ({"budget": "2runs"}, "budget must be 3 or more trainings, got 2"),
        ({"budget": "4runs", "num_seeds": 3}, "budget must be 5 or more trainings, got 4: one for each of the 2 folds"),
        ({"num_seeds": 0}, "num_seeds must be 1 or more, got 0"),
        ({"seed": 1.5}, "seed must be a whole number"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(home, changes, message):
    place = "none-" + "-".join(changes)
    with pytest.raises(UsageError) as error:
        steadytune.search("rows.csv", **{"output": place, **SETTINGS, **changes})
    assert message in str(error.value)
    assert not list(Path(place).glob("search/records/*"))


def test_the_verb_shows_verdict_and_arms(searched, monkeypatch):
    monkeypatch.setattr("steadytune.searching.search", lambda *args, **named: searched)
    done = CliRunner().invoke(cli.app, ["search", "rows.csv", "--model", "bert", "--output", "out"])
    assert done.exit_code == 0, done.output
    assert searched.verdict in done.stdout
    assert "Model: out" in done.stdout
    assert np.isfinite(searched.record["claim"]["level"]["value"])


@pytest.mark.parametrize(
    ("metric", "goodness", "value"),
    [
        ("pearson", -0.2, -0.2),
        ("matthews", -1.0, -1.0),
        ("r2", -3.0, -3.0),
        ("rmse", -1.5, 1.5),
        ("accuracy", 0.8, 0.8),
    ],
)
def test_only_errors_have_their_sign_turned(metric, goodness, value):
    """Naive: abs() makes good scores of bad ones, and 1 of a correlation that is undefined."""
    assert shown(metric, goodness) == value


@pytest.mark.parametrize(
    ("metric", "goodness", "ends"),
    [
        ("pearson", (-0.4, 0.1), (-0.4, 0.1)),
        ("pearson", (-1.2, -0.8), (-1.0, -0.8)),
        ("r2", (-2.0, 1.3), (-2.0, 1.0)),
        ("rmse", (-1.7, -1.3), (1.3, 1.7)),
        ("rmse", (-1.0, 0.5), (0.0, 1.0)),
        ("brier", (-2.5, -1.0), (1.0, 2.0)),
    ],
)
def test_bounds_are_in_order_and_within_the_limits_of_the_metric(metric, goodness, ends):
    assert bounds(metric, *goodness) == ends


def test_a_bad_level_is_told_as_it_is(searched):
    claim = {**searched.record["claim"], "level": {"value": -0.2, "error": 0.1, "interval": [-0.5, 0.1]}}
    record = {**searched.record, "metric": "pearson", "claim": claim}
    assert "pearson on further rows like these: −0.200 (−0.500 to 0.100)" in verdict_words(record)
    (grid,) = _claim(record)
    assert ["expected pearson", "−0.200 (−0.500 to 0.100)"] in grid.groups[0][1]


@pytest.mark.parametrize(
    ("file", "label", "metric", "least"),
    [
        ("rows.csv", "label", "log_loss", 0.01),
        ("scores.csv", "score", "r2", 0.01),
        ("scores.csv", "score", "rmse", 0.02 * 73 * toy(40)["score"].std(ddof=0)),
    ],
)
def test_only_errors_in_the_unit_of_the_labels_are_believed_to_spread_with_them(file, label, metric, least):
    """Naive: a gain in r2 of labels around 100 is never shrunk, and log_loss asks for numbers of class names."""
    toy(40)[["text", "score"]].assign(score=lambda t: 73 * t["score"] + 0.5).to_csv("scores.csv", index=False)
    table = OwnTables("table", str(Path(file).absolute()), label=label, metric=metric, folds=2)
    task = module.make_task(table, {"bert": "bert"}, 0, {"steps": 2})
    assert module.rules_of(task).least == pytest.approx(least)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "f1_macro"}, "metric was 'accuracy', is 'f1_macro'"),
        ({"folds": 3}, "folds was 2, is 3"),
        ({"label": "shop"}, "label was 'label', is 'shop'"),
    ],
)
def test_a_search_does_not_go_on_with_another_question(searched, changes, message):
    """Naive: what was found for the first label is shipped for the second."""
    pd.read_csv("rows.csv").assign(shop=lambda t: ["ab"[i % 2] for i in range(len(t))]).to_csv("shop.csv", index=False)
    asked = {"budget": "13runs", "arms": ["head=logistic"], "label": "label", **SETTINGS, **changes}
    with pytest.raises(UsageError) as error:
        steadytune.search("shop.csv", output="out", text="text", resume=True, **asked)
    assert f"the search in out was started otherwise: {message}" in str(error.value)


def test_a_last_fit_of_another_recipe_is_begun_anew(searched):
    """Naive: the interrupted fit refuses the recipe that a larger budget has found, whenever it is resumed."""
    asked = {"output": "anew", "budget": "13runs", "arms": ["head=logistic"], **SETTINGS}
    shutil.copytree("out/search", "anew/search")
    found = json.loads(Path("out/search/found.json").read_text())
    other = {**found["ship"], "name": "lr*3", "arms": ["lr*3"], "options": {"lr": 3e-3}}
    Path("anew/search/found.json").write_text(json.dumps({**found, "ship": other}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("steadytune.fitting.main._finish", lambda *given: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            steadytune.search("rows.csv", resume=True, **asked)
    begun = json.loads(Path("anew/steadytune.json").read_text())
    assert begun["status"] == "training"
    again = steadytune.search("rows.csv", resume=True, **{**asked, "budget": "14runs"})
    assert again.best_recipe == searched.best_recipe
    assert same(weights(Path("anew")), weights(Path("out")))


def test_columns_of_several_types_and_mistakes_leave_nothing_behind(home, monkeypatch):
    """Naive: Parquet refuses a column that nobody reads, and a mistake leaves a folder that refuses its correction."""
    monkeypatch.setattr(module.Race, "run", lambda self: pytest.skip("reached the race"))
    frame = toy(30).drop(columns="score").assign(note=[1, "x"] * 15, mark=[1, "two"] * 15)
    for changes, message in (({"arms": ["nonsense"]}, "nonsense"), ({"label": "wrong"}, "no column 'wrong'")):
        with pytest.raises(UsageError, match=message):
            steadytune.search(frame, output="mixed", **{"label": "mark", "text": "text", **SETTINGS, **changes})
        assert not Path("mixed").exists()
    with pytest.raises(pytest.skip.Exception):
        steadytune.search(frame, output="mixed", label="mark", text="text", **SETTINGS)
    rows = pd.read_parquet("mixed/search/rows.parquet")
    assert rows.columns.tolist() == ["text", "mark"]
    assert rows["mark"].tolist() == ["1", "two"] * 15
    with pytest.raises(UsageError, match="no column 'wrong'"):
        steadytune.curve(frame, label="wrong", model="bert", output="curved", steps=2, folds=2)
    assert not Path("curved").exists()


def test_two_groups_cannot_be_searched(home):
    """Naive: a half that is one group has no error, and any gain is called shown."""
    rows = pd.read_csv("rows.csv").assign(person=lambda rows: rows.index // 2 % 3)
    given = {k: v for k, v in SETTINGS.items() if k != "progress"} | {"text": "text", "label": "label"}
    with pytest.raises(UsageError, match="needs 4 groups or more to know how sure it is: there are 3"):
        steadytune.searching.plan_search(rows, group="person", budget="13runs", **given)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"seed": -1}, "seed must be"), ({"seed": 5_000_000_000}, "seed must be"), ({"model": {}}, "model must name"),
     ({"model": []}, "model must name")],
)  # fmt: skip
def test_seeds_and_models_out_of_range_are_named_at_once(home, wrong, said):
    with pytest.raises(UsageError, match=said):
        steadytune.search("rows.csv", output="never", budget="13runs", **{**SETTINGS, **wrong})
    assert not Path("never").exists()


def test_a_search_with_class_weights_has_its_probe(home):
    """Naive: the probe takes no step, class weights act in steps, and the search fails after plain has trained."""
    found = steadytune.search(
        "rows.csv", output="weighted", budget="13runs", arms=[], class_weights="balanced", **SETTINGS
    )
    assert {arm["name"] for arm in found.record["arms"]} >= {"plain", "probe"}
