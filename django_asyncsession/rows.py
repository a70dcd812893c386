"""Rows: which fields were set, what was loaded, what changed since, and how a row is written.

A row is a plain Django model instance. What this module knows about it is one `Snapshot` in its
`_state`, taken when a session loads or writes the row. Everything here is plain sync code that a
session runs in its bridge.
"""

from __future__ import annotations

import copy
import json
import pickle
import sys
from asyncio import get_running_loop
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from types import FrameType, MappingProxyType
from typing import Any, Final, TypeVar, cast

import django
from django.core.exceptions import ObjectDoesNotExist
from django.core.files.base import File
from django.db import DatabaseError, connections, transaction
from django.db.models import (
    DEFERRED,
    DateField,
    Field,
    FileField,
    JSONField,
    Model,
    Prefetch,
    TimeField,
    prefetch_related_objects,
)
from django.db.models.constants import LOOKUP_SEP
from django.db.models.signals import post_save, pre_save

from .bridge import in_bridge
from .exceptions import NotLoadedError, RowNotFound

try:
    from django.db.models.fetch_modes import (  # type: ignore[import-not-found,unused-ignore]
        FETCH_ONE,
        FetchMode,
    )
except ImportError:  # Django before 6.1 has no fetch modes
    FETCH_ONE, FetchMode = None, object  # type: ignore[assignment,misc]

M = TypeVar("M", bound=Model)

_UPDATE_RETURNS: Final = django.VERSION >= (6, 0)


class Write:
    """A write of rows that may yet be rolled back; the session calls `undo` when it was.

    Args:
        scope: the transaction and the block in it, as weak references.
    """

    __slots__ = ("scope", "undone")

    def __init__(self, scope: tuple[Any, Any] = (None, None)):
        self.scope = scope
        self.undone = False

    def undo(self) -> None:
        """The rows are as they were before, as far as the database is concerned."""
        self.undone = True


@dataclass(frozen=True, slots=True)
class Undo:
    """What to make of a row when its last write was rolled back."""

    write: Write
    snapshot: Snapshot | None
    adding: bool
    #: Names of the parts of the primary key that the database filled in.
    unset: tuple[str, ...]


class Snapshot:
    """What a row's fields were when a session last loaded or wrote it.

    It is never changed, only replaced, so copies of a row may share it. It does not travel with a
    pickled row, which comes back as one that came from elsewhere.
    """

    __slots__ = ("frozen", "made", "undo", "values")

    def __init__(self, row: Model, *, made: bool = False):
        #: Whether a row table made the row: what is missing in it was never set.
        self.made = made
        self.undo: Undo | None = None
        self.values: dict[str, Any] = row.__dict__.copy()
        del self.values["_state"]
        mutable = _mutable(type(row))
        self.frozen = _freeze(mutable, self.values) if mutable else _NOTHING

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Snapshot:
        return self

    def primary_key(self, row: Model) -> tuple[Any, ...]:
        """The key that the row had."""
        return tuple(self.values.get(f.attname) for f in row._meta.pk_fields)


_NOTHING: Final[Mapping[str, Any]] = MappingProxyType({})


def _freeze(
    mutable: Iterable[tuple[str, Callable[[Any], Any]]], values: Mapping[str, Any]
) -> Mapping[str, Any]:
    return {name: freeze(values[name]) for name, freeze in mutable if name in values}


@cache
def _mutable(model: type[Model]) -> tuple[tuple[str, Callable[[Any], Any]], ...]:
    """Fields whose values may change in place, each with the function that keeps what it was."""
    kinds = ((f.attname, _freezer(f)) for f in model._meta.concrete_fields)
    return tuple((name, freeze) for name, freeze in kinds if freeze is not None)


def _freezer(field: Any) -> Callable[[Any], Any] | None:
    if isinstance(field, JSONField):
        return partial(_json_text, field.encoder)
    if isinstance(field, FileField):
        return _file_name
    if type(field).__module__.startswith("django.db.models.fields"):
        return None
    return _copy


