"""Projects whose settings or packages are wrong hear so from `check`, from `migrate` and from the
first session or request, in words that say what to do; each is a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests import servers

MIDDLEWARE = "django_asyncsession.middleware.AsyncSessionMiddleware"
POSTGRESQL = {"ENGINE": "django.db.backends.postgresql", "NAME": "x", "HOST": "127.0.0.1"}
# One that nothing can be written to, should a check be silent.
MYSQL = {**(servers.mysql() or {}), "ENGINE": "django.db.backends.mysql", "TEST": {}}
MYSQL["NAME"] = "information_schema"
SQLITE = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}

END = "end of a command"
PROJECT = """
import asyncio, sys
END = {end!r}
{blocked}
from django.conf import settings
given = dict(
    DATABASES={{"default": {database!r}}},
    INSTALLED_APPS=["django_asyncsession", "django.contrib.contenttypes", "django.contrib.auth"],
    SECRET_KEY="x", ROOT_URLCONF="urls", ASYNC_SESSION={{}}, MIDDLEWARE=[],
    DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
)
given.update({changes!r})
settings.configure(**given)
sys.path.append({folder!r})
"""
VIEWS = """
from django.http import HttpResponse
from django.urls import path
async def view(request):
    return HttpResponse()
urlpatterns = [path("", view)]
"""
# Of the app "things", which few have.
MODELS = """
from django.db import models
from django_asyncsession import Session
class Thing(models.Model):
    pass
"""
# Of a package that is no app.
STAMPS = """
import threading
current = threading.local()
def stamp(get_response):
    def middleware(request):
        current.user = request
        return get_response(request)
    return middleware
"""
INJECTED = """
from django.urls import path
def view(request):
    pass
urlpatterns = [path("", view)]
from django_asyncsession import inject_session
@inject_session
async def injected(request, session):
    pass
"""
COMMANDS = """
from django.core.management import execute_from_command_line
for command in {commands!r}:
    try:
        execute_from_command_line(["manage.py", *command.split()])
    except SystemExit:
        pass
    print(END, file=sys.stderr)
"""
SESSION = """
import django
django.setup()
async def main():
    from django_asyncsession import databases
    async with databases["default"].get_session() as session:
        await session.execute("SELECT 1")
try:
    asyncio.run(main())
except Exception as exc:
    sys.exit(f"{type(exc).__name__}: {exc}")
"""
REQUEST = """
import django
django.setup()
from django.core.asgi import get_asgi_application
from django.test import AsyncClient
async def main():
    get_asgi_application()
    return (await AsyncClient().get("/")).status_code
try:
    sys.exit(f"status {asyncio.run(main())}")
except Exception as exc:
    sys.exit(f"{type(exc).__name__}: {exc}")
