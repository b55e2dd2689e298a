"""How long a whole fine-tuning takes: steadytune.fit beside the published recipe and the stock Trainer.

    python benchmarks/fit_throughput.py --data-root DIR --model DIR [--tasks cola mrpc rte] [--rows 512] [--rounds 2]

Each figure is one whole run in this process: loading the model, tokenising, training, evaluating on dev rows, writing
the model. The arms of a round are interleaved in random order on the same rows, and a round's seed is its number:

    published   rows padded to 128 tokens, AdamW over single tensors, float32: what the papers' scripts do
    stock       transformers.Trainer with dynamic padding and its default optimizer
    fit         steadytune.fit: dynamic padding of rows sorted by length within shuffled windows, fused AdamW
    fit bf16    the same with bfloat16 autocast
    fit tuned   fit with tune_kernels, whose trial is part of the time

Ratios are of one round, so that a slow spell of the machine hits all arms. The score of each run stands beside it.
``--clock cpu --threads 1`` counts the processor's time, which does not see what a busy host takes away.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import transformers
from tqdm import tqdm
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainingArguments,
    set_seed,
)

import steadytune
from steadytune.data.prepare import Data, prepare
from steadytune.data.tables import Table
from steadytune.fitting.encoding import tokenise
from steadytune.tasks import find, load

BATCH, LENGTH = 16, 128
REFERENCES = ("published", "stock", "fit")  # the arms that others are compared with


def stock(data: Data, options: argparse.Namespace, seed: int, *, padded: bool) -> float:
    """A transformers.Trainer as scripts use it; returns the score."""
    set_seed(seed)
    names = data.problem.names
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=len(names), dtype=torch.float32
    )

    def features(rows: pd.DataFrame) -> list[dict]:
        found = tokenise(rows, tokenizer, LENGTH)
        if padded:
            found = [dict(tokenizer.pad(f, padding="max_length", max_length=LENGTH)) for f in found]
        return [{**f, "labels": y} for f, y in zip(found, data.problem.ids(rows["label"].tolist()), strict=True)]

    ((_, dev),) = data.tests.items()
    steps = -(-len(data.train) // BATCH) * options.epochs
    optimizer = torch.optim.AdamW(model.parameters(), options.lr, foreach=False, fused=False) if padded else None
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder, max_steps=steps, learning_rate=options.lr, warmup_steps=0.1, per_device_train_batch_size=BATCH,
            per_device_eval_batch_size=4 * BATCH, seed=seed, save_strategy="no", report_to="none", disable_tqdm=True,
            use_cpu=not torch.accelerator.is_available(), dataloader_pin_memory=False, weight_decay=0.01,
        )  # fmt: skip
        trainer = transformers.Trainer(
            model, args, train_dataset=features(data.train), data_collator=DataCollatorWithPadding(tokenizer),
            optimizers=(optimizer, None),
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        found = trainer.predict(features(dev)).predictions
        trainer.save_model(folder)
    predicted = np.array(names, dtype=object)[found.argmax(1)]
    return data.problem.score(dev["label"].to_numpy(), predicted)[options.metric]


def ours(data: Data, tables: tuple, options: argparse.Namespace, seed: int, **kernels: bool) -> float:
    table, tests = tables
    with tempfile.TemporaryDirectory() as folder:
        result = steadytune.fit(
            table, tests=tests, model=options.model, output=folder, train_size=options.rows, validation_share=0.0,
            data_seed=0, seed=seed, steps=-(-len(data.train) // BATCH) * options.epochs, lr=options.lr,
            batch_size=BATCH, save_steps=0, progress=False, **kernels,
        )  # fmt: skip
    return next(iter(result.metrics.values()))[options.metric]


def arms(task: str, options: argparse.Namespace) -> dict[str, Callable[[int], float]]:
    """Each arm as a function of the seed, on the same rows."""
    table, tests = load(task, options.data_root)
    tests = {n: _head(t, options.dev_rows) for n, t in list(tests.items())[:1]}
    data = prepare(table, tests, train_size=options.rows, validation_share=0.0, seed=0)
    return {
        "published": lambda seed: stock(data, options, seed, padded=True),
        "stock": lambda seed: stock(data, options, seed, padded=False),
        "fit": lambda seed: ours(data, (table, tests), options, seed),
        "fit bf16": lambda seed: ours(data, (table, tests), options, seed, bf16=True),
        "fit tuned": lambda seed: ours(data, (table, tests), options, seed, tune_kernels=True),
    }


def _head(table: Table, rows: int) -> Table:
    return dataclasses.replace(table, frame=table.frame.sample(min(rows, len(table.frame)), random_state=0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--tasks", nargs="+", default=["cola", "mrpc", "rte"])
    parser.add_argument("--arms", nargs="+", default=["published", "stock", "fit", "fit bf16", "fit tuned"])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--dev-rows", type=int, default=256)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.clock == "cpu" else time.perf_counter
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    small = argparse.Namespace(**{**vars(options), "rows": 32, "dev_rows": 32, "epochs": 1, "metric": "accuracy"})
    for run in arms("sst2", small).values():  # imports and memory pools, outside the count
        run(0)
    print(f"| task | arm | seconds | {' | '.join(f'against {name}' for name in REFERENCES)} | score |")
    print(f"|---|---|---|{'---|' * len(REFERENCES)}---|")
    for task in options.tasks:
        options.metric = find(task).metric
        runs = {name: run for name, run in arms(task, options).items() if name in options.arms}
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        scores: dict[str, list[float]] = {name: [] for name in runs}
        for seed in tqdm(range(options.rounds), desc=task):
            for name in random.Random(seed).sample(list(runs), len(runs)):
                start = clock()
                scores[name].append(runs[name](seed) or 0.0)
                seconds[name].append(clock() - start)
                tqdm.write(f"{task} {name} {seed}: {seconds[name][-1]:.1f} s, {scores[name][-1]:.3f}", file=sys.stderr)
        for name in runs:
            ratios = [
                f"{np.median(np.array(seconds[other]) / np.array(seconds[name])):.2f} x" if other in seconds else ""
                for other in REFERENCES
            ]
            each = " ".join(f"{100 * s:.1f}" for s in scores[name])
            print(f"| {task} | {name} | {np.median(seconds[name]):.1f} | {' | '.join(ratios)} | {each} |")


if __name__ == "__main__":
    main()
