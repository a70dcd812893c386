"""The pytest plugin, in projects of its own that pytest runs: with each async plugin and mode."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SETTINGS = """
DATABASES = {
    "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
    "other": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
}
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "django_asyncsession"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
SECRET_KEY = "only for tests"
USE_TZ = True
"""
CONFTEST = 'pytest_plugins = ["django_asyncsession.pytest_plugin"]'
HEAD = """
import asyncio
import pytest
from django.contrib.auth.models import Group
from django_asyncsession import databases

COUNT = "SELECT count(*) FROM auth_group"

@pytest.fixture
def group(db):
    return Group.objects.create(name="made")
"""


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project whose settings and conftest are written; its tests are the test's to write."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("DJANGO_SETTINGS_MODULE", "child_settings")
    pytester.makepyfile(child_settings=SETTINGS, conftest=CONFTEST)
    return pytester


def run(project: pytest.Pytester, tests: str, *args: str) -> pytest.RunResult:
    project.makepyfile(test_it=HEAD + tests)
    options = ["--nomigrations", "-p", "no:cacheprovider", "-W", "error"]
    if "no:asyncio" not in args:
        args = ("-o", "asyncio_default_fixture_loop_scope=function", *args)
        args = ("-o", "asyncio_mode=auto", *args)
    return project.runpytest_subprocess(*options, *args, timeout=120)


def test_importing_the_plugin_imports_neither_django_nor_a_driver() -> None:
    code = (
        "import sys, django_asyncsession.pytest_plugin\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(names & {'django', 'psycopg', 'asyncmy', 'MySQLdb', 'pymysql'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout == "[]\n"


def test_pytest_finds_the_plugin_of_an_installed_package() -> None:
    assert '"pytest11": ["django_asyncsession.pytest_plugin' in (ROOT / "setup.py").read_text()


TWICE = """
{mark}

@pytest.mark.parametrize("time", [1, 2])
async def test_made_and_changed(time, group, async_session, async_assert_num_queries):
    group.name = "changed"
    await async_session.add(group)
    async with databases["default"].get_session() as session:
        await session.add(Group(name="new"))
    async with async_assert_num_queries(1):
        assert await async_session.fetch_value(COUNT) == 2
    assert sorted([g.name async for g in Group.objects.all()]) == ["changed", "new"]

@pytest.mark.django_db
async def test_nothing_is_left():
    assert await Group.objects.acount() == 0
    async with databases["default"].get_session() as session:
        assert await session.fetch_value(COUNT) == 0
"""


@pytest.mark.parametrize(
    ("mark", "args"),
    [
        ("pytestmark = [pytest.mark.asyncio]", ["-o", "asyncio_mode=strict"]),
        ("", []),
        ("pytestmark = pytest.mark.asyncio(loop_scope='module')", []),
        (
            "pytestmark = pytest.mark.asyncio(loop_scope='session')",
            ["-o", "asyncio_mode=strict", "-o", "asyncio_default_fixture_loop_scope=session"],
        ),
        (
            "pytestmark = pytest.mark.anyio\n\n@pytest.fixture\n"
            "def anyio_backend():\n    return 'asyncio'",
            ["-p", "no:asyncio"],
        ),
    ],
    ids=["strict", "auto", "module loop", "session loop", "anyio"],
)
def test_every_async_plugin_and_mode(project: pytest.Pytester, mark: str, args: list[str]) -> None:
    run(project, TWICE.format(mark=mark), *args).assert_outcomes(passed=3)


def test_a_fixture_alone_makes_the_databases(project: pytest.Pytester) -> None:
    result = run(
        project,
        """
async def test(async_session):
    assert await async_session.fetch_value(COUNT) == 0
""",
    )
    result.assert_outcomes(passed=1)


def test_each_worker_of_xdist_has_its_databases(project: pytest.Pytester) -> None:
    result = run(project, TWICE.format(mark=""), "-n", "2")
    result.assert_outcomes(passed=3)


def test_sync_tests_share_the_connection_too(project: pytest.Pytester) -> None:
    result = run(
        project,
        """
from asgiref.sync import async_to_sync

@pytest.mark.parametrize("time", [1, 2])
def test_sync(time, group):
    async def work():
        async with databases["default"].get_session() as session:
            await session.add(Group(name="new"))
            return await session.fetch_value(COUNT)

    assert async_to_sync(work)() == 2
    assert Group.objects.count() == 2
""",
    )
    result.assert_outcomes(passed=2)


def test_only_the_databases_of_the_mark_can_be_used(project: pytest.Pytester) -> None:
    result = run(
        project,
        """
from django.test.testcases import DatabaseOperationForbidden

@pytest.mark.django_db
async def test_forbidden():
    with pytest.raises(DatabaseOperationForbidden, match="'other' are not allowed"):
        async with databases["other"].get_session() as session:
            await session.fetch_value(COUNT)

@pytest.mark.parametrize("time", [1, 2])
@pytest.mark.django_db(databases=["default", "other"])
async def test_allowed(time):
    for alias in databases:
        async with databases[alias].get_session() as session:
            assert await session.fetch_value(COUNT) == 0
            await session.add(Group(name="x"))
""",
    )
    result.assert_outcomes(passed=3)


def test_real_transactions_are_those_of_the_pools(project: pytest.Pytester) -> None:
    result = run(
        project,
        """
@pytest.mark.parametrize("time", [1, 2])
@pytest.mark.django_db(transaction=True)
async def test_mark(time, async_session):
    async with databases["default"].get_session() as session:
        await session.add(Group(name="x"))
    assert await async_session.fetch_value(COUNT) == 1
    assert databases["default"].stats()["pool_size"] > 0

