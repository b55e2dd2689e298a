"""What `steadytune search` ships and claims on real tables, beside plain fine-tuning, the probe and a fixed list.

    python benchmarks/search_real.py --data-root DIR --model DIR [--tasks sst2 qnli stsb mrpc sources]
        [--rows 300 1000] [--draws 5] [--budget 115runs] [--estimate] [--output docs/results/search-real]

A unit is a task, a number of rows and a draw of these rows. In each unit a search with the default arms ships a model,
and one fit each is made of plain fine-tuning, of the probe on the frozen encoder, and of the fixed list: DPSMix,
mixup-blo and SMART with their defaults. Two more are means of the weights of three runs: of plain fine-tuning, and of
the recipe that the search shipped. All train on the same rows with the same seed and options, and all are scored on the
public dev set, which no search sees before its choice. `sources` is the task of `make_sources.py`.

Every unit has one record for the search and one for each fit, in OUTPUT/records. An interrupted script goes on where it
was, also within a search, whose trainings are kept in --work. The table is written again after each unit, to
OUTPUT/README.md and OUTPUT/summary.json. --estimate measures three steps of each unit's plain fine-tuning instead, and
prints the hours of one core.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from make_sources import sources

import steadytune
from steadytune.bench.stats import compare, log_sd_interval, stratified
from steadytune.data.metrics import smaller_is_better
from steadytune.files.atomic import write_json
from steadytune.fitting.options import Options
from steadytune.pages.words import counted
from steadytune.searching import plan_search
from steadytune.searching.record import recorded_recipe
from steadytune.tasks import find, load

LIST = {"dps_mix": {"methods": ["dps_mix"]}, "mixup-blo": {"procedure": "mixup-blo"}, "smart": {"methods": ["smart"]}}
SOUP = {"num_seeds": 3, "combine": "soup"}
FITS: dict[str, dict[str, Any]] = {
    "plain": {}, "plain-soup": SOUP, "probe": {"head": "logistic", "steps": 0}, **LIST,
}  # fmt: skip
PASSES = {
    "plain": 1.0, "plain-soup": 3.0, "probe": 0.2, "dps_mix": 1.1, "mixup-blo": 1.4, "smart": 2.3, "search-soup": 3.0,
}  # of a plain fit, for --estimate  # fmt: skip
RECIPES = (*FITS, "search", "search-soup")
PAIRS = [*(("search", other) for other in FITS), ("plain-soup", "plain"), ("search-soup", "search"),
         ("search-soup", "plain-soup")]  # fmt: skip
TASKS = ("sst2", "qnli", "stsb", "mrpc", "sources")
DEV = "dev"


def clear_finished(place: Path) -> None:
    """Remove a last fit that has ended or was cut off at once; trainings of the search stay, and a fit that goes on."""
    file = place / "steadytune.json"
    if not file.is_file() or json.loads(file.read_text(encoding="utf-8")).get("status") != "training":
        for entry in place.iterdir() if place.is_dir() else ():
            if entry.is_dir() and entry.name != "search":
                shutil.rmtree(entry)
            elif entry.is_file():
                entry.unlink()


@dataclass(frozen=True)
class Unit:
    """A table of a task."""

    task: str
    rows: int
    draw: int

    @property
    def name(self) -> str:
        return f"{self.task}-{self.rows}-{self.draw}"


def tables(task: str, data_root: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All training rows and the dev rows of a task, with the columns text (and text_pair) and label."""
    if task == "sources":
        train, dev = (frame.rename(columns={"sentence": "text", "source": "label"}) for frame in sources(data_root))
        return train, dev
    about, (train, tests) = find(task), load(task, data_root)

    def plain(frame: pd.DataFrame) -> pd.DataFrame:
        texts = {name: frame[column] for name, column in zip(("text", "text_pair"), about.text, strict=False)}
        # Classes keep their numbers, as F1 is that of class 1: names would be sorted, and F1 be that of another class.
        return pd.DataFrame({**texts, "label": frame["label"] if about.labels else frame["label"].astype(float)})

    (dev,) = tests.values()
    return plain(train.frame), plain(dev.frame)


