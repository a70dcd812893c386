"""The testing toolkit: sync code, sessions and requests share one transaction in a test."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import factory
import pytest
from asgiref.sync import async_to_sync, sync_to_async
from asgiref.testing import ApplicationCommunicator
from channels.generic.websocket import AsyncJsonWebsocketConsumer
from django.core.exceptions import SynchronousOnlyOperation
from django.db import IntegrityError, connections, transaction
from django.db.models.signals import post_save
from django.http import HttpRequest, HttpResponse, JsonResponse, StreamingHttpResponse
from django.test import AsyncClient, Client, override_settings
from django.urls import path
from model_bakery import baker

from django_asyncsession import Session, databases, inject_session
from django_asyncsession.exceptions import (
    PoolTimeout,
    SessionClosedError,
    SessionInUseError,
    SessionStateError,
    SharedConnectionWarning,
)
from django_asyncsession.testing import (
    assert_no_leaks,
    async_assert_num_queries,
    capture_on_commit_callbacks,
    capture_queries,
    sharing,
)
from django_asyncsession.views import UpdateView
from tests.models import Author, Book, User

pytestmark = pytest.mark.django_db(databases="__all__")
COUNT = "SELECT count(*) FROM tests_user"


async def rename(request: HttpRequest, pk: int) -> HttpResponse:
    session = request.db_session  # type: ignore[attr-defined]
    user = await session.get_one(User, pk)
    user.name = "renamed"
    await session.add(user)
    return JsonResponse({"name": user.name})


async def fail(request: HttpRequest, pk: int) -> HttpResponse:
    await rename(request, pk)
    raise ZeroDivisionError


async def names(request: HttpRequest) -> StreamingHttpResponse:
    async def lines() -> Any:
        async for row in request.db_session.stream(  # type: ignore[attr-defined]
            "SELECT name FROM tests_user ORDER BY id", chunk_size=1
        ):
            yield row["name"] + "\n"

    return StreamingHttpResponse(lines())


def sync_name(request: HttpRequest, pk: int) -> HttpResponse:
    alias = request.GET["alias"]
    return JsonResponse({"name": User.objects.using(alias).get(pk=pk).name})


async def rename_natively(request: HttpRequest, pk: int) -> HttpResponse:
    user = await User.objects.using(request.db_session.alias).aget(pk=pk)  # type: ignore[attr-defined]
    user.name = "renamed"
    await user.asave()
    return JsonResponse({"name": user.name})


class Rename(UpdateView):
    fields = ("name",)
    success_url = "/names"

    def get_queryset(self) -> Any:
        return User.objects.using(self.request.db_session.alias)  # type: ignore[attr-defined]


urlpatterns = [
    path("class/<int:pk>", Rename.as_view()),
    path("natively/<int:pk>", rename_natively),
    path("rename/<int:pk>", rename),
    path("fail/<int:pk>", fail),
    path("names", names),
    path("sync/<int:pk>", sync_name),
]


@pytest.fixture
def user(alias: str, async_databases: Any) -> User:
    """A user that a sync fixture made."""
    return User.objects.using(alias).create(name="made")


@pytest.fixture
def site(alias: str) -> Iterator[None]:
    """The views above, with the middleware's session on the database of this alias."""
    with override_settings(ROOT_URLCONF=__name__, ASYNC_SESSION={"ALIAS": alias}):
        yield


# One transaction


@pytest.mark.usefixtures("site")
async def test_a_view_changes_what_a_sync_fixture_made(alias: str, user: User) -> None:
    """The one sentence of the toolkit: made in a sync fixture, changed in an async view, read back
    through both."""
    response = await AsyncClient().get(f"/rename/{user.pk}")
    assert response.status_code == 200
    assert (await User.objects.using(alias).aget(pk=user.pk)).name == "renamed"
    async with databases[alias].get_session() as session:
        assert (await session.get_one(User, user.pk)).name == "renamed"


@pytest.mark.usefixtures("site")
def test_requests_of_the_sync_client_see_it_too(alias: str, user: User) -> None:
    assert Client().get(f"/sync/{user.pk}?alias={alias}").json() == {"name": "made"}
    request = AsyncClient().get
    assert async_to_sync(request)(f"/rename/{user.pk}").json() == {"name": "renamed"}
    user.refresh_from_db()
    assert user.name == "renamed"


