"""The pool, with fake connections: what it promises about options, order, waiting, cancellation and
what is given back."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import threading
import warnings
from typing import Any

import pytest
from django.utils.functional import SimpleLazyObject

from django_asyncsession.exceptions import ConfigurationError, PoolTimeout, TooManyWaiting
from django_asyncsession.origins import creation_site
from django_asyncsession.pool import pool as pool_module
from django_asyncsession.pool.lease import Lease
from django_asyncsession.pool.options import PoolOptions
from tests.faults import Elapsed, LoopProbe, cancel_at, longest_stall, outcome_of
from tests.pool.fakes import Fake, pool_of, settled, until

pytestmark = pytest.mark.usefixtures("no_freeze")

STATS_OF_PSYCOPG_POOL = {
    "pool_min",
    "pool_max",
    "pool_size",
    "pool_available",
    "requests_waiting",
    "usage_ms",
    "requests_num",
    "requests_queued",
    "requests_wait_ms",
    "requests_errors",
    "returns_bad",
    "connections_num",
    "connections_ms",
    "connections_errors",
    "connections_lost",
}


# Options


def test_the_defaults_are_as_documented() -> None:
    options = PoolOptions()
    assert (options.min_size, options.limit, options.timeout, options.check) == (0, 10, 30, False)


@pytest.mark.parametrize(
    ("min_size", "max_size", "limit"), [(0, None, 10), (4, None, 4), (2, 8, 8), (0, 1, 1)]
)
def test_max_size_follows_min_size(min_size: int, max_size: int | None, limit: int) -> None:
    assert PoolOptions(min_size=min_size, max_size=max_size).limit == limit


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_size": -1},
        {"max_size": 0},
        {"min_size": 5, "max_size": 4},
        {"max_waiting": -1},
        {"timeout": 0},
        {"max_idle": -1},
        {"max_lifetime": float("nan")},
        {"max_lifetime": float("inf")},
        {"timeout": float("inf")},
        {"max_idle": float("inf")},
        {"reconnect_timeout": float("inf")},
        {"max_size": "20"},
        {"max_size": 2.5},
        {"timeout": "30"},
        {"timeout": None},
        {"min_size": True},
    ],
    ids=str,
)
def test_options_that_cannot_work_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=rf"{next(iter(wrong))}(=| is )"):
        PoolOptions(**wrong)


# Handing out


async def test_a_connection_is_opened_on_demand_and_used_again() -> None:
    async with pool_of() as (pool, server):
        assert server.attempts == 0
        first = await pool.acquire()
        connection = first.connection
        first.release()
        second = await pool.acquire()
        assert second.connection is connection and server.attempts == 1
        second.release()


async def test_an_idle_connection_is_handed_out_without_a_suspension() -> None:
    async with pool_of() as (pool, _):
        (await pool.acquire()).release()
        (await cancel_at(pool.acquire(), {1})).release()


async def test_the_connection_used_last_is_handed_out_first() -> None:
    async with pool_of() as (pool, _):
        leases = [await pool.acquire() for _ in range(3)]
        for lease in leases:
            lease.release()
        again = await pool.acquire()
        assert again.connection is leases[-1].connection
        again.release()


async def test_max_size_is_hard_under_a_thousand_tasks_and_all_are_served() -> None:
    async with pool_of(max_size=10) as (pool, server):

        async def user() -> None:
            for _ in range(3):
                lease = await pool.acquire()
                await asyncio.sleep(0)
                assert len(server.open) <= 10
                lease.release()

        await asyncio.gather(*(user() for _ in range(1000)))
        assert server.most == 10


async def test_first_come_first_served() -> None:
    async with pool_of(max_size=2) as (pool, _):
        order: list[int] = []

        async def user(number: int) -> None:
            lease = await pool.acquire()
            order.append(number)
            await asyncio.sleep(random.random() / 1000)
            lease.release()

        await asyncio.gather(*(user(number) for number in range(50)))
        assert order == sorted(order)


async def test_who_comes_later_does_not_overtake_one_to_whom_a_connection_was_just_given() -> None:
    async with pool_of(max_size=1) as (pool, _):
        held = await pool.acquire()
        waiting = asyncio.create_task(pool.acquire())
        await settled()
        held.release()
        late = asyncio.create_task(pool.acquire())
        lease = await waiting
        await settled()
        assert not late.done()
        lease.release()
        (await late).release()


async def test_a_hundred_tasks_that_come_at_once_open_no_more_than_they_need() -> None:
    async with pool_of(max_size=100) as (pool, server):
        leases = await asyncio.gather(*(pool.acquire() for _ in range(5)))
        assert server.attempts == 5
        for lease in leases:
            lease.release()


# Waiting


async def test_timeout_names_the_pool_the_numbers_and_the_longest_holder() -> None:
    async with pool_of(max_size=1, timeout=0.1) as (pool, _):

        async def hoard() -> Lease[Fake]:
            return await pool.acquire()

        lease = await asyncio.create_task(hoard(), name="hoarder")
        with Elapsed() as took, pytest.raises(PoolTimeout) as caught:
            await pool.acquire()
        assert 0.09 < took.seconds < 0.3
        message = str(caught.value)
        for part in (
            "no connection to 'fake' within 0.1 s, 1 of 1 in use, 1 waiting",
            "longest held for 0.1 s by 'hoarder', taken at",
            "test_pool.py",
            " in hoard",
            "; raise max_size in the pool options, or shorten transactions",
        ):
            assert part in message
        assert "nested" not in message
        assert pool.stats()["requests_errors"] == 1 and pool.stats()["requests_waiting"] == 0
        lease.release()


def test_who_asked_is_named_behind_django_and_the_event_loop() -> None:
    """Code of Django may call this package, and so may a task of the package's own."""
    names: dict[str, Any] = {"creation_site": creation_site}
    source = "async def work():\n    return creation_site()"
    exec(compile(source, pool_module.__file__, "exec"), names)

    async def in_a_task() -> str:
        return await asyncio.get_running_loop().create_task(names["work"]())

    def through_the_loop() -> str:
        with asyncio.Runner() as runner:
            return runner.run(in_a_task())

    def through_django() -> str:
        return str(SimpleLazyObject(creation_site))

    for caller in (through_the_loop, through_django):
        site = str(caller())
        assert site.startswith(f"{__file__}:") and site.endswith(f" in {caller.__name__}")


