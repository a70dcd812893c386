"""Plans: the SQL text of a shape, which value goes where in it, and what becomes of its rows.

Django's own compiler writes the text, twice, with different probes for values. Where both texts are
equal, and each parameter is what the lookup makes of exactly one probe, other values need no
compiler any more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from django.core.exceptions import EmptyResultSet, FullResultSet, ValidationError
from django.db.models import signals
from django.db.models.query import (
    FlatValuesListIterable,
    ModelIterable,
    NamedValuesListIterable,
    ValuesIterable,
    ValuesListIterable,
)
from django.db.models.sql.query import Query

from . import builders, operands
from .encoders import Encode, constant_text, encoder
from .fallback import Fallback
from .probes import probes
from .shapes import fit

#: What a query is asked for in the end: rows, their number, or whether there is one.
ROWS, COUNT, EXISTS = "rows", "count", "exists"


class Ending(NamedTuple):
    """What a query is asked for."""

    kind: str = ROWS
    #: Rows left out, and the number of the row after the last one; None is the end.
    start: int = 0
    stop: int | None = None
    #: The names of `Row`s; None gives what the QuerySet gives.
    columns: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Compiled:
    """A query that Django has compiled."""

    compiler: Any
    sql: str
    params: tuple[Any, ...]
    #: The QuerySet whose rows these are; for its conditions and the kind of its rows.
    queryset: Any


class _Caught(Exception):
    """Carries the compiler of a count out of the method that would run it."""


class _Counted(Query):
    """A query that is not counted: its compiler is wanted."""

    def get_compiler(self, *args: Any, **kwargs: Any) -> Any:
        raise _Caught(super().get_compiler(*args, **kwargs))


def compiled(queryset: Any, ending: Ending, connection: Any) -> Compiled:
    """What Django's compiler makes of a QuerySet when it is asked for this.

    Raises:
        Fallback: there is nothing to send, or no way to know what would be sent.
    """
    if ending.kind != COUNT and (ending.start or ending.stop is not None):
        queryset = queryset[ending.start : ending.stop]
    query = queryset.query
    if ending.kind == COUNT:
        compiler = _counting(query, ending, connection)
    elif ending.kind == EXISTS:
        compiler = query.exists().get_compiler(connection=connection)
    else:
        compiler = query.get_compiler(connection=connection)
    try:
        sql, params = compiler.as_sql()
    except (EmptyResultSet, FullResultSet):
        raise Fallback("empty") from None
    return Compiled(compiler, sql, tuple(params), queryset)


def _counting(query: Any, ending: Ending, connection: Any) -> Any:
    # Django would count those in a subquery.
    if ending.start or ending.stop is not None or query.distinct or query.is_sliced:
        raise Fallback("slice")
    if type(query) is not Query:
        raise Fallback("query")
    try:
        query.chain(klass=_Counted).get_count(using=connection.alias)
    except _Caught as caught:
        return caught.args[0]
    raise Fallback("query")


class Plan:
    """How to run every query of a shape.

    Plain data and functions: it holds no connection, and each use gives it the current one.
    """

    __slots__ = (
        "_models",
        "_slots",
        "_texts",
        "build",
        "builder",
        "convert",
        "encodes",
        "kinds",
        "limits",
        "params",
        "result_kind",
        "sql",
        "tables",
        "text",
        "vendor",
    )

    def __init__(self, first: Compiled, binds: Sequence[Bind], ending: Ending, connection: Any):
        #: Django's text, with `%s` for each parameter.
        self.sql = first.sql
        #: The same with `$1` and so on, as PostgreSQL's protocol takes it.
        self.text = numbered(first.sql)
        self.vendor: str = connection.vendor
        #: The tables that it reads, as they stand in the text; empty where a subquery reads others.
        self.tables = _tables(first, connection)
        self._slots = tuple(b.slot for b in binds)
        #: Makes of the values, and of the current connection, the parameters for a cursor's
        #: `execute`, as Django's compiler does.
        self.params = _parameters(binds)
        #: Of numbers, the slot and the lowest and highest value of its column.
        self.limits = tuple(
            (b.slot, *b.limits) for b in binds if b.slot is not None and b.limits is not None
        )
        self._texts = tuple(b.encode for b in binds)
        #: Whether `encode` knows all parameters.
        self.encodes = connection.vendor == "postgresql" and None not in self._texts
        self.kinds: tuple[type, ...] = ()
        #: What it gives: "rows", "values", "list", "named", "flat", "columns", "count", "exists".
        self.result_kind = ""
        #: Applies Django's converters: rows and the current connection; None when there are none.
        self.convert: Callable[[Any, Any], list[Any]] | None = None
        #: Makes the result of rows that are converted, and of the alias.
        self.build: Callable[[Any, str], Any] = _unbuilt
        #: The source text of generated code, to look at.
        self.builder = ""
        self._models: tuple[type, ...] = ()

    def __repr__(self) -> str:
        return f"<Plan {self.result_kind} {self.sql!r}>"

    def check(self, values: Sequence[Any]) -> None:
        """Refuse what only Django's own way gets right, and do so without a connection.

        Raises:
            Fallback: a number is out of range, or a row's signals have receivers.
        """
        for slot, low, high in self.limits:
            if not low <= values[slot] <= high:
                raise Fallback("out_of_range")
        if self._models and (signals.pre_init.receivers or signals.post_init.receivers):
            check_signals(self._models)

    def encode(self, values: Sequence[Any]) -> list[bytes | None]:
        """The parameters in PostgreSQL's text format.

        Raises:
            Fallback: one of them is not of a plain type, or has no such text.
        """
        for kind, value in zip(self.kinds, values, strict=True):
            fit(value, kind)
        self.check(values)
        if not self.encodes:
            raise Fallback("encoding")
        return [
            encode(None if slot is None else values[slot])
            for slot, encode in zip(self._slots, self._texts, strict=True)
            if encode is not None
        ]

    def converted(self, rows: Any, connection: Any) -> Any:
        """Rows as the cursor gave them, with the values that Django makes of theirs."""
        return rows if self.convert is None else self.convert(rows, connection)

    def give(self, found: builders.Built) -> None:
        """Take what makes its results."""
        self.result_kind, self.build, self.convert = found.kind, found.build, found.convert
        self.builder, self._models = found.source, found.models


def _tables(first: Compiled, connection: Any) -> tuple[str, ...]:
    if first.sql.upper().count("SELECT") != 1:
        return ()
    query = first.queryset.query
    names = {join.table_name for join in query.alias_map.values()} or {query.model._meta.db_table}
    return tuple(sorted(map(connection.ops.quote_name, names)))


def _unbuilt(rows: Any, alias: str) -> Any:
    raise AssertionError("the plan has no builder yet")


def check_signals(models: Iterable[type]) -> None:
    """Refuse models whose rows are told of when they are made.

    Raises:
        Fallback: one of them has such receivers.
    """
    for model in models:
        if signals.pre_init.has_listeners(model) or signals.post_init.has_listeners(model):
            raise Fallback("signals")


@dataclass(frozen=True, slots=True)
class Bind:
    """Where a parameter comes from: a slot, or a constant."""

    slot: int | None
    constant: Any = None
    prepare: operands.Prepare | None = None
    limits: tuple[int, int] | None = None
    encode: Encode | None = None


def _parameters(binds: Sequence[Bind]) -> Callable[[Sequence[Any], Any], tuple[Any, ...]]:
    """A generated function, because it is on the way of each statement."""
    names: dict[str, Any] = {}
    parts = []
    for at, bind in enumerate(binds):
        part = f"values[{bind.slot}]"
        if bind.slot is None:
            part, names[f"c{at}"] = f"c{at}", bind.constant
        elif isinstance(bind.prepare, operands.Prepared):
            names[f"p{at}"] = bind.prepare.field.get_prep_value
            names[f"q{at}"] = bind.prepare.field.get_db_prep_value
            part = f"q{at}(p{at}({part}), connection, prepared=True)"
        elif bind.prepare is not None:
            names[f"p{at}"] = bind.prepare
            part = f"p{at}({part}, connection)"
        parts.append(f"{part}, ")
    source = f"def params(values, connection):\n    return ({''.join(parts)})\n"
    return builders.made(source, names)["params"]  # type: ignore[no-any-return]


def make_plan(
    compile_with: Callable[[Sequence[Any]], Compiled],
    kinds: Sequence[tuple[type, int]],
    ending: Ending,
    connection: Any,
    marks: builders.Marks,
) -> Plan:
    """The plan of a shape, found out by asking Django's compiler.

    Args:
        compile_with: has Django compile the query with these values.
        kinds: the types of its slots, as `slot_kinds` gives them.
        ending: what it is asked for.
        connection: of the database, to compile for.
        marks: what makes rows those of a session.

    Raises:
        Fallback: it cannot be shown that other values would only be other parameters.
    """
    given = [probes(kinds, salt) for salt in (0, 1)]
    try:
        first, second = (compile_with(values) for values in given)
    except (TypeError, ValueError, ArithmeticError, ValidationError):
        # A field does not take the probes, though it took the value.
        raise Fallback("value_type") from None
    if first.sql != second.sql or len(first.params) != len(second.params):
        raise Fallback("text")
    lookups = _operands(first.queryset.query, given[0])
    binds = [
        _bind(pair, given, lookups, connection)
        for pair in zip(first.params, second.params, strict=True)
    ]
    if {bind.slot for bind in binds} - {None} != set(range(len(given[0]))):
        raise Fallback("parameters")
    plan = Plan(first, binds, ending, connection)
    plan.kinds = tuple([kind for kind, count in kinds for _ in range(count)])
    plan.give(_built(first, ending, marks))
    plan.check(given[0])
    return plan


def _operands(query: Any, values: Sequence[Any]) -> list[Any]:
    """The lookup of each value."""
    places = {(type(value), value): slot for slot, value in enumerate(values)}
    found: list[Any] = [None] * len(values)
    leaves = list(operands.leaves(query))
    for leaf in leaves:
        given = leaf.rhs if isinstance(leaf.rhs, (list, tuple)) else (leaf.rhs,)
        for value in given:
            if type(value) in (bool, type(None)):
                continue
            operands.check_operand(leaf, type(value))
            slot = places.get((type(value), value))
            if slot is None:
                # The field has made another value of the same type of it, or of another type.
                raise Fallback("value_type")
            found[slot] = leaf
    if None in found:
        known = all(operands.plain_class(operands.target_of(leaf)) for leaf in leaves)
        raise Fallback("parameters" if known else "field")
    return found


def _bind(pair: Any, given: Any, lookups: Sequence[Any], connection: Any) -> Bind:
    """Whose parameter this is, of which both compiled queries are known."""
    if _same(*pair):
        return Bind(None, pair[0], encode=constant_text(pair[0]))
    fitting = []
    for slot, lookup in enumerate(lookups):
        prepare = operands.preparer(lookup)
        made = [v[slot] if prepare is None else prepare(v[slot], connection) for v in given]
        if _same(made[0], pair[0]) and _same(made[1], pair[1]):
            fitting.append((slot, lookup, prepare))
    if len(fitting) != 1:
        raise Fallback("parameters")
    slot, lookup, prepare = fitting[0]
    return Bind(
        slot,
        prepare=prepare,
        limits=operands.limits(lookup, connection),
        encode=encoder(lookup, type(given[0][slot]), connection.ops),
    )


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


_MARKERS: Final = re.compile("%(.)", re.DOTALL)


def numbered(sql: str) -> bytes:
    """A text with `%s` as one with `$1`, `$2` and so on, as PostgreSQL's protocol takes it."""
    count = 0

    def marker(found: re.Match[str]) -> str:
        nonlocal count
        if found[1] != "s":
            return found[1]
        count += 1
        return f"${count}"

    return _MARKERS.sub(marker, sql).encode()


def _built(first: Compiled, ending: Ending, marks: builders.Marks) -> builders.Built:
    """What makes the results of a query."""
    compiler = first.compiler
    if ending.kind == COUNT:
        return builders.single(compiler, "count")
    if ending.kind == EXISTS:
        return builders.Built("exists", lambda rows, alias: bool(rows))
    if compiler.has_extra_select or compiler.query.combinator:
        raise Fallback("columns")
    iterable = first.queryset._iterable_class
    if iterable is ModelIterable:
        return builders.instances(compiler, marks)
    names = builders.names_of(compiler.query)
    if ending.columns is not None and iterable is ValuesIterable:
        return builders.columns(compiler, names, ending.columns)
    if iterable is ValuesIterable:
        return builders.values(compiler, names)
    if iterable is NamedValuesListIterable:
        return builders.named(compiler, first.queryset._fields or names)
    if iterable is FlatValuesListIterable:
        return builders.flat(compiler)
    if iterable is ValuesListIterable:
        return builders.tuples(compiler)
    raise Fallback("query")
