"""The decorators that inject a session: that of the request, or one for work in the background."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, TypeVar, overload

from django.http import HttpRequest

from .conf import settings
from .exceptions import SyncContextError
from .installed import check_import
from .native.sessions import apart
from .origins import Site
from .scope import RequestScope, new_session, own_thread
from .session.session import Session

F = TypeVar("F", bound=Callable[..., Any])
Call = Callable[..., Awaitable[Any]]


@overload
def inject_session(function: F, /) -> F: ...


@overload
def inject_session(
    *, alias: str | None = None, name: str = "session", **options: Any
) -> Callable[[F], F]: ...


def inject_session(
    function: F | None = None,
    /,
    *,
    alias: str | None = None,
    name: str = "session",
    **options: Any,
) -> F | Callable[[F], F]:
    """Call an async function with a session as the keyword argument `name`.

    In a request that the middleware gave a session, it is that one, unless `alias` or `options`
    ask for another. Else
    the function gets a session of its own: committed at the end, rolled back when it raises, and
    kept open for the
    body of a streaming response. Works on function views, methods of class-based views and of
    Channels consumers, and
    plain coroutine functions. A caller that passes the session itself is left alone.

    Args:
        alias: the database; None is that of the middleware.
        name: name of the argument.
        options: options of the session; see `Session`.

    Raises:
        SyncContextError: the function is not async.
    """

    def decorate(function: F) -> F:
        async def call(*args: Any, **kwargs: Any) -> Any:
            if not options and (session := _session_of_request(args, alias)) is not None:
                return await function(*args, **{**kwargs, name: session})
            own = new_session(alias, options, _request_of(args), Site.of(function))
            async with RequestScope(own) as scope:
                return scope.keep_for(await function(*args, **{**kwargs, name: own}))

        return _injected(function, name, call, "@inject_session")

    return decorate if function is None else decorate(function)


@overload
def background_session(function: F, /) -> F: ...


@overload
def background_session(
    *, alias: str | None = None, name: str = "session", **options: Any
) -> Callable[[F], F]: ...


def background_session(
    function: F | None = None,
    /,
    *,
    alias: str | None = None,
    name: str = "session",
    **options: Any,
) -> F | Callable[[F], F]:
    """Call an async function with a session of its own, whatever the caller has: for tasks that
    outlive a request.

    Made for `asyncio.create_task(function(...))`: the session of the request, which ends with it,
    is neither used nor waited for. The function's session is the keyword argument `name`, if the
    function has such a parameter, and in native mode the current one. It is committed at the end
    and rolled back when the function raises or is cancelled; the error is the task's. A task in
    such a function is kept until it ends, so nobody needs to hold a reference to it. A caller that
    passes the session itself is left alone.

    Args:
        alias: the database; None is that of the middleware.
        name: name of the argument.
        options: options of the session; see `Session`.

    Raises:
        SyncContextError: the function is not async.
    """

    def decorate(function: F) -> F:
        is_wanted = _has_parameter(function, name)

        async def call(*args: Any, **kwargs: Any) -> Any:
            own = new_session(alias, options, site=Site.of(function))
            if is_wanted:
                kwargs[name] = own
            with _kept(), apart(), own_thread():
                async with RequestScope(own):
                    return await function(*args, **kwargs)

        return _injected(function, name, call, "@background_session")

    return decorate if function is None else decorate(function)


def _injected(function: F, name: str, call: Call, decorator: str) -> F:
    if not inspect.iscoroutinefunction(function):
        raise SyncContextError(
            f"{decorator} on {function!r}, which is not async; make it `async def`, "
            "or use Django's ORM there as usual"
        )
    # So that `manage.py check`, which imports the views, says so.
    check_import()

    @wraps(function)
    async def injected(*args: Any, **kwargs: Any) -> Any:
        if name in kwargs:
            return await function(*args, **kwargs)
        return await call(*args, **kwargs)

    # Frameworks that read the signature, to fill it from the request, must not see the session.
    injected.__signature__ = _without(function, name)  # type: ignore[attr-defined]
    return injected  # type: ignore[return-value]


def _session_of_request(args: tuple[Any, ...], alias: str | None) -> Session | None:
    """The session that the middleware gave the request: the first argument, or the second after
    `self`."""
    for candidate in args[:2]:
        session = getattr(candidate, settings.REQUEST_ATTRIBUTE, None)
        if isinstance(session, Session) and session.alias == (alias or session.alias):
            return session
    return None


def _request_of(args: tuple[Any, ...]) -> HttpRequest | None:
    """The request that a view was called with, after `self` if it is a method."""
    return next((given for given in args[:2] if isinstance(given, HttpRequest)), None)


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(function).parameters
    return name in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _without(function: Callable[..., Any], name: str) -> inspect.Signature:
    """The signature without the session, and with annotations that are no strings: whoever reads
    it would look their names up in this module."""
    signature = inspect.signature(function)
    parameters = [
        p.replace(annotation=_evaluated(p.annotation, function))
        for p in signature.parameters.values()
        if p.name != name
    ]
    returned = _evaluated(signature.return_annotation, function)
    return signature.replace(parameters=parameters, return_annotation=returned)


def _evaluated(annotation: Any, function: Callable[..., Any]) -> Any:
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, inspect.unwrap(function).__globals__)
    except Exception:
        # A name that is imported for the type checker only; nobody else could read it either.
        return annotation


# The tasks of functions that run, because the event loop refers to its tasks only weakly.
_running: dict[object, asyncio.Task[Any] | None] = {}


@contextmanager
def _kept() -> Iterator[None]:
    """Keep the current task until the end of the block."""
    for key, task in list(_running.items()):
        if task is not None and task.get_loop().is_closed():
            # Its loop was closed before it could end.
            _running.pop(key, None)
    key = object()
    _running[key] = asyncio.current_task()
    try:
        yield
    finally:
        _running.pop(key, None)
