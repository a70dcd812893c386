"""The connections of a test: one for each database, which sync code and sessions share.

Django's test case holds a transaction open on it, and rolls it back in the end. A session works in
a savepoint of that transaction. It blocks outside the bridge and awaits inside, so it serves both.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any, TypeVar

from asgiref.local import Local
from asgiref.sync import SyncToAsync
from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.db.transaction import TransactionManagementError

from django_asyncsession import bridge
from django_asyncsession import connections as one_door
from django_asyncsession.backends.base import BridgedMixin
from django_asyncsession.backends.engines import make_wrapper
from django_asyncsession.backends.options import TransactionState
from django_asyncsession.exceptions import (
    ConfigurationError,
    PoolTimeout,
    SessionInUseError,
    SharedConnectionWarning,
)
from django_asyncsession.interface import IDENTITY, DatabaseInterface, databases
from django_asyncsession.origins import Site, creation_site, made, task_name
from django_asyncsession.pool.lease import Lease
from django_asyncsession.pool.pool import Pool
from django_asyncsession.transactions.checkout import Use, taken
from django_asyncsession.transactions.transaction import Transaction

from .wrapper import END_SECONDS, TURN_SECONDS, Exclusive, SharedMixin, over, shared_class

T = TypeVar("T")


class SharedLease(Lease[BridgedMixin]):
    """A session's turn on the shared connection. Turns nest, and end in the reverse order."""

    def __init__(self, source: SharedSource, *, is_of_test: bool) -> None:
        wrapper = source.wrapper
        self._source, self.is_of_test = source, is_of_test
        self.connection = wrapper
        self.depth = len(wrapper.savepoint_ids), len(wrapper.atomic_blocks)
        # The session's savepoint, until it is rolled back.
        self.sid: str | None = None
        self.autocommit = False
        self.changed = ""
        self.since, self.token = time.monotonic(), object()
        self.site = self.made_at = creation_site()
        self.task, self.owner = task_name(), asyncio.current_task()
        self.released = False

    def __del__(self) -> None:
        """The source reports it."""

    async def turn(self) -> None:
        """Wait until the sessions that are nested in this one have ended."""
        await self._source.turn(self)

    async def finish(self) -> None:
        """End the session's savepoint, if it is open, and the turn."""
        try:
            if self._is_unfinished:
                await bridge.run_with(self.connection, self._end)
        finally:
            self.release()

    def finish_now(self) -> None:
        """End the session's savepoint, if it is open, and the turn, blocking."""
        if self._is_unfinished:
            _call_blocking(self._end)
        self.release()

    @property
    def _is_unfinished(self) -> bool:
        """Whether its savepoint is open: of a session in autocommit mode, or one that could not
        end it."""
        return not self.released and len(self._source.wrapper.savepoint_ids) > self.depth[0]

    def _end(self) -> None:
        wrapper = self._source.wrapper
        sound = wrapper.transaction_state is TransactionState.ACTIVE
        if not sound or not self.autocommit or len(wrapper.savepoint_ids) > self.depth[0] + 1:
            wrapper.unwind(self)
        else:
            # Each statement that succeeded is saved.
            wrapper.needs_rollback = False
            wrapper.atomic_blocks[-1].__exit__(None, None, None)

    def release(self, *, usable: bool = True, lost: bool = False) -> None:
        """End the turn. A second call does nothing."""
        if not self.released:
            self.released = True
            self.owner = None
            self._source.take_back(self)


class OwnSite(Site):
    """Where the session was made that a test has as its own, and which is ended with the test."""

    __slots__ = ()


