"""Databases and their interfaces: aliases, DSNs, pool options, secrets, servers that refuse.

Its pools are the point, so they are real.
"""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import psycopg
import pytest
from django.db import DatabaseError, OperationalError, connections
from django.db.utils import ConnectionDoesNotExist
from django.test import override_settings
from django.views.debug import ExceptionReporter

from django_asyncsession import DatabaseInterface, databases
from django_asyncsession.exceptions import ConfigurationError, PoolTimeout, UnknownAlias
from tests.faults import Elapsed, FaultProxy, LoopProbe, OwnServer, address, outcome_of
from tests.postgres import dsn_of_tests, gone, sessions_of

SECRET = "s3kr1t-word"


# databases


async def test_each_alias_has_one_interface() -> None:
    assert databases["default"] is databases["default"]
    assert databases["default"].alias == "default"
    assert "default" in databases and "nowhere" not in databases and 3 not in databases
    assert [db.alias for db in databases.all()] == list(databases) == list(connections.settings)


def test_an_unknown_alias_is_named_beside_the_known_ones() -> None:
    with pytest.raises(UnknownAlias, match=r"no database 'nowhere' .*'default'") as caught:
        databases["nowhere"]
    assert isinstance(caught.value, ConnectionDoesNotExist)


async def test_it_knows_its_vendor_features_and_server_version() -> None:
    db = databases["default"]
    assert db.vendor == "postgresql" and db.features.has_select_for_update
    with psycopg.connect(dsn_of_tests()) as connection:
        [[version]] = connection.execute("SHOW server_version").fetchall()
    assert version.startswith(await db.get_db_server_version())
    assert 0 < await db.ping() < 5
    await db.close()


async def test_sessions_use_the_name_that_the_test_runner_gave_the_database() -> None:
    async with databases["default"].get_session() as session:
        name = await session.fetch_value("SELECT current_database()")
    assert name == connections["default"].settings_dict["NAME"]
    await databases.close_all()


async def test_a_renamed_database_gets_a_new_pool(name: str) -> None:
    db = DatabaseInterface(
        "renamed", dict(DatabaseInterface.from_dsn(dsn_of_tests())._settings_dict)
    )
    first = (await db.connect()).pool()
    db._own_settings["NAME"] = "postgres"  # type: ignore[index]
    async with db.get_session() as session:
        assert await session.fetch_value("SELECT current_database()") == "postgres"
    assert first.closed and not db.pool().closed
    await db.close()


async def test_close_all_closes_all() -> None:
    await databases["default"].connect()
    pool = databases["default"].pool()
    await databases.close_all()
    assert pool.closed and not databases["default"].connected


# Connecting


async def test_connect_opens_and_close_closes_and_both_may_come_again(
    db: DatabaseInterface, name: str
) -> None:
    assert not db.connected and sessions_of(name) == 0
    assert await db.connect() is db
    assert db.connected and sessions_of(name) == 1
    await db.connect()
    await db.close()
    await db.close()
    assert not db.connected and sessions_of(name) == 0
    async with db:
        assert db.connected
    assert not db.connected


async def test_close_returns_when_the_server_has_let_go(db: DatabaseInterface, name: str) -> None:
    for _ in range(5):
        async with asyncio.TaskGroup() as group:
            for _ in range(5):
                group.create_task(db.ping())
        assert sessions_of(name) > 0
        await db.close()
        assert sessions_of(name) == 0


async def test_first_use_by_a_hundred_tasks_at_once_makes_one_pool(
    db: DatabaseInterface, name: str
) -> None:
    await asyncio.gather(*(db.ping() for _ in range(100)))
    assert len(db._pools) == 1 and sessions_of(name) <= 10
    assert db.stats()["connections_num"] <= 10


async def test_connected_and_stats_need_no_loop(db: DatabaseInterface) -> None:
    def outside() -> tuple[bool, int]:
        return db.connected, db.stats()["pool_max"]

    assert await asyncio.to_thread(outside) == (False, 10)


async def test_stats_are_zero_before_first_use_and_have_the_same_keys_after(
    db: DatabaseInterface,
) -> None:
    before = db.stats()
    assert before["pool_max"] == 10 and sum(before.values()) == 10
    await db.ping()
    assert db.stats().keys() == before.keys() and db.stats()["requests_num"] == 1


