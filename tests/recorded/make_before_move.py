"""Writes before-move/: a study and two fits by steadytune as it was at commit 52e79c5. Never to be run again.

    PYTHONPATH=CLONE-OF-52e79c5/src python tests/recorded/make_before_move.py

Folders that users made with that version must go on being read, so the files stay as they are. A later version gets a
script and a folder of its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pandas as pd
import torch
from steadytune.training import FitTrainer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback

from steadytune import fit
from steadytune.bench.spec import Study
from steadytune.bench.study import run_study

FOLDER = Path(__file__).with_name("before-move")
WORDS = ["good", "bad", "fine", "poor", "film", "play", "cast", "plot"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
STUDY = """\
name: study
models: {tiny: $BEFORE_MOVE/bert}
tasks: [sst2]
train_sizes: [16]
seeds: 2
options: {steps: 6, batch_size: 4, lr: 0.01}
recipes:
  plain: {}
  dps_mix: {methods: ["dps_mix:update_ratio=0.34"]}
  none: {dropout: 0.0, methods: [rdrop]}  # fails: R-Drop needs dropout
"""


def toy(rows: int, start: int = 0) -> pd.DataFrame:
    """Rows 'up' or 'down' by their first word."""
    table = []
    for i in range(start, start + rows):
        up = i % 3 > 0
        words = [("good", "fine")[i % 2] if up else ("bad", "poor")[i % 2], WORDS[i // 8 % 8], WORDS[i % 8]]
        table.append({"text": " ".join(words), "label": "up" if up else "down"})
    return pd.DataFrame(table)


def save_bert(folder: Path) -> None:
    """A BERT of about 500 weights with a word-level tokenizer."""
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=12, hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4,
        max_position_embeddings=8, initializer_range=0.5,
    )  # fmt: skip
    BertForSequenceClassification(config).bert.save_pretrained(folder)
    vocab = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", pad_token="[PAD]").save_pretrained(folder)


def write_study() -> None:
    """Six runs: three done, two failed, and one whose record and predictions are set aside in `left-to-do`."""
    for split, rows in {"train": toy(24), "validation": toy(12, start=100)}.items():
        Path("data/sst2").mkdir(parents=True, exist_ok=True)
        labels = [int(label == "up") for label in rows["label"]]
        pd.DataFrame({"sentence": rows["text"], "label": labels}).to_parquet(f"data/sst2/{split}.parquet")
    Path("study.yaml").write_text(STUDY)
    study = Study.read("study.yaml")
    run_study(study, "study", data_root="data", workers=0, progress=False)
    (last,) = (run.id for run in study.runs("data") if run.matches(["recipe=dps_mix", "seed=1"]))
    Path("left-to-do").mkdir()
    for file in (f"records/{last}.json", f"predictions/{last}.parquet"):
        shutil.move(f"study/{file}", "left-to-do")
    shutil.rmtree("study/locks")
    for file in Path("study/records").glob("*.json"):  # tracebacks name folders of the machine
        record = json.loads(file.read_text())
        if record["error"] is not None:
            record["error"] = re.sub(r'File ".*/', 'File "', record["error"])
            file.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


class Stop(TrainerCallback):
    """Ctrl-C in step 7, one step after the checkpoint of step 6."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 6:
            raise KeyboardInterrupt


def write_fits() -> None:
    """The same fit twice: `finished` without interruption, `interrupted` with a checkpoint at step 6 of 10."""
    toy(24).to_csv("train.csv", index=False)
    toy(12, start=100).to_csv("test.csv", index=False)
    options = {
        "text": "text", "label": "label", "model": "bert", "tests": {"test": "test.csv"}, "validation_share": 0.25,
        "methods": ["dps_mix:update_ratio=0.3", "ema:decay=0.9"], "steps": 10, "batch_size": 4, "lr": 1e-2,
        "save_steps": 3, "progress": False,
    }  # fmt: skip
    fit("train.csv", output="finished", **options)
    plain = FitTrainer.__init__

    def stopping(self, *arguments, **named):
        plain(self, *arguments, **named)
        self.add_callback(Stop())

    FitTrainer.__init__ = stopping
    try:
        fit("train.csv", output="interrupted", **options)
    except KeyboardInterrupt:
        Path("interrupted/checkpoints/training/checkpoint-6/training_args.bin").unlink()  # a pickle that nobody reads


if __name__ == "__main__":
    FOLDER.mkdir()
    os.chdir(FOLDER)
    os.environ["BEFORE_MOVE"] = "."
    torch.set_num_threads(1)
    save_bert(Path("bert"))
    write_study()
    write_fits()
