"""Slow statements and sessions that keep their connection are logged: once, with where and what,
and with nothing of the values. On real connections, where a statement can be cut or a session be
left waiting."""

from __future__ import annotations

import asyncio
import gc
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from django.db import DatabaseError
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.test import AsyncClient, override_settings
from django.urls import path

from django_asyncsession import (
    DatabaseInterface,
    Session,
    background_session,
    databases,
    inject_session,
)
from django_asyncsession.bridge import await_
from django_asyncsession.native.sessions import SessionSet
from tests.models import User
from tests.sessions import slow

OURS = "django_asyncsession.middleware.AsyncSessionMiddleware"
OF_TEST = re.compile("SAVEPOINT|SET CONSTRAINTS|foreign_key_check")
SLOW, LEAKS = "django_asyncsession.slow", "django_asyncsession.leaks"


def messages(caplog: pytest.LogCaptureFixture, logger: str) -> list[str]:
    """What was logged; not of what stands for a transaction in a test."""
    found = [r.getMessage() for r in caplog.records if r.name == logger]
    return [text for text in found if not OF_TEST.search(text)]


def slow_from(seconds: float | None, db: DatabaseInterface, **more: object) -> override_settings:
    return override_settings(
        ASYNC_SESSION={"SLOW_QUERY_SECONDS": seconds, "ALIAS": db.alias, **more}
    )


# Slow statements


