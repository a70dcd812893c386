"""System checks: what in a project's settings cannot work, or would hurt later."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import django
from asgiref.sync import async_to_sync
from django.apps import apps
from django.conf import settings as django_settings
from django.core.checks import CheckMessage, Error, Tags, Warning, register
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, connections
from django.utils.module_loading import import_string

from . import threadlocals
from .activation import NEEDS_MIDDLEWARE, needs_middleware
from .backends.engines import bridged_class
from .conf import DEFAULTS, problems_of
from .conf import settings as own_settings
from .exceptions import ConfigurationError
from .middleware import places
from .native.routes import VERIFIED, is_verified

MIDDLEWARE = "django_asyncsession.middleware.AsyncSessionMiddleware"
# Django's own middleware that reads the database, so must find the session begun.
DATABASE_MIDDLEWARE = {
    "django.contrib.sessions.middleware.SessionMiddleware",
    "django.contrib.auth.middleware.AuthenticationMiddleware",
    "django.contrib.auth.middleware.LoginRequiredMiddleware",
    "django.contrib.flatpages.middleware.FlatpageFallbackMiddleware",
    "django.contrib.redirects.middleware.RedirectFallbackMiddleware",
    "django.contrib.sites.middleware.CurrentSiteMiddleware",
}
# The oldest versions that work, by distribution; those of drivers count only for their engine.
MINIMUM = {"greenlet": (3, 5, 4), "asgiref": (3, 8, 1)}
DRIVERS = {
    "postgresql": {"psycopg": (3, 3, 9)},
    "mysql": {"asyncmy": (0, 2, 18)},
    "sqlite": {},
}
LOCAL_HOSTS = ("", "localhost", "127.0.0.1", "::1")


def _id(name: str) -> str:
    return f"django_asyncsession.{name}"


def _setting(name: str) -> Any:
    """The value of a key; its default when something is wrong with the setting, which E004 says."""
    try:
        return getattr(own_settings, name)
    except ConfigurationError:
        return DEFAULTS[name]


def _alias() -> str:
    return str(_setting("ALIAS"))


def _database() -> Mapping[str, Any]:
    """The settings of the alias that the middleware manages; empty when there is none."""
    found: Mapping[str, Any] = connections.settings.get(_alias(), {})
    return found


def _vendor(engine: str) -> str:
    """Django's name of the database; empty when the engine cannot be used, which E002 says."""
    try:
        return bridged_class(engine).vendor
    except ImproperlyConfigured:
        return ""


@register(Tags.compatibility)
def check_atomic_requests(**kwargs: Any) -> list[CheckMessage]:
    """E001: Django's ATOMIC_REQUESTS refuses async views."""
    if not places() or not _database().get("ATOMIC_REQUESTS"):
        return []
    return [
        Error(
            f"ATOMIC_REQUESTS is on for {_alias()!r}, so Django refuses every async view.",
            hint='Turn it off; ASYNC_SESSION["ATOMIC_REQUESTS"] gives each request a transaction.',
            id=_id("E001"),
        )
    ]


@register(Tags.compatibility)
def check_versions(**kwargs: Any) -> list[CheckMessage]:
    """E002: an engine that cannot be bridged, or a package that is missing or too old."""
    wanted = dict(MINIMUM)
    problems = []
    for alias in sorted({_alias(), *_setting("POOLS")} & set(connections.settings)):
        try:
            wanted |= DRIVERS.get(bridged_class(connections.settings[alias]["ENGINE"]).vendor, {})
        except ImproperlyConfigured as exc:
            problems.append(f"{alias!r}: {exc}.")
    for name, minimum in wanted.items():
        found = _version(name)
        if found is None or found < minimum:
            have = "not installed" if found is None else f"version {_dotted(found)}"
            problems.append(f"{name} is {have}; {_dotted(minimum)} or newer is needed.")
    hint = "Install the package with the extra of your database: postgresql, mysql."
    return [Error(problem, hint=hint, id=_id("E002")) for problem in problems]


def _version(name: str) -> tuple[int, ...] | None:
    try:
        text = metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
    return tuple(int(part) for part in text.split(".")[:3] if part.isdigit())


def _dotted(version: Sequence[int]) -> str:
    return ".".join(map(str, version))


