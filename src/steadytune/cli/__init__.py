"""The command line. Commands import what they need inside their functions, so that help appears at once."""

from .common import Config, app
from .fitting import fit
from .reading import inspect, predict, probe
from .searching import curve, search
from .studies import bench, report

from .merging import merge  # isort: skip
from .about import doctor, methods, tasks  # isort: skip

__all__ = [
    "Config", "app", "bench", "curve", "doctor", "fit", "inspect", "main", "merge", "methods", "predict", "probe",
    "report", "search", "tasks",
]  # fmt: skip


def main() -> None:
    """Entry point of the `steadytune` command."""
    app()
