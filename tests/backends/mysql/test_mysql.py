"""MySQL and MariaDB: what asyncmy's connections must keep behind Django's backend.

On real connections, which are the point.
"""

from __future__ import annotations

import asyncio
import copy
import datetime
import decimal
import gc
import logging
import threading
import time
import traceback
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
from asyncmy import Connection
from asyncmy.constants import FIELD_TYPE
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.db import (
    DatabaseError,
    DataError,
    IntegrityError,
    OperationalError,
    ProgrammingError,
    connections,
    models,
    transaction,
)
from django.db.backends.mysql import base
from django.db.transaction import TransactionManagementError
from django.db.utils import load_backend

from django_asyncsession import Session
from django_asyncsession.backends.engines import install_drivers
from django_asyncsession.exceptions import ConfigurationError, QueryTimeout
from django_asyncsession.interface import DatabaseInterface
from tests.faults import (
    CLIENT,
    SERVER,
    Elapsed,
    FaultProxy,
    LoopProbe,
    address,
    cancel_at,
    longest_stall,
    outcome_of,
    watchdog,
)
from tests.models import User

pytestmark = pytest.mark.skipif(
    "mysql" not in settings.DATABASES, reason="no MySQL server: set TEST_MYSQL_URL"
)


@pytest.fixture(autouse=True)
def frozen_loops_end() -> Iterator[None]:
    with watchdog(100):
        yield


def interface(max_size: int = 10, options: dict[str, Any] | None = None, **entry: Any) -> Any:
    settings_dict = copy.deepcopy(connections.settings["mysql"])
    settings_dict["OPTIONS"] = {
        **(options or {}),
        "pool": {"max_size": max_size, "timeout": 5},
    }
    settings_dict.update(entry)
    return DatabaseInterface("mysql", settings_dict)


@pytest.fixture
async def db(t: None) -> AsyncIterator[DatabaseInterface]:
    """The database of the tests, with a pool of 10."""
    db = interface()
    yield db
    await db.close()


@pytest.fixture
async def one(t: None) -> AsyncIterator[DatabaseInterface]:
    """The database of the tests, with a single connection."""
    db = interface(max_size=1)
    yield db
    await db.close()


@pytest.fixture
def t() -> Iterator[None]:
    """The table t(id, n)."""
    _others.clear()
    _others.update(sessions())
    sync("DROP TABLE IF EXISTS t")
    sync("CREATE TABLE t (id integer AUTO_INCREMENT PRIMARY KEY, n integer UNIQUE)")
    yield
    sync("DROP TABLE IF EXISTS t")


@cache
def admin() -> Any:
    """A direct connection, beside Django and the package."""
    import pymysql

    entry = connections["mysql"].settings_dict
    return pymysql.connect(
        host=entry["HOST"],
        port=int(entry["PORT"] or 3306),
        user=entry["USER"],
        password=entry["PASSWORD"],
        database=entry["NAME"],
        autocommit=True,
    )


@pytest.fixture(scope="module", autouse=True)
def admin_leaves() -> Iterator[None]:
    yield
    admin().close()
    admin.cache_clear()


def sync(sql: str) -> Any:
    """Run SQL over the direct connection; return the rows."""
    with admin().cursor() as cursor:
        cursor.execute(sql)
        return cursor.fetchall()


async def in_django(fn: Callable[[], Any]) -> Any:
    """What `fn` returns, or raises, with Django's own connection."""

    def call() -> Any:
        try:
            return fn()
        finally:
            connections["mysql"].close()

    return await asyncio.to_thread(call)


def rows() -> list[int]:
    return [n for (n,) in sync("SELECT n FROM t ORDER BY n")]


def sessions() -> dict[int, str]:
    """Ids and commands of the server's other sessions on this database."""
    found = sync(
        "SELECT id, command FROM information_schema.processlist "
        "WHERE db = database() AND id <> connection_id()"
    )
    return {number: command for number, command in found if number not in _others}


# Sessions that were there before the test.
_others: set[int] = set()


async def until(condition: Any, seconds: float = 3) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


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


# Cancellation


async def test_a_cancelled_statement_is_killed_and_its_row_not_written(
    db: DatabaseInterface,
) -> None:
    async def insert() -> None:
        async with db.get_session(autocommit=True) as session:
            await session.execute("INSERT INTO t (n) SELECT SLEEP(2)")

    task = asyncio.create_task(insert())
    await until(lambda: "Query" in sessions().values())
    (thread_id,) = sessions()
    async with LoopProbe() as probe:
        with Elapsed() as took:
            task.cancel()
            assert isinstance(await outcome_of(task), asyncio.CancelledError)
        assert took.seconds < 0.5
        await asyncio.sleep(0)
    await until(lambda: thread_id not in sessions(), 1)
    assert probe.worst < longest_stall()
    await asyncio.sleep(0.1)
    assert rows() == []


