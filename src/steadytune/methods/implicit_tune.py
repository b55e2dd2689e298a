"""ImplicitTune: learn the strength of a pull toward the pre-trained weights, or toward zero, on held-out rows.

With one term this is the method of Luketina, Berglund, Greff, Raiko: Scalable Gradient-Based Tuning of Continuous
Regularization Hyperparameters. ICML 2016, arXiv 1511.06727.

    min over b of L2(W*)    with  W* = argmin over W of L1(W) + a / 2 * ||W - W0||^2,    a = exp(b)
    the pull, after each update of the optimizer:      W <- (W + lr * a * W0) / (1 + lr * a)

The mixed derivative of that penalty is known, a (W - W0). With v = dL2/dW, H the Hessian of L1 in W and
t = lr / (1 + lr * a), all at the weights after the pull:

    dL2/db = -a <q, W - W0>        q = t v                                     effect of the last step: exact
                                   q = t * sum of ((I - H S) (1 - a t))^j v    j < terms: effect of the last steps
                                   q = (H P + a)^-1 v                          CG: effect at the end of endless training

S is the derivative of the optimizer's update in its gradient (`steadytune.hypergradient.slope`), which is lr for plain
descent. P is that of all later updates together, in units of lr (`preconditioner`).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from ..core import Run, Scope, Weight, Within
from ..core.facts import Cost, Paper
from ..errors import UsageError
from ..hypergradient import check_masters, check_slope, conjugate_gradient, difference, neumann, preconditioner
from .bases.bilevel import BiLevel, Outer
from .bases.groups import take_decay

logger = logging.getLogger("steadytune")


@dataclass
class ImplicitTune(BiLevel):
    """Learn the strength of a pull toward the pre-trained weights, or of weight decay, on rows held out for it.

    Args:
        outer: Rows that the strengths learn on. In `steadytune.fit`, a share of the training rows, which the weights
            then do not train on. Elsewhere, a function that returns batches each time it is called; each process gives
            its own.
        toward: ``"pretrained"`` values, as `L2SP`, which a new head does not have; or ``"zero"``, as weight decay.
        per: One strength for all weights in scope (``"model"``), one for each transformer block and one for the rest
            (``"block"``), or one for each weight matrix and vector (``"tensor"``).
        start: Initial strength, in units of AdamW's decay (times the learning rate). 0 disables the method.
        least: Smallest strength.
        most: Largest strength.
        terms: Number of terms of the Neumann series, or of iterations of CG. 1 uses the effect of the last step only.
            Each further term (with CG also the first) costs two more passes of the step's batch.
        inverse: ``"neumann"``, or ``"cg"`` for the best strength of an endless training, which a few epochs do not
            approximate.
        precondition: Whether curvature beyond the last step acts through the optimizer's scale of each weight. False
            assumes plain descent, for optimizers of unknown scale.
        lr: Learning rate of the strengths' own AdamW, which moves their logarithms: 0.05 is 5 % a step.
        scope: Which weights are pulled. With ``toward="zero"``, ``"linear"`` leaves biases and norms alone.

    The optimizer's own decay is switched off for pulled weights; this method applies it to all others, also to those
    that are unfrozen on the way. The pull is a proximal step: it is stable at any strength, separate from the
    optimizer's moments, and equal to AdamW's decay up to (lr * a)^2. Entries that a mask holds still count as pulled.
    The strengths are logged at the end, and ``run[ImplicitTune].strengths()`` returns them at any time. Use them for
    `L2SP`, or as weight decay, in a training on all rows.

    Departures:
        The strengths take one step after each step of the weights; the authors train for a while in between. The
        default is one term, through the optimizer's own update; the authors use 5 to 20, through plain descent. H is
        that of the step's batch and of the task's loss alone, by differences instead of second derivatives. There is at
        most one strength per tensor; the authors go down to one per entry.

    Raises:
        ValueError: In setup, for a share of rows outside `fit`, weights below float32 with several terms, or no weight
            to pull; in attach for sharded weights, or an optimizer that cannot be preconditioned.
    """

    outer: Annotated[float, Within("(0, 1)")] | Outer = 0.2
    toward: Literal["pretrained", "zero"] = "pretrained"
    per: Literal["model", "block", "tensor"] = "model"
    start: Annotated[float, Within("[0, inf)")] = 0.1
    least: Annotated[float, Within("(0, inf)")] = 1e-4
    most: Annotated[float, Within("(0, inf)")] = 1e3
    terms: Annotated[int, Within("[1, inf)")] = 1
    inverse: Literal["neumann", "cg"] = "neumann"
    precondition: bool = True
    lr: Annotated[float, Within("(0, inf)")] = 0.05
    scope: Scope = "all"

    decay = 0.0
    eps = 1e-16  # small, because hypergradients are as small as the learning rate
    null: ClassVar = {"start": 0.0}
    exclusive: ClassVar = "anchor"
    conflicts: ClassVar[tuple[str, ...]] = (
        "adapters, unless toward zero",
        "sharded weights (FSDP2)",
        "half precision, with several terms or CG",
    )
    cost: ClassVar = Cost(passes=2.0, held={"": 4})
    paper: ClassVar = Paper(
        authors=("Jonathan Lorraine", "Paul Vicol", "David Duvenaud"),
        title="Optimizing Millions of Hyperparameters by Implicit Differentiation",
        booktitle="International Conference on Artificial Intelligence and Statistics",
        venue="AISTATS",
        year=2020,
        arxiv="1911.02590",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.most > self.least:
            raise UsageError(f"most must exceed least={self.least}, got {self.most}")
        if self.learns and not self.least <= self.start <= self.most:
            raise UsageError(f"start must be 0 or lie in [least, most] = [{self.least}, {self.most}], got {self.start}")

    @property
    def learns(self) -> bool:
        """Whether anything is pulled."""
        return self.start > 0

    @property
    def full_precision(self) -> bool:
        return self.learns and (self.terms > 1 or self.inverse == "cg")

    @property
    def interval(self) -> tuple[float, float]:
        """Smallest and largest logarithm of a strength."""
        return math.log(self.least), math.log(self.most)

    def setup(self, run: Run) -> None:
        super().setup(run)
        self.pulled = {w.name for w in run.require(self, self.scope, reference=self.toward == "pretrained")}
        self.others: dict[str, float] = {}  # decay of weights that are not pulled, from the optimizer
        if self.full_precision:
            check_masters([w.data for w in run.weights()])

    def attach(self, run: Run) -> None:
        if not self.learns:
            return
        assert run.optimizer is not None
        weights = run.weights()
        self.others = {name: held for name, held in take_decay(run).items() if name not in self.pulled}
        if self.full_precision and self.precondition:
            check_slope(run.optimizer)
        like, log = weights[0].data, math.log(self.start)
        dtype = torch.promote_types(like.dtype, torch.float32)
        chosen = [w for w in weights if w.name in self.pulled]
        self.begin(run, {self.key(w): [like.new_full((), log, dtype=dtype)] for w in chosen})

    def key(self, weight: Weight) -> str:
        """Name of the strength that a weight is pulled with."""
        if self.per == "block":
            return "rest" if weight.block is None else f"block {weight.block}"
        return weight.name if self.per == "tensor" else "model"

    def strengths(self) -> dict[str, float]:
        """The strengths as they are now, by name: "model", "block 0" ... and "rest", or the weight's."""
        return {key: float(log.exp()) for key, (log,) in self.variables.items()}

    def finish(self, run: Run) -> None:
        if self.learns and run.rank == 0:
            summary = ", ".join(f"{key} {strength:.3g}" for key, strength in self.strengths().items())
            logger.info("ImplicitTune: strengths %s", summary)

    # ------------------------------------------------------------------ the pull

    def strength(self, weight: Weight) -> Tensor | float:
        """Strength of a weight's pull; outside the scope, its decay."""
        if weight.name in self.pulled:
            return self.variables[self.key(weight)][0].exp()
        return self.others.get(weight.name, 0.0)

    def gap(self, run: Run, weight: Weight) -> Tensor:
        """W - W0; W if the pull is toward zero or the weight is not pulled."""
        if weight.name in self.pulled and self.toward == "pretrained":
            return weight.data - run.reference(weight.name)
        return weight.data

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        if not self.learns:
            return
        moved = [
            w for w in run.weights() if w.grad is not None
        ]  # of all weights, because this method also decays those outside `only`
        for w in moved:
            if w.name in self.pulled or self.others.get(w.name):
                strength = self.strength(w)
                w.data.sub_(self.gap(run, w) * (strength * reach(w, strength)))
        self.learn(run, self.hypergradient(run, moved))

    # ------------------------------------------------------------------ the strengths

    def hypergradient(self, run: Run, moved: Sequence[Weight]) -> list[Tensor]:
        """dL2/db of each strength, on the next outer batch."""
        grads = run.gradient(self.draw(run), dropout_seed=run.draw_seed("tune outer", rank=True))
        weights = [w for w in moved if w.name in grads]
        directions = self.solve(run, weights, [grads[w.name] for w in weights])
        total = {key: torch.zeros_like(log) for key, (log,) in self.variables.items()}
        for w, q in zip(weights, directions, strict=True):
            if w.name in self.pulled:
                key = self.key(w)
                total[key] -= self.strength(w) * (q * self.gap(run, w)).sum(dtype=total[key].dtype)
        return list(total.values())

    def solve(self, run: Run, weights: Sequence[Weight], v: list[Tensor]) -> list[Tensor]:
        """The q of each weight."""
        strengths = [self.strength(w) for w in weights]
        reaches = [reach(w, a) for w, a in zip(weights, strengths, strict=True)]
        if not self.full_precision:
            return times(reaches, v)
        if self.inverse == "neumann":
            slopes = [self.slope(run, w) for w in weights]

            def product(p: Sequence[Tensor]) -> list[Tensor]:
                """Change of p by a step: a t p, and H S of the rest."""
                lost = times(strengths, times(reaches, p))
                rest = torch._foreach_sub(list(p), lost)
                return plus(self.curvature(run, weights, times(slopes, rest)), lost)

            return times(reaches, neumann(product, v, step=1.0, terms=self.terms))

        roots = [self.scale(run, w).sqrt() for w in weights]

        def symmetric(p: Sequence[Tensor]) -> list[Tensor]:
            """(root P H root P + a) p, the same system in p = root P q."""
            return plus(times(roots, self.curvature(run, weights, times(roots, p))), times(strengths, p))

        solution = conjugate_gradient(symmetric, times(roots, v), iterations=self.terms)
        each = zip(solution, roots, v, strengths, strict=True)
        return [torch.where(root > 0, y / root, x / a) for y, root, x, a in each]  # P = 0: only the pull acts

    def scale(self, run: Run, weight: Weight) -> Tensor:
        """P of a weight, broadcastable to it."""
        assert run.optimizer is not None
        diagonal = preconditioner(weight.group, run.optimizer.state[weight.parameter]) if self.precondition else 1.0
        return torch.as_tensor(diagonal).to(weight.data)

    def curvature(self, run: Run, weights: Sequence[Weight], direction: list[Tensor]) -> list[Tensor]:
        """H p of the step's batch, under the same dropout at every call."""

        def gradient(by: Tensor) -> list[Tensor]:
            views = ((w, torch.addcmul(w.data, p, by)) for w, p in zip(weights, direction, strict=True))
            with run.showing(views):
                grads = run.gradient(run.batch, dropout_seed=run.draw_seed("tune inner", rank=True))
            return [grads[w.name] if w.name in grads else torch.zeros_like(w.data) for w in weights]

        return difference(gradient, direction)


def reach(weight: Weight, strength: Tensor | float) -> Tensor | float:
    """Length t of a step of a weight, per gradient."""
    lr = weight.group["lr"]
    return lr / (1 + lr * strength)


def times(factors: Sequence[Tensor | float], tensors: Sequence[Tensor]) -> list[Tensor]:
    """Products of pairs."""
    return [factor * tensor for factor, tensor in zip(factors, tensors, strict=True)]


def plus(a: Sequence[Tensor], b: Sequence[Tensor]) -> list[Tensor]:
    """Sums of pairs."""
    return list(torch._foreach_add(list(a), list(b)))
