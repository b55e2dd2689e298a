"""Adapters: train small bottlenecks inside the blocks and leave the pre-trained matrices alone.

Houlsby, Giurgiu, Jastrzebski, Morrone, de Laroussilhe, Gesmundo, Attariyan, Gelly: Parameter-Efficient Transfer
Learning for NLP. ICML 2019, arXiv 1902.00751.

    h <- h + up(gelu(down(h)))          behind attention and behind feed-forward, in every block
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from ..core import Method, Run, whole
from ..core.facts import Paper
from .adapters import insert, is_trained


@dataclass
class Adapters(Method):
    """Put two bottlenecks into every block; train them, the normalisation layers and the head, freeze the rest.

    Args:
        size in [1, inf): features of a bottleneck; the authors try 8 to 256.

    Until they are trained the bottlenecks are the identity. They are not linear, so that no plain model has the same
    outputs: `steadytune.save_adapters` stores what was trained and `steadytune.load_adapters` puts it into the
    pre-trained model. `steadytune.Trainer` writes that file into every folder that it saves, and `fit` and `predict` do
    both. No such folder has a ``config.json``, so that it cannot be read as a model without its adapters. The authors'
    learning rates are 3e-5 to 3e-3. As to activation checkpointing see `TopLayers`.

    Departures:
        ``up`` begins at zero, where the authors draw both matrices from a narrow normal distribution: the outputs at
        the start are those of the pre-trained model, exactly. Bottlenecks come before the dropout of the residual
        branch, not after it.

    Raises:
        ValueError: in setup, for a PEFT model, one that has adapters, or one whose blocks are not known (XLNet).
    """

    size: int = 64

    structure: ClassVar = True
    draws_weights: ClassVar = True
    exclusive: ClassVar = "choice of what is trained"
    conflicts: ClassVar[tuple[str, ...]] = ("PEFT adapters", "`re_init`", "a soup of runs", "`mixout`, `dps_mix`")
    paper: ClassVar = Paper(
        authors=(
            "Neil Houlsby",
            "Andrei Giurgiu",
            "Stanislaw Jastrzebski",
            "Bruna Morrone",
            "Quentin de Laroussilhe",
            "Andrea Gesmundo",
            "Mona Attariyan",
            "Sylvain Gelly",
        ),
        title="Parameter-Efficient Transfer Learning for NLP",
        booktitle="International Conference on Machine Learning",
        venue="ICML",
        year=2019,
        arxiv="1902.00751",
    )

    def __post_init__(self) -> None:
        whole("size", self.size, 1)

    def setup(self, run: Run) -> None:
        run.train_only(self, is_trained)
        with run.forked_rng():
            torch.manual_seed(run.rng(self, "weights").initial_seed())
            run.mark_new(insert(run.model, self.size))
