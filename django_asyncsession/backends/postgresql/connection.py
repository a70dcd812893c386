"""psycopg's sync connection, whose waits await the event loop in the bridge."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import select
import socket
import sys
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import psycopg
from greenlet import getcurrent
from psycopg import generators, pq, waiting
from psycopg._capabilities import capabilities
from psycopg._conninfo_utils import get_param
from psycopg.abc import PQGen
from psycopg.adapt import AdaptersMap
from psycopg.conninfo import conninfo_attempts_async, conninfo_to_dict, timeout_from_conninfo
from psycopg.waiting import WAIT_R

from django_asyncsession.backends.attributes import Attributes
from django_asyncsession.bridge import Bridge, await_, in_bridge
from django_asyncsession.exceptions import ConfigurationError

from .farewell import Farewell
from .wire import Wire

RV = TypeVar("RV")
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
COMMIT, ROLLBACK = b"COMMIT", b"ROLLBACK"
ENDS = (COMMIT, ROLLBACK)
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
    | {"resetting", "reset_error", "reset_works", "wire"}
)
# The server's clock and ours may differ by the rest while a timeout runs.
TIMER_SHARE = 0.95


class Connection(psycopg.Connection[Any]):
    """psycopg's sync connection; in the bridge its waits await, and a wait that is cut short
    closes it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # psycopg's lock is a thread's: held across a switch it would freeze the loop when a second
        # task wants it.
        # The session's own queue lets one task in at a time, and Django one thread.
        self.lock: Any = contextlib.nullcontext()
        self.wrapper: weakref.ref[Any] | None = None
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
        # Nothing was sent since the last reset that can have left anything. The answer to a reset
        # was not read yet.
        self.clean = True
        self.resetting = False
        # What sends statements below the cursor, and reads for all, in a pool's loop.
        self.wire: Wire | None = None
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
        name = getattr(gen, "__name__", "")
        if self.wrapper is not None and (wrapper := self.wrapper()) is not None:
            wrapper.check_caller()
            if not wrapper.own_use and name not in HARMLESS:
                wrapper.note_unseen("COPY" if "copy" in name else "SQL with the driver")
        if name not in HARMLESS:
            self.note_touched()
        self._waits_since = time.monotonic()
        if not isinstance(getcurrent(), Bridge):
            if self.wire is not None:
                self.wire.pause()
            return super().wait(gen, interval=interval, timeout=timeout)
        steps = [gen]
        del gen
        try:
            return await_(self._awaited(steps.pop(), interval, timeout))
        except Exception:
            raise
        except BaseException:
            # Cancelled, or closed, in the middle of a round trip: what the server does now is not
            # certain.
            self.cut()
            raise
        finally:
            if self._waits_in is not None or self._ending:
                self.note_end_of_wait()
            self.note_status()

    def _awaited(
        self, gen: PQGen[RV], interval: float, timeout: float | None
    ) -> Coroutine[Any, Any, RV]:
        wire = self.wire
        if wire is not None and wire.loop is asyncio.get_running_loop():
            return wire.drive(gen, interval, timeout)
        steps = self._until_abandoned(gen)
        return waiting.wait_async(steps, self.pgconn.socket, interval=interval, timeout=timeout)

    def cut(self) -> None:
        """Close the connection, because a round trip was left in the middle."""
        self.note_end_of_wait()
        wrapper = self.owner
        if wrapper is not None:
            wrapper.cut_off()
        if wrapper is None or wrapper.cut:
            self.abandon()

    @property
    def owner(self) -> Any:
        """Django's connection that it belongs to, as long as there is one."""
        return None if self.wrapper is None else self.wrapper()

    def note_touched(self) -> None:
        """Note that something was sent, or may have been, that can leave something behind."""
        self.clean = False
        if self.wire is not None:
            self.wire.forget_loaders()

    def waited(self) -> float:
        """Seconds since the last round trip began."""
        sent = 0.0 if self.wire is None else self.wire.since
        return time.monotonic() - max(self._waits_since, sent)

    def _until_abandoned(self, gen: PQGen[RV]) -> PQGen[RV]:
        """`gen`, ended at the first step after `abandon`: in a tenth of a second at the latest."""
        self.note_wait(asyncio.get_running_loop())
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
            self.note_end_of_wait()

    def note_wait(self, loop: asyncio.AbstractEventLoop) -> None:
        """Note that a call waits for the server: it closes the socket, if that is to be done."""
        self._waits_in = loop

    @property
    def is_left(self) -> bool:
        """Whether it was closed while a call waited, which has to close the socket."""
        return self._ending

    def note_end_of_wait(self) -> None:
        """Note that no call waits any more; close the socket, if it should be."""
        self._waits_in = None
        if self._ending:
            self._finish()

    def _finish(self) -> None:
        if self.wire is None:
            self.pgconn.finish()
        else:
            self.wire.close()

    def close(self) -> None:
        super().close()
        if self.wire is not None:
            self.wire.close()

    def note_status(self) -> None:
        """Note what the server said of the transaction."""
        status = self.pgconn.transaction_status
        if status in (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR):
            self.began = True
        elif status == IDLE and self.began:
            self.began, self.left_by_sql = False, True

    def set_autocommit(self, value: bool) -> None:
        if self.wrapper is not None and (wrapper := self.wrapper()) is not None:
            wrapper.check_caller()
        if self.began and not value:
            # The wire has sent BEGIN: Django's code goes on in that transaction.
            self._autocommit = False
            return
        for _ in self._set_autocommit_gen(value):
            raise AssertionError("setting autocommit waits for nothing")

    def note_opened(self) -> None:
        """Remember the attributes, and what values are converted with: every lease begins so."""
        template = AdaptersMap(self.adapters)
        attributes = Attributes(self, NOT_OF_A_LEASE)
        self.wire = Wire.attached(self)
        self._watch_adapters()
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
            self._watch_adapters()

    def _watch_adapters(self) -> None:
        """Let the wire know when a loader is registered."""
        if (wire := self.wire) is not None:
            wire.forget_loaders()
            adapters: Any = self.adapters
            adapters._register_loader_callback = _forgetting(weakref.ref(wire))

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
        if not together or not self.may_reset_behind or self._pipeline:
            return (yield from super()._exec_command(command, result_format))
        return (yield from self._end_and_reset(command))

    def _deallocate(self, name: bytes | None) -> PQGen[None]:
        if name is None and self.wire is not None:
            self.wire.forget_prepared()
        yield from super()._deallocate(name)

    @property
    def may_reset_behind(self) -> bool:
        """Whether there is something to reset that can go along with the end of a transaction."""
        return not self.clean and self.reset_works and self.is_read_as_opened

    def note_end(self, command: bytes) -> None:
        """Note that the transaction is ended by us."""
        self.began = False
        prepared: Any = self._prepared
        if command == ROLLBACK and prepared._names:
            # psycopg forgets its prepared statements then.
            self._forget_prepared()

    def _forget_prepared(self) -> None:
        """Let the next reset drop all of them: those of PREPARE can only go together with ours."""
        prepared: Any = self._prepared
        prepared.clear()
        if self.wire is not None:
            self.wire.forget_prepared()

    def _end_and_reset(self, command: bytes) -> PQGen[Any]:
        """End the transaction and reset the connection in one round trip. The server runs the
        reset after the end, in a transaction of its own, and not at all if the end fails."""
        self._check_connection_ok()
        self.note_end(command)
        self.pgconn.send_query(command + b"; " + self.reset_sql())
        yield from generators.send(self.pgconn)
        ended = yield from generators.fetch(self.pgconn)
        try:
            yield from self._read_reset()
        except psycopg.OperationalError:
            # Lost, but after the server's word on the end.
            self._finish()
        if ended is not None and ended.status == pq.ExecStatus.FATAL_ERROR:
            raise psycopg.errors.error_from_result(ended, encoding=self.pgconn._encoding)
        return ended

    def send_reset(self) -> None:
        """Send what brings back the state after connecting, without waiting for the answer."""
        self.pgconn.send_query(self.reset_sql())
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
        if self.note_reset(results):
            return (yield from self._read_reset())
        return self.clean

    def note_reset(self, results: list[Any]) -> bool:
        """Note what the server said to the reset; whether another one was sent, because there were
        statements of PREPARE."""
        server = self.pgconn
        while server.notifies():
            """They came for the last lease."""
        self.resetting = False
        if self.wire is not None:
            self.wire.said = False
        failed = [result for result in results if result.status not in DONE]
        self.clean = bool(results) and not failed
        self.reset_works = self.reset_works or self.clean
        if failed:
            self.reset_error = failed[0].get_error_message(server._encoding)
        if self.clean and results[len(self.reset_statements)].ntuples:
            self._forget_prepared()
            self.send_reset()
            return True
        return False

    def reset_sql(self) -> bytes:
        """What brings back the state after connecting."""
        prepared: Any = self._prepared
        if self.prepares_again or None in prepared._to_flush:
            self._forget_prepared()
        own = 0 if self.wire is None else self.wire.prepared
        if prepared._names or own:
            own += len(prepared._names) + len(prepared._to_flush)
            last = FIND_PREPARED.format(own)
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
        self._ending = self._is_waited_for
        if not self._ending:
            # Also if the server has closed it: libpq may hold the socket still.
            self._finish()
        elif self.wire is not None:
            self.wire.wake()

    @property
    def _is_waited_for(self) -> bool:
        loop = self._waits_in
        if loop is None and self.wire is not None and self.wire.waits:
            loop = self.wire.loop
        return loop is not None and not loop.is_closed()

    def __del__(self, *args: Any) -> None:
        if getattr(self, "wire", None) is not None and not sys.is_finalizing():
            self._finish()
        # Of a pooled connection the lease, or the session, has told already.
        if getattr(self, "wrapper", None) is None:
            super().__del__(*args)

    def farewell(self) -> Farewell | None:
        """Take what is left to do on the server for the abandoned connection."""
        farewell, self._farewell = self._farewell, None
        return farewell


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


def _forgetting(wire: weakref.ref[Wire]) -> Callable[[int, Any], None]:
    def forget(oid: int, loader: Any) -> None:
        if (alive := wire()) is not None:
            alive.forget_loaders()

    return forget


def _are_same(adapters: AdaptersMap, template: AdaptersMap) -> bool:
    """Whether nothing was registered: whatever is copies first what it shares with others."""
    return (
        adapters._loaders == template._loaders
        and adapters._dumpers == template._dumpers
        and adapters._dumpers_by_oid == template._dumpers_by_oid
        and adapters.types._registry is template.types._registry
    )


# Before a statement that commits by itself.
ONLY_READ = b"SET default_transaction_read_only = on"