@pytest.mark.parametrize("is_native", [False, True])
@pytest.mark.usefixtures("site")
async def test_a_class_based_view_changes_it(alias: str, user: User, is_native: bool) -> None:
    with override_settings(ASYNC_SESSION={"ALIAS": alias, "NATIVE_ORM": is_native}):
        response = await AsyncClient().post(f"/class/{user.pk}", {"name": "renamed"})
    assert response.status_code == 302
    assert await sync_to_async(User.objects.using(alias).get)(name="renamed") == user


@pytest.mark.usefixtures("site")
async def test_a_request_that_fails_undoes_only_its_own_work(alias: str, user: User) -> None:
    client = AsyncClient(raise_request_exception=False)
    assert (await client.get(f"/fail/{user.pk}")).status_code == 500
    assert (await User.objects.using(alias).aget(pk=user.pk)).name == "made"


@pytest.mark.usefixtures("site")
async def test_a_streaming_response_reads_its_rows(alias: str, user: User) -> None:
    await User.objects.using(alias).acreate(name="second")
    response = await AsyncClient().get("/names")
    assert [part async for part in response.streaming_content] == [b"made\n", b"second\n"]
    async with databases[alias].get_session() as session:
        assert await session.fetch_value(COUNT) == 2


@pytest.mark.usefixtures("site")
async def test_sync_views_and_threads_use_the_same_connection(alias: str, user: User) -> None:
    async with databases[alias].get_session() as session:
        await session.execute("UPDATE tests_user SET name = 'changed'")
    response = await AsyncClient().get(f"/sync/{user.pk}?alias={alias}")
    assert response.json() == {"name": "changed"}
    name = await sync_to_async(lambda: User.objects.using(alias).get().name)()
    assert name == "changed"


async def test_there_is_one_connection(alias: str, user: User) -> None:
    wrapper = connections[alias]
    async with databases[alias].get_session() as session:
        assert await session.run_sync(lambda: connections[alias]) is wrapper
        assert databases[alias].stats()["pool_size"] == 0
    assert await sync_to_async(lambda: connections[alias])() is wrapper


async def test_a_session_is_a_savepoint(alias: str, user: User) -> None:
    async with databases[alias].get_session() as session:
        await session.add(User(name="kept"))
        depth = len(connections[alias].savepoint_ids)
        with pytest.raises(ZeroDivisionError):
            async with session.begin_nested():
                await session.add(User(name="undone"))
                raise ZeroDivisionError
        await session.commit()
        assert len(connections[alias].savepoint_ids) == depth - 1
        await session.add(User(name="undone too"))
        await session.rollback()
    found = User.objects.using(alias).values_list("name", flat=True)
    assert sorted(await sync_to_async(list)(found)) == ["kept", "made"]


async def test_an_error_in_a_session_leaves_the_test_usable(alias: str) -> None:
    async with databases[alias].get_session() as session:
        await session.add(Author(name="one"))
    with pytest.raises(IntegrityError):
        async with databases[alias].get_session() as session:
            await session.add(Author(name="one"))
    assert await Author.objects.using(alias).acount() == 1


async def test_statements_in_autocommit_mode_keep_what_they_did(alias: str) -> None:
    session = databases[alias].get_session(autocommit=True)
    async with session:
        await session.add(Author(name="one"))
        with pytest.raises(IntegrityError):
            await session.execute("INSERT INTO tests_author (name) VALUES ('one')")
        await session.execute("INSERT INTO tests_author (name) VALUES ('two')")
        async with session.atomic(durable=True):
            await session.execute("INSERT INTO tests_author (name) VALUES ('three')")

        def durable() -> None:
            with transaction.atomic(using=alias, durable=True):
                Author.objects.using(alias).create(name="four")

        await session.run_sync(durable)
    assert await Author.objects.using(alias).acount() == 4
    assert connections[alias].needs_rollback is False


async def test_a_block_in_autocommit_mode_is_undone_as_a_whole(alias: str) -> None:
    """Also one that asks for no savepoint, as Django's own do: in production it is a
    transaction."""
    pair = [Author(name="same"), Author(name="same")]

    def save_both() -> None:
        with transaction.atomic(using=alias, savepoint=False):
            for author in pair:
                author.save(using=alias, force_insert=True)

    async with databases[alias].get_session(autocommit=True) as session:
        for attempt in (partial(session.add_all, pair), partial(session.run_sync, save_both)):
            with pytest.raises(IntegrityError):
                await attempt()
            assert await session.fetch_value("SELECT count(*) FROM tests_author") == 0
        assert await session.add(pair[0])
    assert await Author.objects.using(alias).acount() == 1


