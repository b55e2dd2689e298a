"""Hook of the site's builder: pages that stand outside docs/, with links as they are from the site's root."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from properdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
DEMONSTRATION = "examples/demo/CALIBRATION.md"


def on_files(files: Files, config: Any) -> Files:
    """Add the README as the index, and the page of the demonstration."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = text.replace("](docs/", "](")
    elsewhere = r"\[([^\]]+)\]\((?!examples/demo/)(?:examples|benchmarks)/[^)]*\)"  # not on the site: text without link
    text = re.sub(elsewhere, r"\1", text)
    files.append(File.generated(config, "index.md", content=text))
    files.append(File.generated(config, DEMONSTRATION, content=(ROOT / DEMONSTRATION).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Point links that leave docs/ at the pages added above."""
    return markdown.replace("](../examples/", "](examples/")
