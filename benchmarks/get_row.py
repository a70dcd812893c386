"""Time of one row by primary key: Django's async ORM in threads, this package, Django's sync ORM.

    python benchmarks/get_row.py [rounds]

Prints the median of each in microseconds per call, and its ratio to Django's async ORM, all
measured side by side in
one run: 20 tasks at a time, each in turn for every contestant, on the PostgreSQL of the tests.
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

TASKS, CALLS = 20, 50


def main() -> None:
    """Make a database, measure, drop the database."""
    import django

    django.setup()
    from django.db import connection
    from django.test.utils import setup_databases

    setup_databases(0, False, aliases={"default"})
    from tests.models import User

    User.objects.create(id=1, name="one")
    connection.close()
    try:
        asyncio.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 15))
    finally:
        drop(connection)


def drop(connection: Any) -> None:
    """Drop the database although the threads of Django's async ORM still have connections to it."""
    with connection._nodb_cursor() as cursor:
        name = connection.ops.quote_name(connection.settings_dict["NAME"])
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")


async def measure(rounds: int) -> None:
    """Let the contestants take turns, and print what came out."""
    from django_asyncsession import databases
    from tests.models import User

    db = databases["default"]

    async def in_threads() -> None:
        for _ in range(CALLS):
            await User.objects.aget(pk=1)

    async def in_a_session() -> None:
        async with db.get_session() as session:
            for _ in range(CALLS):
                await session.get(User, 1)

    async def a_session_each() -> None:
        for _ in range(CALLS):
            async with db.get_session() as session:
                await session.get(User, 1)

    async def autocommit() -> None:
        async with db.get_session(autocommit=True) as session:
            for _ in range(CALLS):
                await session.get(User, 1)

    async def raw() -> None:
        async with db.get_session() as session:
            for _ in range(CALLS):
                await session.fetch("SELECT * FROM tests_user WHERE id = %s", [1])

    contestants: dict[str, Callable[[], Awaitable[None]]] = {
        "Django's async ORM (threads)": in_threads,
        "session.get, one session": in_a_session,
        "session.get, a session each": a_session_each,
        "session.get, autocommit": autocommit,
        "session.fetch, raw SQL": raw,
    }
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            started = time.perf_counter()
            await asyncio.gather(*[contestant() for _ in range(TASKS)])
            times[name].append((time.perf_counter() - started) / (TASKS * CALLS) * 1e6)
    base = statistics.median(times["Django's async ORM (threads)"])
    for name, measured in times.items():
        median = statistics.median(measured)
        print(f"{name:32} {median:7.0f} µs   {median / base:5.2f}")
    await databases.close_all()


if __name__ == "__main__":
    main()