async def test_a_deferred_constraint_fails_at_the_commit_of_the_session(alias: str) -> None:
    if not connections[alias].features.can_defer_constraint_checks:
        pytest.skip("constraints are checked at once")
    session = databases[alias].get_session()
    await session.begin()
    await session.execute(
        "INSERT INTO tests_book (title, author_id, price, updated) "
        "VALUES ('x', 12345, 1, '2026-01-01')"
    )
    with pytest.raises(IntegrityError):
        await session.commit()
    assert await Book.objects.using(alias).acount() == 0


async def test_isolation_warns_that_it_cannot_apply(alias: str) -> None:
    with pytest.warns(SharedConnectionWarning, match="isolation='serializable'.*test_testing.py"):
        async with databases[alias].get_session(isolation="serializable") as session:
            await session.fetch_value("SELECT 1")


async def test_other_databases_stay_refused_in_a_session(alias: str, user: User) -> None:
    other = "default" if alias != "default" else "sqlite"
    async with databases[alias].get_session() as session:
        with pytest.raises(Exception, match="is not the database of this session"):
            await session.run_sync(User.objects.using(other).count)
    assert await User.objects.using(other).acount() == 0


@pytest.mark.usefixtures("site")
async def test_native_mode_works_in_the_test(alias: str, user: User, request: Any) -> None:
    client = request.getfixturevalue("async_client_native")
    threads: list[int] = []

    def saved(**kwargs: Any) -> None:
        threads.append(threading.get_ident())

    post_save.connect(saved, sender=User)
    response = await client.get(f"/natively/{user.pk}")
    post_save.disconnect(saved, sender=User)
    assert response.json() == {"name": "renamed"}
    assert threads == [threading.get_ident()]
    async with databases[alias].get_session() as session:
        assert (await session.get_one(User, user.pk)).name == "renamed"


async def test_the_own_session_costs_one_savepoint(alias: str, request: Any) -> None:
    wrapper = connections[alias]
    wrapper.force_debug_cursor = True
    wrapper.queries_log.clear()
    with override_settings(ASYNC_SESSION={"ALIAS": alias}):
        session = request.getfixturevalue("async_session")
    assert not wrapper.queries_log
    await session.fetch_value(COUNT)
    await session.fetch_value(COUNT)
    wrapper.force_debug_cursor = False
    sent = [query["sql"].split()[0] for query in wrapper.queries_log]
    assert sent == ["SAVEPOINT", "SELECT", "SELECT"]


# Consumers


class Counter(AsyncJsonWebsocketConsumer):
    @inject_session
    async def receive_json(self, content: Any, session: Session) -> None:
        await session.add(User(name=content["name"]))
        await self.send_json({"users": await session.fetch_value(COUNT)})


@pytest.mark.usefixtures("site")
async def test_a_channels_consumer_works_in_the_test(alias: str, user: User) -> None:
    communicator = ApplicationCommunicator(Counter.as_asgi(), {"type": "websocket"})
    await communicator.send_input({"type": "websocket.connect"})
    assert (await communicator.receive_output())["type"] == "websocket.accept"
    await communicator.send_input({"type": "websocket.receive", "text": '{"name": "visitor"}'})
    assert (await communicator.receive_output())["text"] == '{"users": 2}'
    await communicator.send_input({"type": "websocket.disconnect", "code": 1000})
    await communicator.wait()
    assert await User.objects.using(alias).acount() == 2


# Factories


async def test_factory_boy_in_a_session_and_in_a_thread(alias: str) -> None:
    class UserFactory(factory.django.DjangoModelFactory):
        name = factory.Sequence("user {}".format)

        class Meta:
            model = User
            database = alias

    user = await sync_to_async(UserFactory)(name="by a thread")
    async with databases[alias].get_session() as session:
        await session.run_sync(UserFactory, name="by a session")
        await session.run_sync(UserFactory.create_batch, 3)
        assert await session.fetch_value(COUNT) == 5
        assert (await session.get_one(User, user.pk)).name == "by a thread"


