"""The shop, with two books in stock."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from typing import Any

import pytest
from django.test import AsyncClient, override_settings

from django_asyncsession import DatabaseInterface
from testproject import settings as shop_settings
from testproject.shop.management.commands import seed
from testproject.shop.models import Author, Book, Stock


def fill(alias: str) -> None:
    """Two books in stock."""
    author = Author.objects.using(alias).create(name="Ada Holm", born=1950)
    for number, title in enumerate(("The Quiet Harbour", "Letters from Riga"), start=1):
        book = Book.objects.using(alias).create(
            title=title,
            author=author,
            isbn=seed.isbn(number),
            price=Decimal("10.50"),
            published=date(2001, 2, 3),
        )
        for place, quantity in (("shop", 5), ("warehouse", 10)):
            Stock.objects.using(alias).create(book=book, place=place, quantity=quantity)


def settings_of_the_shop(alias: str, native: bool) -> override_settings:
    return override_settings(
        ROOT_URLCONF="testproject.urls",
        MIDDLEWARE=shop_settings.MIDDLEWARE,
        ASYNC_SESSION={"ALIAS": alias, "NATIVE_ORM": native, "NATIVE_MIDDLEWARE": native},
        DATABASE_ROUTERS=[OneDatabase(alias)],
    )


@pytest.fixture(params=[False, True], ids=["plain", "native"])
def shop(database: DatabaseInterface, request: pytest.FixtureRequest) -> Iterator[str]:
    """The shop's settings on each database in turn, with two books in stock, all in the test's
    transaction; with native mode off, and on."""
    fill(database.alias)
    with settings_of_the_shop(database.alias, request.param):
        yield database.alias


@pytest.fixture(params=[False, True], ids=["plain", "native"])
def real_shop(alias: str, empty_tables: None, request: pytest.FixtureRequest) -> Iterator[str]:
    """The same with real commits, for other processes, and for requests at the same time."""
    fill(alias)
    with settings_of_the_shop(alias, request.param):
        yield alias


class OneDatabase:
    """A router that sends everything to one database, as if the project had no other."""

    def __init__(self, alias: str) -> None:
        self._alias = alias

    def db_for_read(self, *args: Any, **hints: Any) -> str:
        return self._alias

    db_for_write = db_for_read


@pytest.fixture
def client() -> AsyncClient:
    """A client that gets error answers as a browser does, and must send CSRF tokens."""
    return AsyncClient(raise_request_exception=False, enforce_csrf_checks=True)
