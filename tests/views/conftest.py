"""The views, served on each database, in plain and in native mode; pools are whole afterwards."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from datetime import date
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import connections
from django.test import AsyncClient, override_settings

from django_asyncsession import databases
from tests.models import Author, Book, Tag
from tests.sessions import whole
from tests.threads import sent_to_threads
from tests.views import pages

# What Django, and its test client, do around a view.
AROUND = {
    "close",
    "log_response",
    "process_exception_by_middleware",
    "process_request",
    "process_response",
    "process_template_response",
    "response_for_exception",
    "sync_send",
}


class OneDatabase:
    """A router that sends everything to one database, as if the project had no other."""

    def __init__(self, alias: str) -> None:
        self._alias = alias

    def db_for_read(self, *args: Any, **hints: Any) -> str:
        return self._alias

    db_for_write = db_for_read


@contextmanager
def served(alias: str, is_native: bool) -> Iterator[dict[str, Any]]:
    """The settings under which the views are served; yields those of sessions."""
    with override_settings(
        ROOT_URLCONF=pages.__name__,
        MIDDLEWARE=pages.MIDDLEWARE,
        TEMPLATES=pages.TEMPLATES,
        DATABASE_ROUTERS=[OneDatabase(alias)],
        SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
        ASYNC_SESSION={"ALIAS": alias, "NATIVE_ORM": is_native},
    ):
        ada = Author.objects.create(name="Ada Holm", born=date(1950, 2, 3))
        tag = Tag.objects.create(name="sea")
        for title in ("The Quiet Harbour", "Letters from Riga", "A Slow Train"):
            Book.objects.create(title=title, author=ada, price=10).tags.add(tag)
        Author.objects.create(name="Ivo Sato")
        connections.close_all()
        yield settings.ASYNC_SESSION


@pytest.fixture(params=[False, True], ids=["plain", "native"])
def is_native(request: pytest.FixtureRequest) -> bool:
    """Native mode off, and on."""
    return bool(request.param)


@pytest.fixture
def site(is_native: bool) -> Iterator[dict[str, Any]]:
    """The views on PostgreSQL; yields the settings of sessions."""
    with served("default", is_native) as of_sessions:
        yield of_sessions


@pytest.fixture
def everywhere(alias: str, is_native: bool) -> Iterator[str]:
    """The views on each database in turn."""
    with served(alias, is_native):
        yield alias


@pytest.fixture(autouse=True)
async def closing() -> AsyncIterator[None]:
    """Every pool is whole after the test, and closed; so are the connections of Django's own."""
    yield
    for db in databases.all():
        if db.connected:
            await whole(db)
    await databases.close_all()
    await sync_to_async(connections.close_all)()


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the functions, other than those around views, that went to a thread."""
    return sent_to_threads(monkeypatch, lambda fn: fn.__name__ not in AROUND)


@pytest.fixture
def client() -> AsyncClient:
    return AsyncClient()


@pytest.fixture
def quiet() -> AsyncClient:
    """A client that gets the error response, as a browser does, instead of the exception."""
    return AsyncClient(raise_request_exception=False)
