"""Test cases and context managers for tests of code that uses sessions.

In an `AsyncSessionTestCase`, and with pytest in every test that uses pytest-django's `db`, sync
code and sessions share one connection for each database: they see the same uncommitted data, and
it is rolled back together.
"""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import logging
import re
import time
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from django.db import connections
from django.test import TestCase, TransactionTestCase

from . import bridge
from .backends.base import BridgedMixin
from .conf import settings
from .exceptions import ConfigurationError
from .interface import DatabaseInterface, databases
from .pool import Lease
from .session import Session
from .sharing import RealSessions, SharedSource, Sharing
from .transactions.checkout import Source, State

if TYPE_CHECKING:
    _TestCase = TransactionTestCase
else:
    _TestCase = object

__all__ = [
    "AsyncSessionTestCase",
    "AsyncSessionTransactionTestCase",
    "assert_no_leaks",
    "async_assert_num_queries",
    "capture_on_commit_callbacks",
    "capture_queries",
]

logger = logging.getLogger("django_asyncsession")

# Statements that begin and end transactions, which are not counted: in a test they are others.
CONTROL = re.compile(
    r"\s*(begin|start\s+transaction|commit|rollback|savepoint|release|set\s+transaction)\b",
    re.IGNORECASE,
)


# The test's own session


class OwnSession(Session):
    """A session for the whole of a test; in a test's transaction, those of the code under test
    nest in it.

    It needs no `begin()`, and what it did is rolled back at the end of the test.
    """

    @property
    def _source(self) -> Source:
        return _Lending(self.bind)

    def end(self) -> None:
        """Roll back and close without awaiting, whether or not the loop is closed."""
        transaction, self._transaction = self._transaction, None
        self._state = State.CLOSED
        if transaction is not None:
            transaction.abandon()


class _Lending:
    """Where the test's own session takes its connection."""

    def __init__(self, bind: Any) -> None:
        self.alias, self.vendor, self._bind = bind.alias, bind.vendor, bind

    async def acquire(self) -> Lease[BridgedMixin]:
        source = getattr(self._bind, "source", None)
        if isinstance(source, SharedSource):
            return await source.acquire(lends=True)
        lease: Lease[BridgedMixin] = await self._bind.acquire()
        lease.lends = True
        return lease


def own_session(alias: str | None = None) -> OwnSession:
    """A session for the whole of a test.

    Args:
        alias: the database; None is that of the middleware.
    """
    return OwnSession(databases[alias or settings.ALIAS], begin_on_use=True)


# Test cases


