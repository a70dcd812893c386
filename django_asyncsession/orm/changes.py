"""Queries that change rows: INSERT, upsert, UPDATE and DELETE."""

from __future__ import annotations

from collections.abc import (
    Generator,
    Mapping,
)
from dataclasses import replace
from types import MappingProxyType
from typing import Any, Self, cast

from django.db.models import Model, Q, QuerySet

from django_asyncsession.exceptions import UnboundedQueryError

from . import writes
from .columns import Column, Computed, Setter
from .filtered import QuerySession, _Filtered, _Query
from .queries import RowSource, SelectQuery, _source
from .writes import Conflict, excluded, path_of


class InsertQuery(_Query):
    """An INSERT of any number of rows, one statement for each model; awaiting it gives the rows.

    It does not call `save()` and sends no signals, as `bulk_create`; `session.add` does.
    """

    _rows: tuple[Model, ...] = ()
    _conflict: Conflict | None = None
    _returning: tuple[Any, ...] | None = None

    @property
    def rows_to_insert(self) -> list[Model]:
        """The rows given so far."""
        return list(self._rows)

    def rows(self, *rows: Model) -> Self:
        """Also inserts these rows."""
        return self._with(_rows=(*self._rows, *rows))

    def add_row(self, row: Model) -> Self:
        """Also inserts this row."""
        return self.rows(row)

    def on_conflict(self, *columns: Any, where: Q | None = None) -> UpsertQuery:
        """What to do with rows that break the unique constraint on these columns.

        `where` is the condition of a partial unique index. MySQL cannot tell constraints apart:
        it takes columns only where no other constraint could be meant.
        """
        upsert = UpsertQuery(self._session)
        upsert.__dict__.update(self.__dict__)
        return upsert._with(_conflict=Conflict(tuple(map(path_of, columns)), where))

    def returning(self, *columns: Any) -> Self:
        """Gives `Row`s of these columns instead of the rows; without columns, fresh model rows."""
        return self._with(_returning=columns)

    async def run(self) -> list[Any]:
        """Inserts the rows; keys and defaults that the database made are filled in.

        Raises:
            NotSupportedError: the database has no such statement.
        """
        if not self._rows:
            return []
        return await self._session.run_write(
            writes.insert, self._rows, self._session.alias, self._conflict, self._returning
        )

    def __await__(self) -> Generator[Any, None, list[Any]]:
        return self.run().__await__()


class UpsertQuery(InsertQuery):
    """An INSERT that says what happens on a conflict: `update(...)` or `nothing()`."""

    def update(self, *columns: Any, where: Q | None = None) -> Self:
        """Updates these columns of the existing row to the new values, if `where` holds."""
        setters = tuple(c if isinstance(c, Setter) else Setter(c, excluded(c)) for c in columns)
        conflict = self._changed(updates=(*self._decision.updates, *setters), decided=True)
        return self._with(
            _conflict=conflict if where is None else replace(conflict, update_where=where)
        )

    def set(self, column: Any, value: Any = None) -> Self:
        """Sets a column of the existing row to a value or expression; see `excluded`."""
        return self.update(column if isinstance(column, Setter) else Setter(column, value))

    def nothing(self) -> Self:
        """Leaves the existing row as it is."""
        return self._with(_conflict=self._changed(updates=(), update_where=None, decided=True))

    @property
    def _decision(self) -> Conflict:
        return cast(Conflict, self._conflict)

    def _changed(self, **changes: Any) -> Conflict:
        return replace(self._decision, **changes)


class _Written(_Filtered):
    """An UPDATE or DELETE of the rows that conditions choose; without any it refuses to run."""

    _all_rows = False
    _returning: tuple[Any, ...] | None = None
    # Of the conditions, those that the manager has set.
    _conditions = 0

    def _start(self, source: Any) -> QuerySet[Any]:
        return _source(source, self._session.alias)

    def __call__(self, source: Any) -> Any:
        started = super().__call__(source)
        is_narrowed = isinstance(source, (QuerySet, SelectQuery)) or hasattr(source, "instance")
        count = 0 if is_narrowed else len(started._queryset.query.where.children)
        return started._with(_conditions=count)

    def table(self, source: Any) -> Self:
        """The query on this table, under asyncqlio's name."""
        return cast(Self, self(source))

    def all_rows(self) -> Self:
        """Says that every row of the table is meant."""
        return self._with(_all_rows=True)

    def returning(self, *columns: Any) -> Self:
        """Gives `Row`s of these columns, or model rows without columns, instead of the count."""
        return self._with(_returning=columns)

    def _check_bounded(self, verb: str) -> None:
        if not self._all_rows and len(self._queryset.query.where.children) <= self._conditions:
            name = self._queryset.model.__name__
            raise UnboundedQueryError(
                f"{verb} of {name!r} has no where(); add one, or say all_rows() to mean every row"
            )


