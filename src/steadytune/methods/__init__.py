"""The methods, written out: the name on the command line and the class."""

from ..core import Method
from .adapters import Adapters as Adapters
from .adversarial import FGM as FGM
from .adversarial import PGD as PGD
from .bi_drop import BiDrop as BiDrop
from .child_tuning import ChildTuningD as ChildTuningD
from .child_tuning import ChildTuningF as ChildTuningF
from .clip_norm import ClipNorm as ClipNorm
from .dps import DPSDense as DPSDense
from .dps import DPSMix as DPSMix
from .easy_adapt import EasyAdapt as EasyAdapt
from .ema import EMA as EMA
from .ema import SWA as SWA
from .extrapolation import Extrapolation as Extrapolation
from .head_init import HeadInit as HeadInit
from .hypergradient_lr import HypergradientLR as HypergradientLR
from .implicit_tune import ImplicitTune as ImplicitTune
from .l2sp import L2SP as L2SP
from .llrd import LLRD as LLRD
from .lnsr import LNSR as LNSR
from .meta_weight_net import MetaWeightNet as MetaWeightNet
from .mixout import Mixout as Mixout
from .partial import BitFit as BitFit
from .partial import TopLayers as TopLayers
from .pooling import Pooling as Pooling
from .r3f import R3F as R3F
from .r3f import R4F as R4F
from .rdrop import RDrop as RDrop
from .re_init import ReInit as ReInit
from .recadam import RecAdam as RecAdam
from .rose import ROSEEnsemble as ROSEEnsemble
from .rose import ROSEFirst as ROSEFirst
from .rose import ROSESecond as ROSESecond
from .sift import SIFT as SIFT
from .smart import SMART as SMART
from .smart import BregmanProximal as BregmanProximal
from .vibert import VIBERT as VIBERT
from .weight_mixup import WeightMixup as WeightMixup

METHODS: dict[str, type[Method]] = {
    "pooling": Pooling,
    "head_init": HeadInit,
    "re_init": ReInit,
    "top_layers": TopLayers,
    "bitfit": BitFit,
    "adapters": Adapters,
    "llrd": LLRD,
    "dps_dense": DPSDense,
    "dps_mix": DPSMix,
    "child_tuning_f": ChildTuningF,
    "child_tuning_d": ChildTuningD,
    "rose_first": ROSEFirst,
    "rose_second": ROSESecond,
    "rose_ensemble": ROSEEnsemble,
    "bi_drop": BiDrop,
    "sift": SIFT,
    "mixout": Mixout,
    "rdrop": RDrop,
    "smart": SMART,
    "r3f": R3F,
    "r4f": R4F,
    "lnsr": LNSR,
    "fgm": FGM,
    "pgd": PGD,
    "vibert": VIBERT,
    "easy_adapt": EasyAdapt,
    "weight_mixup": WeightMixup,
    "meta_weight_net": MetaWeightNet,
    "l2sp": L2SP,
    "recadam": RecAdam,
    "implicit_tune": ImplicitTune,
    "extrapolation": Extrapolation,
    "hypergradient_lr": HypergradientLR,
    "clip_norm": ClipNorm,
    "ema": EMA,
    "swa": SWA,
}
