"""Queries as asyncqlio users know them: immutable, awaitable, and Django QuerySets underneath."""

from __future__ import annotations

import logging
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
)
from functools import partial
from itertools import islice
from typing import Any, Final, Generic, Self, TypeVar, cast

from django.core.exceptions import MultipleObjectsReturned
from django.db import Error
from django.db.models import Manager, Model, QuerySet
from django.db.models.query import ModelIterable

from django_asyncsession.plans.fallback import Fallback
from django_asyncsession.plans.plan import COUNT, EXISTS, ROWS, Ending
from django_asyncsession.plans.shapes import Step, steps
from django_asyncsession.results import Reader, Row

from . import loading, planned, snapshots
from .filtered import OneConnection, QuerySession, _condition, _Filtered
from .selected import (
    _descending,
    _first_value,
    _named,
    _names,
    _plain,
    _split_at_annotate,
    _whole,
)
from .tables import RowTable, model_of
from .writes import path_of

logger = logging.getLogger("django_asyncsession.queries")

T = TypeVar("T")
M = TypeVar("M", bound=Model)
V = TypeVar("V", int, bool)

RowSource = type[M] | RowTable[M] | QuerySet[M] | Manager[M]


class Results(list[T]):
    """The rows of a query: a list that `async for`, `next()` and `flatten()` take as well."""

    _left: Iterator[T] | None = None

    async def __aiter__(self) -> AsyncIterator[T]:
        for row in self:
            yield row

    async def next(self) -> T | None:
        """The next row, or None after the last."""
        if self._left is None:
            self._left = iter(self)
        return next(self._left, None)

    async def flatten(self) -> list[T]:
        """All rows as a plain list."""
        return list(self)


def _source(source: Any, alias: str) -> QuerySet[Any]:
    """The rows that are meant: those of the default manager when a model is given."""
    if isinstance(source, QuerySet):
        return source.using(alias)
    if isinstance(source, SelectQuery):
        return source.queryset.using(alias)
    manager = source if isinstance(source, Manager) else model_of(source)._default_manager
    return cast("QuerySet[Any]", snapshots.on(manager, alias))


