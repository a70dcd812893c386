"""A server with fake connections, and pools of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from django_asyncsession.pool.options import PoolOptions
from django_asyncsession.pool.pool import Pool


class Fake:
    """A connection; it knows whether it was closed."""

    def __init__(self, number: int) -> None:
        self.number, self.open = number, True

    def __repr__(self) -> str:
        return f"<Fake {self.number} {'open' if self.open else 'closed'}>"


class Server:
    """What the fake connections are connections to.

    Attributes:
        error: what connecting raises; a list is used up, one error for each attempt.
        reachable: connecting waits for it.
        lets_go: closing waits for it.
        says_goodbye: there is something to wait for when a connection is closed.
        healthy: what a check answers, or raises.
        quiet: whether nothing came from the server to an idle connection.
        deaf: so many attempts to connect, counted down, are never answered.
    """

    def __init__(self) -> None:
        self.connections: list[Fake] = []
        self.attempts = self.most = self.closings = 0
        self.says_goodbye = True
        self.error: Exception | list[Exception] | None = None
        self.reachable, self.lets_go = asyncio.Event(), asyncio.Event()
        self.reachable.set()
        self.lets_go.set()
        self.healthy: Callable[[Fake], bool] = lambda fake: fake.open
        self.quiet: Callable[[Fake], bool] = lambda fake: True
        self.deaf = self.hung = 0

    @property
    def open(self) -> list[Fake]:
        return [fake for fake in self.connections if fake.open]

    async def connect(self) -> Fake:
        self.attempts += 1
        await asyncio.sleep(0)
        await self.reachable.wait()
        await self._maybe_never()
        error = self.error
        if isinstance(error, list):
            error = error.pop(0) if error else None
        if error is not None:
            raise error
        fake = Fake(len(self.connections))
        self.connections.append(fake)
        self.most = max(self.most, len(self.open))
        return fake

    async def _maybe_never(self) -> None:
        if self.deaf:
            self.deaf -= 1
            self.hung += 1
            try:
                await asyncio.Event().wait()
            finally:
                self.hung -= 1

    async def check(self, fake: Fake) -> bool:
        await asyncio.sleep(0)
        return self.healthy(fake)

    def close(self, fake: Fake) -> Any:
        assert fake.open, "closed twice"
        fake.open = False
        self.closings += 1
        return self.lets_go.wait() if self.says_goodbye else None

    def pool(self, **options: Any) -> Pool[Fake]:
        is_permanent = options.pop("is_permanent", lambda error: isinstance(error, PermissionError))
        return Pool(
            self.connect,
            self.check,
            self.close,
            name="fake",
            options=PoolOptions(**options),
            is_permanent=is_permanent,
            is_quiet=lambda fake: self.quiet(fake),
        )


@asynccontextmanager
async def pool_of(**options: Any) -> AsyncIterator[tuple[Pool[Fake], Server]]:
    """A pool and its server; in the end nothing may be left of it."""
    server = Server()
    pool = server.pool(**options)
    try:
        yield pool, server
    finally:
        server.reachable.set()
        server.lets_go.set()
        await pool.close()
        assert not server.open
        assert server.most <= pool.options.limit
        stats = pool.stats()
        assert (stats["pool_size"], stats["pool_available"], stats["requests_waiting"]) == (0, 0, 0)


async def settled(turns: int = 20) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


async def until(condition: Callable[[], Any], seconds: float = 2) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.001)
