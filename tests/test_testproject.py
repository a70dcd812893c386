"""The shop: each view on every database through Django's client, and all of it under uvicorn.

With real commits for other processes, requests at the same time, and a long export.
"""

from __future__ import annotations

import asyncio
import csv
import io
import os
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import psycopg
import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from django.test import AsyncClient, override_settings

import testproject.demo
from django_asyncsession import DatabaseInterface
from testproject import settings as shop_settings
from testproject.shop.management.commands import seed
from testproject.shop.models import Author, Book, Customer, Order, OrderLine, Stock

BOOK = {"title": "New", "isbn": "9790000000019", "price": "12.50", "published": "2025-01-02"}
MAX_SIZE = 8


def fill(alias: str) -> None:
    """Two books in stock."""
    author = Author.objects.using(alias).create(name="Ada Holm", born=1950)
    for number, title in enumerate(("The Quiet Harbour", "Letters from Riga"), start=1):
        book = Book.objects.using(alias).create(
            title=title,
            author=author,
            isbn=seed.isbn(number),
            price=Decimal("10.50"),
            published=date(2001, 2, 3),
        )
        for place, quantity in (("shop", 5), ("warehouse", 10)):
            Stock.objects.using(alias).create(book=book, place=place, quantity=quantity)


def settings_of_the_shop(alias: str, native: bool) -> override_settings:
    return override_settings(
        ROOT_URLCONF="testproject.urls",
        MIDDLEWARE=shop_settings.MIDDLEWARE,
        ASYNC_SESSION={"ALIAS": alias, "NATIVE_ORM": native, "NATIVE_MIDDLEWARE": native},
        DATABASE_ROUTERS=[OneDatabase(alias)],
    )


@pytest.fixture(params=[False, True], ids=["plain", "native"])
def shop(database: DatabaseInterface, request: pytest.FixtureRequest) -> Iterator[str]:
    """The shop's settings on each database in turn, with two books in stock, all in the test's
    transaction; with native mode off, and on."""
    fill(database.alias)
    with settings_of_the_shop(database.alias, request.param):
        yield database.alias


@pytest.fixture(params=[False, True], ids=["plain", "native"])
def real_shop(alias: str, empty_tables: None, request: pytest.FixtureRequest) -> Iterator[str]:
    """The same with real commits, for other processes, and for requests at the same time."""
    fill(alias)
    with settings_of_the_shop(alias, request.param):
        yield alias


class OneDatabase:
    """A router that sends everything to one database, as if the project had no other."""

    def __init__(self, alias: str) -> None:
        self._alias = alias

    def db_for_read(self, *args: Any, **hints: Any) -> str:
        return self._alias

    db_for_write = db_for_read


@pytest.fixture
def client() -> AsyncClient:
    """A client that gets error answers as a browser does, and must send CSRF tokens."""
    return AsyncClient(raise_request_exception=False, enforce_csrf_checks=True)


def books(alias: str) -> list[Book]:
    return list(Book.objects.using(alias).order_by("isbn"))


def stock(alias: str, book: Book) -> dict[str, int]:
    rows = Stock.objects.using(alias).filter(book=book)
    return dict(rows.values_list("place", "quantity"))


async def read(fn: Any, *args: Any) -> Any:
    """Look into the database from a thread."""
    return await asyncio.to_thread(lambda: closing_connections(fn, *args))


def closing_connections(fn: Any, *args: Any) -> Any:
    try:
        return fn(*args)
    finally:
        connections.close_all()


async def post(client: AsyncClient, path: str, data: Any) -> Any:
    return await client.post(path, data=data, content_type="application/json")


# The API


async def test_books_are_listed_in_pages(client: AsyncClient, shop: str) -> None:
    data = (await client.get("/api/books/?per_page=1&page=2")).json()
    assert (data["count"], data["page"], data["pages"]) == (2, 2, 2)
    (book,) = data["books"]
    assert book["title"] == "The Quiet Harbour" and book["author"] == "Ada Holm"
    assert book["stock"] == {"shop": 5, "warehouse": 10} and book["price"] == "10.50"


async def test_books_are_searched_by_title_and_author(client: AsyncClient, shop: str) -> None:
    for words, count in (("holm riga", 1), ("ada", 2), ("nothing", 0)):
        data = (await client.get(f"/api/books/?{urlencode({'search': words})}")).json()
        assert data["count"] == count


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("page=0", "page is a number from 1 to 1000000, not '0'"),
        ("page=x", "page is a number from 1 to 1000000, not 'x'"),
        ("page=%C2%B2", "page is a number from 1 to 1000000, not '²'"),
        ("per_page=101", "per_page is a number from 1 to 100, not '101'"),
        ("page=9", "page 9 is not there; the last one is 1"),
    ],
)
async def test_a_page_that_cannot_be_is_a_400(
    client: AsyncClient, shop: str, query: str, message: str
) -> None:
    response = await client.get(f"/api/books/?{query}")
    assert (response.status_code, response.json()) == (400, {"error": message})


