"""Logs statements that took longer than SLOW_QUERY_SECONDS."""

from __future__ import annotations

import contextvars
import logging
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from greenlet import getcurrent

from django_asyncsession.conf import settings
from django_asyncsession.exceptions import ConfigurationError
from django_asyncsession.origins import RequestSite, Site, caller_of
from django_asyncsession.scanner import normalise

logger = logging.getLogger("django_asyncsession.slow")

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


def watched(db: Any, sql: Any, send: Callable[..., Any], *args: Any) -> Any:
    """Send a statement, and log it when it took too long, however it ended.

    Args:
        db: the wrapper, which remembers the statement as its last.
        send: called with `sql` and `args`.
    """
    db.last_statement = sql
    started = time.monotonic()
    outcome = "failed after"
    try:
        result = send(sql, *args)
        outcome = "took"
        return result
    finally:
        limit, seconds = Watch.slow_seconds, time.monotonic() - started
        if limit is not None and seconds > limit:
            _log(db, sql, seconds, outcome)


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


def _caller() -> Site | str:
    """The line of the project's that sent the statement: in this greenlet, or in what awaits it."""
    this: Any = getcurrent()
    frame: FrameType | None = sys._getframe(1)
    while True:
        if (site := caller_of(frame)) is not None:
            return site
        this = this.parent
        if this is None:
            return "an unknown place"
        frame = this.gr_frame
