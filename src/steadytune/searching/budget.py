"""The budget of a search: minutes, or a number of trainings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from ..errors import UsageError

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
RUNS = re.compile(r"(\d+)\s*runs?")
TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([smh])")


@dataclass(frozen=True)
class Budget:
    """A largest number of seconds or trainings.

    Attributes:
        amount: The number.
        unit: What is counted.
    """

    amount: float
    unit: Literal["seconds", "runs"]

    @classmethod
    def of(cls, text: str) -> Budget:
        """A budget such as ``30m``, ``2h``, ``90s`` or ``100runs``.

        Raises:
            UsageError: It is none.
        """
        if not isinstance(text, str):
            raise UsageError(f"budget must be text, as '30m', '2h' or '100runs', got {text!r}.")
        if runs := RUNS.fullmatch(text.strip()):
            budget = cls(float(runs[1]), "runs")
        elif time := TIME.fullmatch(text.strip()):
            budget = cls(float(time[1]) * UNITS[time[2]], "seconds")
        else:
            raise UsageError(f"budget must be a time or a number of trainings, as 30m, 2h or 100runs, got {text!r}.")
        if not budget.amount:
            raise UsageError(f"budget must be above 0, got {text!r}.")
        return budget
