"""The app: what is done once when Django starts."""

from __future__ import annotations

from django.apps import AppConfig


class AsyncSessionConfig(AppConfig):
    """Lets Django's guards against blocking calls know of the bridge."""

    name = "django_asyncsession"
    verbose_name = "Async sessions"

    def ready(self) -> None:
        """Answer Django's guards, and register the system checks."""
        from . import checks  # noqa: F401
        from .bridge import answer_async_guards
        from .rows import blocked_access

        answer_async_guards(blocked_access)
