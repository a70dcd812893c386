"""The shop as processes: under uvicorn, with clients that go away, and its demo.

With real commits, for other processes.
"""

from __future__ import annotations

import asyncio
import io
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import psycopg
import pytest
from django.core.management import call_command
from django.db import connections

import testproject.demo
from testproject.shop.models import Customer, Order
from tests.testproject.shop import MAX_SIZE, answers, form_data, free_port, read

# Under uvicorn


def url_of(alias: str, **options: str) -> str:
    """The DATABASE_URL of a test database."""
    entry = connections[alias].settings_dict
    scheme = connections[alias].vendor
    if scheme == "sqlite":
        return f"sqlite:///{entry['NAME']}"
    given = {key: str(value) for key, value in entry["OPTIONS"].items() if key == "host"}
    login = entry["USER"] + (f":{entry['PASSWORD']}" if entry["PASSWORD"] else "")
    place = f"{entry['HOST']}:{entry['PORT']}" if entry["HOST"] else ""
    return f"{scheme}://{login}@{place}/{entry['NAME']}?{urlencode({**given, **options})}"


@asynccontextmanager
async def served(application: str) -> AsyncIterator[tuple[str, subprocess.Popen[bytes]]]:
    """The shop under uvicorn, as a process of its own; ended with SIGTERM."""
    port = free_port()
    env = {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "testproject.settings",
        "DATABASE_URL": url_of("default", application_name=application),
        "POOL_MAX_SIZE": str(MAX_SIZE),
        "DEBUG": "0",
    }
    command = [sys.executable, "-m", "uvicorn", "testproject.asgi:application"]
    options = ["--port", str(port), "--lifespan", "on", "--log-level", "warning"]
    process = subprocess.Popen([*command, *options], env=env)
    try:
        await answers(port, process)
        yield f"http://127.0.0.1:{port}", process
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            await asyncio.to_thread(process.wait, 15)
        finally:
            process.kill()


def activity(application: str) -> list[str]:
    """State of each session of this application, as the PostgreSQL server sees it."""
    sql = "SELECT coalesce(state, '') FROM pg_stat_activity WHERE application_name = %s"
    with connections["default"].cursor() as cursor:
        cursor.execute(sql, [application])
        return [row[0] for row in cursor.fetchall()]


@pytest.fixture
def seeded_shop(empty_tables: None) -> None:
    """Books and orders on PostgreSQL."""
    call_command("seed", "--books", "60", "--orders", "400", stdout=io.StringIO())


async def test_uvicorn_serves_the_shop_on_a_real_server(seeded_shop: None) -> None:
    application = f"shop {uuid.uuid4()}"
    async with served(application) as (url, process), httpx.AsyncClient(base_url=url) as http:
        data = (await http.get("/api/books/?per_page=3")).json()
        assert data["count"] == 60 and len(data["books"]) == 3
        page = await http.get(f"/order/?isbn={data['books'][0]['isbn']}")
        fields = form_data(page.text, isbn=data["books"][0]["isbn"])
        with_stock = next(b for b in await all_books(http) if b["stock"]["shop"] >= 1)
        placed = await http.post("/order/", data={**fields, "isbn": with_stock["isbn"]})
        assert placed.status_code == 302
        assert "is saved" in (await http.get(placed.headers["Location"])).text
        export = await http.get("/export/order-lines.csv")
        assert len(export.text.splitlines()) == 1 + 1000 + 1
        assert (await http.post("/api/orders/broken/")).status_code == 500
        process.send_signal(signal.SIGTERM)
        assert await asyncio.to_thread(process.wait, 15) in (0, -signal.SIGTERM)
    assert await read(activity, application) == []
    assert await read(Customer.objects.filter(email="never@example.com").exists) is False


async def all_books(http: httpx.AsyncClient) -> list[dict[str, Any]]:
    data = (await http.get("/api/books/?per_page=100")).json()
    return list(data["books"])


PATHS = ["/", "/api/books/?page=2", "/export/order-lines.csv", "/api/summary/", "/orders/{}/"]


async def test_uvicorn_survives_clients_that_go_away(seeded_shop: None) -> None:
    """2,000 requests from 50 clients of which a third drop the connection at a random moment."""
    application = f"shop {uuid.uuid4()}"
    took: list[float] = []
    async with served(application) as (url, _), httpx.AsyncClient(base_url=url) as http:
        targets = [b["id"] for b in await all_books(http) if b["stock"]["warehouse"] >= 50]
        first = (await read(Order.objects.order_by("id").first)).pk
        clients = [Visitor(url, n, targets, first, took) for n in range(50)]
        with watching(application) as seen:
            await asyncio.gather(*(visitor.visit(40) for visitor in clients))
        assert sum(visitor.requests for visitor in clients) == 2000
        assert sum(visitor.dropped for visitor in clients) > 400
        assert {status for visitor in clients for status in visitor.statuses} <= {200, 409}
        await settle(application)
        # All connections of the pool are still there to be used.
        again = await asyncio.gather(*(http.get("/api/summary/") for _ in range(MAX_SIZE)))
        assert {response.status_code for response in again} == {200}
        assert set(await read(activity, application)) <= {"idle"}
    assert len(seen) > 3 and max(seen) <= MAX_SIZE


