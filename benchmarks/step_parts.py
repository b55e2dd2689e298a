"""Where the time of a training step goes, before and after what `fit` does by default: a table and a stacked bar.

    python benchmarks/step_parts.py [--sizes minilm e5-small] [--rounds 10] [--figure]

A step has 16 rows of about 25 tokens, which read 3,000 of the vocabulary's tokens, float32, fused AdamW, clipping at 1.
Seconds are those of the processor, with one thread; models have random weights. The three bars of a size:

    padded to 128    every row has 128 tokens, as in scripts that pad to a fixed length
    padded to batch  rows have the length of the longest row of their batch; here all have 25 tokens
    compact          and word embeddings that no text reads are left out, as `fit` does

The arms of a round come in random order, and each part is the median over rounds. ``--figure`` writes
docs/figures/step-parts.svg.
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from tqdm import tqdm
from transformers import BertConfig, BertForSequenceClassification

from steadytune import compact_vocabulary

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "steadytune"  # the same bytes every time
matplotlib.rcParams["svg.fonttype"] = "none"

FIGURE = Path(__file__).parent.parent / "docs" / "figures" / "step-parts.svg"
ROWS, TOKENS, PADDED, READ = 16, 25, 128, 3000
SIZES = {  # vocabulary, blocks
    "minilm": (30_522, 6),
    "e5-small": (250_037, 12),
}
PARTS = ("forward", "backward", "clipping", "optimizer")
ARMS = {f"padded to {PADDED}": (PADDED, False), "padded to batch": (TOKENS, False), "compact": (TOKENS, True)}


class Contestant:
    """A model with its optimizer and one batch."""

    def __init__(self, size: str, length: int, compact: bool) -> None:
        vocabulary, blocks = SIZES[size]
        torch.manual_seed(0)
        self.model = BertForSequenceClassification(
            BertConfig(
                vocab_size=vocabulary, hidden_size=384, num_hidden_layers=blocks, num_attention_heads=12,
                intermediate_size=1536,
            )
        ).train()  # fmt: skip
        read = torch.randperm(vocabulary)[:READ]
        held = compact_vocabulary(self.model, read) if compact else None
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 2e-5, fused=True)
        if held is not None:
            held.attach(self.optimizer)
        mask = (torch.arange(length) < TOKENS).long().expand(ROWS, length)
        ids = read[torch.randint(READ, (ROWS, length))] * mask
        self.inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(ROWS) % 2}

    def step(self) -> list[float]:
        """Seconds of each part."""
        moments = [time.process_time()]
        loss = self.model(**self.inputs).loss
        moments.append(time.process_time())
        loss.backward()
        moments.append(time.process_time())
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        moments.append(time.process_time())
        self.optimizer.step()
        self.optimizer.zero_grad()
        moments.append(time.process_time())
        return np.diff(moments).tolist()


def measure(size: str, rounds: int) -> dict[str, np.ndarray]:
    """Median seconds of the parts of a step, by arm."""
    contestants = {arm: Contestant(size, *how) for arm, how in ARMS.items()}
    seconds: dict[str, list[list[float]]] = {arm: [] for arm in ARMS}
    for i in tqdm(range(rounds + 1), desc=size):
        for arm in random.sample(list(ARMS), len(ARMS)):  # memory that one arm frees changes the time of the next
            taken = contestants[arm].step()
            if i:  # the first makes the optimizer's state
                seconds[arm].append(taken)
    return {arm: np.median(taken, axis=0) for arm, taken in seconds.items()}


def draw(measured: dict[str, dict[str, np.ndarray]]) -> None:
    """Stacked bars, one panel for each size."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(measured), figsize=(4.5 * len(measured), 3.2), squeeze=False)
    for axis, (size, arms) in zip(axes[0], measured.items(), strict=True):
        bottom = np.zeros(len(arms))
        for part, values in zip(PARTS, np.array(list(arms.values())).T, strict=True):
            axis.bar(list(arms), values, bottom=bottom, label=part, width=0.6)
            bottom += values
        for x, whole in enumerate(bottom):
            axis.text(x, whole, f"{whole:.2f} s", ha="center", va="bottom", fontsize=8)
        axis.set_title(f"{size}: {SIZES[size][0]:,} tokens, {SIZES[size][1]} blocks", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.margins(y=0.1)
    axes[0][0].set_ylabel("processor seconds of a step", fontsize=8)
    axes[0][-1].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(FIGURE, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--figure", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measured = {size: measure(size, options.rounds) for size in options.sizes}
    print("| model | batch | " + " | ".join(PARTS) + " | step |")
    print("|---|---|" + "--:|" * (len(PARTS) + 1))
    for size, arms in measured.items():
        for arm, parts in arms.items():
            print(f"| {size} | {arm} | " + " | ".join(f"{p:.3f}" for p in parts) + f" | {parts.sum():.3f} |")
    if options.figure:
        draw(measured)


if __name__ == "__main__":
    main()
