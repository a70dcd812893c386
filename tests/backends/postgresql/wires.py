"""What the tests of the wire share: a leased connection, and how a test runs in another loop."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest

from django_asyncsession import DatabaseInterface, bridge
from django_asyncsession.backends.base import BridgedMixin
from django_asyncsession.backends.options import TransactionState
from django_asyncsession.backends.postgresql.connection import Connection
from django_asyncsession.backends.postgresql.wire import Wire
from django_asyncsession.pool.lease import Lease
from tests.postgres import ask, dsn_of_tests, gone, new_name

PID = b"SELECT pg_backend_pid()"
ONE = b"SELECT 1 + $1::int"


class Leased:
    """A leased connection, with what is above and below it."""

    def __init__(self, db: DatabaseInterface, lease: Lease[BridgedMixin]) -> None:
        self.db, self.lease = db, lease
        self.wrapper: Any = lease.connection
        self.connection: Connection = self.wrapper.connection
        wire = self.connection.wire
        assert wire is not None
        self.wire: Wire = wire

    async def get(self, sql: bytes, *values: bytes | None, **options: Any) -> Any:
        """The first value of the first row."""
        [[value], *_] = self.wire.rows(await self.wire.execute(sql, values, **options))
        return value

    async def slowly(self, sql: str) -> Any:
        """What Django's own cursor gets."""

        def run() -> Any:
            with self.wrapper.cursor() as cursor:
                cursor.execute(sql)
                return cursor.fetchall() if cursor.description else None

        return await bridge.run_with(self.wrapper, run)

    @property
    def state(self) -> TransactionState:
        return self.wrapper.transaction_state


@asynccontextmanager
async def leased(name: str | None = None, **parameters: Any) -> AsyncIterator[Leased]:
    """A connection of a pool of its own; in the end the server has let go of it."""
    name = name or new_name()
    parameters = {"pool_max_size": 1, "application_name": name, **parameters}
    db = DatabaseInterface.from_dsn(dsn_of_tests(**parameters), alias="own")
    lease = await db.acquire()
    try:
        yield Leased(db, lease)
    finally:
        lease.release(usable=False)
        await db.close()
    assert await gone(name)


def count_of(table: str) -> int:
    [[count]] = ask(f"SELECT count(*) FROM {table}")
    return int(count)


def promises(tests: dict[str, Any]) -> Iterator[Any]:
    """The tests of a module, with each of their parameters."""
    for name, test in list(tests.items()):
        if not name.startswith("test_") or not inspect.iscoroutinefunction(test):
            continue
        given: list[dict[str, Any]] = [{}]
        for mark in getattr(test, "pytestmark", []):
            given = [{**g, mark.args[0]: value} for g in given for value in mark.args[1]]
        for parameters in given:
            label = "-".join([name.removeprefix("test_"), *map(str, parameters.values())])
            yield pytest.param(partial(test, **parameters), id=label)


def run_with_uvloop(promise: Callable[..., Any], **fixtures: Any) -> None:
    """Run a test in uvloop's loop, with a connection of its own if it wants one."""
    uvloop = pytest.importorskip("uvloop")
    wanted = inspect.signature(promise).parameters

    async def run() -> None:
        async with AsyncExitStack() as stack:
            if "own" in wanted:
                fixtures["own"] = await stack.enter_async_context(leased())
            await promise(**{name: fixtures[name] for name in wanted if name in fixtures})

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(run())
