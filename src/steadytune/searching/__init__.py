"""Search: which recipe to use for a table, and how sure that is."""

from .by_size import LearningCurve as LearningCurve
from .curve import curve as curve
from .main import SearchPlan as SearchPlan
from .main import SearchResult as SearchResult
from .main import plan_search as plan_search
from .main import search as search
from .words import dropped_words as dropped_words
