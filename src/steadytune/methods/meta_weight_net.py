"""Meta-Weight-Net: a small network, learned on trusted rows, weighs training rows by their loss.

With l_i the loss of row i, and L2 the loss of outer rows, whose labels are clean or classes balanced:

    L1 = mean of V(l_i) l_i          V(l) = sigmoid(w2 . relu(w1 l + b1) + b2), l a constant in it

    dL2/dV = - mean of V'(l_i) * d/dt l_i(W + t q)  at t = 0          V' the derivative in w1, b1, w2, b2

q is the last step along dL2/dW (`steadytune.hypergradient`): rows whose loss falls along it get more weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..core import Run, Step, Weight, Within
from ..core.facts import Cost, Paper
from ..core.step import full, logits_of, problem_type
from ..hypergradient import check_masters, check_slope, difference
from .bases.bilevel import BiLevel, Outer, flat
from .bases.rows import REPLACED, labels_of, losses_of, row_losses


@dataclass
class MetaWeightNet(BiLevel):
    """Weigh training rows by a function of their loss that makes the loss on trusted rows fall.

    Args:
        outer: Trusted rows: a function that returns batches of them each time it is called; each process gives its own.
            In `steadytune.fit` also a share of the training rows, whose labels must then be good.
        hidden: Number of hidden units of the network.
        lr: Learning rate of the network's own AdamW.
        decay: Weight decay of the network.
        precondition: Whether to differentiate the optimizer's own step. False assumes plain descent.

    It replaces the task's loss: cross entropy of one label per row, squared error of one number, or the mean binary
    cross entropy of several labels. Class weights and label smoothing of the trainer act on the outer rows only. The
    two passes at moved weights are forwards without gradients.

    Departures:
        The network learns after the step of the weights, at the new weights, which saves a pass; the authors take a
        trial step first. The differentiated step is the optimizer's own; theirs is plain descent with any optimizer.

    Raises:
        ValueError: In setup, for a share of rows outside `fit`, or weights below float32; in attach for sharded
            weights, or an optimizer that cannot be preconditioned; at the first batch for labels of tokens.
    """

    outer: Annotated[float, Within("(0, 1)")] | Outer = 0.1
    hidden: Annotated[int, Within("[1, inf)")] = 100
    lr: Annotated[float, Within("(0, inf)")] = 1e-3
    decay: Annotated[float, Within("[0, inf)")] = 0.0
    precondition: bool = True

    full_precision = True
    loss_taken = 1.0
    exclusive: ClassVar = "weighting of rows"
    conflicts: ClassVar[tuple[str, ...]] = (
        "sharded weights (FSDP2)",
        "half precision",
        "labels of tokens",
        REPLACED,
    )
    cost: ClassVar = Cost(passes=8 / 3)
    paper: ClassVar = Paper(
        authors=("Jun Shu", "Qi Xie", "Lixuan Yi", "Qian Zhao", "Sanping Zhou", "Zongben Xu", "Deyu Meng"),
        title="Meta-Weight-Net: Learning an Explicit Mapping For Sample Weighting",
        booktitle="Advances in Neural Information Processing Systems",
        venue="NeurIPS",
        year=2019,
        arxiv="1902.07379",
    )

    def setup(self, run: Run) -> None:
        super().setup(run)
        check_masters([w.data for w in run.weights()])
        self.losses: dict[int, Tensor] = {}  # losses of the rows of each micro-batch of the current step

    def attach(self, run: Run) -> None:
        assert run.optimizer is not None
        if self.precondition:
            check_slope(run.optimizer)
        like, generator, width = next(run.model.parameters()), run.rng(self, "network"), self.hidden**-0.5

        def drawn(bound: float, *shape: int) -> Tensor:
            return like.new_empty(shape).detach().uniform_(-bound, bound, generator=generator)

        first = [drawn(1.0, self.hidden), drawn(1.0, self.hidden)]
        self.begin(run, {"network": [*first, drawn(width, self.hidden), drawn(width)]})

    def penalty(self, step: Step) -> Tensor:
        losses = losses_of(step, self)
        self.losses[step.number] = losses.detach()
        weighted = (row_weights(flat(self.variables), losses.detach()) * losses).mean()
        return weighted - step.as_penalty(step.loss)

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        grads = run.gradient(self.draw(run), dropout_seed=run.draw_seed("network outer", rank=True))
        directions = self.follow(run, grads)
        del grads
        slopes = difference(lambda by: self.losses_at(run, directions, by), list(directions.values()))
        network = [t.detach().requires_grad_() for t in flat(self.variables)]
        with torch.enable_grad():
            pairs = zip(run.kept(self.losses), slopes, strict=True)
            rise = torch.stack([(row_weights(network, losses) * slope).mean() for losses, slope in pairs]).mean()
            gradients = torch.autograd.grad(-rise, network)
        run.all_reduce(gradients)
        self.learn(run, gradients)
        self.losses = {}

    def losses_at(self, run: Run, directions: Mapping[str, Tensor], by: Tensor) -> list[Tensor]:
        """Losses of the rows of each micro-batch at W + by * q, under the same dropout at every call."""
        moving = [w for w in run.weights() if w.name in directions]
        views = ((w, torch.addcmul(w.data, directions[w.name], by)) for w in moving)
        with run.showing(views), run.forked_rng(), torch.no_grad():
            torch.manual_seed(run.draw_seed("network inner", rank=True))
            problem = problem_type(run.model)
            return [
                row_losses(logits_of(run.task(b, run.model)[1], b, self), labels_of(b, self), problem)
                for b in run.batch
            ]


def row_weights(network: Sequence[Tensor], losses: Tensor) -> Tensor:
    """Weights V of rows by their losses: (rows,) -> (rows,), in (0, 1)."""
    w1, b1, w2, b2 = network
    hidden = torch.relu(full(losses).unsqueeze(-1) * w1 + b1)
    return torch.sigmoid(hidden @ w2 + b2)
