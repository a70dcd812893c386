"""Raw SQL on the connection of a transaction."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from django_asyncsession.results import BaseResultSet, MemoryCursor, Reader
from django_asyncsession.statements import check_one_statement

from .direct import Direct

Params = Sequence[Any] | dict[str, Any] | None


class RawSQL(Direct):
    """Statements as text, and their results."""

    async def execute(self, sql: Any, params: Params = None) -> int:
        """Run one statement and return how many rows it touched, -1 when the database does not
        tell.

        Raises:
            MultipleStatements: more than one statement in `sql`.
        """
        check_one_statement(sql, self._database.vendor)
        return await self.run(self._execute, sql, params)

    async def cursor(self, sql: Any, params: Params = None) -> BaseResultSet:
        """Run one statement and return its result.

        Raises:
            MultipleStatements: more than one statement in `sql`.
        """
        check_one_statement(sql, self._database.vendor)
        cursor = await self.run(self._open_cursor, sql, params, stream=False)
        return BaseResultSet(cursor, self.run, buffered=self.wrapper.buffered_cursors)

    async def cursor_in_memory(self, sql: Any, params: Params = None) -> BaseResultSet:
        """Run one statement and return its result with all rows fetched, to be used when the
        connection is gone.

        Raises:
            MultipleStatements: more than one statement in `sql`.
        """
        check_one_statement(sql, self._database.vendor)

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
        return await self.run(lambda: self.wrapper.connection)

    def _execute(self, sql: Any, params: Params) -> int:
        with self._cursor(stream=False) as cursor:
            cursor.execute(sql, params)
            return int(cursor.rowcount)

    def _open_cursor(self, sql: Any, params: Params, *, stream: bool) -> Any:
        cursor = self._cursor(stream=stream)
        try:
            cursor.execute(sql, params)
        except BaseException:
            cursor.close()
            raise
        return cursor

    def _cursor(self, *, stream: bool) -> Any:
        """A cursor for one statement, as the server counts them."""
        wrapper = self.wrapper
        wrapper.takes_one = True
        try:
            return wrapper.chunked_cursor() if stream else wrapper.cursor()
        finally:
            wrapper.takes_one = False
