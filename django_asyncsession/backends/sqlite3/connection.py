"""The driver's connection in its thread: who has the write lock, and what a statement leaves."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import sqlite3
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from django_asyncsession.backends import threaded
from django_asyncsession.backends.thread import DriverThread
from django_asyncsession.scanner import may_be_cached

# Seconds between two tries for a lock, at first and at the most; of the first in line more often,
# since it tries for all.
TRY_MIN, TRY_MAX, TRY_FIRST = 0.0005, 0.01, 0.001
# Seconds between two looks, by who stands in line, at whether it was cancelled.
LOOK = 0.02
# Who waits for the write lock of a database stands in line, so that none waits for ever. It is
# held while waiting for the lock only, not while having it.
_lines: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
# A database in memory lives as long as one connection to it.
_keepers: dict[str, sqlite3.Connection] = {}
_keeping = threading.Lock()

TAKES_LOCK = frozenset({"BEGIN IMMEDIATE", "BEGIN EXCLUSIVE"})
# Begins to read; the first statement that writes ends that, and begins IMMEDIATE.
BEGIN = "BEGIN"
# Isolation levels that promise more of what was read than that it was so.
KEEPS_READS = frozenset({"repeatable read", "serializable"})

# Statements that change more than the database: other files, or what the connection has open.
CHANGES_MORE = frozenset({"attach", "detach", "vacuum"})
# What a statement does that leaves something on the connection, as SQLite itself has it.
LEAVES = frozenset({sqlite3.SQLITE_ATTACH, sqlite3.SQLITE_DETACH})
# Asks without changing anything.
ASKING_PRAGMA = re.compile(
    r"\A\s*+pragma\s++(\w++\s*+;?+\s*+\Z|(\w++\.)?(table_x?info|table_list|index_x?info|index_list|"
    r"foreign_key_(list|check)|integrity_check|quick_check)\b)",
    re.IGNORECASE,
)
# Pragmas that only ask although they have an argument.
ASKING = frozenset(
    {"table_info", "table_xinfo", "table_list", "index_info", "index_xinfo", "index_list"}
    | {"foreign_key_list", "foreign_key_check", "integrity_check", "quick_check"}
)
# Methods of the driver's connection that only tell how it is set, in no time: Django asks one for
# the most parameters that a statement takes.
TELLS = frozenset({"getconfig", "getlimit"})
# A statement of ours; with the same text as a project's it would not be compiled a second time.
OWN = "/* session */ "
# The driver keeps so many statements that it has compiled, of any length; characters of long ones
# after which they are let go.
KEPT_STATEMENTS, MOST_KEPT = 128, 1_000_000


class Authorizer:
    """What SQLite asks when it compiles a statement, a trigger's or a view's parts included, and
    whatever sent it. It allows everything, and notes what stays on the connection."""

    def __init__(self) -> None:
        self.left_something = False
        self.is_ours = False

    def __call__(
        self, action: int, name: str | None, value: str | None, database: str | None, _: str | None
    ) -> int:
        """Note the action; see SQLite's `sqlite3_set_authorizer`."""
        if action == sqlite3.SQLITE_READ:
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_PRAGMA:
            leaves = value is not None and (name or "").lower() not in ASKING
        elif action == sqlite3.SQLITE_FUNCTION:
            leaves = value == "load_extension"
        else:
            leaves = action in LEAVES or database == "temp"
        if leaves and not self.is_ours:
            self.left_something = True
        return sqlite3.SQLITE_OK