async def test_a_book_is_shown_with_author_and_stock(client: AsyncClient, shop: str) -> None:
    book = (await read(books, shop))[0]
    data = (await client.get(f"/api/books/{book.pk}/")).json()
    assert data["title"] == book.title and data["author"] == "Ada Holm"
    assert data["stock"] == {"shop": 5, "warehouse": 10}


@pytest.mark.parametrize("path", ["/api/books/987654/", "/api/nowhere/"])
async def test_what_is_not_there_is_a_json_404(client: AsyncClient, shop: str, path: str) -> None:
    response = await client.get(path)
    assert response.status_code == 404 and response.json()["error"]


async def test_a_wrong_method_is_a_json_405(client: AsyncClient, shop: str) -> None:
    response = await client.get("/api/stock/transfer/")
    assert (response.status_code, response.json()) == (405, {"error": "method not allowed"})


async def test_a_book_is_created(client: AsyncClient, shop: str) -> None:
    response = await post(client, "/api/books/", {**BOOK, "author": "Ada Holm"})
    assert response.status_code == 201
    data = (await client.get(response["Location"])).json()
    assert data["isbn"] == BOOK["isbn"] and data["price"] == "12.50"


async def test_a_book_that_does_not_validate_is_a_400_that_names_the_fields(
    client: AsyncClient, shop: str
) -> None:
    known = (await read(books, shop))[0].isbn
    data = {**BOOK, "author": "Nobody", "isbn": known, "price": "-1"}
    response = await post(client, "/api/books/", data)
    assert response.status_code == 400
    assert set(response.json()["fields"]) == {"author", "isbn", "price"}
    assert len(await read(books, shop)) == 2


@pytest.mark.parametrize("body", ["{", "[1]", "", '"text"', "\ud800".encode("utf-8", "replace")])
async def test_a_body_that_is_no_json_object_is_a_400(
    client: AsyncClient, shop: str, body: Any
) -> None:
    response = await post(client, "/api/books/", body)
    assert response.status_code == 400 and "the body is" in response.json()["error"]


async def test_stock_is_transferred(client: AsyncClient, shop: str) -> None:
    book = (await read(books, shop))[0]
    data = {"book": book.pk, "source": "warehouse", "target": "shop", "quantity": 4}
    response = await post(client, "/api/stock/transfer/", data)
    assert response.json() == {"book": book.pk, "stock": {"shop": 9, "warehouse": 6}}
    assert await read(stock, shop, book) == {"shop": 9, "warehouse": 6}


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"quantity": 11}, 409),
        ({"quantity": 0}, 400),
        ({"target": "warehouse"}, 400),
        ({"source": "moon"}, 400),
        ({"book": 987654}, 404),
    ],
)
async def test_a_transfer_that_cannot_be_changes_nothing(
    client: AsyncClient, shop: str, change: dict[str, Any], status: int
) -> None:
    book = (await read(books, shop))[0]
    data = {"book": book.pk, "source": "warehouse", "target": "shop", "quantity": 1, **change}
    response = await post(client, "/api/stock/transfer/", data)
    assert response.status_code == status and response.json()["error"]
    assert await read(stock, shop, book) == {"shop": 5, "warehouse": 10}


async def test_transfers_at_the_same_time_lose_no_copy(client: AsyncClient, real_shop: str) -> None:
    book = (await read(books, real_shop))[0]
    there = {"book": book.pk, "source": "warehouse", "target": "shop", "quantity": 1}
    back = {**there, "source": "shop", "target": "warehouse"}
    responses = await asyncio.gather(
        *(post(client, "/api/stock/transfer/", data) for data in [there, back] * 10)
    )
    assert {response.status_code for response in responses} == {200}
    assert await read(stock, real_shop, book) == {"shop": 5, "warehouse": 10}


def order_of(*lines: tuple[Any, Any]) -> dict[str, Any]:
    """An order as a program sends it."""
    items = [{"book": book, "quantity": quantity} for book, quantity in lines]
    return {"name": "Ivo Sato", "email": "Ivo@example.com", "lines": items}


