"""Generated code that makes of rows of values what Django would make of them.

Rows of a model become instances without a call of the model's code: nothing but what Django's
`from_db` does to a plain model, in the same order, so that nobody can tell them apart. The source
text is kept, to look at.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from typing import Any, Final

from django.db.models import Model
from django.db.models.base import ModelState
from django.db.models.fields.files import FileDescriptor
from django.db.models.fields.mixins import FieldCacheMixin
from django.db.models.fields.related_descriptors import ForeignKeyDeferredAttribute
from django.db.models.query_utils import DeferredAttribute
from django.db.models.utils import create_namedtuple_class

from django_asyncsession.results import Row

from .fallback import Fallback

Build = Callable[[Any, str], Any]
Convert = Callable[[Any, Any], list[Any]]


@dataclass(frozen=True, slots=True)
class Marks:
    """What makes an instance a row of a session."""

    #: A class with the slots `names` and `values`: what the row was when it was loaded.
    loaded: type
    #: The same for a row with values that can change in place.
    whole: Callable[[Any], Any]
    #: Whether a model has such values.
    is_mutable: Callable[[type], bool]
    #: Django's fetch mode of the rows; None before there were any.
    fetch_mode: Any = None


@dataclass(frozen=True, slots=True)
class Built:
    """What makes the results of a plan."""

    kind: str
    build: Build
    convert: Convert | None = None
    source: str = ""
    #: The models whose instances it makes.
    models: tuple[type, ...] = ()


def names_of(query: Any) -> tuple[str, ...]:
    """The names of the values of a query in their order, as `values()` finds them."""
    if getattr(query, "selected", None):
        return tuple(query.selected)
    return (*query.extra_select, *query.values_select, *query.annotation_select)


# Values


def values(compiler: Any, names: Sequence[str]) -> Built:
    """Dictionaries."""
    convert = converter(compiler)
    items = ", ".join(f"{name!r}: r[{at}]" for at, name in enumerate(names))
    source = f"def build(rows, alias):\n    return [{{{items}}} for r in rows]\n"
    return Built("values", made(source, {})["build"], convert, source)


def columns(compiler: Any, names: Sequence[str], wanted: Sequence[str]) -> Built:
    """`Row`s, with their values in the order of the columns that were asked for."""
    wanted = tuple(wanted) or tuple(names)
    places = [names.index(name) for name in wanted]
    picked = "".join(f"r[{at}], " for at in places)
    taken = "r" if places == list(range(len(names))) else f"({picked})"
    source = f"def build(rows, alias):\n    return [Row(names, {taken}) for r in rows]\n"
    build = made(source, {"Row": Row, "names": wanted})["build"]
    return Built("columns", build, converter(compiler), source)


def tuples(compiler: Any) -> Built:
    """Tuples."""
    return Built("list", lambda rows, alias: list(map(tuple, rows)), converter(compiler))


def flat(compiler: Any) -> Built:
    """The values of the only column."""
    return Built("flat", lambda rows, alias: [row[0] for row in rows], converter(compiler))


def named(compiler: Any, names: Sequence[str]) -> Built:
    """Named tuples."""
    cls, new = create_namedtuple_class(*names), tuple.__new__

    def build(rows: Any, alias: str) -> list[Any]:
        return [new(cls, row) for row in rows]

    return Built("named", build, converter(compiler))


def single(compiler: Any, kind: str) -> Built:
    """The only value of the only row."""
    return Built(kind, lambda rows, alias: rows[0][0], converter(compiler))


def converter(compiler: Any) -> Convert | None:
    """What applies the converters of the columns; None when there are none.

    Raises:
        Fallback: some columns are values of several.
    """
    expressions = [selected[0] for selected in compiler.select[: compiler.col_count]]
    if not expressions:
        expressions = list(compiler.query.annotation_select.values())
    if compiler.has_composite_fields(expressions):
        raise Fallback("composite")
    ops = compiler.connection.ops
    found = compiler.get_converters(expressions)
    if not found:
        return None
    names: dict[str, Any] = {}
    first: list[str] = []
    parts = [f"r[{at}]" for at in range(len(expressions))]
    for at, (functions, expression) in found.items():
        names[f"e{at}"] = expression
        for number, function in enumerate(functions):
            name = f"f{at}_{number}"
            if getattr(function, "__self__", None) is ops:
                # That of the current connection: a plan must not keep this one.
                name = f"connection.ops.{function.__name__}"
            elif any(
                cell.cell_contents is ops for cell in getattr(function, "__closure__", None) or ()
            ):
                # A function made by it; the database's are before those of the field.
                first.append(f"    {name} = connection.ops.get_db_converters(e{at})[{number}]\n")
            else:
                names[name] = function
            parts[at] = f"{name}({parts[at]}, e{at}, connection)"
    body = f"    return [({', '.join(parts)},) for r in rows]\n"
    source = f"def convert(rows, connection):\n{''.join(first)}{body}"
    convert: Convert = made(source, names)["convert"]
    return convert


def made(source: str, names: dict[str, Any]) -> dict[str, Any]:
    """What generated code defines, and the names that it uses."""
    exec(compile(source, "<plan>", "exec"), names)
    return names


# Instances


def check_model(model: type[Model]) -> None:
    """Refuse a model whose instances are not made as Django makes them.

    Raises:
        Fallback: it has its own way.
    """
    own: Any = model
    plain = (
        own.from_db.__func__ is _FROM_DB
        and own.__init__ is Model.__init__
        and _init_after_model(own) is object.__init__
        and own.__new__ is object.__new__
        and own.__setattr__ is object.__setattr__
    )
    if not plain:
        raise Fallback("model")


_FROM_DB: Final = Model.from_db.__func__  # type: ignore[attr-defined]


def _init_after_model(model: type) -> Any:
    """The `__init__` that Django's own calls in the end."""
    after = model.__mro__[model.__mro__.index(Model) + 1 :]
    return next(cls.__dict__["__init__"] for cls in after if "__init__" in cls.__dict__)


