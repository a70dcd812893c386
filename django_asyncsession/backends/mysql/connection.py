"""asyncmy behind the interface that Django's MySQL backend expects of MySQLdb.

Every round trip is awaited in the bridge. asyncmy's cursors are not used: they ask for warnings
after each statement, and quote bytes wrongly when the server takes no backslashes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import struct
import time
import weakref
from collections.abc import Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import MySQLdb
from asyncmy import converters, errors
from asyncmy.charset import charset_by_name
from asyncmy.constants.COMMAND import COM_QUERY, COM_SET_OPTION
from asyncmy.constants.SERVER_STATUS import (
    SERVER_STATUS_IN_TRANS,
    SERVER_STATUS_NO_BACKSLASH_ESCAPES,
)

from django_asyncsession.backends.attributes import Attributes
from django_asyncsession.bridge import await_, in_bridge
from django_asyncsession.results import Reader, current_reader
from django_asyncsession.statements import change_in

from .cursors import Cursor, StreamingCursor
from .errors import (
    SERVER_GONE,
    SERVER_LOST,
    STATEMENT_ONLY,
    is_last_word,
    translated,
)
from .killer import STOP_SECONDS, Farewell, Killer, say_goodbye

T = TypeVar("T")

logger = logging.getLogger("django_asyncsession")
COM_RESET_CONNECTION = 0x1F
# What a parameter may be besides strings and bytes.
ENCODED = {type_ for type_ in converters.conversions if isinstance(type_, type)} - {str, bytes}
# The answer of a statement that KILL QUERY ended.
INTERRUPTED = 1317
# How often what has come of a stream that nobody wants is skipped, each time what fits in asyncmy's
# buffer, before the server is asked to send no more.
SKIPS = 8
# Such statements, which may be put in a transaction instead without meaning something else.
WRITES = frozenset({"INSERT", "UPDATE", "DELETE", "REPLACE", "LOAD", "WITH"})
OPEN_ENDED = "SET autocommit = 0"
BEGIN = ("START TRANSACTION",)
# The server tells when SQL sets the character set, among other things.
SESSION_TRACK, STATE_CHANGED = 1 << 23, 0x4000
# Encodings in which the byte of a backslash is a backslash always.
WITHOUT_BACKSLASH = frozenset({"utf8", "ascii", "latin1", "cp1252"})
# Attributes of asyncmy's connection that code may change, and those of the facade.
CHANGEABLE = frozenset(
    {"_encoders", "_decoders", "_charset", "_encoding", "_use_unicode", "_sql_mode"}
    | {"_local_infile", "_binary_prefix", "_max_allowed_packet", "autocommit_mode"}
)
CHANGEABLE_HERE = frozenset({"_autocommit"})


class Connection:
    """One connection, as MySQLdb's; `raw` is asyncmy's.

    `dirty` while a round trip is under way, and ever after if it did not end as it should: such a
    connection is never used again.
    """

    def __init__(self, wrapper: Any, raw: Any, init_sql: str, killer: Killer) -> None:
        self.raw = raw
        self.init_sql = init_sql
        self._killer = killer
        killer.users.add(self)
        self._owner = weakref.ref(wrapper)
        self._autocommit = True
        self._streaming: weakref.ref[StreamingCursor] | None = None
        # Nothing is lost when the server does not go on with the statement that streams.
        self._may_stop = False
        self._reader: Reader | None = None
        self._transport = raw._transport
        self.fd: int = raw._transport.get_extra_info("socket").fileno()
        self.begin = BEGIN
        # Runs before the next statement, and before each, in the same packet.
        self.prelude: tuple[str, ...] = ()
        self.always: tuple[str, ...] = ()
        # A transaction was begun; it was ended by SQL that is not ours; by the server.
        self.began = self.left_by_sql = self.taken_back = False
        # The present statement commits what was done before it, as the server's rules have it.
        self.commits_implicitly = False
        self.dirty = self.closed = False
        # The server takes several statements in one packet, as after connecting; a text may be
        # such now.
        self._takes_several, self._several_wanted = True, False
        # The server's character set may be another one than that of the literals here: because of
        # what connecting and each reset set, or because the server told that SQL has set something.
        self.sets_more = self._may_differ = self._told = False
        # What brings back, after a reset and `init_sql`, what connecting has set.
        self.set_up = ""
        self._encoding: str = raw._encoding
        # Nothing was sent since the last reset. The answer to a reset was not read yet.
        self.clean = True
        self.resetting = False
        # Seconds from the last statement that failed to its error.
        self.last_took = 0.0
        self._opened: tuple[Attributes, Attributes] | None = None

    def note_opened(self) -> None:
        """Remember the attributes, and what values are converted with: every lease begins so."""
        own = Attributes(self, frozenset(vars(self)) - CHANGEABLE_HERE)
        self._opened = own, Attributes(self.raw, only=CHANGEABLE)

    def note_set_up(self) -> None:
        """What connecting has set so far, each reset sets again."""
        self.sets_more, self._told = self.sets_more or self._may_differ, False

    def restore(self) -> None:
        """Bring back what `note_opened` remembered."""
        if self._opened is not None:
            own, of_driver = self._opened
            own.restore(self)
            of_driver.restore(self.raw)

    # MySQLdb's interface

    def cursor(self) -> Cursor:
        """A cursor that has all rows in memory once it has executed."""
        return Cursor(self)

    def streaming_cursor(self) -> StreamingCursor:
        """A cursor that reads rows from the network as they are fetched."""
        return StreamingCursor(self)

    def autocommit(self, on: bool) -> None:
        """Say whether statements commit by themselves; BEGIN is sent with the next statement."""
        self._autocommit = bool(on)

    def get_autocommit(self) -> bool:
        """Whether statements commit by themselves."""
        return self._autocommit

    def commit(self) -> None:
        """Commit, if anything was begun."""
        self._end_transaction("COMMIT")

    def rollback(self) -> None:
        """Roll back, if anything was begun."""
        self._end_transaction("ROLLBACK")

    def ping(self) -> None:
        """Ask the server for an answer; never reconnects."""
        self.run(self.raw.ping(False))

    def close(self) -> None:
        """Say goodbye, without waiting for an answer."""
        self.abandon()

    def thread_id(self) -> int:
        """The connection's id on the server."""
        return int(self.raw.thread_id())

    def get_server_info(self) -> str:
        """The server's version as it says it."""
        return str(self.raw.server_version)

    def character_set_name(self) -> str:
        """The connection's character set."""
        return str(self.raw.character_set_name())

    def escape(self, value: Any, mapping: Any = None) -> Any:
        """The value as an SQL literal."""
        return self.literal(value)

    def _end_transaction(self, sql: str) -> None:
        self.finish_stream()
        if self.began or self.in_transaction:
            self.began = self.taken_back = False
            wrapper = self._owner()
            together = wrapper is not None and wrapper.ends_lease
            self.run(self._end_and_reset(sql) if together else self.raw.query(sql))

    @property
    def escapes_with_backslashes(self) -> bool:
        """Whether a backslash escapes in the server's strings, as it said last."""
        return not self.raw.server_status & SERVER_STATUS_NO_BACKSLASH_ESCAPES

    # The transaction

    @property
    def in_transaction(self) -> bool:
        """Whether the server, when it last spoke, was in a transaction."""
        return bool(self.raw.server_status & SERVER_STATUS_IN_TRANS)

    def _before(self, sql: bytes) -> tuple[str, ...]:
        """What goes in front of the next statement."""
        if (wrapper := self._owner()) is not None and not wrapper.own_use:
            wrapper.note_unseen()
            if wrapper.reads_only:
                wrapper.check_reads_only(sql.decode(errors="replace"))
        before, self.prelude = self.always + self.prelude, ()
        if not self._autocommit and not self.in_transaction:
            before += self.begin
            self.began = True
        return before

    def _ask_what_is_left(self, error: Exception) -> None:
        """Find out whether the server took back the transaction, which its errors do not say.

        It does so after a deadlock, when a lock table is full, and, as it is configured, when
        waiting for a lock takes too long.
        """
        failed = isinstance(error, MySQLdb.OperationalError | MySQLdb.InternalError)
        if self.began and failed and not STATEMENT_ONLY & set(error.args[:1]):
            self.began = False
            with contextlib.suppress(MySQLdb.Error):
                self.run(self.raw.query("DO 0"))
            self.taken_back = not self.began

    # Round trips

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Await one round trip; an end that is not clean closes the connection.

        Raises:
            MySQLdb's errors.
        """
        wrapper = self._check_usable(coroutine)
        self.dirty, self.clean, started = True, False, time.monotonic()
        if self._streaming is not None:
            self._transport.resume_reading()
        try:
            result = await_(coroutine)
        except errors.MySQLError as exc:
            error, self.last_took = translated(exc), time.monotonic() - started
            if is_last_word(exc) or self.raw._stream_broken:
                wrapper.abandon()
            else:
                self.dirty = False
                # With an error the server does not tell what the statement has set before it.
                self._may_differ = self._told = True
                self._ask_what_is_left(error)
            wrapper.driver_failed(error)
            raise error from exc
        except (OSError, RuntimeError, EOFError, struct.error) as exc:
            wrapper.abandon()
            error = MySQLdb.OperationalError(SERVER_LOST, f"connection lost during query: {exc}")
            wrapper.driver_failed(error)
            raise error from exc
        except Exception:
            # The answer could not be read (bytes that are no text): what is left of it remains.
            wrapper.abandon()
            raise
        except BaseException:
            wrapper.cut_off()
            raise
        self.dirty = False
        self._note_status()
        self._hold_back()
        return result

    def _check_usable(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        wrapper = self._owner()
        try:
            if wrapper is None or self.closed or self.dirty or self.raw._stream_broken:
                raise MySQLdb.OperationalError(SERVER_GONE, "MySQL server has gone away")
            wrapper.check_caller()
            if not in_bridge():
                raise MySQLdb.InterfaceError(
                    0, "this connection awaits; use it in session.run_sync() only"
                )
        except BaseException:
            coroutine.close()
            raise
        return wrapper

    def _note_status(self) -> None:
        self._note_changed()
        if self.in_transaction:
            self.began = True
        elif self.began:
            self.began, self.left_by_sql = False, not self.commits_implicitly

    def _note_changed(self) -> None:
        if self.raw.server_status & STATE_CHANGED:
            self._may_differ = self._told = True

    def _hold_back(self) -> None:
        """Let the server wait with the rows that nobody has asked for yet: asyncmy takes in all
        that comes."""
        if self._streaming is not None:
            self._transport.pause_reading()

    def execute(self, sql: bytes, several: bool = False) -> list[Any]:
        """Run one statement, or `several`, and read all results.

        Raises:
            MySQLdb's errors, of whichever statement failed.
        """
        self.finish_stream()
        several = several or self._several_wanted
        guards = self._autocommit and not self._killer.is_ready and self._must_guard(sql)
        before = self._sent_before(sql, several, (OPEN_ENDED,) if guards else ())
        text = "; ".join([*before, ""]).encode() + sql
        results = self._guarded if guards else self._results
        return self.run(results(text, len(before), several or bool(before)))

    def _must_guard(self, sql: bytes) -> bool:
        """Whether the statement writes, commits by itself, and could not be ended on the server: no
        connection to it is there for that, nor to be had."""
        if sql[:6].upper() == b"SELECT" or self.in_transaction or not in_bridge():
            return False
        wrapper = self._owner()
        if wrapper is None or wrapper.scanner.first_word(sql.decode("latin1")) not in WRITES:
            return False
        return not await_(self._killer.can_be_made_ready())

    async def _guarded(self, sql: bytes, skip: int, several: bool) -> list[Any]:
        """Run what follows OPEN_ENDED, and commit: what is cut in the middle is rolled back with
        its connection."""
        failure: errors.MySQLError | None = None
        results: list[Any] = []
        try:
            results = await self._results(sql, skip, several)
        except errors.MySQLError as exc:
            if is_last_word(exc) or self.raw._stream_broken:
                raise
            failure = exc
        changed = self.raw.server_status & STATE_CHANGED
        # Commits; of a statement that failed nothing is left, as without a transaction.
        await self.raw.query("SET autocommit = 1")
        if not changed:
            self.raw.server_status &= ~STATE_CHANGED
        if failure is not None:
            raise failure
        return results

    def _sent_before(
        self, sql: bytes, several: bool, first: tuple[str, ...] = ()
    ) -> tuple[str, ...]:
        """What goes in front of the statement in the same packet.

        The server takes a packet of several statements then, so that a statement that may be
        several itself goes alone: one without a semicolon is one.
        """
        before = first + self._before(sql)
        if before and b";" in sql and not several:
            self.run(self._results("; ".join(before).encode(), 0, len(before) > 1))
            return ()
        return before

    @contextlib.contextmanager
    def several(self) -> Iterator[None]:
        """Several statements may be sent in one text."""
        self._several_wanted = True
        try:
            yield
        finally:
            self._several_wanted = False

    async def _query(self, sql: bytes, several: bool, unbuffered: bool = False) -> None:
        """Send SQL, and let the server refuse more than one statement unless `several`."""
        raw = self.raw
        if several == self._takes_several or (not several and b";" not in sql):
            await raw.query(sql, unbuffered=unbuffered)
            return
        # Both commands go at once: the server reads the second when it is through with the first.
        await raw._execute_command(COM_SET_OPTION, struct.pack("<H", not several))
        await raw._execute_command(COM_QUERY, sql)
        raw._next_seq_id = 1
        try:
            await raw.read_packet()
        except errors.MySQLError as exc:
            # The answer to the second is still to come.
            raise errors.OperationalError(SERVER_LOST, f"connection out of step: {exc}") from exc
        self._takes_several = several
        raw._next_seq_id = 1
        await raw._read_query_result(unbuffered=unbuffered)

    async def _results(self, sql: bytes, skip: int, several: bool = False) -> list[Any]:
        await self._query(sql, several)
        results = [self.raw._result]
        while results[-1].has_next:
            # The next answer has a status of its own.
            self._note_changed()
            await self.raw.next_result()
            results.append(self.raw._result)
        return results[skip:]

    def stream(self, cursor: StreamingCursor, sql: bytes, may_stop: bool) -> Any:
        """Run SQL and leave its rows to be read by `cursor`.

        Args:
            may_stop: it only reads, so that it need not run to its end.
        """
        self.finish_stream()
        before = self._sent_before(sql, False)
        text = "; ".join([*before, ""]).encode() + sql
        result = self.run(self._first_rows(text, len(before)))
        self._streaming = weakref.ref(cursor) if result.unbuffered_active else None
        self._may_stop, self._reader = may_stop, current_reader()
        self._hold_back()
        return result

    async def _first_rows(self, sql: bytes, skip: int) -> Any:
        await self._query(sql, skip > 0, unbuffered=True)
        for _ in range(skip):
            await self.raw.next_result(unbuffered=True)
        while not self.raw._result.unbuffered_active and self.raw._result.has_next:
            await self.raw.next_result(unbuffered=True)
        return self.raw._result

    def changes(self, sql: str) -> bool:
        """Whether the statement does more than read, as far as its text tells."""
        wrapper = self._owner()
        return wrapper is None or bool(change_in(sql, wrapper.scanner))

    def forget_lease(self) -> bool:
        """Forget what the lease wanted of later statements; whether no stream is left to end."""
        self.prelude, self.always, self.begin = (), (), BEGIN
        self.left_by_sql = False
        return self._streaming is None

    def finish_stream(self) -> None:
        """Read what a streaming cursor has left, which stands in the way of anything else; skip it
        when nobody will read it."""
        if self._streaming is None:
            return
        is_read = self._reader is None or not self._reader.is_gone
        if (cursor := self._streaming()) is not None and is_read:
            cursor.read_rest()
        else:
            self.end_stream()

    def end_stream(self) -> None:
        """Skip what the streaming cursor has left."""
        result = self.raw._result
        if self._streaming is not None and result is not None and result.unbuffered_active:
            self.run(self._skip(result))
        self._streaming = None

    async def _skip(self, result: Any) -> None:
        stopped = False
        try:
            for number in itertools.count(1):
                if await result._read_rowdata_packet_unbuffered() is None:
                    break
                # What has come with that row.
                result._take_pending_rows()
                if number == SKIPS and self._may_stop:
                    stopped = await self._stop_query()
        except errors.MySQLError as exc:
            if not stopped or exc.args[:1] != (INTERRUPTED,):
                raise
        self.stream_ended(result)
        if stopped:
            # A KILL that came too late for the statement would end the next one.
            with contextlib.suppress(errors.OperationalError):
                await self._results(b"DO 0", 0)

    async def _stop_query(self) -> bool:
        """Let the server end the statement; whether it was told."""
        self._transport.pause_reading()
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._killer.end_statement(self.thread_id())
        except (errors.MySQLError, OSError, TimeoutError) as exc:
            # The rows are read over instead.
            logger.info("a query of a stream that was left could not be stopped: %s", exc)
            return False
        finally:
            self._transport.resume_reading()
        return True

    def stream_ended(self, result: Any) -> None:
        """The server has sent the last row."""
        self._streaming = None
        if result.server_status:
            self.raw.server_status = result.server_status

    # Literals

    def mogrify(self, sql: Any, params: Any) -> bytes:
        """The statement with its parameters in it, encoded."""
        self._check_charset()
        encoding = self.raw._encoding
        text: bytes = sql if isinstance(sql, bytes) else str(sql).encode(encoding)
        if params is None:
            return text
        try:
            if isinstance(params, dict):
                return text % {k.encode(): self.literal(v) for k, v in params.items()}
            if not isinstance(params, Sequence) or isinstance(params, str | bytes):
                params = (params,)
            return text % tuple(map(self.literal, params))
        except TypeError as exc:
            raise MySQLdb.ProgrammingError(str(exc)) from exc

    def _check_charset(self) -> None:
        """Refuse to escape values for a character set that the server no longer reads.

        Raises:
            MySQLdb.OperationalError: it reads another one; the connection is closed.
        """
        if self._may_differ and in_bridge():
            self.run(self._compare_charset())
            if not self._told:
                # What was compared is what each reset brings back.
                self.sets_more = False
            self._may_differ = self._told = False

    async def _compare_charset(self) -> None:
        await self.raw.query("SELECT @@character_set_client, @@character_set_results")
        for name in self.raw._result.rows[0]:
            # Results without one come as they are stored.
            known = name and charset_by_name(name.replace("utf8mb3", "utf8"))
            if name and (known is None or known.encoding != self.raw._encoding):
                raise errors.OperationalError(
                    f"SQL has set the character set {name!r}, but values are escaped for "
                    f"{self.raw.character_set_name()!r}; name it in OPTIONS['charset'] instead"
                )

    def literal(self, value: Any) -> bytes:
        """The value as an SQL literal; text that the character set cannot hold is an error."""
        encoding = self.raw._encoding
        if isinstance(value, str):
            text: str = self.raw.escape_string(value)
            return b"'" + text.encode(encoding) + b"'"
        if isinstance(value, bytes | bytearray | memoryview):
            return self._binary_literal(bytes(value))
        if isinstance(value, list | tuple | set | frozenset):
            return b"(" + b",".join(map(self.literal, value)) + b")"
        if type(value) not in ENCODED and type(value) not in self.raw._encoders:
            return self.literal(str(value))
        try:
            return str(self.raw.literal(value)).encode(encoding)
        except errors.MySQLError as exc:
            raise translated(exc) from exc

    def _binary_literal(self, value: bytes) -> bytes:
        # asyncmy escapes bytes with backslashes even when the server takes those for themselves.
        if self.raw._encoding not in WITHOUT_BACKSLASH:
            # A backslash may be the second byte of a character there.
            return b"x'" + value.hex().encode() + b"'"
        if not self.escapes_with_backslashes:
            return b"'" + value.replace(b"'", b"''") + b"'"
        text: str = converters.escape_bytes(value)
        return text.encode("ascii", "surrogateescape")

    # The end

    def send_reset(self) -> None:
        """Send what brings the session on the server back to what it was after connecting, without
        waiting for the answer.

        Raises:
            MySQLdb's errors.
        """
        try:
            self._write_reset()
        except errors.MySQLError as exc:
            raise translated(exc) from exc
        self.resetting = True

    def reset(self) -> None:
        """Bring the session on the server back to what it was after connecting.

        Raises:
            MySQLdb's errors.
        """
        self.prelude = ()
        self.send_reset()
        self.finish_reset()

    def finish_reset(self) -> None:
        """Read the answer to `send_reset`.

        Raises:
            MySQLdb's errors.
        """
        self.run(self._read_reset())

    def _write_reset(self) -> None:
        self.raw._result = None
        commands = [
            (COM_RESET_CONNECTION, b""),
            (COM_QUERY, (self.init_sql + self.set_up).encode(self._encoding)),
        ]
        if not self._takes_several:
            commands.insert(1, (COM_SET_OPTION, struct.pack("<H", 0)))
        for command, text in commands:
            self.raw._write_bytes(struct.pack("<iB", len(text) + 1, command) + text)

    async def _read_reset(self) -> None:
        self.raw._next_seq_id = 1
        await self.raw._read_ok_packet()
        if not self._takes_several:
            self.raw._next_seq_id = 1
            await self.raw.read_packet()
            self._takes_several = True
        self.raw._next_seq_id = 1
        await self.raw._read_query_result()
        while self.raw._result.has_next:
            await self.raw.next_result()
        self.raw.server_status &= ~STATE_CHANGED
        self._may_differ, self._told = self.sets_more, False
        self.resetting, self.clean = False, True

    async def _end_and_reset(self, sql: str) -> None:
        """End the transaction and reset the session, sent together; the server answers each."""
        await self.raw._execute_command(COM_QUERY, sql)
        self._write_reset()
        self.raw._next_seq_id = 1
        try:
            await self.raw._read_query_result()
        except errors.MySQLError as exc:
            if not is_last_word(exc):
                await self._read_reset()
            raise
        try:
            await self._read_reset()
        except (errors.MySQLError, OSError, EOFError) as exc:
            # The end was answered.
            logger.warning("a connection could not be reset and is closed: %s", exc)
            self.abandon()

    def abandon(self) -> None:
        """Close the socket now, without awaiting."""
        if self.closed:
            return
        self.closed = True
        wrapper = self._owner()
        say_goodbye(self._transport, self.dirty)
        with contextlib.suppress(RuntimeError):
            self.raw.close()
        if wrapper is not None and wrapper.cut:
            self._killer.sessions.add(self.thread_id())
        self._killer.users.discard(self)
        self._killer.close_if_unused()

    def farewell(self) -> Farewell:
        """What ends on the server what the abandoned connection left running there."""
        return Farewell(self._killer, self.thread_id())
