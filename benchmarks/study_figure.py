"""A figure of every run of a study, from its committed records.

python benchmarks/study_figure.py docs/results/small-data      # writes docs/figures/small-data.svg
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
import yaml

from steadytune.bench.records import read_records

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "steadytune"  # the same bytes every time
matplotlib.rcParams["svg.fonttype"] = "none"

FIGURES = Path(__file__).parent.parent / "docs" / "figures"
NAMES = {"sst2": "SST-2", "stsb": "STS-B", "qnli": "QNLI", "sources": "twelve sources", "rte": "RTE", "qqp": "QQP"}


def scores(study: Path) -> dict[tuple[str, str], dict[str, list[float]]]:
    """Task and metric -> recipe -> the score of each seed in domain, in points."""
    by_task: dict[tuple[str, str], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for record in read_records(study)[0]:
        inside = [set_ for set_ in record["sets"].values() if set_.get("domain") == "in"]
        if record["status"] == "done" and inside:
            spec, metric = record["spec"], record["metric"]
            by_task[spec["task"]["name"], metric][spec["recipe"]].append(100 * inside[0][metric])
    return by_task


def main() -> None:
    from matplotlib import pyplot as plt

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="folder of the study")
    parser.add_argument("--title", help="title of the figure")
    options = parser.parse_args()
    by_task = scores(options.study)
    names = list(yaml.safe_load((options.study / "study.yaml").read_text(encoding="utf-8"))["recipes"])
    figure, axes = plt.subplots(1, len(by_task), figsize=(9, 1 + 0.22 * len(names)), sharey=True, squeeze=False)
    for axis, ((task, metric), recipes) in zip(axes[0], sorted(by_task.items()), strict=True):
        for row, name in enumerate(names):
            values = np.array(recipes[name])
            axis.plot(values, np.full(len(values), row), "o", ms=3, alpha=0.4, color="C0")
            axis.errorbar(values.mean(), row, xerr=values.std(ddof=1), fmt="|", color="black", capsize=3)
        axis.set_yticks(range(len(names)), names)
        axis.set_title(f"{NAMES.get(task, task)}, {metric}", fontsize=9)
        axis.tick_params(labelsize=8)
    axes[0][0].invert_yaxis()
    figure.suptitle(options.title or options.study.name, fontsize=9)
    figure.tight_layout()
    figure.savefig(FIGURES / f"{options.study.name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
