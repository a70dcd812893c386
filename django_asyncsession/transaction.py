"""One connection and one database transaction on it: the low-level API under the session."""

from __future__ import annotations

import asyncio
import contextvars
import enum
import inspect
import logging
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from functools import partial
from types import TracebackType
from typing import Any, ParamSpec, Protocol, Self, TypeVar

from django.db import Error, OperationalError
from django.db.transaction import Atomic, TransactionManagementError

from . import bridge
from .backends.base import BridgedMixin, TransactionOptions, TransactionState, call_served
from .blocks import Block
from .exceptions import (
    CommitUnknown,
    QueryTimeout,
    SessionClosedError,
    SessionInUseError,
    SessionStateError,
    WrongLoopError,
)
from .pool import Lease, creation_site, task_name
from .results import BaseResultSet, MemoryCursor
from .statements import check_one_statement, check_savepoint_name
from .turns import Turns, _held

logger = logging.getLogger("django_asyncsession")

P = ParamSpec("P")
T = TypeVar("T")
Params = Sequence[Any] | dict[str, Any] | None

# Seconds that a rollback, or the reset of a connection, may take before the connection is closed
# instead.
CLEANUP_BUDGET = 2.0


class Source(Protocol):
    """What a transaction needs of its database: the alias and connections."""

    @property
    def alias(self) -> str: ...

    async def acquire(self) -> Lease[BridgedMixin]: ...


class State(enum.Enum):
    """Where a transaction or a session is in its life."""

    NEW = "not begun"
    OPEN = "in transaction"
    IDLE = "open"
    CLOSED = "closed"


class Outcome(enum.Enum):
    """How a transaction ended, as far as the client knows."""

    COMMITTED = "committed"
    ROLLED_BACK = "rolled back"
    UNKNOWN = "unknown"


# A PostgreSQL transaction is dead in these states; elsewhere a failed statement alone is taken
# back.
DEAD = (TransactionState.FAILED, TransactionState.UNKNOWN)


