"""What the free entries and the pruning of DSEE change: accuracy on SST-2, paired by seed, and what a model costs.

    python benchmarks/dsee.py --model DIR --data-root DIR [--seeds 5] [--support decomposition] [--output FILE.json]

LoRA of rank 16 alone, with 16 free entries beside it in each query and value matrix, and with a fifth of the model's
matrices pruned. With the same seed all have the same rows, head, order and dropout. An interrupted script continues
with the runs that FILE.json does not hold.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification

from steadytune import fit, inference_cost
from steadytune.bench.stats import compare
from steadytune.files.atomic import write_json
from steadytune.tasks import load

ROWS, STEPS, RATE = 500, 160, 1e-3
ARMS = {
    "lora": "dsee:entries=0,share=0",
    "lora and 16 entries": "dsee:entries=16,share=0",
    "lora, 20 % pruned": "dsee:entries=0,share=0.2",
}


def measure(procedure: str, seed: int, model: str, root: Path) -> dict[str, Any]:
    """Accuracy of one model, and what it costs in use."""
    train, tests = load("sst2", root)
    with tempfile.TemporaryDirectory() as folder:
        result = fit(
            train, model=model, output=Path(folder, "out"), procedure=procedure, tests=tests, train_size=ROWS, lr=RATE,
            steps=STEPS, max_length=64, validation_share=0.0, probe=False, save_steps=0, seed=seed, progress=False,
        )  # fmt: skip
        cost = inference_cost(AutoModelForSequenceClassification.from_pretrained(result.output), 64)
    (scores,) = result.metrics.values()
    return {"accuracy": 100 * scores["accuracy"], "cost": str(cost), "seconds": round(result.seconds, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="directory of a pre-trained model")
    parser.add_argument("--data-root", type=Path, required=True, help="folder of the benchmark data")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--support", default="decomposition", help="how the free entries are chosen")
    parser.add_argument("--output", type=Path, default=Path("dsee.json"))
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(options.output.read_text()) if options.output.exists() else {}
    for seed in range(options.seeds):
        for arm, procedure in ARMS.items():
            key = f"{arm}, {options.support}, seed {seed}"
            if key not in record:
                full = f"{procedure},support={options.support}"
                record[key] = measure(full, seed, options.model, options.data_root)
                write_json(options.output, record)
                print(key, record[key], flush=True)
    scores = {
        arm: [record[f"{arm}, {options.support}, seed {seed}"]["accuracy"] for seed in range(options.seeds)]
        for arm in ARMS
    }
    print("\n| recipe | accuracy, % | beside LoRA alone | in use |\n|---|--:|--:|---|")
    for arm, own in scores.items():
        gain = "" if arm == "lora" else compare(own, scores["lora"])
        shown = f"{gain.difference:+.2f} {gain.interval}" if gain else ""
        cost = record[f"{arm}, {options.support}, seed 0"]["cost"]
        print(f"| {arm} | {sum(own) / len(own):.1f} | {shown} | {cost} |")


if __name__ == "__main__":
    main()