async def operation(db: DatabaseInterface, n: int) -> None:
    async with db.get_session() as session:
        await session.execute("INSERT INTO t (n) VALUES (%s)", [n])
        async with session.begin_nested():
            await session.execute("INSERT INTO t (n) VALUES (%s)", [n + 1])
        await session.fetch_all("SELECT * FROM t")


async def assert_clean(db: DatabaseInterface) -> None:
    """Nothing is left of a transaction on the server, and the slot can be used again."""
    async with db.get_session(autocommit=True) as session:
        assert await session.fetch_value("SELECT 1") == 1
    await until(lambda: len(sessions()) <= db.stats()["pool_size"])
    ids = ", ".join(map(str, sessions())) or "0"
    assert not sync(
        f"SELECT * FROM information_schema.innodb_trx WHERE trx_mysql_thread_id IN ({ids})"
    )


async def test_cancelled_anywhere_it_is_all_or_nothing(t: None) -> None:
    """One cancel at each suspension: both rows or none, no transaction left on the server."""
    step, done = 1, False
    while not done:
        db = interface(max_size=1)
        before = len(rows())
        run = cancel_at(operation(db, step * 10), {step})
        outcome = await outcome_of(run)
        done = run.done
        assert outcome is None if done else isinstance(outcome, asyncio.CancelledError)
        await assert_clean(db)
        assert len(rows()) - before in ((2,) if done else (0, 2))
        await db.close()
        step += 1
    assert step > 5


async def test_cancelled_twice_it_is_still_all_or_nothing(t: None) -> None:
    for first in range(1, 7):
        for second in range(first + 1, first + 4):
            db = interface(max_size=1)
            before = len(rows())
            run = cancel_at(operation(db, (first * 100 + second) * 10), {first, second})
            outcome = await outcome_of(run)
            assert outcome is None or isinstance(outcome, asyncio.CancelledError)
            await assert_clean(db)
            assert len(rows()) - before in (0, 2)
            await db.close()


async def test_a_cancelled_rollback_is_not_a_commit(t: None) -> None:
    async def fail(db: DatabaseInterface) -> None:
        async with db.get_session() as session:
            session.on_commit(lambda: pytest.fail("it was rolled back"))
            await session.execute("INSERT INTO t (n) VALUES (1)")
            raise ValueError

    for step in range(1, 10):
        db = interface(max_size=1)
        outcome = await outcome_of(cancel_at(fail(db), {step}))
        assert isinstance(outcome, asyncio.CancelledError | ValueError)
        await assert_clean(db)
        assert rows() == []
        await db.close()


async def test_a_read_cancelled_in_mid_packet_is_never_seen_by_the_next(t: None) -> None:
    async with FaultProxy(*address("mysql")) as proxy:
        proxy.chunk = 100
        db = interface(max_size=1, HOST="127.0.0.1", PORT=proxy.port)
        async with db.get_session() as session:
            await session.fetch_value("SELECT 1")
        proxy.delay = 0.02

        async def read() -> None:
            async with db.get_session() as session:
                await session.fetch_all("SELECT REPEAT('old rows', 500)")

        task = asyncio.create_task(read())
        await asyncio.sleep(0.3)
        assert not task.done()
        task.cancel()
        assert isinstance(await outcome_of(task), asyncio.CancelledError)
        proxy.delay = 0.0
        async with db.get_session() as session:
            assert await session.fetch_value("SELECT 'new'") == "new"
        assert db.stats()["connections_num"] == 2
        await db.close()


async def test_a_frozen_network_does_not_hold_up_a_cancel(t: None) -> None:
    async with FaultProxy(*address("mysql")) as proxy:
        db = interface(max_size=1, HOST="127.0.0.1", PORT=proxy.port)
        async with db.get_session() as session:
            await session.fetch_value("SELECT 1")
            proxy.freeze()
            with Elapsed() as took, pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await session.fetch_value("SELECT 2")
            assert took.seconds < 1
            with suppress(DatabaseError):
                await session.rollback()
        proxy.thaw()
        await db.close()


async def test_close_of_a_suspended_call_drops_the_connection(db: DatabaseInterface) -> None:
    session = db.get_session()
    await session.begin()
    await session.execute("INSERT INTO t (n) VALUES (1)")
    call = session.execute("DO SLEEP(20)")
    call.send(None)
    call.close()
    await session.close()
    await until(lambda: not sessions(), 2)
    assert rows() == []


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


# Transactions


