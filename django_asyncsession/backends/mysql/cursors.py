"""The cursors of the DB-API over asyncmy's coroutines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

from .values import check_readable

# An unbuffered result does not say how many rows it has.
UNKNOWN_COUNT = 2**64 - 1
# Bytes of SQL that execute_many sends in one packet; the server's smallest limit is 1 MB.
BATCH_BYTES = 512 * 1024
# How statements begin that go many in one packet.
BATCHED = frozenset({b"INSERT", b"REPLAC", b"UPDATE", b"DELETE"})


class Cursor:
    """A cursor with all rows in memory, as MySQLdb's default."""

    def __init__(self, connection: Any) -> None:
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
