"""The decorator that injects a session into views and other coroutine functions."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, overload

from .conf import settings
from .exceptions import SyncContextError
from .interface import databases
from .scope import RequestScope
from .session import Session

F = TypeVar("F", bound=Callable[..., Any])


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
        return _inject(function, alias, name, options)

    return decorate if function is None else decorate(function)


def _inject(function: F, alias: str | None, name: str, options: dict[str, Any]) -> F:
    if not inspect.iscoroutinefunction(function):
        raise SyncContextError(
            f"@inject_session on {function!r}, which is not async; make it `async def`, "
            "or use Django's ORM there as usual"
        )

    @wraps(function)
    async def injected(*args: Any, **kwargs: Any) -> Any:
        if name in kwargs:
            return await function(*args, **kwargs)
        if not options and (session := _session_of_request(args, alias)) is not None:
            return await function(*args, **{**kwargs, name: session})
        own = databases[alias or settings.ALIAS].get_session(begin_on_use=True, **options)
        async with RequestScope(own) as scope:
            return scope.keep_for(await function(*args, **{**kwargs, name: own}))

    # Frameworks that read the signature, to fill it from the request, must not see the session.
    injected.__signature__ = _without(inspect.signature(function), name)  # type: ignore[attr-defined]
    return injected  # type: ignore[return-value]


def _session_of_request(args: tuple[Any, ...], alias: str | None) -> Session | None:
    """The session that the middleware gave the request: the first argument, or the second after
    `self`."""
    for candidate in args[:2]:
        session = getattr(candidate, settings.REQUEST_ATTRIBUTE, None)
        if isinstance(session, Session) and session.alias == (alias or session.alias):
            return session
    return None


def _without(signature: inspect.Signature, name: str) -> inspect.Signature:
    parameters = [p for p in signature.parameters.values() if p.name != name]
    return signature.replace(parameters=parameters)
