"""Meta-Weight-Net on flipped labels with a few clean rows, beside training on all of them.

    python benchmarks/label_noise.py --data-root DIR --model DIR [--task sst2] [--rows 1000] [--noise 0.4] [--clean 100]
        [--seeds 6] [--output FILE]

For each seed the same rows, head and orders:

    noisy           plain training on the noisy rows
    noisy + clean   plain training on both
    clean           plain training on the clean rows alone, as many steps
    meta            training on the noisy rows, weighed by what the clean ones say (MetaWeightNet)
    meta + clean    the same, trained on both

Each run leaves a line in the file; what has one is not run again. The table shows means over seeds, and paired
differences to ``noisy + clean`` with their 95 % interval and sign-flip p.
"""

from __future__ import annotations

import argparse
import dataclasses
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
from steadytune.tasks import find, load

ARMS = ("noisy", "noisy + clean", "clean", "meta", "meta + clean")
BASE = "noisy + clean"


def run(arm: str, seed: int, options: argparse.Namespace) -> dict:
    """Train and test one arm; returns its line of the file."""
    table, tests = load(options.task, options.data_root)
    plan = planning.make_plan(
        table, model=options.model, tests=tests, metric=find(options.task).metric, validation_share=0.0,
        train_size=options.rows + options.clean, seed=seed, steps=options.steps, lr=options.lr,
        max_length=options.max_length, save_steps=0, progress=False,
    )  # fmt: skip
    rows = plan.data.train.sample(frac=1, random_state=seed)
    clean, noisy = rows.iloc[: options.clean], rows.iloc[options.clean :]
    spec = {"corruption": {"label_noise": options.noise, "imbalance": None}, "seeds": {"subset": seed}}
    noisy = corrupted(noisy, plan.data.problem, spec)
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
    _, scores = planning.evaluate(planning.fitted_model(plan, pretrained, [trained.model]), plan.data)
    (found,) = (s[plan.metric] for s in scores.values())
    return {"arm": arm, "seed": seed, "score": found, "seconds": trained.seconds, "passes": trained.passes}


def table(lines: list[dict]) -> str:
    """Markdown."""
    frame = pd.DataFrame(lines)
    scores = frame.pivot(index="seed", columns="arm", values="score").dropna()
    means = frame.groupby("arm")[["seconds", "passes"]].mean()
    rows = ["| arm | score | sd | n | gain over noisy + clean | 95 % | p | passes | seconds |", "|---" * 9 + "|"]
    for arm in (a for a in ARMS if a in scores):
        gain = ["", "", ""]
        if arm != BASE and len(scores) > 1:
            found = compare(scores[arm].to_numpy(), scores[BASE].to_numpy())
            between = "{:+.4f} to {:+.4f}".format(*found.interval) if found.interval else ""
            gain = [f"{found.difference:+.4f}", between, f"{found.p:.3f}"]
        cells = [arm, f"{scores[arm].mean():.4f}", f"{scores[arm].std():.4f}", str(len(scores)), *gain]
        cells += [f"{means.loc[arm, 'passes']:.1f}", f"{means.loc[arm, 'seconds']:.0f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--noise", type=float, default=0.4)
    parser.add_argument("--clean", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=100)
    parser.add_argument("--meta-lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--output", type=Path, default=Path("label-noise.jsonl"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [json.loads(line) for line in options.output.read_text().splitlines()] if options.output.exists() else []
    done = {(line["arm"], line["seed"]) for line in lines}
    todo = [(arm, seed) for seed in range(options.seeds) for arm in options.arms if (arm, seed) not in done]
    for arm, seed in tqdm(todo):
        lines.append(run(arm, seed, options))
        with options.output.open("a") as file:
            file.write(json.dumps(lines[-1], default=np.ndarray.tolist) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
