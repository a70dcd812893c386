"""PostgreSQL: psycopg's sync connection with waits that await the event loop, in Django's own
backend."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import select
import socket
import time
import weakref
from collections.abc import Awaitable, Callable, Generator, Mapping
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeVar

import psycopg
from django.db.backends.postgresql import base
from greenlet import getcurrent
from psycopg import generators, pq, waiting
from psycopg._capabilities import capabilities
from psycopg._conninfo_utils import get_param
from psycopg.abc import PQGen
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import conninfo_attempts_async, conninfo_to_dict, timeout_from_conninfo
from psycopg.waiting import WAIT_R

from django_asyncsession.backends.attributes import Attributes
from django_asyncsession.backends.base import (
    BridgedMixin,
    TransactionOptions,
    TransactionState,
    sets_something,
)
from django_asyncsession.backends.sockets import has_hung_up, is_quiet
from django_asyncsession.bridge import Bridge, await_, in_bridge
from django_asyncsession.exceptions import ConfigurationError
from django_asyncsession.scanner import PostgreSQLScanner, Scanner

if TYPE_CHECKING:
    _Base = base.DatabaseWrapper
else:
    _Base = object

RV = TypeVar("RV")
logger = logging.getLogger("django_asyncsession")
STANDARD_STRINGS, OLD_STRINGS = PostgreSQLScanner(), PostgreSQLScanner(standard_strings=False)
COPYING = (pq.ExecStatus.COPY_IN, pq.ExecStatus.COPY_OUT, pq.ExecStatus.COPY_BOTH)
IDLE, ACTIVE = pq.TransactionStatus.IDLE, pq.TransactionStatus.ACTIVE
DONE = (pq.ExecStatus.COMMAND_OK, pq.ExecStatus.TUPLES_OK)

# What DISCARD ALL does, in statements that may travel together with the end of a transaction.
RESET = (
    "CLOSE ALL",
    "SET SESSION AUTHORIZATION DEFAULT",
    "RESET ROLE",
    "RESET ALL",
    "UNLISTEN *",
    "SELECT pg_catalog.pg_advisory_unlock_all()",
    "DISCARD SEQUENCES",
    "DISCARD TEMP",
)
FORGET_PREPARED = "DEALLOCATE ALL"
# A row if PREPARE made some, or if the driver's own, which may stay, are not all there.
FIND_PREPARED = (
    "SELECT FROM pg_catalog.pg_prepared_statements HAVING count(*) <> {} OR bool_or(from_sql)"
)
# What decides how the server reads a text.
READS_BY = (b"client_encoding", b"standard_conforming_strings")
ENDS = (b"COMMIT", b"ROLLBACK")
STATES = {
    pq.TransactionStatus.IDLE: TransactionState.IDLE,
    pq.TransactionStatus.ACTIVE: TransactionState.UNKNOWN,
    pq.TransactionStatus.INTRANS: TransactionState.ACTIVE,
    pq.TransactionStatus.INERROR: TransactionState.FAILED,
}
# Generators of psycopg that send no SQL of anybody's: they fetch, end, or set an attribute.
HARMLESS = frozenset(
    {"_fetch_gen", "_scroll_gen", "_close_gen", "_commit_gen", "_rollback_gen"}
    | {"_set_autocommit_gen", "_set_isolation_level_gen", "_set_read_only_gen"}
    | {"_set_deferrable_gen"}
)
# Attributes of a connection that are no business of a lease, or brought back in another way.
NOT_OF_A_LEASE = frozenset(
    {"pgconn", "lock", "wrapper", "begin_sql", "began", "left_by_sql", "_opened", "_farewell"}
    | {"_waits_in", "_waits_since", "_ending", "_closed", "_prepared", "_notifies_backlog"}
    | {"_adapters", "_pipeline", "reset_statements", "set_up", "prepares_again", "clean"}
    | {"resetting", "reset_error", "reset_works"}
)
# The transaction was idle, or took, for longer than it may; the second only in a later server.
ENDED_WHILE_IDLE = frozenset({"25P03", "25P04"})
# The server's clock and ours may differ by the rest while a timeout runs.
TIMER_SHARE = 0.95
# Seconds that libpq gets to deliver a cancel request; the pool's own deadline is what counts.
CANCEL_TIMEOUT = 10.0


class Connection(psycopg.Connection[Any]):
    """psycopg's sync connection; in the bridge its waits await, and a wait that is cut short
    closes it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # psycopg's lock is a thread's: held across a switch it would freeze the loop when a second
        # task wants it.
        # The session's own queue lets one task in at a time, and Django one thread.
        self.lock: Any = contextlib.nullcontext()
        self.wrapper: weakref.ref[Mixin] | None = None
        self.begin_sql: bytes | None = None
        # A transaction was seen on the server; it was ended by SQL that is not ours.
        self.began = self.left_by_sql = False
        # What brings back, after RESET, what connecting has set.
        self.reset_statements, self.set_up = RESET, ""
        # PREPARE is among it.
        self.prepares_again = False
        # What the server said to the last reset, if it did not do all of it. Only one that it has
        # done once goes along with COMMIT: what it cannot read, it would refuse with it.
        self.reset_error, self.reset_works = "", False
        # Nothing was sent since the last reset. The answer to a reset was not read yet.
        self.clean = True
        self.resetting = False
        self._farewell: Farewell | None = None
        # The loop in which a call waits in the bridge; the connection was abandoned meanwhile, and
        # that call closes it.
        self._waits_in: asyncio.AbstractEventLoop | None = None
        self._waits_since = 0.0
        self._ending = False
        self._opened: tuple[Any, ...] | None = None

    @classmethod
    def connect(cls, conninfo: str = "", **kwargs: Any) -> Connection:
        try:
            # Tools replace psycopg's own, and get what they expect: a sync connection.
            return super().connect(conninfo, **kwargs)
        except Exception as exc:
            # psycopg's frames hold the whole connection string, and error pages show the locals of
            # frames.
            error: BaseException = exc
        shown: BaseException | None = error
        while shown is not None:
            shown = shown.with_traceback(None)
            shown = shown.__cause__ or shown.__context__
        raise error

    @classmethod
    def _get_connection_params(cls, conninfo: str, **kwargs: Any) -> Any:
        params = super()._get_connection_params(conninfo, **kwargs)
        return await_(_resolved(params)) if in_bridge() else params

    @classmethod
    def _connect_gen(cls, conninfo: str = "") -> Any:
        gen = super()._connect_gen(conninfo)
        if not in_bridge():
            return (yield from gen)
        # Who asks for the first step gets the result: there is nothing to block for.
        seconds = timeout_from_conninfo(conninfo_to_dict(conninfo))
        return await_(waiting.wait_conn_async(gen, interval=0.1, timeout=seconds))

    def wait(self, gen: PQGen[RV], interval: float = 0.1, timeout: float | None = None) -> RV:
        if self.wrapper is not None and (wrapper := self.wrapper()) is not None:
            wrapper.check_served()
            if not wrapper.own_use and (name := getattr(gen, "__name__", "")) not in HARMLESS:
                wrapper.note_unseen("COPY" if "copy" in name else "SQL with the driver")
        self.clean, self._waits_since = False, time.monotonic()
        if not isinstance(getcurrent(), Bridge):
            return super().wait(gen, interval=interval, timeout=timeout)
        fd, steps = self.pgconn.socket, [self._until_abandoned(gen)]
        try:
            return await_(waiting.wait_async(steps.pop(), fd, interval=interval, timeout=timeout))
        except Exception:
            raise
        except BaseException:
            # Cancelled, or closed, in the middle of a round trip: what the server does now is not
            # certain.
            self._note_end_of_wait()
            wrapper = None if self.wrapper is None else self.wrapper()
            if wrapper is not None:
                wrapper.cut_off()
            if wrapper is None or wrapper.cut:
                self.abandon()
            raise
        finally:
            if self._waits_in is not None or self._ending:
                self._note_end_of_wait()
            self._note_status()

    def waited(self) -> float:
        """Seconds since the last round trip began."""
        return time.monotonic() - self._waits_since

    def _until_abandoned(self, gen: PQGen[RV]) -> PQGen[RV]:
        """`gen`, ended at the first step after `abandon`: in a tenth of a second at the latest."""
        self._waits_in = asyncio.get_running_loop()
        try:
            state = next(gen)
            while True:
                ready = yield state
                if self._ending:
                    raise psycopg.OperationalError("the connection was closed in another task")
                state = gen.send(ready)
        except StopIteration as end:
            return end.value  # type: ignore[no-any-return]
        finally:
            # Here too: what waits may be collected, in whichever thread.
            self._waits_in = None
            if self._ending:
                self.pgconn.finish()

    def _note_end_of_wait(self) -> None:
        self._waits_in = None
        if self._ending:
            self.pgconn.finish()

    def _note_status(self) -> None:
        status = self.pgconn.transaction_status
        if status in (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR):
            self.began = True
        elif status == IDLE and self.began:
            self.began, self.left_by_sql = False, True

    def set_autocommit(self, value: bool) -> None:
        if self.wrapper is not None and (wrapper := self.wrapper()) is not None:
            wrapper.check_served()
        for _ in self._set_autocommit_gen(value):
            raise AssertionError("setting autocommit waits for nothing")

    def note_opened(self) -> None:
        """Remember the attributes, and what values are converted with: every lease begins so."""
        template = AdaptersMap(self.adapters)
        attributes = Attributes(self, NOT_OF_A_LEASE)
        prepares = self.prepare_threshold, self.prepared_max
        handlers = self.pgconn.notice_handler, self.pgconn.notify_handler
        self._opened = attributes, template, prepares, handlers, self._reads_as

    def restore(self) -> None:
        """Bring back what `note_opened` remembered."""
        if self._opened is None:
            return
        attributes, template, prepares, handlers, _ = self._opened
        self.prepare_threshold, self.prepared_max = prepares
        attributes.restore(self)
        server: Any = self.pgconn
        server.notice_handler, server.notify_handler = handlers
        server.untrace()
        if self._adapters is None or not _are_same(self._adapters, template):
            self._adapters = AdaptersMap(template)

    def commit(self) -> None:
        self.began = False
        super().commit()

    def rollback(self) -> None:
        self.began = False
        super().rollback()

    def _start_query(self) -> PQGen[None]:
        if self._may_write_again:
            yield from self._send_before(ONLY_READ)
        if self.begin_sql is None or self._autocommit or self._pipeline:
            yield from super()._start_query()
        elif self.pgconn.transaction_status == IDLE:
            yield from self._send_before(self.begin_sql)

    @property
    def _may_write_again(self) -> bool:
        """Whether a function has ended the read-only mode of autocommitted statements, which the
        server reports, or may have."""
        if not self._autocommit or self._pipeline or self.wrapper is None:
            return False
        if (wrapper := self.wrapper()) is None or not wrapper.reads_only:
            return False
        server = self.pgconn
        is_idle = server.transaction_status == IDLE
        return is_idle and server.parameter_status(b"default_transaction_read_only") != b"on"

    def _send_before(self, sql: bytes) -> PQGen[None]:
        self.pgconn.send_query(sql)
        for result in (yield from generators.execute(self.pgconn)):
            if result.status == pq.ExecStatus.FATAL_ERROR:
                raise psycopg.errors.error_from_result(result, encoding=self.pgconn._encoding)

    def _exec_command(self, command: Any, result_format: pq.Format = pq.Format.TEXT) -> Any:
        wrapper = None if self.wrapper is None else self.wrapper()
        together = wrapper is not None and wrapper.ends_lease and command in ENDS
        together = together and self.reset_works and self.is_read_as_opened
        if not together or self._pipeline:
            return (yield from super()._exec_command(command, result_format))
        return (yield from self._end_and_reset(command))

    def _end_and_reset(self, command: bytes) -> PQGen[Any]:
        """End the transaction and reset the connection in one round trip. The server runs the
        reset after the end, in a transaction of its own, and not at all if the end fails."""
        self._check_connection_ok()
        if command == b"ROLLBACK":
            # psycopg forgets its prepared statements then.
            self._prepared._names.clear()
        self.pgconn.send_query(command + b"; " + self._reset_sql())
        yield from generators.send(self.pgconn)
        ended = yield from generators.fetch(self.pgconn)
        try:
            yield from self._read_reset()
        except psycopg.OperationalError:
            # Lost, but after the server's word on the end.
            self.pgconn.finish()
        if ended is not None and ended.status == pq.ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(ended, encoding=self.pgconn._encoding)
        return ended

    def send_reset(self) -> None:
        """Send what brings back the state after connecting, without waiting for the answer."""
        self.pgconn.send_query(self._reset_sql())
        self.resetting = True

    def reset(self) -> None:
        """Bring back the state after connecting.

        Raises:
            OperationalError: it could not be done.
        """
        if not self.is_read_as_opened:
            # Else the server would read what connecting has set as something else.
            self.wait(self._send_before(b"RESET ALL"))
        self.send_reset()
        if not self.wait(self._read_reset()):
            raise psycopg.OperationalError(self.reset_error)

    @property
    def is_read_as_opened(self) -> bool:
        """Whether the server reads a text as it did after connecting, as far as it has said."""
        return self._opened is None or self._reads_as == self._opened[-1]

    @property
    def _reads_as(self) -> tuple[Any, ...]:
        return tuple(map(self.pgconn.parameter_status, READS_BY))

    def settle(self) -> PQGen[bool] | None:
        """What reads the answer to `send_reset`, and tells whether all of it was done; None when
        it has come already and says so."""
        reading = self._read_reset()
        with contextlib.suppress(psycopg.Error):
            self.pgconn.consume_input()
            try:
                next(reading)
            except StopIteration as stopped:
                return None if stopped.value else reading
        return reading

    def _read_reset(self) -> PQGen[bool]:
        server = self.pgconn
        yield from generators.send(server)
        results = []
        while True:
            while server.is_busy():
                while not (yield WAIT_R):
                    continue
                server.consume_input()
            if (result := server.get_result()) is None:
                break
            results.append(result)
        while server.notifies():
            """They came for the last lease."""
        self.resetting = False
        failed = [result for result in results if result.status not in DONE]
        self.clean = bool(results) and not failed
        self.reset_works = self.reset_works or self.clean
        if failed:
            self.reset_error = failed[0].get_error_message(server._encoding)
        if self.clean and results[len(self.reset_statements)].ntuples:
            # Those of PREPARE can only go together with those of the driver.
            self._prepared._names.clear()
            self.send_reset()
            return (yield from self._read_reset())
        return self.clean

    def _reset_sql(self) -> bytes:
        prepared: Any = self._prepared
        if self.prepares_again:
            prepared._names.clear()
        if prepared._names:
            last = FIND_PREPARED.format(len(prepared._names) + len(prepared._to_flush))
        else:
            prepared._to_flush.clear()
            last = FORGET_PREPARED
        statements = "; ".join([*self.reset_statements, last])
        return (statements + self.set_up).encode(self.pgconn._encoding)

    def finish_call(self, seconds: float) -> None:
        """Cancel the statement that nobody waits for any more, and wait for its end, blocking."""
        deadline = time.monotonic() + seconds
        if self._is_active:
            self._try_cancel(timeout=seconds)
        while self._is_active:
            self.pgconn.flush()
            self.pgconn.consume_input()
            while not self.pgconn.is_busy() and (result := self.pgconn.get_result()) is not None:
                if result.status in COPYING:
                    return
            if self._is_active:
                left = max(0.0, deadline - time.monotonic())
                if not select.select([self.pgconn.socket], [], [], left)[0]:
                    return

    @property
    def _is_active(self) -> bool:
        """Whether the server still runs a statement, as far as is known here."""
        return not self.closed and self.pgconn.transaction_status == ACTIVE

    def abandon(self) -> None:
        """Close the socket now, keeping what `farewell` needs to end the statement on the
        server.

        While a call of another task waits for it, that call closes it: once closed, the number of
        the socket may be that of a file or socket of anybody's, whom the loop would mix up with it.
        """
        if self._ending:
            return
        if not self.closed:
            with contextlib.suppress(OSError, psycopg.Error):
                runs = self._is_active and not self.resetting and capabilities.has_cancel_safe()
                cancel = self.pgconn.cancel_conn() if runs else None
                self._farewell = Farewell(cancel, socket.socket(fileno=os.dup(self.pgconn.socket)))
        self._ending = self._waits_in is not None and not self._waits_in.is_closed()
        if not self._ending:
            # Also if the server has closed it: libpq may hold the socket still.
            self.pgconn.finish()

    def __del__(self, *args: Any) -> None:
        # Of a pooled connection the lease, or the session, has told already.
        if getattr(self, "wrapper", None) is None:
            super().__del__(*args)

    def farewell(self) -> Farewell | None:
        """Take what is left to do on the server for the abandoned connection."""
        farewell, self._farewell = self._farewell, None
        return farewell


