"""What a study costs beside its trainings: workers, overhead of a run, and the report of a large folder.

    python benchmarks/study_scaling.py --data-root DIR --model DIR [--runs 8] [--rounds 3] [--records 5000]
    python benchmarks/study_scaling.py --data-root DIR --model DIR --engine ray

Workers have one thread each. A round is the same study with one worker and with two, in random order; the engines are
warmed by a study of their own, which is not counted. With ``--engine ray`` a worker is a node of one processor of a Ray
cluster on this machine. Prints runs per hour and their ratio (2 would be perfect), the
seconds of a run outside training and testing, and the seconds in which `report` reads a synthetic folder.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from steadytune.bench.cluster import Ray
from steadytune.bench.pool import Engine, Pool, ignore, slots
from steadytune.bench.report.write import write_report
from steadytune.bench.spec import Study, Trial
from steadytune.bench.store import Store
from steadytune.bench.study import WORK

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))


def study(options: argparse.Namespace, seeds: range) -> list[Trial]:
    """Short real trainings."""
    return Study.of(
        {
            "name": "scaling",
            "models": options.model,
            "tasks": ["sst2"],
            "train_sizes": [500],
            "recipes": {"plain": {}},
            "options": {"steps": options.steps, "lr": 1e-4, "max_length": 64},
            "seeds": list(seeds),
        }
    ).runs(options.data_root)


@contextmanager
def processes(workers: int) -> Iterator[Engine]:
    """Worker processes."""
    pool = Pool(WORK, slots(workers, workers))
    yield pool
    pool.close()


@contextmanager
def nodes(workers: int) -> Iterator[Engine]:
    """A Ray cluster with so many nodes of one processor."""
    import ray
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    for _ in range(workers - 1):
        cluster.add_node(**node)
    ray.init(cluster.address, log_to_driver=False, logging_level="ERROR")
    yield Ray()
    ray.shutdown()
    cluster.shutdown()


ENGINES = {"local": processes, "ray": nodes}


def runs_per_hour(workers: int, options: argparse.Namespace) -> tuple[float, list[float]]:
    """And the seconds that each run took outside training and testing."""
    with tempfile.TemporaryDirectory() as folder, ENGINES[options.engine](workers) as engine:
        store = Store(folder)
        warm, timed = study(options, range(1000, 1000 + workers)), study(options, range(options.runs))
        store.begin("", {})
        outcomes = engine.map([(folder, run) for run in (*warm, *timed)], ignore)
        for _ in warm:
            next(outcomes)
        started = time.perf_counter()
        for outcome in outcomes:
            assert outcome.value == "done", outcome
        seconds = time.perf_counter() - started
        costs = [json.loads(store.record(run.id).read_text())["cost"] for run in timed]
    outside = [cost["seconds"] - cost["train_seconds"] - cost["test_seconds"] for cost in costs]
    return 3600 * len(timed) / seconds, outside


def report_seconds(records: int) -> tuple[float, float]:
    """By the clock and of the processor, for a folder of four recipes on as many seeds as give so many records."""
    from bench_records import synthetic, write_bench

    with tempfile.TemporaryDirectory() as folder:
        found = synthetic(seeds=-(-records // 24))[:records]
        bench = write_bench(Path(folder, "bench"), found)
        started, before = time.perf_counter(), time.process_time()
        write_report(bench)
        return time.perf_counter() - started, time.process_time() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--engine", choices=ENGINES, default="local")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--records", type=int, default=5000)
    options = parser.parse_args()
    seconds, processor = report_seconds(options.records)
    print(f"report of {options.records} records: {seconds:.1f} s ({processor:.1f} s of the processor)", flush=True)
    order, ratios = random.Random(0), []
    for _ in range(options.rounds):
        found = {w: runs_per_hour(w, options) for w in order.sample([1, 2], 2)}
        ratios.append(found[2][0] / found[1][0])
        for workers, (rate, outside) in sorted(found.items()):
            print(f"{workers} workers: {rate:.0f} runs an hour, {np.median(outside):.2f} s outside (median)")
        print(f"ratio {ratios[-1]:.2f}", flush=True)
    print(f"median ratio {np.median(ratios):.2f}")


if __name__ == "__main__":
    main()
