"""SQLite: Django's own backend, each connection in a thread of its own.

Waiting for a lock is done here and not by SQLite, whose own wait cannot be interrupted.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from django.db.backends.sqlite3 import base

from django_asyncsession.backends import threaded
from django_asyncsession.backends.options import TransactionOptions, TransactionState
from django_asyncsession.backends.thread import DriverThread
from django_asyncsession.conf import settings
from django_asyncsession.scanner import Scanner, cached_by_text
from django_asyncsession.statements import change_in, reading

from .connection import (
    ASKING_PRAGMA,
    BEGIN,
    CHANGES_MORE,
    KEEPS_READS,
    KEPT_STATEMENTS,
    Connection,
    _code,
    _forget_locks,
    _keep,
    _last,
    _lines,
)

if TYPE_CHECKING:

    class _Base(base.DatabaseWrapper):
        """Django's names that are used here, which its type stubs leave out."""

        init_commands: list[str]
        transaction_mode: str | None

        def _start_transaction_under_autocommit(self) -> None: ...
        def _savepoint_rollback(self, sid: str) -> None: ...
        def _set_autocommit(self, autocommit: bool) -> None: ...

else:
    _Base = object

logger = logging.getLogger("django_asyncsession")


class Mixin(threaded.Mixin, _Base):
    """What bridges Django's SQLite wrapper, or one that derives from it."""

    # SQLite has no other; whoever asks for less gets it.
    isolation_levels = ("serializable",)
    unsupported_options = ("deferrable",)
    connection_class = Connection
    left_to_reset = threaded.Mixin.left_to_reset | {
        "_keeps_reads",
        "_own_savepoint",
    }
    _keeps_reads = False
    # The savepoint statement that runs is Django's.
    _own_savepoint = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Django's SQLite has no FOR UPDATE, and says nothing of a query that asks for it.
        self.ops.compiler = partial(_compiler, self.ops.compiler)  # type: ignore[method-assign]

    # Connecting

    def get_connection_params(self) -> dict[str, Any]:
        params: dict[str, Any] = super().get_connection_params()
        if params["database"] == ":memory:":
            # All sessions of the process share it, as they share a file.
            params["database"] = f"file:asyncsession_{self.alias}?mode=memory&cache=shared"
        return params

    def connect_driver(self, conn_params: dict[str, Any]) -> Any:
        name = str(conn_params["database"])
        if self.pooled and self.is_in_memory_db() and "memorydb_" not in name:
            _keep(name)
        raw = super().connect_driver(conn_params)
        try:
            self._prepare(raw)
        except BaseException:
            raw.close()
            raise
        return raw

    def _prepare(self, raw: sqlite3.Connection) -> None:
        """What a session's connection needs beyond Django's; runs in the thread."""
        if not self.pooled:
            return
        if self._wants_wal and raw.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            try:
                raw.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as exc:
                logger.info("%r stays without WAL mode: %s", self.alias, exc)

    @property
    def _wants_wal(self) -> bool:
        chosen = any("journal_mode" in command.lower() for command in self.init_commands)
        return settings.SQLITE_WAL and not chosen and not self.is_in_memory_db()

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        connection = super().get_new_connection(conn_params)
        connection._line = _lines[str(conn_params["database"])]
        connection._kept_statements = conn_params.get("cached_statements", KEPT_STATEMENTS)
        return connection

    def connected(self) -> None:
        self.connection._call(self.connection._watch)

    def init_connection_state(self) -> None:
        super().init_connection_state()
        if self.pooled:
            # The option `timeout`, or what `init_command` said.
            self.connection._default_lock_timeout = self.connection._call(self._take_over_waiting)
            self.connection._lock_timeout = self.connection._default_lock_timeout

    def _take_over_waiting(self) -> float:
        raw = self.connection._raw
        milliseconds = raw.execute("PRAGMA busy_timeout").fetchone()[0]
        raw.execute("PRAGMA busy_timeout = 0")
        return float(milliseconds) / 1000

    def interrupt(self) -> None:
        if self.connection is not None and (raw := self.connection._raw) is not None:
            with contextlib.suppress(sqlite3.ProgrammingError):
                raw.interrupt()

    def interrupt_again(self, thread: DriverThread) -> None:
        # The first time came too early if SQLite had not begun the statement yet.
        thread.interrupt(self.interrupt)

    def is_usable(self) -> bool:
        return True

    # Transactions

    def start(self, options: TransactionOptions) -> None:
        super().start(options)
        connection = self.connection
        connection._prelude = ()
        connection._lock_timeout = options.lock_timeout or connection._default_lock_timeout
        self._keeps_reads = options.isolation in KEEPS_READS
        self.reads_only = connection._read_only = bool(options.read_only)
        if self.reads_only:
            connection._prelude = ("PRAGMA query_only = ON",)

    def _start_transaction_under_autocommit(self) -> None:
        if not self.pooled:
            super()._start_transaction_under_autocommit()
            return
        mode = "IMMEDIATE" if self._keeps_reads else None
        mode = "DEFERRED" if self.reads_only else self.transaction_mode or mode
        self.connection._begin_with(f"BEGIN {mode}" if mode else BEGIN)

    def lock(self) -> None:
        """Let the transaction have the write lock from the next statement on.

        Raises:
            SessionStateError: this is a read of `gather`, which has no lock to give.
        """
        if (reads := reading.get()) is not None and not reads.is_over:
            reads.check("LOCK", self.alias, self.vendor)
        if self.pooled and self.in_atomic_block:
            self.changed = self.changed or "SELECT"
            self.connection._must_lock = True

    def _savepoint(self, sid: str) -> None:
        with self._known_savepoint() as names:
            super()._savepoint(sid)
            names.append(sid)

    def _savepoint_commit(self, sid: str) -> None:
        with self._known_savepoint() as names:
            super()._savepoint_commit(sid)
            del names[_last(names, sid) :]

    def _savepoint_rollback(self, sid: str) -> None:
        with self._known_savepoint() as names:
            super()._savepoint_rollback(sid)
            del names[_last(names, sid) + 1 :]

    @contextlib.contextmanager
    def _known_savepoint(self) -> Iterator[list[str]]:
        """The names of the open savepoints, which are set again when the transaction begins to
        write."""
        self._own_savepoint = True
        try:
            yield self.connection._savepoints if self.pooled else []
        finally:
            self._own_savepoint = False

    def before_statement(self, sql: Any) -> None:
        super().before_statement(sql)
        word = _first_word(sql, self.scanner) if isinstance(sql, str) else ""
        raw_savepoint = word in ("savepoint", "release") and not self._own_savepoint
        if raw_savepoint or change_in(str(sql), self.scanner):
            self.connection._must_lock = True

    def way_to_write(self, sql: str) -> str:
        # SQLite lets nothing be written; these change settings, or other files.
        word = _first_word(sql, self.scanner)
        if word == "pragma":
            return "" if ASKING_PRAGMA.match(self.scanner.bare(sql)) else "PRAGMA"
        return word.upper() if word in CHANGES_MORE else "" if word else "unknown SQL"

    def _set_autocommit(self, autocommit: bool) -> None:
        # Setting what is set already would commit an open transaction.
        if self.pooled and autocommit and self.connection._raw.isolation_level is None:
            return
        super()._set_autocommit(autocommit)

    @property
    def transaction_state(self) -> TransactionState:
        connection = self.connection
        if connection is None or connection._raw is None or connection._thread.ended:
            return TransactionState.UNKNOWN
        if self.dead:
            return TransactionState.FAILED
        inside = connection._raw.in_transaction
        return TransactionState.ACTIVE if inside else TransactionState.IDLE

    @property
    def left_by_sql(self) -> bool:
        return self.connection is not None and self.connection._left_by_sql

    def after_call(self, error: Exception | None) -> None:
        connection = self.connection
        if connection is None or connection._raw is None:
            return
        inside = connection._raw.in_transaction
        if error is not None:
            self.driver_failed(error)
        elif connection._began and not inside:
            connection._left_by_sql = True
        connection._began = inside
        self.start_idling()

    def is_fatal(self, error: BaseException) -> bool:
        # A full disk, an interrupted write, ON CONFLICT ROLLBACK: SQLite rolls back all of it.
        return self.connection._began and not self.connection._raw.in_transaction

    def is_timeout(self, error: BaseException, options: TransactionOptions) -> bool:
        cause = error.__cause__
        if isinstance(cause, sqlite3.OperationalError) and options.lock_timeout is not None:
            # Where waiting does not help, SQLite says the same at once.
            waited = getattr(cause, "waited", False)
            return waited and _code(cause) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
        return super().is_timeout(error, options)

    # The end of a lease

    def is_harmless(self, sql: Any) -> bool:
        # SQLite tells when it is not.
        return True

    def reset(self) -> None:
        connection = self.connection
        self.touched = self.touched or connection._authorizer.left_something
        super().reset()
        if self.abandoned:
            return
        connection._prelude = ()
        connection._must_lock = False
        connection._lock_timeout = connection._default_lock_timeout
        if self.reads_only or connection._reading:
            connection._call(connection._own, "PRAGMA query_only = OFF")
            self.reads_only = connection._read_only = connection._reading = False


def _compiler(compiler: Callable[[str], type], name: str) -> type:
    cls = compiler(name)
    return _locking(cls) if name == "SQLCompiler" else cls


@cache
def _locking(cls: Any) -> type:
    """A compiler whose queries FOR UPDATE take the write lock, which locks all rows there are."""

    def execute_sql(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.query.select_for_update:
            self.connection.lock()
        return cls.execute_sql(self, *args, **kwargs)

    names = {"execute_sql": execute_sql, "__module__": cls.__module__}
    return type(cls.__name__, (cls,), names)


@cached_by_text
def _first_word(sql: str, reader: Scanner) -> str:
    return reader.first_word(sql).lower()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


class DatabaseWrapper(Mixin, base.DatabaseWrapper):
    """Django's SQLite wrapper, bridged: blocking in sync code, in its thread in the bridge."""
