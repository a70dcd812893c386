"""The connection that a test shares between its sync code and its sessions.

Django's test case holds a transaction open on it. What a session does to a connection of its own,
it does to a savepoint here. Outside the bridge it blocks and in the bridge it awaits, one statement
at a time, whatever the thread.
"""

from __future__ import annotations

import asyncio
import threading
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import import_module
from typing import Any, Protocol

from django.db import OperationalError
from django.db.backends.utils import CursorWrapper
from django.db.transaction import Atomic
from django.utils.asyncio import async_unsafe
from greenlet import getcurrent

from django_asyncsession import bridge
from django_asyncsession.backends.base import BridgedMixin
from django_asyncsession.backends.cursors import SeenCursorMixin
from django_asyncsession.backends.engines import ANY_DRIVER, bridged_class, wrapper_class
from django_asyncsession.backends.options import TransactionOptions, TransactionState
from django_asyncsession.exceptions import SessionClosedError, SharedConnectionWarning

# Seconds that a statement waits for the one of another thread, and a session for another session.
TURN_SECONDS = 10.0
# Seconds between two tries to send a statement while another thread's runs.
LOOK = 0.0005
# Seconds that a call which nobody waits for any more may take to end.
END_SECONDS = 5.0
# What a session asks for at BEGIN, which a savepoint cannot have.
AT_BEGIN = ("isolation", "read_only", "deferrable")
# Cursor methods that may ask the database.
FETCHING = frozenset({"fetchone", "fetchmany", "fetchall", "nextset", "close"})


class Holder(Protocol):
    """What the connection knows of the session that uses it."""

    made_at: Any
    released: bool
    # The session's savepoint, until it is rolled back.
    sid: str | None
    autocommit: bool
    # How many savepoints and blocks were open before it.
    depth: tuple[int, int]
    # The first word of its first statement that did more than read.
    changed: str


