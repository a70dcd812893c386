"""Columns of row tables: Django `F` expressions whose Python operators make Django conditions."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, cast
from weakref import WeakValueDictionary

from django.core.exceptions import FieldDoesNotExist
from django.db.models import BooleanField, F, Field, JSONField, Model, Q, Transform, Value
from django.db.models.constants import LOOKUP_SEP
from django.db.models.expressions import CombinedExpression, OrderBy
from django.db.models.fields.json import (
    KeyTransform,
)
from django.db.models.lookups import BuiltinLookup

from .lookups import ILike, Like, _KeyILike, _KeyLike

if TYPE_CHECKING:
    from django.db.models.sql.query import Query

    _BuiltinLookup = BuiltinLookup[Any]
else:
    _BuiltinLookup = BuiltinLookup

_DJANGO: Final = ("django.db.", "django.contrib.", "django.core.", "django.utils.")


def _asked_by_django(depth: int = 2) -> bool:
    """Whether the code that called our caller is Django's own.

    Django compares expressions, asks conditions whether they are empty and reads the `name` of an
    `F`; it has to get Django's answers. Everybody else gets those of this module.
    """
    return str(sys._getframe(depth).f_globals.get("__name__", "")).startswith(_DJANGO)


class Condition(Q):
    """A `Q` made by comparing columns; it combines with `&`, `|`, `^`, `~` and is never changed.

    Raises:
        TypeError: on `bool()`, because `if users.id == 1:` can only be a mistake.
    """

    def __bool__(self) -> bool:
        if _asked_by_django():
            return bool(self.children)
        raise TypeError(
            f"the condition {self} has no truth value; give it to where(), and combine "
            "conditions with & | ~ instead of and, or, not"
        )

    # A subclass with its own reflected method is asked before Q itself, so these keep the type.
    def __rand__(self, other: Any) -> Condition:
        return _joined(other, self, Q.AND)

    def __ror__(self, other: Any) -> Condition:
        return _joined(other, self, Q.OR)

    def __rxor__(self, other: Any) -> Condition:
        return _joined(other, self, Q.XOR)

    if TYPE_CHECKING:

        def __and__(self, other: Any) -> Condition: ...
        def __or__(self, other: Any) -> Condition: ...
        def __xor__(self, other: Any) -> Condition: ...
        def __invert__(self) -> Condition: ...

    def deconstruct(self) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        """As a plain `Q`, which it equals: in migrations and in comparisons."""
        _, args, kwargs = super().deconstruct()
        return "django.db.models.Q", tuple(args), kwargs


def _joined(left: Any, right: Condition, connector: str) -> Condition:
    if not getattr(left, "conditional", False):
        raise TypeError(f"{left!r} is not a condition; combine with conditions and Q objects only")
    if isinstance(left, Q) and not left.children:
        return right
    joined = Condition.create(connector=connector)
    joined.add(left, connector)
    joined.add(right, connector)
    return joined


@dataclass(frozen=True, slots=True, eq=False)
class Comparison:
    """A condition on an expression that no lookup path can name, such as `users.xp + 1`."""

    left: Any
    lookup: str
    right: Any
    conditional = True

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Comparison):
            return NotImplemented
        same = self.left is other.left and self.lookup == other.lookup
        return same and _equal(self.right, other.right)

    def __hash__(self) -> int:
        return hash((id(self.left), self.lookup))

    def resolve_expression(
        self,
        query: Query | None = None,
        allow_joins: bool = True,
        reuse: set[str] | None = None,
        summarize: bool = False,
        for_save: bool = False,
    ) -> Any:
        """The Django lookup on the resolved operands."""
        left = self.left.resolve_expression(query, allow_joins, reuse, summarize, for_save)
        any_query = cast(Any, query)
        right = any_query.resolve_lookup_value(self.right, reuse, allow_joins, summarize)
        return any_query.build_lookup([self.lookup], left, right)


def _equal(left: Any, right: Any) -> bool:
    return left is right or (not isinstance(left, Operators) and bool(left == right))


@dataclass(frozen=True, slots=True, eq=False)
class Setter:
    """A column and the value or expression an UPDATE gives it."""

    column: Column
    value: Any


class Operators:
    """The comparisons that columns and computed columns share; all of them return a `Condition`."""

    def _compare(self, lookup: str, value: Any) -> Condition:
        return Condition(Comparison(self, lookup, value))

    def __eq__(self, other: object) -> Condition:  # type: ignore[override]
        if _asked_by_django():
            return cast(Condition, self is other)
        return self.eq(other)

    def __ne__(self, other: object) -> Condition:  # type: ignore[override]
        if _asked_by_django():
            return cast(Condition, self is not other)
        return self.ne(other)

    if TYPE_CHECKING:

        def __add__(self, other: Any) -> Computed: ...
        def __sub__(self, other: Any) -> Computed: ...
        def __mul__(self, other: Any) -> Computed: ...
        def __truediv__(self, other: Any) -> Computed: ...
        def __mod__(self, other: Any) -> Computed: ...
        def __pow__(self, other: Any) -> Computed: ...
        def __radd__(self, other: Any) -> Computed: ...
        def __rsub__(self, other: Any) -> Computed: ...
        def __rmul__(self, other: Any) -> Computed: ...
        def __rtruediv__(self, other: Any) -> Computed: ...
        def __rmod__(self, other: Any) -> Computed: ...
        def __rpow__(self, other: Any) -> Computed: ...

    # By identity, as equality among Django's own code is: equal columns are one object.
    __hash__ = object.__hash__

    def __lt__(self, other: Any) -> Condition:
        return self.lt(other)

    def __le__(self, other: Any) -> Condition:
        return self.le(other)

    def __gt__(self, other: Any) -> Condition:
        return self.gt(other)

    def __ge__(self, other: Any) -> Condition:
        return self.ge(other)

    def eq(self, value: Any) -> Condition:
        """`=`; IS NULL when the value is None."""
        return self.is_null() if value is None else self._compare("exact", value)

    def ne(self, value: Any) -> Condition:
        """Django's `exclude`: NULL differs from every value; None is IS NOT NULL."""
        return self.is_null(False) if value is None else ~self._compare("exact", value)

    def lt(self, value: Any) -> Condition:
        """`<`."""
        return self._compare("lt", value)

    def le(self, value: Any) -> Condition:
        """`<=`."""
        return self._compare("lte", value)

    def gt(self, value: Any) -> Condition:
        """`>`."""
        return self._compare("gt", value)

    def ge(self, value: Any) -> Condition:
        """`>=`."""
        return self._compare("gte", value)

    def in_(self, *values: Any) -> Condition:
        """`IN` a list of values or a query; as in asyncqlio the values may be given one by one.

        An empty list matches no row, and None in it matches nothing.
        """
        return self._compare("in", _one_collection(values))

    def not_in(self, *values: Any) -> Condition:
        """Django's `exclude` of `in_`."""
        return ~self.in_(*values)

    def between(self, low: Any, high: Any) -> Condition:
        """`BETWEEN low AND high`, both ends included."""
        return self._compare("range", (low, high))

    def is_null(self, null: bool = True) -> Condition:
        """`IS NULL`, or `IS NOT NULL` when given False."""
        return self._compare("isnull", bool(null))

    def like(self, pattern: Any) -> Condition:
        r"""`LIKE` with an SQL pattern: `%` any text, `_` any character, `\` escapes these.

        SQLite ignores the case of ASCII letters here, as it does for Django's `contains`.
        """
        return self._compare(Like.lookup_name, pattern)

    def ilike(self, pattern: Any) -> Condition:
        """`like`, whatever the case; on MySQL the collation decides, as for `icontains`."""
        return self._compare(ILike.lookup_name, pattern)

    def contains(self, value: Any) -> Condition:
        """The text is in the column's text; for JSON, arrays and ranges Django's containment."""
        return self._compare("contains", value)

    def icontains(self, value: Any) -> Condition:
        """`contains`, whatever the case."""
        return self._compare("icontains", value)

    def startswith(self, value: Any) -> Condition:
        """The column's text starts with this text."""
        return self._compare("startswith", value)

    def istartswith(self, value: Any) -> Condition:
        """`startswith`, whatever the case."""
        return self._compare("istartswith", value)

    def endswith(self, value: Any) -> Condition:
        """The column's text ends with this text."""
        return self._compare("endswith", value)

    def iendswith(self, value: Any) -> Condition:
        """`endswith`, whatever the case."""
        return self._compare("iendswith", value)

    def regex(self, pattern: str) -> Condition:
        """The column matches the regular expression, in the database's own syntax."""
        return self._compare("regex", pattern)

    def iregex(self, pattern: str) -> Condition:
        """`regex`, whatever the case."""
        return self._compare("iregex", pattern)

    def lookup(self, name: str, value: Any) -> Condition:
        """Any other lookup of Django by its name, such as `iexact` or one you registered."""
        return self._compare(name, value)

    def _combine(self, other: Any, connector: str, reversed: bool) -> Computed:
        if not hasattr(other, "resolve_expression"):
            other = Value(other)
        operands = (other, connector, self) if reversed else (self, connector, other)
        return Computed(*operands)


