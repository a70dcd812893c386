"""Time of several reads: one after the other, and with `session.gather`.

    python benchmarks/gather.py [rounds]

Prints the median of each in milliseconds, and its ratio to one after the other, all measured side
by side in one run on the PostgreSQL of the tests. Once the reads wait, as on a server with work of
its own (20 ms each), and once they are as short as can be, which shows what gathering costs.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import sys
import time
from collections.abc import Awaitable, Callable

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tests.settings")
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

READS = 8


def main() -> None:
    """Measure on the server's own database: nothing is read from tables."""
    import django

    django.setup()
    from django.db import connections

    connections.settings["default"]["NAME"] = "postgres"
    asyncio.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 25))


async def measure(rounds: int) -> None:
    """Let the contestants take turns, and print what came out."""
    from django_asyncsession import databases

    db = databases["default"]
    for sql in ("SELECT pg_sleep(0.02)", "SELECT 1"):

        async def in_turn(sql: str = sql) -> None:
            async with db.get_session() as session:
                for _ in range(READS):
                    await session.fetch_value(sql)

        def gathered(limit: int, sql: str = sql) -> Callable[[], Awaitable[None]]:
            async def gather() -> None:
                async with db.get_session() as session:
                    await session.gather(*[lambda s: s.fetch_value(sql)] * READS, limit=limit)

            return gather

        contestants = {"in turn": in_turn} | {f"limit={n}": gathered(n) for n in (1, 2, 4, 8)}
        times: dict[str, list[float]] = {name: [] for name in contestants}
        for _ in range(rounds):
            for name, contestant in contestants.items():
                started = time.perf_counter()
                await contestant()
                times[name].append((time.perf_counter() - started) * 1e3)
        print(f"{READS} times {sql}")
        base = statistics.median(times["in turn"])
        for name, measured in times.items():
            median = statistics.median(measured)
            print(f"  {name:10} {median:7.2f} ms   {median / base:5.2f}")
    await databases.close_all()


if __name__ == "__main__":
    main()
