"""Pools of event loops and of processes that come and go, and what is left of them at the server.

Its pools are the point, so they are real.
"""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from django_asyncsession import DatabaseInterface
from django_asyncsession.exceptions import WrongLoopError
from tests.faults import Elapsed
from tests.postgres import dsn_of_tests, gone, sessions_of

# Loops


def test_50_short_loops_leave_no_server_session(name: str) -> None:
    db = DatabaseInterface.from_dsn(dsn_of_tests(application_name=name), alias="own")

    async def main() -> None:
        await asyncio.gather(*(db.ping() for _ in range(3)))

    for turn in range(50):
        asyncio.run(main())
        # One that was being opened when the loop ended is known to the server for a moment.
        deadline = time.monotonic() + 2
        while sessions_of(name):
            assert time.monotonic() < deadline
        if turn == 5:
            gc.collect()  # what other tests have left
            open_files = len(os.listdir("/proc/self/fd"))
    assert len(os.listdir("/proc/self/fd")) <= open_files
    assert len(db._pools) == 1


def test_a_loop_that_is_only_closed_leaves_its_sessions_to_the_next_pool(name: str) -> None:
    db = DatabaseInterface.from_dsn(dsn_of_tests(application_name=name), alias="own")
    for _ in range(3):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(db.ping())
        loop.close()
        assert sessions_of(name) <= 2
    asyncio.run(clean(db, name))


async def clean(db: DatabaseInterface, name: str) -> None:
    await db.ping()
    await db.close()
    assert await gone(name)