def _one_collection(values: tuple[Any, ...]) -> Any:
    if len(values) != 1 or isinstance(values[0], (str, bytes, Model)):
        return list(values)
    (only,) = values
    # A query stays a query; anything else is copied, so that a later change of it does no harm.
    if hasattr(only, "resolve_expression"):
        return [only] if isinstance(only, (F, Value)) else only
    return list(only) if isinstance(only, Iterable) else [only]


class Computed(Operators, CombinedExpression):
    """The arithmetic of columns, such as `users.xp + 100`; it compares as columns do."""

    def resolve_expression(self, *args: Any, **kwargs: Any) -> Any:
        """Django's expression: inside a query nothing is left of the operators."""
        resolved = super().resolve_expression(*args, **kwargs)
        if type(resolved) is Computed:
            resolved.__class__ = CombinedExpression  # type: ignore[assignment]
        return resolved


class Column(Operators, F):
    """A column of a table or a related table, or a place inside a JSON or array column.

    It is a Django `F` and goes wherever Django takes one. Equal columns are one object, so columns
    work in sets and as keys in spite of `==`, also after pickling.
    """

    def __init__(
        self, model: type[Model], names: tuple[str, ...], keys: tuple[Any, ...], field: Any
    ):
        self._model = model
        self._names = names
        self._keys = keys
        self._field = field
        self._path = LOOKUP_SEP.join((*names, *map(str, keys)))
        # Django splits paths at every `__`: such keys cannot travel in one.
        self._splits = any(LOOKUP_SEP in str(key) or str(key).endswith("_") for key in keys)
        F.__init__(self, self._path)

    def __repr__(self) -> str:
        place = "".join(f"[{key!r}]" for key in self._keys)
        return f"<Column {self._model.__name__}.{'.'.join(self._names)}{place}>"

    def __reduce__(self) -> tuple[Any, ...]:
        return column, (self._model, self._names, self._keys)

    def __copy__(self) -> Column:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Column:
        return self

    def copy(self) -> F:  # type: ignore[override]
        """A plain `F`: Django renames such copies."""
        return F(self._path)

    def deconstruct(self) -> tuple[str, tuple[Any, ...], dict[str, Any]]:
        """As a plain `F`, in migrations."""
        return "django.db.models.F", (self._path,), {}

    @property
    def model(self) -> type[Model]:
        """The model of the row table that the path starts from."""
        return self._model

    @property
    def field(self) -> Any:
        """Django's field or relation; None for a part of a value (a JSON key, a year)."""
        return self._own_field

    @property
    def _own_field(self) -> Any:
        return None if self._keys or not hasattr(self._field, "model") else self._field

    @property
    def type(self) -> Any:
        """The field again, under asyncqlio's name: it is where a column's type is decided."""
        return self._own_field

    @property
    def column(self) -> str:
        """The name of the column in the database."""
        return str(self._concrete().column)

    @property
    def nullable(self) -> bool:
        """Whether the column takes NULL."""
        return bool(self._concrete().null)

    @property
    def primary_key(self) -> bool:
        """Whether the column is the primary key or a part of it."""
        return self._concrete() in self._concrete().model._meta.pk_fields

    @property
    def unique(self) -> bool:
        """Whether two rows cannot have the same value."""
        return bool(self._concrete().unique)

    @property
    def default(self) -> Any:
        """The default value or function of the field; Django's NOT_PROVIDED without one."""
        return self._concrete().default

    @property
    def foreign_column(self) -> Column | None:
        """The column that a foreign key refers to, else None."""
        field = self._concrete()
        if not field.is_relation:
            return None
        return column(field.related_model, (field.target_field.name,))

    def _concrete(self) -> Any:
        if not isinstance(self._own_field, Field):
            raise AttributeError(f"{self!r} is no column of a table; it has no definition there")
        return self._field

    @property
    def conditional(self) -> bool:
        """Whether the column is a condition by itself."""
        return isinstance(self._field, BooleanField) and not self._keys

    def _condition(self) -> Condition:
        if not self.conditional:
            raise TypeError(f"{self!r} is not a condition; compare it with a value first")
        return self._compare("exact", True)

    def __and__(self, other: Any) -> Condition:
        return self._condition().__and__(other)

    def __or__(self, other: Any) -> Condition:
        return self._condition().__or__(other)

    def __xor__(self, other: Any) -> Condition:
        return self._condition().__xor__(other)

    def __invert__(self) -> Condition:  # type: ignore[override]
        return ~self._condition()

    def _compare(self, lookup: str, value: Any) -> Condition:
        if self._splits:
            return Condition(Comparison(self, lookup, value))
        return Condition((f"{self._path}{LOOKUP_SEP}{lookup}", value))

    def eq(self, value: Any) -> Condition:
        """`=`; None is IS NULL, and for a place inside JSON the JSON null, as in Django."""
        if value is None and self._in_json():
            return self._compare("exact", None)
        return super().eq(value)

    def ne(self, value: Any) -> Condition:
        """The opposite of `eq`, where NULL differs from every value, as with Django's `exclude`."""
        if value is None and self._in_json():
            return ~self._compare("exact", None)
        return super().ne(value)

    def _in_json(self) -> bool:
        return bool(self._keys) and isinstance(self._field, JSONField)

    def set(self, value: Any) -> Setter:
        """What `update(...).set()` takes: this column becomes the value, expression or query."""
        return Setter(self, value)

    def incr(self, value: Any) -> Setter:
        """Adds to the column, in the database."""
        return Setter(self, self + value)

    def decr(self, value: Any) -> Setter:
        """Subtracts from the column, in the database."""
        return Setter(self, self - value)

    def asc(self, **nulls: bool) -> OrderBy:
        """Ascending order; `nulls_first=True` or `nulls_last=True` places the NULLs."""
        return OrderBy(self, **nulls)

    def desc(self, **nulls: bool) -> OrderBy:
        """Descending order; `nulls_first=True` or `nulls_last=True` places the NULLs."""
        return OrderBy(self, descending=True, **nulls)

    def __getitem__(self, key: Any) -> Any:
        """A key or index of a JSON, hstore or array column; of text, Django's slice of it."""
        if self._keyed():
            return column(self._model, self._names, (*self._keys, _key(self, key)))
        return super().__getitem__(key)

    def _keyed(self) -> bool:
        return hasattr(self._field, "base_field") or self._field_kind() in _KEYED

    def _field_kind(self) -> str:
        return type(self._field).__name__ if self._field is not None else ""

    def __getattr__(self, name: str) -> Any:
        """Transforms (`books.updated.year`) and further lookups (`posts.tags.overlap([..])`)."""
        if name.startswith("_") or (found := self._registered(name)) is None:
            raise AttributeError(f"{self!r} has no attribute {name!r}")
        if issubclass(found, Transform):
            return column(self._model, (*self._names, name))
        return lambda value=True: self._compare(name, value)

    def _registered(self, name: str) -> Any:
        if self._keys or self._field is None:
            return None
        return self._field.get_lookups().get(name)

    def resolve_expression(
        self,
        query: Query | None = None,
        allow_joins: bool = True,
        reuse: Any = None,
        summarize: bool = False,
        for_save: bool = False,
    ) -> Any:
        """Django's `Col`, with the JSON keys that a path cannot name put on one by one."""
        whole = not self._splits
        path = self._path if whole else LOOKUP_SEP.join(self._names)
        resolved = cast(Any, query).resolve_ref(path, allow_joins, reuse, summarize)
        if whole:
            return resolved
        for key in self._keys:
            resolved = KeyTransform(str(key), resolved)
        return resolved

    def replace_expressions(self, replacements: Any) -> Any:
        """As an `F` of the same name: constraints replace those."""
        replaced = F(self._path).replace_expressions(replacements)
        return self if isinstance(replaced, F) else replaced


