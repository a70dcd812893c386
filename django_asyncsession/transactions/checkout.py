"""The connection of a transaction: taken from its pool for the first call, used by one task at a
time, and given back clean or closed."""

from __future__ import annotations

import asyncio
import contextvars
import enum
import logging
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn, ParamSpec, Protocol, TypeVar

from django.db import Error, OperationalError

from django_asyncsession import bridge
from django_asyncsession.backends.base import BridgedMixin
from django_asyncsession.backends.options import TransactionOptions, TransactionState
from django_asyncsession.exceptions import (
    QueryTimeout,
    SessionClosedError,
    SessionInUseError,
    SessionStateError,
    WrongLoopError,
)
from django_asyncsession.origins import RequestSite, Site, creation_site, loop_name, made, task_name
from django_asyncsession.pool.lease import Lease
from django_asyncsession.signals import connection_leased
from django_asyncsession.threadlocals import Contents

from .turn import Mark, Task, Turn, inside

logger = logging.getLogger("django_asyncsession")

P = ParamSpec("P")
T = TypeVar("T")

# The leases of connections that sessions share, as they do in a test, which were taken in this
# context or in one that it descends from: what is begun here nests in them.
taken: contextvars.ContextVar[tuple[Lease[BridgedMixin], ...]] = contextvars.ContextVar(
    "taken", default=()
)

# Seconds that a rollback, or the reset of a connection, may take before the connection is closed
# instead.
CLEANUP_BUDGET = 2.0
# A PostgreSQL transaction is dead in these states; elsewhere a failed statement alone is taken
# back.
DEAD = (TransactionState.FAILED, TransactionState.UNKNOWN)


class State(enum.Enum):
    """Where a transaction or a session is in its life."""

    NEW = "not begun"
    OPEN = "in transaction"
    IDLE = "open"
    CLOSED = "closed"


class ConnectionSource(Protocol):
    """What a transaction needs of its database: the alias, the kind and connections."""

    @property
    def alias(self) -> str: ...

    @property
    def vendor(self) -> str: ...

    async def acquire(self) -> Lease[BridgedMixin]: ...


class Use(NamedTuple):
    """A use of a connection by sync code that asked for it while it ran."""

    mark: Mark
    # The task whose call runs around it, and how often this one had been asked to end before.
    outer: Task | None
    cancels: int


