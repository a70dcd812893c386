"""Which of Django's modules native mode routes into the current session, and why each is safe."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import django
from django.apps import apps

# The versions of Django whose modules were read, and whose own tests of async code pass.
VERIFIED = {(5, 2), (6, 0), (6, 1)}


@dataclasses.dataclass(frozen=True)
class Route:
    """A module of Django whose `sync_to_async` is routed.

    Args:
        module: its name.
        why: why what it runs in a thread may run on the event loop's thread instead.
        applies: for modules where this depends on what is called.
    """

    module: str
    why: str
    applies: Callable[[Any], bool] = lambda fn: True

    @property
    def is_wanted(self) -> bool:
        """Whether the module can be imported: those of an app only when it is installed."""
        package = self.module.split(".")
        return package[1] != "contrib" or apps.is_installed(".".join(package[:3]))


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


def _is_middleware_of_database_sessions(fn: Any) -> bool:
    from django.contrib.sessions.backends.db import SessionStore
    from django.contrib.sessions.middleware import SessionMiddleware

    owner = getattr(fn, "__self__", None)
    return isinstance(owner, SessionMiddleware) and issubclass(owner.SessionStore, SessionStore)


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
        "calls sync receivers, which save() and its kin call in the session as well",
    ),
    Route(
        "django.utils.deprecation",
        "the session's middleware, which saves what the request's transaction has made",
        applies=_is_middleware_of_database_sessions,
    ),
)
