"""INSERT, UPDATE and DELETE beyond Django's: conflict targets and conditions, and RETURNING.

Django's compilers write the statement; this module puts the clauses behind it that they have no way
to express. Plain sync code, run by a session in its bridge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, cast

from django.db import NotSupportedError, connections, transaction
from django.db.models import AutoField, F, Manager, Model, Q, QuerySet, sql
from django.db.models.deletion import Collector
from django.db.models.expressions import Col
from django.db.models.sql.query import Query

from django_asyncsession.results import Row

from . import saving, snapshots
from .columns import Column, Operators, Setter


class Excluded(Operators, F):
    """In an upsert, the value that the row which was not inserted had for a column."""

    def resolve_expression(self, query: Any = None, *args: Any, **kwargs: Any) -> Any:
        """A column reference that says EXCLUDED, or VALUES() on MySQL."""
        found = query.resolve_ref(cast(Any, self).name, False, None, False)
        return _ExcludedCol(found.alias, found.target)


class _ExcludedCol(Col):
    def as_sql(self, compiler: Any, connection: Any) -> tuple[str, tuple[Any, ...]]:
        return f"EXCLUDED.{connection.ops.quote_name(self.target.column)}", ()

    def as_mysql(self, compiler: Any, connection: Any) -> tuple[str, tuple[Any, ...]]:
        return f"VALUES({connection.ops.quote_name(self.target.column)})", ()


def excluded(column: Column | str) -> Excluded:
    """The value that the row in conflict would have had: `.set(users.xp, excluded(users.xp))`."""
    return Excluded(path_of(column))


def path_of(name: Any) -> str:
    """The lookup path of a column, or of what already is one."""
    return str(getattr(name, "_path", name))


@dataclass(frozen=True)
class Conflict:
    """What an INSERT does with a row that breaks a unique constraint."""

    #: Columns of the constraint; none means any constraint.
    target: tuple[str, ...] = ()
    #: The condition of a partial unique index.
    target_where: Q | None = None
    #: The columns to update; none does nothing.
    updates: tuple[Setter, ...] = ()
    #: Which existing rows to update.
    update_where: Q | None = None
    #: Whether `update` or `nothing` was called.
    decided: bool = False


def insert(
    instances: Sequence[Any],
    using: str,
    conflict: Conflict | None,
    returning: tuple[Any, ...] | None,
    write: snapshots.Write,
) -> list[Any]:
    """Inserts rows, one statement per model and batch; without `save()` and its signals.

    Returns the rows, or what was asked to be returned.

    Raises:
        NotSupportedError: the database, or a model with parent tables, cannot do it.
    """
    by_model: dict[type[Model], list[Any]] = {}
    undos = [snapshots.before_write(row, write) for row in instances]
    for row in instances:
        saving.complete(row, using)
        by_model.setdefault(type(row), []).append(row)
    plans = [_plan(m, group, using, conflict, returning) for m, group in by_model.items()]
    result: list[Any] = []
    # What cannot work was refused above, outside of the block, which an error dooms.
    with saving.all_or_none(using, write):
        for plan in plans:
            result += plan()
        if conflict is None and returning is None:
            snapshots.after_write(instances, undos)
    return list(instances) if returning is None else result


def _plan(
    model: type[Model],
    group: list[Any],
    using: str,
    conflict: Conflict | None,
    returning: tuple[Any, ...] | None,
) -> Callable[[], list[Any]]:
    plain = conflict is None and returning is None
    has_parents = any(
        p._meta.concrete_model is not model._meta.concrete_model for p in _parents(model)
    )
    if has_parents and not plain:
        raise NotSupportedError(
            f"{model.__name__!r} has parent tables, so one INSERT cannot write it; "
            "use add(), without on_conflict and returning"
        )
    for row in group:
        row._prepare_related_fields_for_save(operation_name="insert")
    if has_parents:
        return partial(_insert_each, group, using)
    if plain:
        return partial(_bulk_create, model, group, using)
    return _InsertStatement(model, group, using, conflict, returning).run


def _insert_each(group: list[Any], using: str) -> list[Any]:
    for row in group:
        row.save(using=using, force_insert=True)
    saving.fetch_missing(group, using)
    return group


def _parents(model: type[Model]) -> Iterable[Any]:
    return cast(Iterable[Any], model._meta.all_parents)


def _bulk_create(model: type[Model], group: list[Any], using: str) -> list[Any]:
    if (own := _own_bulk_create(model, using)) is not None:
        own(group, None)
        saving.fetch_missing(group, using)
        return group
    features = connections[using].features
    keyless = [row for row in group if None in saving.get_pk(row)]
    if keyless and not features.can_return_rows_from_bulk_insert and model._meta.auto_field:
        # Only a single-row INSERT tells the key that the database chose.
        for row in group:
            row.save_base(using=using, force_insert=True)
    else:
        snapshots.on(model._base_manager, using).bulk_create(group)
    saving.fetch_missing(group, using)
    return group


def _own_bulk_create(model: type[Model], using: str) -> Callable[..., Any] | None:
    """That of the default manager or its QuerySet, if it is not Django's; what it inserts with is
    then the QuerySet's `_batched_insert`, given as `insert`."""
    manager = cast(Any, model._default_manager).db_manager(using)
    queryset = snapshots.on(manager, using)
    by_manager = type(manager).bulk_create.__code__ is not Manager.bulk_create.__code__
    if not by_manager and not is_own(queryset, "bulk_create"):
        return None

    def bulk_create(group: list[Any], insert: Callable[..., Any] | None, **options: Any) -> Any:
        if insert is not None:
            cast(Any, queryset)._batched_insert = insert
        # A copy, which is for this call only.
        manager.get_queryset = lambda: queryset
        return manager.bulk_create(group, **options)

    return bulk_create


