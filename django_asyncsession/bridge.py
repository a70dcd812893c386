"""Runs sync code in a greenlet, and lets that code await the event loop it was called from.

The idea is the one behind SQLAlchemy's asyncio extension: the sync code runs in a greenlet of the
calling task; when it needs to wait, it switches to the task with an awaitable in hand, and is
switched back with the outcome. No thread, no second loop, no queue.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import sys
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from typing import Any, NoReturn, ParamSpec, TypeVar, cast

from greenlet import getcurrent, greenlet

from .exceptions import BridgeError

logger = logging.getLogger("django_asyncsession.bridge")

P = ParamSpec("P")
T = TypeVar("T")


class Bridge(greenlet):
    """The greenlet that sync code runs in."""

    # Nothing can be awaited for it any more.
    closing = False
    # The connection that the code in it was given, if it was given one.
    wrapper: Any = None
    # How its caller goes on with it, with a value or with an error.
    enter: Callable[..., Any] = greenlet.switch
    fail: Callable[..., Any] = greenlet.throw

    def connection(self, alias: str) -> Any:
        """What `django.db.connections` answers to the code in this greenlet, where it was given no
        connection; None where that is nobody's business but Django's."""
        return None


def run(fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, T]:
    """Call the sync `fn(*args, **kwargs)` and return its result; `await_` inside it awaits here.

    The code shares the caller's task and context variables. Cancelling the task raises
    `CancelledError` in `fn` at the `await_` it is suspended in. Closing or collecting the suspended
    coroutine unwinds `fn` with `GeneratorExit`, and whatever it would await while it unwinds raises
    `BridgeError`. An exception that the caller handles is the one that is being handled in `fn`
    too.

    Raises:
        Whatever `fn` raises.
    """
    return run_with(None, fn, args, kwargs)


async def run_with(
    wrapper: Any,
    fn: Callable[..., T],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    made_by: Callable[[Callable[..., Any]], Bridge] = Bridge,
) -> T:
    """As `run`; in `fn`, and nowhere else, `wrapper` is the connection of its alias.

    Args:
        wrapper: the connection; None where there is none.
        made_by: makes the greenlet.
    """
    bridge = made_by(call)
    if wrapper is not None:
        bridge.wrapper = wrapper
        outer, wrapper.caller = wrapper.caller, weakref.ref(bridge)
    # The same context object, not a copy: what `fn` sets, the caller sees.
    bridge.gr_context = getcurrent().gr_context
    thread = threading.get_ident()
    try:
        outcome = bridge.enter(fn, args, kwargs or {}, sys.exception())
        while not bridge.dead:
            try:
                value = await outcome.pop()
            except GeneratorExit:
                bridge.closing = True
                # In another thread (garbage collection runs anywhere) a greenlet cannot be
                # switched to: greenlet itself ends it in its own thread, and the lease's finalizer
                # closes the connection.
                if threading.get_ident() == thread:
                    _unwind(bridge)
                raise
            except BaseException as error:
                bridge.parent = getcurrent()
                outcome = bridge.fail(error)
            else:
                # An eager task begins in the greenlet that makes it, and goes on in the loop's.
                bridge.parent = getcurrent()
                outcome = bridge.enter(value)
        return cast(T, outcome)
    finally:
        if wrapper is not None:
            wrapper.caller = outer
        # An exception's traceback keeps this frame, which must not keep the greenlet or its stack.
        del bridge
        outcome = value = None


def call(fn: Callable[..., T], args: Any, kwargs: Any, handled: BaseException | None) -> T | None:
    """Call `fn`; the whole of what runs in the greenlet, which knows of no exception by itself.

    Args:
        handled: the exception that the caller is handling.
    """
    try:
        if handled is None:
            return fn(*args, **kwargs)
        # In the list only: what `fn` raises keeps this frame, and may be the exception itself.
        given, handled = [handled], None
        return _handling(given, fn, args, kwargs)
    except Exception:
        if not cast(Bridge, getcurrent()).closing:
            raise
        # Nobody waits for the outcome any more, and GeneratorExit must not be replaced.
        logger.warning("error ignored in sync code whose run() was closed", exc_info=True)
        return None


def _handling(given: list[BaseException], fn: Callable[..., T], args: Any, kwargs: Any) -> T:
    """Call `fn` as an `except` block calls it that handles the exception in `given`, which is
    emptied."""
    error = given.pop()
    traceback = error.__traceback__
    try:
        raise error
    except BaseException:
        # Python has put this frame in front.
        error.__traceback__ = traceback
        del error, traceback
        return fn(*args, **kwargs)


def _unwind(bridge: Bridge) -> None:
    """End `bridge` with GeneratorExit."""
    bridge.parent = getcurrent()
    with contextlib.suppress(GeneratorExit):
        # Not the caught one: its traceback would hold this frame, and this frame it.
        bridge.fail(GeneratorExit)


def await_(awaitable: Awaitable[T]) -> T:
    """Await `awaitable` in the task that called `run`, and return its result as if it had blocked.

    Raises:
        BridgeError: called outside `run`, or in a `run` that is being closed. The awaitable is
            closed unawaited.
        Whatever the awaitable raises, `CancelledError` included.
    """
    bridge = getcurrent()
    if not isinstance(bridge, Bridge) or bridge.closing:
        _refuse(awaitable)
    # Neither in a local of a suspended frame: its own greenlet would be a cycle, and the garbage
    # collector cannot look into a suspended greenlet, so that an awaitable held there, which leads
    # to the waiting task and so back to the greenlet, would outlive its loop for ever.
    parent: Any = bridge.parent
    box = [awaitable]
    del awaitable, bridge
    handled = sys.exception()
    if handled is None:
        return cast(T, parent.switch(box))
    try:
        return cast(T, parent.switch(box))
    except BaseException as error:
        _chain(error, handled)
        raise
    finally:
        del handled


def _chain(error: BaseException, handled: BaseException) -> None:
    """Put what was being handled at the end of the contexts of an error that was raised elsewhere,
    as Python does for one that is raised here."""
    seen = {id(later) for later in _contexts(handled)}
    for last in _contexts(error):
        if id(last) in seen:
            # Python would have ended the other chain, to make no circle.
            return
    last.__context__ = handled


def _contexts(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__context__


def hand_out(awaitable: Awaitable[T]) -> T:
    """As `await_`, for code that another greenlet runs: an error is raised as it is.

    Raises:
        As `await_`.
    """
    bridge = getcurrent()
    if not isinstance(bridge, Bridge) or bridge.closing:
        _refuse(awaitable)
    parent: Any = bridge.parent
    box = [awaitable]
    del awaitable, bridge
    return cast(T, parent.switch(box))


def _refuse(awaitable: Awaitable[Any]) -> NoReturn:
    discard(awaitable)
    if in_bridge():
        raise BridgeError("nothing can be awaited while the suspended run() is being closed")
    raise BridgeError(
        "await_() called outside bridge.run(); call it from sync code that session.run_sync() runs"
    )


def await_here(awaitable: Awaitable[T]) -> T:
    """As `await_`, but a coroutine runs in the bridge: sync code that it calls can wait as well.

    Raises:
        As `await_`.
    """
    if not inspect.iscoroutine(awaitable) or not in_bridge():
        return await_(awaitable)
    try:
        step = awaitable.send(None)
        while True:
            try:
                value = hand_out(_Step(step))
            except BaseException as error:
                step = awaitable.throw(error)
            else:
                step = awaitable.send(value)
    except StopIteration as end:
        return cast(T, end.value)
    finally:
        # A frame that an exception's traceback keeps must not keep what was awaited.
        step = value = None


class _Step(Awaitable[Any]):
    """Hands what a coroutine waits for on to the event loop as it is."""

    def __init__(self, step: Any) -> None:
        self._step = step

    def __await__(self) -> Generator[Any, Any, Any]:
        return (yield self._step)


def in_bridge() -> bool:
    """True in sync code that `run` called, where `await_` works."""
    return isinstance(getcurrent(), Bridge)


def get_running_loop() -> asyncio.AbstractEventLoop:
    """Like asyncio's, but "no running event loop" in the bridge, where sync code may call what
    Django guards.

    Raises:
        RuntimeError: in the bridge, or when there is no running event loop.
        Exception: what `explain` of `answer_async_guards` knows better.
    """
    if isinstance(getcurrent(), Bridge):
        raise RuntimeError("no running event loop")
    loop = asyncio.get_running_loop()
    if "DJANGO_ALLOW_ASYNC_UNSAFE" not in os.environ and (error := _explain()) is not None:
        raise error
    return loop


_explain: Callable[[], Exception | None] = lambda: None  # noqa: E731


def answer_async_guards(explain: Callable[[], Exception | None]) -> None:
    """Let Django's `@async_unsafe` ask `get_running_loop` above: the one name of Django's that is
    replaced.

    Args:
        explain: asked for a better error, when the guard is about to refuse a call.
    """
    global _explain
    _explain = explain
    import django.utils.asyncio

    django.utils.asyncio.get_running_loop = get_running_loop  # type: ignore[attr-defined]


def discard(awaitable: Awaitable[Any] | None) -> None:
    """Close what will not be awaited, so that Python does not warn of a coroutine never awaited."""
    if inspect.iscoroutine(awaitable):
        awaitable.close()
    elif isinstance(awaitable, asyncio.Future):
        awaitable.cancel()