async def test_a_transaction_takes_two_round_trips(t: None) -> None:
    """BEGIN travels with the first statement, and nothing follows COMMIT."""
    async with FaultProxy(*address("mysql")) as proxy:
        db = interface(max_size=1, HOST="127.0.0.1", PORT=proxy.port)
        for expected in (None, 2):
            before = proxy.round_trips
            async with db.get_session(isolation="serializable") as session:
                await session.execute("INSERT INTO t (n) VALUES (%s)", [expected])
            assert expected is None or proxy.round_trips - before == expected
        await db.close()


async def test_a_deadlock_that_is_swallowed_leaves_nothing_half_done(
    db: DatabaseInterface,
) -> None:
    """The victim's transaction is gone on the server; code that goes on must not save the rest."""
    sync("INSERT INTO t (n) VALUES (1), (2)")
    met = [asyncio.Event(), asyncio.Event()]

    async def cross(first: int, second: int) -> str:
        def swallow() -> None:
            with connections["mysql"].cursor() as cursor:
                with suppress(OperationalError):
                    cursor.execute("UPDATE t SET n = n + 10 WHERE id = %s", [second])
                cursor.execute("INSERT INTO t (n) VALUES (%s)", [100 + first])

        try:
            async with db.get_session() as session:
                await session.execute("UPDATE t SET n = n + 10 WHERE id = %s", [first])
                met[first - 1].set()
                await met[second - 1].wait()
                await session.run_sync(swallow)
        except TransactionManagementError as exc:
            assert "taken back" in str(exc)
            return "victim"
        return "saved"

    outcomes = await asyncio.gather(cross(1, 2), cross(2, 1))
    assert sorted(outcomes) == ["saved", "victim"]
    winner = outcomes.index("saved") + 1
    assert rows() == [11, 12, 100 + winner]


async def test_a_deadlock_in_a_nested_block_dooms_the_outer_one_too(
    db: DatabaseInterface,
) -> None:
    sync("INSERT INTO t (n) VALUES (1), (2)")
    met = [asyncio.Event(), asyncio.Event()]

    async def cross(first: int, second: int) -> None:
        def swallow() -> None:
            cursor = connections["mysql"].cursor()
            with suppress(OperationalError), transaction.atomic("mysql"):
                cursor.execute("UPDATE t SET n = n + 10 WHERE id = %s", [second])

        async with db.get_session() as session:
            await session.execute("UPDATE t SET n = n + 10 WHERE id = %s", [first])
            met[first - 1].set()
            await met[second - 1].wait()
            await session.run_sync(swallow)

    outcomes = await asyncio.gather(cross(1, 2), cross(2, 1), return_exceptions=True)
    assert sorted(type(o).__name__ for o in outcomes) == ["NoneType", "TransactionManagementError"]
    assert rows() == [11, 12]


async def test_a_lock_timeout_takes_back_the_statement_only(db: DatabaseInterface) -> None:
    sync("INSERT INTO t (n) VALUES (1)")

    def swallow() -> None:
        with connections["mysql"].cursor() as cursor:
            cursor.execute("INSERT INTO t (n) VALUES (5)")
            with pytest.raises(OperationalError, match="Lock wait timeout"):
                cursor.execute("UPDATE t SET n = 3 WHERE id = 1")
            cursor.execute("INSERT INTO t (n) VALUES (6)")

    async with db.get_session() as holder:
        await holder.execute("UPDATE t SET n = 2 WHERE id = 1")
        async with db.get_session(lock_timeout=0.5) as session:
            await session.run_sync(swallow)
        with pytest.raises(QueryTimeout):
            async with db.get_session(lock_timeout=0.5) as session:
                await session.execute("UPDATE t SET n = 4 WHERE id = 1")
    assert rows() == [2, 5, 6]


async def test_timeouts_are_gone_with_the_session(one: DatabaseInterface) -> None:
    async def limits() -> Any:
        async with one.get_session() as session:
            return await session.fetch(
                "SELECT @@innodb_lock_wait_timeout, @@lock_wait_timeout, @@wait_timeout, "
                "@@tx_isolation, @@tx_read_only, connection_id()"
            )

    before = await limits()
    with Elapsed() as took, pytest.raises(QueryTimeout):
        async with one.get_session(timeout=0.2, lock_timeout=1, idle_timeout=60) as session:
            await session.fetch_value("SELECT SLEEP(20) FROM information_schema.collations")
    assert took.seconds < 2
    async with one.get_session(
        autocommit=True, timeout=5, isolation="serializable", read_only=True
    ) as session:
        assert await session.fetch_value("SELECT @@tx_isolation") == "SERIALIZABLE"
    async with one.get_session(isolation="serializable", read_only=True) as session:
        await session.fetch_value("SELECT 1")
    assert await limits() == before


async def test_a_transaction_idle_for_too_long_is_ended_by_the_server(
    db: DatabaseInterface,
) -> None:
    with pytest.raises(TransactionManagementError, match="lost"):
        async with db.get_session(idle_timeout=1) as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")
            await until(lambda: not sessions())
            with pytest.raises(OperationalError) as info:
                await session.execute("INSERT INTO t (n) VALUES (2)")
            assert info.value.args[0] in (2006, 2013, 4031)
    assert rows() == []