def test_two_loops_in_two_threads_have_a_pool_each(name: str) -> None:
    db = DatabaseInterface.from_dsn(
        dsn_of_tests(application_name=name, pool_max_size=2), alias="own"
    )
    barrier, outcomes = threading.Barrier(2), []

    async def main() -> None:
        await db.connect()
        await asyncio.to_thread(barrier.wait, 5)
        await asyncio.gather(*(db.ping() for _ in range(20)))
        outcomes.append(db.pool())

    threads = [threading.Thread(target=lambda: asyncio.run(main())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(map(id, outcomes))) == 2 and all(pool.closed for pool in outcomes)
    assert sessions_of(name) == 0


async def test_a_session_of_one_loop_is_refused_in_another(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        await session.execute("SELECT 1")
        with pytest.raises(WrongLoopError, match="make a session in the loop"):
            await asyncio.to_thread(lambda: asyncio.run(session.execute("SELECT 1")))


async def test_an_interface_that_is_dropped_closes_its_connections(name: str) -> None:
    db = DatabaseInterface.from_dsn(dsn_of_tests(application_name=name), alias="own")
    await db.connect()
    assert sessions_of(name) == 1
    del db
    await asyncio.sleep(0)  # what the pool's tasks left to call
    gc.collect()
    assert await gone(name)


# Processes


def test_a_forked_child_uses_nothing_of_its_parent(name: str) -> None:
    dsn = dsn_of_tests(application_name=name, pool_max_size=3)
    db = DatabaseInterface.from_dsn(dsn, alias="own")
    loop = asyncio.new_event_loop()

    async def parent() -> list[int]:
        leases = [await db.acquire() for _ in range(3)]
        pids = [lease.connection.connection.info.backend_pid for lease in leases]  # type: ignore[attr-defined]
        for lease in leases:
            lease.release()
        return pids

    async def child(pids: list[int]) -> bool:
        async with db.get_session() as session:
            pid = await session.fetch_value("SELECT pg_backend_pid()")
        return pid not in pids

    pids = loop.run_until_complete(parent())
    reader, writer = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            outcome = loop.run_until_complete(child(pids))
            gc.collect()
            os.write(writer, b"own" if outcome else b"shared")
        finally:
            os._exit(0)
    os.waitpid(process, 0)
    assert os.read(reader, 100) == b"own"
    os.close(reader)
    os.close(writer)
    assert set(loop.run_until_complete(parent())) == set(pids)
    loop.run_until_complete(db.close())
    loop.close()


SCRIPT = """
import asyncio, sys
import django
from django.conf import settings
settings.configure(INSTALLED_APPS=["django_asyncsession"], DATABASES={{}})
django.setup()
from django_asyncsession import DatabaseInterface
db = DatabaseInterface.from_dsn({dsn!r}, alias="own")
{code}
"""


def script(name: str, code: str) -> tuple[int, list[str]]:
    """Run code in a process of its own, in development mode; its exit code and what it complained
    of."""
    text = SCRIPT.format(dsn=dsn_of_tests(application_name=name), code=textwrap.dedent(code))
    process = subprocess.run(
        [sys.executable, "-X", "dev", "-c", text],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=Path(__file__).parents[2],
    )
    # A busy machine is no fault: asyncio tells of steps of more than 0.1 s.
    slow = ("Executing <", "poll ")
    return process.returncode, [
        line for line in process.stderr.splitlines() if not line.startswith(slow)
    ]


def test_the_drivers_are_imported_before_there_is_a_loop_to_hold_up() -> None:
    code = """
        import django, sys
        from django.conf import settings
        entry = {"ENGINE": "django.db.backends.postgresql"}
        missing = {"ENGINE": "no.such.engine"}
        settings.configure(
            INSTALLED_APPS=["django_asyncsession"], DATABASES={"default": entry, "other": missing}
        )
        django.setup()
        sys.exit("psycopg" not in sys.modules)
    """
    process = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        timeout=30,
        cwd=Path(__file__).parents[2],
    )
    assert process.returncode == 0


CLEAN_ENDS: dict[str, str] = {
    "asyncio.run with a warm pool": """
        async def main():
            await asyncio.gather(*(db.ping() for _ in range(5)))
        asyncio.run(main())
    """,
    "a task that still queries": """
        async def forever():
            async with db.get_session() as session:
                await session.execute("SELECT pg_sleep(60)")
        async def main():
            main.task = asyncio.create_task(forever())
            await asyncio.sleep(0.3)
        asyncio.run(main())
    """,
    "a task that waits for a connection": """
        async def forever():
            async with db.get_session() as session:
                await session.execute("SELECT pg_sleep(60)")
        async def main():
            main.tasks = [asyncio.create_task(forever()) for _ in range(20)]
            await asyncio.sleep(0.5)
        asyncio.run(main())
    """,
    "cancelled in a query at the very end": """
        async def main():
            try:
                async with asyncio.timeout(0.2):
                    async with db.get_session() as session:
                        await session.execute("SELECT pg_sleep(60)")
            except TimeoutError:
                pass
        asyncio.run(main())
    """,
    "an error at the very end": """
        async def main():
            async with db.get_session() as session:
                await session.execute("SELECT 1")
                raise KeyboardInterrupt
        try:
            asyncio.run(main())
        except KeyboardInterrupt:
            pass
    """,
    "a loop that is closed without its generators": """
        loop = asyncio.new_event_loop()
        loop.run_until_complete(db.ping())
        loop.run_until_complete(db.close())
        loop.close()
    """,
}


@pytest.mark.parametrize("end", CLEAN_ENDS)
def test_a_program_ends_quietly_and_its_server_sessions_with_it(end: str, name: str) -> None:
    assert script(name, CLEAN_ENDS[end]) == (0, [])
    deadline = time.monotonic() + 1
    while sessions_of(name) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert sessions_of(name) == 0


@pytest.mark.parametrize("how", ["closed", "left running"])
def test_a_program_that_ends_with_an_open_session_says_one_line_at_most(
    how: str, name: str
) -> None:
    end = {"closed": "loop.close()", "left running": "pass"}[how]
    with Elapsed() as took:
        code, lines = script(
            name,
            f"""
            import warnings
            warnings.simplefilter("default")
            loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            async def main():
                session = db.get_session()
                await session.begin()
                await session.execute("SELECT 1")
                return session
            session = loop.run_until_complete(main())
            {end}
            """,
        )
    assert code == 0 and took.seconds < 10
    # The loop that the program left open is its own affair.
    lines = [line for line in lines if "unclosed event loop" not in line]
    assert len([line for line in lines if "Warning" in line]) <= 1, lines
    assert not [line for line in lines if "Traceback" in line or "Exception ignored" in line]
