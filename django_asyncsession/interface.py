"""`databases`: one interface for each alias of DATABASES, which owns its pools and hands out
sessions."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import re
import time
import weakref
from collections.abc import Awaitable, Iterator, Mapping
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Self

from django.db import connections
from django.db.utils import ConnectionHandler

from . import bridge, threadlocals
from .backends.base import BridgedMixin
from .backends.engines import bridged_class, make_wrapper
from .backends.secrets import Secret, masked
from .conf import settings
from .exceptions import ConfigurationError, UnknownAlias
from .installed import check_installed
from .observe import leaks
from .plans import cache as plans
from .pool.lease import Lease
from .pool.options import PoolOptions, check_seconds
from .pool.pool import COUNTERS, Pool
from .session.session import Session
from .shutdown import hold_back
from .transactions.checkout import ConnectionSource
from .transactions.transaction import Transaction

if TYPE_CHECKING:
    from .ddl import DDLSession

# Options of psycopg_pool that mean nothing here, where the pool opens itself and needs no worker
# threads.
IGNORED_OPTIONS = frozenset({"name", "open", "num_workers", "drain_open"})
POOL_OPTIONS = {field.name for field in dataclasses.fields(PoolOptions)}
# What tells one database from another: a pool made before the test runner renamed the database
# must not serve it.
IDENTITY = ("ENGINE", "NAME", "HOST", "PORT", "USER")
_identity = itemgetter(*IDENTITY)


class DatabaseInterface:
    """One database: its pools, one for each event loop, and the sessions and transactions made
    from it.

    Made by `databases[alias]`, or by `from_dsn`.

    Args:
        alias: what messages, and `using`, call it.
        settings_dict: an entry of DATABASES, complete; None reads it from `django.db.connections`,
            at each connect.
    """

    def __init__(self, alias: str, settings_dict: Mapping[str, Any] | None = None) -> None:
        self.alias = alias
        self._own_settings = None if settings_dict is None else masked(settings_dict)
        # Where connections come from instead of the pools: in a test, from the test's own.
        self.source: ConnectionSource | None = None
        # What sessions work in; a test's own kind knows of its shared connection.
        self.transaction_class: type[Transaction] = Transaction
        self._pools: dict[int, tuple[tuple[Any, ...], Pool[BridgedMixin]]] = {}
        _interfaces.add(self)

    @classmethod
    def from_dsn(cls, dsn: str, alias: str | None = None) -> Self:
        """An interface for a database that is not in DATABASES.

        Args:
            dsn: such as `postgresql://user:password@host/name?pool_max_size=20`; the user name and
                the password are percent-decoded, parameters that begin with `pool_` are pool
                options, others go to OPTIONS.
            alias: what to call it; None makes a name of host and database.

        Raises:
            ConfigurationError: the text is not a database URL, or dj-database-url is not installed.
        """
        # No frame may hold the password as text: an error page shows the locals of each frame.
        dsn = Secret(dsn)
        parsed = _parse_dsn(dsn)
        handler = ConnectionHandler({"default": parsed})
        return cls(
            alias or f"{parsed['HOST'] or 'local'}/{parsed['NAME']}", handler.settings["default"]
        )

    def __repr__(self) -> str:
        state = "connected" if self.connected else "not connected"
        try:
            vendor = self.vendor
        except ConfigurationError:
            vendor = "of an engine that cannot be used"
        return f"<DatabaseInterface {self.alias!r} {vendor} {state}>"

    # The pool

    async def connect(self) -> Self:
        """Open the pool of the running loop now, and so learn at once when the database cannot be
        reached.

        Raises:
            OperationalError: what the server, or the network, says.
        """
        await self.pool().open()
        return self

    @property
    def connected(self) -> bool:
        """Whether the running loop has an open pool with a connection."""
        pool = self._existing_pool()
        return pool is not None and not pool.closed and pool.stats()["pool_size"] > 0

    async def close(self, grace: float = 0.0) -> None:
        """Close the pool of the running loop, and those of loops that are closed; the next use
        opens a new one.

        Args:
            grace: seconds that open sessions get to finish.

        Raises:
            ConfigurationError: `grace` is no time; nothing was closed.
        """
        check_seconds("grace", grace)
        self._drop_dead_pools()
        _, pool = self._pools.pop(id(asyncio.get_running_loop()), (None, None))
        if pool is not None:
            await pool.close(grace)

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def acquire(self) -> Lease[BridgedMixin]:
        """Lease a connection from the running loop's pool; what sessions call.

        Raises:
            As `Pool.acquire`.
        """
        return await (self.source or self.pool()).acquire()

    def pool(self) -> Pool[BridgedMixin]:
        """The pool of the running loop, made on first use.

        Raises:
            ConfigurationError: pool options that cannot work.
        """
        own = self._own_settings
        identity = _identity(connections.settings[self.alias] if own is None else own)
        loop = asyncio.get_running_loop()
        known, pool = self._pools.get(id(loop), (None, None))
        if pool is not None and known == identity and not pool.closed and pool.loop is loop:
            return pool
        if pool is not None:
            pool.terminate()
        self._drop_dead_pools()
        pool = self._make_pool()
        self._pools[id(loop)] = identity, pool
        return pool

    @property
    def pools(self) -> list[Pool[BridgedMixin]]:
        """The pools of all loops."""
        return [pool for _, pool in list(self._pools.values())]

    def _existing_pool(self) -> Pool[BridgedMixin] | None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return None
        _, pool = self._pools.get(id(loop), (None, None))
        return pool if pool is not None and pool.loop is loop else None

    def _make_pool(self) -> Pool[BridgedMixin]:
        hold_back()
        check_installed()
        of_engine = self._wrapper_class.is_permanent
        pool = Pool(
            self._open_connection,
            _is_usable,
            _close,
            name=self.alias,
            options=self._pool_options(),
            setting=self._pool_setting,
            is_permanent=lambda e: isinstance(e, ConfigurationError) or of_engine(e),
            is_quiet=self._wrapper_class.is_quiet,
            settle=_settle,
        )
        if (seconds := settings.LEAK_WARNING_SECONDS) is not None:
            leaks.watch(pool, seconds)
        return pool

    def _drop_dead_pools(self) -> None:
        for key, (_, pool) in list(self._pools.items()):
            if pool.is_orphaned:
                pool.terminate()
                # Another thread may have been faster.
                self._pools.pop(key, None)

    def _forget_pools(self) -> None:
        for _, pool in self._pools.values():
            pool.forget()
            # Collecting them would say goodbye on the parent's sockets.
            _of_parent_process.append(pool)
        self._pools.clear()

    async def _open_connection(self) -> BridgedMixin:
        wrapper = make_wrapper(self.alias, self._settings_dict)
        try:
            await threadlocals.run_apart(wrapper, wrapper.open)
        except BaseException:
            # Connected, but not set up (a role that does not exist): nobody else would close it.
            bridge.discard(_close(wrapper))
            raise
        return wrapper

    def _pool_options(self) -> PoolOptions:
        given: Any = settings.POOLS.get(self.alias)
        if given is None:
            given = self._settings_dict["OPTIONS"].get("pool")
        elif not isinstance(given, Mapping):
            raise ConfigurationError(
                f'ASYNC_SESSION["POOLS"][{self.alias!r}] is {given!r}; give a dict of pool options'
            )
        options = dict(given) if isinstance(given, Mapping) else {}
        if unknown := options.keys() - POOL_OPTIONS - IGNORED_OPTIONS:
            raise ConfigurationError(
                f"unknown pool options {sorted(unknown)} for {self.alias!r}; there are "
                f"{sorted(POOL_OPTIONS)}"
            )
        known = {name: value for name, value in options.items() if name in POOL_OPTIONS}
        known["check"] = bool(known.get("check", self._settings_dict["CONN_HEALTH_CHECKS"]))
        return PoolOptions(**known)

    @property
    def _pool_setting(self) -> str:
        """Where pool options of this database are read from, or would be."""
        if self.alias not in settings.POOLS:
            if self._own_settings is not None:
                return "the database URL (with the prefix pool_)"
            if self._settings_dict["OPTIONS"].get("pool"):
                return f'DATABASES["{self.alias}"]["OPTIONS"]["pool"]'
        return f'ASYNC_SESSION["POOLS"]["{self.alias}"]'

    def stats(self) -> dict[str, int]:
        """Numbers of the running loop's pool, under psycopg_pool's names; all zero when there is
        none. And of the plans of the alias, in all loops: `plans` that there are, `plan_hits`,
        `plan_misses` and `plan_fallbacks`, the last also for each reason with its name behind."""
        return {**self._pool_stats(), **plans.of(self.alias).stats()}

    def _pool_stats(self) -> dict[str, int]:
        pool = self._existing_pool()
        if pool is not None:
            return pool.stats()
        options = self._pool_options()
        sizes = {"pool_min": options.min_size, "pool_max": options.limit}
        return {
            **sizes,
            **dict.fromkeys(("pool_size", "pool_available", "requests_waiting", *COUNTERS), 0),
        }

    @property
    def is_shared(self) -> bool:
        """Whether all sessions use one connection by turns, in a test's transaction."""
        return getattr(self.source, "is_shared", False)

    @property
    def exports_snapshots(self) -> bool:
        """Whether transactions of the database can share one snapshot."""
        return self._wrapper_class.exports_snapshots

    @property
    def connections_beside(self) -> int:
        """Connections that each pool may have beside those of its sessions: `max_size` and this
        are what the server must have for it."""
        return self._wrapper_class.connections_beside

    # Sessions

    def get_session(self, **options: Any) -> Session:
        """A new session; the options are those of `Session`.

        Raises:
            ConfigurationError: an option that cannot be.
        """
        return Session(bind=self, **options)

    def get_transaction(self, **options: Any) -> Transaction:
        """A new low-level transaction; the options are those of `Transaction`.

        Raises:
            ConfigurationError: an option that cannot be.
        """
        return self.transaction_class(self, contents=threadlocals.new(), **options)

    def get_ddl_session(self) -> DDLSession:
        """A session that changes the schema."""
        from .ddl import DDLSession

        return DDLSession(self)

    # The database

    @property
    def vendor(self) -> str:
        """Django's name of the database: "postgresql", "mysql", "sqlite"."""
        return self._wrapper_class.vendor

    @property
    def features(self) -> Any:
        """Django's features of the database; those that depend on the server's version are not
        known here."""
        return make_wrapper(self.alias, self._settings_dict).features

    async def get_db_server_version(self) -> str:
        """The server's version, such as "15.8".

        Raises:
            OperationalError: the database cannot be reached.
        """
        async with self.get_session(autocommit=True) as session:
            version = await session.run_sync(lambda: connections[self.alias].get_database_version())
        return ".".join(map(str, version))

    async def ping(self) -> float:
        """Ask the database for an answer; return how long it took, in seconds, waiting for a
        connection included.

        Raises:
            OperationalError: the database cannot be reached, or the pool is exhausted.
        """
        started = time.monotonic()
        async with self.get_session(autocommit=True) as session:
            await session.execute("SELECT 1")
        return time.monotonic() - started

    @property
    def _settings_dict(self) -> Mapping[str, Any]:
        """The alias's settings, with the name that Django's test runner gave the database, if it
        did."""
        if self._own_settings is not None:
            return self._own_settings
        return connections.settings[self.alias]  # type: ignore[no-any-return]

    @property
    def _wrapper_class(self) -> type[BridgedMixin]:
        return bridged_class(self._settings_dict["ENGINE"])


