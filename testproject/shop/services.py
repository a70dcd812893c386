"""The shop's rules as plain, synchronous Django code; the views run it with `session.run_sync`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from django.core.exceptions import BadRequest
from django.core.paginator import EmptyPage, Page, Paginator
from django.db.models import F, Q, QuerySet

from testproject.shop.errors import Conflict
from testproject.shop.models import Book, Customer, Order, OrderLine, Stock

PER_PAGE = 20
MAX_PER_PAGE = 100


def search_books(words: str) -> QuerySet[Book]:
    """Books with every word in the title or the author's name, with author and stock."""
    books = Book.objects.select_related("author").prefetch_related("stock")
    for word in words.split():
        books = books.filter(Q(title__icontains=word) | Q(author__name__icontains=word))
    return books


def books_page(query: Mapping[str, str]) -> Page[Book]:
    """The page of books that the query string asks for: search, page, per_page.

    Raises:
        BadRequest: page or per_page is not a number that fits.
    """
    per_page = _number(query, "per_page", PER_PAGE, MAX_PER_PAGE)
    pages = Paginator(search_books(query.get("search", "")), per_page)
    page = _number(query, "page", 1, 1_000_000)
    try:
        return pages.page(page)
    except EmptyPage as exc:
        raise BadRequest(f"page {page} is not there; the last one is {pages.num_pages}") from exc


def _number(query: Mapping[str, str], name: str, default: int, maximum: int) -> int:
    text = query.get(name, str(default))
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= maximum):
        raise BadRequest(f"{name} is a number from 1 to {maximum}, not {text[:50]!r}")
    return int(text)


def move_stock(book: int, source: str, target: str, quantity: int) -> dict[str, int]:
    """Move copies of a book between two places; returns what each place then has.

    Raises:
        Conflict: there are not that many copies in the source.
        Book.DoesNotExist: there is no such book.
    """
    Book.objects.only("id").get(pk=book)
    # Locked in one order, by place, so that two transfers never wait for each other.
    locked = Stock.objects.select_for_update().filter(book=book).order_by("place")
    places = {stock.place: stock for stock in locked}
    in_source = places[source].quantity if source in places else 0
    if in_source < quantity:
        raise Conflict(f"only {in_source} copies in the {source}, {quantity} asked for")
    places[source].quantity -= quantity
    places[source].save(update_fields=["quantity"])
    if target in places:
        places[target].quantity += quantity
        places[target].save(update_fields=["quantity"])
    else:
        places[target] = Stock.objects.create(book_id=book, place=target, quantity=quantity)
    return {place: stock.quantity for place, stock in places.items()}


def sell(customer: Customer, lines: Iterable[tuple[int, int]], note: str = "") -> Order:
    """Save an order of (book id, copies) and take the copies out of the shop's stock.

    Each line is written as it comes: whoever calls this must be in a transaction, or an error at
    a later line leaves the earlier ones behind. They come in the order of the books, so that two
    orders never wait for each other.

    Raises:
        Conflict: the shop has too few copies of a book.
        Book.DoesNotExist: there is no such book.
    """
    order = Order.objects.create(customer=customer, note=note)
    for pk, quantity in sorted(lines):
        book = Book.objects.get(pk=pk)
        in_shop = Stock.objects.filter(book=book, place=Stock.Place.SHOP)
        if not in_shop.filter(quantity__gte=quantity).update(quantity=F("quantity") - quantity):
            left = in_shop.values_list("quantity", flat=True).first() or 0
            raise Conflict(f"only {left} copies of {book.title!r} in the shop, {quantity} ordered")
        OrderLine.objects.create(order=order, book=book, quantity=quantity, price=book.price)
    return order


def customer_of(data: Mapping[str, Any]) -> Customer:
    """The customer with this e-mail address, made when new."""
    customer, _ = Customer.objects.get_or_create(
        email=data["email"].lower(), defaults={"name": data["name"]}
    )
    return customer


def in_shop(book: Book) -> int:
    """Copies of a book that can be ordered; its stock must have been prefetched."""
    return sum(s.quantity for s in book.stock.all() if s.place == Stock.Place.SHOP)