async def test_repr_says_what_it_is(db: DatabaseInterface) -> None:
    assert repr(db) == "<DatabaseInterface 'own' postgresql not connected>"
    await db.connect()
    assert repr(db) == "<DatabaseInterface 'own' postgresql connected>"


# Servers that refuse


async def refusal(dsn: str) -> OperationalError:
    """The error of the first session on a database, which must come within a second."""
    db = DatabaseInterface.from_dsn(dsn, alias="refused")
    async with LoopProbe() as probe:
        with Elapsed() as took, pytest.raises(OperationalError) as caught:
            async with db.get_session() as session:
                await session.execute("SELECT 1")
    await db.close()
    assert took.seconds < 1 and probe.worst < 0.1
    assert not isinstance(caught.value, PoolTimeout)
    assert type(caught.value.__cause__).__module__.startswith("psycopg")
    return caught.value


async def test_a_server_that_is_down_is_told_within_a_second() -> None:
    async with FaultProxy(*address("default")) as proxy:
        await proxy.refuse()
        error = await refusal(dsn_of_tests(host="127.0.0.1", port=proxy.port))
    assert "Connection refused" in str(error)


async def test_a_database_that_does_not_exist_is_told_within_a_second(
    own_server: OwnServer,
) -> None:
    error = await refusal(own_server.dsn(name="nowhere"))
    assert 'database "nowhere" does not exist' in str(error)


async def test_a_wrong_password_is_told_within_a_second(own_server: OwnServer) -> None:
    error = await refusal(own_server.dsn("guarded", "wrong"))
    assert 'password authentication failed for user "guarded"' in str(error)
    assert "wrong" not in str(error)


async def test_a_missing_password_is_told_within_a_second(own_server: OwnServer) -> None:
    assert "no password supplied" in str(await refusal(own_server.dsn("guarded")))


async def test_a_role_that_does_not_exist_is_told_within_a_second(own_server: OwnServer) -> None:
    assert 'role "nobody" does not exist' in str(await refusal(own_server.dsn("nobody")))


async def test_a_host_that_does_not_exist_is_told_without_a_stall() -> None:
    db = DatabaseInterface.from_dsn(dsn_of_tests(host="nowhere.invalid"), alias="refused")
    async with LoopProbe() as probe:
        with pytest.raises(OperationalError, match=r"nowhere\.invalid"):
            await db.connect()
    assert probe.worst < 0.1
    await db.close()


