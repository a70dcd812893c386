"""The mixin that makes any Django DatabaseWrapper a bridged one, and what is current while one is
served."""

from __future__ import annotations

import inspect
import logging
import re
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from django.db.backends.signals import connection_created
from django.db.transaction import TransactionManagementError
from django.db.utils import OperationalError
from django.utils.functional import cached_property
from greenlet import getcurrent, greenlet

from django_asyncsession.bridge import await_
from django_asyncsession.exceptions import ConfigurationError, SessionClosedError
from django_asyncsession.observe.slow import Timed, Watch, ends
from django_asyncsession.scanner import Scanner, scanner
from django_asyncsession.statements import change_in, reading

from .attributes import Attributes
from .cursors import Errors, watched
from .options import TransactionOptions, TransactionState
from .secrets import _is_secret, _secret

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper

    class _Wrapper(BaseDatabaseWrapper):
        """Django's private names that are used here, which its type stubs leave out."""

        Database: Any
        rollback_exc: BaseException | None

        def _savepoint(self, sid: str) -> None: ...
        def _savepoint_commit(self, sid: str) -> None: ...
        def _commit(self) -> None: ...
        def _rollback(self) -> None: ...
        def _configure_connection(self, connection: Any) -> bool: ...

else:
    _Wrapper = object

logger = logging.getLogger("django_asyncsession")


# Statements that are not sent again with each reset, although a receiver sent them while
# connecting: they change data or schema, or only ask.
ONCE = re.compile(
    r"\s*(?:insert|update|delete|merge|replace|truncate|alter|drop|grant|revoke|comment|analyze|"
    r"vacuum|show|explain|create(?!\s+(?:local\s+)?temp)|(?:select|with)\b(?=.*\bfrom\b))\b",
    re.IGNORECASE | re.DOTALL,
)


def sets_something(sql: str) -> bool:
    """Whether a statement of a receiver of `connection_created` is to be sent again after each
    reset, as far as its text tells."""
    return "set_config" in sql.lower() or ONCE.match(sql) is None


