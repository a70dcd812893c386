"""The competitors, by the order in which tables show them."""

from __future__ import annotations

from importlib import import_module

from benchmarks.competitors.base import Competitor

UNIT = "psycopg"
# Name, as an option has it: module and class.
POSTGRESQL = {
    "psycopg": "raw_psycopg.RawPsycopg",
    "session": "session.SessionCompetitor",
    "transaction": "session.TransactionCompetitor",
    "native": "native.Native",
    "run_sync": "native.RunSync",
    "asyncpg": "raw_asyncpg.RawAsyncpg",
    "django": "django_threads.DjangoThreads",
    "django_one": "django_threads.DjangoOneThread",
    "backend": "django_async_backend.DjangoAsyncBackend",
    "sqlalchemy_asyncpg": "sqlalchemy.SQLAlchemyAsyncpg",
    "sqlalchemy_psycopg": "sqlalchemy.SQLAlchemyPsycopg",
    "tortoise": "tortoise.Tortoise",
    "piccolo": "piccolo.Piccolo",
}
MARIADB = {
    "asyncmy": "mariadb.RawAsyncmy",
    "session": "mariadb.MariaDBSession",
    "sqlalchemy": "mariadb.SQLAlchemyAsyncmy",
}
SQLITE = {
    "hop": "sqlite.Hop",
    "session": "sqlite.SQLiteSession",
    "aiosqlite": "sqlite.Aiosqlite",
    "sqlalchemy": "sqlite.SQLAlchemyAiosqlite",
}


def load(where: str) -> type[Competitor]:
    """The class of a competitor; what it needs is imported when its pool is opened."""
    module, name = where.split(".")
    found: type[Competitor] = getattr(import_module(f"{__name__}.{module}"), name)
    return found