def is_own(queryset: QuerySet[Any], name: str) -> bool:
    """Whether the QuerySet has a method of its own in place of Django's."""
    return name in vars(queryset) or getattr(type(queryset), name) is not getattr(QuerySet, name)


class _InsertStatement:
    """One INSERT ... ON CONFLICT ... RETURNING for rows of one model, in batches."""

    def __init__(
        self,
        model: type[Model],
        group: list[Any],
        using: str,
        conflict: Conflict | None,
        returning: tuple[Any, ...] | None,
    ):
        self.model, self.group, self.using = model, group, using
        self.conflict, self.returning = conflict, returning
        self.connection = connections[using]
        if returning is not None:
            check_returning(self.connection, "INSERT")
        self.asked = self._asked_fields()
        self.own = _own_bulk_create(model, using)

        for row in group:
            if None in saving.get_pk(row):
                row.pk = row._meta.pk.get_pk_value_on_save(row)
        with_key = [row for row in group if None not in saving.get_pk(row)]
        without = [row for row in group if None in saving.get_pk(row)]
        self.batches = [
            (batch, self._conflict_sql(batch)) for batch in (with_key, without) if batch
        ]

    def run(self) -> list[Any]:
        if self.own is not None:
            result = self._run_own(self.own)
        else:
            result = [r for batch, clause in self.batches for r in self._run_batch(batch, *clause)]
        for row in self.group:
            row._state.adding, row._state.db = False, self.using
        if self.returning is None:
            saving.fetch_missing(self.group, self.using)
        return result

    def _run_own(self, bulk_create: Callable[..., Any]) -> list[Any]:
        """By way of a `bulk_create()` that is not Django's, but comes to Django's in the end."""
        result: list[Any] = []
        came = False

        def insert(batch: list[Any], *args: Any, **options: Any) -> list[Any]:
            nonlocal came
            came = True
            result.extend(self._run_batch(batch, *self._conflict_sql(batch)))
            if self.conflict is not None:
                return []
            fields = self.model._meta.db_returning_fields
            return [tuple(row.__dict__.get(f.attname) for f in fields) for row in batch]

        # What Django then expects to be returned is nothing.
        options = {} if self.conflict is None else {"ignore_conflicts": True}
        bulk_create(self.group, insert, **options)
        if not came:
            raise NotSupportedError(
                f"the default manager of {self.model.__name__!r} has a bulk_create() that does "
                "not end in Django's, so on_conflict() and returning() cannot go through it; "
                "call it with session.run_sync()"
            )
        return result

    def _run_batch(self, batch: list[Any], suffix: str, params: tuple[Any, ...]) -> list[Any]:
        fields = [f for f in self.model._meta.concrete_fields if not f.generated]
        keyless = None in saving.get_pk(batch[0])
        columns = [f for f in fields if not (keyless and isinstance(f, AutoField))]
        size = self.connection.ops.bulk_batch_size(columns, batch)
        # The parameters of the clause count against the same limit.
        size = max(size - len(params), 1)
        result = []
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            result += self._run_one(part, columns, suffix, params)
        return result

    def _run_one(
        self, part: list[Any], fields: list[Any], suffix: str, suffix_params: tuple[Any, ...]
    ) -> list[Any]:
        query = sql.InsertQuery(self.model)
        query.insert_values(fields, part)
        compiler = query.get_compiler(using=self.using)
        ((text, params),) = compiler.as_sql()
        asked = self.asked
        found = run_returning(
            compiler, f"{text} {suffix}".rstrip(), (*params, *suffix_params), asked
        )
        if self.returning is not None:
            return shaped(self.model, self.using, asked, self.returning, found)
        if len(found) == len(part):
            for row, values in zip(part, found, strict=True):
                for column, value in zip(asked, values, strict=True):
                    setattr(row, column.attname, value)
        return part

    def _asked_fields(self) -> list[Any]:
        if self.returning is not None:
            return fields_of(self.model, self.returning)
        features = self.connection.features
        conflict = cast(Conflict, self.conflict)
        # Rows come back one for each only when every conflict ends in an update.
        if not conflict.updates or conflict.update_where is not None:
            return []
        if not features.can_return_rows_from_bulk_insert:
            return []
        made = [f for f in self.model._meta.concrete_fields if f.generated]
        return [*self.model._meta.db_returning_fields, *made]

    def _conflict_sql(self, batch: list[Any]) -> tuple[str, tuple[Any, ...]]:
        if self.conflict is None:
            return "", ()
        if not self.conflict.decided:
            raise ValueError("what to do on a conflict was not said; call update() or nothing()")
        features = self.connection.features
        clause = _ConflictClause(self.model, self.connection, self.conflict)
        if features.supports_update_conflicts_with_target:
            return clause.standard()
        if features.supports_update_conflicts:
            return clause.mysql(batch)
        raise NotSupportedError(
            f"{self.connection.display_name} has no ON CONFLICT; use update and insert"
        )


