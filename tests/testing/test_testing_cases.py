"""The unittest classes of the toolkit, run by a runner of their own, as a project would."""

from __future__ import annotations

import asyncio
import contextvars
import io
import threading
import time
import unittest
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from asgiref.sync import sync_to_async
from django.db import connections, transaction
from django.test import override_settings

from django_asyncsession import databases
from django_asyncsession.exceptions import ConfigurationError, SharedConnectionWarning
from django_asyncsession.testing import (
    AsyncSessionTestCase,
    AsyncSessionTransactionTestCase,
    assert_no_leaks,
    capture_on_commit_callbacks,
    capture_queries,
)
from tests.models import User
from tests.testing import test_testing

COUNT = "SELECT count(*) FROM tests_user"
ran: list[str] = []
place: contextvars.ContextVar[str] = contextvars.ContextVar("place")


@pytest.fixture(autouse=True)
def nothing_left(alias: str) -> Iterator[None]:
    """Each test leaves no row on any database, and Django's own connection in its place."""
    ran.clear()
    before = connections[alias]
    settings = {"ALIAS": alias}
    with override_settings(ASYNC_SESSION=settings, ROOT_URLCONF=test_testing.__name__):
        yield
    assert connections[alias] is before
    assert databases[alias].source is None
    assert User.objects.using(alias).count() == 0


def run(case: type[unittest.TestCase], **attributes: Any) -> unittest.TestResult:
    """The result of the tests of a class, with its warnings as `result.warnings`."""
    case = type(case.__name__, (case,), {"databases": "__all__", **attributes})
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(case)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", SharedConnectionWarning)
        warnings.simplefilter("always", ResourceWarning)
        result = unittest.TextTestRunner(stream=io.StringIO()).run(suite)
    result.told = [str(w.message) for w in caught]  # type: ignore[attr-defined]
    return result


def check(result: unittest.TestResult) -> None:
    assert result.wasSuccessful(), result.failures + result.errors
    assert result.testsRun == len(ran)


class EveryMethod(AsyncSessionTestCase):
    __test__ = False
    alias: ClassVar[str]
    user: User

    @classmethod
    def setUpTestData(cls) -> None:
        cls.user = User.objects.using(cls.alias).create(name="made")

    async def setUp(self) -> None:  # type: ignore[override]
        self.loop = asyncio.get_running_loop()
        place.set("in setUp")
        await self.session.add(User(name="of setUp"))
        self.addCleanup(self.clean_up)

    async def test_async(self) -> None:
        ran.append("async")
        self.assertIs(asyncio.get_running_loop(), self.loop)
        self.assertEqual(place.get(), "in setUp")
        self.assertEqual(await self.session.fetch_value(COUNT), 2)
        response = await self.async_client.get(f"/rename/{self.user.pk}")
        self.assertEqual(response.json(), {"name": "renamed"})
        user = await self.session.get_one(User, self.user.pk)
        self.assertEqual(user.name, "renamed")
        self.assertEqual(await User.objects.using(self.alias).acount(), 2)

    def test_sync(self) -> None:
        ran.append("sync")
        self.assertEqual(User.objects.using(self.alias).count(), 2)
        self.assertEqual(self.user.name, "made")
        with transaction.atomic(self.alias):
            response = self.client.get(f"/sync/{self.user.pk}?alias={self.alias}")
        self.assertEqual(response.json(), {"name": "made"})

    async def tearDown(self) -> None:  # type: ignore[override]
        self.assertEqual(await self.session.fetch_value(COUNT), 2)

    async def clean_up(self) -> None:
        self.assertEqual(await self.session.fetch_value(COUNT), 2)


def test_the_loop_is_made_by_the_factory(alias: str) -> None:
    made: list[asyncio.AbstractEventLoop] = []

    def factory() -> asyncio.AbstractEventLoop:
        made.append(asyncio.new_event_loop())
        return made[-1]

    check(run(EveryMethod, alias=alias, loop_factory=factory))
    assert made


def test_every_method_may_be_async(alias: str) -> None:
    check(run(EveryMethod, alias=alias))
    assert sorted(ran) == ["async", "sync"]


