"""The connection of a transaction, taken from the pool when first needed and given back clean or
closed."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Protocol, TypeVar

from django.db import OperationalError

from . import bridge
from .backends.base import BridgedMixin, TransactionState
from .connections import call_with
from .exceptions import SessionClosedError
from .pool import Lease
from .threadlocals import Contents

logger = logging.getLogger("django_asyncsession")

T = TypeVar("T")

# The leases of connections that sessions share, as they do in a test, which were taken in this
# context or in one that it descends from: what is begun here nests in them.
taken: contextvars.ContextVar[tuple[Lease[BridgedMixin], ...]] = contextvars.ContextVar(
    "taken", default=()
)

# Seconds that a rollback, or the reset of a connection, may take before the connection is closed
# instead.
CLEANUP_BUDGET = 2.0


class Source(Protocol):
    """What a transaction needs of its database: the alias and connections."""

    @property
    def alias(self) -> str: ...

    async def acquire(self) -> Lease[BridgedMixin]: ...


class Checkout:
    """At most one connection, and the calls that run on it."""

    def __init__(self, database: Source, made_at: str, contents: Contents | None) -> None:
        self._database = database
        # Of the thread-locals that the calls find.
        self._contents = contents
        # Where the session was made.
        self.made_at = made_at
        self._lease: Lease[BridgedMixin] | None = None
        # The time limit of the call that runs, and what it raises when `stop` ends it.
        self._limit: asyncio.Timeout | None = None
        self._stopped_with: Exception | None = None
        # The server did not answer in time.
        self._is_unanswered = False

    @property
    def is_taken(self) -> bool:
        """Whether there is a connection."""
        return self._lease is not None

    @property
    def is_held(self) -> bool:
        """Whether there is a connection that nobody else has ended the lease of."""
        return self._lease is not None and not self._lease.released

    @property
    def is_lost(self) -> bool:
        """Whether the connection was closed, by a cancellation or by the server."""
        return self._lease is None or (
            self._lease.connection.abandoned
            or self._lease.connection.transaction_state is TransactionState.UNKNOWN
        )

    @property
    def _is_server_gone(self) -> bool:
        """Whether it was not this side that ended the connection."""
        return self._is_unanswered or (self.is_lost and not self.wrapper.cut)

    @property
    def wrapper(self) -> BridgedMixin:
        """The connection.

        Raises:
            SessionClosedError: it was given back.
        """
        if self._lease is None:
            raise SessionClosedError(
                f"the transaction on {self._database.alias!r} has no connection any more"
            )
        return self._lease.connection

    async def call(self, fn: Callable[[BridgedMixin], T], budget: float | None = None) -> T:
        """Call `fn` in the bridge, with the connection as the one that Django uses.

        Args:
            budget: seconds after which the call is cut, and the connection closed with it.

        Raises:
            OperationalError: it took longer than `budget`.
            Whatever `fn` raises, or was given to `stop`.
        """
        outer = self._limit
        limit = asyncio.timeout(budget)
        try:
            async with limit:
                self._limit = limit
                wrapper = await self._take()
                return await self._call(wrapper, partial(fn, wrapper))
        except TimeoutError as exc:
            if not limit.expired():
                raise
            raise self._reason(budget) from exc
        finally:
            self._limit = outer
            # It keeps the task, which keeps its exception, whose traceback keeps this frame.
            del limit

    async def _call(self, wrapper: BridgedMixin, fn: Callable[[], T]) -> T:
        before = cancels()
        run = bridge.run if self._contents is None else self._contents.run
        try:
            result: T = await run(call_with, wrapper, fn)
        except Exception as exc:
            if wrapper.cut and cancels() > before:
                # The task was cancelled in the call, and what unwound raised something else.
                raise asyncio.CancelledError from exc
            raise
        return result

    async def _take(self) -> BridgedMixin:
        if self._lease is None:
            lease = await self._database.acquire()
            lease.connection.lease = lease.token
            lease.made_at = self.made_at
            self._lease = lease
        elif self._lease.shared:
            await self._lease.turn()
        return self._lease.connection

    def _reason(self, budget: float | None) -> Exception:
        error, self._stopped_with = self._stopped_with, None
        self._is_unanswered = error is None
        return error or OperationalError(
            f"{self._database.alias!r} did not answer within {budget} s, so its connection is "
            "closed"
        )

    def stop(self, error: Exception) -> None:
        """Cut the call that runs, in another task; it raises `error`."""
        if self._limit is not None and not self._limit.expired():
            self._stopped_with = error
            self._limit.reschedule(asyncio.get_running_loop().time())

    async def give_back(self) -> None:
        """Return the connection to its pool, reset; or close it when its state is not certain."""
        lost = self.is_taken and self._is_server_gone
        lease, self._lease = self._lease, None
        if lease is None:
            return
        if lease.shared:
            await lease.finish()
            return
        wrapper, usable = lease.connection, False
        try:
            usable = not nothing_can_wait() and await _reset(wrapper)
        finally:
            wrapper.lease = None
            if not usable:
                # An error that it keeps would keep the frames of its caller.
                wrapper.scrub()
            lease.release(usable=usable, lost=lost)

    def abandon(self) -> None:
        """Close the connection without awaiting."""
        lease, self._lease = self._lease, None
        if lease is not None and lease.shared:
            lease.finish_now()
        elif lease is not None:
            lease.connection.lease = None
            lease.connection.abandon()
            lease.connection.scrub()
            lease.release(usable=False)


async def _reset(wrapper: BridgedMixin) -> bool:
    """Whether the connection could be brought back to how it was before."""
    if wrapper.abandoned or wrapper.transaction_state is TransactionState.UNKNOWN:
        return False
    try:
        async with asyncio.timeout(CLEANUP_BUDGET):
            await bridge.run(call_with, wrapper, partial(_clean, wrapper))
    except Exception as exc:
        logger.warning(
            "a connection of %r could not be reset and is closed: %s", wrapper.alias, exc
        )
        return False
    return wrapper.transaction_state is TransactionState.IDLE


def _clean(wrapper: BridgedMixin) -> None:
    if wrapper.in_atomic_block or not wrapper.autocommit:
        raise OperationalError("the transaction was not ended")
    if wrapper.transaction_state is not TransactionState.IDLE:
        logger.warning(
            "a transaction begun by SQL on %r was left open and is rolled back; use "
            "session.begin()",
            wrapper.alias,
        )
        wrapper.rollback()
    # First, so that what resets and sets up again sees nothing of the lease.
    wrapper.scrub()
    wrapper.reset()


def cancels() -> int:
    """How often the current task was asked to end and has not taken it back."""
    task = asyncio.current_task()
    return 0 if task is None else task.cancelling()


def nothing_can_wait() -> bool:
    """Whether the coroutine is being closed: whatever waits now would break that."""
    return isinstance(sys.exception(), GeneratorExit)
