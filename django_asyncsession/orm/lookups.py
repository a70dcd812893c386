"""The lookups `like` and `ilike`, which take SQL patterns and escape nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from django.db.models.fields.json import (
    CaseInsensitiveMixin,
    KeyTransformTextLookupMixin,
)
from django.db.models.lookups import BuiltinLookup

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper
    from django.db.models.sql.compiler import SQLCompiler

    _BuiltinLookup = BuiltinLookup[Any]
else:
    _BuiltinLookup = BuiltinLookup


class Like(_BuiltinLookup):
    """SQL's LIKE with the pattern as it is; a backslash escapes on every database."""

    lookup_name = "sql_like"
    prepare_rhs = False
    operator = "LIKE"
    # Not LIKE BINARY, where `_` is a byte.
    template_mysql = "CONVERT({} USING utf8mb4) COLLATE utf8mb4_bin LIKE {} ESCAPE %s"

    def get_prep_lookup(self) -> Any:
        """The pattern as text, with a lone backslash at its end standing for itself."""
        if hasattr(self.rhs, "resolve_expression"):
            return self.rhs
        pattern = str(self.rhs)
        lone = (len(pattern) - len(pattern.rstrip("\\"))) % 2
        return pattern + "\\" if lone else pattern

    def process_lhs(
        self, compiler: SQLCompiler, connection: BaseDatabaseWrapper, lhs: Any = None
    ) -> tuple[str, Any]:
        """The column, cast to text where the database does not do it by itself."""
        sql, params = super(BuiltinLookup, self).process_lhs(compiler, connection, lhs)
        kind = self.lhs.output_field.get_internal_type()
        return connection.ops.lookup_cast("contains", kind) % sql, params

    def as_sql(self, compiler: SQLCompiler, connection: BaseDatabaseWrapper) -> tuple[str, Any]:
        """The databases where a backslash escapes by itself."""
        return self._written(compiler, connection, f"{{}} {self.operator} {{}}")

    def as_sqlite(self, compiler: SQLCompiler, connection: BaseDatabaseWrapper) -> tuple[str, Any]:
        """SQLite has no escape character unless it is named, and has LIKE in one kind only."""
        return self._written(compiler, connection, "{} LIKE {} ESCAPE '\\'")

    def as_mysql(self, compiler: SQLCompiler, connection: BaseDatabaseWrapper) -> tuple[str, Any]:
        """The escape character travels as a parameter, right under every sql_mode."""
        sql, params = self._written(compiler, connection, self.template_mysql)
        return sql, (*params, "\\")

    def _written(
        self, compiler: SQLCompiler, connection: BaseDatabaseWrapper, template: str
    ) -> tuple[str, tuple[Any, ...]]:
        left, left_params = self.process_lhs(compiler, connection)
        right, right_params = self.process_rhs(compiler, connection)
        return template.format(left, right), (*left_params, *right_params)


class ILike(Like):
    """LIKE, whatever the case."""

    lookup_name = "sql_ilike"
    operator = "ILIKE"
    template_mysql = "{} LIKE {} ESCAPE %s"


class _KeyLike(KeyTransformTextLookupMixin, Like):
    """LIKE on the text at a JSON key."""


class _KeyILike(  # type: ignore[misc]
    CaseInsensitiveMixin, KeyTransformTextLookupMixin, ILike
):
    """ILIKE on the text at a JSON key."""