async def test_read_only_and_isolation_hold_in_the_transaction(db: DatabaseInterface) -> None:
    with pytest.raises(OperationalError, match="READ ONLY"):
        async with db.get_session(read_only=True) as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")
    sync("INSERT INTO t (n) VALUES (1)")
    async with db.get_session(isolation="repeatable read") as session:
        assert await session.fetch_value("SELECT count(*) FROM t") == 1
        sync("INSERT INTO t (n) VALUES (2)")
        assert await session.fetch_value("SELECT count(*) FROM t") == 1
    async with db.get_session() as session:
        assert await session.fetch_value("SELECT count(*) FROM t") == 2
        sync("INSERT INTO t (n) VALUES (3)")
        assert await session.fetch_value("SELECT count(*) FROM t") == 3


async def test_deferrable_is_refused(db: DatabaseInterface) -> None:
    with pytest.raises(ConfigurationError, match="deferrable"):
        async with db.get_session(deferrable=True) as session:
            await session.fetch_value("SELECT 1")


async def test_ddl_in_a_transaction_is_warned_of(
    db: DatabaseInterface, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "django_asyncsession"), pytest.raises(ValueError):
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")
            await session.execute("CREATE TABLE t2 (x integer)")
            await session.execute("INSERT INTO t (n) VALUES (2)")
            raise ValueError
    sync("DROP TABLE t2")
    assert "CREATE TABLE commits the transaction" in caplog.text
    assert rows() == [1]


@pytest.mark.parametrize("statement", ["COMMIT", "ROLLBACK", "BEGIN", "START TRANSACTION"])
async def test_sql_that_ends_the_transaction_is_noticed(
    db: DatabaseInterface, statement: str
) -> None:
    with pytest.raises(TransactionManagementError, match="SQL"):
        async with db.get_session() as session:
            await session.execute(statement)
    with pytest.raises(TransactionManagementError, match="SQL"):
        async with db.get_session() as session:
            await session.execute("SELECT 1")
            await session.execute(statement)
            await session.execute("INSERT INTO t (n) VALUES (1)")
    assert rows() == []
    await assert_clean(db)


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


async def test_rows_stream_without_being_held_in_memory(db: DatabaseInterface) -> None:
    big = "SELECT seq, REPEAT('x', 1000) FROM seq_1_to_100000"
    async with db.get_session() as session:
        seen = []
        with Elapsed() as took:
            async for row in session.stream(big, chunk_size=500):
                if not seen:
                    first = time.monotonic() - took._started
                seen.append(row[0])
        assert seen == list(range(1, 100001))
        assert first < took.seconds / 2
        assert await session.fetch_value("SELECT 7") == 7


async def test_a_statement_in_the_middle_of_a_stream_loses_no_row(db: DatabaseInterface) -> None:
    seen = []
    async with db.get_session() as session:
        async for row in session.stream("SELECT seq FROM seq_1_to_5000", chunk_size=100):
            seen.append(row[0])
            if row[0] in (1, 150, 151):
                assert await session.fetch_value("SELECT %s", [row[0]]) == row[0]
    assert seen == list(range(1, 5001))


async def test_a_stream_left_half_way_keeps_the_connection(one: DatabaseInterface) -> None:
    def first() -> Any:
        for user in User.objects.using("mysql").iterator(chunk_size=10):
            return user.name
        return None

    sync("INSERT INTO tests_user (name, level) SELECT CONCAT('u', seq), 1 FROM seq_0_to_999")
    try:
        async with one.get_session() as session:
            assert await session.run_sync(first) == "u0"
            assert await session.fetch_value("SELECT 7") == 7
            async for _ in session.stream("SELECT seq FROM seq_1_to_5000"):
                break
        async with one.get_session() as session:
            rows = session.stream("SELECT seq FROM seq_1_to_5000")
            await anext(rows)
        await rows.aclose()
        async with one.get_session() as session:
            assert await session.fetch_value("SELECT 8") == 8
        assert one.stats()["connections_num"] == 1
    finally:
        sync("DELETE FROM tests_user")
        gc.collect()


class Odd(models.Model):
    """The table of the test below, on the connection that it makes."""

    day = models.DateField(null=True)
    at = models.DateTimeField(null=True)
    lasts = models.TimeField(null=True)

    class Meta:
        app_label = "tests_mysql"
        db_table = "odd"
        managed = False


ODD = [
    ("day", "0000-00-00", "date"),
    ("day", "2020-00-10", "date"),
    ("at", "0000-00-00 00:00:00", "date"),
    ("lasts", "25:01:02", "time of day"),
    ("lasts", "-01:00:00", "time of day"),
    ("lasts", "838:59:59", "time of day"),
]