# By name, because importing django.contrib.postgres needs psycopg.
_KEYED: Final = {"JSONField", "HStoreField"}


def _key(of: Column, key: Any) -> Any:
    if not isinstance(key, slice):
        return key
    if not hasattr(of._field, "base_field") or key.step is not None or key.stop is None:
        raise TypeError(f"{of!r} takes a key, an index or, for arrays, a slice [start:stop]")
    return f"{key.start or 0}_{key.stop}"


class RelationColumn(Column):
    """A relation in either direction; its attributes are the columns of the related table."""

    def __getattribute__(self, name: str) -> Any:
        # Related fields come before the attributes of this class, or `books.author.name` would be
        # the name of the foreign key. Django itself reads the attributes of an F.
        if not name.startswith("_") and not _asked_by_django():
            names, model = self._names, self._field.related_model
            if model is not None and (field_name := _path_name(model, name)) is not None:
                return column(self._model, (*names, field_name))
        return super().__getattribute__(name)


_columns: WeakValueDictionary[tuple[Any, ...], Column] = WeakValueDictionary()


def column(model: type[Model], names: tuple[str, ...], keys: tuple[Any, ...] = ()) -> Column:
    """The one column of this model at this path of names and, inside its value, of keys.

    Raises:
        AttributeError: the model has no such field.
    """
    # The type of a key counts: data["1"] and data[1] are equal to a dict only by accident.
    place = (model, names, keys, tuple(map(type, keys)))
    found = _columns.get(place)
    if found is None:
        field, kind = _final_field(model, names)
        found = _columns.setdefault(place, kind(model, names, keys, field))
    return found


