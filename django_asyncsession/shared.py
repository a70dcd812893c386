"""The connections of a test: one for each database, which sync code and sessions share.

Django's test case holds a transaction open on it, and rolls it back in the end. A session works in
a savepoint of that transaction. It blocks outside the bridge and awaits inside, so it serves both.
"""

from __future__ import annotations

import asyncio
import contextvars
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from functools import cache
from importlib import import_module
from typing import Any

from asgiref.local import Local
from django.core.exceptions import ImproperlyConfigured
from django.db import OperationalError, connections
from django.db.backends.utils import CursorWrapper
from django.db.transaction import Atomic, TransactionManagementError
from greenlet import getcurrent

from . import bridge
from .backends.base import (
    ANY_DRIVER,
    BridgedMixin,
    TransactionOptions,
    TransactionState,
    bridged_class,
    call_served,
    make_wrapper,
    wrapper_class,
)
from .exceptions import (
    ConfigurationError,
    PoolTimeout,
    SessionClosedError,
    SessionInUseError,
    SharedConnectionWarning,
)
from .interface import IDENTITY, DatabaseInterface, databases
from .pool import Lease, creation_site, task_name

# Seconds that a session waits for its turn on the shared connection.
TURN_SECONDS = 10.0
# Seconds between two tries to send a statement while another thread's runs.
LOOK = 0.0005
# Seconds that a call which nobody waits for any more may take to end.
END_SECONDS = 5.0
# What a session asks for at BEGIN, which a savepoint cannot have.
AT_BEGIN = ("isolation", "read_only", "deferrable")
# Cursor methods that may ask the database.
FETCHING = frozenset({"fetchone", "fetchmany", "fetchall", "nextset", "close"})

# The shared leases that were taken in this context or one it descends from.
_taken: contextvars.ContextVar[tuple[SharedLease, ...]] = contextvars.ContextVar(
    "taken", default=()
)


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


class SharedCursorMixin(CursorWrapper):
    """A cursor of the shared connection: one statement at a time, none after its session's end."""

    db: SharedMixin
    # The session that made it, if it was one.
    maker: SharedLease | None

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


class SharedMixin(BridgedMixin):
    """Mixed in before a bridged wrapper: what a session does to its own, a savepoint does here."""

    exclusive: Exclusive
    # The innermost session.
    current: SharedLease | None = None
    # The next savepoint is that of a session.
    _begins = False

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

    def unwind(self, lease: SharedLease) -> None:
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


class SharedLease(Lease[BridgedMixin]):
    """A session's turn on the shared connection. Turns nest, and end in the reverse order."""

    shared = True

    def __init__(self, source: SharedSource, *, lends: bool) -> None:
        wrapper = source.wrapper
        self._source, self.lends = source, lends
        self.connection = wrapper
        self.depth = len(wrapper.savepoint_ids), len(wrapper.atomic_blocks)
        # The session's savepoint, until it is rolled back.
        self.sid: str | None = None
        self.autocommit = False
        self.since, self.token = time.monotonic(), object()
        self.site = self.made_at = creation_site()
        self.task, self.owner = task_name(), asyncio.current_task()
        self.released = False

    def __del__(self) -> None:
        """The source reports it."""

    async def turn(self) -> None:
        await self._source.turn(self)

    async def finish(self) -> None:
        try:
            if self._is_unfinished:
                await bridge.run(call_served, self.connection, self._end)
        finally:
            self.release()

    def finish_now(self) -> None:
        if self._is_unfinished:
            _call_blocking(self._end)
        self.release()

    @property
    def _is_unfinished(self) -> bool:
        """Whether its savepoint is open: of a session in autocommit mode, or one that could not
        end it."""
        wrapper = self._source.wrapper
        is_open = len(wrapper.savepoint_ids) > self.depth[0]
        return is_open and not self.released and not wrapper.closed_in_transaction

    def _end(self) -> None:
        wrapper = self._source.wrapper
        failed = wrapper.transaction_state is TransactionState.FAILED
        if failed or not self.autocommit or len(wrapper.savepoint_ids) > self.depth[0] + 1:
            wrapper.unwind(self)
        else:
            # Each statement that succeeded is saved.
            wrapper.needs_rollback = False
            wrapper.atomic_blocks[-1].__exit__(None, None, None)

    def release(self, *, usable: bool = True) -> None:
        if not self.released:
            self.released = True
            self.owner = None
            self._source.take_back(self)


