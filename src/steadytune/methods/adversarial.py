"""FGM and PGD: train also on adversarial embeddings.

With x the embeddings of an example, norms over all its tokens, g = d task / dx and s the standard deviation of the
embedding table's entries:

    L = task(x) + weight * task(x + s d)
    FGM      d = epsilon * g / ||g||_2  at x
    PGD      d <- Proj(d + step_size * g / ||g||_2)  onto ||d||_2 <= epsilon, with g at x + s d, from d = 0
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..core import Method, Run, Step, Within, shards
from ..core.facts import Cost, Paper
from ..core.step import perturbed, width


@dataclass
class FGM(Method):
    """Add the task loss at embeddings moved one step along its gradient.

    Args:
        epsilon: L2 norm of an example's perturbation, in standard deviations of the embedding table's
            entries before training; the paper's 5 is 0.28 for all-MiniLM-L6-v2.
        weight: Weight of the adversarial loss.

    Each forward has its own dropout mask. Padding is not perturbed. No ``.grad`` and no weight changes.

    Departures:
        The paper normalises the embeddings to unit variance, which would change pre-trained ones, so we scale the
        perturbation instead. Widely used code perturbs the embedding table itself, by a length of 1.0 for a whole
        batch, and restores it. Here each example has its own perturbation; one of length 1.0 kept all-MiniLM-L6-v2 at
        chance (500 rows of SST-2, one seed).

    Raises:
        ValueError: In setup, for a model without a token embedding.
        RuntimeError: At the first step, for weights in pieces (FSDP2).
    """

    epsilon: Annotated[float, Within("[0, inf)")] = 5.0
    weight: Annotated[float, Within("[0, inf)")] = 1.0

    null: ClassVar = {"weight": 0.0}
    conflicts: ClassVar[tuple[str, ...]] = ("sharded weights (FSDP2)",)
    cost: ClassVar = Cost(passes=8 / 3)
    paper: ClassVar = Paper(
        authors=("Takeru Miyato", "Andrew M. Dai", "Ian Goodfellow"),
        title="Adversarial Training Methods for Semi-Supervised Text Classification",
        booktitle="International Conference on Learning Representations",
        venue="ICLR",
        year=2017,
        arxiv="1605.07725",
    )

    def setup(self, run: Run) -> None:
        self.embedding = perturbed(run.model)
        table = shards.whole(self.embedding.get_parameter("weight").detach())
        self.unit = table.to(torch.promote_types(table.dtype, torch.float32)).std()  # s

    def penalty(self, step: Step) -> Tensor | None:
        if not self.weight:
            return None
        outputs = step.forward(add={self.embedding: self.unit * self.attack(step)})
        return self.weight * step.as_penalty(step.task_loss(outputs))

    def attack(self, step: Step) -> Tensor:
        """The perturbation d, of shape (batch, length, width)."""
        return self.epsilon * self.direction(step, step.zeros(width(self.embedding)))

    def direction(self, step: Step, noise: Tensor) -> Tensor:
        """Gradient of the task loss at embeddings perturbed by d, of L2 norm 1 per example."""
        noise = self.unit * noise
        gradient = step.unpadded(step.gradient(self.embedding, noise, step.task_loss, dropout="fresh"))
        return gradient / norms(gradient).clamp(min=torch.finfo(gradient.dtype).tiny)

    def state_dict(self) -> dict[str, Any]:
        return {"unit": self.unit}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.unit = state["unit"]


@dataclass
class PGD(FGM):
    """Add the task loss at embeddings moved several steps along its gradient, within a ball.

    Args:
        epsilon: Radius of the ball: L2 norm of an example's perturbation, in the unit of `FGM`.
        step_size: L2 norm of one step, in the same unit.
        steps: Number of ascent steps.

    Every forward has its own dropout draw. Padding is never perturbed, no ``.grad`` or weight is touched on the way.

    Departures:
        The ball is an L2 ball for each example, in the embeddings, and the ascent starts at its centre. The paper has
        an L-infinity ball in the pixels and a random start, and trains on the perturbed examples alone.

    Raises:
        ValueError: In setup, for a model without a token embedding.
        RuntimeError: At the first step, for weights in pieces (FSDP2).
    """

    step_size: Annotated[float, Within("[0, inf)")] = 1.5
    steps: Annotated[int, Within("[0, inf)")] = 3

    cost: ClassVar = Cost(passes=4.0)
    paper: ClassVar = Paper(
        authors=("Aleksander Madry", "Aleksandar Makelov", "Ludwig Schmidt", "Dimitris Tsipras", "Adrian Vladu"),
        title="Towards Deep Learning Models Resistant to Adversarial Attacks",
        booktitle="International Conference on Learning Representations",
        venue="ICLR",
        year=2018,
        arxiv="1706.06083",
    )

    def attack(self, step: Step) -> Tensor:
        noise = step.zeros(width(self.embedding))
        for _ in range(self.steps):
            moved = noise + self.step_size * self.direction(step, noise)
            noise = moved * (self.epsilon / norms(moved).clamp(min=torch.finfo(moved.dtype).tiny)).clamp(max=1)
        return noise


def norms(values: Tensor) -> Tensor:
    """L2 norm of each example, over its tokens."""
    return torch.linalg.vector_norm(values, dim=(1, 2), keepdim=True)
