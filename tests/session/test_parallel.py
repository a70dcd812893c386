"""Reads at the same time: `session.gather()`. Real connections and real commits are its point."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from django.db import Error
from django.db.models import F
from django.db.models.expressions import RawSQL
from django.test import override_settings

from django_asyncsession import DatabaseInterface, Session, native
from django_asyncsession.exceptions import QueryTimeout, SessionInUseError, SessionStateError
from tests.faults import cancel_at, outcome_of
from tests.models import User
from tests.sessions import COUNT, INSERT, names, pool, slow, whole

only_postgresql = pytest.mark.parametrize("alias", ["default"], indirect=True, ids=["postgresql"])


async def connection_of(session: Session) -> int:
    """What tells one connection of the pool from another."""
    return id(await session.driver_connection()) if session.in_transaction else 0


class Together:
    """A read that returns its connection once so many of its kind are on their way."""

    def __init__(self, parties: int) -> None:
        self._barrier = asyncio.Barrier(parties)

    async def __call__(self, session: Session) -> int:
        found = await connection_of(session)
        await self._barrier.wait()
        return found


async def add(db: DatabaseInterface, name: str) -> None:
    async with db.get_session() as session:
        await session.execute(INSERT, (name,))


class Meanwhile:
    """Two reads that count the rows: the second after another session has saved one more."""

    def __init__(self, db: DatabaseInterface) -> None:
        self._db, self._saved = db, asyncio.Event()

    async def first(self, session: Session) -> int:
        count = await session.fetch_value(COUNT)
        await add(self._db, "meanwhile")
        self._saved.set()
        return int(count)

    async def second(self, session: Session) -> int:
        await self._saved.wait()
        return int(await session.fetch_value(COUNT))


@asynccontextmanager
async def holding(db: DatabaseInterface, **options: Any) -> Any:
    """A session that has a connection."""
    async with db.get_session(**options) as session:
        await session.fetch_value(COUNT)
        yield session


# What it returns


async def test_results_come_in_the_order_of_the_reads_whatever_they_are(
    real_database: DatabaseInterface,
) -> None:
    for name in ("Ada", "Bo"):
        await add(real_database, name)
    async with real_database.get_session() as session:
        found = await session.gather(
            session.select(User).where(name="Bo"),
            User.objects.order_by("name"),
            User.objects.order_by("name").values_list("name", flat=True),
            User.objects.raw("SELECT * FROM tests_user ORDER BY name DESC"),
            lambda s: s.fetch_value(COUNT),
            lambda s: s.run_sync(User.objects.using(real_database.alias).count),
            session.select(User).where(level=0),
        )
    bo, both, texts, backwards, *counts, nobody = found
    assert [user.name for user in bo] == ["Bo"]
    assert [user.name for user in both] == texts == ["Ada", "Bo"]
    assert [user.name for user in backwards] == ["Bo", "Ada"]
    assert (counts, nobody) == ([2, 2], [])
    await whole(real_database)


async def test_no_reads_have_no_results(real_database: DatabaseInterface) -> None:
    async with real_database.get_session() as session:
        assert await session.gather() == []


@pytest.mark.parametrize("autocommit", [False, True], ids=["transaction", "autocommit"])
async def test_reads_run_at_the_same_time_on_connections_of_their_own(
    real_database: DatabaseInterface, autocommit: bool
) -> None:
    read = Together(3)
    async with real_database.get_session(autocommit=autocommit) as session:
        assert len({*await session.gather(read, read, read)}) == 3
    await whole(real_database)


async def test_a_session_that_holds_a_connection_reads_with_the_others(
    real_database: DatabaseInterface,
) -> None:
    read = Together(3)
    async with holding(real_database) as session:
        own = await connection_of(session)
        found = await session.gather(read, read, read)
        assert len({*found}) == 3
        # READ COMMITTED keeps no snapshot that the others could see.
        assert (own in found) is (real_database.vendor != "postgresql")
    await whole(real_database)


@pytest.mark.parametrize("limit", [1, 2, 50])
async def test_no_more_than_the_limit_read_at_once(
    real_database: DatabaseInterface, limit: int
) -> None:
    running = most = 0

    async def read(session: Session) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await session.fetch_value(slow(real_database, 0.01))
        running -= 1

    async with real_database.get_session() as session:
        await session.gather(*[read] * 6, limit=limit)
    assert most <= min(limit, 6)
    assert real_database.stats()["pool_size"] <= limit
    await whole(real_database)


# One snapshot


@only_postgresql
@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize(
    "options",
    [{}, {"autocommit": True}, {"isolation": "repeatable read"}, {"isolation": "read committed"}],
    ids=str,
)
@pytest.mark.parametrize("holds", [False, True], ids=["not begun", "holding"])
async def test_all_reads_see_one_snapshot(
    real_database: DatabaseInterface, options: dict[str, Any], limit: int, holds: bool
) -> None:
    await add(real_database, "before")
    async with real_database.get_session(**options) as session:
        if holds:
            await session.fetch_value(COUNT)
        reads = Meanwhile(real_database)
        assert await session.gather(reads.first, reads.second, limit=limit) == [1, 1]
    assert await names(real_database) == ["before", "meanwhile"]
    await whole(real_database)


@only_postgresql
async def test_reads_see_what_a_repeatable_read_transaction_sees(
    real_database: DatabaseInterface,
) -> None:
    async with holding(real_database, isolation="repeatable read") as session:
        await add(real_database, "later")
        read = Together(2)
        counts = [lambda s: s.fetch_value(COUNT)] * 2
        found = await session.gather(read, read, *counts)
        assert await connection_of(session) in found[:2]
        assert found[2:] == [0, 0]
        assert await session.fetch_value(COUNT) == 0


@only_postgresql
async def test_reads_see_what_was_saved_before_in_a_read_committed_transaction(
    real_database: DatabaseInterface,
) -> None:
    async with holding(real_database) as session:
        await add(real_database, "later")
        assert await session.gather(lambda s: s.fetch_value(COUNT)) == [1]


@only_postgresql
async def test_the_isolation_level_is_the_servers_word(real_database: DatabaseInterface) -> None:
    async with real_database.get_session() as session:
        await session.execute("SHOW transaction_isolation")
        read = Together(2)
        assert await connection_of(session) not in await session.gather(read, read)
    async with real_database.get_session() as session:
        # Said in SQL, where no option of the session tells. It is a change of settings.
        await session.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        with pytest.raises(SessionStateError, match=r"locked or set \(SET\)"):
            await session.gather(read, read)


@only_postgresql
@pytest.mark.parametrize("isolation", ["serializable", "repeatable read"])
async def test_where_no_other_connection_sees_the_same_the_own_one_reads_alone(
    real_database: DatabaseInterface, isolation: str
) -> None:
    async def read(session: Session) -> int:
        return await connection_of(session)

    async with holding(real_database, isolation=isolation) as session, session.begin_nested():
        own = await connection_of(session)
        assert await session.gather(read, read, read) == [own] * 3


@only_postgresql
async def test_a_savepoint_made_by_name_is_a_nested_block_too(
    real_database: DatabaseInterface,
) -> None:
    async with holding(real_database, isolation="repeatable read") as session:
        assert session.transaction is not None
        await session.transaction.create_savepoint("here")
        assert await session.gather(lambda s: s.fetch_value(COUNT)) == [0]


async def test_reads_run_beside_a_nested_block(real_database: DatabaseInterface) -> None:
    read = Together(2)
    async with holding(real_database) as session, session.begin_nested():
        assert len({*await session.gather(read, read)}) == 2
    await whole(real_database)


# Writes


def changes() -> Iterator[Any]:
    async def add_row(session: Session) -> None:
        await session.add(User(name="new"))

    async def update(session: Session) -> None:
        await session.update(User).where(level=1).set(level=F("level") + 1)

    async def sync(session: Session) -> None:
        await session.run_sync(User.objects.using(session.alias).create, name="new")

    async def undone(session: Session) -> None:
        async with session.begin_nested() as block:
            await session.execute(INSERT, ("new",))
            await block.rollback()

    yield pytest.param(add_row, "INSERT", id="add")
    yield pytest.param(update, "UPDATE", id="update")
    yield pytest.param(sync, "INSERT", id="run_sync")
    yield pytest.param(undone, "INSERT", id="undone")


@pytest.mark.parametrize(("change", "word"), [*changes()])
async def test_a_transaction_that_has_written_refuses_and_goes_on(
    real_database: DatabaseInterface,
    change: Callable[[Session], Coroutine[Any, Any, None]],
    word: str,
) -> None:
    async with real_database.get_session() as session:
        await change(session)
        with pytest.raises(
            SessionStateError, match=rf"{real_database.alias!r}.*written.*\({word}\).*commit"
        ):
            await session.gather(User.objects.all())
        await session.commit()
        assert len((await session.gather(User.objects.all()))[0]) == len(await names(real_database))
    await whole(real_database)


@pytest.mark.parametrize("size", [1, 4])
async def test_callbacks_of_the_commit_read_what_is_saved(
    real_database: DatabaseInterface, size: int
) -> None:
    """They may write as well: each statement of theirs is saved at once."""
    counts: list[Any] = []
    reads = [User.objects.all(), lambda s: s.fetch_value(COUNT)]

    async def count() -> None:
        users, number = await session.gather(*reads)
        counts.append((len(users), number))

    async def count_and_write() -> None:
        await count()
        await session.execute(INSERT, ["in the callback"])
        await count()

    with pool(real_database, max_size=size):
        async with real_database.get_session() as session:
            await session.execute(INSERT, ["a"])
            session.on_commit(count_and_write)
        assert counts == [(1, 1), (2, 2)]
        await whole(real_database)


@only_postgresql
async def test_a_callback_of_the_commit_has_no_snapshot_of_its_own(
    real_database: DatabaseInterface,
) -> None:
    """Whatever the server's default level is."""
    results: list[Any] = []

    async def read() -> None:
        results.extend(await session.gather(*[lambda s: s.fetch_value(COUNT)] * 3))

    async with real_database.get_session() as session:
        await session.execute(
            "SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL REPEATABLE READ"
        )
        session.on_commit(read)
    assert results == [0, 0, 0]


