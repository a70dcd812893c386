"""Row tables: a Django model seen as a table with columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar, cast

from django.apps import apps
from django.db.models import Model

from . import snapshots
from .columns import Column, _path_name, column

M = TypeVar("M", bound=Model)


@dataclass(frozen=True, slots=True, eq=False)
class Relationship:
    """A relation of a model in either direction, under the name it has on a row."""

    name: str
    #: The model at the other end; None for a generic foreign key.
    model: type[Model] | None
    #: Whether a row has several of them.
    many: bool
    #: Whether the other model declares it.
    reverse: bool
    #: What conditions use (`books.author`); None for a generic foreign key.
    column: Column | None
    #: Django's field or relation.
    field: Any


class RowTable(Generic[M]):
    """A model as a table: its columns are attributes, and calling it makes a row.

    Columns come before the names below, as a model may have a field `name` or `columns`;
    `table[...]` and `get_column` find columns only. The model is looked up at first use, so a
    table may be made, by a label such as "shop.Book", before the apps are ready.
    """

    if TYPE_CHECKING:
        #: The model.
        model: type[M]
        #: The columns by name, in the order of the model's fields.
        columns: Mapping[str, Column]
        #: The columns of the primary key: one, or several of a composite key.
        primary_key: tuple[Column, ...]
        #: The relations by the names they have on a row, in both directions.
        relationships: Mapping[str, Relationship]

    def __init__(self, model: type[M] | str):
        self._given = model

    def __repr__(self) -> str:
        label = self._given if isinstance(self._given, str) else self._given._meta.label
        return f"<RowTable {label}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return table, (self._given,)

    def __call__(self, **values: Any) -> M:
        """A row with just these fields set; `add` fills in the others, `merge` leaves them alone.

        Raises:
            TypeError: the model has no such field.
        """
        return snapshots.make(self._model, values)

    @property
    def _model(self) -> type[M]:
        if isinstance(self._given, str):
            return cast(type[M], apps.get_model(self._given))
        return self._given

    def __getitem__(self, name: str) -> Column:
        """A column by its name, or by a path such as `author__name`."""
        return column(self._model, tuple(name.split("__")))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        path_name = _path_name(self._model, name)
        if path_name is None and name in _ATTRIBUTES:
            return _ATTRIBUTES[name](self)
        found = column(self._model, (path_name or name,))
        # Next time it is found without coming here.
        self.__dict__[name] = found
        return found

    def __dir__(self) -> list[str]:
        fields = [f.name for f in self._model._meta.get_fields()]
        return sorted({*super().__dir__(), *_ATTRIBUTES, *fields})


def _columns(of: RowTable[Any]) -> Mapping[str, Column]:
    return MappingProxyType(
        {f.name: column(of._model, (f.name,)) for f in of._model._meta.concrete_fields}
    )


def _primary_key(of: RowTable[Any]) -> tuple[Column, ...]:
    return tuple(column(of._model, (f.name,)) for f in of._model._meta.pk_fields)


def _relationships(of: RowTable[Any]) -> Mapping[str, Relationship]:
    return MappingProxyType({r.name: r for r in _each_relationship(of._model)})


def _each_relationship(model: type[Model]) -> Iterator[Relationship]:
    for field in model._meta.get_fields():
        name = field.name
        if field.auto_created and not field.concrete:
            # A reverse relation.
            name = cast(Any, field).get_accessor_name()
        if field.is_relation:
            model_there = field.related_model
            several = bool(field.many_to_many or field.one_to_many)
            here = column(model, (field.name,)) if model_there else None
            yield Relationship(name, model_there, several, field.auto_created, here, field)


def _get_column(of: RowTable[Any]) -> Any:
    return of.__getitem__


def _get_relationship(of: RowTable[Any]) -> Any:
    return _relationships(of).__getitem__


_ATTRIBUTES: Final[Mapping[str, Any]] = {
    "model": lambda of: of._model,
    "name": lambda of: of._model._meta.db_table,
    "columns": _columns,
    "primary_key": _primary_key,
    "relationships": _relationships,
    "get_column": _get_column,
    "get_relationship": _get_relationship,
    "iter_columns": lambda of: lambda: iter(_columns(of).values()),
    "iter_relationships": lambda of: lambda: iter(_relationships(of).values()),
}


def table(model: type[M] | RowTable[M] | str) -> RowTable[M]:
    """The row table of a model class, of a label such as "shop.Book", or of a row table: itself."""
    return model if isinstance(model, RowTable) else _table(model)


@cache
def _table(model: Any) -> RowTable[Any]:
    return RowTable(model)


def model_of(source: type[M] | RowTable[M]) -> type[M]:
    """The model of a row table; a model is its own.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(source, RowTable):
        return source._model
    if isinstance(source, type) and issubclass(source, Model):
        return source
    raise TypeError(f"{source!r} is neither a Django model nor a row table; use table(Model)")
