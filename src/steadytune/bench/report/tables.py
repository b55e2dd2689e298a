"""Tables of a report, computed from records: by run and set, by run, by cell, by comparison. No torch here.

A cell is (model, task, setting, recipe); a setting is the number of training rows and their corruption. Scores are in
the metric's own unit. A positive gain is always better, also for errors such as ``rmse``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ...data.metrics import smaller_is_better
from ...errors import UsageError, suggest
from ..records import SUBGROUPS
from ..stats import (
    Comparison,
    Steadiness,
    Stratified,
    Trained,
    compute_matched,
    holm,
    sign_flip,
    spread_sources,
    steadiness,
    stratified,
    summary,
)

CONDITION = ["model", "task", "setting"]
CELL = [*CONDITION, "recipe"]
DOMAINS = ("in", "out")
BASELINE = "plain"
ALPHA = 0.05  # level of the tests
UNCORRUPTED = {"label_noise": 0.0, "imbalance": None}
ABOVE = 0.01  # a run has collapsed if it is not this much above always predicting the majority class


def long_form(
    records: Sequence[Mapping[str, Any]], metric: str | None = None, left_out: Iterable[str] | None = None
) -> pd.DataFrame:
    """One row for each run and set; a failed run has one row without a set.

    Args:
        records: As `read_records` gives them.
        metric: Metric to use as the score, instead of the task's own.
        left_out: Ids of the runs that were superseded; None for those that `superseded` finds.

    Returns:
        The facts of each run, its cost, and one column for each metric. ``score`` is the metric of the report; ``used``
        is false for runs that were superseded (see `superseded`).

    Raises:
        UsageError: No record has that metric.
    """
    frame = pd.DataFrame([row for record in records for row in _rows(record)])
    names = sorted({key for record in records for scores in record["sets"].values() for key in scores} - _NOT_SCORES)
    if metric is not None and metric not in names:
        raise UsageError(f"--metric {metric}: no record has it.{suggest(metric, names)}")
    frame = frame.astype(dict.fromkeys([*_NUMBERS, *names], float))
    frame["headline_metric"] = frame["metric"]
    frame["headline"] = _named_score(frame, frame["headline_metric"], names)
    frame["metric"] = frame["metric"] if metric is None else metric
    frame["score"] = _named_score(frame, frame["metric"], names)
    frame["used"] = ~frame["id"].isin([*(superseded(records) if left_out is None else left_out)])
    return frame


def by_subgroup(records: Sequence[Mapping[str, Any]], runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each run, set and subgroup, with the score of the report; empty without subgroups.

    Args:
        records: As `read_records` gives them.
        runs: As `long_form` gives them.
    """
    rows = [
        {"id": record["id"], "set": name, "subgroup": part, **own}
        for record in records
        for name, scores in record["sets"].items()
        for part, own in scores.get(SUBGROUPS, {}).items()
    ]
    if not rows:
        return pd.DataFrame()
    about = runs.loc[runs["used"], ["id", "set", "domain", "recipe", "metric", *CONDITION]]
    frame = pd.DataFrame(rows).merge(about, on=["id", "set"])
    names = sorted({*frame.columns} & {*frame["metric"]})
    return frame.assign(score=_named_score(frame, frame["metric"], names))


def _named_score(frame: pd.DataFrame, wanted: pd.Series, names: Sequence[str]) -> pd.Series:
    """The metric of each row that ``wanted`` names."""
    named = pd.Series(math.nan, frame.index)
    for name in names:
        named = named.where(wanted != name, frame[name])
    return named


_NUMBERS = (
    "train_size",
    "steps",
    "loss",
    "restarts",
    "seconds",
    "train_seconds",
    "passes",
    "peak_memory",
    "rows",
    "baseline",
)
_NOT_SCORES = {"domain", "rows", "baseline", SUBGROUPS}


