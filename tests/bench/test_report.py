"""The report of a bench: its numbers, what it says of runs that failed or cannot be read, and the page itself."""

import html
import json
import re
import statistics
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from bench_records import record, synthetic, write_bench
from steadytune import cli
from steadytune.bench.records import read_records
from steadytune.bench.report import figures, tables
from steadytune.bench.report.verdict import verdict
from steadytune.bench.report.write import _limits, write_report
from steadytune.bench.stats import detectable_gain
from steadytune.errors import UsageError
from steadytune.pages.drawing import looks

PLAIN, RIVAL = [0.80, 0.82, 0.78, 0.84], [0.83, 0.84, 0.82, 0.85]
FILES = ("report.html", "report.md", "runs.csv", "summary.csv")


class Page(HTMLParser):
    """The tags of a page, and its tables as rows of cell texts by caption."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.open, self.caption, self.words = [], {}, [], "", []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag != "meta":
            self.open.append(tag)
        if tag == "tr":
            self.tables[self.caption].append([])
        if tag in ("td", "th", "p"):
            self.words = []

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another"
        text = " ".join(self.words)
        if tag in ("td", "th"):
            self.tables[self.caption][-1].append(text)
        if tag == "p" and next(t for t in reversed(self.tags) if t[0] == "p") == ("p", {"class": "caption"}):
            self.caption = text
            self.tables.setdefault(text, [])

    def handle_data(self, data):
        if data.strip():
            self.words.append(data.strip())

    def row(self, caption, *starts):
        """The row of a table that begins with these cells."""
        table = next(rows for name, rows in self.tables.items() if name.startswith(caption))
        return next(row for row in table if tuple(row[: len(starts)]) == starts)

    def cell(self, caption, row, column):
        table = next(rows for name, rows in self.tables.items() if name.startswith(caption))
        return self.row(caption, row)[table[0].index(column)]


def page(folder, **options):
    return Page(write_report(folder, **options).read_text())


def two_recipes(tmp_path, **changes):
    runs = [record("plain", seed, score) for seed, score in enumerate(PLAIN)]
    runs += [record("dps_dense", seed, score, **changes) for seed, score in enumerate(RIVAL)]
    return write_bench(tmp_path / "bench", runs)


def test_scores_are_means_and_deviations_with_n(tmp_path):
    found = page(two_recipes(tmp_path))
    for recipe, scores in (("plain", PLAIN), ("dps_dense", RIVAL)):
        mean, sd = 100 * statistics.mean(scores), 100 * statistics.stdev(scores)
        assert found.cell("In domain: mean", recipe, "sst2") == f"{mean:.1f} ± {sd:.1f} n = 4"
        row = found.row("In domain, in detail", recipe)
        ordered = [100 * score for score in sorted(scores)]
        half = 3.182446305284263 * sd / 2
        assert dict(zip(found.tables["In domain, in detail"][0], row, strict=True)) == {
            "recipe": recipe, "n": "4", "mean": f"{mean:.1f}", "SD": f"{sd:.1f}", "IQM": f"{sum(ordered[1:3]) / 2:.1f}",
            "median": f"{statistics.median(ordered):.1f}", "min": f"{ordered[0]:.1f}", "max": f"{ordered[-1]:.1f}",
            "interval": f"[{mean - half:.1f}, {mean + half:.1f}]",
            "failed": "0", "missing": "0", "undefined": "0", "collapsed": "0",
        }  # fmt: skip


def test_gains_are_paired_by_seed(tmp_path):
    """Differences 3, 2, 4, 1 points: mean 2.5, SD sqrt(5/3), t(3) = 3.1824; of 16 sign flips 2 are as extreme."""
    row = page(two_recipes(tmp_path)).row("In domain: gains over plain, paired", "dps_dense")
    half = 3.182446305284263 * (5 / 3) ** 0.5 / 2
    assert row[1:3] == ["4", "+2.50"]
    assert row[3] == f"[+{2.5 - half:.2f}, +{2.5 + half:.2f}]"
    assert row[4:7] == ["0.125", "0.125", "1.00"]


def test_records_in_another_order_of_seeds_pair_the_same(tmp_path):
    """Pairing by place instead of by seed would give the same mean and another interval."""
    runs = [record("plain", seed, score) for seed, score in enumerate(PLAIN)]
    runs += [record("dps_dense", seed, score) for seed, score in enumerate(RIVAL)]
    scores = tables.per_run(tables.long_form(runs))
    mixed = tables.per_run(tables.long_form([runs[i] for i in (3, 1, 0, 2, 5, 4, 7, 6)]))
    one, other = (tables.comparisons(frame, ["plain", "dps_dense"], "plain")[0].iloc[0] for frame in (scores, mixed))
    assert one["low"] == pytest.approx(other["low"], abs=1e-15)
    assert one["p"] == other["p"] == 0.125


def test_only_seeds_that_both_have_are_compared(tmp_path):
    runs = [record("plain", seed, score) for seed, score in enumerate(PLAIN)]
    runs += [record("dps_dense", 0, 0.83), record("dps_dense", 1, 0.84), record("dps_dense", 9, 0.2)]
    row = page(write_bench(tmp_path / "b", runs)).row("In domain: gains over plain, paired", "dps_dense")
    assert row[1:3] == ["2", "+2.50"]


def test_holm_adjusts_over_the_table(tmp_path):
    """p of 5 pairs is 1/16 at least: three recipes that always win have 3/16 after Holm."""
    runs = [record("plain", seed, 0.7 + 0.01 * seed) for seed in range(5)]
    runs += [record(name, seed, 0.8 + 0.012 * seed) for name in ("a", "b", "c") for seed in range(5)]
    found = page(write_bench(tmp_path / "b", runs))
    for name in "abc":
        assert found.row("In domain: gains over plain, paired", name)[4:6] == ["0.062", "0.188"]
    assert any("the 3 comparisons of this table" in note for note in paragraphs(tmp_path / "b"))


def paragraphs(folder):
    return re.findall(r"<p(?: [^>]*)?>(.*?)</p>", (folder / "report.html").read_text(), re.S)


def test_errors_are_better_when_small(tmp_path):
    runs = [record("plain", seed, 1.2 + 0.1 * seed, metric="rmse", baseline=2.0) for seed in range(4)]
    runs += [
        record("dps_dense", seed, 1.0 + 0.1 * seed + 0.01 * (seed % 2), metric="rmse", baseline=2.0)
        for seed in range(4)
    ]
    found = page(write_bench(tmp_path / "b", runs))
    assert found.cell("In domain: mean", "dps_dense", "sst2").startswith("1.155 ± ")  # not × 100
    assert found.row("In domain: gains over plain, paired", "dps_dense")[2] == "+0.1950"
    assert found.row("In domain, in detail", "dps_dense")[-1] == "0"  # collapsed: below the baseline is good


def marked(tmp_path, name, gains, *, smaller=False, recipes=("rival",)):
    """A page of a recipe with these gains over plain, and of others that win and lose by turns."""
    metric = {"metric": "rmse", "baseline": 2.0} if smaller else {}
    runs = [record("plain", seed, 0.7 + 0.01 * seed, **metric) for seed in range(len(gains))]
    for recipe in recipes:
        own = gains if recipe == "rival" else [0.03 * (-1) ** seed for seed in range(len(gains))]
        runs += [record(recipe, i, 0.7 + 0.01 * i + (-g if smaller else g), **metric) for i, g in enumerate(own)]
    return page(write_bench(tmp_path / name, runs))


SIX, FIVE = [0.02, 0.03, 0.025, 0.02, 0.03, 0.04], [0.02, 0.03, 0.025, 0.02, 0.03]


@pytest.mark.parametrize("smaller", [False, True])
def test_marks_are_of_the_test_and_five_pairs_show_nothing(tmp_path, smaller):
    """The least p of n pairs is 2^(1 - n): 0.03 of six, 0.06 of five, whose t interval is far above zero."""
    cases = {"six": (SIX, "▲"), "down": ([-g for g in SIX], "▼"), "five": (FIVE, "")}
    for name, (gains, mark) in cases.items():
        cell = marked(tmp_path, name, gains, smaller=smaller).cell("In domain: mean", "rival", "sst2")
        assert "".join(c for c in cell if c in "▲▼△▽") == mark
    low = marked(tmp_path, "again", FIVE, smaller=smaller).row("In domain: gains over plain, paired", "rival")[3]
    assert low.startswith("[+")


def test_a_mark_that_does_not_survive_the_adjustment_is_hollow(tmp_path):
    """p of 0.03 is 0.06 as the smaller of two."""
    both = ("rival", "other")
    assert "△" in marked(tmp_path, "up", SIX, recipes=both).cell("In domain: mean", "rival", "sst2")
    assert "▽" in marked(tmp_path, "down", [-g for g in SIX], recipes=both).cell("In domain: mean", "rival", "sst2")


def test_best_is_bold_only_where_it_clearly_beats_the_second(tmp_path):
    marked(tmp_path, "clear", SIX)
    scores = [70 + i + 100 * gain for i, gain in enumerate(SIX)]
    bold = f"<strong>{statistics.mean(scores):.1f} ± {statistics.stdev(scores):.1f} ▲</strong>"
    assert bold in (tmp_path / "clear" / "report.html").read_text()
    for name, gains in (("few", FIVE), ("unclear", [0.10, -0.02, 0.08, -0.06, 0.02, 0.03])):
        marked(tmp_path, name, gains)
        assert "<strong>" not in (tmp_path / name / "report.html").read_text()


def test_failed_runs_are_shown_and_are_no_scores(tmp_path):
    trace = "Traceback (most recent call last):\n  File x\nRuntimeError: out of memory\n"
    runs = [record("plain", seed, score) for seed, score in enumerate(PLAIN)]
    runs += [record("rdrop", seed, 0.9) for seed in (0, 1)]
    runs += [record("rdrop", seed, None, error=trace) for seed in (2, 3)]
    runs += [record("mixout", seed, None, error=trace) for seed in range(4)]
    folder = write_bench(tmp_path / "b", runs)
    found = page(folder)
    assert found.cell("In domain: mean", "rdrop", "sst2") == "90.0 ± 0.0 n = 2 2 of 4 failed"
    assert found.cell("In domain: mean", "mixout", "sst2") == "– 4 of 4 failed"
    failed = next(rows for name, rows in found.tables.items() if name == "Failed runs")[1:]
    assert len(failed) == 6
    assert {row[-1] for row in failed} == {"RuntimeError: out of memory"}
    summary = pd.read_csv(folder / "summary.csv").set_index("recipe")
    assert summary["failed"].to_dict() == {"plain": 0, "rdrop": 2, "mixout": 4}
    assert summary["n"].to_dict() == {"plain": 4, "rdrop": 2, "mixout": 0}


def test_missing_undefined_and_collapsed_are_told_apart(tmp_path):
    runs = [record("plain", seed, score) for seed, score in enumerate(PLAIN)]
    runs += [record("rdrop", 0, None), record("rdrop", 1, 0.505), record("rdrop", 2, 0.9)]
    found = page(write_bench(tmp_path / "b", runs))
    row = found.row("In domain, in detail", "rdrop")
    assert row[1:3] == ["2", f"{100 * (0.505 + 0.9) / 2:.1f}"]
    assert row[-4:] == ["0", "1 of 4", "1 of 4", "1 of 4"]  # failed, missing, undefined, collapsed
    assert "1 of 4 missing 1 of 4 undefined 1 of 4 collapsed" in found.cell("In domain: mean", "rdrop", "sst2")


def test_a_recipe_that_lacks_a_task_is_missing_there_and_has_no_mean(tmp_path):
    runs = [
        record(name, seed, 0.8, task=task) for name in ("plain", "rdrop") for task in ("sst2", "rte") for seed in (0, 1)
    ]
    kept = [run for run in runs if (run["spec"]["recipe"], run["spec"]["task"]["name"]) != ("rdrop", "rte")]
    found = page(write_bench(tmp_path / "b", kept))
    assert found.cell("In domain: mean", "rdrop", "rte") == "– 2 of 2 missing"
    assert found.cell("In domain: mean", "rdrop", "mean over tasks") == "– incomplete"
    assert found.cell("In domain: mean", "plain", "mean over tasks") == "80.0 n = 4"


def test_every_score_has_its_n(tmp_path):
    found = page(write_bench(tmp_path / "b", synthetic(seeds=3)))
    checked = 0
    for caption, rows in found.tables.items():
        if ": mean ±" in caption:
            for cell in (cell for row in rows[1:] if len(row) > 1 for cell in row[1:]):
                assert re.search(r"\bn = \d", cell) or cell.startswith("–"), cell
                checked += 1
        elif caption not in ("Failed runs", "Recipes", "Versions and hardware"):
            assert {"n", "pairs"} & set(rows[0]), caption
    assert checked >= 100


def test_out_of_domain_is_the_mean_over_sets_and_every_set_alone(tmp_path):
    runs = [record("plain", seed, 0.9, out={"imdb/test": 0.8 + 0.1 * seed, "yelp/test": 0.6}) for seed in (0, 1)]
    runs += [record("rdrop", seed, 0.9, out={"imdb/test": 0.8, "yelp/test": None if seed else 0.6}) for seed in (0, 1)]
    found = page(write_bench(tmp_path / "b", runs))
    assert found.cell("Out of domain: mean", "plain", "sst2") == "72.5 ± 3.5 n = 2"
    assert found.cell("Out of domain: mean", "rdrop", "sst2") == "70.0 n = 1 1 of 2 undefined"  # not a mean of one set
    assert found.cell("Every out-of-domain set", "imdb/test", "plain") == "85.0 ± 7.1 n = 2"
    assert found.cell("Every out-of-domain set", "yelp/test", "rdrop") == "60.0 n = 1"


def test_steadiness_is_the_ratio_of_deviations(tmp_path):
    row = page(two_recipes(tmp_path)).row("In domain: standard deviation", "dps_dense")
    assert row[1:3] == ["4", f"{statistics.stdev(RIVAL) / statistics.stdev(PLAIN):.2f}"]


def test_crossed_seeds_tell_where_the_spread_comes_from(tmp_path):
    """Init moves the score by 2 points from one value to the other, data by 4: SDs of 1.41 and 2.83, and no rest."""
    seeds = {"dropout": 0, "method": 0, "subset": 0}
    crossed = [
        record(seed=2 * i + j, score=0.7 + 0.02 * i + 0.04 * j, seeds={"init": i, "data": j, **seeds})
        for i in range(2)
        for j in range(2)
    ]
    caption = "In domain: where the spread comes from"
    page = Page(write_report(write_bench(tmp_path / "crossed", crossed)).read_text())
    assert page.tables[caption][0] == ["recipe", "runs", "SD of init", "SD of data", "SD of the rest"]
    assert page.tables[caption][-1] == ["plain", "4", "1.4", "2.8", "0.0"]
    said = Path(tmp_path / "crossed" / "report.html").read_text()
    assert "sst2: runs share some of their seeds (factorial)" in said
    for name, records in {"hole": crossed[:3], "joint": [record(seed=s, score=0.7 + s / 50) for s in range(4)]}.items():
        assert caption not in Page(write_report(write_bench(tmp_path / name, records)).read_text()).tables


def test_tasks_weigh_the_same_whatever_their_number_of_seeds(tmp_path):
    runs = [record("plain", seed, 0.7, task=task) for task, n in (("sst2", 6), ("rte", 2)) for seed in range(n)]
    runs += [record("rdrop", seed, 0.71 + 0.001 * seed, task="sst2") for seed in range(6)]
    runs += [record("rdrop", seed, 0.75 + 0.001 * seed, task="rte") for seed in range(2)]
    row = page(write_bench(tmp_path / "b", runs)).row("In domain: gains over plain, mean over tasks", "rdrop")
    assert row[1:4] == ["2", "8", f"+{100 * (0.0125 + 0.0505) / 2:.2f}"]


def test_cost_is_a_median_ratio_and_compute_is_matched_with_longer_plain(tmp_path):
    runs = [record("plain", seed, 0.8 + 0.01 * seed, seconds=50 + seed) for seed in range(3)]
    runs += [record("plain_long", seed, 0.83 + 0.012 * seed, steps=400, methods=[]) for seed in range(3)]
    runs += [record("rdrop", seed, 0.82 + 0.01 * seed, passes=2.0, seconds=2.2 * (50 + seed)) for seed in range(3)]
    found = page(write_bench(tmp_path / "b", runs))
    row = found.row("Cost of a training", "rdrop")
    assert row[1:6] == ["3", f"{2.2 * 51:.1f}", "2.20 (3)", "2.00", "160"]
    row = found.row("Matched compute", "rdrop")
    assert row[1:6] == ["320", "plain_long", "400", "3", "−1.20"]


def test_compute_is_matched_whatever_happened_to_another_plain_recipe(tmp_path):
    runs = [record("plain", seed, 0.8 + 0.01 * seed) for seed in range(3)]
    runs += [record("plain_long", seed, 0.83 + 0.012 * seed, steps=400, methods=[]) for seed in range(3)]
    runs += [record("plain_short", seed, 0.7, steps=40, methods=[], error="x" if seed else None) for seed in range(3)]
    runs += [record("plain_longer", seed, 0.7, steps=900, methods=[], error="x" if seed else None) for seed in range(3)]
    runs += [record("rdrop", seed, 0.82 + 0.01 * seed, passes=2.0) for seed in range(3)]
    found = page(write_bench(tmp_path / "b", runs))
    assert found.row("Matched compute", "rdrop")[1:6] == ["320", "plain_long", "400", "3", "−1.20"]


def test_unmatched_compute_is_said(tmp_path):
    folder = two_recipes(tmp_path, passes=2.0)
    page(folder)
    assert any("dps_dense took more passes than plain" in text for text in paragraphs(folder))


def test_plain_recipes_that_train_longer_are_no_equal_compute(tmp_path):
    """Naive: only recipes with methods are looked at, and the page says that gains are at equal compute."""
    runs = [record("plain", seed, 0.8 + 0.01 * seed) for seed in range(3)]
    short = write_bench(tmp_path / "short", runs + [record("plain_short", s, 0.7, steps=40) for s in range(3)])
    page(short)
    assert any("so gains are at equal compute" in text for text in paragraphs(short))
    runs += [record("plain_long", seed, 0.83, steps=400) for seed in range(3)]
    folder = write_bench(tmp_path / "b", runs)
    page(folder)
    (said,) = (text.strip() for text in paragraphs(folder) if text.strip().startswith("Compute"))
    assert said.startswith("Compute is not matched: plain_long takes more passes than plain")


def test_metric_can_be_chosen(tmp_path):
    runs = [record("plain", seed, 0.8) for seed in (0, 1)]
    for run in runs:
        run["sets"]["sst2/validation"]["f1"] = 0.6
    folder = write_bench(tmp_path / "b", runs)
    assert page(folder, metric="f1").cell("In domain: mean", "plain", "sst2") == "60.0 ± 0.0 n = 2"
    with pytest.raises(UsageError, match=r"--metric acuracy: no record has it. Did you mean 'accuracy'\?"):
        write_report(folder, metric="acuracy")


def test_a_run_has_collapsed_whatever_metric_is_shown(tmp_path):
    runs = [record("plain", 0, 0.8), record("rdrop", 0, 0.5)]
    for run in runs:
        run["sets"]["sst2/validation"]["log_loss"] = 0.6
    found = page(write_bench(tmp_path / "b", runs), metric="log_loss")
    assert [found.row("In domain, in detail", recipe)[-1] for recipe in ("plain", "rdrop")] == ["0", "1 of 1"]


def test_another_configuration_is_not_averaged_in(tmp_path):
    old = [record("plain", seed, 0.5, options={"lr": 1e-3}) for seed in range(3)]
    new = [record("plain", seed, 0.8, options={"lr": 1e-4}) for seed in range(2)]
    for run in new:
        run["finished"] = "2026-11-23T07:30:00+00:00"
    folder = write_bench(tmp_path / "b", old + new)
    found = page(folder)
    assert found.cell("In domain: mean", "plain", "sst2") == "80.0 ± 0.0 n = 2"
    left = next(rows for name, rows in found.tables.items() if name.startswith("Left out"))[1:]
    assert {row[1] for row in left} == {"options.lr 0.001 instead of 0.0001"}
    assert pd.read_csv(folder / "runs.csv")["used"].value_counts().to_dict() == {False: 3, True: 2}


def test_an_edit_that_was_undone_leaves_its_runs_out(tmp_path):
    """Naive: the runs that finished last count, although the study no longer plans them."""
    first = [record("plain", seed, 0.8, options={"lr": 1e-3}) for seed in range(3)]
    tried = [record("plain", seed, 0.5, options={"lr": 1e-4}) for seed in range(3)]
    for run in tried:
        run["finished"] = "2026-11-23T07:30:00+00:00"
    folder = write_bench(tmp_path / "b", first + tried)
    (folder / "planned.json").write_text(json.dumps({run["id"]: "title" for run in first}))
    assert page(folder).cell("In domain: mean", "plain", "sst2") == "80.0 ± 0.0 n = 3"
    used = pd.read_csv(folder / "runs.csv").set_index("id")["used"]
    assert {id for id, counts in used.items() if counts} == {run["id"] for run in first}


def test_thinned_classes_are_one_setting_however_steps_are_counted(tmp_path):
    """Naive: a mark that keeps ids apart makes a setting of its own, and recipes with equal seeds are not compared."""
    marked = {"label_noise": 0.0, "imbalance": 0.3, "steps": "of the rows that are left"}
    runs = [record("plain", seed, 0.7 + 0.01 * seed, corruption=marked) for seed in range(3)]
    runs += [
        record("rival", seed, 0.72 + 0.01 * seed, corruption={"label_noise": 0.0, "imbalance": 0.3})
        for seed in range(3)
    ]
    found = page(write_bench(tmp_path / "b", runs))
    assert found.row("In domain: gains over plain", "rival")[1] == "3"
    assert "imbalance 0.3" in tables.setting(runs[0]["spec"])


def test_a_seed_that_was_run_again_counts_once(tmp_path):
    first, again = record("plain", 0, 0.5), record("plain", 0, 0.8)
    again |= {"id": "0" * 16, "finished": "2026-11-23T00:00:00+00:00"}
    found = page(write_bench(tmp_path / "b", [first, again, record("rdrop", 0, 0.7)]))
    assert found.cell("In domain: mean", "plain", "sst2") == "80.0 n = 1"


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.json", '{"format": 1, "id"', "not readable JSON"),
        ("b.json", "[1, 2]", "no entry 'format'"),
        ("c.json", '{"format": 2}', "format 2: this version of steadytune reads format 1"),
        ("d.json", b"\xff\xfe", "not readable JSON"),
        ("e.json", '{"format": 1, "id": "e"}', "spec is missing"),
        ("f.json", "[" * 100_000, "not readable JSON"),
        ("g.txt", "notes", "records end in .json"),
        ("h.json", lambda run: run, "it was renamed or copied"),
        ("i.json", lambda run: run | {"status": "running"}, "status must be one of done, failed, got 'running'"),
        ("j.json", lambda run: run | {"sets": {"x": {"domain": "in", "rows": 1, "baseline": 0, "f": ""}}}, "f must be"),
        ("k.json", lambda run: run | {"spec": run["spec"] | {"recipe": 3}}, "spec.recipe must be text, got 3"),
        ("l.json", lambda run: run | {"cost": {"seconds": 1, "passes": "2"}}, "cost.passes must be"),
    ],
)  # fmt: skip
def test_unusable_records_are_named_and_skipped(tmp_path, name, content, reason):
    folder = write_bench(tmp_path / "b", [record("plain", seed, 0.8) for seed in (0, 1)])
    if callable(content):
        changed = content(record("plain", 5, 0.1) | {"id": Path(name).stem if name != "h.json" else "other"})
        content = json.dumps(changed)
    (folder / "records" / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    (folder / "records" / ".half.json.part").write_text("{")
    records, problems = read_records(folder)
    assert len(records) == 2
    assert [problem.file for problem in problems] == [name]
    assert reason in problems[0].reason
    found = page(folder)
    assert found.row("Skipped files", name)[1] == problems[0].reason
    assert found.cell("In domain: mean", "plain", "sst2") == "80.0 ± 0.0 n = 2"


def test_nan_is_undefined_not_a_score(tmp_path):
    folder = write_bench(tmp_path / "b", [record("plain", 0, 0.8), record("plain", 1, float("nan"))])
    assert page(folder).cell("In domain: mean", "plain", "sst2") == "80.0 n = 1 1 of 2 undefined"


def test_folders_that_are_no_bench(tmp_path):
    with pytest.raises(UsageError, match="no such folder"):
        write_report(tmp_path / "absent")
    with pytest.raises(UsageError, match="not the folder of a bench"):
        write_report(tmp_path)
    folder = write_bench(tmp_path / "b", [])
    with pytest.raises(UsageError, match="no usable record"):
        write_report(folder)
    (folder / "records" / "x.json").write_text("{}")
    with pytest.raises(UsageError, match=r"x\.json: not a bench record"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_the_page_loads_nothing_and_runs_nothing(tmp_path):
    text = write_report(write_bench(tmp_path / "b", synthetic(seeds=3))).read_text()
    tags = Page(text).tags
    assert not {"script", "iframe", "object", "embed", "link", "img", "base", "form"} & {tag for tag, _ in tags}
    for tag, attributes in tags:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("href", "src", "xlink:href", "style"):
            assert "//" not in (attributes.get(name) or ""), (tag, attributes)
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in tags


def test_every_reference_inside_the_page_has_its_target_once(tmp_path):
    tags = Page(write_report(write_bench(tmp_path / "b", synthetic(seeds=3))).read_text()).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    wanted = [a.get("href") or a.get("xlink:href") for _, a in tags if "href" in a or "xlink:href" in a]
    wanted += [name for _, a in tags for name in re.findall(r"url\((#\w+)\)", a.get("clip-path", ""))]
    assert len(wanted) > 100
    assert {name[1:] for name in wanted} <= set(ids)
    repeated = {name for name in ids if ids.count(name) > 1}
    assert not repeated


def test_figures_show_every_run(tmp_path):
    """Marks of the strip plots, counted: one a run with a score."""
    folder = write_bench(tmp_path / "b", [record("plain", seed, 0.8 + 0.01 * seed) for seed in range(7)])
    text = write_report(folder).read_text()
    strip = re.search(r'<svg [^>]*aria-label="[^"]*scores of all seeds by recipe".*?</svg>', text, re.S)[0]
    dots = [tag for tag, attributes in Page(strip).tags if tag == "use" and "0.75" in attributes.get("style", "")]
    assert len(dots) == 7


def test_forest_draws_each_gain_on_its_own_line():
    """Rows come by recipe, lines by task: a's and b's colours must alternate from top to bottom."""
    drawn = looks(["plain", "a", "b"])
    rows = [(task, name, drawn[name], 1.0, 0.0, 2.0) for name in ("a", "b") for task in ("sst2", "rte")]
    gains = pd.DataFrame(rows, columns=["group", "label", "look", "gain", "low", "high"])
    tags = Page(figures.forest(gains, "title", "gain", (-1, 3))).tags
    marks = [a for tag, a in tags if tag == "use" and "x" in a]
    colours = {look.colour: name for name, look in drawn.items()}
    found = sorted((float(a["y"]), colours[c]) for a in marks for c in colours if f"fill: {c}" in a.get("style", ""))
    assert [name for _, name in found] == ["a", "b", "a", "b"]
    assert len({y for y, _ in found}) == 4


NASTY = [
    "<b>bold</b>",
    "$x^2$ & \\frac{",
    "a|b`c\nd",
    "</style><script>alert(1)</script>",
    "'\"{{ 7 * 7 }}",
    "漢字 \U0001f600",
]


@pytest.mark.parametrize("name", NASTY)
def test_names_and_tracebacks_are_text(tmp_path, name):
    runs = [
        record(recipe, seed, 0.8 + 0.01 * seed, task=name, model=name) for recipe in ("plain", name) for seed in (0, 1)
    ]
    runs.append(record(name, 2, None, task=name, model=name, error=f"Error: {name}"))
    folder = write_bench(tmp_path / "b", runs, study=f"# {name}\n```\n")
    found = page(folder)
    words = " ".join(name.split())
    assert " ".join(found.row("In domain: mean", "plain")[1:]).startswith("80.5 ± 0.7 n = 2")
    assert any(" ".join(row[0].split()) == words for row in found.tables["In domain, in detail"])
    assert not {"b", "script"} & {tag for tag, _ in found.tags}
    lines = (folder / "report.md").read_text().splitlines()
    tables_ = [line for line in lines if line.startswith("|")]
    heads = [line for line in tables_ if set(line) <= set("|-:")]
    assert heads
    width = 0
    for line in tables_:
        if tables_.index(line) + 1 < len(tables_) and tables_[tables_.index(line) + 1] in heads:
            width = line.count("|") - line.count("\\|")
        assert line.count("|") - line.count("\\|") == width, line


def test_the_same_records_give_the_same_bytes(tmp_path):
    folder = write_bench(tmp_path / "b", synthetic(seeds=3, sizes=(500,)))
    write_report(folder, tmp_path / "one")
    code = "import sys; from steadytune.bench.report import write_report; write_report(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, str(folder), str(tmp_path / "two")], check=True)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_runs_csv_holds_what_the_records_hold(tmp_path):
    runs = synthetic(seeds=3, sizes=(500, None))
    folder = write_bench(tmp_path / "b", runs)
    write_report(folder)
    table = pd.read_csv(folder / "runs.csv").set_index(["id", "set"])
    assert len(table) == sum(max(1, len(run["sets"])) for run in runs)
    for run in runs:
        for name, scores in run["sets"].items():
            row = table.loc[(run["id"], name)]
            for metric in set(scores) - {"domain"}:
                assert row[metric] == scores[metric]  # to the last bit
            assert (row["domain"], row["recipe"], row["seconds"]) == (
                scores["domain"], run["spec"]["recipe"], run["cost"]["seconds"],
            )  # fmt: skip
            assert row["train_size"] == run["spec"]["train_size"] or np.isnan(row["train_size"])


def test_summary_csv_is_in_the_units_of_the_metric(tmp_path):
    folder = two_recipes(tmp_path)
    write_report(folder)
    table = pd.read_csv(folder / "summary.csv").set_index("recipe")
    assert table.loc["dps_dense", "mean"] == pytest.approx(statistics.mean(RIVAL), abs=1e-15)
    assert table.loc["dps_dense", "gain"] == pytest.approx(0.025, abs=1e-15)
    assert np.isnan(table.loc["plain", "gain"])


@pytest.mark.parametrize("done", [True, False])
def test_one_run_is_a_report(tmp_path, done):
    folder = write_bench(tmp_path / "b", [record("mine", 0, 0.8, error=None if done else "ValueError: no")])
    found = page(folder)
    if done:
        assert found.cell("In domain: mean", "mine", "sst2") == "80.0 n = 1"
    else:
        assert not [name for name in found.tables if name.startswith("In domain")]
        assert any(text == "No run is done, so there are no scores to show." for text in paragraphs(folder))
        assert found.tables["Failed runs"][1][-1] == "ValueError: no"


def test_mixed_contexts_are_a_warning(tmp_path):
    runs = [record("plain", seed, 0.8) for seed in (0, 1)]
    runs[1]["context"] = runs[1]["context"] | {"torch": "2.6.0", "commit": None}
    folder = write_bench(tmp_path / "b", runs)
    assert page(folder).row("Versions and hardware", "torch")[1] in (
        "2.13.0 (1 run); 2.6.0 (1 run)", "2.6.0 (1 run); 2.13.0 (1 run)",
    )  # fmt: skip
    warnings = re.findall(r'<p class="warning">(.*?)</p>', (folder / "report.html").read_text())
    assert any("differ in their context (torch and commit)" in text for text in warnings)


def test_contamination_is_told_for_each_model_and_task(tmp_path):
    runs = [record("plain", 0, 0.8, seen=["snli", "mnli"], task="rte"), record("plain", 0, 0.8)]
    folder = write_bench(tmp_path / "b", runs)
    page(folder)
    assert any("minilm on rte (mnli and snli)" in text for text in paragraphs(folder))
    assert any(text == "Contamination: none known for minilm on sst2." for text in paragraphs(folder))


def test_order_is_that_of_the_study_and_the_baseline_comes_first(tmp_path):
    runs = [record(name, seed, 0.8) for name in ("a", "plain", "z") for seed in (0, 1)]
    folder = write_bench(tmp_path / "b", runs, study="recipes: [z, plain, a]")
    rows = [row[0] for row in page(folder).tables["In domain, in detail"] if len(row) > 1]
    assert rows == ["recipe", "plain", "z", "a"]
    (folder / "study.yaml").unlink()
    rows = [row[0] for row in page(folder).tables["In domain, in detail"] if len(row) > 1]
    assert rows == ["recipe", "plain", "a", "z"]


def test_the_study_is_shown_as_it_is(tmp_path):
    study = "recipes:\n  - {name: plain}   # <not> & more\n"
    text = write_report(write_bench(tmp_path / "b", [record()], study=study)).read_text()
    assert html.unescape(re.search(r"<pre[^>]*>(.*?)</pre>", text, re.S)[1]) == study


def test_report_verb(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    two_recipes(tmp_path)
    done = CliRunner().invoke(cli.app, ["report", "bench", "--output", "site"])
    assert done.exit_code == 0, done.output
    assert done.stdout == "report: site/report.html\n"
    assert sorted(path.name for path in Path("site").iterdir()) == sorted(FILES)
    Path("r.yaml").write_text("output: other\nmetric: accuracy\n")
    assert CliRunner().invoke(cli.app, ["report", "bench", "--config", "r.yaml"]).exit_code == 0
    assert Path("other/report.md").is_file()
    for words in (["absent"], ["bench", "--metric", "f2"], ["bench", "--output", "r.yaml"]):
        done = CliRunner().invoke(cli.app, ["report", *words])
        assert done.exit_code == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert done.stderr.startswith("error: ")


def test_a_report_loads_no_torch_and_no_pyplot(tmp_path):
    folder = two_recipes(tmp_path)
    code = (
        "import sys; from steadytune.bench.report import write_report; write_report(sys.argv[1])\n"
        "print([name for name in ('torch', 'transformers', 'matplotlib.pyplot') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def lead(folder):
    """First sentence of a page."""
    return html.unescape(re.search(r'<p class="lead">(.*?)</p>', write_report(folder).read_text(), re.S)[1]).strip()


@pytest.mark.parametrize(
    ("gains", "said"),
    [
        ([0.02, 0.03, 0.025, 0.02, 0.03, 0.04], "rival beat plain"),
        ([-0.02, -0.03, -0.025, -0.02, -0.03, -0.04], "No recipe beat plain, and rival did worse"),
        ([0.03, -0.03, 0.02, -0.02, 0.01, -0.01], "No recipe beat plain; gains above"),
        ([0.02, 0.03, 0.025, 0.02, 0.03], "Nothing can be shown: with 1 comparison, each needs at least 6 pairs"),
    ],
)
def test_a_report_begins_with_what_was_shown(tmp_path, gains, said):
    """Of n sign flips the smallest p is 2^(1 - n): 1/32 for six pairs, 1/16 for five."""
    runs = [record("plain", seed, 0.7 + 0.01 * seed) for seed in range(len(gains))]
    runs += [record("rival", seed, 0.7 + 0.01 * seed + gain) for seed, gain in enumerate(gains)]
    assert lead(write_bench(tmp_path / "b", runs)).startswith(said)


def test_a_task_with_errors_counts_beside_the_mean_over_the_others(tmp_path):
    """Two accuracies have a mean without a difference; the one rmse is much smaller in every seed."""
    rows = [
        record(recipe, seed, score, task=task, metric=metric)
        for seed in range(12)
        for recipe, gain in (("plain", 0.0), ("rival", 1.0))
        for task, metric, score in (
            ("sst2", "accuracy", 0.7 + 0.01 * gain * (-1) ** seed),
            ("rte", "accuracy", 0.6 + 0.01 * gain * (-1) ** seed),
            ("stsb", "rmse", 2.0 - gain - 0.01 * gain * seed),
        )
    ]
    assert lead(write_bench(tmp_path / "b", rows)).startswith("rival (in 1 of 2 comparisons) beat plain")


def test_a_task_with_too_few_pairs_shows_no_gain_that_would_have_been_seen(tmp_path):
    """Two tasks of four seeds have eight pairs; four pairs have no p below 0.125."""
    rows = [
        record(recipe, seed, score + gain * (-1) ** seed * (1 + seed), task=task)
        for seed in range(4)
        for recipe, gain in (("plain", 0.0), ("rival", 0.01))
        for task, score in (("sst2", 0.7), ("rte", 0.6))
    ]
    assert lead(write_bench(tmp_path / "b", rows)) == "No recipe beat plain."


def test_the_gain_that_would_have_been_seen_is_found_after_the_adjustment(tmp_path):
    """Naive: that of p 0.05 before it, which one of many comparisons finds far less often."""
    runs = [record("plain", seed, 0.7) for seed in range(10)]
    gains = [0.01 * (-1) ** seed for seed in range(10)]
    for i in range(5):
        runs += [record(f"rival{i}", seed, 0.7 + gain) for seed, gain in enumerate(gains)]
    detectable = 100 * detectable_gain(10, statistics.stdev(gains), alpha=0.05 / 5)
    said = f"gains above {detectable:.1f} points (the median of 5 comparisons) would have been seen"
    assert said in lead(write_bench(tmp_path / "b", runs))
    assert f"{100 * detectable_gain(10, statistics.stdev(gains)):.1f}" != f"{detectable:.1f}"


def test_a_recipe_alone_is_compared_with_nothing(tmp_path):
    folder = write_bench(tmp_path / "b", [record("plain", seed, 0.8 + 0.01 * seed) for seed in range(3)])
    assert lead(folder) == "Nothing is compared: no other recipe has a seed in common with plain."


def test_a_report_of_failed_runs_alone_says_so(tmp_path):
    runs = [record(recipe, seed, error="RuntimeError: no") for recipe in ("plain", "rdrop") for seed in range(2)]
    assert lead(write_bench(tmp_path / "b", runs)) == "Nothing is compared: all runs failed."


def test_one_outlier_does_not_squash_a_forest():
    """Nine intervals within 5 points and one from 10 to 90: the axis keeps to the nine, and the page says so."""
    ends = np.array([[1.0, -1.0, 3.0]] * 9 + [[50.0, 10.0, 90.0]])
    limits = _limits(ends)
    assert limits.clipped
    assert limits[0] <= -1
    assert 3 <= limits[1] < 50
    assert not _limits(ends[:9]).clipped


def test_a_gain_beyond_the_forest_is_written_at_its_edge():
    drawn = looks(["plain", "a"])
    rows = [("sst2", "a", drawn["a"], 1.0, 0.0, 2.0), ("rte", "a", drawn["a"], 50.0, 10.0, 90.0)]
    gains = pd.DataFrame(rows, columns=["group", "label", "look", "gain", "low", "high"])
    text = figures.forest(gains, "title", "gain", (-1, 3))
    assert "+50.0" in text
    assert "+1.0" not in text


def test_no_table_has_two_columns_of_one_name(tmp_path):
    found = page(write_bench(tmp_path / "b", synthetic(seeds=3)))
    for caption, rows in found.tables.items():
        assert len(set(rows[0])) == len(rows[0]), (caption, rows[0])


def test_compute_can_be_matched_for_some_recipes_only(tmp_path):
    """Naive: a missing name beside names is NaN, which is true and no text."""
    runs = [record("plain", seed, 0.8 + 0.01 * seed) for seed in range(3)]
    runs += [record("plain_long", seed, 0.83 + 0.012 * seed, steps=320, methods=[]) for seed in range(3)]
    runs += [record("rdrop", seed, 0.82 + 0.01 * seed, passes=2.0) for seed in range(3)]
    runs += [record("smart", seed, 0.82 + 0.01 * seed, passes=4.0) for seed in range(3)]
    found = page(write_bench(tmp_path / "b", runs))
    assert found.row("Matched compute", "rdrop")[2] == "plain_long"
    assert found.row("Matched compute", "smart")[2] == "none so long"


def test_a_recipe_that_the_study_no_longer_plans_is_not_compared(tmp_path):
    """Naive: its old runs, with another learning rate, are paired with new ones of plain."""
    old = [record(name, seed, 0.8, options={"lr": 1e-4}) for name in ("plain", "mixout") for seed in range(6)]
    new = [record("plain", seed, 0.9, options={"lr": 1e-5}) for seed in range(6)]
    folder = write_bench(tmp_path / "b", old + new)
    (folder / "planned.json").write_text(json.dumps({run["id"]: "title" for run in new}))
    found = page(folder)
    assert found.cell("In domain: mean", "plain", "sst2") == "90.0 ± 0.0 n = 6"
    assert not any(caption.startswith("In domain: gains") for caption in found.tables)
    assert "the study plans no such run of mixout now" in found.row("Left out", f"{old[6]['id']}.json")[1]


def test_recipes_with_different_metrics_are_not_compared(tmp_path):
    """Naive: 0.71 of accuracy beats 0.30 of Matthews by 41 points."""
    runs = [record("mixout", seed, 0.71) for seed in range(6)]
    runs += [record("plain", seed, 0.3, metric="matthews") for seed in range(6)]
    for run in runs[6:]:
        run["finished"] = "2026-11-23T07:30:00+00:00"
    found = page(write_bench(tmp_path / "b", runs))
    assert not any(caption.startswith("In domain: gains") for caption in found.tables)


@pytest.mark.parametrize(
    ("study", "recipes", "baseline"),
    [
        ("name: rdrop\nrecipes:\n  default: {}\n  rdrop: {}\n", ["rdrop", "default"], "default"),
        ("models: {bert: models/base}\nrecipes: {short: {}, base: {}}\n", ["base", "short"], "short"),
        ("recipes: [late, early]", ["early", "late", "other"], "late"),
        ("]: no YAML", ["b", "a"], "a"),
    ],
)
def test_the_first_recipe_of_the_file_is_the_baseline(study, recipes, baseline):
    """Naive: the first place of the name anywhere in the text, such as in the name of the study."""
    assert tables.baseline_of(tables.in_order(recipes, study, "recipes")) == baseline


def test_thinning_to_one_row_a_class_is_a_setting_of_its_own():
    spec = record(corruption={"label_noise": 0.0, "imbalance": 0.0})["spec"]
    assert tables.setting(spec) == "500 rows, imbalance 0.0"


def test_more_comparisons_than_random_flips_can_tell_show_nothing():
    """Naive: "No recipe beat plain", though the smallest p of 9,999 random flips times 600 is 0.06."""
    gains = pd.DataFrame(
        [
            {"recipe": f"r{i}", "domain": "in", "task": "t", "n": 20, "gain": 0.05, "p": 1e-4, "holm": 0.06}
            for i in range(600)
        ]
    ).assign(model="m", setting="s", metric="accuracy", detectable=0.01)
    said = verdict(gains, gains.iloc[:0], ["in"], "plain")
    assert said.startswith("Nothing can be shown: with more than 16 pairs of seeds p is at least 1/10000")
