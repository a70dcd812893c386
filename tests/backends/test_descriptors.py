"""File descriptors that are not the package's are never touched. On real pools, since it is about
sockets."""

from __future__ import annotations

import asyncio
import os
import stat
import tempfile
import threading
from collections.abc import Iterator

import pytest

from django_asyncsession import DatabaseInterface
from tests.faults import outcome_of, watchdog
from tests.sessions import pool, slow, soon


@pytest.fixture(autouse=True)
def _never_frozen() -> Iterator[None]:
    with watchdog(60):
        yield


async def use(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        await session.fetch_all(slow(db, 30))


class Writer(threading.Thread):
    """Opens files, writes to them and reads them again, until `stop`; `damaged` counts those that
    do not hold what was written."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.stop, self.damaged = threading.Event(), 0

    def run(self) -> None:
        while not self.stop.is_set():
            try:
                with tempfile.TemporaryFile() as file:
                    file.write(b"mine")
                    file.flush()
                    file.seek(0)
                    self.damaged += file.read() != b"mine"
            except OSError:
                self.damaged += 1


async def test_files_of_other_threads_keep_their_content_while_pools_in_use_are_closed(
    real_database: DatabaseInterface,
) -> None:
    writers = [Writer() for _ in range(4)]
    for writer in writers:
        writer.start()
    try:
        for _ in range(10):
            with pool(real_database, max_size=4):
                users = [asyncio.create_task(outcome_of(use(real_database))) for _ in range(4)]
                await soon(lambda: real_database.pool()._leased == 4)
            await asyncio.sleep(0.02)
            await real_database.close()
            await asyncio.gather(*users)
    finally:
        for writer in writers:
            writer.stop.set()
            writer.join()
    assert [writer.damaged for writer in writers] == [0] * 4


async def test_a_socket_that_a_call_waits_for_is_closed_only_when_it_has_stopped_waiting(
    real_database: DatabaseInterface,
) -> None:
    if real_database.vendor != "postgresql":
        pytest.skip("the others' drivers close through the event loop, or have no sockets")
    with pool(real_database, max_size=1):
        waiting = asyncio.create_task(outcome_of(use(real_database)))
        assert await soon(lambda: real_database.pool()._leased == 1)
    [lease] = real_database.pool().leases
    connection = lease.connection.connection
    assert await soon(lambda: connection._waits_in is not None)
    fd = connection.pgconn.socket
    before = os.fstat(fd)
    real_database.pool().terminate()
    # Nobody else can have got the number: it is the same socket still.
    assert stat.S_ISSOCK(before.st_mode) and os.path.sameopenfile(fd, connection.pgconn.socket)
    assert os.fstat(fd).st_ino == before.st_ino
    assert isinstance(await waiting, Exception)
    assert connection.closed and connection.pgconn.status == 1
