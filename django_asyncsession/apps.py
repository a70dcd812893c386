"""The app: what is done once when Django starts."""

from __future__ import annotations

from typing import Any

from django.apps import AppConfig


class AsyncSessionConfig(AppConfig):
    """Lets Django's guards against blocking calls know of the bridge, and PyMySQL stand in for
    mysqlclient."""

    name = "django_asyncsession"
    verbose_name = "Async sessions"

    def __init__(self, app_name: str, app_module: Any) -> None:
        super().__init__(app_name, app_module)
        # Not in ready(): the first model class of the project loads the backend of "default".
        from django.db import connections

        from .backends.base import import_engines, install_drivers

        engines = [entry["ENGINE"] for entry in connections.settings.values()]
        install_drivers(engines)
        import_engines(engines)

    def ready(self) -> None:
        """Answer Django's guards, before anything connects; register the system checks."""
        from . import checks  # noqa: F401
        from .bridge import answer_async_guards
        from .rows import blocked_access

        answer_async_guards(blocked_access)
