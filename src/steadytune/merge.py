"""Merging models: pure functions of state dicts.

Uniform and greedy soup: Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482.
Interpolation: Wortsman et al., Robust fine-tuning of zero-shot models (WiSE-FT), CVPR 2022, arXiv 2109.01903.
Its weight chosen on held-out rows: Ilharco et al., Patching open-vocabulary models (PAINT), NeurIPS 2022, 2208.05592.
Fisher-weighted mean: Matena and Raffel, Merging models with Fisher-weighted averaging, NeurIPS 2022, arXiv 2111.09832.
Task arithmetic: Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv 2212.04089.

Models must start from the same pre-trained weights, and from the same values of a new head if it is averaged. All
functions warn if the weights show that they do not.
Averages are computed in float64 (in float32 on Apple's GPUs, which have nothing wider) and returned in the dtype of the
model; integer buffers are copied.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .precision import wide

State = Mapping[str, Tensor]
ALPHAS = tuple(i / 10 for i in range(11))
LARGE = 256  # smallest number of entries of a matrix whose cosine is not a matter of chance
APART = 0.2  # cosine; matrices that started from the same values have 0.9 or more, independent ones about 0


def uniform(states: Sequence[State]) -> dict[str, Tensor]:
    """Mean of each floating-point tensor, computed in float64; other tensors must be equal.

    Args:
        states: State dicts with the same names and shapes, of models that started from the same weights.

    Raises:
        ValueError: Names, shapes or integer buffers differ.
    """
    _check_alike(states)
    return {name: _mean(name, [state[name] for state in states]) for name in states[0]}


def souped(models: Sequence[nn.Module]) -> Any:
    """The first model with the mean of all weights; alone it stays as it is.

    Raises:
        ValueError: As `uniform`.
    """
    if len(models) > 1:
        models[0].load_state_dict(uniform([model.state_dict() for model in models]))
    return models[0]


def fisher(states: Sequence[State], information: Sequence[State], floor: float = 1e-6) -> dict[str, Tensor]:
    """Mean of each floating-point tensor, in which every entry counts by its Fisher information.

    An entry that a model is sure of, because its predictions would change most, outweighs those of the others.

    Args:
        states: As for `uniform`.
        information: Fisher information of each model by name, of the shapes of the tensors. Names without it are
            averaged evenly.
        floor: Smallest value of the Fisher information, above 0. Entries below it in all models are averaged evenly.

    Raises:
        ValueError: Names, shapes or integer buffers differ, there is not one set of information for each model, or
            floor is out of range.
    """
    if len(states) != len(information):
        raise ValueError(f"{len(states)} models need as many sets of Fisher information, got {len(information)}")
    if not floor > 0:
        raise ValueError(f"floor must be above 0, got {floor}")
    merged = uniform(states)
    for name in merged:
        if all(name in part for part in information) and merged[name].is_floating_point():
            weights = torch.stack([wide(part[name]).clamp(min=floor) for part in information])
            values = torch.stack([wide(state[name]) for state in states])
            merged[name] = ((weights * values).sum(0) / weights.sum(0)).to(merged[name].dtype)
    return merged


def greedy(
    states: Sequence[State], score: Callable[[dict[str, Tensor]], float], *, strict: bool = False
) -> tuple[dict[str, Tensor], list[int]]:
    """Greedy soup: starting from the best model, each next one is added if the score of the mean does not fall.

    Args:
        states: As for `uniform`.
        score: Function from a state dict to its score on held-out rows; larger is better. Test the soup on other rows.
            With about a hundred rows the choice is mostly noise, and `uniform` is the better soup.
        strict: Whether a model must raise the score, as in the authors' code. The default accepts ties, as their paper.

    Returns:
        The soup, and the numbers of its models in the order of their addition. Models of equal score are tried in the
        given order.
    """
    check_same(states)
    alone = [score(dict(state)) for state in states]
    order = sorted(range(len(states)), key=lambda i: -alone[i])
    chosen, soup, best = order[:1], dict(states[order[0]]), alone[order[0]]
    for i in order[1:]:
        candidate = uniform([states[j] for j in (*chosen, i)])
        candidate_score = score(candidate)
        if candidate_score > best or (candidate_score == best and not strict):
            chosen, soup, best = [*chosen, i], candidate, candidate_score
    return soup, chosen


def interpolate(
    start: State, end: State, alpha: float, *, fisher: tuple[State, State] | None = None, floor: float = 1e-6
) -> dict[str, Tensor]:
    """WiSE-FT: ``(1 - alpha) * start + alpha * end``; tensors that ``start`` lacks (a new head) come from ``end``.

    Args:
        start: State dict of the pre-trained model. ``alpha = 0`` has a meaning only if it can do the task.
        end: State dict of the fine-tuned model.
        alpha: Weight of ``end``, in [0, 1]; without other knowledge use 0.5.
        fisher: Fisher information of both models, by name. The weights are then ``(1 - alpha) * F_start`` and ``alpha *
            F_end``, divided by their sum. Names without Fisher information count as 1.
        floor: Smallest value of the Fisher information, above 0.

    Raises:
        ValueError: ``end`` lacks a name, shapes differ, or alpha or floor is out of range.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    if not floor > 0:
        raise ValueError(f"floor must be above 0, got {floor}")
    _check_alike([start, {name: end[name] for name in start if name in end}])
    merged = dict(end)
    for name, old in start.items():
        if not old.is_floating_point():
            continue
        f, g = (wide(part.get(name, torch.ones(()))).clamp(min=floor) for part in fisher or ({}, {}))
        a, b = (1 - alpha) * f, alpha * g
        merged[name] = ((a * wide(old) + b * wide(end[name])) / (a + b)).to(end[name].dtype)
    return merged


