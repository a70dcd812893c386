"""Django's ASGI application without a thread for each request, and with pools that are opened and
closed with the server.

Django sends the receivers of `request_started`, and `HttpResponse.close()`, to a thread, which is
made for the request and ends with it. What Django itself connects there cleans up after that very
thread. So where nobody else listens, and the request has used no thread, there is nothing to do.
"""

from __future__ import annotations

import asyncio
import enum
import io
import logging
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import closing, suppress
from types import TracebackType
from typing import Any, Self

import django
from asgiref.sync import AsyncToSync, SyncToAsync, iscoroutinefunction
from django.conf import settings
from django.core.cache import caches, close_caches
from django.core.cache.backends.base import BaseCache
from django.core.exceptions import RequestAborted
from django.core.handlers import asgi as django_asgi
from django.core.handlers.asgi import ASGIHandler, ASGIRequest, get_script_prefix
from django.core.handlers.base import reset_urlconf
from django.core.signals import request_finished, request_started
from django.db import close_old_connections, reset_queries
from django.dispatch import Signal
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.urls import set_script_prefix
from django.utils.deprecation import MiddlewareMixin
from django.utils.module_loading import import_string

from .interface import databases
from .pool.options import check_seconds
from .scope import StreamedBody

logger = logging.getLogger("django_asyncsession.asgi")

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[Any]]

# Django's own receivers, and why none of them needs a thread where the request has made none.
HARMLESS: Mapping[Callable[..., Any], str] = {
    reset_queries: "forgets the queries that were logged by connections of the thread",
    close_old_connections: "closes connections of the thread",
    close_caches: "closes caches that the request has used; most have nothing to close, and one "
    "that has is looked for",
    reset_urlconf: "forgets the request's own URLconf, which is done without a thread as well",
}
# Seconds after which a request begins to listen whether its client is still there; a streaming
# response does at once. Most requests are answered before, and need no task for it.
LISTEN_AFTER = 0.05


def get_asgi_application(*, grace: float = 5.0) -> ThreadlessHandler:
    """The project's ASGI application; for the `asgi.py` of a project, instead of Django's function
    of that name.

    Args:
        grace: seconds that open sessions get to finish when the server ends the application, by
            the lifespan protocol.

    Raises:
        ConfigurationError: `grace` is no time.
    """
    check_seconds("grace", grace)
    django.setup(set_prefix=False)
    handler = ThreadlessHandler()
    handler.grace = grace
    return handler


class ThreadlessHandler(ASGIHandler):
    """Django's handler, which uses a thread for those requests only that need one.

    Those take Django's way, each step by itself, and the logger `django_asyncsession.asgi` tells
    why at level DEBUG. It also answers the lifespan protocol.
    """

    # The sender of the signals: who listens to Django's handler hears of this one's requests.
    sender: type = ASGIHandler
    # Seconds that open sessions get when the server ends the application.
    grace = 5.0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request, or the events of the server's life.

        Raises:
            ValueError: it is another kind of connection, a websocket for example.
        """
        if scope["type"] == "lifespan":
            await _follow_server(receive, send, self.grace)
        else:
            # Django's, by its name: error trackers put one of their own there.
            await super().__call__(scope, receive, send)

    async def handle(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer one request; called by `__call__`."""
        try:
            body_file = await self.read_body(receive)
        except RequestAborted:
            return
        if not isinstance(body_file, io.BytesIO):
            _tell(
                scope, Reason.BODY, "it is in several messages, or too large to be kept in memory"
            )
        with closing(body_file):
            set_script_prefix(get_script_prefix(scope))
            why = _why_thread(None) or _why_signal(request_started, self.sender)
            if why is not None:
                _tell(scope, *why)
                await request_started.asend(sender=self.sender, scope=scope)
            request, refused = self.create_request(scope, body_file)
            if request is not None:
                await self._answer(request, receive, send)
                return
            body_file.close()
            async with _Ending(scope, response=refused):
                await self.send_response(refused, send)  # type: ignore[arg-type]

    async def read_body(self, receive: Receive) -> Any:
        """The request's body as a file: in memory, when it is one message that Django would keep
        there as well.

        Raises:
            RequestAborted: the client went away before it had sent all of it.
        """
        message = await receive()
        if message["type"] != "http.disconnect" and not message.get("more_body", False):
            body, limit = message.get("body", b""), settings.FILE_UPLOAD_MAX_MEMORY_SIZE
            # As for Django's temporary file: no limit is none, and so is 0.
            if not limit or len(body) <= limit:
                return io.BytesIO(body)
        return await super().read_body(_again(message, receive))

    async def _answer(self, request: ASGIRequest, receive: Receive, send: Send) -> None:
        async with (
            _Ending(request.scope, self.sender, request) as ending,
            _Client(lambda: self.listen_for_disconnect(receive)) as client,
        ):
            ending.response = response = await self.run_get_response(request)
            ending.response._handler_class = self.sender
            if response.streaming:
                client.listen()
            await self.send_response(response, send)


