"""The API: JSON in and out, each view on the session of its request."""

from __future__ import annotations

import asyncio
import csv
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from django.core.exceptions import BadRequest
from django.forms import BaseForm
from django.http import HttpRequest, JsonResponse, StreamingHttpResponse
from django.urls import reverse
from django.views import View
from django.views.decorators.http import require_GET, require_POST

from django_asyncsession import Session, inject_session
from testproject.shop import services
from testproject.shop.errors import InvalidFields
from testproject.shop.forms import BookForm, CustomerForm, LineForm, TransferForm
from testproject.shop.models import Book, Customer, Order

EXPORT_SQL = """
    SELECT line.id, shop_order.id AS order_id, shop_order.placed, customer.email,
           book.isbn, book.title, line.quantity, line.price
    FROM shop_orderline line
    JOIN shop_order ON shop_order.id = line.order_id
    JOIN shop_customer customer ON customer.id = shop_order.customer_id
    JOIN shop_book book ON book.id = line.book_id
    ORDER BY line.id
"""
EXPORT_COLUMNS = ("line", "order", "placed", "customer", "isbn", "title", "quantity", "price")
ROWS_PER_CHUNK = 1000


class Books(View):
    """The books: a page of them, and a new one."""

    @inject_session
    async def get(self, request: HttpRequest, session: Session) -> JsonResponse:
        """A page of books: ?search=, ?page=, ?per_page=."""

        def page() -> dict[str, Any]:
            books = services.books_page(request.GET)
            return {
                "count": books.paginator.count,
                "page": books.number,
                "pages": books.paginator.num_pages,
                "books": [book_data(book) for book in books],
            }

        return JsonResponse(await session.run_sync(page))

    @inject_session
    async def post(self, request: HttpRequest, session: Session) -> JsonResponse:
        """Save a new book."""
        form = BookForm(json_object(request))
        await check(session, form)
        book = form.save(commit=False)
        await session.add(book)
        response = JsonResponse({"id": book.pk, "title": book.title}, status=201)
        response["Location"] = reverse("api-book", args=[book.pk])
        return response


@require_GET
async def book(request: HttpRequest, pk: int) -> JsonResponse:
    """One book, with its author and stock."""
    session: Session = request.db_session  # type: ignore[attr-defined]
    found = await session.get_one(Book, pk)
    await session.load(found, "author", "stock")
    return JsonResponse(book_data(found))


@require_POST
@inject_session
async def transfer(request: HttpRequest, session: Session) -> JsonResponse:
    """Move copies of a book from one place to another, or change nothing at all."""
    form = TransferForm(json_object(request))
    await check(session, form)
    async with session.atomic():
        stock = await session.run_sync(services.move_stock, **form.cleaned_data)
    return JsonResponse({"book": form.cleaned_data["book"], "stock": stock})


@require_POST
@inject_session
async def place_order(request: HttpRequest, session: Session) -> JsonResponse:
    """Save an order of several books: {"name":, "email":, "lines": [{"book":, "quantity":}]}."""
    data = json_object(request)
    form = CustomerForm(data)
    await check(session, form)
    lines = await order_lines(session, data)
    customer = await session.run_sync(services.customer_of, form.cleaned_data)
    # The session is in its request's transaction: when the last line fails, nothing is saved.
    order = await session.run_sync(services.sell, customer, lines)
    return JsonResponse({"id": order.pk, "lines": len(lines)}, status=201)


async def order_lines(session: Session, data: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The lines of an order as pairs of book id and copies."""
    lines = data.get("lines")
    if not isinstance(lines, list) or not all(isinstance(line, dict) for line in lines):
        raise BadRequest('lines is a list of {"book": id, "quantity": copies}')
    if not 1 <= len(lines) <= 100:
        raise BadRequest(f"an order has 1 to 100 lines, not {len(lines)}")
    forms = [LineForm(line) for line in lines]
    for form in forms:
        await check(session, form)
    return [(form.cleaned_data["book"], form.cleaned_data["quantity"]) for form in forms]


@require_POST
async def broken_order(request: HttpRequest) -> JsonResponse:
    """Fail half way, after two rows were written: neither of them is saved."""
    session: Session = request.db_session  # type: ignore[attr-defined]
    customer = Customer(name="Never Saved", email="never@example.com")
    await session.add(customer)
    await session.add(Order(customer=customer, note="never saved either"))
    raise RuntimeError("the payment service did not answer")


@require_GET
async def summary(request: HttpRequest) -> JsonResponse:
    """Numbers of the shop, counted by two sessions at the same time."""

    db = request.db_session.bind  # type: ignore[attr-defined]

    async def value(sql: str) -> Any:
        async with db.get_session(read_only=True) as session:
            return await session.fetch_value(sql)

    books, orders = await asyncio.gather(
        value("SELECT count(*) FROM shop_book"), value("SELECT count(*) FROM shop_order")
    )
    return JsonResponse({"books": books, "orders": orders})


@require_GET
@inject_session
async def export(request: HttpRequest, session: Session) -> StreamingHttpResponse:
    """All order lines as CSV; the session stays open until the last row is sent."""
    response = StreamingHttpResponse(export_chunks(session), content_type="text/csv")
    response["Content-Disposition"] = 'attachment; filename="order-lines.csv"'
    return response


async def export_chunks(session: Session) -> AsyncIterator[str]:
    """The export, some hundred lines of text at a time."""
    lines = Lines()
    writer = csv.writer(lines)
    writer.writerow(EXPORT_COLUMNS)
    async for row in session.stream(EXPORT_SQL, chunk_size=ROWS_PER_CHUNK):
        writer.writerow(row.values())
        if len(lines.texts) >= ROWS_PER_CHUNK:
            yield lines.take()
    yield lines.take()


class Lines:
    """The file that csv.writer writes to: it keeps the lines until they are taken."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def write(self, text: str) -> None:
        """Keep one line."""
        self.texts.append(text)

    def take(self) -> str:
        """All lines since the last time, as one text."""
        taken = "".join(self.texts)
        self.texts.clear()
        return taken


def json_object(request: HttpRequest) -> dict[str, Any]:
    """The request's body, which must be a JSON object.

    Raises:
        BadRequest: it is not.
    """
    try:
        data = json.loads(request.body)
    except ValueError as exc:
        raise BadRequest(f"the body is not JSON: {exc}") from exc
    if not isinstance(data, dict):
        raise BadRequest(f"the body is a JSON {type(data).__name__}; an object is needed")
    return data


async def check(session: Session, form: BaseForm) -> None:
    """Validate a form, which may look into the database.

    Raises:
        InvalidFields: it is not valid.
    """
    if not await session.run_sync(form.is_valid):
        raise InvalidFields(form.errors.get_json_data())


def book_data(book: Book) -> dict[str, Any]:
    """A book as the API shows it; author and stock must have been loaded."""
    return {
        "id": book.pk,
        "title": book.title,
        "author": book.author.name,
        "isbn": book.isbn,
        "price": str(book.price),
        "published": book.published.isoformat(),
        "stock": {stock.place: stock.quantity for stock in book.stock.all()},
    }
