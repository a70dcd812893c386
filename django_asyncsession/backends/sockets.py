"""What a socket tells about its other end without being read, and without waiting."""

from __future__ import annotations

import select

# Where the system cannot tell that the other end only closed its half, the end of the whole
# connection is told.
_HUNG_UP = getattr(select, "POLLRDHUP", 0)


def is_quiet(fd: int) -> bool:
    """Whether nothing came, neither data nor the end of the connection."""
    return not _events(fd)


def has_hung_up(fd: int) -> bool:
    """Whether the other end has closed the connection, also if data came before that."""
    return look(fd)[1]


def look(fd: int) -> tuple[bool, bool]:
    """Whether anything came, and whether the other end has closed the connection; as far as the
    system tells them apart."""
    events = ended = _events(fd)
    if hasattr(select, "poll"):
        ended &= _HUNG_UP | select.POLLHUP | select.POLLERR | select.POLLNVAL
    return bool(events), bool(ended)


def _events(fd: int) -> int:
    if not hasattr(select, "poll"):
        # On Windows; a file descriptor there is never too large for it.
        return len(select.select([fd], [], [], 0)[0])
    poll = select.poll()
    poll.register(fd, select.POLLIN | _HUNG_UP)
    ready = poll.poll(0)
    return ready[0][1] if ready else 0
