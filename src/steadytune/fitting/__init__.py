"""From a table to a fine-tuned model: what `fit` is asked for, its trainings, the folder it writes."""

from .main import FitResult as FitResult
from .main import Plan as Plan
from .main import dry_run as dry_run
from .main import fit as fit
from .main import make_plan as make_plan
