"""Shapes: what two queries have in common that differ in their values only.

A query is a path of steps, each a method with its names and the types of its values; the values
themselves are slots. None, True and False, numbers of rows and the lengths of lists change the SQL
text, so they are part of the shape.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from types import MappingProxyType
from typing import Any, Final
from uuid import UUID

from django.db.models import F, Q
from django.db.models.expressions import OrderBy

from .fallback import Fallback

#: A step, or a part of one: nested tuples of names, types and constants.
Key = tuple[Any, ...]

#: The longest list of values that has a shape.
LONGEST_LIST: Final = 1024
_LISTS: Final = frozenset({list, tuple, set, frozenset})
_AS_THEY_ARE: Final = frozenset({bool, type(None)})


def _text(value: str) -> None:
    if "\0" in value:
        raise Fallback("nul")


def _finite_decimal(value: Decimal) -> None:
    if not value.is_finite():
        raise Fallback("not_finite")


def _finite_float(value: float) -> None:
    if not math.isfinite(value):
        raise Fallback("not_finite")


def _aware(value: dt.datetime) -> None:
    if value.tzinfo is None:
        raise Fallback("naive")


def _zoneless(value: dt.time) -> None:
    if value.tzinfo is not None:
        raise Fallback("naive")


#: The types whose values are slots, each with what refuses those of its values that Django
#: refuses, warns of, or treats in their own way; None where it has none such.
FITS: Final[Mapping[type, Callable[[Any], None] | None]] = MappingProxyType(
    {
        int: None,
        str: _text,
        float: _finite_float,
        Decimal: _finite_decimal,
        dt.datetime: _aware,
        dt.date: None,
        dt.time: _zoneless,
        dt.timedelta: None,
        UUID: None,
    }
)


def fit(value: Any, kind: type) -> None:
    """Refuse a value that has no place in a slot of this type.

    Raises:
        Fallback: it is of another type, or one that Django treats in its own way.
    """
    if type(value) is not kind:
        raise Fallback("value_type")
    if (fits := FITS[kind]) is not None:
        fits(value)


def fits_slot(value: Any) -> None:
    """Refuse a value that has no place in any slot.

    Raises:
        Fallback: it is of no plain type, or one that Django treats in its own way.
    """
    kind = type(value)
    if kind not in FITS:
        raise Fallback("value_type")
    if (fits := FITS[kind]) is not None:
        fits(value)


# From what a user wrote to a key.


def filter_key(
    conditions: Iterable[Any],
    lookups: Mapping[str, Any],
    slots: list[Any],
    kinds: Collection[type] = (Q,),
) -> Key:
    """The conditions of one `filter` or `exclude`; their values are put at the end of `slots`.

    Args:
        kinds: the classes of conditions that are a `Q` and nothing else.

    Raises:
        Fallback: one of them is an expression, or a value of no plain type.
    """
    given = tuple([_condition_key(c, slots, kinds) for c in conditions])
    return given, tuple([(n, value_key(n, v, slots)) for n, v in lookups.items()])


def _condition_key(node: Any, slots: list[Any], kinds: Collection[type]) -> Key:
    if type(node) is tuple and len(node) == 2 and type(node[0]) is str:
        name, value = node
        return name, value_key(name, value, slots)
    if type(node) not in kinds:
        raise Fallback("expression")
    children = tuple([_condition_key(child, slots, kinds) for child in node.children])
    return "Q", node.connector, node.negated, children


def value_key(name: str, value: Any, slots: list[Any]) -> Any:
    """What of a value is part of the shape: its type when it is a slot, else the value."""
    kind = type(value)
    if kind in FITS:
        # In place: on the way of each query.
        if (fits := FITS[kind]) is not None:
            fits(value)
        slots.append(value)
        return kind
    if kind in _AS_THEY_ARE:
        return "is", value
    if kind in _LISTS:
        if name.endswith("__in"):
            return _list_key(value, slots)
        if name.endswith("__range") and len(value) == 2 and kind in (list, tuple):
            keys = tuple([value_key("", v, slots) for v in value])
            if all(type(key) is type for key in keys):
                return "range", keys
            raise Fallback("list")
    raise Fallback("expression" if hasattr(value, "resolve_expression") else "value_type")


def _list_key(values: Iterable[Any], slots: list[Any]) -> Key:
    # As Django does, each value once.
    try:
        once = list(dict.fromkeys(values))
    except TypeError:
        raise Fallback("value_type") from None
    if not 0 < len(once) <= LONGEST_LIST:
        raise Fallback("list")
    kind = type(once[0])
    if kind not in FITS:
        raise Fallback("list" if kind is type(None) else "value_type")
    fits = FITS[kind]
    for value in once:
        if type(value) is not kind:
            raise Fallback("list")
        if fits is not None:
            fits(value)
    length = 1 << (len(once) - 1).bit_length()
    slots += once
    slots += once[-1:] * (length - len(once))
    return "in", kind, length


def order_key(columns: Iterable[Any], path_of: Callable[[Any], str | None]) -> Key:
    """The columns of one `order_by`: names, and columns that go up or down.

    Args:
        path_of: gives the lookup path of a column; None when no path can name it.

    Raises:
        Fallback: one of them is another expression.
    """
    return tuple([_column_order(column, path_of) for column in columns])


def _column_order(column: Any, path_of: Callable[[Any], str | None]) -> Any:
    if type(column) is str:
        return column
    if type(column) is OrderBy:
        if (path := path_of(column.expression)) is not None:
            return path, column.descending, column.nulls_first, column.nulls_last
    elif (path := path_of(column)) is not None:
        return path, False, None, None
    raise Fallback("expression")


def names_key(names: Iterable[Any]) -> Key:
    """The names of one `only`, `values` and the like.

    Raises:
        Fallback: one of them is an expression.
    """
    found = tuple(names)
    if any(type(name) is not str for name in found):
        raise Fallback("expression")
    return found


# From a key to what Django takes.


Step = tuple[str, tuple[Any, ...], dict[str, Any]]


def steps(path: Iterable[Key], values: Iterable[Any]) -> Iterator[Step]:
    """The methods of a path with their arguments, and these values in the slots."""
    left = iter(values)
    for method, *names in path:
        if method in ("filter", "exclude"):
            conditions, lookups = names
            given = tuple([_condition(key, left) for key in conditions])
            yield method, given, dict(_lookups(lookups, left))
        elif method == "order_by":
            yield method, tuple(map(_order, names[0])), {}
        elif method == "values_list":
            yield method, names[0], {"flat": names[1], "named": names[2]}
        else:
            yield method, names[0], {}


def replay(queryset: Any, path: Iterable[Key], values: Iterable[Any]) -> Any:
    """The QuerySet with the steps of the path done to it, and these values in their slots."""
    for method, args, kwargs in steps(path, values):
        queryset = getattr(queryset, method)(*args, **kwargs)
    return queryset


def _condition(key: Key, left: Iterator[Any]) -> Any:
    if len(key) == 2:
        return key[0], _value(key[1], left)
    _, connector, negated, children = key
    return Q.create([_condition(child, left) for child in children], connector, negated)


def _lookups(lookups: Key, left: Iterator[Any]) -> Iterator[tuple[str, Any]]:
    for name, key in lookups:
        yield name, _value(key, left)


def _value(key: Any, left: Iterator[Any]) -> Any:
    if type(key) is type:
        return next(left)
    if key[0] == "is":
        return key[1]
    count = key[2] if key[0] == "in" else 2
    return [next(left) for _ in range(count)]


def _order(key: Any) -> Any:
    if type(key) is str:
        return key
    path, descending, first, last = key
    return OrderBy(F(path), descending=descending, nulls_first=first, nulls_last=last)


def slot_kinds(path: Iterable[Key]) -> list[tuple[type, int]]:
    """The slots of a path in order: their type, and how many there are of it one after another;
    more than one are the values of one list."""
    found: list[tuple[type, int]] = []
    for method, *names in path:
        if method in ("filter", "exclude"):
            for condition in (*names[0], *names[1]):
                _slots_of(condition, found)
    return found


def _slots_of(key: Key, found: list[tuple[type, int]]) -> None:
    if len(key) == 4:
        for child in key[3]:
            _slots_of(child, found)
        return
    kind = key[1]
    if type(kind) is type:
        found.append((kind, 1))
    elif kind[0] == "in":
        found.append((kind[1], kind[2]))
    elif kind[0] == "range":
        found += [(each, 1) for each in kind[1]]


def is_padded(kinds: Iterable[tuple[type, int]], values: Sequence[Any]) -> bool:
    """Whether a list of these values was filled up by repeating its last one."""
    at = 0
    for _, count in kinds:
        if count > 1 and values[at + count - 1] == values[at + count - 2]:
            return True
        at += count
    return False


# The trie.


class Shape:
    """The end of a path of steps; the same steps end in the same shape.

    Args:
        parent: the shape without the last step; None at the root, where a model stands alone.
        step: the last step.
    """

    __slots__ = ("children", "ends", "good", "parent", "step")

    def __init__(self, parent: Shape | None = None, step: Key = ()) -> None:
        self.parent, self.step = parent, step
        self.children: dict[Key, Shape] = {}
        #: What is known of queries that end here, by what they ask for in the end.
        self.ends: dict[Key, Any] = {}
        #: Whether a plan shows that Django takes the steps so far with any values.
        self.good = parent is None

    def __repr__(self) -> str:
        return f"<Shape of {len(self.path())} steps, {len(self.ends)} ends>"

    def path(self) -> tuple[Key, ...]:
        """The steps from the root to here."""
        steps = []
        shape: Shape = self
        while shape.parent is not None:
            steps.append(shape.step)
            shape = shape.parent
        return tuple(reversed(steps))

    def at(self, path: Iterable[Key]) -> Shape | None:
        """The shape at the end of a path that begins here, if there is one."""
        shape: Shape | None = self
        for step in path:
            if shape is None:
                return None
            shape = shape.children.get(step)
        return shape

    def grow(self, path: Iterable[Key]) -> Shape:
        """As `at`; what is missing is made."""
        shape = self
        for step in path:
            found = shape.children.get(step)
            if found is None:
                found = shape.children[step] = Shape(shape, step)
            shape = found
        return shape

    def approve(self) -> None:
        """A plan was made that goes this way."""
        shape: Shape | None = self
        while shape is not None and not shape.good:
            shape.good = True
            shape = shape.parent

    def prune(self) -> None:
        """Forget this shape, and those before it that lead nowhere else."""
        shape = self
        while shape.parent is not None and not shape.children and not shape.ends:
            shape.good = False
            shape.parent.children.pop(shape.step, None)
            shape = shape.parent
