"""The race of recipes: what chooses does not judge, and nothing is claimed that is not there."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from steadytune.errors import UsageError
from steadytune.searching.race import Outcome, Race, Rules, Sheet, Stage

ROOT = Path(__file__).parents[2]


def simulation() -> ModuleType:
    spec = importlib.util.spec_from_file_location("search_calibration", ROOT / "benchmarks" / "search_calibration.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


SIMULATION = simulation()
World = SIMULATION.World


class Table(SIMULATION.Simulated):
    """Simulated trainings whose draws do not depend on the order in which they are done."""

    def train(self, recipe, repeat):
        seed = [len(recipe), repeat, *(int(part.rpartition(" ")[2]) + 10 * len(part) for part in recipe)]
        kept, self.rng = self.rng, np.random.default_rng(seed)
        try:
            return super().train(recipe, repeat)
        finally:
            self.rng = kept


def table(world=None, seed=0, budget=200, **changes) -> Table:
    trials = Table(world or World(300, 0.5, spread=0.02), np.random.default_rng(seed), budget)
    for name, value in changes.items():
        setattr(trials, name, value)
    return trials


def race(trials, half=None, stages=None, **more) -> Outcome:
    rows = trials.world.rows
    sheet = Sheet(np.arange(rows) % 2 == 0 if half is None else half, trials.folds, trials.units)
    return Race((), stages or SIMULATION.stages(), trials, sheet, **more).run()


def test_nothing_is_claimed_where_arms_are_other_seeds_of_plain():
    """Naive: the best arm's gain on the rows that chose it is above 3 points."""
    ends = [SIMULATION.search(World(300, 0.0), seed)[0] for seed in range(60)]
    assert np.mean([end.verdict == "shown" for end in ends]) <= 0.03
    assert abs(np.mean([end.gain.value for end in ends])) < 0.005
    naive = [max(s.gain.value for s in end.standings) for end in ends]
    assert np.mean(naive) > 0.03


def test_a_large_gain_is_found_and_shown():
    ends = [SIMULATION.search(World(300, 1.0, planted=0.08), seed)[0] for seed in range(30)]
    assert np.mean([end.verdict == "shown" and "heads 1" in end.ship for end in ends]) >= 0.9


@pytest.mark.parametrize("seed", range(4))
def test_swapping_the_halves_changes_nothing(seed):
    half = np.arange(300) % 2 == 0
    first, second = (race(table(seed=seed), side) for side in (half, ~half))
    assert (first.ship, first.verdict, first.detectable) == (second.ship, second.verdict, second.detectable)
    assert first.gain.value == pytest.approx(second.gain.value, abs=1e-12)
    assert first.gain.error == pytest.approx(second.gain.error)
    assert first.chosen == {"A": second.chosen["B"], "B": second.chosen["A"]}


def test_scores_of_one_half_never_influence_what_the_other_eliminates():
    """Naive: arms shared by both paths are ranked on all rows."""
    half = np.arange(300) % 2 == 0

    class Turned(Table):
        def values(self, recipe, repeats):
            values = super().values(recipe, repeats).copy()
            values[:, half] = np.random.default_rng(len(str(recipe))).random(values[:, half].shape) < 0.5
            return values

        def losses(self, recipe, repeats):
            return 1 - self.values(recipe, repeats)

    ends = []
    for cls in (Table, Turned):
        trials = cls(World(300, 0.5, spread=0.02), np.random.default_rng(3), 1000)
        ends.append(race(trials, half))
    b = [[(s.stage, s.arm, s.fate, s.gain) for s in end.standings if s.path == "B"] for end in ends]
    a = [[(s.stage, s.arm, s.fate) for s in end.standings if s.path == "A"] for end in ends]
    assert b[0] == b[1]
    assert a[0] != a[1]


def test_without_arms_the_race_is_a_cross_validation_of_plain():
    trials = table()
    end = race(trials, stages=[Stage("none", lambda chosen: [])])
    assert (end.ship, end.verdict, end.gain.value, end.detectable) == ((), "not shown", 0.0, None)
    values = trials.drawn[(), 0]
    assert end.level.value == pytest.approx((values[::2].mean() + values[1::2].mean()) / 2)
    assert {recipe for recipe, _ in trials.drawn} == {()}


@pytest.mark.parametrize("budget", [12, 30, 47, 64, 115, 200])
def test_the_budget_is_never_exceeded_and_a_small_one_claims_nothing(budget):
    trials = table(World(300, 0.5, planted=0.08), budget=budget)
    end = race(trials)
    assert trials.left >= 0
    assert (end.fresh > 0) == (budget >= 30)
    if not end.fresh:
        assert end.verdict != "shown"
    assert bool(end.untried) == (budget < 115)


