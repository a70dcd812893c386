"""PostgreSQL: sessions at the same time, sessions that nobody resumes, and the loop meanwhile.

On real connections, which are the point.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from django.db import (
    Error,
    IntegrityError,
    transaction,
)

from django_asyncsession import DatabaseInterface, Session, bridge
from tests.backends.postgresql.pools import interface, pid_of
from tests.faults import (
    Elapsed,
    FaultProxy,
    LoopProbe,
    OwnServer,
    address,
    outcome_of,
)
from tests.models import Author, User
from tests.postgres import ask, gone, sessions_of

# Really async


async def test_a_hundred_sessions_sleep_at_the_same_time_and_no_thread_is_started(
    own_server: OwnServer,
) -> None:
    db = DatabaseInterface.from_dsn(own_server.dsn() + "?pool_max_size=100", alias="own")
    leases = await asyncio.gather(*(db.acquire() for _ in range(100)))
    for lease in leases:
        lease.release()
    threads = threading.active_count()

    async def sleep() -> None:
        async with db.get_session() as session:
            await session.execute("SELECT pg_sleep(0.3)")

    times = []
    for _ in range(3):
        with Elapsed() as took:
            await asyncio.gather(*(sleep() for _ in range(100)))
        times.append(took.seconds)
    assert min(times) < 1, "one after the other they need 30"
    assert threading.active_count() == threads
    await db.close()


async def test_an_abandoned_connection_is_replaced_while_a_slow_link_delays_nobody_else(
    name: str,
) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        interface(name, host="127.0.0.1", port=proxy.port, pool_max_size=2) as db,
    ):
        await asyncio.gather(db.ping(), db.ping())
        proxy.delay = 0.1
        async with LoopProbe() as probe:
            with Elapsed() as took:
                await asyncio.gather(db.ping(), db.ping())
        proxy.delay = 0
        assert 0.2 < took.seconds < 0.6 and probe.worst < 0.1


async def test_the_answer_may_come_in_single_bytes(name: str) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        interface(name, host="127.0.0.1", port=proxy.port, pool_max_size=1) as db,
    ):
        proxy.chunk = 1
        async with db.get_session() as session:
            assert await session.fetch_value("SELECT repeat('x', 500)") == "x" * 500
        proxy.chunk = 65536


# Nobody resumes it


async def suspended_session(db: DatabaseInterface, session: Session) -> Any:
    """A coroutine in the middle of a statement, in a transaction, that nobody drives any more."""

    async def work() -> None:
        async with session:
            await session.execute("INSERT INTO tests_user (name, level) VALUES ('x', 1)")
            await session.execute("SELECT pg_sleep(60)")

    coroutine: Any = work()
    futures = 0
    while futures < 100:
        future = coroutine.send(None)
        futures += 1
        if future is not None:
            future._asyncio_future_blocking = False
            if sessions_of(str(session.info["name"]), "query LIKE '%%pg_sleep%%'"):
                return coroutine
            await asyncio.wait([future], timeout=0.2)
    raise AssertionError("never slept")


@pytest.mark.parametrize("end", ["close", "collect", "collect in a thread"])
async def test_a_session_that_nobody_resumes_is_rolled_back_and_its_place_free(
    db: DatabaseInterface,
    name: str,
    end: str,
    empty_tables: None,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await db.ping()
    session = db.get_session()
    session.info["name"] = name
    holder = [await suspended_session(db, session)]
    del session
    gc.disable()
    try:
        with warnings.catch_warnings():
            # The session may tell that it was never closed, or be closed by its block.
            warnings.simplefilter("ignore", ResourceWarning)
            if end == "close":
                holder.pop().close()
            elif end == "collect":
                holder.clear()
            else:
                await asyncio.to_thread(holder.clear)
                # A greenlet that another thread let go of ends at the next switch of its own.
                await bridge.run(lambda: None)
            with Elapsed() as took:
                assert await pid_of(db)
    finally:
        gc.enable()
    assert took.seconds < 1
    assert await gone(name, where="query LIKE '%%pg_sleep%%' AND state = 'active'")
    assert ask("SELECT count(*) FROM tests_user") == [(0,)]
    assert caplog.text == ""


async def test_a_session_that_is_forgotten_gives_its_place_back_without_the_collector(
    db: DatabaseInterface, name: str
) -> None:
    gc.collect()
    gc.disable()
    try:
        session = db.get_session()
        await session.begin()
        await session.execute("SELECT 1")
        with pytest.warns(ResourceWarning, match="test_postgresql_sessions.py"):
            del session
            async with asyncio.timeout(2):
                await db.ping()
    finally:
        gc.enable()


async def test_an_error_through_nested_blocks_keeps_its_class_and_keeps_nothing_alive(
    db: DatabaseInterface, empty_tables: None
) -> None:
    def fail() -> None:
        with transaction.atomic("own"), transaction.atomic("own"), transaction.atomic("own"):
            Author.objects.using("own").create(name="twice")
            Author.objects.using("own").create(name="twice")

    gc.collect()
    gc.disable()
    try:
        session = db.get_session()
        alive = weakref.ref(session)
        with contextlib.suppress(IntegrityError):
            async with session:
                await session.run_sync(fail)
                raise AssertionError("no error")
        assert session.closed
        del session
        assert alive() is None
    finally:
        gc.enable()


EVERY_KIND: dict[str, Callable[[Session], Any]] = {
    "execute": lambda s: s.execute("SELECT pg_sleep(0.05)"),
    "fetch_all": lambda s: s.fetch_all("SELECT * FROM generate_series(1, 500)"),
    "script": lambda s: s.execute_script("SELECT pg_sleep(0.02); SELECT 1"),
    "orm": lambda s: s.run_sync(lambda: list(User.objects.using("own").all())),
    "nested": lambda s: s.run_sync(_nested),
    "wrong": lambda s: outcome_of(s.execute("SELECT nonsense")),
    "reset": lambda s: s.execute("SET search_path = pg_catalog"),
}


def _nested() -> None:
    with transaction.atomic("own"), transaction.atomic("own"):
        User.objects.using("own").count()


@pytest.mark.parametrize("kind", EVERY_KIND)
async def test_the_loop_is_not_held_up_by(db: DatabaseInterface, kind: str) -> None:
    worst = []
    # The best of three: another process may have had the processor.
    for _ in range(3):
        async with LoopProbe() as probe:
            with contextlib.suppress(Error):
                async with db.get_session() as session:
                    await EVERY_KIND[kind](session)
            db.pool().discard_idle()
            await db.ping()
        worst.append(probe.worst)
    assert min(worst) < 0.05