class Databases:
    """The interfaces of all aliases of DATABASES, each made on first use; like
    `django.db.connections`."""

    def __init__(self) -> None:
        self._interfaces: dict[str, DatabaseInterface] = {}

    def __getitem__(self, alias: str) -> DatabaseInterface:
        """The interface of an alias.

        Raises:
            UnknownAlias: DATABASES has no such alias.
        """
        if alias not in connections.settings:
            raise UnknownAlias(
                f"no database {alias!r} in DATABASES; there are {sorted(connections.settings)}"
            )
        return self._interfaces.setdefault(alias, DatabaseInterface(alias))

    def __contains__(self, alias: object) -> bool:
        return alias in connections.settings

    def __iter__(self) -> Iterator[str]:
        return iter(connections.settings)

    def all(self) -> list[DatabaseInterface]:
        """The interfaces of all aliases."""
        return [self[alias] for alias in self]

    async def close_all(self, grace: float = 0.0) -> None:
        """Close the running loop's pools of all aliases, also if one fails to close.

        Args:
            grace: seconds that open sessions get to finish.

        Raises:
            ConfigurationError: `grace` is no time; nothing was closed.
        """
        check_seconds("grace", grace)
        async with contextlib.AsyncExitStack() as stack:
            for interface in self._interfaces.values():
                stack.push_async_callback(interface.close, grace)

    def forget_pools(self) -> None:
        """Let a forked child begin without its parent's connections, those of `from_dsn`
        included."""
        for interface in list(_interfaces):
            interface._forget_pools()


