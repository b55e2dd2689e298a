"""Procedures: several trainings that give one trained model.

A procedure is called with the setup of all trainings, whose `train` does one of them, and with the job.
"""

from .base import Procedure
from .contrastive import Contrastive
from .dsee import DSEERecipe
from .mixup import MixupBLO
from .self_training import SelfTraining

PROCEDURES: dict[str, type[Procedure]] = {
    "mixup-blo": MixupBLO,
    "contrastive": Contrastive,
    "self-training": SelfTraining,
    "dsee": DSEERecipe,
}
