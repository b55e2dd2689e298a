"""Tables of labelled text: reading, checking, splitting and scoring them. No torch here."""

from ..errors import UsageError as UsageError
from .files import read_rows as read_rows
from .files import read_table as read_table
from .labels import find_problem as find_problem
from .metrics import Metric as Metric
from .prepare import Data as Data
from .prepare import prepare as prepare
from .problem import Classification as Classification
from .problem import MultiLabel as MultiLabel
from .problem import Problem as Problem
from .problem import Regression as Regression
from .splits import folds as folds
from .splits import split as split
from .splits import subset as subset
from .tables import Kind as Kind
from .tables import Table as Table
from .tables import examples as examples
from .tables import resolve as resolve
