"""Report of a bench: one self-contained HTML page, the same in Markdown, and the numbers as CSV. No torch here.

Equal records give equal files, byte for byte.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from ...data.metrics import smaller_is_better
from ...errors import UsageError
from ...files.atomic import write_whole, writing
from ...pages.document import Block, Cell, Code, Figures, Grid, Section, Text, Warning, html, markdown
from ...pages.drawing import looks, marker
from ...pages.words import NONE, call_words, chance, counted, interval, listed, number
from ..records import STUDY, planned, read_records
from . import figures, tables
from .verdict import verdict

PANELS = 24  # largest number of panels of one kind of figure
LISTED = 50  # largest number of failed runs, and of skipped files, that are listed
DOMAIN = {"in": "In domain", "out": "Out of domain"}
POINTS = ("mean", "sd", "iqm", "median", "min", "max")
FIRST = 3  # number of runs to do that are named
LOSSES = ("failed", "missing", "undefined", "collapsed")
OUTLIER = 3  # the axis leaves out ends of intervals this many times as far out as most others
WORST = "worst of each run"  # line of the subgroup with the lowest score of each run
FEW = 6  # with fewer pairs, p of the sign-flip test cannot fall below 0.05


class Bench:
    """Contents of the folder of a bench as frames of `tables`, in the order of the study file.

    Args:
        folder: Folder of the bench.
        metric: The score, where it is not each task's headline metric.

    Raises:
        UsageError: There is no such folder, it is not that of a bench, or no usable record has the metric.
    """

    def __init__(self, folder: Path, metric: str | None = None) -> None:
        self.name = folder.resolve().name
        self.records, self.problems = read_records(folder)
        if not self.records:
            why = " ({}: {})".format(*self.problems[0]) if self.problems else ""
            raise UsageError(f"{folder}: no usable record of a run{why}. Run the bench first.")
        study = folder / STUDY
        self.study = study.read_text(encoding="utf-8", errors="replace") if study.is_file() else ""
        done = {record["id"] for record in self.records}
        plans = planned(folder)
        self.to_do = [title for id, title in plans.items() if id not in done]
        self.superseded = tables.superseded(self.records, plans)
        self.runs = tables.long_form(self.records, metric, self.superseded)
        self.parts = tables.by_subgroup(self.records, self.runs)
        self.scores = self._ordered(tables.per_run(self.runs))
        self.models, self.tasks, self.settings = (self._names(name) for name in tables.CONDITION)
        self.recipes = tables.in_order(self.scores["recipe"], self.study, "recipes")
        self.baseline = tables.baseline_of(self.recipes)
        self.recipes.sort(key=lambda recipe: recipe != self.baseline)
        self.looks = looks(self.recipes)
        self.cells = tables.summaries(self.scores, self.recipes)
        self.gains, self.overall = tables.comparisons(self.scores, self.recipes, self.baseline)

    def _ordered(self, scores: pd.DataFrame) -> pd.DataFrame:
        ranks = {
            name: {
                recipe_name: rank
                for rank, recipe_name in enumerate(tables.in_order(scores[name], self.study, f"{name}s"))
            }
            for name in ("model", "task")
        }
        order = pd.DataFrame({name: scores[name].map(rank) for name, rank in ranks.items()}).assign(
            size=scores["train_size"].fillna(np.inf),
            setting=scores["setting"],
            length=scores["seed"].str.len(),  # 10 comes after 9
            seed=scores["seed"],
            id=scores["id"],
        )
        return scores.loc[order.sort_values(list(order.columns)).index]

    def _names(self, column: str) -> list[str]:
        return list(self.scores[column].unique())

    @property
    def domains(self) -> list[str]:
        """Domains with a score."""
        return [domain for domain in tables.DOMAINS if self.scores[domain].notna().any()]

    def within(self, *names: str) -> str:
        """A model, task or setting in words; the model is left out if there is only one."""
        return ", ".join(name for name in names if len(self.models) > 1 or name not in self.models)

    def titled(self, words: str, model: str) -> str:
        """Beginning of a caption: the words, and the model if there are several."""
        return f"{words}, {model}" if len(self.models) > 1 else words

    @property
    def summary(self) -> pd.DataFrame:
        """One row for each cell and domain: scores, and gain over the baseline, in the metrics' own units."""
        keys = [*tables.CELL, "domain"]
        if self.gains.empty:
            return self.cells
        gains = self.gains.drop(columns="metric").rename(columns={"n": "pairs", "low": "gain_low", "high": "gain_high"})
        return self.cells.merge(gains, on=keys, how="left")


