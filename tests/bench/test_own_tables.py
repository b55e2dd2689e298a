"""Studies on a user's own tables: files and columns, test files by name, cross-validation, files that change."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from bench_helpers import comparable, records
from fit_helpers import save_tiny_bert, toy
from steadytune import cli
from steadytune.bench.report.write import write_report
from steadytune.bench.run import make_plan
from steadytune.bench.spec import Study
from steadytune.bench.study import run_study
from steadytune.data.balance import balanced
from steadytune.errors import UsageError

STUDY = """\
name: mine
models: {{tiny: bert}}
tasks:
  reviews: {about}
seeds: 6
options: {{steps: 4, batch_size: 8, lr: 1e-3}}
recipes:
  plain: {{}}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A study folder with a model, 30 rows, two test files of 12, and 12 numbers."""
    monkeypatch.chdir(tmp_path)
    save_tiny_bert(tmp_path / "bert")
    (tmp_path / "tables").mkdir()
    for name, start, size in (("reviews", 0, 30), ("later", 100, 12), ("far", 200, 12)):
        frame = toy(size, start=start).rename(columns={"text": "review", "label": "stars"})
        frame.assign(shop=[i // 2 for i in range(size)]).to_csv(tmp_path / "tables" / f"{name}.csv", index=False)
    return tmp_path


def study(about: str, **changes) -> Study:
    Path("tables/study.yaml").write_text(STUDY.format(about=about))
    return Study.read("tables/study.yaml", **changes)


CROSSED = "{train: reviews.csv, text: review, label: stars, folds: 3}"
TESTED = "{train: reviews.csv, text: review, label: stars, test: {later: later.csv}, out_of_domain: {far: far.csv}}"


def test_every_row_is_predicted_once_a_round_by_a_run_that_did_not_train_on_it(folder):
    found = study(CROSSED)
    run_study(found, "out", workers=0, progress=False)
    frames = {
        record["spec"]["seeds"]["subset"]: pd.read_parquet(f"out/predictions/{id}.parquet")
        for id, record in records(Path("out")).items()
    }
    assert sorted(frames) == [0, 1, 2, 3, 4, 5]
    rows = pd.read_csv("tables/reviews.csv")
    rounds = [pd.concat([frames[seed] for seed in seeds]) for seeds in ((0, 1, 2), (3, 4, 5))]
    for predicted in rounds:
        assert sorted(predicted["row"]) == list(range(30))
        assert (predicted["label"].to_numpy() == rows["stars"].to_numpy()[predicted["row"]]).all()
    assert set(frames[0]["row"]) != set(frames[3]["row"]), "the second round cuts otherwise"
    for run in found.runs():
        data = make_plan(run).data
        assert not set(data.train.index) & set(data.tests["test"].index)
        assert len(data.train) + len(data.tests["test"]) == 30
    assert {r["sets"]["test"]["domain"] for r in records(Path("out")).values()} == {"in"}
    assert "reviews: each seed scores the rows of one held-out fold." in write_report("out").read_text()


def test_folds_are_the_same_for_every_recipe_and_keep_groups_together(folder):
    found = study("{train: reviews.csv, text: review, label: stars, group: shop, folds: 3}", seeds=3)
    shops = pd.read_csv("tables/reviews.csv")["shop"]
    for run in found.runs():
        data = make_plan(run).data
        assert not set(shops[data.train.index]) & set(shops[data.tests["test"].index])
    both = Study.of({**plain(found), "recipes": {"plain": {}, "mixout": {"methods": ["mixout"]}}})
    drawn = {(r.spec["recipe"], r.spec["seeds"]["data"]): list(make_plan(r).data.train.index) for r in both.runs()}
    assert all(drawn["plain", seed] == drawn["mixout", seed] for seed in range(3))


def plain(found: Study) -> dict:
    """Contents of a study file."""
    import yaml

    return yaml.safe_load(found.text())


def test_a_subset_and_the_rows_that_select_come_from_the_training_folds(folder):
    found = study(CROSSED, seeds=3, train_sizes=[10])
    found = Study.of({**plain(found), "recipes": {"best": {"evaluations": 1, "validation_share": 0.3}}})
    for run in found.runs():
        data = make_plan(run).data
        sides = [set(rows.index) for rows in (data.train, data.tests["validation"], data.tests["test"])]
        assert [len(side) for side in sides] == [7, 3, 10]
        assert len(set.union(*sides)) == 20


def test_test_files_have_names_and_domains(folder):
    found = study(TESTED, seeds=2)
    run_study(found, "out", workers=0, progress=False)
    for record in records(Path("out")).values():
        assert record["training"]["rows"] == 30
        assert {name: (s["domain"], s["rows"]) for name, s in record["sets"].items()} == {
            "later": ("in", 12),
            "far": ("out", 12),
        }
        assert record["sets"]["later"]["baseline"] == pytest.approx(8 / 12)
    page = write_report("out").read_text()
    assert "reviews" in page
    assert "far" in page
    assert "held-out fold" not in page


def test_columns_and_kind_are_found_as_in_fit_and_stand_in_the_record(folder):
    toy(20).drop(columns="score").to_csv("tables/plain.csv", index=False)
    (run, *_) = study("plain.csv").runs()
    task = run.spec["task"]
    assert (task["text"], task["label"], task["kind"], task["folds"]) == (["text"], "label", "classification", 10)
    assert run.spec["metric"] == "accuracy"
    toy(20).drop(columns="label").to_csv("tables/numbers.csv", index=False)
    (run, *_) = study("{train: numbers.csv, label: score}").runs()
    assert (run.spec["task"]["kind"], run.spec["metric"]) == ("regression", "pearson")
    assert run.spec["options"]["standardize"] is True


def test_several_labels_have_records_too(folder):
    labels = [["up", "new"] if i % 3 else ["down"] for i in range(24)]
    toy(24).assign(label=[json.dumps(row) for row in labels]).drop(columns="score").to_csv("tables/sets.csv")
    run_study(study("{train: sets.csv, text: text, label: label, folds: 2}", seeds=2), "out", workers=0, progress=False)
    scores = [record["sets"]["test"] for record in records(Path("out")).values()]
    assert [s["baseline"] for s in scores] == [None, None]
    assert all(0 <= s["f1_micro"] <= 1 for s in scores)


def test_every_form_of_several_labels_gives_the_same_scores(folder):
    """The form of the labels is part of a run's specification, so runs on other forms have other ids."""
    up, new = [int(i % 3 > 0) for i in range(24)], [int(i % 2) for i in range(24)]
    joined = ["; ".join(["new"] * b + ["up"] * a) for a, b in zip(up, new, strict=True)]
    toy(24).assign(about=joined, new=new, up=up).drop(columns=["score", "label"]).to_csv("tables/sets.csv")
    scores = []
    for name, form in (("a", "label: [new, up]"), ("b", "label: about, label_separator: ;")):
        about = f"{{train: sets.csv, text: text, {form}, folds: 2}}"
        run_study(study(about, seeds=2), name, workers=0, progress=False)
        assert {run.id for run in Study.read(f"{name}/study.yaml").runs()} == {*records(Path(name))}
        by_seed = {r["spec"]["seeds"]["data"]: r["sets"]["test"]["f1_micro"] for r in records(Path(name)).values()}
        scores.append(by_seed)
    assert scores[0] == scores[1]
    specs = [next(iter(records(Path(name)).values()))["spec"]["task"] for name in "ab"]
    assert [spec["label"] for spec in specs] == [["new", "up"], "about"]
    assert "label_separator" not in specs[0]
    assert specs[1]["label_separator"] == ";"


