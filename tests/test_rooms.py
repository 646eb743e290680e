"""The rooms of the library: imports go only down, in no circle, and docs/layout.md names every room."""

import ast
import importlib
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from vaalign_lib.store import PACKAGE, ROOT

ORDER = (  # what stands lower knows nothing of what stands higher, rooms of one line nothing of each other
    ("reproduce",),
    ("experiments",),
    ("training", "figures"),
    ("rewards", "policies"),
    ("theory", "models", "trainers"),
    ("data", "papers", "profiles", "jobs"),
    ("statistics", "store"),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}


def modules(package: Path) -> dict[str, Path]:
    """Return the library's modules by name, packages by their own."""
    return {
        ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__"): path
        for path in sorted(package.rglob("*.py"))
    }


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yield what a module imports of the library, at its top or inside of functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in known else str(node.module) for name in deeper]
        yield from (name for name in names if name in known)


def room(module: str) -> str:
    return module.split(".")[1]


def upward(package: Path) -> list[str]:
    """Return every import of a room that stands as high or higher."""
    known = modules(package)
    return [
        f"{name} imports {other}"
        for name, path in known.items()
        if "." in name
        for other in imported(path, known)
        if "." in other and room(other) != room(name) and RANK[room(other)] <= RANK[room(name)]
    ]


def circle(package: Path) -> list[str]:
    """Return modules that import each other in a circle, if there are any."""
    known = modules(package)
    graph = {name: set(imported(path, known)) - {name} for name, path in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_imports_go_only_down():
    assert not upward(PACKAGE)


def test_no_circle():
    assert not circle(PACKAGE)


def test_every_room_has_its_place_in_the_order_and_in_the_layout():
    rooms = {room(name) for name in modules(PACKAGE) if "." in name}
    assert rooms == set(RANK)
    layout = ROOT.joinpath("docs", "layout.md").read_text(encoding="utf-8")
    named = {found for line in layout.splitlines() for found in re.findall(r"^\| `vaalign_lib/(\w+)", line)}
    assert named == rooms


@pytest.mark.parametrize(
    ("files", "found"),
    [
        ({"store.py": "from vaalign_lib.jobs import run"}, "vaalign_lib.store imports vaalign_lib.jobs"),
        ({"rewards/a.py": "def f():\n    import vaalign_lib.policies.b"}, "vaalign_lib.rewards.a imports"),
    ],
)
def test_an_arrow_upward_is_found(tmp_path, files, found):
    package = tmp_path / "vaalign_lib"
    for name in ("__init__.py", "jobs.py", "policies/__init__.py", "policies/b.py"):
        package.joinpath(name).parent.mkdir(parents=True, exist_ok=True)
        package.joinpath(name).write_text("run = 1\n")
    for name, text in files.items():
        package.joinpath(name).parent.mkdir(exist_ok=True)
        package.joinpath(name).write_text(text)
    assert any(found in line for line in upward(package))


def test_a_circle_is_found(tmp_path):
    package = tmp_path / "vaalign_lib"
    package.mkdir()
    package.joinpath("__init__.py").touch()
    package.joinpath("one.py").write_text("from vaalign_lib.two import x")
    package.joinpath("two.py").write_text("def f():\n    from vaalign_lib import one")
    assert {"vaalign_lib.one", "vaalign_lib.two"} <= set(circle(package))


@pytest.mark.parametrize("path", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_what_benchmarks_import_is_there(path):
    """They run by hand only, so nothing else would notice a name that has moved."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vaalign_lib"):
            home = importlib.import_module(str(node.module))
            assert [one.name for one in node.names if not hasattr(home, one.name)] == []
