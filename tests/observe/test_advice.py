"""What errors advise is what helps: the setting of this project, the request, the user's own line,
the counterpart of Django's function. On real connections where the pool is the subject."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import AsyncIterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.exceptions import SynchronousOnlyOperation
from django.core.management import CommandError, call_command
from django.db import connections, transaction
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import AsyncClient, Client, override_settings
from django.urls import path

from django_asyncsession import (
    BlockingCallError,
    DatabaseInterface,
    PoolTimeout,
    Session,
    SessionClosedError,
    SyncContextError,
    TooManyWaiting,
    WrongLoopError,
    databases,
    inject_session,
)
from django_asyncsession.native.sessions import current
from django_asyncsession.testing import AsyncSessionTestCase
from tests.models import Author
from tests.postgres import dsn_of_tests

OURS = "django_asyncsession.middleware.AsyncSessionMiddleware"
# What a view leaves behind.
left: dict[str, Any] = {}


async def leave(request: HttpRequest, name: str) -> HttpResponse:
    session = request.db_session  # type: ignore[attr-defined]
    await session.fetch_value("SELECT 1")
    left["session"] = session
    return HttpResponse()


@inject_session
async def leave_injected(request: HttpRequest, session: Session) -> HttpResponse:
    await session.fetch_value("SELECT 1")
    left["session"] = session
    return HttpResponse()


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    left["session"] = session = request.db_session  # type: ignore[attr-defined]

    async def body() -> AsyncIterator[bytes]:
        yield str(await session.fetch_value("SELECT 1")).encode()

    return StreamingHttpResponse(body())


async def sync_orm(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(Author.objects.using(request.GET["alias"]).count()))


async def native_of(request: HttpRequest, alias: str) -> HttpResponse:
    await Author.objects.using(alias).acount()
    sessions = current()
    assert sessions is not None
    left["session"] = sessions.session(alias)
    return HttpResponse()


urlpatterns = [
    path("native/<slug:alias>/", native_of),
    path("leave/<slug:name>/", leave),
    path("injected/", leave_injected),
    path("stream/", stream),
    path("orm/", sync_orm),
]


# A session used after its end


@pytest.mark.parametrize(
    ("url", "middleware"),
    [("/leave/early/?token=secret", [OURS]), ("/injected/", []), ("/stream/", [OURS])],
)
async def test_a_session_used_after_its_request_names_the_request(
    database: DatabaseInterface, url: str, middleware: list[str]
) -> None:
    """And what a task that outlives it needs; no line of the server's, and no query string."""
    setting = {"ALIAS": database.alias}
    with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=middleware, ASYNC_SESSION=setting):
        response = await AsyncClient().post(url)
        if response.streaming:
            assert b"".join([part async for part in response]) == b"1"
    with pytest.raises(SessionClosedError) as caught:
        await left["session"].fetch_value("SELECT 1")
    place = url.partition("?")[0]
    said = str(caught.value)
    assert f"for request POST '{place}' is closed" in said
    assert "@background_session" in said and ".py" not in said and "secret" not in said


@pytest.mark.parametrize("alias", ["default", "sqlite", "mysql"])
async def test_so_does_one_that_native_mode_made_for_another_alias(
    alias: str, empty_tables: None
) -> None:
    """In an error after its end, and in what is logged of it meanwhile."""
    setting = {"NATIVE_ORM": True, "ALIAS": "sqlite" if alias == "default" else "default"}
    with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[OURS], ASYNC_SESSION=setting):
        await AsyncClient().get(f"/native/{alias}/")
    await databases.close_all()
    with pytest.raises(SessionClosedError) as caught:
        await left["session"].fetch_value("SELECT 1")
    said = str(caught.value)
    assert f"the session of '{alias}' for request GET '/native/{alias}/' is closed" in said
    assert "@background_session" in said and ".py" not in said


async def test_a_session_of_no_request_names_the_line_that_made_it() -> None:
    session = databases["default"].get_session()
    await session.close()
    with pytest.raises(SessionClosedError, match=r"made at .*test_advice\.py:\d+ in test_a_sess"):
        await session.fetch_value("SELECT 1")


async def test_a_path_without_end_is_cut() -> None:
    with override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[OURS]):
        await AsyncClient().get(f"/leave/{'x' * 5000}/")
    with pytest.raises(SessionClosedError) as caught:
        await left["session"].fetch_value("SELECT 1")
    assert len(str(caught.value)) < 500
    await databases["default"].close()


# Another event loop


async def test_a_session_in_another_loop_names_both_loops_and_the_line(
    real_database: DatabaseInterface,
) -> None:
    said: list[str] = []
    async with real_database.get_session() as session:
        await session.fetch_value("SELECT 1")

        def use_in_a_loop_of_its_own() -> None:
            async def use() -> None:
                said.append(f"{id(asyncio.get_running_loop()):#x}")
                await session.fetch_value("SELECT 1")

            with pytest.raises(WrongLoopError) as caught:
                asyncio.run(use())
            said.append(str(caught.value))

        thread = threading.Thread(target=use_in_a_loop_of_its_own)
        thread.start()
        await asyncio.to_thread(thread.join)
        other, message = said
        mine = f"{id(asyncio.get_running_loop()):#x}"
        assert re.search(rf"belongs to the running event loop \w+ at {mine} ", message)
        assert re.search(rf"test_advice\.py:\d+ in use in the running .* at {other};", message)


def test_a_session_of_a_closed_loop_says_that_it_is_closed() -> None:
    async def begin() -> Session:
        return await databases["sqlite"].get_session().begin()

    session = asyncio.run(begin())

    async def use() -> None:
        await session.fetch_value("SELECT 1")

    with pytest.raises(WrongLoopError, match=r"in begin belongs to the closed event loop"):
        asyncio.run(use())


