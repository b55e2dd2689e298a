"""The methods, written out: the name on the command line and the class."""

from ..core import Method
from .clip_norm import ClipNorm as ClipNorm
from .dps import DPSDense as DPSDense
from .dps import DPSMix as DPSMix
from .ema import EMA as EMA
from .l2sp import L2SP as L2SP
from .mixout import Mixout as Mixout
from .rdrop import RDrop as RDrop

METHODS: dict[str, type[Method]] = {
    "dps_dense": DPSDense,
    "dps_mix": DPSMix,
    "mixout": Mixout,
    "rdrop": RDrop,
    "l2sp": L2SP,
    "clip_norm": ClipNorm,
    "ema": EMA,
}
