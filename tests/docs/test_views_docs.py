"""The page on views: its code runs, and it names every view."""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from textwrap import dedent
from types import ModuleType
from typing import Any

import pytest
from django.test import AsyncRequestFactory, override_settings
from django.views.generic import View

import testproject.shop.models
from django_asyncsession import Session, databases, views
from testproject.shop.models import Author, Book

PAGE = (Path(__file__).parents[2] / "docs" / "views.rst").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^( *)\.\. code-block:: python\n\n((?:\1   .*\n|\n)+)", PAGE, re.MULTILINE)
PAGES = {"shop/book_list.html": "{{ book_list|length }}", "catalogue.html": "{{ books|length }}"}
TEMPLATES = [
    {
        "BACKEND": "django.template.backends.django.DjangoTemplates",
        "OPTIONS": {"loaders": [("django.template.loaders.locmem.Loader", PAGES)]},
    }
]


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the code of the page defines, where `shop` is the test project's."""
    monkeypatch.setitem(sys.modules, "shop", ModuleType("shop"))
    monkeypatch.setitem(sys.modules, "shop.models", testproject.shop.models)
    names: dict[str, Any] = {"__name__": "views"}
    for _, block in BLOCKS:
        exec(dedent(block), names)
    return names


@pytest.fixture
async def session() -> AsyncIterator[Session]:
    async with databases["default"].get_session() as session:
        with override_settings(TEMPLATES=TEMPLATES):
            yield session
        await session.rollback()
    await databases.close_all()


def test_its_code_defines_views(names: dict[str, Any]) -> None:
    made = [v for v in names.values() if isinstance(v, type) and v.__module__ == "views"]
    assert len(made) == 6
    assert all(view.as_view().view_class is view for view in made)  # type: ignore[attr-defined]


async def test_its_async_methods_and_its_test_are_right(
    names: dict[str, Any], session: Session
) -> None:
    await names["test_the_list"](session)
    author = await session.add(Author(name="Ada Holm"))
    values = {"author": author, "isbn": "9780000000001", "price": 10, "published": "2001-02-03"}
    book = await session.add(Book(title="The Quiet Harbour", **values))
    request: Any = AsyncRequestFactory().get("/")
    request.db_session = session
    response = await names["OneBook"].as_view()(request, pk=book.pk)
    assert response.context_data["book"].others == [book]
    names["tell_the_printer"] = [].append
    request = AsyncRequestFactory().post("/", {"title": "Changed", "price": 1})
    request.db_session = session
    response = await names["ChangedBook"].as_view()(request, pk=book.pk)
    assert response["Location"] == "/books/"
    assert (await session.get_one(Book, book.pk)).title == "Changed"
    response = await names["catalogue"](request, session=session)
    assert response.content == b"1"


def test_every_view_is_named() -> None:
    own = [
        name
        for name, value in vars(views).items()
        if isinstance(value, type)
        and issubclass(value, View)
        and value.__module__ == views.__name__
    ]
    assert len(own) == 9
    assert not [name for name in own if f"``{name}``" not in PAGE]
