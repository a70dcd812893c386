"""The pool, with fake connections: what it promises about order, sizes, times and errors."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import random
import threading
import time
import warnings
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from django.utils.functional import SimpleLazyObject
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from django_asyncsession.exceptions import (
    ConfigurationError,
    PoolClosed,
    PoolTimeout,
    TooManyWaiting,
    WrongLoopError,
)
from django_asyncsession.origins import creation_site
from django_asyncsession.pool import pool as pool_module
from django_asyncsession.pool.lease import Lease
from django_asyncsession.pool.options import PoolOptions
from django_asyncsession.pool.pool import Pool
from tests.faults import Elapsed, LoopProbe, cancel_at, longest_stall, outcome_of, watchdog

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


class Fake:
    """A connection; it knows whether it was closed."""

    def __init__(self, number: int) -> None:
        self.number, self.open = number, True

    def __repr__(self) -> str:
        return f"<Fake {self.number} {'open' if self.open else 'closed'}>"


class Server:
    """What the fake connections are connections to.

    Attributes:
        error: what connecting raises; a list is used up, one error for each attempt.
        reachable: connecting waits for it.
        lets_go: closing waits for it.
        says_goodbye: there is something to wait for when a connection is closed.
        healthy: what a check answers, or raises.
        quiet: whether nothing came from the server to an idle connection.
        deaf: so many attempts to connect, counted down, are never answered.
    """

    def __init__(self) -> None:
        self.connections: list[Fake] = []
        self.attempts = self.most = self.closings = 0
        self.says_goodbye = True
        self.error: Exception | list[Exception] | None = None
        self.reachable, self.lets_go = asyncio.Event(), asyncio.Event()
        self.reachable.set()
        self.lets_go.set()
        self.healthy: Callable[[Fake], bool] = lambda fake: fake.open
        self.quiet: Callable[[Fake], bool] = lambda fake: True
        self.deaf = self.hung = 0

    @property
    def open(self) -> list[Fake]:
        return [fake for fake in self.connections if fake.open]

    async def connect(self) -> Fake:
        self.attempts += 1
        await asyncio.sleep(0)
        await self.reachable.wait()
        await self._maybe_never()
        error = self.error
        if isinstance(error, list):
            error = error.pop(0) if error else None
        if error is not None:
            raise error
        fake = Fake(len(self.connections))
        self.connections.append(fake)
        self.most = max(self.most, len(self.open))
        return fake

    async def _maybe_never(self) -> None:
        if self.deaf:
            self.deaf -= 1
            self.hung += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.hung -= 1

    async def check(self, fake: Fake) -> bool:
        await asyncio.sleep(0)
        return self.healthy(fake)

    def close(self, fake: Fake) -> Any:
        assert fake.open, "closed twice"
        fake.open = False
        self.closings += 1
        return self.lets_go.wait() if self.says_goodbye else None

    def pool(self, **options: Any) -> Pool[Fake]:
        is_permanent = options.pop("is_permanent", lambda error: isinstance(error, PermissionError))
        return Pool(
            self.connect,
            self.check,
            self.close,
            name="fake",
            options=PoolOptions(**options),
            is_permanent=is_permanent,
            is_quiet=lambda fake: self.quiet(fake),
        )


@asynccontextmanager
async def pool_of(**options: Any) -> AsyncIterator[tuple[Pool[Fake], Server]]:
    """A pool and its server; in the end nothing may be left of it."""
    server = Server()
    pool = server.pool(**options)
    try:
        yield pool, server
    finally:
        server.reachable.set()
        server.lets_go.set()
        await pool.close()
        assert not server.open
        assert server.most <= pool.options.limit
        stats = pool.stats()
        assert (stats["pool_size"], stats["pool_available"], stats["requests_waiting"]) == (0, 0, 0)


@pytest.fixture(autouse=True)
def _no_freeze() -> Iterator[None]:
    with watchdog(30):
        yield


async def settled(turns: int = 20) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


async def until(condition: Callable[[], Any], seconds: float = 2) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)


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


# The end


async def test_close_tells_who_waits_and_cuts_who_does_not_finish() -> None:
    server = Server()
    pool = server.pool(max_size=2)
    leases = [await pool.acquire() for _ in range(2)]
    waiting = [asyncio.create_task(outcome_of(pool.acquire())) for _ in range(20)]
    await settled()
    closing = asyncio.create_task(pool.close(grace=0.1))
    with Elapsed() as took:
        outcomes = await asyncio.gather(*waiting)
    assert took.seconds < 0.05
    assert all(isinstance(o, PoolClosed) and "'fake' was closed" in str(o) for o in outcomes)
    leases[0].release()
    assert leases[1].connection.open
    await closing
    assert not server.open and leases[1].released
    leases[1].release()
    with pytest.raises(PoolClosed, match="'fake' is closed"):
        await pool.acquire()


async def test_close_waits_no_longer_than_the_last_user() -> None:
    server = Server()
    pool = server.pool()
    lease = await pool.acquire()
    closing = asyncio.create_task(pool.close(grace=10))
    await settled()
    lease.release()
    async with asyncio.timeout(1):
        await closing
    assert not server.open


async def test_a_cancelled_close_leaves_nothing_open() -> None:
    step = 0
    while True:
        step += 1
        server = Server()
        pool = server.pool(max_size=3, min_size=2)
        await pool.open()
        lease = await pool.acquire()
        run = cancel_at(pool.close(grace=0.01), {step})
        await outcome_of(run)
        await settled()
        assert not server.open and lease.released and pool.closed
        if run.done:
            break


async def test_closing_twice_is_fine() -> None:
    async with pool_of() as (pool, _):
        (await pool.acquire()).release()
        await asyncio.gather(pool.close(), pool.close())


async def test_a_connection_handed_over_in_the_tick_of_close_is_closed() -> None:
    server = Server()
    pool = server.pool(max_size=1)
    lease = await pool.acquire()
    waiting = asyncio.create_task(outcome_of(pool.acquire()))
    await settled()
    lease.release()
    await pool.close()
    assert isinstance(await waiting, PoolClosed) and not server.open
    assert pool.stats()["pool_size"] == 0


async def test_terminate_closes_all_without_awaiting() -> None:
    server = Server()
    pool = server.pool()
    leases = [await pool.acquire() for _ in range(3)]
    leases[0].release()
    pool.terminate()
    assert not server.open and pool.closed and all(lease.released for lease in leases)
    await settled()
    assert pool.stats()["pool_size"] == 0


async def test_a_connection_that_opens_after_terminate_is_closed() -> None:
    server = Server()
    pool = server.pool()
    server.reachable.clear()
    waiting = asyncio.create_task(outcome_of(pool.acquire()))
    await settled()
    pool.terminate()
    server.reachable.set()
    assert isinstance(await waiting, PoolClosed)
    await settled()
    assert not server.open and pool.stats()["pool_size"] == 0


async def test_discard_idle_makes_the_next_ones_new() -> None:
    async with pool_of() as (pool, server):
        (await pool.acquire()).release()
        pool.discard_idle()
        (await pool.acquire()).release()
        assert len(server.connections) == 2 and len(server.open) == 1


async def test_forget_touches_nothing() -> None:
    server = Server()
    pool = server.pool()
    lease = await pool.acquire()
    (await pool.acquire()).release()
    pool.forget()
    lease.release()
    del lease
    gc.collect()
    assert len(server.open) == 2 and server.closings == 0


# Loops


async def test_another_loop_is_refused_with_both_named() -> None:
    server = Server()
    pool = server.pool()
    (await pool.acquire()).release()

    def elsewhere() -> str:
        with pytest.raises(WrongLoopError) as caught:
            asyncio.run(pool.acquire())  # type: ignore[arg-type]
        return str(caught.value)

    message = await asyncio.to_thread(elsewhere)
    assert "'fake' belongs to the running event loop" in message and message.count("EventLoop") == 2
    await pool.close()


def test_the_end_of_the_loop_closes_the_pool_and_waits_for_the_server() -> None:
    seen = []

    async def main() -> Pool[Fake]:
        server = Server()
        seen.append(server)
        pool = server.pool(min_size=2)
        await pool.open()
        (await pool.acquire()).release(usable=False)
        return pool

    pool = asyncio.run(main())
    assert pool.closed and not seen[0].open
    assert pool.stats()["pool_size"] == 0


def test_what_is_left_to_do_is_done_although_the_end_of_the_loop_cancels_it() -> None:
    class Remains:
        done = 0

        def __await__(self) -> Any:
            yield from asyncio.sleep(0.01).__await__()
            self.done += 1

    remains = Remains()

    async def main() -> None:
        server = Server()
        pool = Pool(
            server.connect, server.check, lambda fake: remains, name="x", options=PoolOptions()
        )
        (await pool.acquire()).release(usable=False)

    asyncio.run(main())
    assert remains.done == 1


def test_the_end_of_the_loop_leaves_no_task_and_no_coroutine_behind() -> None:
    """Cancelled before their first step, the pool's own tasks still count right."""

    async def main() -> Pool[Fake]:
        server = Server()
        pool = server.pool(max_size=5)
        (await pool.acquire()).release(usable=False)
        waiting = [asyncio.create_task(pool.acquire()) for _ in range(3)]
        await asyncio.sleep(0)
        assert not any(task.done() for task in waiting)
        return pool

    for _ in range(3):
        pool = asyncio.run(main())
        gc.collect()
        assert pool.stats()["pool_size"] == 0


