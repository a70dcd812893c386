"""What is checked of SQL text and names before anything is sent."""

from __future__ import annotations

import re
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Protocol

import sqlparse

from .exceptions import MultipleStatements
from .scanner import scanner

# A savepoint name is quoted, so what could end the quotes is refused.
SAVEPOINT_NAME = re.compile(r"""[^"'`\x00\\%]+""")
# PostgreSQL cuts names here, and two long ones would be the same.
MAX_NAME_BYTES = 63
# Nothing but comments; what MySQL runs although it looks like a comment, /*! ... */, is none.
NO_STATEMENT = re.compile(r"(?:[\s;]|--[^\n]*|#[^\n]*|/\*(?!M?!).*?\*/)*", re.DOTALL)
# One token of SQL as the standard, and PostgreSQL, read it: no backslash escapes in '...', only in
# E'...'.
TOKEN = re.compile(
    r"""(?P<nothing>\s+|--[^\n]*|/\*(?!M?!).*?\*/)|(?P<end>;)|\b[eE]'(?:[^'\\]|\\.|'')*'|'(?:[^']|'')*'
    |"(?:[^"]|"")*"|`[^`]*`|\$(?P<tag>\w*)\$.*?\$(?P=tag)\$|\w+|.""",
    re.DOTALL | re.VERBOSE,
)
# Statements that neither write nor set anything.
READS = (
    frozenset({"abort", "begin", "close", "commit", "declare", "desc", "describe", "end"})
    | {"explain", "fetch", "move", "pragma", "release", "rollback", "savepoint", "select", "show"}
    | {"start", "table", "values", "with"}
)
# What makes one of them write, set or lock something all the same.
CHANGES = re.compile(
    r"\bfor\s+(?:no\s+key\s+)?(?:update|share)\b|\bfor\s+key\s+share\b|\block\s+in\s+share\b"
    r"|\bset_config\s*\(|\A\s*pragma\b[^=(]*=|\A\s*explain\b.*\banalyze\b"
    r"|\A\s*(?:with|explain)\b.*\b(?:insert\s+into|update|delete\s+from|merge\s+into)\b",
    re.IGNORECASE | re.DOTALL,
)
FIRST_WORD = re.compile(r"(?:[\s(]|--[^\n]*\n|#[^\n]*\n|/\*(?!M?!).*?\*/)*(\w+)", re.DOTALL)


@lru_cache(maxsize=4096)
def change_in(sql: str) -> str:
    """The first word, in capitals, of a statement that writes, locks or sets something; empty for
    one that only reads, as far as its text tells: it cannot tell what a function does."""
    first = FIRST_WORD.match(sql)
    if first is None:
        return "" if NO_STATEMENT.fullmatch(sql) else "SQL"
    if first[1].lower() in READS and CHANGES.search(sql) is None:
        return ""
    return first[1].upper()


LOCKS = re.compile(
    r"\bfor\s+(?:(?:no\s+key\s+)?update|(?:key\s+)?share)\b|\block\s+in\s+share\b|\A\s*lock\b",
    re.IGNORECASE,
)


def locks(sql: str, vendor: str) -> bool:
    """Whether a statement locks rows or tables, as far as its text tells."""
    return LOCKS.search(scanner(vendor).bare(sql)) is not None


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


def check_one_statement(sql: Any) -> None:
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
    count = len(split_script(sql))
    if "\\" in sql:
        # Databases differ in what a backslash does: it must be one statement in either reading.
        count = max(count, _count_standard(sql))
    if count > 1:
        raise MultipleStatements(
            f"{count} statements where one is taken; use execute_script() for scripts"
        )


def _count_standard(sql: str) -> int:
    count, begun = 0, False
    for token in TOKEN.finditer(sql):
        if token["end"]:
            begun = False
        elif token["nothing"] is None and not begun:
            count, begun = count + 1, True
    return count


def split_script(sql: str) -> list[str]:
    """The statements of a script, without those that are only comments."""
    return [part for part in sqlparse.split(sql) if not NO_STATEMENT.fullmatch(part)]


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
