"""What a test asserts of queries and commit callbacks."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self

from django.db import connections

from django_asyncsession import bridge
from django_asyncsession.backends.base import BridgedMixin
from django_asyncsession.conf import settings
from django_asyncsession.exceptions import ConfigurationError
from django_asyncsession.interface import DatabaseInterface, databases
from django_asyncsession.pool.lease import Lease
from django_asyncsession.transactions.checkout import ConnectionSource

from .leaks import _leases
from .sharing import SharedSource

logger = logging.getLogger("django_asyncsession")

# Statements that begin and end transactions, which are not counted: in a test they are others.
CONTROL = re.compile(
    r"\s*(begin|start\s+transaction|commit|rollback|savepoint|release|set\s+transaction)\b",
    re.IGNORECASE,
)


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
        self._outer: ConnectionSource | None = None

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
        self,
        interface: DatabaseInterface,
        source: ConnectionSource | None,
        watch: Callable[[Any], None],
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
