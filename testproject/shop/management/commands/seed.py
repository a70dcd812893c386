"""manage.py seed: fill the shop with made-up books, customers and orders."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from itertools import islice
from typing import Any, TypeVar

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DEFAULT_DB_ALIAS, connections, models, transaction
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from testproject.shop import words
from testproject.shop.models import Author, Book, Customer, Order, OrderLine, Stock

M = TypeVar("M", bound=models.Model)

BATCH = 2000
NEWEST = datetime(2026, 1, 1, tzinfo=UTC)


class Command(BaseCommand):
    """The same numbers give the same shop, on every database."""

    help = "Fill the shop with made-up books, customers and orders."

    def add_arguments(self, parser: CommandParser) -> None:
        """How many of each."""
        parser.add_argument("--books", type=int, default=1200, help="books (default: %(default)s)")
        parser.add_argument(
            "--orders",
            type=int,
            default=40_000,
            help="orders, with 2.5 lines each on average (default: %(default)s)",
        )
        parser.add_argument("--database", choices=sorted(connections), default=DEFAULT_DB_ALIAS)
        parser.add_argument("--flush", action="store_true", help="empty the shop first")

    def handle(
        self, *args: Any, books: int, orders: int, database: str, flush: bool, **options: Any
    ) -> None:
        """Write everything in one transaction, or nothing."""
        if books < 1 or orders < 0:
            raise CommandError("--books is at least 1 and --orders at least 0")
        with transaction.atomic(using=database):
            if flush:
                empty(database)
            if Book.objects.using(database).exists():
                self.stdout.write("The shop has books already; use --flush to start again.")
                return
            with progress() as bars:
                Seed(database, bars).fill(books, orders)
        self.stdout.write(f"Seeded {books} books and {orders} orders.")


def progress() -> Progress:
    """A bar for each table, on standard error; nothing when that is not a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=console, disable=not console.is_terminal)


def empty(database: str) -> None:
    """Delete everything that the shop has."""
    for model in (OrderLine, Order, Customer, Stock, Book, Author):
        # Nothing depends on these rows any more, so no need to load them first.
        model._default_manager.using(database)._raw_delete(database)


class Seed:
    """Makes the rows; every choice comes from one seeded generator."""

    def __init__(self, database: str, bars: Progress) -> None:
        self._database, self._bars = database, bars
        self._random = random.Random(20)

    def fill(self, books: int, orders: int) -> None:
        """Make and save everything, parents first."""
        authors = self._save("authors", Author, self._authors(max(1, books // 4)))
        saved = self._save("books", Book, self._books(authors, books))
        self._save("stock", Stock, self._stock(saved))
        customers = self._save("customers", Customer, self._customers(max(1, orders // 8)))
        placed = self._save("orders", Order, self._orders(customers, orders))
        self._save("order lines", OrderLine, self._lines(placed, saved))

    def _save(self, name: str, model: type[M], rows: list[M]) -> list[M]:
        bar = self._bars.add_task(name, total=len(rows))
        for batch in batches(rows, BATCH):
            model._default_manager.using(self._database).bulk_create(batch)
            self._bars.advance(bar, len(batch))
        return self._with_keys(model, rows)

    def _with_keys(self, model: type[M], rows: list[M]) -> list[M]:
        # MySQL returns no keys for a bulk insert; the table was empty, so they are in order.
        if rows and rows[0].pk is None:
            saved = model._default_manager.using(self._database)
            keys = saved.order_by("pk").values_list("pk", flat=True)
            for row, key in zip(rows, keys, strict=True):
                row.pk = key
        return rows

    def _authors(self, count: int) -> list[Author]:
        names = unique(self._name, count)
        return [Author(name=name, born=self._random.randint(1860, 1998)) for name in names]

    def _books(self, authors: list[Author], count: int) -> list[Book]:
        return [
            Book(
                title=self._phrase(words.TITLES),
                author=self._random.choice(authors),
                isbn=isbn(number),
                price=Decimal(self._random.randrange(690, 4200, 50) + 49) / 100,
                published=date(1900, 1, 1) + timedelta(days=self._random.randrange(45_000)),
                about=self._sentence(),
            )
            for number in range(1, count + 1)
        ]

    def _stock(self, books: list[Book]) -> list[Stock]:
        return [
            Stock(book=book, place=place, quantity=self._random.choice(amounts))
            for book in books
            for place, amounts in (
                (Stock.Place.SHOP, (0, 2, 3, 5, 8, 12, 20)),
                (Stock.Place.WAREHOUSE, (20, 50, 100, 250)),
            )
        ]

    def _customers(self, count: int) -> list[Customer]:
        return [
            Customer(name=self._name(), email=f"reader{number}@example.com", joined=self._moment())
            for number in range(1, count + 1)
        ]

    def _orders(self, customers: list[Customer], count: int) -> list[Order]:
        moments = sorted(self._moment() for _ in range(count))
        return [
            Order(
                customer=self._random.choice(customers),
                placed=moment,
                note=self._random.choice(words.NOTES),
            )
            for moment in moments
        ]

    def _lines(self, orders: list[Order], books: list[Book]) -> list[OrderLine]:
        lines = []
        for number, order in enumerate(orders):
            for _ in range(1 + number % 4):
                book = self._random.choice(books)
                copies = self._random.choice((1, 1, 1, 2, 3))
                lines.append(OrderLine(order=order, book=book, quantity=copies, price=book.price))
        return lines

    def _name(self) -> str:
        return f"{self._random.choice(words.FIRST_NAMES)} {self._random.choice(words.LAST_NAMES)}"

    def _phrase(self, patterns: tuple[str, ...]) -> str:
        noun, noun2 = self._random.sample(words.NOUNS, 2)
        return with_article(
            self._random.choice(patterns).format(
                adjective=self._random.choice(words.ADJECTIVES),
                noun=noun,
                noun2=noun2,
                place=self._random.choice(words.PLACES),
            )
        )

    def _sentence(self) -> str:
        return with_article(
            self._random.choice(words.ABOUT).format(
                adjective=self._random.choice(words.ADJECTIVES).lower(),
                noun=self._random.choice(words.NOUNS).lower(),
                place=self._random.choice(words.PLACES),
            )
        )

    def _moment(self) -> datetime:
        return NEWEST - timedelta(seconds=self._random.randrange(2 * 365 * 86_400))


def unique(make: Callable[[], str], count: int) -> list[str]:
    """That many different texts; a number is added to one that came up before."""
    seen: dict[str, int] = {}
    texts = []
    for _ in range(count):
        text = make()
        seen[text] = seen.get(text, 0) + 1
        texts.append(text if seen[text] == 1 else f"{text} {roman(seen[text])}")
    return texts


def roman(number: int) -> str:
    """A number as Roman numerals."""
    values = (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1)
    text = ""
    for value, letters in zip(
        values, ["M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"], strict=True
    ):
        text += letters * (number // value)
        number %= value
    return text


def with_article(text: str) -> str:
    """The text with "an" instead of "a" where English wants it."""
    return re.sub(r"\b([Aa]) (?=[aeiou]|hon|hour)", r"\1n ", text, flags=re.IGNORECASE)


def isbn(number: int) -> str:
    """The ISBN-13 with this number, with its check digit."""
    body = f"978{number:09d}"
    weighted = sum(int(digit) * (3 if place % 2 else 1) for place, digit in enumerate(body))
    return f"{body}{-weighted % 10}"


def batches(rows: Iterable[M], size: int) -> Iterator[list[M]]:
    """The rows in lists of at most `size`."""
    iterator = iter(rows)
    while batch := list(islice(iterator, size)):
        yield batch
