"""Imports go downwards only: each module knows those below it, and there are no cycles."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import django_asyncsession

PACKAGE = "django_asyncsession"
ROOT = Path(django_asyncsession.__file__).parent

# Rooms from the bottom up; a module may import what stands in a line above its own, and its own.
LAYERS = [
    {"exceptions", "conf", "signals", "origins", "scanner", "shutdown"},
    {"bridge", "results", "statements", "threadlocals", "unread", "installed"},
    {"observe", "pool", "plans"},
    {"backends", "connections", "orm"},
    {"guards", "transactions"},
    {"parallel"},
    {"session"},
    {"ddl"},
    {"interface"},
    {"native"},
    {"scope", "testing"},
    {"middleware", "decorators", "consumers", "views", "asgi", "management"},
    {"activation"},
    {"checks", "apps", "pytest_plugin"},
]
DRIVERS = {
    "psycopg": "backends.postgresql",
    "psycopg_c": "backends.postgresql",
    "psycopg_pool": "nowhere",
    "asyncmy": "backends.mysql",
    "pymysql": "backends.mysql",
    "MySQLdb": "backends.mysql",
    "sqlite3": "backends.sqlite3",
}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Each module of the package with its source, named as within the package."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        yield name, ast.parse(path.read_text(encoding="utf-8"))


def imports(name: str, tree: ast.Module, *, at_runtime: bool) -> Iterator[str]:
    """Full names of what a module imports; `at_runtime` leaves out what is for types only."""
    skipped = {id(node) for node in _only_for_types(tree)} if at_runtime else set()
    is_package = (ROOT.joinpath(*name.split("."))).is_dir() if name else True
    package = [PACKAGE, *name.split(".")] if name else [PACKAGE]
    if not is_package:
        package.pop()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{prefix}.{alias.name}" for alias in node.names)


def _only_for_types(tree: ast.Module) -> Iterator[ast.AST]:
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for child in node.body:
                yield from ast.walk(child)


MODULES = dict(modules())


def own(imported: str) -> str | None:
    """The module of the package that an import names, or None when it is not one of ours."""
    parts = imported.split(".")
    if parts[0] != PACKAGE:
        return None
    parts = parts[1:]
    while parts and ".".join(parts) not in MODULES:
        parts.pop()
    return ".".join(parts)


def height(name: str) -> int:
    """The layer of a module."""
    top = name.split(".")[0]
    for number, layer in enumerate(LAYERS):
        if top in layer:
            return number
    pytest.fail(f"{name} is in no layer; add it to LAYERS where it belongs")


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_a_module_imports_only_from_its_own_layer_and_below(name: str) -> None:
    for imported in imports(name, MODULES[name], at_runtime=False):
        target = own(imported)
        if target:
            assert height(target) <= height(name), f"{name} imports {target}"


def test_there_are_no_import_cycles_those_of_types_included() -> None:
    graph: dict[str, set[str]] = {}
    for name, tree in MODULES.items():
        targets = {own(imported) for imported in imports(name, tree, at_runtime=False)}
        graph[name] = {target for target in targets if target not in (None, "", name)}  # type: ignore[misc]
    # The package names its modules for whoever imports from it.
    del graph[""]
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as exc:
        pytest.fail(f"import cycle: {' -> '.join(exc.args[1])}")


# Private names of Django's and of drivers that some room of ours has one of, too.
OF_OTHERS = {
    *("_state", "_db", "_chain", "_execute", "_savepoint", "_savepoint_commit", "_closed"),
    "_names",
}


def room(name: str) -> str:
    """The room of a module: its folder, or itself."""
    return name.split(".")[0]


def private_names(name: str, tree: ast.Module) -> Iterator[str]:
    """The names with an underscore that a module gives to something."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found = node.name
        elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Store):
            found = node.attr if isinstance(node, ast.Attribute) else node.id
        else:
            continue
        if found.startswith("_") and not found.startswith("__"):
            yield found


def private_uses(tree: ast.Module) -> Iterator[str]:
    """The names with an underscore that a module takes from anything but itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            value = node.value
            is_own = isinstance(value, ast.Name) and value.id in ("self", "cls")
            if not is_own and not isinstance(value, ast.Call) and node.attr[1] != "_":
                yield node.attr


def test_a_private_name_is_used_in_its_own_room_only() -> None:
    homes: dict[str, set[str]] = {}
    for name, tree in MODULES.items():
        for private in private_names(name, tree):
            homes.setdefault(private, set()).add(room(name))
    for name, tree in MODULES.items():
        taken = {n for i in imports(name, tree, at_runtime=False) if own(i) for n in [i]}
        for imported in taken:
            last = imported.split(".")[-1]
            source = room(own(imported) or "")
            assert not last.startswith("_") or source == room(name), f"{name} imports {imported}"
        for private in set(private_uses(tree)) - OF_OTHERS:
            assert room(name) in homes.get(private, {room(name)}), f"{name} uses {private}"


def test_a_driver_is_imported_only_in_its_own_backend() -> None:
    for name, tree in MODULES.items():
        for imported in imports(name, tree, at_runtime=True):
            home = DRIVERS.get(imported.split(".")[0])
            assert home is None or name.startswith(home), f"{name} imports {imported}"


def test_the_package_does_not_import_its_tests_or_the_test_project() -> None:
    for name, tree in MODULES.items():
        for imported in imports(name, tree, at_runtime=False):
            assert imported.split(".")[0] not in ("tests", "testproject"), f"{name}: {imported}"


def test_importing_the_package_imports_nothing_of_django() -> None:
    code = f"import sys, {PACKAGE}; sys.exit('django' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent, timeout=30)
