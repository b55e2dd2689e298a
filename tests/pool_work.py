"""Work for the workers of test_pool.py; without torch, so that they start at once."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any


def double(task: int) -> tuple[int, int, str]:
    """The double, and who made it with how many threads."""
    return 2 * task, os.getpid(), os.environ["OMP_NUM_THREADS"]


def die_once(task: str) -> str:
    """Killed the first time, fine the second."""
    mark = Path(task)
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def die(task: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def fail(task: Any) -> None:
    raise ZeroDivisionError(f"task {task}")
