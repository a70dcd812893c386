"""Whether what a plan gives is what Django would have given."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any

from django.db.models import Model

from .plan import Compiled, Ending, Plan, compiled

_MARK = "asyncsession"


def difference_of_texts(plan: Plan, values: Sequence[Any], django: Compiled) -> str | None:
    """What Django's compiler makes differently, in words; None: nothing.

    Raises:
        Whatever preparing a value raises.
    """
    if plan.sql != django.sql:
        return f"Django's text is {django.sql!r}"
    mine = plan.params(values, django.compiler.connection)
    if not _same_values(mine, django.params):
        return f"Django's parameters are {django.params!r} and the plan's {mine!r}"
    return None


def built_by_django(django: Compiled, rows: Sequence[Any]) -> list[Any]:
    """What Django makes of rows that a cursor gave, without asking the database."""
    queryset, compiler = django.queryset._chain(), django.compiler
    compiler.execute_sql = lambda *args, **kwargs: iter([list(rows)])
    queryset.query.get_compiler = lambda *args, **kwargs: compiler
    return list(queryset)


def single_by_django(django: Compiled, ending: Ending, rows: Sequence[Any]) -> Any:
    """The number, or whether there is one, that Django reads from such a row."""
    if ending.kind == "exists":
        return bool(rows)
    selected = list(django.compiler.query.annotation_select.values())
    converters = django.compiler.get_converters(selected)
    return next(iter(django.compiler.apply_converters(rows, converters)))[0]


def difference(mine: Any, theirs: Any) -> str | None:
    """What differs between two results, in words; None: nothing that anybody could tell.

    Instances are the same with the same attributes in the same order, with the same state, down to
    the relations that they hold.
    """
    if type(mine) is not type(theirs):
        return f"{mine!r} is a {type(mine).__name__}, Django's a {type(theirs).__name__}"
    if not isinstance(mine, list):
        return None if _same(mine, theirs) else f"{mine!r} is {theirs!r} by Django"
    if len(mine) != len(theirs):
        return f"there are {len(mine)} rows, and {len(theirs)} by Django"
    seen: set[tuple[int, int]] = set()
    for one, other in zip(mine, theirs, strict=True):
        if isinstance(one, Model) and isinstance(other, Model):
            if (found := _between_rows(one, other, seen)) is not None:
                return found
        elif not _same(one, other):
            return f"{one!r} is {other!r} by Django"
    return None


def _between_rows(mine: Model, theirs: Model, seen: set[tuple[int, int]]) -> str | None:
    pair = id(mine), id(theirs)
    if pair in seen:
        return None
    seen.add(pair)
    name = type(mine).__name__
    if type(mine) is not type(theirs):
        return f"a row is a {name}, Django's a {type(theirs).__name__}"
    found = _between_attributes(name, mine.__dict__, theirs.__dict__, "_state")
    state, other = mine._state.__dict__, theirs._state.__dict__
    if found is None and type(mine._state) is not type(theirs._state):
        found = f"the state of a {name} is of another class"
    found = found or _between_attributes(
        f"the state of {name}", state, other, "fields_cache", _MARK
    )
    return found or _between_marks(name, state, other) or _between_caches(state, other, seen)


def _between_attributes(
    name: str, mine: dict[str, Any], theirs: dict[str, Any], *apart: str
) -> str | None:
    if list(mine) != list(theirs):
        return f"{name} has {list(mine)}, and {list(theirs)} by Django"
    for key, value in mine.items():
        if key not in apart and not _same(value, theirs[key]):
            return f"{key!r} of {name} is {value!r}, and {theirs[key]!r} by Django"
    return None


def _between_marks(name: str, mine: dict[str, Any], theirs: dict[str, Any]) -> str | None:
    one, other = mine.get(_MARK), theirs.get(_MARK)
    if one is not None and hasattr(one, "snapshot"):
        one = one.snapshot()
    if (one is None) is not (other is None):
        return f"one {name} is a session's, the other is not"
    if one is None or other is None:
        return None
    return _between_attributes(f"the snapshot of {name}", one.values, other.values)


def _between_caches(
    mine: dict[str, Any], theirs: dict[str, Any], seen: set[tuple[int, int]]
) -> str | None:
    cached, other = mine.get("fields_cache", {}), theirs.get("fields_cache", {})
    if list(cached) != list(other):
        return f"the relations {list(cached)} are there, and {list(other)} by Django"
    for name, row in cached.items():
        if (row is None) is not (other[name] is None):
            return f"the relation {name!r} is {row!r}, and {other[name]!r} by Django"
        if row is not None and (found := _between_rows(row, other[name], seen)) is not None:
            return found
    return None


def _same_values(mine: Sequence[Any], theirs: Sequence[Any]) -> bool:
    return len(mine) == len(theirs) and all(map(_same, mine, theirs))


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        # Each `values_list(named=True)` may make its class.
        fields = getattr(one, "_fields", None)
        if fields is None or fields != getattr(other, "_fields", None):
            return False
        return _same_values(one, other)
    if type(one) is dict:
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if type(one) in (list, tuple):
        return _same_values(one, other)
    try:
        return bool(one == other) or pickle.dumps(one) == pickle.dumps(other)
    except Exception:
        return repr(one) == repr(other)


__all__ = [
    "Compiled",
    "built_by_django",
    "compiled",
    "difference",
    "difference_of_texts",
    "single_by_django",
]
