"""The house rules that a reader would otherwise have to check by hand."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LONGEST_FUNCTION = 50
# Names that say what Django or a protocol wants, and need no words of ours.
UNSAID = {"Meta", "Media"}
# The file name is the API.
NAMELESS = {"utils", "helpers", "common", "misc", "types", "compat"}
CODE = sorted(
    path
    for folder in ("django_asyncsession", "testproject")
    for path in (ROOT / folder).rglob("*.py")
    if "migrations" not in path.parts
)

TESTS = sorted((ROOT / "tests").rglob("test_*.py"))
LONGEST_TEST_FILE = 900
# Of folders of tests, those that are of no room of the package.
NO_ROOMS = {"docs", "ecosystem", "testproject"}
# Fixtures of tests that commit, where most have the transaction of the toolkit.
COMMITTING = {"real_database", "real_session", "empty_tables", "empty_database"}

Named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def definitions(node: ast.Module | ast.ClassDef) -> Iterator[Named]:
    """What a module or a class defines, and what its classes define."""
    for child in node.body:
        if isinstance(child, Named):
            yield child
            if isinstance(child, ast.ClassDef):
                yield from definitions(child)


def is_public(node: Named) -> bool:
    is_stub = ast.unparse(node.body[-1]) == "..."
    return not (node.name.startswith("_") or node.name in UNSAID or is_stub)


def said_by_others(path: Path) -> set[str]:
    """Members whose words are elsewhere: of private classes, and in a backend what Django calls."""
    return {
        member.name
        for node in tree(path).body
        if isinstance(node, ast.ClassDef)
        and (node.name.startswith("_") or "backends" in path.parts or path.stem == "wrapper")
        for member in definitions(node)
    }


def identify(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", CODE, ids=identify)
def test_every_module_says_what_it_is_for(path: Path) -> None:
    assert ast.get_docstring(tree(path))


@pytest.mark.parametrize("path", CODE, ids=identify)
def test_every_public_name_has_a_docstring(path: Path) -> None:
    excused = said_by_others(path)
    missing = [
        node.name
        for node in definitions(tree(path))
        if is_public(node) and node.name not in excused and not ast.get_docstring(node)
    ]
    assert not missing


@pytest.mark.parametrize("path", CODE, ids=identify)
def test_no_function_is_too_long(path: Path) -> None:
    functions = [
        n for n in ast.walk(tree(path)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {n.name: (n.end_lineno or 0) - n.lineno + 1 for n in functions}
    assert not {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION}


def test_every_module_has_a_name_that_says_something() -> None:
    assert not [path for path in CODE if path.stem in NAMELESS]


@pytest.mark.parametrize("path", TESTS, ids=identify)
def test_tests_that_commit_say_why(path: Path) -> None:
    """In the docstring of their file: what is real, and what for."""
    nodes = list(ast.walk(tree(path)))
    named = {n.arg for n in nodes if isinstance(n, ast.arg)}
    used = {n.value for n in nodes if isinstance(n, ast.Constant) and path != Path(__file__)}
    words = re.findall(r"\w+", ast.get_docstring(tree(path)) or "")
    assert not COMMITTING & (named | used) or "real" in words


@pytest.mark.parametrize("path", TESTS, ids=identify)
def test_no_test_file_is_too_long(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_TEST_FILE


def test_the_folders_of_tests_are_named_like_the_rooms_of_the_package() -> None:
    folders = {path.parent.relative_to(ROOT / "tests") for path in TESTS} - {Path()}
    package = ROOT / "django_asyncsession"
    rooms = {path.relative_to(package).with_suffix("") for path in package.rglob("*")}
    assert not {folder for folder in folders - rooms if str(folder) not in NO_ROOMS}


def test_the_name_of_a_test_file_is_there_once() -> None:
    assert len({path.name for path in TESTS}) == len(TESTS)
