"""`threading.local` objects: each session finds in them what its own sync code put there.

With real commits and connections where sessions are open at the same time.
"""

from __future__ import annotations

import asyncio
import contextvars
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.local import Local
from asgiref.sync import async_to_sync
from django.core.checks import CheckMessage
from django.db import connections
from django.db.backends.signals import connection_created
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, override_settings
from django.urls import path
from django.utils.functional import SimpleLazyObject

from django_asyncsession import (
    ConfigurationError,
    DatabaseInterface,
    checks,
    databases,
    inject_session,
    native,
    threadlocals,
)
from django_asyncsession.bridge import await_, await_here
from tests.models import User
from tests.sessions import whole

current = threading.local()


class State(threading.local):
    """What a package derives from `threading.local`."""

    shared = "of the class"

    def __init__(self, first: str) -> None:
        self.seen = [first]


class Registry:
    """Where a package keeps one in an object."""

    def __init__(self) -> None:
        self.inner = threading.local()


class Tree:
    """Each of whose subclasses has one."""

    def __init_subclass__(cls) -> None:
        cls.flags = threading.local()  # type: ignore[attr-defined]


class Leaf(Tree):
    """One of them."""


state = State("begin")
registry = Registry()
contextual = Local()
variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="")
NAMES = ["current", "state", "registry", "Tree", "contextual", "variable"]
SETTINGS = {"THREAD_LOCALS": [f"{__name__}.{name}" for name in NAMES]}


@pytest.fixture(autouse=True)
def listed() -> Iterator[None]:
    with override_settings(ASYNC_SESSION=SETTINGS):
        yield
    assert vars(current) == vars(registry.inner) == vars(Leaf.flags) == {}  # type: ignore[attr-defined]


@pytest.fixture
def native_mode() -> Iterator[None]:
    with override_settings(ASYNC_SESSION={**SETTINGS, "NATIVE_ORM": True}):
        yield


def set_user(name: str) -> None:
    current.user = name


def get_user() -> str:
    return getattr(current, "user", "nobody")


# Sessions


async def test_sessions_at_the_same_time_see_their_own(real_database: DatabaseInterface) -> None:
    """At every switch from one to the other, whatever they wait for."""
    both = asyncio.Barrier(2)

    def service(name: str) -> list[str]:
        set_user(name)
        seen = []
        for _ in range(3):
            await_(both.wait())
            with connections[real_database.alias].cursor() as cursor:
                cursor.execute("SELECT 1")
            seen.append(get_user())
        return seen

    async def request(name: str) -> list[str]:
        async with real_database.get_session(autocommit=True) as session:
            return await session.run_sync(service, name)

    found = await asyncio.gather(request("ann"), request("bob"))
    assert found == [["ann"] * 3, ["bob"] * 3]
    assert get_user() == "nobody"
    await whole(real_database)


async def test_a_session_keeps_them_between_its_calls(database: DatabaseInterface) -> None:
    async with database.get_session() as session:
        await session.run_sync(set_user, "ann")
        assert get_user() == "nobody"
        assert await session.run_sync(get_user) == "ann"
        await session.commit()
        assert await session.run_sync(get_user) == "ann"
    async with database.get_session() as session:
        assert await session.run_sync(get_user) == "nobody"


async def test_they_are_empty_again_when_the_session_is(database: DatabaseInterface) -> None:
    session = database.get_session()
    async with session:
        await session.run_sync(set_user, "ann")
    await session.reset()
    async with session:
        assert await session.run_sync(get_user) == "nobody"


async def test_what_async_code_and_threads_have_is_left_alone(database: DatabaseInterface) -> None:
    current.user = "loop"
    try:
        async with database.get_session() as session:
            assert await session.run_sync(get_user) == "nobody"
            await session.run_sync(set_user, "ann")
            assert await asyncio.to_thread(get_user) == "nobody"
        assert get_user() == "loop"
    finally:
        del current.user


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
async def test_an_error_leaves_nothing_behind(
    database: DatabaseInterface, kind: type[BaseException]
) -> None:
    def service() -> None:
        set_user("ann")
        await_(asyncio.sleep(0))
        raise kind

    async with database.get_session() as session:
        with pytest.raises(kind):
            await session.run_sync(service)
        assert get_user() == "nobody"
        assert await session.run_sync(get_user) == "ann"


async def test_a_cancelled_call_leaves_nothing_behind(database: DatabaseInterface) -> None:
    entered = asyncio.Event()
    seen = []

    def service() -> None:
        set_user("ann")
        entered.set()
        try:
            await_(asyncio.sleep(60))
        finally:
            seen.append(get_user())

    async def call() -> None:
        async with database.get_session() as session:
            await session.run_sync(service)

    task = asyncio.create_task(call())
    await entered.wait()
    assert get_user() == "nobody"
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (seen, get_user()) == (["ann"], "nobody")


