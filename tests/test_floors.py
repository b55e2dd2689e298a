"""The architecture, as imports: a module only imports from lower floors, and light modules stay light."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import steadytune

SRC = Path(steadytune.__file__).parent
FLOORS = {
    "functional": 0,
    "hypergradient": 0,
    "anatomy": 0,
    "checks": 0,
    "shards": 0,
    "state": 0,
    "reading": 0,
    "facts": 0,
    "card": 0,
    "merge": 0,
    "bench": 0,
    "bench.stats": 0,
    "bench.document": 0,
    "bench.figures": 0,
    "bench.records": 1,
    "bench.tables": 2,
    "bench.report": 3,
    "method": 1,
    "step": 1,
    "views": 1,
    "data": 1,
    "tasks": 1,
    "recipe": 4,
    "output": 2,
    "guards": 2,
    "modelling": 3,
    "core": 2,
    "delta": 2,
    "adapters": 2,
    "masks": 2,
    "heads": 2,
    "bilevel": 2,
    "methods": 3,
    "trainer": 4,
    "procedures": 4,
    "catalogue": 4,
    "config": 5,
    "doctor": 5,
    "merging": 8,
    "training": 5,
    "fitted": 6,
    "estimate": 6,
    "fitting": 7,
    "bench.pool": 0,
    "bench.store": 3,
    "bench.spec": 6,
    "bench.run": 8,
    "bench.study": 9,
    "estimators": 8,
    "cli": 10,
}
# On one floor, one way only.
SIDEWAYS = {
    ("views", "method"),
    ("tasks", "data"),
    ("masks", "core"),
    ("heads", "core"),
    ("adapters", "delta"),
    ("bilevel", "core"),
    ("recipe", "procedures"),
}
NO_TORCH = (
    "reading",
    "guards",
    "facts",
    "config",
    "doctor",
    "merging",
    "data",
    "tasks",
    "recipe",
    "output",
    "card",
    "fitting",
    "cli",
    "bench/pool",
    "bench/run",
    "bench/spec",
    "bench/stats",
    "bench/store",
    "bench/study",
    "bench/document",
    "bench/figures",
    "bench/records",
    "bench/tables",
    "bench/report",
    "__init__",
)


def modules() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


def room(path: Path) -> str:
    """The module, or the folder it is in; in ``bench`` each module has a floor of its own."""
    return named(path.relative_to(SRC).with_suffix("").parts)


def named(parts: tuple[str, ...]) -> str:
    return ".".join(parts[:2]) if ".".join(parts[:2]) in FLOORS else parts[0]


def imported(path: Path) -> set[str]:
    """Rooms of the package that a file imports when it runs (what only type checkers see does not count)."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in typing_only:
            continue
        base = path.relative_to(SRC).parts[: -node.level] if node.level else None
        if base is None:
            if (node.module or "").split(".")[0] == "steadytune":
                parts = tuple((node.module or "").split(".")[1:])
                found |= {named((*parts, alias.name)) for alias in node.names} if parts else {"__init__"}
            continue
        parts = (*base, *(node.module or "").split(".")) if node.module else base
        found |= {named((*parts, alias.name)) for alias in node.names}
    return found


def test_every_module_has_a_floor():
    assert {room(p) for p in modules()} == {*FLOORS, "__init__"}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_down(path):
    here = room(path)
    if here == "__init__":
        return
    for other in imported(path) - {here, "__version__"}:
        assert FLOORS[other] < FLOORS[here] or (here, other) in SIDEWAYS, f"{here} imports {other}"


@pytest.mark.parametrize("path", [p for p in modules() if room(p) == "methods"], ids=lambda p: p.stem)
def test_methods_import_no_other_method(path):
    names = {p.stem for p in modules() if room(p) == "methods"} - {"__init__"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and path.stem != "__init__" and node.level == 1:
            assert (node.module or "") not in names


@pytest.mark.parametrize("name", NO_TORCH)
def test_light_modules_do_not_import_torch(name):
    tree = ast.parse((SRC / f"{name}.py").read_text())
    for node in tree.body:
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not {"torch", "transformers"} & {n.split(".")[0] for n in names}
