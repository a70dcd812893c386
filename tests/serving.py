"""An application of one view, which runs the SQL that it is given for a long time on the alias that
it is given; for tests that end its server."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from typing import Any

import django
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
django.setup()

from django.conf import settings  # noqa: E402
from django.core.handlers.asgi import ASGIHandler  # noqa: E402

from django_asyncsession.asgi import get_asgi_application  # noqa: E402

settings.ROOT_URLCONF = __name__
settings.ALLOWED_HOSTS = ["*"]
settings.ASYNC_SESSION = {
    "ALIAS": os.environ.get("SERVED_ALIAS", "default"),
    "STREAM_TIMEOUT": float(os.environ.get("SERVED_STREAM_TIMEOUT", "60")),
}
INSERT = "INSERT INTO tests_user (name, level) VALUES (%s, 1)"


async def run(request: Any) -> HttpResponse:
    """Run the statement of the query string."""
    await request.db_session.execute(request.GET["sql"])
    return HttpResponse("done")


async def stream(request: Any) -> StreamingHttpResponse:
    """Write a row, and send a long body that reads on from the database."""
    session = request.db_session

    async def parts() -> AsyncIterator[bytes]:
        await session.execute(INSERT, ["streamed"])
        for _ in range(4000):
            yield b"x" * 100_000

    return StreamingHttpResponse(parts())


async def leave(request: Any) -> HttpResponse:
    """Write a row, leave a stream unread for too long, and answer."""
    session = request.db_session
    await session.execute(INSERT, ["left"])
    rows = session.stream("SELECT name FROM tests_user", chunk_size=1)
    await anext(rows)
    while not session.closed:
        await asyncio.sleep(0.01)
    return HttpResponse("saved")


def alive(request: HttpRequest) -> HttpResponse:
    """Answer."""
    return HttpResponse("alive")


urlpatterns = [
    path("run", run),
    path("stream", stream),
    path("leave", leave),
    path("alive", alive),
]
django_application = ASGIHandler()
own_application = get_asgi_application()


async def application(scope: Any, receive: Any, send: Any) -> None:
    """Django's handler."""
    await django_application(scope, receive, send)


async def with_lifespan(scope: Any, receive: Any, send: Any) -> None:
    """The same, with an answer to the events of the server's life."""
    if scope["type"] != "lifespan":
        await django_application(scope, receive, send)
        return
    for event in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{event}.complete"})
