"""How rows are read by their keys, read again, and completed with what they lack."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from typing import Any, Generic, TypeVar, cast

from django.core.exceptions import ObjectDoesNotExist
from django.db.models import (
    Model,
    Prefetch,
    prefetch_related_objects,
)
from django.db.models.constants import LOOKUP_SEP

from django_asyncsession.exceptions import RowNotFound
from django_asyncsession.plans.cache import Entry
from django_asyncsession.plans.cache import of as cache_of
from django_asyncsession.plans.fallback import Fallback
from django_asyncsession.plans.plan import Plan

from . import planned
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


class Asked(Generic[M]):
    """One row that is asked for by its primary key: with its plan, or without.

    Args:
        model: whose row it is.
        pk: the key.
        using: the alias.
    """

    __slots__ = ("_alias", "_entry", "_model", "_pk", "_recording", "plan")

    def __init__(self, model: type[M], pk: Any, using: str):
        self._model: Any = model
        self._pk, self._alias = pk, using
        #: The plan to run; None: `run` is to be called in the bridge.
        self.plan: Plan | None = None
        self._recording: planned.Recording | None = None
        self._entry: Entry | None = None
        try:
            self.plan = cache_of(using).by_key(model, pk)
            if self.plan is None:
                self._find()
        except Fallback as fallback:
            self.refuse(fallback)

    def _find(self) -> None:
        recording = planned.by_key(self._model, self._pk, self._alias)
        self._entry = entry = recording.find(planned.ONE_ROW)
        self._recording, self.plan = recording, planned.proved(entry, recording)
        if entry is not None and self.plan is not None:
            recording.cache.keep_by_key(self._model, type(self._pk), entry)

    def refuse(self, fallback: Fallback) -> None:
        """It has to be read Django's way."""
        self._recording = None
        planned.count(self._alias, fallback.reason)

    def row(self, rows: Sequence[Any]) -> M | None:
        """The row that the plan has read, or None.

        Raises:
            Fallback: there are several, which Django has an error for.
        """
        if not rows:
            return None
        if len(rows) > 1 or self.plan is None:
            raise Fallback("several")
        return cast(M, self.plan.build(rows, self._alias)[0])

    def only_row(self, rows: Sequence[Any]) -> M:
        """The row that the plan has read.

        Raises:
            Model.DoesNotExist: there is none.
            Fallback: there are several, which Django has an error for.
        """
        return self._there(self.row(rows))

    def _there(self, row: M | None) -> M:
        if row is None:
            name = self._model._meta.object_name
            raise self._model.DoesNotExist(f"{name} matching query does not exist.")
        return row

    def run(self, read: Callable[[type[Model], Any, str], Any]) -> Any:
        """Read the row with `get` or `get_one`, or with a plan that is to be proved; called in the
        bridge."""
        django: Callable[[], Any] = partial(read, self._model, self._pk, self._alias)
        if (recording := self._recording) is None:
            return django()

        def finish(found: list[Any]) -> Any:
            if len(found) > 1:
                return django()
            row = found[0] if found else None
            return self._there(row) if read is get_one else row

        return planned.run_here(
            recording,
            self._entry,
            planned.ONE_ROW,
            recording.queryset,
            django,
            _remembered,
            finish,
        )


def _remembered(rows: list[Any]) -> list[Any]:
    remember(rows)
    return rows


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
