"""Fine-tune pre-trained language models on small data, steadily."""

from typing import TYPE_CHECKING, Any

from .core import Method as Method
from .core import Run as Run
from .core import Step as Step
from .core import Weight as Weight
from .core import only as only
from .methods import EMA as EMA
from .methods import L2SP as L2SP
from .methods import METHODS as METHODS
from .methods import ClipNorm as ClipNorm
from .methods import DPSDense as DPSDense
from .methods import DPSMix as DPSMix
from .methods import Mixout as Mixout
from .methods import RDrop as RDrop

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    if name == "Trainer":  # transformers is slow to import: only where it is used
        from .trainer import Trainer

        return Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