class SelectQuery(_Filtered, Generic[T]):
    """A SELECT. It runs when it is awaited or iterated, or by one of the methods at its end.

    `session.select(Model)` begins one; a row table, a QuerySet or a Manager will do as well.
    """

    _limit: int | None = None
    _offset: int = 0
    # Of the QuerySet methods since the start, those that group_by may have to move behind itself;
    # those that were recorded are in the recording.
    _steps: tuple[Step, ...] = ()
    _base: QuerySet[Any] | None = None
    # Its shape and values, of which a QuerySet is made only when somebody asks for it; without one
    # it runs Django's way, for the reason with this name.
    _recording: planned.Recording | None = None
    _why = "source"
    # Whether rows come as `Row`s of these columns; empty means all that there are.
    _columns: tuple[str, ...] | None = None
    # Relations to load when the rows are there.
    _late: tuple[Any, ...] = ()

    def __call__(self, source: RowSource[M]) -> SelectQuery[M]:
        """The query on this model, row table, QuerySet or Manager."""
        fresh: SelectQuery[M] = SelectQuery(self._session)
        if isinstance(source, (QuerySet, Manager, SelectQuery)):
            given = self._start(source)
            return fresh._with(_given=given, _base=given)
        model = model_of(source)
        try:
            return fresh._with(_recording=planned.begin(model, self._session.alias))
        except Fallback as fallback:
            given = self._start(model)
            return fresh._with(_given=given, _base=given, _why=fallback.reason)

    def from_(self, source: RowSource[M]) -> SelectQuery[M]:
        """The query on this table: asyncqlio's other way to say it."""
        return self(source)

    def _start(self, source: Any) -> QuerySet[Any]:
        return _source(source, self._session.alias)

    @property
    def _queryset(self) -> QuerySet[Any]:
        if self._given is None and self._recording is not None:
            queryset = self._start_of()
            for method, args, kwargs in self._done:
                queryset = getattr(queryset, method)(*args, **kwargs)
            self._given = queryset
        return super()._queryset

    def _start_of(self) -> QuerySet[Any]:
        """The QuerySet without any step."""
        if self._base is None and self._recording is not None:
            self._base = self._recording.base()
        return cast("QuerySet[Any]", self._base)

    def _apply(self, method: str, *args: Any, **kwargs: Any) -> Self:
        recording, why = self._recorded(method, args, kwargs)
        if recording is not None and recording.is_known:
            return self._with(_given=None, _recording=recording)
        # Built at once, so that its errors come from this line.
        changed = self._with(_given=getattr(self._queryset, method)(*args, **kwargs))
        changed._base, changed._recording = self._start_of(), recording
        if recording is None:
            changed._steps, changed._why = (*self._done, (method, args, kwargs)), why
        return changed

    @property
    def _done(self) -> tuple[Step, ...]:
        """The QuerySet methods since the start."""
        if self._recording is None:
            return self._steps
        return tuple(steps(self._recording.path, self._recording.slots))

    def _recorded(
        self, method: str, args: Any, kwargs: Any
    ) -> tuple[planned.Recording | None, str]:
        if self._recording is None:
            return None, self._why
        try:
            return self._recording.then(method, args, kwargs), ""
        except Fallback as fallback:
            return None, fallback.reason

    def where(self, *conditions: Any, **lookups: Any) -> Self:
        """Only rows for which all conditions and Django lookups (`name__startswith="h"`) hold.

        As with `filter`, conditions of one call on a to-many relation are about the same related
        row; those of two calls may be about two.

        Raises:
            TypeError: something given is not a condition.
        """
        return self._apply("filter", *map(_condition, conditions), **lookups)

    def exclude(self, *conditions: Any, **lookups: Any) -> Self:
        """Not the rows for which all conditions hold; Django's `exclude`."""
        return self._apply("exclude", *map(_condition, conditions), **lookups)

    def order_by(self, *columns: Any, sort_order: str = "asc") -> Self:
        """Orders by columns, `column.desc()`, expressions or names; `sort_order` turns plain ones.

        Without arguments the rows come in no order.
        """
        if sort_order not in ("asc", "desc"):
            raise ValueError(f"sort_order cannot be {sort_order!r}; it is 'asc' or 'desc'")
        down = sort_order == "desc"
        return self._apply("order_by", *(_descending(c) if down else c for c in columns))

    def limit(self, count: int | None) -> Self:
        """At most this many rows."""
        return self._with(_limit=_whole("limit", count))

    def offset(self, count: int) -> Self:
        """Without the first rows, this many."""
        return self._with(_offset=_whole("offset", count) or 0)

    def __getitem__(self, part: slice) -> Self:
        """`query[5:15]`: the rows with these numbers."""
        if not isinstance(part, slice) or part.step is not None:
            raise TypeError("a query takes slices such as query[5:15]; for one row use first()")
        start = _whole("start", part.start) or 0
        stop = _whole("stop", part.stop)
        size = None if stop is None else max(stop - start, 0)
        if self._limit is not None:
            left = max(self._limit - start, 0)
            size = left if size is None else min(size, left)
        return self._with(_offset=self._offset + start, _limit=size)

    def distinct(self, *columns: Any) -> Self:
        """Each row once; on PostgreSQL the first row for each value of the columns."""
        return self._apply("distinct", *map(path_of, columns))

    def related(self, *relations: Any) -> Self:
        """Loads these foreign keys in the same statement; Django's `select_related`."""
        return self._apply("select_related", *map(path_of, relations))

    def prefetch(self, *relations: Any) -> Self:
        """Loads these relations in one more statement each: names, columns or `Prefetch`."""
        lookups = [loading.prefetch_lookup(r) for r in relations]
        model = self._queryset.model
        # Django reads the rows of a generic foreign key from the default database.
        late = [p for p in lookups if loading.is_generic(model, p)]
        changed = self._apply("prefetch_related", *(p for p in lookups if p not in late))
        return changed._with(_late=(*self._late, *late))

    def annotate(self, *expressions: Any, **named: Any) -> Self:
        """Adds computed values to each row: functions, aggregates, windows, subqueries."""
        return self._apply("annotate", *expressions, **named)

    def group_by(self, *columns: Any, **named: Any) -> SelectQuery[Row]:
        """One `Row` for each value of these columns, with the aggregates of `annotate`."""
        names, computed = _named(columns, named)
        before, after = _split_at_annotate(self._done)
        done = (*before, ("values", names, computed), *after)
        queryset = self._start_of()
        for method, args, kwargs in done:
            queryset = getattr(queryset, method)(*args, **kwargs)
        grouped = self._with(_given=queryset, _steps=done, _columns=(), _recording=None)
        grouped._base, grouped._why = self._start_of(), "step"
        return cast("SelectQuery[Row]", grouped)

    def having(self, *conditions: Any, **lookups: Any) -> Self:
        """Only the groups for which the conditions on aggregates hold."""
        return self.where(*conditions, **lookups)

    def columns(self, *columns: Any, **named: Any) -> SelectQuery[Row]:
        """`Row`s of these columns and expressions, under their own names or those given."""
        names, computed = _named(columns, named)
        selected = self._apply("values", *names, **computed)
        return cast("SelectQuery[Row]", selected._with(_columns=_names(columns, named)))

    def values(self, *columns: Any, **named: Any) -> SelectQuery[dict[str, Any]]:
        """Django's `values`: dictionaries."""
        names, computed = _named(columns, named)
        return cast("SelectQuery[dict[str, Any]]", self._apply("values", *names, **computed))

    def values_list(
        self, *columns: Any, flat: bool = False, named: bool = False
    ) -> SelectQuery[Any]:
        """Django's `values_list`: tuples, plain values with `flat`, named tuples with `named`."""
        return self._apply("values_list", *map(_plain, columns), flat=flat, named=named)

    def only(self, *columns: Any) -> Self:
        """Rows with just these columns loaded, and the primary key."""
        return self._apply("only", *map(path_of, columns))

    def defer(self, *columns: Any) -> Self:
        """Rows without these columns loaded."""
        return self._apply("defer", *map(path_of, columns))

    def for_update(
        self,
        *,
        nowait: bool = False,
        skip_locked: bool = False,
        of: Iterable[Any] = (),
        no_key: bool = False,
    ) -> Self:
        """Locks the rows until the transaction ends; Django's `select_for_update`."""
        tables = tuple(map(path_of, of))
        return self._apply(
            "select_for_update", nowait=nowait, skip_locked=skip_locked, of=tables, no_key=no_key
        )

    def union(self, *others: Any, all: bool = False) -> Self:
        """The rows of all queries, each once; with `all` as often as they come."""
        return self._combined("union", others, all=all)

    def intersection(self, *others: Any) -> Self:
        """The rows that all queries have."""
        return self._combined("intersection", others)

    def difference(self, *others: Any) -> Self:
        """The rows that the other queries do not have."""
        return self._combined("difference", others)

    def _combined(self, method: str, others: tuple[Any, ...], **options: Any) -> Self:
        querysets = [_source(other, self._session.alias) for other in others]
        combined = getattr(self.queryset, method)(*querysets, **options)
        return self._with(_given=combined, _limit=None, _offset=0, _recording=None, _why="step")

    @property
    def queryset(self) -> QuerySet[Any]:
        """The Django QuerySet that this query is."""
        return self._sliced(self._queryset, self._limit)

    def _sliced(self, queryset: QuerySet[Any], limit: int | None) -> QuerySet[Any]:
        if limit is None and not self._offset:
            return queryset
        return queryset[self._offset : None if limit is None else self._offset + limit]

    @property
    def query(self) -> Any:
        """Django's SQL query object; with it, `Exists(q)` and `Subquery(q)` take this query."""
        return self.queryset.query

    def resolve_expression(self, *args: Any, **kwargs: Any) -> Any:
        """As a subquery: in `in_(...)`, in `set(...)`, wherever a QuerySet may stand."""
        return cast(Any, self.queryset).resolve_expression(*args, **kwargs)

    def on(self, session: QuerySession) -> Self:
        """The same query, to be run in another session of the same database."""
        if session.alias == self._session.alias:
            return self._with(_session=session)
        return self._with(_session=session, _given=self._queryset, _recording=None)

    def sql(self) -> tuple[str, tuple[Any, ...]]:
        """The SQL text and its parameters, without running it.

        MySQL decides some texts by the server's version: there, before the first connection, use
        `await session.run_sync(query.sql)`.
        """
        query = cast(Any, self.queryset.query)
        text, params = query.get_compiler(self._session.alias, elide_empty=False).as_sql()
        return text, tuple(params)

    def generate_sql(self) -> tuple[str, tuple[Any, ...]]:
        """`sql`, under asyncqlio's name."""
        return self.sql()

    def why(self) -> str:
        """Whether awaiting the query runs on a plan, and if not, why, as a sentence."""
        return planned.why(self._recording, self._why, self._ending(ROWS, self._limit))

    async def run(self) -> Results[T]:
        """All rows, as awaiting the query gives them."""
        ending = self._ending(ROWS, self._limit)
        found: Results[T] = await self._planned(
            ending, self._recording, lambda: self._queryset, lambda: self._fetch(self.queryset)
        )
        return found

    def _ending(self, kind: str, limit: int | None) -> Ending:
        start = self._offset
        stop = None if limit is None else start + limit
        return Ending(kind, start, stop, self._columns if kind == ROWS else None)

    async def _planned(
        self,
        ending: Ending,
        recording: planned.Recording | None,
        queryset: Callable[[], QuerySet[Any]],
        django: Callable[[], Any],
    ) -> Any:
        """Runs the query on its plan, or Django's way.

        Args:
            ending: what is asked for.
            recording: its shape, if it has one.
            queryset: gives what is asked.
            django: runs it Django's way.
        """
        session = self._session
        if recording is None:
            planned.count(session.alias, self._why)
            return await session.run_sync(django)
        finish = Results if ending.kind == ROWS else _itself
        try:
            entry = recording.find(ending)
            if (plan := planned.proved(entry, recording)) is not None:
                rows = await session.fetch_plan(plan, recording.slots)
                return finish(plan.build(rows, session.alias))
        except Fallback as fallback:
            recording.cache.count(fallback.reason)
            return await session.run_sync(django)
        here = (recording, entry, ending, queryset, django, self._shaped, finish)
        return await session.run_sync(planned.run_here, *here)

    def __await__(self) -> Generator[Any, None, Results[T]]:
        return self.run().__await__()

    async def all(self) -> Results[T]:
        """All rows."""
        return await self.run()

    async def __aiter__(self) -> AsyncIterator[T]:
        for row in await self.run():
            yield row

    def _fetch(self, queryset: QuerySet[Any]) -> Results[T]:
        if getattr(queryset, "_result_cache", None) is not None:
            # Each time that it is awaited it asks anew.
            queryset = queryset.all()
        return self._shaped(list(queryset))

    def _shaped(self, found: list[Any]) -> Results[T]:
        if self._columns is not None:
            names = self._columns
            found = [Row(names or tuple(r), [r[n] for n in names or r]) for r in found]
        elif self._gives_model_rows:
            snapshots.remember(found)
            if self._late:
                loading.load(found, self._late, self._session.alias)
        return Results(found)

    @property
    def _gives_model_rows(self) -> bool:
        return issubclass(cast(Any, self._queryset)._iterable_class, ModelIterable)

    async def first(self) -> T | None:
        """The first row, by primary key where there is no order, or None; fetches one row."""
        limit, recording = 1 if self._limit is None else min(1, self._limit), self._recording
        if recording is not None and self._columns != () and not recording.is_ordered:
            recording = recording.by_pk()
        found = await self._planned(
            self._ending(ROWS, limit), recording, self._in_order, partial(self._fetch_first, limit)
        )
        return found[0] if found else None

    def _fetch_first(self, limit: int) -> Results[T]:
        return self._fetch(self._sliced(self._in_order(), limit))

    def _in_order(self) -> QuerySet[Any]:
        queryset = self._queryset
        query = queryset.query
        if not (queryset.ordered or query.combinator or query.is_sliced or self._is_grouped):
            queryset = queryset.order_by("pk")
        return queryset

    @property
    def _is_grouped(self) -> bool:
        return self._columns == () or bool(self._queryset.query.distinct_fields)

    async def one(self) -> T:
        """The only row.

        Raises:
            Model.DoesNotExist: there is none.
            Model.MultipleObjectsReturned: there are several.
        """
        row = await self.one_or_none()
        if row is None:
            model = self._queryset.model
            raise model.DoesNotExist(f"no {model.__name__} row matches the query")
        return row

    async def one_or_none(self) -> T | None:
        """The only row, or None.

        Raises:
            Model.MultipleObjectsReturned: there are several.
        """
        limit = 2 if self._limit is None else min(2, self._limit)
        found = await self._planned(
            self._ending(ROWS, limit),
            self._recording,
            lambda: self._queryset,
            lambda: self._fetch(self._sliced(self._queryset, limit)),
        )
        if len(found) > 1:
            model = self._queryset.model
            error: type[MultipleObjectsReturned] = model.MultipleObjectsReturned
            raise error(f"more than one {model.__name__} row matches the query; use first()")
        return found[0] if found else None

    async def scalar(self) -> Any:
        """The first column of the first row, or None; of a query for model rows, the row."""
        row = await self.first()
        return None if row is None else _first_value(row)

    async def scalars(self) -> list[Any]:
        """The first column of all rows; of a query for model rows, the rows."""
        return [_first_value(row) for row in await self.run()]

    async def count(self) -> int:
        """How many rows there are."""
        return await self._single(int, COUNT, lambda: self.queryset.count())

    async def exists(self) -> bool:
        """Whether there is a row."""
        return await self._single(bool, EXISTS, lambda: self.queryset.exists())

    async def _single(self, of: type[V], kind: str, django: Callable[[], V]) -> V:
        ending = self._ending(kind, self._limit)
        found = await self._planned(ending, self._recording, lambda: self._queryset, django)
        return cast(V, found)

    async def aggregate(self, *expressions: Any, **named: Any) -> dict[str, Any]:
        """Aggregates over all rows, by name."""
        return await self._session.run_sync(self.queryset.aggregate, *expressions, **named)

    async def in_bulk(
        self, ids: Iterable[Any] | None = None, *, field_name: Any = "pk"
    ) -> dict[Any, T]:
        """The rows by primary key, or by another unique column."""
        given, path = ids if ids is None else list(ids), path_of(field_name)
        if given and path == "pk" and self._is_plain and len(given) <= _ONE_BULK:
            return {cast(Any, row).pk: row for row in await self.where(pk__in=given)}

        def fetch() -> dict[Any, T]:
            found = self.queryset.in_bulk(given, field_name=path)
            snapshots.remember(found.values())
            return cast("dict[Any, T]", found)

        return await self._session.run_sync(fetch)

    @property
    def _is_plain(self) -> bool:
        """Whether it has a shape, and gives all rows of a model that its conditions choose."""
        whole = self._limit is None and not self._offset
        return whole and self._recording is not None and self._recording.gives_rows

    async def explain(self, *, format: str | None = None, **options: Any) -> str:
        """The database's plan for the query."""
        return await self._session.run_sync(self.queryset.explain, format=format, **options)

    def stream(self, chunk_size: int = 2000) -> AsyncGenerator[T, None]:
        """The rows one by one from a cursor on the server, `chunk_size` in memory at a time."""
        reader = Reader()
        return reader.reads(self._stream(chunk_size, reader))

    async def _stream(self, chunk_size: int, reader: Reader) -> AsyncGenerator[T, None]:
        async with self._session.one_connection() as held:
            iterator = await held.run(self.queryset.iterator, chunk_size)
            unread = self._session.unread(held).begin()
            try:
                while chunk := await held.run(reader.run, self._take, iterator, chunk_size):
                    for row in chunk:
                        unread.given()
                        try:
                            yield row
                        except GeneratorExit:
                            # Closed between two rows, where waiting is allowed, to end in order.
                            return
                        unread.taken()
            finally:
                unread.end()
                await _close(held, iterator)

    def _take(self, iterator: Iterator[Any], count: int) -> Results[T]:
        return self._shaped(list(islice(iterator, count)))


# Keys that Django asks for in one statement on every database.
_ONE_BULK: Final = 999


async def _close(held: OneConnection, iterator: Any) -> None:
    try:
        await held.run(iterator.close)
    except Error as exc:
        # What ended the transaction ended the cursor, and is what the caller has to hear of.
        logger.debug("closing the cursor of a stream failed: %s", exc)


def _itself(found: Any) -> Any:
    return found