"""


def project(
    code: str,
    *,
    database: dict[str, Any] = SQLITE,
    blocked: tuple[str, ...] = (),
    views: str = VIEWS,
    **changes: Any,
) -> str:
    """Run code in a project with these settings, where the packages `blocked` are not installed;
    what it says on standard error."""
    block = f"sys.modules.update(dict.fromkeys({blocked!r}))"
    with TemporaryDirectory() as folder:
        Path(folder, "urls.py").write_text(views)
        Path(folder, "stamps.py").write_text(STAMPS)
        Path(folder, "things").mkdir()
        Path(folder, "things", "models.py").write_text(MODELS)
        head = PROJECT.format(
            blocked=block, database=database, changes=changes, folder=folder, end=END
        )
        process = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", head + textwrap.dedent(code)],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=Path(__file__).parent.parent,
            # What development mode has to say of slow steps is no answer.
            env={name: value for name, value in os.environ.items() if name != "PYTHONDEVMODE"},
        )
    return process.stderr


def commands(*lines: str, **options: Any) -> list[str]:
    """What each of these management commands says."""
    said = project(COMMANDS.format(commands=lines), **options).split(END)
    assert len(said) == len(lines) + 1, said[-1]
    return said[:-1]


NO_DRIVER: dict[str, dict[str, Any]] = {
    "postgresql, no extra": {"database": POSTGRESQL, "blocked": ("psycopg", "psycopg2")},
    "postgresql, another psycopg": {"database": POSTGRESQL, "blocked": ("psycopg._capabilities",)},
    "mysql, no extra": {"database": MYSQL, "blocked": ("MySQLdb", "pymysql", "asyncmy")},
    "mysql, no asyncmy": {"database": MYSQL, "blocked": ("asyncmy",)},
    "postgresql, own engine": {
        "database": {**POSTGRESQL, "ENGINE": "django_asyncsession.backends.postgresql"},
        "blocked": ("psycopg", "psycopg2"),
    },
}
if find_spec("psycopg2") is not None:
    NO_DRIVER["postgresql, psycopg2"] = {"database": POSTGRESQL, "blocked": ("psycopg",)}


@pytest.mark.parametrize("name", NO_DRIVER)
def test_a_missing_driver_is_an_error_of_check_and_of_migrate(name: str) -> None:
    """With the extra that brings it, and without a traceback."""
    extra = name.partition(",")[0]
    lines = ("check", "check --deploy", "check --database=default", "migrate")
    for said in commands(*lines, **NO_DRIVER[name]):
        assert "django_asyncsession.E002" in said
        assert f"pip install 'django-asyncsession[{extra}]'" in said
        assert "Traceback" not in said


@pytest.mark.parametrize("name", NO_DRIVER)
def test_a_missing_driver_is_what_the_first_session_says(name: str) -> None:
    said = project(SESSION, **NO_DRIVER[name])
    last = said.splitlines()[-1]
    assert last.startswith("ConfigurationError: sessions cannot use the engine '")
    assert "pip install 'django-asyncsession[" in said and "Traceback" not in said


def test_sync_code_without_a_driver_says_what_to_install() -> None:
    code = """
        import django
        django.setup()
        from django.db import connection
        connection.cursor()
    """
    said = project(code, database=POSTGRESQL, blocked=("psycopg", "psycopg2"))
    assert "pip install 'django-asyncsession[postgresql]'" in said.splitlines()[-1]


SETTINGS: dict[str, tuple[Any, str]] = {
    "no dict": (True, "ASYNC_SESSION is True; give a dict"),
    "none": (None, "ASYNC_SESSION is None; give a dict"),
    "unknown key": ({"ALAIS": "default"}, "ASYNC_SESSION has no key 'ALAIS'"),
    "no name": ({"ALIAS": 5}, 'ASYNC_SESSION["ALIAS"] is 5; give a name'),
    "no switch": ({"NATIVE_ORM": "yes"}, "is 'yes'; give True or False"),
    "no pools": ({"POOLS": [1]}, 'ASYNC_SESSION["POOLS"] is [1]; give a dict'),
    "no pool": ({"POOLS": {"default": 5}}, "ASYNC_SESSION[\"POOLS\"]['default'] is 5; give a dict"),
    "no seconds": ({"SLOW_QUERY_SECONDS": "1"}, "is '1'; give seconds"),
    "negative": ({"LEAK_WARNING_SECONDS": -1}, "is -1; give seconds"),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_cannot_be_is_an_error_of_check_and_of_migrate(name: str) -> None:
    setting, words = SETTINGS[name]
    lines = ("check", "check --deploy", "migrate")
    for said in commands(*lines, ASYNC_SESSION=setting, MIDDLEWARE=[MIDDLEWARE]):
        assert "django_asyncsession.E004" in said
        assert words in said
        assert "Traceback" not in said


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_that_cannot_be_is_what_the_first_session_says(name: str) -> None:
    setting, words = SETTINGS[name]
    said = project(SESSION, ASYNC_SESSION=setting)
    assert said.startswith("ConfigurationError: ")
    assert words in said


# What a check finds that needs no connection, the id of the check, and the commands that say it.
FOUND: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "E001": ({**SQLITE, "ATOMIC_REQUESTS": True}, ("check", "check --deploy", "migrate")),
    "W102": ({**SQLITE, "CONN_MAX_AGE": 60}, ("check", "check --deploy")),
    "W104": ({**POSTGRESQL, "PORT": 6432, "OPTIONS": {"prepare_threshold": 5}}, ("check",)),
    "W105": (POSTGRESQL, ("check --deploy",)),
    "W109": (
        {**MYSQL, "OPTIONS": {"init_command": "SET default_storage_engine=MyISAM"}},
        ("check", "check --deploy"),
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_needs_no_connection_is_found_without_one(name: str) -> None:
    """No database is named: before, only `check --database` would have told."""
    database, lines = FOUND[name]
    for said in commands(*lines, database=database, MIDDLEWARE=[MIDDLEWARE]):
        assert f"django_asyncsession.{name}" in said


@pytest.mark.parametrize("middleware", [[MIDDLEWARE, "stamps.stamp"], ["stamps.stamp"]])
def test_a_thread_local_of_a_middleware_is_found(middleware: list[str]) -> None:
    """Which nothing but the list of middleware names; listed, it is well."""
    (said,) = commands("check", MIDDLEWARE=middleware)
    assert "django_asyncsession.W120" in said and "'stamps.current' is a threading.local" in said
    listed = {"THREAD_LOCALS": ["stamps.current"]}
    assert "W120" not in commands("check", MIDDLEWARE=middleware, ASYNC_SESSION=listed)[0]


WITHOUT_APP = ["django.contrib.contenttypes", "django.contrib.auth"]


CHECK = """
from django.core.management import execute_from_command_line
execute_from_command_line(["manage.py", "check"])
"""


@pytest.mark.parametrize("native", [False, True])
def test_the_middleware_without_the_app_is_an_error_of_the_first_request(native: bool) -> None:
    changes = {"MIDDLEWARE": [MIDDLEWARE], "ASYNC_SESSION": {"NATIVE_ORM": native}}
    said = project(REQUEST, INSTALLED_APPS=WITHOUT_APP, **changes)
    assert "add 'django_asyncsession' to INSTALLED_APPS" in said.splitlines()[-1]


TYPED = """
from django.urls import path
from django_asyncsession import Session
async def view(request):
    session: Session = request.db_session
