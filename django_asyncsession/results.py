"""Rows of raw SQL, and the result set that fetches them as asked."""

from __future__ import annotations

import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Sequence,
)
from contextvars import ContextVar
from functools import lru_cache
from itertools import islice
from typing import Any, Protocol, TypeVar

from .exceptions import SessionClosedError, SessionStateError
from .scanner import may_be_cached

T = TypeVar("T")


class Row:
    """One row: values by name, by index and by attribute, in the order of the columns.

    Columns that share a name keep all their values: the name gives the first, the index gives each.
    Iterating gives the values, as with a tuple; `dict(row)` works because there is `keys()`.
    """

    __slots__ = ("_index", "_values")

    _index: dict[str, int]
    _values: tuple[Any, ...]

    def __init__(self, keys: Sequence[str], values: Sequence[Any]) -> None:
        object.__setattr__(self, "_index", _positions(tuple(keys)))
        object.__setattr__(self, "_values", tuple(values))

    def __getitem__(self, key: str | int | slice) -> Any:
        """The value of a column by name or position, or a tuple of values for a slice.

        Raises:
            KeyError: no column has this name; the message lists those there are.
            IndexError: no column at this position.
        """
        if isinstance(key, str):
            try:
                return self._values[self._index[key]]
            except KeyError:
                raise KeyError(f"no column {key!r} in this row; it has {self.keys()}") from None
        return self._values[key]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self._values[self._index[name]]
        except KeyError:
            raise AttributeError(f"no column {name!r} in this row; it has {self.keys()}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"a row is read-only; cannot set {name!r}")

    def keys(self) -> list[str]:
        """Names of the columns, each once."""
        return list(self._index)

    def values(self) -> tuple[Any, ...]:
        """Values of all columns, in order."""
        return self._values

    def items(self) -> list[tuple[str, Any]]:
        """Pairs of name and value, each name once."""
        return [(name, self._values[at]) for name, at in self._index.items()]

    def get(self, name: str, default: Any = None) -> Any:
        """The value of the column, or `default` when no column has this name."""
        at = self._index.get(name)
        return default if at is None else self._values[at]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Row):
            return self._values == other._values and self._index == other._index
        return self._values == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(self._values)

    def __repr__(self) -> str:
        names = {at: name for name, at in self._index.items()}
        parts = (f"{names.get(at, '?')}={value!r}" for at, value in enumerate(self._values))
        return f"<Row {', '.join(parts)}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore_row, (self._index, self._values)


def _restore_row(index: dict[str, int], values: tuple[Any, ...]) -> Row:
    row = Row((), values)
    object.__setattr__(row, "_index", index)
    return row


def _positions(keys: tuple[str, ...]) -> dict[str, int]:
    """Position of the first column of each name; the same columns share one dict.

    What SQLite calls a column is its whole expression, of any length: long names are not kept.
    """
    return (_kept_positions if may_be_cached("".join(keys)) else _positions_of)(keys)


def _positions_of(keys: tuple[str, ...]) -> dict[str, int]:
    positions: dict[str, int] = {}
    for at, name in enumerate(keys):
        positions.setdefault(name, at)
    return positions


_kept_positions = lru_cache(maxsize=1024)(_positions_of)


class Call(Protocol):
    """How a result set calls its cursor: in the session's turn, natively async."""

    def __call__(self, fn: Callable[..., T], /, *args: Any) -> Awaitable[T]: ...