def _json_text(encoder: Any, value: Any) -> Any:
    if value is None:
        return None
    # As text, 1 and True differ, as they do in the column.
    try:
        return json.dumps(value, cls=encoder)
    except (TypeError, ValueError):
        return _copy(value)


def _file_name(value: Any) -> Any:
    if isinstance(value, File) and not getattr(value, "_committed", False):
        # A new file, which may have the name of the one that it replaces.
        return object()
    return str(value) if value else None


def _copy(value: Any) -> Any:
    try:
        return copy.deepcopy(value)
    except Exception:
        # Equal to nothing: the field counts as changed.
        return object()


def on(manager: Any, using: str) -> Any:
    """The manager's own QuerySet, with whatever the manager has put on it, on this database."""
    queryset = manager.db_manager(using).all()
    if queryset._db != using or queryset._result_cache is not None:
        # A manager that forgets its database, or a related one whose rows were prefetched.
        queryset = queryset.using(using)
    return queryset


def snapshot_of(row: Model) -> Snapshot | None:
    """The row's snapshot; None when the row came from elsewhere."""
    return cast("Snapshot | None", row._state.__dict__.get("asyncsession"))


def make(model: type[M], values: Mapping[str, Any]) -> M:
    """A new row with just these fields set and the others deferred.

    Raises:
        TypeError: the model has no such field.
    """
    given = dict(values)
    pk = model._meta.pk
    if "pk" in given and len(model._meta.pk_fields) == 1:
        given[pk.attname] = given.pop("pk")
    for field in model._meta.concrete_fields:
        # Django cannot defer a primary key.
        is_key = field.primary_key or field in model._meta.pk_fields
        if field.name not in given and field.attname not in given and not is_key:
            given[field.attname] = DEFERRED
    row = model(**given)
    _mark(row, Snapshot(row, made=True))
    return row


def _mark(row: Model, snapshot: Snapshot) -> None:
    state = cast(Any, row._state)
    state.asyncsession = snapshot
    if FETCH_ONE is not None and state.fetch_mode is FETCH_ONE:
        state.fetch_mode = SESSION_FETCH


def remember(rows: Iterable[Any], *, anew: bool = False) -> None:
    """Takes a snapshot of each row that has none, and of all rows that were loaded with it.

    With `anew` the given rows, just read again, get a new one.
    """
    stack = list(rows)
    if anew:
        for row in stack:
            before, snapshot = snapshot_of(row), Snapshot(row)
            snapshot.undo = before.undo if before is not None else None
            _mark(row, snapshot)
    seen = set()
    while stack:
        row = stack.pop()
        if id(row) in seen or not isinstance(row, Model):
            continue
        seen.add(id(row))
        state = row._state.__dict__
        if state.get("asyncsession") is None:
            state["asyncsession"] = Snapshot(row)
            if FETCH_ONE is not None and row._state.fetch_mode is FETCH_ONE:
                row._state.fetch_mode = SESSION_FETCH
        if state.get("fields_cache"):
            stack.extend(state["fields_cache"].values())
        if "_prefetched_objects_cache" in row.__dict__:
            stack.extend(_prefetched(row))


def _prefetched(row: Model) -> Iterator[Any]:
    for result in row.__dict__["_prefetched_objects_cache"].values():
        yield from result._result_cache or ()
    # Where a Prefetch with `to_attr` puts its rows.
    for value in row.__dict__.values():
        if isinstance(value, list) and value and isinstance(value[0], Model):
            yield from value