def _call_blocking(fn: Callable[[], None]) -> None:
    """Call what waits for the database; in a thread if a loop runs in this one, where Django
    refuses to wait."""
    if asyncio._get_running_loop() is None:
        fn()
        return
    thread = threading.Thread(target=fn, name="end of a session")
    thread.start()
    thread.join()


class SharedSource:
    """Gives the sessions of one database their turns on its shared connection.

    A session begun inside another one, by the same task or one that descends from it, nests in
    it. Any other waits until the session before has ended.
    """

    def __init__(self, interface: DatabaseInterface, wrapper: SharedMixin) -> None:
        self.alias, self.interface, self.wrapper = interface.alias, interface, wrapper
        self._open: list[SharedLease] = []
        self._waiters: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    async def acquire(self, *, lends: bool = False) -> Lease[BridgedMixin]:
        """A turn for a session; a connection of a pool when no test case's transaction is open.

        Args:
            lends: whether any other session may nest in it: the test's own session.

        Raises:
            PoolTimeout: the session before did not end in time.
            TransactionManagementError: an error outside has failed the test's transaction.
        """
        if not self.wrapper.is_in_test_case:
            self._check_allowed()
            return await self.interface.pool().acquire()
        await self._wait(self._may_nest)
        self._check_sound()
        lease = SharedLease(self, lends=lends)
        self._open.append(lease)
        self.wrapper.current = lease
        _taken.set((*(other for other in _taken.get() if not other.released), lease))
        return lease

    def _check_allowed(self) -> None:
        """Django replaces `connect` where the test's `databases` leave the alias out."""
        if "connect" in vars(self.wrapper):
            self.wrapper.connect()

    def _check_sound(self) -> None:
        wrapper = self.wrapper
        if wrapper.needs_rollback:
            raise TransactionManagementError(
                f"the test's transaction on {self.alias!r} has failed, so no session can begin in "
                "it; put what may fail into atomic()"
            ) from wrapper.rollback_exc

    def _may_nest(self) -> bool:
        if not self._open:
            return True
        top = self._open[-1]
        return top.lends or top in _taken.get() or top.owner is asyncio.current_task()

    async def turn(self, lease: SharedLease) -> None:
        """Wait until the sessions that are nested in this one have ended.

        Raises:
            SessionInUseError: one of them was begun by the same task, which would wait for itself.
            PoolTimeout: they did not end in time.
        """
        if lease.released or self._open[-1] is lease:
            return
        top = self._open[-1]
        if top.owner is asyncio.current_task() or lease.lends:
            raise SessionInUseError(
                f"the session of {self.alias!r} made at {lease.made_at} is used while the one made "
                f"at {top.made_at} is open; in a test they share one connection, so end that one "
                "first"
            )
        await self._wait(lambda: lease.released or self._open[-1] is lease)

    async def _wait(self, may: Callable[[], bool]) -> None:
        if may():
            return
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(TURN_SECONDS):
                while not may():
                    waiter: asyncio.Future[None] = loop.create_future()
                    self._waiters.append((loop, waiter))
                    await waiter
        except TimeoutError as exc:
            top = self._open[-1]
            raise PoolTimeout(
                f"no turn on the test's connection to {self.alias!r} within {TURN_SECONDS} s; the "
                f"session made at {top.made_at} is open in task {top.task!r}; sessions that are "
                "open at the same time need real transactions (transaction=True)"
            ) from exc

    def take_back(self, lease: SharedLease) -> None:
        """End a turn, and those nested in it, which its end has ended on the connection as well."""
        while lease in self._open:
            top = self._open.pop()
            if top is not lease:
                self._void(top)
        self.wrapper.current = self._open[-1] if self._open else None
        self._wake()

    def _void(self, lease: SharedLease) -> None:
        """Leave the session with a connection that says that the session is over."""
        lease.released, lease.owner = True, None
        lease.connection = _over(type(self.wrapper), self.wrapper, lease.made_at)

    def _wake(self) -> None:
        while self._waiters:
            loop, waiter = self._waiters.popleft()
            try:
                loop.call_soon_threadsafe(_set, waiter)
            except RuntimeError:
                # Its loop is closed.
                continue

    @property
    def leases(self) -> list[SharedLease]:
        """The turns of sessions that are open, but for those of the test's own."""
        return [lease for lease in self._open if not lease.lends]

    def settle(self) -> list[str]:
        """Roll back what open sessions did, blocking; return where those that were left open were
        made."""
        wrapper = self.wrapper
        left = [lease.made_at for lease in self.leases]
        # Who has it may be in a loop that was closed, and never goes on.
        wrapper.exclusive = Exclusive(self.alias)
        wrapper.finish_call(END_SECONDS)
        if wrapper.connection is not None and wrapper.transaction_state is TransactionState.UNKNOWN:
            wrapper.abandon()
        opened, self._open = self._open, []
        wrapper.current = None
        if opened:
            wrapper.unwind(opened[0])
        for lease in opened:
            self._void(lease)
        self._wake()
        return left


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class _OverMixin(BridgedMixin):
    """A connection that cannot be used, for a session that was ended from outside."""

    made_at = ""
    abandoned = True

    def connect(self) -> None:
        raise SessionClosedError(
            f"the session of {self.alias!r} made at {self.made_at} was ended, because its test, or "
            "the session around it, ended before"
        )