def test_records_and_report_have_the_scores_of_subgroups(folder):
    """Naive: a study of group weights that shows the mean over all rows alone."""
    about = "{train: reviews.csv, text: review, label: stars, test: {later: later.csv}, subgroup: [stars]}"
    found = dataclasses.replace(study(about), seeds=(0, 1))
    run_study(found, "out", workers=0, progress=False)
    for id, record in records(Path("out")).items():
        scores = record["sets"]["later"]
        rows = pd.read_parquet(f"out/predictions/{id}.parquet")
        right = (rows["label"] == rows["prediction"]).groupby(rows["label"]).mean()
        assert {name: own["accuracy"] for name, own in scores["subgroups"].items()} == right.to_dict()
        assert sum(own["rows"] for own in scores["subgroups"].values()) == scores["rows"] == 12
    page = write_report("out").with_suffix(".md").read_text()
    _, _, part = page.partition("## Subgroups")
    lines = [line for line in part.partition("\n## ")[0].splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines[-3:]] == ["worst of each run", "down", "up"]
    worst = np.mean([min(own["accuracy"] for own in record["sets"]["later"]["subgroups"].values())
                     for record in records(Path("out")).values()])  # fmt: skip
    assert f"{100 * worst:.1f}" in lines[-3]


def test_benchmark_tasks_and_own_tables_stand_in_one_study(folder):
    Path("tables/study.yaml").write_text(
        "models: {tiny: bert}\ntasks: {sst2: null, reviews: reviews.csv}\nseeds: 1\nrecipes: {plain: {}}\n"
    )
    found = Study.read("tables/study.yaml")
    assert found.tasks == ("sst2", "reviews")
    with pytest.raises(UsageError, match="--data-root DIR"):
        found.runs()


