"""The database of the benchmarks on PostgreSQL: made, filled, looked at, dropped."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import psycopg
from psycopg import sql

from benchmarks import rows

# The client is measured and not the disk: the same for all.
SETTINGS = ("synchronous_commit = off", "jit = off")
# Connections that are left for others who use the server.
SPARE = 5
DRAFTS = sql.SQL(
    "INSERT INTO benchmarks_draft (title, pages, price, published) "
    "SELECT 'Draft ' || n, n, (100 + n %% 9900) / 100.0, DATE '2020-01-01' + n %% 365 "
    "FROM generate_series(0, %s - 1) AS n ORDER BY n"
)


def url(scheme: str = "postgresql", alias: str = "default", name: str | None = None) -> str:
    """The URL of an alias's database, for libraries that take one.

    Args:
        scheme: what stands before `://`.
        alias: of Django's settings.
        name: of another database on the same server.
    """
    from django.conf import settings

    entry = settings.DATABASES[alias]
    user, password = quote(entry["USER"], safe=""), quote(entry["PASSWORD"], safe="")
    place = f"{entry['HOST']}:{entry['PORT']}" if entry["PORT"] else entry["HOST"]
    whose = f"{user}:{password}" if password else user
    return f"{scheme}://{whose}@{place}/{name or entry['NAME']}"


class Database:
    """The database, and one connection to it that no competitor uses."""

    def __init__(self) -> None:
        from django.conf import settings

        self.name: str = settings.DATABASES["default"]["NAME"]
        self.connection: psycopg.Connection[Any]

    def __enter__(self) -> Database:
        self._on_server("DROP DATABASE IF EXISTS {} WITH (FORCE)", "CREATE DATABASE {}")
        for setting in SETTINGS:
            self._on_server(f"ALTER DATABASE {{}} SET {setting}")
        try:
            _create_tables("default")
            self.connection = psycopg.connect(url(), autocommit=True)
            self.connection.execute("SET lock_timeout = '20s'")
            self._fill()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        if hasattr(self, "connection"):
            self.connection.close()
        # Threads of Django's own async ORM may still be connected.
        self._on_server("DROP DATABASE IF EXISTS {} WITH (FORCE)")

    def _on_server(self, *statements: Any) -> None:
        with psycopg.connect(url(name="postgres"), autocommit=True) as connection:
            for statement in statements:
                connection.execute(sql.SQL(statement).format(sql.Identifier(self.name)))

    def _fill(self) -> None:
        with self.connection.cursor() as cursor:
            with cursor.copy("COPY benchmarks_author (id, name, born) FROM STDIN") as copy:
                for key in range(1, rows.AUTHORS + 1):
                    copy.write_row(rows.author(key))
            columns = ", ".join(rows.BOOK)
            with cursor.copy(f"COPY benchmarks_book ({columns}) FROM STDIN") as copy:
                for key in range(1, rows.BOOKS + 1):
                    copy.write_row(rows.book(key))
        self.refill()
        self.connection.execute("VACUUM ANALYZE")

    def refill(self, drafts: int = rows.DRAFTS) -> None:
        """Empty the table of drafts, and write these many anew, with keys from 1 on."""
        self.connection.execute("TRUNCATE benchmarks_draft RESTART IDENTITY")
        self.connection.execute(DRAFTS, [drafts])

    def written(self) -> tuple[int, int]:
        """How many drafts there are, and the sum of their pages."""
        row = self.connection.execute("SELECT count(*), sum(pages) FROM benchmarks_draft")
        found = row.fetchone()
        assert found is not None
        return int(found[0]), int(found[1])

    def room(self) -> int:
        """How many further connections the server takes now, without the last ones."""
        row = self.connection.execute(
            "SELECT current_setting('max_connections')::int "
            "- current_setting('superuser_reserved_connections')::int "
            "- (SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend')"
        ).fetchone()
        assert row is not None
        return int(row[0]) - SPARE

    def version(self) -> str:
        """The server's version, such as "15.8"."""
        number = self.connection.info.server_version
        return f"{number // 10_000}.{number % 10_000}"


def _create_tables(alias: str) -> None:
    from django.db import connections

    from benchmarks.models import Author, Book, Draft

    with connections[alias].schema_editor() as editor:
        for model in (Author, Book, Draft):
            editor.create_model(model)
    connections[alias].close()
