"""Requests to a handler, message by message, as a server sends them."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

UPLOAD = (
    b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n1\r\n'
    b'--b\r\nContent-Disposition: form-data; name="f"; filename="f.txt"\r\n\r\nfile\r\n--b--\r\n'
)
MULTIPART = [
    *[(b"host", b"x"), (b"content-length", str(len(UPLOAD)).encode())],
    (b"content-type", b"multipart/form-data; boundary=b"),
]
FORM = [(b"host", b"x"), (b"content-type", b"application/x-www-form-urlencoded")]
# Whether a thread is used by ours, and the request.
REQUESTS: dict[str, tuple[bool, str, dict[str, Any]]] = {
    "plain": (False, "/plain/?a=1", {}),
    "HEAD": (False, "/plain/", {"method": "HEAD"}),
    "below a prefix": (False, "/app/plain/", {"root_path": "/app"}),
    "large": (False, "/large/", {}),
    "redirect": (False, "/elsewhere/", {}),
    "async body": (False, "/parts/", {}),
    "small body": (False, "/echo/", {"method": "POST", "body": (b"small",)}),
    "no body": (False, "/echo/", {"method": "POST"}),
    "form": (False, "/form/", {"method": "POST", "body": (b"a=1&b=2",), "headers": FORM}),
    "chunked body": (False, "/echo/", {"method": "POST", "body": (b"a", b"b", b"c")}),
    "huge body": (False, "/echo/", {"method": "POST", "body": (b"x" * 3_000_000,)}),
    "upload": (True, "/form/", {"method": "POST", "body": (UPLOAD,), "headers": MULTIPART}),
    "not found": (True, "/nowhere/", {}),
    "broken": (True, "/broken/", {}),
    "template": (True, "/template/", {}),
    "not decodable": (False, "/plain/", {"query_string": b"\xff"}),
    "closers": (True, "/closers/", {}),
    "own close": (True, "/own_close/", {}),
    "sync view": (True, "/sync/", {}),
    "thread": (True, "/uses_thread/", {}),
}


class Exchange:
    """One request: what the server has sent for it, and got, and the task that answers it.

    Args:
        application: the handler.
        url: its path and query.
        body: what the client sends, in messages.
        more: what of the scope is different.
    """

    def __init__(
        self, application: Any, url: str, body: tuple[bytes, ...] = (b"",), **more: Any
    ) -> None:
        place, _, query = url.partition("?")
        self.scope = {
            **{"type": "http", "http_version": "1.1", "method": "GET", "path": place},
            **{"query_string": query.encode(), "headers": [(b"host", b"x")], **more},
        }
        self.incoming: asyncio.Queue[Any] = asyncio.Queue()
        for number, part in enumerate(body, start=1):
            self.say("http.request", body=part, more_body=number < len(body))
        self.sent: list[Any] = []
        self.received = 0
        # How often the application receives at the moment, and did when it returned.
        self.receiving, self.left = 0, 0
        self.task: asyncio.Task[None] = asyncio.get_running_loop().create_task(
            self.run(application), context=contextvars.Context()
        )

    async def run(self, application: Any) -> None:
        try:
            await application(self.scope, self.receive, self.send)
        finally:
            self.left = self.receiving

    def say(self, kind: str, **more: Any) -> None:
        self.incoming.put_nowait({"type": kind, **more})

    def leave(self) -> None:
        self.say("http.disconnect")

    async def receive(self) -> Any:
        self.received += 1
        self.receiving += 1
        try:
            return await self.incoming.get()
        finally:
            self.receiving -= 1

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def end(self) -> list[Any]:
        async with asyncio.timeout(10):
            await self.task
        return self.sent


async def answer(application: Any, url: str, body: tuple[bytes, ...] = (b"",), **more: Any) -> Any:
    """The messages of a whole answer."""
    return await Exchange(application, url, body, **more).end()


def text(messages: list[Any]) -> bytes:
    return b"".join(message.get("body", b"") for message in messages)


def scripted(*messages: Any) -> tuple[Any, list[Any]]:
    """A `receive` that gives these messages, and a `send` that notes what it gets."""
    given, sent = iter(messages), []

    async def receive() -> Any:
        return next(given)

    async def send(message: Any) -> None:
        sent.append(message)

    return (receive, send), sent


async def answer_here(application: Any) -> None:
    """Answer a request in the context of the caller, which a server does not do."""
    scope = {"type": "http", "method": "GET", "path": "/plain/", "headers": [(b"host", b"x")]}
    server, sent = scripted({"type": "http.request"})
    await application(scope, *server)
    assert sent[0]["status"] == 200