class SharedTransaction(Transaction):
    """A transaction that may be on the shared connection, in its turn."""

    async def call(
        self, fn: Callable[..., T], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> T:
        """As that of others, once the sessions that are nested in this one have ended."""
        if isinstance(self.lease, SharedLease):
            await self.lease.turn()
        return await super().call(fn, args, kwargs)

    async def begin_use(self) -> Use:
        """As that of others, once the sessions that are nested in this one have ended."""
        use = await super().begin_use()
        if isinstance(self.lease, SharedLease):
            try:
                await self.lease.turn()
            except BaseException as exc:
                self.end_use(use, exc)
                raise
        return use

    def begin_use_at_once(self) -> Use | None:
        """As that of others, where no session can be nested in this one."""
        return None if isinstance(self.lease, SharedLease) else super().begin_use_at_once()

    async def give_back(self) -> None:
        """End the session's savepoint and its turn."""
        lease = self.lease
        if isinstance(lease, SharedLease):
            self.lease = None
            await lease.finish()
        else:
            await super().give_back()

    def close_connection(self) -> None:
        """End the session's savepoint and its turn without awaiting."""
        lease = self.lease
        if isinstance(lease, SharedLease):
            self.lease = None
            lease.finish_now()
        else:
            super().close_connection()


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
        self.alias, self.vendor = interface.alias, interface.vendor
        self.interface, self.wrapper = interface, wrapper
        self._open: list[SharedLease] = []
        self._waiters: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()

    async def acquire(self, *, is_of_test: bool = False) -> Lease[BridgedMixin]:
        """A turn for a session; a connection of a pool when no test case's transaction is open.

        Args:
            is_of_test: it is the test's own session, in which any other may nest.

        Raises:
            PoolTimeout: the session before did not end in time.
            TransactionManagementError: an error outside has failed the test's transaction.
        """
        if not self.is_shared:
            self._check_allowed()
            return await self.interface.pool().acquire()
        await self._wait(self._may_nest)
        self._check_sound()
        lease = SharedLease(self, is_of_test=is_of_test)
        self._open.append(lease)
        self.wrapper.current = lease
        taken.set((*(other for other in taken.get() if not other.released), lease))
        return lease

    @property
    def is_shared(self) -> bool:
        """Whether sessions use the shared connection, and not a pool's."""
        return self.wrapper.is_in_test_case

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
        return top.is_of_test or top in taken.get() or top.owner is asyncio.current_task()

    async def turn(self, lease: SharedLease) -> None:
        """Wait until the sessions that are nested in this one have ended.

        Raises:
            SessionInUseError: one of them was begun by the same task, which would wait for itself.
            PoolTimeout: they did not end in time.
        """
        if lease.released or self._open[-1] is lease:
            return
        top = self._open[-1]
        if top.owner is asyncio.current_task() or lease.is_of_test:
            raise SessionInUseError(
                f"the session of {self.alias!r} {made(lease.made_at)} is used while the one made "
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
                f"session {made(top.made_at)} is open in task {top.task!r}; sessions that are "
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
        lease.connection = over(type(self.wrapper), self.wrapper, lease.made_at)

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
        return [lease for lease in self._open if not lease.is_of_test]

    def settle(self) -> list[Any]:
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


class RealSessions:
    """Ends what a test with real transactions left open, as emptying the tables would wait for it:
    sessions, and the connections of Django's own thread."""

    def __init__(self) -> None:
        # Those of fixtures with a wider scope.
        self._before = {lease for pool in _pools() for lease in pool.leases}
        self._ended = {pool for pool in _pools() if pool.is_orphaned}

    def end(self) -> list[Any]:
        """End them, blocking, and say where the sessions were made; to be called before the test
        case empties the tables."""
        _close_in_thread()
        left = []
        for pool in _pools():
            if pool in self._ended:
                continue
            if pool.is_orphaned:
                # A loop that has ended with the test has ended its sessions.
                left += pool.cut_off
            opened = [lease for lease in pool.leases if lease not in self._before]
            # A loop that runs in another thread serves its requests to the end.
            if opened and not pool.is_running:
                left += [lease.made_at for lease in opened]
                pool.close_now()
        left = [site for site in left if not isinstance(site, OwnSite)]
        for site in left:
            warnings.warn(
                f"a session made at {site} was left open at the end of the test; use `async "
                "with`, or await session.close()",
                ResourceWarning,
                stacklevel=2,
            )
        return left


def _pools() -> list[Pool[BridgedMixin]]:
    return [pool for interface in databases.all() for pool in interface.pools]


def _close_in_thread() -> None:
    """Close the connections that Django's own async methods have opened in asgiref's thread, which
    outlives tests."""
    closed = SyncToAsync.single_thread_executor.submit(connections.close_all)
    # What a test left there may keep the thread.
    concurrent.futures.wait([closed], timeout=END_SECONDS)


class Sharing:
    """Puts the shared connections in the place of Django's own and of the pools, until `end`."""

    def __init__(self) -> None:
        self.sources: dict[str, SharedSource] = {}
        self._outer: Any = None
        self._outer_sources: dict[str, Any] = {}

    def begin(self) -> None:
        """Share from now on; to be called before the test case begins its transactions."""
        # Not there yet where the app is installed later, as by a test runner of one's own.
        one_door.install()
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
            interface.transaction_class = SharedTransaction
        # Django's own of this thread are put away meanwhile.
        self._outer = handler._connections, handler.shared
        handler._connections = Local(thread_critical=True)
        handler.shared = {alias: source.wrapper for alias, source in self.sources.items()}

    def settle(self) -> list[Any]:
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
        handler._connections, handler.shared = self._outer
        for alias in self.sources:
            databases[alias].source = self._outer_sources[alias]
            databases[alias].transaction_class = Transaction
        self.sources.clear()
