"""Statements below psycopg's cursor, at most one under way, on the one reader of the connection."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from time import monotonic
from typing import Any, NoReturn

import psycopg
from django.db.backends.postgresql.psycopg_any import register_tzloader
from psycopg import adapt, pq
from psycopg._capabilities import capabilities
from psycopg.abc import Transformer
from psycopg.errors import error_from_result
from psycopg.pq.abc import PGresult

from .reader import ACTIVE, COPIES, FATAL, SQLSTATE, Host, Reader

Values = Sequence[bytes | None]

# Statements that a connection has prepared on the server, at most.
STATEMENTS = 100
# Parameters that the protocol can count.
MOST_VALUES = 65535
GOOD = frozenset(
    map(int, (pq.ExecStatus.TUPLES_OK, pq.ExecStatus.COMMAND_OK, pq.ExecStatus.EMPTY_QUERY))
)
IDLE = pq.TransactionStatus.IDLE
FUNCTION = pq.DiagnosticField.SOURCE_FUNCTION
TIMESTAMPTZ = psycopg.adapters.types["timestamptz"].oid
ENDS = (b"COMMIT", b"ROLLBACK")


class Wire(Reader):
    """Sends statements on a connection and awaits their results, in one event loop.

    Attributes:
        since: when the last statement was sent, in seconds of the monotonic clock.
    """

    __slots__ = ("_sequence", "_statements", "_to_close", "_transformer", "since")

    def __init__(self, connection: Host, loop: asyncio.AbstractEventLoop) -> None:
        # The names of what the server has prepared, the one that was used last at the end.
        self._statements: OrderedDict[bytes, bytes] = OrderedDict()
        self._to_close: list[bytes] = []
        self._sequence = 0
        # What finds, and keeps, the loaders of each type.
        self._transformer: Transformer | None = None
        self.since = 0.0
        super().__init__(connection, loop)

    def __repr__(self) -> str:
        state = "dead" if self.is_dead else "busy" if self.waits else "idle"
        return f"<Wire {state}, {len(self._statements)} statements>"

    # Statements

    async def execute(
        self,
        sql: bytes,
        values: Values = (),
        *,
        prepare: bool = True,
        begin: bytes | None = None,
        harmless: bool = False,
    ) -> PGresult:
        """Run one statement, in one round trip, and return its result, in the text format.

        Args:
            sql: with $1, $2 ... for the values.
            values: in the text format; None is NULL.
            prepare: keep it on the server, the last hundred at most.
            begin: statements before it, divided by semicolons; if one fails, it is not run.
            harmless: it is known to leave nothing on the connection.

        Raises:
            django.db.Error: what the server says, or that it is lost; the cause is psycopg's.
            asyncio.CancelledError, GeneratorExit: the connection is closed.
        """
        name = self._statements.get(sql)
        if name is None or begin is not None or not prepare:
            return await self._execute(sql, values, prepare, begin, harmless)
        self._statements.move_to_end(sql)
        if self._fut is not None or not self._reads:
            self._get_ready()
        if not harmless:
            self._touch()
        self.since, self._results, pgconn = monotonic(), [], self._pgconn
        try:
            pgconn.send_query_prepared(name, values)
            if pgconn.flush():
                self._write()
            self._fut = fut = self.loop.create_future()
            results = await fut
        except BaseException as exc:
            self._fail(exc)
        if self._notes:
            self._deliver()
        if not harmless:
            self._note_status()
        if len(results) == 1 and results[0].status in GOOD:
            return results[0]  # type: ignore[no-any-return]
        if self._is_stale(sql, results) and pgconn.transaction_status == IDLE:
            return await self._execute(sql, values, True, None, harmless)
        self._refuse(results)

    async def simple(
        self, sql: bytes, *, reset: bool = False, harmless: bool = False
    ) -> list[PGresult]:
        """Run a text of statements without values, such as COMMIT, and return a result of each.

        Args:
            sql: the text.
            reset: it ends the lease too: the connection is reset in the same round trip, if
                anything was left on it. The answer to the reset may have to be settled.
            harmless: as in `execute`; COMMIT and ROLLBACK are.

        Raises:
            As `execute`.
        """
        if self._fut is not None or not self._reads:
            self._get_ready()
        connection = self._connection()
        if sql in ENDS:
            harmless = True
            if connection is not None:
                connection.note_end(sql)
        if not harmless:
            self._touch()
        ends = reset and connection is not None and connection.may_reset_behind
        self.since = monotonic()
        self._results = []
        try:
            text = sql + b"; " + connection.reset_sql() if ends else sql  # type: ignore[union-attr]
            self._pgconn.send_query(text)
            if self._pgconn.flush():
                self._write()
            self._fut = fut = self.loop.create_future()
            results = await fut
        except BaseException as exc:
            results = self._ended(exc, ends)
        if self._notes:
            self._deliver()
        if ends and connection is not None:
            connection.note_reset(results[1:])
            del results[1:]
        if connection is not None:
            connection.note_status()
        if not results or results[-1].status not in GOOD:
            self._refuse(results)
        return results  # type: ignore[no-any-return]

    def _ended(self, error: BaseException, ends: bool) -> list[PGresult]:
        """The server's word on the end of the transaction, which was the first of what was asked
        for, if only the rest was lost."""
        results = self._results
        if ends and isinstance(error, psycopg.Error) and results and results[0].status in GOOD:
            self.close()
            return results
        self._fail(error)

    async def _execute(
        self, sql: bytes, values: Values, prepare: bool, begin: bytes | None, harmless: bool
    ) -> PGresult:
        """What `execute` does for a statement that is not just to be run again."""
        if self._fut is not None or not self._reads:
            self._get_ready()
        if not harmless:
            self._touch()
        self.since = monotonic()
        self._results = []
        try:
            if prepare or begin is not None:
                names = self._send_all(sql, values, prepare, begin)
            else:
                names = [b"run"]
                self._pgconn.send_query_params(sql, values)
            if self._pgconn.flush():
                self._write()
            self._fut = fut = self.loop.create_future()
            results = await fut
        except BaseException as exc:
            self._fail(exc)
        if self._notes:
            self._deliver()
        if begin is not None or not harmless:
            self._note_status()
        known = self._statements.get(sql)
        result = self._sort_out(sql, names, results)
        if result is not None:
            return result
        # A statement that was prepared just now cannot be stale.
        if known is not None and self._is_stale(sql, results):
            if begin is not None:
                # Nothing was done in the transaction.
                begin = b"ROLLBACK; " + begin.removeprefix(b"ROLLBACK; ")
                return await self._execute(sql, values, prepare, begin, harmless)
            if self._pgconn.transaction_status == IDLE:
                return await self._execute(sql, values, prepare, begin, harmless)
        self._refuse(results)

    def _send_all(
        self, sql: bytes, values: Values, prepare: bool, begin: bytes | None
    ) -> list[bytes]:
        """Send what leads to the statement, the statement, and what tidies up, as one pipeline;
        return what gives a result, in that order."""
        if len(values) > MOST_VALUES:
            raise psycopg.OperationalError(f"{len(values)} values; at most {MOST_VALUES} can be")
        pgconn, names = self._pgconn, []
        pgconn.enter_pipeline_mode()
        self._is_pipelined = True
        for part in () if begin is None else _parts(begin):
            pgconn.send_query_params(part, None)
            names.append(b"begin")
        if not prepare:
            pgconn.send_query_params(sql, values)
        elif (known := self._statements.get(sql)) is not None:
            self._statements.move_to_end(sql)
            pgconn.send_query_prepared(known, values)
        else:
            self._sequence += 1
            name = b"_das_%d" % self._sequence
            pgconn.send_prepare(name, sql)
            names.append(name)
            pgconn.send_query_prepared(name, values)
            self._make_room()
        names.append(b"run")
        names += self._send_closes()
        pgconn.pipeline_sync()
        return names

    def _make_room(self) -> None:
        """Let go of the statement that was not used for longest, if there is one too many."""
        while len(self._statements) >= STATEMENTS:
            _, evicted = self._statements.popitem(last=False)
            self._to_close.append(evicted)

    def _send_closes(self) -> list[bytes]:
        if not self._to_close:
            return []
        with_message = capabilities.has_send_close_prepared()
        for name in self._to_close:
            if with_message:
                self._pgconn.send_close_prepared(name)
            else:
                self._pgconn.send_query_params(b"DEALLOCATE " + name, None)
        return [b"close " + name for name in self._to_close]

    def _sort_out(self, sql: bytes, names: list[bytes], results: list[PGresult]) -> PGresult | None:
        """Note which statements the server has now; return the result of the one that was to be
        run, if nothing failed."""
        found, failed = None, len(results) < len(names)
        for name, result in zip(names, results, strict=False):
            good = result.status in GOOD
            failed = failed or not good
            if name == b"run":
                found = result
            elif good and name.startswith(b"close "):
                self._to_close.remove(name.removeprefix(b"close "))
            elif good and name != b"begin":
                self._statements[sql] = name
        return None if failed else found

    def _is_stale(self, sql: bytes, results: list[PGresult]) -> bool:
        """Whether a statement failed because it was prepared before something changed; such a one
        is forgotten."""
        failed = next((result for result in results if result.status == FATAL), None)
        if failed is None:
            return False
        state = failed.error_field(SQLSTATE) or b""
        is_unknown = state == b"26000"
        # Its result would have other columns than before.
        is_other = state == b"0A000" and failed.error_field(FUNCTION) == b"RevalidateCachedQuery"
        # What the types of its parameters were may be gone, and have come again as others.
        if is_unknown or is_other or state == b"XX000" or state.startswith(b"42"):
            self._forget(sql, is_unknown)
        return is_unknown or is_other

    def _forget(self, sql: bytes, is_unknown: bool) -> None:
        name = self._statements.pop(sql, None)
        if name is not None and not is_unknown:
            self._to_close.append(name)

    def _refuse(self, results: list[PGresult]) -> NoReturn:
        """Raise what the server says against a statement."""
        failed = next((result for result in results if result.status == FATAL), None)
        connection = self._connection()
        if connection is not None and connection.closed:
            self.close()
        if failed is not None:
            self._raise(error_from_result(failed, encoding=self._encoding))
        copies = any(result.status in COPIES for result in results)
        if connection is not None:
            # It waits for data, or gives some.
            connection.abandon()
        what = "COPY cannot be used so; use copy()" if copies else "no result of the statement"
        self._raise(psycopg.ProgrammingError(what))

    @property
    def _encoding(self) -> str:
        try:
            return self._pgconn._encoding
        except psycopg.Error:
            return "utf-8"

    def _raise(self, error: BaseException) -> NoReturn:
        """Raise Django's error for one of psycopg's."""
        connection = self._connection()
        wrapper = None if connection is None else connection.owner
        try:
            if wrapper is None:
                raise error
            with wrapper.wrap_database_errors:
                raise error
        finally:
            # It keeps this frame.
            del error
        raise AssertionError("an error was raised")

    def _fail(self, error: BaseException) -> NoReturn:
        """Raise what ended a round trip before its answer was whole."""
        self._fut = None
        connection = self._connection()
        try:
            if connection is None:
                self.close()
            elif not isinstance(error, Exception):
                # Cancelled, or closed: what the server does now is not certain.
                connection.cut()
            elif connection.is_left or self._pgconn.status != pq.ConnStatus.OK:
                connection.note_end_of_wait()
                self.close()
            elif self._is_pipelined or self._pgconn.transaction_status == ACTIVE:
                connection.abandon()
            if isinstance(error, psycopg.Error):
                self._raise(error)
            raise error
        finally:
            # It keeps this frame.
            del error

    def _touch(self) -> None:
        if (connection := self._connection()) is not None:
            connection.note_touched()

    def _note_status(self) -> None:
        if (connection := self._connection()) is not None:
            connection.note_status()

    def _deliver(self) -> None:
        """Hand notifications on that came with a result."""
        notes, self._notes = self._notes, []
        if (handler := self._pgconn.notify_handler) is not None:
            for note in notes:
                handler(note)

    # Rows

    def rows(self, result: PGresult) -> list[tuple[Any, ...]]:
        """The rows of a result of `execute`, each value as a cursor of Django's would give it.

        Raises:
            django.db.DataError: a value that Python has nothing for, such as a date after 9999.
        """
        # Taken, because a loader of the user's may come here again.
        transformer, self._transformer = self._transformer, None
        if transformer is None:
            transformer = self._made_transformer()
        try:
            # The loaders of this result's columns: libpq does not check that they are as many.
            transformer.set_pgresult(result)
            rows = transformer.load_rows(0, result.ntuples, tuple)
        except psycopg.Error as exc:
            self._raise(exc)
        # It would keep all of the rows.
        transformer.set_pgresult(None, set_loaders=False)
        self._transformer = transformer
        return rows

    def _made_transformer(self) -> Transformer:
        context: Any = self._connection()
        wrapper = context.owner
        if wrapper is not None:
            loader: Any = context.adapters.get_loader(TIMESTAMPTZ, pq.Format.TEXT)
            # As Django does for each of its cursors.
            if wrapper.timezone != getattr(loader, "timezone", wrapper.timezone):
                context = context.cursor()
                register_tzloader(wrapper.timezone, context)
        return adapt.Transformer(context)

    def forget_loaders(self) -> None:
        """Look the loaders up anew: adapters, or settings that they go by, may be others."""
        self._transformer = None

    # What is prepared

    @property
    def prepared(self) -> int:
        """How many statements the server has prepared for it."""
        return len(self._statements) + len(self._to_close)

    def forget_prepared(self) -> None:
        """Note that the server has none any more, or is told to."""
        self._statements.clear()
        self._to_close.clear()

    def _detach(self) -> None:
        super()._detach()
        # It keeps the connection.
        self._transformer = None


@lru_cache(maxsize=128)
def _parts(sql: bytes) -> tuple[bytes, ...]:
    """The statements of a text, each of which a pipeline sends by itself."""
    return tuple(part.strip() for part in sql.split(b";") if part.strip())
