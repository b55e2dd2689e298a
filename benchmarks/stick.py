"""Does it train? Each recipe on 500 real rows of SST-2 and STS-B, 160 steps, paired seeds.

    python benchmarks/stick.py --data-root DIR --model DIR [--recipes plain dps_dense ...] [--seeds 0 1 2]

Prints a Markdown table with n and 95 % t intervals, of the scores on the public dev sets and of the differences from
the plain run with the same seed (initial head, rows, order, dropout). Three seeds rank nothing: the table shows that a
recipe learns. Runs whose record exists in the output folder are not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
import torch
from scipy import stats

import steadytune
from steadytune.tasks import load

RECIPES = {
    "plain": (),
    "dps_dense": ("dps_dense",),
    "dps_mix": ("dps_mix",),
    "mixout": ("mixout",),
    "rdrop": ("rdrop",),
    "l2sp": ("l2sp",),
    "ema": ("ema",),
}
TASKS = {"sst2": "accuracy", "stsb": "pearson"}
ISSUE = ("plain", "dps_dense", "dps_mix", "rdrop")


def run_one(task: str, recipe: str, seed: int, options: argparse.Namespace) -> dict:
    """Train, score and record one run."""
    record = options.output / f"{task}-{recipe}-{seed}.json"
    if record.exists():
        return json.loads(record.read_text())
    table, tests = load(task, options.data_root)
    with tempfile.TemporaryDirectory() as folder:
        result = steadytune.fit(
            table,
            tests=tests,
            model=options.model,
            output=folder,
            methods=RECIPES[recipe],
            metric=TASKS[task],
            train_size=500,
            validation_share=0.0,
            steps=160,
            lr=options.lr,
            seed=seed,
            save_steps=0,
            progress=options.progress,
        )
    scores = {name: sets[TASKS[task]] for name, sets in result.metrics.items()}
    row = {"task": task, "recipe": recipe, "seed": seed, "scores": scores, "seconds": result.seconds}
    record.write_text(json.dumps(row))
    return row


def interval(values: np.ndarray) -> str:
    """Mean and 95 % t interval, in per cent."""
    mean, n = 100 * values.mean(), len(values)
    if n < 2:
        return f"{mean:.1f} (n = {n})"
    half = 100 * stats.t.ppf(0.975, n - 1) * values.std(ddof=1) / np.sqrt(n)
    return f"{mean:.1f} ± {half:.1f} (n = {n})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--recipes", nargs="+", default=ISSUE, choices=RECIPES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("runs/stick"))
    parser.add_argument("--progress", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for seed in options.seeds:
        for task in TASKS:
            for recipe in options.recipes:
                rows.append(run_one(task, recipe, seed, options))
                print(rows[-1], flush=True)
    print(f"\n500 rows, 160 steps, batch 16, lr {options.lr}, {options.threads} threads, mean ± half 95 % t interval\n")
    print("| task, metric | recipe | score % | minus plain, paired | seconds a run |\n|---|---|---|---|---|")
    for task, metric in TASKS.items():
        found = {
            recipe: [(next(iter(r["scores"].values())), r["seconds"]) for r in rows if (r["task"], r["recipe"]) == key]
            for recipe in options.recipes
            for key in [(task, recipe)]
        }
        for recipe, values in found.items():
            score, seconds = np.array(values).T
            plain = np.array(found["plain"]).T[0] if "plain" in found and recipe != "plain" else None
            paired = "" if plain is None else interval(score - plain)
            print(f"| {task}, {metric} | {recipe} | {interval(score)} | {paired} | {seconds.mean():.0f} |")


if __name__ == "__main__":
    main()
