"""Django's PostgreSQL engine with an operation and a setting of its own."""

from __future__ import annotations

from typing import Any

from django.db.backends.postgresql import base, operations


class DatabaseOperations(operations.DatabaseOperations):
    """Says who it is."""

    def third_party(self) -> str:
        """What Django's own operations lack."""
        return "third party"


class DatabaseWrapper(base.DatabaseWrapper):
    """Sets a variable on each new connection."""

    ops_class = DatabaseOperations

    def init_connection_state(self) -> None:
        """As third parties do: SQL of their own when a connection is new."""
        super().init_connection_state()
        with self.cursor() as cursor:
            cursor.execute("SELECT set_config('third.party', %s, false)", ["was here"])

    def create_cursor(self, name: Any = None) -> Any:
        """Calls Django's by name, as some do."""
        return base.DatabaseWrapper.create_cursor(self, name)
