"""Training on flipped labels: Meta-Weight-Net with a few clean rows, and without the rows that `inspect` suspects.

    python benchmarks/label_noise.py --data-root DIR --model DIR [--task sst2] [--rows 1000] [--noise 0.4] [--clean 100]
        [--seeds 6] [--output FILE]
    python benchmarks/label_noise.py --data-root DIR --model DIR --rows 500 --clean 0 --steps 160 --seeds 10 --bf16
        --noise 0 0.2 0.4 --arms noisy "without suspects" "without flipped" --output docs/results/suspects.jsonl

For each seed and share of flipped labels the same rows, head and orders:

    noisy             plain training on the noisy rows
    noisy + clean     plain training on both
    clean             plain training on the clean rows alone, as many steps
    meta              training on the noisy rows, weighed by what the clean ones say (MetaWeightNet)
    meta + clean      the same, trained on both
    without suspects  plain training on the noisy rows but those that `steadytune inspect` suspects, as many steps
    without flipped   plain training on the noisy rows that kept their label: what a list without faults would give

Each run leaves a line in the file; what has one is not run again. The table shows means over seeds, and paired
differences to ``noisy + clean``, or to ``noisy`` where it was not run, with their 95 % interval and sign-flip p.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from steadytune import MetaWeightNet
from steadytune.bench.run import corrupted
from steadytune.bench.stats import compare
from steadytune.fitting import plan as planning
from steadytune.fitting.inspection import inspect_labels
from steadytune.tasks import find, load

ARMS = ("noisy", "noisy + clean", "clean", "meta", "meta + clean", "without suspects", "without flipped")
BASE = "noisy + clean"


def run(arm: str, seed: int, noise: float, options: argparse.Namespace) -> dict:
    """Train and test one arm; returns its line of the file."""
    table, tests = load(options.task, options.data_root)
    plan = planning.make_plan(
        table, model=options.model, tests=tests, metric=find(options.task).metric, validation_share=0.0,
        train_size=options.rows + options.clean, seed=seed, steps=options.steps, lr=options.lr,
        max_length=options.max_length, bf16=options.bf16, save_steps=0, progress=False,
    )  # fmt: skip
    rows = plan.data.train.sample(frac=1, random_state=seed)
    clean, noisy = rows.iloc[: options.clean], rows.iloc[options.clean :]
    spec = {"corruption": {"label_noise": noise, "imbalance": None}, "seeds": {"subset": seed}}
    truth, noisy = noisy["label"], corrupted(noisy, plan.data.problem, spec)
    if arm == "without suspects":
        train = without_suspects(noisy, options.model, seed)
    elif arm == "without flipped":
        train = noisy[noisy["label"] == truth]
    else:
        train = {"noisy": noisy, "meta": noisy, "clean": clean}.get(arm, pd.concat([noisy, clean]))
    plan = dataclasses.replace(plan, data=dataclasses.replace(plan.data, train=train))
    pretrained = planning.open_model(plan)
    with tempfile.TemporaryDirectory() as scratch:
        setup = planning.make_setup(plan, pretrained, Path(scratch))
        if arm.startswith("meta"):
            method = MetaWeightNet(outer=setup.batches(clean), hidden=options.hidden, lr=options.meta_lr)
            setup = dataclasses.replace(setup, methods=[method])
        (job,) = planning.runs(plan)
        trained = setup.train(job)
    model = planning.fitted_model(plan, pretrained, [trained.model])
    _, scores = planning.evaluate(model, plan.data, planning.answers(model, pretrained, plan.data))
    (found,) = (s[plan.metric] for s in scores.values())
    about = {"arm": arm, "seed": seed, "noise": noise, "rows": len(train)}
    return {**about, "score": found, "seconds": trained.seconds, "passes": trained.passes}


def without_suspects(rows: pd.DataFrame, model: str, seed: int) -> pd.DataFrame:
    """The rows whose label is not suspected."""
    texts = [name for name in ("text", "text_pair") if name in rows]
    found = inspect_labels(rows[[*texts, "label"]], model, text=texts, label="label", seed=seed).frame
    return rows.drop(index=rows.index[found.loc[found["suspect"], "row"]])


def table(lines: list[dict]) -> str:
    """Markdown."""
    frame = pd.DataFrame(lines)
    scores = frame.pivot(index="seed", columns="arm", values="score").dropna()
    means = frame.groupby("arm")[["rows", "seconds", "passes"]].mean()
    arms = [arm for arm in ARMS if arm in set(frame["arm"])]
    base = BASE if BASE in arms else arms[0]
    rows = [f"| arm | rows | score | sd | n | gain over {base} | 95 % | p | passes | seconds |", "|---" * 10 + "|"]
    for arm in arms:
        gain = ["", "", ""]
        if arm != base and len(scores) > 1:
            found = compare(scores[arm].to_numpy(), scores[base].to_numpy())
            between = "{:+.4f} to {:+.4f}".format(*found.interval) if found.interval else ""
            gain = [f"{found.difference:+.4f}", between, f"{found.p:.3f}"]
        costs, own = means.loc[arm], scores[arm]
        cells = [arm, f"{costs['rows']:.0f}", f"{own.mean():.4f}", f"{own.std():.4f}", str(len(own)), *gain]
        cells += [f"{costs['passes']:.1f}", f"{costs['seconds']:.0f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--noise", type=float, nargs="+", default=[0.4])
    parser.add_argument("--clean", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=100)
    parser.add_argument("--meta-lr", type=float, default=1e-3)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--output", type=Path, default=Path("label-noise.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    done = {(line["arm"], line["seed"], line["noise"]) for line in lines}
    each = itertools.product(options.arms, range(options.seeds), options.noise)
    for arm, seed, noise in tqdm(sorted(set(each) - done, key=lambda one: one[1:])):
        lines.append(run(arm, seed, noise, options))
        with options.output.open("a") as file:
            file.write(json.dumps(lines[-1], default=np.ndarray.tolist) + "\n")
    for noise in sorted({line["noise"] for line in lines}):
        print(f"{noise:.0%} flipped\n\n{table([line for line in lines if line['noise'] == noise])}\n")


if __name__ == "__main__":
    main()