class Visitor:
    """A client of its own; every third one drops its connections at a random moment before the
    usual answer would come, which the others tell in `took`."""

    def __init__(
        self, url: str, number: int, targets: list[int], order: int, took: list[float]
    ) -> None:
        self._random = random.Random(number)
        self._url, self._number, self._targets, self._order = url, number, targets, order
        self._took = took
        self.requests = self.dropped = 0
        self.statuses: set[int] = set()

    async def visit(self, requests: int) -> None:
        """Send so many requests, one after another."""
        async with httpx.AsyncClient(base_url=self._url, timeout=60) as http:
            for _ in range(requests):
                self.requests += 1
                if self._number % 3 == 0:
                    await self._drop(http)
                else:
                    began = time.monotonic()
                    response = await self._send(http)
                    self._took.append(time.monotonic() - began)
                    self.statuses.add(response.status_code)

    async def _drop(self, http: httpx.AsyncClient) -> None:
        usual = statistics.median(self._took) if self._took else 0.08
        try:
            # What is cancelled in httpx closes its connection.
            async with asyncio.timeout(self._random.uniform(0, usual)):
                self.statuses.add((await self._send(http)).status_code)
        except (TimeoutError, httpx.HTTPError):
            self.dropped += 1

    async def _send(self, http: httpx.AsyncClient) -> httpx.Response:
        if self._random.random() < 0.3:
            places = self._random.sample(["shop", "warehouse"], 2)
            data = {"book": self._random.choice(self._targets), "quantity": 1}
            data |= dict(zip(("source", "target"), places, strict=True))
            return await http.post("/api/stock/transfer/", json=data)
        return await http.get(self._random.choice(PATHS).format(self._order))


@contextmanager
def watching(application: str) -> Iterator[list[int]]:
    """How many connections the server has, again and again, as a thread sees it with a connection
    that it keeps: the clients leave little time for opening others."""
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        try:
            while not over.wait(0.05):
                seen.append(len(activity(application)))
        finally:
            connections.close_all()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        over.set()
        thread.join()


async def settle(application: str) -> None:
    """Wait until the last dropped request has been cleaned up."""
    end = time.monotonic() + 5
    while set(states := await read(activity, application)) - {"idle"}:
        assert time.monotonic() < end, f"not idle 5 s after the last request: {states}"
        await asyncio.sleep(0.1)


# The demo


def demo(**env: str) -> subprocess.Popen[str]:
    """Start what `make demo` starts."""
    command = [sys.executable, "-m", "testproject.demo"]
    env = {**os.environ, "DJANGO_SETTINGS_MODULE": "testproject.settings", **env}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=pipe, stderr=subprocess.STDOUT, text=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_the_demo_says_where_it_is_and_stops_on_a_signal(real_shop: str, number: int) -> None:
    port = free_port()
    process = demo(PORT=str(port), DATABASE_URL=url_of(real_shop))
    try:
        await answers(port, process)
        text = httpx.get(f"http://127.0.0.1:{port}/api/books/").text
        assert '"count": 2,' in text
        process.send_signal(number)
        said, _ = await asyncio.to_thread(process.communicate, timeout=15)
    finally:
        process.kill()
    assert f"http://127.0.0.1:{port}/order/" in said and f"curl http://127.0.0.1:{port}/" in said
    assert said.endswith("The shop is closed.\n") and "Traceback" not in said
    assert process.returncode == 0


def test_the_demo_starts_its_server_where_none_was_and_after_it_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(testproject.demo, "FOLDER", tmp_path / "demo")
    data = tmp_path / "demo" / "postgresql"
    for _ in range(2):
        with testproject.demo._postgresql() as url, psycopg.connect(url) as connection:
            assert connection.execute("SELECT current_database()").fetchone() == ("shop",)
        assert not (data / "postmaster.pid").exists()
        # What a process that was killed leaves: it is one of the server's users for ever.
        (data / ".handle_pids.json").write_text("[99999999]")


def test_the_demo_says_in_one_line_that_its_port_is_taken() -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        process = demo(PORT=str(port), DATABASE_URL="sqlite://")
        said, _ = process.communicate(timeout=15)
    assert process.returncode == 1 and said.count("\n") == 1
    assert said.startswith(f"demo: port {port} cannot be used (Address already in use); try: ")


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1"])
def test_the_demo_refuses_a_port_that_cannot_be(port: str) -> None:
    said, _ = demo(PORT=port).communicate(timeout=15)
    assert said == f"demo: PORT is a number from 1 to 65535, not {port!r}\n"


def test_the_demo_says_in_one_line_that_its_database_is_down() -> None:
    url = "postgresql://someone:s3cr3t@127.0.0.1:1/shop"
    process = demo(PORT=str(free_port()), DATABASE_URL=url)
    said, _ = process.communicate(timeout=15)
    assert process.returncode == 1 and "s3cr3t" not in said and "Traceback" not in said
    assert "demo: the database of DATABASE_URL cannot be used: " in said.splitlines()[-1]
