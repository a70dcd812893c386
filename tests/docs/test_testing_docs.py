"""The page on testing: its code is Python, and what it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from textwrap import dedent

import pytest

from django_asyncsession import pytest_plugin, testing

PAGE = (Path(__file__).parents[2] / "docs" / "testing.rst").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^\.\. code-block:: python\n\n((?:   .*\n|\n)+)", PAGE, re.MULTILINE)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_what_the_code_imports_exists(number: int) -> None:
    for node in ast.walk(ast.parse(dedent(BLOCKS[number]))):
        if isinstance(node, ast.ImportFrom) and node.module == testing.__name__:
            assert {alias.name for alias in node.names} <= set(testing.__all__)


def test_every_public_name_is_explained() -> None:
    assert not [name for name in testing.__all__ if name not in PAGE]


def test_every_fixture_is_explained() -> None:
    fixtures = [name for name in vars(pytest_plugin) if name.startswith("async_")]
    assert len(fixtures) == 4
    assert not [name for name in fixtures if f"\n``{name}``\n" not in PAGE]
