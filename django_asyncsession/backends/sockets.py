"""What a socket tells about its other end without being read, and without waiting."""

from __future__ import annotations

import select
from typing import Any

# Where the system cannot tell that the other end only closed its half, the end of the whole
# connection is told.
_HUNG_UP = getattr(select, "POLLRDHUP", 0)


def is_quiet(fd: int) -> bool:
    """Whether nothing came, neither data nor the end of the connection."""
    return not _asked(fd).poll(0)


def has_hung_up(fd: int) -> bool:
    """Whether the other end has closed the connection, also if data came before that."""
    ready = _asked(fd).poll(0)
    return bool(ready and ready[0][1] & _ENDS)


def look(fd: int) -> tuple[bool, bool]:
    """Whether anything came, and whether the other end has closed the connection; as far as the
    system tells them apart."""
    ready = _asked(fd).poll(0)
    return bool(ready), bool(ready and ready[0][1] & _ENDS)


class _Select:
    """What answers as `select.poll` does, on Windows: a file descriptor there is never too large
    for `select`, which does not tell the end from data."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def poll(self, timeout: int) -> list[tuple[int, int]]:
        """What is ready now."""
        return [(self._fd, _ENDS)] if select.select([self._fd], [], [], timeout)[0] else []


if hasattr(select, "poll"):
    _ENDS = _HUNG_UP | select.POLLHUP | select.POLLERR | select.POLLNVAL

    def _asked(fd: int) -> Any:
        poll = select.poll()
        poll.register(fd, select.POLLIN | _HUNG_UP)
        return poll

else:
    _ENDS = 1
    _asked = _Select
