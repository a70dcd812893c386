"""Gives every ASGI request a session, which ends before the response leaves."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Awaitable, Callable
from functools import wraps
from types import FrameType
from typing import Any

from asgiref.sync import iscoroutinefunction, markcoroutinefunction
from django.conf import settings as django_settings
from django.core.handlers.base import BaseHandler
from django.core.handlers.wsgi import WSGIRequest
from django.core.signals import got_request_exception
from django.http import HttpRequest
from django.http.response import HttpResponseBase
from django.utils.module_loading import import_string

from .bridge import in_bridge
from .conf import settings
from .exceptions import SyncContextError
from .installed import check_import, check_installed
from .observe.slow import request as answered
from .origins import RequestSite
from .scope import RefusedSession, RequestScope, new_session

SYNC_VIEW = (
    "the request's async session is used in a sync view; make the view `async def`, "
    "or use Django's ORM there as usual"
)
WSGI = (
    "the request's async session is used under WSGI, where nothing can be awaited; "
    "serve the project's ASGI application, for example with uvicorn"
)
TEST_CLIENT = (
    "the request's async session is used with Django's sync test client, which is WSGI; "
    "write `await self.async_client.get(...)`, or use AsyncClient(), in an `async def` test"
)
_SCOPE = "_async_session_scope"

check_import()


class AsyncSessionMiddleware:
    """Sets `request.db_session`: a session that takes a connection when first used, and none
    before.

    It commits before the response leaves, rolls back when the view raises, and stays open for a
    streaming body. Put it first in MIDDLEWARE, so that it sees the end of every other one.
    """

    async_capable = True
    # Sync middleware inside this one runs in a thread, the async view still on the loop.
    sync_capable = False

    def __init__(self, get_response: Callable[[HttpRequest], Awaitable[HttpResponseBase]]) -> None:
        check_installed()
        handler = _loading_handler(sys._getframe(1))
        _check_client(handler)
        self.get_response = get_response
        markcoroutinefunction(self)
        _watch_views(handler)

    async def __call__(self, request: HttpRequest) -> HttpResponseBase:
        """Answer the request within its session."""
        if isinstance(request, WSGIRequest):
            is_test = hasattr(request, "_dont_enforce_csrf_checks")
            refused = RefusedSession(TEST_CLIENT if is_test else WSGI)
            setattr(request, settings.REQUEST_ATTRIBUTE, refused)
            return await self.get_response(request)
        outer = answered.get()
        answered.set(RequestSite.of(request.method, request.path))
        response = None
        try:
            response = await self._answer(request)
        finally:
            if not getattr(response, "streaming", False):
                # The body of a stream is sent later, in the task of the request.
                answered.set(outer)
        return response

    async def _answer(self, request: HttpRequest) -> HttpResponseBase:
        session = new_session(None, {"autocommit": not settings.ATOMIC_REQUESTS}, request)
        setattr(request, settings.REQUEST_ATTRIBUTE, session)
        async with RequestScope(session) as scope:
            setattr(request, _SCOPE, scope)
            response = await self.get_response(request)
            if getattr(response, "exception", False):
                # What Django REST framework makes of an exception; under Django's own
                # ATOMIC_REQUESTS it rolls back as well.
                scope.fail()
            scope.keep_for(response)
        return response

    def process_exception(self, request: HttpRequest, exception: Exception) -> None:
        """Note what was raised, by the rendering of a template response for example."""
        rollback_request(request)


def places() -> list[int]:
    """Where in MIDDLEWARE this one is, or one that derives from it."""
    name = f"{AsyncSessionMiddleware.__module__}.{AsyncSessionMiddleware.__qualname__}"
    return [
        place
        for place, listed in enumerate(django_settings.MIDDLEWARE)
        if listed == name or _is_derived(listed)
    ]


def _is_derived(name: str) -> bool:
    try:
        found = import_string(name)
    except ImportError:
        # Django says so when it loads its middleware.
        return False
    return isinstance(found, type) and issubclass(found, AsyncSessionMiddleware)


def rollback_request(request: Any) -> None:
    """Have the sessions of a request rolled back at its end, although it is answered.

    For code that answers an exception itself, where nobody after it sees that something was
    raised: the exception handlers of an API framework. Without the middleware it does nothing.
    """
    if (scope := getattr(request, _SCOPE, None)) is not None:
        scope.fail()


def _on_request_exception(request: HttpRequest | None = None, **kwargs: Any) -> None:
    """What nobody caught and Django answers with status 500, raised by another middleware for
    example."""
    rollback_request(request)


got_request_exception.connect(_on_request_exception, dispatch_uid="django_asyncsession")


def _loading_handler(frame: FrameType | None) -> BaseHandler | None:
    """The handler that is loading its middleware, found up the stack: Django does not tell a
    middleware."""
    while frame is not None:
        # Not by the function's code: error trackers put one of their own around `load_middleware`.
        if isinstance(handler := frame.f_locals.get("self"), BaseHandler):
            return handler
        frame = frame.f_back
    return None


def _check_client(handler: BaseHandler | None) -> None:
    """Refuse Django's sync test client in an async test, where asgiref would only say that nothing
    can be awaited.

    Raises:
        SyncContextError: it is used there.
    """
    if (
        f"{type(handler).__module__}.{type(handler).__name__}" == "django.test.client.ClientHandler"
        and asyncio._get_running_loop() is not None
        and not in_bridge()
    ):
        raise SyncContextError(
            "the sync test client is used in async code; write `await self.async_client.get(...)` "
            "instead of `self.client.get(...)`, or use AsyncClient()"
        )


def _watch_views(handler: BaseHandler | None) -> None:
    """Learn what views raise, where Django's own ATOMIC_REQUESTS does: at the view itself.

    `process_exception` comes too late, because another middleware may answer the exception before.
    """
    if handler is None:
        return
    make_view_atomic = handler.make_view_atomic

    def watched(view: Callable[..., Any]) -> Callable[..., Any]:
        return _watched(make_view_atomic(view))

    handler.make_view_atomic = watched  # type: ignore[method-assign]


def _watched(view: Callable[..., Any]) -> Callable[..., Any]:
    if not iscoroutinefunction(view):
        return _refusing(view)

    @wraps(view)
    async def watched(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        try:
            return await view(request, *args, **kwargs)
        except BaseException:
            rollback_request(request)
            raise

    return watched


def _refusing(view: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(view)
    def refusing(request: HttpRequest, *args: Any, **kwargs: Any) -> Any:
        if hasattr(request, _SCOPE):
            setattr(request, settings.REQUEST_ATTRIBUTE, RefusedSession(SYNC_VIEW))
        try:
            return view(request, *args, **kwargs)
        except BaseException:
            rollback_request(request)
            raise

    return refusing