async def test_model_bakery_in_a_session_and_in_a_thread(alias: str) -> None:
    book = await sync_to_async(baker.make)(Book, title="by a thread", _using=alias)
    async with databases[alias].get_session() as session:
        await session.run_sync(baker.make, Book, _quantity=2, _using=alias)
        assert await session.fetch_value("SELECT count(*) FROM tests_book") == 3
        assert (await session.get_one(Book, book.pk)).title == "by a thread"
    assert await Author.objects.using(alias).acount() == 3


# Sessions that are open at the same time


async def test_the_own_session_of_the_test_takes_others_in(site: None, async_session: Any) -> None:
    alias = async_session.alias
    user = await async_session.add(User(name="made"))
    response = await AsyncClient().get(f"/rename/{user.pk}")
    assert response.status_code == 200
    await async_session.refresh(user)
    assert user.name == "renamed"
    assert await User.objects.using(alias).acount() == 1


async def test_sessions_of_several_tasks_take_turns(alias: str, async_databases: Any) -> None:
    order: list[str] = []

    async def work(name: str) -> None:
        async with databases[alias].get_session() as session:
            await session.add(User(name=name))
            order.append(f"{name} begins")
            await asyncio.sleep(0)
            await session.fetch_value(COUNT)
            order.append(f"{name} ends")

    await asyncio.gather(work("a"), work("b"), work("c"))
    assert order == [f"{n} {what}" for n in "abc" for what in ("begins", "ends")]
    assert await User.objects.using(alias).acount() == 3


async def test_a_session_of_a_child_task_nests_in_that_of_its_parent(alias: str) -> None:
    async def work() -> None:
        async with databases[alias].get_session() as session:
            await session.add(User(name="child"))

    async with databases[alias].get_session() as session:
        await session.add(User(name="parent"))
        await asyncio.gather(work(), work())
        assert await session.fetch_value(COUNT) == 3


async def test_a_session_that_is_used_out_of_order_is_told(alias: str) -> None:
    async with databases[alias].get_session() as outer:
        await outer.fetch_value(COUNT)
        async with databases[alias].get_session() as inner:
            await inner.fetch_value(COUNT)
            with pytest.raises(SessionInUseError, match=r"test_testing\.py.*share one connection"):
                await outer.fetch_value(COUNT)
        assert await outer.fetch_value(COUNT) == 0


async def test_who_waits_for_ever_is_told_for_whom(
    alias: str, async_databases: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "TURN_SECONDS", 0.05)
    begun = asyncio.Event()
    end = asyncio.Event()

    async def hold() -> None:
        async with databases[alias].get_session() as session:
            await session.fetch_value(COUNT)
            begun.set()
            await end.wait()

    task = asyncio.create_task(hold(), name="the holder")
    await begun.wait()
    session = databases[alias].get_session()
    with pytest.raises(PoolTimeout, match="'the holder'"):
        async with session:
            await session.fetch_value(COUNT)
    end.set()
    await task


async def test_threads_and_sessions_do_not_meet_on_the_wire(alias: str, user: User) -> None:
    """Sync code in a thread, while a session works: each statement waits for the other."""

    def sync() -> None:
        for _ in range(50):
            User.objects.using(alias).count()

    async def native() -> None:
        async with databases[alias].get_session() as session:
            for _ in range(50):
                await session.fetch_value(COUNT)

    await asyncio.gather(sync_to_async(sync)(), native(), native())


async def test_code_that_closes_its_connection_does_not_end_the_test(
    alias: str, user: User
) -> None:
    def job() -> int:
        try:
            return User.objects.using(alias).count()
        finally:
            connections.close_all()

    assert await asyncio.to_thread(job) == await sync_to_async(job)() == 1
    async with databases[alias].get_session() as session:
        assert await session.fetch_value(COUNT) == 1
    with pytest.raises(SynchronousOnlyOperation):
        connections[alias].close()


# Callbacks


