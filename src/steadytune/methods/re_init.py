"""ReInit: reset the top blocks to random values before fine-tuning.

W of pooler and top n blocks <- a draw of the model's own initialiser           before the first step
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel

from ..core import Method, Run, Within, shards
from ..core.anatomy import anatomy, blocks
from ..core.facts import Paper
from ..core.tensors import checksum

LOADED = "_is_hf_initialized"  # with this flag on a tensor, `_init_weights` of transformers 5 does not change it


@dataclass
class ReInit(Method):
    """Reset the top blocks and the pooler, the layers most specialised in pre-training, to random values.

    Args:
        blocks: Number of blocks to reset, from the top; the authors try 1 to 6. One block must stay.
        pooler: Whether to reset the pooler too, if the body has one (BERT, ALBERT).

    The model's own initialiser draws each weight, with the methods' seed. These weights then have no pre-trained value:
    anchors leave them out like a new head. `Pooling` bypasses the pooler after the draw, wherever it is in the list.
    Build the `Run` on the pre-trained model, also to resume a training, and load the trained weights afterwards.

    Departures:
        The default is one block; the authors choose the number for each task. Their model is BERT, whose initialiser
        draws matrices from N(0, initializer_range^2) and sets biases to zero and norms to one.

    Raises:
        ValueError: In setup, if the model is not a transformers model, has too few blocks (those of ALBERT share
            weights and count as one), or has frozen top blocks (PEFT). In attach, if another method has frozen them.
    """

    blocks: Annotated[int, Within("[0, inf)")] = 1
    pooler: bool = True

    structure: ClassVar = True
    at_setup: ClassVar = "draws"
    draws_weights: ClassVar = True
    null: ClassVar = {"blocks": 0, "pooler": False}
    conflicts: ClassVar[tuple[str, ...]] = ("PEFT adapters", "a method that freezes these blocks", "a soup of runs")
    acts_on_unread = "never"
    paper: ClassVar = Paper(
        authors=("Tianyi Zhang", "Felix Wu", "Arzoo Katiyar", "Kilian Q. Weinberger", "Yoav Artzi"),
        title="Revisiting Few-sample BERT Fine-tuning",
        booktitle="International Conference on Learning Representations",
        venue="ICLR",
        year=2021,
        arxiv="2006.05987",
    )

    def setup(self, run: Run) -> None:
        modules = self.chosen(run.model)
        drawn = {id(p) for module in modules for p in module.parameters()}
        self.names = [name for name, p in run.model.named_parameters() if id(p) in drawn]
        self.check_trained(run)
        self.before = self.checksums(run)
        with run.forked_rng():
            torch.manual_seed(run.rng(self, "weights").initial_seed())
            for module in modules:
                draw(run.model, module)
        if self.names and self.checksums(run) == self.before:
            raise ValueError(f"ReInit changed nothing: the initialiser of {type(run.model).__name__} draws no weights")
        run.mark_new(self.names)

    def attach(self, run: Run) -> None:
        self.check_trained(run)

    def chosen(self, model: nn.Module) -> list[nn.Module]:
        """Modules to reset."""
        stack, name = blocks(model), type(model).__name__
        if not any(isinstance(m, PreTrainedModel) for m in model.modules()):
            raise ValueError(f"ReInit needs a transformers model, which knows how to draw its weights, got {name}")
        if self.blocks and self.blocks >= len(stack):
            raise ValueError(
                f"blocks must leave one that is pre-trained: {name} has {len(stack)} (blocks that share weights are "
                f"one), got {self.blocks}"
            )
        top = [module for block in stack[len(stack) - self.blocks :] for module in block]
        return top + (poolers(model) if self.pooler else [])

    def checksums(self, run: Run) -> dict[str, str]:
        """Checksums of the weights that were reset, with their present values."""
        return {name: checksum(shards.whole(run.model.get_parameter(name).detach())) for name in self.names}

    def check_trained(self, run: Run) -> None:
        """Raise if weights would be reset and never trained."""
        frozen = [name for name in self.names if not run.model.get_parameter(name).requires_grad]
        if frozen:
            raise ValueError(
                f"ReInit draws {frozen[0]!r} anew, but it is frozen (by another method or by PEFT) and would stay as "
                "drawn: leave ReInit out, or train these blocks"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["before"] != self.before:
            raise ValueError(
                "ReInit has drawn anew the top blocks of another model than the one the run started with, such as its "
                "own checkpoint: build Run on the pre-trained model, then load the checkpoint's weights"
            )


def poolers(model: nn.Module) -> list[nn.Module]:
    """Pre-trained poolers; that of a new head is random already."""
    parts = {id(model.get_parameter(name)): part for name, part in anatomy(model).items()}
    named = [module for path, module in model.named_modules() if path.rpartition(".")[2] == "pooler"]
    return [m for m in named if all(not parts[id(p)].head and parts[id(p)].block is None for p in m.parameters())]


@torch.no_grad()
def draw(model: nn.Module, module: nn.Module) -> None:
    """Let the model initialise the weights of one of its modules, children first."""
    owners = [
        m for m in model.modules() if isinstance(m, PreTrainedModel) and any(part is module for part in m.modules())
    ]
    loaded = [p for p in module.parameters() if getattr(p, LOADED, False)]
    for p in loaded:
        setattr(p, LOADED, False)
    module.apply(owners[-1]._init_weights)
    for p in loaded:
        setattr(p, LOADED, True)
