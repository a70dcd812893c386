"""The DDL session: changes and describes the schema with Django's own schema editor."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar, cast

from django.apps import apps
from django.apps.registry import Apps
from django.db import ProgrammingError, connections, models
from django.db.models import Field, Model

from .orm.columns import Column
from .orm.tables import RowTable, model_of
from .orm.writes import path_of
from .session.lifecycle import Database
from .session.session import Session

T = TypeVar("T")


class Bind(Database, Protocol):
    """What changing the schema needs of a database."""

    @property
    def features(self) -> Any: ...


Table = type[Model] | RowTable[Any] | str


@dataclass(frozen=True, slots=True)
class ColumnInfo:
    """A column as the database has it."""

    table: str
    name: str
    #: The Django field that fits the column's type, such as "CharField".
    type: str
    nullable: bool
    primary_key: bool
    #: The default as the database writes it, None without one.
    default: Any
    max_length: int | None


@dataclass(frozen=True, slots=True)
class IndexInfo:
    """An index or a constraint as the database has it."""

    table: str
    name: str
    columns: tuple[str, ...]
    unique: bool
    primary_key: bool
    #: Table and column that a foreign key refers to.
    foreign_key: tuple[str, str] | None
    check: bool


class DDLSession:
    """Changes the schema: `async with db.get_ddl_session() as ddl: await ddl.create_table(Book)`.

    Where the database can roll back changes of the schema and nothing else stands against it
    (PostgreSQL), the block is one transaction; elsewhere each call stands for itself, and is
    complete or not there (SQLite), or is what the database leaves of it (MySQL).

    A table is a model, a row table or a name; names also work for tables that no model has.
    """

    def __init__(self, bind: Bind) -> None:
        self.bind = bind
        self.alias = bind.alias
        features = bind.features
        together = features.can_rollback_ddl and features.atomic_transactions
        self._session = Session(bind, autocommit=not together)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.alias!r} {self._session.state.value}>"

    async def begin(self) -> Self:
        """Begins; `async with` does it."""
        await self._session.begin()
        return self

    start = begin

    async def commit(self) -> Self:
        """Makes the changes final, where they were not yet."""
        if not self._session.autocommit:
            await self._session.commit()
        return self

    async def rollback(self) -> Self:
        """Takes the changes back, where the database can."""
        if not self._session.autocommit:
            await self._session.rollback()
        return self

    async def close(self) -> None:
        """Ends the session; what was not committed is taken back where the database can."""
        await self._session.close()

    async def __aenter__(self) -> Self:
        await self._session.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._session.__aexit__(kind, error, traceback)

    async def create_table(
        self, table: Table, *, if_not_exists: bool = True, **columns: Field[Any, Any]
    ) -> None:
        """Creates the table of a model, with its indexes, constraints and many-to-many tables; or
        a table of this name with these columns.
        """

        def create(editor: Any) -> None:
            name = _table_name(table)
            if if_not_exists and name in editor.connection.introspection.table_names():
                return
            model = _new_model(name, columns) if isinstance(table, str) else model_of(table)
            editor.create_model(model)

        if isinstance(table, str) and not columns:
            raise TypeError(f"create_table({table!r}) has no columns; give columns, or a model")
        await self._edit(create)

    async def drop_table(
        self, table: Table, *, cascade: bool = False, if_exists: bool = True
    ) -> None:
        """Drops the table and its many-to-many tables; `cascade` also drops what refers to it."""

        def drop(editor: Any) -> None:
            there = _table_name(table) in editor.connection.introspection.table_names()
            if not there and if_exists:
                return
            if not cascade:
                # Django's own statement says CASCADE on some databases.
                editor.sql_delete_table = "DROP TABLE %(table)s"
            editor.delete_model(_as_it_is(editor.connection, table))

        await self._edit(drop)

    async def rename_table(self, table: Table, new_name: str) -> None:
        """Gives the table another name."""
        await self._edit(
            lambda editor: editor.alter_db_table(
                _as_it_is(editor.connection, table), _table_name(table), new_name
            )
        )

    async def add_column(
        self, table: Table, column: Column | str, field: Field[Any, Any] | None = None
    ) -> None:
        """Adds a column: one that the model declares, or a new name with its field.

        Existing rows get the field's default.
        """

        def add(editor: Any) -> None:
            before = _as_it_is(editor.connection, table)
            name, new = _declared(table, column) if field is None else (str(column), field)
            after = _like(before, {name: new})
            editor.add_field(before, after._meta.get_field(name))

        await self._edit(add)

    async def drop_column(self, table: Table, column: Column | str) -> None:
        """Drops a column and what is in it."""

        def drop(editor: Any) -> None:
            model = _as_it_is(editor.connection, table)
            name = _field_of(model, column).name
            model = _drop_from_indexes(editor, _like(model, {}), name)
            editor.remove_field(model, _field_of(model, name))

        await self._edit(drop)

    async def alter_column_type(
        self, table: Table, column: Column | str, new_type: Field[Any, Any]
    ) -> None:
        """Makes the column one of this field: its type, its nullability, its default."""
        await self._edit(lambda editor: _alter(editor, table, column, copy.deepcopy(new_type)))

    async def create_index(
        self,
        table: Table,
        name: str,
        *columns: Column | str,
        unique: bool = False,
        if_not_exists: bool = False,
    ) -> None:
        """Creates an index on the columns, with `unique` a unique constraint."""

        def create(editor: Any) -> None:
            model = _as_it_is(editor.connection, table)
            if if_not_exists and name in _constraints(editor.connection, model._meta.db_table):
                return
            fields = [_field_of(model, column).name for column in columns]
            if unique:
                constraint = models.UniqueConstraint(fields=fields, name=name)
                # SQLite makes the table anew, from what the model says.
                model = _like(model, {}, constraint)
                editor.add_constraint(model, constraint)
            else:
                editor.add_index(model, models.Index(fields=fields, name=name))

        await self._edit(create)

    async def drop_index(self, table: Table, name: str) -> None:
        """Drops an index or a unique constraint.

        Raises:
            ProgrammingError: the table has none of this name.
        """

        def drop(editor: Any) -> None:
            model = _as_it_is(editor.connection, table)
            found = _constraints(editor.connection, model._meta.db_table).get(name)
            if found is None:
                raise ProgrammingError(f"no index {name!r} on {model._meta.db_table!r}")
            fields = [_field_of(model, column).name for column in found["columns"]]
            if found["unique"] and len(fields) == 1 and _field_of(model, fields[0]).unique:
                plain: Any = copy.deepcopy(_field_of(model, fields[0]))
                plain._unique = False
                # The property caches itself.
                plain.__dict__.pop("unique", None)
                _alter(editor, table, fields[0], plain)
            elif found["unique"]:
                gone = models.UniqueConstraint(fields=fields, name=name)
                editor.remove_constraint(_like(model, {}, without=name), gone)
            else:
                editor.remove_index(model, models.Index(fields=fields, name=name))

        await self._edit(drop)

    async def add_foreign_key(
        self,
        table: Table,
        column: Column | str,
        foreign_table: Table,
        foreign_column: Column | str = "pk",
    ) -> None:
        """Makes the column a foreign key; it takes the type of the column that it refers to."""

        def add(editor: Any) -> None:
            target = _as_it_is(editor.connection, foreign_table)
            to_field = _field_of(target, foreign_column).name
            reference: Any = models.ForeignKey(target, models.DO_NOTHING, to_field=to_field)
            _alter(editor, table, column, reference)

        await self._edit(add)

    async def get_tables(self) -> list[str]:
        """Names of all tables."""
        return await self._read(lambda connection: connection.introspection.table_names())

    async def get_columns(self, table: Table | None = None) -> list[ColumnInfo]:
        """The columns of a table, or of all."""
        return await self._read(lambda c: [i for n in _names(c, table) for i in _columns(c, n)])

    async def get_indexes(self, table: Table | None = None) -> list[IndexInfo]:
        """The indexes and constraints of a table, or of all."""
        return await self._read(lambda c: [i for n in _names(c, table) for i in _indexes(c, n)])

    async def execute(self, sql: str, params: Any = None) -> int:
        """Runs a statement that has no method here."""
        return await self._session.execute(sql, params)

    async def _edit(self, change: Callable[[Any], None]) -> None:
        def edit() -> None:
            connection = connections[self.alias]
            # The schema editor composes some SQL with the driver outside of Django's translation
            # of errors.
            with (
                quoting_whole(connection),
                connection.wrap_database_errors,
                connection.schema_editor() as editor,
            ):
                change(editor)

        await self._session.run_sync(edit)

    async def _read(self, read: Callable[[Any], T]) -> T:
        def read_quoted() -> T:
            connection = connections[self.alias]
            with quoting_whole(connection):
                return read(connection)

        return await self._session.run_sync(read_quoted)


class Quoted(str):
    """A name in its quotes, which is not quoted again."""


@contextmanager
def quoting_whole(connection: Any) -> Iterator[None]:
    """Quote each name whole, with the quotes in it doubled.

    Django takes a name that begins and ends with a quote for one that is quoted already. That is
    kept for the tables of the project's models, and for what its introspection of constraints
    takes from the database's own text.
    """
    ops, introspection = connection.ops, connection.introspection
    own_quote, own_constraints = ops.quote_name, introspection.get_constraints
    quote = own_quote("x")[0]

    def quote_name(name: str) -> str:
        if isinstance(name, Quoted):
            return name
        if "\0" in name:
            raise ValueError(f"{name!r} cannot name anything in a database; leave the NUL out")
        if name.startswith(quote) and name in _model_tables():
            return str(own_quote(name))
        return Quoted(quote + name.replace(quote, 2 * quote) + quote)

    def get_constraints(cursor: Any, table_name: str) -> Any:
        ops.quote_name = lambda name: (quote_name if name == table_name else own_quote)(name)
        try:
            return own_constraints(cursor, table_name)
        finally:
            ops.quote_name = quote_name

    ops.quote_name, introspection.get_constraints = quote_name, get_constraints
    try:
        yield
    finally:
        del ops.quote_name, introspection.get_constraints


def _model_tables() -> set[str]:
    return {model._meta.db_table for model in apps.get_models(include_auto_created=True)}


def _table_name(table: Table) -> str:
    return table if isinstance(table, str) else model_of(table)._meta.db_table


def _names(connection: Any, table: Table | None) -> Iterable[str]:
    return connection.introspection.table_names() if table is None else [_table_name(table)]


def _columns(connection: Any, table: str) -> list[ColumnInfo]:
    with connection.cursor() as cursor:
        described = connection.introspection.get_table_description(cursor, table)
        keys = connection.introspection.get_primary_key_columns(cursor, table) or []
    return [
        ColumnInfo(
            table=table,
            name=info.name,
            type=_field_type(connection, info),
            nullable=bool(info.null_ok),
            primary_key=info.name in keys,
            default=info.default,
            max_length=_max_length(info),
        )
        for info in described
    ]


def _field_type(connection: Any, info: Any) -> str:
    try:
        return str(connection.introspection.get_field_type(info.type_code, info))
    except KeyError:
        # A type that Django has no field for.
        return "TextField"


def _max_length(info: Any) -> int | None:
    size = info.display_size
    return int(size) if size and int(size) > 0 else None


def _indexes(connection: Any, table: str) -> list[IndexInfo]:
    return [
        IndexInfo(
            table=table,
            name=name,
            columns=tuple(found["columns"] or ()),
            unique=bool(found["unique"]),
            primary_key=bool(found["primary_key"]),
            foreign_key=found["foreign_key"],
            check=bool(found["check"]),
        )
        for name, found in _constraints(connection, table).items()
    ]


def _constraints(connection: Any, table: str) -> dict[str, Any]:
    with connection.cursor() as cursor:
        return cast("dict[str, Any]", connection.introspection.get_constraints(cursor, table))


def _as_it_is(connection: Any, table: Table) -> type[Model]:
    """A model of the table as the database has it now: the schema editor goes by models.

    Columns that a model of the project describes are taken from there, others from the database.

    Raises:
        ProgrammingError: there is no such table.
    """
    name = _table_name(table)
    there = _columns(connection, name) if name in connection.introspection.table_names() else []
    if not there:
        raise ProgrammingError(
            f"no table {name!r} in {connection.alias!r}; create_table() makes one"
        )
    known = _known_model(table)
    fields = {f.column: f for f in known._meta.local_concrete_fields} if known else {}
    if known is not None and list(fields) == [info.name for info in there]:
        return known
    constraints = _constraints(connection, name)
    body = {}
    for info in there:
        field = fields.get(info.name) or _field_from(info, constraints)
        body[field.name or _identifier(info.name)] = field
    return _new_model(name, body, known, constraints)


def _known_model(table: Table) -> type[Model] | None:
    if not isinstance(table, str):
        return model_of(table)
    every = apps.get_models(include_auto_created=True)
    return next((m for m in every if m._meta.db_table == table and not m._meta.proxy), None)


def _identifier(column: str) -> str:
    return re.sub(r"\W|__+|_$", "_", column).strip("_").lower() or "column"


def _field_from(info: ColumnInfo, constraints: dict[str, Any]) -> Field[Any, Any]:
    alone = [c for c in constraints.values() if c["columns"] == [info.name]]
    options: dict[str, Any] = {"db_column": info.name, "null": info.nullable}
    options["primary_key"] = info.primary_key
    if not info.primary_key:
        options["unique"] = any(c["unique"] for c in alone)
        options["db_index"] = any(c["index"] and not c["unique"] for c in alone)
    kind = getattr(models, info.type)
    if issubclass(kind, models.DecimalField):
        options |= {"max_digits": 30, "decimal_places": 10}
    if issubclass(kind, models.CharField):
        options["max_length"] = info.max_length
    if issubclass(kind, models.AutoField | models.BigAutoField) and not info.primary_key:
        kind = models.BigIntegerField
    return cast("Field[Any, Any]", kind(**options))


def _new_model(
    table: str,
    fields: dict[str, Any],
    known: type[Model] | None = None,
    constraints: dict[str, Any] | None = None,
) -> type[Model]:
    """A model that exists for the schema editor only, in a registry of its own."""
    body: dict[str, Any] = {name: copy.deepcopy(field) for name, field in fields.items()}
    for number, field in enumerate(body.values()):
        _resolve(field)
        # Columns come in the order in which their fields were made.
        field.creation_counter = number
    if not any(field.primary_key for field in body.values()):
        # Without one Django would add a column of its own.
        next(iter(body.values())).primary_key = True
    options: dict[str, Any] = {"db_table": table, "apps": Apps()}
    options["app_label"] = "django_asyncsession"
    if known is not None:
        options |= _kept_options(known, set(fields))
    else:
        options |= _found_options(body, constraints or {})
    body |= {"Meta": type("Meta", (), options), "__module__": __name__}
    return type(f"Table_{_identifier(table)}", (Model,), body)


def _kept_options(known: type[Model], names: set[str]) -> dict[str, Any]:
    meta = known._meta
    return {
        "indexes": [i for i in meta.indexes if names >= set(i.fields)],
        "constraints": [c for c in meta.constraints if names >= set(getattr(c, "fields", ()))],
        "unique_together": [u for u in meta.unique_together if names >= set(u)],
    }


def _found_options(fields: dict[str, Any], constraints: dict[str, Any]) -> dict[str, Any]:
    """Indexes and unique constraints of several columns; those of one are options of its field."""
    names = {field.db_column or name: name for name, field in fields.items()}
    indexes: list[Any] = []
    unique: list[Any] = []
    for name, found in constraints.items():
        columns = found["columns"] or []
        if len(columns) < 2 or found["primary_key"] or not names.keys() >= set(columns):
            continue
        over = [names[column] for column in columns]
        if found["unique"]:
            unique.append(models.UniqueConstraint(fields=over, name=name))
        elif found["index"]:
            indexes.append(models.Index(fields=over, name=name))
    return {"indexes": indexes, "constraints": unique}


def _resolve(field: Any) -> None:
    """Looks the target of a foreign key up in the project: the registry of its own knows none."""
    remote = field.remote_field
    if remote is not None and isinstance(remote.model, str) and "." in remote.model:
        remote.model = apps.get_model(remote.model)
        remote.field_name = remote.field_name or remote.model._meta.pk.name


def _like(
    model: type[Model],
    changed: dict[str, Any],
    constraint: models.UniqueConstraint | None = None,
    without: str | None = None,
) -> type[Model]:
    """The model with other fields, one more constraint, or one fewer."""
    fields: dict[str, Any] = {f.name: f for f in model._meta.local_concrete_fields}
    after = _new_model(model._meta.db_table, {**fields, **changed}, model)
    kept = [c for c in after._meta.constraints if c.name != without]
    after._meta.constraints = [*kept, *([constraint] if constraint else [])]
    return after


def _drop_from_indexes(editor: Any, model: type[Model], name: str) -> type[Model]:
    """Drops what else stands on a column that is to go, which not every database does itself."""
    for index in model._meta.indexes:
        if name in index.fields:
            editor.remove_index(model, index)
    model._meta.indexes = [i for i in model._meta.indexes if name not in i.fields]
    for constraint in list(model._meta.constraints):
        if name in getattr(constraint, "fields", ()):
            model = _like(model, {}, without=constraint.name)
            editor.remove_constraint(model, constraint)
    return model


def _field_of(model: type[Model], column: Column | str) -> Any:
    """The field of a column, by its own name or that of the column.

    Raises:
        ProgrammingError: the table has no such column.
    """
    name = path_of(column)
    if name == "pk":
        return model._meta.pk
    for field in model._meta.local_concrete_fields:
        if name in (field.column, field.name, field.attname):
            return field
    raise ProgrammingError(f"no column {name!r} in table {model._meta.db_table!r}")


def _declared(table: Table, column: Column | str) -> tuple[str, Any]:
    if isinstance(table, str):
        raise TypeError(f"add_column({table!r}, {column!r}) has no field; give one")
    field = _field_of(model_of(table), column)
    return field.name, field


def _alter(editor: Any, table: Table, column: Column | str, new: Any) -> None:
    before = _as_it_is(editor.connection, table)
    old = _field_of(before, column)
    new.db_column = old.column
    if new.is_relation:
        new.null = new.null or old.null
    after = _like(before, {old.name: new})
    editor.alter_field(before, old, after._meta.get_field(old.name))