@register(Tags.compatibility)
def check_listed_once(**kwargs: Any) -> list[CheckMessage]:
    """E003: the middleware is in MIDDLEWARE twice."""
    times = len(places())
    if times < 2:
        return []
    return [
        Error(
            f"{MIDDLEWARE} is in MIDDLEWARE {times} times, so each request has {times} sessions.",
            hint="Keep the first.",
            id=_id("E003"),
        )
    ]


@register(Tags.compatibility)
def check_settings(**kwargs: Any) -> list[CheckMessage]:
    """E004: ASYNC_SESSION is no dict, has keys that do not exist or values that cannot be, or pool
    options that cannot work."""
    given: Any = getattr(django_settings, "ASYNC_SESSION", {})
    problems = [f"{problem}." for problem in problems_of(given)]
    if _alias() not in connections.settings:
        problems.append(f'ASYNC_SESSION["ALIAS"] is {_alias()!r}, which DATABASES does not have.')
    problems += _pool_problems(_setting("POOLS"))
    return [Error(problem, id=_id("E004")) for problem in problems]


def _pool_problems(pools: Mapping[str, Any]) -> Iterable[str]:
    from .interface import databases

    if list(problems_of(getattr(django_settings, "ASYNC_SESSION", {}))):
        return
    for alias in pools:
        if alias not in connections.settings:
            yield f'ASYNC_SESSION["POOLS"] names {alias!r}, which DATABASES does not have.'
    for interface in databases.all():
        try:
            interface.stats()
        except ConfigurationError as exc:
            yield f"The pool of {interface.alias!r} cannot be made: {exc}."


@register(Tags.compatibility)
def check_order(**kwargs: Any) -> list[CheckMessage]:
    """W101: the middleware stands inside others that use the database."""
    middleware = list(django_settings.MIDDLEWARE)
    if not places():
        return []
    before = [m for m in middleware[: places()[0]] if m in DATABASE_MIDDLEWARE]
    if not before:
        return []
    return [
        Warning(
            f"{MIDDLEWARE} comes after {', '.join(before)}, whose work is outside its transaction.",
            hint="Put it first in MIDDLEWARE.",
            id=_id("W101"),
        )
    ]


@register(Tags.compatibility)
def check_sync_middleware(**kwargs: Any) -> list[CheckMessage]:
    """W111: middleware inside ours that is sync only costs a thread for each request."""
    middleware = list(django_settings.MIDDLEWARE)
    if not places():
        return []
    inside = middleware[places()[0] + 1 :]
    slow = [name for name in inside if not _is_async_capable(name)]
    return [
        Warning(
            f"{name} is sync only, so each request goes through a thread on its way to the view.",
            hint="Make it async_capable.",
            id=_id("W111"),
        )
        for name in slow
    ]


def _is_async_capable(name: str) -> bool:
    try:
        return bool(getattr(import_string(name), "async_capable", False))
    except ImportError:
        # Django says so when it loads its middleware.
        return True


@register(Tags.compatibility)
def check_persistent_connections(**kwargs: Any) -> list[CheckMessage]:
    """W102: Django keeps connections of its own open beside the pool."""
    if not places() or _database().get("CONN_MAX_AGE") == 0:
        return []
    return [
        Warning(
            f"CONN_MAX_AGE of {_alias()!r} is {_database().get('CONN_MAX_AGE')!r}, so every thread "
            "keeps a connection of its own open beside the pool.",
            hint="Set it to 0; the pool keeps its connections open anyway.",
            id=_id("W102"),
        )
    ]


@register(Tags.database)
def check_server_connections(databases: Sequence[str] | None = None, **kwargs: Any) -> list[Any]:
    """W103: the pools of all workers together want more connections than the server has."""
    database = _database()
    if _alias() not in (databases or ()) or not database:
        return []
    from .interface import databases as interfaces

    workers = os.environ.get("WEB_CONCURRENCY", "")
    try:
        interface = interfaces[_alias()]
        limit = interface.stats()["pool_max"] + interface.connections_beside
        available = _server_connections(interface)
    except ConfigurationError:
        # E002 or E004 says so.
        return []
    wanted = limit * (int(workers) if workers.isdigit() else 1)
    if available is None or wanted <= available:
        return []
    return [
        Warning(
            f"The pools of {_alias()!r} may open {wanted} connections, the server has {available}.",
            hint="Lower max_size or WEB_CONCURRENCY, or raise the server's max_connections.",
            id=_id("W103"),
        )
    ]