async def test_an_order_is_placed(client: AsyncClient, shop: str) -> None:
    first, second = await read(books, shop)
    response = await post(client, "/api/orders/", order_of((second.pk, 1), (first.pk, 2)))
    assert response.status_code == 201 and response.json()["lines"] == 2
    lines = OrderLine.objects.using(shop).filter(order=response.json()["id"])
    saved = await read(lambda: list(lines.values_list("book_id", "quantity", "price")))
    assert sorted(saved) == [(first.pk, 2, Decimal("10.50")), (second.pk, 1, Decimal("10.50"))]
    assert (await read(stock, shop, first))["shop"] == 3


def everything(alias: str) -> list[int]:
    """How many rows an order could have added to each table."""
    return [model.objects.using(alias).count() for model in (Customer, Order, OrderLine)]


async def test_an_order_that_fails_at_its_last_line_saves_nothing(
    client: AsyncClient, shop: str
) -> None:
    first, second = await read(books, shop)
    response = await post(client, "/api/orders/", order_of((first.pk, 1), (second.pk, 6)))
    assert response.status_code == 409
    assert "only 5 copies of 'Letters from Riga'" in response.json()["error"]
    assert await read(everything, shop) == [0, 0, 0]
    assert (await read(stock, shop, first))["shop"] == 5


@pytest.mark.parametrize(
    "data",
    [
        {},
        order_of(),
        order_of((1, 0)),
        order_of(("x", 1)),
        {**order_of((1, 1)), "email": "no"},
        {**order_of(), "lines": [1]},
        {**order_of(), "lines": "all"},
    ],
)
async def test_an_order_that_does_not_validate_is_a_400(
    client: AsyncClient, shop: str, data: dict[str, Any]
) -> None:
    response = await post(client, "/api/orders/", data)
    assert response.status_code == 400
    assert await read(everything, shop) == [0, 0, 0]


async def test_a_view_that_fails_half_way_saves_nothing(client: AsyncClient, shop: str) -> None:
    response = await client.post("/api/orders/broken/")
    assert response.status_code == 500
    assert response.json() == {"error": "the server failed; nothing was saved"}
    assert await read(everything, shop) == [0, 0, 0]


# Which in the test's transaction cannot be read-only, as they are in production.
@pytest.mark.filterwarnings("ignore:read_only=True")
async def test_the_summary_counts_with_two_sessions(client: AsyncClient, shop: str) -> None:
    assert (await client.get("/api/summary/")).json() == {"books": 2, "orders": 0}


async def test_the_export_streams_every_line(client: AsyncClient, real_shop: str) -> None:
    rows = 100_000 if real_shop == "default" else 3000
    await read(add_order_lines, real_shop, rows)
    response = await client.get("/export/order-lines.csv")
    assert response["Content-Type"] == "text/csv"
    chunks = [chunk async for chunk in response.streaming_content]
    assert len(chunks) > 1
    lines = list(csv.reader(io.StringIO(b"".join(chunks).decode())))
    assert len(lines) == rows + 1
    assert lines[0][:4] == ["line", "order", "placed", "customer"]
    assert lines[-1][3:6] == ["x@example.com", seed.isbn(1), "The Quiet Harbour"]
    assert len({line[0] for line in lines}) == rows + 1


def add_order_lines(alias: str, count: int) -> None:
    customer = Customer.objects.using(alias).create(name="X", email="x@example.com")
    order = Order.objects.using(alias).create(customer=customer)
    book = books(alias)[0]
    lines = (OrderLine(order=order, book=book, quantity=1, price=2) for _ in range(count))
    OrderLine.objects.using(alias).bulk_create(lines, batch_size=5000)


# The pages


async def test_the_catalogue_shows_books_and_searches(client: AsyncClient, shop: str) -> None:
    text = (await client.get("/")).content.decode()
    assert "The Quiet Harbour" in text and "Letters from Riga" in text and "5 in stock" in text
    text = (await client.get("/?search=harbour")).content.decode()
    assert "The Quiet Harbour" in text and "Letters from Riga" not in text
    text = (await client.get("/?search=%3Cscript%3E")).content.decode()
    assert "Nothing found" in text and "<script>" not in text


@pytest.mark.parametrize("path", ["/?page=99", "/?page=x", "/orders/987654/"])
async def test_a_page_that_is_not_there_is_a_404(client: AsyncClient, shop: str, path: str) -> None:
    assert (await client.get(path)).status_code == 404


async def test_an_order_is_placed_by_hand_and_then_shown(client: AsyncClient, shop: str) -> None:
    book = (await read(books, shop))[0]
    page = (await client.get(f"/order/?isbn={book.isbn}")).content.decode()
    assert book.title in page and f'value="{book.isbn}"' in page
    response = await client.post("/order/", form_data(page, isbn=book.isbn, quantity="2"))
    assert response.status_code == 302
    shown = (await client.get(response["Location"])).content.decode()
    assert "is saved" in shown and "Clara" in shown and "21.00" in shown and book.title in shown
    assert (await read(stock, shop, book))["shop"] == 3


