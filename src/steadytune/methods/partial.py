"""Methods that train a part of the model: its top blocks or its biases.

TopLayers   embeddings and lower blocks are frozen
BitFit      in each y = W x + b of the body, W is frozen
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from ..core import Method, Run, Within
from ..core.anatomy import Part, anatomy, blocks, depths
from ..core.facts import Paper

CHOICE = "choice of what is trained"


@dataclass
class TopLayers(Method):
    """Train the top blocks and the layers above them; freeze the embeddings and the blocks below.

    Args:
        blocks: Number of blocks to train, from the top; 0 trains the head, the pooler and the last norm.

    Only trained weights have gradients and optimizer state, and the backward pass ends at the lowest of them. With
    activation checkpointing, set ``use_reentrant=False``: torch's re-entrant kind gives no gradients above frozen
    embeddings.

    Departures:
        The default is three blocks, a quarter of a base-sized model; the authors try every number.

    Raises:
        ValueError: In setup, if the model is a PEFT model or has fewer blocks.
    """

    blocks: Annotated[int, Within("[0, inf)")] = 3

    structure: ClassVar = True
    exclusive: ClassVar = CHOICE
    conflicts: ClassVar[tuple[str, ...]] = ("PEFT adapters", "`re_init` of blocks below")
    paper: ClassVar = Paper(
        authors=("Jaejun Lee", "Raphael Tang", "Jimmy Lin"),
        title="What Would Elsa Do? Freezing Layers During Transformer Fine-Tuning",
        booktitle="arXiv preprint",
        venue="arXiv",
        year=2019,
        arxiv="1911.03090",
    )

    def setup(self, run: Run) -> None:
        count, depth = len(blocks(run.model)), depths(run.model)
        if self.blocks > count or not count:
            name = type(run.model).__name__
            raise ValueError(f"blocks must be at most {count}, as many as {name} has, got {self.blocks}")
        run.train_only(self, lambda name, part: depth[name] >= count - self.blocks)


@dataclass
class BitFit(Method):
    """Train the biases and the head; freeze everything else.

    Args:
        norms: Whether to train the biases of normalisation layers too, as the authors do.

    The authors' learning rates are 10 to 100 times those of full fine-tuning (1e-4 to 1e-3). For activation
    checkpointing see `TopLayers`.

    Raises:
        ValueError: In setup, if the model is a PEFT model or its body has no biases (Llama, T5).
    """

    norms: bool = True

    structure: ClassVar = True
    exclusive: ClassVar = CHOICE
    conflicts: ClassVar[tuple[str, ...]] = ("PEFT adapters", "`re_init`", "models without biases")
    paper: ClassVar = Paper(
        authors=("Ben Zaken, Elad", "Shauli Ravfogel", "Yoav Goldberg"),
        title="BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models",
        booktitle="Proceedings of the Annual Meeting of the Association for Computational Linguistics",
        venue="ACL",
        year=2022,
        arxiv="2106.10199",
    )

    def setup(self, run: Run) -> None:
        parts = anatomy(run.model)
        if not any(self.is_bias(name, part) for name, part in parts.items() if not part.head):
            raise ValueError(
                f"BitFit trains biases, and the body of {type(run.model).__name__} has none: use TopLayers, Adapters "
                "or LoRA"
            )
        run.train_only(self, lambda name, part: part.head or self.is_bias(name, part))

    def is_bias(self, name: str, part: Part) -> bool:
        """Whether a weight is a bias to train; XLNet's have names such as ``r_w_bias``."""
        return name.endswith("bias") and (self.norms or part.kind != "norm")
