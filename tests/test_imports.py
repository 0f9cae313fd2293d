"""Rooms import downwards, and no module imports itself by way of others."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "elasticore"

ROOMS: tuple[tuple[str, ...], ...] = (
    ("serving", "testing"),
    ("models",),
    ("router",),
    ("call", "operator", "choice", "preconditions"),
    ("backends",),
    ("attention",),
    ("plan",),
    ("patterns", "pages"),
    ("layout",),
    (
        "errors",
        "checks",
        "machine",
        "memo",
        "places",
        "processes",
        "registry",
        "assets",
        "requirements",
    ),
)
"""Modules and packages of elasticore, the top first: each imports from its own room and below.

A room that is not listed is looked at only where a listed one imports it, which must not be.
"""

ALLOWED: dict[tuple[str, str], str] = {}
"""Imports (of, what) against the rules that are there for the time being, and why."""


class Import(NamedTuple):
    """One import of a module of ours."""

    module: str
    imported: str
    place: str


def name_of(file: Path, package: Path) -> str:
    parts = (package.name, *file.relative_to(package).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(package: Path) -> list[Import]:
    """Every import of the package's own modules, inside functions too, but not for types only."""
    files = {name_of(file, package): file for file in sorted(package.rglob("*.py"))}
    found = []
    for module, file in files.items():
        tree = ast.parse(file.read_text("utf-8"))
        parent = module if file.name == "__init__.py" else module.rpartition(".")[0]
        for node in executed([tree]):
            place = f"{file.relative_to(package.parent)}:{node.lineno}"
            for target in targets(node, parent):
                # `from elasticore.patterns import XAttention` means the module, or a name in it.
                imported = target if target in files else target.rpartition(".")[0]
                if imported in files and imported != package.name:
                    found.append(Import(module, imported, place))
    return found


def executed(nodes: Iterable[ast.AST]) -> Iterator[ast.Import | ast.ImportFrom]:
    """The import statements in nodes, without those under ``if TYPE_CHECKING``."""
    for node in nodes:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from executed(node.orelse)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        else:
            yield from executed(ast.iter_child_nodes(node))


def targets(node: ast.Import | ast.ImportFrom, parent: str) -> list[str]:
    """What a statement imports, by absolute names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    base = node.module or ""
    if node.level:
        above = parent.split(".")[: len(parent.split(".")) - node.level + 1]
        base = ".".join([*above, *filter(None, [node.module])])
    return [f"{base}.{alias.name}" for alias in node.names]


def upward(found: list[Import], rooms: tuple[tuple[str, ...], ...]) -> list[Import]:
    """The imports that a listed room makes of a higher one, or of one that is not listed."""
    level = {name: depth for depth, names in enumerate(rooms) for name in names}
    return [
        one
        for one in found
        if (here := one.module.split(".")[1:2]) and here[0] in level
        if level.get(one.imported.split(".")[1], -1) < level[here[0]]
    ]


def circles(found: list[Import]) -> list[list[str]]:
    """Groups of modules each of which imports itself by way of the others, by Tarjan's algorithm.

    A package's ``__init__`` and its modules are apart: that a module makes Python run the
    ``__init__`` files above it counts for nothing.
    """
    graph: dict[str, set[str]] = {}
    for module, imported, _ in found:
        graph.setdefault(module, set()).add(imported)
        graph.setdefault(imported, set())
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    groups = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in graph[module]:
            if other not in order:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == order[module]:
            group = [stack.pop()]
            while group[-1] != module:
                group.append(stack.pop())
            if len(group) > 1 or module in graph[module]:
                groups.append(sorted(group))

    for module in graph:
        if module not in order:
            visit(module)
    return groups


FOUND = imports(PACKAGE)
RIGHT = [one for one in FOUND if one[:2] not in ALLOWED]


def inside(found: list[Import]) -> list[Import]:
    """The imports that listed rooms make."""
    listed = {name for names in ROOMS for name in names}
    return [one for one in found if listed & set(one.module.split(".")[1:2])]


def test_rooms_import_downwards() -> None:
    wrong = sorted({f"{one.place} imports {one.imported}" for one in upward(RIGHT, ROOMS)})
    assert not wrong, "upward imports:\n" + "\n".join(wrong)


def test_no_module_imports_itself_by_way_of_others() -> None:
    found = inside(RIGHT)
    lines = [
        "\n".join(sorted({one.place for one in found if {*one[:2]} <= set(group)}))
        for group in circles(found)
    ]
    assert not lines, "circles:\n" + "\n\n".join(lines)


def test_nothing_is_allowed_without_need() -> None:
    in_circles = {module for group in circles(inside(FOUND)) for module in group}
    needed = {one[:2] for one in upward(FOUND, ROOMS)}
    needed |= {one[:2] for one in FOUND if {*one[:2]} <= in_circles}
    assert set(ALLOWED) <= needed, "take out of ALLOWED what no longer happens"


def test_every_room_is_there() -> None:
    for name in (name for names in ROOMS for name in names):
        assert (PACKAGE / f"{name}.py").exists() or (PACKAGE / name / "__init__.py").exists()


# --- The rules themselves ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "line",
    [
        "import pkg.top",
        "from pkg import top",
        "from pkg.top import name",
        "from . import top",
        "from .top import name",
        "def f():\n    from pkg.top import name",
        "try:\n    import pkg.top as t\nexcept ImportError: ...",
        "if TYPE_CHECKING: ...\nelse:\n    import pkg.top",
    ],
)
def test_every_way_to_import_upwards_is_seen(line: str, tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "top.py").write_text("from pkg.low import name")
    (package / "low.py").write_text(line)
    found = imports(package)
    (wrong,) = upward(found, (("top",), ("low",)))
    assert wrong.place == f"pkg/low.py:{wrong.place.rpartition(':')[2]}"
    assert upward(found, (("low",),)) == [wrong], "an unlisted room is above all"
    assert circles(found) == [["pkg.low", "pkg.top"]]


def test_imports_for_types_do_not_count(tmp_path: Path) -> None:
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "top.py").write_text("")
    (package / "low.py").write_text("if TYPE_CHECKING:\n    from pkg.top import name\nimport os")
    assert imports(package) == []
