"""Fine-tune pre-trained language models on small data, steadily."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .core import Method as Method
    from .core import Run as Run
    from .core import Step as Step
    from .core import Weight as Weight
    from .core import only as only
    from .files.delta import apply_delta as apply_delta
    from .files.delta import save_delta as save_delta
    from .fitting import FitResult as FitResult
    from .fitting import dry_run as dry_run
    from .fitting import fit as fit
    from .fitting.estimators import SteadyClassifier as SteadyClassifier
    from .fitting.estimators import SteadyRegressor as SteadyRegressor
    from .fitting.fitted_model import FittedModel as FittedModel
    from .methods import EMA as EMA
    from .methods import FGM as FGM
    from .methods import L2SP as L2SP
    from .methods import LLRD as LLRD
    from .methods import LNSR as LNSR
    from .methods import METHODS as METHODS
    from .methods import PGD as PGD
    from .methods import R3F as R3F
    from .methods import R4F as R4F
    from .methods import SIFT as SIFT
    from .methods import SMART as SMART
    from .methods import SWA as SWA
    from .methods import VIBERT as VIBERT
    from .methods import Adapters as Adapters
    from .methods import BiDrop as BiDrop
    from .methods import BitFit as BitFit
    from .methods import BregmanProximal as BregmanProximal
    from .methods import ChildTuningD as ChildTuningD
    from .methods import ChildTuningF as ChildTuningF
    from .methods import ClipNorm as ClipNorm
    from .methods import DPSDense as DPSDense
    from .methods import DPSMix as DPSMix
    from .methods import EasyAdapt as EasyAdapt
    from .methods import Extrapolation as Extrapolation
    from .methods import HeadInit as HeadInit
    from .methods import HypergradientLR as HypergradientLR
    from .methods import ImplicitTune as ImplicitTune
    from .methods import MetaWeightNet as MetaWeightNet
    from .methods import Mixout as Mixout
    from .methods import Pooling as Pooling
    from .methods import RDrop as RDrop
    from .methods import RecAdam as RecAdam
    from .methods import ReInit as ReInit
    from .methods import ROSEEnsemble as ROSEEnsemble
    from .methods import ROSEFirst as ROSEFirst
    from .methods import ROSESecond as ROSESecond
    from .methods import TopLayers as TopLayers
    from .methods import WeightMixup as WeightMixup
    from .methods.adapters import load_adapters as load_adapters
    from .methods.adapters import save_adapters as save_adapters
    from .trainer import Trainer as Trainer

# torch and transformers take seconds to import: a name is looked up where it is first used, `--help` never waits
_HOMES = {
    "core": ("Method", "Run", "Step", "Weight", "only"),
    "files.delta": ("apply_delta", "save_delta"),
    "fitting": ("FitResult", "dry_run", "fit"),
    "fitting.estimators": ("SteadyClassifier", "SteadyRegressor"),
    "fitting.fitted_model": ("FittedModel",),
    "methods": (
        "EMA",
        "L2SP",
        "METHODS",
        "SIFT",
        "SWA",
        "VIBERT",
        "Adapters",
        "BiDrop",
        "BitFit",
        "ChildTuningD",
        "ChildTuningF",
        "FGM",
        "LLRD",
        "LNSR",
        "PGD",
        "R3F",
        "R4F",
        "SMART",
        "BregmanProximal",
        "ClipNorm",
        "DPSDense",
        "DPSMix",
        "EasyAdapt",
        "Extrapolation",
        "HeadInit",
        "HypergradientLR",
        "ImplicitTune",
        "MetaWeightNet",
        "Mixout",
        "Pooling",
        "RDrop",
        "ReInit",
        "RecAdam",
        "ROSEEnsemble",
        "ROSEFirst",
        "ROSESecond",
        "TopLayers",
        "WeightMixup",
    ),
    "methods.adapters": ("load_adapters", "save_adapters"),
    "trainer": ("Trainer",),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return __all__
