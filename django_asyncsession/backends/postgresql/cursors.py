"""Cursors that take one statement, and those that only read."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import psycopg


class ForOneStatement(psycopg.Cursor[Any] if TYPE_CHECKING else object):  # type: ignore[misc]
    """Lets the server refuse a text of several statements: the extended protocol takes one.

    Without a semicolon there is one, and the simple protocol costs less.
    """

    __slots__ = ()

    def _execute_send(
        self, query: Any, *, force_extended: bool = False, binary: bool | None = None
    ) -> None:
        extended = force_extended or b";" in query.query
        super()._execute_send(query, force_extended=extended, binary=binary)


class OnlyReading(ForOneStatement):
    """A cursor of a read-only session, Django's or the driver's: what would let it write is not
    sent."""

    __slots__ = ()

    def _execute_send(self, query: Any, **kwargs: Any) -> None:
        self._check(query)
        super()._execute_send(query, **kwargs)

    def _send_prepare(self, name: bytes, query: Any) -> None:
        self._check(query)
        super()._send_prepare(name, query)

    def _check(self, query: Any) -> None:
        connection: Any = self._conn
        if (wrapper := connection.wrapper()) is not None and not wrapper.own_use:
            wrapper.check_reads_only(query.query.decode(errors="replace"))


@cache
def _kept_to(kind: Any, rule: Any) -> Any:
    """The class of a cursor with a rule in front of it."""
    return kind if issubclass(kind, rule) else type(kind.__name__, (rule, kind), {"__slots__": ()})


def _only_reading(factory: Any) -> Any:
    """What makes cursors, kept to reading; a tool's may be no class."""
    if isinstance(factory, type):
        return _kept_to(factory, OnlyReading)

    def make(*args: Any, **kwargs: Any) -> Any:
        cursor = factory(*args, **kwargs)
        cursor.__class__ = _kept_to(cursor.__class__, OnlyReading)
        return cursor

    return make