class Farewell:
    """Cancels what the server still runs for a closed connection, and waits until its process is
    gone.

    Can be awaited again when it was cancelled; forgotten, it closes its copy of the socket.
    """

    def __init__(self, cancel: Any, sock: socket.socket) -> None:
        self._cancel, self._socket = cancel, sock
        self._cancel_started = False
        # A process that was told may be held up, and goes on with the statement before it ends.
        self._may_run = cancel is not None

    @property
    def is_untold(self) -> bool:
        """Whether the server may still run the statement, or go on with it."""
        return self._may_run

    def __await__(self) -> Generator[Any, Any, None]:
        return self._say().__await__()

    async def _say(self) -> None:
        if self._cancel is not None:
            with contextlib.suppress(psycopg.Error):
                if not self._cancel_started:
                    self._cancel_started = True
                    self._cancel.start()
                await waiting.wait_conn_async(
                    generators.cancel(self._cancel), interval=0.1, timeout=CANCEL_TIMEOUT
                )
            self._cancel = None
        # The server closes its end after its process has left every list of sessions.
        self._socket.setblocking(False)
        with contextlib.suppress(OSError):
            while await asyncio.get_running_loop().sock_recv(self._socket, 65536):
                pass
        self._may_run = False
        self._socket.close()

    def __del__(self) -> None:
        self._socket.close()


