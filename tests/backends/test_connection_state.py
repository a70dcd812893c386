"""What code leaves on the objects of a connection: the wrapper, its helpers and the driver's own.
The next session that gets the connection sees none of it, and all that opening it left there.

On real connections of a pool of one, which the next session gets from the one before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from datetime import timedelta, timezone
from typing import Any

import pytest
from django.db import connections
from django.db.backends.signals import connection_created
from django.db.backends.utils import CursorWrapper

from django_asyncsession import DatabaseInterface
from django_asyncsession.backends.attributes import copied
from django_asyncsession.exceptions import SessionStateError
from tests.sessions import names, pool, whole

JOHN = timezone(timedelta(hours=3))
only = {
    name: pytest.mark.parametrize("alias", [alias], ids=[name], indirect=True)
    for name, alias in (("postgresql", "default"), ("mysql", "mysql"), ("sqlite", "sqlite"))
}


@pytest.fixture
def db(real_database: DatabaseInterface) -> Iterator[DatabaseInterface]:
    """Each database in turn, with one connection: the next session gets what the last one had."""
    with pool(real_database, max_size=1):
        yield real_database


async def in_session(db: DatabaseInterface, fn: Callable[[Any], Any], **options: Any) -> Any:
    """What `fn` returns, called with the connection, in a session of its own."""
    async with db.get_session(**options) as session:
        return await session.run_sync(lambda: fn(connections[db.alias]))


# The wrapper


def add_attributes(connection: Any) -> None:
    connection.tenant = "customer A"
    connection._hidden = ["customer A"]
    connection.vendor = "shadowed"
    connection.cursor_of_mine = connection.cursor


def change_settings(connection: Any) -> None:
    connection.settings_dict["SCHEMA"] = "a"
    connection.settings_dict["OPTIONS"]["schema"] = "a"
    connection.settings_dict["TEST"]["NAME"] = "a"


def replace_settings(connection: Any) -> None:
    connection.settings_dict = {**connection.settings_dict, "SCHEMA": "a"}


def shadow_a_method(connection: Any) -> None:
    connection.close = lambda: None
    connection.on_commit = print


def change_time_zone(connection: Any) -> None:
    connection.settings_dict["TIME_ZONE"] = "Asia/Tokyo"
    for name in ("timezone", "timezone_name"):
        connection.__dict__.pop(name, None)
    assert connection.timezone_name == "Asia/Tokyo"


def put_a_time_zone(connection: Any) -> None:
    connection.timezone = JOHN
    connection.timezone_name = "of john"


def log_queries(connection: Any) -> None:
    connection.force_debug_cursor = True
    with connection.cursor() as cursor:
        cursor.execute("SELECT 'secret of a'")


def delete_attributes(connection: Any) -> None:
    for name in ("features", "execute_wrappers", "timezone"):
        del connection.__dict__[name]


def change_helpers(connection: Any) -> None:
    connection.ops.of_a = connection.features.of_a = "a"
    connection.features.can_rollback_ddl = "a"
    connection.introspection = connection.creation = None


def wrap_statements(connection: Any) -> None:
    connection.execute_wrappers.append(lambda execute, *args: execute(*args))


def put_what_cannot_be_compared(connection: Any) -> None:
    class Odd(dict[str, Any]):
        def __eq__(self, other: object) -> bool:
            raise ValueError("the truth is ambiguous")

    connection.execute_wrappers = Odd()
    connection.settings_dict["OPTIONS"]["odd"] = Odd()


WAYS = [
    add_attributes,
    change_settings,
    replace_settings,
    shadow_a_method,
    change_time_zone,
    put_a_time_zone,
    log_queries,
    delete_attributes,
    change_helpers,
    wrap_statements,
    put_what_cannot_be_compared,
]
# Who uses the wrapper, and what each lease has anew.
OF_A_CALL = {"caller", "lease", "run_on_commit", "savepoint_ids", "atomic_blocks", "_opened"}
HELPERS = ("features", "ops", "introspection", "creation", "client", "validation")


def look(connection: Any) -> dict[str, Any]:
    """The attributes of the wrapper and of its helpers, containers copied."""
    own = {k: v for k, v in attributes_of(connection).items() if k not in OF_A_CALL}
    helpers = {name: attributes_of(own[name]) for name in HELPERS}
    return {**own, "helpers": helpers}


def attributes_of(owner: Any) -> dict[str, Any]:
    """Those that differ from what the class has anyway."""
    return {
        name: copied(value)
        for name, value in vars(owner).items()
        if inspect.getattr_static(type(owner), name, owner) is not value
    }


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("autocommit", [False, True], ids=["transaction", "autocommit"])
async def test_the_wrapper_is_for_each_session_what_it_was_after_opening(
    db: DatabaseInterface, way: Callable[[Any], None], autocommit: bool
) -> None:
    for _ in range(2):
        before = await in_session(db, look, autocommit=autocommit)
    await in_session(db, way, autocommit=autocommit)
    after = await in_session(db, look, autocommit=autocommit)
    assert after == before
    assert db.stats()["connections_num"] == 1
    await whole(db)


async def test_what_a_session_leaves_is_gone_also_when_it_fails(db: DatabaseInterface) -> None:
    before = await in_session(db, look)

    def fail(connection: Any) -> None:
        for way in WAYS:
            if way is not delete_attributes:
                way(connection)
        raise LookupError

    with pytest.raises(LookupError):
        await in_session(db, fail)
    assert await in_session(db, look) == before


async def test_settings_are_the_connections_own(db: DatabaseInterface) -> None:
    """Neither Django's settings nor another connection sees a change, nor does an old reference
    reach the next session."""
    kept: list[Any] = []

    def change(connection: Any) -> None:
        change_settings(connection)
        kept.append(connection.settings_dict)

    await in_session(db, change)
    kept[0]["OPTIONS"]["schema"] = "b"
    seen = await in_session(db, lambda c: (c.settings_dict.get("SCHEMA"), c.settings_dict))
    assert seen[0] is None and "schema" not in seen[1]["OPTIONS"]
    assert "SCHEMA" not in connections.settings[db.alias]
    assert "schema" not in connections.settings[db.alias]["OPTIONS"]


async def test_what_sets_up_again_after_a_reset_sees_nothing_of_the_lease(
    db: DatabaseInterface,
) -> None:
    """A receiver of `connection_created` that runs again must not take the last session's tenant
    for its own."""
    seen: list[Any] = []

    def receive(connection: Any, **kwargs: Any) -> None:
        if connection.alias == db.alias:
            seen.append((getattr(connection, "tenant", None), len(connection.execute_wrappers)))
            # Not by a cursor of Django's, so that nobody knows what to send again.
            connection.connection.cursor().execute(SETS[db.vendor])

    connection_created.connect(receive)
    try:
        for _ in range(2):
            async with db.get_session() as session:
                await session.run_sync(lambda: add_attributes(connections[db.alias]))
                await session.run_sync(lambda: wrap_statements(connections[db.alias]))
                await session.execute(SETS[db.vendor])
        assert len(seen) >= 2 and set(seen) == {(None, 0)}
    finally:
        connection_created.disconnect(receive)


SETS = {
    "postgresql": "SET statement_timeout = '77s'",
    "mysql": "SET SESSION lock_wait_timeout = 77",
    "sqlite": "PRAGMA cache_size = -777",
}
SHOWS = {
    "postgresql": ("SHOW statement_timeout", "77s"),
    "mysql": ("SELECT @@lock_wait_timeout", 77),
    "sqlite": ("PRAGMA cache_size", -777),
}


async def test_what_receivers_of_connection_created_did_holds_also_after_a_reset(
    db: DatabaseInterface,
) -> None:
    """Settings on the server, attributes, and execute wrappers: once, however often it is reset."""
    blocked: list[str] = []

    def guard(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
        blocked.append(sql)
        return execute(sql, params, many, context)

    def receive(connection: Any, **kwargs: Any) -> None:
        if connection.alias == db.alias:
            with connection.cursor() as cursor:
                cursor.execute(SETS[db.vendor])
            connection.execute_wrappers.append(guard)
            connection.audited = {"by": "guard"}

    connection_created.connect(receive)
    try:
        sql, right = SHOWS[db.vendor]
        for _ in range(3):
            blocked.clear()
            async with db.get_session() as session:
                assert await session.fetch_value(sql) == right
                audited = await session.run_sync(lambda: connections[db.alias].audited)  # type: ignore[attr-defined]
                assert audited == {"by": "guard"}
                assert [query for query in blocked if query == sql] == [sql]
                await session.execute(SETS[db.vendor].replace("77", "55"))
    finally:
        connection_created.disconnect(receive)


async def test_a_guard_that_refuses_writes_refuses_them_in_every_session(
    db: DatabaseInterface,
) -> None:
    def guard(execute: Any, sql: str, *args: Any) -> Any:
        if sql.startswith("INSERT"):
            raise PermissionError("read-only")
        return execute(sql, *args)

    def receive(connection: Any, **kwargs: Any) -> None:
        if connection.alias == db.alias and guard not in connection.execute_wrappers:
            connection.execute_wrappers.insert(0, guard)

    connection_created.connect(receive)
    try:
        for clearing in (False, True, False):
            with pytest.raises(PermissionError):
                async with db.get_session() as session:
                    await session.execute("INSERT INTO tests_user (name, level) VALUES ('a', 1)")
            if clearing:
                await in_session(db, lambda c: c.execute_wrappers.clear())
        assert await names(db) == []
    finally:
        connection_created.disconnect(receive)


async def test_an_execute_wrapper_left_after_its_session_takes_no_other_away(
    db: DatabaseInterface,
) -> None:
    """Django's `execute_wrapper` removes the last one of the list, whoever's that is by then."""
    seen: list[str] = []

    def watch(execute: Any, sql: str, *args: Any) -> Any:
        seen.append(sql)
        return execute(sql, *args)

    def receive(connection: Any, **kwargs: Any) -> None:
        connection.execute_wrappers.append(watch)

    connection_created.connect(receive)
    try:
        block = await in_session(db, lambda c: c.execute_wrapper(lambda e, *args: e(*args)))
        async with db.get_session() as session:
            await session.run_sync(block.__enter__)
        async with db.get_session() as session:
            block.__exit__(None, None, None)
            await session.fetch_value("SELECT 42")
        assert seen.count("SELECT 42") == 1
    finally:
        connection_created.disconnect(receive)


# Asked with a query.
FEATURES = {
    "postgresql": "is_postgresql_16",
    "mysql": "has_zoneinfo_database",
    "sqlite": "supports_json_field",
}


async def test_what_a_class_computes_once_is_kept(db: DatabaseInterface) -> None:
    """Cached properties would otherwise cost each session a query."""
    feature = FEATURES[db.vendor]
    asked = await in_session(db, lambda c: getattr(c.features, feature))
    kept = await in_session(db, lambda c: vars(c.features).get(feature))
    assert kept is asked is not None


async def test_what_stands_for_other_databases_is_the_leases_own_too(
    db: DatabaseInterface,
) -> None:
    """Code sets a tenant on every alias, whether or not the session has a connection there."""
    other = "sqlite" if db.alias != "sqlite" else "default"

    def change(connection: Any) -> Any:
        connections[other].tenant = "customer A"  # type: ignore[attr-defined]
        connections[other].settings_dict["SCHEMA"] = "a"
        return connections[other].tenant  # type: ignore[attr-defined]

    assert await in_session(db, change) == "customer A"

    def seen(connection: Any) -> Any:
        found = connections[other]
        return getattr(found, "tenant", None), found.settings_dict.get("SCHEMA")

    assert await in_session(db, seen) == (None, None)


# The driver's own objects


def driver_of_postgresql(connection: Any) -> None:
    import psycopg
    from psycopg.rows import dict_row
    from psycopg.types.string import StrDumper

    driver = connection.connection
    driver.row_factory = dict_row
    driver.cursor_factory = psycopg.RawCursor
    driver.server_cursor_factory = psycopg.RawServerCursor
    driver.prepare_threshold, driver.prepared_max = 0, 1
    driver.adapters.register_dumper(int, StrDumper)
    driver.adapters.register_loader("int4", driver.adapters.get_loader(25, psycopg.pq.Format.TEXT))
    driver.adapters.types.add(psycopg.types.TypeInfo("mine", 4711, 4712))
    driver.add_notice_handler(print)
    driver.add_notify_handler(print)
    driver.tenant = "customer A"


def transaction_of_postgresql(connection: Any) -> None:
    import psycopg

    driver = connection.connection
    driver.read_only, driver.deferrable = True, True
    driver.isolation_level = psycopg.IsolationLevel.SERIALIZABLE


def look_at_postgresql(connection: Any) -> Any:
    driver = connection.connection
    kinds = [driver.row_factory, driver.cursor_factory, driver.server_cursor_factory]
    options = [driver.read_only, driver.deferrable, driver.isolation_level]
    handlers = [list(driver._notice_handlers), list(driver._notify_handlers)]
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1, %s, current_setting('transaction_read_only')", [2])
        row = cursor.fetchone()
    others = [driver.prepare_threshold, driver.prepared_max, driver.adapters.types.get("mine")]
    return kinds, options, handlers, row, others, hasattr(driver, "tenant")


@only["postgresql"]
async def test_psycopgs_connection_is_as_it_was_after_opening(db: DatabaseInterface) -> None:
    before = await in_session(db, look_at_postgresql)
    pid = await in_session(db, lambda c: c.connection.info.backend_pid)
    await in_session(db, driver_of_postgresql)
    assert await in_session(db, look_at_postgresql) == before
    await in_session(db, transaction_of_postgresql, autocommit=True)
    assert await in_session(db, look_at_postgresql) == before
    assert await in_session(db, lambda c: c.connection.info.backend_pid) == pid


@only["postgresql"]
async def test_what_was_registered_while_connecting_stays(db: DatabaseInterface) -> None:
    from psycopg.types.string import StrDumper

    def handle(diagnostic: Any) -> None:
        """Nothing."""

    def receive(connection: Any, **kwargs: Any) -> None:
        if connection.alias == db.alias:
            connection.connection.adapters.register_dumper(complex, StrDumper)
            connection.connection.add_notice_handler(handle)

    connection_created.connect(receive)
    try:
        for _ in range(2):
            await in_session(db, driver_of_postgresql)
            driver = await in_session(db, lambda c: c.connection)
            assert driver.adapters._dumpers["s"][complex].__name__ == "StrDumper"
            assert driver._notice_handlers == [handle]
    finally:
        connection_created.disconnect(receive)


@only["postgresql"]
async def test_a_pipeline_that_was_left_open_reaches_nobody(db: DatabaseInterface) -> None:
    kept: list[Any] = []

    def enter(connection: Any) -> None:
        kept.append(connection.connection.pipeline())
        kept[0].__enter__()

    await in_session(db, enter, autocommit=True)
    assert await in_session(db, lambda c: c.connection._pipeline) is None
    assert await names(db) == []


@only["mysql"]
async def test_asyncmys_connection_is_as_it_was_after_opening(db: DatabaseInterface) -> None:
    def change(connection: Any) -> None:
        driver = connection.connection
        driver.tenant = "customer A"
        driver.raw._decoders[3] = lambda value: "customer A"
        driver.raw._encoders[int] = lambda value, mapping=None: "666"
        driver.autocommit(False)
        driver.autocommit(True)

    def look_at(connection: Any) -> Any:
        with connection.cursor() as cursor:
            cursor.execute("SELECT CAST(1 AS INT), %s", [2])
            row = cursor.fetchone()
        return row, hasattr(connection.connection, "tenant"), connection.connection.thread_id()

    before = await in_session(db, look_at)
    await in_session(db, change)
    assert await in_session(db, look_at) == before


@only["sqlite"]
@pytest.mark.parametrize(
    "change",
    [
        lambda driver: setattr(driver, "row_factory", lambda cursor, row: ["changed"]),
        lambda driver: setattr(driver, "text_factory", lambda value: "changed"),
        lambda driver: driver.set_trace_callback(lambda text: None),
        lambda driver: driver.set_authorizer(lambda *args: 1),
        lambda driver: driver.create_function("upper", 1, lambda value: "changed"),
        lambda driver: driver.execute("PRAGMA query_only = ON"),
        lambda driver: driver.cursor().executescript("PRAGMA query_only = ON"),
    ],
    ids=["row_factory", "text_factory", "trace", "authorizer", "function", "pragma", "script"],
)
async def test_what_was_done_to_sqlites_connection_reaches_nobody(
    db: DatabaseInterface, change: Callable[[Any], Any]
) -> None:
    await in_session(db, lambda c: change(c.connection), autocommit=True)
    async with db.get_session() as session:
        assert tuple(await session.fetch("SELECT upper('x'), 'y'")) == ("X", "y")  # type: ignore[arg-type]
        await session.execute("INSERT INTO tests_user (name, level) VALUES ('z', 1)")
    assert await names(db) == ["z"]


# Reading, and running what nobody has seen


def reading(connection: Any) -> None:
    """As an error tracker does, for the address."""
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")
        for driver in (cursor.connection, cursor.cursor.connection, connection.connection):
            getattr(driver, "info", None)
            assert driver is connection.connection
        assert cursor.connection.cursor() is not None


async def test_reading_the_drivers_connection_marks_nothing(db: DatabaseInterface) -> None:
    async with db.get_session() as session:
        await session.run_sync(lambda: reading(connections[db.alias]))
        touched = await session.run_sync(lambda: connections[db.alias].touched)  # type: ignore[attr-defined]
        assert not touched
        assert await session.gather(
            lambda s: s.fetch_value("SELECT 1"), lambda s: s.fetch_value("SELECT 2")
        ) == [1, 2]


async def test_a_tool_that_reads_the_connection_in_each_statement_marks_nothing(
    db: DatabaseInterface, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = CursorWrapper.execute

    def execute(self: Any, sql: Any, params: Any = None) -> Any:
        getattr(self.cursor.connection, "info", None)
        self.connection  # noqa: B018
        return plain(self, sql, params)

    monkeypatch.setattr(CursorWrapper, "execute", execute)
    async with db.get_session() as session:
        await session.fetch_value("SELECT 1")
        assert await session.gather(lambda s: s.fetch_value("SELECT 1")) == [1]


UNSEEN: dict[str, Callable[[Any], Any]] = {
    "connection.cursor": lambda c: c.connection.cursor().execute(WRITE),
    "cursor.cursor": lambda c: c.cursor().cursor.execute(WRITE),
    "cursor.connection": lambda c: c.cursor().connection.cursor().execute(WRITE),
}
WRITE = "INSERT INTO tests_user (name, level) VALUES ('unseen', 1)"


@pytest.mark.parametrize("way", UNSEEN)
async def test_sql_run_past_djangos_cursor_counts_as_a_write(
    db: DatabaseInterface, way: str
) -> None:
    async with db.get_session() as session:
        await session.run_sync(lambda: UNSEEN[way](connections[db.alias]))
        with pytest.raises(SessionStateError, match="written, locked or set"):
            await session.gather(lambda s: s.fetch_value("SELECT 1"))
    assert await names(db) == ["unseen"]


@pytest.mark.parametrize("way", UNSEEN)
async def test_sql_run_past_djangos_cursor_is_in_the_transaction(
    db: DatabaseInterface, way: str
) -> None:
    def write(connection: Any) -> None:
        UNSEEN[way](connection)
        raise LookupError

    with pytest.raises(LookupError):
        await in_session(db, write)
    assert await names(db) == []


@pytest.mark.parametrize("way", UNSEEN)
async def test_what_sql_past_djangos_cursor_sets_is_reset(db: DatabaseInterface, way: str) -> None:
    sql, right = SHOWS[db.vendor]

    def set_it(connection: Any) -> None:
        cursors = {
            "connection.cursor": lambda: connection.connection.cursor(),
            "cursor.cursor": lambda: connection.cursor().cursor,
            "cursor.connection": lambda: connection.cursor().connection.cursor(),
        }
        cursors[way]().execute(SETS[db.vendor])

    await in_session(db, set_it)
    async with db.get_session() as session:
        assert await session.fetch_value(sql) != right


async def test_a_statement_that_an_execute_wrapper_changed_is_judged_as_it_is_sent(
    db: DatabaseInterface,
) -> None:
    def change(execute: Any, sql: str, *args: Any) -> Any:
        return execute(SETS[db.vendor] if sql == "SELECT 'harmless'" else sql, *args)

    async with db.get_session() as session:
        await session.run_sync(lambda: connections[db.alias].execute_wrappers.append(change))
        await session.execute("SELECT 'harmless'")
    async with db.get_session() as session:
        sql, right = SHOWS[db.vendor]
        assert await session.fetch_value(sql) != right


async def test_debug_logging_of_queries_marks_nothing(db: DatabaseInterface) -> None:
    """SQLite's backend asks the driver's connection how the parameters read."""
    async with db.get_session() as session:

        def ask() -> None:
            connection = connections[db.alias]
            connection.force_debug_cursor = True
            with connection.cursor() as cursor:
                cursor.execute("SELECT %s", ["a"])
            assert "a" in connection.queries[-1]["sql"]

        await session.run_sync(ask)
        assert not await session.run_sync(lambda: connections[db.alias].touched)  # type: ignore[attr-defined]
        assert await session.gather(lambda s: s.fetch_value("SELECT 1")) == [1]