def test_a_loop_that_is_only_closed_can_be_cleaned_up_after() -> None:
    loop = asyncio.new_event_loop()
    server, pool, lease = loop.run_until_complete(half_used())
    loop.close()
    assert pool.is_orphaned
    pool.terminate()
    assert not server.open
    lease.release()
    gc.collect()


async def half_used() -> tuple[Server, Pool[Fake], Lease[Fake]]:
    server = Server()
    pool = server.pool(min_size=2)
    await pool.open()
    return server, pool, await pool.acquire()


def test_a_lease_released_or_forgotten_after_its_loops_end_is_closed() -> None:
    loop = asyncio.new_event_loop()
    server, pool, lease = loop.run_until_complete(half_used())
    other = loop.run_until_complete(pool.acquire())
    loop.close()
    connections = lease.connection, other.connection
    lease.release()
    with pytest.warns(ResourceWarning):
        del other
    assert not connections[0].open and not connections[1].open
    pool.terminate()
    assert not server.open


def test_leases_and_waiters_collected_with_their_loop_leave_nothing_open() -> None:
    loop = asyncio.new_event_loop()
    with pytest.warns(ResourceWarning):
        server = loop.run_until_complete(waiting_server())
        loop.close()
        del loop
        gc.collect()
    assert not server.open


