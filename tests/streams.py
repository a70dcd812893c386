"""A program: streams 200 MB to a reader that is slow, and prints by how many MB the process grew.

    python -m tests.streams ALIAS DATABASE WAY LOOP

WAY is "stream", "aiterator", or "http" (a client that reads slowly from uvicorn); LOOP is "asyncio"
or "uvloop". The database has ROWS users.
"""

from __future__ import annotations

import asyncio
import gc
import os
import sys
from collections.abc import AsyncIterator
from typing import Any

from django.http import HttpRequest, StreamingHttpResponse
from django.urls import path

# How many rows there are, bytes of each, how many are read, and after how many the reader pauses.
ROWS, WIDTH, READ, BREATH = 20_000, 10_000, 500, 50


def wide_rows() -> Any:
    """The query: one row for each user."""
    from django.conf import settings
    from django.db.models import Value
    from django.db.models.functions import Repeat

    from tests.models import User

    users = User.objects.using(settings.ASYNC_SESSION["ALIAS"])
    return users.annotate(wide=Repeat(Value("x"), WIDTH)).values_list("wide", flat=True)


def memory() -> int:
    """MB of memory that the process has."""
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 2**20


async def growth(parts: AsyncIterator[Any]) -> int:
    """MB by which the process has grown when some of it was read slowly."""
    await anext(parts)
    before = memory()
    for number in range(1, READ):
        await anext(parts)
        if number % BREATH == 0:
            await asyncio.sleep(0.1)
    return memory() - before


async def by_stream() -> int:
    """With `session.stream()`."""
    from django.conf import settings

    from django_asyncsession import databases

    async with databases[settings.ASYNC_SESSION["ALIAS"]].get_session() as session:
        return await growth(session.stream(session.select(wide_rows()), chunk_size=BREATH))


async def by_aiterator() -> int:
    """With Django's own method, in native mode."""
    from django_asyncsession import inject_session

    @inject_session
    async def read(session: Any) -> int:
        return await growth(wide_rows().aiterator(chunk_size=BREATH))

    return await read()


async def export(request: HttpRequest) -> StreamingHttpResponse:
    """A view that sends all rows."""
    return StreamingHttpResponse(wide_rows().aiterator(chunk_size=BREATH))


urlpatterns = [path("", export)]


async def by_http() -> int:
    """With a streaming response that a client reads slowly."""
    import uvicorn
    from django.core.asgi import get_asgi_application

    config = uvicorn.Config(get_asgi_application(), port=0, log_level="warning", lifespan="off")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    address = server.servers[0].sockets[0].getsockname()
    reader, writer = await asyncio.open_connection(*address, limit=WIDTH)
    writer.write(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")

    async def received() -> AsyncIterator[bytes]:
        while data := await reader.readexactly(WIDTH):
            yield data

    grown = await growth(received())
    writer.close()
    server.should_exit = True
    await serving
    return grown


def main(alias: str, database: str, way: str, loop: str) -> None:
    """Run it."""
    import django

    from tests import settings

    settings.DATABASES[alias]["NAME"] = database
    settings.ROOT_URLCONF = "tests.streams"
    settings.ASYNC_SESSION = {"ALIAS": alias, "NATIVE_ORM": True}  # type: ignore[attr-defined]
    django.setup()
    ways = {"stream": by_stream, "aiterator": by_aiterator, "http": by_http}
    factory = None
    if loop == "uvloop":
        import uvloop

        factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        print(runner.run(ways[way]()))


if __name__ == "__main__":
    main(*sys.argv[1:])
