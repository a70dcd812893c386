"""Says that the package is used without its app: as long as it is not there, none of its checks
runs."""

from __future__ import annotations

from typing import Any, Final

import django.utils.asyncio
from django.apps import apps
from django.conf import settings
from django.core.checks import CheckMessage, Error, Tags, register
from django.core.management.base import CommandError

from .bridge import get_running_loop
from .exceptions import ConfigurationError

PROBLEM: Final = "django_asyncsession is used without its app"
REMEDY: Final = "add 'django_asyncsession' to INSTALLED_APPS, and call django.setup() in a script"
MISSING: Final = "django_asyncsession.E008"


class AppMissingError(ConfigurationError, CommandError):
    """The package is imported without its app; a management command, `check` for example, shows
    it without a traceback."""


def is_installed() -> bool:
    """Whether the app was there when Django started."""
    return django.utils.asyncio.get_running_loop is get_running_loop  # type: ignore[attr-defined]


def check_installed() -> None:
    """Refuse to go on where Django's guards would refuse whatever is called, with advice that does
    not help.

    Raises:
        ConfigurationError: the app is not in INSTALLED_APPS, or Django has not started.
    """
    if not is_installed():
        raise ConfigurationError(f"{PROBLEM}; {REMEDY}")


def check_import() -> None:
    """Refuse to be imported without the app, as Django does with a model whose app is missing.

    Raises:
        AppMissingError: Django has started without the app. No check can be added to those that
            `check` runs already when it imports this.
    """
    if apps.ready and not is_installed():
        raise AppMissingError(f"({MISSING}) {PROBLEM}; {REMEDY}")


def check_app(**kwargs: Any) -> list[CheckMessage]:
    """E008: the project is set up for the package, but its app is missing."""
    if is_installed() or not _is_wanted():
        return []
    return [Error(f"{PROBLEM}.", hint=f"{REMEDY[0].upper()}{REMEDY[1:]}.", id=MISSING)]


def _is_wanted() -> bool:
    return hasattr(settings, "ASYNC_SESSION") or any(
        name.startswith("django_asyncsession.") for name in settings.MIDDLEWARE
    )


if not apps.ready:
    # Of those that are imported when Django starts, by the models for example.
    register(check_app, Tags.compatibility)
elif _is_wanted():
    check_import()
