"""What it costs that every connection is reset between two sessions.

    python benchmarks/reset.py [alias] [rounds]

Prints, for each kind of session, the median of its time and of the client's own CPU time, in
microseconds: 20 tasks over a pool of 10, each kind in turn. On PostgreSQL also what each statement
of the reset adds to a COMMIT. Run it in two versions of the package by turns to compare them.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

TASKS, CALLS, SINGLE = 20, 15, 1000


def main() -> None:
    """Make a database, measure, drop the database."""
    import django

    alias = sys.argv[1] if len(sys.argv) > 1 else "default"
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 15
    django.setup()
    from django.db import connections
    from django.test.utils import setup_databases, teardown_databases

    databases = setup_databases(0, False, aliases={alias})
    from tests.models import User

    User.objects.using(alias).create(id=10**8, name="one")
    try:
        if connections[alias].vendor == "postgresql":
            statements(connections[alias])
        asyncio.run(measure(alias, rounds))
    finally:
        teardown_databases(databases, 0)


def statements(connection: Any) -> None:
    """Print what each statement of the reset adds to a transaction that did nothing."""
    from django_asyncsession.backends.postgresql.connection import FORGET_PREPARED, RESET

    connection.ensure_connection()
    server = connection.connection.pgconn
    whole = f"{RESET}; {FORGET_PREPARED}"
    times: dict[str, list[float]] = {text: [] for text in ("", whole, *whole.split("; "))}
    for _ in range(7):
        for text, measured in times.items():
            query = f"COMMIT; {text}".encode()
            spent = 0.0
            for _ in range(SINGLE):
                server.exec_(b"BEGIN")
                started = time.perf_counter()
                server.exec_(query)
                spent += time.perf_counter() - started
            measured.append(spent / SINGLE * 1e6)
    alone = statistics.median(times.pop(""))
    print(f"COMMIT alone {alone:5.1f} µs; with it")
    for text, measured in times.items():
        name = "all of the reset" if text == whole else text
        print(f"  {name:45} {statistics.median(measured) - alone:+5.1f} µs")


async def measure(alias: str, rounds: int) -> None:
    """Let the kinds of sessions take turns, and print what came out."""
    from django_asyncsession import databases
    from tests.models import User

    db = databases[alias]

    async def read() -> None:
        async with db.get_session() as session:
            await session.get(User, 10**8)

    async def write() -> None:
        async with db.get_session() as session:
            await session.insert_now(User(name="x"))

    async def five() -> None:
        async with db.get_session() as session:
            for _ in range(5):
                await session.get(User, 10**8)

    async def rolled_back() -> None:
        async with db.get_session() as session:
            await session.get(User, 10**8)
            await session.rollback()

    async def autocommit() -> None:
        async with db.get_session(autocommit=True) as session:
            await session.get(User, 10**8)

    async def raw() -> None:
        async with db.get_session() as session:
            await session.fetch_value("SELECT 1")

    async def setting() -> None:
        async with db.get_session() as session:
            await session.execute("SET LOCAL lock_timeout = 1000" if pg else "SET @x = 1")

    pg = db.vendor == "postgresql"
    kinds = [
        read,
        write,
        five,
        rolled_back,
        autocommit,
        raw,
        *([setting] * (db.vendor != "sqlite")),
    ]
    times: dict[Any, list[tuple[float, float]]] = {kind: [] for kind in kinds}

    async def repeat(kind: Callable[[], Awaitable[None]]) -> None:
        for _ in range(CALLS):
            await kind()

    for turn in range(rounds + 1):
        for kind in kinds:
            wall, cpu = time.perf_counter(), time.process_time()
            await asyncio.gather(*[repeat(kind) for _ in range(TASKS)])
            spent = time.perf_counter() - wall, time.process_time() - cpu
            if turn:
                times[kind].append(spent)
    for kind, measured in times.items():
        wall, cpu = (statistics.median(m[i] for m in measured) / TASKS / CALLS for i in (0, 1))
        print(f"{kind.__name__:12} {wall * 1e6:7.0f} µs   CPU {cpu * 1e6:7.0f} µs")
    await databases.close_all()


if __name__ == "__main__":
    main()
