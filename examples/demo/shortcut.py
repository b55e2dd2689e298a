"""What restricts or averages a fine-tuned model, on the task of the demonstration, in domain and out of domain.

    python examples/demo/shortcut.py                              # what is missing of ten seeds, then the page
    python examples/demo/shortcut.py --seeds 0 1 --steps 2 --output DIR         # a trial

In training, counting shared words answers most pairs; out of domain it misleads (grammar.py). Each seed trains five
models, and interpolates two of them with what they began from. Records and page go to ``docs/results``; an interrupted
script continues where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from calibrate import corner, digest, grouped, percent
from grammar import Row, make
from run import TESTS, Recipe, real_model, train, write_csv

from steadytune import FittedModel
from steadytune.bench.stats import compare
from steadytune.files.atomic import write_json, write_whole
from steadytune.fitting.merge_folders import merge_folders

RESULTS = Path(__file__).parents[2] / "docs" / "results"
SEEDS = tuple(range(10))
PROBE = {"head": "logistic"}
RECIPES = {
    "plain": Recipe("plain: fit, defaults"),
    "head": Recipe("plain, its head begins as a probe", PROBE),
    "causal_head": Recipe("CausalHead", {"methods": ["causal_head"]}),
    "mask_training": Recipe("MaskTraining, 0.8 kept", {"methods": ["mask_training:keep=0.8"]}),
    "mask_training_head": Recipe(
        "MaskTraining, 0.8 kept, from a probe", {"methods": ["mask_training:keep=0.8"], **PROBE}
    ),
}
START = Recipe("frozen encoder and probe", {"steps": 0, **PROBE})
WISE = {  # name: what was trained, and the label of its mean with what it began from
    "wise_ft": ("plain", "WiSE-FT 0.5: plain and the pre-trained encoder"),
    "wise_ft_head": ("head", "WiSE-FT 0.5: plain from a probe, and the frozen probe"),
}
LABELS = {name: recipe.label for name, recipe in RECIPES.items()} | {name: label for name, (_, label) in WISE.items()}
ORDER = ("plain", "wise_ft", "causal_head", "mask_training", "head", "wise_ft_head", "mask_training_head")
CORNERS = "corners"


def scores(folder: Path, sets: Mapping[str, Sequence[Row]]) -> dict[str, Any]:
    """Accuracy of a model on each test set, and out of domain by corner."""
    model = FittedModel.load(folder)
    hits = {}
    for name in TESTS:
        rows = pd.DataFrame(sets[name])
        hits[name] = (model.predict(rows) == rows["label"]).tolist()
    corners = grouped(sets["out_of_domain"], hits["out_of_domain"], corner)
    return {**{name: statistics.mean(hits[name]) for name in TESTS}, CORNERS: corners}


def measure(names: Sequence[str], seed: int, steps: int | None) -> dict[str, dict[str, Any]]:
    """Scores of the models of one seed that are named in ``names``, and of what they are interpolated to."""
    sets = make(seed=0)
    changed = {} if steps is None else {"steps": steps}
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        files = {name: write_csv(folder / f"{name}.csv", rows) for name, rows in sets.items()}
        for name in names:
            recipe = dataclasses.replace(RECIPES[name], options={**RECIPES[name].options, **changed})
            result = train(recipe, seed, files, folder / name)
            found[name] = {**scores(folder / name, sets), "steps": result.steps, "seconds": round(result.seconds, 1)}
            for merged, (trained, _) in WISE.items():
                if trained == name:
                    base = real_model()
                    if name == "head":  # a start that can do the task, head included
                        base = folder / "start"
                        train(START, seed, files, base)
                    merge_folders([folder / name], folder / merged, how="interpolate", base=base)
                    found[merged] = scores(folder / merged, sets)
    for name, values in found.items():
        said = ", ".join(f"{label} {values[test]:.3f}" for test, label in TESTS.items())
        print(f"seed {seed}, {LABELS[name]}: {said}", flush=True)
    return found


def table(runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
    """A row for each recipe: scores, and gains over plain with the same seeds."""
    plain, rows = runs.get("plain", {}), []
    for name in ORDER:
        own = {seed: run for seed, run in sorted(runs.get(name, {}).items()) if seed in plain}
        if not own:
            continue
        cells = [LABELS[name], str(len(own))]
        for test in TESTS:
            cells.append(percent([run[test] for run in own.values()]))
            if name == "plain" or len(own) < 2:
                cells.append("")
                continue
            gain = compare([100 * run[test] for run in own.values()], [100 * plain[seed][test] for seed in own])
            interval = f" ({gain.interval[0]:+.1f} to {gain.interval[1]:+.1f})" if gain.interval else ""
            cells.append(f"{gain.difference:+.1f}{interval}")
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def corner_rows(runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> list[str]:
    """Accuracy out of domain: a row for each recipe, a column for each corner."""
    shown = [name for name in ORDER if runs.get(name)]
    names = sorted(next(iter(runs[shown[0]].values()))[CORNERS])
    rows = ["| recipe | " + " | ".join(names) + " |", "|---|" + "--:|" * len(names)]
    for name in shown:
        cells = [percent([run[CORNERS][key] for run in runs[name].values()]) for key in names]
        rows.append("| " + " | ".join([LABELS[name], *cells]) + " |")
    return rows


def report(runs: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> str:
    """The Markdown page."""
    newline = "\n"
    return f"""# A shortcut, and methods that should resist it

Written by `examples/demo/shortcut.py`. The task is that of the demonstration (`examples/demo`): 200
invented pairs, all-MiniLM-L6-v2. In training and in domain, pairs that share most words are entailments in four cases
of five; out of domain this holds in two of five. The seed decides head, order and dropout. Accuracy in %, mean and
standard deviation; gains are over plain, paired by seed, with 95 % intervals that are not adjusted for the number of
comparisons. No recipe was tuned on these data.

| recipe | seeds | in domain | gain | out of domain | gain |
|---|--:|--:|--:|--:|--:|
{newline.join(table(runs))}

WiSE-FT trains nothing more: it is the mean of the weights of a fine-tuned model and of what it began from.

## Out of domain, by pairs

{newline.join(corner_rows(runs))}
"""


def main() -> None:
    import torch
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, help="optimizer steps, for a trial; by default those of fit")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of shortcut.json and shortcut.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    file = options.output / "shortcut.json"
    about = {
        "data": digest(make(seed=0)),
        "steps": options.steps,
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
    }
    record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {**about, "runs": []}
    if {key: record[key] for key in about} != about:
        parser.error(f"{file} holds runs of other data, steps or versions: choose another --output")
    for seed in options.seeds:
        for name in options.recipes:
            if any(run["recipe"] == name and run["seed"] == seed for run in record["runs"]):
                continue
            for recipe, values in measure([name], seed, options.steps).items():
                record["runs"].append({"recipe": recipe, "seed": seed, **values})
            write_json(file, record)
    runs: dict[str, dict[int, dict[str, Any]]] = {}
    for run in record["runs"]:
        runs.setdefault(run["recipe"], {})[run["seed"]] = run
    write_whole(options.output / "shortcut.md", lambda part: part.write_text(report(runs), encoding="utf-8"))


if __name__ == "__main__":
    main()
