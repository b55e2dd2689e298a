"""GroupWeights: rows of subgroups that the model does badly on, or hardly learns from, count more in the loss.

p_g is the share of subgroup g in the training rows, L_g the running mean of its loss, w_g the weight of its rows:

    loss = task loss + mean over rows of (w_g - 1) * (loss of the row)

policy "dro":    w_g = q_g / p_g, where q is the worst distribution near p (group DRO in a chi-square ball):
                 q_g ~ p_g * max(d_g - eta, 0),  d_g = L_g - reference_g,  with eta such that
                 1/2 sum_g p_g (q_g / p_g - 1)^2 = rho      and q_g / p_g >= floor

policy "floor":  w_g = min(most, tau_g / s_g) where s_g < tau_g, else 1
                 s_g = p_g L_g / sum_h p_h L_h, the share of g in the loss,  tau_g = share * p_g
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core import Method, Run, Step, Weight, Within
from ..core.facts import Cost, Paper
from ..errors import UsageError
from ..precision import wide
from .bases.rows import Column, losses_of, numbers_of, row_counts

HALVINGS = 100  # number of bisection steps, enough for float64


@dataclass
class GroupWeights(Method):
    """Weight rows by subgroup: more weight for a high loss (group DRO), or for a share of the loss that is too small.

    Args:
        policy: ``"dro"`` minimises the loss of the worst mixture of the subgroups near the observed one. It also
            follows wrong labels, whose loss is high. ``"floor"`` lifts subgroups whose share of the loss is far below
            their share of the rows, and does not follow wrong labels.
        column: Column of the batch with the subgroup of each row: a number from 0 on, or -1 if it is unknown. The model
            does not receive it. Or a function of the inputs that returns these numbers. `fit` fills the column from
            ``subgroup`` (``--subgroup``).
        rho: Radius of the chi-square ball of ``"dro"``; 0 changes nothing.
        floor: Smallest weight of a subgroup with ``"dro"``.
        reference: Loss of each subgroup that can be reached, by number, for example at the end of a plain run; 0 by
            default. With ``"dro"``, what counts is the loss above it.
        share: With ``"floor"``, the share in the loss below which a subgroup is lifted, as a multiple of its share of
            the rows.
        most: Largest weight with ``"floor"``.
        smoothing: Rate of the running means of the losses.
        every: Number of steps between two updates of the weights.
        start: Share of the training before the first update.
        least: Subgroups with fewer training rows are merged into one, because their loss is mostly chance.

    A running mean is over the losses of rows as they are trained on, in training mode. If the model can fit every
    row, all training losses reach 0 and ``"dro"`` does nothing in the end (Sagawa et al., arXiv 1911.08731): use it
    with few epochs or strong regularisation. Rows of unknown subgroups have weight 1. Label smoothing acts on the
    task loss, not on the added term; class weights and the focal loss do too, so that `fit` refuses them beside
    this method. Beside a method that puts another loss in the place of a share of the task's (`SupCon`, a teacher),
    the added term counts as much as what is left of that.

    Departures:
        Weights of the loss instead of shares of a sampler, so that every row is still seen once an epoch. DRPruning
        predicts the reference losses from a scaling law while it trains, shrinks them while every subgroup is below its
        own, lets p drift, and raises q to the smallest p afterwards; none of this is here. Its running mean begins at 0
        and is too low for rare subgroups, here the mean is corrected. ``"floor"`` follows dynamic scale training (Chen
        et al., arXiv 2004.12432), which compares the share of the last step alone and changes the next batch.

    Raises:
        ValueError: In setup, without data to count the rows, for fewer than two subgroups of ``least`` rows, or a
            reference of another length; at the first batch, for labels of tokens.
        UsageError: In setup, if nothing is left of the task's loss (`CausalHead`).
        RuntimeError: At the first step, for a batch without the column.
    """

    policy: Literal["dro", "floor"] = "dro"
    column: Column = "subgroup"
    rho: Annotated[float, Within("[0, inf)")] = 0.05
    floor: Annotated[float, Within("[0, 1)")] = 0.2
    reference: Sequence[float] | None = None
    share: Annotated[float, Within("(0, 1]")] = 0.5
    most: Annotated[float, Within("[1, inf)")] = 4.0
    smoothing: Annotated[float, Within("(0, 1]")] = 0.1
    every: Annotated[int, Within("[1, inf)")] = 10
    start: Annotated[float, Within("[0, 1]")] = 0.1
    least: Annotated[int, Within("[1, inf)")] = 10

    null: ClassVar = {"policy": "dro", "rho": 0.0}
    needs_steps = True
    exclusive: ClassVar = "weighting of rows"
    conflicts: ClassVar[tuple[str, ...]] = ("labels of tokens", "methods that replace the task's loss (`causal_head`)")
    acts_on_unread = "never"
    cost: ClassVar = Cost()
    paper: ClassVar = Paper(
        authors=("Hexuan Deng", "Wenxiang Jiao", "Xuebo Liu", "Jing Li", "Min Zhang", "Zhaopeng Tu"),
        title="DRPruning: Efficient Large Language Model Pruning through Distributionally Robust Optimization",
        booktitle="Proceedings of the Annual Meeting of the Association for Computational Linguistics",
        venue="ACL",
        year=2025,
        arxiv="2411.14055",
    )

    @property
    def input_columns(self) -> tuple[str, ...]:
        return () if callable(self.column) else (self.column,)

    def setup(self, run: Run) -> None:
        if not run.loss_left:
            others = " and ".join(type(m).__name__ for m in run.methods if m.loss_taken)
            raise UsageError(
                f"GroupWeights weighs the rows of the task's loss, of which {others} leaves nothing: leave one of them "
                "out"
            )
        counts = row_counts(run, self.column, type(self).__name__)
        slots = merged(counts, self.least)
        like = next(run.model.parameters())
        device, dtype = like.device, torch.promote_types(like.dtype, torch.float32)
        sizes, reference = torch.zeros(2, max(slots) + 1, dtype=dtype)
        given = [0.0] * len(counts) if self.reference is None else list(self.reference)
        if len(given) != len(counts):
            raise ValueError(f"reference has {len(given)} losses, there are {len(counts)} subgroups: give one for each")
        for slot, count, loss in zip(slots, counts, given, strict=True):
            sizes[slot] += count
            reference[slot] += count * loss
        self.slots = torch.tensor(slots, device=device)  # slot of each subgroup
        self.rows = (sizes / sizes.sum()).to(device)  # share p of each slot in the rows
        self.reached = (reference / sizes).to(device)
        self.weights = torch.ones_like(self.rows)
        self.mean = torch.zeros(2, len(self.rows), device=device, dtype=dtype)  # sums of losses, and of rates
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}  # losses and slots of the micro-batches of the current step

    def penalty(self, step: Step) -> Tensor:
        losses = losses_of(step, self)
        numbers = numbers_of(step.inputs, self.column, type(self).__name__)
        slots = torch.where(numbers < 0, -1, self.slots[numbers.clamp(min=0)])
        self.seen[step.number] = (losses.detach(), slots)
        weights = torch.where(slots < 0, 1.0, self.weights[slots.clamp(min=0)])
        return step.run.loss_left * ((weights - 1) * losses).mean()

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        sums = torch.zeros_like(self.mean)
        for losses, slots in run.kept(self.seen):
            known = (slots >= 0).to(sums.dtype)
            sums[0].index_add_(0, slots.clamp(min=0), losses.to(sums.dtype) * known)
            sums[1].index_add_(0, slots.clamp(min=0), known)
        run.all_reduce([sums])
        self.seen = {}
        new = torch.stack([sums[0] / sums[1].clamp(min=1e-30), torch.ones_like(sums[1])])
        self.mean = torch.where(sums[1] > 0, self.mean.lerp(new, self.smoothing), self.mean)
        taken = run.index + 1
        if taken % self.every == 0 and taken >= self.start * run.steps(self):
            self.weights = self.updated()

    def updated(self) -> Tensor:
        """Weights of the slots for the running means of their losses."""
        overall = self.mean[0].sum() / self.mean[1].sum().clamp(min=1e-30)
        losses = torch.where(self.mean[1] > 0, self.mean[0] / self.mean[1].clamp(min=1e-30), overall)
        if self.policy == "dro":
            return dro_weights(self.rows, losses - self.reached, self.rho, self.floor)
        return floor_weights(self.rows, losses, self.share, self.most)

    def state_dict(self) -> dict[str, Any]:
        return {"mean": self.mean, "weights": self.weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mean, self.weights = state["mean"].to(self.mean.device), state["weights"].to(self.mean.device)


def merged(counts: Sequence[int], least: int) -> list[int]:
    """Slot of each subgroup: its own with ``least`` rows or more, one for all others.

    If these have fewer than ``least`` rows together, they share the slot of the smallest large one.

    Raises:
        ValueError: There are fewer than two slots.
    """
    large = [number for number, count in enumerate(counts) if count >= least]
    slots = {number: slot for slot, number in enumerate(large)}
    rest = sum(count for count in counts if count < least)
    if rest >= least:
        shared = len(large)
    else:
        shared = slots[min(large, key=counts.__getitem__)] if large else 0
    if len(large) + (rest >= least) < 2:
        raise ValueError(
            f"GroupWeights needs two subgroups of {least} rows or more, here are subgroups of "
            f"{', '.join(map(str, counts))} rows: choose a coarser column, lower least, or leave GroupWeights out"
        )
    return [slots.get(number, shared) for number in range(len(counts))]


def dro_weights(p: Tensor, excess: Tensor, rho: float, floor: float = 0.0) -> Tensor:
    """Weights q / p of the worst distribution q in a chi-square ball around p, for the losses of its groups.

    Args:
        p: Shares of the groups (groups,), which add up to 1.
        excess: Loss of each group, less its reference (groups,).
        rho: Radius of the ball.
        floor: Smallest q / p.

    Returns:
        (groups,), with mean 1 under p. They are 1 where all groups have the same excess.
    """
    if rho == 0:
        return torch.ones_like(p)
    shares, above = wide(p), wide(excess - excess.min())
    limits = torch.finfo(shares.dtype)
    spread = above.max()
    above = above / torch.where(spread > 0, spread, torch.ones_like(spread))

    def ratios(eta: Tensor) -> Tensor:
        raw = (above - eta).clamp(min=0)
        return floor + (1 - floor) * raw / (shares * raw).sum().clamp(min=limits.tiny)

    low = torch.full_like(spread, -1 / (math.sqrt(2 * rho + 1) - 1))  # no ratio exceeds sqrt(2 rho + 1) there
    high = torch.full_like(spread, 1 - limits.eps**0.5)  # at 1, no group is above eta
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        outside = (shares * (ratios(middle) - 1).square()).sum() / 2 > rho
        low, high = torch.where(outside, low, middle), torch.where(outside, middle, high)
    return torch.where(spread > 0, ratios(low), torch.ones_like(shares)).to(p.dtype)


def floor_weights(p: Tensor, losses: Tensor, share: float, most: float) -> Tensor:
    """Weights of groups by their share in the loss; 1 for those whose share is at least ``share`` times p.

    Args:
        p: Shares of the groups in the rows (groups,).
        losses: Mean loss of each group (groups,).
        share: Smallest share in the loss, as a multiple of p.
        most: Largest weight.
    """
    mean = (p * losses).sum()
    return torch.where(losses < share * mean, (share * mean / losses.clamp(min=1e-30)).clamp(max=most), 1.0)