def _over(shared_class: type[SharedMixin], wrapper: SharedMixin, made_at: str) -> Any:
    over: Any = type("OverDatabaseWrapper", (_OverMixin, *shared_class.__bases__[1:]), {})(
        wrapper.settings_dict, wrapper.alias
    )
    over.made_at = made_at
    over.inc_thread_sharing()
    return over


# Making them


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


_wrappers: dict[str, tuple[tuple[Any, ...], SharedMixin]] = {}


def shared_wrapper(alias: str) -> SharedMixin:
    """The shared connection of an alias; made once in a process, and kept between tests.

    Raises:
        ConfigurationError: the engine cannot be bridged.
    """
    settings_dict = connections.settings[alias]
    identity = tuple(settings_dict[name] for name in IDENTITY)
    known, wrapper = _wrappers.get(alias, (None, None))
    if wrapper is not None and known == identity:
        return wrapper
    if wrapper is not None:
        wrapper.close()
    wrapper = make_wrapper(alias, settings_dict, shared_class(settings_dict["ENGINE"]))  # type: ignore[assignment]
    assert wrapper is not None
    wrapper.pooled = False
    wrapper.exclusive = Exclusive(alias)
    # The loop's thread uses it, and the threads of sync_to_async().
    wrapper.inc_thread_sharing()
    _wrappers[alias] = identity, wrapper
    return wrapper


def close_shared() -> None:
    """Close the shared connections, as the databases will be dropped."""
    while _wrappers:
        _, (_, wrapper) = _wrappers.popitem()
        wrapper.close()


class SharedStorage:
    """Stands in the place of `connections`' own storage: every thread and task finds the shared
    connections, but where a session serves its own."""

    def __init__(self, shared: dict[str, SharedMixin]) -> None:
        self.__dict__.update(_shared=shared, _own=Local(thread_critical=True))

    def __getattr__(self, alias: str) -> Any:
        shared = self._shared.get(alias)
        return getattr(self._own, alias) if shared is None else getattr(self._own, alias, shared)

    def __setattr__(self, alias: str, wrapper: Any) -> None:
        setattr(self._own, alias, wrapper)

    def __delattr__(self, alias: str) -> None:
        delattr(self._own, alias)


class Sharing:
    """Puts the shared connections in the place of Django's own and of the pools, until `end`."""

    def __init__(self) -> None:
        self.sources: dict[str, SharedSource] = {}
        self._outer: Any = None
        self._outer_sources: dict[str, Any] = {}

    def begin(self) -> None:
        """Share from now on; to be called before the test case begins its transactions."""
        handler: Any = connections
        for alias in connections:
            try:
                wrapper = shared_wrapper(alias)
            except (ConfigurationError, ImproperlyConfigured, ImportError):
                # Its driver is missing, which is the business of who uses it.
                continue
            interface = databases[alias]
            self._outer_sources[alias] = interface.source
            interface.source = self.sources[alias] = SharedSource(interface, wrapper)
        self._outer = handler._connections
        shared = {alias: source.wrapper for alias, source in self.sources.items()}
        handler._connections = SharedStorage(shared)

    def settle(self) -> list[str]:
        """End the sessions that are still open, and say where they were made; to be called before
        the test case rolls back."""
        left = [site for source in self.sources.values() for site in source.settle()]
        for site in left:
            warnings.warn(
                f"a session made at {site} was left open at the end of the test; use `async "
                "with`, or await session.close()",
                SharedConnectionWarning,
                stacklevel=2,
            )
        return left

    def end(self) -> None:
        """Share no more; to be called after the test case has rolled back."""
        handler: Any = connections
        handler._connections = self._outer
        for alias in self.sources:
            databases[alias].source = self._outer_sources[alias]
        self.sources.clear()
