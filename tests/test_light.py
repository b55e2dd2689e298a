"""Modules for help, data errors and reports load neither torch nor pydantic, so that they respond at once."""

from __future__ import annotations

import subprocess
import sys

import pytest

LIGHT = (
    "steadytune",
    "steadytune.cli",
    "steadytune.config",
    "steadytune.data.guards",
    "steadytune.doctor",
    "steadytune.files.atomic",
    "steadytune.fitting",
    "steadytune.fitting.card",
    "steadytune.fitting.merge_folders",
    "steadytune.fitting.report_page",
    "steadytune.pages.document",
    "steadytune.pages.drawing",
    "steadytune.tasks",
    "steadytune.bench.report",
    "steadytune.bench.run",
    "steadytune.bench.study",
    "steadytune.searching.race",
    "steadytune.searching.row_scores",
)


@pytest.mark.parametrize("name", LIGHT)
def test_light_modules_import_nothing_heavy(name):
    code = f"import sys, {name}; print(sorted({{'torch', 'transformers', 'pydantic'}} & sys.modules.keys()))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_every_public_name_is_found_where_it_lives():
    import steadytune

    for name in steadytune.__all__:
        assert getattr(steadytune, name) is not None, name