class Failing(AsyncSessionTestCase):
    __test__ = False
    alias: ClassVar[str]

    async def test_1_fails(self) -> None:
        ran.append("fails")
        async with databases[self.alias].get_session() as session:
            await session.add(User(name="x"))
        self.fail("as it should")

    async def test_2_is_cancelled(self) -> None:
        ran.append("is cancelled")
        async with databases[self.alias].get_session() as session:
            await session.add(User(name="x"))
            raise asyncio.CancelledError

    async def test_3_leaves_a_session_open(self) -> None:
        ran.append("leaves open")
        session = databases[self.alias].get_session()
        await session.begin()
        await session.add(User(name="x"))
        ran_sessions.append(session)

    async def test_4_leaves_a_task(self) -> None:
        ran.append("leaves a task")
        begun = asyncio.Event()

        async def work() -> None:
            async with databases[self.alias].get_session() as session:
                await session.add(User(name="x"))
                begun.set()
                await asyncio.Event().wait()

        ran_sessions.append(asyncio.create_task(work()))
        await begun.wait()

    def test_5_closes_its_loop_early(self) -> None:
        ran.append("closes its loop")
        session = databases[self.alias].get_session(begin_on_use=True)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(session.add(User(name="x")))
        loop.close()
        ran_sessions.append(session)

    def test_6_closes_its_loop_in_a_statement(self) -> None:
        ran.append("closes its loop")
        session = databases[self.alias].get_session(begin_on_use=True)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(session.add(User(name="x")))
        task = loop.create_task(session.fetch_value(COUNT))
        loop.call_soon(loop.stop)
        loop.run_forever()
        task._log_destroy_pending = False  # type: ignore[attr-defined]
        loop.close()
        ran_sessions.extend([session, task])

    async def test_7_drops_a_session(self) -> None:
        ran.append("drops")
        session = databases[self.alias].get_session(begin_on_use=True)
        await session.add(User(name="x"))

    async def test_9_starts_clean(self) -> None:
        ran.append("starts clean")
        async with databases[self.alias].get_session() as session:
            self.assertEqual(await session.fetch_value(COUNT), 0)
        self.assertEqual(await User.objects.using(self.alias).acount(), 0)


ran_sessions: list[Any] = []


@pytest.mark.parametrize(
    ("name", "failures", "told"),
    [
        ("test_1_fails", 1, False),
        ("test_2_is_cancelled", 1, False),
        ("test_3_leaves_a_session_open", 0, True),
        ("test_4_leaves_a_task", 0, False),
        ("test_5_closes_its_loop_early", 0, True),
        ("test_6_closes_its_loop_in_a_statement", 0, True),
        ("test_7_drops_a_session", 0, True),
    ],
)
def test_the_next_test_starts_clean(alias: str, name: str, failures: int, told: bool) -> None:
    others = {n: None for n in vars(Failing) if n.startswith("test_") and n[5] != "9" and n != name}
    result = run(Failing, alias=alias, **others)
    assert "starts clean" in ran
    assert len(result.failures) + len(result.errors) == failures, result.errors
    messages = result.told  # type: ignore[attr-defined]
    assert bool(messages) is told
    if told:
        assert "test_testing_cases.py" in messages[0]
    ran_sessions.clear()


class Lost(AsyncSessionTestCase):
    __test__ = False
    alias: ClassVar[str]

    async def test(self) -> None:
        ran.append("lost")
        async with databases[self.alias].get_session() as session:
            await session.execute(KILL[connections[self.alias].vendor])


KILL = {
    "postgresql": "SELECT pg_terminate_backend(pg_backend_pid())",
    "mysql": "KILL CONNECTION CONNECTION_ID()",
}


def test_after_a_lost_connection_the_next_class_has_another(alias: str) -> None:
    if connections[alias].vendor not in KILL:
        pytest.skip("no server that could close a connection")
    assert len(run(Lost, alias=alias).errors) >= 1
    ran.clear()
    check(run(Many, alias=alias))


