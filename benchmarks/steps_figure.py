"""The score over the number of steps, from the committed records of heads.yaml and heads-steps.yaml.

    python benchmarks/steps_figure.py

Writes docs/figures/heads-steps.svg and prints a table: scores, and gains over plain fine-tuning with as many steps.
Gains with one sign in every seed are bold.
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from study_figure import FIGURES, NAMES

from steadytune.bench.records import read_records
from steadytune.bench.stats import compare

RESULTS = Path(__file__).parent.parent / "docs" / "results"
ARMS = {
    "plain": "the pooler, a random head",
    "mean": "the mean, a random head",
    "mean-head": "the mean, a probe's head",
}

Curves = dict[str, dict[str, dict[int, dict[int, float]]]]


def curves(studies: list[Path]) -> Curves:
    """Task -> arm -> number of steps -> seed -> score, in points."""
    found: Curves = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    for record in (record for study in studies for record in read_records(study)[0]):
        spec, arm = record["spec"], re.sub(r"-\d+$", "", record["spec"]["recipe"])
        if record["status"] == "done" and arm in ARMS:
            (inside,) = [scored for scored in record["sets"].values() if scored.get("domain") == "in"]
            scores = found[spec["task"]["name"]][arm][spec["options"]["steps"]]
            scores[spec["seeds"]["subset"]] = 100 * inside[record["metric"]]
    return found


def table(found: Curves) -> str:
    """Scores and gains as Markdown."""
    lines = []
    for task in sorted(found):
        for steps in sorted(found[task]["plain"]):
            cells = []
            for arm in ARMS:
                by_seed, plain = found[task][arm][steps], found[task]["plain"][steps]
                scores = np.array([*by_seed.values()])
                cells.append(f"{scores.mean():.1f} +- {scores.std(ddof=1):.1f}")
                if arm != "plain":
                    seeds = sorted(by_seed.keys() & plain.keys())
                    gain = compare([by_seed[seed] for seed in seeds], [plain[seed] for seed in seeds])
                    bold = "**" if gain.better in (0, 1) else ""
                    low, high = gain.interval
                    cells.append(f"{bold}{gain.difference:+.1f}{bold} ({low:+.1f} to {high:+.1f})")
            lines.append(f"| {NAMES.get(task, task)} | {steps} | " + " | ".join(cells) + " |")
    titles = ["task", "steps", "plain", *(part for arm in list(ARMS)[1:] for part in (arm, "gain"))]
    return "\n".join(["| " + " | ".join(titles) + " |", "|---|" + "--:|" * (len(titles) - 1), *lines])


def main() -> None:
    from matplotlib import pyplot as plt

    found = curves([RESULTS / "heads", RESULTS / "heads-steps"])
    print(table(found))
    figure, axes = plt.subplots(1, len(found), figsize=(9, 2.9))
    for axis, task in zip(axes, sorted(found), strict=True):
        for arm, label in ARMS.items():
            steps = sorted(found[task][arm])
            scores = [np.array([*found[task][arm][count].values()]) for count in steps]
            means, spreads = [s.mean() for s in scores], [s.std(ddof=1) for s in scores]
            axis.errorbar(steps, means, spreads, marker="o", ms=3, capsize=2, label=label)
        axis.set_xscale("log")
        axis.set_xticks(steps, map(str, steps))
        axis.minorticks_off()
        axis.set_title(NAMES.get(task, task), fontsize=9)
        axis.set_xlabel("steps", fontsize=8)
        axis.tick_params(labelsize=8)
    axes[0].set_ylabel("score, points", fontsize=8)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=len(ARMS), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    figure.savefig(FIGURES / "heads-steps.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