def test_the_study_in_the_folder_of_its_records_reads_the_same_files(folder):
    found = study(TESTED, seeds=1)
    run_study(found, "deep/er/out", workers=0, progress=False)
    again = Study.read("deep/er/out/study.yaml")
    assert [run.id for run in again.runs()] == [run.id for run in found.runs()]
    assert str(folder) not in Path("deep/er/out/study.yaml").read_text()


def test_tables_and_texts_of_recipes_lie_beside_the_study_file_and_words_are_no_files(folder):
    recipes = {
        "aux": {"aux": ["other.csv"], "aux_steps": 2},
        "texts": {"unlabelled": ["far.csv", "rest"], "procedure": "self-training"},
    }
    toy(12, start=300).to_csv("tables/other.csv", index=False)
    found = study(TESTED, seeds=1, train_sizes=[16], recipes=recipes)
    first, second = found.runs()
    tables = folder / "tables"
    assert (first.aux, second.unlabelled) == ((str(tables / "other.csv"),), (str(tables / "far.csv"), "rest"))
    run_study(found, "deep/out", workers=0, progress=False, filters=["recipe=aux"])
    assert [run.id for run in Study.read("deep/out/study.yaml").runs()] == [first.id, second.id]
    assert str(folder) not in Path("deep/out/study.yaml").read_text()
    (record,) = (json.loads(file.read_text()) for file in Path("deep/out/records").glob("*.json"))
    assert record["cost"]["passes"] == pytest.approx(1.5, abs=0.05)  # naive: 1, as the two steps before cost nothing


def test_a_run_is_named_by_the_contents_and_columns_of_its_tables_and_not_by_their_place(folder):
    (before,) = (run.id for run in study(TESTED, seeds=1).runs())
    Path("tables").rename("elsewhere")
    (moved,) = (run.id for run in Study.read("elsewhere/study.yaml", seeds=1).runs())
    assert moved == before
    Path("elsewhere").rename("tables")
    for change in (TESTED.replace("}}", "}, group: shop}"), TESTED.replace("later: later", "soon: later")):
        assert study(change, seeds=1).runs()[0].id != before


@pytest.mark.parametrize(
    ("file", "about"),
    [("later.csv", TESTED), ("reviews.csv", CROSSED)],
    ids=["test", "train"],
)
def test_a_file_that_changed_after_records_were_made_is_named(folder, file, about):
    run_study(study(about, seeds=1), "out", workers=0, progress=False)
    before = comparable(Path("out"))
    with Path("tables", file).open("a") as stream:
        stream.write("good plot film,up,1.5,99\n")
    with pytest.raises(UsageError, match=rf"task reviews: .*{file} has changed since runs in out were recorded"):
        run_study(study(about, seeds=2), "out", workers=0, progress=False)
    assert comparable(Path("out")) == before


def test_other_columns_or_folds_under_the_same_name_are_refused(folder):
    run_study(study(CROSSED, seeds=1), "out", workers=0, progress=False)
    with pytest.raises(UsageError, match="task reviews: its folds was 3 and is 2 now since runs in out were recorded"):
        run_study(study(CROSSED.replace("3", "2"), seeds=1), "out", workers=0, progress=False)


