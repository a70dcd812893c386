"""A bounded pool of connections for one event loop; it knows no vendor and no settings.

Its rules: first come first served, `max_size` is hard, and a connection is either idle in the
pool, leased to one
holder, being opened, or being closed. A caller never opens a connection itself: the pool's own
task does, so that
cancelling a caller wastes nothing and a server that is down meets one attempt at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import sys
import time
import weakref
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from functools import partial
from typing import Any, TypeVar

from django_asyncsession.bridge import discard
from django_asyncsession.exceptions import (
    PoolClosed,
    PoolTimeout,
    TooManyWaiting,
    WrongLoopError,
)
from django_asyncsession.origins import (
    RequestSite,
    Site,
    creation_site,
    loop_name,
    task_name,
)

from .lease import Lease, _Entry
from .opening import Opening, again
from .options import PoolOptions, check_seconds

logger = logging.getLogger("django_asyncsession.pool")

C = TypeVar("C")

# Seconds that ending a connection (its statement cancelled, its server process gone) may hold up
# its place.
CLOSE_BUDGET = 2.0
# Seconds that its place is kept beyond that while the server could not be told to end it, or was
# and has not: one that does not answer, or a process of it that stands still, must not have the
# statements, and sessions, of twice as many.
UNTOLD_BUDGET = 60.0
# Seconds between two tries to tell it.
TELL_AGAIN = 0.1
# Waiting callers whose time is up and who are told so before the event loop goes on with others.
TOLD_AT_ONCE = 100
# Said to a task that waits for itself.
NESTED = " (nested acquire: this task holds one already)"


class Pool(Opening[C]):
    """A pool of connections of one event loop.

    Args:
        connect: coroutine function that opens a connection.
        check: coroutine function that tells whether a connection still works.
        close: closes a connection at once, and returns an awaitable for what then remains to be
            done, or None. One with the attribute `is_untold` keeps its place while that is true.
        is_permanent: whether an error of `connect` would only come again, so that all who wait are
            told at once.
        is_quiet: whether nothing came from the server since the connection is idle, neither its end
            nor anything else. It is asked at each checkout, so it must neither wait nor send.
        settle: what is left to be awaited of a connection's last use, and tells whether it works
            still; None when nothing is.
        name: what messages call the pool.
        options: sizes and times.
        setting: where the user has written these, for messages.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[C]],
        check: Callable[[C], Awaitable[bool]],
        close: Callable[[C], Awaitable[None] | None],
        *,
        name: str,
        options: PoolOptions,
        setting: str = "the pool options",
        is_permanent: Callable[[BaseException], bool] = lambda error: False,
        is_quiet: Callable[[C], bool] = lambda connection: True,
        settle: Callable[[C], Awaitable[bool] | None] = lambda connection: None,
    ) -> None:
        super().__init__(connect, is_permanent, name=name, options=options)
        self._check, self._close = check, close
        self._is_quiet, self._settle_last_use = is_quiet, settle
        self._setting = setting
        # Leases know their task; for who asks where that waits.
        self.notes_holders = False
        self._idle: deque[_Entry[C]] = deque()
        # Those whose time is up, with how long they waited and the name of their task.
        self._overdue: deque[tuple[asyncio.Future[_Entry[C]], float, str]] = deque()
        self._leases: weakref.WeakSet[Lease[C]] = weakref.WeakSet()
        # Where the sessions were made whose connections were closed under them.
        self.cut_off: list[Site | str] = []
        # Callers that keep a connection while they wait for another one.
        self._keeping = 0
        self._checkers: set[asyncio.Task[None]] = set()
        self._finishers: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._sentinel: AsyncGenerator[None, None] | None = None
        self._drained = asyncio.Event()

    def __repr__(self) -> str:
        state = " closed," if self.closed else ""
        return (
            f"<Pool {self.name!r}{state} {len(self._idle)} idle, {self._leased} in use, "
            f"{len(self._waiters)} waiting, max {self.options.limit}>"
        )

    def __del__(self) -> None:
        # Dropped without close(): nobody can wait for the server, but no socket may stay open.
        if not getattr(self, "closed", True) and not sys.is_finalizing():
            self.terminate()

    # What a user of the pool calls

    async def acquire(self, timeout: float | None = None) -> Lease[C]:
        """A lease of a connection, for at most `timeout` seconds of waiting (default: the pool's).

        Raises:
            PoolTimeout: no connection came free in time.
            TooManyWaiting: `max_waiting` callers wait already.
            PoolClosed: the pool is closed, or was while waiting.
            WrongLoopError: the pool belongs to another event loop.
            ConfigurationError: `timeout` is no time.
            Whatever `connect` raised, when the server refuses or cannot be reached.
        """
        if self.closed or asyncio.get_running_loop() is not self.loop:
            self._check_usable()
        if timeout is not None:
            check_seconds("timeout", timeout)
        if self._sentinel is None:
            await self._start()
        self._counts["requests_num"] += 1
        deadline = time.monotonic() + (self.options.timeout if timeout is None else timeout)
        while True:
            entry = self._pop_idle() or await self._wait(deadline)
            if self.closed:
                # In the very tick in which the connection was handed over.
                self._discard(entry)
                self._check_usable()
            self._leased += 1
            lease = Lease(self, entry)
            last_use = self._settle_last_use(lease.connection)
            if last_use is None or await self._is_true(last_use, lease, deadline):
                check = self._check(lease.connection) if self.options.check else None
                if check is None or await self._is_true(check, lease, deadline):
                    return lease
            self._counts["connections_lost"] += 1
            lease.release(usable=False, lost=True)
            del lease

    @contextlib.contextmanager
    def keeping_one(self) -> Iterator[bool]:
        """For a caller that keeps its connection while it acquires a second one: whether that can
        succeed.

        Yields:
            False when every other connection is kept by somebody who waits for a second one too,
            so that all would wait for each other.
        """
        may_wait = self._keeping + 1 < self.options.limit
        self._keeping += may_wait
        try:
            yield may_wait
        finally:
            self._keeping -= may_wait

    async def open(self) -> None:
        """Open `min_size` connections, or one, and wait for them.

        Raises:
            As `acquire`.
        """
        wanted = max(1, self.options.min_size)
        leases: list[Lease[C]] = []
        try:
            for _ in range(wanted):
                leases.append(await self.acquire())
        finally:
            for lease in leases:
                lease.release()

    async def close(self, grace: float = 0.0) -> None:
        """Close the pool: who waits gets `PoolClosed`, leased connections are cut after `grace`
        seconds.

        It returns when the server has let go of every connection, or after two seconds more.
        Cancelled half way, it still closes every connection.

        Raises:
            ConfigurationError: `grace` is no time.
        """
        check_seconds("grace", grace)
        self.closed = True
        self._fail_waiters(lambda: PoolClosed(f"the pool of {self.name!r} was closed"))
        while self._idle:
            self._discard(self._idle.popleft())
        try:
            if self._leased and grace > 0:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(grace):
                        await self._all_returned()
        finally:
            self.terminate()
        await self._settle()
        if self._sentinel is not None:
            sentinel, self._sentinel = self._sentinel, None
            await sentinel.aclose()

    async def _settle(self) -> None:
        """Wait for what the pool's own tasks still do, but not for long."""
        deadline = self.loop.time() + CLOSE_BUDGET
        while (tasks := self._openers | self._checkers | self._finishers) and (
            left := deadline - self.loop.time()
        ) > 0:
            await asyncio.wait(tasks, timeout=left)
        for task in tasks:
            task.cancel()
        if tasks:
            # Let them end: a task that is destroyed while it is pending is reported.
            await asyncio.wait(tasks, timeout=0.1)

    def terminate(self) -> None:
        """Close the pool and all its connections now, without awaiting; safe when the loop is
        already closed."""
        self.closed = True
        for timer in (self._timer, self._next_try):
            if timer is not None:
                timer.cancel()
        self._fail_waiters(lambda: PoolClosed(f"the pool of {self.name!r} was closed"))
        while self._idle:
            self._discard(self._idle.popleft())
        for lease in self.leases:
            self.cut_off.append(lease.made_at)
            lease.release(usable=False)
        if self._can_spawn():
            for task in self._openers | self._checkers:
                task.cancel()

    def close_now(self) -> None:
        """Close the pool from outside of its loop, which does not run: in it, or by `terminate`
        when it is closed."""
        if self.loop.is_closed() or asyncio._get_running_loop() is not None:
            self.terminate()
        else:
            self.loop.run_until_complete(self.close())

    @property
    def leases(self) -> list[Lease[C]]:
        """Those that were not given back."""
        return list(self._leases)

    @property
    def is_running(self) -> bool:
        """Whether its loop runs, perhaps in another thread."""
        return self.loop.is_running()

    @property
    def is_orphaned(self) -> bool:
        """Whether the pool's loop is closed, so that nobody can use or close it in an orderly
        way."""
        return self.loop.is_closed()

    def discard_idle(self) -> None:
        """Close the idle connections, so that the next ones are new."""
        while self._idle:
            self._discard(self._idle.popleft())

    def forget(self) -> None:
        """Drop everything without touching a socket: this process is a fork, and the sockets are
        its parent's."""
        self.closed = True
        for lease in list(self._leases):
            lease.released = True
            # Collecting a connection says goodbye to the server, with some drivers.
            self._idle.append(lease._entry)

    def stats(self) -> dict[str, int]:
        """Numbers under psycopg_pool's names; times (`_ms`) in milliseconds."""
        return {
            "pool_min": self.options.min_size,
            "pool_max": self.options.limit,
            "pool_size": self._size,
            "pool_available": len(self._idle),
            "requests_waiting": len(self._waiters),
            **{name: self._counts[name] for name in COUNTERS},
        }

    # Handing connections out

    def _check_usable(self) -> None:
        if self.closed:
            raise PoolClosed(f"the pool of {self.name!r} is closed")
        if asyncio.get_running_loop() is not self.loop:
            raise WrongLoopError(
                f"the pool of {self.name!r} belongs to {loop_name(self.loop)} and is used at "
                f"{creation_site()} in {loop_name(asyncio.get_running_loop())}; use the pool of "
                "the loop that runs"
            )

    async def _start(self) -> None:
        """Learn of the loop's end: it closes its async generators, and a suspended one closes the
        pool."""
        self._sentinel = _sentinel(weakref.ref(self))
        await self._sentinel.__anext__()
        self._housekeep()

    def _pop_idle(self) -> _Entry[C] | None:
        """The idle connection used last, so that the others can expire; none while somebody
        waits."""
        now = time.monotonic()
        while self._idle and not self._waiters:
            entry = self._idle.pop()
            if entry.expires <= now:
                self._discard(entry)
            elif self._is_quiet(entry.connection):
                return entry
            else:
                self._check_idle(entry)
        return None

    async def _wait(self, deadline: float) -> _Entry[C]:
        if (
            self._failure is not None
            and time.monotonic() < self._retry_at
            and self._is_permanent(self._failure)
        ):
            self._counts["requests_errors"] += 1
            raise again(self._failure)
        if self.options.max_waiting and len(self._waiters) >= self.options.max_waiting:
            self._counts["requests_errors"] += 1
            raise TooManyWaiting(
                f"no connection to {self.name!r}, {self._usage()} of "
                f"max_waiting={self.options.max_waiting}; "
                f"shed load, or raise max_waiting or max_size in {self._setting}"
            )
        self._counts["requests_queued"] += 1
        started = time.monotonic()
        waiter: asyncio.Future[_Entry[C]] = self.loop.create_future()
        self._waiters[waiter] = None
        self._maybe_open()
        seconds = deadline - started
        timer = self.loop.call_at(
            self.loop.time() + seconds,
            self._time_out,
            waiter,
            seconds,
            task_name(),
            context=contextvars.Context(),
        )
        try:
            return await waiter
        except BaseException:
            self._counts["requests_errors"] += 1
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                # Cancelled in the very tick in which the connection was handed over: it goes to
                # the next.
                self._put(waiter.result())
            else:
                self._waiters.pop(waiter, None)
            raise
        finally:
            timer.cancel()
            self._counts["requests_wait_ms"] += round((time.monotonic() - started) * 1000)

    def _time_out(self, waiter: asyncio.Future[_Entry[C]], seconds: float, task: str) -> None:
        if not self._overdue:
            self.loop.call_soon(self._tell_overdue, context=contextvars.Context())
        self._overdue.append((waiter, seconds, task))

    def _tell_overdue(self) -> None:
        """Tell some whose time is up, and come again for the others: thousands at once would hold
        up the event loop."""
        holder, holders = self._longest_holder()
        for _ in range(min(TOLD_AT_ONCE, len(self._overdue))):
            waiter, seconds, task = self._overdue.popleft()
            if waiter.done():
                continue
            error = PoolTimeout(
                f"no connection to {self.name!r} within {seconds:.1f} s, {self._usage()}{holder}"
                f"{NESTED if task in holders else ''}; "
                f"raise max_size in {self._setting}, or shorten transactions"
            )
            error.__cause__ = self._failure
            waiter.set_exception(error)
            del self._waiters[waiter]
        if self._overdue:
            self.loop.call_soon(self._tell_overdue, context=contextvars.Context())

    def _usage(self) -> str:
        return f"{self._leased} of {self.options.limit} in use, {len(self._waiters)} waiting"

    def _longest_holder(self) -> tuple[str, set[str]]:
        """Who has held a connection for longest, in words, and the tasks that hold one."""
        leases = self.leases
        if not leases:
            return "", set()
        lease = min(leases, key=lambda lease: lease.since)
        held = time.monotonic() - lease.since
        text = f", longest held for {held:.1f} s by {lease.task!r}, taken at {lease.site}"
        if isinstance(lease.made_at, RequestSite):
            text += f" for {lease.made_at}"
        return text, {lease.task for lease in leases}

    async def _is_true(self, question: Awaitable[bool], lease: Lease[C], deadline: float) -> bool:
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await question
        except TimeoutError:
            return False
        except BaseException:
            lease.release(usable=False)
            raise

    # Idle connections that may be dead

    def _suspect_idle(self) -> None:
        """Ask all idle connections whether they work: what closed one may have closed them all."""
        while self._idle:
            self._check_idle(self._idle.pop())

    def _check_idle(self, entry: _Entry[C]) -> None:
        """Ask in a task of the pool's own, so that no caller waits for one that is dead."""
        if self._can_spawn():
            task = self._spawn(self._check_one(entry), self._checkers)
            task.add_done_callback(partial(self._checked, entry))
        else:
            self._discard(entry)

    async def _check_one(self, entry: _Entry[C]) -> None:
        async with asyncio.timeout(CLOSE_BUDGET):
            if not await self._check(entry.connection):
                raise ConnectionError("it was closed by the server")

    def _checked(self, entry: _Entry[C], task: asyncio.Task[None]) -> None:
        error = asyncio.CancelledError() if task.cancelled() else task.exception()
        if error is None:
            self._put(entry)
            return
        if not self.closed:
            self._counts["connections_lost"] += 1
            logger.info("an idle connection of %r is replaced: %s", self.name, error)
        self._discard(entry)
        self._suspect_idle()

    # Taking connections back

    def _take_back(self, lease: Lease[C], usable: bool, lost: bool = False) -> None:
        if self.loop.is_running() and not self._can_spawn():
            # The holder was collected, and unwound, in another thread.
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self.loop.call_soon_threadsafe(
                    self._take_back, lease, usable, lost, context=contextvars.Context()
                )
            return
        self._leases.discard(lease)
        self._leased -= 1
        self._counts["usage_ms"] += round((time.monotonic() - lease.since) * 1000)
        entry = lease._entry
        if self.closed or not usable or entry.expires <= time.monotonic():
            self._counts["returns_bad"] += not usable
            self._discard(entry)
        else:
            self._put(entry)
        if lost:
            self._suspect_idle()
        if self._leased == 0:
            self._drained.set()

    def _take_back_from_anywhere(self, entry: _Entry[C]) -> None:
        """The lease was collected: perhaps in another thread, or in the middle of a method of this
        pool, or after the loop's end."""
        if self._can_spawn():
            remains = self._end(entry.connection)
            self.loop.call_soon(self._lose, remains, context=contextvars.Context())
        elif self.loop.is_closed():
            self._lose(self._end(entry.connection))
        else:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self.loop.call_soon_threadsafe(
                    lambda: self._lose(self._end(entry.connection)), context=contextvars.Context()
                )

    def _lose(self, remains: Awaitable[None] | None) -> None:
        self._leased -= 1
        self._counts["returns_bad"] += 1
        self._let_go(remains)
        if self._leased == 0:
            self._drained.set()

    def _put(self, entry: _Entry[C]) -> None:
        """Give a connection in good state to the first who waits, or keep it."""
        if self.closed or self.loop.is_closed():
            self._discard(entry)
            return
        while self._waiters:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done():
                waiter.set_result(entry)
                return
        entry.idle_since = time.monotonic()
        self._idle.append(entry)

    def _discard(self, entry: _Entry[C]) -> None:
        """Close a connection; its place is free when the server has let go of it, or after two
        seconds."""
        self._let_go(self._end(entry.connection))

    def _end(self, connection: C) -> Awaitable[None] | None:
        """Close a connection; one that fails to close must not keep the others open."""
        try:
            return self._close(connection)
        except Exception:
            logger.exception("a connection of %r could not be closed", self.name)
            return None

    def _let_go(self, remains: Awaitable[None] | None) -> None:
        if remains is None or not self._can_spawn():
            discard(remains)
            self._free()
        else:
            self._finish_later(remains, self.loop.time() + CLOSE_BUDGET)

    def _finish_later(self, remains: Awaitable[None], deadline: float) -> None:
        task = self._spawn(self._finish(remains, deadline), self._finishers)
        task.add_done_callback(partial(self._finished, remains, deadline))

    async def _finish(self, remains: Awaitable[None], deadline: float) -> None:
        latest = deadline + UNTOLD_BUDGET
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    await remains
                return
            except Exception as exc:
                # A generator or coroutine cannot be awaited again, and says nothing of this.
                untold = getattr(remains, "is_untold", False)
                if not untold or self.closed or self.loop.time() >= latest:
                    logger.warning(
                        "a connection of %r did not end in an orderly way: %r", self.name, exc
                    )
                    return
            await asyncio.sleep(TELL_AGAIN)
            deadline = min(self.loop.time() + CLOSE_BUDGET, latest)

    def _finished(
        self, remains: Awaitable[None], deadline: float, task: asyncio.Task[None]
    ) -> None:
        again = task.cancelled() and not isinstance(remains, Coroutine)
        if again and self.loop.time() < deadline and self._can_spawn():
            # The end of the loop cancels all tasks; the server is told all the same, and the
            # sentinel waits for it.
            self._finish_later(remains, deadline)
        else:
            discard(remains)
            self._free()

    def _free(self) -> None:
        self._size -= 1
        if not self.closed:
            self._maybe_open()

    def _fail_waiters(self, error: Callable[[], BaseException], most: int | None = None) -> None:
        while self._waiters and most != 0:
            waiter, _ = self._waiters.popitem(last=False)
            if not waiter.done() and not self.loop.is_closed():
                waiter.set_exception(error())
                most = None if most is None else most - 1

    # Housekeeping

    def _housekeep(self) -> None:
        """Close what is idle for too long, keep `min_size` open, and come again."""
        if self.closed:
            return
        now = time.monotonic()
        while (
            self._idle and self._size > self.options.min_size and self._is_stale(self._idle[0], now)
        ):
            self._discard(self._idle.popleft())
        self._maybe_open()
        # Neither the pool nor the context of its first caller lives until the timer's end.
        self._timer = self.loop.call_later(
            max(0.05, min(self.options.max_idle, self.options.max_lifetime) / 4),
            _housekeep,
            weakref.ref(self),
            context=contextvars.Context(),
        )

    def _is_stale(self, entry: _Entry[C], now: float) -> bool:
        return now - entry.idle_since >= self.options.max_idle or entry.expires <= now

    async def _all_returned(self) -> None:
        self._drained.clear()
        if self._leased:
            await self._drained.wait()


COUNTERS = (
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
)


async def _sentinel(pool: weakref.ref[Pool[Any]]) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        if (alive := pool()) is not None:
            alive.terminate()
            await alive._settle()


def _housekeep(pool: weakref.ref[Pool[Any]]) -> None:
    if (alive := pool()) is not None:
        alive._housekeep()
