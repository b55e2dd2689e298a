"""kill -9 and Ctrl-C at any moment of a search lose the training in progress, and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time

import pytest

import killed_search
from fit_helpers import same, save_tiny_bert, toy, weights
from helpers import KILLS


class Place:
    """A folder in which searches run, each in a process of its own that has imported everything.

    So moments of the search are hit, and not those of imports.
    """

    def __init__(self, folder):
        self.folder = folder
        save_tiny_bert(folder / "bert")
        toy(40).drop(columns="score").to_csv(folder / "rows.csv", index=False)
        self.processes = multiprocessing.get_context("forkserver")
        self.processes.set_forkserver_preload(
            ["steadytune.searching.main", "steadytune.bench.run", "steadytune.fitting.training",
             "steadytune.fitting.main"]
        )  # fmt: skip
        assert self.run("warm")
        started = time.monotonic()
        assert self.run("whole")
        self.seconds = time.monotonic() - started

    def run(self, output, seconds=None, with_signal=None):
        """Whether a search came to its end before it was stopped."""
        process = self.processes.Process(target=killed_search.conduct, args=(str(self.folder), output))
        process.start()
        process.join(seconds)
        if process.is_alive():
            os.kill(process.pid, with_signal)
        process.join()
        return process.exitcode == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return Place(tmp_path_factory.mktemp("killed"))


@pytest.mark.parametrize(("with_signal", "moments"), [("SIGKILL", KILLS // 2), ("SIGINT", KILLS // 6)])
def test_a_search_stopped_at_random_moments_ends_as_one_that_was_not(place, with_signal, moments):
    """While cells train, between stages, while the last fit trains, and while records and pages are written."""
    draw, stops, runs = random.Random(0), 0, 1
    while stops < moments:
        if place.run(f"{with_signal}{runs}", draw.uniform(0, 0.6 * place.seconds), getattr(signal, with_signal)):
            runs += 1
        else:
            stops += 1
    assert place.run(f"{with_signal}{runs}")
    whole = killed_search.found(place.folder / "whole")
    assert 0 < whole["trainings"] < int(killed_search.BUDGET.removesuffix("runs"))
    for cut in (place.folder / f"{with_signal}{n}" for n in range(1, runs + 1)):
        assert killed_search.found(cut) == whole, cut
        assert same(weights(cut), weights(place.folder / "whole"))
        names = [sorted(p.name for p in folder.iterdir()) for folder in (cut, place.folder / "whole")]
        assert names[0] == names[1]