async def test_a_slow_statement_is_logged_once_with_where_it_was_sent(
    database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    with slow_from(0.0, database):
        async with database.get_session() as session:
            await session.fetch_value("SELECT 'a secret' -- and a comment")
    (said,) = messages(caplog, SLOW)
    assert re.match(rf"a statement on '{database.alias}' took \d\.\d{{3}} s, sent at ", said)
    assert f"{__file__}:" in said and " in test_a_slow_statement_is_logged_once" in said
    assert said.endswith(": SELECT ?") and "secret" not in said
    record = next(r for r in caplog.records if r.getMessage() == said)
    assert (record.alias, record.sql) == (database.alias, "SELECT ?")  # type: ignore[attr-defined]


async def test_only_what_took_longer_is_logged(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    """The same statement, of some tenths of a second, with two limits."""
    await real_database.ping()
    with slow_from(0.1, real_database):
        async with real_database.get_session() as session:
            await session.fetch_all(slow(real_database))
    with slow_from(60.0, real_database):
        async with real_database.get_session() as session:
            await session.fetch_all(slow(real_database))
    said = [text for text in messages(caplog, SLOW) if " in test_only_what_took" in text]
    # The end of a transaction may take long as well, on a busy machine.
    assert len([text for text in said if not text.endswith(": COMMIT")]) == 1


@pytest.mark.parametrize("autocommit", [False, True])
async def test_every_way_to_send_a_statement_is_seen(
    autocommit: bool, database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    """ORM, raw, several, streamed, in sync code: each once, and each at its own line."""
    insert = "INSERT INTO tests_user (name, level) VALUES (%s, 1)"
    with slow_from(0.0, database):
        async with database.get_session(autocommit=autocommit) as session:
            await session.select(User).where(name="x")
            await session.execute_many(insert, [["a"], ["b"]])
            async for _ in session.stream("SELECT 2"):
                pass
            await session.run_sync(User.objects.using(database.alias).count)
    said = messages(caplog, SLOW)
    assert len([m for m in said if __file__ in m]) == len(said) == 4
    words = [m.rpartition(": ")[2].split()[0] for m in said]
    assert words == ["SELECT", "INSERT", "SELECT", "SELECT"]


async def test_statements_of_other_tasks_name_no_line_of_who_runs_the_loop(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    """Those of gather() name who gathers; of a task with no line of the project's in it, nothing is
    known."""
    await real_database.ping()
    with slow_from(0.0, real_database):
        async with real_database.get_session() as session:
            await session.gather(*(lambda s: s.fetch_value("SELECT 1") for _ in range(3)))
            task = asyncio.create_task(session.fetch_value("SELECT 1 AS a"), name="the one")
            await task
    said = [text for text in messages(caplog, SLOW) if "SELECT ?" in text]
    assert [" in test_statements_of_other_tasks" in text for text in said] == [True] * 3 + [False]
    assert "sent at an unknown line of 'the one': SELECT ? AS a" in said[-1]


async def test_a_statement_that_fails_or_is_cut_is_logged(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    with slow_from(0.0, real_database):
        with pytest.raises(DatabaseError):
            async with real_database.get_session() as session:
                await session.fetch_value("SELECT 5 FROM nowhere_at_all")
        with pytest.raises(TimeoutError):
            async with real_database.get_session() as session, asyncio.timeout(0.05):
                await session.fetch_all(slow(real_database))
    failed = [m for m in messages(caplog, SLOW) if "failed after" in m]
    assert len(failed) == 2 and failed[0].endswith("SELECT ? FROM nowhere_at_all")


async def test_a_long_statement_is_cut(
    database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    with slow_from(0.0, database):
        async with database.get_session() as session:
            columns = ", ".join(f"1 AS {'a' * 50}{number}" for number in range(60))
            await session.fetch_value(f"SELECT {columns}")
    (said,) = messages(caplog, SLOW)
    assert 1900 < len(said.partition("SELECT")[2]) < 2048


async def test_reading_rows_counts_as_the_statement(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    """Each chunk takes less than the limit, all of them more: a stream is one statement."""
    rows = {
        "postgresql": "SELECT pg_sleep(0.15) FROM generate_series(1, 4)",
        "mysql": "SELECT sleep(0.15) FROM (SELECT 1 UNION SELECT 2 UNION SELECT 3) t",
        "sqlite": slow(real_database),
    }
    with slow_from(0.3 if real_database.vendor != "sqlite" else 0.1, real_database):
        async with real_database.get_session() as session:
            async for _ in session.stream(rows[real_database.vendor], chunk_size=1):
                pass
    (said,) = (text for text in messages(caplog, SLOW) if "SELECT" in text)
    assert f"{__file__}:" in said and " in test_reading_rows" in said


@pytest.mark.parametrize("saves", [True, False])
async def test_the_end_of_a_transaction_is_a_statement(
    saves: bool, real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    with slow_from(0.0, real_database):
        async with real_database.get_session() as session:
            await session.fetch_value("SELECT 1")
            await (session.commit() if saves else session.rollback())
    while_connecting = ", sent at the opening of a connection: "
    _, said = (text for text in messages(caplog, SLOW) if while_connecting not in text)
    assert " in test_the_end_of_a_transaction" in said
    assert said.endswith(": COMMIT" if saves else ": ROLLBACK")


async def test_what_ends_with_the_request_names_no_line_of_the_server(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        slow_from(0.0, real_database),
        override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[OURS]),
    ):
        await AsyncClient().get("/read/")
    said = messages(caplog, SLOW)[-1]
    assert said.endswith(", sent at the end of the session for request GET '/read/': COMMIT")


async def test_by_default_nothing_is_logged(
    database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    with slow_from(None, database):
        async with database.get_session() as session:
            await session.fetch_value("SELECT 1")
    assert not messages(caplog, SLOW)


# In a request


async def of_its_own(request: HttpRequest) -> HttpResponse:
    async with databases[request.GET["alias"]].get_session() as session:
        return HttpResponse(str(await session.fetch_value("SELECT 1")))


async def stream(request: HttpRequest) -> StreamingHttpResponse:
    async def body() -> AsyncIterator[str]:
        yield str(await request.db_session.fetch_value("SELECT 1"))  # type: ignore[attr-defined]

    return StreamingHttpResponse(body())


async def read(request: HttpRequest) -> HttpResponse:
    return HttpResponse(str(await request.db_session.fetch_value("SELECT 1")))  # type: ignore[attr-defined]


urlpatterns = [path("read/", read), path("own/", of_its_own), path("stream/", stream)]


@pytest.mark.parametrize("url", ["/own/", "/stream/"])
@pytest.mark.parametrize("native", [False, True])
async def test_the_request_is_named(
    native: bool, url: str, database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    """Also of a session that the view made itself, and of the body that is sent after the view."""
    more = {"NATIVE_ORM": native}
    caplog.set_level(logging.WARNING)

    async def visit() -> None:
        response = await AsyncClient().get(f"{url}?alias={database.alias}")
        if response.streaming:
            assert [part async for part in response] == [b"1"]

    with (
        slow_from(0.0, database, **more),
        override_settings(ROOT_URLCONF=__name__, MIDDLEWARE=[OURS]),
    ):
        # As a server does: in a task of its own.
        await asyncio.create_task(visit())
        async with database.get_session() as session:
            await session.fetch_value("SELECT 2")
    first, second = messages(caplog, SLOW)
    assert f" for request GET '{url}': SELECT ?" in first
    assert " for request" not in second


# Sessions that keep their connection


async def leak_of(db: DatabaseInterface, caplog: pytest.LogCaptureFixture) -> list[str]:
    """What is said until something is."""
    async with asyncio.timeout(20):
        while not (said := messages(caplog, LEAKS)):
            await asyncio.sleep(0.01)
    return said


async def test_a_session_that_keeps_its_connection_is_logged_once(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    """With where it was made, where its task waits now, and its last statement."""
    released = asyncio.Event()

    async def waits_for_something_else() -> None:
        await released.wait()

    async def holds() -> None:
        async with real_database.get_session() as session:
            await session.fetch_value("SELECT 'a secret'")
            await waits_for_something_else()

    await real_database.close()
    # Long enough for the statement on a busy machine, so that it is the wait that is logged.
    setting = {"LEAK_WARNING_SECONDS": 1.0}
    with override_settings(ASYNC_SESSION=setting):
        task = asyncio.create_task(holds(), name="holder")
        await leak_of(real_database, caplog)
        # Some rounds of the watch, in which it is not said again.
        await asyncio.sleep(0.6)
        released.set()
        await task
        await real_database.close()
    (said,) = messages(caplog, LEAKS)
    assert re.search(
        rf"a session of '{real_database.alias}' made at .*test_observe.* in holds", said
    )
    assert "in task 'holder', which waits at " in said
    assert re.search(r" in holds > .* in waits_for_something_else > .* in wait; last", said)
    assert said.endswith("last statement: SELECT ?")


async def waits_in_a_context(session: Session, released: asyncio.Event) -> None:
    @asynccontextmanager
    async def lock() -> AsyncIterator[None]:
        await session.fetch_value("SELECT 1")
        await released.wait()
        yield

    async with lock():
        pass


async def waits_in_a_generator(session: Session, released: asyncio.Event) -> None:
    async def parts() -> AsyncIterator[int]:
        yield int(await session.fetch_value("SELECT 1"))
        await released.wait()

    async for _ in parts():
        pass


async def waits_in_sync_code(session: Session, released: asyncio.Event) -> None:
    def deeper() -> None:
        await_(released.wait())

    def sync() -> None:
        User.objects.using(session.alias).count()
        deeper()

    await session.run_sync(sync)


async def waits_in_native_mode(session: Session, released: asyncio.Event) -> None:
    def sync() -> None:
        User.objects.using(session.alias).count()
        await_(released.wait())

    await SessionSet(session, keep_others=True).run(sync)


@pytest.mark.parametrize(
    ("waits", "inner"),
    [
        (waits_in_a_context, "lock"),
        (waits_in_a_generator, "parts"),
        (waits_in_sync_code, "sync > .* in deeper"),
        (waits_in_native_mode, "sync"),
    ],
)
async def test_the_line_that_waits_is_named_wherever_it_is(
    waits: Callable[[Session, asyncio.Event], Awaitable[None]],
    inner: str,
    real_database: DatabaseInterface,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Behind `async with`, `async for` and sync code, where a task's own stack ends."""
    released = asyncio.Event()
    await real_database.close()

    async def holds() -> None:
        async with real_database.get_session() as session:
            await waits(session, released)

    with override_settings(ASYNC_SESSION={"LEAK_WARNING_SECONDS": 1.0}):
        task = asyncio.create_task(holds())
        (said,) = await leak_of(real_database, caplog)
        released.set()
        await task
        await real_database.close()
    assert re.search(
        rf" in holds > .* in {waits.__name__} > .* in {inner} > .* in wait; last", said
    )
    assert "django_asyncsession" not in said.partition("waits at")[2]
    assert "last statement: SELECT" in said


async def test_a_session_that_a_child_task_used_names_the_task_that_made_it(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    """The child has ended, as those of gather() and wait_for() have, and the session has not."""
    released = asyncio.Event()
    await real_database.close()

    async def holds() -> None:
        async with real_database.get_session() as session:
            await asyncio.gather(session.fetch_value("SELECT 1"))
            await released.wait()

    with override_settings(ASYNC_SESSION={"LEAK_WARNING_SECONDS": 1.0}):
        task = asyncio.create_task(holds())
        (said,) = await leak_of(real_database, caplog)
        released.set()
        await task
        await real_database.close()
    assert re.search(
        r", which has ended; the task that made it waits at .* in holds > .* in wait; last", said
    )


@background_session
async def in_the_background(session: Session, released: asyncio.Event) -> None:
    await session.fetch_value("SELECT 1")
    await released.wait()


@inject_session
async def injected(released: asyncio.Event, session: Session) -> None:
    await session.fetch_value("SELECT 1")
    await released.wait()


@pytest.mark.parametrize("function", [in_the_background, injected])
async def test_a_session_of_a_decorator_names_the_function(
    function: Callable[..., Awaitable[None]],
    real_database: DatabaseInterface,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """In a task of its own no line of the project's has made it."""
    released = asyncio.Event()
    await real_database.close()
    setting = {"LEAK_WARNING_SECONDS": 0.1, "ALIAS": real_database.alias}
    with override_settings(ASYNC_SESSION=setting):
        task = asyncio.ensure_future(function(released=released))
        (said,) = await leak_of(real_database, caplog)
        released.set()
        await task
        await real_database.close()
    assert re.search(rf"made at {__file__}:\d+ in {function.__name__} holds", said)


async def test_a_session_that_ends_in_time_is_not_logged(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    await real_database.close()
    with override_settings(ASYNC_SESSION={"LEAK_WARNING_SECONDS": 30}):
        assert await real_database.ping() >= 0
        await real_database.close()
    assert not messages(caplog, LEAKS)


async def test_the_watch_keeps_no_session_and_no_pool_alive(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    await real_database.close()
    with override_settings(ASYNC_SESSION={"LEAK_WARNING_SECONDS": 0.02}):
        session = real_database.get_session()
        await session.begin()
        await session.fetch_value("SELECT 1")
        await leak_of(real_database, caplog)
        with pytest.warns(ResourceWarning, match="never"):
            del session
            gc.collect()
        assert not real_database.pool().leases
        await real_database.close()
