"""Whatever is done on a connection that was lost raises Django's errors, not the driver's: every
operation, with the connection broken at each of its messages. On real pools, through a proxy.

SQLite has no messages; there each call of its driver fails.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from django.core.exceptions import ObjectDoesNotExist
from django.db import Error, connections, transaction

from django_asyncsession import DatabaseInterface
from django_asyncsession.backends.threaded import DriverThread
from tests.faults import CLIENT, RESET, RESET_AFTER, outcome_of, watchdog
from tests.models import User
from tests.sessions import INSERT, behind, pool

Operation = Callable[[DatabaseInterface], Awaitable[Any]]
ROWS = {
    "postgresql": "SELECT generate_series(1, 20)",
    "mysql": "SELECT seq FROM seq_1_to_20",
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000) "
    "SELECT i FROM n",
}
# More steps than any operation has.
STEPS = 60

# Django leaves a generator's cursor to be closed when the generator is collected, where an error of
# a lost connection can only be told of.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def _never_frozen() -> Iterator[None]:
    with watchdog(110):
        yield


async def statements(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        await session.execute(INSERT, ["a"])
        assert await session.fetch_all("SELECT name FROM tests_user")
        await session.execute_many(INSERT, [["b"], ["c"]])


async def savepoints(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        async with session.begin_nested():
            await session.execute(INSERT, ["a"])
        with contextlib.suppress(ZeroDivisionError):
            async with session.atomic():
                await session.execute(INSERT, ["b"])
                raise ZeroDivisionError
        async with session.begin_nested() as point:
            await session.execute(INSERT, ["c"])
            await point.rollback()


async def with_options(db: DatabaseInterface) -> None:
    options = {"isolation": "repeatable read", "timeout": 30, "lock_timeout": 30}
    async with db.get_session(**options) as session:
        await session.execute(INSERT, ["a"])


async def autocommit_with_options(db: DatabaseInterface) -> None:
    async with db.get_session(autocommit=True, timeout=30, read_only=False) as session:
        await session.fetch_value("SELECT 1")
        await session.execute(INSERT, ["a"])


async def stream_left_early(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        async with contextlib.aclosing(session.stream(ROWS[db.vendor], chunk_size=2)) as rows:
            async for _ in rows:
                break
        await session.fetch_value("SELECT 1")


async def stream_to_the_end(db: DatabaseInterface) -> None:
    async with db.get_session(autocommit=True) as session:
        async for _ in session.stream(ROWS[db.vendor], chunk_size=2):
            pass


async def query_streamed(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        await session.execute_many(INSERT, [["a"], ["b"], ["c"]])
        async with contextlib.aclosing(session.select(User).stream(chunk_size=1)) as rows:
            async for _ in rows:
                break


async def result_set(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        cursor = await session.cursor(ROWS[db.vendor])
        await cursor.fetch_many(3)
        await cursor.close()


async def sync_code(db: DatabaseInterface) -> None:
    def use() -> None:
        with transaction.atomic(using=db.alias):
            User.objects.using(db.alias).create(name="a")
            try:
                with transaction.atomic(using=db.alias):
                    raise ZeroDivisionError
            except ZeroDivisionError:
                pass
            assert list(User.objects.using(db.alias)[:3].iterator(chunk_size=1))
        with connections[db.alias].cursor() as cursor:
            cursor.execute("SELECT 1")
            cursor.fetchone()

    async with db.get_session() as session:
        await session.run_sync(use)


async def rows_of_models(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        user = User(name="a")
        await session.add(user)
        user.level = 3
        await session.add(user)
        await session.refresh(user)
        await session.remove(user)


async def reset_afterwards(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        await session.driver_connection()
        await session.execute(INSERT, ["a"])


async def schema(db: DatabaseInterface) -> None:
    async with db.get_ddl_session() as session:
        await session.get_tables()
        await session.get_columns("tests_user")


async def about_the_server(db: DatabaseInterface) -> None:
    await db.ping()
    await db.get_db_server_version()


async def connecting(db: DatabaseInterface) -> None:
    await db.close()
    async with db.get_session() as session:
        await session.fetch_value("SELECT 1")


async def in_parallel(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        await session.gather(session.select(User), session.select(User), limit=2)


OPERATIONS = (
    statements,
    savepoints,
    with_options,
    autocommit_with_options,
    stream_left_early,
    stream_to_the_end,
    query_streamed,
    result_set,
    sync_code,
    rows_of_models,
    reset_afterwards,
    schema,
    about_the_server,
    connecting,
    in_parallel,
)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
async def test_a_connection_lost_at_any_message_raises_an_error_of_djangos(
    real_database: DatabaseInterface, operation: Operation
) -> None:
    async with behind(real_database) as (proxy, far):
        with pool(real_database, max_size=3):
            await far.connect()
        for step in range(1, STEPS):
            left = step

            def hook(who: str, data: bytes) -> Any:
                nonlocal left
                if who != CLIENT or data[:1] == b"X":
                    return None
                left -= 1
                return RESET if left == 0 else None

            proxy.hook = hook
            outcome = await outcome_of(operation(far))
            proxy.hook = None
            errors = (Error, ObjectDoesNotExist)
            assert outcome is None or isinstance(outcome, errors), (step, repr(outcome))
            await outcome_of(far.ping())
            if left > 0:
                return
    pytest.fail(f"{operation.__name__} has more than {STEPS} messages")


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
async def test_a_connection_that_was_closed_between_two_calls_raises_an_error_of_djangos(
    real_database: DatabaseInterface, operation: Operation
) -> None:
    async with behind(real_database) as (proxy, far):
        with pool(real_database, max_size=3):
            await far.connect()
        for step in range(1, STEPS):
            left = step

            def hook(who: str, data: bytes) -> Any:
                # After the answer: the next call finds the connection closed.
                nonlocal left
                if who == CLIENT:
                    return None
                left -= 1
                return RESET_AFTER if left == 0 else None

            proxy.hook = hook
            outcome = await outcome_of(operation(far))
            proxy.hook = None
            errors = (Error, ObjectDoesNotExist)
            assert outcome is None or isinstance(outcome, errors), (step, repr(outcome))
            await outcome_of(far.ping())
            if left > 0:
                return
    pytest.fail(f"{operation.__name__} has more than {STEPS} messages")


@pytest.mark.parametrize("alias", ["sqlite"], indirect=True)
@pytest.mark.parametrize("done", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
async def test_a_call_of_sqlites_driver_that_fails_raises_an_error_of_djangos(
    real_database: DatabaseInterface,
    operation: Operation,
    done: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of its calls in turn, those that connect and those that end included: it has done
    nothing, or all of it."""
    call = DriverThread.call
    left = 0

    def failing(self: DriverThread, fn: Callable[[], Any], *args: Any) -> Any:
        nonlocal left
        left -= 1

        def fails() -> None:
            if done:
                fn()
            raise sqlite3.OperationalError("disk I/O error")

        return call(self, fails if left == 0 else fn, *args)

    monkeypatch.setattr(DriverThread, "call", failing)
    told = 0
    for step in range(1, STEPS):
        await real_database.close()
        left = step
        with pool(real_database, max_size=2):
            outcome = await outcome_of(operation(real_database))
        errors = (Error, ObjectDoesNotExist)
        assert outcome is None or isinstance(outcome, errors), (step, repr(outcome))
        told += outcome is not None
        if left > 0:
            assert told and outcome is None
            return
    pytest.fail(f"{operation.__name__} has more than {STEPS} calls")
