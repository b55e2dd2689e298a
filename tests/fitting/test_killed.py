"""kill -9 at any moment costs what was trained since the last checkpoint, and nothing else."""

from __future__ import annotations

import multiprocessing
import random
import time

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

import killed_worker
from fit_helpers import save_masked_bert, save_tiny_bert
from helpers import KILLS, USUAL_KILLS

RECIPES = [*killed_worker.RECIPES, *(killed_worker.MORE if KILLS > USUAL_KILLS else ())]


@pytest.mark.parametrize("recipe", RECIPES)
def test_killed_at_random_moments_and_resumed_equals_uninterrupted(tmp_path, recipe):
    """While features are read, in DPS stages, in checkpoints, between trainings, while the result is written."""
    (save_masked_bert if recipe == "tapt" else save_tiny_bert)(tmp_path / "bert")
    processes = multiprocessing.get_context("forkserver")  # imports once: moments of the run are hit, not of imports
    processes.set_forkserver_preload(
        ["steadytune.fitting.training", "steadytune.fitting.main", "steadytune.fitting.fitted_model"]
    )

    def run(output: str, seconds: float | None) -> bool:
        """Whether it came to its end before it was killed."""
        process = processes.Process(target=killed_worker.train, args=(str(tmp_path), output, recipe))
        process.start()
        process.join(seconds)
        process.kill()
        process.join()
        return process.exitcode == 0

    assert run("warm", None)  # the server has imported everything
    started = time.monotonic()
    assert run("straight", None)
    whole = time.monotonic() - started
    draw, kills, runs = random.Random(0), 0, 1
    while kills < (KILLS if recipe == "methods" else KILLS // 2):
        if run(f"cut{runs}", draw.uniform(0, 0.6 * whole)):
            runs += 1
        else:
            kills += 1
    assert run(f"cut{runs}", None)
    for cut in (f"cut{n}" for n in range(1, runs + 1)):
        one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", cut))
        assert all(torch.equal(one[name], other[name]) for name in one), cut
        frames = [pd.read_parquet(tmp_path / name / "predictions.parquet") for name in ("straight", cut)]
        pd.testing.assert_frame_equal(*frames)
        names = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("straight", cut)]
        assert names[0] == names[1]