class Transaction:
    """One transaction on one connection, which is leased when the first statement runs.

    Args:
        database: where connections come from.
        autocommit: True: no transaction at all, each statement commits by itself.
        isolation, read_only, deferrable: what BEGIN says; None leaves the database's default.
        timeout, lock_timeout, idle_timeout: seconds that a statement, a wait for a lock, or the
            pause between two
            statements may take before the server ends it.

    Raises:
        ConfigurationError: an option that cannot be.
    """

    def __init__(self, database: Source, *, autocommit: bool = False, **options: Any) -> None:
        self._database = database
        self.alias = database.alias
        self.autocommit = autocommit
        self.options = TransactionOptions(**options)
        self.state = State.NEW
        self.outcome: Outcome | None = None
        self._site = creation_site()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._begun_by: tuple[asyncio.Task[Any] | None, int] = (None, 0)
        self._owner: asyncio.Task[Any] | None = None
        self._scope: asyncio.Timeout | None = None
        self._turns: Turns
        self._lease: Lease[BridgedMixin] | None = None
        self._atomic: Atomic | None = None
        self._blocks: list[Block] = []
        self._commit_hooks: list[tuple[Callable[[], Any], bool]] = []
        self._rollback_hooks: list[tuple[Block | None, Callable[[], Any]]] = []
        self._rollback_wanted = False
        self._ready = False

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.alias!r} {describe(self.state, len(self._blocks))}>"

    # Begin and end

    async def begin(self) -> Self:
        """Begin. The connection is taken from the pool, and BEGIN sent, with the first statement.

        Raises:
            SessionStateError: it has begun already.
            SessionClosedError: it has ended.
        """
        if self.state is State.CLOSED:
            raise SessionClosedError(
                f"this transaction on {self.alias!r} has ended; make a new one"
            )
        if self.state is not State.NEW:
            raise SessionStateError(
                f"a transaction on {self.alias!r} has begun already; nest with create_savepoint()"
            )
        self.begin_now()
        return self

    def begin_now(self) -> Self:
        """Begin without awaiting, which is possible because BEGIN is sent with the first
        statement."""
        self._loop = asyncio.get_running_loop()
        self._turns = Turns(self.alias)
        task = asyncio.current_task()
        self._begun_by = (task, task.cancelling() if task else 0)
        self.state = State.OPEN
        return self

    def own(self) -> None:
        """Refuse every task but the current one, as a nested block does."""
        self._owner = asyncio.current_task()

    async def commit(self) -> None:
        """Commit, run the `on_commit` callbacks, and give the connection back.

        Raises:
            TransactionManagementError: an error or a cancellation inside was swallowed; it is
                rolled back.
            CommitUnknown: the connection was lost while COMMIT was on its way.
            SessionStateError: a nested block is open.
            Whatever the database says to COMMIT (a deferred constraint), or a callback raised.
        """
        async with self._turn():
            self._check_no_block("commit()")
            try:
                if self._lease is None:
                    await self._commit_nothing()
                else:
                    await self._commit()
            except BaseException:
                await self._end()
                raise
            await self._end()

    async def rollback(self, checkpoint: str | Block | None = None) -> None:
        """Roll back and give the connection back; with a `checkpoint`, roll back to that savepoint
        and go on.

        Raises:
            SessionStateError: no such savepoint, or a nested block is open.
        """
        if isinstance(checkpoint, Block):
            await checkpoint.rollback()
        elif checkpoint is not None:
            await self._rollback_to(checkpoint)
        else:
            async with self._turn():
                self._check_no_block("rollback()")
                try:
                    await self._rollback()
                finally:
                    await self._end()

    async def close(self, *, has_error: bool = False) -> None:
        """Roll back what is not committed and give the connection back; closing twice does
        nothing."""
        if self.state is State.CLOSED:
            return
        if self.state is State.NEW:
            self.state = State.CLOSED
            return
        self._check_loop()
        # Not in the queue: the task that ends the transaction does not wait behind those that
        # still use it.
        self.state = State.CLOSED
        self._stop_call_of_another_task()
        try:
            await self._turns.__aenter__()
        except BaseException:
            # Cancelled while another task's call unwinds: that call still uses the connection, so
            # end it after that.
            _end_later(self._close_in_turn())
            raise
        try:
            await self._close_now()
        finally:
            await self._turns.__aexit__()

    async def _close_in_turn(self) -> None:
        async with self._turns:
            await self._close_now()

    async def _close_now(self) -> None:
        try:
            if self._lease is not None:
                await self._rollback(quietly=True)
        finally:
            await self._end()

    def _stop_call_of_another_task(self) -> None:
        """A call that another task still has running (a sibling in `gather`) ends with
        SessionClosedError."""
        if self._scope is not None and self._turns.task is not asyncio.current_task():
            assert self._loop is not None
            self._scope.reschedule(self._loop.time())

    async def __aenter__(self) -> Self:
        return await self.begin()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if exc is None and self.state is State.OPEN:
            await self.commit()
        await self.close(has_error=exc is not None)

    # Savepoints

    async def create_savepoint(self, name: str) -> None:
        """Create a savepoint.

        Raises:
            ValueError: a name with quotes, or longer than 63 characters.
        """
        check_savepoint_name(name)
        await self.run(lambda: self._wrapper._savepoint(name))

    async def release_savepoint(self, name: str) -> None:
        """Release a savepoint, keeping what was done since.

        Raises:
            ValueError: a name with quotes, or longer than 63 characters.
        """
        check_savepoint_name(name)
        await self.run(lambda: self._wrapper._savepoint_commit(name))

    async def _rollback_to(self, name: str) -> None:
        check_savepoint_name(name)

        def rollback_to() -> None:
            wrapper = self._wrapper
            failed, wrapper.needs_rollback = wrapper.needs_rollback, False
            try:
                wrapper.savepoint_rollback(name)
            except BaseException:
                wrapper.needs_rollback = failed
                raise

        await self.run(rollback_to)

    # Statements

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the sync `fn` natively async, with this connection as the one that Django uses.

        Raises:
            SessionStateError: not begun, or ended.
            SessionInUseError: another task has a nested block open.
            QueryTimeout: the server ended a statement by its timeout.
            Whatever `fn` raises.
        """
        async with self._turn():
            return await self._serve(partial(fn, *args, **kwargs))

    async def execute(self, sql: Any, params: Params = None) -> int:
        """Run one statement and return how many rows it touched, -1 when the database does not
        tell.

        Raises:
            MultipleStatements: more than one statement in `sql`.
        """
        check_one_statement(sql)
        return await self.run(self._execute, sql, params)

    async def cursor(self, sql: Any, params: Params = None) -> BaseResultSet:
        """Run one statement and return its result.

        Raises:
            MultipleStatements: more than one statement in `sql`.
        """
        check_one_statement(sql)
        cursor = await self.run(self._open_cursor, sql, params, stream=False)
        return BaseResultSet(cursor, self.run, buffered=self._wrapper.buffered_cursors)

    async def cursor_in_memory(self, sql: Any, params: Params = None) -> BaseResultSet:
        """Run one statement and return its result with all rows fetched, to be used when the
        connection is gone."""

        def fetch() -> MemoryCursor:
            cursor = self._open_cursor(sql, params, stream=False)
            try:
                return MemoryCursor(cursor)
            finally:
                cursor.close()

        return BaseResultSet(await self.run(fetch), self.run, buffered=True)

    async def stream(self, sql: Any, params: Params, chunk_size: int) -> BaseResultSet:
        """Run one statement with a server-side cursor and return its result, `chunk_size` rows at
        a time."""
        cursor = await self.run(self._open_cursor, sql, params, stream=True)
        return BaseResultSet(cursor, self.run, buffered=False, chunk_size=chunk_size)

    async def driver_connection(self) -> Any:
        """The driver's own connection, for use inside `run`; what it changes is reset
        afterwards."""

        def connection() -> Any:
            self._wrapper.touched = True
            return self._wrapper.connection

        return await self.run(connection)

    def _execute(self, sql: Any, params: Params) -> int:
        with self._wrapper.cursor() as cursor:
            cursor.execute(sql, params)
            return int(cursor.rowcount)

    def _open_cursor(self, sql: Any, params: Params, *, stream: bool) -> Any:
        cursor = self._wrapper.chunked_cursor() if stream else self._wrapper.cursor()
        try:
            cursor.execute(sql, params)
        except BaseException:
            cursor.close()
            raise
        return cursor

    # Callbacks and the rollback flag

    def on_commit(self, func: Callable[[], Any], robust: bool = False) -> None:
        """Call `func`, or await it if it is a coroutine function, after the commit; never after a
        rollback.

        Args:
            robust: log an error of `func` instead of raising it and dropping the later callbacks.

        Raises:
            TypeError: `func` cannot be called.
        """
        if not callable(func):
            raise TypeError(f"on_commit() needs a callable, not {func!r}")
        call = awaiting(func)
        if self._lease is None or self._atomic is None:
            self._commit_hooks.append((call, robust))
        else:
            self._wrapper.on_commit(call, robust)

    def on_rollback(self, func: Callable[[], Any]) -> None:
        """Call `func`, or await it, once what was done in the current block is rolled back.

        An error of `func` is logged.

        Raises:
            TypeError: `func` cannot be called.
        """
        if not callable(func):
            raise TypeError(f"on_rollback() needs a callable, not {func!r}")
        self._rollback_hooks.append((self._blocks[-1] if self._blocks else None, awaiting(func)))

    def set_rollback(self, rollback: bool) -> None:
        """Say that the innermost block shall be rolled back at its end, or take that back."""
        if not self._blocks:
            self._rollback_wanted = rollback
        if self._lease is not None:
            self._wrapper.set_rollback(rollback)

    def get_rollback(self) -> bool:
        """Whether the innermost block will be rolled back at its end."""
        return self._rollback_wanted if self._lease is None else bool(self._wrapper.get_rollback())

    # Nested blocks

    async def _enter_block(self, block: Block) -> None:
        async with self._turn():
            await self._serve(lambda: block.enter(self._wrapper))
            self._blocks.append(block)

    async def _leave_block(self, block: Block, error: BaseException | None) -> None:
        if block not in self._blocks:
            return  # the whole transaction ended meanwhile
        if self._blocks[-1] is not block:
            raise SessionStateError(
                f"a block of {self.alias!r} ends while one inside it is open; leave the inner one "
                "first"
            ) from error
        async with self._turn():
            self._blocks.pop()
            if self._is_lost:
                self._call_off(block)
                return
            rolled_back = error is not None or self._wrapper.needs_rollback
            try:
                await self._serve(lambda: block.leave(self._wrapper, error), budget=_budget(error))
            except Exception:
                if error is None:
                    raise
                logger.exception("error ignored while rolling back a block of %r", self.alias)
            if rolled_back:
                await self._run_rollback_hooks(block)

    async def _rollback_block(self, block: Block) -> None:
        def rollback() -> None:
            assert block.sid is not None
            self._wrapper.savepoint_rollback(block.sid)
            self._wrapper.needs_rollback = False

        async with self._turn():
            if not self._blocks or self._blocks[-1] is not block or block.sid is None:
                raise SessionStateError(
                    f"cannot roll back this block of {self.alias!r}; it has no savepoint or is "
                    "not the innermost"
                )
            await self._serve(rollback)
            await self._run_rollback_hooks(block)

    def _call_off(self, block: Block) -> None:
        """The connection is gone, so an outer block takes over the callbacks of this one."""
        outer = self._blocks[-1] if self._blocks else None
        self._rollback_hooks = [
            (outer if b is block else b, func) for b, func in self._rollback_hooks
        ]

    # Inside

    @property
    def _wrapper(self) -> BridgedMixin:
        if self._lease is None:
            raise SessionClosedError(
                f"the transaction on {self.alias!r} has no connection any more"
            )
        return self._lease.connection

    @property
    def _is_lost(self) -> bool:
        """Whether the connection was closed, by a cancellation or by the server."""
        return self._lease is None or (
            self._lease.connection.abandoned
            or self._lease.connection.transaction_state is TransactionState.UNKNOWN
        )

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """The task's turn to use the connection, once everything that can be wrong has been
        asked."""
        self._check_open()
        async with self._turns:
            self._check_open()
            self._check_owner()
            token = self._turns.held()
            try:
                yield
            finally:
                _held.reset(token)

    def _check_open(self) -> None:
        if self.state is State.NEW:
            raise SessionStateError(
                f"the transaction on {self.alias!r} has not begun; call begin(), or use `async "
                "with`"
            )
        if self.state is State.CLOSED:
            raise SessionClosedError(
                f"the session of {self.alias!r} made at {self._site} is closed; make a new one"
            )
        self._check_loop()

    def _check_loop(self) -> None:
        if self._loop is not None and (loop := asyncio.get_running_loop()) is not self._loop:
            raise WrongLoopError(
                f"the session of {self.alias!r} belongs to {self._loop!r} and is used in {loop!r}; "
                "make a session in the loop that uses it"
            )

    def _check_owner(self) -> None:
        owner = self._blocks[-1].task if self._blocks else self._owner
        if owner is not None and owner is not asyncio.current_task():
            raise SessionInUseError(
                f"task {owner.get_name()!r} has a nested block open in the session of "
                f"{self.alias!r}, "
                f"so task {task_name()!r} cannot use it; use a session of its own, or wait for "
                "the block's end"
            )

    def _check_no_block(self, what: str) -> None:
        if self._blocks:
            raise SessionStateError(
                f"{what} inside a nested block of {self.alias!r}; leave the block, or roll back "
                "to its savepoint"
            )

    async def _serve(self, fn: Callable[[], T], budget: float | None = None) -> T:
        """Run `fn` in the bridge with the connection, which is taken, and the transaction begun,
        if need be.

        After `budget` seconds, if given, the connection is closed, and OperationalError raised.
        """
        outer = self._scope
        try:
            async with asyncio.timeout(budget) as self._scope:
                wrapper = await self._leased()
                try:
                    result: T = await bridge.run(call_served, wrapper, lambda: self._begun(fn))
                except Exception as exc:
                    raise self._translated(exc, wrapper) from exc.__cause__
        except TimeoutError as exc:
            if self._scope is None or not self._scope.expired():
                raise
            raise self._stopped(budget) from exc
        finally:
            self._scope = outer
        if wrapper.transaction_state is TransactionState.FAILED:
            self._doom(wrapper, None)
        return result

    async def _leased(self) -> BridgedMixin:
        if self._lease is None:
            lease = await self._database.acquire()
            lease.connection.lease = lease.token
            self._lease = lease
        return self._lease.connection

    def _stopped(self, budget: float | None) -> Exception:
        """The error of a call that was ended by `close` in another task, or by its budget."""
        if self.state is State.CLOSED and budget is None:
            return SessionClosedError(
                f"the session of {self.alias!r} made at {self._site} was closed while this call "
                "was running"
            )
        return OperationalError(
            f"{self.alias!r} did not answer within {budget} s, so its connection is closed"
        )

    def _begun(self, fn: Callable[[], T]) -> T:
        if not self._ready:
            self._enter()
            self._ready = True
        return fn()

    def _enter(self) -> None:
        """Begin on the connection; called in the bridge, before the first statement."""
        wrapper = self._wrapper
        if self.autocommit:
            wrapper.configure_autocommit(self.options)
            return
        wrapper.start(self.options)
        atomic = Atomic(self.alias, savepoint=True, durable=False)
        atomic.__enter__()
        self._atomic = atomic
        wrapper.needs_rollback = self._rollback_wanted
        for call, robust in self._commit_hooks:
            wrapper.on_commit(call, robust)
        self._commit_hooks.clear()

    def _translated(self, error: Exception, wrapper: BridgedMixin) -> BaseException:
        """What the caller gets for an error of a call, after noting what it means for the
        transaction."""
        if wrapper.cut and not isinstance(error, TimeoutError):
            # The task was cancelled in the call, and what unwound raised something else.
            return asyncio.CancelledError()
        if isinstance(error, Error) and isinstance(error.__cause__, wrapper.Database.Error):
            if wrapper.statement_rollback or wrapper.transaction_state in DEAD:
                self._doom(wrapper, error)
            if wrapper.is_timeout(error, self.options):
                timeout = QueryTimeout(f"{error} (session of {self.alias!r})".replace("\n", " "))
                timeout.__cause__ = error.__cause__
                return timeout
        return error

    def _doom(self, wrapper: BridgedMixin, error: Error | None) -> None:
        if wrapper.in_atomic_block and not wrapper.needs_rollback:
            wrapper.needs_rollback = True
            wrapper.rollback_exc = error

    async def _commit(self) -> None:
        wrapper = self._wrapper
        self._check_no_cancel(wrapper)
        if self.autocommit or self._atomic is None:
            return
        if wrapper.left_by_sql:
            wrapper.abandon()
            raise TransactionManagementError(
                f"the transaction on {self.alias!r} was ended by SQL inside it; "
                "use commit(), rollback() and savepoints instead of sending COMMIT or ROLLBACK"
            )
        if wrapper.needs_rollback and not self._rollback_wanted:
            cause = wrapper.rollback_exc
            await self._rollback()
            raise TransactionManagementError(
                f"the transaction on {self.alias!r} is rolled back, because an error inside it "
                "was swallowed; "
                "catch the error around a nested block: async with session.begin_nested()"
            ) from cause
        if self._rollback_wanted:
            await self._rollback()
            return
        await self._send_commit(wrapper, self._atomic)

    async def _send_commit(self, wrapper: BridgedMixin, atomic: Atomic) -> None:
        wrapper.commit_confirmed = False
        self.outcome = Outcome.UNKNOWN
        try:
            await self._serve(lambda: atomic.__exit__(None, None, None))
        except Exception as exc:
            if wrapper.commit_confirmed:
                raise
            if not self._is_lost:
                self.outcome = Outcome.ROLLED_BACK
                raise
            if isinstance(exc, OperationalError):
                raise CommitUnknown(
                    f"the connection to {self.alias!r} was lost while COMMIT was on its way; "
                    "the data may be saved or not, so look before doing it again"
                ) from exc
            raise
        finally:
            if wrapper.commit_confirmed:
                self.outcome = Outcome.COMMITTED
                self._rollback_hooks.clear()

    def _check_no_cancel(self, wrapper: BridgedMixin) -> None:
        """A task that swallowed its cancellation must not commit half of its work."""
        task = asyncio.current_task()
        before = self._begun_by[1] if task is self._begun_by[0] else 0
        if wrapper.abandoned or (task is not None and task.cancelling() > before):
            lost = wrapper.abandoned and not wrapper.cut
            reason = "its connection was lost" if lost else "a cancellation inside it was swallowed"
            raise TransactionManagementError(
                f"the transaction on {self.alias!r} is rolled back, because {reason}"
            )

    async def _rollback(self, quietly: bool = False) -> None:
        """Roll back within the budget, or close the connection, which rolls back as well."""
        self._rollback_wanted = False
        try:
            if self._lease is not None and self._atomic is not None and not self.autocommit:
                await self._send_rollback(self._atomic)
        except Exception as exc:
            self._wrapper.abandon()
            if not quietly:
                raise
            logger.warning("rollback on %r failed, the connection is closed: %s", self.alias, exc)
        finally:
            if self.outcome is None:
                self.outcome = Outcome.ROLLED_BACK

    async def _send_rollback(self, atomic: Atomic) -> None:
        wrapper = self._wrapper
        if self._is_lost:
            wrapper.abandon()
            return
        error = Rollback()
        self._unwind_blocks(wrapper)
        await self._serve(lambda: atomic.__exit__(Rollback, error, None), budget=CLEANUP_BUDGET)

    def _unwind_blocks(self, wrapper: BridgedMixin) -> None:
        """Forget the blocks inside the outermost: one ROLLBACK undoes them all."""
        self._blocks.clear()
        wrapper.savepoint_ids = []
        wrapper.atomic_blocks = wrapper.atomic_blocks[:1]

    async def _end(self) -> None:
        """Give the connection back, clean or closed, whatever is raised meanwhile."""
        self.state = State.CLOSED
        self._blocks.clear()
        self._commit_hooks.clear()
        lease, self._lease = self._lease, None
        try:
            if lease is not None:
                await give_back(lease)
        finally:
            if self.outcome is Outcome.ROLLED_BACK:
                await self._run_rollback_hooks(None)

    async def _commit_nothing(self) -> None:
        """No statement ran, so there is nothing to commit; the callbacks run all the same, as in
        Django."""
        if self._rollback_wanted:
            self.outcome = Outcome.ROLLED_BACK
            return
        hooks, self._commit_hooks = self._commit_hooks, []
        self.outcome = Outcome.COMMITTED
        self._rollback_hooks.clear()
        for call, robust in hooks:
            try:
                await bridge.run(call)
            except Exception:
                if not robust:
                    raise
                logger.exception("error calling %s in on_commit()", call)

    async def _run_rollback_hooks(self, block: Block | None) -> None:
        """Run the callbacks of this block, all of them for None; an error is logged, so that none
        is left out."""
        hooks = [func for owner, func in self._rollback_hooks if block is None or owner is block]
        self._rollback_hooks = [
            (owner, func)
            for owner, func in self._rollback_hooks
            if not (block is None or owner is block)
        ]
        for func in hooks:
            try:
                await bridge.run(func)
            except Exception:
                logger.exception(
                    "error in the on_rollback callback %s", getattr(func, "__qualname__", func)
                )


_ending: set[asyncio.Task[None]] = set()


def _end_later(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a clean-up that its caller could not wait for."""
    task = asyncio.get_running_loop().create_task(coroutine, context=contextvars.Context())
    _ending.add(task)
    task.add_done_callback(_ending.discard)


