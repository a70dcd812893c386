"""`@background_session`: tasks that outlive the request, each with a session of its own.

With real commits: a task and its request have connections of their own, and each sees what the
other has committed.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
import threading
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from asgiref.testing import ApplicationCommunicator
from django.core.asgi import get_asgi_application
from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.test import AsyncClient, override_settings
from django.urls import path

from django_asyncsession import (
    DatabaseInterface,
    Session,
    SessionClosedError,
    SyncContextError,
    background_session,
    databases,
    decorators,
    native,
)
from tests.faults import cancel_at, outcome_of
from tests.models import User
from tests.sessions import INSERT, names, whole

MIDDLEWARE = ["django_asyncsession.middleware.AsyncSessionMiddleware"]
# What a test gives to the views, and gets from them.
here: dict[str, Any] = {}


class Gate:
    """Two events: the task has come here, and it may go on."""

    def __init__(self) -> None:
        self.reached, self.opened = asyncio.Event(), asyncio.Event()

    async def pass_through(self) -> None:
        self.reached.set()
        await self.opened.wait()


@background_session
async def register(name: str, session: Session) -> str:
    """Adds a user, waits, and adds another."""
    here["session"] = session
    await session.add(User(name=name))
    await here["gate"].pass_through()
    await session.add(User(name=f"{name} again"))
    return name


@background_session
async def register_natively(name: str) -> None:
    await User.objects.acreate(name=name)
    await here["gate"].pass_through()
    await User.objects.acreate(name=f"{name} again")


async def start(request: HttpRequest, how: str) -> HttpResponse:
    await request.db_session.add(User(name="of the request"))
    function = register if how == "session" else register_natively
    here["task"] = asyncio.create_task(function("later"))
    await here["gate"].reached.wait()
    count = await request.db_session.fetch_value("SELECT COUNT(*) FROM tests_user")
    if request.GET.get("fail"):
        raise ValueError("after the task has begun")
    return HttpResponse(str(count))


async def after_commit(request: HttpRequest, how: str) -> HttpResponse:
    def begin() -> asyncio.Task[Any]:
        here["task"] = asyncio.create_task(count_after_commit())
        return here["task"]  # type: ignore[no-any-return]

    if how == "session":
        request.db_session.on_commit(begin)
    else:
        transaction.on_commit(begin)
    await request.db_session.add(User(name="of the request"))
    if request.GET.get("fail"):
        raise ValueError("after the insert")
    return HttpResponse("ok")


@background_session
async def count_after_commit(session: Session) -> Any:
    await here["gate"].pass_through()
    return await session.fetch_value("SELECT COUNT(*) FROM tests_user")


async def careless(request: HttpRequest, how: str) -> HttpResponse:
    """Does what is wrong: the task uses what belongs to the request."""

    async def later() -> None:
        await here["gate"].pass_through()
        if how == "session":
            await request.db_session.add(User(name="foreign"))
        elif native.current() is not None:
            await User.objects.acreate(name="foreign")

    here["task"] = asyncio.create_task(later())
    await request.db_session.add(User(name="of the request"))
    return HttpResponse("ok")


async def held(request: HttpRequest, how: str) -> HttpResponse:
    """Another request, in whose transaction there is nothing of the task."""
    await request.db_session.add(User(name="second"))
    here["gate"].opened.set()
    if how == "careless":
        here["outcome"] = await outcome_of(here["task"])
    count = await request.db_session.fetch_value("SELECT COUNT(*) FROM tests_user")
    here["count"] = count
    raise ValueError("rolled back")


@background_session
async def blocking() -> None:
    await here["gate"].pass_through()
    here["of the task"] = await sync_to_async(threading.current_thread)()


async def outlive(request: HttpRequest, how: str) -> HttpResponse:
    here["task"] = asyncio.create_task(blocking())
    here["of the request"] = await sync_to_async(threading.current_thread)()
    return HttpResponse("ok")


views = (start, after_commit, careless, held, outlive)
urlpatterns = [path(f"{view.__name__}/<str:how>/", view) for view in views]


@pytest.fixture(autouse=True, params=[{}, {"NATIVE_ORM": True}], ids=["", "native"])
async def mode(request: Any) -> AsyncIterator[dict[str, Any]]:
    with override_settings(
        ROOT_URLCONF=__name__, MIDDLEWARE=MIDDLEWARE, ASYNC_SESSION=request.param
    ):
        here.clear()
        here["gate"] = Gate()
        yield request.param
        here.clear()
        await databases.close_all()


in_native_mode = pytest.mark.parametrize(
    "mode", [{"NATIVE_ORM": True}], ids=["native"], indirect=True
)
without_native_mode = pytest.mark.parametrize("mode", [{}], ids=[""], indirect=True)
HOW = pytest.mark.parametrize("how", ["session", "native"])


@pytest.fixture
def default(empty_tables: None) -> DatabaseInterface:
    return databases["default"]


@pytest.fixture
def quiet() -> AsyncClient:
    return AsyncClient(raise_request_exception=False)


def skip_if(how: str, mode: dict[str, Any]) -> None:
    if how == "native" and not mode:
        pytest.skip("Django's own methods use a session in native mode only")


# Beside a request


@HOW
async def test_it_has_a_transaction_of_its_own_and_ends_after_the_request(
    how: str, mode: dict[str, Any], default: DatabaseInterface
) -> None:
    skip_if(how, mode)
    response = await AsyncClient().get(f"/start/{how}/")
    # The request did not see the task's row, and was answered before the task has ended.
    assert response.content == b"1"
    assert await names(default) == ["of the request"]
    here["gate"].opened.set()
    await here["task"]
    assert await names(default) == ["later", "later again", "of the request"]
    await whole(default)


@HOW
async def test_it_is_saved_when_the_request_is_rolled_back(
    how: str, mode: dict[str, Any], default: DatabaseInterface, quiet: AsyncClient
) -> None:
    skip_if(how, mode)
    assert (await quiet.get(f"/start/{how}/?fail=1")).status_code == 500
    here["gate"].opened.set()
    await here["task"]
    assert await names(default) == ["later", "later again"]


@pytest.mark.parametrize("how", ["session", "native"])
async def test_a_callback_of_the_commit_starts_it_and_the_request_does_not_wait(
    how: str, mode: dict[str, Any], default: DatabaseInterface
) -> None:
    skip_if(how, mode)
    assert (await AsyncClient().get(f"/after_commit/{how}/")).status_code == 200
    assert not here["task"].done()
    here["gate"].opened.set()
    assert await here["task"] == 1


@HOW
async def test_after_a_rollback_the_callback_does_not_start_it(
    how: str, mode: dict[str, Any], default: DatabaseInterface, quiet: AsyncClient
) -> None:
    skip_if(how, mode)
    assert (await quiet.get(f"/after_commit/{how}/?fail=1")).status_code == 500
    assert "task" not in here


@HOW
async def test_a_task_without_it_gets_no_part_in_a_later_request(
    how: str, mode: dict[str, Any], empty_tables: None, quiet: AsyncClient
) -> None:
    """The later request has the same connection, which is the only one."""
    with override_settings(ASYNC_SESSION={**mode, "POOLS": {"default": {"max_size": 1}}}):
        await databases.close_all()
        assert (await quiet.get(f"/careless/{how}/")).status_code == 200
        await here["gate"].reached.wait()
        assert (await quiet.get("/held/careless/")).status_code == 500
        if how == "session":
            assert isinstance(here["outcome"], SessionClosedError)
        else:
            assert here["outcome"] is None
        assert here["count"] == 2
        assert await names(databases["default"]) == ["of the request"]
        await databases.close_all()


async def test_with_it_a_task_waits_for_a_connection_and_has_a_transaction_of_its_own(
    mode: dict[str, Any], empty_tables: None, quiet: AsyncClient
) -> None:
    with override_settings(ASYNC_SESSION={**mode, "POOLS": {"default": {"max_size": 1}}}):
        await databases.close_all()
        here["task"] = asyncio.create_task(count_after_commit())
        await here["gate"].reached.wait()
        assert (await quiet.get("/held/careful/")).status_code == 500
        # The row of the request that held the connection was there, and then rolled back.
        assert (here["count"], await here["task"]) == (1, 0)
        await whole(databases["default"])
        await databases.close_all()


async def test_sync_code_has_a_thread_of_its_own_which_ends_with_the_task() -> None:
    scope = {"type": "http", "method": "GET", "path": "/outlive/x/", "headers": []}
    server = ApplicationCommunicator(get_asgi_application(), scope)
    await server.send_input({"type": "http.request", "body": b""})
    assert (await server.receive_output(5))["status"] == 200
    await server.receive_output(5)
    await server.wait(5)
    here["gate"].opened.set()
    await here["task"]
    assert here["of the task"] is not here["of the request"]
    here["of the task"].join(5)
    assert not here["of the task"].is_alive()


@in_native_mode
async def test_awaited_in_a_request_it_gives_the_current_session_back(
    default: DatabaseInterface,
) -> None:
    here["gate"].opened.set()
    async with default.get_session() as session, native.use(session):
        outer = native.current()
        await register_natively("Ada")
        assert native.current() is outer
        await User.objects.acreate(name="Bob")
        await session.rollback()
    assert await names(default) == ["Ada", "Ada again"]


@in_native_mode
async def test_other_databases_are_saved_with_it(default: DatabaseInterface) -> None:
    @background_session
    async def both(fails: bool) -> None:
        await User.objects.using("sqlite").acreate(name="there")
        await User.objects.acreate(name="here")
        if fails:
            raise ValueError("after the inserts")

    assert isinstance(await outcome_of(both(True)), ValueError)
    assert await names(default) == await names(databases["sqlite"]) == []
    await asyncio.create_task(both(False))
    assert (await names(default), await names(databases["sqlite"])) == (["here"], ["there"])


# Its end


@without_native_mode
async def test_it_commits_on_every_database(real_database: DatabaseInterface) -> None:
    db = real_database

    @background_session(alias=db.alias, name="db", timeout=5.0)
    async def add(name: str, *, db: Session) -> None:
        await db.execute(INSERT, [name])

    await asyncio.create_task(add("Ada"))
    assert await names(db) == ["Ada"]
    await whole(db)


async def test_an_error_rolls_back_and_is_the_tasks(default: DatabaseInterface) -> None:
    @background_session
    async def fail(session: Session) -> None:
        await session.add(User(name="half"))
        raise ValueError("after the insert")

    with pytest.raises(ValueError, match="after the insert"):
        await asyncio.create_task(fail())
    assert await names(default) == []
    await whole(default)


async def test_an_error_that_nobody_asks_for_is_logged(default: DatabaseInterface) -> None:
    logged: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: logged.append(context))
    ended = asyncio.Event()

    @background_session
    async def fail(session: Session) -> None:
        raise ValueError("nobody asks")

    asyncio.create_task(fail()).add_done_callback(lambda _: ended.set())
    await ended.wait()
    await asyncio.sleep(0)
    gc.collect()
    assert [str(context["exception"]) for context in logged] == ["nobody asks"]


@without_native_mode
async def test_wherever_it_is_cancelled_the_pool_is_whole(real_database: DatabaseInterface) -> None:
    db = real_database

    @background_session(alias=db.alias)
    async def add(step: int, session: Session) -> None:
        await session.execute(INSERT, [f"Ada {step}"])
        await session.execute(INSERT, [f"Bob {step}"])

    await db.connect()
    for step in range(1, 100):
        cancelled = cancel_at(add(step), {step})
        outcome = await outcome_of(cancelled)
        await whole(db)
        if cancelled.done:
            break
        assert isinstance(outcome, asyncio.CancelledError)
    # A COMMIT that was sent may be done at any time after its cancellation, so each step has rows
    # of its own.
    saved = await names(db)
    for number in range(1, step + 1):
        assert (f"Ada {number}" in saved) == (f"Bob {number}" in saved)
    assert step > 3 and "Ada 1" not in saved and f"Ada {step}" in saved
    assert not decorators._running


async def test_a_task_that_nobody_holds_is_not_collected(default: DatabaseInterface) -> None:
    class Place: ...

    place = Place()
    waiting: weakref.ref[asyncio.Future[None]]
    reached = asyncio.Event()

    @background_session
    async def wait(place: Place, session: Session) -> None:
        nonlocal waiting
        await session.add(User(name="Ada"))
        # Only the task itself refers to what it waits for.
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        waiting = weakref.ref(future)
        reached.set()
        await future

    asyncio.create_task(wait(place))  # noqa: RUF006
    await reached.wait()
    await asyncio.sleep(0)
    gc.collect()
    future = waiting()
    assert future is not None
    (task,) = decorators._running.values()
    assert task is not None
    future.set_result(None)
    del future
    await task
    assert await names(default) == ["Ada"]
    assert not decorators._running


@without_native_mode
def test_when_the_server_stops_it_is_cancelled_and_rolled_back(default: DatabaseInterface) -> None:
    ended: list[bool] = []

    @background_session
    async def wait(begun: asyncio.Event, session: Session) -> None:
        await session.add(User(name="Ada"))
        begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            ended.append(True)
            raise

    async def serve() -> None:
        begun = asyncio.Event()
        asyncio.create_task(wait(begun))  # noqa: RUF006
        await begun.wait()

    asyncio.run(serve())
    assert ended == [True] and not decorators._running
    assert asyncio.run(names_and_close(default)) == []


async def names_and_close(db: DatabaseInterface) -> list[str]:
    try:
        return await names(db)
    finally:
        await databases.close_all()


async def test_closing_the_pools_gives_it_time_to_end(default: DatabaseInterface) -> None:
    here["task"] = asyncio.create_task(register("Ada"))
    await here["gate"].reached.wait()
    closing = asyncio.create_task(databases.close_all(grace=30))
    await asyncio.sleep(0)
    here["gate"].opened.set()
    await closing
    assert await here["task"] == "Ada"
    assert await names(default) == ["Ada", "Ada again"]


@without_native_mode
def test_a_loop_that_is_closed_before_its_end_is_forgotten(default: DatabaseInterface) -> None:
    @background_session
    async def wait() -> None:
        await asyncio.Event().wait()

    loop = asyncio.new_event_loop()
    task = loop.create_task(wait())
    loop.run_until_complete(asyncio.sleep(0))
    assert list(decorators._running.values()) == [task]
    loop.close()
    here["gate"].opened.set()

    async def other() -> str:
        here["gate"] = Gate()
        here["gate"].opened.set()
        try:
            return await register("Ada")
        finally:
            await databases.close_all()

    assert asyncio.run(other()) == "Ada"
    assert not decorators._running
    # Python reports a pending task that is destroyed; this one has nothing left to do.
    task._log_destroy_pending = False  # type: ignore[attr-defined]


# In a test's transaction


@pytest.mark.django_db
async def test_in_a_test_it_takes_its_turn_after_the_request() -> None:
    async with databases["default"].get_session() as session:
        await session.add(User(name="Ada"))
        here["task"] = asyncio.create_task(register("later"))
        # It has begun, and waits for its turn.
        while "session" not in here:
            await asyncio.sleep(0)
        assert await session.fetch_value("SELECT COUNT(*) FROM tests_user") == 1
        assert not here["gate"].reached.is_set()
    here["gate"].opened.set()
    assert await here["task"] == "later"
    assert await User.objects.acount() == 3


# The decorator


async def test_a_caller_that_passes_a_session_is_left_alone(default: DatabaseInterface) -> None:
    here["gate"].opened.set()
    async with default.get_session() as session:
        await register("Ada", session=session)
        assert here["session"] is session
        await session.rollback()
    assert await names(default) == []


def test_what_is_not_a_coroutine_function_is_refused() -> None:
    def function(session: Session) -> None: ...

    with pytest.raises(SyncContextError, match=r"@background_session on .* make it `async def`"):
        background_session(function)


def test_the_session_is_not_in_the_signature() -> None:
    assert str(inspect.signature(register)) == "(name: str) -> str"
    assert inspect.iscoroutinefunction(register)
