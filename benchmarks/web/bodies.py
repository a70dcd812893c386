"""What the views answer, and what each answer is checked against."""

from __future__ import annotations

from typing import Any

from benchmarks import rows

KEY, AUTHOR = 4_711, 17
# Name of a work: its path.
PATHS = {"get": f"/books/{KEY}", "list": f"/authors/{AUTHOR}/books"}
TITLES = {"get": "get by key", "list": "list 100"}


def body(book: Any) -> dict[str, Any]:
    """A book as JSON has it."""
    return {
        "id": book.id,
        "title": book.title,
        "author": book.author_id,
        "pages": book.pages,
        "price": str(book.price),
        "published": book.published.isoformat(),
    }


def expected(work: str) -> dict[str, Any]:
    """The content that the answer to PATHS[work] must have."""
    if work == "get":
        return _expected_book(KEY)
    first = (AUTHOR - 1) * rows.BOOKS_EACH + 1
    return {"books": [_expected_book(key) for key in range(first, first + rows.BOOKS_EACH)]}


def _expected_book(key: int) -> dict[str, Any]:
    found = dict(zip(rows.BOOK, rows.book(key), strict=True))
    found["author"] = found.pop("author_id")
    return found | {"price": str(found["price"]), "published": found["published"].isoformat()}
