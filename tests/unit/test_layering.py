"""Imports point down. `make check` runs this file too."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "distmerge"

LAYERS = (
    ("__main__",),
    ("cli",),
    ("presentation", "__init__"),
    ("pipeline",),
    ("publishing",),
    ("choice", "coefficients", "verification"),
    ("card",),
    ("passes", "report", "inspection", "evaluation"),
    ("jobs",),
    ("tasks",),
    ("assembly", "engine", "statistic", "page", "report_spectra"),
    ("gram", "stream", "page_spectra"),
    ("attempt", "manifest"),
    ("output", "trend", "command", "plots", "writer", "licences"),
    ("journal", "meeting"),
    ("assignment", "budget"),
    ("planner", "dist", "methods"),
    ("rules", "monitor"),
    ("task_rules",),
    ("sources",),
    ("schedules", "resolved", "scoring"),
    ("sweep",),
    ("config", "selection", "publication"),
    ("trajectory",),
    ("reference", "parameters", "mergers"),
    ("document", "layout", "storage", "markdown", "markup", "matrices", "places"),
    ("log", "launchers"),
    ("spec", "errors", "collector", "threads", "version"),
)
"""From the top. A module imports from layers below its own; a package is one entry here."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> list[str]:
    paths = sorted(PACKAGE.rglob("*.py"))
    return [".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in paths]


@cache
def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module.replace('.', '/')}.py").read_text())


def imports(source: ast.Module) -> Iterator[str]:
    """All that `source` imports, anywhere in it, as dotted names with what is taken from them."""
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def ours(module: str) -> list[str]:
    """The modules of distmerge that `module` imports."""
    known = set(modules())
    found: list[str] = []
    for name in imports(tree(module)):
        root, _, rest = name.partition(".")
        if root != "distmerge":
            continue
        parts = rest.split(".") if rest else []
        longest = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
        target = next((t for m in longest for t in (m, f"{m}.__init__") if t in known), "__init__")
        found.append(target)
    return found


def reachable(module: str) -> set[str]:
    seen, waiting = {module}, [module]
    while waiting:
        new = set(ours(waiting.pop())) - seen
        seen |= new
        waiting += new
    return seen


def entry(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def test_the_reader_of_imports_sees_every_form() -> None:
    source = "import a.b\nfrom c import d as e\ndef f():\n  from g.h import i, j\n  import k as l"
    assert list(imports(ast.parse(source))) == ["a.b", "c.d", "g.h.i", "g.h.j", "k"]
    assert "sources.resolve" in ours("rules")
    assert "__init__" in ours("cli")
    assert "output" in ours("pipeline")
    assert "sources.header" in reachable("cli")


def test_every_module_has_a_layer() -> None:
    assert sorted({entry(module) for module in modules()}) == sorted(LEVEL)


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module: str) -> None:
    for target in ours(module):
        same_package = "." in module and entry(target) == entry(module)
        assert same_package or LEVEL[entry(target)] > LEVEL[entry(module)], target


def test_no_import_runs_in_a_circle() -> None:
    graph = {module: ours(module) for module in modules()}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize("module", [m for m in modules() if entry(m) == "methods"])
def test_methods_know_tensors_and_nothing_of_ours_but_errors(module: str) -> None:
    for name in imports(tree(module)):
        root = name.split(".")[0]
        allowed = root in ("torch", "numpy") or root in sys.stdlib_module_names
        assert allowed or name.startswith(("distmerge.errors.", "distmerge.methods.")), name
        assert not name.startswith("torch.distributed"), name


@pytest.mark.parametrize("module", [m for m in modules() if entry(m) == "sources"])
def test_reading_and_writing_know_neither_methods_nor_ranks(module: str) -> None:
    assert not {entry(m) for m in reachable(module)} & {
        "methods",
        "dist",
        "meeting",
        "monitor",
        "engine",
    }


@pytest.mark.parametrize("module", modules())
def test_torch_distributed_is_behind_dist_and_monitor(module: str) -> None:
    names = [name for name in imports(tree(module)) if name.startswith("torch.distributed")]
    uses = [
        node
        for node in ast.walk(tree(module))
        if isinstance(node, ast.Attribute) and node.attr == "distributed"
    ]
    if module == "cli":
        assert names == ["torch.distributed.elastic.multiprocessing.errors.record"]
    elif module not in ("dist", "meeting", "monitor"):
        assert names + uses == []


def test_planning_needs_no_torch() -> None:
    for module in sorted(reachable("planner")):
        assert not [n for n in imports(tree(module)) if n.split(".")[0] == "torch"], module


@pytest.mark.parametrize("module", [m for m in modules() if m != "cli"])
def test_only_the_command_line_prints(module: str) -> None:
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("print", "click.echo")
        elif isinstance(node, ast.Attribute):
            assert ast.unparse(node) != "sys.stdout"