@pytest.fixture
def odd() -> Iterator[None]:
    """A table with a good row, and one for each value that Python has not."""
    sync("DROP TABLE IF EXISTS odd")
    sync("CREATE TABLE odd (id integer PRIMARY KEY, day date, at datetime, lasts time(6))")
    sync("INSERT INTO odd VALUES (0, '2020-01-02', '2020-01-02 03:04:05', '23:59:59.5')")
    mode = "sql_mode=''"
    for number, (column, value, _) in enumerate(ODD, 1):
        sync(
            f"SET STATEMENT {mode} FOR INSERT INTO odd (id, {column}) VALUES ({number}, '{value}')"
        )
    yield
    sync("DROP TABLE odd")


@pytest.mark.parametrize("number", range(1, len(ODD) + 1))
async def test_a_date_or_time_that_python_has_not_names_its_column(
    odd: None, one: DatabaseInterface, number: int
) -> None:
    """By get, select, raw SQL and streams; the connection stays, and so do good rows."""
    column, value, kind = ODD[number - 1]
    sql = f"SELECT id, {column} AS label FROM odd WHERE id IN (0, {number}) ORDER BY id"

    async def stream(rows: Any) -> list[Any]:
        return [row async for row in rows]

    reads: list[Callable[[Session], Any]] = [
        lambda s: s.get(Odd, number),
        lambda s: s.select(Odd).all(),
        lambda s: s.fetch_all(sql),
        lambda s: s.cursor(sql),
        lambda s: stream(s.stream(sql)),
        lambda s: stream(s.select(Odd).stream()),
        lambda s: s.run_sync(lambda: list(Odd.objects.using("mysql").raw("SELECT * FROM odd"))),
    ]
    text = rf"column '{column}' of table 'odd' holds .*, which is no {kind} in Python; .*CAST"
    async with one.get_session(autocommit=True) as session:
        for read in reads:
            with pytest.raises(DataError, match=r"of table 'odd' holds .*in Python; .*CAST"):
                await read(session)
        with pytest.raises(DataError, match=text):
            await session.fetch_all(sql)
        good = await session.get(Odd, 0)
        assert (str(good.day), str(good.lasts)) == ("2020-01-02", "23:59:59.500000")
        as_text = f"SELECT CAST({column} AS CHAR) FROM odd WHERE id = {number}"
        assert str(await session.fetch_value(as_text)).startswith(value)
    assert one.stats()["connections_num"] == 1


async def test_a_conversion_of_the_projects_own_is_asked_first(odd: None) -> None:
    own = {**base.django_conversions, FIELD_TYPE.DATE: str, FIELD_TYPE.TIME: str}
    db = interface(options={"conv": own})
    async with db.get_session() as session:
        values = await session.fetch_all(
            "SELECT day, lasts FROM odd WHERE id IN (1, 4) ORDER BY id"
        )
        assert [tuple(row) for row in values] == [("0000-00-00", None), (None, "25:01:02.000000")]
    await db.close()


LONG = "SELECT seq, REPEAT('x', 500) FROM seq_1_to_1000000"


async def test_a_stream_left_early_is_not_sent_to_its_end(t: None) -> None:
    """The server is told to stop; the transaction, the connection and what was written stay."""
    sent = [0]

    def count(who: str, data: bytes) -> None:
        sent[0] += len(data) if who == SERVER else 0

    async def leave(session: Session) -> None:
        async for _ in session.stream(LONG):
            break

    async def close(session: Session) -> None:
        rows = session.stream(LONG)
        await anext(rows)
        await rows.aclose()

    async with FaultProxy(*address("mysql")) as proxy:
        proxy.hook = count
        db = interface(max_size=1, HOST="127.0.0.1", PORT=proxy.port)
        for number, way in enumerate((leave, close)):
            async with LoopProbe() as probe, db.get_session() as session:
                await session.execute("INSERT INTO t (n) VALUES (%s)", [10 * number])
                await way(session)
                await session.execute("INSERT INTO t (n) VALUES (%s)", [10 * number + 1])
            assert probe.worst < longest_stall()
        assert db.stats()["connections_num"] == 1
        await db.close()
    assert rows() == [0, 1, 10, 11]
    # Of more than 500 MB, twice what was on its way: the buffers of the sockets and of the proxy.
    assert sent[0] < 60_000_000


async def test_at_the_end_of_the_transaction_nothing_is_read_of_a_stream(
    one: DatabaseInterface,
) -> None:
    """A generator that is still there when the session ends must not bring the rest into memory."""
    async with one.get_session() as session:
        await session.execute("INSERT INTO t (n) VALUES (1)")
        stream = session.stream(LONG)
        await anext(stream)
        tracemalloc.start()
        await session.commit()
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 10_000_000 and rows() == [1]
    await stream.aclose()
    with pytest.raises(ZeroDivisionError):
        async with one.get_session() as session:
            stream = session.stream(LONG)
            await anext(stream)
            raise ZeroDivisionError
    await stream.aclose()
    assert one.stats()["connections_num"] == 1


