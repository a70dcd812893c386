"""This package with unmodified Django code: `native`, Django's async methods in native mode, and
`run_sync`, sync code in `session.run_sync`; a session in autocommit for each task, a transaction
where the work is one. Native mode is on while it is measured only."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from benchmarks.competitors.base import Client
from benchmarks.competitors.django_code import AsyncCode, SyncCode
from benchmarks.competitors.session import PackageCompetitor
from benchmarks.competitors.texts import PSYCOPG as SQL
from benchmarks.rows import book_key
from django_asyncsession import Session, databases, native


class Native(PackageCompetitor):
    """Django's async methods in native mode."""

    name = "native"
    title = "native mode, Django's code"

    def enter(self) -> None:
        native.install()

    def leave(self) -> None:
        native.uninstall()

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with (
            databases["default"].get_session(autocommit=True) as session,
            native.use(session),
        ):
            yield NativeClient(session)


class NativeClient(AsyncCode):
    """Raw SQL is the session's: Django has no async way."""

    def __init__(self, session: Session) -> None:
        super().__init__("default")
        self.session = session

    async def raw(self, number: int) -> Any:
        return await self.session.fetch(SQL.book, [book_key(number)])

    async def transaction(self, number: int) -> Any:
        async with databases["default"].get_session() as session, native.use(session):
            return await self.five(number)


class RunSync(PackageCompetitor):
    """Sync Django code."""

    name = "run_sync"
    title = "run_sync, Django's sync code"

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        async with databases["default"].get_session(autocommit=True) as session:
            yield RunSyncClient(session)


def _in_bridge(name: str) -> Any:
    """The work `name` of the sync code, in the client's session."""

    async def work(self: RunSyncClient, number: int) -> Any:
        return await self.session.run_sync(getattr(self.code, name), number)

    return work


class RunSyncClient(Client):
    """The works of the sync code; `atomic()` is the code's own."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.code = SyncCode("default")

    get = _in_bridge("get")
    raw = _in_bridge("raw")
    count = _in_bridge("count")
    filter = _in_bridge("filter")
    related = _in_bridge("related")
    prefetch = _in_bridge("prefetch")
    values = _in_bridge("values")
    insert = _in_bridge("insert")
    update = _in_bridge("update")
    transaction = _in_bridge("transaction")
    insert_many = _in_bridge("insert_many")
    many = _in_bridge("many")
