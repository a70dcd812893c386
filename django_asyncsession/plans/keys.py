"""Django's own queries, recognised by what they are made of.

Code that knows nothing of plans builds a QuerySet with Django's methods. What comes out is a
`Query` of tables, joins, conditions and the rest: its structure is the key of a plan, and the
values of its conditions, which Django has prepared already, are the slots.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Final, NamedTuple

from django.db.models import F, QuerySet
from django.db.models.expressions import Col, OrderBy
from django.db.models.sql.datastructures import BaseTable, Join
from django.db.models.sql.query import Query
from django.db.models.sql.where import WhereNode

from . import operands
from .fallback import Fallback
from .plan import Compiled, Ending, compiled
from .shapes import LONGEST_LIST, Key, fits_slot


class Structure(NamedTuple):
    """A query without its values, and its values."""

    #: What is the same of all queries that a plan serves.
    key: Key
    #: The types of the slots, and how many there are of each one after another.
    kinds: tuple[tuple[type, int], ...]
    values: tuple[Any, ...]


# What each query has, whatever was done to it; it is looked at, or says nothing of the SQL.
_ALWAYS: Final = frozenset(Query(None).__dict__)
# What methods of Django's set, and is part of the key as it is.
_AS_IT_IS: Final = (
    "low_mark",
    "high_mark",
    "default_ordering",
    "standard_ordering",
    "default_cols",
    "distinct",
    "values_select",
    "select_for_update",
    "select_for_update_nowait",
    "select_for_update_skip_locked",
    "select_for_update_of",
    "select_for_no_key_update",
    "max_depth",
)
_LOOKED_AT: Final = frozenset(
    {"deferred_loading", "order_by", "select", "select_related", "selected"}
)
# What Django keeps for itself while it builds, or makes anew; and what is about annotations and
# extra columns, which a query with a key has not.
_NOTES: Final = frozenset(
    {"_annotation_select_cache", "_extra_select_cache", "_lookup_joins", "base_table"}
    | {"filter_is_sticky", "annotation_select_mask", "extra_select_mask"}
)
_KNOWN: Final = _ALWAYS | frozenset(_AS_IT_IS) | _LOOKED_AT | _NOTES
# What has to be as it is in a query to which nothing was done.
_EMPTY: Final = ("annotations", "extra", "_filtered_relations", "external_aliases")


def structure_of(query: Query) -> Structure:
    """The structure of an ordinary SELECT of Django's.

    Raises:
        Fallback: it has something that plans do not know, or a value of no plain type.
    """
    have = query.__dict__
    if type(query) is not Query or query.annotations:
        raise Fallback("expression" if query.annotations else "query")
    kinds: list[tuple[type, int]] = []
    values: list[Any] = []
    key = (
        query.model,
        tuple([getattr(query, name) for name in _AS_IT_IS]),
        tuple(_tables(query)),
        _where(query.where, kinds, values),
        tuple([_order(by) for by in query.order_by]),
        tuple([_column(each) for each in query.select]),
        _nested(query.select_related),
        tuple(getattr(query, "selected", None) or ()),
        (frozenset(query.deferred_loading[0]), query.deferred_loading[1]),
    )
    if any(have[name] for name in _EMPTY):
        raise Fallback("query")
    if not have.keys() <= _KNOWN and any(_is_set(have[n], n) for n in have.keys() - _KNOWN):
        raise Fallback("query")
    return Structure(key, tuple(kinds), tuple(values))


def _is_set(value: Any, name: str) -> bool:
    """Whether an attribute is not what it is in a query to which nothing was done."""
    return bool(value != getattr(Query, name, None))


def _tables(query: Query) -> Iterator[Key]:
    for alias, table in query.alias_map.items():
        if not query.alias_refcount[alias]:
            continue
        if type(table) is BaseTable:
            yield alias, table.table_name
        elif type(table) is Join and table.filtered_relation is None:
            yield alias, table.table_name, table.parent_alias, table.join_type, table.join_field
        else:
            raise Fallback("relation")


def _where(node: WhereNode, kinds: list[tuple[type, int]], values: list[Any]) -> Key:
    parts: list[Any] = [node.connector, node.negated]
    for child in node.children:
        if type(child) is WhereNode:
            parts.append(_where(child, kinds, values))
        else:
            parts.append(_leaf(child, kinds, values))
    return tuple(parts)


def _leaf(lookup: Any, kinds: list[tuple[type, int]], values: list[Any]) -> Key:
    cls = type(lookup)
    if cls not in operands.LOOKUPS or lookup.bilateral_transforms:
        raise Fallback("lookup")
    left, right = _column(lookup.lhs), lookup.rhs
    kind = type(right)
    if kind is bool or right is None:
        return cls, left, "is", right
    if kind is Col:
        return cls, left, "column", _column(right)
    if kind is list or kind is tuple:
        return cls, left, _list(cls, right, kinds, values)
    if hasattr(right, "resolve_expression"):
        raise Fallback("expression")
    fits_slot(right)
    kinds.append((kind, 1))
    values.append(right)
    return cls, left, kind


def _list(cls: type, given: Sequence[Any], kinds: list[tuple[type, int]], values: list[Any]) -> Key:
    if any(hasattr(value, "resolve_expression") for value in given):
        raise Fallback("expression")
    try:
        once = list(given) if cls is operands.RANGE else list(dict.fromkeys(given))
    except TypeError:
        raise Fallback("value_type") from None
    if not 0 < len(once) <= LONGEST_LIST or len({*map(type, once)}) != 1 or once[0] is None:
        raise Fallback("list")
    for value in once:
        fits_slot(value)
    kind = type(once[0])
    if cls is operands.RANGE:
        kinds += [(kind, 1)] * len(once)
        values += once
        return "range", kind
    length = 1 << (len(once) - 1).bit_length()
    kinds.append((kind, length))
    values += once + once[-1:] * (length - len(once))
    return "in", kind, length


def _column(expression: Any) -> Key:
    if type(expression) is not Col:
        raise Fallback("composite" if type(expression).__name__ == "ColPairs" else "expression")
    return expression.alias, expression.target, expression.output_field


def _order(by: Any) -> Any:
    if type(by) is str:
        return by
    if type(by) is OrderBy and type(by.expression) is F:
        name: Any = by.expression
        return name.name, by.descending, by.nulls_first, by.nulls_last
    raise Fallback("expression")


def _nested(names: Any) -> Any:
    """Dictionaries of dictionaries of names as tuples."""
    if not isinstance(names, dict):
        return names
    return tuple([(name, _nested(below)) for name, below in names.items()])


# The other way


def with_values(query: Query, values: Sequence[Any]) -> Query:
    """The same query with other values in its slots."""
    changed = query.clone()
    changed.where = _filled(query.where, iter(values))
    return changed


def _filled(node: WhereNode, left: Iterator[Any]) -> WhereNode:
    filled = WhereNode.create(connector=node.connector, negated=node.negated)
    filled.resolved = node.resolved
    for child in node.children:
        filled.children.append(
            _filled(child, left) if type(child) is WhereNode else _leaf_with(child, left)
        )
    return filled


def _leaf_with(lookup: Any, left: Iterator[Any]) -> Any:
    right = lookup.rhs
    if type(right) in (bool, Col) or right is None:
        return lookup
    changed = copy.copy(lookup)
    if type(right) in (list, tuple):
        count = len(right)
        if type(lookup) is not operands.RANGE:
            count = 1 << (len(dict.fromkeys(right)) - 1).bit_length()
        changed.rhs = [next(left) for _ in range(count)]
    else:
        changed.rhs = next(left)
    return changed


def compiled_with(
    queryset: QuerySet[Any], values: Sequence[Any], ending: Ending, connection: Any
) -> Compiled:
    """What Django's compiler makes of a QuerySet with these values in its slots.

    Raises:
        Fallback: as `compiled`.
    """
    changed = queryset.all()
    changed.query = with_values(queryset.query, values)
    # Setting the query may have made it one of dictionaries.
    changed._iterable_class = queryset._iterable_class
    return compiled(changed, ending, connection)
