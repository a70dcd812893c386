"""`AsyncCommand`: management commands with a session, in an event loop of their own.

With real commits, on connections of a loop that is closed with the command, or of a process.
"""

from __future__ import annotations

import asyncio
import io
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import pytest
from asgiref.sync import ThreadSensitiveContext, sync_to_async
from django.core.management import CommandError, call_command
from django.db import connections, transaction
from django.test import override_settings

from django_asyncsession import (
    AsyncCommand,
    Session,
    SyncContextError,
    UnknownAlias,
    databases,
    native,
)
from tests.management.commands import register
from tests.models import User
from tests.sessions import names, slow, whole

NATIVE = override_settings(ASYNC_SESSION={"NATIVE_ORM": True})


def saved(alias: str = "default") -> list[str]:
    return list(User.objects.using(alias).order_by("name").values_list("name", flat=True))


def has_pools() -> bool:
    return any(interface._pools for interface in databases.all())


class Add(AsyncCommand):
    async def handle_async(self, session: Session, *args: Any, **options: Any) -> str | None:
        await session.add(User(name="Ada"))
        await self.and_then(session)
        return None

    async def and_then(self, session: Session) -> None: ...


@pytest.fixture
def manage() -> Iterator[Any]:
    """Starts `django register ...` as a process of its own, and ends what the test left."""
    started: list[subprocess.Popen[str]] = []

    def start(*args: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "django", "register", *args]
        env = {**os.environ, "DJANGO_SETTINGS_MODULE": "tests.settings"}
        pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, **pipes))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


# The session


def test_it_commits_and_prints_what_it_returns(alias: str, empty_database: None) -> None:
    out = io.StringIO()
    assert call_command("register", "Ada", database=alias, stdout=out) == "Ada is registered"
    assert out.getvalue() == "Ada is registered\n"
    assert saved(alias) == ["Ada"]
    assert not has_pools()


def test_it_rolls_back_and_closes_the_pools_when_it_raises(
    alias: str, empty_database: None
) -> None:
    class Command(Add):
        database = alias

        async def and_then(self, session: Session) -> None:
            raise ValueError("after the insert")

    with pytest.raises(ValueError, match="after the insert"):
        call_command(Command())
    assert saved(alias) == []
    assert not has_pools()


def test_an_error_of_the_commit_is_raised(empty_tables: None) -> None:
    class Command(AsyncCommand):
        async def handle_async(self, session: Session, *args: Any, **options: Any) -> str:
            await session.execute("INSERT INTO tests_tag (name, owner_id) VALUES ('lost', 4711)")
            return "never printed"

    out = io.StringIO()
    with pytest.raises(Exception, match="4711"):
        call_command(Command(), stdout=out)
    assert out.getvalue() == ""


def test_callbacks_of_the_commit_run_before_the_loop_ends(empty_tables: None) -> None:
    called: list[int] = []

    class Command(Add):
        async def and_then(self, session: Session) -> None:
            session.on_commit(self.note)

        async def note(self) -> None:
            called.append(len(await names(databases["default"])))

    call_command(Command())
    assert called == [1]


def test_options_are_class_attributes(empty_tables: None) -> None:
    class Command(Add):
        session_options: ClassVar[dict[str, Any]] = {"autocommit": True}

        async def and_then(self, session: Session) -> None:
            raise ValueError("after the insert")

    with pytest.raises(ValueError, match="after the insert"):
        call_command(Command())
    assert saved() == ["Ada"]


def test_the_loop_is_made_by_the_factory(empty_tables: None) -> None:
    made: list[asyncio.AbstractEventLoop] = []

    def factory() -> asyncio.AbstractEventLoop:
        made.append(asyncio.new_event_loop())
        return made[0]

    class Command(Add):
        loop_factory = factory

        async def and_then(self, session: Session) -> None:
            assert asyncio.get_running_loop() is made[0]

    call_command(Command())
    assert made[0].is_closed() and saved() == ["Ada"]


def test_a_command_without_handle_async_says_so() -> None:
    with pytest.raises(NotImplementedError, match="handle_async"):
        call_command(AsyncCommand())


def test_a_task_that_it_leaves_behind_is_cancelled_and_rolled_back(empty_tables: None) -> None:
    ended: list[type[BaseException]] = []

    async def left(written: asyncio.Event) -> None:
        try:
            async with databases["default"].get_session() as session:
                await session.add(User(name="left"))
                written.set()
                await asyncio.Event().wait()
        except BaseException as error:
            ended.append(type(error))
            raise

    class Command(Add):
        async def and_then(self, session: Session) -> None:
            written = asyncio.Event()
            self.task = asyncio.create_task(left(written))
            await written.wait()

    call_command(Command())
    assert ended == [asyncio.CancelledError]
    assert saved() == ["Ada"]
    assert not has_pools()


# The database


class Where(AsyncCommand):
    database = "sqlite"

    async def handle_async(self, session: Session, *args: Any, **options: Any) -> str:
        return session.alias


def test_the_database_is_that_of_the_class_unless_the_option_names_another() -> None:
    assert call_command(Where(), stdout=io.StringIO()) == "sqlite"
    assert call_command(Where(), "--database", "default", stdout=io.StringIO()) == "default"
    assert call_command(Where(), database="default", stdout=io.StringIO()) == "default"


def test_without_one_it_is_the_database_of_the_middleware() -> None:
    class Command(Where):
        database = None

    with override_settings(ASYNC_SESSION={"ALIAS": "sqlite"}):
        assert call_command(Command(), stdout=io.StringIO()) == "sqlite"


def test_an_unknown_database_is_refused() -> None:
    with pytest.raises(CommandError, match="invalid choice: 'nowhere'"):
        call_command(Where(), "--database", "nowhere")
    with pytest.raises(UnknownAlias, match="nowhere"):
        call_command(Where(), database="nowhere")


