"""ReInit: draw the top blocks anew before fine-tuning.

W of pooler and top n blocks <- as the model's own initialiser draws it         before the first step
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

LOADED = "_is_hf_initialized"  # on a loaded tensor, transformers 5 leaves it alone whatever `_init_weights` asks for


@dataclass
class ReInit(Method):
    """Draw the top blocks and the pooler anew, as before pre-training: the most specialised layers start afresh.

    Args:
        blocks: How many, from the top; the authors try 1 to 6, one block must stay.
        pooler: The pooler too, where the body has one (BERT, ALBERT).

    Each weight is drawn as the model's own initialiser does, by the methods' seed. From then on these weights have no
    pre-trained value: anchors leave them out as they do a new head. Run the method on the pre-trained model, also when
    a training is resumed: the trained weights are loaded afterwards.

    Departures:
        One block by default; the authors choose the number for each task. They write of BERT, whose initialiser draws
        matrices from N(0, initializer_range^2), with biases zero and norms one.

    Raises:
        ValueError: In setup, for a model that is not transformers', has too few blocks (ALBERT's share their weights
            and are one), or whose top blocks are frozen (PEFT); in attach, if a method after it froze them.
    """

    blocks: Annotated[int, Within("[0, inf)")] = 1
    pooler: bool = True

    structure: ClassVar = True
    draws_weights: ClassVar = True
    null: ClassVar = {"blocks": 0, "pooler": False}
    conflicts: ClassVar[tuple[str, ...]] = ("PEFT adapters", "a method that freezes these blocks", "a soup of runs")
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
        """The modules to be drawn anew."""
        found, name = blocks(model), type(model).__name__
        if not any(isinstance(m, PreTrainedModel) for m in model.modules()):
            raise ValueError(f"ReInit needs a transformers model, which knows how to draw its weights, got {name}")
        if self.blocks and self.blocks >= len(found):
            raise ValueError(
                f"blocks must leave one that is pre-trained: {name} has {len(found)} (blocks that share weights are "
                f"one), got {self.blocks}"
            )
        top = [module for block in found[len(found) - self.blocks :] for module in block]
        return top + (poolers(model) if self.pooler else [])

    def checksums(self, run: Run) -> dict[str, str]:
        """Of the weights drawn, as they are now."""
        return {name: checksum(shards.whole(run.model.get_parameter(name).detach())) for name in self.names}

    def check_trained(self, run: Run) -> None:
        """Raise for weights that would be drawn and never trained."""
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
    """The pre-trained poolers: a new head's is drawn already."""
    parts = {id(model.get_parameter(name)): part for name, part in anatomy(model).items()}
    found = [module for path, module in model.named_modules() if path.rpartition(".")[2] == "pooler"]
    return [m for m in found if all(not parts[id(p)].head and parts[id(p)].block is None for p in m.parameters())]


@torch.no_grad()
def draw(model: nn.Module, module: nn.Module) -> None:
    """Let the model that ``module`` is part of draw its weights, children first."""
    owners = [
        m for m in model.modules() if isinstance(m, PreTrainedModel) and any(part is module for part in m.modules())
    ]
    loaded = [p for p in module.parameters() if getattr(p, LOADED, False)]
    for p in loaded:
        setattr(p, LOADED, False)
    module.apply(owners[-1]._init_weights)
    for p in loaded:
        setattr(p, LOADED, True)
