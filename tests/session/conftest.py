"""What tests of sessions share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from django.db import connections

from tests.faults import watchdog
from tests.session.leaky import PG_SCHEMA


@pytest.fixture
def never_frozen() -> Iterator[None]:
    """Ends the process when a test froze its loop."""
    with watchdog(110):
        yield


@pytest.fixture(scope="module")
def leaky_postgresql(test_databases: None, django_db_blocker: Any) -> Any:
    with django_db_blocker.unblock(), connections["default"].cursor() as cursor:
        cursor.execute(PG_SCHEMA)
    connections["default"].close()
    yield
    with django_db_blocker.unblock(), connections["default"].cursor() as cursor:
        cursor.execute("DROP SCHEMA leaky CASCADE")
    connections["default"].close()