async def test_a_stream_of_a_statement_that_writes_runs_to_its_end(one: DatabaseInterface) -> None:
    """Stopping it would undo what the statement has written."""
    insert = "INSERT INTO t (n) SELECT seq FROM seq_1_to_300000 RETURNING id, REPEAT('x', 100)"
    async with one.get_session() as session:
        rows_of_it = session.stream(insert, chunk_size=10)
        await anext(rows_of_it)
        await rows_of_it.aclose()
    assert sync("SELECT COUNT(*) FROM t") == ((300_000,),)


async def test_a_stream_that_cannot_be_stopped_is_read_to_its_end(
    one: DatabaseInterface, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with one.get_session() as session:
        await session.execute("INSERT INTO t (n) VALUES (1)")
        connection = await session.driver_connection()
        no_server = lambda: Connection(host="127.0.0.1", port=1)  # noqa: E731
        monkeypatch.setattr(connection._killer, "_make", no_server)
        rows_of_it = session.stream("SELECT seq, REPEAT('x', 500) FROM seq_1_to_50000")
        await anext(rows_of_it)
        await rows_of_it.aclose()
        assert await session.fetch_value("SELECT n FROM t") == 1
    assert rows() == [1]


async def test_a_stream_cancelled_while_it_is_stopped_leaks_nothing(t: None) -> None:
    async def leave(db: DatabaseInterface) -> None:
        async with db.get_session() as session:
            stream = session.stream(LONG)
            await anext(stream)
            await stream.aclose()

    step, done = 1, False
    while not done:
        db = interface(max_size=1)
        run = cancel_at(leave(db), {step})
        outcome = await outcome_of(run)
        done = run.done
        assert outcome is None if done else isinstance(outcome, asyncio.CancelledError)
        async with db.get_session() as session:
            assert await session.fetch_value("SELECT 7") == 7
        await db.close()
        await until(lambda: not sessions())
        # Skipping takes as many steps as the network likes.
        step += 1 if step < 12 else 5


async def test_the_server_bears_with_a_reader_that_pauses(one: DatabaseInterface) -> None:
    """It would end a stream that is not read for a minute; a setting of the project stays."""
    async with one.get_session() as session:
        assert await session.fetch_value("SELECT @@net_write_timeout") >= 3600
    own = interface(options={"init_command": "SET SESSION net_write_timeout = 77"})
    async with own.get_session() as session:
        assert await session.fetch_value("SELECT @@net_write_timeout") == 77
    await own.close()


async def test_keys_of_many_rows_come_back_from_one_insert(db: DatabaseInterface) -> None:
    try:
        async with db.get_session() as session:
            users = [User(name=f"u{n}") for n in range(5)]
            await session.run_sync(User.objects.using("mysql").bulk_create, users)
            if db.features.can_return_rows_from_bulk_insert:
                assert len({u.pk for u in users}) == 5 and users[0].pk is not None
            one = await session.add(User(name="one"))
            assert await session.get(User, one.pk) is not None
    finally:
        sync("DELETE FROM tests_user")


async def test_execute_many_sends_many_in_one_packet(t: None) -> None:
    async with FaultProxy(*address("mysql")) as proxy:
        db = interface(max_size=1, HOST="127.0.0.1", PORT=proxy.port)
        async with db.get_session() as session:
            await session.fetch_value("SELECT 1")
            before = proxy.round_trips
            count = await session.execute_many(
                "INSERT INTO t (n) VALUES (%s)", [[n] for n in range(500)]
            )
        assert count == 500 and len(rows()) == 500
        assert proxy.round_trips - before < 20
        with pytest.raises(IntegrityError):
            async with db.get_session() as session:
                await session.execute_many("INSERT INTO t (n) VALUES (%s)", [[1000], [7], [1001]])
        assert len(rows()) == 500
        await db.close()


async def test_an_error_of_a_later_statement_is_raised(db: DatabaseInterface) -> None:
    """Of several statements in one packet, what fails in a later one must not go unnoticed."""

    def both() -> None:
        with connections["mysql"].cursor() as cursor:
            cursor.executemany("INSERT INTO t (n) VALUES (%s)", [[1], [1]])

    with pytest.raises(IntegrityError):
        async with db.get_session() as session:
            await session.run_sync(both)
    assert rows() == []


async def test_sync_code_sends_one_statement_at_a_time(db: DatabaseInterface) -> None:
    def both() -> None:
        with connections["mysql"].cursor() as cursor:
            cursor.execute("INSERT INTO t (n) VALUES (1); INSERT INTO t (n) VALUES (2)")

    with pytest.raises(ProgrammingError):
        async with db.get_session() as session:
            await session.run_sync(both)
    assert rows() == []


async def test_errors_are_those_of_djangos_driver(db: DatabaseInterface) -> None:
    statements = {
        "SELECT * FROM missing": DatabaseError,
        "SELEC 1": DatabaseError,
        "INSERT INTO t (id, n) VALUES (1, 1), (1, 2)": IntegrityError,
        "INSERT INTO t (n) VALUES ('x')": DatabaseError,
        "INSERT INTO t (n) VALUES (99999999999)": DataError,
        "SELECT count(*) FROM t WHERE n = (SELECT 1 UNION SELECT 2)": DatabaseError,
    }
    for sql, kind in statements.items():
        with pytest.raises(DatabaseError) as expected:
            await in_django(lambda sql=sql: connections["mysql"].cursor().execute(sql))  # type: ignore[misc]
        with pytest.raises(kind) as info:
            async with db.get_session() as session:
                await session.execute(sql)
        assert type(info.value) is type(expected.value)
        assert info.value.args == expected.value.args
        assert type(info.value.__cause__) is type(expected.value.__cause__)


async def test_text_that_the_character_set_cannot_hold_is_refused_before_it_is_sent(
    one: DatabaseInterface,
) -> None:
    async with one.get_session() as session:
        with pytest.raises(UnicodeEncodeError):
            await session.fetch_value("SELECT %s", ["\ud800"])
        with pytest.raises(UnicodeEncodeError):
            await session.fetch_value("SELECT %s", ["\udc80"])
        assert await session.fetch_value("SELECT %s", ["\U0001f600\x00"]) == "\U0001f600\x00"


async def test_parameters_are_quoted_by_their_type(db: DatabaseInterface) -> None:
    values: list[tuple[Any, Any]] = [
        (None, None),
        (True, 1),
        (7, 7),
        (2**63, 2**63),
        (1.5, 1.5),
        (decimal.Decimal("1.10"), decimal.Decimal("1.10")),
        (datetime.date(2024, 2, 29), "2024-02-29"),
        (datetime.timedelta(hours=30, microseconds=5), "30:00:00.000005"),
        ("a'b\\c\"%s", "a'b\\c\"%s"),
        (b"bytes'", "bytes'"),
        (bytearray(b"x"), "x"),
    ]
    async with db.get_session() as session:
        for value, expected in values:
            assert await session.fetch_value("SELECT %s", [value]) == expected
        value = bytes(range(256))
        assert await session.fetch_value("SELECT _binary %s", [value]) == value
        assert await session.fetch_value("SELECT 2 IN %s", [(1, 2)]) == 1


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


# In GBK the last byte of a character before it and the backslash of an escape are one character.
HOSTILE = ["中' OR 1=1 -- ", "縗' OR 1=1 -- ", "中\\' OR 1=1 -- ", "中\\", "席\\' OR 1=1 -- "]
HOSTILE_BYTES = [b"\xad' OR 1=1 -- ", b"\xbf\\' OR 1=1 -- ", b"\xad\\", b"\x00\xff'\"\\;"]


@pytest.mark.parametrize("charset", ["gbk", "big5", "utf8", "utf8mb4"])
async def test_values_hold_in_the_character_set_of_the_options(t: None, charset: str) -> None:
    db = interface(options={"charset": charset})
    try:
        async with db.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")
            for text in [text for text in HOSTILE if _fits(text, charset)]:
                found = await session.fetch_all("SELECT 1 FROM t WHERE n = 2 AND '' = %s", [text])
                assert found == []
            for data in HOSTILE_BYTES:
                assert await session.fetch_value("SELECT HEX(%s)", [data]) == data.hex().upper()
    finally:
        await db.close()


def _fits(text: str, charset: str) -> bool:
    try:
        return bool(text.encode(charset.removesuffix("mb4")))
    except UnicodeEncodeError:
        return False


async def test_another_character_set_by_sql_is_refused(db: DatabaseInterface) -> None:
    """Or values would be escaped for one that the server does not read."""
    async with db.get_session() as session:
        await session.execute("INSERT INTO t (n) VALUES (1), (2)")
    for change in ("SET NAMES gbk", "SET character_set_client = gbk", "SET CHARACTER SET big5"):
        for text in HOSTILE:
            with pytest.raises(DatabaseError, match="values are escaped for 'utf8mb4'"):
                async with db.get_session() as session:
                    await session.execute(change)
                    await session.fetch_all("SELECT * FROM t WHERE 'a' = %s", [text])
    async with db.get_session() as session:
        await session.execute("SET NAMES utf8mb4 COLLATE utf8mb4_bin")
        await session.execute("SET time_zone = '+00:00'")
        assert await session.fetch_all("SELECT * FROM t WHERE 'a' = %s", [HOSTILE[0]]) == []
        assert await session.fetch_value("SELECT %s", [HOSTILE[0]]) == HOSTILE[0]


def _many(sql: str, *params: list[str]) -> Callable[[], None]:
    def run() -> None:
        with connections["mysql"].cursor() as cursor:
            cursor.executemany(sql, params)

    return run


def _in_a_savepoint(sql: str) -> Callable[[], None]:
    def run() -> None:
        with suppress(DatabaseError), transaction.atomic("mysql"):
            sync_in_session(sql)

    return run


def sync_in_session(sql: str) -> None:
    with connections["mysql"].cursor() as cursor:
        cursor.execute(sql)


def _text(*statements: str) -> Callable[[], None]:
    return lambda: [sync_in_session(sql) for sql in statements] and None


# Ways to another character set, that of results too, which would garble what is read.
SET_GBK = "EXECUTE IMMEDIATE 'BEGIN NOT ATOMIC SET NAMES gbk; {} END'"
CHARSET_WAYS = {
    "statement": _text("SET NAMES gbk"),
    "other first": _text("SET @a = 1, character_set_client = gbk"),
    "of a statement": _text("SET STATEMENT max_statement_time = 1 FOR SET NAMES gbk"),
    "prepared": _text("PREPARE p FROM 'SET NAMES gbk'", "EXECUTE p"),
    "with rows": _text(SET_GBK.format("SELECT 1; SELECT 2;")),
    "with an error": _in_a_savepoint(SET_GBK.format("SIGNAL SQLSTATE ''45000'';")),
    "results": _text("SET character_set_results = latin1"),
    "procedure": _text("CALL charset_of_t()"),
    "many": _many("SET @a = %s, character_set_client = gbk", ["a"], [HOSTILE[0]]),
    "driver": lambda: connections["mysql"].connection.cursor().execute("SET NAMES gbk") and None,
}


@pytest.mark.parametrize("way", CHARSET_WAYS)
async def test_no_way_to_another_character_set_reaches_a_value_or_the_next_session(
    one: DatabaseInterface, way: str
) -> None:
    sync("CREATE OR REPLACE PROCEDURE charset_of_t() SET NAMES gbk")
    probe = "SELECT @@character_set_client, @@character_set_results, %s"
    try:
        # The end of the savepoint finds it first, and closes the connection.
        said = "taken back" if way == "with an error" else "values are escaped for 'utf8mb4'"
        with pytest.raises(DatabaseError, match=said):
            async with one.get_session() as session:
                await session.run_sync(CHARSET_WAYS[way])
                await session.fetch_value("SELECT %s", [HOSTILE[0]])
        async with one.get_session() as session:
            await session.execute("INSERT INTO t (n) VALUES (1)")
            with suppress(DatabaseError):
                await session.run_sync(CHARSET_WAYS[way])
            with suppress(DatabaseError, TransactionManagementError):
                await session.rollback()
        for _ in range(2):
            async with one.get_session() as session:
                (row,) = await session.fetch_all(probe, [HOSTILE[0]])
                assert tuple(row.values()) == ("utf8mb4", "utf8mb4", HOSTILE[0])
    finally:
        sync("DROP PROCEDURE charset_of_t")


@pytest.mark.parametrize("check", [False, True])
async def test_the_character_set_is_compared_once_and_not_in_each_session(check: bool) -> None:
    """What `init_command` sets, each reset sets again."""
    counts = []
    for options in ({}, {"init_command": "SET NAMES utf8mb4 COLLATE utf8mb4_bin"}):
        db = interface(max_size=1, options=options)
        counts.append([await _selects(db, check) for _ in range(4)])
        await db.close()
    plain, with_command = counts
    assert with_command[1:] == plain[1:]


async def _selects(db: DatabaseInterface, check: bool) -> int:
    """How many queries the server has run for a session."""
    async with db.get_session(timeout=10) as session:
        if check:
            await session.run_sync(lambda: connections["mysql"].connection.ping())
        assert await session.fetch_value("SELECT %s", [HOSTILE[0]]) == HOSTILE[0]
        (row,) = await session.fetch_all("SHOW SESSION STATUS LIKE 'Com_select'")
        return int(tuple(row.values())[1])


async def test_another_character_set_by_init_command_is_refused(t: None) -> None:
    db = interface(options={"init_command": "SET NAMES gbk"})
    try:
        with pytest.raises(DatabaseError, match="values are escaped for 'utf8mb4'"):
            async with db.get_session() as session:
                await session.fetch_all("SELECT * FROM t WHERE 'a' = %s", [HOSTILE[0]])
    finally:
        await db.close()