async def test_a_call_that_is_never_resumed_leaves_nothing_behind(
    real_database: DatabaseInterface,
) -> None:
    seen = []

    def service() -> None:
        set_user("ann")
        try:
            await_(asyncio.get_running_loop().create_future())
        finally:
            seen.append(get_user())

    session = real_database.get_session()
    await session.begin()
    # It has its connection, so that the first step leads into the code.
    await session.run_sync(get_user)
    call = session.run_sync(service)
    call.send(None)
    call.close()
    assert (seen, get_user()) == (["ann"], "nobody")
    await session.close()


async def test_calls_at_the_same_time_begin_with_a_copy(real_database: DatabaseInterface) -> None:
    """In autocommit mode; what they change is seen by none of the others."""
    both = asyncio.Barrier(2)

    def service(name: str) -> tuple[str, str]:
        before = get_user()
        set_user(name)
        await_(both.wait())
        return before, get_user()

    async with real_database.get_session(autocommit=True) as session:
        await session.run_sync(set_user, "ann")
        calls = [session.run_sync(service, name) for name in ("bob", "eve")]
        assert await asyncio.gather(*calls) == [("ann", "bob"), ("ann", "eve")]
        assert await session.run_sync(get_user) == "bob"


async def test_reads_of_gather_begin_with_a_copy(real_database: DatabaseInterface) -> None:
    async with real_database.get_session() as session:
        await session.run_sync(set_user, "ann")
        await session.rollback()
        read = lambda s: s.run_sync(get_user)  # noqa: E731
        assert await session.gather(read, read) == ["ann", "ann"]


async def test_callbacks_of_the_commit_see_them(real_database: DatabaseInterface) -> None:
    seen = []
    async with real_database.get_session() as session:
        await session.run_sync(set_user, "ann")
        session.on_commit(lambda: seen.append(get_user()))
    assert seen == ["ann"]


async def test_a_low_level_transaction_has_its_own(database: DatabaseInterface) -> None:
    async with database.get_transaction() as transaction:
        await transaction.run(set_user, "ann")
        assert (await transaction.run(get_user), get_user()) == ("ann", "nobody")


async def test_what_connects_leaves_nothing_behind(real_database: DatabaseInterface) -> None:
    def connected(**kwargs: Any) -> None:
        set_user("receiver")

    await real_database.close()
    connection_created.connect(connected)
    try:
        async with real_database.get_session() as session:
            assert await session.run_sync(get_user) == "nobody"
    finally:
        connection_created.disconnect(connected)
    assert get_user() == "nobody"


async def test_sync_code_that_awaits_a_session_of_its_own_keeps_them(
    database: DatabaseInterface,
) -> None:
    """The inner call finds what the outer one has put there, and the other way round."""

    async with database.get_session(autocommit=True) as session:

        async def inner() -> str:
            seen = await session.run_sync(get_user)
            await session.run_sync(set_user, "changed inside")
            return seen

        def outer(how: Any) -> tuple[str, str]:
            set_user("ann")
            return how(inner()), get_user()

        for how in (await_, await_here):
            assert await session.run_sync(outer, how) == ("ann", "changed inside")
        assert get_user() == "nobody"


# Native mode


async def test_native_mode_has_one_for_all_its_sessions(
    native_mode: None, database: DatabaseInterface
) -> None:
    async def receiver() -> str:
        await User.objects.using(database.alias).acount()
        return await session.run_sync(get_user)

    def service() -> tuple[str, ...]:
        before = get_user()
        set_user("ann")
        User.objects.using(database.alias).count()
        return before, get_user(), async_to_sync(receiver)()

    async with database.get_session() as session:
        await session.run_sync(set_user, "bob")
        with native.use(session):
            assert await session.run_sync(service) == ("bob", "ann", "ann")
        assert await session.run_sync(get_user) == "ann"
    assert get_user() == "nobody"


@pytest.mark.django_db(databases="__all__")
async def test_native_mode_has_one_for_all_aliases(
    native_mode: None, database: DatabaseInterface
) -> None:
    other = next(alias for alias in connections if alias != database.alias)

    def service() -> tuple[str, str]:
        set_user("ann")
        User.objects.using(database.alias).count()
        before = get_user()
        User.objects.using(other).count()
        return before, get_user()

    async with database.get_session() as session, databases[other].get_session() as second:
        await second.run_sync(set_user, "bob")
        with native.use(session, second):
            assert await second.run_sync(get_user) == "nobody"
            assert await session.run_sync(service) == ("ann", "ann")
            assert await second.run_sync(get_user) == "ann"


