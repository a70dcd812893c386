"""What is asked of SQL text, and checked of names, before anything is sent.

How many statements a text has is decided by the database; what is found here says it sooner, and
better.
"""

from __future__ import annotations

import re
from contextvars import ContextVar
from typing import Any, Protocol

from .exceptions import MultipleStatements
from .scanner import Scanner, cached_by_text, scanner

# A savepoint name is quoted, so what could end the quotes is refused.
SAVEPOINT_NAME = re.compile(r"""[^"'`\x00\\%]+""")
# PostgreSQL cuts names here, and two long ones would be the same.
MAX_NAME_BYTES = 63
# Statements are counted up to this many.
MAX_COUNT = 100
# Statements that neither write nor set anything.
READS = (
    frozenset({"ABORT", "BEGIN", "CLOSE", "COMMIT", "DECLARE", "DESC", "DESCRIBE", "END"})
    | {"EXPLAIN", "FETCH", "MOVE", "PRAGMA", "RELEASE", "ROLLBACK", "SAVEPOINT", "SELECT", "SHOW"}
    | {"START", "TABLE", "VALUES", "WITH"}
)
# What makes one of them write, set or lock something all the same.
CHANGES = re.compile(
    r"\bfor\s++(?:no\s++key\s++)?+(?:update|share)\b|\bfor\s++key\s++share\b"
    r"|\block\s++in\s++share\b|\bset_config\s*+\(",
    re.IGNORECASE,
)
WRITES = re.compile(r"\b(?:insert\s++into|update|delete\s++from|merge\s++into)\b", re.IGNORECASE)
ANALYZE = re.compile(r"\banalyze\b", re.IGNORECASE)
# Without any of these words in it, wherever, a text has nothing of the above.
CHANGE_WORDS = "update", "share", "set_config", "insert", "delete", "merge", "analyze"
# Words that begin or end a transaction.
TRANSACTION_CONTROL = frozenset(
    {"ABORT", "BEGIN", "COMMIT", "END", "RELEASE", "ROLLBACK", "SAVEPOINT", "START"}
) | {"XA"}
# A cursor on the server takes these, unless one of the words below makes them write.
QUERIES = frozenset({"SELECT", "TABLE", "VALUES", "WITH"})
QUERY_WRITES = re.compile(r"(?<![\w$])(?:delete|insert|into|merge|update)(?![\w$])", re.IGNORECASE)
WRITE_WORDS = "delete", "insert", "into", "merge", "update"


@cached_by_text
def change_in(sql: str, reader: Scanner) -> str:
    """The first word, in capitals, of a statement that writes, locks or sets something; empty for
    one that only reads, as far as its text tells: it cannot tell what a function does."""
    first = reader.first_word(sql)
    if not first:
        return "SQL" if next(reader.statements(sql), None) else ""
    if first not in READS:
        return first
    if first != "PRAGMA" and not has_any(sql, CHANGE_WORDS):
        return ""
    text = reader.bare(sql)
    changes = CHANGES.search(text) is not None
    if first in ("WITH", "EXPLAIN"):
        changes = changes or WRITES.search(text) is not None
    if first == "EXPLAIN":
        changes = changes or ANALYZE.search(text) is not None
    elif first == "PRAGMA":
        changes = changes or "=" in text.partition("(")[0]
    return first if changes else ""


def has_any(sql: str, words: tuple[str, ...]) -> bool:
    """Whether one of the words may be in the text: much sooner told than where it stands."""
    text = sql.lower()
    return any(word in text for word in words)


LOCKS = re.compile(
    r"\bfor\s++(?:(?:no\s++key\s++)?+update|(?:key\s++)?+share)\b|\block\s++in\s++share\b"
    r"|\A\s*+lock\b",
    re.IGNORECASE,
)
LOCK_WORDS = "update", "share", "lock"


def locks(sql: str, vendor: str) -> bool:
    """Whether a statement locks rows or tables, as far as its text tells."""
    return has_any(sql, LOCK_WORDS) and LOCKS.search(scanner(vendor).bare(sql)) is not None


class Reads(Protocol):
    """Reads that run at the same time, on connections that may not lock."""

    is_over: bool

    def check(self, sql: str, alias: str, vendor: str) -> None:
        """Refuse a statement that is no read.

        Raises:
            SessionStateError: it locks something.
        """


# The reads that the sync code of this context belongs to.
reading: ContextVar[Reads | None] = ContextVar("reading", default=None)


def check_one_statement(sql: Any, vendor: str) -> None:
    """Refuse text with more than one statement.

    Raises:
        TypeError: `sql` is neither a string nor composed by the driver.
        MultipleStatements: more than one statement.
    """
    if not isinstance(sql, str):
        if not hasattr(sql, "as_string"):
            raise TypeError(f"SQL must be a string, not {type(sql).__name__}")
        return
    if ";" not in sql.rstrip().rstrip(";"):
        return
    found = scanner(vendor).statements(sql)
    count = sum(1 for _ in zip(range(MAX_COUNT), found, strict=False))
    if count > 1:
        or_more = " or more" if count == MAX_COUNT else ""
        raise MultipleStatements(
            f"{count}{or_more} statements where one is taken; use execute_script() for scripts"
        )


def controls_transaction(sql: str, reader: Scanner) -> str | None:
    """The word with which this statement would begin or end a transaction, or None."""
    found = reader.opening(sql, 4)
    if not found:
        return None
    if found[0] in TRANSACTION_CONTROL:
        return found[0]
    if found[0] == "SET" and "TRANSACTION" in found[1:4]:
        return "SET TRANSACTION"
    if found[:2] == ["PREPARE", "TRANSACTION"]:
        return "PREPARE TRANSACTION"
    return None


def is_query(sql: str, reader: Scanner) -> bool:
    """Whether the statement only reads, so that a cursor on the server can run it."""
    if reader.first_word(sql) not in QUERIES:
        return False
    return not has_any(sql, WRITE_WORDS) or QUERY_WRITES.search(reader.bare(sql)) is None


def check_savepoint_name(name: str) -> None:
    """Refuse a name that could not be quoted safely.

    Raises:
        ValueError: quotes, backslash, percent sign or NUL in the name, or more than 63 bytes.
    """
    if not SAVEPOINT_NAME.fullmatch(name) or len(name.encode()) > MAX_NAME_BYTES:
        raise ValueError(
            f"{name!r} cannot name a savepoint; use 1 to {MAX_NAME_BYTES} bytes without quotes, "
            "backslash, % and NUL"
        )