@dataclass
class Study:
    """Everything that the units share."""

    given: argparse.Namespace

    def __post_init__(self) -> None:
        given = self.given
        self.output, self.work = Path(given.output), Path(given.work)
        self.options = {"lr": given.lr, "steps": given.steps, "max_length": given.max_length, "bf16": given.bf16}
        settings = {"model": Path(given.model).name, "budget": given.budget, "dev_rows": given.dev_rows, **self.options}
        place = self.output / "settings.json"
        if place.is_file() and (before := json.loads(place.read_text(encoding="utf-8"))) != settings:
            raise SystemExit(f"{place} has other settings: {before}. Choose another --output.")
        if not given.estimate:
            (self.output / "records").mkdir(parents=True, exist_ok=True)
            write_json(place, settings)

    def units(self) -> Iterator[Unit]:
        """Whole rounds of all tasks first, so that an unfinished study has all of them."""
        for draw, rows, task in itertools.product(range(self.given.draws), self.given.rows, self.given.tasks):
            yield Unit(task, rows, draw)

    def files(self, unit: Unit) -> dict[str, Any]:
        """Arguments that tell `fit` and `search` the rows of a unit."""
        folder = self.work / unit.name
        folder.mkdir(parents=True, exist_ok=True)
        train, dev = tables(unit.task, Path(self.given.data_root))
        if len(train) < unit.rows:
            raise SystemExit(f"{unit.task} has {len(train)} training rows: leave out --rows {unit.rows}.")
        train.sample(unit.rows, random_state=unit.draw).to_parquet(folder / "train.parquet", index=False)
        dev.sample(min(len(dev), self.given.dev_rows), random_state=0).to_parquet(folder / "dev.parquet", index=False)
        text = [name for name in ("text", "text_pair") if name in train]
        metric = "accuracy" if unit.task == "sources" else find(unit.task).metric
        return {"train": str(folder / "train.parquet"), "tests": {DEV: str(folder / "dev.parquet")}, "text": text,
                "label": "label", "metric": metric}  # fmt: skip

    def asked(self, unit: Unit) -> dict[str, Any]:
        return {**self.files(unit), "model": self.given.model, "seed": unit.draw, "progress": False, **self.options}

    # ---- one unit

    def record(self, unit: Unit, name: str) -> Path:
        return self.output / "records" / f"{unit.name}-{name}.json"

    def do(self, unit: Unit) -> None:
        """Do what of a unit has no record."""
        folder = self.work / unit.name
        for name, recipe in FITS.items():
            self.fit(unit, name, recipe)
        if not self.record(unit, "search").is_file():
            self.search(unit)
        self.fit(unit, "search-soup", {**self.shipped(unit), **SOUP})
        shutil.rmtree(folder, ignore_errors=True)

    def fit(self, unit: Unit, name: str, recipe: Mapping[str, Any]) -> None:
        """Fit a recipe on the rows of a unit, if it has no record."""
        if self.record(unit, name).is_file():
            return
        place, started = self.work / unit.name / name, time.perf_counter()
        fitted = steadytune.fit(output=place, overwrite=True, validation_share=0.0, probe=False,
                                **{**self.asked(unit), **recipe})  # fmt: skip
        self.write(unit, name, fitted, started)
        shutil.rmtree(place)

    def shipped(self, unit: Unit) -> dict[str, Any]:
        """Arguments of `fit` that make the recipe of a finished search."""
        ship = recorded_recipe(json.loads(self.record(unit, "search").read_text(encoding="utf-8"))["found"]["ship"])
        return {**ship.trainings, **ship.settings(Options.of({"validation_share": 0.0, **self.options}), unit.rows)}

    def search(self, unit: Unit) -> None:
        """Search on the rows of a unit; an interrupted search goes on."""
        place, started = self.work / unit.name / "search", time.perf_counter()
        clear_finished(place)
        found = steadytune.search(output=place, budget=self.given.budget, workers=self.given.workers,
                                  resume=(place / "search").is_dir(), **self.asked(unit))  # fmt: skip
        told = {name: v for name, v in found.record.items() if name not in ("asked", "standings")}
        told["ship"] = {**told["ship"], "model": Path(told["ship"]["model"]).name}
        self.write(unit, "search", found.fitted, started, {"found": told})

    def write(self, unit: Unit, name: str, fitted: Any, started: float, more: Mapping[str, Any] | None = None) -> None:
        score = fitted.metrics[DEV][fitted.metric]
        write_json(self.record(unit, name), {
            **dataclasses.asdict(unit), "recipe": name, "metric": fitted.metric, "score": score,
            "seconds": time.perf_counter() - started, **(more or {}),
        })  # fmt: skip
        print(f"{unit.name} {name}: {fitted.metric} {score:.4f}", flush=True)

    # ---- all units

    def finished(self) -> dict[Unit, dict[str, dict[str, Any]]]:
        """Records of the units that have all, by unit and recipe."""
        found: dict[Unit, dict[str, dict[str, Any]]] = {}
        for file in sorted((self.output / "records").glob("*.json")):
            record = json.loads(file.read_text(encoding="utf-8"))
            found.setdefault(Unit(record["task"], record["rows"], record["draw"]), {})[record["recipe"]] = record
        return {unit: records for unit, records in found.items() if {*RECIPES} <= {*records}}

    def estimate(self) -> None:
        """Print the hours of a core, from three measured steps of each task and size."""
        total = 0.0
        for unit in (unit for unit in self.units() if not unit.draw):
            asked = self.asked(unit)
            del asked["tests"], asked["progress"]
            plan = plan_search(asked.pop("train"), budget=self.given.budget, **asked)
            seconds = plan.seconds * (plan.trainings + sum(PASSES.values()))
            total += seconds
            print(f"{unit.task} {unit.rows} rows: {plan.seconds:.1f} s a training, {seconds / 3600:.2f} h a draw")
        print(f"together {self.given.draws * total / 3600:.1f} h for {self.given.draws} draws on one core; arms that "
              "cost more than plain fine-tuning come on top")  # fmt: skip


