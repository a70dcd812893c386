"""Native mode leaves alone what is not routed, and Django is as ever when it is off.

With real commits where connections or the pool are the point.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from typing import Any

import django
import pytest
from asgiref.sync import AsyncToSync, SyncToAsync, iscoroutinefunction, sync_to_async
from django.core.cache import caches
from django.core.management import call_command
from django.core.signals import request_finished, request_started
from django.db import close_old_connections, connection, connections, reset_queries
from django.db.models import query
from django.test import override_settings

from django_asyncsession import (
    ConfigurationError,
    DatabaseInterface,
    checks,
    databases,
    keep_thread,
    native,
)
from django_asyncsession.native.routes import ROUTES
from tests.models import User
from tests.native.aliases import two_databases
from tests.sessions import names, whole

pytestmark = pytest.mark.usefixtures("native_mode")


# What is left alone


@pytest.mark.parametrize("within", [True, False])
@pytest.mark.parametrize("autocommit", [True, False])
async def test_djangos_housekeeping_does_not_touch_a_session(
    real_database: DatabaseInterface, within: bool, autocommit: bool
) -> None:
    """Each request begins and ends with signals, on which Django closes old connections."""
    alias = real_database.alias

    def housekeeping() -> Any:
        wrapper = connections[alias]
        list(User.objects.using(alias).all())
        server = wrapper.connection
        wrapper.errors_occurred = True
        request_started.send(None)
        close_old_connections()
        reset_queries()
        request_finished.send(None)
        assert wrapper.connection is server
        return User.objects.using(alias).count()

    async with real_database.get_session(autocommit=autocommit) as session:
        if within:
            with native.use(session):
                assert await session.run_sync(housekeeping) == 0
        else:
            assert await session.run_sync(housekeeping) == 0


@pytest.mark.usefixtures("empty_tables")
async def test_a_users_blocking_function_keeps_its_thread(threads: list[str]) -> None:
    db = databases["default"]

    async def blocking() -> tuple[int, int]:
        return await sync_to_async(lambda: (threading.get_ident(), _count_and_close()))()

    async with db.get_session() as session, native.use(session):
        await User.objects.acreate(name="not committed")
        ident, seen = await blocking()
    assert ident != threading.get_ident()
    assert seen == 0
    assert len(threads) == 1
    await databases.close_all()


def _count_and_close() -> int:
    try:
        return User.objects.count()
    finally:
        connection.close()


@two_databases
@pytest.mark.parametrize("backend", ["locmem", "db"])
async def test_only_the_cache_in_the_database_is_routed(backend: str, threads: list[str]) -> None:
    places = {"locmem": "", "db": "tests_cache"}
    entry = {
        "BACKEND": f"django.core.cache.backends.{backend}."
        + {"locmem": "LocMemCache", "db": "DatabaseCache"}[backend],
        "LOCATION": places[backend],
    }
    with override_settings(CACHES={"default": entry}):
        await sync_to_async(_make_cache_table)()
        threads.clear()
        async with databases["default"].get_session() as session, native.use(session):
            await caches["default"].aset("key", "value")
            assert await caches["default"].aget("key") == "value"
    assert bool(threads) is (backend == "locmem")


def _make_cache_table() -> None:
    call_command("createcachetable", verbosity=0)


@two_databases
async def test_what_opts_out_keeps_its_thread(threads: list[str]) -> None:
    @keep_thread
    def kept() -> int:
        return threading.get_ident()

    class Kept:
        @keep_thread
        def method(self) -> int:
            return threading.get_ident()

    keep_thread(Kept)
    async with databases["default"].get_session() as session, native.use(session):
        for fn in (kept, Kept().method):
            assert await query.sync_to_async(fn)() != threading.get_ident()  # type: ignore[attr-defined]
        routed = query.sync_to_async(threading.get_ident)  # type: ignore[attr-defined]
        assert await routed() == threading.get_ident()
        hashing = query.sync_to_async(threading.get_ident, thread_sensitive=False)  # type: ignore[attr-defined]
        assert await hashing() != threading.get_ident()
    assert len(threads) == 3


async def test_without_a_current_session_a_routed_function_is_djangos() -> None:
    routed: Any = query.sync_to_async  # type: ignore[attr-defined]

    @routed
    def ident(first: int, *, second: int = 0) -> tuple[int, int, int]:
        """What it is for."""
        return first, second, threading.get_ident()

    plain = sync_to_async(ident.func)
    assert isinstance(ident, SyncToAsync) and iscoroutinefunction(ident)
    assert (ident.__name__, ident.__doc__) == (plain.__name__, plain.__doc__)
    assert vars(ident).keys() - vars(plain).keys() == {"route"}
    assert (await ident(1, second=2))[:2] == (1, 2)
    assert (await ident(1))[2] == (await plain(1))[2] != threading.get_ident()
    for wrong in (asyncio.sleep, 7):
        with pytest.raises(TypeError, match="can only be applied to sync functions"):
            routed(wrong)
    with pytest.raises(TypeError, match="executor must not be set"):
        routed(ident.func, executor=object())
    assert (await routed(thread_sensitive=False)(threading.get_ident)()) != threading.get_ident()


@pytest.mark.usefixtures("empty_tables")
async def test_a_session_of_another_loop_is_not_current_here(threads: list[str]) -> None:
    """Each thread with a loop has its own sessions, and neither sees the other's."""

    async def other(entered: threading.Barrier) -> list[str]:
        db = databases["default"]
        async with db.get_session() as session, native.use(session):
            name = threading.current_thread().name
            await User.objects.acreate(name=name)
            await asyncio.get_running_loop().run_in_executor(None, entered.wait, 10)
            found = [u.name async for u in User.objects.all()]
            await session.rollback()
        await databases.close_all()
        return found

    barrier = threading.Barrier(2)
    async with databases["default"].get_session() as session, native.use(session):
        first, second = await asyncio.gather(
            *(asyncio.to_thread(lambda: asyncio.run(other(barrier))) for _ in range(2))
        )
        assert len(first) == len(second) == 1 and first != second
        await User.objects.acreate(name="here")
        assert await User.objects.acount() == 1
        await session.rollback()
    assert threads == []
    await databases.close_all()


