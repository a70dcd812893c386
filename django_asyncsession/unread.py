"""A limit on how long a stream may be left unread: it keeps a connection and a transaction."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import math
from collections.abc import Callable
from typing import Self

from .conf import settings
from .exceptions import ConfigurationError, StreamTimeout

logger = logging.getLogger("django_asyncsession")

# Looks at whether the reader came back, in the time that it has.
LOOKS = 4


class Unread:
    """Ends a stream whose reader does not come back for STREAM_TIMEOUT seconds, up to a quarter
    more; in effect from `begin` to `end`.

    Whoever hands rows out calls `given` before each and `taken` when another one is asked for.

    Args:
        what: what messages call the stream.
        give_up: starts to end what the stream keeps; called in the event loop, once.
    """

    def __init__(self, what: str, give_up: Callable[[], None]) -> None:
        self._what, self._give_up = what, give_up
        self._is_given = self._is_over = False
        self._count = self._seen = self._looks = 0
        self._seconds: float = 0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> Self:
        """Begin to look after the stream.

        Raises:
            ConfigurationError: STREAM_TIMEOUT is not a number of seconds above 0, or None.
        """
        seconds = settings.STREAM_TIMEOUT
        if seconds is None:
            return self
        if not 0 < seconds < math.inf:
            raise ConfigurationError(
                f'ASYNC_SESSION["STREAM_TIMEOUT"] is {seconds!r}; give seconds above 0, or None'
            )
        self._seconds = seconds
        self._look_later()
        return self

    def end(self) -> None:
        """The stream has ended."""
        if self._timer is not None:
            self._timer.cancel()

    def given(self) -> None:
        """The reader has what was read, and it is up to it to come back."""
        self._is_given = True

    def taken(self) -> None:
        """The reader came back.

        Raises:
            StreamTimeout: too late.
        """
        self._is_given = False
        self._count += 1
        if self._is_over:
            raise StreamTimeout(
                f"{self._what} was not read for {self._seconds} s, so it was ended and its "
                'connection given back; read faster, or raise ASYNC_SESSION["STREAM_TIMEOUT"]'
            )

    def __enter__(self) -> Self:
        return self.begin()

    def __exit__(self, *exc_info: object) -> None:
        self.end()

    def _look_later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(
            self._seconds / LOOKS, self._look, context=contextvars.Context()
        )

    def _look(self) -> None:
        unread = self._is_given and self._count == self._seen
        self._looks = self._looks + 1 if unread else 0
        self._seen = self._count
        if self._looks >= LOOKS:
            self._is_over = True
            logger.warning(
                "%s was left unread for %s s, so it is ended and rolled back",
                self._what,
                self._seconds,
            )
            self._give_up()
        else:
            self._look_later()
