"""PostgreSQL: psycopg's sync connection with waits that await the event loop, in Django's own
backend."""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import psycopg
from django.db.backends.postgresql import base
from django.db.utils import Error
from psycopg import pq

from django_asyncsession.backends.base import BridgedMixin, sets_something
from django_asyncsession.backends.options import NO_OPTIONS, TransactionOptions, TransactionState
from django_asyncsession.backends.sockets import has_hung_up, is_quiet
from django_asyncsession.observe.slow import Watch
from django_asyncsession.observe.tools import is_watched
from django_asyncsession.scanner import PostgreSQLScanner, Scanner

from .connection import RESET, TIMER_SHARE, Connection, _check_tools
from .cursors import ForOneStatement, _kept_to, _only_reading
from .facts import KnownFacts
from .wire import Wire

if TYPE_CHECKING:
    _Base = base.DatabaseWrapper
else:
    _Base = object
logger = logging.getLogger("django_asyncsession")
# Sets of tables of which a connection remembers whether reading them leaves something, and seconds:
# half a minute after what is known of the tables, which is half a minute old at the most.
MOST_KNOWN, LIFETIME = 1000, 30.0
# What is known of the tables of all databases.
FACTS = KnownFacts(LIFETIME)
STANDARD_STRINGS, OLD_STRINGS = PostgreSQLScanner(), PostgreSQLScanner(standard_strings=False)
STATES = {
    pq.TransactionStatus.IDLE: TransactionState.IDLE,
    pq.TransactionStatus.ACTIVE: TransactionState.UNKNOWN,
    pq.TransactionStatus.INTRANS: TransactionState.ACTIVE,
    pq.TransactionStatus.INERROR: TransactionState.FAILED,
}
# The transaction was idle, or took, for longer than it may; the second only in a later server.
ENDED_WHILE_IDLE = frozenset({"25P03", "25P04"})


class _Driver:
    """The `psycopg` module as Django's backend sees it, but for `connect`."""

    connect = staticmethod(Connection.connect)

    def __getattr__(self, name: str) -> Any:
        return getattr(psycopg, name)


# Statements that can change how a transaction begins, or what it may do.
SETTING = frozenset({"SET", "RESET", "DISCARD", "BEGIN", "START"})
# What they say then; the sign is that of a name with escapes: U&"...".
OPENS = frozenset({"WRITE", "&"})
# Statements that may hold transactions of their own, when none is open.
COMPOUND = frozenset({"CALL", "DO"})
# Statements that a read-only transaction allows although they change files or the server.
CHANGES_MORE = frozenset({"ANALYZE", "CHECKPOINT", "CLUSTER", "LOAD", "REINDEX", "VACUUM"})
LOOKED_AT = SETTING | COMPOUND | CHANGES_MORE | {"ALTER", "COPY", "EXPLAIN"}
# What follows TO in a COPY that changes no file: the client, and fields of an interval.
COPIED_TO = frozenset({"STDOUT", "STDIN", "MONTH", "HOUR", "MINUTE", "SECOND"})
# Words of an EXPLAIN that executes what it explains, which may be in quotes, and of one that would
# create a table.
EXECUTES, CREATES = frozenset({"ANALYZE", "ANALYSE", '""'}), frozenset({"CREATE", "INTO"})


