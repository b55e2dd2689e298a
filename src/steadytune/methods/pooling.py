"""Pooling: let the head read the mean over tokens, or the first token without a dense layer that was never trained.

h_cls <- LN(mean_t h_t)          one more block of the model's kind, with the weights in `steadytune.heads.pooling`
dense <- nearly the identity     before the first step
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from ..core import Method, Run
from ..core.anatomy import POOLING
from ..core.facts import Paper
from ..heads.features import output_layer
from ..heads.pooling import add_pooling_block, bypass, dense_before, native_pooling, untrained_dense
from ..heads.start import first_batches

How = Literal["mean", "cls"]


@dataclass
class Pooling(Method):
    """Let the head of a BERT-like classifier read the mean over tokens, or the first token without the dense layer.

    Args:
        how: ``"mean"`` adds a block that averages the tokens and makes the dense layer after it
            nearly the identity; ``"cls"`` does the latter only.

    Many checkpoints hold a pooler that was never trained, sentence encoders among them. Fine-tuning then starts from a
    random projection of a token that pre-training never read out. The result loads with AutoModel as any other model;
    its config has one block more. The new weights have no pre-trained value: anchors leave them out, and no block
    counts them. ModernBERT and EuroBERT pool by themselves, so that their config is set instead, and their dense layer
    is bypassed only if it was never trained. The method looks at the rows of the first step: `Run` must be given the
    training rows as ``data``, the Trainer gives them itself.

    Departures:
        The authors average the states and compare the vectors of two texts; here a classifier reads the average, after
        a LayerNorm that stands for their normalisation.

    Raises:
        ValueError: In setup, for a model in which the block does not pool (ALBERT, MPNet, decoders, multiple choice),
            without data, or for ``"cls"`` where no dense layer is before the head, or a block has put the mean into
            the first token.
    """

    how: How = "mean"

    structure: ClassVar = True
    at_setup: ClassVar = "writes"
    conflicts: ClassVar[tuple[str, ...]] = ("PEFT adapters",)
    acts_on_unread = "never"
    paper: ClassVar = Paper(
        authors=("Nils Reimers", "Iryna Gurevych"),
        title="Sentence-BERT: Sentence Embeddings using Siamese BERT-Networks",
        booktitle="Conference on Empirical Methods in Natural Language Processing",
        venue="EMNLP",
        year=2019,
        arxiv="1908.10084",
    )

    def setup(self, run: Run) -> None:
        model: Any = run.model
        if hasattr(model, "peft_config"):
            raise ValueError("Pooling changes the blocks that PEFT has adapted already: apply it before the adapters")
        if run.data is None:
            raise ValueError("Pooling looks at the first training rows: pass Run(..., data=lambda: loader)")
        output_layer(model)  # raises before anything is changed
        native = native_pooling(model, self.how)
        self.written: list[str] = []  # names of the weights that no longer begin as they were drawn
        if native and untrained_dense(model) is None:
            return
        if self.how == "cls" and not native:
            _check_first(model)
        if getattr(model.config, POOLING, None) is not None:
            return  # the checkpoint contains the block
        with run.forked_rng():
            torch.manual_seed(run.draw_seed("data"))
            batches = first_batches(run.data())
        added = add_pooling_block(model, batches) if self.how == "mean" and not native else []
        with contextlib.suppress(ValueError) if native else contextlib.nullcontext():  # ModernBERT's goes on as drawn
            self.written = bypass(model, batches)
        run.mark_new([*added, *self.written])


def _check_first(model: Any) -> None:
    """Raise for a model whose head cannot read the first token without a dense layer."""
    name = type(model).__name__
    if getattr(model.config, POOLING, None) is not None:
        raise ValueError(
            f"Pooling(how='cls') reads the first token, where this {name} has the mean already, by a block of its own: "
            "use pooling='model', or give the checkpoint from before that block"
        )
    if dense_before(model) is None:
        raise ValueError(
            f"Pooling(how='cls') leaves out the dense layer before the head, and a {name} has none: use pooling='model'"
        )
