"""System checks: each is silent in a good project and speaks, with its id, in a bad one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from django.core.checks import CheckMessage, Tags
from django.db import connections
from django.test import override_settings

from django_asyncsession import checks
from django_asyncsession.middleware import AsyncSessionMiddleware

OURS = checks.MIDDLEWARE
SESSIONS = "django.contrib.sessions.middleware.SessionMiddleware"


def sync_only(get_response: Any) -> Any:
    return get_response


@contextmanager
def database(**changes: Any) -> Iterator[None]:
    """The default database with other settings."""
    saved = copy.deepcopy(connections.settings["default"])
    connections.settings["default"].update(changes)
    try:
        yield
    finally:
        connections.settings["default"].clear()
        connections.settings["default"].update(saved)


def ids(messages: list[CheckMessage]) -> list[str]:
    return [str(message.id).removeprefix("django_asyncsession.") for message in messages]


ALL: list[Callable[..., list[Any]]] = [
    checks.check_asgi,
    checks.check_atomic_requests,
    checks.check_debug,
    checks.check_encryption,
    checks.check_listed_once,
    checks.check_mysql_engine,
    checks.check_native_middleware,
    checks.check_native_orm,
    checks.check_order,
    checks.check_persistent_connections,
    checks.check_pool_of_django,
    checks.check_pooler,
    checks.check_server_connections,
    checks.check_settings,
    checks.check_sync_middleware,
    checks.check_timeouts,
    checks.check_versions,
]


@pytest.mark.parametrize("check", ALL, ids=lambda check: check.__name__)
def test_a_good_project_hears_nothing(check: Callable[..., list[Any]]) -> None:
    timeouts = "-c statement_timeout=30s -c idle_in_transaction_session_timeout=60s"
    with (
        override_settings(MIDDLEWARE=[OURS, SESSIONS], ASGI_APPLICATION="x.asgi"),
        database(CONN_MAX_AGE=0, OPTIONS={"options": timeouts}),
    ):
        assert check(databases=["default"]) == []


def test_atomic_requests_of_django() -> None:
    with database(ATOMIC_REQUESTS=True), override_settings(MIDDLEWARE=[OURS]):
        assert ids(checks.check_atomic_requests()) == ["E001"]


def test_an_engine_that_does_not_exist() -> None:
    with database(ENGINE="no.such.engine"):
        messages = checks.check_versions()
    assert ids(messages) == ["E002"]
    assert "no.such.engine" in messages[0].msg


def test_a_package_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(checks.MINIMUM, "greenlet", (99, 0, 0))
    monkeypatch.setitem(checks.MINIMUM, "no-such-package", (1,))
    messages = checks.check_versions()
    assert ids(messages) == ["E002", "E002"]
    assert "99.0.0 or newer is needed" in messages[0].msg
    assert "no-such-package is not installed" in messages[1].msg


def test_the_middleware_listed_twice() -> None:
    with override_settings(MIDDLEWARE=[OURS, SESSIONS, OURS]):
        assert ids(checks.check_listed_once()) == ["E003"]


@pytest.mark.parametrize(
    ("setting", "part"),
    [
        ({"ALAIS": "default"}, "no key 'ALAIS'"),
        ({"ALIAS": "other"}, "'other', which DATABASES does not have"),
        ({"PLANS": "compared"}, "is 'compared'; give True, False or 'compare'"),
        ({"PLANS": 1}, "is 1; give True, False or 'compare'"),
        ({"POOLS": {"other": {}}}, "'other', which DATABASES does not have"),
        ({"POOLS": {"default": {"max_sise": 3}}}, "max_sise"),
        ({"POOLS": {"default": {"max_size": 0}}}, "max_size=0"),
        ({"POOLS": {"default": {"max_size": "many"}}}, "cannot be made"),
    ],
)
def test_settings_that_cannot_work(setting: dict[str, Any], part: str) -> None:
    with override_settings(ASYNC_SESSION=setting):
        messages = checks.check_settings()
    assert ids(messages) == ["E004"]
    assert part in messages[0].msg


def test_the_middleware_inside_others_that_use_the_database() -> None:
    with override_settings(MIDDLEWARE=[SESSIONS, OURS]):
        assert ids(checks.check_order()) == ["W101"]


def test_sync_only_middleware_inside() -> None:
    with override_settings(MIDDLEWARE=[OURS, f"{__name__}.sync_only"]):
        assert ids(checks.check_sync_middleware()) == ["W111"]
    with override_settings(MIDDLEWARE=[f"{__name__}.sync_only", OURS]):
        assert checks.check_sync_middleware() == []


def test_persistent_connections() -> None:
    with database(CONN_MAX_AGE=60), override_settings(MIDDLEWARE=[OURS]):
        assert ids(checks.check_persistent_connections()) == ["W102"]


def test_more_connections_than_the_server_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "100000")
    messages = checks.check_server_connections(databases=["default"])
    assert ids(messages) == ["W103"]
    assert "1000000 connections" in messages[0].msg
    assert checks.check_server_connections(databases=None) == []


@pytest.mark.skipif("mysql" not in connections.settings, reason="no MySQL server")
def test_the_connection_that_ends_statements_is_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "100000")
    with override_settings(ASYNC_SESSION={"ALIAS": "mysql", "POOLS": {"mysql": {"max_size": 7}}}):
        messages = checks.check_server_connections(databases=["mysql"])
    assert "800000 connections" in messages[0].msg


def test_pgbouncer() -> None:
    with database(PORT=6432, OPTIONS={"prepare_threshold": 5}):
        assert ids(checks.check_pooler()) == ["W104"]
    with database(PORT=6432, OPTIONS={}, DISABLE_SERVER_SIDE_CURSORS=True):
        assert checks.check_pooler() == []


def test_no_timeouts() -> None:
    with database(OPTIONS={"options": "-c statement_timeout=30s"}):
        messages = checks.check_timeouts()
    assert ids(messages) == ["W105"]
    assert "no idle_in_transaction_session_timeout" in messages[0].msg


def test_an_unencrypted_connection_to_another_host() -> None:
    with database(HOST="db.example.com", OPTIONS={"sslmode": "prefer"}):
        assert ids(checks.check_encryption()) == ["W106"]
    with database(HOST="db.example.com", OPTIONS={"sslmode": "verify-full"}):
        assert checks.check_encryption() == []
    with database(HOST="/var/run/postgresql"):
        assert checks.check_encryption() == []


def test_debug() -> None:
    with override_settings(DEBUG=True, MIDDLEWARE=[OURS]):
        assert ids(checks.check_debug()) == ["W107"]


def test_wsgi_only() -> None:
    with override_settings(WSGI_APPLICATION="x.wsgi", MIDDLEWARE=[OURS]):
        assert ids(checks.check_asgi()) == ["W108"]


def test_a_new_project_has_asgi_beside_wsgi() -> None:
    """`startproject` makes both, and Django has no setting ASGI_APPLICATION."""
    wsgi = "testproject.wsgi.application"
    with override_settings(WSGI_APPLICATION=wsgi, MIDDLEWARE=[OURS]):
        assert checks.check_asgi() == []


def test_tables_without_transactions() -> None:
    with database(OPTIONS={"init_command": "SET default_storage_engine=MyISAM"}):
        assert ids(checks.check_mysql_engine()) == ["W109"]


def test_only_what_asks_the_server_waits_for_a_database_to_be_named() -> None:
    """`check` and `check --deploy` run all others."""
    found = {check for check in vars(checks).values() if hasattr(check, "tags")}
    assert {check for check in found if Tags.database in check.tags} == {
        checks.check_server_connections
    }


def test_a_derived_middleware_counts_as_the_middleware() -> None:
    derived = f"{__name__}.Derived"
    with override_settings(MIDDLEWARE=[SESSIONS, derived], ASYNC_SESSION={"NATIVE_ORM": True}):
        assert checks.check_native_middleware() == []
        assert ids(checks.check_order()) == ["W101"]


class Derived(AsyncSessionMiddleware):
    """A project's own."""


