"""FGM, PGD and FreeLB: train also on adversarial embeddings.

With x the embeddings of an example, norms over all its tokens, g = d task / dx and s the standard deviation of the
embedding table's entries, times the factor by which models such as Gemma scale them:

    L = task(x) + weight * task(x + s d)
    FGM      d = epsilon * g / ||g||_2  at x
    PGD      d <- Proj(d + step_size * g / ||g||_2)  onto ||d||_2 <= epsilon, with g at x + s d, from d = 0
    FreeLB   the mean of task(x + s d) over all d on the way of PGD, from d = epsilon / sqrt(L * width) * U(-1, 1),
             L the number of tokens of the example
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from ..core import Method, Run, Step, Within
from ..core.facts import Cost, Paper
from ..core.step import Dropout, perturbed, width
from ..vocabulary import whole_table


@dataclass
class FGM(Method):
    """Add the task loss at embeddings moved one step along its gradient.

    Args:
        epsilon: L2 norm of an example's perturbation, in standard deviations of the embedding table's
            entries before training, as the model scales them; the paper's 5 is 0.28 for all-MiniLM-L6-v2.
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
    acts_on_unread = "never"
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
        table = whole_table(self.embedding)
        unit = table.to(torch.promote_types(table.dtype, torch.float32)).std()  # s
        scale = getattr(self.embedding, "embed_scale", 1.0)  # of models that multiply the table's rows, such as Gemma
        self.unit = (unit * float(scale)).to(self.embedding.get_parameter("weight").device)

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
        gradient = step.gradient(self.embedding, self.unit * noise, step.task_loss, dropout="fresh")
        return normalised(step.unpadded(gradient))

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
            noise = self.move(noise, self.direction(step, noise))
        return noise

    def move(self, noise: Tensor, direction: Tensor) -> Tensor:
        """One step of ascent, back into the ball."""
        moved = noise + self.step_size * direction
        return moved * (self.epsilon / norms(moved).clamp(min=torch.finfo(moved.dtype).tiny)).clamp(max=1)


@dataclass
class FreeLB(PGD):
    """Add the mean of the task losses at all perturbations of `PGD`; each forward also gives the next perturbation.

    Args:
        epsilon: Radius of the ball, in the unit of `FGM`. The ascent starts at a random point of about
            ``epsilon / sqrt(3)`` from its centre.
        steps: Number of perturbations, each of which the weights are trained on; the paper has 2 or 3.

    Each forward to the weights is also the one whose gradient gives the next perturbation. All of them have the dropout
    draw of the task's own forward, as in the paper; beside `RDrop` each has its own. Padding is never perturbed. The
    activations of all ``steps`` forwards are in memory at once, because the loop sends their losses back together.

    Departures:
        The loss of the clean inputs stays beside the mean; the authors train on the perturbed inputs alone, the first
        of which are the clean ones in some of their settings. Lengths are in standard deviations of the embedding
        table, as for `FGM`; the authors' are absolute. They send each loss back as it is computed, which holds the
        activations of one forward only.

    Raises:
        ValueError: In setup, for a model without a token embedding.
        RuntimeError: At the first step, for weights in pieces (FSDP2).
    """

    steps: Annotated[int, Within("[1, inf)")] = 2

    cost: ClassVar = Cost(passes=10 / 3)
    paper: ClassVar = Paper(
        authors=("Chen Zhu", "Yu Cheng", "Zhe Gan", "Siqi Sun", "Tom Goldstein", "Jingjing Liu"),
        title="FreeLB: Enhanced Adversarial Training for Natural Language Understanding",
        booktitle="International Conference on Learning Representations",
        venue="ICLR",
        year=2020,
        arxiv="1909.11764",
    )

    def penalty(self, step: Step) -> Tensor | None:
        if not self.weight:
            return None
        dropout: Dropout = "fresh" if step.copies > 1 else "same"  # the loss of one copy of several is not known
        noise, losses = self.start(step), []
        for left in reversed(range(self.steps)):
            shift = (self.unit * noise).requires_grad_()
            loss = step.task_loss(step.forward(dropout=dropout, add={self.embedding: shift}))
            losses.append(loss)
            if left:
                slope = step.slope(loss, shift, dropout=dropout, keep=True)
                noise = self.move(noise, normalised(step.unpadded(slope)))
        return self.weight * step.as_penalty(torch.stack(losses).mean())

    def start(self, step: Step) -> Tensor:
        """The first perturbation: uniform, smaller for longer examples."""
        size = width(self.embedding)
        entries = step.lengths().clamp(min=1).view(-1, 1, 1) * size
        return self.epsilon / entries.sqrt() * step.draw(self, size, "uniform")


def normalised(values: Tensor) -> Tensor:
    """Values of each example divided by their L2 norm; zeros stay."""
    return values / norms(values).clamp(min=torch.finfo(values.dtype).tiny)


def norms(values: Tensor) -> Tensor:
    """L2 norm of each example, over its tokens."""
    return torch.linalg.vector_norm(values, dim=(1, 2), keepdim=True)