def _again(first: Any, receive: Receive) -> Receive:
    """`receive`, with a message that was taken already in front."""
    taken = [first]

    async def again() -> Any:
        return taken.pop() if taken else await receive()

    return again


class _Client:
    """Cancels the current task in the block when the client goes away; the block then ends
    without an error.

    Args:
        wait: waits until the client is gone, and raises RequestAborted.
    """

    def __init__(self, wait: Callable[[], Awaitable[Any]]) -> None:
        self._wait = wait
        self._listening: asyncio.Task[None] | None = None
        self._found: Exception | None = None
        self._has_ended = False

    async def __aenter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "ASGI applications are run in tasks"
        self._task, self._cancelled_before = task, task.cancelling()
        self._timer = task.get_loop().call_later(LISTEN_AFTER, self.listen)
        return self

    def listen(self) -> None:
        """Begin to listen, if that was not done yet."""
        self._timer.cancel()
        if self._listening is None:
            self._listening = self._task.get_loop().create_task(self._listen())

    async def _listen(self) -> None:
        try:
            await self._wait()
        except Exception as exc:
            # RequestAborted, or what is wrong with the server.
            if not self._has_ended:
                self._found = exc
                self._task.cancel()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self._has_ended = True
        self._timer.cancel()
        if self._listening is not None and not self._listening.done():
            self._listening.cancel()
            await asyncio.wait([self._listening])
        # Its traceback refers to this object.
        found, self._found = self._found, None
        if found is None:
            return False
        # Also when the block has caught the cancellation: it must not reach who comes after.
        by_us_only = self._task.uncancel() <= self._cancelled_before
        if isinstance(exc, asyncio.CancelledError) and not by_us_only:
            return False
        if exc is not None and not isinstance(exc, asyncio.CancelledError):
            return False
        if not isinstance(found, RequestAborted):
            raise found
        return True


class _Ending:
    """Closes the response after the block, whatever happens there, or tells that the request has
    ended without one.

    Args:
        scope: of the request.
        sender: of the signal; None, as for Django, when the request could not be made.
        request: None when it could not be made.
        response: what is closed, if it is there already.
    """

    def __init__(
        self,
        scope: Any,
        sender: type | None = None,
        request: ASGIRequest | None = None,
        response: Any = None,
    ) -> None:
        self._scope, self._sender, self._request = scope, sender, request
        self.response = response

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            await self._end()
        except Exception:
            if exc is None:
                raise
            logger.warning("error ignored while a request was ended", exc_info=True)

    async def _end(self) -> None:
        response, sender = self.response, self._sender
        why = _why_thread(self._request) or _why_signal(request_finished, sender)
        if why is None and response is not None:
            why = _why_response(response)
        if why is None:
            if response is not None:
                _close(response)
            reset_urlconf(sender)
            return
        _tell(self._scope, *why)
        if response is None:
            await request_finished.asend(sender=sender)
        else:
            # By the name that native mode routes.
            sync_to_async: Any = vars(django_asgi)["sync_to_async"]
            await sync_to_async(response.close)()


