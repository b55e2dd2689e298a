"""The most memory that was held: of the accelerator, if there is one, else of this process."""

from __future__ import annotations

import os
import re
import resource
import sys
from pathlib import Path


def reset_peak() -> None:
    """Start measuring anew, where the system allows it: the runs of a worker follow each other in one process."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_memory() -> int:
    """Most bytes held since `reset_peak`, or since the start of the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")  # heeds a reset, which `getrusage` does not
    match = re.search(r"VmHWM:\s*(\d+) kB", status.read_text(encoding="ascii")) if status.is_file() else None
    if match is not None:
        return 1024 * int(match[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
