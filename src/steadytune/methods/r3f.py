"""R3F and R4F: penalise changes of the predictions under random noise on the embeddings.

L = task + weight * mean over examples of  KL(f(x) || f(x + z)) + KL(f(x + z) || f(x))
z ~ U(-scale, scale)  or  N(0, scale^2)
R4F: the last layer has spectral norm 1:  W <- W / ||W||_2  before training and after every step
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from ..core import Method, Run, Step, Weight, Within, shards
from ..core.facts import Cost, Paper
from ..core.step import full, perturbed, width
from ..functional import jeffreys

PAPER = Paper(
    authors=(
        "Armen Aghajanyan", "Akshat Shrivastava", "Anchit Gupta", "Naman Goyal", "Luke Zettlemoyer", "Sonal Gupta",
    ),
    title="Better Fine-Tuning by Reducing Representational Collapse",
    booktitle="International Conference on Learning Representations",
    venue="ICLR",
    year=2021,
    arxiv="2008.03156",
)  # fmt: skip


@dataclass
class R3F(Method):
    """Pass the batch once more with random noise on the embeddings and add the symmetric KL divergence.

    Args:
        weight: Weight of the divergence; the paper's lambda.
        scale: Half the width of uniform noise; standard deviation of normal noise.
        noise: Distribution of the noise.
        detach_embedding: Whether the noisy pass sends no gradient into the embeddings, as in the authors' code.
        dropout: Dropout of the noisy pass: a fresh draw, or the draw of the task's own forward.

    At the authors' scale of 1e-5 the noise changes predictions very little; with dropout, most of the divergence is
    that between two dropout draws. For smoothness in the embeddings raise ``scale``; with ``dropout="same"`` the
    divergence is due to the noise alone. Padding gets no noise. Regression (one output) uses the mean squared
    difference. Tokens count if they have a label. A warning tells if the noise is below the resolution of the model's
    dtype.

    Departures:
        The noisy pass sends its gradient into the embeddings too; ``detach_embedding=True`` is the authors' code.
        Regression is regularised; in the authors' code it is not. Noise is drawn and added in float32.
    """

    weight: Annotated[float, Within("[0, inf)")] = 1.0
    scale: Annotated[float, Within("[0, inf)")] = 1e-5
    noise: Literal["uniform", "normal"] = "uniform"
    detach_embedding: bool = False
    dropout: Literal["same", "fresh"] = "fresh"

    null: ClassVar[dict[str, Any] | None] = {"weight": 0.0}
    acts_on_unread = "never"
    cost: ClassVar = Cost(passes=2.0)
    paper: ClassVar = PAPER

    def setup(self, run: Run) -> None:
        self.embedding = perturbed(run.model)
        self.checked = False

    def penalty(self, step: Step) -> Tensor | None:
        if not self.weight:
            return None
        if not self.checked:
            self.check_resolution(step)
        noisy = step.forward(dropout=self.dropout, add={self.embedding: self.draw(step)}, detach=self.detach_embedding)
        clean = step.logits(step.outputs, self)
        return self.weight * step.disagreement(clean, step.logits(noisy, self), jeffreys)

    def draw(self, step: Step) -> Tensor:
        """z, of shape (batch, length, width)."""
        return self.scale * step.draw(self, width(self.embedding), self.noise)

    def check_resolution(self, step: Step) -> None:
        """Warn if the noise rounds to nothing in the dtype of the weights or of autocast."""
        table: Any = self.embedding.weight
        device = table.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else table.dtype
        least = torch.finfo(dtype).eps * float(full(shards.whole(table.detach())).square().mean().sqrt())
        if self.scale < least:
            warnings.warn(
                f"{type(self).__name__}: noise of scale {self.scale:g} is below the resolution of {dtype} at the size "
                f"of this model's embeddings and rounds to nothing: use a scale above {least:.1g}, or float32",
                stacklevel=2,
            )
        self.checked = True


@dataclass
class R4F(R3F):
    """R3F with a last layer of spectral norm 1, so that the head cannot amplify changes of the features.

    Args:
        weight: Weight of the divergence. The head is normalised even at 0.

    Departures:
        Those of R3F. The last layer is projected after each step, so that the weights themselves have spectral norm 1
        and a checkpoint is a plain model; the authors train an unnormalised weight and divide it in each forward.

    Raises:
        ValueError: In setup, for a model without a trainable classification head.
    """

    null: ClassVar[dict[str, Any] | None] = None  # the head is normalised at any weight
    at_setup: ClassVar = "scales"

    def setup(self, run: Run) -> None:
        super().setup(run)
        heads = [w for w in run.weights(self) if w.head and w.kind == "linear"]
        if not heads:
            raise ValueError(
                "R4F normalises the last layer of a classification head, but this model has no trainable one: use R3F"
            )
        self.head = heads[-1].name
        self.normalise(heads[-1])

    def after_step(self, run: Run, weights: Sequence[Weight]) -> None:
        for w in weights:
            if w.name == self.head:
                self.normalise(w)

    def normalise(self, weight: Weight) -> None:
        """``W <- W / ||W||_2``, in place."""
        whole = shards.whole(weight.parameter.detach())
        norm = torch.linalg.matrix_norm(full(whole), ord=2)
        weight.data.div_(norm.clamp(min=torch.finfo(whole.dtype).tiny).to(whole.dtype))  # zeros stay
