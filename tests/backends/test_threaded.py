"""A driver without an async mode works in a thread of each connection: shown with Django's plain
PostgreSQL backend, whose driver blocks.

On real connections, which are the point.
"""

from __future__ import annotations

import asyncio
import copy
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
from django.db import (
    DatabaseError,
    DataError,
    IntegrityError,
    OperationalError,
    connections,
    transaction,
)
from django.db.backends.dummy import base as dummy
from django.db.transaction import TransactionManagementError

from django_asyncsession.backends import threaded
from django_asyncsession.backends.engines import bridged_class
from django_asyncsession.exceptions import ConfigurationError, QueryTimeout, SessionClosedError
from django_asyncsession.interface import DatabaseInterface
from tests.faults import (
    Elapsed,
    LoopProbe,
    cancel_at,
    longest_stall,
    outcome_of,
    watchdog,
)
from tests.models import Author, User
from tests.sessions import INSERT, names, whole

pytestmark = pytest.mark.usefixtures("empty_tables")


@pytest.fixture(autouse=True)
def frozen_loops_end() -> Iterator[None]:
    with watchdog(100):
        yield


def driver_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("database ")]


def interface(max_size: int = 4) -> DatabaseInterface:
    settings_dict = copy.deepcopy(connections.settings["default"])
    settings_dict["ENGINE"] = "tests.threaded_postgresql"
    settings_dict["OPTIONS"] = {"pool": {"max_size": max_size, "timeout": 10}}
    return DatabaseInterface("default", settings_dict)


@pytest.fixture
async def db() -> AsyncIterator[DatabaseInterface]:
    db = interface()
    yield db
    await db.close()
    assert driver_threads() == []


async def running(db: DatabaseInterface, what: str) -> int:
    """How many statements of this text the server runs."""
    async with db.get_session(autocommit=True) as session:
        sql = (
            "SELECT count(*) FROM pg_stat_activity "
            "WHERE state = 'active' AND query LIKE %s AND query NOT LIKE '%%activity%%'"
        )
        return int(await session.fetch_value(sql, [what]))


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(5):
        while not await condition():
            await asyncio.sleep(0.01)


async def test_the_orm_works_in_transactions_and_nested_blocks(db: DatabaseInterface) -> None:
    def work() -> list[str]:
        Author.objects.create(name="one")
        with pytest.raises(IntegrityError), transaction.atomic():
            Author.objects.create(name="one")
        author, made = Author.objects.get_or_create(name="two")
        assert made and author.pk
        Author.objects.bulk_create([Author(name=f"more {n}") for n in range(5)])
        return [author.name for author in Author.objects.order_by("pk")]

    async with LoopProbe() as probe, db.get_session() as session:
        found = await session.run_sync(work)
        await session.add(User(name="heck"))
    assert found == ["one", "two", *(f"more {n}" for n in range(5))]
    assert await names(db) == ["heck"]
    assert probe.worst < longest_stall()
    with pytest.raises(ValueError):
        async with db.get_session() as session:
            await session.add(User(name="lost"))
            raise ValueError
    assert await names(db) == ["heck"]


async def test_a_thread_per_connection_and_none_after_close(db: DatabaseInterface) -> None:
    async def work() -> None:
        async with db.get_session() as session:
            await session.fetch_value("SELECT pg_sleep(0.01)")

    await asyncio.gather(*(work() for _ in range(20)))
    assert len(driver_threads()) == db.stats()["pool_size"] == 4
    await whole(db)