class _ConflictClause:
    """The clause of an upsert, in either of its two dialects."""

    def __init__(self, model: type[Model], connection: Any, conflict: Conflict):
        self.model, self.connection, self.conflict = model, connection, conflict
        self.quote = connection.ops.quote_name
        self.query = Query(model)
        self.query.get_initial_alias()
        self.compiler = self.query.get_compiler(connection=connection)

    def standard(self) -> tuple[str, tuple[Any, ...]]:
        """ON CONFLICT, of PostgreSQL and SQLite."""
        conflict = self.conflict
        columns = ", ".join(self.quote(f.column) for f in self._target())
        target = f"({columns}) {self._index_condition()}" if columns else ""
        if not conflict.updates:
            return f"ON CONFLICT {target} DO NOTHING", ()
        if not columns:
            raise ValueError("update() needs to know which conflict; name columns in on_conflict()")
        assignments, params = self._assignments()
        text = f"ON CONFLICT {target} DO UPDATE SET {assignments}"
        if conflict.update_where is None:
            return text, params
        where, where_params = self.compiler.compile(self._where(self.query, conflict.update_where))
        return f"{text} WHERE {where}", (*params, *where_params)

    def mysql(self, batch: list[Any]) -> tuple[str, tuple[Any, ...]]:
        """ON DUPLICATE KEY, which knows neither a target nor a condition."""
        if self.conflict.target_where is not None or self.conflict.update_where is not None:
            raise NotSupportedError(
                f"{self.connection.display_name} has no condition on conflicts; leave `where` out"
            )
        self._check_only_constraint(batch)
        if self.conflict.updates:
            assignments, params = self._assignments()
        else:
            # Not INSERT IGNORE, which would swallow every other error as well.
            key = self.quote(self.model._meta.pk_fields[0].column)
            assignments, params = f"{key} = {key}", ()
        return f"ON DUPLICATE KEY UPDATE {assignments}", params

    def _check_only_constraint(self, batch: list[Any]) -> None:
        target = frozenset(f.name for f in self._target())
        if not target:
            return
        others = {key for key in _unique_sets(self.model) if key != target}
        if all(None in saving.get_pk(row) for row in batch):
            # A key that the database chooses meets no other.
            others.discard(frozenset(f.name for f in self.model._meta.pk_fields))
        if others:
            names = " and ".join(", ".join(sorted(other)) for other in others)
            raise NotSupportedError(
                f"{self.connection.display_name} cannot tell a conflict on {sorted(target)} from "
                f"one on {names}; call on_conflict() without columns to mean any of them"
            )

    def _target(self) -> list[Any]:
        return fields_of(self.model, self.conflict.target) if self.conflict.target else []

    def _index_condition(self) -> str:
        if self.conflict.target_where is None:
            return ""
        # The database proves that this is the index's own condition, for which it needs values
        # and no parameters: Django writes the condition of the index in the same way.
        query = Query(self.model, alias_cols=False)
        where = self._where(query, self.conflict.target_where)
        text, params = query.get_compiler(connection=self.connection).compile(where)
        editor = self.connection.schema_editor()
        written = text % tuple(editor.quote_value(p) for p in params)
        return f"WHERE {written}".replace("%", "%%")

    def _where(self, query: Query, condition: Q) -> Any:
        return cast(Any, query).build_where(condition)

    def _assignments(self) -> tuple[str, tuple[Any, ...]]:
        texts: list[str] = []
        params: list[Any] = []
        for setter in self.conflict.updates:
            (target,) = fields_of(self.model, (setter.column,))
            text, more = self._value(target, setter.value)
            texts.append(f"{self.quote(target.column)} = {text}")
            params += more
        return ", ".join(texts), tuple(params)

    def _value(self, target: Any, value: Any) -> tuple[str, Sequence[Any]]:
        if hasattr(value, "resolve_expression"):
            value = value.resolve_expression(self.query, allow_joins=False, for_save=True)
        elif isinstance(value, Model):
            value = value.prepare_database_save(target)
        value = target.get_db_prep_save(value, connection=self.connection)
        return self.compiler.compile(value) if hasattr(value, "as_sql") else ("%s", [value])


