"""Interfaces of PostgreSQL for their tests."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from django_asyncsession import DatabaseInterface
from tests.faults import OwnServer, watchdog
from tests.postgres import dsn_of_tests, gone, new_name


@pytest.fixture(autouse=True)
def _no_freeze() -> Iterator[None]:
    with watchdog(60):
        yield


@pytest.fixture(scope="module")
def own_server() -> Iterator[OwnServer]:
    """A server of this module's own, where `guarded` needs a password."""
    server = OwnServer()
    yield server
    server.stop()


@pytest.fixture
def name() -> str:
    """An application_name that only this test uses."""
    return new_name()


@pytest.fixture
async def db(name: str) -> AsyncIterator[DatabaseInterface]:
    """An interface of the test's own."""
    interface = DatabaseInterface.from_dsn(dsn_of_tests(application_name=name), alias="own")
    yield interface
    await interface.close()
    assert await gone(name)
