"""Test cases and context managers for tests of code that uses sessions.

In an `AsyncSessionTestCase`, and with pytest in every test that uses pytest-django's `db`, sync
code and sessions share one connection for each database: they see the same uncommitted data, and
it is rolled back together.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

from django.test import TestCase, TransactionTestCase

from django_asyncsession.backends.base import BridgedMixin
from django_asyncsession.conf import settings
from django_asyncsession.interface import databases
from django_asyncsession.origins import creation_site
from django_asyncsession.pool.lease import Lease
from django_asyncsession.session.session import Session
from django_asyncsession.transactions.checkout import State

from .leaks import assert_no_leaks
from .queries import async_assert_num_queries, capture_on_commit_callbacks, capture_queries
from .sharing import OwnSite, RealSessions, SharedSource, Sharing

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


# The test's own session


class OwnSession(Session):
    """A session for the whole of a test; in a test's transaction, those of the code under test
    nest in it.

    It needs no `begin()`, and what it did is rolled back at the end of the test.
    """

    def __init__(self, bind: Any, **options: Any) -> None:
        super().__init__(bind, **options)
        self._source = _Lending(bind)

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
            return await source.acquire(is_of_test=True)
        lease: Lease[BridgedMixin] = await self._bind.acquire()
        return lease


def own_session(alias: str | None = None) -> OwnSession:
    """A session for the whole of a test.

    Args:
        alias: the database; None is that of the middleware.
    """
    site = OwnSite(creation_site())
    return OwnSession(databases[alias or settings.ALIAS], begin_on_use=True, site=site)


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
