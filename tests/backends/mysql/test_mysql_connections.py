"""What asyncmy's connections must keep behind Django's backend: settings, logins, and what the next
session finds. On real
connections, which are the point."""

from __future__ import annotations

import asyncio
import threading
import traceback
from typing import Any

import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import DatabaseError, OperationalError, connections
from django.db.transaction import TransactionManagementError
from django.db.utils import load_backend

from django_asyncsession.backends.engines import install_drivers
from django_asyncsession.exceptions import ConfigurationError
from django_asyncsession.interface import DatabaseInterface
from tests.backends.mysql.server import interface, rows, sessions, sync, until
from tests.faults import CLIENT, Elapsed, FaultProxy, LoopProbe, address, longest_stall
from tests.models import User

pytestmark = pytest.mark.skipif(
    "mysql" not in settings.DATABASES, reason="no MySQL server: set TEST_MYSQL_URL"
)


# Drivers


def test_pymysql_stands_in_for_mysqlclient_without_being_changed() -> None:
    install_drivers(["django.db.backends.mysql"])
    import MySQLdb

    assert load_backend("django.db.backends.mysql").Database is MySQLdb
    if MySQLdb.__name__ == "MySQLdb" and not MySQLdb.__path__:
        import pymysql

        assert pymysql.__name__ == "pymysql"
        assert MySQLdb.version_info >= (2, 2, 1)
        assert MySQLdb.OperationalError is pymysql.err.OperationalError


async def test_no_thread_is_used(db: DatabaseInterface) -> None:
    before = threading.active_count()

    async def work(n: int) -> None:
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (%s)", [n])
            assert threading.active_count() == before

    await work(0)
    async with LoopProbe() as probe, asyncio.TaskGroup() as tasks:
        for n in range(1, 200):
            tasks.create_task(work(n))
            # Otherwise the loop is busy with beginning all of them.
            await asyncio.sleep(0)
    assert len(rows()) == 200
    assert len(sessions()) == db.stats()["pool_size"] <= 10
    assert probe.worst < longest_stall()
    await db.close()
    await until(lambda: not sessions())


async def test_the_server_is_asked_for_its_version_once(t: None) -> None:
    asked: list[bytes] = []

    def note(who: str, data: bytes) -> None:
        if who == CLIENT and b"CONVERT_TZ" in data:
            asked.append(data)

    async def hold(db: DatabaseInterface) -> None:
        async with db.get_session() as session:
            await session.execute("DO SLEEP(0.1)")

    async with FaultProxy(*address("mysql")) as proxy:
        proxy.hook = note
        db = interface(HOST="127.0.0.1", PORT=proxy.port)
        await hold(db)
        await asyncio.gather(*(hold(db) for _ in range(5)))
        assert db.stats()["connections_num"] >= 5
        assert len(asked) == 1
        await db.close()


async def test_settings_hold_as_with_djangos_driver(t: None) -> None:
    db = interface(
        options={
            "sql_mode": "NO_BACKSLASH_ESCAPES,STRICT_ALL_TABLES",
            "isolation_level": "serializable",
            "init_command": "SET @@lc_time_names = 'de_DE'; SET @@div_precision_increment = 7;",
            "charset": "utf8mb4",
            "collation": "utf8mb4_unicode_ci",
        }
    )
    async with db.get_session() as session:
        row = await session.fetch(
            "SELECT @@sql_mode, @@lc_time_names, @@div_precision_increment, @@collation_connection,"
            " @@tx_isolation, @@autocommit, @@character_set_client"
        )
        mode = "NO_BACKSLASH_ESCAPES,STRICT_ALL_TABLES"
        assert row == (mode, "de_DE", 7, "utf8mb4_unicode_ci", "SERIALIZABLE", 1, "utf8mb4")
        for value in ("back\\slash", "quo'te", "' OR 1=1 -- ", 'dou"ble'):
            assert await session.fetch_value("SELECT %s", [value]) == value
        value = b"\\'\x00\xff' -- "
        assert await session.fetch_value("SELECT _binary %s", [value]) == value
        assert await session.fetch_value("SELECT %(a)s", {"a": "\\'"}) == "\\'"
    await db.close()


