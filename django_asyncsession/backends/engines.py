"""From an ENGINE of DATABASES to the class of its bridged wrapper."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from django.db import connections
from django.db.utils import load_backend

from django_asyncsession.exceptions import AliasNotInSession, ConfigurationError

from .base import BridgedMixin
from .secrets import masked

if TYPE_CHECKING:
    from django.db.backends.base.base import BaseDatabaseWrapper as _Base
else:
    _Base = object

logger = logging.getLogger("django_asyncsession")

# Which module holds the mixin for a wrapper class that derives from one of Django's; the driver is
# imported there.
MIXINS = {
    "django.db.backends.postgresql.base": "django_asyncsession.backends.postgresql.base",
    "django.db.backends.mysql.base": "django_asyncsession.backends.mysql.base",
    "django.db.backends.sqlite3.base": "django_asyncsession.backends.sqlite3.base",
}
ANY_DRIVER = "django_asyncsession.backends.threaded"
# Which package installs the driver of an engine that asks for another one's. An engine of a third
# party may derive from any of Django's, and cannot be asked before it is imported.
STAND_INS = {
    "django.db.backends.mysql": "django_asyncsession.backends.mysql",
    "django.contrib.gis.db.backends.mysql": "django_asyncsession.backends.mysql",
}
KNOWN_ENGINES = ("django.db.backends.", "django.contrib.gis.", "django_asyncsession.")


class RefusingMixin(_Base):
    """A wrapper that never connects, for the aliases that a session does not own."""

    def connect(self) -> None:
        raise AliasNotInSession(
            f"{self.alias!r} is not the database of this session; "
            f"open one for it: databases[{self.alias!r}].get_session()"
        )

    def validate_thread_sharing(self) -> None:
        """Nothing is shared: there is no connection."""


def refusing(alias: str) -> Any:
    """A wrapper that stands for `alias` in the calls of a session that does not own it."""
    settings_dict = copy.deepcopy(connections.settings[alias])
    return _refusing_class(settings_dict["ENGINE"])(settings_dict, alias)


@cache
def _refusing_class(engine: str) -> Any:
    try:
        base = wrapper_class(engine)
    except ConfigurationError:
        # Its driver is missing. That is no business of a session that does not use it.
        base = wrapper_class("django.db.backends.dummy")
    return type("RefusingDatabaseWrapper", (RefusingMixin, base), {})


def wrapper_class(engine: str) -> Any:
    """The engine's own wrapper class.

    Raises:
        ConfigurationError: there is no such engine, its driver is not installed, or importing it
            fails for a reason of its own.
    """
    install_drivers([engine])
    try:
        return load_backend(engine).DatabaseWrapper
    except Exception as exc:
        raise _unusable(engine, exc) from exc


def _unusable(engine: str, reason: Exception) -> ConfigurationError:
    """The error for an engine that cannot be imported, with the extra that brings its driver."""
    said = " ".join(str(reason.__cause__ or reason).rstrip(".").split())
    extra = {"postgresql": "postgresql", "postgis": "postgresql", "mysql": "mysql"}.get(
        engine.rpartition(".")[2]
    )
    remedy = f"pip install 'django-asyncsession[{extra}]'" if extra else "see ENGINE in DATABASES"
    return ConfigurationError(f"sessions cannot use the engine {engine!r}: {said}; {remedy}")


class MissingMixin(_Base):
    """A wrapper that never connects, for an engine that cannot be imported."""

    # Why not, and what to do.
    error: ConfigurationError

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ConfigurationError(str(self.error)) from self.error.__cause__

    connect = ensure_connection = _cursor = _commit = _set_autocommit = _refuse


def missing(settings_dict: dict[str, Any], alias: str, error: ConfigurationError) -> Any:
    """The wrapper of an alias whose engine cannot be imported, so that Django starts and its checks
    can say so."""
    base = load_backend("django.db.backends.dummy").DatabaseWrapper
    return type("MissingDatabaseWrapper", (MissingMixin, base), {"error": error})(
        settings_dict, alias
    )


def install_drivers(engines: Iterable[str]) -> None:
    """Let Django find the drivers of these engines where others stand in for them.

    A driver that is not installed is left to Django's own message.
    """
    engines = set(engines)
    wanted = {STAND_INS[engine] for engine in STAND_INS.keys() & engines}
    if any(engine and not engine.startswith(KNOWN_ENGINES) for engine in engines):
        wanted.update(STAND_INS.values())
    for package in wanted:
        with suppress(ImportError):
            import_module(package).install_driver()


def import_engines(engines: Iterable[str]) -> None:
    """Import what sessions on these engines need, so that the first of them does not hold the event
    loop up meanwhile.

    An engine that cannot be imported, or bridged, is left to the error at its first use: a project
    may never come to that, and can use what else it has.
    """
    for engine in set(engines):
        try:
            bridged_class(engine)
        except Exception as exc:
            logger.debug("engine %r is not imported before its first use: %r", engine, exc)


@cache
def bridged_class(engine: str) -> type[BridgedMixin]:
    """The bridged subclass of an engine's own wrapper class.

    Args:
        engine: an ENGINE of DATABASES; third-party ones and this package's own included.

    Raises:
        ConfigurationError: the engine cannot be bridged.
    """
    base = wrapper_class(engine)
    if issubclass(base, BridgedMixin):
        return base  # type: ignore[no-any-return]
    modules = [cls.__module__ for cls in base.__mro__]
    if "django.db.backends.dummy.base" in modules:
        raise ConfigurationError("no ENGINE is set; set one in DATABASES")
    module = next((MIXINS[m] for m in modules if m in MIXINS), ANY_DRIVER)
    try:
        mixin = import_module(module).Mixin
    except ImportError as exc:
        # Django's backend takes another driver, or one that is too old for sessions.
        raise _unusable(engine, exc) from exc
    return type("DatabaseWrapper", (mixin, base), {"__module__": base.__module__})


def make_wrapper(
    alias: str, settings_dict: Mapping[str, Any], cls: type[BridgedMixin] | None = None
) -> BridgedMixin:
    """A pooled wrapper, not connected yet, for the settings of an alias. The settings are copied.

    Args:
        cls: its class; None takes that of the engine.

    Raises:
        ConfigurationError: the engine cannot be bridged.
    """
    # The argument too is a local of this frame, which an error page would show.
    settings_dict = own = masked(settings_dict)
    # The pool is ours; Django's own, in the same place, must not open one beside it.
    own["OPTIONS"].pop("pool", None)
    # How long a connection lives, and when it is checked, is the pool's business.
    own.update(CONN_MAX_AGE=None, CONN_HEALTH_CHECKS=False, AUTOCOMMIT=True)
    wrapper: Any = (cls or bridged_class(own["ENGINE"]))(own, alias)
    wrapper.pooled = True
    return wrapper  # type: ignore[no-any-return]
