"""Raw SQL and streams of a session, and the connection that they run on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, ParamSpec, TypeVar
from weakref import ref

from django.db import connections

from django_asyncsession.origins import made
from django_asyncsession.results import BaseResultSet, Reader, Row
from django_asyncsession.statements import check_one_statement
from django_asyncsession.transactions.raw import Params
from django_asyncsession.transactions.transaction import Transaction, end_later
from django_asyncsession.unread import Unread

from .lifecycle import Session as Lifecycle

P = ParamSpec("P")
T = TypeVar("T")


class Session(Lifecycle):
    """What a session runs as SQL text. Named as the whole, as `Lifecycle` is."""

    async def execute(self, sql: Any, params: Params = None) -> int:
        """Run one statement; return how many rows it touched, -1 when the database does not tell.

        Args:
            sql: the statement, with `%s` for each value of a sequence, or `%(name)s` for those of
                a mapping.
            params: the values. With None, percent signs in `sql` are taken as they are.

        Raises:
            MultipleStatements: more than one statement; use `execute_script`.
            QueryTimeout: the server ended it by its timeout.
            Django's database errors.
        """
        if (transaction := self._going_on) is not None:
            return await transaction.execute(sql, params)
        return await self._in_transaction(lambda transaction: transaction.execute(sql, params))

    async def execute_many(
        self, sql: Any, param_list: Iterable[Sequence[Any] | dict[str, Any]]
    ) -> int:
        """Run one statement once for each set of values; return how many rows it touched in all.

        Raises:
            As `execute`.
        """
        check_one_statement(sql, self.bind.vendor)

        def execute_many() -> int:
            with connections[self.alias].cursor() as cursor:
                cursor.executemany(sql, list(param_list))
                return int(cursor.rowcount)

        return await self.run_alone(execute_many)

    async def execute_script(self, sql: str) -> None:
        """Run several statements, separated by semicolons, without values and without results.

        Raises:
            Django's database errors.
        """

        def execute_script() -> None:
            wrapper: Any = connections[self.alias]
            # Each statement of a read-only session is looked at.
            at_once = wrapper.multiple_statements and not wrapper.reads_only
            statements = [sql] if at_once else wrapper.split(sql)
            with wrapper.cursor() as cursor:
                for statement in statements:
                    cursor.execute(statement)

        await self.run_alone(execute_script)

    async def cursor(self, sql: Any, params: Params = None) -> BaseResultSet:
        """Run one statement and return its result, to be fetched as asked.

        Raises:
            As `execute`.
        """
        if (transaction := self._going_on) is not None:
            return await transaction.cursor(sql, params)
        if not self._is_one_statement_mode:
            return await (await self._current()).cursor(sql, params)
        # The connection goes back at once, so the rows come along.
        return await self._in_transaction(lambda t: t.cursor_in_memory(sql, params))

    async def fetch(self, sql: Any, params: Params = None) -> Row | None:
        """The first row of the result, or None.

        Raises:
            As `execute`.
        """
        async with await self.cursor(sql, params) as result:
            return await result.fetch_row()

    fetch_row = fetch

    async def fetch_value(self, sql: Any, params: Params = None) -> Any:
        """The first column of the first row, or None when there is no row.

        Raises:
            As `execute`.
        """
        row = await self.fetch(sql, params)
        return None if row is None else row[0]

    async def fetch_all(self, sql: Any, params: Params = None) -> list[Row]:
        """All rows of the result.

        Raises:
            As `execute`.
        """
        async with await self.cursor(sql, params) as result:
            return await result.flatten()

    def stream(
        self, query: Any, params: Params = None, chunk_size: int = 2000
    ) -> AsyncGenerator[Any, None]:
        """Rows one by one from a server-side cursor, `chunk_size` rows in memory at a time.

        MySQL and MariaDB run one statement at a time: until its last row is read it is the stream,
        so `timeout` counts the reader's pauses too, and another statement of the session takes what
        is left into memory first. One that only reads is stopped on the server when it is left
        early.

        Args:
            query: SQL, or a query of this session.
            params: values for SQL.
            chunk_size: rows fetched in one round trip.

        Raises:
            ValueError: `chunk_size` is not above 0.
            As `execute`.
        """
        if chunk_size <= 0:
            raise ValueError(f"chunk_size is {chunk_size}; give a number of rows above 0")
        if hasattr(query, "stream"):
            rows: AsyncGenerator[Any, None] = query.stream(chunk_size=chunk_size)
            return rows
        check_one_statement(query, self.bind.vendor)
        reader = Reader()
        return reader.reads(self._stream_sql(query, params, chunk_size, reader))

    async def _stream_sql(
        self, sql: Any, params: Params, chunk_size: int, reader: Reader
    ) -> AsyncGenerator[Row, None]:
        async with (
            self.one_connection() as transaction,
            await transaction.stream(sql, params, chunk_size, reader) as result,
        ):
            with self.unread(transaction) as unread:
                async for row in result:
                    unread.given()
                    try:
                        yield row
                    except GeneratorExit:
                        return  # as in the stream of a query
                    unread.taken()

    def unread(self, held: Transaction) -> Unread:
        """What gives the connection of `held` back when a stream of it is left unread: it closes
        this session, so that nothing is thought to be saved, or in autocommit mode only `held`."""
        loop = asyncio.get_running_loop()
        # Weakly: a timer must not keep what everybody else has dropped.
        ended = ref(self if held is self._transaction else held)

        def give_up() -> None:
            if (alive := ended()) is not None:
                if isinstance(alive, Lifecycle):
                    alive._given_up = True
                end_later(loop, alive.close(has_error=True))

        return Unread(f"a stream of {self.alias!r} (session {made(self.site)})", give_up)

    @asynccontextmanager
    async def one_connection(self) -> AsyncIterator[Transaction]:
        """One connection for several calls: the session's transaction, or in autocommit mode one
        for the block."""
        if not self._is_one_statement_mode:
            yield await self._current()
            return
        self._check_begun()
        async with self._new_transaction(autocommit=False) as transaction:
            yield transaction

    def run_alone(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, T]:
        """As `run_sync`, without the sessions of other aliases that native mode begins.

        Raises:
            AliasNotInSession: `fn` uses another alias.
            Whatever `fn` raises.
        """
        if (transaction := self._going_on) is not None:
            return transaction.run(fn, *args, **kwargs)
        return self._in_transaction(lambda transaction: transaction.run(fn, *args, **kwargs))
