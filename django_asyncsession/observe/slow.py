"""Logs statements that took longer than SLOW_QUERY_SECONDS."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, TypeVar

from greenlet import getcurrent

from django_asyncsession.conf import settings
from django_asyncsession.exceptions import ConfigurationError
from django_asyncsession.origins import RequestSite, Site, caller_of, task_name
from django_asyncsession.scanner import normalise

logger = logging.getLogger("django_asyncsession.slow")

T = TypeVar("T")

# The request that is answered in this context.
request: contextvars.ContextVar[RequestSite | None] = contextvars.ContextVar(
    "request", default=None
)


class Watch:
    """What is watched, read from the settings when they change and not at each statement."""

    # Whether anything is.
    is_on = False
    slow_seconds: float | None = None


def follow_settings(setting: str = "ASYNC_SESSION", **kwargs: Any) -> None:
    """Watch what the settings say; called when Django starts and when a test changes them."""
    if setting == "ASYNC_SESSION":
        try:
            Watch.slow_seconds = settings.SLOW_QUERY_SECONDS
            Watch.is_on = not (Watch.slow_seconds is None and settings.LEAK_WARNING_SECONDS is None)
        except ConfigurationError:
            # A system check says so, and so does whatever asks next.
            Watch.is_on, Watch.slow_seconds = False, None


class Timed:
    """A statement, and the time that it has taken so far: sending it, and reading its rows, which
    some drivers let the server make only then. It is logged once, when that is too long.

    Args:
        db: the wrapper, which remembers the statement as its last.
    """

    def __init__(self, db: Any, sql: Any) -> None:
        db.last_statement = sql
        self._db, self._sql = db, sql
        self._seconds = 0.0
        self._is_logged = False

    def run(self, send: Callable[..., T], *args: Any) -> T:
        """Call what sends it, or reads of it, however that ends."""
        started = time.monotonic()
        outcome = "failed after"
        try:
            result = send(*args)
            outcome = "took"
            return result
        except StopIteration:
            outcome = "took"
            raise
        finally:
            self._seconds += time.monotonic() - started
            limit = Watch.slow_seconds
            if limit is not None and self._seconds > limit and not self._is_logged:
                self._is_logged = True
                _log(self._db, self._sql, self._seconds, outcome)

    def each(self, rows: Iterator[T]) -> Iterator[T]:
        """The same rows."""
        try:
            while True:
                yield self.run(next, rows)
        except StopIteration:
            return


def _log(db: Any, sql: Any, seconds: float, outcome: str) -> None:
    text, site, of = shown(db, sql), str(_caller()), request.get()
    logger.warning(
        "a statement on %r %s %.3f s, sent at %s%s: %s",
        db.alias,
        outcome,
        seconds,
        site,
        "" if of is None else f" for {of}",
        text,
        extra={
            "alias": db.alias,
            "seconds": seconds,
            "sql": text,
            "site": str(site),
            "request": of,
        },
    )


def shown(db: Any, sql: Any) -> str:
    """A statement as a log may show it: without its literals, and cut at 2 kB."""
    text = sql if isinstance(sql, str) else sql.as_string(None)
    return normalise(text, db.vendor).encode()[:2048].decode(errors="ignore")


# What ends sessions by itself, with what is said of it: who called it has sent no statement.
ends: dict[CodeType, str] = {}


# Who waits for the tasks that send, where they have no line of the project's in them.
_behind: contextvars.ContextVar[Site | str | None] = contextvars.ContextVar("behind", default=None)


@contextmanager
def for_caller() -> Iterator[None]:
    """Let tasks that are made in the block send for the caller of the block."""
    if not Watch.is_on:
        yield
        return
    outer = _behind.get()
    _behind.set(_caller())
    try:
        yield
    finally:
        # By value: a coroutine may be closed in another context than it began in.
        _behind.set(outer)


def _caller() -> Site | str:
    """The line of the project's that sent the statement: in this greenlet, or in what awaits it."""
    this: Any = getcurrent()
    frame: FrameType | None = sys._getframe(1)
    # Behind it is who runs the event loop, a server for example.
    last = _first_frame()
    while True:
        site = caller_of(frame, ends.keys(), last)
        if isinstance(site, CodeType):
            return ends[site]
        if site is not None:
            return site
        this = this.parent
        if this is None:
            return _behind.get() or f"an unknown line of {task_name()!r}"
        frame = this.gr_frame


def _first_frame() -> FrameType | None:
    """The first of the current task."""
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return None
    return None if task is None else getattr(task.get_coro(), "cr_frame", None)