@only_postgresql
@pytest.mark.parametrize(
    ("sql", "word"),
    [
        ("SET LOCAL search_path TO nowhere", "SET"),
        ("SELECT set_config('app.tenant', '7', true)", "SELECT"),
        ("SELECT * FROM tests_user FOR UPDATE", "SELECT"),
        ("CREATE TEMPORARY TABLE t (i int) ON COMMIT DROP", "CREATE"),
        # Nothing in its text tells that it takes a transaction id, as a function that writes does.
        ("SELECT txid_current()", "in a function, or with the driver"),
    ],
)
async def test_what_other_connections_would_not_have_is_refused(
    real_database: DatabaseInterface, sql: str, word: str
) -> None:
    async with real_database.get_session() as session:
        await session.execute(sql)
        with pytest.raises(SessionStateError, match=rf"\({word}\)"):
            await session.gather(User.objects.all())


@only_postgresql
async def test_copy_is_a_write(real_database: DatabaseInterface) -> None:
    def copy() -> None:
        from django.db import connection

        with (
            connection.cursor() as cursor,
            cursor.copy("COPY tests_user (name, level) FROM STDIN") as to,
        ):
            to.write_row(("copied", 1))

    async with real_database.get_session() as session:
        await session.run_sync(copy)
        with pytest.raises(SessionStateError, match=r"\(COPY\)"):
            await session.gather(User.objects.all())