async def test_a_name_server_that_never_answers_ends_in_a_timeout_without_a_stall(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def hang(*args: Any, **kwargs: Any) -> None:
        await asyncio.sleep(60)

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", hang)
    dsn = dsn_of_tests(host="slow.invalid", pool_timeout=0.2)
    db = DatabaseInterface.from_dsn(dsn, alias="refused")
    async with LoopProbe() as probe:
        with Elapsed() as took, pytest.raises(PoolTimeout):
            await db.connect()
        await db.close()
    assert took.seconds < 1 and probe.worst < 0.1


async def test_a_server_without_tls_is_not_used_in_plain_text(own_server: OwnServer) -> None:
    async with FaultProxy(*address("default")) as proxy:
        dsn = dsn_of_tests(host="127.0.0.1", port=proxy.port, sslmode="require")
        db = DatabaseInterface.from_dsn(dsn, alias="refused")
        with pytest.raises(OperationalError, match="SSL"):
            await db.connect()
        # The request for TLS has eight bytes; nothing else was said.
        assert proxy.received <= 8 * proxy.accepted
        await db.close()


async def test_a_service_that_is_not_defined_is_named() -> None:
    db = DatabaseInterface.from_dsn(dsn_of_tests(service="undefined-service"), alias="refused")
    with pytest.raises(OperationalError, match="undefined-service"):
        await db.connect()
    await db.close()


async def test_a_service_file_is_read(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    file = tmp_path / "services"
    file.write_text(f"[shop]\napplication_name={name}\n")
    monkeypatch.setenv("PGSERVICEFILE", str(file))
    db = DatabaseInterface.from_dsn(dsn_of_tests(service="shop"), alias="by service")
    async with db:
        assert sessions_of(name) == 1


async def test_a_hundred_callers_do_not_try_a_wrong_password_a_hundred_times(
    own_server: OwnServer,
) -> None:
    db = DatabaseInterface.from_dsn(own_server.dsn("guarded", "wrong"), alias="refused")
    outcomes = await asyncio.gather(*(outcome_of(db.ping()) for _ in range(100)))
    assert all("authentication failed" in str(outcome) for outcome in outcomes)
    assert db.stats()["connections_num"] <= 10
    for _ in range(20):
        await outcome_of(db.ping())
    assert db.stats()["connections_num"] <= 11
    await db.close()


async def test_a_role_option_that_cannot_be_assumed_leaves_no_session_behind(name: str) -> None:
    dsn = dsn_of_tests(application_name=name, assume_role="no_such_role")
    db = DatabaseInterface.from_dsn(dsn, alias="refused")
    gc.disable()
    try:
        for _ in range(3):
            with pytest.raises(Exception, match="no_such_role"):
                await db.connect()
        assert await gone(name)
    finally:
        gc.enable()
    await db.close()


async def test_a_password_may_be_a_function_or_a_coroutine_function(own_server: OwnServer) -> None:
    async def fetched() -> str:
        await asyncio.sleep(0)
        return OwnServer.PASSWORD

    for password in (lambda: OwnServer.PASSWORD, fetched):
        entry = dict(DatabaseInterface.from_dsn(own_server.dsn("guarded"))._settings_dict)
        entry["OPTIONS"] = {"password": password}
        async with DatabaseInterface("own", entry) as db:
            assert db.connected


# Unix sockets, IPv6


async def test_a_unix_socket_is_a_host(own_server: OwnServer) -> None:
    async with DatabaseInterface.from_dsn(own_server.dsn()) as db:
        async with db.get_session() as session:
            assert await session.fetch_value("SELECT inet_client_addr() IS NULL")
        assert db.alias == f"{own_server.host}/postgres"


def test_an_ipv6_address_is_a_host() -> None:
    db = DatabaseInterface.from_dsn("postgresql://u@[::1]:5433/shop")
    assert (db._settings_dict["HOST"], db._settings_dict["PORT"]) == ("::1", 5433)


# DSNs


async def test_a_password_with_any_characters_is_percent_decoded(own_server: OwnServer) -> None:
    password = "p@ss/w:rd?#%+ ü"
    with own_server.connect() as connection:
        connection.execute(f"ALTER ROLE guarded PASSWORD '{password}'")
        try:
            db = DatabaseInterface.from_dsn(own_server.dsn("guarded", password))
            async with db, db.get_session() as session:
                assert await session.fetch_value("SELECT current_user") == "guarded"
        finally:
            connection.execute(f"ALTER ROLE guarded PASSWORD '{OwnServer.PASSWORD}'")


async def test_parameters_are_options_and_those_of_the_pool_are_the_pools(name: str) -> None:
    db = DatabaseInterface.from_dsn(
        dsn_of_tests(
            pool_min_size=1,
            pool_max_size=3,
            pool_timeout=2.5,
            pool_check="true",
            application_name=name,
        )
    )
    options = db.pool().options
    assert (options.min_size, options.limit, options.timeout, options.check) == (1, 3, 2.5, True)
    async with db:
        assert sessions_of(name) == 1


@pytest.mark.parametrize(
    ("dsn", "part"),
    [
        (f"nonsense {SECRET}", "not a database URL (scheme '')"),
        (f"gopher://u:{SECRET}@h/n", "scheme 'gopher'"),
        (f"postgresql://u:{SECRET}@h:port/n", "scheme 'postgresql'"),
        (
            f"postgresql://u:{SECRET}@h/n?pool_max_size=many",
            "pool_max_size in the database URL is not a number",
        ),
    ],
)
def test_a_dsn_that_is_none_says_what_one_looks_like_and_not_the_password(
    dsn: str, part: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        DatabaseInterface.from_dsn(dsn)
    error = caught.value
    # The test's own frame holds the text, of course.
    error = error.with_traceback(error.__traceback__ and error.__traceback__.tb_next)
    assert part in str(error) and "_parse_dsn" in everything_of(error)
    assert SECRET not in everything_of(error)


# Pool options


def with_pool(**pool: Any) -> DatabaseInterface:
    entry = dict(DatabaseInterface.from_dsn(dsn_of_tests())._settings_dict)
    return DatabaseInterface("own", {**entry, "OPTIONS": {"pool": pool}})


def test_pool_options_are_read_from_options_as_django_has_them() -> None:
    assert with_pool(max_size=7, num_workers=9, name="x")._pool_options().limit == 7


@pytest.mark.parametrize("value", [True, False, None])
def test_a_pool_that_is_only_switched_has_the_defaults(value: Any) -> None:
    entry = dict(DatabaseInterface.from_dsn(dsn_of_tests())._settings_dict)
    db = DatabaseInterface("own", {**entry, "OPTIONS": {"pool": value}})
    assert db._pool_options().limit == 10


def test_the_setting_comes_before_the_options() -> None:
    with override_settings(ASYNC_SESSION={"POOLS": {"own": {"max_size": 3}}}):
        assert with_pool(max_size=7)._pool_options().limit == 3


@pytest.mark.parametrize(
    ("pool", "message"),
    [
        ({"max_sise": 3}, r"unknown pool options \['max_sise'\] for 'own'; there are .*'max_size'"),
        ({"max_size": 0}, r"max_size=0"),
        ({"max_size": "20"}, r"pool option max_size is '20'; give a number"),
        ({"timeout": -1}, r"pool option timeout is -1; give seconds above 0"),
    ],
)
async def test_wrong_pool_options_are_named_on_first_use(pool: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        await with_pool(**pool).connect()


def test_conn_health_checks_turn_the_check_on() -> None:
    entry = dict(DatabaseInterface.from_dsn(dsn_of_tests())._settings_dict)
    assert not DatabaseInterface("own", entry)._pool_options().check
    assert DatabaseInterface("own", {**entry, "CONN_HEALTH_CHECKS": True})._pool_options().check


# Secrets


def everything_of(error: BaseException) -> str:
    """All that Django's error pages and mails would show of an error, and its repr and str."""
    texts = [repr(error), str(error)]
    for debug in (True, False):
        with override_settings(DEBUG=debug):
            reporter = ExceptionReporter(None, type(error), error, error.__traceback__)
            texts += [reporter.get_traceback_html(), reporter.get_traceback_text()]
    return "\n".join(texts)


async def failing(dsn: str, **more: Any) -> BaseException:
    db = DatabaseInterface.from_dsn(dsn, alias="secretive")
    del dsn  # this frame is shown as well
    try:
        async with db.get_session() as session:
            await session.execute("SELECT 1")
    except DatabaseError as error:
        return error
    finally:
        await db.close()
    raise AssertionError("no error")


@pytest.mark.parametrize("failure", ["connect", "authentication", "tls", "option", "timeout"])
async def test_no_error_page_shows_the_password(
    failure: str, own_server: OwnServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(0)
    async with FaultProxy(*address("default")) as proxy:
        proxy.deaf = True
        local = f"127.0.0.1:{proxy.port}"
        dsns = {
            "connect": f"postgresql://u:{SECRET}@127.0.0.1:1/n",
            "authentication": own_server.dsn("guarded", SECRET),
            "tls": f"postgresql://postgres:{SECRET}@127.0.0.1:5432/n?sslmode=require",
            "option": f"postgresql://postgres:{SECRET}@127.0.0.1:5432/n?no_such_option=1",
            "timeout": f"postgresql://u:{SECRET}@{local}/n?pool_timeout=0.1",
        }
        error = await _hidden(failing, dsns[failure])
    text = everything_of(error)
    assert failure in ("option",) or "session" in text
    # The test's own frame holds the DSNs, but it is not in the traceback.
    assert SECRET not in text
    assert SECRET not in caplog.text


async def _hidden(function: Any, dsn: str) -> BaseException:
    task = asyncio.create_task(function(dsn))
    del dsn
    return await task  # type: ignore[no-any-return]


async def test_nothing_shows_the_password(own_server: OwnServer) -> None:
    db = DatabaseInterface.from_dsn(own_server.dsn("guarded", OwnServer.PASSWORD))
    async with db:
        session = db.get_session()
        async with session:
            wrapper: Any = await session.run_sync(lambda: connections[db.alias])
            driver = wrapper.connection
            shown = [repr(wrapper.settings_dict), repr(wrapper.get_connection_params())]
            shown += [repr(driver), str(driver.info.dsn), repr(session), repr(session.__dict__)]
        shown += [repr(db), str(db.__dict__), repr(db.pool()), str(db.pool().__dict__)]
    assert not [text for text in shown if OwnServer.PASSWORD in text]
