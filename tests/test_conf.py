"""Each key of ASYNC_SESSION does something; on real connections, so that nothing of a test stands
between."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, override_settings
from django.urls import path

from django_asyncsession import DatabaseInterface, StreamTimeout, conf, databases, native
from django_asyncsession.scope import new_session
from tests.models import User

OURS = "django_asyncsession.middleware.AsyncSessionMiddleware"
mine = threading.local()
seen: dict[str, Any] = {}


async def view(request: HttpRequest) -> HttpResponse:
    seen.update(session=getattr(request, "db_session", None), other=getattr(request, "s", None))
    return HttpResponse()


def sync_view(request: HttpRequest) -> HttpResponse:
    seen["thread"] = threading.get_ident()
    return HttpResponse()


urlpatterns = [path("view/", view), path("sync/", sync_view)]


async def visit(url: str, setting: dict[str, Any]) -> None:
    with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[OURS], ASYNC_SESSION=setting):
        await AsyncClient().get(url)


async def alias(setting: dict[str, Any], tmp_path: Path) -> Any:
    return new_session(None, {}).alias


async def request_attribute(setting: dict[str, Any], tmp_path: Path) -> Any:
    await visit("/view/", setting)
    return seen["other"] is not None


async def atomic_requests(setting: dict[str, Any], tmp_path: Path) -> Any:
    await visit("/view/", setting)
    return seen["session"].autocommit


async def native_orm(setting: dict[str, Any], tmp_path: Path) -> Any:
    return native.is_installed()


async def native_middleware(setting: dict[str, Any], tmp_path: Path) -> Any:
    await visit("/sync/", setting)
    return seen["thread"] == threading.get_ident()


def logged(name: str) -> list[str]:
    """What this logger says from now on."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).handlers = [handler]
    return texts


async def loop_block_warning(setting: dict[str, Any], tmp_path: Path) -> Any:
    said = logged("django_asyncsession")
    session = databases["sqlite"].get_session()
    async with session:
        if native.is_installed():
            async with native.use(session):
                await session.companions.run(time.sleep, 0.02)  # type: ignore[union-attr]
    return any("blocked the event loop" in text for text in said)


async def pools(setting: dict[str, Any], tmp_path: Path) -> Any:
    await databases["sqlite"].close()
    return databases["sqlite"].pool().options.limit


async def sqlite_wal(setting: dict[str, Any], tmp_path: Path) -> Any:
    db = DatabaseInterface.from_dsn(f"sqlite:///{tmp_path / f'{len(setting)}.sqlite3'}")
    async with db, db.get_session() as session:
        return await session.fetch_value("PRAGMA journal_mode")


async def thread_locals(setting: dict[str, Any], tmp_path: Path) -> Any:
    async with databases["sqlite"].get_session() as session:
        await session.run_sync(setattr, mine, "value", "of the session")
    return mine.__dict__.pop("value", "apart")


async def stream_timeout(setting: dict[str, Any], tmp_path: Path) -> Any:
    try:
        async with databases["sqlite"].get_session() as session:
            rows = session.stream("SELECT 1 UNION SELECT 2 UNION SELECT 3", chunk_size=1)
            await anext(rows)
            await asyncio.sleep(0.3)
            found = await anext(rows)
            await rows.aclose()
            return found is None
    except StreamTimeout as error:
        return type(error).__name__


async def slow_query(setting: dict[str, Any], tmp_path: Path) -> Any:
    said = logged("django_asyncsession.slow")
    async with databases["sqlite"].get_session() as session:
        await session.fetch_value("SELECT 1")
    return bool(said)


async def leak_warning(setting: dict[str, Any], tmp_path: Path) -> Any:
    said = logged("django_asyncsession.leaks")
    await databases["sqlite"].close()
    async with databases["sqlite"].get_session() as session:
        await session.fetch_value("SELECT 1")
        await asyncio.sleep(0.3)
    return bool(said)


async def plans(setting: dict[str, Any], tmp_path: Path) -> Any:
    async with databases["sqlite"].get_session() as session:
        return session.select(User).where(level=1).why().split(",")[0]


Effect = Callable[[dict[str, Any], Path], Awaitable[Any]]
# A value of each key, what shows its effect, and that without and with it.
KEYS: dict[str, tuple[Any, Effect, Any, Any]] = {
    "ALIAS": ("sqlite", alias, "default", "sqlite"),
    "REQUEST_ATTRIBUTE": ("s", request_attribute, False, True),
    "ATOMIC_REQUESTS": (False, atomic_requests, False, True),
    "NATIVE_ORM": (True, native_orm, False, True),
    "NATIVE_MIDDLEWARE": (True, native_middleware, False, True),
    "LOOP_BLOCK_WARNING_SECONDS": (0.01, loop_block_warning, False, True),
    "PLANS": (
        False,
        plans,
        "Runs Django's way this time",
        'Runs Django\'s way (off): ASYNC_SESSION["PLANS"] is False.',
    ),
    "POOLS": ({"sqlite": {"max_size": 3}}, pools, 10, 3),
    "SQLITE_WAL": (False, sqlite_wal, "wal", "delete"),
    "THREAD_LOCALS": ([f"{__name__}.mine"], thread_locals, "of the session", "apart"),
    "STREAM_TIMEOUT": (0.05, stream_timeout, False, "StreamTimeout"),
    "SLOW_QUERY_SECONDS": (0.0, slow_query, False, True),
    "LEAK_WARNING_SECONDS": (0.05, leak_warning, False, True),
}
NEEDS_NATIVE = {"NATIVE_MIDDLEWARE", "LOOP_BLOCK_WARNING_SECONDS"}


def test_every_key_has_a_test() -> None:
    assert set(KEYS) == set(conf.DEFAULTS)


@pytest.mark.parametrize("key", KEYS)
async def test_the_key_does_something(key: str, tmp_path: Path) -> None:
    value, effect, without, with_it = KEYS[key]
    more = {"NATIVE_ORM": True} if key in NEEDS_NATIVE else {}
    try:
        for setting, expected in [(more, without), ({**more, key: value}, with_it)]:
            with override_settings(ASYNC_SESSION=setting):
                assert await effect(setting, tmp_path) == expected
    finally:
        for name in ("django_asyncsession", SLOW, LEAKS):
            logging.getLogger(name).handlers = []
        await databases.close_all()


SLOW, LEAKS = "django_asyncsession.slow", "django_asyncsession.leaks"