class Mixin(BridgedMixin, _Base):
    """What bridges Django's PostgreSQL wrapper, or one that derives from it."""

    Database: Any = _Driver()
    has_deferrable = True
    unsupported_options = ()
    multiple_statements = True
    exports_snapshots = True
    connection: Any
    # The driver's cursors are its own, or Django's.
    is_plain = False
    left_to_reset = BridgedMixin.left_to_reset | {"_harmless", "is_plain"}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._named_cursors: weakref.WeakSet[Any] = weakref.WeakSet()
        # Of sets of tables, whether reading them leaves nothing, and until when that is believed.
        self._harmless: dict[tuple[str, ...], tuple[float, bool]] = {}

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        connection = super().get_new_connection(conn_params)
        if not self.pool:
            try:
                _check_tools(connection, self.alias)
            except BaseException:
                connection.close()
                raise
        connection.wrapper = weakref.ref(self)
        return connection

    def _configure_connection(self, connection: Any) -> bool:
        with self.in_own_use():
            return super()._configure_connection(connection)

    def is_usable(self) -> bool:
        clean = self.connection.clean
        with self.in_own_use():
            usable = super().is_usable()
        # It asks for a constant.
        self.connection.clean = clean
        return usable

    def start(self, options: TransactionOptions) -> None:
        self._read_only(options)
        # It may have begun below the cursor.
        self.connection.began = self.transaction_state is not TransactionState.IDLE
        self.connection.left_by_sql = False
        self.connection.begin_sql = self._begin_sql(options) if options.given else None

    def _begin_sql(self, options: TransactionOptions) -> bytes:
        """BEGIN and what is local to the transaction, in one round trip."""
        begin = self.connection._get_tx_start_command().decode()
        if options.isolation is not None:
            begin = f"BEGIN ISOLATION LEVEL {options.isolation.upper()}"
        if options.read_only is not None:
            begin += " READ ONLY" if options.read_only else " READ WRITE"
        if options.deferrable is not None:
            begin += " DEFERRABLE" if options.deferrable else " NOT DEFERRABLE"
        settings = [f"SET LOCAL {name} = {ms}" for name, ms in _timeouts(options)]
        return "; ".join([begin, *settings]).encode()

    def configure_autocommit(self, options: TransactionOptions) -> None:
        settings = [f"SET {name} = {ms}" for name, ms in _timeouts(options)]
        if options.isolation is not None:
            settings.append(f"SET default_transaction_isolation = '{options.isolation}'")
        if options.read_only is not None:
            settings.append(f"SET default_transaction_read_only = {options.read_only}")
        if options.deferrable is not None:
            settings.append(f"SET default_transaction_deferrable = {options.deferrable}")
        if settings:
            self._ask("; ".join(settings))
        self._read_only(options)

    def _read_only(self, options: TransactionOptions) -> None:
        self.reads_only = bool(options.read_only)
        if self.reads_only:
            # Until the end of the lease.
            connection = self.connection
            connection.cursor_factory = _only_reading(connection.cursor_factory)
            connection.server_cursor_factory = _only_reading(connection.server_cursor_factory)

    def way_to_write(self, sql: str) -> str:
        first = self.scanner.first_word(sql)
        if first not in LOOKED_AT:
            return ""
        words = self.scanner.words(sql)
        if first in SETTING:
            # A transaction that has read nothing yet can be made one that writes; so can the next.
            name = next((word for word in words[1:] if word not in ("SESSION", "LOCAL")), "")
            # A name in quotes may be that of any setting.
            opens = "READ_ONLY" in name or name in ("ALL", '""') or not OPENS.isdisjoint(words)
        elif first == "COPY":
            # To a file is to a string, of whichever kind.
            to = {after for before, after in pairwise(words) if before == "TO"}
            opens = "PROGRAM" in words or not to <= COPIED_TO
        elif first == "EXPLAIN":
            # Executed there, the server lets it create a table from a query.
            opens = not CREATES.isdisjoint(words) and not EXECUTES.isdisjoint(words)
        elif first in COMPOUND:
            opens = not self.in_atomic_block
        else:
            opens = first in CHANGES_MORE or "SYSTEM" in words[:2]
        return " ".join(words[:3]) if opens else ""

    @property
    def transaction_state(self) -> TransactionState:
        if self.connection is None or self.connection.closed:
            return TransactionState.UNKNOWN
        if self.connection.resetting:
            return TransactionState.IDLE
        return STATES.get(self.connection.pgconn.transaction_status, TransactionState.UNKNOWN)

    @property
    def left_by_sql(self) -> bool:
        return bool(self.connection.left_by_sql)

    def is_quiet(self) -> bool:
        if self.connection.resetting:
            # What comes is the answer to that.
            return not self.has_hung_up()
        if (wire := self.connection.wire) is not None and wire.said:
            return False
        return not self.connection.closed and is_quiet(self.connection.pgconn.socket)

    def has_hung_up(self) -> bool:
        return self.connection.closed or has_hung_up(self.connection.pgconn.socket)

    def is_timeout(self, error: BaseException, options: TransactionOptions) -> bool:
        cause = error.__cause__
        if isinstance(cause, psycopg.errors.QueryCanceled):
            # The same error says that somebody called pg_cancel_backend, told apart by its text
            # alone, and in another language than English by the time that it took.
            asked = options.timeout is not None and "user request" not in str(cause)
            asked = asked and self.connection.waited() >= TIMER_SHARE * (options.timeout or 0.0)
            return asked or "statement timeout" in str(cause)
        # NOWAIT fails with the same error, but in another place of the server.
        return isinstance(cause, psycopg.errors.LockNotAvailable) and (
            cause.diag.source_function == "ProcessInterrupts"
        )

    def ended_before(self, error: BaseException) -> bool:
        return getattr(error.__cause__, "sqlstate", None) in ENDED_WHILE_IDLE

    @staticmethod
    def is_permanent(error: BaseException) -> bool:
        text = str(error)
        if getattr(getattr(error.__cause__, "pgconn", None), "needs_password", False):
            return True
        # An error of connecting has no SQLSTATE: psycopg makes it from libpq's message alone. In
        # another language the callers are told one after the other.
        return any(
            part in text
            for part in ("authentication failed", "does not exist", "no pg_hba.conf", "no password")
        )

    def create_cursor(self, name: str | None = None) -> Any:
        cursor = super().create_cursor(name)
        if self.takes_one:
            # Not `type(cursor)`: a tool may have put a proxy around it.
            cursor.__class__ = _kept_to(cursor.__class__, ForOneStatement)
        if name and self.pooled:
            self._named_cursors.add(cursor)
        return cursor

    def forget_cursor(self, cursor: Any) -> None:
        # psycopg would warn of it when it is collected.
        cursor.cursor._closed = True

    def _forget_cursors(self) -> None:
        for cursor in self._named_cursors:
            cursor._closed = True
        self._named_cursors.clear()

    def open(self) -> None:
        super().open()
        self.connection.note_opened()

    def scrub(self) -> None:
        super().scrub()
        self._forget_cursors()
        self.connection.restore()

    @property
    def scanner(self) -> Scanner:
        connection = self.connection
        if connection is not None and not connection.closed:
            said = connection.pgconn.parameter_status(b"standard_conforming_strings")
            if said == b"off":
                return OLD_STRINGS
        return STANDARD_STRINGS

    def before_statement(self, sql: Any) -> None:
        if isinstance(sql, str) and "\0" in sql:
            # libpq would send what is before it.
            raise ValueError(f"SQL has a NUL at character {sql.index(chr(0))}; leave it out")
        if self.reads_only:
            self.check_reads_only(sql)

    def snapshot_state(self) -> tuple[str, bool]:
        # A transaction gets an id with the first row that it writes or locks.
        return self._ask(  # type: ignore[no-any-return]
            "SELECT current_setting('transaction_isolation'), "
            "pg_current_xact_id_if_assigned() IS NOT NULL"
        )

    def export_snapshot(self) -> str:
        return str(self._ask("SELECT pg_export_snapshot()")[0])

    def import_snapshot(self, snapshot: str) -> None:
        self._ask(f"SET TRANSACTION SNAPSHOT {psycopg.sql.quote(snapshot)}")

    def _ask(self, sql: str) -> Any:
        """A statement of our own, which nobody counts; its first row."""
        with self.wrap_database_errors, self.in_own_use():
            cursor = self.connection.execute(sql)
            return cursor.fetchone() if cursor.description else None

    # The begin and the end of a lease

    def direct(self) -> Wire | None:
        connection = self.connection
        if connection is None or connection._pipeline is not None:
            return None
        wire: Wire | None = connection.wire
        if wire is None or not self.pooled or wire.is_dead or not self.is_plain:
            return None
        if self.execute_wrappers or self.queries_logged or Watch.is_on or is_watched():
            return None
        if self.ran_since:
            # It may have registered loaders, or set what they go by.
            self.ran_since = False
            wire.forget_loaders()
        return wire

    def is_harmless(self, tables: tuple[str, ...]) -> bool | None:
        if not tables:
            return False
        until, harmless = self._harmless.get(tables, (0.0, False))
        if until > time.monotonic():
            return harmless
        # Names mean to a connection that something was set on what they mean to no other.
        return None if self.connection.clean else False

    async def learn_harmless(self, tables: tuple[str, ...]) -> bool:
        names = ("HOST", "PORT", "NAME", "USER")
        database = (self.alias, *(self.settings_dict[name] for name in names))
        try:
            facts = await FACTS.look_up(self.connection.wire, database, tables)
            harmless = all(table in facts and facts[table].reads for table in tables)
        except Error:
            if self.transaction_state is not TransactionState.IDLE:
                raise
            # A server that has other catalogs, or lets this user read none.
            harmless = False
        if len(self._harmless) >= MOST_KNOWN:
            self._harmless.clear()
        self._harmless[tables] = time.monotonic() + LIFETIME, harmless
        return harmless

    def begin_text(self, options: TransactionOptions) -> bytes:
        if options is not NO_OPTIONS:
            return self._begin_sql(options)
        return self.connection._get_tx_start_command()  # type: ignore[no-any-return]

    def note_touched(self) -> None:
        if self.pooled and self.connection is not None:
            self.connection.note_touched()

    def connected(self) -> None:
        # As Django's `_configure_connection` does.
        own = []
        if self.timezone_name:
            own.append(self.compose("SET TimeZone = %s", [self.timezone_name]))
        if role := self.settings_dict["OPTIONS"].get("assume_role"):
            own.append(self.compose("SET ROLE %s", [role]))
        self.connection.set_up = "".join(f"\n; {text}" for text in own + self.set_up)
        self.connection.prepares_again = "prepare" in self.connection.set_up.lower()
        # Cursors of a tool's, which shall see each statement.
        kinds = (self.connection.cursor_factory, self.connection.row_factory)
        self.is_plain = all(kind.__module__.startswith(("django.", "psycopg")) for kind in kinds)
        # An engine's own class says if its server has others.
        self.connection.reset_statements = getattr(self, "reset_statements", RESET)
        self.connection.clean = True

    def note_set_up(self, sql: Any, params: Any) -> None:
        if params and self.settings_dict["OPTIONS"].get("server_side_binding"):
            # As values they are no part of a text, which the server's log may show.
            text = sql if isinstance(sql, str) else sql.as_string(None)
            self.touched = self.touched or sets_something(text)
        else:
            super().note_set_up(sql, params)

    def compose(self, sql: Any, params: Any) -> str:
        if params is None and isinstance(sql, str):
            return sql
        return psycopg.ClientCursor(self.connection).mogrify(sql, params)

    def reset_at_once(self) -> bool:
        if self.set_up_touches or self.transaction_state is not TransactionState.IDLE:
            return False
        self._forget_lease()
        if not self.connection.clean and not self.connection.resetting:
            if not self.connection.is_read_as_opened:
                return False
            try:
                self.connection.send_reset()
            except psycopg.Error:
                return False
        return True

    def reset(self) -> None:
        self._forget_lease()
        with self.in_own_use():
            self.connection.reset()
        if self.set_up_touches:
            self.set_up_again()
            self.connection.clean = True

    def _forget_lease(self) -> None:
        connection = self.connection
        self.reads_only, connection.begin_sql = False, None
        connection.began = connection.left_by_sql = False
        if (backlog := connection._notifies_backlog) is not None:
            backlog.clear()

    def settle(self) -> Callable[[], bool] | None:
        connection = self.connection
        if not connection.resetting or (reading := connection.settle()) is None:
            return None

        def read() -> bool:
            try:
                with self.in_own_use():
                    done, error = bool(connection.wait(reading)), connection.reset_error
            except psycopg.Error as exc:
                done, error = False, str(exc)
            if not done:
                logger.warning(
                    "a connection of %r could not be reset and is closed: %s; if the server has "
                    "not all of these statements, set reset_statements of the engine's "
                    "DatabaseWrapper, and look at what connection_created does",
                    self.alias,
                    error,
                )
            return done

        return read

    def finish_call(self, seconds: float) -> None:
        if self.connection is not None:
            self.connection.finish_call(seconds)

    def close_driver(self) -> None:
        self._forget_cursors()
        if self.connection is not None:
            self.connection.abandon()

    def farewell(self) -> Awaitable[None] | None:
        return None if self.connection is None else self.connection.farewell()


def _timeouts(options: TransactionOptions) -> list[tuple[str, int]]:
    """The server's settings for the given times, in milliseconds; at least 1, because 0 means no
    limit there."""
    given = {
        "statement_timeout": options.timeout,
        "lock_timeout": options.lock_timeout,
        "idle_in_transaction_session_timeout": options.idle_timeout,
    }
    return [(name, max(1, round(s * 1000))) for name, s in given.items() if s is not None]


class DatabaseWrapper(Mixin, base.DatabaseWrapper):
    """Django's PostgreSQL wrapper, bridged: blocking in sync code, awaiting in the bridge."""