@two_databases
async def test_the_current_session_is_restored_by_value_and_ends_with_its_block() -> None:
    db = databases["default"]
    ended = asyncio.Event()

    async def inherits() -> list[Any]:
        before = native.current()
        await ended.wait()
        return [before, native.current()]

    async with db.get_session() as outer, db.get_session() as inner:
        with native.use(outer):
            first = native.current()
            with native.use(inner):
                second = native.current()
                task = asyncio.create_task(inherits())
                await asyncio.sleep(0)
            assert native.current() is first is not second
        ended.set()
        assert native.current() is None
        assert await task == [second, None]


# On and off


def _names_of_django() -> dict[tuple[str, str], int]:
    """Every name in every module of Django, and which object it names."""
    modules = {n: m for n, m in sys.modules.items() if n.partition(".")[0] in ("django", "asgiref")}
    found = {(n, name): id(value) for n, m in modules.items() for name, value in vars(m).items()}
    found["BaseIterable", "_async_generator"] = id(query.BaseIterable._async_generator)  # type: ignore[attr-defined]
    found["connections", "__class__"] = id(type(connections))
    found["AsyncToSync", "__call__"] = id(AsyncToSync.__call__)
    return found


def test_uninstalling_restores_every_name() -> None:
    native.install()
    native.uninstall()
    before = _names_of_django()
    native.install()
    changed = {key for key, value in _names_of_django().items() if before.get(key) != value}
    assert ("django.db.models.query", "sync_to_async") in changed
    assert {module for module, name in changed if name == "sync_to_async"} <= {
        route.module for route in ROUTES
    }
    native.install()
    native.uninstall()
    assert _names_of_django() == before
    assert not native.is_installed()


async def test_uninstalling_while_it_is_used_disturbs_no_transaction(
    real_database: DatabaseInterface,
) -> None:
    """What has begun, and what asks for the session by name, stays in it."""
    users = User.objects.using(real_database.alias)

    def before_and_after() -> int:
        users.create(name="before")
        native.uninstall()
        users.create(name="after")
        return users.count()

    try:
        async with real_database.get_session() as session, native.use(session):
            await users.acreate(name="first")
            rows = users.aiterator(chunk_size=1)
            await anext(rows)
            assert await session.run_sync(before_and_after) == 3
            await session.run_sync(users.create, name="later")
            assert [user async for user in rows] == []
            await session.rollback()
            assert await session.run_sync(users.count) == 0
    finally:
        native.install()
    assert await names(real_database) == []
    await whole(real_database)


@pytest.mark.parametrize("setting", [True, False])
def test_only_the_setting_turns_it_on(setting: bool) -> None:
    code = f"""
import django, asgiref.sync
from django.conf import settings
settings.configure(
    INSTALLED_APPS=["django_asyncsession"],
    DATABASES={{"default": {{"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}}}},
    ASYNC_SESSION={{"NATIVE_ORM": {setting}}},
)
import django_asyncsession, django_asyncsession.native
from django.db.models import query
from django.db.models.signals import post_save
assert query.sync_to_async is asgiref.sync.sync_to_async
django.setup()
assert (query.sync_to_async is not asgiref.sync.sync_to_async) is {setting}
assert django_asyncsession.native.is_installed() is {setting}
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


async def test_using_a_session_while_native_mode_is_off_is_refused() -> None:
    with override_settings(ASYNC_SESSION={}), pytest.raises(ConfigurationError, match="NATIVE_ORM"):
        native.use(databases["default"].get_session())


def test_a_version_of_django_that_was_not_verified_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert checks.check_native_version() == []
    monkeypatch.setattr(django, "VERSION", (9, 1, 0, "final", 0))
    assert [m.id for m in checks.check_native_version()] == ["django_asyncsession.W112"]
    with override_settings(ASYNC_SESSION={}):
        assert checks.check_native_version() == []


def test_every_routed_module_says_why_it_is_safe() -> None:
    assert all(route.why for route in ROUTES)
    assert len({route.module for route in ROUTES}) == len(ROUTES)
