"""One holder's right to one connection of a pool."""

from __future__ import annotations

import asyncio
import dataclasses
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from django_asyncsession.origins import (
    Site,
    creation_site,
    task_reference,
)

C = TypeVar("C")


class Lease(Generic[C]):
    """One holder's right to one connection; `release` ends it, and so does being forgotten."""

    released = True
    # While somebody wants to know: called, they give the task that took it, and the one that made
    # the session, which may have others work for it. Neither is kept alive.
    holder: Callable[[], asyncio.Task[Any] | None] | None = None
    maker: Callable[[], asyncio.Task[Any] | None] | None = None

    def __init__(self, pool: Any, entry: _Entry[C]) -> None:
        self._pool, self._entry = pool, entry
        self.connection: C = entry.connection
        self.since = time.monotonic()
        # What the connection may know of its lease; the lease itself would be a cycle.
        self.token = object()
        self.site: Site = creation_site()
        self.made_at: Site | str = self.site
        holder = asyncio.current_task()
        self.task = "no task" if holder is None else holder.get_name()
        if pool.notes_holders:
            self.holder = task_reference()
        pool._leases.add(self)
        self.released = False

    def release(self, *, usable: bool = True, lost: bool = False) -> None:
        """Give the connection back; when it is not `usable` it is closed. A second call does
        nothing.

        Args:
            lost: the server closed it, or did not answer, so the idle ones are asked whether they
                still work.
        """
        if not self.released:
            self.released = True
            self._pool._take_back(self, usable, lost)

    def __del__(self) -> None:
        if self.released or sys.is_finalizing():
            return
        self.released = True
        try:
            warnings.warn(
                f"a connection of {self._pool.name!r} was never given back; it was taken at "
                f"{self.site}",
                ResourceWarning,
                stacklevel=2,
            )
        finally:  # warnings may be errors
            self._pool._take_back_from_anywhere(self._entry)


@dataclasses.dataclass(slots=True, eq=False)
class _Entry(Generic[C]):
    """A connection of the pool, with when it expires and since when it is idle (seconds of the
    monotonic clock)."""

    connection: C
    expires: float
    idle_since: float = 0.0
