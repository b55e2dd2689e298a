"""The figure of the README, from committed records: python benchmarks/readme_figure.py"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

from steadytune.bench.records import read_records

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "steadytune"  # the same bytes every time
matplotlib.rcParams["svg.fonttype"] = "none"

ROOT = Path(__file__).parent.parent
NAMES = {"sst2": "SST-2, accuracy", "stsb": "STS-B, Pearson", "qnli": "QNLI, accuracy"}


def scores() -> dict[str, dict[str, list[float]]]:
    """Task -> recipe -> the headline score of each seed on the public development set, in points."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in read_records(ROOT / "docs" / "results" / "small-data")[0]:
        inside = [set_ for set_ in record["sets"].values() if set_.get("domain") == "in"]
        if record["status"] == "done" and inside:
            task, recipe = record["spec"]["task"]["name"], record["spec"]["recipe"]
            found[task][recipe].append(100 * inside[0][record["metric"]])
    return found


def main() -> None:
    from matplotlib import pyplot as plt

    found = scores()
    figure, axes = plt.subplots(1, len(found), figsize=(9, 2.4), sharey=True)
    for axis, (task, recipes) in zip(axes, sorted(found.items()), strict=True):
        names = sorted(recipes, key=lambda name: (name != "plain", name))
        for row, name in enumerate(names):
            values = np.array(recipes[name])
            axis.plot(values, np.full(len(values), row), "o", ms=3, alpha=0.4, color="C0")
            axis.errorbar(values.mean(), row, xerr=values.std(ddof=1), fmt="|", color="black", capsize=3)
        axis.set_yticks(range(len(names)), names)
        axis.set_title(NAMES.get(task, task), fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0].invert_yaxis()
    figure.suptitle("500 rows, MiniLM, 10 seeds: each run, mean and standard deviation", fontsize=9)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "figures" / "small-data.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
