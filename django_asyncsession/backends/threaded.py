"""Any driver that has no async mode: each connection has a thread of its own, where every driver
call runs.

The thread begins with the connection and ends with it; there is none per query and no executor. A
third-party backend needs nothing of its own to work this way.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Generator, Iterator
from functools import partial
from itertools import islice
from types import BuiltinMethodType, MethodType, MethodWrapperType
from typing import TYPE_CHECKING, Any, ClassVar, Self

from django.db.transaction import TransactionManagementError

from django_asyncsession.bridge import await_, in_bridge

from .base import BridgedMixin
from .options import TransactionOptions, TransactionState
from .thread import DriverThread, _quietly

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper as _Base
else:
    _Base = object

# Rows that come along with the call that executes, and at least so many with each later one.
FIRST_ROWS = 1000
# Seconds between two looks at whether a thread has ended, at first and at the most.
LOOK_MIN, LOOK_MAX = 0.0005, 0.02
# Methods of a cursor that SQLite's connections, and psycopg's, have as well.
SHORTCUTS = frozenset({"execute", "executemany", "executescript"})
METHODS = (MethodType, BuiltinMethodType, MethodWrapperType)


class Connection:
    """A driver's connection; in the bridge its calls run in its thread and are awaited.

    Outside the bridge it is the driver's connection, called directly, as in Django. What is not
    named here is the driver's own: methods are sent to the thread, other attributes are read.
    """

    def __init__(self, wrapper: Mixin, thread: DriverThread) -> None:
        self._raw: Any = None
        self._thread = thread
        # Not the wrapper itself: what is dropped shall be gone without the garbage collector.
        self._owner = weakref.ref(wrapper)
        self._cursors: weakref.WeakSet[Cursor] = weakref.WeakSet()

    def _open(self, connect: Callable[[], Any]) -> None:
        """Connect in the thread; a connection that nobody waits for any more is closed there."""

        def opened() -> None:
            self._raw = connect()

        self._call(opened)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._raw, name)
        if name in SHORTCUTS:
            return partial(self._on_cursor, name)
        return partial(self._call_unseen, value) if isinstance(value, METHODS) else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            self._call_unseen(setattr, self._raw, name, value)

    def _call_unseen(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the driver that may do anything."""
        self._note(None)
        return self._call(fn, *args, **kwargs)

    def _on_cursor(self, name: str, *args: Any) -> Cursor:
        """What a cursor does, which some connections do too, with one that they make."""
        cursor = self.cursor()
        getattr(cursor, name)(*args)
        return cursor

    def _note(self, sql: Any) -> None:
        """Let the wrapper know what runs, if nobody else has: a statement, or None."""
        wrapper = self._owner()
        if wrapper is None or wrapper.own_use:
            return
        if sql is None:
            wrapper.note_unseen()
        else:
            wrapper.note_statement(sql)

    def __del__(self) -> None:
        if thread := self.__dict__.get("_thread"):
            thread.end(self._closing())

    def cursor(self, *args: Any, **kwargs: Any) -> Cursor:
        """A cursor of the driver, whose calls run in the thread too. Making it asks nothing of
        the database."""
        self._check_open()
        return Cursor(self, self._raw.cursor(*args, **kwargs))

    def commit(self) -> None:
        """Commit."""
        self._call(self._raw.commit)

    def rollback(self) -> None:
        """Roll back."""
        self._call(self._raw.rollback, _timed=False)

    def close(self) -> None:
        """Close the driver's connection and end the thread."""
        if in_bridge() and self._thread.alive:
            self._call(self._closing(), _timed=False)
            self._thread.end(_nothing)
        else:
            self._closing()()

    def _call(self, fn: Callable[..., Any], *args: Any, _timed: bool = True, **kwargs: Any) -> Any:
        """Call the driver: in the thread, awaited, when in the bridge; here otherwise."""
        wrapper = self._owner()
        if wrapper is None:
            return fn(*args, **kwargs)
        wrapper.check_caller()
        self._check_open()
        if not in_bridge():
            return fn(*args, **kwargs)
        wrapper.stop_idling()
        call = partial(fn, *args, **kwargs) if args or kwargs else fn
        try:
            result = self._thread.call(
                call, wrapper.interrupt, wrapper.statement_timeout if _timed else None
            )
        except Exception as exc:
            wrapper.after_call(exc)
            raise
        except BaseException:
            # Cancelled, or closed: what the thread does now is nobody's any more.
            wrapper.cut_off()
            raise
        wrapper.after_call(None)
        return result if result is not self._raw else self

    def _check_open(self) -> None:
        wrapper = self._owner()
        if self._thread.ended and wrapper is not None:
            raise wrapper.Database.OperationalError(
                f"the connection to {wrapper.alias!r} is closed{wrapper.closed_because}; roll "
                "back, and run the whole transaction again"
            )

    def _other(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the driver that is not named here."""
        return self._call(method, *args, **kwargs)

    def _answered(self) -> None:
        """A statement succeeded, so the transaction has not failed."""
        if (wrapper := self._owner()) is not None:
            wrapper.unanswered = False

    def _statement(self, execute: Callable[..., Any], *args: Any) -> Any:
        """Execute; called in the thread, where a backend may add what belongs to each
        statement."""
        return execute(*args)

    def _abandon(self) -> None:
        """Let the thread end what it does, close and end; without waiting."""
        self._thread.end(self._closing())

    def _closing(self) -> Callable[[], None]:
        """What closes the driver's connection, its open cursors first: SQLite keeps its locks as
        long as one has rows left."""
        return partial(_close, self.__dict__, list(self._cursors))


def _nothing() -> None:
    """The last call of a thread whose connection is closed."""


def _close(state: dict[str, Any], cursors: list[Cursor]) -> None:
    raw, state["_raw"] = state["_raw"], None
    for cursor in cursors:
        _quietly(cursor._raw.close)
    if raw is not None:
        # Drivers differ in what close() does to a transaction, and to one with unread rows.
        _quietly(raw.rollback)
        raw.close()


class Cursor:
    """A driver's cursor; the rows that fit come along with the call that executes."""

    def __init__(self, connection: Connection, raw: Any) -> None:
        self._connection, self._raw = connection, raw
        self._rows: Iterator[Any] = iter(())
        # The driver has no more rows than those that came along.
        self._exhausted = True
        # The sequence that the driver gives rows in: Django compares an empty one.
        self._kind: type[Any] = list
        connection._cursors.add(self)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._raw, name)
        return partial(self._other, value) if isinstance(value, METHODS) else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
        else:
            setattr(self._raw, name, value)

    def __del__(self) -> None:
        if not self.__dict__.get("_exhausted", True):
            # Dropped with rows left. The thread that runs the connection ends it, not this one.
            self._connection._thread.post(self._raw.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        while (row := self.fetchone()) is not None:
            yield row

    @property
    def connection(self) -> Connection:
        """The connection, whose calls run in the thread too."""
        return self._connection

    def execute(self, *args: Any) -> Any:
        """Execute, and fetch the first rows in the same go."""
        self._connection._note(*args[:1])
        return self._executing(self._raw.execute, *args)

    def executemany(self, *args: Any) -> Any:
        """Execute once for each set of values."""
        self._connection._note(*args[:1])
        return self._executing(self._raw.executemany, *args)

    def callproc(self, *args: Any) -> Any:
        """Call a stored procedure, and fetch the first rows in the same go."""
        self._connection._note(None)
        return self._executing(self._raw.callproc, *args)

    def nextset(self) -> Any:
        """Go on to the next result, and fetch its first rows in the same go."""
        return self._executing(self._raw.nextset)

    def fetchone(self) -> Any:
        """The next row, or None."""
        for row in self._rows:
            return row
        rows = self._fetch(1)
        return rows[0] if rows else None

    def fetchmany(self, size: int | None = None) -> Any:
        """The next rows, an empty sequence after the last."""
        size = self._raw.arraysize if size is None else size
        rows = self._kind(islice(self._rows, size))
        return rows if len(rows) == size else rows + self._kind(self._fetch(size - len(rows)))

    def fetchall(self) -> Any:
        """All rows that are left."""
        rows = self._kind(self._rows)
        if not self._exhausted:
            rows += self._kind(self._connection._call(self._raw.fetchall))
            self._exhausted = True
        return rows

    def close(self) -> None:
        """Close the cursor; only one with rows left has something to tell the database."""
        self._rows = iter(())
        exhausted, self._exhausted = self._exhausted, True
        if self._connection._thread.ended:
            return
        if exhausted and in_bridge():
            self._connection._thread.later(self._raw.close)
        else:
            self._connection._call(self._raw.close)

    def _executing(self, execute: Callable[..., Any], *args: Any) -> Any:
        self._rows, self._exhausted = iter(()), True
        result, rows, self._exhausted = self._connection._call(
            self._execute_and_fetch, execute, args, in_bridge()
        )
        self._rows = iter(rows)
        self._connection._answered()
        # A driver's cursor returns itself, also from inside of a tool's proxy for it.
        return self if hasattr(result, "fetchone") else result

    def _execute_and_fetch(
        self, execute: Callable[..., Any], args: tuple[Any, ...], ahead: bool
    ) -> tuple[Any, Any, bool]:
        result = self._connection._statement(execute, *args)
        if not self._raw.description:
            return result, [], True
        if not ahead:
            return result, [], False
        rows = self._raw.fetchmany(FIRST_ROWS)
        self._kind = type(rows)
        return result, rows, len(rows) < FIRST_ROWS

    def _fetch(self, size: int) -> Any:
        """The next `size` rows of the driver; those fetched with them wait for the next call."""
        if self._exhausted:
            return []
        if not in_bridge():
            rows = self._connection._call(self._raw.fetchmany, size)
            self._kind = type(rows)
            return rows
        wanted = max(size, FIRST_ROWS)
        rows = self._connection._call(self._raw.fetchmany, wanted)
        self._exhausted = len(rows) < wanted
        self._rows = iter(rows)
        return list(islice(self._rows, size))

    def _other(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._connection._note(None)
        result = self._connection._other(method, *args, **kwargs)
        return self if result is self._raw else result


class Mixin(BridgedMixin, _Base):
    """What bridges a Django wrapper whose driver blocks.

    Nothing is known of the driver, so a session has no isolation levels, read-only or lock
    timeouts here, and a connection on which more than plain SQL ran is closed after its lease.
    """

    native_async = False
    buffered_cursors = False
    statement_rollback = True
    isolation_levels: ClassVar[tuple[str, ...]] = ()
    connection_class: ClassVar[type[Connection]] = Connection
    unsupported_options: ClassVar[tuple[str, ...]] = (
        "isolation",
        "read_only",
        "deferrable",
        "lock_timeout",
    )
    # Statements that change data or the transaction, never the connection.
    harmless: ClassVar[frozenset[str]] = frozenset(
        {"select", "insert", "update", "delete", "with", "values", "savepoint", "release"}
        | {"rollback", "commit", "begin", "explain", "create", "alter", "drop", "truncate"}
        | {"show"}
    )

    connection: Any
    # Seconds that each driver call may take.
    statement_timeout: float | None = None
    # Seconds that a transaction may wait for its next statement.
    idle_timeout: float | None = None
    closed_because = ""
    _idle_timer: asyncio.TimerHandle | None = None
    _thread: DriverThread | None = None
    # The last statement failed, which may have failed the whole transaction.
    unanswered = False

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        whose = "database" if self.pooled else "sync database"
        thread = self._thread = DriverThread(f"{whose} {self.alias}")
        connection = self.connection_class(self, thread)
        try:
            connection._open(partial(self.connect_driver, conn_params))
        except BaseException as exc:
            connection._abandon()
            if isinstance(exc, Exception) and in_bridge():
                await_(Farewell(self, thread))
            raise
        return connection

    def connect_driver(self, conn_params: dict[str, Any]) -> Any:
        """Connect as Django does, and return the driver's own connection; runs in the thread."""
        return super().get_new_connection(conn_params)

    def create_cursor(self, name: str | None = None) -> Any:
        connection = self.connection
        if not isinstance(connection, Connection):
            return super().create_cursor(name)
        connection._check_open()
        # Some backends have cursor classes of their own, which want the driver's own connection.
        self.connection = connection._raw
        try:
            raw = super().create_cursor(name)
        finally:
            self.connection = connection
        return Cursor(connection, raw)

    def is_usable(self) -> bool:
        with self.in_own_use():
            return super().is_usable()

    def _set_autocommit(self, autocommit: bool) -> None:
        with self.in_own_use():
            super()._set_autocommit(autocommit)  # type: ignore[misc]

    def interrupt(self) -> None:
        """Ask the driver to end the running call; called in the loop's thread, so it must not
        wait."""
        if self.connection is not None and hasattr(self.connection._raw, "cancel"):
            # Drivers cancel over the network.
            cancel = partial(_quietly, self.connection._raw.cancel)
            threading.Thread(target=cancel, name=f"cancel {self.alias}", daemon=True).start()

    def interrupt_again(self, thread: DriverThread) -> None:
        """The abandoned connection's call still runs; called until it has ended."""

    def after_call(self, error: Exception | None) -> None:
        """Called after each driver call, with its error if there was one."""
        if error is not None:
            self.unanswered = True
            self.driver_failed(error)
        self.start_idling()

    def note_set_up(self, sql: Any, params: Any) -> None:
        """Nothing is set up again: what is touched is closed."""

    # Transactions

    def start(self, options: TransactionOptions) -> None:
        self.check_options(options)
        self.statement_timeout, self.idle_timeout = options.timeout, options.idle_timeout

    def configure_autocommit(self, options: TransactionOptions) -> None:
        self.start(options)

    def start_idling(self) -> None:
        """Give the transaction `idle_timeout` seconds to go on, as a server would."""
        if self.idle_timeout is not None and self.transaction_state is TransactionState.ACTIVE:
            loop = asyncio.get_running_loop()
            self._idle_timer = loop.call_later(self.idle_timeout, self._idle_for_too_long)

    def stop_idling(self) -> None:
        """The transaction goes on, or has ended."""
        if self._idle_timer is not None:
            self._idle_timer.cancel()
            self._idle_timer = None

    def _idle_for_too_long(self) -> None:
        self.closed_because = f", because a transaction was idle for {self.idle_timeout} s"
        self.abandon()

    def _commit(self) -> None:
        if self.unanswered and self.pooled and not self.is_usable():
            raise TransactionManagementError(
                f"the transaction on {self.alias!r} has failed, so it cannot be committed; "
                "catch the error around a nested block"
            )
        super()._commit()

    @property
    def transaction_state(self) -> TransactionState:
        if self.connection is None or self.connection._raw is None or self.connection._thread.ended:
            return TransactionState.UNKNOWN
        idle = self.autocommit and not self.in_atomic_block
        return TransactionState.IDLE if idle else TransactionState.ACTIVE

    def is_timeout(self, error: BaseException, options: TransactionOptions) -> bool:
        return bool(getattr(error.__cause__, "timed_out", False))

    # The end of a lease

    def before_statement(self, sql: Any) -> None:
        super().before_statement(sql)
        if not self.touched and not self.is_harmless(sql):
            self.touched = True

    def is_harmless(self, sql: Any) -> bool:
        """Whether the statement leaves nothing on the connection for its next user."""
        if not isinstance(sql, str):
            return False
        first, *rest = sql.lower().split(None, 2) or [""]
        return first in self.harmless and not (rest and rest[0].startswith(("temp", "global")))

    def reset(self) -> None:
        self.statement_timeout = self.idle_timeout = None
        if self.touched:
            # There is no way to reset a driver that nothing is known of.
            self.abandon()

    def scrub(self) -> None:
        super().scrub()
        self.unanswered = False

    def finish_call(self, seconds: float) -> None:
        if self._thread is not None:
            self._thread.finish(seconds)

    def close_driver(self) -> None:
        self.stop_idling()
        if self._thread is None:
            return
        self._thread.interrupt(self.interrupt)
        if self.connection is not None:
            self.connection._abandon()

    def farewell(self) -> Awaitable[None] | None:
        thread = self._thread
        return Farewell(self, thread) if thread is not None and thread.alive else None


class Farewell:
    """Waits until the thread of an abandoned connection is gone; can be awaited again when it was
    cancelled."""

    def __init__(self, wrapper: Mixin, thread: DriverThread) -> None:
        self._wrapper, self._thread = wrapper, thread

    def __await__(self) -> Generator[Any, Any, None]:
        pause = LOOK_MIN
        while self._thread.alive:
            self._wrapper.interrupt_again(self._thread)
            yield from asyncio.sleep(pause).__await__()
            pause = min(2 * pause, LOOK_MAX)
