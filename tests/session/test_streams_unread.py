"""Streams that nobody reads give their connection back. On real pools, whose connections they
keep."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from django.http import StreamingHttpResponse
from django.test import override_settings

from django_asyncsession import DatabaseInterface, Session
from django_asyncsession.exceptions import ConfigurationError, SessionStateError, StreamTimeout
from django_asyncsession.scope import RequestScope
from tests.faults import outcome_of, watchdog
from tests.models import User
from tests.sessions import INSERT, names, soon, whole
from tests.test_shutdown import get, served

STREAMS: dict[str, Callable[[Session], AsyncIterator[Any]]] = {
    "sql": lambda session: session.stream("SELECT name FROM tests_user ORDER BY 1", chunk_size=1),
    "query": lambda session: session.select(User).order_by("name").stream(chunk_size=1),
    "stream of a query": lambda session: session.stream(session.select(User).order_by("name")),
}


@pytest.fixture(autouse=True)
def _never_frozen() -> Iterator[None]:
    with watchdog(60):
        yield


@contextmanager
def limit(db: DatabaseInterface, seconds: Any, **more: Any) -> Iterator[None]:
    """STREAM_TIMEOUT, with a pool of one connection."""
    pools = {db.alias: {"max_size": 1, "timeout": 10}}
    with override_settings(
        ASYNC_SESSION={"ALIAS": db.alias, "STREAM_TIMEOUT": seconds, "POOLS": pools, **more}
    ):
        yield


async def fill(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        await session.execute_many(INSERT, [["a"], ["b"], ["c"]])


def is_free(db: DatabaseInterface) -> Callable[[], bool]:
    return lambda: db.stats()["pool_available"] == db.stats()["pool_size"]


@pytest.mark.parametrize("autocommit", [False, True])
@pytest.mark.parametrize("stream", STREAMS)
async def test_a_stream_left_unread_gives_its_connection_back_and_tells_its_reader(
    real_database: DatabaseInterface, stream: str, autocommit: bool
) -> None:
    with limit(real_database, 0.3):
        await fill(real_database)
        session = await real_database.get_session(autocommit=autocommit).begin()
        rows = STREAMS[stream](session)
        await anext(rows)
        assert not is_free(real_database)()
        assert await soon(is_free(real_database))
        assert await names(real_database) == ["a", "b", "c"], "another session can go on"
        with pytest.raises(StreamTimeout, match=r"STREAM_TIMEOUT"):
            await anext(rows)
        await session.close()
        await whole(real_database)


async def test_what_the_transaction_of_an_unread_stream_wrote_is_rolled_back(
    real_database: DatabaseInterface,
) -> None:
    with limit(real_database, 0.3):
        await fill(real_database)
        session = await real_database.get_session().begin()
        await session.execute(INSERT, ["d"])
        rows = STREAMS["sql"](session)
        await anext(rows)
        assert await soon(is_free(real_database))
        assert isinstance(await outcome_of(session.commit()), SessionStateError)
        await session.close()
        assert await names(real_database) == ["a", "b", "c"]


@pytest.mark.parametrize("stream", STREAMS)
async def test_a_reader_that_is_slow_but_comes_back_is_served_to_the_end(
    real_database: DatabaseInterface, stream: str
) -> None:
    with limit(real_database, 1):
        await fill(real_database)
        async with real_database.get_session() as session:
            count = 0
            async for _ in STREAMS[stream](session):
                count += 1
                await asyncio.sleep(0.5)
            assert count == 3


async def test_a_fetch_that_takes_long_is_no_pause_of_the_reader(
    real_database: DatabaseInterface,
) -> None:
    sql = {
        "postgresql": "SELECT pg_sleep(0.4) FROM generate_series(1, 3)",
        "mysql": "SELECT SLEEP(0.4) FROM seq_1_to_3",
    }.get(real_database.vendor)
    if sql is None:
        pytest.skip("SQLite has no sleep")
    with limit(real_database, 0.2):
        async with real_database.get_session() as session:
            assert len([row async for row in session.stream(sql, chunk_size=1)]) == 3


async def test_without_a_limit_a_stream_is_kept(real_database: DatabaseInterface) -> None:
    with limit(real_database, None):
        await fill(real_database)
        async with real_database.get_session() as session:
            rows = STREAMS["sql"](session)
            await anext(rows)
            await asyncio.sleep(0.5)
            assert len([row async for row in rows]) == 2


@pytest.mark.parametrize("seconds", [0, -1, float("inf"), float("nan"), "60", True])
async def test_a_limit_that_is_no_time_is_refused(
    real_database: DatabaseInterface, seconds: Any
) -> None:
    with limit(real_database, seconds), pytest.raises(ConfigurationError, match="STREAM_TIMEOUT"):
        async with real_database.get_session() as session:
            await anext(STREAMS["sql"](session))


async def test_aiterator_left_unread_gives_its_connection_back(
    real_database: DatabaseInterface,
) -> None:
    with limit(real_database, 0.3, NATIVE_ORM=True):
        await fill(real_database)
        with pytest.raises(StreamTimeout, match="was rolled back"):
            async with RequestScope(real_database.get_session(begin_on_use=True)):
                rows = aiter(User.objects.using(real_database.alias).aiterator(chunk_size=1))
                await anext(rows)
                assert await soon(is_free(real_database))
                with pytest.raises(StreamTimeout, match="was not read for"):
                    await anext(rows)
                await rows.aclose()  # type: ignore[attr-defined]


async def test_a_streaming_response_left_unread_is_ended_and_rolled_back(
    real_database: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    closed = asyncio.Event()

    async def parts(session: Any) -> AsyncIterator[bytes]:
        try:
            await session.execute(INSERT, ["a"])
            while True:
                yield b"part"
        finally:
            closed.set()

    with limit(real_database, 0.3):
        scope = RequestScope(real_database.get_session(begin_on_use=True))
        async with scope:
            response = scope.keep_for(StreamingHttpResponse(parts(scope.session)))
        body = aiter(response)
        assert await anext(body) == b"part"
        assert await soon(is_free(real_database))
        await closed.wait()
        assert "left unread" in caplog.text
        with pytest.raises(StreamTimeout, match="a streaming response was not read for"):
            await anext(body)
        assert await names(real_database) == []


async def test_a_response_that_is_read_is_not_ended(real_database: DatabaseInterface) -> None:
    async def parts(session: Any) -> AsyncIterator[bytes]:
        await session.execute(INSERT, ["a"])
        for _ in range(3):
            yield b"part"

    read: list[bytes] = []
    with limit(real_database, 1):
        scope = RequestScope(real_database.get_session(begin_on_use=True))
        async with scope:
            response = scope.keep_for(StreamingHttpResponse(parts(scope.session)))
        async for part in response:
            read.append(part)
            await asyncio.sleep(0.5)
    assert read == [b"part"] * 3
    assert await names(real_database) == ["a"]


@pytest.mark.parametrize("native", [False, True])
async def test_a_request_that_left_a_stream_unread_does_not_end_as_if_it_had_saved(
    real_database: DatabaseInterface, native: bool
) -> None:
    with limit(real_database, 0.3, NATIVE_ORM=native):
        await fill(real_database)
        session = real_database.get_session(begin_on_use=True)
        with pytest.raises(StreamTimeout, match="was rolled back, because a stream"):
            async with RequestScope(session):
                await session.execute(INSERT, ["d"])
                rows = STREAMS["sql"](session)
                await anext(rows)
                assert await soon(is_free(real_database))
        assert await names(real_database) == ["a", "b", "c"]


async def test_a_session_that_left_a_stream_unread_does_not_end_as_if_it_had_saved(
    real_database: DatabaseInterface,
) -> None:
    with limit(real_database, 0.3):
        await fill(real_database)
        with pytest.raises(StreamTimeout, match="was rolled back, because a stream"):
            async with real_database.get_session() as session:
                await session.execute(INSERT, ["d"])
                rows = STREAMS["sql"](session)
                await anext(rows)
                assert await soon(is_free(real_database))
        assert await names(real_database) == ["a", "b", "c"]


async def test_a_block_of_autocommit_that_left_a_stream_unread_does_not_end_as_if_it_had_saved(
    real_database: DatabaseInterface,
) -> None:
    with limit(real_database, 0.3):
        await fill(real_database)
        session = await real_database.get_session(autocommit=True).begin()
        with pytest.raises(StreamTimeout, match="was rolled back, because a stream"):
            async with session.atomic():
                await session.execute(INSERT, ["d"])
                rows = STREAMS["sql"](session)
                await anext(rows)
                assert await soon(is_free(real_database))
        await session.close()
        assert await names(real_database) == ["a", "b", "c"]


async def test_a_view_that_left_a_stream_unread_is_answered_with_an_error(
    real_database: DatabaseInterface,
) -> None:
    await fill(real_database)
    served_with = {"SERVED_STREAM_TIMEOUT": "0.5"}
    async with served(real_database.alias, "application", env=served_with) as (port, _):
        answer = await get(port, "/leave")
    assert answer.startswith(b"HTTP/1.1 500 "), answer[:200]
    assert await names(real_database) == ["a", "b", "c"]


async def test_a_client_that_does_not_read_keeps_no_transaction(
    real_database: DatabaseInterface,
) -> None:
    served_with = {"SERVED_STREAM_TIMEOUT": "0.5"}
    async with served(real_database.alias, "application", env=served_with) as (port, _):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1000)
        writer.write(b"GET /stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")

        async def can_be_locked() -> bool:
            # As long as another transaction has written, this waits or is refused.
            sql = {"postgresql": "LOCK TABLE tests_user IN ACCESS EXCLUSIVE MODE NOWAIT"}
            default = "DELETE FROM tests_user"
            if real_database.vendor == "mysql":
                default = "ALTER TABLE tests_user COMMENT 'locked'"
            session = await real_database.get_session(lock_timeout=1).begin()
            outcome = await outcome_of(session.execute(sql.get(real_database.vendor, default)))
            await session.close()
            return not isinstance(outcome, Exception)

        assert await soon(can_be_locked, 20)
        assert await names(real_database) == []
        writer.transport.abort()
