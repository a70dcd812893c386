"""What plans know of Django's lookups and fields: how a value becomes a parameter.

The classes are named one by one, and compared exactly: what somebody has made of them may do
something else.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from functools import partial
from types import MappingProxyType
from typing import Any, Final
from uuid import UUID

from django.db import models
from django.db.models import lookups
from django.db.models.expressions import Col, Exists, ResolvedOuterRef
from django.db.models.fields import related_lookups, reverse_related
from django.db.models.fields.related import ForeignKey, OneToOneField
from django.db.models.sql.datastructures import BaseTable, Join
from django.db.models.sql.query import Query
from django.db.models.sql.where import WhereNode

from .fallback import Fallback

Prepare = Callable[[Any, Any], Any]

_INTEGERS: Final = (
    models.AutoField,
    models.BigAutoField,
    models.SmallAutoField,
    models.IntegerField,
    models.BigIntegerField,
    models.SmallIntegerField,
    models.PositiveIntegerField,
    models.PositiveBigIntegerField,
    models.PositiveSmallIntegerField,
)
_TEXTS: Final = (
    models.CharField,
    models.TextField,
    models.SlugField,
    models.EmailField,
    models.URLField,
)
#: The type of the values of each field class.
VALUE_TYPES: Final[Mapping[type, type]] = MappingProxyType(
    {
        **dict.fromkeys(_INTEGERS, int),
        **dict.fromkeys(_TEXTS, str),
        models.FloatField: float,
        models.DecimalField: Decimal,
        models.DateField: dt.date,
        models.DateTimeField: dt.datetime,
        models.TimeField: dt.time,
        models.DurationField: dt.timedelta,
        models.UUIDField: UUID,
        models.BooleanField: bool,
    }
)
# A subclass with others of these does something of its own with values.
_OWN: Final = (
    "db_type",
    "get_col",
    "get_db_prep_value",
    "get_internal_type",
    "get_lookup",
    "get_prep_value",
    "get_transform",
    "to_python",
)

COMPARISONS: Final = frozenset(
    {
        lookups.Exact,
        lookups.GreaterThan,
        lookups.GreaterThanOrEqual,
        lookups.In,
        lookups.IntegerFieldExact,
        lookups.IntegerGreaterThan,
        lookups.IntegerGreaterThanOrEqual,
        lookups.IntegerLessThan,
        lookups.IntegerLessThanOrEqual,
        lookups.LessThan,
        lookups.LessThanOrEqual,
        lookups.Range,
        related_lookups.RelatedExact,
        related_lookups.RelatedGreaterThan,
        related_lookups.RelatedGreaterThanOrEqual,
        related_lookups.RelatedIn,
        related_lookups.RelatedLessThan,
        related_lookups.RelatedLessThanOrEqual,
    }
)
PATTERNS: Final = frozenset(
    {
        lookups.Contains,
        lookups.EndsWith,
        lookups.IContains,
        lookups.IEndsWith,
        lookups.IStartsWith,
        lookups.StartsWith,
    }
)
RAW_TEXT: Final = frozenset({lookups.Regex, lookups.IRegex})
NULLS: Final = frozenset({lookups.IsNull, related_lookups.RelatedIsNull})
LOOKUPS: Final = COMPARISONS | PATTERNS | RAW_TEXT | NULLS | {lookups.IExact}

RANGE: Final = lookups.Range

_RELATIONS: Final = frozenset(
    {
        ForeignKey,
        OneToOneField,
        reverse_related.ManyToManyRel,
        reverse_related.ManyToOneRel,
        reverse_related.OneToOneRel,
        models.ManyToManyField,
    }
)
_WITHOUT_PARAMETERS: Final = frozenset({Col, ResolvedOuterRef})


def leaves(query: Query) -> Iterator[Any]:
    """The lookups of a query, those of its subqueries included.

    Raises:
        Fallback: it has conditions or relations that are not known.
    """
    for table in query.alias_map.values():
        if type(table) is Join:
            if type(table.join_field) not in _RELATIONS or table.filtered_relation is not None:
                raise Fallback("relation")
        elif type(table) is not BaseTable:
            raise Fallback("relation")
    yield from _leaves_of(query.where)


def _leaves_of(node: Any) -> Iterator[Any]:
    kind = type(node)
    if kind is WhereNode:
        for child in node.children:
            yield from _leaves_of(child)
    elif kind not in LOOKUPS:
        raise Fallback("lookup")
    elif type(node.lhs) is Exists and type(node.rhs) is bool:
        # What Django makes of the exclusion of a row with any such related one.
        yield from leaves(node.lhs.query)
    elif type(node.lhs) is not Col:
        raise Fallback("composite" if type(node.lhs).__name__ == "ColPairs" else "lookup")
    elif type(node.rhs) is Query:
        yield from leaves(node.rhs)
    elif type(node.rhs) not in _WITHOUT_PARAMETERS:
        if hasattr(node.rhs, "resolve_expression"):
            raise Fallback("expression")
        yield node


def target_of(lookup: Any) -> Any:
    """The field that prepares the values of a lookup: of a foreign key, that which it refers to."""
    field = lookup.lhs.output_field
    return getattr(field, "target_field", None) or field


def plain_class(field: Any) -> type | None:
    """The class of Django's whose values a field has, if it is one that is known."""
    while type(field) in (ForeignKey, OneToOneField):
        field = field.target_field
    given = type(field)
    for cls in given.__mro__:
        if cls in VALUE_TYPES:
            same = cls is given or all(getattr(given, n) is getattr(cls, n) for n in _OWN)
            return cls if same else None
    return None