class Exclusive:
    """Lets one caller at a time send something to the database, whatever its thread; reentrant."""

    def __init__(self, alias: str) -> None:
        self._alias = alias
        self._lock = threading.Lock()
        self._owner: object = None
        self._depth = 0

    def __enter__(self) -> None:
        me = getcurrent()
        if self._owner is not me:
            self._acquire()
            self._owner = me
        self._depth += 1

    def __exit__(self, *exc_info: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self._owner = None
            self._lock.release()

    def _acquire(self) -> None:
        if bridge.in_bridge():
            while not self._lock.acquire(blocking=False):
                bridge.await_(asyncio.sleep(LOOK))
        elif not self._lock.acquire(timeout=TURN_SECONDS):
            raise OperationalError(
                f"the test's connection to {self._alias!r} is still busy after {TURN_SECONDS} s; "
                "await what uses it first"
            )


class SharedCursorMixin(SeenCursorMixin, CursorWrapper):
    """A cursor of the shared connection: one statement at a time, none after its session's end."""

    db: SharedMixin
    # The session that made it, if it was one.
    maker: Holder | None

    @property
    def lease(self) -> object:
        """The present lease of the connection as long as the cursor's session is open."""
        return None if self._is_over else self.db.lease

    @property
    def _is_over(self) -> bool:
        maker = self.__dict__.get("maker")
        return maker is not None and maker.released

    def __getattr__(self, name: str) -> Any:
        value = super().__getattr__(name)
        if name not in FETCHING:
            return value

        def fetch(*args: Any) -> Any:
            if name != "close":
                self._check_lease()
            with self.db.exclusive:
                return value(*args)

        return fetch

    def __iter__(self) -> Iterator[Any]:
        while (row := self.fetchone()) is not None:
            yield row

    def execute(self, sql: Any, params: Any = None) -> Any:
        self._check_lease()
        with self.db.exclusive:
            return super().execute(sql, params)

    def executemany(self, sql: Any, param_list: Any) -> Any:
        self._check_lease()
        with self.db.exclusive:
            return super().executemany(sql, param_list)

    def _check_lease(self) -> None:
        if self._is_over:
            raise SessionClosedError(
                f"a cursor of {self.db.alias!r} is used after its session ended; fetch the rows "
                "before"
            )


@cache
def _sharing(cursor_class: Any) -> type:
    return type(f"Shared{cursor_class.__name__}", (SharedCursorMixin, cursor_class), {})


class _SavepointIds(list[Any]):
    """Savepoints of the open blocks. In autocommit mode a session's outermost block is a
    transaction in production, so here it gets a savepoint also if it asked for none."""

    def __init__(self, wrapper: SharedMixin, sids: Iterable[Any]) -> None:
        super().__init__(sids)
        self._wrapper = wrapper

    def append(self, sid: str | None) -> None:
        wrapper = self._wrapper
        holder = wrapper.current
        is_outermost = holder is not None and holder.autocommit and len(self) == holder.depth[0] + 1
        if sid is None and is_outermost and not wrapper.needs_rollback:
            sid = wrapper.savepoint()
        super().append(sid)


class SharedMixin(BridgedMixin):
    """Mixed in before a bridged wrapper: what a session does to its own, a savepoint does here."""

    exclusive: Exclusive
    # The innermost session.
    current: Holder | None = None
    # The next savepoint is that of a session.
    _begins = False

    @property
    def savepoint_ids(self) -> list[Any]:
        """Those of the open blocks, None for a block that has none."""
        return self._savepoint_ids

    @savepoint_ids.setter
    def savepoint_ids(self, sids: Iterable[Any]) -> None:
        self._savepoint_ids = _SavepointIds(self, sids)

    @property
    def changed(self) -> str:
        """What the innermost session's statements did but read."""
        return "" if self.current is None else self.current.changed

    @changed.setter
    def changed(self, change: str) -> None:
        if self.current is not None:
            self.current.changed = change

    @property
    def is_in_test_case(self) -> bool:
        """Whether a test case's transaction is open, the one that will be rolled back."""
        blocks: list[Any] = self.atomic_blocks
        return bool(self.in_atomic_block and blocks and blocks[0]._from_testcase)

    @property
    def left_by_sql(self) -> bool:
        return self.in_atomic_block and self.transaction_state is TransactionState.IDLE

    def connect(self) -> None:
        self.abandoned = self.cut = self.dead = False
        super().connect()

    @async_unsafe
    def close(self) -> None:
        # Code in a thread closes its connection when it is done; this one is everybody's.
        if not self.is_in_test_case:
            super().close()

    def close_if_unusable_or_obsolete(self) -> None:
        # Django's handlers, and Channels, close what is in a transaction, as nobody else should be.
        if not self.in_atomic_block:
            super().close_if_unusable_or_obsolete()

    def create_cursor(self, name: str | None = None) -> Any:
        with self.exclusive:
            return super().create_cursor(name)

    def _watch(self, cursor: Any) -> Any:
        plain: Any = type(cursor)
        cursor.__class__ = _sharing(plain)
        cursor.maker = self.current if bridge.in_bridge() else None
        return cursor

    def start(self, options: TransactionOptions) -> None:
        self._warn_of(options)
        self._begins = True

    def configure_autocommit(self, options: TransactionOptions) -> None:
        """Begin a savepoint here too: a failed statement must not fail the test's transaction."""
        self._warn_of(options)
        if self.current is not None:
            self.current.autocommit = True
        atomic: Any = Atomic(self.alias, savepoint=True, durable=False)
        # A durable block may nest in it, as it may in autocommit mode.
        atomic._from_testcase = True
        atomic.__enter__()

    def _warn_of(self, options: TransactionOptions) -> None:
        given = [f"{name}={value!r}" for name in AT_BEGIN if (value := getattr(options, name))]
        if given:
            site = getattr(self.current, "made_at", "")
            warnings.warn(
                f"{', '.join(given)} of the session of {self.alias!r} made at {site} cannot apply "
                "in a test's transaction; test it with real transactions (transaction=True)",
                SharedConnectionWarning,
                stacklevel=2,
            )

    def savepoint(self) -> str | None:
        begins, self._begins = self._begins, False
        sid = super().savepoint()
        if begins and self.current is not None:
            self.current.sid = sid
        return sid

    def _savepoint_rollback(self, sid: str) -> None:
        if self.current is not None and self.current.sid == sid:
            self.current.sid = None
        super()._savepoint_rollback(sid)  # type: ignore[misc]

    def _savepoint_commit(self, sid: str) -> None:
        if self.current is not None and self.current.sid == sid:
            self._check_deferred()
        super()._savepoint_commit(sid)
        self.commit_confirmed = True

    def _check_deferred(self) -> None:
        """Check what the database would check at COMMIT, uncounted: production does not send
        it."""
        if not self.features.can_defer_constraint_checks:
            return
        wrappers, self.execute_wrappers = self.execute_wrappers, []
        logged, self.force_debug_cursor = self.force_debug_cursor, False
        try:
            self.check_constraints()
        finally:
            self.execute_wrappers, self.force_debug_cursor = wrappers, logged

    def unwind(self, lease: Holder) -> None:
        """Undo what was done since the lease was taken, and forget the blocks opened since; works
        in the bridge and outside."""
        savepoints, blocks = lease.depth
        inner = [sid for sid in self.savepoint_ids[savepoints:] if sid is not None]
        del self.savepoint_ids[savepoints:], self.atomic_blocks[blocks:]
        if inner and not self.closed_in_transaction:
            self.needs_rollback = False
            self.savepoint_rollback(inner[0])
            self.savepoint_commit(inner[0])

    def cut_off(self) -> None:
        """Let the call that was left in the middle end, blocking: the test goes on with this
        connection."""
        self.finish_call(END_SECONDS)
        if self.transaction_state is TransactionState.UNKNOWN:
            super().cut_off()


class _OverMixin(BridgedMixin):
    """A connection that cannot be used, for a session that was ended from outside."""

    made_at: Any = ""
    abandoned = True

    def connect(self) -> None:
        raise SessionClosedError(
            f"the session of {self.alias!r} made at {self.made_at} was ended, because its test, or "
            "the session around it, ended before"
        )


def over(shared_class: type[SharedMixin], wrapper: SharedMixin, made_at: Any) -> Any:
    """A connection for a session that was ended from outside; it says so when it is used.

    Args:
        shared_class: class of the shared connection.
        wrapper: the shared connection.
        made_at: where the session was made.
    """
    over: Any = type("OverDatabaseWrapper", (_OverMixin, *shared_class.__bases__[1:]), {})(
        wrapper.settings_dict, wrapper.alias
    )
    over.made_at = made_at
    over.inc_thread_sharing()
    return over


@cache
def shared_class(engine: str) -> type[SharedMixin]:
    """The class of the shared connection for an engine.

    Raises:
        ConfigurationError: the engine cannot be bridged.
    """
    base: Any = bridged_class(engine)
    if not base.both_modes:
        # Its connections work in one way only, so the driver of the sync ORM gets a thread.
        plain = next(c for c in wrapper_class(engine).__mro__ if not issubclass(c, BridgedMixin))
        mixin = import_module(ANY_DRIVER).Mixin
        # Django looks into a name that the mixin has for another purpose.
        levels = getattr(plain, "isolation_levels", ())
        names = {"__module__": plain.__module__, "isolation_levels": levels}
        base = type("DatabaseWrapper", (mixin, plain), names)
    return type("SharedDatabaseWrapper", (SharedMixin, base), {"__module__": base.__module__})
