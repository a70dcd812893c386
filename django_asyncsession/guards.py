"""What is said instead of Django's "You cannot call this from an async context": what to use."""

from __future__ import annotations

import sys
from types import CodeType, FrameType

from django.db import transaction

from .exceptions import AsyncSessionError, BlockingCallError
from .orm.snapshots import blocked_access

SYNC_ORM = (
    "sync ORM code in async code would block the event loop; run it with "
    "`await session.run_sync(fn)`, or use Django's async methods, such as aget(), which "
    'ASYNC_SESSION["NATIVE_ORM"] runs in the request\'s session'
)
# What to say of calls of Django that have a counterpart here.
COUNTERPARTS: dict[CodeType, str] = {
    transaction.Atomic.__enter__.__code__: (
        "transaction.atomic() in async code would block the event loop; use "
        "`async with session.atomic():`, or run the whole function with "
        "`await session.run_sync(fn)`"
    ),
    transaction.on_commit.__code__: (
        "transaction.on_commit() in async code would block the event loop; use session.on_commit()"
    ),
}


def explain() -> AsyncSessionError:
    """The error for sync code of Django that is about to block the event loop."""
    return blocked_access() or BlockingCallError(_advice(sys._getframe(1)))


def _advice(frame: FrameType | None) -> str:
    while frame is not None:
        if (text := COUNTERPARTS.get(frame.f_code)) is not None:
            return text
        frame = frame.f_back
    return SYNC_ORM