def check_operand(lookup: Any, kind: type) -> None:
    """Refuse a lookup whose parameter is not known to come from a value of this type alone.

    Raises:
        Fallback: it is not.
    """
    cls = plain_class(target_of(lookup))
    if cls is None:
        raise Fallback("field")
    of_text = type(lookup) not in COMPARISONS
    if VALUE_TYPES[cls] is not kind or (of_text and kind is not str):
        raise Fallback("value_type")
    if lookup.bilateral_transforms:
        raise Fallback("lookup")


def preparer(lookup: Any) -> Prepare | None:
    """The function of a value and a connection that makes the parameter, as the lookup does; None
    where the parameter is the value."""
    cls = type(lookup)
    if cls in PATTERNS:
        return partial(_pattern, lookup.param_pattern)
    if cls is lookups.IExact:
        return _escaped
    field = target_of(lookup)
    if cls in RAW_TEXT or VALUE_TYPES[plain_class(field) or str] is str:
        return None
    return Prepared(field)


def _pattern(pattern: str, value: Any, connection: Any) -> Any:
    return pattern % connection.ops.prep_for_like_query(value)


def _escaped(value: Any, connection: Any) -> Any:
    return connection.ops.prep_for_iexact_query(value)


class Prepared:
    """Prepares values as Django's lookups have a field do it.

    Args:
        field: that which the values are compared with.
    """

    __slots__ = ("field",)

    def __init__(self, field: Any) -> None:
        self.field = field

    def __call__(self, value: Any, connection: Any) -> Any:
        """The parameter."""
        prepared = self.field.get_prep_value(value)
        return self.field.get_db_prep_value(prepared, connection, prepared=True)


def limits(lookup: Any, connection: Any) -> tuple[int, int] | None:
    """The lowest and the highest number of the column that a lookup compares; None when it has no
    numbers or no limits."""
    field = target_of(lookup)
    while type(field) in (ForeignKey, OneToOneField):
        field = field.target_field
    if VALUE_TYPES.get(plain_class(field) or str) is not int:
        return None
    low, high = connection.ops.integer_field_range(field.get_internal_type())
    return None if low is None or high is None else (low, high)
