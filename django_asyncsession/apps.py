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
        from . import connections
        from .backends.engines import install_drivers

        connections.install()
        install_drivers(_engines())

    def ready(self) -> None:
        """Answer Django's guards, before anything connects; import the engines, which may need
        models; register the system checks, and turn native mode on if it is set."""
        from . import checks, threadlocals  # noqa: F401
        from .activation import follow_settings
        from .backends.engines import import_engines
        from .bridge import answer_async_guards
        from .guards import explain
        from .observe import slow as statements

        answer_async_guards(explain)
        import_engines(_engines())
        follow_settings()
        setting_changed.connect(follow_settings)
        statements.follow_settings()
        setting_changed.connect(statements.follow_settings)
        setting_changed.connect(threadlocals.follow_settings)


def _engines() -> list[str]:
    from django.db import connections

    return [entry["ENGINE"] for entry in connections.settings.values()]
