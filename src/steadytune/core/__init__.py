"""The core: a `Run` binds a list of methods to any model, optimizer and training loop.

`Method` is the base class of methods. Its verbs get a `Weight` or a `Step`. `Run` calls them.
"""

from ..fields import Within as Within
from ..fields import check_fields as check_fields
from . import shards as shards
from .method import SCOPES as SCOPES
from .method import VERBS as VERBS
from .method import WEIGHT_VERBS as WEIGHT_VERBS
from .method import Method as Method
from .method import Scope as Scope
from .method import Weight as Weight
from .method import gradients as gradients
from .method import multiply as multiply
from .method import only as only
from .method import overrides as overrides
from .method import select as select
from .run import Run as Run
from .run import bare as bare
from .step import Step as Step
