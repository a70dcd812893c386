"""A session for as long as a request or another unit of work lasts, the streaming body included;
middleware, decorators, consumers and commands enter it."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import TracebackType
from typing import Any, Self

from asgiref.sync import AsyncToSync, SyncToAsync, ThreadSensitiveContext
from django.http import HttpRequest

from .conf import settings
from .exceptions import SyncContextError
from .interface import databases
from .native.sessions import SessionSet
from .observe.slow import ends
from .origins import RequestSite, Site
from .session.session import Session
from .transactions.transaction import end_later
from .unread import Unread

logger = logging.getLogger("django_asyncsession")


def new_session(
    alias: str | None,
    options: Mapping[str, Any],
    request: HttpRequest | None = None,
    site: Site | str | None = None,
) -> Session:
    """A session that begins with its first statement; the alias None is that of the middleware.

    Args:
        request: the one that it ends with.
        site: what it is made for, where that is no request and the caller's line says nothing.

    Raises:
        UnknownAlias: DATABASES has no such alias.
        ConfigurationError: an option that cannot be.
    """
    if request is not None:
        site = RequestSite.of(request.method, request.path)
    database = databases[alias or settings.ALIAS]
    session = database.get_session(begin_on_use=True, site=site, **options)
    session.request = request
    return session


@contextmanager
def own_thread() -> Iterator[None]:
    """A thread for `sync_to_async` in the block, if it is used there; not that of the request,
    which ends with it, nor one that waits for the block itself."""
    # Entering it would do nothing inside of another.
    own = ThreadSensitiveContext()
    token = SyncToAsync.thread_sensitive_context.set(own)
    try:
        yield
    finally:
        if (executor := SyncToAsync.context_to_thread_executor.pop(own, None)) is not None:
            executor.shutdown(wait=False)
        with suppress(ValueError):
            # A coroutine that is collected is closed in another context, where nothing was set.
            SyncToAsync.thread_sensitive_context.reset(token)


class RequestScope:
    """Commits the session when the request went well, rolls back when it did not, and closes it
    either way.

    In native mode it makes the session the current one, and ends those of other aliases with it.
    Django turns what a view raises into a response, so that middleware sees no exception; whoever
    does see it calls
    `fail`. A streaming response takes the session along: see `keep_for`.
    """

    def __init__(self, session: Session) -> None:
        self.session: Session | SessionSet = session
        self._current: AbstractContextManager[None] = nullcontext()
        if settings.NATIVE_ORM:
            self.session = sessions = SessionSet(session, keep_others=True)
            self._current = sessions.as_current()
        self._failed = False
        # Not the body itself: it must end when the response lets go of it, without the garbage
        # collector.
        self._handed_over = False

    async def __aenter__(self) -> Self:
        self._current.__enter__()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._leaving_current():
            if exc is not None:
                self.fail()
            if not self._handed_over or self._failed:
                await self.finish()

    @contextmanager
    def _leaving_current(self) -> Iterator[None]:
        try:
            yield
        finally:
            self._current.__exit__(None, None, None)

    def fail(self) -> None:
        """Roll back at the end, because something was raised."""
        self._failed = True

    async def finish(self) -> None:
        """End the session.

        Raises:
            StreamTimeout: it was rolled back already, because a stream was left unread.
            What `Session.commit` raises.
        """
        session = self.session
        try:
            if not self._failed:
                session.check_not_given_up()
                if session.in_transaction:
                    await session.commit()
        finally:
            await session.close(has_error=self._failed)

    def keep_for(self, response: Any) -> Any:
        """Keep the session open for the body of a streaming response that is an async iterator.

        Its transaction is committed when the body is exhausted, and rolled back when the body
        raises, or when the client goes away before its end. Other responses are left as they are.

        Returns:
            The same response.
        """
        if getattr(response, "streaming", False) and response.is_async and not self._failed:
            parts = response._iterator
            if isinstance(self.session, SessionSet):
                parts = self.session.stream(parts)
            response.streaming_content = StreamedBody(parts, self)
            self._handed_over = True
        return response


# Whoever called it, a server for example, has sent no statement.
ends[RequestScope.finish.__code__] = "the end of the session"


class StreamedBody:
    """The body of a streaming response, at whose end the session ends.

    The end may be the last part, an error, `close()` (which Django calls in a thread), the end of
    the task that sends
    the body, or that nobody holds this object any more: a client can go away, and a middleware can
    drop the response,
    at any time, and Django tells the body's iterator of neither.
    """

    def __init__(self, parts: AsyncIterator[Any], scope: RequestScope) -> None:
        self._parts, self._scope = parts, scope
        self._loop = asyncio.get_running_loop()
        self._ended = self._watched = False
        # Weakly: the timer must not keep a body that everybody else has dropped.
        body = weakref.ref(self)
        self._unread = Unread("a streaming response", lambda: _give_up(body))
        self._unread.begin()
        # A sync middleware around this one awaits it in a task of its own, which ends now.
        if not _is_waited_for_in_thread():
            self._watch()

    def _watch(self) -> None:
        """End with the current task, which sends the body."""
        self._watched = True
        end = _EndOfTask(self)
        if (task := asyncio.current_task()) is not None:
            task.add_done_callback(end)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Any:
        if not self._watched:
            self._watch()
        self._unread.taken()
        try:
            part = await anext(self._parts)
            self._unread.given()
            return part
        except StopAsyncIteration:
            await self._end()
            raise
        except BaseException:
            await self.abort()
            raise

    async def _end(self) -> None:
        if not self._ended:
            self._note_end()
            await self._scope.finish()

    async def abort(self) -> None:
        """End the body before its end: close what produces it, and roll the session back."""
        if self._ended:
            return
        self._note_end()
        await _abort(self._parts, self._scope)

    def close(self) -> None:
        """End the body from any thread; Django calls it when it closes the response."""
        if not self._ended:
            self._note_end()
            end_later(self._loop, _abort(self._parts, self._scope))

    def _note_end(self) -> None:
        self._ended = True
        self._unread.end()

    def __del__(self) -> None:
        self.close()


def _give_up(body: weakref.ref[StreamedBody]) -> None:
    if (alive := body()) is not None:
        alive.close()


def _is_waited_for_in_thread() -> bool:
    """Whether the current task is one that `async_to_sync` made for the sync code of a thread."""
    coroutine = None if (task := asyncio.current_task()) is None else task.get_coro()
    return getattr(coroutine, "cr_code", None) is AsyncToSync.main_wrap.__code__


class _EndOfTask:
    """Ends a body when the task that should have sent it is done; it does not keep the body
    alive."""

    def __init__(self, body: StreamedBody) -> None:
        self._body = weakref.ref(body)

    def __call__(self, task: asyncio.Task[Any]) -> None:
        if (body := self._body()) is not None:
            body.close()


async def _abort(parts: AsyncIterator[Any], scope: RequestScope) -> None:
    scope.fail()
    try:
        if (aclose := getattr(parts, "aclose", None)) is not None:
            await aclose()
    except Exception:
        logger.warning("error ignored while a streaming body was closed", exc_info=True)
    finally:
        await scope.finish()


class RefusedSession:
    """Stands where the session would be, in requests that cannot use one, and says so when it is
    used.

    Args:
        reason: what is wrong and what to do.
    """

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise SyncContextError(self._reason)

    async def __aenter__(self) -> Any:
        raise SyncContextError(self._reason)

    async def __aexit__(self, *exc_info: object) -> None:
        """Never reached."""
