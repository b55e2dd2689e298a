"""Clipping of the gradient by its norm over all weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from ..core import Method, Run, Weight, Within, gradients
from ..core.facts import Paper


@dataclass
class ClipNorm(Method):
    """Scale all gradients by ``min(1, max_norm / (norm + 1e-6))``, like torch's ``clip_grad_norm_``.

    Its place in the list matters: changes of methods before it are clipped, those of methods after it are not. The
    authors of DPS mask first, then clip.

    Args:
        max_norm: Largest norm that is not clipped; ``inf`` never clips.

    Attributes:
        norm: Norm of the gradient of the last step before clipping, a 0-d tensor.
    """

    max_norm: Annotated[float, Within("(0, inf]")] = 1.0

    null: ClassVar = {"max_norm": inf}
    acts_on_unread = "never"
    scales_only: ClassVar = True
    paper: ClassVar = Paper(
        authors=("Razvan Pascanu", "Tomas Mikolov", "Yoshua Bengio"),
        title="On the difficulty of training recurrent neural networks",
        booktitle="International Conference on Machine Learning",
        venue="ICML",
        year=2013,
        arxiv="1211.5063",
    )

    def setup(self, run: Run) -> None:
        self.norm: Tensor | None = None

    def before_step(self, run: Run, weights: Sequence[Weight]) -> None:
        grads = gradients(weights)
        if not grads:
            return
        self.norm = torch.linalg.vector_norm(torch.stack(run.norms(grads)))
        torch._foreach_mul_(grads, (self.max_norm / (self.norm + 1e-6)).clamp(max=1.0))