_MISSING: Any = object()


class UpdateQuery(_Written):
    """An UPDATE in one statement, without `save()` and its signals; gives the count of rows."""

    _values: Mapping[str, Any] = MappingProxyType({})

    def __call__(self, source: RowSource[Any]) -> UpdateQuery:
        """The query on this model, row table, QuerySet or Manager."""
        return cast(UpdateQuery, super().__call__(source))

    def set(self, column: Any = None, value: Any = _MISSING, **named: Any) -> Self:
        """Sets a column to a value (None is NULL), an expression or a query; may be called again.

        Also takes `users.xp.incr(1)`, `users.xp + 1` and `xp=1`.
        """
        values = dict(self._values)
        if column is not None:
            setter = _setter(column, value)
            values[path_of(setter.column)] = setter.value
        values.update(named)
        return self._with(_values=values)

    def set_update(self, update: Setter) -> Self:
        """`set`, under asyncqlio's name."""
        return self.set(update)

    def rows(self, *rows: Model) -> RowUpdateQuery:
        """Updates these loaded rows, each to its own values, in as few statements as it takes."""
        return RowUpdateQuery(self._session, rows)

    async def run(self) -> Any:
        """Updates the rows.

        Raises:
            UnboundedQueryError: there is no `where`, and `all_rows()` was not called.
            ValueError: nothing was set.
            NotSupportedError: `returning` on a database without it.
        """
        self._check_bounded("update")
        if not self._values:
            raise ValueError(
                f"update of {self._queryset.model.__name__!r} sets nothing; call set()"
            )
        return await self._session.run_sync(self._update)

    def _update(self) -> Any:
        values = {self._field_name(path): value for path, value in self._values.items()}
        if self._returning is None:
            return self._queryset.update(**values)
        return writes.update_returning(self._queryset, values, self._returning)

    def _field_name(self, path: str) -> str:
        (field,) = writes.fields_of(self._queryset.model, [path])
        return str(field.name)


class RowUpdateQuery(_Query):
    """An UPDATE of loaded rows, each to its own values; gives the number of rows matched.

    It writes the columns that changed in any of them, without `save()` and its signals.
    """

    def __init__(self, session: QuerySession, rows: tuple[Model, ...]):
        super().__init__(session)
        self._rows = rows

    def rows(self, *rows: Model) -> RowUpdateQuery:
        """Also updates these rows."""
        return RowUpdateQuery(self._session, (*self._rows, *rows))

    def add_row(self, row: Model) -> RowUpdateQuery:
        """Also updates this row."""
        return self.rows(row)

    async def run(self) -> int:
        """Updates the rows; nothing is sent when none has changed."""
        return await self._session.run_write(writes.update_rows, self._rows, self._session.alias)


def _setter(column: Any, value: Any) -> Setter:
    if value is not _MISSING:
        return Setter(column, value)
    if isinstance(column, Setter):
        return column
    if isinstance(column, Computed) and isinstance(column.lhs, Column):
        return Setter(column.lhs, column)
    raise TypeError(
        f"set({column!r}) has no value; give one, or column.set(...) or column.incr(...)"
    )


class DeleteQuery(_Written):
    """A DELETE with Django's on_delete rules; gives the number of rows of the table that went, or
    -1 when a `delete()` of the QuerySet's own does not tell."""

    def __call__(self, source: RowSource[Any]) -> DeleteQuery:
        """The query on this model, row table, QuerySet or Manager."""
        return cast(DeleteQuery, super().__call__(source))

    async def run(self) -> Any:
        """Deletes the rows.

        Raises:
            UnboundedQueryError: there is no `where`, and `all_rows()` was not called.
            NotSupportedError: `returning` on a database without it.
        """
        self._check_bounded("delete")
        return await self._session.run_sync(self._delete)

    def _delete(self) -> Any:
        if self._returning is not None:
            return writes.delete_returning(self._queryset, self._returning)
        model = self._queryset.model
        # The QuerySet may have a delete() of its own, which need not tell what Django's does.
        result: Any = self._queryset.delete()
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping):
            total, by_model = result
            of_others = set(by_model) - {model._meta.label}
            return by_model.get(model._meta.label, 0 if of_others else total)
        return result if isinstance(result, int) else -1