class BaseResultSet(AsyncIterator[Row]):
    """Rows of one executed statement, fetched as asked; made by `session.cursor()`.

    Args:
        cursor: an executed Django cursor.
        run: calls a method of the cursor that may wait for the database.
        buffered: all rows are in memory already, so nothing has to wait.
        chunk_size: rows fetched in one go while iterating.
        release: awaited once, when the result set is closed or exhausted.
    """

    def __init__(
        self,
        cursor: Any,
        run: Call,
        *,
        buffered: bool,
        chunk_size: int = 2000,
        release: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._cursor, self._run, self._buffered = cursor, run, buffered
        self._chunk_size, self._release = chunk_size, release
        self._ahead: Iterator[Any] = iter(())
        self._keys = tuple(column[0] for column in cursor.description or ())
        self._rowcount: int = cursor.rowcount
        self._closed = False

    @property
    def keys(self) -> list[str]:
        """Names of the columns in order, known before the first row; empty for a statement without
        a result."""
        return list(self._keys)

    @property
    def rowcount(self) -> int:
        """Rows that the statement touched or found, -1 when the database does not tell."""
        return self._rowcount

    @property
    def closed(self) -> bool:
        """Whether the result set is closed."""
        return self._closed

    async def fetch_row(self) -> Row | None:
        """The next row, or None after the last.

        Raises:
            SessionClosedError: the result set or its session is closed.
        """
        for values in self._ahead:
            return Row(self._keys, values)
        values = await self._call("fetchone")
        return None if values is None else Row(self._keys, values)

    async def fetch_many(self, n: int) -> list[Row]:
        """The next `n` rows, fewer at the end, an empty list after the last.

        Raises:
            SessionClosedError: the result set or its session is closed.
            ValueError: `n` is not above 0.
        """
        if n <= 0:
            raise ValueError(f"fetch_many({n}): give a number of rows above 0")
        rows = [Row(self._keys, values) for values in islice(self._ahead, n)]
        if len(rows) < n:
            rows += [Row(self._keys, v) for v in await self._call("fetchmany", n - len(rows))]
        return rows

    async def flatten(self) -> list[Row]:
        """All rows that were not fetched yet; the result set is closed then.

        Raises:
            SessionClosedError: the result set or its session is closed.
        """
        rows = [Row(self._keys, values) for values in self._ahead]
        rows += [Row(self._keys, values) for values in await self._call("fetchall")]
        await self.close()
        return rows

    fetch_all = flatten

    def __aiter__(self) -> BaseResultSet:
        return self

    async def __anext__(self) -> Row:
        for values in self._ahead:
            return Row(self._keys, values)
        if self._closed:
            raise StopAsyncIteration
        chunk = await self._call("fetchmany", self._chunk_size)
        if not chunk:
            await self.close()
            raise StopAsyncIteration
        self._ahead = iter(chunk)
        return await self.__anext__()

    async def __aenter__(self) -> BaseResultSet:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the cursor on the server; closing twice, or after the session, does nothing."""
        if self._closed:
            return
        self._closed = True
        self._ahead = iter(())
        try:
            # A session that has ended took its cursors with it.
            if not _is_stale(self._cursor):
                if self._buffered:
                    self._cursor.close()
                else:
                    await self._close_cursor()
        finally:
            if self._release is not None:
                await self._release()

    async def _close_cursor(self) -> None:
        try:
            await self._run(self._cursor.close)
        except SessionStateError:
            # The session is being closed at this moment, or another task has a block open in it;
            # the end of the transaction ends the cursor on the server.
            self._cursor.db.forget_cursor(self._cursor)

    async def _call(self, method: str, *args: Any) -> Any:
        if self._closed:
            raise SessionClosedError("the result set is closed; run the statement again")
        if self._cursor.description is None:
            return None if method == "fetchone" else []
        call = getattr(self._cursor, method)
        return call(*args) if self._buffered else await self._run(call, *args)


def _is_stale(cursor: Any) -> bool:
    return not isinstance(cursor, MemoryCursor) and cursor.lease is not cursor.db.lease


class Reader:
    """Who reads a stream: an async generator, and gone as soon as that is dropped.

    The event loop closes a dropped generator, and with it the cursor, only some time later.
    """

    def __init__(self) -> None:
        self._rows: weakref.ref[Any] | None = None

    def reads(self, rows: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
        """The same generator, remembered as the one that reads."""
        self._rows = weakref.ref(rows)
        return rows

    @property
    def is_gone(self) -> bool:
        """Whether nobody will ask for another row."""
        return self._rows is not None and self._rows() is None

    def run(self, fn: Callable[..., T], *args: Any) -> T:
        """Call `fn`; a cursor that it opens is this reader's."""
        token = _reader.set(self)
        try:
            return fn(*args)
        finally:
            _reader.reset(token)


_reader: ContextVar[Reader | None] = ContextVar("reader", default=None)


def current_reader() -> Reader | None:
    """Who reads what is opened now; None is whoever holds the cursor."""
    return _reader.get()


class MemoryCursor:
    """The rows of an executed cursor, kept when its connection is gone."""

    def __init__(self, cursor: Any) -> None:
        self.description, self.rowcount = cursor.description, cursor.rowcount
        self._rows = iter(cursor.fetchall() if cursor.description else ())

    def fetchone(self) -> Any:
        """The next row, or None."""
        return next(self._rows, None)

    def fetchmany(self, size: int) -> list[Any]:
        """The next `size` rows, fewer at the end."""
        return list(islice(self._rows, size))

    def fetchall(self) -> list[Any]:
        """All rows that are left."""
        return list(self._rows)

    def close(self) -> None:
        """Forget the rows."""
        self._rows = iter(())
