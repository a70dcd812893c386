"""The app: what is done once when Django starts."""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig
from django.core.signals import setting_changed


class AsyncSessionConfig(AppConfig):
    """Lets Django's guards against blocking calls know of the bridge, PyMySQL stand in for
    mysqlclient, and with NATIVE_ORM Django's async methods know of the current session."""

    name = "django_asyncsession"
    verbose_name = "Async sessions"

    def __init__(self, app_name: str, app_module: Any) -> None:
        super().__init__(app_name, app_module)
        # Not in ready(): the first model class of the project loads the backend of "default".
        from django.db import connections as django_connections

        from . import connections
        from .backends.base import import_engines, install_drivers

        connections.install()
        engines = [entry["ENGINE"] for entry in django_connections.settings.values()]
        install_drivers(engines)
        import_engines(engines)

    def ready(self) -> None:
        """Answer Django's guards, before anything connects; register the system checks, and turn
        native mode on if it is set."""
        from . import checks, threadlocals  # noqa: F401
        from .bridge import answer_async_guards
        from .guards import explain
        from .native import follow_settings

        answer_async_guards(explain)
        follow_settings()
        setting_changed.connect(follow_settings)
        setting_changed.connect(threadlocals.follow_settings)