class Connection(threaded.Connection):
    """A connection to SQLite; it begins transactions together with their first statement.

    A transaction that only reads takes no write lock. Whether a statement writes is SQLite's to
    say: with `query_only` on it refuses such a statement before it does anything. Then the reading
    is ended, and a transaction with the write lock is begun, which sees the newest data.
    """

    def __init__(self, wrapper: Any, thread: DriverThread) -> None:
        super().__init__(wrapper, thread)
        # What runs before the next statement, in the same go.
        self._prelude: tuple[str, ...] = ()
        # A transaction was begun; it was ended by SQL that is not ours.
        self._began = self._left_by_sql = False
        # The transaction may write and has not yet; its savepoints.
        self._reading = False
        self._savepoints: list[str] = []
        # The next statement needs the write lock, as far as is known before SQLite is asked.
        self._must_lock = False
        # Nothing may write at all.
        self._read_only = False
        self._line = _lines[""]
        # Seconds to wait for a lock, of the connection and of its present user.
        self._default_lock_timeout = self._lock_timeout = 0.0
        self._authorizer = Authorizer()
        # How many statements the driver keeps, and how long those are together that are long.
        self._kept_statements, self._kept = KEPT_STATEMENTS, 0

    def _watch(self) -> None:
        """Let SQLite tell from now on; statements that it has compiled are compiled again. Called
        in the thread."""
        self._raw.set_authorizer(self._authorizer)

    def _own(self, sql: str) -> None:
        """Run a statement of ours; called in the thread."""
        self._authorizer.is_ours = True
        try:
            self._raw.execute(OWN + sql)
        finally:
            self._authorizer.is_ours = False

    def commit(self) -> None:
        if self._nothing_begun():
            return
        self._began = False
        self._call(self._end, self._raw.commit)

    def rollback(self) -> None:
        if self._nothing_begun():
            return
        self._began = False
        self._call(self._end, self._raw.rollback, _timed=False)

    def _end(self, end: Callable[[], None]) -> None:
        self._wait_for_lock(end)
        if self._reading:
            self._own("PRAGMA query_only = OFF")
            self._reading = False

    def _call_unseen(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if fn.__name__ in TELLS:
            return fn(*args, **kwargs)
        return super()._call_unseen(self._after_begin, fn, *args, **kwargs)

    def _after_begin(self, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method of the driver, which may write or may not; called in the thread."""
        if self._prelude:
            self._begin(writes=True)
        return fn(*args, **kwargs)

    def _other(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if method.__name__ == "executescript":
            return self._call(self._statement, method, *args)
        return self._call(method, *args, **kwargs)

    def _nothing_begun(self) -> bool:
        """Whether no statement came after the beginning of the transaction, which is called off
        then."""
        pending, self._prelude = self._prelude, ()
        return bool(pending) and not self._raw.in_transaction

    def _begin_with(self, *statements: str) -> None:
        self._began = self._left_by_sql = False
        self._savepoints.clear()
        self._prelude += statements

    def _statement(self, execute: Callable[..., Any], *args: Any) -> Any:
        try:
            return self._begun_statement(execute, *args)
        finally:
            self._bound_kept(*args[:1])

    def _bound_kept(self, sql: Any = None) -> None:
        """Let the driver forget the statements it has compiled, before they take too much memory.

        It does so only for others, of which those that are empty cost least.
        """
        if not isinstance(sql, str) or may_be_cached(sql):
            return
        self._kept += len(sql)
        if self._kept > MOST_KEPT:
            self._kept = 0
            with contextlib.suppress(sqlite3.Error):
                for number in range(self._kept_statements):
                    self._raw.execute(f"-- {number}")

    def _begun_statement(self, execute: Callable[..., Any], *args: Any) -> Any:
        writes = self._must_lock or execute.__name__ != "execute"
        self._must_lock = False
        if self._prelude:
            self._begin(writes)
        if self._read_only:
            return self._only_reading(execute, *args)
        if self._reading:
            if not writes:
                return self._reading_first(execute, *args)
            self._begin_writing()
        if execute.__name__ == "executemany" and not self._raw.in_transaction:
            return self._with_own_wait(execute, *args)
        return self._wait_for_lock(partial(execute, *args))

    def _begin(self, writes: bool) -> None:
        for statement in self._prelude:
            if statement == BEGIN and writes:
                statement = "BEGIN IMMEDIATE"
            # Readers wait for nobody.
            if statement in TAKES_LOCK:
                with self._in_line():
                    self._begin_one(statement, TRY_FIRST)
            else:
                self._begin_one(statement)
            if statement == BEGIN:
                self._own("PRAGMA query_only = ON")
                self._reading = True
        self._prelude = ()
        self._began = self._raw.in_transaction

    def _begin_one(self, statement: str, longest_pause: float = TRY_MAX) -> None:
        try:
            self._wait_for_lock(partial(self._own, statement), longest_pause)
        except sqlite3.OperationalError as exc:
            if _code(exc) != sqlite3.SQLITE_READONLY:
                raise
            # A file that cannot be written has no writers to wait for.
            self._raw.execute("BEGIN")

    def _reading_first(self, execute: Callable[..., Any], *args: Any) -> Any:
        """Execute; what turns out to write is executed again, with the write lock."""
        try:
            return self._wait_for_lock(partial(execute, *args))
        except sqlite3.OperationalError as exc:
            if _code(exc) != sqlite3.SQLITE_READONLY:
                raise
        self._begin_writing()
        return self._wait_for_lock(partial(execute, *args))

    def _only_reading(self, execute: Callable[..., Any], *args: Any) -> Any:
        if execute.__name__ == "executescript":
            raise sqlite3.OperationalError("a read-only session takes no scripts; run statements")
        result = self._wait_for_lock(partial(execute, *args))
        if not self._raw.execute("PRAGMA query_only").fetchone()[0]:
            self._own("PRAGMA query_only = ON")
            raise sqlite3.OperationalError("query_only cannot be turned off in a read-only session")
        return result

    def _begin_writing(self) -> None:
        """End the transaction, which has read only, and begin with the write lock, or if that
        cannot be had read on."""
        self._raw.commit()
        self._own("PRAGMA query_only = OFF")
        try:
            with self._in_line():
                if self._open_cursors and not self._lock_beside_cursors():
                    self._read_rest()
                if not self._raw.in_transaction:
                    self._begin_one("BEGIN IMMEDIATE", TRY_FIRST)
            self._reading = False
        finally:
            if self._reading:
                self._own("PRAGMA query_only = ON")
                self._raw.execute(BEGIN)
            self._set_savepoints_again()

    def _lock_beside_cursors(self) -> bool:
        """Whether the lock could be had at once, and nobody has written since the cursors began:
        they keep what they see, and so would the transaction."""
        try:
            self._raw.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            return False
        return True

    @property
    def _open_cursors(self) -> list[threaded.Cursor]:
        return [cursor for cursor in self._cursors if not cursor._exhausted]

    def _read_rest(self) -> None:
        for cursor in self._open_cursors:
            cursor._rows = iter([*cursor._rows, *cursor._raw.fetchall()])
            cursor._exhausted = True

    def _set_savepoints_again(self) -> None:
        if (wrapper := self._owner()) is not None:
            for name in self._savepoints:
                self._raw.execute(wrapper.ops.savepoint_create_sql(name))

    def _read_anew(self) -> None:
        """Let go of what was read, so that a writer who waits for it can end."""
        self._raw.commit()
        self._raw.execute(BEGIN)
        self._set_savepoints_again()

    @contextlib.contextmanager
    def _in_line(self) -> Iterator[None]:
        deadline = time.monotonic() + self._lock_timeout
        while not self._line.acquire(timeout=LOOK):
            if self._thread.stop.is_set():
                raise sqlite3.OperationalError("interrupted")
            if time.monotonic() > deadline:
                raise _locked()
        try:
            yield
        finally:
            self._line.release()

    def _wait_for_lock(self, call: Callable[[], Any], longest_pause: float = TRY_MAX) -> Any:
        """Call until no other connection is in the way, the time is up, or it is interrupted."""
        deadline = time.monotonic() + self._lock_timeout
        pause = TRY_MIN
        # In a transaction that has read and writes, only its end can help. COMMIT may come again.
        reads = self._reading or self._read_only
        may_wait = reads or not self._raw.in_transaction or call == self._raw.commit
        while True:
            try:
                return call()
            except sqlite3.OperationalError as exc:
                code = _code(exc)
                waits = code == sqlite3.SQLITE_BUSY and may_wait
                # Tables of a database in memory are locked one by one.
                waits = waits or code == sqlite3.SQLITE_LOCKED
                if not waits or time.monotonic() >= deadline:
                    exc.waited = waits  # type: ignore[attr-defined]
                    raise
                if code == sqlite3.SQLITE_LOCKED and self._reading:
                    self._read_anew()
            if self._thread.stop.wait(pause):
                raise sqlite3.OperationalError("interrupted")
            pause = min(2 * pause, longest_pause)

    def _with_own_wait(self, execute: Callable[..., Any], *args: Any) -> Any:
        """Let SQLite wait: half done, and not in a transaction, the call cannot be repeated."""
        self._own(f"PRAGMA busy_timeout = {round(self._lock_timeout * 1000)}")
        try:
            return execute(*args)
        except sqlite3.OperationalError as exc:
            exc.waited = True  # type: ignore[attr-defined]
            raise
        finally:
            self._own("PRAGMA busy_timeout = 0")


def _code(error: sqlite3.Error) -> int:
    """The error's code without the details, but those that say that waiting does not help."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code if code == sqlite3.SQLITE_BUSY_SNAPSHOT else code & 0xFF


def _locked() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    error.waited = True  # type: ignore[attr-defined]
    return error


def _last(names: list[str], name: str) -> int:
    """Where the latest savepoint of this name is; behind all when SQL made it."""
    return max((at for at, known in enumerate(names) if known == name), default=len(names))


def _forget_locks() -> None:
    """In a forked child the threads that held them do not exist, and would never let go."""
    global _keeping
    _lines.clear()
    _keeping = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)


def _keep(name: str) -> None:
    """Keep the database in memory while this process lives, as a file would be kept."""
    with _keeping:
        if name not in _keepers:
            _keepers[name] = sqlite3.connect(name, uri=True, check_same_thread=False)
            atexit.register(_keepers[name].close)