@pytest.mark.parametrize("budget", [30, 50, 65, 115, 200])
def test_trainings_are_kept_for_judging_costly_arms_too(budget):
    """Naive: keeping three trainings of plain a fold leaves none for two arms that train three models each."""

    class Soups(Table):
        def cost(self, recipe):
            return 5.0 * 3 ** len(recipe[:1])

        def do(self, wanted):
            for recipe, repeat in wanted:
                if not self.has(recipe, repeat) and self.left >= self.cost(recipe):
                    self.left -= self.cost(recipe)
                    self.drawn[recipe, repeat] = self.train(recipe, repeat)

    arms = [("heads 1",), ("heads 2",)]
    trials = Soups(World(300, 0.5), np.random.default_rng(0), budget)
    trials.gains |= {"heads 1": 0.08, "heads 2": 0.08}
    end = race(trials, stages=[Stage("heads", lambda chosen: arms)])
    tried = {s.arm for s in end.standings}
    assert {*end.untried} == {*arms} - tried
    assert bool(end.fresh) == bool(tried)
    assert bool(tried) == (budget >= 50)


def test_what_judges_did_not_choose():
    """Repeats 0 and 1 choose, repeats 2 and 3 judge."""
    trials = table(World(300, 0.5, planted=0.08))
    end = race(trials, stages=[Stage("one", lambda chosen: [("heads 1",)])])
    plain, winner = (np.stack([trials.drawn[recipe, r] for r in (2, 3)]) for recipe in ((), end.chosen["A"]))
    assert end.chosen["A"] == end.chosen["B"]
    difference = winner - plain
    expected = (difference[:, ::2].mean() + difference[:, 1::2].mean()) / 2
    assert end.gain.value == pytest.approx(expected)


def test_an_arm_in_trouble_never_wins_and_is_listed():
    class Collapsing(Table):
        def trouble(self, recipe):
            return "collapsed twice" if "heads 1" in recipe else None

    trials = Collapsing(World(300, 0.5, planted=0.08), np.random.default_rng(0), 200)
    end = race(trials)
    assert not any("heads 1" in recipe for recipe in [end.ship, *end.chosen.values()])
    assert end.dropped[("heads 1",)] == "collapsed twice"


def test_an_arm_that_comes_into_trouble_later_is_not_chosen_by_its_first_repeat():
    """Naive: it is, later stages train on top of it, and plain is put back in the end."""
    seen = []

    class Late(Table):
        def trouble(self, recipe):
            return "failed twice" if "heads 1" in recipe and self.has(recipe, 1) else None

    def later(chosen):
        seen.append(chosen)
        return [(*chosen, "methods 0")]

    trials = Late(World(300, 0.5, planted=0.15), np.random.default_rng(0), 200)
    race(trials, stages=[Stage("one", lambda chosen: [("heads 1",)]), Stage("two", later)])
    assert set(seen) == {()}


def test_an_arm_that_is_worse_than_a_frozen_recipe_is_listed():
    trials = table(World(300, 0.0))
    trials.gains |= {"methods 3": 0.0, "heads 0": -0.25}
    end = race(trials, stages=[Stage("one", lambda chosen: [("heads 0",)])], frozen=[("methods 3",)])
    assert end.dropped == {("heads 0",): "it is worse than ('methods 3',)"}


def test_a_frozen_recipe_that_fails_keeps_no_other_from_being_chosen():
    class Half(Table):
        def do(self, wanted):
            super().do([(recipe, repeat) for recipe, repeat in wanted if recipe != ("methods 2",)])

    trials = Half(World(300, 0.0), np.random.default_rng(0), 200)
    trials.gains["methods 3"] = 0.15
    end = race(trials, stages=[Stage("none", lambda chosen: [])], frozen=[("methods 2",), ("methods 3",)])
    assert end.ship == ("methods 3",)


@pytest.mark.parametrize("stop", [60, 85, 90])
def test_a_race_that_goes_on_keeps_as_much_for_judging(stop):
    """Naive: what is left at the start of the invocation, which is less by what earlier ones have spent."""

    class Stopping(Table):
        stop: float = 0.0

        def do(self, wanted):
            for pair in wanted:
                if self.whole - self.left >= self.stop > 0:
                    raise KeyboardInterrupt
                super().do([pair])

    world = World(300, 0.5, planted=0.08)
    whole = race(table(world, budget=115))
    trials = Stopping(world, np.random.default_rng(0), 115)
    trials.stop = stop
    with pytest.raises(KeyboardInterrupt):
        race(trials)
    trials.stop = 0.0
    assert race(trials) == whole