def write_report(folder: str | Path, output: str | Path | None = None, metric: str | None = None) -> Path:
    """Write report.html, report.md, runs.csv and summary.csv.

    Args:
        folder: Folder of a bench.
        output: Folder for the files; by default that of the bench.
        metric: The score to report, where it is not each task's headline metric.

    Returns:
        The HTML file.

    Raises:
        UsageError: As for `Bench`, or the files cannot be written.
    """
    bench = Bench(Path(folder), metric)
    title, sections = f"Bench report: {bench.name}", make_sections(bench)
    output = Path(folder if output is None else output)
    lead = _lead(bench)
    texts = {
        "report.html": html(title, sections, lead),
        "report.md": markdown(title, sections, lead),
        "runs.csv": _csv(bench.runs.drop(columns=["headline", "headline_metric", "score"])),
        "summary.csv": _csv(bench.summary),
    }
    if output.exists() and not output.is_dir():
        raise UsageError(f"output {output} is a file: choose another --output DIR.")
    with writing(output, resumes=False):
        output.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_whole(output / name, partial(_write, text))
    return output / "report.html"


def _lead(bench: Bench) -> str:
    if not (bench.scores["status"] == "done").any():
        return "Nothing is compared: all runs failed."
    return verdict(bench.gains, bench.overall, bench.domains, bench.baseline)


def _csv(frame: pd.DataFrame) -> str:
    """CSV with all digits; whole numbers stay whole in columns with gaps."""
    return frame.convert_dtypes().to_csv(index=False, lineterminator="\n")


