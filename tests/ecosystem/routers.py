"""For packages that ask the router, and not the rows, where to write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from django.test import override_settings


class Everything:
    """A router that sends everything to one database."""

    def __init__(self, alias: str) -> None:
        self._alias = alias

    def db_for_read(self, *args: Any, **hints: Any) -> str:
        """The one database."""
        return self._alias

    db_for_write = db_for_read


@contextmanager
def everything_on(alias: str) -> Iterator[None]:
    """Let the router send everything to this database."""
    with override_settings(DATABASE_ROUTERS=[Everything(alias)]):
        yield
