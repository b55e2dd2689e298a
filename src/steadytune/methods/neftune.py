"""NEFTune: train on embeddings with uniform noise.

With L the tokens of an example, padding left out, and d the width of the embedding, in training:

    x <- x + alpha / sqrt(L * d) * u        u ~ U(-1, 1) for each entry of each token
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor, nn

from ..core import Method, Run, Step, Within
from ..core.facts import Paper
from ..core.step import perturbed, width


@dataclass
class NEFTune(Method):
    """Add uniform noise to the token embeddings in training, smaller for longer examples.

    Args:
        alpha: Size of the noise: an example's noise has an L2 norm of about ``alpha / sqrt(3)`` over all its tokens.
            The authors try 5, 10 and 15.

    The noise acts in the task's own forward alone. The further passes of penalties and of other methods have none, and
    neither has evaluation. Where a batch passes as several copies (`RDrop`), each copy has noise of its own. Under
    ``torch.compile`` that forward runs without it. Leave ``neftune_noise_alpha`` of the Trainer's arguments unset: it
    would add noise once more.

    Departures:
        L counts the tokens of each example, and padding gets no noise. The code in the authors' README takes for L the
        length to which the batch is padded, and adds noise to padding too; so does ``neftune_noise_alpha``.

    Raises:
        ValueError: In setup, for a model without a token embedding.
    """

    alpha: Annotated[float, Within("[0, inf)")] = 5.0

    null: ClassVar = {"alpha": 0.0}
    acts_on_unread = "never"
    paper: ClassVar = Paper(
        authors=(
            "Neel Jain", "Ping-yeh Chiang", "Yuxin Wen", "John Kirchenbauer", "Hong-Min Chu", "Gowthami Somepalli",
            "Brian R. Bartoldson", "Bhavya Kailkhura", "Avi Schwarzschild", "Aniruddha Saha", "Micah Goldblum",
            "Jonas Geiping", "Tom Goldstein",
        ),
        title="NEFTune: Noisy Embeddings Improve Instruction Finetuning",
        booktitle="International Conference on Learning Representations",
        venue="ICLR",
        year=2024,
        arxiv="2310.05914",
    )  # fmt: skip

    def setup(self, run: Run) -> None:
        self.embedding = perturbed(run.model)

    def before_batch(self, step: Step) -> Mapping[nn.Module, Tensor] | None:
        if not self.alpha:
            return None
        size = width(self.embedding)
        draws = [step.draw(self, size, "uniform", copy=i) for i in range(step.copies)]
        return {self.embedding: torch.cat([self.scale(step, size) * draw for draw in draws])}

    def scale(self, step: Step, size: int) -> Tensor:
        """Largest entry of the noise of each example, of shape (batch, 1, 1)."""
        return self.alpha / (step.lengths().clamp(min=1).view(-1, 1, 1) * size).sqrt()
