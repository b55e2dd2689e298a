"""A study of a tiny model on toy files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd

from fit_helpers import save_tiny_bert, toy
from steadytune.bench.spec import Study
from steadytune.bench.study import WORK, run_study

TIMINGS = {"cost", "finished", "context"}


def make_root(folder: Path) -> Path:
    """Toy rows under the names of SST-2, its out-of-domain sets, and STS-B; and a tiny model."""
    save_tiny_bert(folder / "bert")
    sizes = {"sst2/train": 90, "sst2/validation": 30, "imdb/test": 20, "yelp/test": 20, "amazon/test": 20,
             "imdb_counterfactual/test_original": 20, "imdb_counterfactual/test_revised": 20,
             "advglue/sst2": 20}  # fmt: skip
    for start, (file, rows) in enumerate(sizes.items()):
        frame = toy(rows, start=100 * start)
        one = int(not file.startswith("imdb/"))  # IMDB numbers its labels the other way round
        put(folder, file, sentence=frame["text"], label=[one if y == "up" else 1 - one for y in frame["label"]])
    for start, (file, rows) in enumerate({"stsb/train": 60, "stsb/validation": 30}.items()):
        frame = toy(rows, pair=True, start=2000 + 100 * start)
        put(folder, file, sentence1=frame["text"], sentence2=frame["other"], label=frame["score"])
    return folder


def put(folder: Path, file: str, **columns: Any) -> None:
    (folder / file).parent.mkdir(exist_ok=True)
    pd.DataFrame(columns).to_parquet(folder / f"{file}.parquet")


def small(folder: Path, **changes: Any) -> Study:
    """Two recipes, one of them with DPS, two seeds."""
    given: dict[str, Any] = {
        "name": "small",
        "models": {"tiny": str(folder / "bert")},
        "tasks": ["sst2"],
        "train_sizes": [32],
        "recipes": {"plain": {}, "dps_mix": {"methods": ["dps_mix:update_ratio=0.34"]}},
        "options": {"steps": 6, "batch_size": 8, "lr": 1e-3},
        "seeds": 2,
    }
    return Study.of({**given, **changes})


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Records by id."""
    return {file.stem: json.loads(file.read_text()) for file in sorted((folder / "records").glob("*.json"))}


def comparable(folder: Path) -> dict[str, dict[str, Any]]:
    """A record without times and places."""
    found = records(folder)
    return {id: {k: v for k, v in record.items() if k not in TIMINGS} for id, record in found.items()}


def predictions(folder: Path) -> dict[str, bytes]:
    return {file.stem: file.read_bytes() for file in sorted((folder / "predictions").glob("*.parquet"))}


class Counting:
    """An engine in this process that writes down which runs it did."""

    def __init__(self, log: Path) -> None:
        self.log = log

    def map(self, tasks, begun):
        from steadytune.bench.pool import Here

        for outcome in Here(WORK).map(tasks, begun):
            if outcome.value in ("done", "failed"):
                with self.log.open("a") as stream:
                    stream.write(outcome.task[1].id + "\n")
            yield outcome


def conduct(root: str, output: str) -> None:
    """A study in this process, for tests that kill it."""
    import torch

    torch.set_num_threads(1)
    study = small(Path(root), seeds=3)
    run_study(study, output, data_root=root, engine=Counting(Path(f"{output}.{os.getpid()}.log")), progress=False)
