"""Django's async ORM as it comes, in threads: `django`, a thread and a connection of Django's
pool for each task, as for each request under ASGI; `django_one`, one thread for all, as in a
script. A transaction is one sync function in the thread; statements are not prepared, Django's
default."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.db import connections

from benchmarks.competitors.base import Client, Competitor
from benchmarks.competitors.django_code import AsyncCode, SyncCode

ALIAS = "threads"


class DjangoThreads(Competitor):
    """A thread for each task."""

    name = "django"
    title = "Django's async ORM"
    needs = ("psycopg_pool",)
    pool = "django"

    async def close(self) -> None:
        await sync_to_async(_close)()
        connections[ALIAS].close_pool()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with ThreadSensitiveContext():
            try:
                yield DjangoClient()
            finally:
                # What Django does when a request has ended.
                await sync_to_async(_close)()


def _close() -> None:
    """Give the thread's connection back to the pool."""
    connections[ALIAS].close()


class DjangoOneThread(DjangoThreads):
    """One thread for all tasks."""

    name = "django_one"
    title = "Django's async ORM, one thread"

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        yield DjangoClient()


class DjangoClient(AsyncCode):
    """What has no async method is a sync function in the thread."""

    def __init__(self) -> None:
        super().__init__(ALIAS)
        code = SyncCode(ALIAS)
        self._raw: Any = sync_to_async(code.raw)
        self._transaction: Any = sync_to_async(code.transaction)

    async def raw(self, number: int) -> Any:
        return await self._raw(number)

    async def transaction(self, number: int) -> Any:
        return await self._transaction(number)