@pytest.mark.parametrize("holds", [False, True], ids=["not begun", "holding"])
async def test_a_read_that_writes_is_refused(real_database: DatabaseInterface, holds: bool) -> None:
    async def write(session: Session) -> None:
        await session.execute(INSERT, ("written in a read",))

    session = real_database.get_session()
    with pytest.raises(Error, match=r"(?i)read.?only|is for reads") as raised:
        async with session:
            if holds:
                await session.fetch_value(COUNT)
            await session.gather(write, limit=1)
    # The session's own connection, where it is the first, can write.
    on_own = holds and real_database.vendor != "postgresql"
    assert isinstance(raised.value, SessionStateError) is on_own
    assert await names(real_database) == []
    await whole(real_database)


# The pool


@pytest.mark.parametrize("isolation", [None, "repeatable read"])
async def test_a_pool_of_one_connection_is_enough(
    real_database: DatabaseInterface, isolation: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    if real_database.vendor == "sqlite":
        isolation = None
    with pool(real_database, max_size=1, timeout=2):
        async with real_database.get_session(isolation=isolation) as session:
            assert await session.gather(*[lambda s: s.fetch_value(COUNT)] * 3) == [0, 0, 0]
        async with holding(real_database, isolation=isolation) as session:
            with caplog.at_level(logging.WARNING, "django_asyncsession"):
                assert await session.gather(*[lambda s: s.fetch_value(COUNT)] * 3) == [0, 0, 0]
        await whole(real_database)
    warned = [r.getMessage() for r in caplog.records if "one after the other" in r.getMessage()]
    assert len(warned) == (real_database.vendor == "postgresql" and isolation is None)


@pytest.mark.parametrize("size", [2, 3])
async def test_sessions_that_hold_all_connections_and_gather_do_not_wait_for_each_other(
    real_database: DatabaseInterface, size: int
) -> None:
    all_hold = asyncio.Barrier(size)

    async def request() -> list[Any]:
        # On SQLite one session at a time may write.
        async with holding(real_database, read_only=real_database.vendor == "sqlite") as session:
            await all_hold.wait()
            return await session.gather(*[lambda s: s.fetch_value(COUNT)] * 4)

    with pool(real_database, max_size=size, timeout=5):
        assert await asyncio.gather(*(request() for _ in range(size))) == [[0] * 4] * size
        await whole(real_database)


async def test_whoever_waits_for_a_connection_stops_when_nothing_is_left_to_read(
    real_database: DatabaseInterface,
) -> None:
    with pool(real_database, max_size=2, timeout=10):
        async with holding(real_database), real_database.get_session() as session:
            assert await session.gather(*[lambda s: s.fetch_value(COUNT)] * 4) == [0] * 4
            assert real_database.stats()["requests_waiting"] == 0
        await whole(real_database)


async def test_a_full_queue_of_the_pool_costs_speed_and_no_result(
    real_database: DatabaseInterface,
) -> None:
    with pool(real_database, max_size=2, max_waiting=1, timeout=10):
        async with holding(real_database), real_database.get_session() as session:
            assert await session.gather(*[lambda s: s.fetch_value(COUNT)] * 4) == [0] * 4
        await whole(real_database)


# Errors and cancellation


async def test_the_first_error_is_raised_and_the_other_reads_are_stopped(
    real_database: DatabaseInterface,
) -> None:
    stopped = begun = 0
    all_begun = asyncio.Event()

    async def endless(session: Session) -> None:
        nonlocal stopped, begun
        begun += 1
        if begun == 2:
            all_begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            stopped += 1
            raise

    async def wrong(session: Session) -> None:
        await all_begun.wait()
        await session.fetch_value("SELECT * FROM no_such_table")

    async with real_database.get_session() as session:
        with pytest.raises(Exception, match="no_such_table"):
            await session.gather(wrong, endless, endless, User.objects.all(), limit=3)
        assert stopped == 2
        assert await session.fetch_value(COUNT) == 0
    await whole(real_database)


async def test_an_error_elsewhere_leaves_the_sessions_own_connection_as_it_was(
    real_database: DatabaseInterface,
) -> None:
    failed = asyncio.Event()

    async def own(session: Session) -> Any:
        await failed.wait()
        return await session.fetch_value(COUNT)

    async def wrong(session: Session) -> None:
        failed.set()
        raise LookupError("of a read")

    isolation = "repeatable read" if real_database.vendor == "postgresql" else None
    async with holding(real_database, isolation=isolation) as session:
        connection = await connection_of(session)
        with pytest.raises(LookupError, match="of a read"):
            await session.gather(own, wrong, own)
        assert await connection_of(session) == connection
        await session.execute(INSERT, ("after",))
    assert await names(real_database) == ["after"]
    await whole(real_database)


async def test_a_read_that_was_cancelled_from_within_is_not_a_result(
    real_database: DatabaseInterface,
) -> None:
    async def read(session: Session) -> None:
        raise asyncio.CancelledError

    async def gather() -> None:
        async with real_database.get_session() as session:
            await session.gather(User.objects.all(), read)

    assert isinstance(await outcome_of(gather()), asyncio.CancelledError)
    await whole(real_database)


@pytest.mark.parametrize("holds", [False, True], ids=["not begun", "holding"])
async def test_a_cancellation_at_any_await_leaves_the_pool_whole(
    real_database: DatabaseInterface, holds: bool
) -> None:
    async def work() -> list[Any]:
        async with real_database.get_session() as session:
            if holds:
                await session.fetch_value(COUNT)
            return await session.gather(*[lambda s: s.fetch_value(COUNT)] * 3, limit=2)

    step, done = 0, False
    while not done:
        step += 1
        tries = cancel_at(work(), {step})

        async def attempt(tries: Any = tries) -> Any:
            return await tries

        outcome = await outcome_of(attempt())
        done = tries.done
        assert outcome == [0, 0, 0] if done else isinstance(outcome, asyncio.CancelledError)
        await whole(real_database)
        assert not [t for t in asyncio.all_tasks() if "_read_on_another" in repr(t)]
    assert step > 2


async def test_the_time_limit_of_the_session_holds_for_each_read(
    real_database: DatabaseInterface,
) -> None:
    async with real_database.get_session(timeout=0.2) as session:
        with pytest.raises(QueryTimeout):
            await session.gather(lambda s: s.fetch_value(slow(real_database, 5)))
    await whole(real_database)


async def test_a_read_that_uses_the_session_itself_is_told_so(
    real_database: DatabaseInterface,
) -> None:
    meet = asyncio.Barrier(2)

    async def read(_: Session) -> Any:
        await meet.wait()
        return await session.fetch_value(COUNT)

    async with holding(real_database) as session:
        with pytest.raises(SessionInUseError, match="a session of its own"):
            await session.gather(read, read)
        assert await session.fetch_value(COUNT) == 0
    await whole(real_database)


# Native mode


@only_postgresql
async def test_djangos_own_methods_in_a_read_run_on_its_connection(
    real_database: DatabaseInterface,
) -> None:
    await add(real_database, "Ada")

    async def read(session: Session) -> tuple[str, bool]:
        await meet.wait()
        row = await User.objects.annotate(pid=RawSQL("pg_backend_pid()", ())).aget()
        return row.name, row.pid == await session.fetch_value("SELECT pg_backend_pid()")

    meet = asyncio.Barrier(2)
    with override_settings(ASYNC_SESSION={"NATIVE_ORM": True}):
        async with real_database.get_session() as session, native.use(session):
            assert await session.gather(read, read) == [("Ada", True)] * 2
            assert (await User.objects.aget()).name == "Ada"
    await whole(real_database)
