"""From a table to a fine-tuned model: the plan of a fit, its trainings, and its folder."""

from .main import dry_run as dry_run
from .main import fit as fit
from .plan import Plan as Plan
from .plan import make_plan as make_plan
from .record import FitResult as FitResult
