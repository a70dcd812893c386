"""The pytest plugin: sessions work in the transaction of pytest-django's `db`, and fixtures.

Nothing of Django is imported before a test asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from django.test import AsyncClient

    from .interface import Databases
    from .session.session import Session
    from .testing.queries import ExpectedQueries
    from .testing.sharing import Sharing

# pytest-django's fixture behind `db`, `transactional_db` and the mark `django_db`.
BEHIND_DB = "_django_db_helper"
# Those of its fixtures, and of its mark's arguments, that mean real transactions.
TRANSACTIONAL_FIXTURES = {"transactional_db", "django_db_reset_sequences", "live_server"}
TRANSACTIONAL_ARGUMENTS = ("transaction", "reset_sequences")


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(
    fixturedef: pytest.FixtureDef[Any], request: pytest.FixtureRequest
) -> Generator[None, Any, Any]:
    """Share the connections before pytest-django begins its transactions; settle before it rolls
    them back, or close before it empties the tables."""
    if fixturedef.argname != BEHIND_DB or _is_unittest(request):
        return (yield)
    if _has_real_transactions(request):
        from .testing.sharing import RealSessions

        sessions = RealSessions()
        result = yield
        fixturedef.addfinalizer(sessions.end)
        return result
    sharing = request.getfixturevalue("_asyncsession_sharing")
    result = yield
    fixturedef.addfinalizer(sharing.settle)
    return result


def _is_unittest(request: pytest.FixtureRequest) -> bool:
    """Whether the test is one of Django's unittest classes, which have transactions of their
    own."""
    return hasattr(getattr(request.node, "cls", None), "_pre_setup")


def _has_real_transactions(request: pytest.FixtureRequest) -> bool:
    if TRANSACTIONAL_FIXTURES & set(request.fixturenames):
        return True
    mark = request.node.get_closest_marker("django_db")
    if mark is None:
        return False
    given = {**dict(zip(TRANSACTIONAL_ARGUMENTS, mark.args, strict=False)), **mark.kwargs}
    return any(given.get(name) for name in TRANSACTIONAL_ARGUMENTS)


@pytest.fixture(scope="session")
def _asyncsession_shared(django_db_setup: None) -> Generator[None]:
    """Closes the shared connections before the databases are dropped."""
    from .testing.sharing import close_shared

    yield
    close_shared()


@pytest.fixture
def _asyncsession_sharing(_asyncsession_shared: None) -> Generator[Sharing]:
    """Shares the connections until pytest-django has rolled back."""
    from .testing.sharing import Sharing

    sharing = Sharing()
    sharing.begin()
    yield sharing
    sharing.end()


@pytest.fixture
def async_databases(db: Any, _django_db_helper: None) -> Databases:
    """`django_asyncsession.databases`, for a test that may use the databases."""
    # By the name `db` pytest-django knows which databases to make; a project may have its own.
    from .interface import databases

    return databases


@pytest.fixture
def async_session(async_databases: Databases) -> Generator[Session]:
    """A session of the database that the middleware uses. It needs no `begin()`, sessions of the
    code under test nest in it, and what it did is rolled back."""
    from .testing.cases import own_session

    session = own_session()
    yield session
    session.end()


@pytest.fixture
def async_client_native(async_databases: Databases) -> Generator[AsyncClient]:
    """Django's `AsyncClient`, with native mode on: Django's own async methods in views run in the
    session of the request, without threads."""
    from django.conf import settings
    from django.test import AsyncClient, override_settings

    given = getattr(settings, "ASYNC_SESSION", {})
    with override_settings(ASYNC_SESSION={**given, "NATIVE_ORM": True}):
        yield AsyncClient()


@pytest.fixture
def async_assert_num_queries(async_databases: Databases) -> Callable[..., ExpectedQueries]:
    """`django_asyncsession.testing.async_assert_num_queries`."""
    from .testing.queries import async_assert_num_queries

    return async_assert_num_queries