async def _resolved(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with the addresses of their hosts, so that psycopg need not ask for them,
    which blocks."""
    # The order of the attempts, and how often each is made, is decided when they are made.
    plain = {**params, "load_balance_hosts": "disable", "target_session_attrs": "any"}
    attempts = await conninfo_attempts_async(plain)
    places = {
        # What stands in the environment only is the same for all.
        name: [str(attempt.get(name) or get_param(params, name) or "") for attempt in attempts]
        for name in ("host", "hostaddr", "port")
    }
    return {**params, **{name: ",".join(all_) for name, all_ in places.items() if any(all_)}}


def _check_tools(connection: Any, alias: str) -> None:
    """Refuse what a tool that replaced `connect` made of the connection, if it cannot work.

    Raises:
        ConfigurationError: it is not one of ours, or its cursors are of psycopg's async kind: they
            do not run what they are told, but make a coroutine of it.
    """
    if not isinstance(connection, Connection):
        raise ConfigurationError(
            f"psycopg.Connection.connect gave a {_name(type(connection))} for {alias!r}, which "
            "blocks the event loop; let the tool that replaced it call the original with the class "
            "it is given"
        )
    for made in (connection.cursor(), connection.server_cursor_factory):
        if inspect.iscoroutinefunction(getattr(made, "execute", None)):
            kind = made if isinstance(made, type) else type(made)
            raise ConfigurationError(
                f"the cursors of {alias!r} are {_name(kind)}, which is of psycopg's async kind; "
                "let the tool that sets cursor_factory, or OPTIONS, give a subclass of "
                "psycopg.Cursor"
            )


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


class _Driver:
    """The `psycopg` module as Django's backend sees it, but for `connect`."""

    connect = staticmethod(Connection.connect)

    def __getattr__(self, name: str) -> Any:
        return getattr(psycopg, name)


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


def _are_same(adapters: AdaptersMap, template: AdaptersMap) -> bool:
    """Whether nothing was registered: whatever is copies first what it shares with others."""
    return (
        adapters._loaders == template._loaders
        and adapters._dumpers == template._dumpers
        and adapters._dumpers_by_oid == template._dumpers_by_oid
        and adapters.types._registry is template.types._registry
    )


# Statements that can change how a transaction begins, or what it may do.
SETTING = frozenset({"SET", "RESET", "DISCARD", "BEGIN", "START"})
# What they say then; the sign is that of a name with escapes: U&"...".
OPENS = frozenset({"WRITE", "&"})
# Statements that may hold transactions of their own, when none is open.
COMPOUND = frozenset({"CALL", "DO"})
# Statements that a read-only transaction allows although they change files or the server.
CHANGES_MORE = frozenset({"ANALYZE", "CHECKPOINT", "CLUSTER", "LOAD", "REINDEX", "VACUUM"})
LOOKED_AT = SETTING | COMPOUND | CHANGES_MORE | {"ALTER", "COPY"}
# Before a statement that commits by itself.
ONLY_READ = b"SET default_transaction_read_only = on"


class Mixin(BridgedMixin, _Base):
    """What bridges Django's PostgreSQL wrapper, or one that derives from it."""

    Database: Any = _Driver()
    has_deferrable = True
    unsupported_options = ()
    multiple_statements = True
    exports_snapshots = True
    connection: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._named_cursors: weakref.WeakSet[Any] = weakref.WeakSet()

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
        with self.in_own_use():
            return super().is_usable()

    def start(self, options: TransactionOptions) -> None:
        self._read_only(options)
        self.connection.began = self.connection.left_by_sql = False
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
            opens = "PROGRAM" in words or ("TO", "''") in pairwise(words)
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

    def begin_lease(self, lease: object) -> None:
        super().begin_lease(lease)
        if self.pooled:
            self.connection.clean = False

    def connected(self) -> None:
        # As Django's `_configure_connection` does.
        own = []
        if self.timezone_name:
            own.append(self.compose("SET TimeZone = %s", [self.timezone_name]))
        if role := self.settings_dict["OPTIONS"].get("assume_role"):
            own.append(self.compose("SET ROLE %s", [role]))
        self.connection.set_up = "".join(f"\n; {text}" for text in own + self.set_up)
        self.connection.prepares_again = "prepare" in self.connection.set_up.lower()
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
        if not self.connection.clean:
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
