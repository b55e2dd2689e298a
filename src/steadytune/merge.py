"""Several models in one: pure functions on state dicts.

Uniform and greedy soup: Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482.
Interpolation: Wortsman et al., Robust fine-tuning of zero-shot models (WiSE-FT), CVPR 2022, arXiv 2109.01903.
Its weight chosen on held-out rows: Ilharco et al., Patching open-vocabulary models (PAINT), NeurIPS 2022, 2208.05592.
Task arithmetic: Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv 2212.04089.

Models must share their beginning: the pre-trained weights and, where a new head is averaged, its initial values too.
All functions warn where the weights say that they do not.
Averages are taken in float64 and given in the dtype of the model; integer buffers are taken over.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

State = Mapping[str, Tensor]
ALPHAS = tuple(i / 10 for i in range(11))
LARGE = 256  # entries from which chance does not turn two matrices of one beginning away from each other
APART = 0.2  # cosine; fine-tuned matrices of one beginning have 0.9 and more, those drawn apart have 0


def uniform(states: Sequence[State]) -> dict[str, Tensor]:
    """The mean of each floating-point tensor, summed in float64; other tensors must agree.

    Args:
        states: State dicts with the same names and shapes, of models that grew from one initialisation.

    Raises:
        ValueError: Names or shapes that differ, or integer buffers that do.
    """
    _check_alike(states)
    return {name: _mean(name, [state[name] for state in states]) for name in states[0]}


def greedy(
    states: Sequence[State], score: Callable[[dict[str, Tensor]], float], *, strict: bool = False
) -> tuple[dict[str, Tensor], list[int]]:
    """The greedy soup: from the best model on, each next one is added if the mean with it scores no less.

    Args:
        states: As for `uniform`.
        score: Function from a state dict to its score on held-out rows; larger is better. Test the soup on other rows.
            With about a hundred rows the choice is mostly noise, and `uniform` is the better soup.
        strict: A model must raise the score, as in the authors' code; their paper accepts ties, as the default does.

    Returns:
        The soup, and which models are in it, in the order of their addition. Models of equal score are tried in the
        order given.
    """
    check_same(states)
    alone = [score(dict(state)) for state in states]
    order = sorted(range(len(states)), key=lambda i: -alone[i])
    chosen, soup, best = order[:1], dict(states[order[0]]), alone[order[0]]
    for i in order[1:]:
        candidate = uniform([states[j] for j in (*chosen, i)])
        found = score(candidate)
        if found > best or (found == best and not strict):
            chosen, soup, best = [*chosen, i], candidate, found
    return soup, chosen


def interpolate(
    start: State, end: State, alpha: float, *, fisher: tuple[State, State] | None = None, floor: float = 1e-6
) -> dict[str, Tensor]:
    """WiSE-FT: ``(1 - alpha) * start + alpha * end``; what ``start`` lacks (a new head) is taken from ``end``.

    Args:
        start: The pre-trained model, which must do the task by itself for ``alpha = 0`` to mean anything.
        end: The fine-tuned one.
        alpha: In [0, 1]; 0.5 where nothing is known.
        fisher: Fisher information of each, by name: weights become ``(1 - alpha) * F_start`` and ``alpha * F_end``,
            divided by their sum. Names without one count 1.
        floor: Floor of the Fisher information, above 0.

    Raises:
        ValueError: Names that ``end`` lacks, other shapes, alpha or floor out of range.
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
        f, g = (part.get(name, torch.ones(())).double().clamp(min=floor) for part in fisher or ({}, {}))
        a, b = (1 - alpha) * f, alpha * g
        merged[name] = ((a * old.double() + b * end[name].double()) / (a + b)).to(end[name].dtype)
    return merged


def paint(
    start: State, end: State, score: Callable[[dict[str, Tensor]], float], alphas: Sequence[float] = ALPHAS
) -> tuple[dict[str, Tensor], float]:
    """PAINT: `interpolate` with the alpha that scores best on held-out rows; the smallest of several.

    Args:
        start: The pre-trained model.
        end: The fine-tuned one.
        score: Function from a state dict to its score; larger is better. It should cover the new task and those that
            must not be lost.
        alphas: Those tried; the authors' 0, 0.1, ... 1.

    Returns:
        The model, and its alpha.
    """
    found = {alpha: score(interpolate(start, end, alpha)) for alpha in sorted(alphas)}
    best = max(found, key=lambda alpha: found[alpha])
    return interpolate(start, end, best), best


def task_vector(base: State, tuned: State) -> dict[str, Tensor]:
    """``tuned - base`` of each floating-point tensor of both, in float64.

    Raises:
        ValueError: Names of ``base`` that ``tuned`` lacks, or other shapes.
    """
    _check_alike([base, {name: tuned[name] for name in base if name in tuned}])
    return {name: tuned[name].double() - old.double() for name, old in base.items() if old.is_floating_point()}


def add_vectors(base: State, vectors: Sequence[State], scale: float = 1.0) -> dict[str, Tensor]:
    """Task arithmetic: ``base + scale * sum of task vectors``; a negative scale forgets the tasks.

    Args:
        base: The model that the vectors were taken from.
        vectors: Vectors of `task_vector`; each must have the names of all.
        scale: 0.3 to 0.5 where several tasks are added.

    Raises:
        ValueError: Vectors of different models, or of another than ``base``.
    """
    check_same(vectors)
    check_same([{name: base[name] for name in vectors[0] if name in base}, vectors[0]])
    merged = dict(base)
    for name in vectors[0]:
        total = torch.stack([vector[name] for vector in vectors]).sum(0)
        merged[name] = (base[name].double() + scale * total).to(base[name].dtype)
    return merged


def check_same(states: Sequence[State]) -> None:
    """Raise unless all state dicts have the same names and shapes, naming one that differs."""
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
    """Raise as `check_same`, and warn of a matrix that did not begin with the same values in all models."""
    check_same(states)
    first, *others = states
    for name, tensor in first.items():
        if not tensor.is_floating_point() or tensor.dim() < 2 or tensor.numel() < LARGE:
            continue
        for other in others:
            cosine = float(torch.cosine_similarity(tensor.flatten().double(), other[name].flatten().double(), dim=0))
            if cosine < APART and tensor.any() and other[name].any():
                warnings.warn(
                    f"the models did not begin alike: {name!r} has a cosine of {cosine:.2f} between two of them (those "
                    "of one beginning have one near 1), and what lies between such weights is of no use. Fine-tune all "
                    "from one pre-trained model, with one seed of the head",
                    stacklevel=3,
                )
                return


def _mean(name: str, tensors: Sequence[Tensor]) -> Tensor:
    if tensors[0].is_floating_point():
        return torch.stack([t.double() for t in tensors]).mean(0).to(tensors[0].dtype)
    if any(not torch.equal(t, tensors[0]) for t in tensors[1:]):
        raise ValueError(f"the models hold different values in {name!r}, which is no floating-point tensor")
    return tensors[0]
