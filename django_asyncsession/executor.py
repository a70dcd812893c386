"""Runs calls and statements on one connection, one at a time."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any, ParamSpec, TypeVar

from django.db import Error

from .backends.base import BridgedMixin, TransactionOptions, TransactionState
from .blocks import Block
from .checkout import Checkout, Source
from .exceptions import QueryTimeout, SessionClosedError, SessionInUseError, SessionStateError
from .pool import creation_site, task_name
from .results import BaseResultSet, MemoryCursor, Reader
from .statements import check_one_statement
from .threadlocals import Contents
from .turns import Turns, _held, check_loop

P = ParamSpec("P")
T = TypeVar("T")
Params = Sequence[Any] | dict[str, Any] | None


class State(enum.Enum):
    """Where a transaction or a session is in its life."""

    NEW = "not begun"
    OPEN = "in transaction"
    IDLE = "open"
    CLOSED = "closed"


# A PostgreSQL transaction is dead in these states; elsewhere a failed statement alone is taken
# back.
DEAD = (TransactionState.FAILED, TransactionState.UNKNOWN)


class Executor:
    """What runs between the begin and the end of a transaction, or without one in autocommit
    mode."""

    def __init__(
        self,
        database: Source,
        *,
        autocommit: bool,
        site: str | None = None,
        contents: Contents | None = None,
        **options: Any,
    ) -> None:
        self.alias = database.alias
        self.autocommit = autocommit
        self.options = TransactionOptions(**options)
        self.state = State.NEW
        self._site = creation_site() if site is None else site
        self._loop: asyncio.AbstractEventLoop | None = None
        self._owner: asyncio.Task[Any] | None = None
        self._turns: Turns
        self._checkout = Checkout(database, self._site, contents)
        self._blocks: list[Block] = []
        self._ready = False
        # The first word of the first statement that did more than read; empty: there was none.
        self.changed = ""

    # Statements

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call the sync `fn` natively async, with this connection as the one that Django uses.

        Raises:
            SessionStateError: not begun, or ended.
            SessionInUseError: another task has a nested block open.
            QueryTimeout: the server ended a statement by its timeout.
            Whatever `fn` raises.
        """
        async with self._turn():
            return await self._serve(partial(fn, *args, **kwargs))

    async def execute(self, sql: Any, params: Params = None) -> int:
        """Run one statement and return how many rows it touched, -1 when the database does not
        tell.

        Raises:
            MultipleStatements: more than one statement in `sql`.
        """
        check_one_statement(sql)
        return await self.run(self._execute, sql, params)

    async def cursor(self, sql: Any, params: Params = None) -> BaseResultSet:
        """Run one statement and return its result.

        Raises:
            MultipleStatements: more than one statement in `sql`.
        """
        check_one_statement(sql)
        cursor = await self.run(self._open_cursor, sql, params, stream=False)
        return BaseResultSet(cursor, self.run, buffered=self._wrapper.buffered_cursors)

    async def cursor_in_memory(self, sql: Any, params: Params = None) -> BaseResultSet:
        """Run one statement and return its result with all rows fetched, to be used when the
        connection is gone."""

        def fetch() -> MemoryCursor:
            cursor = self._open_cursor(sql, params, stream=False)
            try:
                return MemoryCursor(cursor)
            finally:
                cursor.close()

        return BaseResultSet(await self.run(fetch), self.run, buffered=True)

    async def stream(
        self, sql: Any, params: Params, chunk_size: int, reader: Reader | None = None
    ) -> BaseResultSet:
        """Run one statement with a server-side cursor and return its result, `chunk_size` rows at
        a time.

        Args:
            reader: who reads it, if not whoever holds the result.
        """
        open_cursor = partial(self._open_cursor, sql, params, stream=True)
        cursor = await self.run((reader or Reader()).run, open_cursor)
        return BaseResultSet(cursor, self.run, buffered=False, chunk_size=chunk_size)

    async def driver_connection(self) -> Any:
        """The driver's own connection, for use inside `run`; what it changes is reset
        afterwards."""

        def connection() -> Any:
            self._wrapper.touched = True
            return self._wrapper.connection

        return await self.run(connection)

    def _execute(self, sql: Any, params: Params) -> int:
        with self._wrapper.cursor() as cursor:
            cursor.execute(sql, params)
            return int(cursor.rowcount)

    def _open_cursor(self, sql: Any, params: Params, *, stream: bool) -> Any:
        cursor = self._wrapper.chunked_cursor() if stream else self._wrapper.cursor()
        try:
            cursor.execute(sql, params)
        except BaseException:
            cursor.close()
            raise
        return cursor

    # Inside

    @property
    def _wrapper(self) -> BridgedMixin:
        return self._checkout.wrapper

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """The task's turn to use the connection, once everything that can be wrong has been
        asked."""
        self._check_open()
        async with self._turns:
            self._check_open()
            self._check_owner()
            token = self._turns.held()
            try:
                yield
            finally:
                # A coroutine may be closed in another context, and even thread, than it ran in.
                with suppress(ValueError):
                    _held.reset(token)

    def _check_open(self) -> None:
        if self.state is State.NEW:
            raise SessionStateError(
                f"the transaction on {self.alias!r} has not begun; call begin(), or use `async "
                "with`"
            )
        if self.state is State.CLOSED:
            raise SessionClosedError(
                f"the session of {self.alias!r} made at {self._site} is closed; make a new one"
            )
        check_loop(self._loop, self.alias)

    def _check_owner(self) -> None:
        owner = self._blocks[-1].task if self._blocks else self._owner
        if owner is not None and owner is not asyncio.current_task():
            raise SessionInUseError(
                f"task {owner.get_name()!r} has a nested block open in the session of "
                f"{self.alias!r}, "
                f"so task {task_name()!r} cannot use it; use a session of its own, or wait for "
                "the block's end"
            )

    async def _serve(self, fn: Callable[[], T], budget: float | None = None) -> T:
        """Run `fn` in the bridge with the connection, which is taken, and the transaction begun,
        if need be.

        After `budget` seconds, if given, the connection is closed, and OperationalError raised.
        """
        try:
            result = await self._checkout.call(partial(self._begun, fn), budget)
        except Exception as exc:
            if self._note_error(exc):
                raise QueryTimeout(
                    f"{exc} (session of {self.alias!r})".replace("\n", " ")
                ) from exc.__cause__
            raise
        if self._wrapper.transaction_state is TransactionState.FAILED:
            self._doom(None)
        return result

    def _begun(self, fn: Callable[[], T], wrapper: BridgedMixin) -> T:
        if not self._ready:
            self._enter(wrapper)
            self._ready = True
        # A test's connection serves other transactions in between.
        outer, wrapper.changed = wrapper.changed, self.changed
        try:
            return fn()
        finally:
            self.changed, wrapper.changed = wrapper.changed, outer

    def _enter(self, wrapper: BridgedMixin) -> None:
        """Begin on the connection; called in the bridge, before the first statement."""
        wrapper.configure_autocommit(self.options)

    def _note_error(self, error: Exception) -> bool:
        """Let no statement follow an error of the database; tell whether it was a timeout of the
        server."""
        if not self._checkout.is_taken:
            return False
        wrapper = self._wrapper
        of_driver = isinstance(error, Error) and isinstance(error.__cause__, wrapper.Database.Error)
        if wrapper.transaction_state in DEAD or (of_driver and wrapper.statement_rollback):
            self._doom(error)
        return of_driver and wrapper.is_timeout(error, self.options)

    def _doom(self, error: Exception | None) -> None:
        wrapper = self._wrapper
        if wrapper.in_atomic_block and not wrapper.needs_rollback:
            wrapper.needs_rollback = True
            wrapper.rollback_exc = error