# The pool


async def exhausted(db: DatabaseInterface) -> str:
    """What the second of two sessions says, with a pool of one connection."""
    async with db.get_session() as session:
        await session.fetch_value("SELECT 1")
        with pytest.raises(PoolTimeout) as caught:
            async with db.get_session() as second:
                await second.fetch_value("SELECT 1")
    await db.close()
    return str(caught.value)


TINY = {"max_size": 1, "timeout": 0.05}


async def test_a_full_pool_names_the_setting_of_ours(real_database: DatabaseInterface) -> None:
    alias = real_database.alias
    await real_database.close()
    with override_settings(ASYNC_SESSION={"POOLS": {alias: TINY}}):
        assert f'raise max_size in ASYNC_SESSION["POOLS"]["{alias}"],' in await exhausted(
            real_database
        )


async def test_a_full_pool_names_the_setting_of_django(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    db = databases["default"]
    await db.close()
    options = connections.settings["default"]["OPTIONS"]
    monkeypatch.setitem(options, "pool", TINY)
    assert 'raise max_size in DATABASES["default"]["OPTIONS"]["pool"],' in await exhausted(db)


async def test_a_full_pool_names_the_database_url() -> None:
    url = dsn_of_tests(pool_max_size=1, pool_timeout=0.05)
    said = await exhausted(DatabaseInterface.from_dsn(url, alias="own"))
    assert "raise max_size in the database URL (with the prefix pool_)," in said


async def test_too_many_who_wait_name_the_setting(real_database: DatabaseInterface) -> None:
    alias = real_database.alias
    await real_database.close()
    options = {"max_size": 1, "max_waiting": 1}
    with override_settings(ASYNC_SESSION={"POOLS": {alias: options}}):
        async with real_database.get_session() as session:
            await session.fetch_value("SELECT 1")
            waiting = [asyncio.create_task(real_database.ping()) for _ in range(2)]
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        with pytest.raises(TooManyWaiting, match=r'max_size in ASYNC_SESSION\["POOLS"\]'):
            await done.pop()
        await asyncio.gather(*waiting, return_exceptions=True)
        await real_database.close()


# Sync code of Django in async code


async def test_atomic_in_async_code_names_the_session_s(database: DatabaseInterface) -> None:
    with (
        pytest.raises(BlockingCallError, match=r"async with session\.atomic\(\)") as caught,
        transaction.atomic(database.alias),
    ):
        pass
    assert "thread" not in str(caught.value)
    assert isinstance(caught.value, SynchronousOnlyOperation)


async def test_a_coroutine_function_decorated_with_atomic_names_the_session_s() -> None:
    @transaction.atomic
    async def work() -> None: ...

    with pytest.raises(BlockingCallError, match=r"async with session\.atomic\(\)"):
        await work()


async def test_atomic_in_native_mode_names_the_session_s(database: DatabaseInterface) -> None:
    from django_asyncsession import native

    setting = {"ALIAS": database.alias, "NATIVE_ORM": True}
    with override_settings(ASYNC_SESSION=setting, MIDDLEWARE=[OURS]):
        async with database.get_session() as session, native.use(session):
            with (
                pytest.raises(BlockingCallError, match=r"async with session\.atomic\(\)"),
                transaction.atomic(database.alias),
            ):
                pass


async def test_on_commit_in_async_code_names_the_session_s() -> None:
    with pytest.raises(BlockingCallError, match=r"use session\.on_commit\(\)"):
        await sync_to_async(transaction.get_connection)()
        transaction.on_commit(lambda: None)


async def test_sync_orm_code_in_an_async_view_names_what_runs_it(
    database: DatabaseInterface,
) -> None:
    setting = {"ALIAS": database.alias}
    with (
        override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[OURS], ASYNC_SESSION=setting),
        pytest.raises(BlockingCallError) as caught,
    ):
        await AsyncClient().get(f"/orm/?alias={database.alias}")
    said = str(caught.value)
    assert "await session.run_sync(" in said and 'ASYNC_SESSION["NATIVE_ORM"]' in said
    assert "thread" not in said


def test_sync_code_without_a_loop_is_as_before(db: None) -> None:
    with transaction.atomic():
        assert Author.objects.count() == 0


# The sync test client


@override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[OURS])
class TestSyncClient(AsyncSessionTestCase):
    """In tests of a project."""

    async def test_in_an_async_test_it_names_the_async_one(self) -> None:
        with pytest.raises(SyncContextError, match=r"await self\.async_client\.get\("):
            self.client.get("/leave/x/")

    def test_in_a_sync_test_it_names_the_async_one(self) -> None:
        with pytest.raises(SyncContextError, match=r"await self\.async_client\.get\("):
            self.client.get("/leave/x/")

    async def test_in_a_thread_of_an_async_test_it_may_be_used(self) -> None:
        response = await sync_to_async(self.client.get)("/none/")
        assert response.status_code == 404


async def test_the_sync_client_in_an_async_function_names_the_async_one() -> None:
    with (
        override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[OURS]),
        pytest.raises(SyncContextError, match=r"AsyncClient\(\)"),
    ):
        Client().get("/leave/x/")


# The command line


def test_a_change_without_write_names_the_option(
    alias: str, empty_database: None, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CommandError, match=r"(?i)read.?only.*; --write allows changes"):
        call_command("asyncsql", "UPDATE tests_author SET name = 'x'", database=alias)


def test_other_refusals_do_not_name_it(alias: str, empty_database: None) -> None:
    with pytest.raises(CommandError) as caught:
        call_command("asyncsql", "SELECT nothing FROM nowhere", database=alias)
    assert "--write" not in str(caught.value)
