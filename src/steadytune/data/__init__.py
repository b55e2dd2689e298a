"""Tables of labelled text: reading, checking, splitting and scoring them. No torch here."""

from ..errors import UsageError as UsageError
from .files import read_source as read_source
from .files import read_table as read_table
from .metrics import score as score
from .prepare import Data as Data
from .prepare import prepare as prepare
from .splits import folds as folds
from .splits import split as split
from .splits import subset as subset
from .tables import Kind as Kind
from .tables import Table as Table
from .tables import Target as Target
from .tables import examples as examples
from .tables import resolve as resolve
from .targets import encode as encode
from .targets import find_target as find_target