class Rollback(Exception):
    """What the outermost block is told to make it roll back; nobody sees it."""


async def give_back(lease: Lease[BridgedMixin]) -> None:
    """Return a connection to its pool, reset; or close it when its state is not certain."""
    wrapper = lease.connection
    usable = False
    try:
        if not wrapper.abandoned and wrapper.transaction_state is not TransactionState.UNKNOWN:
            async with asyncio.timeout(CLEANUP_BUDGET):
                await bridge.run(call_served, wrapper, partial(_reset, wrapper))
            usable = wrapper.transaction_state is TransactionState.IDLE
    except Exception as exc:
        logger.warning(
            "a connection of %r could not be reset and is closed: %s", wrapper.alias, exc
        )
    finally:
        wrapper.lease = None
        if usable:
            wrapper.scrub()
        lease.release(usable=usable)


def _reset(wrapper: BridgedMixin) -> None:
    if wrapper.in_atomic_block or not wrapper.autocommit:
        raise OperationalError("the transaction was not ended")
    if wrapper.transaction_state is not TransactionState.IDLE:
        logger.warning(
            "a transaction begun by SQL on %r was left open and is rolled back; use "
            "session.begin()",
            wrapper.alias,
        )
        wrapper.rollback()
    wrapper.reset()


def awaiting(func: Callable[[], Any]) -> Callable[[], Any]:
    """A sync function, for the bridge, that calls `func` and awaits what it returns if that can be
    awaited."""

    def call() -> Any:
        result = func()
        return bridge.await_(result) if inspect.isawaitable(result) else result

    call.__qualname__ = getattr(func, "__qualname__", repr(func))
    return call


def describe(state: State, blocks: int) -> str:
    """The state in words, for a repr."""
    text = state.value
    return text if not blocks else f"{text}, {blocks} savepoint{'s' if blocks > 1 else ''}"


def _budget(error: BaseException | None) -> float | None:
    return None if error is None else CLEANUP_BUDGET