async def test_fixture(transactional_db, async_databases):
    async with async_databases["default"].get_session() as session:
        await session.add(Group(name="x"))
    assert async_databases["default"].stats()["pool_size"] == 1
    assert await Group.objects.acount() == 1

@pytest.mark.django_db
async def test_after_it():
    async with databases["default"].get_session() as session:
        assert await session.fetch_value(COUNT) == 0
    assert databases["default"].stats()["pool_size"] == 0
""",
    )
    result.assert_outcomes(passed=4)


def test_django_s_own_thread_keeps_no_connection(project: pytest.Pytester) -> None:
    """Of a file: Django keeps an SQLite database in memory open, and a server's could not be
    dropped."""
    on_disk = '"x.sqlite3", "TEST": {"NAME": "test.sqlite3"}'
    project.makepyfile(child_settings=SETTINGS.replace('":memory:"', on_disk, 1))
    result = run(
        project,
        """
from asgiref.sync import sync_to_async
from django.db import connections

def is_open():
    return connections["default"].connection is not None

@pytest.mark.django_db(transaction=True)
async def test_used():
    assert await Group.objects.acount() == 0
    assert await sync_to_async(is_open)()

async def test_closed():
    assert not await sync_to_async(is_open)()
""",
    )
    result.assert_outcomes(passed=2)


def test_without_the_database_no_session_works(project: pytest.Pytester) -> None:
    result = run(
        project,
        """
async def test_blocked():
    with pytest.raises(RuntimeError, match="Database access not allowed"):
        async with databases["default"].get_session() as session:
            await session.fetch_value(COUNT)
""",
    )
    result.assert_outcomes(passed=1)


LEAKS = """
pytestmark = [pytest.mark.django_db, pytest.mark.asyncio(loop_scope="module")]
kept = []

async def test_fails():
    async with databases["default"].get_session() as session:
        await session.add(Group(name="x"))
        raise ZeroDivisionError

async def test_leaves_a_session_open():
    session = databases["default"].get_session(begin_on_use=True)
    await session.add(Group(name="x"))
    kept.append(session)

async def test_leaves_a_task():
    begun = asyncio.Event()

    async def work():
        async with databases["default"].get_session() as session:
            await session.add(Group(name="x"))
            begun.set()
            await asyncio.sleep(0.05)
            await session.fetch_value(COUNT)

    kept.append(asyncio.create_task(work()))
    await begun.wait()

async def test_is_cancelled():
    asyncio.current_task().cancel()
    async with databases["default"].get_session() as session:
        await session.add(Group(name="x"))

async def test_starts_clean():
    assert await Group.objects.acount() == 0
    async with databases["default"].get_session() as session:
        assert await session.fetch_value(COUNT) == 0
    with pytest.raises(Exception, match="was ended, because its test"):
        await kept[1]
    await kept[0].close()
"""


def test_what_a_test_leaves_is_ended_and_named(project: pytest.Pytester) -> None:
    """The loop lives on, and with it what a test left in it; the next test starts clean all the
    same."""
    shown = "default::django_asyncsession.exceptions.SharedConnectionWarning"
    result = run(project, LEAKS, "-W", shown)
    assert result.parseoutcomes()["failed"] == 2
    assert result.parseoutcomes()["passed"] == 3
    result.stdout.fnmatch_lines(
        ["*a session made at *test_it.py:* in test_leaves_a_session_open was left open*"]
    )
    result.stdout.fnmatch_lines(["*a session made at *test_it.py:* in work was left open*"])


ON_SERVERS = """
from tests.settings import *

DATABASES = {{"default": DATABASES["{alias}"]}}
DATABASES["default"]["TEST"] = {{"NAME": DATABASES["default"]["NAME"] + "_child"}}
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "django_asyncsession"]
ASYNC_SESSION = {{"POOLS": {{"default": {{"max_size": 3}}}}}}
"""
REAL_LEAKS = """
pytestmark = pytest.mark.django_db(transaction=True)
kept = []

async def test_leaves_a_session_open():
    session = databases["default"].get_session(begin_on_use=True)
    await session.add(Group(name="x"))
    kept.append(session)

def test_closes_its_loop_early():
    session = databases["default"].get_session(begin_on_use=True)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(session.add(Group(name="x")))
    loop.close()
    kept.append(session)

async def test_leaves_its_own_session_open(async_session):
    await async_session.add(Group(name="x"))

async def test_starts_clean():
    assert await Group.objects.acount() == 0
    async with databases["default"].get_session() as session:
        assert await session.fetch_value(COUNT) == 0
"""


@pytest.mark.parametrize("scope", ["function", "session"])
def test_with_real_transactions_what_a_test_leaves_is_ended_and_named(
    project: pytest.Pytester, alias: str, scope: str
) -> None:
    """Emptying the tables would wait for it, for ever on PostgreSQL."""
    project.makepyfile(child_settings=ON_SERVERS.format(alias=alias))
    given = ("-W", "default::ResourceWarning", "-o", f"asyncio_default_test_loop_scope={scope}")
    result = run(project, REAL_LEAKS, *given)
    result.assert_outcomes(passed=4, warnings=2)
    for name in ("test_leaves_a_session_open", "test_closes_its_loop_early"):
        result.stdout.fnmatch_lines([f"*a session made at *test_it.py:* in {name} was left open*"])


def test_each_database(project: pytest.Pytester, alias: str) -> None:
    project.makepyfile(child_settings=ON_SERVERS.format(alias=alias))
    mark = "pytestmark = [pytest.mark.asyncio(loop_scope='module')]"
    run(project, TWICE.format(mark=mark)).assert_outcomes(passed=3)
