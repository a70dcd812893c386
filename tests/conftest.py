"""Fixtures that every test module shares: the databases, made once; a transaction on one of them,
rolled back; and real ones, with tables that are emptied after the test."""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator, Iterator

import pytest
from django.apps import apps
from django.conf import settings
from django.db import connections
from django.test import override_settings
from django.test.utils import setup_databases, teardown_databases
from pytest_django.plugin import DjangoDbBlocker

from django_asyncsession import DatabaseInterface, Session, databases

pytest_plugins = ["django_asyncsession.pytest_plugin", "pytester"]
ALIASES = {"default": "postgresql", "sqlite": "sqlite", "mysql": "mysql"}


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--pools`: also the tests that use the toolkit's transaction run on connections of the pools,
    and so with the drivers of production: on MySQL a test's connection has Django's."""
    parser.addoption("--pools", action="store_true", help="no test in the toolkit's transaction")


@pytest.fixture(scope="session")
def django_db_setup(
    request: pytest.FixtureRequest,
    django_test_environment: None,
    django_db_modify_db_settings: None,
    django_db_blocker: DjangoDbBlocker,
    django_db_createdb: bool,
    django_db_keepdb: bool,
) -> Iterator[None]:
    """Every database is made, whatever marks the tests have, which pytest-django would go by."""
    verbosity = request.config.option.verbose
    keep = django_db_keepdb and not django_db_createdb
    with django_db_blocker.unblock():
        made = setup_databases(verbosity, False, aliases=set(settings.DATABASES), keepdb=keep)
    # For the processes that tests start: in a parallel run each worker has databases of its own.
    os.environ["TEST_DATABASE_NAME"] = settings.DATABASES["default"]["NAME"]
    yield
    with django_db_blocker.unblock():
        gc.collect()
        if not django_db_keepdb:
            _end_other_sessions()
            teardown_databases(made, verbosity)


def _end_other_sessions() -> None:
    """A thread that a test ran Django's own code in keeps a connection, and so the database."""
    with connections["default"].cursor() as cursor:
        cursor.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )


@pytest.fixture(scope="session", autouse=True)
def test_databases(django_db_setup: None, django_db_blocker: DjangoDbBlocker) -> Iterator[None]:
    """Sessions commit for real on connections of their own, so access is open to every test."""
    # Each test collects its garbage, to hear of what it leaked; what is there now need not be seen.
    gc.collect()
    gc.freeze()
    with django_db_blocker.unblock():
        yield


@pytest.fixture(params=ALIASES, ids=ALIASES.values())
def alias(request: pytest.FixtureRequest) -> str:
    """Each database alias in turn; a test that uses it runs once on every database."""
    if request.param not in settings.DATABASES:
        missing = "no MySQL server: set TEST_MYSQL_URL, or run one on 127.0.0.1:3306"
        if os.environ.get("REQUIRE_DATABASES"):
            pytest.fail(missing)
        pytest.skip(missing)
    return str(request.param)


def tables(using: str) -> list[str]:
    """Names of the tables that tests write to, on the database of this alias."""
    every = apps.get_models(include_auto_created=True)
    models = [m for m in every if m._meta.managed and m._meta.can_migrate(connections[using])]
    return sorted({m._meta.db_table for m in models if m._meta.app_label in _EMPTIED})


_EMPTIED = {"tests", "auth", "admin", "sessions", "shop"}
_KEPT = {"auth_permission"}


def empty(using: str) -> None:
    """Delete all rows of the database of this alias, and start its keys anew."""
    connection = connections[using]
    quoted = [connection.ops.quote_name(name) for name in tables(using) if name not in _KEPT]
    asked = [
        f"SELECT {at} FROM (SELECT 1) AS one WHERE EXISTS (SELECT 1 FROM {name})"
        for at, name in enumerate(quoted)
    ]
    with connection.constraint_checks_disabled(), connection.cursor() as cursor:
        # Most tables have no rows, and emptying one takes ten times as long as asking.
        cursor.execute(" UNION ALL ".join(asked))
        used = [quoted[at] for (at,) in cursor.fetchall()]
        if connection.vendor == "postgresql" and used:
            cursor.execute("SET lock_timeout = '10s'")
            cursor.execute(f"TRUNCATE {', '.join(used)} RESTART IDENTITY CASCADE")
        else:
            for name in used:
                cursor.execute(f"DELETE FROM {name}")


# In one transaction, with the toolkit that the package has for tests: what most tests use.


@pytest.fixture
def database(alias: str, request: pytest.FixtureRequest) -> DatabaseInterface:
    """Each database in turn, in the transaction of the test: sync code, sessions and requests share
    it, and it is rolled back. For every test that is not about a commit or a connection of its
    own."""
    if request.config.option.pools:
        real: DatabaseInterface = request.getfixturevalue("real_database")
        return real
    request.applymarker(pytest.mark.django_db(databases=[alias]))
    request.getfixturevalue("db")
    return databases[alias]


@pytest.fixture
def session(database: DatabaseInterface, request: pytest.FixtureRequest) -> Session:
    """The toolkit's session of the test, on each database in turn."""
    if request.config.option.pools:
        real: Session = request.getfixturevalue("real_session")
        return real
    with override_settings(ASYNC_SESSION={"ALIAS": database.alias}):
        session: Session = request.getfixturevalue("async_session")
    return session


# With real commits on connections of the pools, for what the transaction of a test cannot show:
# what another connection sees, isolation, time limits, lost connections, the pool, the driver.


@pytest.fixture
def empty_tables() -> Iterator[None]:
    """Empties all tables after the test, for a test that commits."""
    yield
    for using in settings.DATABASES:
        empty(using)
    gc.collect()


@pytest.fixture
def empty_database(alias: str) -> Iterator[None]:
    """Empties the tables of the one database that the test writes to."""
    yield
    empty(alias)
    gc.collect()


@pytest.fixture
async def real_database(alias: str, empty_database: None) -> AsyncIterator[DatabaseInterface]:
    """Each database in turn, with real commits on connections of its pool, for a test that is about
    these; after it the tables are emptied and the pool is closed."""
    yield databases[alias]
    await databases[alias].close()


@pytest.fixture
async def real_session(alias: str) -> AsyncIterator[Session]:
    """A session on a connection of the pool, on each database in turn, for a test that is about the
    driver; what it writes is rolled back."""
    session = databases[alias].get_session()
    await session.begin()
    try:
        yield session
        await session.rollback()
    finally:
        await session.close()
        await databases[alias].close()
