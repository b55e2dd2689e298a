"""A figure of the score over the number of steps, from the committed records of heads.yaml and heads-steps.yaml.

python benchmarks/steps_figure.py      # writes docs/figures/heads-steps.svg
"""

from __future__ import annotations

import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from study_figure import FIGURES, NAMES

from steadytune.bench.records import read_records

RESULTS = Path(__file__).parent.parent / "docs" / "results"
ARMS = {
    "plain": "the pooler, a random head",
    "mean": "the mean, a random head",
    "mean-head": "the mean, a probe's head",
}

Curves = dict[str, dict[str, dict[int, list[float]]]]


def curves(studies: list[Path]) -> Curves:
    """Task -> arm -> number of steps -> the score of each seed, in points."""
    found: Curves = defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    for record in (record for study in studies for record in read_records(study)[0]):
        spec, arm = record["spec"], re.sub(r"-\d+$", "", record["spec"]["recipe"])
        if record["status"] == "done" and arm in ARMS:
            (inside,) = [scored for scored in record["sets"].values() if scored.get("domain") == "in"]
            found[spec["task"]["name"]][arm][spec["options"]["steps"]].append(100 * inside[record["metric"]])
    return found


def main() -> None:
    from matplotlib import pyplot as plt

    found = curves([RESULTS / "heads", RESULTS / "heads-steps"])
    figure, axes = plt.subplots(1, len(found), figsize=(9, 2.9))
    for axis, task in zip(axes, sorted(found), strict=True):
        for arm, label in ARMS.items():
            steps = sorted(found[task][arm])
            scores = np.array([found[task][arm][count] for count in steps])
            axis.errorbar(
                steps, scores.mean(axis=1), scores.std(axis=1, ddof=1), marker="o", ms=3, capsize=2, label=label
            )
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
