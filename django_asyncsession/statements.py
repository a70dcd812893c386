"""What is checked of SQL text and names before anything is sent."""

from __future__ import annotations

import re
from typing import Any

import sqlparse

from .exceptions import MultipleStatements

# A savepoint name is quoted, so what could end the quotes is refused; PostgreSQL cuts names at 63
# bytes.
SAVEPOINT_NAME = re.compile(r"""[^"'`\x00\\%]{1,63}""")


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
    statements = [s for s in sqlparse.split(sql) if s.strip().strip(";").strip()]
    if len(statements) > 1:
        raise MultipleStatements(
            f"{len(statements)} statements where one is taken; use execute_script() for scripts"
        )


def check_savepoint_name(name: str) -> None:
    """Refuse a name that could not be quoted safely.

    Raises:
        ValueError: quotes, backslash, percent sign or NUL in the name, or more than 63 characters.
    """
    if not SAVEPOINT_NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} cannot name a savepoint; use 1 to 63 characters without quotes, backslash, "
            "% and NUL"
        )
