"""asyncmy behind the interface that Django's MySQL backend expects of MySQLdb.

Every round trip is awaited in the bridge. asyncmy's cursors are not used: they ask for warnings
after each statement, and quote bytes wrongly when the server takes no backslashes.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import struct
import sys
import time
import weakref
from collections.abc import Callable, Coroutine, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Self, TypeVar

import MySQLdb
from asyncmy import converters, errors
from asyncmy.charset import charset_by_name
from asyncmy.constants.COMMAND import COM_QUERY, COM_QUIT, COM_SET_OPTION
from asyncmy.constants.SERVER_STATUS import (
    SERVER_STATUS_IN_TRANS,
    SERVER_STATUS_NO_BACKSLASH_ESCAPES,
)

from django_asyncsession.backends.attributes import Attributes
from django_asyncsession.bridge import await_, in_bridge
from django_asyncsession.results import Reader, current_reader
from django_asyncsession.statements import change_in

from .values import check_readable

if TYPE_CHECKING:
    from .base import Mixin

T = TypeVar("T")

logger = logging.getLogger("django_asyncsession")

SERVER_GONE, SERVER_LOST, OUT_OF_SYNC = 2006, 2013, 2014
# After these the server closes the connection: shutdown, packet too large, killed, idle for too
# long.
LAST_WORDS = frozenset({1053, 1152, 1153, 1154, 1155, 1156, 1157, 1158, 1159, 1160, 1161, 1927})
LAST_WORDS |= {SERVER_GONE, SERVER_LOST, OUT_OF_SYNC, 4031}
# Django takes these OperationalErrors for IntegrityErrors: the statement alone failed.
STATEMENT_ONLY = frozenset({1048, 1690, 3819, 4025})
COM_RESET_CONNECTION = 0x1F
# Bytes of SQL that execute_many sends in one packet; the server's smallest limit is 1 MB.
BATCH_BYTES = 512 * 1024
# An unbuffered result does not say how many rows it has.
UNKNOWN_COUNT = 2**64 - 1
# What a parameter may be besides strings and bytes.
ENCODED = {type_ for type_ in converters.conversions if isinstance(type_, type)} - {str, bytes}
# The answer of a statement that KILL QUERY ended.
INTERRUPTED = 1317
# How often what has come of a stream that nobody wants is skipped, each time what fits in asyncmy's
# buffer, before the server is asked to send no more; and seconds that asking may take.
SKIPS, STOP_SECONDS = 8, 5.0
# Seconds between two looks at whether the server has ended a killed connection.
LOOK_MIN, LOOK_MAX = 0.005, 0.1
# Writes of a pool that commit by themselves before a connection is opened that could end them, and
# seconds until the next attempt when the server had none left.
FEW_WRITES, REFUSED_SECONDS = 4, 5.0
# Such statements, which may be put in a transaction instead without meaning something else.
WRITES = frozenset({"INSERT", "UPDATE", "DELETE", "REPLACE", "LOAD", "WITH"})
OPEN_ENDED = "SET autocommit = 0"
BEGIN = ("START TRANSACTION",)
# The server tells when SQL sets the character set, among other things.
SESSION_TRACK, STATE_CHANGED = 1 << 23, 0x4000
# How statements begin that go many in one packet.
BATCHED = frozenset({b"INSERT", b"REPLAC", b"UPDATE", b"DELETE"})
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

    def __init__(self, wrapper: Mixin, raw: Any, init_sql: str, killer: Killer) -> None:
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

    def _check_usable(self, coroutine: Coroutine[Any, Any, Any]) -> Mixin:
        wrapper = self._owner()
        try:
            if wrapper is None or self.closed or self.dirty or self.raw._stream_broken:
                raise MySQLdb.OperationalError(SERVER_GONE, "MySQL server has gone away")
            wrapper.check_served()
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
        _say_goodbye(self._transport, self.dirty)
        with contextlib.suppress(RuntimeError):
            self.raw.close()
        if wrapper is not None and wrapper.cut:
            self._killer.sessions.add(self.thread_id())
        self._killer.users.discard(self)
        self._killer.close_if_unused()

    def farewell(self) -> Farewell:
        """What ends on the server what the abandoned connection left running there."""
        return Farewell(self._killer, self.thread_id())


class Killer:
    """Ends statements on the server over one connection, beside those of a pool however many
    statements there are.

    It is opened when needed. A pool with many writes that commit by themselves keeps it for as long
    as it has a connection.

    Args:
        make: makes asyncmy's connection, not connected yet.
    """

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make
        self._loop = asyncio.get_running_loop()
        self._lock = asyncio.Lock()
        self._side: Any = None
        self._writes, self._refused_until = 0, 0.0
        # Ids on the server of those whose statements must end; those that are gone are taken out.
        self.sessions: set[int] = set()
        self.users: weakref.WeakSet[Connection] = weakref.WeakSet()

    @property
    def is_ready(self) -> bool:
        """Whether the connection is there."""
        return self._side is not None and not self._side._stream_broken

    async def can_be_made_ready(self) -> bool:
        """Open the connection for one more write, if there are enough of them to be worth it;
        whether it is there."""
        self._writes += 1
        if self._writes <= FEW_WRITES or time.monotonic() < self._refused_until:
            return False
        try:
            async with asyncio.timeout(STOP_SECONDS), self._lock:
                await self._connected()
        except (errors.MySQLError, OSError, TimeoutError) as exc:
            self._refused_until = time.monotonic() + REFUSED_SECONDS
            logger.info("no connection to end statements with: %s", exc)
            return False
        return True

    async def end_statement(self, number: int) -> None:
        """KILL QUERY for a session that is in use, and goes on."""
        async with self._lock:
            await self._query(f"KILL QUERY {number}")
            await self._leave_if_unused()

    async def end_sessions(self, number: int) -> None:
        """KILL QUERY for each session that runs something, until the server has dropped all."""
        async with self._lock:
            # Who was first has ended the others' sessions too.
            pause = LOOK_MIN
            while number in self.sessions:
                asked = set(self.sessions)
                running = _running(await self._query(_ASK.format(", ".join(map(str, asked)))))
                self.sessions -= asked - running.keys()
                for other in (other for other, runs in running.items() if runs):
                    # The session may have ended in between.
                    with contextlib.suppress(errors.OperationalError):
                        await self._query(f"KILL QUERY {other}")
                if self.sessions:
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LOOK_MAX)
            await self._leave_if_unused()

    async def _query(self, sql: str) -> Any:
        side = await self._connected()
        try:
            await side.query(sql)
        except errors.MySQLError as exc:
            if is_last_word(exc):
                self.close()
            raise
        except BaseException:
            # Its answer is still to come.
            self.close()
            raise
        return side._result

    async def _connected(self) -> Any:
        if not self.is_ready:
            self.close()
            side = self._make()
            try:
                await side.connect()
            except BaseException:
                side.close()
                raise
            self._side = side
        return self._side

    @property
    def _is_unused(self) -> bool:
        return not self.sessions and (not self.users or self._writes <= FEW_WRITES)

    async def _leave_if_unused(self) -> None:
        """The same as `close_if_unused`, and wait until the server has room for another one."""
        if self._is_unused and self.is_ready:
            side = self._side
            _say_goodbye(side._transport, waits=True)
            while not side._stream_broken:
                await asyncio.sleep(LOOK_MIN)
            self.close()

    def close_if_unused(self) -> None:
        """Close the connection when there is nothing left that it could be for."""
        if self._is_unused:
            self.close()

    def close(self) -> None:
        """Close the connection without awaiting; in any thread, since collecting may do it."""
        side, self._side = self._side, None
        if side is None or side._transport is None:
            return
        if asyncio._get_running_loop() is self._loop or not self._loop.is_running():
            _say_goodbye(side._transport)
        else:
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self._loop.call_soon_threadsafe(_say_goodbye, side._transport)

    def __del__(self) -> None:
        if not sys.is_finalizing():
            self.close()


# By event loop, and by what tells servers and users apart.
_killers: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[Any, Killer]]
_killers = weakref.WeakKeyDictionary()


def killer_for(key: tuple[Any, ...], make: Callable[[], Any]) -> Killer:
    """The one of the running loop, for connections to the same server."""
    of_loop = _killers.setdefault(asyncio.get_running_loop(), weakref.WeakValueDictionary())
    killer = of_loop.get(key)
    if killer is None:
        killer = of_loop[key] = Killer(make)
    return killer


class Farewell:
    """Waits until the server has dropped the session of an abandoned connection; can be awaited
    again when it was cancelled."""

    def __init__(self, killer: Killer, thread_id: int) -> None:
        self._killer, self._thread_id = killer, thread_id
        killer.sessions.add(thread_id)

    @property
    def is_untold(self) -> bool:
        """Whether the server may still run the session's statement."""
        return self._thread_id in self._killer.sessions

    def __await__(self) -> Generator[Any, Any, None]:
        return self._killer.end_sessions(self._thread_id).__await__()

    def __del__(self) -> None:
        self._killer.sessions.discard(self._thread_id)
        self._killer.close_if_unused()