# How to ask each server how many connections it allows.
MAX_CONNECTIONS = {
    "postgresql": "SELECT current_setting('max_connections')::int"
    " - current_setting('superuser_reserved_connections')::int",
    "mysql": "SELECT @@max_connections",
}


def _server_connections(interface: Any) -> int | None:
    sql = MAX_CONNECTIONS.get(interface.vendor)
    if sql is None:
        return None

    @async_to_sync
    async def ask() -> int:
        async with interface.get_session(autocommit=True) as session:
            return int(await session.fetch_value(sql))

    try:
        return ask()
    except DatabaseError:
        return None


@register(Tags.compatibility)
def check_pooler(**kwargs: Any) -> list[CheckMessage]:
    """W104: behind a transaction pooler, prepared statements and named cursors break."""
    database = _database()
    if database.get("PORT") not in (6432, "6432"):
        return []
    options = database["OPTIONS"]
    if options.get("prepare_threshold") is None and database.get("DISABLE_SERVER_SIDE_CURSORS"):
        return []
    return [
        Warning(
            f"{_alias()!r} is on port 6432, PgBouncer's, where prepared statements and server-side "
            "cursors outside a transaction do not work.",
            hint="Remove prepare_threshold from OPTIONS and set DISABLE_SERVER_SIDE_CURSORS.",
            id=_id("W104"),
        )
    ]


@register(Tags.compatibility, deploy=True)
def check_timeouts(**kwargs: Any) -> list[CheckMessage]:
    """W105: nothing ends a statement, or an idle transaction, that takes for ever."""
    database = _database()
    if not database or _vendor(database["ENGINE"]) != "postgresql":
        return []
    given = str(database["OPTIONS"].get("options", ""))
    missing = [
        name
        for name in ("statement_timeout", "idle_in_transaction_session_timeout")
        if name not in given
    ]
    if not missing:
        return []
    return [
        Warning(
            f"{_alias()!r} has no {' and no '.join(missing)}.",
            hint='OPTIONS = {"options": "-c statement_timeout=30s '
            '-c idle_in_transaction_session_timeout=60s"}, or set them for the role.',
            id=_id("W105"),
        )
    ]


@register(Tags.security, deploy=True)
def check_encryption(**kwargs: Any) -> list[CheckMessage]:
    """W106: the connection to another host is not encrypted, or the server not verified."""
    database = _database()
    host = str(database.get("HOST", ""))
    if not database or host in LOCAL_HOSTS or host.startswith("/"):
        return []
    vendor, options = _vendor(database["ENGINE"]), database["OPTIONS"]
    if vendor == "postgresql" and options.get("sslmode") != "verify-full":
        problem, hint = "sslmode is weaker than verify-full", 'OPTIONS = {"sslmode": "verify-full"}'
    elif vendor == "mysql" and not options.get("ssl"):
        problem, hint = "ssl is not set", 'OPTIONS = {"ssl": {"ca": "ca.pem"}}'
    else:
        return []
    message = f"{_alias()!r} is on another host, and {problem}."
    return [Warning(message, hint=hint, id=_id("W106"))]


@register(Tags.security, deploy=True)
def check_debug(**kwargs: Any) -> list[CheckMessage]:
    """W107: DEBUG keeps every statement in memory and shows SQL on error pages."""
    if not django_settings.DEBUG or not places():
        return []
    return [
        Warning(
            "DEBUG is on, so every connection of the pool keeps the SQL of its session in memory.",
            hint="Set DEBUG = False.",
            id=_id("W107"),
        )
    ]


@register(Tags.compatibility)
def check_asgi(**kwargs: Any) -> list[CheckMessage]:
    """W108: only WSGI is set up, where no session can be used."""
    if not places() or _has_asgi():
        return []
    return [
        Warning(
            "The project has a WSGI_APPLICATION, and neither an asgi.py beside it nor an "
            "ASGI_APPLICATION; under WSGI the request's session cannot be used.",
            hint="Write an asgi.py, as startproject does, and serve it with uvicorn, hypercorn or "
            "daphne.",
            id=_id("W108"),
        )
    ]


def _has_asgi() -> bool:
    """Whether the project is set up for ASGI, or it cannot be told; `startproject` makes both."""
    wsgi = getattr(django_settings, "WSGI_APPLICATION", None)
    if not wsgi or getattr(django_settings, "ASGI_APPLICATION", None):
        return True
    package = wsgi.rpartition(".")[0].rpartition(".")[0]
    try:
        return find_spec(f"{package}.asgi" if package else "asgi") is not None
    except (ImportError, ValueError):
        return False