def test_a_file_that_changes_while_the_study_runs_fails_the_run(folder):
    (run,) = study(TESTED, seeds=1).runs()
    with Path("tables/far.csv").open("a") as stream:
        stream.write("good plot film,up,1.5,99\n")
    with pytest.raises(UsageError, match=r"far\.csv was changed after the study had begun"):
        make_plan(run)


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("{text: review}", "study.yaml, line 4: tasks.reviews.train is missing."),
        ("{train: reviews.csv, lable: stars}", "line 4: tasks.reviews: unknown key 'lable'. Did you mean 'label'"),
        ("{train: 7}", "line 4: tasks.reviews.train must be text, got 7: put it in quotes."),
        (
            "{train: reviews.csv, label: 7}",
            "tasks.reviews.label must be the name of a column, or a list of names, got 7",
        ),
        (
            "{train: reviews.csv, text: review, label: [stars, shop]}",
            "label column 'stars' is neither 0 nor 1 ('down')",
        ),
        ("{train: reviews.csv, folds: 1}", "tasks.reviews.folds must be a whole number from 2 on, got 1."),
        ("{train: reviews.csv, kind: classes}", "tasks.reviews.kind must be one of auto, classification, multilabel, "),
        ("{train: reviews.csv, test: {a: 3}}", "tasks.reviews.test.a must be text, got 3"),
        ("{train: gone.csv}", "gone.csv: no such file"),
        ("{train: reviews.csv, text: review, label: star}", "no column 'star'. Did you mean 'stars'"),
        ("{train: reviews.csv, text: review, label: stars, folds: 90}", "folds must lie between 2 and 30"),
        ("{train: reviews.csv, text: review, label: stars, test: {train: later.csv}}", "cannot be called 'train'"),
        ("{train: reviews.csv, text: review, label: stars, metric: f2}", "unknown metric 'f2' for classification"),
        ("{train: $NOWHERE/a.csv}", "the environment variable NOWHERE"),
        ("{train: reviews.csv, test: [later.csv, sub/later.csv]}", "two test files of task reviews are called 'later'"),
        (
            "{train: a.csv, test: {x: b.csv}, out_of_domain: {x: c.csv}}",
            "task reviews are called 'x'",
        ),
        ("{train: a.csv, out_of_domain: {test: c.csv}}", "'test' is the name of the held-out fold"),
    ],
)
def test_mistakes_in_own_tables_are_named_before_anything_runs(folder, about, message):
    with pytest.raises(UsageError) as error:
        run_study(study(about), "out", workers=0, progress=False)
    assert message in str(error.value)
    assert not Path("out").exists()


@pytest.mark.parametrize(("about", "size", "most"), [(CROSSED, 21, 20), (TESTED, 31, 30)])
def test_a_number_of_training_rows_that_no_run_can_draw_is_named_before_anything_runs(folder, about, size, most):
    """Naive: the runs fail one by one, as three folds of 30 rows leave 20 rows to train on."""
    with pytest.raises(UsageError, match=rf"train_sizes do not fit task reviews.*and {most} \(all\), got {size}"):
        study(about, train_sizes=[most, size]).runs()


def test_weights_that_balance_are_of_the_rows_with_wrong_labels(folder):
    """Naive: they are made before labels are replaced, and know the right ones."""
    options = {"steps": 4, "batch_size": 8, "balance": ["length"]}
    (run, *_) = study(TESTED, options=options, label_noise=0.4, seeds=1).runs()
    rows = make_plan(run).data.train
    right = {"label_noise": 0.0, "imbalance": None}
    clean = make_plan(dataclasses.replace(run, spec={**run.spec, "corruption": right}))
    assert (rows["label"] != clean.data.train["label"]).sum() == 12
    expected = balanced(rows, clean.data.problem, ["length"])
    assert np.allclose(rows["weight"], expected)
    assert not np.allclose(rows["weight"], clean.data.train["weight"])


def test_texts_apart_are_learnt_from_neither_as_texts_nor_with_labels(folder):
    """Naive: only the held-out rows stay out, so that a recipe that has read the test rows looks better."""
    apart, more = toy(5, start=100), toy(20, start=100)
    apart.rename(columns={"text": "review", "label": "stars"}).to_csv("tables/apart.csv", index=False)
    more[["text"]].rename(columns={"text": "review"}).to_csv("tables/texts.csv", index=False)
    more.to_csv("tables/more.csv", index=False)
    recipes = {
        "texts": {"unlabelled": "texts.csv", "pretrain": "tapt"},
        "table": {"aux": "more.csv", "aux_steps": 2},
    }
    about = "{train: reviews.csv, text: review, label: stars, folds: 3, apart: apart.csv}"
    texts, table = (make_plan(run) for run in study(about, recipes=recipes, seeds=1).runs())
    assert texts.data.unlabelled.left_out["tests"] == 5
    assert len(texts.data.unlabelled.rows) == 15
    assert table.stages[0].left_out == 5


