"""What a whole fine-tuning costs in steadytune and in other libraries: processor seconds, peak memory, accuracy.

    python benchmarks/peers.py --data-root DIR --model DIR [--task sst2] [--rows 500] [--steps 50 150 400] [--rounds 3]
                               [--target 0.78] [--records FILE] [--figure]
    python benchmarks/peers.py --tables DIR --model DIR --task NAME ...

``--tables`` is a folder with train.parquet and test.parquet, each with a column of texts and then one of labels, as
`make_sources.py` writes it; ``--task`` is then only its name in the records.

Each figure is one process of its own, from its start to its end: imports, loading, tokenising, training, scores of the
same test rows, and writing the model. The arms of a round run one after another in random order. A round draws training
rows that all its arms share, and its number is their seed. Seconds are those of the processor (user and system), with
one thread, so that other work on the machine changes them little. Libraries that are not installed are named and left
out. With several numbers of steps and a target, the second table says how many seconds an arm takes to the smallest
number of steps whose accuracy, as a mean over rounds, reaches the target. ``--records`` keeps a line for each process,
and what is there is not measured again; with ``--figure`` they are drawn as docs/figures/peers.svg. The arms:

    steadytune            `steadytune fit` with its defaults: word embeddings that no training text reads are left out,
                          batches of similar length, and a linear probe beside the scores, for which every row passes
                          the frozen model once
    steadytune, no probe  the same with --no-probe
    trainer               transformers.Trainer as scripts use it, with the same rate, warm-up, decay, clipping, batch
                          size and number of steps (its own defaults: fused AdamW, random batches padded to the longest)
    peft                  the trainer arm with LoRA (rank 16 on queries and values): few weights are trained
    setfit                SetFit with its defaults on the same rows, but for the number of steps: contrastive steps of
                          as many pairs as the others have rows, then a logistic regression
    sentence-transformers a logistic regression of scikit-learn on its frozen embeddings: nothing is fine-tuned, so that
                          it has one figure a round, with 0 steps

Only the first three do the same work, and of a sentence encoder whose pooler was never trained `fit` takes the mean
over tokens, by one more block. The accuracy of one round has a standard error of one to two points.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "peers.svg"
NEEDS = {"peft": "peft", "setfit": "setfit", "sentence-transformers": "sentence_transformers"}  # arm -> module
LENGTH, WARMUP, DECAY, CLIP = 128, 0.1, 0.01, 1.0


# ---- the arms: each runs in a process of its own, writes the model, and returns the accuracy


def steadytune(options: argparse.Namespace, folder: str, *more: str) -> float:
    """The command, as a user gives it."""
    from steadytune.cli import app

    numbers = {"--steps": options.steps, "--lr": options.lr, "--batch-size": options.batch_size, "--seed": options.seed}
    given = [str(part) for pair in numbers.items() for part in pair]
    app(
        ["fit", options.train, "--test", options.test, "--text", "text", "--label", "label", "--model", options.model,
         "--validation-share", "0", "--save-steps", "0", "--quiet", "--output", folder, *given, *more],
        standalone_mode=False,
    )  # fmt: skip
    return float(json.loads(Path(folder, "metrics.json").read_text(encoding="utf-8"))["sets"]["test"]["accuracy"])


def trainer(options: argparse.Namespace, folder: str, *, lora: bool = False) -> float:
    """The stock Trainer, with equal settings."""
    import torch
    from transformers import (
        AutoModelForSequenceClassification,
        AutoTokenizer,
        DataCollatorWithPadding,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    set_seed(options.seed)
    train, test, names = tables(options)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model: Any = AutoModelForSequenceClassification.from_pretrained(
        options.model, num_labels=len(names), dtype=torch.float32
    )
    if lora:
        from peft import LoraConfig, TaskType, get_peft_model

        model = get_peft_model(model, LoraConfig(task_type=TaskType.SEQ_CLS, r=16, lora_alpha=32, lora_dropout=0.05))

    def features(rows: pd.DataFrame) -> list[dict[str, Any]]:
        encoded = tokenizer(rows["text"].tolist(), truncation=True, max_length=LENGTH)
        labels = [names.index(label) for label in rows["label"]]
        return [{**{key: encoded[key][i] for key in encoded}, "labels": label} for i, label in enumerate(labels)]

    args = TrainingArguments(
        folder, max_steps=options.steps, learning_rate=options.lr, warmup_steps=WARMUP, weight_decay=DECAY,
        max_grad_norm=CLIP, per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=4 * options.batch_size, seed=options.seed, save_strategy="no", report_to="none",
        disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    own = Trainer(model, args, train_dataset=features(train), data_collator=DataCollatorWithPadding(tokenizer))
    own.train()
    predicted = own.predict(features(test)).predictions.argmax(1)
    own.save_model(folder)
    tokenizer.save_pretrained(folder)
    return float((np.array(names)[predicted] == test["label"].to_numpy()).mean())


def setfit(options: argparse.Namespace, folder: str) -> float:
    """SetFit with its defaults."""
    from datasets import Dataset
    from setfit import SetFitModel, Trainer, TrainingArguments

    train, test, _ = tables(options)
    model = SetFitModel.from_pretrained(options.model)
    args = TrainingArguments(
        output_dir=folder, batch_size=options.batch_size, num_epochs=1, max_steps=options.steps, seed=options.seed
    )
    Trainer(model=model, args=args, train_dataset=Dataset.from_pandas(train, preserve_index=False)).train()
    predicted = np.asarray(model.predict(test["text"].tolist()))
    model.save_pretrained(folder)
    return float((predicted == test["label"].to_numpy()).mean())


def frozen(options: argparse.Namespace, folder: str) -> float:
    """A logistic regression on frozen sentence embeddings."""
    from sentence_transformers import SentenceTransformer
    from sklearn.linear_model import LogisticRegressionCV

    train, test, _ = tables(options)
    model = SentenceTransformer(options.model, device="cpu")
    head = LogisticRegressionCV(max_iter=1000).fit(model.encode(train["text"].tolist()), train["label"])
    return float(head.score(model.encode(test["text"].tolist()), test["label"]))


ARMS: dict[str, Callable[[argparse.Namespace, str], float]] = {
    "steadytune": steadytune,
    "steadytune, no probe": lambda options, folder: steadytune(options, folder, "--no-probe"),
    "trainer": trainer,
    "peft": lambda options, folder: trainer(options, folder, lora=True),
    "setfit": setfit,
    "sentence-transformers": frozen,
}


def tables(options: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame, list[str]]:
    """Training rows, test rows, and the class names in order."""
    train, test = (pd.read_csv(file, dtype=str, keep_default_na=False) for file in (options.train, options.test))
    return train, test, sorted(set(train["label"]))


# ---- measuring


def write_tables(options: argparse.Namespace, folder: Path) -> None:
    """Draw the test rows of all rounds and the training rows of each."""
    train, test = labelled_texts(options)
    test.sample(min(options.test_rows, len(test)), random_state=0).to_csv(folder / "test.csv", index=False)
    for seed in range(options.rounds):
        train.sample(options.rows, random_state=seed).to_csv(folder / f"train-{seed}.csv", index=False)
    options.drawn = str(folder)


def labelled_texts(options: argparse.Namespace) -> tuple[pd.DataFrame, pd.DataFrame]:
    """All training rows and test rows, with the columns text and label."""
    if options.tables is not None:
        files = [options.tables / f"{part}.parquet" for part in ("train", "test")]
        train, test = (pd.read_parquet(file).set_axis(["text", "label"], axis="columns") for file in files)
        return train, test
    from steadytune.data.tables import examples
    from steadytune.tasks import load

    table, tests = load(options.task, options.data_root)
    return examples(table)[["text", "label"]], examples(next(iter(tests.values())))[["text", "label"]]


def run(arm: str, steps: int, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Processor seconds, peak memory (MB) and accuracy of one process."""
    with tempfile.TemporaryDirectory() as folder:
        given = {
            "model": options.model, "lr": options.lr, "batch_size": options.batch_size, "steps": steps, "seed": seed,
            "train": f"{options.drawn}/train-{seed}.csv", "test": f"{options.drawn}/test.csv",
            "folder": f"{folder}/out",
        }  # fmt: skip
        log = Path(folder, "log")
        with log.open("w") as file:
            child = subprocess.Popen(
                [sys.executable, __file__, "--arm", arm, "--given", json.dumps(given)], stdout=file, stderr=file,
                env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
            )  # fmt: skip
            _, status, used = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"{arm} failed:\n{log.read_text()[-3000:]}")
        accuracy = float(Path(folder, "accuracy").read_text())
    return {
        "seconds": used.ru_utime + used.ru_stime,
        "system": used.ru_stime,
        "memory": used.ru_maxrss / 1024,
        "accuracy": accuracy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--tables", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--test-rows", type=int, default=872)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 150, 400])
    parser.add_argument("--target", type=float)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--records", type=Path, help="file of JSON lines")
    parser.add_argument("--figure", action="store_true")
    parser.add_argument("--arm", help=argparse.SUPPRESS)
    parser.add_argument("--given", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        import torch

        torch.set_num_threads(1)
        given = argparse.Namespace(**json.loads(options.given))
        accuracy = ARMS[options.arm](given, given.folder)
        Path(given.folder).with_name("accuracy").write_text(str(accuracy))
        return
    if (options.data_root is None) == (options.tables is None) or options.model is None:
        parser.error("give --model, and --data-root or --tables")
    missing = [arm for arm in options.arms if arm in NEEDS and importlib.util.find_spec(NEEDS[arm]) is None]
    arms = [arm for arm in options.arms if arm not in missing]
    cases = [(arm, steps) for arm in arms for steps in ([0] if arm == "sentence-transformers" else options.steps)]
    kept = read(options.records, options)
    with tempfile.TemporaryDirectory() as folder:
        write_tables(options, Path(folder))
        for seed in tqdm(range(options.rounds)):
            for arm, steps in random.Random(seed).sample(cases, len(cases)):
                if (arm, steps, seed) not in kept:
                    kept[arm, steps, seed] = run(arm, steps, seed, options)
                    keep(options.records, options, arm, steps, seed, kept[arm, steps, seed])
    measured = {case: [kept[*case, seed] for seed in range(options.rounds)] for case in cases}
    for arm in missing:
        print(f"{arm}: {NEEDS[arm]} is not installed, left out")
    print(
        f"{options.task}, {options.rows} rows, steps of {options.batch_size} rows, one thread, {options.rounds} draws\n"
    )
    print_costs(measured)
    if options.target is not None:
        print_seconds_to(options.target, arms, measured)
    if options.figure:
        draw(arms, measured)


def read(file: Path | None, options: argparse.Namespace) -> dict[tuple[str, int, int], dict[str, float]]:
    """What the records hold of this task and number of rows: arm, steps and draw -> figures."""
    lines = file.read_text(encoding="utf-8").splitlines() if file is not None and file.exists() else []
    found = [json.loads(line) for line in lines]
    return {
        (one["arm"], one["steps"], one["draw"]): one["figures"]
        for one in found
        if (one["task"], one["rows"]) == (options.task, options.rows)
    }


def keep(
    file: Path | None, options: argparse.Namespace, arm: str, steps: int, draw: int, figures: dict[str, float]
) -> None:
    """Add a line to the records."""
    if file is None:
        return
    line = {"task": options.task, "rows": options.rows, "arm": arm, "steps": steps, "draw": draw, "figures": figures}
    with file.open("a", encoding="utf-8") as records:
        records.write(json.dumps(line) + "\n")


def draw(arms: list[str], measured: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    """Mean accuracy over median seconds, a line for each arm."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "steadytune"  # the same bytes every time
    matplotlib.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 3.4))
    for arm in arms:
        points = sorted(
            (np.median(column(found, "seconds")), 100 * column(found, "accuracy").mean(), steps)
            for (name, steps), found in measured.items()
            if name == arm
        )
        seconds, accuracies, steps = zip(*points, strict=True)
        axis.plot(seconds, accuracies, marker="o", markersize=4, label=arm)
        for place in zip(steps, seconds, accuracies, strict=True):
            if place[0]:
                axis.annotate(f"{place[0]}", place[1:], xytext=(3, 4), textcoords="offset points", fontsize=7)
    axis.set_xlabel("processor seconds of the whole process; numbers at the points are steps", fontsize=8)
    axis.set_ylabel("accuracy, %", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Date": None})


def column(found: list[dict[str, float]], key: str) -> np.ndarray:
    return np.array([one[key] for one in found])


def print_costs(measured: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    """The table of all arms and numbers of steps."""
    print("| arm | steps | processor seconds | of these system | of the trainer's | peak MB | accuracy, mean (SD) |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    for (arm, steps), found in measured.items():
        seconds, accuracy = column(found, "seconds"), 100 * column(found, "accuracy")
        ratio = ""
        if ("trainer", steps) in measured:
            ratios = seconds / column(measured["trainer", steps], "seconds")
            ratio = f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
        spread = f" ({accuracy.std(ddof=1):.1f})" if len(accuracy) > 1 else ""
        print(
            f"| {arm} | {steps} | {np.median(seconds):.1f} | {np.median(column(found, 'system')):.1f} | {ratio} "
            f"| {np.median(column(found, 'memory')):.0f} | {accuracy.mean():.1f}{spread} |"
        )


def print_seconds_to(target: float, arms: list[str], measured: dict[tuple[str, int], list[dict[str, float]]]) -> None:
    """The table of seconds to the smallest number of steps whose mean accuracy reaches the target."""
    print(
        f"\n| arm | steps to an accuracy of {100 * target:g} | processor seconds (smallest to largest) |\n|---|--:|--:|"
    )
    for arm in arms:
        reached = [
            (steps, column(found, "seconds"))
            for (name, steps), found in measured.items()
            if name == arm and column(found, "accuracy").mean() >= target
        ]
        if not reached:
            print(f"| {arm} | not reached | |")
            continue
        steps, seconds = min(reached, key=lambda one: one[0])
        print(f"| {arm} | {steps} | {np.median(seconds):.1f} ({seconds.min():.1f} to {seconds.max():.1f}) |")


if __name__ == "__main__":
    main()