_interfaces: weakref.WeakSet[DatabaseInterface] = weakref.WeakSet()
databases = Databases()
_of_parent_process: list[Any] = []
os.register_at_fork(after_in_child=databases.forget_pools)


def _settle(wrapper: BridgedMixin) -> Awaitable[bool] | None:
    """What remains of the reset after the last lease."""
    read = wrapper.settle()
    return None if read is None else bridge.run_with(wrapper, read)


async def _is_usable(wrapper: BridgedMixin) -> bool:
    return await bridge.run_with(wrapper, wrapper.is_usable)


def _close(wrapper: BridgedMixin) -> Awaitable[None] | None:
    wrapper.abandon()
    return wrapper.farewell()


def _parse_dsn(dsn: str) -> dict[str, Any]:
    try:
        import dj_database_url
    except ImportError as exc:
        raise ConfigurationError(
            "from_dsn() needs dj-database-url; pip install dj-database-url"
        ) from exc
    scheme = Secret(dsn.partition("://")[0] if "://" in dsn else "")
    error = ConfigurationError(
        f"not a database URL (scheme {str(scheme) if scheme.isalnum() else ''!r}); write "
        "postgresql://user:password@host:port/name, with the reserved characters of the password "
        "percent-encoded"
    )
    parsed: dict[str, Any] = {}
    with contextlib.suppress(Exception):
        if "://" in dsn and not _has_stray_at(dsn):
            # At once: whatever is raised later shows the locals of this frame.
            parsed = masked(dj_database_url.parse(dsn))
    if not parsed:
        # Outside of any handler, whose error and frames would hold the password.
        raise error
    options = parsed.setdefault("OPTIONS", {})
    pool = {
        # What is no number may be a secret in the wrong place.
        name.removeprefix("pool_"): Secret(options.pop(name))
        for name in list(options)
        if name.startswith("pool_")
    }
    if pool:
        options["pool"] = {name: _number(name, value) for name, value in pool.items()}
    return parsed


def _has_stray_at(dsn: str) -> bool:
    """Whether a password that is not percent-encoded was cut, so that its rest would be taken for
    a part that is shown, as the name of the database."""
    rest = dsn.partition("://")[2]
    place = re.search("[/?#]", rest)
    # In front of a path alone (`sqlite:////file`) there is no host, and so no password.
    return (
        place is not None and place.start() > 0 and "@" not in rest[: place.start()] and "@" in rest
    )


def _number(name: str, value: Secret) -> float | bool:
    if value.lower() in ("true", "false"):
        return value.lower() == "true"
    if not re.fullmatch(r"-?[0-9]{1,15}(\.[0-9]{1,15})?", value):
        raise ConfigurationError(f"pool_{name} in the database URL is not a number")
    return float(value) if "." in value else int(value)
