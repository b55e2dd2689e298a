"""What the last layer of a head reads, kept from the next forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


class HeadInput:
    """Keeps the input of a layer from the first forward after `listen`, graph alive.

    Args:
        layer: The layer.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.handle: RemovableHandle | None = None
        self.kept: Tensor | None = None

    def listen(self) -> None:
        """Wait for the next forward."""
        self.stop()
        self.kept = None
        self.handle = self.layer.register_forward_pre_hook(self.take)

    def take(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        """The hook: it acts once."""
        self.kept = args[0]
        self.stop()

    def stop(self) -> None:
        """Wait no longer."""
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def pop(self) -> Tensor | None:
        """What was kept, which is then forgotten; None if the layer was not called through its hooks."""
        kept, self.kept = self.kept, None
        return kept
