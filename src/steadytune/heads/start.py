"""Heads that start as a linear probe: choose the probe by the labels, and write it into the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..core.step import NUMBERS, problem_type
from ..errors import UsageError
from .features import features, output_layer
from .probe import Parts, Probe, logistic, logistic_each, ridge, ridge_classes

How = Literal["logistic", "ridge"]
HOW = ("logistic", "ridge")
Inputs = Mapping[str, Tensor]
FOLDS = 5


def fit_probe(
    phi: np.ndarray,
    labels: np.ndarray,
    outputs: int,
    *,
    how: How,
    bias: bool,
    parts: Parts,
    units: Sequence[Hashable] | None = None,
) -> Probe:
    """Fit the probe for a kind of labels.

    Args:
        phi: Features (rows, width).
        labels: Class numbers (rows,); 0 and 1 (rows, classes) for several labels; or floats (rows,).
        outputs: Number of outputs of the head.
        how: Kind of probe for classes. Numbers always use ridge, several labels always logistic regressions.
        bias: Whether the head has one.
        parts: Folds of the logistic probes, as of `probe.logistic`.
        units: Unit of each row for the ridge probes, as of `probe.ridge`.
    """
    if labels.ndim == 2:
        return logistic_each(phi, labels, parts, bias=bias)
    if outputs == 1:
        return ridge(phi, labels, bias=bias, units=units)
    if how == "ridge":
        return ridge_classes(phi, labels.astype(int), outputs, bias=bias, units=units)
    return logistic(phi, labels.astype(int), outputs, parts, bias=bias)


def cross_fitted(phi: np.ndarray, fit: Callable[[np.ndarray], Probe], parts: Parts) -> np.ndarray:
    """Outputs (rows, outputs) of probes whose weights and penalty were chosen without the row.

    `Probe.out_of_fold` is cheaper, but its penalty was chosen on the same rows, which makes its score too good.

    Args:
        phi: Features (rows, width).
        fit: Makes a probe of the rows at these positions, and chooses its penalty on them alone.
        parts: Folds, as pairs of positions to fit on and positions to judge; each row is judged once.
    """
    judged = [(outside, fit(inside).outputs(phi[outside])) for inside, outside in parts]
    order = np.argsort(np.concatenate([outside for outside, _ in judged]))
    return np.concatenate([outputs for _, outputs in judged])[order]


def even_parts(labels: np.ndarray, seed: int, folds: int = FOLDS, units: Sequence[Hashable] = ()) -> Parts:
    """Folds of similar sizes, with similar shares of the classes if labels are class numbers.

    Rows are shuffled, sorted by class, and dealt out in turn.

    Args:
        labels: (rows,) or (rows, classes).
        seed: Seed of the shuffle.
        folds: Number of folds; at most the number of different rows.
        units: Unit of each row; rows of one unit share a fold.
    """
    numbers: dict[Hashable, int] = {}
    unit = np.array([numbers.setdefault(one, len(numbers)) for one in units])
    if len(numbers) < 2:
        unit = np.arange(len(labels))
    _, first = np.unique(unit, return_index=True)
    order = np.random.default_rng(seed).permutation(len(first))
    if labels.ndim == 1:
        order = order[np.argsort(labels[first[order]], kind="stable")]
    dealt = np.empty(len(first), dtype=int)
    dealt[order] = np.arange(len(first)) % min(folds, len(first))
    fold = dealt[unit]
    return [(np.flatnonzero(fold != i), np.flatnonzero(fold == i)) for i in np.unique(fold)]


@torch.no_grad()
def set_head(model: nn.Module, probe: Probe, scale: float = 1.0) -> None:
    """Write the probe into the model's last linear layer.

    Args:
        model: A classifier with as many outputs as the probe.
        probe: The probe; its bias is left out if the layer has none.
        scale: Factor of weights and bias. Below 1 the first predictions are less certain, and the body changes faster.
    """
    layer = output_layer(model)
    layer.weight.copy_(torch.from_numpy(scale * probe.weight))
    if layer.bias is not None:
        layer.bias.copy_(torch.from_numpy(scale * probe.bias))


def _hard(labels: np.ndarray, model: Any) -> np.ndarray:
    """The classes that probabilities (rows, classes) name: the largest, or those above one half if several can hold."""
    alone = problem_type(model) == "single_label_classification"
    return labels.argmax(1) if alone else (labels > 0.5).astype(labels.dtype)


@dataclass(frozen=True, eq=False)
class Labelled:
    """Features and labels of rows, with keys for an order that depends on the rows alone.

    Attributes:
        phi: Features (rows, width).
        labels: Class numbers or floats (rows,), or 0 and 1 (rows, classes).
        keys: Tokens of each row, by which rows are ordered.
        units: Unit of each row: no row is judged by a probe that saw another row of its unit. None takes rows of equal
            tokens for a unit.
    """

    phi: np.ndarray
    labels: np.ndarray
    keys: list[bytes]
    units: Sequence[Hashable] | None = None

    @classmethod
    def of(cls, model: Any, batches: Iterable[Inputs | Sequence[Inputs]]) -> Labelled:
        """Pass the batches, or lists of micro-batches, through the model.

        Raises:
            ValueError: Batches have no labels.
            UsageError: They have not one label, or one label per output, for each row; or several numbers.
        """
        held: list[Inputs] = []
        for given in batches:
            held += [given] if isinstance(given, Mapping) else list(given)
        if not held or any("labels" not in batch for batch in held):
            raise ValueError("a head can begin as a probe only on batches that hold labels")
        outputs = output_layer(model).out_features
        shapes = {tuple(batch["labels"].shape[1:]): tuple(batch["labels"].shape) for batch in held}
        for rest, shape in shapes.items():
            if rest not in ((), (outputs,)) or len(shapes) > 1:
                raise UsageError(
                    f"a head of {outputs} outputs cannot begin as a probe on labels of shape {shape}: give one label a "
                    "row, or one for each output, or leave HeadInit out"
                )
        if outputs > 1 and () not in shapes and problem_type(model) == NUMBERS:
            raise UsageError(
                f"a head of {outputs} numbers a row cannot begin as a probe, which is of classes, of one number or of "
                "several labels: leave HeadInit out"
            )
        labels = torch.cat([batch["labels"].cpu() for batch in held]).numpy()
        if labels.ndim == 2:
            labels = labels[:, 0] if outputs == 1 else _hard(labels, model)
        keys = [key for batch in held for key in _keys(batch)]
        return cls(features(model, held).numpy(), labels, keys)

    def together(self) -> Labelled:
        """The rows of all processes together."""
        if not (dist.is_available() and dist.is_initialized()):
            return self
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, (self.phi, self.labels, self.keys))
        phi, labels, keys = zip(*parts, strict=True)
        return Labelled(np.concatenate(phi), np.concatenate(labels), [key for part in keys for key in part])

    def probe(self, outputs: int, *, how: How, bias: bool, seed: int = 0) -> Probe:
        """Fit the probe on these rows.

        Rows are sorted by their tokens, and copies by their labels, before they are dealt into folds, so that the folds
        and the penalty do not depend on the order of a loader. ``out_of_fold`` has the order of the rows here.

        Args:
            outputs: Outputs of the head.
            how: Kind of probe for classes.
            bias: Whether the head has one.
            seed: Seed of the folds.
        """
        order = np.array(sorted(range(len(self.keys)), key=lambda i: (self.keys[i], self.labels[i].tolist())))
        given = self.keys if self.units is None else self.units
        units = [given[i] for i in order]
        phi, labels = self.phi[order], self.labels[order]
        parts = even_parts(labels, seed, units=units)
        probe = fit_probe(phi, labels, outputs, how=how, bias=bias, parts=parts, units=units)
        return dataclasses.replace(probe, out_of_fold=probe.out_of_fold[np.argsort(order)])


def _keys(batch: Inputs) -> list[bytes]:
    """The tokens of each row without padding."""
    if "input_ids" not in batch:
        return [b""] * len(batch["labels"])
    ids = batch["input_ids"].cpu().numpy()
    mask = batch["attention_mask"].cpu().numpy() > 0 if "attention_mask" in batch else np.ones(ids.shape, dtype=bool)
    return [token_key(row[kept]) for row, kept in zip(ids, mask, strict=True)]


def token_key(ids: Any) -> bytes:
    """The tokens of one row as bytes that sort as the tokens do."""
    return np.asarray(ids).astype(">i8").tobytes()


def probe_of_batches(model: Any, batches: Iterable[Inputs | Sequence[Inputs]], *, how: How, seed: int = 0) -> Probe:
    """Fit the probe of a model on labelled batches of all processes.

    Args:
        model: A classifier.
        batches: Inputs with ``labels``, or lists of micro-batches.
        how: Kind of probe for classes.
        seed: Seed of the folds.

    Raises:
        ValueError: As `Labelled.of`.
    """
    layer = output_layer(model)
    return (
        Labelled.of(model, batches)
        .together()
        .probe(layer.out_features, how=how, bias=layer.bias is not None, seed=seed)
    )


def first_batches(batches: Iterable[Inputs | Sequence[Inputs]]) -> list[Inputs]:
    """The micro-batches of the first step."""
    first = next(iter(batches))
    return [first] if isinstance(first, Mapping) else list(first)
