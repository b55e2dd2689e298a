"""Learning curves: the power law, what more rows bring, and the verb."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from fit_helpers import save_tiny_bert, toy
from steadytune import cli
from steadytune.bench.own_tables import OwnTables
from steadytune.bench.store import Store
from steadytune.errors import UsageError
from steadytune.searching import report_figures
from steadytune.searching.by_size import learning_curve, smaller
from steadytune.searching.learning_curve import more_rows, power_law
from steadytune.searching.main import make_task

SIZES = np.array([75.0, 150.0, 240.0])


@pytest.mark.parametrize(("a", "b", "c"), [(0.9, 1.5, 0.5), (0.8, 0.9, 0.3), (0.9, 8.0, 1.0)])
def test_a_power_law_is_found_again(a, b, c):
    found = power_law(SIZES, (a - b * SIZES**-c)[None])
    assert [float(part[0]) for part in found] == pytest.approx([a, b, c])


def values(rng, scores, rows=2000):
    """Right or wrong rows of one repeat; a row is right from a size on."""
    difficulty = rng.random(rows)
    return {int(size): (difficulty < score)[None].astype(float) for size, score in zip(SIZES, scores, strict=True)}


def test_the_gain_of_more_rows_is_on_the_curve():
    rng = np.random.default_rng(0)
    scores = 0.9 - 2.0 * SIZES**-0.5
    found = more_rows(values(rng, scores, 200_000), np.arange(200_000)[None] % 5, np.arange(200_000), 300, 200)
    assert found.gain == pytest.approx(2.0 * (300**-0.5 - 500**-0.5), abs=0.003)
    assert found.interval[0] < found.gain < found.interval[1]
    assert found.known


def test_the_curve_ends_at_the_best_possible_score():
    """Naive: 200 more rows bring 29 points to a score of 90."""
    rng = np.random.default_rng(0)
    steep = values(rng, [0.3, 0.6, 0.95])
    blocks, rows = np.arange(2000)[None] % 5, np.arange(2000)
    assert more_rows(steep, blocks, rows, 300, 2000).gain > 0.05
    found = more_rows(steep, blocks, rows, 300, 2000, perfect=1.0)
    assert 0 <= found.interval[0] <= found.gain <= found.interval[1] < 0.05


def test_the_drawing_goes_beyond_the_rows_only_where_they_tell_what_more_would_bring():
    scores = {"75": {"value": 0.7, "error": 0.02}, "150": {"value": 0.8, "error": 0.01}}
    more = {"plain": {"rows": 200, "interval": [0.01, 0.05]}, "probe": {"rows": 200, "interval": [-0.01, 0.05]}}
    found = {"metric": "accuracy", "rows": 300, "scores": {"plain": scores, "probe": scores}, "more": more}
    assert report_figures.curve(found).count("stroke-dasharray: ") == 1


def test_the_drawing_ends_at_the_best_possible_score(monkeypatch):
    """Naive: the law as it is, above an accuracy of 1."""
    drawn = []
    monkeypatch.setattr(report_figures, "svg", lambda figure, words: drawn.extend(figure.axes[0].lines))
    scores = {"75": {"value": 0.7, "error": 0.02}, "150": {"value": 0.98, "error": 0.01}}
    more = {"plain": {"rows": 200, "interval": [0.01, 0.05]}}
    report_figures.curve({"metric": "accuracy", "rows": 300, "scores": {"plain": scores}, "more": more})
    assert max(np.max(line.get_ydata()) for line in drawn) == 1.0


def test_a_flat_curve_is_not_taken_for_a_gain():
    rng = np.random.default_rng(1)
    noisy = {int(size): (rng.random((1, 300)) < 0.8).astype(float) for size in SIZES}
    found = more_rows(noisy, np.arange(300)[None] % 5, np.arange(300), 300, 200)
    assert not found.known


def test_the_interval_holds_the_truth_in_most_tables():
    rng = np.random.default_rng(2)
    scores, truth = 0.9 - 2.0 * SIZES**-0.5, 2.0 * (300**-0.5 - 500**-0.5)
    blocks, rows = np.arange(300)[None] % 5, np.arange(300)
    ends = [more_rows(values(rng, scores, 300), blocks, rows, 300, 200, seed).interval for seed in range(60)]
    assert np.mean([low <= truth <= high for low, high in ends]) >= 0.85


def test_ten_copies_of_each_row_are_no_more_evidence():
    """Naive: drawn row by row, the interval is narrower."""
    rows, copies = np.arange(100), np.repeat(np.arange(100), 10)
    once = values(np.random.default_rng(3), 0.9 - 2.0 * SIZES**-0.5, 100)
    often = {size: v[:, copies] for size, v in once.items()}
    found = more_rows(often, copies[None] % 5, copies, 300, 200).interval
    assert found == pytest.approx(more_rows(once, rows[None] % 5, rows, 300, 200).interval)


def test_the_verb_scores_three_sizes_and_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_bert(tmp_path / "bert")
    toy(40).drop(columns="score").to_csv("rows.csv", index=False)
    words = ["curve", "rows.csv", "--model", "bert", "--output", "out", "--steps", "3", "--folds", "2", "--more", "50"]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    record = json.loads(Path("out/curve.json").read_text())
    assert {name: list(sizes) for name, sizes in record["scores"].items()} == {
        name: ["10", "20"] for name in ("plain", "probe")
    }, "half of the rows is what two folds leave"
    assert record["verdict"] in done.stdout.replace("\n", " ")
    trained = [json.loads(file.read_text()) for file in Path("out/records").glob("*.json")]
    assert sorted(r["training"]["rows"] for r in trained) == [10] * 4 + [20] * 4
    before = {file: file.stat().st_mtime_ns for file in Path("out/records").glob("*.json")}
    assert CliRunner().invoke(cli.app, words).exit_code == 0
    assert {file: file.stat().st_mtime_ns for file in Path("out/records").glob("*.json")} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--more", "0"], "more must be 1 or more"),
        (["--repeats", "9"], "between 1 and 4"),
        (["--workers", "-1"], "workers must be 0"),
    ],
)
def test_mistakes_are_named(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    save_tiny_bert(tmp_path / "bert")
    toy(40).drop(columns="score").to_csv("rows.csv", index=False)
    done = CliRunner().invoke(cli.app, ["curve", "rows.csv", "--model", "bert", "--output", "out", *words])
    assert done.exit_code == 2
    assert message in done.output


def curve_task(labels, groups=None, folds=2):
    frame = pd.DataFrame({"text": [f"good plot {i}" for i in range(len(labels))], "label": labels})
    (frame if groups is None else frame.assign(shop=groups)).to_csv("curve.csv", index=False)
    table = OwnTables("table", str(Path("curve.csv").absolute()), text=("text",), label="label", folds=folds,
                      group=None if groups is None else "shop")  # fmt: skip
    return make_task(table, {"bert": "bert"}, 0, {"steps": 2})


def test_sizes_are_those_that_every_fold_can_draw(tmp_path, monkeypatch):
    """Naive: a fold without the large group has too few rows, and a quarter of the rows has too few for the classes."""
    monkeypatch.chdir(tmp_path)
    two = ["up", "down"] * 20
    assert smaller(curve_task(two, folds=4)) == [10, 20]
    assert smaller(curve_task(two, ["large"] * 24 + [f"small {i}" for i in range(16)])) == [10]
    assert smaller(curve_task([f"class {i % 12}" for i in range(40)], folds=3)) == [20]
    none = curve_task([f"class {i % 20}" for i in range(40)])
    with pytest.raises(UsageError, match="not every fold can draw 10 and 20 of them with a row of each class"):
        learning_curve(none, Store(tmp_path / "out"), None, 50, 1)
    assert not (tmp_path / "out").exists()
