"""What the linear probe beside every fit costs, as a share of the training: both timed in turn in one process.

    python benchmarks/probe_cost.py MODEL DATA_ROOT [--rows 500] [--rounds 5]

Trains a few steps of SST-2 with the defaults of `fit`, and takes the time of a probe on the same rows, in turn. The
share is that of the probe's seconds in the seconds of all steps that `fit` would take. Processor time, one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import torch

from steadytune.fitting import plan as planning
from steadytune.fitting.frozen_probe import frozen_probe
from steadytune.tasks import load

STEPS = 8  # of a round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data_root", type=Path)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    table, tests = load("sst2", given.data_root)
    plan = planning.make_plan(
        table, model=given.model, tests=tests, train_size=given.rows, save_steps=0, progress=False
    )
    short = dataclasses.replace(plan, steps=STEPS)
    pretrained = planning.open_model(plan)
    shares = []
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            setup = planning.make_setup(short, pretrained, Path(folder))
            (job,) = planning.runs(short)
            trainer = setup.trainer(job, job.seeds, Path(folder) / job.name)
            started = time.process_time()
            frozen_probe(plan, pretrained, trainer.model)
            probed = time.process_time()
            trainer.train_here(None)
            trained = time.process_time()
        training = (trained - probed) * plan.steps / STEPS
        shares.append((probed - started) / training)
        print(f"probe {probed - started:.2f} s, {plan.steps} steps {training:.1f} s: {shares[-1]:.2%}")
    judged = sum(len(rows) for rows in plan.data.tests.values())
    print(f"{len(plan.data.train)} training rows, {judged} rows to judge: median {statistics.median(shares):.2%}")


if __name__ == "__main__":
    main()
