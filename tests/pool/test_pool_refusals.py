"""The pool, with fake connections, when its server refuses them, or never answers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from django_asyncsession.exceptions import PoolTimeout
from django_asyncsession.pool.lease import Lease
from django_asyncsession.pool.pool import Pool
from tests.faults import Elapsed, outcome_of
from tests.pool.fakes import Fake, Server, pool_of, settled, until

pytestmark = pytest.mark.usefixtures("no_freeze")


# A server that refuses


async def test_the_real_reason_reaches_the_first_caller_at_once() -> None:
    async with pool_of() as (pool, server):
        server.error = ConnectionRefusedError("nobody listens")
        with Elapsed() as took, pytest.raises(ConnectionRefusedError, match="nobody listens"):
            await pool.acquire()
        assert took.seconds < 1
        assert pool.stats()["connections_errors"] == 1


async def test_the_cause_is_kept() -> None:
    async with pool_of() as (pool, server):
        server.error = OSError("x")
        server.error.__cause__ = cause = KeyError("why")
        with pytest.raises(OSError, match="x") as caught:
            await pool.acquire()
        assert caught.value.__cause__ is cause


async def test_an_error_that_would_only_come_again_reaches_all_at_once() -> None:
    async with pool_of(max_size=2) as (pool, server):
        server.error = PermissionError("wrong password")
        with Elapsed() as took:
            outcomes = await asyncio.gather(*(outcome_of(pool.acquire()) for _ in range(100)))
        assert took.seconds < 1
        assert all(isinstance(outcome, PermissionError) for outcome in outcomes)
        assert len({id(outcome) for outcome in outcomes}) == 100
        assert server.attempts <= 2


async def test_a_refused_login_is_not_tried_again_for_each_caller() -> None:
    async with pool_of() as (pool, server):
        server.error = PermissionError("wrong password")
        for _ in range(50):
            with pytest.raises(PermissionError):
                await pool.acquire()
        assert server.attempts == 1
        await asyncio.sleep(0.11)
        server.error = None
        (await pool.acquire()).release()


async def test_a_server_that_is_down_meets_one_attempt_at_a_time_ever_less_often() -> None:
    async with pool_of(max_size=10, timeout=60) as (pool, server):
        server.error = ConnectionRefusedError("down")
        tasks = [asyncio.create_task(outcome_of(pool.acquire())) for _ in range(1000)]
        await settled()
        at_once = server.attempts
        await asyncio.sleep(1)
        assert at_once <= 10 and server.attempts - at_once <= 5
        server.error = None
        with Elapsed() as took:
            leases = [o for o in await asyncio.gather(*map(served_once(pool), tasks)) if o]
        assert took.seconds < 3 and len(leases) > 900
        assert server.most <= 10


def served_once(pool: Pool[Fake]) -> Callable[[asyncio.Task[Any]], Any]:
    async def wait(task: asyncio.Task[Any]) -> bool:
        outcome = await task
        if isinstance(outcome, Lease):
            outcome.release()
            return True
        assert isinstance(outcome, ConnectionRefusedError)
        return False

    return wait


async def test_a_server_without_room_for_one_more_does_not_fail_who_can_wait() -> None:
    async with pool_of(max_size=3, timeout=2) as (pool, server):
        lease = await pool.acquire()
        server.error = OSError("too many connections")
        waiting = asyncio.create_task(pool.acquire())
        await asyncio.sleep(0.15)
        assert not waiting.done() and server.attempts > 1
        lease.release()
        (await waiting).release()


async def test_who_waited_in_vain_for_a_server_without_room_learns_why() -> None:
    async with pool_of(max_size=3, timeout=0.1) as (pool, server):
        lease = await pool.acquire()
        server.error = OSError("too many connections")
        with pytest.raises(PoolTimeout) as caught:
            await pool.acquire()
        assert str(caught.value.__cause__) == "too many connections"
        lease.release()


async def test_all_are_told_when_the_server_is_down_for_reconnect_timeout() -> None:
    async with pool_of(max_size=1, reconnect_timeout=0.2, timeout=30) as (pool, server):
        server.error = ConnectionRefusedError("down")
        with Elapsed() as took:
            outcomes = await asyncio.gather(*(outcome_of(pool.acquire()) for _ in range(100)))
        assert took.seconds < 2
        assert all(isinstance(outcome, ConnectionRefusedError) for outcome in outcomes)


async def test_a_failure_long_ago_does_not_count_as_a_long_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("django_asyncsession.pool.opening.BACKOFF_MAX", 0.05)
    async with pool_of(max_size=1, reconnect_timeout=0.3, timeout=30) as (pool, server):
        server.error = [OSError("first")]
        with pytest.raises(OSError, match="first"):
            await pool.acquire()
        await asyncio.sleep(0.4)
        server.error = [OSError("second")]
        outcomes = await asyncio.gather(*(outcome_of(served(pool)) for _ in range(3)))
        assert [type(o) for o in outcomes] == [OSError, bool, bool]


async def served(pool: Pool[Fake]) -> bool:
    (await pool.acquire()).release()
    return True


async def test_min_size_comes_back_by_itself_when_the_server_does() -> None:
    async with pool_of(min_size=2, max_size=2) as (pool, server):
        server.error = OSError("down")
        with pytest.raises(OSError, match="down"):
            await pool.acquire()
        server.error = None
        await until(lambda: pool.stats()["pool_available"] == 2)


async def test_an_error_that_cannot_be_copied_still_reaches_the_caller() -> None:
    class Odd(Exception):
        def __init__(self, first: str, second: str) -> None:
            super().__init__(f"{first} {second}")

    async with pool_of() as (pool, server):
        server.error = Odd("not", "copied")
        with pytest.raises(Odd, match="not copied"):
            await pool.acquire(0.5)


async def test_a_server_that_never_answers_ends_in_a_timeout_and_close_does_not_wait_for_it() -> (
    None
):
    server = Server()
    pool = server.pool(max_size=1, timeout=0.05)
    server.reachable.clear()
    with pytest.raises(PoolTimeout, match="0 of 1 in use, 1 waiting"):
        await pool.acquire()
    with Elapsed() as took:
        await pool.close()
    assert took.seconds < 0.5 and pool.stats()["pool_size"] == 0


async def test_an_attempt_that_never_ends_keeps_its_place_no_longer_than_a_caller_waits() -> None:
    async with pool_of(max_size=1, timeout=0.2) as (pool, server):
        server.reachable.clear()
        with pytest.raises(PoolTimeout):
            await pool.acquire()
        await until(lambda: pool.stats()["connections_errors"])
        server.reachable.set()
        (await pool.acquire(1)).release()
        assert server.attempts == 2


# Attempts to connect that are never answered


async def test_a_second_attempt_serves_who_waits_when_the_first_is_not_answered() -> None:
    async with pool_of(max_size=4) as (pool, server):
        server.deaf = 1
        with Elapsed() as took:
            lease = await pool.acquire()
        assert took.seconds < 3 and server.attempts == 2
        lease.release()
        await until(lambda: not server.hung)
        assert pool.stats()["pool_size"] == 1, "the attempt that was not answered leaked"


async def test_with_one_place_the_attempt_that_is_not_answered_makes_room() -> None:
    async with pool_of(max_size=1) as (pool, server):
        server.deaf = 2
        lease = await pool.acquire(8)
        assert server.attempts == 3 and server.hung == 0
        assert pool.stats()["pool_size"] == 1
        lease.release()


async def test_after_a_failure_an_attempt_that_is_not_answered_holds_up_nobody() -> None:
    async with pool_of(max_size=4) as (pool, server):
        server.error = [ConnectionRefusedError("down")]
        with pytest.raises(ConnectionRefusedError):
            await pool.acquire()
        server.deaf = 1
        (await pool.acquire(5)).release()
        assert server.attempts == 3


async def test_attempts_that_are_not_answered_never_take_more_than_max_size() -> None:
    async with pool_of(max_size=2, timeout=20) as (pool, server):
        server.deaf = 100
        waiters = [asyncio.create_task(outcome_of(pool.acquire(3.5))) for _ in range(5)]
        while not all(waiter.done() for waiter in waiters):
            assert server.hung <= 2 and pool.stats()["pool_size"] <= 2
            await asyncio.sleep(0.01)
        assert server.attempts <= 5
        server.deaf = 0


async def test_a_slow_server_is_waited_for_although_others_were_tried() -> None:
    async with pool_of(max_size=1, timeout=20) as (pool, server):
        answer = server.connect

        async def slowly() -> Fake:
            await asyncio.sleep(1.5)
            return await answer()

        pool._connect = slowly
        (await pool.acquire()).release()
        assert pool.stats()["pool_size"] == 1


async def test_nobody_waiting_no_other_attempt_is_made() -> None:
    async with pool_of(max_size=4) as (pool, server):
        server.deaf = 1
        assert isinstance(await outcome_of(pool.acquire(0.1)), PoolTimeout)
        await asyncio.sleep(1.5)
        assert server.attempts == 1
