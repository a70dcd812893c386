"""Rows: which fields were set, what was loaded, what changed since, and how a row is written.

A row is a plain Django model instance. What this module knows about it is one `Snapshot` in its
`_state`, taken when a session loads or writes the row. Everything here is plain sync code that a
session runs in its bridge.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Final

import django
from django.db import DatabaseError, connections, transaction
from django.db.models import (
    DateField,
    Field,
    FileField,
    Model,
    TimeField,
)
from django.db.models.signals import post_save, pre_save

from django_asyncsession.exceptions import RowNotFound

from .snapshots import (
    Snapshot,
    Write,
    _key,
    _writable,
    after_write,
    before_write,
    changed,
    name_of,
    on,
    snapshot_of,
)

_UPDATE_RETURNS: Final = django.VERSION >= (6, 0)


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


def get_pk(row: Model, as_tuple: bool = True) -> Any:
    """The primary key of a row: a tuple, also when it has one part, or the plain value."""
    key = _key(row)
    return key if as_tuple or len(key) > 1 else key[0]


def to_dict(row: Model) -> dict[str, Any]:
    """The loaded columns of a row by name (`author_id` for a foreign key), as they are."""
    names = [f.attname for f in row._meta.concrete_fields]
    return {name: row.__dict__[name] for name in names if name in row.__dict__}
