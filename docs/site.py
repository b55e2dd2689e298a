"""Hook of the site's builder: the first page is the README, with links as they stand from docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from properdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent


def on_files(files: Files, config: Any) -> Files:
    """Add the README as the index."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = text.replace("](docs/", "](")
    text = re.sub(r"\[([^\]]+)\]\((?!http|#)(?:examples|benchmarks)/[^)]*\)", r"\1", text)  # no part of the site
    files.append(File.generated(config, "index.md", content=text))
    return files
