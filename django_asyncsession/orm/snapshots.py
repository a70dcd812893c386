"""What a session knows of a row: which fields were set, what was loaded, what changed since.

A row is a plain Django model instance. All that is known about it is one `Snapshot` in its
`_state`, taken when a session loads or writes the row. Plain sync code that a session runs in its
bridge.
"""

from __future__ import annotations

import copy
import json
import pickle
import sys
from asyncio import get_running_loop
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from types import FrameType, MappingProxyType
from typing import Any, Final, TypeVar, cast

from django.core.files.base import File
from django.db.models import (
    DEFERRED,
    FileField,
    JSONField,
    Model,
)

from django_asyncsession.bridge import in_bridge
from django_asyncsession.exceptions import NotLoadedError
from django_asyncsession.plans.builders import Marks

try:
    from django.db.models.fetch_modes import (  # type: ignore[import-not-found,unused-ignore]
        FETCH_ONE,
        FetchMode,
    )
except ImportError:  # Django before 6.1 has no fetch modes
    FETCH_ONE, FetchMode = None, object  # type: ignore[assignment,misc]

M = TypeVar("M", bound=Model)


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

    @classmethod
    def loaded(cls, values: dict[str, Any]) -> Snapshot:
        """The snapshot of a row that was loaded with these values, none of which can change in
        place."""
        snapshot = cls.__new__(cls)
        snapshot.made, snapshot.undo = False, None
        snapshot.values, snapshot.frozen = values, _NOTHING
        return snapshot


class Loaded:
    """What a row was when it was loaded, in the form that costs least; it becomes a `Snapshot`
    when somebody asks."""

    __slots__ = ("names", "values")

    names: tuple[str, ...]
    values: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Loaded:
        return self

    def snapshot(self) -> Snapshot:
        """The same as a `Snapshot`."""
        return Snapshot.loaded(dict(zip(self.names, self.values, strict=True)))


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
    found = row._state.__dict__.get("asyncsession")
    if type(found) is Loaded:
        found = row._state.__dict__["asyncsession"] = found.snapshot()
    return cast("Snapshot | None", found)


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


def _key(row: Model) -> tuple[Any, ...]:
    return tuple(getattr(row, f.attname) for f in row._meta.pk_fields)


def name_of(row: Model) -> str:
    """The row in messages: its model and key, because its `__str__` may touch unloaded fields."""
    return f"{type(row).__name__}(pk={row.pk!r})"


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


#: What makes the rows of plans those of a session, as `remember` does.
MARKS: Final = Marks(
    loaded=Loaded,
    whole=Snapshot,
    is_mutable=lambda model: bool(_mutable(model)),
    fetch_mode=None if FETCH_ONE is None else SESSION_FETCH,
)


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