def _unique_sets(model: type[Model]) -> set[frozenset[str]]:
    meta = model._meta
    found = {frozenset(f.name for f in meta.pk_fields)}
    found |= {frozenset([f.name]) for f in meta.concrete_fields if f.unique and not f.primary_key}
    found |= {frozenset(names) for names in meta.unique_together}
    # A constraint over expressions has no names, and stands for itself.
    found |= {frozenset(c.fields or [c.name]) for c in meta.total_unique_constraints}
    return found


def fields_of(model: type[Model], names: Iterable[Any]) -> list[Any]:
    """The concrete fields of the model that these columns or names mean; all when there are none.

    Raises:
        TypeError: one of them is not a column of the model's own table.
    """
    fields: list[Any] = []
    for name in names:
        path = path_of(name)
        known = {n: f for f in model._meta.concrete_fields for n in (f.name, f.attname)}
        if path == "pk":
            fields += model._meta.pk_fields
        elif path in known:
            fields.append(known[path])
        else:
            raise TypeError(
                f"{path!r} is no column of {model.__name__!r}; give columns of its table"
            )
    return fields or list(model._meta.concrete_fields)


def check_returning(connection: Any, verb: str) -> None:
    """Refuses a RETURNING that the database does not have.

    Raises:
        NotSupportedError: it does not have it; the message says what to do.
    """
    features = connection.features
    able = features.can_return_columns_from_insert and features.can_return_rows_from_bulk_insert
    if verb == "UPDATE":
        # MariaDB returns rows of INSERT and DELETE only; it is also without conflict targets.
        able = able and features.supports_update_conflicts_with_target
    if not able:
        raise NotSupportedError(
            f"{connection.display_name} has no {verb} ... RETURNING; run the statement without "
            "returning() and select the rows"
        )


def run_returning(
    compiler: Any, text: str, params: Sequence[Any], fields: Sequence[Any]
) -> list[tuple[Any, ...]]:
    """Runs the statement with RETURNING for these fields; values as a SELECT gives them."""
    connection = compiler.connection
    if fields:
        ops = connection.ops
        clause: Callable[..., Any] = getattr(ops, _RETURNING[0], None) or getattr(
            ops, _RETURNING[1]
        )
        returning, more = clause(fields)
        text, params = f"{text} {returning}", (*params, *more)
    with connection.cursor() as cursor:
        cursor.execute(text, params)
        found = cursor.fetchall() if fields else []
    table = compiler.query.get_meta().db_table
    converters = compiler.get_converters([f.get_col(table) for f in fields])
    if converters:
        found = compiler.apply_converters(found, converters)
    return [tuple(values) for values in found]


# The name since Django 6.0, and the one before.
_RETURNING: Final = ("returning_columns", "return_insert_columns")


def shaped(
    model: type[Model],
    using: str,
    fields: Sequence[Any],
    asked: tuple[Any, ...],
    found: Iterable[tuple[Any, ...]],
) -> list[Any]:
    """Returned values as `Row`s of the columns asked for, or as model rows when none were named."""
    if asked:
        names = tuple(
            f.attname if path_of(a) == f.attname else f.name for a, f in _pairs(asked, fields)
        )
        return [Row(names, values) for values in found]
    names = tuple(f.attname for f in fields)
    made = [model.from_db(using, names, values) for values in found]
    snapshots.remember(made)
    return made


