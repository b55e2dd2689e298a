"""Base of methods that change the output of one block and look at the hidden states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ...core import Method, Run, Step
from ...core.anatomy import blocks
from ...core.checks import check_hidden_states, check_layout, check_lengths
from ...core.step import batch_size
from ...errors import UsageError


class AtBlock(Method):
    """Base of methods that add something to the output of a block, with at least one block above it.

    Subclasses have a field ``block``, counted from 0 at the input, and say in `default` which one None stands for.
    """

    block: int | None

    hidden_states: ClassVar = True
    conflicts: ClassVar[tuple[str, ...]] = ("encoder-decoders", "PEFT's prompt tuning")

    def default(self, count: int) -> int:
        """The block that is changed by default, of ``count`` blocks."""
        raise NotImplementedError

    def setup(self, run: Run) -> None:
        name, model, all_blocks = type(self).__name__, type(run.model).__name__, blocks(run.model)
        check_layout(run.model, name)
        check_lengths(run.model, name)
        check_hidden_states(run.model, name)
        if getattr(getattr(run.model, "config", None), "is_encoder_decoder", False):
            raise ValueError(
                f"{name} needs one stack of blocks, {model} has an encoder and a decoder: use R3F or SMART"
            )
        self.disturbed = self.default(len(all_blocks)) if self.block is None else self.block
        if not 0 <= self.disturbed < len(all_blocks) - 1:
            raise ValueError(
                f"block must leave a block above it: {model} has {len(all_blocks)} blocks, counted from 0, "
                f"got {self.disturbed}"
            )
        if len(all_blocks[self.disturbed]) > 1:
            raise ValueError(
                f"{name} needs blocks that are modules, those of {model} are cut into lists: use R3F or SMART"
            )

    def module(self, step: Step) -> nn.Module:
        """The block whose output is changed."""
        (module,) = blocks(step.run.model)[self.disturbed]
        return module

    def hidden(self, step: Step, outputs: Any) -> list[Tensor]:
        """Hidden states (batch, length, width) of that block and all above, without padding of the model's own.

        Raises:
            UsageError: They do not have one entry for each token.
        """
        states = outputs.get("hidden_states") if isinstance(outputs, Mapping) else None
        batch, length = step.shape
        if states and all(h.dim() == 3 and h.size(0) == batch and h.size(1) >= length for h in states):
            return [h[:, :length] for h in states[self.disturbed + 1 :]]  # the first is the embedding's output
        held = "none of that name" if states is None else f"shapes {', '.join(str(tuple(h.shape)) for h in states)}"
        raise UsageError(
            f"{type(self).__name__} needs 'hidden_states' of shape (batch, length, width), token by token, here "
            f"({batch}, {length}, width), and {type(step.run.model).__name__} gives {held}: use R3F or SMART"
        )

    @staticmethod
    def toward_next(step: Step, hidden: Tensor) -> Tensor:
        """The way from each token to the same position of the next example, zero unless both have a token there.

        Where an example has several texts (multiple choice), the next one's text of the same number is meant.
        """
        texts = len(hidden) // batch_size(step.inputs)
        way = step.unpadded(hidden.roll(texts, 0) - hidden)
        return way if step.real is None else way * step.real.roll(texts, 0).unsqueeze(-1)
