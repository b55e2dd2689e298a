"""Attention-guided weight mixup: the forward uses a mixture of tuned and pre-trained weights, learned on held-out rows.

    F = a W + (1 - a) W0        a = a1 a2, a column times a row, in [0, 1]; the forward and checkpoints use F
    min over a of L2(W*(a), a)  with  W*(a) = argmin over W of L1(W, a)      L1 on the training rows, L2 on others

    dL/dW = a * dL/dF           dL/da = dL/dF * (W - W0), for a1 and a2 times the other one and summed
    the authors' code:  F = a1 a2 W + (1 - a1)(1 - a2) W0, whose coefficients need not add up to 1

After each step of W, a takes one step along dL2/da: of ``"first"`` order, or including the effect of a on W through the
last step (`steadytune.hypergradient`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from ..core import Run, Scope, Weight, Within, select
from ..core.facts import Cost, Paper
from ..functional import contraction, mixture, warmed_cosine
from ..hypergradient import check_masters, check_slope, difference
from .bases.bilevel import BiLevel, Outer, Variables, flat

Value = Callable[[str], Tensor]  # name -> W


@dataclass
class WeightMixup(BiLevel):
    """Mix each weight with its pre-trained value in the forward; learn the shares of the mixture on held-out rows.

    Args:
        outer: Rows that the shares learn on. In `steadytune.fit`, a share of the training rows, which the weights then
            do not train on; with few rows this costs accuracy, and the procedure `mixup-blo` trains on all rows
            afterwards. Elsewhere, a function that returns batches each time it is called; each process gives its own.
            With None the shares learn on the training rows, together with the weights.
        alpha: Fixed shares: a number, or the ``alphas`` of an earlier run. None learns them.
        rank: 1 for shares a1 a2 with one number per row and one per column, None for one share per entry (12 more bytes
            per weight), ``"tensor"`` for one share per weight matrix.
        convex: Whether the shares of both weights add up to 1. False is the authors' (1 - a1)(1 - a2) for the
            pre-trained weight.
        order: ``"first"`` is the gradient of the outer loss at the mixture. ``"difference"`` adds the effect of the
            shares through the last step of the weights; it costs two more passes of its batch, and memory for one more
            gradient of all weights during them.
        precondition: Whether a difference uses the optimizer's own step. False assumes plain descent.
        lr: Peak learning rate of the shares' own AdamW.
        decay: Decay of the shares, toward the pre-trained weights.
        schedule: Schedule of ``lr``: ``"cosine"`` after a warm-up, or ``"constant"``.
        warmup: Share of the steps with a rising rate.
        scope: Which weights are mixed. A new head has no pre-trained value and is left alone.

    Between steps the model contains the mixtures, and so does every checkpoint. The shares start at 1, are clamped to
    [0, 1] and are not clipped. With `Mixout` or `DPSMix` in the list, the shares' gradient is taken at the raw weights.

    Departures:
        Convex by default. The shares start at 1 without noise (the authors': N(1, 0.005), clamped). One step of the
        weights for one of the shares; the library that the authors use takes two on the same batch, as its roll-back
        does nothing, and leaves the weights displaced after each difference. The difference is taken at the new
        weights, as in their code (their equation: the old ones), under one dropout draw. No folds and no second phase:
        those are the procedure `mixup-blo`.

    Raises:
        ValueError: In setup, for a share of rows outside `fit`, or weights below float32 with differences; in attach
            for sharded weights, or an optimizer that cannot be preconditioned.
    """

    outer: Annotated[float, Within("(0, 1)")] | Outer | None = 0.2
    alpha: Annotated[float, Within("[0, 1]")] | Mapping[str, Sequence[Tensor]] | None = None
    rank: Literal[1, "tensor"] | None = 1
    convex: bool = True
    order: Literal["first", "difference"] = "first"
    precondition: bool = True
    lr: Annotated[float, Within("(0, inf)")] = 2e-3
    decay: Annotated[float, Within("[0, inf)")] = 0.0
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: Annotated[float, Within("[0, 1)")] = 0.1
    scope: Scope = "linear"

    interval = (0.0, 1.0)
    null: ClassVar = {"alpha": 1.0}
    exclusive: ClassVar = "average"
    conflicts: ClassVar[tuple[str, ...]] = (
        "adapters, which have no pre-trained value",
        "sharded weights (FSDP2)",
        "half precision, with differences",
    )
    acts_on_unread = "in scope"
    cost: ClassVar = Cost(passes=2.0, held={"": 8}, during=4)
    paper: ClassVar = Paper(
        authors=("Sai Ashish Somayajula", "Youwei Liang", "Li Zhang", "Abhishek Singh", "Pengtao Xie"),
        title="Generalizable and Stable Finetuning of Pretrained Language Models on Low-Resource Texts",
        booktitle="Proceedings of the Conference of the North American Chapter of the Association for Computational "
        "Linguistics: Human Language Technologies",
        venue="NAACL",
        year=2024,
        arxiv="2403.12918",
    )

    @property
    def learns(self) -> bool:
        """Whether the shares are learned."""
        return self.alpha is None

    @property
    def full_precision(self) -> bool:
        return self.learns and self.outer is not None and self.order == "difference"

    def setup(self, run: Run) -> None:
        super().setup(run)
        self.mixed = {w.name for w in run.require(self, self.scope, reference=True)}
        self.alphas: Variables = {}
        self.slopes: list[Tensor] = []  # gradient of the shares on the training rows in the current step
        if self.full_precision:
            check_masters([w.data for w in run.weights()])

    def attach(self, run: Run) -> None:
        self.alphas = {w.name: self.factors(run, w) for w in self.chosen(run.weights(self))}
        if self.learns:
            self.begin(run, self.alphas)
        if self.full_precision and self.precondition:
            assert run.optimizer is not None
            check_slope(run.optimizer)

    def chosen(self, weights: Sequence[Weight]) -> list[Weight]:
        """Weights that are mixed."""
        return [w for w in select(weights, self.scope) if w.name in self.mixed]

    def factors(self, run: Run, weight: Weight) -> list[Tensor]:
        """Factors of a weight's share, broadcastable to it: the given ones, or ones."""
        like = weight.data
        if isinstance(self.alpha, Mapping):
            if weight.name not in self.alpha:
                raise ValueError(f"alpha has no share for {weight.name!r}: give one for every weight in scope")
            return [run.local(weight.name, t.to(like)) for t in self.alpha[weight.name]]
        if self.alpha is not None or self.rank == "tensor":
            return [like.new_full((), 1.0 if self.alpha is None else self.alpha)]
        if self.rank is None or like.dim() == 1:
            return [torch.ones_like(like)]
        return [like.new_ones(like.shape[0], *[1] * (like.dim() - 1)), like.new_ones(1, *like.shape[1:])]

    # ------------------------------------------------------------------ the mixture

    def before_forward(self, run: Run, weights: Sequence[Weight]) -> None:
        for w in self.chosen(weights):
            run.show(w, self.mixture(run, w.name, w.data), own=True)

    def mixture(self, run: Run, name: str, value: Tensor) -> Tensor:
        """F of a weight whose W is ``value``."""
        return mixture(self.alphas[name], value, run.reference(name), convex=self.convex)

    def contraction(self, run: Run, name: str, gradient: Tensor, value: Tensor) -> list[Tensor]:
        """dL/da of a weight whose W is ``value``, from dL/dF."""
        return contraction(self.alphas[name], gradient, value, run.reference(name), convex=self.convex)

    def pull_back(self, run: Run, weights: Sequence[Weight]) -> None:
        here = {w.name: w for w in self.chosen(weights)}
        if self.learns and self.rows is None:
            self.slopes, take = self.collector(run, run.raw)
            for name, w in here.items():
                if w.grad is not None:
                    take(name, w.grad)
        for w in here.values():
            for factor in self.alphas[w.name]:
                assert w.grad is not None
                w.grad.mul_(factor)

    def evaluated(self, run: Run, weights: Sequence[Weight]) -> dict[str, Tensor]:
        return {w.name: self.mixture(run, w.name, w.data) for w in self.chosen(weights)}

    # ------------------------------------------------------------------ the shares

    @property
    def needs_steps(self) -> bool:
        return self.learns and self.schedule == "cosine"

    def rate(self, run: Run) -> float:
        if self.schedule == "constant":
            return self.lr
        return self.lr * warmed_cosine((run.index + 1) / (run.steps(self) + 1), self.warmup)

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        if self.learns:
            self.learn(run, self.slopes if self.rows is None else self.hypergradient(run))
        self.slopes = []

    def collector(self, run: Run, value: Value) -> tuple[list[Tensor], Callable[[str, Tensor], None]]:
        """dL/da of all weights, initially zero, and a function (name, dL/dF) that adds to it."""
        sums = {name: [torch.zeros_like(f) for f in factors] for name, factors in self.alphas.items()}

        def take(name: str, gradient: Tensor) -> None:
            if name in sums:
                torch._foreach_add_(sums[name], self.contraction(run, name, gradient, value(name)))

        return flat(sums), take

    def hypergradient(self, run: Run) -> list[Tensor]:
        """dL2/da at the new weights, on the next outer batch."""
        weights, batch, seed = run.weights(), self.draw(run), run.draw_seed("mixup outer", rank=True)
        direct, take = self.collector(run, run.raw)
        with run.showing((w, self.mixture(run, w.name, w.data)) for w in weights if w.name in self.alphas):
            if self.order == "first":
                run.gradient(batch, dropout_seed=seed, take=take)
                return direct
            gradients = run.gradient(batch, dropout_seed=seed)
        for name, gradient in gradients.items():
            take(name, gradient)
        for name, factors in self.alphas.items():  # chain rule: dL2/dF -> dL2/dW
            for factor in factors if name in gradients else []:
                gradients[name].mul_(factor)
        directions = self.follow(run, gradients)
        del gradients

        def inner(by: Tensor) -> list[Tensor]:
            """dL1/da at W + by * q, under the same dropout at every call."""

            def value(name: str) -> Tensor:
                return torch.addcmul(run.raw(name), directions[name], by) if name in directions else run.raw(name)

            def view(name: str) -> Tensor:
                return self.mixture(run, name, value(name)) if name in self.alphas else value(name)

            sums, take = self.collector(run, value)
            with run.showing((w, view(w.name)) for w in weights if w.name in {*self.alphas, *directions}):
                run.gradient(run.batch, dropout_seed=run.draw_seed("mixup inner", rank=True), take=take)
            return sums

        return list(torch._foreach_sub(direct, difference(inner, list(directions.values()))))
