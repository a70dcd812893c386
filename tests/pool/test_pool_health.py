"""The pool, with fake connections: how old they may become, and those that were lost are found."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from django_asyncsession.exceptions import PoolTimeout
from tests.faults import Elapsed
from tests.pool.fakes import Fake, Server, pool_of, settled, until

pytestmark = pytest.mark.usefixtures("no_freeze")


# Age


async def test_a_connection_older_than_max_lifetime_is_closed_when_it_comes_back() -> None:
    async with pool_of(max_size=1, max_lifetime=0.05) as (pool, server):
        lease = await pool.acquire()
        await asyncio.sleep(0.06)
        assert lease.connection.open, "closed while in use"
        lease.release()
        assert not lease.connection.open
        assert server.closings == 1 and pool.stats()["returns_bad"] == 0


async def test_an_expired_idle_connection_is_not_handed_out() -> None:
    async with pool_of(min_size=1, max_size=1, max_lifetime=0.05, max_idle=100) as (pool, _):
        first = await pool.acquire()
        first.release()
        await asyncio.sleep(0.06)
        again = await pool.acquire()
        assert again.connection is not first.connection and not first.connection.open
        again.release()


async def test_connections_opened_together_do_not_expire_together() -> None:
    async with pool_of(max_size=100, max_lifetime=100) as (pool, _):
        leases = await asyncio.gather(*(pool.acquire() for _ in range(100)))
        expiries = [lease._entry.expires for lease in leases]
        assert 5 < max(expiries) - min(expiries) <= 10.5
        for lease in leases:
            lease.release()


async def test_idle_connections_above_min_size_expire() -> None:
    async with pool_of(min_size=1, max_size=5, max_idle=0.1) as (pool, server):
        leases = [await pool.acquire() for _ in range(5)]
        for lease in leases:
            lease.release()
        await until(lambda: len(server.open) == 1)
        await asyncio.sleep(0.2)
        assert len(server.open) == 1


async def test_min_size_is_opened_first_and_kept() -> None:
    async with pool_of(min_size=3, max_size=5) as (pool, server):
        await pool.open()
        await until(lambda: pool.stats()["pool_available"] == 3)
        (await pool.acquire()).release(usable=False)
        await until(lambda: pool.stats()["pool_available"] == 3)
        assert len(server.connections) == 4


async def test_open_without_min_size_opens_one() -> None:
    async with pool_of() as (pool, server):
        await pool.open()
        assert len(server.open) == 1


async def test_open_gives_back_what_it_took_when_it_fails() -> None:
    async with pool_of(min_size=3, max_size=3) as (pool, server):
        server.error = [OSError("a"), OSError("b"), OSError("c")]
        with pytest.raises(OSError, match="a"):
            await pool.open()
        assert "0 in use" in repr(pool)


# Check


async def test_a_connection_that_fails_the_check_is_replaced_unseen() -> None:
    async with pool_of(max_size=5, check=True) as (pool, server):
        leases = [await pool.acquire() for _ in range(5)]
        for lease in leases:
            lease.release()
        dead = [lease.connection for lease in leases]
        server.healthy = lambda fake: fake not in dead
        again = [await pool.acquire() for _ in range(5)]
        assert not {lease.connection for lease in again} & set(dead)
        assert pool.stats()["connections_lost"] == 5
        for lease in again:
            lease.release()


async def test_an_error_of_the_check_reaches_the_caller_and_frees_the_place() -> None:
    async with pool_of(max_size=1, check=True) as (pool, server):

        def fail(fake: Fake) -> bool:
            raise ZeroDivisionError

        server.healthy = fail
        with pytest.raises(ZeroDivisionError):
            await pool.acquire()
        server.healthy = lambda fake: True
        (await pool.acquire(1)).release()


async def test_a_check_that_hangs_counts_against_the_callers_time() -> None:
    async with pool_of(max_size=1, check=True, timeout=0.05) as (pool, server):
        (await pool.acquire()).release()
        hang = asyncio.Event()
        pool._check = lambda fake: hang.wait()  # type: ignore[assignment]
        with Elapsed() as took, pytest.raises(PoolTimeout):
            await pool.acquire()
        assert took.seconds < 0.5
        await until(lambda: not server.open or pool.stats()["pool_available"])


# Idle connections that the server closed


async def test_an_idle_connection_that_the_server_closed_is_never_handed_out() -> None:
    async with pool_of(max_size=4) as (pool, server):
        leases = [await pool.acquire() for _ in range(4)]
        for lease in leases:
            lease.release()
        server.quiet = server.healthy = lambda fake: fake.number >= 4
        for _ in range(4):
            lease = await pool.acquire()
            assert lease.connection.number >= 4
            lease.release()
        assert pool.stats()["connections_lost"] == 4
        assert pool.stats()["returns_bad"] == 0


async def test_one_to_which_something_came_is_asked_and_kept_when_it_works() -> None:
    async with pool_of(max_size=1) as (pool, server):
        (await pool.acquire()).release()
        server.quiet = lambda fake: False
        lease = await pool.acquire()
        assert lease.connection.number == 0
        lease.release()


async def test_once_one_was_lost_all_idle_ones_are_asked_at_once() -> None:
    async with pool_of(max_size=4) as (pool, server):
        leases = [await pool.acquire() for _ in range(4)]
        for lease in leases[1:]:
            lease.release()
        asked: list[int] = []

        def healthy(fake: Fake) -> bool:
            asked.append(fake.number)
            return fake.number != 2

        server.healthy = healthy
        leases[0].release(usable=False, lost=True)
        lease = await pool.acquire()
        assert lease.connection.number in (1, 3)
        assert sorted(asked) == [1, 2, 3]
        lease.release()
        asked.clear()
        (await pool.acquire()).release()
        assert asked == [], "asked only once"


async def test_an_idle_one_that_does_not_answer_holds_up_nobody_for_long() -> None:
    async with pool_of(max_size=2) as (pool, _):
        leases = [await pool.acquire() for _ in range(2)]
        never = asyncio.Event()

        async def hang(fake: Fake) -> bool:
            return await never.wait()

        pool._check = hang
        leases[1].release()
        leases[0].release(usable=False, lost=True)
        with Elapsed() as took:
            lease = await pool.acquire()
        assert took.seconds < 1 and lease.connection.number == 2
        lease.release()


async def test_a_pool_that_is_closed_while_it_asks_leaves_nothing_open() -> None:
    async with pool_of(max_size=2) as (pool, server):
        leases = [await pool.acquire() for _ in range(2)]
        leases[1].release()
        leases[0].release(usable=False, lost=True)
        await pool.close()
        assert not server.open


async def test_a_connection_that_fails_to_close_does_not_keep_the_others_open(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = Server()
    pool = server.pool(max_size=3)
    leases = [await pool.acquire() for _ in range(3)]
    close = pool._close

    def fail(fake: Fake) -> Any:
        if fake.number == 0:
            raise OSError(16, "Device or resource busy")
        return close(fake)

    pool._close = fail
    await pool.close()
    assert [fake.number for fake in server.open] == [0]
    assert pool.stats()["pool_size"] == 0 and all(lease.released for lease in leases)
    assert "could not be closed" in caplog.text


async def test_a_caller_that_is_cancelled_leaves_the_connection_to_the_next() -> None:
    async with pool_of(max_size=1) as (pool, server):
        server.reachable.clear()
        first = asyncio.create_task(pool.acquire())
        await settled()
        first.cancel()
        second = asyncio.create_task(pool.acquire())
        await settled()
        server.reachable.set()
        (await second).release()
        assert server.attempts == 1