class Checkout:
    """At most one connection, and the calls that run on it, one at a time.

    Args:
        database: where connections come from.
        autocommit: each statement commits by itself.
        options: what holds for the time of the checkout.
        site: where the session was made, for messages.
        contents: of the thread-locals that the calls find; None leaves them alone.
    """

    def __init__(
        self,
        database: ConnectionSource,
        *,
        autocommit: bool,
        options: TransactionOptions,
        site: Site | str,
        contents: Contents | None,
    ) -> None:
        self._database = database
        self.alias = database.alias
        self.autocommit, self.options = autocommit, options
        self.state = State.NEW
        self._site = site
        self._run_with = bridge.run_with if contents is None else contents.run_with
        self._loop: asyncio.AbstractEventLoop | None = None
        # Whoever alone may use it: the task of the innermost block, or of an `atomic()`.
        self.owner: Task | None = None
        self.turn = Turn(self.alias)
        self.lease: Lease[BridgedMixin] | None = None
        # What the first call does before anything else was done.
        self._entered = False
        # Whom it is for; not kept alive by it.
        self.session: Callable[[], Any] = _nobody
        # What it shall see, before anything is read.
        self.snapshot: str | None = None
        # The task whose call runs, and what it shall raise when `stop` has cut it.
        self._running: Task | None = None
        self._stopped_with: Exception | None = None
        # The server did not answer in time.
        self._is_unanswered = False

    # The guard

    def check(self) -> Task:
        """Refuse a use that cannot be.

        Returns:
            The current task.

        Raises:
            SessionStateError: not begun.
            SessionClosedError: ended.
            WrongLoopError: another event loop runs here, or none.
            SessionInUseError: another task has a nested block open.
        """
        if self.state is not State.OPEN or asyncio._get_running_loop() is not self._loop:
            self._refuse()
        task = asyncio.current_task()
        if self.owner is not None and self.owner is not task:
            self.check_owner()
        return task  # type: ignore[return-value]

    def check_owner(self) -> None:
        """Refuse every task but the one whose block is open.

        Raises:
            SessionInUseError: another task has a nested block open.
        """
        if self.owner is not None and self.owner is not asyncio.current_task():
            raise SessionInUseError(
                f"task {self.owner.get_name()!r} has a nested block open in the session of "
                f"{self.alias!r}, so task {task_name()!r} cannot use it; use a session of its own, "
                "or wait for the block's end"
            )

    def _refuse(self) -> NoReturn:
        if self.state is State.NEW:
            raise SessionStateError(
                f"the transaction on {self.alias!r} has not begun; call begin(), or use `async "
                "with`"
            )
        if self.state is State.CLOSED:
            raise session_closed(self.alias, self._site)
        check_loop(self._loop, self.alias, self._site)
        raise AssertionError("nothing to refuse")

    # The turn

    async def take_turn(self) -> Mark:
        """Wait for the turn to use the connection.

        Returns:
            What `leave_turn` takes.

        Raises:
            As `check`; SessionInUseError for a task that was started by the one that has the turn.
        """
        task = self.check()
        if not self.turn.take(task):
            await self.turn.wait(task)
            try:
                self.check()
            except BaseException:
                self.turn.leave()
                raise
        return inside.set((*inside.get(), self.turn.mark))

    def leave_turn(self, mark: Mark) -> None:
        """Let the next task have the turn."""
        # A coroutine may be closed in another context, and even thread, than it ran in.
        with suppress(ValueError):
            inside.reset(mark)
        self.turn.leave()

    # Calls

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the sync `fn` natively async, with this connection as the one that Django uses.

        Raises:
            QueryTimeout: the server ended a statement by its timeout.
            As `take_turn`; whatever `fn` raises.
        """
        turn, task = self.turn, asyncio.current_task()
        # What `check` asks, without a call of its own.
        may = self.state is State.OPEN and asyncio._get_running_loop() is self._loop
        may = may and (self.owner is None or self.owner is task)
        if may and turn.take(task):  # type: ignore[arg-type]
            mark = inside.set((*inside.get(), turn.mark))
        else:
            mark = await self.take_turn()
        # It keeps its exception, whose traceback keeps this frame.
        del task
        try:
            return await self.call(fn, args, kwargs)
        finally:
            self.leave_turn(mark)

    async def call(
        self, fn: Callable[..., T], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> T:
        """As `run`, by whoever has the turn already."""
        task = asyncio.current_task()
        outer, self._running = self._running, task
        before = 0 if task is None else task.cancelling()
        try:
            lease = self.lease
            if lease is None:
                lease = await self._take()
            wrapper = lease.connection
            wrapper.ran_since = True
            if not wrapper.ran:
                wrapper.note_ran()
            if self._entered:
                result: T = await self._run_with(wrapper, fn, args, kwargs)
            else:
                result = await self._run_with(wrapper, self._begun, (wrapper, fn, args, kwargs))
        except BaseException as exc:
            self._translate(exc, before)
            raise
        finally:
            self._running = outer
            # It keeps its exception, whose traceback keeps this frame.
            del task, outer
        if self._stopped_with is not None:
            # The code has swallowed it, and goes on.
            self._take_stop()
        if wrapper.transaction_state is TransactionState.FAILED:
            self._doom(None)
        return result

    # What `run` does around a call, in two halves: for sync code that asks for the connection
    # while it runs.

    async def begin_use(self) -> Use:
        """Take the turn and the connection; `prepare` comes next, and `end_use` last.

        Raises:
            As `run`.
        """
        mark = await self.take_turn()
        use = Use(mark, self._running, cancels())
        self._running = asyncio.current_task()
        try:
            if self.lease is None:
                await self._take()
        except BaseException as exc:
            self.end_use(use, exc)
            raise
        return use

    def begin_use_at_once(self) -> Use | None:
        """As `begin_use`, if there is nothing to wait for; else None."""
        if self.lease is None:
            return None
        task = self.check()
        if not self.turn.take(task):
            return None
        use = Use(inside.set((*inside.get(), self.turn.mark)), self._running, task.cancelling())
        self._running = task
        return use

    def prepare(self) -> BridgedMixin:
        """Begin, if nothing was sent yet; called in the bridge.

        Returns:
            The connection.
        """
        wrapper = self.wrapper
        wrapper.ran_since = True
        if not wrapper.ran:
            wrapper.note_ran()
        if not self._entered:
            self._begin(wrapper)
        return wrapper

    def end_use(self, use: Use, error: BaseException | None) -> None:
        """Let the next have the turn.

        Args:
            error: what the code raised.

        Raises:
            What the error means, if it means another one.
        """
        try:
            if error is not None:
                self._translate(error, use.cancels)
            else:
                self._check_after_call()
        finally:
            self._running = use.outer
            self.leave_turn(use.mark)

    def _check_after_call(self) -> None:
        if self._stopped_with is not None:
            # The code has swallowed it, and goes on.
            self._take_stop()
        if self.wrapper.transaction_state is TransactionState.FAILED:
            self._doom(None)

    async def call_within(self, seconds: float, fn: Callable[[], T]) -> T:
        """As `call`, but cut after so many seconds, and the connection closed with it.

        Raises:
            OperationalError: it took longer.
        """
        return await self._within(seconds, self.call(fn))

    async def _within(self, seconds: float, what: Coroutine[Any, Any, T]) -> T:
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                return await what
        except TimeoutError as exc:
            if not limit.expired():
                raise
            self._is_unanswered = True
            raise OperationalError(
                f"{self.alias!r} did not answer within {seconds} s, so its connection is closed"
            ) from exc
        finally:
            # They keep the task, which keeps its exception, whose traceback keeps this frame.
            del limit, what

    def stop(self, error: Exception) -> None:
        """Cut the call that another task has running; it raises `error`."""
        if self._running is not None and self._stopped_with is None:
            self._stopped_with = error
            self._running.cancel()

    def _take_stop(self) -> Exception | None:
        """What `stop` wants to be raised; its cancelling is taken back."""
        error, self._stopped_with = self._stopped_with, None
        if (task := asyncio.current_task()) is not None:
            task.uncancel()
        return error

    async def _take(self) -> Lease[BridgedMixin]:
        lease = await self._database.acquire()
        lease.connection.begin_lease(lease.token)
        lease.made_at = self._site
        if lease.holder is not None:
            lease.maker = getattr(self.session(), "maker", None)
        self.lease = lease
        return lease

    def _begun(
        self, wrapper: BridgedMixin, fn: Callable[..., T], args: Any, kwargs: dict[str, Any] | None
    ) -> T:
        self._begin(wrapper)
        return fn(*args, **kwargs or {})

    def _begin(self, wrapper: BridgedMixin) -> None:
        self._enter(wrapper)
        if self.snapshot is not None:
            wrapper.import_snapshot(self.snapshot)
        if connection_leased.receivers:
            self._announce(wrapper)
        self._entered = True

    def _announce(self, wrapper: BridgedMixin) -> None:
        """Let receivers set up the lease; an error of theirs is one of the transaction."""
        session, changed = self.session(), wrapper.changed
        try:
            connection_leased.send(
                type(wrapper),
                connection=wrapper,
                alias=self.alias,
                session=session,
                request=getattr(session, "request", None),
            )
        except BaseException as exc:
            if wrapper.in_atomic_block:
                # It has begun, and all it can still do is to end.
                self._entered = True
                self._doom(exc if isinstance(exc, Exception) else None)
            raise
        # Every lease is set up so, also those that read beside this one.
        wrapper.changed = changed

    def _enter(self, wrapper: BridgedMixin) -> None:
        """Begin on the connection; called in the bridge, before the first statement."""
        wrapper.configure_autocommit(self.options)

    # Errors

    def _translate(self, error: BaseException, before: int) -> None:
        """Raise what a call's error means, if it means another one; doom the transaction.

        Args:
            error: what the call raised.
            before: how often the task had been asked to end when the call began.
        """
        lease = self.lease
        cancelled = lease is not None and lease.connection.cut and cancels() > before
        stopped = None if self._stopped_with is None else self._take_stop()
        if cancelled or isinstance(error, asyncio.CancelledError):
            if stopped is not None and cancels() <= before:
                self._note(stopped)
                raise stopped from error
            if isinstance(error, Exception):
                # The task was cancelled in the call, and what unwound raised something else.
                raise asyncio.CancelledError from error
        elif isinstance(error, Exception) and self._note(error):
            raise QueryTimeout(
                f"{error} (session of {self.alias!r})".replace("\n", " ")
            ) from error.__cause__

    def _note(self, error: Exception) -> bool:
        """Let no statement follow an error of the database; tell whether it was a timeout of the
        server."""
        if self.lease is None:
            return False
        wrapper = self.lease.connection
        of_driver = isinstance(error, Error) and isinstance(error.__cause__, wrapper.Database.Error)
        if wrapper.transaction_state in DEAD or (of_driver and wrapper.statement_rollback):
            self._doom(error)
        return of_driver and wrapper.is_timeout(error, self.options)

    def _doom(self, error: Exception | None) -> None:
        wrapper = self.wrapper
        if wrapper.in_atomic_block and not wrapper.needs_rollback:
            wrapper.needs_rollback = True
            wrapper.rollback_exc = error

    # The connection

    @property
    def is_taken(self) -> bool:
        """Whether there is a connection."""
        return self.lease is not None

    @property
    def holds_connection(self) -> bool:
        """Whether a connection is taken from the pool, and nobody else has ended its lease."""
        return self.lease is not None and not self.lease.released

    @property
    def is_lost(self) -> bool:
        """Whether the connection was closed, by a cancellation or by the server."""
        wrapper = self._wrapper
        return wrapper is None or (
            wrapper.abandoned or wrapper.transaction_state is TransactionState.UNKNOWN
        )

    @property
    def wrapper(self) -> BridgedMixin:
        """The connection, for sync code that `run` calls.

        Raises:
            SessionClosedError: it was given back.
        """
        if self.lease is None:
            raise SessionClosedError(
                f"the transaction on {self.alias!r} has no connection any more"
            )
        return self.lease.connection

    @property
    def _wrapper(self) -> BridgedMixin | None:
        return None if self.lease is None else self.lease.connection

    @property
    def changed(self) -> str:
        """The first word of the first statement that did more than read; empty: there was none."""
        return "" if (wrapper := self._wrapper) is None else wrapper.changed

    async def give_back(self) -> None:
        """Return the connection to its pool, reset; or close it when its state is not certain."""
        lease, self.lease = self.lease, None
        if lease is None:
            return
        wrapper, usable = lease.connection, False
        gone = wrapper.abandoned or wrapper.transaction_state is TransactionState.UNKNOWN
        # It was not this side that ended it.
        lost = self._is_unanswered or (gone and not wrapper.cut)
        try:
            # As `nothing_can_wait` asks.
            if not gone and not isinstance(sys.exception(), GeneratorExit):
                usable = _clean_at_once(wrapper) or await _reset(wrapper)
        finally:
            wrapper.lease = None
            if not usable:
                # An error that it keeps would keep the frames of its caller.
                wrapper.scrub()
            lease.release(usable=usable, lost=lost)

    def close_connection(self) -> None:
        """Close the connection without awaiting."""
        lease, self.lease = self.lease, None
        if lease is not None:
            lease.connection.lease = None
            lease.connection.abandon()
            lease.connection.scrub()
            lease.release(usable=False)


def _nobody() -> None:
    """The session of a transaction that belongs to none."""


async def _reset(wrapper: BridgedMixin) -> bool:
    """Whether the connection could be brought back to how it was before."""
    try:
        async with asyncio.timeout(CLEANUP_BUDGET):
            await bridge.run_with(wrapper, _clean, (wrapper,))
    except Exception as exc:
        logger.warning(
            "a connection of %r could not be reset and is closed: %s", wrapper.alias, exc
        )
        return False
    return wrapper.transaction_state is TransactionState.IDLE


def _clean_at_once(wrapper: BridgedMixin) -> bool:
    """Do what `_clean` does, if nothing has to be awaited for it; whether it was done."""
    if wrapper.in_atomic_block or not wrapper.autocommit:
        return False
    try:
        if wrapper.ran:
            wrapper.scrub()
        return wrapper.reset_at_once()
    except Exception:
        # `_reset` comes to it again.
        return False


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


def session_closed(alias: str, site: Site | str, how: str = "is closed") -> SessionClosedError:
    """The error for a session that is used after its end.

    Args:
        site: where it was made, or its request.
        how: it ended.
    """
    remedy = "make a new one"
    if isinstance(site, RequestSite):
        remedy = "work that outlives it needs a session of its own: @background_session"
    return SessionClosedError(f"the session of {alias!r} {made(site)} {how}; {remedy}")


def check_loop(loop: asyncio.AbstractEventLoop | None, alias: str, site: Site | str) -> None:
    """Refuse to use what belongs to `loop` anywhere else.

    Args:
        site: where the session was made, for the message.

    Raises:
        WrongLoopError: another event loop runs here, or none, as in a thread.
    """
    running = asyncio._get_running_loop()
    if loop is not None and running is not loop:
        raise WrongLoopError(
            f"the session of {alias!r} {made(site)} belongs to {loop_name(loop)} and is used at "
            f"{creation_site()} in {loop_name(running)}; make a session in the loop that uses it"
        )


def cancels() -> int:
    """How often the current task was asked to end and has not taken it back."""
    task = None if asyncio._get_running_loop() is None else asyncio.current_task()
    return 0 if task is None else task.cancelling()


def nothing_can_wait() -> bool:
    """Whether the coroutine is being closed: whatever waits now would break that."""
    return isinstance(sys.exception(), GeneratorExit)