@register(Tags.compatibility)
def check_mysql_engine(**kwargs: Any) -> list[CheckMessage]:
    """W109: tables of a MySQL engine without transactions cannot be rolled back."""
    database = _database()
    if not database or "default_storage_engine=myisam" not in str(database["OPTIONS"]).lower():
        return []
    return [
        Warning(
            f"New tables of {_alias()!r} are MyISAM, which has no transactions.",
            hint="Use InnoDB.",
            id=_id("W109"),
        )
    ]


@register(Tags.compatibility)
def check_native_version(**kwargs: Any) -> list[CheckMessage]:
    """W112: native mode replaces names in modules of a Django that it was not verified with."""
    if not _setting("NATIVE_ORM") or is_verified():
        return []
    verified = ", ".join(map(_dotted, sorted(VERIFIED)))
    return [
        Warning(
            f"Native mode was not verified with Django {_dotted(django.VERSION[:3])}, only with "
            f"{verified}.",
            hint='Set ASYNC_SESSION["NATIVE_ORM"] to False, or run your tests with care.',
            id=_id("W112"),
        )
    ]


@register(Tags.compatibility)
def check_native_middleware(**kwargs: Any) -> list[CheckMessage]:
    """E005: native mode without the middleware, where each statement commits by itself."""
    if not needs_middleware():
        return []
    return [
        Error(
            'ASYNC_SESSION["NATIVE_ORM"] is on and MIDDLEWARE lacks '
            f"{MIDDLEWARE}, so a view that raises keeps what it wrote.",
            hint="Put the middleware first in MIDDLEWARE. If native mode is for commands and "
            "consumers only, silence this check: requests are refused otherwise.",
            id=NEEDS_MIDDLEWARE,
        )
    ]


@register(Tags.compatibility)
def check_native_orm(**kwargs: Any) -> list[CheckMessage]:
    """E006: NATIVE_MIDDLEWARE does nothing without NATIVE_ORM."""
    if not _setting("NATIVE_MIDDLEWARE") or _setting("NATIVE_ORM"):
        return []
    return [
        Error(
            'ASYNC_SESSION["NATIVE_MIDDLEWARE"] is on and "NATIVE_ORM" is off, so it does nothing.',
            hint="Turn NATIVE_ORM on as well, or NATIVE_MIDDLEWARE off.",
            id=_id("E006"),
        )
    ]


@register(Tags.compatibility)
def check_pool_of_django(**kwargs: Any) -> list[CheckMessage]:
    """E007: OPTIONS["pool"] where Django itself cannot connect with it."""
    messages: list[CheckMessage] = []
    for alias, database in connections.settings.items():
        vendor = _vendor(database["ENGINE"]) if database["OPTIONS"].get("pool") else ""
        if vendor == "postgresql" and find_spec("psycopg_pool") is None:
            problem = "and psycopg_pool is not installed"
            hint = "pip install 'django-asyncsession[postgresql]'"
        elif vendor not in ("", "postgresql"):
            problem = "which Django knows for PostgreSQL only"
            hint = "Remove it"
        else:
            continue
        messages.append(
            Error(
                f'DATABASES[{alias!r}]["OPTIONS"] has "pool", {problem}, so sync code cannot '
                "connect.",
                hint=f'{hint}; or move it to ASYNC_SESSION["POOLS"][{alias!r}].',
                id=_id("E007"),
            )
        )
    return messages


@register(Tags.compatibility)
def check_thread_locals(**kwargs: Any) -> list[CheckMessage]:
    """E120: THREAD_LOCALS names what is none. W120: a package has one that is not listed."""
    packages = {name.partition(".")[0] for name in django_settings.MIDDLEWARE}
    packages |= {app.name.partition(".")[0] for app in apps.get_app_configs()}
    try:
        names = threadlocals.unlisted(packages - {"django", "django_asyncsession"})
    except ConfigurationError as exc:
        if list(problems_of(getattr(django_settings, "ASYNC_SESSION", {}))):
            # E004 says it.
            return []
        return [Error(f"{exc}.", id=_id("E120"))]
    return [
        Warning(
            f"{name!r} is a threading.local, so what one request puts there, another one sees.",
            hint='Add it to ASYNC_SESSION["THREAD_LOCALS"]; or silence this check, if it holds '
            "nothing of a request.",
            id=_id("W120"),
        )
        for name in names
    ]
