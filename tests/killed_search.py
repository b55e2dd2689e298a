"""One small search in a process of its own, for test_killed_search.py: from the start, or on from where it stopped."""

import json
import math
from pathlib import Path
from typing import Any

BUDGET = "11runs"


def found(output: Path) -> dict[str, Any] | None:
    """What a finished search found, without the times; None before it is finished."""
    if not (output / "search.html").is_file():
        return None
    record = json.loads((output / "steadytune.json").read_text())["search"]
    arms = [{name: value for name, value in arm.items() if name != "seconds"} for arm in record["arms"]]
    return {**record, "arms": arms, "seconds": None}


def conduct(folder: str, output: str) -> None:
    import torch

    from steadytune import search
    from steadytune.searching import main

    torch.set_num_threads(1)
    place = Path(folder, output)
    if found(place) is not None:
        return
    # Times differ between two processes, so no arm may be called costly by them.
    main.rules_of = lambda task: main.Rules(costly=math.inf)
    search(
        str(Path(folder, "rows.csv")), model=str(Path(folder, "bert")), output=place, budget=BUDGET, folds=2, steps=6,
        lr=1e-3, batch_size=8, arms=["lr*3"], resume=(place / "search").is_dir(), progress=False,
    )  # fmt: skip
