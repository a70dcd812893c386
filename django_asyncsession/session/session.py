"""The session: rows, raw SQL and transactions for as long as a request lives."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Coroutine,
    Iterable,
    Mapping,
    Sequence,
)
from contextlib import AbstractContextManager, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, Self, TypeVar
from weakref import ref

from django.db import connections
from django.db.models import Model

from django_asyncsession import installed, parallel, threadlocals  # noqa: F401  Says so if the app is missing.
from django_asyncsession.backends.options import NO_OPTIONS, TransactionOptions
from django_asyncsession.exceptions import SessionStateError, StreamTimeout
from django_asyncsession.observe.slow import Watch
from django_asyncsession.origins import Site, creation_site, made, task_reference
from django_asyncsession.orm import loading, planned, saving, snapshots
from django_asyncsession.orm.changes import DeleteQuery, InsertQuery, UpdateQuery
from django_asyncsession.orm.queries import SelectQuery
from django_asyncsession.orm.relations import Related
from django_asyncsession.orm.tables import RowTable, model_of
from django_asyncsession.plans.fallback import Fallback
from django_asyncsession.plans.plan import Plan
from django_asyncsession.results import BaseResultSet, Reader, Row
from django_asyncsession.statements import check_one_statement
from django_asyncsession.transactions.blocks import Block
from django_asyncsession.transactions.checkout import (
    Source,
    State,
    Use,
    check_loop,
    nothing_can_wait,
    session_closed,
)
from django_asyncsession.transactions.hooks import call_now
from django_asyncsession.transactions.raw import Params
from django_asyncsession.transactions.transaction import Outcome, Transaction, end_later
from django_asyncsession.unread import Unread

if TYPE_CHECKING:
    from django.http import HttpRequest, HttpResponse

P = ParamSpec("P")
T = TypeVar("T")
# Options of a session of which none is given.
NOT_GIVEN = (None,) * 6
M = TypeVar("M", bound=Model)


class Database(Source, Protocol):
    """What a session needs of its database."""

    @property
    def transaction_class(self) -> type[Transaction]: ...


class Companions(Protocol):
    """The sessions of other aliases that end with a session, and serve what it runs."""

    async def run(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call sync code with whichever connections it uses."""

    def run_on(
        self, alias: str, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, T]:
        """Call sync code with the connection of `alias`, and with others if it uses them."""

    def beside(self, session: Session) -> AbstractContextManager[None]:
        """Make another session the current one for a block."""


class Attached(NamedTuple):
    """A connection that sync code has asked for while it runs."""

    transaction: Transaction
    use: Use
    # It ends with the use, as in autocommit mode.
    is_own: bool

    def leave(self, error: BaseException | None) -> None:
        """Let the next use it.

        Args:
            error: what the code raised.

        Raises:
            What the error means, if it means another one.
        """
        self.transaction.end_use(self.use, error)

    async def end(self, error: BaseException | None) -> None:
        """End the transaction, if it is of this use only."""
        if self.is_own:
            kind = None if error is None else type(error)
            await self.transaction.__aexit__(kind, error, None)