def _close(response: Any) -> None:
    """`HttpResponse.close()`, but for the signal at its end."""
    for closer in response._resource_closers:
        with suppress(Exception):
            closer()
    response._resource_closers.clear()
    response.closed = True


class Reason(enum.StrEnum):
    """Why a step of a request takes Django's way."""

    # Sync code has a thread, where connections may be open.
    THREAD = "thread"
    # Somebody else than Django receives the signal.
    RECEIVER = "receiver"
    # The response has something to close that may wait.
    CLOSER = "closer"
    FILES = "files"
    # Its class has a `close()` of its own.
    RESPONSE = "response"
    # The request has used a cache that has something to close.
    CACHE = "cache"
    # It is not in one message that can be kept in memory.
    BODY = "body"


# With details; None when the step need not.
Why = tuple[Reason, str] | None


def _tell(scope: Any, reason: Reason, details: str) -> None:
    logger.debug(
        "%s %s takes Django's way (%s): %s",
        scope["method"],
        scope["path"],
        reason.value,
        details,
        extra={"reason": reason.value},
    )


def _why_signal(signal: Signal, sender: type | None) -> Why:
    """Because somebody receives the signal, or of something that Django's receivers clean up."""
    receivers = _Receivers.of(signal, sender)
    if receivers.other is not None:
        return Reason.RECEIVER, receivers.other
    if receivers.closes_caches:
        for cache in caches.all(initialized_only=True):
            if getattr(cache.close, "__func__", None) is not BaseCache.close:
                return Reason.CACHE, f"{_name(type(cache))} is closed"
    return None


def _why_thread(request: HttpRequest | None) -> Why:
    """Because sync code has a thread, where connections may be open: one of the request, or of
    whoever runs it."""
    if getattr(AsyncToSync.executors, "current", None) is not None:
        return Reason.THREAD, "sync code runs it, with async_to_sync()"
    context = SyncToAsync.thread_sensitive_context.get(None)
    # Without a context there is one thread for all.
    if context is not None and context not in SyncToAsync.context_to_thread_executor:
        return None
    if request is None:
        return Reason.THREAD, "it runs in a context that has one"
    users = _sync_code(request) if logger.isEnabledFor(logging.DEBUG) else ()
    others = "sync_to_async() in its code or a receiver"
    return Reason.THREAD, f"used by {' or '.join(users) or others}"


def _why_response(response: Any) -> Why:
    """Because something that waits may be done when the response is closed."""
    if getattr(response.close, "__func__", None) is not _response_close:
        return Reason.RESPONSE, f"{_name(type(response))} has a close() of its own"
    for closer in response._resource_closers:
        function, owner = getattr(closer, "__func__", None), getattr(closer, "__self__", None)
        if function is _request_close:
            if getattr(owner, "_files", None):
                return Reason.FILES, "uploaded files are closed"
        elif function is not StreamedBody.close:
            return Reason.CLOSER, f"{_name(closer)} is called"
    return None


# As Django has them: a tool that puts others in their place wants to be called.
_response_close = HttpResponseBase.close
_request_close = ASGIRequest.close


def _sync_code(request: HttpRequest) -> Iterator[str]:
    """What of a request Django runs in its thread, as far as the settings and the URLs tell."""
    for name in settings.MIDDLEWARE:
        middleware = import_string(name)
        if not getattr(middleware, "async_capable", False):
            yield f"sync middleware {name}"
        elif any(_is_sync(middleware, hook) for hook in _hooks(middleware)):
            yield f"sync parts of middleware {name}"
    view = request.resolver_match and request.resolver_match.func
    if view is not None and not iscoroutinefunction(view):
        yield f"sync view {_name(view)}"