def before_write(row: Model, write: Write) -> Undo:
    """What will have to be known of the row, should this write be rolled back.

    A row whose last write was rolled back becomes what it was before that one.
    """
    settle(row)
    snapshot = snapshot_of(row)
    last = snapshot.undo if snapshot is not None else None
    if snapshot is not None and last is not None:
        if last.write.scope == write.scope:
            # They stand or fall together.
            return last
        if last.write.scope[0] != write.scope[0]:
            # That transaction is over, and was not rolled back.
            snapshot.undo = None
    keys = [f.attname for f in row._meta.concrete_fields if f.primary_key]
    keys += [f.attname for f in row._meta.pk_fields if f.attname not in keys]
    unset = tuple(name for name in keys if row.__dict__.get(name) is None)
    return Undo(write, snapshot, row._state.adding, unset)


def settle(row: Model) -> None:
    """Forgets the writes of the row that were rolled back: `add` has to write it again."""
    snapshot = snapshot_of(row)
    while snapshot is not None and snapshot.undo is not None and snapshot.undo.write.undone:
        undo = snapshot.undo
        row._state.adding = undo.adding
        row.__dict__.update(dict.fromkeys(undo.unset))
        snapshot = undo.snapshot
        cast(Any, row._state).asyncsession = snapshot


def after_write(rows: Sequence[Model], undos: Iterable[Undo]) -> None:
    """Takes a snapshot of rows that were just written."""
    for row, undo in zip(rows, undos, strict=True):
        snapshot = Snapshot(row)
        snapshot.undo = undo
        _mark(row, snapshot)
    remember(rows)


def changed(row: Model) -> list[str]:
    """Names of the fields that differ from the snapshot; all that are loaded when there is none."""
    snapshot = snapshot_of(row)
    return [f.name for f in _writable(row) if snapshot is None or _differs(snapshot, row, f)]


def _writable(row: Model) -> Iterator[Any]:
    for field in row._meta.concrete_fields:
        is_key = field.primary_key or field in row._meta.pk_fields
        if not is_key and not field.generated and field.attname in row.__dict__:
            yield field


def _differs(snapshot: Snapshot, row: Model, field: Any) -> bool:
    name = field.attname
    if name not in snapshot.values:
        return True
    now = row.__dict__[name]
    if hasattr(now, "resolve_expression"):
        return True
    if name in snapshot.frozen:
        freeze = dict(_mutable(type(row)))[name]
        if freeze is not _copy:
            return _unequal(freeze(now), snapshot.frozen[name])
        before = snapshot.frozen[name]
    else:
        before = snapshot.values[name]
    return now is not before and _unequal(now, before) and _is_written_otherwise(field, now, before)


def _is_written_otherwise(field: Any, now: Any, before: Any) -> bool:
    """Whether two values that are not equal are not the same in the column either: objects may be
    equal to themselves only, and "5" is written as 5."""
    try:
        now, before = field.get_prep_value(now), field.get_prep_value(before)
        if cast(Any, type(now)).__eq__ is object.__eq__:
            return pickle.dumps(now) != pickle.dumps(before)
        return _unequal(now, before)
    except Exception:
        # Saving it says what is wrong with it.
        return True


def _unequal(now: Any, before: Any) -> bool:
    try:
        return bool(now != before)
    except ValueError:
        # An array compares element by element.
        return pickle.dumps(now) != pickle.dumps(before)


def add(row: Model, using: str, write: Write) -> None:
    """Inserts a new row; updates the changed columns of a loaded one, or does nothing.

    A loaded row without a snapshot (from plain Django, `run_sync` or a pickle), one of another
    database and one whose primary key was changed are saved whole, as Django's `save()` does.

    Raises:
        RowNotFound: the loaded row is not in the database any more.
    """
    undo = before_write(row, write)
    snapshot = snapshot_of(row)
    if is_new(row):
        insert(row, using, write)
    elif snapshot is None or row._state.db != using or snapshot.primary_key(row) != _key(row):
        row.save(using=using)
        after_write([row], [undo])
    elif changed(row) or not _is_saved_by_django(type(row)):
        _save_changed(row, using)
        after_write([row], [undo])


