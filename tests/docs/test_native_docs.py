"""The page on native mode: its code is Python, and its settings and names exist."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from django.test import override_settings

from django_asyncsession import DatabaseInterface, conf, native
from tests.models import Author, Book

PAGE = (Path(__file__).parents[2] / "docs" / "native.rst").read_text(encoding="utf-8")
FOUND = re.findall(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", PAGE, re.MULTILINE)
BLOCKS = [dedent(block) for block in FOUND]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_what_the_code_imports_and_sets_exists(number: int) -> None:
    for node in ast.walk(ast.parse(_complete(BLOCKS[number]))):
        if isinstance(node, ast.ImportFrom):
            module = import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ASYNC_SESSION":
            assert isinstance(node.value, ast.Dict)
            keys = {key.value for key in node.value.keys if isinstance(key, ast.Constant)}
            assert keys <= set(conf.DEFAULTS)


def _complete(block: str) -> str:
    """The block, with something where it leaves out the other entries of a dictionary."""
    return block.replace("{...,", "{**others,")


async def test_the_block_for_scripts_runs(database: DatabaseInterface) -> None:
    (source,) = (block for block in BLOCKS if "native.use(session)" in block)
    source = source.replace("...", "found.append(book)").replace('"default"', "alias")
    async with database.get_session() as session:
        author = await session.add(Author(name="Ada"))
        book = await session.add(Book(title="The Quiet Harbour", author=author))
    found: list[Book] = []
    names: dict[str, Any] = {"native": native, "Book": Book, "found": found}
    code = compile(source, "native.rst", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names |= {"databases": {"a": database}, "alias": "a"}
    with override_settings(
        ASYNC_SESSION={"NATIVE_ORM": True, "ALIAS": database.alias},
        DATABASE_ROUTERS=[_Everything(database.alias)],
    ):
        await eval(code, names)
    assert found == [book]


class _Everything:
    """A router that sends everything to one database."""

    def __init__(self, alias: str) -> None:
        self._alias = alias

    def db_for_read(self, *args: Any, **hints: Any) -> str:
        return self._alias

    db_for_write = db_for_read


@pytest.mark.parametrize("name", ["native.use", "native.uninstall", "keep_thread", "W112"])
def test_every_name_is_explained(name: str) -> None:
    assert name in PAGE