# Requests


def sync_middleware(get_response: Any) -> Any:
    """Such as packages that stamp rows with the user bring."""

    def middleware(request: HttpRequest) -> Any:
        set_user("from the middleware")
        try:
            return get_response(request)
        finally:
            del current.user

    return middleware


@inject_session
async def plain(request: HttpRequest, session: Any) -> HttpResponse:
    return HttpResponse(await session.run_sync(get_user))


@inject_session
async def remedied(request: HttpRequest, session: Any) -> HttpResponse:
    await session.run_sync(set_user, "from the view")
    await session.get(User, 1)
    return HttpResponse(await session.run_sync(get_user))


urlpatterns = [path("plain/", plain), path("remedied/", remedied)]


@pytest.mark.parametrize("native_orm", [False, True])
async def test_what_a_sync_middleware_set_in_its_thread_is_not_carried(
    empty_tables: None, native_orm: bool
) -> None:
    """The remedy is to set it in the session, which keeps it."""
    middleware = [checks.MIDDLEWARE, f"{__name__}.sync_middleware"]
    session = {**SETTINGS, "NATIVE_ORM": native_orm}
    with override_settings(MIDDLEWARE=middleware, ROOT_URLCONF=__name__, ASYNC_SESSION=session):
        client = AsyncClient()
        answers = [(await client.get(f"/{name}/")).content for name in ("plain", "remedied")]
    assert answers == [b"nobody", b"from the view"]
    await databases.close_all()


# What is named


async def test_objects_and_classes_stand_for_what_is_in_them(database: DatabaseInterface) -> None:
    def change() -> None:
        registry.inner.x = Leaf.flags.x = 1  # type: ignore[attr-defined]

    def found() -> list[Any]:
        return [getattr(place, "x", None) for place in (registry.inner, Leaf.flags)]  # type: ignore[attr-defined]

    async with database.get_session() as session:
        await session.run_sync(change)
        assert (await session.run_sync(found), found()) == ([1, 1], [None, None])


async def test_one_that_begins_with_something_begins_with_it(database: DatabaseInterface) -> None:
    """As in a new thread, and with an object of its own each time."""

    def append() -> list[str]:
        state.seen.append(state.shared)
        return state.seen

    for _ in range(2):
        async with database.get_session() as session:
            assert await session.run_sync(append) == ["begin", "of the class"]
    assert state.seen == ["begin"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (f"{__name__}.nothing", "does not exist; give the module and the name in it"),
        ("nowhere.current", "does not exist"),
        (f"{__name__}.broken.x", "does not exist"),
        (f"{__name__}.NAMES", "is list and holds no threading.local; name the object itself"),
    ],
)
def test_a_name_that_leads_nowhere_is_an_error(name: str, reason: str) -> None:
    with override_settings(ASYNC_SESSION={"THREAD_LOCALS": [name]}):
        with pytest.raises(ConfigurationError, match=f"'{name}', which {reason}"):
            databases["default"].get_session()
        (problem,) = checks.check_thread_locals()
        assert problem.id == "django_asyncsession.E120" and name in problem.msg


def test_what_an_app_has_and_is_not_listed_is_warned_of() -> None:
    def warned() -> list[CheckMessage]:
        with override_settings(ASYNC_SESSION={"THREAD_LOCALS": names}):
            return [w for w in checks.check_thread_locals() if __name__ in w.msg]

    names = SETTINGS["THREAD_LOCALS"]
    assert warned() == []
    names = []
    (first, *others) = warned()
    assert first.id == "django_asyncsession.W120"
    assert f"'{__name__}.current' is a threading.local" in first.msg
    found = {w.msg.split("'")[1].removeprefix(f"{__name__}.") for w in (first, *others)}
    assert found == {"current", "state", "registry.inner", "Leaf.flags"}


def test_looking_for_them_evaluates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def evaluate() -> None:
        pytest.fail("a lazy object was evaluated")

    monkeypatch.setitem(globals(), "lazy", SimpleLazyObject(evaluate))
    # As some packages leave them behind.
    monkeypatch.setitem(sys.modules, f"{__name__}.gone", None)
    with override_settings(ASYNC_SESSION={}):
        assert checks.check_thread_locals()


def test_a_name_whose_module_cannot_be_imported_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("import nowhere_at_all\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    with (
        override_settings(ASYNC_SESSION={"THREAD_LOCALS": ["broken_module.current"]}),
        pytest.raises(ConfigurationError, match="cannot be imported: No module named 'nowhere"),
    ):
        threadlocals.new()


def test_without_any_a_call_costs_nothing() -> None:
    with override_settings(ASYNC_SESSION={}):
        assert threadlocals.new() is None