class Session:
    """One unit of work on one database: a connection, taken when first needed, and its transaction.

    Used with `async with`, it commits at the end, and rolls back when anything is raised. After
    `commit()` or `rollback()` in the middle, the next statement begins a new transaction.

    Args:
        bind: the `DatabaseInterface` to work on.
        autocommit: True: no transaction; each statement takes its own connection, so they can run
            in parallel.
        isolation: "read committed", "repeatable read", "serializable"; None is the database's
            default.
        read_only: refuse writes, and SQL that would allow them or change settings of the server. It
            guards against mistakes: code that uses PostgreSQL's driver directly, or a procedure of
            MySQL's that allows itself to write, gets by.
        deferrable: wait for a snapshot that cannot fail (PostgreSQL, serializable and read-only).
        timeout: seconds that a statement may take.
        lock_timeout: seconds that a statement may wait for a lock.
        idle_timeout: seconds that the transaction may wait for its next statement.
        begin_on_use: begin with the first statement, so that `begin()` is not needed.
        site: what messages call the place where it was made; None takes the caller's.

    Raises:
        ConfigurationError: an option that cannot be.
    """

    # Set in native mode, for as long as the session is a current one.
    companions: Companions | None = None
    # It was rolled back, because a stream of it was left unread.
    _given_up = False
    # Where its connections come from, if not from its database.
    _source: Source | None = None

    def __init__(
        self,
        bind: Database,
        *,
        autocommit: bool = False,
        isolation: str | None = None,
        read_only: bool | None = None,
        deferrable: bool | None = None,
        timeout: float | None = None,
        lock_timeout: float | None = None,
        idle_timeout: float | None = None,
        begin_on_use: bool = False,
        site: Site | str | None = None,
    ) -> None:
        self.bind = bind
        self.alias = bind.alias
        self.autocommit = autocommit
        self.info: dict[str, Any] = {}
        # Options that cannot be are told here, not at the first statement.
        given = (isolation, read_only, deferrable, timeout, lock_timeout, idle_timeout)
        self._options = NO_OPTIONS if given == NOT_GIVEN else TransactionOptions(*given)
        self._begin_on_use = begin_on_use
        self._state = State.NEW
        # Where it was made, or what for, in words for messages.
        self.site = creation_site() if site is None else site
        # Called, the task that made it, while somebody wants to know.
        self.maker = task_reference() if Watch.is_on else None
        # What its sync code has put into thread-locals; None when there are none to swap.
        self.contents = threadlocals.new()
        self._entered = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._outcome: Outcome | None = None
        # The transaction in progress; in autocommit mode only while `atomic()` is open.
        self._transaction: Transaction | None = None
        self._released = False
        self._request: Callable[[], HttpRequest | None] = _no_request

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.alias!r} {self._describe()}>"

    def _describe(self) -> str:
        if self._transaction is not None:
            return self._transaction.describe()
        return self._state.value + (", autocommit" if self.autocommit else "")

    def __del__(self) -> None:
        transaction = getattr(self, "_transaction", None)
        if transaction is not None and transaction.holds_connection:
            warnings.warn(
                f"{self!r} {made(self.site)} was never closed; use `async with`, or await "
                "session.close()",
                ResourceWarning,
                stacklevel=2,
            )

    @property
    def request(self) -> HttpRequest | None:
        """The request that the session ends with, if it is one's."""
        return self._request()

    @request.setter
    def request(self, request: HttpRequest | None) -> None:
        """Say which request it ends with; done by what makes the session."""
        # The request has the session: the other way round it would be a cycle.
        self._request = _no_request if request is None else ref(request)

    # Begin and end

    async def begin(self) -> Self:
        """Begin a transaction. The connection is taken, and BEGIN sent, with the first statement.

        Raises:
            SessionStateError: in a transaction already; nested blocks are `begin_nested()`.
            SessionClosedError: the session is closed.
        """
        if self._state is not State.NEW:
            self._check_not_closed()
            self._check_loop()
        if self._transaction is not None:
            raise SessionStateError(
                f"{self!r} has begun already; nest with `async with session.begin_nested()`"
            )
        if not self.autocommit:
            self._transaction = self._new_transaction().begin_now()
        elif self._state is not State.NEW:
            raise SessionStateError(
                f"{self!r} has begun already; use `async with session.atomic()`"
            )
        self._state, self._loop = State.IDLE, asyncio.get_running_loop()
        return self

    start = begin

    def _set_begun(self) -> None:
        self._state, self._loop = State.IDLE, asyncio.get_running_loop()

    async def commit(self) -> Self:
        """Commit and run the `on_commit` callbacks; the next statement begins a new transaction.

        Raises:
            TransactionManagementError: an error or a cancellation inside was swallowed; it is
                rolled back.
            CommitUnknown: the connection was lost while COMMIT was on its way.
            SessionStateError: not begun, or a nested block is open.
            Whatever the database says to COMMIT, or a callback raised. Any error leaves the
            session closed.
        """
        await self._finish(Transaction.commit, "commit()")
        return self

    async def rollback(self, checkpoint: str | Block | None = None) -> Self:
        """Roll back; with a `checkpoint` (a savepoint or its name), roll back to it and stay in
        the transaction.

        Raises:
            SessionStateError: not begun, or a nested block is open.
        """
        if checkpoint is None:
            await self._finish(Transaction.rollback, "rollback()")
        else:
            await (await self._current()).rollback(checkpoint)
        return self

    async def _finish(self, how: Callable[[Transaction], Awaitable[None]], what: str) -> None:
        transaction = self._going_on
        if transaction is None or self.autocommit:
            self._check_begun()
            if self.autocommit:
                raise SessionStateError(
                    f"{what} in autocommit mode: every statement is committed already"
                )
            transaction = await self._settled()
        if transaction is None:
            return
        try:
            await how(transaction)
        except BaseException:
            if transaction.state is State.CLOSED:
                self._state = State.CLOSED
            raise
        finally:
            self._forget(transaction)

    async def close(self, *, has_error: bool = False) -> None:
        """Roll back what is not committed and give the connection back; closing twice does
        nothing."""
        transaction = self._transaction
        if not nothing_can_wait():
            if asyncio._get_running_loop() is not self._loop:
                self._check_loop()
            if transaction is not None:
                transaction.check_may_close()
        self._state = State.CLOSED
        if transaction is not None:
            try:
                await transaction.close(has_error=has_error)
            finally:
                self._forget(transaction)
        if self.contents is not None:
            self.contents.clear()

    aclose = close

    def _forget(self, transaction: Transaction) -> None:
        if transaction.state is State.CLOSED:
            self._outcome = transaction.outcome
            if self._transaction is transaction:
                self._transaction = None

    async def reset(self) -> Self:
        """Roll back, give the connection back, and be as new: to be begun again."""
        await self.close()
        self._state = State.NEW
        self._entered = self._released = self._given_up = False
        self._loop = self._outcome = None
        return self

    async def __aenter__(self) -> Self:
        if self._state is State.CLOSED:
            self._check_not_closed()
        if self._entered:
            raise SessionStateError(
                f"{self!r} is entered already; nest with `async with session.begin_nested()`"
            )
        if self._state is State.NEW:
            await self.begin()
        else:
            self._check_loop()
        self._entered = True
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if exc is None:
                if self._given_up:
                    self.check_not_given_up()
                if self._transaction is not None:
                    await self._finish(Transaction.commit, "commit()")
        finally:
            await self.close(has_error=exc is not None)

    def check_not_given_up(self) -> None:
        """For whoever is about to say that all went well.

        Raises:
            StreamTimeout: the session was rolled back, because a stream of it was left unread.
        """
        if self._given_up:
            raise StreamTimeout(
                f"the session of {self.alias!r} {made(self.site)} was rolled back, because a "
                "stream of it was left unread for longer than "
                'ASYNC_SESSION["STREAM_TIMEOUT"]; read it to its end, or close it'
            )

    @property
    def state(self) -> State:
        """Where the session is in its life."""
        return self._state if self._transaction is None else self._transaction.state

    @property
    def closed(self) -> bool:
        """Whether the session is closed for good."""
        return self._state is State.CLOSED

    @property
    def in_transaction(self) -> bool:
        """Whether a transaction has begun and not ended."""
        return self._transaction is not None

    @property
    def transaction(self) -> Transaction | None:
        """The transaction in progress, with the savepoints by name of the low-level API."""
        return self._transaction

    @property
    def outcome(self) -> Outcome | None:
        """How the last transaction ended, as far as is known here; None before the first end."""
        return self._outcome

    # Nested blocks

    def begin_nested(self, name: str | None = None) -> Block:
        """A savepoint, entered with `async with`: released at the end, rolled back to when
        anything is raised.

        Args:
            name: name of the savepoint; None makes one up.

        Raises:
            ValueError: a name that cannot be quoted.
            SessionStateError: not in a transaction.
        """
        return Block(self._begun_transaction("begin_nested()"), name=name, strict=True)

    savepoint = begin_nested

    @asynccontextmanager
    async def atomic(self, savepoint: bool = True, durable: bool = False) -> AsyncIterator[None]:
        """Django's `atomic()`: a savepoint in a transaction, a transaction in autocommit mode.

        Raises:
            RuntimeError: `durable` and nested.
            As `commit`.
        """
        if not self.autocommit or self._transaction is not None:
            transaction = await self._current()
            async with Block(transaction, savepoint=savepoint, durable=durable):
                yield
            return
        self._check_begun()
        self._transaction = transaction = self._new_transaction(autocommit=False)
        try:
            async with transaction:
                transaction.own()
                yield
                self.check_not_given_up()
        finally:
            self._forget(transaction)

    @asynccontextmanager
    async def released(self) -> AsyncIterator[None]:
        """Commit and be without a connection for slow work that needs no database; carry on
        afterwards.

        In autocommit mode there is no connection to give back.

        Raises:
            SessionStateError: a statement inside the block.
            As `commit`.
        """
        if self._is_one_statement_mode:
            self._check_begun()
        else:
            await self.commit()
        self._released = True
        try:
            yield
        finally:
            self._released = False

    def set_rollback(self, rollback: bool) -> None:
        """Say that the innermost block shall be rolled back at its end without an error, or take
        that back.

        Raises:
            SessionStateError: not in a transaction.
        """
        self._begun_transaction("set_rollback()").set_rollback(rollback)

    def get_rollback(self) -> bool:
        """Whether the innermost block will be rolled back at its end.

        Raises:
            SessionStateError: not in a transaction.
        """
        return self._begun_transaction("get_rollback()").get_rollback()

    def on_commit(self, func: Callable[[], Any], robust: bool = False) -> None:
        """Call `func`, or await it if it is a coroutine function, after the commit; never after a
        rollback.

        Callbacks run in order; those registered in a nested block that is rolled back are dropped.
        In autocommit mode a plain function is called at once, as in Django.

        Args:
            robust: log an error of `func` instead of raising it and dropping the later callbacks.

        Raises:
            SessionStateError: not begun; or a coroutine function in autocommit mode.
            TypeError: `func` cannot be called.
        """
        if not self._is_one_statement_mode:
            self._begun_transaction("on_commit()").on_commit(func, robust)
            return
        self._check_begun()
        cannot_await = SessionStateError(
            "on_commit() cannot await in autocommit mode; await the coroutine yourself"
        )
        if inspect.iscoroutinefunction(func):
            raise cannot_await
        if inspect.iscoroutine(result := call_now(func, robust)):
            result.close()
            raise cannot_await

    def on_rollback(self, func: Callable[[], Any]) -> None:
        """Call `func`, or await it, once the current block is rolled back. Its errors are logged.

        Raises:
            SessionStateError: not in a transaction.
            TypeError: `func` cannot be called.
        """
        self._begun_transaction("on_rollback()").on_rollback(func)

    # Raw SQL

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
            self.hold() as transaction,
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
                if isinstance(alive, Session):
                    alive._given_up = True
                end_later(loop, alive.close(has_error=True))

        return Unread(f"a stream of {self.alias!r} (session {made(self.site)})", give_up)

    @asynccontextmanager
    async def hold(self) -> AsyncIterator[Transaction]:
        """One connection for several calls: the session's transaction, or in autocommit mode one
        for the block."""
        if not self._is_one_statement_mode:
            yield await self._current()
            return
        self._check_begun()
        async with self._new_transaction(autocommit=False) as transaction:
            yield transaction

    async def gather(self, *reads: parallel.Read, limit: int = 4) -> list[Any]:
        """Run reads at the same time, each on a pooled connection of its own, `limit` of them at
        once; fewer when the pool has no more.

        On PostgreSQL all of them see one snapshot of the data: that of this session's transaction
        if its isolation level keeps one, else that of the moment. See `parallel.py` for the
        cases in which they run one after the other on the session's own connection instead.

        Args:
            reads: SELECT queries of this session, QuerySets, and functions that take a session and
                return something to be awaited: `lambda s: s.fetch_all(sql)`.
            limit: connections to read on at the same time, 1 or more.

        Returns:
            The results in the order of the reads; those of QuerySets as lists.

        Raises:
            SessionStateError: the transaction has written, locked or set something, which the
                other connections would not see; or a read locks rows, as `for_update()` does.
            TypeError: a coroutine, or something else that is no read.
            ValueError: `limit` is below 1.
            What the first read that failed raised; the others are stopped.
        """
        calls = parallel.checked(reads, self.alias, limit)
        self._check_begun()
        transaction = None if self._is_one_statement_mode else await self._current()
        return await parallel.Gathering(self, calls, limit).run(transaction)

    def reader(self, isolation: str | None) -> Session:
        """A new session for reading beside this one."""
        given = self._options
        # Not `idle_timeout`: it waits for the others while it has nothing to do.
        reader = Session(
            self.bind,
            isolation=isolation or given.isolation,
            read_only=True,
            timeout=given.timeout,
            lock_timeout=given.lock_timeout,
        )
        reader.info, reader.request = self.info, self.request
        if self.contents is not None and reader.contents is not None:
            reader.contents.join(self.contents.copy())
        return reader

    # Sync code

    async def run_sync(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call sync code, Django's ORM and all that uses it, natively async on this session's
        connection.

        Raises:
            TypeError: `fn` is a coroutine function.
            Whatever `fn` raises.
        """
        if inspect.iscoroutinefunction(fn):
            raise TypeError(
                f"run_sync() calls sync functions, and {fn!r} is a coroutine function; await it"
            )
        return await self._run(fn, *args, **kwargs)

    def _run(
        self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> Coroutine[Any, Any, T]:
        if self.companions is not None:
            return self.companions.run_on(self.alias, fn, *args, **kwargs)
        if (transaction := self._going_on) is not None:
            return transaction.run(fn, *args, **kwargs)
        return self.run_alone(fn, *args, **kwargs)

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

    async def attach(self, transaction: Transaction | None = None) -> Attached:
        """The connection for sync code that asks for it while it runs, which `Attached.leave`
        gives back; what native mode calls.

        Args:
            transaction: one that is held already; None is that in progress, or in autocommit mode
                one for this.

        Raises:
            As `run_sync`.
        """
        is_own = transaction is None and self._is_one_statement_mode
        if is_own:
            self._check_begun()
            transaction = self._new_transaction().begin_now()
        elif transaction is None:
            transaction = self._going_on or await self._current()
        assert transaction is not None
        return Attached(transaction, await transaction.begin_use(), is_own)

    def attach_at_once(self, transaction: Transaction | None = None) -> Attached | None:
        """As `attach`, if there is nothing to wait for; else None."""
        if transaction is None and (transaction := self._going_on) is None:
            return None
        use = transaction.begin_use_at_once()
        return None if use is None else Attached(transaction, use, is_own=False)

    async def render(
        self,
        request: HttpRequest | None,
        template_name: str | Sequence[str],
        context: Mapping[str, Any] | None = None,
        content_type: str | None = None,
        status: int | None = None,
        using: str | None = None,
    ) -> HttpResponse:
        """A response with a rendered template, as Django's `render()` makes it; what the template
        asks the database runs on this session's connection.

        Args:
            request: for the context processors.
            template_name: its name, or names of which the first that exists is taken.
            context: what the template can use; querysets need not be evaluated.
            content_type: None is HTML.
            status: None is 200.
            using: name of the template engine.

        Raises:
            As `run_sync`; Django's template errors.
        """
        # Importing sessions need not import the template engine.
        from django.shortcuts import render

        return await self._run(render, request, template_name, context, content_type, status, using)

    async def driver_connection(self) -> Any:
        """The driver's own connection, for use inside `run_sync` while the transaction is open."""
        return await (await self._current()).driver_connection()

    # Rows

    async def add(self, row: M) -> M:
        """INSERT a new row, UPDATE the changed columns of a loaded one, through the model's own
        `save()`; a loaded row that has not changed is left alone.

        Returns:
            The same row, with its primary key and what the database computed filled in.

        Raises:
            RowNotFound: the loaded row is not in the database any more.
            Django's database errors.
        """
        await self.run_write(saving.add, row, self.alias)
        return row

    async def add_all(self, given: Iterable[M]) -> list[M]:
        """`add` each row, in one turn, all or none.

        Raises:
            As `add`.
        """
        every = list(given)
        await self.run_write(saving.add_all, every, self.alias)
        return every

    async def run_write(self, fn: Callable[..., T], /, *args: Any) -> T:
        """Call sync code that writes rows; its last argument is the `snapshots.Write`.

        When the block is rolled back, the rows count as not written: `add` writes them again.

        Raises:
            As `run_sync`.
        """

        def run(transaction: Transaction) -> Coroutine[Any, Any, T]:
            block = transaction.levels.innermost
            write = snapshots.Write((ref(transaction), block and ref(block)))
            transaction.on_rollback(write.undo)
            return transaction.run(fn, *args, write)

        if (transaction := self._going_on) is not None:
            return await run(transaction)
        return await self._in_transaction(run)

    async def insert_now(self, row: M) -> M:
        """INSERT the row, whether or not it was loaded.

        Raises:
            Django's database errors.
        """
        await self.run_write(saving.insert, row, self.alias)
        return row

    async def update_now(self, row: M) -> M:
        """UPDATE the changed columns of a loaded row, or the fields that were set of another.

        Raises:
            As `merge`.
        """
        return await self.merge(row)

    async def delete_now(self, row: Model) -> int:
        """`remove`, under asyncqlio's name."""
        return await self.remove(row)

    async def merge(self, row: M, fields: Collection[Any] | None = None) -> M:
        """UPDATE, by primary key, a row that was not loaded.

        Args:
            row: made by a row table, whose set fields are written; or any row, with `fields`.
            fields: columns or names to write.

        Raises:
            RowNotFound: there is no row with this primary key.
            TypeError: which fields were set is not known.
            Django's database errors.
        """
        await self.run_write(saving.merge, row, fields, self.alias)
        return row

    async def remove(self, row: Model) -> int:
        """DELETE a row, with its `on_delete` rules, through the model's own `delete()`.

        Returns:
            How many rows were deleted, those that `on_delete` took included.

        Raises:
            ValueError: the row has no primary key.
            Django's database errors.
        """
        return await self._run(saving.remove, row, self.alias)

    async def refresh(self, row: M, fields: Collection[Any] | None = None) -> M:
        """Read the row's loaded fields, or the given ones, from the database again.

        Raises:
            RowNotFound: the row is gone.
        """
        await self._run(loading.refresh, row, fields, self.alias)
        return row

    async def load(self, given: M | Iterable[M], *paths: Any) -> None:
        """Load relations (`"author"`, `"tags__owner"`, a column, a `Prefetch`) and deferred fields
        of one row or of many, in one query for each step.

        Raises:
            AttributeError: the model has no such relation or field.
        """
        every = [given] if isinstance(given, Model) else list(given)
        await self._run(loading.load, every, paths, self.alias)

    def related(self, row: Model) -> Related:
        """The relations of a row: `await session.related(book).tags.add(tag)`."""
        return Related(self, row)

    async def get(self, model: type[M] | RowTable[M], pk: Any) -> M | None:
        """The row with this primary key, or None."""
        asked: loading.Asked[M] = loading.Asked(model_of(model), pk, self.alias)
        if asked.plan is not None:
            try:
                return asked.row(await self.fetch_plan(asked.plan, (pk,)))
            except Fallback as fallback:
                asked.refuse(fallback)
        row: M | None = await self._run(asked.run, loading.get)
        return row

    async def get_one(self, model: type[M] | RowTable[M], pk: Any) -> M:
        """The row with this primary key.

        Raises:
            The model's DoesNotExist.
        """
        asked: loading.Asked[M] = loading.Asked(model_of(model), pk, self.alias)
        if asked.plan is not None:
            try:
                return asked.only_row(await self.fetch_plan(asked.plan, (pk,)))
            except Fallback as fallback:
                asked.refuse(fallback)
        row: M = await self._run(asked.run, loading.get_one)
        return row

    # Queries

    def fetch_plan(self, plan: Plan, values: Sequence[Any]) -> Coroutine[Any, Any, list[Any]]:
        """Run the statement of a plan and return its rows as tuples; what queries call.

        Raises:
            Fallback: it has to be run Django's way.
            Django's database errors.
        """
        if (transaction := self._going_on) is not None:
            return transaction.fetch(plan, values, planned.fetch)
        return self._in_transaction(lambda own: own.fetch(plan, values, planned.fetch))

    @property
    def select(self) -> SelectQuery[Any]:
        """The beginning of a SELECT: `session.select(Model)` or `session.select.from_(Model)`."""
        return SelectQuery(self)

    @property
    def insert(self) -> InsertQuery:
        """The beginning of an INSERT: `session.insert.rows(...)`."""
        return InsertQuery(self)

    @property
    def update(self) -> UpdateQuery:
        """The beginning of an UPDATE: `session.update(Model)` or `session.update.table(Model)`."""
        return UpdateQuery(self)

    @property
    def delete(self) -> DeleteQuery:
        """The beginning of a DELETE: `session.delete(Model)` or `session.delete.table(Model)`."""
        return DeleteQuery(self)

    async def run_select_query(self, query: SelectQuery[T]) -> list[T]:
        """Run the query, as awaiting it does."""
        return await query

    async def run_insert_query(self, query: InsertQuery) -> list[Any]:
        """Run the query, as awaiting it does."""
        return await query

    async def run_update_query(self, query: UpdateQuery) -> Any:
        """Run the query, as awaiting it does."""
        return await query

    async def run_delete_query(self, query: DeleteQuery) -> Any:
        """Run the query, as awaiting it does."""
        return await query

    async def truncate(self, source: type[Model] | RowTable[Any], cascade: bool = False) -> None:
        """Delete all rows of the model's table at once, without signals, and start its keys anew.

        Args:
            source: a model or a row table.
            cascade: also the tables that refer to it.

        Raises:
            Django's database errors, when other tables refer to it.
        """

        model = model_of(source)

        def truncate() -> None:
            from django.core.management.color import no_style

            wrapper = connections[self.alias]
            wrapper.ops.execute_sql_flush(
                wrapper.ops.sql_flush(
                    no_style(),
                    [model._meta.db_table],
                    reset_sequences=True,
                    allow_cascade=cascade,
                )
            )

        await self.run_alone(truncate)

    # Inside

    def _new_transaction(self, autocommit: bool | None = None) -> Transaction:
        mode = self.autocommit if autocommit is None else autocommit
        transaction = self.bind.transaction_class(
            self._source or self.bind,
            autocommit=mode,
            site=self.site,
            contents=self.contents,
            options=self._options,
        )
        transaction.session = ref(self)
        return transaction

    @property
    def _is_one_statement_mode(self) -> bool:
        """Whether each statement takes a connection of its own."""
        transaction = self._transaction
        return self.autocommit and (transaction is None or transaction.is_over_elsewhere)

    @property
    def _going_on(self) -> Transaction | None:
        """The transaction in progress, if nobody is about to end it; its own guard does the
        rest."""
        transaction = self._transaction
        if transaction is None or transaction.is_ending or self._released:
            return None
        return transaction if transaction.state is State.OPEN else None

    async def _in_transaction(self, use: Callable[[Transaction], Coroutine[Any, Any, T]]) -> T:
        """Await what `use` makes of the transaction: the session's, begun now if need be, or in
        autocommit mode one of its own."""
        if not self._is_one_statement_mode:
            return await use(await self._current())
        self._check_begun()
        async with self._new_transaction() as transaction:
            return await use(transaction)

    async def _current(self) -> Transaction:
        """The transaction in progress; begun now if the last one has ended."""
        self._check_begun()
        transaction = await self._settled()
        if transaction is None:
            transaction = self._transaction = await self._new_transaction().begin()
        return transaction

    async def _settled(self) -> Transaction | None:
        """The transaction in progress, once those that another task ends have ended: who comes
        after a commit goes on in the next transaction."""
        while (transaction := self._transaction) is not None and transaction.is_over_elsewhere:
            await transaction.turn.enter()
            transaction.turn.leave()
            self._check_begun()
            if self._transaction is transaction and transaction.state is State.CLOSED:
                self._forget(transaction)
        return None if transaction is None or transaction.state is State.CLOSED else transaction

    def _begun_transaction(self, what: str) -> Transaction:
        """The transaction in progress, for what needs no connection yet."""
        self._check_begun()
        if self._transaction is None:
            if self.autocommit:
                raise SessionStateError(
                    f"{what} needs a transaction, and this session is in autocommit mode; use "
                    "session.atomic()"
                )
            self._transaction = self._new_transaction().begin_now()
        return self._transaction

    def _check_begun(self) -> None:
        self._check_not_closed()
        if self._state is State.NEW:
            if not self._begin_on_use:
                raise SessionStateError(
                    f"{self!r} has not begun; use `async with session:`, or await session.begin()"
                )
            self._set_begun()
        self._check_loop()
        if self._released:
            raise SessionStateError(
                f"{self!r} gave its connection back for the `released()` block; leave the block "
                "first"
            )

    def _check_not_closed(self) -> None:
        if self._state is State.CLOSED:
            raise session_closed(self.alias, self.site)

    def _check_loop(self) -> None:
        check_loop(self._loop, self.alias, self.site)


def _no_request() -> None:
    """The request of a session that is not for one."""
