"""The shop: each view on every database through Django's client.

With real commits for requests at the same time, and a long export.
"""

from __future__ import annotations

import asyncio
import csv
import io
from decimal import Decimal
from typing import Any
from urllib.parse import urlencode

import pytest
from django.core.management import CommandError, call_command
from django.test import AsyncClient

from django_asyncsession import DatabaseInterface
from testproject.shop.management.commands import seed
from testproject.shop.models import Book, Customer, Order, OrderLine, Stock
from tests.testproject.shop import form_data, read

BOOK = {"title": "New", "isbn": "9790000000019", "price": "12.50", "published": "2025-01-02"}


def books(alias: str) -> list[Book]:
    return list(Book.objects.using(alias).order_by("isbn"))


def stock(alias: str, book: Book) -> dict[str, int]:
    rows = Stock.objects.using(alias).filter(book=book)
    return dict(rows.values_list("place", "quantity"))


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