async def waiting_server() -> Server:
    server = Server()
    server.says_goodbye = False
    pool = server.pool(max_size=1)
    lease = await pool.acquire()
    for _ in range(3):
        task = asyncio.create_task(pool.acquire())
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    await settled()
    # The first waiter gets a lease, and nobody looks at the result of its task.
    lease.release()
    return server


async def test_a_pool_that_is_dropped_closes_its_connections() -> None:
    server = Server()
    pool = server.pool(min_size=2)
    await pool.open()
    await until(partial(lambda pool: pool.stats()["pool_available"] == 2, pool))
    alive = weakref.ref(pool)
    del pool
    gc.collect()
    await settled()
    gc.collect()
    assert alive() is None and not server.open


async def test_the_pools_tasks_and_timers_do_not_keep_its_first_callers_context() -> None:
    class Request:
        pass

    var: contextvars.ContextVar[Request] = contextvars.ContextVar("var")
    async with pool_of(min_size=1) as (pool, _):

        async def first_caller() -> weakref.ref[Request]:
            request = Request()
            var.set(request)
            (await pool.acquire()).release()
            return weakref.ref(request)

        alive = await asyncio.create_task(first_caller())
        await settled()
        gc.collect()
        assert alive() is None


def test_two_loops_in_two_threads_do_not_disturb_each_other() -> None:
    outcomes = []

    async def main() -> None:
        async with pool_of(max_size=2) as (pool, _):

            async def user() -> None:
                for _ in range(50):
                    lease = await pool.acquire()
                    await asyncio.sleep(0)
                    lease.release(usable=random.random() > 0.2)

            await asyncio.gather(*(user() for _ in range(10)))
            outcomes.append(True)

    threads = [threading.Thread(target=lambda: asyncio.run(main())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == [True, True]


# Any order of events


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order, no place is lost and none too many is taken."""

    MAX = 3

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.leases: list[Lease[Fake]] = []
        self.tasks: list[asyncio.Task[Lease[Fake]]] = []
        self.server = self.do(make(Server))
        self.pool = self.do(make(lambda: self.server.pool(max_size=self.MAX, max_waiting=6)))

    def do(self, coroutine: Any) -> Any:
        return self.loop.run_until_complete(coroutine)

    @rule()
    def acquire(self) -> None:
        self.tasks.append(self.loop.create_task(self.pool.acquire()))

    @rule(turns=st.integers(1, 8))
    def turn(self, turns: int) -> None:
        self.do(settled(turns))
        for task in [task for task in self.tasks if task.done()]:
            self.tasks.remove(task)
            if not task.cancelled() and task.exception() is None:
                self.leases.append(task.result())

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), usable=st.booleans())
    def release(self, data: st.DataObject, usable: bool) -> None:
        lease = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.do(make(lambda: lease.release(usable=usable)))

    @precondition(lambda self: self.leases)
    @rule()
    def forget(self) -> None:
        with pytest.warns(ResourceWarning):
            self.leases.pop()
            # The task that took it may be garbage that keeps it.
            gc.collect()

    @precondition(lambda self: self.tasks)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self.tasks)).cancel()

    @rule(error=st.sampled_from([None, OSError("down"), PermissionError("refused")]))
    def server_answers(self, error: Exception | None) -> None:
        self.server.error = error

    @rule(hold=st.booleans())
    def server_hesitates(self, hold: bool) -> None:
        event = self.server.reachable
        event.clear() if hold else event.set()

    @rule(hold=st.booleans())
    def server_holds_on(self, hold: bool) -> None:
        event = self.server.lets_go
        event.clear() if hold else event.set()

    @invariant()
    def places_add_up(self) -> None:
        pool, server = self.pool, self.server
        assert pool._size <= self.MAX and server.most <= self.MAX
        assert len(pool._idle) + pool._leased + pool._opening <= pool._size
        assert len(server.open) <= pool._size
        assert all(entry.connection.open for entry in pool._idle)
        assert all(lease.connection.open for lease in self.leases)
        assert len({lease.connection for lease in self.leases}) == len(self.leases)
        if pool._idle:
            assert all(waiter.done() for waiter in pool._waiters)

    def teardown(self) -> None:
        self.server.error = None
        self.server.reachable.set()
        self.server.lets_go.set()
        self.do(self.end())
        self.loop.close()

    async def end(self) -> None:
        for lease in self.leases:
            lease.release()
        for task in self.tasks:
            task.cancel()
            outcome = await outcome_of(task)
            if isinstance(outcome, Lease):
                outcome.release()
        self.leases.clear()
        for _ in range(self.MAX):
            await self.lease_one()
        assert self.pool._leased == self.MAX == self.pool._size
        for lease in self.leases:
            lease.release()
        await self.pool.close()
        assert self.pool._size == 0 and not self.server.open

    async def lease_one(self) -> None:
        """All places can be had at the same time; a refusal from before may still be remembered."""
        deadline = time.monotonic() + 3
        while True:
            try:
                self.leases.append(await self.pool.acquire(3))
                return
            except OSError:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.02)


async def make(fn: Callable[[], Any]) -> Any:
    return fn()


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = hypothesis_settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True
)


async def test_no_connection_is_lost_when_a_pool_is_closed_at_random() -> None:
    rng = random.Random(1)
    for _ in range(50):
        server = Server()
        pool = server.pool(max_size=3)

        async def user(pool: Pool[Fake] = pool) -> None:
            with contextlib.suppress(PoolClosed):
                while True:
                    lease = await pool.acquire()
                    await asyncio.sleep(0)
                    lease.release(usable=rng.random() > 0.2)

        tasks = [asyncio.create_task(user()) for _ in range(10)]
        await settled(rng.randrange(30))
        await pool.close()
        await asyncio.gather(*tasks)
        assert not server.open and pool._size == 0
