"""What asyncsql has to know about SQL before it runs it: how many statements, and of what kind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import sqlparse

# The command itself begins and ends the transaction.
_TRANSACTION_CONTROL: Final = {
    "ABORT",
    "BEGIN",
    "COMMIT",
    "END",
    "RELEASE",
    "ROLLBACK",
    "SAVEPOINT",
    "START",
    "XA",
}
# A cursor on the server takes these, unless one of the words below makes them write.
_QUERIES: Final = {"SELECT", "TABLE", "VALUES", "WITH"}
_WRITES: Final = {"DELETE", "INSERT", "INTO", "MERGE", "UPDATE"}


def split(sql: str) -> list[str]:
    """The statements of a script, without those that are only comments."""
    return [text.strip() for text in sqlparse.split(sql) if words(text)]


def words(sql: str) -> list[str]:
    """The words and signs of one statement in upper case, without comments and a last semicolon."""
    bare = sqlparse.format(sql, strip_comments=True).rstrip("; \t\r\n")
    tokens = [token for statement in sqlparse.parse(bare) for token in _tokens(statement)]
    return [token.normalized.upper() for token in tokens if not token.is_whitespace]


def _tokens(statement: Any) -> Iterator[Any]:
    # sqlparse has no types.
    yield from statement.flatten()


def controls_transaction(sql: str) -> str | None:
    """The word with which this statement would begin or end a transaction, or None."""
    found = words(sql)
    if not found:
        return None
    first = found[0].split()[0]
    if first in _TRANSACTION_CONTROL:
        return first
    if found[0] == "SET" and "TRANSACTION" in found[1:4]:
        return "SET TRANSACTION"
    if first == "PREPARE" and found[1:2] == ["TRANSACTION"]:
        return "PREPARE TRANSACTION"
    return None


def is_query(sql: str) -> bool:
    """Whether the statement only reads, so that a cursor on the server can run it."""
    found = words(sql)
    if not found:
        return False
    opening = next((word for word in found if word != "("), "")
    return opening in _QUERIES and not _WRITES.intersection(found)
