"""The floors of the house: each part of the package imports only from the floors below it (CONTRIBUTING.md)."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "epsanet"

FLOORS = {
    "kernels": 0,
    "network": 1,
    "data": 2,
    "tasks": 3,
    "deploy": 3,
    "insight": 3,
    "study": 4,
    "web": 5,
    "cli": 5,
}
MAY_MEET = {("cli", "web")}  # on one floor, and yet the first may import the second


def part_of(module: str) -> str:
    """The part of the house a dotted module name belongs to; the package itself is ``""``."""
    part = [*module.split("."), ""][1]
    return "cli" if part == "__main__" else part


def imported(source: str, module: str, *, package: bool = False) -> Iterator[str]:
    """Every module of this package that a source text imports, also inside functions and by ``import_module``."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = module.split(".")[: len(module.split(".")) - node.level + package]
                base = ".".join([*above, base]).rstrip(".")
            names = [f"{base}.{alias.name}" for alias in node.names]  # a module of a package, or a name of a module
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            names = [str(node.args[0].value)] if called in {"import_module", "__import__"} else []
        yield from (name for name in names if name.split(".")[0] == "epsanet")


def offence(module: str, target: str) -> str:
    """Why ``module`` may not import ``target``; empty when it may."""
    source, goal = part_of(module), part_of(target)
    if source == goal or goal == "__version__":
        return ""
    if goal.startswith("_"):
        return ""  # below all floors
    if source.startswith("_"):
        return f"{module} is below all floors and imports {target}"
    if source == "":
        return ""  # the package's front door hands out the names of every floor
    if goal == "":
        return f"{module} imports the front door {target}; import from where the name lives"
    for part in (source, goal):
        if part not in FLOORS:
            return f"{part} has no floor; give it one in CONTRIBUTING.md and here"
    if FLOORS[goal] > FLOORS[source]:
        return f"{module} (floor {FLOORS[source]}) imports upwards: {target} (floor {FLOORS[goal]})"
    if FLOORS[goal] == FLOORS[source] and (source, goal) not in MAY_MEET:
        return f"{module} imports its sibling {target}"
    return ""


def modules() -> dict[str, tuple[str, bool]]:
    """Dotted name to source text and whether it is a package's ``__init__``."""
    found = {}
    for path in sorted(SOURCE.rglob("*.py*")):
        if path.suffix not in {".py", ".pyi"}:  # a compiled module is known by its stub
            continue
        parts = ("epsanet", *path.relative_to(SOURCE).with_suffix("").parts)
        package = parts[-1] == "__init__"
        found[".".join(parts[:-1] if package else parts)] = (path.read_text(encoding="utf-8"), package)
    return found


def offences(sources: dict[str, tuple[str, bool]]) -> list[str]:
    return [
        reason
        for module, (source, package) in sources.items()
        for target in imported(source, module, package=package)
        if (reason := offence(module, target))
    ]


def circle(sources: dict[str, tuple[str, bool]]) -> list[str]:
    """Modules that import each other in a circle, at the top of the file or below; empty when there are none."""
    graph: dict[str, set[str]] = {module: set() for module in sources}
    for module, (source, package) in sources.items():
        if module == "epsanet":
            continue  # imports by name, when asked
        for target in imported(source, module, package=package):
            while target not in sources:
                target = target.rpartition(".")[0]
            if target != module:
                graph[module].add(target)
    try:
        list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def test_every_module_imports_only_from_the_floors_below_it() -> None:
    assert offences(modules()) == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle(modules()) == []


def test_every_part_of_the_package_has_a_floor() -> None:
    parts = {part_of(module) for module in modules()} - {""}
    assert {part for part in parts if not part.startswith("_")} <= FLOORS.keys()
    assert {"network", "kernels"} <= parts, "the sources were not found"


def test_the_parser_sees_the_imports_that_are_there() -> None:
    """The rules above would hold for a parser that finds nothing."""
    found = set(imported(*(modules()["epsanet.network.weights"][0], "epsanet.network.weights")))
    assert {"epsanet._files.atomic_file", "epsanet.network.epsanet.EPSANet"} <= found


@pytest.mark.parametrize(
    ("module", "source", "message"),
    [
        ("epsanet.kernels.ops", "from epsanet.network.psa import PSA", "imports upwards"),
        ("epsanet.network.psa", "import epsanet.study.cost", "imports upwards"),
        ("epsanet.network.psa", "def f():\n    from epsanet import cli", "imports upwards"),
        ("epsanet.network.psa", "from ..tasks import train", "imports upwards"),
        ("epsanet.network.psa", "from .. import tasks", "imports upwards"),
        ("epsanet.data.images", "import importlib\nimportlib.import_module('epsanet.web')", "imports upwards"),
        ("epsanet.tasks.train", "from epsanet.deploy import export", "imports its sibling"),
        ("epsanet.insight.cam", "from epsanet.tasks.train import train", "imports its sibling"),
        ("epsanet.web.page", "from epsanet.cli import main", "imports its sibling"),
        ("epsanet.network.psa", "from epsanet import PSA", "has no floor"),
        ("epsanet.network.psa", "import epsanet", "front door"),
        ("epsanet._files", "from epsanet.network import psa", "below all floors"),
        ("epsanet.cli", "import epsanet.gadgets", "gadgets has no floor"),
    ],
)
def test_an_offending_source_is_found(module: str, source: str, message: str) -> None:
    (reason,) = offences({module: (source, False)})
    assert message in reason


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("epsanet.network.weights", "from epsanet._files import atomic_file\nfrom epsanet.network.psa import PSA"),
        ("epsanet.cli", "from epsanet.web.page import serve\nfrom epsanet import __version__"),
        (
            "epsanet.study.cost",
            "from epsanet.tasks.train import train\nfrom epsanet.deploy import export\nimport torch",
        ),
        ("epsanet.network.psa", "import timm\nfrom epsanetlike import cli"),
    ],
)
def test_a_proper_source_is_left_in_peace(module: str, source: str) -> None:
    assert offences({module: (source, False)}) == []


def test_a_circle_is_found() -> None:
    sources = {
        "epsanet.network.a": ("from epsanet.network.b import x", False),
        "epsanet.network.b": ("def f():\n    from . import c", False),
        "epsanet.network.c": ("import epsanet.network.a", False),
        "epsanet.network": ("", True),
        "epsanet": ("", True),
    }
    assert len(circle(sources)) == 4
    sources["epsanet.network.b"] = ("def f():\n    from .c import y", False)
    assert len(circle(sources)) == 4
    sources["epsanet.network.c"] = ("import epsanet", False)
    assert circle(sources) == []