def test_when_nobody_else_asked_the_nearest_place_is_named() -> None:
    sites: list[str] = []
    names: dict[str, Any] = {"creation_site": creation_site, "sites": sites}
    source = "def run():\n    sites.append(creation_site())"
    exec(compile(source, pool_module.__file__, "exec"), names)
    thread = threading.Thread(target=names["run"])
    thread.start()
    thread.join()
    assert str(sites[0]).startswith(f"{threading.__file__}:")


async def test_thousands_that_time_out_together_are_told_without_holding_up_the_loop() -> None:
    async with pool_of(max_size=1, timeout=0.5, max_waiting=0) as (pool, _):
        lease = await pool.acquire()
        waiters = [asyncio.create_task(outcome_of(pool.acquire())) for _ in range(5000)]
        await until(lambda: pool.stats()["requests_waiting"] == 5000)
        async with LoopProbe() as probe:
            outcomes = await asyncio.gather(*waiters)
        assert {type(outcome) for outcome in outcomes} == {PoolTimeout}
        assert probe.worst < longest_stall()
        lease.release()


async def test_a_task_that_waits_for_itself_is_told_so() -> None:
    async with pool_of(max_size=3, timeout=0.05) as (pool, _):
        leases = []

        async def user() -> Any:
            leases.append(await pool.acquire())
            await settled()
            return await outcome_of_here(pool.acquire())

        outcomes = await asyncio.gather(*(user() for _ in range(3)))
        for lease in leases:
            lease.release()
        assert all(isinstance(outcome, PoolTimeout) for outcome in outcomes)
        assert all("nested acquire" in str(outcome) for outcome in outcomes)


