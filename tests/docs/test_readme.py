"""Every Python block of the README runs, on a real PostgreSQL.

As in a project: with real commits, and sessions at the same time.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from django.core.management import load_command_class
from django.test import AsyncClient, override_settings
from django.utils.module_loading import import_string

import testproject.shop.models
from django_asyncsession import conf, databases
from testproject.shop.models import Author, Book

README = Path(__file__).parents[2] / "README.rst"
SOURCE = README.read_text(encoding="utf-8")


def blocks(language: str) -> list[tuple[int, str]]:
    """Each code block in this language, with the number of its first line."""
    pattern = rf"^\.\. code-block:: {language}\n\n((?:   .*\n|\n)+)"
    found = []
    for match in re.finditer(pattern, SOURCE, re.MULTILINE):
        line = SOURCE[: match.start(1)].count("\n") + 1
        found.append((line, re.sub(r"^   ", "", match[1], flags=re.MULTILINE)))
    return found


async def run(line: int, source: str, names: dict[str, Any]) -> None:
    """Execute a block, which may await, with these names."""
    flags = ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    # Blank lines in front, so that a traceback has the README's line numbers.
    code = compile("\n" * (line - 1) + source, str(README), "exec", flags=flags, dont_inherit=True)
    result = eval(code, names)
    if inspect.iscoroutine(result):
        await result


@pytest.fixture
def shop(empty_tables: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the README calls `shop` is the test project's, with an author and a book."""
    monkeypatch.setitem(sys.modules, "shop", ModuleType("shop"))
    monkeypatch.setitem(sys.modules, "shop.models", testproject.shop.models)
    author = Author.objects.create(name="Ada Holm")
    values = {"isbn": "9780000000001", "price": 10, "published": "2001-02-03"}
    Book.objects.create(title="The Quiet Harbour", author=author, **values)
    yield


async def names_after_all_blocks() -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "readme"}
    for line, source in blocks("python"):
        await run(line, source, names)
    await databases["default"].close()
    return names


async def test_every_block_runs_in_the_order_of_the_text(
    shop: None, capsys: pytest.CaptureFixture[str]
) -> None:
    names = await names_after_all_blocks()
    assert (len(names["affordable"]), len(names["writers"]), names["total"]) == (1, 1, 3)
    printed = capsys.readouterr().out
    assert "she is there already\nsaved\n" in printed


async def test_the_quick_start_answers_a_request(shop: None) -> None:
    names = await names_after_all_blocks()
    urls = ModuleType("readme_urls")
    urls.urlpatterns = names["urlpatterns"]  # type: ignore[attr-defined]
    with override_settings(ROOT_URLCONF=urls, MIDDLEWARE=names["MIDDLEWARE"]):
        author = await number_of_the_author()
        response = await AsyncClient().get(f"/authors/{author}/")
        assert response.json() == {"name": "Ada Holm", "books": ["The Quiet Harbour"]}
        # The test that the README shows is right about it.
        await names["test_the_author_page"]()
    await databases["default"].close()


async def number_of_the_author() -> int:
    async with databases["default"].get_session() as session:
        return int(await session.fetch_value("SELECT id FROM shop_author WHERE name = 'Ada Holm'"))


async def test_the_settings_it_names_exist(shop: None) -> None:
    names = await names_after_all_blocks()
    assert "django_asyncsession" in names["INSTALLED_APPS"]
    assert all(import_string(path) for path in names["MIDDLEWARE"])
    assert set(names["ASYNC_SESSION"]) <= set(conf.DEFAULTS)


def test_its_table_has_every_setting_with_its_default() -> None:
    rows = dict(re.findall(r"^``([A-Z_]+)``\s+``([^`]+)``  ", SOURCE, re.MULTILINE))
    assert {key: ast.literal_eval(value) for key, value in rows.items()} == dict(conf.DEFAULTS)


def test_the_commands_it_shows_have_the_options_they_use() -> None:
    shown = "\n".join(source for _, source in blocks("console"))
    command = load_command_class("django_asyncsession", "asyncsql")
    options = command.create_parser("manage.py", "asyncsql").format_help()
    used = re.findall("--[a-z]+", "".join(re.findall("asyncsql .*", shown)))
    assert used and all(option in options for option in used)
    makefile = (README.parent / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"make ([a-z]+)", shown))
    assert targets and all(f"\n{target}:" in makefile for target in targets)