def test_a_middleware_that_does_not_exist_is_left_to_django() -> None:
    with override_settings(MIDDLEWARE=["no.such.Middleware", OURS, "no.such.Middleware"]):
        assert checks.check_listed_once() == checks.check_sync_middleware() == []


def test_native_mode_without_the_middleware() -> None:
    with override_settings(MIDDLEWARE=[SESSIONS], ASYNC_SESSION={"NATIVE_ORM": True}):
        messages = checks.check_native_middleware()
    assert ids(messages) == ["E005"]
    assert OURS in messages[0].msg


def test_native_middleware_without_native_mode() -> None:
    with override_settings(ASYNC_SESSION={"NATIVE_MIDDLEWARE": True}):
        assert ids(checks.check_native_orm()) == ["E006"]
    both = {"NATIVE_MIDDLEWARE": True, "NATIVE_ORM": True}
    with override_settings(ASYNC_SESSION=both):
        assert checks.check_native_orm() == []


def test_a_pool_of_django_without_psycopg_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    with database(OPTIONS={"pool": {"max_size": 3}}):
        monkeypatch.setattr(checks, "find_spec", lambda name: None)
        messages = checks.check_pool_of_django()
        assert ids(messages) == ["E007"]
        assert "psycopg_pool is not installed" in messages[0].msg
        assert "django-asyncsession[postgresql]" in str(messages[0].hint)
        monkeypatch.setattr(checks, "find_spec", lambda name: name)
        assert checks.check_pool_of_django() == []


def test_a_pool_of_django_on_a_database_where_it_has_none() -> None:
    with database(ENGINE="django.db.backends.sqlite3", OPTIONS={"pool": True}):
        messages = checks.check_pool_of_django()
    assert ids(messages) == ["E007"]
    assert 'ASYNC_SESSION["POOLS"]' in str(messages[0].hint)


def test_the_extra_brings_what_a_pool_of_django_needs() -> None:
    setup = (Path(__file__).parent.parent / "setup.py").read_text(encoding="utf-8")
    assert 'POSTGRESQL = ["psycopg[binary,pool]' in setup
