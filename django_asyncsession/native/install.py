"""Lets Django's own async methods run in the current session: `aget()`, `asave()`, `async for`.

Django's modules took `sync_to_async` from asgiref by name. `install` puts a function of the same
shape in its place: where there is a current session, it runs the sync code on the session's
connection; everywhere else it does what Django does.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from importlib import import_module
from itertools import islice
from typing import Any, TypeVar

from asgiref.sync import AsyncToSync, SyncToAsync
from django.db import DEFAULT_DB_ALIAS, connections, transaction
from django.db.models.query import BaseIterable
from django.dispatch import dispatcher

from django_asyncsession import bridge
from django_asyncsession.conf import settings
from django_asyncsession.exceptions import ConfigurationError, SessionClosedError
from django_asyncsession.interface import databases
from django_asyncsession.results import Reader
from django_asyncsession.session.session import Session

from .routes import ROUTES, Route, keeps_thread
from .sessions import SessionSet, current, current_call, is_enclosed

T = TypeVar("T")


class RoutedCall(SyncToAsync[..., Any]):
    """What Django makes of a sync function, with one more place to run it: the current session."""

    route: Route

    async def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function in the current sessions, or else in a thread as Django does."""
        # What Django itself sends to any thread (hashing a password) computes, and asks no
        # database.
        if self._thread_sensitive and not keeps_thread(self.func):
            sessions = current()
            if sessions is not None and self.route.applies(self.func):
                return await sessions.run(self.func, *args, **kwargs)
            if sessions is None and self.route.outside(self.func):
                with _by_itself() as sessions:
                    return await sessions.run(self.func, *args, **kwargs)
        return await super().__call__(*args, **kwargs)


@contextmanager
def _by_itself() -> Iterator[SessionSet]:
    """Sessions for what is outside of any request's: each statement commits by itself."""
    session = databases[settings.ALIAS].get_session(autocommit=True, begin_on_use=True)
    sessions = SessionSet(session, keep_others=False)
    try:
        yield sessions
    finally:
        sessions.end()


def _routed(route: Route) -> Callable[..., Any]:
    """A `sync_to_async` for one module."""

    def sync_to_async(func: Any = None, **options: Any) -> Any:
        if func is None:
            return lambda fn: sync_to_async(fn, **options)
        call = RoutedCall(func, **options)
        call.route = route
        return call

    return sync_to_async