async def test_callbacks_run_when_they_are_captured(alias: str, user: User) -> None:
    done: list[str] = []

    async def later() -> None:
        async with databases[alias].get_session() as session:
            done.append(f"async {await session.fetch_value(COUNT)}")

    async with capture_on_commit_callbacks(alias, execute=True) as callbacks:
        async with databases[alias].get_session() as session:
            session.on_commit(later)
            await session.add(User(name="x"))
            session.on_commit(lambda: done.append("plain"))
        with pytest.raises(ZeroDivisionError):
            async with databases[alias].get_session() as session:
                await session.add(User(name="y"))
                session.on_commit(lambda: done.append("never"))
                raise ZeroDivisionError
        async with databases[alias].get_session() as session:
            session.on_commit(lambda: done.append("without a statement"))
        await sync_to_async(
            lambda: transaction.on_commit(lambda: done.append("of sync code"), using=alias)
        )()
        assert done == []
    assert done == ["async 2", "plain", "without a statement", "of sync code"]
    assert callbacks[0] is later


async def test_callbacks_that_are_not_captured_do_not_run(alias: str) -> None:
    async with (
        capture_on_commit_callbacks(alias) as callbacks,
        databases[alias].get_session() as session,
    ):
        await session.add(User(name="x"))
        session.on_commit(lambda: pytest.fail("called"))
    assert len(callbacks) == 1


# Statements


async def test_statements_are_counted_whoever_sends_them(alias: str, user: User) -> None:
    with capture_queries(alias) as queries:
        async with databases[alias].get_session() as session:
            await session.get_one(User, user.pk)
        await User.objects.using(alias).acount()
    assert len(queries) == 2
    assert "tests_user" in queries[0]["sql"]
    assert queries[0]["params"]
    assert queries[0]["time"] >= 0
    await User.objects.using(alias).acount()
    assert len(queries) == 2


async def test_a_wrong_number_of_statements_is_shown(alias: str, user: User) -> None:
    async with async_assert_num_queries(1, using=alias), databases[alias].get_session() as session:
        await session.fetch_value(COUNT)
    wrong = r"1 statements on .*, 2 expected:\n1\. SELECT"
    with pytest.raises(AssertionError, match=wrong):
        async with async_assert_num_queries(2, using=alias):
            await User.objects.using(alias).acount()


# Cancellations and leaks


async def test_a_cancelled_statement_leaves_the_connection_usable(alias: str, user: User) -> None:
    slow = {
        "postgresql": "SELECT pg_sleep(60)",
        "mysql": "SELECT SLEEP(60)",
        "sqlite": "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM c "
        "LIMIT 3000000) SELECT count(*) FROM c",
    }[connections[alias].vendor]
    if connections[alias].vendor == "mysql":
        slow = "SELECT SLEEP(0.5)"
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), databases[alias].get_session() as session:
            await session.add(User(name="undone"))
            await session.fetch_value(slow)
    assert await User.objects.using(alias).acount() == 1
    async with databases[alias].get_session() as session:
        assert await session.fetch_value(COUNT) == 1


async def test_an_open_session_is_named(alias: str, async_databases: Any) -> None:
    session = databases[alias].get_session()
    with pytest.raises(AssertionError, match=r"test_testing\.py.*is still open"):
        async with assert_no_leaks():
            await session.begin()
            await session.fetch_value(COUNT)
    await session.close()
    async with assert_no_leaks(), databases[alias].get_session() as session:
        await session.fetch_value(COUNT)


async def test_a_cursor_ends_with_its_session(alias: str, user: User) -> None:
    async with databases[alias].get_session() as session:
        cursor = await session.run_sync(lambda: connections[alias].cursor())
        await session.run_sync(cursor.execute, COUNT)
    with pytest.raises(SessionClosedError):
        await sync_to_async(cursor.fetchone)()


# Reads at the same time


async def test_gather_reads_what_the_test_has_not_committed(
    alias: str, user: User, async_databases: Any
) -> None:
    counts = [lambda s: s.fetch_value(COUNT)] * 3
    for options in ({}, {"autocommit": True}):
        async with async_databases[alias].get_session(**options) as session:
            assert await session.gather(*counts, User.objects.all()) == [1, 1, 1, [user]]
            assert await session.gather(*counts) == [1, 1, 1]


async def test_gather_refuses_a_session_that_has_written_as_in_production(
    alias: str, user: User, async_databases: Any
) -> None:
    async with async_databases[alias].get_session() as session:
        async with async_databases[alias].get_session() as inner:
            await inner.add(User(name="of another session"))
        assert await session.gather(lambda s: s.fetch_value(COUNT)) == [2]
        await session.add(User(name="new"))
        with pytest.raises(SessionStateError, match=r"\(INSERT\)"):
            await session.gather(User.objects.all())
