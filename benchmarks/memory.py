"""The memory of rows, each competitor in a process of its own.

    python -m benchmarks.memory NAME

Prints as JSON the bytes of Python's memory that one of 10,000 rows takes, and by how many megabytes
the process grows while it reads 100,000 rows one by one.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from benchmarks import competitors
from benchmarks.competitors.base import Client, NotOffered

ROWS, STREAMED, WARM_UP = 10_000, 100_000, 5_000
# Their rows are those of another one.
LEFT_OUT = {"transaction", "run_sync", "django_one"}
TITLES = {"row": "one of 10,000 rows, bytes", "stream": "growth by 100,000 streamed rows, MB"}


def measure(name: str) -> dict[str, Any]:
    """Run a process for this competitor.

    Returns:
        "row" and "stream", or "error".
    """
    command = [sys.executable, "-m", "benchmarks.memory", name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def measure_all(
    names: Sequence[str], rounds: int, say: Callable[[str], None]
) -> tuple[dict[str, dict[str, list[float]]], dict[str, dict[str, str]]]:
    """By turns; returns what was measured, and why something was not, by work and competitor."""
    found: dict[str, dict[str, list[float]]] = {work: {} for work in TITLES}
    absent: dict[str, dict[str, str]] = {work: {} for work in TITLES}
    for turn in range(rounds):
        say(f"memory, round {turn + 1} of {rounds}")
        for name in names:
            measured = measure(name)
            for work in TITLES:
                if work in measured:
                    found[work].setdefault(name, []).append(measured[work])
                else:
                    absent[work][name] = measured.get("error", "not offered")
    return found, absent


async def _measure_here(name: str) -> dict[str, float]:
    competitor = competitors.load(competitors.POSTGRESQL[name])()
    found = {}
    async with AsyncExitStack() as everything:
        await competitor.open()
        everything.push_async_callback(competitor.close)
        competitor.enter()
        everything.callback(competitor.leave)
        client = await everything.enter_async_context(competitor.client())
        for work, look in (("stream", _growth), ("row", _bytes_of_a_row)):
            try:
                found[work] = await look(client)
            except NotOffered:
                continue
    return found


async def _growth(client: Client) -> float:
    async def read(limit: int) -> None:
        count = 0
        async for _ in client.stream(limit):
            count += 1
        if count != limit:
            raise SystemExit(f"{count} rows where {limit} were asked for")

    await read(WARM_UP)
    before = _peak()
    await read(STREAMED)
    return _peak() - before


def _peak() -> float:
    """The most memory that the process has had, in megabytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # getrusage() counts what the parent had before this program was started.
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) / 1024
    import resource

    # Bytes, on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 / 1024


async def _bytes_of_a_row(client: Client) -> float:
    await client.many(ROWS)
    gc.collect()
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    kept = await client.many(ROWS)
    gc.collect()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if len(kept) != ROWS:
        raise SystemExit(f"{len(kept)} rows where {ROWS} were asked for")
    return (after - before) / ROWS


def main() -> None:
    """Measure one competitor, and print."""
    os.environ["DJANGO_SETTINGS_MODULE"] = "benchmarks.settings"
    import django

    django.setup()
    print(json.dumps(asyncio.run(_measure_here(sys.argv[1]))))


if __name__ == "__main__":
    main()
