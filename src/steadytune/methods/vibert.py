"""VIBERT: a variational bottleneck limits the information from the sentence representation to the classifier.

With h the input of the last layer, in training:

    z = h + sigma(h) * N(0, I)         sigma(h) = softplus(A h + a)         logits = last layer of z
    L = task(z) + beta * t / T * mean over examples of  KL(N(h, sigma(h)^2) || N(m, softplus(s)^2))
    evaluation: z = h
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from ..core import Step, Within
from ..core.facts import Cost, Paper
from ..core.step import batch_size, full
from ..functional import gaussian_kl
from .bases.beside_head import Beside, BesideHead


class GaussianBottleneck(Beside):
    """Forward pre-hook that adds Gaussian noise to the input of a layer in training mode.

    Attributes:
        listening: Whether the next draw stores its ``divergence`` from the prior, of shape (rows,) or (rows, length).
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(width, width)), nn.Parameter(torch.zeros(width))
        self.prior_mean, self.prior_spread = nn.Parameter(torch.zeros(width)), nn.Parameter(torch.zeros(width))
        self.listening = False
        self.divergence: Tensor | None = None

    def forward(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if not layer.training:
            return None
        mean, *rest = args
        spread = softplus(linear(mean, self.weight, self.bias))
        if self.listening:
            self.divergence = gaussian_kl(full(mean), full(spread), self.prior_mean, softplus(self.prior_spread))
            self.listening = False
        return (mean + spread * self.draw(mean), *rest)

    def draw(self, mean: Tensor) -> Tensor:
        """Standard normal noise, drawn from torch's random state like dropout."""
        return torch.randn_like(mean)


@dataclass
class VIBERT(BesideHead[GaussianBottleneck]):
    """Train the classifier on noisy sentence representations, and penalise their divergence from a learnt prior.

    Args:
        beta: Weight of the divergence at the end of the training; it rises linearly from 0. The authors add
            1e-5 per epoch for 25 epochs.

    The size of the noise is learnt for each representation; it starts at softplus(0) = 0.69, like that of the prior. If
    the head reads every token (decoders), each token has noise, and the divergence is the mean over them. Evaluation
    has no noise, so the saved model is a plain one with the same predictions. ``beta = 0`` is not plain fine-tuning,
    because the noise stays. Under DistributedDataParallel, methods that take a gradient of the task alone (ROSE,
    Bi-Drop) give the prior no gradient, and need ``find_unused_parameters=True``.

    Departures:
        The mean of the code is the representation itself, with its full width. The authors insert an MLP with a code of
        384 features, which no class of transformers could load; the layer that most encoders have below their last one
        (BERT's pooler) replaces it. There is one draw per example; the authors average over five. The weight of the
        divergence rises with each step, theirs with each epoch.

    Raises:
        ValueError: In setup, for a model without a trainable classification head, or already inside
            DistributedDataParallel.
        RuntimeError: At the first step, for weights in pieces (FSDP2).
    """

    beta: Annotated[float, Within("[0, 1]")] = 2.5e-4

    place: ClassVar = "bottleneck"
    needs_steps = True
    exclusive: ClassVar = "bottleneck"
    conflicts: ClassVar[tuple[str, ...]] = ("models without a classification head", "sharded weights (FSDP2)")
    cost: ClassVar = Cost()
    paper: ClassVar = Paper(
        authors=("Rabeeh Karimi Mahabadi", "Yonatan Belinkov", "James Henderson"),
        title="Variational Information Bottleneck for Effective Low-Resource Fine-Tuning",
        booktitle="International Conference on Learning Representations",
        venue="ICLR",
        year=2021,
        arxiv="2106.05469",
    )

    def build(self, head: nn.Linear) -> GaussianBottleneck:
        return GaussianBottleneck(head.in_features)

    def hook(self, head: nn.Module) -> Any:
        return head.register_forward_pre_hook(self.beside)

    def before_batch(self, step: Step) -> None:
        self.beside.listening = True

    def penalty(self, step: Step) -> Tensor:
        values, self.beside.divergence = self.beside.divergence, None
        assert values is not None  # the task's forward has passed the head
        values = values.unflatten(0, (-1, batch_size(step.inputs))).mean(0)  # over copies
        share = step.index / step.run.steps(self)
        return self.beta * share * step.mean(values if values.dim() == 1 else step.per_example(values))
