"""How well `steadytune inspect` finds flipped labels, beside cleanlab on the same probabilities.

    python benchmarks/wrong_labels.py --data-root DIR --model DIR [--task sst2] [--rows 500] [--noise 0.2] [--seeds 5]

For each seed the labels of other rows are flipped, and probes on the frozen features are cross-fitted. The table shows
means over seeds with their standard deviation:

    AUC         how often a flipped row is ranked above another row, by loss, by negative influence, and by cleanlab's
                quality of labels (self-confidence)
    precision   share of the flipped rows among the suspects of cleanlab's `find_label_issues`; recall: share of the
                flipped rows that are suspects
    accuracy    of a probe on the test set: fitted on all rows, without the suspects, without as many rows of the most
                negative influence, and on the true labels

Seconds are processor time of one seed, without reading the rows.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import pandas as pd
from cleanlab.filter import find_label_issues
from cleanlab.rank import get_label_quality_scores
from sklearn.metrics import roc_auc_score

from steadytune.data.problem import Problem
from steadytune.fitting.plan import make_plan
from steadytune.fitting.pretrained import Pretrained
from steadytune.fitting.probing import read_rows
from steadytune.heads.influence import cross_influence
from steadytune.heads.start import even_parts, fit_probe
from steadytune.tasks import load


def one(
    phi: np.ndarray, truth: np.ndarray, test: np.ndarray, gold: np.ndarray, problem: Problem, noise: float, seed: int
):
    """Scores of one draw of flipped labels, by name."""
    rng, rows, classes = np.random.default_rng(seed), len(truth), int(truth.max()) + 1
    flipped = np.zeros(rows, dtype=bool)
    flipped[rng.choice(rows, round(noise * rows), replace=False)] = True
    labels = np.where(flipped, (truth + rng.integers(1, classes, rows)) % classes, truth)
    started = time.process_time()

    def fit(inside: np.ndarray, given: np.ndarray = labels):
        parts = even_parts(given[inside], 0)
        return fit_probe(phi[inside], given[inside], classes, how="logistic", bias=True, parts=parts)

    parts = even_parts(labels, seed)
    outputs, influence = cross_influence(phi, np.eye(classes)[labels], fit, parts, "cross_entropy")
    chances = problem.activate(outputs)
    loss = -np.log(chances[np.arange(rows), labels])
    suspects = find_label_issues(labels, chances, n_jobs=1)
    seconds = time.process_time() - started
    harmful = np.argsort(influence)[: suspects.sum()]
    every = np.arange(rows)

    def accuracy(inside: np.ndarray, given: np.ndarray = labels) -> float:
        return float((fit(inside, given).outputs(test).argmax(axis=1) == gold).mean())

    return {
        "AUC: loss": roc_auc_score(flipped, loss),
        "AUC: -influence": roc_auc_score(flipped, -influence),
        "AUC: cleanlab": roc_auc_score(flipped, -get_label_quality_scores(labels, chances)),
        "precision of suspects": flipped[suspects].mean(),
        "recall of suspects": flipped[suspects].sum() / flipped.sum(),
        "accuracy: all rows": accuracy(every),
        "accuracy: without suspects": accuracy(every[~suspects]),
        "accuracy: without harmful": accuracy(np.setdiff1d(every, harmful)),
        "accuracy: true labels": accuracy(every, truth),
        "seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--noise", type=float, default=0.2)
    parser.add_argument("--seeds", type=int, default=5)
    options = parser.parse_args()
    table, tests = load(options.task, options.data_root)
    plan = make_plan(table, model="", tests=tests, validation_share=0.0, train_size=options.rows)
    data, problem = plan.data, plan.data.problem
    (name, test), *_ = data.tests.items()
    sets = {"train": data.train, name: test}
    phi = read_rows(options.model, Pretrained.open(options.model, problem), "auto", sets).features
    truth, gold = (np.array(problem.ids(rows["label"].tolist())) for rows in sets.values())
    found = [one(phi["train"], truth, phi[name], gold, problem, options.noise, seed) for seed in range(options.seeds)]
    frame = pd.DataFrame(found)
    print(f"{options.task}, {options.rows} rows, {options.noise:.0%} flipped, {options.seeds} seeds\n")
    print("| what | mean | SD |\n|---|---|---|")
    for what in frame:
        print(f"| {what} | {frame[what].mean():.3f} | {frame[what].std():.3f} |")


if __name__ == "__main__":
    main()
