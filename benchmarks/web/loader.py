"""Loads a server from a process of its own: connections that are kept, one request at a time on
each.

    python -m benchmarks.web.loader PORT PATH CONNECTIONS SECONDS

Prints requests per second. Every answer must be as long as the first one, and have its content.
"""

from __future__ import annotations

import asyncio
import re
import socket
import sys
import time
from typing import Any

HOST = "127.0.0.1"


class WrongAnswer(Exception):
    """An answer was not the one that was expected, or the connection was closed."""


def request(path: str) -> bytes:
    """A GET of this path, on a connection that is kept."""
    return f"GET {path} HTTP/1.1\r\nHost: {HOST}\r\nAccept: */*\r\n\r\n".encode()


def ask(port: int, path: str, timeout: float = 10.0) -> tuple[bytes, bytes]:
    """One answer: all that came, and its content.

    Raises:
        WrongAnswer: it is not 200, or ends too early.
        OSError: there is no server, or it does not answer.
    """
    with socket.create_connection((HOST, port), timeout=timeout) as connection:
        connection.sendall(request(path))
        answer = b""
        while (content := whole_content(answer)) is None:
            part = connection.recv(65_536)
            if not part:
                raise WrongAnswer(answer[:500].decode(errors="replace"))
            answer += part
        return answer, content


def whole_content(answer: bytes) -> bytes | None:
    """The content of an answer, which has a length or comes in chunks; None while it is not whole.

    Raises:
        WrongAnswer: it is not 200.
    """
    head, separator, body = answer.partition(b"\r\n\r\n")
    if not separator:
        return None
    if not head.startswith(b"HTTP/1.1 200"):
        raise WrongAnswer(answer[:500].decode(errors="replace"))
    if length := re.search(rb"(?im)^content-length: *(\d+)", head):
        return body if len(body) >= int(length[1]) else None
    if not body.endswith(b"\r\n0\r\n\r\n"):
        return None
    content = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        content, body = content + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return content


class Connection(asyncio.Protocol):
    """Sends the next request when the answer to the last one is there."""

    transport: Any

    def __init__(self, path: str, answer: bytes) -> None:
        self.request, self.length = request(path), len(answer)
        # Behind the headers, of which one has the time.
        self.body = answer.partition(b"\r\n\r\n")[2]
        self.answers = 0
        self.received: list[bytes] = []
        self.missing = self.length
        self.error: str | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the first request."""
        self.transport = transport
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        """Take a part of an answer."""
        self.received.append(data)
        self.missing -= len(data)
        if self.missing > 0:
            return
        answer = b"".join(self.received)
        if self.missing or answer[9:12] != b"200" or not answer.endswith(self.body):
            self.error = answer[:200].decode(errors="replace")
            self.transport.close()
            return
        self.answers += 1
        self.received, self.missing = [], self.length
        self.transport.write(self.request)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody closes it while time is taken."""
        self.error = self.error or f"the connection was closed: {exc}"


async def load(port: int, path: str, connections: int, seconds: float) -> float:
    """Requests per second.

    Raises:
        WrongAnswer: an answer was not like the first one.
    """
    answer, _ = ask(port, path)
    loop = asyncio.get_running_loop()
    opened = []
    started = time.perf_counter()
    for _ in range(connections):
        _, protocol = await loop.create_connection(lambda: Connection(path, answer), HOST, port)
        opened.append(protocol)
    await asyncio.sleep(seconds)
    spent, answers = time.perf_counter() - started, sum(each.answers for each in opened)
    errors = [each.error for each in opened if each.error]
    for each in opened:
        each.transport.abort()
    if errors:
        raise WrongAnswer(errors[0])
    return answers / spent


def main(arguments: list[str]) -> None:
    """Load, and print."""
    port, path, connections, seconds = arguments
    try:
        import uvloop

        factory = uvloop.new_event_loop
    except ImportError:
        factory = None
    with asyncio.Runner(loop_factory=factory) as runner:
        print(runner.run(load(int(port), path, int(connections), float(seconds))))


if __name__ == "__main__":
    main(sys.argv[1:])
