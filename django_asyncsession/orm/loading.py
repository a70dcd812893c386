"""How rows are read by their keys, read again, and completed with what they lack."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeVar

from django.core.exceptions import ObjectDoesNotExist
from django.db.models import (
    Model,
    Prefetch,
    prefetch_related_objects,
)
from django.db.models.constants import LOOKUP_SEP

from django_asyncsession.exceptions import RowNotFound

from .saving import _row_not_found
from .snapshots import _field_loaded, name_of, on, remember, snapshot_of

M = TypeVar("M", bound=Model)


def refresh(row: Model, fields: Collection[str] | None, using: str) -> None:
    """Reads the row again: its loaded fields, or all of a row that a row table made, or `fields`.

    Raises:
        RowNotFound: the row is not in the database.
    """
    snapshot = snapshot_of(row)
    names = None if fields is None else [str(getattr(f, "_path", f)) for f in fields]
    if names is None and snapshot is not None and snapshot.made:
        names = [f.attname for f in row._meta.concrete_fields]
    with _row_not_found(row, using):
        row.refresh_from_db(using=using, fields=names)
    row._state.adding = False
    remember([row], anew=True)


def load(rows: Sequence[Model], paths: Iterable[Any], using: str) -> None:
    """Loads relations (paths or `Prefetch`) and deferred fields, one query for each and all rows.

    Raises:
        AttributeError: the model has no such relation or field.
        RowNotFound: a row is not in the database any more.
    """
    lookups = [prefetch_lookup(p) for p in paths]
    by_model: dict[type[Model], list[Model]] = {}
    for row in rows:
        by_model.setdefault(type(row), []).append(row)
        # Relations are read where the row came from; a row made by hand came from nowhere.
        row._state.db = row._state.db or using
    for model, group in by_model.items():
        relations: list[Any] = []
        for path in lookups:
            relations += _load_own(model, group, path, using)
        prefetch_related_objects(group, *relations)
    remember(rows)


def prefetch_lookup(given: Any) -> Any:
    """What Django takes as a relation to load: a path, or a `Prefetch` with a QuerySet."""
    if not isinstance(given, Prefetch):
        return getattr(given, "_path", given)
    queryset: Any = given.queryset
    if not hasattr(queryset, "queryset"):
        return given
    return Prefetch(given.prefetch_through, queryset.queryset, to_attr=given.to_attr)


def _load_own(model: type[Model], group: list[Model], path: Any, using: str) -> list[Any]:
    """Loads the column that the path needs of the rows themselves; returns what is left to load."""
    first = str(getattr(path, "prefetch_through", path)).split(LOOKUP_SEP)[0]
    fields = {n: f for f in model._meta.concrete_fields for n in (f.name, f.attname)}
    if (field := fields.get(first)) is not None:
        _load_field(group, field, using)
        return [path] if field.is_relation and first == field.name else []
    if is_generic(model, path):
        field = next(f for f in model._meta.private_fields if f.name == first)
        return [_generic_prefetch(field, group, using), *([path] if path != first else [])]
    return [path]


def is_generic(model: type[Model], path: Any) -> bool:
    """Whether the path begins with a generic foreign key."""
    if not isinstance(path, str):
        return False
    first = path.split(LOOKUP_SEP)[0]
    return any(f.name == first and hasattr(f, "ct_field") for f in model._meta.private_fields)


def _generic_prefetch(field: Any, group: list[Model], using: str) -> Any:
    """A generic foreign key's rows, read from this database: by itself Django takes the default."""
    from django.contrib.contenttypes.prefetch import GenericPrefetch

    kind_field: Any = group[0]._meta.get_field(field.ct_field)
    keys = {getattr(row, kind_field.attname) for row in group}
    types = [field.get_content_type(id=key, using=using) for key in keys if key is not None]
    models = {kind.model_class() for kind in types} - {None}
    return GenericPrefetch(field.name, [on(m._base_manager, using) for m in models])


def _load_field(rows: Sequence[Model], field: Any, using: str) -> None:
    missing = [row for row in rows if field.attname not in row.__dict__]
    if not missing:
        return
    keys = {row.pk for row in missing}
    found = on(type(rows[0])._base_manager, using).filter(pk__in=keys)
    values = dict(found.values_list("pk", field.attname))
    for row in missing:
        if row.pk not in values:
            raise RowNotFound(f"{name_of(row)} is not in the database; it was deleted")
        row.__dict__[field.attname] = values[row.pk]
        _field_loaded(row, field.attname)


def get(model: type[M], pk: Any, using: str) -> M | None:
    """The row with this primary key, or None."""
    try:
        row: M = on(model._default_manager, using).get(pk=pk)
    except ObjectDoesNotExist:
        return None
    remember((row,))
    return row


def get_one(model: type[M], pk: Any, using: str) -> M:
    """The row with this primary key.

    Raises:
        Model.DoesNotExist: there is none.
    """
    row: M = on(model._default_manager, using).get(pk=pk)
    remember((row,))
    return row
