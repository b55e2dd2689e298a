"""What a compact vocabulary saves: processor time and peak memory of whole fits with and without it.

    python benchmarks/compact_vocabulary.py [--sizes xlm-r-base e5-small] [--model DIR ...] [--rounds 2]
                                            [--steps 6] [--rows 500]

Each figure is one fit in a process of its own: loading, tokenising, the probe, training, two checkpoints, predictions
and writing. With and without are interleaved in random order, on the same rows, with one thread. Texts have about 25
tokens, 16 of them a step. They are random words whose frequency falls like 1 / rank, so that 500 rows read about 3,000
different ones. ``--sizes`` are models with random weights: time does not depend on them.

A fit has a few steps, and its time at 400 is computed: everything but the steps as measured, 400 times the median step,
and the decay of 400 steps on the rows that are left out. Ratios are of one round; the last column is the smallest and
the largest of them.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm

import steadytune
from steadytune.fitting.fit_trainer import FitTrainer
from steadytune.fitting.memory import peak_memory
from steadytune.vocabulary import compact_vocabulary

STEPS = 400  # of the fit that is compared
WORDS = 23  # of a text, beside two special tokens
SIZES: dict[str, Any] = {
    "xlm-r-base": transformers.XLMRobertaConfig(vocab_size=250_002, max_position_embeddings=514, type_vocab_size=1),
    "e5-small": transformers.BertConfig(
        vocab_size=250_037, hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536,
        pad_token_id=1,
    ),
}  # fmt: skip


def save_model(name: str, folder: Path) -> None:
    """A model of random weights whose tokenizer has a word for each row of its table."""
    config = SIZES[name]
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(config.vocab_size - len(special)))])}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(folder)  # fmt: skip


def table(model: str, rows: int) -> pd.DataFrame:
    """Texts of random words of the model's tokenizer, each of one token."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    known = sorted(word for word in tokenizer.get_vocab() if word.isalnum() and word.isascii())
    words = [word for word in random.Random(0).sample(known, 20_000) if len(tokenizer.tokenize(word)) == 1]
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, len(words) + 1)
    lengths = rng.integers(WORDS - 10, WORDS + 11, rows)
    texts = [" ".join(rng.choice(words, n, p=shares / shares.sum())) for n in lengths]
    return pd.DataFrame({"text": texts, "label": np.where(rng.random(rows) < 0.5, "a", "b")})


class Clock(transformers.TrainerCallback):
    """Processor time of each step, of the first forward to the end of the optimizer's step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.began = time.process_time()

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.seconds.append(time.process_time() - self.began)


def fit_once(model: str, file: str, steps: int, compact: bool) -> dict[str, float]:
    """Seconds of the processor at `STEPS` steps, of one step, and peak memory, of one fit in this process."""
    torch.set_num_threads(1)
    clock, train, loaded = Clock(), FitTrainer.train_here, [0]

    def timed(trainer: FitTrainer, checkpoint: Any) -> float:
        trainer.add_callback(clock)
        loaded[0] = peak_memory()
        return train(trainer, checkpoint)

    FitTrainer.train_here = timed
    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        result = steadytune.fit(
            file, text="text", label="label", model=model, output=folder, steps=steps, save_steps=steps // 2,
            compact=compact, progress=False,
        )  # fmt: skip
        seconds = time.process_time() - began
        vocabulary = json.loads((result.output / "steadytune.json").read_text())["vocabulary"]
    step, memory = float(np.median(clock.seconds[1:])), peak_memory()
    decay = decay_seconds(result.model.models[0], STEPS - steps) if compact else 0.0
    return {
        "seconds": seconds - sum(clock.seconds) + STEPS * step + decay,
        "step": step,
        "decay": decay,
        "memory": memory,
        "memory before training": loaded[0],
        "left_out": vocabulary.get("left_out_weights", 0),
    }


def decay_seconds(model: torch.nn.Module, steps: int) -> float:
    """Seconds of the decay of some steps on the rows that are left out."""
    vocabulary = compact_vocabulary(model, range(1000))
    vocabulary._factors = [1 - 2e-7] * steps
    began = time.process_time()
    vocabulary.whole()
    return time.process_time() - began


def in_a_process(*given: Any) -> dict[str, float]:
    """`fit_once` in a new process."""
    command = [sys.executable, __file__, "--once", json.dumps(given)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stderr)
    answer: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return answer


def compare(name: str, model: str, options: argparse.Namespace, folder: Path) -> None:
    """Measure a model and print its row."""
    file = str(folder / "table.csv")
    table(model, options.rows).to_csv(file, index=False)
    rounds: list[dict[bool, dict[str, float]]] = []
    for number in tqdm(range(options.rounds), desc=name):
        arms = random.Random(number).sample((False, True), 2)
        rounds.append({compact: in_a_process(model, file, options.steps, compact) for compact in arms})
        tqdm.write(f"{name} {rounds[-1]}", file=sys.stderr)

    def median(key: str, compact: bool) -> float:
        return float(np.median([measured[compact][key] for measured in rounds]))

    ratios = [measured[False]["seconds"] / measured[True]["seconds"] for measured in rounds]
    left_out, less = median("left_out", True), median("memory", False) - median("memory", True)
    cells = [
        f"{name} | {left_out / 1e6:.1f} M",
        *(f"{median('step', compact):.2f}" for compact in (False, True)),
        *(f"{median('seconds', compact):.0f}" for compact in (False, True)),
        f"{np.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})",
        f"{less / 1e9:.2f} GB, {less / left_out:.1f} bytes a weight",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", default=[], choices=SIZES)
    parser.add_argument("--model", nargs="*", default=[], help="folder of a model")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=500)
    parser.add_argument("--once", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.once:
        print(json.dumps(fit_once(*json.loads(options.once))))
        return
    print(
        "| model | weights left out | s a step, whole | compact | s a fit, whole | compact | ratio | peak memory less |"
    )
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in options.sizes:
            save_model(name, folder / name)
            compare(name, str(folder / name), options, folder)
        for model in options.model:
            compare(Path(model).name, model, options, folder)


if __name__ == "__main__":
    main()