async def test_rows_stream_through_a_cursor_on_the_server(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        sql = "SELECT n FROM generate_series(1, 5000) AS n"
        assert [row[0] async for row in session.stream(sql)] == list(range(1, 5001))
        assert len(await session.fetch_all(sql)) == 5000
        async with await session.cursor(sql) as cursor:
            assert await cursor.fetch_row() == (1,)
            assert len(await cursor.fetch_many(2000)) == 2000
        await session.run_sync(User.objects.bulk_create, [User(name=str(n)) for n in range(50)])
        found = await session.run_sync(lambda: list(User.objects.iterator(chunk_size=7)))
        assert len(found) == 50


async def test_a_cancelled_statement_is_cancelled_on_the_server(db: DatabaseInterface) -> None:
    async def sleep() -> None:
        async with db.get_session() as session:
            await session.execute(INSERT, ["lost"])
            await session.execute("SELECT pg_sleep(60)")

    async def is_running() -> bool:
        return await running(db, "%pg_sleep(60)%") == 1

    async def has_ended() -> bool:
        return not await is_running()

    task = asyncio.create_task(sleep())
    await until(is_running)
    with Elapsed() as took:
        task.cancel()
        assert isinstance(await outcome_of(task), asyncio.CancelledError)
    assert took.seconds < 0.5
    await until(has_ended)
    assert await names(db) == []
    await whole(db)


async def test_cancelled_anywhere_it_is_all_or_nothing() -> None:
    async def operation(db: DatabaseInterface) -> None:
        async with db.get_session() as session:
            await session.execute(INSERT, ["one"])
            async with session.begin_nested():
                await session.execute(INSERT, ["two"])

    step, done = 1, False
    while not done:
        db = interface(max_size=1)
        before = len(await names(db))
        run = cancel_at(operation(db), {step})
        outcome = await outcome_of(run)
        done = run.done
        assert outcome is None if done else isinstance(outcome, asyncio.CancelledError)
        assert len(await names(db)) - before in ((2,) if done else (0, 2))
        await whole(db)
        await db.close()
        step += 1
    assert step > 4 and driver_threads() == []


async def test_a_timeout_cancels_the_statement(db: DatabaseInterface) -> None:
    with Elapsed() as took, pytest.raises(QueryTimeout):
        async with db.get_session(timeout=0.2) as session:
            await session.execute("SELECT pg_sleep(60)")
    assert took.seconds < 2
    async with db.get_session() as session:
        await session.execute("SELECT pg_sleep(0.3)")


async def test_a_failed_transaction_is_not_committed(db: DatabaseInterface) -> None:
    """The driver would answer COMMIT with a silent ROLLBACK."""

    def swallow() -> None:
        User.objects.create(name="lost")
        with pytest.raises(DataError), connections["default"].cursor() as cursor:
            cursor.execute("SELECT 1 / 0")

    with pytest.raises(TransactionManagementError):
        async with db.get_session() as session:
            await session.run_sync(swallow)
    assert await names(db) == []
    with pytest.raises(TransactionManagementError):
        async with db.get_session() as session:
            with pytest.raises(DatabaseError):
                await session.execute("SELECT 1 / 0")
            await session.execute(INSERT, ["lost"])
    assert await names(db) == []


async def test_what_changes_the_connection_ends_it_with_its_lease() -> None:
    db = interface(max_size=1)
    async with db.get_session() as session:
        await session.execute("SET search_path = pg_catalog")
    async with db.get_session() as session:
        assert await session.fetch_value("SHOW search_path") != "pg_catalog"
        await session.execute(INSERT, ["kept"])
    async with db.get_session() as session:
        await session.execute("CREATE TEMP TABLE left_over (n integer)")
    assert db.stats()["connections_num"] == 2
    with pytest.raises(DatabaseError, match="left_over"):
        async with db.get_session() as session:
            await session.execute("SELECT * FROM left_over")
    assert db.stats()["connections_num"] == 3
    await db.close()
    assert driver_threads() == []


@pytest.mark.parametrize(
    "options",
    [{"isolation": "serializable"}, {"read_only": True}, {"lock_timeout": 1.0}],
    ids=lambda options: next(iter(options)),
)
async def test_what_an_unknown_driver_cannot_be_asked_for_is_refused(
    db: DatabaseInterface, options: dict[str, Any]
) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options))):
        async with db.get_session(**options) as session:
            await session.fetch_value("SELECT 1")


async def test_a_killed_connection_is_an_error_and_replaced(db: DatabaseInterface) -> None:
    with pytest.raises((OperationalError, TransactionManagementError)):
        async with db.get_session() as session:
            await session.execute(INSERT, ["lost"])
            pid = await session.fetch_value("SELECT pg_backend_pid()")
            async with db.get_session(autocommit=True) as other:
                await other.fetch_value("SELECT pg_terminate_backend(%s)", [pid])
            await session.execute(INSERT, ["lost"])
    assert await names(db) == []
    await whole(db)


async def test_a_cursor_of_an_ended_session_is_refused(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        cursor = await session.run_sync(lambda: connections["default"].cursor())
    async with db.get_session() as session:
        await session.fetch_value("SELECT 1")
        with pytest.raises(SessionClosedError):
            await session.run_sync(lambda: cursor.execute("SELECT 1"))


def test_an_engine_that_nothing_is_known_of_is_bridged_by_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A third-party engine needs nothing of this package."""
    package, module = ModuleType("third_party"), ModuleType("third_party.base")
    kind = type(
        "DatabaseWrapper", (dummy.DatabaseWrapper.__mro__[1],), {"__module__": "third.base"}
    )
    module.DatabaseWrapper = kind  # type: ignore[attr-defined]
    package.__path__ = []
    monkeypatch.setitem(sys.modules, "third_party", package)
    monkeypatch.setitem(sys.modules, "third_party.base", module)
    bridged = bridged_class.__wrapped__("third_party")
    assert issubclass(bridged, threaded.Mixin) and issubclass(bridged, kind)
    assert not bridged.native_async