# Django asks the default database for its features when it filters by an empty string.
@pytest.mark.django_db(databases="__all__")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quantity": "6"}, "Only 5 copies of"),
        ({"quantity": "0"}, "greater than or equal to 1"),
        ({"email": "no"}, "Enter a valid email address."),
        ({"isbn": "9789999999999"}, "We have no book with this ISBN."),
        ({"name": ""}, "This field is required."),
    ],
)
async def test_an_order_form_that_does_not_validate_says_why_and_saves_nothing(
    client: AsyncClient, shop: str, change: dict[str, str], message: str
) -> None:
    book = (await read(books, shop))[0]
    page = (await client.get("/order/")).content.decode()
    response = await client.post("/order/", form_data(page, **{"isbn": book.isbn, **change}))
    assert response.status_code == 400
    assert message in response.content.decode()
    assert await read(everything, shop) == [0, 0, 0]


async def test_an_order_form_without_its_token_is_refused(client: AsyncClient, shop: str) -> None:
    book = (await read(books, shop))[0]
    response = await client.post("/order/", form_data("", isbn=book.isbn))
    assert response.status_code == 403
    assert await read(everything, shop) == [0, 0, 0]


def form_data(page: str, **fields: str) -> dict[str, str]:
    """What a browser sends for the form on this page."""
    token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page)
    data = {"name": "Clara", "email": "clara@example.com", "quantity": "1", "note": "a present"}
    return {**data, "csrfmiddlewaretoken": token[1] if token else "", **fields}


# Its rows


def test_the_seed_is_the_same_every_time(
    database: DatabaseInterface, monkeypatch: pytest.MonkeyPatch
) -> None:
    alias = database.alias
    # More than one batch of everything.
    monkeypatch.setattr(seed, "BATCH", 7)
    assert seeded(alias) == "Seeded 20 books and 8 orders.\n"
    first = rows_of_the_shop(alias)
    assert len(first["books"]) == 20 and len(first["stock"]) == 40 and len(first["lines"]) == 20
    assert "use --flush" in seeded(alias)
    assert rows_of_the_shop(alias) == first
    seeded(alias, "--flush")
    assert rows_of_the_shop(alias) == first
    seeded(alias, "--flush", "--books=21")
    assert rows_of_the_shop(alias) != first


def seeded(alias: str, *args: str) -> str:
    """Run the command; returns what it says."""
    out = io.StringIO()
    call_command("seed", "--books=20", "--orders=8", "--database", alias, *args, stdout=out)
    return out.getvalue()


def rows_of_the_shop(alias: str) -> dict[str, list[Any]]:
    """Its rows, without the keys that the database gave them."""
    books = Book.objects.using(alias).order_by("isbn")
    stock = Stock.objects.using(alias).order_by("book__isbn", "place")
    lines = OrderLine.objects.using(alias).order_by("id")
    return {
        "books": list(books.values_list("isbn", "title", "author__name", "price", "about")),
        "stock": list(stock.values_list("book__isbn", "place", "quantity")),
        "lines": list(lines.values_list("order__placed", "book__isbn", "quantity", "price")),
    }


@pytest.mark.parametrize("option", ["--books=0", "--orders=-1"])
def test_a_seed_of_nothing_is_refused(option: str) -> None:
    with pytest.raises(CommandError, match="at least"):
        call_command("seed", option)


def test_isbns_have_their_check_digit() -> None:
    for number in (1, 12, 987654321):
        digits = [int(digit) for digit in seed.isbn(number)]
        assert len(digits) == 13
        assert sum(digit * (3 if at % 2 else 1) for at, digit in enumerate(digits)) % 10 == 0


def test_names_that_repeat_get_a_number() -> None:
    assert seed.unique(lambda: "Ada", 4) == ["Ada", "Ada II", "Ada III", "Ada IV"]
    assert seed.roman(2949) == "MMCMXLIX"
    assert seed.with_article("A Amber Hour, a honest map and a engine") == (
        "An Amber Hour, an honest map and an engine"
    )


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


def free_port() -> int:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


async def answers(port: int, process: subprocess.Popen[Any]) -> None:
    end = time.monotonic() + 30
    while True:
        assert process.poll() is None, "uvicorn has ended"
        assert time.monotonic() < end, "uvicorn does not answer"
        with suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.close()
            return
        await asyncio.sleep(0.1)


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
