"""One `fit` in a process of its own, for test_killed.py: from the start, or on from where the last one was killed."""

import json
from pathlib import Path
from typing import Any

RECIPES: dict[str, dict[str, Any]] = {
    "methods": {"methods": ["dps_mix:update_ratio=0.1", "ema"], "steps": 80, "head": "logistic"},
    "contrastive": {"procedure": "contrastive:steps=40,lr=1e-3,then=finetune", "steps": 30},
    "meta": {"aux": 5, "meta": "imaml:inner_steps=2,inner_lr=1e-3", "aux_steps": 20, "steps": 20},
    "tapt": {"pretrain": "tapt:steps=30,lr=1e-3", "unlabelled": 30, "steps": 20},
    "self-training": {"procedure": "self-training:rounds=1,draws=2,most_shift=inf", "unlabelled": 30, "steps": 20},
    "subgroups": {"methods": ["group_weights:every=3,rho=1.0"], "steps": 60, "subgroup": "label"},
    "aux": {"aux": 2, "aux_steps": 20, "steps": 20},
}
# Of parts that those above have too; they run where more kills than usual are asked for.
MORE: dict[str, dict[str, Any]] = {
    "simcse": {"pretrain": "simcse:steps=20,lr=1e-3", "unlabelled": 30, "steps": 20},
    "reptile": {"aux": 5, "meta": "reptile:inner_steps=2,inner_lr=1e-3", "aux_steps": 20, "steps": 20},
    "teachers": {
        "procedure": "self-training:rounds=1,teachers=2,draws=0,folds=2,influence=true,most_shift=inf",
        "unlabelled": 30,
        "steps": 10,
    },
    "meta_semi": {"methods": ["meta_semi"], "unlabelled": 30, "steps": 30},
    "mixup-blo": {"procedure": "mixup-blo:folds=2", "steps": 20},
}


def train(folder: str, output: str, recipe: str) -> None:
    import torch

    from fit_helpers import toy
    from steadytune import fit

    torch.set_num_threads(1)
    record = Path(folder, output, "steadytune.json")
    status = json.loads(record.read_text())["status"] if record.exists() else None
    if status == "finished":
        return
    options = dict((RECIPES | MORE)[recipe])
    if "aux" in options:
        options["aux"] = [toy(20, start=200 + 100 * i) for i in range(options["aux"])]
    if "unlabelled" in options:
        options["unlabelled"] = toy(options["unlabelled"], start=200)[["text"]]
    fit(
        toy(40), model=str(Path(folder, "bert")), output=Path(folder, output), tests={"test": toy(20, start=100)},
        batch_size=4, lr=1e-3, save_steps=4, progress=False, text="text", label="label", resume=status is not None,
        **options,
    )  # fmt: skip
