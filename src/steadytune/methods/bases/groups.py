"""Parameter groups of an optimizer: their rates, and parts where a method sets an option for some weights only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...core import Run

PER_PARAMETER = ("params", "param_names")  # lists in an optimizer's group with one entry for each parameter


def split(group: Mapping[str, Any], option: str, factors: Mapping[int, float]) -> list[dict[str, Any]]:
    """The parts of a group, one for each factor of ``option``, the largest first.

    What is logged as the learning rate of a training is that of the first group.

    Args:
        group: A parameter group of an optimizer.
        option: A number that the group holds, such as ``"lr"``.
        factors: What to multiply ``option`` by, by the `id` of a parameter; 1 for all others.
    """
    of_each = [factors.get(id(p), 1.0) for p in group["params"]]
    parts = []
    for factor in sorted(set(of_each), reverse=True):
        held = {
            key: [entry for entry, own in zip(group[key], of_each, strict=True) if own == factor]
            for key in PER_PARAMETER
            if key in group
        }
        parts.append({**group, **held, option: group[option] * factor})
    return parts


def take_decay(run: Run) -> dict[str, float]:
    """Switch off the optimizer's decay in all groups with a trained weight, and return what it was, by weight name.

    Frozen weights of these groups are in it too, because they may be unfrozen in the course of the training.
    """
    assert run.optimizer is not None
    names = {id(p): name for name, p in run.model.named_parameters()}
    trained = {id(w.parameter) for w in run.weights()}
    decay = {}
    for group in run.optimizer.param_groups:
        if trained.isdisjoint(map(id, group["params"])):
            continue
        held = group.get("weight_decay", 0.0)
        decay.update({names[id(p)]: held for p in group["params"] if id(p) in names})
        group["weight_decay"] = 0.0
    return decay


def peak_rate(group: Mapping[str, Any]) -> float:
    """Largest learning rate that is known of a group: a scheduler built before has set that of its first step."""
    return max(float(group.get(key, 0.0)) for key in ("lr", "initial_lr", "max_lr"))


def undecayed(group: dict[str, Any], factors: Mapping[int, float]) -> list[dict[str, Any]]:
    """The parts of a group after its weight decay was multiplied; the group itself where nothing decays."""
    return split(group, "weight_decay", factors) if group.get("weight_decay") else [group]
