"""Native mode as the settings say, and what it needs."""

from __future__ import annotations

from typing import Any

from django.conf import settings as django_settings
from django.core.signals import request_started

from .conf import settings
from .exceptions import ConfigurationError
from .middleware import places
from .native.install import install, uninstall


def follow_settings(setting: str = "ASYNC_SESSION", **kwargs: Any) -> None:
    """Install or uninstall, as the settings say; called when Django starts and when a test changes
    them."""
    if setting == "ASYNC_SESSION":
        (install if _is_wanted() else uninstall)()
    if setting in _OF_MIDDLEWARE:
        refused = needs_middleware()
        (request_started.connect if refused else request_started.disconnect)(
            _refuse_request, dispatch_uid="django_asyncsession.native"
        )


_OF_MIDDLEWARE = {"ASYNC_SESSION", "MIDDLEWARE", "ROOT_URLCONF", "SILENCED_SYSTEM_CHECKS"}


def _is_wanted() -> bool:
    try:
        return bool(settings.NATIVE_ORM)
    except ConfigurationError:
        # A system check says so, and so does whatever asks next.
        return False


def needs_middleware() -> bool:
    """Whether requests are served in native mode without the middleware, each statement committed
    by itself: not what anybody wants who has not silenced the check."""
    return bool(
        _is_wanted()
        and getattr(django_settings, "ROOT_URLCONF", None)
        and NEEDS_MIDDLEWARE not in django_settings.SILENCED_SYSTEM_CHECKS
        and not places()
    )


NEEDS_MIDDLEWARE = "django_asyncsession.E005"


def _refuse_request(scope: Any = None, **kwargs: Any) -> None:
    """A receiver of `request_started`; a request under WSGI is none of native mode's."""
    if scope is not None:
        raise ConfigurationError(
            'ASYNC_SESSION["NATIVE_ORM"] is on and the middleware is not in MIDDLEWARE, so a view '
            "that raises would keep what it wrote; put "
            "'django_asyncsession.middleware.AsyncSessionMiddleware' first in MIDDLEWARE"
        )