class _SessionConnection:
    """What `django.db.transaction` gets as the connection in async code that has a current session:
    callbacks and the wish to roll back are the session's."""

    _OF_SESSION = frozenset({"on_commit", "set_rollback", "get_rollback"})

    def __init__(self, alias: str, sessions: SessionSet) -> None:
        self.__dict__.update(_alias=alias, _sessions=sessions)

    def __getattr__(self, name: str) -> Any:
        if name in self._OF_SESSION:
            return getattr(self._sessions.session(self._alias), name)
        return getattr(connections[self._alias], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(connections[self._alias], name, value)


def _get_connection(using: str | None = None) -> Any:
    """`transaction.get_connection`, by which `on_commit()` and its neighbours find what they
    change, whatever name they were imported under."""
    sessions = current()
    if sessions is None or current_call() is not None:
        return _django_get_connection(using)
    return _SessionConnection(using or DEFAULT_DB_ALIAS, sessions)


_django_get_connection = transaction.get_connection


def _async_generator(rows: BaseIterable[Any]) -> AsyncIterator[Any]:
    """`QuerySet.aiterator()`, which in a session also closes its cursor when it is left early."""
    sessions = current()
    if sessions is None:
        return _django_async_generator(rows)  # type: ignore[no-any-return]
    reader = Reader()
    return reader.reads(_iterate(rows, sessions, reader))


_django_async_generator: Any = BaseIterable._async_generator  # type: ignore[attr-defined]


async def _iterate(rows: Any, sessions: SessionSet, reader: Reader) -> AsyncGenerator[Any, None]:
    async with sessions.one_connection(rows.queryset.db) as (run, unread):
        generator = iter(rows)
        unread.begin()
        try:
            is_full = True
            while is_full:
                chunk = await run(
                    lambda: reader.run(lambda: list(islice(generator, rows.chunk_size)))
                )
                is_full = len(chunk) == rows.chunk_size
                for row in chunk:
                    unread.given()
                    try:
                        yield row
                    except GeneratorExit:
                        return  # and so close the cursor where waiting is possible
                    unread.taken()
        finally:
            unread.end()
            await _close(generator, run)


async def _close(generator: Any, run: Callable[..., Awaitable[Any]]) -> None:
    try:
        await run(generator.close)
    except SessionClosedError:
        # The cursor ended with the transaction; what is left must not find out later.
        with suppress(SessionClosedError):
            generator.close()


def _await_in_bridge(self: AsyncToSync[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`async_to_sync`, which in the bridge would refuse because the event loop runs."""
    if bridge.in_bridge() and not self.force_new_loop:
        return bridge.await_(_handling([sys.exception()], self.awaitable, args, kwargs))
    return _asgiref_async_to_sync(self, *args, **kwargs)


async def _handling(
    given: list[BaseException | None], fn: Callable[..., Awaitable[T]], args: Any, kwargs: Any
) -> T:
    """Await as an `except` block does that handles the exception in `given`, as asgiref does."""
    error = given.pop()
    if error is None or isinstance(error, GeneratorExit):
        # Of a generator; here it would say that nothing can be awaited.
        return await fn(*args, **kwargs)
    before = error.__traceback__, error.__context__
    try:
        raise error
    except BaseException:
        # Python has put this frame in front, and what this task handles behind.
        error.__traceback__, error.__context__ = before
        del error, before
        return await fn(*args, **kwargs)


_asgiref_async_to_sync: Any = AsyncToSync.__call__


async def _run_receivers(*receivers: Coroutine[Any, Any, Any]) -> Any:
    """Await the async receivers of a signal: at the same time, unless sync code waits for them.

    They then use what that code uses, its connection and its transaction, one after the other.
    """
    if not is_enclosed():
        return await _django_run_receivers(*receivers)
    waiting = list(receivers)
    try:
        return [await waiting.pop(0) for _ in receivers]
    finally:
        for receiver in waiting:
            receiver.close()


class _DispatcherAsyncio:
    """What the dispatcher of Django before 6.1 knows as asyncio; it uses `gather` only."""

    gather = staticmethod(_run_receivers)


_django_run_receivers: Any = getattr(dispatcher, "_run_parallel", asyncio.gather)


# What `install` replaced: the object, the name, and what was there.
_replaced: list[tuple[Any, str, Any]] = []


def install() -> None:
    """Route Django's async methods into the current session; installing twice does nothing."""
    if _replaced:
        return
    for route in ROUTES:
        if route.is_wanted:
            module = import_module(route.module)
            if hasattr(module, "sync_to_async"):
                _replace(module, "sync_to_async", _routed(route))
    _replace(BaseIterable, "_async_generator", _async_generator)
    _replace(transaction, "get_connection", _get_connection)
    _replace(AsyncToSync, "__call__", _await_in_bridge)
    if hasattr(dispatcher, "_run_parallel"):
        _replace(dispatcher, "_run_parallel", _run_receivers)
    else:
        _replace(dispatcher, "asyncio", _DispatcherAsyncio)


def _replace(holder: Any, name: str, value: Any) -> None:
    _replaced.append((holder, name, getattr(holder, name)))
    setattr(holder, name, value)


def uninstall() -> None:
    """Put every name of Django's back."""
    while _replaced:
        setattr(*_replaced.pop())


def is_installed() -> bool:
    """Whether Django's async methods are routed."""
    return bool(_replaced)


def use(session: Session, *others: Session) -> Use:
    """Run Django's own async methods in this session, for scripts, tests, consumers and commands.

    For `with` and `async with` alike. The session is begun and ended by whoever made it. An alias
    without a session is used in autocommit mode, as Django itself would.

    Args:
        session: the session of its alias.
        others: sessions of other aliases.

    Raises:
        ConfigurationError: native mode is off.
    """
    if not is_installed():
        raise ConfigurationError(
            'native mode is off; set ASYNC_SESSION = {"NATIVE_ORM": True}, or call native.install()'
        )
    return Use(session, *others)


class Use:
    """What `use` returns: the sessions are the current ones inside the block."""

    def __init__(self, *sessions: Session) -> None:
        self._sessions = sessions
        self._exit = ExitStack()

    def __enter__(self) -> None:
        sessions = SessionSet(*self._sessions, keep_others=False)
        self._exit.callback(sessions.end)
        self._exit.enter_context(sessions.as_current())

    def __exit__(self, *exc_info: object) -> None:
        self._exit.close()

    async def __aenter__(self) -> None:
        self.__enter__()

    async def __aexit__(self, *exc_info: object) -> None:
        self.__exit__()