def _is_saved_by_django(model: type[Model]) -> bool:
    """Whether saving a row of this model does nothing but write its columns."""
    return all(getattr(model, name) is method for name, method in _SAVING) and not any(
        signal.has_listeners(model) for signal in (pre_save, post_save)
    )


_SAVING: Final = [
    (name, getattr(Model, name)) for name in ("save", "save_base", "_save_table", "_save_parents")
]


def add_all(rows: Iterable[Model], using: str, write: Write) -> None:
    """`add` each row, all or none."""
    with all_or_none(using, write):
        for row in rows:
            add(row, using, write)


@contextmanager
def all_or_none(using: str, write: Write) -> Iterator[None]:
    """A transaction of its own where there is none; no savepoint in one that there is."""
    try:
        with transaction.atomic(using=using, savepoint=False):
            yield
    except BaseException:
        write.undo()
        raise


def is_new(row: Model) -> bool:
    """Whether the row is not in the database as far as Django knows."""
    return row._state.adding or None in _key(row)


def _key(row: Model) -> tuple[Any, ...]:
    return tuple(getattr(row, f.attname) for f in row._meta.pk_fields)


def insert(row: Model, using: str, write: Write) -> None:
    """Inserts the row through its own `save()`; keys and defaults are filled in."""
    undo = before_write(row, write)
    complete(row, using)
    row.save(using=using, force_insert=True)
    fetch_missing([row], using)
    after_write([row], [undo])


def complete(row: Model, using: str) -> None:
    """Gives the fields of a new row that were never set their defaults."""
    if row._state.adding:
        # Django took the default database when a related row was assigned, and would now refuse.
        row._state.db = using
    for field in row._meta.concrete_fields:
        if field.attname not in row.__dict__ and not field.generated:
            setattr(row, field.attname, field.get_default())


def fetch_missing(rows: Sequence[Model], using: str) -> None:
    """Reads what the database made and did not return: generated columns, defaults, expressions."""
    by_names: dict[tuple[str, ...], list[Model]] = {}
    for row in rows:
        names = tuple(f.attname for f in row._meta.concrete_fields if _unknown(row, f.attname))
        if names and None not in _key(row):
            by_names.setdefault(names, []).append(row)
    for names, group in by_names.items():
        by_key = {row.pk: row for row in group}
        there = on(type(group[0])._base_manager, using).filter(pk__in=list(by_key))
        for key, *values in there.values_list("pk", *names):
            by_key[key].__dict__.update(zip(names, values, strict=True))


def _unknown(row: Model, name: str) -> bool:
    return name not in row.__dict__ or hasattr(row.__dict__[name], "resolve_expression")


def _save_changed(row: Model, using: str) -> None:
    before = set(row.__dict__)
    # The model's save() and pre_save receivers may change more fields: which columns to write is
    # decided behind them, where Django writes each table.
    save_table = partial(type(row)._save_table, row)  # type: ignore[attr-defined]
    row.__dict__["_save_table"] = partial(_save_table, row, save_table)
    try:
        with _row_not_found(row, using):
            row.save(using=using)
    finally:
        row.__dict__.pop("_save_table", None)
    _reread(row, using, before)


def _save_table(
    row: Model,
    save_table: Callable[..., Any],
    raw: bool = False,
    cls: Any = None,
    force_insert: Any = False,
    force_update: bool = False,
    using: str | None = None,
    update_fields: Collection[str] | None = None,
) -> Any:
    if update_fields is None or row.get_deferred_fields():
        names = changed(row)
        update_fields = frozenset(names + moving_fields(row)) if names else None
        if update_fields is None:
            return True
    return save_table(raw, cls, force_insert, force_update, using, update_fields)


def moving_fields(row: Model) -> list[str]:
    """Names of the fields that take a new value at each write, such as `auto_now` ones."""
    return [f.name for f in row._meta.concrete_fields if _moves(f) and f.attname in row.__dict__]


