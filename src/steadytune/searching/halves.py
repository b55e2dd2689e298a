"""Two halves of the rows, of which each judges what the other has chosen. NumPy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def halves(strata: NDArray[np.int64], groups: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Which rows are in the first half.

    Groups are taken in random order, the large ones first, and each goes to the half that most lacks its strata.

    Args:
        strata: Number of the stratum of each row, shape (rows,).
        groups: Number of the group of each row; rows of one group stay together.
        seed: Seed of the order.
    """
    counts = np.zeros((groups.max() + 1, strata.max() + 2))
    np.add.at(counts, (groups, strata), 1)
    counts[:, -1] = counts.sum(axis=1)
    order = np.random.default_rng(seed).permutation(len(counts))
    held = np.zeros((2, counts.shape[1]))
    home = np.zeros(len(counts), dtype=int)
    for group in order[np.argsort(-counts[order, -1], kind="stable")]:
        home[group] = (held @ counts[group]).argmin()
        held[home[group]] += counts[group]
    return home[groups] == 0