def test_a_command_may_have_a_database_option_of_its_own() -> None:
    class Command(Where):
        def add_arguments(self, parser: Any) -> None:
            parser.add_argument("--database", help="mine")

    assert call_command(Command(), stdout=io.StringIO()) == "sqlite"
    assert call_command(Command(), database="default", stdout=io.StringIO()) == "default"
    assert "mine" in Command().create_parser("manage.py", "where").format_help()


def test_djangos_option_for_sql_that_is_printed_works() -> None:
    class Command(Where):
        output_transaction = True

    out = io.StringIO()
    call_command(Command(), stdout=out)
    assert out.getvalue() == "BEGIN;\nsqlite\nCOMMIT;\n"


# Native mode


def test_in_native_mode_djangos_async_methods_use_its_session(empty_tables: None) -> None:
    class Command(AsyncCommand):
        async def handle_async(self, session: Session, *args: Any, **options: Any) -> None:
            await User.objects.acreate(name="here")
            await User.objects.using("sqlite").acreate(name="there")
            transaction.on_commit(self.note)
            assert await session.fetch_value("SELECT COUNT(*) FROM tests_user") == 1
            if options["verbosity"] == 0:
                raise ValueError("after the inserts")

        async def note(self) -> None:
            self.stdout.write("saved")

    out = io.StringIO()
    with NATIVE:
        with pytest.raises(ValueError, match="after the inserts"):
            call_command(Command(), verbosity=0, stdout=out)
        assert (saved(), saved("sqlite"), out.getvalue()) == ([], [], "")
        call_command(Command(), stdout=out)
    assert (saved(), saved("sqlite"), out.getvalue()) == (["here"], ["there"], "saved\n")
    connections["sqlite"].close()


# Where an event loop runs already


async def test_where_a_loop_runs_it_is_refused_with_the_remedy() -> None:
    with pytest.raises(SyncContextError, match=r"await sync_to_async\(call_command\)\('register'"):
        call_command("register", "Ada")


async def in_thread_of_request(command: Any) -> None:
    """As in a request, whose sync code has one thread."""
    async with ThreadSensitiveContext():
        await sync_to_async(call_command)(command)


async def in_any_thread(command: Any) -> None:
    await asyncio.to_thread(call_command, command)


HOW = [sync_to_async(call_command), in_thread_of_request, in_any_thread]


@pytest.mark.parametrize("how", HOW, ids=["sync_to_async", "request", "to_thread"])
async def test_a_thread_runs_it_beside_the_loop(how: Any, empty_tables: None) -> None:
    class Command(Add):
        async def and_then(self, session: Session) -> None:
            # The thread of sync_to_async() is taken, by the command itself.
            assert await sync_to_async(threading.get_ident)() != threading.get_ident()

    await how(Command())
    assert await names(databases["default"]) == ["Ada"]
    await whole(databases["default"])
    await databases.close_all()


@pytest.mark.parametrize("mode", [{}, {"NATIVE_ORM": True}], ids=["", "native"])
async def test_sync_code_in_a_session_runs_it_in_the_same_loop(
    mode: dict[str, Any], empty_tables: None
) -> None:
    loop = asyncio.get_running_loop()

    class Command(Add):
        async def and_then(self, session: Session) -> None:
            assert asyncio.get_running_loop() is loop

    db = databases["default"]
    with override_settings(ASYNC_SESSION=mode):
        async with db.get_session() as session:
            if mode:
                with native.use(session):
                    await session.run_sync(call_command, Command())
            else:
                await session.run_sync(call_command, Command())
            assert await names(db) == ["Ada"]
            assert await session.fetch_value("SELECT COUNT(*) FROM tests_user") == 1
    # Its session is not the caller's, but its pool is.
    assert db.connected
    await whole(db)
    await db.close()


@pytest.mark.django_db
def test_in_a_test_it_works_in_the_tests_transaction() -> None:
    User.objects.create(name="Zoe")
    call_command("register", "Ada", stdout=io.StringIO())
    assert saved() == ["Ada", "Zoe"]


def test_that_test_left_nothing() -> None:
    assert saved() == []


# Ctrl-C


def test_an_interrupt_rolls_back_and_is_the_callers(empty_tables: None) -> None:
    class Command(Add):
        async def and_then(self, session: Session) -> None:
            signal.raise_signal(signal.SIGINT)
            await asyncio.Event().wait()

    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        call_command(Command())
    assert saved() == []
    assert not has_pools()
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


# The SQLite file is one of this process.
@pytest.mark.parametrize("alias", ["default", "mysql"], indirect=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_process_without_a_traceback(
    manage: Any, alias: str, number: int, empty_database: None
) -> None:
    sql = slow(databases[alias], 20)
    process = manage("Ada", "--database", alias, "--sql", sql)
    assert process.stderr.readline() == "added\n"
    process.send_signal(number)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 128 + number
    assert (out, err) == ("", "CommandError: cancelled\n")
    assert saved(alias) == []


def test_an_error_for_the_user_has_its_exit_code(manage: Any, empty_tables: None) -> None:
    process = manage("Ada", "--refuse")
    assert process.communicate(timeout=20) == ("", "added\nCommandError: no more users\n")
    assert process.returncode == 3
    assert saved() == []


def test_a_process_that_succeeds_prints_and_ends(manage: Any, empty_tables: None) -> None:
    process = manage("Ada")
    assert process.communicate(timeout=20) == ("Ada is registered\n", "added\n")
    assert process.returncode == 0
    assert saved() == ["Ada"]


def test_the_help_names_the_option() -> None:
    text = register.Command().create_parser("manage.py", "register").format_help()
    assert "--database" in text and "alias of the database (default: default)" in text