def _moves(field: Any) -> bool:
    if type(field).pre_save in _OWN_PRE_SAVE:
        return bool(getattr(field, "auto_now", False))
    # A field that computes its value when it is saved.
    return not field.generated and not field.primary_key


_OWN_PRE_SAVE: Final = {
    Field.pre_save,
    FileField.pre_save,
    DateField.pre_save,
    TimeField.pre_save,
    django.db.models.DateTimeField.pre_save,
}


def _reread(row: Model, using: str, before: Collection[str]) -> None:
    """Reads the columns that the database computed in an UPDATE."""
    stale = [
        f.attname
        for f in row._meta.concrete_fields
        if f.attname in before
        and (_unknown(row, f.attname) or (f.generated and not _UPDATE_RETURNS))
    ]
    if stale:
        row.refresh_from_db(using=using, fields=stale)


@contextmanager
def _row_not_found(row: Model, using: str) -> Iterator[None]:
    """Turns Django's ways to say that no row was updated into `RowNotFound`."""
    connection = connections[using]
    was_broken = connection.needs_rollback
    model: Any = type(row)
    try:
        yield
    except (DatabaseError, model.DoesNotExist) as exc:
        missing = isinstance(exc, model.DoesNotExist) or "did not affect any rows" in str(exc)
        if not missing:
            raise
        if not row._meta.parents:
            # Nothing was written and nothing failed in the database: the transaction can go on.
            connection.needs_rollback = was_broken
        raise RowNotFound(
            f"{name_of(row)} is not in the database; it was deleted, or add() inserts it"
        ) from exc


def name_of(row: Model) -> str:
    """The row in messages: its model and key, because its `__str__` may touch unloaded fields."""
    return f"{type(row).__name__}(pk={row.pk!r})"


def merge(row: Model, fields: Collection[str] | None, using: str, write: Write) -> None:
    """Updates, by primary key, a row that was not loaded: the fields that were set, or `fields`.

    Raises:
        RowNotFound: there is no row with this key.
        TypeError: the row is a new model instance and `fields` is not given.
        ValueError: the row has no primary key.
    """
    undo = before_write(row, write)
    if None in _key(row):
        message = f"{type(row).__name__!r} row has no primary key; set it, or insert with add()"
        raise ValueError(message)
    snapshot = snapshot_of(row)
    names = _fields_to_merge(row, fields, snapshot)
    is_plain = _is_saved_by_django(type(row))
    if not names and snapshot is not None and not snapshot.made and is_plain:
        return
    before = set(row.__dict__)
    with _row_not_found(row, using):
        written = sorted({*names, *moving_fields(row)}) if names else []
        if not names:
            on(type(row)._base_manager, using).only("pk").get(pk=row.pk)
            row._state.adding, row._state.db = False, using
        if names or not is_plain:
            row.save(using=using, force_update=True, update_fields=written)
    _reread(row, using, before)
    after_write([row], [undo])


def _fields_to_merge(
    row: Model, fields: Collection[str] | None, snapshot: Snapshot | None
) -> list[str]:
    if fields is not None:
        return [row._meta.get_field(str(getattr(f, "_path", f))).name for f in fields]
    if snapshot is not None and not snapshot.made:
        return changed(row)
    if snapshot is None and row._state.adding and not row.get_deferred_fields():
        raise TypeError(
            f"which fields of {name_of(row)} were set is not known; name them with "
            f"merge(row, fields=[...]) or make the row with table({type(row).__name__})(...)"
        )
    return [f.name for f in _writable(row)]


def remove(row: Model, using: str) -> int:
    """Deletes the row with Django's on_delete rules; returns how many rows went, all told."""
    total, _ = row.delete(using=using)
    return total


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


def _field_loaded(row: Model, name: str) -> None:
    """A field that came later counts as unchanged from then on."""
    snapshot = snapshot_of(row)
    if snapshot is None or name in snapshot.values or name not in row.__dict__:
        return
    later = Snapshot(row, made=snapshot.made)
    later.undo = snapshot.undo
    later.values = {**snapshot.values, name: later.values[name]}
    kept = {name: later.frozen[name]} if name in later.frozen else {}
    later.frozen = {**snapshot.frozen, **kept}
    _mark(row, later)


