"""The rows that most recipes get wrong, which may be mislabelled. No torch here."""

from __future__ import annotations

import numpy as np
import pandas as pd

from .cells import Cells
from .race import Arm

HARD_ROWS = "hard_rows.parquet"  # in the folder of the cells; with texts of the user's
SHOWN = 20


def hard_rows(cells: Cells, arms: list[Arm]) -> pd.DataFrame:
    """The rows with the largest share of recipes that are wrong; of numbers, with the largest mean error.

    Args:
        cells: Trainings.
        arms: Recipes to count, each by its first repeat.

    Returns:
        At most 20 rows, the worst first: row, text (and text_pair), label, wrong (share of the recipes, or mean error).
    """
    rows, problem = cells.task.data.train, cells.task.data.problem
    gold = problem.array(rows["label"])
    done = [cells.predictions(arm, 0) for arm in arms if cells.has(arm, 0)]
    if problem.names:
        wrong = np.mean([[a != b for a, b in zip(gold, problem.decide(s), strict=True)] for s in done], axis=0)
    else:
        wrong = np.mean([np.abs(gold.astype(float) - scores[:, 0]) for scores in done], axis=0)
    order = [i for i in np.argsort(-wrong, kind="stable")[:SHOWN] if wrong[i] > (0.5 if problem.names else 0.0)]
    columns = [column for column in ("text", "text_pair") if column in rows]
    labels = [", ".join(label) if isinstance(label, tuple) else str(label) for label in rows["label"].iloc[order]]
    return pd.DataFrame(
        {"row": rows.index[order], **{c: rows[c].iloc[order].to_list() for c in columns}, "label": labels,
         "wrong": wrong[order]}
    )  # fmt: skip
