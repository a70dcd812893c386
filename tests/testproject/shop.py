"""What the tests of the shop share: looks into its database and its forms, its server's port."""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import time
from contextlib import closing, suppress
from typing import Any

from django.db import connections

MAX_SIZE = 8


async def read(fn: Any, *args: Any) -> Any:
    """Look into the database from a thread."""
    return await asyncio.to_thread(lambda: closing_connections(fn, *args))


def closing_connections(fn: Any, *args: Any) -> Any:
    try:
        return fn(*args)
    finally:
        connections.close_all()


def form_data(page: str, **fields: str) -> dict[str, str]:
    """What a browser sends for the form on this page."""
    token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page)
    data = {"name": "Clara", "email": "clara@example.com", "quantity": "1", "note": "a present"}
    return {**data, "csrfmiddlewaretoken": token[1] if token else "", **fields}


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def answers(port: int, process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 30
    while True:
        assert process.poll() is None, "uvicorn has ended"
        assert time.monotonic() < end, "uvicorn does not answer"
        with suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.1)
