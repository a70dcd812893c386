"""The tools that break things do what they say."""

from __future__ import annotations

import asyncio
import socket
import struct
import time

import dj_database_url
import psycopg
import pytest
from django.db import connections

from tests.faults import (
    CLIENT,
    DROP,
    FaultProxy,
    LoopProbe,
    address,
    cancel_at,
    outcome_of,
    watchdog,
)
from tests.servers import postgresql


async def three_naps(log: list[int]) -> str:
    for nap in range(3):
        await asyncio.sleep(0)
        log.append(nap)
    return "awake"


@pytest.mark.parametrize("step", [1, 2, 3])
async def test_cancel_at_cancels_at_the_nth_suspension(step: int) -> None:
    log: list[int] = []
    run = cancel_at(three_naps(log), {step})
    assert isinstance(await outcome_of(run), asyncio.CancelledError)
    assert log == list(range(step - 1)) and run.suspensions == step and not run.done


async def test_cancel_at_beyond_the_last_suspension_is_done() -> None:
    run = cancel_at(three_naps([]), {4})
    assert await outcome_of(run) == "awake"
    assert run.done and run.suspensions == 3


async def test_cancel_at_passes_the_outcome_of_futures_both_ways() -> None:
    async def waits() -> str:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_soon(future.set_result, "x")
        value = await future
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await asyncio.sleep(5)
        return value

    assert await cancel_at(waits(), {99}) == "x"


async def test_probe_sees_a_stall_and_none_where_there_is_none() -> None:
    async with LoopProbe() as calm:
        await asyncio.sleep(0.05)
    async with LoopProbe() as stalled:
        time.sleep(0.1)
    assert calm.worst < 0.05 < stalled.worst


async def test_proxy_passes_counts_drops_and_resets() -> None:
    server = postgresql()
    with watchdog(20):
        async with FaultProxy(*address("default")) as proxy:
            dsn = f"host=127.0.0.1 port={proxy.port} user={server['USER']} dbname=postgres"
            connection = await psycopg.AsyncConnection.connect(dsn, autocommit=True)
            before = proxy.round_trips
            await connection.execute("SELECT 1")
            await connection.execute("SELECT 2")
            assert proxy.round_trips - before == 2 and proxy.accepted == 1
            proxy.hook = lambda who, data: DROP if who == CLIENT else None
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.1):
                    await asyncio.shield(waiting := asyncio.ensure_future(connection.execute("X")))
            proxy.reset()
            assert isinstance(await outcome_of(waiting), psycopg.OperationalError)
            await connection.close()


async def test_reset_ends_every_connection_though_one_is_closed_already() -> None:
    """A client that went away itself leaves a closed socket for as long as the server has not
    noticed."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(10):
            writer.write(b"answer")
        await gone.wait()
        writer.close()

    gone = asyncio.Event()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    with watchdog(20):
        async with server, FaultProxy(*server.sockets[0].getsockname()) as proxy:
            clients = [await asyncio.open_connection("127.0.0.1", proxy.port) for _ in range(5)]
            for reader, writer in clients:
                writer.write(b"question")
                await reader.readexactly(6)
            sock = clients[2][1].get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            clients[2][1].transport.abort()
            closed = lambda: [w for w in proxy._writers if w.get_extra_info("socket").fileno() < 0]  # noqa: E731
            while not closed():
                await asyncio.sleep(0.001)
            proxy.reset()
            for number in (0, 1, 3, 4):
                with pytest.raises(ConnectionResetError):
                    await clients[number][0].read(1)
            gone.set()


def test_a_proxy_stands_before_the_server_of_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"ENGINE": "django.db.backends.mysql", "HOST": "", "PORT": ""}
    monkeypatch.setitem(connections.settings, "mysql", entry)
    assert address("mysql") == ("127.0.0.1", 3306)
    entry.update(dj_database_url.parse("mysql://u:p@db.example:3307/n"))  # type: ignore[arg-type]
    assert address("mysql") == ("db.example", 3307)