def test_rows_without_a_label_are_texts_for_one_recipe_and_left_out_by_the_others(folder):
    """Naive: one empty label stops every run of the study."""
    frame = pd.read_csv("tables/reviews.csv")
    frame.loc[[3, 11, 17], "stars"] = None
    frame.to_csv("tables/reviews.csv", index=False)
    recipes = {"plain": {}, "texts": {"unlabelled": "blank", "pretrain": "tapt"}}
    made = study(CROSSED, recipes=recipes, seeds=3).runs()
    plain, texts = ([make_plan(run).data for run in made if run.spec["recipe"] == name] for name in recipes)
    held_out = np.concatenate([data.tests["test"].index for data in plain])
    assert sorted(held_out) == [row for row in range(30) if row not in (3, 11, 17)], "each labelled row once"
    for one, other in zip(plain, texts, strict=True):
        assert one.train.equals(other.train)
        assert one.unlabelled is None
        assert other.unlabelled.rows["text"].tolist() == frame.loc[[3, 11, 17], "review"].tolist()


def test_label_noise_needs_classes(folder):
    toy(20).drop(columns="label").to_csv("tables/numbers.csv", index=False)
    with pytest.raises(UsageError, match="label_noise and imbalance need classes, task reviews has none"):
        study("{train: numbers.csv, label: score}", label_noise=0.1).runs()


def test_a_benchmark_name_is_taken(folder):
    Path("tables/study.yaml").write_text(
        "models: {tiny: bert}\ntasks:\n  sst2: reviews.csv\nseeds: 1\nrecipes: {plain: {}}\n"
    )
    with pytest.raises(UsageError, match=r"line 3: sst2 is a benchmark task: give your own table another name"):
        Study.read("tables/study.yaml")


def test_the_verb_takes_own_tables_without_a_data_root(folder):
    study(CROSSED)
    done = CliRunner().invoke(
        cli.app, ["bench", "tables/study.yaml", "--workers", "0", "--seeds", "1"], env={"COLUMNS": "200"}
    )
    assert (done.exit_code, done.stdout) == (0, "1 runs done, 0 failed: runs/mine\n"), done.output
    (record,) = records(Path("runs/mine")).values()
    assert record["sets"]["test"]["rows"] == 10
    assert np.isfinite(record["sets"]["test"]["accuracy"])


def test_a_run_is_the_same_whichever_other_recipes_run_and_is_shared_between_studies(folder):
    """Naive: a recipe that draws from a generator of the process would change the runs after it."""
    both = {"mixout": {"methods": ["mixout"]}, "plain": {}}
    first = study(CROSSED, seeds=3)
    run_study(Study.of({**plain(first), "recipes": both}), "both", workers=0, progress=False)
    run_study(first, "alone", workers=0, progress=False)
    alone = comparable(Path("alone"))
    assert alone == {id: record for id, record in comparable(Path("both")).items() if id in alone}
    for id in alone:
        files = [Path(name, "predictions", f"{id}.parquet").read_bytes() for name in ("alone", "both")]
        assert files[0] == files[1]
    run_study(Study.of({**plain(first), "recipes": both}), "alone", workers=0, progress=False)
    assert comparable(Path("alone")) == comparable(Path("both"))


@pytest.mark.parametrize(
    ("rows", "folds"), [(199, 10), (200, 5), (8, 8)], ids=["few rows", "many rows", "fewer rows than folds"]
)
def test_the_number_of_folds_follows_from_the_rows(folder, rows, folds):
    frame = toy(rows).assign(text=lambda table: table["text"] + [f" {i}" for i in range(rows)])
    frame.to_csv("tables/own.csv", index=False)
    (run, *_) = study("{train: own.csv, text: text, label: label}", seeds=1).runs()
    assert run.spec["task"]["folds"] == folds


def test_groups_bound_the_number_of_folds(folder):
    toy(60).assign(shop=[i % 4 for i in range(60)]).to_csv("tables/own.csv", index=False)
    (run, *_) = study("{train: own.csv, text: text, label: label, group: shop}", seeds=1).runs()
    assert run.spec["task"]["folds"] == 4