class _AsyncMethods(_TestCase):
    """Runs what is `async def` among setUp, test, tearDown and cleanups, all in one event loop."""

    session: Session
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
    _runner: asyncio.Runner | None = None
    _context: contextvars.Context

    def _callSetUp(self) -> None:
        self._context = contextvars.copy_context()
        self.session = own_session()
        self._call(self.setUp)

    def _callTestMethod(self, method: Callable[[], Any]) -> None:
        # Not the given one: Django has put another in the place of one that is async.
        self._call(getattr(type(self), self._testMethodName), self)

    def _callTearDown(self) -> None:
        self._call(self.tearDown)

    def _callCleanup(self, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> None:
        self._call(function, *args, **kwargs)

    def _call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        result = function(*args, **kwargs)
        if inspect.iscoroutine(result):
            self._await(result)

    def _await(self, coroutine: Coroutine[Any, Any, None]) -> None:
        if self._runner is None:
            # Not of self, which would make a method of it.
            self._runner = asyncio.Runner(loop_factory=type(self).loop_factory)
        self._runner.run(coroutine, context=self._context)

    def _post_teardown(self) -> None:
        try:
            self._end_session()
        finally:
            super()._post_teardown()  # type: ignore[misc]

    def _end_session(self) -> None:
        """Close the session and the pools, and end the loop with the tasks that were left in
        it."""
        session: Any = self.__dict__.pop("session", None)
        runner, self._runner = self._runner, None
        if runner is not None:
            with runner:
                runner.run(_close_all(session))
        elif session is not None:
            session.end()


async def _close_all(session: Session) -> None:
    try:
        await session.close()
    finally:
        await databases.close_all()


class SharingTestCase(TestCase):
    """Django's `TestCase`, whose transaction sessions share with sync code."""

    _sharing: Sharing

    @classmethod
    def setUpClass(cls) -> None:
        """Share the connections, and then begin as Django does."""
        cls._sharing = Sharing()
        cls._sharing.begin()
        cls.addClassCleanup(cls._sharing.end)
        super().setUpClass()

    def _fixture_teardown(self) -> None:
        try:
            self._sharing.settle()
        finally:
            super()._fixture_teardown()  # type: ignore[misc]


class AsyncSessionTestCase(_AsyncMethods, SharingTestCase):
    """Django's `TestCase` for async code: one transaction, rolled back after each test, in which
    sync code, sessions and requests of the test clients work together.

    `setUp`, tests, `tearDown` and cleanups may be `async def`; those of one test run in one event
    loop, which `loop_factory` makes if it is set. `self.session` is a session of the database that
    the middleware uses.
    """


class AsyncSessionTransactionTestCase(_AsyncMethods, TransactionTestCase):
    """Django's `TransactionTestCase` for async code: real transactions on connections of the
    pools, and tables emptied after each test.

    For tests of what a savepoint cannot show: isolation, locks, sessions that are open at the same
    time. The rest is as in `AsyncSessionTestCase`.
    """

    _others: RealSessions

    def _callSetUp(self) -> None:
        self._others = RealSessions()
        super()._callSetUp()

    def _end_session(self) -> None:
        try:
            if self._runner is not None:
                self._runner.run(self.session.close())
                self._others.end()
        finally:
            super()._end_session()


# Statements


class QueryLog:
    """The statements that were sent in a block: of sessions, and of sync code in this thread.

    Use it with `with` or `async with`. Those that begin and end transactions and savepoints are
    left out, because in a test they are not those of production.

    Args:
        using: alias of the database.
    """

    def __init__(self, using: str) -> None:
        self.alias = using
        self.captured_queries: list[dict[str, Any]] = []
        self._wrappers: list[Any] = []
        self._interface = databases[using]
        self._outer: Source | None = None

    def __len__(self) -> int:
        return len(self.captured_queries)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.captured_queries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """A statement: its `sql`, with placeholders, its `params`, and the `time` it took, in
        seconds."""
        return self.captured_queries[index]

    def __str__(self) -> str:
        return "\n".join(
            f"{number}. {query['sql']} {query['params'] or ''}".rstrip()
            for number, query in enumerate(self, 1)
        )

    def __enter__(self) -> Self:
        self._watch(connections[self.alias])
        self._outer = self._interface.source
        if not isinstance(self._outer, SharedSource):
            for lease in _leases(self._interface):
                self._watch(lease.connection)
            self._interface.source = _Watched(self._interface, self._outer, self._watch)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._interface.source = self._outer
        for wrapper in self._wrappers:
            if self._record in wrapper.execute_wrappers:
                wrapper.execute_wrappers.remove(self._record)
        self._wrappers.clear()

    async def __aenter__(self) -> Self:
        return self.__enter__()

    async def __aexit__(self, *exc_info: Any) -> None:
        self.__exit__(*exc_info)

    def _watch(self, wrapper: Any) -> None:
        if self._record not in wrapper.execute_wrappers:
            wrapper.execute_wrappers.append(self._record)
            self._wrappers.append(wrapper)

    def _record(self, execute: Any, sql: Any, params: Any, many: bool, context: Any) -> Any:
        started = time.monotonic()
        try:
            return execute(sql, params, many, context)
        finally:
            if not CONTROL.match(text := str(sql)):
                seconds = time.monotonic() - started
                self.captured_queries.append({"sql": text, "params": params, "time": seconds})


class _Watched:
    """Where connections come from while statements are captured."""

    def __init__(
        self, interface: DatabaseInterface, source: Source | None, watch: Callable[[Any], None]
    ) -> None:
        self.alias, self.vendor = interface.alias, interface.vendor
        self._interface, self._source = interface, source
        self._watch = watch

    async def acquire(self) -> Lease[BridgedMixin]:
        lease = await (self._source or self._interface.pool()).acquire()
        self._watch(lease.connection)
        return lease


class ExpectedQueries(QueryLog):
    """A log that raises at the end of the block unless it has the expected number of
    statements."""

    def __init__(self, expected: int, using: str) -> None:
        super().__init__(using)
        self._expected = expected

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(exc_type, exc, traceback)
        if exc is None and len(self) != self._expected:
            raise AssertionError(
                f"{len(self)} statements on {self.alias!r}, {self._expected} expected:\n{self}"
            )


def capture_queries(using: str | None = None) -> QueryLog:
    """Collect the statements that a block sends.

    Args:
        using: alias of the database; None is that of the middleware.
    """
    return QueryLog(using or settings.ALIAS)


def async_assert_num_queries(expected: int, using: str | None = None) -> ExpectedQueries:
    """Raise `AssertionError` with the statements that a block sent, unless they are so many.

    Args:
        expected: how many statements; those that begin and end transactions do not count.
        using: alias of the database; None is that of the middleware.
    """
    return ExpectedQueries(expected, using or settings.ALIAS)


# Callbacks


@asynccontextmanager
async def capture_on_commit_callbacks(
    using: str | None = None, execute: bool = False
) -> AsyncIterator[list[Callable[[], Any]]]:
    """Collect the `on_commit` callbacks that a block registers, in sessions and in sync code; in a
    test's transaction they do not run by themselves.

    Args:
        using: alias of the database; None is that of the middleware.
        execute: call them at the end of the block, and await those that are coroutine functions.

    Raises:
        ConfigurationError: no test's transaction is open on the database, so that callbacks run at
            the commit.
    """
    wrapper = _shared(using or settings.ALIAS)
    callbacks: list[Callable[[], Any]] = []
    done = len(wrapper.run_on_commit)
    yield callbacks
    while done < len(wrapper.run_on_commit):
        waiting = wrapper.run_on_commit[done:]
        done += len(waiting)
        for _, call, robust in waiting:
            callbacks.append(getattr(call, "func", call))
            if execute:
                await _execute(call, robust)


def _shared(alias: str) -> Any:
    source = databases[alias].source
    if not isinstance(source, SharedSource) or not source.wrapper.is_in_test_case:
        raise ConfigurationError(
            f"no test's transaction is open on {alias!r}, so callbacks run at the commit; use "
            "AsyncSessionTestCase, or pytest-django's db"
        )
    return source.wrapper


async def _execute(call: Callable[[], Any], robust: bool) -> None:
    try:
        await bridge.run(call)
    except Exception:
        if not robust:
            raise
        logger.exception("error calling %s in on_commit()", getattr(call, "__qualname__", call))


# Leaks


class LeakCheck:
    """Raises at the end of a block that leaves sessions open, or drops them unclosed.

    Use it with `with` or `async with`.
    """

    def __init__(self) -> None:
        self._before: list[Lease[BridgedMixin]] = []
        self._warnings = warnings.catch_warnings(record=True)
        self._recorded: list[warnings.WarningMessage] = []

    def __enter__(self) -> None:
        self._before = _all_leases()
        gc.collect()
        recorded = self._warnings.__enter__()
        assert recorded is not None
        self._recorded = recorded
        warnings.simplefilter("always", ResourceWarning)

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        gc.collect()
        self._warnings.__exit__(exc_type, exc, traceback)
        before, self._before = self._before, []
        dropped = []
        for warning in self._recorded:
            if issubclass(warning.category, ResourceWarning):
                dropped.append(str(warning.message))
            else:
                warnings.showwarning(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
        left = [
            f"a session of {lease.connection.alias!r} made at {lease.made_at} is still open"
            for lease in _all_leases()
            if lease not in before
        ]
        if exc is None and (left or dropped):
            raise AssertionError("; ".join([*left, *dropped]))

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, *exc_info: Any) -> None:
        self.__exit__(*exc_info)


def assert_no_leaks() -> LeakCheck:
    """Raise `AssertionError` at the end of a block that leaves a session open, or drops one that
    was not closed, with where it was made."""
    return LeakCheck()


def _all_leases() -> list[Lease[BridgedMixin]]:
    return [lease for interface in databases.all() for lease in _leases(interface)]


def _leases(interface: DatabaseInterface) -> list[Lease[BridgedMixin]]:
    leases = [lease for pool in interface.pools for lease in pool.leases]
    if isinstance(interface.source, SharedSource):
        leases += interface.source.leases
    return leases
