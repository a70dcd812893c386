"""Logs sessions that hold their connection longer than LEAK_WARNING_SECONDS."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
import weakref
from collections.abc import Iterator
from typing import Any

from django_asyncsession.pool import Lease, Pool

from .statements import shown

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
    task = None if lease.holder is None else lease.holder()
    stack = [] if task is None else list(suspended_at(task))
    logger.warning(
        "a session of %r made at %s holds its connection for %.1f s, in task %r, which %s; last "
        "statement: %s",
        alias,
        lease.made_at,
        seconds,
        lease.task,
        f"waits at {' > '.join(stack)}" if stack else "has ended",
        text,
        extra={"alias": alias, "seconds": seconds, "sql": text, "site": str(lease.made_at)},
    )


def suspended_at(task: asyncio.Task[Any]) -> Iterator[str]:
    """The lines at which the coroutines of a task wait, the outermost first.

    `Task.get_stack` has the outermost only.
    """
    awaited: Any = None if task.done() else task.get_coro()
    while awaited is not None:
        kind = next((k for k in ("cr", "gi", "ag") if hasattr(awaited, f"{k}_frame")), None)
        frame = getattr(awaited, f"{kind}_frame", None)
        if frame is None:
            return
        yield f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
        awaited = getattr(awaited, "gi_yieldfrom" if kind == "gi" else f"{kind}_await")