class SessionFetch(FetchMode):  # type: ignore[misc,unused-ignore]
    """The fetch mode of session rows: loads in the bridge and in sync code, else names the fix."""

    __slots__ = ()

    def fetch(self, fetcher: Any, instance: Model) -> None:
        """Loads what `fetcher` stands for.

        Raises:
            NotLoadedError: in async code, where loading would block.
        """
        if _must_not_block():
            raise _not_loaded(instance, _fetched_name(fetcher)) from None
        fetcher.fetch_one(instance)
        _field_loaded(instance, _fetched_name(fetcher))

    def __reduce__(self) -> str:
        return "SESSION_FETCH"


SESSION_FETCH: Final = SessionFetch()


def _must_not_block() -> bool:
    if in_bridge():
        return False
    try:
        get_running_loop()
    except RuntimeError:
        return False
    return True


def _fetched_name(fetcher: Any) -> str:
    """The attribute behind one of Django's descriptors of fields and relations."""
    if (related := getattr(fetcher, "related", None)) is not None:
        return str(related.get_accessor_name())
    field = getattr(fetcher, "field", fetcher)
    deferred = type(fetcher).__module__ == "django.db.models.query_utils"
    return str(field.attname if deferred else field.name)


def _not_loaded(row: Model, name: str) -> NotLoadedError:
    return NotLoadedError(
        f"{name!r} of {name_of(row)} is not loaded and async code cannot wait for it here; "
        f'use `await session.load({type(row)._meta.model_name}, "{name}")` first'
    )


def blocked_access() -> NotLoadedError | None:
    """The error for a query that is about to block the loop on behalf of a row of a session.

    Django before 6.1 has no fetch modes, and no Django has one for related managers. So whoever
    refuses to block asks here whether one of the calling frames is Django loading something of such
    a row; None means it is not.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if (found := _loading(frame)) is not None:
            row, name = found
            if row._state.__dict__.get("asyncsession") is not None:
                return _not_loaded(row, name)
        frame = frame.f_back
    return None


def _loading(frame: FrameType) -> tuple[Model, str] | None:
    module = str(frame.f_globals.get("__name__", ""))
    if not module.startswith(("django.db.models", "django.contrib.contenttypes")):
        return None
    owner = frame.f_locals.get("self")
    if frame.f_code.co_name == "__get__" and isinstance(
        row := frame.f_locals.get("instance"), Model
    ):
        return row, _fetched_name(owner)
    if frame.f_code.co_name == "_fetch_all":
        row = getattr(owner, "_hints", {}).get("instance")
        if isinstance(row, Model) and (name := _manager_name(row, owner)):
            return row, name
    return None


def _manager_name(row: Model, queryset: Any) -> str | None:
    """The relation of the row that this query of a related manager reads, if only one can be it."""
    names = [
        f.get_accessor_name() if f.auto_created and not f.concrete else f.name
        for f in cast(Iterable[Any], row._meta.get_fields())
        if f.is_relation and f.related_model is queryset.model
        if f.many_to_many or f.one_to_many
    ]
    for field in queryset._known_related_objects:
        names = [n for n in names if n == field.remote_field.get_accessor_name()] or names
    return names[0] if len(names) == 1 else None


def get_pk(row: Model, as_tuple: bool = True) -> Any:
    """The primary key of a row: a tuple, also when it has one part, or the plain value."""
    key = _key(row)
    return key if as_tuple or len(key) > 1 else key[0]


def to_dict(row: Model) -> dict[str, Any]:
    """The loaded columns of a row by name (`author_id` for a foreign key), as they are."""
    names = [f.attname for f in row._meta.concrete_fields]
    return {name: row.__dict__[name] for name in names if name in row.__dict__}


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
