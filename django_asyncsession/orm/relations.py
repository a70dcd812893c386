"""The relations of one row, to read and to change."""

from __future__ import annotations

from collections.abc import (
    AsyncIterator,
    Generator,
)
from typing import Any

from django.db.models import Model

from . import loading, saving, snapshots
from .filtered import QuerySession
from .queries import SelectQuery
from .tables import table


class Related:
    """The relations of one row: `await session.related(book).tags.add(tag)`."""

    def __init__(self, session: QuerySession, row: Model):
        self._session = session
        self._row = row

    def __getattr__(self, name: str) -> RelatedRows:
        if name.startswith("__"):
            raise AttributeError(name)
        return RelatedRows(self._session, self._row, name)


class RelatedRows:
    """The rows at the other end of a relation; awaiting it gives them, or the only one."""

    def __init__(self, session: QuerySession, row: Model, name: str):
        self._session, self._row, self._name = session, row, name
        relationships = table(type(row)).relationships
        if name not in relationships:
            known = ", ".join(relationships)
            raise AttributeError(f"{type(row).__name__!r} has no relation {name!r}; it has {known}")
        self._many = relationships[name].many

    def __repr__(self) -> str:
        return f"<RelatedRows {self._name!r} of {snapshots.name_of(self._row)}>"

    @property
    def _manager(self) -> Any:
        if not self._many:
            raise TypeError(f"{self!r} is one row; await it, or call set(row)")
        return getattr(self._row, self._name)

    def select(self) -> SelectQuery[Any]:
        """A query on the related rows, to filter and order them."""
        return SelectQuery[Any](self._session)(self._manager)

    def __await__(self) -> Generator[Any, None, Any]:
        return (self.all() if self._many else self._one()).__await__()

    async def __aiter__(self) -> AsyncIterator[Any]:
        for row in await self.all():
            yield row

    async def _one(self) -> Any:
        def fetch() -> Any:
            loading.load([self._row], [self._name], self._session.alias)
            return getattr(self._row, self._name, None)

        return await self._session.run_sync(fetch)

    async def all(self) -> list[Any]:
        """All related rows, as they are in the database now."""
        return await self.select().all()

    async def first(self) -> Any:
        """The first related row, or None."""
        return await self.select().first()

    async def count(self) -> int:
        """How many related rows there are."""
        return await self.select().count()

    async def add(self, *related: Any, **options: Any) -> None:
        """Relates these rows, or keys, as well."""
        await self._session.run_sync(lambda: self._manager.add(*related, **options))

    async def remove(self, *related: Any, **options: Any) -> None:
        """Ends the relation to these rows."""
        await self._session.run_sync(lambda: self._manager.remove(*related, **options))

    async def clear(self, **options: Any) -> None:
        """Ends the relation to all rows."""
        await self._session.run_sync(lambda: self._manager.clear(**options))

    async def create(self, **values: Any) -> Any:
        """Inserts a related row."""
        return await self._session.run_sync(lambda: self._manager.create(**values))

    async def set(self, related: Any, **options: Any) -> None:
        """Relates exactly these rows; of a foreign key this one row, which is written at once."""
        if self._many:
            await self._session.run_sync(lambda: self._manager.set(related, **options))
        else:
            await self._session.run_write(self._set_one, related)

    def _set_one(self, related: Any, write: snapshots.Write) -> None:
        setattr(self._row, self._name, related)
        field: Any = self._row._meta.get_field(self._name)
        written = related if field.auto_created and not field.concrete else self._row
        saving.add(written, self._session.alias, write)
