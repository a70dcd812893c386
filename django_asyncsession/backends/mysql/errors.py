"""asyncmy's errors as the MySQLdb classes that Django's backend catches."""

from __future__ import annotations

from typing import Any

import MySQLdb
from asyncmy import errors

SERVER_GONE, SERVER_LOST, OUT_OF_SYNC = 2006, 2013, 2014
# After these the server closes the connection: shutdown, packet too large, killed, idle for too
# long.
LAST_WORDS = frozenset({1053, 1152, 1153, 1154, 1155, 1156, 1157, 1158, 1159, 1160, 1161, 1927})
LAST_WORDS |= {SERVER_GONE, SERVER_LOST, OUT_OF_SYNC, 4031}
# Django takes these OperationalErrors for IntegrityErrors: the statement alone failed.
STATEMENT_ONLY = frozenset({1048, 1690, 3819, 4025})


def translated(error: errors.MySQLError) -> Any:
    """MySQLdb's error for asyncmy's; "not connected" is the server having gone away."""
    code = error.args[0] if error.args else 0
    if isinstance(error, errors.InterfaceError) and code == 0:
        return MySQLdb.OperationalError(SERVER_GONE, "MySQL server has gone away")
    if isinstance(error, errors.InternalError) and not isinstance(code, int):
        # "Packet sequence number wrong", without a code.
        return MySQLdb.OperationalError(SERVER_LOST, f"connection out of step: {code}")
    kind = getattr(MySQLdb, type(error).__name__, MySQLdb.DatabaseError)
    return kind(*error.args)


def is_last_word(error: errors.MySQLError) -> bool:
    """Whether the connection cannot be used after this error; those of the server leave it usable,
    but for a few."""
    code = error.args[0] if error.args else None
    return not isinstance(code, int) or code in LAST_WORDS or code < 1000
