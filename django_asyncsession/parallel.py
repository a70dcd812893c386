"""Reads of one session that run at the same time, each on a connection of its own.

A worker for each connection takes the next read when it has done one. So the reads need one
connection, and every other one only makes them faster: whoever waits for one from the pool when
nothing is left to read stops waiting.

The first connection is

* the session's own, if it holds one and the others can see the same as it: on PostgreSQL a
  REPEATABLE READ transaction, whose snapshot the others import; on databases without snapshots to
  share, any.
* the session's own alone, one read after the other, if nobody else could see the same: in a nested
  block of a REPEATABLE READ transaction, which PostgreSQL does not let export; in a SERIALIZABLE
  one, whose reads PostgreSQL watches on its own connection only; in a test's shared transaction.
* else a new one, whose snapshot the others import. Where the session keeps a connection meanwhile,
  and so does everybody else in the pool who waits for a second one, waiting would never end: then
  too the reads run on the session's own, each with a snapshot of its own, and the log says so.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import nullcontext
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self, TypeAlias

from django.db import router
from django.db.models.query import QuerySet, RawQuerySet

from .exceptions import PoolError, SessionStateError
from .observe.slow import for_caller
from .orm.queries import SelectQuery
from .statements import locks, reading
from .transactions.transaction import Transaction

logger = logging.getLogger("django_asyncsession")

# What it is given is a session.
Call: TypeAlias = Callable[[Any], Awaitable[Any]]
Read: TypeAlias = "SelectQuery[Any] | QuerySet[Any, Any] | RawQuerySet[Any] | Call"


class ReadingSession(Protocol):
    """What gathering needs of a session."""

    alias: str
    bind: Any
    companions: Any

    @property
    def transaction(self) -> Transaction | None: ...

    def reader(self, isolation: str | None) -> ReadingSession: ...

    async def run_alone(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None: ...


def checked(reads: Iterable[Read], alias: str, limit: int) -> list[Call]:
    """What runs each read in a session that it is given.

    Raises:
        SessionStateError: a query that locks rows.
        TypeError: something that is no read.
        ValueError: `limit` is below 1, or a QuerySet names another database.
    """
    reads = list(reads)
    try:
        if any(_locks(read) for read in reads):
            raise _no_locks(alias)
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(f"limit is {limit!r}; give a number of connections, 1 or more")
        return [_call(read, alias) for read in reads]
    except BaseException:
        for read in reads:
            if inspect.iscoroutine(read):
                read.close()
        raise


def _locks(read: Any) -> bool:
    if not isinstance(read, (SelectQuery, QuerySet)):
        return False
    query: Any = read.query
    return any(part.select_for_update for part in (query, *query.combined_queries))


def _no_locks(alias: str) -> SessionStateError:
    return SessionStateError(
        f"gather() on {alias!r} reads on other connections, in read-only transactions that end "
        "with it, so for_update() and its kin cannot lock for this session; run what locks one "
        "after the other in session.atomic()"
    )


def _call(read: Any, alias: str) -> Call:
    if isinstance(read, SelectQuery):
        return lambda session: read.on(session).run()
    if isinstance(read, (QuerySet, RawQuerySet)):
        if (other := _alias_of(read)) not in (None, alias):
            raise ValueError(
                f"gather() of a session of {alias!r} got a QuerySet on {other!r}; use a session of "
                "that database"
            )
        queryset = read.using(alias)
        return lambda session: session.run_sync(list, queryset)
    if inspect.isawaitable(read):
        raise TypeError(
            f"gather() got {type(read).__name__} {getattr(read, '__qualname__', '')!r}, which "
            "belongs to a connection already; give it a query, or a function that takes a "
            "session: lambda s: s.fetch_all(sql)"
        )
    if not callable(read) or isinstance(read, type):
        raise TypeError(
            f"gather() got {read!r}; give it queries, QuerySets, or functions that take a session"
        )
    return partial(_awaited, read)


def _alias_of(queryset: Any) -> str | None:
    """The alias that the QuerySet was given; None when it goes where its router says."""
    if isinstance(queryset, RawQuerySet):
        # It is told where its router sends it, when it is made.
        model: Any = queryset.model
        return None if queryset.db == router.db_for_read(model) else queryset.db
    return queryset._db  # type: ignore[no-any-return]


async def _awaited(read: Callable[[Any], Any], session: ReadingSession) -> Any:
    result = read(session)
    if not inspect.isawaitable(result):
        raise TypeError(
            f"{read!r} returned {type(result).__name__}; gather() takes functions whose result can "
            "be awaited, and sync code as: lambda s: s.run_sync(f)"
        )
    return await result


class Gathering:
    """One call of `gather`.

    Args:
        session: the session to read for.
        calls: what runs each read.
        limit: connections to read on at the same time.
    """

    def __init__(self, session: ReadingSession, calls: list[Call], limit: int) -> None:
        self._session = session
        # What knows the pool, in the types of a session no more than where connections come from.
        self._bind: Any = session.bind
        self._todo = deque(enumerate(calls))
        self._results: list[Any] = [None] * len(calls)
        self._others = min(limit, len(calls)) - 1
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiting: dict[asyncio.Task[Any] | None, ReadingSession] = {}
        self._error: BaseException | None = None
        self.is_over = False

    def check(self, sql: str, alias: str, vendor: str) -> None:
        """Refuse a statement of a read that locks rows or tables.

        Raises:
            SessionStateError: it does.
        """
        if alias == self._session.alias and locks(sql, vendor):
            raise _no_locks(alias)

    async def run(self, transaction: Transaction | None) -> list[Any]:
        """Run the reads.

        Args:
            transaction: the one in progress; None in autocommit mode.
        """
        if not self._todo:
            return []
        try:
            with for_caller():
                return await self._run(transaction)
        finally:
            # What a read has started may go on, and is then no read any more.
            self.is_over = True

    async def _run(self, transaction: Transaction | None) -> list[Any]:
        if transaction is None:
            return await (self._alone if self._bind.is_shared else self._apart)()
        # Nobody else may end the transaction meanwhile, nor a read use this session by mistake.
        mark = await transaction.take_turn()
        try:
            self._refuse(transaction.changed)
            results = await self._in_transaction(transaction)
            if transaction.changed:
                raise SessionStateError(
                    f"gather() on {self._session.alias!r} is for reads, and one of these did "
                    f"{transaction.changed}; write in the session itself"
                )
            return results
        finally:
            transaction.leave_turn(mark)

    async def _in_transaction(self, transaction: Transaction) -> list[Any]:
        if self._bind.is_shared:
            return await self._alone()
        if self._bind.exports_snapshots:
            return await self._with_snapshot(transaction)
        if transaction.holds_connection:
            return await self._together(self._session, None)
        return await self._apart()

    def _refuse(self, change: str) -> None:
        if change:
            raise SessionStateError(
                f"gather() reads on other connections to {self._session.alias!r}, and these do not "
                f"see what this transaction has written, locked or set ({change}); commit first, "
                "or run the reads one after the other"
            )

    async def _with_snapshot(self, transaction: Transaction) -> list[Any]:
        keeps_its_own = transaction.options.isolation in ("repeatable read", "serializable")
        if not (transaction.holds_connection or keeps_its_own):
            return await self._apart()
        level, has_changed = await self._session.run_alone(_state, transaction)
        self._refuse("in a function, or with the driver" if has_changed else "")
        if level not in ("repeatable read", "serializable"):
            return await self._apart_while_holding()
        if level == "serializable" or not transaction.levels.is_flat:
            return await self._alone()
        return await self._together(self._session, await _export(self._session))

    # Which connection is the first

    async def _alone(self) -> list[Any]:
        self._others = 0
        return await self._together(self._session, None)

    async def _apart(self) -> list[Any]:
        async with self._reader() as first:
            export = _export if self._bind.exports_snapshots else _begin
            snapshot = await export(first)
            return await self._together(first, snapshot)

    async def _apart_while_holding(self) -> list[Any]:
        pool = self._bind.pool()
        async with self._reader() as first:
            with pool.keeping_one() as may_wait:
                snapshot = await _export(first) if may_wait else None
            if snapshot is not None:
                return await self._together(first, snapshot)
        logger.warning(
            "gather() on %r runs its %d reads one after the other, each with a snapshot of its "
            "own, because all %d connections of the pool are held by sessions in gather(); call it "
            'before the session\'s first statement, use isolation="repeatable read", or raise '
            "max_size",
            self._session.alias,
            len(self._todo),
            pool.options.limit,
        )
        return await self._alone()

    def _reader(self) -> ReadingSession:
        return self._session.reader("repeatable read" if self._bind.exports_snapshots else None)

    # The work

    async def _together(self, first: ReadingSession, snapshot: str | None) -> list[Any]:
        async with asyncio.TaskGroup() as group:
            for _ in range(self._others):
                self._tasks.add(group.create_task(self._read_on_another(snapshot)))
            if first is self._session:
                # What this task has, a nested block or the turn, no other task may use.
                await self._read(first)
            else:
                self._tasks.add(group.create_task(self._read(first)))
        error, self._error = self._error, None
        if error is not None:
            try:
                raise error
            finally:
                # Its traceback keeps this frame.
                del error
        return self._results

    async def _read_on_another(self, snapshot: str | None) -> None:
        task = asyncio.current_task()
        try:
            async with self._reader() as reader:
                self._waiting[task] = reader
                try:
                    await _begin(reader, snapshot)
                except PoolError as error:
                    logger.debug("gather() goes on with fewer connections: %s", error)
                    return
                finally:
                    del self._waiting[task]
                await self._read(reader)
        except Exception as error:
            self._fail(error)

    async def _read(self, session: ReadingSession) -> None:
        """Do what is left to do on this session's connection."""
        companions = self._session.companions
        own = session is self._session
        with nullcontext() if own or companions is None else companions.beside(session):
            while self._todo:
                at, call = self._todo.popleft()
                try:
                    self._results[at] = await self._one(call, session)
                except Exception as error:
                    self._fail(error)
                except asyncio.CancelledError as error:
                    if _is_cancelled():
                        raise
                    # The read itself says so, as somebody ended a task that it awaits.
                    self._fail(error)
        for task, reader in self._waiting.items():
            if task is not None and not reader.transaction.holds_connection:  # type: ignore[union-attr]
                task.cancel()

    async def _one(self, call: Call, session: ReadingSession) -> Any:
        outer = reading.get()
        reading.set(self)
        try:
            return await call(session)
        finally:
            reading.set(outer)

    def _fail(self, error: BaseException) -> None:
        """Stop the others; but what runs on the session's own connection is left to end, because
        that connection would end with it."""
        self._todo.clear()
        if self._error is None:
            self._error = error
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()


def _is_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _state(transaction: Transaction) -> tuple[str, bool]:
    wrapper = transaction.wrapper
    if not wrapper.in_atomic_block:
        # In a callback of the commit, where each statement is a transaction.
        return "", False
    return wrapper.snapshot_state()


async def _export(session: ReadingSession) -> str:
    """Name what the session sees."""

    def export() -> str:
        assert session.transaction is not None
        return session.transaction.wrapper.export_snapshot()

    return str(await session.run_alone(export))


async def _begin(session: ReadingSession, snapshot: str | None = None) -> None:
    """Take the session's connection, and let it see the snapshot, if one is given."""
    assert session.transaction is not None
    session.transaction.snapshot = snapshot
    await session.run_alone(_nothing)


def _nothing() -> None:
    """What runs where only the beginning matters."""