urlpatterns = [path("", view)]
"""


@pytest.mark.parametrize("command", ["check", "check --deploy", "migrate"])
@pytest.mark.parametrize(
    ("apps", "views"),
    [
        # By django.contrib.auth, which imports the middleware.
        (WITHOUT_APP, VIEWS),
        # By the views.
        ([], TYPED),
        ([], INJECTED),
        # By the models.
        (["things"], VIEWS),
    ],
    ids=["auth", "types", "decorator", "models"],
)
def test_the_middleware_without_the_app_is_an_error_of_check(
    apps: list[str], views: str, command: str
) -> None:
    """With an id and without a traceback, by whatever imports this package."""
    changes = {"MIDDLEWARE": [MIDDLEWARE], "INSTALLED_APPS": apps}
    (said,) = commands(command, views=views, **changes)
    assert "django_asyncsession.E008" in said
    assert "dd 'django_asyncsession' to INSTALLED_APPS" in said
    assert "Traceback" not in said


def test_an_injected_session_without_the_app() -> None:
    """`check` knows it by the views."""
    said = project(CHECK, INSTALLED_APPS=WITHOUT_APP, views=INJECTED)
    assert "add 'django_asyncsession' to INSTALLED_APPS" in said.splitlines()[-1]


@pytest.mark.parametrize("database", [POSTGRESQL, MYSQL, SQLITE], ids=lambda d: d["ENGINE"])
def test_a_session_without_the_app(database: dict[str, Any]) -> None:
    """Nothing of Django's "You cannot call this from an async context"."""
    said = project(SESSION, database=database, INSTALLED_APPS=[])
    assert said.startswith("AppMissingError: ")
    assert "add 'django_asyncsession' to INSTALLED_APPS" in said


@pytest.mark.parametrize("database", [POSTGRESQL, MYSQL, SQLITE], ids=lambda d: d["ENGINE"])
def test_a_session_before_django_has_started(database: dict[str, Any]) -> None:
    said = project(SESSION.replace("django.setup()", ""), database=database)
    assert said.startswith("ConfigurationError: ")
    assert "call django.setup()" in said


NATIVE = {"NATIVE_ORM": True}


def test_native_mode_without_the_middleware_is_an_error_of_check() -> None:
    (said,) = commands("check", ASYNC_SESSION=NATIVE)
    assert "django_asyncsession.E005" in said and MIDDLEWARE in said


def test_native_mode_without_the_middleware_refuses_requests() -> None:
    said = project(REQUEST, ASYNC_SESSION=NATIVE)
    assert said.startswith("ConfigurationError: ") and MIDDLEWARE in said


@pytest.mark.parametrize(
    "changes",
    [
        {"MIDDLEWARE": [MIDDLEWARE]},
        {"SILENCED_SYSTEM_CHECKS": ["django_asyncsession.E005"]},
        {"ASYNC_SESSION": {}},
    ],
    ids=json.dumps,
)
def test_native_mode_is_not_refused(changes: dict[str, Any]) -> None:
    """With the middleware, with the check silenced, and where it is off."""
    changes = {"ASYNC_SESSION": NATIVE, **changes}
    assert "E005" not in commands("check", **changes)[0]
    assert project(REQUEST, **changes).strip() == "status 200"


def test_native_mode_of_a_project_that_serves_no_requests() -> None:
    (said,) = commands("check", ASYNC_SESSION=NATIVE, ROOT_URLCONF=None)
    assert "E005" not in said