def _write(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")  # a lone surrogate from JSON cannot be written as UTF-8


def make_sections(bench: Bench) -> list[Section]:
    """All sections of the report."""
    parts: dict[str, Callable[[Bench], Iterator[Block]]] = {
        "What was run": _overview,
        "Scores": _scores,
        "Subgroups": _subgroups,
        "Gains over the baseline": _gains,
        "Steadiness": _steadiness,
        "Figures": _figures,
        "Cost": _costs,
        "Context": _context,
    }
    contents = {title: list(blocks(bench)) for title, blocks in parts.items()}
    return [Section(title, blocks) for title, blocks in contents.items() if blocks]


# ---- what was run -----------------------------------------------------------------------------------------------


def _overview(bench: Bench) -> Iterator[Block]:
    status = bench.scores["status"].value_counts()
    done, failed = int(status.get("done", 0)), int(status.get("failed", 0))
    missing = int(bench.cells[bench.cells["domain"] == "in"]["missing"].sum())
    seeds = bench.scores.groupby(tables.CONDITION)["seed"].nunique()
    each = f"{seeds.min()}" if seeds.min() == seeds.max() else f"{seeds.min()} to {seeds.max()}"
    yield Text(
        f"{counted(len(bench.models), 'model')} ({listed(bench.models)}), {counted(len(bench.tasks), 'task')} "
        f"({listed(bench.tasks)}), trained on {listed(bench.settings)}, with {counted(len(bench.recipes), 'recipe')} "
        f"({listed(bench.recipes)}) and {each} seeds each. {counted(done + failed, 'run')} recorded: {done:,} done, "
        f"{failed:,} failed; {missing:,} missing, counted against every combination of recipe, condition and seed."
    )
    if bench.to_do:
        first = "; ".join(bench.to_do[:FIRST]) + ("; ..." if len(bench.to_do) > FIRST else "")
        yield Warning(f"The study is not finished: {counted(len(bench.to_do), 'run')} to do ({first}).")
    if not done:
        yield Warning("No run is done, so there are no scores to show.")
    elif not bench.domains:
        yield Warning("No finished run has a score.")
    else:
        yield Text(_how_to_read(bench))
    yield from _warnings(bench)
    yield from _contamination(bench)


def _how_to_read(bench: Bench) -> str:
    metrics = bench.scores.drop_duplicates("task")[["task", "metric"]].itertuples(index=False)
    errors = [m for m in bench.scores["metric"].unique() if smaller_is_better(m)]
    units = f" (but {listed(errors)}, in its own unit, where less is better)" if errors else ""
    names = listed(f"{task} {metric.replace('_', ' ')}" for task, metric in metrics)
    return (
        f"Scores are × 100{units}: {names}. A number is the mean over n runs that differ in nothing but their seeds, "
        f"± their standard deviation. Recipes are compared with {bench.baseline} seed by seed, and gains are positive "
        "where the recipe is better. A failed run ended in an error and has no score; a collapsed one has a score, at "
        "most 0.01 above always predicting the majority class, and counts. Intervals are 95 %."
    )


def _warnings(bench: Bench) -> Iterator[Warning]:
    if bench.superseded:
        yield Warning(
            f"{counted(len(bench.superseded), 'run')} left out: a later or planned run of the same recipe, task and "
            "size has another configuration, or repeats the seed. See Context; runs.csv marks them as not used."
        )
    mixed = [name for name, values in tables.contexts(bench.records).items() if len(values) > 1]
    if mixed:
        yield Warning(
            f"Runs differ in their context ({listed(mixed)}): their scores and times may not compare. See Context."
        )
    if bench.problems:
        yield Warning(f"{counted(len(bench.problems), 'file')} in records/ could not be used; see Context.")
    crossed = {record["spec"]["task"]["name"] for record in bench.records if "folds" in record["spec"]["task"]}
    if crossed:
        yield Warning(
            f"{listed(sorted(crossed))}: each seed scores the rows of one held-out fold. Training rows of folds "
            "overlap, so their scores are not independent: intervals are too narrow and p-values too small."
        )
    factorial = [str(task) for task, runs in bench.runs.groupby("task") if tables.shares_seeds(runs)]
    if factorial:
        yield Warning(
            f"{listed(factorial)}: runs share some of their seeds (factorial), so that their scores are not "
            "independent: intervals are too narrow and p-values too small."
        )
    if not bench.gains.empty and bench.gains["n"].min() < FEW:
        least = bench.gains["n"].min()
        yield Warning(
            f"Few seeds can show little: the sign-flip test of {counted(least, 'pair')} cannot give a p below "
            f"{2.0 ** (1 - least):.3g}."
        )


def _contamination(bench: Bench) -> Iterator[Text]:
    sets_seen = tables.seen(bench.records)
    touched = [f"{model} on {task} ({listed(names)})" for (model, task), names in sets_seen.items() if names]
    clean = [f"{model} on {task}" for (model, task), names in sets_seen.items() if not names]
    if touched:
        yield Text(
            f"Contamination: the model was pre-trained on data of the task or its tests: {'; '.join(touched)}. "
            "Scores there say less about new data; gains over the baseline are less affected."
        )
    if clean:
        yield Text(f"Contamination: none known for {listed(clean)}.")


# ---- scores -----------------------------------------------------------------------------------------------------


def unit(metric: str) -> tuple[float, int]:
    """Factor of a score for display, and its number of digits."""
    return (1.0, 3) if smaller_is_better(metric) else (100.0, 1)


def _scores(bench: Bench) -> Iterator[Block]:
    best = tables.clearly_best(bench.scores)
    for domain, model in itertools.product(bench.domains, bench.models):
        cells = bench.cells[(bench.cells["model"] == model) & (bench.cells["domain"] == domain)]
        if not cells.empty:
            yield _paper_table(bench, cells, model, domain, best)
    yield from _every_set(bench)
    for domain in bench.domains:
        yield _detailed(bench, domain)


def _paper_table(bench: Bench, cells: pd.DataFrame, model: str, domain: str, best: set[tuple[str, ...]]) -> Grid:
    """Recipes by tasks, under a title for each setting."""
    rows = {(row.setting, row.recipe, row.task): row for row in tables.rows_of(cells)}
    marks = _marks(bench, model, domain)
    tasks = list(cells["task"].unique())
    groups = []
    for setting in cells["setting"].unique():
        lines: list[list[str | Cell]] = []
        for recipe in bench.recipes:
            keys = [(setting, recipe, task) for task in tasks]
            line = [
                _score(rows.get(key), (model, key[2], *key[:2], domain) in best, marks.get(key, "")) for key in keys
            ]
            mean = [_mean([rows.get(key) for key in keys])] if len(tasks) > 1 else []
            lines.append([recipe, *line, *mean])
        groups.append((setting, lines))
    return Grid(
        caption=f"{bench.titled(DOMAIN[domain], model)}: mean ± standard deviation over seeds",
        head=["recipe", *tasks, *(["mean over tasks"] if len(tasks) > 1 else [])],
        groups=groups,
        note=(
            ("Of a task with several out-of-domain sets: the mean over them. " if domain == "out" else "")
            + f"▲ ▼: better or worse than {bench.baseline}, p of the paired sign-flip test at most {tables.ALPHA} "
            "after Holm's adjustment; △ ▽: before it only, as one comparison in twenty is by accident. Bold: the best "
            f"mean, only where its test against the second best has p at most {tables.ALPHA}. Below 6 pairs no p is "
            "so small, and nothing is marked."
        ),
    )


def _marks(bench: Bench, model: str, domain: str) -> dict[tuple[str, str, str], str]:
    """Sign of each gain that is probably not an accident, by (setting, recipe, task)."""
    if bench.gains.empty:
        return {}
    compared = bench.gains[(bench.gains["model"] == model) & (bench.gains["domain"] == domain)]
    return {
        (row.setting, row.recipe, row.task): " " + ("△▲" if row.gain > 0 else "▽▼")[row.holm <= tables.ALPHA]
        for row in tables.rows_of(compared)
        if row.p <= tables.ALPHA
    }


def _score(row: Any, best: bool, mark: str) -> Cell:
    """One cell of the table: the mean, the number of runs, and the runs that the mean leaves out."""
    if row is None:
        return Cell(NONE, ("not run",))
    if not row.n:
        return Cell(NONE, _losses(row))
    return Cell(_spread(row) + mark, (f"n = {row.n}", *_losses(row)), best)


def _spread(row: Any) -> str:
    """Mean and standard deviation of a row of `tables.summaries`."""
    factor, digits = unit(row.metric)
    sd = f" ± {number(row.sd * factor, digits)}" if row.n > 1 else ""
    return number(row.mean * factor, digits) + sd


def _losses(row: Any) -> tuple[str, ...]:
    """Counts of the runs of a cell without a score, and of collapsed runs."""
    return tuple(f"{getattr(row, kind)} of {row.runs} {kind}" for kind in LOSSES if getattr(row, kind))


def _mean(rows: list[Any]) -> Cell:
    """Mean over tasks, if all tasks have a score in the same unit."""
    if any(row is None or not row.n for row in rows):
        return Cell(NONE, ("incomplete",))
    if len({unit(row.metric) for row in rows}) > 1:
        return Cell(NONE, ("other units",))
    factor, digits = unit(rows[0].metric)
    return Cell(number(factor * np.mean([row.mean for row in rows]), digits), (f"n = {sum(row.n for row in rows)}",))


def _every_set(bench: Bench) -> Iterator[Grid]:
    """Each out-of-domain set on its own, for tasks with several."""
    beyond = bench.runs[bench.runs["used"] & (bench.runs["domain"] == "out")]
    for model, task in itertools.product(bench.models, bench.tasks):
        sets = beyond[(beyond["model"] == model) & (beyond["task"] == task)]
        if sets["set"].nunique() < 2:
            continue
        yield Grid(
            caption=f"{bench.titled(f'Every out-of-domain set of {task}', model)}: mean ± standard deviation",
            head=["set", *bench.recipes],
            groups=_means(bench, sets, "set"),
        )


def _subgroups(bench: Bench) -> Iterator[Grid]:
    """Scores of each subgroup, and of the worst one of each run."""
    if bench.parts.empty:
        return
    for model, task in itertools.product(bench.models, bench.tasks):
        parts = bench.parts[(bench.parts["model"] == model) & (bench.parts["task"] == task)]
        for name in parts["set"].unique():
            rows = parts[parts["set"] == name]
            smaller = smaller_is_better(rows["metric"].iloc[0])
            worst = rows.groupby(["id", "setting", "recipe", "metric"], as_index=False)["score"]
            worst = (worst.max() if smaller else worst.min()).assign(subgroup=WORST)
            yield Grid(
                caption=f"{bench.titled(f'Subgroups of {name} of {task}', model)}: mean ± standard deviation over runs",
                head=["subgroup", *bench.recipes],
                groups=_means(bench, pd.concat([worst, rows]), "subgroup"),
                note="The worst subgroup is that of each run. Of noisy scores the worst one is low by chance too.",
            )


def _means(bench: Bench, frame: pd.DataFrame, column: str) -> list[tuple[str, list[list[Any]]]]:
    """Mean and spread over runs, a group of lines for each setting, a line for each value of the column.

    Args:
        bench: The bench.
        frame: Scores of one model and task.
        column: What tells the lines apart.
    """
    factor, digits = unit(frame["metric"].iloc[0])
    found = frame.groupby(["setting", column, "recipe"])["score"].agg(["count", "mean", "std"])
    cells = {
        key: Cell(
            number(row["mean"] * factor, digits)
            + (f" ± {number(row['std'] * factor, digits)}" if row["count"] > 1 else ""),
            (f"n = {row['count']:.0f}",),
        )
        for key, row in found.iterrows()
    }
    none = Cell(NONE, ("n = 0",))
    lines = sorted(frame[column].unique(), key=lambda name: (name != WORST, name))
    return [
        (setting, [[name, *(cells.get((setting, name, recipe), none) for recipe in bench.recipes)] for name in lines])
        for setting in bench.settings
        if setting in set(frame["setting"])
    ]


def _detailed(bench: Bench, domain: str) -> Grid:
    cells = bench.cells[bench.cells["domain"] == domain]
    groups = []
    for condition, rows in tables.parts(cells, tables.CONDITION):
        lines = []
        for row in tables.rows_of(rows):
            factor, digits = unit(row.metric)
            points = [number(getattr(row, name) * factor, digits) for name in POINTS]
            lost = [f"{getattr(row, kind)} of {row.runs}" if getattr(row, kind) else "0" for kind in LOSSES]
            of_mean = interval(row.low * factor, row.high * factor, digits)
            lines.append([row.recipe, str(row.n), *points, of_mean, *lost])
        groups.append((f"{bench.within(*condition)}: {rows['metric'].iloc[0].replace('_', ' ')}", lines))
    return Grid(
        caption=f"{DOMAIN[domain]}, in detail",
        head=["recipe", "n", "mean", "SD", "IQM", "median", "min", "max", "interval", *LOSSES],
        groups=groups,
        note=(
            "IQM: mean of the middle half. Interval: of the mean. Failed: ended in an error. Missing: the seed was run "
            "with another recipe, not with this one. Undefined: finished without a score. Collapsed: at most 0.01 "
            "above always predicting the majority class; such runs count in all figures."
        ),
    )


# ---- gains ------------------------------------------------------------------------------------------------------


def _gains(bench: Bench) -> Iterator[Block]:
    if bench.gains.empty:
        if len(bench.recipes) > 1:
            yield Text(f"No recipe has a seed in common with {bench.baseline}, so nothing can be compared.")
        return
    for domain in bench.domains:
        overall = bench.overall[bench.overall["domain"] == domain] if len(bench.overall) else bench.overall
        gains = bench.gains[bench.gains["domain"] == domain]
        if len(overall):
            yield _overall_table(bench, overall, domain)
        if len(gains):
            yield _gain_table(bench, gains, domain)
            yield _forest(bench, gains, overall, domain)


_FAMILY = (
    "p: paired sign-flip test, two-sided. Holm's p is adjusted for the {} of this table. P(better): share of pairs in "
    "which the recipe scores higher, ties as one half."
)


def _gain_table(bench: Bench, gains: pd.DataFrame, domain: str) -> Grid:
    groups = []
    for condition, rows in tables.parts(gains, tables.CONDITION):
        factor, digits = unit(rows["metric"].iloc[0])
        lines = [
            [row.recipe, str(row.n), *_gain(row, factor, digits + 1), number(row.detectable * factor, digits + 1)]
            for row in tables.rows_of(rows)
        ]
        groups.append((bench.within(*condition), lines))
    return Grid(
        caption=f"{DOMAIN[domain]}: gains over {bench.baseline}, paired by seed",
        head=["recipe", "pairs", "gain", "interval", "p", "Holm's p", "P(better)", "interval of P", "detectable gain"],
        groups=groups,
        note=(
            _FAMILY.format(counted(int(gains["p"].notna().sum()), "comparison"))
            + " Detectable gain: the true gain that this many pairs, as spread as these, find in 80 % of studies."
        ),
    )


def _overall_table(bench: Bench, overall: pd.DataFrame, domain: str) -> Grid:
    groups = []
    for (model, setting), rows in tables.parts(overall, ["model", "setting"]):
        lines = []
        for row in tables.rows_of(rows):
            factor, digits = (1.0, 3) if row.smaller else (100.0, 1)
            lines.append([row.recipe, str(row.tasks), str(row.n), *_gain(row, factor, digits + 1)])
        groups.append((bench.within(model, setting), lines))
    return Grid(
        caption=f"{DOMAIN[domain]}: gains over {bench.baseline}, mean over tasks of equal weight",
        head=["recipe", "tasks", "pairs", "gain", "interval", "p", "Holm's p", "P(better)", "interval of P"],
        groups=groups,
        note=(
            _FAMILY.format(counted(int(overall["p"].notna().sum()), "comparison"))
            + " Differences on different tasks are taken for independent."
        ),
    )


def _gain(row: Any, factor: float, digits: int) -> list[str]:
    return [
        number(row.gain * factor, digits, signed=True),
        interval(row.low * factor, row.high * factor, digits, signed=True),
        chance(row.p),
        chance(row.holm),
        number(row.better, 2),
        interval(row.better_low, row.better_high, 2),
    ]


def _forest(bench: Bench, gains: pd.DataFrame, overall: pd.DataFrame, domain: str) -> Figures:
    """One panel for each model and setting: tasks one below the other, then all tasks together."""
    rows = gains.assign(group=gains["task"], factor=gains["metric"].map(lambda metric: unit(metric)[0]))
    if len(overall):
        together = overall.assign(group="mean over tasks", factor=np.where(overall["smaller"], 1.0, 100.0))
        rows = pd.concat([rows, together])
    for column in ("gain", "low", "high"):
        rows[column] = rows[column] * rows["factor"]
    rows = rows.assign(label=rows["recipe"], look=rows["recipe"].map(bench.looks))
    limits = _limits(rows[["gain", "low", "high"]].to_numpy())
    panels = (
        partial(figures.forest, part, bench.within(*key) or bench.name, f"gain over {bench.baseline}", limits[:2])
        for key, part in tables.parts(rows, ["model", "setting"])
    )  # fmt: skip
    caption = f"{DOMAIN[domain]}: gains over {bench.baseline} with 95 % intervals"
    return _drawn(caption + " (an arrow: the interval continues beyond the panel)" * limits.clipped, panels)


class Limits(NamedTuple):
    """Limits of an axis, and whether something lies beyond them."""

    least: float
    most: float
    clipped: bool


def _limits(ends: np.ndarray) -> Limits:
    """Limits that contain zero and all ends but outliers: those three times as far out as three quarters of all."""
    ends = ends[np.isfinite(ends)]
    reach = OUTLIER * np.quantile(np.abs(ends), 0.75)
    clipped = bool(reach > 0 and np.abs(ends).max() > reach)
    shown = ends[np.abs(ends) <= reach] if clipped else ends
    least, most = min(0.0, shown.min()), max(0.0, shown.max())
    margin = 0.05 * (most - least) or 1.0
    return Limits(float(least - margin), float(most + margin), clipped)


# ---- steadiness -------------------------------------------------------------------------------------------------


def _steadiness(bench: Bench) -> Iterator[Block]:
    for domain in bench.domains:
        rows = bench.gains[bench.gains["domain"] == domain] if len(bench.gains) else bench.gains
        if rows.empty or rows["sd_p"].isna().all():
            continue
        groups = []
        for condition, part in tables.parts(rows, tables.CONDITION):
            lines = [
                [row.recipe, str(row.n), number(row.sd_ratio, 2), interval(row.ratio_low, row.ratio_high, 2),
                 chance(row.sd_p), chance(row.sd_holm)]
                for row in tables.rows_of(part)
            ]  # fmt: skip
            groups.append((bench.within(*condition), lines))
        yield Grid(
            caption=f"{DOMAIN[domain]}: standard deviation over seeds as a multiple of that of {bench.baseline}",
            head=["recipe", "pairs", "SD ratio", "interval", "p", "Holm's p"],
            groups=groups,
            note=(
                "Below 1 the recipe is the steadier one. p: paired sign-flip test of the distances from the median, "
                "which tolerates failing runs; with them the interval (jackknife) is too narrow. Holm's p is adjusted "
                f"for the {counted(int(rows['sd_p'].notna().sum()), 'comparison')} of this table."
            ),
        )

    yield from _sources(bench)


def _sources(bench: Bench) -> Iterator[Grid]:
    """Tables of the spread due to each seed, one table for each set of crossed seeds."""
    components = tables.sources(bench.scores, bench.recipes)
    if components.empty:
        return
    for names, rows in tables.parts(components.assign(names=components["sources"].map(tuple)), "names"):
        groups = []
        for condition, part in tables.parts(rows, tables.CONDITION):
            factor, digits = unit(part["metric"].iloc[0])
            lines = [
                [row.recipe, str(row.runs), *(number(factor * row.sources[n], digits) for n in names),
                 number(factor * row.rest, digits)]
                for row in tables.rows_of(part)
            ]  # fmt: skip
            groups.append((bench.within(*condition), lines))
        yield Grid(
            caption="In domain: where the spread comes from",
            head=["recipe", "runs", *(f"SD of {name}" for name in names), "SD of the rest"],
            groups=groups,
            note=(
                "Standard deviation due to each seed alone, estimated from its crossing with the others (analysis of "
                "variance, random effects). Interactions count as rest. With few levels the estimates are rough."
            ),
        )


# ---- figures ----------------------------------------------------------------------------------------------------


def _figures(bench: Bench) -> Iterator[Block]:
    if bench.domains:
        yield from _strips(bench)
        yield from _curves(bench)
        yield from _scatters(bench)


def _strips(bench: Bench) -> Iterator[Figures]:
    panels = []
    for condition, group in tables.parts(bench.scores[bench.scores["in"].notna()], tables.CONDITION):
        metric = group["metric"].iloc[0]
        part = group.assign(score=group["in"] * unit(metric)[0])
        panels.append(partial(figures.strips, part, bench.recipes, bench.within(*condition), metric.replace("_", " ")))
    yield _drawn("In domain: a dot for each seed, a stroke at the mean", panels)


def _curves(bench: Bench) -> Iterator[Figures]:
    cells = bench.cells[(bench.cells["domain"] == "in") & (bench.cells["n"] > 0) & bench.cells["size"].notna()]
    cells = cells.assign(
        corruption=[text.partition(", ")[2] for text in cells["setting"]]
    )  # settings are sorted by the number of rows
    panels = []
    for (*names, metric), part in tables.parts(cells, ["model", "task", "corruption", "metric"]):
        if part["size"].nunique() > 1:
            means = part.assign(mean=part["mean"] * unit(metric)[0], sd=part["sd"] * unit(metric)[0])
            title = bench.within(*filter(None, names))
            panels.append(partial(figures.curves, means, bench.recipes, title, metric.replace("_", " ")))
    if panels:
        yield _drawn("Learning curves, in domain: mean and standard deviation", panels, bench)


def _scatters(bench: Bench) -> Iterator[Figures]:
    both = bench.scores[bench.scores["in"].notna() & bench.scores["out"].notna()]
    panels = []
    for condition, group in tables.parts(both, tables.CONDITION):
        part = group.assign(**{domain: group[domain] * unit(group["metric"].iloc[0])[0] for domain in tables.DOMAINS})
        title = bench.within(*condition)
        panels.append(partial(figures.scatter, part, bench.recipes, title, ("in domain", "out of domain")))
    if panels:
        caption = "In-domain against out-of-domain scores: a small mark for each run, a large one for the mean"
        yield _drawn(caption, panels, bench)


def _drawn(caption: str, panels: Iterable[Callable[[], str]], legend: Bench | None = None) -> Figures:
    """The first panels, with a legend if the panels do not name the recipes."""
    panels = list(panels)
    left = f" ({len(panels) - PANELS} more panels are not drawn)" if len(panels) > PANELS else ""
    keys = [(marker(look), recipe) for recipe, look in legend.looks.items()] if legend else []
    return Figures(caption + left, [panel() for panel in panels[:PANELS]], keys)


# ---- cost -------------------------------------------------------------------------------------------------------


def _costs(bench: Bench) -> Iterator[Block]:
    costs_table = tables.costs(bench.scores, bench.recipes, bench.baseline)
    if costs_table.empty:
        return
    groups = []
    for key, rows in tables.parts(costs_table, ["model", "setting"]):
        lines = [
            [row.recipe, str(row.n), number(row.time, 1), f"{number(row.times, 2)} ({row.pairs})",
             number(row.passes, 2), number(row.steps, 0), number(row.peak_memory / 2**20, 0)]
            for row in tables.rows_of(rows)
        ]  # fmt: skip
        groups.append((bench.within(*key) or bench.name, lines))
    yield Grid(
        caption="Cost of a training: medians over the finished runs",
        head=["recipe", "n", "seconds", f"× {bench.baseline} (pairs)", "passes a step", "steps", "peak memory, MiB"],
        groups=groups,
        note="Passes: forward and backward passes, as a multiple of a plain step's. Seconds: training without tests.",
    )
    yield from _cost_figure(bench, costs_table)
    yield from _compute_matched(bench)


def _cost_figure(bench: Bench, costs_table: pd.DataFrame) -> Iterator[Figures]:
    """Gain over all tasks, or on the only task, against seconds."""
    if bench.gains.empty:
        return
    gains = (
        bench.overall
        if len(bench.overall)
        else bench.gains.assign(smaller=bench.gains["metric"].map(smaller_is_better).astype(bool))
    )
    gains = gains[(gains["domain"] == "in") & ~gains["smaller"]]
    both = gains.merge(costs_table[["model", "setting", "recipe", "times"]], on=["model", "setting", "recipe"])
    both = both[both["times"].notna()].rename(columns={"times": "cost"})
    if both.empty:
        return
    both[["gain", "low", "high"]] *= 100
    both["look"] = both["recipe"].map(bench.looks)
    labels = (f"seconds as a multiple of {bench.baseline}", f"gain over {bench.baseline}")
    panels = [
        partial(figures.cost, part, bench.within(*key) or bench.name, labels)
        for key, part in tables.parts(both, ["model", "setting"])
    ]
    over = "mean over tasks" if len(bench.overall) else "the task"
    yield _drawn(f"Gain in domain ({over}, 95 % interval) against cost", panels, bench)


def _compute_matched(bench: Bench) -> Iterator[Block]:
    """Compare recipes with plain fine-tuning of at least the same compute."""
    methods = {record["spec"]["recipe"]: record["spec"]["methods"] for record in bench.records}
    plain = [recipe for recipe in bench.recipes if not methods[recipe]]
    matched_rows = tables.matched(bench.scores, bench.recipes, plain, bench.baseline)
    if matched_rows.empty:
        longer = tables.longer(bench.scores, bench.baseline)
        yield Text(
            f"Compute is not matched: {listed(longer)} {'takes' if len(longer) == 1 else 'take'} more passes than "
            f"{bench.baseline}, as plain recipes that train longer."
            if longer
            else f"Compute: no recipe takes more passes than {bench.baseline}, so gains are at equal compute."
        )
        return
    costly = listed(matched_rows["recipe"].unique())
    if matched_rows["against"].isna().all():
        yield Text(
            f"Compute is not matched: {costly} took more passes than {bench.baseline}, and no plain recipe took as "
            "many. The gain of longer plain fine-tuning is unknown."
        )
        return
    groups = []
    for condition, rows in tables.parts(matched_rows, tables.CONDITION):
        factor, digits = unit(rows["metric"].iloc[0])
        lines = [
            [row.recipe, number(row.passes, 0), row.against if isinstance(row.against, str) else "none so long",
             number(row.against_passes, 0), str(row.n), number(row.gain * factor, digits + 1, signed=True),
             interval(row.low * factor, row.high * factor, digits + 1, signed=True), chance(row.p)]
            for row in tables.rows_of(rows)
        ]  # fmt: skip
        groups.append((bench.within(*condition), lines))
    yield Grid(
        caption="Matched compute, in domain: recipes against the cheapest plain recipe with at least as many passes",
        head=["recipe", "passes", "plain recipe", "its passes", "pairs", "gain", "interval", "p"],
        groups=groups,
        words=(0, 2),
    )


# ---- context ----------------------------------------------------------------------------------------------------


def _context(bench: Bench) -> Iterator[Block]:
    yield _recipes(bench)
    rows = [
        [name, "; ".join(f"{value} ({counted(count, 'run')})" for value, count in values.items())]
        for name, values in tables.contexts(bench.records).items()
    ]
    yield Grid("Versions and hardware", ["entry", "values"], [("", rows)], words=(0, 1))
    yield from _failed(bench)
    if bench.superseded:
        rows = [[f"{name}.json", why] for name, why in bench.superseded.items()]
        yield _shortened(
            "Left out: a later or planned run replaces them, or they cannot be compared",
            ["record", "why"],
            rows,
            (0, 1),
        )
    if bench.problems:
        yield _shortened("Skipped files", ["file in records/", "reason"], [[*p] for p in bench.problems], (0, 1))
    if bench.study:
        yield Text("The study file:")
        yield Code(bench.study)


def _recipes(bench: Bench) -> Grid:
    """Methods of each recipe, and the options in which recipes differ."""
    specs = [record["spec"] for record in bench.records if record["id"] not in bench.superseded]
    values: dict[str, dict[str, set[str]]] = {}
    for spec in specs:
        for name, value in spec["options"].items():
            values.setdefault(name, {}).setdefault(spec["recipe"], set()).add(json.dumps(value, sort_keys=True))
    common = {
        name: next(iter(held[bench.recipes[0]]))
        for name, held in values.items()
        if len(held) == len(bench.recipes) and len(set().union(*held.values())) == 1
    }
    methods = {spec["recipe"]: "; ".join(map(call_words, spec["methods"])) or "none" for spec in specs}
    rows = [
        [recipe, methods[recipe], "; ".join(f"{name} {listed(sorted(held[recipe]))}" for name, held in values.items()
                                            if name not in common and recipe in held) or NONE]
        for recipe in bench.recipes
    ]  # fmt: skip
    alike = ", ".join(f"{name} {value}" for name, value in common.items())
    note = f"The same in all runs: {alike}." if alike else ""
    return Grid("Recipes", ["recipe", "methods", "options of its own"], [("", rows)], note, words=(0, 1, 2))


def _failed(bench: Bench) -> Iterator[Grid]:
    failed = bench.scores[bench.scores["status"] == "failed"]
    rows = [
        [row.id, bench.within(row.model, row.task, row.setting), row.recipe, row.seed, row.error or "no traceback"]
        for row in tables.rows_of(failed)
    ]
    if rows:
        head = ["record", "condition", "recipe", "seed", "last line of the traceback"]
        yield _shortened("Failed runs", head, rows, (0, 1, 2, 3, 4))


def _shortened(caption: str, head: list[str], rows: list[list[str]], words: tuple[int, ...]) -> Grid:
    left = len(rows) - LISTED
    return Grid(caption, head, [("", rows[:LISTED])], f"And {left:,} more." if left > 0 else "", words)
