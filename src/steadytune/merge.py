"""Several models in one: pure functions on state dicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def uniform(states: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The mean of each floating-point tensor, summed in float64; other tensors must agree.

    Uniform soup: Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482.

    Args:
        states: state dicts with the same names and shapes, of models that grew from one initialisation.

    Raises:
        ValueError: names or shapes that differ, or integer buffers that do.
    """
    first = states[0]
    for other in states[1:]:
        if other.keys() != first.keys() or any(other[name].shape != t.shape for name, t in first.items()):
            raise ValueError("only models of one architecture can be averaged: names or shapes of weights differ")
    return {name: _mean(name, [state[name] for state in states]) for name in first}


def _mean(name: str, tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].is_floating_point():
        return torch.stack([t.double() for t in tensors]).mean(0).to(tensors[0].dtype)
    if any(not torch.equal(t, tensors[0]) for t in tensors[1:]):
        raise ValueError(f"the models hold different values in {name!r}, which is no floating-point tensor")
    return tensors[0]
