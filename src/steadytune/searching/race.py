"""The race of recipes over repeats of a cross-validation, judged on rows that did not choose. NumPy and SciPy only.

The rows are halved for scoring; every training sees the rows of both halves. Path A eliminates recipes by their scores
on half A, path B by those on half B, and each path's last recipe is judged on the other half, by trainings that did not
choose. Both paths share their trainings. The gain is that of the procedure

    gain = (score_B(chosen by A) - score_B(plain) + score_A(chosen by B) - score_A(plain)) / 2

which is slightly pessimistic, because each path chooses by half of the rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from .estimates import Array, Estimate, Posterior, Verdict, Whole, halved, shrunk, two_way, verdict

PATHS = ("A", "B")
Arm = Any  # a recipe: hashable, and str(arm) is its name


class Trials(Protocol):
    """Trainings of recipes; a repeat of a recipe is one training for each fold."""

    def do(self, wanted: Sequence[tuple[Arm, int]]) -> None:
        """Do the repeats that are missing, in this order, until the budget is over."""
        ...

    def has(self, arm: Arm, repeat: int, /) -> bool:
        """Whether all folds of a repeat were done."""
        ...

    def values(self, arm: Arm, repeats: Sequence[int], /) -> Array:
        """Share of each row in the score, shape (repeats, rows); larger is better."""
        ...

    def losses(self, arm: Arm, repeats: Sequence[int], /) -> Array:
        """Loss of each row, shape (repeats, rows)."""
        ...

    def trouble(self, arm: Arm, /) -> str | None:
        """Why an arm cannot go on: it failed or collapsed."""
        ...

    def cost(self, arm: Arm, /) -> float:
        """Cost of a repeat, in the unit of `left`."""
        ...

    def seconds(self, arm: Arm, /) -> float:
        """Time of a repeat."""
        ...

    def further(self, arm: Arm, /) -> float:
        """What the last fit costs with an arm beside what `left` leaves for it."""
        ...

    @property
    def left(self) -> float:
        """What is left of the budget, without the last fit."""
        ...

    @property
    def whole(self) -> float:
        """The whole budget, without the last fit; a race that goes on finds it as it was."""
        ...


@dataclass(frozen=True)
class Sheet:
    """Which half judges a row, which fold predicts it, and which rows belong together.

    Attributes:
        half: Which rows are in half A, shape (rows,).
        folds: Fold of each row in each repeat, shape (repeats, rows).
        units: Number of the unit of each row, shape (rows,). Rows of one unit share half and folds.
    """

    half: NDArray[np.bool_]
    folds: Whole
    units: Whole

    def rows(self, path: str) -> NDArray[np.bool_]:
        """Rows by which a path chooses."""
        return self.half if path == PATHS[0] else ~self.half

    def blocks(self, repeats: Sequence[int]) -> Whole:
        """Number of the training of each value, shape (repeats, rows)."""
        folds = self.folds[list(repeats)]
        return folds + np.arange(len(folds))[:, None] * (folds.max() + 1)

    def mean(self, values: Array, repeats: Sequence[int], path: str) -> Estimate:
        """Mean of values (repeats, rows) over the rows by which a path chooses."""
        rows = self.rows(path)
        return two_way(values[:, rows], self.blocks(repeats)[:, rows], self.units[rows])

    def both(self, values: Array, repeats: Sequence[int]) -> Estimate:
        """Mean of values (repeats, rows) over both halves, which count the same."""
        return halved(values, self.blocks(repeats), self.units, self.half)


@dataclass(frozen=True)
class Stage:
    """Arms that are tried on top of what earlier stages have chosen.

    Attributes:
        name: Name in reports.
        arms: Function of the recipe chosen so far that gives the arms, the most promising first.
    """

    name: str
    arms: Callable[[Any], Sequence[Arm]]


@dataclass(frozen=True)
class Rules:
    """Constants of the race.

    Attributes:
        rungs: Number of repeats that choose: after each, the weaker arms of a stage stop.
        fresh: Number of further repeats that judge.
        kept: Share of the arms that go on to the next repeat, at least two of them.
        hopeless: An arm whose probability of being better than the best one is below this stops.
        costly: Time, as a multiple of that of the recipe it would replace, from which a recipe must be `likely` better.
        likely: That probability.
        least: Smallest standard deviation of true gains over arms, in units of the metric.
    """

    rungs: int = 2
    fresh: int = 2
    kept: float = 1 / 3
    hopeless: float = 0.05
    costly: float = 1.5
    likely: float = 0.75
    least: float = 0.01


@dataclass(frozen=True)
class Standing:
    """An arm on one path after a repeat.

    Attributes:
        stage: Name of the stage.
        path: Path that judges.
        repeats: Number of repeats so far.
        arm: The arm.
        gain: Gain over the recipe that the path had chosen before the stage, on the path's rows.
        belief: The gain after shrinkage.
        fate: "kept", "stopped", or "chosen".
    """

    stage: str
    path: str
    repeats: int
    arm: Arm
    gain: Estimate
    belief: Posterior
    fate: str = "kept"


@dataclass(frozen=True)
class Outcome:
    """Result of a race.

    Attributes:
        ship: Recipe to use.
        belief: Belief about the gain of `ship` on these rows; None for plain.
        chosen: Recipe that each path has chosen.
        gain: Gain of the procedure over plain, on rows that did not choose.
        verdict: What may be said about the gain.
        fresh: Number of repeats that judged and did not choose.
        level: Score of the procedure, on rows that did not choose.
        detectable: Smallest gain that these rows and trainings would show in 80 of 100 tables; None if no arm ran.
        standings: What happened in each stage.
        untried: Arms for which the budget was too small, also those that it ended in the first repeat.
        dropped: Arms that failed, collapsed or were worse than a frozen recipe on a half of the rows, with the reason.
    """

    ship: Arm
    belief: Posterior | None
    chosen: Mapping[str, Arm]
    gain: Estimate
    verdict: Verdict
    fresh: int
    level: Estimate
    detectable: float | None
    standings: Sequence[Standing]
    untried: Sequence[Arm]
    dropped: Mapping[Arm, str]


@dataclass
class Race:
    """A race in progress.

    Args:
        plain: The recipe to beat.
        stages: Stages in their order.
        trials: Does trainings and gives their scores.
        sheet: Halves and folds.
        frozen: Cheap recipes without training, which every stage compares its arms with, and of which one may be
            chosen in the end.
        rules: Constants.
    """

    plain: Arm
    stages: Sequence[Stage]
    trials: Trials
    sheet: Sheet
    frozen: Sequence[Arm] = ()
    rules: Rules = field(default_factory=Rules)
    chosen: dict[str, Arm] = field(init=False)
    standings: list[Standing] = field(init=False, default_factory=list)
    tried: dict[Arm, None] = field(init=False, default_factory=dict)
    untried: dict[Arm, None] = field(init=False, default_factory=dict)
    stage: str = field(init=False, default="plain")
    _judgings: int = field(init=False, default=0)
    _behind: dict[Arm, Arm] = field(init=False, default_factory=dict)  # arms that a frozen recipe has beaten

    def run(self) -> Outcome:
        """Run all stages, and judge what they have chosen."""
        self.chosen = dict.fromkeys(PATHS, self.plain)
        self.trials.do([(self.plain, 0)])
        if not self.trials.has(self.plain, 0):
            why = self.trials.trouble(self.plain) or "the budget ended before its first cross-validation was done"
            raise UsageError(f"there is nothing to compare with, because plain fine-tuning has no scores: {why}.")
        self.trials.do([(arm, 0) for arm in self.frozen])
        self._judgings = min(self.rules.fresh, int(self.trials.whole / (2 * 3 * self.trials.cost(self.plain))))
        for stage in self.stages:
            self._run(stage)
        self._compare_with_frozen()
        return self._judged()

    # ---- stages

    def _run(self, stage: Stage) -> None:
        self.stage = stage.name
        alive = {path: [arm for arm in stage.arms(self.chosen[path]) if arm != self.chosen[path]] for path in PATHS}
        last: dict[str, list[Standing]] = {path: [] for path in PATHS}
        for rung in range(self.rules.rungs):
            alive = self._affordable(alive, rung)
            if not any(alive.values()):
                break
            wanted = dict.fromkeys([self.plain, *self.chosen.values(), *self.frozen, *self._together(alive)])
            self.tried |= wanted
            self.trials.do([(arm, rung) for arm in wanted])
            if not rung:
                self.untried |= dict.fromkeys(arm for arm in self._together(alive) if self._cut_short(arm))
            for path in PATHS:
                standings = self._standings(stage.name, path, alive[path], rung + 1)
                if standings:
                    last[path] = standings
                alive[path] = [s.arm for s in standings if s.fate == "kept"]
        for path in PATHS:
            self._choose(path, last[path])

    def _cut_short(self, arm: Arm) -> bool:
        """Whether the budget ended within the first repeat of an arm."""
        return self.trials.trouble(arm) is None and not self.trials.has(arm, 0)

    def _together(self, alive: Mapping[str, Sequence[Arm]]) -> list[Arm]:
        """Arms of both paths, those of the same place in the stage side by side."""
        pairs = itertools.zip_longest(*(alive[path] for path in PATHS))
        return [arm for arm in dict.fromkeys(itertools.chain.from_iterable(pairs)) if arm is not None]

    def _affordable(self, alive: Mapping[str, Sequence[Arm]], rung: int) -> dict[str, list[Arm]]:
        """The arms that the budget allows beside judging and the last fit: first those that fit; later all or none."""
        left = self.trials.left - sum(self._missing(arm, rung) for arm in {*self.chosen.values(), self.plain})
        arms, fit = self._together(alive), list[Arm]()
        for arm in arms:
            several = [*fit, arm]
            kept = self._kept_for_judging(several) + max(self.trials.further(each) for each in several)
            missing = sum(self._missing(each, rung) for each in several)
            if not missing or missing <= left - kept:  # a race that goes on has spent what is done
                fit = several
        if rung and len(fit) < len(arms):
            fit = []
        if not rung:
            self.untried |= dict.fromkeys(arm for arm in arms if arm not in fit)
        return {path: [arm for arm in alive[path] if arm in fit] for path in PATHS}

    def _kept_for_judging(self, arms: Sequence[Arm]) -> float:
        """Budget for judging plain and two recipes, where each of these arms may be chosen.

        It is for as many repeats of recipes that cost as much as plain as leave half of the budget for choosing, and
        for at least one repeat of the most costly: without a repeat that judges, no gain may be called shown.
        """
        if not self._judgings:
            return 0.0
        plain = self.trials.cost(self.plain)
        dear = sorted(self.trials.cost(arm) for arm in {*self.chosen.values(), *arms})[-2:]
        return max(self._judgings * 3 * plain, plain + sum(dear))

    def _missing(self, arm: Arm, repeat: int) -> float:
        return 0.0 if self.trials.has(arm, repeat) else self.trials.cost(arm)

    def _standings(self, stage: str, path: str, arms: Sequence[Arm], repeats: int) -> list[Standing]:
        """Arms that were done, the best belief first; the weaker ones are stopped."""
        before = self.chosen[path]
        running = [arm for arm in arms if self._done(arm, repeats)]
        if not running or not self._done(before, repeats):
            return []
        others = [arm for arm in self.frozen if arm not in running and self._done(arm, repeats)]
        gains = [self._gain(path, arm, before, range(repeats)) for arm in (*running, *others)]
        beliefs = shrunk(gains, self.rules.least)
        best = max(beliefs, key=lambda belief: belief.mean)
        ahead = (*running, *others)[beliefs.index(best)]
        ranked = sorted(range(len(running)), key=lambda i: -beliefs[i].mean)
        places = max(2, round(self.rules.kept * len(running)))
        standings = []
        for place, i in enumerate(ranked):
            hopeless = beliefs[i] is not best and beliefs[i].above(best) < self.rules.hopeless
            if hopeless and ahead in others:
                self._behind[running[i]] = ahead
            fate = "stopped" if hopeless or place >= places else "kept"
            standings.append(Standing(stage, path, repeats, running[i], gains[i], beliefs[i], fate))
        self.standings += standings
        return standings

    def _choose(self, path: str, standings: Sequence[Standing]) -> None:
        """Replace the path's recipe by the best arm, if it is believed to be better.

        Of arms within a standard error of the best one, the lowest loss decides, then the shortest time.
        """
        standings = [s for s in standings if s.fate == "kept" and self.trials.trouble(s.arm) is None]
        if not standings:
            return
        best, repeats, before = standings[0], range(standings[0].repeats), self.chosen[path]
        near = [s for s in standings if best.belief.mean - s.belief.mean <= self._apart(path, best.arm, s.arm, repeats)]
        near = [s for s in near if s.belief.mean > 0] or near
        loss = {s.arm: self.trials.losses(s.arm, repeats) for s in near}
        least = min(loss.values(), key=lambda values: values[:, self.sheet.rows(path)].mean())
        equal = [s for s in near if (gap := self.sheet.mean(loss[s.arm] - least, repeats, path)).value <= gap.error]
        best = min(equal, key=lambda s: self.trials.seconds(s.arm))
        costly = self.trials.seconds(best.arm) >= self.rules.costly * self.trials.seconds(before)
        if best.belief.mean > 0 and (not costly or best.belief.positive >= self.rules.likely):
            self.chosen[path] = best.arm
            self.standings = [replace(s, fate="chosen") if s is best else s for s in self.standings]

    def _compare_with_frozen(self) -> None:
        """Let a path end with a frozen recipe, if it is believed to be better than the trained one."""
        self.stage = "frozen"
        self.trials.do([(arm, repeat) for arm in self.frozen for repeat in range(self.rules.rungs)])
        able = [arm for arm in self.frozen if self._done(arm, 1)]
        for path in PATHS:
            repeats = self._repeats([self.chosen[path], *able], self.rules.rungs)
            if able and repeats:
                self._choose(path, self._standings("frozen", path, able, len(repeats)))

    # ---- the end

    def _judged(self) -> Outcome:
        """Judge the chosen recipes on the rows that did not choose them, by trainings that did not either."""
        self.stage = "judging"
        chosen = self._sound()
        fresh: list[int] = []
        for repeat in range(self.rules.rungs, self.rules.rungs + self.rules.fresh):
            missing = sum(self._missing(arm, repeat) for arm in chosen)
            if len(chosen) == 1 or (missing and missing > self.trials.left):  # what is recorded costs nothing
                break
            self.trials.do([(arm, repeat) for arm in chosen])
            chosen = self._sound()
            if not all(self.trials.has(arm, repeat) for arm in chosen):
                break
            fresh.append(repeat)
        repeats = fresh or self._repeats(chosen, self.rules.rungs)
        plain = self.trials.values(self.plain, repeats)
        level = self._crossed(repeats)
        gain = self.sheet.both(level - plain, repeats)
        ship, belief = self._shipped(repeats, gain)
        return Outcome(
            ship, belief, dict(self.chosen), gain, verdict(gain, bool(fresh)), len(fresh),
            self.sheet.both(level, repeats), self._detectable(gain), self.standings, list(self.untried),
            self._dropped(),
        )  # fmt: skip

    def _sound(self) -> list[Arm]:
        """Plain and what the paths have chosen; plain takes the place of what came into trouble since."""
        for path, arm in self.chosen.items():
            if self.trials.trouble(arm) is not None:
                self.chosen[path] = self.plain
        return list(dict.fromkeys([self.plain, *self.chosen.values()]))

    def _crossed(self, repeats: Sequence[int]) -> Array:
        """Values (repeats, rows) of what the other half has chosen for each row."""
        a, b = (self.trials.values(self.chosen[path], repeats) for path in PATHS)
        return np.where(self.sheet.half, b, a)

    def _shipped(self, repeats: Sequence[int], judged: Estimate) -> tuple[Arm, Posterior | None]:
        """The chosen recipe that is believed to be the best on all rows; plain if neither is better."""
        arms = [arm for arm in dict.fromkeys(self.chosen.values()) if arm != self.plain]
        gains = [self.over_plain(arm, repeats) for arm in arms]
        beliefs = shrunk(gains, self.rules.least)
        if not arms:
            return self.plain, None
        arm, belief = max(zip(arms, beliefs, strict=True), key=lambda pair: (pair[1].mean, str(pair[0])))
        costly = self.trials.seconds(arm) >= self.rules.costly * self.trials.seconds(self.plain)
        if belief.mean <= 0 or (costly and judged.positive < self.rules.likely):
            return self.plain, None
        return arm, belief

    def _detectable(self, gain: Estimate) -> float | None:
        """Of the procedure; if it gave plain, of the arms that ran, on all rows."""
        if gain.error:
            return gain.detectable
        ran = dict.fromkeys(s.arm for s in self.standings)
        errors = [self.over_plain(arm, self._repeats([arm, self.plain], self.rules.rungs)).detectable for arm in ran]
        return float(np.median(errors)) if errors else None

    def _dropped(self) -> dict[Arm, str]:
        troubled = {arm: reason for arm in self.tried if (reason := self.trials.trouble(arm)) is not None}
        behind = {arm: f"it is worse than {ahead}" for arm, ahead in self._behind.items()}
        return {arm: why for arm, why in (behind | troubled).items() if arm not in self.chosen.values()}

    # ---- shared

    def _done(self, arm: Arm, repeats: int) -> bool:
        return self.trials.trouble(arm) is None and all(self.trials.has(arm, repeat) for repeat in range(repeats))

    def _repeats(self, arms: Sequence[Arm], most: int) -> range:
        """The first repeats that all these arms have."""
        return range(next((r for r in range(most) if not all(self.trials.has(arm, r) for arm in arms)), most))

    def _difference(self, arm: Arm, other: Arm, repeats: Sequence[int]) -> Array:
        return self.trials.values(arm, repeats) - self.trials.values(other, repeats)

    def _gain(self, path: str, arm: Arm, other: Arm, repeats: Sequence[int]) -> Estimate:
        return self.sheet.mean(self._difference(arm, other, repeats), repeats, path)

    def over_plain(self, arm: Arm, repeats: Sequence[int]) -> Estimate:
        """Gain over plain on all rows. Of an arm that was chosen by it, it is too good."""
        return self.sheet.both(self._difference(arm, self.plain, repeats), repeats)

    def _apart(self, path: str, arm: Arm, other: Arm, repeats: Sequence[int]) -> float:
        return 0.0 if arm == other else self._gain(path, arm, other, repeats).error
