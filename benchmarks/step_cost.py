"""What each method costs per optimizer step and per weight, against plain fused AdamW interleaved in one process.

    python benchmarks/step_cost.py [--lengths 128 64 16] [--rounds 40] [--threads 2] [--clock wall] [--json FILE]

The model has MiniLM's size and random weights (22.7 M parameters, 10.8 M of them in linear layers); batch 16, float32.

The figure is the time outside forward and backward (building the forward view, hooks, optimizer), minus that of the
plain step of the same round, as a share of the plain step. It leaves forward and backward out because they are the same
in both, and the time of whole steps varies by several per cent even on a quiet machine. The interval is a 95 %
bootstrap over rounds. Each cycle of 40 steps holds both DPS stages and their changes in the proportion of a run of 400
steps. For methods with more passes, the table has the time of the whole step in plain steps, and the number of passes.

``--clock cpu`` counts CPU time, which other processes on the machine do not change. Use it with one thread: with more,
idle threads spin and are counted too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import random
import time
from collections.abc import Callable

import numpy as np
import torch
import transformers
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

import steadytune
from steadytune import METHODS, SMART, SWA, BregmanProximal, ImplicitTune, Method, Run, WeightMixup

LOOK = {"input_ids": torch.arange(64).view(4, 16), "labels": torch.tensor([0, 1, 1, 0])}
OUTER: list[dict] = []  # one batch of held-out rows, as large as a training batch


def outer() -> list[dict]:
    """Held-out batches, on which bi-level methods take their outer gradient."""
    return OUTER


# options without a default, or without one that trains
NEEDED = {"outer": outer, "unlabelled": outer, "domain": lambda inputs: inputs["input_ids"][:, 0] % 2}


def alone(cls: type[Method]) -> list[Method]:
    """A recipe of one method with its defaults."""
    return [cls(**{field.name: NEEDED[field.name] for field in dataclasses.fields(cls) if field.name in NEEDED})]


RECIPES = {
    "plain": [],
    **{cls.__name__: alone(cls) for cls in METHODS.values()},
    "SWA": [SWA(start=0.0)],  # it averages from the first step on, so that its cost is in every step
    "WeightMixup difference": [WeightMixup(outer=outer, order="difference")],
    "WeightMixup fixed": [WeightMixup(alpha=0.9)],
    "ImplicitTune 3 terms": [ImplicitTune(outer=outer, terms=3)],
    "SMART proximal": [SMART(proximal=BregmanProximal())],
}
CHOICES = [name for name in RECIPES if name != "plain"]
TARGETS = {
    **{"DPSDense": 0.01, "Mixout": 0.02, "DPSMix": 0.03, "EMA": 0.03, "ChildTuningF": 0.08},
    **dict.fromkeys(("ChildTuningD", "SIFT", "ROSESecond", "L2SP", "RecAdam"), 0.02),
}
CYCLE = 40  # steps of one DPS cycle
BATCH = 16


class Contestant:
    """One recipe with its own model and optimizer."""

    def __init__(self, methods: list) -> None:
        torch.manual_seed(0)
        config = BertConfig(
            vocab_size=30522, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
        )
        self.model = BertForSequenceClassification(config).train()
        run = Run(self.model, methods, total_steps=400, data=lambda: [LOOK])
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 2e-5, fused=True)
        self.run = run.attach(self.optimizer) if methods else None
        self.bytes: list[int] = []
        self.bytes_during = 0

    def step(self, inputs: dict, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float]:
        """Seconds of the whole step, and of what is not forward or backward."""
        start = clock()
        if self.run:
            self.run.enter()
        entered = clock()
        loss = self.run.loss(inputs) if self.run else self.model(**inputs).loss
        loss.backward()
        passed = clock()
        if self.run:
            self.bytes_during = max(self.bytes_during, self.run.nbytes())
        counted = clock()
        self.optimizer.step()
        self.optimizer.zero_grad()
        end = clock()
        if self.run:
            self.bytes.append(self.run.nbytes())
        return end - start - (counted - passed), (entered - start) + (end - counted)

    def forget(self) -> None:
        """Set the optimizer's state back to that before the first step, without freeing it."""
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()


def interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95 % bootstrap interval of the mean."""
    draws = np.random.default_rng(seed).choice(values, (4000, len(values))).mean(1)
    return float(np.quantile(draws, 0.025)), float(np.quantile(draws, 0.975))


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def batch(length: int, seed: int) -> dict:
    """Random rows."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(30522, (BATCH, length), generator=generator),
        "attention_mask": torch.ones(BATCH, length, dtype=torch.long),
        "labels": torch.randint(2, (BATCH,), generator=generator),
    }


def measure(length: int, rounds: int, names: list[str], clock: Callable[[], float]) -> list[dict]:
    """One row per recipe at one sequence length."""
    contestants = {name: Contestant(RECIPES[name]) for name in ["plain", *names]}
    inputs, OUTER[:] = batch(length, seed=1), [batch(length, seed=2)]
    for contestant in contestants.values():  # optimizer state and memory pools, outside the count
        contestant.step(inputs)
        if contestant.run:
            contestant.run.restart()
            contestant.forget()
            contestant.bytes, contestant.bytes_during = [], 0
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    order = list(contestants)
    for _ in tqdm(range(rounds), desc=f"length {length}"):
        random.shuffle(order)
        for name in order:
            times[name].append(contestants[name].step(inputs, clock))
    plain = np.array(times["plain"])
    rows = []
    for name in names:
        own = np.array(times[name])
        extra = (own[:, 1] - plain[:, 1]) / np.median(plain[:, 0])
        low, high = interval(extra)
        rows.append(
            {
                "length": length,
                "recipe": name,
                "plain_step_s": round(float(np.median(plain[:, 0])), 4),
                "extra_share": float(extra.mean()),
                "interval": [low, high],
                "median_extra_share": float(np.median(extra)),
                "target": TARGETS.get(name),
                "whole_step_ratio": float(np.median(own[:, 0] / plain[:, 0])),
                "passes": contestants[name].run.passes.plain,
                "bytes_between_steps": [min(contestants[name].bytes), max(contestants[name].bytes)],
                "bytes_during": contestants[name].bytes_during,
                "linear_weights": linear_weights(contestants[name]),
            }
        )
    return rows


def linear_weights(contestant: Contestant) -> int:
    """Weights in the linear scope."""
    assert contestant.run
    return sum(w.data.numel() for w in contestant.run.weights(scope="linear"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 64, 16])
    parser.add_argument("--rounds", type=int, default=CYCLE)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--recipes", nargs="+", default=CHOICES, choices=CHOICES)
    parser.add_argument("--json", help="also write all figures here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        row
        for length in options.lengths
        for row in measure(length, options.rounds, options.recipes, CLOCKS[options.clock])
    ]
    context = {
        "steadytune": steadytune.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": options.threads,
        "rounds": options.rounds,
        "clock": options.clock,
    }
    print(" ".join(f"{k} {v}" for k, v in context.items()))
    print(
        "| length | recipe | plain step s | extra share % (95 %) | median % | target % | whole step | passes counted "
        "| whole step of count | bytes a weight |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for r in rows:
        low, high = (100 * x for x in r["interval"])
        held = " to ".join(f"{b / r['linear_weights']:.2f}" for b in r["bytes_between_steps"])
        target = "" if r["target"] is None else f"{100 * r['target']:.0f}"
        print(
            f"| {r['length']} | {r['recipe']} | {r['plain_step_s']:.3f} | {100 * r['extra_share']:.2f} "
            f"({low:.2f} to {high:.2f}) | {100 * r['median_extra_share']:.2f} | {target} "
            f"| {r['whole_step_ratio']:.3f} | {r['passes']:.2f} | {r['whole_step_ratio'] / r['passes']:.3f} "
            f"| {held}, during a step {r['bytes_during'] / r['linear_weights']:.2f} |"
        )
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"context": context, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