async def outcome_of_here(awaitable: Any) -> Any:
    try:
        return await awaitable
    except Exception as error:
        return error


async def test_the_callers_own_timeout_counts() -> None:
    async with pool_of(max_size=1) as (pool, _):
        lease = await pool.acquire()
        with pytest.raises(PoolTimeout, match=r"within 0\.0 s"):
            await pool.acquire(timeout=0.01)
        lease.release()


async def test_not_all_who_keep_a_connection_may_wait_for_a_second_one() -> None:
    async with pool_of(max_size=3) as (pool, _):
        with pool.keeping_one() as first, pool.keeping_one() as second:
            assert first and second
            with pool.keeping_one() as third, pool.keeping_one() as fourth:
                assert not third and not fourth
        with contextlib.suppress(LookupError), pool.keeping_one():
            raise LookupError
        with pool.keeping_one() as first, pool.keeping_one() as second:
            assert first and second
    async with pool_of(max_size=1) as (pool, _):
        with pool.keeping_one() as only:
            assert not only


async def test_one_too_many_is_refused_at_once() -> None:
    async with pool_of(max_size=1, max_waiting=2) as (pool, _):
        lease = await pool.acquire()
        waiting = [asyncio.create_task(pool.acquire()) for _ in range(2)]
        await settled()
        with pytest.raises(TooManyWaiting, match=r"1 of 1 in use, 2 waiting of max_waiting=2; "):
            await pool.acquire()
        lease.release()
        (await waiting[0]).release()
        (await waiting[1]).release()


async def test_max_waiting_0_is_no_limit() -> None:
    async with pool_of(max_size=1, max_waiting=0) as (pool, _):
        lease = await pool.acquire()
        waiting = [asyncio.create_task(pool.acquire()) for _ in range(200)]
        await settled()
        lease.release()
        for task in waiting:
            (await task).release()


# Cancellation


async def test_cancelled_at_any_step_nothing_is_lost() -> None:
    for check in (False, True):
        for busy in (False, True):
            step = 0
            while True:
                step += 1
                async with pool_of(max_size=1, check=check) as (pool, _):
                    held = await pool.acquire() if busy else None
                    run = cancel_at(pool.acquire(), {step})
                    task = asyncio.ensure_future(outcome_of(run))
                    await settled()
                    if held is not None:
                        held.release()
                    outcome = await task
                    if isinstance(outcome, Lease):
                        outcome.release()
                    else:
                        assert isinstance(outcome, asyncio.CancelledError)
                    async with asyncio.timeout(1):
                        (await pool.acquire()).release()
                if run.done:
                    break


async def test_cancelled_in_the_tick_of_the_hand_over_the_next_gets_it() -> None:
    async with pool_of(max_size=1) as (pool, server):
        lease = await pool.acquire()
        first, second = (asyncio.create_task(pool.acquire()) for _ in range(2))
        await settled()
        lease.release()
        first.cancel()
        assert isinstance(await outcome_of(first), asyncio.CancelledError)
        (await second).release()
        assert server.attempts == 1


async def test_10000_random_cancels_lose_no_connection_and_no_waiter() -> None:
    rng = random.Random(6)
    async with pool_of(max_size=3) as (pool, server):
        cancelled = 0

        async def user() -> None:
            lease = await pool.acquire()
            try:
                for _ in range(rng.randrange(3)):
                    await asyncio.sleep(0)
            finally:
                lease.release(usable=rng.random() > 0.1)

        tasks: set[asyncio.Task[None]] = set()
        for _ in range(10_000):
            task = asyncio.create_task(user())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            if rng.random() < 0.7 and tasks:
                victim = rng.choice(list(tasks)[:20])
                cancelled += victim.cancel()
            if rng.random() < 0.3:
                await asyncio.sleep(0)
        async with asyncio.timeout(20):
            while tasks:
                await asyncio.wait(tasks)
        assert cancelled > 1000
        await until(lambda: pool.stats()["pool_size"] == len(server.open))
        leases = [await pool.acquire(1) for _ in range(3)]
        assert pool.stats()["pool_size"] == 3 and pool.stats()["requests_waiting"] == 0
        for lease in leases:
            lease.release()


