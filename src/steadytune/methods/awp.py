"""AWP: use the gradient at weights that are moved uphill, each tensor in proportion to its own norm.

With g the gradient of the step's whole loss at W, for each weight tensor W_l:

    e_l = gamma * ||W_l||_2 * g_l / ||g_l||_2
    W <- optimizer(W, gradient of the same loss at W + e)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from ..core import Method, Run, Scope, Weight, Within, select
from ..core.facts import Cost, Paper


@dataclass
class AWP(Method):
    """Take the gradient of each step at weights moved uphill, each tensor by a share of its own norm.

    Args:
        gamma: L2 norm of the move of a tensor as a share of the tensor's norm.
        scope: Which weights are moved. All weights get the gradient found there.

    `SAM` moves all weights together by one fixed distance, which goes mostly to the tensors with large gradients. Here
    every tensor moves by the same share. A tensor of zeros stays. The second pass has the dropout draws, the penalties
    and the loss of the first, which must be what `Run.loss` returned, times a number, as with `SAM`: further terms go
    through ``run.loss(batch, compute=...)``. The paper also perturbs the inputs: put `PGD` or `FGM` into the list,
    whose perturbed loss is part of the loss that the weights climb. Clip with `ClipNorm` in the list, as with `SAM`.

    Departures:
        The paper perturbs the inputs, then the weights on the perturbed inputs alone; here the loss of the clean inputs
        counts too. The input perturbation of the second pass is found anew at the moved weights. The authors move the
        weights by one step of an optimizer with a learning rate of its own and rescale the result; for one step this is
        the move above. Their gamma of 0.005 is for images that are trained on from scratch. With it all-MiniLM-L6-v2
        stayed at chance on 500 rows of SST-2 and of QNLI (three seeds each), with 0.0005 on QNLI (one seed).
    """

    gamma: Annotated[float, Within("[0, inf)")] = 1e-4
    scope: Scope = "linear"

    null: ClassVar = {"gamma": 0.0}
    acts_on_unread = "in scope"
    cost: ClassVar = Cost(passes=2.0)
    paper: ClassVar = Paper(
        authors=("Dongxian Wu", "Shu-Tao Xia", "Yisen Wang"),
        title="Adversarial Weight Perturbation Helps Robust Generalization",
        booktitle="Advances in Neural Information Processing Systems",
        venue="NeurIPS",
        year=2020,
        arxiv="2004.05884",
    )

    def setup(self, run: Run) -> None:
        run.require(self, self.scope)

    def after_backward(self, run: Run, weights: Sequence[Weight]) -> None:
        moved = select(weights, self.scope)
        if not self.gamma or not moved:
            return
        slopes = [w.grad for w in moved if w.grad is not None]
        sizes, norms = run.norms([w.data for w in moved]), run.norms(slopes)
        scales = [self.gamma * s / n.clamp(min=torch.finfo(n.dtype).tiny) for s, n in zip(sizes, norms, strict=True)]
        run.look_again((w, g * scale) for w, g, scale in zip(moved, slopes, scales, strict=True))