class BridgedMixin(_Wrapper):
    """Mixed in before a Django DatabaseWrapper. In the bridge its driver awaits; outside it
    blocks, as in Django.

    A wrapper that a pool made (`pooled`) never connects by itself and works only while it is
    served, that is for the session that leased it; used anywhere else it raises instead of blocking
    the event loop.
    """

    # The driver itself awaits. False: each call runs in the connection's own thread.
    native_async: ClassVar[bool] = True
    # All rows of a plain cursor are in memory when execute() returns, so fetching them needs no
    # I/O.
    buffered_cursors: ClassVar[bool] = True
    # The server takes back a failed statement alone; otherwise the whole transaction fails with it.
    statement_rollback: ClassVar[bool] = False
    # A script of several statements may be sent in one go.
    multiple_statements: ClassVar[bool] = False
    # Isolation levels that the database has.
    isolation_levels: ClassVar[tuple[str, ...]] = TransactionOptions.LEVELS
    # DEFERRABLE transactions exist.
    has_deferrable: ClassVar[bool] = False
    # Options of a session that the database cannot keep.
    unsupported_options: ClassVar[tuple[str, ...]] = ("deferrable",)
    # One connection serves sync code and the bridge, by turns.
    both_modes: ClassVar[bool] = True
    # Connections that a pool may have beside those of its sessions.
    connections_beside: ClassVar[int] = 0
    # Transactions can share one snapshot of the data.
    exports_snapshots: ClassVar[bool] = False
    # Attributes that `scrub` leaves as they are: who uses the connection, and what `reset`, which
    # comes after it, decides by.
    left_to_reset: ClassVar[frozenset[str]] = frozenset(
        {"caller", "lease", "abandoned", "cut", "touched", "reads_only", "_opened"}
        | {"ran", "ran_since"}
    )

    pooled = False
    # What was sent last, while something watches.
    last_statement: Any = None
    lease: object = None
    # The greenlet of the call that is served. Weak, because the greenlet holds this wrapper, and
    # the garbage collector cannot look into it while it is suspended.
    caller: weakref.ref[greenlet] | None = None
    abandoned = False
    # The task was cancelled, or the call closed, in the middle of a round trip.
    cut = False
    # The session shall only read; set anew with each lease.
    reads_only = False
    # COMMIT was answered by the server.
    commit_confirmed = False
    # The database took back the whole transaction, not only the statement that failed.
    dead = False
    # A cursor made now is for one statement: the server refuses more in a text.
    takes_one = False
    # Something ran that nobody has seen.
    touched = False
    # Sync code ran in the present lease; since the last statement of a plan.
    ran = ran_since = False
    # The transaction that ends now is the last thing of its lease: the reset goes along with it.
    ends_lease = False
    # The first word of the first statement that did more than read, in the transaction in progress.
    changed = ""
    # What runs while connecting includes what nobody has seen.
    set_up_touches = False
    # What the driver is sending was shown by a cursor of Django's, or is the backend's own.
    own_use = False
    # What stands for other aliases; of one lease, as code may set attributes there too.
    stand_ins: dict[str, Any] | None = None
    # What this object was like when the connection had been opened.
    _opened: Attributes | None = None
    _opening = False
    _savepoint_name: str | None = None
    # The block that shall be rolled back without an error.
    _unwanted: Any = None

    # Connecting, and what may use the connection

    def open(self) -> None:
        """Connect; called in the bridge by the pool, once."""
        self._opening = True
        # What was set while connecting is what every lease begins with.
        self.set_up: list[str] = []
        try:
            self.ensure_connection()
        finally:
            self._opening = False
        self.set_up_touches, self.touched = self.touched, False
        with self.wrap_database_errors:
            self.connected()
        self.queries_log.clear()
        self.last_statement = None
        self._fill_caches()
        for name in self.left_to_reset:
            setattr(self, name, getattr(self, name))
        self._opened = Attributes(self, self.left_to_reset)

    def connected(self) -> None:
        """Called when connecting is done, with what has been set in `set_up`."""

    def _fill_caches(self) -> None:
        """Compute what needs no SQL: a value that a lease puts there instead is its own."""
        for name in ("timezone", "timezone_name"):
            getattr(self, name)
        self.ops.compiler("SQLCompiler")

    def note_set_up(self, sql: Any, params: Any) -> None:
        """Keep a statement that sets something while connecting, to be sent again with each
        reset."""
        # Each in a line of its own: one may end in a comment.
        for text in self.split(self.compose(sql, params)):
            if sets_something(text):
                self.set_up.append(text.rstrip("; \t\r\n"))

    def compose(self, sql: Any, params: Any) -> str:
        """The statement with its parameters in it."""
        raise NotImplementedError

    def set_up_again(self) -> None:
        """After a reset, what connecting has set where nobody has seen all of it; called in the
        bridge."""
        # Those who installed them while connecting do so again.
        self.execute_wrappers = []
        self.init_connection_state()
        connection_created.send(sender=type(self), connection=self)
        self.scrub()

    @cached_property
    def wrap_database_errors(self) -> Errors:
        """What Django's code runs the driver in."""
        return Errors(self)

    def connect(self) -> None:
        if self.pooled and not self._opening:
            raise OperationalError(
                f"the connection to {self.alias!r} was lost; roll back, and run the whole "
                "transaction again"
            )
        super().connect()

    def get_connection_params(self) -> dict[str, Any]:
        params: dict[str, Any] = super().get_connection_params()
        for name in filter(_is_secret, params):
            params[name] = _secret(params[name])
        return params

    def is_quiet(self) -> bool:
        """Whether nothing came from the server since the last statement, neither its end of the
        connection nor anything else; asked in no time, of an idle connection."""
        return True

    def has_hung_up(self) -> bool:
        """Whether the server has closed the connection already, so that whatever is sent now does
        not reach it; asked in no time."""
        return False

    def check_caller(self) -> None:
        """Refuse to use a pooled connection anywhere but in the call of the session that leased it.

        Raises:
            SessionClosedError: a stale handle, or a call outside the bridge.
        """
        if self.pooled and (self.caller is None or self.caller() is not getcurrent()):
            raise SessionClosedError(
                f"a connection of {self.alias!r} is used outside the session that leased it; "
                "use session.run_sync() while the session is open"
            )

    # Transactions

    def start(self, options: TransactionOptions) -> None:
        """Prepare the transaction that the next statement begins; called in the bridge, in
        autocommit."""
        raise NotImplementedError

    def configure_autocommit(self, options: TransactionOptions) -> None:
        """Apply `options` to a connection in autocommit mode; called in the bridge."""
        raise NotImplementedError

    def check_options(self, options: TransactionOptions) -> None:
        """Refuse what the database cannot do.

        Raises:
            ConfigurationError: such an option is given.
        """
        for name in self.unsupported_options:
            if getattr(options, name):
                raise ConfigurationError(
                    f"{self.display_name} has no {name} for the sessions of {self.alias!r}; "
                    f"leave {name}={getattr(options, name)!r} out"
                )

    def set_rollback(self, rollback: bool) -> None:
        super().set_rollback(rollback)
        self._unwanted = self.atomic_blocks[-1] if rollback else None

    @property
    def is_rollback_wanted(self) -> bool:
        """Whether the code itself, and no error, wants the innermost block to be rolled back."""
        blocks = self.atomic_blocks
        return self.needs_rollback and bool(blocks) and self._unwanted is blocks[-1]

    @property
    def transaction_state(self) -> TransactionState:
        """What the driver knows of the transaction on the server, without asking it."""
        raise NotImplementedError

    @property
    def left_by_sql(self) -> bool:
        """Whether the user's own COMMIT or ROLLBACK ended the transaction behind Django's back."""
        return False

    def set_autocommit(self, autocommit: bool, *args: Any, **kwargs: Any) -> None:
        if autocommit and self.pooled and self.connection is None:
            # Leaving an atomic block whose connection was lost: there is nothing to switch, and no
            # reconnect.
            self.autocommit = True
            return
        super().set_autocommit(autocommit, *args, **kwargs)

    def savepoint_named(self, name: str | None) -> None:
        """Name the next savepoint that Django creates; None lets Django name it."""
        self._savepoint_name = name

    def savepoint(self) -> str | None:
        name, self._savepoint_name = self._savepoint_name, None
        if name is None:
            return super().savepoint()
        self._savepoint(name)
        return name

    def _commit(self) -> None:
        self.check_alive()
        if Watch.is_on and self.pooled:
            Timed(self, "COMMIT").run(super()._commit)
        else:
            super()._commit()
        self.commit_confirmed = True

    def _rollback(self) -> None:
        if Watch.is_on and self.pooled:
            Timed(self, "ROLLBACK").run(super()._rollback)
        else:
            super()._rollback()
        self.dead = False

    def on_commit(self, func: Any, robust: bool = False) -> None:
        if self.pooled and inspect.iscoroutinefunction(func):
            coroutine_function = func

            def func() -> None:
                await_(coroutine_function())

            func.__qualname__ = coroutine_function.__qualname__
        super().on_commit(func, robust)

    def run_and_clear_commit_hooks(self) -> None:
        pending: list[Any] = self.run_on_commit
        try:
            super().run_and_clear_commit_hooks()
        except BaseException:
            for _, func, *_ in pending:
                logger.error(
                    "on_commit callback %s did not run, because an earlier one failed; the data "
                    "is saved",
                    getattr(func, "__qualname__", func),
                )
            raise

    # Errors

    def is_timeout(self, error: BaseException, options: TransactionOptions) -> bool:
        """Whether `error` says that the server ended a statement, or a wait for a lock, by its
        timeout."""
        return False

    def ended_before(self, error: BaseException) -> bool:
        """Whether `error` says that the server had ended the session before the statement that
        failed came, so that it did nothing of it."""
        return False

    def is_fatal(self, error: BaseException) -> bool:
        """Whether `error` leaves the whole transaction dead although the database rolls back
        statements."""
        return False

    def driver_failed(self, error: BaseException) -> None:
        """Note what an error of the driver did to the transaction; called by the driver's facade,
        so that no `except` of the user's code can hide it."""
        if self.in_atomic_block and self.is_fatal(error):
            self.dead = self.needs_rollback = True
            self.rollback_exc = error

    def check_alive(self) -> None:
        """Refuse to go on in a transaction that the database has taken back.

        Raises:
            TransactionManagementError: a statement now would be saved without those before it.
        """
        if self.dead or (self.in_atomic_block and self.pooled and self._is_left_behind):
            what = "taken back by the database" if self.dead else "ended by SQL inside it"
            raise TransactionManagementError(
                f"the transaction on {self.alias!r} was {what}; roll it back, and run all of it "
                "again"
            ) from self.rollback_exc

    @property
    def _is_left_behind(self) -> bool:
        """Whether statements would now be saved one by one, because SQL ended the transaction."""
        return self.statement_rollback and self.left_by_sql

    @staticmethod
    def is_permanent(error: BaseException) -> bool:
        """Whether connecting again would fail the same way (password, database name), so nobody
        should wait."""
        return False

    # Statements

    @property
    def scanner(self) -> Scanner:
        """How the server reads SQL now, as far as is known here."""
        return scanner(self.vendor)

    def split(self, sql: str) -> Iterator[str]:
        """The statements of a script one by one, each read as the server reads after the one
        before."""
        position = 0
        while (found := self.scanner.next_statement(sql, position)) is not None:
            begin, position = found
            yield sql[begin:position].rstrip()

    def note_statement(self, sql: Any) -> None:
        """Called with the text of each statement that a cursor of Django's is about to send.

        Raises:
            SessionStateError: it locks, and is a read of `gather`.
            As `before_statement`.
        """
        if (reads := reading.get()) is not None and not reads.is_over:
            text = sql if isinstance(sql, str) else sql.as_string(None)
            reads.check(text, self.alias, self.vendor)
        if self.pooled:
            self.before_statement(sql)
        if not self.changed and self.in_atomic_block:
            self.note_change(sql)

    def note_unseen(self, what: str = "SQL with the driver") -> None:
        """Note that something is sent whose text nobody has seen: it may have changed anything.

        Called by the driver's facade where it sends, unless it is for `own_use`.
        """
        self.touched = True
        self.changed = self.changed or what

    @contextmanager
    def in_own_use(self) -> Iterator[None]:
        """While Django's backend, or this one, sends what is known."""
        outer, self.own_use = self.own_use, True
        try:
            yield
        finally:
            self.own_use = outer

    @contextmanager
    def execute_wrapper(self, wrapper: Any) -> Iterator[None]:
        """Django's, which takes the last one away at the end: left after the lease, that would be
        another one's."""
        wrappers = self.execute_wrappers
        wrappers.append(wrapper)
        try:
            yield
        finally:
            for at in reversed(range(len(wrappers))):
                if wrappers[at] is wrapper:
                    del wrappers[at]
                    break

    def before_statement(self, sql: Any) -> None:
        """Called with the text of each statement before it is sent.

        Raises:
            TransactionManagementError: as `check_alive`.
            OperationalError: as `check_reads_only`.
        """
        self.check_alive()
        if self.reads_only:
            self.check_reads_only(sql)

    def check_reads_only(self, sql: Any) -> None:
        """Refuse, in a read-only session, SQL that would let it write, which the server itself does
        not refuse.

        Raises:
            OperationalError: this is such SQL.
        """
        if not isinstance(sql, str):
            sql = sql.as_string(None)
        if escape := self.way_to_write(sql):
            raise OperationalError(
                f"{escape} in a read-only session of {self.alias!r}; use a session that may write"
            )

    def way_to_write(self, sql: str) -> str:
        """The statement in short if it could make a read-only session write, or change what is not
        data; else empty."""
        return ""

    def note_change(self, sql: Any) -> None:
        """Note that a statement does more than read, unless it commits by itself."""
        text = sql if isinstance(sql, str) else sql.as_string(None)
        self.changed = change_in(text, self.scanner)

    def snapshot_state(self) -> tuple[str, bool]:
        """The isolation level of the transaction, and whether it has written or locked anything;
        called in the bridge, where `exports_snapshots`."""
        raise NotImplementedError

    def export_snapshot(self) -> str:
        """Name what the transaction sees, for as long as it is open; called in the bridge."""
        raise NotImplementedError

    def import_snapshot(self, snapshot: str) -> None:
        """See what the transaction that named it sees; called in the bridge, before anything is
        read."""
        raise NotImplementedError

    def make_cursor(self, cursor: Any) -> Any:
        return self._watch(super().make_cursor(cursor))

    def make_debug_cursor(self, cursor: Any) -> Any:
        return self._watch(super().make_debug_cursor(cursor))

    def _watch(self, cursor: Any) -> Any:
        if self.pooled:
            plain: Any = type(cursor)
            cursor.__class__ = watched(plain)
            cursor.lease = self.lease
        return cursor

    def forget_cursor(self, cursor: Any) -> None:
        """Let go of a cursor that ends on the server with its transaction, telling no one."""

    def close_if_unusable_or_obsolete(self) -> None:
        # Django asks at the begin and the end of each request; how long a pooled connection lives
        # is the pool's business.
        if not self.pooled:
            super().close_if_unusable_or_obsolete()

    # The begin and the end of a lease

    def begin_lease(self, lease: object) -> None:
        """From now on the connection is a session's, which may do anything with the driver."""
        self.lease = lease
        self.ran = self.ran_since = False

    def note_touched(self) -> None:
        """Note that sync code runs with the connection, or has the driver's: whatever it does with
        it may leave something behind."""

    def note_ran(self) -> None:
        """Note that sync code runs with the connection, which may leave anything on it."""
        self.ran = True
        self.note_touched()

    def direct(self) -> Any:
        """What runs the statements of plans below the driver's cursor, as a `Wire` does; None where
        there is nothing, or where something that shall see each statement would not."""
        return None

    def is_harmless(self, tables: tuple[str, ...]) -> bool | None:
        """Whether reading these tables leaves nothing on the connection; None when it has to be
        learned first."""
        return False

    async def learn_harmless(self, tables: tuple[str, ...]) -> bool:
        """Ask the server whether reading these tables leaves nothing on the connection; before
        anything else was sent in a lease.

        Raises:
            Django's database errors.
        """
        return False

    def begin_text(self, options: TransactionOptions) -> bytes:
        """What begins a transaction with these options, for `direct`."""
        raise NotImplementedError

    def end_streams(self) -> None:
        """Let go of the rows that streaming cursors have not read, when the session's transaction
        ends; called in the bridge."""

    def reset_at_once(self) -> bool:
        """Do what `reset` does, if it can be done without awaiting; tell whether it was."""
        return False

    def reset(self) -> None:
        """Bring back what a lease may have changed on the connection; called in the bridge.

        Whatever ran may have left something, so nobody asks what did.
        """

    def settle(self) -> Callable[[], bool] | None:
        """What reads the answer to the reset if it was not awaited, and tells whether it was done;
        to be called in the bridge, before anything else. None when there is nothing to read."""
        return None

    def scrub(self) -> None:
        """Bring this object back to what it was after opening: attributes that are not its own,
        settings, hooks, flags, wrappers, the query log."""
        if self._opened is not None:
            self._opened.restore(self)
        # Django's blocks that are still open.
        self.closed_in_transaction = self.abandoned

    def abandon(self) -> None:
        """Close the connection now, without awaiting: its state is not certain, or nobody may wait
        for it.

        `farewell` then does what is left to do on the server. Safe to call twice.
        """
        self.abandoned = True
        # Django's blocks that are still open must neither roll back on this connection nor open
        # another one.
        self.closed_in_transaction = self.needs_rollback = True
        self.run_on_commit = []
        self.close_driver()

    def cut_off(self) -> None:
        """Abandon the connection because a round trip was left in the middle; called by the
        driver's facade."""
        self.cut = True
        self.abandon()

    def finish_call(self, seconds: float) -> None:
        """Wait, blocking, for the end of a driver's call that nobody awaits any more, so that the
        connection can be used further."""

    def close_driver(self) -> None:
        """Close the driver's connection without awaiting or blocking."""
        raise NotImplementedError

    def farewell(self) -> Awaitable[None] | None:
        """What remains after `abandon`: end what still runs on the server, and wait until the
        server has let go.

        Anything but a coroutine is awaited again when the end of the loop cancelled it.
        """
        return None


# A task of the pool's opens connections, whoever waits for one.
ends[BridgedMixin.open.__code__] = "the opening of a connection"
