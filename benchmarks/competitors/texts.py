"""The SQL of competitors without an ORM, with each driver's placeholders."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace

from benchmarks import rows

_BOOK = ", ".join(rows.BOOK)
_BOTH = ", ".join([f"b.{name}" for name in rows.BOOK] + [f"a.{name}" for name in rows.AUTHOR])
_INSERT = "INSERT INTO benchmarks_draft (title, pages, price, published) VALUES (%s, %s, %s, %s)"


@dataclass(frozen=True)
class Texts:
    """One statement for each work, and those that works are made of."""

    book: str = f"SELECT {_BOOK} FROM benchmarks_book WHERE id = %s"
    author: str = "SELECT id, name, born FROM benchmarks_author WHERE id = %s"
    draft: str = "SELECT id, title, pages, price, published FROM benchmarks_draft WHERE id = %s"
    count: str = "SELECT count(*) FROM benchmarks_book WHERE author_id = %s"
    filter: str = f"SELECT {_BOOK} FROM benchmarks_book WHERE author_id = %s ORDER BY id"
    related: str = (
        f"SELECT {_BOTH} FROM benchmarks_book b JOIN benchmarks_author a ON a.id = b.author_id "
        "WHERE b.pages = %s ORDER BY b.id"
    )
    authors: str = (
        "SELECT id, name, born FROM benchmarks_author WHERE id >= %s AND id < %s ORDER BY id"
    )
    books_of: str = f"SELECT {_BOOK} FROM benchmarks_book WHERE author_id = ANY(%s)"
    values: str = (
        "SELECT id, title, pages, price FROM benchmarks_book WHERE id >= %s AND id < %s ORDER BY id"
    )
    insert: str = f"{_INSERT} RETURNING id"
    copy: str = "COPY benchmarks_draft (title, pages, price, published) FROM STDIN"
    update: str = "UPDATE benchmarks_draft SET pages = %s WHERE id = %s"
    many: str = f"SELECT {_BOOK} FROM benchmarks_book LIMIT %s"
    stream: str = "SELECT id, title, pages, price, published FROM benchmarks_draft LIMIT %s"


def _numbered(sql: str) -> str:
    parts = re.split("%s", sql)
    return "".join([parts[0], *(f"${at}{part}" for at, part in enumerate(parts[1:], 1))])


PSYCOPG = Texts()
ASYNCPG = replace(PSYCOPG, **{f.name: _numbered(getattr(PSYCOPG, f.name)) for f in fields(Texts)})
