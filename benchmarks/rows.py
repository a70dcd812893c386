"""What is in the tables, as pure functions of a row's key: what every result is checked against."""

from __future__ import annotations

from datetime import date, timedelta
from decimal import Decimal
from typing import Any

AUTHORS = 100
BOOKS_EACH = 100
BOOKS = AUTHORS * BOOKS_EACH
# Of the table that is written to, before each turn.
DRAFTS = 1_000

AUTHOR = ("id", "name", "born")
BOOK = ("id", "title", "author_id", "pages", "price", "published")
DRAFT = ("id", "title", "pages", "price", "published")
VALUES = ("id", "title", "pages", "price")

AuthorRow = tuple[int, str, int | None]
BookRow = tuple[int, str, int, int, Decimal, date]
DraftValues = dict[str, Any]


def author(key: int) -> AuthorRow:
    """The author with this key, from 1 to AUTHORS."""
    return key, f"Author {key:03}", None if key % 7 == 0 else 1900 + key


def book(key: int) -> BookRow:
    """The book with this key, from 1 to BOOKS; the author's n-th book has n pages."""
    writer, place = divmod(key - 1, BOOKS_EACH)
    published = date(1950, 1, 1) + timedelta(days=key)
    return key, f"Book {key:05} of the library", writer + 1, place + 1, price(key), published


def price(number: int) -> Decimal:
    """A price with two decimals."""
    return Decimal(100 + number % 9_900).scaleb(-2)


def draft(number: int) -> DraftValues:
    """The values, all but the key, of the `number`-th row that is written."""
    return {
        "title": f"Draft {number}",
        "pages": number,
        "price": price(number),
        "published": date(2020, 1, 1) + timedelta(days=number % 365),
    }


def book_key(number: int) -> int:
    """The key of a book, spread over the table, for the `number`-th operation."""
    return 1 + number * 7919 % BOOKS


def author_key(number: int) -> int:
    """The key of an author for the `number`-th operation."""
    return 1 + number * 37 % AUTHORS


def draft_key(number: int) -> int:
    """The key of a draft that is there before each turn, one for each of DRAFTS operations."""
    return 1 + number % DRAFTS


def first_of_ten(number: int) -> int:
    """The first of ten authors in a row for the `number`-th operation."""
    return 1 + number * 13 % (AUTHORS - 9)


def first_of_thousand(number: int) -> int:
    """The first of a thousand books in a row for the `number`-th operation."""
    return 1 + number * 499 % (BOOKS - 999)


def draft_numbers(number: int) -> range:
    """The numbers of the thousand drafts that the `number`-th operation writes."""
    return range(number * 1_000, number * 1_000 + 1_000)
