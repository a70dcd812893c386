"""PostgreSQL: cancellation, of statements, sessions and pools.

On real connections, which are the point.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import random
import signal
import time
from typing import Any

import pytest
from django.db import (
    OperationalError,
)

from django_asyncsession import DatabaseInterface
from django_asyncsession.exceptions import PoolError
from tests.backends.postgresql.pools import CANCEL_BUDGET, assert_whole, interface, pid_of
from tests.faults import (
    Elapsed,
    FaultProxy,
    LoopProbe,
    OwnServer,
    address,
    cancel_at,
    outcome_of,
)
from tests.postgres import ask, gone, sessions_of
from tests.sessions import soon

# Cancellation


async def test_a_cancelled_statement_ends_on_the_server_and_its_process_with_it(
    db: DatabaseInterface, name: str
) -> None:
    async def sleep() -> None:
        async with db.get_session() as session:
            await session.execute("SELECT pg_sleep(60)")

    task = asyncio.create_task(sleep())
    while not sessions_of(name, "state = 'active'"):
        await asyncio.sleep(0.01)
    async with LoopProbe() as probe:
        task.cancel()
        with Elapsed() as took, pytest.raises(asyncio.CancelledError):
            await task
    assert took.seconds < CANCEL_BUDGET and probe.worst < 0.1
    assert await gone(name)
    await db.ping()


async def test_cancelled_at_every_step_the_row_is_there_or_not_and_the_pool_is_whole(
    db: DatabaseInterface, name: str, empty_tables: None
) -> None:
    async def insert(step: int) -> None:
        async with db.get_session() as session:
            await session.execute(
                "INSERT INTO tests_user (name, level) VALUES (%s, 1)", [f"a{step}"]
            )
            async with session.begin_nested():
                await session.execute(
                    "INSERT INTO tests_user (name, level) VALUES (%s, 1)", [f"b{step}"]
                )

    for step in range(1, 200):
        run = cancel_at(insert(step), {step})
        outcome = await outcome_of(run)
        assert outcome is None or isinstance(outcome, asyncio.CancelledError), (step, outcome)
        rows = ask("SELECT count(*) FROM tests_user WHERE name = ANY(%s)", [f"a{step}", f"b{step}"])
        assert rows[0][0] in (0, 2), step
        await assert_whole(db, name)
        if run.done:
            assert rows[0][0] == 2
            return
    raise AssertionError("it never ends")


async def test_1000_cancels_leak_no_file_and_never_exceed_max_size(name: str) -> None:
    rng = random.Random(3)
    async with interface(name, pool_max_size=4) as db:
        most = 0

        async def victim() -> None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.random() / 20), db.get_session() as session:
                    await session.execute("SELECT pg_sleep(%s)", [rng.random() / 20])

        async def batch() -> None:
            nonlocal most
            tasks = [asyncio.create_task(victim()) for _ in range(8)]
            while (await asyncio.wait(tasks, timeout=0.01))[1]:
                most = max(most, sessions_of(name))

        await batch()
        await assert_whole(db, name)
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(124):
            await batch()
        await assert_whole(db, name)
        assert len(os.listdir("/proc/self/fd")) <= files + 1
        assert 1 < most <= 4
        assert db.stats()["returns_bad"] > 100


async def test_a_late_cancel_never_hits_the_next_user(name: str) -> None:
    rng = random.Random(4)
    async with interface(name, pool_max_size=1) as db:

        async def victim() -> None:
            async with db.get_session() as session:
                await session.execute("SELECT pg_sleep(%s)", [rng.random() / 100])

        async def next_user() -> None:
            async with db.get_session() as session:
                await session.execute("SELECT pg_sleep(0.005)")

        for _ in range(150):
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.random() / 100):
                    await victim()
            await next_user()


@pytest.mark.parametrize("where", ["connect", "check"])
async def test_cancelled_while_connecting_or_checking_no_place_is_lost(
    name: str, where: str
) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        interface(
            name, host="127.0.0.1", port=proxy.port, pool_max_size=1, pool_check="true"
        ) as db,
    ):
        if where == "check":
            await db.ping()
        proxy.freeze()
        task = asyncio.create_task(db.ping())
        await asyncio.sleep(0.1)
        task.cancel()
        with Elapsed() as took, pytest.raises(asyncio.CancelledError):
            await task
        assert took.seconds < 0.5
        proxy.thaw()
        await db.ping()


async def test_a_frozen_network_costs_no_more_than_the_budget(name: str) -> None:
    async with (
        FaultProxy(*address("default")) as proxy,
        interface(name, host="127.0.0.1", port=proxy.port, pool_max_size=1) as db,
    ):
        await db.ping()
        files = len(os.listdir("/proc/self/fd"))

        async def query() -> None:
            async with db.get_session() as session:
                await session.execute("SELECT 1")
                proxy.freeze()
                await session.execute("SELECT 2")

        async with LoopProbe() as probe:
            with Elapsed() as took, pytest.raises(TimeoutError):
                async with asyncio.timeout(0.3):
                    await query()
            assert took.seconds < 0.3 + CANCEL_BUDGET
            with Elapsed() as took, pytest.raises(PoolError):
                await db.pool().acquire(CANCEL_BUDGET + 0.5)
        assert probe.worst < 0.1
        proxy.thaw()
        proxy.reset()
        # The pool was connecting in the moment of the reset, and tells one caller of it.
        await outcome_of(db.ping())
        await db.ping()
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) <= files + 4  # two proxied connections at most


async def test_stopped_server_processes_keep_their_places_and_run_nothing_afterwards(
    own_server: OwnServer,
) -> None:
    db = DatabaseInterface.from_dsn(
        own_server.dsn() + "?pool_max_size=3&pool_timeout=40&application_name=stopped", alias="own"
    )
    admin = own_server.connect()

    def sessions() -> list[Any]:
        sql = "SELECT pid, query FROM pg_stat_activity WHERE application_name = 'stopped'"
        return admin.execute(sql).fetchall()

    def running() -> list[int]:
        return [pid for pid, query in sessions() if "/* marked */" in query]

    async def run(sql: str) -> Any:
        async with db.get_session(autocommit=True) as session:
            return await session.fetch_value(sql)

    tasks = [asyncio.create_task(run("SELECT pg_sleep(60) /* marked */")) for _ in range(3)]
    assert await soon(lambda: len(running()) == 3, 10)
    stopped = running()[:2]
    try:
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        later = [asyncio.create_task(run("SELECT 1 FROM pg_sleep(0.5)")) for _ in range(9)]
        most = 0
        until = time.monotonic() + CANCEL_BUDGET + 2
        while time.monotonic() < until:
            most = max(most, len(sessions()))
            await asyncio.sleep(0.05)
        assert most == 3
    finally:
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    assert await asyncio.gather(*later) == [1] * 9
    assert await soon(lambda: not running(), 10)
    await db.close()
    admin.close()


async def test_a_stopped_server_process_is_replaced_in_the_end_while_it_is_still_stopped(
    own_server: OwnServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("django_asyncsession.pool.pool.UNTOLD_BUDGET", 0.5)
    db = DatabaseInterface.from_dsn(own_server.dsn() + "?pool_max_size=1", alias="own")
    pid = await pid_of(db)

    async def query() -> None:
        async with db.get_session() as session:
            await session.execute("SELECT 1")
            os.kill(pid, signal.SIGSTOP)
            await session.execute("SELECT 2")

    try:
        async with LoopProbe() as probe:
            with Elapsed() as took, pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await query()
            assert took.seconds < CANCEL_BUDGET
            with Elapsed() as took:
                assert await pid_of(db) != pid
            assert took.seconds < CANCEL_BUDGET + 2
        assert probe.worst < 0.1
        with Elapsed() as took:
            await db.close()
        assert took.seconds < CANCEL_BUDGET + 0.5
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_closing_the_pool_cuts_who_still_uses_it_also_when_close_is_cancelled(
    name: str,
) -> None:
    for cancelled in (False, True):
        async with interface(name, pool_max_size=3) as db:

            async def use(db: DatabaseInterface = db) -> None:
                async with db.get_session() as session:
                    await session.execute("SELECT pg_sleep(60)")

            users = [asyncio.create_task(outcome_of(use())) for _ in range(6)]
            while sessions_of(name, "state = 'active'") < 3:
                await asyncio.sleep(0.01)
            closing = asyncio.create_task(db.close(grace=0.2))
            await asyncio.sleep(0.1)
            if cancelled:
                closing.cancel()
            await outcome_of(closing)
            with Elapsed() as took:
                outcomes = await asyncio.gather(*users)
            assert took.seconds < 1
            assert all(isinstance(outcome, OperationalError) for outcome in outcomes), outcomes
            assert await gone(name, CANCEL_BUDGET)


@pytest.mark.parametrize("pause", range(4))
async def test_cancelled_again_after_every_step_it_ends_in_time_and_the_pool_is_whole(
    db: DatabaseInterface, name: str, pause: int, empty_tables: None
) -> None:
    async def insert() -> None:
        async with db.get_session() as session, session.begin_nested():
            await session.execute("INSERT INTO tests_user (name, level) VALUES ('x', 1)")
            await session.execute("SELECT pg_sleep(60)")

    await db.ping()
    task = asyncio.create_task(insert())
    for _ in range(pause * 3):
        await asyncio.sleep(0)
    if pause == 3:
        while not sessions_of(name, "query LIKE '%%pg_sleep%%' AND state = 'active'"):
            await asyncio.sleep(0.01)
    with Elapsed() as took:
        while not task.done():
            task.cancel()
            await asyncio.sleep(0)
    assert isinstance(await outcome_of(task), asyncio.CancelledError)
    assert took.seconds < CANCEL_BUDGET
    await assert_whole(db, name)
    assert ask("SELECT count(*) FROM tests_user") == [(0,)]
