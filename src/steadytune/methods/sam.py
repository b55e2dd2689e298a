"""SAM: use the gradient at the nearby weights of largest loss, which leads to flat minima.

With g the gradient of the step's whole loss at W, over all weights that the method acts on:

    e = rho * g / ||g||_2                 ascent to the surface of a ball of radius rho
    W <- optimizer(W, gradient of the same loss at W + e)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch

from ..core import Method, Run, Weight, Within, gradients
from ..core.facts import Cost, Paper


@dataclass
class SAM(Method):
    """Take the gradient of each step at weights moved uphill by a fixed distance.

    Args:
        rho: L2 norm of the move over all weights together.

    The batch passes the model twice. The second pass has the dropout draws, the penalties and the loss of the first,
    and the weights are put back bit for bit before the optimizer moves them. During that pass the step holds a copy of
    the weights and a second gradient: 8 more bytes for each float32 weight. The gradient is that of what `Run.loss`
    returned, times the numbers with which the loop sent it back; a loop gives further terms of its loss through
    ``run.loss(batch, compute=...)``, because those it adds afterwards are lost. A loop that accumulates must divide
    each loss by the number of micro-batches, or weigh the losses so that the weights sum to 1. Clip with `ClipNorm` in
    the list: what a loop clips before ``optimizer.step()`` is the gradient of the first pass alone. Bahri, Mobahi and
    Tay (ACL 2022, arXiv 2110.08529) apply the method to language models and find the largest gains on little training
    data.

    Departures:
        The move is taken from the gradient of the whole batch, over all micro-batches and processes; the authors take
        one on each device from its own part. For language models the move is taken from a quarter of the batch, which
        saves time there; here the training loop has already computed the gradient of the whole batch. Where other
        methods show the forward other weights (Mixout), the move starts from those.
    """

    rho: Annotated[float, Within("[0, inf)")] = 0.05

    null: ClassVar = {"rho": 0.0}
    acts_on_unread = "never"
    cost: ClassVar = Cost(passes=2.0)
    paper: ClassVar = Paper(
        authors=("Pierre Foret", "Ariel Kleiner", "Hossein Mobahi", "Behnam Neyshabur"),
        title="Sharpness-Aware Minimization for Efficiently Improving Generalization",
        booktitle="International Conference on Learning Representations",
        venue="ICLR",
        year=2021,
        arxiv="2010.01412",
    )

    def after_backward(self, run: Run, weights: Sequence[Weight]) -> None:
        grads = gradients(weights)
        if not self.rho or not grads:
            return
        norm = torch.linalg.vector_norm(torch.stack(run.norms(grads)))
        scale = self.rho / norm.clamp(min=torch.finfo(norm.dtype).tiny)
        run.look_again((w, g * scale) for w, g in zip(weights, grads, strict=True))
