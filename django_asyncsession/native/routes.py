"""Which of Django's modules native mode routes into the current session, and why each is safe."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import django
from django.apps import apps
from django.core.handlers.exception import convert_exception_to_response
from django.core.signals import request_finished, request_started
from django.http import HttpResponse
from django.http.response import HttpResponseBase
from django.template.response import SimpleTemplateResponse

from django_asyncsession.conf import settings

# The versions of Django whose modules were read; Django's own tests of async code run in sessions
# on the oldest and the newest.
VERIFIED = {(5, 2), (6, 0), (6, 1)}


@dataclasses.dataclass(frozen=True)
class Route:
    """A module of Django whose `sync_to_async` is routed.

    Args:
        module: its name.
        why: why what it runs in a thread may run on the event loop's thread instead.
        applies: for modules where this depends on what is called.
        outside: for what also has no thread where there is no current session: each statement
            commits by itself there.
        app: the app that a module belongs to, if it can be imported only when that is installed.
    """

    module: str
    why: str
    applies: Callable[[Any], bool] = lambda fn: True
    outside: Callable[[Any], bool] = lambda fn: False
    app: str = ""

    @property
    def is_wanted(self) -> bool:
        """Whether the module can be imported."""
        package = self.module.split(".")
        app = ".".join(package[:3]) if package[:2] == ["django", "contrib"] else self.app
        return find_spec(package[0]) is not None and (not app or apps.is_installed(app))


def is_verified() -> bool:
    """Whether the routes were verified with this version of Django."""
    return django.VERSION[:2] in VERIFIED


def keep_thread(fn: Any) -> Any:
    """Mark a view, a middleware or any other function, method or class, so that native mode leaves
    it in Django's thread: it waits for something that is not the database, or computes for long.

    Returns:
        The same object.
    """
    fn.keep_thread = True
    return fn


def keeps_thread(fn: Any) -> bool:
    """Whether a function, or the object or the view class that it belongs to, has opted out."""
    owners = (fn, getattr(fn, "__self__", None), getattr(fn, "view_class", None))
    return any(getattr(owner, "keep_thread", False) for owner in owners)


# What applies to some calls of a module only


def _is_of_database_session(fn: Any) -> bool:
    from django.contrib.sessions.backends.db import SessionStore

    return _belongs_to(fn, SessionStore)


def _is_of_database_cache(fn: Any) -> bool:
    from django.core.cache.backends.db import BaseDatabaseCache

    return _belongs_to(fn, BaseDatabaseCache)


def _is_part_of_middleware(fn: Any) -> bool:
    """The sync parts of Django's own middleware; with NATIVE_MIDDLEWARE, but for sessions in the
    database: those are saved with what the request's transaction made."""
    from django.contrib.sessions.backends import db, signed_cookies
    from django.contrib.sessions.middleware import SessionMiddleware

    owner = getattr(fn, "__self__", None)
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(owner).__mro__}
    if not isinstance(owner, SessionMiddleware):
        return bool(settings.NATIVE_MIDDLEWARE and names & MIDDLEWARE.keys())
    if issubclass(owner.SessionStore, db.SessionStore):
        return True
    in_cookies = issubclass(owner.SessionStore, signed_cookies.SessionStore)
    return bool(settings.NATIVE_MIDDLEWARE and in_cookies)


def _is_run_by_handler(fn: Any) -> bool:
    """The rendering of a template response; with NATIVE_MIDDLEWARE sync views too, and what
    Django's own middleware does around them."""
    owner, name = getattr(fn, "__self__", None), getattr(fn, "__name__", "")
    if isinstance(owner, SimpleTemplateResponse):
        return True
    if name in ("process_view", "process_template_response"):
        return _is_part_of_middleware(fn)
    is_whole_middleware = getattr(fn, "__code__", None) is _HANDLER_OF_MIDDLEWARE
    return bool(settings.NATIVE_MIDDLEWARE) and not is_whole_middleware


# What a sync-only middleware of any origin becomes: it has the rest of the request inside.
_HANDLER_OF_MIDDLEWARE = convert_exception_to_response(lambda request: HttpResponse()).__code__


def _ends_response(fn: Any) -> bool:
    """`HttpResponse.close`, which closes uploaded files and tells the receivers of
    `request_finished`."""
    return bool(settings.NATIVE_MIDDLEWARE) and isinstance(
        getattr(fn, "__self__", None), HttpResponseBase
    )


def _is_wanted_without_thread(fn: Any) -> bool:
    """What is the project's own code, as a sync view is."""
    return bool(settings.NATIVE_MIDDLEWARE)


def _is_signal_of_request(fn: Any) -> bool:
    """The receivers of the signals at the begin and the end of a request."""
    if not settings.NATIVE_MIDDLEWARE:
        return False
    cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
    signal = next((cell.cell_contents for name, cell in cells if name == "self"), None)
    return signal in (request_started, request_finished)


