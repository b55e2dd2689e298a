"""Would our own records make a better order of a search's methods than the fixed one?

    python benchmarks/warm_start.py [--results docs/results]

Gains over plain fine-tuning, paired by seed, of every method with its defaults, from the records of all studies in the
folder; those of one task are pooled by precision. For each task in turn the other tasks give an order: the greedy
portfolio, which adds the method that most lowers the mean over tasks of the smallest regret so far. A regret is the
distance to the best method or plain of the task, divided by the standard deviation of paired differences there.

The script prints the mean regret on the task left out after the first 1, 2, 3 and 4 methods: by that order, by the
fixed order of `steadytune.searching.recipe.PORTFOLIO`, and in a random order. Then it prints the mean and the standard
deviation of the true gains of each method over tasks (DerSimonian and Laird, Controlled Clinical Trials 1986).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from steadytune.bench.records import FOLDER, read_records
from steadytune.bench.study import headline
from steadytune.errors import UsageError
from steadytune.fitting.spelling import make_methods, method_record
from steadytune.methods import METHODS
from steadytune.searching.recipe import PORTFOLIO

FIRST = 4  # methods of an order that are looked at
Gains = dict[str, dict[str, tuple[float, float]]]  # method -> task -> gain and its standard error, in points


def gains(results: Path) -> tuple[Gains, dict[str, float]]:
    """Gains by method and task, and the standard deviation of paired differences of each task."""
    defaults = {name: method_record(method) for name in METHODS if (method := _made(name)) is not None}
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    spreads: dict[str, list[float]] = {}
    for folder in sorted(place.parent for place in results.glob(f"*/{FOLDER}")):
        scores: dict[tuple, dict[str, float]] = {}
        for record in read_records(folder)[0]:
            spec, score = record["spec"], headline(record)
            arm = "plain" if not spec["methods"] else next(
                (name for name, about in defaults.items() if spec["methods"] == [about]), None)  # fmt: skip
            if score is not None and arm is not None and (arm != "plain" or spec["recipe"] == "plain"):
                table = (spec["task"]["name"], spec["model"]["name"], spec["train_size"])
                scores.setdefault((table, arm), {})[str(spec["seeds"])] = 100 * score
        for (table, arm), by_seed in scores.items():
            plain = scores.get((table, "plain"), {})
            d = np.array([by_seed[seed] - plain[seed] for seed in by_seed if seed in plain])
            if arm != "plain" and len(d) > 2 and d.std():
                found.setdefault(arm, {}).setdefault(table[0], []).append((d.mean(), d.std(ddof=1) / np.sqrt(len(d))))
                spreads.setdefault(table[0], []).append(d.std(ddof=1))
    pooled = {arm: {task: _pooled(parts) for task, parts in tasks.items()} for arm, tasks in found.items()}
    return pooled, {task: float(np.median(values)) for task, values in spreads.items()}


def _made(name: str):
    """A method with its defaults; None for one that needs an argument."""
    try:
        return make_methods([name])[0]
    except (UsageError, TypeError):
        return None


def _pooled(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Precision-weighted mean of estimates of one gain."""
    values, weights = np.array([p[0] for p in parts]), np.array([p[1] for p in parts]) ** -2.0
    return float((weights * values).sum() / weights.sum()), float(weights.sum() ** -0.5)


def random_effects(parts: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Mean and standard deviation of true gains over tasks, by DerSimonian and Laird."""
    values, weights = np.array([p[0] for p in parts]), np.array([p[1] for p in parts]) ** -2.0
    fixed = (weights * values).sum() / weights.sum()
    excess = (weights * (values - fixed) ** 2).sum() - (len(values) - 1)
    variance = max(0.0, excess / (weights.sum() - (weights**2).sum() / weights.sum())) if len(values) > 1 else 0.0
    weights = 1 / (1 / weights + variance)
    return float((weights * values).sum() / weights.sum()), float(np.sqrt(variance))


def regrets(table: Gains, spreads: Mapping[str, float]) -> tuple[list[str], list[str], np.ndarray]:
    """Methods, tasks, and standardised regrets (methods, tasks); the first row is plain's."""
    tasks = sorted({task for by_task in table.values() for task in by_task})
    arms = sorted(arm for arm, by_task in table.items() if {*by_task} == {*tasks})
    matrix = np.array([[0.0] * len(tasks), *([table[arm][task][0] for task in tasks] for arm in arms)])
    return arms, tasks, (matrix.max(axis=0) - matrix) / np.array([spreads[task] for task in tasks])


def greedy(regret: np.ndarray) -> list[int]:
    """Rows in the order in which they most lower the mean of the smallest regret; row 0 is taken before."""
    order, best = [], regret[0]
    while len(order) < len(regret) - 1:
        rest = [i for i in range(1, len(regret)) if i not in order]
        order.append(min(rest, key=lambda i: float(np.minimum(best, regret[i]).mean())))
        best = np.minimum(best, regret[order[-1]])
    return order


def left(order: Sequence[int], regret: np.ndarray) -> list[float]:
    """Regret of one task after the first methods of an order."""
    return [float(min(regret[0], *(regret[i] for i in order[:k]))) for k in range(1, FIRST + 1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("docs/results"))
    table, spreads = gains(parser.parse_args().results)
    full = {task for by_task in table.values() for task in by_task}
    several = {arm: by_task for arm, by_task in table.items() if len(by_task) > 1}
    fixed_arms = [arm for arm in PORTFOLIO["method"] if arm in table]
    for name, kept in (("all methods with records on two tasks or more", several),
                       ("the methods of the portfolio", {arm: table[arm] for arm in fixed_arms})):  # fmt: skip
        common = {task for task in full if all(task in by_task for by_task in kept.values())} or full
        arms, tasks, regret = regrets(
            {a: {t: g for t, g in b.items() if t in common} for a, b in kept.items()}, spreads
        )
        print(f"\n{name}: {', '.join(arms)}; tasks {', '.join(tasks)}")
        if len(tasks) < 2 or not arms:
            continue
        fixed = [1 + arms.index(arm) for arm in fixed_arms if arm in arms]
        fixed += [i for i in range(1, len(arms) + 1) if i not in fixed]
        rows: dict[str, list[list[float]]] = {"records": [], "fixed": [], "random": []}
        for t in range(len(tasks)):
            others = np.delete(regret, t, axis=1)
            rows["records"].append(left(greedy(others), regret[:, t]))
            rows["fixed"].append(left(fixed, regret[:, t]))
            draws = [np.random.default_rng(s).permutation(np.arange(1, len(arms) + 1)) for s in range(500)]
            rows["random"].append(np.mean([left(order, regret[:, t]) for order in draws], axis=0).tolist())
        for order, values in rows.items():
            by_task = "; ".join(f"{t} {v[0]:.2f}" for t, v in zip(tasks, values, strict=True))
            cells = ", ".join(f"{x:.2f}" for x in np.mean(values, axis=0))
            print(f"  {order:8} mean regret after 1 to {FIRST} methods: {cells}  (after 1: {by_task})")
    print("\nmethod: mean gain and SD over tasks, in points")
    for arm, found in sorted(table.items(), key=lambda item: -random_effects([*item[1].values()])[0]):
        mean, sd = random_effects([*found.values()])
        print(f"  {arm}: {mean:+.2f}, {sd:.2f}, {len(found)} tasks")


if __name__ == "__main__":
    main()