def test_a_costly_arm_must_be_likely_better():
    """With a gain within the noise, the arm of twice the cost stays out, and that of equal cost is taken."""
    stage = [Stage("one", lambda chosen: [("heads 1",)])]
    for seed in range(20):
        world = World(300, 0.0, planted=0.004)
        cheap, costly = table(world, seed), table(world, seed)
        costly.seconds = lambda recipe: 2.0 if recipe else 1.0
        belief = next(s.belief for s in race(cheap, stages=stage).standings if s.repeats == 2)
        if 0.5 < belief.positive < 0.75:
            break
    assert ("heads 1",) in race(cheap, stages=stage).chosen.values()
    assert race(costly, stages=stage).standings[-2].fate != "chosen"


def test_equals_are_decided_by_the_loss():
    stage = [Stage("two", lambda chosen: [("heads 0",), ("heads 1",)])]

    class Twins(Table):
        def train(self, recipe, repeat):
            twin = self.drawn.get((("heads 0",), repeat))
            return super().train(recipe, repeat) if twin is None or recipe != ("heads 1",) else twin

    trials = Twins(World(300, 0.0), np.random.default_rng(0))
    trials.gains["heads 0"] = 0.05
    for better in ("heads 0", "heads 1"):
        trials.losses = lambda recipe, repeats, better=better: (
            trials.values(recipe, repeats) * 0 + (0.2 if better in recipe else 0.9)
        )
        assert set(race(trials, stages=stage).chosen.values()) == {(better,)}


def test_a_frozen_recipe_can_win_but_nothing_is_put_on_top_of_it():
    seen = []

    def arms(chosen):
        seen.append(chosen)
        return [("heads 0",)]

    trials = table(World(300, 0.0))
    trials.gains |= {"methods 3": 0.1, "heads 0": 0.0}
    end = race(trials, stages=[Stage("one", arms), Stage("two", arms)], frozen=[("methods 3",)])
    assert end.ship == ("methods 3",)
    assert set(seen) <= {(), ("heads 0",)}


def test_a_budget_below_one_cross_validation_is_an_error():
    with pytest.raises(UsageError, match="plain fine-tuning has no scores: the budget ended"):
        race(table(budget=4))


def test_rules_are_options():
    trials = table(World(300, 0.5, planted=0.08))
    end = race(trials, rules=dataclasses.replace(Rules(), rungs=1, fresh=1))
    assert (end.fresh, max(repeat for _, repeat in trials.drawn)) == (1, 1)


def test_what_fails_while_it_is_judged_is_not_shipped():
    """Naive: what was chosen is shipped, although it is listed as dropped."""

    class Failing(Table):
        bad: tuple = ()

        def do(self, wanted):
            for recipe, repeat in wanted:
                if recipe and repeat >= 2:
                    self.bad = (*self.bad, recipe)
                else:
                    super().do([(recipe, repeat)])

        def trouble(self, recipe):
            return "out of memory" if recipe in self.bad else None

    trials = Failing(World(300, 0.0, planted=0.15), np.random.default_rng(0), 200)
    end = race(trials, stages=[Stage("one", lambda chosen: [("heads 0",), ("heads 1",)])])
    assert end.dropped == {("heads 1",): "out of memory"}
    assert (end.ship, end.chosen, end.gain.value, end.verdict) == ((), {"A": (), "B": ()}, 0.0, "not shown")
    assert {recipe for recipe, repeat in trials.drawn if repeat >= 2} == {()}, "plain is judged by fresh trainings"


def test_arms_that_the_budget_ends_in_their_first_repeat_are_named():
    class Slow(Table):
        def do(self, wanted):
            for recipe, repeat in wanted:
                cost = 25 if recipe else 5
                if not self.has(recipe, repeat) and self.left >= cost:
                    self.left -= cost
                    self.drawn[recipe, repeat] = self.train(recipe, repeat)

    trials = Slow(World(300, 0.0), np.random.default_rng(0), 90)
    end = race(trials, stages=[Stage("one", lambda chosen: [("heads 0",), ("heads 1",), ("heads 2",), ("methods 0",)])])
    assert {s.arm for s in end.standings} | {*end.untried} == {("heads 0",), ("heads 1",), ("heads 2",), ("methods 0",)}
    assert not {s.arm for s in end.standings} & {*end.untried}


def test_recorded_trainings_judge_although_the_budget_is_spent():
    """Naive: a time budget that overran leaves less than nothing, and a resumed search discards what has judged."""
    trials = table(World(300, 0.5, planted=0.08), budget=115)
    first = race(trials)
    assert first.fresh
    trials.left = -0.5
    again = race(trials)
    assert (again.verdict, again.fresh, again.gain) == (first.verdict, first.fresh, first.gain)