async def test_an_option_that_is_not_known_is_told(t: None) -> None:
    db = interface(options={"unix_sokcet": "/x"})
    with pytest.raises(ConfigurationError, match="unix_sokcet"):
        async with db.get_session() as session:
            await session.fetch_value("SELECT 1")
    await db.close()


@pytest.mark.parametrize("tls", [{"ssl": {"ca": None}}, {"ssl_mode": "REQUIRED"}])
async def test_tls_that_is_asked_for_is_never_left_out(t: None, tls: dict[str, Any]) -> None:
    """This server has no certificate, so there must be no connection at all."""
    if sync("SELECT @@have_ssl") == (("YES",),):
        pytest.skip("the server has TLS")
    db = interface(options=tls)
    with Elapsed() as took, pytest.raises(OperationalError):
        async with db.get_session() as session:
            await session.fetch_value("SELECT 1")
    assert took.seconds < 3
    await db.close()


async def test_tls_that_may_be_left_out_is_refused(t: None) -> None:
    db = interface(options={"ssl_mode": "PREFERRED"})
    with pytest.raises(ConfigurationError, match="REQUIRED"):
        async with db.get_session() as session:
            await session.fetch_value("SELECT 1")
    await db.close()


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"USER": "nobody", "PASSWORD": "wrong pässword"}, "Access denied"),
        ({"NAME": "no_such_database"}, "Unknown database"),
    ],
)
async def test_a_wrong_login_is_told_at_once(t: None, entry: dict[str, str], message: str) -> None:
    db = interface(**entry)
    with Elapsed() as took, pytest.raises(OperationalError, match=message) as info:
        async with db.get_session() as session:
            await session.fetch_value("SELECT 1")
    assert took.seconds < 1
    assert info.value.__cause__ is not None
    frames = traceback.TracebackException.from_exception(info.value, capture_locals=True).stack
    ours = [frame for frame in frames if "test_mysql" not in frame.filename]
    assert ours and "wrong p" not in repr([frame.locals for frame in ours])
    await db.close()


async def test_a_password_beyond_latin_1_works(t: None) -> None:
    sync("CREATE OR REPLACE USER 'asyncsession'@'%' IDENTIFIED BY 'пароль é'")
    sync("GRANT ALL ON *.* TO 'asyncsession'@'%'")
    db = interface(USER="asyncsession", PASSWORD="пароль é")
    try:
        async with db.get_session() as session:
            assert (await session.fetch_value("SELECT user()")).startswith("asyncsession@")
    finally:
        await db.close()
        sync("DROP USER 'asyncsession'@'%'")


async def test_a_server_that_does_not_answer_is_given_up(t: None) -> None:
    async with FaultProxy(*address("mysql")) as proxy:
        proxy.deaf = True
        db = interface(HOST="127.0.0.1", PORT=proxy.port, options={"connect_timeout": 1})
        with Elapsed() as took, pytest.raises(OperationalError, match="within 1 s"):
            async with db.get_session() as session:
                await session.fetch_value("SELECT 1")
        assert took.seconds < 2
        await db.close()


# Lost connections


async def test_killed_in_a_transaction_nothing_goes_on(db: DatabaseInterface) -> None:
    def go_on() -> None:
        with connections["mysql"].cursor() as cursor:
            for n in (2, 3):
                with pytest.raises(DatabaseError):
                    cursor.execute("INSERT INTO t (n) VALUES (%s)", [n])

    with pytest.raises((OperationalError, TransactionManagementError)):
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")
            sync(f"KILL {await session.fetch_value('SELECT connection_id()')}")
            with pytest.raises(OperationalError) as info:
                await session.execute("INSERT INTO t (n) VALUES (2)")
            assert info.value.args[0] in (2006, 2013)
            with pytest.raises(DatabaseError):
                await session.execute("INSERT INTO t (n) VALUES (3)")
            await session.run_sync(go_on)
    assert rows() == []
    async with db.get_session() as session:
        await session.execute("INSERT INTO t (n) VALUES (4)")
    assert rows() == [4]