def instances(compiler: Any, marks: Marks) -> Built:
    """Instances of a model, with those of the relations that are selected with it.

    Raises:
        Fallback: they are not made by Django's plain way.
    """
    if compiler.annotation_col_map or compiler.has_composite_fields(
        [selected[0] for selected in compiler.select]
    ):
        raise Fallback("columns")
    convert = converter(compiler)
    writer = _Writer(compiler, marks)
    writer.write(compiler.klass_info, "        ")
    count = compiler.col_count
    unpacked = ", ".join(f"v{at}" for at in range(count)) + ("," if count == 1 else "")
    source = (
        "def build(rows, alias):\n    found = []\n    add = found.append\n    for r in rows:\n"
        f"        {unpacked} = r\n" + "\n".join(writer.lines) + "\n        add(o0)\n"
        "    return found\n"
    )
    build = made(source, writer.names)["build"]
    return Built("rows", build, convert, source, tuple(writer.models))


class _Writer:
    """Writes the lines that make one row's instances: `o0` is the row, `o1` and so on are what
    comes with it, and `s0`, `s1` their states."""

    def __init__(self, compiler: Any, marks: Marks) -> None:
        self._select, self._count = compiler.select, compiler.col_count
        self._marks = marks
        self.lines: list[str] = []
        self.models: list[type] = []
        self.names: dict[str, Any] = {
            "new": object.__new__,
            "State": ModelState,
            "Loaded": marks.loaded,
            "whole": marks.whole,
            "mode": marks.fetch_mode,
        }

    def write(self, info: Mapping[str, Any], indent: str) -> int:
        """Write what makes the instances of one class; return their number."""
        model, n = info["model"], len(self.models)
        check_model(model)
        self.models.append(model)
        self.names[f"M{n}"] = model
        places = self._places(info)
        add = self._adder(indent)
        add(f"s{n} = new(State)")
        for line in self._fields(model, n, places):
            add(line)
        for related in info.get("related_klass_infos") or ():
            self._write_related(related, n, indent)
        if n == 0:
            self._write_mark(n, places, indent)
        return n

    def _adder(self, indent: str) -> Callable[[str], None]:
        return lambda line: self.lines.append(indent + line)

    def _places(self, info: Mapping[str, Any]) -> dict[str, int]:
        """The column of each attribute, in the order in which Django sets them."""
        found = {self._select[at][0].target.attname: at for at in info["select_fields"]}
        ats = list(found.values())
        if not info.get("from_parent") and ats != list(range(ats[0], ats[-1] + 1)):
            # Django takes a slice of the row.
            raise Fallback("columns")
        ordered = [f.attname for f in info["model"]._meta.concrete_fields if f.attname in found]
        if len(ordered) != len(found):
            raise Fallback("columns")
        if not info.get("from_parent") and ordered != list(found):
            raise Fallback("columns")
        return {name: found[name] for name in ordered}

    def _fields(self, model: type, n: int, places: Mapping[str, int]) -> Iterator[str]:
        kinds = {name: type(inspect.getattr_static(model, name)) for name in places}
        for kind in kinds.values():
            if kind not in _PLAIN_SETTERS and hasattr(kind, "__set__"):
                raise Fallback("descriptor")
        keys = [f"v{places[name]}" for name in places if kinds[name] is ForeignKeyDeferredAttribute]
        if keys:
            # Setting a foreign key asks whether its row is cached, which makes the cache.
            cond = " or ".join(f"{key} is not None" for key in keys)
            yield f"if {cond}: s{n}.fields_cache = {{}}"
        yield f"s{n}.adding = False"
        yield f"s{n}.db = alias"
        if self._marks.fetch_mode is not None:
            yield f"s{n}.fetch_mode = mode"
        yield f"o{n} = new(M{n})"
        if any(hasattr(kind, "__set__") for kind in kinds.values()) or any(map(iskeyword, places)):
            yield f"d = o{n}.__dict__"
            yield f"d['_state'] = s{n}"
            yield from (f"d[{name!r}] = v{at}" for name, at in places.items())
        else:
            yield f"o{n}._state = s{n}"
            yield from (f"o{n}.{name} = v{at}" for name, at in places.items())

    def _write_related(self, info: Mapping[str, Any], parent: int, indent: str) -> None:
        """What Django's `RelatedPopulator` does."""
        add, places = self._adder(indent), self._places(info)
        m = len(self.models)
        first = info["model"]._meta.pk_fields[0].attname
        if first not in places:
            raise Fallback("columns")
        add(f"if v{places[first]} is None:")
        add(f"    o{m} = None")
        add("else:")
        self.write(info, indent + "    ")
        local, remote = _cache_names(info)
        add(f"s{parent}.fields_cache[{local!r}] = o{m}")
        add(f"if o{m} is not None:")
        if remote is not None:
            add(f"    s{m}.fields_cache[{remote!r}] = o{parent}")
        self._write_mark(m, places, indent + "    ")

    def _write_mark(self, n: int, places: Mapping[str, int], indent: str) -> None:
        """What the session knows of the row comes last into its state."""
        add = self._adder(indent)
        if self._marks.is_mutable(self.models[n]):
            add(f"s{n}.asyncsession = whole(o{n})")
            return
        self.names[f"N{n}"] = tuple(places)
        ats = list(places.values())
        if ats == list(range(self._count)):
            taken = "r"
        elif ats == list(range(ats[0], ats[-1] + 1)):
            taken = f"r[{ats[0]}:{ats[-1] + 1}]"
        else:
            taken = "(" + "".join(f"v{at}, " for at in ats) + ")"
        add(f"m = s{n}.asyncsession = new(Loaded)")
        add(f"m.names = N{n}")
        add(f"m.values = {taken}")


#: Descriptors that put the value into the instance, and what they do besides is known.
_PLAIN_SETTERS: Final = frozenset({DeferredAttribute, ForeignKeyDeferredAttribute, FileDescriptor})


def _cache_names(info: Mapping[str, Any]) -> tuple[str, str | None]:
    """The names under which a row has a related one, and that one it, if it has it."""
    local, remote = info["local_setter"], info["remote_setter"]
    plain = FieldCacheMixin.set_cached_value
    if getattr(local, "__func__", None) is not plain:
        raise Fallback("query")
    there = None
    if getattr(remote, "__func__", None) is plain:
        there = remote.__self__.cache_name
    elif info["reverse"] or info["field"].unique:
        raise Fallback("query")
    return local.__self__.cache_name, there