# ---- what came out


def summary(found: Mapping[Unit, Mapping[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """Scores and paired gains in points, by table size and task, and over all of them."""
    groups: dict[str, list[Unit]] = {}
    for unit in found:
        groups.setdefault(f"{unit.task}, {unit.rows} rows", []).append(unit)
    scores = {name: {recipe: _points(found, units, recipe) for recipe in RECIPES} for name, units in groups.items()}
    best = max(LIST, key=lambda recipe: float(np.mean([s[recipe].mean() for s in scores.values()])))
    paired = {name: s for name, s in scores.items() if len(s["search"]) > 1}
    claims = [_claim(unit, records) for unit, records in found.items()]
    return {
        "units": len(found),
        "scores": {name: {r: {"mean": float(v.mean()), "sd": float(v.std(ddof=1)) if len(v) > 1 else None, "n": len(v)}
                          for r, v in s.items()} for name, s in scores.items()},
        "best of the list": best,
        "gains": [_gain(paired, *pair) for pair in PAIRS] if paired else [],
        "log ratio of SD to the best of the list": _spread(paired, best),
        "seconds": {recipe: float(np.mean([records[recipe]["seconds"] for records in found.values()]))
                    for recipe in RECIPES},
        "verdicts": {verdict: _told([claim for claim in claims if claim["verdict"] == verdict])
                     for verdict in dict.fromkeys(claim["verdict"] for claim in claims)},
        "claims": claims,
    }  # fmt: skip


def _told(claims: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What searches with one verdict claimed, and what the dev set says."""
    held = [claim["interval"][0] <= claim["real"] <= claim["interval"][1] for claim in claims]
    claimed, real = (float(np.mean([claim[name] for claim in claims])) for name in ("claimed", "real"))
    return {"searches": len(claims), "claimed": claimed, "real": real, "in the interval": sum(held)}


def _points(found: Mapping[Unit, Mapping[str, Mapping[str, Any]]], units: Sequence[Unit], recipe: str) -> np.ndarray:
    """Scores of a recipe in points, larger is better."""
    records = [found[unit][recipe] for unit in units]
    return np.array([(-100 if smaller_is_better(r["metric"]) else 100) * r["score"] for r in records])


def _gain(paired: Mapping[str, Mapping[str, np.ndarray]], first: str, other: str) -> dict[str, Any]:
    """Gain of a recipe over another one."""
    firsts, others = ({name: s[recipe] for name, s in paired.items()} for recipe in (first, other))
    over = stratified(firsts, others)
    by_task = {name: dataclasses.asdict(compare(firsts[name], others[name])) for name in paired}
    return {"of": first, "over": other, "difference": over.difference, "interval": over.interval, "p": over.p,
            "better": over.better, "by task": by_task}  # fmt: skip


def _spread(paired: Mapping[str, Mapping[str, np.ndarray]], best: str) -> dict[str, Any] | None:
    """Mean over tables of log(SD of search / SD of the best of the list), and its interval by table."""
    ratios = {
        name: float(np.log(s["search"].std(ddof=1) / s[best].std(ddof=1)))
        for name, s in paired.items()
        if s["search"].std() and s[best].std()
    }
    if not ratios:
        return None
    intervals = {name: [*map(float, log_sd_interval(paired[name]["search"], paired[name][best]))] for name in ratios
                 if len(paired[name][best]) > 2}  # fmt: skip
    return {"mean": float(np.mean([*ratios.values()])), "by task": ratios, "intervals": intervals}


def _claim(unit: Unit, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """What a search claimed, and what the dev set says of what it shipped."""
    claim, ship = records["search"]["found"]["claim"], records["search"]["found"]["ship"]
    sign = -100 if smaller_is_better(records["plain"]["metric"]) else 100
    return {
        "unit": unit.name, "ships": ship["name"], "verdict": claim["verdict"],
        "claimed": 100 * claim["gain"]["value"], "interval": [100 * bound for bound in claim["gain"]["interval"]],
        "real": sign * (records["search"]["score"] - records["plain"]["score"]),
        "trainings": records["search"]["found"]["trainings"], "seconds": records["search"]["seconds"],
    }  # fmt: skip


def page(result: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """The result as Markdown."""
    lines = [
        "# What does a search ship, and what does it claim?", "",
        f"By `python benchmarks/search_real.py`: {counted(result['units'], 'table')} so far. {settings['model']}, "
        f"budget {settings['budget']}, {settings['steps']} steps, learning rate {settings['lr']:g}. Scores are points "
        "of each task's metric on its public dev set: the mean over draws of the rows, and the standard deviation.", "",
        "| table | " + " | ".join(RECIPES) + " |", "|---" * (len(RECIPES) + 1) + "|",
    ]  # fmt: skip
    for table, by_recipe in result["scores"].items():
        cells = [f"{s['mean']:.1f}" + (f" ± {s['sd']:.1f}" if s["sd"] is not None else "") for s in by_recipe.values()]
        lines.append(f"| {table} | " + " | ".join(cells) + " |")
    if result["gains"]:
        lines += ["", "Gains, paired by draw, as means over tables. `search` is the model that was shipped; a soup "
                  "is the mean of the weights of three runs:", "",
                  "| of | over | gain | 95 % interval | p |", "|---|---|---|---|---|"]  # fmt: skip
        for gain in result["gains"]:
            between = "-" if gain["interval"] is None else "{:+.2f} to {:+.2f}".format(*gain["interval"])
            lines.append(f"| {gain['of']} | {gain['over']} | {gain['difference']:+.2f} | {between} | {gain['p']:.3f} |")
        best = result["best of the list"]
        lines += ["", f"`{best}` has the largest mean of the fixed list. That choice knows the dev "
                  "scores, which favours the list."]  # fmt: skip
    if spread := result["log ratio of SD to the best of the list"]:
        lines[-1] += f" The spread of the search is {np.exp(spread['mean']):.2f} of its spread (geometric mean)."
    lines += ["", "| recipe | minutes a table |", "|---|--:|"]
    lines += [f"| {recipe} | {seconds / 60:.1f} |" for recipe, seconds in result["seconds"].items()]
    lines += ["", "What searches claimed, by verdict, and what the one model of each has on the dev set, where "
              "another training differs too:", "",
              "| verdict | searches | claimed gain | gain on the dev set | inside the claimed interval |",
              "|---|--:|--:|--:|--:|"]  # fmt: skip
    for verdict, told in result["verdicts"].items():
        lines.append(
            f"| {verdict} | {told['searches']} | {told['claimed']:+.1f} | {told['real']:+.1f} | "
            f"{told['in the interval']} of {told['searches']} |"
        )
    lines += ["", "| table | ships | verdict | claimed gain | gain on the dev set | trainings | minutes |",
              "|---|---|---|---|---|---|---|"]  # fmt: skip
    for claim in result["claims"]:
        low, high = claim["interval"]
        lines.append(
            f"| {claim['unit']} | `{claim['ships']}` | {claim['verdict']} | {claim['claimed']:+.1f} ({low:+.1f} to "
            f"{high:+.1f}) | {claim['real']:+.1f} | {claim['trainings']} | {claim['seconds'] / 60:.1f} |"
        )
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", nargs="+", default=TASKS, choices=(*TASKS, "cola", "rte", "qqp", "snli"))
    parser.add_argument("--rows", type=int, nargs="+", default=[300, 1000])
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--budget", default="115runs")
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--bf16", action="store_true", help="half of the time on processors that multiply in bfloat16")
    parser.add_argument("--dev-rows", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--work", default="runs/search-real", help="folder of unfinished units")
    parser.add_argument("--output", default="docs/results/search-real")
    parser.add_argument("--estimate", action="store_true")
    study = Study(parser.parse_args())
    if study.given.estimate:
        return study.estimate()
    for unit in study.units():
        study.do(unit)
        result = summary(study.finished())
        write_json(study.output / "summary.json", result)
        settings = json.loads((study.output / "settings.json").read_text(encoding="utf-8"))
        (study.output / "README.md").write_text(page(result, settings), encoding="utf-8")


if __name__ == "__main__":
    main()