# Giving back


async def test_releasing_twice_does_nothing() -> None:
    async with pool_of(max_size=2) as (pool, _):
        lease = await pool.acquire()
        lease.release()
        lease.release(usable=False)
        assert pool.stats()["pool_available"] == 1 and "0 in use" in repr(pool)


async def test_what_is_not_usable_is_closed_and_replaced() -> None:
    async with pool_of(max_size=1) as (pool, server):
        lease = await pool.acquire()
        lease.release(usable=False)
        assert not lease.connection.open
        again = await pool.acquire()
        assert again.connection is not lease.connection
        again.release()
        assert pool.stats()["returns_bad"] == 1 and server.closings == 1


async def test_the_place_is_free_only_when_the_server_has_let_go() -> None:
    async with pool_of(max_size=1) as (pool, server):
        server.lets_go.clear()
        (await pool.acquire()).release(usable=False)
        task = asyncio.create_task(pool.acquire())
        await settled()
        assert not task.done() and server.attempts == 1
        server.lets_go.set()
        (await task).release()


async def test_a_server_that_never_lets_go_costs_the_place_for_two_seconds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert pool_module.CLOSE_BUDGET == 2.0
    monkeypatch.setattr(pool_module, "CLOSE_BUDGET", 0.05)
    async with pool_of(max_size=1) as (pool, server):
        server.lets_go.clear()
        (await pool.acquire()).release(usable=False)
        with Elapsed() as took:
            (await pool.acquire()).release()
        assert 0.04 < took.seconds < 0.5
    assert "did not end in an orderly way" in caplog.text


async def test_a_forgotten_lease_is_refilled_and_warned_of(recwarn: Any) -> None:
    async with pool_of(max_size=1) as (pool, server):
        gc.disable()
        try:
            lease = await pool.acquire()
            connection = lease.connection
            del lease
        finally:
            gc.enable()
        (await pool.acquire(1)).release()
        assert not connection.open and len(server.connections) == 2
    [warning] = [w for w in recwarn.list if w.category is ResourceWarning]
    assert "'fake' was never given back; it was taken at" in str(warning.message)
    assert "test_pool.py" in str(warning.message)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_forgotten_lease_is_refilled_when_warnings_are_errors() -> None:
    async with pool_of(max_size=1) as (pool, _):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            lease = await pool.acquire()
            del lease
        (await pool.acquire(1)).release()


async def test_a_lease_forgotten_in_another_thread_is_refilled() -> None:
    async with pool_of(max_size=1) as (pool, server):
        holder = [await pool.acquire()]
        with pytest.warns(ResourceWarning):
            await asyncio.to_thread(holder.clear)
        (await pool.acquire(1)).release()
        assert len(server.connections) == 2


async def test_the_last_user_who_forgets_ends_the_grace() -> None:
    async with pool_of(max_size=1) as (pool, _):
        holder = [await pool.acquire()]
        closing = asyncio.create_task(pool.close(grace=5))
        await settled()
        with pytest.warns(ResourceWarning):
            holder.clear()
        async with asyncio.timeout(1):
            await closing


# Numbers


async def test_stats_have_psycopg_pools_names() -> None:
    async with pool_of(max_size=2) as (pool, _):
        assert set(pool.stats()) == STATS_OF_PSYCOPG_POOL
        lease = await pool.acquire()
        await asyncio.sleep(0.01)
        lease.release()
        stats = pool.stats()
        assert stats["requests_num"] == stats["connections_num"] == stats["pool_size"] == 1
        assert 10 <= stats["usage_ms"] < 1000 and stats["pool_max"] == 2


async def test_repr_says_how_it_is() -> None:
    async with pool_of(max_size=2) as (pool, _):
        lease = await pool.acquire()
        assert repr(pool) == "<Pool 'fake' 0 idle, 1 in use, 0 waiting, max 2>"
        lease.release()
    assert repr(pool) == "<Pool 'fake' closed, 0 idle, 0 in use, 0 waiting, max 2>"