def _belongs_to(fn: Any, cls: type) -> bool:
    """Whether `fn` is a method, or a class method, of a subclass of `cls`."""
    owner = getattr(fn, "__self__", None)
    return isinstance(owner, cls) or (inspect.isclass(owner) and issubclass(owner, cls))


ROUTES = (
    Route("django.db.models.query", "methods of QuerySet: each waits for the database only"),
    Route("django.db.models.base", "save, delete and refresh: each waits for the database only"),
    Route(
        "django.db.models.fields.related_descriptors",
        "methods of related managers: each waits for the database only",
    ),
    Route(
        "django.contrib.contenttypes.fields",
        "methods of generic related managers: each waits for the database only",
    ),
    Route("django.core.paginator", "makes a list of a queryset; from Django 6.0"),
    Route(
        "django.contrib.auth.backends",
        "finds users and permissions in the database; a project's backend that waits for another "
        "server opts out with @keep_thread",
    ),
    Route("django.contrib.auth.decorators", "asks for permissions, as the backends do"),
    Route("django.contrib.sessions.backends.db", "saves a session in one transaction"),
    Route(
        "django.contrib.sessions.backends.base",
        "the sessions in the database; those in files or in a cache keep their thread",
        applies=_is_of_database_session,
    ),
    Route(
        "django.core.cache.backends.base",
        "the cache in the database; the others keep their thread",
        applies=_is_of_database_cache,
    ),
    Route(
        "django.dispatch.dispatcher",
        "calls sync receivers, which save() and its kin call in the session as well; with "
        "NATIVE_MIDDLEWARE also those of a request's begin and end, where Django closes files and "
        "old connections",
        outside=_is_signal_of_request,
    ),
    Route(
        "django.utils.deprecation",
        "parts of Django's own middleware: see MIDDLEWARE; those of other packages keep their "
        "thread",
        applies=_is_part_of_middleware,
    ),
    Route(
        "django.core.handlers.base",
        "renders template responses, and with NATIVE_MIDDLEWARE runs sync views; a view that waits "
        "for something else than the database opts out with @keep_thread",
        applies=_is_run_by_handler,
    ),
    Route(
        "django.core.handlers.asgi",
        "closes responses, with NATIVE_MIDDLEWARE; files that are uploaded or sent keep their "
        "thread",
        applies=_ends_response,
        outside=_ends_response,
    ),
    Route(
        "channels.db",
        "before each message, closes old connections of Django's own, of which a session has none",
    ),
    Route(
        "adrf.views",
        "with NATIVE_MIDDLEWARE, authentication, permissions, throttles and sync handlers; a view "
        "where they wait for something else than the database opts out with @keep_thread",
        applies=_is_wanted_without_thread,
        app="rest_framework",
    ),
    Route(
        "adrf.generics",
        "permissions for an object, filters and pages: they ask the database",
        app="rest_framework",
    ),
    Route(
        "adrf.mixins",
        "validates and serializes: what it asks the database must be asked in the transaction",
        app="rest_framework",
    ),
    Route(
        "adrf.serializers",
        "reads attributes of rows, among them relations, which the transaction may have made",
        app="rest_framework",
    ),
)

# Django's own middleware whose sync parts run without a thread with NATIVE_MIDDLEWARE, and what
# they wait for. Not those of the cache, which may be on another server, nor the one that mails.
MIDDLEWARE = {
    "django.contrib.sessions.middleware.SessionMiddleware": "the database, or nothing",
    "django.contrib.auth.middleware.AuthenticationMiddleware": "nothing: the user is loaded later",
    "django.contrib.auth.middleware.LoginRequiredMiddleware": "the database",
    "django.contrib.auth.middleware.RemoteUserMiddleware": "the database",
    "django.contrib.messages.middleware.MessageMiddleware": "nothing: messages go to the session",
    "django.contrib.flatpages.middleware.FlatpageFallbackMiddleware": "the database",
    "django.contrib.redirects.middleware.RedirectFallbackMiddleware": "the database",
    "django.contrib.sites.middleware.CurrentSiteMiddleware": "the database",
    "django.contrib.admindocs.middleware.XViewMiddleware": "nothing",
    "django.middleware.clickjacking.XFrameOptionsMiddleware": "nothing",
    "django.middleware.common.CommonMiddleware": "nothing",
    "django.middleware.csp.ContentSecurityPolicyMiddleware": "nothing",
    "django.middleware.csrf.CsrfViewMiddleware": "nothing",
    "django.middleware.gzip.GZipMiddleware": "nothing: it computes",
    "django.middleware.http.ConditionalGetMiddleware": "nothing: it computes",
    "django.middleware.locale.LocaleMiddleware": "nothing",
    "django.middleware.security.SecurityMiddleware": "nothing",
}
