"""Fine-tune pre-trained language models on small data, steadily."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .methods import METHODS as METHODS
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
    from .fitting.inference_cost import InferenceCost as InferenceCost
    from .fitting.inference_cost import inference_cost as inference_cost
    from .fitting.inspection import Inspected as Inspected
    from .fitting.inspection import inspect_labels as inspect_labels
    from .fitting.probing import Probed as Probed
    from .fitting.probing import probe as probe
    from .methods import *  # noqa: F403
    from .methods.adapters import load_adapters as load_adapters
    from .methods.adapters import save_adapters as save_adapters
    from .methods.levi import load_levi as load_levi
    from .methods.levi import save_levi as save_levi
    from .methods.smart import BregmanProximal as BregmanProximal
    from .searching import LearningCurve as LearningCurve
    from .searching import SearchResult as SearchResult
    from .searching import curve as curve
    from .searching import search as search
    from .searching.estimators import SteadySearchClassifier as SteadySearchClassifier
    from .searching.estimators import SteadySearchRegressor as SteadySearchRegressor
    from .trainer import Trainer as Trainer
    from .vocabulary import CompactVocabulary as CompactVocabulary
    from .vocabulary import compact_vocabulary as compact_vocabulary

# torch and transformers take seconds to import: a name is looked up where it is first used, `--help` never waits
_HOMES = {
    "core": ("Method", "Run", "Step", "Weight", "only"),
    "files.delta": ("apply_delta", "save_delta"),
    "fitting": ("FitResult", "dry_run", "fit"),
    "fitting.estimators": ("SteadyClassifier", "SteadyRegressor"),
    "fitting.fitted_model": ("FittedModel",),
    "fitting.inference_cost": ("InferenceCost", "inference_cost"),
    "fitting.inspection": ("Inspected", "inspect_labels"),
    "fitting.probing": ("Probed", "probe"),
    "methods": tuple(METHODS.classes),
    "methods.adapters": ("load_adapters", "save_adapters"),
    "methods.levi": ("load_levi", "save_levi"),
    "methods.smart": ("BregmanProximal",),
    "searching": ("LearningCurve", "SearchResult", "curve", "search"),
    "searching.estimators": ("SteadySearchClassifier", "SteadySearchRegressor"),
    "trainer": ("Trainer",),
    "vocabulary": ("CompactVocabulary", "compact_vocabulary"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(["METHODS", *_HOME])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f".{_HOME[name]}", __name__), name)
    return value


def __dir__() -> list[str]:
    return __all__
