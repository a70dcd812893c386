"""The session: rows, raw SQL and transactions for as long as a request lives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, Protocol, TypeVar
from weakref import ref

from django.db import connections
from django.db.models import Model

from django_asyncsession import installed, parallel  # noqa: F401  Says so if the app is missing.
from django_asyncsession.orm import loading, planned, saving, snapshots
from django_asyncsession.orm.changes import DeleteQuery, InsertQuery, UpdateQuery
from django_asyncsession.orm.queries import SelectQuery
from django_asyncsession.orm.relations import Related
from django_asyncsession.orm.tables import RowTable, model_of
from django_asyncsession.plans.fallback import Fallback
from django_asyncsession.plans.plan import Plan
from django_asyncsession.transactions.checkout import Use
from django_asyncsession.transactions.transaction import Transaction

from .statements import Session as Statements

if TYPE_CHECKING:
    from django.http import HttpRequest, HttpResponse

P = ParamSpec("P")
T = TypeVar("T")
M = TypeVar("M", bound=Model)


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


class Session(Statements):
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

    # Reads at the same time

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
