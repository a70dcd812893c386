"""The page on what is around the view: its code is Python, and what it names exists; the pool that
its application closes is a real one."""

from __future__ import annotations

import ast
import re
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from asgiref.testing import ApplicationCommunicator

from django_asyncsession import AsyncCommand, SessionConsumer, databases

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.rst").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", PAGE, re.MULTILINE)
NAMES = ("AsyncCommand", "background_session", "SessionConsumer", "rollback_request")


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_what_the_code_imports_exists(number: int) -> None:
    for node in ast.walk(ast.parse(dedent(BLOCKS[number]))):
        if isinstance(node, ast.ImportFrom) and "django_asyncsession" in str(node.module):
            module = import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)


async def test_the_application_with_lifespan_events_works(empty_tables: None) -> None:
    """It answers requests, and closes the pools when the server stops."""
    (source,) = (dedent(block) for block in BLOCKS if "get_asgi_application" in block)
    names: dict[str, Any] = {}
    exec(source, names)
    server = ApplicationCommunicator(names["application"], {"type": "lifespan"})
    await server.send_input({"type": "lifespan.startup"})
    assert await server.receive_output(5) == {"type": "lifespan.startup.complete"}
    async with databases["default"].get_session() as session:
        await session.fetch_value("SELECT 1")
    assert databases["default"].connected
    scope = {"type": "http", "method": "GET", "path": "/nowhere/", "headers": []}
    request = ApplicationCommunicator(names["application"], scope)
    await request.send_input({"type": "http.request"})
    assert (await request.receive_output(5))["status"] == 404
    await request.receive_output(5)
    await request.wait(5)
    await server.send_input({"type": "lifespan.shutdown"})
    assert await server.receive_output(5) == {"type": "lifespan.shutdown.complete"}
    assert not databases["default"].connected
    await server.wait(5)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_is_explained(name: str) -> None:
    assert hasattr(import_module("django_asyncsession"), name)
    assert name in PAGE


@pytest.mark.parametrize("cls", [AsyncCommand, SessionConsumer])
def test_every_attribute_that_a_subclass_sets_is_explained(cls: type) -> None:
    attributes = [name for name in cls.__annotations__ if not name.startswith("_")]
    assert len(attributes) >= 2
    assert not [name for name in attributes if f"``{name}" not in PAGE]
