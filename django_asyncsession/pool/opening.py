"""How a pool opens connections: one attempt at a time while the server fails, another one beside an
attempt that is not answered, and never by a caller."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import logging
import random
import time
import weakref
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Generic, TypeVar

from django_asyncsession.exceptions import PoolTimeout

from .lease import _Entry
from .options import PoolOptions

logger = logging.getLogger("django_asyncsession.pool")

C = TypeVar("C")

# Seconds between attempts to connect after a failure: doubled each time, between these bounds.
BACKOFF_MIN, BACKOFF_MAX = 0.1, 2.0
# Seconds that one attempt to connect may take before another one is made beside it.
PATIENCE = 1.0
# A connection lives between 90 and 100 % of max_lifetime, so that those opened together do not
# expire together.
LIFETIME_SPREAD = 0.1


class Opening(Generic[C]):
    """The part of a pool that opens connections.

    Args:
        connect: coroutine function that opens a connection.
        is_permanent: whether an error of `connect` would only come again.
        name: what messages call the pool.
        options: sizes and times.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[C]],
        is_permanent: Callable[[BaseException], bool],
        *,
        name: str,
        options: PoolOptions,
    ) -> None:
        self._connect, self._is_permanent = connect, is_permanent
        self.name, self.options = name, options
        self.loop = asyncio.get_running_loop()
        self._waiters: OrderedDict[asyncio.Future[_Entry[C]], None] = OrderedDict()
        # Places taken: idle, leased, being opened, checked and closed.
        self._size = self._opening = self._leased = 0
        self._openers: set[asyncio.Task[None]] = set()
        # Those that wait for the server, the oldest first, and since when.
        self._connecting: dict[asyncio.Task[None], float] = {}
        self._patience = PATIENCE
        self._next_try: asyncio.TimerHandle | None = None
        self._failure: BaseException | None = None
        self._failing_since = self._backoff = self._retry_at = 0.0
        self._counts: Counter[str] = Counter()
        self.closed = False

    def _put(self, entry: _Entry[C]) -> None:
        """Give a connection in good state to the first who waits, or keep it."""
        raise NotImplementedError

    def _fail_waiters(self, error: Callable[[], BaseException], most: int | None = None) -> None:
        """Tell those who wait, `most` of them at the most, that there is none."""
        raise NotImplementedError

    def _maybe_open(self) -> None:
        """Start as many attempts to connect as are wanted and allowed: only one while the server
        fails."""
        wanted = max(len(self._waiters), self.options.min_size - self._size + self._opening)
        allowed = self.options.limit - self._size
        if self._failure is not None:
            allowed = min(allowed, 1 - self._opening)
        for _ in range(min(wanted - self._opening, allowed)):
            self._start_attempt()

    def _start_attempt(self) -> None:
        if self._can_spawn():
            self._size += 1
            self._opening += 1
            self._spawn(self._open_one(), self._openers).add_done_callback(self._opener_ended)

    async def _open_one(self) -> None:
        if self._failure is not None:
            await asyncio.sleep(max(0.0, self._retry_at - time.monotonic()))
        started = time.monotonic()
        try:
            connection = await self._connect_watched(started)
        except Exception as exc:
            self._opening -= 1
            self._size -= 1
            self._connect_failed(exc, started)
            return
        self._opening -= 1
        self._counts["connections_ms"] += round((time.monotonic() - started) * 1000)
        self._failure, self._backoff, self._patience = None, 0.0, PATIENCE
        spread = 1 - LIFETIME_SPREAD * random.random()
        self._put(_Entry(connection, time.monotonic() + self.options.max_lifetime * spread))
        for task, since in list(self._connecting.items()):
            # The server answers, but not these: what they sent is lost.
            if since < started - PATIENCE:
                task.cancel()
        if not self.closed:
            self._maybe_open()

    async def _connect_watched(self, started: float) -> C:
        self._counts["connections_num"] += 1
        task = asyncio.current_task()
        assert task is not None
        self._connecting[task] = started
        self._expect_answer()
        try:
            return await self._connect_in_time()
        finally:
            del self._connecting[task]
            if not self._connecting and self._next_try is not None:
                self._next_try.cancel()

    def _expect_answer(self) -> None:
        """Come back when the newest attempt has had its time."""
        if self._next_try is not None:
            self._next_try.cancel()
        self._next_try = self.loop.call_later(
            PATIENCE, _try_another, weakref.ref(self), context=contextvars.Context()
        )

    def _try_another(self) -> None:
        """Connect once more beside attempts that are not answered: what those sent may be lost, and
        the server well again.

        When there is no place for one more, the oldest attempt is given up for it, after twice as
        long each time: the server may only be slow.
        """
        if self.closed or not self._waiters or not self._connecting:
            return
        if self._size < self.options.limit:
            self._start_attempt()
            return
        oldest, since = next(iter(self._connecting.items()))
        if time.monotonic() - since < self._patience:
            self._expect_answer()
            return
        self._patience *= 2
        oldest.add_done_callback(self._replace_attempt)
        oldest.cancel()

    def _replace_attempt(self, task: asyncio.Task[None]) -> None:
        if self._waiters and self._size < self.options.limit and not self.closed:
            self._start_attempt()

    async def _connect_in_time(self) -> C:
        """Connect, for no longer than a caller waits: a name server or a server that never answers
        must not keep the place."""
        limit = asyncio.timeout(self.options.timeout)
        try:
            async with limit:
                return await self._connect()
        except TimeoutError as exc:
            if not limit.expired():
                raise
            raise PoolTimeout(
                f"connecting to {self.name!r} took longer than {self.options.timeout:.1f} s"
            ) from exc

    def _opener_ended(self, task: asyncio.Task[None]) -> None:
        """A task that is cancelled before its first step runs nothing of its own."""
        if task.cancelled() or task.exception() is not None:
            self._opening -= 1
            self._size -= 1

    def _connect_failed(self, error: Exception, started: float) -> None:
        """Tell the first who waits, or all of them when it would only fail again; then try again
        later."""
        self._counts["connections_errors"] += 1
        now = time.monotonic()
        if self._failure is None or started > self._retry_at + BACKOFF_MAX:
            # The first failure, or the first after a time in which nobody wanted a connection.
            self._failing_since, self._backoff = now, 0.0
        self._failure = error.with_traceback(None)
        self._backoff = min(max(BACKOFF_MIN, self._backoff * 2), BACKOFF_MAX)
        self._retry_at = now + self._backoff * random.uniform(0.8, 1.0)
        logger.warning("connecting to %r failed: %s", self.name, error)
        lasts = now - self._failing_since > self.options.reconnect_timeout
        gives_up = lasts or self._is_permanent(error)
        if gives_up:
            self._fail_waiters(lambda: again(error))
        elif not self._leased:
            self._fail_waiters(lambda: again(error), most=1)
        # Else the server works, but has no room for one more: who waits gets the next that is free.
        if not self.closed and not gives_up:
            self._maybe_open()

    def _can_spawn(self) -> bool:
        return asyncio._get_running_loop() is self.loop

    def _spawn(
        self, coroutine: Coroutine[Any, Any, None], group: set[asyncio.Task[None]]
    ) -> asyncio.Task[None]:
        # A context of its own: the task outlives the request that happened to start it.
        task = self.loop.create_task(coroutine, context=contextvars.Context())
        group.add(task)
        task.add_done_callback(group.discard)
        return task


def _try_another(pool: weakref.ref[Opening[Any]]) -> None:
    if (alive := pool()) is not None:
        alive._try_another()


def again(error: BaseException) -> BaseException:
    """A copy of `error` to raise: one object raised in several tasks would collect all their
    tracebacks."""
    try:
        fresh = copy.copy(error)
    except Exception:
        # Its class cannot be made from its arguments alone.
        return error.with_traceback(None)
    fresh.__cause__ = error.__cause__
    return fresh
