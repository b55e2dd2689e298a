"""How long the runs of a study take, estimated from records or from a few measured steps. No torch at import."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..fitting.options import Options
from ..fitting.spelling import make_methods, make_procedure
from .records import FOLDER, read_records
from .spec import Trial
from .store import Store

Key = tuple[str, str, int | None]  # model, task, number of rows: such runs differ in time by their recipe only


@dataclass(frozen=True)
class Pace:
    """How fast runs of one model on one task are.

    Attributes:
        rows: Number of training rows.
        per_row: Seconds of a forward and a backward pass over one training row.
        fixed: Seconds that do not depend on the recipe: loading and testing.
    """

    rows: int
    per_row: float
    fixed: float

    def seconds(self, options: Options, passes: float) -> float:
        """Seconds of a run.

        Args:
            options: Options of its recipe.
            passes: Passes of a step of the recipe, as a multiple of those of a plain step.
        """
        at_once = min(options.batch_size, self.rows) * options.accumulation
        return self.fixed + options.total_steps(self.rows) * at_once * passes * self.per_row


@dataclass(frozen=True)
class Forecast:
    """How long runs take, one after another on this machine.

    Attributes:
        seconds: Seconds by task and rows, summed over its runs.
        unknown: Recipe of each run whose time cannot be estimated; the sums leave these runs out.
    """

    seconds: Mapping[str, float]
    unknown: Sequence[str]

    def __str__(self) -> str:
        lines = [f"{name}: {_minutes(seconds)}" for name, seconds in self.seconds.items()]
        lines.append(f"together {_minutes(sum(self.seconds.values()))}, one run after another")
        if self.unknown:
            counts = ", ".join(f"{count} of {recipe}" for recipe, count in Counter(self.unknown).items())
            lines.append(f"not counted are runs of which no record tells how long they take: {counts}")
        return "\n".join(lines)


def _minutes(seconds: float) -> str:
    return f"about {seconds / 60:.1f} minutes" if seconds >= 6 else "less than 0.1 minutes"


def forecast(runs: Sequence[Trial], store: Store) -> Forecast:
    """Estimate how long runs take.

    A run takes as long as the recorded runs of its recipe. If there are none, its time follows from its steps, from the
    passes of its methods and procedure, and from the pace of other runs of the same model and task, recorded or
    measured. Of trainings on other texts, and of a procedure whose passes are not known, only records tell the
    time.

    Args:
        runs: Runs still to be done.
        store: Folder of the records; nothing is written.

    Raises:
        UsageError: The plan of a run cannot be made.
    """
    done = read_records(store.folder)[0] if (store.folder / FOLDER).is_dir() else []
    done = [record for record in done if record["status"] == "done"]
    paces: dict[Key, Pace] = {}
    for record in done:
        if (pace := recorded(record)) is not None:
            paces.setdefault(key(record["spec"]), pace)
    seconds: dict[str, float] = {}
    unknown = []
    for run in sorted(
        runs, key=lambda run: (_untrained(run), run.procedure is not None, run.soup, len(run.methods))
    ):  # plain runs first: these are measured
        same = [r["cost"]["seconds"] for r in done if _recipe(r["spec"]) == _recipe(run.spec)]
        if same:
            took = sum(same) / len(same)
        elif key(run.spec) in paces or not (_untrained(run) or run.procedure or run.soup > 1):
            if key(run.spec) not in paces:
                paces[key(run.spec)] = measure(run)
            pace, options = paces[key(run.spec)], Options.of(run.spec["options"])
            several = _procedure_passes(run, options, pace.rows)
            if several is None:
                unknown.append(run.spec["recipe"])
                continue
            took = pace.seconds(options, run.soup * (passes(run.methods) - 1 + several))
        else:
            unknown.append(run.spec["recipe"])
            continue
        name = " ".join(str(part) for part in key(run.spec) if part is not None)
        seconds[name] = seconds.get(name, 0.0) + took
    return Forecast(seconds, unknown)


def _procedure_passes(run: Trial, options: Options, rows: int) -> float | None:
    """Passes of a run's procedure as a multiple of plain fine-tuning's; 1 without one, None if they are not known."""
    procedure = make_procedure(run.procedure)
    if run.aux or run.pretrain is not None:  # other rows, other lengths
        return None
    return 1.0 if procedure is None else procedure.passes(options, rows)


def _untrained(run: Trial) -> bool:
    """Whether a run takes no step, so that nothing can be measured on it."""
    return bool(run.spec["options"].get("steps") == 0)


def key(spec: Mapping[str, Any]) -> Key:
    """The part of a specification that decides the pace."""
    return spec["task"]["name"], spec["model"]["name"], spec["train_size"]


def _recipe(spec: Mapping[str, Any]) -> tuple[Any, ...]:
    return *key(spec), spec["methods"], spec["options"]


def recorded(record: Mapping[str, Any]) -> Pace | None:
    """Pace of a recorded run; None for a record without the figures."""
    cost, training = record["cost"], record["training"]
    if not all([cost.get("train_seconds"), cost.get("passes"), training and training.get("steps")]):
        return None
    options = Options.of(record["spec"]["options"])
    at_once = min(options.batch_size, training["rows"]) * options.accumulation
    per_row = cost["train_seconds"] / (training["steps"] * at_once * cost["passes"])
    return Pace(training["rows"], per_row, cost["seconds"] - cost["train_seconds"])


def measure(run: Trial) -> Pace:
    """Train a few steps of a run in a temporary folder, as the dry run of `fit` does."""
    from ..fitting import plan as planning
    from ..fitting.estimate import estimate
    from .run import make_plan, silent

    with silent():
        plan = make_plan(run)
        pretrained = planning.open_model(plan)
        measured = estimate(lambda folder: planning.make_setup(plan, pretrained, folder), planning.runs(plan), plan)
    at_once = min(plan.options.batch_size, len(plan.data.train)) * plan.options.accumulation
    training = measured.steps * measured.seconds_per_step
    per_row = measured.seconds_per_step / at_once / passes(run.methods)
    return Pace(len(plan.data.train), per_row, 60 * measured.minutes - training)


def passes(methods: Iterable[str]) -> float:
    """Passes of a step with these methods, as a multiple of those of a plain step."""
    return 1 + sum(type(method).cost.passes - 1 for method in make_methods(list(methods)))