def _rows(record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    spec, training = record["spec"], record["training"] or {}
    run = {
        "id": record["id"],
        "model": spec["model"]["name"],
        "task": spec["task"]["name"],
        "train_size": math.nan if spec["train_size"] is None else spec["train_size"],
        "setting": setting(spec),
        "recipe": spec["recipe"],
        "seed": seed_name(spec["seeds"]),
        **{f"{name}_seed": value for name, value in spec["seeds"].items()},
        "status": record["status"],
        "error": last_line(record["error"]),
        **{name: training.get(name) for name in ("steps", "loss", "failing", "restarts")},
        **{name: record["cost"].get(name) for name in ("seconds", "train_seconds", "passes", "peak_memory")},
        "finished": record["finished"],
        "metric": record["metric"],
    }
    empty = {"set": None, "domain": None, "rows": math.nan, "baseline": math.nan}
    for name, scores in record["sets"].items():
        yield {**run, **empty, "set": name, **{key: value for key, value in scores.items() if key != SUBGROUPS}}
    if not record["sets"]:
        yield {**run, **empty}


def setting(spec: Mapping[str, Any]) -> str:
    """As in "500 rows, label noise 0.1"."""
    size = "all rows" if spec["train_size"] is None else f"{spec['train_size']:,} rows"
    changes = [
        f"{name.replace('_', ' ')} {spec['corruption'][name]}"
        for name, without in UNCORRUPTED.items()
        if spec["corruption"].get(name, without) != without
    ]
    return ", ".join([size, *changes])


def seed_name(seeds: Mapping[str, int]) -> str:
    """The seed of a run as one number, or all its seeds if they differ."""
    values = set(seeds.values())
    return str(*values) if len(values) == 1 else ", ".join(f"{name} {value}" for name, value in seeds.items())


def last_line(error: str | None) -> str:
    """Last line of a traceback."""
    return next((line.strip() for line in reversed((error or "").splitlines()) if line.strip()), "")


def superseded(records: Iterable[Mapping[str, Any]], planned: Container[str] = ()) -> dict[str, str]:
    """Runs that are not compared with those that count: why, by id.

    A mean over runs with two learning rates would have no meaning. So only those runs of a cell count whose
    configuration (options, methods, metric, test rows, fingerprints) is that of the run that finished last, of those
    that the study plans now if there are any. Recipes of a condition are compared with each other. So a recipe does
    not count there if the study plans runs of the condition and none of this recipe, or if its metric, test rows or
    fingerprints are not those of the run of the condition that finished last.

    Args:
        records: All records.
        planned: Ids of the runs that the study plans.
    """
    newest: dict[tuple[str, ...], Mapping[str, Any]] = {}  # by condition, by cell, and by cell and seed
    records = list(records)
    for record in sorted(records, key=lambda record: (record["id"] in planned, record["finished"], record["id"])):
        cell = _cell(record)
        newest[cell[:-1]] = newest[cell] = newest[*cell, seed_name(record["spec"]["seeds"])] = record
    replaced = {}
    for record in records:
        *condition, recipe = cell = _cell(record)
        last = newest[*cell, seed_name(record["spec"]["seeds"])]
        counts = newest[tuple(condition)]
        if differing := _differences(_configuration(record), _configuration(newest[cell])):
            replaced[record["id"]] = ", ".join(differing)
        elif counts["id"] in planned and newest[cell]["id"] not in planned:
            replaced[record["id"]] = f"the study plans no such run of {recipe} now"
        elif differing := _differences(_measured(record), _measured(counts)):
            replaced[record["id"]] = ", ".join(differing)
        elif last is not record:
            replaced[record["id"]] = f"run again as {last['id']}"
    return replaced


def _cell(record: Mapping[str, Any]) -> tuple[str, ...]:
    spec = record["spec"]
    return spec["model"]["name"], spec["task"]["name"], setting(spec), spec["recipe"]


def _configuration(record: Mapping[str, Any]) -> dict[str, Any]:
    spec = {name: value for name, value in record["spec"].items() if name != "seeds"}
    return {**spec, "metric": record["metric"]}


def _measured(record: Mapping[str, Any]) -> dict[str, Any]:
    """What all recipes of a condition have in common."""
    return {name: v for name, v in _configuration(record).items() if name in ("model", "task", "tests", "metric")}


def _differences(one: Any, other: Any, where: str = "") -> list[str]:
    if isinstance(one, dict) and isinstance(other, dict):
        keys = sorted({*one, *other})
        return [d for k in keys for d in _differences(one.get(k), other.get(k), f"{where}.{k}" if where else k)]
    return [] if one == other else [f"{where} {json.dumps(one)} instead of {json.dumps(other)}"]


def rows_of(frame: pd.DataFrame) -> Iterator[Any]:
    """Rows of a frame as named tuples."""
    return iter(frame.itertuples())


def parts(frame: pd.DataFrame, by: str | list[str]) -> Iterator[tuple[Any, pd.DataFrame]]:
    """Groups of a frame, in the order of their first rows."""
    return iter(frame.groupby(by, sort=False))


def in_order(names: Iterable[str], study: str, entry: str) -> list[str]:
    """Names in the order of an entry of the study file, then the others by alphabet.

    Args:
        names: Names of recipes, models or tasks.
        study: Text of the study file.
        entry: "recipes", "models" or "tasks".
    """
    try:
        told = yaml.safe_load(study)[entry]
        first = [name for name in told if isinstance(name, str)]
    except (yaml.YAMLError, TypeError, KeyError):  # no study file, or one of another hand
        first = []
    return sorted(set(names), key=lambda name: (first.index(name) if name in first else len(first), name))


def per_run(runs: pd.DataFrame) -> pd.DataFrame:
    """One row for each run that counts, with its mean score over in-domain (``in``) and out-of-domain (``out``) sets.

    A mean is NaN if the run failed, has no such set, or lacks a score on one of them, because means over different sets
    cannot be compared. ``collapsed``: in domain the run is not above the majority class.
    """
    used = runs[runs["used"]]
    run = used.drop(columns=["set", "domain", "rows", "baseline", "score", "headline", "headline_metric"])
    scores = run.drop_duplicates("id").set_index("id", drop=False).rename_axis(None)
    for domain in DOMAINS:
        sets = used[used["domain"] == domain].groupby("id")["score"]
        scores[domain] = sets.mean().where(sets.count() == sets.size())
    smaller = used["headline_metric"].map(smaller_is_better).astype(bool)  # that of the baseline
    above = (used["headline"] - used["baseline"]) * np.where(smaller, -1, 1)
    collapsed = above[used["domain"] == "in"].groupby(used["id"]).mean() < ABOVE
    scores["collapsed"] = collapsed.reindex(scores.index, fill_value=False)
    scores["smaller"] = scores["metric"].map(smaller_is_better).astype(bool)
    return scores


def baseline_of(recipes: Sequence[str]) -> str:
    """The recipe that the others are compared with."""
    return BASELINE if BASELINE in recipes else recipes[0]


def summaries(scores: pd.DataFrame, recipes: Sequence[str]) -> pd.DataFrame:
    """One row for each cell and domain, including cells without a run.

    A run is missing if other recipes have its seed in the same condition. A finished run without a score is undefined.
    """
    rows = []
    for condition, group in parts(scores, CONDITION):
        expected = group["seed"].nunique()
        by_recipe = dict(iter(group.groupby("recipe")))
        for recipe in recipes:
            runs = by_recipe.get(recipe, group.iloc[:0])
            for domain in DOMAINS:
                if group[domain].isna().all() and domain == "out":
                    continue
                values = runs[domain].dropna()
                rows.append(
                    {
                        **dict(zip(CONDITION, condition, strict=True)),
                        "recipe": recipe,
                        "domain": domain,
                        "metric": group["metric"].iloc[0],
                        "size": group["train_size"].iloc[0],
                        **described(values),
                        "runs": expected,
                        "failed": int((runs["status"] == "failed").sum()),
                        "missing": expected - runs["seed"].nunique(),
                        "undefined": int((runs["status"] == "done").sum()) - len(values),
                        "collapsed": int(runs.loc[values.index, "collapsed"].sum()),
                    }
                )
    return pd.DataFrame(rows)


def described(values: pd.Series) -> dict[str, Any]:
    """`stats.summary` as columns, with NaN for undefined values."""
    if values.empty:
        return {"n": 0, **dict.fromkeys(("mean", "sd", "low", "high", "iqm", "median", "min", "max"), math.nan)}
    about = summary(values.to_numpy())
    low, high = about.interval or (math.nan, math.nan)
    return {
        "n": about.n,
        "mean": about.mean,
        "sd": math.nan if about.sd is None else about.sd,
        "low": low,
        "high": high,
        "iqm": about.iqm,
        "median": about.median,
        "min": about.minimum,
        "max": about.maximum,
    }


def clearly_best(scores: pd.DataFrame) -> set[tuple[str, ...]]:
    """Cells (and domain) with the best mean whose paired sign-flip test against the second best has p <= 0.05."""
    best_names = set()
    for condition, group in parts(scores, CONDITION):
        for domain in DOMAINS:
            wide = group.pivot(index="seed", columns="recipe", values=domain)
            if group["smaller"].iloc[0]:
                wide = -wide
            order = wide.mean().dropna().sort_values(ascending=False, kind="stable").index
            pairs = wide[order[:2]].dropna()
            if len(order) < 2 or len(pairs) < 2:
                continue
            gains = (pairs[order[0]] - pairs[order[1]]).to_numpy()
            if gains.mean() > 0 and sign_flip(gains) <= ALPHA:
                best_names.add((*condition, order[0], domain))
    return best_names


def comparisons(scores: pd.DataFrame, recipes: Sequence[str], baseline: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Each recipe against the baseline, paired by seed: on each task, and over all tasks with equal weights.

    Holm's adjustment covers all comparisons of one table and domain.
    """
    single: list[dict[str, Any]] = []
    over: list[dict[str, Any]] = []
    for (model, name, smaller), group in parts(scores, ["model", "setting", "smaller"]):
        for domain in DOMAINS:
            wide = group.pivot(index=["task", "seed"], columns="recipe", values=domain)
            wide = -wide if smaller else wide
            if baseline not in wide or wide.isna().all(axis=None):
                continue
            for recipe in (r for r in recipes if r in wide and r != baseline):
                key = {"model": model, "setting": name, "recipe": recipe, "domain": domain}
                pairs = wide[[recipe, baseline]].dropna()
                tasks = {task: pairs.loc[task] for task in group["task"].unique() if task in pairs.index}
                enough = {task: rows for task, rows in tasks.items() if len(rows) > 1}
                all_tasks = _stratified(enough, recipe, baseline) if enough else None
                for task, rows in tasks.items():
                    metric = group.loc[group["task"] == task, "metric"].iloc[0]
                    compared = all_tasks.tasks[task] if all_tasks is not None and task in enough else None
                    single.append({**key, "task": task, "metric": metric, **_compared(rows, compared)})
                if all_tasks is not None and len(enough) > 1:
                    over.append(
                        {
                            **key,
                            "tasks": len(enough),
                            "smaller": smaller,
                            "n": sum(map(len, enough.values())),
                            **_gain(all_tasks),
                        }
                    )
    return _adjusted(single), _adjusted(over)


def _stratified(tasks: Mapping[str, pd.DataFrame], recipe: str, baseline: str) -> Stratified:
    ours, theirs = ({task: pairs[name].to_numpy() for task, pairs in tasks.items()} for name in (recipe, baseline))
    return stratified(ours, theirs)


def _compared(pairs: pd.DataFrame, compared: Comparison | None) -> dict[str, Any]:
    ours, theirs = pairs.to_numpy().T
    row = {"n": len(pairs), **_gain(compared), "detectable": getattr(compared, "detectable", None) or math.nan}
    if compared is None:
        row["gain"] = float((ours - theirs).mean())
    return {**row, **_steadier(steadiness(ours, theirs) if len(pairs) > 2 else None)}


def _gain(compared: Any) -> dict[str, Any]:
    """Columns of a `Comparison` or `Stratified`; NaN for None."""
    low, high = getattr(compared, "interval", None) or (math.nan, math.nan)
    least, most = getattr(compared, "better_interval", None) or (math.nan, math.nan)
    return {
        "gain": getattr(compared, "difference", math.nan),
        "low": low,
        "high": high,
        "p": getattr(compared, "p", math.nan),
        "better": getattr(compared, "better", math.nan),
        "better_low": least,
        "better_high": most,
    }


def _steadier(steadiness: Steadiness | None) -> dict[str, Any]:
    """Ratio of the SDs, below 1 if the recipe is steadier."""
    log_ratio = math.nan if steadiness is None or steadiness.log_ratio is None else steadiness.log_ratio
    low, high = getattr(steadiness, "interval", None) or (math.nan, math.nan)
    return {
        "sd_ratio": math.exp(log_ratio),
        "ratio_low": math.exp(low),
        "ratio_high": math.exp(high),
        "sd_p": getattr(steadiness, "p", math.nan),
    }


def _adjusted(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Add Holm's adjusted p; the comparisons of a domain are one family."""
    frame = pd.DataFrame(rows)
    for column, adjusted in (("p", "holm"), ("sd_p", "sd_holm")):
        if column not in frame:
            continue
        frame[adjusted] = math.nan
        for _, family in frame[frame[column].notna()].groupby("domain"):
            frame.loc[family.index, adjusted] = holm(family[column].to_numpy())
    return frame


def costs(scores: pd.DataFrame, recipes: Sequence[str], baseline: str) -> pd.DataFrame:
    """Medians over the finished runs of each model, setting and recipe, and seconds as a multiple of the baseline's.

    ``times`` is the median over pairs of the same task and seed.
    """
    rows = []
    done = scores[scores["status"] == "done"].copy()
    done["time"] = done["train_seconds"].fillna(done["seconds"])
    for (model, name), group in parts(done, ["model", "setting"]):
        wide = group.pivot(index=["task", "seed"], columns="recipe", values="time")
        for recipe in (r for r in recipes if r in wide):
            runs = group[group["recipe"] == recipe]
            times = (wide[recipe] / wide[baseline]).dropna() if baseline in wide else pd.Series(dtype=float)
            medians = {c: runs[c].median() for c in ("time", "passes", "steps", "peak_memory")}
            rows.append(
                {
                    "model": model,
                    "setting": name,
                    "recipe": recipe,
                    "n": len(runs),
                    **medians,
                    "pairs": len(times),
                    "times": times.median() if len(times) else math.nan,
                }
            )
    return pd.DataFrame(rows)


def matched(scores: pd.DataFrame, recipes: Sequence[str], plain: Sequence[str], baseline: str) -> pd.DataFrame:
    """Recipes that cost more than the baseline, against the cheapest plain recipe that costs no less.

    Args:
        scores: As `per_run` gives them. Cost is the number of passes: steps times passes per step.
        recipes: All recipes.
        plain: Recipes without methods.
        baseline: Recipe whose cost the others are compared with.
    """
    rows = []
    scores = scores.assign(passes=scores["passes"] * scores["steps"])
    for condition, group in parts(scores[scores["in"].notna()], CONDITION):
        wide = group.pivot(index="seed", columns="recipe", values="in") * (-1 if group["smaller"].iloc[0] else 1)
        passes = group.groupby("recipe")["passes"].median()
        longer = [other for other in plain if other in wide and other != baseline]
        for recipe in (r for r in recipes if r in wide and r not in plain):
            if not passes[recipe] > passes.get(baseline, math.nan):
                continue
            enough = [other for other in longer if passes[other] >= passes[recipe]]
            paired = [other for other in enough if len(wide[[recipe, other]].dropna()) > 1]
            cheapest = sorted(paired, key=lambda other: passes[other])[:1]  # alone: seeds of others are no matter
            pairs = wide[[recipe, *cheapest]].dropna()
            trained = {str(name): Trained(pairs[name].tolist(), float(passes[str(name)])) for name in pairs}
            ours = {recipe: trained.pop(recipe)}
            matched_row = compute_matched(ours, trained)[0]
            rows.append(
                {
                    **dict(zip(CONDITION, condition, strict=True)),
                    **{"recipe": recipe, "metric": group["metric"].iloc[0], "n": len(pairs)},
                    **{
                        "passes": matched_row.passes,
                        "against": matched_row.baseline,
                        "against_passes": matched_row.baseline_passes,
                    },
                    **_gain(matched_row.comparison),
                }
            )
    return pd.DataFrame(rows)


def longer(scores: pd.DataFrame, baseline: str) -> list[str]:
    """Recipes that take more passes than the baseline on some task, in the order of the table."""
    total = scores.assign(passes=scores["passes"] * scores["steps"])
    medians = total.pivot_table(index=CONDITION, columns="recipe", values="passes", aggfunc="median", sort=False)
    if baseline not in medians:
        return []
    above = medians.gt(medians[baseline], axis=0).any()
    return [recipe for recipe in scores["recipe"].unique() if above.get(recipe, False)]


def shares_seeds(runs: pd.DataFrame) -> bool:
    """Whether two runs of a recipe have one seed in common and another one not."""
    names = [name for name in map(str, runs) if name.endswith("_seed")]
    return bool((runs[names].nunique(axis=1) > 1).any())


def sources(scores: pd.DataFrame, recipes: Sequence[str]) -> pd.DataFrame:
    """Standard deviation in domain due to each seed and to the rest, for cells whose seeds are fully crossed."""
    rows = []
    for condition, group in parts(scores, CONDITION):
        for recipe in recipes:
            runs = group[(group["recipe"] == recipe) & group["in"].notna()]
            factors = [name for name in map(str, runs) if name.endswith("_seed") and runs[name].nunique() > 1]
            levels = [runs[name].nunique() for name in factors]
            if len(factors) < 2 or len(runs) != math.prod(levels) or runs.duplicated(factors).any():
                continue
            grid = runs.sort_values(factors)["in"].to_numpy().reshape(levels)
            components, rest = spread_sources(grid)
            names = (name.removesuffix("_seed") for name in factors)
            rows.append(
                {
                    **dict(zip(CONDITION, condition, strict=True)),
                    "recipe": recipe,
                    "metric": group["metric"].iloc[0],
                    "runs": len(runs),
                    "sources": dict(zip(names, components, strict=True)),
                    "rest": rest,
                }
            )
    return pd.DataFrame(rows)


def contexts(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, int]]:
    """Values of each entry of the context, with the number of runs that had each."""
    by_context: dict[str, dict[str, int]] = {}
    for record in records:
        for name, value in record["context"].items():
            counts = by_context.setdefault(name, {})
            text = "unknown" if value is None else str(value)
            counts[text] = counts.get(text, 0) + 1
    return by_context


def seen(records: Iterable[Mapping[str, Any]]) -> dict[tuple[str, str], list[str]]:
    """Training sets of the pre-trained model that overlap with a task or its tests, by (model, task)."""
    sets_seen: dict[tuple[str, str], set[str]] = {}
    for record in records:
        spec = record["spec"]
        sets_seen.setdefault((spec["model"]["name"], spec["task"]["name"]), set()).update(map(str, record["seen"]))
    return {pair: sorted(names) for pair, names in sorted(sets_seen.items())}
