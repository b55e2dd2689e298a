"""Progress bars where somebody watches: terminals and notebooks, and no log files."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm


def progress_bar(*args: Any, **options: Any) -> Any:
    """A bar of tqdm; where stderr is no terminal (a log file, a pipe) it stays silent."""
    notebook = "notebook" in tqdm.__mro__[1].__module__  # there is no terminal, and bars are seen
    return tqdm(*args, disable=False if notebook else None, **options)
