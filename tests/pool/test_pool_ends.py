"""The pool, with fake connections: how it ends, with its loop or before, in any order of events."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import gc
import random
import threading
import time
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from django_asyncsession.exceptions import PoolClosed, WrongLoopError
from django_asyncsession.pool.lease import Lease
from django_asyncsession.pool.options import PoolOptions
from django_asyncsession.pool.pool import Pool
from tests.faults import Elapsed, cancel_at, outcome_of
from tests.pool.fakes import Fake, Server, pool_of, settled, until

pytestmark = pytest.mark.usefixtures("no_freeze")


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
