"""The works that competitors do: how often in a turn, and what each result must be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks import rows


class Written(Protocol):
    """Where the table of drafts is."""

    def refill(self) -> None:
        """Empty it, and write the rows that are there before each turn."""

    def written(self) -> tuple[int, int]:
        """How many rows there are, and the sum of their pages."""


class WrongResult(Exception):
    """A competitor did not do the work that it was measured at."""


@dataclass(frozen=True)
class Work:
    """One work.

    Attributes:
        name: as options and files name it, and the name of the competitors' method.
        title: as tables show it.
        operations: how many are done in a turn, by all tasks together.
        check: is given a client, the operation's number and its result; raises WrongResult.
        drafts: rows that one operation adds to the table of drafts.
    """

    name: str
    title: str
    operations: int
    check: Callable[[Any, int, Any], None]
    drafts: int = 0
    updates: bool = False

    @property
    def writes(self) -> bool:
        """Whether the table of drafts is filled anew before each turn."""
        return bool(self.drafts or self.updates)


def _must_be(found: Any, wanted: Any) -> None:
    if found != wanted:
        raise WrongResult(f"{_short(found)} where {_short(wanted)} is right")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 200 else f"{text[:200]} ..."


def _books_of(key: int) -> range:
    return range((key - 1) * rows.BOOKS_EACH + 1, key * rows.BOOKS_EACH + 1)


def _check_book(client: Any, number: int, found: Any) -> None:
    _must_be(client.plain(found, rows.BOOK), rows.book(rows.book_key(number)))


def _check_count(client: Any, number: int, found: Any) -> None:
    _must_be(found, rows.BOOKS_EACH)


def _check_filter(client: Any, number: int, found: Any) -> None:
    wanted = [rows.book(key) for key in _books_of(rows.author_key(number))]
    _must_be([client.plain(row, rows.BOOK) for row in found], wanted)


def _check_related(client: Any, number: int, found: Any) -> None:
    pages = rows.author_key(number)
    keys = range(pages, rows.BOOKS + 1, rows.BOOKS_EACH)
    wanted = [(rows.book(key), rows.author(rows.book(key)[2])) for key in keys]
    _must_be([client.with_author(row) for row in found], wanted)


def _check_prefetch(client: Any, number: int, found: Any) -> None:
    first = rows.first_of_ten(number)
    wanted = [
        (rows.author(key), [rows.book(of) for of in _books_of(key)])
        for key in range(first, first + 10)
    ]
    _must_be([client.with_books(row) for row in found], wanted)


def _check_values(client: Any, number: int, found: Any) -> None:
    first = rows.first_of_thousand(number)
    wanted = [rows.book(key) for key in range(first, first + 1_000)]
    _must_be([tuple(row) for row in found], [(b[0], b[1], b[3], b[4]) for b in wanted])


def _check_inserted(client: Any, number: int, found: Any) -> None:
    if type(found) is not int or found <= rows.DRAFTS:
        raise WrongResult(f"{_short(found)} is not the key of a new row")


def _check_updated(client: Any, number: int, found: Any) -> None:
    _must_be(found, 1)


def _check_transaction(client: Any, number: int, found: Any) -> None:
    book, author, draft = found
    wanted = rows.book(rows.book_key(number))
    _must_be(client.plain(book, rows.BOOK), wanted)
    _must_be(client.plain(author, rows.AUTHOR), rows.author(wanted[2]))
    values = rows.draft(number) | {"pages": number + 1}
    _must_be(client.plain(draft, rows.DRAFT)[1:], tuple(values.values()))


def _check_nothing(client: Any, number: int, found: Any) -> None:
    """The table tells: see `check_written`."""


def check_written(work: Work, operations: int, written: tuple[int, int]) -> None:
    """Check what a turn has left in the table of drafts.

    Args:
        work: what was done.
        operations: how often.
        written: how many rows the table has, and the sum of their pages.

    Raises:
        WrongResult: it is not what the work leaves.
    """
    _must_be(written, expected_drafts(work, operations))


def expected_drafts(work: Work, operations: int) -> tuple[int, int]:
    """How many rows the table of drafts has after a turn, and the sum of their pages."""
    pages = {rows.draft_key(number): number for number in range(rows.DRAFTS)}
    if work.updates:
        pages |= {rows.draft_key(number): number + 1 for number in range(operations)}
    count, total = rows.DRAFTS, sum(pages.values())
    if work.name == "transaction":
        return count + operations, total + sum(range(1, operations + 1))
    added = operations * work.drafts
    return count + added, total + sum(range(added))


WORKS = {
    work.name: work
    for work in (
        Work("get", "get by key", 400, _check_book),
        Work("raw", "raw SQL by key", 400, _check_book),
        Work("count", "count", 400, _check_count),
        Work("filter", "filter 100", 80, _check_filter),
        Work("related", "select_related 100", 60, _check_related),
        Work("prefetch", "prefetch 10 x 100", 20, _check_prefetch),
        Work("values", "1,000 rows as values", 20, _check_values),
        Work("insert", "insert one", 200, _check_inserted, drafts=1),
        Work("update", "update one", 200, _check_updated, updates=True),
        Work("transaction", "transaction of five", 100, _check_transaction, drafts=1),
        Work("insert_many", "insert 1,000", 20, _check_nothing, drafts=1_000),
    )
}
