"""What is left to do on the server for a connection that was closed in the middle of something."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Generator
from typing import Any

import psycopg
from psycopg import generators, waiting

# Seconds that libpq gets to deliver a cancel request; the pool's own deadline is what counts.
CANCEL_TIMEOUT = 10.0


class Farewell:
    """Cancels what the server still runs for a closed connection, and waits until its process is
    gone.

    Can be awaited again when it was cancelled; forgotten, it closes its copy of the socket.
    """

    def __init__(self, cancel: Any, sock: socket.socket) -> None:
        self._cancel, self._socket = cancel, sock
        self._cancel_started = False
        # A process that was told may be held up, and goes on with the statement before it ends.
        self._may_run = cancel is not None

    @property
    def is_untold(self) -> bool:
        """Whether the server may still run the statement, or go on with it."""
        return self._may_run

    def __await__(self) -> Generator[Any, Any, None]:
        return self._say().__await__()

    async def _say(self) -> None:
        if self._cancel is not None:
            with contextlib.suppress(psycopg.Error):
                if not self._cancel_started:
                    self._cancel_started = True
                    self._cancel.start()
                await waiting.wait_conn_async(
                    generators.cancel(self._cancel), interval=0.1, timeout=CANCEL_TIMEOUT
                )
            self._cancel = None
        # One that was to read more of a statement, of which no more comes, would wait for it.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
        # The server closes its end after its process has left every list of sessions.
        self._socket.setblocking(False)
        with contextlib.suppress(OSError):
            while await asyncio.get_running_loop().sock_recv(self._socket, 65536):
                pass
        self._may_run = False
        self._socket.close()

    def __del__(self) -> None:
        self._socket.close()