_ASK = "SELECT id, command <> 'Sleep' FROM information_schema.processlist WHERE id IN ({})"


def _running(result: Any) -> dict[int, bool]:
    """Those sessions that are there, and whether each runs a statement."""
    return {int(number): bool(runs) for number, runs in result.rows}


def _say_goodbye(transport: Any, is_dirty: bool = False, waits: bool = False) -> None:
    try:
        if is_dirty or transport.is_closing():
            transport.abort()
        else:
            transport.write(struct.pack("<iB", 1, COM_QUIT))
            if not waits:
                transport.close()
    except RuntimeError:
        # The loop is closed. The server shall know all the same.
        _shut_down(transport)


def _shut_down(transport: Any) -> None:
    raw = transport.get_extra_info("socket")
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(raw.fileno())) as sock:
        sock.shutdown(socket.SHUT_RDWR)
    if getattr(transport, "_sock", None) is not None:
        # asyncio's transport closes its socket in its loop only, and would warn that it is open.
        transport._sock.close()
        transport._sock = None


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


class Cursor:
    """A cursor with all rows in memory, as MySQLdb's default."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self.description: tuple[Any, ...] | None = None
        self.rowcount = -1
        self.arraysize = 1
        self.lastrowid: int | None = None
        self._rows: tuple[Any, ...] = ()
        self._at = 0
        self._more: list[Any] = []
        self._executed: bytes | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        while (row := self.fetchone()) is not None:
            yield row

    def execute(self, sql: Any, params: Any = None) -> int:
        """Run a statement; its first result is there to be fetched."""
        self._executed = self.connection.mogrify(sql, params)
        first, *self._more = self.connection.execute(self._executed)
        self._show(first)
        return self.rowcount

    def executemany(self, sql: Any, param_list: Any) -> int:
        """Run the statement once for each set of values, many in one packet."""
        rowcount = 0
        for batch in _batches(self.connection.mogrify(sql, params) for params in param_list):
            self._executed = batch[-1]
            results = self.connection.execute(b";".join(batch), len(batch) > 1)
            rowcount += sum(result.affected_rows for result in results)
            self._more = []
            self._show(results[-1])
        self.rowcount = rowcount
        return rowcount

    def callproc(self, name: str, params: Sequence[Any] = ()) -> Sequence[Any]:
        """Call a stored procedure; what it sets in its parameters is in @_name_0 and so on."""
        variables = [f"@_{name}_{number}" for number in range(len(params))]
        for variable, value in zip(variables, params, strict=True):
            self.connection.execute(self.connection.mogrify(f"SET {variable} = %s", [value]))
        self.execute(f"CALL {name}({', '.join(variables)})")
        return params

    def nextset(self) -> bool | None:
        """Go on to the next statement's result; None when there is none."""
        if not self._more:
            return None
        self._show(self._more.pop(0))
        return True

    def fetchone(self) -> Any:
        """The next row, or None."""
        if self._at >= len(self._rows):
            return None
        self._at += 1
        return self._rows[self._at - 1]

    def fetchmany(self, size: int | None = None) -> tuple[Any, ...]:
        """The next rows, an empty tuple after the last."""
        end = self._at + (size or self.arraysize)
        rows = self._rows[self._at : end]
        self._at += len(rows)
        return rows

    def fetchall(self) -> tuple[Any, ...]:
        """All rows that are left."""
        rows, self._at = self._rows[self._at :], len(self._rows)
        return rows

    def close(self) -> None:
        """Forget the rows."""
        self._rows, self._at, self._more = (), 0, []

    def _show(self, result: Any) -> None:
        self.description = result.description
        self.rowcount = -1 if result.affected_rows == UNKNOWN_COUNT else result.affected_rows
        self.lastrowid = result.insert_id or None
        self._rows, self._at = result.rows or (), 0
        self._check(result, self._rows)

    def _check(self, result: Any, rows: Sequence[Any]) -> None:
        if rows and (wrapper := self.connection._owner()) is not None:
            check_readable(result, rows, wrapper.alias)


