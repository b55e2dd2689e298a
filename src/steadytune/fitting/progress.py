"""Progress bars in terminals and notebooks, but not in log files."""

from __future__ import annotations

from typing import Any

from tqdm.auto import tqdm


def progress_bar(*args: Any, **options: Any) -> Any:
    """A bar of tqdm, which is silent if stderr is not a terminal (a log file, a pipe)."""
    notebook = "notebook" in tqdm.__mro__[1].__module__  # there is no terminal, and bars are seen
    return tqdm(*args, disable=False if notebook else None, **options)