class Transactional(AsyncSessionTransactionTestCase):
    __test__ = False
    alias: ClassVar[str]

    async def test_sessions_are_open_at_the_same_time(self) -> None:
        ran.append("same time")
        async with databases[self.alias].get_session(read_only=True) as one:
            await one.fetch_value(COUNT)
            async with databases[self.alias].get_session() as other:
                await other.add(User(name="x"))
            self.assertEqual(databases[self.alias].stats()["pool_size"], 2)
        await self.session.fetch_value(COUNT)
        self.assertEqual(await User.objects.using(self.alias).acount(), 1)

    async def test_statements_on_connections_of_pools_are_counted(self) -> None:
        ran.append("counted")
        async with databases[self.alias].get_session(read_only=True) as one:
            await one.fetch_value(COUNT)
            with capture_queries() as queries:
                await one.fetch_value(COUNT)
                async with databases[self.alias].get_session(read_only=True) as other:
                    await other.fetch_value(COUNT)
            await one.fetch_value(COUNT)
        self.assertEqual([query["sql"] for query in queries], [COUNT, COUNT])
        self.assertIsNone(databases[self.alias].source)

    async def test_callbacks_need_no_capture(self) -> None:
        ran.append("callbacks")
        with self.assertRaisesRegex(ConfigurationError, "callbacks run at the commit"):
            async with capture_on_commit_callbacks():
                pass
        done: list[str] = []
        async with databases[self.alias].get_session() as session:
            await session.add(User(name="x"))
            session.on_commit(lambda: done.append("done"))
        self.assertEqual(done, ["done"])

    async def test_a_dropped_session_is_a_leak(self) -> None:
        ran.append("dropped")
        with self.assertRaisesRegex(AssertionError, "test_testing_cases.py.* was never closed"):
            async with assert_no_leaks():
                session = databases[self.alias].get_session(begin_on_use=True)
                await session.fetch_value(COUNT)
                del session

    async def test_the_tables_are_empty(self) -> None:
        ran.append("empty")
        self.assertEqual(await self.session.fetch_value(COUNT), 0)


def test_real_transactions(alias: str) -> None:
    check(run(Transactional, alias=alias))


class Many(AsyncSessionTestCase):
    __test__ = False
    alias: ClassVar[str]

    async def test(self) -> None:
        ran.append("x")
        async with databases[self.alias].get_session() as session:
            await session.add(User(name="x"))
        await self.session.fetch_value(COUNT)


def test_many_tests_leave_connections_and_threads_as_they_were(alias: str) -> None:
    few = {f"test_{n}": Many.__dict__["test"] for n in range(20)}
    check(run(Many, alias=alias, **few))
    threads = threading.active_count()
    servers = server_connections(alias)
    tests = {f"test_{n}": Many.__dict__["test"] for n in range(1000)}
    check_many = run(Many, alias=alias, **tests)
    assert check_many.testsRun == 1001
    assert check_many.wasSuccessful()
    # An executor of the loop, or of asgiref, may have started one more of its few threads.
    assert threading.active_count() <= threads + 2
    assert comes_down_to(servers, alias)


def server_connections(alias: str) -> int:
    """How many connections the server has to this database; 0 where there is no server."""
    query = {
        "postgresql": "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()",
        "mysql": "SELECT count(*) FROM information_schema.processlist WHERE db = database()",
        "sqlite": "SELECT 0",
    }[connections[alias].vendor]
    with connections[alias].cursor() as cursor:
        cursor.execute(query)
        return int(cursor.fetchone()[0])


def comes_down_to(number: int, alias: str) -> bool:
    """Whether the server has no more connections than that; it lists one that was closed for some
    milliseconds more."""
    deadline = time.monotonic() + 5
    while server_connections(alias) > number:
        if time.monotonic() > deadline:
            return False
    return True


class InThreads(AsyncSessionTransactionTestCase):
    __test__ = False
    alias: ClassVar[str]

    async def test(self) -> None:
        ran.append("in a thread")
        self.assertEqual(await User.objects.using(self.alias).acount(), 0)
        self.assertTrue(await sync_to_async(is_open)(self.alias))


def is_open(alias: str) -> bool:
    return connections[alias].connection is not None


def test_the_connection_of_django_s_own_thread_is_closed(alias: str) -> None:
    """Otherwise the runner could not drop the database in the end."""
    before = server_connections(alias)
    check(run(InThreads, alias=alias))
    assert not asyncio.run(sync_to_async(is_open)(alias))
    assert comes_down_to(before, alias)


class RealLeak(AsyncSessionTransactionTestCase):
    __test__ = False
    alias: ClassVar[str]

    async def test_1_leaves_a_session_open(self) -> None:
        ran.append("leaves open")
        session = databases[self.alias].get_session(begin_on_use=True)
        await session.add(User(name="x"))
        ran_sessions.append(session)

    async def test_9_starts_clean(self) -> None:
        ran.append("starts clean")
        self.assertEqual(await self.session.fetch_value(COUNT), 0)


def test_a_session_on_a_connection_of_its_own_is_ended_and_named(alias: str) -> None:
    result = run(RealLeak, alias=alias)
    check(result)
    (message,) = result.told  # type: ignore[attr-defined]
    assert "test_testing_cases.py" in message and "was left open" in message
    ran_sessions.clear()
