"""Logs sessions that hold their connection longer than LEAK_WARNING_SECONDS."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import inspect
import logging
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Iterator
from types import FrameType
from typing import Any

from django_asyncsession import bridge
from django_asyncsession.origins import is_ours, made
from django_asyncsession.pool.lease import Lease
from django_asyncsession.pool.pool import Pool

from .slow import shown

logger = logging.getLogger("django_asyncsession.leaks")


def watch(pool: Pool[Any], seconds: float) -> None:
    """Look after the leases of a pool, with one timer for all, which keeps neither alive.

    Args:
        seconds: that a connection may be held.
    """
    pool.notes_holders = True
    known: weakref.WeakSet[Lease[Any]] = weakref.WeakSet()
    _look(weakref.ref(pool), seconds, known)


def _look(
    reference: weakref.ref[Pool[Any]], seconds: float, known: weakref.WeakSet[Lease[Any]]
) -> None:
    pool = reference()
    if pool is None or pool.closed:
        return
    now = time.monotonic()
    for lease in pool.leases:
        if now - lease.since > seconds and lease not in known:
            known.add(lease)
            _log(pool.name, lease, now - lease.since)
    asyncio.get_running_loop().call_later(
        max(0.01, seconds / 4), _look, reference, seconds, known, context=contextvars.Context()
    )


def _log(alias: str, lease: Lease[Any], seconds: float) -> None:
    sql = getattr(lease.connection, "last_statement", None)
    text = "none" if sql is None else shown(lease.connection, sql)
    where = _where(lease.holder, lease.connection)
    if where == ENDED and (waits := _where(lease.maker, lease.connection)) != ENDED:
        where += f"; the task that made it {waits}"
    logger.warning(
        "a session of %r %s holds its connection for %.1f s, in task %r, which %s; last "
        "statement: %s",
        alias,
        made(lease.made_at),
        seconds,
        lease.task,
        where,
        text,
        extra={"alias": alias, "seconds": seconds, "sql": text, "site": str(lease.made_at)},
    )


ENDED = "has ended"


def _where(reference: Callable[[], asyncio.Task[Any] | None] | None, wrapper: Any) -> str:
    """Where a task waits, in words."""
    task = None if reference is None else reference()
    stack = [] if task is None else list(suspended_at(task, wrapper))
    return f"waits at {' > '.join(stack)}" if stack else ENDED


def suspended_at(task: asyncio.Task[Any], wrapper: Any = None) -> Iterator[str]:
    """The lines at which a task waits, the outermost first: in its coroutines, in generators that
    they wait for, and in sync code that they run.

    `Task.get_stack` has the outermost only.

    Args:
        wrapper: the connection, which knows the sync code that uses it.
    """
    awaited: Any = None if task.done() else task.get_coro()
    while awaited is not None:
        if inspect.isasyncgen(generator := _generator_of(awaited)):
            awaited = generator
        kind = next((k for k in ("cr", "gi", "ag") if hasattr(awaited, f"{k}_frame")), None)
        frame = getattr(awaited, f"{kind}_frame", None)
        if frame is None:
            return
        yield from _shown(frame)
        if frame.f_code is bridge.run_with.__code__:
            yield from _sync_frames(awaited, wrapper)
        awaited = getattr(awaited, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")


def _generator_of(awaited: Any) -> Any:
    """The async generator whose next value is awaited, which Python tells by its garbage collector
    only."""
    if type(awaited) not in STEPS:
        return None
    return next(filter(inspect.isasyncgen, gc.get_referents(awaited)), None)


def _sync_frames(running: Any, wrapper: Any) -> Iterator[str]:
    """The lines of the sync code that this coroutine of `bridge.run_with` runs.

    Its own variables are not looked at by `f_locals`, which would keep what it keeps.
    """
    found = next((r for r in gc.get_referents(running) if isinstance(r, bridge.Bridge)), None)
    serving = getattr(wrapper, "caller", None)
    below: Any = None if serving is None else serving()
    greenlets: list[bridge.Bridge] = []
    while isinstance(below, bridge.Bridge):
        greenlets.insert(0, below)
        below = below.parent
    if found not in greenlets:
        greenlets = [] if found is None else [found]
    for each in greenlets:
        frames: list[FrameType] = []
        frame = each.gr_frame
        while frame is not None:
            frames.insert(0, frame)
            frame = frame.f_back
        for frame in frames:
            yield from _shown(frame)


def _shown(frame: FrameType) -> Iterator[str]:
    if not is_ours(frame.f_code):
        yield f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


async def _one() -> AsyncGenerator[None, None]:
    yield


def _steps() -> frozenset[type]:
    some = _one()
    steps: list[Any] = [some.__anext__(), some.aclose()]
    for step in steps:
        # Python warns of one that is neither awaited nor closed.
        step.close()
    return frozenset(map(type, steps))


# What awaits the next value of an async generator: `async for`, `asend`, `aclose`.
STEPS = _steps()