def paint(
    start: State, end: State, score: Callable[[dict[str, Tensor]], float], alphas: Sequence[float] = ALPHAS
) -> tuple[dict[str, Tensor], float]:
    """PAINT: `interpolate` with the alpha that scores best on held-out rows; the smallest one of equals.

    Args:
        start: State dict of the pre-trained model.
        end: State dict of the fine-tuned model.
        score: Function from a state dict to its score; larger is better. It should cover the new task and those that
            must not be lost.
        alphas: Alphas to try; by default the authors' 0, 0.1, ..., 1.

    Returns:
        State dict of the merged model, and its alpha.
    """
    score_of = {alpha: score(interpolate(start, end, alpha)) for alpha in sorted(alphas)}
    best = max(score_of, key=lambda alpha: score_of[alpha])
    return interpolate(start, end, best), best


def task_vector(base: State, tuned: State) -> dict[str, Tensor]:
    """``tuned - base`` of each floating-point tensor of both, in float64.

    Raises:
        ValueError: ``tuned`` lacks a name of ``base``, or shapes differ.
    """
    _check_alike([base, {name: tuned[name] for name in base if name in tuned}])
    return {name: wide(tuned[name]) - wide(old) for name, old in base.items() if old.is_floating_point()}


def add_vectors(base: State, vectors: Sequence[State], scale: float = 1.0) -> dict[str, Tensor]:
    """Task arithmetic: ``base + scale * sum of task vectors``; a negative scale forgets the tasks.

    Args:
        base: State dict of the model that the vectors were computed from.
        vectors: Results of `task_vector`, all with the same names.
        scale: Factor of the sum; 0.3 to 0.5 is common for several tasks.

    Raises:
        ValueError: The vectors are of different models, or not of ``base``.
    """
    check_same(vectors)
    check_same([{name: base[name] for name in vectors[0] if name in base}, vectors[0]])
    merged = dict(base)
    for name in vectors[0]:
        total = torch.stack([vector[name] for vector in vectors]).sum(0)
        merged[name] = (wide(base[name]) + scale * total).to(base[name].dtype)
    return merged


def check_same(states: Sequence[State]) -> None:
    """Raise unless all state dicts have the same names and shapes; the message names one that differs."""
    if not states:
        raise ValueError("there is nothing to merge: give at least one model")
    for other in states[1:]:
        if odd := sorted(other.keys() ^ states[0].keys()):
            raise ValueError(f"only models of one architecture can be merged: not all of them have {odd[0]!r}")
        for name, tensor in states[0].items():
            if other[name].shape != tensor.shape:
                raise ValueError(
                    f"only models of one architecture can be merged: {name!r} has shape {tuple(tensor.shape)} in one "
                    f"and {tuple(other[name].shape)} in another"
                )


def _check_alike(states: Sequence[State]) -> None:
    """Raise as `check_same`; warn if a matrix started from different values in two of the models."""
    check_same(states)
    first, *others = states
    for name, tensor in first.items():
        if not tensor.is_floating_point() or tensor.dim() < 2 or tensor.numel() < LARGE:
            continue
        for other in others:
            cosine = float(torch.cosine_similarity(wide(tensor.flatten()), wide(other[name].flatten()), dim=0))
            if cosine < APART and tensor.any() and other[name].any():
                warnings.warn(
                    f"the models did not start from the same weights: {name!r} has cosine {cosine:.2f} between two "
                    "of them (near 1 after a common start), so their mean is of no use. Fine-tune all from one "
                    "pre-trained model, with one seed of the head",
                    stacklevel=3,
                )
                return


def _mean(name: str, tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].is_floating_point():
        return torch.stack([wide(t) for t in tensors]).mean(0).to(tensors[0].dtype)
    if any(not torch.equal(t, tensors[0]) for t in tensors[1:]):
        raise ValueError(f"the models hold different values in {name!r}, which is no floating-point tensor")
    return tensors[0]