def _batches(statements: Iterator[bytes]) -> Iterator[list[bytes]]:
    """Statements in lists that fit in one packet each."""
    batch: list[bytes] = []
    size = 0
    for statement in statements:
        if b";" in statement or statement[:64].lstrip()[:6].upper() not in BATCHED:
            # It may be several, or set the character set that the next is read in, so that the
            # server shall see it alone.
            yield from filter(None, (batch, [statement]))
            batch, size = [], 0
            continue
        if batch and size + len(statement) > BATCH_BYTES:
            yield batch
            batch, size = [], 0
        batch.append(statement)
        size += len(statement)
    if batch:
        yield batch


class StreamingCursor(Cursor):
    """A cursor that reads its rows from the network as they are fetched; between two fetches the
    server waits.

    Another statement on the connection makes it read the rest into memory first: the server sends
    nothing else before.
    """

    # What is read, as long as there is more, and afterwards too.
    _result: Any = None
    _streamed: Any = None

    def execute(self, sql: Any, params: Any = None) -> int:
        self._executed = self.connection.mogrify(sql, params)
        may_stop = isinstance(sql, str) and not self.connection.changes(sql)
        result = self.connection.stream(self, self._executed, may_stop)
        self._show(result)
        self._streamed = result
        self._result = result if result.unbuffered_active else None
        return self.rowcount

    def fetchone(self) -> Any:
        rows = self.fetchmany(1)
        return rows[0] if rows else None

    def fetchmany(self, size: int | None = None) -> tuple[Any, ...]:
        size = size or self.arraysize
        rows = super().fetchmany(size)
        if len(rows) < size and self._result is not None:
            rows += tuple(self.connection.run(self._read(size - len(rows))))
        self._check(self._streamed, rows)
        return rows

    def fetchall(self) -> tuple[Any, ...]:
        self.read_rest()
        rows = super().fetchall()
        self._check(self._streamed, rows)
        return rows

    def read_rest(self) -> None:
        """Read the rows that are left into memory."""
        if self._result is not None:
            rest = self.connection.run(self._read(None))
            self._rows, self._at = super().fetchall() + tuple(rest), 0

    def close(self) -> None:
        """Skip the rows that are left; of many, the server is told to send no more."""
        super().close()
        result, self._result = self._result, None
        if result is not None and not self.connection.closed and not self.connection.dirty:
            self.connection.end_stream()

    async def _read(self, size: int | None) -> list[Any]:
        """So many rows, or all."""
        result = self._result
        rows: list[Any] = []
        while size is None or len(rows) < size:
            row = await result._read_rowdata_packet_unbuffered()
            if row is None:
                break
            rows.append(row)
            # Those that are in memory already come without a coroutine for each.
            rows += result._take_pending_rows(None if size is None else size - len(rows))
        if not result.unbuffered_active:
            self._result = None
            self.connection.stream_ended(result)
        return rows
