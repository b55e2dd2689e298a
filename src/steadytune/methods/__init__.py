"""The methods by name. Each is one line here: its name, the file that it is in, and its class.

Another package adds methods by the entry-point group ``steadytune.methods``. They then work by name wherever these do
(`steadytune.fit`, the command line, studies):

    [project.entry-points."steadytune.methods"]
    my_method = "my_package.my_file:MyMethod"

No torch here until a method is looked up.
"""

from typing import TYPE_CHECKING, Any

from .registry import Registry

METHODS = Registry(
    {
        "pooling": "pooling:Pooling",
        "head_init": "head_init:HeadInit",
        "re_init": "re_init:ReInit",
        "top_layers": "partial:TopLayers",
        "bitfit": "partial:BitFit",
        "adapters": "adapters:Adapters",
        "levi": "levi:LEVI",
        "mask_training": "mask_training:MaskTraining",
        "llrd": "llrd:LLRD",
        "dps_dense": "dps:DPSDense",
        "dps_mix": "dps:DPSMix",
        "child_tuning_f": "child_tuning:ChildTuningF",
        "child_tuning_d": "child_tuning:ChildTuningD",
        "rose_first": "rose:ROSEFirst",
        "rose_second": "rose:ROSESecond",
        "rose_ensemble": "rose:ROSEEnsemble",
        "bi_drop": "bi_drop:BiDrop",
        "sift": "sift:SIFT",
        "mixout": "mixout:Mixout",
        "rdrop": "rdrop:RDrop",
        "smart": "smart:SMART",
        "r3f": "r3f:R3F",
        "r4f": "r3f:R4F",
        "lnsr": "lnsr:LNSR",
        "fgm": "adversarial:FGM",
        "pgd": "adversarial:PGD",
        "freelb": "adversarial:FreeLB",
        "sam": "sam:SAM",
        "awp": "awp:AWP",
        "neftune": "neftune:NEFTune",
        "tmix": "tmix:TMix",
        "supcon": "supcon:SupCon",
        "layer_drop": "layer_drop:LayerDrop",
        "vibert": "vibert:VIBERT",
        "easy_adapt": "easy_adapt:EasyAdapt",
        "causal_head": "causal_head:CausalHead",
        "weight_mixup": "weight_mixup:WeightMixup",
        "meta_semi": "meta_semi:MetaSemi",
        "meta_weight_net": "meta_weight_net:MetaWeightNet",
        "group_weights": "group_weights:GroupWeights",
        "l2sp": "l2sp:L2SP",
        "recadam": "recadam:RecAdam",
        "implicit_tune": "implicit_tune:ImplicitTune",
        "extrapolation": "extrapolation:Extrapolation",
        "hypergradient_lr": "hypergradient_lr:HypergradientLR",
        "clip_norm": "clip_norm:ClipNorm",
        "ema": "ema:EMA",
        "swa": "ema:SWA",
        "lawa": "lawa:LAWA",
    }
)

# For type checkers, written by `python -m steadytune.methods.catalogue`
# begin: classes
if TYPE_CHECKING:
    from .adapters import Adapters as Adapters
    from .adversarial import FGM as FGM
    from .adversarial import PGD as PGD
    from .adversarial import FreeLB as FreeLB
    from .awp import AWP as AWP
    from .bi_drop import BiDrop as BiDrop
    from .causal_head import CausalHead as CausalHead
    from .child_tuning import ChildTuningD as ChildTuningD
    from .child_tuning import ChildTuningF as ChildTuningF
    from .clip_norm import ClipNorm as ClipNorm
    from .dps import DPSDense as DPSDense
    from .dps import DPSMix as DPSMix
    from .easy_adapt import EasyAdapt as EasyAdapt
    from .ema import EMA as EMA
    from .ema import SWA as SWA
    from .extrapolation import Extrapolation as Extrapolation
    from .group_weights import GroupWeights as GroupWeights
    from .head_init import HeadInit as HeadInit
    from .hypergradient_lr import HypergradientLR as HypergradientLR
    from .implicit_tune import ImplicitTune as ImplicitTune
    from .l2sp import L2SP as L2SP
    from .lawa import LAWA as LAWA
    from .layer_drop import LayerDrop as LayerDrop
    from .levi import LEVI as LEVI
    from .llrd import LLRD as LLRD
    from .lnsr import LNSR as LNSR
    from .mask_training import MaskTraining as MaskTraining
    from .meta_semi import MetaSemi as MetaSemi
    from .meta_weight_net import MetaWeightNet as MetaWeightNet
    from .mixout import Mixout as Mixout
    from .neftune import NEFTune as NEFTune
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
    from .sam import SAM as SAM
    from .sift import SIFT as SIFT
    from .smart import SMART as SMART
    from .supcon import SupCon as SupCon
    from .tmix import TMix as TMix
    from .vibert import VIBERT as VIBERT
    from .weight_mixup import WeightMixup as WeightMixup
# end: classes


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in METHODS.classes:
            return METHODS[METHODS.classes[name]]
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return ["METHODS", *METHODS.classes]
