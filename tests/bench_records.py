"""Synthetic bench folders for the tests of the report."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

RECIPES = {"plain": 1.0, "dps_dense": 1.05, "rdrop": 2.0, "mixout": 1.15}  # passes a step
TASKS = {
    "sst2": ("accuracy", ("imdb/test", "yelp/test"), 0.509),
    "rte": ("accuracy", ("scitail/test", "sick/test", "snli/test"), 0.527),
    "cola": ("matthews", ("cola/validation_out_of_domain",), 0.0),
}
STUDY = """# how steady are they?
recipes: [plain, dps_dense, rdrop, mixout]
tasks: [sst2, rte, cola]
train_sizes: [500, 2000]
seeds: 8
"""


def record(
    recipe: str = "plain",
    seed: int = 0,
    score: float | None = 0.8,
    *,
    task: str = "sst2",
    model: str = "minilm",
    size: int | None = 500,
    metric: str = "accuracy",
    out: Mapping[str, float | None] | None = None,
    baseline: float | None = 0.5,
    passes: float = 1.0,
    seconds: float = 60.0,
    steps: int = 160,
    methods: Sequence[str] | None = None,
    error: str | None = None,
    seen: Sequence[str] = (),
    **changes: Any,
) -> dict[str, Any]:
    """One record; ``score`` is in domain, ``error`` makes it a failed run, ``changes`` go to the spec."""
    names = [] if recipe.startswith("plain") else [recipe]
    spec = {
        "model": {"name": model, "fingerprint": "53aa5117"},
        "task": {"name": task, "fingerprint": f"of {task}"},
        "recipe": recipe,
        "methods": [{"name": name, "options": {"keep": 0.7}} for name in (names if methods is None else methods)],
        "options": {"lr": 1e-4, "batch_size": 16, "steps": steps, "dropout": None},
        "train_size": size,
        "corruption": {"label_noise": 0.0, "imbalance": None},
        "tests": {"out_of_domain": bool(out), "rows": 1000},
        "seeds": dict.fromkeys(("init", "data", "dropout", "method", "subset"), seed),
        **changes,
    }
    sets = {f"{task}/validation": {"domain": "in", "rows": 872, "baseline": baseline, metric: score}}
    for name, value in (out or {}).items():
        sets[name] = {"domain": "out", "rows": 1000, "baseline": 0.5, metric: value}
    failed = error is not None
    return {
        "format": 1,
        "id": hashlib.sha256(json.dumps(spec).encode()).hexdigest()[:16],
        "spec": spec,
        "status": "failed" if failed else "done",
        "error": error,
        "metric": metric,
        "sets": {} if failed else sets,
        "training": None
        if failed
        else {"steps": steps, "loss": 0.41, "failing": False, "restarts": 0, "curve": [[20, 0.71]]},
        "cost": {"seconds": seconds}
        if failed
        else {"seconds": seconds + 9, "train_seconds": seconds, "passes": passes, "peak_memory": 3 << 28},
        "context": {
            "steadytune": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7", "commit": "a15e970",
            "device": "cpu", "hardware": "2 cores", "threads": 1,
        },
        "seen": list(seen),
        "finished": f"2026-11-22T07:30:{seed % 60:02d}+00:00",
    }  # fmt: skip


def write_bench(folder: Path, records: Sequence[Mapping[str, Any]], study: str = STUDY) -> Path:
    """A bench folder that holds these records."""
    (folder / "records").mkdir(parents=True)
    (folder / "study.yaml").write_text(study)
    for one in records:
        (folder / "records" / f"{one['id']}.json").write_text(json.dumps(one))
    return folder


def synthetic(
    *, seeds: int = 8, sizes: Sequence[int | None] = (500, 2000), tasks: Mapping[str, Any] = TASKS, models: int = 1
) -> list[dict[str, Any]]:
    """A whole study of four recipes, with runs that failed, collapsed, or are missing; the same on every call."""
    rng = np.random.default_rng(0)
    found = []
    for model, task, size in itertools.product(range(models), tasks, sizes):
        metric, out, baseline = tasks[task]
        luck = rng.normal(0, 0.012, seeds)
        for rank, (recipe, passes) in enumerate(RECIPES.items()):
            for seed in range(seeds):
                score = 0.72 + 0.05 * (size != 500) + 0.008 * rank + luck[seed] + rng.normal(0, 0.014 - 0.003 * rank)
                score -= 0.25 * (metric == "matthews")
                beyond = {name: float(score - 0.06 + rng.normal(0, 0.02)) for name in out}
                if (task, size, seed) == ("rte", 500, 3) and recipe == "plain":
                    score = baseline
                if (task, recipe, seed) == ("cola", "mixout", 5):
                    continue
                lost = (task, size, recipe) == ("rte", 2000, "rdrop") and seed < 2
                found.append(
                    record(
                        recipe, seed, float(score), task=task, size=size, metric=metric, out=beyond, baseline=baseline,
                        passes=passes, seconds=float(52 * passes + rng.normal(0, 2)), model=f"minilm{model or ''}",
                        error="Traceback (most recent call last):\nRuntimeError: out of memory" if lost else None,
                        seen=["mnli", "snli"] if task == "rte" else [],
                    )
                )  # fmt: skip
    return found