def _pairs(asked: tuple[Any, ...], fields: Sequence[Any]) -> Iterable[tuple[Any, Any]]:
    if len(asked) == len(fields):
        return zip(asked, fields, strict=True)
    # `pk` of several columns.
    return ((f.name, f) for f in fields)


def update_rows(instances: Sequence[Any], using: str, write: snapshots.Write) -> int:
    """Updates loaded rows to their own values, one statement per model and batch; the count."""
    by_model: dict[type[Model], list[Any]] = {}
    for row in instances:
        by_model.setdefault(type(row), []).append(row)
    total = 0
    with saving.all_or_none(using, write):
        for model, group in by_model.items():
            undos = [snapshots.before_write(row, write) for row in group]
            names = sorted({name for row in group for name in snapshots.changed(row)})
            if names:
                total += _bulk_update(model, using)(group, names)
                saving.fetch_missing(group, using)
                snapshots.after_write(group, undos)
    return total


def _bulk_update(model: type[Model], using: str) -> Callable[..., int]:
    """That of the default manager or its QuerySet if it is not Django's; else that of the base
    manager, which finds rows that the default one hides."""
    manager = cast(Any, model._default_manager).db_manager(using)
    by_manager = type(manager).bulk_update.__code__ is not Manager.bulk_update.__code__
    queryset = snapshots.on(manager, using)
    if by_manager or is_own(queryset, "bulk_update"):
        manager.get_queryset = lambda: queryset
        return cast("Callable[..., int]", manager.bulk_update)
    return cast("Callable[..., int]", snapshots.on(model._base_manager, using).bulk_update)


def update_returning(
    queryset: QuerySet[Any], values: dict[str, Any], returning: tuple[Any, ...]
) -> list[Any]:
    """UPDATE ... RETURNING.

    Raises:
        NotSupportedError: the database has no such statement, or parent tables would be updated.
    """
    using, model = queryset.db, queryset.model
    check_returning(connections[using], "UPDATE")
    if is_own(queryset, "update"):
        return _update_and_read(queryset, values, returning)
    query = cast(Any, queryset.query).chain(sql.UpdateQuery)
    query.clear_ordering(force=True)
    query.add_update_values(values)
    query.annotations = {}
    if query.related_updates:
        raise NotSupportedError(f"{model.__name__!r} has parent tables; run without returning()")
    compiler = query.get_compiler(using=using)
    text, params = compiler.as_sql()
    fields = fields_of(model, returning)
    return shaped(model, using, fields, returning, run_returning(compiler, text, params, fields))


def _update_and_read(
    queryset: QuerySet[Any], values: dict[str, Any], returning: tuple[Any, ...]
) -> list[Any]:
    """By way of an `update()` that is not Django's: the rows are read after it."""
    using, model = queryset.db, queryset.model
    fields = fields_of(model, returning)
    with transaction.atomic(using=using, savepoint=False):
        keys = [row.pk for row in _locked(queryset)]
        queryset.filter(pk__in=keys).update(**values)
        there = {
            row.pk: row for row in snapshots.on(model._base_manager, using).filter(pk__in=keys)
        }
        found = [_values(there[key], fields) for key in keys if key in there]
    return shaped(model, using, fields, returning, found)


def delete_returning(queryset: QuerySet[Any], returning: tuple[Any, ...]) -> list[Any]:
    """DELETE ... RETURNING; where on_delete rules need more statements, the rows are read first.

    Raises:
        NotSupportedError: the database has no such statement.
    """
    using, model = queryset.db, queryset.model
    connection = connections[using]
    check_returning(connection, "DELETE")
    fields = fields_of(model, returning)
    query = cast(Any, queryset.order_by().query.clone())
    query.__class__ = sql.DeleteQuery
    compiler = query.get_compiler(using=using)
    collector = cast(Any, Collector)(using=using, origin=queryset)
    own = is_own(queryset, "delete")
    if not own and collector.can_fast_delete(queryset) and compiler.single_alias:
        text, params = compiler.as_sql()
        found = run_returning(compiler, text, params, fields)
        return shaped(model, using, fields, returning, found)
    with transaction.atomic(using=using, savepoint=False):
        there = _locked(queryset)
        values = [_values(row, fields) for row in there]
        rest = queryset if own else snapshots.on(model._base_manager, using)
        rest.filter(pk__in=[row.pk for row in there]).delete()
    return shaped(model, using, fields, returning, values)


def _locked(queryset: QuerySet[Any]) -> list[Any]:
    """The rows, locked where the database can."""
    able = connections[queryset.db].features.has_select_for_update_of
    return list(queryset.select_for_update(of=("self",)) if able else queryset)


def _values(row: Model, fields: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(getattr(row, f.attname) for f in fields)
