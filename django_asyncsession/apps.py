"""The app: what is done once when Django starts."""

from __future__ import annotations

from django.apps import AppConfig


class AsyncSessionConfig(AppConfig):
    """Lets Django's guards against blocking calls know of the bridge, and PyMySQL stand in for
    mysqlclient."""

    name = "django_asyncsession"
    verbose_name = "Async sessions"

    def ready(self) -> None:
        """Answer Django's guards and install the drivers, before anything connects; register the
        system checks."""
        from django.db import connections

        from . import checks  # noqa: F401
        from .backends.base import install_drivers
        from .bridge import answer_async_guards
        from .rows import blocked_access

        answer_async_guards(blocked_access)
        install_drivers(entry["ENGINE"] for entry in connections.settings.values())
