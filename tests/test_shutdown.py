"""A server process that is told to stop: what its requests run in the database ends with it. On
real servers, in a process of its own."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing, suppress
from typing import Any
from urllib.parse import quote

import pytest

from django_asyncsession import DatabaseInterface
from tests.faults import outcome_of
from tests.sessions import soon

RUNNING = {
    "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE query LIKE %s AND state = 'active'"
    " AND pid <> pg_backend_pid()",
    "mysql": "SELECT count(*) FROM information_schema.processlist WHERE info LIKE %s"
    " AND id <> connection_id()",
}
# MariaDB ends a SLEEP by itself when the client is gone, and nothing else.
LONG = {
    "postgresql": "SELECT pg_sleep(60)",
    "mysql": "SELECT BENCHMARK(900000000, SHA2('x', 512))",
}


async def running(db: DatabaseInterface, marker: str) -> int:
    """How many statements with the marker the database runs, for whomever."""
    async with db.get_session(autocommit=True) as session:
        return int(await session.fetch_value(RUNNING[db.vendor], [f"%{marker}%"]))


@asynccontextmanager
async def served(
    alias: str, application: str, *options: str, env: dict[str, str] | None = None
) -> AsyncIterator[tuple[int, subprocess.Popen[bytes]]]:
    """`tests.serving` under uvicorn: its port and process."""
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", f"tests.serving:{application}", *options]
    env = {**os.environ, "SERVED_ALIAS": alias, **(env or {})}
    process = subprocess.Popen([*command, "--port", str(port), "--log-level", "warning"], env=env)
    try:

        async def answers() -> bool:
            assert process.poll() is None, "uvicorn has ended"
            return not isinstance(await outcome_of(get(port, "/alive")), OSError)

        assert await soon(answers, 30)
        yield port, process
    finally:
        process.kill()
        process.wait()


async def get(port: int, path: str) -> bytes:
    """The answer to a request, empty when the connection was closed before."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
        return await reader.read()
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


LIFESPANS = {
    "off": ("application", "off"),
    "not answered": ("application", "auto"),
    "on": ("with_lifespan", "on"),
    "ours": ("own_application", "on"),
}


@pytest.mark.parametrize("lifespan", LIFESPANS)
@pytest.mark.parametrize("told", ["SIGTERM", "SIGINT", "SIGINT twice"])
async def test_statements_of_requests_that_were_cut_end_with_the_server(
    real_database: DatabaseInterface, told: str, lifespan: str
) -> None:
    db = real_database
    if db.vendor == "sqlite":
        pytest.skip("SQLite runs in the process")
    application, mode = LIFESPANS[lifespan]
    # Told twice, uvicorn does not wait for requests at all.
    grace = () if "twice" in told else ("--timeout-graceful-shutdown", "1")
    marker = uuid.uuid4().hex
    async with served(db.alias, application, "--lifespan", mode, *grace) as (port, process):
        sql = quote(f"{LONG[db.vendor]} /* {marker} */")
        requests: list[asyncio.Task[Any]] = [
            asyncio.create_task(outcome_of(get(port, f"/run?sql={sql}"))) for _ in range(3)
        ]

        async def as_many(count: int) -> bool:
            return await running(db, marker) == count

        assert await soon(lambda: as_many(3), 20)
        process.send_signal(getattr(signal, told.split()[0]))
        if "twice" in told:
            await asyncio.sleep(0.5)
            process.send_signal(signal.SIGINT)
        code = await asyncio.to_thread(process.wait, 15)
        assert await soon(lambda: as_many(0), 3), "a statement runs on"
        await asyncio.gather(*requests)
        if told == "SIGTERM":
            assert code == -signal.SIGTERM, "the process does not say how it ended"