def _hooks(middleware: Any) -> Iterator[str]:
    yield from ("process_view", "process_template_response")
    if isinstance(middleware, type) and issubclass(middleware, MiddlewareMixin):
        yield from ("process_request", "process_response")


def _is_sync(middleware: Any, hook: str) -> bool:
    method = getattr(middleware, hook, None)
    return method is not None and not iscoroutinefunction(method)


def _name(thing: Any) -> str:
    owner = thing if hasattr(thing, "__qualname__") else type(thing)
    return f"{owner.__module__}.{owner.__qualname__}"


class _Receivers:
    """Who receives a signal of one sender; found out again when somebody connects or
    disconnects."""

    def __init__(self, receivers: list[Callable[..., Any]]) -> None:
        others = [one for one in receivers if not any(one is known for known in HARMLESS)]
        # The first that is not Django's own.
        self.other = _name(others[0]) if others else None
        self.closes_caches = any(one is close_caches for one in receivers)

    @classmethod
    def of(cls, signal: Any, sender: type | None) -> _Receivers:
        """Those of a signal and a sender."""
        # Django clears this dict whenever somebody connects or disconnects, and looks for senders
        # in it, which this class is not. Whoever sets aside the receivers for a while changes the
        # list only.
        known = signal.sender_receivers_cache.get(_Receivers)
        if known is None or signal._dead_receivers or known.listed is not signal.receivers:
            known = cls._begin(signal)
        found: _Receivers | None = known.by_sender.get(sender)
        if found is None:
            found = known.by_sender[sender] = cls(list(_live(known.copy, sender)))
        return found

    @staticmethod
    def _begin(signal: Any) -> _Known:
        with signal.lock:
            signal._clear_dead_receivers()
            known = signal.sender_receivers_cache[_Receivers] = _Known(signal.receivers)
        return known


class _Known:
    """What is known of a signal as long as its receivers stay the same."""

    def __init__(self, listed: list[Any]) -> None:
        self.listed, self.copy = listed, listed.copy()
        self.by_sender: dict[type | None, _Receivers] = {}


def _live(entries: list[Any], sender: type | None) -> Iterator[Callable[..., Any]]:
    """The receivers themselves, of Django's list. Not by its method: tracing tools have that give
    functions of their own, also for those that Django connects."""
    everybody, this = id(None), id(sender)
    for (_, of_sender), receiver, *_ in entries:
        if of_sender in (everybody, this):
            alive = receiver() if isinstance(receiver, weakref.ReferenceType) else receiver
            if alive is not None:
                yield alive


# The server's life


async def _follow_server(receive: Receive, send: Send, grace: float) -> None:
    """Open the pools that keep connections when the server starts, and close all when it ends.

    Args:
        grace: seconds that open sessions get then.
    """
    while True:
        event = (await receive())["type"]
        if event == "lifespan.startup":
            failure = await _open_pools()
            if failure:
                await databases.close_all()
        elif event == "lifespan.shutdown":
            failure = await _close_pools(grace)
        else:
            continue
        if failure:
            await send({"type": f"{event}.failed", "message": failure})
            return
        await send({"type": f"{event}.complete"})
        if event == "lifespan.shutdown":
            return


async def _open_pools() -> str:
    """Open the pools whose `min_size` is not 0; what went wrong, in one line, or nothing."""
    failures: list[str] = []

    async def connect(alias: str) -> None:
        try:
            if databases[alias].stats()["pool_min"]:
                await databases[alias].connect()
        except Exception as exc:
            logger.error("the pool of %r could not be opened", alias, exc_info=exc)
            failures.append(
                f"the pool of {alias!r} could not be opened: {type(exc).__name__}: {exc}"
            )

    await asyncio.gather(*(connect(alias) for alias in databases))
    return "; ".join(failures)


async def _close_pools(grace: float) -> str:
    try:
        await databases.close_all(grace)
    except Exception as exc:
        logger.error("the pools could not be closed", exc_info=exc)
        return f"the pools could not be closed: {type(exc).__name__}: {exc}"
    return ""