def _final_field(model: type[Model], names: tuple[str, ...]) -> tuple[Any, type[Column]]:
    field: Any = None
    at: type[Model] | None = model
    for name in names:
        if at is None:
            # Inside a value the names are transforms; what they give is known of simple ones.
            transform = field.get_transform(name) if field is not None else None
            made = getattr(transform, "output_field", None)
            field = made if isinstance(made, Field) else None
            continue
        field = _field(at, name)
        # `author` goes on to the other table, `author_id` and `pk` stay in this one.
        at = field.related_model if field.is_relation and field.name == name else None
    return field, RelationColumn if at is not None else Column


def _field(model: type[Model], name: str) -> Any:
    if name == "pk":
        return model._meta.pk
    try:
        return model._meta.get_field(name)
    except FieldDoesNotExist:
        message = f"{model.__name__!r} has no column or relation {name!r}"
        raise AttributeError(f"{message}; it has {_names_of(model)}") from None


def _names_of(model: type[Model]) -> str:
    return ", ".join(sorted(f.name for f in model._meta.get_fields() if f.name[-1] != "+"))


def _path_name(model: type[Model], name: str) -> str | None:
    """The name that Django's lookups use for this attribute of the model, or None.

    Raises:
        AttributeError: it is a generic foreign key, which has no column.
    """
    if name == "pk":
        return name
    try:
        field = model._meta.get_field(name)
    except FieldDoesNotExist:
        for relation in model._meta.related_objects:
            if relation.get_accessor_name() == name:
                return str(relation.name)
        return None
    if not field.concrete and field.related_model is None:
        pair = f"{getattr(field, 'ct_field', '')!r} and {getattr(field, 'fk_field', '')!r}"
        raise AttributeError(f"{name!r} is a generic foreign key; compare its columns {pair}")
    return name


Field.register_lookup(Like)
Field.register_lookup(ILike)
KeyTransform.register_lookup(_KeyLike)
KeyTransform.register_lookup(_KeyILike)

__all__ = [
    "Column",
    "Comparison",
    "Computed",
    "Condition",
    "Operators",
    "RelationColumn",
    "Setter",
    "column",
]