async def test_an_idle_connection_that_the_server_closed_is_replaced(t: None) -> None:
    db = interface(max_size=1, CONN_HEALTH_CHECKS=True)
    async with db.get_session() as session:
        thread_id = await session.fetch_value("SELECT connection_id()")
    sync(f"KILL {thread_id}")
    async with db.get_session() as session:
        assert await session.fetch_value("SELECT 1") == 1
    assert db.stats()["connections_lost"] == 1
    await db.close()


async def test_a_packet_that_is_too_big_is_an_error_and_the_connection_replaced(
    one: DatabaseInterface,
) -> None:
    sizes = sync("SELECT @@max_allowed_packet")
    with pytest.raises(OperationalError):
        async with one.get_session() as session:
            await session.fetch_value("SELECT LENGTH(%s)", [b"x" * (sizes[0][0] + 1024)])
    async with one.get_session() as session:
        assert await session.fetch_value("SELECT 1") == 1


# What a session leaves behind


LEFTOVERS = {
    "variable": ("SET @x = 1", "SELECT @x", None),
    "assigned": ("SELECT @x := 1", "SELECT @x", None),
    "mode": ("SET SESSION sql_mode = ''", "SELECT @@sql_mode LIKE '%%STRICT%%'", 1),
    "names": ("SET NAMES latin1", "SELECT @@character_set_client", "utf8mb4"),
    "zone": ("SET time_zone = '+05:00'", "SELECT @@time_zone", "SYSTEM"),
    "autocommit": ("SET autocommit = 0", "SELECT @@autocommit", 1),
    "isolation": (
        "SET SESSION TRANSACTION ISOLATION LEVEL SERIALIZABLE",
        "SELECT @@tx_isolation",
        "READ-COMMITTED",
    ),
    "null": ("SET SQL_AUTO_IS_NULL = 1", "SELECT @@sql_auto_is_null", 0),
    "lock": ("SELECT GET_LOCK('das', 0)", "SELECT IS_USED_LOCK('das')", None),
    "database": ("USE mysql", "SELECT database() <> 'mysql'", 1),
    "role": ("SET ROLE NONE", "SELECT current_role()", None),
}


@pytest.mark.parametrize("change, ask, expected", LEFTOVERS.values(), ids=LEFTOVERS)
async def test_the_next_session_sees_defaults(
    one: DatabaseInterface, change: str, ask: str, expected: Any
) -> None:
    async with one.get_session(autocommit=True) as session:
        await session.execute(change)
    async with one.get_session() as session:
        assert await session.fetch_value(ask, []) == expected


async def test_temporary_tables_are_gone_with_the_session(one: DatabaseInterface) -> None:
    async with one.get_session() as session:
        await session.execute("CREATE TEMPORARY TABLE tt (x integer)")
        await session.execute("INSERT INTO tt VALUES (1)")
    with pytest.raises(DatabaseError, match="tt"):
        async with one.get_session() as session:
            await session.execute("SELECT * FROM tt")
    assert one.stats()["connections_num"] == 1


async def test_the_reset_travels_with_the_end_of_a_transaction(t: None) -> None:
    async with FaultProxy(*address("mysql")) as proxy:
        db = interface(max_size=1, HOST="127.0.0.1", PORT=proxy.port)
        async with db.get_session() as session:
            await session.fetch_value("SELECT 1")
        before = proxy.round_trips
        async with db.get_session(autocommit=True) as session:
            await session.execute("INSERT INTO t (n) VALUES (%s)", ["7"])
        # Here it is sent after the answer, and only the next session waits for it.
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (%s)", ["8"])
        # The first writes that commit by themselves take one more, see FEW_WRITES.
        assert proxy.round_trips - before == 3 + 2
        await db.close()


# Statements and rows


def test_used_outside_a_session_an_engine_of_ours_is_djangos_own() -> None:
    from django.db.utils import ConnectionHandler

    entry = {**connections.settings["mysql"], "ENGINE": "django_asyncsession.backends.mysql"}
    entry.pop("TEST")
    connection = ConnectionHandler({"default": {**entry, "TEST": {}}})["default"]
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT %s", [7])
            assert cursor.fetchone() == (7,)
        assert list(User.objects.using("mysql").iterator()) == []
    except ImproperlyConfigured as exc:  # pragma: no cover
        pytest.fail(str(exc))
    finally:
        connection.close()
