"""Cells of a search on a real table, with an engine that draws predictions instead of training."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fit_helpers import save_tiny_bert, toy
from steadytune.bench.own_tables import OwnTables
from steadytune.bench.pool import Outcome
from steadytune.bench.run import failed, tables
from steadytune.bench.store import Store
from steadytune.errors import UsageError
from steadytune.searching import cells as module
from steadytune.searching.budget import Budget
from steadytune.searching.cells import Cells
from steadytune.searching.main import make_task
from steadytune.searching.race import Race
from steadytune.searching.recipe import Recipe, changed, frozen, stages

PLAIN = Recipe("bert")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny_bert(tmp_path / "bert")
    frame = toy(90).drop(columns="score").assign(shop=[i // 3 for i in range(90)])
    frame.to_csv("rows.csv", index=False)
    return tmp_path


def task(**options):
    table = OwnTables("table", str(Path("rows.csv").absolute()), label="label", text=("text",), group="shop", folds=3)
    return make_task(table, {"bert": "bert"}, 0, {"steps": 4, **options})


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


class Drawing:
    """An engine whose runs take a known time and are right with a known probability."""

    size = 1

    def __init__(self, clock, seconds=10.0, right=0.7, **quality):
        self.clock, self.seconds, self.right, self.quality, self.done = clock, seconds, right, quality, []

    def map(self, tasks, begun):
        for place, run in tasks:
            begun((place, run))
            self.clock.now += self.seconds
            self.done.append(run)
            Store(place).write(*self.record(run))
            yield Outcome((place, run), "done")

    def record(self, run):
        name = run.spec["recipe"].rpartition(" + ")[2]
        how = self.quality.get(name.partition(":")[0].replace("*", "_"), self.right)
        if how == "fails":
            return failed(run, "Traceback\nValueError: this model has no layers", 1.0), None
        record = {**failed(run, "", self.seconds), "status": "done", "error": None}
        record["training"] = {"failing": how == "collapses"}
        (table, _, column) = tables(run)
        rows = table.frame[table.frame[column] == "test"]
        seed = [run.spec["seeds"]["subset"], len(run.spec["recipe"])]
        share = 0.5 if how == "collapses" else how
        up = (rows["label"] == "up").to_numpy() == (np.random.default_rng(seed).random(len(rows)) < share)
        about = {"set": "test", "row": rows.index, "label": rows["label"]}
        return record, pd.DataFrame({**about, "probability_down": 0.9 - 0.8 * up, "probability_up": 0.1 + 0.8 * up})


def make(budget="100runs", monkeypatch=None, place="cells", **quality):
    clock = Clock()
    if monkeypatch is not None:
        monkeypatch.setattr(module.time, "monotonic", clock.monotonic)
    engine = Drawing(clock, **quality)
    return Cells(task(), Store(place), Budget.of(budget), engine), engine


def race(cells, arms=("head=logistic", "lr*3", "rdrop")):
    tried = stages(arms, cells.task.base, ["bert"], {"bert": "model"})
    return Race(PLAIN, tried, cells, cells.sheet, [frozen("bert")])


def test_a_repeat_predicts_every_row_once_and_keeps_groups_in_one_fold_and_one_half(folder):
    cells, engine = make()
    cells.do([(PLAIN, 0), (PLAIN, 1)])
    assert [run.spec["seeds"]["subset"] for run in engine.done] == [0, 1, 2, 3, 4, 5]
    shops = np.arange(90) // 3
    for run in engine.done[:3]:
        fold = run.spec["seeds"]["subset"]
        held = tables(run)[0].frame.query("fold == 'test'").index
        assert (np.flatnonzero(cells.sheet.folds[0] == fold) == held).all(), "the sheet knows the folds of the cells"
    for row in (cells.sheet.half, *cells.sheet.folds):
        assert all(len(set(row[shops == shop])) == 1 for shop in range(30))
    problem, scores = cells.task.data.problem, cells.predictions(PLAIN, 0)
    right = (problem.decide(scores) == cells.task.data.train["label"].to_numpy()).astype(float)
    assert (cells.values(PLAIN, [0])[0] == right).all()


def test_rows_order_and_dropout_are_those_of_plain_in_every_recipe(folder):
    cells, engine = make()
    arm = changed(PLAIN, "rdrop", cells.task.base)
    cells.do([(PLAIN, 0), (arm, 0)])
    plain, other = engine.done[:3], engine.done[3:]
    assert [run.spec["seeds"] for run in plain] == [run.spec["seeds"] for run in other]
    assert all(run.spec["methods"] == [] for run in plain)


def test_cells_are_shared_with_other_searches_in_the_folder(folder):
    first, engine = make()
    first.do([(PLAIN, 0), (changed(PLAIN, "rdrop", first.task.base), 0)])
    second, again = make()
    second.do([(changed(PLAIN, "lr*3", first.task.base), 0), (PLAIN, 0)])
    assert (len(engine.done), len(again.done)) == (6, 3)
    assert (second.values(PLAIN, [0]) == first.values(PLAIN, [0])).all()


def test_a_race_that_goes_on_ends_as_one_that_was_not_stopped(folder):
    class Stopping(Drawing):
        def map(self, tasks, begun):
            for outcome in super().map(tasks, begun):
                if len(self.done) == self.stop:
                    raise KeyboardInterrupt
                yield outcome

    whole = race(make(place="whole", head=0.8)[0]).run()
    for stop in (1, 5, 9, 17, 26):
        cells = make(place=f"cells{stop}")[0]
        cells.engine = Stopping(Clock(), head=0.8)
        cells.engine.stop = stop
        with pytest.raises(KeyboardInterrupt):
            race(cells).run()
        assert race(make(place=f"cells{stop}", head=0.8)[0]).run() == whole


@pytest.mark.parametrize("budget", [13, 20, 40, 70])
def test_a_budget_of_trainings_is_never_exceeded(folder, budget):
    cells, engine = make(f"{budget}runs", head=0.8)
    race(cells).run()
    trained = [run for run in engine.done if run.spec["options"].get("steps") != 0]
    assert len(trained) == cells.trainings <= budget - 1, "one training is that of the last fit"
    assert (len(trained) > budget - 13) == (budget < 70)


def test_each_training_of_a_soup_counts(folder):
    """Naive: a soup is one training for the budget, and its last fit is too."""
    cells, engine = make("15runs")
    arm = changed(PLAIN, "soup=3", cells.task.base)
    cells.do([(PLAIN, 0), (arm, 0)])
    assert (len(engine.done), cells.trainings) == (6, 12)
    assert cells.cost(arm) == 9
    assert cells.left == 0, "the last fit may be the soup, of three trainings"
    assert {run.soup for run in engine.done} == {1, 3}


@pytest.mark.parametrize("minutes", [5, 8, 15])
def test_a_budget_of_minutes_is_kept_with_the_last_fit(folder, monkeypatch, minutes):
    cells, _ = make(f"{minutes}m", monkeypatch, seconds=10.0)
    race(cells).run()
    assert 0.6 * minutes < (cells.spent + cells.last_fit) / 60 <= 1.1 * minutes
    assert cells.last_fit == pytest.approx(10 * 1.5 * 1.2), "all rows are 1.5 times those of a fold, and 20 % slack"


def test_seconds_of_earlier_invocations_count(folder, monkeypatch):
    cells, _ = make("5m", monkeypatch, seconds=10.0)
    cells.do([(PLAIN, 0)])
    again, _ = make("5m", monkeypatch, seconds=10.0)
    assert (again.before, again.left) == (30.0, 270.0)


def test_an_arm_that_fails_or_collapses_stops_at_its_second_training(folder):
    cells, engine = make(rdrop="fails", lr_3="collapses")
    outcome = race(cells).run()
    begun = Counter(run.spec["recipe"] for run in engine.done)
    assert {count for name, count in begun.items() if name.endswith("rdrop")} == {2}
    assert {count for name, count in begun.items() if name.endswith("lr*3")} == {2}
    reasons = {str(arm).rpartition(" + ")[2]: why for arm, why in outcome.dropped.items()}
    assert reasons["rdrop"] == "ValueError: this model has no layers"
    assert reasons["lr*3"] == "the training loss did not fall in 2 of 2 trainings"
    assert not {"rdrop", "lr*3"} & {*outcome.ship.arms}


class Failing(Drawing):
    """Fails trainings of some numbers, for a reason that passes."""

    def __init__(self, *numbers, **quality):
        super().__init__(Clock(), **quality)
        self.numbers = numbers

    def record(self, run):
        if len(self.done) in self.numbers:
            return failed(run, "OSError: no space left on device", 1.0), None
        return super().record(run)


def test_a_training_that_fails_once_is_done_again(folder):
    """Naive: one full disk, and the arm is out for good; or plain, and the search cannot go on."""
    whole = race(make(place="whole", head=0.9)[0]).run()
    cells = make(place="again", head=0.9)[0]
    cells.engine = Failing(2, 6, head=0.9)
    assert race(cells).run() == whole


def test_what_has_failed_is_tried_again_by_a_search_that_goes_on(folder):
    """Naive: the records of failed trainings stay, and only --overwrite helps, which removes all others."""
    whole = race(make(place="whole", head=0.9)[0]).run()
    cells = make(place="again", head=0.9)[0]
    cells.engine = Failing(1, 2, head=0.9)
    with pytest.raises(UsageError, match="plain fine-tuning has no scores: OSError: no space left on device"):
        race(cells).run()
    assert race(make(place="again", head=0.9)[0]).run() == whole


def test_the_last_fit_with_a_costly_arm_is_set_aside_before_the_arm_is_tried(folder):
    """Naive: it is only when the arm has run, and takes what was kept for judging."""
    cells, _ = make("15runs")
    arm = changed(PLAIN, "soup=3", cells.task.base)
    cells.do([(PLAIN, 0)])
    assert (cells.last_fit, cells.further(PLAIN), cells.further(arm)) == (1, 0, 2)
    assert cells.whole == 14
    cells.do([(arm, 0)])
    assert (cells.last_fit, cells.further(arm)) == (3, 0)


def test_paces_are_those_of_the_model(folder):
    """Naive: the mean over a small and a large model, which is wrong for both."""
    two = dataclasses.replace(task(), models={"bert": str(folder / "bert"), "large": str(folder / "bert")})
    engine = Drawing(Clock())
    cells = Cells(two, Store("cells"), Budget.of("60m"), engine)
    cells.do([(PLAIN, 0)])
    engine.seconds *= 9
    large = Recipe("large", ("large",))
    cells.do([(large, 0)])
    assert cells.seconds(changed(PLAIN, "lr*3", two.base)) == cells.seconds(PLAIN)
    assert cells.seconds(changed(large, "lr*3", two.base)) == 9 * cells.seconds(PLAIN)


def test_what_reads_texts_tells_its_passes_before_it_runs(folder):
    """Naive: two and a half plain trainings, whatever the number of texts and steps."""
    texts = toy(100, start=300)[["text"]]
    texts.to_csv("texts.csv", index=False)
    read = len({*texts["text"]} - {*pd.read_csv("rows.csv")["text"]})
    reading = dataclasses.replace(
        task(), models={"bert": str(folder / "bert")}, unlabelled=(str(folder / "texts.csv"),)
    )
    few, many = (
        reading.effort(changed(PLAIN, f"self-training:rounds=1,draws={draws}", reading.base)) for draws in (2, 20)
    )
    reads = (20 - 2) * read / 3 / (4 * reading.base.batch_size)  # a forward pass is a third of a training pass
    assert many - few == pytest.approx(reads)
    half, whole = (reading.effort(changed(PLAIN, f"pretrain=simcse:steps={steps}", reading.base)) for steps in (20, 40))
    assert whole - 1 == pytest.approx(2 * (half - 1))
    assert whole > 11, "forty steps beside the four of the fit"


def test_a_seed_may_be_as_large_as_seeds_are(folder):
    """Naive: seeds of the folds are a thousand times as large, and refused."""
    large = dataclasses.replace(task(), seed=2**32 - 1)
    seeds = [run.spec["seeds"]["init"] for run in large.trials([(PLAIN, 0), (PLAIN, 1)])]
    assert len({*seeds}) == 2 * large.k
    assert max(seeds) < 2**32
    assert sorted(np.unique(large.sheet().folds)) == list(range(large.k))


def test_plain_may_collapse_and_is_beaten_then(folder):
    cells, _ = make(plain="collapses", head=0.9)
    assert "head=logistic" in race(cells).run().ship.name
